"""The whole way on bundled data: base, adapter, merged model, int4 ONNX, each evaluated on the same held-out examples."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.artifact import folder_bytes
from phinetune.data.examples import load_examples
from phinetune.data.messages import parse_data_config
from phinetune.evaluation.results import StageResult, results, stage_result, write_results
from phinetune.evaluation.score import score
from phinetune.events import Note, OnEvent, log_event
from phinetune.exporting.build import check_builder
from phinetune.generation.load import load_generator
from phinetune.generation.protocol import Generator
from phinetune.model.folder import resolve_model
from phinetune.workflow.export import export
from phinetune.workflow.finetune import finetune
from phinetune.workflow.merge import merge

UNSEEN = (
    "They told me the ferry had been cancelled, and then it sailed in with a brass band on deck.",
    "The old swing still hangs in the garden, but nobody comes to push her any more.",
    "Something heavy is dragging itself along the corridor, and the handle is turning.",
)
"""Three phrases that are in no data set of ours."""


@dataclass(frozen=True)
class QuickstartResult:
    """The stages in order, the answers to `UNSEEN`, and the file that holds it all."""

    stages: list[StageResult]
    answers: list[tuple[str, str]]
    file: Path
    seconds: float


def quickstart(
    output_dir: str | Path = "phinetune-quickstart",
    model: str = "smollm2-135m",
    data: str | dict[str, Any] = "tone",
    training_config: dict[str, Any] | None = None,
    overwrite: bool = False,
    on_event: OnEvent = log_event,
) -> QuickstartResult:
    """Fine-tune `model` on `data`, evaluate, merge, export to int4 ONNX, evaluate again; write results.json into `output_dir`."""
    started = time.perf_counter()
    root = Path(output_dir).expanduser()
    check_builder()
    base = resolve_model(model, on_event=on_event)
    stages: list[StageResult] = []
    config = parse_data_config(data)

    def add(stage: str, generator: Generator, folder: Path, seconds_made: float) -> None:
        _, test, _ = load_examples(config, generator.contract, lambda event: None, as_rows=True)
        row = stage_result(score(generator, test, stage, on_event=on_event), folder, folder_bytes(folder), seconds_made)
        stages.append(row)
        on_event(Note(f"{stage}: {row.value:.1%} exact ({row.correct} of {row.count})"))

    def load(name: str | Path) -> Generator:
        return load_generator(str(name), on_event=lambda event: None)

    add("base", load(base), base, 0.0)
    adapter = finetune(
        model, config, training_config, output_dir=root / "adapter", overwrite=overwrite, on_event=on_event
    )
    add("adapter", load(adapter.folder), adapter.folder, adapter.manifest["seconds"])
    merged = merge(str(adapter.folder), root / "merged", overwrite=overwrite, on_event=on_event)
    add("merged", load(merged.folder), merged.folder, merged.manifest["seconds"])
    int4 = {"precision": "int4", "calibration_examples": 64}
    onnx = export(  # every stage is evaluated here
        str(merged.folder), root / "onnx-int4", int4, overwrite=overwrite, compare_answers=False, on_event=on_event
    )
    shipped = load(onnx.folder)
    add("ONNX int4", shipped, onnx.folder, onnx.manifest["seconds"])

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
    write_results(root / "results.json", results(stages, **more))
    return QuickstartResult(stages, answers, root / "results.json", seconds)


def _answer(generator: Generator, phrase: str) -> str:
    prompt = generator.contract.prompt_ids([{"role": "user", "content": f"What is the tone of this phrase? {phrase}"}])
    return next(iter(generator.complete([prompt], 16))).text.strip()
