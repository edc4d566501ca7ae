"""How factors start: no change at all, random, or along the weight's own largest directions (PiSSA, OLoRA).

PiSSA and OLoRA take the starting product off the base weight. Here the base stays as it is: the layer keeps the starting factors and
takes their product off while it computes, which is the same function, exact in any dtype, right for several adapters on one base, and
saved without loss as a plain adapter of twice the rank. Not here: which layers (`targets.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.lora.layer import output_lengths


def start(layer: Any, how: bool | str, use_dora: bool = False) -> None:
    """Set the factors of a fresh LoRA layer, which are as `reset_factors` leaves them: `how` is LoraConfig's `init_lora_weights`. With DoRA, the lengths are the weight's own."""
    is_embedding = isinstance(layer, nn.Embedding)
    if how is False:
        _random(layer)
    elif how == "gaussian" and not is_embedding:
        nn.init.normal_(layer.lora_A, std=1 / layer.r)
        nn.init.zeros_(layer.lora_B)
    elif isinstance(how, str) and how.startswith(("pissa", "olora")):
        start_along_weight(layer, how)
        layer.lora_A.data.copy_(layer.lora_A_start)
        layer.lora_B.data.copy_(layer.lora_B_start)
    if use_dora:
        layer.lora_magnitude_vector = nn.Parameter(output_lengths(layer).float())


def _random(layer: Any) -> None:
    """Both factors random, so that the layer differs from its base at once: for tests and experiments."""
    is_embedding = isinstance(layer, nn.Embedding)
    for factor in (layer.lora_A, layer.lora_B):
        if is_embedding:
            nn.init.normal_(factor)
        else:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


@torch.no_grad()
def start_along_weight(layer: Any, how: str) -> None:
    """Set `lora_A_start` (r, in) and `lora_B_start` (out, r), float32.

    PiSSA (Meng et al. 2024, section 3, equations 2 and 3): the r largest singular directions, divided evenly; "pissa_niter_N" finds them
    by N rounds of subspace iteration. OLoRA (Büyükakyüz 2024, section 3): the first r of W = Q R.
    """
    weight, r = layer.matrix().float(), layer.r
    A: Tensor
    B: Tensor
    if how == "olora":
        Q, R = torch.linalg.qr(weight)
        A, B = R[:r], Q[:, :r]
    else:
        if how == "pissa":
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(weight, r, niter=int(how.rpartition("_")[2]))
            Vh = V.t()
        root = torch.sqrt(S[:r] / layer.scaling)
        A, B = root.unsqueeze(1) * Vh[:r], U[:, :r] * root
    layer.lora_A_start, layer.lora_B_start = A.contiguous(), B.contiguous()
