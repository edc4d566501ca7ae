"""Adapters as PEFT has them: the same function from the same file, in both directions, on twelve families of models and on plain ones.

What is compared is always an output, never a name: an adapter made on one side, with every trained tensor moved at random, is written,
read on the other side, and must compute the same logits to 1e-5. Then what is built on that: merging, slices of fused layers, several
adapters on one base, and files that are refused as a whole.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import phinetune.lora as lora
from phinetune.errors import AdapterError, ConfigError, PhinetuneError
from zoo import MODELS, Bag, Cnn, Fused, Waves, embedding_of, unfused_phi3, zoo_model

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:Found missing adapter keys"),  # PEFT would go on with random factors
]

IDS = torch.tensor([[1, 7, 42, 100, 5, 120, 33, 7], [9, 8, 127, 2, 2, 64, 11, 90]])
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


# What is compared.


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) / max(1.0, float(other.abs().max()))


def same(one: Tensor, other: Tensor, bar: float = 1e-5) -> None:
    assert torch.isfinite(one).all() and apart(one, other) <= bar, f"apart by {apart(one, other):.2e}"


def moved(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() > 0.05, "the adapter does nothing"


@torch.no_grad()
def shake(parameters: Any, seed: int = 1, std: float = 0.1) -> None:
    """Move every parameter by noise of 0.1, so that nothing is at its start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def trained_tensors(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def made_here(model: nn.Module, seed: int = 1, **values: Any) -> Any:
    """An adapter in `model`, everything in it moved."""
    adapter = lora.inject(model, lora.LoraConfig(**{"r": 4, "lora_alpha": 8, **values}))
    shake(trained_tensors(model), seed)
    model.eval()
    return adapter


def made_by_peft(model: nn.Module, seed: int = 1, **values: Any) -> Any:
    """`model` wrapped by PEFT, everything trained moved."""
    import peft

    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **values})
    )
    shake(trained_tensors(wrapped), seed)
    return wrapped.eval()


def in_peft(model: nn.Module, folder: Path) -> Any:
    """`model` with the adapter in `folder`, read by PEFT, which must find a place for every tensor."""
    import peft
    from peft.utils.save_and_load import get_peft_model_state_dict

    wrapped = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    assert set(tensors(folder)) <= set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    return wrapped


def tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(folder / WEIGHTS))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    from safetensors.torch import save_file

    state = tensors(folder)
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, str(folder / WEIGHTS), metadata={"format": "pt"})


def configured(folder: Path, **values: Any) -> dict[str, Any]:
    """The configuration in `folder`, after changing `values` in it."""
    file = folder / CONFIG
    config = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps(config))
    return config


def saved_scaling(folder: Path, name: str) -> float:
    """alpha over r (or its root) of the layer called `name`, as PEFT reads the file."""
    config = configured(folder)
    r, alpha = config["rank_pattern"].get(name, config["r"]), config["alpha_pattern"].get(name, config["lora_alpha"])
    return float(alpha / math.sqrt(r) if config["use_rslora"] else alpha / r)


# Configurations. The names of their values are the same on both sides.

_ATTENTION = {"phi3": "qkv_proj", "gpt2": "c_attn", "falcon": "query_key_value", "bloom": "query_key_value"}
_DOWN = {"phi": "fc2", "opt": "fc2", "gpt2": "c_proj", "falcon": "dense_4h_to_h", "bloom": "dense_4h_to_h"}


def attention(model: str) -> str:
    return _ATTENTION.get(model, "q_proj")


def down(model: str) -> str:
    return _DOWN.get(model, "down_proj")


def numbered(model: str) -> str:
    return "h" if model in ("gpt2", "falcon", "bloom") else "layers"


BIASED = ["phi", "gpt2", "opt", "bloom", "qwen2"]
FEATURES: dict[str, tuple[list[str], Callable[[str], dict[str, Any]]]] = {
    "plain": (MODELS, lambda m: {"target_modules": "all-linear"}),
    "rslora": (["phi3", "gpt2", "qwen3"], lambda m: {"use_rslora": True}),
    "dora": (["llama", "gpt2", "phi", "bloom", "phi3"], lambda m: {"use_dora": True}),
    "pissa": (["mistral", "gpt2", "phi3", "opt"], lambda m: {"init_lora_weights": "pissa"}),
    "pissa-rslora": (["qwen2", "gpt2"], lambda m: {"init_lora_weights": "pissa", "use_rslora": True}),
    "olora": (["qwen2", "gpt2", "gemma3", "bloom"], lambda m: {"init_lora_weights": "olora"}),
    "gaussian": (["falcon", "gpt2", "llama"], lambda m: {"init_lora_weights": "gaussian"}),
    "random": (["opt", "gpt2", "qwen3"], lambda m: {"init_lora_weights": False}),
    "patterns": (
        ["gemma2", "gpt2", "mistral", "phi3"],
        lambda m: {
            "rank_pattern": {attention(m): 6, rf"{numbered(m)}\.1\..*{down(m)}": 2},
            "alpha_pattern": {down(m): 3, rf".*\.0\..*{attention(m)}": 5},
        },
    ),
    "patterns-rslora": (["gpt2", "falcon", "qwen3"], lambda m: {"rank_pattern": {attention(m): 6}, "use_rslora": True}),
    "head": (["llama", "gpt2", "phi", "gemma3", "bloom"], lambda m: {"modules_to_save": ["lm_head"]}),
    "embedding-kept": (["mistral", "gpt2", "gemma2"], lambda m: {"modules_to_save": [embedding_of(m)]}),
    "bias-all": (BIASED, lambda m: {"bias": "all"}),
    "bias-lora-only": (BIASED, lambda m: {"bias": "lora_only", "target_modules": [attention(m)]}),
    "bias-dora": (["qwen2", "gpt2", "opt"], lambda m: {"bias": "all", "use_dora": True}),
    "one-layer": (
        ["falcon", "gpt2", "phi3", "opt"],
        lambda m: {"target_modules": [attention(m), down(m)], "layers_to_transform": 1},
    ),
    "layers-pattern": (
        ["bloom", "gpt2", "qwen3"],
        lambda m: {
            "target_modules": [attention(m), down(m)],
            "layers_to_transform": [0],
            "layers_pattern": numbered(m),
        },
    ),
    "expression": (
        ["gemma3", "gpt2", "falcon"],
        lambda m: {"target_modules": rf".*\.1\..*({attention(m)}|{down(m)})"},
    ),
    "excluded": (["qwen3", "gpt2", "mistral"], lambda m: {"exclude_modules": [attention(m)]}),
    "excluded-expression": (["opt", "gpt2", "gemma2"], lambda m: {"exclude_modules": rf".*\.0\..*{down(m)}"}),
    "embedding": (
        ["llama", "gpt2", "gemma2", "gemma3", "opt", "bloom", "falcon"],
        lambda m: {"target_modules": [embedding_of(m), attention(m)]},
    ),
    "embedding-dora": (
        ["llama", "gpt2", "gemma3", "bloom"],
        lambda m: {"target_modules": [embedding_of(m), down(m)], "use_dora": True},
    ),
    "everything": (
        ["phi", "gpt2", "qwen2"],
        lambda m: {
            "target_modules": [embedding_of(m), attention(m), down(m)],
            "use_dora": True,
            "use_rslora": True,
            "bias": "lora_only",
            "modules_to_save": ["lm_head"],
            "rank_pattern": {attention(m): 3},
            "alpha_pattern": {down(m): 5},
        },
    ),
}
CASES = [
    pytest.param(m, {"target_modules": "all-linear", **make(m)}, id=f"{feature}-{m}")
    for feature, (models, make) in FEATURES.items()
    for m in models
]
CASES_OF_PEFT = [c for c in CASES if c.id != "olora-gpt2"]
"""PEFT's OLoRA takes GPT-2's weights the wrong way round: its layers cannot compute afterwards."""


# Both directions.


@pytest.mark.parametrize(("name", "values"), CASES)
def test_an_adapter_made_here_computes_the_same_in_peft_and_read_back_here(
    name: str, values: dict[str, Any], tmp_path: Path
) -> None:
    model = zoo_model(name)
    before = logits(model)
    adapter = made_here(model, **values)
    wanted = logits(model)
    moved(wanted, before)
    lora.save_adapter(adapter, tmp_path, "base")
    same(logits(in_peft(zoo_model(name), tmp_path)), wanted)
    again = zoo_model(name)
    lora.load_adapter(again, tmp_path)
    same(logits(again), wanted)


@pytest.mark.parametrize(("name", "values"), CASES_OF_PEFT)
def test_an_adapter_made_by_peft_computes_the_same_here(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    wrapped = made_by_peft(zoo_model(name), **values)
    wanted = logits(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    model = zoo_model(name)
    before = logits(model)
    lora.load_adapter(model, tmp_path)
    same(logits(model), wanted)  # PiSSA and OLoRA changed PEFT's base, not this one
    moved(wanted, before)


@pytest.mark.parametrize(("name", "values"), CASES)
def test_merging_computes_the_same_and_leaves_the_models_own_names_and_types(name: str, values: dict[str, Any]) -> None:
    model, fresh = zoo_model(name), zoo_model(name)
    adapter = made_here(model, **values)
    wanted = logits(model)
    assert sorted(lora.merge(model)) == sorted(adapter.layers)
    same(logits(model), wanted)
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]


@pytest.mark.parametrize("name", MODELS)
def test_merging_an_adapter_of_pefts_equals_the_adapter(name: str, tmp_path: Path) -> None:
    wrapped = made_by_peft(zoo_model(name), target_modules="all-linear", use_dora=name in ("llama", "gpt2"))
    wrapped.save_pretrained(str(tmp_path))
    model = zoo_model(name)
    lora.load_adapter(model, tmp_path)
    lora.merge(model)
    same(logits(model), logits(wrapped))
    assert list(model.state_dict()) == list(zoo_model(name).state_dict())
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in zoo_model(name).named_modules()}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("phi", {"bias": "all", "modules_to_save": ["lm_head"]}),
        ("mistral", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("gpt2", {"target_modules": ["wte", "c_attn"]}),
        ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("gpt2", {"modules_to_save": ["lm_head"]}),
        ("gemma2", {"modules_to_save": ["embed_tokens"]}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)) or "plain",
)
def test_a_merged_model_survives_saving_and_loading(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    """Gemma and GPT-2 tie the head to the embedding: where only one of them was adapted, they no longer are one."""
    model = zoo_model(name)
    made_here(model, **values)
    lora.merge(model)
    wanted = logits(model)
    model.save_pretrained(str(tmp_path))
    same(logits(type(model).from_pretrained(str(tmp_path))), wanted)


@pytest.mark.parametrize("name", ["phi", "gpt2"])
def test_a_model_saves_the_same_adapter_as_the_adapter_itself(name: str, tmp_path: Path) -> None:
    model = zoo_model(name)
    adapter = made_here(
        model, bias="all", use_dora=True, modules_to_save=["ln_f" if name == "gpt2" else "final_layernorm"]
    )
    lora.save_adapter(adapter, tmp_path / "adapter")
    lora.save_adapter(model, tmp_path / "model")
    one, other = tensors(tmp_path / "adapter"), tensors(tmp_path / "model")
    assert set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)
    same(logits(in_peft(zoo_model(name), tmp_path / "model")), logits(model))


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_an_adapter_saved_from_a_frozen_model_keeps_its_biases(name: str, tmp_path: Path) -> None:
    model = zoo_model(name)
    adapter = made_here(model, bias="all")
    model.requires_grad_(False)  # as before evaluation
    lora.save_adapter(adapter, tmp_path)
    same(logits(in_peft(zoo_model(name), tmp_path)), logits(model))


@pytest.mark.parametrize(("name", "how"), [("llama", "pissa"), ("gpt2", "pissa"), ("llama", "olora")])
def test_pefts_own_conversion_of_adapters_that_changed_their_base_is_read(name: str, how: str, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=how, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(zoo_model(name), config)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(str(tmp_path / "start"))
    wrapped.peft_config["default"].init_lora_weights = how
    shake(trained_tensors(wrapped))
    wanted = logits(wrapped)
    wrapped.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = zoo_model(name)
    lora.load_adapter(model, tmp_path / "plain")
    same(logits(model), wanted)


def test_pefts_olora_of_a_transposed_weight_is_right_or_refused(tmp_path: Path) -> None:
    """Where such a weight is square PEFT does compute something, along the rows of what it should take by columns."""
    wrapped = made_by_peft(zoo_model("gpt2"), target_modules=["attn.c_proj"], init_lora_weights="olora")
    wrapped.save_pretrained(str(tmp_path))
    model = zoo_model("gpt2")
    try:
        lora.load_adapter(model, tmp_path)
    except AdapterError:
        return
    same(logits(model), logits(wrapped))


def test_pissa_by_rounds_is_saved_plain_and_never_guessed_from_a_file(tmp_path: Path) -> None:
    model = zoo_model("llama")
    adapter = made_here(model, init_lora_weights="pissa_niter_4")
    lora.save_adapter(adapter, tmp_path / "here")
    same(logits(in_peft(zoo_model("llama"), tmp_path / "here")), logits(model))
    made_by_peft(zoo_model("llama"), target_modules="all-linear", init_lora_weights="pissa_niter_4").save_pretrained(
        str(tmp_path / "peft")
    )
    with pytest.raises(AdapterError, match="pissa_niter_4"):
        lora.load_adapter(zoo_model("llama"), tmp_path / "peft")


def test_more_layers_than_peft_lists_one_by_one(tmp_path: Path) -> None:
    """Beyond twenty names PEFT shortens the list of target modules."""
    model = zoo_model("llama", num_hidden_layers=4)
    adapter = made_here(model, exclude_modules=["model.layers.2.mlp.up_proj"], rank_pattern={r"layers\.3\..*q_proj": 2})
    lora.save_adapter(adapter, tmp_path)
    assert len(adapter.layers) == 27
    same(logits(in_peft(zoo_model("llama", num_hidden_layers=4), tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
def test_the_output_head_as_a_target(name: str, tmp_path: Path) -> None:
    values = {"target_modules": [attention(name), "lm_head"]}
    model = zoo_model(name)
    adapter = made_here(model, **values)
    lora.save_adapter(adapter, tmp_path / "here")
    same(logits(in_peft(zoo_model(name), tmp_path / "here")), logits(model))
    wrapped = made_by_peft(zoo_model(name), **values)
    wrapped.save_pretrained(str(tmp_path / "peft"))
    again = zoo_model(name)
    lora.load_adapter(again, tmp_path / "peft")
    same(logits(again), logits(wrapped))


def test_all_biases_and_a_kept_head_with_a_bias_together(tmp_path: Path) -> None:
    values = {"target_modules": "all-linear", "bias": "all", "modules_to_save": ["lm_head"]}
    model = zoo_model("phi")
    adapter = made_here(model, **values)
    lora.save_adapter(adapter, tmp_path / "here")
    import peft

    same(logits(peft.PeftModel.from_pretrained(zoo_model("phi"), str(tmp_path / "here"))), logits(model))
    wrapped = made_by_peft(zoo_model("phi"), **values)
    wrapped.save_pretrained(str(tmp_path / "peft"))
    again = zoo_model("phi")
    lora.load_adapter(again, tmp_path / "peft")
    same(logits(again), logits(wrapped))


def test_modules_to_save_mean_the_modules_that_peft_means(tmp_path: Path) -> None:
    """PEFT takes every name that ends so, also in the middle of a word: "norm" is each `input_layernorm` (LongLoRA's adapters)."""
    wrapped = made_by_peft(zoo_model("llama"), target_modules=["q_proj"], modules_to_save=["norm"])
    wrapped.save_pretrained(str(tmp_path))
    model = zoo_model("llama")
    lora.load_adapter(model, tmp_path)
    same(logits(model), logits(wrapped))


def test_an_adapter_of_pefts_whose_rank_is_larger_than_a_layer(tmp_path: Path) -> None:
    """Nothing forbids it: k_proj of Qwen2-0.5B has 128 rows, and adapters of rank 256 exist."""
    wrapped = made_by_peft(zoo_model("llama"), r=24, target_modules=["q_proj", "k_proj"])  # k_proj has 16 rows
    wrapped.save_pretrained(str(tmp_path))
    model = zoo_model("llama")
    lora.load_adapter(model, tmp_path)
    same(logits(model), logits(wrapped))


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_an_adapter_whose_plain_form_has_a_rank_above_the_layers_is_read_back(how: str, tmp_path: Path) -> None:
    model = zoo_model("llama")
    adapter = made_here(model, r=16, init_lora_weights=how)  # written with rank 32; k_proj has 16 rows
    lora.save_adapter(adapter, tmp_path)
    same(logits(in_peft(zoo_model("llama"), tmp_path)), logits(model))
    again = zoo_model("llama")
    lora.load_adapter(again, tmp_path)
    same(logits(again), logits(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_factors_stored_in_half_the_precision_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    made_by_peft(zoo_model(name), target_modules=[attention(name), embedding_of(name)]).save_pretrained(str(tmp_path))
    rewrite(tmp_path, lambda s: s.update({k: v.bfloat16() for k, v in s.items() if "lora_" in k}))
    model = zoo_model(name)
    adapter = lora.load_adapter(model, tmp_path)
    assert {layer.lora_A.dtype for layer in adapter.layers.values()} == {torch.float32}
    import peft

    same(logits(model), logits(peft.PeftModel.from_pretrained(zoo_model(name), str(tmp_path))))


# How factors start, how they learn, and which layers are meant.


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
@pytest.mark.parametrize("how", [True, "gaussian", "pissa", "pissa_niter_8", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_computes_what_the_base_does(name: str, how: Any, dora: bool) -> None:
    model = zoo_model(name)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    values = {"init_lora_weights": how, "use_dora": dora, "target_modules": "all-linear"}
    lora.inject(model, lora.LoraConfig(r=4, lora_alpha=8, **values))
    same(logits(model), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items() if k in weights)


@pytest.mark.parametrize("values", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
@pytest.mark.parametrize(("name", "how"), [("llama", "pissa"), ("gpt2", "pissa"), ("llama", "olora")])
def test_factors_along_the_weight_start_where_pefts_do(name: str, how: str, values: dict[str, Any]) -> None:
    import peft

    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": how, **values}
    wrapped = peft.get_peft_model(zoo_model(name), peft.LoraConfig(task_type="CAUSAL_LM", **values))
    model = zoo_model(name)
    for layer_name, layer in lora.inject(model, lora.LoraConfig(**values)).layers.items():
        theirs = wrapped.base_model.model.get_submodule(layer_name)
        A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, B @ A, rtol=0, atol=1e-5)
        assert layer.scaling == pytest.approx(theirs.scaling["default"])


LEARNING: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": "all-linear"}),
    "transposed": ("gpt2", {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("phi3", {"target_modules": "all-linear", "use_dora": True}),
    "transposed-dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "biases": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "biases-of-layers": ("opt", {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"}),
    "head": ("mistral", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("qwen3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "scaled-embedding": ("gemma2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-dora": ("bloom", {"target_modules": ["word_embeddings", "dense"], "use_dora": True}),
}


@pytest.mark.parametrize("case", LEARNING)
def test_a_loaded_adapter_goes_on_learning_as_pefts_does(case: str, tmp_path: Path) -> None:
    """Three steps of plain gradient descent on both sides: every trained tensor ends where PEFT's does."""
    name, values = LEARNING[case]
    wrapped, model = made_by_peft(zoo_model(name), **values), zoo_model(name)
    wrapped.save_pretrained(str(tmp_path / "start"))
    adapter = lora.load_adapter(model, tmp_path / "start")
    start = tensors(tmp_path / "start")
    for learner in (wrapped, model):
        learner.train()
        optimizer = torch.optim.SGD(trained_tensors(learner), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            learner(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    wrapped.save_pretrained(str(tmp_path / "peft"))
    lora.save_adapter(adapter, tmp_path / "here")
    theirs, ours = tensors(tmp_path / "peft"), tensors(tmp_path / "here")
    assert set(ours) == {k for k in theirs if not k.endswith("base_layer.weight")}
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-5, msg=key)
    assert sum(not torch.equal(ours[k], start[k]) for k in ours) >= 0.9 * len(
        ours
    )  # OPT's k_proj has a bias without effect


def some(pool: list[Any]) -> Any:
    return st.lists(st.sampled_from(pool), min_size=1, max_size=3, unique=True)


ENDINGS = [
    "q_proj",
    "k_proj",
    "mlp.up_proj",
    "self_attn.o_proj",
    "layers.1.mlp.down_proj",
    "lm_head",
    "embed_tokens",
    "proj",
]
EXPRESSIONS = [
    r".*_proj",
    r".*\.0\..*_proj",
    r"model\.layers\.\d+\.mlp\.(up|down)_proj",
    r"lm_head",
    r".*(q|embed)_.*",
    "q_proj",
]
PATTERNS = ["q_proj", r".*\.1\..*", r"layers\.0\.mlp\..*", "down_proj", "embed_tokens", "o_proj", r"self_attn\.\w_proj"]


@settings(max_examples=60, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(
    targets=st.one_of(st.just("all-linear"), st.sampled_from(EXPRESSIONS), some(ENDINGS)),
    excluded=st.one_of(st.none(), st.sampled_from(EXPRESSIONS), some(ENDINGS)),
    layers=st.sampled_from([None, None, 0, [1], [0, 1]]),
    pattern=st.sampled_from([None, "layers", ["h", "layers"]]),
    ranks=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 8), max_size=3),
    alphas=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 8), max_size=3),
    kept=st.sampled_from([None, None, ["lm_head"], ["mlp"], ["layers.0.self_attn", "lm_head"]]),
    root=st.booleans(),
)
def test_a_configuration_means_the_layers_ranks_and_scalings_that_peft_gives_them(
    targets: Any, excluded: Any, layers: Any, pattern: Any, ranks: Any, alphas: Any, kept: Any, root: bool
) -> None:
    import peft
    from peft.tuners.lora.layer import LoraLayer

    layers = None if isinstance(targets, str) else layers
    values: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": pattern if layers is not None else None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": kept,
        "use_rslora": root,
    }
    try:
        found = lora.find_targets(zoo_model("llama"), lora.LoraConfig(**values))
    except AdapterError as error:  # PEFT says nothing of patterns that are never used, and refuses the rest as well
        unused = {p for p in {**ranks, **alphas} if f'_pattern: "{p}" matches no' in str(error)}
        if not unused:
            assert "match" in str(error) or "leaves no layer" in str(error) or kept
            return
        values["rank_pattern"] = {p: v for p, v in ranks.items() if p not in unused}
        values["alpha_pattern"] = {p: v for p, v in alphas.items() if p not in unused}
        found = lora.find_targets(zoo_model("llama"), lora.LoraConfig(**values))
    values |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    wrapped = peft.get_peft_model(zoo_model("llama"), peft.LoraConfig(**copy.deepcopy(values)))
    theirs = {
        n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for n, m in wrapped.named_modules()
        if isinstance(m, LoraLayer)
    }
    assert {t.name: (t.r, pytest.approx(t.scaling)) for t in found} == theirs


# Models that are no language models: convolutions, embeddings, names that are endings of others.

PICTURES, SIGNALS = (2, 3, 8, 8), (2, 4, 12)
PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "cnn": (Cnn, lambda: torch.randn(PICTURES), {"target_modules": ["first", "second", "head"], "r": 2}),
    "cnn-dora": (Cnn, lambda: torch.randn(PICTURES), {"target_modules": ["first", "second"], "r": 2, "use_dora": True}),
    "cnn-kept": (
        Cnn,
        lambda: torch.randn(PICTURES),
        {"target_modules": ["first", "second"], "modules_to_save": ["head", "norm"], "bias": "all"},
    ),
    "cnn-biases": (Cnn, lambda: torch.randn(PICTURES), {"target_modules": ["first", "head"], "bias": "lora_only"}),
    "waves": (Waves, lambda: torch.randn(SIGNALS), {"target_modules": ["line", "volume", "head"], "r": 3}),
    "waves-dora": (Waves, lambda: torch.randn(SIGNALS), {"target_modules": ["line", "volume"], "use_dora": True}),
    "waves-patterns": (
        Waves,
        lambda: torch.randn(SIGNALS),
        {
            "target_modules": ["line", "volume"],
            "rank_pattern": {"line": 2},
            "alpha_pattern": {"volume": 3},
            "use_rslora": True,
        },
    ),
    "bag": (Bag, lambda: torch.arange(20).view(2, 10), {"target_modules": ["emb", "head"], "r": 3}),
    "bag-dora": (
        Bag,
        lambda: torch.arange(20).view(2, 10),
        {"target_modules": ["emb", "head"], "r": 3, "use_dora": True},
    ),
    "fused": (Fused, lambda: torch.randn(3, 10), {"target_modules": ["wqkv", "out"], "use_dora": True}),
}


def plain(make: Callable[[], nn.Module], seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return make().eval()


def inputs(make: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(7)
    return make()


@pytest.mark.parametrize("case", PLAIN)
def test_an_adapter_for_a_plain_model_made_here(case: str, tmp_path: Path) -> None:
    make, some, values = PLAIN[case]
    model, x = plain(make), inputs(some)
    before = model(x)
    adapter = made_here(model, task_type=None, **values)
    wanted = model(x)
    moved(wanted, before)
    lora.save_adapter(adapter, tmp_path)
    same(in_peft(plain(make), tmp_path)(x), wanted)
    again = plain(make)
    lora.load_adapter(again, tmp_path)
    same(again(x), wanted)
    lora.merge(again)
    same(again(x), wanted)
    assert list(again.state_dict()) == list(plain(make).state_dict())
    assert [type(m) for m in again.modules()] == [type(m) for m in plain(make).modules()]


@pytest.mark.parametrize("case", PLAIN)
def test_an_adapter_for_a_plain_model_made_by_peft(case: str, tmp_path: Path) -> None:
    make, some, values = PLAIN[case]
    x = inputs(some)
    wrapped = made_by_peft(plain(make), **{"task_type": None, **values})
    wrapped.save_pretrained(str(tmp_path))
    model = plain(make)
    before = model(x)
    lora.load_adapter(model, tmp_path)
    same(model(x), wrapped(x))
    moved(model(x), before)


class Residual(nn.Module):
    """Names as torchvision's ResNets have them: `conv1` of the model and `conv1` of every block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(*(nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3, padding=1)}) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.conv1(x))
        for block in self.layer1:
            y = torch.tanh(block["conv1"](y)) + y
        return y


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": "conv1"},
        {"target_modules": ["conv1"], "exclude_modules": ["layer1.0.conv1"]},
        {"target_modules": ["conv1"], "rank_pattern": {r"layer1\.\d\.conv1": 4}},
        {"target_modules": ["conv1"], "r": 4, "rank_pattern": {r"^conv1": 2}},
        {"target_modules": ["conv1"], "alpha_pattern": {r"^conv1": 3}},
    ],
    ids=["expression", "exclusion", "inner-rank", "outer-rank", "outer-alpha"],
)
def test_a_name_that_is_the_ending_of_another_stays_that_layers_own(values: dict[str, Any], tmp_path: Path) -> None:
    model, x = plain(Residual), torch.randn(2, 3, 5, 5)
    adapter = made_here(model, **{"r": 2, "task_type": None, **values})
    lora.save_adapter(adapter, tmp_path)
    again = plain(Residual)
    assert list(lora.load_adapter(again, tmp_path).layers) == list(adapter.layers)
    same(again(x), model(x))
    import peft

    same(peft.PeftModel.from_pretrained(plain(Residual), str(tmp_path)).eval()(x), model(x))


# Layers built by hand, with loralib's interface.


class Hand(nn.Module):
    """One layer of each kind. x (N, 12) of token ids below 10 -> (N, 5); `plain`: torch's own layers of the same shapes."""

    def __init__(self, plain: bool, rank: int = 2) -> None:
        super().__init__()
        low: dict[str, Any] = {} if plain else {"r": rank, "lora_alpha": 3}
        kind: Any = nn if plain else lora
        enabled: dict[str, Any] = {} if plain else {"enable_lora": [True, False, True]}
        self.emb = kind.Embedding(10, 8, **low)
        self.picture = kind.Conv2d(4, 6, 3, padding=1, stride=(1, 2), **low)
        self.line = kind.Conv1d(6, 4, 3, padding=1, **low)
        self.qkv = (nn if plain else lora).Linear(48, 18) if plain else lora.MergedLinear(48, 18, **low, **enabled)
        self.hidden = kind.Linear(18, 7, **low)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.emb(x)).view(-1, 4, 6, 4)
        y = torch.tanh(self.picture(y)).flatten(2)
        y = torch.tanh(self.line(y)).flatten(1)
        return self.head(torch.tanh(self.hidden(torch.tanh(self.qkv(y)))))


def twin(hand: nn.Module) -> nn.Module:
    """Torch's own layers with the frozen weights of `hand`."""
    state = {k.replace(".conv.", "."): v for k, v in hand.state_dict().items() if "lora_" not in k}
    result = Hand(plain=True)
    result.load_state_dict(state)
    return result.eval()


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("merged", [False, True])
def test_layers_built_by_hand_are_read_by_peft(bias: str, merged: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    hand, x = Hand(plain=False), torch.arange(48).remainder(10).view(2, 24)
    base = twin(hand)
    lora.mark_only_lora_as_trainable(hand, bias)  # type: ignore[arg-type]
    shake(trained_tensors(hand))
    wanted = hand.train()(x)
    moved(wanted, base(x))
    hand.train(not merged)  # eval() folds the factors into the weights
    same(hand(x), wanted)
    lora.save_adapter(hand, tmp_path)
    same(in_peft(copy.deepcopy(base), tmp_path)(x), wanted)
    again = copy.deepcopy(base)
    lora.load_adapter(again, tmp_path)
    same(again(x), wanted)


def test_a_head_that_is_trained_beside_layers_built_by_hand_is_saved_whole(tmp_path: Path) -> None:
    torch.manual_seed(3)
    hand, x = Hand(plain=False), torch.arange(48).remainder(10).view(2, 24)
    base = twin(hand)
    lora.mark_only_lora_as_trainable(hand)
    hand.head.requires_grad_(True)
    shake(trained_tensors(hand))
    wanted = hand.eval()(x)
    lora.save_adapter(hand, tmp_path)
    assert configured(tmp_path)["modules_to_save"] == ["head"]
    same(in_peft(copy.deepcopy(base), tmp_path)(x), wanted)


# Slices of fused layers.


def train(model: Any, steps: int = 4) -> None:
    """A few steps of AdamW on random tokens."""
    torch.manual_seed(11)
    optimizer = torch.optim.AdamW(trained_tensors(model), lr=3e-2)
    model.train()
    for _ in range(steps):
        ids = torch.randint(0, 128, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


PHI3_ROWS = {"q_proj": slice(0, 32), "k_proj": slice(32, 48), "v_proj": slice(48, 64)}
PHI3_GATES = {"gate_proj": slice(0, 48), "up_proj": slice(48, 96)}
GPT2_ROWS = {"q_proj": slice(0, 32), "k_proj": slice(32, 64), "v_proj": slice(64, 96)}


@pytest.mark.parametrize("root", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("phi3", ["q_proj", "v_proj"]),
        ("phi3", ["up_proj"]),
        ("phi3", ["k_proj", "gate_proj", "o_proj"]),
        ("gpt2", ["q_proj", "v_proj"]),
        ("gpt2", ["k_proj", "c_fc"]),
    ],
)
def test_training_slices_changes_their_rows_alone(name: str, targets: list[str], root: bool, tmp_path: Path) -> None:
    model, fresh = zoo_model(name), zoo_model(name)
    adapter = lora.inject(model, lora.LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=root))
    train(model)
    wanted = logits(model)
    moved(wanted, logits(fresh))
    lora.save_adapter(adapter, tmp_path)
    same(logits(in_peft(zoo_model(name), tmp_path)), wanted)
    again = zoo_model(name)
    lora.load_adapter(again, tmp_path)
    same(logits(again), wanted)
    for layer in adapter.layers:
        assert saved_scaling(tmp_path, layer) == pytest.approx(8 / math.sqrt(4) if root else 8 / 4, rel=1e-8)
    lora.merge(model)
    same(logits(model), wanted)
    after, before = model.state_dict(), fresh.state_dict()
    for layer in adapter.layers:
        key, last = f"{layer}.weight", layer.rpartition(".")[2]
        new, old = (after[key].t(), before[key].t()) if name == "gpt2" else (after[key], before[key])
        slices = {"qkv_proj": PHI3_ROWS, "gate_up_proj": PHI3_GATES, "c_attn": GPT2_ROWS}.get(last, {})
        for part, rows in slices.items():
            changed = bool((new[rows] != old[rows]).any(dim=1).all())
            assert changed if part in targets else torch.equal(new[rows], old[rows]), (key, part)
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed == {f"{layer}.weight" for layer in adapter.layers}


@pytest.mark.parametrize("targets", [["wq", "wv"], ["wk"], ["wq", "wk", "wv", "out"]])
def test_slices_named_in_the_configuration(targets: list[str], tmp_path: Path) -> None:
    widths = {"wqkv": {"wq": 8, "wk": 4, "wv": 4}}
    model, fresh, x = plain(Fused), plain(Fused), torch.randn(16, 10)
    config = lora.LoraConfig(r=2, lora_alpha=4, target_modules=targets, fused_modules=widths, task_type=None)
    adapter = lora.inject(model, config)
    optimizer = torch.optim.AdamW(trained_tensors(model), lr=3e-2)
    for _ in range(4):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = model(x)
    moved(wanted, fresh(x))
    lora.save_adapter(adapter, tmp_path)
    assert saved_scaling(tmp_path, "wqkv") == pytest.approx(2)
    same(in_peft(plain(Fused), tmp_path)(x), wanted)
    again = plain(Fused)
    lora.load_adapter(again, tmp_path)
    same(again(x), wanted)
    lora.merge(model)
    new, old = model.wqkv.weight, fresh.wqkv.weight
    for part, rows in {"wq": slice(0, 8), "wk": slice(8, 12), "wv": slice(12, 16)}.items():
        assert torch.equal(new[rows], old[rows]) == (part not in targets)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(3, 9), min_size=2, max_size=5),
    picks=st.lists(st.booleans(), min_size=5, max_size=5),
    r=st.integers(1, 3),
    root=st.booleans(),
    bias=st.booleans(),
)
def test_slices_of_any_widths_mean_the_same_in_peft(
    widths: list[int], picks: list[bool], r: int, root: bool, bias: bool
) -> None:
    names = [f"part{i}" for i in range(len(widths))]
    targets = [n for n, on in zip(names, picks, strict=False) if on]
    assume(targets)

    def build() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Linear(12, 16), nn.Tanh(), nn.ModuleDict({"fused": nn.Linear(16, sum(widths), bias=bias)})["fused"]
        )

    model, x = build(), torch.randn(4, 12)
    fused = {"2": dict(zip(names, widths, strict=True))}
    values = {"target_modules": ["0", *targets], "fused_modules": fused, "r": r, "use_rslora": root, "task_type": None}
    adapter = made_here(model, **values)
    with TemporaryDirectory() as folder:
        lora.save_adapter(adapter, folder)
        same(in_peft(build(), Path(folder))(x), model(x))
        again = build()
        lora.load_adapter(again, folder)
        same(again(x), model(x))


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "use_rslora": True},
        {
            "target_modules": ["k_proj", "gate_proj", "o_proj"],
            "rank_pattern": {"k_proj": 6},
            "alpha_pattern": {"o_proj": 3},
        },
    ],
    ids=["slices", "whole", "excluded", "patterns"],
)
def test_a_split_adapter_fits_the_model_with_the_projections_apart(values: dict[str, Any], tmp_path: Path) -> None:
    model = zoo_model("phi3")
    adapter = made_here(model, **values)
    wanted = logits(model)
    lora.save_adapter(adapter, tmp_path, split=True)
    assert not any(n.rpartition(".")[2] in ("qkv_proj", "gate_up_proj") for n in configured(tmp_path)["target_modules"])
    apart_model = unfused_phi3(zoo_model("phi3"))
    same(logits(apart_model), logits(zoo_model("phi3")))
    same(logits(in_peft(copy.deepcopy(apart_model), tmp_path)), wanted)
    lora.load_adapter(apart_model, tmp_path)
    same(logits(apart_model), wanted)
    fused = zoo_model("phi3")
    lora.load_adapter(fused, tmp_path)
    same(logits(fused), wanted)


def test_an_adapter_of_pefts_for_projections_apart_fits_the_fused_model(tmp_path: Path) -> None:
    wrapped = made_by_peft(unfused_phi3(zoo_model("phi3")), target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    wrapped.save_pretrained(str(tmp_path))
    model = zoo_model("phi3")
    lora.load_adapter(model, tmp_path)
    same(logits(model), logits(wrapped))


@pytest.mark.parametrize("values", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_a_split_adapter_of_whole_fused_layers_is_right_or_refused(values: dict[str, Any], tmp_path: Path) -> None:
    model = zoo_model("phi3")
    adapter = made_here(model, **values)
    try:
        lora.save_adapter(adapter, tmp_path, split=True)
    except AdapterError:
        return
    same(logits(in_peft(unfused_phi3(zoo_model("phi3")), tmp_path)), logits(model))


def test_a_split_adapter_with_trained_biases_comes_back(tmp_path: Path) -> None:
    model = zoo_model("gpt2")
    adapter = made_here(model, target_modules=["q_proj", "v_proj"], bias="all")
    lora.save_adapter(adapter, tmp_path, split=True)
    again = zoo_model("gpt2")
    lora.load_adapter(again, tmp_path)
    same(logits(again), logits(model))


def test_slices_refuse_what_has_no_form_for_them() -> None:
    for values, message in (
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"rank_pattern": {"q_proj": 3}}, "different sizes"),
        ({"r": 20}, r"r=20"),
    ):
        model = zoo_model("phi3")
        with pytest.raises(AdapterError, match=message) as caught:
            lora.inject(model, lora.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **values}))
        assert "model.layers.0.self_attn.qkv_proj" in str(caught.value)
        untouched(model, zoo_model("phi3"))
    with pytest.raises(AdapterError, match=r"fused_modules\.wqkv: .* 15.*16"):
        lora.inject(
            plain(Fused),
            lora.LoraConfig(r=2, target_modules=["wq"], fused_modules={"wqkv": {"wq": 8, "wk": 4, "wv": 3}}),
        )


# Several adapters on one base.


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """Adapters of PEFT's for one llama, and the logits of each alone."""
    made: dict[str, dict[str, Any]] = {
        "wide": {"r": 6, "target_modules": "all-linear"},
        "narrow": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
        "dora": {"target_modules": ["o_proj", "down_proj"], "use_dora": True},
        "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
        "tokens": {"r": 3, "target_modules": ["embed_tokens", "up_proj"]},
    }
    folders, wanted = {}, {}
    for i, (name, values) in enumerate(made.items()):
        wrapped = made_by_peft(zoo_model("llama"), seed=20 + i, **values)
        folders[name] = tmp_path_factory.mktemp(name)
        wanted[name] = logits(wrapped)
        wrapped.save_pretrained(str(folders[name]))
    return folders, wanted


def test_switching_gives_each_adapter_alone_and_the_base_between(shelf: Any) -> None:
    folders, wanted = shelf
    model = zoo_model("llama")
    base, parts = logits(model), dict(model.named_modules())
    weights = {n: p.data_ptr() for n, p in model.named_parameters()}
    adapters = lora.Adapters(model)
    for name, folder in folders.items():
        adapters.load(name, folder)
        assert torch.equal(logits(model), base)  # loaded, not in use
    assert adapters.names == list(folders) and adapters.active is None
    for name in [*folders, *reversed(folders), "wide", "head", "dora"]:
        adapters.use(name)
        assert adapters.active == name
        same(logits(model), wanted[name])
        moved(logits(model), base)
        now = {n: p.data_ptr() for n, p in model.named_parameters()}
        kept = adapters[name].modules
        assert all(now[n] == at for n, at in weights.items() if not any(n.startswith(f"{k}.") for k in kept))
        with adapters.disabled() as plain_model:
            assert plain_model is model and torch.equal(logits(model), base)
            assert dict(model.named_modules()) == parts
        same(logits(model), wanted[name])
    adapters.use(None)
    assert torch.equal(logits(model), base) and dict(model.named_modules()) == parts
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == weights


def test_the_adapter_is_in_again_after_an_error(shelf: Any) -> None:
    folders, wanted = shelf
    model = zoo_model("llama")
    base, adapters = logits(model), lora.Adapters(model)
    adapters.load("head", folders["head"])
    adapters.use("head")
    with pytest.raises(RuntimeError, match="inside"), adapters.disabled():
        assert torch.equal(logits(model), base)
        raise RuntimeError("inside")
    assert adapters.active == "head"
    same(logits(model), wanted["head"])


def test_deleting_takes_an_adapter_out_and_frees_its_name(shelf: Any) -> None:
    folders, wanted = shelf
    model = zoo_model("llama")
    base, adapters = logits(model), lora.Adapters(model)
    adapters.load("one", folders["wide"])
    adapters.load("other", folders["narrow"])
    adapters.use("one")
    adapters.delete("other")
    same(logits(model), wanted["wide"])
    adapters.delete("one")
    assert adapters.active is None and adapters.names == [] and torch.equal(logits(model), base)
    adapters.load("one", folders["narrow"])
    adapters.use("one")
    same(logits(model), wanted["narrow"])


def test_trained_biases_switch_too(tmp_path: Path) -> None:
    wanted = {}
    for i, bias in enumerate(("all", "lora_only", "none")):
        wrapped = made_by_peft(zoo_model("opt"), seed=i, target_modules=["q_proj", "fc1"], bias=bias)
        wrapped.save_pretrained(str(tmp_path / bias))
        wanted[bias] = logits(wrapped)
    model = zoo_model("opt")
    base, adapters = logits(model), lora.Adapters(model)
    for bias in wanted:
        adapters.load(bias, tmp_path / bias)
    for bias in [*wanted, *wanted]:
        adapters.use(bias)
        same(logits(model), wanted[bias])
        with adapters.disabled():
            assert torch.equal(logits(model), base)


def test_a_fresh_adapter_is_trained_without_touching_the_base_or_the_others(shelf: Any, tmp_path: Path) -> None:
    folders, wanted = shelf
    model = zoo_model("llama")
    before, adapters = copy.deepcopy(model.state_dict()), lora.Adapters(model)
    adapters.load("wide", folders["wide"])
    adapters.add("new", lora.LoraConfig(r=2, target_modules=["q_proj"]))
    adapters.use("new")
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n] == []
    train(model)
    result = logits(model)
    adapters.save("new", tmp_path)
    adapters.use("wide")
    same(logits(model), wanted["wide"])
    adapters.use(None)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    same(logits(in_peft(zoo_model("llama"), tmp_path)), result)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4), (-1.3, 0.0)])
@pytest.mark.parametrize("names", [("wide", "narrow"), ("narrow", "tokens")], ids="-".join)
def test_a_linear_combination_is_what_peft_calls_cat(
    shelf: Any, names: tuple[str, str], weights: tuple[float, float]
) -> None:
    model = combined(shelf, names, weights, "linear", None)
    same(logits(model), logits(combined_by_peft(shelf, names, weights, "cat", None)), 1e-4)


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_a_combination_by_svd_is_pefts(shelf: Any, weights: tuple[float, float], rank: int | None) -> None:
    for names in (("wide", "narrow"), ("narrow", "tokens")):
        model = combined(shelf, names, weights, "svd", rank)
        same(logits(model), logits(combined_by_peft(shelf, names, weights, "svd", rank)), 1e-4)


def combined(shelf: Any, names: tuple[str, str], weights: tuple[float, float], method: Any, rank: int | None) -> Any:
    model = zoo_model("llama")
    adapters = lora.Adapters(model)
    for name in names:
        adapters.load(name, shelf[0][name])
    adapters.combine("both", dict(zip(names, weights, strict=True)), method, rank)
    assert adapters.names == [*names, "both"] and adapters.active is None
    adapters.use("both")
    return model


def combined_by_peft(
    shelf: Any, names: tuple[str, str], weights: tuple[float, float], method: str, rank: int | None
) -> Any:
    import peft

    wrapped = peft.PeftModel.from_pretrained(zoo_model("llama"), str(shelf[0][names[0]]), adapter_name=names[0])
    wrapped.load_adapter(str(shelf[0][names[1]]), adapter_name=names[1])
    wrapped.add_weighted_adapter(list(names), list(weights), "both", combination_type=method, svd_rank=rank)
    wrapped.set_adapter("both")
    return wrapped


@pytest.mark.parametrize("method", ["linear", "svd"])
def test_a_combination_with_one_weight_is_that_adapter_and_can_be_saved(
    shelf: Any, method: Any, tmp_path: Path
) -> None:
    folders, wanted = shelf
    model = zoo_model("llama")
    adapters = lora.Adapters(model)
    adapters.load("wide", folders["wide"])
    adapters.combine("again", {"wide": 1.0}, method)
    adapters.use("again")
    same(logits(model), wanted["wide"])
    adapters.save("again", tmp_path)
    same(logits(in_peft(zoo_model("llama"), tmp_path)), wanted["wide"])


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_combining_slices_transposed_weights_and_changed_starts(name: str) -> None:
    """The sum of the changes, against the changes of each merged alone."""
    kinds: dict[str, dict[str, Any]] = {
        "slices": {"target_modules": ["q_proj", "v_proj"]},
        "start": {"target_modules": "all-linear", "init_lora_weights": "pissa", "r": 3},
        "roots": {"target_modules": [attention(name), down(name)], "use_rslora": True},
    }
    weights = {"slices": 0.5, "start": -0.7, "roots": 1.1}
    base = zoo_model(name).state_dict()
    wanted = {k: v.double() for k, v in base.items()}
    model = zoo_model(name)
    adapters = lora.Adapters(model)
    for i, (kind, values) in enumerate(kinds.items()):
        adapter = adapters.add(kind, lora.LoraConfig(**{"r": 4, "lora_alpha": 8, **values}))
        shake([p for layer in adapter.layers.values() for n, p in layer.named_parameters() if "lora_" in n], i)
        adapters.use(kind)
        alone = copy.deepcopy(model)
        lora.merge(alone)
        for key, value in alone.state_dict().items():
            wanted[key] = wanted[key] + weights[kind] * (value.double() - base[key].double())
    adapters.combine("all", weights)
    adapters.use("all")
    lora.merge(model)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[key].float(), rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize("method", ["linear", "svd"])
def test_combining_convolutions_whose_ranks_add_up_to_more_than_the_layer(method: Any, tmp_path: Path) -> None:
    import peft

    base, x, weights = plain(Cnn), inputs(lambda: torch.randn(PICTURES)), {"one": 0.8, "other": -0.5}
    for i, name in enumerate(weights):
        values: dict[str, Any] = {"r": 4, "target_modules": ["first", "second"], "task_type": None}
        made_by_peft(plain(Cnn), seed=i, **values).save_pretrained(str(tmp_path / name))
    adapters = lora.Adapters(base)
    for name in weights:
        adapters.load(name, tmp_path / name)
    adapters.combine(
        "both", weights, method, 4 if method == "svd" else None
    )  # 4 + 4 is above the 6 channels of the first
    adapters.use("both")
    wrapped = peft.PeftModel.from_pretrained(plain(Cnn), str(tmp_path / "one"), adapter_name="one")
    wrapped.load_adapter(str(tmp_path / "other"), adapter_name="other")
    wrapped.add_weighted_adapter(
        [*weights], [*weights.values()], "both", combination_type="svd", svd_rank=4 if method == "svd" else 6
    )
    wrapped.set_adapter("both")
    with torch.no_grad():
        expected = wrapped.eval()(x) if method == "svd" else summed(plain(Cnn), weights, tmp_path)(x)
        same(base(x), expected, 1e-4)


def summed(model: nn.Module, weights: dict[str, float], folder: Path) -> nn.Module:
    """`model` with the weighted sum of what each adapter changes."""
    changes = {}
    for name, weight in weights.items():
        alone = copy.deepcopy(model)
        lora.load_adapter(alone, folder / name)
        lora.merge(alone)
        for key, value in alone.state_dict().items():
            changes[key] = changes.get(key, 0) + weight * (value - model.state_dict()[key]).double()
    model.load_state_dict({k: v + changes[k].to(v.dtype) for k, v in model.state_dict().items()})
    return model


def test_merging_one_of_several_whichever_is_in(shelf: Any) -> None:
    folders, wanted = shelf
    for name in ("wide", "dora", "head", "tokens"):
        model = zoo_model("llama")
        adapters = lora.Adapters(model)
        adapters.load(name, folders[name])
        lora.merge(model, adapters[name])
        same(logits(model), wanted[name])
        assert list(model.state_dict()) == list(zoo_model("llama").state_dict())


def test_adapters_that_do_not_add_up_are_refused_by_name(shelf: Any, tmp_path: Path) -> None:
    folders, _ = shelf
    made_by_peft(zoo_model("llama"), target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    configured(tmp_path, bias="lora_only")
    adapters = lora.Adapters(zoo_model("llama"))
    for name, folder in {**folders, "biased": tmp_path}.items():
        adapters.load(name, folder)
    for name in ("dora", "head", "biased"):
        for method in ("linear", "svd"):
            with pytest.raises(AdapterError, match=f'"{name}"'):
                adapters.combine("both", {"wide": 1.0, name: 0.5}, method)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="finite"):
        adapters.combine("both", {"wide": float("nan")})
    with pytest.raises(ConfigError, match="finite"):
        adapters.combine("both", {})
    with pytest.raises(ConfigError, match="method"):
        adapters.combine("both", {"wide": 1.0}, "cat")  # type: ignore[arg-type]
    with pytest.raises(PhinetuneError, match="rank"):
        adapters.combine("both", {"wide": 1.0}, "svd", 1000)
    assert adapters.names == [*folders, "biased"]


def test_unknown_and_taken_names_are_refused(shelf: Any) -> None:
    folders, wanted = shelf
    model = zoo_model("llama")
    adapters = lora.Adapters(model)
    adapters.load("wide", folders["wide"])
    adapters.use("wide")
    for action in (
        lambda: adapters.use("wied"),
        lambda: adapters.delete("wied"),
        lambda: adapters["wied"],
        lambda: adapters.save("wied", folders["wide"]),
        lambda: adapters.combine("new", {"wied": 1.0}),
    ):
        with pytest.raises(AdapterError, match=r'"wied", did you mean "wide"\?'):
            action()
    for action in (
        lambda: adapters.load("wide", folders["narrow"]),
        lambda: adapters.add("wide", lora.LoraConfig(r=2)),
        lambda: adapters.combine("wide", {"wide": 1.0}),
    ):
        with pytest.raises(AdapterError, match='"wide" already'):
            action()
    with pytest.raises(AdapterError, match="name"):
        adapters.load("", folders["narrow"])
    assert adapters.names == ["wide"] and adapters.active == "wide"
    same(logits(model), wanted["wide"])


def test_an_adapter_that_cannot_be_loaded_leaves_the_others_in_use(shelf: Any, tmp_path: Path) -> None:
    folders, wanted = shelf
    made_by_peft(zoo_model("llama"), target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    rewrite(tmp_path, lambda s: s.pop(next(iter(s))))
    model = zoo_model("llama")
    adapters = lora.Adapters(model)
    adapters.load("wide", folders["wide"])
    adapters.use("wide")
    with pytest.raises(AdapterError, match="missing"):
        adapters.load("broken", tmp_path)
    with pytest.raises(AdapterError, match="nothing"):
        adapters.add("broken", lora.LoraConfig(target_modules=["nothing"]))
    assert adapters.names == ["wide"] and adapters.active == "wide"
    same(logits(model), wanted["wide"])
    adapters.load("broken", folders["narrow"])  # the name is still free


# Refused as a whole: everything that is wrong in one error, and the model as it was.


def untouched(model: nn.Module, fresh: nn.Module, flags: dict[str, bool] | None = None) -> None:
    """`model` is bit for bit `fresh`, of the same layers, and learns what it learned before."""
    assert not lora.lora_layers(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    one, other = model.state_dict(), fresh.state_dict()
    assert list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == (
        flags or {n: True for n, _ in model.named_parameters()}
    )


def half_frozen(model: nn.Module) -> dict[str, bool]:
    """Freeze every other parameter."""
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    return {n: p.requires_grad for n, p in model.named_parameters()}


def test_everything_that_is_wrong_with_a_file_is_in_one_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = zoo_model("qwen2")
    values = {
        "target_modules": ["embed_tokens", "q_proj", "up_proj"],
        "use_dora": True,
        "bias": "all",
        "modules_to_save": ["lm_head"],
    }
    lora.save_adapter(made_here(model, **values), tmp_path, base_key="one")
    state, p = tensors(tmp_path), "base_model.model."
    wrong = {
        f"{p}model.layers.0.self_attn.q_proj.lora_A.weight": "missing",
        f"{p}model.embed_tokens.lora_embedding_A": "missing",
        f"{p}model.layers.0.mlp.up_proj.lora_B.weight": "shape",
        f"{p}model.layers.1.self_attn.q_proj.lora_magnitude_vector": "shape",
        f"{p}lm_head.weight": "shape",
        f"{p}model.layers.1.mlp.up_proj.lora_A.weight": "finite",
        f"{p}model.layers.1.self_attn.q_proj.base_layer.bias": "finite",
        f"{p}model.layers.1.self_attn.k_proj.bias": "missing",
        f"{p}model.layers.7.mlp.up_proj.lora_A.weight": "place",
        f"{p}model.layers.0.mlp.up_proj.lora_C.weight": "place",
    }
    for key, what in wrong.items():
        if what == "missing":
            del state[key]
        elif what == "shape":
            state[key] = torch.zeros(3, 5)
        elif what == "finite":
            state[key].view(-1)[0] = float("nan" if "bias" in key else "inf")
        else:
            state[key] = torch.zeros(4, 32)
    save_file(state, str(tmp_path / WEIGHTS), metadata={"base_key": "one"})
    model, fresh = zoo_model("qwen2"), zoo_model("qwen2")
    flags = half_frozen(model)
    with pytest.raises(AdapterError) as caught:
        lora.load_adapter(model, tmp_path, base_key="other")
    lines = caught.value.problems
    for key, what in wrong.items():
        assert sum(line.startswith(key) and what in line for line in lines) == 1, key
    assert sum("another base model" in line for line in lines) == 1
    assert len(lines) == len(wrong) + 1
    untouched(model, fresh, flags)


def test_the_content_hash_of_the_base_is_compared(tmp_path: Path) -> None:
    lora.save_adapter(made_here(zoo_model("llama")), tmp_path / "keyed", base_key="one")
    lora.save_adapter(made_here(zoo_model("llama")), tmp_path / "plain")
    assert (
        lora.read_adapter(tmp_path / "keyed").base_key == "one"
        and lora.read_adapter(tmp_path / "plain").base_key is None
    )
    lora.load_adapter(zoo_model("llama"), tmp_path / "keyed", base_key="one")
    lora.load_adapter(zoo_model("llama"), tmp_path / "keyed")
    lora.load_adapter(zoo_model("llama"), tmp_path / "plain", base_key="other")
    for load in (lora.load_adapter, lambda m, f, base_key: lora.Adapters(m).load("a", f, base_key)):
        model = zoo_model("llama")
        with pytest.raises(AdapterError, match="another base model"):
            load(model, tmp_path / "keyed", base_key="other")
        untouched(model, zoo_model("llama"))


@pytest.mark.parametrize("start", [True, "pissa"])
def test_an_adapter_of_another_family_is_refused(start: Any, tmp_path: Path) -> None:
    made_by_peft(zoo_model("llama"), target_modules="all-linear", init_lora_weights=start).save_pretrained(
        str(tmp_path)
    )
    for other in ("opt", "gpt2", "phi"):
        model = zoo_model(other)
        flags = half_frozen(model)
        with pytest.raises(AdapterError):
            lora.load_adapter(model, tmp_path)
        untouched(model, zoo_model(other), flags)


def test_an_adapter_of_a_longer_model_is_refused(tmp_path: Path) -> None:
    made_by_peft(zoo_model("llama", num_hidden_layers=3), target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    model = zoo_model("llama")
    with pytest.raises(AdapterError, match=r"layers\.2\.self_attn\.q_proj\.lora_A") as caught:
        lora.load_adapter(model, tmp_path)
    assert len(caught.value.problems) == 2
    untouched(model, zoo_model("llama"))


def test_an_embedding_that_was_resized_beside_its_adapter_is_refused(tmp_path: Path) -> None:
    wrapped = made_by_peft(zoo_model("llama"), target_modules=["embed_tokens"])
    wrapped.save_pretrained(str(tmp_path))
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    rewrite(tmp_path, lambda s: s.update({key: s[key] + 1}))
    model = zoo_model("llama")
    with pytest.raises(AdapterError, match=r"embed_tokens\.base_layer\.weight"):
        lora.load_adapter(model, tmp_path)
    untouched(model, zoo_model("llama"))


UNSUPPORTED: dict[str, Any] = {
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "use_qalora": True,
    "corda_config": {"cache_file": None},
    "eva_config": {"rho": 2.0},
    "loftq_config": {"loftq_bits": 4},
    "lora_bias": True,
    "layer_replication": [[0, 1], [0, 1]],
    "alora_invocation_tokens": [1, 2],
    "trainable_token_indices": [3, 4],
    "megatron_config": {"a": 1},
    "arrow_config": {"top_k": 2},
    "use_bdlora": {"a": 1},
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_is_not_supported_in_a_saved_configuration_is_refused_by_its_key(key: str, tmp_path: Path) -> None:
    made_by_peft(zoo_model("llama"), target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    assert key in configured(tmp_path)  # the name is PEFT's own
    configured(tmp_path, **{key: UNSUPPORTED[key]})
    model = zoo_model("llama")
    with pytest.raises(PhinetuneError, match=key) as caught:
        lora.load_adapter(model, tmp_path)
    assert len(caught.value.problems) == 1
    untouched(model, zoo_model("llama"))


def test_all_unsupported_and_unknown_keys_are_named_at_once(tmp_path: Path) -> None:
    made_by_peft(zoo_model("llama"), target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    configured(tmp_path, **UNSUPPORTED, use_drag=True, init_lora_weights="corda", peft_type="ADALORA")
    with pytest.raises(PhinetuneError) as caught:
        lora.read_adapter(tmp_path)
    for key in [*UNSUPPORTED, "use_drag", "init_lora_weights", "peft_type"]:
        assert any(key in line for line in caught.value.problems), key
    assert "use_dora" in str(caught.value)


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "mica", "mystery"])
def test_starts_that_changed_the_base_otherwise_are_refused(start: str, tmp_path: Path) -> None:
    made_by_peft(zoo_model("llama"), target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    configured(tmp_path, init_lora_weights=start)
    with pytest.raises(PhinetuneError, match="init_lora_weights"):
        lora.load_adapter(zoo_model("llama"), tmp_path)


@pytest.mark.parametrize("start", ["eva", "orthogonal"])
def test_starts_that_left_the_base_alone_are_read(start: str, tmp_path: Path) -> None:
    wrapped = made_by_peft(zoo_model("llama"), target_modules=["q_proj"])
    wrapped.save_pretrained(str(tmp_path))
    configured(tmp_path, init_lora_weights=start)
    model = zoo_model("llama")
    lora.load_adapter(model, tmp_path)
    same(logits(model), logits(wrapped))


@pytest.mark.parametrize(
    ("name", "values", "problem", "hint"),
    [
        ("llama", {"target_modules": ["q_prj"]}, r'"q_prj".*did you mean "q_proj"', "q_proj, k_proj, v_proj"),
        ("gpt2", {"target_modules": ["c_atn", "q_prj"]}, r'"c_atn".*did you mean "c_attn"', "c_attn"),
        ("gpt2", {"target_modules": ["c_atn", "q_prj"]}, r'"q_prj".*did you mean "q_proj"', "q_proj, k_proj, v_proj"),
        ("bloom", {"target_modules": ["q_proj"]}, r'"q_proj" matches no layer', "query_key_value"),
        ("falcon", {"target_modules": r".*\.attn\..*"}, "matches no layer", "query_key_value"),
        ("llama", {"target_modules": ["mlp"]}, r'"mlp".*layers\.0\.mlp is a LlamaMLP', "up_proj"),
        (
            "llama",
            {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}},
            r'rank_pattern: "k_proj" matches no',
            "",
        ),
        ("llama", {"rank_pattern": {"q_prj": 2}}, r'rank_pattern: "q_prj".*did you mean "q_proj"', ""),
        ("llama", {"alpha_pattern": {"q_prj": 2}}, r'alpha_pattern: "q_prj".*did you mean "q_proj"', ""),
        ("llama", {"modules_to_save": ["lm_haed"]}, r'modules_to_save: "lm_haed".*did you mean "lm_head"', ""),
        ("llama", {"layers_to_transform": [0, 2, 5]}, r"layers_to_transform: 2, 5", "0 to 1"),
        (
            "gpt2",
            {"layers_to_transform": 1, "layers_pattern": "layers"},
            "layers_to_transform: 1",
            "no numbered layers",
        ),
        ("llama", {"exclude_modules": r".*"}, "exclude_modules", ""),
        ("opt", {"target_modules": ["embed_positions"]}, r"embed_positions: is a OPTLearnedPositionalEmbedding", ""),
        ("llama", {"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"}, "embed_tokens.*pissa", ""),
        ("llama", {"fan_in_fan_out": True}, "fan_in_fan_out", ""),
    ],
)
def test_what_matches_nothing_is_named_with_the_nearest_there_is(
    name: str, values: dict[str, Any], problem: str, hint: str
) -> None:
    model = zoo_model(name)
    flags = half_frozen(model)
    with pytest.raises(AdapterError, match=problem) as caught:
        lora.inject(model, lora.LoraConfig(**{"r": 4, **values}))
    assert hint in caught.value.hint
    untouched(model, zoo_model(name), flags)


def test_exclusions_that_exclude_nothing_are_named() -> None:
    for excluded in (["q_prj"], r".*q_prj"):
        with pytest.raises(AdapterError, match=r"exclude_modules.*q_prj"):
            lora.inject(zoo_model("llama"), lora.LoraConfig(r=4, exclude_modules=excluded))


def test_a_rank_above_the_layers_names_every_such_layer() -> None:
    model = zoo_model("llama")
    with pytest.raises(AdapterError) as caught:
        lora.inject(model, lora.LoraConfig(r=17))
    assert [p.partition(":")[0] for p in caught.value.problems] == [
        f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("k_proj", "v_proj")
    ]
    untouched(model, zoo_model("llama"))
    with pytest.raises(AdapterError, match=r"first: r=7 .* 27 -> 6"):
        lora.inject(plain(Cnn), lora.LoraConfig(r=7, target_modules=["first"]))
    with pytest.raises(AdapterError, match=r"emb: r=13"):
        lora.inject(plain(Bag), lora.LoraConfig(r=13, target_modules=["emb"]))
    with pytest.raises(AdapterError, match=r"first: r=9"):
        lora.inject(plain(Cnn), lora.LoraConfig(r=2, target_modules=["first", "second"], rank_pattern={"first": 9}))


def test_targets_that_are_all_kept_whole_are_called_so() -> None:
    with pytest.raises(AdapterError, match="modules_to_save"):
        lora.inject(zoo_model("llama"), lora.LoraConfig(r=2, target_modules=["lm_head"], modules_to_save=["lm_head"]))


def test_a_model_that_has_an_adapter_takes_no_other(tmp_path: Path) -> None:
    model = zoo_model("llama")
    adapter = made_here(model)
    before = logits(model)
    lora.save_adapter(adapter, tmp_path)
    for action in (
        lambda: lora.inject(model, lora.LoraConfig(r=2)),
        lambda: lora.load_adapter(model, tmp_path),
        lambda: lora.Adapters(model).load("a", tmp_path),
        lambda: lora.find_targets(model, lora.LoraConfig(r=2)),
    ):
        with pytest.raises(AdapterError, match="is a LoRA layer already"):
            action()
    assert torch.equal(logits(model), before) and len(lora.lora_layers(model)) == 14


class Attending(nn.Module):
    """torch's own attention, whose `out_proj` is never called. x (N, T, 8) -> (N, T, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.attn(x, x, x, need_weights=False)[0])


def test_layers_that_are_never_called_are_left_out_or_refused() -> None:
    model = plain(Attending)
    assert [t.name for t in lora.find_targets(model, lora.LoraConfig(r=2, task_type=None))] == ["up"]
    with pytest.raises(AdapterError, match="out_proj"):
        lora.inject(model, lora.LoraConfig(r=2, target_modules=["out_proj"]))
    untouched(model, plain(Attending))


@pytest.mark.parametrize("targets", ["all-linear", ["linear1", "linear2"]])
def test_torchs_fast_path_does_not_pass_the_factors_by(targets: Any) -> None:
    """In evaluation `nn.TransformerEncoderLayer` reads the weights of its layers and calls none: refused, left out, or right."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()

    model, x = build(), torch.randn(2, 5, 8)
    try:
        made_here(model, r=2, target_modules=targets, task_type=None)
    except AdapterError:
        return
    wanted = model.train()(x)  # there is no dropout, and in training torch takes the ordinary way
    moved(wanted, build()(x))
    same(model.eval()(x), wanted)


def test_convolutions_without_a_form_in_pefts_files_are_refused() -> None:
    for layer, message in (
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv1d(4, 4, 3, groups=4), "groups=4"),
        (nn.Conv2d(4, 4, 3, padding="same"), "padding"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding"),
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
    ):
        model = nn.Sequential()
        model.add_module("odd", layer)
        with pytest.raises(AdapterError, match=message) as caught:
            lora.inject(model, lora.LoraConfig(r=2, target_modules=["odd"], task_type=None))
        assert "odd" in str(caught.value) and type(model.odd) is type(layer)
        assert all(p.requires_grad for p in model.parameters())


def test_a_bare_layer_is_no_model() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(PhinetuneError):
        lora.inject(layer, lora.LoraConfig(r=2, task_type=None))
    assert type(layer) is nn.Linear and dict(layer.named_children()) == {}


def test_modules_to_save_without_parameters_are_refused_in_words() -> None:
    model = zoo_model("llama")
    with pytest.raises(AdapterError, match="act_fn"):
        lora.inject(model, lora.LoraConfig(r=2, modules_to_save=["act_fn"]))
    untouched(model, zoo_model("llama"))
