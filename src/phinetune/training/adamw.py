"""AdamW whose step, clipping included, goes over all trained tensors in one call, on CPUs.

torch's own AdamW is what it stands in for: its options, its state, what is saved. Where the built functions (`adamw.c`) are missing or a group
asks for something else (another dtype or device, amsgrad, tensors for rates), torch's own step is taken, which is the reference.

Not here: other optimizers; which one a run gets (`optimizers.py`).
"""

from __future__ import annotations

import ctypes
import functools
import math
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phinetune.model.kernels import built

_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_FLOAT, _MOMENTS = torch.float32, ("exp_avg", "exp_avg_sq")
_EACH = 5
"""Numbers that adamw.c is told of each tensor: where parameter, gradient and moments lie, and how many numbers they have."""


@functools.cache
def library() -> Any:
    """The built functions, loaded once; None where they were not built."""
    loaded = built(Path(__file__).with_name("_adamw"))
    try:
        if loaded is not None:
            loaded.sum_of_squares.argtypes, loaded.sum_of_squares.restype = (_P, _N), ctypes.c_double
            loaded.adamw.argtypes, loaded.adamw.restype = (_P, _N, *(_F,) * 8), None
    except AttributeError:
        return None
    return loaded


class _Plan(NamedTuple):
    """A group's tensors as adamw.c is told of them, five numbers each; kept from step to step, since there are hundreds."""

    entries: list[tuple[Tensor, Tensor, Tensor]]  # each parameter and its moments
    steps: Tensor  # how many each parameter has taken; the numbers that torch keeps of each are views of it
    numbers: array[int]

    def fits(self, group: dict[str, Any], states: dict[Tensor, Any]) -> bool:
        """Puts the addresses of this step's gradients in; False if anything else has changed."""
        if len(group["params"]) != len(self.entries):
            return False
        at, numbers = 0, self.numbers
        for p, m, v in self.entries:
            g, state = p.grad, states[p]
            if g is None or g.dtype is not _FLOAT or not g.is_contiguous() or p.data_ptr() != numbers[at]:
                return False
            if state.get("exp_avg") is not m or state.get("exp_avg_sq") is not v:
                return False
            numbers[at + 1] = g.data_ptr()
            at += _EACH
        return True

    @property
    def address(self) -> int:
        return self.numbers.buffer_info()[0]


class AdamW(torch.optim.AdamW):
    """torch's AdamW. `clip` multiplies the gradients of the next step, and only of that one; the gradients stay as they are."""

    clip: float = 1.0
    _kept: list[_Plan] | None = None  # those of the last step

    def gradient_norm(self) -> float | None:
        """The 2-norm of all gradients together; None if they cannot be read here. The reference is `torch.nn.utils.get_total_norm`.

        Raises MemoryError where there is none.
        """
        plans = self._plans()
        if plans is None:
            return None
        squares = [library().sum_of_squares(plan.address, len(plan.entries)) for plan in plans]
        if -1.0 in squares:
            raise MemoryError("the gradients' norm: no memory for its sums")
        return math.sqrt(sum(squares))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, as torch's own. `closure` computes the loss anew, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip, self.clip = self.clip, 1.0
        plans = self._plans()
        if plans is None:
            if clip != 1.0:
                torch._foreach_mul_(
                    [g for group in self.param_groups for p in group["params"] if (g := p.grad) is not None], clip
                )
            super().step()
            return loss
        for group, plan in zip(self.param_groups, plans, strict=True):
            if plan.entries:
                _step(group, plan, clip)
        return loss

    def _plans(self) -> list[_Plan] | None:
        """Of all groups, with this step's gradients; None if torch's own step has to be taken."""
        if library() is None or not all(map(_plain, self.param_groups)):
            return None
        kept, groups = self._kept or [], self.param_groups
        if len(kept) == len(groups) and all(
            plan.fits(group, self.state) for group, plan in zip(groups, kept, strict=True)
        ):
            return kept
        plans = [self._plan(group["params"]) for group in groups]
        found = [plan for plan in plans if plan is not None]
        self._kept = found if len(found) == len(plans) else None
        return self._kept

    def _plan(self, parameters: list[Tensor]) -> _Plan | None:
        """Of those that have gradients; None if they cannot be read here, or have taken different numbers of steps."""
        having = [p for p in parameters if p.grad is not None]
        if not all(_readable(p, p.grad, *(self.state[p].get(name, p) for name in _MOMENTS)) for p in having):
            return None
        for p in having:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=_FLOAT)
                self.state[p] |= {name: torch.zeros_like(p) for name in _MOMENTS}
        steps = torch.tensor([float(self.state[p]["step"]) for p in having], dtype=_FLOAT)
        if len(set(steps.tolist())) > 1:
            return None
        for p, step in zip(having, steps, strict=True):
            self.state[p]["step"] = step
        entries = [(p, *(self.state[p][name] for name in _MOMENTS)) for p in having]
        numbers = array("q")
        for p, m, v in entries:
            numbers.extend((p.data_ptr(), p.grad.data_ptr(), m.data_ptr(), v.data_ptr(), p.numel()))
        return _Plan(entries, steps, numbers)


def clipping(norm: float, most: float) -> float:
    """What gradients of this norm are multiplied by so that it is `most` at most, as `torch.nn.utils.clip_grad_norm_` does."""
    factor = most / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor  # what is no number stays none


def _step(group: dict[str, Any], plan: _Plan, clip: float) -> None:
    plan.steps.add_(1.0)
    (b1, b2), lr, t = group["betas"], group["lr"], float(plan.steps[0])
    corrections = 1 / math.sqrt(1 - b2**t), group["eps"], lr / (1 - b1**t)
    rates = clip, 1 - lr * group["weight_decay"], 1 - b1, b2, 1 - b2, *corrections
    library().adamw(plan.address, len(plan.entries), *rates)


def _plain(group: dict[str, Any]) -> bool:
    """True if the group asks for nothing that adamw.c does not compute."""
    numbers = (group["lr"], *group["betas"])
    others = ("amsgrad", "maximize", "capturable", "differentiable")
    return not any(group[key] for key in others) and not any(isinstance(number, Tensor) for number in numbers)


def _readable(*tensors: Any) -> bool:
    return all(
        t.dtype is _FLOAT and t.device.type == "cpu" and t.layout is torch.strided and t.is_contiguous()
        for t in tensors
    )
