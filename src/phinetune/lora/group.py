"""LoRA layers that share their input, such as the projections to query, key and value: one autograd function for all of them.

Each alone multiplies x with factors of r columns, a product too slim to be fast, forms a gradient of x, and leaves it to autograd to add
these up. Together (A stacked, B block-diagonal, y and g side by side in one tensor each) all ranks are one product:

    y = x Wᵀ + b + (x Aᵀ) (s B)ᵀ        dx = Σ g_i W_i + U A        dA = Uᵀ x        dB = s · gᵀ (x Aᵀ), its blocks        U = g (s B)

What is multiplied with B's zeros costs nothing: processors multiply at least 32 columns at a time, and a call costs as much as they do.

The model keeps calling its layers one by one: the first one called with x computes for all, the others, given the very same tensor,
take what is theirs. Given another tensor, a layer computes for itself: nothing depends on the order or on being called at all.

Not here: the single layer (`functional.py`), finding layers for anything but the common names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from phinetune.lora.frozen import dense, is_quantized
from phinetune.lora.functional import lora_linear_reference, product_into
from phinetune.lora.fused import PARTS
from phinetune.lora.layer import LoRALayer
from phinetune.lora.linear import Linear, frozen_or_folded
from phinetune.model.fast import FastPaths

_TOGETHER = (*dict.fromkeys(PARTS.values()), ("query", "key", "value"), ("w1", "w3"))


def shared_linears_reference(x: Tensor, layers: list[Linear]) -> list[Tensor]:
    """The definition: each layer by itself. What `SharedInputFunction` must equal."""
    return [
        lora_linear_reference(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)
        for layer in layers
    ]


class SharedInputFunction(torch.autograd.Function):
    """(x (..., in), scaling, folded, then W (out_i, in), b (out_i) | None, A (r_i, in), B (out_i, r_i) of each) -> y_i (..., out_i)."""

    @staticmethod
    def forward(ctx, x, scaling, folded, *tensors):  # type: ignore[no-untyped-def]
        parts = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
        flat = x.reshape(-1, x.shape[-1])  # (N, in)
        A = torch.cat([a for _, _, a, _ in parts]).to(x.dtype)  # (R, in), R the sum of ranks
        B = _block_diagonal([b for *_, b in parts], A, scaling)  # s · B, (sum of out_i, R)
        down = flat @ A.t()  # (N, R)
        y, start = flat.new_empty(len(flat), len(B)), 0
        results = []
        if not folded:
            product_into(down, B, _joined([(bias, len(b)) for _, bias, _, b in parts], flat), y)
            # the slim product comes first: the others add to what is there as they write
        for weight, bias, _, b in parts:
            own = y[:, start : start + len(b)]
            if folded:
                product_into(flat, dense(weight, x.dtype), bias, own)
            else:
                own.addmm_(flat, dense(weight, x.dtype).t())
            results.append(own.view(*x.shape[:-1], len(b)).data)  # no view: models may change it in place
            start += len(b)
        ctx.weights = [weight for weight, *_ in parts if is_quantized(weight)]
        plain = [weight for weight, *_ in parts] if not ctx.weights else []
        ctx.save_for_backward(flat, down, A, B, *plain)
        ctx.scaling, ctx.folded, ctx.shape = scaling, folded, x.shape
        ctx.sizes = [(b.shape, a.dtype, b.dtype) for _, _, a, b in parts]
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        flat, down, A, B, *weights = ctx.saved_tensors
        weights = ctx.weights or weights
        widths = [out for (out, _), *_ in ctx.sizes]
        pairs = zip(grads, widths, strict=True)
        g = _side_by_side([flat.new_zeros(len(flat), n) if d is None else d.reshape(-1, n) for d, n in pairs], widths)
        U = g @ B  # s · g B, (N, R)
        grad_x = U @ A if ctx.needs_input_grad[0] and not ctx.folded else None
        high = low = 0
        if any(ctx.needs_input_grad[5::4]):
            grad_A = U.t() @ flat
        if any(ctx.needs_input_grad[6::4]):
            grad_B = g.t() @ down  # (sum of out_i, R); what is not on its diagonal of blocks is not wanted
        result: list[Any] = []
        for i, ((out, rank), a_dtype, b_dtype) in enumerate(ctx.sizes):
            rows, columns = slice(high, high + out), slice(low, low + rank)
            high, low, one = high + out, low + rank, g[:, rows]
            if grads[i] is None:
                result += [None] * 4
                continue
            if ctx.needs_input_grad[0]:
                W = dense(weights[i], one.dtype)
                grad_x = one @ W if grad_x is None else grad_x.addmm_(one, W)
            needs = ctx.needs_input_grad[3 + 4 * i : 7 + 4 * i]
            result += [one.t() @ flat if needs[0] else None, one.sum(0) if needs[1] else None]
            result.append(grad_A[columns].to(a_dtype) if needs[2] else None)
            result.append(grad_B[rows, columns].to(b_dtype).mul_(ctx.scaling) if needs[3] else None)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, *result


def _joined(biases: list[tuple[Tensor | None, int]], like: Tensor) -> Tensor | None:
    """The layers' biases, of given lengths, one after another, zeros for one that is missing; None if all are."""
    if all(bias is None for bias, _ in biases):
        return None
    return torch.cat([like.new_zeros(n) if bias is None else bias for bias, n in biases])


def _block_diagonal(blocks: list[Tensor], like: Tensor, scaling: float) -> Tensor:
    """The blocks, scaled, on the diagonal of a matrix of zeros, in the dtype of `like`."""
    whole = like.new_zeros(sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks))
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block if scaling == 1 else block * scaling
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _side_by_side(grads: list[Tensor], widths: list[int]) -> Tensor:
    """(N, sum of widths): the gradients, (N, width) each, in one tensor; nothing is copied where they lie in one already."""
    first, whole, at = grads[0], sum(widths), grads[0].storage_offset()
    for grad, width in zip(grads, widths, strict=True):
        if grad.stride() != (whole, 1) or grad.storage_offset() != at or not _share_memory(grad, first):
            return torch.cat(grads, dim=1)
        at += width
    return first.as_strided((len(first), whole), (whole, 1))


class SharedInput:
    """Layers of one parent that are called with the same tensor. `take(layer, x)` gives the layer's output for x."""

    def __init__(self, layers: list[Linear]) -> None:
        self.layers = layers
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def take(self, layer: Linear, x: Tensor) -> Tensor | None:
        """The output of `layer` for x, computed with those of the others; None if the layer must compute for itself."""
        if self._input is x and id(layer) in self._ready:
            y = self._ready.pop(id(layer))
            if not self._ready:
                self._input = None  # nothing is kept alive longer than the model would
            return y
        if layer is not self.layers[0] or not _ordinary(x) or not all(_plain(one) for one in self.layers):
            return None
        weights, folded = zip(*(frozen_or_folded(one) for one in self.layers), strict=True)
        if len(set(folded)) > 1 or len({one.scaling for one in self.layers}) > 1:
            return None
        pairs = zip(weights, self.layers, strict=True)
        operands = [t for weight, one in pairs for t in (weight, one.bias, one.lora_A, one.lora_B)]
        results = SharedInputFunction.apply(x, layer.scaling, folded[0], *operands)  # type: ignore[no-untyped-call]
        self._ready = {id(one): y for one, y in zip(self.layers[1:], results[1:], strict=True)}
        self._input = x
        first: Tensor = results[0]
        return first


def _ordinary(x: Tensor) -> bool:
    """True outside autocast, tracing and the transforms of functorch, which the single layer knows how to serve."""
    tracing = torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active()
    return not (tracing or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling())


def _plain(layer: Linear) -> bool:
    """True while the layer computes nothing but y = x Wᵀ + b + s x Aᵀ Bᵀ."""
    return not (
        layer.merged or layer.drops or layer.lora_magnitude_vector is not None or layer.lora_A_start is not None
    )


def share_inputs(model: nn.Module) -> int:
    """Join LoRA layers of the common names that sit side by side in `model`; the number of groups."""
    count = 0
    for parent in model.modules():
        for names in _TOGETHER:
            found = [getattr(parent, name, None) for name in names]
            layers: list[Any] = [m for m in found if type(m) is Linear and m.r > 0 and not m.fan_in_fan_out]
            quantized = {is_quantized(m.weight) for m in layers}
            if len(layers) < 2 or len({m.in_features for m in layers}) > 1 or len(quantized) > 1:
                continue
            group = SharedInput(layers)
            for layer in layers:
                layer.__dict__["shared"] = group  # not a child of the layer
            count += 1
    return count


def choose_arithmetic(model: nn.Module, paths: FastPaths) -> None:
    """Set which way the LoRA layers in `model` compute, by the switches `linear` and `grouped`."""
    for module in model.modules():
        module.__dict__.pop("shared", None)
        if isinstance(module, LoRALayer):
            module.__dict__.pop("arithmetic", None)
            if not paths.linear:
                module.__dict__["arithmetic"] = lora_linear_reference
    if paths.linear and paths.grouped and not paths.compiled:  # compiled layers must be alike, and hold no state
        share_inputs(model)
