"""The comparison of stages as one HTML file: no scripts, nothing fetched, readable on a phone, in the dark and on paper.

It is made from what `results.json` holds and nothing else, so the two cannot disagree. Whatever comes from outside (answers, names,
paths) is escaped where it is put in. Not here: what was measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from phinetune.artifact import disk_errors
from phinetune.evaluation.columns import COLUMNS, NONE, cell_text, metric_name, pairs_text, shown_columns, size_text
from phinetune.evaluation.measurements import measurements
from phinetune.evaluation.pairs import Pairs
from phinetune.evaluation.report_style import STYLE


def write_report(file: Path, record: dict[str, Any]) -> None:
    """Write the report of `record`, what `results.json` holds of a comparison, whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(report_html(record), encoding="utf-8")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def report_html(record: dict[str, Any]) -> str:
    """The page."""
    stages, metric = record["stages"], metric_name(record["metric"])
    data = Path(str(record["data"]["path"])).name
    title = f"{len(stages)} stages, {stages[0]['count']} examples of {data}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_introduction(record))}</p>",
        f"<h2>{escape(metric.capitalize())}, with its 95 % interval</h2>",
        _bars(stages, record["reference"]),
        f"<p>{escape(explanation(record['reference']))}</p>",
        "<h2>All numbers</h2>",
        _table(stages, metric, record["reference"]),
        _footnotes(record),
        "<h2>Wrong answers</h2>",
        *(_wrong(stage) for stage in stages),
        "<h2>Where it comes from</h2>",
        _origin(record),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>phinetune: {escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def explanation(reference: str) -> str:
    """What the pairs and p values say."""
    return (
        f"Each stage is held against {reference} (the dashed line) on the same examples: won are those that it answers right and {reference} does not, lost "
        f"those the other way round. p is the probability that stages equally good differ at least as much by chance (exact two-sided "
        "McNemar test): where it is below 0.05, chance is a poor explanation; where it is not, these examples do not tell the two apart, "
        "even if their intervals look different."
    )


def _introduction(record: dict[str, Any]) -> str:
    part = {"test": "held-out ", "train": "trained "}.get(record["split"], "")
    made = str(record["made"]).replace("T", " ").replace("Z", " UTC")
    return f"Every stage answered the same {record['stages'][0]['count']} {part}examples, greedily. Measured {made}."


def _bars(stages: Sequence[dict[str, Any]], reference: str) -> str:
    """A bar for each stage: its interval, a mark at its value, and a dashed line at the reference's."""
    low, high = _scale([edge for s in stages for edge in (*s["interval"], s["value"])])

    def at(share: float) -> str:
        return f"{100 * (share - low) / (high - low):.2f}%"

    base = next(s["value"] for s in stages if s["stage"] == reference)
    rows = []
    for s in stages:
        first, last = s["interval"]
        said = f"{s['stage']}: {s['value']:.1%}, interval {first:.1%} to {last:.1%}"
        rows.append(
            f'<div class="bar"><span class="name">{escape(s["stage"])}</span>'
            f'<svg role="img" aria-label="{escape(said)}" width="100%" height="26">'
            f'<line class="track" x1="0" x2="100%" y1="13" y2="13"/>'
            f'<line class="mean" x1="{at(base)}" x2="{at(base)}" y1="0" y2="26"/>'
            f'<rect class="interval" x="{at(first)}" y="7" width="{100 * (last - first) / (high - low):.2f}%" height="12" rx="3"/>'
            f'<circle class="value" cx="{at(s["value"])}" cy="13" r="5"/></svg>'
            f'<span class="number">{s["value"]:.1%}</span></div>'
        )
    ends = "".join(f"<span>{share:.0%}</span>" for share in (low, (low + high) / 2, high))
    axis = f'<div class="bar ends"><span class="name"></span><span class="axis">{ends}</span></div>'
    return f'<div class="bars">{"".join(rows)}{axis}</div>'


def _scale(edges: Sequence[float]) -> tuple[float, float]:
    """The least range of whole tenths that holds every edge."""
    low, high = math.floor(min(edges) * 10) / 10, math.ceil(max(edges) * 10) / 10
    return (low, high) if high > low else (max(0.0, low - 0.1), min(1.0, high + 0.1))


def _table(stages: Sequence[dict[str, Any]], metric: str, reference: str) -> str:
    """A row a stage; on a phone, a card."""
    columns = shown_columns(s["metrics"] for s in stages)
    heads = [metric, "95 % interval", f"against {reference}", *columns.values(), "made in"]
    rows = []
    for s in stages:
        cells = [
            f"<strong>{s['value']:.1%}</strong> <small>{s['correct']}/{s['count']}</small>",
            f"{s['interval'][0]:.1%} to {s['interval'][1]:.1%}",
            escape(pairs_text(s["against"] and Pairs(**s["against"]))).replace("lost, ", "lost,<br>"),
            *(escape(cell_text(name, s["metrics"][name])) for name in columns),
            f"{s['seconds_made']:.0f} s" if s["seconds_made"] else NONE,
        ]
        named = "".join(
            f'<td data-label="{escape(name)}"><span>{cell}</span></td>' for name, cell in zip(heads, cells, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(s["stage"])}</th>{named}</tr>')
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ["stage", *heads])
    body = "\n".join(rows)
    return f'<div class="wide"><table class="numbers">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _footnotes(record: dict[str, Any]) -> str:
    """Why a number is missing, and what the columns mean."""
    known, asked = measurements(), shown_columns(s["metrics"] for s in record["stages"])
    gone = [
        f"{s['stage']}, {COLUMNS.get(name, name)}: {why}"
        for s in record["stages"]
        for name, why in s["missing"].items()
    ]
    meant = [
        f"{COLUMNS[name]}: {known[name].meaning}"
        for name in ("perplexity", "stop_rate", "size", "memory")
        if name in asked
    ]
    timed = (
        f"prefill: {known['prefill_p50'].meaning}; decode: tokens after it over the time they took; medians of "
        f"{record['effort']['repeats']} answers, one prompt at a time"
    )
    lines = [*gone, *record["notes"], *meant, timed]
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _wrong(stage: dict[str, Any]) -> str:
    """The first wrong answers of a stage, folded."""
    count, wrong = stage["count"] - stage["correct"], stage["wrong"]
    if not wrong:
        return f"<p>{escape(stage['stage'])}: none.</p>"
    rows = "".join(
        f'<tr><td data-label="place">{escape(w["place"])}</td><td data-label="reference"><pre>{escape(w["reference"])}</pre></td>'
        f'<td data-label="answer"><pre>{escape(w["answer"])}</pre></td></tr>'
        for w in wrong
    )
    shown = f", the first {len(wrong)}" if len(wrong) < count else ""
    return (
        f"<details><summary>{escape(stage['stage'])}: {count} of {stage['count']}{shown}</summary>\n"
        f'<div class="wide"><table class="text"><thead><tr><th>place</th><th>reference</th><th>answer</th></tr></thead><tbody>{rows}</tbody></table></div></details>'
    )


def _origin(record: dict[str, Any]) -> str:
    """Data, machine, versions, the models' folders and the command."""
    machine, data = record["machine"], record["data"]
    memory = f", {size_text(machine['memory'])}" if machine.get("memory") else ""
    lines = [
        ("data", f"{data['path']}, {record['split']} part, seed {data['seed']}"),
        ("machine", f"{machine['processor']}, {machine['cores']} cores{memory}, {machine['system']}"),
        ("threads", f"{machine['threads']} (torch)"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        *((s["stage"], s["path"]) for s in record["stages"]),
    ]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(text))}</dd>" for name, text in lines)
    return f'<dl>{rows}</dl>\n<p>The same again:</p>\n<pre class="command">{escape(record["command"])}</pre>'
