"""Folding factors into a weight: W + s · B A, in float32 or better, rounded once to W's own dtype.

The one place where merging is computed, for a layer in memory and for a tensor on its way from file to file, so both give the same
bits. It goes by blocks of rows that fit into a processor's cache, so that it costs little more than reading and writing W, and beside the
weight only one block is ever held in float32. Not here: layers, files.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from phinetune.errors import AdapterError
from phinetune.model import kernels

_BLOCK = 1 << 18
"""Elements of W folded at a time: what was read is in the processor's cache when it is written (measured; 2**17 to 2**20 are alike)."""


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
        factors = (self.A, self.B)
        self.compiled = magnitude is None and len(self.A) <= kernels.WIDEST // 4 and kernels.usable(*factors)
        self.scratch: Tensor | None = None
        self.share = [0.0, 0.0]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first row, row after the last) of each block."""
        rows, columns = self.shape
        step = rows if self.whole else max(1, _BLOCK // max(1, columns))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    @torch.no_grad()
    def fold(self, block: Tensor, start: int, stop: int) -> bool:
        """Fold rows `start` to `stop` of the change into `block` (those rows of W), in place. False if a value is not finite."""
        if not self._compiled_for(block):
            return self.fold_reference(block, start, stop)
        finite, moved, size = kernels.fold_rows(block, self.A, self.B[start:stop], self.scaling)
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
    def write(self, block: Tensor, start: int, stop: int) -> None:
        """As `fold`, without looking at what came of it: for blocks that have no numbers, too, and on any device without waiting."""
        if self._compiled_for(block):
            kernels.fold_rows(block, self.A, self.B[start:stop], self.scaling)
        else:
            block.copy_(self.merged(block, start, stop))

    def _compiled_for(self, block: Tensor) -> bool:
        return self.compiled and block.is_contiguous() and kernels.usable(block)

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
