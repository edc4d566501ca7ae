"""The result of a training run's forecast, and the changes that may make a run fit. Values only: nothing is estimated here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from phinetune.model.quantized import Format, Quantization
from phinetune.training.checkpointing import LayerCount


def needed_bytes(memory: dict[str, int]) -> int:
    """Of a plan's parts, those that must be in memory at once."""
    return sum(size for part, size in memory.items() if part != "files")


@dataclass(frozen=True)
class Suggestion:
    """A change that makes the run fit, and what the run then takes."""

    text: str
    settings: dict[str, Any]
    """The change as keys of `finetune`, such as training_config.per_device_train_batch_size."""
    needed: int
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
    """Most bytes while the model is read, the files' pages included."""
    available: int | None
    """Bytes that the process can have in all; None where the system does not say."""
    step_seconds: float
    steps: int
    flops_per_step: int
    tokens_per_step: float
    merge_peak: int
    """Of merging the adapter afterwards, with the comparison on the probes where memory allows it."""
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
    def resident_peak(self) -> int:
        """The most bytes that the system will count as the process's, loading included."""
        return max(self.peak, self.loading_peak)

    @property
    def needed(self) -> int:
        """The bytes without which the run fails: unchanged pages of the weights' files can be dropped and read again."""
        return needed_bytes(self.memory)

    @property
    def fits(self) -> bool:
        """True if the memory is enough, as far as that is known."""
        return self.available is None or self.needed <= self.available


@dataclass(frozen=True)
class Variant:
    """What may be changed to make a run fit."""

    batch: int
    accumulation: int
    checkpoint_layers: LayerCount
    quantization: Format | None
    optimizer: str
    max_length: int | None = None


@dataclass(frozen=True)
class Change:
    """One change, as keys of `finetune`, and the run that it makes. `kind` names changes that differ in their size only."""

    kind: str
    settings: dict[str, Any]
    variant: Variant

    def text(self) -> str:
        """The settings as they are given on the command line."""
        return ", ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in self.settings.items())


_T = "training_config."


def changes(asked: Variant, lengths: Sequence[int], layers: int) -> Iterator[Change]:
    """What may be changed, the cheapest first: batches, recomputing, optimizer states, then what changes the training itself.

    lengths: the examples', in tokens; layers: how many decoder layers the model has.
    """
    sizes = [b for b in (1 << i for i in reversed(range(10))) if b < asked.batch]

    def smaller(batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
        steps = asked.accumulation * -(-asked.batch // batch)
        settings = {f"{_T}per_device_train_batch_size": batch, f"{_T}gradient_accumulation_steps": steps}
        return settings, {"batch": batch, "accumulation": steps}

    for batch in sizes:
        settings, fields = smaller(batch)
        yield Change("batch", settings, replace(asked, **fields))
    more: list[LayerCount] = []
    if asked.checkpoint_layers != "all":
        more = [n for n in sorted({layers * i // 4 for i in (1, 2, 3)}) if n > int(asked.checkpoint_layers)] + ["all"]
    for count in more:
        yield Change("checkpointing", {f"{_T}checkpoint_layers": count}, replace(asked, checkpoint_layers=count))
    recompute = {f"{_T}checkpoint_layers": "all"} if more else {}
    for batch in sizes if more else []:
        settings, fields = smaller(batch)
        yield Change("checkpointing", {**recompute, **settings}, replace(asked, checkpoint_layers="all", **fields))
    least, fields = smaller(1) if sizes else ({}, {})
    least, leanest = {**recompute, **least}, replace(asked, checkpoint_layers="all", **fields)
    if asked.optimizer.startswith("adamw_torch") and importlib.util.find_spec("bitsandbytes") is not None:
        bits: dict[str, Any] = {f"{_T}optim": "adamw_8bit"}
        yield Change("optimizer", bits, replace(asked, optimizer="adamw_8bit"))
        yield Change("optimizer", {**least, **bits}, replace(leanest, optimizer="adamw_8bit"))
    for length in _shorter(lengths):
        yield Change("length", {**least, "data.max_length": length}, replace(leanest, max_length=length))
    if asked.quantization is None and importlib.util.find_spec("bitsandbytes") is not None:
        bits = {"model_kwargs.load_in_4bit": True}
        yield Change("4 bits", bits, replace(asked, quantization=Quantization()))
        yield Change("4 bits", {**bits, **least}, replace(leanest, quantization=Quantization()))


def _shorter(lengths: Sequence[int]) -> list[int]:
    """Limits that half of the examples keep: powers of two between the median and the longest example, the longest first."""
    middle, longest = sorted(lengths)[len(lengths) // 2], max(lengths)
    return [n for n in (1 << i for i in reversed(range(5, 20))) if middle <= n < longest]


def describe(found: Plan) -> str:
    """The plan in a line."""
    minutes = found.total_seconds / 60
    total = f"{minutes:.0f} min" if minutes >= 2 else f"{found.total_seconds:.0f} s"
    return (
        f"about {gigabytes(found.needed)} of memory, {found.step_seconds:.2g} s a step, {total} for {found.steps} steps"
    )


def gigabytes(size: float) -> str:
    """Bytes for people: 5.3 GB."""
    return f"{size / 1e9:.1f} GB"
