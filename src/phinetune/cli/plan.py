"""`phinetune plan`: the forecast of a training run as tables. Model, data and settings as for `phinetune finetune`; nothing is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from phinetune.cli.flags import Completion, ConfigFile, Data, Model, Output, Overwrite, Prompt, Quiet, Set

if TYPE_CHECKING:
    from phinetune.workflow.training_plan import Plan

TestFraction = Annotated[
    float | None,
    typer.Option(
        help="Share of the examples held out for evaluation, 0 to below 1 (default: 0.2).", show_default=False
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed of the split (default: 0); training's own is training_config.seed.", show_default=False),
]


def plan(
    model: Model = None,
    data: Data = None,
    output: Output = None,
    prompt: Prompt = None,
    completion: Completion = None,
    test_fraction: TestFraction = None,
    seed: Seed = None,
    config: ConfigFile = None,
    settings: Set = None,
    overwrite: Overwrite = None,
    quiet: Quiet = False,
) -> None:
    """Say what finetune will take in memory and time, and what makes it fit if it does not.

    Takes model, data and settings as finetune does (its --reference is --set training_config.reference=true here); --output and
    --overwrite have no effect. Nothing is loaded: the folder may hold config.json and
    tokenizer only. Figures are estimates for this machine's CPU. Exit code 3: the memory is not enough.
    """
    from phinetune.cli.console import Terminal, out
    from phinetune.cli.options import arguments
    from phinetune.workflow.forecast_training import plan as stage

    options: dict[str, Any] = {
        "model": model,
        "data.path": data,
        "data.prompt": prompt,
        "data.completion": completion,
        "data.test_fraction": test_fraction,
        "data.seed": seed,
        "output_dir": output,
        "overwrite": overwrite,
    }
    with Terminal(quiet) as on_event:
        found = stage(**arguments(stage, config, settings or [], options), on_event=on_event)
    console = out()
    for table in tables(found):
        console.print(table)
        console.print()
    if not found.fits:
        console.print(
            "it does not fit; nothing that was tried makes it fit" if not found.suggestions else "it does not fit",
            markup=False,
        )
        raise typer.Exit(3)


def tables(found: Plan) -> list[Any]:
    """Memory by part, time, later stages, and what makes it fit."""
    from phinetune.cli.run import table
    from phinetune.evaluation.columns import size_text

    parts = sorted(found.memory.items(), key=lambda p: -p[1])
    memory = [(name, size_text(size), f"{size / found.peak:.0%}") for name, size in parts]
    memory.append(("peak", size_text(found.peak), "100%"))
    of = size_text(found.available) if found.available is not None else "not known"
    batch = found.batch
    facts = [
        ("largest batch", f"{batch['rows']} examples, {batch['tokens']} tokens, {batch['learned']} learned"),
        ("memory while loading", size_text(found.loading_peak)),
        ("memory that it needs", size_text(found.needed)),
        ("memory that can be had", of),
        ("step", f"{found.step_seconds:.3g} s, {found.flops_per_step / 1e9:.0f} GFLOP, {found.tokens_per_step / max(found.step_seconds, 1e-9):.0f} tokens/s"),
        ("steps", f"{found.steps}"),
        ("training", time_text(found.total_seconds)),
        ("memory of merge", size_text(found.merge_peak)),
        ("memory of export", f"{size_text(found.export_peak)} (rough)"),
    ]  # fmt: skip
    made = [table(("memory", "", "share"), memory), table(("what", "about"), facts)]
    if found.suggestions:
        rows = [(s.text, size_text(s.needed), time_text(s.seconds)) for s in found.suggestions]
        made.append(table(("what makes it fit", "memory", "training"), rows))
    return made


def time_text(seconds: float) -> str:
    """Seconds for people: 90 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
