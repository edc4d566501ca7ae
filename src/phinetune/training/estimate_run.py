"""What a whole training run will take: its largest batch for memory, a few spread over its lengths for time.

    peak = process and libraries + what the loaded files keep mapped + the largest batch's step + what the allocator keeps

The largest batch is the one of the longest examples: random batches seldom meet it, so a run may stay below. Not here: one step
(`estimate.py`), one operator (`estimate_time.py`), where model and data come from.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phinetune.data.encoding import MASKED
from phinetune.errors import first_line
from phinetune.events import Note, OnEvent, log_event
from phinetune.training.estimate import StepEstimate, StepEstimator, trace_step
from phinetune.training.estimate_time import OperatorClock, call_overhead
from phinetune.training.estimate_trace import Call

if TYPE_CHECKING:
    from torch import Tensor

    from phinetune.data.examples import Examples

_DRAWN = 48
"""Random batches among which the ones to be timed are chosen."""


@dataclass(frozen=True)
class RunTime:
    """Seconds without evaluation, loading and saving; FLOPs of one optimizer step."""

    step_seconds: float
    flops_per_step: int
    tokens_per_step: float


Collate = Callable[[Sequence[dict[str, Any]]], "dict[str, Tensor]"]


def largest_batch(train: Examples, batch_size: int, max_length: int | None = None) -> list[dict[str, Any]]:
    """The `batch_size` longest examples of at most `max_length` tokens; of equally long ones, those with most to learn."""
    lengths = train.lengths
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    kept = [i for i in order if max_length is None or lengths[i] <= max_length] or order[-1:]
    near = [i for i in kept if lengths[i] == lengths[kept[min(batch_size, len(kept)) - 1]]]
    if len(near) > 1:  # the last places go to those with most to learn
        sure = [i for i in kept[:batch_size] if i not in set(near)]
        rows = [(train[i], i) for i in near[: 4 * batch_size]]
        near = [i for row, i in sorted(rows, key=lambda r: -sum(label != MASKED for label in r[0]["labels"]))]
        kept = [*sure, *near]
    return [_row(train[i]) for i in kept[:batch_size]]


def typical_batches(
    train: Examples, batch_size: int, collate: Collate, count: int, seed: int, max_length: int | None = None
) -> list[dict[str, Tensor]]:
    """`count` random batches, evenly spread over the sizes of what is drawn."""
    draw, lengths = random.Random(seed), train.lengths
    kept = [i for i, n in enumerate(lengths) if max_length is None or n <= max_length] or [0]
    drawn = [draw.sample(kept, min(batch_size, len(kept))) for _ in range(max(count, min(_DRAWN, len(kept))))]
    drawn.sort(key=lambda chosen: sum(lengths[i] for i in chosen))
    middles = [(2 * i + 1) * len(drawn) // (2 * count) for i in range(count)]
    return [collate([_row(train[i]) for i in drawn[middle]]) for middle in middles]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("input_ids", "labels", "segments") if key in row}


def run_time(
    estimator: StepEstimator,
    steps: Sequence[tuple[StepEstimate, dict[str, Tensor]]],
    accumulation: int,
    clock: OperatorClock,
    measuring: float = 0.0,
    on_event: OnEvent = log_event,
) -> RunTime:
    """Mean over `steps` (estimate, batch) of forward and backward, times `accumulation`, and the optimizer's part.

    In `measuring` seconds, if any, a step of three real layers is timed, to correct the sum of the operators by what it takes more.
    """
    overhead, count = _overhead(clock), len(steps)
    passes = [_sum(clock, s.calls, overhead) for s, _ in steps]
    more = _together(estimator, steps[count // 2][1], overhead, clock, measuring, on_event)
    clock.save()
    return RunTime(
        accumulation * more * sum(passes) / count + clock.update_seconds(estimator.adapters),
        accumulation * sum(s.flops for s, _ in steps) // count,
        accumulation * sum(b["input_ids"].numel() for _, b in steps) / count,
    )


def _sum(clock: OperatorClock, calls: Counter[Call], overhead: float) -> float:
    return clock.seconds(calls) + overhead * sum(calls.values())


def _together(
    estimator: StepEstimator,
    batch: dict[str, Tensor],
    overhead: float,
    clock: OperatorClock,
    measuring: float,
    on_event: OnEvent,
) -> float:
    """How many times longer a step takes than its operators by themselves, whose operands are in the caches: measured, or as last measured.

    Measured, it has in it whatever slows the machine down just now; remembered, it has not.
    """
    settings = estimator.settings
    name = f"together {settings.load.dtype} {settings.load.quantization} {settings.grid} {settings.fast_paths}"
    try:
        found = estimator.measured(batch, measuring, lambda calls: _sum(clock, calls, overhead)) if measuring else None
    except Exception as error:  # whatever a foreign model's code makes of made-up numbers
        on_event(Note(f"plan: no real step could be taken, time is that of its operators: {first_line(error)}"))
        found = None
    if found is None:
        return clock.known.get(name, 1.0)
    more = found[0] / _sum(clock, found[1], overhead)
    clock.remember(name, more / clock.slower())
    return more


def _overhead(clock: OperatorClock) -> float:
    """Seconds a call beyond its operator: what `clock` knows, or found with a small real model, once a machine."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from phinetune.data.batches import padded_batch
    from phinetune.lora.config import LoraConfig
    from phinetune.lora.injection import inject
    from phinetune.training.loss import supervised_loss

    if (known := clock.known.get("overhead")) is not None:
        return known
    with torch.random.fork_rng(devices=[]):
        config = LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config).train()
        inject(model, LoraConfig(r=2), on_event=lambda event: None)
        batch = padded_batch([{"input_ids": list(range(1, 17)), "labels": [MASKED] * 8 + list(range(9, 17))}], 0)

        def step() -> None:
            torch.autograd.backward(supervised_loss(model, model.get_output_embeddings(), batch, torch.float32))

        return call_overhead(step, trace_step(model, batch).calls)
