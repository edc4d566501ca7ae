"""Which way the LoRA layers of a model compute: one by one, with those that share their input, or with the whole decoder layer.

Not here: the ways (`functional.py`, `group.py`, `tiles.py`, `decoder.py`).
"""

from __future__ import annotations

from torch import nn

from phinetune.lora import tiles
from phinetune.lora.decoder_join import join_layers, part_layers
from phinetune.lora.functional import lora_linear_reference
from phinetune.lora.group import share_inputs
from phinetune.lora.layer import LoRALayer
from phinetune.model.fast import FastPaths


def choose_arithmetic(model: nn.Module, paths: FastPaths) -> None:
    """Set which way the LoRA layers in `model` compute, by the switches `linear`, `grouped`, `tiles` and `layers`."""
    by_tiles = paths.linear and paths.tiles and not paths.compiled and tiles.library() is not None
    for module in model.modules():
        module.__dict__.pop("shared", None)
        if isinstance(module, LoRALayer):
            module.__dict__.pop("arithmetic", None)
            if not paths.linear:
                module.__dict__["arithmetic"] = lora_linear_reference
            elif by_tiles:
                module.__dict__["arithmetic"] = tiles.lora_linear_tiles
    if paths.linear and paths.grouped and not paths.compiled:  # compiled layers must be alike, and hold no state
        share_inputs(model, by_tiles)
    part_layers(model)
    if by_tiles and paths.grouped and paths.layers:
        join_layers(model, paths.packed)
