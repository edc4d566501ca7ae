"""The torch backend: a transformers model, plain or with LoRA layers, answering prompts in batches or token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from phinetune.data.batches import padded_batch
from phinetune.generation.protocol import Completion, LabelledIds, Prediction, Sampling, completion
from phinetune.model.contract import PromptContract

_TOKENS = 2048  # of a batch whose losses are computed: there may be logits for every one of them


@dataclass(frozen=True)
class TorchGenerator:
    """A model in eval mode on its device, and its contract. Prompts of one batch are filled up on the left."""

    model: Any
    contract: PromptContract
    batch_size: int = 16

    def complete(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[Completion]:
        """Greedy answers in order. Prompts of like length share a batch, so little is spent on padding."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: dict[int, Completion] = {}
        waiting = 0
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for index, ids in zip(chosen, self._batch([prompts[i] for i in chosen], max_new_tokens), strict=True):
                answers[index] = completion(self.contract, ids)
            while waiting in answers:
                yield answers.pop(waiting)
                waiting += 1

    def _batch(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        import torch

        width = max(len(p) for p in prompts)
        input_ids = torch.full((len(prompts), width), self.contract.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        out = self._generate(input_ids, mask, max_new_tokens)
        return [[int(t) for t in row[width:]] for row in out]

    def _generate(self, input_ids: Any, mask: Any, max_new_tokens: int) -> Any:
        import torch
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(self.contract.stop_ids),
            pad_token_id=self.contract.pad_token_id,
        )
        saved, self.model.generation_config = (
            self.model.generation_config,
            config,
        )  # the model's own sampling defaults would be merged in
        try:
            with torch.inference_mode():
                device = self.model.device
                return self.model.generate(
                    input_ids.to(device), attention_mask=mask.to(device), generation_config=config
                )
        finally:
            self.model.generation_config = saved

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """One answer, token by token, with the key/value cache kept between steps."""
        import torch

        generator = torch.Generator().manual_seed(sampling.seed)
        ids, past = torch.tensor([list(prompt)], device=self.model.device), None
        for _ in range(sampling.max_new_tokens):
            with torch.inference_mode():
                out = self.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            token = choose(out.logits[0, -1].float().cpu(), sampling, generator)
            yield token
            if token in self.contract.stop_ids:
                return
            ids = torch.tensor([[token]], device=self.model.device)

    def predictions(self, rows: Sequence[LabelledIds]) -> Iterator[list[Prediction]]:
        """See `Generator`. Rows of like length share a batch, and logits are computed only where a label is predicted."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        found: dict[int, list[Prediction]] = {}
        waiting = 0
        while order:
            chosen = [order.pop()]  # the longest first: it sets the width
            while order and (len(chosen) + 1) * len(rows[chosen[0]][0]) <= _TOKENS and len(chosen) < self.batch_size:
                chosen.append(order.pop())
            found.update(zip(chosen, self._predictions([rows[i] for i in chosen]), strict=True))
            while waiting in found:
                yield found.pop(waiting)
                waiting += 1

    def _predictions(self, rows: Sequence[LabelledIds]) -> list[list[Prediction]]:
        import torch
        import torch.nn.functional as F

        from phinetune.training.loss import head_only_at, learned_positions

        named = [{"input_ids": list(ids), "labels": list(labels)} for ids, labels in rows]
        batch = {k: t.to(self.model.device) for k, t in padded_batch(named, self.contract.pad_token_id).items()}
        positions, targets = learned_positions(batch["labels"])  # (N,)
        if not len(targets):
            return [[] for _ in rows]
        with torch.inference_mode(), head_only_at(self.model.get_output_embeddings(), positions):
            logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits  # (N, vocabulary)
            losses = F.cross_entropy(logits.float(), targets, reduction="none").tolist()
            choices = logits.argmax(-1).tolist()
        found: list[list[Prediction]] = [[] for _ in rows]
        width = batch["labels"].shape[1]
        for position, loss, choice in zip(positions.tolist(), losses, choices, strict=True):
            found[position // width].append(Prediction(loss, choice))
        return found


def choose(logits: Any, sampling: Sampling, generator: Any) -> int:
    """The next token from logits (vocabulary,), by `sampling`."""
    import torch

    if sampling.temperature <= 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    ranked, indices = probabilities.sort(descending=True)
    ranked[ranked.cumsum(0) - ranked > sampling.top_p] = 0.0  # keep the smallest set that reaches top_p
    return int(indices[torch.multinomial(ranked, 1, generator=generator)])
