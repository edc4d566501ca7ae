"""From names to numbers: gather what the asked-for metrics and measurements need of one loaded model, and nothing else.

Answers and losses are gathered as work among other work, timings on a quiet machine. Not here: loading, which examples, files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phinetune.errors import ConfigError, DataError
from phinetune.evaluation.clock import QUANTILES, time_answers
from phinetune.evaluation.loss import held_out_loss
from phinetune.evaluation.measurements import Evidence, Need, measurements
from phinetune.evaluation.metrics import label_of, wilson_interval
from phinetune.evaluation.score import Score, answer_limit, score
from phinetune.events import Note, OnEvent, log_event
from phinetune.generation.protocol import Generator
from phinetune.quiet import measuring, working


@dataclass(frozen=True)
class Assessment:
    """One model in numbers: `values` for exactly the names that were asked for, in their order.

    count: examples they rest on (0 where none was needed). intervals: Wilson's 95 % interval of those values that are shares of the
    examples. seconds: for all of it, loading included. wrong: the first wrong answers, where answers were needed.
    """

    model: str
    stage: str
    values: dict[str, float]
    count: int = 0
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0
    wrong: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Effort:
    """How much is done for the numbers: the answer limit (None: by the references), answers before the timed ones, timed ones."""

    max_new_tokens: int | None = None
    warmup: int = 3
    repeats: int = 20


def needed(names: Sequence[str]) -> set[Need]:
    """What must be gathered for `names`."""
    known = measurements()
    return {known[name].needs for name in names}


def answerable(examples: Any, names: Sequence[str], place: str, on_event: OnEvent = log_event) -> Any:
    """Those of `examples` (an `Examples`) that have a prompt to answer. Raises DataError if none has; says how many have not."""
    chosen = [i for i, n in enumerate(examples.table["prompt_length"]) if n > 0]
    if not chosen:
        raise DataError(
            f"{place}: {', '.join(names)} need examples with a prompt and an answer, and there is none",
            "ask for loss, perplexity or size, or give data with prompts",
        )
    if len(chosen) == len(examples):
        return examples
    on_event(Note(f"{place}: {len(examples) - len(chosen)} examples have no prompt and are not answered", warning=True))
    return examples.subset(chosen)


def gather(
    generator: Generator,
    examples: Any,
    names: Sequence[str],
    stage: str,
    effort: Effort,
    place: str = "data",
    on_event: OnEvent = log_event,
) -> tuple[Evidence, Score | None]:
    """What `names` need of `generator` and of `examples` (an `Examples`, not empty), and the score where answers are among it.

    `place` names the data in errors. Raises DataError where examples cannot be answered or hold nothing to learn.
    """
    known, needs = measurements(), needed(names)
    if "clock" in needs:
        _say_what_is_too_few(names, effort.repeats, on_event)
    loss, scored, timings = None, None, []
    asked = [n for n in names if known[n].needs in ("answers", "clock")]
    with_prompts = answerable(examples, asked, place, on_event) if asked else examples
    with working(on_event):
        if "answers" in needs:
            metrics = [n for n in names if known[n].needs == "answers"]
            scored = score_answers(generator, with_prompts, stage, metrics, effort, on_event)
        if "loss" in needs:
            loss = held_out_loss(generator, examples, stage, on_event)
    if "clock" in needs:
        prompts = prompts_of(with_prompts)
        limit = effort.max_new_tokens or answer_limit(with_prompts, generator.contract)
        with measuring(on_event):
            timings = time_answers(generator, prompts, limit, effort.warmup, effort.repeats, on_event)
    return Evidence(scored.answers if scored else (), loss, timings), scored


def score_answers(
    generator: Generator, examples: Any, stage: str, names: Sequence[str], effort: Effort, on_event: OnEvent
) -> Score:
    """`score` with those of `names` that look at one answer; warns where label metrics meet references that are no labels."""
    from phinetune.evaluation.metrics import METRICS

    scored = score(generator, examples, stage, effort.max_new_tokens, on_event, [n for n in names if n in METRICS])
    of_labels = [n for n in names if n in ("precision", "recall", "f1")]
    labels = {label_of(a.reference) for a in scored.answers}
    if of_labels and len(labels) > max(2, scored.count // 2):
        on_event(
            Note(
                f"{', '.join(of_labels)}: {scored.count} references hold {len(labels)} different answers; these are metrics for labels",
                warning=True,
            )
        )
    return scored


def prompts_of(examples: Any) -> list[list[int]]:
    """The ids before the answer of each example."""
    return [row["input_ids"][: row["prompt_length"]] for row in examples.table]


def values_and_intervals(
    evidence: Evidence, names: Sequence[str]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Each of `names` computed from `evidence`, and Wilson's interval of each that is a share of the examples."""
    known = measurements()
    values = {name: float(known[name].function(evidence)) for name in names}
    shares = [name for name in names if known[name].share and evidence.answers]
    return values, {name: wilson_interval(values[name], len(evidence.answers)) for name in shares}


def values_or_reasons(evidence: Evidence, names: Sequence[str]) -> tuple[dict[str, float | None], dict[str, str]]:
    """Each of `names` computed from `evidence`, None where there is no finite number, and why of those."""
    known = measurements()
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            value = float(known[name].function(evidence))
        except ConfigError as error:  # of what was gathered, nothing has such a number
            values[name], reasons[name] = None, error.problems[0].removeprefix(f"metrics: {name}: ")
            continue
        values[name] = value if math.isfinite(value) else None
        if values[name] is None:
            reasons[name] = "not a finite number: some of the model's logits are not"
    return values, reasons


def _say_what_is_too_few(names: Sequence[str], repeats: int, on_event: OnEvent) -> None:
    """A percentile that `repeats` answers hardly tell from the largest is said."""
    far = [
        n for n in names if (share := QUANTILES.get(n.rpartition("_")[2])) is not None and repeats * (1 - share) < 0.5
    ]
    if far:
        on_event(
            Note(f"{', '.join(far)}: of {repeats} timed answers this is hardly more than the outermost; raise repeats")
        )
