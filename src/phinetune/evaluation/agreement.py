"""How much alike two models answer: token by token on held-out examples, each token predicted from the reference before it.

One pass over an example gives loss, chosen tokens and exactness at once: a greedy answer is the reference exactly if every token that the
model chooses after the reference's own beginning is the reference's next. So a model is compared without generating anything. Not here:
which models, what follows from a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phinetune.data.encoding import MASKED
from phinetune.events import OnEvent, Progress, log_event
from phinetune.generation.protocol import Generator, Prediction


@dataclass(frozen=True)
class Said:
    """What a model says on some examples: of each, its predictions, and whether all are the reference's tokens."""

    predictions: tuple[tuple[Prediction, ...], ...]
    exact: tuple[bool, ...]

    @property
    def loss(self) -> float:
        """Nats per labelled token."""
        return math.fsum(p.loss for row in self.predictions for p in row) / sum(map(len, self.predictions))

    @property
    def share(self) -> float:
        """Share of the examples that are answered exactly."""
        return sum(self.exact) / len(self.exact)


@dataclass(frozen=True)
class Agreement:
    """Two models on the same examples. `same` is the share of tokens that both choose alike."""

    count: int
    same: float
    exact: tuple[float, float]
    """Share of examples answered exactly: of the first, of the second."""
    loss: tuple[float, float]

    @property
    def drop(self) -> float:
        """What the second has lost: points of exact answers as a share, or, where the first has hardly any (under 5 %: free text), the
        share by which perplexity has risen."""
        if self.exact[0] >= 0.05:
            return self.exact[0] - self.exact[1]
        return math.expm1(min(50.0, self.loss[1] - self.loss[0]))

    @property
    def measure(self) -> str:
        """What `drop` is counted in."""
        return "exact answers" if self.exact[0] >= 0.05 else "perplexity"


def said(generator: Generator, examples: Any, stage: str, on_event: OnEvent = log_event) -> Said:
    """What `generator` says on `examples` (an `Examples`), those without a labelled token left out."""
    rows = [(row["input_ids"], row["labels"]) for row in examples.table if any(x != MASKED for x in row["labels"][1:])]
    found: list[tuple[Prediction, ...]] = []
    on_event(Progress(f"comparing {stage}", 0, len(rows)))
    for predictions in generator.predictions(rows):
        found.append(tuple(predictions))
        on_event(Progress(f"comparing {stage}", len(found), len(rows)))
    exact = (_is_exact(labels, predictions) for (_, labels), predictions in zip(rows, found, strict=True))
    return Said(tuple(found), tuple(exact))


def _is_exact(labels: Sequence[int], predictions: Sequence[Prediction]) -> bool:
    wanted = [label for label in labels[1:] if label != MASKED]
    return [p.choice for p in predictions] == wanted


def agreement(first: Said, second: Said) -> Agreement:
    """The two compared; they must be of the same examples, of which there is at least one."""
    pairs = [
        (a.choice, b.choice)
        for one, other in zip(first.predictions, second.predictions, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return Agreement(
        len(first.exact),
        sum(a == b for a, b in pairs) / len(pairs),
        (first.share, second.share),
        (first.loss, second.loss),
    )
