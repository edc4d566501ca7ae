"""Adapters in a model: moved, merged, combined and refused without leaving anything behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import phinetune.lora as lora
from phinetune.errors import AdapterError, ConfigError, OutputError
from phinetune.lora.config import LoraConfig, parse_lora_config
from tiny import tiny_model

IDS = torch.tensor([[1, 7, 42, 100, 5, 200]])


def randomized(adapter: Any) -> Any:
    torch.manual_seed(3)
    for layer in adapter.layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    for part in (*adapter.modules.values(),):
        for parameter in part.parameters():
            parameter.data.add_(0.05)
    return adapter


@pytest.fixture
def adapters() -> lora.Adapters:
    found = lora.Adapters(tiny_model())
    randomized(found.add("a", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])))
    randomized(found.add("b", LoraConfig(r=2, target_modules=["down_proj", "o_proj"])))
    return found


@pytest.mark.parametrize("order", ["in then out", "out then in"])
def test_a_model_that_was_cast_while_an_adapter_was_elsewhere_still_works(adapters: lora.Adapters, order: str) -> None:
    adapters.use("a" if order == "in then out" else None)
    adapters.model.to(torch.float64)
    adapters.use(None if order == "in then out" else "a")
    assert adapters.model(IDS).logits.dtype == torch.float64
    adapters.use("a")
    assert adapters.model(IDS).logits.dtype == torch.float64


def test_merging_one_adapter_while_another_is_in_is_refused(adapters: lora.Adapters) -> None:
    adapters.use("a")
    before = adapters.model(IDS).logits
    with pytest.raises(AdapterError, match="another adapter is in the model"):
        lora.merge(adapters.model, adapters["b"])
    assert torch.equal(adapters.model(IDS).logits, before)
    adapters.use("b")
    expected = adapters.model(IDS).logits
    adapters.use(None)
    lora.merge(adapters.model, adapters["b"])
    assert (adapters.model(IDS).logits - expected).abs().max() < 1e-5


def test_taking_out_what_was_merged_is_an_error_and_not_an_undoing(adapters: lora.Adapters) -> None:
    adapters.use("b")
    lora.merge(adapters.model)
    merged = adapters.model(IDS).logits
    with pytest.raises(AdapterError, match="was it merged"):
        adapters.use(None)
    assert torch.equal(adapters.model(IDS).logits, merged)


def test_only_the_adapter_that_is_in_learns_and_the_base_never(adapters: lora.Adapters) -> None:
    base = {n: p.clone() for n, p in adapters.model.named_parameters()}
    for name in ("a", "b", "a"):
        adapters.use(name)
        learning = [n for n, p in adapters.model.named_parameters() if p.requires_grad]
        assert learning and all("lora_" in n or n.startswith("lm_head") for n in learning)
        optimizer = torch.optim.SGD([p for p in adapters.model.parameters() if p.requires_grad], lr=0.1)
        adapters.model(IDS).logits.square().mean().backward()
        optimizer.step()
        adapters.model.zero_grad()
    adapters.use(None)
    assert all(torch.equal(p, base[n]) for n, p in adapters.model.named_parameters())


@pytest.mark.parametrize("rank", [0, -1, 2.5, "3", True])
def test_a_combination_needs_a_rank_that_is_one(adapters: lora.Adapters, rank: Any) -> None:
    adapters.add("c", LoraConfig(r=2, target_modules=["o_proj"]))
    with pytest.raises(ConfigError, match="rank: must be a whole number"):
        adapters.combine("d", {"b": 1.0, "c": 0.5}, "svd", rank)
    with pytest.raises(ConfigError, match="weights: one finite number"):
        adapters.combine("d", {"b": "1"})  # type: ignore[dict-item]
    assert adapters.names == ["a", "b", "c"]


def test_names_with_signs_that_mean_something_in_patterns_keep_their_ranks(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ModuleDict({"a+b": nn.Linear(8, 8), "c": nn.Linear(8, 8)}))

    model = build()
    patterns: dict[str, Any] = {"rank_pattern": {r"a\+b": 2}, "alpha_pattern": {r"a\+b": 64}}
    adapter = randomized(lora.inject(model, LoraConfig(r=4, lora_alpha=4, target_modules=["a+b", "c"], **patterns)))
    lora.save_adapter(adapter, tmp_path)
    again = lora.load_adapter(build(), tmp_path)
    assert {n: (m.r, m.scaling) for n, m in again.layers.items()} == {"0.a+b": (2, 32.0), "0.c": (4, 1.0)}


def test_hooks_on_a_layer_go_on_firing() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    lora.inject(model, LoraConfig(r=2, task_type=None))
    model(torch.randn(3, 4))
    assert seen == [(3, 4)]


def test_layers_that_stand_twice_or_have_no_weight_of_their_own_are_refused() -> None:
    shared = nn.Linear(4, 4)
    with pytest.raises(AdapterError, match="the same layer stands at 0 and 1"):
        lora.inject(nn.Sequential(shared, shared), LoraConfig(r=2, task_type=None))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(AdapterError, match="its weight is computed from other parameters"):
        lora.inject(normed, LoraConfig(r=2, target_modules=["0"], task_type=None))


@pytest.mark.parametrize("content", ["[]", "null", "5", '"abc"'])
def test_a_configuration_file_that_holds_something_else_is_refused(content: str, tmp_path: Path) -> None:
    lora.save_adapter(lora.inject(tiny_model(), LoraConfig(r=2)), tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match="must hold keys and values"):
        lora.read_adapter(tmp_path)


def test_keys_of_a_newer_peft_that_are_off_do_not_matter_and_others_are_refused(tmp_path: Path) -> None:
    lora.save_adapter(lora.inject(tiny_model(), LoraConfig(r=2)), tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(values | {"use_xyz": False, "xyz_config": None, "ids": []})
    )
    assert lora.read_adapter(tmp_path).config.r == 2
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"use_xyz": True}))
    with pytest.raises(ConfigError, match="use_xyz: unknown key"):
        lora.read_adapter(tmp_path)
    with pytest.raises(ConfigError, match="use_xyz: unknown key"):  # what a user writes is never passed over
        parse_lora_config({"use_xyz": False})


def test_missing_keys_of_a_saved_adapter_mean_what_they_mean_to_peft() -> None:
    assert parse_lora_config({"target_modules": ["q_proj"]}, saved=True).r == 8
    assert parse_lora_config({"target_modules": ["q_proj"]}, saved=True).lora_alpha == 8


def test_split_is_refused_where_the_file_could_not_be_read_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    config = LoraConfig(r=2, target_modules=["q"], fused_modules={"0": {"q": 4, "k": 8}}, task_type=None)
    adapter = lora.inject(model, config)
    with pytest.raises(AdapterError, match="split"):
        lora.save_adapter(adapter, tmp_path, split=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        lora.save_adapter(adapter, tmp_path / "file")
