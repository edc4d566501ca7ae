"""Measurements from a clock: how long answers take, and how fast tokens come. Greedy, one prompt at a time (batch 1).

    prompt's ids handed over ──── first token ──────────────── last token
    |-- time to first token --|-- throughput: tokens after the first --|
    |------------------------- latency --------------------------------|

Prefill is the prompt's tokens over the time to the first token, one step of decoding included.

An answer ends by itself or at a fixed number of new tokens, the same for every model on the same data. Tokenizing and decoding text is
not in it, nor is loading. What counts is the model as the caller loaded it, on the threads it has. Not here: a quiet machine (`quiet.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phinetune.events import OnEvent, Progress, log_event
from phinetune.generation.protocol import Generator, Sampling


@dataclass(frozen=True)
class Timing:
    """One answer: seconds to its first token, seconds to its last, its number of tokens, and that of its prompt."""

    first: float
    whole: float
    tokens: int
    prompt_tokens: int

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first; None for an answer of one token, which has no such time."""
        return (self.tokens - 1) / (self.whole - self.first) if self.tokens > 1 and self.whole > self.first else None

    @property
    def prefill_rate(self) -> float | None:
        """Tokens of the prompt per second until the first of the answer; None where none came."""
        return self.prompt_tokens / self.first if self.tokens and self.first > 0 else None


def time_answers(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    warmup: int = 3,
    repeats: int = 20,
    on_event: OnEvent = log_event,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time `repeats` answers after `warmup` that are not kept, both going round the prompts in order. `clock` gives seconds."""
    timings = []
    on_event(Progress("timing answers", 0, warmup + repeats))
    for number in range(warmup + repeats):
        prompt = prompts[(number if number < warmup else number - warmup) % len(prompts)]
        start = clock()
        first, tokens = start, 0
        for _ in generator.stream(prompt, Sampling(max_new_tokens)):
            tokens += 1
            if tokens == 1:
                first = clock()
        timing = Timing(first - start, clock() - start, tokens, len(prompt))
        if number >= warmup:
            timings.append(timing)
        on_event(Progress("timing answers", number + 1, warmup + repeats))
    return timings


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of `values` lie below, interpolated linearly between neighbours (numpy's default)."""
    ranked = sorted(values)
    position = share * (len(ranked) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (position - low)


Statistic = Callable[[Sequence[float]], float]
QUANTILES = {"p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}


def _at(share: float) -> Statistic:
    return lambda values: quantile(values, share)


STATISTICS: dict[str, Statistic] = {
    "avg": lambda values: math.fsum(values) / len(values),
    "max": max,
    "min": min,
    **{name: _at(share) for name, share in QUANTILES.items()},
}
"""What is made of the numbers of all answers: mean, largest, smallest, and percentiles."""
