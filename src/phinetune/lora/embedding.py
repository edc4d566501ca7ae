"""LoRA for embeddings. Not here: what all LoRA layers share (`layer.py`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.lora.fold import fold
from phinetune.lora.layer import LoRALayer, adopt, dora_scale, product


class Embedding(LoRALayer, nn.Embedding):
    """Row x of W plus scaling · column x of A times Bᵀ; x (...) of token ids -> (..., embedding_dim).

    lora_A (r, num_embeddings) starts at zero, lora_B (embedding_dim, r) normal (loralib's choice: every token's change starts at zero).
    """

    embed_scale: float | Tensor | None = None
    """Factor on the whole output, of models that scale their embeddings (Gemma)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights)
        if r > 0:
            self.lora_A = nn.Parameter(self.weight.new_zeros(r, num_embeddings))
            self.lora_B = nn.Parameter(self.weight.new_zeros(embedding_dim, r))
            self.weight.requires_grad = False
        self.reset_parameters()

    @classmethod
    def from_base(cls, base: nn.Module, r: int, lora_alpha: float, lora_dropout: float = 0.0) -> Embedding:
        """Factors over the parameters of an `nn.Embedding`, shared, as `Linear.from_base`. There is no dropout on token ids."""
        b: Any = base
        options = {k: getattr(b, k) for k in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")}
        layer = cls(b.num_embeddings, b.embedding_dim, r, lora_alpha, False, **options, device="meta")
        layer.__dict__["embed_scale"] = getattr(
            base, "embed_scale", None
        )  # a buffer of the base: not the layer's to save
        adopted: Embedding = adopt(layer, base, {"lora_A": (r, b.num_embeddings), "lora_B": (b.embedding_dim, r)})
        return adopted

    def reset_parameters(self) -> None:
        """W as `nn.Embedding` starts it; lora_A zero, lora_B normal."""
        nn.Embedding.reset_parameters(self)
        self.reset_factors()

    def reset_factors(self) -> None:
        """lora_A zero, lora_B normal."""
        if getattr(self, "lora_A", None) is not None and not self.lora_A.is_meta:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B

    def delta(self) -> Tensor:
        return product(self).t()

    def folded(self) -> Tensor:
        return fold(self.weight, self.lora_A, self.lora_B, self.scaling, self.lora_magnitude_vector, transposed=True)

    def forward(self, input: Tensor) -> Tensor:
        options = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        y = F.embedding(input, self.weight, *options)
        if self.r > 0 and not self.merged:
            low = F.embedding(input, self.lora_A.t(), *options)
            y = y + ((low @ self.lora_B.t()) * self.scaling).to(y.dtype)
            if self.lora_magnitude_vector is not None:
                y = y * dora_scale(self).to(y.dtype)
        return y if self.embed_scale is None else y * torch.as_tensor(self.embed_scale).to(y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}"
