"""The compiled functions compute what torch's operators do, in both dtypes, and models take them only where they serve."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from phinetune.data.batches import padded_batch, tree_batch
from phinetune.lora.arithmetic import choose_arithmetic
from phinetune.lora.config import LoraConfig
from phinetune.lora.injection import inject
from phinetune.model import gated, kernels, rotary
from phinetune.model.attention import allowed_in_tree, attention_reference
from phinetune.model.fast import FastPaths, speed_up
from phinetune.model.norm import rms_norm, rms_norm_reference
from phinetune.training.loss import supervised_loss
from zoo import zoo_model

BUILT = pytest.mark.skipif(kernels.library() is None, reason="no compiler when phinetune was installed")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    found, expected = found.detach(), expected.detach()
    scale = max(1.0, float(expected.abs().max()))
    limit = 5e-6 if dtype == torch.float32 else 8e-3  # bfloat16 keeps 8 bits
    assert float((found.double() - expected.double()).abs().max()) <= limit * scale


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@BUILT
@BOTH
@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 70), width=st.integers(4, 700), seed=st.integers(0, 99))
def test_the_normalization(dtype: torch.dtype, rows: int, width: int, seed: int) -> None:
    x, weight, g = (
        numbers(*s, dtype=dtype, seed=seed + i) for i, s in enumerate([(rows, width), (width,), (rows, width)])
    )
    x.requires_grad_()
    y = rms_norm(x, weight, 1e-5)
    exact = x.detach().double().requires_grad_()
    expected = rms_norm_reference(exact, weight.double(), 1e-5)
    close(y, rms_norm_reference(x, weight, 1e-5), dtype)
    close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(expected, exact, g.double())[0], dtype)


@BUILT
@BOTH
@pytest.mark.parametrize("side_by_side", [False, True])
@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 70), width=st.integers(1, 1100), scale=st.sampled_from([0.1, 3.0, 60.0]))
def test_the_gated_activation(dtype: torch.dtype, side_by_side: bool, rows: int, width: int, scale: float) -> None:
    both = numbers(1, rows, 2 * width, dtype=dtype, scale=scale)
    g = numbers(1, rows, width, dtype=dtype, seed=1)
    exact = both.double().requires_grad_()
    expected = gated.silu_gate_reference(*exact.chunk(2, dim=-1))
    both.requires_grad_()
    y = gated.silu_gate(both) if side_by_side else gated.silu_gate(*both.chunk(2, dim=-1))
    close(y, gated.silu_gate_reference(*both.chunk(2, dim=-1)), dtype)
    close(torch.autograd.grad(y, both, g)[0], torch.autograd.grad(expected, exact, g.double())[0], dtype)


@BUILT
@BOTH
def test_the_exponential_over_its_whole_range(dtype: torch.dtype) -> None:
    gate = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38])]).to(dtype)
    close(kernels.silu_gate(gate[None], torch.ones_like(gate)[None])[0], F.silu(gate.double()), dtype)


@BUILT
@BOTH
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(dtype: torch.dtype, broken: float) -> None:
    x = numbers(3, 40, dtype=dtype)
    x[1, 7] = broken
    one = torch.ones_like(x)
    norm, _ = kernels.rms_norm(x, torch.ones(40, dtype=dtype), 1e-5)
    gate, scores, out = kernels.silu_gate(x, one), x.clone(), torch.empty(1, 1, 3, 40, dtype=dtype)
    kernels.causal_softmax(scores, 1, 40)
    kernels.gather_heads(x, torch.arange(3), out, None, None, 1.0)
    for result in (norm, gate, scores, out[0, 0]):
        assert not result[1].isfinite().all() and result[[0, 2]].isfinite().all()


@BUILT
@BOTH
@settings(deadline=None, max_examples=30)
@given(block=st.integers(1, 40), first=st.integers(1, 60), more=st.integers(0, 20), n=st.integers(1, 3))
def test_the_softmax_over_what_a_query_sees(dtype: torch.dtype, block: int, first: int, more: int, n: int) -> None:
    width = first + block - 1 + more
    scores, g = (numbers(n, 2 * block, width, dtype=dtype, seed=i, scale=4.0) for i in range(2))
    seen = torch.arange(width)[None, :] < (first + torch.arange(2 * block) % block)[:, None]
    expected = torch.softmax(scores.double().masked_fill(~seen, -torch.inf), dim=-1)
    P = scores.clone()
    kernels.causal_softmax(P, block, first)
    close(P, expected, dtype)
    assert not P.masked_select(~seen.expand_as(P)).any()
    dS = g.clone()
    kernels.softmax_backward(P, dS)
    exact_P, exact_g = P.double(), g.double()  # P as it was rounded: the function's own input
    close(dS, exact_P * (exact_g - (exact_P * exact_g).sum(-1, keepdim=True)), dtype)


def reference(states: list[torch.Tensor], cos: Any, sin: Any, heads: int, groups: int, tree: list[int]) -> torch.Tensor:
    tokens = len(states[0])
    q, k, v = (x.view(1, tokens, n, -1).transpose(1, 2) for x, n in zip(states, (heads, groups, groups), strict=True))
    q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    return attention_reference(q, k, v, 0.3, allowed_in_tree(tree)).transpose(1, 2).reshape(tokens, -1)


@BUILT
@BOTH
@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("kept", [True, False])
@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=0, max_size=7),
    prefix=st.integers(0, 140),
    heads=st.sampled_from([(4, 4, 16, 16), (6, 2, 16, 8), (3, 1, 24, 24)]),
)
def test_rotary_attention_over_trees(
    dtype: torch.dtype,
    side_by_side: bool,
    kept: bool,
    lengths: list[int],
    prefix: int,
    heads: tuple[int, int, int, int],
) -> None:
    tree, (H, G, D, width) = [prefix, *lengths], heads
    if not sum(tree):
        return
    T = sum(tree)
    states = [numbers(T, n * D, dtype=dtype, seed=i).requires_grad_() for i, n in enumerate((H, G, G))]
    angle = torch.outer(
        torch.arange(T) % 97, torch.rand(width // 2, generator=torch.Generator().manual_seed(3))
    ).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    g = numbers(T, H * D, dtype=dtype, seed=5)
    exact = [x.detach().double().requires_grad_() for x in states]
    expected = reference(exact, cos.double(), sin.double(), H, G, tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotary, "keeps_probabilities", lambda *_: kept)
        given_states = [torch.cat(states, dim=1)] if side_by_side else states
        found = rotary.rotary_attention(given_states, cos, sin, H, G, 0.3, rotary.plan_tree_rows(tree))
        gradients = torch.autograd.grad(found, states, g)
    limit = 1e-5 if dtype == torch.float32 else 0.05  # bfloat16: rounded products in a row
    for one, other in zip(
        (found, *gradients), (expected, *torch.autograd.grad(expected, exact, g.double())), strict=True
    ):
        one, other = one.detach().double(), other.detach()
        assert float((one - other).abs().max()) <= limit * max(1.0, float(other.abs().max()))


def test_branches_are_computed_together_while_that_is_little_work() -> None:
    assert len(rotary.plan_tree_rows([30, *range(8, 40)]).keys) == 2  # the prefix, and all branches
    assert len(rotary.plan_tree_rows([30, 400, 420, 900, 910, 920]).keys) == 3
    assert all(block.width % 16 == 0 for keys in rotary.plan_rows(3, 150).keys for block in keys.blocks)


ROWS = [
    {"input_ids": [1, 2, 3, 4, *range(5 + i, 12 + 2 * i)], "labels": [-100] * (5 + i) + [*range(10, 16)]}
    for i in range(4)
]


def gradients(kind: str, paths: FastPaths, batch: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Any:
    model = speed_up(zoo_model(kind).to(dtype), paths)
    inject(model, LoraConfig(r=4, target_modules="all-linear"))
    choose_arithmetic(model, paths)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.train()
    batch = {**batch, "labels": batch["labels"].clamp(max=model.config.vocab_size - 1)}
    loss = supervised_loss(model, model.get_output_embeddings(), batch, dtype, rounded=paths.rounded)
    loss.backward()
    return model, loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@BUILT
@pytest.mark.parametrize("kind", ["llama", "phi3", "mistral", "qwen2"])
@pytest.mark.parametrize("layout", [padded_batch, tree_batch])
@pytest.mark.parametrize("rounded", [False, True])
def test_models_of_llamas_kind_take_them_and_learn_the_same(kind: str, layout: Any, rounded: bool) -> None:
    paths = FastPaths(rounded=rounded)
    model, loss, found = gradients(kind, paths, layout(ROWS, 0, rounded))
    layer = model.model.layers[0]
    assert "forward" in vars(layer.self_attn) and "forward" in vars(layer.mlp)
    _, expected_loss, expected = gradients(kind, FastPaths.none(), padded_batch(ROWS, 0))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-7)


@pytest.mark.parametrize("kind", ["gemma2", "qwen3", "gpt2", "falcon"])
def test_models_of_another_kind_keep_their_own(kind: str) -> None:
    model = speed_up(zoo_model(kind), FastPaths())
    assert not any("forward" in vars(m) and rotary.could_be_rotary(m) for m in model.modules())


def test_a_model_that_only_looks_alike_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo_model("llama")
    attention, mlp = type(model.model.layers[0].self_attn), type(model.model.layers[0].mlp)
    own, own_mlp = attention.forward, mlp.forward

    def turned(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = own(self, *args, **kwargs)
        return 1.5 * out, weights

    monkeypatch.setattr(attention, "forward", turned)
    monkeypatch.setattr(mlp, "forward", lambda self, x: own_mlp(self, x) + 1)
    speed_up(model, FastPaths())
    assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, attention | mlp))


def test_the_switch_and_a_missing_library_leave_everything_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise AssertionError("a compiled function was called")

    batch = tree_batch(ROWS, 0)
    _, expected, _ = gradients("llama", FastPaths.none(), padded_batch(ROWS, 0))
    for name in ("rms_norm", "silu_gate", "gather_heads", "causal_softmax"):
        monkeypatch.setattr(kernels, name, fails)
    for paths in (FastPaths(kernels=False), FastPaths()):
        model, loss, _ = gradients("llama", paths, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        assert not any("forward" in vars(m) for m in model.modules())
        monkeypatch.setattr(kernels, "library", lambda: None)


@BUILT
def test_answers_with_a_cache_and_masks_are_the_models_own() -> None:
    plain, fast = zoo_model("llama"), speed_up(zoo_model("llama"), FastPaths())
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    both = [m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False).tolist() for m in (plain, fast)]
    assert both[0] == both[1]


@BUILT
def test_a_copy_of_a_model_computes_with_its_own_weights() -> None:
    fast = speed_up(zoo_model("llama"), FastPaths())
    other = copy.deepcopy(fast)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = fast(input_ids=ids, use_cache=False).logits
        for parameter in other.parameters():
            parameter.mul_(1.5)
        assert torch.equal(fast(input_ids=ids, use_cache=False).logits, before)
        assert not torch.allclose(other(input_ids=ids, use_cache=False).logits, before)


def test_what_was_not_built_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from phinetune.systems.machine import this_machine

    notes: list[str] = []
    speed_up(zoo_model("llama"), FastPaths(), lambda event: notes.append(getattr(event, "text", "")))
    assert bool(notes) == (kernels.library() is None)
    monkeypatch.setattr(kernels, "library", lambda: None)
    speed_up(zoo_model("llama"), FastPaths(), lambda event: notes.append(getattr(event, "text", "")))
    assert "compiled functions" in notes[-1]
    assert any("compiled functions" in line for line in this_machine().missing)
