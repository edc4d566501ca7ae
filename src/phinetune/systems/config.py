"""`SystemConfig` and `AcceleratorConfig`: where work runs and what its result is for; and what speaks against it, asked before work starts.

One table maps ONNX Runtime's provider names to devices and to the builder's names. Not here: starting anything but the one question
to another interpreter whether it has phinetune.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from phinetune.config import STRICT
from phinetune.errors import ConfigError, PhinetuneError, did_you_mean

if TYPE_CHECKING:
    from phinetune.systems.machine import Machine

PROVIDERS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "CPUExecutionProvider": (("cpu", "gpu", "npu"), "cpu"),
    "CUDAExecutionProvider": (("gpu",), "cuda"),
    "DmlExecutionProvider": (("gpu", "npu"), "dml"),
    "WebGpuExecutionProvider": (("gpu",), "webgpu"),
    "JsExecutionProvider": (("cpu", "gpu"), "web"),
    "NvTensorRTRTXExecutionProvider": (("gpu",), "NvTensorRtRtx"),
    "TensorrtExecutionProvider": (("gpu",), None),
    "ROCMExecutionProvider": (("gpu",), None),
    "MIGraphXExecutionProvider": (("gpu",), None),
    "CoreMLExecutionProvider": (("cpu", "gpu", "npu"), None),
    "OpenVINOExecutionProvider": (("cpu", "gpu", "npu"), None),
    "QNNExecutionProvider": (("cpu", "gpu", "npu"), None),
    "VitisAIExecutionProvider": (("npu",), None),
}
"""ONNX Runtime's provider -> devices that it may be asked for on, and the name that the ONNX builder has for it (None: it has none)."""

_OF_TYPE = {
    "local": (),
    "python": ("python", "environment", "prepend_to_path"),
    "docker": (
        "image",
        "dockerfile",
        "build_context",
        "build_args",
        "run_params",
        "work_dir",
        "clean_image",
        "environment",
    ),
    "azureml": ("options",),
}
_DEVICES = ("cpu", "gpu", "npu", "any")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_OWN_RUN_PARAMS = (
    "image",
    "command",
    "entrypoint",
    "environment",
    "working_dir",
    "detach",
    "tty",
    "stdout",
    "stderr",
    "stream",
    "remove",
    "auto_remove",
)
_ASK_SECONDS = 120  # an interpreter on a slow network disk may take its time


@dataclass(frozen=True)
class AcceleratorConfig:
    """What the result of the work is for. Raises ValueError with every wrong value (ConfigError where it is read from a file)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    device: Literal["cpu", "gpu", "npu", "any"] = "cpu"
    """Kind of processor: cpu, gpu, npu, or any."""
    execution_provider: str | None = None
    """ONNX Runtime's execution provider, such as CUDAExecutionProvider or, in the builder's words, cuda. Default: the device's own choice."""
    memory: int | str | None = None
    """Memory of the device: bytes, or a text such as "16GB" (1 GB is 10^9 bytes, 1 GiB is 2^30)."""

    def __post_init__(self) -> None:
        problems = []
        full = next((n for n, (_, short) in PROVIDERS.items() if short and short == self.execution_provider), None)
        if full is not None:
            object.__setattr__(self, "execution_provider", full)
        if self.device not in _DEVICES:
            problems.append(f"device: must be one of {', '.join(_DEVICES)} (found: {self.device!r})")
        name = self.execution_provider
        if name is not None and name not in PROVIDERS:
            problems.append(f"execution_provider: {name!r} is not known{_nearest(str(name), PROVIDERS)}")
        elif name is not None and self.device in _DEVICES[:3] and self.device not in PROVIDERS[name][0]:
            problems.append(
                f"execution_provider: {name} runs on {' or '.join(PROVIDERS[name][0])}, not on {self.device}"
            )
        try:
            object.__setattr__(self, "memory", _bytes(self.memory))
        except ValueError as error:
            problems.append(str(error))
        _refuse(problems)

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes, which is what it is kept as."""
        return None if self.memory is None else int(self.memory)


@dataclass(frozen=True)
class SystemConfig:
    """Where work runs. Raises ValueError with every wrong value (ConfigError where it is read from a file)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    type: Literal["local", "python", "docker", "azureml"] = "local"
    """local: this Python; python: another interpreter on this machine; docker: a container; azureml: not supported yet."""
    accelerator: AcceleratorConfig = field(default_factory=AcceleratorConfig)
    """What the result is for: device, execution_provider, memory."""
    python: str | None = None
    """type python: an interpreter, or the folder of a virtual or conda environment. Default: the python on prepend_to_path."""
    environment: dict[str, str] = field(default_factory=dict)
    """types python and docker: environment variables."""
    prepend_to_path: list[str] = field(default_factory=list)
    """type python: folders to search for programs before those of PATH."""
    image: str | None = None
    """type docker: the image; with a dockerfile, the name that it is built under."""
    dockerfile: str | None = None
    """type docker: build the image from this file; relative to build_context, if that is given."""
    build_context: str | None = None
    """type docker: the folder that the build sees. Default: the dockerfile's."""
    build_args: dict[str, str] = field(default_factory=dict)
    """type docker: arguments of the build."""
    run_params: dict[str, Any] = field(default_factory=dict)
    """type docker: more arguments for the Docker SDK's `containers.create`, such as shm_size or volumes."""
    work_dir: str | None = None
    """type docker: the folder in the container to work in, an absolute path. Default: that of the job file."""
    clean_image: bool = False
    """type docker: remove the image after the run, if it was built for it."""
    options: dict[str, Any] = field(default_factory=dict)
    """type azureml: everything else that its section says; kept as it is."""

    def __post_init__(self) -> None:
        if self.type not in _OF_TYPE:
            _refuse([f"type: must be one of {', '.join(_OF_TYPE)} (found: {self.type!r})"])
        problems = []
        for f in fields(self):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if f.name in ("type", "accelerator", *_OF_TYPE[self.type]) or getattr(self, f.name) == default:
                continue
            owners = " or ".join(kind for kind, names in _OF_TYPE.items() if f.name in names)
            problems.append(f"{f.name}: belongs to type {owners}, this system is of type {self.type}")
        if self.type == "python" and not self.python and not self.prepend_to_path:
            problems.append("python: type python needs an interpreter or the folder of an environment")
        if self.type == "docker" and not (self.image or self.dockerfile or self.build_context):
            problems.append("image: type docker needs an image, or a dockerfile to build one from")
        if self.build_args and not (self.dockerfile or self.build_context):
            problems.append("build_args: there is no dockerfile to build with them")
        if self.clean_image and not (self.dockerfile or self.build_context):
            problems.append("clean_image: there is no dockerfile; only an image that was built for the run is removed")
        if self.work_dir is not None and not self.work_dir.startswith("/"):
            problems.append(f"work_dir: must be an absolute path in the container (found: {self.work_dir!r})")
        for name in (n for n in self.environment if not n or "=" in n or "\0" in n):
            problems.append(f"environment: {name!r} cannot be the name of a variable")
        for name in (n for n in _OWN_RUN_PARAMS if n in self.run_params):
            instead = {"environment": "environment", "working_dir": "work_dir", "image": "image"}.get(name)
            problems.append(
                f"run_params.{name}: " + (f"use {instead} of the system" if instead else "is set by phinetune")
            )
        if not isinstance(self.run_params.get("volumes", []), list | dict):
            problems.append(
                "run_params.volumes: must be a list or a mapping of folders, as for the Docker SDK"
                f" (found: {self.run_params['volumes']!r})"
            )
        _refuse(problems)


def builder_provider(name: str) -> str:
    """The ONNX builder's name for ONNX Runtime's provider `name`. Raises ConfigError for one that it builds nothing for."""
    builder = PROVIDERS.get(name, ((), None))[1]
    if builder is None:
        buildable = [n for n, (_, b) in PROVIDERS.items() if b]
        raise ConfigError(
            f"{name}: the ONNX builder has no models for it{_nearest(name, buildable)}",
            f"choose one of {', '.join(buildable)}",
        )
    return builder


def python_of(system: SystemConfig) -> Path:
    """The interpreter of a system of type python. Raises ConfigError if there is none.

    `python` may be a file, an environment's folder, or the folder that holds the interpreter; a bare name is searched on PATH.
    """
    path = os.pathsep.join([*_prepended(system), os.environ.get("PATH", "")])
    if system.python is None:
        found = shutil.which("python", path=path) or shutil.which("python3", path=path)
        if found is None:
            raise ConfigError("python: no python on prepend_to_path or PATH", "name an interpreter in python")
        return Path(found)
    place = Path(system.python).expanduser().absolute()
    if place.is_dir():
        names = ("bin/python", "bin/python3", "python", "python3", "Scripts/python.exe", "python.exe")
        inside = next((place / n for n in names if (place / n).is_file()), None)
        if inside is None:
            raise ConfigError(f"python: {place}: no Python environment (there is no {names[0]} in it)")
        place = inside
    elif not place.exists() and os.sep not in system.python:
        place = Path(shutil.which(system.python, path=path) or place)
    if not place.is_file():
        raise ConfigError(f"python: {place}: no such interpreter")
    if not os.access(place, os.X_OK):
        raise ConfigError(f"python: {place}: is not a program that can be run")
    return place


def environment_of(system: SystemConfig, python: Path) -> dict[str, str]:
    """The variables of a process of `python`: this process's own, over them those of `system`; the environment's programs come first on PATH."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "__PYVENV_LAUNCHER__")}
    own = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **system.environment}
    path = own.get("PATH", os.environ.get("PATH", ""))
    folders = [*_prepended(system), *([str(python.parent)] if system.type == "python" else [])]
    return {**inherited, **own, "PATH": os.pathsep.join([*folders, *([path] if path else [])])}


def system_problems(system: SystemConfig) -> list[str]:
    """What makes `system` unusable on this machine, each in one line with what to do; empty if it can be used.

    A python system's interpreter is run once and asked for phinetune; a docker system's engine is asked whether it is there.
    """
    if system.type == "azureml":
        return ["azureml is not supported yet; use a local system"]
    if system.type == "python":
        return _python_problems(system)
    return _docker_problems(system) if system.type == "docker" else []


def target_problems(accelerator: AcceleratorConfig, machine: Machine, runs_here: bool = True) -> list[str]:
    """What `machine` lacks to run what is made for `accelerator`; nothing if it is only made here (`runs_here` false).

    With an execution provider, ONNX Runtime must have it; without, torch must see the device.
    """
    if not runs_here:
        return []
    provider, device = accelerator.execution_provider, accelerator.device
    if provider is not None and provider not in machine.providers:
        has = f"here are {', '.join(machine.providers)}" if machine.providers else "ONNX Runtime has none here"
        return [f"execution_provider: {provider} is not available on this machine ({has})"]
    if provider is None and device == "gpu" and not machine.accelerators:
        return ["device: gpu: torch finds no GPU on this machine"]
    if provider is None and device == "npu":
        return ["device: npu: torch runs on no NPU; name the execution_provider that does"]
    return []


def _python_problems(system: SystemConfig) -> list[str]:
    from phinetune import __version__

    missing = [f"prepend_to_path: {p}: no such folder" for p in _prepended(system) if not Path(p).is_dir()]
    try:
        python = python_of(system)
    except ConfigError as error:
        return [*missing, *(f"{p}; {error.hint}" if error.hint else p for p in error.problems)]
    command = [str(python), "-c", "import phinetune; print('phinetune=' + phinetune.__version__)"]
    try:
        answer = subprocess.run(
            command,
            env=environment_of(system, python),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ASK_SECONDS,
        )
    except OSError as error:
        return [*missing, f"python: {python}: cannot be run: {error.strerror or error}"]
    except subprocess.TimeoutExpired:
        return [*missing, f"python: {python}: did not answer within {_ASK_SECONDS} seconds"]
    install = f"install it there: {python} -m pip install phinetune=={__version__}"
    version = re.search(r"^phinetune=(\S+)$", answer.stdout, re.MULTILINE)
    if answer.returncode != 0 or version is None:
        said = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
        reason = said[-1] if said else f"exit status {answer.returncode}"
        return [*missing, f"python: {python}: cannot import phinetune ({reason}); {install}"]
    if version[1] != __version__:
        return [*missing, f"python: {python}: has phinetune {version[1]}, this is {__version__}; {install}"]
    return missing


def _docker_problems(system: SystemConfig) -> list[str]:
    from phinetune.systems.container import build_place, docker_client

    problems = []
    if system.dockerfile or system.build_context:
        context, dockerfile = build_place(system)
        if not context.is_dir():
            problems.append(f"build_context: {context}: no such folder")
        elif not dockerfile.is_file():
            problems.append(f"dockerfile: {dockerfile}: no such file")
    try:
        docker_client().close()
    except PhinetuneError as error:
        problems += [f"{p}; {error.hint}" for p in error.problems]
    return problems


def _nearest(name: str, known: Iterable[str]) -> str:
    """`did_you_mean` with capitals of no account: Cuda... is CUDA..., not CPU..."""
    spelt = {k.lower(): k for k in known}
    return f', did you mean "{spelt[name.lower()]}"?' if name.lower() in spelt else did_you_mean(name, spelt.values())


def _prepended(system: SystemConfig) -> list[str]:
    return [str(Path(folder).expanduser().absolute()) for folder in system.prepend_to_path]


def _bytes(memory: int | str | None) -> int | None:
    """`memory` in bytes. Raises ValueError for what is no amount of memory."""
    if memory is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", memory) if isinstance(memory, str) else None
    amount = math.nan
    if isinstance(memory, int) and not isinstance(memory, bool):
        amount = memory
    elif match and (match[2].upper() or "B") in _UNITS:
        amount = float(match[1]) * _UNITS[match[2].upper() or "B"]
    if not amount >= 1:
        raise ValueError(f'memory: must be bytes or a text such as "16GB" (found: {memory!r})')
    return int(amount)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))
