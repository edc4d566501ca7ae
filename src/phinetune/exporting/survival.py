"""What rounding to integers left of a fine-tuning, layer by layer, from the numbers that the graph holds.

With W the base's weight, D what the adapter adds to it and Q what the graph computes with, Q - W should be D and a rounding error:

    kept       <Q - W, D> / <D, D>      the share of D that is there: 1, give or take the rounding
    cosine     between Q - W and D      how far D stands out of the rounding of single weights; what reaches the outputs is less rounded
                                        away than that, since errors of many weights cancel and D's do not
    noise      |Q - W - kept D| over the rounding error of the nearest codes: 1 for these, a little more where errors are made up for
    changed    share of the codes that are not the nearest ones of W without D

An adapter that was not merged, or shrunk on the way, shows in `kept`; another base, or codes or scales that were damaged, in `noise`. Not
here: answers on held-out examples, which have the last word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from phinetune.model.grid import Codes, quantize

KEPT = (0.5, 1.5)
"""A layer's `kept` outside of this is a fault, if it is outside by more than rounding explains."""
NOISE = 3.0
"""`noise` above this is a fault: gptq has 1.0 to 1.6, wrong scales tens."""


@dataclass(frozen=True)
class LayerSurvival:
    """Figures of one layer; see the module's head. `doubt` is the standard error of `kept` that rounding explains."""

    module: str
    kept: float
    cosine: float
    noise: float
    changed: float
    doubt: float
    energy: float
    """<D, D>, by which layers are averaged."""

    @property
    def fault(self) -> str:
        """What is wrong with this layer; empty if nothing is."""
        if not self.noise <= NOISE:
            return (
                f"{self.module}: its codes are {self.noise:.3g} times as far from the weights as rounding brings them"
            )
        if not KEPT[0] - 4 * self.doubt <= self.kept <= KEPT[1] + 4 * self.doubt:
            return f"{self.module}: holds {self.kept:.2f} of what the adapter adds"
        return ""


@torch.no_grad()
def layer_survival(module: str, base: Tensor, intended: Tensor, codes: Codes) -> LayerSurvival:
    """Figures of one layer: `base` and `intended` (W and W + D) as (out, in), and its codes in the graph."""
    base, intended, found = base.float(), intended.float(), codes.dense()
    delta, moved = intended - base, found - base
    nearest = quantize(intended, codes.grid).dense() - intended
    energy, product = float(delta.square().sum()), float((delta * moved).sum())
    kept = product / energy if energy else 1.0
    error = moved - kept * delta
    lengths = (energy * float(moved.square().sum())) ** 0.5
    rounding = float(nearest.square().mean()) ** 0.5
    return LayerSurvival(
        module,
        kept=kept,
        cosine=product / lengths if lengths else 1.0,
        noise=float(error.square().mean()) ** 0.5 / rounding if rounding else float(bool(error.any())) * float("inf"),
        changed=float((quantize(base, codes.grid).codes != codes.codes).float().mean()),
        doubt=rounding / energy**0.5 if energy else 0.0,
        energy=energy,
    )


def summary(layers: Iterable[LayerSurvival]) -> dict[str, Any]:
    """Figures of all layers together, each weighed by what its adapter adds, and of each layer."""
    found = list(layers)
    whole = sum(layer.energy for layer in found) or 1.0
    means = {
        name: round(sum(getattr(layer, name) * layer.energy for layer in found) / whole, 4)
        for name in ("kept", "cosine", "noise", "changed")
    }
    rows = {}
    for layer in found:
        values = asdict(layer)
        rows[values.pop("module")] = {k: round(values[k], 4) for k in ("kept", "cosine", "noise", "changed")}
    return {**means, "layers": rows}
