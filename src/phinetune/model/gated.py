"""The gated activation of an MLP in one autograd function, where the compiled kernels are.

    y = silu(gate) ⊙ up,    silu(z) = z σ(z)          (Shazeer 2020, "GLU Variants Improve Transformer", equation 6)

As operators of torch it keeps gate, silu(gate) and up for the backward pass and walks over memory seven times in all; the function keeps
gate and up, which the projections have made anyway, and walks twice. With σ = σ(gate) and g = dL/dy:

    dgate = g ⊙ up ⊙ σ ⊙ (1 + gate ⊙ (1 - σ))        dup = g ⊙ silu(gate)

`forward` stands in the place of an MLP's own for the architectures that are Llama's (projections separate or fused); `fast.py` tries it on
the model first. Not here: other activations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phinetune.model import kernels


def silu_gate_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition: (..., h) each -> (..., h)."""
    return F.silu(gate) * up


class SiluGate(torch.autograd.Function):
    """gate and up, (..., h) each, or both side by side in one tensor, (..., 2 h) -> (..., h)."""

    @staticmethod
    def forward(ctx, *both):  # type: ignore[no-untyped-def]
        rows = [x.reshape(-1, x.shape[-1]) for x in both]
        gate, up = rows if len(rows) == 2 else rows[0].chunk(2, dim=1)
        ctx.save_for_backward(gate, up)
        ctx.fused = len(both) == 1
        return kernels.silu_gate(gate, up).view(*both[0].shape[:-1], gate.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        flat, shape = grad.reshape(gate.shape).contiguous(), grad.shape[:-1]
        if ctx.fused:
            both = grad.new_empty(len(gate), 2 * gate.shape[1])
            kernels.silu_gate_backward(flat, gate, up, *both.chunk(2, dim=1))
            return both.view(*shape, -1)
        of_gate, of_up = torch.empty_like(flat), torch.empty_like(flat)
        kernels.silu_gate_backward(flat, gate, up, of_gate, of_up)
        return of_gate.view(grad.shape), of_up.view(grad.shape)


def silu_gate(*both: Tensor) -> Tensor:
    """silu(gate) ⊙ up for gate and up, (..., h) each, or one tensor that holds them side by side, (..., 2 h) -> (..., h)."""
    if kernels.usable(*both) and all(x.stride(-1) == 1 for x in both):
        result: Tensor = SiluGate.apply(*both)  # type: ignore[no-untyped-call]
        return result
    gate, up = both if len(both) == 2 else both[0].chunk(2, dim=-1)
    return silu_gate_reference(gate, up)


def could_be_gated(module: Any) -> bool:
    """True if `module` looks like an MLP that `forward` computes; whether it is one, only trying tells."""
    fused, apart = hasattr(module, "gate_up_proj"), hasattr(module, "gate_proj") and hasattr(module, "up_proj")
    act = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    named = type(module).__name__.endswith("MLP") and hasattr(module, "down_proj")
    return bool(named and (fused or apart) and act is not None and "silu" in type(act).__name__.lower())


def forward(module: Any, x: Tensor) -> Tensor:
    """What an MLP of Llama's kind computes: x (..., hidden) -> (..., hidden)."""
    names = ("gate_up_proj",) if hasattr(module, "gate_up_proj") else ("gate_proj", "up_proj")
    result: Tensor = module.down_proj(silu_gate(*(getattr(module, name)(x) for name in names)))
    return result
