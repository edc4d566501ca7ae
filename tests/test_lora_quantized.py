"""4-bit bases: the same layers over bitsandbytes' weights, QLoRA from training to merging, and which base an adapter goes into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import phinetune
import phinetune.lora as lora
from phinetune.errors import AdapterError, ConfigError
from phinetune.events import Note
from phinetune.lora.config import LoraConfig
from phinetune.lora.frozen import dense
from phinetune.lora.functional import lora_linear, lora_linear_reference
from phinetune.model.folder import resolve_model
from phinetune.model.load import LoadPlan, load_model, plan_load
from phinetune.model.quantized import Quantization, quantized_layers, read_quantization, round_trip

bitsandbytes = pytest.importorskip("bitsandbytes")

IDS = torch.tensor([[1, 7, 42, 100, 5, 200]])
CPU = torch.device("cpu")


def linear4bit(features: int, out: int, kind: str = "nf4", double: bool = True, bias: bool = True) -> Any:
    torch.manual_seed(features + out)
    plain = nn.Linear(features, out, bias=bias)
    layer = bitsandbytes.nn.Linear4bit(
        features, out, bias=bias, quant_type=kind, compress_statistics=double, compute_dtype=torch.float32
    )
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_the_dense_weight_is_what_bitsandbytes_computes_with(kind: str, double: bool) -> None:
    layer = linear4bit(128, 96, kind, double)
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dense(layer.weight, torch.float32), expected)
    assert dense(layer.weight, torch.bfloat16).dtype == torch.bfloat16


def test_a_layer_over_four_bits_equals_one_over_the_same_weights_dense() -> None:
    base = linear4bit(128, 96)
    ours = lora.Linear.from_base(base, 4, 8.0)
    plain = nn.Linear(128, 96)
    plain.weight.data, plain.bias.data = dense(base.weight, torch.float32).clone(), base.bias.data.clone()
    theirs = lora.Linear.from_base(plain, 4, 8.0)
    for layer in (ours, theirs):
        torch.manual_seed(1)
        nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
    x, y = (torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in range(2))
    a, b = ours(x), theirs(y)
    assert torch.equal(a, b)
    a.square().sum().backward(), b.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(ours.lora_A.grad, theirs.lora_A.grad) and torch.equal(ours.lora_B.grad, theirs.lora_B.grad)
    assert ours.weight.grad is None and torch.equal(ours.folded(), theirs.folded())


def test_the_function_over_four_bits_equals_its_reference() -> None:
    base = linear4bit(64, 32, bias=False)
    x, A, B = (
        torch.randn(6, 64).requires_grad_(),
        torch.randn(3, 64).requires_grad_(),
        torch.randn(32, 3).requires_grad_(),
    )
    ours = lora_linear(x, base.weight, None, A, B, 0.5)
    theirs = lora_linear_reference(x, base.weight, None, A, B, 0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, [x, A, B], g), torch.autograd.grad(theirs, [x, A, B], g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_weights_that_bitsandbytes_has_reordered_for_its_own_kernel_are_still_read() -> None:
    base = linear4bit(128, 96)
    expected = dense(base.weight, torch.float32).clone()
    with torch.no_grad():
        base.eval()(
            torch.randn(2, 128)
        )  # on processors with AVX-512 BF16 this re-orders the weight, its scales rounded
    torch.testing.assert_close(dense(base.weight, torch.float32), expected, rtol=0.01, atol=1e-3)


def test_bitsandbytes_leaves_the_weights_of_an_adapted_model_alone(folder: Path) -> None:
    model = quantized(folder)
    base = model.get_submodule("model.layers.0.mlp.up_proj")
    expected = dense(base.weight, torch.bfloat16).clone()
    with torch.no_grad():
        plain = model.eval()(IDS).logits
        lora.inject(model, LoraConfig(r=4, target_modules=["q_proj"]))
        assert (model(IDS).logits - plain).abs().max() < 0.05 * plain.abs().max()
    assert torch.equal(dense(base.weight, torch.bfloat16), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("quantized") / "llama", "llama", torch.bfloat16)


def quantized(folder: Path) -> Any:
    return load_model(folder, LoadPlan(torch.bfloat16, CPU, quantization=Quantization()))


def test_a_whole_model_in_four_bits_takes_adapters_gives_them_back_and_merges(folder: Path, tmp_path: Path) -> None:
    model = quantized(folder)
    assert len(quantized_layers(model)) == 14 and "lm_head" not in quantized_layers(model)
    adapter = lora.inject(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for layer in adapter.layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    adapted = model(IDS).logits
    lora.save_adapter(adapter, tmp_path)
    again = quantized(folder)
    adapters = lora.Adapters(again)
    adapters.load("one", tmp_path)
    plain = again(IDS).logits
    adapters.use("one")
    assert torch.equal(again(IDS).logits, adapted)
    with adapters.disabled():
        assert torch.equal(again(IDS).logits, plain)
    assert torch.equal(again(IDS).logits, adapted)
    names = lora.merge(model)
    merged = model.get_submodule(names[0])
    assert type(merged) is nn.Linear and merged.weight.dtype == torch.bfloat16
    assert (model(IDS).logits - adapted).abs().max() < 0.05 * adapted.abs().max()


def test_rounding_twice_is_what_the_loaded_model_holds(folder: Path) -> None:
    from safetensors.torch import load_file

    model, name = quantized(folder), "model.layers.1.mlp.up_proj"
    stored = load_file(str(folder / "model.safetensors"))[f"{name}.weight"]
    held = dense(model.get_submodule(name).weight, torch.bfloat16)
    assert torch.equal(round_trip(stored, Quantization(), torch.bfloat16), held)
    assert not torch.equal(stored, held)


def test_an_eight_bit_base_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match="0: its weight is int8"):
        lora.inject(model, LoraConfig(r=2))


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, None),
        ({"load_in_4bit": True}, Quantization("nf4", True)),
        ({"load_in_4bit": False, "quantization_config": None}, None),
        ({"quantization_config": {"load_in_4bit": True}}, Quantization("fp4", False)),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}},
            Quantization("nf4", True),
        ),
    ],
)  # fmt: skip
def test_what_was_asked_for_is_read_from_the_names_of_transformers(kwargs: dict[str, Any], expected: Any) -> None:
    assert read_quantization(dict(kwargs)) == expected


def test_a_config_object_of_transformers_is_read() -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    assert read_quantization({"quantization_config": config}) == Quantization("nf4", True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"load_in_8bit": True}, "load_in_8bit: not supported"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}}, 'did you mean "bnb_4bit_quant_type"'),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}}, "must be"),
        ({"quantization_config": {"quant_method": "gptq"}}, "only bitsandbytes"),
        ({"quantization_config": 4}, "must hold the names"),
    ],
)  # fmt: skip
def test_other_quantizations_are_refused_by_key(kwargs: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_load(folder, kwargs)


# QLoRA end to end on a tiny model: trained on 4 bits, evaluated on 4 bits, merged into the base that it was trained for.


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import PROMPT, tone_rows, write_rows

    root = tmp_path_factory.mktemp("qlora")
    rows = write_rows(root / "rows.jsonl", tone_rows(40))
    result = phinetune.finetune(
        str(folder),
        {"path": str(rows), **PROMPT},
        {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "report_to": "none"},
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"load_in_4bit": True, "torch_dtype": "float32"},
        root / "adapter",
    )
    return result.folder


def test_the_manifest_says_what_the_training_ran_on(trained: Path) -> None:
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["quantization"]["quant_type"] == "nf4" and len(manifest["quantization"]["layers"]) == 14
    assert len(manifest["probe_logits"]) == len(json.loads((trained / "prompt_contract.json").read_text())["probes"])


def test_an_adapter_is_evaluated_over_the_base_it_was_trained_on(trained: Path) -> None:
    from phinetune.generation.load import load_adapted

    model, _ = load_adapted(trained, {"torch_dtype": "float32"}, on_event=lambda event: None)
    assert len(quantized_layers(model)) == 14


def merged(trained: Path, output: Path, base: Any = "auto") -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    result = phinetune.merge(
        str(trained), output, base=base, on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None
    )
    return result.manifest["figures"], notes


def test_auto_finds_the_base_that_gives_the_trainings_logits(trained: Path, tmp_path: Path) -> None:
    figures, notes = merged(trained, tmp_path / "auto")
    distances = figures["distance_to_trained"]
    assert figures["base"] == "dequantized" and distances["dequantized"] < distances["original"] / 5
    assert any("base: dequantized" in note for note in notes)
    assert figures["rounding_over_change"] > 0


def test_auto_takes_the_original_where_its_logits_are_the_nearer_ones(trained: Path, tmp_path: Path) -> None:
    """The measurement decides, not the manifest's word: here the recorded logits are those over the original weights."""
    import shutil

    from phinetune.model.contract import load_contract
    from phinetune.model.probe import probe_logits, record_logits

    copy = Path(shutil.copytree(trained, tmp_path / "adapter"))
    manifest = json.loads((copy / "manifest.json").read_text())
    model = load_model(resolve_model(manifest["base_model"]), LoadPlan(torch.float32, CPU))
    lora.load_adapter(model, copy)
    manifest["probe_logits"] = record_logits(probe_logits(model, load_contract(copy)))
    (copy / "manifest.json").write_text(json.dumps(manifest))
    figures, _ = merged(copy, tmp_path / "auto")
    assert figures["base"] == "original"


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_the_policy_asked_for_is_what_is_written(trained: Path, tmp_path: Path, base: Any, folder: Path) -> None:
    from safetensors.torch import load_file

    figures, _ = merged(trained, tmp_path / "out", base)
    assert figures["base"] == base and "distance_to_trained" not in figures
    name = "model.layers.0.mlp.up_proj.weight"  # held in 4 bits, not adapted
    stored, written = (
        load_file(str(folder / "model.safetensors"))[name],
        load_file(str(tmp_path / "out" / "model.safetensors"))[name],
    )
    assert torch.equal(stored, written) == (base == "original")
    assert (load_file(str(folder / "model.safetensors"))["lm_head.weight"] == load_file(str(tmp_path / "out" / "model.safetensors"))["lm_head.weight"]).all()  # fmt: skip


def test_merging_again_for_another_base_is_not_taken_for_the_same_work(trained: Path, tmp_path: Path) -> None:
    merged(trained, tmp_path / "out", "original")
    with pytest.raises(phinetune.PhinetuneError, match="other settings"):
        merged(trained, tmp_path / "out", "dequantized")


def test_dequantized_is_refused_for_an_adapter_of_a_plain_base(trained: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(trained, tmp_path / "adapter"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["quantization"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="base: dequantized is for adapters trained on a 4-bit base"):
        merged(copy, tmp_path / "out", "dequantized")
    with pytest.raises(ConfigError, match='base: must be "auto"'):
        merged(copy, tmp_path / "out", "nf4")


def test_a_layer_that_gpt2_stores_the_other_way_round_merges_into_what_four_bits_made_of_it(tmp_path: Path) -> None:
    """bitsandbytes rounds along (out, in); the file holds (in, out)."""
    from transformers import AutoModelForCausalLM

    from phinetune.lora.changes import is_stored_transposed
    from phinetune.lora.stream import merge_files
    from phinetune.model.load import quiet_transformers
    from zoo import zoo_model

    with quiet_transformers():
        zoo_model("gpt2").save_pretrained(str(tmp_path / "base"))
    plan = LoadPlan(torch.float32, CPU, quantization=Quantization())
    model = load_model(tmp_path / "base", plan)
    held = set(quantized_layers(model))
    assert held and any("c_attn" in name for name in held)
    adapter = lora.inject(model, LoraConfig(r=4, target_modules=["c_attn", "attn.c_proj"]))
    for layer in adapter.layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    ids = torch.tensor([[1, 7, 42, 100, 5, 20]])
    adapted = model(ids).logits.detach()
    lora.save_adapter(adapter, tmp_path / "adapter")

    def restore(name: str, weight: torch.Tensor) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if not any(h == module or h.endswith(f".{module}") for h in held):
            return weight
        turned = is_stored_transposed(module, "gpt2")
        rounded = round_trip(weight.t().contiguous() if turned else weight, Quantization(), torch.float32)
        return rounded.t().contiguous() if turned else rounded

    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", restore, "nf4")
    with quiet_transformers():
        merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32).eval()
    assert (merged(ids).logits - adapted).abs().max() < 1e-3
    with pytest.raises(AdapterError, match="is a 4-bit Conv1D"):
        lora.merge(model)


# LoftQ: the factors start at what 4 bits took from the weights.

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def stored(folder: Path) -> Any:
    from phinetune.workflow.original import OriginalWeights

    return OriginalWeights(folder)


def test_loftq_starts_as_near_to_the_original_as_the_rank_allows(folder: Path) -> None:
    model, original = quantized(folder), stored(folder)
    config = LoraConfig(
        r=6, lora_alpha=15, target_modules=ALL, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}
    )
    adapter = lora.inject(model, config, original)
    assert len(adapter.layers) == 14
    for name, layer in adapter.layers.items():
        lost = original(name).float() - dense(layer.weight, torch.float32)
        left = torch.linalg.norm(lost - layer.delta())
        wanted = torch.linalg.svdvals(lost)[6:].square().sum().sqrt()
        torch.testing.assert_close(left, wanted, rtol=1e-4, atol=1e-5)
        assert left < torch.linalg.norm(lost)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_before_training_the_logits_are_nearer_to_the_original_than_those_of_four_bits(
    kind: str, tmp_path: Path
) -> None:
    from tiny import tiny_folder

    base = tiny_folder(tmp_path / kind, kind)
    plain = load_model(base, LoadPlan(torch.float32, CPU))(IDS).logits
    plan = LoadPlan(torch.float32, CPU, quantization=Quantization())
    rounded = (load_model(base, plan)(IDS).logits - plain).norm()
    gaps: list[float] = []
    for r in (4, 16, 32):
        model = load_model(base, plan)
        lora.inject(model, LoraConfig(r=r, target_modules=ALL, init_lora_weights="loftq"), stored(base))
        gaps.append(float((model(IDS).logits - plain).detach().norm()))
    assert rounded > gaps[0] > gaps[1] > gaps[2] and gaps[2] < rounded / 2


def test_slices_of_a_fused_layer_get_directions_of_their_own(tmp_path: Path) -> None:
    from tiny import tiny_folder

    base = tiny_folder(tmp_path / "phi3", "phi3")
    model = load_model(base, LoadPlan(torch.float32, CPU, quantization=Quantization()))
    original = stored(base)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="loftq")
    for name, layer in lora.inject(model, config, original).layers.items():
        lost, change = original(name) - dense(layer.weight, torch.float32), layer.delta()
        for start, stop in layer.spans:
            wanted = torch.linalg.svdvals(lost[start:stop])[4:].square().sum().sqrt()
            torch.testing.assert_close(torch.linalg.norm((lost - change)[start:stop]), wanted, rtol=1e-4, atol=1e-5)
        assert not change[64:96].any()  # k_proj


def test_weights_that_gpt2_stores_the_other_way_round_are_read_as_the_layer_has_them(tmp_path: Path) -> None:
    from phinetune.model.load import quiet_transformers
    from zoo import zoo_model

    with quiet_transformers():
        zoo_model("gpt2").save_pretrained(str(tmp_path / "base"))
    model = load_model(tmp_path / "base", LoadPlan(torch.float32, CPU, quantization=Quantization()))
    config = LoraConfig(r=4, target_modules=["c_attn", "attn.c_proj"], init_lora_weights="loftq")
    original = stored(tmp_path / "base")
    for name, layer in lora.inject(model, config, original).layers.items():
        lost = original(name) - dense(layer.weight, torch.float32)
        rounded = round_trip(original(name), Quantization(), torch.float32)  # of c_proj, too, which is square
        assert torch.equal(rounded, dense(layer.weight, torch.float32))
        assert (lost - layer.delta()).norm() < lost.norm()


def test_with_dora_the_lengths_are_those_that_the_layer_starts_with(folder: Path) -> None:
    logits = []
    for use_dora in (False, True):
        model = quantized(folder)
        config = LoraConfig(r=4, target_modules=ALL, init_lora_weights="loftq", use_dora=use_dora)
        lora.inject(model, config, stored(folder))
        logits.append(model(IDS).logits)
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()


def test_a_layer_that_is_not_in_four_bits_starts_without_a_change_and_is_named(folder: Path) -> None:
    notes: list[str] = []
    model = quantized(folder)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights="loftq")
    adapter = lora.inject(
        model, config, stored(folder), lambda e: notes.append(e.text) if isinstance(e, Note) else None
    )
    assert [n for n, layer in adapter.layers.items() if not layer.lora_B.any()] == ["lm_head"]
    assert any("lm_head is not in 4 bits and starts without a change" in note for note in notes)


def test_loftq_without_four_bits_or_without_the_original_is_refused(folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="loftq")
    plain = load_model(folder, LoadPlan(torch.bfloat16, CPU))
    with pytest.raises(ConfigError, match=r"model_kwargs\.load_in_4bit"):
        lora.inject(plain, config, stored(folder))
    with pytest.raises(ConfigError, match="for a base model in 4 bits"):
        lora.Adapters(plain).add("a", config)
    model = quantized(folder)
    with pytest.raises(ConfigError, match="needs the weights before they were rounded"):
        lora.inject(model, config)
    with pytest.raises(AdapterError, match="original weight has shape"):
        lora.inject(model, config, lambda name: torch.zeros(3, 3))
    from tiny import PROMPT, tone_rows, write_rows

    data = {"path": str(write_rows(tmp_path / "rows.jsonl", tone_rows())), **PROMPT}
    with pytest.raises(ConfigError, match=r"load_in_4bit") as caught:
        phinetune.finetune(str(folder), data, {}, {"init_lora_weights": "loftq"}, {}, tmp_path / "out")
    assert "peft_config.init_lora_weights" in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loftq_bits": 8}, "loftq_config.loftq_bits: only 4 bits"),
        (
            {"loftq_iter": 2},
            "loftq_config.loftq_iter: only 1 iteration is supported: each further one changes the base",
        ),
        ({"loftq_iters": 1}, 'loftq_config.loftq_iters: unknown key, did you mean "loftq_iter"'),
        ({"loftq_iter": True}, "loftq_config.loftq_iter: only 1"),
        ([4], "loftq_config: must be names and values"),
    ],
)
def test_what_loftq_cannot_do_here_is_refused_by_key(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lora.parse_lora_config({"init_lora_weights": "loftq", "loftq_config": values})
    assert f"peft_config.{message}" in str(caught.value)


def test_the_config_of_peft_is_read_and_needs_its_start() -> None:
    from peft import LoftQConfig

    config = lora.parse_lora_config(
        {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4, loftq_iter=1)}
    )
    assert config.loftq_config == {"loftq_bits": 4, "loftq_iter": 1}
    with pytest.raises(ConfigError, match="loftq_config: needs init_lora_weights"):
        lora.parse_lora_config({"loftq_config": {"loftq_bits": 4}})
    assert lora.parse_lora_config({"init_lora_weights": "loftq", "loftq_config": None}).loftq_config == {}


def test_an_adapter_that_began_with_loftq_trains_resumes_merges_and_is_read_by_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    from phinetune.generation.load import load_adapted
    from phinetune.model.probe import distance, probe_logits
    from test_training import FAST, Kill, adapter_bytes, killed_at
    from tiny import PROMPT, tiny_folder, tone_rows, write_rows

    base = tiny_folder(tmp_path / "base", "llama")
    data = {"path": str(write_rows(tmp_path / "rows.jsonl", tone_rows())), **PROMPT}
    peft = {"r": 4, "target_modules": ALL, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    kwargs = {"load_in_4bit": True, "torch_dtype": "float32"}
    config = {**FAST, "save_steps": 3}
    whole = phinetune.finetune(str(base), data, config, peft, kwargs, tmp_path / "whole")
    with pytest.raises(Kill):
        phinetune.finetune(str(base), data, config, peft, kwargs, tmp_path / "again", on_event=killed_at(5))
    again = phinetune.finetune(str(base), data, config, peft, kwargs, tmp_path / "again")
    assert again.manifest["figures"]["resumed_at_step"] > 0
    assert adapter_bytes(again.folder) == adapter_bytes(whole.folder)

    saved = json.loads((whole.folder / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True and "loftq_config" not in saved and saved["r"] == 4
    assert whole.manifest["quantization"]["quant_type"] == "nf4"
    model, contract = load_adapted(whole.folder, on_event=lambda event: None)
    assert len(quantized_layers(model)) == 14
    adapted = probe_logits(model, contract)
    assert distance(adapted, whole.manifest["probe_logits"]) < 1e-4

    figures, _ = merged(whole.folder, tmp_path / "merged")
    distances = figures["distance_to_trained"]
    assert figures["base"] == "dequantized" and distances["dequantized"] < distances["original"] / 5
    plain = load_model(tmp_path / "merged", LoadPlan(torch.float32, CPU))
    assert (probe_logits(plain, contract) - adapted).abs().max() < 1e-3
    _, notes = merged(whole.folder, tmp_path / "merged-into-the-original", "original")
    assert any("began as what 4 bits took" in note for note in notes)

    theirs = PeftModel.from_pretrained(
        load_model(base, LoadPlan(torch.float32, CPU, quantization=Quantization())), str(whole.folder)
    )
    ids = torch.tensor([list(contract.probes[0].ids)])
    with torch.no_grad():
        assert (theirs.eval()(input_ids=ids).logits[0, -1] - adapted[0]).abs().max() < 1e-3
