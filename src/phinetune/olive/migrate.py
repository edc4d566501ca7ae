"""`migrate`: an Olive file as the text of a native one, with what changed as comments where it changed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from phinetune.olive.reader import Note
from phinetune.olive.translate import translate

_PLAIN = re.compile(r"[A-Za-z_][\w./\-]*")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"}
_WIDTH = 100  # a group that fits into so many characters stands on one line


def migrate(values: dict[str, Any], source_name: str, folder: Path | None = None) -> str:
    """The native YAML text of an Olive file's `values`; reading it gives exactly what `translate` does. Raises its ConfigError."""
    translation = translate(values, folder)
    lines = [
        f"# Written by phinetune migrate from {_one_line(source_name)}, a file of Olive {translation.era.versions}."
    ]
    notes = list(translation.notes)
    there = _paths(translation.values)
    at_top = [note for note in notes if not _nearest(note, there)]
    lines += [f"# {note.kind}: {_one_line(str(note))}" for note in at_top]
    comments: dict[tuple[str, ...], list[str]] = {}
    for note in notes:
        if nearest := _nearest(note, there):
            comments.setdefault(nearest, []).append(f"# {note.kind}: {_one_line(str(note))}")
    lines += _mapping(translation.values, (), comments)
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    """`text` as a comment may hold it: no line breaks, no control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def _paths(value: Any, at: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """The places in `value` that a comment can stand at."""
    found = {at} if at else set()
    pairs = (
        value.items()
        if isinstance(value, dict)
        else [(str(i), v) for i, v in enumerate(value)]
        if _is_block(value)
        else []
    )
    for key, inner in pairs:
        found |= _paths(inner, (*at, key))
    return found


def _is_block(value: Any) -> bool:
    """True for lists of which each element stands on lines of its own."""
    return isinstance(value, list) and any(isinstance(v, dict) for v in value)


def _nearest(note: Note, there: set[tuple[str, ...]]) -> tuple[str, ...]:
    """The place of `note`, or the nearest one around it; empty if there is none."""
    at = note.at
    while at and at not in there:
        at = at[:-1]
    return at


def _mapping(values: dict[str, Any], at: tuple[str, ...], comments: dict[tuple[str, ...], list[str]]) -> list[str]:
    """Lines of a mapping's keys, not indented."""
    lines: list[str] = []
    for key, value in values.items():
        here = (*at, key)
        lines += comments.get(here, [])
        commented = any(place[: len(here)] == here and place != here for place in comments)
        flow = f"{_scalar(key)}: {_flow(value)}"
        if isinstance(value, dict) and value and (commented or len(flow) > _WIDTH or at == ()):
            lines += [f"{_scalar(key)}:", *("  " + line for line in _mapping(value, here, comments))]
        elif _is_block(value):
            lines.append(f"{_scalar(key)}:")
            for index, one in enumerate(value):
                inner = _mapping(one, (*here, str(index)), comments) if isinstance(one, dict) and one else [_flow(one)]
                lines += ["  " + line for line in comments.get((*here, str(index)), [])]
                lines += ["  -", *("    " + line for line in inner)]
        else:
            lines.append(flow)
    return lines


def _flow(value: Any) -> str:
    """`value` in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(v) for v in value) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    import yaml

    if isinstance(value, str):
        if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
            return value
        return str(yaml.safe_dump(value, default_style='"', allow_unicode=True, width=sys.maxsize)).strip()
    return str(yaml.safe_dump(value)).strip().removesuffix("...").strip()
