"""Adapters beside one ONNX base: each switched on gives what torch gives with it, none gives the base, and what cannot be is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import phinetune
from phinetune import lora
from phinetune.errors import AdapterError, ConfigError, ExportError
from phinetune.exporting.graph import read_graph
from phinetune.generation.load import find, find_manifest, load_generator
from phinetune.generation.onnx_backend import load_onnx
from phinetune.generation.torch_backend import TorchGenerator
from phinetune.lora import LoraConfig
from phinetune.model.folder import base_key
from phinetune.model.load import load_base_contract
from phinetune.workflow.export_adapters import export_adapters
from tiny import tiny_folder, tiny_model

FORMATS = ("safetensors", "numpy")
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "wide": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "narrow": {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": ["k_proj", "o_proj", "down_proj"]},
    },
    "phi3": {
        "wide": {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
        "narrow": {"r": 3, "lora_alpha": 6, "target_modules": ["v_proj", "up_proj"], "rank_pattern": {"up_proj": 2}},
    },
}


def saved_adapter(folder: Path, base: Path, kind: str, values: dict[str, Any], seed: int = 0, key: bool = True) -> Path:
    """An adapter with random factors of `base`, as training would leave it."""
    model = tiny_model(kind)
    adapter = lora.inject(model, LoraConfig(**values))
    factors = [p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))]
    torch.manual_seed(seed)
    for parameter in factors:
        torch.nn.init.normal_(parameter, std=0.15)
    lora.save_adapter(adapter, folder, str(base), base_key(base) if key else None)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, phi3_folder: Path) -> dict[str, Path]:
    """Per architecture: a folder with adapters `wide` and `narrow`, and their export `fp32`; for llama `int4` too."""
    folders = {}
    for kind, base in (("llama", llama_folder), ("phi3", phi3_folder)):
        root = folders[kind] = tmp_path_factory.mktemp(kind)
        for seed, (name, values) in enumerate(ADAPTERS[kind].items()):
            saved_adapter(root / name, base, kind, values, seed)
        adapters = [str(root / name) for name in ADAPTERS[kind]]
        export_adapters(adapters, root / "fp32", {"precision": "fp32"}, formats=FORMATS)
    root = folders["llama"]
    export_adapters({name: str(root / name) for name in ADAPTERS["llama"]}, root / "int4")
    return folders


def torch_generator(kind: str, base: Path, adapter: Path | None) -> TorchGenerator:
    model = tiny_model(kind)
    if adapter is not None:
        lora.load_adapter(model, adapter)
    return TorchGenerator(model.eval(), load_base_contract(base))


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_switching_at_run_time_gives_what_torch_gives(
    kind: str, made: dict[str, Path], llama_folder: Path, phi3_folder: Path
) -> None:
    base = llama_folder if kind == "llama" else phi3_folder
    generator = load_onnx(made[kind] / "fp32")
    prompts = [list(probe.ids) for probe in generator.contract.probes[:3]]
    for name in ("wide", None, "narrow", "wide"):  # one loaded model, back and forth
        reference = torch_generator(kind, base, made[kind] / name if name else None)
        active = generator.with_adapter(name)
        for ids in prompts:
            with torch.inference_mode():
                expected = reference.model(torch.tensor([ids])).logits[0, -1].numpy()
            assert np.abs(active.logits(ids) - expected).max() < 1e-3
        answers = list(zip(active.complete(prompts, 8), reference.complete(prompts, 8), strict=True))
        assert all(onnx.ids == other.ids for onnx, other in answers)
    wide, narrow = (generator.with_adapter(n).logits(prompts[0]) for n in ("wide", "narrow"))
    assert np.abs(wide - narrow).max() > 0.1 < np.abs(wide - generator.logits(prompts[0])).max()


def test_an_int4_base_stays_int4_and_its_factors_floating_point(made: dict[str, Path]) -> None:
    folder = made["llama"] / "int4"
    facts = read_graph(folder / "model.onnx")
    assert facts.quantized == 11 and not facts.plain and facts.weight_types["UINT8"] == 11
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {a["likeness"] > 0.8 for a in manifest["adapters"].values()} == {True}
    assert (manifest["adapters"]["wide"]["ranks"], manifest["adapters"]["narrow"]["ranks"]) == ([8, 24], [2])
    assert manifest["verified"]["adapters_compared"] == 2
    generator = load_onnx(folder)
    ids = generator.contract.probes[0].ids
    moved = [np.abs(generator.with_adapter(n).logits(ids) - generator.logits(ids)).max() for n in ("wide", "narrow")]
    assert min(moved) > 0.1


def test_an_adapter_is_addressed_by_its_file(made: dict[str, Path]) -> None:
    folder = made["llama"] / "fp32"
    name = str(folder / "narrow.onnx_adapter")
    assert find(name) == (folder, "onnx")
    assert find_manifest(name, folder)["ranks"] == [2]
    direct, addressed = load_onnx(folder, "narrow"), load_generator(name)
    ids = direct.contract.probes[0].ids
    assert np.array_equal(direct.logits(ids), addressed.logits(ids))  # type: ignore[attr-defined]
    with pytest.raises(AdapterError, match=r"no adapter 'narow' here, did you mean \"narrow\"\?") as caught:
        load_onnx(folder, "narow")
    assert "narrow, wide" in caught.value.hint


def test_a_damaged_adapter_file_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["llama"] / "fp32", tmp_path / "copy"))
    file = folder / "wide.onnx_adapter"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(AdapterError, match=r"wide\.onnx_adapter: ONNX Runtime cannot load it"):
        load_onnx(folder, "wide")


def test_other_formats_hold_the_same_and_the_same_export_again_does_nothing(made: dict[str, Path]) -> None:
    from safetensors.numpy import load_file

    root = made["llama"]
    adapters = [str(root / name) for name in ADAPTERS["llama"]]
    again = export_adapters(adapters, root / "fp32", {"precision": "fp32"}, formats=FORMATS)
    files = again.manifest["adapters"]["narrow"]["files"]
    assert again.unchanged and files == ["narrow.onnx_adapter", "narrow.safetensors", "narrow.npz"]
    tensors = load_file(root / "fp32" / "narrow.safetensors")
    arrays = np.load(root / "fp32" / "narrow.npz", allow_pickle=False)
    assert set(tensors) == set(arrays.files) and all(np.array_equal(tensors[n], arrays[n]) for n in tensors)
    saved = lora.read_adapter(root / "narrow").state
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    A, B = (tensors[f"model.layers.0.mlp.down_proj.lora_{x}"] for x in "AB")
    product = (saved[f"{prefix}.lora_B.weight"] @ saved[f"{prefix}.lora_A.weight"]) * (6 / 2**0.5)  # rsLoRA
    assert np.allclose((A @ B).T, product.numpy(), atol=1e-6)


def test_export_with_adapters_is_the_same_stage(made: dict[str, Path], llama_folder: Path, tmp_path: Path) -> None:
    adapters = [str(made["llama"] / "narrow")]
    result = phinetune.export(str(llama_folder), tmp_path / "out", {"precision": "fp16"}, adapters=adapters)
    assert result.manifest["kind"] == "onnx" and result.manifest["adapters"]["narrow"]["logits_distance"] < 0.25
    from onnxruntime import AdapterFormat

    held = AdapterFormat.read_adapter(str(result.folder / "narrow.onnx_adapter")).get_parameters()
    assert {v.numpy().dtype for v in held.values()} == {np.dtype(np.float16)}


def test_the_output_layer_of_a_tied_model_and_an_adapter_without_effect(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "tied", tie=True)
    model = tiny_model("llama", tie=True)
    adapter = lora.inject(model, LoraConfig(r=2, target_modules=["lm_head"]))
    torch.nn.init.normal_(adapter.layers["lm_head"].lora_B, std=0.3)
    lora.save_adapter(adapter, tmp_path / "head", str(base), base_key(base))
    lora.save_adapter(lora.inject(tiny_model("llama", tie=True), LoraConfig(r=2)), tmp_path / "zero", str(base))
    adapters = [str(tmp_path / "head"), str(tmp_path / "zero")]
    figures = export_adapters(adapters, tmp_path / "out", {"precision": "fp32"}).manifest["adapters"]
    assert figures["head"]["logits_moved"] > 0.1 and figures["zero"]["logits_moved"] == 0
    assert figures["head"]["products"] == 1


def test_a_machine_too_small_for_the_comparison_is_said(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.model.compute.available_memory", lambda: 1)
    result = export_adapters([str(made["llama"] / "narrow")], tmp_path / "out")
    assert "were not compared with torch" in result.manifest["verified"]["not_verified"][0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, r"bad: DoRA's lengths cannot stand beside the base \(model\.layers\.0"),
        ({"modules_to_save": ["lm_head"]}, r"bad: trained modules or biases cannot stand beside the base \(lm_head"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, r"bad: factors of an embedding cannot stand beside the base"),
    ],
)
def test_what_is_no_pair_of_factors_is_refused(
    values: dict[str, Any], message: str, llama_folder: Path, tmp_path: Path
) -> None:
    folder = saved_adapter(tmp_path / "bad", llama_folder, "llama", {"r": 2, **values})
    with pytest.raises(AdapterError, match=message) as caught:
        export_adapters([str(folder)], tmp_path / "out")
    assert "export --model ADAPTER" in caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


def test_adapters_of_other_bases_and_other_contracts_are_refused(
    made: dict[str, Path], llama_folder: Path, tmp_path: Path
) -> None:
    other = tiny_folder(tmp_path / "other", dtype=torch.float16)
    stranger = saved_adapter(tmp_path / "stranger", other, "llama", {"r": 2})
    narrow = str(made["llama"] / "narrow")
    with pytest.raises(AdapterError, match="stranger: belongs to another base model than narrow"):
        export_adapters([narrow, str(stranger)], tmp_path / "out")
    elsewhere = saved_adapter(tmp_path / "elsewhere", llama_folder, "llama", {"r": 2})
    contract = load_base_contract(llama_folder)
    contract.save(elsewhere)
    saved = json.loads((elsewhere / "prompt_contract.json").read_text())
    (elsewhere / "prompt_contract.json").write_text(json.dumps({**saved, "stop_ids": [3]}))
    with pytest.raises(AdapterError, match="elsewhere: its prompt contract is not that of narrow: stop_ids"):
        export_adapters([narrow, str(elsewhere)], tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": []}, "at least one is needed"),
        ({"adapters": ["x/same", "y/same"]}, "two are called 'same'"),
        ({"adapters": {"no/name": "x"}}, "'no/name' cannot be the name of an adapter"),
        ({"formats": ["pickle"]}, "no such format 'pickle'"),
        (
            {"export_config": {"exclude_lm_head": True}},
            "exclude_lm_head: not with adapters: the model must answer prompts",
        ),
        ({"export_config": {"precision": "bf16", "execution_provider": "cuda"}}, "not bf16 with adapters"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_adapters(**{"adapters": ["a"], "output_dir": tmp_path / "out", **arguments})


def test_an_adapter_that_torch_sees_otherwise_is_not_exported(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phinetune.exporting import lora_inputs

    right = lora_inputs.lora_inputs

    def swapped(*arguments: Any) -> dict[str, Any]:
        inputs = right(*arguments)
        for side in "AB":  # the factors of one layer in the place of another of the same shape
            one, two = (f"model.layers.{i}.mlp.down_proj.lora_{side}" for i in (0, 1))
            inputs[one], inputs[two] = inputs[two], inputs[one]
        return inputs

    monkeypatch.setattr(lora_inputs, "lora_inputs", swapped)
    with pytest.raises(ExportError, match=r"narrow: its logits differ from torch's by .* \(0.001 is allowed\)"):
        export_adapters([str(made["llama"] / "narrow")], tmp_path / "out", {"precision": "fp32"})
    assert not (tmp_path / "out").exists()
