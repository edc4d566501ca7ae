"""What this machine computes fast: measured once, remembered per machine, and used to choose the weights' dtype.

No guessing from a processor's name: the same matrix product is timed in float32 and in bfloat16. Not here: placing models.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.artifact import cache_folder, content_key, write_json

if TYPE_CHECKING:
    import torch

_CPUINFO = Path("/proc/cpuinfo")
_FEW_ROWS, _HOPELESS = 16, 0.3
"""Rows of the product that is tried first, and the speedup there from which on it is measured properly."""
_BF16_PAYS_FROM = 1.2  # bfloat16 must multiply this much faster than float32; below, its rounding buys nothing


def default_device() -> torch.device:
    """CUDA where there is one, then Apple's MPS, then the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # one device a process under torchrun
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def bfloat16_speedup(device: torch.device) -> float:
    """How many times faster this machine multiplies matrices in bfloat16 than in float32; 0.0 where it cannot. Measured once."""
    import torch

    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return 0.0
    measured = measured_speedup(device)
    if measured is None:
        measured = float(f"{_measure(device):.3g}")  # a hundredth, too, where bfloat16 is computed by software
        keep_measured(_speedup_key(device), {"bfloat16_speedup": measured, "device": str(device)})
    return measured


def measured_speedup(device: torch.device) -> float | None:
    """What `bfloat16_speedup` has found out on this machine before; None where nothing was measured yet."""
    entry = read_measured(_speedup_key(device))
    return float(entry["bfloat16_speedup"]) if entry else None


def read_measured(key: str) -> dict[str, Any]:
    """What was measured under `key` before; empty if nothing was."""
    found = _measured().get(key)
    return found if isinstance(found, dict) else {}


def keep_measured(key: str, entry: dict[str, Any]) -> None:
    """Remember what was measured on this machine under `key`."""
    entry = {**entry, "machine": processor_name()}
    write_json(cache_folder() / "machine.json", {**_measured(), key: entry})


def _measured() -> dict[str, Any]:
    """Key -> entry of everything measured so far by whoever shares this cache."""
    try:
        known = json.loads((cache_folder() / "machine.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _speedup_key(device: torch.device) -> str:
    import torch

    return content_key(*processor_identity(), device.type, torch.__version__)[:16]


def machine_key() -> str:
    """A short name of this machine's processor, torch version and number of threads: timings taken here hold for these."""
    import torch

    return content_key(*processor_identity(), torch.__version__, torch.get_num_threads())[:16]


def usable_cpus() -> int:
    """Processors that this process may use at a time: those it is allowed to run on, and no more than its container's share of them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control group, or "max"
        pass
    return allowed


def resident_memory() -> int:
    """Bytes of main memory that this process has now; 0 where the system does not say."""
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else []:
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where this machine multiplies it faster than float32, else float32."""
    import torch

    return torch.bfloat16 if bfloat16_speedup(device) >= _BF16_PAYS_FROM else torch.float32


def available_memory() -> int | None:
    """Bytes of memory that this process can still take: the system's, and its container's where that is less; None if neither is known."""
    meminfo, found = Path("/proc/meminfo"), list[int]()
    for line in meminfo.read_text().splitlines() if meminfo.exists() else []:
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = memory_limit()
    return min([*found, *([] if limit is None else [max(0, limit - used)])], default=None)


def main_memory() -> int | None:
    """Bytes of memory that this machine has, or this process's container where that is less; None if neither is known."""
    return min((n for n in (_total_memory(), memory_limit()[0]) if n is not None), default=None)


def _total_memory() -> int | None:
    try:
        return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def memory_limit(folder: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """(bytes that a container may use, bytes in use that cannot be given back); (None, 0) without a limit."""
    names = [("memory.max", "memory.current", "memory.stat")]
    names += [("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")]
    for limit_name, used_name, stat_name in names:
        with contextlib.suppress(OSError, ValueError):
            limit = int((folder / limit_name).read_text())  # "max": no limit
            stat = dict(line.split() for line in (folder / stat_name).read_text().splitlines())
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            used = int((folder / used_name).read_text()) - cached
            return (limit, used) if limit < 1 << 60 else (None, 0)
    return None, 0


def processor_name() -> str:
    """The processor's own name."""
    return processor_facts().get("model name") or platform.processor() or platform.machine()


def processor_identity() -> tuple[str, ...]:
    """What measurements are kept by. Virtual machines call several generations by one name, so what they can do belongs to it."""
    facts = processor_facts()
    return (processor_name(), *(facts.get(key, "") for key in ("cpu family", "model", "flags", "Features")))


def processor_facts() -> dict[str, str]:
    """What Linux says of the first processor, by its own keys; empty elsewhere."""
    try:
        with _CPUINFO.open(errors="replace") as lines:  # the kernel writes the others only if they are read
            pairs = [line.partition(":") for line in itertools.takewhile(str.strip, lines)]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in pairs}


def _measure(device: torch.device) -> float:
    """Median time of a (256, 1024) x (1024, 1024) product in float32 over that in bfloat16, taken in turns.

    Of fewer rows, once, where that tells enough: a processor without bfloat16 would need half a minute for the whole.
    """
    import torch

    def operands(dtype: torch.dtype, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(rows, 1024, dtype=dtype, device=device), torch.ones(1024, 1024, dtype=dtype, device=device)

    def seconds(x: torch.Tensor, w: torch.Tensor) -> float:
        start = time.perf_counter()
        for _ in range(4):
            y = x @ w
        y[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    def ratio(rows: int, turns: int) -> float:
        single, half = operands(torch.float32, rows), operands(torch.bfloat16, rows)
        seconds(*single), seconds(*half)
        times = [(seconds(*single), seconds(*half)) for _ in range(turns)]
        return statistics.median(t for t, _ in times) / statistics.median(t for _, t in times)

    try:
        few = ratio(_FEW_ROWS, 3)
        return ratio(256, 7) if few > _HOPELESS else few
    except RuntimeError:  # this device has no bfloat16 product
        return 0.0
