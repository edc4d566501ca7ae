"""What a training run will take, before anything is loaded: memory, time, and the cheapest change that makes it fit if it does not.

    read configs -> config.json -> contract -> examples -> the step without numbers -> memory | time -> suggestions

The weights need not be on disk. What is estimated is a run on this machine's CPU, in one process. Memory is what the process has at
most, its libraries and the file pages of the weights included. Time is that of the optimizer steps, without evaluation and loading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.data.batches import Collator
from phinetune.data.encoding import MASKED
from phinetune.data.messages import DataConfig
from phinetune.errors import InfeasibleError, PhinetuneError
from phinetune.events import Note, OnEvent, log_event
from phinetune.lora.config import LoraConfig
from phinetune.model.compute import available_memory, resident_memory
from phinetune.model.folder import resolve_description, weight_files
from phinetune.model.load import LoadPlan, load_base_contract, plan_load, read_model_config
from phinetune.model.quantized import Quantization
from phinetune.training.config import fit_to_machine, training_arguments
from phinetune.workflow.finetune import TrainingRequest, check_start, read_examples, read_request

if TYPE_CHECKING:
    from phinetune.data.examples import Examples
    from phinetune.training.estimate import StepEstimate, StepEstimator
    from phinetune.training.estimate_run import RunTime
    from phinetune.training.estimate_time import OperatorClock

_SLACK = 0.10
"""Share of all other memory that glibc's allocator keeps beyond what is alive (measured: 0.05 to 0.2, most with checkpointing)."""
_FIRST_USE = 60 << 20
"""Bytes of code and buffers that torch and oneDNN make when they are first used (measured)."""
_MERGE = 400 << 20
"""Most bytes of a merge from file to file (measured on a model of Phi-3-mini's size: 353 MB)."""


@dataclass(frozen=True)
class Suggestion:
    """A change that makes the run fit, and what the run then takes."""

    text: str
    settings: dict[str, Any]
    """The change as keys of `finetune`, such as training_config.per_device_train_batch_size."""
    peak: int
    seconds: float
    rows_touched: int = 0
    """Rows longer than a suggested max_length: they are cut or left out."""


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes and seconds; every figure is an estimate."""

    memory: dict[str, int]
    """Part -> bytes; their sum is `peak`."""
    peak: int
    loading_peak: int
    """Most bytes while the model is read."""
    available: int | None
    """Bytes that the process can have in all; None where the system does not say."""
    step_seconds: float
    steps: int
    flops_per_step: int
    tokens_per_step: float
    merge_peak: int
    """Of merging the adapter afterwards."""
    export_peak: int
    """Of an ONNX export afterwards: a rough figure."""
    batch: dict[str, int]
    """Sizes of the batch that the memory is for: per_device_train_batch_size, gradient_accumulation_steps, rows, tokens, learned."""
    suggestions: tuple[Suggestion, ...] = field(default=())

    @property
    def total_seconds(self) -> float:
        """Of all optimizer steps."""
        return self.step_seconds * self.steps

    @property
    def needed(self) -> int:
        """The most bytes at any time, loading included."""
        return max(self.peak, self.loading_peak)

    @property
    def fits(self) -> bool:
        """True if the memory is enough, as far as that is known."""
        return self.available is None or self.needed <= self.available


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
    check_start(asked.lora, plan_load(base, asked.model_kwargs, on_event=lambda event: None))
    trust = bool(asked.model_kwargs.get("trust_remote_code", False))
    contract = load_base_contract(base, trust).with_chat_template(asked.data.chat_template)
    train, test, _ = read_examples(asked, contract, on_event)
    load = plan_load(base, asked.model_kwargs, train.longest, on_event)
    values = fit_to_machine(asked.training.values, load.device, on_event)
    held_out = len(test) if values.get("do_eval") is not False else 0
    config = read_model_config(base, trust)
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        on_event(Note(f"plan: memory and time cannot be estimated: {reason}", warning=True))
        return None
    on_event(Note(f"plan: {_text(found)}"))
    if found.fits:
        return found
    available = found.available or 0
    what = f"memory: the run needs about {_gb(found.needed)}, {_gb(available)} can be had"
    if skip:
        on_event(Note(f"{what}; going on, as training_config.skip_memory_check says", warning=True))
        return found
    cheapest = next(iter(forecast.suggestions(found)), None)
    hint = f"{cheapest.text} ({_gb(cheapest.peak)}); or " if cheapest else ""
    raise InfeasibleError(what, f"{hint}set training_config.skip_memory_check=true to try all the same")


def _text(found: Plan) -> str:
    minutes = found.total_seconds / 60
    total = f"{minutes:.0f} min" if minutes >= 2 else f"{found.total_seconds:.0f} s"
    return f"about {_gb(found.needed)} of memory, {found.step_seconds:.2g} s a step, {total} for {found.steps} steps"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


@dataclass(frozen=True)
class _Variant:
    """What may be changed to make a run fit."""

    batch: int
    accumulation: int
    checkpointing: bool
    quantization: Quantization | None
    max_length: int | None = None


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
        self.resident = resident_memory()
        self._estimators: dict[tuple[Any, ...], StepEstimator] = {}
        self._largest: dict[_Variant, tuple[StepEstimate, dict[str, int]]] = {}
        self._clock: OperatorClock
        flag = getattr(arguments, "activation_checkpointing", getattr(arguments, "gradient_checkpointing", False))
        self.asked_for = _Variant(
            arguments.per_device_train_batch_size,
            arguments.gradient_accumulation_steps,
            bool(flag),
            load.quantization,
        )

    def plan(self, batches: int, budget: float) -> Plan:
        """The run as it was asked for; `batches` of it are timed (0: as `_time` says), with at most `budget` seconds of timing operators."""
        from phinetune.training.estimate_time import OperatorClock

        self._clock = OperatorClock(budget)
        return self._plan(self.asked_for, batches)

    def suggestions(self, found: Plan) -> Iterator[Suggestion]:
        """Changes that make the run fit, the cheapest first: those that give the same training, then those that change it."""
        for text, settings, variant in self._candidates():
            memory = self._memory(variant)
            needed = max(sum(memory.values()), self._loading(variant))
            if found.available is None or needed <= found.available:
                changed = self._plan(variant, 1)
                lengths = self.train.lengths
                touched = sum(n > variant.max_length for n in lengths) if variant.max_length else 0
                more = f", {touched} of {len(lengths)} rows are longer" if touched else ""
                yield Suggestion(text + more, settings, needed, changed.total_seconds, touched)

    def _candidates(self) -> Iterator[tuple[str, dict[str, Any], _Variant]]:
        asked, key = self.asked_for, "training_config."
        sizes = [b for b in (1 << i for i in reversed(range(10))) if b < asked.batch]

        def smaller(b: int) -> dict[str, Any]:
            steps = asked.accumulation * -(-asked.batch // b)
            return {f"{key}per_device_train_batch_size": b, f"{key}gradient_accumulation_steps": steps}

        def variant(settings: dict[str, Any], **changes: Any) -> tuple[str, dict[str, Any], _Variant]:
            text = "set " + ", ".join(f"{k}={v}" for k, v in settings.items()).replace("=True", "=true")
            new = {k.rpartition(".")[2]: v for k, v in settings.items()}
            b = new.get("per_device_train_batch_size", asked.batch)
            steps = new.get("gradient_accumulation_steps", asked.accumulation)
            return text, settings, replace(asked, batch=b, accumulation=steps, **changes)

        for b in sizes:
            yield variant(smaller(b))
        if not asked.checkpointing:
            ckpt = {f"{key}gradient_checkpointing": True}
            for b in (asked.batch, *sizes):
                more = smaller(b) if b < asked.batch else {}
                yield variant({**ckpt, **more}, checkpointing=True)
        least = {
            **({} if asked.checkpointing else {f"{key}gradient_checkpointing": True}),
            **(smaller(1) if sizes else {}),
        }
        for length in _shorter(self.train.lengths):
            settings = {**least, "data.max_length": length}
            yield variant(settings, checkpointing=True, max_length=length)
        if asked.quantization is None and self.load.device.type == "cpu":
            quantized = {"model_kwargs.load_in_4bit": True}
            yield variant(quantized, quantization=Quantization())
            yield variant({**quantized, **least}, quantization=Quantization(), checkpointing=True)

    def _plan(self, variant: _Variant, batches: int) -> Plan:
        memory, available = self._memory(variant), available_memory()
        process, stored, time = memory["process"], self._stored_bytes(), self._time(variant, batches)
        return Plan(
            memory=memory,
            peak=sum(memory.values()),
            loading_peak=self._loading(variant),
            available=None if available is None else available + resident_memory(),
            step_seconds=time.step_seconds,
            steps=self._steps(variant),
            flops_per_step=time.flops_per_step,
            tokens_per_step=time.tokens_per_step,
            merge_peak=max(_MERGE, process + int(1.3 * stored)),
            export_peak=process + 4 * self._parameters() + stored,
            batch={
                "per_device_train_batch_size": variant.batch,
                "gradient_accumulation_steps": variant.accumulation,
                **self._largest_step(variant)[1],
            },
        )

    def _time(self, variant: _Variant, batches: int) -> RunTime:
        """Of `batches` typical batches; of the largest one, scaled by the tokens of typical ones, where `batches` is 0."""
        from phinetune.training.estimate_run import run_time, typical_batches

        estimator, limit = self._estimator(variant), variant.max_length
        typical = typical_batches(
            self.train, variant.batch, self._collator(variant), batches or 1, self.arguments.seed, limit
        )
        if batches:
            return run_time(estimator, [(estimator(b), b) for b in typical], variant.accumulation, self._clock)
        step, sizes = self._largest_step(variant)
        share = min(1.0, typical[0]["input_ids"].numel() / sizes["tokens"])
        time = run_time(estimator, [(step, typical[0])], variant.accumulation, self._clock)
        return replace(time, step_seconds=share * time.step_seconds, flops_per_step=int(share * time.flops_per_step))

    def _largest_step(self, variant: _Variant) -> tuple[StepEstimate, dict[str, int]]:
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

    def _memory(self, variant: _Variant) -> dict[str, int]:
        """Part -> bytes of the step with the largest batch."""
        peak = self._largest_step(variant)[0].peak
        process = max(self.resident, resident_memory()) + _FIRST_USE
        parts = {"process": process, **{k: v for k, v in sorted(peak.parts.items()) if v}}
        if variant.quantization is not None:  # what is not in 4 bits lies in the file's pages, which keeps all of them
            parts["files"] = max(0, self._stored_bytes() - self._kept(variant))
        return {**parts, "allocator": int(_SLACK * sum(parts.values()))}

    def _loading(self, variant: _Variant) -> int:
        """Bytes while the weights are read: those in memory, and the file's pages where they are converted."""
        import torch

        process, stored = self.resident + _FIRST_USE, self._stored_bytes()
        if variant.quantization is not None:
            return process + stored + self._estimator(variant).weights
        same = self._stored_dtype() == self.load.dtype
        weights = self._parameters() * torch.empty((), dtype=self.load.dtype).element_size()
        return process + (weights if same else weights + stored)

    def _kept(self, variant: _Variant) -> int:
        """Bytes of a 4-bit model that are pages of the file: what stayed in the dtype that the file has."""
        same = self._stored_dtype() == self.load.dtype
        return self._estimator(variant).unquantized if same else 0

    def _estimator(self, variant: _Variant) -> StepEstimator:
        from phinetune.training.estimate import StepEstimator, StepSettings

        key = (variant.checkpointing, variant.quantization, variant.accumulation > 1)
        if key not in self._estimators:
            optimizer = str(getattr(self.arguments.optim, "value", self.arguments.optim))
            self._estimators[key] = StepEstimator(
                StepSettings(
                    self.config, replace(self.load, quantization=variant.quantization), self.asked.lora,
                    {"use_reentrant": False} if variant.checkpointing else None, optimizer, variant.accumulation > 1,
                    self.arguments.label_smoothing_factor,
                )
            )  # fmt: skip
        return self._estimators[key]

    def _collator(self, variant: _Variant) -> Collator:
        from phinetune.training.layout import padded_reason

        layout = self.asked.training.layout
        if layout == "auto" and padded_reason(self._estimator(variant).model, self.train.longest) is not None:
            layout = "padded"
        return Collator(self.pad_id, self.config.get_text_config().hidden_size, layout)

    def _steps(self, variant: _Variant) -> int:
        a = self.arguments
        if a.max_steps > 0:
            return int(a.max_steps)
        return math.ceil(
            math.ceil(len(self.train) / (variant.batch * variant.accumulation)) * float(a.num_train_epochs)
        )

    def _parameters(self) -> int:
        """Numbers in the base model's weights."""
        return self._estimator(replace(self.asked_for, quantization=self.load.quantization)).numbers

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


def _shorter(lengths: list[int]) -> list[int]:
    """Limits that most examples keep: powers of two between the median and the longest example, the longest first."""
    middle, longest = sorted(lengths)[len(lengths) // 2], max(lengths)
    return [n for n in (1 << i for i in reversed(range(5, 20))) if middle <= n < longest]
