"""Summed cross-entropy of an output head, a few rows at a time: the logits of all N tokens never exist together.

`chunked_cross_entropy` is for a plain linear head and forms its gradients together with the value; `checkpointed_cross_entropy` is for
any other head; `summed_cross_entropy` over all logits is the reference of both. On CPUs a chunk's softmax and gradients are made by a
compiled function (`cross_entropy.c`), where it was built. Not here: which rows are learned, and how a model's own head is passed over (`loss.py`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from phinetune.data.encoding import MASKED
from phinetune.model.kernels import built, operator, readable
from phinetune.training import head_tiles

CHUNK_BYTES = 64 * 2**20
"""What the logits of one chunk may take: 682 rows of 49 152 bfloat16 logits, 522 of Phi-3's 32 064 in float32."""
_CACHED_BYTES = 2**20  # float32 rows that the passes of a softmax find again in a core's cache


def chunk_rows(vocabulary: int, dtype: torch.dtype, size: int = CHUNK_BYTES) -> int:
    """How many rows of logits of `dtype` fit into `size` bytes; 1 if not even one does."""
    return max(1, size // (vocabulary * dtype.itemsize))


def summed_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The reference: logits (N, V), targets (N,) -> scalar, at least float32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="sum", label_smoothing=label_smoothing)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    tiles: bool = True,
) -> Tensor:
    """Summed cross-entropy of `hidden` (N, h) under the head `weight` (V, h), `bias` (V) at `targets` (N,): scalar, at least float32.

    A row whose target is -100 is not counted. `chunk` is the number of rows whose logits exist at a time (None: as many as fit into CHUNK_BYTES). Products are in hidden's dtype,
    or autocast's where that is on; softmax and sum are in float32 (float64 for float64). With logits z = W x + b, p = softmax(z) and
    torch's definition of smoothing by s over V classes, a row's target is the distribution q = (1 - s) onehot(t) + s / V, its loss

        l = -sum_v q_v log p_v,    and    dl/dz = p - q,    dl/dx = Wᵀ (p - q),    dl/dW = (p - q) xᵀ,    dl/db = p - q.

    None of these depends on what comes after the loss but for one factor, the gradient g of the sum. So a chunk's logits are overwritten
    by p - q as soon as its loss is known, and multiplied into the gradients that are needed; backward only multiplies those by g. What is
    kept between the two is (N, h) for a frozen head, and (V, h) more for a trained one, summed over chunks in float32.

    With `tiles`, what `head_tiles` serves goes through it, in which case there are no logits.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = chunk_rows(len(weight), hidden.dtype) if chunk is None else chunk
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        return cast(Tensor, _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing, rows, tiles))  # type: ignore[no-untyped-call]
    return cast(Tensor, _walk(hidden, weight, bias, targets, label_smoothing, rows, (False, False, False), tiles)[0])


def checkpointed_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, label_smoothing: float, chunk: int
) -> Tensor:
    """The same for any head: `head` maps rows of `hidden` (N, h) to their logits, `chunk` rows at a time, again in the backward pass.

    One chunk is computed in the ordinary way, once. Dropout inside the head draws for each chunk.
    """

    def loss(rows: Tensor, wanted: Tensor) -> Tensor:
        return summed_cross_entropy(head(rows), wanted, label_smoothing)

    if len(hidden) <= chunk:
        return loss(hidden, targets)
    keep: Callable[..., Any] = checkpoint if torch.is_grad_enabled() else lambda f, *args, **_: f(*args)
    spans = [slice(start, start + chunk) for start in range(0, len(hidden), chunk)]
    return torch.stack([keep(loss, hidden[span], targets[span], use_reentrant=False) for span in spans]).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """See `chunked_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float, chunk: int, tiles: bool
    ) -> Tensor:  # fmt: skip
        loss, *gradients = _walk(hidden, weight, bias, targets, smoothing, chunk, ctx.needs_input_grad[:3], tiles)
        ctx.save_for_backward(*gradients)
        return cast(Tensor, loss)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        return (
            *(None if d is None else d * g for d in ctx.saved_tensors),  # g, a scalar, keeps d's dtype
            *(None,) * 4,
        )


def _walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    smoothing: float,
    chunk: int,
    wanted: tuple[bool, bool, bool],
    tiles: bool,
) -> tuple[Any, ...]:
    """The loss, and its gradients of hidden, weight and bias, None where not wanted. One buffer holds each chunk's logits in turn."""
    if tiles and bias is None and not (smoothing or wanted[1]) and head_tiles.serves(hidden, weight, targets):
        own, *gradient = head_tiles.head_loss(hidden, weight, targets, wanted[0])[:-1]
        return own.sum(), *(gradient or [None]), None, None
    count, wide = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(count, dtype=wide)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    of_weight: Tensor | None = None
    of_bias = hidden.new_zeros(len(weight), dtype=wide) if wanted[2] else None
    summed_in = wide if chunk < count else weight.dtype  # one chunk needs no sum
    buffer = hidden.new_empty(min(chunk, count), len(weight))
    for start in range(0, count, chunk):
        rows = slice(start, start + chunk)
        x = hidden[rows]  # (n, h)
        logits = buffer[: len(x)]  # (n, V)
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        losses[rows] = _losses(logits, targets[rows], smoothing, any(wanted))
        if of_hidden is not None:
            torch.mm(logits, weight, out=of_hidden[rows])
        if wanted[1]:
            part = logits.t() @ x  # (V, h)
            of_weight = part.to(summed_in) if of_weight is None else of_weight.add_(part)
        if of_bias is not None:
            of_bias += logits.sum(0, dtype=wide)
    return (
        losses.sum(),
        of_hidden,
        None if of_weight is None else of_weight.to(weight.dtype),
        None if of_bias is None else of_bias.to(weight.dtype),
    )


@functools.cache
def library() -> Any:
    """The built function, loaded once; None where it was not built."""
    found = built(Path(__file__).with_name("_cross_entropy"))
    if found is not None:
        pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        arguments = (pointer, pointer, pointer, number, number, ctypes.c_float, flag, flag)
        found.cross_entropy.argtypes, found.cross_entropy.restype = arguments, flag
    return found


@operator(
    "cross_entropy_rows(Tensor(a!) logits, Tensor targets, float smoothing, bool gradient) -> Tensor",
    lambda logits, *_: logits.new_empty(len(logits), dtype=torch.float32),
)
def cross_entropy_rows(logits: Tensor, targets: Tensor, smoothing: float, gradient: bool) -> Tensor:
    """logits (n, V) in bfloat16 or float32 and targets (n,) in int64, both contiguous -> losses (n,) float32, as `losses_reference`, in one pass.

    Raises IndexError, with the logits as they were, for a target that is neither -100 nor one of V.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    pointers, wide = [t.data_ptr() for t in (logits, targets, losses)], logits.dtype is torch.float32
    if library().cross_entropy(*pointers, *logits.shape, smoothing, gradient, wide):
        raise IndexError(f"a target is neither {MASKED} nor one of {logits.shape[1]} classes")
    return losses


def _losses(logits: Tensor, targets: Tensor, smoothing: float, gradient: bool) -> Tensor:
    """The losses (n,) of `logits` (n, V), which are overwritten by their gradient p - q if `gradient`."""
    served = logits.is_contiguous() and targets.is_contiguous() and targets.dtype is torch.int64
    if served and readable(logits) and library() is not None and not torch.compiler.is_compiling():
        found: Tensor = cross_entropy_rows(logits, targets, smoothing, gradient)
        return found
    return losses_reference(logits, targets, smoothing, gradient)


def losses_reference(logits: Tensor, targets: Tensor, smoothing: float, gradient: bool) -> Tensor:
    """logits (n, V) and targets (n,) -> losses (n,), at least float32, by torch's operators; logits become p - q if `gradient`.

    A CPU takes few rows at a time, so that the passes over them stay in its cache and no second chunk is needed, whatever its dtype.
    """
    vocabulary, wide = logits.shape[1], torch.promote_types(logits.dtype, torch.float32)
    step = chunk_rows(vocabulary, wide, _CACHED_BYTES * torch.get_num_threads()) if logits.is_cpu else len(logits)
    losses = logits.new_empty(len(logits), dtype=wide)
    for start in range(0, len(logits), step):
        piece, wanted = logits[start : start + step], targets[start : start + step].unsqueeze(1)  # (m, V), (m, 1)
        counts = wanted != MASKED
        at = wanted.where(counts, 0)
        scores = F.log_softmax(piece, -1, dtype=wide)
        loss = -scores.gather(1, at)
        if smoothing:
            loss = (1 - smoothing) * loss - smoothing / vocabulary * scores.sum(1, keepdim=True)
        losses[start : start + step] = loss.masked_fill(~counts, 0).squeeze(1)
        if gradient:
            scores.exp_()
            if smoothing:
                scores.sub_(smoothing / vocabulary)
            scores.scatter_add_(1, at, scores.new_full(at.shape, smoothing - 1))
            piece.copy_(scores)
            if not (logits.is_cpu and bool(counts.all())):
                piece.masked_fill_(~counts, 0)
    return losses
