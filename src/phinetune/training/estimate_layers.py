"""From a step of three decoder layers to the step of any number of alike ones: what each further layer adds, operators and bytes.

The first layer of three is special (no gradient goes below it), and so is the last (fewer rows, never checkpointed). The one between them
is followed: its operators, forward and backward, are those of every further layer, and so is what it keeps for the backward pass. Where
the most memory is alive decides what further layers add there:

    forward, or backward above the layer     all that they keep
    backward within it                       what those below it keep, or the gradients of those above it, whichever is more
    backward below it                        their gradients

Weights and adapters are always there. Not here: running the step (`estimate.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from phinetune.training.estimate_model import quantization_tensors
from phinetune.training.estimate_trace import Call, Peak, StepTrace, storage_bytes

_WITHIN, _BELOW = "backward, within a layer", "backward, below it"  # phases, beside "forward" and "backward"


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers can checkpoint, in their order; empty for code of another kind."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


class MiddleLayer:
    """Use as `with MiddleLayer(model, trace)` around a step of a `model` of three layers; then ask for `peaks` and `calls`."""

    def __init__(self, model: nn.Module, trace: StepTrace) -> None:
        _, self.layer, self.last = decoder_layers(model)
        self.trace = trace
        self.held: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.gradients: Counter[str] = Counter()
        self._before: Counter[str] = Counter()

    def __enter__(self) -> MiddleLayer:
        self._handles = [
            self.layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.last.register_forward_pre_hook(self._leave, with_kwargs=True),
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def peaks(self, more: int) -> dict[str, Peak]:
        """Phase -> the peak of a model with `more` further layers."""
        return {phase: self._extended(phase, peak, more) for phase, peak in self.trace.peaks.items()}

    def calls(self, more: int) -> Counter[Call]:
        """The operators of a model with `more` further layers."""
        return self.trace.calls + Counter({call: more * times for call, times in self.trace.repeated_calls.items()})

    def _extended(self, phase: str, peak: Peak, more: int) -> Peak:
        added = self.kept
        if phase == _BELOW or (phase == _WITHIN and self.gradients.total() > self.kept.total()):
            added = self.gradients
        parts = Counter(peak.parts)
        for bytes_of in (self.held, added):
            for part, size in bytes_of.items():
                parts[part] += more * size
        return Peak(peak.total + more * (self.held.total() + added.total()), dict(sorted(parts.items())))

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self.trace.phase != "forward":  # computed again for the backward pass
            return
        parameters = list(self.layer.parameters())
        frozen = [p for p in parameters if not p.requires_grad]
        trained = [p for p in parameters if p.requires_grad]
        self.held = Counter(
            weights=storage_bytes([*frozen, *self.layer.buffers(), *quantization_tensors(self.layer)]),
            adapters=storage_bytes(trained),
            gradients=storage_bytes([p.grad for p in trained if p.grad is not None]),
        )
        _on_gradient(_hidden(args, kwargs), self._gradient_left)
        self._begin()

    def _leave(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self.trace.phase == "forward":
            self.kept = self._end()
            _on_gradient(_hidden(args, kwargs), self._gradient_came)

    def _gradient_came(self) -> None:
        self.trace.phase = _WITHIN
        self._begin()

    def _gradient_left(self) -> None:
        self.trace.phase = _BELOW
        self.gradients = Counter(gradients=self._end()["gradients"])

    def _begin(self) -> None:
        self._before, self.trace.repeated = self.trace.parts(), True

    def _end(self) -> Counter[str]:
        """What has come to be alive since `_begin`."""
        self.trace.repeated = False
        found = self.trace.parts()
        found.subtract(self._before)
        return found


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a layer's arguments: what the gradient goes through."""
    return next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad)


def _on_gradient(tensor: Tensor, call: Callable[[], None]) -> None:
    """`call` when the gradient with respect to `tensor` is known."""
    tensor.register_hook(lambda _: call())  # type: ignore[no-untyped-call]
