"""What comes into each linear layer of a model on real examples, layer after layer, with everything before it already quantized.

The decoder layers are run one at a time over all examples (Frantar et al. 2022, section 4): a layer's linears are listened to, quantized, and the
layer is run again, so that later layers see what the exported model will see. Only one layer's moments are in memory at a time.

Not here: how a weight is quantized (`rounding_ways.py`), where examples come from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.errors import ExportError
from phinetune.events import OnEvent, Progress, log_event

_BATCH_TOKENS = 2048
Quantize = Callable[[dict[str, nn.Linear], Tensor], None]
"""(layers that are given the same input, by name; X Xᵀ (in, in) of it): gives them their new weights."""


class _Stop(Exception):
    """Ends a forward pass at the layer that was listened for."""


def batches_of(rows: Sequence[Sequence[int]], pad: int) -> list[dict[str, Tensor]]:
    """Rows of token ids as padded batches of similar lengths: input_ids and attention_mask, (rows, longest)."""
    made, batch = [], list[Sequence[int]]()
    for row in [*sorted(rows, key=len), None]:
        if batch and (row is None or len(row) * (len(batch) + 1) > _BATCH_TOKENS):
            width = len(batch[-1])
            ids = torch.tensor([[*r, *[pad] * (width - len(r))] for r in batch])
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in batch])
            made.append({"input_ids": ids, "attention_mask": mask})
            batch = []
        if row is not None:
            batch.append(row)
    return made


class _Moments:
    """X Xᵀ of the inputs of some linear layers; padding does not count. Layers that are given the same tensor are one group."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        self.sums: dict[str, Tensor] = {}
        """First layer of a group -> X Xᵀ (in, in)."""
        self.groups: dict[str, list[str]] = {}
        """First layer of a group -> all of its layers."""
        self.rows: Tensor | None = None
        """(batch · tokens) which rows are no padding; None for all."""
        self._last: tuple[Tensor | None, str] = (None, "")
        self._handles = [
            m.register_forward_pre_hook(lambda _, given, name=name: self._add(name, given[0]))
            for name, m in layers.items()
        ]

    def _add(self, name: str, x: Tensor) -> None:
        last, first = self._last
        if last is x:
            if name not in self.groups[first]:
                self.groups[first].append(name)
            return
        flat = x.reshape(-1, x.shape[-1])
        flat = (flat if self.rows is None or len(self.rows) != len(flat) else flat[self.rows]).float()
        if name not in self.sums:
            self.sums[name], self.groups[name] = flat.new_zeros(x.shape[-1], x.shape[-1]), [name]
        self.sums[name].addmm_(flat.t(), flat)
        self._last = (x, name)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = (None, "")


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, the list of the model's decoder layers). Raises ExportError for a model that has none."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ExportError("calibration: the model has no list of decoder layers", "use algorithm: default")
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


@torch.no_grad()
def quantize_in_order(
    model: Any, batches: Sequence[dict[str, Tensor]], quantize: Quantize, on_event: OnEvent = log_event
) -> None:
    """Call `quantize` for every linear layer in the decoder layers of `model` that is reached, in order, and last for an output
    layer that is not the input embedding.

    model: a causal language model in eval mode, which is changed. Linear layers that nothing goes into (experts nobody chose) get none.
    """
    prefix, layers = decoder_layers(model)
    captured = first_inputs(model, layers, batches)
    on_event(Progress("quantizing", 0, len(layers) + 1))
    hidden = [first for first, _ in captured]
    for i, layer in enumerate(layers):
        linears = {f"{prefix}.{i}.{n}": m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        moments = _Moments(linears)
        try:
            for x, (_, calls), batch in zip(hidden, captured, batches, strict=True):
                moments.rows = batch["attention_mask"].flatten().bool()
                run_layer(layer, x, calls[i])
        finally:
            moments.close()
        for first, names in moments.groups.items():
            quantize({name: linears[name] for name in names}, moments.sums[first])
        hidden = [run_layer(layer, x, calls[i]) for x, (_, calls) in zip(hidden, captured, strict=True)]
        on_event(Progress("quantizing", i + 1, len(layers) + 1))
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and head.weight is not model.get_input_embeddings().weight:
        name = next(n for n, m in model.named_modules() if m is head)
        quantize({name: head}, _inputs_of(model, head, batches))
    on_event(Progress("quantizing", len(layers) + 1, len(layers) + 1))


def run_layer(layer: nn.Module, hidden: Tensor, given: dict[str, Any]) -> Tensor:
    """The hidden states (batch, tokens, width) after a decoder layer that is `given` the rest as the model gave it."""
    found = layer(hidden, **given)
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result


def first_inputs(
    model: Any, layers: nn.ModuleList, batches: Sequence[dict[str, Tensor]]
) -> list[tuple[Tensor, list[dict[str, Any]]]]:
    """For each batch: what comes into the first layer, and what each layer is given beside the hidden states."""
    found = []
    for batch in batches:
        calls: list[dict[str, Any]] = []
        first: list[Tensor] = []

        def note(
            _: nn.Module, given: tuple[Any, ...], named: dict[str, Any], calls: Any = calls, first: Any = first
        ) -> Any:
            named = dict(named)
            x = given[0] if given else named.pop("hidden_states")
            if not first:
                first.append(x)
            calls.append(named)
            if len(calls) == len(layers):
                raise _Stop
            return (x,), {**named}

        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            with contextlib.suppress(_Stop):
                model(**batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != len(layers):
            raise ExportError(
                "calibration: the model does not run its decoder layers in order", "use algorithm: default"
            )
        found.append((first[0], calls))
    return found


def _inputs_of(model: Any, module: nn.Linear, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """X Xᵀ of what comes into `module`, after which nothing is computed."""
    moments = _Moments({"": module})

    def stop(*_: Any) -> None:
        raise _Stop

    handle = module.register_forward_pre_hook(stop)
    try:
        for batch in batches:
            moments.rows = batch["attention_mask"].flatten().bool()
            with contextlib.suppress(_Stop):
                model(**batch, use_cache=False)
    finally:
        handle.remove()
        moments.close()
    return moments.sums[""]
