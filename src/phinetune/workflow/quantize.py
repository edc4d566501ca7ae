"""Better codes for a built graph: which way to integers is taken, on which examples, and proof that its codes are what the graph holds.

The builder has rounded every weight to the nearest code. Where another way is asked for, or `auto` finds one better, its codes are
computed for the plain model that was built and put into the graph, which is then read back and compared. Not here: the ways
(`exporting.ways`), the graph's files (`exporting.codes`), what became of the fine-tuning (`survival.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.errors import ConfigError, DataError, ExportError
from phinetune.events import Note, OnEvent, log_event, nobody
from phinetune.exporting.codes import GraphCodes
from phinetune.exporting.config import OURS, ExportConfig
from phinetune.exporting.ways import Way
from phinetune.model.compute import available_memory
from phinetune.model.contract import PromptContract
from phinetune.model.folder import stored_dtype, weight_files
from phinetune.model.grid import Codes, Grid
from phinetune.model.load import SPARE
from phinetune.workflow.held_out import choose_examples

if TYPE_CHECKING:
    import torch

    from phinetune.exporting.sensitivity import Spans


@dataclass(frozen=True)
class Calibration:
    """Examples, prompts with answers: their token ids, and where the answer of each begins."""

    rows: Sequence[Sequence[int]] = ()
    starts: Sequence[int] = ()


@dataclass(frozen=True)
class Choice:
    """The ways to integers that are tried, in order, why the first comes first, and the examples of calibration."""

    ways: tuple[Way, ...]
    reason: str = ""
    examples: Calibration = field(default=Calibration(), repr=False)


def choose_ways(
    config: ExportConfig,
    source: Path,
    trained_grid: Grid | None,
    manifest: dict[str, Any],
    contract: PromptContract,
    on_event: OnEvent = log_event,
) -> Choice:
    """The ways for the plain model in `source`, whose training `manifest` tells; more than one where the choice is ours (`auto`).

    Raises DataError or ConfigError where the way that is asked for has no examples to be calibrated on.
    """
    asked: Any = config.algorithm
    grid = config.grid
    if asked not in OURS or grid is None:
        return Choice(("default",))
    if asked == "auto" and (reason := cannot(config, source)):
        return Choice(("default",), reason)
    if trained_grid not in (None, grid) or (trained_grid is not None and asked != "auto"):
        text = f"the adapter was trained for {trained_grid}, which {grid} by {asked} is not"
        on_event(Note(f"export: {text}; what it won by that is not kept", warning=True))
    missing = ""
    try:
        examples = calibration_examples(config, manifest, contract)
    except (ConfigError, DataError) as error:
        if asked in ("gptq", "mixed") or config.calibration_data is not None:
            raise
        examples, missing = Calibration(), f"no examples to be calibrated on: {error.problems[0]}"
    count = len(examples.rows)
    if asked != "auto":
        return Choice((asked,), f"as asked, {count} examples" if count else missing, examples)
    others: tuple[Way, ...] = ("searched",)
    if count:
        others = ("gptq", "mixed", "searched") if grid.bits == 4 else ("gptq", "searched")
    if trained_grid == grid:
        return Choice(("default", *others), "the adapter was trained for exactly these codes", examples)
    return Choice((*others, "default"), f"calibrated on {count} examples" if count else missing, examples)


def cannot(config: ExportConfig, source: Path) -> str:
    """Why the nearest codes are all that can be had for `source`; empty if others can."""
    if config.use_qdq:
        return "use_qdq: codes of DequantizeLinear stay the builder's"
    if config.op_types_to_quantize is not None and "MatMul" not in config.op_types_to_quantize:
        return "no products are quantized"
    if uneven := [columns for _, columns in matrices(source).values() if columns % config.block_size]:
        return f"blocks of {config.block_size} do not divide {min(uneven)} inputs"
    return out_of_memory(source, bytes_each=2)


def out_of_memory(source: Path, bytes_each: int) -> str:
    """A sentence if the model in `source`, with `bytes_each` for each of its numbers, does not fit into the free memory; else empty."""
    numbers = sum(f.stat().st_size for f in weight_files(source)[0]) // stored_dtype(source).itemsize
    free = available_memory()
    if free is None or numbers * bytes_each * SPARE < free:
        return ""
    return f"the model does not fit into the free memory ({free / 1e9:.1f} GB)"


def calibration_examples(config: ExportConfig, manifest: dict[str, Any], contract: PromptContract) -> Calibration:
    """`config.calibration_examples` examples: of `calibration_data`, else of the training.

    Raises ConfigError where no data is known, DataError where there is none.
    """
    if config.calibration_data is not None:
        part = choose_examples(config.calibration_data, "all", manifest, contract, config.calibration_examples, nobody)
    else:
        part = choose_examples(None, "train", manifest, contract, config.calibration_examples, nobody)
    table = list(part.examples.table)
    return Calibration([list(row["input_ids"]) for row in table], [row["prompt_length"] for row in table])


def put_codes(
    source: Path,
    folder: Path,
    config: ExportConfig,
    way: Way,
    examples: Calibration,
    trust_remote_code: bool,
    on_event: OnEvent,
) -> dict[str, float]:
    """Compute the codes of `way` for the model in `source` and put them into the graph in `folder`.

    Returns product -> divergence of those that got 8 bits (`mixed`). Raises ExportError if the graph does not then hold exactly
    these codes.
    """
    from phinetune.exporting.ways import codes_of, joined

    graph, grid = GraphCodes(folder), config.grid
    if grid is None:
        raise ExportError(f"{folder}: {config.precision} has no codes")
    parts = parts_in(graph, source)
    used = {module for spans in parts.values() for module, _, _ in spans}
    kept = [module for module in matrices(source) if module not in used]  # floating point in the graph
    calibrated = examples.rows if way != "default" else ()
    codes = codes_of(source, way, grid, calibrated, kept, graph.scale_dtype, trust_remote_code, on_event)
    new = {product: found for product, spans in parts.items() if (found := joined(codes, spans)) is not None}
    if left := [product for product in graph.stored if product not in new]:
        on_event(Note(f"export: {len(left)} products keep the nearest codes, as {left[0]}", warning=True))
    raised: dict[str, float] = {}
    if way == "mixed":
        known = {product: parts[product] for product in new}
        raised, better = raise_most_sensitive(
            source, config, known, codes, examples, graph.scale_dtype, trust_remote_code, on_event
        )
        new |= better
    graph.write(new)
    _check_held(GraphCodes(folder), new)
    return raised


def _check_held(graph: GraphCodes, new: Mapping[str, Codes]) -> None:
    """Raises ExportError for a product of `graph` that does not hold the codes which were put into it."""
    import torch

    for product, asked in new.items():
        found = graph.read(product)
        pairs = [(found.codes, asked.codes), (found.scales, asked.scales)]
        if found.zeros is not None and asked.zeros is not None:
            pairs.append((found.zeros, asked.zeros))
        if found.grid != asked.grid or not all(torch.equal(a, b) for a, b in pairs):
            raise ExportError(f"{product}: the graph does not hold the codes that were put into it")


def raise_most_sensitive(
    source: Path,
    config: ExportConfig,
    parts: Mapping[str, Spans],
    codes: Mapping[str, Codes],
    examples: Calibration,
    kept_as: torch.dtype,
    trust_remote_code: bool,
    on_event: OnEvent,
) -> tuple[dict[str, float], dict[str, Codes]]:
    """What the rounding of a product to `codes` alone changes in the answers (nats a token), of those that `size_budget` gives 8 bits,
    and their codes of 8 bits, with scales in `kept_as`."""
    import torch

    from phinetune.exporting.rounding_ways import least_error
    from phinetune.exporting.sensitivity import choose_raised, divergences
    from phinetune.model.load import load_model, measuring_plan

    model = load_model(source, measuring_plan(source, trust_remote_code)).eval()
    found = divergences(model, parts, codes, examples.rows, examples.starts, on_event)
    shapes = matrices(source)
    numbers = {p: sum((stop - start) * shapes[m][1] for m, start, stop in spans) for p, spans in parts.items()}
    whole = sum(n // 2 + n // config.block_size * kept_as.itemsize for n in numbers.values())
    budget = int(whole * (config.size_budget - 1))
    raised = choose_raised(found, {p: n // 2 for p, n in numbers.items()}, budget)
    total, away = sum(found.values()), sum(found[p] for p in raised)
    which = ", ".join(raised[:3]) + (" ..." if len(raised) > 3 else "")
    on_event(
        Note(
            f"export: 8 bits for {len(raised)} of {len(parts)} products, which make {away / total if total else 0:.0%} of what rounding "
            f"changes in the answers{f': {which}' if raised else f'; none fits into size_budget {config.size_budget:g}'}"
        )
    )
    grid = Grid(8, config.block_size, config.symmetric)
    better = {}
    for product in raised:
        rows = [model.get_submodule(module).weight[start:stop] for module, start, stop in parts[product]]
        better[product] = least_error(torch.cat(rows), grid, kept_as=kept_as)
    return {product: round(found[product], 6) for product in raised}, better


def parts_in(graph: GraphCodes, source: Path) -> dict[str, list[tuple[str, int, int]]]:
    """`GraphCodes.parts` for the model in `source`."""
    rows = {module: shape[0] for module, shape in matrices(source).items()}
    return graph.parts(rows, json.loads((source / "config.json").read_text(encoding="utf-8")))


def matrices(source: Path) -> dict[str, tuple[int, int]]:
    """Module -> (rows, columns), of every matrix in the model's files; the output layer also where it is the input embedding."""
    from phinetune.lora.shards import Layout
    from phinetune.model.load import tied_embeddings

    shapes = Layout(weight_files(source)[0]).shapes()
    for head, embedding in tied_embeddings(source).items():
        shapes.setdefault(head, shapes[embedding])
    return {n.removesuffix(".weight"): (s[0], s[1]) for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2}
