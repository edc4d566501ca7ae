"""The table of stages as data: what `results.json` holds and what the terminal shows come from the same rows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phinetune.artifact import disk_errors, versions, write_json
from phinetune.evaluation.score import Answer, Score

_WRONG_SHOWN = 20


@dataclass(frozen=True)
class StageResult:
    """One stage: the model as it is there, its score on the held-out examples, its size on disk, the seconds spent making and scoring it."""

    stage: str
    path: str
    metric: str
    value: float
    correct: int
    count: int
    interval: tuple[float, float]
    stop_rate: float
    size_bytes: int
    seconds_made: float
    seconds_evaluated: float
    wrong: list[dict[str, str]]
    metrics: dict[str, float] = field(default_factory=dict)
    """Every metric and measurement that was asked for, by name."""


def wrong_answers(answers: Sequence[Answer]) -> list[dict[str, str]]:
    """The first answers that are not the reference, for reading: where the example stands, the reference, the answer."""
    wrong = (a for a in answers if a.scores["exact_match"] < 1)
    return [
        {"place": Path(a.place).name, "reference": a.reference, "answer": a.answer}
        for a in itertools.islice(wrong, _WRONG_SHOWN)
    ]


def stage_result(
    score: Score, path: Path, size_bytes: int, seconds_made: float = 0.0, metrics: dict[str, float] | None = None
) -> StageResult:
    """The row of `score`, with the first wrong answers and, where more than exact_match was asked for, `metrics`."""
    interval = (round(score.interval[0], 4), round(score.interval[1], 4))
    return StageResult(
        score.stage,
        str(path),
        "exact_match",
        round(score.metrics["exact_match"], 6),
        score.correct,
        score.count,
        interval,
        round(score.stop_rate, 4),
        size_bytes,
        round(seconds_made, 2),
        score.seconds,
        wrong_answers(score.answers),
        {"exact_match": score.metrics["exact_match"]} if metrics is None else metrics,
    )


def results(stages: list[StageResult], **more: Any) -> dict[str, Any]:
    """What `results.json` holds: the stages, whatever else the caller adds, versions and time."""
    return {
        "stages": [asdict(s) for s in stages],
        **more,
        "versions": versions(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_results(file: Path, value: dict[str, Any]) -> None:
    """Write `results.json` whole, making its folder if need be."""
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, value)
