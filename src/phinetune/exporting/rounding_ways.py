"""Codes for one weight: scales that lose least, and rounding whose errors are made up for by the columns that follow (GPTQ).

Both work for the grid of `model/grid.py` and give `Codes` of it. `importance` (in,) says how much a column's error counts: the mean
square of what comes in there.

GPTQ: Frantar et al. 2022, section 3.3, algorithm 1: columns are rounded one after another; what a column loses is taken out of the
columns that are not rounded yet, in the measure in which their inputs go together (the inverse of H = X Xᵀ, by its Cholesky factor, with
a little added to the diagonal). Scales are those of the weights before any of that, so that columns can be taken in the order
of their importance, the most important first.

Not here: where H comes from (`calibration.py`), which way is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phinetune.model.grid import Codes, Grid, encode, join, quantize

_SHARES = tuple(1.0 - 0.03 * i for i in range(-1, 12))
"""Candidates for a scale, as shares of the one that lets the largest value through: 1.03 down to 0.67."""
_PIECE = 1 << 16
"""Weights whose scales are looked for at once: 256 KB, and as much for what is made of them."""
_DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean."""
_LAZY = 32
"""Columns after which the others are brought up to date."""


@torch.no_grad()
def least_error(
    weight: Tensor, grid: Grid, importance: Tensor | None = None, kept_as: torch.dtype = torch.float32
) -> Codes:
    """The nearest codes of `weight` (out, in) for the scales, among some, that lose least: sum over a block of importance · (w - w̃)².

    kept_as: the dtype that the graph keeps scales in.
    """
    parts = []
    step = max(1, _PIECE // weight.shape[1])
    counts = 1.0 if importance is None else importance.float().view(1, -1, grid.block_size)
    for first in range(0, len(weight), step):
        piece = weight.detach()[first : first + step].float()
        parts.append(_searched(piece, grid, counts, kept_as))
    return join(parts)


def _searched(piece: Tensor, grid: Grid, counts: Tensor | float, kept_as: torch.dtype) -> Codes:
    """`least_error` of a few rows, float32, whose blocks fit into the processor's cache."""
    start = quantize(piece, grid)
    blocks = piece.view(*start.scales.shape, grid.block_size)
    best = torch.full_like(start.scales, torch.inf)
    scales, zeros = start.scales.clone(), None if start.zeros is None else start.zeros.clone()
    low = blocks.amin(-1).clamp_(max=0)
    for sign in (
        (1, -1) if grid.symmetric else (1,)
    ):  # codes reach further down than up: either end may be the large one
        for share in _SHARES:
            tried = (start.scales * (sign * share)).to(kept_as).float()
            offset: Tensor | int = grid.middle
            if zeros is not None:
                offset = torch.where(tried > 0, low * share / -tried, 0).round_().clamp_(0, grid.top).unsqueeze(-1)
            inverse = torch.where(tried == 0, 0, 1 / tried).unsqueeze(-1)
            found = (blocks * inverse).add_(offset).round_().clamp_(0, grid.top).sub_(offset)
            found.mul_(tried.unsqueeze(-1)).sub_(blocks).square_()
            loss = found.mul_(counts).sum(-1)
            better = loss < best
            best, scales = torch.where(better, loss, best), torch.where(better, tried, scales)
            if zeros is not None and isinstance(offset, Tensor):
                zeros = torch.where(better, offset.squeeze(-1).to(torch.uint8), zeros)
    return encode(piece, grid, scales, zeros)


@torch.no_grad()
def gptq(weight: Tensor, moments: Tensor, grid: Grid, kept_as: torch.dtype = torch.float32) -> Codes:
    """Codes of `weight` (out, in) that keep W x on inputs x whose X Xᵀ is `moments` (in, in). Raises torch's error if that is no such matrix."""
    H = moments.double().clone()
    diagonal = H.diagonal()
    silent = diagonal <= 0
    diagonal[silent] = 1.0
    diagonal += _DAMPING * diagonal.mean()
    start = least_error(weight, grid, moments.diagonal(), kept_as)
    order = diagonal.argsort(descending=True)
    back = order.argsort()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H[order][:, order])), upper=True).float()
    block = order // grid.block_size  # of each column
    scales = start.scales.t()[block].contiguous()  # (in, out)
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    zeros = None if start.zeros is None else start.zeros.t()[block].float()
    columns = weight.detach().float().t()[order].contiguous()  # (in, out): a column of W is a row here
    codes = torch.empty_like(columns, dtype=torch.uint8)
    errors = torch.empty_like(columns[:_LAZY])
    steps = (1 / upper.diagonal()).tolist()
    for first in range(0, len(columns), _LAZY):
        last = min(first + _LAZY, len(columns))
        for i in range(first, last):
            z: Any = grid.middle if zeros is None else zeros[i]
            rounded = (columns[i] * inverse[i]).add_(z).round_().clamp_(0, grid.top)
            codes[i] = rounded
            error = torch.addcmul(columns[i], rounded.sub_(z), scales[i], value=-1, out=errors[i - first]).mul_(
                steps[i]
            )
            columns[i + 1 : last].addr_(upper[i, i + 1 : last], error, alpha=-1)
        columns[last:].addmm_(upper[first:last, last:].t(), errors[: last - first], alpha=-1)
    return Codes(grid, codes[back].t().contiguous(), start.scales, start.zeros)
