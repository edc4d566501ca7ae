"""Adapter files in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, written for PEFT and read strictly.

Every missing, unexpected or misshaped tensor is named in one error; nothing is loaded unless all fits. The weights' file carries the
content hash of the base model, so that an adapter is not put on another base of the same shape. Not here: what the tensors mean
(`peft_format.py`), the base model.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.artifact import disk_errors, write_json
from phinetune.errors import AdapterError, OutputError
from phinetune.lora.config import LoraConfig, parse_lora_config
from phinetune.lora.injection import Adapter, adapter_of, build_adapter
from phinetune.lora.peft_format import PREFIX, adapter_state, expected_shapes, fill, misfits, peft_config
from phinetune.lora.targets import Target, find_targets

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from its folder."""

    config: LoraConfig
    state: dict[str, Tensor]
    base_model: str
    """Name or path of the base model, as written by whoever saved it; may be empty."""
    base_key: str | None
    """Content hash of the base model; None in files that phinetune did not write."""


def save_adapter(
    adapter: Adapter | nn.Module,
    folder: str | Path,
    base_model: str = "",
    base_key: str | None = None,
    split: bool = False,
) -> None:
    """Write an adapter, or the one in a model with LoRA layers, into `folder` for PEFT: equal factors give equal bytes.

    Factors are written in float32. `split` writes fused layers as one adapter for each slice (q_proj, k_proj, v_proj), for runtimes
    that have them apart. Raises AdapterError for a layer without a form in PEFT's format.
    """
    adapter = adapter if isinstance(adapter, Adapter) else adapter_of(adapter)
    if split and adapter.config.fused_modules:
        raise AdapterError(
            "split: PEFT's files cannot say what fused_modules are, so their slices could not be read back"
        )
    write_adapter(adapter_state(adapter, split), peft_config(adapter, base_model, split), Path(folder), base_key)


def write_adapter(state: dict[str, Tensor], values: dict[str, Any], folder: Path, base_key: str | None) -> None:
    """Write PEFT's tensors, factors in float32, and `values` as its configuration into `folder`. Raises OutputError if that is a file."""
    from safetensors.torch import save_file

    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file, not a folder", "choose another folder")
    state = {
        name: (tensor.float() if "lora_" in name else tensor).cpu().contiguous().clone()
        for name, tensor in sorted(state.items())
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_FILE, values)
        temporary = folder / f".{WEIGHTS_FILE}"
        save_file(state, str(temporary), metadata={"format": "pt", **({"base_key": base_key} if base_key else {})})
        _order_header(temporary)
        temporary.replace(folder / WEIGHTS_FILE)


def _order_header(file: Path) -> None:
    """Put the metadata of a safetensors file in order, in place: the library writes it in another order each time."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            stream.seek(8)
            stream.write(text.ljust(length))


def read_adapter(folder: str | Path) -> SavedAdapter:
    """The adapter in `folder`. Raises AdapterError if a file is missing or damaged, ConfigError for what is not supported."""
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    missing = [f"{f}: no such file" for f in (config_file, weights_file) if not f.is_file()]
    if missing:
        hint = (
            "convert adapter_model.bin to safetensors first: phinetune reads no pickles"
            if (folder / "adapter_model.bin").exists()
            else "give the output folder of finetune"
        )
        raise AdapterError(missing, hint)
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{config_file}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{config_file}: must hold keys and values, holds {type(values).__name__}")
    config = parse_lora_config(values, str(config_file), saved=True)
    try:
        with safe_open(str(weights_file), framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise AdapterError(f"{weights_file}: cut off or damaged: {error}", "copy the adapter again") from None
    return SavedAdapter(config, state, str(values.get("base_model_name_or_path") or ""), metadata.get("base_key"))


def load_adapter(model: nn.Module, folder: str | Path, base_key: str | None = None) -> Adapter:
    """Put the adapter in `folder` into `model` (plain or 4-bit, on any device) and return it.

    `base_key`, the content hash of the model's files, is compared with the one that the adapter carries. Raises one AdapterError with
    every missing, unexpected or misshaped tensor, and `model` unchanged, if the adapter does not fit.
    """
    adapter = make_adapter(model, read_adapter(folder), Path(folder), base_key)
    adapter.put(model)
    return adapter


def make_adapter(model: nn.Module, saved: SavedAdapter, folder: Path, base_key: str | None = None) -> Adapter:
    """`saved` as an adapter for `model`, checked against it, not yet put in. Raises AdapterError as `load_adapter`."""
    config = saved.config
    if str(config.init_lora_weights).startswith("pissa_niter"):
        raise AdapterError(
            f"{folder}: was saved beside a base model changed at random ({config.init_lora_weights}), which cannot be made again",
            "save it with PEFT's path_initial_model_for_weight_conversion",
        )
    targets = find_targets(model, config, saved=True)
    adapter = build_adapter(model, config, targets)
    state, problems = _without_copies(adapter, _joined_biases(targets, saved.state))
    problems += misfits(expected_shapes(model, adapter, targets), state)
    if base_key is not None and saved.base_key is not None and base_key != saved.base_key:
        problems.insert(0, f"{folder}: was trained on another base model (their contents differ)")
    if problems:
        raise AdapterError(problems, f"the adapter in {folder} is damaged, or belongs to another base model")
    if config.init_lora_weights == "olora" and any(
        getattr(m, "fan_in_fan_out", False) for m in adapter.layers.values()
    ):
        raise AdapterError(
            f"{folder}: was saved beside a base model changed by olora in layers stored (in, out), which PEFT does differently",
            "save it with PEFT's path_initial_model_for_weight_conversion",
        )
    fill(adapter, state)
    adapter.config = dataclasses.replace(config, init_lora_weights=True)
    return adapter


def _joined_biases(targets: list[Target], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the biases of slices that were saved apart put together for their fused layer."""
    joined = dict(state)
    for target in targets:
        keys = [f"{PREFIX}{target.slice_name(part)}.base_layer.bias" for part in target.slices or {}]
        if keys and all(key in joined for key in keys):
            joined[f"{PREFIX}{target.name}.base_layer.bias"] = torch.cat([joined.pop(key) for key in keys])
    return joined


def _without_copies(adapter: Adapter, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """`state` without the copies of base tensors that PEFT saves beside an adapter, and a line for each that is not a copy.

    They are the weights (and frozen biases) of adapted embeddings and output heads, and with trained biases those of the originals of
    `modules_to_save`.
    """
    problems: list[str] = []
    kept = dict(state)
    for name, layer in adapter.layers.items():
        holder: Any = getattr(layer, "conv", layer)
        own = {"weight": holder.weight, **({"bias": holder.bias} if adapter.config.bias == "none" else {})}
        for part, tensor in own.items():
            key = f"{PREFIX}{name}.base_layer.{part}"
            if tensor is not None and key in kept:
                copied = kept.pop(key)
                if copied.shape != tensor.shape or not torch.equal(copied.to(tensor), tensor):
                    problems.append(f"{key}: is not the base model's; it was resized or trained beside the adapter")
    for name in adapter.modules:
        for key in [k for k in kept if k.startswith(f"{PREFIX}{name}.original_module.")]:
            del kept[key]  # the base's own, not used while the trained copy is
        for key in [k for k in kept if k.startswith(f"{PREFIX}{name}.modules_to_save.")]:
            plain = key.replace(".modules_to_save.", ".")
            if plain in kept and torch.equal(kept[plain], kept[key]):
                del kept[key]  # said twice
    return kept, problems


def load_adapter_state(adapter: Adapter, state: dict[str, Tensor], folder: Path) -> None:
    """Copy a saved state back into an adapter of the same make. Raises AdapterError unless names and shapes are exactly its own."""
    own = {name: tuple(tensor.shape) for name, tensor in adapter_state(adapter).items()}
    if problems := misfits(own, state):
        raise AdapterError(problems, f"the adapter in {folder} does not fit")
    fill(adapter, state)
