"""Score one generator on held-out examples: every example is answered greedily and compared with its reference.

The prompts are the very token ids that training would have seen before the answer. Not here: loading, tables.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phinetune.evaluation.metrics import METRICS, wilson_interval
from phinetune.events import OnEvent, Progress, log_event
from phinetune.generation.protocol import Generator


@dataclass(frozen=True)
class Answer:
    """One held-out example, answered: where it came from, the reference, the answer, and whether it ended by itself."""

    place: str
    reference: str
    answer: str
    stopped: bool
    scores: dict[str, float]


@dataclass(frozen=True)
class Score:
    """Metrics of one stage over `count` examples. `stop_rate` is the share of answers that ended by themselves."""

    stage: str
    count: int
    metrics: dict[str, float]
    interval: tuple[float, float]
    stop_rate: float
    seconds: float
    answers: tuple[Answer, ...] = ()

    @property
    def correct(self) -> int:
        """Examples answered exactly."""
        return round(self.metrics["exact_match"] * self.count)


def answer_limit(examples: Any, contract: Any) -> int:
    """Tokens an answer may take: the longest reference, and half as much again, at least 8 more."""
    longest = max(
        len(ids) - prompt
        for ids, prompt in zip(examples.table["input_ids"], examples.table["prompt_length"], strict=True)
    )
    return int(longest + max(8, longest // 2))


def score(
    generator: Generator,
    examples: Any,
    stage: str,
    max_new_tokens: int | None = None,
    on_event: OnEvent = log_event,
    metrics: Sequence[str] | None = None,
) -> Score:
    """Answer every example of `examples` (an `Examples`) and score the answers with every metric, or with exact_match and `metrics`."""
    chosen = {
        name: METRICS[name] for name in (METRICS if metrics is None else dict.fromkeys(["exact_match", *metrics]))
    }
    limit = max_new_tokens or answer_limit(examples, generator.contract)
    rows: Sequence[dict[str, Any]] = list(examples.table)
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    start = time.perf_counter()
    answers = []
    on_event(Progress(f"evaluating {stage}", 0, len(rows)))
    for row, completion in zip(rows, generator.complete(prompts, limit), strict=True):
        scores = {name: metric(completion.text, row["completion"]) for name, metric in chosen.items()}
        answers.append(Answer(row["place"], row["completion"], completion.text, completion.stopped, scores))
        on_event(
            Progress(
                f"evaluating {stage}",
                len(answers),
                len(rows),
                {"exact_match": sum(a.scores["exact_match"] for a in answers) / len(answers)},
            )
        )
    seconds = time.perf_counter() - start
    n = len(answers)
    means = {name: sum(a.scores[name] for a in answers) / n for name in chosen}
    stops = sum(a.stopped for a in answers) / n
    return Score(stage, n, means, wilson_interval(means["exact_match"], n), stops, round(seconds, 2), tuple(answers))
