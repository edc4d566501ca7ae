"""Adapter files in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, written for PEFT and read strictly.

Every missing, unexpected or misshaped tensor is named in one error; nothing is loaded unless all fits. Not here: the base model.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.artifact import write_json
from phinetune.errors import AdapterError
from phinetune.lora.config import LoraConfig, parse_lora_config
from phinetune.lora.inject import inject
from phinetune.lora.layers import lora_layers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # where PEFT wraps the model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's name -> factor, for every LoRA layer: `base_model.model.<layer>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r)."""
    state = {}
    for name, layer in lora_layers(model).items():
        state[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach()
        state[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach()
    return state


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path, base_model: str) -> None:
    """Write the factors of `model` into `folder`, float32, in a fixed order: equal factors give equal bytes."""
    from safetensors.torch import save_file

    state = {
        name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in sorted(adapter_state(model).items())
    }
    write_json(folder / CONFIG_FILE, peft_config(model, config, base_model))
    save_file(state, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})


def peft_config(model: nn.Module, config: LoraConfig, base_model: str) -> dict[str, Any]:
    """`adapter_config.json` as PEFT reads it. The layers are named in full, so that the file means the same on every version of PEFT."""
    values = {**asdict(config), "target_modules": list(lora_layers(model)), "exclude_modules": None}
    lora_alpha = int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha
    fixed = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "lora_bias": False,
    }
    return {**fixed, **values, "lora_alpha": lora_alpha}


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor], str]:
    """(config, tensors, base model's name) of an adapter folder. Raises AdapterError if a file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

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
    config = parse_lora_config(values, str(config_file), saved=True)
    try:
        state = load_file(str(weights_file))
    except SafetensorError as error:
        raise AdapterError(f"{weights_file}: cut off or damaged: {error}", "copy the adapter again") from None
    return config, state, str(values.get("base_model_name_or_path") or "")


def load_adapter(model: nn.Module, folder: Path) -> LoraConfig:
    """Put the adapter in `folder` into `model` (plain, on any device). Raises AdapterError, with `model` unchanged, if it does not fit."""
    config, state, _ = read_adapter(folder)
    check_state(model, config, state, folder)
    inject(model, config)
    load_adapter_state(model, state, folder)
    return config


def check_state(model: nn.Module, config: LoraConfig, state: dict[str, Tensor], folder: Path) -> None:
    """Raises AdapterError for layers that `model` lacks, shapes that do not fit it, and values that are not finite."""
    problems = []
    for name, tensor in state.items():
        path, _, factor = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            problems.append(f"{name}: the base model has no layer {path}")
            continue
        if factor not in ("lora_A", "lora_B") or not isinstance(layer, nn.Linear):
            problems.append(f"{name}: not a factor of a linear layer")
            continue
        wanted = (config.r, layer.in_features) if factor == "lora_A" else (layer.out_features, config.r)
        if tuple(tensor.shape) != wanted:
            problems.append(f"{name}: has shape {tuple(tensor.shape)}, the base model needs {wanted}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name}: holds values that are not finite")
    if problems:
        rest = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise AdapterError(problems[:5] + rest, f"the adapter in {folder} is damaged, or belongs to another base model")


def load_adapter_state(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Copy `state` into the LoRA layers of `model`. Raises AdapterError unless names and shapes are exactly the model's."""
    own = adapter_state(model)
    problems = [f"{n}: is missing in the file" for n in own if n not in state] + [
        f"{n}: the model has no such factor" for n in state if n not in own
    ]
    problems += [
        f"{n}: has shape {tuple(state[n].shape)}, the model's is {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    if problems:
        rest = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise AdapterError(problems[:5] + rest, f"the adapter in {folder} does not fit")
    for name, tensor in own.items():
        tensor.copy_(state[name])
