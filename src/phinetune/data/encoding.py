"""From one row to token ids with labels: a conversation in the model's template, or a text as it stands.

    <|im_start|>user ... <|im_end|>  <|im_start|>assistant  joy <|im_end|>        a conversation: only answers are learned
    └──────────── label -100 ───────────────────────────┘  └─ learned ──┘
    ### Text: ... ### The tone is:\\n  joy <|im_end|>                              a text: all of it is learned
    └─ prompt (for evaluation) ────┘  └ completion ┘

The rule that matters: the ids before an answer are exactly the ids that a runtime gets when it tokenizes the prompt. A tokenizer may
join characters across that border when it sees the whole text; then prompt and answer are tokenized apart, as at run time. Not here:
which rows are read, what becomes of long ones, blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from phinetune.data.messages import Conversation, Message

MASKED = -100
"""Label of a token that is not learned."""


class ChatEncoder(Protocol):
    """What the data layer needs of a tokenizer with its prompt contract."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def max_length(self) -> int: ...
    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str: ...
    def tokenize(self, text: str) -> list[int]: ...
    def raw_ids(self, text: str) -> list[int]:
        """Ids of a text without a template, begun as the tokenizer begins texts by itself (BOS, or nothing)."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Example:
    """Token ids, their labels (-100 where masked), and what evaluation needs: where the last answer starts, and its text.

    `segments` are the lengths of the parts of a packed block, which do not see each other; empty for a single row.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    completion: str
    place: str
    segments: list[int] = field(default_factory=list)


def encode_conversation(conversation: Conversation, encoder: ChatEncoder) -> tuple[Example, bool, bool]:
    """The example of one conversation; whether a border had to be split; whether only its last answer could be learned."""
    messages = conversation.messages
    text = encoder.render(messages, add_generation_prompt=False)
    ids = encoder.tokenize(text)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            span = _answer_span(messages, index, text, ids, encoder)
            if span is None or (spans and span[0] < spans[-1][1]):  # an answer that no stop token closes
                break
            spans.append(span)
    else:
        end = spans[-1][1]
        labels = [MASKED] * end
        for start, stop in spans:
            labels[start:stop] = ids[start:stop]
        return Example(ids[:end], labels, spans[-1][0], messages[-1]["content"], conversation.place), False, False
    # The tokenizer joined text across a border, or the template is not a prefix of itself: prompt and last answer apart.
    prompt = encoder.render(messages[:-1], add_generation_prompt=True)
    answer = (text[len(prompt) :] if text.startswith(prompt) else "") or messages[-1]["content"]
    prompt_ids, answer_ids = encoder.tokenize(prompt), encoder.tokenize(answer)
    answer_ids = answer_ids[: _stop_end(answer_ids, 0, encoder)]
    if answer_ids[-1] not in encoder.stop_ids:
        answer_ids = [*answer_ids, encoder.stop_ids[0]]
    several = sum(m["role"] == "assistant" for m in messages) > 1
    labels = [MASKED] * len(prompt_ids) + answer_ids
    return (
        Example(prompt_ids + answer_ids, labels, len(prompt_ids), messages[-1]["content"], conversation.place),
        True,
        several,
    )


def _answer_span(
    messages: Sequence[Message], index: int, text: str, ids: list[int], encoder: ChatEncoder
) -> tuple[int, int] | None:
    """[start, stop) of answer `index` in `ids`, its stop token included; None if `ids` does not begin with the ids of its prompt."""
    prompt = encoder.render(messages[:index], add_generation_prompt=True)
    if not text.startswith(prompt):
        return None
    prompt_ids = encoder.tokenize(prompt)
    start = len(prompt_ids)
    if ids[:start] != prompt_ids or start >= len(ids):
        return None
    stop = _stop_end(ids, start, encoder)
    return (start, stop) if ids[stop - 1] in encoder.stop_ids else None


def _stop_end(ids: list[int], start: int, encoder: ChatEncoder) -> int:
    """One past the first stop token at or after `start`, or the length of `ids`."""
    return next((i + 1 for i in range(start, len(ids)) if ids[i] in encoder.stop_ids), len(ids))


def encode_raw(conversation: Conversation, encoder: ChatEncoder, whole: bool) -> tuple[Example, bool]:
    """The example of a prompt and a completion as they stand, closed by the stop token; whether their border had to be split.

    whole: a text, kept to its end whatever stop tokens are written in it; else the completion ends at its first one. The prompt is
    masked either way (`learn_all` unmasks it). A blank prompt counts as none: `prompt_length` is 0.
    """
    prompt, completion = (message["content"] for message in conversation.messages)
    ids = encoder.raw_ids(prompt + completion)
    start = len(encoder.raw_ids("")) if not prompt.strip() else 0
    known, split = 0, False
    if not start:
        prompt_ids = encoder.raw_ids(prompt)
        start = known = len(prompt_ids)
        split = ids[:start] != prompt_ids or (len(ids) == start and bool(completion))
        ids = prompt_ids + encoder.tokenize(completion) if split else ids
    end = _stop_end(ids, start, encoder)
    closed = end > start and ids[end - 1] in encoder.stop_ids  # by the text itself
    answer = encoder.decode(ids[start:end]) if closed else completion
    ids = ids if whole else ids[:end]
    if len(ids) == start or ids[-1] not in encoder.stop_ids:
        ids = [*ids, encoder.stop_ids[0]]
    labels = [MASKED] * max(start, 1) + ids[max(start, 1) :]  # nothing predicts the first token
    return Example(ids, labels, known, answer, conversation.place), split


def learn_all(example: Example) -> Example:
    """`example` with every token learned but the first, which nothing predicts."""
    return replace(example, labels=[MASKED, *example.input_ids[1:]])


def first_learned(labels: Sequence[int]) -> int:
    """Index of the first label that is not masked, or the length of `labels`."""
    return next((i for i, label in enumerate(labels) if label != MASKED), len(labels))
