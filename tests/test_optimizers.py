"""The optimizer of a run: 8-bit states train and resume, and what a machine lacks is replaced before anything begins."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from phinetune.artifact import partial_folder
from phinetune.errors import ConfigError
from phinetune.events import Event, Note, Progress
from phinetune.lora.adapter import WEIGHTS_FILE
from phinetune.training.optimizers import available_optimizer
from phinetune.workflow.finetune import finetune

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "save_steps": 2,
    "logging_steps": 1,
}
WIDE = {
    "r": 64,
    "lora_alpha": 64,
    "target_modules": ["q_proj", "o_proj"],
}  # 4096 elements and more a factor: below that bitsandbytes keeps 32 bits
FP32 = {"torch_dtype": "float32"}


class Kill(Exception):
    pass


def killed_at_4(event: Event) -> None:
    if isinstance(event, Progress) and event.stage == "training" and event.done >= 5:
        raise Kill


def state_bytes(checkpoint: Path) -> dict[torch.dtype, int]:
    """Bytes of the optimizer's moments in a checkpoint, by dtype."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    sizes: dict[torch.dtype, int] = {}
    for of_one in state.values():
        inner = of_one.get("__bnb_optimizer_quant_state__", of_one)
        for name, tensor in inner.items():
            if name in ("state1", "state2", "exp_avg", "exp_avg_sq"):
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return sizes


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit", "ademamix_8bit"])
def test_8bit_states_train_and_resume_bit_for_bit(
    optim: str, llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    config = {**CONFIG, "optim": optim, **({"learning_rate": 3e-3} if "lion" in optim else {})}
    whole = finetune(str(llama_folder), tone_data, config, WIDE, FP32, tmp_path / "whole")
    losses = whole.manifest["figures"]["train_loss"]
    assert losses[-1] < 0.95 * losses[0]
    sizes = state_bytes(tmp_path / "whole" / "checkpoint-10")
    assert sizes[torch.uint8] > 4 * sizes.get(torch.float32, 0) / 4, sizes  # most moments are in 8 bits
    with pytest.raises(Kill):
        finetune(str(llama_folder), tone_data, config, WIDE, FP32, tmp_path / "out", on_event=killed_at_4)
    assert partial_folder(tmp_path / "out").exists()
    resumed = finetune(str(llama_folder), tone_data, config, WIDE, FP32, tmp_path / "out")
    assert resumed.manifest["figures"]["resumed_at_step"] == 4
    assert (resumed.folder / WEIGHTS_FILE).read_bytes() == (whole.folder / WEIGHTS_FILE).read_bytes()


def test_8bit_adam_learns_as_adam_does(llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    runs = {}
    for optim in ("adamw_torch", "adamw_8bit"):
        config = {**CONFIG, "num_train_epochs": 4, "optim": optim}
        runs[optim] = finetune(str(llama_folder), tone_data, config, WIDE, FP32, tmp_path / optim)
    plain, eight = (run.manifest["figures"]["train_loss"] for run in runs.values())
    assert plain[-1] < 0.5 * plain[0]
    assert max(abs(a - b) for a, b in zip(plain, eight, strict=True)) < 0.15 * plain[0]
    a, b = (state_bytes(run.folder / "checkpoint-20") for run in runs.values())
    assert sum(b.values()) < 0.3 * sum(a.values())


@pytest.mark.parametrize(
    ("asked", "installed", "device", "found"),
    [
        ("adamw_torch", [], CPU, "adamw_torch"),
        ("adamw_8bit", ["bitsandbytes"], CPU, "adamw_8bit"),
        ("adamw_8bit", [], CPU, "adamw_torch_fused"),
        ("paged_adamw_8bit", ["bitsandbytes"], CPU, "adamw_8bit"),
        ("paged_adamw_8bit", [], CPU, "adamw_torch_fused"),
        ("paged_adamw_8bit", ["bitsandbytes"], CUDA, "paged_adamw_8bit"),
        ("paged_adamw_32bit", ["bitsandbytes"], CPU, "adamw_torch_fused"),
        ("paged_adamw_32bit", [], CUDA, "adamw_torch_fused"),
        ("paged_lion_8bit", ["bitsandbytes"], CPU, "lion_8bit"),
        ("adamw_torch_8bit", ["bitsandbytes"], CPU, "adamw_torch_fused"),  # torchao's
        ("galore_adamw_8bit", ["bitsandbytes"], CPU, "adamw_torch_fused"),
        ("adamw_apex_fused", [], CPU, "adamw_torch_fused"),
        ("adafactor", [], CPU, "adafactor"),
    ],
)  # fmt: skip
def test_what_is_not_here_is_replaced_and_said(
    asked: str, installed: list[str], device: torch.device, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    events: list[Event] = []
    assert available_optimizer(asked, device, events.append) == found
    notes = [e.text for e in events if isinstance(e, Note)]
    assert len(notes) == (asked != found) and all(asked in n and found in n for n in notes)


@pytest.mark.parametrize("asked", ["lion_8bit", "paged_lion_32bit", "rmsprop_bnb_8bit", "ademamix", "lomo"])
def test_what_has_no_replacement_is_an_error(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"optim: {asked} is not to be had on this machine, it needs"):
        available_optimizer(asked, CPU)


def test_every_optimizer_of_transformers_that_needs_a_package_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.training_args import OptimizerNames

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    without = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    for optimizer in OptimizerNames:
        try:
            kept = available_optimizer(optimizer, CPU, lambda event: None) == optimizer.value
        except ConfigError:
            kept = False
        assert kept == (optimizer.value in without), optimizer
