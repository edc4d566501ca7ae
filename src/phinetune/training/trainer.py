"""`transformers.Trainer` with six things changed: the loss, evaluation by token, the order of examples, what a checkpoint holds, who draws,
and who computes AdamW's step.

Everything else (schedules, other optimizers, accumulation, logging integrations, several processes) is the Trainer's. A checkpoint holds the
trained state that the caller's functions write and read; `trainer_state.json` comes last, so a checkpoint without it is not whole.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from phinetune.data.order import EpochOrder
from phinetune.errors import TrainingError
from phinetune.events import Note, OnEvent, Progress
from phinetune.model.fast import FastPaths
from phinetune.training import adamw
from phinetune.training.loss import learned_positions, loss_paths, supervised_loss

CHECKPOINT_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


class AdapterTrainer(Trainer):
    """See the module's head. `save_state(folder)` and `load_state(folder)` write and read what is trained;
    `parameter_groups(model, learning_rate, weight_decay)` replaces the Trainer's own groups; `order(batch_size)` makes the sampler of
    micro-batches, and None leaves it to the Trainer."""

    loss_is_scaled_for_ga = True  # the loss is divided by the learned tokens of the whole step

    def __init__(
        self,
        *,
        save_state: Callable[[Path], None],
        load_state: Callable[[Path], None],
        parameter_groups: Callable[[Any, float, float], list[dict[str, Any]]] | None = None,
        fast_paths: FastPaths = FastPaths(),  # noqa: B008  immutable
        order: Callable[[int], EpochOrder] | None = None,
        **kwargs: Any,
    ) -> None:
        self._save_state, self._load_state, self._parameter_groups = save_state, load_state, parameter_groups
        self._make_order, self._order_callback = order, OrderCallback()
        self._parameters: int | None = None
        self._by_adamw = fast_paths.optimizer
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the learned tokens of each step
        self._head = self.model.get_output_embeddings()
        self._paths = loss_paths(self.model, fast_paths)
        self.add_callback(self._order_callback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._make_order is None:
            return super()._get_train_sampler(train_dataset)
        order = self._order_callback.order = self._make_order(self._train_batch_size)
        return order

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        dtype = self.model.dtype
        loss = supervised_loss(model, self._head, inputs, dtype, num_items_in_batch, smoothing, **self._paths)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP will average over processes; the count is already global
        return (loss, {}) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        if getattr(self, "optimizer", None) is None and self._parameter_groups is not None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rate = options.pop("lr", self.args.learning_rate)
            groups = self._parameter_groups(self.model, rate, self.args.weight_decay)
            self.optimizer: Any = kind(groups, lr=rate, **options)
        return super().create_optimizer()

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return (adamw.AdamW if kind is torch.optim.AdamW and self._by_adamw else kind), options

    def _clip_grad_norm(self, model: Any) -> Any:
        """As the Trainer has it; for AdamW of one process, the step clips on its way."""
        optimizer = getattr(self.optimizer, "optimizer", None)
        alone = self.accelerator.num_processes == 1 and self.accelerator.scaler is None
        norm = optimizer.gradient_norm() if alone and isinstance(optimizer, adamw.AdamW) else None
        if norm is None or optimizer is None:
            return super()._clip_grad_norm(model)
        optimizer.clip = adamw.clipping(norm, float(self.args.max_grad_norm))
        return norm

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per learned token over the whole set, and its perplexity."""
        loader = self.get_eval_dataloader(eval_dataset)
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")  # loss, tokens
        for batch in loader:
            batch = self._prepare_inputs(batch)
            count = len(learned_positions(batch["labels"])[1])
            loss = supervised_loss(self.model, self._head, batch, self.model.dtype, 1, **self._paths)
            sums += torch.tensor([float(loss), count], dtype=torch.float64)
        loss, tokens = self.accelerator.reduce(sums.to(self.args.device, torch.float32), reduction="sum").tolist()
        mean = loss / tokens
        metrics = {
            f"{metric_key_prefix}_loss": mean,
            f"{metric_key_prefix}_perplexity": math.exp(min(mean, 700.0)),
            f"{metric_key_prefix}_tokens": tokens,
        }
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            raise TrainingError(
                f"the loss is not finite at step {self.state.global_step}: training diverged",
                "lower training_config.learning_rate, or raise warmup_steps",
            )
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer has it, which counts the model's parameters anew at each step."""
        if self._parameters is None:
            count = getattr(self.model, "num_parameters", None)
            self._parameters = int(count(exclude_embeddings=True)) if count is not None else 0
        ids = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return 0 if ids is None else 6 * int(ids.numel()) * self._parameters

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:  # a full disk: what was begun would only stand in the way
            begun = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save and not is_whole(begun):
                shutil.rmtree(begun, ignore_errors=True)
            raise

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            self._save_state(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_state(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_state(Path(self.state.best_model_checkpoint))


class OrderCallback(TrainerCallback):
    """Tells `order` the epoch. The data loader does so, too, but not through the wrappers of a run resumed by several processes."""

    order: EpochOrder | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.order is not None:
            self.order.set_epoch(int(state.epoch or 0))


class EventCallback(TrainerCallback):
    """Passes steps and logs on to `on_event`."""

    def __init__(self, on_event: OnEvent) -> None:
        self.on_event = on_event
        self.figures: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_event(Progress("training", state.global_step, state.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_event(Progress("training", state.global_step, state.max_steps, self.figures))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        shown = {k: float(v) for k, v in (logs or {}).items() if k in ("loss", "learning_rate", "eval_loss", "epoch")}
        self.figures = {**self.figures, **shown}
        if state.is_world_process_zero and "eval_loss" in shown:
            self.on_event(
                Note(f"training: step {state.global_step}, held-out loss {shown['eval_loss']:.4f} per learned token")
            )


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint in `folder`. Ones that a killed run left half written are removed."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        if is_whole(path):
            found.append((int(path.name.rpartition("-")[2]), path))
        elif not _has_state(path):  # written last, so the writing broke off
            shutil.rmtree(path, ignore_errors=True)
    return max(found)[1] if found else None


def is_whole(path: Path) -> bool:
    """True if `path` is a checkpoint with every file that resuming needs."""
    named = path.name.rpartition("-")[2].isdigit()
    return named and all((path / f).is_file() for f in CHECKPOINT_FILES) and _has_state(path)


def _has_state(path: Path) -> bool:
    try:
        state: dict[str, Any] = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "global_step" in state
