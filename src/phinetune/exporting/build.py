"""onnxruntime-genai's model builder behind one function: our options in its words, run in a process of its own, its output read.

What it built is checked elsewhere (`verify.py`): the builder ignores options it does not know, and reports success for models that do
not load.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from phinetune.errors import ExportError, MissingPackageError
from phinetune.events import OnEvent, Progress, log_event
from phinetune.exporting.config import ExportConfig

_BUILDER = "onnxruntime_genai.models.builder"


def builder_options(config: ExportConfig, trust_remote_code: bool = False, prefix: str = "") -> dict[str, str]:
    """The builder's `extra_options` for `config`; `prefix` is what its version puts before the names of the quantization options."""
    options = {"hf_remote": "true" if trust_remote_code else "false"}
    if config.precision == "int4":
        options |= {
            f"{prefix}block_size": str(config.block_size),
            f"{prefix}is_symmetric": "true" if config.symmetric else "false",
            f"{prefix}accuracy_level": str(config.accuracy_level),
            f"{prefix}algo_config": config.algorithm,
        }
    return options


def option_prefix() -> str:
    """`int4_` for builders that still want it (onnxruntime-genai 0.11, the last one for Python 3.10), else nothing.

    A builder passes over names that it does not know, so the installed one is asked by its source.
    """
    package = importlib.util.find_spec("onnxruntime_genai")
    builder = Path(package.origin or "").parent / "models" / "builder.py" if package else Path()
    return "int4_" if builder.is_file() and '"int4_is_symmetric"' in builder.read_text(encoding="utf-8") else ""


def check_builder() -> None:
    """Raises MissingPackageError if a package that the export needs is not installed."""
    missing = [name for name in ("onnxruntime_genai", "onnx_ir", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"export needs {', '.join(missing)}", "pip install 'phinetune[onnx]'")


def build_onnx(
    source: Path, target: Path, config: ExportConfig, trust_remote_code: bool = False, on_event: OnEvent = log_event
) -> None:
    """Build the model folder `source` as ONNX into `target`. Raises ExportError with the builder's last words if it fails.

    `source` is a plain Hugging Face folder; nothing is fetched from anywhere.
    """
    check_builder()
    options = [f"{key}={value}" for key, value in builder_options(config, trust_remote_code, option_prefix()).items()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryDirectory(prefix="phinetune-build-", dir=target.parent) as scratch:
        command = [
            sys.executable,
            "-m",
            _BUILDER,
            "-i",
            str(source.absolute()),
            "-o",
            str(target.absolute()),
            "-p",
            config.precision,
        ]
        command += ["-e", config.execution_provider, "-c", scratch, "--extra_options", *options]
        process = subprocess.Popen(
            command,
            cwd=scratch,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            last = _follow(process, config.precision, on_event)
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if status != 0:
        if any("No space left on device" in line for line in last):
            raise OSError(28, "No space left on device")
        reason = next(
            (line for line in reversed(last) if line and not line.startswith((" ", "Traceback"))),
            f"exit status {status}",
        )
        raise ExportError(
            f"the ONNX builder failed: {reason}",
            f"python -m {_BUILDER} -i {source} -o OUT -p {config.precision} -e {config.execution_provider} shows its whole output",
        )


def _follow(process: subprocess.Popen[str], precision: str, on_event: OnEvent) -> list[str]:
    """Read the builder's output to its end, reporting layers done; its last lines are returned."""
    last: list[str] = []
    done = 0
    stage = f"building {precision} ONNX"
    on_event(Progress(stage, 0))
    for line in process.stdout or ():
        last = [*last[-40:], *(part.strip("\n") for part in line.split("\r"))]
        if "complete quantization of" in line or "Reading decoder layer" in line or "Reading " in line:
            done += 1
            on_event(Progress(stage, done))
    return last
