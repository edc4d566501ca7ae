"""What LoRA layers of every kind share: the interface of loralib's `LoRALayer`, merging and unmerging, standing for a model's own layer.

`weight` and `bias` of the frozen layer, `lora_A`, `lora_B` and `scaling = alpha / r` carry the names that loralib's users know, so state
dicts of either load in the other.

A layer made with `merge_weights=True` (loralib's default) folds its factors into `weight` on `eval()` and takes them out on `train()`.
Where loralib adds and subtracts, which drifts in bfloat16, the layer sets the frozen weight aside and puts it back, bit for bit, at the
price of a second weight while in `eval()`. Not here: the layers themselves, which layers of a model get factors, files.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.errors import ConfigError
from phinetune.lora.frozen import dense
from phinetune.lora.functional import lora_linear


class LoRALayer:
    """What every LoRA layer has: rank, alpha, scaling, dropout, and being merged or not. Mixed into torch's own layers.

    A rank above the layer's own is allowed, as in loralib; `inject`, which knows the layer's name, refuses it.

    Raises ConfigError for a rank below 0 (0 is a plain layer, as in loralib), a rank that is not a whole number, or dropout outside
    0 to below 1.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    r: int
    scaling: float
    merged: bool
    arithmetic = staticmethod(lora_linear)
    """What a linear layer computes with; `lora_linear_reference` is the slow way to the same."""
    rounding: Any = None
    """Trained for the grid that the model is shipped on: the merged weight, rounded (`rounding.py`); None without."""
    plain: nn.Module | None = None
    """The layer of the model that this one stands for, sharing its weight; None for a layer built by hand."""
    lora_magnitude_vector: nn.Parameter | None
    """DoRA's lengths, (out); None without DoRA."""

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        if not hasattr(r, "__index__") or isinstance(r, bool) or r < 0:
            raise ConfigError(f"r must be a whole number, 0 or above (found: {r!r})")
        if not isinstance(lora_dropout, int | float) or not 0.0 <= lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout must be at least 0 and below 1 (found: {lora_dropout!r})")
        if not isinstance(lora_alpha, int | float) or not math.isfinite(lora_alpha):
            raise ConfigError(f"lora_alpha must be a number (found: {lora_alpha!r})")
        self.r, self.lora_alpha = int(r), lora_alpha
        self.scaling = lora_alpha / r if r else 0.0
        self.lora_dropout: nn.Module = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.merged, self.merge_weights = False, merge_weights
        if isinstance(self, nn.Module):
            self.register_parameter("lora_magnitude_vector", None)
            self.register_buffer("unmerged_weight", None, persistent=False)
            self.register_state_dict_post_hook(_after_save)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    def reset_factors(self) -> None:
        """lora_A Kaiming-uniform (a = sqrt 5), lora_B zero: the layer computes exactly its frozen base (Hu et al. 2021, section 4.1)."""
        if getattr(self, "lora_A", None) is not None and not self.lora_A.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def frozen(self) -> Any:
        """The parameter W that the factors stand beside."""
        return self.weight  # type: ignore[attr-defined]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with the layer's whole change equal to scaling · B A: A (r', in), B (out, r'). PEFT's plain form of the layer."""
        raise NotImplementedError

    def folded(self) -> Tensor:
        """W with the factors folded in, in W's shape, layout and dtype (a 4-bit W is made dense)."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """What merging adds to W, in W's shape, float32 or better, without DoRA's lengths."""
        raise NotImplementedError

    def merge(self) -> None:
        """Fold the factors into the weight; the frozen weight is set aside. Nothing happens to a merged layer or one without factors."""
        if not self.merged and getattr(self, "lora_A", None) is not None:
            weight = self.frozen()
            with torch.inference_mode(False), torch.no_grad():  # the weight outlives an inference mode that is on now
                folded = self.folded()
            # of layers that share their weight, the first sets it aside for all
            self.unmerged_weight: Tensor | None = getattr(weight, "unmerged", weight.data)
            weight.unmerged = self.unmerged_weight
            weight.data = folded
        self.merged = True

    def unmerge(self) -> None:
        """Put the frozen weight back, bit for bit."""
        if self.unmerged_weight is not None:
            weight = self.frozen()
            weight.data = self.unmerged_weight
            self.unmerged_weight = None
            if hasattr(weight, "unmerged"):
                del weight.unmerged
        self.merged = False

    def train(self, mode: bool = True) -> Any:
        """As torch's; a layer with `merge_weights` also unmerges for training and merges for evaluation."""
        super().train(mode)  # type: ignore[misc]
        if self.merge_weights:
            self.unmerge() if mode else self.merge()
        return self

    def dropout_mask(self, x: Tensor) -> Tensor | None:
        """The mask for x, divided by 1 - p; None outside training or without dropout."""
        return (
            F.dropout(torch.ones_like(x), getattr(self.lora_dropout, "p", 0.0), training=True) if self.drops else None
        )

    @property
    def drops(self) -> bool:
        """True while dropout is at work."""
        return getattr(self.lora_dropout, "p", 0.0) > 0.0 and self.lora_dropout.training

    def rescale(self, scaling: float) -> None:
        """Set `scaling` and the alpha that belongs to it."""
        self.scaling, self.lora_alpha = scaling, scaling * self.r


_MERGED = "lora_merged"  # in a state dict's metadata: the weight in it has the factors folded in


def _after_save(module: Any, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    if module.unmerged_weight is not None:
        metadata[_MERGED] = True


def _before_load(module: Any, state: Any, prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    module.unmerge()
    module.__dict__["loading_merged"] = bool(metadata.get(_MERGED))


def _after_load(module: Any, _: Any) -> None:
    if module.__dict__.pop(
        "loading_merged", False
    ):  # saved in eval(): what was folded in is taken off, as near as it can be
        weight = module.frozen()
        with torch.no_grad():
            weight.data = (weight.to(torch.promote_types(weight.dtype, torch.float32)) - module.delta()).to(
                weight.dtype
            )
    if module.merge_weights and not module.training:
        module.merge()


def adopt(layer: Any, base: nn.Module, shapes: dict[str, tuple[int, ...]]) -> Any:
    """Make `layer` (on no device) stand for `base`: its own parameters, frozen, and fresh float32 factors of `shapes` beside them."""
    holder = layer.conv if hasattr(layer, "conv") else layer
    for name in ("weight", "bias"):
        parameter = getattr(base, name, None)
        if parameter is not None:
            parameter.requires_grad_(False)
        setattr(holder, name, parameter)
    device = holder.weight.device
    for name, shape in shapes.items():
        setattr(layer, name, nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32)))
    layer.reset_factors()
    layer._forward_hooks.update(base._forward_hooks)
    layer._forward_pre_hooks.update(base._forward_pre_hooks)
    layer.__dict__["plain"] = base  # not a child: it would be counted, moved and saved twice
    return layer.train(base.training)


def plain_layer(layer: Any) -> nn.Module:
    """The layer without factors, over the same frozen weight: the model's own where there is one, else torch's."""
    weight, bias = layer.frozen(), getattr(getattr(layer, "conv", layer), "bias", None)
    if layer.plain is not None:
        plain: nn.Module = copy.copy(layer.plain)
    elif isinstance(layer, nn.Embedding):
        names = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
        plain = nn.Embedding(**{n: getattr(layer, n) for n in (*names, "sparse")}, device="meta")
    elif isinstance(layer, nn.Linear):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    else:
        plain = copy.copy(layer.conv)
    plain._parameters = {**plain._parameters, "weight": weight, **({"bias": bias} if bias is not None else {})}
    return plain.train(layer.training)


def dora_scale(layer: Any) -> Tensor:
    """DoRA's factor on each output: its length over that of W + s B A, (out). No gradient through the lengths (section 4.3)."""
    scale: Tensor = layer.lora_magnitude_vector / output_lengths(layer)
    return scale


@torch.no_grad()
def output_lengths(layer: Any) -> Tensor:
    """The length of each output's weights in W + s B A, (out), float32 or better: where DoRA's magnitudes start."""
    weight = dense(layer.frozen(), torch.float32)
    whole = weight.to(torch.promote_types(weight.dtype, torch.float32)) + layer.delta()
    across = 0 if isinstance(layer, nn.Embedding) or getattr(layer, "fan_in_fan_out", False) else 1
    found: Tensor = torch.linalg.vector_norm(whole.flatten(1), dim=across)
    return found


@torch.no_grad()
def product(layer: Any) -> Tensor:
    """scaling · B A in float32 or better: (out, in)."""
    A, B = layer.factors()
    dtype = torch.promote_types(A.dtype, torch.float32)
    result: Tensor = layer.scaling * (B.to(dtype) @ A.to(dtype))
    return result


def check_rank(r: int, in_features: int, out_features: int) -> None:
    """Raises ConfigError if r is larger than either side of a layer."""
    if r > min(in_features, out_features):
        limit = min(in_features, out_features)
        raise ConfigError(f"r={r} does not fit a {in_features} -> {out_features} layer (1 to {limit})")


@dataclass(frozen=True)
class LoraSize:
    """How much of a model is trained."""

    layers: int
    trainable: int
    total: int


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> LoRA layer that has factors, in the model's own order."""
    return {
        n: m for n, m in model.named_modules() if isinstance(m, LoRALayer) and getattr(m, "lora_A", None) is not None
    }


def lora_size(model: nn.Module) -> LoraSize:
    """Counts of LoRA layers, trainable parameters, and all parameters (shared ones once, packed ones as the numbers they stand for)."""
    return LoraSize(
        layers=len(lora_layers(model)),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(getattr(p, "quant_state", p).shape.numel() for p in model.parameters()),
    )
