"""`phinetune compare`: the models of several stages side by side, in the terminal and as a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from phinetune.cli.flags import (
    BaseModel,
    Completion,
    ConfigFile,
    Data,
    MaxNewTokens,
    Overwrite,
    Prompt,
    Quiet,
    Set,
    Split,
)


def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Folders, hub ids, embedded names, or NAME=MODEL to name the stage.",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    prompt: Prompt = None,
    completion: Completion = None,
    split: Split = None,
    metric: Annotated[
        str | None, typer.Option(help="A metric of one answer (default: exact_match).", show_default=False)
    ] = None,
    max_examples: Annotated[
        int | None, typer.Option(help="At most so many examples, evenly spread.", show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    warmup: Annotated[
        int | None, typer.Option(help="Answers before the timed ones (default: 1).", show_default=False)
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed answers (default: 8).", show_default=False)] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Stage that the others are held against (default: the adapter, else the first).", show_default=False
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder for results.json and report.html.", show_default=False),
    ] = None,
    base_model: BaseModel = None,
    config: ConfigFile = None,
    settings: Set = None,
    overwrite: Overwrite = None,
    quiet: Quiet = False,
) -> None:
    """Ask several models the same examples and show what decides between them.

    Metric with its 95 % interval, perplexity, answers that end by themselves, size, prefill and decode speed, peak memory; and against one
    of the stages, examples won and lost and whether chance explains them. Data, templates and split default to those of the first model
    of the list that phinetune trained.
    """
    from phinetune.cli.console import Terminal, comparison_lines, comparison_table, out
    from phinetune.cli.options import arguments
    from phinetune.workflow.compare import compare as stage

    options: dict[str, Any] = {
        "models": _named(models) if models else None,
        "data.path": data,
        "data.prompt": prompt,
        "data.completion": completion,
        "split": split,
        "metric": metric,
        "max_examples": max_examples,
        "max_new_tokens": max_new_tokens,
        "warmup": warmup,
        "repeats": repeats,
        "reference": reference,
        "output_dir": output,
        "base_model": base_model,
        "overwrite": overwrite,
    }
    with Terminal(quiet) as on_event:
        found = stage(**arguments(stage, config, settings or [], options), on_event=on_event)
    console = out()
    console.print(comparison_table(found.stages))
    for line in comparison_lines(found):
        console.print(line, markup=False)


def _named(models: list[str]) -> list[str] | dict[str, str]:
    """The models; if one is NAME=MODEL (and no folder of that name is there), all by name, the others by what they were given as."""
    pairs = [(m, *m.partition("=")) for m in models]
    named = [
        (name, model) if equals and name and model and not Path(m).exists() else (m, m)
        for m, name, equals, model in pairs
    ]
    return models if all(name == model for name, model in named) else dict(named)
