"""Root-mean-square normalization in one autograd function.

    y = x / rms(x) ⊙ w,    rms(x) = sqrt(mean(x²) + eps)          (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4)

Written out in torch's operators on bfloat16, it keeps x twice more in float32 for the backward pass and walks over it eleven times. The
function keeps x as it is and one float32 number a row, and works on a few rows at a time, so that what is float32 stays in the cache.
With x̂ = x / rms(x) and g = dL/dy ⊙ w:

    dx = (g - x̂ · mean(g ⊙ x̂)) / rms(x)        dw = sum over rows of dL/dy ⊙ x̂

Not here: which modules of a model are replaced (`fast.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from phinetune.model import kernels

_AT_ONCE = 1 << 18  # elements in float32 at a time: 1 MB


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition: what `rms_norm` must equal. x (..., h), weight (h); computed in float32, rounded to x's dtype before the weight."""
    wide = x.float() if x.dtype != torch.float64 else x
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class RmsNormFunction(torch.autograd.Function):
    """See the module's head."""

    @staticmethod
    def forward(ctx, x, weight, eps, built):  # type: ignore[no-untyped-def]
        flat, width = x.reshape(-1, x.shape[-1]), torch.promote_types(x.dtype, torch.float32)
        ctx.built = built and kernels.usable(x, weight)
        if ctx.built and flat.is_contiguous() and flat.shape[1] <= kernels.WIDEST:
            y, inverse = kernels.rms_norm(flat, weight, eps)
            ctx.save_for_backward(flat, weight, inverse.unsqueeze(1))
            return y.view(x.shape)
        y, inverse = torch.empty_like(flat), flat.new_empty(len(flat), 1, dtype=width)
        for rows, part in _parts(flat):
            wide = part.to(width, copy=True)
            length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            inverse[rows] = length.square_().div_(flat.shape[1]).add_(eps).rsqrt_()
            y[rows] = wide.mul_(inverse[rows])
        ctx.save_for_backward(flat, weight, inverse)
        return y.mul_(weight).view(x.shape) if y.dtype == weight.dtype else (y * weight).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, inverse = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.built and not ctx.needs_input_grad[1] and kernels.usable(flat, x) and flat.shape[1] <= kernels.WIDEST:
            return (
                kernels.rms_norm_backward(flat.contiguous(), x, weight, inverse, None).view(grad.shape),
                None,
                None,
                None,
            )
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=inverse.dtype) if ctx.needs_input_grad[1] else None
        for rows, part in _parts(flat):
            normed = x[rows].to(inverse.dtype).mul(inverse[rows])  # x̂
            if dw is not None:
                dw += (part.to(inverse.dtype) * normed).sum(0)
            if dx is not None:
                g = (part * weight).to(inverse.dtype)
                along = torch.linalg.vecdot(g, normed).unsqueeze(-1).div_(-x.shape[1])
                dx[rows] = normed.mul_(along).add_(g).mul_(inverse[rows])
        return None if dx is None else dx.view(grad.shape), None if dw is None else dw.to(weight.dtype), None, None


def _parts(flat: Tensor) -> list[tuple[slice, Tensor]]:
    rows = max(1, _AT_ONCE // flat.shape[1])
    return [(slice(i, i + rows), flat[i : i + rows]) for i in range(0, len(flat), rows)]


def rms_norm(x: Tensor, weight: Tensor, eps: float, built: bool = True) -> Tensor:
    """x (..., h), weight (h) -> (..., h) in the wider of their dtypes, as `rms_norm_reference`; `built`: by the compiled functions, if they serve."""
    result: Tensor = RmsNormFunction.apply(x, weight, eps, built)  # type: ignore[no-untyped-call]
    return result


class RMSNorm(nn.Module):
    """Stands for a model's own normalization, over its own weight."""

    def __init__(self, weight: nn.Parameter, eps: float, built: bool = True) -> None:
        super().__init__()
        self.weight, self.eps, self.built = weight, eps, built

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.built)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


@torch.no_grad()
def stand_in(module: nn.Module, built: bool = True) -> RMSNorm | None:
    """An `RMSNorm` for `module` if it is one that computes exactly this, else None: found by its name and by trying it.

    `built`: it computes by the compiled functions, where they serve.
    """
    weight: Any = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or eps is None or not isinstance(weight, nn.Parameter):
        return None
    if weight.dim() != 1 or module._forward_hooks or module._forward_pre_hooks:
        return None
    if sum(p.numel() for p in module.parameters()) != weight.numel():
        return None
    if weight.is_meta:  # without numbers: one of its kind is tried
        try:
            with torch.device("cpu"):
                small: Any = type(module)(8, eps=float(eps))
        except TypeError:
            return None
        return None if stand_in(small) is None else RMSNorm(weight, float(eps), built)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(weight), generator=generator).to(weight)
    fast = RMSNorm(weight, float(eps), built)
    try:
        theirs = module(x)
    except Exception:  # a foreign module that wants something else than rows
        return None
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    same = (
        isinstance(theirs, Tensor) and theirs.dtype == x.dtype and torch.allclose(theirs, fast(x), tolerance, tolerance)
    )
    return fast if same else None
