"""The integer grid of ONNX Runtime's MatMulNBits in torch: quantize, make dense again, pack as the graph stores it.

A weight (out, in) is cut along each row into blocks of `block_size`; a block has one scale s and, if asymmetric, one zero point z:

    w ~ (q - z) · s,   q in 0 .. 2^bits - 1

    symmetric     z = 2^(bits-1),           s = -v / z with v the value of largest magnitude (which gets q = 0 and is exact)
    asymmetric    z = round(-low / s),      s = (high - low) / (2^bits - 1), low <= 0 <= high

These are the choices of ONNX Runtime's own quantizer, bit for bit (tests compare). Any other scales are on the grid as well: `encode`
takes them as they are, so that better ones can be looked for (`exporting`). bits: 4 or 8.

`round_to_grid` is what training needs every step: the dense value of the nearest code, without ever holding codes, a piece of the
weight at a time so that everything between reading W and writing the result stays in the processor's cache. Its reference is
`quantize(weight, grid).dense()`, which it equals bit for bit.

Not here: which layers are quantized, files, ways to better codes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from phinetune.errors import ConfigError, did_you_mean

_PIECE = 1 << 17  # weights rounded at once: 256 KB in float32, and as much for what is made of them
_HALF = 0.49999997  # the float32 below one half: floor(x + _HALF) rounds halves up and nothing else (C's roundf, for x >= 0)


@dataclass(frozen=True)
class Grid:
    """Bits of a code, weights that share a scale, and whether there are zero points."""

    bits: Literal[4, 8] = 4
    block_size: int = 32
    symmetric: bool = True

    sizes: ClassVar[tuple[int, ...]] = (16, 32, 64, 128, 256)

    def __str__(self) -> str:
        return f"int{self.bits} in {'' if self.symmetric else 'asymmetric '}blocks of {self.block_size}"

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric block."""
        return int(2 ** (self.bits - 1))

    def problems(self, name: str, inputs: int) -> list[str]:
        """What is wrong with this grid for the layer `name` of `inputs` columns."""
        if self.block_size not in self.sizes:
            return [f"{name}: blocks of {self.block_size} (they are {', '.join(map(str, self.sizes))})"]
        if inputs % self.block_size:
            return [f"{name}: blocks of {self.block_size} do not divide its {inputs} inputs"]
        return []


def read_grid(value: Any, where: str) -> Grid | None:
    """`value`, true, false or {block_size, symmetric, bits}, as a Grid. Raises ConfigError that names `where`."""
    if value is None or isinstance(value, bool):
        return Grid() if value else None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where}: must be true, false, or such as {{block_size: 32, symmetric: true}} (found: {value!r})"
        )
    allowed: dict[str, tuple[Any, ...]] = {"bits": (4, 8), "block_size": Grid.sizes, "symmetric": (True, False)}
    names = [f.name for f in fields(Grid)]
    problems = [f"{where}.{key}: unknown key{did_you_mean(str(key), names)}" for key in value if key not in names]
    problems += [
        f"{where}.{key}: must be one of {', '.join(str(a).lower() for a in allowed[key])} (found: {given!r})"
        for key, given in value.items()
        if key in names and (given not in allowed[key] or (isinstance(given, bool) != (key == "symmetric")))
    ]
    if problems:
        raise ConfigError(problems)
    return Grid(**value)


def record_grid(grid: Grid) -> dict[str, Any]:
    """What a manifest says of a grid; `read_grid` reads it."""
    return asdict(grid)


@dataclass(frozen=True)
class Codes:
    """A weight on a grid: codes (out, in) uint8, scales (out, blocks) float32, zeros (out, blocks) uint8 or None if symmetric."""

    grid: Grid
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(q - z) · s as (out, in), computed in float32 and rounded to `dtype`."""
        blocks = self.codes.view(*self.scales.shape, self.grid.block_size).float()
        zeros = self.grid.middle if self.zeros is None else self.zeros.float().unsqueeze(-1)
        return (blocks - zeros).mul_(self.scales.unsqueeze(-1)).view(self.codes.shape).to(dtype)

    def packed(self) -> tuple[Tensor, Tensor | None]:
        """(B, zero points) as MatMulNBits stores them, uint8: B (out, blocks, block_size · bits / 8), zero points (out, bytes of a row).

        At 4 bits the first of two codes is in the lower half of a byte; a row with an odd number of zero points ends with a middle one.
        """
        out, blocks = self.scales.shape
        zeros = self.zeros
        if self.grid.bits == 8:
            return self.codes.view(out, blocks, -1), zeros
        if zeros is not None and blocks % 2:
            zeros = torch.cat([zeros, zeros.new_full((out, 1), self.grid.middle)], dim=1)
        return _pack(self.codes).view(out, blocks, -1), None if zeros is None else _pack(zeros)

    def __getitem__(self, rows: slice) -> Codes:
        return Codes(self.grid, self.codes[rows], self.scales[rows], None if self.zeros is None else self.zeros[rows])


def _pack(codes: Tensor) -> Tensor:
    """(..., 2n) codes of 4 bits -> (..., n) bytes."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(grid: Grid, stored: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Codes:
    """The inverse of `Codes.packed`: stored (out, blocks, bytes), scales (out, blocks), zeros (out, bytes) -> Codes."""
    out, blocks = scales.shape
    codes = stored.reshape(out, -1)
    if grid.bits == 4:
        codes = _unpack(codes)
        zeros = None if zeros is None else _unpack(zeros)[:, :blocks]
    return Codes(grid, codes, scales.float(), zeros)


def _unpack(stored: Tensor) -> Tensor:
    """(rows, n) bytes -> (rows, 2n) codes of 4 bits."""
    return torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1)


def join(parts: list[Codes]) -> Codes:
    """Codes of several weights on one grid, below one another."""
    zeros = [p.zeros for p in parts if p.zeros is not None]
    codes, scales = torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts])
    return Codes(parts[0].grid, codes, scales, torch.cat(zeros) if zeros else None)


@torch.no_grad()
def quantize(weight: Tensor, grid: Grid) -> Codes:
    """`weight` (out, in) rounded to the nearest codes, with the scales that ONNX Runtime chooses. The reference of `round_to_grid`.

    Raises ConfigError if the blocks do not divide the columns.
    """
    if problems := grid.problems("weight", weight.shape[1]):
        raise ConfigError(problems)
    blocks = weight.detach().float().reshape(weight.shape[0], -1, grid.block_size)
    scales, zeros = _scales(blocks, grid)
    return encode(weight, grid, scales, zeros)


def _scales(blocks: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """(scales, zero points) of blocks (..., block_size), each (...)."""
    high, low = blocks.amax(-1), blocks.amin(-1)
    if grid.symmetric:
        return torch.where(high > -low, high, low).div_(-grid.middle), None
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    scales = (high - low).div_(grid.top)
    zeros = torch.where(scales > 0, -low / scales, 0).add_(_HALF).floor_().clamp_(0, grid.top)
    return scales, zeros.to(torch.uint8)


@torch.no_grad()
def encode(weight: Tensor, grid: Grid, scales: Tensor, zeros: Tensor | None = None) -> Codes:
    """The nearest codes of `weight` (out, in) for given scales and zero points (out, blocks)."""
    blocks = weight.detach().float().reshape(*scales.shape, grid.block_size)
    offset = grid.middle if zeros is None else zeros.float().unsqueeze(-1)
    codes = (blocks * _reciprocal(scales).unsqueeze(-1)).add_(offset).add_(_HALF).floor_().clamp_(0, grid.top)
    return Codes(grid, codes.to(torch.uint8).view(weight.shape), scales, zeros)


def _reciprocal(scales: Tensor) -> Tensor:
    """1 / s, and 0 for a block of zeros."""
    return torch.where(scales == 0, 0, 1 / scales)


@torch.no_grad()
def round_to_grid(weight: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
    """The dense values of the nearest codes, in `out` (out, in; any floating dtype) or a new tensor like `weight`; on a CPU in pieces.

    `out` may be `weight` itself.
    """
    result = torch.empty_like(weight) if out is None else out
    step = max(1, _PIECE // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        _round_rows(weight[rows].to(torch.float32, copy=True), grid, result[rows])
    return result


def _round_rows(piece: Tensor, grid: Grid, out: Tensor) -> None:
    """Write the dense values of the nearest codes of `piece` (rows, in), float32, which is used up, into `out`."""
    blocks = piece.view(len(piece), -1, grid.block_size)
    scales, zeros = _scales(blocks, grid)
    offset = grid.middle if zeros is None else zeros.float().unsqueeze(-1)
    blocks = blocks.mul_(_reciprocal(scales).unsqueeze(-1)).add_(offset).add_(_HALF).floor_().clamp_(0, grid.top)
    out.copy_(blocks.sub_(offset).mul_(scales.unsqueeze(-1)).view(piece.shape))
