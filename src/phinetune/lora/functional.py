"""The arithmetic of one LoRA linear layer: a reference in plain torch and one autograd function that does the same with less work.

    y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ           W (out, in) frozen, A (r, in), B (out, r), s = alpha / r

(Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, equation 3.)

Plain autograd keeps x twice (once for W, once for A), knows nothing of W being frozen until it has walked the graph, and with
float32 factors on a bfloat16 base it also keeps a float32 copy of x. `LoraLinearFunction` saves x once, in its own dtype, plus the
(N, r) product x Aᵀ, and never forms a gradient for W. With g = dL/dy, flattened to (N, out):

    dB = s · gᵀ (x̃ Aᵀ)        dA = s · (g B)ᵀ x̃        dx = g W + s · m ⊙ ((g B) A)        x̃ = m ⊙ x

where m is the dropout mask already divided by 1 - p (all ones without dropout). The factors are cast to x's dtype for the products
and their gradients come back in the factors' own dtype. Not here: parameters, module names, where layers sit in a model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """The definition, in plain torch: what `lora_linear` must equal. Shapes as there."""
    dropped = x if mask is None else x * mask
    low_rank = F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * low_rank


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """x (..., in) -> (..., out), with gradients for x, lora_A and lora_B only.

    weight (out, in) and bias (out) are treated as constants. mask, if given, has x's shape and dtype and is the dropout mask
    divided by 1 - p. Neither shape nor dtype of x is changed.
    """
    result: Tensor = LoraLinearFunction.apply(x, weight, bias, lora_A, lora_B, scaling, mask)  # type: ignore[no-untyped-call]
    return result


class LoraLinearFunction(torch.autograd.Function):
    """See the module's head for the derivation; `gradcheck` in the tests keeps it true."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, mask):  # type: ignore[no-untyped-def]
        flat = x.reshape(-1, x.shape[-1])  # (N, in)
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        down = F.linear(flat if mask is None else flat * mask.reshape(flat.shape), A)  # (N, r)
        y = F.linear(flat, weight, bias)  # (N, out)
        y.addmm_(down, B.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B, down, mask)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        x, weight, lora_A, lora_B, down, mask = ctx.saved_tensors
        flat, g = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])  # (N, in), (N, out)
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        flat_mask = None if mask is None else mask.reshape(flat.shape)
        up = g @ B  # (N, r)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_flat = g @ weight
            if flat_mask is None:
                grad_flat.addmm_(up, A, alpha=ctx.scaling)
            else:
                grad_flat.addcmul_(flat_mask, up @ A, value=ctx.scaling)
            grad_x = grad_flat.view(x.shape)
        if ctx.needs_input_grad[3]:
            dropped = flat if flat_mask is None else flat * flat_mask
            grad_A = (up.t() @ dropped).to(lora_A.dtype).mul_(ctx.scaling)
        if ctx.needs_input_grad[4]:
            grad_B = (g.t() @ down).to(lora_B.dtype).mul_(ctx.scaling)
        return grad_x, None, None, grad_A, grad_B, None, None
