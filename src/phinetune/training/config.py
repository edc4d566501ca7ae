"""`training_config`: the names of `transformers.TrainingArguments`, of today and of earlier years, made to fit this machine.

A renamed key is translated, a key that no longer means anything is dropped, a thing the machine lacks is replaced: each is said once.
Unknown keys are errors. Where the user says nothing, values are derived from the run itself and said as derived. The object made here
is the `TrainingArguments` that the Trainer receives.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from phinetune.data.batches import Layout
from phinetune.data.order import WAYS
from phinetune.errors import ConfigError, did_you_mean
from phinetune.events import Note, OnEvent, log_event
from phinetune.model.fast import FastPaths, read_fast_paths
from phinetune.model.grid import Grid, read_grid
from phinetune.training.checkpointing import CHECKPOINTING_KEYS, LayerCount, read_checkpointing
from phinetune.training.optimizers import available_optimizer

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
_DROPPED = {
    "save_safetensors": "adapters are always safetensors",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR instead",
    "use_mps_device": "the device is found by itself",
    "fp16_backend": "there is one way now",
    "half_precision_backend": "there is one way now",
    "fp16_opt_level": "there is one way now",
    "past_index": "it has no effect on language models",
    "include_tokens_per_second": "tokens per second are always shown",
    "include_inputs_for_metrics": "metrics are computed by phinetune evaluate",
    "use_ipex": "it was removed from transformers",
    "jit_mode_eval": "it was removed from transformers",
    "sharded_ddp": "use fsdp",
    "torchdynamo": "use torch_compile",
    "tpu_num_cores": "TPUs are not supported",
    "local_rank": "it is set by the launcher",
    "do_train": "finetune trains",
    "do_predict": "use phinetune evaluate",
    "remove_unused_columns": "only what the model needs reaches it",
    "label_names": "labels come from the chat template",
    "save_only_model": "a checkpoint can always be resumed from",
    "disable_tqdm": "progress is drawn by the command line",
}
_ELSEWHERE = {
    "max_seq_length": "data.max_length",
    "max_length": "data.max_length",
    "dataset_text_field": 'data.text, such as "{text}"',
    "completion_only_loss": "data.learn_prompt; only answers are learned without it",
    "assistant_only_loss": "data.learn_prompt; only answers are learned without it",
    "packing": "data.strategy (join), or training_config.layout",
}
OWN_KEYS = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "layout",
    "train_sampling_strategy",
    "fast_paths",
    "reference",
    "keep_freed_memory",
    "skip_memory_check",
    "int4_aware",
    *CHECKPOINTING_KEYS,
)
"""Keys of training_config that finetune itself takes."""


@dataclass(frozen=True)
class TrainingPlan:
    """`training_config` after reading: values for TrainingArguments, and what else it asked for."""

    values: dict[str, Any]
    wanted_dtype: str | None = None
    output_dir: str | None = None
    overwrite: bool = False
    resume_from_checkpoint: str | bool | None = None
    layout: Layout = "auto"
    fast_paths: FastPaths = field(default_factory=FastPaths)
    order: str = "auto"
    """train_sampling_strategy. One that is not in `data.order.WAYS` is the Trainer's own, and in `values`, too."""
    checkpoint_layers: LayerCount | None = None
    """Layers whose activations are computed again in the backward pass; None where nothing was said."""
    checkpoint_options: dict[str, Any] = field(default_factory=dict)
    keep_freed_memory: bool = True
    """On a CPU: freed blocks stay with the process from step to step (`phinetune.model.memory`)."""
    grid: Grid | None = None
    """Train for this grid: every product is with the merged weight as int4 will have it (`phinetune.lora.rounding`)."""
    skip_memory_check: bool = False
    """Train even if the forecast says that the memory is not enough."""


def read_training_config(config: dict[str, Any] | None, on_event: OnEvent = log_event) -> TrainingPlan:
    """Translate and check names; nothing machine-dependent yet. Raises ConfigError with every unknown or impossible key."""
    from transformers import TrainingArguments

    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    hints = get_type_hints(TrainingArguments)
    values: dict[str, Any] = {}
    own: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in (config or {}).items():
        if key in _RENAMED and _RENAMED[key] in known:  # else the installed transformers still has the older name
            on_event(Note(f"training_config.{key}: is called {_RENAMED[key]} now, read as such"))
            if value is not None:
                try:
                    values.setdefault(_RENAMED[key], _as_declared(hints[_RENAMED[key]], value))
                except ValueError as error:
                    problems.append(f"training_config.{key}: {error}")
        elif key == "group_by_length":
            on_event(Note(f"training_config.{key}: is called train_sampling_strategy now, read as such"))
            own.setdefault("train_sampling_strategy", "group_by_length" if value else "random")
        elif key in _DROPPED:
            on_event(Note(f"training_config.{key}: has no effect, {_DROPPED[key]}"))
        elif key in OWN_KEYS:
            own[key] = value
        elif key in _ELSEWHERE:
            problems.append(f"training_config.{key}: belongs elsewhere, use {_ELSEWHERE[key]}")
        elif key not in known:
            problems.append(f"training_config.{key}: unknown key{did_you_mean(key, {*known, *_RENAMED, *OWN_KEYS})}")
        elif value is not None:
            try:
                values[key] = _as_declared(hints[key], value)
            except ValueError as error:
                problems.append(f"training_config.{key}: {error}")
    if values.get("push_to_hub"):
        problems.append("training_config.push_to_hub: nothing is sent anywhere; upload the output folder yourself")
    plan = _read_own(own, values, problems, on_event)
    wanted = "bfloat16" if values.pop("bf16", False) else None
    if values.pop("fp16", False):
        on_event(
            Note(
                "training_config.fp16: adapters are trained in float32 on a base in the machine's best type, not in fp16",
                warning=True,
            )
        )
    return replace(plan, wanted_dtype=wanted)


def _read_own(own: dict[str, Any], values: dict[str, Any], problems: list[str], on_event: OnEvent) -> TrainingPlan:
    """The plan for `values` and phinetune's own keys. Raises ConfigError with their problems and those found before."""
    if own.get("layout", "auto") not in ("auto", "padded", "tree"):
        problems.append(f"training_config.layout: must be auto, padded or tree (found: {own['layout']!r})")
    try:
        fast_paths = read_fast_paths(own.get("fast_paths"), "training_config.fast_paths")
    except ConfigError as error:
        problems += error.problems
    grid = None
    try:
        grid = read_grid(own.get("int4_aware"), "training_config.int4_aware")
    except ConfigError as error:
        problems += error.problems
    for key in ("reference", "keep_freed_memory", "skip_memory_check"):
        if not isinstance(own.get(key, False), bool):
            problems.append(f"training_config.{key}: must be true or false (found: {own[key]!r})")
    if own.get("reference") is True and (own.get("fast_paths") or own.get("layout", "padded") != "padded"):
        problems.append("training_config.reference: turns every fast path off; leave out fast_paths and layout")
    order = own.get("train_sampling_strategy") or "auto"
    if order not in WAYS:
        theirs = _choices("train_sampling_strategy")
        values["train_sampling_strategy"] = order
        if order not in theirs:
            known_ways = dict.fromkeys((*WAYS, *theirs))
            problems.append(
                f"training_config.train_sampling_strategy: must be one of {', '.join(known_ways)} (found: {order!r})"
                + did_you_mean(str(order), known_ways)
            )
    checkpointing: tuple[LayerCount | None, dict[str, Any]] = (None, {})
    try:
        checkpointing = read_checkpointing(own, on_event)
    except ConfigError as error:
        problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    if own.get("reference"):
        fast_paths, own["layout"], own["keep_freed_memory"] = FastPaths.none(), "padded", False
        on_event(Note("training: the reference, without any fast path"))
    if values.pop("torch_compile", False):
        on_event(
            Note("training_config.torch_compile: the decoder layers are compiled one by one, never the whole model")
        )
        fast_paths = replace(fast_paths, compiled=True)
    for key in ("torch_compile_backend", "torch_compile_mode"):
        if values.pop(key, None) is not None:
            on_event(Note(f"training_config.{key}: has no effect, layers are compiled by torch's default"))
    return TrainingPlan(
        values,
        output_dir=own.get("output_dir"),
        overwrite=bool(own.get("overwrite_output_dir", False)),
        resume_from_checkpoint=own.get("resume_from_checkpoint"),
        layout=own.get("layout", "auto"),
        fast_paths=fast_paths,
        grid=grid,
        order=order,
        checkpoint_layers=checkpointing[0],
        checkpoint_options=checkpointing[1],
        keep_freed_memory=own.get("keep_freed_memory", True),
        skip_memory_check=own.get("skip_memory_check", False),
    )


def _choices(name: str) -> list[str]:
    """The values that the installed transformers says it takes for a field of its arguments."""
    from transformers import TrainingArguments

    fields = dataclasses.fields(TrainingArguments)
    return next((list(f.metadata.get("choices") or ()) for f in fields if f.name == name), [])


def _as_declared(hint: Any, value: Any) -> Any:
    """`value` as the number or truth value that `hint` declares; anything else is passed on. Raises ValueError with what is wanted."""
    kinds = {int, float, bool, str} & {hint, *get_args(hint)}
    if kinds == {bool} and not isinstance(value, bool):
        raise ValueError(f"must be true or false (found: {value!r})")
    if not kinds or not kinds <= {int, float}:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"must be a number (found: {value!r})") from None
    if isinstance(value, bool) or (kinds == {int} and number != int(number)):
        raise ValueError(
            f"must be a whole number (found: {value!r})" if kinds == {int} else f"must be a number (found: {value!r})"
        )
    return int(number) if kinds == {int} else number


def fit_to_machine(values: dict[str, Any], device: torch.device, on_event: OnEvent = log_event) -> dict[str, Any]:
    """`values` with what this machine lacks replaced by the best it has."""
    values = dict(values)
    if values.get("optim"):
        values["optim"] = available_optimizer(values["optim"], device, on_event)
    for key in ("bf16_full_eval", "fp16_full_eval", *(["tf32"] if device.type != "cuda" else [])):
        if values.pop(key, False):
            on_event(
                Note(
                    f"training_config.{key}: has no effect here, evaluation runs in the training's own dtype"
                    if "eval" in key
                    else f"training_config.{key}: not on this machine, left out"
                )
            )
    return values


def training_arguments(
    values: dict[str, Any],
    examples: int,
    held_out: int,
    hidden_size: int,
    device: torch.device,
    folder: Path,
    on_event: OnEvent = log_event,
) -> TrainingArguments:
    """The Trainer's arguments for a run over `examples` examples that keeps its checkpoints in `folder`.

    What is not given is derived and said. Raises ConfigError for values that cannot be, all at once.
    """
    _check_ranges(values, held_out)
    derived, steps = _derive(values, examples, hidden_size)
    shown = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in derived.items())
    on_event(Note(f"training: {steps} steps" + (f"; derived: {shown}" if shown else "")))
    from transformers import TrainingArguments

    fixed = {
        "output_dir": str(folder),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda" and values.get("dataloader_pin_memory", True),
    }
    try:
        return TrainingArguments(**{**derived, **values, **fixed})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training_config: {str(error).splitlines()[0]}") from None


_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
}


def _check_ranges(values: dict[str, Any], held_out: int) -> None:
    """Raises one ConfigError for what TrainingArguments lets through and the Trainer then breaks on."""
    problems = [
        f"training_config.{key}: must be at least {least} (found: {values[key]})"
        for key, least in _AT_LEAST.items()
        if key in values and values[key] < least
    ]
    if values.get("max_steps", -1) <= 0 and values.get("num_train_epochs", 1) <= 0:
        problems.append(f"training_config.num_train_epochs: must be above 0 (found: {values['num_train_epochs']})")
    strategy = str(getattr(values.get("eval_strategy"), "value", values.get("eval_strategy") or "no"))
    if strategy != "no" and not held_out:
        problems.append("training_config.eval_strategy: nothing is held out to evaluate on; raise data.test_fraction")
    if values.get("metric_for_best_model", "loss") not in ("loss", "eval_loss"):
        problems.append(
            f"training_config.metric_for_best_model: must be loss (found: {values['metric_for_best_model']!r}); other metrics are phinetune evaluate's"
        )
    if problems:
        raise ConfigError(problems)


def _derive(values: dict[str, Any], examples: int, hidden_size: int) -> tuple[dict[str, Any], int]:
    """(values for what was not given, number of optimizer steps)."""
    derived: dict[str, Any] = {}
    batch = values.get("per_device_train_batch_size")
    if batch is None:
        batch = derived["per_device_train_batch_size"] = max(1, min(16, examples // 8))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    per_step = batch * values.get("gradient_accumulation_steps", 1) * processes
    epochs = values.get("num_train_epochs", 3)
    steps = values.get("max_steps", -1)
    if steps <= 0:
        steps = math.ceil(math.ceil(examples / per_step) * epochs)
        if "num_train_epochs" not in values:
            derived["num_train_epochs"] = epochs
    if "learning_rate" not in values:
        # 5e-4 suits a width of 576, 2e-4 one of 3072 (the usual value for Phi-3-mini): between them it falls with the square root.
        derived["learning_rate"] = float(f"{5e-4 * math.sqrt(576 / max(hidden_size, 576)):.1e}")
    save_steps = max(1, steps // 8)
    every = values.get("eval_steps")
    if every and every >= 1 and values.get("load_best_model_at_end"):
        save_steps = math.ceil(save_steps / every) * int(every)
    usual = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "logging_steps": max(1, steps // 50),
        "save_steps": save_steps,
        "save_total_limit": 1,
        "per_device_eval_batch_size": batch,
        "seed": 0,
    }
    return derived | {key: value for key, value in usual.items() if key not in values}, steps
