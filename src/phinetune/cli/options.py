"""From command-line options, `--config` and `--set` to the arguments of a stage function, checked against its own signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from phinetune.config import apply_settings, put, read_config
from phinetune.errors import ConfigError, did_you_mean

Settings = Sequence[str]


def arguments(
    function: Callable[..., Any], config: str | None, settings: Settings, options: dict[str, Any]
) -> dict[str, Any]:
    """Keyword arguments for `function`: the file's values, over them the options that were given, over them each `--set`.

    `options` maps dotted keys to values; None means "not given". Raises ConfigError for keys that `function` does not have and for
    needed ones that nobody gave.
    """
    values = read_config(config) if config else {}
    for key, value in options.items():
        if value is not None:
            put(values, key, value)
    values = apply_settings(values, settings)
    parameters = {n: p for n, p in inspect.signature(function).parameters.items() if n != "on_event"}
    problems = [f"{key}: unknown key{did_you_mean(str(key), parameters)}" for key in values if key not in parameters]
    hints = get_type_hints(function)
    for key in [k for k in values if k in parameters]:
        values[key] = _checked(key, values[key], hints.get(key, Any), problems)
    needed = [n for n, p in parameters.items() if p.default is p.empty and values.get(n) is None]
    problems += [f"{name}: this key is needed" for name in needed]
    if problems:
        hint = (
            f"give {', '.join(_flag(n) for n in needed)}, or the key in --config"
            if needed
            else f"the keys are {', '.join(parameters)}"
        )
        raise ConfigError(problems, hint)
    return values


def _checked(key: str, value: Any, hint: Any, problems: list[str]) -> Any:
    """`value` if it is of the type that the function declares; otherwise the problem is noted."""
    from pydantic import TypeAdapter, ValidationError

    if isinstance(value, dict | None):  # groups of keys are checked by the stage, which knows their names
        if value is None or "dict" in str(hint):
            return value
    elif "dict" in str(hint) and "str |" not in str(hint):
        problems.append(f"{key}: must hold key: value pairs (found: {value!r})")
        return value
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        message = error.errors()[-1]["msg"]
        problems.append(f"{key}: {message[0].lower()}{message[1:]} (found: {value!r})")
        return value


def _flag(name: str) -> str:
    return "--output" if name == "output_dir" else f"--{name.replace('_', '-')}"
