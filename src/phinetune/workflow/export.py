"""Export a model to ONNX: build, put the prompt contract in, verify, and only then give the folder its name."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phinetune.artifact import building, check_output, content_key, file_hash, is_finished, read_manifest
from phinetune.config import parse
from phinetune.errors import ExportError
from phinetune.events import Note, OnEvent, log_event
from phinetune.exporting.build import build_onnx, check_builder
from phinetune.exporting.config import ExportConfig
from phinetune.generation.load import find
from phinetune.model.folder import base_key, weight_files
from phinetune.workflow.merge import StageFolder, merge

_FP_TOLERANCE = {
    "fp32": 1e-3,
    "fp16": 0.25,
}  # largest difference of logits from torch's that a floating point build may show


def parse_export_config(config: dict[str, Any] | ExportConfig | None) -> ExportConfig:
    """An ExportConfig from its fields, or itself."""
    return config if isinstance(config, ExportConfig) else parse(ExportConfig, config or {}, "export")


def export(
    model: str,
    output_dir: str | Path,
    export_config: dict[str, Any] | ExportConfig | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    on_event: OnEvent = log_event,
) -> StageFolder:
    """Write `model` (a merged or base model; an adapter is merged first) as an ONNX Runtime GenAI folder, verified.

    Verified means: the graph shows every option that was asked for, the folder loads and answers, its tokenizer gives the ids that
    training used, it stops where the model was trained to stop; in fp32 its logits are torch's within 1e-3.
    Raises ExportError otherwise, and leaves nothing.
    """
    config = parse_export_config(export_config)
    check_builder()
    source, kind = find(model, on_event)
    folder = Path(output_dir).expanduser()
    if kind == "onnx":
        raise ExportError(f"{model}: is an ONNX folder already", "give a merged model, a base model or an adapter")
    if kind == "adapter":
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-merged-", dir=folder.absolute().parent) as scratch:
            key = _key(file_hash(source / "adapter_config.json", source / "adapter_model.safetensors"), config)
            if not overwrite and is_finished(folder, "onnx", key):
                return _unchanged(folder, on_event)
            check_output(folder, "onnx", key, overwrite)
            merged = merge(model, Path(scratch) / "merged", base_model, trust_remote_code, on_event=on_event)
            return _export(merged.folder, folder, key, config, trust_remote_code, overwrite, on_event)
    return _export(source, folder, _key(base_key(source), config), config, trust_remote_code, overwrite, on_event)


def _key(content: str, config: ExportConfig) -> str:
    return content_key("export", 1, content, asdict(config))


def _unchanged(folder: Path, on_event: OnEvent) -> StageFolder:
    on_event(Note(f"unchanged: {folder} holds the result of exactly this export"))
    return StageFolder(folder, read_manifest(folder), unchanged=True)


def _export(
    source: Path,
    folder: Path,
    key: str,
    config: ExportConfig,
    trust_remote_code: bool,
    overwrite: bool,
    on_event: OnEvent,
) -> StageFolder:
    from phinetune.exporting.verify import verify, write_contract
    from phinetune.model.load import load_base_contract

    weights = sum(f.stat().st_size for f in weight_files(source)[0])
    check_output(folder, "onnx", key, overwrite, needed_bytes=weights * (1 if config.precision == "int4" else 4))
    if is_finished(folder, "onnx", key) and not overwrite:
        return _unchanged(folder, on_event)
    contract = load_base_contract(source, trust_remote_code)
    made_from = read_manifest(source)
    record: dict[str, Any] = {
        "stage": "export",
        "model": str(source),
        "export": asdict(config),
        **{k: made_from[k] for k in ("base_model", "base_key", "data") if k in made_from},
    }
    with building(folder, "onnx", key, record) as partial:
        build_onnx(source, partial, config, trust_remote_code, on_event)
        write_contract(partial, contract)
        record["verified"] = verify(partial, config, contract)
        if config.precision in _FP_TOLERANCE:
            record["verified"]["logits_distance"] = _compare(source, partial, config, trust_remote_code, on_event)
    on_event(Note(f"ONNX {config.precision}: written to {folder}; options, token ids, stop ids and loading verified"))
    return StageFolder(folder, read_manifest(folder))


def _compare(source: Path, folder: Path, config: ExportConfig, trust_remote_code: bool, on_event: OnEvent) -> float:
    """The largest difference of the exported model's logits from those of float32 torch. Raises ExportError beyond the tolerance."""
    import torch

    from phinetune.exporting.verify import logits_distance
    from phinetune.generation.onnx_backend import load_onnx
    from phinetune.model.load import LoadPlan, load_model

    distance = logits_distance(
        load_onnx(folder), load_model(source, LoadPlan(torch.float32, torch.device("cpu"), "sdpa", trust_remote_code))
    )
    on_event(Note(f"export: on the probes the ONNX logits differ from torch's by {distance:.2g} at most"))
    if distance > _FP_TOLERANCE[config.precision]:
        raise ExportError(
            f"the {config.precision} ONNX model's logits differ from torch's by {distance:.3g} ({_FP_TOLERANCE[config.precision]} is allowed)",
            "this architecture is not exported rightly by the installed onnxruntime-genai",
        )
    return distance
