"""How factors start: no change at all, random, along the weight's own largest directions (PiSSA, OLoRA), or what 4 bits took (LoftQ).

PiSSA and OLoRA take the starting product off the base weight. Here the base stays as it is: the layer keeps the starting factors and
takes their product off while it computes, which is the same function, exact in any dtype, right for several adapters on one base, and
saved without loss as a plain adapter of twice the rank. LoftQ's factors are an ordinary adapter of the 4-bit base. Not here: which
layers (`targets.py`), where the original weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.errors import AdapterError
from phinetune.lora.frozen import dense, is_quantized
from phinetune.lora.layer import output_lengths

Original = Callable[[str], Tensor]
"""Name of a layer of a 4-bit model -> its weight before the rounding, (out, in), in any floating point dtype."""


def start(layer: Any, how: bool | str, use_dora: bool = False, original: Tensor | None = None) -> None:
    """Set the factors of a fresh LoRA layer, which are as `reset_factors` leaves them: `how` is LoraConfig's `init_lora_weights`.

    With DoRA, the lengths are those of the weights that the layer starts with. `original`, the weight before 4 bits (out, in), is for
    "loftq", which leaves a layer that is not in 4 bits without a change. Raises AdapterError if it is not of the layer's shape.
    """
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
    elif how == "loftq" and original is not None and is_quantized(layer.frozen()):
        start_at_original(layer, original)
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


@torch.no_grad()
def start_at_original(layer: Any, original: Tensor) -> None:
    """Set lora_A and lora_B so that Q + scaling · B A, with Q the layer's 4-bit weight, is as near to `original` as its rank allows.

    LoftQ with one iteration (Li et al. 2023, algorithm 1, T = 1): the r largest singular directions of W - Q, here divided by the
    scaling, which the paper does not have. Slices of a fused layer get their own r directions each.
    """
    weight = dense(layer.frozen(), torch.float32)
    if original.shape != weight.shape:
        raise AdapterError(f"the original weight has shape {tuple(original.shape)}, the layer {tuple(weight.shape)}")
    lost = original.to(weight) - weight
    spans, r = getattr(layer, "spans", ((0, len(lost)),)), layer.r
    parts = [torch.linalg.svd(lost[slice(*rows)], full_matrices=False) for rows in spans]
    roots = [torch.sqrt(S[:r] / layer.scaling) for _, S, _ in parts]
    layer.lora_A.copy_(torch.cat([root.unsqueeze(1) * Vh[:r] for (_, _, Vh), root in zip(parts, roots, strict=True)]))
    layer.lora_B.copy_(torch.cat([U[:, :r] * root for (U, _, _), root in zip(parts, roots, strict=True)]))
