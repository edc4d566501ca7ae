"""Search spaces: which values a pass parameter may take, written where the value would stand.

    r: {choices: [8, 16, 32]}                                categorical
    learning_rate: {low: 1e-4, high: 1e-3, log: true}        float
    r: {low: 4, high: 64, step: 4}                           integer, both ends included where the step meets them

Pure functions on dictionaries. Who proposes values is `search.py`; what a parameter may be is said by its pass.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MOST = 10_000
"""Combinations that an exhaustive search may have."""
_LARGEST = 1e300  # no infinity, and no integer that is none as a float


@dataclass(frozen=True)
class Space:
    """The values that the parameter at `path` may take: `choices`, or the range from `low` to `high`."""

    path: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None

    @property
    def is_integer(self) -> bool:
        """True for a range of whole numbers."""
        numbers = (self.low, self.high, self.step or 1)
        return not self.choices and all(isinstance(n, int) for n in numbers)

    @property
    def count(self) -> int | None:
        """How many values there are; None for a range of numbers without a step."""
        if self.choices:
            return len(self.choices)
        if self.is_integer:
            return int(self.high - self.low) // int(self.step or 1) + 1
        return None if self.step is None else int((self.high - self.low) / self.step + 1e-9) + 1

    def grid(self) -> list[Any] | None:
        """Every value, or None for a range of numbers without a step."""
        return None if self.count is None else [self._at(i) for i in range(self.count)]

    def examples(self) -> list[Any]:
        """Values that stand for all: every choice, or the first and the last."""
        if self.choices:
            return list(self.choices)
        return [self.low, self.high if self.count is None else self._at(self.count - 1)]

    def _at(self, index: int) -> Any:
        """The value at `index` of the grid; 0.1 + 2 * 0.1 is no more than 0.3."""
        return self.choices[index] if self.choices else min(self.low + index * (self.step or 1), self.high)


def is_space(value: Any) -> bool:
    """True for a dictionary that says a space rather than a group of keys."""
    return isinstance(value, dict) and (
        set(value) == {"choices"} or {"low", "high"} <= set(value) <= {"low", "high", "log", "step"}
    )


def read_space(value: dict[str, Any], path: str) -> Space:
    """The space that `value` says. Raises ValueError with what is wrong with it."""
    if "choices" in value:
        choices = value["choices"]
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"choices must be a list of values (found: {choices!r})")
        if any(choices.count(c) > 1 for c in choices):
            raise ValueError(f"choices: a value is given twice (found: {choices!r})")
        if any(map(_holds_space, choices)):
            raise ValueError("choices: a space within a space; write every choice out, or alternatives of the pass")
        return Space(path, tuple(choices))
    low, high, log, step = value["low"], value["high"], value.get("log", False), value.get("step")
    numbers = [low, high, *([] if step is None else [step])]
    if any(isinstance(n, bool) or not isinstance(n, int | float) or not abs(n) <= _LARGEST for n in numbers):
        raise ValueError(f"low, high and step must be numbers (found: {value!r})")
    if not isinstance(log, bool):
        raise ValueError(f"log must be true or false (found: {log!r})")
    if low >= high:
        raise ValueError(f"low must be below high (found: {low!r}, {high!r})")
    if step is not None and step <= 0:
        raise ValueError(f"step must be above 0 (found: {step!r})")
    if log and (low <= 0 or step is not None):
        raise ValueError("log needs low above 0 and no step")
    if step is not None and step > high - low:
        raise ValueError(f"step must be at most high - low (found: {step!r})")
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, float) and step.is_integer():
        step = int(step)
    return Space(path, (), low, high, log, step)


def _holds_space(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return is_space(value) or any(map(_holds_space, inner))


def find_spaces(values: Any, path: str, problems: list[str]) -> list[Space]:
    """The spaces anywhere in `values`, each with its path (`passes.lora.r`, `passes.lora.betas[0]`); what is wrong with one goes to `problems`."""
    if is_space(values):
        try:
            return [read_space(values, path)]
        except ValueError as error:
            problems.append(f"{path}: {error}")
            return []
    return [space for where, value in _inner(values, path) for space in find_spaces(value, where, problems)]


def fill(values: Any, path: str, chosen: dict[str, Any]) -> Any:
    """A copy of `values` with each space replaced by what `chosen` has for its path. Raises KeyError if that is nothing."""
    if is_space(values):
        return copy.deepcopy(chosen[path])
    filled = [fill(value, where, chosen) for where, value in _inner(values, path)]
    if isinstance(values, dict):
        return dict(zip(values, filled, strict=True))
    return filled if isinstance(values, list) else copy.deepcopy(values)


def _inner(values: Any, path: str) -> list[tuple[str, Any]]:
    """(path, value) of what a dictionary or a list holds."""
    if isinstance(values, dict):
        return [(f"{path}.{key}", value) for key, value in values.items()]
    return [(f"{path}[{i}]", value) for i, value in enumerate(values)] if isinstance(values, list) else []


def combinations(spaces: list[Space]) -> Iterator[dict[str, Any]]:
    """Every combination of values, path -> value. Raises ValueError for a range that has no end of values, or too many of them."""
    problem = why_not_exhaustive(spaces)
    if problem:
        raise ValueError(problem)
    for values in itertools.product(*(space.grid() or () for space in spaces)):
        yield {space.path: value for space, value in zip(spaces, values, strict=True)}


def why_not_exhaustive(spaces: list[Space]) -> str:
    """What keeps these spaces from being searched exhaustively, or the empty text."""
    endless = [space.path for space in spaces if space.count is None]
    if endless:
        return f"{endless[0]}: a range without a step cannot be searched exhaustively; give a step or choices"
    count = math.prod(space.count or 0 for space in spaces)
    return f"search: {count} combinations cannot be searched exhaustively; use sampler: tpe" if count > MOST else ""
