"""A lower rank after the training: the best approximation of every change that an adapter makes, found from its factors alone.

Eckart and Young 1936: of all matrices of rank r the nearest to B A, in the Frobenius norm, is the one made of its r largest singular
directions. QR factorizations of both factors leave a core of rank x rank whose singular values are those of B A, so neither the base
model nor a matrix as large as a weight is needed. Not here: combining adapters (`adapters.py`), stages.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phinetune.errors import ConfigError, OutputError
from phinetune.lora.adapter import CONFIG_FILE, read_adapter, write_adapter
from phinetune.lora.changes import Change, read_changes
from phinetune.lora.peft_format import PREFIX, rank_values


@dataclass(frozen=True)
class Truncation:
    """What `truncate_adapter` did. Every dictionary is keyed by the layer's name in the adapter's file."""

    rank: int
    """The largest rank before."""
    r: int
    """The largest rank now."""
    ranks: dict[str, int]
    """Rank of each layer now; one that had no more than r before is as it was."""
    kept: dict[str, float]
    """Share of the change kept: squared Frobenius norm of what is left over that of all, 0 to 1; 1 for a layer without a change."""
    error: dict[str, float]
    """Frobenius norm of what was cut off, scaling included: the square root of the sum of the squared singular values that are gone."""
    parameters: int
    """How many numbers fewer the factors hold."""
    with_lengths: bool = False
    """The adapter has DoRA's lengths, which stay: `kept` and `error` are those of the factors, the result is an approximation."""


@torch.no_grad()
def low_rank(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B) of `rank` whose product is nearest to B A, and all singular values of B A, largest first.

    A (r, in, ...), B (out, r, ...), kernels behind; the singular directions are divided evenly between the two. B A is never formed.
    Computed in float64. Raises ConfigError for a rank that does not fit the layer.
    """
    flat_A, flat_B = A.flatten(1), B.flatten(1)
    if rank > min(flat_A.shape[1], flat_B.shape[0]):
        raise ConfigError(f"rank: {rank} does not fit a {flat_A.shape[1]} -> {flat_B.shape[0]} layer")
    Q_b, R_b = torch.linalg.qr(flat_B.double())
    Q_a, R_a = torch.linalg.qr(flat_A.double().t())
    U, S, Vh = torch.linalg.svd(R_b @ R_a.t())
    rank = min(rank, S.shape[0])
    root = torch.sqrt(S[:rank])
    new_B, new_A = (Q_b @ U[:, :rank]) * root, root.unsqueeze(1) * (Vh[:rank] @ Q_a.t())
    new_B[~flat_B.any(1)] = 0  # rows of slices without factors: zero, not nearly
    new_A[:, ~flat_A.any(0)] = 0
    return (
        new_A.to(A.dtype).view(-1, *A.shape[1:]).contiguous(),
        new_B.to(B.dtype).view(B.shape[0], -1, *B.shape[2:]).contiguous(),
        S,
    )


def truncate_adapter(folder: str | Path, target: str | Path, r: int) -> Truncation:
    """Write the adapter in `folder` into `target` with no layer's rank above `r`, each product the nearest to what it was.

    Scaling (alpha / r, or alpha / sqrt r with rsLoRA) stays what it was for every layer; `lora_alpha` follows the rank. `r` counts as in
    the file: a fused layer adapted by slices is one layer of the ranks of its slices together. Trained modules, biases and DoRA's
    lengths are carried over as they are.

    Raises ConfigError unless `r` is a whole number from 1 to below the adapter's rank; AdapterError for an adapter that is damaged, or
    was saved beside a base model changed by how it began; OutputError if `target` is `folder`.
    """
    folder, target = Path(folder), Path(target)
    saved = read_adapter(folder)
    changes = {n: c for n, c in read_changes(saved).weights.items() if c.A is not None}
    check_rank_below(r, changes)
    if target.exists() and target.resolve() == folder.resolve():
        raise OutputError(f"{target}: is the adapter itself", "choose another folder")
    state, sizes = dict(saved.state), dict[str, tuple[int, float]]()
    kept, error = dict[str, float](), dict[str, float]()
    for name, change in changes.items():
        key_A, key_B = _keys(name, change, state)
        A, B, S = _cut(state[key_A].float(), state[key_B].float(), r)
        if A.shape[0] < state[key_A].shape[0]:
            state |= {key_A: A, key_B: B}
        rank = state[key_A].shape[0]
        total, left = float(S.square().sum()), float(S[:rank].square().sum())
        kept[name] = left / total if total else 1.0
        error[name] = abs(change.scaling) * float(S[rank:].square().sum().sqrt())
        sizes[name] = (rank, change.scaling * (math.sqrt(rank) if saved.config.use_rslora else rank))
    values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    write_adapter(state, {**values, **rank_values(sizes)}, target, saved.base_key)
    return Truncation(
        rank=adapter_rank(changes),
        r=max(rank for rank, _ in sizes.values()),
        ranks={name: rank for name, (rank, _) in sizes.items()},
        kept=kept,
        error=error,
        parameters=sum(saved.state[name].numel() - tensor.numel() for name, tensor in state.items()),
        with_lengths=any(change.magnitude is not None for change in changes.values()),
    )


def adapter_rank(changes: dict[str, Change]) -> int:
    """The largest rank of any layer."""
    return max((change.factors()[0].shape[0] for change in changes.values()), default=0)


def check_rank_below(r: int, changes: dict[str, Change]) -> None:
    """Raises ConfigError unless `r` is a whole number from 1 to below the adapter's rank."""
    rank = adapter_rank(changes)
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ConfigError(f"r: must be a whole number, at least 1 (found: {r!r})")
    if not changes:
        raise ConfigError("r: the adapter has no factors, only trained modules or biases")
    if r >= rank:
        raise ConfigError(f"r: {r} is not below the adapter's rank, {rank}", "truncation goes to a lower rank")


def _keys(name: str, change: Change, state: dict[str, Tensor]) -> tuple[str, str]:
    """The names of a layer's two factors in the file, with or without PEFT's prefix."""
    pair = ("lora_embedding_A", "lora_embedding_B") if change.is_embedding else ("lora_A.weight", "lora_B.weight")
    prefix = PREFIX if f"{PREFIX}{name}.{pair[0]}" in state else ""
    return f"{prefix}{name}.{pair[0]}", f"{prefix}{name}.{pair[1]}"


def _cut(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `low_rank`, for an r that may be above what the layer allows."""
    return low_rank(A, B, min(r, A.flatten(1).shape[1], B.flatten(1).shape[0]))
