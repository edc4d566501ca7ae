"""How much arithmetic a training step is, and how fast this machine does it: counted operations, the usual formula, the GEMM rate.

`Count` sees every operation of the steps that run inside it, those inside autograd functions too, and adds up matrix products by torch's
own formulas (torch.utils.flop_counter) and those below for what it has none. Compiled regions are not seen. Elementwise work is not counted.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
_LOOKS_COSTLY = ("mm", "matmul", "linear", "attention", "conv", "gemm", "mv", "dot")


def _product(out: Any, inner: int) -> int:
    return 2 * math.prod(out.shape) * inner


def _own_formulas() -> dict[Any, Callable[..., int]]:
    """Operation -> floating point operations from (arguments, output), for those that torch has no formula for."""
    formulas: dict[Any, Callable[..., int]] = {
        aten.addmm_: lambda args, out: _product(out, args[1].shape[-1]),
        aten.baddbmm_: lambda args, out: _product(out, args[1].shape[-1]),
        aten.addbmm: lambda args, out: _product(out, args[1].shape[-1] * args[1].shape[0]),
        aten.addmv: lambda args, out: _product(out, args[1].shape[-1]),
        aten.mv: lambda args, out: _product(out, args[0].shape[-1]),
        aten.linear: lambda args, out: _product(out, args[0].shape[-1]),
        aten._scaled_dot_product_flash_attention_for_cpu: lambda args, out: sdpa_flop_count(
            *(a.shape for a in args[:3])
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda args, out: sdpa_backward_flop_count(
            *(a.shape for a in args[:4])
        ),
    }
    for library, name in (("mkldnn", "_linear_pointwise"), ("mkl", "_mkl_linear")):
        if hasattr(getattr(torch.ops, library), name):
            formulas[getattr(getattr(torch.ops, library), name)] = lambda args, out: _product(out, args[0].shape[-1])
    return formulas


class Count(TorchDispatchMode):
    """Inside, matrix products are counted: `flops` in all, `calls` by operation, `unknown` what looks costly and has no formula.

    `tokens` are those that go through the embedding, padding included and what is shared counted once; `pairs` the squares of the rows'
    lengths: what attention is computed over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.tokens = self.pairs = 0
        self.calls: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.own = _own_formulas()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        if operation in self.own:
            self._add(operation, self.own[operation](args, out))
        elif operation in flop_registry:
            self._add(operation, flop_registry[operation](*args, **(kwargs or {}), out_val=out))
        elif operation is aten.embedding and args[1].dim() == 2:
            self.tokens += args[1].numel()
            self.pairs += args[1].shape[0] * args[1].shape[1] ** 2
        elif any(part in str(operation).rpartition(".")[2].split("_") for part in _LOOKS_COSTLY):
            self.unknown[str(operation)] += 1
        return out

    def _add(self, operation: Any, flops: int) -> None:
        self.flops += int(flops)
        self.calls[str(operation)] += 1

    def figures(self) -> dict[str, Any]:
        """What was counted, for a file."""
        return {
            "flops": self.flops,
            "computed_tokens": self.tokens,
            "pairs": self.pairs,
            "calls": dict(self.calls),
            "without_formula": dict(self.unknown),
        }


def model_flops(folder: Path, r: int, tokens: int, pairs: int, learned: int) -> dict[str, int]:
    """The usual formula for a LoRA step over all linear layers, by part; `tokens`, `pairs` as in `Count`, `learned` the head's positions.

    Frozen layers: 2 forward and 2 backward per weight and token (no gradient of the weight). Factors: 2 + 4. Attention: two products
    forward and four backward over full squares. Head: as frozen layers, at learned positions.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head, text = model.get_output_embeddings(), config.get_text_config()
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    parts = {
        "frozen": 4 * tokens * sum(a * b for a, b in shapes),
        "factors": 6 * tokens * r * sum(a + b for a, b in shapes),
        "attention": 12 * pairs * width * text.num_attention_heads * text.num_hidden_layers,
        "head": 4 * learned * math.prod(head.weight.shape),
    }
    return {**parts, "total": sum(parts.values())}


def gemm_rate(m: int, k: int, n: int, dtype: torch.dtype = torch.bfloat16, seconds: float = 0.3) -> float:
    """(m, k) x (n, k)ᵀ products of this machine in `dtype`, in GFLOP/s: the operations of about `seconds` of them over their whole time.

    Whole, as a step's time is: where others work on the same cores, a product takes one of two times, and their median tells which was
    the more frequent one in that moment only.
    """
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    torch.nn.functional.linear(x, w)
    count, start = 0, time.perf_counter()
    while count < 5 or time.perf_counter() - start < seconds:
        torch.nn.functional.linear(x, w)
        count += 1
    return 2 * m * k * n * count / (time.perf_counter() - start) / 1e9
