"""Base models in few bits: bitsandbytes' NF4 or FP4, or the exported graph's integers. What was asked for, and what it makes of a weight.

bitsandbytes is the reference implementation of the format (Dettmers et al. 2023); it quantizes here, on CPUs too, and is imported only
when 4 bits are asked for. A model whose weights are on disk in the dtype wanted is mapped and quantized a slice of a weight at a time, each
weight's pages given back before the next (`quantize_layers`): beside the 4-bit model, loading takes no more than one weight. Others are
quantized by transformers while it loads. Not here: layers over 4-bit weights (`phinetune.lora`), the graph's integers (`grid_weight.py`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from phinetune.errors import AdapterError, ConfigError, MissingPackageError, did_you_mean
from phinetune.model.grid import Grid, read_grid, record_grid, round_to_grid
from phinetune.model.grid_weight import rounded_modules
from phinetune.model.memory import MappedFiles

if TYPE_CHECKING:
    import torch

_KEYS = ("quantization_config", "load_in_4bit", "load_in_8bit")
_OPTIONS = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
_PASSED = ("bnb_4bit_quant_storage", "quant_method", "_load_in_4bit", "_load_in_8bit", "load_in_8bit")
_PASSED_8BIT = (
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
)
BLOCK = 64
"""Weights that share one scale: bitsandbytes' size for 4-bit layers."""
_SLICE = 1 << 18  # weights quantized at once on a CPU, whole blocks: its float32 copies stay in the cache


@dataclass(frozen=True)
class Quantization:
    """How a base model's linear layers are held in 4 bits; the output head stays as it is."""

    quant_type: str = "nf4"
    double_quant: bool = True


Format = Quantization | Grid
"""What a base model's linear layers are held in: bitsandbytes' 4 bits, or the integers of the exported graph (`grid_weight.py`)."""


def read_format(kwargs: dict[str, Any]) -> Format | None:
    """Take `load_on_grid`, `load_in_4bit` and `quantization_config` out of `kwargs`; None if neither is asked for.

    Raises ConfigError for what cannot be, and for both; MissingPackageError without bitsandbytes where it is needed.
    """
    grid = read_grid(kwargs.pop("load_on_grid", None), "model_kwargs.load_on_grid")
    quantization = read_quantization(kwargs)
    if grid is not None and quantization is not None:
        raise ConfigError("model_kwargs.load_on_grid: not with load_in_4bit, a base is held in one format")
    return grid or quantization


def read_quantization(kwargs: dict[str, Any]) -> Quantization | None:
    """Take `load_in_4bit` and `quantization_config` (a dictionary or a BitsAndBytesConfig) out of `kwargs`; None if 4 bits are not asked for.

    Raises ConfigError for 8 bits, other methods, and names that are not bitsandbytes'; MissingPackageError without bitsandbytes.
    """
    given = {key: kwargs.pop(key, None) for key in _KEYS}
    config = given["quantization_config"]
    if config is not None and not isinstance(config, dict):
        config = config.to_dict() if hasattr(config, "to_dict") else None
        if config is None:
            raise ConfigError(
                "model_kwargs.quantization_config: must hold the names of transformers' BitsAndBytesConfig"
            )
    options = dict(config or {})
    where = "model_kwargs.quantization_config"
    if given["load_in_8bit"] or options.get("load_in_8bit"):
        raise ConfigError("model_kwargs.load_in_8bit: not supported yet", "use load_in_4bit, or leave it out")
    method = getattr(options.get("quant_method"), "value", options.get("quant_method", "bitsandbytes"))
    if method != "bitsandbytes":
        raise ConfigError(f"{where}.quant_method: only bitsandbytes is supported (found: {method!r})")
    known = (*_OPTIONS, *_PASSED, *_PASSED_8BIT)
    if unknown := [k for k in options if k not in known]:
        raise ConfigError([f"{where}.{k}: unknown key{did_you_mean(k, _OPTIONS)}" for k in unknown])
    if not (given["load_in_4bit"] or options.get("load_in_4bit")):
        return None
    kind = options.get("bnb_4bit_quant_type", "nf4" if config is None else "fp4")  # transformers' own default is fp4
    if kind not in ("nf4", "fp4"):
        raise ConfigError(f'{where}.bnb_4bit_quant_type: must be "nf4" or "fp4" (found: {kind!r})')
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError("model_kwargs.load_in_4bit: needs bitsandbytes", "pip install 'phinetune[qlora]'")
    return Quantization(kind, bool(options.get("bnb_4bit_use_double_quant", config is None)))


def from_pretrained_options(quantization: Quantization, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of `from_pretrained` that load a model in 4 bits."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def quantize_layers(model: Any, quantization: Quantization, dtype: torch.dtype, device: torch.device) -> None:
    """Put a 4-bit layer in the place of each linear layer of `model` that transformers would quantize, computing in `dtype` on `device`.

    The same layers, bit for bit, as `from_pretrained` with `from_pretrained_options` makes. Weights that are mapped from a file must not
    be used by anything else: their pages are given back. What is not quantized stays where it is.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept, files = get_keys_to_not_convert(model), MappedFiles()
    options = {"compress_statistics": quantization.double_quant, "quant_type": quantization.quant_type}
    for name, base in list(model.named_modules()):
        if not (type(base) in (nn.Linear, Conv1D) and should_convert_module(name, kept)):
            continue
        weight = base.weight.detach().t() if isinstance(base, Conv1D) else base.weight.detach()  # (out, in)
        packed, state = quantize(weight.to(device), quantization)
        layer = Linear4bit(weight.shape[1], weight.shape[0], False, dtype, device="meta", **options)
        layer.weight = Params4bit(
            packed, False, state, BLOCK, **options, quant_storage=packed.dtype, module=layer, bnb_quantized=True
        )
        layer.quant_state = state
        layer.bias, layer.source_cls = base.bias, type(base)
        model.set_submodule(name, layer.requires_grad_(False))
        files.release(base.weight.data)


def quantize(weight: torch.Tensor, quantization: Quantization) -> tuple[torch.Tensor, Any]:
    """`weight` (out, in) in 4 bits and its `QuantState`: what `bitsandbytes.functional.quantize_4bit` returns, made in slices on a CPU."""
    import torch
    from bitsandbytes import functional

    kind, double = quantization.quant_type, quantization.double_quant
    if weight.device.type != "cpu":
        found: tuple[torch.Tensor, Any] = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type=kind
        )
        return found
    parts = [_quantize_slice(part, kind) for part in torch.split(weight.reshape(-1), _SLICE)]
    packed, absmax = torch.cat([p for p, _ in parts]), torch.cat([a for _, a in parts])
    nested: dict[str, Any] = {}
    if double:  # the scales, less their mean, in 8 bits (Dettmers et al. 2023, section 3)
        offset = absmax.mean()
        absmax, second = functional.quantize_blockwise(absmax - offset, blocksize=256)
        nested = {"offset": offset, "state2": second}
    code = functional.get_4bit_type(kind, device=weight.device)
    fixed = {"shape": weight.shape, "code": code, "blocksize": BLOCK, "quant_type": kind, "dtype": weight.dtype}
    return packed, functional.QuantState(absmax=absmax, **fixed, **nested)


def _quantize_slice(weights: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(n / 2, 1) bytes of two codes each, (n / 64) scales, of n weights.

    A NF4 code is the number of midpoints between neighbouring levels that lie below w / scale. Fifteen comparisons, vectorized, count them
    in a quarter of the time that bitsandbytes' search in the sorted midpoints takes.
    """
    import torch
    from bitsandbytes import functional

    if kind != "nf4" or weights.numel() % BLOCK:
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.bitsandbytes.quantize_4bit.default(
            weights, BLOCK, kind, torch.uint8
        )
        return found
    levels = functional.get_4bit_type(kind, device=weights.device)
    blocks = weights.float().view(-1, BLOCK)
    low, high = torch.aminmax(blocks, dim=1)
    scales = torch.maximum(-low, high)
    blocks = (blocks * (1.0 / scales.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1)
    codes, above = torch.zeros(blocks.shape, dtype=torch.uint8), torch.empty(blocks.shape, dtype=torch.bool)
    for midpoint in ((levels[:-1] + levels[1:]) / 2).tolist():
        codes += torch.gt(blocks, midpoint, out=above).view(torch.uint8)
    pairs = codes.view(-1).view(torch.int16)  # little end first: the first weight's code is the low byte
    packed = ((pairs << 4) | (pairs >> 8)).to(torch.uint8)
    return packed.unsqueeze(1), scales


@contextlib.contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Without bitsandbytes' warning that it did not fetch a kernel from the hub: nothing is fetched here, and its kernel is not used."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def keep_readable(model: Any) -> None:
    """Stop bitsandbytes from re-ordering the 4-bit weights of `model`, and rounding their scales, when it computes with them on a CPU."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantized_layers(model: Any) -> list[str]:
    """Names of the layers of `model` that are held in 4 bits."""
    return [n for n, m in model.named_modules() if getattr(getattr(m, "weight", None), "quant_state", None) is not None]


def round_trip(weight: torch.Tensor, quantization: Format, dtype: torch.dtype) -> torch.Tensor:
    """What its format leaves of `weight` (out, in), in its own dtype: quantized as at loading, for `dtype`, made dense again."""
    if isinstance(quantization, Grid):
        return round_to_grid(weight, quantization)
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.to(dtype),
        blocksize=BLOCK,
        quant_type=quantization.quant_type,
        compress_statistics=quantization.double_quant,
    )
    restored: torch.Tensor = functional.dequantize_4bit(packed, state)
    return restored.to(weight.dtype)


def record(quantization: Format, model: Any) -> dict[str, Any]:
    """What an adapter's manifest says about the format of its base; `read_record` reads it."""
    dtype = str(model.dtype)[6:]
    if isinstance(quantization, Grid):
        return {"grid": record_grid(quantization), "dtype": dtype, "layers": rounded_modules(model)}
    return {**asdict(quantization), "dtype": dtype, "layers": quantized_layers(model)}


def read_record(values: Any, where: str) -> Format | None:
    """The format that a manifest's `quantization` names; None if it has none. Raises AdapterError if it is damaged."""
    if values is None:
        return None
    if not isinstance(values, dict) or not {"dtype", "layers"} <= set(values):
        raise AdapterError(f"{where}: its quantization is damaged", "copy the adapter again")
    if "grid" in values:
        return read_grid(values["grid"], f"{where}: quantization.grid")
    if not {"quant_type", "double_quant"} <= set(values):
        raise AdapterError(f"{where}: its quantization is damaged", "copy the adapter again")
    return Quantization(values["quant_type"], values["double_quant"])


def as_model_kwargs(values: Any, where: str) -> dict[str, Any]:
    """`model_kwargs` that load the base in the format that a manifest's `quantization` names; empty if it has none."""
    found = read_record(values, where)
    if found is None:
        return {}
    if isinstance(found, Grid):
        return {"load_on_grid": record_grid(found), "torch_dtype": values["dtype"]}
    options = {"bnb_4bit_quant_type": found.quant_type, "bnb_4bit_use_double_quant": found.double_quant}
    return {"quantization_config": {"load_in_4bit": True, **options}, "torch_dtype": values["dtype"]}
