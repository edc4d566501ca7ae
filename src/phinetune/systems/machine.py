"""`this_machine()`: what is here to compute with, found out without measuring anything, and what is missing.

Limits that a container puts on memory and processor time count as the machine's. Not here: choosing anything from it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from phinetune.artifact import cache_folder, versions
from phinetune.errors import OutputError, first_line
from phinetune.model.compute import available_memory, main_memory, measured_speedup, processor_facts, processor_name

_INSTRUCTION_SETS = {
    "avx2": "avx2",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "avx_vnni": "avx_vnni",
    "amx_tile": "amx",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "neon": "neon",
    "asimdhp": "neon_fp16",
    "asimddp": "neon_dotprod",
    "bf16": "bf16",
    "i8mm": "i8mm",
    "sve": "sve",
    "sme": "sme",
}
"""The system's word -> ours, of those that matter to matrix products and weights of few bits."""

_EXTRAS = (
    ("onnxruntime", "onnxruntime", "onnx"),
    ("onnxruntime_genai", "onnxruntime-genai", "onnx"),
    ("bitsandbytes", "bitsandbytes", "qlora"),
    ("docker", "docker", "docker"),
)
"""(module, package, extra that installs it)."""


@dataclass(frozen=True)
class Accelerator:
    """A device that torch can compute on beside the processor."""

    device: str
    """torch's name: cuda:0, mps."""
    name: str
    """The maker's name."""
    memory: int | None
    """Bytes of its own memory; None where it shares the machine's."""


@dataclass(frozen=True)
class Machine:
    """What this machine has, and what it lacks."""

    system: str
    """Operating system, its version, and the kind of processor."""
    processor: str
    """The processor's own name."""
    cores: int
    """Cores that this process may use."""
    instruction_sets: tuple[str, ...]
    """Those that matter here: avx2, f16c, avx512f, avx512_bf16, amx, neon, ..."""
    memory: int | None
    """Bytes in all; None where the system does not say."""
    available_memory: int | None
    """Bytes that programs can still take; None where the system does not say."""
    accelerators: tuple[Accelerator, ...]
    """CUDA devices and Apple's MPS. NPUs are seen by execution providers only."""
    providers: tuple[str, ...]
    """ONNX Runtime's execution providers here, in its order of preference; empty where it is not installed."""
    versions: dict[str, str]
    """Python's and the libraries' versions."""
    bfloat16_speedup: dict[str, float]
    """Kind of device -> how much faster it multiplies bfloat16 than float32, where an earlier run has measured it."""
    free_disk: dict[str, int]
    """Folder -> bytes free on its disk: of the cache and of the output."""
    missing: tuple[str, ...]
    """What is not there, each in one line with what to do about it."""


def this_machine(output: Path | None = None) -> Machine:
    """What this machine has; `output` is the folder that will be written to (default: the current one). Raises nothing for what it lacks."""
    missing = [
        f"{package} is not installed: pip install 'phinetune[{extra}]'"
        for module, package, extra in _EXTRAS
        if importlib.util.find_spec(module) is None
    ]
    accelerators, speedup = _torch_devices(missing)
    _compiled_functions(missing)
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_mac("machdep.cpu.brand_string") or processor_name(),
        cores=_cores(),
        instruction_sets=_instruction_sets(),
        memory=main_memory(),
        available_memory=available_memory(),
        accelerators=accelerators,
        providers=_providers(missing),
        versions=_versions(),
        bfloat16_speedup=speedup,
        free_disk=_free_disk(output or Path.cwd(), missing),
        missing=tuple(missing),
    )


def instruction_sets(words: str) -> tuple[str, ...]:
    """Those of a system's list of processor flags that matter here, in our words and our order."""
    found = words.lower().split()
    return tuple(dict.fromkeys(ours for word, ours in _INSTRUCTION_SETS.items() if word in found))


def _instruction_sets() -> tuple[str, ...]:
    """From /proc/cpuinfo (flags on x86, Features on ARM), macOS's sysctl, or the architecture alone."""
    facts = processor_facts()
    words = facts.get("flags") or facts.get("Features", "")
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        known = {"FEAT_BF16": "bf16", "FEAT_I8MM": "i8mm", "FEAT_DotProd": "asimddp", "FEAT_SME": "sme"}
        words = " ".join(["asimd", *(w for feature, w in known.items() if _mac(f"hw.optional.arm.{feature}") == "1")])
    return instruction_sets(words or {"aarch64": "asimd", "ARM64": "asimd"}.get(platform.machine(), ""))


def _mac(key: str) -> str:
    """macOS's `sysctl -n key`; empty elsewhere."""
    if platform.system() != "Darwin":
        return ""
    done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True)
    return done.stdout.strip()


def _cores() -> int:
    """Cores that the scheduler, or a container's share of processor time, leaves to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def _torch_devices(missing: list[str]) -> tuple[tuple[Accelerator, ...], dict[str, float]]:
    """Accelerators and measured bfloat16 speed-ups; none, and a line in `missing`, if torch cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        missing.append(f"torch cannot be imported: {_line(error)}")
        return (), {}
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Accelerator(f"cuda:{index}", properties.name, int(properties.total_memory)))
    if torch.backends.mps.is_available():
        found.append(Accelerator("mps", "Apple GPU", None))
    speedup = {}
    for kind in ("cpu", "cuda", "mps"):
        with contextlib.suppress(OutputError):  # no cache: nothing can have been measured
            measured = measured_speedup(torch.device(kind))
            if measured is not None:
                speedup[kind] = measured
    return tuple(found), speedup


def _compiled_functions(missing: list[str]) -> None:
    """A line in `missing` if the functions that training on a CPU is fast by were not built."""
    try:
        from phinetune.lora import fold
        from phinetune.model import kernels
        from phinetune.training import adamw
    except (ImportError, OSError):  # no torch, which has been said
        return
    parts = (("training on a CPU", kernels), ("merging", fold), ("AdamW", adamw))
    wanting = [name for name, part in parts if part.library() is None]
    if wanting:
        missing.append(
            f"the compiled functions for {' and '.join(wanting)} were not built: install a C compiler, then phinetune again"
        )


def _providers(missing: list[str]) -> tuple[str, ...]:
    """ONNX Runtime's execution providers; none, and a line in `missing`, if it is broken."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    try:
        import onnxruntime

        return tuple(onnxruntime.get_available_providers())
    except (ImportError, OSError, AttributeError) as error:
        missing.append(f"onnxruntime is installed but broken: {_line(error)}")
        return ()


def _versions() -> dict[str, str]:
    found = versions()
    for _, package, _ in _EXTRAS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.setdefault(package, metadata.version(package))
    from phinetune import __version__

    return {"phinetune": __version__, **{k: v for k, v in found.items() if k != "phinetune"}}


def _free_disk(output: Path, missing: list[str]) -> dict[str, int]:
    """Bytes free where the cache and `output` are; the nearest folder that exists is asked."""
    free = {}
    for what, place in (("cache", cache_folder), ("output", output.absolute)):
        try:
            folder = place()
            nearest = next(p for p in (folder, *folder.parents) if p.exists())
            free[str(folder)] = shutil.disk_usage(nearest).free
        except (OSError, OutputError) as error:
            missing.append(f"the {what} folder cannot be used: {_line(error)}")
    return free


def _line(error: BaseException) -> str:
    return first_line(error)
