"""What a training run will take, before anything is loaded: memory, time, and the cheapest change that makes it fit if it does not.

    read configs -> config.json -> contract -> examples -> the step without numbers -> memory | time -> suggestions

The weights need not be on disk. What is estimated is a run on this machine's CPU, in one process. Memory is what the process has at
most, its libraries and the file pages of the weights included. Time is that of the optimizer steps, without evaluation and loading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.data.batches import Collator
from phinetune.data.encoding import MASKED
from phinetune.data.messages import DataConfig
from phinetune.errors import InfeasibleError, PhinetuneError, first_line
from phinetune.events import Note, OnEvent, log_event
from phinetune.lora.config import LoraConfig
from phinetune.model.compute import available_memory, resident_memory
from phinetune.model.fast import uses_blocks
from phinetune.model.folder import resolve_description, weight_files
from phinetune.model.grid import Grid
from phinetune.model.load import SPARE, LoadPlan, load_base_contract, measuring_dtype, plan_load, read_model_config
from phinetune.training.checkpointing import check_layer_count
from phinetune.training.config import fit_to_machine, training_arguments
from phinetune.workflow.training_plan import Plan, Suggestion, Variant, changes, describe, gigabytes, needed_bytes
from phinetune.workflow.training_request import (
    TrainingRequest,
    check_start,
    decide_rows,
    read_examples,
    read_request,
)

if TYPE_CHECKING:
    from phinetune.data.examples import Examples
    from phinetune.training.estimate import StepEstimate, StepEstimator
    from phinetune.training.estimate_run import RunTime
    from phinetune.training.estimate_time import OperatorClock

_SLACK, _SLACK_CHECKPOINTING = 0.25, 1.75
"""What glibc's allocator keeps beyond what is alive, as a share of all that comes and goes in a step: freed pieces between blocks that
stay are reused badly, most so where layers are recomputed. Measured, on the embedded model; with MALLOC_MMAP_THRESHOLD_=131072 in the
environment it is nothing, and a step takes longer."""
_SLACK_HANDED_ON = 45 << 20
"""What it keeps, in bytes, where layers hand on their memory themselves (`lora/decoder.py`), whatever the batch (measured: nothing to 36 MB in
seven cases, 21 to 150 in four with checkpointing)."""
_MEASURING = 6.0
"""Seconds that `plan` spends on real steps of three layers, about."""
_FIRST_USE = 60 << 20
"""Bytes of code and buffers that torch and oneDNN make when they are first used (measured)."""
_MERGE = 400 << 20
"""Most bytes of a merge from file to file (measured on a model of Phi-3-mini's size: 353 MB)."""


def plan(
    model: str,
    data: str | dict[str, Any] | DataConfig,
    training_config: dict[str, Any] | None = None,
    peft_config: dict[str, Any] | LoraConfig | None = None,
    model_kwargs: dict[str, Any] | None = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    eval_data: str | dict[str, Any] | DataConfig | None = None,
    on_event: OnEvent = log_event,
) -> Plan:
    """Memory and time of `finetune` with the same arguments, with nothing loaded; `output_dir` and `overwrite` have no effect.

    model: as for `finetune`, also a folder or a hub model of which only config and tokenizer are here. Raises what `finetune` raises for
    what can be known before training.
    """
    asked = read_request(
        data, eval_data, training_config, peft_config, model_kwargs, output_dir or "-", overwrite, on_event
    )
    base = resolve_description(model, asked.model_kwargs, on_event)
    check_start(asked.lora, plan_load(base, asked.model_kwargs, on_event=lambda event: None), asked.training.grid)
    trust = bool(asked.model_kwargs.get("trust_remote_code", False))
    contract = load_base_contract(base, trust).with_chat_template(asked.data.chat_template)
    train, test, _ = read_examples(asked, contract, on_event)
    load = plan_load(base, asked.model_kwargs, train.longest, on_event)
    if load.device.type != "cpu":
        on_event(Note(f"plan: the figures are for the CPU; of {load.device} nothing is known", warning=True))
    values = fit_to_machine(asked.training.values, load.device, on_event)
    held_out = len(test) if values.get("do_eval") is not False else 0
    config = read_model_config(base, trust)
    check_layer_count(asked.training.checkpoint_layers, getattr(config.get_text_config(), "num_hidden_layers", None))
    asked = decide_rows(asked, config, load, train, on_event)
    width = config.get_text_config().hidden_size
    arguments = training_arguments(values, len(train), held_out, width, load.device, Path("-"), on_event)
    forecast = TrainingForecast(base, config, asked, load, arguments, train, contract.pad_token_id, on_event)
    found = forecast.plan(batches=4, budget=10.0)
    return found if found.fits else replace(found, suggestions=tuple(forecast.suggestions(found)))


def check_memory(forecast: TrainingForecast, skip: bool, on_event: OnEvent) -> Plan | None:
    """Say what the run will take; raise InfeasibleError if memory is not enough, or warn with `skip`. None if it cannot be estimated.

    An estimate that fails never stops a run: the reason is said.
    """
    try:
        found = forecast.plan(batches=0, budget=0.5)
    except PhinetuneError:
        raise
    except Exception as error:  # whatever a foreign model's code makes of tensors without numbers
        reason = first_line(error)
        on_event(Note(f"plan: memory and time cannot be estimated: {reason}", warning=True))
        return None
    on_event(Note(f"plan: {describe(found)}"))
    if found.fits:
        return found
    available = found.available or 0
    what = f"memory: the run needs about {gigabytes(found.needed)}, {gigabytes(available)} can be had"
    if skip:
        on_event(Note(f"{what}; going on, as training_config.skip_memory_check says", warning=True))
        return found
    cheapest = next(iter(forecast.suggestions(found)), None)
    hint = f"{cheapest.text} ({gigabytes(cheapest.needed)}); or " if cheapest else ""
    raise InfeasibleError(what, f"{hint}set training_config.skip_memory_check=true to try all the same")


class TrainingForecast:
    """The forecast of one run whose configs, examples and base config have been read."""

    def __init__(
        self,
        base: Path,
        config: Any,
        asked: TrainingRequest,
        load: LoadPlan,
        arguments: Any,
        train: Examples,
        pad_id: int,
        on_event: OnEvent = log_event,
    ) -> None:
        self.base, self.config, self.asked, self.load = base, config, asked, load
        self.arguments, self.train, self.pad_id, self.on_event = arguments, train, pad_id, on_event
        self._process: int | None = None
        self._estimators: dict[tuple[Any, ...], StepEstimator] = {}
        self._largest: dict[Variant, tuple[StepEstimate, dict[str, int]]] = {}
        self._clock: OperatorClock
        self.asked_for = Variant(
            arguments.per_device_train_batch_size,
            arguments.gradient_accumulation_steps,
            asked.training.checkpoint_layers or 0,
            load.quantization,
            str(getattr(arguments.optim, "value", arguments.optim)),
        )

    def plan(self, batches: int, budget: float) -> Plan:
        """The run as it was asked for; `batches` of it are timed (0: as `_time` says), with at most `budget` seconds of timing operators."""
        from phinetune.training.estimate_time import OperatorClock

        self._clock = OperatorClock(budget)
        return self._plan(self.asked_for, batches)

    def suggestions(self, found: Plan) -> Iterator[Suggestion]:
        """Changes that make the run fit: of each kind the mildest, first the kinds that give the same training."""
        done: set[str] = set()
        layers = getattr(self.config.get_text_config(), "num_hidden_layers", 1)
        for change in changes(self.asked_for, self.train.lengths, layers):
            if change.kind in done:
                continue
            variant = change.variant
            if found.available is not None and self._least(variant) > found.available:
                continue
            needed = needed_bytes(self._memory(variant))
            if found.available is None or needed <= found.available:
                done.add(change.kind)
                seconds = self._plan(variant, 0).total_seconds
                limit, lengths = variant.max_length, self.train.lengths
                touched = sum(n > limit for n in lengths) if limit else 0
                more = f" ({touched} of {len(lengths)} rows are longer)" if touched else ""
                yield Suggestion(f"set {change.text()}{more}", change.settings, needed, seconds, touched)

    def _plan(self, variant: Variant, batches: int) -> Plan:
        memory, available, resident = self._memory(variant), available_memory(), resident_memory()
        process, stored, time = memory["process"], self._stored_bytes(), self._time(variant, batches)
        measured = measuring_dtype(self._stored_dtype(), self._parameters()).itemsize * self._parameters()
        compared = max(
            _MERGE, process + int(SPARE * measured)
        )  # base and adapter, then the merged model: what merge asks for
        return Plan(
            memory=memory,
            peak=sum(memory.values()),
            loading_peak=self._loading(variant),
            available=None if available is None else available + resident,
            step_seconds=time.step_seconds,
            steps=self._steps(variant),
            flops_per_step=time.flops_per_step,
            tokens_per_step=time.tokens_per_step,
            merge_peak=compared if available is None or compared < available else _MERGE,
            export_peak=process + 4 * self._parameters() + stored,
            batch={
                "per_device_train_batch_size": variant.batch,
                "gradient_accumulation_steps": variant.accumulation,
                **self._largest_step(variant)[1],
            },
        )

    def _time(self, variant: Variant, batches: int) -> RunTime:
        """Of `batches` typical batches; of the largest one, scaled by the tokens of typical ones, where `batches` is 0."""
        from phinetune.training.estimate_run import run_time, typical_batches

        estimator, limit = self._estimator(variant), variant.max_length
        typical = typical_batches(
            self.train, variant.batch, self._collator(variant), batches or 1, self.arguments.seed, limit
        )
        if batches:
            steps = [(estimator(b), b) for b in typical]
            return run_time(estimator, steps, variant.accumulation, self._clock, _MEASURING, self.on_event)
        step, sizes = self._largest_step(variant)
        share = min(1.0, typical[0]["input_ids"].numel() / sizes["tokens"])
        time = run_time(estimator, [(step, typical[0])], variant.accumulation, self._clock)
        return replace(time, step_seconds=share * time.step_seconds, flops_per_step=int(share * time.flops_per_step))

    def _largest_step(self, variant: Variant) -> tuple[StepEstimate, dict[str, int]]:
        """The estimate of the largest batch, and the batch's sizes."""
        from phinetune.training.estimate_run import largest_batch

        if variant not in self._largest:
            rows = largest_batch(self.train, variant.batch, variant.max_length)
            batch = self._collator(variant)(rows)
            sizes = {
                "rows": len(rows),
                "tokens": batch["input_ids"].numel(),
                "learned": int((batch["labels"] != MASKED).sum()),
            }
            self._largest[variant] = self._estimator(variant)(batch), sizes
        return self._largest[variant]

    def _memory(self, variant: Variant) -> dict[str, int]:
        """Part -> bytes of the step with the largest batch."""
        step = self._largest_step(variant)[0]
        peak = step.peak
        parts = {"process": self._process_bytes(), **{k: v for k, v in sorted(peak.parts.items()) if v}}
        if variant.quantization is not None and not self._gives_back(variant):
            parts["files"] = self._stored_bytes()
        moving = sum(parts.get(k, 0) for k in ("activations", "logits", "temporaries", "gradients"))
        share = _SLACK_CHECKPOINTING if variant.checkpoint_layers else _SLACK
        return {**parts, "allocator": _SLACK_HANDED_ON if step.hands_on else int(share * moving)}

    def _least(self, variant: Variant) -> int:
        """Bytes without any batch: no batch size helps where these do not fit."""
        estimator = self._estimator(variant)
        kept = estimator.weights + estimator.adapters + estimator.optimizer
        return self._process_bytes() + kept

    def _process_bytes(self) -> int:
        """What this process has, with all that training imports, before it loads and times anything."""
        if self._process is None:
            self._process = resident_memory() + _FIRST_USE
        return self._process

    def _loading(self, variant: Variant) -> int:
        """Bytes while the weights are read: those in memory, and the file's pages where they are converted."""
        import torch

        process, stored = self._process_bytes(), self._stored_bytes()
        if variant.quantization is not None:
            return process + (0 if self._gives_back(variant) else stored) + self._estimator(variant).weights
        same = self._stored_dtype() == self.load.dtype
        weights = self._parameters() * torch.empty((), dtype=self.load.dtype).element_size()
        return process + (weights if same else weights + stored)

    def _gives_back(self, variant: Variant) -> bool:
        """True if the file's pages of a weight are given back when it has been quantized: where the file is mapped, not read."""
        return isinstance(variant.quantization, Grid) or self._stored_dtype() == self.load.dtype

    def _estimator(self, variant: Variant) -> StepEstimator:
        from phinetune.training.estimate import StepEstimator, StepSettings

        key = (variant.checkpoint_layers, variant.quantization, variant.accumulation > 1, variant.optimizer)
        if key not in self._estimators:
            self._estimators[key] = StepEstimator(
                StepSettings(
                    self.config, replace(self.load, quantization=variant.quantization), self.asked.lora,
                    variant.checkpoint_layers, self.asked.training.checkpoint_options, variant.optimizer,
                    variant.accumulation > 1, self.arguments.label_smoothing_factor, self.asked.training.fast_paths, self.asked.training.grid,
                )
            )  # fmt: skip
        return self._estimators[key]

    def _collator(self, variant: Variant) -> Collator:
        from phinetune.training.layout import padded_reason

        layout = self.asked.training.layout
        if layout == "auto" and padded_reason(self._estimator(variant).model, self.train.longest) is not None:
            layout = "padded"
        dense = not uses_blocks(self._estimator(variant).model)
        return Collator(
            self.pad_id,
            self.config.get_text_config().hidden_size,
            layout,
            dense,
            self.asked.training.fast_paths.rounded,
        )

    def _steps(self, variant: Variant) -> int:
        a = self.arguments
        if a.max_steps > 0:
            return int(a.max_steps)
        return math.ceil(
            math.ceil(len(self.train) / (variant.batch * variant.accumulation)) * float(a.num_train_epochs)
        )

    def _parameters(self) -> int:
        """Numbers in the base model's weights."""
        return self._estimator(self.asked_for).numbers

    def _stored_dtype(self) -> Any:
        import torch

        from phinetune.model.folder import stored_dtype

        if weight_files(self.base)[0]:
            return stored_dtype(self.base)
        named = getattr(self.config, "dtype", None)
        return getattr(torch, named, torch.float32) if isinstance(named, str) else named or torch.float32

    def _stored_bytes(self) -> int:
        """Bytes of the weights' files, or what they would be."""
        files = weight_files(self.base)[0]
        if files:
            return sum(f.stat().st_size for f in files)
        return self._parameters() * (2 if "16" in str(self._stored_dtype()) else 4)
