"""The frozen weight under a LoRA layer, dense, 4-bit or on the export's grid: one question, "give me W", whatever it is stored as.

QLoRA is LoRA over a quantized base (Dettmers et al. 2023, section 3, equation 5: the stored weight is dequantized for each product),
so the layers are the same and only this file knows the difference. bitsandbytes is not imported: a 4-bit weight brings its
`quant_state`, and the operators that read it are in torch's registry once bitsandbytes has made one.

Not here: quantizing, and loading quantized models.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor

from phinetune.errors import AdapterError
from phinetune.model.grid_weight import GridState


def is_quantized(weight: Tensor | None) -> bool:
    """True for a 4-bit weight of bitsandbytes (NF4 or FP4), and for one that is held on a grid."""
    return getattr(weight, "quant_state", None) is not None


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """W as a plain (out, in) tensor: `weight` itself, or a 4-bit weight dequantized and cast to `dtype`."""
    if not is_quantized(weight):
        return weight
    quantized = cast(Any, weight)
    if isinstance(quantized.quant_state, GridState):
        return quantized.quant_state.dense(quantized, dtype)
    if getattr(quantized.quant_state, "packing_format_for_cpu", False):  # re-ordered by bitsandbytes' own CPU inference
        undo = sys.modules["bitsandbytes"].functional._convert_weight_packed_for_cpu_inverse
        quantized.data, quantized.quant_state = undo(quantized.data, quantized.quant_state)
    packed, state = quantized.detach(), quantized.quant_state
    operators = torch.ops.bitsandbytes
    absmax = state.absmax
    if state.nested:  # double quantization (section 3): the scales are 8-bit themselves
        second = state.state2
        absmax = operators.dequantize_blockwise(absmax, second.absmax, second.code, second.blocksize, second.dtype)
        absmax = (absmax + state.offset).float()
    flat: Tensor = operators.dequantize_4bit(
        packed, absmax, state.blocksize, state.quant_type, state.shape, state.dtype
    )
    return flat.to(dtype)


def check_frozen(name: str, module: torch.nn.Module) -> None:
    """Raises AdapterError for a base layer whose weight cannot be read: 8-bit, or 4-bit but not yet quantized."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and hasattr(weight, "quant_state") and weight.quant_state is None:
        raise AdapterError(f"{name}: its 4-bit weight is not quantized yet", "move the model to its device first")
    if isinstance(weight, Tensor) and not weight.is_floating_point() and not is_quantized(weight):
        raise AdapterError(
            f"{name}: its weight is {str(weight.dtype)[6:]}; LoRA goes over floating point or 4-bit (bitsandbytes) weights",
            "load the base model without quantization, or in 4 bits",
        )
