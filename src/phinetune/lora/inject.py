"""Put LoRA layers into a model: which layers are meant, and the swap itself. Works on any `nn.Module`; the frozen weights are shared.

Not here: what a LoRA layer computes (`layers.py`), loading factors from files (`adapter.py`).
"""

from __future__ import annotations

import difflib
import re
from typing import cast

from torch import nn

from phinetune.errors import AdapterError
from phinetune.lora.config import LoraConfig
from phinetune.lora.layers import Linear


def inject(model: nn.Module, config: LoraConfig) -> list[str]:
    """Freeze `model` and replace the targeted `nn.Linear` layers by LoRA layers over the same weights. Returns their names.

    Raises AdapterError, before anything is changed, if a target matches nothing, or r does not fit a layer.
    """
    names = find_targets(model, config)
    misfits = [
        f"{n}: r={config.r} does not fit a {m.in_features} -> {m.out_features} layer"
        for n in names
        if isinstance(m := model.get_submodule(n), nn.Linear) and config.r > min(m.in_features, m.out_features)
    ]
    if misfits:
        raise AdapterError(
            misfits[:3],
            f"{len(misfits)} layers are too small for that rank; lower r or leave them out of target_modules",
        )
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        layer = Linear.from_base(
            cast(nn.Linear, base), config.r, config.lora_alpha, config.lora_dropout, config.use_rslora
        )
        setattr(model.get_submodule(parent), child, layer)
    return names


def find_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the linear layers that `config` targets, in the model's order. Raises AdapterError if any given target matches none."""
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, Linear)
    }
    if config.target_modules == "all-linear":
        head = output_head(model)
        names = [name for name, module in linear.items() if module is not head]
        if not names:
            raise AdapterError("target_modules: the model has no linear layers")
    else:
        targets = config.target_modules
        names = [name for name in linear if _matches(name, targets)]
        unmatched = [
            t
            for t in ([targets] if isinstance(targets, str) else targets)
            if not any(_matches(n, t if isinstance(targets, str) else [t]) for n in linear)
        ]
        if unmatched:
            raise AdapterError(
                [f'target_modules: "{t}" matches no linear layer{_nearest(t, linear)}' for t in unmatched],
                f"the layers' names end in: {', '.join(_endings(linear))}",
            )
    if config.exclude_modules:
        names = [name for name in names if not _matches(name, config.exclude_modules)]
        if not names:
            raise AdapterError("exclude_modules: leaves no layer to train")
    return names


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, where the model can name it (`get_output_embeddings` of transformers)."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _matches(name: str, targets: str | list[str]) -> bool:
    """PEFT's rule: a text is a regular expression for the whole name; a list holds whole names or name endings."""
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise AdapterError(
                f'target_modules: "{targets}" is not a regular expression: {error}', "give a list of names instead"
            ) from None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _endings(names: dict[str, nn.Linear]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _nearest(target: str, names: dict[str, nn.Linear]) -> str:
    near = difflib.get_close_matches(target.rpartition(".")[2], _endings(names), n=1, cutoff=0.5)
    return f', did you mean "{near[0]}"?' if near else ""
