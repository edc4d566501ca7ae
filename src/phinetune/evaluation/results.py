"""The table of stages as data: what `results.json` holds and what terminal and report show come from the same rows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phinetune.artifact import disk_errors, versions, write_json
from phinetune.evaluation.metrics import wilson_interval
from phinetune.evaluation.pairs import Pairs
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
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Every metric and measurement that was asked for, by name; None where there is no number."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why, for each that is None."""
    against: Pairs | None = None
    """How it did against the stage of reference, example by example."""
    seconds: float = 0.0
    """For all that was measured, loading included."""


def wrong_answers(answers: Sequence[Answer], metric: str = "exact_match") -> list[dict[str, str]]:
    """The first answers that `metric` does not count as right, for reading: where the example stands, the reference, the answer."""
    wrong = (a for a in answers if a.scores[metric] < 1)
    return [
        {"place": Path(a.place).name, "reference": a.reference, "answer": a.answer}
        for a in itertools.islice(wrong, _WRONG_SHOWN)
    ]


def stage_result(
    score: Score,
    path: Path,
    size_bytes: int,
    seconds_made: float = 0.0,
    metrics: Mapping[str, float | None] | None = None,
    metric: str = "exact_match",
) -> StageResult:
    """The row of `score`, judged by `metric`, a metric of one answer; with the first wrong answers and, where more was asked for, `metrics`."""
    value = score.metrics[metric]
    low, high = wilson_interval(value, score.count)
    return StageResult(
        score.stage,
        str(path),
        metric,
        round(value, 6),
        sum(a.scores[metric] >= 1 for a in score.answers),
        score.count,
        (round(low, 4), round(high, 4)),
        round(score.stop_rate, 4),
        size_bytes,
        round(seconds_made, 2),
        score.seconds,
        wrong_answers(score.answers, metric),
        {metric: value} if metrics is None else dict(metrics),
    )


def results(stages: list[StageResult], **more: Any) -> dict[str, Any]:
    """What `results.json` holds: the stages, whatever else the caller adds, versions and time."""
    return {
        "stages": [asdict(s) for s in stages],
        **more,
        "versions": versions(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def read_stages(value: dict[str, Any]) -> list[StageResult]:
    """The stages of what `results` made and a file kept. Raises KeyError or TypeError for anything else."""
    made = []
    for row in value["stages"]:
        against = row["against"] and Pairs(**row["against"])
        made.append(StageResult(**{**row, "interval": tuple(row["interval"]), "against": against}))
    return made


def write_results(file: Path, value: dict[str, Any]) -> None:
    """Write `results.json` whole, making its folder if need be."""
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, value)
