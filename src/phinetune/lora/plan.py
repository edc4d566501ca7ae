"""Which stored tensor each change of an adapter is for, before anything is written: names, shapes, embeddings that share a tensor.

Everything that can be wrong between an adapter and a base model's files is found here, by their headers alone. Not here: writing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from phinetune.errors import AdapterError
from phinetune.lora.adapter import SavedAdapter, read_adapter
from phinetune.lora.changes import Change, Changes, join_slices, read_changes
from phinetune.lora.peft_format import PREFIX
from phinetune.lora.shards import DTYPES, WHOLE_NUMBERS, Layout
from phinetune.lora.targets import is_targeted

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass
class MergePlan:
    """Tensor name -> its change; and tensors that the base did not have: name -> (tensor that it began as, its change or None)."""

    changes: dict[str, Change] = field(default_factory=dict)
    added: dict[str, tuple[str, Change | None]] = field(default_factory=dict)


def plan_merge(
    layout: Layout, base: Path, adapter: Path, tied: dict[str, str] | None, base_key: str | None = None
) -> MergePlan:
    """Find the stored tensor of every change. Raises AdapterError for all that have none, do not fit, or are missing."""
    saved = read_adapter(adapter)
    if base_key is not None and saved.base_key is not None and base_key != saved.base_key:
        raise AdapterError(f"{adapter}: was trained on another base model (their contents differ)")
    read = read_json(base / "config.json")
    config: dict[str, Any] = read if isinstance(read, dict) else {}
    found = read_changes(saved, str(config.get("model_type") or ""))
    join_slices(found, layout.shapes(), config, saved.config.fused_modules)
    plan, homeless = _place(layout, found)
    says_tied = _says_tied(config, layout)
    tied = _tied(layout, says_tied, homeless, plan) if tied is None else tied
    for head, source in tied.items():
        origin = stored_name(source, layout)
        if origin is None or head in layout.file_of:
            continue
        own = homeless.pop(head) if head in homeless else None
        if own is not None or origin in plan.changes:
            plan.added[head] = (origin, own)
    problems = [f"{PREFIX}{name}: the base model's files have no such tensor" for name in homeless]
    problems += _misfits(layout, plan) + _without_factors(layout, plan, saved)
    if problems:
        raise AdapterError(problems, "the adapter belongs to another base model, or is damaged")
    _check_copies(layout, plan, found)
    return plan


def read_json(file: Path) -> Any:
    """What a JSON file holds; None for one that is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _place(layout: Layout, found: Changes) -> tuple[MergePlan, dict[str, Change]]:
    """(what has a stored tensor, what has none)."""
    wanted = [(f"{module}.weight", change) for module, change in found.weights.items()]
    wanted += [(name, Change(name, replacement=tensor)) for name, tensor in found.tensors.items()]
    plan, homeless, owners = MergePlan(), dict[str, Change](), dict[str, str]()
    for name, change in wanted:
        stored = stored_name(name, layout)
        if stored is None:
            homeless[name] = change
        elif stored in owners:
            raise AdapterError(f"{PREFIX}{name}: changes {stored}, and so does {owners[stored]}")
        else:
            plan.changes[stored], owners[stored] = change, name
    return plan, homeless


def stored_name(name: str, layout: Layout) -> str | None:
    """What the files call the tensor `name`: itself, or with the model's outer name more or less (`transformer.`, `model.`)."""
    if name in layout.file_of:
        return name
    if name.count(".") < 2:  # `lm_head.weight` is no ending of anything
        outer = (
            [n for n in layout.file_of if n.count(".") == 2 and n.endswith(f".{name}")] if "lm_head" not in name else []
        )
        inner = [n for n in layout.file_of if n.count(".") == 1 and name == n]
        return (outer + inner)[0] if len(outer + inner) == 1 else None
    found = [n for n in layout.file_of if n.endswith(f".{name}") or (n.count(".") > 0 and name.endswith(f".{n}"))]
    return found[0] if len(found) == 1 else None


def _says_tied(config: dict[str, Any], layout: Layout) -> bool:
    """Whether output and input embedding share a tensor: what the config says, else that a language model's files hold no head."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    is_language_model = any("LM" in str(name) for name in config.get("architectures") or [])
    return is_language_model and not any(n.endswith(("lm_head.weight", "embed_out.weight")) for n in layout.file_of)


def _tied(layout: Layout, says_tied: bool, homeless: dict[str, Change], plan: MergePlan) -> dict[str, str]:
    """output -> input embedding, where the files hold one tensor for both and one of them is changed. Judged by names and shapes."""
    embeddings = [
        n for n, c in plan.changes.items() if (c.is_embedding or n.endswith(_EMBEDDINGS)) and "position" not in n
    ]
    if not embeddings and homeless:
        shapes = [c.shape() for c in homeless.values()]
        embeddings = [
            n for n in layout.file_of if n.endswith(_EMBEDDINGS) and tuple(layout.entry(n)["shape"]) in shapes
        ]
    heads = [n for n in homeless if n.endswith(".weight")]
    if len(embeddings) != 1 or len(heads) > 1 or not (heads or says_tied):
        return {}
    return {next(iter(heads), "lm_head.weight"): embeddings[0]}


def _misfits(layout: Layout, plan: MergePlan) -> list[str]:
    """A line for every change that does not fit its tensor."""
    problems = []
    pairs = [*plan.changes.items(), *((source, c) for source, c in plan.added.values() if c is not None)]
    for name, change in pairs:
        entry, wanted = layout.entry(name), change.shape()
        shape = tuple(entry["shape"])
        whole = change.replacement is not None
        flat = shape if whole or len(shape) < 2 else tuple(torch.empty(shape, device="meta").flatten(1).shape)
        if flat != wanted:
            problems.append(f"{PREFIX}{change.module}: is for a weight of {wanted}, the base model's {name} is {flat}")
        if entry["dtype"] not in DTYPES and not (whole and entry["dtype"] in WHOLE_NUMBERS):
            problems.append(f"{name}: is stored as {entry['dtype']}; only floating point weights can be merged")
    return problems


def _without_factors(layout: Layout, plan: MergePlan, saved: SavedAdapter) -> list[str]:
    """A line for every stored weight that the adapter's configuration targets by name and its file has nothing for."""
    config = saved.config
    if isinstance(config.target_modules, str):
        return []
    weights = [
        n.removesuffix(".weight") for n in layout.file_of if n.endswith(".weight") and len(layout.entry(n)["shape"]) > 1
    ]
    changed = {name.removesuffix(".weight") for name in [*plan.changes, *plan.added]}
    return [
        f"{PREFIX}{n}: is targeted, and missing in the file"
        for n in weights
        if n not in changed and is_targeted(n, config)
    ]


def _check_copies(layout: Layout, plan: MergePlan, found: Changes) -> None:
    """Raises AdapterError where an embedding saved beside its factors is not the base's."""
    for module, copied in found.copies.items():
        name = f"{module}.weight"
        origin = plan.added[name][0] if name in plan.added else stored_name(name, layout)
        if origin is None:
            continue
        own = layout.read(origin)
        if copied.shape != own.shape or not torch.equal(copied.to(own.dtype), own):
            raise AdapterError(
                f"{PREFIX}{module}.base_layer.weight: is not the base model's; it was resized or trained beside the adapter"
            )
