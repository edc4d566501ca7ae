"""An adapter as PEFT's tensors and back: names, shapes, ranks. Lossless for every layer that PEFT has a form for.

    <name>.lora_A.weight (r, in)            <name>.lora_B.weight (out, r)              linear and, with kernels, convolutions
    <name>.lora_embedding_A (r, tokens)     <name>.lora_embedding_B (dim, r)           embeddings
    <name>.lora_magnitude_vector (out)      <name>.base_layer.bias (out)               DoRA, trained biases
    <module>.<parameter>                                                               modules_to_save

each under `base_model.model.`. A layer adapted by slices becomes a plain one: A stacked, B block-diagonal, rank and alpha times the
number of slices, so alpha / r stays; or, `split`, one entry for each slice, for runtimes that have the projections apart. A layer that
started along its weight (PiSSA, OLoRA) becomes a plain one of twice the rank. Not here: files.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from phinetune.errors import AdapterError
from phinetune.lora.config import as_pattern
from phinetune.lora.conv import ConvLoRA
from phinetune.lora.injection import Adapter
from phinetune.lora.linear import MergedLinear
from phinetune.lora.targets import Target, shape_of

PREFIX = "base_model.model."
"""Where PEFT wraps the model."""
_OURS = ("fused_modules", "loraplus_lr_ratio", "loftq_config")
"""Fields of LoraConfig that a file for PEFT does not have: it has no such field, or the adapter is past it."""
Shapes = dict[str, tuple[int, ...]]


def adapter_state(adapter: Adapter, split: bool = False) -> dict[str, Tensor]:
    """PEFT's name -> tensor, detached, for everything that `adapter` trains."""
    state: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        for entry, A, B in entries(name, layer, split):
            state |= _named(entry, A, B, isinstance(layer, nn.Embedding))
        if layer.lora_magnitude_vector is not None:
            lengths = layer.lora_magnitude_vector
            wide = (1, -1, *(1,) * (layer.conv.weight.dim() - 2)) if isinstance(layer, ConvLoRA) else (-1,)
            state |= _by_slices(name, layer, lengths.view(wide), "lora_magnitude_vector", split)
        bias = getattr(getattr(layer, "conv", layer), "bias", None)
        if bias is not None and adapter.config.bias != "none":
            state |= _by_slices(name, layer, bias, "base_layer.bias", split)
    for name, module in adapter.modules.items():
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    state |= adapter.biases
    return {f"{PREFIX}{name}": tensor.detach() for name, tensor in state.items()}


def entries(name: str, layer: Any, split: bool = False) -> list[tuple[str, Tensor, Tensor]]:
    """(PEFT's layer name, A, B) of one LoRA layer: one entry, or with `split` one for each slice."""
    parts = getattr(layer, "slice_names", None)
    if not split or parts is None:
        return [(name, *layer.factors())]
    parent = name.rpartition(".")[0]
    names = [f"{parent}.{part}" if parent else part for part in parts]
    if isinstance(layer, MergedLinear):
        enabled = [n for n, on in zip(names, layer.enable_lora, strict=True) if on]
        return list(zip(enabled, torch.split(layer.lora_A, layer.r), layer.slice_B(), strict=True))
    A, B = layer.factors()
    return [(n, A, rows) for n, rows in zip(names, torch.split(B, list(layer.slice_widths)), strict=True)]


def _by_slices(name: str, layer: Any, rows: Tensor, key: str, split: bool) -> dict[str, Tensor]:
    """`rows` (out, ...) of a layer under `key`; with `split` cut into its slices."""
    if not split or getattr(layer, "slice_names", None) is None or isinstance(layer, MergedLinear):
        return {f"{name}.{key}": rows}
    parent = name.rpartition(".")[0]
    names = [f"{parent}.{part}" if parent else part for part in layer.slice_names]
    return {f"{n}.{key}": part for n, part in zip(names, torch.split(rows, list(layer.slice_widths)), strict=True)}


def _named(name: str, A: Tensor, B: Tensor, is_embedding: bool) -> dict[str, Tensor]:
    if is_embedding:
        return {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
    return {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}


def peft_config(adapter: Adapter, base_model: str, split: bool = False) -> dict[str, Any]:
    """`adapter_config.json` as PEFT reads it. Layers are named in full, so that the file means the same on every version of PEFT."""
    root = adapter.config.use_rslora
    saved = {
        entry: (A.shape[0], layer.scaling * (math.sqrt(A.shape[0]) if root else A.shape[0]))
        for name, layer in adapter.layers.items()
        for entry, A, _ in entries(name, layer, split)
    }
    values = {k: v for k, v in asdict(adapter.config).items() if k not in _OURS}
    taken = [n for n in saved if any(n.endswith(f".{other}") for other in adapter.lookalikes)]
    if taken:
        raise AdapterError(
            f"{taken[0]}: its name ends in that of a layer without factors, which PEFT's format cannot tell apart"
        )
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **values,
        **rank_values(saved),
        "target_modules": list(saved),
        "exclude_modules": adapter.lookalikes or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(adapter.modules) or None,
        "fan_in_fan_out": any(getattr(layer, "fan_in_fan_out", False) for layer in adapter.layers.values()),
        "init_lora_weights": True,
        "lora_bias": False,
    }


def rank_values(sizes: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """`r`, `lora_alpha` and their patterns for layers of these (rank, alpha), keyed by their full names."""
    r = Counter(r for r, _ in sizes.values()).most_common(1)[0][0]
    alpha = Counter(alpha for rank, alpha in sizes.values() if rank == r).most_common(1)[0][0]
    exact = {n: ("^" if any(o.endswith(f".{n}") for o in sizes) else "") + as_pattern(n) for n in sizes}
    return {
        "r": r,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {exact[name]: rank for name, (rank, _) in sizes.items() if rank != r},
        "alpha_pattern": {exact[name]: _plain(a) for name, (_, a) in sizes.items() if a != alpha},
    }


def _plain(number: float) -> float:
    """8 rather than 8.0, and no noise from the multiplication by a rank."""
    rounded = round(number, 9)
    return int(rounded) if float(rounded).is_integer() else rounded


def expected_shapes(model: nn.Module, adapter: Adapter, targets: list[Target]) -> Shapes:
    """PEFT's name -> shape of every tensor that a file must hold for an adapter built for `targets`."""
    shapes: Shapes = {}
    for target in targets:
        layer, name, r = adapter.base[target.name], target.name, target.r
        if target.slices:
            features = shape_of(layer)[1]
            for part in target.enabled:
                shapes |= _named_shapes(target.slice_name(part), (r, features), (target.slices[part], r), False)
        elif target.kind == "linear":
            out, features = shape_of(layer)
            shapes |= _named_shapes(name, (r, features), (out, r), False)
        elif target.kind == "embedding":
            shapes |= _named_shapes(name, (r, layer.num_embeddings), (layer.embedding_dim, r), True)
        else:
            weight = layer.weight
            ones = (1,) * (weight.dim() - 2)
            shapes |= _named_shapes(name, (r, *weight.shape[1:]), (weight.shape[0], r, *ones), False)
        if adapter.config.use_dora:
            own = adapter.layers[name].lora_magnitude_vector.shape[0]
            wide = (1, own, *(1,) * (layer.weight.dim() - 2)) if target.kind == "conv" else (own,)
            shapes[f"{name}.lora_magnitude_vector"] = wide
        if adapter.config.bias != "none" and getattr(layer, "bias", None) is not None:
            shapes[f"{name}.base_layer.bias"] = tuple(layer.bias.shape)
    for name, module in adapter.modules.items():
        shapes |= {f"{name}.{key}": tuple(value.shape) for key, value in module.state_dict().items()}
    shapes |= {name: tuple(bias.shape) for name, bias in adapter.biases.items()}
    return {f"{PREFIX}{name}": shape for name, shape in shapes.items()}


def _named_shapes(name: str, A: tuple[int, ...], B: tuple[int, ...], is_embedding: bool) -> Shapes:
    keys = _named(name, torch.empty(0), torch.empty(0), is_embedding)
    return dict(zip(keys, (A, B), strict=True))


def tensor_problem(tensor: Tensor) -> str | None:
    """What keeps a tensor from being part of an adapter; None if nothing does."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return f"is a {tensor.dtype} tensor on {tensor.device} ({tensor.layout}), not the values of a layer"
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    return None if torch.isfinite(wide).all() else "holds values that are not finite"


def misfits(expected: Shapes, state: dict[str, Tensor]) -> list[str]:
    """One line for every tensor that is missing, unexpected, misshaped, or not finite."""
    problems = [f"{name}: is missing in the file" for name in expected if name not in state]
    for name, tensor in state.items():
        if name not in expected:
            problems.append(f"{name}: the base model, as the adapter's configuration reads it, has no place for it")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name}: has shape {tuple(tensor.shape)}, the base model needs {expected[name]}")
        elif text := tensor_problem(tensor):
            problems.append(f"{name}: {text}")
        elif "lora_" in name and not tensor.is_floating_point():
            problems.append(f"{name}: holds {tensor.dtype}, not floating point values")
    return problems


@torch.no_grad()
def fill(adapter: Adapter, state: dict[str, Tensor]) -> None:
    """Copy PEFT's tensors, checked before, into the adapter's parts. Raises AdapterError for slices that are not block-diagonal."""
    for name, layer in adapter.layers.items():
        _fill_factors(f"{PREFIX}{name}", layer, state)
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.copy_(state[f"{PREFIX}{name}.lora_magnitude_vector"].flatten())
        trained_bias = state.get(f"{PREFIX}{name}.base_layer.bias")
        if trained_bias is not None:
            getattr(layer, "conv", layer).bias.copy_(trained_bias)
    for name, module in adapter.modules.items():
        module.load_state_dict({key: state[f"{PREFIX}{name}.{key}"] for key in module.state_dict()})
    for name, bias in adapter.biases.items():
        bias.copy_(state[f"{PREFIX}{name}"])


def _fill_factors(name: str, layer: Any, state: dict[str, Tensor]) -> None:
    is_embedding = isinstance(layer, nn.Embedding)
    if is_embedding:
        layer.lora_A.copy_(state[f"{name}.lora_embedding_A"])
        layer.lora_B.copy_(state[f"{name}.lora_embedding_B"])
        return
    if isinstance(layer, MergedLinear):
        _fill_slices(name, layer, state)
        return
    A, B = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
    if isinstance(layer, ConvLoRA) and layer.cut == "kernel":
        _fill_kernel(name, layer, A, B)
        return
    r = layer.r
    if getattr(layer, "lora_A_start", None) is not None and A.shape[0] == 2 * r:
        layer.lora_A_start.copy_(A[r:])
        layer.lora_B_start.copy_(-B[:, r:])
    layer.lora_A.copy_(A[:r])
    layer.lora_B.copy_(B[:, :r])


def _fill_slices(name: str, layer: Any, state: dict[str, Tensor]) -> None:
    if f"{name}.lora_A.weight" in state:  # the plain form, stacked
        A, B = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        cut = [B[start:stop, i * layer.r : (i + 1) * layer.r] for i, (start, stop) in enumerate(layer.spans)]
        if sum(int(torch.count_nonzero(part)) for part in cut) != int(torch.count_nonzero(B)):
            raise AdapterError(f"{name}.lora_B.weight: changes rows outside of the slices that are adapted")
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(torch.cat(cut))
        return
    parent = name.rpartition(".")[0]
    parts = [f"{parent}.{p}" for p, on in zip(layer.slice_names, layer.enable_lora, strict=True) if on]
    layer.lora_A.copy_(torch.cat([state[f"{p}.lora_A.weight"] for p in parts]))
    layer.lora_B.copy_(torch.cat([state[f"{p}.lora_B.weight"] for p in parts]))


def _fill_kernel(name: str, layer: ConvLoRA, A: Tensor, B: Tensor) -> None:
    """Undo `ConvLoRA.factors`: the blocks along A's diagonal must be equal."""
    others = A.shape[0] // layer.lora_A.shape[0]
    square = A.reshape(others, layer.lora_A.shape[0], others, -1)
    blocks = torch.stack([square[i, :, i] for i in range(others)])
    if not torch.equal(blocks, blocks[:1].expand_as(blocks)) or int(torch.count_nonzero(A)) != int(
        torch.count_nonzero(blocks)
    ):
        raise AdapterError(f"{name}.lora_A.weight: is not the factor of a layer cut as loralib does")
    layer.lora_A.copy_(blocks[0].reshape(layer.lora_A.shape))
    layer.lora_B.copy_(B.reshape(layer.lora_B.shape))
