"""What every generator can do: answer prompts given as token ids, whole or token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from phinetune.model.contract import PromptContract


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one at temperature 0, else drawn from the softmax at that temperature within top_p."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """An answer: its text (special tokens left out), its ids (stop token included), and whether it ended by itself."""

    text: str
    ids: tuple[int, ...]
    stopped: bool


LabelledIds = tuple[Sequence[int], Sequence[int]]
"""(ids, labels) of one example, equally long: -100 where the token is not learned, else the token's id."""


class Prediction(NamedTuple):
    """The negative log-likelihood, in nats, of a labelled token, and the token that the model would have chosen."""

    loss: float
    choice: int


class Generator(Protocol):
    """A loaded model with its prompt contract."""

    @property
    def contract(self) -> PromptContract: ...

    def complete(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[Completion]:
        """The likeliest answer (greedy) to each prompt, in order."""
        ...

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Token ids of one answer as they come; a stop id, if it comes, is the last."""
        ...

    def predictions(self, rows: Sequence[LabelledIds]) -> Iterator[list[Prediction]]:
        """For each row, in order: of each token that has a label, what the model says there, given all tokens before it."""
        ...


def completion(contract: PromptContract, ids: Sequence[int]) -> Completion:
    """The Completion of generated `ids`, cut after the first stop id."""
    end = next((i for i, token in enumerate(ids) if token in contract.stop_ids), None)
    kept = tuple(ids) if end is None else tuple(ids[: end + 1])
    return Completion(contract.decode(kept), kept, end is not None)


def stream_text(contract: PromptContract, tokens: Iterator[int]) -> Iterator[str]:
    """The text of streamed ids in pieces that never split a character."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = contract.decode(ids)
        if len(text) > len(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = contract.decode(ids)
    if len(text) > len(shown):
        yield text[len(shown) :]
