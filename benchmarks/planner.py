"""The planner against real runs: peak memory and step time of `phinetune.finetune`, predicted by `phinetune.plan` and then measured.

    python benchmarks/planner.py [--cases 0,3] [--steps 5]

Each prediction and each run has a process of its own. Examples of a case are equally long and share nothing but the template. Memory is
the process's largest resident set, with libraries and the weights' file pages; step time is the median over the steps but the first.
Models: the embedded SmolLM2-135M, and a random one of Phi-3's architecture (336 M parameters), saved to a temporary folder. Writes
benchmarks/results/planner.json. Time figures need a quiet machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMALL, MIDDLE = "smollm2-135m", "phi3-336m"
CASES: list[dict[str, Any]] = [
    {"model": SMALL, "length": 64, "batch": 16},
    {"model": SMALL, "length": 64, "batch": 4},
    {"model": SMALL, "length": 256, "batch": 4},
    {"model": SMALL, "length": 256, "batch": 8, "checkpointing": True},
    {"model": SMALL, "length": 512, "batch": 4},
    {"model": SMALL, "length": 512, "batch": 4, "checkpointing": True},
    {"model": SMALL, "length": 1024, "batch": 1},
    {"model": SMALL, "length": 1024, "batch": 2, "checkpointing": True, "accumulation": 2},
    {"model": SMALL, "length": 64, "batch": 8, "quantized": True},
    {"model": SMALL, "length": 512, "batch": 2, "quantized": True, "checkpointing": True},
    {"model": MIDDLE, "length": 64, "batch": 8},
    {"model": MIDDLE, "length": 256, "batch": 4},
    {"model": MIDDLE, "length": 512, "batch": 2, "checkpointing": True},
    {"model": MIDDLE, "length": 1024, "batch": 1},
    {"model": MIDDLE, "length": 256, "batch": 4, "quantized": True},
    {"model": MIDDLE, "length": 512, "batch": 2, "quantized": True, "checkpointing": True},
    {"model": SMALL, "length": 64, "batch": 16, "on_grid": True},
    {"model": MIDDLE, "length": 256, "batch": 4, "on_grid": True},
]
_WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "was",
    "on",
    "with",
    "as",
    "are",
    "be",
    "this",
    "have",
)


def middle_model(folder: Path) -> Path:
    """A random model of Phi-3's architecture with the embedded model's tokenizer."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    from phinetune.model.folder import resolve_model

    if (folder / "model.safetensors").is_file():
        return folder
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=49152, hidden_size=1024, intermediate_size=2816, num_hidden_layers=18, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        sliding_window=None,
    )  # fmt: skip
    Phi3ForCausalLM(config).to(torch.bfloat16).save_pretrained(str(folder))
    for file in resolve_model(SMALL).iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "special_tokens", "vocab", "merges")):
            shutil.copy(file, folder)
    return folder


def arguments(case: dict[str, Any], work: Path, steps: int) -> dict[str, Any]:
    """The arguments of `finetune` and `plan` for a case, its data file written."""
    from phinetune.model.folder import resolve_model
    from phinetune.model.load import load_base_contract

    folder = middle_model(work / MIDDLE) if case["model"] == MIDDLE else resolve_model(SMALL)
    contract, draw, rows = load_base_contract(folder), random.Random(0), []
    for i in range(case["batch"] * case.get("accumulation", 1) * 2):
        words = [str(i), *draw.choices(_WORDS, k=case["length"])]
        answer = draw.choices(_WORDS, k=22)
        while True:  # cut to the wanted length
            messages = [
                {"role": "user", "content": " ".join(words)},
                {"role": "assistant", "content": " ".join(answer)},
            ]
            length = len(contract.tokenize(contract.render(messages, add_generation_prompt=False)))
            if length <= case["length"] or len(words) < 3:
                break
            words = words[: max(2, len(words) - (length - case["length"]))]
        rows.append({"prompt": " ".join(words), "completion": " ".join(answer)})
    file = work / f"{case['length']}-{case['batch']}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    training: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": case["batch"], "save_strategy": "no",
        "gradient_accumulation_steps": case.get("accumulation", 1), "skip_memory_check": True,
    }  # fmt: skip
    if case.get("checkpointing"):
        training["gradient_checkpointing"] = True
    return {
        "model": str(folder),
        "data": {"path": str(file), "prompt": "{prompt}", "completion": "{completion}", "test_fraction": 0.0},
        "training_config": training,
        "model_kwargs": {
            **({"load_in_4bit": True} if case.get("quantized") else {}),
            **({"load_on_grid": True} if case.get("on_grid") else {}),
        },
    }


def prepare(case: dict[str, Any], work: Path, steps: int) -> dict[str, Any]:
    """In a process of its own: the random model."""
    return {"folder": str(middle_model(work / MIDDLE))}


def predict(case: dict[str, Any], work: Path, steps: int) -> dict[str, Any]:
    """In a process of its own: the plan."""
    import phinetune

    found = phinetune.plan(**arguments(case, work, steps))
    return {"bytes": found.resident_peak, "seconds": found.step_seconds, "parts": found.memory, "batch": found.batch}


def measure(case: dict[str, Any], work: Path, steps: int) -> dict[str, Any]:
    """In a process of its own: the run."""
    import phinetune
    from phinetune.evaluation.memory import resident_peak
    from phinetune.events import Event, Progress

    times: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "training":
            times.append(time.perf_counter())

    phinetune.finetune(**arguments(case, work, steps), output_dir=work / "adapter", overwrite=True, on_event=listen)
    taken = [b - a for a, b in itertools.pairwise(times)]
    return {"bytes": resident_peak(), "seconds": statistics.median(taken[1:] or taken)}


def in_process(what: str, case: dict[str, Any], work: Path, steps: int) -> dict[str, Any]:
    """`prepare`, `predict` or `measure` in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--child",
        what,
        "--case",
        json.dumps(case),
        "--work",
        str(work),
        "--steps",
        str(steps),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="", help="numbers of the cases to run, such as 0,3; all of them by default")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "phinetune-planner-benchmark")
    parser.add_argument("--child", choices=("prepare", "predict", "measure"))
    parser.add_argument("--case", type=json.loads)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.child:
        does = {"prepare": prepare, "predict": predict, "measure": measure}[args.child]
        print(json.dumps(does(args.case, args.work, args.steps)))
        return
    from phinetune.artifact import versions

    chosen = [int(n) for n in args.cases.split(",") if n] or list(range(len(CASES)))
    if any(
        CASES[number]["model"] == MIDDLE for number in chosen
    ):  # what makes a model keeps memory that no prediction may count
        in_process("prepare", {"model": MIDDLE}, args.work, 0)
    results = []
    print(
        f"{'case':>4} {'model':14}{'length':>7}{'batch':>6}  {'':22}{'memory, MB':>16}{'ratio':>7}{'step, s':>16}{'ratio':>7}"
    )
    for number in chosen:
        case = CASES[number]
        predicted, measured = (in_process(what, case, args.work, args.steps) for what in ("predict", "measure"))
        memory, step = predicted["bytes"] / measured["bytes"], predicted["seconds"] / measured["seconds"]
        options = " ".join(k for k in ("quantized", "on_grid", "checkpointing", "accumulation") if case.get(k))
        print(
            f"{number:>4} {case['model']:14}{case['length']:>7}{case['batch']:>6}  {options:22}"
            f"{predicted['bytes'] / 1e6:>8.0f}{measured['bytes'] / 1e6:>8.0f}{memory:>7.2f}"
            f"{predicted['seconds']:>8.2f}{measured['seconds']:>8.2f}{step:>7.2f}",
            flush=True,
        )
        results.append(
            {**case, "predicted": predicted, "measured": measured, "memory_ratio": memory, "time_ratio": step}
        )
    if len(chosen) == len(CASES):
        target = Path(__file__).parent / "results" / "planner.json"
        target.write_text(
            json.dumps({"versions": versions(), "steps": args.steps, "results": results}, indent=2) + "\n"
        )
        print(f"written: {target}")


if __name__ == "__main__":
    main()
