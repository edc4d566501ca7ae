"""The loss of a frozen output head and its gradient of the rows that come in, in one pass over the head's weights, on
processors that multiply bfloat16 in matrix tiles (AMX) or in vectors (AVX-512).

`head.c` has the arithmetic and is built when phinetune is installed where there is a compiler. The reference is what it stands in for: the
products and softmax one by one, over a chunk of logits (`cross_entropy.py`); here there are no logits, and scores stay in float32.
`serves` says where it is taken: bfloat16 in main memory, a plain weight without bias that is not trained, no label smoothing.

Not here: autograd, chunks, other heads.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from phinetune.data.encoding import MASKED
from phinetune.model.kernels import built_for_tiles, operator, plain, undisturbed

WIDEST, FEW = 2048, 64
"""Numbers of a row up to which any count of rows is served, and rows that are served whatever their width: beyond, the rows whose sums
stay in a processor's cache are too few for all that is packed, and oneDNN's products are as fast or faster (measured, benchmarks/README.md)."""
_HEAD = struct.Struct("3q6Q")


@functools.cache
def library() -> Any:
    """The built functions, loaded once; None where they were not built, or the processor has nothing that multiplies bfloat16."""
    found = built_for_tiles(Path(__file__).with_name("_head"), "head_loss")
    if found is not None:
        found.head_room.argtypes, found.head_room.restype = (ctypes.c_int64, ctypes.c_int64), ctypes.c_int64
    return found


def serves(hidden: Tensor, weight: Tensor, targets: Tensor) -> bool:
    """True if the functions are there and take hidden (N, h), weight (V, h) and targets (N,)."""
    if hidden.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16 or library() is None:
        return False
    rows, width = hidden.shape
    fits = rows > 0 and width % 32 == len(weight) % 32 == 0 and len(weight) > 0 and (width <= WIDEST or rows <= FEW)
    return (
        fits and undisturbed() and targets.dtype is torch.int64 and not torch.compiler.is_compiling()
        and all(plain(t) and t.is_contiguous() for t in (hidden, weight, targets))
    )  # fmt: skip


def _results(hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool) -> list[Tensor]:
    wide = torch.float32
    room = hidden.new_empty(library().head_room(*hidden.shape), dtype=wide)
    return [hidden.new_empty(len(hidden), dtype=wide), *([torch.empty_like(hidden)] if gradient else []), room]


@operator("head_loss(Tensor hidden, Tensor weight, Tensor targets, bool gradient) -> Tensor[]", _results)
def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool) -> list[Tensor]:
    """hidden (N, h), weight (V, h), targets (N,) -> losses (N,) float32, their gradients of hidden (N, h), if `gradient`, and the room used.

    0 for rows whose target is -100. Raises IndexError for another target that is not one of V.
    """
    results = _results(hidden, weight, targets, gradient)
    of_hidden = results[1].data_ptr() if gradient else 0
    operands = [t.data_ptr() for t in (hidden, weight, targets, results[0])]
    failed = library().head_loss(_HEAD.pack(*hidden.shape, len(weight), *operands, of_hidden, results[-1].data_ptr()))
    if failed == 2:
        raise IndexError(f"a target is neither {MASKED} nor one of {len(weight)} words")
    if failed:
        raise MemoryError("the output head: no memory for a panel of its weights")
    return results


@register_flop_formula(torch.ops.phinetune.head_loss)
def _flops(hidden: Any, weight: Any, targets: Any, gradient: bool, *, out_shape: Any = None, **_: Any) -> int:
    """Operations of the products: 2 for each multiplication and addition."""
    return (2 + 2 * bool(gradient)) * int(hidden[0] * hidden[1] * weight[0])
