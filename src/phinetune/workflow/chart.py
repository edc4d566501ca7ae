"""The trials that no other one beats: as data, and drawn as an SVG file with every other trial around them.

Drawn are the first two objectives; with one objective only, it and the first constraint's metric. The same trials give the same bytes.
Not here: which trials are on the front (`outcome.py`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from phinetune.artifact import disk_errors
from phinetune.evaluation.measurements import measurements
from phinetune.events import Note, OnEvent
from phinetune.workflow.outcome import RunResult, TrialResult

FRONT, CHART = "pareto.json", "pareto.svg"
_SHOWN_UNITS = {"bytes": ("MB", 1e-6), "share": ("%", 100.0)}


def front(result: RunResult) -> dict[str, Any]:
    """The objectives, and the trials on the front with their values."""
    wanted = [o.metric for o in result.goals.objectives]
    return {
        "objectives": [o.text for o in result.goals.objectives],
        "front": [
            {"number": t.number, "chosen": t.chosen, "values": {name: t.values[name] for name in wanted}}
            for t in result.front
        ],
    }


def axis(metric: str) -> tuple[str, float]:
    """(label with its unit, factor from the value to that unit) of a metric."""
    found, name = measurements().get(metric), metric.replace("_", " ")
    unit, factor = _SHOWN_UNITS.get(found.unit, (found.unit, 1.0)) if found else ("", 1.0)
    return f"{name} ({unit})" if unit else name, factor


def draw_front(result: RunResult, file: Path, on_event: OnEvent) -> None:
    """Write the chart into `file`. A Note instead where matplotlib is missing or nothing can be drawn; an old chart is removed then."""
    metrics = list(dict.fromkeys([o.metric for o in result.goals.objectives] + result.goals.metrics))[:2]
    trials = [t for t in result.trials if not t.error and all(m in t.values for m in metrics)]
    reason = "no trial was scored" if not trials or not metrics else ""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        reason = "matplotlib is not installed: pip install 'phinetune[search]'"
    if reason:
        file.unlink(missing_ok=True)
        on_event(Note(f"{file.name}: not drawn, {reason}"))
        return
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with disk_errors(file.parent):
            _draw(trials, {t.number for t in result.front}, metrics, temporary)
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _draw(trials: list[TrialResult], on_front: set[int], metrics: list[str], file: Path) -> None:
    """The chart of `trials` over one metric (by number) or two. The user's own matplotlib settings do not reach it."""
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    labels = ["trial", axis(metrics[0])[0]] if len(metrics) == 1 else [axis(m)[0] for m in metrics]

    def places(some: list[TrialResult]) -> tuple[list[float], list[float]]:
        columns = [[t.values[m] * axis(m)[1] for t in some] for m in metrics]
        return ([float(t.number) for t in some], columns[0]) if len(metrics) == 1 else (columns[0], columns[1])

    with matplotlib.style.context(["default", {"svg.hashsalt": "phinetune", "svg.fonttype": "none"}]):
        figure = Figure(figsize=(7, 5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        best = sorted((t for t in trials if t.number in on_front), key=lambda t: places([t]))
        other = [t for t in trials if t.number not in on_front and t.feasible]
        missed = [t for t in trials if t.number not in on_front and not t.feasible]
        if missed:
            axes.plot(*places(missed), "o", mfc="none", mec="0.55", label="misses a constraint")
        if other:
            axes.plot(*places(other), "o", color="0.55", label="meets every constraint")
        if best:
            line = "-" if len(metrics) == 2 else ""
            axes.plot(
                *places(best),
                marker="o",
                linestyle=line,
                linewidth=1,
                color="tab:red",
                label="no other is better in all",
            )
        for trial in trials:
            x, y = places([trial])
            axes.annotate(str(trial.number), (x[0], y[0]), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(True, linewidth=0.3)
        axes.legend(fontsize=8)
        figure.savefig(file, format="svg", metadata={"Date": None, "Title": "phinetune"})
