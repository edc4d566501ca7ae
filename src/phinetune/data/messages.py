"""From a row to a conversation: column templates, texts, prompt/completion pairs, and lists of messages in the shapes people have.

Which shape a file has is read from its first row and said; every later row must have it too. All faulty rows are collected and raised
in one error. Templates name fields (`"What is the tone of this phrase? {phrase}"`) and nothing else: no attributes, no expressions.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from phinetune.config import STRICT, parse
from phinetune.data.records import Record
from phinetune.errors import ConfigError, DataError, did_you_mean

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant" | "tool", "content": text}`"""

ROLES = ("system", "user", "assistant", "tool")
_ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    **{role: role for role in ROLES},
}
_SHOWN = 5  # faulty rows named in one error


@dataclass(frozen=True)
class DataConfig:
    """What to read, how a row becomes a conversation or a text, and how rows become examples."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    path: str
    """Data file (.jsonl, .json, .csv, .tsv, .parquet), the name of a bundled set (tone), a folder of data files, or a data set of the Hugging Face hub (owner/name)."""
    prompt: str | None = None
    """Column template of the user's turn, such as "What is the tone of this phrase? {phrase}". Default: read from the rows' fields."""
    completion: str | None = None
    """Column template of the answer to learn, such as "{tone}"."""
    system: str | None = None
    """System message put before each conversation that has none."""
    test_fraction: float = 0.2
    """Share of the examples held out for evaluation, 0 to below 1; equal prompts always fall on the same side."""
    seed: int = 0
    """Seed of that split."""
    max_length: int | None = None
    """Longest example (or block, or window), in tokens; what becomes of longer rows, `too_long` says. Default: the model's context."""
    text: str | None = None
    """Column template of a whole text, such as "### Text: {phrase}\\n### The tone is:\\n{tone}": all of it is learned, without chat template, up to the stop token put after it. Evaluation asks with what stands before the last field. Instead of prompt and completion."""
    chat: bool = True
    """false: prompt and completion as they stand, without the chat template."""
    learn_prompt: bool = False
    """Learn the prompt's tokens too."""
    chat_template: str | None = None
    """Another Jinja chat template instead of the model's own; it goes with the model from then on."""
    messages: str | None = None
    """Name of the field that holds the list of messages. Default: found by itself."""
    strategy: Literal["rows", "join", "sliding-window"] = "rows"
    """rows: each row an example. join: rows packed into blocks of at most max_length tokens, each seeing only itself. sliding-window: all rows one stream, cut into windows of max_length tokens."""
    stride: int | None = None
    """sliding-window: tokens from one window's start to the next's, 1 to max_length; what two windows share is learned in the first only."""
    joiner: str = ""
    """join, sliding-window: text put after each row, and learned."""
    attend_across: bool = False
    """join: true makes all rows one stream, cut into blocks of exactly max_length tokens, in which a row sees those before it."""
    too_long: Literal["drop", "cut"] = "drop"
    """Rows of more than max_length tokens: left out and counted, or (without chat template) cut there and counted. Blocks and windows split texts instead and lose nothing."""
    rows: str | None = None
    """Part of the rows, as in split slices of the hub: "[:70%]", "[100:200]", "[-128:]"."""
    max_rows: int | None = None
    """Most rows to use: the first ones, or drawn ones."""
    draw: int | None = None
    """Seed to draw max_rows rows at random."""
    subset: str | None = None
    """Configuration of a data set of the hub or of a folder with several."""
    split: str | None = None
    """Split of a data set of the hub or of a folder, such as train."""

    def __post_init__(self) -> None:
        if self.text is not None:  # what a text implies
            object.__setattr__(self, "chat", False)
            object.__setattr__(self, "learn_prompt", True)
            split_at_last_field(self.text)
        problems = [problem for wrong, problem in self._laws() if wrong]
        if problems:
            raise ValueError("; ".join(problems))

    def _laws(self) -> list[tuple[bool, str]]:
        """(broken, what to say) of each rule between the fields."""
        windows, stream = self.strategy == "sliding-window", self.strategy != "rows"
        length = self.max_length
        return [
            (not 0.0 <= self.test_fraction < 1.0, "test_fraction must be at least 0 and below 1"),
            (length is not None and length < 2, "max_length must be at least 2 tokens"),
            ((self.prompt is None) != (self.completion is None), "prompt and completion templates come together"),
            (self.text is not None and self.prompt is not None, "text stands instead of prompt and completion"),
            (self.messages is not None and (self.text or self.prompt) is not None, "messages stands instead of templates"),
            (not self.chat and self.messages is not None, "messages needs the chat template, which chat: false leaves out"),
            (not self.chat and self.system is not None, "system needs the chat template, which text and chat: false leave out"),
            (not self.chat and self.chat_template is not None, "chat_template has no use with text or chat: false"),
            (stream and length is None, f"strategy {self.strategy} needs max_length"),
            (windows and self.stride is None, "strategy sliding-window needs stride"),
            (self.stride is not None and not windows, "stride belongs to strategy sliding-window"),
            (self.stride is not None and not 1 <= self.stride <= (length or self.stride), "stride must be 1 to max_length"),
            (bool(self.joiner) and not stream, "joiner belongs to the strategies join and sliding-window"),
            (self.attend_across and self.strategy != "join", "attend_across belongs to strategy join"),
            (self.too_long == "cut" and self.chat, "too_long: cut is for texts and chat: false; a conversation is never cut"),
            (self.rows is not None and not _SLICE.fullmatch(self.rows), 'rows must look like "[:70%]" or "[100:200]"'),
            (self.max_rows is not None and self.max_rows < 1, "max_rows must be at least 1"),
            (self.draw is not None and self.max_rows is None, "draw needs max_rows, the number of rows to draw"),
        ]  # fmt: skip

    @property
    def templates(self) -> tuple[str, str] | None:
        """Column templates of prompt and completion; a text's are what stands before its last field, and the rest."""
        if self.text is not None:
            return split_at_last_field(self.text)
        return None if self.prompt is None or self.completion is None else (self.prompt, self.completion)


_SLICE = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")
_BUNDLED_TEMPLATES = {"tone": {"prompt": "What is the tone of this phrase? {phrase}", "completion": "{tone}"}}


def parse_data_config(data: str | Path | dict[str, Any] | DataConfig, key: str = "data") -> DataConfig:
    """A DataConfig from a path, a dictionary of its fields, or itself; a bundled set brings its templates.

    Raises ConfigError with each problem's path in the user's file, which begins with `key`.
    """
    if isinstance(data, DataConfig):
        return data
    values = {"path": str(data)} if isinstance(data, str | Path) else data
    if isinstance(values, dict) and not {"prompt", "completion", "text", "messages"} & {k for k in values if values[k]}:
        values = {**values, **_BUNDLED_TEMPLATES.get(str(values.get("path")), {})}
    if isinstance(values, dict) and values.get("text") is not None:
        implied = {"chat": True, "learn_prompt": False}
        if against := [
            f"{key}.{k}: text implies {not v} (found: {v})".lower() for k, v in implied.items() if values.get(k) is v
        ]:
            raise ConfigError(against, "with prompt, completion and chat: false the prompt can be left unlearned")
    return parse(DataConfig, values, key)


@dataclass(frozen=True)
class Conversation:
    """Messages of one row and the place it came from. Of a text: prompt and completion, or no message if all its fields are blank."""

    messages: list[Message]
    place: str


def template_fields(template: str, key: str) -> list[str]:
    """The field names in a column template. Raises ConfigError for anything but plain `{name}` (`{{` and `}}` stand for braces)."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"{key}: not a template: {error} (found: {template!r})", "write {name} for a field, {{ and }} for braces"
        ) from None
    names = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name or spec or conversion or any(c in name for c in ".[]()"):
            raise ConfigError(
                f"{key}: {{{name}}} is not the name of a field (found: {template!r})",
                "write {name} for a field, nothing else",
            )
        names.append(name)
    return names


def split_at_last_field(template: str) -> tuple[str, str]:
    """(what stands before the last field of a text's template, the rest), both templates.

    Spaces at the border go with the rest, since tokenizers join them with the word that follows. Raises ConfigError without a field.
    """
    if not template_fields(template, "data.text"):
        raise ConfigError(f"data.text: names no field (found: {template!r})", "write {name} for a field")
    parts = list(string.Formatter().parse(template))
    last = max(i for i, part in enumerate(parts) if part[1] is not None)

    def write(some: list[Any]) -> str:
        literal = [text.replace("{", "{{").replace("}", "}}") for text, *_ in some]
        return "".join(t + ("" if part[1] is None else f"{{{part[1]}}}") for t, part in zip(literal, some, strict=True))

    before = write([*parts[:last], (parts[last][0], None)])
    prompt = before.rstrip(" \t")
    return prompt, before[len(prompt) :] + write([("", parts[last][1]), *parts[last + 1 :]])


def fill_template(template: str, fields: dict[str, str]) -> str:
    """`template` with each `{name}` replaced by that field's text."""
    return "".join(
        text + ("" if name is None else fields[name]) for text, name, _, _ in string.Formatter().parse(template)
    )


def read_conversations(records: Iterator[Record], config: DataConfig) -> Iterator[Conversation]:
    """A conversation for each record, ending with the assistant's turn; an empty one for a text without content.

    Raises one DataError naming the faulty rows.
    """
    shape: Callable[[dict[str, Any]], list[Message]] | None = None
    faults: list[str] = []
    count = 0
    for record in records:
        count += 1
        shape = shape or find_shape(record, config)
        try:
            messages = _check(shape(record.fields), config)
        except ValueError as error:
            faults.append(f"{record.place}: {error}")
            continue
        if not faults:
            if messages and config.system is not None and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": config.system})
            yield Conversation(messages, record.place)
    if faults:
        rest = [f"... and {len(faults) - _SHOWN} more rows"] if len(faults) > _SHOWN else []
        raise DataError(faults[:_SHOWN] + rest, f"{len(faults)} of {count} rows cannot be used; mend or remove them")


def find_shape(record: Record, config: DataConfig) -> Callable[[dict[str, Any]], list[Message]]:
    """The function that turns this file's rows into messages. Raises DataError with the fields there are if none fits."""
    if config.templates is not None:
        return _templates(*config.templates, is_text=config.text is not None)
    if config.messages is not None:
        field = config.messages
        return lambda row: _messages(row, field)
    fields = record.fields
    for turns in ("messages", "conversations", "conversation"):
        if isinstance(fields.get(turns), list):
            return lambda row: _messages(row, turns)
    for question, answers in _PAIRS:
        for answer in answers:
            if question in fields and answer in fields:
                return lambda row: _pair(row, question, answer)
    raise DataError(
        f"{record.place}: no known shape of data in the fields {', '.join(map(repr, fields)) or '(none)'}",
        'say which columns to use, such as --prompt "What is ...? {field}" --completion "{other}", or --set data.text="{field}"',
    )


_PAIRS = (
    ("prompt", ("completion", "response", "chosen")),
    ("instruction", ("output", "response")),
    ("question", ("answer",)),
    ("input", ("output",)),
)


def _templates(prompt: str, completion: str, is_text: bool) -> Callable[[dict[str, Any]], list[Message]]:
    names = sorted({*template_fields(prompt, "data.prompt"), *template_fields(completion, "data.completion")})

    def messages(row: dict[str, Any]) -> list[Message]:
        fields = {name: _text(row, name) for name in names}
        if is_text and not any(value.strip() for value in fields.values()):
            return []
        return [
            {"role": "user", "content": fill_template(prompt, fields)},
            {"role": "assistant", "content": fill_template(completion, fields)},
        ]

    return messages


def _pair(row: dict[str, Any], question: str, answer: str) -> list[Message]:
    if isinstance(row.get(question), list):  # both as messages
        return _messages(row, question) + (
            _messages(row, answer)
            if isinstance(row.get(answer), list)
            else [{"role": "assistant", "content": _text(row, answer)}]
        )
    asked = _text(row, question)
    if question == "instruction" and str(row.get("input") or "").strip():
        asked = f"{asked}\n{_text(row, 'input')}"
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(row, answer)}]


def _messages(row: dict[str, Any], field: str) -> list[Message]:
    turns = row.get(field)
    if field not in row:
        raise ValueError(_missing(field, row))
    if not isinstance(turns, list):
        raise ValueError(f'field "{field}" must be a list of messages, found {type(turns).__name__}')
    if not turns:
        raise ValueError(f'field "{field}" is an empty list')
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"{field}[{index}] must be an object with role and content, found {type(turn).__name__}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in _ROLE_NAMES:
            raise ValueError(
                f"{field}[{index}].role must be one of {', '.join(ROLES)}, found {role!r}{did_you_mean(str(role), ROLES)}"
            )
        if not isinstance(content, str):
            raise ValueError(f"{field}[{index}].content must be text, found {type(content).__name__}")
        messages.append({"role": _ROLE_NAMES[role], "content": content})
    return messages


def _text(row: dict[str, Any], field: str) -> str:
    if field not in row or row[field] is None:
        raise ValueError(_missing(field, row))
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f'field "{field}" must be text, found {type(value).__name__}')
    return str(value)


def _missing(field: str, row: dict[str, Any]) -> str:
    if field in row:
        return f'field "{field}" is null'
    return f'missing field "{field}" (found: {", ".join(row) or "nothing"}){did_you_mean(field, row)}'


def _check(messages: list[Message], config: DataConfig) -> list[Message]:
    """Raises ValueError unless the conversation can be learned from: someone asks, the assistant answers last, and says something."""
    if not messages:  # a text without content
        return messages
    if not config.chat and [m["role"] for m in messages] != ["user", "assistant"]:
        raise ValueError("without the chat template a row must be one prompt and one completion, found messages")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's, found {messages[-1]['role']}")
    if not any(m["role"] == "user" for m in messages):
        raise ValueError("there is no message of the user")
    if any(m["role"] == "system" for m in messages[1:]):
        raise ValueError("a system message may only come first")
    try:
        "".join(m["content"] for m in messages).encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half a character (a lone surrogate, such as a cut-off emoji)") from None
    if config.text is None and any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
        raise ValueError("the answer is empty")
    return messages
