"""How many threads ONNX Runtime computes with: measured on this machine once, else as many as this process may use.

Left alone, the runtime takes what it believes to be the number of physical cores: one of two in many virtual machines, all of a host's
in a container that has a share of them. $OMP_NUM_THREADS and a number in the folder's own genai_config.json are obeyed. Measured is
the time of a short prompt with its answer, after an export and never at loading; figures are kept per machine, runtime and size of model.

Not here: what else makes a folder fast (`workflow.tune`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phinetune.artifact import content_key
from phinetune.model.compute import keep_measured, processor_identity, read_measured, usable_cpus

_PROMPT, _ANSWER, _ROUNDS = 64, 16, 3
_WORTH = 0.97
"""More threads must take this share of the time at most."""
_UNDISTURBED = 0.9
"""Of their time, threads that wait for one another by spinning are computing; less of it means that others computed."""
_PART = ("model", "decoder", "session_options")


def threads_for(folder: Path) -> int | None:
    """The number for the exported model in `folder`; None where its own settings say it."""
    if _own_setting(folder):
        return None
    return _asked() or int(read_measured(_key(folder)).get("threads") or usable_cpus())


def _asked() -> int | None:
    """The number that the environment asks for."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdigit() and int(text) > 0 else None


def as_overlay(threads: int) -> str:
    """`threads` as what is laid over genai_config.json."""
    return json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}})


def measure_threads(folder: Path, load: Callable[[int], Any]) -> dict[str, float]:
    """Number of threads -> seconds of a prompt with its answer, on the model that `load(threads)` gives; the best is remembered.

    load: an `onnxruntime_genai.Model`. Of several rounds the shortest counts. Measured anew only where nothing is remembered, and with
    one processor, or where the number is given, not at all; nothing is remembered, and nothing returned, where other programs took processors away meanwhile.
    """
    if _asked() or _own_setting(folder):
        return {}
    known, most = read_measured(_key(folder)).get("seconds"), usable_cpus()
    if isinstance(known, dict):
        return known
    seconds: dict[str, float] = {}
    for threads in sorted({most, max(1, most // 2)}) if most > 1 else ():
        found = answer_seconds(load(threads), threads)
        if found is None:
            return {}
        seconds[str(threads)] = found
    if seconds:
        keep_measured(_key(folder), {"threads": _best(seconds), "seconds": seconds})
    return seconds


def answer_seconds(model: Any, threads: int) -> float | None:
    """Seconds of a short prompt with its answer, the shortest of some; None where other programs took processors away meanwhile.

    model: an `onnxruntime_genai.Model` that runs on `threads` threads.
    """
    _answer(model)
    best, computed = min(_answer(model) for _ in range(_ROUNDS))
    return None if computed < _UNDISTURBED * threads * best else round(best, 4)


def _best(seconds: dict[str, float]) -> int:
    """The fewest threads that no larger number beats clearly."""
    best, *more = sorted(seconds, key=int)
    for threads in more:
        best = threads if seconds[threads] < _WORTH * seconds[best] else best
    return int(best)


def _answer(model: Any) -> tuple[float, float]:
    """(seconds, seconds of processors that this process used in them) of one prompt with its answer."""
    import numpy as np
    import onnxruntime_genai as og

    params = og.GeneratorParams(model)
    params.set_search_options(max_length=_PROMPT + _ANSWER, min_length=_PROMPT + _ANSWER, do_sample=False)
    generator = og.Generator(model, params)
    start, computed = time.perf_counter(), time.process_time()
    generator.append_tokens(np.arange(1, _PROMPT + 1, dtype=np.int32))
    for _ in range(_ANSWER):
        generator.generate_next_token()
    return time.perf_counter() - start, time.process_time() - computed


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _own_setting(folder: Path) -> bool:
    part: Any = _settings(folder)
    for name in _PART:
        part = part.get(name) if isinstance(part, dict) else None
    return isinstance(part, dict) and bool(part.get("intra_op_num_threads"))


def _key(folder: Path) -> str:
    """Machine, runtime, and the size of the model: width, layers, and bytes to the next power of two."""
    import onnxruntime_genai as og

    decoder = _settings(folder).get("model", {}).get("decoder", {})
    size = sum(f.stat().st_size for f in folder.glob("model.onnx*")).bit_length()
    shape = decoder.get("hidden_size"), decoder.get("num_hidden_layers"), size
    return content_key("onnx threads", *processor_identity(), usable_cpus(), og.__version__, shape)[:16]
