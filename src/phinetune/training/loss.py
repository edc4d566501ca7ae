"""The loss: cross-entropy of the learned tokens, summed, divided by their count over the whole optimizer step.

Dividing by the global count makes every split of a batch into micro-batches, padded or joined, give the same gradient. The output head
sees only the N positions that predict a learned token: (N, vocabulary) logits instead of (batch x length, vocabulary).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.data.encoding import MASKED
from phinetune.errors import TrainingError


def learned_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(positions, targets), both (N,): flat indices into (B · T) whose next token is learned, and those tokens. labels is (B, T)."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=MASKED).reshape(-1)  # (B · T)
    positions = (shifted != MASKED).nonzero().squeeze(1)
    return positions, shifted[positions]


@contextlib.contextmanager
def head_only_at(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside, `head` gets only the rows `positions` of its (B, T, hidden) input, as (N, hidden)."""

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token may look and the dtype's lowest value where it may not; allowed is boolean (1, 1, T, T)."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)


def supervised_loss(
    model: nn.Module,
    head: nn.Module,
    batch: dict[str, Tensor],
    dtype: torch.dtype,
    count: Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Summed cross-entropy over the batch's learned tokens, divided by `count` (their number in this batch if None). Scalar, float32.

    `model` may be wrapped (DDP); `head` is its output layer. Raises TrainingError if no token of the batch is learned: never a loss of 0.0.
    """
    positions, targets = learned_positions(batch["labels"])
    if not len(targets):
        raise TrainingError("a batch has no learned token", "every example needs an answer within max_length")
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if "allowed" in batch:
        inputs |= {"position_ids": batch["position_ids"], "attention_mask": additive_mask(batch["allowed"], dtype)}
    with head_only_at(head, positions):
        logits = model(**inputs).logits  # (N, vocabulary)
    if logits.shape[0] != len(targets):
        raise RuntimeError(
            f"the model made logits of shape {tuple(logits.shape)} for {len(targets)} positions: its head is not one linear layer"
        )
    total = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)
    return total / (len(targets) if count is None else count)
