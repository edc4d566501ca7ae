"""Merge in memory: every LoRA layer becomes a plain layer with the factors folded in. Final; there is no way back.

Not here: the arithmetic (`fold.py`), merging files shard by shard (`stream.py`).
"""

from __future__ import annotations

import torch
from torch import nn

from phinetune.errors import AdapterError
from phinetune.lora.fold import check_finite
from phinetune.lora.injection import Adapter
from phinetune.lora.layer import LoRALayer, lora_layers, plain_layer
from phinetune.lora.linear import Linear, MergedLinear


@torch.no_grad()
def merge(model: nn.Module, adapter: Adapter | None = None) -> list[str]:
    """Replace every LoRA layer of `model` by a plain layer with the merged weight. Returns their names.

    With `adapter`, that one is merged; it need not be in, but no other may be. Weights keep their dtype; a 4-bit
    weight becomes a dense one. Raises AdapterError, with `model` unchanged, if a merged weight is not finite or nothing is there to merge.
    """
    layers = lora_layers(model) if adapter is None else adapter.layers
    if not layers:
        raise AdapterError("merge: the model has no LoRA layers")
    strangers = [n for n, m in lora_layers(model).items() if layers.get(n) is not m]
    if strangers:
        raise AdapterError(f"{strangers[0]}: another adapter is in the model", "take it out first, with use(None)")
    for name, layer in layers.items():
        source = getattr(layer.plain, "source_cls", None)  # what transformers had before it went to 4 bits
        if source is not None and source.__name__ == "Conv1D":
            raise AdapterError(
                f"{name}: is a 4-bit {source.__name__}, which cannot be made dense in memory",
                "merge from files, with merge_files",
            )
    folded = {}
    for name, layer in layers.items():
        layer.unmerge()
        folded[name] = layer.folded()
        check_finite(name, folded[name])
    plain: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        plain[name] = _plain(layer, folded.pop(name))
    if adapter is not None:
        adapter.put(model)
    for name, module in plain.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    for name, left in [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALayer)]:  # r = 0: nothing to fold
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain_layer(left))
    return list(layers)


def _plain(layer: LoRALayer, weight: torch.Tensor) -> nn.Module:
    """A plain layer with `weight`, its bias as it is in the LoRA layer."""
    if isinstance(layer, Linear | MergedLinear) and getattr(layer.weight, "quant_state", None) is not None:
        plain: nn.Module = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.bias = layer.bias
    else:
        plain = plain_layer(layer)
        plain._parameters = dict(plain._parameters)  # the base's own layer keeps its weight
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain.train(layer.training)  # type: ignore[attr-defined]
