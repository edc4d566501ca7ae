"""Attention for training on a CPU: causal, and over trees, as batched matrix products on blocks of queries.

    softmax(s · Q Kᵀ + mask) V          (Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1)

On CPUs batched products run at the rate of plain ones, while the fused kernel of torch reaches a fraction of it and is slower still
backward. So the queries are cut into blocks, and a block is multiplied with the keys that it may see and no others: about half of all
products are never formed. Key heads that several query heads share (Ainslie et al. 2023, "GQA", section 2.2) are never repeated: the
query heads of a group are rows of one product.

A tree (see `data/batches.py`) arrives as a "mask" of shape (1, 1, 1, 1 + n) of whole numbers: the length of the prefix, then those of the
n branches. The prefix attends to itself; each branch to the prefix and to itself. Branches of similar length are padded to the longest
and computed together, so a token costs what it costs in a row of its own, never the whole row's length.

With P = softmax(S), S = s · Q Kᵀ and g = dL/d(P V):

    dV = Pᵀ g        dP = g Vᵀ        dS = P ⊙ (dP - rowsum(P ⊙ dP))        dQ = s · dS K        dK = s · dSᵀ Q

P is kept for the backward pass while it is small beside the layer's other activations and formed again otherwise.

Not here: other masks, windows, sinks, dropout, caches (torch's attention serves them), the choice (`fast.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

BLOCK = 64
"""Queries in a block. Smaller ones skip more of what is masked, larger ones make larger products (measured: 64 of 32 to 1024)."""
_KEPT_UP_TO = 16  # P is kept while there are at most this many times as many keys as a head is wide
_ALIKE = 1.5  # branches up to this many times as long as the shortest of their group are padded to one length


def attention_reference(query: Tensor, key: Tensor, value: Tensor, scaling: float, allowed: Tensor) -> Tensor:
    """The definition: what `grouped_attention` and `tree_attention` must equal.

    query (B, H, T, D), key and value (B, G, T, D) with G dividing H, allowed boolean, (T, T) -> (B, H, T, D).
    """
    repeated = [x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value)]
    scores = (scaling * query @ repeated[0].transpose(2, 3)).masked_fill(~allowed, -math.inf)
    return torch.softmax(scores, dim=-1) @ repeated[1]


def allowed_in_tree(lengths: Sequence[int]) -> Tensor:
    """Which token may see which in a tree of `lengths` (prefix first): boolean (T, T)."""
    prefix, *branches = lengths
    owner = torch.tensor([-1] * prefix + [i for i, n in enumerate(branches) for _ in range(n)])
    return ((owner[None, :] == owner[:, None]) | (owner[None, :] == -1)).tril()


def _blocks(queries: int, keys: int) -> Iterator[tuple[slice, int]]:
    """(queries of the block, number of keys that its last query sees)."""
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        yield slice(start, stop), keys - queries + stop


def _probabilities(q: Tensor, key: Tensor, rows: int, seen: int) -> Tensor:
    """P (N, R · rows, seen) for a block of scaled queries q (N, R · rows, D); its last `rows` keys are the block's own."""
    scores = torch.bmm(q, key[:, :seen].transpose(1, 2))
    if rows > 1:
        future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
        scores.view(len(q), -1, rows, seen)[..., seen - rows :].masked_fill_(future, -math.inf)
    return torch.softmax(scores, dim=-1)  # float32 inside, result in q's dtype


def _forward(query: Tensor, key: Tensor, value: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """(P V, the blocks' P if `keep`). query, scaled, (N, R, L, D); key and value (N, S, D), S >= L; query i sees S - L + i + 1 keys."""
    N, R, L, _ = query.shape
    out = query.new_empty(N, R, L, value.shape[-1])
    kept = []
    for rows, seen in _blocks(L, key.shape[1]):
        n = rows.stop - rows.start
        P = _probabilities(query[:, :, rows].reshape(N, R * n, -1), key, n, seen)
        out[:, :, rows] = torch.bmm(P, value[:, :seen]).view(N, R, n, -1)
        if keep:
            kept.append(P)
    return out, kept


def _backward(
    g: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to the scaled query, key and value for g (N, R, L, D); shapes as in `_forward`."""
    N, R, L, _ = query.shape
    dq, dk, dv = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for i, (rows, seen) in enumerate(_blocks(L, key.shape[1])):
        n = rows.stop - rows.start
        q, out = query[:, :, rows].reshape(N, R * n, -1), g[:, :, rows].reshape(N, R * n, -1)
        P = kept[i] if kept else _probabilities(q, key, n, seen)
        dP = torch.bmm(out, value[:, :seen].transpose(1, 2))
        dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
        dv[:, :seen] += torch.bmm(P.transpose(1, 2), out)
        dk[:, :seen] += torch.bmm(dS.transpose(1, 2), q)
        dq[:, :, rows] = torch.bmm(dS, key[:, :seen]).view(N, R, n, -1)
    return dq, dk, dv


def keeps_probabilities(keys: int, width: int) -> bool:
    """True if P over so many keys is kept for the backward pass, for heads of so many numbers."""
    return keys <= _KEPT_UP_TO * width


class CausalAttention(torch.autograd.Function):
    """Rows of equal length: query (B, H, T, D), key and value (B, G, T, D) -> (B, T, H, D)."""

    @staticmethod
    def forward(ctx, query, key, value, scaling):  # type: ignore[no-untyped-def]
        B, H, T, D = query.shape
        G = key.shape[1]
        q = (query * scaling).reshape(B * G, H // G, T, D)
        k, v = key.reshape(B * G, T, D), value.reshape(B * G, T, value.shape[-1])
        out, kept = _forward(q, k, v, keeps_probabilities(T, D))
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape, value.shape)
        return out.view(B, H, T, -1).transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        q, k, v, *kept = ctx.saved_tensors
        N, R, T, _ = q.shape
        B = len(g)
        dq, dk, dv = _backward(g.transpose(1, 2).reshape(N, R, T, -1), q, k, v, kept)
        shapes = ctx.shapes
        return dq.mul_(ctx.scaling).view(B, *shapes[0][1:]), dk.view(shapes[1]), dv.view(shapes[2]), None


@dataclass(frozen=True)
class _Group:
    """Branches computed together, padded to one length: (n · L) places of their tokens in the row; the padding's places, if any."""

    branches: int
    length: int
    index: Tensor
    padding: Tensor | None


@dataclass(frozen=True)
class _Tree:
    """A tree's prefix, its groups of branches, and for each branch token in the row's order its place among the groups' rows."""

    prefix: int
    groups: list[_Group]
    back: Tensor


def plan_tree(lengths: Sequence[int]) -> _Tree:
    """How to compute a tree of `lengths` (prefix first)."""
    prefix, branches = lengths[0], list(lengths[1:])
    starts = [prefix + sum(branches[:i]) for i in range(len(branches))]
    order = sorted(range(len(branches)), key=lambda i: branches[i])
    groups: list[_Group] = []
    places: dict[int, int] = {}  # branch -> where its rows begin among all groups' rows
    rows = 0
    while order:
        members = [i for i in order if branches[i] <= _ALIKE * branches[order[0]]]
        order = order[len(members) :]
        longest = branches[members[-1]]
        lengths_of = torch.tensor([branches[i] for i in members])
        steps = torch.arange(longest)
        valid = steps < lengths_of[:, None]  # (n, L)
        index = torch.where(valid, torch.tensor([starts[i] for i in members])[:, None] + steps, 0).flatten()
        padding = None if bool(valid.all()) else (~valid).flatten()
        groups.append(_Group(len(members), longest, index, padding))
        places |= {i: rows + j * longest for j, i in enumerate(members)}
        rows += len(members) * longest
    back = [torch.arange(places[i], places[i] + n) for i, n in enumerate(branches)]
    return _Tree(prefix, groups, torch.cat(back) if back else torch.empty(0, dtype=torch.long))


class TreeAttention(torch.autograd.Function):
    """One row that is a tree: query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D)."""

    @staticmethod
    def forward(ctx, query, key, value, scaling, tree):  # type: ignore[no-untyped-def]
        H, G = query.shape[1], key.shape[1]
        q = (query[0].transpose(0, 1) * scaling).contiguous()  # (T, H, D)
        k, v = key[0].transpose(0, 1).contiguous(), value[0].transpose(0, 1).contiguous()  # (T, G, D)
        saved, parts = [q, k, v], []
        keep = keeps_probabilities(tree.prefix + max((g.length for g in tree.groups), default=0), q.shape[-1])
        counts = []
        for operands in _operands(tree, q, k, v, G):
            out, kept = _forward(*operands, keep)
            parts.append(out)
            saved += kept
            counts.append(len(kept))
        ctx.save_for_backward(*saved)
        ctx.scaling, ctx.tree, ctx.counts = scaling, tree, counts
        return _in_order(tree, [_rows(part, H) for part in parts], q.shape[0])[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, *kept = ctx.saved_tensors
        tree, G, H = ctx.tree, k.shape[1], q.shape[1]
        g = grad[0].contiguous()  # (T, H, D)
        upstream = []
        if tree.prefix:
            upstream.append(_heads(g[: tree.prefix][None], G))
        for group in tree.groups:
            own = g.index_select(0, group.index)
            if group.padding is not None:
                own.masked_fill_(group.padding[:, None, None], 0)  # nothing flows back from padding
            upstream.append(_heads(own.view(group.branches, group.length, H, -1), G))
        parts: list[tuple[Tensor, ...]] = []
        dk_prefix, dv_prefix = torch.zeros_like(k[: tree.prefix]), torch.zeros_like(v[: tree.prefix])
        for i, operands in enumerate(_operands(tree, q, k, v, G)):
            start = sum(ctx.counts[:i])
            dq, dk, dv = _backward(upstream[i], *operands, kept[start : start + ctx.counts[i]])
            own_length = dq.shape[2]
            n = len(dq) // G
            dk, dv = (x.view(n, G, -1, x.shape[-1]).transpose(1, 2) for x in (dk, dv))  # (n, P + L, G, D)
            if dk.shape[1] > own_length:
                dk_prefix += dk[:, : tree.prefix].sum(0)
                dv_prefix += dv[:, : tree.prefix].sum(0)
            dk, dv = (x[:, x.shape[1] - own_length :].reshape(n * own_length, G, -1) for x in (dk, dv))
            parts.append((_rows(dq, H), dk, dv))
        T = q.shape[0]
        dq, dk, dv = (_in_order(tree, [p[j] for p in parts], T) for j in range(3))
        dk[: tree.prefix] += dk_prefix
        dv[: tree.prefix] += dv_prefix
        return (
            dq.mul_(ctx.scaling).transpose(0, 1)[None],
            dk.transpose(0, 1)[None],
            dv.transpose(0, 1)[None],
            None,
            None,
        )


def _heads(x: Tensor, groups: int) -> Tensor:
    """(n, L, H, D) -> (n · G, H / G, L, D)."""
    n, L, H, D = x.shape
    return x.transpose(1, 2).reshape(n * groups, H // groups, L, D)


def _rows(x: Tensor, heads: int) -> Tensor:
    """(n · G, R, L, D) -> (n · L, H, D)."""
    L, D = x.shape[2:]
    return x.view(-1, heads, L, D).transpose(1, 2).reshape(-1, heads, D)


def _operands(tree: _Tree, q: Tensor, k: Tensor, v: Tensor, groups: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For the prefix, if there is one, and each group of branches: what `_forward` takes."""
    if tree.prefix:
        yield _heads(q[: tree.prefix][None], groups), _keys(k[: tree.prefix][None]), _keys(v[: tree.prefix][None])
    for group in tree.groups:
        n, L = group.branches, group.length
        own = [x.index_select(0, group.index).view(n, L, *x.shape[1:]) for x in (q, k, v)]
        if tree.prefix:
            heads = [x[: tree.prefix].expand(n, *x[: tree.prefix].shape) for x in (k, v)]
            own = [own[0], torch.cat([heads[0], own[1]], dim=1), torch.cat([heads[1], own[2]], dim=1)]
        yield _heads(own[0], groups), _keys(own[1]), _keys(own[2])


def _keys(x: Tensor) -> Tensor:
    """(n, S, G, D) -> (n · G, S, D)."""
    n, S, G, D = x.shape
    return x.transpose(1, 2).reshape(n * G, S, D)


def _in_order(tree: _Tree, parts: list[Tensor], tokens: int) -> Tensor:
    """The prefix's and the groups' rows in the order of the tree's row: (T, ..., D)."""
    if not tree.groups:
        return parts[0]
    first = parts[: 1 if tree.prefix else 0]
    groups = torch.cat(parts[len(first) :]) if len(parts) - len(first) > 1 else parts[-1]
    return torch.cat([*first, groups.index_select(0, tree.back)])


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """query (B, H, T, D), key and value (B, G, T, D), G dividing H; token i sees tokens 0 to i -> (B, T, H, D)."""
    result: Tensor = CausalAttention.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
    return result


def tree_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, lengths: Tensor) -> Tensor:
    """query (1, H, T, D), key and value (1, G, T, D), a tree of `lengths` (1 + n, prefix first) -> (1, T, H, D)."""
    tree = getattr(lengths, "planned", None)  # the same tensor comes to every layer
    if tree is None:
        tree = plan_tree(lengths.flatten().tolist())
        lengths.planned = tree  # type: ignore[attr-defined]
    result: Tensor = TreeAttention.apply(query, key, value, scaling, tree)  # type: ignore[no-untyped-call]
    return result


def is_tree(mask: Any) -> TypeGuard[Tensor]:
    """True for a tree's lengths in the place of a mask: whole numbers, (1, 1, 1, 1 + n)."""
    return isinstance(mask, Tensor) and mask.dtype == torch.long and mask.shape[:3] == (1, 1, 1)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: (B, H, T, D) -> (B, T, H, D). Whatever is not plain causal or a tree goes to torch's."""
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and not dropout and query.shape[2] == key.shape[2]:
        return causal_attention(query, key, value, _scaling(query, scaling)), None
    return trees_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def trees_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `attention_forward`, but plain causal rows go to torch's attention as well."""
    scaling = _scaling(query, scaling)
    if is_tree(attention_mask):
        return tree_attention(query, key, value, scaling, attention_mask), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )[0]
    return out, None


def _scaling(query: Tensor, scaling: float | None) -> float:
    return float(query.shape[-1] ** -0.5) if scaling is None else scaling
