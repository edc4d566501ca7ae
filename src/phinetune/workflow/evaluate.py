"""Evaluate any stage's model on the held-out part of a data file, with the prompts it was trained with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from phinetune.artifact import folder_bytes
from phinetune.data.messages import DataConfig
from phinetune.errors import OutputError
from phinetune.evaluation.assessment import Effort
from phinetune.evaluation.measurements import parse_metrics
from phinetune.evaluation.results import StageResult, results, stage_result, write_results
from phinetune.events import Note, OnEvent, log_event
from phinetune.workflow.assess import check_effort, examine
from phinetune.workflow.held_out import Split


def evaluate(
    model: str,
    data: str | dict[str, Any] | DataConfig | None = None,
    split: Split | None = None,
    output: str | Path | None = None,
    max_new_tokens: int | None = None,
    base_model: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    metrics: str | Sequence[str] = ("exact_match",),
    on_event: OnEvent = log_event,
) -> StageResult:
    """Score `model` (a folder that finetune, merge or export wrote, a base model's folder, a hub id, an embedded name) on `data`.

    split: the held-out examples (those the training of the same file and seed did not see, or all of its eval_data), the trained ones,
    or all; by default the held-out ones of what the model was trained on, and all of any other file given for a trained model.
    output: where to write the result as JSON. max_new_tokens defaults to half as much again as the longest reference.
    base_model: for an adapter, another place of its base model. metrics: further names, such as perplexity or latency_p50 (see
    `assess`), whose values are the result's `metrics`; exact match is always scored. Raises a PhinetuneError for what the user can mend.
    """
    names = parse_metrics(metrics)
    effort = Effort(max_new_tokens)
    check_effort(effort)
    target = _check_file(output)
    found = examine(
        model,
        data,
        ["exact_match", *(n for n in names if n != "exact_match")],
        split,
        effort,
        None,
        base_model,
        model_kwargs,
        on_event,
    )
    if found.score is None or found.subject.part is None:
        raise RuntimeError("exact_match was not scored")
    values = {name: found.assessment.values[name] for name in names}
    result = stage_result(found.score, found.subject.folder, folder_bytes(found.subject.folder), metrics=values)
    result = replace(result, seconds=found.assessment.seconds)
    if target:
        part = found.subject.part
        write_results(
            target, results([result], model=model, data=part.config.path, split=part.split, seed=part.config.seed)
        )
        on_event(Note(f"results: {target}"))
    return result


def _check_file(output: str | Path | None) -> Path | None:
    """The file to write, checked before the long work begins."""
    if output is None:
        return None
    file = Path(output).expanduser()
    parent = next(p for p in file.absolute().parents if p.exists())
    if file.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{file}: cannot be written as a file", "choose another file")
    return file
