"""The export verifies its work: every planted fault is caught, what is right passes, a failure leaves nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phinetune
from phinetune.errors import ConfigError, ExportError, MissingPackageError, OutputError
from phinetune.exporting import verify as verifying
from phinetune.exporting.build import builder_options
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.graph import graph_problems, read_graph
from phinetune.exporting.options import Builder, check_options, read_builder
from phinetune.exporting.verify import run_graph, verify
from phinetune.generation.onnx_backend import load_onnx, onnx_runtime
from phinetune.model.contract import load_contract
from phinetune.workflow.export import parse_export_config
from tiny import tiny_folder


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    return phinetune.export(str(llama_folder), tmp_path_factory.mktemp("onnx") / "int4").folder


@pytest.fixture
def copy(int4: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(int4, tmp_path / "copy"))


def test_every_requested_option_took_effect(tmp_path: Path, llama_folder: Path) -> None:
    options = {"precision": "int4", "block_size": 16, "symmetric": False, "accuracy_level": 1, "algorithm": "rtn"}
    result = phinetune.export(str(llama_folder), tmp_path / "out", options)
    facts = read_graph(result.folder / "model.onnx")
    found = {name: facts.count(name) for name in ("bits", "block_size", "accuracy_level", "zero_points", "grouped")}
    asked = {"bits": 4, "block_size": 16, "accuracy_level": 1, "zero_points": True, "grouped": True}
    assert found == {name: {value: facts.quantized} for name, value in asked.items()}
    assert facts.quantized > 0 and not facts.plain
    assert result.manifest["verified"]["block_sizes"] == {"16": facts.quantized}
    assert result.manifest["kind"] == "onnx" and result.manifest["export"]["block_size"] == 16


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"block_size": 64}, r"block sizes are \[32\], 64 was asked for"),
        ({"accuracy_level": 1}, r"accuracy levels are \[4\], 1 was asked for"),
        ({"symmetric": False}, "have no zero points, asymmetric blocks were asked for"),
        ({"algorithm": "k_quant_mixed"}, "no layer has 8 bits"),
        ({"precision": "fp32"}, "products are quantized, fp32 was asked for"),
    ],
)
def test_an_option_that_the_builder_ignored_is_caught(asked: dict[str, Any], message: str, int4: Path) -> None:
    with pytest.raises(ExportError, match=message):
        verify(int4, replace(ExportConfig(), **asked), load_contract(int4))


def test_a_model_that_was_not_quantized_is_caught(int4: Path) -> None:
    facts = replace(read_graph(int4 / "model.onnx"), plain=("a", "b", "c"))
    assert graph_problems(facts, ExportConfig()) == [
        f"3 of {3 + facts.quantized} products are not quantized, int4 was asked for"
    ]
    assert graph_problems(read_graph(int4 / "model.onnx"), ExportConfig()) == []


def test_the_stop_ids_are_exported_and_a_wrong_one_is_caught(copy: Path) -> None:
    contract = load_contract(copy)
    config = json.loads((copy / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == list(contract.stop_ids) == [4, 0]
    config["model"]["eos_token_id"] = 0
    (copy / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"stops at tokens \[0\], the model was trained to stop at \[4, 0\]"):
        verify(copy, ExportConfig(), contract)


def test_a_tokenizer_that_gives_other_ids_is_caught(copy: Path) -> None:
    contract = load_contract(copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ExportError, match="ONNX Runtime's tokenizer differs from the one trained with at token"):
        verify(copy, ExportConfig(), contract)


def test_a_folder_that_does_not_load_is_caught(copy: Path) -> None:
    (copy / "model.onnx.data").unlink(missing_ok=True)
    settings = json.loads((copy / "genai_config.json").read_text())
    settings["model"]["decoder"]["filename"] = "nowhere.onnx"
    (copy / "genai_config.json").write_text(json.dumps(settings))
    with pytest.raises(ExportError, match="ONNX Runtime cannot load it"):
        verify(copy, ExportConfig(), load_contract(copy))


def test_a_mistake_of_ours_is_not_taken_for_the_runtimes(monkeypatch: pytest.MonkeyPatch, int4: Path) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    contract = load_contract(int4)
    for error, raised in (
        (KeyError("feed"), KeyError),
        (Fail("kernel"), ExportError),
        (RuntimeError("x"), ExportError),
    ):
        monkeypatch.setattr(verifying, "run_graph", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(raised):
            verifying.check_outputs(int4, contract)


def test_a_builder_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, builder_started: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.workflow.export.architecture_problem", lambda values, builder: "")
    folder = tiny_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["StableLmForCausalLM"]}))
    with pytest.raises(ExportError, match=r"the ONNX builder failed: .*not currently supported") as caught:
        phinetune.export(str(folder), tmp_path / "out")
    assert "python -m onnxruntime_genai" in caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_foreign_folder_is_not_written_into(tmp_path: Path, llama_folder: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="holds files that phinetune did not write"):
        phinetune.export(str(llama_folder), tmp_path / "out", overwrite=True)


def test_the_same_export_again_does_nothing(int4: Path, llama_folder: Path) -> None:
    stamp = (int4 / "model.onnx").stat().st_mtime_ns
    assert phinetune.export(str(llama_folder), int4).unchanged
    assert (int4 / "model.onnx").stat().st_mtime_ns == stamp
    with pytest.raises(OutputError, match="other settings or data"):
        phinetune.export(str(llama_folder), int4, {"block_size": 64})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precison": "int4"}, r'export\.precison: unknown key, did you mean "precision"\?'),
        ({"precision": "int3"}, r"export\.precision"),
        ({"block_size": 33}, r"export\.block_size"),
    ],
)
def test_export_config_problems_name_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_export_config(values)


def test_the_builder_gets_its_options_without_the_int4_prefix() -> None:
    options = builder_options(ExportConfig(block_size=64))
    assert options == {
        "hf_remote": "false",
        "block_size": "64",
        "is_symmetric": "true",
        "accuracy_level": "4",
        "algo_config": "default",
    }
    assert builder_options(ExportConfig(precision="fp32")) == {"hf_remote": "false"}


OLD = Builder(
    "int4_", ("int4", "bf16", "fp16", "fp32"), frozenset({"default", "rtn"}), frozenset({"shared_embeddings"})
)
NEW = Builder(
    "",
    ("int4", "int8", "bf16", "fp16", "fp32"),
    frozenset({"default", "rtn", "rtn_last", "k_quant", "k_quant_last", "k_quant_mixed", "k_quant_linear"}),
    frozenset({"fuse_qkv", "shared_embeddings", "prune_lm_head"}),
)
MODEL = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
TIED = {**MODEL, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("asked", "model", "message"),
    [
        ({"precision": "bf16"}, MODEL, "precision: bf16 runs on cuda only, the execution provider is cpu"),
        ({"precision": "int8", "execution_provider": "dml"}, MODEL, "precision: int8 does not run on dml"),
        ({"precision": "fp32", "block_size": 16}, MODEL, "block_size: is for int4 and int8, the precision is fp32"),
        ({"precision": "fp16", "algorithm": "rtn"}, MODEL, "algorithm: is for int4 and int8, the precision is fp16"),
        ({"precision": "int8", "algorithm": "rtn_last"}, MODEL, "rtn_last raises layers of an int4 model to 8 bits"),
        ({"precision": "int8", "use_qdq": True}, MODEL, "use_qdq: is for int4, the precision is int8"),
        ({"use_webgpu_fp32": True}, MODEL, "use_webgpu_fp32: is for webgpu, the execution provider is cpu"),
        ({"use_cuda_bf16": True}, MODEL, "use_cuda_bf16: is for cuda, the execution provider is cpu"),
        ({"enable_cuda_graph": True}, MODEL, "enable_cuda_graph: is for cuda, the execution provider is cpu"),
        ({"exclude_lm_head": True, "include_hidden_states": True}, MODEL, "gives the hidden states already"),
        ({"exclude_lm_head": True, "algorithm": "rtn_last"}, MODEL, "exclude_lm_head leaves it out"),
        ({"exclude_embeds": True, "op_types_to_quantize": ["Gather"]}, MODEL, "exclude_embeds leaves it out"),
        ({"use_qdq": True, "algorithm": "rtn"}, MODEL, "use_qdq: the builder ignores it for the algorithm rtn"),
        ({"use_qdq": True, "accuracy_level": 1}, MODEL, "accuracy_level: has no place in a graph with use_qdq"),
        ({"use_qdq": True}, TIED, "use_qdq: cannot be built where input and output embedding share one weight"),
        ({"op_types_to_quantize": ["Gather"], "algorithm": "rtn"}, MODEL, "passes over embeddings"),
        (
            {"execution_provider": "cuda", "use_cuda_bf16": True, "algorithm": "rtn"},
            MODEL,
            "use_cuda_bf16: the builder fails at weights in bf16 for the algorithm rtn",
        ),
        ({"use_8bits_moe": True}, MODEL, "use_8bits_moe: this model has no experts"),
        ({"symmetric": False}, TIED, "symmetric: false does not load where input and output embedding share one"),
        ({"op_types_to_quantize": ["MatMul"]}, TIED, "op_types_to_quantize: the builder takes both"),
        ({"algorithm": "k_quant"}, MODEL, "block_size: 96 inputs are 3 blocks of 32; zero points are stored by twos"),
        ({"algorithm": "rtn", "symmetric": False}, MODEL, "block_size: 96 inputs are 3 blocks of 32"),
        ({"search": {"max_lenght": 9}}, MODEL, r'search\.max_lenght: unknown key, did you mean "max_length"\?'),
        ({"search": {"max_length": 300}}, MODEL, "search.max_length: must be 1 to 256, the model's context"),
        ({"search": {"max_length": 9, "min_length": 10}}, MODEL, "search.min_length: is larger than max_length"),
        ({"search": {"do_sample": 1}}, MODEL, "search.do_sample: must be true or false"),
        ({"extra_options": {"fuse_qvk": False}}, MODEL, r'unknown to the installed .*, did you mean "fuse_qkv"\?'),
        ({"extra_options": {"int4_block_size": 64}}, MODEL, r"is a key of its own, export\.block_size"),
        ({"extra_options": {"algo_config": "rtn"}}, MODEL, r"is a key of its own, export\.algorithm"),
        ({"extra_options": {"adapter_path": "a"}}, MODEL, "adapters are exported by export_adapters"),
    ],
)
def test_combinations_that_cannot_be_are_refused_before_the_build(
    asked: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(parse_export_config(asked), model, NEW)


@pytest.mark.parametrize(
    ("asked", "model"),
    [
        ({"symmetric": False, "extra_options": {"shared_embeddings": False}}, TIED),
        ({"symmetric": False, "algorithm": "rtn", "block_size": 16}, TIED),
        ({"symmetric": False, "nodes_to_exclude": ["/lm_head/MatMul"]}, TIED),
        ({"symmetric": False, "exclude_lm_head": True}, TIED),
        ({"use_8bits_moe": True}, {**MODEL, "num_local_experts": 4}),
        ({"precision": "bf16", "execution_provider": "cuda"}, MODEL),
        ({"algorithm": "k_quant_mixed", "block_size": 16}, MODEL),
    ],
)
def test_their_neighbours_that_can_be_are_not(asked: dict[str, Any], model: dict[str, Any]) -> None:
    check_options(parse_export_config(asked), model, NEW)


def test_all_problems_are_named_at_once_and_before_anything_is_built(tmp_path: Path, llama_folder: Path) -> None:
    asked = {"precision": "fp32", "block_size": 64, "enable_cuda_graph": True, "search": {"x": 1}}
    with pytest.raises(ConfigError) as caught:
        phinetune.export(str(llama_folder), tmp_path / "out", asked)
    assert [p.split(":")[0] for p in caught.value.problems] == [
        "export.block_size",
        "export.enable_cuda_graph",
        "export.search.x",
    ]
    assert not list(tmp_path.iterdir())


def test_an_older_builder_is_asked_in_its_own_words_and_not_for_what_it_does_not_know(tmp_path: Path) -> None:
    source = (
        'choices=["int4", "fp16"] "rtn" extra_options.get("int4_is_symmetric") bools = ["use_qdq"] "a_key" in kv_pairs'
    )
    (tmp_path / "builder.py").write_text(f'"--precision", {source}')
    assert read_builder(tmp_path) == Builder(
        "int4_", ("int4", "fp16"), frozenset({"default", "rtn"}), frozenset({"int4_is_symmetric", "use_qdq", "a_key"})
    )
    with pytest.raises(ConfigError, match=r"builds int4, bf16, fp16, fp32 \(found: 'int8'\)"):
        check_options(ExportConfig("int8"), MODEL, OLD)
    with pytest.raises(ConfigError, match=r"knows default, rtn \(found: 'k_quant'\)"):
        check_options(ExportConfig(algorithm="k_quant", block_size=16), MODEL, OLD)
    check_options(ExportConfig(symmetric=False), TIED, OLD)  # it does not share integers for this algorithm
    config = ExportConfig(op_types_to_quantize=("MatMul", "Gather"), nodes_to_exclude=("/a", "/b"), use_qdq=True)
    options = builder_options(config, prefix="int4_")
    assert (options["int4_op_types_to_quantize"], options["int4_nodes_to_exclude"]) == ("MatMul/Gather", "/a,/b")
    assert options["use_qdq"] == "true" and "exclude_lm_head" not in options


def test_rtn_rounds_to_the_nearest(tmp_path: Path, llama_folder: Path, builder_started: None) -> None:
    """Every stored 4-bit number is the one nearest to the weight it stands for, with the scale that is stored beside it."""
    import onnx
    from onnx.numpy_helper import to_array
    from safetensors.torch import load_file

    result = phinetune.export(str(llama_folder), tmp_path / "out", {"precision": "int4", "algorithm": "rtn"})
    graph = onnx.load(str(result.folder / "model.onnx")).graph
    stored = {t.name: to_array(t) for t in graph.initializer}
    name = "model.layers.0.mlp.down_proj"
    packed, scales = (
        stored[f"{name}.MatMul.weight_Q4G32"],
        stored[f"{name}.MatMul.weight_scale"],
    )  # (64, 3, 16), (64, 3)
    integers = np.stack([packed & 15, packed >> 4], -1).reshape(64, 3, 32).astype(np.float32) - 8
    weights = load_file(llama_folder / "model.safetensors")[f"{name}.weight"].float().numpy().reshape(64, 3, 32)
    exact = weights / scales.reshape(64, 3, 1)
    assert np.abs(exact - integers).max() <= 0.5 + 1e-5
    assert (
        np.abs(exact).max() <= 8 and (np.abs(integers).max(-1) >= 7).all()
    )  # the scale is no larger than it needs to be
    default = replace(ExportConfig(), algorithm="default")
    facts = read_graph(result.folder / "model.onnx")
    assert graph_problems(facts, default) == [
        f"{facts.quantized} products were quantized by another algorithm than default"
    ]


def test_bits_are_looked_at_layer_by_layer(int4: Path) -> None:
    facts = read_graph(int4 / "model.onnx")
    head = [replace(p, bits=8 if p.name == "/lm_head/MatMul" else 4, grouped=True) for p in facts.products]
    last = replace(facts, products=tuple(head))
    assert graph_problems(last, ExportConfig(algorithm="rtn_last")) == []
    assert graph_problems(last, ExportConfig(algorithm="rtn")) == ["weights have [4, 8] bits, [4] were asked for"]
    first = replace(facts, products=tuple(replace(p, bits=12 - p.bits) for p in head))
    assert graph_problems(first, ExportConfig(algorithm="rtn_last")) == [
        "the output layer has not 8 bits, though rtn_last was asked for",
        "10 layers beside the output layer have 8 bits, rtn_last was asked for",
    ]
    assert graph_problems(first, ExportConfig(precision="int8", algorithm="rtn")) == [
        "weights have [4, 8] bits, [8] were asked for"
    ]
    without = graph_problems(last, ExportConfig(algorithm="k_quant_last"))
    assert without == ["11 products have no zero points, which k_quant_last gives them"]


def test_a_quantized_embedding_an_excluded_node_and_search(tmp_path: Path, llama_folder: Path) -> None:
    asked = {
        "op_types_to_quantize": ["MatMul", "Gather"],
        "nodes_to_exclude": ["/model/layers.1/mlp/down_proj/MatMul"],
        "search": {"max_length": 100, "repetition_penalty": 1.1},
        "extra_options": {"fuse_qkv": False},
    }
    notes: list[str] = []
    result = phinetune.export(str(llama_folder), tmp_path / "out", asked, on_event=lambda e: notes.append(str(e)))
    facts = read_graph(result.folder / "model.onnx")
    assert facts.plain == ("/model/layers.1/mlp/down_proj/MatMul",) and facts.embeddings == 1
    assert facts.quantized == 14 and facts.count("bits") == {4: 14}  # q, k and v apart
    search = json.loads((result.folder / "genai_config.json").read_text())["search"]
    assert (search["max_length"], search["repetition_penalty"]) == (100, 1.1)
    assert result.manifest["verified"]["not_verified"] == ["extra_options: the effect of fuse_qkv was not verified"]
    assert any("the effect of fuse_qkv was not verified" in note for note in notes)
    config = parse_export_config(asked)
    for field, value, message in (
        (
            "nodes_to_exclude",
            ("/model/layers.1/mlp/down_prj/MatMul",),
            r"no node .*, did you mean \"/model/layers.1/mlp/down",
        ),
        ("nodes_to_exclude", ("/lm_head/MatMul",), "/lm_head/MatMul was quantized all the same"),
        ("op_types_to_quantize", ("MatMul",), "the embedding is quantized, Gather was not asked for"),
        ("search", {"max_length": 101}, "search.max_length is 100, 101 was asked for"),
        ("execution_provider", "cuda", "activations are FLOAT, FLOAT16 was asked for"),
        ("use_qdq", True, "products are MatMulNBits, use_qdq was asked for"),
        ("include_hidden_states", True, "the graph has no hidden_states, include_hidden_states was asked for"),
        ("exclude_lm_head", True, "the graph has logits, exclude_lm_head is True"),
        ("algorithm", "rtn", "14 products were quantized by another algorithm than rtn"),
    ):
        with pytest.raises(ExportError, match=message):
            verify(result.folder, replace(config, **{field: value}), load_contract(result.folder))


def test_dequantize_nodes_in_place_of_products_of_integers(tmp_path: Path, llama_folder: Path) -> None:
    result = phinetune.export(str(llama_folder), tmp_path / "out", {"use_qdq": True, "symmetric": False})
    facts = read_graph(result.folder / "model.onnx")
    assert facts.count("accuracy_level") == {None: 11} and facts.count("zero_points") == {True: 11}


@pytest.mark.parametrize("left_out", ["exclude_embeds", "exclude_lm_head"])
def test_a_model_without_an_end_is_verified_as_far_as_can_be_and_does_not_answer(
    left_out: str, tmp_path: Path, llama_folder: Path
) -> None:
    result = phinetune.export(str(llama_folder), tmp_path / "out", {"precision": "fp32", left_out: True})
    verified = result.manifest["verified"]
    assert verified["logits_distance"] < 1e-3  # of what it gives, from torch's
    assert len(verified["not_verified"]) == 1 and "does not answer prompts" in verified["not_verified"][0]
    part = {"exclude_embeds": "input embedding", "exclude_lm_head": "output layer"}[left_out]
    with pytest.raises(ExportError, match=f"was exported without its {part}, it does not answer prompts"):
        load_onnx(result.folder)


def test_hidden_states_beside_the_logits_are_those_of_torch(tmp_path: Path, llama_folder: Path) -> None:
    asked = {"precision": "fp32", "include_hidden_states": True}
    result = phinetune.export(str(llama_folder), tmp_path / "out", asked)
    assert result.manifest["verified"]["logits_distance"] < 1e-3
    outputs = run_graph(result.folder, [5, 6, 7])
    assert outputs["hidden_states"].shape == (1, 3, 64) and outputs["logits"].shape == (1, 3, 320)


def test_an_export_for_a_device_that_is_not_here_says_what_was_not_verified(tmp_path: Path, llama_folder: Path) -> None:
    asked = {"execution_provider": "cuda", "use_cuda_bf16": True, "enable_cuda_graph": True}
    result = phinetune.export(str(llama_folder), tmp_path / "out", asked)
    unsure = result.manifest["verified"].get("not_verified", [])
    if not onnx_runtime().is_cuda_available():
        assert len(unsure) == 1 and "has no cuda" in unsure[0] and "loading was not verified" in unsure[0]
    assert result.manifest["verified"]["activations"] == "BFLOAT16"
    facts = read_graph(result.folder / "model.onnx")
    assert graph_problems(facts, ExportConfig(execution_provider="cuda")) == [
        "activations are BFLOAT16, FLOAT16 was asked for"
    ]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama_folder: Path) -> None:
    monkeypatch.setattr("phinetune.exporting.build.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="onnxruntime_genai") as caught:
        phinetune.export(str(llama_folder), tmp_path / "out")
    assert "phinetune[onnx]" in caught.value.hint
