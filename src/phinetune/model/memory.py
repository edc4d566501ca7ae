"""Memory that the system keeps for this process on a CPU: pages of mapped weight files, and freed blocks.

Things that torch does not do by itself: giving back the pages of a mapped file when its weights are not needed any more; keeping freed
blocks for the next step instead of handing them to the kernel, which zeroes them again page by page; handing over what is left when a
large piece of work is done. They are Linux's (glibc's); elsewhere nothing happens. Not here: how much memory a run needs.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # madvise's MADV_DONTNEED on Linux
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # what glibc's mallopt sets
_NEVER = (1 << 31) - 1  # bytes free at the heap's end from which it is given back


class MappedFiles:
    """The address ranges of this process that are mapped from files, as they were when this was made."""

    def __init__(self) -> None:
        lines = _MAPS.read_text().splitlines() if sys.platform == "linux" and _MAPS.exists() else []
        fields = [line.split(maxsplit=5) for line in lines]
        spans = [f[0].split("-") for f in fields if len(f) == 6 and f[4] != "0" and f[5].endswith(".safetensors")]
        self._ranges = sorted((int(start, 16), int(stop, 16)) for start, stop in spans)

    def release(self, tensor: torch.Tensor) -> int:
        """Give the memory of `tensor` back where it is mapped from a .safetensors file; return the bytes given back.

        Its values stay readable: they come from the file again. The tensor must not have been written to. Pages that it shares with a
        neighbour stay.
        """
        start = tensor.data_ptr()
        stop = start + tensor.numel() * tensor.element_size()
        at = bisect.bisect_right(self._ranges, (start, sys.maxsize)) - 1
        if not tensor.is_contiguous() or at < 0 or stop > self._ranges[at][1]:
            return 0
        first, last = -(-start // mmap.PAGESIZE), stop // mmap.PAGESIZE  # whole pages only
        if last <= first:
            return 0
        size = (last - first) * mmap.PAGESIZE
        address = ctypes.c_void_p(first * mmap.PAGESIZE)
        failed = ctypes.CDLL(None).madvise(address, ctypes.c_size_t(size), ctypes.c_int(_DONTNEED))
        return 0 if failed else size


def keep_freed_memory(largest: int = 32 << 20) -> bool:
    """Let glibc keep freed blocks of up to `largest` bytes for what comes next; False where it is not glibc that hands out memory.

    By default it gives the end of its heap back when enough of it is free, which every training step does; each page then costs a fault
    and is zeroed when it is taken again. Larger blocks are still mapped one by one and given back when freed: kept in the heap, too, they
    took 27 % more at the peak. It holds for the rest of the process. 32 MiB is the most that glibc takes.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallopt"):  # musl and others
        return False
    return bool(libc.mallopt(_MMAP_THRESHOLD, largest) and libc.mallopt(_TRIM_THRESHOLD, _NEVER))


def release_freed_memory() -> None:
    """Give memory that was freed back to the system. glibc keeps it otherwise: hundreds of megabytes after loading in 4 bits."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
