"""From what the user wrote to a frozen dataclass: read a YAML or JSON file, apply `--set`, validate, and name every problem once.

The dataclasses live beside the code that uses them and own their defaults and help texts (the string under each field). Nothing is
copied field by field: the object validated here is the object the code receives. pydantic is imported only when something is validated.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from phinetune.errors import ConfigError, did_you_mean

T = TypeVar("T")

_MOST_VALUES = 100_000
_DEEPEST = 100  # levels of nesting: what reads, copies and compares values does so level by level on the stack
STRICT = {"extra": "forbid", "use_attribute_docstrings": True}
"""The `__pydantic_config__` of every config dataclass."""


def parse(cls: type[T], values: dict[str, Any], path: str = "") -> T:
    """`values` as a `cls`. Raises one ConfigError with every unknown key and wrong value, each with its path in the user's file."""
    from pydantic import ValidationError

    try:
        return typing.cast(T, _adapter(typing.cast(typing.Hashable, cls)).validate_python(values))
    except ValidationError as error:
        raise ConfigError([_problem(cls, path, e) for e in error.errors()]) from None


@functools.lru_cache(maxsize=64)
def _adapter(cls: Any) -> Any:
    """The pydantic validator of `cls`, made once: that takes longer than validating."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _problem(cls: type, path: str, error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    where = ".".join(([path] if path else []) + location)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: unknown key{did_you_mean(location[-1], _fields_at(cls, location[:-1]))}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{where}: this key is needed"
    message = error["msg"].removeprefix("Value error, ")
    found = "" if isinstance(error["input"], dict) else f" (found: {error['input']!r})"
    return f"{where}: {message[0].lower()}{message[1:]}{found}"


def _fields_at(cls: Any, location: list[str]) -> list[str]:
    """Field names of the dataclass that `location` leads to from `cls`; union members and other steps are passed over."""
    for part in location:
        hint = typing.get_type_hints(cls).get(part) if dataclasses.is_dataclass(cls) else None
        if hint is not None:
            cls = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def read_config(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises ConfigError with file, line and column for anything else."""
    return read_config_text(file)[1]


def read_config_text(file: str | Path) -> tuple[str, dict[str, Any]]:
    """(text, mapping) of a YAML or JSON file; see `read_config`."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    values = read_json(text, str(path)) if path.suffix == ".json" else read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold key: value pairs, found {type(values).__name__}")
    return text, values


def read_json(text: str, source: str) -> Any:
    """`text` as JSON in which no key is given twice. Raises ConfigError naming `source`."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise ConfigError(f"{source}: {key}: this key is given twice")
            found[key] = value
        return found

    def constant(name: str) -> Any:
        raise ConfigError(f"{source}: not valid JSON: {name} is no number of JSON")

    try:
        return _not_too_deep(json.loads(text, object_pairs_hook=pairs, parse_constant=constant), source)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{source}: not valid JSON: {str(error).split(';')[0]}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None


def _not_too_deep(value: Any, source: str) -> Any:
    """`value`. Raises ConfigError if it is nested more than `_DEEPEST` levels."""
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        if depth > _DEEPEST:
            raise ConfigError(f"{source}: nested too deeply")
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return value


def locate(error: ConfigError, text: str, file: Path) -> ConfigError:
    """`error` with `file`, and the line of each problem whose path ("passes.lora.r: ...") is found in its `text`; once is enough."""
    import yaml

    try:
        root = yaml.compose(text.replace("\t", " "), yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        root = None
    problems = []
    for problem in error.problems:
        if problem.startswith((f"{file}:", "--")):  # has its line already, or comes from the command line
            problems.append(problem)
            continue
        path = re.match(r"[\w. \-\[\]]+(?=:)", problem)
        line = _line(root, re.findall(r"[^.\[\]]+", path.group())) if path and root is not None else None
        problems.append(f"{file}:{line}: {problem}" if line else f"{file}: {problem}")
    return ConfigError(problems, error.hint)


@contextlib.contextmanager
def located(file: str | Path) -> Iterator[None]:
    """ConfigErrors raised inside get the lines of `file`; see `locate`."""
    try:
        yield
    except ConfigError as error:
        raise locate(error, Path(file).read_text(encoding="utf-8-sig"), Path(file)) from error.__cause__


def _line(node: Any, path: list[str]) -> int | None:
    """The line of the last key of `path` that is there, from 1."""
    line = None
    for part in path:
        if isinstance(node.value, list) and node.value and isinstance(node.value[0], tuple):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
        elif isinstance(node.value, list) and part.isdigit() and int(part) < len(node.value):
            found = (node.value[int(part)],) * 2
        else:
            found = None
        if found is None:
            return line
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def read_yaml(text: str, source: str) -> Any:
    """`text` as plain YAML values. Unlike YAML 1.1, 5e-4 is a number, as people mean it. Raises ConfigError naming `source` and the line."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:  # before merges (<<) put the keys of others among its own
            node = super().compose_mapping_node(anchor)
            keys: set[str] = set()
            for name, _ in node.value:
                if name.tag == "tag:yaml.org,2002:merge":
                    continue
                key, where = self.construct_object(name, deep=True), f"{source}:{name.start_mark.line + 1}"
                if not isinstance(key, str):
                    raise ConfigError(
                        f"{where}: {key!r} is read as {type(key).__name__}, a key must be text", 'put it in "quotes"'
                    )
                if key in keys:
                    raise ConfigError(f"{where}: {key}: this key is given twice")
                keys.add(key)
            return node

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        _refuse_explosion(text, source)
        return _not_too_deep(yaml.load(text, Loader), source)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{source}{where}: not valid YAML: {reason}") from None
    except ValueError as error:  # 2024-13-45 is read as a date that cannot be
        raise ConfigError(f"{source}: not valid YAML: {error}", 'put text in "quotes"') from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None


def _refuse_explosion(text: str, source: str) -> None:
    """Raises ConfigError for anchors that refer to one another until a few lines stand for millions of values, and for tags of YAML that
    are no plain values (sets, binary). Deep nesting ends it early: the scanner's time grows with the square of the depth."""
    import yaml

    sizes: dict[str | None, int] = {}
    open_at: list[
        tuple[str | None, int]
    ] = []  # anchors of the collections that are open, and the count when they began
    count = 0
    aliases = 0
    event: Any
    for event in yaml.parse(text, yaml.SafeLoader):
        if (getattr(event, "tag", None) or "").rpartition(":")[2] in ("binary", "set", "omap", "pairs"):
            where = f"{event.start_mark.line + 1}:{event.start_mark.column + 1}"
            raise ConfigError(f"{source}:{where}: not valid YAML: the tag {event.tag!r} is not supported here")
        if isinstance(event, yaml.events.AliasEvent):
            aliases += 1
            count += sizes.get(event.anchor, _MOST_VALUES)  # an alias within its own anchor never ends
        elif isinstance(event, yaml.events.CollectionStartEvent):
            open_at.append((event.anchor, count))
            count += 1
            if len(open_at) > _DEEPEST:
                raise ConfigError(f"{source}: nested too deeply")
        elif isinstance(event, yaml.events.CollectionEndEvent):
            anchor, began = open_at.pop()
            if anchor:
                sizes[anchor] = count - began
        elif isinstance(event, yaml.events.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        if count >= _MOST_VALUES and aliases:
            raise ConfigError(f"{source}: its anchors stand for more than {_MOST_VALUES:,} values", "write them out")


_PLAIN_TEXT = (
    "prompt",
    "completion",
    "system",
    "text",
    "chat_template",
    "rows",
)  # where braces and brackets are not YAML's


def apply_settings(values: dict[str, Any], settings: typing.Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=c` of `settings` set; c is read as YAML, so 8, 5e-4, true, null and [q, v] mean what they say."""
    result = copy.deepcopy(values)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f'--set {setting}: must be key=value, such as "peft_config.r=8"')
        group, _, name = key.strip().partition(".")
        template = group in ("data", "eval_data") and name in _PLAIN_TEXT
        put(result, key.strip(), text if template else read_yaml(text, f"--set {key.strip()}"))
    return result


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in nested dictionaries and lists (`passes.q[1].r`), making the dictionaries on the way.

    A string on the way (`data: f.jsonl`) becomes its `path`. What is changed on the way is copied: where an anchor stands in two places,
    the other one stays as it is.
    """
    parts: list[str | int] = [int(n) if n else name for name, n in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key)]
    place: Any = values
    for index, part in enumerate(parts):
        if isinstance(place, list) and not (isinstance(part, int) and part < len(place)):
            raise ConfigError(
                f"{key}: {parts[index - 1]} is a list of {len(place)}; say which one, such as {parts[index - 1]}[0]"
            )
        if isinstance(place, dict) and isinstance(part, int):
            raise ConfigError(f"{key}: {parts[index - 1]} is not a list")
        if index == len(parts) - 1:
            place[part] = value
            return
        inner = place.get(part) if isinstance(place, dict) else place[part]
        if isinstance(inner, str) and part in ("data", "eval_data"):
            inner = {"path": inner}
        inner = {} if inner is None else copy.copy(inner)
        if not isinstance(inner, dict) and not (isinstance(inner, list) and isinstance(parts[index + 1], int)):
            raise ConfigError(f"{key}: {part} is {inner!r}, not a group of keys")
        place[part] = place = inner
    raise ConfigError(f"{key!r}: not a key")
