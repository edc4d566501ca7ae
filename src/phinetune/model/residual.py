"""A decoder layer's residual sums in the functions beside them, where the compiled kernels are.

    s = x + a        y = norm(s)            what a layer computes of its input x and its attention's output a, before the MLP

A model forms the sum, then normalizes it, and its gradient is the sum of two as well, of which autograd forms each by itself and adds them up.
In one function the sum is normalized while it is at hand, and with g = dL/dy and t = dL/ds of the way around

    dL/dx = dL/da = t + norm'(g)                       (`norm.py` has norm')

is written once, rounded once. The first normalization, of x alone, is the same without a: its function hands x on, for the way around.

`forward` stands in the place of a decoder layer's own for the architectures that are Llama's; `fast.py` tries it on the model first.
Not here: attention, the MLP, the layer's last sum, which no normalization of its own follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.model import kernels
from phinetune.model.norm import RMSNorm


class SumAndNorm(torch.autograd.Function):
    """(x (..., h), a (..., h) or None, weight (h), eps) -> (x + a (..., h), its normalization (..., h))."""

    @staticmethod
    def forward(ctx, x, added, weight, eps):  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if added is None:
            total, (y, inverse) = rows, kernels.rms_norm(rows, weight, eps)
        else:
            total, y, inverse = kernels.add_rms_norm(rows, added.reshape(rows.shape).contiguous(), weight, eps)
        ctx.save_for_backward(total, weight, inverse)
        ctx.set_materialize_grads(False)
        return x if added is None else total.view(x.shape), y.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, around, grad):  # type: ignore[no-untyped-def]
        total, weight, inverse = ctx.saved_tensors
        found = around
        if grad is not None:
            also = None if around is None else around.reshape(total.shape).contiguous()
            g = grad.reshape(total.shape).contiguous()
            found = kernels.rms_norm_backward(g, total, weight, inverse, also).view(grad.shape)
        wanted = ctx.needs_input_grad
        return found if wanted[0] else None, found if wanted[1] else None, None, None


def sum_and_norm(norm: nn.Module, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x + added, or x itself, and what `norm` makes of it); in one function where `joins` says so."""
    if isinstance(norm, RMSNorm) and joins(norm, x, added):
        result: tuple[Tensor, Tensor] = SumAndNorm.apply(x, added, norm.weight, norm.eps)  # type: ignore[no-untyped-call]
        return result
    total = x if added is None else x + added
    return total, norm(total)


def joins(norm: RMSNorm, x: Tensor, added: Tensor | None) -> bool:
    """True if the kernels serve: the normalization is ours and by them, its weight is frozen, nobody listens at it."""
    watched = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    return bool(
        norm.built and not watched and not norm.weight.requires_grad and x.shape[-1] <= kernels.WIDEST
        and kernels.usable(x, norm.weight, added) and (added is None or added.shape == x.shape)
    )  # fmt: skip


def could_be_decoder(module: Any) -> bool:
    """True if `module` looks like a decoder layer that `forward` computes; whether it is one, only trying tells.

    Dropout on the way of the residual sums would show only while training.
    """
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    dropped = any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.children())
    return (
        type(module).__name__.endswith("DecoderLayer") and not dropped and all(hasattr(module, part) for part in parts)
    )


def forward(
    module: Any, hidden_states: Tensor, *args: Any, compute: Callable[..., Tensor] | None = None, **kwargs: Any
) -> Tensor:
    """What a decoder layer of Llama's kind computes: (B, T, hidden) -> (B, T, hidden). The arguments are its attention's.

    Given by place, or with a cache, they are left to `type(module).forward`, its own. `compute`: what stands for `layer`. A layer that
    transformers has been told to checkpoint is checkpointed: it does so around a layer's own forward, which is not called here.
    """
    checkpointed = module.training and getattr(module, "gradient_checkpointing", False)
    if args or (checkpointed and (kwargs.get("use_cache") or kwargs.get("past_key_values") is not None)):
        own: Tensor = type(module).forward(module, hidden_states, *args, **kwargs)
        return own
    whole = functools.partial(compute or layer, module, **kwargs)
    if checkpointed and _wraps_forward():
        again: Tensor = module._gradient_checkpointing_func(whole, hidden_states)
        return again
    return whole(hidden_states)


def layer(module: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The layer itself, by its parts."""
    x, y = sum_and_norm(module.input_layernorm, hidden_states, None)
    attended, _ = module.self_attn(hidden_states=y, **kwargs)
    x, y = sum_and_norm(module.post_attention_layernorm, x, attended)
    result: Tensor = x + module.mlp(y)
    return result


@functools.cache
def _wraps_forward() -> bool:
    """True for versions of transformers that checkpoint around `forward`; those before did so around `__call__`, which stays the layer's own."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" not in vars(GradientCheckpointingLayer)
