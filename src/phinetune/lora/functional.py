"""The arithmetic of one LoRA linear layer: a reference in plain torch and one autograd function that does the same with less work.

    y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ           W (out, in) frozen, A (r, in), B (out, r), s = alpha / r

(Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, equation 3.)

Where W is several projections in one (a fused `qkv_proj`), each adapted slice of its rows has factors of its own. A then holds the
slices' factors below one another, (slices · r, in), and B likewise, (rows of all adapted slices, r); `spans` says which rows of W they
are. One span over all rows is the ordinary layer.

Plain autograd keeps x twice (once for W, once for A), knows nothing of W being frozen until it has walked the graph, and with
float32 factors on a bfloat16 base it also keeps a float32 copy of x. `LoraLinearFunction` saves x once, in its own dtype, plus the
(N, r) product x Aᵀ, and forms a gradient for W or b only where one is asked for. With g = dL/dy, flattened to (N, out):

    dB = s · gᵀ (x̃ Aᵀ)        dA = s · (g B)ᵀ x̃        dx = g W + s · m ⊙ ((g B) A)        x̃ = m ⊙ x

where m is the dropout mask already divided by 1 - p (all ones without dropout). The factors are cast to x's dtype for the products
and their gradients come back in the factors' own dtype; s goes into B before it is cast. A quantized W is made dense for each product and never kept.

With `folded`, the weight handed in holds the change already, such as W + s B A rounded to the grid that the model will be shipped on.
Then y = x Wᵀ + b and dx = g W, while A and B get the gradients above, as if rounding were not there (the straight-through estimator,
Bengio et al. 2013, section 4).

Not here: parameters, module names, where layers sit in a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from phinetune.lora.frozen import dense, is_quantized

Spans = tuple[tuple[int, int], ...]
"""(first row, row after the last) of W for each adapted slice, in order and without overlap."""


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    spans: Spans | None = None,
    folded: bool = False,
) -> Tensor:
    """The definition, in plain torch: what `lora_linear` must equal. Shapes as there."""
    y = F.linear(x, dense(weight, x.dtype), bias)
    if folded:  # the factors' part counts for nothing but their gradients
        part = lora_linear_reference(x.detach(), torch.zeros_like(weight), None, lora_A, lora_B, scaling, mask, spans)
        return y + (part - part.detach())
    dropped = x if mask is None else x * mask
    if spans is None or spans == ((0, y.shape[-1]),):
        return y + scaling * F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    parts, end = [], 0
    for (start, stop), low, high in _slices(spans, lora_B.shape[1]):
        parts.append(y.new_zeros(*y.shape[:-1], start - end))  # rows without factors
        parts.append(F.linear(F.linear(dropped, lora_A[low].to(x.dtype)), lora_B[high].to(x.dtype)))
        end = stop
    return y + scaling * torch.cat([*parts, y.new_zeros(*y.shape[:-1], y.shape[-1] - end)], dim=-1)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    spans: Spans | None = None,
    folded: bool = False,
) -> Tensor:
    """x (..., in) -> (..., out), with gradients for whichever of x, weight, bias, lora_A and lora_B ask for one.

    weight (out, in), or a 4-bit weight of bitsandbytes; bias (out); lora_A (slices · r, in); lora_B (adapted rows, r). mask, if given,
    has x's shape and dtype and is the dropout mask divided by 1 - p. folded: the change is in `weight` already. Neither shape nor dtype of x is changed; under autocast everything
    is computed in autocast's dtype, as `torch.nn.functional.linear` does.
    """
    spans, kind = spans or ((0, lora_B.shape[0]),), x.device.type
    if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
        return lora_linear_reference(
            x, weight, bias, lora_A, lora_B, scaling, mask, spans, folded
        )  # vmap, jvp, tracing: plain torch
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, mask = x.to(dtype), None if mask is None else mask.to(dtype)
        weight = weight if is_quantized(weight) else weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext():
        operands = (x, weight, bias, lora_A, lora_B, scaling, mask, spans, folded)
        if not torch.is_grad_enabled():
            return _forward(*operands)[0]
        result: Tensor = LoraLinearFunction.apply(*operands)  # type: ignore[no-untyped-call]
        return result


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None,
    spans: Spans,
    folded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y (..., out), x̃ Aᵀ (N, slices · r), A and s · B in x's dtype)."""
    flat = x.reshape(-1, x.shape[-1])  # (N, in)
    A, B = lora_A.to(x.dtype), scaled(lora_B, scaling).to(x.dtype)
    down = F.linear(flat if mask is None else flat * mask.reshape(flat.shape), A)
    W = dense(weight, x.dtype)
    if folded or spans != ((0, W.shape[0]),):
        y = F.linear(x, W, bias)  # (..., out), no view of another tensor: models may change it in place
        rows = y.view(-1, y.shape[-1])
        for (start, stop), low, high in () if folded else _slices(spans, B.shape[1]):
            rows[:, start:stop].addmm_(down[:, low], B[high].t())
        return y, down, A, B
    y = x.new_empty(*x.shape[:-1], W.shape[0])
    rows = y.view(-1, y.shape[-1])
    product_into(down, B, bias, rows)  # first the slim product: the other one adds to what is there as it writes
    rows.addmm_(flat, W.t())
    return y, down, A, B


def product_into(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (N, m) = x (N, k) Wᵀ + bias (m), W (m, k)."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def gradient_of_B(g: Tensor, down: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s · gᵀ (x Aᵀ) in `dtype`, (out, r), for g (N, out) and down = x Aᵀ (N, r): the product with few rows is the faster one."""
    return (down.t() @ g).to(dtype).mul_(scaling).t().contiguous()


def scaled(lora_B: Tensor, scaling: float) -> Tensor:
    """s · B."""
    return lora_B if scaling == 1 else lora_B * scaling


def _slices(spans: Spans, r: int) -> Iterator[tuple[tuple[int, int], slice, slice]]:
    """Per slice: its rows in W and y, its rows in A (and columns of x Aᵀ), its rows in B."""
    high = 0
    for i, (start, stop) in enumerate(spans):
        yield (start, stop), slice(i * r, (i + 1) * r), slice(high, high + stop - start)
        high += stop - start


class LoraLinearFunction(torch.autograd.Function):
    """See the module's head for the derivation; `gradcheck` and `gradgradcheck` in the tests keep it true."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, mask, spans, folded):  # type: ignore[no-untyped-def]
        y, down, A, B = _forward(x, weight, bias, lora_A, lora_B, scaling, mask, spans, folded)
        ctx.quantized = weight if is_quantized(weight) else None  # its dense form is made again when it is needed
        ctx.save_for_backward(x, None if ctx.quantized is not None else weight, lora_A, lora_B, A, B, down, mask)
        ctx.scaling, ctx.spans, ctx.folded = scaling, spans, folded
        return y

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        x, weight, lora_A, lora_B, A, B, down, mask = ctx.saved_tensors
        weight = ctx.quantized if weight is None else weight
        flat, g = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])  # (N, in), (N, out)
        flat_mask = None if mask is None else mask.reshape(flat.shape)
        dropped = flat if flat_mask is None else flat * flat_mask
        if torch.is_grad_enabled():  # a second derivative is wanted: A, B and x Aᵀ must depend on the factors again
            A, B = lora_A.to(x.dtype), scaled(lora_B, ctx.scaling).to(x.dtype)
            down = F.linear(dropped, A)
        slices = list(_slices(ctx.spans, B.shape[1]))
        one = len(slices) == 1 and slices[0][0] == (0, g.shape[1])  # over all rows: nothing to cut
        up = g @ B if one else torch.cat([g[:, a:b] @ B[high] for (a, b), _, high in slices], dim=1)  # (N, slices · r)
        grad_x = grad_W = grad_b = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            if ctx.folded:
                grad_flat = g @ dense(weight, g.dtype)
            else:
                grad_flat = up @ A if flat_mask is None else (up @ A).mul_(flat_mask)
                grad_flat = grad_flat.addmm_(g, dense(weight, g.dtype))
            grad_x = grad_flat.view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_W = g.t() @ flat
        if ctx.needs_input_grad[2]:
            grad_b = g.sum(0)
        if ctx.needs_input_grad[3]:
            grad_A = (up.t() @ dropped).to(lora_A.dtype)
        if ctx.needs_input_grad[4]:
            pairs = [(g, down)] if one else [(g[:, a:b], down[:, low]) for (a, b), low, _ in slices]
            parts = [gradient_of_B(left, right, ctx.scaling, lora_B.dtype) for left, right in pairs]
            grad_B = parts[0] if one else torch.cat(parts)
        return grad_x, grad_W, grad_b, grad_A, grad_B, None, None, None, None
