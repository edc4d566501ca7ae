"""LoRA training steps of phinetune and of a plain loop over PEFT layers, in turn, in one run on one machine.

    python benchmarks/train.py [--rounds 5] [--steps 4] [--batch 16] [--model smollm2-135m]

Same model (bfloat16), same examples of the bundled tone set in the same batches, r=16 on all linear layers, AdamW. The peer pads its
batches and lets the model compute its own loss, as its users write it, with float32 adapters under autocast and with bfloat16 adapters.
Tokens are real tokens, without padding. Writes benchmarks/results/train.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from phinetune.artifact import versions
from phinetune.data.batches import Collator, padded_batch
from phinetune.data.examples import load_examples
from phinetune.data.messages import parse_data_config
from phinetune.lora.config import LoraConfig
from phinetune.lora.injection import inject
from phinetune.model.compute import bfloat16_speedup
from phinetune.model.folder import resolve_model
from phinetune.model.load import LoadPlan, load_base_contract, load_model
from phinetune.training.loss import supervised_loss

CPU = torch.device("cpu")
Step = Callable[[list[dict[str, Any]]], float]


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=True)


def ours(folder: Path, pad_id: int) -> Step:
    model = load_model(folder, LoadPlan(torch.bfloat16, CPU, "eager")).train()
    inject(model, LoraConfig(r=16, lora_alpha=16))
    optimizer, collate = optimizer_of(model), Collator(pad_id, model.config.hidden_size)

    def step(rows: list[dict[str, Any]]) -> float:
        loss = supervised_loss(model, model.get_output_embeddings(), collate(rows), model.dtype)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def peft_loop(folder: Path, pad_id: int, float32: bool) -> Step:
    import peft

    model = load_model(folder, LoadPlan(torch.bfloat16, CPU, None)).train()
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=float32)
    optimizer = optimizer_of(model)

    def step(rows: list[dict[str, Any]]) -> float:
        batch = padded_batch(rows, pad_id)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=float32):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 5), ("steps", 4), ("batch", 16)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--model", default="smollm2-135m")
    a = options.parse_args()
    folder = resolve_model(a.model)
    contract = load_base_contract(folder)
    train, _, _ = load_examples(parse_data_config("tone"), contract, lambda event: None)
    rows = [train[i] for i in range(a.batch * a.steps * (a.rounds + 1))]
    stacks = {
        "phinetune": ours(folder, contract.pad_token_id),
        "PEFT, float32 adapters": peft_loop(folder, contract.pad_token_id, True),
        "PEFT, bfloat16 adapters": peft_loop(folder, contract.pad_token_id, False),
    }
    rates: dict[str, list[float]] = {name: [] for name in stacks}
    losses: dict[str, float] = {}
    for round_ in range(a.rounds + 1):  # the first one warms up
        batches = [rows[(round_ * a.steps + i) * a.batch :][: a.batch] for i in range(a.steps)]
        tokens = sum(len(row["input_ids"]) for batch in batches for row in batch)
        for name, step in stacks.items():
            start = time.perf_counter()
            for batch in batches:
                losses[name] = step(batch)
            rates[name] += [tokens / (time.perf_counter() - start)] if round_ else []
    result = {
        name: {
            "tokens_per_second": [round(r, 1) for r in v],
            "median": round(statistics.median(v), 1),
            "last_loss": round(losses[name], 4),
        }
        for name, v in rates.items()
    }
    best = max(r["median"] for name, r in result.items() if name != "phinetune")
    summary = {
        "stacks": result,
        "ratio_to_best_peer": round(result["phinetune"]["median"] / best, 2),
        "settings": vars(a),
    }
    machine = {"threads": torch.get_num_threads(), "bfloat16_speedup": bfloat16_speedup(CPU)}
    file = Path(__file__).parent / "results" / "train.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        json.dumps({**summary, "machine": machine, "versions": versions()}, indent=2) + "\n", encoding="utf-8"
    )
    for name, r in result.items():
        print(
            f"{name:<26}{r['median']:>8.1f} tokens/s   loss after {a.steps * (a.rounds + 1)} steps {r['last_loss']:.4f}"
        )
    print(f"ratio to the best peer: {summary['ratio_to_best_peer']}  ({file})")


if __name__ == "__main__":
    main()
