"""Linear layers that are several in one: what their slices are called and how wide they are.

Phi-3 computes query, key and value in one `qkv_proj` and gate and up in one `gate_up_proj`; most configurations name them one by one.
Only layouts whose slices are whole, consecutive rows are cut here: BLOOM, Falcon and GPT-NeoX interleave theirs by head. The other way
round, the name of a fused layer stands for its parts in a model that holds them apart. Not here: layers.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import nn

from phinetune.errors import AdapterError
from phinetune.lora.config import LoraConfig

_BY_MODEL = {
    "phi3": ("qkv_proj", "gate_up_proj"),
    "phi4_multimodal": ("qkv_proj", "gate_up_proj"),
    "glm": ("gate_up_proj",),
    "glm4": ("gate_up_proj",),
    "gpt2": ("c_attn",),
}
"""`model_type` of transformers -> endings of its fused layers."""
_QKV = ("q_proj", "k_proj", "v_proj")
PARTS = {"qkv_proj": _QKV, "gate_up_proj": ("gate_proj", "up_proj"), "c_attn": _QKV, "query_key_value": _QKV}
"""Ending of a fused layer -> what its parts are called, in the order of its rows."""


def fused_slices(
    model: nn.Module, name: str, layer: nn.Module, given: dict[str, dict[str, int]]
) -> dict[str, int] | None:
    """Slice name -> width, in the order of the layer's rows; None for a layer that is one.

    `given` is `LoraConfig.fused_modules`. Raises AdapterError if its widths do not add up to the layer.
    """
    weight: Any = getattr(layer, "weight", None)
    if weight is None:
        return None
    out = int(layer.out_features if isinstance(layer, nn.Linear) else weight.shape[-1])
    return slices_of(getattr(model, "config", None), name, out, given)


def slices_of(config: Any, name: str, out: int, given: dict[str, dict[str, int]]) -> dict[str, int] | None:
    """As `fused_slices`, for a layer of `out` rows in a model with this `config` (transformers' names), where no model is at hand."""
    ending = next((e for e in given if name == e or name.endswith(f".{e}")), None)
    if ending is not None:
        if sum(given[ending].values()) != out:
            total = sum(given[ending].values())
            raise AdapterError(f"fused_modules.{ending}: the widths add up to {total}, {name} has {out} rows")
        return given[ending]
    last = name.rpartition(".")[2]
    if config is None or last not in _BY_MODEL.get(getattr(config, "model_type", ""), ()):
        return None
    parts = PARTS[last]
    widths = [out // len(parts)] * len(parts)
    if last == "qkv_proj":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        widths = [queries, keys, keys]
    return dict(zip(parts, widths, strict=True)) if sum(widths) == out else None


def named_by_parts(config: LoraConfig, layers: list[str], others: list[str]) -> tuple[LoraConfig, str]:
    """`config` with the names of fused layers replaced by those of their parts, where the model has the parts only; and a line on it, or "".

    A name is replaced in `target_modules` and `exclude_modules` (lists) and as a key of `rank_pattern` and `alpha_pattern`, if nothing
    in the model is called so and each part is one of `layers` (names that can be targeted; `others` are names that cannot).
    """
    found: dict[str, list[str]] = {}
    keys: list[str] = []

    def known(entry: str, names: list[str]) -> bool:
        return any(re.match(rf"(.*\.)?({entry})$", name) for name in names)

    def parts_of(entry: str, is_pattern: bool) -> list[str]:
        path, dot, last = entry.rpartition(".")
        parts = [f"{path}{dot}{part}" for part in PARTS.get(last, ())]
        patterns = [p if is_pattern else re.escape(p) for p in [entry, *parts]]
        if not parts or known(patterns[0], [*layers, *others]) or not all(known(p, layers) for p in patterns[1:]):
            return [entry]
        found[last] = list(PARTS[last])
        return parts

    values: dict[str, Any] = {}
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        given, replaced = getattr(config, key), dict[str, Any]()
        if isinstance(given, str) or not given:
            continue
        for entry in given:
            for part in parts_of(entry, isinstance(given, dict)):
                # of two entries for a layer the first one counts, as everywhere
                replaced.setdefault(part, given[entry] if isinstance(given, dict) else None)
        if list(replaced) != list(given):
            values[key] = replaced if isinstance(given, dict) else list(replaced)
            keys.append(key)
    if not values:
        return config, ""
    said = " and ".join(f"{fused} is {', '.join(parts)}" for fused, parts in found.items())
    return dataclasses.replace(config, **values), f"{', '.join(keys)}: {said} in this model"
