"""Attention of a decoder layer from its projections on, with the compiled kernels: rotary positions, trees, causal rows, one function.

What `attention.py` computes, and the turning of queries and keys before it (Su et al. 2021, "RoFormer", section 3.2). There a model has
turned its heads already, operator by operator, and a tree's branches are put together and taken apart by many more. Here the products'
results, (tokens, heads · D) as they are, are turned and scaled on their way into the blocks that are multiplied, and the gradients on
their way back:

    gather  tokens -> (n, heads, S, D) of each block       scatter  the reverse: each token the sum over its places

A key set is a prefix and the branches that follow it, each with its own copy of the prefix, or n rows; its queries come in blocks, of
which each is multiplied with the keys up to its own last. Lengths are rounded up (the places filled with zeros are seen by nobody), because
a product of a new shape is compiled anew by oneDNN, which costs as much as hundreds of products.

`forward` stands in the place of a module's own for the architectures that are Llama's (separate or fused projections, any share of the
head turned, grouped keys); `fast.py` tries it on the model first. Not here: other masks, caches, dropout: the module's own forward serves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from phinetune.model import attention_tiles, kernels
from phinetune.model.attention import BLOCK, is_tree, keeps_probabilities
from phinetune.model.fast import TREES

_ROUND = 16  # lengths of blocks are multiples of this
_ONE_GROUP = 1 << 17  # branches whose padded scores are no more than this, for a head, are computed as one key set


@dataclass(frozen=True)
class _Block:
    """Queries of a key set: `rows` of each of its n entries, the first of which sees `first` keys, multiplied with `width` keys."""

    start: int  # rows of all blocks before this one
    index: Tensor  # (n · rows) tokens, -1 for padding
    rows: int
    first: int
    width: int


@dataclass(frozen=True)
class _Keys:
    """n entries of `length` keys that belong together, and the blocks of queries that look at them."""

    start: int  # rows of all key sets before this one
    index: Tensor  # (n · length) tokens, -1 for padding
    entries: int
    length: int
    blocks: list[_Block]


@dataclass(frozen=True)
class Plan:
    """How the attention of a batch is computed; `query_places` and `key_places` as `kernels.scatter_heads` takes them."""

    keys: list[_Keys]
    query_rows: int
    key_rows: int
    query_places: tuple[Tensor, Tensor]
    key_places: tuple[Tensor, Tensor]
    entries: tuple[int, ...] | None
    """As `attention_tiles.attention_rows` takes them; None where a prefix does not begin with the first token, an entry
    is empty, or tokens are left out."""


@_disable_current_modes()  # planning is no part of a step that is followed
def plan_attention(sets: Sequence[tuple[list[int], list[range]]], tokens: int) -> Plan:
    """`sets`: of each key set the tokens before the queries of all its entries, and of each entry those that are queries and keys."""
    import numpy as np

    planned: list[_Keys] = []
    asked: list[list[tuple[int, int, int]]] = [[] for _ in range(tokens)]
    known: list[list[tuple[int, int, int]]] = [[] for _ in range(tokens)]
    query_rows = key_rows = 0
    for prefix, entries in sets:
        longest = max(len(own) for own in entries)
        length = _rounded(len(prefix) + longest)
        index = np.full((len(entries), length), -1)
        for i, own in enumerate(entries):
            seen = [*prefix, *own]
            index[i, : len(seen)] = seen
            for j, token in enumerate(seen):
                known[token].append((key_rows + i * length, length, j))
        blocks: list[_Block] = []
        for start in range(0, longest, BLOCK):
            rows, first = min(BLOCK, _rounded(longest - start)), len(prefix) + start + 1
            block = np.full((len(entries), rows), -1)
            for i, own in enumerate(entries):
                part = own[start : start + rows]
                block[i, : len(part)] = part
                for j, token in enumerate(part):
                    asked[token].append((query_rows + i * rows, rows, j))
            width = min(_rounded(first + rows - 1), length)
            blocks.append(_Block(query_rows, torch.from_numpy(block).flatten(), rows, first, width))
            query_rows += len(entries) * rows
        planned.append(_Keys(key_rows, torch.from_numpy(index).flatten(), len(entries), length, blocks))
        key_rows += len(entries) * length
    return Plan(planned, query_rows, key_rows, _places(asked), _places(known), _entries(sets, tokens))


def _entries(sets: Sequence[tuple[list[int], list[range]]], tokens: int) -> tuple[int, ...] | None:
    found = [n for prefix, entries in sets for own in entries for n in (0, len(prefix), own.start, len(own))]
    plain = all(prefix == list(range(len(prefix))) for prefix, _ in sets) and all(n > 0 for n in found[3::4])
    return tuple(found) if plain and sum(found[3::4]) == tokens else None


def _places(of_tokens: list[list[tuple[int, int, int]]]) -> tuple[Tensor, Tensor]:
    import numpy as np

    starts = np.cumsum([0, *(len(places) for places in of_tokens)])
    rows = np.array([place for places in of_tokens for place in places], dtype=np.int64).reshape(-1, 3)
    return torch.from_numpy(starts), torch.from_numpy(rows)


def _rounded(length: int) -> int:
    return -(-length // _ROUND) * _ROUND


def plan_tree_rows(lengths: Sequence[int]) -> Plan:
    """The plan of one row that is a tree of `lengths` (prefix first)."""
    prefix, branches = lengths[0], list(lengths[1:])
    starts = [prefix + sum(branches[:i]) for i in range(len(branches))]
    own = sorted((range(a, a + n) for a, n in zip(starts, branches, strict=True) if n), key=len)
    sets: list[tuple[list[int], list[range]]] = [([], [range(prefix)])] if prefix else []
    sets += [(list(range(prefix)), [own[i] for i in members]) for members in _groups([len(r) for r in own], prefix)]
    return plan_attention(sets, sum(lengths))


def _groups(lengths: list[int], prefix: int) -> list[range]:
    """Runs of the sorted `lengths` whose branches are filled up to one length: all, if that is little work, else of up to 1.5 times."""
    if not lengths or len(lengths) * _rounded(lengths[-1]) * _rounded(prefix + lengths[-1]) <= _ONE_GROUP:
        return [range(len(lengths))] if lengths else []
    groups, start = [], 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or lengths[i] > 1.5 * lengths[start]:
            groups.append(range(start, i))
            start = i
    return groups


@functools.lru_cache(maxsize=64)
def plan_rows(rows: int, length: int) -> Plan:
    """The plan of `rows` causal rows of `length` tokens."""
    return plan_attention([([], [range(i * length, (i + 1) * length) for i in range(rows)])], rows * length)


class RotaryAttention(torch.autograd.Function):
    """(plan, scaling, heads, groups, cos, sin (T, width), then q (T, H · D), k, v (T, G · D), or all in one) -> (T, H · D)."""

    @staticmethod
    def forward(ctx, plan, scaling, heads, groups, cos, sin, *states):  # type: ignore[no-untyped-def]
        q, k, v = attention_tiles.apart(states, heads, groups)
        D = q.shape[1] // heads
        Q, K, V, out = (
            q.new_empty(rows * n * D)
            for rows, n in ((plan.query_rows, heads), (plan.key_rows, groups), (plan.key_rows, groups), (plan.query_rows, heads))
        )  # fmt: skip
        saved: list[Tensor] = []
        for keys in plan.keys:
            for source, target, turned in ((k, K, (cos, sin)), (v, V, (None, None))):
                kernels.gather_heads(source, keys.index, _keys(target, keys, groups, D), *turned, 1.0)
            for block in keys.blocks:
                kernels.gather_heads(q, block.index, _queries(Q, keys, block, heads, D), cos, sin, scaling)
        for keys, block, own in _walk(plan, heads, groups, D, Q, K, V, out):
            P = _probabilities(own[0], own[1], block)
            torch.bmm(P, own[2], out=own[3])
            if keeps_probabilities(keys.length, D):
                saved.append(P)
        ctx.save_for_backward(Q, K, V, cos, sin, *saved)
        ctx.plan, ctx.scaling, ctx.heads, ctx.groups, ctx.fused = plan, scaling, heads, groups, len(states) == 1
        result = q.new_empty(q.shape)
        kernels.scatter_heads(out, *plan.query_places, result, heads, None, None, 1.0)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        Q, K, V, cos, sin, *saved = ctx.saved_tensors
        plan, heads, groups = ctx.plan, ctx.heads, ctx.groups
        D, grad = grad.shape[1] // heads, grad.contiguous()
        g, dQ, dK, dV = (torch.empty_like(x) for x in (Q, Q, K, V))
        for keys in plan.keys:
            for block in keys.blocks:
                kernels.gather_heads(grad, block.index, _queries(g, keys, block, heads, D), None, None, 1.0)
        kept = iter(reversed(saved))
        for keys, block, own in reversed(list(_walk(plan, heads, groups, D, Q, K, V, g, dQ, dK, dV))):
            q, k, v, up, dq, dk, dv = own
            P = next(kept) if keeps_probabilities(keys.length, D) else _probabilities(q, k, block)
            dS = torch.bmm(up, v.transpose(1, 2))
            kernels.softmax_backward(P, dS)
            torch.bmm(dS, k, out=dq)
            if block is keys.blocks[-1]:  # the first one here; it may not reach the padding after the last key
                for whole, part, left, right in ((dK, dk, dS, q), (dV, dv, P, up)):
                    if block.width < keys.length:
                        _keys(whole, keys, groups, D)[:, :, block.width :].zero_()
                        part.copy_(torch.bmm(left.transpose(1, 2), right))
                    else:
                        torch.bmm(left.transpose(1, 2), right, out=part)
            else:
                dk += torch.bmm(dS.transpose(1, 2), q)
                dv += torch.bmm(P.transpose(1, 2), up)
        T = len(grad)
        sizes = [heads * D, groups * D, groups * D]
        if ctx.fused:
            whole = grad.new_empty(T, sum(sizes))
            results = list(torch.split(whole, sizes, dim=1))
        else:
            results = [grad.new_empty(T, n) for n in sizes]
        kernels.scatter_heads(dQ, *plan.query_places, results[0], heads, cos, sin, ctx.scaling)
        kernels.scatter_heads(dK, *plan.key_places, results[1], groups, cos, sin, 1.0)
        kernels.scatter_heads(dV, *plan.key_places, results[2], groups, None, None, 1.0)
        return (None,) * 6 + ((whole,) if ctx.fused else tuple(results))


def _keys(flat: Tensor, keys: _Keys, groups: int, D: int) -> Tensor:
    """The set's part of a flat buffer: (n, G, length, D)."""
    rows = keys.entries * keys.length
    return flat[keys.start * groups * D :][: rows * groups * D].view(keys.entries, groups, keys.length, D)


def _queries(flat: Tensor, keys: _Keys, block: _Block, heads: int, D: int) -> Tensor:
    """The block's part of a flat buffer: (n, H, rows, D)."""
    rows = keys.entries * block.rows
    return flat[block.start * heads * D :][: rows * heads * D].view(keys.entries, heads, block.rows, D)


def _walk(plan: Plan, heads: int, groups: int, D: int, Q: Tensor, K: Tensor, V: Tensor, *more: Tensor) -> Any:
    """For each block: its key set, itself, and its operands: queries (n · G, H / G · rows, D), keys and values (n · G, width, D), then
    those of `more`, queries', queries', keys' and values'."""
    for keys in plan.keys:
        of_keys = [_keys(x, keys, groups, D).view(-1, keys.length, D) for x in (K, V, *more[2:])]
        for block in keys.blocks:
            shape = keys.entries * groups, heads // groups * block.rows, D
            of_queries = [_queries(x, keys, block, heads, D).view(shape) for x in (Q, *more[:2])]
            seen = [x[:, : block.width] for x in of_keys]
            yield keys, block, [of_queries[0], *seen[:2], *of_queries[1:], *seen[2:]]


def _probabilities(q: Tensor, k: Tensor, block: _Block) -> Tensor:
    scores = torch.bmm(q, k.transpose(1, 2))
    kernels.causal_softmax(scores, block.rows, block.first)
    return scores


def rotary_attention(
    states: Sequence[Tensor], cos: Tensor, sin: Tensor, heads: int, groups: int, scaling: float, plan: Plan, by_tiles: bool = False
) -> Tensor:  # fmt: skip
    """q (T, H · D), k and v (T, G · D), or one tensor that holds them side by side, cos and sin (T, width) -> (T, H · D).

    by_tiles: in one call where that can be. The reference is transformers' `apply_rotary_pos_emb`, then `attention.attention_reference`."""
    entries = plan.entries if by_tiles else None
    if entries is not None:
        apart = attention_tiles.apart(states, heads, groups)
        if attention_tiles.usable(apart, cos, sin, heads, groups, entries):
            found: Tensor = attention_tiles.TilesAttention.apply(entries, heads, groups, scaling, cos, sin, *states)  # type: ignore[no-untyped-call]
            return found
    result: Tensor = RotaryAttention.apply(plan, scaling, heads, groups, cos, sin, *states)  # type: ignore[no-untyped-call]
    return result


def batch_plan(mask: Tensor | None, rows: int, length: int) -> Plan:
    """The plan of a batch: of a tree whose lengths stand in the mask's place, or of plain rows."""
    if not is_tree(mask):
        return plan_rows(rows, length)
    plan: Plan | None = getattr(mask, "planned_rows", None)  # the same tensor comes to every layer
    if plan is None:
        plan = plan_tree_rows(mask.flatten().tolist())
        mask.planned_rows = plan  # type: ignore[attr-defined]
    return plan


def could_be_rotary(module: Any) -> bool:
    """True if `module` looks like an attention that `forward` computes; whether it is one, only trying tells."""
    fused = hasattr(module, "qkv_proj")
    apart = all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj"))
    sized = (
        isinstance(getattr(module, "head_dim", None), int) and module.head_dim <= kernels.WIDEST
        and hasattr(module, "scaling") and hasattr(module, "config")
    )  # fmt: skip
    return bool(
        type(module).__name__.endswith("Attention") and hasattr(module, "o_proj") and sized and (fused or apart)
    )


def forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    by_tiles: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What an attention of Llama's kind computes: hidden_states (B, T, hidden) -> (B, T, hidden), by the kernels where they serve.

    Where they do not (a cache, a mask that is no tree's, rows that go to torch's kernel, dropout, another device), by `type(module).forward`, its own.
    """
    mine = is_tree(attention_mask) or (attention_mask is None and module.config._attn_implementation != TREES)
    mine = mine and past_key_values is None and not (module.training and getattr(module, "attention_dropout", 0.0))
    if not mine or position_embeddings is None or not kernels.usable(hidden_states, *position_embeddings):
        own: tuple[Tensor, Tensor | None] = type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
        )
        return own
    B, T, _ = hidden_states.shape
    names = ("qkv_proj",) if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
    states = [getattr(module, name)(hidden_states) for name in names]
    text = module.config.get_text_config()
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    cos, sin = (x.expand(B, T, -1).reshape(B * T, -1) for x in position_embeddings)
    flat = [x.reshape(B * T, -1) for x in states]
    plan = batch_plan(attention_mask, B, T)
    out = rotary_attention(flat, cos, sin, heads, groups, module.scaling, plan, by_tiles)
    return module.o_proj(out.view(B, T, -1)), None
