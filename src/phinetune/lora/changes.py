"""What an adapter's files say about each weight of a model, without the model: factors, lengths, trained tensors.

A `Change` knows the module, not how the base stores its weight; whoever has the stored tensor asks for it to be applied. Slices of a
fused layer that the adapter names one by one are joined into one change of the fused weight. Not here: files of the base model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from phinetune.errors import AdapterError
from phinetune.lora.adapter import SavedAdapter
from phinetune.lora.fold import Folder
from phinetune.lora.fused import slices_of
from phinetune.lora.peft_format import PREFIX

_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""`model_type`s whose linear layers of these names are stored (in, out)."""
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")


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


def read_changes(saved: SavedAdapter, model_type: str = "") -> tuple[dict[str, Change], dict[str, Tensor]]:
    """(module -> what happens to its weight, tensor name -> trained bias or other small tensor) of an adapter as read."""
    config, groups, others = saved.config, dict[str, dict[str, Tensor]](), dict[str, Tensor]()
    if str(config.init_lora_weights).startswith(("pissa", "olora")):
        raise AdapterError(
            f"the adapter was saved beside a base model changed by {config.init_lora_weights}",
            "load it with load_adapter and save it again, which makes it a plain one",
        )
    for full, tensor in saved.state.items():
        name = full.removeprefix(PREFIX)
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{full}: holds values that are not finite")
        for key in ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
            if name.endswith(f".{key}"):
                groups.setdefault(name.removesuffix(f".{key}"), {})[key.removesuffix(".weight")] = tensor
                break
        else:
            others[name.replace(".base_layer.", ".")] = tensor
    changes = {}
    for module, parts in groups.items():
        is_embedding = "lora_embedding_A" in parts
        A, B = (
            parts.get(k) for k in (("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B"))
        )
        if A is None or B is None:
            raise AdapterError(f"{PREFIX}{module}: one of its two factors is missing")
        r = A.shape[0]
        scaling = config.alpha_of(module) / (math.sqrt(r) if config.use_rslora else r)
        lengths = parts.get("lora_magnitude_vector")
        magnitude = None if lengths is None else lengths.flatten()
        conv1d = model_type in _CONV1D and module.rpartition(".")[2] in _CONV1D_NAMES
        A, B = A.flatten(1), B.flatten(1)
        changes[module] = Change(module, A, B, scaling, magnitude, is_embedding, transposed=is_embedding or conv1d)
    copies = {
        f"{m}.weight" for m, c in changes.items() if c.is_embedding
    }  # PEFT saves the embedding beside its factors
    return changes, {name: tensor for name, tensor in others.items() if name not in copies}


def join_slices(
    changes: dict[str, Change],
    stored: dict[str, tuple[int, ...]],
    config: dict[str, Any],
    given: dict[str, dict[str, int]],
) -> dict[str, Change]:
    """`changes` with those of slices (q_proj of a stored qkv_proj) put together into changes of the fused layers.

    stored: tensor name -> shape, of the base's files; config: the base's config.json; given: `LoraConfig.fused_modules`.
    """
    joined = dict(changes)
    for tensor, shape in stored.items():
        module = tensor.removesuffix(".weight")
        slices = slices_of(SimpleNamespace(**config), module, shape[0], given) if len(shape) == 2 else None
        parent = module.rpartition(".")[0]
        names = {part: f"{parent}.{part}" if parent else part for part in slices or {}}
        found = {
            part: joined.pop(name) for part, name in names.items() if name in joined and f"{name}.weight" not in stored
        }
        if found and slices:
            if module in joined:
                raise AdapterError(f"{PREFIX}{module}: the adapter changes it whole and by slices")
            joined[module] = _joined(module, slices, found)
    return joined


def _joined(module: str, slices: dict[str, int], found: dict[str, Change]) -> Change:
    """One change of a fused weight from those of its slices: A stacked, B block-diagonal, each B scaled by its own scaling."""
    parts = [(part, *change.factors(), change) for part, change in found.items()]
    ranks = [A.shape[0] for _, A, _, _ in parts]
    B = parts[0][2].new_zeros(sum(slices.values()), sum(ranks))
    scaling = parts[0][3].scaling
    starts = {part: sum(list(slices.values())[:i]) for i, part in enumerate(slices)}
    column = 0
    for (part, _, rows, change), r in zip(parts, ranks, strict=True):
        if rows.shape[0] != slices[part]:
            raise AdapterError(
                f"{PREFIX}{change.module}: has {rows.shape[0]} outputs, the slice of {module} {slices[part]}"
            )
        B[starts[part] : starts[part] + slices[part], column : column + r] = rows * (change.scaling / scaling)
        column += r
    return Change(module, torch.cat([A for _, A, _, _ in parts]), B, scaling)
