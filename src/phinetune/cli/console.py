"""What the terminal shows: progress, notes, tables, errors. Progress and notes go to stderr, results to stdout."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from phinetune.errors import PhinetuneError
from phinetune.evaluation.columns import (
    COLUMNS,
    cell_text,
    metric_name,
    number_text,
    pairs_text,
    shown_columns,
    size_text,
)
from phinetune.evaluation.measurements import measurements
from phinetune.evaluation.results import StageResult
from phinetune.events import Event, Note, Progress

if TYPE_CHECKING:
    from phinetune.workflow.compare import Comparison

_PLAIN_EVERY = 10.0  # seconds between progress lines where stderr is not a terminal


class Terminal:
    """Draws events: one live bar a stage on a terminal, a line now and then elsewhere. Use as `with Terminal() as on_event`."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
        self.live = self.err.is_terminal and not quiet
        self.bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
        )
        self.task: TaskID | None = None
        self.stage = ""
        self.said: set[str] = set()
        self.last_line = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self._note(event)
        elif not self.quiet:
            self._progress(event)

    def _note(self, note: Note) -> None:
        if note.text in self.said or (self.quiet and not note.warning):
            return
        self.said.add(note.text)
        self.err.print(Text(("warning: " if note.warning else "") + note.text, style="yellow" if note.warning else ""))

    def _progress(self, event: Progress) -> None:
        figures = "  ".join(f"{k} {v:.3g}" for k, v in event.figures.items() if k in ("loss", "exact_match"))
        new = event.stage != self.stage
        self.stage = event.stage
        if self.live:
            if new or self.task is None:
                if self.task is not None:
                    self.bars.remove_task(self.task)
                self.task = self.bars.add_task(event.stage, total=event.total, figures=figures)
            self.bars.update(self.task, completed=event.done, total=event.total, figures=figures)
            return
        finished = event.total is not None and event.done >= event.total
        if new or finished or time.monotonic() - self.last_line > _PLAIN_EVERY:
            self.last_line = time.monotonic()
            of = f" of {event.total}" if event.total is not None else ""
            self.err.print(Text(f"{event.stage}: {event.done}{of}  {figures}".rstrip()))

    def __enter__(self) -> Terminal:
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.live:
            self.bars.stop()


def show_error(error: PhinetuneError) -> None:
    """`error: ...` and `hint: ...` on stderr, no traceback."""
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    for problem in error.problems:
        err.print(Text.assemble(("error: ", "bold red"), problem))
    if error.hint:
        err.print(Text.assemble(("hint: ", "bold"), error.hint))


def stage_table(stages: list[StageResult]) -> Table:
    """The stages side by side."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for name in ("stage", "exact match", "of", "95 % interval", "ends by itself", "on disk", "made in", "evaluated in"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for s in stages:
        table.add_row(
            s.stage,
            f"{s.value:.1%}",
            f"{s.correct}/{s.count}",
            f"{s.interval[0]:.1%} - {s.interval[1]:.1%}",
            f"{s.stop_rate:.0%}",
            size_text(s.size_bytes),
            f"{s.seconds_made:.1f} s" if s.seconds_made else "-",
            f"{s.seconds_evaluated:.1f} s",
        )
    return table


def comparison_table(stages: list[StageResult]) -> Table:
    """What decides between the stages, side by side."""
    metric = metric_name(stages[0].metric)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("stage", vertical="bottom", max_width=24, overflow="fold")
    columns = shown_columns(s.metrics for s in stages)
    for name in (metric, "of", "95 % interval", *columns.values()):
        table.add_column(_on_two_lines(name), justify="right", vertical="bottom")
    for s in stages:
        table.add_row(
            Text(s.stage),
            f"{s.value:.1%}",
            f"{s.correct}/{s.count}",
            f"{s.interval[0]:.1%} - {s.interval[1]:.1%}",
            *(cell_text(name, s.metrics.get(name)) for name in columns),
        )
    return table


def _on_two_lines(name: str) -> str:
    """A head of two words or more, broken before its last one."""
    return "\n".join(name.rsplit(" ", 1))


def comparison_lines(found: Comparison) -> list[str]:
    """How each stage did against the reference, and why a number is missing."""
    stages, reference = found.stages, found.reference
    lines = [f"{s.stage} against {reference}: {pairs_text(s.against)}" for s in stages if s.against is not None]
    return lines + [
        f"{s.stage}: no {COLUMNS.get(name, name)}: {why}" for s in stages for name, why in s.missing.items()
    ]


def metric_lines(stage: StageResult) -> list[str]:
    """A line for each number beyond exact match: name, value, unit."""
    known = measurements()
    width = max(map(len, stage.metrics), default=0)
    return [
        f"{name:<{width}}   {number_text(value, known[name].unit)}"
        for name, value in stage.metrics.items()
        if name != "exact_match"
    ]


def out() -> Console:
    """The console for results, on stdout; not narrower than the tables where it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 130)
