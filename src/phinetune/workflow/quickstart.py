"""The whole way on bundled data: base, adapter, merged model, int4 ONNX, all compared on the same held-out examples."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.data.messages import parse_data_config
from phinetune.events import OnEvent, log_event
from phinetune.exporting.build import check_builder
from phinetune.generation.load import load_generator
from phinetune.generation.protocol import Generator
from phinetune.model.folder import resolve_model
from phinetune.workflow.compare import NUMBERS, Comparison, compare, write_comparison
from phinetune.workflow.export import export
from phinetune.workflow.finetune import finetune
from phinetune.workflow.merge import merge

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
    }
    written = write_comparison(replace(found, record={**found.record, **more}), root, on_event)
    return QuickstartResult(written, answers, seconds)


def _answer(generator: Generator, phrase: str) -> str:
    prompt = generator.contract.prompt_ids([{"role": "user", "content": f"What is the tone of this phrase? {phrase}"}])
    return next(iter(generator.complete([prompt], 16))).text.strip()
