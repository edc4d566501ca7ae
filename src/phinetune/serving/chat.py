"""A conversation with one model, answer by answer, in the prompt it was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from phinetune.data.messages import Message, fill_template, split_at_last_field, template_fields
from phinetune.errors import ModelError
from phinetune.generation.protocol import Generator, Sampling, stream_text


@dataclass
class ChatSession:
    """Messages so far and the model that answers.

    With `template`, a prompt of training with one field, each message fills that field and stands alone, as the examples of the
    training did. Without, the conversation grows; its oldest turns are left out when it outgrows the model's context.
    Without `chat`, for a model that was trained on texts, there is no chat template: the model goes on from each message as it stands.
    """

    generator: Generator
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    template: str | None = None
    chat: bool = True
    messages: list[Message] = field(default_factory=list)

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()

    def reply(self, text: str) -> Iterator[str]:
        """The answer to `text`, in pieces as they come. Raises ModelError if `text` alone is too long for the model."""
        if self.template is not None or not self.chat:
            self.messages.clear()
        if self.template is not None:
            text = fill_template(self.template, {template_fields(self.template, "template")[0]: text})
        self.messages.append({"role": "user", "content": text})
        pieces = []
        try:
            prompt = self._prompt()
            for piece in stream_text(self.generator.contract, self.generator.stream(prompt, self.sampling)):
                pieces.append(piece)
                yield piece
        except BaseException:  # broken off: a question without an answer must not stay in the conversation
            del self.messages[-1:]
            raise
        self.messages.append({"role": "assistant", "content": "".join(pieces).strip()})

    def _prompt(self) -> list[int]:
        contract = self.generator.contract
        start: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        room = contract.max_length - min(self.sampling.max_new_tokens, contract.max_length // 2)
        while True:
            ids = (
                contract.prompt_ids([*start, *self.messages])
                if self.chat
                else contract.raw_ids(self.messages[-1]["content"])
            )
            if len(ids) <= room:
                return ids
            if len(self.messages) == 1:
                raise ModelError(
                    f"the message has {len(ids)} tokens with its template, the model's context has room for {room}",
                    "send a shorter message",
                )
            del self.messages[:2]  # the oldest question with its answer; the last question stays


def prompt_template(trained: dict[str, Any]) -> str | None:
    """The column template that the prompts of a training had, from the `data` of its manifest; None if they had none."""
    text = trained.get("text")
    return split_at_last_field(text)[0] if text else trained.get("prompt")


def single_field_template(template: str | None) -> str | None:
    """`template` if it has exactly one field, so that what a person types can fill it; else None."""
    return template if template and len(template_fields(template, "data.prompt")) == 1 else None
