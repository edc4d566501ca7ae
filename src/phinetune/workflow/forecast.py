"""What a run would do, before it does it: steps, what is cached, what will be fetched, and how much memory and time they took before.

Time and memory are those of the same pass when it last ran on the same base model, as the cache notes them. Nothing is computed and nothing is fetched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from phinetune.errors import PhinetuneError
from phinetune.generation.load import find
from phinetune.model.folder import weight_files
from phinetune.workflow.plan import Step, Workflow, missing_model
from phinetune.workflow.run import chosen_steps
from phinetune.workflow.spaces import Space


@dataclass(frozen=True)
class PlannedStep:
    """One row of the plan."""

    name: str
    type: str
    takes: str
    gives: str
    cached: bool
    memory: int | None
    """Most bytes that it took on this model before; None where it never ran."""
    seconds: float | None
    """Seconds that it took then."""


@dataclass(frozen=True)
class Forecast:
    """The plan of the first trial, and what else there is to know."""

    steps: list[PlannedStep]
    lines: list[str]


def forecast(workflow: Workflow, only: str | None = None, until: str | None = None) -> Forecast:
    """The plan of `workflow` with each space at its first value."""
    first = {space.path: space.examples()[0] for space in workflow.spaces}
    steps = chosen_steps(workflow.steps(first), workflow, only, until, planned=True)
    size = _weights(workflow)
    kind, rows = workflow.source.kind, []
    for step in steps:
        cached = workflow.store.has(step.key)
        rows.append(
            PlannedStep(
                step.entry.name, step.entry.type, kind, step.pass_.gives, cached,
                *((None, 0.0) if cached else _before(step, workflow)),
            )
        )  # fmt: skip
        kind = step.pass_.gives
    lines = [
        f"input: {workflow.source.name}" + (", to be fetched from the hub" if missing_model(workflow.config) else "")
    ]
    if size:
        lines.append(
            f"weights of the input: {size / 1e6:.0f} MB; memory and time are those of the last such pass in this cache"
        )
    lines += [f"space: {_text(space)}" for space in workflow.spaces]
    search = workflow.config.search
    if search and workflow.spaces:
        count = (
            f"{search.trials} trials"
            if search.trials
            else "every combination"
            if search.sampler == "exhaustive"
            else "20 trials"
        )
        lines.append(f"search: {search.sampler}, {count}{f', {search.minutes:g} minutes' if search.minutes else ''}")
    lines += [f"constraint: {c.text}" for c in workflow.goals.constraints]
    lines += [f"objective: {o.text}" for o in workflow.goals.objectives]
    lines.append(f"output: {Path(workflow.config.output_dir)}; cache: {workflow.store.folder}")
    return Forecast(rows, lines)


def _before(step: Step, workflow: Workflow) -> tuple[int | None, float | None]:
    """(bytes, seconds) of the same pass when it last ran on this base model; on the same input, if it did."""
    known = []
    for file in (workflow.store.folder / "entries").glob("*.json"):
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if facts.get("pass") == step.entry.type and facts.get("source") == workflow.source.key and facts.get("seconds"):
            known.append((facts.get("parent") == step.parent, float(facts.get("used") or 0), facts))
    if not known:
        return None, None
    facts = max(known, key=lambda k: k[:2])[2]
    return facts.get("peak_bytes"), float(facts["seconds"])


def _weights(workflow: Workflow) -> float:
    """Bytes of the base model's weights; 0 where they are not here yet."""
    if missing_model(workflow.config):
        return 0.0
    try:
        folder, _ = find(workflow.config.model.path, workflow.config.model.model_kwargs, lambda event: None)
        return float(sum(f.stat().st_size for f in weight_files(folder)[0]))
    except PhinetuneError:
        return 0.0


def _text(space: Space) -> str:
    if space.choices:
        return f"{space.path}: {', '.join(map(str, space.choices))}"
    how = " (log)" if space.log else f" in steps of {space.step:g}" if space.step else ""
    return f"{space.path}: {space.low:g} to {space.high:g}{how}"
