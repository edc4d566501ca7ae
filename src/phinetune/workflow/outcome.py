"""What a run leaves as data: steps, trials, and which trial is best. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.workflow.goals import Goals, Values


@dataclass(frozen=True)
class StepResult:
    """One pass of a trial: what it left, and whether it was there already."""

    name: str
    type: str
    key: str
    parent: str
    kind: str
    folder: Path
    seconds: float
    """Seconds it took when it was made, now or earlier."""
    cached: bool


@dataclass(frozen=True)
class TrialResult:
    """One configuration tried: values of the spaces, steps, metrics, constraints missed (text -> by how much), and why it ended early."""

    number: int
    chosen: dict[str, Any]
    steps: tuple[StepResult, ...]
    values: Values
    missed: dict[str, float]
    error: str
    seconds: float
    truncated: bool = False
    """True if its rank comes from truncating an adapter of a higher one."""

    @property
    def feasible(self) -> bool:
        """True if it was scored and meets every constraint."""
        return not self.error and not self.missed and bool(self.steps)


@dataclass(frozen=True)
class RunResult:
    """Every trial, and the base model's values for goals relative to it."""

    goals: Goals
    base: Values
    trials: tuple[TrialResult, ...]

    @property
    def best(self) -> TrialResult | None:
        """The feasible trial with the best objectives, the earliest of equals; None if there is none."""
        feasible = [t for t in self.trials if t.feasible]
        return min(feasible, key=lambda t: (self.goals.rank(t.values), t.number), default=None)

    @property
    def front(self) -> list[TrialResult]:
        """The feasible trials that no other one beats in every objective, by trial number."""
        feasible = {str(t.number): t for t in self.trials if t.feasible}
        return [feasible[name] for name in self.goals.front({name: t.values for name, t in feasible.items()})]

    def nearest_misses(self) -> list[str]:
        """For people: what came nearest to each constraint, when nothing met them all."""
        scored = [t for t in self.trials if not t.error]
        failed = [t for t in self.trials if t.error]
        if not scored:
            return [f"no trial came to an end: {failed[-1].error}" if failed else "nothing was tried"]
        lines = []
        for constraint in self.goals.constraints:
            trial = min(scored, key=lambda t: constraint.shortfall(t.values, self.base))
            value, short = trial.values[constraint.metric], constraint.shortfall(trial.values, self.base)
            verdict = f"missed by {short:.4g}" if short > 0 else "met"
            lines.append(
                f"{constraint.text}: {verdict}; nearest {constraint.metric} {value:.6g} in trial {trial.number}"
            )
        together = min(scored, key=lambda t: len(t.missed))
        if all(line.split(": ", 1)[1].startswith("met") for line in lines):
            lines.append(
                f"each constraint is met by some trial, but none meets all; trial {together.number} misses {', '.join(together.missed)}"
            )
        return lines
