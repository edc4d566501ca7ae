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
from phinetune.events import OnEvent, log_event, nobody
from phinetune.generation.load import find, find_contract, find_manifest, load_generator
from phinetune.model.contract import PromptContract
from phinetune.model.folder import Kind
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
class Subject:
    """A model to examine, found and not loaded, with the examples it will be asked, encoded for it, where any are needed."""

    model: str
    folder: Path
    kind: Kind
    base_model: str | None = None
    model_kwargs: dict[str, Any] | None = None
    contract: PromptContract | None = None
    part: Part | None = None


@dataclass(frozen=True)
class Examined:
    """An assessment, and what it was made from: the subject, and its score where there was any."""

    assessment: Assessment
    subject: Subject
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
    subject = Subject(model, folder, kind, base_model, model_kwargs)
    if needs - {"files"}:
        subject = with_examples(subject, data, names, split, max_examples, on_event)
    evidence, scored = gather_from(subject, names, effort, on_event)
    if "process" in needs:
        evidence = replace(evidence, peak_bytes=peak_of(subject, names, effort, on_event))
    values, intervals = values_and_intervals(evidence, names)
    assessment = Assessment(
        model,
        kind,
        values,
        scored.count if scored else len(subject.part.examples) if subject.part else 0,
        intervals,
        round(time.perf_counter() - started, 2),
        wrong_answers(evidence.answers),
    )
    return Examined(assessment, subject, scored)


def with_examples(
    subject: Subject,
    data: DataConfig | str | dict[str, Any] | None,
    names: Sequence[str],
    split: Split | None,
    max_examples: int | None,
    on_event: OnEvent = log_event,
) -> Subject:
    """`subject` with its contract and the examples that `names` are about. Raises a PhinetuneError where they cannot be answered."""
    contract = find_contract(
        subject.model, subject.model_kwargs, subject.base_model, nobody
    )  # the loading says the same
    manifest = find_manifest(subject.model, subject.folder)
    part = choose_examples(data, split, manifest, contract, max_examples, on_event)
    if needed(names) & {"answers", "clock"} and part.config.templates and not part.config.templates[0].strip():
        raise ConfigError(
            f"data.text: {part.config.text!r} has no prompt before its last field: there is nothing to answer",
            "ask for loss or perplexity of such texts",
        )
    return replace(subject, contract=contract, part=part)


def gather_from(
    subject: Subject, names: Sequence[str], effort: Effort, on_event: OnEvent = log_event, stage: str | None = None
) -> tuple[Evidence, Score | None]:
    """What `names` need of the subject but its memory, by loading it once, or not at all; and its score where answers are among it.

    stage: what the model is called in events and in the score, by default its kind.
    """
    needs = needed(names)
    evidence, scored = Evidence(), None
    if subject.part is not None and needs - {"files", "process"}:
        part = subject.part
        with working(on_event):
            generator = load_generator(subject.model, subject.model_kwargs, None, subject.base_model, on_event)
        generator = with_chat_template(generator, part.config, on_event)
        place = f"{part.config.path}, {part.split} part"
        evidence, scored = gather(generator, part.examples, names, stage or subject.kind, effort, place, on_event)
    if "files" in needs:
        evidence = replace(evidence, size_bytes=folder_bytes(subject.folder))
    return evidence, scored


def peak_of(subject: Subject, names: Sequence[str], effort: Effort, on_event: OnEvent = log_event) -> int:
    """Peak bytes of a fresh process that loads the subject and answers its longest prompts, after `gather_from` for the same `names`."""
    if subject.part is None or subject.contract is None:
        raise RuntimeError("the subject has no examples")
    needs, part = needed(names), subject.part
    gc.collect()  # two models at a time may be one too many
    heard = nobody if needs & {"answers", "clock"} else on_event
    examples = answerable(part.examples, ["memory"], f"{part.config.path}, {part.split} part", heard)
    prompts = sorted(prompts_of(examples), key=len)[-_MEMORY_PROMPTS:]
    limit = effort.max_new_tokens or answer_limit(examples, subject.contract)
    heard = nobody if needs - {"files", "process"} else on_event
    with working(on_event):
        return peak_memory(subject.model, prompts, limit, subject.model_kwargs, subject.base_model, heard)
