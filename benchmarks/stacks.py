"""The stacks that are compared, as their users write them, each run by `worker.py` in a process of its own.

A stack trains `batch` rows a step in file order and tells its `Pace` when training begins and when an optimizer step is done; the
pace stops it between rounds. All have the same rows, r, alpha, target layers, AdamW, learning rate, clipping and seed. phinetune is
`phinetune.finetune` itself, TRL is `SFTTrainer.train` itself. TRL's and PEFT's variants are what their documentation offers that
trains on the same batches; packing makes other batches, Liger's kernels need triton, compiling the whole model takes minutes for each length.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

RANK, ALPHA, RATE = 16, 16, 2e-4
REFERENCE = {"reference": True}
"""The training_config that turns every fast path of phinetune off."""
AWARE = {"int4_aware": True}
"""The training_config that trains on the weights as int4 will have them."""


class Pace(Protocol):
    """What a stack reports to; see `worker.py`."""

    losses: list[float]

    def ready(self) -> None: ...
    def step(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """One run of a stack: base model's folder, folder with rows.jsonl and examples.json, rows a step, steps."""

    model: Path
    rows: Path
    batch: int
    steps: int

    def examples(self) -> list[dict[str, Any]]:
        """Rows with input_ids and labels."""
        loaded: list[dict[str, Any]] = json.loads((self.rows / "examples.json").read_text(encoding="utf-8"))
        return loaded

    def training(self) -> dict[str, Any]:
        """The settings of `transformers.TrainingArguments` that all stacks share."""
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch,
            "train_sampling_strategy": "sequential",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": 0,
            "use_cpu": True,
        }


@dataclass(frozen=True)
class Stack:
    """A name, the line of README's table it belongs to (of a group the fastest counts), how it runs and with what."""

    name: str
    group: str
    run: Callable[..., list[int]]
    options: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Workloads it is not run on."""
    rounded: bool = False
    """It trains on rounded weights, so its losses are others."""
    all_float32: bool = False
    """For machines that multiply bfloat16 more slowly than float32; elsewhere only by its name."""


def run_phinetune(
    job: Job, pace: Pace, training: dict[str, Any] | None = None, base: dict[str, Any] | None = None
) -> list[int]:
    """Trains by `phinetune.finetune`; returns [tokens of all steps], as its ledger has them."""
    import phinetune
    from phinetune.events import Progress

    def on_event(event: Any) -> None:
        if not isinstance(event, Progress) or event.stage != "training":
            return
        if event.done == 0:
            pace.ready()
            return
        if event.done > 1:  # a step's loss is logged after the step is reported
            pace.losses.append(event.figures["loss"])
        pace.step()

    result = phinetune.finetune(
        str(job.model),
        {"path": str(job.rows / "rows.jsonl"), "test_fraction": 0.0},
        {**job.training(), **(training or {})},
        {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"},
        base,
        output_dir=job.rows / "-".join(["adapter", *(training or {}), *(base or {})]),
        on_event=on_event,
    )
    pace.losses[:] = result.manifest["figures"]["train_loss"]
    return [result.manifest["ledger"]["tokens"]]


def run_trl(
    job: Job, pace: Pace, weights: str = "float32", attention: str = "sdpa", bf16: bool = True, **options: Any
) -> list[int]:
    """Trains by TRL's SFTTrainer; returns the tokens of each step, as its own log has them."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seen: list[int] = []

    class Reporting(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pace.ready()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pace.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                pace.losses.append(logs["loss"])
                seen.append(int(logs["num_tokens"]))

    trainer = SFTTrainer(
        model=str(job.model),
        args=SFTConfig(
            **job.training(),
            output_dir=str(job.rows / "trl"),
            bf16=bf16,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            model_init_kwargs={"dtype": weights, "attn_implementation": attention},
            **options,
        ),
        train_dataset=Dataset.from_list(job.examples()),
        processing_class=AutoTokenizer.from_pretrained(str(job.model)),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Reporting()],
    )
    trainer.train()
    return [n - before for n, before in zip(seen, [0, *seen], strict=False)]


def run_peft(job: Job, pace: Pace, float32: bool, attention: str, base: str = "bfloat16") -> list[int]:
    """Trains by a plain loop over PEFT layers on a base in `base`; returns the tokens of each step.

    float32: adapters in float32, PEFT's own default, over a bfloat16 base under autocast; else in bfloat16 like the base.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(job.model), dtype=getattr(torch, base), attn_implementation=attention
    )
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=float32).train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.0, fused=True)
    examples, tokens = job.examples(), []
    pace.ready()
    for start in range(0, job.batch * job.steps, job.batch):
        rows = examples[start : start + job.batch]
        width = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, filler: int, rows: Any = rows, width: int = width) -> Any:
            return torch.tensor([row[key] + [filler] * (width - len(row[key])) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100)}
        batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=float32 and base == "bfloat16"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pace.losses.append(float(loss.detach()))
        tokens.append(int(batch["attention_mask"].sum()))
        pace.step()
    return tokens


_TRL_BEST = {"weights": "bfloat16", "gradient_checkpointing": False}
STACKS = {
    stack.name: stack
    for stack in (
        Stack("phinetune", "phinetune", run_phinetune),
        Stack("phinetune, reference", "phinetune, reference", run_phinetune, {"training": REFERENCE}),
        Stack("phinetune, int4-aware", "phinetune, int4-aware", run_phinetune, {"training": AWARE}, rounded=True),
        *(
            Stack(f"phinetune, {name}", f"phinetune, {name}", run_phinetune, {"base": {key: True}}, rounded=True)
            for name, key in (("QLoRA, NF4", "load_in_4bit"), ("QLoRA, on the grid", "load_on_grid"))
        ),
        Stack("TRL, defaults", "TRL SFTTrainer, its defaults", run_trl),
        *(
            Stack(
                f"TRL, {attention}{', padding-free' * bool(free)}",
                "TRL SFTTrainer, its best settings",
                run_trl,
                {**_TRL_BEST, "attention": attention, **free},
                # all pairs of a batch's 2400 tokens, kept by every layer: over 10 GB
                ("long",) if free and attention == "eager" else (),
            )
            for attention in ("sdpa", "eager")
            for free in ({}, {"padding_free": True, "max_length": None})
        ),
        *(
            Stack(
                f"PEFT {dtype}, {attention}",
                f"PEFT in a plain loop, {dtype} adapters",
                run_peft,
                {"float32": dtype == "float32", "attention": attention},
            )
            for dtype in ("float32", "bfloat16")
            for attention in ("sdpa", "eager")
        ),
        *(
            Stack(
                f"{name}, all in float32, {attention}",
                group,
                run,
                {**options, "attention": attention},
                all_float32=True,
            )
            for name, group, run, options in (
                ("TRL", "TRL SFTTrainer, all in float32", run_trl, {**_TRL_BEST, "weights": "float32", "bf16": False}),
                ("PEFT", "PEFT in a plain loop, all in float32", run_peft, {"float32": True, "base": "float32"}),
            )
            for attention in ("sdpa", "eager")
        ),
    )
}


def missing(stack: Stack) -> str | None:
    """Why `stack` cannot run here, or None."""
    if stack.run is run_phinetune and stack.options:
        from phinetune.errors import ConfigError
        from phinetune.training.config import read_training_config

        try:
            read_training_config(stack.options.get("training", {}), lambda event: None)
        except ConfigError:
            return "this phinetune has no such switch"
    needed = {run_trl: ("trl", "peft"), run_peft: ("peft",)}.get(stack.run, ())
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} is not installed (pip install '.[bench]')" if absent else None
