"""Reading a user's file so that no key can be lost: every group of keys remembers which were read and which were asked for.

A key that nobody read is an unknown key, and the keys that were asked for in its group are what it may have been meant as. So the
code that reads is the only list of the keys there are. What became of the read keys is said in notes. Nothing here knows Olive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from phinetune.errors import did_you_mean

Kind = Literal["renamed", "changed", "dropped", "default"]


def dotted(at: Sequence[str]) -> str:
    """The path that `at` leads along, as it is written for people: passes.builder[0].r."""
    return "".join(f"[{key}]" if key.isdigit() else f".{key}" for key in at).removeprefix(".")


@dataclass(frozen=True)
class Note:
    """What became of one key of the user's file, in one line."""

    path: str
    """Where it stands in the user's file, or would stand if it had been given."""
    kind: Kind
    """renamed: another name or place, the same meaning. changed: another meaning or value. dropped: has no counterpart.
    default: not given; Olive's value for it is written out."""
    text: str
    """What it is called now, or why it is gone and what happens instead."""
    at: tuple[str, ...] = ()
    """Keys that lead to what came of it in the native values; empty if nothing did."""

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass
class Group:
    """One dictionary of the user's file, with the keys that were read and asked for."""

    values: dict[str, Any]
    path: str
    read: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)

    def place(self, key: str) -> str:
        """Path of `key` in the user's file, in one line: line breaks in a key are written as `\\n`."""
        shown = str(key).replace("\r", r"\r").replace("\n", r"\n")
        return f"{self.path}.{shown}" if self.path else shown


class Report:
    """The notes and problems of one translation, and every group of keys it opened."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self.problems: list[str] = []
        self._groups: list[Group] = []

    def open(self, values: Any, path: str) -> Reader:
        """A reader of the dictionary `values` that stands at `path`; of no keys, and a problem, if it is something else."""
        if not isinstance(values, dict):
            self.problem(path, f"must be a group of keys (found: {values!r})")
            values = {}
        group = Group(values, path)
        self._groups.append(group)
        return Reader(self, [group])

    def note(self, kind: Kind, path: str, text: str, at: Iterable[str] = ()) -> None:
        """Remember a note, once; a dropped key is said to be dropped once, whatever the reasons."""
        note = Note(path, kind, " ".join(text.split()), tuple(at))
        twice = kind == "dropped" and any(n.kind == kind and n.path == path for n in self.notes)
        if note not in self.notes and not twice:
            self.notes.append(note)

    def renamed(self, path: str, at: Sequence[str]) -> None:
        """Say that the key at `path` is called `at` now."""
        self.note("renamed", path, f"is {dotted(at)} now", at)

    def problem(self, path: str, text: str) -> None:
        """Remember a problem, once."""
        if (line := f"{path}: {' '.join(text.split())}") not in self.problems:
            self.problems.append(line)

    def mark(self) -> tuple[int, int]:
        """How many notes and problems there are by now, for `forget`."""
        return len(self.notes), len(self.problems)

    def forget(self, mark: tuple[int, int]) -> None:
        """Take back what was said since `mark`, of a part of the file that turned out not to count. Its unknown keys stay unknown."""
        del self.notes[mark[0] :], self.problems[mark[1] :]

    def unread(self) -> list[str]:
        """A problem for each key of an opened group that nobody read."""
        return [
            f"{group.place(key)}: unknown key{did_you_mean(key, group.asked)}"
            for group in self._groups
            for key in group.values
            if key not in group.read
        ]


class Reader:
    """Keys that stand in one or several groups; where a key is in several, the first group's value counts and that is said."""

    def __init__(self, report: Report, groups: list[Group]) -> None:
        self.report = report
        self.groups = groups

    def has(self, key: str) -> bool:
        """True if `key` is given and not null. A null counts as read: it is how a file says that it leaves something out."""
        for group in self.groups:
            group.asked.add(key)
            if key in group.values and group.values[key] is None:
                group.read.add(key)
        return any(group.values.get(key) is not None for group in self.groups)

    def path(self, key: str) -> str:
        """Where `key` stands, or would stand."""
        return next((g for g in self.groups if g.values.get(key) is not None), self.groups[0]).place(key)

    def take(self, key: str, kind: type | tuple[type, ...] = object, default: Any = None) -> Any:
        """The value of `key`, or `default`; a problem and `default` if it is not of `kind`."""
        if not self.has(key):
            return default
        holders = [group for group in self.groups if group.values.get(key) is not None]
        for group in holders:
            group.read.add(key)
        for group in holders[1:]:
            self.report.note("dropped", group.place(key), f"given twice, {holders[0].place(key)} counts")
        value = holders[0].values[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds and object not in kinds):
            words = {
                str: "text",
                bool: "true or false",
                int: "a whole number",
                float: "a number",
                dict: "a group of keys",
                list: "a list",
            }
            wanted = " or ".join(words[k] for k in kinds if (k, float in kinds) != (int, True))
            self.report.problem(self.path(key), f"must be {wanted} (found: {value!r})")
            return default
        return value

    def first(self, *keys: str) -> str | None:
        """Which of the spellings `keys` is given; the others, if given too, are read and said to not count."""
        given = [key for key in keys if self.has(key)]
        for key in given[1:]:
            self.drop(key, f"{self.path(given[0])} says the same and counts")
        return given[0] if given else None

    def drop(self, key: str, reason: str) -> None:
        """Read `key` if it is given, and say why it is gone."""
        if self.has(key):
            place = self.path(key)
            self.take(key)
            self.report.note("dropped", place, reason)

    def drop_all(self, reasons: dict[str, str]) -> None:
        """`drop` for each key."""
        for key, reason in reasons.items():
            self.drop(key, reason)

    def refuse(self, key: str, reason: str) -> None:
        """A problem if `key` is given."""
        if self.has(key):
            self.report.problem(self.path(key), reason)
            self.take(key)

    def pass_over(self, but_like: str = "type") -> None:
        """Count every key as read, of a group that cannot be read without `but_like`; what looks like a misspelt one stays unread."""
        for group in self.groups:
            group.asked.add(but_like)
            group.read |= {key for key in group.values if not did_you_mean(key, [but_like])}

    def group(self, key: str) -> Reader | None:
        """A reader of the dictionary under `key`; None if it is not given."""
        if not self.has(key):
            return None
        place = self.path(key)
        return self.report.open(self.take(key), place)

    def flat(self, *wrappers: str) -> Reader:
        """A reader of the keys in the dictionaries under `wrappers`, if they are given, and beside them."""
        inner = [group for wrapper in wrappers if (reader := self.group(wrapper)) for group in reader.groups]
        return Reader(self.report, [*inner, *self.groups])

    def over(self, other: Reader | None) -> Reader:
        """A reader of these keys and, where they lack one, of the other's."""
        return Reader(self.report, [*self.groups, *other.groups]) if other else self
