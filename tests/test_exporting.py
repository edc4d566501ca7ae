"""The export verifies its work: every planted fault is caught, what is right passes, a failure leaves nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import phinetune
from phinetune.errors import ConfigError, ExportError, MissingPackageError, OutputError
from phinetune.exporting.build import builder_options
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.graph import graph_problems, read_graph
from phinetune.exporting.verify import verify
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


def test_a_builder_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
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


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama_folder: Path) -> None:
    monkeypatch.setattr("phinetune.exporting.build.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="onnxruntime_genai") as caught:
        phinetune.export(str(llama_folder), tmp_path / "out")
    assert "phinetune[onnx]" in caught.value.hint
