"""LoRA layers: a frozen weight with two small trainable factors beside it.

`Linear` keeps the names that loralib and PEFT users know: `weight` and `bias` of the frozen layer, `lora_A` (r, in), `lora_B`
(out, r), `scaling = alpha / r`. Because the frozen parameters keep their own names, putting LoRA into a model does not rename
anything in its state dict. Not here: which layers of a model get one (`inject.py`), files (`adapter.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.lora.functional import lora_linear


class Linear(nn.Linear):
    """y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ; x (..., in_features) -> (..., out_features).

    W and b are frozen; `lora_A` starts Kaiming-uniform (a = sqrt 5) and `lora_B` at zero, so a fresh layer computes exactly the
    frozen one (Hu et al. 2021, section 4.1). `scaling` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`
    (Kalajdzievski 2023). The factors are float32 whatever the dtype of W.

    Raises ValueError for r < 1 or r larger than the layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= r <= min(in_features, out_features):
            raise ValueError(
                f"r={r} does not fit a {in_features} -> {out_features} layer (1 to {min(in_features, out_features)})"
            )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device, dtype=torch.float32))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.reset_lora_parameters()

    @classmethod
    def from_base(
        cls, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, use_rslora: bool = False
    ) -> Linear:
        """A LoRA layer over `base`'s own parameters: shared, not copied. Factors are made on `base`'s device."""
        layer = cls(
            base.in_features, base.out_features, r, lora_alpha, lora_dropout, use_rslora, bias=False, device="meta"
        )
        layer.weight, layer.bias = base.weight.requires_grad_(False), base.bias
        if base.bias is not None:
            base.bias.requires_grad_(False)
        device = base.weight.device
        layer.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device, dtype=torch.float32))
        layer.lora_B = nn.Parameter(torch.empty(base.out_features, r, device=device, dtype=torch.float32))
        layer.reset_lora_parameters()
        return layer.train(base.training)

    def reset_lora_parameters(self) -> None:
        """lora_A ~ Kaiming uniform, lora_B = 0: the layer computes exactly its frozen base."""
        if not self.lora_A.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def delta(self) -> Tensor:
        """scaling · B A, shape (out_features, in_features), float32: what merging adds to the weight."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())

    def forward(self, input: Tensor) -> Tensor:
        mask = None
        if self.training and self.lora_dropout > 0.0:
            mask = F.dropout(torch.ones_like(input), self.lora_dropout, training=True)
        return lora_linear(input, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"


@dataclass(frozen=True)
class LoraSize:
    """How much of a model is trained."""

    layers: int
    trainable: int
    total: int


def lora_layers(model: nn.Module) -> dict[str, Linear]:
    """Name -> LoRA layer, in the model's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def lora_size(model: nn.Module) -> LoraSize:
    """Counts of LoRA layers, trainable parameters, and all parameters (shared ones once)."""
    return LoraSize(
        layers=len(lora_layers(model)),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
    )
