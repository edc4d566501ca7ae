"""The order of one epoch: which examples meet in a batch. Every example once, the same in every process, from (seed, epoch) alone.

    random             a permutation
    sequential         as in the file
    group_by_length    a permutation, cut into stretches of at most 50 batches, each sorted by length
    group_by_prefix    examples whose prompts begin alike (`prefixes.py`) meet; what fills no batch joins the next groups'
    auto               random, unless another order saves a named share of the work by the estimate that also chooses layouts

Grouped batches come in random order, but for two: the longest example is in the first, so that want of memory shows at once, and what
fills no batch is at the end, so that the others stay as they were made. A batch is what one process computes at once: a micro-batch,
where gradients are accumulated. Not here: how a batch is laid out (`batches.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from phinetune.data.batches import Collator, batch_work
from phinetune.data.prefixes import WORTH, PromptHeads, file_rows, prompt_heads
from phinetune.events import Note, OnEvent, log_event

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Way = Literal["random", "sequential", "group_by_length", "group_by_prefix"]
WAYS = ("auto", "random", "sequential", "group_by_length", "group_by_prefix")
"""Values of training_config.train_sampling_strategy that are made here."""
_STRETCH = 50  # batches sorted by length at a time
_SAMPLE = 2000  # batches that an estimate looks at


def epoch_order(
    lengths: Sequence[int] | NDArray[np.int64],
    prefixes: Sequence[int] | NDArray[np.int64] | None,
    batch_size: int,
    seed: int,
    epoch: int,
    how: Way,
) -> list[int]:
    """The indices of all examples, each once, to be cut into batches of `batch_size` (the last may be shorter).

    lengths: tokens of each example. prefixes: a group number for each (`PromptHeads.groups`), neighbouring numbers beginning alike;
    None: all are one group.
    """
    import numpy as np

    sizes = np.asarray(lengths, np.int64)
    count = len(sizes)
    if how == "sequential":
        return list(range(count))
    draw = np.random.default_rng([seed % 2**32, epoch])
    order: NDArray[np.int64] = draw.permutation(count)
    if how == "random":
        return list(map(int, order.tolist()))
    if how == "group_by_length":
        few = count // batch_size // 4  # a quarter at most, so that batches are mixed anew in each epoch
        stretch = batch_size * max(4, min(few, _STRETCH))
        order = order[np.lexsort((-sizes[order], np.arange(count) // stretch))]
    else:
        groups = np.zeros(count, np.int64) if prefixes is None else np.asarray(prefixes, np.int64)
        order = order[np.argsort(groups[order], kind="stable")]  # shuffled within each group
        _, starts, members = np.unique(groups[order], return_index=True, return_counts=True)
        place = np.arange(count) - np.repeat(starts, members)  # in its group
        fills = place < np.repeat(members - members % batch_size, members)
        order = np.concatenate((order[fills], order[~fills]))
    whole = count - count % batch_size
    batches = order[:whole].reshape(-1, batch_size)
    batches = batches[draw.permutation(len(batches))]
    if len(batches):
        longest = int(sizes[batches].max(1).argmax())
        batches[[0, longest]] = batches[[longest, 0]]
    return list(map(int, np.concatenate((batches.ravel(), order[whole:])).tolist()))


class EpochOrder:
    """A sampler for a DataLoader: its items are `epoch_order` of the epoch that was set last."""

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        prefixes: Sequence[int] | NDArray[np.int64] | None,
        batch_size: int,
        seed: int,
        how: Way,
    ) -> None:
        self.lengths, self.prefixes, self.batch_size, self.seed, self.how = lengths, prefixes, batch_size, seed, how
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.lengths, self.prefixes, self.batch_size, self.seed, self.epoch, self.how))


@dataclass(frozen=True)
class OrderPlan:
    """What an order is made from. `how` is one of WAYS."""

    table: Any  # datasets.Dataset with input_ids, labels, length and segments
    how: str
    seed: int
    collator: Collator

    def order(self, batch_size: int, on_event: OnEvent = log_event) -> EpochOrder:
        """The order for batches of `batch_size`; what "auto" takes is said, and what it saves."""
        import numpy as np

        how, groups, heads = self.how, None, None
        file, rows = file_rows(self.table)
        lengths: NDArray[np.int64] = file.column("length").to_numpy().astype(np.int64)[rows]
        packed = file.column("segments").combine_chunks().value_lengths().to_numpy().any()  # full already, each a batch
        if how == "auto" and (batch_size == 1 or len(lengths) <= batch_size or packed):
            how = "random"
        if how == "group_by_prefix" or (how == "auto" and self.collator.layout != "padded"):
            heads = prompt_heads(self.table)
            groups = heads.groups(batch_size)
        if how == "auto":
            how = self._cheapest(lengths, heads, groups, batch_size, on_event)
        elif how == "group_by_prefix" and groups is not None:
            reason = "no prompts begin alike in a way that saves work" if not groups.any() else ""
            reason = "the layout is padded, which shares no prefix" if self.collator.layout == "padded" else reason
            if reason:
                on_event(
                    Note(f"training_config.train_sampling_strategy: group_by_prefix saves nothing, {reason}", True)
                )
        return EpochOrder(lengths, groups if how == "group_by_prefix" else None, batch_size, self.seed, cast(Way, how))

    def _cheapest(
        self,
        lengths: NDArray[np.int64],
        heads: PromptHeads | None,
        groups: NDArray[np.int64] | None,
        batch_size: int,
        on_event: OnEvent,
    ) -> Way:
        ways: list[Way] = ["group_by_length"]
        if groups is not None and groups.any():
            ways.append("group_by_prefix")
        work = {way: self._work(lengths, heads, groups, batch_size, way) for way in ("random", *ways)}
        saves = {way: 1 - work[way] / work["random"] for way in ways}
        best = max(ways, key=lambda way: saves[way])
        batches = len(lengths) // batch_size
        sampled = f", estimated on {_SAMPLE:,} of {batches:,} batches" if batches > _SAMPLE else ""
        if saves[best] >= WORTH:
            on_event(
                Note(f"training: batches {_SAID[best]}, {saves[best]:.0%} less to compute than in random ones{sampled}")
            )
            return best
        shares = " and ".join(f"{_SAID[way]} would save {max(saves[way], 0):.0%}" for way in ways)
        on_event(Note(f"training: batches in random order, those {shares} of the work{sampled}"))
        return "random"

    def _work(
        self,
        lengths: NDArray[np.int64],
        heads: PromptHeads | None,
        groups: NDArray[np.int64] | None,
        batch_size: int,
        how: Way,
    ) -> float:
        """Estimated work of the first epoch's full batches; of many, of a seeded sample."""
        import numpy as np

        order = np.asarray(epoch_order(lengths, groups, batch_size, self.seed, 0, how))
        batches = order[: len(order) - len(order) % batch_size].reshape(-1, batch_size)
        if len(batches) > _SAMPLE:
            batches = batches[np.random.default_rng(0).choice(len(batches), _SAMPLE, replace=False)]
        prefixes = heads.shared(batches).tolist() if heads is not None else [0] * len(batches)
        rows = zip(lengths[batches].tolist(), prefixes, strict=True)
        how_laid = self.collator.hidden_size, self.collator.layout, self.collator.dense
        return sum(batch_work(row, prefix, *how_laid)[1] for row, prefix in rows)


_SAID = {"group_by_length": "grouped by length", "group_by_prefix": "grouped by prefix"}
