"""LoRA's laws: the fast function equals its reference, a fresh layer its base, a merged model its adapter, a file PEFT's reading of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phinetune.errors import AdapterError, ConfigError
from phinetune.events import Note
from phinetune.lora.adapter import WEIGHTS_FILE, load_adapter, read_adapter, save_adapter
from phinetune.lora.config import LoraConfig, parse_lora_config
from phinetune.lora.functional import lora_linear, lora_linear_reference
from phinetune.lora.injection import adapter_of, inject
from phinetune.lora.layer import lora_layers, lora_size
from phinetune.lora.linear import Linear
from phinetune.lora.merging import merge
from phinetune.lora.targets import find_targets
from tiny import tiny_model

IDS = torch.tensor([[1, 7, 42, 100, 5, 200]])


def operands(n: int, features: int, out: int, r: int, bias: bool, mask: bool, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(n * features + out + r)
    x = torch.randn(2, n, features, dtype=dtype, requires_grad=True)
    w, b = torch.randn(out, features, dtype=dtype), torch.randn(out, dtype=dtype) if bias else None
    A, B = torch.randn(r, features, dtype=torch.float64).to(dtype), torch.randn(out, r, dtype=torch.float64).to(dtype)
    m = (torch.rand(2, n, features) > 0.3).to(dtype) / 0.7 if mask else None
    return [x, w, b, A.requires_grad_(), B.requires_grad_(), 0.7, m]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.booleans())
def test_function_equals_reference_in_value_and_every_gradient(
    n: int, features: int, out: int, r: int, bias: bool, mask: bool
) -> None:
    args = operands(n, features, out, r, bias, mask, torch.float64)
    leaves = [args[0], args[3], args[4]]
    ours, theirs = lora_linear(*args), lora_linear_reference(*args)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_gradcheck(bias: bool, mask: bool) -> None:
    assert torch.autograd.gradcheck(lora_linear, operands(3, 4, 5, 2, bias, mask, torch.float64))


SPANS = ((0, 1), (3, 5))


@pytest.mark.parametrize("mask", [False, True])
def test_gradcheck_by_slices_with_a_weight_and_a_bias_that_learn(mask: bool) -> None:
    x, w, b, A, _, s, m = operands(3, 4, 5, 2, True, mask, torch.float64)
    A = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    B = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    args = [x, w.requires_grad_(), b.requires_grad_(), A, B, s, m, SPANS]
    assert torch.autograd.gradcheck(lora_linear, args)
    assert torch.autograd.gradgradcheck(lora_linear, args)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=5), st.integers(1, 3), st.booleans())
def test_function_by_slices_equals_reference_in_value_and_every_gradient(
    slices: list[tuple[int, bool]], r: int, mask: bool
) -> None:
    starts = [sum(w for w, _ in slices[:i]) for i in range(len(slices))]
    spans = tuple((start, start + w) for start, (w, on) in zip(starts, slices, strict=True) if on)
    if not spans:
        return
    out, rows = sum(w for w, _ in slices), sum(stop - start for start, stop in spans)
    x, w, b, _, _, s, m = operands(3, 6, out, r, True, mask, torch.float64)
    A = torch.randn(r * len(spans), 6, dtype=torch.float64, requires_grad=True)
    B = torch.randn(rows, r, dtype=torch.float64, requires_grad=True)
    leaves = [x, A, B]
    ours, theirs = (f(x, w, b, A, B, s, m, spans) for f in (lora_linear, lora_linear_reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(lora_linear(x, w, b, A, B, s, m, spans), ours)
    g = torch.randn_like(ours)
    for a, c in zip(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-10)


def test_under_autocast_it_computes_in_autocasts_dtype() -> None:
    x, w, b, A, B, s, _ = operands(3, 6, 5, 2, True, False, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, w, b, A, B, s)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == A.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), lora_linear_reference(x, w, b, A, B, s), rtol=0.05, atol=0.2)


def test_bfloat16_by_slices_stays_within_rounding_of_the_float32_reference() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(64, 48), torch.randn(5, 48) / 7
    A, B = torch.randn(8, 48) / 7, torch.randn(3, 4)
    half = lora_linear(x.bfloat16(), w.bfloat16(), None, A, B, 1.0, None, SPANS)
    full = lora_linear_reference(x, w, None, A, B, 1.0, None, SPANS)
    assert (half.float() - full).abs().max() < 0.02 * full.abs().max()


def test_bfloat16_stays_within_rounding_of_the_float32_reference() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(64, 48), torch.randn(32, 48) / 7
    A, B = torch.randn(4, 48) / 7, torch.randn(32, 4)
    half = lora_linear(x.bfloat16(), w.bfloat16(), None, A, B, 1.0)
    full = lora_linear_reference(x, w, None, A, B, 1.0)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.02 * full.abs().max()


def test_float32_factors_on_a_bfloat16_base_get_float32_gradients_and_the_base_none() -> None:
    layer = Linear.from_base(nn.Linear(8, 6).bfloat16(), r=2, lora_alpha=2)
    layer(torch.randn(3, 8, dtype=torch.bfloat16)).float().sum().backward()
    assert layer.lora_B.grad is not None and layer.lora_B.grad.dtype == torch.float32
    assert layer.weight.grad is None and layer.bias.grad is None


def test_no_gradient_is_formed_below_the_lowest_adapted_layer() -> None:
    layer = Linear.from_base(nn.Linear(8, 6), r=2, lora_alpha=2)
    x = torch.randn(3, 8)
    assert layer(x).grad_fn.next_functions[0][0] is None  # x needs none, so dx is never computed


def test_fresh_layers_compute_exactly_the_base(model_folder: Path) -> None:
    model = tiny_model(model_folder.name)
    before = model(IDS).logits
    names = list(inject(model, LoraConfig(r=4)).layers)
    assert torch.equal(model(IDS).logits, before)
    assert len(names) == (14 if model_folder.name == "llama" else 8)
    assert not any(n.endswith("lm_head") for n in names)


def test_injection_renames_nothing_and_shares_the_weights() -> None:
    model = tiny_model()
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    inject(model, LoraConfig(r=4))
    now = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert {n: p for n, p in now.items() if "lora_" not in n} == weights
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n in now if "lora_" in n]
    size = lora_size(model)
    assert size.layers == 14 and size.trainable == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    layer = Linear.from_base(nn.Linear(16, 4), r=4, lora_alpha=4, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 16).expand(20000, 16)
    full = layer.eval()(x)
    torch.manual_seed(0)
    dropped = layer.train()(x)
    assert not torch.equal(dropped[0], dropped[1])
    spread = dropped.std(0) / 20000**0.5
    assert ((dropped.mean(0) - full[0]).abs() < 5 * spread).all()


def trained(kind: str, config: LoraConfig, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(kind).to(dtype)
    inject(model, config)
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_model_equals_the_adapter(kind: str, rslora: bool) -> None:
    model = trained(kind, LoraConfig(r=4, lora_alpha=8, use_rslora=rslora))
    adapted, plain = model(IDS).logits, tiny_model(kind)(IDS).logits
    names = merge(model)
    assert names and not lora_layers(model)
    assert (model(IDS).logits - adapted).abs().max() < 1e-5
    assert (adapted - plain).abs().max() > 0.1  # the adapter does something
    assert set(model.state_dict()) == set(tiny_model(kind).state_dict())


def test_merge_keeps_the_dtype_and_leaves_other_layers_alone() -> None:
    model = trained("llama", LoraConfig(r=4, target_modules=["q_proj"]), torch.bfloat16)
    before = {n: p.clone() for n, p in model.named_parameters() if "q_proj" not in n}
    merge(model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert after["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


def test_merge_refuses_values_that_are_not_finite_and_changes_nothing() -> None:
    model = trained("llama", LoraConfig(r=4))
    lora_layers(model)["model.layers.1.mlp.down_proj"].lora_A.data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj"):
        merge(model)
    assert len(lora_layers(model)) == 14


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("targets", ["all-linear", ["o_proj", "down_proj"], r".*layers\.1\..*_proj"])
def test_an_adapter_written_here_loads_in_peft_with_equal_logits(kind: str, targets: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    model = trained(kind, config)
    save_adapter(adapter_of(model), tmp_path, "base")
    peft = PeftModel.from_pretrained(tiny_model(kind), str(tmp_path)).eval()
    assert (peft(IDS).logits - model(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("targets", ["all-linear", ["o_proj"], r".*layers\.1\..*_proj"])
def test_an_adapter_written_by_peft_loads_here_with_equal_logits(kind: str, targets: Any, tmp_path: Path) -> None:
    import peft

    wrapped = peft.get_peft_model(
        tiny_model(kind),
        peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=targets, task_type="CAUSAL_LM"),
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(str(tmp_path))
    model = tiny_model(kind)
    load_adapter(model, tmp_path)
    assert (model(IDS).logits - wrapped.eval()(IDS).logits).abs().max() < 1e-5


def test_saving_loading_and_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    config = LoraConfig(r=4)
    model = trained("llama", config)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    save_adapter(adapter_of(model), tmp_path / "a", "base")
    loaded = load_adapter(tiny_model(), tmp_path / "a")
    assert loaded.config.r == 4
    save_adapter(loaded, tmp_path / "b", "base")
    for file in (WEIGHTS_FILE, "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# Bad input: refused with the name of the module, key or tensor, and the model unchanged.


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r'"q_prj" matches no layer that can have factors, did you mean "q_proj"\?'),
        (["q_proj", "nothing"], '"nothing" matches no layer that can have factors'),
        (r".*\.conv", "matches no layer that can have factors"),
    ],
)
def test_targets_that_match_nothing_name_the_layers_there_are(targets: Any, message: str) -> None:
    model = tiny_model()
    with pytest.raises(AdapterError, match=message) as caught:
        inject(model, LoraConfig(target_modules=targets))
    assert "q_proj" in caught.value.hint and "down_proj" in caught.value.hint
    assert not lora_layers(model)


def test_a_rank_larger_than_a_layer_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(AdapterError, match=r"r=65 does not fit a 64 -> 64 layer"):
        inject(model, LoraConfig(r=65))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_exclude_modules() -> None:
    names = find_targets(tiny_model(), LoraConfig(exclude_modules=["o_proj", "model.layers.0.mlp.up_proj"]))
    assert len(names) == 14 - 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_alhpa": 3}, r'peft_config\.lora_alhpa: unknown key, did you mean "lora_alpha"\?'),
        ({"use_qalora": True}, r"peft_config\.use_qalora: not supported yet"),
        ({"trainable_token_indices": [1]}, r"peft_config\.trainable_token_indices: not supported yet"),
        ({"rank_pattern": {"q_proj": 0}}, r"peft_config\.rank_pattern\.q_proj: must be a whole number"),
        ({"alpha_pattern": {"q_proj": 1.5}}, r"peft_config\.alpha_pattern\.q_proj: must be a whole number"),
        ({"bias": "some"}, r"peft_config\.bias"),
        ({"init_lora_weights": "pizza"}, r"peft_config\.init_lora_weights"),
        ({"layers_pattern": "h"}, r"peft_config\.layers_pattern: needs layers_to_transform"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"r": 0}, "r must be at least 1"),
        ({"r": "many"}, r"peft_config\.r"),
        ({"lora_dropout": 1.0}, "lora_dropout must be"),
        ({"peft_type": "IA3"}, "only LORA is supported"),
        ({"task_type": "SEQ_CLS"}, r"peft_config\.task_type"),
    ],
)
def test_peft_config_problems_name_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_lora_config(values)


def test_every_key_of_pefts_own_config_is_understood() -> None:
    import peft

    config = parse_lora_config(peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict())  # type: ignore[arg-type]
    assert config.r == 3 and config.target_modules == ["q_proj"]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = LoraConfig(r=4)
    save_adapter(trained("llama", config), tmp_path, "base")
    return tmp_path


def damaged(folder: Path, change: Any) -> None:
    from safetensors.torch import save_file

    state = dict(read_adapter(folder).state)
    change(state)
    save_file(state, str(folder / WEIGHTS_FILE))


A_KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(A_KEY), "layers.0.mlp.up_proj.lora_A.weight: is missing"),
        (lambda s: s.update({A_KEY: torch.zeros(4, 5)}), r"has shape \(4, 5\)"),
        (lambda s: s.update({A_KEY: torch.full((4, 64), float("nan"))}), "not finite"),
        (
            lambda s: s.update({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}),
            "layers.9.mlp.up_proj.lora_A.weight: the base model, as the adapter",
        ),
        (lambda s: s.update({"base_model.model.lm_head.weight": torch.zeros(320, 64)}), "has no place for it"),
    ],
)
def test_a_damaged_adapter_is_refused_by_the_tensors_name(adapter: Path, change: Any, message: str) -> None:
    damaged(adapter, change)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tiny_model(), adapter)


def test_an_adapter_for_another_model_leaves_that_model_alone(adapter: Path) -> None:
    model = tiny_model("phi3")
    before = copy.deepcopy(model.state_dict())
    damaged(adapter, lambda s: s.update({k.replace("mlp", "moe"): s.pop(k) for k in list(s) if "mlp" in k}))
    with pytest.raises(AdapterError, match="has no place for it"):
        load_adapter(model, adapter)
    assert not lora_layers(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("file", ["adapter_config.json", WEIGHTS_FILE])
def test_a_missing_file_is_named(adapter: Path, file: str) -> None:
    (adapter / file).unlink()
    with pytest.raises(AdapterError, match=file):
        read_adapter(adapter)


def test_a_truncated_adapter_and_a_broken_config_are_refused(adapter: Path) -> None:
    weights = adapter / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="cut off or damaged"):
        read_adapter(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        read_adapter(adapter)


def test_a_pickle_is_never_read(adapter: Path) -> None:
    (adapter / WEIGHTS_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError) as caught:
        read_adapter(adapter)
    assert "pickle" in caught.value.hint


def test_the_written_config_names_the_layers_in_full(adapter: Path) -> None:
    values = json.loads((adapter / "adapter_config.json").read_text())
    assert values["peft_type"] == "LORA" and values["r"] == 4 and len(values["target_modules"]) == 14
    assert all(n.startswith("model.layers.") for n in values["target_modules"])


# Names of fused layers, on models that hold the parts as layers of their own: files written for Phi-3 mean the same elsewhere.


def said_by(model: Any, **config: Any) -> tuple[Any, list[str]]:
    """(adapter, notes)."""
    notes: list[str] = []
    values = {"r": 4, "lora_alpha": 8, **config}
    adapter = inject(
        model, LoraConfig(**values), on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None
    )
    return adapter, notes


def test_the_name_of_a_fused_layer_means_its_parts_where_the_model_has_them_and_says_so() -> None:
    adapter, notes = said_by(tiny_model("llama"), target_modules=["o_proj", "qkv_proj", "gate_up_proj"])
    endings = {n.rpartition(".")[2] for n in adapter.layers}
    assert endings == {"o_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} and len(adapter.layers) == 12
    assert notes == [
        "target_modules: qkv_proj is q_proj, k_proj, v_proj and gate_up_proj is gate_proj, up_proj in this model"
    ]


@pytest.mark.parametrize(
    ("name", "targets", "endings"),
    [
        ("llama", ["c_attn"], {"q_proj", "k_proj", "v_proj"}),
        ("llama", ["query_key_value"], {"q_proj", "k_proj", "v_proj"}),
        ("opt", ["self_attn.qkv_proj"], {"q_proj", "k_proj", "v_proj"}),
        ("gpt2", ["qkv_proj"], {"c_attn"}),
        ("llama", ["q_proj", "qkv_proj"], {"q_proj", "k_proj", "v_proj"}),
    ],
)
def test_other_names_of_fused_layers_and_other_models(name: str, targets: list[str], endings: set[str]) -> None:
    from zoo import zoo_model

    adapter, notes = said_by(zoo_model(name), target_modules=targets)
    assert {n.rpartition(".")[2] for n in adapter.layers} == endings
    assert len(notes) == 1 and "q_proj, k_proj, v_proj in this model" in notes[0]


def test_where_the_fused_layer_is_there_its_name_means_it_and_nothing_is_said() -> None:
    adapter, notes = said_by(tiny_model("phi3"), target_modules=["o_proj", "qkv_proj", "gate_up_proj"])
    assert {n.rpartition(".")[2] for n in adapter.layers} == {"o_proj", "qkv_proj", "gate_up_proj"} and notes == []
    adapter, notes = said_by(tiny_model("llama"), target_modules=["q_proj", "up_proj"])
    assert notes == []


def test_patterns_and_exclusions_by_fused_names_follow() -> None:
    adapter, notes = said_by(
        tiny_model("llama"),
        target_modules="all-linear",
        exclude_modules=["gate_up_proj"],
        rank_pattern={"layers.0.self_attn.qkv_proj": 2, "q_proj": 3},
        alpha_pattern={r"self_attn\.qkv_proj": 12},
    )
    sizes = {n.removeprefix("model.layers."): (layer.r, layer.scaling) for n, layer in adapter.layers.items()}
    assert not any("gate_proj" in n or "up_proj" in n for n in sizes)
    assert sizes["0.self_attn.q_proj"] == sizes["0.self_attn.v_proj"] == (2, 6.0)
    assert sizes["1.self_attn.q_proj"] == (3, 4.0) and sizes["1.self_attn.k_proj"] == (4, 3.0)
    assert sizes["1.self_attn.o_proj"] == (4, 2.0)
    assert len(notes) == 1 and notes[0].startswith("exclude_modules, rank_pattern, alpha_pattern: ")


def test_what_is_saved_names_the_layers_that_were_adapted_so_that_peft_and_we_load_it(tmp_path: Path) -> None:
    import peft

    model = tiny_model("llama")
    adapter, _ = said_by(model, target_modules=["qkv_proj", "down_proj"], rank_pattern={"qkv_proj": 2})
    for layer in adapter.layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(adapter, tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert "qkv_proj" not in text and len(json.loads(text)["target_modules"]) == 8
    again = tiny_model("llama")
    load_adapter(again, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("llama", {"target_modules": ["o_proj", "qkv_prj"]}, '"qkv_prj" matches no layer'),
        ("llama", {"target_modules": ["o_proj", "mlp.qkv_proj"]}, '"mlp.qkv_proj" matches no layer'),
        ("bloom", {"target_modules": ["dense", "qkv_proj"]}, '"qkv_proj" matches no layer'),
        ("gpt2", {"target_modules": ["c_attn", "gate_up_proj"]}, '"gate_up_proj" matches no layer'),
        ("llama", {"target_modules": ["o_proj"], "rank_pattern": {"qkv_proj": 2}}, "q_proj"),
    ],
)
def test_a_name_that_matches_nothing_beside_others_that_do_is_an_error(
    name: str, config: dict[str, Any], message: str
) -> None:
    from zoo import zoo_model

    with pytest.raises(AdapterError) as caught:
        inject(zoo_model(name), LoraConfig(r=4, **config))
    assert message in str(caught.value)
