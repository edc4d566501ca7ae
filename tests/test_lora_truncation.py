"""A lower rank after the training: nothing lost that is not there, the error that Eckart and Young name, PEFT's reading, every later stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import phinetune
import phinetune.lora as lora
from phinetune.errors import AdapterError, ConfigError, OutputError, PhinetuneError
from phinetune.events import Note
from phinetune.lora.adapter import WEIGHTS_FILE
from phinetune.lora.truncation import low_rank
from phinetune.model.contract import CONTRACT_FILE
from phinetune.model.folder import resolve_model
from phinetune.model.load import quiet_transformers
from phinetune.workflow.truncate import truncate
from test_training import FAST, FP32
from tiny import tiny_model

IDS = torch.tensor([[1, 7, 42, 100, 5, 200]])


# The law: of all matrices of that rank the nearest, and how near.


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 9), st.integers(0, 99))
def test_the_error_is_the_root_of_the_squared_singular_values_cut_off(
    out: int, features: int, rank: int, r: int, seed: int
) -> None:
    make = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*s, generator=make, dtype=torch.float64) for s in ((rank, features), (out, rank)))
    r = min(r, out, features)
    new_A, new_B, S = low_rank(A, B, r)
    wanted = torch.linalg.svdvals(B @ A)
    assert new_A.shape[0] == new_B.shape[1] <= r
    torch.testing.assert_close(S[: len(wanted)], wanted[: len(S)], rtol=1e-9, atol=1e-9)
    found = torch.linalg.norm(B @ A - new_B @ new_A)
    torch.testing.assert_close(found, wanted[r:].square().sum().sqrt(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("true_rank", [1, 3])
def test_a_product_of_a_lower_rank_loses_nothing(true_rank: int) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(8, true_rank) @ torch.randn(true_rank, 20), torch.randn(12, 8)
    new_A, new_B, _ = low_rank(A, B, true_rank)
    assert new_A.shape == (true_rank, 20)
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-5, atol=1e-5)


def test_a_kernel_and_rows_without_factors_keep_their_shape_and_their_zeros() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(6, 4, 3, 3), torch.randn(10, 6, 1, 1)
    B[2:5] = 0
    new_A, new_B, _ = low_rank(A, B, 2)
    assert new_A.shape == (2, 4, 3, 3) and new_B.shape == (10, 2, 1, 1)
    assert torch.count_nonzero(new_B[2:5]) == 0 and torch.count_nonzero(new_B) == 14


# Files.


def adapter_in(folder: Path, model: Any, **config: Any) -> Path:
    """An adapter as training might leave it."""
    adapter = lora.inject(model, lora.LoraConfig(**{"r": 8, "lora_alpha": 12, **config}))
    torch.manual_seed(3)
    for part in adapter.parts().values():
        for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
    lora.save_adapter(adapter, folder)
    return folder


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS).logits
    return result


def logits_in_peft(kind: str, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    with quiet_transformers():
        return logits_of(PeftModel.from_pretrained(tiny_model(kind), str(folder)))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"o_proj": 2, "down_proj": 5}, "alpha_pattern": {"up_proj": 7}}),
    "slices": ("phi3", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "more": ("llama", {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"], "bias": "all"}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "dora": ("llama", {"use_dora": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_is_what_the_report_says_and_peft_reads_the_same(name: str, tmp_path: Path) -> None:
    kind, config = VARIANTS[name]
    source = adapter_in(tmp_path / "a", tiny_model(kind), **config)
    r = 3
    report = lora.truncate_adapter(source, tmp_path / "b", r)
    before, after = tiny_model(kind), tiny_model(kind)
    old, new = lora.load_adapter(before, source), lora.load_adapter(after, tmp_path / "b")
    assert report.r == r < report.rank and set(report.kept) == set(old.layers)
    for layer_name, layer in old.layers.items():
        cut = new.layers[layer_name]
        S = torch.linalg.svdvals(layer.delta())
        rank = layer.factors()[0].shape[0]
        assert cut.factors()[0].shape[0] == report.ranks[layer_name] == min(r, rank)
        assert cut.scaling == pytest.approx(layer.scaling, rel=1e-8)
        found = float(torch.linalg.norm(layer.delta() - cut.delta()))
        assert found == pytest.approx(float(S[r:].square().sum().sqrt()), rel=1e-3, abs=1e-5)
        assert found == pytest.approx(report.error[layer_name], rel=1e-3, abs=1e-5)
        assert report.kept[layer_name] == pytest.approx(float(S[:r].square().sum() / S.square().sum()), abs=1e-5)
    from safetensors.torch import load_file

    states = [load_file(str(f / WEIGHTS_FILE)) for f in (source, tmp_path / "b")]
    others = [n for n in states[0] if "lora_A" not in n and "lora_B" not in n and "lora_embedding" not in n]
    assert all(torch.equal(states[0][n], states[1][n]) for n in others) and states[0].keys() == states[1].keys()
    assert bool(others) == (name in ("more", "dora")) and report.with_lengths == (name == "dora")
    assert report.parameters == sum(t.numel() for t in states[0].values()) - sum(t.numel() for t in states[1].values())
    ours = logits_of(after)
    torch.testing.assert_close(logits_in_peft(kind, tmp_path / "b"), ours, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, logits_of(before), atol=1e-3)


def test_an_adapter_whose_changes_have_that_rank_already_says_the_same_with_fewer_numbers(tmp_path: Path) -> None:
    model = tiny_model()
    adapter = lora.inject(model, lora.LoraConfig(r=8, lora_alpha=12))
    torch.manual_seed(1)
    for layer in adapter.layers.values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape[0], 2) @ torch.randn(2, 8) / 10
    lora.save_adapter(adapter, tmp_path / "a", base_key="of this base")
    report = lora.truncate_adapter(tmp_path / "a", tmp_path / "b", 2)
    assert all(share == pytest.approx(1.0) for share in report.kept.values())
    again = tiny_model()
    lora.load_adapter(again, tmp_path / "b")
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-4, atol=1e-4)
    assert lora.read_adapter(tmp_path / "b").base_key == "of this base"
    assert (tmp_path / "b" / WEIGHTS_FILE).stat().st_size < (tmp_path / "a" / WEIGHTS_FILE).stat().st_size / 2


def test_a_file_of_peft_with_convolutions_is_truncated(tmp_path: Path) -> None:
    import peft

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.out = nn.Conv2d(3, 12, 3), nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.out(self.conv(x).mean((2, 3)))
            return y

    config = peft.LoraConfig(r=6, target_modules=["conv", "out"], init_lora_weights=False)
    wrapped = peft.get_peft_model(Net(), config)
    wrapped.save_pretrained(str(tmp_path / "a"))
    lora.truncate_adapter(tmp_path / "a", tmp_path / "b", 2)
    x = torch.randn(2, 3, 8, 8)
    ours = Net()
    lora.load_adapter(ours, tmp_path / "b")
    theirs = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "b"))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("r", "message"),
    [(8, "r: 8 is not below the adapter's rank, 8"), (20, "r: 20 is not below the adapter's rank, 8"), (0, "at least 1"), (True, "whole number"), (2.0, "whole number")],
)  # fmt: skip
def test_a_rank_that_is_no_lower_one_is_refused_with_both_numbers(r: Any, message: str, tmp_path: Path) -> None:
    source = adapter_in(tmp_path / "a", tiny_model())
    with pytest.raises(ConfigError, match=message):
        lora.truncate_adapter(source, tmp_path / "b", r)
    with pytest.raises(ConfigError, match=message):
        truncate(str(source), tmp_path / "c", r)
    assert not list(tmp_path.glob("[bc]*"))


def test_what_cannot_be_truncated_is_refused_by_name(tmp_path: Path) -> None:
    source = adapter_in(tmp_path / "a", tiny_model())
    with pytest.raises(OutputError, match="is the adapter itself"):
        lora.truncate_adapter(source, source, 2)
    values = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**values, "init_lora_weights": "pissa"}))
    with pytest.raises(AdapterError, match="base model changed by pissa"):
        lora.truncate_adapter(source, tmp_path / "b", 2)
    (source / "adapter_config.json").write_text(json.dumps({**values, "r": 5}))
    with pytest.raises(AdapterError, match="its rank is 5"):
        lora.truncate_adapter(source, tmp_path / "b", 2)
    assert not (tmp_path / "b").exists()


# The stage.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    from tiny import PROMPT, tone_rows, write_rows

    root = tmp_path_factory.mktemp("trained")
    data = {"path": str(write_rows(root / "rows.jsonl", tone_rows())), **PROMPT}
    kwargs = {**FP32, "rms_norm_eps": 1e-2}
    return phinetune.finetune(str(llama_folder), data, FAST, {"r": 8}, kwargs, root / "adapter").folder


def test_every_later_stage_takes_a_truncated_adapter(trained: Path, tmp_path: Path) -> None:
    from phinetune.generation.load import load_adapted
    from phinetune.model.load import LoadPlan, load_model
    from phinetune.model.probe import probe_logits

    notes: list[str] = []
    result = truncate(
        str(trained), tmp_path / "r2", 2, on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None
    )
    before, manifest = json.loads((trained / "manifest.json").read_text()), result.manifest
    assert manifest["stage"] == "truncate" and manifest["r"] == 2 and "probe_logits" not in manifest
    for key in ("base_model", "base_key", "data", "data_sha256", "config_overrides", "peft_config", "seed", "ledger"):
        assert manifest[key] == before[key], key
    assert (result.folder / CONTRACT_FILE).read_bytes() == (trained / CONTRACT_FILE).read_bytes()
    figures = manifest["figures"]
    assert (figures["rank_before"], figures["rank"], len(figures["layers"])) == (8, 2, 14)
    assert 0 < figures["share_of_change_kept"] <= figures["median_share_kept"] <= 1
    assert manifest["size"]["trainable"] * 4 == before["size"]["trainable"]
    assert before["size"]["total"] - manifest["size"]["total"] == before["size"]["trainable"] * 3 // 4
    assert any("rank 8 to 2" in note for note in notes)

    model, contract = load_adapted(result.folder, FP32, on_event=lambda event: None)
    adapted = probe_logits(model, contract)
    merged = phinetune.merge(str(result.folder), tmp_path / "merged")
    assert merged.manifest["data_sha256"] == before["data_sha256"]
    plain = load_model(resolve_model(str(merged.folder)), LoadPlan(torch.float32, torch.device("cpu")))
    assert (probe_logits(plain, contract) - adapted).abs().max() < 1e-4
    assert phinetune.evaluate(str(result.folder), model_kwargs=FP32, max_new_tokens=2).count > 0
    exported = phinetune.export(str(result.folder), tmp_path / "onnx", {"precision": "fp32"})
    assert exported.manifest["verified"]["logits_distance"] < 1e-3


def test_the_same_truncation_again_does_nothing_and_another_asks_first(trained: Path, tmp_path: Path) -> None:
    first = truncate(str(trained), tmp_path / "out", 3)
    weights = (first.folder / WEIGHTS_FILE).read_bytes()
    assert truncate(str(trained), tmp_path / "out", 3).unchanged
    with pytest.raises(OutputError, match="other settings"):
        truncate(str(trained), tmp_path / "out", 2)
    truncate(str(trained), tmp_path / "out", 2, overwrite=True)
    assert truncate(str(trained), tmp_path / "out", 3, overwrite=True).folder == first.folder
    assert (first.folder / WEIGHTS_FILE).read_bytes() == weights
    again = truncate(str(first.folder), tmp_path / "lower", 2)  # of a truncated one
    assert again.manifest["figures"]["rank_before"] == 3


def test_the_stage_refuses_what_is_no_adapter_and_its_own_place(
    trained: Path, llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="is not an adapter folder"):
        truncate(str(llama_folder), tmp_path / "out", 2)
    with pytest.raises(OutputError, match="is the adapter itself"):
        truncate(str(trained), trained, 2, overwrite=True)
    with pytest.raises(PhinetuneError, match="no such"):
        truncate(str(tmp_path / "nowhere"), tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_a_lengths_note_says_that_the_result_is_approximate(tmp_path: Path) -> None:
    source = adapter_in(tmp_path / "a", tiny_model(), use_dora=True)
    notes: list[str] = []
    truncate(str(source), tmp_path / "b", 4, on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None)
    assert any("DoRA's lengths are kept" in note for note in notes)
