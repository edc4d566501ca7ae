"""How long the operators of a step take on this machine: each one, on its own shapes, timed once and remembered.

A rate for matrix products and one for memory would miss what decides at small sizes (thin products, casts, strided copies, softmax). The
trace of a step holds a few hundred different calls only, so the dear ones are simply run on tensors of their shapes. What the time
allowed does not reach is taken at the rate of the timed ones of its kind; views and the way through autograd and Python cost a fixed
time a call, found by running a small real step. Times are kept per machine, torch version and number of threads.

A machine that others use as well may run at half its pace for minutes. So a standard product is timed along: what is timed while that is
slow is scaled back to the best that was seen of it, and all times are forgotten when it turns out that they were taken at a slower pace.
Not here: which calls.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections import Counter
from typing import Any

import torch

from phinetune.artifact import cache_folder, write_json
from phinetune.model.compute import machine_key
from phinetune.training.estimate_trace import Call, Shaped

_FILE = "operators.json"
_RUNS = 3
_PACE = "pace"  # of what is known: the best time of the standard product
_BUSY = 1.25  # times slower than that: more than chance
_KEPT = 50_000  # timings in the file, over all machines; beyond, it is begun anew
_UPDATE_PASSES = 8
"""Times that an optimizer step reads or writes each trained parameter's bytes: the norm, clipping, moments, parameter, gradient."""


class OperatorClock:
    """Seconds of calls. It times what it has not timed before for `budget` seconds in all, then goes by rates.

    Operands above `largest` bytes are never made. The device is the CPU.
    """

    def __init__(self, budget: float = 5.0, largest: int = 1 << 30) -> None:
        self.budget, self.largest = budget, largest
        self.key = machine_key()
        self.known: dict[str, float] = _read().get(self.key, {})
        self._new, self._begun_anew = False, False
        self._slower: float | None = None

    def seconds(self, calls: Counter[Call]) -> float:
        """Of all `calls` together, without the way through autograd and Python."""
        real = {call: n for call, n in calls.items() if not call.is_view}
        self._time([*_STANDARD, *sorted(real, key=lambda c: -_work(c) * real[c])])
        rates = self._rates([*_STANDARD, *real])
        return sum(n * self._one(call, rates) for call, n in real.items())

    def update_seconds(self, trained: int) -> float:
        """Of clipping and the optimizer over `trained` bytes of parameters."""
        self._time(list(_STANDARD))
        return _UPDATE_PASSES * trained / self._rates(list(_STANDARD))[1]

    def remember(self, name: str, value: float) -> None:
        """Keep a figure of this machine that is no operator's."""
        self.known[name], self._new = value, True

    def save(self) -> None:
        """Remember what was timed."""
        if self._new:
            kept = _read()
            if sum(map(len, kept.values())) > _KEPT:
                kept = {}
            kept[self.key] = {**({} if self._begun_anew else kept.get(self.key, {})), **self.known}
            write_json(cache_folder() / _FILE, kept)
            self._new = False

    def _one(self, call: Call, rates: tuple[float, float]) -> float:
        known = self.known.get(digest(call))
        return known if known is not None else max(call.flops / rates[0], call.moved / rates[1])

    def _rates(self, calls: list[Call]) -> tuple[float, float]:
        """(flops a second of the timed products, bytes a second of the other timed operators)."""
        timed = [(c, s) for c in calls if (s := self.known.get(digest(c))) is not None]
        products = [(c.flops, s) for c, s in timed if c.flops]
        others = [(c.moved, s) for c, s in timed if not c.flops]

        def rate(found: list[tuple[int, float]]) -> float:
            return max(sum(amount for amount, _ in found), 1) / max(sum(s for _, s in found), 1e-9)

        return rate(products), rate(others)

    def slower(self) -> float:
        """How many times slower the machine is now than it was at its best; 1.0 for what may be chance. Looked at once."""
        if self._slower is None:
            now, best = min(_standard_seconds() for _ in range(2)), self.known.get(_PACE)
            if best is None or now < best:
                if best is not None and best > _BUSY * now:  # all that is known was timed on a busy machine
                    self.known, self._begun_anew = {}, True
                self.known[_PACE], self._new = now, True
                best = now
            self._slower = now / best if now > _BUSY * best else 1.0
        return self._slower

    def _time(self, calls: list[Call]) -> None:
        start = time.perf_counter()
        slower = self.slower()
        for call in calls:
            always = call in _STANDARD
            spent = time.perf_counter() - start
            if digest(call) in self.known or (not always and (spent > self.budget or call.moved > self.largest)):
                continue
            seconds = _measure(call)
            if seconds is not None:
                self.known[digest(call)], self._new = seconds / slower, True
        self.budget = max(0.0, self.budget - (time.perf_counter() - start))


def digest(call: Call) -> str:
    """A short name for a call, the same in every process."""
    text = f"{call.operator} {call.args} {call.kwargs}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def call_overhead(step: Any, calls: Counter[Call]) -> float:
    """Seconds a call that a step costs beyond its operators: `step` runs a small real one, of which `calls` is the trace."""
    clock = OperatorClock()
    step()
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    found = max(0.0, (statistics.median(taken) / clock.slower() - clock.seconds(calls)) / sum(calls.values()))
    clock.remember("overhead", found)
    clock.save()
    return found


def _standard(rows: int, inner: int) -> tuple[Call, Call]:
    a, b = (Shaped(s, (s[1], 1), torch.float32) for s in ((rows, inner), (inner, inner)))
    size = 4 * (2 * rows * inner + inner * inner)
    product = Call(torch.ops.aten.mm.default, (a, b), (), 2 * rows * inner * inner, size, False)
    return product, Call(torch.ops.aten.mul.Tensor, (a, a), (), 0, 12 * rows * inner, False)


_STANDARD = _standard(256, 1024)
"""Timed always, so that there is a rate of each kind."""


def _standard_seconds() -> float:
    """Of the standard product, now."""
    return _measure(_STANDARD[0]) or 1.0


def _work(call: Call) -> float:
    """Rough seconds, to begin with the dear ones."""
    return max(call.flops / 2e11, call.moved / 1e10)


def _measure(call: Call) -> float | None:
    """Median seconds of `call` on tensors of its shapes; None where it cannot be run on made-up numbers."""
    try:
        args, kwargs = tuple(_made(a) for a in call.args), {k: _made(v) for k, v in call.kwargs}
        with torch.no_grad():
            call.operator(*args, **kwargs)
            taken = []
            for _ in range(_RUNS):
                start = time.perf_counter()
                call.operator(*args, **kwargs)
                taken.append(time.perf_counter() - start)
    except Exception:  # an operator that needs more than shapes: it goes by its kind's rate
        return None
    return statistics.median(taken)


def _made(value: Any) -> Any:
    """An argument like `value`: tensors half ones (whole numbers zero), so that nothing overflows and no index leads out."""
    if isinstance(value, Shaped):
        tensor = torch.empty_strided(value.shape, value.stride, dtype=value.dtype)
        flat = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,))
        flat.fill_(0.5 if value.dtype.is_floating_point else 0)
        return tensor
    return [_made(v) for v in value] if isinstance(value, tuple) else value


def _read() -> dict[str, dict[str, float]]:
    try:
        found = json.loads((cache_folder() / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
