"""A base model held on the grid it will be shipped on: packed integers in memory, dense for the length of one product.

QLoRA (Dettmers et al. 2023) with another 4-bit format: the integers are those that the exported graph will hold, bit for bit, so an
adapter trained over them can be shipped beside them, and nothing is quantized after training. A weight brings its `quant_state`, as one of
bitsandbytes does, and the layers over it are the same. The output layer and an embedding that shares its weight are rounded and stay
dense.

Not here: the grid (`grid.py`), layers with factors (`phinetune.lora`), the graph.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phinetune.errors import ConfigError
from phinetune.model.grid import Codes, Grid, quantize, round_to_grid
from phinetune.model.memory import MappedFiles

_PIECE = 1 << 18  # weights made dense at once on a CPU: 1 MB in float32


class GridState:
    """What turns the bytes of a packed weight back into numbers: its grid, scales and zero points, (out, in), and the dtype asked for."""

    state2 = None
    """bitsandbytes' name for a second level of quantization, which there is not."""

    def __init__(self, codes: Codes, dtype: torch.dtype) -> None:
        self.grid, self.shape, self.dtype = codes.grid, codes.codes.shape, dtype
        self.scales = codes.scales
        self.zeros = None if codes.zeros is None else codes.zeros.float()

    def dense(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in `dtype`, from its bytes (out, in · bits / 8); what `Codes.dense` gives."""
        if self.scales.device != packed.device:
            self.scales = self.scales.to(packed.device)
            self.zeros = None if self.zeros is None else self.zeros.to(packed.device)
        out = torch.empty(self.shape, dtype=dtype, device=packed.device)
        step = max(1, _PIECE // self.shape[1]) if packed.device.type == "cpu" else self.shape[0]
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            blocks = self._numbers(packed[rows]).view(-1, self.scales.shape[1], self.grid.block_size)
            if self.zeros is not None:
                blocks.sub_(self.zeros[rows].unsqueeze(-1))
            out[rows] = blocks.mul_(self.scales[rows].unsqueeze(-1)).view(-1, self.shape[1])
        return out

    def _numbers(self, packed: Tensor) -> Tensor:
        """float32 codes of some rows, flat; less the middle where blocks are symmetric."""
        less = self.grid.middle if self.zeros is None else 0
        if self.grid.bits == 8:
            return packed.flatten().float().sub_(less)
        pairs: Tensor = _pairs(less, packed.device).index_select(0, packed.flatten().int())
        return pairs.view(torch.float32)


@functools.cache
def _pairs(less: int, device: torch.device) -> Tensor:
    """(256,) int64: for each byte its two codes, `less` taken off, as two float32 side by side, so that one look-up gives both."""
    byte = torch.arange(256, device=device)
    both = torch.stack([(byte & 15) - less, (byte >> 4) - less], dim=-1).float()
    return both.view(torch.int64).flatten()


class GridLinear(nn.Linear):
    """A linear layer whose frozen weight is held on a grid. x (..., in) -> (..., out)."""

    @classmethod
    def from_base(cls, base: nn.Linear, grid: Grid, dtype: torch.dtype) -> GridLinear:
        """`base` with its weight rounded to the nearest codes; the bias is shared. dtype: what the weight is made dense in."""
        layer = cls(base.in_features, base.out_features, bias=False, device="meta")
        codes = quantize(base.weight, grid)
        weight: Any = nn.Parameter(codes.packed()[0].flatten(1), requires_grad=False)
        weight.quant_state = GridState(codes, dtype)
        layer.weight, layer.bias = weight, base.bias
        return layer.train(base.training)

    def forward(self, input: Tensor) -> Tensor:
        weight: Any = self.weight
        return F.linear(input, weight.quant_state.dense(weight, input.dtype), self.bias)


@torch.no_grad()
def hold_on_grid(model: Any, grid: Grid, dtype: torch.dtype) -> None:
    """Round every linear layer of `model` to `grid`, and hold those but the output layer packed; `dtype` is what is computed in.

    The weights must be as they are on disk: rounding them to `dtype` first would give other codes. Weights that are mapped from a file must
    not be used by anything else. Raises ConfigError, with nothing changed, where blocks do not divide a layer's inputs, and for layers
    that are not `nn.Linear`.
    """
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    problems = [text for n, m in linears.items() for text in grid.problems(n, m.in_features)]
    problems += [f"{n}: is GPT-2's Conv1D" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"]
    if problems:
        raise ConfigError(problems, "load it with model_kwargs.load_in_4bit, or choose another block size")
    files = MappedFiles()
    for name, base in linears.items():
        if base is head:
            weight = base.weight.detach()
            base.weight.data = round_to_grid(weight, grid, torch.empty_like(weight, dtype=dtype))
            continue
        model.set_submodule(name, GridLinear.from_base(base, grid, dtype).requires_grad_(False))
        if not base.weight.is_meta:
            files.release(base.weight.data)
    for parameter in model.parameters():  # buffers keep the precision that the model gave them
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def rounded_modules(model: Any) -> list[str]:
    """Names of the modules of `model` whose weights are on its grid: packed ones, the output layer, an embedding that shares its weight."""
    names = [
        n
        for n, m in model.named_modules()
        if isinstance(getattr(getattr(m, "weight", None), "quant_state", None), GridState)
    ]
    head = model.get_output_embeddings()
    return names + [
        n for n, m in model.named_modules() if head is not None and getattr(m, "weight", None) is head.weight
    ]
