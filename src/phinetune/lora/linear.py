"""LoRA for linear layers: `Linear`, and `MergedLinear` for one layer that stands for several.

The frozen weight may be stored (out, in), (in, out) as GPT-2's Conv1D has it, or in 4 bits. Because the frozen parameters keep their own
names, putting LoRA into a linear layer renames nothing in a model's state dict. Not here: the arithmetic (`functional.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.errors import ConfigError
from phinetune.lora.fold import fold
from phinetune.lora.frozen import dense
from phinetune.lora.functional import Spans
from phinetune.lora.layer import LoRALayer, adopt, dora_scale, product


class Linear(LoRALayer, nn.Linear):
    """y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ; x (..., in_features) -> (..., out_features).

    W is frozen where r > 0; `lora_A` starts Kaiming-uniform (a = sqrt 5) and `lora_B` at zero, so a fresh layer computes exactly the
    frozen one (Hu et al. 2021, section 4.1). `fan_in_fan_out` is for weights stored (in, out). Raises ConfigError for r below 0.
    """

    lora_A_start: Tensor | None
    lora_B_start: Tensor | None
    """Factors to start from (PiSSA, OLoRA), whose product is taken off again, so that the base need not be changed."""
    shared: Any = None
    """The `SharedInput` that computes this layer together with its neighbours, if one does (`group.py`)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.fan_in_fan_out = fan_in_fan_out
        if r > 0:
            self.lora_A = nn.Parameter(self.weight.new_zeros(r, in_features))
            self.lora_B = nn.Parameter(self.weight.new_zeros(out_features, r))
            self.weight.requires_grad = False
        self.register_buffer("lora_A_start", None)
        self.register_buffer("lora_B_start", None)
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.transpose(0, 1)

    @classmethod
    def from_base(cls, base: nn.Module, r: int, lora_alpha: float, lora_dropout: float = 0.0) -> Linear:
        """A LoRA layer over `base`'s own parameters (an `nn.Linear`, one in 4 bits, or GPT-2's Conv1D): shared, not copied.

        The factors are float32 on `base`'s device, and the layer never merges by itself.
        """
        transposed = not isinstance(base, nn.Linear)
        weight: Any = base.weight
        shape = tuple(weight.shape[::-1] if transposed else (base.out_features, base.in_features))
        layer = cls(shape[1], shape[0], r, lora_alpha, lora_dropout, False, False, bias=False, device="meta")
        layer.fan_in_fan_out = transposed
        adopted: Linear = adopt(layer, base, {"lora_A": (r, shape[1]), "lora_B": (shape[0], r)})
        return adopted

    def reset_parameters(self) -> None:
        """W and b as `nn.Linear` starts them; lora_A Kaiming-uniform, lora_B zero."""
        nn.Linear.reset_parameters(self)
        self.reset_factors()

    def matrix(self) -> Tensor:
        """W as (out, in), dense."""
        weight = dense(self.weight, self.lora_A.dtype)
        return weight.t() if self.fan_in_fan_out else weight

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.lora_A_start is None or self.lora_B_start is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.lora_A_start]), torch.cat([self.lora_B, -self.lora_B_start], dim=1)

    def delta(self) -> Tensor:
        change = product(self)
        return change.t() if self.fan_in_fan_out else change

    def folded(self) -> Tensor:
        A, B = self.factors()
        weight = dense(self.weight, self.compute_dtype())
        return fold(weight, A, B, self.scaling, self.lora_magnitude_vector, self.fan_in_fan_out)

    def compute_dtype(self) -> torch.dtype:
        """The dtype of W, or the one that a 4-bit W is made dense in."""
        state = getattr(self.weight, "quant_state", None)
        return self.weight.dtype if state is None else state.dtype

    def forward(self, input: Tensor) -> Tensor:
        if self.r == 0 or self.merged:
            weight = dense(self.weight, input.dtype)
            return F.linear(input, weight.t() if self.fan_in_fan_out else weight, self.bias)
        if self.shared is not None:
            ready: Tensor | None = self.shared.take(self, input)
            if ready is not None:
                return ready
        weight, folded = frozen_or_folded(self)
        A, B = self.factors()
        mask = self.dropout_mask(input)
        if self.lora_magnitude_vector is None:
            return self.arithmetic(input, weight, self.bias, A, B, self.scaling, mask, None, folded)
        y = self.arithmetic(input, weight, None, A, B, self.scaling, mask) * dora_scale(self).to(input.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}"


class MergedLinear(LoRALayer, nn.Linear):
    """One linear layer that stands for several, such as a fused `qkv_proj`, with factors of their own for the slices enabled.

    `enable_lora` has one entry a slice, in the order of W's rows. loralib's slices are equally wide; `slices` gives the widths where
    they are not (grouped-query attention). lora_A (enabled slices · r, in), lora_B (rows of the enabled slices, r). x (..., in) ->
    (..., out). Raises ConfigError if `enable_lora` and the widths do not fit each other or the layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        slices: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.enable_lora, self.fan_in_fan_out = _switches(enable_lora), fan_in_fan_out
        self.slices = _widths(out_features, self.enable_lora, slices)
        starts = [sum(self.slices[:i]) for i in range(len(self.slices))]
        enabled = zip(starts, self.slices, self.enable_lora, strict=True)
        self.spans: Spans = tuple((start, start + width) for start, width, on in enabled if on)
        if r > 0 and self.spans:
            rows = sum(stop - start for start, stop in self.spans)
            self.lora_A = nn.Parameter(self.weight.new_zeros(r * len(self.spans), in_features))
            self.lora_B = nn.Parameter(self.weight.new_zeros(rows, r))
            self.weight.requires_grad = False
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.transpose(0, 1)

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        enable_lora: Sequence[bool],
        slices: Sequence[int],
    ) -> MergedLinear:
        """Factors for some slices of `base`, over its own parameters, as `Linear.from_base`."""
        transposed = not isinstance(base, nn.Linear)
        weight: Any = base.weight
        out, features = tuple(weight.shape[::-1] if transposed else (base.out_features, base.in_features))
        on: dict[str, Any] = {"bias": False, "device": "meta"}
        layer = cls(features, out, r, lora_alpha, lora_dropout, enable_lora, False, False, slices, **on)
        layer.fan_in_fan_out = transposed
        shapes = {"lora_A": tuple(layer.lora_A.shape), "lora_B": tuple(layer.lora_B.shape)}
        adopted: MergedLinear = adopt(layer, base, shapes)
        return adopted

    def reset_parameters(self) -> None:
        """As `Linear.reset_parameters`."""
        nn.Linear.reset_parameters(self)
        self.reset_factors()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A as it is, B block-diagonal: rank r · slices, the same change as the slices' own factors."""
        B = self.lora_B.new_zeros(self.out_features, self.lora_A.shape[0])
        for i, (rows, part) in enumerate(zip(self.spans, self.slice_B(), strict=True)):
            B[slice(*rows), i * self.r : (i + 1) * self.r] = part
        return self.lora_A, B

    def slice_B(self) -> list[Tensor]:
        """lora_B cut into the enabled slices: (rows, r) each."""
        return list(torch.split(self.lora_B, [stop - start for start, stop in self.spans]))

    @property
    def lora_ind(self) -> Tensor:
        """(out_features), true for the rows of the enabled slices. loralib's name."""
        found = torch.zeros(self.out_features, dtype=torch.bool, device=self.weight.device)
        for rows in self.spans:
            found[slice(*rows)] = True
        return found

    def zero_pad(self, x: Tensor) -> Tensor:
        """x (rows of the enabled slices, ...) -> (out_features, ...), zero elsewhere. loralib's name."""
        result = x.new_zeros(self.out_features, *x.shape[1:])
        for rows, part in zip(self.spans, torch.split(x, [stop - start for start, stop in self.spans]), strict=True):
            result[slice(*rows)] = part
        return result

    def merge_AB(self) -> Tensor:
        """The change without its scaling, in W's layout. loralib's name."""
        pairs = zip(self.slice_B(), torch.split(self.lora_A, self.r), strict=True)
        change = self.zero_pad(torch.cat([part @ A for part, A in pairs]))
        return change.t() if self.fan_in_fan_out else change

    def delta(self) -> Tensor:
        change = product(self)
        return change.t() if self.fan_in_fan_out else change

    folded = Linear.folded
    compute_dtype = Linear.compute_dtype

    def forward(self, input: Tensor) -> Tensor:
        if self.merged or self.r == 0 or not self.spans:
            weight = dense(self.weight, input.dtype)
            return F.linear(input, weight.t() if self.fan_in_fan_out else weight, self.bias)
        weight, folded = frozen_or_folded(self)
        mask = self.dropout_mask(input)
        A, B = self.lora_A, self.lora_B
        return self.arithmetic(input, weight, self.bias, A, B, self.scaling, mask, self.spans, folded)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, slices={self.slices}, enable_lora={self.enable_lora}"


def frozen_or_folded(layer: Linear | MergedLinear) -> tuple[Tensor, bool]:
    """(the weight to multiply with, (out, in); whether the change is in it): W itself, or, trained for a grid, W + s B A rounded."""
    if layer.rounding is not None:
        weight: Tensor = layer.rounding.weight(layer)
        return weight, True
    return layer.weight.t() if layer.fan_in_fan_out else layer.weight, False


def _switches(enable_lora: Any) -> list[bool]:
    values = list(enable_lora) if isinstance(enable_lora, list | tuple) else []
    if not values or not all(type(on).__name__ in ("bool", "bool_") for on in values):  # numpy's too; 1 and 0 are not
        raise ConfigError(f"enable_lora must be a list of true and false, one a slice (found: {enable_lora!r})")
    return [bool(on) for on in values]


def _widths(out_features: int, enable_lora: list[bool], slices: Sequence[int] | None) -> list[int]:
    if slices is None:
        if out_features % len(enable_lora):
            raise ConfigError(
                f"enable_lora: its length, {len(enable_lora)}, does not divide out_features, {out_features}",
                "give the widths of the slices, if they are unequal: slices=[...]",
            )
        return [out_features // len(enable_lora)] * len(enable_lora)
    if not isinstance(slices, list | tuple) or not all(isinstance(w, int) for w in slices):
        raise ConfigError(f"slices must be a list of whole numbers, one a slice (found: {slices!r})")
    if len(slices) != len(enable_lora):
        raise ConfigError(f"enable_lora has {len(enable_lora)} entries for {len(slices)} slices")
    if sum(slices) != out_features or min(slices) < 1:
        raise ConfigError(f"slices {list(slices)} must be positive and add up to out_features, {out_features}")
    return list(slices)
