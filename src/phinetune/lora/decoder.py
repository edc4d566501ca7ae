"""A decoder layer with LoRA in all its projections in one autograd function, on processors that `tiles.py` serves.

    y = norm(x)    s = x + attention(y Qᵀ, y Kᵀ, y Vᵀ) Oᵀ    z = norm(s)    result = s + (silu(z Gᵀ) ⊙ z Uᵀ) Dᵀ

where Q, K, V, O, G, U and D are frozen weights with factors beside them. What is computed, and by what compiled code, is what the functions
of the parts compute (`tiles.py`, `model/attention_tiles.py`, `model/residual.py`, `model/gated.py`): the same numbers, bit by bit. But
there a layer is eight functions, each with its checks, its results and its node in autograd's graph, and on short batches this is a fifth
of a step, in which one thread works. Here the compiled functions are called on addresses, one after the other: what a layer keeps for
the way back lies in two blocks of memory, what it needs meanwhile in a third. The activation and its gradients are computed on what they
are made of while that is on its way to memory, and the last sum likewise.

Not here: which layers are computed so, and when (`decoder_join.py`); the arithmetic; layers of which some projections have no factors; biases, dropout, quantized weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from phinetune.lora import tiles
from phinetune.lora.decoder_memory import CALLS, INTO, NARROW, OUT, WIDEN, Places, Shape, places
from phinetune.model import attention_tiles, kernels


class How(NamedTuple):
    """What a layer is told besides tensors: its shape, the batch's entries as `attention_tiles.attention_rows` takes them, and numbers.

    numbers: the two normalizations' eps, the scores' scale, then s = alpha / r of the four calls. packed: what `tiles.pack` made of each
    weight, or nothing.
    """

    shape: Shape
    entries: tuple[int, ...]
    numbers: tuple[float, ...]
    packed: tuple[Tensor, ...]


class DecoderFunction(torch.autograd.Function):
    """(How, x (B, T, hidden), cos, sin (B T, width), two weights of normalizations, then W of all projections, A of all, B of all) -> (B, T, hidden)."""

    @staticmethod
    def forward(ctx, how, x, cos, sin, *tensors):  # type: ignore[no-untyped-def]
        x = x.contiguous()
        ctx.rooms, ctx.how = rooms_of_step(), how  # the rooms live as long as a layer's way back is to come
        at = _places(x, how.shape, _apart(tensors)[2])[2]
        of_attention, of_mlp = (ctx.rooms.lend(x, numbers) for numbers in (at.of_attention, at.of_mlp))
        with ctx.rooms.one(x, at.meanwhile) as room:
            result = decoder_layer(x, room, of_attention, of_mlp, cos, sin, *_apart(tensors), *how)
        ctx.save_for_backward(x, cos, sin, of_attention, of_mlp, *tensors)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, cos, sin, of_attention, of_mlp, *tensors = ctx.saved_tensors
        of_x, count = ctx.needs_input_grad[1], len(tensors) // 3
        with ctx.rooms.one(x, _places(x, ctx.how.shape, _apart(tensors)[2])[2].meanwhile) as room:
            found = decoder_layer_backward(
                grad.contiguous(), x, room, cos, sin, of_attention, of_mlp, *_apart(tensors), *ctx.how, of_x
            )
        dx, factors = (found[0], found[1:]) if of_x else (None, found)
        return (None, dx, None, None, *(None,) * (2 + count), *factors)


class Rooms:
    """Memory that layers hand on to the next ones: what each needs meanwhile, and, as soon as nobody has it any more, what it kept.

    glibc's heap would leave gaps between such blocks, since small ones that are freed beside them stay where they are: with layers that are
    computed again, half as much memory as a run takes. Tensors without numbers are plain ones: who counts memory sees each layer's.
    """

    def __init__(self) -> None:
        self.free: dict[int, list[Tensor]] = {}

    @contextlib.contextmanager
    def one(self, like: Tensor, numbers: int) -> Iterator[Tensor]:
        """So many numbers, for as long as the context lasts."""
        room = self._taken(like, numbers)
        yield room
        if type(room) in kernels.WITH_NUMBERS:
            self._back(room)

    def lend(self, like: Tensor, numbers: int) -> Tensor:
        """So many numbers, until nobody has the tensor any more."""
        room = self._taken(like, numbers)
        if type(room) not in kernels.WITH_NUMBERS:
            return room
        lent = _block_of(2 * numbers).from_address(room.data_ptr())
        weakref.finalize(lent, self._back, room).atexit = False
        return torch.frombuffer(lent, dtype=room.dtype)

    def _taken(self, like: Tensor, numbers: int) -> Tensor:
        if type(like) in kernels.WITH_NUMBERS:
            with contextlib.suppress(LookupError):
                return self.free[numbers].pop()  # no other thread has it now
        return like.new_empty(numbers)

    def _back(self, room: Tensor) -> None:
        self.free.setdefault(len(room), []).append(room)


@functools.cache
def _block_of(size: int) -> Any:
    """The type of a block of `size` bytes."""
    return ctypes.c_uint8 * size


_rooms: weakref.ref[Rooms] | None = None


def rooms_of_step() -> Rooms:
    """Those of the layers whose way back is still to come: they live as long as a graph does that they are needed for."""
    global _rooms
    found = None if _rooms is None else _rooms()
    if found is None:
        found = Rooms()
        _rooms = weakref.ref(found)
    return found


def _apart(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    """The normalizations' weights, then W, A and B of all projections."""
    n = len(tensors) // 3
    return tensors[:2], tensors[2 : 2 + n], tensors[2 + n : 2 + 2 * n], tensors[2 + 2 * n :]


def _places(x: Tensor, shape: Sequence[int], A: Sequence[Tensor]) -> tuple[Shape, int, Places]:
    whole = Shape(*shape)
    M = x.shape[0] * x.shape[1]
    return whole, M, places(M, whole, tuple(a.shape[0] for a in A))


def _backward_results(
    grad: Tensor, x: Tensor, room: Any, cos: Any, sin: Any, a: Any, m: Any, norms: Any, W: Any, A: Any, B: Any, shape: Any,
    entries: Any, numbers: Any, packed: Any, of_x: bool,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t in ([x, *A, *B] if of_x else [*A, *B])]


@kernels.operator(
    "decoder_layer(Tensor x, Tensor(a!) room, Tensor(b!) of_attention, Tensor(c!) of_mlp, Tensor cos, Tensor sin, Tensor[] norms, Tensor[] W, Tensor[] A, Tensor[] B, int[] shape, int[] entries, "
    "float[] numbers, Tensor[] packed) -> Tensor",
    lambda x, *_: torch.empty_like(x),
)
def decoder_layer(
    x: Tensor, room: Tensor, of_attention: Tensor, of_mlp: Tensor, cos: Tensor, sin: Tensor, norms: Sequence[Tensor], W: Sequence[Tensor], A: Sequence[Tensor], B: Sequence[Tensor],
    shape: Sequence[int], entries: Sequence[int], numbers: Sequence[float], packed: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The layer's result; what the way back needs goes into `of_attention` and `of_mlp`. Arguments as DecoderFunction and How have them."""
    whole, M, at = _places(x, shape, A)
    found = torch.empty_like(x)
    X, meanwhile, one, two, result = (t.data_ptr() for t in (x, room, of_attention, of_mlp, found))
    of = _operands(whole, W, A, B, numbers, packed)
    library, h, w = kernels.library(), whole.hidden, [t.data_ptr() for t in norms]
    library.rms_norm(X, None, w[0], None, one + at.y, one + at.inverse, M, h, numbers[0], 0)
    tiles.multiply(M, one + at.y, of[INTO], [one + to for to in at.into], one + at.slim[INTO], meanwhile + at.room)
    states = one + at.q, one + at.k, one + at.v
    attention_tiles.attend(
        _heads(whole, M, cos, entries, numbers),
        (*states, cos.data_ptr(), sin.data_ptr(), one + at.attended, one + at.sums),
    )
    tiles.multiply(M, one + at.attended, of[OUT], [meanwhile + at.out], one + at.slim[OUT], meanwhile + at.room)
    library.rms_norm(
        X, meanwhile + at.out, w[1], two + at.total, two + at.z, two + at.inverse_total, M, h, numbers[1], 0
    )
    widen, inner, total = [two + to for to in at.widen], two + at.inner, two + at.total
    tiles.multiply(M, two + at.z, of[WIDEN], widen, two + at.slim[WIDEN], meanwhile + at.room, inner=inner)
    narrow = of[NARROW], [result], two + at.slim[NARROW], meanwhile + at.room
    tiles.multiply(M, inner, *narrow, also=total, blocked=tiles.X_BLOCKED)
    return found


@kernels.operator(
    "decoder_layer_backward(Tensor grad, Tensor x, Tensor(a!) room, Tensor cos, Tensor sin, Tensor of_attention, Tensor of_mlp, Tensor[] norms, Tensor[] W, "
    "Tensor[] A, Tensor[] B, int[] shape, int[] entries, float[] numbers, Tensor[] packed, bool of_x) -> Tensor[]",
    _backward_results,
)
def decoder_layer_backward(
    grad: Tensor, x: Tensor, room: Tensor, cos: Tensor, sin: Tensor, of_attention: Tensor, of_mlp: Tensor, norms: Sequence[Tensor], W: Sequence[Tensor],
    A: Sequence[Tensor], B: Sequence[Tensor], shape: Sequence[int], entries: Sequence[int], numbers: Sequence[float], packed: Sequence[Tensor],
    of_x: bool,
) -> list[Tensor]:  # fmt: skip
    """dL/dx, if `of_x`, then dL/dA of each projection, then dL/dB, for grad = dL/d(result), contiguous."""
    whole, M, at = _places(x, shape, A)
    found = _backward_results(
        grad, x, room, cos, sin, of_attention, of_mlp, norms, W, A, B, shape, entries, numbers, packed, of_x
    )
    pointers, n, h = [t.data_ptr() for t in found], len(W), whole.hidden
    dA, dB, meanwhile = pointers[-2 * n : -n], pointers[-n:], room.data_ptr()
    X, g, one, two = x.data_ptr(), grad.data_ptr(), of_attention.data_ptr(), of_mlp.data_ptr()
    of = _operands(whole, W, A, B, numbers, packed)
    library, w = kernels.library(), [t.data_ptr() for t in norms]

    def back(
        call: int, X: int, slim: int, G: Sequence[int], dX: int, room: int = meanwhile + at.room_back, **more: int
    ) -> None:
        own = whole.projections(call)
        tiles.multiply_back(M, X, of[call], slim, G, dX, dA[own], dB[own], room, **more)

    narrow, hidden, total, both = (meanwhile + to for to in (at.d_narrow, at.d_hidden, at.d_total, at.d_both))
    gated = {"gate": two + at.gate, "up": two + at.up, "both": both, "stride": at.wide_stride}
    back(NARROW, two + at.inner, two + at.slim[NARROW], [g], 0, blocked=tiles.X_BLOCKED, **gated)
    back(WIDEN, two + at.z, two + at.slim[WIDEN], (), hidden, both, blocked=tiles.G_BLOCKED)
    library.rms_norm_backward(hidden, two + at.total, w[1], two + at.inverse_total, g, total, M, h, 0)
    back(OUT, one + at.attended, one + at.slim[OUT], [total], narrow)
    heads = _heads(whole, M, cos, entries, numbers)
    states, d_states = (
        (one + at.q, one + at.k, one + at.v),
        (meanwhile + at.d_q, meanwhile + at.d_k, meanwhile + at.d_v),
    )
    attention_tiles.attend_back(
        heads,
        (*states, cos.data_ptr(), sin.data_ptr(), one + at.attended, one + at.sums, narrow, *d_states),
        heads.strides,
    )
    back(INTO, one + at.y, one + at.slim[INTO], [meanwhile + to for to in at.d_into], hidden if of_x else 0)
    if of_x:
        library.rms_norm_backward(hidden, X, w[0], one + at.inverse, total, pointers[0], M, h, 0)
    return found


def _operands(
    shape: Shape,
    W: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    numbers: Sequence[float],
    packed: Sequence[Tensor],
) -> list[tiles.Operands]:
    of_W, of_A, of_B, copies = (tuple(t.data_ptr() for t in tensors) for tensors in (W, A, B, packed))
    wide = tuple(A[shape.projections(call).start].dtype is torch.float32 for call in CALLS)
    return _told(shape, tuple(a.shape[0] for a in A), wide, of_W, of_A, of_B, tuple(numbers[3:]), copies)


@functools.lru_cache(maxsize=4096)  # the same for a layer from step to step
def _told(
    shape: Shape, ranks: tuple[int, ...], wide: tuple[bool, ...], W: tuple[int, ...], A: tuple[int, ...], B: tuple[int, ...],
    scalings: tuple[float, ...], packed: tuple[int, ...],
) -> list[tiles.Operands]:  # fmt: skip
    widths, inputs, found = shape.widths(), shape.inputs(), []
    for call in CALLS:
        own, K = shape.projections(call), inputs[call]
        copies = [(at, at + 2 * N * K) for at, N in zip(packed[own], widths[own], strict=False)]
        found.append(
            tiles.operands_at(K, widths[own], ranks[own], W[own], A[own], B[own], scalings[call], wide[call], copies)
        )
    return found


def _heads(
    shape: Shape, M: int, cos: Tensor, entries: Sequence[int], numbers: Sequence[float]
) -> attention_tiles.Heads:
    return attention_tiles.Heads(
        M, shape.heads, shape.groups, shape.D, cos.shape[1], numbers[2], shape.state_strides(), tuple(entries)
    )


@register_flop_formula(torch.ops.phinetune.decoder_layer)
def _forward_flops(
    x: Any, room: Any, of_attention: Any, of_mlp: Any, cos: Any, sin: Any, norms: Any, W: Any, A: Any, B: Any, shape: Any, entries: Any,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    products: int = tiles.forward_flops(x, W, A, B, 1.0)
    attention: int = attention_tiles.forward_flops(_queries(x, shape), None, None, cos, sin, entries)
    return products + attention


@register_flop_formula(torch.ops.phinetune.decoder_layer_backward)
def _backward_flops(
    grad: Any, x: Any, room: Any, cos: Any, sin: Any, of_attention: Any, of_mlp: Any, norms: Any, W: Any, A: Any, B: Any, shape: Any,
    entries: Any, numbers: Any, packed: Any, of_x: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    first = Shape(*shape).projections(INTO).stop  # those that x comes into
    products = sum(
        tiles.backward_flops(x, None, None, W[own], A[own], B[own], 1.0, wanted)
        for own, wanted in ((slice(first), of_x), (slice(first, None), True))
    )
    q = _queries(x, shape)
    attention: int = attention_tiles.backward_flops(q, q, None, None, cos, sin, None, None, None, None, None, entries)
    return products + attention


def _queries(x: Any, shape: Any) -> tuple[int, int]:
    """The shape of all queries, for x's."""
    whole = Shape(*shape)
    return x[0] * x[1], whole.heads * whole.D
