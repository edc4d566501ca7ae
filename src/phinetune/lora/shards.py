"""safetensors files as they lie on disk: where each tensor is, and copying its bytes from file to file.

The header is read, the tensors are not; nothing is mapped into memory, so what is copied does not count as memory used.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from phinetune.errors import ModelError
from phinetune.model.folder import safetensors_header

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the floating point types -> torch's."""
WHOLE_NUMBERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Those of other types, which a trained module may hold (counters)."""
_CHUNK = 8 << 20


class Layout:
    """Where every tensor of a model is: file, dtype, shape, bytes."""

    def __init__(self, files: list[Path]) -> None:
        self.headers: dict[Path, dict[str, Any]] = {}
        self.metadata: dict[Path, Any] = {}
        self.starts: dict[Path, int] = {}
        self.file_of: dict[str, Path] = {}
        for file in files:
            try:
                header, size = safetensors_header(file)
            except (ValueError, KeyError, TypeError):
                raise ModelError(f"{file}: not a safetensors file, or cut off in its header") from None
            if file.stat().st_size != size:
                raise ModelError(f"{file}: {file.stat().st_size} bytes, must be {size}: the file is cut off or damaged")
            self.metadata[file] = header.pop("__metadata__", None)
            self.headers[file] = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
            with file.open("rb") as stream:
                self.starts[file] = 8 + int.from_bytes(stream.read(8), "little")
            self.file_of |= dict.fromkeys(header, file)

    def entry(self, name: str) -> Any:
        """dtype, shape and data_offsets of a tensor."""
        return self.headers[self.file_of[name]][name]

    def read(self, name: str) -> Tensor:
        """A tensor, on its own memory."""
        entry, file = self.entry(name), self.file_of[name]
        tensor = torch.empty(tuple(entry["shape"]), dtype=DTYPES[entry["dtype"]])
        with file.open("rb") as stream:
            read_all(stream.fileno(), bytes_of(tensor), self.starts[file] + entry["data_offsets"][0])
        return tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, of all files."""
        return {name: tuple(entry["shape"]) for header in self.headers.values() for name, entry in header.items()}


def copy_bytes(source: int, target: int, start: int, stop: int, to: int) -> None:
    """Bytes `start` to `stop` of one open file to offset `to` of another, inside the kernel where it can."""
    inside = hasattr(os, "copy_file_range")
    while inside and start < stop:
        try:
            count = os.copy_file_range(source, target, min(stop - start, 1 << 30), start, to)
        except OSError as error:  # between file systems, or one that cannot
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            break
        if count == 0:
            raise ended_early()
        start, to = start + count, to + count
    block = memoryview(bytearray(min(_CHUNK, stop - start)))
    while start < stop:
        part = block[: stop - start]
        read_all(source, part, start)
        write_all(target, part, to)
        start, to = start + len(part), to + len(part)


_POSITION = threading.Lock()  # for systems (Windows) whose files have one position for all threads


def read_all(source: int, buffer: memoryview, start: int) -> None:
    """Fill `buffer` from offset `start` of an open file."""
    while buffer:
        if hasattr(os, "preadv"):
            count = os.preadv(source, [buffer], start)
        else:
            with _POSITION:
                os.lseek(source, start, os.SEEK_SET)
                found = os.read(source, len(buffer))
            count = len(found)
            buffer[:count] = found
        if count == 0:
            raise ended_early()
        buffer, start = buffer[count:], start + count


def write_all(target: int, buffer: memoryview, to: int) -> None:
    """Write `buffer` to offset `to` of an open file."""
    while buffer:
        if hasattr(os, "pwrite"):
            count = os.pwrite(target, buffer, to)
        else:
            with _POSITION:
                os.lseek(target, to, os.SEEK_SET)
                count = os.write(target, buffer)
        buffer, to = buffer[count:], to + count


def ended_early() -> ModelError:
    """The error for a file that is shorter than its header says."""
    return ModelError("a file of the base model ended early")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy())) if tensor.numel() else memoryview(b"")
