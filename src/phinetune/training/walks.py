"""A model in training answers what the Trainer asks at each step without walking over its hundreds of modules.

The Trainer puts the model into training mode, clips the gradients of its parameters and forgets them: three walks a step, each some milliseconds
in which a processor's other threads wait. While a run lasts, its parameters are those it began with. Not here: garbage collection's own
walk (`garbage.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def few_walks(model: Any) -> Iterator[None]:
    """Inside, `model.parameters()` gives those that it has at the first call, and `model.train()` of a model in training does nothing.

    Whoever puts a part of it, but not the whole, into evaluation mode has to put it back himself.
    """
    kept: list[nn.Parameter] = []

    def parameters(recurse: bool = True) -> Iterator[nn.Parameter]:
        if not recurse:
            return type(model).parameters(model, recurse)  # type: ignore[no-any-return]
        kept[:] = kept or type(model).parameters(model)
        return iter(kept)

    def train(mode: bool = True) -> Any:
        return model if mode and model.training else type(model).train(model, mode)

    before = {name: vars(model)[name] for name in ("parameters", "train") if name in vars(model)}
    model.parameters, model.train = parameters, train
    try:
        yield
    finally:
        for name in ("parameters", "train"):
            del model.__dict__[name]
        model.__dict__.update(before)
