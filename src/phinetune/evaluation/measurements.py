"""The table of everything that can be asked about a model by name: what it is, its unit, which way is better, and what it needs.

    metrics from text     answers     each example answered greedily       exact_match, accuracy, f1, precision, recall, stop_rate
    metrics from loss     loss        each example read once               loss, perplexity
    measurements          clock       some answers timed, one at a time    latency_X, time_to_first_token_X, prefill_X, throughput_X
                          files       nothing but the folder               size
                          process     a fresh process with the model       memory

A third party adds a metric of one answer to `METRICS`, or anything else to `MEASUREMENTS`. Not here: how the evidence is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from phinetune.errors import ConfigError, did_you_mean
from phinetune.evaluation.clock import STATISTICS, Statistic, Timing
from phinetune.evaluation.loss import Loss
from phinetune.evaluation.metrics import METRICS, label_scores
from phinetune.evaluation.score import Answer

Need = Literal["answers", "loss", "clock", "files", "process"]


@dataclass(frozen=True)
class Evidence:
    """What was gathered about one model; empty what nobody asked for."""

    answers: Sequence[Answer] = ()
    loss: Loss | None = None
    timings: Sequence[Timing] = ()
    size_bytes: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Measurement:
    """One name that can be asked for. `share`: it is the mean of one number from 0 to 1 an example, so that Wilson's interval holds."""

    function: Callable[[Evidence], float]
    needs: Need
    unit: str
    higher_is_better: bool
    meaning: str
    share: bool = False


def _mean_of(name: str) -> Callable[[Evidence], float]:
    return lambda found: sum(a.scores[name] for a in found.answers) / len(found.answers)


def _of_labels(place: int) -> Callable[[Evidence], float]:
    return lambda found: label_scores([(a.answer, a.reference) for a in found.answers])[place]


def _loss(found: Evidence) -> Loss:
    if found.loss is None:
        raise RuntimeError("no loss was gathered")
    return found.loss


@dataclass(frozen=True)
class Clock:
    """A family of measurements, NAME_X: a number of each answer (None where it has none), and X made of them all."""

    number: Callable[[Timing], float | None]
    unit: str
    higher_is_better: bool
    meaning: str


CLOCKS = {
    "latency": Clock(lambda t: t.whole * 1e3, "ms", False, "from the prompt to the complete answer"),
    "time_to_first_token": Clock(
        lambda t: t.first * 1e3, "ms", False, "from the prompt to the first token of the answer"
    ),
    "prefill": Clock(
        lambda t: t.prefill_rate,
        "tokens/s",
        True,
        "tokens of the prompt over the time to the first token of the answer",
    ),
    "throughput": Clock(
        lambda t: t.rate, "tokens/s", True, "rate of an answer's tokens after the first; answers of one token have none"
    ),
}


def _of_clock(clock: Clock, statistic: Statistic, name: str) -> Callable[[Evidence], float]:
    def value(found: Evidence) -> float:
        numbers = [n for n in map(clock.number, found.timings) if n is not None]
        if not numbers:
            raise ConfigError(f"metrics: {name}: every answer has one token, so there is no such time")
        return statistic(numbers)

    return value


MEASUREMENTS: dict[str, Measurement] = {
    "stop_rate": Measurement(
        lambda found: sum(a.stopped for a in found.answers) / len(found.answers),
        "answers",
        "share",
        True,
        "answers that end by themselves before the limit",
        True,
    ),
    "precision": Measurement(
        _of_labels(0), "answers", "share", True, "of the answers with a label, those right; mean over the labels"
    ),
    "recall": Measurement(
        _of_labels(1),
        "answers",
        "share",
        True,
        "of the references with a label, those answered so; mean over the labels",
    ),
    "f1": Measurement(
        _of_labels(2), "answers", "share", True, "harmonic mean of a label's precision and recall; mean over the labels"
    ),
    "loss": Measurement(
        lambda found: _loss(found).mean,
        "loss",
        "nats/token",
        False,
        "mean negative log-likelihood of supervised tokens",
    ),
    "perplexity": Measurement(lambda found: _loss(found).perplexity, "loss", "", False, "exp of the loss"),
    "size": Measurement(
        lambda found: float(found.size_bytes),
        "files",
        "bytes",
        False,
        "files of the model's folder on disk, checkpoints left out; an adapter's without its base model",
    ),
    "memory": Measurement(
        lambda found: float(found.peak_bytes),
        "process",
        "bytes",
        False,
        "most main memory of a fresh process that loads the model and answers the three longest prompts",
    ),
}
for _family, _clock in CLOCKS.items():
    for _suffix, _statistic in {"": STATISTICS["avg"], **{f"_{x}": s for x, s in STATISTICS.items()}}.items():
        MEASUREMENTS[_family + _suffix] = Measurement(
            _of_clock(_clock, _statistic, _family + _suffix),
            "clock",
            _clock.unit,
            _clock.higher_is_better,
            _clock.meaning,
        )

_MEANINGS = {
    "exact_match": "answers that are the reference, outer white space aside",
    "accuracy": "answers that are the reference, case and outer white space aside",
}


def measurements() -> dict[str, Measurement]:
    """Everything that can be asked for now, by name: `METRICS`, each as its mean over the examples, and `MEASUREMENTS`."""
    text = {
        name: Measurement(
            _mean_of(name),
            "answers",
            "share",
            True,
            _MEANINGS.get(name, (metric.__doc__ or "").partition("\n")[0]),
            True,
        )
        for name, metric in METRICS.items()
    }
    return {**text, **MEASUREMENTS}


def parse_metrics(asked: str | Iterable[str]) -> tuple[str, ...]:
    """The names in `asked` ("a,b" or a list), each once. Raises ConfigError with every unknown one and the list of all."""
    words = asked.split(",") if isinstance(asked, str) else list(asked)
    names = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    known = measurements()
    problems = [f"metrics: unknown name {name!r}{did_you_mean(name, known)}" for name in names if name not in known]
    if problems or not names:
        families = [f"{family}_X" for family in CLOCKS]
        single = sorted(n for n, m in known.items() if m.needs != "clock")
        raise ConfigError(
            problems or "metrics: name at least one",
            f"there are {', '.join([*single, *families])}, with X one of {', '.join(STATISTICS)}",
        )
    return names
