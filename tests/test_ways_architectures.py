"""Every way to integers, for every kind of architecture: what is built loads, holds the codes computed here, and computes what torch does
with exactly these weights. What cannot be built, or is built wrongly, is an error that says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import phinetune
from phinetune.errors import ExportError
from phinetune.exporting.codes import GraphCodes
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.options import architecture_problem, installed_builder
from phinetune.exporting.ways import codes_of, joined
from phinetune.generation.onnx_backend import load_onnx
from phinetune.lora.layer import lora_layers
from phinetune.model.contract import load_contract
from phinetune.model.load import LoadPlan, load_model
from phinetune.workflow.export import parse_export_config
from phinetune.workflow.quantize import calibration_examples, parts_in
from tiny import PROMPT, tiny_folder, tone_rows, write_rows

TIED = ("qwen3", "gemma")  # and two that are not


@pytest.fixture(scope="module", params=["phi3", "llama", "qwen3", "gemma"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / request.param, request.param, tie=request.param in TIED)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "tone.jsonl", tone_rows())


def plain(folder: Path) -> Any:
    return load_model(folder, LoadPlan(torch.float32, torch.device("cpu"), None, False))


def distance(onnx: Path, model: Any) -> float:
    """Largest difference of the logits, over prompts of several lengths."""
    generator = load_onnx(onnx)
    rows = [p.ids for p in generator.contract.probes] + [(5, 0, 7), (9,)]  # 0 is the pad token
    with torch.no_grad():
        wanted = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
    found = torch.stack([torch.from_numpy(generator.logits(row)) for row in rows])
    return float((found - wanted).abs().max())


def expect_codes(source: Path, folder: Path, config: ExportConfig, way: Any) -> None:
    """The graph holds the codes that `way` gives here, and its logits are torch's with their values."""
    assert config.grid is not None
    rows = calibration_examples(config, {}, load_contract(folder)).rows if way != "default" else ()
    ours, graph, model = codes_of(source, way, config.grid, rows), GraphCodes(folder), plain(source)
    parts = parts_in(graph, source)
    assert set(parts) == set(graph.stored)
    for product, spans in parts.items():
        found, expected = graph.read(product), joined(ours, spans)
        assert expected is not None
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)
    if config.precision == "int8":  # the builder rounds an embedding that is the output layer in int4 only
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for name, module in model.named_modules():
        if name in ours:
            module.weight.data = ours[name].dense()
    assert distance(folder, model) < 1e-3


@pytest.mark.parametrize("way", ["default", "searched", "gptq", "auto"])
def test_every_way_for_every_architecture(source: Path, way: str, tmp_path: Path, rows_file: Path) -> None:
    data = {"path": str(rows_file), **PROMPT}
    values = {"algorithm": way, "accuracy_level": 1, **({} if way == "default" else {"calibration_data": data})}
    result = phinetune.export(str(source), tmp_path / "onnx", values)
    taken = result.manifest["survival"]["way"]
    assert taken == {"auto": "gptq"}.get(way, way)
    expect_codes(source, result.folder, parse_export_config(values), taken)
    assert len(next(iter(load_onnx(result.folder).complete([[5, 6, 7]], 4))).ids) > 0


def test_a_mixture_of_bits_for_every_architecture(source: Path, tmp_path: Path, rows_file: Path) -> None:
    """That its logits are torch's with these integers is asserted by the export."""
    data = {"path": str(rows_file), **PROMPT}
    result = phinetune.export(
        str(source), tmp_path / "onnx", {"algorithm": "mixed", "calibration_data": data, "size_budget": 1.3}
    )
    graph = GraphCodes(result.folder)
    assert result.manifest["survival"]["way"] == "mixed" and result.manifest["survival"]["raised"]
    assert {stored.grid.bits for stored in graph.stored.values()} == {4, 8}


def test_eight_bits_for_every_architecture(source: Path, tmp_path: Path) -> None:
    values = {"algorithm": "default", "precision": "int8", "accuracy_level": 1}
    result = phinetune.export(str(source), tmp_path / "onnx", values)
    assert result.manifest["verified"]["bits"] == {"8": result.manifest["verified"]["quantized"]}
    expect_codes(source, result.folder, parse_export_config(values), "default")


def test_what_rounding_activations_costs_is_a_figure_and_no_fault(source: Path, tmp_path: Path) -> None:
    """accuracy_level 4 moves logits by a hundredth of their spread in these models; the graph itself is exact, which is asserted."""
    verified = phinetune.export(str(source), tmp_path / "onnx", {"algorithm": "default"}).manifest["verified"]
    assert verified["logits_distance"] < 1e-4
    assert 1e-3 < verified["logits_moved_by_accuracy_level"] < 0.05
    assert not list((tmp_path / "onnx").glob("*exact*"))


@pytest.mark.parametrize("kind", ["phi3", "qwen3", "gemma"])  # llama: test_survival.py
def test_trained_for_the_grid_and_exported_by_default(kind: str, tmp_path: Path, rows_file: Path) -> None:
    source = tiny_folder(tmp_path / "model", kind, tie=kind in TIED)
    config = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "int4_aware": True}
    adapter = phinetune.finetune(
        str(source), {"path": str(rows_file), **PROMPT}, config, {"r": 4, "target_modules": "all-linear"},
        {"dtype": "float32"}, output_dir=tmp_path / "adapter",
    )  # fmt: skip
    trained, _ = phinetune.generation.load.load_adapted(adapter.folder, {"dtype": "float32"})
    merged = phinetune.merge(str(adapter.folder), tmp_path / "merged").folder
    result = phinetune.export(str(merged), tmp_path / "onnx", {"accuracy_level": 1})
    survival = result.manifest["survival"]
    assert survival["way"] == "default" and survival["why"] == "the adapter was trained for exactly these codes"
    assert survival["answers"]["tokens_alike"] == 1.0 and abs(survival["answers"]["drop"]) < 1e-3
    expect_codes(merged, result.folder, ExportConfig(algorithm="default"), "default")
    layer = lora_layers(trained)["model.layers.0.mlp.down_proj"]
    stored = GraphCodes(result.folder).read("/model/layers.0/mlp/down_proj")
    assert torch.equal(stored.dense(), layer.rounding.weight(layer))


@pytest.mark.parametrize("kind", ["phi3", "llama", "qwen3", "gemma", "gemma2"])
def test_floating_point_for_every_architecture(kind: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", kind, tie=kind not in ("phi3", "llama"))
    result = phinetune.export(str(source), tmp_path / "onnx", {"precision": "fp32"})
    assert result.manifest["verified"]["logits_distance"] < 1e-4 and distance(result.folder, plain(source)) < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"op_types_to_quantize": ["MatMul", "Gather"]},
        {"algorithm": "k_quant_mixed", "block_size": 16},
        {"algorithm": "rtn", "block_size": 16, "symmetric": False},
        {"nodes_to_exclude": ["/lm_head/MatMul"]},
    ],
    ids=lambda options: next(iter(options)) + str(options.get("algorithm", "")),
)
@pytest.mark.parametrize("tie", [False, True])
def test_whatever_is_quantized_computes_as_torch_does(options: dict[str, Any], tie: bool, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", tie=tie)
    verified = phinetune.export(str(source), tmp_path / "onnx", options).manifest["verified"]
    assert verified["logits_distance"] < 1e-4


@pytest.mark.parametrize("options", [{"use_qdq": True}, {"block_size": 256}, {"execution_provider": "cuda"}])
def test_logits_that_cannot_be_compared_are_said(options: dict[str, Any], tmp_path: Path, llama_folder: Path) -> None:
    verified = phinetune.export(str(llama_folder), tmp_path / "onnx", options).manifest["verified"]
    assert verified["logits_not_compared"] if verified["prompts_compared"] else "logits_distance" not in verified


@pytest.mark.parametrize("options", [{}, {"precision": "int8"}, {"precision": "fp32"}])
def test_an_architecture_that_is_built_wrongly_is_caught_in_every_precision(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """The builder's OLMo computes something else; it says that all went well."""
    source = tiny_folder(tmp_path / "model", "olmo")
    with pytest.raises(ExportError, match=r"ONNX model's logits.* differ from torch's by [01]\.\d+") as caught:
        phinetune.export(str(source), tmp_path / "onnx", options)
    assert "not exported rightly" in caught.value.hint and not (tmp_path / "onnx").exists()


def test_codes_of_another_model_in_the_graph_are_caught(tmp_path: Path, llama_folder: Path, monkeypatch: Any) -> None:
    """Every number was written as asked; that the whole does not compute what it should is found by its logits."""
    from phinetune.exporting import codes

    def displaced(self: Any, tensor: Any) -> Any:
        name = "model.layers.0.input_layernorm.weight"
        for piece in original(self, tensor):
            yield bytes(len(piece)) if tensor.name == name else piece

    original = codes.GraphCodes._pieces
    monkeypatch.setattr(codes.GraphCodes, "_pieces", displaced)
    with pytest.raises(ExportError, match="logits, for the same integers, differ from torch's"):
        phinetune.export(str(llama_folder), tmp_path / "onnx", {"algorithm": "searched"})


def test_sizes_that_the_runtime_refuses_are_an_error_of_one_line(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model", "phi")  # heads of 16, of which 8 are rotated
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot run it: .*GroupQueryAttention"):
        phinetune.export(str(source), tmp_path / "onnx", {"precision": "fp32"})


GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["StableLmForCausalLM"]}, "StableLmForCausalLM: the installed onnxruntime-genai does not"),
        ({"architectures": None}, "a model without architectures in its config.json"),
        (GEMMA3, "Gemma3ForCausalLM: the installed onnxruntime-genai cannot read the two rotary bases"),
        (
            {"architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 4096},
            "max_position_embeddings is 256 and original_max_position_embeddings 4096, but",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_build(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.workflow.export.build_onnx", lambda *args: pytest.fail("was built"))
    source = tiny_folder(tmp_path / "model")
    values = {**json.loads((source / "config.json").read_text()), **changes}
    if "rope_parameters" in changes:  # as transformers reads such a model
        assert message in architecture_problem(values, installed_builder())
        return
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(ExportError, match=message) as caught:
        phinetune.export(str(source), tmp_path / "onnx")
    assert len(caught.value.problems) == 1 and not (tmp_path / "onnx").exists()


def test_what_a_builder_may_know_is_not_refused() -> None:
    builder = installed_builder()
    assert {"LlamaForCausalLM", "Phi3ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"} <= builder.architectures
    silent = replace(builder, architectures=frozenset(), reads_local_theta=False)
    for changes in ({"architectures": ["NewForCausalLM"]}, GEMMA3):
        assert architecture_problem(changes, silent) == ""
    long = {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"long_factor": [1]},
    }
    for changes in (long, {"max_position_embeddings": 64, "original_max_position_embeddings": 64}):
        assert architecture_problem({"architectures": ["Phi3ForCausalLM"], **changes}, builder) == ""
