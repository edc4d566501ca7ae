"""One training run: the Trainer with our loss, over examples that are ready, from the last whole checkpoint if there is one.

The model arrives with its trainable parameters in place; how they are saved and read back are two functions of the caller's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.errors import ConfigError, TrainingError
from phinetune.events import Note, OnEvent, log_event
from phinetune.garbage import old_objects_left_alone
from phinetune.model.fast import FastPaths
from phinetune.training.trainer import AdapterTrainer, EventCallback, is_whole, last_checkpoint
from phinetune.training.walks import few_walks

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from phinetune.data.examples import Examples
    from phinetune.data.order import EpochOrder


def fit(
    model: Any,
    train: Examples,
    test: Examples,
    collator: Callable[[Any], Any],
    arguments: TrainingArguments,
    save_state: Callable[[Path], None],
    load_state: Callable[[Path], None],
    resume_from_checkpoint: str | bool | None = None,
    parameter_groups: Callable[[Any, float, float], list[dict[str, Any]]] | None = None,
    fast_paths: FastPaths = FastPaths(),  # noqa: B008  immutable
    order: Callable[[int], EpochOrder] | None = None,
    on_event: OnEvent = log_event,
) -> dict[str, Any]:
    """Train `model` in place and return the run's figures: steps, seconds, tokens per second, losses.

    `test` is evaluated at the end, unless it is empty; `arguments.eval_strategy` says whether before, too. Raises TrainingError if the
    run diverges, ConfigError for a checkpoint that is not there.
    """
    import torch
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    if arguments.n_gpu > 1:
        raise ConfigError(
            f"{arguments.n_gpu} GPUs in one process",
            "start with torchrun or accelerate launch, or choose one with CUDA_VISIBLE_DEVICES",
        )
    columns = ["input_ids", "labels", "length", "segments"]
    try:
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=train.table.select_columns(columns),
            eval_dataset=test.table.select_columns(columns) if len(test) else None,
            callbacks=[EventCallback(on_event)],
            save_state=save_state,
            load_state=load_state,
            parameter_groups=parameter_groups,
            fast_paths=fast_paths,
            order=order,
        )
    except (ValueError, ImportError, RuntimeError) as error:  # such as a logging integration that is not installed
        raise ConfigError(f"training_config: {str(error).splitlines()[0]}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    with arguments.main_process_first(desc="finding the last checkpoint"):
        checkpoint = _checkpoint(Path(str(arguments.output_dir)), resume_from_checkpoint)
    if checkpoint is not None:
        on_event(Note(f"training: going on from {checkpoint.name}"))
    start = time.perf_counter()
    try:
        alone = trainer.accelerator.num_processes == 1  # wrappers that share a model out exchange its parameters
        with old_objects_left_alone(), few_walks(model) if alone else contextlib.nullcontext():
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory on {arguments.device}",
            "lower training_config.per_device_train_batch_size, or set training_config.checkpoint_layers=all",
        ) from error
    seconds = time.perf_counter() - start
    first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    share = (result.global_step - first_step) / max(result.global_step, 1)
    tokens = sum(train.lengths) * float(trainer.state.epoch or 0.0) * share
    figures = {
        "steps": result.global_step,
        "resumed_at_step": first_step,
        "train_seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "train_loss": [round(e["loss"], 6) for e in trainer.state.log_history if "loss" in e],
    }
    if len(test):
        figures |= {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_perplexity")}
    return figures


def _checkpoint(folder: Path, asked: str | bool | None) -> Path | None:
    if isinstance(asked, str):
        path = Path(asked).expanduser()
        if not is_whole(path):
            raise ConfigError(
                f"training_config.resume_from_checkpoint: {asked} is not a checkpoint of phinetune",
                "give a folder called checkpoint-N, or leave it out to go on by itself",
            )
        return last_checkpoint(folder) or path  # this run may have got further than the checkpoint it began with
    return None if asked is False else last_checkpoint(folder)
