"""Fold the factors into the weights: W + scaling · B A, in float32, written back in W's own dtype. The result has plain layers only.

Merging is explicit and final; there is no merged/unmerged state to be in. Not here: merging on disk, shard by shard.
"""

from __future__ import annotations

import torch
from torch import nn

from phinetune.errors import AdapterError
from phinetune.lora.layers import lora_layers


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Replace every LoRA layer of `model` by a plain `nn.Linear` with the merged weight. Returns their names.

    Raises AdapterError, with `model` unchanged, if a merged weight is not finite.
    """
    layers = lora_layers(model)
    merged = {}
    for name, layer in layers.items():
        weight = (layer.weight.float() + layer.delta()).to(layer.weight.dtype)
        if not torch.isfinite(weight).all():
            raise AdapterError(
                f"{name}: merging gives values that are not finite in {str(weight.dtype)[6:]}",
                "the adapter is damaged, or diverged in training",
            )
        merged[name] = weight
    for name, layer in layers.items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(merged.pop(name), requires_grad=False), layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain.train(layer.training))
    return list(layers)
