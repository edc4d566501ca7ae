"""Linear layers that are several in one: what their slices are called and how wide they are.

Phi-3 computes query, key and value in one `qkv_proj` and gate and up in one `gate_up_proj`; most configurations name them one by one.
Only layouts whose slices are whole, consecutive rows are here: BLOOM, Falcon and GPT-NeoX interleave theirs by head. Not here: layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from phinetune.errors import AdapterError

_BY_MODEL = {
    "phi3": ("qkv_proj", "gate_up_proj"),
    "phi4_multimodal": ("qkv_proj", "gate_up_proj"),
    "glm": ("gate_up_proj",),
    "glm4": ("gate_up_proj",),
    "gpt2": ("c_attn",),
}
"""`model_type` of transformers -> endings of its fused layers."""


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
    if last == "gate_up_proj":
        widths = {"gate_proj": out // 2, "up_proj": out // 2}
    elif last == "c_attn":
        widths = {"q_proj": out // 3, "k_proj": out // 3, "v_proj": out // 3}
    else:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return widths if sum(widths.values()) == out else None
