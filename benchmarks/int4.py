"""What int4 leaves of a fine-tuning, way by way: adapters of several seeds, merged, exported, and every stage asked the same held-out phrases.

    python benchmarks/int4.py --data phrase-tone.jsonl [--seeds 0,1,2] [--ways default,searched,gptq,mixed,aware,nf4,grid] [--work FOLDER]

`default`, `searched`, `gptq` and `mixed` are one plain adapter, quantized in different ways; `aware` one that was trained with `int4_aware`,
with the nearest codes; `nf4` one that was trained over a base in NF4, merged and exported as `phinetune export` does by itself; `grid`
one that was trained over the graph's own integers, shipped beside them. Answers are generated and compared whole (exact match), in torch for the adapter, in ONNX Runtime for int4. Also in the
results: size, what the survival gauge says, seconds of each export (right with nothing else on the machine). Stages that --work holds
already are not made again. --data is a file with the columns phrase and tone, or `tone`, the bundled set. What was measured replaces what
benchmarks/results/int4.json held of the same set, seed and way; prints its table. What int4_aware costs in training: train.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from train import about

import phinetune
from phinetune.artifact import folder_bytes, write_json

RESULTS = Path(__file__).with_name("results") / "int4.json"
WAYS = ("default", "searched", "gptq", "mixed", "aware", "nf4", "grid")
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "aware": ({"int4_aware": True}, {}),
    "nf4": ({}, {"load_in_4bit": True}),
    "grid": ({}, {"load_on_grid": True}),
}
"""Kind of adapter -> what its training_config and model_kwargs say."""
ALGORITHMS = {"aware": "default", "nf4": "auto", "grid": "auto"}
NAMES = {
    "aware": "int4_aware training, `default`",
    "nf4": "QLoRA over NF4, merged, `auto`",
    "grid": "QLoRA over the graph's integers, beside them",
}


def kind_of(way: str) -> str:
    """The kind of adapter that a way starts from."""
    return way if way in KINDS else "plain"


def quiet(event: Any) -> None:
    """Listens to nothing."""


def adapter(work: Path, data: Any, kind: str, seed: int) -> Path:
    """The adapter of a kind and a seed."""
    training, kwargs = KINDS[kind]
    config = {"seed": seed, **training}
    folder = work / f"{kind}{seed}"
    return phinetune.finetune(
        "smollm2-135m", data, config, None, kwargs or None, output_dir=folder, on_event=quiet
    ).folder


def exact(folder: Path) -> float:
    """Exact match on the held-out phrases, answers generated."""
    found: float = phinetune.assess(str(folder), metrics="exact_match", on_event=quiet).values["exact_match"]
    return round(found, 4)


def exported(work: Path, trained: Path, way: str) -> dict[str, Any]:
    """The adapter in `trained` exported by `way`, merged before but where it goes beside, and its figures."""
    source = trained
    if way != "grid":
        source = phinetune.merge(str(trained), work / f"m-{trained.name}", on_event=quiet).folder
    config = {"algorithm": ALGORITHMS.get(way, way), "max_drop": "any"}
    result = phinetune.export(str(source), work / f"o-{trained.name}-{way}", config, on_event=quiet)
    survival = result.manifest["survival"]
    return {
        "exact": exact(result.folder),
        "bytes": folder_bytes(result.folder),
        "export_seconds": result.manifest["seconds"],
        "tokens_alike": survival["answers"]["tokens_alike"],
        "loss": survival["answers"]["loss"],
        **({"kept": survival["weights"]["kept"]} if "weights" in survival else {}),
    }


def measure(work: Path, data: Any, seed: int, ways: list[str]) -> dict[str, Any]:
    """Adapters and ways of one seed with their figures."""
    kinds = list(dict.fromkeys(kind_of(way) for way in ways))
    trained = {kind: adapter(work, data, kind, seed) for kind in kinds}
    return {
        "adapters": {kind: {"exact": exact(folder)} for kind, folder in trained.items()},
        "ways": {way: exported(work, trained[kind_of(way)], way) for way in ways},
    }


def keep(name: str, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    """Put the figures of a set and a seed into the results, beside those of other ways; the seeds of that set."""
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"sets": {}}
    seeds: dict[str, Any] = results["sets"].setdefault(name, {})
    known = seeds.setdefault(str(seed), {"adapters": {}, "ways": {}})
    for part in ("adapters", "ways"):
        known[part] |= found[part]
    write_json(RESULTS, {**results, **about()})
    return seeds


def table(found: dict[str, Any]) -> str:
    """A row for each way: exact match of its adapter and of int4 by seed, the mean difference, size."""
    lines = ["| codes | adapter | int4 | mean difference | size |", "| --- | --- | --- | --- | --- |"]
    for way in WAYS:
        seeds = [seed for _, seed in sorted(found.items()) if way in seed["ways"]]
        if not seeds:
            continue
        before = [seed["adapters"][kind_of(way)]["exact"] for seed in seeds]
        after = [seed["ways"][way]["exact"] for seed in seeds]
        size = statistics.mean(seed["ways"][way]["bytes"] for seed in seeds) / 1e6
        change = 100 * (statistics.mean(after) - statistics.mean(before))
        shares = [", ".join(f"{100 * x:.1f}" for x in row) for row in (before, after)]
        name = NAMES.get(way, f"`{way}`")
        lines.append(f"| {name} | {shares[0]} % | {shares[1]} % | {change:+.1f} points | {size:.1f} MB |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", required=True, help="a file with the columns phrase and tone, or tone")
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--ways", default=",".join(WAYS))
    options.add_argument("--work", type=Path, help="where the stages are kept (default: a temporary folder)")
    a = options.parse_args()
    columns = {"prompt": "What is the tone of this phrase? {phrase}", "completion": "{tone}"}
    data: Any = a.data if a.data == "tone" else {"path": a.data, **columns}
    seeds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="phinetune-bench-") as scratch:
        for seed in map(int, a.seeds.split(",")):
            found = measure(a.work or Path(scratch), data, seed, a.ways.split(","))
            seeds = keep(Path(a.data).stem, seed, found)
            print(f"seed {seed}: {found}", flush=True)
    print(table(seeds))


if __name__ == "__main__":
    main()
