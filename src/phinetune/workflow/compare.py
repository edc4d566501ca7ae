"""The table of truth: the models of all stages, asked the same examples, with every number that decides between them.

One load of each model serves the metric, its interval, perplexity, stop rate and the clock; its memory a fresh process tells. Against
the stage of reference, each stage's examples are counted one by one, so that a difference can be told from chance. Not here: which
examples (`subjects.py`), how the report looks (`evaluation/report.py`).
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from phinetune.data.messages import DataConfig
from phinetune.errors import PhinetuneError
from phinetune.evaluation.assessment import Effort, values_or_reasons
from phinetune.evaluation.memory import check_memory_can_be_measured
from phinetune.evaluation.pairs import compare_pairs
from phinetune.evaluation.report import write_report
from phinetune.evaluation.results import StageResult, results, stage_result, write_results
from phinetune.events import Note, OnEvent, log_event
from phinetune.generation.load import find_manifest
from phinetune.systems.machine import this_machine
from phinetune.workflow.assess import Subject, gather_from, peak_of
from phinetune.workflow.held_out import Split
from phinetune.workflow.redact import without_secrets
from phinetune.workflow.subjects import REPORT, RESULTS, Models, Request, Subjects, find_subjects, said_once

NUMBERS = ("stop_rate", "perplexity", "size", "prefill_p50", "throughput_p50")
"""What every stage is measured by, beside the metric and its memory."""


@dataclass(frozen=True)
class Comparison:
    """The stages in order, the one of reference, and all that `results.json` and the report hold; the folder of these, if written."""

    stages: list[StageResult]
    reference: str
    record: dict[str, Any]
    folder: Path | None = None


def compare(
    models: Models,
    data: DataConfig | str | dict[str, Any] | None = None,
    output_dir: str | Path | None = None,
    metric: str = "exact_match",
    split: Split | None = None,
    max_examples: int | None = None,
    max_new_tokens: int | None = None,
    warmup: int = 1,
    repeats: int = 8,
    reference: str | None = None,
    base_model: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    overwrite: bool = False,
    numbers: Sequence[str] = NUMBERS,
    on_event: OnEvent = log_event,
) -> Comparison:
    """Ask all `models` the same examples and put their numbers side by side; write results.json and report.html into `output_dir`.

    models: a list of folders, hub ids and embedded names, or stage names and these. data, split: as for `evaluate`; without them, what the
    first model of the list that was trained here was trained on. metric: a metric of one answer. warmup, repeats: answers before the timed
    ones, and timed ones. reference: the stage that the others are held against, by default the adapter, else the first. base_model: for
    adapters, another place of their base model. model_kwargs: for the models that are not ONNX. numbers: fewer than `NUMBERS`, where time
    counts. Raises one PhinetuneError with everything
    that the user can mend, before any model is loaded where that can be known.
    """
    started = time.perf_counter()
    heard = said_once(on_event)
    effort = Effort(max_new_tokens, warmup, repeats)
    request = Request(
        models, data, metric, split, max_examples, effort, reference, base_model, model_kwargs, output_dir, overwrite
    )
    subjects = find_subjects(request, heard)
    no_memory = _why_no_memory(heard)
    for text in subjects.notes:
        heard(Note(text, warning=True))
    stages, scores = [], {}
    for name, subject in subjects.by_name.items():
        row, scores[name] = _measured(name, subject, (metric, *numbers), effort, no_memory, heard)
        stages.append(row)
        interval = f"{row.interval[0]:.1%} to {row.interval[1]:.1%}"
        heard(Note(f"{name}: {row.value:.1%} {metric} ({row.correct} of {row.count}, {interval})"))
    base = scores[subjects.reference]
    stages = [
        replace(row, against=None if row.stage == subjects.reference else compare_pairs(scores[row.stage], base))
        for row in stages
    ]
    record = results(stages, **_facts(request, subjects, time.perf_counter() - started))
    found = Comparison(stages, subjects.reference, record)
    return found if output_dir is None else write_comparison(found, Path(output_dir).expanduser(), heard)


def write_comparison(found: Comparison, folder: Path, on_event: OnEvent = log_event) -> Comparison:
    """Write results.json and report.html into `folder`; the comparison that knows where they are."""
    write_results(folder / RESULTS, found.record)
    write_report(folder / REPORT, found.record)
    on_event(Note(f"results: {folder / RESULTS}, report: {folder / REPORT}"))
    return replace(found, folder=folder)


def _why_no_memory(on_event: OnEvent) -> str:
    """Why this system cannot tell a process's memory; empty where it can."""
    try:
        check_memory_can_be_measured()
    except PhinetuneError as error:
        reason = error.problems[0].removeprefix("metrics: ")
        on_event(Note(reason, warning=True))
        return reason
    return ""


def _measured(
    name: str, subject: Subject, names: Sequence[str], effort: Effort, no_memory: str, on_event: OnEvent
) -> tuple[StageResult, list[float]]:
    """The stage's row, and what its answers scored one by one by the first of `names`, its metric."""
    started, metric = time.perf_counter(), names[0]
    evidence, score = gather_from(subject, names, effort, on_event, stage=name)
    if score is None:
        raise RuntimeError("no answers were scored")
    if not no_memory:
        try:
            evidence = replace(evidence, peak_bytes=peak_of(subject, names, effort, on_event))
        except PhinetuneError as error:  # the other numbers are there, and took their time
            no_memory = error.problems[0]
            on_event(Note(f"{name}: memory was not measured: {no_memory}", warning=True))
    values, missing = values_or_reasons(evidence, (*names, "memory"))
    if no_memory:
        values["memory"], missing["memory"] = None, no_memory
    manifest = find_manifest(subject.model, subject.folder)
    made = float(manifest.get("seconds") or 0.0) if manifest.get("stage") else 0.0
    row = stage_result(score, subject.folder, evidence.size_bytes, made, values, metric)
    seconds = round(time.perf_counter() - started, 2)
    return replace(row, missing=missing, seconds=seconds), [a.scores[metric] for a in score.answers]


def _facts(request: Request, subjects: Subjects, seconds: float) -> dict[str, Any]:
    """What `results.json` says beside the stages: what was asked, on which machine, and how to ask again."""
    import torch

    part = subjects.part
    machine = this_machine()
    return {
        "metric": request.metric,
        "reference": subjects.reference,
        "data": without_secrets(asdict(part.config)),
        "split": part.split,
        "seed": part.config.seed,
        "effort": asdict(request.effort),
        "notes": list(subjects.notes),
        "machine": {
            "processor": machine.processor,
            "cores": machine.cores,
            "threads": torch.get_num_threads(),
            "memory": machine.memory,
            "system": machine.system,
        },
        "command": command(request),
        "seconds": round(seconds, 1),
    }


def command(request: Request) -> str:
    """The command that asks the same again, secrets left out."""
    models = request.models
    words = ["phinetune", "compare"]
    words += [f"{n}={m}" for n, m in models.items()] if isinstance(models, Mapping) else list(models)
    options = {
        "--metric": None if request.metric == "exact_match" else request.metric,
        "--split": request.split,
        "--max-examples": request.max_examples,
        "--max-new-tokens": request.effort.max_new_tokens,
        "--warmup": request.effort.warmup,
        "--repeats": request.effort.repeats,
        "--reference": request.reference,
        "--base-model": request.base_model,
        "--output": request.output_dir,
    }
    data = request.data if not isinstance(request.data, DataConfig) else _changed(request.data)
    if isinstance(data, dict):
        words += _settings("data", data)
    elif data is not None:
        words += ["--data", str(data)]
    words += _settings("model_kwargs", request.model_kwargs or {})
    for option, value in options.items():
        words += [] if value is None else [option, str(value)]
    if request.output_dir is not None:
        words.append("--overwrite")
    return shlex.join(words)


def _changed(config: DataConfig) -> dict[str, Any]:
    """The keys of `config` that are not at their defaults."""
    values = asdict(config)
    return {f.name: values[f.name] for f in fields(config) if f.default is MISSING or values[f.name] != f.default}


def _settings(group: str, values: dict[str, Any]) -> list[str]:
    """`values` as --set options."""
    kept = without_secrets(values)
    return [
        word
        for key, value in kept.items()
        for word in ("--set", f"{group}.{key}={value if isinstance(value, str) else json.dumps(value, default=str)}")
    ]
