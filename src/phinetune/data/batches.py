"""From examples to one batch of tensors, laid out so that little is computed twice or in vain.

`padded`: one row an example, filled up on the right. No attention mask is needed: a causal model never looks right, and what stands
on the padding has no label.

`tree`: all examples in one row, with the prefix that their prompts share computed once.

    position   0 1 2 3 | 4 5 6   | 4 5        prefix | branch of example 0 | branch of example 1
    may see    prefix  | prefix + own branch | prefix + own branch          (`tree`: the lengths 4, 3, 2)

Every token sees exactly the tokens it would see alone, at the same positions, so the loss is that of the padded batch and so is the
gradient: the prefix's is the sum over the branches. With nothing shared this is padding-free batching. Which layout is used is
decided per batch by an estimate of the work. Not here: which examples meet in a batch (`order.py`), the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from phinetune.data.encoding import MASKED, first_learned

if TYPE_CHECKING:
    import torch

Layout = Literal["auto", "padded", "tree"]


def shared_prefix(rows: Sequence[dict[str, Any]]) -> int:
    """How many leading tokens all rows have in common, short of the token that predicts any row's first learned token."""
    first = rows[0]["input_ids"]
    limit = min(first_learned(row["labels"]) - 1 for row in rows)
    length = 0
    while length < limit and all(row["input_ids"][length] == first[length] for row in rows):
        length += 1
    return length


def segments(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with each packed block replaced by its segments, which are rows of their own: they do not see each other."""
    apart: list[dict[str, Any]] = []
    for row in rows:
        start = 0
        for length in row.get("segments") or [len(row["input_ids"])]:
            apart.append({key: row[key][start : start + length] for key in ("input_ids", "labels")})
            start += length
    return apart


def batch_work(
    lengths: Sequence[int], prefix: int, hidden_size: int, layout: Layout = "auto", dense: bool = False
) -> tuple[Literal["padded", "tree"], float]:
    """(the layout for a batch, its work) if rows of `lengths` tokens share their first `prefix`; "auto" takes the one with less work.

    The work is an estimate for one decoder layer of width h, in multiply-adds per hidden unit, so that batches and orders of examples
    can be compared. T is the longest row, w = T - prefix the longest branch, B the number of rows:

        padded   B·T tokens               x 12 h   +   2 B·T²                     every token looks at its row
        tree     prefix + sum of own      x 12 h   +   2 (prefix² + B·w·T)        the prefix at itself, branches at prefix and themselves,
                                                                                  each filled up to the longest
                                                   +   c (4 B·w + 2 B·prefix)     what is copied between the row and its branches

    12 h stands for the linear layers. c = 32: queries, keys, values and outputs of branches, keys and values of the prefix, each copy as
    dear as so many multiply-adds. It keeps rows that hardly differ and share next to nothing padded. In rows of one length that share
    nothing a tree saves nothing; in unequal ones it is padding-free batching. `dense` is for models whose attention knows nothing of trees:
    with a mask every token is computed with every other, 2 tokens².
    """
    rows, longest = len(lengths), max(lengths)
    padded = float(rows * longest * (12 * hidden_size + 2 * longest))
    branch = longest - prefix
    tokens = prefix + sum(lengths) - rows * prefix
    copied = 4 * rows * branch + 2 * rows * prefix
    attention = 2 * tokens**2 if dense else 2 * (prefix**2 + rows * branch * longest) + _COPY * copied
    tree = float(12 * hidden_size * tokens + attention)
    if layout == "auto":
        layout = "tree" if tree < padded else "padded"
    return (layout, tree if layout == "tree" else padded)


_COPY = 32  # multiply-adds that take as long as copying one value


@dataclass(frozen=True)
class Collator:
    """Rows with `input_ids` and `labels` -> a batch for the loss (see the module's head). `hidden_size` weighs attention against the rest.

    A packed block (a row with `segments`) is laid out as the rows it is made of. `dense` says that the model's attention takes a tree by a mask.
    `rounded`: batches are filled up so that few different numbers of tokens occur (`filled_up`).
    """

    pad_id: int
    hidden_size: int
    layout: Layout = "auto"
    dense: bool = False
    rounded: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows, layout = segments(rows), self.layout
        if layout == "auto":
            lengths = [len(row["input_ids"]) for row in rows]
            layout, _ = batch_work(lengths, shared_prefix(rows), self.hidden_size, dense=self.dense)
        make = tree_batch if layout == "tree" else padded_batch
        return make(rows, self.pad_id, self.rounded)


def filled_up(tokens: int) -> int:
    """`tokens` rounded up by at most a twelfth, to a multiple of a power of two up to 64.

    A product of a new shape costs a CPU milliseconds of compilation (oneDNN's, for each of a step's dozens of products), and processors with
    tiles take up to twice as long over a few odd rows.
    """
    step = 1 << max(0, min(6, (tokens // 12).bit_length() - 1))
    return -(-tokens // step) * step


def padded_batch(rows: Sequence[dict[str, Any]], pad_id: int, rounded: bool = False) -> dict[str, torch.Tensor]:
    """input_ids and labels, both (B, T), filled up on the right with pad_id and -100."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)
    width = -(-filled_up(len(rows) * width) // len(rows)) if rounded else width
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), width), MASKED, dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.tensor(row["input_ids"])
        labels[i, :length] = torch.tensor(row["labels"])
    return {"input_ids": input_ids, "labels": labels}


def tree_batch(rows: Sequence[dict[str, Any]], pad_id: int = 0, rounded: bool = False) -> dict[str, torch.Tensor]:
    """input_ids, labels and position_ids (1, T), and tree (1 + n): the length of the prefix, then of each branch.

    What it is filled up with is one more branch, of pad_id and without a label.
    """
    import torch

    prefix = shared_prefix(rows)
    ids, positions, labels = list(rows[0]["input_ids"][:prefix]), list(range(prefix)), [MASKED] * prefix
    lengths = [prefix]
    for row in rows:
        own = row["input_ids"][prefix:]
        ids += own
        positions += range(prefix, prefix + len(own))
        labels += [MASKED, *row["labels"][prefix + 1 :]]  # a branch's first token has no predecessor of its own
        lengths.append(len(own))
    if rounded and (filler := filled_up(len(ids)) - len(ids)):
        ids += [pad_id] * filler
        positions += range(prefix, prefix + filler)
        labels += [MASKED] * filler
        lengths.append(filler)
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
        "tree": torch.tensor(lengths),
    }
