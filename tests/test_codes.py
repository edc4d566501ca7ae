"""Codes computed here are the codes in the ONNX file; ways to better ones lose less; what is put into a graph is what it computes with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import phinetune
from phinetune.errors import ConfigError, DataError, ExportError
from phinetune.events import Note
from phinetune.exporting.calibration import batches_of, quantize_in_order
from phinetune.exporting.codes import GraphCodes
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.options import check_options, installed_builder
from phinetune.exporting.rounding_ways import gptq, least_error
from phinetune.exporting.verify import run_graph
from phinetune.exporting.ways import Way, codes_of, joined
from phinetune.model.grid import Codes, Grid, quantize
from phinetune.model.load import LoadPlan, load_model
from phinetune.workflow.quantize import Calibration, parts_in, put_codes
from tiny import tiny_folder, tiny_model

IDS = [1, 7, 42, 100, 5, 200, 3, 9]
ROWS = [[(7 * i + 3 * j) % 300 + 1 for j in range(5 + i % 9)] for i in range(24)]


EXAMPLES = Calibration(ROWS, [3] * len(ROWS))


def no_one(event: Any) -> None:
    pass


def plain(folder: Path) -> Any:
    return load_model(folder, LoadPlan(torch.float32, torch.device("cpu"), None, False))


def in_graph(source: Path, folder: Path) -> dict[str, tuple[Codes, list[tuple[str, int, int]]]]:
    graph = GraphCodes(folder)
    parts = parts_in(graph, source)
    assert set(parts) == set(graph.stored)
    return {product: (graph.read(product), spans) for product, spans in parts.items()}


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 16}, {"symmetric": False, "block_size": 16}, {"precision": "int8"}],
    ids=["default", "16", "asymmetric", "int8"],
)
def test_the_builders_codes_are_ours(kind: str, tie: bool, options: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", kind=kind, tie=tie)
    config = {"algorithm": "default", **options}
    if tie and config.get("symmetric") is False:
        with pytest.raises(ConfigError, match="does not load where input and output embedding share one weight"):
            phinetune.export(str(source), tmp_path / "onnx", config)
        return
    folder = phinetune.export(str(source), tmp_path / "onnx", config).folder
    grid = replace(ExportConfig(), **config).grid
    assert grid is not None
    ours = codes_of(source, "default", grid)
    for found, spans in in_graph(source, folder).values():
        expected = joined(ours, spans)
        assert expected is not None
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)
        assert grid.symmetric or torch.equal(found.zeros, expected.zeros)


@pytest.mark.parametrize("tie", [False, True])
def test_the_graph_computes_with_the_codes_put_into_it(tie: bool, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", tie=tie)
    folder = phinetune.export(str(source), tmp_path / "onnx", {"algorithm": "default", "accuracy_level": 1}).folder
    before = run_graph(folder, IDS)["logits"]
    size = (folder / "model.onnx.data").stat().st_size
    put_codes(source, folder, ExportConfig(), "gptq", EXAMPLES, False, no_one)
    model, codes = plain(source), codes_of(source, "gptq", Grid(), ROWS)
    for name, module in model.named_modules():
        if name in codes:
            module.weight.data = codes[name].dense()
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits.numpy()
    after = run_graph(folder, IDS)["logits"]
    assert abs(after - expected).max() < 1e-3 < abs(before - expected).max()
    assert abs((folder / "model.onnx.data").stat().st_size - size) < 64 * len(GraphCodes(folder).tensors)


def test_codes_that_are_not_the_graphs_are_refused(tmp_path: Path) -> None:
    folder = phinetune.export(str(tiny_folder(tmp_path / "model")), tmp_path / "onnx", {"algorithm": "default"}).folder
    graph, before = GraphCodes(folder), (folder / "model.onnx.data").read_bytes()
    product = "/model/layers.0/mlp/down_proj"
    with pytest.raises(ExportError, match="no product of"):
        graph.write({product: quantize(torch.randn(4, 32), Grid())})
    with pytest.raises(ExportError, match="the graph has int4 in blocks of 32"):
        graph.write({product: quantize(torch.randn(64, 96), Grid(block_size=16))})
    assert (folder / "model.onnx.data").read_bytes() == before


def shaped(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs whose columns go together and differ in size."""
    torch.manual_seed(seed)
    inputs = torch.randn(400, 12) @ torch.randn(12, columns) * torch.linspace(0.1, 2.0, columns) + 0.1 * torch.randn(
        400, columns
    )
    return torch.randn(rows, columns), inputs


@pytest.mark.parametrize("grid", [Grid(), Grid(4, 16, False), Grid(8, 32, True)])
def test_each_way_keeps_more_of_the_outputs_than_the_one_before(grid: Grid) -> None:
    weight, x = shaped(48, 96)
    moments = x.t() @ x
    ways = (quantize(weight, grid), least_error(weight, grid, moments.diagonal()), gptq(weight, moments, grid))
    lost = [float(((codes.dense() - weight) @ x.t()).norm()) for codes in ways]
    assert lost[0] > lost[1] > lost[2] and lost[2] < 0.6 * lost[0], lost


@pytest.mark.parametrize("grid", [Grid(), Grid(4, 16, False), Grid(8, 64, True)])
def test_searched_scales_never_lose_more_in_any_block(grid: Grid) -> None:
    weight, _ = shaped(700, 128)  # several pieces
    weight[3, :64] = 0
    lost = [
        (codes.dense() - weight).square().view(700, -1, grid.block_size).sum(-1)
        for codes in (quantize(weight, grid), least_error(weight, grid))
    ]
    assert bool((lost[1] <= lost[0] * 1.0001 + 1e-9).all()) and float(lost[1].sum()) < 0.98 * float(lost[0].sum())


def test_inputs_that_do_not_go_together_leave_gptq_the_nearest_codes() -> None:
    weight, _ = shaped(8, 64)
    alike = gptq(weight, torch.eye(64), Grid())
    assert torch.equal(alike.codes, least_error(weight, Grid(), torch.ones(64)).codes)
    dead = torch.eye(64)
    dead[5, 5] = 0.0  # a column that nothing ever comes into
    assert torch.isfinite(gptq(weight, dead, Grid()).dense()).all()


def test_scales_are_what_the_graph_can_hold() -> None:
    weight, x = shaped(16, 64)
    for codes in (least_error(weight, Grid(), kept_as=torch.float16), gptq(weight, x.t() @ x, Grid(), torch.float16)):
        assert torch.equal(codes.scales, codes.scales.half().float())


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_layers_are_calibrated_in_order_on_what_quantized_layers_give(kind: str) -> None:
    model, seen = tiny_model(kind), []
    reference = tiny_model(kind)
    batches = batches_of(ROWS, 0)

    def halve(layers: dict[str, Any], moments: torch.Tensor) -> None:
        seen.append((sorted(layers), moments))
        for module in layers.values():
            module.weight.data = module.weight * 0.5

    quantize_in_order(model, batches, halve, no_one)
    names = [name for names, _ in seen for name in names]
    assert names[-1] == "lm_head" and len(names) == len(set(names))
    assert set(names) == {n for n, m in reference.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = module.weight * 0.5
    gathered: list[torch.Tensor] = []
    reference.lm_head.register_forward_pre_hook(lambda _, given: gathered.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        for row in ROWS:  # one by one: no padding
            reference(torch.tensor([row]))
    x = torch.cat(gathered)
    torch.testing.assert_close(seen[-1][1], x.t() @ x, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("way", ["default", "searched", "gptq"])
def test_an_embedding_that_is_the_output_layer_is_not_gptqs(way: Way, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", tie=True)
    weight = plain(source).lm_head.weight
    expected = quantize(weight, Grid()) if way == "default" else least_error(weight, Grid())
    assert torch.equal(codes_of(source, way, Grid(), ROWS if way != "default" else ())["lm_head"].codes, expected.codes)


def test_kept_layers_have_no_codes_and_stay(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model")
    codes = codes_of(source, "gptq", Grid(), ROWS, ["lm_head", "model.layers.1.mlp.down_proj"])
    assert not {"lm_head", "model.layers.1.mlp.down_proj"} & set(codes) and "model.layers.0.mlp.down_proj" in codes


def test_calibration_data_of_ones_own(tmp_path: Path, llama_folder: Path, tone_file: Path) -> None:
    notes: list[str] = []
    data = {"path": str(tone_file), "prompt": "Tone? {phrase}", "completion": "{tone}"}
    config = {"algorithm": "gptq", "calibration_data": data, "calibration_examples": 8}
    result = phinetune.export(
        str(llama_folder),
        tmp_path / "onnx",
        config,
        on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None,
    )
    assert result.manifest["survival"]["way"] == "gptq" and any("8 examples" in n for n in notes), notes


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"algorithm": "gptq"}, ConfigError, "data: this key is needed"),
        ({"algorithm": "gptq", "calibration_data": "EMPTY"}, DataError, "EMPTY|no rows|empty"),
        ({"algorithm": "gptq", "calibration_data": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
    ],
)
def test_calibration_data_that_is_not_there(
    config: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, llama_folder: Path
) -> None:
    (tmp_path / "EMPTY.jsonl").write_text("")
    config = {k: str(tmp_path / "EMPTY.jsonl") if v == "EMPTY" else v for k, v in config.items()}
    with pytest.raises(error, match=message):
        phinetune.export(str(llama_folder), tmp_path / "onnx", config)
    assert not (tmp_path / "onnx").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"algorithm": "gptq", "precision": "fp32"}, "algorithm: gptq is for int4 and int8"),
        ({"algorithm": "searched", "use_qdq": True}, "use_qdq: not with searched"),
        ({"algorithm": "gptq", "block_size": 64}, "block_size: blocks of 64 do not divide its 96 inputs"),
        ({"algorithm": "gptq", "calibration_examples": 0}, "calibration_examples: must be at least 1"),
        ({"algorithm": "default", "calibration_data": "x.jsonl"}, "calibration_data: is for gptq, searched and mixed"),
        ({"max_drop": -0.1}, "max_drop: must be 0 or above"),
    ],
)
def test_what_cannot_be_is_refused_before_the_build(config: dict[str, Any], message: str, llama_folder: Path) -> None:
    values = json.loads((llama_folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=message):
        check_options(replace(ExportConfig(), **config), values, installed_builder())


def test_a_file_of_weights_that_is_cut_off_is_said(tmp_path: Path) -> None:
    folder = phinetune.export(str(tiny_folder(tmp_path / "model")), tmp_path / "onnx", {"algorithm": "default"}).folder
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = copy / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    codes = {"/model/layers.0/mlp/down_proj": quantize(torch.randn(64, 96), Grid())}
    with pytest.raises(ExportError, match="goes beyond the end"):
        GraphCodes(copy).write(codes)
