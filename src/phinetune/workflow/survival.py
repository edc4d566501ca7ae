"""The survival gauge: after every quantization, what is left of the fine-tuning, in the weights and in the answers.

Weights: of every layer that the adapter changes, how much of the change the graph's integers hold (`exporting.survival`). Answers: on the
held-out examples of the training, loss, exact answers and chosen tokens of the exported folder beside those of the model it was made from.
A layer whose numbers cannot be right is an error that names it; answers worse by more than `max_drop` are, too. What cannot be gauged
(no adapter, no data, no memory) is said. Not here: ways to better codes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.artifact import read_manifest
from phinetune.errors import ConfigError, DataError, PhinetuneError
from phinetune.evaluation.agreement import Agreement, Said, agreement, said
from phinetune.events import Note, OnEvent, log_event, nobody
from phinetune.exporting.codes import GraphCodes
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.survival import layer_survival, summary
from phinetune.generation.load import adapter_base, round_as_trained
from phinetune.generation.torch_backend import TorchGenerator
from phinetune.model.folder import stored_dtype
from phinetune.workflow.held_out import choose_examples
from phinetune.workflow.merge import weight_reader
from phinetune.workflow.quantize import out_of_memory, parts_in

if TYPE_CHECKING:
    from torch import Tensor

    from phinetune.model.contract import PromptContract

_EXAMPLES = 256
"""Held-out examples that are compared at most."""
_WORST = 3
MAX_DROP = 0.01
"""What `ExportConfig.max_drop` is by default."""


@dataclass(frozen=True)
class Reference:
    """What the model that is exported says on held-out examples."""

    examples: Any
    said: Said


def reference_answers(
    source: Path,
    manifest: Mapping[str, Any],
    contract: PromptContract,
    trust_remote_code: bool,
    on_event: OnEvent = log_event,
    load: Callable[[], Any] | None = None,
) -> Reference | str:
    """What the plain model in `source` says, as it was trained to compute; or why that is not known.

    load: gives the model, where it is another one than the files in `source` hold.
    """
    try:
        examples = choose_examples(None, "test", dict(manifest), contract, _EXAMPLES, nobody).examples
    except (ConfigError, DataError) as error:
        return error.problems[0]
    if reason := out_of_memory(source, bytes_each=4):
        return reason
    model = load() if load is not None else _as_trained(source, trust_remote_code)
    return Reference(examples, said(TorchGenerator(model.eval(), contract), examples, "the model", on_event))


def _as_trained(source: Path, trust_remote_code: bool) -> Any:
    """The plain model in `source`, computing as its training did."""
    import torch

    from phinetune.model.compute import default_dtype
    from phinetune.model.load import LoadPlan, load_model

    device, stored = torch.device("cpu"), stored_dtype(source)
    dtype = stored if stored == torch.float32 else default_dtype(device)
    model = load_model(source, LoadPlan(dtype, device, None, trust_remote_code))
    round_as_trained(model, source, source)
    return model


def check_answers(
    reference: Reference, generator: Any, config: ExportConfig, on_event: OnEvent = log_event
) -> tuple[dict[str, Any], str]:
    """(figures for the manifest, what is wrong with the exported model's answers; empty if nothing is)."""
    found = agreement(reference.said, said(generator, reference.examples, "ONNX", on_event))
    exact, loss = found.exact, found.loss
    on_event(
        Note(
            f"export: on {found.count} held-out examples {exact[0]:.1%} exact before and {exact[1]:.1%} after, loss {loss[0]:.4f} "
            f"and {loss[1]:.4f}, {found.same:.1%} of the tokens alike"
        )
    )
    figures = {
        "examples": found.count,
        "exact": [round(x, 4) for x in exact],
        "loss": [round(x, 5) for x in loss],
        "tokens_alike": round(found.same, 4),
        "drop": round(found.drop, 4),
        "measure": found.measure,
    }
    return figures, _too_much(found, config.max_drop)


def _too_much(found: Agreement, asked: float | str | None) -> str:
    most = MAX_DROP if asked is None else asked
    if isinstance(most, str) or not found.drop > most:
        return ""
    what = "points of" if found.measure == "exact answers" else "% of"
    return f"{found.drop * 100:.1f} {what} {found.measure} are lost ({most * 100:g} are allowed by max_drop)"


def check_weights(
    source: Path, folder: Path, base_model: str | None, trust_remote_code: bool, on_event: OnEvent = log_event
) -> tuple[dict[str, Any], list[str]]:
    """(figures, faults) of the integers in `folder` beside the adapter that the merged model in `source` was made with.

    ({}, []) where the model was not merged from an adapter that is still there; said.
    """
    from phinetune.lora.adapter import read_adapter
    from phinetune.lora.changes import read_changes

    merged = read_manifest(source)
    adapter = Path(str(merged.get("adapter", "")))
    if not merged.get("adapter"):
        return {}, []
    try:
        base = adapter_base(adapter, base_model)
        changes = read_changes(read_adapter(adapter), _model_type(base))
        read = weight_reader(adapter, base, str(merged.get("figures", {}).get("base", "original")), trust_remote_code)
    except PhinetuneError as error:
        on_event(Note(f"export: what is left of the adapter in the weights is not known: {error.problems[0]}"))
        return {}, []
    graph = GraphCodes(folder)
    layers = list(_layers(graph, parts_in(graph, source), changes.weights, read))
    if not layers:
        return {}, []
    figures = summary(layers)
    faults = [layer.fault for layer in layers if layer.fault]
    on_event(
        Note(
            f"export: of what the adapter adds, {figures['kept']:.1%} is in the integers; {figures['changed']:.0%} of the codes are others "
            f"than the base's, the rounding is {figures['noise']:.2f} times that of the nearest codes"
        )
    )
    return figures, faults


def _layers(
    graph: GraphCodes,
    parts: Mapping[str, list[tuple[str, int, int]]],
    changes: Mapping[str, Any],
    read: Callable[[str], Tensor],
) -> Any:
    """Figures of every layer that the adapter changes by factors and the graph holds as integers, one at a time."""
    import torch

    from phinetune.model.grid import join

    pieces: dict[str, list[tuple[int, str, int, int]]] = {}  # module -> (its first row, product, rows of the product)
    for product, spans in parts.items():
        at = 0
        for module, start, stop in spans:
            pieces.setdefault(module, []).append((start, product, at, at + stop - start))
            at += stop - start
    for module, change in changes.items():
        if module not in pieces or change.is_embedding or change.A is None:
            continue
        base = read(f"{module}.weight").float()
        intended = base.clone()
        folder = change.folder(tuple(intended.shape), torch.float32)
        for start, stop in folder.blocks():
            folder.write(intended[start:stop], start, stop)
        if change.transposed:
            base, intended = base.t(), intended.t()
        held = [graph.read(product)[a:b] for _, product, a, b in sorted(pieces[module])]
        if len({codes.grid for codes in held}) == 1:
            yield layer_survival(module, base, intended, join(held))
            continue
        start = 0
        for codes in held:  # two products make up this layer, one of them with more bits
            rows = slice(start, start := start + len(codes.codes))
            yield layer_survival(f"{module}[{rows.start}:{rows.stop}]", base[rows], intended[rows], codes)


def worst_layers(figures: Mapping[str, Any]) -> str:
    """The layers where least stands out of the rounding, for an error."""
    layers: dict[str, Any] = figures.get("layers", {})
    names = sorted(layers, key=lambda name: layers[name]["cosine"])[:_WORST]
    return ", ".join(names)


def _model_type(base: Path) -> str:
    return str(json.loads((base / "config.json").read_text(encoding="utf-8")).get("model_type") or "")
