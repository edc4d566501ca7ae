"""What an adapter's files say about each weight of a model, without the model: factors, lengths, trained tensors.

A `Change` knows the module, not how the base stores its weight; whoever has the stored tensor asks for it to be applied. Slices of a
fused layer that the adapter names one by one are joined into one change of the fused weight. Not here: files of the base model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from phinetune.errors import AdapterError
from phinetune.lora.adapter import SavedAdapter
from phinetune.lora.fold import Folder
from phinetune.lora.fused import slices_of
from phinetune.lora.peft_format import PREFIX, tensor_problem

_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def is_stored_transposed(module: str, model_type: str, fan_in_fan_out: bool = False) -> bool:
    """True for the linear layers that GPT-2 and its kin store (in, out). An adapter's `fan_in_fan_out` counts where no type is known."""
    named = module.rpartition(".")[2] in _CONV1D_NAMES
    return named and (model_type in _CONV1D or (not model_type and fan_in_fan_out))


@dataclass(frozen=True)
class Change:
    """What happens to one weight: factors, or a whole trained tensor in its place."""

    module: str
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0
    magnitude: Tensor | None = None
    is_embedding: bool = False
    replacement: Tensor | None = None
    transposed: bool = False
    """The weight is stored (in, out): an embedding, or GPT-2's Conv1D."""

    def shape(self) -> tuple[int, ...]:
        """The shape of the stored weight that the change is for, kernels flattened."""
        if self.replacement is not None:
            return tuple(self.replacement.shape)
        A, B = self.factors()
        return (A.shape[1], B.shape[0]) if self.transposed else (B.shape[0], A.shape[1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B): (r, in) and (out, r)."""
        if self.A is None or self.B is None:
            raise AdapterError(f"{self.module}: has no factors")
        return self.A, self.B

    def folder(self, shape: tuple[int, ...], dtype: torch.dtype) -> Folder:
        """What folds the factors into a stored weight of this shape and dtype, block by block."""
        rows = shape[0]
        return Folder(
            (rows, math.prod(shape[1:])), dtype, *self.factors(), self.scaling, self.magnitude, self.transposed
        )


@dataclass
class Changes:
    """What an adapter's files say, by module or by tensor."""

    weights: dict[str, Change] = field(default_factory=dict)
    """module -> what happens to its weight."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """tensor's name -> what takes its place: biases, trained modules."""
    copies: dict[str, Tensor] = field(default_factory=dict)
    """module -> the base's own weight, as PEFT saves it beside the factors of embeddings and heads."""


def read_changes(saved: SavedAdapter, model_type: str = "") -> Changes:
    """An adapter as read, checked against its own configuration.

    Raises AdapterError for factors that do not belong together or contradict the configuration, for values that are not finite, and
    for an adapter that changes nothing.
    """
    config, groups, found = saved.config, dict[str, dict[str, Tensor]](), Changes()
    if str(config.init_lora_weights).startswith(("pissa", "olora")):
        raise AdapterError(
            f"the adapter was saved beside a base model changed by {config.init_lora_weights}",
            "load it with load_adapter and save it again, which makes it a plain one",
        )
    problems = [f"{name}: {text}" for name, tensor in saved.state.items() if (text := tensor_problem(tensor))]
    for full, tensor in saved.state.items():
        name = full.removeprefix(PREFIX)
        key = next((k for k in _FACTORS if name.endswith(f".{k}")), None)
        if key is not None:
            groups.setdefault(name.removesuffix(f".{key}"), {})[key.removesuffix(".weight")] = tensor
        else:
            found.tensors[name] = tensor
    for module, parts in groups.items():
        change = _change(module, parts, saved, model_type)
        if isinstance(change, Change):
            found.weights[module] = change
        else:
            problems.append(f"{PREFIX}{module}: {change}")
    if not problems and not found.weights and not found.tensors:
        problems.append("the adapter's file holds no tensors")
    if problems:
        raise AdapterError(problems, "the adapter is damaged")
    _sort_out(found)
    return found


def _change(module: str, parts: dict[str, Tensor], saved: SavedAdapter, model_type: str) -> Change | str:
    """The change of one module, or what is wrong with it."""
    config, is_embedding = saved.config, "lora_embedding_A" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    A, B = (parts.get(name) for name in names)
    if A is None or B is None:
        return "one of its two factors is missing"
    r = config.rank_of(module)
    if A.dim() < 2 or B.dim() < 2 or A.shape[0] != r or B.shape[1] != r:
        return f"its factors have shapes {tuple(A.shape)} and {tuple(B.shape)}, its rank is {r}"
    lengths = parts.get("lora_magnitude_vector")
    if (lengths is None) == config.use_dora:
        return "its DoRA lengths are missing" if config.use_dora else "has DoRA lengths, its configuration has no DoRA"
    if lengths is not None and lengths.numel() != B.shape[0]:
        return f"has {lengths.numel()} DoRA lengths for {B.shape[0]} outputs"
    magnitude = None if lengths is None else lengths.flatten()
    transposed = is_embedding or is_stored_transposed(module, model_type, config.fan_in_fan_out)
    return Change(
        module, A.flatten(1), B.flatten(1), config.scaling_of(module), magnitude, is_embedding, None, transposed
    )


def _sort_out(found: Changes) -> None:
    """Tell trained tensors from the copies of the base that PEFT writes beside them."""
    tensors, found.tensors = found.tensors, {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if ".original_module." in name:
            continue
        if name.endswith(".base_layer.weight") and module.removesuffix(".base_layer") in found.weights:
            found.copies[module.removesuffix(".base_layer")] = tensor
        elif ".modules_to_save." in name and torch.equal(
            tensors.get(name.replace(".modules_to_save.", "."), tensor), tensor
        ):
            found.tensors[name.replace(".modules_to_save.", ".")] = tensor
        else:
            found.tensors[f"{module.removesuffix('.base_layer')}.{last}"] = tensor


def join_slices(
    found: Changes,
    stored: dict[str, tuple[int, ...]],
    config: dict[str, Any],
    given: dict[str, dict[str, int]],
) -> None:
    """Put changes of slices (q_proj of a stored qkv_proj) together into changes of the fused layers, in place.

    stored: tensor name -> shape, of the base's files; config: the base's config.json; given: `LoraConfig.fused_modules`.
    """
    model_type = str(config.get("model_type") or "")
    for tensor, shape in stored.items():
        if len(shape) != 2 or not tensor.endswith(".weight"):
            continue
        module = tensor.removesuffix(".weight")
        transposed = is_stored_transposed(module, model_type)
        slices = slices_of(SimpleNamespace(**config), module, shape[1] if transposed else shape[0], given) or {}
        parent = module.rpartition(".")[0]
        names = {part: f"{parent}.{part}" if parent else part for part in slices}
        parts = {p: n for p, n in names.items() if n in found.weights and f"{n}.weight" not in stored}
        if parts:
            if module in found.weights:
                raise AdapterError(f"{PREFIX}{module}: the adapter changes it whole and by slices")
            changes = {p: found.weights.pop(n) for p, n in parts.items()}
            found.weights[module] = _joined(module, slices, changes, transposed)
        biases = [f"{n}.bias" for n in names.values()]
        if biases and all(b in found.tensors and b not in stored for b in biases):
            found.tensors[f"{module}.bias"] = torch.cat([found.tensors.pop(b) for b in biases])


def _joined(module: str, slices: dict[str, int], found: dict[str, Change], transposed: bool) -> Change:
    """One change of a fused weight from those of its slices: A stacked, B block-diagonal, each B scaled by its own scaling."""
    if wrong := [
        f"{PREFIX}{c.module}: is not for {slices[p]} outputs"
        for p, c in found.items()
        if len(c.factors()[1]) != slices[p]
    ]:
        raise AdapterError(wrong, f"they are slices of {module}")
    lengths = [c.magnitude for c in found.values()]
    if any(part is not None for part in lengths) and (
        len(found) < len(slices) or any(part is None for part in lengths)
    ):
        raise AdapterError(f"{PREFIX}{module}: DoRA lengths of some of its slices only")
    ordered = [(part, found[part]) for part in slices if part in found]
    factors = [change.factors() for _, change in ordered]
    scaling = ordered[0][1].scaling
    B = factors[0][1].new_zeros(sum(slices.values()), sum(len(A) for A, _ in factors))
    column = 0
    for (part, change), (A, rows) in zip(ordered, factors, strict=True):
        row = sum(list(slices.values())[: list(slices).index(part)])
        B[row : row + len(rows), column : column + len(A)] = rows * (change.scaling / scaling)
        column += len(A)
    whole = [change.magnitude for _, change in ordered if change.magnitude is not None]
    magnitude = torch.cat(whole) if whole else None
    return Change(module, torch.cat([A for A, _ in factors]), B, scaling, magnitude, transposed=transposed)
