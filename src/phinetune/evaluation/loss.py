"""How surprised a model is by the held-out answers: the mean negative log-likelihood of the tokens that training would learn.

The same tokens, summed and divided in the same way as in training: every learned token counts once, whichever example it is of. Works
for every generator, so the figures of a torch model and of its ONNX export can be compared. Not here: loading, the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from phinetune.errors import DataError
from phinetune.events import Note, OnEvent, Progress, log_event
from phinetune.generation.protocol import Generator


@dataclass(frozen=True)
class Loss:
    """Summed negative log-likelihood in nats, and the number of tokens it was summed over."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per supervised token."""
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean: 1 for a model that is always certain and right, the size of the vocabulary for one that guesses."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


def held_out_loss(generator: Generator, examples: Any, stage: str, on_event: OnEvent = log_event) -> Loss:
    """The loss of `generator` on `examples` (an `Examples`). Logits that are not numbers give an infinite loss, which is said.

    Raises DataError if no token of them is supervised.
    """
    rows = [(row["input_ids"], row["labels"]) for row in examples.table]
    total, tokens = 0.0, 0
    on_event(Progress(f"loss of {stage}", 0, len(rows)))
    for done, found in enumerate(generator.predictions(rows), 1):
        total, tokens = total + math.fsum(p.loss for p in found), tokens + len(found)
        on_event(Progress(f"loss of {stage}", done, len(rows), {"loss": total / tokens} if tokens else {}))
    if not tokens:
        raise DataError("loss, perplexity: no token of the examples is supervised", "every example needs an answer")
    if math.isnan(total):
        on_event(Note(f"{stage}: its logits are not finite; the loss is taken as infinite", warning=True))
        total = math.inf
    return Loss(total, tokens)
