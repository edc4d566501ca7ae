"""LoRA layers that share their input, all their products in one call forward and one backward, on processors that multiply
bfloat16 in matrix tiles (AMX) or in vectors (AVX-512).

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
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from phinetune.lora.frozen import is_quantized
from phinetune.lora.functional import Spans, lora_linear
from phinetune.model.kernels import TILES, WITH_NUMBERS, built_for_tiles, operator, plain, undisturbed

_MOST = 8
"""Layers in one call at most (tiles.c)."""
FEWEST = 32
"""Rows that x has at least: one block of tiles."""


_SAME, _OF_CALL = struct.Struct(f"3q{4 * _MOST}Q{3 * _MOST}qfi"), struct.Struct(f"q{1 + 4 * _MOST + 8}Q2q")
"""`Layers` of tiles.c: what stays the same from call to call, and the rest."""


class Operands(NamedTuple):
    """Layers that share their input, as tiles.c is told of them: the part of `Layers` that stays the same, forward and backward."""

    forward: bytes
    back: bytes


@functools.cache
def library() -> Any:
    """The built functions, loaded once; None where they were not built, or the processor has nothing that multiplies bfloat16."""
    found = built_for_tiles(
        Path(__file__).with_name("_tiles"), "lora_forward", "lora_backward", "lora_room", "lora_pack"
    )
    if found is not None:
        found.lora_room.argtypes, found.lora_room.restype = (ctypes.c_void_p, ctypes.c_int), ctypes.c_int64
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        found.lora_pack.argtypes, found.lora_pack.restype = (pointer, number, number, pointer, pointer), None
    return found


def packing_pays() -> bool:
    """True where copies of frozen weights in the products' layout are worth their memory: tiles multiply faster than weights can be brought into
    it; vectors do not, and win 3 % by them."""
    return library() is not None and library().tiles_use(-1) == TILES


def usable(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor]]) -> bool:
    """True if the functions are there and serve x (..., in) and layers of (W (out, in), bias, A (r, in), B (out, r))."""
    if x.dtype is not torch.bfloat16 or library() is None or len(layers) > _MOST or _rows(x.shape) < FEWEST:
        return False
    return undisturbed() and plain(x) and fit(x.shape[-1], layers)


def fit(width: int, layers: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor]]) -> bool:
    """True if the functions serve layers of (W (out, in), bias, A (r, in), B (out, r)) for an x (..., in) in bfloat16 with in = `width`."""
    factors = layers[0][2].dtype
    return width > 0 and all(
        bias is None and takes(W) and W.shape[1] == A.shape[1] == width and B.shape == (W.shape[0], A.shape[0]) and len(W) > 0
        and not W.requires_grad and A.dtype is B.dtype is factors and factors in (torch.float32, torch.bfloat16)
        and A.is_contiguous() and B.is_contiguous() and len(A) > 0 and all(plain(t) for t in (W, A, B))
        for W, bias, A, B in layers
    )  # fmt: skip


def takes(W: Tensor) -> bool:
    """True for a weight that tiles read: dense, bfloat16, contiguous, both its sides multiples of 32."""
    return (
        not is_quantized(W) and W.dtype is torch.bfloat16 and W.is_contiguous()
        and W.shape[0] % 32 == W.shape[1] % 32 == 0
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
    rows, ranks = filled(_rows(x.shape)), sum(filled(len(a)) for a in A)
    return [*(x.new_empty(*x.shape[:-1], len(w)) for w in W), x.new_empty(rows, ranks), _room(x, W, A, False)]


def _backward_results(
    x: Tensor, down: Tensor, g: list[Tensor], W: Any, A: list[Tensor], B: list[Tensor], scaling: float, of_x: bool
) -> list[Tensor]:
    return [*(torch.empty_like(t) for t in ([x, *A, *B] if of_x else [*A, *B])), _room(x, W, A, True)]


def _room(x: Tensor, W: Sequence[Tensor], A: Sequence[Tensor], back: bool) -> Tensor:
    """What tiles.c puts aside meanwhile. It comes with the results so that whoever counts memory sees it."""
    ranks = sum(filled(len(a)) for a in A)
    return x.new_empty(numbers_of_room(_rows(x.shape), x.shape[-1], ranks, tuple(len(w) for w in W), back))


@functools.lru_cache(maxsize=256)  # asked for at each call, of few shapes
def numbers_of_room(M: int, K: int, R: int, N: tuple[int, ...], back: bool) -> int:
    """bfloat16 numbers that tiles.c puts aside for M rows of K, layers N wide and R ranks in all, filled up."""
    layers = operands_at(K, N, (R, *(0,) * (len(N) - 1)), (), (), (), 0.0, False).forward + _of_call(M)
    numbers: int = library().lora_room(layers, back)
    return numbers


def _of_call(
    M: int, X: int = 0, G: Sequence[int] = (), Y: Sequence[int] = (), dA: Sequence[int] = (), dB: Sequence[int] = (),
    D: int = 0, dX: int = 0, room: int = 0, also: int = 0, inner: int = 0, gate: int = 0, up: int = 0, both: int = 0, stride: int = 0,
    blocked: int = 0,
) -> bytes:  # fmt: skip
    addresses = X, *_padded(G), *_padded(Y), *_padded(dA), *_padded(dB), D, dX, room, also, inner, gate, up, both
    return _OF_CALL.pack(M, *addresses, stride, blocked)


def _padded(values: Sequence[int]) -> tuple[int, ...]:
    return (*values, *_NONE[len(values) :])


_NONE = (0,) * _MOST


def operands_at(
    K: int, N: Sequence[int], ranks: Sequence[int], W: Sequence[int], A: Sequence[int], B: Sequence[int], scaling: float, wide: bool,
    packed: Sequence[tuple[int, int]] = (),
) -> Operands:  # fmt: skip
    """Of layers that share an input of K columns: their widths, ranks, the addresses of their tensors. wide: factors are float32. packed: where
    the copies lie that `pack` made of each W; without, W is packed on the way."""
    at = [sum(map(filled, ranks[:i])) for i in range(len(ranks))]

    def one_way(copies: Sequence[int]) -> bytes:
        pointers = (*_padded(W), *_padded(copies), *_padded(A), *_padded(B))
        R = sum(map(filled, ranks))
        return _SAME.pack(K, len(N), R, *pointers, *_padded(N), *_padded(ranks), *_padded(at), scaling, wide)

    return Operands(one_way([forward for forward, _ in packed]), one_way([back for _, back in packed]))


def operands(W: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], scaling: float) -> Operands:
    """The same of tensors, as `usable` looks at them."""
    of_W, of_A, of_B = ([t.data_ptr() for t in tensors] for tensors in (W, A, B))
    N, ranks = [len(w) for w in W], [len(a) for a in A]
    return operands_at(W[0].shape[1], N, ranks, of_W, of_A, of_B, scaling, A[0].dtype is torch.float32)


def pack(W: Tensor) -> Tensor:
    """W (out, in) twice: (2, out, in) in the layouts in which tiles want it forward and backward. Raises ValueError for one that `takes` refuses."""
    if not takes(W):
        raise ValueError(f"tiles do not take a weight of shape {tuple(W.shape)} in {W.dtype}")
    packed = W.new_empty(2, *W.shape)
    if W.device.type == "cpu" and type(W) in WITH_NUMBERS:
        library().lora_pack(W.data_ptr(), *W.shape, packed[0].data_ptr(), packed[1].data_ptr())
    return packed


X_BLOCKED, G_BLOCKED = 1, 2
"""X, or all G side by side in `room`, lie in blocks of 32 rows by 32 columns, the last rows filled up with zeros."""


def multiply(
    M: int, X: int, of: Operands, Y: Sequence[int], D: int, room: int, also: int = 0, inner: int = 0, blocked: int = 0
) -> None:
    """Y_i (M, out_i) = X W_iᵀ + s D_i B_iᵀ, and D, (M and ranks filled up), at these addresses; X (M, in), rows contiguous.

    also: of one layer, (M, out), is added to Y. inner: where silu(gate) · up goes, blocked, if Y are gate and up, or one of both side by side.
    """
    _run(
        library().lora_forward,
        of.forward + _of_call(M, X, (), Y, D=D, room=room, also=also, inner=inner, blocked=blocked),
    )


def multiply_back(
    M: int, X: int, of: Operands, D: int, G: Sequence[int], dX: int, dA: Sequence[int], dB: Sequence[int], room: int, blocked: int = 0,
    gate: int = 0, up: int = 0, both: int = 0, stride: int = 0,
) -> None:  # fmt: skip
    """dX (M, in), if its address is not 0, dA_i and dB_i, for G_i (M, out_i) and what `multiply` took and gave.

    both: where X is `inner`, the gradients of gate and up, rows `stride` numbers apart, are put there instead of dX, as G_BLOCKED wants them.
    """
    of_call = _of_call(M, X, G, (), dA, dB, D, dX, room, 0, 0, gate, up, both, stride, blocked)
    _run(library().lora_backward, of.back + of_call)


@operator("lora_products(Tensor x, Tensor[] W, Tensor[] A, Tensor[] B, float scaling) -> Tensor[]", _forward_results)
def lora_products(
    x: Tensor, W: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor], scaling: float
) -> list[Tensor]:
    """x (..., in), contiguous -> y_i (..., out_i) = x W_iᵀ + s (x A_iᵀ) B_iᵀ of each layer, what the way back needs, and the room used.

    The way back needs x Aᵀ of all layers, rows and ranks filled up to multiples of 32, in the order of tiles.c.
    """
    *Y, down, room = _forward_results(x, list(W), list(A), list(B), scaling)
    results = [y.data_ptr() for y in Y]
    multiply(_rows(x.shape), x.data_ptr(), operands(W, A, B, scaling), results, down.data_ptr(), room.data_ptr())
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
    pointers, n = [t.data_ptr() for t in found], len(W)
    multiply_back(
        _rows(x.shape), x.data_ptr(), operands(W, A, B, scaling), down.data_ptr(), [t.data_ptr() for t in g],
        pointers[0] if of_x else 0, pointers[-2 * n : -n], pointers[-n:], room.data_ptr(),
    )  # fmt: skip
    return [*found, room]


@register_flop_formula(torch.ops.phinetune.lora_products)
def forward_flops(x: Any, W: Any, A: Any, B: Any, scaling: float, *, out_shape: Any = None, **_: Any) -> int:
    """Operations of `lora_products`, from the operands' shapes: 2 for each multiplication and addition."""
    one_row = sum(int(w[0] * w[1] + a[0] * (w[0] + w[1])) for w, a in zip(W, A, strict=True))
    return 2 * _rows(x) * one_row


@register_flop_formula(torch.ops.phinetune.lora_products_backward)
def backward_flops(
    x: Any, down: Any, g: Any, W: Any, A: Any, B: Any, scaling: float, of_x: bool, *, out_shape: Any = None, **_: Any
) -> int:
    """Operations of `lora_products_backward`, counted alike."""

    def one(w: Any, a: Any) -> int:  # U and dB; dA; and dx, where it is wanted
        return int(2 * a[0] * w[0] + a[0] * w[1] + of_x * w[1] * (w[0] + a[0]))

    return 2 * _rows(x) * sum(one(w, a) for w, a in zip(W, A, strict=True))


def _run(function: Any, layers: bytes) -> None:
    if function(layers):
        raise MemoryError("LoRA products: no memory for a panel of the weights")


def _rows(shape: Sequence[int]) -> int:
    rows: int = math.prod(shape[:-1])
    return rows


def filled(count: int) -> int:
    """Up to a multiple of 32."""
    return -(-count // 32) * 32
