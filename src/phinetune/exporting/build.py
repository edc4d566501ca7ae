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
from typing import Any

from phinetune.errors import ExportError, MissingPackageError
from phinetune.events import OnEvent, Progress, log_event
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.options import installed_builder

_BUILDER = "onnxruntime_genai.models.builder"
_FLAGS = (
    "use_qdq",
    "use_8bits_moe",
    "use_webgpu_fp32",
    "use_cuda_bf16",
    "enable_cuda_graph",
    "exclude_embeds",
    "exclude_lm_head",
    "include_hidden_states",
)


def builder_options(config: ExportConfig, trust_remote_code: bool = False, prefix: str = "") -> dict[str, str]:
    """The builder's `extra_options` for `config`; `prefix` is what its version puts before the names of the quantization options.

    What is at its default is left to the builder, save what its versions differ in.
    """
    options: dict[str, Any] = {"hf_remote": trust_remote_code}
    if config.quantized:
        options |= {
            f"{prefix}block_size": config.block_size,
            f"{prefix}is_symmetric": config.symmetric,
            f"{prefix}accuracy_level": config.accuracy_level,
            f"{prefix}algo_config": config.as_built.algorithm,
        }
    if config.op_types_to_quantize:
        options[f"{prefix}op_types_to_quantize"] = "/".join(config.op_types_to_quantize)
    if config.nodes_to_exclude:
        options[f"{prefix}nodes_to_exclude"] = config.nodes_to_exclude
    options |= {name: True for name in _FLAGS if getattr(config, name)}  # one version counts a flag by its presence
    return {name: _as_text(value) for name, value in (options | (config.extra_options or {})).items()}


def option_words(config: ExportConfig, trust_remote_code: bool = False) -> list[str]:
    """`builder_options` for the installed builder, as its command line takes them.

    Caches of sliding windows are as long as the conversation: those that the runtime cuts to the window fail for prompts and limits of
    many lengths (0.18).
    """
    builder = installed_builder()
    usual = {"windowed_kv_cache": "false"} if "windowed_kv_cache" in builder.options else {}
    return [f"{k}={v}" for k, v in (usual | builder_options(config, trust_remote_code, builder.prefix)).items()]


def keep_window(folder: Path, model_config: Any) -> None:
    """Give the attention of the graph in `folder` the sliding window of the model, a transformers config, where all its layers have one.

    The builder does so only for models whose config tells the kinds of their layers; Phi-3's and Mistral's do not.
    """
    import onnx

    text = model_config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if not window or getattr(text, "layer_types", None) is not None:
        return
    file = folder / "model.onnx"
    model = onnx.load(str(file), load_external_data=False)
    unbounded = [
        attribute
        for node in model.graph.node
        for attribute in node.attribute
        if node.op_type == "GroupQueryAttention" and attribute.name == "local_window_size" and attribute.i <= 0
    ]
    for attribute in unbounded:
        attribute.i = int(window)
    if unbounded:
        onnx.save(model, str(file))


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


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
    options = option_words(config, trust_remote_code)
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
