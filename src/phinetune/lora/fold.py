"""Folding factors into a weight: W + s · B A, in float32 or better, rounded once to W's own dtype.

The one place where merging is computed, for a layer in memory and for a tensor on its way from file to file, so both give the same
bits. It goes by blocks of rows: beside the weight and the result only one block is ever held in float32. Not here: layers, files.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phinetune.errors import AdapterError

_BLOCK = 1 << 22  # elements of W held in float32 at a time: 16 MB, about what a core's caches can stream


@torch.no_grad()
def fold(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
    transposed: bool = False,
    in_place: bool = False,
) -> Tensor:
    """W + scaling · B A in W's shape and dtype; with DoRA's `magnitude` (out), each row scaled to that length afterwards.

    weight (out, in), or (in, out) with `transposed` (GPT-2's Conv1D; an embedding is one with in = tokens), or (out, in, *kernel);
    lora_A (r, in · kernel), lora_B (out, r). `in_place` writes the result over `weight`. DoRA: Liu et al. 2024, section 4.1, eq. 5.
    """
    accumulate = torch.promote_types(weight.dtype, torch.float32)
    A, B = lora_A.to(accumulate), lora_B.to(accumulate)
    result = weight if in_place else torch.empty_like(weight)
    if transposed and magnitude is not None:  # lengths run along the stored columns, so all rows are needed at once
        whole = torch.addmm(weight.t().to(accumulate), B, A, alpha=scaling)
        result.copy_(_to_length(whole, magnitude).t())
        return result
    if transposed:  # W.t() + s B A = (W + s Aᵀ Bᵀ).t()
        A, B = B.t().contiguous(), A.t()
    rows = weight.shape[0]
    source = weight.reshape(rows, -1)
    step = max(1, _BLOCK // max(1, source.shape[1]))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = source[start:stop].to(accumulate, copy=True).addmm_(B[start:stop], A, alpha=scaling)
        if magnitude is not None:
            block = _to_length(block, magnitude[start:stop])
        result[start:stop].copy_(block.view(result[start:stop].shape))
    return result


def _to_length(rows: Tensor, magnitude: Tensor) -> Tensor:
    """`rows` (out, in), each scaled to the length in `magnitude` (out)."""
    scaled: Tensor = rows * (magnitude.to(rows.dtype) / torch.linalg.vector_norm(rows, dim=1)).unsqueeze(1)
    return scaled


def check_finite(name: str, weight: Tensor) -> None:
    """Raises AdapterError if a merged weight holds an infinity or a NaN."""
    if not math.isfinite(float(weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32)))) and (
        not torch.isfinite(weight).all()
    ):
        raise AdapterError(
            f"{name}: merging gives values that are not finite in {str(weight.dtype)[6:]}",
            "the adapter is damaged, or diverged in training",
        )
