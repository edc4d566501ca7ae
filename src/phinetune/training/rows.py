"""What of a batch the model need not compute: rows of its last layer, and what no token of a tree sees.

After the last layer's attention no token looks at another one, and the head sees only the positions that predict a learned token. So the
last MLP, which works token by token, is given these rows and no others; what it would have added elsewhere reaches nothing. The loss and
all gradients are the same.

Not here: the head and the loss (`loss.py`), attention itself (`model/attention.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.model.attention import allowed_in_tree
from phinetune.model.fast import uses_blocks


def tree_mask(model: Any, tree: Tensor, dtype: torch.dtype) -> Tensor:
    """What stands in the place of the attention mask for a tree (1 + n lengths, prefix first).

    The lengths themselves, (1, 1, 1, 1 + n), for attention that knows them; else (1, 1, T, T) with 0 where a token may look and the
    dtype's lowest value where it may not.
    """
    if uses_blocks(wrapping(model)[-1]):
        return tree.view(1, 1, 1, -1)
    return additive_mask(allowed_in_tree(tree.tolist()).to(tree.device), dtype)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, T, T): 0 where a token may look and the dtype's lowest value where it may not; allowed is boolean (T, T)."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]


def wrapping(model: Any) -> list[Any]:
    """`model`, what it wraps (as DDP and FSDP do), and so on; the model itself last."""
    inner = getattr(model, "module", None)
    return [model, *(wrapping(inner) if isinstance(inner, nn.Module) else [])]


def rows_at(args: tuple[Any, ...], positions: Tensor) -> tuple[Any, ...]:
    """A module's arguments with the rows `positions` of the first, (B, T, h), in its place: (N, h)."""
    hidden = args[0]
    return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions), *args[1:])


def last_mlp(model: Any) -> nn.Module | None:
    """The MLP of the last layer, if `model` is built of layers that have one called `mlp` working token by token; else None."""
    layers = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and hasattr(m[-1], "mlp")]
    if len(layers) != 1:
        return None
    mlp: Any = layers[0][-1].mlp
    routed = any("rout" in name or "expert" in name or name.endswith("gate") for name, _ in mlp.named_modules())
    alone = (
        len(inspect.signature(mlp.forward).parameters) == 1
    )  # given the hidden states and nothing else, such as a residual
    return mlp if alone and not routed and type(mlp).__name__.endswith("MLP") else None


@contextlib.contextmanager
def only_rows(module: nn.Module | None, positions: Tensor) -> Iterator[None]:
    """Inside, `module` computes only the rows `positions` of its (B, T, h) input; elsewhere its output is zero.

    Nothing is changed for None. Not for a module that is computed again for the backward pass: the rows would not be known any more.
    """
    if module is None:
        yield
        return
    shape: list[torch.Size] = []

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shape[:] = [args[0].shape]
        return rows_at(args, positions)

    def spread(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        whole = output.new_zeros(shape[0][:-1].numel(), output.shape[-1])
        return whole.index_copy(0, positions, output).view(*shape[0][:-1], -1)

    handles = [module.register_forward_pre_hook(select), module.register_forward_hook(spread)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recomputed(model: Any, module: nn.Module | None) -> bool:
    """True if `module` lies in a part of `model` that is computed again for the backward pass (activation checkpointing)."""
    if module is None or not model.training:
        return False
    return any(getattr(part, "gradient_checkpointing", False) for part in _around(model, module))


def _around(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The parts of `model` that `module` lies in; looked for once."""
    known = _AROUND.get(module)
    if known is None or known[0]() is not model:
        found = [part for part in model.modules() if any(inside is module for inside in part.modules())]
        known = _AROUND[module] = weakref.ref(model), [weakref.ref(part) for part in found]
    return [part for ref in known[1] if (part := ref()) is not None]


_AROUND: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], list[weakref.ref[nn.Module]]]] = (
    weakref.WeakKeyDictionary()
)
