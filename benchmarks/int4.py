"""What int4 leaves of a fine-tuning, way by way: adapters of several seeds, merged, exported, and every stage asked the same held-out phrases.

    python benchmarks/int4.py --data phrase-tone.jsonl [--seeds 0,1,2] [--ways default,searched,gptq,aware] [--work FOLDER]

`aware` is an adapter trained with `int4_aware` and exported with the nearest codes; the others are one plain adapter, quantized in
different ways. Answers are generated and compared whole (exact match), in torch for the adapter, in ONNX Runtime for int4. Also in the
results: size, what the survival gauge says, seconds of each export (right with nothing else on the machine). Stages that --work holds
already are not made again. Writes benchmarks/results/int4.json and prints a table. What int4_aware costs in training: train.py.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from train import about

import phinetune
from phinetune.artifact import folder_bytes, write_json

RESULTS = Path(__file__).with_name("results") / "int4.json"
WAYS = ("default", "searched", "gptq", "aware")


def quiet(event: Any) -> None:
    """Listens to nothing."""


def adapter(work: Path, data: Any, kind: str, seed: int) -> Path:
    """The adapter of a seed, plain or `aware`."""
    config: dict[str, Any] = {"seed": seed, **({"int4_aware": True} if kind == "aware" else {})}
    return phinetune.finetune("smollm2-135m", data, config, output_dir=work / f"{kind}{seed}", on_event=quiet).folder


def exact(folder: Path) -> float:
    """Exact match on the held-out phrases, answers generated."""
    found: float = phinetune.assess(str(folder), metrics="exact_match", on_event=quiet).values["exact_match"]
    return round(found, 4)


def exported(work: Path, trained: Path, way: str) -> dict[str, Any]:
    """The adapter in `trained` merged and exported by `way`, and its figures."""
    merged = phinetune.merge(str(trained), work / f"m-{trained.name}", on_event=quiet).folder
    config = {"algorithm": "default" if way == "aware" else way, "max_drop": "any"}
    result = phinetune.export(str(merged), work / f"o-{trained.name}-{way}", config, on_event=quiet)
    survival = result.manifest["survival"]
    return {
        "exact": exact(result.folder),
        "bytes": folder_bytes(result.folder),
        "export_seconds": result.manifest["seconds"],
        "tokens_alike": survival["answers"]["tokens_alike"],
        "loss": survival["answers"]["loss"],
        "kept": survival["weights"]["kept"],
    }


def measure(work: Path, data: Any, seeds: list[int], ways: list[str]) -> dict[str, Any]:
    """seed -> adapters and ways with their figures."""
    found: dict[str, Any] = {}
    for seed in seeds:
        kinds = [kind for kind in ("plain", "aware") if kind == "plain" or "aware" in ways]
        trained = {kind: adapter(work, data, kind, seed) for kind in kinds}
        found[str(seed)] = {
            "adapters": {kind: {"exact": exact(folder)} for kind, folder in trained.items()},
            "ways": {way: exported(work, trained["aware" if way == "aware" else "plain"], way) for way in ways},
        }
        print(f"seed {seed}: {found[str(seed)]}", flush=True)
    return found


def table(found: dict[str, Any], ways: list[str]) -> str:
    """A row for each way: exact match of its adapter and of int4 by seed, the mean difference, size."""
    lines = ["| codes | adapter | int4 | mean difference | size |", "| --- | --- | --- | --- | --- |"]
    for way in ways:
        kind = "aware" if way == "aware" else "plain"
        before = [seed["adapters"][kind]["exact"] for seed in found.values()]
        after = [seed["ways"][way]["exact"] for seed in found.values()]
        size = statistics.mean(seed["ways"][way]["bytes"] for seed in found.values()) / 1e6
        change = 100 * (statistics.mean(after) - statistics.mean(before))
        name = "int4_aware training, `default`" if way == "aware" else f"`{way}`"
        shares = [", ".join(f"{100 * x:.1f}" for x in row) for row in (before, after)]
        lines.append(f"| {name} | {shares[0]} % | {shares[1]} % | {change:+.1f} points | {size:.1f} MB |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", required=True, help="a file with the columns phrase and tone")
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--ways", default=",".join(WAYS))
    options.add_argument("--work", type=Path, help="where the stages are kept (default: a temporary folder)")
    a = options.parse_args()
    data = {"path": a.data, "prompt": "What is the tone of this phrase? {phrase}", "completion": "{tone}"}
    ways = a.ways.split(",")
    with tempfile.TemporaryDirectory(prefix="phinetune-bench-") as scratch:
        found = measure(a.work or Path(scratch), data, [int(s) for s in a.seeds.split(",")], ways)
    write_json(RESULTS, {"data": Path(a.data).name, "seeds": found, **about()})
    print(table(found, ways))


if __name__ == "__main__":
    main()
