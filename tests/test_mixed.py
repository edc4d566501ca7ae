"""Mixed precision: what is measured as sensitive gets 8 bits, within the budget, and the graph computes with it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import phinetune
from phinetune.errors import ConfigError
from phinetune.events import Note
from phinetune.exporting.codes import GraphCodes
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.options import check_options, installed_builder
from phinetune.exporting.sensitivity import choose_raised, divergences
from phinetune.exporting.verify import run_graph
from phinetune.exporting.ways import codes_of
from phinetune.model.grid import Grid, quantize
from phinetune.workflow.quantize import parts_in, put_codes
from test_codes import EXAMPLES, IDS, ROWS, no_one, plain
from tiny import tiny_folder


def said(model: Any, rows: list[list[int]], start: int) -> torch.Tensor:
    """Log-probabilities of what comes next, at the places of the answers, one row at a time."""
    with torch.no_grad():
        found = [model(torch.tensor([row])).logits[0, start - 1 : len(row) - 1] for row in rows]
    return F.log_softmax(torch.cat(found).float(), dim=-1)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_divergences_are_those_of_running_the_whole_model(kind: str, tie: bool, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", kind=kind, tie=tie)
    codes, model = codes_of(source, "default", Grid()), plain(source)
    parts = {name: [(name, 0, len(c.codes))] for name, c in codes.items()}
    rows = ROWS[:6]
    found = divergences(model, parts, codes, rows, [3] * 6, no_one)
    before = said(model, rows, 3)
    assert set(found) == set(codes) and "lm_head" in found
    for name in codes:
        other = plain(source)
        other.get_submodule(name).weight.data.copy_(codes[name].dense())
        after = said(other, rows, 3)
        expected = float(F.kl_div(after, before, reduction="sum", log_target=True)) / len(before)
        assert found[name] == pytest.approx(expected, rel=1e-3, abs=1e-7), name
    untouched = said(model, rows, 3)
    assert torch.equal(untouched, before)


def test_a_model_with_more_after_its_layers_is_run_whole(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model")
    codes, model = codes_of(source, "default", Grid()), plain(source)
    name = "model.layers.1.mlp.down_proj"
    parts = {name: [(name, 0, 64)]}
    usual = divergences(model, parts, codes, ROWS[:4], [3] * 4, no_one)[name]
    model.lm_head.register_forward_hook(lambda *given: torch.tanh(given[2]))
    inside = divergences(model, parts, codes, ROWS[:4], [3] * 4, no_one)[name]
    original = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        found.logits = found.logits * 0.1
        return found

    model.forward = scaled
    outside = divergences(model, parts, codes, ROWS[:4], [3] * 4, no_one)[name]
    assert inside != pytest.approx(usual) and 0 < outside < inside / 10


def test_most_divergence_a_byte_comes_first_and_the_budget_holds() -> None:
    divergence, cost = {"a": 4.0, "b": 3.0, "c": 1.0, "d": 0.1}, {"a": 100, "b": 10, "c": 20, "d": 5}
    assert choose_raised(divergence, cost, 35) == ["b", "c", "d"]
    assert choose_raised(divergence, cost, 4) == []
    for budget in range(0, 140, 7):
        assert sum(cost[n] for n in choose_raised(divergence, cost, budget)) <= budget


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_the_graph_computes_with_8_bits_where_they_were_put(kind: str, tie: bool, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", kind=kind, tie=tie)
    options = {"algorithm": "default", "accuracy_level": 1}
    folder = phinetune.export(str(source), tmp_path / "onnx", options).folder
    config = ExportConfig(algorithm="mixed", accuracy_level=1, size_budget=1.5)
    raised = put_codes(source, folder, config, "mixed", EXAMPLES, False, no_one)
    graph = GraphCodes(folder)
    with_8 = {product for product, stored in graph.stored.items() if stored.grid.bits == 8}
    assert with_8 == set(raised) and 0 < len(with_8) < len(graph.stored)
    model = plain(source)
    for product, spans in parts_in(graph, source).items():
        dense, row = graph.read(product).dense(), 0
        for module, start, stop in spans:
            weight = model.get_submodule(module).weight
            weight.data[start:stop] = dense[row : row + stop - start]
            row += stop - start
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits.numpy()
    assert abs(run_graph(folder, IDS)["logits"] - expected).max() < 1e-3


def test_an_embedding_that_is_the_output_layer_gets_8_bits_and_4_again(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", tie=True)
    folder = phinetune.export(str(source), tmp_path / "onnx", {"algorithm": "default", "accuracy_level": 1}).folder
    before, weight = run_graph(folder, IDS)["logits"], plain(source).lm_head.weight
    for bits in (8, 4, 8, 4):
        GraphCodes(folder).write({"/lm_head": quantize(weight, Grid(bits))})
        stored = GraphCodes(folder).stored["/lm_head"]
        assert stored.grid.bits == bits
        again = run_graph(folder, IDS)["logits"]
        assert (abs(again - before).max() < 1e-5) == (bits == 4)


def test_the_way_keeps_to_its_budget_and_is_told(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"prompt": "quick brown {i}", "completion": "fox {i % 3}"}}\n' for i in range(20)))
    notes: list[str] = []
    config = {"calibration_data": str(file), "max_drop": "any"}
    four = phinetune.export(str(source), tmp_path / "gptq", {**config, "algorithm": "gptq"}).folder
    result = phinetune.export(
        str(source), tmp_path / "mixed", {**config, "algorithm": "mixed", "size_budget": 1.2},
        on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None,
    )  # fmt: skip
    raised = result.manifest["survival"]["raised"]
    stored = GraphCodes(result.folder).stored
    assert raised and {p for p in stored if stored[p].grid.bits == 8} == set(raised)
    sizes = [(f / "model.onnx.data").stat().st_size for f in (four, result.folder)]
    integers = sum(s.inputs * s.outputs // 2 + s.inputs * s.outputs // 32 * 4 for s in stored.values())
    assert 0 < sizes[1] - sizes[0] <= 0.2 * integers + 64 * len(stored)
    assert any(f"8 bits for {len(raised)} of {len(stored)} products" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "mixed", "size_budget": 0.9}, "size_budget: must be at least 1"),
        ({"algorithm": "mixed", "precision": "int8"}, "the precision is int8"),
        ({"algorithm": "mixed", "precision": "fp16"}, "is for int4 and int8"),
    ],
)
def test_what_mixed_cannot_be_is_said_before(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(replace(ExportConfig(), **options), {"hidden_size": 64}, installed_builder())


def test_another_reader_of_a_weight_is_not_passed_over(tmp_path: Path) -> None:
    import onnx

    from phinetune.errors import ExportError

    source = tiny_folder(tmp_path / "model")
    folder = phinetune.export(str(source), tmp_path / "onnx", {"algorithm": "default"}).folder
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    model = onnx.load(str(copy / "model.onnx"), load_external_data=False)
    weight = GraphCodes(copy).stored["/lm_head"].weight
    model.graph.node.append(onnx.helper.make_node("Identity", [weight], ["again"]))
    onnx.save(model, str(copy / "model.onnx"))
    with pytest.raises(ExportError, match="is read by Identity too"):
        GraphCodes(copy).write({"/lm_head": quantize(plain(source).lm_head.weight, Grid(8))})
