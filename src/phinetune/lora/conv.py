"""LoRA for convolutions: loralib's factors for layers built by hand, PEFT's for layers put into a model.

The kernel of a convolution is cut into a matrix before it is factored, and the two libraries cut differently. With kernel (k₁ … kₙ),
k = kₙ and m the product of the others:

    "kernel"   (loralib)   A (r·k, in·k)              B (out/groups·m, r·k)      change: B A, (out/groups·m, in·k), read as W's shape
    "channel"  (PEFT)      A (r, in, k₁ … kₙ)         B (out, r, 1 … 1)          change: row o of B times A, (out, in, k₁ … kₙ)

loralib 0.1.2 states its own for equal kernels of two dimensions and k = 1; the shapes above are its shapes there and go on where its
own would not fit. A "kernel" layer is a "channel" layer of rank r·k·m with A repeated along a diagonal, which is how it is written in
PEFT's format, without loss. Not here: transposed convolutions.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from phinetune.errors import AdapterError, ConfigError
from phinetune.lora.fold import fold
from phinetune.lora.layer import LoRALayer, adopt, dora_scale


class ConvLoRA(LoRALayer, nn.Module):
    """conv(x; W + scaling · change); x and y as the convolution's own. `conv` holds the frozen layer.

    Built by hand, its factors are loralib's; `from_base` makes PEFT's. Unlike in loralib, where `lora_dropout` does nothing for
    convolutions, it acts on the input of the change. Raises ConfigError for a rank that does not fit.
    """

    def __init__(
        self,
        conv_module: Any,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.conv: Any = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.cut: Literal["kernel", "channel"] = "kernel"
        if r > 0:
            k, others, rows = self._cut()
            self.lora_A = nn.Parameter(self.conv.weight.new_zeros(r * k, in_channels * k))
            self.lora_B = nn.Parameter(self.conv.weight.new_zeros(rows * others, r * k))
            self.conv.weight.requires_grad = False
        self.reset_parameters()

    @classmethod
    def from_base(cls, base: nn.Module, r: int, lora_alpha: float, lora_dropout: float = 0.0) -> ConvLoRA:
        """Factors cut PEFT's way over the parameters of `base`, a convolution without groups; shared, as `Linear.from_base`."""
        b: Any = base
        if b.groups != 1:
            raise AdapterError(
                f"groups={b.groups}: PEFT's format has no factors for grouped convolutions that could be merged"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.conv = nn.Module()
        LoRALayer.__init__(layer, r, lora_alpha, lora_dropout, False)
        layer.cut = "channel"
        weight = b.weight
        ones = (1,) * (weight.dim() - 2)
        shapes = {"lora_A": (r, *weight.shape[1:]), "lora_B": (weight.shape[0], r, *ones)}
        adopt(layer, base, shapes)
        layer.conv = base  # its own module: the names of its parameters gain a `conv.`, as in loralib
        return layer

    def _cut(self) -> tuple[int, int, int]:
        """(k, m, out / groups) of the module's head."""
        *others, k = self.conv.kernel_size
        return k, math.prod(others), self.conv.out_channels // self.conv.groups

    def reset_parameters(self) -> None:
        """W and b as the convolution starts them; lora_A Kaiming-uniform, lora_B zero."""
        self.conv.reset_parameters()
        self.reset_factors()

    def frozen(self) -> Any:
        return self.conv.weight

    def factors(self) -> tuple[Tensor, Tensor]:
        """PEFT's: A (r', in, *kernel), B (out, r', 1 …). Raises AdapterError for a grouped convolution, which has none."""
        if self.cut == "channel":
            return self.lora_A, self.lora_B
        weight = self.conv.weight
        if self.conv.groups != 1:
            raise AdapterError(f"a convolution with groups={self.conv.groups} cannot be written in PEFT's format")
        _, others, _ = self._cut()
        A = torch.block_diag(*[self.lora_A] * others)  # type: ignore[no-untyped-call]
        A = A.view(-1, *weight.shape[1:])  # (m·r·k, in, *kernel)
        return A, self.lora_B.reshape(weight.shape[0], -1, *(1,) * (weight.dim() - 2))

    def change(self) -> Tensor:
        """scaling · (what the factors say), in W's shape, with their gradients."""
        product = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
        change: Tensor = product.view(self.conv.weight.shape) * self.scaling
        return change

    @torch.no_grad()
    def delta(self) -> Tensor:
        exact = torch.promote_types(self.lora_A.dtype, torch.float32)
        product = self.lora_B.flatten(1).to(exact) @ self.lora_A.flatten(1).to(exact)
        change: Tensor = product.view(self.conv.weight.shape) * self.scaling
        return change

    @torch.no_grad()
    def folded(self) -> Tensor:
        if self.cut == "kernel" and self.conv.groups != 1:
            weight = self.conv.weight
            folded: Tensor = (weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.delta()).to(
                weight.dtype
            )
            return folded
        A, B = self.factors()
        return fold(self.conv.weight, A.flatten(1), B.flatten(1), self.scaling, self.lora_magnitude_vector)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if self.r == 0 or self.merged:
            result: Tensor = conv(x)
            return result
        change, mask, magnitude = self.change().to(conv.weight.dtype), self.dropout_mask(x), self.lora_magnitude_vector
        if mask is None and magnitude is None:
            result = conv._conv_forward(x, conv.weight + change, conv.bias)
            return result
        y: Tensor = conv._conv_forward(x, conv.weight, None)
        y = y + conv._conv_forward(x if mask is None else x * mask, change, None)
        shape = (-1, *(1,) * (conv.weight.dim() - 2))
        if magnitude is not None:
            y = y * dora_scale(self).to(y.dtype).view(shape)
        return y if conv.bias is None else y + conv.bias.view(shape)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, cut={self.cut!r}"


class Conv1d(ConvLoRA):
    """`ConvLoRA` over `nn.Conv1d`; x (N, in_channels, L)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """`ConvLoRA` over `nn.Conv2d`; x (N, in_channels, H, W)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """`ConvLoRA` over `nn.Conv3d`; x (N, in_channels, D, H, W)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)


def conv_class(base: nn.Module) -> type[ConvLoRA]:
    """The LoRA class for a convolution. Raises ConfigError for any other layer."""
    for kind, cls in ((nn.Conv1d, Conv1d), (nn.Conv2d, Conv2d), (nn.Conv3d, Conv3d)):
        if isinstance(base, kind):
            return cls
    raise ConfigError(f"{type(base).__name__} is not a convolution that can have factors")
