"""Plain rows through attention in blocks of products, or through torch's fused kernel: by what is faster on this machine, measured.

Blocks (`attention.py`) win where the fused kernel is far below the rate of plain products, which is so for short rows on every CPU that
was looked at. Where rows are long, or a processor has tiles for the kernel's products, it may be otherwise. So both are timed, forward
and backward, at the length of the run's rows rounded up to a power of two, and the result is kept for the machine, its number of threads,
torch's version and the model's heads: at most once for each length. Trees, for which the kernel would need a mask of all pairs, are always
computed in blocks; so the choice moves no example to another batch. Not here: putting it into a model (`fast.py`).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from phinetune.artifact import content_key
from phinetune.events import Note, OnEvent, log_event
from phinetune.model.compute import keep_measured, machine_key, read_measured

if TYPE_CHECKING:
    import torch

    from phinetune.model.fast import FastPaths

_PAYS_FROM = 0.9
"""The fused kernel must take at most this share of the blocks' time: near a tie, noise must not decide what a resumed run does."""
_SHORTEST, _LONGEST = 64, 4096  # lengths that are timed
_TOKENS = 1024  # in a timed batch, where one row has less
_ROUNDS = 3


def choose_rows(
    paths: FastPaths,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    lengths: Sequence[int],
    on_event: OnEvent = log_event,
) -> FastPaths:
    """`paths` with `fused_rows` decided, if it is not: for a model of `config`, computing in `dtype`, on rows of `lengths` tokens."""
    if paths.fused_rows is not None or not paths.attention:
        return paths
    length, heads = typical_length(lengths), _heads(config)
    if device.type != "cpu" or heads is None or length == 0:
        return dataclasses.replace(paths, fused_rows=False)
    blocks, fused = attention_seconds(*heads, dtype, length, paths.kernels, paths.tiles)
    if fused > _PAYS_FROM * blocks:
        return dataclasses.replace(paths, fused_rows=False)
    on_event(
        Note(
            f"attention: plain rows through torch's fused kernel, measured faster here for rows of about {length} tokens "
            f"({1000 * fused:.1f} ms against {1000 * blocks:.1f})"
        )
    )
    return dataclasses.replace(paths, fused_rows=True)


def typical_length(lengths: Sequence[int]) -> int:
    """The length of the row in which a token finds itself on average: long rows, where attention is dear, weigh more."""
    return round(sum(n * n for n in lengths) / sum(lengths)) if sum(lengths) else 0


def attention_seconds(
    heads: int, groups: int, width: int, dtype: torch.dtype, length: int, built: bool = True, tiles: bool = True
) -> tuple[float, float]:
    """(in blocks, fused) seconds of attention, forward and backward, on rows of about `length` tokens. Measured once.

    heads: of queries; groups: of keys and values; width: numbers in a head; built, tiles: with the compiled functions and
    those of `tiles.h`, where they are.
    """
    import torch

    from phinetune.model import attention_tiles
    from phinetune.model.kernels import library

    rounded = min(_LONGEST, max(_SHORTEST, 1 << (length - 1).bit_length()))
    ratio = heads // groups
    groups = min(groups, 2 * torch.get_num_threads())  # as many as keep every thread busy tell as much as all of them
    built = built and library() is not None
    tiles = tiles and built and attention_tiles.library() is not None
    key = content_key("attention", machine_key(), ratio * groups, groups, width, str(dtype), rounded, built, tiles)[:16]
    entry = read_measured(key)
    if not entry:
        blocks, fused = _measure(ratio * groups, groups, width, dtype, rounded, built, tiles)
        entry = {"attention": rounded, "blocks": round(blocks, 6), "fused": round(fused, 6)}
        keep_measured(key, entry)
    return float(entry["blocks"]), float(entry["fused"])


def _heads(config: Any) -> tuple[int, int, int] | None:
    """(heads of queries, heads of keys, width) of the model; None where its config does not say."""
    text = config.get_text_config()
    heads: int | None = getattr(text, "num_attention_heads", None)
    hidden: int | None = getattr(text, "hidden_size", None)
    if not heads or not hidden:
        return None
    groups: int = getattr(text, "num_key_value_heads", None) or heads
    return None if heads % groups else (heads, groups, getattr(text, "head_dim", None) or hidden // heads)


def _measure(
    heads: int, groups: int, width: int, dtype: torch.dtype, length: int, built: bool, tiles: bool
) -> tuple[float, float]:
    """Medians of a few rounds in which both are timed in turn, positions included where the compiled functions turn them."""
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from phinetune.model.attention import causal_attention
    from phinetune.model.rotary import plan_rows, rotary_attention

    rows = max(1, _TOKENS // length, -(-torch.get_num_threads() // groups))  # each thread has a row's group at least
    scaling = width**-0.5
    states = [
        torch.full((rows, length, n * width), 0.5, dtype=dtype, requires_grad=True) for n in (heads, groups, groups)
    ]
    angles = torch.full((1, length, width), 0.5, dtype=dtype)

    def turned() -> list[torch.Tensor]:
        q, k, v = (x.view(rows, length, -1, width).transpose(1, 2) for x in states)
        return [*(apply_rotary_pos_emb(q, k, angles, angles) if built else (q, k)), v]

    def fused() -> torch.Tensor:
        q, *others = turned()
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in others)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous()

    def blocks() -> torch.Tensor:
        if not built:
            q, k, v = turned()
            return causal_attention(q, k, v, scaling)
        flat, at = [x.view(rows * length, -1) for x in states], angles.expand(rows, -1, -1).reshape(-1, width)
        return rotary_attention(flat, at, at, heads, groups, scaling, plan_rows(rows, length), tiles)

    def seconds(attention: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        out = attention()
        torch.autograd.grad(out, states, torch.ones_like(out))
        return time.perf_counter() - start

    rounds = [(seconds(blocks), seconds(fused)) for _ in range(_ROUNDS + 1)][1:]
    return statistics.median(first for first, _ in rounds), statistics.median(second for _, second in rounds)
