"""Follow a training step operator by operator: which storages are alive when, and which operators run how often, on which shapes.

A `TorchDispatchMode` sees every operator that autograd leaves, forward and backward, of tensors with numbers and of fake ones
(`torch._subclasses.fake_tensor`) alike; so what it counts on a model that was never loaded is what it would count on the real one.
Every storage that an operator makes is followed until it is freed (a weak reference to it), which gives the peak of live bytes and what
it consists of. Not here: the model, the step, seconds.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class Shaped(NamedTuple):
    """What a tensor is without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Call(NamedTuple):
    """One operator on arguments of given shapes: tensors as `Shaped`, lists as tuples, the rest as it was given."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    flops: int
    moved: int
    """Bytes of the tensors read and made."""
    is_view: bool
    """It only looks at its argument in another way."""


@dataclass
class Peak:
    """The most bytes alive at once, and what they are: weights, adapters, gradients, activations, logits, temporaries."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class StepTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Use as `with StepTrace(...) as trace`; `phase` names what runs now. `vocabulary` tells logits from other tensors.

    Peaks are in bytes, one for each phase. What is alive already has to be named with `hold`. Operators that run while `repeated` is true
    are counted in `repeated_calls` as well.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.phase, self.repeated = vocabulary, "forward", False
        self.calls: Counter[Call] = Counter()
        self.repeated_calls: Counter[Call] = Counter()
        self.peaks: dict[str, Peak] = {}
        self._live: dict[int, tuple[weakref.ref[Any], int, str]] = {}  # by storage
        self._parts: Counter[str] = Counter()
        self._total = 0

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count the storages of `tensors`, once each, as `part`, whatever they were counted as."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (known := self._live.get(id(storage))) is not None:
                self._parts[known[2]] -= known[1]
                self._parts[part] += known[1]
                self._live[id(storage)] = (known[0], known[1], part)
            else:
                self._follow(storage, part)

    def parts(self) -> Counter[str]:
        """Part -> bytes that are alive now."""
        return Counter(self._parts)

    def _follow(self, storage: Any, part: str) -> None:
        key, size = id(storage), storage.nbytes()
        self._live[key] = (weakref.ref(storage, lambda _: self._freed(key)), size, part)
        self._parts[part] += size
        self._total += size
        peak = self.peaks.setdefault(self.phase, Peak())
        if self._total > peak.total:
            peak.total, peak.parts = self._total, dict(self._parts)

    def _freed(self, key: int) -> None:
        _, size, part = self._live.pop(key)
        self._parts[part] -= size
        self._total -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":  # a fake tensor is asked for its device
            return out
        made = False
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in self._live:
                made = True
                wide = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
                self._follow(storage, "logits" if wide else "activations" if self.phase == "forward" else "temporaries")
        call = _call(func, args, kwargs, out, made)
        self.calls[call] += 1
        if self.repeated:
            self.repeated_calls[call] += 1
        return out


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of `tensors`, shared ones once."""
    return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _call(func: Any, args: Any, kwargs: dict[str, Any], out: Any, made: bool) -> Call:
    inputs = [*_tensors(args), *_tensors(list(kwargs.values()))]
    is_view = not made and not func._schema.is_mutable
    moved = 0 if is_view else sum(t.numel() * t.element_size() for t in (*inputs, *_tensors(out)))
    return Call(
        func,
        tuple(_shaped(a) for a in args),
        tuple((k, _shaped(v)) for k, v in sorted(kwargs.items())),
        0 if is_view else _flops(func, args, kwargs, out),
        moved,
        is_view,
    )


def _shaped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Shaped(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(_shaped(v) for v in value)
    return value


def _flops(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Floating point operations of a matrix product or an attention; 0 for everything else."""
    packet = func._overloadpacket
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        forward = cast(Any, sdpa_flop_count)
        return int(forward(args[0].shape, args[1].shape, args[2].shape))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        backward = cast(Any, sdpa_backward_flop_count)
        return int(backward(*(args[i].shape for i in range(4))))
    if packet in (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_):
        groups = args[1].shape[0] if args[1].dim() == 3 else 1
        rows, inner = args[1].shape[-2:]
        return int(2 * groups * rows * inner * args[2].shape[-1])
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=out)) if count is not None else 0
