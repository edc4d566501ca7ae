"""`phinetune info`: what this machine has and lacks, for reading or as JSON. Finding it out is systems/machine.py's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from phinetune.systems.machine import Machine


def info(
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder that will be written to (default: this one).", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what this machine has to compute with, and what is missing.

    Processor, memory, accelerators, ONNX Runtime's execution providers, versions, free disk. Nothing is measured: the bfloat16
    speed-up is shown once a training has found it out.
    """
    import dataclasses
    import json

    from phinetune.systems.machine import this_machine

    machine = this_machine(Path(output) if output else None)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(machine), indent=2, ensure_ascii=False))
        return
    from rich.table import Table
    from rich.text import Text

    from phinetune.cli.console import out

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, text in _rows(machine):
        table.add_row(name, Text(text))
    console = out()
    console.print(table)
    for line in machine.missing:
        console.print(f"missing: {line}", markup=False)


def _rows(machine: Machine) -> list[tuple[str, str]]:
    """(name, text) of each line to show."""
    from phinetune.evaluation.columns import size_text

    def size(size_bytes: int | None) -> str:
        return "not known" if size_bytes is None else size_text(size_bytes)

    accelerators = [
        f"{a.device}: {a.name}, " + (size(a.memory) if a.memory else "shares the machine's memory")
        for a in machine.accelerators
    ]
    speedups = [f"{factor:g} times as fast as float32 on {kind}" for kind, factor in machine.bfloat16_speedup.items()]
    return [
        ("system", machine.system),
        ("processor", f"{machine.processor}, {machine.cores} core{'' if machine.cores == 1 else 's'}"),
        ("instruction sets", " ".join(machine.instruction_sets) or "none of those that matter"),
        ("memory", f"{size(machine.memory)}, {size(machine.available_memory)} available"),
        ("bfloat16", ", ".join(speedups) or "not measured yet"),
        *[("accelerator", text) for text in accelerators or ["none that torch can use"]],
        ("ONNX Runtime on", " ".join(machine.providers) or "nothing: it is not there"),
        *[("free disk", f"{size(free)} for {folder}") for folder, free in machine.free_disk.items()],
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
    ]
