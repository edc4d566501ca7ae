"""LoRA+: another learning rate for lora_B than for lora_A (Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models").

Not here: optimizers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from phinetune.errors import ConfigError
from phinetune.lora.layer import lora_layers


def loraplus_groups(
    model: nn.Module,
    learning_rate: float,
    loraplus_lr_ratio: float,
    weight_decay: float = 0.0,
    embedding_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: everything that learns, lora_B and one-dimensional parameters at ratio times the rate.

    Factors of embeddings get `embedding_learning_rate` (default: `learning_rate`). One-dimensional parameters (biases, DoRA's lengths)
    have no weight decay. Groups without parameters are left out. Raises ConfigError if nothing learns.
    """
    if loraplus_lr_ratio <= 0:
        raise ConfigError(f"loraplus_lr_ratio: must be above 0 (found: {loraplus_lr_ratio!r})")
    embeddings = tuple(f"{name}." for name, layer in lora_layers(model).items() if isinstance(layer, nn.Embedding))
    fast = learning_rate * loraplus_lr_ratio
    slow_embedding = learning_rate if embedding_learning_rate is None else embedding_learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if embeddings and name.startswith(embeddings):
            key = (slow_embedding, weight_decay)
        elif parameter.ndim == 1:
            key = (fast, 0.0)
        else:
            key = (fast if "lora_B" in name else learning_rate, weight_decay)
        groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ConfigError("loraplus_groups: nothing in the model learns")
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
