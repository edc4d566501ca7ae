"""loralib's functions over a whole model: what is trained, what is saved, and reading its checkpoints.

Names of the layers' parameters are loralib's, so its checkpoints (`.pt` files of `lora_state_dict`) load here with `strict=False` and
the other way round. Not here: PEFT's adapter files (`adapter.py`).
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from phinetune.errors import AdapterError, ConfigError, first_line
from phinetune.lora.layer import LoRALayer
from phinetune.lora.peft_format import tensor_problem

_BIAS = ("none", "all", "lora_only")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze every parameter without `lora_` in its name; `bias` "all" leaves all biases trainable, "lora_only" those of LoRA layers.

    As in loralib, a convolution's bias belongs to the `conv` inside its LoRA layer and is not among "lora_only". Raises ConfigError
    for any other `bias`.
    """
    _check_bias(bias)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad = False
        if bias == "all" and "bias" in name:
            parameter.requires_grad = True
    if bias == "lora_only":
        for module in model.modules():
            if isinstance(module, LoRALayer) and getattr(module, "bias", None) is not None:
                module.bias.requires_grad = True


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The entries of `model.state_dict()` that LoRA adds, and with `bias` all biases or those of LoRA layers. Load with strict=False."""
    _check_bias(bias)
    state = model.state_dict()
    chosen = {k for k in state if "lora_" in k or (bias == "all" and "bias" in k)}
    if bias == "lora_only":
        chosen |= {k.split("lora_")[0] + "bias" for k in chosen} & set(state)
    return {k: v for k, v in state.items() if k in chosen}


def read_lora_state_dict(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a loralib checkpoint (`torch.save` of a state dict), read without running any code that it may hold.

    Raises AdapterError for a missing or damaged file, for one that holds anything but tensors by name, and for values that are not finite.
    """
    path = Path(file)
    if not path.is_file():
        raise AdapterError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise AdapterError(
            f"{path}: is damaged, or holds objects that are not tensors, which could run code when read; it was not read",
            "save model.state_dict() or lora_state_dict(model), not the model itself",
        ) from None
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = first_line(error)
        raise AdapterError(f"{path}: cut off or damaged: {reason}", "copy the file again") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise AdapterError(f"{path}: is not a state dict (names and tensors)")
    broken = [f"{name}: {problem}" for name, v in state.items() if (problem := tensor_problem(v))]
    if broken:
        raise AdapterError(broken, f"{path} is damaged, or its training diverged")
    return state


def load_lora_state_dict(model: nn.Module, file: str | Path) -> None:
    """Read a loralib checkpoint into `model`, strictly: every factor of the model must be there, and nothing that the model lacks.

    Raises AdapterError with every missing, unexpected or misshaped tensor, and the model unchanged.
    """
    state, own = read_lora_state_dict(file), model.state_dict()
    problems = [f"{n}: is missing in {file}" for n in own if "lora_" in n and n not in state]
    problems += [f"{n}: the model has no such tensor" for n in state if n not in own]
    problems += [
        f"{n}: has shape {tuple(v.shape)}, the model's is {tuple(own[n].shape)}"
        for n, v in state.items()
        if n in own and v.shape != own[n].shape
    ]
    if problems:
        raise AdapterError(problems, f"{file} belongs to another model")
    model.load_state_dict(state, strict=False)


def _check_bias(bias: str) -> None:
    if bias not in _BIAS:
        raise ConfigError(f'bias: must be "none", "all" or "lora_only" (found: {bias!r})')
