"""The examples of a data file: rows chosen, encoded, split into those to train on and those held out, packed, and counted.

    records -> conversations -> encoded rows -> train | held out -> blocks or windows (the strategies)

Rows are split before they are packed, so that what is held out is the same rows whatever the strategy. Examples are kept in a
memory-mapped Arrow file, so their number is not limited by memory. Not here: how one row is encoded (`encoding.py`), batches, models.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.artifact import disk_errors
from phinetune.data.blocks import make_blocks
from phinetune.data.encoding import (
    MASKED,
    ChatEncoder,
    Example,
    encode_conversation,
    encode_raw,
    first_learned,
    learn_all,
)
from phinetune.data.ledger import Ledger
from phinetune.data.messages import Conversation, DataConfig, read_conversations
from phinetune.data.sources import chosen_rows, data_source
from phinetune.errors import DataError, ModelError
from phinetune.events import Note, OnEvent, Progress, log_event

__all__ = [
    "MASKED",
    "ChatEncoder",
    "Example",
    "Examples",
    "Ledger",
    "encode_conversation",
    "first_learned",
    "load_examples",
    "split_indices",
    "training_prompts",
    "write_examples",
]


class Examples(Sequence[dict[str, Any]]):
    """A memory-mapped table of examples; `subset` gives views by index. Items have the fields of `Example`.

    The file goes when the last view of it goes.
    """

    def __init__(self, table: Any, folder: tempfile.TemporaryDirectory[str]) -> None:
        self.table, self._folder = table, folder

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return self.table[index]

    def subset(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in that order."""
        return Examples(self.table.select(indices), self._folder)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return list(self.table["length"])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that attends to itself: of the longest example, or segment of a packed one."""
        parts = zip(self.table["segments"], self.table["length"], strict=True)
        return max((max(segments, default=length) for segments, length in parts), default=0)


def write_examples(examples: Iterable[Example]) -> Examples:
    """`examples` in a temporary Arrow file, memory-mapped."""
    from datasets import Dataset, Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    folder = tempfile.TemporaryDirectory(prefix="phinetune-")
    ids = Sequence(Value("int32"))
    columns = {
        "input_ids": ids,
        "labels": ids,
        "prompt_length": Value("int32"),
        "completion": Value("string"),
        "place": Value("string"),
        "segments": ids,
    }
    file = Path(folder.name) / "examples.arrow"
    writer = ArrowWriter(path=str(file), features=Features({**columns, "length": Value("int32")}))
    with disk_errors(file):
        for example in examples:
            writer.write({**asdict(example), "length": len(example.input_ids)})
        writer.finalize()
    return Examples(Dataset.from_file(str(file)), folder)


def load_examples(
    config: DataConfig, encoder: ChatEncoder, on_event: OnEvent = log_event, as_rows: bool = False
) -> tuple[Examples, Examples, Ledger]:
    """(train, test, ledger) of the rows that `config` names: blocks or windows where its strategy makes such.

    as_rows: every row an example of its own, for scoring answers; the same rows are held out. Raises DataError for data that cannot be
    read, faulty rows, or when nothing is left to learn from.
    """
    ledger, keys = Ledger(selection=_selection(config)), list[bytes]()
    if config.max_length and config.max_length > encoder.max_length:
        on_event(Note(f"data: max_length is {encoder.max_length}, the model's context, not {config.max_length}"))
    limit = min(config.max_length or encoder.max_length, encoder.max_length)
    joiner = encoder.tokenize(config.joiner) if config.joiner else []
    reading = _Reading(config, encoder, limit, joiner, as_rows, ledger, keys)
    examples = write_examples(reading.examples(on_event))
    ledger.used = len(examples)
    if not ledger.used:
        raise _nothing_left(config, ledger, limit)
    sides = split_indices(keys, config.test_fraction, config.seed)
    ledger.train, ledger.test = (len(side) for side in sides)
    if not sides[1] and config.test_fraction > 0:
        on_event(Note("data: nothing is held out, all rows have the same prompt", warning=True))
    train, test = (examples.subset(side) for side in sides)
    if as_rows:
        train, test = (_askable(side, encoder.max_length, on_event) for side in (train, test))
    elif config.strategy != "rows":
        train, test = reading.packed(train), reading.packed(test)
        _count_blocks(config, limit, ledger, train, test)
    if not len(train) and not as_rows:
        raise DataError(
            f"{config.path}: nothing in it is learned: no block holds a token to learn", "raise data.max_length"
        )
    return train, test, ledger


def _selection(config: DataConfig) -> str:
    parts = [f"rows {config.rows}"] if config.rows is not None else []
    drawn = f", drawn with seed {config.draw}" if config.draw is not None else ""
    return ", ".join(parts + ([f"at most {config.max_rows} rows{drawn}"] if config.max_rows is not None else []))


def _nothing_left(config: DataConfig, ledger: Ledger, limit: int) -> DataError:
    if ledger.empty == ledger.rows:
        return DataError(
            f"{config.path}: in all {ledger.rows} rows the fields of data.text are blank", "check data.text"
        )
    what = f"all {ledger.rows} rows are" if not ledger.empty else f"the {ledger.too_long} rows that are not blank are"
    return DataError(
        f"{config.path}: {what} longer than max_length ({limit} tokens)", "raise data.max_length, or shorten the rows"
    )


def _askable(examples: Examples, context: int, on_event: OnEvent) -> Examples:
    """The rows whose prompt leaves room in the model's context; a training that splits rows takes longer ones, too."""
    fits = [i for i, length in enumerate(examples.table["prompt_length"]) if length < context]
    if left_out := len(examples) - len(fits):
        on_event(Note(f"data: {left_out} rows are not scored: their prompt fills the model's context", warning=True))
    return examples.subset(fits) if left_out else examples


def _count_blocks(config: DataConfig, limit: int, ledger: Ledger, train: Examples, test: Examples) -> None:
    ledger.blocks, ledger.held_out_blocks = len(train), len(test)
    ledger.last_block = train.lengths[-1] if len(train) else 0
    ledger.layout = {
        "join": f"blocks of at most {limit} tokens, in which each row sees itself only",
        "sliding-window": f"windows of {limit} tokens every {config.stride} tokens of one stream",
    }[config.strategy]
    if config.attend_across:
        ledger.layout = f"blocks of {limit} tokens of one stream, in which rows see those before them"
    ledger.tokens = sum(train.lengths) + sum(test.lengths)
    ledger.supervised_tokens = sum(
        label != MASKED for side in (train, test) for labels in side.table["labels"] for label in labels
    )


def training_prompts(config: DataConfig, encoder: ChatEncoder, file: Path) -> Iterator[str]:
    """The prompt of each row of `file` as the model got it, ready for the tokenizer; of texts without a prompt, their beginning."""
    for conversation in read_conversations(chosen_rows(config, file), config):
        if config.chat:
            yield encoder.render(conversation.messages[:-1], add_generation_prompt=True)
        elif conversation.messages:
            prompt, completion = (message["content"] for message in conversation.messages)
            yield prompt if prompt.strip() else (prompt + completion)[:_PROBED]


_PROBED = 1000  # characters of a text


@dataclass
class _Reading:
    """Rows to examples, with what becomes of each counted in `ledger`, and in `keys` what must not come on both sides of the split."""

    config: DataConfig
    encoder: ChatEncoder
    limit: int
    joiner: list[int]
    as_rows: bool
    ledger: Ledger
    keys: list[bytes]

    def examples(self, on_event: OnEvent) -> Iterator[Example]:
        """The example of every row that is used."""
        ledger, answers = self.ledger, dict[bytes, set[bytes]]()
        file = data_source(self.config, on_event)
        for conversation in read_conversations(chosen_rows(self.config, file), self.config):
            ledger.rows += 1
            if ledger.rows % 500 == 0:
                on_event(Progress("reading data", ledger.rows))
            if not conversation.messages:
                ledger.empty += 1
                continue
            try:
                encoded, known = self.encode(conversation)
            except ModelError as error:
                raise DataError(f"{conversation.place}: {error.problems[0]}", error.hint) from None
            example = self.fitted(encoded)
            if example is None:
                ledger.too_long += 1
                ledger.too_long_places += [encoded.place] if ledger.too_long <= 5 else []
                continue
            # of a text without a prompt, the text itself is what must not come on both sides
            self.keys.append(_digest(encoded.input_ids[:known] if known else encoded.input_ids))
            if example.prompt_length:
                prompt, answer = _digest(encoded.input_ids[: example.prompt_length]), _digest(example.completion)
            else:
                prompt = answer = self.keys[-1]
            seen = answers.setdefault(prompt, set())
            ledger.duplicates += answer in seen
            ledger.contradictions += answer not in seen and len(seen) == 1
            seen.add(answer)
            ledger.unclosed += example is encoded and not _closed(example, self.encoder)
            ledger.tokens += len(example.input_ids)
            ledger.supervised_tokens += sum(label != MASKED for label in example.labels)
            if self.config.text is None:
                content = self.encoder.tokenize(conversation.messages[-1]["content"])
                ledger.cut_at_stop_token += any(token in self.encoder.stop_ids for token in content)
            yield example

    def encode(self, conversation: Conversation) -> tuple[Example, int]:
        """(the whole row's example, the tokens of its first prompt)."""
        if self.config.chat:
            example, split, last_only = encode_conversation(conversation, self.encoder)
            self.ledger.last_turn_only += last_only
            known = first_learned(example.labels)
        else:
            example, split = encode_raw(conversation, self.encoder, whole=self.config.text is not None)
            known = example.prompt_length
        self.ledger.split_at_border += split
        return (learn_all(example) if self.config.learn_prompt else example), known

    def fitted(self, example: Example) -> Example | None:
        """`example` if it fits or will be split, cut if that was asked for, else None. A piece of an answer is never learned alone."""
        room = self.limit - len(self.joiner) * (self.config.strategy == "join")
        over = len(example.input_ids) - room
        stream = self.config.strategy == "sliding-window" or self.config.attend_across
        if over <= 0 or stream or (self.config.strategy == "join" and self.config.learn_prompt):
            return example
        if self.config.too_long == "drop" or not any(label != MASKED for label in example.labels[:room]):
            return None
        if self.as_rows:  # what is asked for is the answer, which must be whole to be compared
            return example
        self.ledger.cut += 1
        self.ledger.cut_tokens += over
        return replace(example, input_ids=example.input_ids[:room], labels=example.labels[:room])

    def packed(self, rows: Examples) -> Examples:
        """`rows` as blocks or windows."""
        return write_examples(make_blocks(rows, self.config, self.limit, self.joiner, self.ledger))


def _closed(example: Example, encoder: ChatEncoder) -> bool:
    """The token that ends the (last) answer is learned."""
    return bool(example.labels) and example.labels[-1] in encoder.stop_ids


def _digest(value: object) -> bytes:
    return hashlib.sha256(str(value).encode()).digest()[:12]


def split_indices(groups: Sequence[bytes], test_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out, each in file order. Equal groups (prompts) fall on the same side, so nothing leaks.

    Groups are taken in the order of their hash with `seed`, so that more rows in the file hardly move the others. A group that would
    overshoot the wanted number is passed over. At least one example is held out if `test_fraction` is above zero and a group fits.
    """
    members: dict[bytes, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    wanted = round(len(groups) * test_fraction)
    if test_fraction > 0:
        wanted = min(max(wanted, 1), len(groups) - 1)
    test: list[int] = []
    for group in sorted(members, key=lambda g: hashlib.sha256(b"%d:" % seed + g).digest()):
        if len(test) + len(members[group]) <= wanted:
            test += members[group]
    chosen = set(test)
    return [i for i in range(len(groups)) if i not in chosen], sorted(test)
