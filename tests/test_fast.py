"""Every fast path computes what its reference computes, has a switch, and stays out of models that compute something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phinetune.data.batches import padded_batch, tree_batch
from phinetune.errors import ConfigError
from phinetune.lora.arithmetic import choose_arithmetic
from phinetune.lora.config import LoraConfig
from phinetune.lora.functional import lora_linear_reference
from phinetune.lora.group import share_inputs, shared_linears_reference
from phinetune.lora.injection import inject
from phinetune.lora.layer import lora_layers
from phinetune.model import attention as blocks
from phinetune.model.attention import allowed_in_tree, attention_reference, causal_attention, tree_attention
from phinetune.model.fast import ATTENTION, FastPaths, compile_layers, read_fast_paths, speed_up, uses_blocks
from phinetune.model.folder import resolve_model
from phinetune.model.load import LoadPlan, load_model
from phinetune.model.norm import RMSNorm, rms_norm, rms_norm_reference, stand_in
from phinetune.training.config import read_training_config
from phinetune.training.loss import supervised_loss
from phinetune.training.rows import last_mlp
from zoo import MODELS, zoo_model

PATHS = [name for name in FastPaths.__dataclass_fields__ if name not in ("compiled", "fused_rows")]


def only(*names: str) -> FastPaths:
    return FastPaths(**{name: name in names for name in PATHS})


# --- attention ---


def attention_inputs(tokens: int, heads: int, groups: int, width: int = 8, batch: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + heads)
    shapes = [(batch, heads, tokens, width), (batch, groups, tokens, width), (batch, groups, tokens, width)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def with_gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kept", [True, False])
@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=7),
    prefix=st.integers(0, 140),
    heads=st.sampled_from([(4, 4), (6, 2), (3, 1)]),
)
def test_a_tree_in_blocks_is_masked_attention(
    kept: bool, lengths: list[int], prefix: int, heads: tuple[int, int]
) -> None:
    tree = [prefix, *lengths]
    inputs = attention_inputs(sum(tree), *heads)
    expected = with_gradients(attention_reference(*inputs, 0.3, allowed_in_tree(tree)).transpose(1, 2), inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_KEPT_UP_TO", 1000 if kept else 0)
        found = with_gradients(tree_attention(*inputs, 0.3, torch.tensor(tree)), inputs)
    assert_equal(found, expected)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("kept", [True, False])
def test_rows_in_blocks_are_causal_attention(tokens: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_KEPT_UP_TO", 1000 if kept else 0)
    inputs = attention_inputs(tokens, 6, 3, batch=2)
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    expected = with_gradients(attention_reference(*inputs, 0.4, allowed).transpose(1, 2), inputs)
    assert_equal(with_gradients(causal_attention(*inputs, 0.4), inputs), expected)


def test_blocks_do_not_compute_what_is_masked() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = attention_inputs(512, 2, 2)
    whole = 4 * 2 * 512 * 512 * 8
    with FlopCounterMode(display=False) as counted:
        causal_attention(q, k, v, 1.0)
    assert counted.get_total_flops() < 0.6 * whole
    with FlopCounterMode(display=False) as counted:
        tree_attention(q, k, v, 1.0, torch.tensor([0] + [64] * 8))
    assert counted.get_total_flops() < 0.13 * whole


# --- normalization ---


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.06)]
)
@pytest.mark.parametrize("rows", [1, 7, 5000])
def test_the_normalization_is_its_definition(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 96, generator=generator).to(dtype).requires_grad_()
    weight = (1 + 0.1 * torch.randn(96, generator=generator)).to(dtype).requires_grad_()
    for one, other in zip(
        with_gradients(rms_norm(x, weight, 1e-5), [x, weight]),
        with_gradients(rms_norm_reference(x, weight, 1e-5), [x, weight]),
        strict=True,
    ):
        scale = max(1.0, float(other.detach().abs().max()))
        assert float((one - other).detach().abs().max()) <= tolerance * scale


def test_a_normalization_that_is_another_one_is_left_alone() -> None:
    assert isinstance(stand_in(zoo_model("llama").model.norm), RMSNorm)
    assert stand_in(zoo_model("gemma2").model.norm) is None  # its weight is 1 + w
    assert stand_in(nn.LayerNorm(8)) is None


# --- layers that share their input ---


def grouped_model(dtype: torch.dtype = torch.float32) -> Any:
    model = zoo_model("llama").to(dtype).train()
    inject(model, LoraConfig(r=4, lora_alpha=8))
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():
        layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
    return model


def test_layers_that_share_their_input_compute_what_each_does_alone() -> None:
    model = grouped_model().double()
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    parameters = [x, *(p for layer in layers for p in (layer.lora_A, layer.lora_B))]
    expected = with_gradients(torch.cat(shared_linears_reference(x, layers), dim=-1), parameters)
    assert share_inputs(model) == 4
    assert_equal(with_gradients(torch.cat([layer(x) for layer in layers], dim=-1), parameters), expected)


def test_a_layer_given_another_tensor_computes_for_itself() -> None:
    model = grouped_model()
    attention = model.model.layers[0].self_attn
    x, other = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    alone = attention.k_proj(other)
    share_inputs(model)
    attention.q_proj(x)
    assert torch.equal(attention.k_proj(other), alone)
    assert torch.equal(attention.k_proj(other), alone)  # not called in a group's order either


def test_one_of_the_group_may_go_unused() -> None:
    model = grouped_model()
    attention = model.model.layers[0].self_attn
    share_inputs(model)
    x = torch.randn(2, 3, 32, requires_grad=True)
    y = attention.q_proj(x).sum() + attention.v_proj(x).sum()
    y.backward()
    assert attention.k_proj.lora_A.grad is None and attention.v_proj.lora_A.grad is not None
    found = x.grad
    choose_arithmetic(model, FastPaths.none())
    again = x.detach().requires_grad_()
    (attention.q_proj(again).sum() + attention.v_proj(again).sum()).backward()
    assert_equal([found], [again.grad], 1e-5)  # type: ignore[list-item]


# --- whole models ---


def rows(shift: int = 0) -> list[dict[str, Any]]:
    """Four examples that begin alike; what follows changes with `shift`."""
    out = []
    for extra in (3, 9, 14, 4):
        ids = [5, 6, 7, 8, 9, *[10 + (extra * i + shift) % 50 for i in range(extra)]]
        out.append({"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]})
    return out


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor], paths: FastPaths) -> dict[str, torch.Tensor]:
    model.zero_grad()
    last = last_mlp(model) if paths.last_rows else None
    head = model.get_output_embeddings()
    loss = supervised_loss(model, head, batch, model.dtype, chunked=paths.chunked_loss, last=last)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def trained_model(name: str, paths: FastPaths) -> Any:
    model = speed_up(zoo_model(name), paths).train()
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    choose_arithmetic(model, paths)
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():
        layer.lora_B.data = 0.05 * torch.randn(layer.lora_B.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_reference(name: str) -> None:
    reference = trained_model(name, FastPaths.none())
    fast = trained_model(name, FastPaths())
    layouts = [padded_batch(rows(), 0)]
    if uses_blocks(fast):
        layouts.append(tree_batch(rows()))
    for batch in layouts:
        expected = loss_and_gradients(reference, padded_batch(rows(), 0), FastPaths.none())
        found = loss_and_gradients(fast, batch, FastPaths())
        assert set(found) == set(expected)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2", "qwen3", "mistral", "gpt2"])
def test_these_models_take_attention_in_blocks(name: str) -> None:
    assert uses_blocks(speed_up(zoo_model(name), FastPaths()))


@pytest.mark.parametrize("path", PATHS)
def test_each_path_alone_is_the_reference(path: str) -> None:
    batch = tree_batch(rows())
    expected = loss_and_gradients(trained_model("llama", FastPaths.none()), batch, FastPaths.none())
    found = loss_and_gradients(trained_model("llama", only(path)), batch, only(path))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


def counting(name: str, function: Any, calls: list[str]) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(name)
        return function(*args)

    return counted


@pytest.mark.parametrize("layout", [lambda r: padded_batch(r, 0), tree_batch], ids=["padded", "tree"])
def test_plain_rows_may_go_to_torchs_kernel_while_trees_stay_in_blocks(
    layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, kinds = layout(rows()), list[str]()
    expected = loss_and_gradients(trained_model("llama", FastPaths.none()), batch, FastPaths.none())
    paths = FastPaths(fused_rows=True, kernels=False)
    model = trained_model("llama", paths)
    assert uses_blocks(model)
    for name in ("tree_attention", "causal_attention"):
        monkeypatch.setattr(blocks, name, counting(name, getattr(blocks, name), kinds))
    found = loss_and_gradients(model, batch, paths)
    assert set(kinds) == ({"tree_attention"} if "tree" in batch else set())
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


def test_the_reference_has_none_of_them() -> None:
    model = trained_model("llama", FastPaths.none())
    assert not uses_blocks(model) and not any(isinstance(m, RMSNorm) for m in model.modules())
    for layer in lora_layers(model).values():
        assert layer.shared is None and layer.arithmetic is lora_linear_reference
    fast = trained_model("llama", FastPaths())
    assert fast.config._attn_implementation == ATTENTION and isinstance(fast.model.norm, RMSNorm)
    assert fast.model.layers[0].self_attn.q_proj.shared is fast.model.layers[0].self_attn.v_proj.shared is not None


def test_attention_with_a_soft_cap_or_dropout_stays_the_models_own() -> None:
    assert not uses_blocks(speed_up(zoo_model("gemma2"), FastPaths()))
    assert not uses_blocks(speed_up(zoo_model("llama", attention_dropout=0.1), FastPaths()))


def test_a_model_that_would_answer_differently_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(blocks, "causal_attention", lambda q, k, v, s: torch.zeros_like(q.transpose(1, 2)))
    model = speed_up(zoo_model("llama"), only("attention"), lambda e: notes.append(getattr(e, "text", "")))
    assert not uses_blocks(model) and any("left out" in note for note in notes)


def test_a_model_that_cannot_be_tried_is_left_alone_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    model = zoo_model("llama")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("pictures are needed\nas well")

    monkeypatch.setattr(model, "forward", refuse)
    was = model.config._attn_implementation
    speed_up(model, FastPaths(), lambda e: notes.append(getattr(e, "text", "")))
    assert model.config._attn_implementation == was
    assert notes == ["model: attention is left as it is; it cannot be tried (pictures are needed)"]
    assert isinstance(model.model.norm, RMSNorm)  # tried by itself


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rounding_of_answers_does_not_keep_blocks_out_of_the_embedded_model(attention: str) -> None:
    notes: list[Any] = []
    model = load_model(resolve_model("smollm2-135m"), LoadPlan(torch.bfloat16, torch.device("cpu"), attention))
    assert uses_blocks(speed_up(model, FastPaths(), notes.append))
    assert not notes and any(isinstance(m, RMSNorm) for m in model.modules())


def test_masks_of_other_kinds_go_to_torchs_attention() -> None:
    plain, fast = zoo_model("llama"), speed_up(zoo_model("llama"), FastPaths())
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        one, other = (m(input_ids=ids, attention_mask=mask).logits for m in (plain, fast))
        assert torch.allclose(one[0, 2:], other[0, 2:], atol=1e-5) and torch.allclose(one[1], other[1], atol=1e-5)
        answers = [m.generate(ids[1:], max_new_tokens=5, do_sample=False).tolist() for m in (plain, fast)]
    assert answers[0] == answers[1]


def test_the_last_mlp_computes_the_learned_rows_only() -> None:
    model = trained_model("llama", FastPaths())
    seen: list[int] = []
    mlp: Any = last_mlp(model)
    assert mlp is model.model.layers[-1].mlp
    handle = mlp.down_proj.register_forward_hook(lambda m, args, out: seen.append(out[..., 0].numel()))
    loss_and_gradients(model, tree_batch(rows()), FastPaths())
    handle.remove()
    assert seen == [8]  # two learned tokens an example


@pytest.mark.slow
def test_compiled_layers_compute_the_same_for_every_length_with_few_versions() -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    paths = FastPaths(compiled=True)
    reference, fast = trained_model("llama", FastPaths.none()), trained_model("llama", paths)
    assert compile_layers(fast) == 2
    graphs = 0
    for i, some in enumerate((rows(), rows()[:3], rows()[1:])):
        expected = loss_and_gradients(reference, tree_batch(some), FastPaths.none())
        found = loss_and_gradients(fast, tree_batch(some), paths)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
        graphs = graphs if i else counters["stats"]["unique_graphs"]
    assert 0 < graphs == counters["stats"]["unique_graphs"], "other lengths need no other code"


# --- whole runs ---


def curve(paths: FastPaths, dtype: torch.dtype, layout: Any, steps: int = 50) -> torch.Tensor:
    """The loss of each of `steps` steps on changing batches."""
    model = speed_up(zoo_model("llama").to(dtype), paths).train()
    torch.manual_seed(3)
    inject(model, LoraConfig(r=4, lora_alpha=8))
    choose_arithmetic(model, paths)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    last = last_mlp(model) if paths.last_rows else None
    losses = []
    for step in range(steps):
        some = rows(shift=7 * (step % 2))[step % 3 :]
        head = model.get_output_embeddings()
        loss = supervised_loss(model, head, layout(some), dtype, chunked=paths.chunked_loss, last=last)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_the_loss_curve_is_that_of_the_reference() -> None:
    reference = curve(FastPaths.none(), torch.float32, lambda r: padded_batch(r, 0))
    assert reference[-1] < 0.5 * reference[0], "something is learned"
    for layout in (tree_batch, lambda r: padded_batch(r, 0)):
        assert float((curve(FastPaths(), torch.float32, layout) - reference).abs().max()) < 1e-4


def test_in_bfloat16_the_loss_curve_is_as_near_to_float32_as_the_references_are() -> None:
    exact = curve(FastPaths.none(), torch.float32, tree_batch)

    def error(paths: FastPaths, layout: Any) -> float:
        return float((curve(paths, torch.bfloat16, layout) - exact).abs().mean())

    layouts = (tree_batch, lambda r: padded_batch(r, 0))  # two orders of the same sums
    spread = max(error(FastPaths.none(), layout) for layout in layouts)
    assert spread > 0
    assert max(error(FastPaths(), layout) for layout in layouts) < 1.5 * spread


# --- switches ---


def test_switches_are_read_and_wrong_ones_named() -> None:
    assert read_training_config({"reference": True}, lambda e: None).fast_paths == FastPaths.none()
    assert read_training_config({"reference": True}, lambda e: None).layout == "padded"
    assert read_training_config({"fast_paths": {"norm": False}}).fast_paths == FastPaths(norm=False)
    assert read_fast_paths(False, "x") == FastPaths.none()
    plan = read_training_config({"torch_compile": True, "torch_compile_mode": "max-autotune"}, lambda e: None)
    assert plan.fast_paths.compiled and not {"torch_compile", "torch_compile_mode"} & set(plan.values)
    with pytest.raises(ConfigError, match="atention: unknown key, did you mean"):
        read_training_config({"fast_paths": {"atention": False}})
    with pytest.raises(ConfigError, match="norm: must be true or false"):
        read_training_config({"fast_paths": {"norm": 1}})
    with pytest.raises(ConfigError, match="fast_paths: must be true, false, or switches"):
        read_training_config({"fast_paths": "all"})
    with pytest.raises(ConfigError, match="reference: must be true or false"):
        read_training_config({"reference": "yes"})
    with pytest.raises(ConfigError, match="leave out fast_paths and layout"):
        read_training_config({"reference": True, "layout": "tree"})
