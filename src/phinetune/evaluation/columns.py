"""What the numbers of a stage are called in tables, and how they read there: the same in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from phinetune.evaluation.measurements import measurements
from phinetune.evaluation.pairs import Pairs

COLUMNS = {
    "perplexity": "perplexity",
    "stop_rate": "ends by itself",
    "size": "on disk",
    "prefill_p50": "prefill tokens/s",
    "throughput_p50": "decode tokens/s",
    "memory": "peak memory",
}
"""The columns of a comparison beside the metric and its interval: measurement and head."""
NONE = "–"


def shown_columns(rows: Iterable[Mapping[str, object]]) -> dict[str, str]:
    """Those of `COLUMNS` that any of the rows' metrics has, or has a reason for not having."""
    asked = {name for metrics in rows for name in metrics}
    return {name: head for name, head in COLUMNS.items() if name in asked}


def cell_text(name: str, value: float | None) -> str:
    """The number called `name` in its column: rates in whole tokens, since their unit is in the head; perplexities in four digits."""
    if value is not None and name == "perplexity":
        return f"{value:#.4g}".rstrip(".")
    unit = measurements()[name].unit
    return f"{value:.0f}" if value is not None and unit == "tokens/s" else number_text(value, unit)


def number_text(value: float | None, unit: str) -> str:
    """`value` in `unit`, as the table of measurements calls it; a dash where there is none."""
    if value is None:
        return NONE
    if unit == "bytes":
        return size_text(value)
    return f"{value:.1%}" if unit == "share" else f"{value:.4g} {unit}".rstrip()


def size_text(size: float) -> str:
    """Bytes for people: 90.0 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def metric_name(metric: str) -> str:
    """A metric's name for people: exact match."""
    return metric.replace("_", " ")


def pairs_text(against: Pairs | None) -> str:
    """How a stage did against the reference: 1 won, 6 lost, p = 0.12."""
    if against is None:
        return "reference"
    p = against.p_value
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3f}"
    return f"{against.won} won, {against.lost} lost, {shown}"
