"""Search spaces: which values a pass parameter may take, written where the value would stand.

    r: {choices: [8, 16, 32]}                                categorical
    learning_rate: {low: 1e-4, high: 1e-3, log: true}        float
    r: {low: 4, high: 64, step: 4}                           integer, both ends included

Pure functions on dictionaries. Who proposes values is `search.py`; what a parameter may be is said by its pass.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MOST = 10_000  # combinations that an exhaustive search may have


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
        return not self.choices and isinstance(self.low, int) and isinstance(self.high, int)

    def grid(self) -> list[Any] | None:
        """Every value, or None for a range of numbers without a step."""
        if self.choices:
            return list(self.choices)
        if self.step is None and not self.is_integer:
            return None
        step = self.step or 1
        count = int((self.high - self.low) / step + 1e-9)
        return [self.low + i * step for i in range(count + 1)]

    def examples(self) -> list[Any]:
        """Values that stand for all: every choice, or both ends."""
        return list(self.choices) if self.choices else [self.low, self.high]


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
        return Space(path, tuple(choices))
    low, high, log, step = value["low"], value["high"], value.get("log", False), value.get("step")
    numbers = [n for n in (low, high, step) if n is not None]
    if any(isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n) for n in numbers):
        raise ValueError(f"low, high and step must be numbers (found: {value!r})")
    if not isinstance(log, bool):
        raise ValueError(f"log must be true or false (found: {log!r})")
    if low >= high:
        raise ValueError(f"low must be below high (found: {low!r}, {high!r})")
    if step is not None and step <= 0:
        raise ValueError(f"step must be above 0 (found: {step!r})")
    if log and (low <= 0 or step is not None):
        raise ValueError("log needs low above 0 and no step")
    return Space(path, (), low, high, log, step)


def find_spaces(values: dict[str, Any], path: str, problems: list[str]) -> list[Space]:
    """The spaces anywhere in `values`, each with its dotted path; what is wrong with one goes to `problems`."""
    found = []
    for key, value in values.items():
        where = f"{path}.{key}"
        if is_space(value):
            try:
                found.append(read_space(value, where))
            except ValueError as error:
                problems.append(f"{where}: {error}")
        elif isinstance(value, dict):
            found += find_spaces(value, where, problems)
    return found


def fill(values: dict[str, Any], path: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """A copy of `values` with each space replaced by what `chosen` has for its path."""
    result = {}
    for key, value in values.items():
        where = f"{path}.{key}"
        if is_space(value):
            result[key] = copy.deepcopy(chosen[where])
        else:
            result[key] = fill(value, where, chosen) if isinstance(value, dict) else copy.deepcopy(value)
    return result


def combinations(spaces: list[Space]) -> Iterator[dict[str, Any]]:
    """Every combination of values, path -> value. Raises ValueError for a range that has no end of values, or too many of them."""
    grids = [space.grid() for space in spaces]
    endless = [s.path for s, grid in zip(spaces, grids, strict=True) if grid is None]
    if endless:
        raise ValueError(
            f"{endless[0]}: a range without a step cannot be searched exhaustively; give a step or choices"
        )
    count = math.prod(len(grid or ()) for grid in grids)
    if count > _MOST:
        raise ValueError(f"{count} combinations cannot be searched exhaustively; use sampler: tpe")
    for values in itertools.product(*(grid or () for grid in grids)):
        yield {space.path: value for space, value in zip(spaces, values, strict=True)}
