"""An MLP's activation on its way to memory, and its gradients: bit for bit what the functions give that look at memory themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phinetune.lora import tiles
from phinetune.model import kernels

pytestmark = [
    pytest.mark.skipif(tiles.library() is None, reason="nothing that multiplies bfloat16, or no compiler"),
    pytest.mark.usefixtures("each_way_of_multiplying"),
]
SIZES = pytest.mark.parametrize(
    ("rows", "width", "inner", "ranks"),
    [(5, 32, 32, (3, 3)), (33, 64, 96, (8, 40)), (48, 96, 1056, (16, 16)), (300, 1120, 160, (16, 16)), (257, 64, 2080, (4,))],
    ids=["few rows", "rows and ranks of their own", "wide", "depth is cut", "one layer, wide"],
)  # fmt: skip


def filled(n: int) -> int:
    return -(-n // 32) * 32


def unblocked(x: Tensor, rows: int, width: int) -> Tensor:
    """(rows, width) of blocks of 32 x 32; what fills the rows up is zero."""
    whole = x.view(-1, width // 32, 32, 32).transpose(1, 2).reshape(-1, width)
    assert not whole[rows:].count_nonzero()
    return whole[:rows]


def blocked(x: Tensor) -> Tensor:
    rows, width = x.shape
    whole = x.new_zeros(filled(rows), width)
    whole[:rows] = x
    return whole.view(-1, 32, width // 32, 32).transpose(1, 2).contiguous()


class Layers:
    """Layers of `widths` over `width` columns with factors of `ranks`, and all that a call needs."""

    def __init__(self, rows: int, width: int, widths: tuple[int, ...], ranks: tuple[int, ...]) -> None:
        self.rows, self.width, self.widths, self.ranks = rows, width, widths, ranks
        self.W = [(torch.randn(n, width) * width**-0.5).bfloat16() for n in widths]
        self.A = [torch.randn(r, width) * width**-0.5 for r in ranks]
        self.B = [torch.randn(n, r) * r**-0.5 for n, r in zip(widths, ranks, strict=True)]
        self.of = tiles.operands(self.W, self.A, self.B, 0.7)
        self.R = sum(map(filled, ranks))
        self.D = torch.zeros(filled(rows), self.R, dtype=torch.bfloat16)

    def room(self, back: bool) -> Tensor:
        return torch.empty(
            tiles.numbers_of_room(self.rows, self.width, self.R, self.widths, back), dtype=torch.bfloat16
        )

    def forward(self, X: Tensor, Y: list[int], **more: int) -> None:
        room = self.room(False)
        tiles.multiply(self.rows, X.data_ptr(), self.of, Y, self.D.data_ptr(), room.data_ptr(), **more)

    def back(self, X: Tensor, G: list[Tensor], dX: int, room: Tensor | None = None, **more: int) -> list[Tensor]:
        room = self.room(True) if room is None else room
        found = [torch.empty_like(t) for t in (*self.A, *self.B)]
        n, at = len(self.W), [t.data_ptr() for t in found]
        of_G = [g.data_ptr() for g in G]
        tiles.multiply_back(
            self.rows, X.data_ptr(), self.of, self.D.data_ptr(), of_G, dX, at[:n], at[n:], room.data_ptr(), **more
        )
        return found


def gate_and_up(
    rows: int, width: int, inner: int, ranks: tuple[int, ...]
) -> tuple[Layers, Tensor, list[Tensor], list[int]]:
    """Two layers, or for one rank one of both side by side: x, gate and up as views of what is written, and where."""
    torch.manual_seed(rows)
    both = Layers(rows, width, (inner,) * 2 if len(ranks) == 2 else (2 * inner,), ranks)
    x = (3 * torch.randn(rows, width)).bfloat16()
    whole = torch.zeros(2, rows, inner).bfloat16() if len(ranks) == 2 else torch.zeros(rows, 2 * inner).bfloat16()
    parts = list(whole) if len(ranks) == 2 else list(whole.split(inner, 1))
    return both, x, parts, [p.data_ptr() for p in parts][: len(ranks)]


@SIZES
def test_forward(rows: int, width: int, inner: int, ranks: tuple[int, ...]) -> None:
    layers, x, (gate, up), at = gate_and_up(rows, width, inner, ranks)
    layers.forward(x, at)
    expected, D = [t.clone() for t in (gate, up)], layers.D.clone()
    activation = kernels.silu_gate(*expected)
    for t in (gate, up, layers.D):
        t.zero_()
    found = torch.full((filled(rows) * inner,), 7.0).bfloat16()
    layers.forward(x, at, inner=found.data_ptr())
    assert torch.equal(gate, expected[0]) and torch.equal(up, expected[1]) and torch.equal(layers.D, D)
    assert torch.equal(unblocked(found, rows, inner), activation) and activation.count_nonzero() > 0.9 * rows * inner
    assert float(gate.abs().max()) > 6  # where e^-x is far from 1


@SIZES
def test_blocked_input_and_a_sum(rows: int, width: int, inner: int, ranks: tuple[int, ...]) -> None:
    torch.manual_seed(rows)
    layers = Layers(rows, inner, (width,), ranks[:1])
    x, more = torch.randn(rows, inner).bfloat16(), torch.randn(rows, width).bfloat16()
    plain, summed = torch.zeros(rows, width).bfloat16(), torch.zeros(rows, width).bfloat16()
    layers.forward(x, [plain.data_ptr()])
    D = layers.D.clone()
    layers.forward(blocked(x), [summed.data_ptr()], also=more.data_ptr(), blocked=tiles.X_BLOCKED)
    assert torch.equal(summed, plain + more) and torch.equal(layers.D, D)


@SIZES
def test_backward(rows: int, width: int, inner: int, ranks: tuple[int, ...]) -> None:
    wide, x, (gate, up), at = gate_and_up(rows, width, inner, ranks)
    wide.forward(x, at)
    narrow = Layers(rows, inner, (width,), ranks[:1])
    activation, g = kernels.silu_gate(gate, up), torch.randn(rows, width).bfloat16()
    y = torch.empty_like(g)
    narrow.forward(activation, [y.data_ptr()])
    # the parts, one after the other
    d_inner, dx = torch.empty_like(activation), torch.empty_like(x)
    factors = narrow.back(activation, [g], d_inner.data_ptr())
    whole = torch.empty(rows, 2 * inner).bfloat16()
    kernels.silu_gate_backward(d_inner, gate, up, *whole.split(inner, 1))
    G = [part.contiguous() for part in whole.split(inner, 1)] if len(ranks) == 2 else [whole]
    factors += wide.back(x, G, dx.data_ptr())
    # on the way
    room, dx_too = wide.room(True).fill_(7.0), torch.empty_like(x)
    gated = {"gate": gate.data_ptr(), "up": up.data_ptr(), "stride": gate.stride(0), "both": room.data_ptr()}
    found = narrow.back(blocked(activation), [g], 0, blocked=tiles.X_BLOCKED, **gated)
    assert torch.equal(unblocked(room[: filled(rows) * 2 * inner], rows, 2 * inner), whole)
    found += wide.back(x, [], dx_too.data_ptr(), room, blocked=tiles.G_BLOCKED)
    assert torch.equal(dx_too, dx)
    assert all(torch.equal(one, other) for one, other in zip(found, factors, strict=True))


def test_what_is_no_number_stays_none() -> None:
    layers, x, (gate, up), at = gate_and_up(5, 32, 32, (3, 3))
    x[2] = torch.nan
    found = torch.zeros(32 * 32).bfloat16()
    layers.forward(x, at, inner=found.data_ptr())
    activation = unblocked(found, 5, 32)
    assert activation[2].isnan().all() and activation[[0, 1, 3, 4]].isfinite().all() and up[2].isnan().all()
    assert torch.equal(gate[2].isnan(), kernels.silu_gate(gate, up)[2].isnan())
