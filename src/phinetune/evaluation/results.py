"""The table of stages as data: what `results.json` holds and what the terminal shows come from the same rows."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phinetune.artifact import disk_errors, versions, write_json
from phinetune.evaluation.score import Score

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


def stage_result(score: Score, path: Path, size_bytes: int, seconds_made: float = 0.0) -> StageResult:
    """The row of `score`; the first wrong answers are kept, for reading."""
    wrong = [
        {"place": Path(a.place).name, "reference": a.reference, "answer": a.answer}
        for a in score.answers
        if a.scores["exact_match"] < 1
    ]
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
        wrong[:_WRONG_SHOWN],
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
