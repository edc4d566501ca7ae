"""From a conversation to token ids with labels: only what the assistant says is learned, up to and including its stop token.

    <|im_start|>user ... <|im_end|>  <|im_start|>assistant  joy <|im_end|>
    └──────────── label -100 ───────────────────────────┘  └─ learned ──┘

The rule that matters: the ids before an answer are exactly the ids that a runtime gets when it tokenizes the rendered prompt. A
tokenizer may join characters across that border when it sees the whole text; then prompt and answer are tokenized apart, as at run
time. Examples are kept in a memory-mapped Arrow file, so their number is not limited by memory. Not here: batches, models.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from phinetune.artifact import disk_errors
from phinetune.data.messages import Conversation, DataConfig, Message, read_conversations
from phinetune.data.records import data_file, read_records
from phinetune.errors import DataError, ModelError
from phinetune.events import Note, OnEvent, Progress, log_event

MASKED = -100
"""Label of a token that is not learned."""


class ChatEncoder(Protocol):
    """What the data layer needs of a tokenizer with its prompt contract."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def max_length(self) -> int: ...
    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str: ...
    def tokenize(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Example:
    """Token ids, their labels (-100 where masked), and what evaluation needs: where the last answer starts, and its text."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    completion: str
    place: str


@dataclass
class Ledger:
    """What became of every row: nothing is dropped in silence."""

    rows: int = 0
    used: int = 0
    train: int = 0
    test: int = 0
    too_long: int = 0
    too_long_places: list[str] = field(default_factory=list)
    duplicates: int = 0
    contradictions: int = 0
    split_at_border: int = 0
    last_turn_only: int = 0
    cut_at_stop_token: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def lines(self) -> list[str]:
        """The ledger for people: one line, and one more for each thing that deserves a look."""
        lines = [
            f"data: {self.rows} rows, {self.train} to train on, {self.test} held out; {self.supervised_tokens} of {self.tokens} tokens are learned"
        ]
        if self.too_long:
            lines.append(
                f"data: {self.too_long} rows are longer than max_length and left out: {', '.join(self.too_long_places)}{' ...' if self.too_long > 5 else ''}"
            )
        if self.duplicates:
            lines.append(
                f"data: {self.duplicates} rows repeat an earlier row (prompt and answer); all are kept, on the same side of the split"
            )
        if self.contradictions:
            lines.append(f"data: {self.contradictions} prompts come with different answers")
        if self.last_turn_only:
            lines.append(
                f"data: in {self.last_turn_only} conversations only the last answer is learned: the chat template rewrites earlier turns"
            )
        if self.cut_at_stop_token:
            lines.append(
                f"data: {self.cut_at_stop_token} answers hold a stop token of the model in their text and are learned up to it"
            )
        return lines


def encode_conversation(conversation: Conversation, encoder: ChatEncoder) -> tuple[Example, bool, bool]:
    """The example of one conversation; whether a border had to be split; whether only its last answer could be learned."""
    messages = conversation.messages
    text = encoder.render(messages, add_generation_prompt=False)
    ids = encoder.tokenize(text)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            span = _answer_span(messages, index, text, ids, encoder)
            if span is None or (spans and span[0] < spans[-1][1]):  # an answer that no stop token closes
                break
            spans.append(span)
    else:
        end = spans[-1][1]
        labels = [MASKED] * end
        for start, stop in spans:
            labels[start:stop] = ids[start:stop]
        return Example(ids[:end], labels, spans[-1][0], messages[-1]["content"], conversation.place), False, False
    # The tokenizer joined text across a border, or the template is not a prefix of itself: prompt and last answer apart.
    prompt = encoder.render(messages[:-1], add_generation_prompt=True)
    answer = (text[len(prompt) :] if text.startswith(prompt) else "") or messages[-1]["content"]
    prompt_ids, answer_ids = encoder.tokenize(prompt), encoder.tokenize(answer)
    answer_ids = answer_ids[: _stop_end(answer_ids, 0, encoder)]
    if answer_ids[-1] not in encoder.stop_ids:
        answer_ids = [*answer_ids, encoder.stop_ids[0]]
    several = sum(m["role"] == "assistant" for m in messages) > 1
    labels = [MASKED] * len(prompt_ids) + answer_ids
    return (
        Example(prompt_ids + answer_ids, labels, len(prompt_ids), messages[-1]["content"], conversation.place),
        True,
        several,
    )


def _answer_span(
    messages: Sequence[Message], index: int, text: str, ids: list[int], encoder: ChatEncoder
) -> tuple[int, int] | None:
    """[start, stop) of answer `index` in `ids`, its stop token included; None if `ids` does not begin with the ids of its prompt."""
    prompt = encoder.render(messages[:index], add_generation_prompt=True)
    if not text.startswith(prompt):
        return None
    prompt_ids = encoder.tokenize(prompt)
    start = len(prompt_ids)
    if ids[:start] != prompt_ids or start >= len(ids):
        return None
    stop = _stop_end(ids, start, encoder)
    return (start, stop) if ids[stop - 1] in encoder.stop_ids else None


def _stop_end(ids: list[int], start: int, encoder: ChatEncoder) -> int:
    """One past the first stop token at or after `start`, or the length of `ids`."""
    return next((i + 1 for i in range(start, len(ids)) if ids[i] in encoder.stop_ids), len(ids))


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
    }
    file = Path(folder.name) / "examples.arrow"
    writer = ArrowWriter(path=str(file), features=Features({**columns, "length": Value("int32")}))
    with disk_errors(file):
        for example in examples:
            writer.write({**asdict(example), "length": len(example.input_ids)})
        writer.finalize()
    return Examples(Dataset.from_file(str(file)), folder)


def load_examples(
    config: DataConfig, encoder: ChatEncoder, on_event: OnEvent = log_event
) -> tuple[Examples, Examples, Ledger]:
    """(train, test, ledger) of the file that `config` names.

    Raises DataError for a file that cannot be read, faulty rows, or when nothing is left to learn from.
    """
    ledger = Ledger()
    groups: list[bytes] = []
    limit = min(config.max_length or encoder.max_length, encoder.max_length)
    examples = write_examples(_encode_all(config, encoder, limit, ledger, groups, on_event))
    ledger.used = len(examples)
    if not ledger.used:
        raise DataError(
            f"{config.path}: all {ledger.rows} rows are longer than max_length ({limit} tokens)",
            "raise data.max_length, or shorten the rows",
        )
    train, test = split_indices(groups, config.test_fraction, config.seed)
    ledger.train, ledger.test = len(train), len(test)
    if not test and config.test_fraction > 0:
        on_event(Note("data: nothing is held out, all rows have the same prompt", warning=True))
    return examples.subset(train), examples.subset(test), ledger


def _encode_all(
    config: DataConfig, encoder: ChatEncoder, limit: int, ledger: Ledger, groups: list[bytes], on_event: OnEvent
) -> Iterator[Example]:
    """Every example that is not too long; `ledger` counts, and `groups` gets the key of each one's first prompt."""
    answers: dict[bytes, set[bytes]] = {}
    for conversation in read_conversations(read_records(data_file(config.path)), config):
        ledger.rows += 1
        if ledger.rows % 500 == 0:
            on_event(Progress("reading data", ledger.rows))
        try:
            example, split, last_only = encode_conversation(conversation, encoder)
        except ModelError as error:
            raise DataError(f"{conversation.place}: {error.problems[0]}", error.hint) from None
        ledger.split_at_border += split
        ledger.last_turn_only += last_only
        if len(example.input_ids) > limit:
            ledger.too_long += 1
            ledger.too_long_places += [example.place] if ledger.too_long <= 5 else []
            continue
        groups.append(_digest(example.input_ids[: first_learned(example.labels)]))
        prompt, answer = _digest(example.input_ids[: example.prompt_length]), _digest(example.completion)
        known = answers.setdefault(prompt, set())
        ledger.duplicates += answer in known
        ledger.contradictions += answer not in known and len(known) == 1
        known.add(answer)
        ledger.tokens += len(example.input_ids)
        ledger.supervised_tokens += sum(label != MASKED for label in example.labels)
        content = encoder.tokenize(conversation.messages[-1]["content"])
        ledger.cut_at_stop_token += any(token in encoder.stop_ids for token in content)
        yield example


def first_learned(labels: Sequence[int]) -> int:
    """Index of the first label that is not masked, or the length of `labels`."""
    return next((i for i, label in enumerate(labels) if label != MASKED), len(labels))


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
