"""LoRA trained for the grid that the model will be shipped on: every product is with the merged weight, rounded as the export rounds it.

A layer with a `Rounding` multiplies with round(W + s B A) and not with W and the factors apart, so what training sees is what merging
and quantizing leave, bit for bit: the same folding (`fold.py`), the same dtype on disk in between, the same grid (`model/grid.py`).
The factors get LoRA's own gradients (`functional.py`, `folded`). The rounded weight is made again when a factor has changed, once an
optimizer step however many micro-batches there are. Layers without factors are rounded once, in the model.

Not here: the arithmetic of layers, better codes than the nearest (`exporting`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from phinetune.errors import ConfigError
from phinetune.lora.fold import Folder
from phinetune.lora.frozen import dense, is_quantized
from phinetune.lora.layer import LoRALayer
from phinetune.model.grid import Grid, round_to_grid

_steps = 0
"""Optimizer steps of this process: one may change factors without torch's counter of changes knowing."""


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


class Rounding:
    """One layer's rounded, merged weight; `stored` is the dtype that merged weights have on disk."""

    _hook: Any = None

    def __init__(self, grid: Grid, stored: torch.dtype) -> None:
        self.grid, self.stored = grid, stored
        self._made_of: tuple[Any, ...] = ()
        self._weight: Tensor | None = None
        if Rounding._hook is None:
            Rounding._hook = register_optimizer_step_post_hook(_count_step)

    def weight(self, layer: Any) -> Tensor:
        """round(W + s B A) of `layer`, (out, in), in the dtype that it computes in, made again if its factors have changed."""
        dtype = layer.compute_dtype()
        made_of = (_steps, dtype, layer.scaling, *((id(f), f._version) for f in (layer.lora_A, layer.lora_B)))
        if self._weight is None or made_of != self._made_of:
            with torch.inference_mode(False), torch.no_grad():  # the weight outlives an inference mode that is on now
                self._weight = self._fold(layer, dtype)
            self._made_of = made_of
        return self._weight

    def _fold(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """As folding, writing and rounding give it one after another (`reference`), a block of rows at a time."""
        if layer.fan_in_fan_out:
            return self.reference(layer, dtype)
        weight, out = dense(layer.weight, layer.compute_dtype()), self._weight
        if out is None or out.dtype != dtype:
            out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        A, B = layer.factors()
        folder = Folder((weight.shape[0], weight.shape[1]), weight.dtype, A, B, layer.scaling)
        for start, stop in folder.blocks():
            merged = weight[start:stop].clone()
            folder.write(merged, start, stop)
            round_to_grid(merged.to(self.stored), self.grid, out[start:stop])
        return out

    def reference(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """The definition: the layer's merged weight, by way of its dtype on disk, onto the grid."""
        merged = layer.folded()
        return self.rounded(merged.t() if layer.fan_in_fan_out else merged, dtype)

    def rounded(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` (out, in) by way of its dtype on disk onto the grid, a new tensor in `dtype`."""
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        return round_to_grid(weight.to(self.stored), self.grid, out)

    def forget(self) -> None:
        """Give the rounded weight's memory back."""
        self._weight, self._made_of = None, ()


def round_model(model: nn.Module, grid: Grid, stored: torch.dtype) -> int:
    """Make every linear layer of `model` compute on `grid`: those with factors from now on, the others by rounding their weights.

    Final for this model: weights of layers without factors are replaced. An input embedding that shares its weight with the output
    layer is rounded with it, as the exported graph has it. Returns the number of layers with factors. Raises ConfigError, with nothing
    changed, for layers whose inputs the blocks do not divide, and for adapters that cannot be merged into linear layers.
    """
    linears: dict[str, Any] = {n: m for n, m in model.named_modules() if _is_linear(m)}
    adapted = {n: m for n, m in linears.items() if isinstance(m, LoRALayer) and m.r > 0}
    problems = [text for n, m in linears.items() for text in grid.problems(n, m.in_features)]
    problems += [f"{n}: {why}" for n, m in model.named_modules() if (why := _cannot(m))]
    if problems:
        raise ConfigError(problems, "train without int4_aware, or with other layers and sizes")
    for name, module in linears.items():
        rounding = Rounding(grid, stored)
        if name in adapted:
            module.__dict__["rounding"] = rounding
        elif is_quantized(module.weight):
            _replace_quantized(model, name, module, rounding)
        else:
            module.weight.data = rounding.rounded(module.weight.detach(), module.weight.dtype)
    return len(adapted)


def forget_rounded(model: nn.Module) -> None:
    """Give the memory of all rounded weights in `model` back; they are made again when they are needed."""
    for module in model.modules():
        if isinstance(module, LoRALayer) and module.rounding is not None:
            module.rounding.forget()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _cannot(module: nn.Module) -> str:
    """Why a part of the model cannot be trained for a grid; empty if it can."""
    if not isinstance(module, LoRALayer):
        return "is GPT-2's Conv1D without factors" if type(module).__name__ == "Conv1D" else ""
    if not isinstance(module, nn.Linear):
        return "factors of an embedding or a convolution do not go through a grid"
    if module.lora_magnitude_vector is not None:
        return "DoRA's lengths have no gradient through rounding here"
    if getattr(module.lora_dropout, "p", 0.0) > 0.0:
        return "lora_dropout must be 0: the factors are in the weight"
    return ""


def _replace_quantized(model: nn.Module, name: str, module: Any, rounding: Rounding) -> None:
    """Put a plain layer with the rounded weight in the place of one in 4 bits."""
    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    dtype = module.weight.quant_state.dtype
    plain.weight = nn.Parameter(rounding.rounded(dense(module.weight, dtype), dtype), requires_grad=False)
    plain.bias = module.bias
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, plain.train(module.training))
