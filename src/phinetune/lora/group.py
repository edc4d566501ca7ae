"""LoRA layers that share their input, such as the projections to query, key and value: one autograd function for all of them.

Each alone multiplies x with factors of r columns, a product too slim to be fast, forms a gradient of x, and leaves it to autograd to add
these up. Together (A stacked: one product x Aᵀ of all ranks, one Aᵀ-gradient, one sum)

    y_i = x W_iᵀ + b_i + (x Aᵀ)_i (s B_i)ᵀ        dx = Σ g_i W_i + U A        dA = Uᵀ x        dB_i = s · g_iᵀ (x Aᵀ)_i        U_i = g_i (s B_i)

The model keeps calling its layers one by one: the first one called with x computes for all, the others, given the very same tensor,
take what is theirs. Given another tensor, a layer computes for itself: nothing depends on the order or on being called at all.

Not here: the single layer (`functional.py`), finding layers for anything but the common names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from phinetune.lora import tiles
from phinetune.lora.frozen import dense, is_quantized
from phinetune.lora.functional import gradient_of_B, lora_linear_reference, product_into, scaled
from phinetune.lora.fused import PARTS
from phinetune.lora.linear import Linear, frozen_or_folded

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
        Bs = [scaled(b, scaling).to(x.dtype) for *_, b in parts]
        down = flat @ A.t()  # (N, R)
        results, start = [], 0
        for (weight, bias, _, _), B in zip(parts, Bs, strict=True):
            y = x.new_empty(*x.shape[:-1], len(B))
            rows, W = y.view(-1, len(B)), dense(weight, x.dtype)
            if folded:
                product_into(flat, W, bias, rows)
            else:  # first the slim product: the other one adds to what is there as it writes
                product_into(down[:, start : start + B.shape[1]], B, bias, rows)
                rows.addmm_(flat, W.t())
            results.append(y)
            start += B.shape[1]
        ctx.weights = [weight for weight, *_ in parts if is_quantized(weight)]
        plain = [weight for weight, *_ in parts] if not ctx.weights else []
        ctx.save_for_backward(flat, down, A, *Bs, *plain)
        ctx.scaling, ctx.folded, ctx.shape = scaling, folded, x.shape
        ctx.dtypes = [(a.dtype, b.dtype) for _, _, a, b in parts]
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        n = len(ctx.dtypes)
        flat, down, A, *rest = ctx.saved_tensors
        Bs, weights = rest[:n], ctx.weights or rest[n:]
        g = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        U = flat.new_zeros(len(flat), len(A)) if any(one is None for one in g) else flat.new_empty(len(flat), len(A))
        columns, start = [], 0
        for one, B in zip(g, Bs, strict=True):
            columns.append(slice(start, start + B.shape[1]))
            start += B.shape[1]
            if one is not None:
                torch.mm(one, B, out=U[:, columns[-1]])
        grad_x = U @ A if ctx.needs_input_grad[0] and not ctx.folded else None
        grad_A = U.t() @ flat if any(ctx.needs_input_grad[5::4]) else None
        result: list[Any] = []
        for i, (one, (a_dtype, b_dtype)) in enumerate(zip(g, ctx.dtypes, strict=True)):
            if one is None:
                result += [None] * 4
                continue
            if ctx.needs_input_grad[0]:
                W = dense(weights[i], one.dtype)
                grad_x = one @ W if grad_x is None else grad_x.addmm_(one, W)
            needs = ctx.needs_input_grad[3 + 4 * i : 7 + 4 * i]
            result += [one.t() @ flat if needs[0] else None, one.sum(0) if needs[1] else None]
            result.append(grad_A[columns[i]].to(a_dtype) if grad_A is not None and needs[2] else None)
            result.append(gradient_of_B(one, down[:, columns[i]], ctx.scaling, b_dtype) if needs[3] else None)
        return (None if grad_x is None else grad_x.view(ctx.shape)), None, None, *result


class SharedInput:
    """Layers of one parent that are called with the same tensor. `take(layer, x)` gives the layer's output for x."""

    def __init__(self, layers: list[Linear], by_tiles: bool = False) -> None:
        self.layers, self.by_tiles = layers, by_tiles
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def take(self, layer: Linear, x: Tensor) -> Tensor | None:
        """The output of `layer` for x, computed with those of the others; None if the layer must compute for itself."""
        if self._input is x and id(layer) in self._ready:
            y = self._ready.pop(id(layer))
            if not self._ready:
                self._input = None  # nothing is kept alive longer than the model would
            return y
        if layer is not self.layers[0] or not ordinary(x) or not all(plain_layer(one) for one in self.layers):
            return None
        weights, folded = zip(*(frozen_or_folded(one) for one in self.layers), strict=True)
        if len(set(folded)) > 1 or len({one.scaling for one in self.layers}) > 1:
            return None
        parts = [(w, one.bias, one.lora_A, one.lora_B) for w, one in zip(weights, self.layers, strict=True)]
        if self.by_tiles and not folded[0] and tiles.usable(x, parts):
            operands = [t for weight, _, A, B in parts for t in (weight, A, B)]
            results = tiles.TilesFunction.apply(x, layer.scaling, *operands)  # type: ignore[no-untyped-call]
        else:
            operands = [t for part in parts for t in part]
            results = SharedInputFunction.apply(x, layer.scaling, folded[0], *operands)  # type: ignore[no-untyped-call]
        self._ready = {id(one): y for one, y in zip(self.layers[1:], results[1:], strict=True)}
        self._input = x
        first: Tensor = results[0]
        return first


def ordinary(x: Tensor) -> bool:
    """True outside autocast, tracing and the transforms of functorch, which the single layer knows how to serve."""
    tracing = torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active()
    return not (tracing or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling())


def plain_layer(layer: Linear) -> bool:
    """True while the layer computes nothing but y = x Wᵀ + b + s x Aᵀ Bᵀ."""
    own = vars(layer)  # asked at each call of each layer, and torch's way to a module's attributes is slow
    return not (
        own["merged"] or own["_parameters"]["lora_magnitude_vector"] is not None or own["_buffers"]["lora_A_start"] is not None
        or (type(own["_modules"]["lora_dropout"]) is not nn.Identity and layer.drops)
    )  # fmt: skip


def share_inputs(model: nn.Module, by_tiles: bool = False) -> int:
    """Join LoRA layers of the common names that sit side by side in `model`; the number of groups. `by_tiles`: see `tiles.py`."""
    count = 0
    for parent in model.modules():
        for names in _TOGETHER:
            found = [getattr(parent, name, None) for name in names]
            layers: list[Any] = [m for m in found if type(m) is Linear and m.r > 0 and not m.fan_in_fan_out]
            quantized = {is_quantized(m.weight) for m in layers}
            if len(layers) < 2 or len({m.in_features for m in layers}) > 1 or len(quantized) > 1:
                continue
            group = SharedInput(layers, by_tiles)
            for layer in layers:
                layer.__dict__["shared"] = group  # not a child of the layer
            count += 1
    return count
