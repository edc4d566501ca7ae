"""Attention chosen by measurement: once a machine and length, kept, said, and never against what the user asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import phinetune
from phinetune.errors import ConfigError
from phinetune.events import Event
from phinetune.model import attention_choice
from phinetune.model.attention_choice import attention_seconds, choose_rows, typical_length
from phinetune.model.fast import FastPaths
from test_training import FAST, FP32
from zoo import zoo_model

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "machine.json"


def measuring(monkeypatch: pytest.MonkeyPatch, blocks: float, fused: float) -> list[tuple[Any, ...]]:
    """Instead of measuring: these seconds; the shapes asked for."""
    asked: list[tuple[Any, ...]] = []

    def seconds(*shape: Any) -> tuple[float, float]:
        asked.append(shape)
        return blocks, fused

    monkeypatch.setattr(attention_choice, "_measure", seconds)
    return asked


def test_both_are_timed_once_for_lengths_up_to_the_next_power_of_two(cache: Path) -> None:
    first = attention_seconds(4, 2, 16, torch.float32, 100)
    assert all(0 < s < 10 for s in first)
    (entry,) = [e for e in json.loads(cache.read_text()).values() if "attention" in e]
    assert (entry["attention"], entry["blocks"], entry["fused"]) == (128, *first)
    assert attention_seconds(4, 2, 16, torch.float32, 65) == attention_seconds(4, 2, 16, torch.float32, 128) == first
    assert len(json.loads(cache.read_text())) == 1
    attention_seconds(4, 2, 16, torch.bfloat16, 100)
    attention_seconds(4, 4, 16, torch.float32, 100)
    attention_seconds(4, 2, 16, torch.float32, 129)
    assert len(json.loads(cache.read_text())) == 4


@pytest.mark.parametrize(("fused", "blocks"), [(0.5, False), (0.89, False), (0.95, True), (1.0, True), (3.0, True)])
def test_the_kernel_is_taken_only_where_it_is_clearly_faster(
    fused: float, blocks: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measuring(monkeypatch, 1.0, fused)
    said: list[Event] = []
    config = zoo_model("llama").config
    paths = choose_rows(FastPaths(norm=False), config, torch.bfloat16, CPU, [90, 110], said.append)
    assert paths == FastPaths(norm=False, fused_rows=not blocks)
    assert len(said) == (not blocks)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    assert [shape[3:5] for shape in asked] == [(torch.bfloat16, 128)]
    assert asked[0][0] / asked[0][1] == heads / groups


@pytest.mark.parametrize("fused", [True, False])
def test_what_was_asked_for_is_not_measured(fused: bool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measuring(monkeypatch, 1.0, 0.1)
    paths = FastPaths(fused_rows=fused)
    assert choose_rows(paths, zoo_model("llama").config, torch.float32, CPU, [90]) == paths
    assert choose_rows(FastPaths.none(), zoo_model("llama").config, torch.float32, CPU, [90]) == FastPaths.none()
    assert not asked


def test_without_rows_on_another_device_or_without_heads_nothing_is_measured(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measuring(monkeypatch, 1.0, 0.1)
    config = zoo_model("llama").config
    assert choose_rows(FastPaths(), config, torch.float32, CPU, []).fused_rows is False
    assert choose_rows(FastPaths(), config, torch.float32, torch.device("cuda"), [90]).fused_rows is False
    without: Any = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=64))
    assert choose_rows(FastPaths(), without, torch.float32, CPU, [90]).fused_rows is False
    assert not asked


def test_long_rows_weigh_more() -> None:
    assert typical_length([100, 100]) == 100
    assert typical_length([10] * 100 + [1000]) == 505
    assert typical_length([]) == 0


@pytest.mark.parametrize("faster", ["blocks", "fused"])
def test_finetune_trains_with_the_faster_one_and_says_so(
    faster: str,
    llama_folder: Path,
    tone_data: dict[str, Any],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measuring(monkeypatch, 1.0, 3.0 if faster == "blocks" else 0.3)
    said: list[str] = []

    def listen(event: Event) -> None:
        said.append(getattr(event, "text", ""))

    config = {
        **FAST,
        "train_sampling_strategy": "random",
        "layout": "padded",
    }  # a tree behind a mask is weighed as dearer
    found = phinetune.finetune(
        str(llama_folder), tone_data, config, {"r": 4}, FP32, tmp_path / faster, on_event=listen
    ).manifest
    assert found["computed"]["fast_paths"]["fused_rows"] is (faster == "fused")
    assert any("torch's fused kernel" in text for text in said) is (faster == "fused")
    asked = {**config, "fast_paths": {"fused_rows": faster != "fused"}}
    other = phinetune.finetune(str(llama_folder), tone_data, asked, {"r": 4}, FP32, tmp_path / "other").manifest
    assert other["computed"]["fast_paths"]["fused_rows"] is (faster != "fused")
    losses = [m["figures"]["train_loss"] for m in (found, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_switch_that_is_no_truth_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fast_paths.fused_rows: must be true or false"):
        phinetune.finetune("smollm2-135m", "tone", {"fast_paths": {"fused_rows": None}}, output_dir="-")
