"""Folding factors into a weight: W + s · B A, in float32 or better, rounded once to W's own dtype.

The one place where merging is computed, for a layer in memory and for a tensor on its way from file to file, so both give the same
bits. It goes by blocks of rows that fit into a processor's cache, so that it costs little more than reading and writing W, and beside the
weight only one block is ever held in float32. `fold.c` computes it, built when phinetune is installed where there is a compiler;
elsewhere, and for what it cannot read, torch's operators do, the reference. Not here: layers, files.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phinetune.errors import AdapterError
from phinetune.model.kernels import built, operator, readable

_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_FACTORS = (_P, _P, _N, _N, _N, _F, _F, _P, _I)
_READING, _WRITING = 1, 2
_SPAN, _TOGETHER, _DEEPEST = 32, 4, 1024
"""Columns and rows that fold.c works on at a time, and its largest r."""
_BLOCK = 1 << 17
"""Elements of W folded at a time, about: what was read is in the processor's second cache when it is written, with room for the rest (measured)."""


@functools.cache
def library() -> Any:
    """The built functions, loaded once; None where they were not built."""
    loaded = built(Path(__file__).with_name("_fold"))
    if not hasattr(loaded, "fold_rows"):
        return None
    loaded.fold_rows.argtypes, loaded.fold_rows.restype = (_P, *_FACTORS), _I
    if hasattr(loaded, "fold_file"):
        loaded.fold_file.argtypes, loaded.fold_file.restype = (_I, _N, _I, _N, _P, _N, *_FACTORS, _P), _I
    return loaded


def packed(A: Tensor, dtype: torch.dtype) -> Tensor:
    """A (r, columns) as `fold_rows` reads it for a weight of this dtype: (spans, r, 32), filled up with zeros.

    Two bfloat16 numbers are one word, and a word's halves go into vectors of their own: the even columns of a span come first.
    """
    r, columns = A.shape
    filled = torch.nn.functional.pad(A, (0, -columns % _SPAN))
    if dtype is torch.float32:
        return filled.view(r, -1, _SPAN).permute(1, 0, 2).contiguous()
    return filled.view(r, -1, _SPAN // 2, 2).permute(1, 0, 3, 2).contiguous().view(-1, r, _SPAN)


@operator(
    "fold_rows(Tensor(a!) W, Tensor A, Tensor B, float scaling) -> (bool, float, float)",
    lambda *_: (True, 0.0, 0.0),
)
def fold_rows(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[bool, float, float]:
    """W (rows, columns) += scaling · B A in place; A `packed`, B (rows, r) float32, all contiguous.

    Gives whether all results are finite, and <W's change, Δ> and <Δ, Δ> over the two rows that change most. The reference is
    `Folder.fold_reference`.
    """
    moved = (ctypes.c_double * 2)()
    pointers = (W.data_ptr(), A.data_ptr(), B.data_ptr())
    sizes, limit, wide = (*W.shape, B.shape[1]), torch.finfo(W.dtype).max, int(W.dtype is torch.float32)
    finite = library().fold_rows(*pointers, *sizes, scaling, limit, ctypes.addressof(moved), wide)
    return bool(finite), moved[0], moved[1]


class Folder:
    """Folds one change into blocks of a weight's rows: W + scaling · B A, with DoRA's `magnitude` each row scaled to that length.

    shape: (rows, columns) of the weight as stored, kernels flattened. lora_A (r, in), lora_B (out, r), magnitude (out). `transposed` is
    for weights stored (in, out): GPT-2's Conv1D, and embeddings, where in = tokens. DoRA: Liu et al. 2024, section 4.1, equation 5.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        magnitude: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        accumulate = torch.promote_types(dtype, torch.float32)
        self.A, self.B = lora_A.detach().to(accumulate).contiguous(), lora_B.detach().to(accumulate).contiguous()
        self.shape, self.dtype, self.scaling, self.magnitude = shape, dtype, scaling, magnitude
        self.whole = transposed and magnitude is not None  # lengths run along the stored columns: all rows at once
        if transposed and not self.whole:  # (Wᵀ + s B A)ᵀ = W + s Aᵀ Bᵀ
            self.A, self.B = self.B.t().contiguous(), self.A.t().contiguous()
        self.packed = packed(self.A, dtype) if self._can_be_compiled() else None
        self.scratch: Tensor | None = None
        self.share = [0.0, 0.0]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first row, row after the last) of each block."""
        rows, columns = self.shape
        step = max(1, rows) if self.whole else max(1, _BLOCK // max(1, columns) // _TOGETHER) * _TOGETHER
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def _can_be_compiled(self) -> bool:
        known = self.dtype in (torch.bfloat16, torch.float32) and self.magnitude is None and len(self.A) <= _DEEPEST
        return known and library() is not None and readable(self.A, self.B)

    def _factor_for(self, block: Tensor) -> Tensor | None:
        """A for the compiled function, where it can read this block of W."""
        return self.packed if block.is_contiguous() and readable(block) else None

    @torch.no_grad()
    def fold(self, block: Tensor, start: int, stop: int) -> bool:
        """Fold rows `start` to `stop` of the change into `block` (those rows of W), in place. False if a value is not finite."""
        A = self._factor_for(block)
        if A is None:
            return self.fold_reference(block, start, stop)
        finite, moved, size = fold_rows(block, A, self.B[start:stop], self.scaling)
        self.share[0] += moved
        self.share[1] += size
        return bool(finite)

    @torch.no_grad()
    def fold_reference(self, block: Tensor, start: int, stop: int) -> bool:
        """What `fold` does, by torch's operators."""
        merged = self.merged(block, start, stop)
        rows = self._sampled(start, stop)
        before = block[rows]
        block.copy_(merged)
        self._measure(before, block[rows], rows + start)
        low, high = torch.aminmax(merged)
        limit = torch.finfo(self.dtype).max
        return bool(low >= -limit) and bool(high <= limit)  # a NaN is neither

    @torch.no_grad()
    def fold_file(self, source: int, start: int, target: int, to: int) -> bool | None:
        """The whole weight, from byte `start` of an open file to byte `to` of another. False if a value is not finite.

        None where it is not compiled: the caller goes by blocks, which gives the same bytes. Raises OSError; EOFError for a file that
        ends early.
        """
        if self.packed is None or not hasattr(library(), "fold_file"):
            return None
        (rows, columns), moved, failed = self.shape, (ctypes.c_double * 2)(), ctypes.c_int()
        step = next(self.blocks(), (0, 1))[1]
        buffer = torch.empty(step, columns, dtype=self.dtype)
        files, pointers = (source, start, target, to), (self.packed.data_ptr(), self.B.data_ptr())
        sizes = (rows, columns, self.B.shape[1], self.scaling, torch.finfo(self.dtype).max)
        results = (ctypes.addressof(moved), int(self.dtype is torch.float32), ctypes.addressof(failed))
        code = library().fold_file(*files, buffer.data_ptr(), step, *pointers, *sizes, *results)
        if code in (_READING, _WRITING):
            raise EOFError if failed.value < 0 else OSError(failed.value, os.strerror(failed.value))
        self.share = [a + b for a, b in zip(self.share, moved, strict=True)]
        return bool(code == 0)

    @torch.no_grad()
    def write(self, block: Tensor, start: int, stop: int) -> None:
        """As `fold`, without looking at what came of it: for blocks that have no numbers, too, and on any device without waiting."""
        A = self._factor_for(block)
        if A is None:
            block.copy_(self.merged(block, start, stop))
        else:
            fold_rows(block, A, self.B[start:stop], self.scaling)

    @torch.no_grad()
    def merged(self, block: Tensor, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` with the change folded in, in float32 or better; `block` is those rows of W, and stays as it is.

        The result lies in memory that the next call uses again.
        """
        if self.whole:
            whole = torch.addmm(block.t().to(self.A.dtype), self.B, self.A, alpha=self.scaling)
            return _to_length(whole, self.magnitude).t()
        if self.scratch is None or len(self.scratch) < stop - start:
            self.scratch = torch.empty(stop - start, self.shape[1], dtype=self.A.dtype, device=block.device)
        merged = self.scratch[: stop - start].copy_(block)
        merged.addmm_(self.B[start:stop], self.A, alpha=self.scaling)
        return merged if self.magnitude is None else _to_length(merged, self.magnitude[start:stop])

    def _sampled(self, start: int, stop: int, count: int = 2) -> Tensor:
        """The rows of a block that change most, counted from its start: rows of slices without factors say nothing."""
        if self.magnitude is not None:
            return torch.arange(0)
        return self.B[start:stop].abs().amax(1).topk(min(count, stop - start)).indices

    def _measure(self, before: Tensor, after: Tensor, rows: Tensor) -> None:
        """Add up <merged - W, Δ> and <Δ, Δ> over a few rows."""
        if self.magnitude is None:
            delta = self.scaling * (self.B[rows] @ self.A)
            moved = after.to(delta.dtype) - before.to(delta.dtype)
            self.share[0] += float((moved * delta).sum())
            self.share[1] += float((delta * delta).sum())

    @property
    def surviving(self) -> float | None:
        """<folded W - W, Δ> / <Δ, Δ>: the share of the change Δ that rounding to W's dtype left, over the rows of each block that change most.

        None for no change, and for DoRA's, which is no sum.
        """
        return self.share[0] / self.share[1] if self.share[1] else None


@torch.no_grad()
def fold(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """A new tensor like `weight`, (rows, columns) or with a kernel, with the change folded in. Arguments as for `Folder`.

    A value that is not finite becomes a NaN or an infinity in the result; `check_finite` finds it.
    """
    flat = weight.detach().flatten(1)
    folder = Folder((flat.shape[0], flat.shape[1]), weight.dtype, lora_A, lora_B, scaling, magnitude, transposed)
    result = flat.clone(memory_format=torch.contiguous_format)
    for start, stop in folder.blocks():
        folder.write(result[start:stop], start, stop)
    return torch.empty_like(weight).copy_(result.view(weight.shape))


def _to_length(rows: Tensor, magnitude: Tensor | None) -> Tensor:
    """`rows` (out, in), each scaled to the length in `magnitude` (out)."""
    if magnitude is None:
        return rows
    scaled: Tensor = rows * (magnitude.to(rows.dtype) / torch.linalg.vector_norm(rows, dim=1)).unsqueeze(1)
    return scaled


def check_finite(name: str, weight: Tensor) -> None:
    """Raises AdapterError if a merged weight holds an infinity or a NaN."""
    if not torch.isfinite(weight).all():
        raise not_finite(name, weight.dtype)


def not_finite(name: str, dtype: torch.dtype) -> AdapterError:
    """The error for a merged weight that holds an infinity or a NaN."""
    return AdapterError(
        f"{name}: merging gives values that are not finite in {str(dtype)[6:]}",
        "the adapter is damaged, or diverged in training",
    )
