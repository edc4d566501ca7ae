"""Where a decoder layer's numbers lie while it is computed in one function (`decoder.py`): parts of a few blocks of memory.

Addresses are bytes from the beginning of a block; every part begins at a cache line. A block of its own for attention and for the MLP, since
what is larger than 32 MB is given back to the system each time (`model/memory.py`). Gradients that are needed one after the
other lie in the same place, which then is in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from phinetune.lora import tiles

CALLS = INTO, OUT, WIDEN, NARROW = range(4)
"""The projections into attention, out of it, into the MLP, out of it: those that share their input in one call."""


class Shape(NamedTuple):
    """What a layer is besides its tensors. `into`: projections into attention, 3 or, fused, 1; `widen`: into the MLP, 2 or 1."""

    hidden: int
    heads: int
    groups: int
    D: int
    inner: int
    into: int
    widen: int

    def projections(self, call: int) -> slice:
        """Those of a call, among all in order."""
        ends = (0, self.into, self.into + 1, self.into + 1 + self.widen, self.into + 2 + self.widen)
        return slice(ends[call], ends[call + 1])

    def widths(self) -> tuple[int, ...]:
        """Rows of the weight of each projection."""
        sizes = self.heads * self.D, self.groups * self.D, self.groups * self.D
        into = sizes if self.into == 3 else (sum(sizes),)
        widen = (self.inner,) * 2 if self.widen == 2 else (2 * self.inner,)
        return (*into, self.hidden, *widen, self.hidden)

    def inputs(self) -> tuple[int, int, int, int]:
        """Columns of the weights of each call."""
        return self.hidden, self.heads * self.D, self.hidden, self.inner

    def state_strides(self) -> tuple[int, int, int]:
        """Numbers from one token's query, key and value to the next one's."""
        q, kv = self.heads * self.D, self.groups * self.D
        return (q + 2 * kv,) * 3 if self.into == 1 else (q, kv, kv)


class _Block:
    """Parts of a block so far; `numbers` is how many bfloat16 numbers they take."""

    def __init__(self) -> None:
        self.numbers = 0

    def part(self, numbers: int, bytes_each: int = 2) -> int:
        at = 2 * self.numbers
        self.numbers += -(-numbers * bytes_each // 64) * 32
        return at

    def beside(self, M: int, widths: tuple[int, ...], fused: bool) -> tuple[int, ...]:
        """Parts of `widths` numbers a row: one after the other, or, `fused`, side by side in each row."""
        if not fused:
            return tuple(self.part(M * width) for width in widths)
        whole = self.part(M * sum(widths))
        return tuple(whole + 2 * sum(widths[:i]) for i in range(len(widths)))


class Places:
    """For M rows of a layer of `shape` with factors of these `ranks`."""

    def __init__(self, M: int, shape: Shape, ranks: tuple[int, ...]) -> None:
        h, HD, GD, inner = shape.hidden, shape.heads * shape.D, shape.groups * shape.D, shape.inner
        rows, fused, fused_mlp = tiles.filled(M), shape.into == 1, shape.widen == 1
        slim = [rows * sum(map(tiles.filled, ranks[shape.projections(call)])) for call in CALLS]
        self.wide_stride = 2 * inner if fused_mlp else inner
        # kept for the way back: of attention ...
        block = _Block()
        self.y = block.part(M * h)
        self.q, self.k, self.v = states = block.beside(M, (HD, GD, GD), fused)
        self.into = states[: shape.into]
        self.attended, self.sums, self.inverse = block.part(M * HD), block.part(M * shape.heads, 4), block.part(M, 4)
        self.slim = [block.part(slim[INTO]), block.part(slim[OUT])]
        self.of_attention = block.numbers
        # ... and of the MLP
        block = _Block()
        self.total, self.z = block.part(M * h), block.part(M * h)
        self.gate, self.up = both = block.beside(M, (inner, inner), fused_mlp)
        self.widen = both[: shape.widen]
        self.inner, self.inverse_total = block.part(rows * inner), block.part(M, 4)
        self.slim += [block.part(slim[WIDEN]), block.part(slim[NARROW])]
        self.of_mlp = block.numbers
        # meanwhile, forward
        block = _Block()
        self.out, self.room = block.part(M * h), block.part(_room(M, shape, ranks, False))
        forward = block.numbers
        # and backward: gradients of what comes out of attention, of gate and up or of what goes into attention, of the layer's sums
        block = _Block()
        self.d_narrow = block.part(M * HD)
        narrow = _Block()
        self.d_q, self.d_k, self.d_v = states = narrow.beside(M, (HD, GD, GD), fused)
        start = self.d_both = block.part(max(_room(M, shape, ranks, True, (WIDEN,)), narrow.numbers))
        self.d_q, self.d_k, self.d_v = states = tuple(at + start for at in states)
        self.d_into = states[: shape.into]
        self.d_hidden, self.d_total = block.part(M * h), block.part(M * h)
        self.room_back = block.part(_room(M, shape, ranks, True, (INTO, OUT, NARROW)))
        self.meanwhile = max(forward, block.numbers)


def _room(M: int, shape: Shape, ranks: tuple[int, ...], back: bool, calls: Sequence[int] = CALLS) -> int:
    """What these calls need one after the other."""
    widths, inputs = shape.widths(), shape.inputs()
    found = []
    for call in calls:
        own = shape.projections(call)
        slim = sum(map(tiles.filled, ranks[own]))
        found.append(tiles.numbers_of_room(M, inputs[call], slim, widths[own], back))
    return max(found)


@functools.lru_cache(maxsize=256)  # asked for at each call, of few shapes
def places(M: int, shape: Shape, ranks: tuple[int, ...]) -> Places:
    """Where they lie; see the module's head."""
    return Places(M, shape, ranks)
