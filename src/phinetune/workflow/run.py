"""Run a workflow: trial by trial, pass by pass, from what is cached; score, choose, deliver. A plain run is a search with one trial.

    for each trial:  steps -> (cached | run) ... -> assess -> tell the sampler
    at the end:      the best trial that meets every constraint -> output folder

A failing pass is written with its traceback into the log, stores nothing, and ends a plain run; in a search the other trials go on.
Not here: what a pass does, how values are proposed (`search.py`), what the output folder looks like (`deliver.py`).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from phinetune.artifact import building, disk_errors, read_manifest
from phinetune.errors import ConfigError, InfeasibleError, PassError, PhinetuneError, did_you_mean
from phinetune.evaluation.memory import watched_memory
from phinetune.events import Event, Note, OnEvent, log_event
from phinetune.quiet import working
from phinetune.systems.running import run_module
from phinetune.workflow.assessing import assess_artifact, assess_source
from phinetune.workflow.config import as_values
from phinetune.workflow.deliver import check_place, deliver
from phinetune.workflow.goals import Values
from phinetune.workflow.outcome import RunResult, StepResult, TrialResult
from phinetune.workflow.plan import Step, Workflow, default_evaluation
from phinetune.workflow.redact import without_secrets
from phinetune.workflow.search import Proposals, Pruned, propose

LOG = "run.log"


def run_workflow(
    workflow: Workflow,
    only: str | None = None,
    until: str | None = None,
    worker: bool = False,
    on_event: OnEvent = log_event,
) -> RunResult:
    """Run `workflow` and deliver its result into its output folder.

    until: stop after that pass. only: run that pass alone, on what earlier runs left. worker: take part in the search of another run,
    which chooses and delivers. Raises PassError for a pass that fails by a bug, the pass's own PhinetuneError for what the user can mend,
    InfeasibleError if no trial meets every constraint.
    """
    output = Path(workflow.config.output_dir).expanduser()
    check_place(output)
    if workflow.spaces and (only or until):
        raise ConfigError(
            "--only and --until cannot go with a search", "fix the spaces with --set, such as --set passes.lora.r=8"
        )
    trials: list[TrialResult] = []
    with workflow.store.in_use(), open_log(output, on_event) as log, _workers(workflow, output, worker):
        base = assess_source(workflow, log)
        proposals: Proposals = propose(workflow, base, worker, log)
        for proposal in proposals:
            steps: list[StepResult] = []
            started, error = time.perf_counter(), ""
            values: Values = {}
            try:
                for step in chosen_steps(
                    workflow.steps(proposal.chosen, proposal.listen(log), proposal.truncated), workflow, only, until
                ):
                    if not workflow.store.has(step.key):
                        with (
                            workflow.store.making(step.key, step.entry.path, log),
                            working(log),
                            _placing(step, workflow) as place,
                            watched_memory() as memory,
                        ):
                            if place is not None and step.system.type == "local":
                                place[1]["figures"] = step.pass_.run(step.job, place[0]) or {}
                            elif place is not None:
                                _run_elsewhere(step, workflow, output, log)
                        steps.append(_finish(step, workflow, False, memory.peak_bytes, log))
                    else:
                        steps.append(_finish(step, workflow, True, None, log))
                for done in steps if default_evaluation(workflow.config).every_pass else steps[-1:]:
                    values = assess_artifact(workflow, done, log)
            except Pruned as pruned:
                error = str(pruned)
            except Exception as failure:
                error = _describe(failure, log)
                if not workflow.spaces:
                    raise _as_error(failure, output / LOG) from failure
            trial = TrialResult(
                len(trials), proposal.chosen, tuple(steps), values, workflow.goals.missed(values, base) if values else {}, error,
                round(time.perf_counter() - started, 2), proposal.truncated,
            )  # fmt: skip
            trials.append(trial)
            proposals.tell(proposal, trial)
        result = RunResult(workflow.goals, base, tuple(proposals.known(trials)))
        if worker:
            return result
        deliver(workflow, result, output, log)
    if result.best is None:
        raise InfeasibleError(result.nearest_misses(), f"what was tried is in {output / 'results.json'}")
    return result


@contextlib.contextmanager
def _placing(step: Step, workflow: Workflow) -> Iterator[tuple[Path, dict[str, Any]] | None]:
    """(folder that the pass fills, record for its manifest), or None if another run made the artifact meanwhile."""
    record: dict[str, Any] = {"stage": step.entry.type}
    if workflow.store.has(step.key):
        yield None
    elif step.pass_.whole or step.system.type != "local":
        yield step.job.output, record
    else:
        with building(step.job.output, step.pass_.gives, step.key, record) as partial:
            yield partial, record


def _finish(step: Step, workflow: Workflow, cached: bool, peak: int | None, on_event: OnEvent) -> StepResult:
    """Note in the store how the artifact was made, with the most memory that it took, and say that it is there."""
    if not workflow.store.has(step.key):
        raise PassError(f"{step.entry.path}: {step.entry.type} left no finished artifact in {step.job.output}")
    manifest = read_manifest(step.job.output)
    if cached:
        workflow.store.touch(step.key)
        on_event(Note(f"{step.entry.path}: cached ({step.key[:8]})"))
    if not workflow.store.facts(step.key):
        workflow.store.record(
            step.key,
            {
                "pass": step.entry.type, "parent": step.parent, "source": workflow.source.key, "kind": step.pass_.gives,
                "seconds": manifest.get("seconds"), "peak_bytes": peak, "config": without_secrets(asdict(step.job.config)),
            },
        )  # fmt: skip
    return StepResult(
        step.entry.name, step.entry.type, step.key, step.parent, step.pass_.gives, step.job.output, float(manifest.get("seconds") or 0), cached
    )  # fmt: skip


def _run_elsewhere(step: Step, workflow: Workflow, output: Path, on_event: OnEvent) -> None:
    """Run the pass in another Python environment or a container, its log beside ours."""
    from phinetune.workflow.job import describe_job

    folders = [workflow.store.folder, *([Path(step.job.input)] if Path(step.job.input).is_dir() else [])]
    folders += [Path(d.path).parent for d in step.job.data.values() if Path(d.path).exists()]
    log_file = output / f"{step.entry.name}-{step.key[:8]}.log"
    run_module(step.system, "phinetune.workflow.job", describe_job(step), folders, log_file, on_event)


def chosen_steps(
    steps: list[Step], workflow: Workflow, only: str | None, until: str | None, planned: bool = False
) -> list[Step]:
    """The steps that `only` and `until` leave. Raises ConfigError for a pass that is not there or, unless it is just `planned`, whose
    input is not made yet."""
    for option, name in (("--only", only), ("--until", until)):
        if name is not None and name not in [s.entry.name for s in steps]:
            names = [s.entry.name for s in steps]
            raise ConfigError(
                f"{option} {name}: no pass is called that{did_you_mean(name, names)}",
                f"the passes are {', '.join(names)}",
            )
    if until is not None:
        steps = steps[: [s.entry.name for s in steps].index(until) + 1]
    if only is not None:
        index = [s.entry.name for s in steps].index(only)
        missing = next((s for s in steps[:index] if not workflow.store.has(s.key)), None)
        if missing is not None and not planned:
            raise ConfigError(
                f"--only {only}: {missing.entry.path}, which it needs, is not made yet", f"run with --until {only}"
            )
        steps = steps[: index + 1]
    return steps


@contextlib.contextmanager
def _workers(workflow: Workflow, output: Path, worker: bool) -> Iterator[None]:
    """`search.workers` processes in all on one study, until this one is done."""
    search = workflow.config.search
    count = search.workers - 1 if search and workflow.spaces and not worker else 0
    started: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="phinetune-")))
        if count:
            (folder / "workflow.json").write_text(json.dumps(as_values(workflow.config)), encoding="utf-8")
        for number in range(1, count + 1):
            log = held.enter_context((output / f"worker-{number}.log").open("ab"))
            command = [sys.executable, "-m", "phinetune", "run", str(folder / "workflow.json"), "--worker", "--quiet"]
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        try:
            yield
        finally:
            for process in started:
                process.terminate()
                process.wait()


@contextlib.contextmanager
def open_log(output: Path, on_event: OnEvent) -> Iterator[_Log]:
    """`on_event` that also writes notes, with the time, into the log of the output folder."""
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        stream = (output / LOG).open("a", encoding="utf-8")
    with stream:
        yield _Log(stream, on_event)


class _Log:
    """An event listener that passes events on and writes notes down."""

    def __init__(self, stream: TextIO, on_event: OnEvent) -> None:
        self.stream, self.on_event = stream, on_event

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.write(f"{'warning: ' if event.warning else ''}{event.text}")
        self.on_event(event)

    def write(self, text: str) -> None:
        """One entry of the log."""
        self.stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self.stream.flush()


def _describe(failure: Exception, log: _Log) -> str:
    """One line on `failure`; its traceback goes into the log."""
    log.write("".join(traceback.format_exception(failure)).rstrip())
    if isinstance(failure, PhinetuneError):
        return failure.problems[0]
    return f"{type(failure).__name__}: {(str(failure).strip() or 'no message').splitlines()[0]}"


def _as_error(failure: Exception, log: Path) -> PhinetuneError:
    """`failure` for the terminal: ours as it is; anything else as a PassError that names the log."""
    if isinstance(failure, PhinetuneError):
        return failure
    text = (str(failure).strip() or "no message").splitlines()[0]
    return PassError(f"a pass failed: {type(failure).__name__}: {text}", f"the traceback is in {log}")
