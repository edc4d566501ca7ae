"""The loss: cross-entropy of the learned tokens, summed, divided by their count over the whole optimizer step.

Dividing by the global count makes every split of a batch into micro-batches, padded or joined, give the same gradient. The output head
sees only the N positions that predict a learned token, and where the model hands its logits on unchanged, the loss is made inside the
head, in chunks (`cross_entropy.py`): not even (N, vocabulary) logits exist then.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from phinetune.data.encoding import MASKED
from phinetune.errors import TrainingError
from phinetune.model.fast import FastPaths
from phinetune.training.cross_entropy import (
    checkpointed_cross_entropy,
    chunk_rows,
    chunked_cross_entropy,
    summed_cross_entropy,
)
from phinetune.training.rows import last_mlp, only_rows, recomputed, rows_at, tree_mask, wrapping

_ALTERING: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models known to do something to what their head returns (a soft cap, a scale): they need the logits themselves."""


def learned_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(positions, targets), both (N,): flat indices into (B · T) whose next token is learned, and those tokens. labels is (B, T)."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=MASKED).reshape(-1)  # (B · T)
    positions = (shifted != MASKED).nonzero().squeeze(1)
    return positions, shifted[positions]


def _filled_up(positions: Tensor, targets: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """`positions` and `targets` up to a multiple of 16, so that few shapes occur: with the row's last position, which predicts nothing."""
    filler = min(-len(targets) % 16, tokens - len(targets))
    return F.pad(positions, (0, filler), value=tokens - 1), F.pad(targets, (0, filler), value=MASKED)


@contextlib.contextmanager
def head_only_at(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside, `head` gets only the rows `positions` of its (B, T, hidden) input, as (N, hidden)."""

    handle = head.register_forward_pre_hook(lambda _, args: rows_at(args, positions))
    try:
        yield
    finally:
        handle.remove()


def can_make_loss(model: nn.Module, head: nn.Module) -> bool:
    """True if the loss may be made inside `head`: not in a compiled model, nor in one found to change its logits after the head."""
    chain = wrapping(model)
    # a compiled model would trace a new head at each step
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in chain)
    counted = isinstance(getattr(head, "out_features", None), int)
    return counted and not compiled and not torch.is_inference_mode_enabled() and chain[-1] not in _ALTERING


@contextlib.contextmanager
def loss_made_in(
    head: nn.Module, model: nn.Module, targets: Tensor, label_smoothing: float, tiles: bool = True
) -> Iterator[None]:
    """Inside, `head` returns the summed loss of its rows at `targets` (N,), as (1, 1) in place of their logits (N, vocabulary).

    That is right if the model hands on what its head returns, and this is looked at in every call: the model's `logits` must be that very
    tensor, not written to. A model for which they are not is run again at once with its own head, from the same state of the random
    generators, and from then on `can_make_loss` says no. All of it happens inside wrappers such as DDP's, FSDP's and autocast's.
    """
    inner, logits_of, own = wrapping(model)[-1], head.forward, vars(head).get("forward")
    random = torch.get_rng_state(), get_device_states(targets)
    # what the head returned last, and how often that had been written to
    made: list[tuple[Tensor, int]] = []

    def loss_of(hidden: Tensor) -> Tensor:
        loss = _head_loss(head, own is None, logits_of, hidden, targets, label_smoothing, tiles).reshape(1, 1).clone()
        made[:] = [(loss, loss._version)]
        return loss

    def put_back() -> None:
        if own is None:
            vars(head).pop("forward", None)
        else:
            vars(head)["forward"] = own

    def check(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if inner in _ALTERING or any(output.logits is loss and loss._version == version for loss, version in made):
            return None
        _ALTERING.add(inner)
        put_back()
        made.clear()
        if output.logits._base is None:
            output.logits.detach_()  # lets go of the first run's activations before there are others
        torch.set_rng_state(random[0])
        set_device_states(*random[1])
        return module(*args, **kwargs)

    vars(head)["forward"] = loss_of
    handle = inner.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        put_back()


def _head_loss(
    head: Any, untouched: bool, logits_of: Any, hidden: Tensor, targets: Tensor, label_smoothing: float, tiles: bool
) -> Tensor:
    """The summed loss of `hidden` (N, h). A plain linear layer whose forward is `untouched` is one matrix product, any other is called."""
    # no weight in 4 bits, none that lies on several devices
    sharded_or_quantized = hasattr(head.weight, "device_mesh") or hasattr(head.weight, "quant_state")
    plain = type(head) is nn.Linear and untouched and not sharded_or_quantized
    if plain:
        return chunked_cross_entropy(hidden, head.weight, head.bias, targets, label_smoothing, tiles=tiles)
    return checkpointed_cross_entropy(
        logits_of, hidden, targets, label_smoothing, chunk_rows(head.out_features, torch.float32)
    )


def loss_paths(model: Any, paths: FastPaths) -> dict[str, Any]:
    """What `supervised_loss` is told of `paths` for `model`, unwrapped."""
    last = last_mlp(model) if paths.last_rows else None
    return {"chunked": paths.chunked_loss, "last": last, "rounded": paths.rounded, "tiles": paths.tiles}


def supervised_loss(
    model: nn.Module,
    head: nn.Module,
    batch: dict[str, Tensor],
    dtype: torch.dtype,
    count: Tensor | int | None = None,
    label_smoothing: float = 0.0,
    chunked: bool = True,
    last: nn.Module | None = None,
    rounded: bool = False,
    tiles: bool = True,
) -> Tensor:
    """Summed cross-entropy over the batch's learned tokens, divided by `count` (their number in this batch if None). Scalar, float32.

    `model` may be wrapped (DDP); `head` is its output layer. `chunked=False` is the reference: all (N, vocabulary) logits at once.
    `last`, if given, is the last layer's MLP, to be computed at the learned positions only (`rows.py`).
    `rounded`: computed at a multiple of 16 positions, so that few shapes occur. `tiles`: with `chunked`, by `head_tiles` what that serves.
    Raises TrainingError if no token of the batch is learned: never a loss of 0.0.
    """
    positions, targets = learned_positions(batch["labels"])
    if not len(targets):
        raise TrainingError("a batch has no learned token", "every example needs an answer within max_length")
    learned = len(targets)
    if rounded:
        positions, targets = _filled_up(positions, targets, batch["labels"].numel())
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if "tree" in batch:
        inputs |= {"position_ids": batch["position_ids"], "attention_mask": tree_mask(model, batch["tree"], dtype)}
    in_head = chunked and can_make_loss(model, head)
    with (
        head_only_at(head, positions),
        only_rows(None if recomputed(model, last) else last, positions),
        loss_made_in(head, model, targets, label_smoothing, tiles) if in_head else contextlib.nullcontext(),
    ):
        made = model(**inputs).logits  # the loss, (1, 1), or logits, (N, vocabulary)
    if in_head and can_make_loss(model, head):
        total: Tensor = made.reshape(())
    elif made.shape[0] != len(targets):
        raise RuntimeError(
            f"the model made logits of shape {tuple(made.shape)} for {len(targets)} positions: its head is not one linear layer"
        )
    else:
        total = summed_cross_entropy(made, targets, label_smoothing)
    return total / (learned if count is None else count)
