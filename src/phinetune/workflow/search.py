"""Which values are tried: optuna proposes, several workers share one study, weak trainings stop early.

A workflow without spaces has one proposal, so a plain run is a search with one trial. The study lives in a file of the cache, or in the
database that `search.storage` names, under a name made from what decides its trials: the same workflow goes on with its own study, and
a finished one proposes nothing. What a trial has cached (a training that two trials share) is never made twice.

Not here: running a trial (`run.py`), what is better (`goals.py`).
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from phinetune.errors import MissingPackageError
from phinetune.events import Event, Note, OnEvent, Progress, log_event
from phinetune.workflow.config import SearchConfig
from phinetune.workflow.goals import Values
from phinetune.workflow.outcome import RunResult, StepResult, TrialResult
from phinetune.workflow.plan import Step, Workflow
from phinetune.workflow.spaces import Space, combinations
from phinetune.workflow.study import distribution, is_dead, is_stale, is_void, open_losses, open_study, study_key

_TRIALS = 20  # where the file does not say how many


class Pruned(Exception):
    """Raised inside a training whose held-out loss is behind the other trials'."""


@dataclass
class Proposal:
    """Values to try. `truncated`: ranks come from truncating one adapter of the highest rank."""

    chosen: dict[str, Any] = field(default_factory=dict)
    truncated: bool = False
    trial: Any = None
    losses: Any = None
    """The trial in the study of losses that held-out losses are reported to."""
    last_loss: float | None = None

    def listen(self, on_event: OnEvent) -> OnEvent:
        """`on_event` that also watches the held-out loss and raises Pruned when optuna's pruner says so."""
        if self.losses is None:
            return on_event

        def watch(event: Event) -> None:
            on_event(event)
            loss = event.figures.get("eval_loss") if isinstance(event, Progress) else None
            if loss is not None and loss != self.last_loss and isinstance(event, Progress):
                self.last_loss = loss
                self.losses.report(loss, event.done)
                if self.losses.should_prune():
                    raise Pruned(f"stopped at step {event.done}: the held-out loss {loss:.4f} is behind other trials'")

        return watch


class Proposals(Protocol):
    """Where a run gets its trials from."""

    def __iter__(self) -> Iterator[Proposal]: ...

    def tell(self, proposal: Proposal, trial: TrialResult) -> None:
        """What became of a proposal."""
        ...

    def known(self, trials: list[TrialResult]) -> list[TrialResult]:
        """Every trial of the study, those of other workers and earlier runs, too."""
        ...


class _One:
    """The proposal of a workflow without a search."""

    def __iter__(self) -> Iterator[Proposal]:
        yield Proposal()

    def tell(self, proposal: Proposal, trial: TrialResult) -> None:
        """Nobody asks."""

    def known(self, trials: list[TrialResult]) -> list[TrialResult]:
        """The trial."""
        return trials


def propose(workflow: Workflow, base: Values, worker: bool = False, on_event: OnEvent = log_event) -> Proposals:
    """The proposals of `workflow`; `base` are the values of the model that goes in, a `worker` leaves the end to another run. Raises MissingPackageError if a search is asked for without optuna."""
    if workflow.config.search is None or not workflow.spaces:
        return _One()
    try:
        import optuna
    except ImportError as error:
        raise MissingPackageError(f"search needs {error.name}", "pip install 'phinetune[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return Search(workflow, workflow.config.search, base, worker, on_event)


class Search:
    """The trials of one search, in phases: one, or one for each pass with spaces where the order is pass by pass."""

    def __init__(self, workflow: Workflow, search: SearchConfig, base: Values, worker: bool, on_event: OnEvent) -> None:
        self.workflow, self.search, self.base, self.worker, self.on_event = workflow, search, base, worker, on_event
        self.key = study_key(workflow)
        self.name = search.study or f"phinetune-{self.key[:16]}"
        self.started = time.monotonic()
        self.stopped = False
        self.phase = 0
        self.phases = _phases(workflow.spaces, search.order)
        names = [self.name if len(self.phases) == 1 else f"{self.name}-{i}" for i in range(len(self.phases))]
        self.studies = [open_study(workflow, search, name, self.limit, worker) for name in names]
        self.losses = open_losses(workflow, search, self.name) if search.pruner != "none" else None
        self.stale = {(i, t.number) for i, study in enumerate(self.studies) for t in study.trials if is_stale(t)}

    def __iter__(self) -> Iterator[Proposal]:
        for phase in range(len(self.phases)):
            self.phase = phase
            fixed = self._fixed()
            while not self.stopped and (proposal := self._ask(fixed)) is not None:
                yield proposal
            if not self.worker or len(self.phases) > 1:
                self._wait_for_others()
        if not self.worker and (again := self._winner_again()) is not None:
            yield again

    def tell(self, proposal: Proposal, trial: TrialResult) -> None:
        """Record the trial; see whether the search is over."""
        import optuna

        states = optuna.trial.TrialState
        if proposal.losses is not None and self.losses is not None:
            if proposal.last_loss is not None and not trial.error:
                self.losses.tell(proposal.losses, proposal.last_loss)
            else:
                self.losses.tell(proposal.losses, state=states.PRUNED)
        if proposal.trial is None:
            return
        for name, value in (("values", dict(trial.values)), ("error", trial.error), ("seconds", trial.seconds)):
            proposal.trial.set_user_attr(name, value)
        proposal.trial.set_user_attr("shortfalls", self._shortfalls(trial))
        study = self.studies[self.phase]
        if trial.error:
            study.tell(proposal.trial, state=states.PRUNED if trial.error.startswith("stopped at") else states.FAIL)
        else:
            study.tell(proposal.trial, self._objectives(trial))
        if self.search.stop_when_met and trial.feasible:
            self.stopped = True

    def known(self, trials: list[TrialResult]) -> list[TrialResult]:
        """Every finished trial, in the order they were proposed."""
        found: list[TrialResult] = []
        for index, study in enumerate(self.studies):
            for trial in study.trials:
                if (index, trial.number) in self.stale or not trial.state.is_finished() or is_void(trial):
                    continue
                found.append(self._as_result(len(found), trial))
        own = [t for t in trials if not any(_same(t, k) for k in found)]  # the winner, trained at its own rank
        return found + [replace(t, number=len(found) + i) for i, t in enumerate(own)]

    def _as_result(self, number: int, trial: Any) -> TrialResult:
        attrs = trial.user_attrs
        chosen, truncated = attrs["chosen"], bool(attrs.get("truncated", False))
        steps = tuple(_step_result(s, self.workflow) for s in self.workflow.steps(chosen, truncated=truncated))
        values = attrs.get("values") or {}
        missed = self.workflow.goals.missed(values, self.base) if values else {}
        return TrialResult(
            number, chosen, steps, values, missed, attrs.get("error", "?"), attrs.get("seconds", 0.0), truncated
        )

    @property
    def limit(self) -> int:
        """Trials of a phase."""
        if self.search.sampler == "exhaustive":
            return self.search.trials or 10**9
        return math.ceil((self.search.trials or _TRIALS) / len(self.phases))

    def _ask(self, fixed: dict[str, Any]) -> Proposal | None:
        """The next proposal, or None when this phase is over. One worker at a time."""
        if self.search.minutes and time.monotonic() - self.started > self.search.minutes * 60:
            self.on_event(Note(f"search: {self.search.minutes:g} minutes are over"))
            return None
        study, spaces = self.studies[self.phase], self.phases[self.phase]
        with self.workflow.store.making(f"ask-{self.key}", "search", lambda event: None):
            for _ in range(100):  # proposals that were tried already are answered at once
                trials = [t for t in study.trials if (self.phase, t.number) not in self.stale and not is_void(t)]
                tried = {_canonical(t.user_attrs["chosen"]): t for t in trials if "chosen" in t.user_attrs}
                met = self.search.stop_when_met and any(self._is_feasible(t) for t in trials)
                if met or len(tried) >= min(self.limit, _combinations(spaces)):
                    return None
                trial = study.ask(
                    {s.path: distribution(s) for s in spaces} if self.search.sampler != "exhaustive" else None
                )
                chosen = self._values(trial, spaces, fixed, tried)
                if chosen is None:
                    trial.set_user_attr("void", True)
                    study.tell(trial, state=_failed())
                    return None
                trial.set_user_attr("chosen", chosen)
                trial.set_user_attr("by", [platform.node(), os.getpid()])
                earlier = tried.get(_canonical(chosen))
                if earlier is None:
                    truncated = self.search.truncate_rank
                    trial.set_user_attr("truncated", truncated)
                    self._say(trial, chosen)
                    return Proposal(chosen, truncated, trial, self._loss_trial(chosen))
                trial.set_user_attr("void", True)
                trial.set_user_attr("shortfalls", earlier.user_attrs.get("shortfalls") or [])
                if earlier.values:
                    study.tell(trial, earlier.values)
                else:
                    study.tell(trial, state=_failed())
        return None

    def _values(
        self, trial: Any, spaces: list[Space], fixed: dict[str, Any], tried: dict[str, Any]
    ) -> dict[str, Any] | None:
        """path -> value of what `trial` proposes; None if everything was tried."""
        if self.search.sampler == "exhaustive":
            return next(({**fixed, **c} for c in combinations(spaces) if _canonical({**fixed, **c}) not in tried), None)
        drawn = {s.path: s.choices[trial.params[s.path]] if s.choices else trial.params[s.path] for s in spaces}
        return {**fixed, **drawn}

    def _fixed(self) -> dict[str, Any]:
        """Values of the phases before (their best) and after (each space's first)."""
        fixed = {
            s.path: s.examples()[0] for phase in self.phases for s in phase if phase is not self.phases[self.phase]
        }
        if self.phase:
            done = [
                self._as_result(i, t)
                for i, t in enumerate(self.studies[self.phase - 1].trials)
                if t.state.name == "COMPLETE"
            ]
            best = min(done, key=lambda t: (sum(t.missed.values()), self.workflow.goals.rank(t.values)), default=None)
            if best is not None:
                fixed |= best.chosen
        return {path: v for path, v in fixed.items() if path not in {s.path for s in self.phases[self.phase]}}

    def _winner_again(self) -> Proposal | None:
        """The winner once more: trained at its own rank where it was a truncated one, or made again where the cache lost it."""
        best = RunResult(self.workflow.goals, self.base, tuple(self.known([]))).best
        if best is None:
            return None
        if best.truncated:
            self.on_event(Note(f"search: training the winner (trial {best.number}) at its own rank"))
            return Proposal(best.chosen, False)
        if not self.workflow.store.has(best.steps[-1].key):
            return Proposal(best.chosen, best.truncated)
        return None

    def _wait_for_others(self) -> None:
        """Wait until the trials of other workers have ended; those of dead ones are given up."""
        said = False
        while any(t.state.name == "RUNNING" and not is_dead(t) for t in self.studies[self.phase].trials):
            if not said:
                self.on_event(Note("search: waiting for the trials of other workers"))
            said = True
            time.sleep(0.5)

    def _say(self, trial: Any, chosen: dict[str, Any]) -> None:
        shown = ", ".join(f"{path.removeprefix('passes.')} {value:.3g}" if isinstance(value, float) else f"{path.removeprefix('passes.')} {value}" for path, value in chosen.items())  # fmt: skip
        self.on_event(Note(f"trial {trial.number}: {shown}"))

    def _shortfalls(self, trial: TrialResult) -> list[float]:
        goals = self.workflow.goals
        if not trial.values:
            return [1.0] * max(1, len(goals.constraints))
        return [c.shortfall(trial.values, self.base) / (abs(c.limit(self.base)) or 1.0) for c in goals.constraints] or [
            0.0
        ]

    def _objectives(self, trial: TrialResult) -> list[float]:
        """What optuna minimizes: the objectives, or how far the constraints are missed."""
        rank = list(self.workflow.goals.rank(trial.values))
        return rank or [sum(max(0.0, s) for s in self._shortfalls(trial))]

    def _is_feasible(self, trial: Any) -> bool:
        return trial.state.name == "COMPLETE" and all(s <= 0 for s in trial.user_attrs.get("shortfalls") or [0.0])

    def _loss_trial(self, chosen: dict[str, Any]) -> Any:
        """A trial in the study of losses, if this proposal will train something."""
        if self.losses is None:
            return None
        steps = self.workflow.steps(chosen, truncated=self.search.truncate_rank)
        trains = any(s.pass_.data and not self.workflow.store.has(s.key) for s in steps)
        return self.losses.ask() if trains else None


def _phases(spaces: list[Space], order: str) -> list[list[Space]]:
    if order == "joint":
        return [spaces]
    names = list(dict.fromkeys(_pass_of(s) for s in spaces))
    return [[s for s in spaces if _pass_of(s) == name] for name in names]


def _combinations(spaces: list[Space]) -> float:
    """How many there are; infinity with a range that has no step."""
    return math.prod(math.inf if space.count is None else space.count for space in spaces)


def _pass_of(space: Space) -> str:
    return space.path.split(".")[1].split("[")[0]


def _step_result(step: Step, workflow: Workflow) -> StepResult:
    facts = workflow.store.facts(step.key)
    seconds = float(facts.get("seconds") or 0)
    return StepResult(
        step.entry.name, step.entry.type, step.key, step.parent, step.pass_.gives, step.job.output, seconds, True
    )


def _canonical(chosen: dict[str, Any]) -> str:
    return json.dumps(chosen, sort_keys=True)


def _same(a: TrialResult, b: TrialResult) -> bool:
    return _canonical(a.chosen) == _canonical(b.chosen) and a.truncated == b.truncated


def _failed() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL
