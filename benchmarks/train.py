"""LoRA training steps of phinetune, TRL's SFTTrainer and plain loops over PEFT layers, in turn, in one run on one machine.

    python benchmarks/train.py [--workload short8,short16,long] [--data phrase-tone.jsonl] [--rounds 5] [--steps 2] [--stack NAME ...]
    python benchmarks/train.py --first-step [--runs 5]     time from the command to the first optimizer step
    python benchmarks/train.py --readme                    writes README's table from the results, measures nothing

Same model, rows, batches and seed for every stack (`stacks.py`), each in a process of its own, one computing at a time, in another
order each round. Tokens are real tokens, without padding. Writes benchmarks/results/train.json: what was measured replaces what the
file held of the same workloads. Stops if the stacks' first losses differ by more than bfloat16's noise, since then they do not train
the same thing. Run it with nothing else on the machine; `long` needs about 16 GB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from stacks import RANK, STACKS, Stack, missing
from tables import RESULTS, read_results, terminal_table, write_readme
from workloads import WORKLOADS, Workload, write_rows

SAME_LOSS = 0.02
"""First losses may differ by this share of their mean: what bfloat16 and the order of sums do to them."""


class Worker:
    """One stack's process (see worker.py). `ask` sends an object and waits for the answer."""

    def __init__(self, stack: Stack, model: Path, rows: Path, batch: int, steps: int, log: Path) -> None:
        self.stack, self.log = stack, log
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}
        with log.open("w", encoding="utf-8") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **quiet},
            )
        self.ask({"stack": stack.name, "model": str(model), "rows": str(rows), "batch": batch, "steps": steps})

    def ask(self, message: dict[str, Any] | None = None) -> dict[str, Any]:
        """The next answer, after sending `message` if there is one. Exits with the end of the worker's log if it died."""
        assert self.process.stdin is not None and self.process.stdout is not None  # noqa: S101
        line = ""
        with contextlib.suppress(BrokenPipeError):
            if message is not None:
                self.process.stdin.write(json.dumps(message) + "\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-15:])
            raise SystemExit(f"{self.stack.name}: its process ended with exit code {self.process.wait()}\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """Ends the process, wherever it is."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def started(stacks: Sequence[Stack], model: Path, folder: Path, batch: int, steps: int) -> Iterator[list[Worker]]:
    """A worker for each stack, ready to train; ended afterwards."""
    workers: list[Worker] = []
    try:
        for i, stack in enumerate(stacks):
            print(f"  starting {stack.name}", file=sys.stderr, flush=True)
            workers.append(Worker(stack, model, folder, batch, steps, folder / f"{i}.log"))
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def measure(workload: Workload, stacks: Sequence[Stack], model: Path, a: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one workload; see README.md here for what the result holds. Exits if the stacks do not train the same thing."""
    a_round = a.warm + a.steps
    steps = a_round * (
        a.rounds + 1
    )  # the first round is not timed: losses are compared, phinetune's operations counted
    with tempfile.TemporaryDirectory(prefix="phinetune-bench-") as name:
        folder = Path(name)
        examples = write_rows(workload, steps, a.data, model, a.seed, folder)
        lengths = [len(row["input_ids"]) for row in examples]
        per_step = [sum(lengths[i * workload.batch :][: workload.batch]) for i in range(steps)]
        rounds: list[list[dict[str, Any]]] = [[] for _ in stacks]
        rates: list[dict[str, float]] = []
        with started(stacks, model, folder, workload.batch, steps) as workers:
            for round_ in range(a.rounds + 1):
                for i in [(round_ + i) % len(workers) for i in range(len(workers))]:
                    worker = workers[i]
                    ours = worker.stack.group == "phinetune"
                    rated = ours and round_ and len(rates) < round_
                    before = machine_rates(model, per_step[0]) if rated else {}
                    answer = worker.ask({"warm": a.warm, "steps": a.steps, "count": ours and not round_})
                    if rated:
                        after = machine_rates(model, per_step[0])
                        rates.append({name: round((rate + after[name]) / 2, 1) for name, rate in before.items()})
                    rounds[i].append(answer)
                    print(f"  round {round_}  {worker.stack.name}: {answer['seconds'] / a.steps:.2f} s a step",
                          file=sys.stderr, flush=True)  # fmt: skip
                if not round_:
                    alike = [(w, r) for w, r in zip(workers, rounds, strict=True) if not w.stack.rounded]
                    check_first_losses({w.stack.name: r[0]["losses"][0] for w, r in alike})
            ends = [worker.ask() for worker in workers]
    timed = [sum(per_step[r * a_round + a.warm : (r + 1) * a_round]) for r in range(1, a.rounds + 1)]
    result: dict[str, Any] = {"title": workload.title, "batch": workload.batch, "tokens_per_step": per_step}
    result["stacks"] = {}
    for stack, answers, end in zip(stacks, rounds, ends, strict=True):
        check_tokens(stack.name, end["tokens"], per_step)
        result["stacks"][stack.name] = figures(stack, answers, end, timed, a.steps)
    result["ratios"] = ratios(result["stacks"])
    result["rates"] = rates
    for stack, answers in zip(stacks, rounds, strict=True):
        if answers[0]["count"]:
            counted = range(a.warm, a_round)
            result["arithmetic"] = arithmetic(
                answers[0]["count"],
                result["stacks"][stack.name]["tokens_per_second"],
                [r["square_2048"] for r in rates],
                sum(per_step[i] for i in counted),
                sum(label != -100 for row in examples[a.warm * workload.batch : a_round * workload.batch] for label in row["labels"][1:]),
                model,
            )  # fmt: skip
    return result


def check_first_losses(losses: dict[str, float]) -> None:
    """Exits unless all are alike: before any learning, B = 0 and every stack computes the base model's own loss."""
    mean = statistics.mean(losses.values())
    if not max(losses.values()) - min(losses.values()) <= SAME_LOSS * mean:  # also where one is not a number
        listed = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        raise SystemExit(f"the stacks do not train the same thing; losses of the first step: {listed}")


def check_tokens(name: str, found: list[int], expected: list[int]) -> None:
    """Exits unless a stack saw the tokens of every step, or, where it knows no more, as many in all."""
    if found not in (expected, [sum(expected)]):
        raise SystemExit(f"{name}: trained on {found} tokens instead of {expected}")


def figures(stack: Stack, answers: list[Any], end: Any, tokens: list[int], steps: int) -> dict[str, Any]:
    """One stack's numbers from its answers (the first round's are not timed); `tokens` of each timed round."""
    rates = [round(n / answer["seconds"], 1) for n, answer in zip(tokens, answers[1:], strict=True)]
    return {
        "group": stack.group,
        "options": stack.options,
        "tokens_per_second": rates,
        "median": round(statistics.median(rates), 1),
        "step_seconds": [round(answer["seconds"] / steps, 4) for answer in answers[1:]],
        "peak_gb": round(answers[-1]["peak"] / 1e9, 2),
        "rss_gb": round(statistics.median(answer["rss"] for answer in answers[1:]) / 1e9, 2),
        "losses": [round(loss, 4) for loss in end["losses"]],
    }


def fastest(stacks: dict[str, Any], group: str) -> str | None:
    """The stack of a group of README's table with the highest median; `group` may be the beginning of several."""
    names = [name for name, stack in stacks.items() if stack["group"].startswith(group)]
    return max(names, key=lambda name: stacks[name]["median"], default=None)


def ratios(stacks: dict[str, Any]) -> dict[str, Any]:
    """phinetune's tokens per second over each peer's of the same round, and its peak memory over the peer's."""
    if "phinetune" not in stacks:
        return {}
    ours, found = stacks["phinetune"], {}
    for key in (
        "TRL SFTTrainer, its best settings",
        "TRL SFTTrainer, its defaults",
        "TRL SFTTrainer, all in float32",
        "PEFT",
    ):
        name = fastest(stacks, key)
        if name is not None:
            pairs = zip(ours["tokens_per_second"], stacks[name]["tokens_per_second"], strict=True)
            rounds = [round(mine / theirs, 2) for mine, theirs in pairs]
            memory = round(ours["peak_gb"] / stacks[name]["peak_gb"], 2)
            found[key] = {
                "stack": name,
                "rounds": rounds,
                "median": round(statistics.median(rounds), 2),
                "memory": memory,
            }
    return found


def machine_rates(model: Path, tokens: int) -> dict[str, float]:
    """This machine's GEMM rate now, in GFLOP/s: a large square product for as long as a step takes, and one of a training step's shape.

    In the dtype that phinetune trains in here: bfloat16, unless float32 is the faster one.
    """
    from flops import gemm_rate
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(str(model), local_files_only=True).get_text_config()
    dtype = training_dtype()
    return {
        "square_2048": round(gemm_rate(2048, 2048, 2048, dtype, seconds=2.0), 1),
        "training_shape": round(gemm_rate(tokens, text.hidden_size, text.intermediate_size, dtype), 1),
    }


def training_dtype() -> Any:
    """What phinetune computes in on this machine if nothing is said, as a torch dtype."""
    import torch

    from phinetune.model.compute import default_dtype

    return default_dtype(torch.device("cpu"))


def arithmetic(
    counted: dict[str, Any], rates: list[float], gemm: list[float], tokens: int, learned: int, model: Path
) -> dict[str, Any]:
    """phinetune's share of the machine's rate: operations per real token (of the round counted) x tokens per second / GEMM rate of the same round."""
    from flops import model_flops

    usual = model_flops(model, RANK, counted["computed_tokens"], counted["pairs"], learned)
    paces = [rate / (g * 1e9) for rate, g in zip(rates, gemm, strict=True)]  # tokens an operation of the GEMM
    shares = {
        "counted": [round(counted["flops"] / tokens * pace, 3) for pace in paces],
        "by_formula": [round(usual["total"] / tokens * pace, 3) for pace in paces],
    }
    return {
        "counted": counted,
        "by_formula": usual,
        "real_tokens": tokens,
        "learned_tokens": learned,
        "dtype": str(training_dtype())[6:],
        "gemm_gflops": statistics.median(gemm),
        "shares": shares,
        "share_counted": round(statistics.median(shares["counted"]), 3),
        "share_by_formula": round(statistics.median(shares["by_formula"]), 3),
    }


def about() -> dict[str, Any]:
    """Machine and versions, kept with each measurement."""
    import torch

    from phinetune.artifact import versions
    from phinetune.model.compute import processor_name

    found = versions()
    for library in ("trl", "peft", "accelerate"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    names = [n for n in os.environ if n.startswith(("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "LD_PRELOAD", "MALLOC_"))]  # fmt: skip
    machine = {"processor": processor_name(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    machine["environment"] = {name: os.environ[name] for name in sorted(names)}
    return {"made": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine, "versions": found}


def chosen_stacks(wanted: Sequence[str] | None) -> list[Stack]:
    """The stacks named (or all) that can run here; the others are said."""
    unknown = [name for name in wanted or () if name not in STACKS]
    if unknown:
        raise SystemExit(f"unknown stack {unknown[0]!r}: they are {'; '.join(STACKS)}")
    found, without = [], not wanted and training_dtype().itemsize == 2  # without those all in float32
    for stack in STACKS.values():
        reason = missing(stack)
        if (wanted and stack.name not in wanted) or (without and stack.all_float32):
            continue
        if reason is None:
            found.append(stack)
        else:
            print(f"without {stack.name}: {reason}", file=sys.stderr)
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workload", default=",".join(WORKLOADS), help="which, with commas between")
    options.add_argument("--data", default="tone", help="file with the columns phrase and tone, or the bundled set")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--stack", action="append", help="only this stack; may be repeated")
    for name, default, text in (
        ("rounds", 5, "timed rounds"),
        ("steps", 2, "timed steps a round"),
        ("warm", 1, "steps before them"),
        ("seed", 0, "of the rows"),
        ("runs", 5, "with --first-step"),
    ):
        options.add_argument(f"--{name}", type=int, default=default, help=text)
    options.add_argument("--first-step", action="store_true", help="measure the time to the first step instead")
    options.add_argument("--readme", action="store_true", help="write README's table from the results, measure nothing")
    options.add_argument("--results", type=Path, default=RESULTS, help="the file of results")
    a = options.parse_args(argv)
    a.workload = [name for name in a.workload.split(",") if name]
    unknown = [name for name in a.workload if name not in WORKLOADS]
    if unknown:
        options.error(f"unknown workload {unknown[0]!r}: they are {', '.join(WORKLOADS)}")
    if min(a.rounds, a.steps, a.runs) < 1 or a.warm < 0 or (a.warm + a.steps < 2):
        options.error("--rounds, --steps and --runs must be at least 1, and a round at least 2 steps with --warm")
    return a


def main(argv: list[str] | None = None) -> None:
    a = parse(argv)
    if a.readme:
        write_readme(read_results(a.results))
        return
    from phinetune.artifact import write_json
    from phinetune.model.folder import resolve_model

    model = resolve_model(a.model)
    results = read_results(a.results)
    settings = {key: getattr(a, key) for key in ("rounds", "steps", "warm", "seed", "data", "model")}
    settings["data"] = Path(a.data).name  # where it lies is nobody's business
    a.results.parent.mkdir(parents=True, exist_ok=True)
    if a.first_step:
        from first_step import measure_first_step

        results["first_step"] = {**measure_first_step(str(model), a.data, a.runs), **about()}
        write_json(a.results, results)
    else:
        stacks = chosen_stacks(a.stack)
        for name in a.workload:
            print(f"{name}:", file=sys.stderr, flush=True)
            running = [stack for stack in stacks if name not in stack.left_out]
            measured = measure(WORKLOADS[name], running, model, a)
            results.setdefault("workloads", {})[name] = {**measured, "settings": settings, **about()}
            write_json(a.results, results)
    print(terminal_table(results))
    print(f"written to {a.results}")


if __name__ == "__main__":
    main()
