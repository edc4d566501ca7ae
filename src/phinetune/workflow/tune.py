"""The fastest int4 folder for this CPU that keeps the answers: block size, arithmetic of the products and threads, chosen by measurement.

How fast a folder answers depends on its shapes and not on its codes, so each candidate is built once with the nearest codes and timed; the
seconds are remembered per machine, runtime and shape, and the next export of such a model begins with the fastest at once. Candidates are
then exported in that order, each with the way to codes that was asked for, until one keeps the answers (`max_drop`). More bits for single
layers cost speed everywhere and are a matter of the ways (`mixed`), not of tuning.

Not here: threads of a folder that was not tuned (`generation.threads`).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from phinetune.artifact import BUILDING, content_key, write_json
from phinetune.errors import ExportError
from phinetune.events import Note, OnEvent, log_event
from phinetune.exporting.build import build_onnx
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.graph import set_accuracy_level
from phinetune.exporting.verify import GENAI_CONFIG
from phinetune.generation.onnx_backend import open_folder
from phinetune.generation.threads import answer_seconds, as_overlay, threads_for
from phinetune.model.compute import keep_measured, processor_identity, processor_name, read_measured, usable_cpus
from phinetune.model.grid import Grid
from phinetune.quiet import measuring
from phinetune.workflow.quantize import matrices

_BLOCKS: tuple[Any, ...] = (32, 64, 128)
_LEVELS: tuple[Any, ...] = (4, 1)


def in_order_of_speed(
    source: Path, config: ExportConfig, trained: Grid | None, trust_remote_code: bool, on_event: OnEvent = log_event
) -> list[ExportConfig]:
    """The candidates for the plain model in `source`, the fastest first. trained: the grid that it was trained for, which stays."""
    shapes = matrices(source)
    widths = {columns for _, columns in shapes.values()}
    blocks = [b for b in _BLOCKS if not any(w % b for w in widths)] if trained is None else []
    blocks = blocks or [config.block_size]
    seconds: dict[tuple[Any, Any], float] = {}
    for block in blocks:
        key = _key(shapes, config, block)
        known = read_measured(key)
        if not known:
            known = _measure(
                source, replace(config, block_size=block, algorithm="default"), trust_remote_code, on_event
            )
            if known:
                keep_measured(key, known)
        seconds |= {(block, level): float(known[str(level)]) for level in _LEVELS if str(level) in known}
    if not seconds:
        on_event(Note("export: other programs kept this machine busy: nothing could be measured", warning=True))
        return [config]
    ranked = sorted(seconds, key=lambda found: seconds[found])
    times = ", ".join(f"block_size {b} accuracy_level {level} {seconds[b, level] * 1e3:.0f} ms" for b, level in ranked)
    on_event(Note(f"export: tuned for {processor_name()}: {times} (a short prompt with its answer)"))
    return [replace(config, block_size=b, accuracy_level=level) for b, level in ranked]


def _measure(source: Path, config: ExportConfig, trust_remote_code: bool, on_event: OnEvent) -> dict[str, float]:
    """Accuracy level -> seconds of an answer, with the nearest codes; empty where other programs disturbed it."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="phinetune-tune-") as scratch, measuring(on_event):
        folder = Path(scratch)
        build_onnx(source, folder, config, trust_remote_code, on_event)
        for level in _LEVELS:
            _set_level(folder, level)
            threads = threads_for(folder) or usable_cpus()
            seconds = answer_seconds(open_folder(folder, threads), threads)
            if seconds is None:
                return {}
            found[str(level)] = seconds
    return found


def _set_level(folder: Path, level: int) -> None:
    """Have the products of the graph in `folder` compute with activations of `level`."""
    import onnx

    file = folder / "model.onnx"
    model = onnx.load(str(file), load_external_data=False)
    set_accuracy_level(model, level)
    onnx.save(model, str(file))


def _key(shapes: dict[str, tuple[int, int]], config: ExportConfig, block: int) -> str:
    """Machine, runtime, and (by `shapes`, module -> (rows, columns)) all that decides how much is computed and read."""
    import onnxruntime_genai as og

    how = (config.precision, config.symmetric, block)
    return content_key("onnx speed", *processor_identity(), usable_cpus(), og.__version__, sorted(shapes.items()), how)[
        :16
    ]


def first_that_keeps(
    candidates: list[ExportConfig], make: Callable[[ExportConfig], dict[str, Any]], folder: Path, on_event: OnEvent
) -> tuple[ExportConfig, dict[str, Any]]:
    """(the first candidate that `make` does not refuse, what it returned). Raises the last one's ExportError if it refuses all."""
    *first, last = candidates
    for candidate in first:
        try:
            return candidate, make(candidate)
        except ExportError as error:
            text = f"block_size {candidate.block_size}, accuracy_level {candidate.accuracy_level} is not taken: {error.problems[0]}"
            on_event(Note(f"export: {text}", warning=True))
            _clear(folder)
    return last, make(last)


def _clear(folder: Path) -> None:
    """Take away what a refused candidate left; the merged model and the note of what is being built stay."""
    for path in folder.iterdir():
        if path.name in (BUILDING, "merged"):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_threads(folder: Path) -> None:
    """Put the number of threads that is best here into the folder's own settings, for whatever runtime loads it."""
    threads = threads_for(folder)
    if threads is not None:
        file = folder / GENAI_CONFIG
        settings = json.loads(file.read_text(encoding="utf-8"))
        more = json.loads(as_overlay(threads))["model"]["decoder"]["session_options"]
        settings["model"]["decoder"].setdefault("session_options", {}).update(more)
        write_json(file, settings)
