"""results/train.json as people read it: a table for the terminal, and README's tables between their markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "train.json"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OTHERS = {
    "train-avx512.json": "AMD EPYC, Zen 4: bfloat16 in AVX-512, no AMX",
    "train-float32.json": "AMD EPYC, Zen 3: no bfloat16, all in float32",
}
"""Results of other kinds of processors, and what they are called; README has the medians of the first file's and these."""


def read_results(file: Path = RESULTS) -> dict[str, Any]:
    """The results, or an empty dictionary where there are none of today's shape."""
    if not file.is_file():
        return {}
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {key: results[key] for key in ("workloads", "first_step") if key in results}


def terminal_table(results: dict[str, Any]) -> str:
    """Every stack of every workload: median, least and most tokens per second, memory, first and last loss; then ratios and shares."""
    lines = []
    for workload in results.get("workloads", {}).values():
        lines.append(
            f"{workload['title']}, {sum(workload['tokens_per_step']) / len(workload['tokens_per_step']):.0f} tokens a step"
        )
        lines.append(f"  {'stack':<28}{'tokens/s':>9}{'from':>9}{'to':>9}{'peak GB':>9}{'loss':>16}")
        for name, s in workload["stacks"].items():
            rates = s["tokens_per_second"]
            loss = f"{s['losses'][0]:.3f} - {s['losses'][-1]:.3f}"
            lines.append(
                f"  {name:<28}{s['median']:>9.1f}{min(rates):>9.1f}{max(rates):>9.1f}{s['peak_gb']:>9.2f}{loss:>16}"
            )
        for key, r in workload["ratios"].items():
            lines.append(
                f"  against {key} ({r['stack']}): {r['median']:.2f} x the speed, {r['memory']:.2f} x the memory"
            )
        if "arithmetic" in workload:
            a = workload["arithmetic"]
            lines.append(
                f"  share of {a['gemm_gflops']:.0f} GFLOP/s in {a.get('dtype', 'bfloat16')}: {a['share_counted']:.2f} counted, {a['share_by_formula']:.2f} by formula"
            )
            unknown = a["counted"]["without_formula"]
            lines += [f"  not counted: {unknown}"] if unknown else []
    if "first_step" in results:
        f = results["first_step"]
        lines.append(f"from the command to the end of the first step: {f['median_step']:.2f} s")
    return "\n".join(lines)


def readme_table(results: dict[str, Any]) -> str:
    """README's table, in Markdown, ending in a newline: the fastest stack of each group, then the ratios."""
    workloads = list(results["workloads"].values())
    groups = list(dict.fromkeys(s["group"] for w in workloads for s in w["stacks"].values()))
    lines = ["| tokens per second, peak memory | " + " | ".join(w["title"] for w in workloads) + " |"]
    lines.append("| --- |" + " --- |" * len(workloads))
    for group in groups:
        ours = group == "phinetune"
        cells = [_cell([s for s in w["stacks"].values() if s["group"] == group]) for w in workloads]
        lines.append("| " + " | ".join(f"**{text}**" if ours else text for text in (group, *cells)) + " |")
    for key in dict.fromkeys(key for w in workloads for key in w["ratios"]):
        cells = [_ratio(w["ratios"].get(key)) for w in workloads]
        name = "the fastest PEFT loop" if key == "PEFT" else key
        lines.append(f"| phinetune against {name} | " + " | ".join(cells) + " |")
    if any("arithmetic" in w for w in workloads):
        shares = [f"{w['arithmetic']['share_counted']:.0%}" if "arithmetic" in w else "-" for w in workloads]
        dtypes = {w["arithmetic"].get("dtype", "bfloat16") for w in workloads if "arithmetic" in w}
        rate = " and ".join(sorted("bf16" if dtype == "bfloat16" else dtype for dtype in dtypes))
        lines.append(f"| phinetune's share of the machine's {rate} GEMM rate | " + " | ".join(shares) + " |")
    if "first_step" in results:
        first = results["first_step"]
        plain = (
            " (a plain installation: PEFT and bitsandbytes would be imported as well)"
            if first.get("beside") == []
            else ""
        )
        lines += ["", f"From the command to the end of the first step: {first['median_step']:.1f} s{plain}."]
    return "\n".join(lines) + "\n"


def others_table(folder: Path = RESULTS.parent) -> str:
    """README's table of the other processors, in Markdown, ending in a newline: what phinetune reaches there and beside whom."""
    lines = [
        "| 2 cores of | workload | phinetune | against TRL's best | against the fastest PEFT loop | of the GEMM rate |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    first_steps = []
    for file, name in OTHERS.items():
        results = read_results(folder / file)
        if "first_step" in results:
            first_steps.append(f"{results['first_step']['median_step']:.1f} s on the {name.partition(':')[0]}")
        for workload in results["workloads"].values():
            ratios = workload["ratios"]
            of_trl = [ratio for key, ratio in ratios.items() if key.startswith("TRL")]
            best = min(of_trl, key=lambda ratio: ratio["median"], default=None)
            ours = _cell([s for s in workload["stacks"].values() if s["group"] == "phinetune"])
            share = f"{workload['arithmetic']['share_counted']:.0%}"
            cells = name, workload["title"], ours, _ratio(best), _ratio(ratios.get("PEFT")), share
            lines.append("| " + " | ".join(cells) + " |")
            name = ""
    if first_steps:
        lines += ["", f"To the end of the first step: {', '.join(first_steps)}."]
    return "\n".join(lines) + "\n"


def _cell(stacks: list[dict[str, Any]]) -> str:
    if not stacks:
        return "-"
    best = max(stacks, key=lambda s: s["median"])
    return f"{best['median']:.0f}, {best['peak_gb']:.1f} GB"


def _ratio(ratio: dict[str, Any] | None) -> str:
    return f"{ratio['median']:.1f} x, {ratio['memory']:.2f} x" if ratio else "-"


def between_markers(text: str) -> tuple[str, str, str]:
    """(before, between, after) of a page with the two markers on lines of their own. Raises ValueError without them."""
    before, found, rest = text.partition(f"{BEGIN}\n")
    between, also, after = rest.partition(END)
    if not found or not also:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}")
    return before + BEGIN + "\n", between, END + after


def write_readme(results: dict[str, Any], readme: Path = README) -> None:
    """Puts the table between README's markers. Exits if there are no results."""
    if "workloads" not in results:
        raise SystemExit("no results of this benchmark yet: run it first")
    before, _, after = between_markers(readme.read_text(encoding="utf-8"))
    readme.write_text(before + readme_table(results) + "\n" + others_table() + after, encoding="utf-8")
