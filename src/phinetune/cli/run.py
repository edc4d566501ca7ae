"""`phinetune run` and `phinetune migrate`: one file drives it all. Prints the plan, what happens, the trials, and where the model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from phinetune.cli.flags import Quiet, Set
from phinetune.errors import ConfigError

File = Annotated[
    str | None,
    typer.Argument(help="Workflow file (YAML or JSON): phinetune's own, or Microsoft Olive's.", show_default=False),
]


def run_file(
    file: File = None,
    config: Annotated[
        str | None, typer.Option("--config", "--run-config", "-c", help="The same as FILE.", show_default=False)
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Output folder.", show_default=False)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan; compute nothing, fetch nothing.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(metavar="PASS", help="Run this pass alone, on what earlier runs left.", show_default=False),
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="PASS", help="Stop after this pass.", show_default=False)] = None,
    worker: Annotated[
        bool,
        typer.Option(
            "--worker", help="Join the search that another run of this file has begun, and leave the result to it."
        ),
    ] = False,
    list_required_packages: Annotated[
        bool, typer.Option("--list-required-packages", help="Print the packages that the file's passes need.")
    ] = False,
    cache_dir: Annotated[
        str | None, typer.Option("--cache-dir", help="Folder of finished passes.", show_default=False)
    ] = None,
    settings: Set = None,
    quiet: Quiet = False,
) -> None:
    """Run a workflow file: its passes, from what is cached; score, choose, deliver.

    Finished passes are kept by content: what has not changed is not done again, and an interrupted run goes on where it stopped.
    --set passes.lora.r=8 changes any key. Exit code 3: no trial meets every constraint.
    """
    from phinetune.cli.console import Terminal
    from phinetune.config import located
    from phinetune.olive.reading import read_any
    from phinetune.workflow.plan import prepare
    from phinetune.workflow.requirements import required_packages

    chosen = file or config
    if chosen is None or (file and config and file != config):
        raise ConfigError("which file? give one workflow file", "phinetune run CONFIG")
    changes = [*(settings or [])]
    changes += [f"output_dir={output}"] if output else []
    changes += [f"cache_dir={cache_dir}"] if cache_dir else []
    with Terminal(quiet) as on_event:
        workflow_config, entries = read_any(chosen, changes, on_event)
        if list_required_packages:
            typer.echo("\n".join(required_packages(workflow_config, entries)))
            return
        with located(chosen):
            workflow = prepare(workflow_config, entries, on_event, fetch=not dry_run)
        if not dry_run:
            from phinetune.workflow.run import run_workflow

            result = run_workflow(workflow, only, until, worker, on_event)
    if dry_run:
        _show_plan(workflow, only, until)
    elif not worker:
        _show_result(result, workflow)


def migrate(
    file: Annotated[str, typer.Argument(help="A configuration file of Microsoft Olive.", show_default=False)],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="File to write; default: the terminal.", show_default=False)
    ] = None,
) -> None:
    """Write an Olive configuration as phinetune's own, with a comment for each key that was renamed, changed or dropped."""
    from phinetune.config import read_config
    from phinetune.olive.migrate import migrate as translate_file

    text = translate_file(read_config(file), file, Path(file).absolute().parent)
    if output is None:
        typer.echo(text)
        return
    target = Path(output).expanduser()
    if target.exists():
        raise ConfigError(f"{target}: exists already; it is left as it is", "choose another file")
    target.write_text(text, encoding="utf-8")
    typer.echo(str(target))


def _show_plan(workflow: Any, only: str | None, until: str | None) -> None:
    """The steps as a table, and what else there is to know before they run."""
    from phinetune.cli.console import out
    from phinetune.evaluation.columns import size_text
    from phinetune.workflow.forecast import forecast

    plan = forecast(workflow, only, until)
    console = out()
    console.print(table(("pass", "type", "takes", "gives", "cached", "memory", "time"), [
        (s.name, s.type, s.takes, s.gives, "yes" if s.cached else "no", size_text(s.memory) if s.memory else "-", f"{s.seconds:.0f} s" if s.seconds is not None else "-")
        for s in plan.steps
    ]))  # fmt: skip
    for line in plan.lines:
        console.print(line, markup=False)


def _show_result(result: Any, workflow: Any) -> None:
    """The trials as a table, the chosen one, and where its model is."""
    from phinetune.cli.console import out
    from phinetune.workflow.deliver import results_table

    console = out()
    header, rows = results_table(result)
    if rows and any(len(row) > 1 for row in rows):
        console.print(table(header, rows))
    best = result.best
    if best is not None:
        console.print(
            f"{Path(workflow.config.output_dir) / 'model'}: {best.steps[-1].type}, trial {best.number} of {len(result.trials)}",
            markup=False,
        )


def table(header: Any, rows: Any) -> Any:
    """Rows of values under a header, as every listing of the command line looks."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table
