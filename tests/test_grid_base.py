"""A base held on the export's integers: the same numbers, packed; trained over, shipped beside; nothing is quantized afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import phinetune
from phinetune.errors import ConfigError, ExportError
from phinetune.events import Note
from phinetune.exporting.codes import GraphCodes
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.verify import run_graph
from phinetune.generation.load import load_adapted
from phinetune.lora.config import LoraConfig
from phinetune.lora.frozen import dense, is_quantized
from phinetune.lora.injection import inject
from phinetune.model.grid import Grid, quantize
from phinetune.model.grid_weight import GridLinear
from phinetune.model.load import LoadPlan, load_model, plan_load
from phinetune.workflow.export_beside import check_codes
from tiny import tiny_folder

IDS = [1, 7, 42, 100, 5, 200, 3, 9]
GRIDS = [Grid(), Grid(4, 16, False), Grid(8, 32, True), Grid(8, 32, False)]
CPU = torch.device("cpu")


def no_one(event: Any) -> None:
    pass


def on(folder: Path, grid: Grid | None, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(folder, LoadPlan(dtype, CPU, None, False, quantization=grid))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packed_is_what_its_codes_are(grid: Grid, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(96, 5000)  # several pieces
    layer = GridLinear.from_base(base, grid, dtype)
    expected = quantize(base.weight, grid).dense(dtype)
    assert is_quantized(layer.weight) and torch.equal(dense(layer.weight, dtype), expected)
    assert layer.weight.numel() == 96 * 5000 * grid.bits // 8 and layer.bias is base.bias
    x = torch.randn(3, 96, dtype=dtype)
    bias = None if dtype != torch.float32 else base.bias
    layer.bias = bias
    assert torch.equal(layer(x), torch.nn.functional.linear(x, expected, bias))


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_loaded_model_has_the_codes_of_the_weights_on_disk(
    kind: str, tie: bool, stored: torch.dtype, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "model", kind=kind, tie=tie, dtype=stored)
    plain, grid = on(folder, None), Grid()
    held = on(folder, grid)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = quantize(module.weight, grid).dense()
            assert torch.equal(dense(held.get_submodule(name).weight, torch.float32), module.weight), name
    assert torch.equal(logits(held), logits(plain))
    in_bfloat16 = on(folder, grid, torch.bfloat16)  # rounded from what is on disk, not from what is computed in
    weight: Any = in_bfloat16.model.layers[0].mlp.down_proj.weight
    assert in_bfloat16.dtype == torch.bfloat16
    assert torch.equal(weight.quant_state.dense(weight, torch.float32), plain.model.layers[0].mlp.down_proj.weight)
    assert all(b.dtype == torch.float32 for n, b in in_bfloat16.named_buffers() if "inv_freq" in n)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_layers_over_it_compute_and_learn_as_over_the_dense_one(kind: str, tmp_path: Path) -> None:
    folder, grid = tiny_folder(tmp_path / "model", kind=kind), Grid()
    models = [on(folder, grid), on(folder, None)]
    for module in models[1].modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = quantize(module.weight, grid).dense()
    found = []
    for model in models:
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        inject(model, config, on_event=no_one)
        loss = model(torch.tensor([IDS]), labels=torch.tensor([IDS])).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert torch.equal(found[0][0], found[1][0]) and len(found[0][1]) > 4
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], rtol=1e-5, atol=1e-7), name


def test_what_cannot_be_held_is_said(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match="blocks of 64 do not divide its 96 inputs"):
        on(folder, Grid(block_size=64))
    with pytest.raises(ConfigError, match="a base is held in one format"):
        plan_load(folder, {"load_on_grid": True, "load_in_4bit": True}, on_event=no_one)
    with pytest.raises(ConfigError, match=r"load_on_grid\.blocksize: unknown key, did you mean"):
        plan_load(folder, {"load_on_grid": {"blocksize": 32}}, on_event=no_one)


def test_not_together_with_int4_aware(llama_folder: Path, tone_data: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"int4_aware: not with model_kwargs\.load_on_grid"):
        phinetune.finetune(
            str(llama_folder), tone_data, {"int4_aware": True}, None, {"load_on_grid": True}, tmp_path / "adapter"
        )


@pytest.fixture(scope="module", params=["llama", "phi3"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Base and an adapter that was trained over its integers."""
    from tiny import PROMPT, tone_rows, write_rows

    root = tmp_path_factory.mktemp(request.param)
    base = tiny_folder(root / "base", kind=request.param)
    data = {"path": str(write_rows(root / "tone.jsonl", tone_rows())), **PROMPT}
    config = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    kwargs = {"load_on_grid": True, "dtype": "float32"}
    result = phinetune.finetune(str(base), data, config, lora, kwargs, root / "adapter", on_event=no_one)
    return SimpleNamespace(root=root, base=base, adapter=result.folder, manifest=result.manifest, data=data)


def test_the_adapter_knows_its_base_and_is_loaded_over_it(trained: Any) -> None:
    record = trained.manifest["quantization"]
    assert record["grid"] == {"bits": 4, "block_size": 32, "symmetric": True} and "lm_head" in record["layers"]
    model, _ = load_adapted(trained.adapter, on_event=no_one)
    assert is_quantized(model.model.layers[0].mlp.down_proj.weight)
    assert trained.manifest["size"]["total"] > sum(p.numel() for p in model.parameters())  # numbers, not bytes


def test_it_ships_beside_the_integers_and_says_what_was_trained(trained: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    result = phinetune.export(
        str(trained.adapter), tmp_path / "onnx", {"accuracy_level": 1},
        on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None,
    )  # fmt: skip
    model, _ = load_adapted(trained.adapter, on_event=no_one)
    with torch.no_grad():
        expected = model.eval()(torch.tensor([IDS])).logits.numpy()
    assert np.abs(run_graph(result.folder, IDS)["logits"] - expected).max() < 1e-3
    survival = result.manifest["survival"]
    assert survival["way"] == "beside" and survival["answers"]["tokens_alike"] == 1.0
    assert survival["answers"]["loss"][0] == pytest.approx(survival["answers"]["loss"][1], abs=1e-4)
    assert any("the base's integers are those of the training" in note for note in notes)
    plain = phinetune.export(str(trained.base), tmp_path / "plain", {"algorithm": "default"}, on_event=no_one).folder
    ours, builders = GraphCodes(result.folder), GraphCodes(plain)
    assert all(torch.equal(ours.read(p).codes, builders.read(p).codes) for p in builders.stored)
    exact = phinetune.assess(str(result.folder), metrics="exact_match", on_event=no_one).values["exact_match"]
    assert exact == pytest.approx(survival["answers"]["exact"][1], abs=1e-4)
    again = phinetune.export(str(trained.adapter), tmp_path / "onnx", {"accuracy_level": 1}, on_event=no_one)
    assert again.unchanged


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_size": 16}, "int4 in blocks of 16 was asked for"),
        ({"algorithm": "searched"}, "codes by searched were asked for"),
        ({"precision": "fp32"}, "fp32 was asked for"),
    ],
)
def test_other_integers_are_asked_for(options: dict[str, Any], reason: str, trained: Any, tmp_path: Path) -> None:
    notes: list[Note] = []
    result = phinetune.export(
        str(trained.adapter), tmp_path / "onnx", {"max_drop": "any", **options} if "precision" not in options else options,
        on_event=lambda e: notes.append(e) if isinstance(e, Note) else None,
    )  # fmt: skip
    assert any(n.warning and "it is merged and rounded anew" in n.text and reason in n.text for n in notes)
    assert result.manifest.get("survival", {}).get("way") != "beside"


def test_switchable_adapters_are_proven_over_the_same_integers(trained: Any, tmp_path: Path) -> None:
    result = phinetune.export(
        str(trained.base), tmp_path / "onnx", {"accuracy_level": 1}, adapters=[str(trained.adapter)], on_event=no_one
    )
    assert result.manifest["adapters"]["adapter"]["likeness"] > 0.999


def test_merging_takes_the_base_that_it_was_trained_over(trained: Any, tmp_path: Path) -> None:
    merged = phinetune.merge(str(trained.adapter), tmp_path / "merged", base="dequantized", on_event=no_one).folder
    model, _ = load_adapted(trained.adapter, on_event=no_one)
    assert torch.allclose(logits(on(merged, None)), logits(model.eval()), atol=1e-4)
    chosen = phinetune.merge(str(trained.adapter), tmp_path / "auto", on_event=no_one)
    assert chosen.manifest["figures"]["base"] == "dequantized"


def test_a_damaged_record_is_refused(trained: Any, tmp_path: Path) -> None:
    from phinetune.errors import AdapterError

    folder = Path(shutil.copytree(trained.adapter, tmp_path / "adapter"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for damage in ({"grid": {"bits": 3}, "dtype": "float32", "layers": []}, {"dtype": "float32"}, "yes"):
        (folder / "manifest.json").write_text(json.dumps({**manifest, "quantization": damage}))
        with pytest.raises((AdapterError, ConfigError), match=r"manifest\.json"):
            phinetune.export(str(folder), tmp_path / "onnx", on_event=no_one)


def test_a_graph_with_other_integers_is_caught(trained: Any, tmp_path: Path) -> None:
    folder = phinetune.export(str(trained.base), tmp_path / "onnx", {"algorithm": "default"}, on_event=no_one).folder
    check_codes(trained.base, folder, ExportConfig())
    graph, product = GraphCodes(folder), "/model/layers.1/mlp/down_proj"
    codes = graph.read(product)
    codes.codes[0, 0] = (codes.codes[0, 0] + 1) % 16
    graph.write({product: codes})
    with pytest.raises(ExportError, match=r"layers\.1/mlp/down_proj: the graph's integers are not those .*1 of"):
        check_codes(trained.base, folder, ExportConfig())
