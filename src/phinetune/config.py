"""From what the user wrote to a frozen dataclass: read a YAML or JSON file, apply `--set`, validate, and name every problem once.

The dataclasses live beside the code that uses them and own their defaults and help texts (the string under each field). Nothing is
copied field by field: the object validated here is the object the code receives. pydantic is imported only when something is validated.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any, TypeVar

from phinetune.errors import ConfigError, did_you_mean

T = TypeVar("T")

STRICT = {"extra": "forbid", "use_attribute_docstrings": True}
"""The `__pydantic_config__` of every config dataclass."""


def parse(cls: type[T], values: dict[str, Any], path: str = "") -> T:
    """`values` as a `cls`. Raises one ConfigError with every unknown key and wrong value, each with its path in the user's file."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ConfigError([_problem(cls, path, e) for e in error.errors()]) from None


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
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        values = json.loads(text) if path.suffix == ".json" else read_yaml(text, str(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold key: value pairs, found {type(values).__name__}")
    return values


def read_yaml(text: str, source: str) -> Any:
    """`text` as plain YAML values. Unlike YAML 1.1, 5e-4 is a number, as people mean it. Raises ConfigError naming `source`."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if not isinstance(key, str):
                    raise ConfigError(
                        f"{source}: {key!r} is read as {type(key).__name__}, a key must be text", 'put it in "quotes"'
                    )
                if keys.count(key) > 1:
                    raise ConfigError(f"{source}: {key}: this key is given twice")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{source}{where}: not valid YAML: {reason}") from None
    except ValueError as error:  # 2024-13-45 is read as a date that cannot be
        raise ConfigError(f"{source}: not valid YAML: {error}", 'put text in "quotes"') from None


def apply_settings(values: dict[str, Any], settings: typing.Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=c` of `settings` set; c is read as YAML, so 8, 5e-4, true, null and [q, v] mean what they say."""
    result = copy.deepcopy(values)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f'--set {setting}: must be key=value, such as "peft_config.r=8"')
        template = key.strip() in ("data.prompt", "data.completion", "data.system")  # where braces are not YAML's
        put(result, key.strip(), text if template else read_yaml(text, f"--set {key.strip()}"))
    return result


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in nested dictionaries, making those on the way. A string on the way (`data: f.jsonl`) becomes its `path`."""
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if isinstance(inner, str) and parent == "data":
            inner = {"path": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {parent} is {inner!r}, not a group of keys")
        values[parent] = inner
        values = inner
    values[last] = value
