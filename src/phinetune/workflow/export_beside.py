"""Export an adapter that was trained over the graph's own integers: they stay as they are, and the adapter goes beside them.

QLoRA without a second quantization. The base was held on the grid while training (`model_kwargs.load_on_grid`); the builder rounds it to
the same codes, which is proven product by product; the factors become constants of the graph, in floating point. What is shipped is then
what was trained, but for the runtime's own arithmetic, and the answers are compared all the same.

Not here: adapters to be switched at run time (`export_adapters.py`), merging.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phinetune.artifact import read_manifest
from phinetune.errors import ExportError
from phinetune.events import Note, OnEvent, log_event
from phinetune.exporting.config import ExportConfig
from phinetune.generation.load import adapter_contract
from phinetune.model.grid import Grid
from phinetune.model.quantized import read_record
from phinetune.workflow.survival import check_answers, reference_answers


def grid_of_base(adapter: Path) -> Grid | None:
    """The grid that the base of the adapter in `adapter` was held on while it was trained; None if it was not."""
    found = read_record(read_manifest(adapter).get("quantization"), f"{adapter}/manifest.json")
    return found if isinstance(found, Grid) else None


def goes_beside(adapter: Path, config: ExportConfig, on_event: OnEvent = log_event) -> bool:
    """True if the integers of this export are those that the adapter in `adapter` was trained over. Says why not where they might be."""
    grid = grid_of_base(adapter)
    if grid is None:
        return False
    from phinetune.lora.adapter import read_adapter
    from phinetune.workflow.export_adapters import not_switchable

    reason = ""
    if config.grid != grid:
        reason = f"{config.grid or config.precision} was asked for"
    elif config.algorithm not in ("auto", "default"):
        reason = f"codes by {config.algorithm} were asked for"
    elif config.use_qdq or not config.answers_prompts:
        reason = "the graph was asked for in another form"
    elif problems := not_switchable(adapter, read_adapter(adapter)):
        reason = problems[0]
    if reason:
        text = f"{adapter}: was trained over the integers of {grid}; it is merged and rounded anew, as {reason}"
        on_event(Note(f"export: {text}", warning=True))
    return not reason


def export_beside(
    adapter: Path,
    base: Path,
    folder: Path,
    config: ExportConfig,
    base_model: str | None,
    trust_remote_code: bool,
    compare_answers: bool,
    on_event: OnEvent,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build `base` into `folder` with the adapter as a side branch; (what was verified, what survived), for the manifest.

    Raises ExportError if the graph's integers are not those of the training, or the answers get worse by more than `max_drop`.
    """
    from phinetune.exporting.lora_inputs import add_constants
    from phinetune.exporting.verify import verify
    from phinetune.generation.load import load_adapted
    from phinetune.generation.onnx_backend import load_onnx
    from phinetune.lora.adapter import read_adapter
    from phinetune.workflow.export import build_verified, training_probes
    from phinetune.workflow.export_adapters import factors_of

    manifest, contract = read_manifest(adapter), adapter_contract(adapter, base, trust_remote_code)
    verified = build_verified(base, folder, config, manifest, trust_remote_code, on_event, contract)
    check_codes(base, folder, config)
    factors = factors_of(read_adapter(adapter), base, folder)
    add_constants(folder / "model.onnx", factors)
    verified |= verify(folder, config, contract, training_probes(manifest, contract), lambda event: None)
    on_event(
        Note(
            f"export: the base's integers are those of the training; {len(factors) // 2} products have the adapter beside them"
        )
    )
    survival: dict[str, Any] = {"way": "beside", "why": "the adapter was trained over exactly these integers"}
    if not compare_answers or config.execution_provider != "cpu":
        return verified, survival

    def load() -> Any:
        return load_adapted(adapter, None, None, base_model, lambda event: None)[0]

    reference = reference_answers(base, manifest, contract, trust_remote_code, on_event, load)
    if isinstance(reference, str):
        on_event(Note(f"export: answers before and after are not compared: {reference}"))
        return verified, survival
    survival["answers"], lost = check_answers(reference, load_onnx(folder), config, on_event)
    if lost:
        raise ExportError(f"{config.precision}: {lost}", "the runtime's arithmetic: try a lower export.accuracy_level")
    return verified, survival


def check_codes(base: Path, folder: Path, config: ExportConfig) -> None:
    """Raises ExportError for a product in `folder` whose integers are not the nearest codes of the weights in `base`."""
    import torch

    from phinetune.exporting.codes import GraphCodes
    from phinetune.lora.shards import Layout
    from phinetune.model.folder import weight_files
    from phinetune.model.grid import join, quantize
    from phinetune.model.load import tied_embeddings
    from phinetune.workflow.quantize import parts_in

    graph, grid = GraphCodes(folder), config.grid
    layout, tied = Layout(weight_files(base)[0]), tied_embeddings(base)
    parts, wrong = parts_in(graph, base), []
    for product in graph.stored:
        spans, same = parts.get(product, []), False
        names = [tied.get(f"{m}.weight", f"{m}.weight") for m, _, _ in spans]
        rows = [layout.read(n)[start:stop] for n, (_, start, stop) in zip(names, spans, strict=True)]
        if rows and grid is not None:
            found, expected = graph.read(product), join([quantize(weight, grid) for weight in rows])
            same = torch.equal(found.codes, expected.codes)
            same = same and torch.equal(found.scales, expected.scales.to(graph.scale_dtype).float())
        if not same:
            wrong.append(product)
    if wrong:
        text = f"{wrong[0]}: the graph's integers are not those that the adapter was trained over"
        raise ExportError(
            f"{text} ({len(wrong)} of {len(graph.stored)} products)", "export with algorithm gptq: it is merged then"
        )
