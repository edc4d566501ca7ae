"""How much the answers suffer when one product alone is rounded: the measure by which some keep 8 bits where the others have 4.

For each product, all other weights as they were trained: the mean Kullback-Leibler divergence (nats) of what the model says next from what
it said before, over the answers of some examples. Measured by computing, not estimated from weights: what follows the layer may amplify
an error or swallow it. A product's layer and those after it are run, from what came into it. Which products are raised is then a matter
of bytes: most divergence taken away for a byte first (`choose_raised`).

Not here: the codes (`ways.py`), the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.events import OnEvent, Progress, log_event
from phinetune.exporting.calibration import batches_of, decoder_layers, first_inputs, run_layer
from phinetune.model.grid import Codes

_EXAMPLES = 16
"""Examples that are answered for every product."""
Spans = Sequence[tuple[str, int, int]]
"""(module, first row, row after the last), in the order of a product's rows."""


@torch.no_grad()
def divergences(
    model: Any,
    parts: Mapping[str, Spans],
    codes: Mapping[str, Codes],
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    on_event: OnEvent = log_event,
) -> dict[str, float]:
    """Product -> mean divergence (nats a token) with its weights alone rounded to `codes`.

    model: a causal language model in eval mode, unchanged afterwards. parts: product -> its rows. rows: token ids of examples; starts:
    where the answer of each begins. Raises ExportError for a model that does not run its decoder layers in order.
    """
    job = _Answers(model, *_some(rows, starts))
    found: dict[str, float] = {}
    on_event(Progress("measuring layers", 0, len(parts)))
    for name in sorted(parts, key=lambda name: job.layer_of(parts[name])):
        first = job.layer_of(parts[name])
        job.advance(first)
        modules = {module: model.get_submodule(module) for module, _, _ in parts[name]}
        kept = {module: layer.weight.data for module, layer in modules.items()}
        try:
            for module, start, stop in parts[name]:
                rounded = kept[module].clone()
                rounded[start:stop] = codes[module][start:stop].dense(rounded.dtype)
                modules[module].weight.data = rounded
            found[name] = job.divergence(first)
        finally:
            for module, layer in modules.items():
                layer.weight.data = kept[module]
        on_event(Progress("measuring layers", len(found), len(parts)))
    return found


def _some(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[list[Sequence[int]], list[int]]:
    """At most `_EXAMPLES` of the examples, evenly spread."""
    count = min(_EXAMPLES, len(rows))
    chosen = [i * len(rows) // count for i in range(count)]
    return [rows[i] for i in chosen], [starts[i] for i in chosen]


class _Answers:
    """What a model says in the answers of a few examples, computed from any of its layers on."""

    def __init__(self, model: Any, rows: list[Sequence[int]], starts: list[int]) -> None:
        self.model = model
        self.prefix, self.layers = decoder_layers(model)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # as `batches_of` has them
        self.batches = batches_of(rows, 0)
        begins = iter([starts[i] for i in order])
        self.masks = [_answer_mask(batch["attention_mask"], begins) for batch in self.batches]
        self.captured = first_inputs(model, self.layers, self.batches)
        self.at, self.hidden = 0, [first for first, _ in self.captured]
        self.norm = _last_norm(model, self.prefix)
        whole = self._logits(-1)
        self.by_layers = all(_alike(a, b) for a, b in zip(whole, self._logits(0), strict=True))
        """What comes after the layers is a norm and the output layer; else the whole model is run each time."""
        self.before = [F.log_softmax(x, dim=-1) for x in (self._logits(0) if self.by_layers else whole)]

    def layer_of(self, spans: Spans) -> int:
        """The first decoder layer that a product's weights are in; -1 for the embeddings, which come before all."""
        names = [module for module, _, _ in spans]
        inside = [n.removeprefix(f"{self.prefix}.").split(".")[0] for n in names if n.startswith(f"{self.prefix}.")]
        return min(map(int, inside)) if inside else -1

    def advance(self, layer: int) -> None:
        """Compute what comes into `layer`, with the weights as they are."""
        while self.at < layer:
            pairs = zip(self.hidden, self.captured, strict=True)
            self.hidden = [run_layer(self.layers[self.at], x, calls[self.at]) for x, (_, calls) in pairs]
            self.at += 1

    def divergence(self, layer: int) -> float:
        """Mean divergence of what is said now from what was said at first, `layer` and those after it computed anew."""
        total, count = 0.0, 0
        for before, now in zip(self.before, self._logits(layer if self.by_layers else -1), strict=True):
            now = F.log_softmax(now, dim=-1)
            total += float(F.kl_div(now, before, reduction="sum", log_target=True))
            count += len(before)
        return total / max(1, count)

    def _logits(self, layer: int) -> list[Tensor]:
        """(predictions of answers, vocabulary), float32, of every batch."""
        found = []
        for x, (_, calls), mask, batch in zip(self.hidden, self.captured, self.masks, self.batches, strict=True):
            if layer < 0:  # an embedding is another one: everything is
                logits = self.model(**batch, use_cache=False).logits
                found.append(logits[mask].float())
                continue
            for i in range(self.at, len(self.layers)):
                x = run_layer(self.layers[i], x, calls[i])
            x = x[mask]
            logits = self.model.get_output_embeddings()(x if self.norm is None else self.norm(x))
            found.append(logits.float())
        return found


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=0.05, atol=0.05 * float(a.abs().max())))


def _answer_mask(attention: Tensor, begins: Any) -> Tensor:
    """(rows, longest) true where the next token is one of the answer's."""
    mask = torch.zeros_like(attention, dtype=torch.bool)
    for row, length in enumerate(attention.sum(1).tolist()):
        mask[row, max(0, next(begins) - 1) : length - 1] = True
    return mask


def _last_norm(model: Any, prefix: str) -> nn.Module | None:
    """The norm between the decoder layers and the output layer, by the names that models give it."""
    parent = model.get_submodule(prefix.rpartition(".")[0])
    names = ("norm", "final_layernorm", "ln_f", "final_norm")
    return next((getattr(parent, name) for name in names if hasattr(parent, name)), None)


def choose_raised(divergence: Mapping[str, float], cost: Mapping[str, int], budget: int) -> list[str]:
    """The products to be raised, most divergence a byte first, as many as `budget` bytes allow. cost: bytes that raising one adds."""
    raised, left = [], budget
    for name in sorted(divergence, key=lambda n: divergence[n] / cost[n], reverse=True):
        if cost[name] <= left:
            raised.append(name)
            left -= cost[name]
    return raised
