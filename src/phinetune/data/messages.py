"""From a row to a conversation: column templates, prompt/completion pairs, and lists of messages in the shapes people have.

Which shape a file has is read from its first row and said; every later row must have it too. All faulty rows are collected and raised
in one error. Templates name fields (`"What is the tone of this phrase? {phrase}"`) and nothing else: no attributes, no expressions.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
    """What to read and how a row becomes a conversation."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    path: str
    """Data file (.jsonl, .json, .csv, .tsv, .parquet) or the name of a bundled set: tone."""
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
    """Longest example, in tokens; longer ones are left out and counted, never cut. Default: the model's context."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.test_fraction < 1.0:
            raise ValueError("test_fraction must be at least 0 and below 1")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError("max_length must be at least 2 tokens")
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion templates come together")


_BUNDLED_TEMPLATES = {"tone": {"prompt": "What is the tone of this phrase? {phrase}", "completion": "{tone}"}}


def parse_data_config(data: str | Path | dict[str, Any] | DataConfig) -> DataConfig:
    """A DataConfig from a path, a dictionary of its fields, or itself; a bundled set brings its templates. Raises ConfigError."""
    if isinstance(data, DataConfig):
        return data
    values = {"path": str(data)} if isinstance(data, str | Path) else data
    if isinstance(values, dict) and "prompt" not in values and "completion" not in values:
        values = {**values, **_BUNDLED_TEMPLATES.get(str(values.get("path")), {})}
    return parse(DataConfig, values, "data")


@dataclass(frozen=True)
class Conversation:
    """Messages of one row and the place it came from."""

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


def fill_template(template: str, fields: dict[str, str]) -> str:
    """`template` with each `{name}` replaced by that field's text."""
    return "".join(
        text + ("" if name is None else fields[name]) for text, name, _, _ in string.Formatter().parse(template)
    )


def read_conversations(records: Iterator[Record], config: DataConfig) -> Iterator[Conversation]:
    """A conversation for each record, ending with the assistant's turn. Raises one DataError naming the faulty rows."""
    shape: Callable[[dict[str, Any]], list[Message]] | None = None
    faults: list[str] = []
    count = 0
    for record in records:
        count += 1
        shape = shape or find_shape(record, config)
        try:
            messages = _check(shape(record.fields))
        except ValueError as error:
            faults.append(f"{record.place}: {error}")
            continue
        if not faults:
            if config.system is not None and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": config.system})
            yield Conversation(messages, record.place)
    if faults:
        rest = [f"... and {len(faults) - _SHOWN} more rows"] if len(faults) > _SHOWN else []
        raise DataError(faults[:_SHOWN] + rest, f"{len(faults)} of {count} rows cannot be used; mend or remove them")


def find_shape(record: Record, config: DataConfig) -> Callable[[dict[str, Any]], list[Message]]:
    """The function that turns this file's rows into messages. Raises DataError with the fields there are if none fits."""
    if config.prompt is not None and config.completion is not None:
        return _templates(config.prompt, config.completion)
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
        'say which columns to use, such as --prompt "What is ...? {field}" --completion "{other}"',
    )


_PAIRS = (
    ("prompt", ("completion", "response", "chosen")),
    ("instruction", ("output", "response")),
    ("question", ("answer",)),
    ("input", ("output",)),
)


def _templates(prompt: str, completion: str) -> Callable[[dict[str, Any]], list[Message]]:
    names = sorted({*template_fields(prompt, "data.prompt"), *template_fields(completion, "data.completion")})

    def messages(row: dict[str, Any]) -> list[Message]:
        fields = {name: _text(row, name) for name in names}
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


def _check(messages: list[Message]) -> list[Message]:
    """Raises ValueError unless the conversation can be learned from: someone asks, the assistant answers last, and says something."""
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
    if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
        raise ValueError("the answer is empty")
    return messages
