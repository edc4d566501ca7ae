"""LoRA as a library: loralib's layers, PEFT's adapter files, fused projections by slices, several adapters, streaming merge.

    import phinetune.lora as lora

    layer = lora.Linear(768, 768, r=16)                              # layers by hand, loralib's interface
    lora.mark_only_lora_as_trainable(model)

    adapter = lora.inject(model, lora.LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))     # or into any model
    lora.save_adapter(adapter, "adapter")                            # PEFT's files
    lora.merge(model)

Depends on torch and safetensors only; knows nothing of data, training or terminals. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phinetune.lora.adapter import SavedAdapter, load_adapter, read_adapter, save_adapter
    from phinetune.lora.adapters import Adapters
    from phinetune.lora.config import LoraConfig, parse_lora_config
    from phinetune.lora.conv import Conv1d, Conv2d, Conv3d, ConvLoRA
    from phinetune.lora.embedding import Embedding
    from phinetune.lora.functional import lora_linear
    from phinetune.lora.injection import Adapter, adapter_of, inject
    from phinetune.lora.layer import LoRALayer, lora_layers
    from phinetune.lora.linear import Linear, MergedLinear
    from phinetune.lora.loralib import (
        load_lora_state_dict,
        lora_state_dict,
        mark_only_lora_as_trainable,
        read_lora_state_dict,
    )
    from phinetune.lora.loraplus import loraplus_groups
    from phinetune.lora.merging import merge
    from phinetune.lora.stream import merge_files
    from phinetune.lora.targets import find_targets
    from phinetune.lora.truncation import Truncation, truncate_adapter

_HOME = {
    "Adapter": "injection",
    "Adapters": "adapters",
    "Conv1d": "conv",
    "Conv2d": "conv",
    "Conv3d": "conv",
    "ConvLoRA": "conv",
    "Embedding": "embedding",
    "Linear": "linear",
    "LoRALayer": "layer",
    "LoraConfig": "config",
    "MergedLinear": "linear",
    "SavedAdapter": "adapter",
    "Truncation": "truncation",
    "adapter_of": "injection",
    "find_targets": "targets",
    "inject": "injection",
    "load_adapter": "adapter",
    "load_lora_state_dict": "loralib",
    "lora_layers": "layer",
    "lora_linear": "functional",
    "lora_state_dict": "loralib",
    "loraplus_groups": "loraplus",
    "mark_only_lora_as_trainable": "loralib",
    "merge": "merging",
    "merge_files": "stream",
    "parse_lora_config": "config",
    "read_adapter": "adapter",
    "read_lora_state_dict": "loralib",
    "save_adapter": "adapter",
    "truncate_adapter": "truncation",
}

__all__ = [
    "Adapter",
    "Adapters",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "LoraConfig",
    "MergedLinear",
    "SavedAdapter",
    "Truncation",
    "adapter_of",
    "find_targets",
    "inject",
    "load_adapter",
    "load_lora_state_dict",
    "lora_layers",
    "lora_linear",
    "lora_state_dict",
    "loraplus_groups",
    "mark_only_lora_as_trainable",
    "merge",
    "merge_files",
    "parse_lora_config",
    "read_adapter",
    "read_lora_state_dict",
    "save_adapter",
    "truncate_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"phinetune.lora.{_HOME[name]}"), name)
    raise AttributeError(f"module 'phinetune.lora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(n for n in globals() if n.startswith("__"))])
