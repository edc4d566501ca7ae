"""Numbers for any stage's model, asked for by name: metrics on held-out examples, measurements with a clock, sizes.

What constraints and objectives are made of. Only what was asked for is computed: a size loads nothing, exact match times nothing, and
one load of the model serves everything but its memory, which a fresh process tells. Not here: the table of names (`evaluation`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.artifact import folder_bytes
from phinetune.data.messages import DataConfig
from phinetune.errors import ConfigError
from phinetune.evaluation.assessment import (
    Assessment,
    Effort,
    answerable,
    gather,
    needed,
    prompts_of,
    values_and_intervals,
)
from phinetune.evaluation.measurements import Evidence, parse_metrics
from phinetune.evaluation.memory import check_memory_can_be_measured, peak_memory
from phinetune.evaluation.results import wrong_answers
from phinetune.evaluation.score import Score, answer_limit
from phinetune.events import Event, OnEvent, log_event
from phinetune.generation.load import find, find_contract, find_manifest, load_generator
from phinetune.quiet import working
from phinetune.workflow.held_out import Part, Split, choose_examples, with_chat_template

_MEMORY_PROMPTS = 3  # the longest ones: they need most


def assess(
    model: str,
    data: DataConfig | str | dict[str, Any] | None = None,
    metrics: str | Sequence[str] = ("exact_match",),
    split: Split | None = None,
    max_new_tokens: int | None = None,
    max_examples: int | None = None,
    warmup: int = 3,
    repeats: int = 20,
    base_model: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    on_event: OnEvent = log_event,
) -> Assessment:
    """The numbers called `metrics` ("a,b" or a list) of `model`, given as for `evaluate`, on held-out examples of `data`.

    Names: see `evaluation.measurements`. data, split: as for `evaluate`; not looked at where no name needs examples. max_new_tokens: the
    answer limit, by default half as much again as the longest reference. max_examples: at most so many, evenly spread over the part.
    warmup, repeats: answers before the timed ones, and timed ones. Timing waits until no pass of phinetune works on this machine, and
    holds new ones back. Raises a PhinetuneError for what the user can mend, before the model is loaded where that can be known.
    """
    effort = Effort(max_new_tokens, warmup, repeats)
    check_effort(effort, max_examples)
    names = parse_metrics(metrics)
    return examine(model, data, names, split, effort, max_examples, base_model, model_kwargs, on_event).assessment


@dataclass(frozen=True)
class Examined:
    """An assessment, and what it was made from: the model's folder, and the examples and their score where there were any."""

    assessment: Assessment
    folder: Path
    part: Part | None = None
    score: Score | None = None


def check_effort(effort: Effort, max_examples: int | None = None) -> None:
    """Raises one ConfigError with every number that cannot be."""
    lowest = {
        "max_new_tokens": (effort.max_new_tokens, 1),
        "max_examples": (max_examples, 1),
        "warmup": (effort.warmup, 0),
        "repeats": (effort.repeats, 1),
    }
    problems = [
        f"{name}: must be at least {least} (found: {value})"
        for name, (value, least) in lowest.items()
        if value is not None and value < least
    ]
    if problems:
        raise ConfigError(problems)


def examine(
    model: str,
    data: DataConfig | str | dict[str, Any] | None,
    names: Sequence[str],
    split: Split | None,
    effort: Effort,
    max_examples: int | None,
    base_model: str | None,
    model_kwargs: dict[str, Any] | None,
    on_event: OnEvent,
) -> Examined:
    """`assess` for checked arguments, with what the numbers were made from."""
    started = time.perf_counter()
    needs = needed(names)
    if "process" in needs:
        check_memory_can_be_measured()
    folder, kind = find(model, model_kwargs, on_event)
    evidence, part, scored = Evidence(), None, None
    if needs - {"files"}:
        contract = find_contract(model, model_kwargs, base_model, _nobody)  # the loading says the same
        part = choose_examples(data, split, find_manifest(model, folder), contract, max_examples, on_event)
        place = f"{part.config.path}, {part.split} part"
        if needs & {"answers", "clock"} and part.config.templates and not part.config.templates[0].strip():
            raise ConfigError(
                f"data.text: {part.config.text!r} has no prompt before its last field: there is nothing to answer",
                "ask for loss or perplexity of such texts",
            )
        loading = bool(needs - {"files", "process"})
        if loading:
            with working(on_event):
                generator = load_generator(model, model_kwargs, None, base_model, on_event)
            generator = with_chat_template(generator, part.config, on_event)
            evidence, scored = gather(generator, part.examples, names, kind, effort, place, on_event)
            del generator
        if "process" in needs:
            gc.collect()  # two models at a time may be one too many
            examples = answerable(
                part.examples, ["memory"], place, _nobody if needs & {"answers", "clock"} else on_event
            )
            prompts = sorted(prompts_of(examples), key=len)[-_MEMORY_PROMPTS:]
            limit = effort.max_new_tokens or answer_limit(examples, contract)
            with working(on_event):
                peak = peak_memory(model, prompts, limit, model_kwargs, base_model, _nobody if loading else on_event)
            evidence = replace(evidence, peak_bytes=peak)
    if "files" in needs:
        evidence = replace(evidence, size_bytes=folder_bytes(folder))
    values, intervals = values_and_intervals(evidence, names)
    assessment = Assessment(
        model,
        kind,
        values,
        scored.count if scored else len(part.examples) if part else 0,
        intervals,
        round(time.perf_counter() - started, 2),
        wrong_answers(evidence.answers),
    )
    return Examined(assessment, folder, part, scored)


def _nobody(event: Event) -> None:
    """Listens to what has been said already."""
