"""Attention from a layer's projections on in one call forward and one backward, on processors with matrix tiles (AMX).

`attention.c` has the arithmetic and is built when phinetune is installed where there is a compiler. Beside `rotary.RotaryAttention`, which is
some thirty operators a layer, the scores of 32 queries never leave the cache, sums are float32 throughout, and the probabilities are not
kept for the way back. `usable` says where it serves: bfloat16 in main memory, heads of a multiple of 32 numbers, as much work as threads;
everything else goes the other way, which is the reference.

Not here: which tokens see which (`rotary.Plan`), the projections.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from phinetune.model.kernels import built_for_tiles, operator, plain, undisturbed

_WIDEST = 256
"""Numbers of a head at most (attention.c)."""


class _Attention(ctypes.Structure):
    """`Attention` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "groups", "D", "width", "entries", "shared")),
        *((name, ctypes.c_void_p) for name in ("entry", "q", "k", "v", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride", "T")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("out", "sums", "grad", "dq", "dk", "dv")),
        *((name, ctypes.c_int64) for name in ("dq_stride", "dk_stride", "dv_stride")),
    )


@functools.cache
def library() -> Any:
    """The built functions, loaded once; None where they were not built, or the processor or the system has no tiles for us."""
    return built_for_tiles(Path(__file__).with_name("_attention"), "attention_forward", "attention_backward")


def usable(states: Sequence[Tensor], cos: Tensor, sin: Tensor, heads: int, groups: int, entries: Sequence[int]) -> bool:
    """True if the functions are there and serve q (T, heads · D), k and v (T, groups · D), angles (T, width) and `entries` of T tokens."""
    q, k, v = states
    D, width = q.shape[1] // heads, cos.shape[-1]
    if q.dtype is not torch.bfloat16 or library() is None or len(entries) // 4 * groups < torch.get_num_threads():
        return False
    return (
        undisturbed() and D % 32 == 0 and 0 < D <= _WIDEST and width % 2 == 0 and width <= D and heads % groups == 0
        and sum(entries[3::4]) == len(q) == len(k) == len(v) and q.shape[1] == heads * D and k.shape[1] == v.shape[1] == groups * D
        and all(x.dtype is q.dtype and plain(x) and x.stride(-1) == 1 for x in (q, k, v, cos, sin))
        and all(x.shape == (*q.shape[:1], width) and x.is_contiguous() for x in (cos, sin))
    )  # fmt: skip


class TilesAttention(torch.autograd.Function):
    """(entries, heads, groups, scaling, cos, sin, then q, k, v, or all in one) -> (T, heads · D); see `attention_rows`."""

    @staticmethod
    def forward(ctx, entries, heads, groups, scaling, cos, sin, *states):  # type: ignore[no-untyped-def]
        q, k, v = apart(states, heads, groups)
        out, sums = attention_rows(q, k, v, cos, sin, entries, heads, groups, scaling)
        ctx.save_for_backward(cos, sin, out, sums, *states)  # what comes next keeps `out` as well
        ctx.how = (entries, heads, groups, scaling)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cos, sin, out, sums, *states = ctx.saved_tensors
        heads, groups = ctx.how[1:3]
        results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in states]
        q, k, v, dq, dk, dv = (*apart(states, heads, groups), *apart(results, heads, groups))
        attention_rows_backward(grad.contiguous(), q, k, v, cos, sin, out, sums, dq, dk, dv, *ctx.how)
        return (None,) * 6 + tuple(results)


def apart(states: Sequence[Tensor], heads: int, groups: int) -> Sequence[Tensor]:
    """q, k and v, each (T, its heads · D), from themselves or from the one tensor that holds them side by side."""
    if len(states) == 3:
        return states
    D = states[0].shape[1] // (heads + 2 * groups)
    return torch.split(states[0], [heads * D, groups * D, groups * D], dim=1)


def _forward_results(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, entries: Sequence[int], heads: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(heads, len(q), dtype=torch.float32)


@operator(
    "attention_rows(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, int[] entries, int heads, int groups, float scaling) -> (Tensor, Tensor)",
    _forward_results,
)  # fmt: skip
def attention_rows(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, entries: Sequence[int], heads: int, groups: int, scaling: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (T, heads · D), k and v (T, groups · D), rows contiguous, cos and sin (T, width) -> (T, heads · D), and what the way back needs.

    entries: four numbers each, the first token of its prefix, how many there are, its own first token, how many. A token sees the
    prefix of its entry, the entry's tokens before it, and itself; every token is in one entry, and prefixes begin with token 0. What the way back needs is
    log2 of the sum over 2^(scores · log2 e) of each head and token, (heads, T) float32.
    """
    out, sums = _forward_results(q, k, v, cos, sin, entries, heads)
    _run(library().attention_forward, _arguments(q, k, v, cos, sin, sums, entries, heads, groups, scaling), out=out)
    return out, sums


@operator(
    "attention_rows_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor out, Tensor sums, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, int[] entries, int heads, int groups, float scaling) -> ()",
    lambda *_: None,
)  # fmt: skip
def attention_rows_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, out: Tensor, sums: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    entries: Sequence[int], heads: int, groups: int, scaling: float,
) -> None:  # fmt: skip
    """Writes dL/dq, dL/dk and dL/dv, rows contiguous, for grad = dL/d(out) (T, heads · D), contiguous, and what `attention_rows` took and gave."""
    arguments = _arguments(q, k, v, cos, sin, sums, entries, heads, groups, scaling)
    arguments.dq_stride, arguments.dk_stride, arguments.dv_stride = dq.stride(0), dk.stride(0), dv.stride(0)
    _run(library().attention_backward, arguments, out=out, grad=grad, dq=dq, dk=dk, dv=dv)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, sums: Tensor, entries: Sequence[int], heads: int, groups: int, scaling: float
) -> _Attention:  # fmt: skip
    arguments = _Attention(
        heads=heads, groups=groups, D=q.shape[1] // heads, width=cos.shape[1], T=len(q), scale=scaling
    )
    arguments.entries, arguments.shared = (
        len(entries) // 4,
        max(a + n for a, n in zip(entries[::4], entries[1::4], strict=True)),
    )
    arguments.table = (ctypes.c_int64 * len(entries))(*entries)  # kept alive by the structure
    arguments.entry = ctypes.addressof(arguments.table)
    arguments.q_stride, arguments.k_stride, arguments.v_stride = q.stride(0), k.stride(0), v.stride(0)
    for name, tensor in (("q", q), ("k", k), ("v", v), ("cos", cos), ("sin", sin), ("sums", sums)):
        setattr(arguments, name, tensor.data_ptr())
    return arguments


def _run(function: Any, arguments: _Attention, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        setattr(arguments, name, tensor.data_ptr())
    if function(ctypes.addressof(arguments)):
        raise MemoryError("attention: no memory for an entry's keys")


def _seen(entries: Sequence[int]) -> int:
    """Keys that all queries see, for one head."""
    return sum(n * before + n * (n + 1) // 2 for before, n in zip(entries[1::4], entries[3::4], strict=True))


@register_flop_formula(torch.ops.phinetune.attention_rows)
def _forward_flops(
    q: Any, k: Any, v: Any, cos: Any, sin: Any, entries: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return 2 * 2 * int(q[1]) * _seen(entries)


@register_flop_formula(torch.ops.phinetune.attention_rows_backward)
def _backward_flops(
    grad: Any, q: Any, k: Any, v: Any, cos: Any, sin: Any, out: Any, sums: Any, dq: Any, dk: Any, dv: Any, entries: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:  # fmt: skip
    return 4 * 2 * int(q[1]) * _seen(entries)  # dP, dQ, dK, dV; that P is formed again is no work that had to be done
