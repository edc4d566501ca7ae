"""From rows to blocks and windows of at most L tokens: the corpus strategies.

    join                  | row 1 | row 2 |row 3|        a block is a micro-batch of its rows: each sees itself only, positions restart
    join, attend_across   one stream, cut every L tokens; a row sees those before it in its block
    sliding-window        one stream, a window every `stride` tokens; what a window shares with the one before is masked

In a row that is split over pieces (join), each piece after the first begins with the last token of the one before, so that every token
is predicted once. Streams are walked with L tokens in memory. The last, shorter block or window is kept. Not here: reading and
encoding rows, layouts of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from phinetune.data.encoding import MASKED, Example
from phinetune.data.ledger import Ledger
from phinetune.data.messages import DataConfig

Row = tuple[list[int], list[int], str]
"""Token ids, labels, place."""


def make_blocks(
    rows: Iterable[dict[str, Any]], config: DataConfig, length: int, joiner: Sequence[int], ledger: Ledger
) -> Iterator[Example]:
    """The blocks or windows of `rows` (items with input_ids, labels, place), each of at most `length` tokens, in order.

    `joiner` are the ids put after each row. `ledger` counts rows that are split, their pieces, and what is left out.
    """
    stream = config.strategy == "sliding-window" or config.attend_across

    def joined() -> Iterator[Row]:
        for row in rows:
            # in a stream even a row's first token has one before it that predicts it
            labels = row["input_ids"] if stream and config.learn_prompt else row["labels"]
            yield [*row["input_ids"], *joiner], [*labels, *joiner], row["place"]

    if config.strategy == "sliding-window":
        return _windows(joined(), length, config.stride or length, ledger)
    return _windows(joined(), length, length, ledger) if config.attend_across else _packed(joined(), length, ledger)


def _packed(rows: Iterable[Row], length: int, ledger: Ledger) -> Iterator[Example]:
    """Rows packed in order, a row that does not fit into the rest of a block begins the next one."""
    ids: list[int] = []
    labels: list[int] = []
    segments: list[int] = []
    place = ""
    for piece_ids, piece_labels, piece_place in _pieces(rows, length, ledger):
        if len(ids) + len(piece_ids) > length and segments:
            yield Example(ids, labels, 0, "", place, segments)
            ids, labels, segments = [], [], []
        place = piece_place if not segments else place
        ids, labels, segments = ids + piece_ids, labels + piece_labels, [*segments, len(piece_ids)]
    if segments:
        yield Example(ids, labels, 0, "", place, segments)


def _pieces(rows: Iterable[Row], length: int, ledger: Ledger) -> Iterator[Row]:
    """Each row, or its pieces of `length` tokens, as far as anything is learned in them."""
    for ids, labels, place in rows:
        starts = range(0, max(len(ids) - 1, 1), length - 1) if len(ids) > length else range(1)
        ledger.split += len(starts) > 1
        ledger.pieces += len(starts) if len(starts) > 1 else 0
        for start in starts:
            learned = [MASKED, *labels[start + 1 : start + length]]
            if any(label != MASKED for label in learned):
                yield ids[start : start + length], learned, place
            else:
                ledger.without_learned += 1


def _windows(rows: Iterable[Row], length: int, stride: int, ledger: Ledger) -> Iterator[Example]:
    """Windows of `length` tokens every `stride` tokens of the stream of all rows."""
    ids: list[int] = []  # what of the stream is in memory; the window at hand begins at `at`
    labels: list[int] = []
    places: list[tuple[int, str]] = []  # where in `ids` each row begins
    at = known = 0  # `known` tokens at the start of the window were learned in an earlier one

    def window() -> Iterator[Example]:
        masked = max(known, 1)
        kept = [MASKED] * masked + labels[at + masked : at + length]
        if any(label != MASKED for label in kept):
            place = next(place for start, place in reversed(places) if start <= at)
            yield Example(ids[at : at + length], kept, 0, "", place)
        elif len(kept) > masked:
            ledger.without_learned += 1

    for row_ids, row_labels, place in rows:
        ids, labels, at = ids[at:] + row_ids, labels[at:] + row_labels, 0
        places.append((len(ids) - len(row_ids), place))
        while len(ids) - at >= length:
            yield from window()
            at, known = at + stride, length - stride
        places = [(start - at, p) for start, p in places]
        begun = [i for i, (start, _) in enumerate(places) if start <= 0]
        places = places[begun[-1] :]
    if len(ids) - at > known:
        places = [(start + at, p) for start, p in places]
        yield from window()
