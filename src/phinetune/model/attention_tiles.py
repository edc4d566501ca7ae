"""Attention from a layer's projections on in one call forward and one backward, on processors that multiply
bfloat16 in matrix tiles (AMX) or in vectors (AVX-512).

`attention.c` has the arithmetic and is built when phinetune is installed where there is a compiler. Beside `rotary.RotaryAttention`, which is
some thirty operators a layer, the scores of 32 queries never leave the cache, sums are float32 throughout, and the probabilities are not
kept for the way back. `usable` says where it serves: bfloat16 in main memory, heads of a multiple of 32 numbers, as much work as threads;
everything else goes the other way, which is the reference.

Not here: which tokens see which (`rotary.Plan`), the projections.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from phinetune.model.kernels import built_for_tiles, operator, plain, undisturbed

_WIDEST = 256
"""Numbers of a head at most (attention.c)."""


_ATTENTION = struct.Struct("6q6Q4qf4x6Q3q")
"""`Attention` of attention.c."""


class Heads(NamedTuple):
    """What attention.c is told besides addresses: tokens, heads, groups, numbers of a head and those of them that turn, the scores' scale, the
    strides of q, k and v, and the entries as `attention_rows` takes them."""

    T: int
    heads: int
    groups: int
    D: int
    width: int
    scaling: float
    strides: tuple[int, int, int]
    entries: tuple[int, ...]


@functools.cache
def library() -> Any:
    """The built functions, loaded once; None where they were not built, or the processor has nothing that multiplies bfloat16."""
    return built_for_tiles(Path(__file__).with_name("_attention"), "attention_forward", "attention_backward")


def usable(states: Sequence[Tensor], cos: Tensor, sin: Tensor, heads: int, groups: int, entries: Sequence[int]) -> bool:
    """True if the functions are there and serve q (T, heads · D), k and v (T, groups · D), angles (T, width) and `entries` of T tokens."""
    q, k, v = states
    D = q.shape[1] // heads
    if (
        q.dtype is not torch.bfloat16
        or library() is None
        or not serves(len(q), heads, groups, D, cos.shape[-1], tuple(entries))
    ):
        return False
    return (
        undisturbed() and len(q) == len(k) == len(v) and q.shape[1] == heads * D and k.shape[1] == v.shape[1] == groups * D
        and all(x.dtype is q.dtype and plain(x) and x.stride(-1) == 1 for x in (q, k, v, cos, sin))
        and all(x.shape == (len(q), cos.shape[-1]) and x.is_contiguous() for x in (cos, sin))
    )  # fmt: skip


def serves(T: int, heads: int, groups: int, D: int, width: int, entries: tuple[int, ...]) -> bool:
    """True for sizes that the functions can take, and enough work for all threads."""
    return len(entries) // 4 * groups >= torch.get_num_threads() and _fits(T, heads, groups, D, width, entries)


@functools.lru_cache(maxsize=256)  # asked by each layer
def _fits(T: int, heads: int, groups: int, D: int, width: int, entries: tuple[int, ...]) -> bool:
    return (
        D % 32 == 0 and 0 < D <= _WIDEST and width % 2 == 0 and width <= D and heads % groups == 0 and sum(entries[3::4]) == T
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
    attend(
        _heads(q, k, v, cos, entries, heads, groups, scaling), [t.data_ptr() for t in (q, k, v, cos, sin, out, sums)]
    )
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
    of, strides = _heads(q, k, v, cos, entries, heads, groups, scaling), (dq.stride(0), dk.stride(0), dv.stride(0))
    pointers = [t.data_ptr() for t in (q, k, v, cos, sin, out, sums, grad, dq, dk, dv)]
    attend_back(of, pointers, strides)


def attend(of: Heads, pointers: Sequence[int]) -> None:
    """As `attention_rows`, on the addresses of q, k, v, cos, sin, the result and what the way back needs."""
    _run(library().attention_forward, of, (*pointers, 0, 0, 0, 0), (0, 0, 0))


def attend_back(of: Heads, pointers: Sequence[int], strides: tuple[int, int, int]) -> None:
    """As `attention_rows_backward`, on the addresses that `attend` took and those of grad, dq, dk and dv, and the strides of the last three."""
    _run(library().attention_backward, of, pointers, strides)


def _heads(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, entries: Sequence[int], heads: int, groups: int, scaling: float
) -> Heads:
    strides = q.stride(0), k.stride(0), v.stride(0)
    return Heads(len(q), heads, groups, q.shape[1] // heads, cos.shape[1], scaling, strides, tuple(entries))


@functools.lru_cache(maxsize=256)
def _table(entries: tuple[int, ...]) -> tuple[Any, int]:
    """(the entries as C reads them; how many first tokens are prefixes)."""
    return (ctypes.c_int64 * len(entries))(*entries), max(
        a + n for a, n in zip(entries[::4], entries[1::4], strict=True)
    )


def _run(function: Any, of: Heads, pointers: Sequence[int], strides: tuple[int, int, int]) -> None:
    table, shared = _table(of.entries)
    sizes = of.heads, of.groups, of.D, of.width, len(of.entries) // 4, shared
    if function(
        _ATTENTION.pack(
            *sizes, ctypes.addressof(table), *pointers[:5], *of.strides, of.T, of.scaling, *pointers[5:], *strides
        )
    ):
        raise MemoryError("attention: no memory for an entry's keys")


def _seen(entries: Sequence[int]) -> int:
    """Keys that all queries see, for one head."""
    return sum(n * before + n * (n + 1) // 2 for before, n in zip(entries[1::4], entries[3::4], strict=True))


@register_flop_formula(torch.ops.phinetune.attention_rows)
def forward_flops(
    q: Any, k: Any, v: Any, cos: Any, sin: Any, entries: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Operations of scores and of sums of values, over the keys that each query sees."""
    return 2 * 2 * int(q[1]) * _seen(entries)


@register_flop_formula(torch.ops.phinetune.attention_rows_backward)
def backward_flops(
    grad: Any, q: Any, k: Any, v: Any, cos: Any, sin: Any, out: Any, sums: Any, dq: Any, dk: Any, dv: Any, entries: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:  # fmt: skip
    """Operations of the four products behind them."""
    return 4 * 2 * int(q[1]) * _seen(entries)  # dP, dQ, dK, dV; that P is formed again is no work that had to be done
