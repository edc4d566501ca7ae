"""Which examples of a data set begin alike: prompt heads, read once, sorted, and cut into groups where that saves work.

    read    of each example the tokens that a tree may share (`batches.shared_prefix`), after those that all examples share
    sort    lexicographically: the prefix that a set of examples shares is the one of its first and its last in that order
    group   the sorted heads are a trie (by the prefix that neighbours share); from the root down, a branch becomes a group of its
            own where that saves its members a named share of their tokens, and else its members stay with what is around it

O(n log n) for n examples, in numpy but for one pass over the trie. Not here: the order of an epoch (`order.py`), tokens of answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phinetune.data.encoding import MASKED, first_learned

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_KEPT = 64 << 20  # tokens of heads held at once: 256 MB. A million examples are told apart by 64 tokens each
_READ = 1 << 20  # tokens read at once
WORTH = 0.05
"""Share of the work that a group, or an order, must save to be preferred: of orders alike, the random one learns best."""


@dataclass(frozen=True)
class PromptHeads:
    """Sorted prompt heads of n examples. `rank` (n,): place of each in the sorted order; `order` (n,): the reverse.

    `head` (n, N): the tokens, plus one, after the `common` ones that all examples begin with; 0 where a head has ended.
    """

    lengths: NDArray[np.int64]  # (n,) tokens of the whole example
    head: NDArray[np.uint32]
    common: int
    rank: NDArray[np.int64]
    order: NDArray[np.int64]

    def shared(self, batches: NDArray[np.int64]) -> NDArray[np.int64]:
        """Leading tokens that the examples of each batch share: (m, B) indices -> (m,). A prefix longer than N counts as N."""
        import numpy as np

        rank = self.rank[batches]
        rows = np.arange(len(batches))
        first, last = batches[rows, rank.argmin(1)], batches[rows, rank.argmax(1)]
        return self.common + _agreement(self.head[first], self.head[last])

    def groups(self, batch_size: int) -> NDArray[np.int64]:
        """A group number for each example, (n,): equal numbers for those that batches of `batch_size` should be made of.

        Numbers follow the sorted order, so that neighbouring groups begin alike. A group on its own fills two batches at least, so
        that its batches are not the same ones in every epoch.
        """
        import numpy as np

        count, least = len(self.lengths), max(2 * batch_size, 2)
        marks = np.zeros(count, dtype=np.int64)  # by place in the sorted order
        if self.head.shape[1] and count >= least:
            saved = 1 - 1 / batch_size  # share of a prefix that a batch of the group does not compute again
            sums = np.concatenate(([0], np.cumsum(self.lengths[self.order]))).tolist()
            root = _trie(self._neighbours().tolist(), least)
            for number, node in enumerate(_chosen(root, self.common, sums, saved), 1):
                marks[node.start : node.stop] = number  # from the outside in
        groups = np.empty(count, dtype=np.int64)
        groups[self.order] = marks
        return groups

    def _neighbours(self) -> NDArray[np.int64]:
        """(n - 1,): tokens after the common ones that example i and i + 1 of the sorted order share."""
        import numpy as np

        step = max(1, _READ // max(self.head.shape[1], 1))
        parts = [
            _agreement(self.head[self.order[i : i + step]], self.head[self.order[i + 1 : i + 1 + step]])
            for i in range(0, len(self.order) - 1, step)
        ]
        return np.concatenate(parts)


def _agreement(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> NDArray[np.int64]:
    """(m, N), (m', N) -> (min(m, m'),): columns from the left that are equal and hold a token."""
    import numpy as np

    rows = min(len(left), len(right))
    differ = (left[:rows] != right[:rows]) | (left[:rows] == 0)
    return np.where(differ.any(1), differ.argmax(1), differ.shape[1]) if differ.shape[1] else np.zeros(rows, np.int64)


# --- reading ---


def prompt_heads(table: Any) -> PromptHeads:
    """The heads of all examples in `table`, a `datasets.Dataset` with `input_ids` and `labels` and at least one row."""
    import numpy as np

    count = len(table)
    lengths, limits = np.zeros(count, np.int64), np.zeros(count, np.int64)
    one = table[0]
    first = np.asarray(one["input_ids"][: max(first_learned(one["labels"]) - 1, 0)], np.int64)
    common = len(first)
    for where, ids, labels, sizes in _rows(table, max(1, min(10_000, _READ // max(common, 1)))):
        lengths[where] = sizes
        limits[where] = np.maximum(_first_learned(labels, sizes) - 1, 0)
        agree = (_window(ids, sizes, 0, common, limits[where]) == first[:common] + 1).all(0)
        common = common if agree.all() else int(agree.argmin())
    width = max(0, min(int(limits.max()) - common, _KEPT // count))
    head, order = np.zeros((count, width), ">u4"), np.arange(count)
    if width:
        for where, ids, _, sizes in _rows(table, max(1, min(10_000, _READ // width))):
            head[where] = _window(ids, sizes, common, width, limits[where])
        order = np.argsort(
            head.view(f"S{4 * width}").ravel(), kind="stable"
        )  # as bytes, the most significant one first
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    return PromptHeads(lengths, head, common, rank, order)


def file_rows(table: Any) -> tuple[Any, NDArray[np.int64]]:
    """(the Arrow table behind a `datasets.Dataset`, the rows of it that the data set is a view of)."""
    import numpy as np

    chosen = table._indices  # None: all
    rows: NDArray[np.int64] = np.arange(len(table))
    if chosen is not None:
        rows = chosen.column(0).to_numpy().astype(np.int64)
    return table.data.table, rows


def _rows(table: Any, size: int) -> Iterator[tuple[Any, Any, Any, Any]]:
    """(where, ids, labels, number of tokens of each) of `size` rows at a time, ids and labels one row after the other.

    Rows come in the order of the file, which is many times faster than that of `table`; `where` (rows,) is their place in `table`.
    """
    import numpy as np

    file, rows = file_rows(table)
    places = np.argsort(rows, kind="stable")
    for start in range(0, len(rows), size):
        where = places[start : start + size]
        first, last = int(rows[where[0]]), int(rows[where[-1]])
        part = file.select(["input_ids", "labels"]).slice(first, last - first + 1).take(rows[where] - first)
        ids, labels = (part.column(name).combine_chunks() for name in ("input_ids", "labels"))
        sizes = np.asarray(ids.value_lengths(), np.int64)
        yield where, ids.flatten().to_numpy(), labels.flatten().to_numpy(), sizes


def _first_learned(labels: NDArray[np.int32], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index in each row of the first label that is not masked, or the row's length."""
    import numpy as np

    ends = np.cumsum(sizes)
    learned = np.append(np.flatnonzero(labels != MASKED), len(labels))
    starts = ends - sizes
    first: NDArray[np.int64] = np.minimum(learned[np.searchsorted(learned, starts)], ends) - starts
    return first


def _window(
    ids: NDArray[np.int32], sizes: NDArray[np.int64], start: int, width: int, limits: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(rows, width): tokens start to start + width of each row, plus one; 0 from the row's limit on."""
    import numpy as np

    if not len(ids):
        return np.zeros((len(sizes), width), np.int64)
    at = np.arange(start, start + width)
    places = (np.cumsum(sizes) - sizes)[:, None] + at
    inside = at < limits[:, None]
    window: NDArray[np.int64] = np.where(inside, ids[np.where(inside, places, 0)].astype(np.int64) + 1, 0)
    return window


# --- the trie ---


@dataclass
class _Node:
    """The examples `start` to `stop` of the sorted order share `depth` tokens after the common ones, and no more."""

    depth: int
    start: int
    stop: int = 0
    children: list[_Node] = field(default_factory=list)


def _trie(neighbours: Sequence[int], least: int) -> _Node:
    """The root of the trie, with those nodes only that hold `least` examples. `neighbours` (n - 1,): what i and i + 1 share.

    The nodes are the intervals of the array (Abouelhoda, Kurtz and Ohlebusch 2004, section 3), found in one pass.
    """
    stack = [_Node(0, 0)]
    for place, depth in enumerate([*neighbours, 0], 1):
        start, below = place - 1, list[_Node]()
        while stack[-1].depth > depth:
            node = stack.pop()
            node.stop, start = place, node.start
            if node.stop - node.start < least:
                below = []
            elif stack[-1].depth >= depth:
                stack[-1].children.append(node)
                below = []
            else:
                below = [node]
        if stack[-1].depth < depth:
            stack.append(_Node(depth, start, children=below))
    stack[0].stop = len(neighbours) + 1
    return stack[0]


def _chosen(root: _Node, common: int, sums: Sequence[int], saved: float) -> list[_Node]:
    """The nodes that become groups, outer ones first. `sums` (n + 1,): tokens of the first i examples of the sorted order."""
    nodes = [root]
    for node in nodes:  # grows: from the root down, without recursion
        nodes += node.children

    def cost(node: _Node, depth: int) -> float:
        """Tokens computed for the node's examples if batches share `depth` tokens after the common ones."""
        return sums[node.stop] - sums[node.start] - (node.stop - node.start) * saved * (common + depth)

    least_cost: dict[int, float] = {}
    for node in reversed(nodes):
        gains = (cost(child, node.depth) - least_cost[id(child)] for child in node.children)
        least_cost[id(node)] = cost(node, node.depth) - sum(gains)
    chosen, waiting = [], [(child, root.depth) for child in root.children]
    for node, depth in waiting:  # depth: of the group around it. Grows: outer nodes come before inner ones
        now = cost(node, depth)
        if least_cost[id(node)] > (1 - WORTH) * now:
            continue
        if cost(node, node.depth) <= (1 - WORTH) * now:
            chosen.append(node)
            depth = node.depth
        waiting += [(child, depth) for child in node.children]
    return chosen
