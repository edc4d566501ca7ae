"""The whole way on bundled data: base, adapter, merged model, int4 ONNX, all compared on the same held-out examples.

Run again, it finds the stages, and where they are those that were compared, on this machine and with these versions, the comparison too.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.artifact import StageFolder, content_key, versions
from phinetune.data.messages import parse_data_config
from phinetune.evaluation.results import read_stages
from phinetune.events import Note, OnEvent, log_event
from phinetune.exporting.build import check_builder
from phinetune.generation.load import load_generator
from phinetune.generation.protocol import Generator
from phinetune.model.compute import machine_key
from phinetune.model.folder import resolve_model
from phinetune.workflow.compare import NUMBERS, Comparison, compare, write_comparison
from phinetune.workflow.export import export
from phinetune.workflow.finetune import finetune
from phinetune.workflow.merge import merge
from phinetune.workflow.subjects import REPORT, RESULTS

UNSEEN = (
    "They told me the ferry had been cancelled, and then it sailed in with a brass band on deck.",
    "The old swing still hangs in the garden, but nobody comes to push her any more.",
    "Something heavy is dragging itself along the corridor, and the handle is turning.",
)
"""Three phrases that are in no data set of ours."""
_TIMED = 4  # answers of each stage: enough for a median, and soon done


@dataclass(frozen=True)
class QuickstartResult:
    """The stages side by side, the answers to `UNSEEN`, and the seconds of it all."""

    comparison: Comparison
    answers: list[tuple[str, str]]
    seconds: float


def quickstart(
    output_dir: str | Path = "phinetune-quickstart",
    model: str = "smollm2-135m",
    data: str | dict[str, Any] = "tone",
    training_config: dict[str, Any] | None = None,
    overwrite: bool = False,
    on_event: OnEvent = log_event,
) -> QuickstartResult:
    """Fine-tune `model` on `data`, merge, export to int4 ONNX, compare all stages; write results.json and report.html into `output_dir`."""
    started = time.perf_counter()
    root = Path(output_dir).expanduser()
    check_builder()
    resolve_model(model, on_event=on_event)
    config = parse_data_config(data)
    adapter = finetune(
        model, config, training_config, output_dir=root / "adapter", overwrite=overwrite, on_event=on_event
    )
    merged = merge(str(adapter.folder), root / "merged", overwrite=overwrite, on_event=on_event)
    int4 = {"precision": "int4", "calibration_examples": 64}
    onnx = export(  # every stage is evaluated below
        str(merged.folder), root / "onnx-int4", int4, overwrite=overwrite, compare_answers=False, on_event=on_event
    )
    made_of = _made_of(adapter, merged, onnx)
    if not overwrite and (earlier := _earlier(root, made_of)) is not None:
        on_event(Note(f"unchanged: {root / RESULTS} compares exactly these stages on this machine"))
        return earlier
    stages = {"base": model, "adapter": adapter.folder, "merged": merged.folder, "ONNX int4": onnx.folder}
    found = compare(
        {name: str(place) for name, place in stages.items()},
        split="test",
        repeats=_TIMED,
        numbers=[n for n in NUMBERS if n != "perplexity"],  # half a minute more
        on_event=on_event,
    )
    shipped = load_generator(str(onnx.folder), on_event=lambda event: None)
    answers = [(phrase, _answer(shipped, phrase)) for phrase in UNSEEN]
    seconds = round(time.perf_counter() - started, 1)
    more = {
        "model": model,
        "data": asdict(replace(config, path=str(config.path))),
        "seed": adapter.manifest["seed"],
        "training": adapter.manifest["figures"],
        "unseen": [{"phrase": p, "answer": a} for p, a in answers],
        "seconds": seconds,
        "made_of": made_of,
    }
    written = write_comparison(replace(found, record={**found.record, **more}), root, on_event)
    return QuickstartResult(written, answers, seconds)


def _made_of(*stages: StageFolder) -> str:
    """What must be equal for the comparison to be the same: the stages' own keys, this machine, the versions."""
    return content_key("quickstart", 1, [s.manifest["key"] for s in stages], machine_key(), versions())


def _earlier(root: Path, made_of: str) -> QuickstartResult | None:
    """What an earlier run found of these very stages; None where there is none that can be read."""
    try:
        record = json.loads((root / RESULTS).read_text(encoding="utf-8"))
        if record["made_of"] != made_of or not (root / REPORT).is_file():
            return None
        found = Comparison(read_stages(record), record["reference"], record, root)
        answers = [(said["phrase"], said["answer"]) for said in record["unseen"]]
        return QuickstartResult(found, answers, record["seconds"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _answer(generator: Generator, phrase: str) -> str:
    prompt = generator.contract.prompt_ids([{"role": "user", "content": f"What is the tone of this phrase? {phrase}"}])
    return next(iter(generator.complete([prompt], 16))).text.strip()
