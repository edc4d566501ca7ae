"""What one training step will take, in memory and in operators, found by running it without numbers before anything is loaded.

    config.json -> model on fake tensors -> inject -> supervised_loss -> backward        `StepTrace` follows it all

It is the real step: the model's own forward, our loss and our autograd functions, so whatever is changed in those is in the estimate at
once. Decoder layers are alike, so the step is run with three of them: the first and the last are special (no gradient goes below the one, the
other computes fewer rows and is never checkpointed), and the one between them stands for all the others. Where layers differ (in their
parameters, their kinds, or their adapters) the whole model is run instead.

    memory = weights + adapters + optimizer state + the most that is alive of activations, logits, gradients and temporaries

Not here: the process and its libraries, seconds (`estimate_time.py`), what is chosen when it does not fit.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from phinetune.lora.arithmetic import choose_arithmetic
from phinetune.lora.config import LoraConfig
from phinetune.lora.decoder_join import is_packed
from phinetune.lora.rounding import forget_rounded
from phinetune.model.compute import available_memory
from phinetune.model.fast import FastPaths
from phinetune.model.grid import Grid
from phinetune.model.load import LoadPlan
from phinetune.training.checkpointing import LayerCount, checkpoint_layers
from phinetune.training.estimate_layers import MiddleLayer, decoder_layers
from phinetune.training.estimate_model import (
    build_on_meta,
    quantization_tensors,
    with_made_up_numbers,
    without_numbers,
)
from phinetune.training.estimate_trace import Call, Peak, StepTrace, storage_bytes
from phinetune.training.loss import loss_paths, supervised_loss

# Bytes of optimizer state for each byte of a trained parameter, by how the optimizer's name begins; the longest beginning counts.
_STATE = {
    "adamw": 2.0,
    "adam": 2.0,
    "lion": 1.0,
    "sgd": 0.0,
    "adagrad": 1.0,
    "rmsprop": 1.0,
    "ademamix": 3.0,
    "adafactor": 0.05,
}
_STEPS = 6  # real ones at most, the first of which is not counted: it compiles products
_STATES_OF_8_BITS = {"adamw": 2, "lion": 1, "ademamix": 3, "rmsprop": 1}


@dataclass(frozen=True)
class StepSettings:
    """What is trained, and how: all that decides what a step takes, but the batch."""

    config: Any
    """The base model's transformers config."""
    load: LoadPlan
    lora: LoraConfig
    checkpoint_layers: LayerCount = 0
    """Layers whose activations are computed again in the backward pass."""
    checkpoint_options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw_torch_fused"
    accumulates: bool = False
    """Several batches a step: the gradients of those before are there already."""
    label_smoothing: float = 0.0
    fast_paths: FastPaths = field(default_factory=FastPaths)
    grid: Grid | None = None
    """Trained for this grid."""


@dataclass(frozen=True)
class StepEstimate:
    """One batch, forward and backward. Bytes; `calls` holds every operator with its shapes and how often it runs."""

    peak: Peak
    calls: Counter[Call] = field(repr=False)

    @property
    def flops(self) -> int:
        """Floating point operations in matrix products and attention."""
        return sum(call.flops * count for call, count in self.calls.items())

    @property
    def hands_on(self) -> bool:
        """True if decoder layers hand on memory to one another (`lora/decoder.py`)."""
        return any(call.operator is torch.ops.phinetune.decoder_layer.default for call in self.calls)


class StepEstimator:
    """Estimates for one model and its options, batch by batch. Raises what building and `inject` raise."""

    def __init__(self, settings: StepSettings) -> None:
        self.settings = settings
        whole = build_on_meta(settings.config, settings.load, settings.lora, settings.fast_paths, settings.grid)
        paths = replace(settings.fast_paths, packed=is_packed(whole))  # as the whole model's size decides
        self.settings = settings = replace(settings, fast_paths=paths)
        depth = settings.config.get_text_config().num_hidden_layers
        self._alike = depth > 3 and len(decoder_layers(whole)) == depth and _layers_are_alike(whole, settings)
        self._depth = depth
        self.weights = storage_bytes([*_frozen(whole), *whole.buffers(), *quantization_tensors(whole)])
        self.adapters = storage_bytes(_trained(whole))
        self.optimizer = optimizer_bytes(settings.optimizer, _trained(whole))
        self.numbers = sum(getattr(p, "quant_state", p).shape.numel() for p in _frozen(whole))
        """Numbers that the base model's weights stand for."""
        self.model = whole
        self._models: dict[int, nn.Module] = {}
        if not self._alike:
            self._models[depth] = without_numbers(whole)

    def __call__(self, batch: dict[str, Tensor]) -> StepEstimate:
        """The estimate for `batch`, which is what the collator makes."""
        count = self.settings.checkpoint_layers
        if not self._alike:
            trace = self._trace(self._prepared(self._depth, count), batch)
            peaks, calls = trace.peaks, trace.calls
        elif count in (0, "all"):
            peaks, calls = self._extended(batch, count)
        else:  # between none and all, figures lie on a line, or below it
            share = min(1.0, cast(int, count) / (self._depth - 1))
            ends = self._extended(batch, 0), self._extended(batch, "all")
            peaks = {phase: _between(ends[0][0][phase], ends[1][0][phase], share) for phase in ends[0][0]}
            calls = Counter(
                {c: round((1 - share) * ends[0][1][c] + share * ends[1][1][c]) for c in ends[0][1] | ends[1][1]}
            )
        peak = max(peaks.values(), key=lambda p: p.total)
        parts = {**peak.parts, "optimizer": self.optimizer}
        return StepEstimate(Peak(peak.total + self.optimizer, parts), calls)

    def measured(
        self, batch: dict[str, Tensor], budget: float, expected: Callable[[Counter[Call]], float]
    ) -> tuple[float, Counter[Call]] | None:
        """(seconds that a real step takes now, its operators), of the model cut to three layers, with made-up numbers.

        At most about `budget` seconds and half of the memory that can be had; None where that is not enough (`expected` gives the seconds
        of operators, roughly), or layers differ.
        """
        settings, layers = self.settings, min(3, self._depth)
        if not self._alike and self._depth > 3:
            return None
        count: LayerCount = settings.checkpoint_layers
        if isinstance(count, int):  # the same share of few layers
            count = round(count * layers / self._depth)
        trace = self._trace(self._prepared(layers, count), batch)
        available = available_memory()
        if available is not None and max(peak.total for peak in trace.peaks.values()) > available / 2:
            return None
        if 2 * expected(trace.calls) > budget:
            return None
        options = settings.config, settings.load, settings.lora, settings.fast_paths, settings.grid, layers
        model = with_made_up_numbers(build_on_meta(*options))
        choose_arithmetic(model, settings.fast_paths)  # again, of these numbers
        checkpoint_layers(model, count, settings.checkpoint_options, lambda event: None)
        taken: list[float] = []
        begun = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            while len(taken) < _STEPS and time.perf_counter() - begun < budget:
                forget_rounded(model)  # as after an optimizer's step
                start = time.perf_counter()
                _step(model, batch, settings.label_smoothing, settings.fast_paths)
                taken.append(time.perf_counter() - start)
                for parameter in _trained(model):
                    parameter.grad = None
        return (statistics.median(taken[1:]), trace.calls) if len(taken) > 1 else None

    def _extended(self, batch: dict[str, Tensor], count: LayerCount) -> tuple[dict[str, Peak], Counter[Call]]:
        """Peaks by phase and operators of the whole model with no layer checkpointed, or all, from three of its layers."""
        model = self._prepared(3, count)
        with MiddleLayer(model, StepTrace(model.config.get_text_config().vocab_size)) as middle:
            self._trace(model, batch, middle.trace)
        more = self._depth - 3
        return middle.peaks(more), middle.calls(more)

    def _prepared(self, layers: int, count: LayerCount) -> Any:
        """The model of so many layers, without numbers, `count` of them checkpointed."""
        settings = self.settings
        if layers not in self._models:
            built = build_on_meta(
                settings.config, settings.load, settings.lora, settings.fast_paths, settings.grid, layers
            )
            self._models[layers] = without_numbers(built)
        model = self._models[layers]
        forget_rounded(model)
        checkpoint_layers(model, count, settings.checkpoint_options, lambda event: None)
        return model

    def _trace(self, model: Any, batch: dict[str, Tensor], trace: StepTrace | None = None) -> StepTrace:
        settings = self.settings
        return trace_step(model, batch, settings.accumulates, settings.label_smoothing, settings.fast_paths, trace)


def trace_step(
    model: Any,
    batch: dict[str, Tensor],
    accumulates: bool = False,
    label_smoothing: float = 0.0,
    fast_paths: FastPaths = FastPaths(),  # noqa: B008  immutable
    trace: StepTrace | None = None,
) -> StepTrace:
    """Forward and backward of `model`, with numbers or without, under `trace`, or a new one. Its gradients are gone afterwards."""
    trained, handles = _trained(model), []
    if accumulates:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    trace = trace or StepTrace(model.config.get_text_config().vocab_size)
    trace.hold([*_frozen(model), *model.buffers(), *quantization_tensors(model)], "weights")
    trace.hold(trained, "adapters")
    trace.hold([p.grad for p in trained if p.grad is not None], "gradients")
    for parameter in trained:
        hook = cast(Any, parameter).register_post_accumulate_grad_hook
        handles.append(hook(lambda p: trace.hold([p.grad], "gradients")))
    try:
        with trace:
            _step(model, batch, label_smoothing, fast_paths, trace)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None
    return trace


def _step(
    model: Any,
    batch: dict[str, Tensor],
    label_smoothing: float,
    fast_paths: FastPaths,
    trace: StepTrace | None = None,
) -> None:
    """Forward and backward as training has them."""
    head, paths = model.get_output_embeddings(), loss_paths(model, fast_paths)
    loss = supervised_loss(model, head, batch, model.dtype, None, label_smoothing, **paths)
    if trace is not None:
        trace.phase = "backward"
    torch.autograd.backward(loss)


def optimizer_bytes(name: str, parameters: list[Tensor]) -> int:
    """Bytes of the state that optimizer `name` (TrainingArguments' `optim`) keeps for `parameters`."""
    name = name.removeprefix("paged_")
    total = storage_bytes(parameters)
    if "8bit" in name or "4bit" in name:
        states = next((n for begin, n in _STATES_OF_8_BITS.items() if name.startswith(begin)), 2)
        return sum(states * p.numel() for p in parameters)
    factor = next((f for begin, f in sorted(_STATE.items(), reverse=True) if name.startswith(begin)), 2.0)
    return int(factor * total)


def _between(one: Peak, other: Peak, share: float) -> Peak:
    """The peak on the line from `one` (0) to `other` (1), and beyond."""

    def at(a: int, b: int) -> int:
        return round(a + share * (b - a))

    names = one.parts.keys() | other.parts.keys()
    parts = {name: at(one.parts.get(name, 0), other.parts.get(name, 0)) for name in sorted(names)}
    return Peak(at(one.total, other.total), parts)


def _layers_are_alike(model: nn.Module, settings: StepSettings) -> bool:
    """True if the decoder layers of `model`, adapters included, differ in nothing but their number."""
    text = settings.config.get_text_config()
    if len(set(getattr(text, "layer_types", None) or [])) > 1:
        return False
    layers: dict[str, list[tuple[Any, ...]]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (found := re.match(r"(.*?\.)(\d+)\.(.*)", name)) is not None:
            kind = (found[1], found[3], tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            layers.setdefault(found[2], []).append(kind)
    kinds = list(layers.values())
    return len(kinds) == text.num_hidden_layers and all(kind == kinds[0] for kind in kinds)


def _frozen(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if not p.requires_grad]


def _trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]
