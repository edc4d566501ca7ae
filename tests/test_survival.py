"""The survival gauge: every planted fault is caught and named, clean exports raise no alarm, `auto` goes on until the fine-tuning survives."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import phinetune
from phinetune.errors import ExportError
from phinetune.evaluation.agreement import agreement, said
from phinetune.events import Note
from phinetune.exporting.codes import GraphCodes
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.survival import layer_survival
from phinetune.generation.protocol import Prediction
from phinetune.lora.adapter import save_adapter
from phinetune.lora.config import LoraConfig
from phinetune.lora.injection import inject
from phinetune.lora.layer import lora_layers
from phinetune.model.folder import base_key
from phinetune.model.grid import Grid, quantize
from phinetune.model.load import LoadPlan, load_model
from phinetune.workflow.quantize import Calibration, put_codes
from phinetune.workflow.survival import check_weights, worst_layers
from tiny import tiny_folder, tiny_model


def no_one(event: Any) -> None:
    pass


def make_adapter(base: Path, folder: Path, strength: float = 0.05, seed: int = 0, **config: Any) -> Path:
    """An adapter over every linear layer whose factors are random, saved as training saves it."""
    torch.manual_seed(seed)
    model = load_model(base, LoadPlan(torch.float32, torch.device("cpu"), None, False))
    adapter = inject(model, LoraConfig(r=4, **{"target_modules": "all-linear", **config}), on_event=no_one)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=strength)
    save_adapter(adapter, folder, str(base), base_key(base))
    return folder


@pytest.fixture(scope="module", params=["llama", "phi3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """base, adapter, merged model, int4 folder."""
    root = tmp_path_factory.mktemp(request.param)
    base = tiny_folder(root / "base", kind=request.param)
    adapter = make_adapter(base, root / "adapter")
    merged = phinetune.merge(str(adapter), root / "merged").folder
    onnx = phinetune.export(str(merged), root / "onnx", {"algorithm": "default"}).folder
    return SimpleNamespace(root=root, kind=request.param, base=base, adapter=adapter, merged=merged, onnx=onnx)


def gauge(made: Any, onnx: Path) -> tuple[dict[str, Any], list[str]]:
    return check_weights(made.merged, onnx, None, False, no_one)


def with_codes_of(made: Any, source: Path, folder: Path) -> Path:
    """The exported folder, holding what another model's weights are rounded to."""
    shutil.copytree(made.onnx, folder)
    put_codes(source, folder, ExportConfig(), "default", Calibration(), False, no_one)
    return folder


def test_a_clean_export_has_no_faults_and_its_figures(made: Any) -> None:
    figures, faults = gauge(made, made.onnx)
    assert not faults
    assert 0.9 < figures["kept"] < 1.1 and figures["noise"] == pytest.approx(1.0, abs=1e-3)
    assert 0.1 < figures["changed"] < 1.0 and 0.3 < figures["cosine"] < 1.0
    count = 2 * (7 if made.kind == "llama" else 4)
    assert len(figures["layers"]) == count and len(worst_layers(figures).split(", ")) == 3
    manifest = json.loads((made.onnx / "manifest.json").read_text())
    assert manifest["survival"]["weights"]["kept"] == figures["kept"] and manifest["survival"]["way"] == "default"


def test_an_adapter_that_was_not_applied(made: Any, tmp_path: Path) -> None:
    _, faults = gauge(made, with_codes_of(made, made.base, tmp_path / "onnx"))
    assert faults and "of what the adapter adds" in faults[0] and "model.layers.0" in faults[0]


def test_a_change_that_shrank_on_the_way(made: Any, tmp_path: Path) -> None:
    weak = make_adapter(made.base, tmp_path / "weak", strength=0.005)  # the same factors, a tenth of B
    merged = phinetune.merge(str(weak), tmp_path / "merged").folder
    figures, faults = gauge(made, with_codes_of(made, merged, tmp_path / "onnx"))
    assert figures["kept"] < 0.3 and len(faults) > 3


def test_another_base(made: Any, tmp_path: Path) -> None:
    model = tiny_model(made.kind, seed=5)
    other = Path(shutil.copytree(made.base, tmp_path / "other"))
    model.save_pretrained(str(other))
    adapter = make_adapter(other, tmp_path / "adapter")
    merged = phinetune.merge(str(adapter), tmp_path / "merged").folder
    _, faults = gauge(made, with_codes_of(made, merged, tmp_path / "onnx"))
    assert len(faults) > 5 and "times as far from the weights as rounding brings them" in faults[0]


def test_the_scales_of_one_layer_are_damaged(made: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.onnx, tmp_path / "onnx"))
    graph = GraphCodes(folder)
    codes = graph.read("/model/layers.1/mlp/down_proj")
    graph.write({"/model/layers.1/mlp/down_proj": replace(codes, scales=codes.scales * 1.5)})
    _, faults = gauge(made, folder)
    assert len(faults) == 1 and faults[0].startswith("model.layers.1.mlp.down_proj: ")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("way", ["default", "gptq"])
def test_no_false_alarm(seed: int, way: Any, tmp_path: Path, made: Any) -> None:
    adapter = make_adapter(made.base, tmp_path / "adapter", strength=0.01 * (seed + 1), seed=seed + 10)
    merged = phinetune.merge(str(adapter), tmp_path / "merged").folder
    folder = Path(shutil.copytree(made.onnx, tmp_path / "onnx"))
    rows = [[(5 * i + 3 * j + seed) % 300 + 1 for j in range(12)] for i in range(24)]
    put_codes(merged, folder, ExportConfig(), way, Calibration(rows, [6] * len(rows)), False, no_one)
    _, faults = check_weights(merged, folder, None, False, no_one)
    assert not faults


def test_slices_of_fused_layers_and_layers_without_factors(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", kind="phi3")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    merged = phinetune.merge(str(adapter), tmp_path / "merged").folder
    result = phinetune.export(str(merged), tmp_path / "onnx", {"algorithm": "default"})
    layers = result.manifest["survival"]["weights"]["layers"]
    assert sorted(layers) == [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("mlp.down_proj", "self_attn.qkv_proj")]


def test_an_adapter_that_is_gone_is_said(made: Any, tmp_path: Path) -> None:
    adapter = make_adapter(made.base, tmp_path / "adapter")
    merged = phinetune.merge(str(adapter), tmp_path / "merged").folder
    shutil.rmtree(adapter)
    notes: list[str] = []
    result = phinetune.export(
        str(merged), tmp_path / "onnx", {"algorithm": "default"},
        on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None,
    )  # fmt: skip
    assert "weights" not in result.manifest["survival"]
    assert any("what is left of the adapter in the weights is not known" in n for n in notes)


def test_figures_of_one_layer_by_hand() -> None:
    torch.manual_seed(0)
    base, delta = torch.randn(64, 64), 0.2 * torch.randn(64, 64)
    whole = layer_survival("m", base, base + delta, quantize(base + delta, Grid()))
    none = layer_survival("m", base, base + delta, quantize(base, Grid()))
    assert whole.kept == pytest.approx(1.0, abs=0.1) and whole.noise == pytest.approx(1.0, abs=0.01) and not whole.fault
    assert (
        none.kept == pytest.approx(0.0, abs=0.1) and none.changed == 0.0 and "holds -0.0" in none.fault
    ) or "holds 0.0" in none.fault
    silent = layer_survival("m", base, base, quantize(base, Grid()))
    assert silent.kept == silent.cosine == 1.0 and not silent.fault


def predictions(*rows: list[tuple[float, int]]) -> Any:
    return SimpleNamespace(predictions=lambda given: iter([[Prediction(*p) for p in row] for row in rows]))


EXAMPLES = SimpleNamespace(
    table=[{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [1, 5], "labels": [-100, 5]}]
)


def test_agreement_counts_tokens_answers_and_loss() -> None:
    first = said(predictions([(0.1, 2), (0.2, 3)], [(0.3, 5)]), EXAMPLES, "a", no_one)
    second = said(predictions([(0.1, 2), (0.9, 4)], [(0.3, 5)]), EXAMPLES, "b", no_one)
    found = agreement(first, second)
    assert (found.count, found.same, found.exact) == (2, pytest.approx(2 / 3), (1.0, 0.5))
    assert found.drop == 0.5 and found.measure == "exact answers"
    texts = agreement(*(said(predictions([(x, 9), (x, 9)], [(x, 9)]), EXAMPLES, "c", no_one) for x in (2.0, 2.1)))
    assert texts.measure == "perplexity" and texts.drop == pytest.approx(math.expm1(0.1)) and texts.same == 1.0


@pytest.fixture
def tuned(tmp_path: Path, llama_folder: Path, tone_data: Any) -> Path:
    """A model merged from an adapter that was trained on a file that is still there."""
    config = {"num_train_epochs": 6, "per_device_train_batch_size": 8, "learning_rate": 2e-2}
    adapter = phinetune.finetune(str(llama_folder), tone_data, config, output_dir=tmp_path / "adapter")
    return phinetune.merge(str(adapter.folder), tmp_path / "merged").folder


def test_answers_that_are_lost_fail_the_run_and_name_layers(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phinetune.workflow import export as module

    def of_the_base(source: Path, *args: Any) -> Any:  # the adapter was not applied: the graph answers as the base does
        base = Path(json.loads((tuned / "manifest.json").read_text())["base_model"])
        put_codes(base, args[0], ExportConfig(), "default", Calibration(), False, no_one)
        return check_weights(source, *args)

    monkeypatch.setattr(module, "check_weights", of_the_base)
    with pytest.raises(ExportError) as caught:
        phinetune.export(str(tuned), tmp_path / "onnx", {"algorithm": "default"})
    text = str(caught.value)
    assert "int4: default: model.layers." in text and "of what the adapter adds" in text
    assert "are lost (1 are allowed by max_drop)" in text
    assert "int4_aware" in caught.value.hint and "least survives in model.layers." in caught.value.hint
    assert not (tmp_path / "onnx").exists()


def test_auto_tries_the_next_way_and_says_so(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phinetune.workflow import export as module

    drops = iter([0.5, 0.5, 0.5, 0.0])
    monkeypatch.setattr(
        module, "check_answers", lambda *args: ({"drop": (d := next(drops))}, "too much is lost" if d else "")
    )
    notes: list[str] = []
    result = phinetune.export(
        str(tuned), tmp_path / "onnx", on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None
    )
    survival = result.manifest["survival"]
    assert survival["way"] == "default" and survival["tried"] == ["gptq", "mixed", "searched", "default"]
    assert survival["why"] == "searched lost too much" and "export: codes by default (searched lost too much)" in notes


def test_what_is_only_said_does_not_fail(tuned: Path, tmp_path: Path) -> None:
    result = phinetune.export(str(tuned), tmp_path / "onnx", {"max_drop": "any"})
    answers = result.manifest["survival"]["answers"]
    assert result.manifest["survival"]["way"] == "gptq" and answers["examples"] > 0 and "drop" in answers


def test_trained_for_the_grid_is_exported_as_it_was_trained(llama_folder: Path, tone_data: Any, tmp_path: Path) -> None:
    """finetune with int4_aware -> merge -> export: the codes in the graph are those of training's forward, and no answer changes."""
    config = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "int4_aware": True}
    adapter = phinetune.finetune(
        str(llama_folder), tone_data, config, {"r": 4, "target_modules": "all-linear"}, {"dtype": "float32"},
        output_dir=tmp_path / "adapter",
    )  # fmt: skip
    assert adapter.manifest["grid"] == {"bits": 4, "block_size": 32, "symmetric": True}
    trained, _ = phinetune.generation.load.load_adapted(adapter.folder, {"dtype": "float32"})
    merged = phinetune.merge(str(adapter.folder), tmp_path / "merged")
    assert merged.manifest["figures"]["logits_moved_by_merging"] == 0.0
    result = phinetune.export(str(merged.folder), tmp_path / "onnx", {"accuracy_level": 1})
    survival = result.manifest["survival"]
    assert survival["way"] == "default" and survival["why"] == "the adapter was trained for exactly these codes"
    assert survival["answers"]["tokens_alike"] == 1.0 and abs(survival["answers"]["drop"]) < 1e-3
    graph = GraphCodes(result.folder)
    layer = lora_layers(trained)["model.layers.0.mlp.down_proj"]
    assert torch.equal(graph.read("/model/layers.0/mlp/down_proj").dense(), layer.rounding.weight(layer))
