"""Constraints and objectives: what must hold of a model, and what is to be improved.

    exact_match >= 0.92        size <= 90 MB            latency_p50 <= 40 ms
    exact_match >= base - 0.01 latency_p50 <= base * 0.8 perplexity <= base + 5 %
    min latency_p50            max exact_match

`base` is the same metric of the model that went in. Pure functions on numbers: nothing here measures anything.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phinetune.errors import ConfigError, did_you_mean

Values = Mapping[str, float]
_UNITS = {
    "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1024.0, "mib": 1024.0**2, "gib": 1024.0**3, "b": 1.0, "bytes": 1.0,
    "ms": 1.0, "s": 1e3, "": 1.0,
}  # fmt: skip
_COUNTED = ("size", "memory", "loss", "perplexity")
_NUMBER = r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
_CONSTRAINT = re.compile(
    rf"\s*(?P<metric>\w+)\s*(?P<relation>>=|<=|>|<)\s*(?:(?P<base>base)\s*(?:(?P<sign>[-+*])\s*)?)?(?:{_NUMBER}\s*(?P<unit>%|[A-Za-z]*))?\s*$"
)
_OBJECTIVE = re.compile(r"\s*(?P<direction>min|max|minimize|maximize)\s+(?P<metric>\w+)\s*$")


@dataclass(frozen=True)
class Constraint:
    """`metric` at least (or at most) `number`, or that number more than, times, or percent more than the base's."""

    text: str
    metric: str
    at_least: bool
    number: float
    base: str = ""
    """"" (absolute), "+" (base + number), "*" (base * number), "%" (base + number % of it)."""
    strict: bool = False
    """More (or less) than the limit; the limit itself does not do."""

    def limit(self, base: Values) -> float:
        """The number that must be reached. Raises KeyError if it is relative to a metric that `base` lacks."""
        if not self.base:
            return self.number
        value = base[self.metric]
        if self.base == "*":
            return value * self.number
        return value + (abs(value) * self.number / 100 if self.base == "%" else self.number)

    def shortfall(self, values: Values, base: Values) -> float:
        """By how much the limit is missed, in the metric's unit; zero or less if it holds. A value that is not a number misses by infinity.

        Values within a billionth of the limit are at it: 0.8 - 0.1 is a little more than 0.7 in binary.
        """
        limit, value = self.limit(base), values[self.metric]
        short = limit - value if self.at_least else value - limit
        if math.isnan(short):
            return math.inf
        slack = 1e-9 * abs(limit)
        if abs(short) <= slack:
            return max(slack, sys.float_info.min) if self.strict else 0.0
        return short


@dataclass(frozen=True)
class Objective:
    """`metric` is to become small, or large."""

    text: str
    metric: str
    minimize: bool


@dataclass(frozen=True)
class Goals:
    """The constraints and objectives of a workflow."""

    constraints: tuple[Constraint, ...] = ()
    objectives: tuple[Objective, ...] = ()

    @property
    def metrics(self) -> list[str]:
        """Every metric that is named, once, in order."""
        return list(dict.fromkeys([*(c.metric for c in self.constraints), *(o.metric for o in self.objectives)]))

    @property
    def relative(self) -> bool:
        """True if the model that goes in must be measured, too."""
        return any(c.base for c in self.constraints)

    def missed(self, values: Values, base: Values) -> dict[str, float]:
        """Constraint's text -> shortfall, of those that do not hold."""
        found = {c.text: c.shortfall(values, base) for c in self.constraints}
        return {text: short for text, short in found.items() if short > 0}

    def rank(self, values: Values) -> tuple[float, ...]:
        """A tuple that is smaller for the better of two models: the objectives' values, the first one first; what is not a number is worst."""
        signed = (values[o.metric] if o.minimize else -values[o.metric] for o in self.objectives)
        return tuple(math.inf if math.isnan(value) else value for value in signed)

    def front(self, models: Mapping[str, Values]) -> list[str]:
        """Names of the models that no other one beats in one objective without losing in another (Pareto), in the order given."""
        ranks = {name: self.rank(values) for name, values in models.items()}
        if not self.objectives:
            return list(models)
        return [n for n, r in ranks.items() if not any(_dominates(other, r) for other in ranks.values())]


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def parse_goals(constraints: Sequence[str], objectives: Sequence[str], known: Sequence[str]) -> Goals:
    """The goals that the texts say. Raises one ConfigError with every text that says none, or names a metric that is not `known`."""
    problems: list[str] = []
    held = [_constraint(text, f"constraints[{i}]", known, problems) for i, text in enumerate(constraints)]
    wanted = [_objective(text, f"objectives[{i}]", known, problems) for i, text in enumerate(objectives)]
    names = [o.metric for o in wanted if o]
    problems += [f"objectives: {name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise ConfigError(
            problems, 'write "exact_match >= 0.92", "size <= 90 MB", "latency_p50 <= base * 0.8", "min latency_p50"'
        )
    return Goals(tuple(c for c in held if c), tuple(o for o in wanted if o))


def _constraint(text: str, path: str, known: Sequence[str], problems: list[str]) -> Constraint | None:
    found = _CONSTRAINT.match(text)
    if not found or (found["number"] is None and (not found["base"] or found["sign"])):
        problems.append(f"{path}: not a constraint: {text!r}")
        return None
    metric, unit = found["metric"], (found["unit"] or "").lower()
    if not _is_known(metric, path, known, problems):
        return None
    if found["base"] and found["number"] is not None and not found["sign"]:
        problems.append(f"{path}: not a constraint: {text!r} (base + ..., base - ... or base * ...)")
        return None
    if unit != "%" and (unit not in _UNITS or (unit and not _fits(metric, unit)) or (unit and found["sign"] == "*")):
        problems.append(f"{path}: {metric} is not counted in {found['unit']}")
        return None
    if unit == "%" and not found["base"] and not _is_share(metric):
        problems.append(f"{path}: {metric} is no share of anything, so it has no % (relative: {metric} ... base + 5 %)")
        return None
    number = float(found["number"] or 0)
    if not math.isfinite(number):
        problems.append(f"{path}: {found['number']} is too large a number")
        return None
    if found["sign"] == "-":
        number = -number
    base = "" if not found["base"] else "*" if found["sign"] == "*" else "%" if unit == "%" else "+"
    if unit == "%" and base != "%":
        number, unit = number / 100, ""  # a share
    relation = found["relation"]
    return Constraint(
        text.strip(), metric, relation[0] == ">", number * _UNITS.get(unit, 1.0), base, strict=len(relation) == 1
    )


def _objective(text: str, path: str, known: Sequence[str], problems: list[str]) -> Objective | None:
    found = _OBJECTIVE.match(text)
    if not found:
        problems.append(f"{path}: not an objective: {text!r}")
        return None
    if not _is_known(found["metric"], path, known, problems):
        return None
    return Objective(text.strip(), found["metric"], found["direction"].startswith("min"))


def _is_known(metric: str, path: str, known: Sequence[str], problems: list[str]) -> bool:
    if metric in known:
        return True
    problems.append(f"{path}: no metric is called {metric!r}{did_you_mean(metric, known)}")
    return False


def _is_share(metric: str) -> bool:
    """False for what is known not to lie between 0 and 1."""
    return not metric.startswith(("latency", "time_to_first_token", "prefill", "throughput")) and metric not in _COUNTED


def _fits(metric: str, unit: str) -> bool:
    """True if `metric` is counted in `unit`."""
    if metric in ("size", "memory"):
        return unit.endswith("b") or unit == "bytes"
    return unit in ("ms", "s") and metric.startswith(("latency", "time_to_first_token"))
