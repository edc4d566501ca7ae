"""LoRA layers that share their input, all their products in one call forward and one backward, on processors with matrix tiles (AMX).

`tiles.c` has the arithmetic and is built when phinetune is installed where there is a compiler. Beside the products one by one
(`functional.py`, `group.py`, which are the reference), sums stay in float32 until the end, so results are nearer to the exact ones.
`usable` says where it serves: bfloat16 in main memory, no bias, no dropout, dense weights, widths that tiles divide; everything else goes
the other way.

Not here: autograd for anything else, which layers share their input.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from phinetune.lora.frozen import is_quantized
from phinetune.lora.functional import Spans, lora_linear
from phinetune.model.kernels import built_for_tiles, operator, plain, undisturbed

_MOST = 8
"""Layers in one call at most (tiles.c)."""
_FEWEST = 32
"""Rows that x has at least: one block of tiles."""


class _Layers(ctypes.Structure):
    """`Layers` of tiles.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("M", "K", "n", "R")),
        ("X", ctypes.c_void_p),
        *((name, ctypes.c_void_p * _MOST) for name in ("W", "G", "Y", "A", "B", "dA", "dB")),
        *((name, ctypes.c_int64 * _MOST) for name in ("N", "r", "at")),
        ("D", ctypes.c_void_p),
        ("dX", ctypes.c_void_p),
        ("room", ctypes.c_void_p),
        ("s", ctypes.c_float),
        ("wide", ctypes.c_int),
    )


@functools.cache
def library() -> Any:
    """The built functions, loaded once; None where they were not built, or the processor or the system has no tiles for us."""
    found = built_for_tiles(Path(__file__).with_name("_tiles"), "lora_forward", "lora_backward", "lora_room")
    if found is not None:
        found.lora_room.argtypes, found.lora_room.restype = (ctypes.c_void_p, ctypes.c_int), ctypes.c_int64
    return found


def usable(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor]]) -> bool:
    """True if the functions are there and serve x (..., in) and layers of (W (out, in), bias, A (r, in), B (out, r))."""
    if x.dtype is not torch.bfloat16 or library() is None or len(layers) > _MOST or _rows(x.shape) < _FEWEST:
        return False
    if not undisturbed() or not plain(x):
        return False
    factors = layers[0][2].dtype
    width = x.shape[-1]
    return width > 0 and width % 32 == 0 and all(
        bias is None and not is_quantized(W) and W.dtype is x.dtype and W.is_contiguous() and W.shape[0] % 32 == 0
        and W.shape[1] == A.shape[1] == width and B.shape == (W.shape[0], A.shape[0]) and len(W) > 0
        and not W.requires_grad and A.dtype is B.dtype is factors and factors in (torch.float32, torch.bfloat16)
        and A.is_contiguous() and B.is_contiguous() and len(A) > 0 and all(plain(t) for t in (W, A, B))
        for W, bias, A, B in layers
    )  # fmt: skip


def lora_linear_tiles(
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
    """As `functional.lora_linear`, in one call each way where that can be. There it can be differentiated once only."""
    whole = mask is None and not folded and (spans is None or spans == ((0, weight.shape[0]),))
    simple = torch._C._get_tracing_state() is None and not torch.compiler.is_compiling()
    if whole and simple and usable(x, [(weight, bias, lora_A, lora_B)]):
        result: Tensor = TilesFunction.apply(x, scaling, weight, lora_A, lora_B)[0]  # type: ignore[no-untyped-call]
        return result
    return lora_linear(x, weight, bias, lora_A, lora_B, scaling, mask, spans, folded)


class TilesFunction(torch.autograd.Function):
    """(x (..., in), scaling, then W (out_i, in), A (r_i, in), B (out_i, r_i) of each layer) -> y_i (..., out_i)."""

    @staticmethod
    def forward(ctx, x, scaling, *tensors):  # type: ignore[no-untyped-def]
        x = x.contiguous()
        *results, down, _ = lora_products(x, tensors[::3], tensors[1::3], tensors[2::3], scaling)
        ctx.save_for_backward(x, down, *tensors)
        ctx.scaling = scaling
        return tuple(results)  # no views of other tensors: models may change them in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        x, down, *tensors = ctx.saved_tensors
        W, A, B = tensors[::3], tensors[1::3], tensors[2::3]
        g = [grad.contiguous() for grad in grads]
        n, of_x = len(W), ctx.needs_input_grad[0]
        *found, _ = lora_products_backward(x, down, g, W, A, B, ctx.scaling, of_x)
        factors = [t for pair in zip(found[-2 * n : -n], found[-n:], strict=True) for t in (None, *pair)]
        return found[0] if of_x else None, None, *factors


def _forward_results(x: Tensor, W: list[Tensor], A: list[Tensor], B: list[Tensor], scaling: float) -> list[Tensor]:
    rows, ranks = _filled(_rows(x.shape)), sum(_filled(len(a)) for a in A)
    return [*(x.new_empty(*x.shape[:-1], len(w)) for w in W), x.new_empty(rows, ranks), _room(x, W, A, 0)]


def _backward_results(
    x: Tensor, down: Tensor, g: list[Tensor], W: Any, A: list[Tensor], B: list[Tensor], scaling: float, of_x: bool
) -> list[Tensor]:
    return [*(torch.empty_like(t) for t in ([x, *A, *B] if of_x else [*A, *B])), _room(x, W, A, 1)]


def _room(x: Tensor, W: Sequence[Tensor], A: Sequence[Tensor], back: int) -> Tensor:
    """What tiles.c puts aside meanwhile. It comes with the results so that whoever counts memory sees it."""
    ranks = sum(_filled(len(a)) for a in A)
    return x.new_empty(_numbers_of_room(_rows(x.shape), x.shape[-1], ranks, tuple(len(w) for w in W), back))


@functools.lru_cache(maxsize=256)  # asked for at each call, of few shapes
def _numbers_of_room(M: int, K: int, R: int, N: tuple[int, ...], back: int) -> int:
    layers = _Layers(M=M, K=K, n=len(N), R=R)
    layers.N[: len(N)] = N
    numbers: int = library().lora_room(ctypes.addressof(layers), back)
    return numbers


@operator("lora_products(Tensor x, Tensor[] W, Tensor[] A, Tensor[] B, float scaling) -> Tensor[]", _forward_results)
def lora_products(
    x: Tensor, W: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], scaling: float
) -> list[Tensor]:
    """x (..., in), contiguous -> y_i (..., out_i) = x W_iᵀ + s (x A_iᵀ) B_iᵀ of each layer, what the way back needs, and the room used.

    The way back needs x Aᵀ of all layers, rows and ranks filled up to multiples of 32, in the order of tiles.c.
    """
    *Y, down, room = _forward_results(x, list(W), list(A), list(B), scaling)
    layers = _layers(x, down, room, W, A, B, scaling)
    for i, y in enumerate(Y):
        layers.Y[i] = y.data_ptr()
    _run(library().lora_forward, layers)
    return [*Y, down, room]


@operator(
    "lora_products_backward(Tensor x, Tensor down, Tensor[] g, Tensor[] W, Tensor[] A, Tensor[] B, float scaling, bool of_x) -> Tensor[]",
    _backward_results,
)  # fmt: skip
def lora_products_backward(
    x: Tensor, down: Tensor, g: Sequence[Tensor], W: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], scaling: float, of_x: bool
) -> list[Tensor]:  # fmt: skip
    """dL/dx (..., in), if `of_x`, then dL/dA_i of each layer, then dL/dB_i, then the room used, for g_i = dL/dy_i (..., out_i), contiguous."""
    *found, room = _backward_results(x, down, list(g), W, list(A), list(B), scaling, of_x)
    layers, n = _layers(x, down, room, W, A, B, scaling), len(W)
    layers.dX = found[0].data_ptr() if of_x else None
    for i in range(n):
        layers.G[i], layers.dA[i], layers.dB[i] = (t.data_ptr() for t in (g[i], found[i - 2 * n], found[i - n]))
    _run(library().lora_backward, layers)
    return [*found, room]


@register_flop_formula(torch.ops.phinetune.lora_products)
def _forward_flops(x: Any, W: Any, A: Any, B: Any, scaling: float, *, out_shape: Any = None, **_: Any) -> int:
    one_row = sum(int(w[0] * w[1] + a[0] * (w[0] + w[1])) for w, a in zip(W, A, strict=True))
    return 2 * _rows(x) * one_row


@register_flop_formula(torch.ops.phinetune.lora_products_backward)
def _backward_flops(
    x: Any, down: Any, g: Any, W: Any, A: Any, B: Any, scaling: float, of_x: bool, *, out_shape: Any = None, **_: Any
) -> int:
    def one(w: Any, a: Any) -> int:  # U and dB; dA; and dx, where it is wanted
        return int(2 * a[0] * w[0] + a[0] * w[1] + of_x * w[1] * (w[0] + a[0]))

    return 2 * _rows(x) * sum(one(w, a) for w, a in zip(W, A, strict=True))


def _layers(
    x: Tensor, down: Tensor, room: Tensor, W: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], scaling: float
) -> _Layers:  # fmt: skip
    M, K, at = _rows(x.shape), x.shape[-1], 0
    layers = _Layers(M=M, K=K, n=len(W), R=down.shape[1], X=x.data_ptr(), D=down.data_ptr(), s=scaling)
    layers.room = room.data_ptr()
    layers.wide = A[0].dtype is torch.float32
    for i, (w, a, b) in enumerate(zip(W, A, B, strict=True)):
        layers.W[i], layers.A[i], layers.B[i] = w.data_ptr(), a.data_ptr(), b.data_ptr()
        layers.N[i], layers.r[i], layers.at[i] = len(w), len(a), at
        at += _filled(len(a))
    return layers


def _run(function: Any, layers: _Layers) -> None:
    if function(ctypes.addressof(layers)):
        raise MemoryError("LoRA products: no memory for a panel of the weights")


def _rows(shape: Sequence[int]) -> int:
    rows: int = math.prod(shape[:-1])
    return rows


def _filled(count: int) -> int:
    return -(-count // 32) * 32
