"""Residual sums in the functions beside them: the numbers of the sums by themselves, taken where they serve, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.model import kernels, residual
from phinetune.model.fast import FastPaths, speed_up
from phinetune.model.norm import RMSNorm, rms_norm_reference
from phinetune.model.residual import could_be_decoder, joins, sum_and_norm
from phinetune.training.checkpointing import checkpoint_layers
from zoo import zoo_model

BUILT = pytest.mark.skipif(kernels.library() is None, reason="no compiler when phinetune was installed")


def parts(rows: int, width: int, dtype: torch.dtype) -> tuple[RMSNorm, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows * width)
    weight = torch.nn.Parameter(torch.randn(width).to(dtype), requires_grad=False)
    x, added = (torch.randn(1, rows, width).to(dtype).requires_grad_() for _ in range(2))
    return RMSNorm(weight, 1e-5), x, added


@BUILT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("used", ["both", "sum", "norm"])
@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 60), width=st.integers(4, 700), has_added=st.booleans())
def test_results_and_gradients_are_those_of_sum_and_norm(
    dtype: torch.dtype, used: str, rows: int, width: int, has_added: bool
) -> None:
    norm, x, a = parts(rows, width, dtype)
    added = a if has_added else None
    assert joins(norm, x, added)
    total, y = sum_and_norm(norm, x, added)
    exact = [t.detach().double().requires_grad_() for t in (x, a)]
    whole = exact[0] + exact[1] if has_added else exact[0]
    normed = rms_norm_reference(whole, norm.weight.double(), norm.eps)
    limit = 1e-5 if dtype is torch.float32 else 0.02
    grads = [torch.randn(x.shape).to(dtype) for _ in range(2)]
    loss, of_exact = torch.zeros(()), torch.zeros((), dtype=torch.double)
    for name, found, expected, g in (("sum", total, whole, grads[0]), ("norm", y, normed, grads[1])):
        assert found.dtype is dtype and found.shape == x.shape
        assert float((found.detach().double() - expected.detach()).abs().max()) <= limit * float(
            expected.detach().abs().max()
        )
        if used in ("both", name):
            loss, of_exact = loss + (found * g).float().sum(), of_exact + (expected * g.double()).sum()
    inputs = [x, a] if has_added else [x]
    found_grads = torch.autograd.grad(loss, inputs)
    exact_grads = torch.autograd.grad(of_exact, exact[: len(inputs)])
    for one, other in zip(found_grads, exact_grads, strict=True):
        assert one.dtype is dtype
        assert float((one.double() - other).abs().max()) <= limit * max(float(other.abs().max()), 1e-3)


@BUILT
@pytest.mark.parametrize("kind", ["llama", "phi3", "mistral"])
def test_layers_compute_what_their_own_forwards_do(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    for switched in (True, False):
        with monkeypatch.context() as patch:
            if not switched:
                patch.setattr(residual, "could_be_decoder", lambda module: False)
            model = speed_up(zoo_model(kind), FastPaths()).train()
        layers = [m for m in model.modules() if could_be_decoder(m)]
        assert layers and all(("forward" in vars(layer)) is switched for layer in layers)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" not in name)
        ids = torch.arange(2, 26).remainder(model.config.vocab_size).view(2, 12)
        loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append((loss, torch.autograd.grad(loss, trained)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@BUILT
def test_where_it_does_not_serve_sums_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x, added = parts(5, 32, torch.float32)
    monkeypatch.setattr(residual, "SumAndNorm", None)

    def own(norm: RMSNorm) -> None:
        total, y = sum_and_norm(norm, x, added)
        assert torch.equal(total, x + added) and torch.equal(y, norm(x + added))

    handle = norm.register_forward_hook(lambda *_: None)
    own(norm)
    handle.remove()
    own(RMSNorm(norm.weight, norm.eps, built=False))
    norm.weight.requires_grad_()
    own(norm)


def test_dropout_on_the_residual_way_is_left_to_the_model() -> None:
    layer: Any = zoo_model("phi3").model.layers[0]
    assert could_be_decoder(layer)
    layer.resid_mlp_dropout = torch.nn.Dropout(0.1)
    assert not could_be_decoder(layer)


@BUILT
def test_arguments_by_place_go_to_the_layers_own_forward() -> None:
    model = speed_up(zoo_model("llama"), FastPaths())
    layer, plain = model.model.layers[0], zoo_model("llama").model.layers[0]
    x, position = torch.randn(1, 4, model.config.hidden_size), torch.arange(4)[None]
    angles = model.model.rotary_emb(x, position)
    assert torch.allclose(
        layer(x, None, position, position_embeddings=angles),
        plain(x, None, position, position_embeddings=angles),
        atol=1e-5,
    )


@BUILT
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_layers_are_checkpointed_as_their_own_forwards_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers checkpoints around a layer's own forward, which ours stands in the place of."""
    computed: list[Any] = []
    layer = residual.layer
    monkeypatch.setattr(
        residual, "layer", lambda module, *args, **kwargs: (computed.append(module), layer(module, *args, **kwargs))[1]
    )
    ids = torch.arange(2, 26).remainder(128).view(2, 12)
    gradients = []
    for count in (0, "all"):
        model = speed_up(zoo_model(kind), FastPaths()).train()
        assert checkpoint_layers(model, count) == {0: 0, "all": 1}[count]  # of two; the last one never is
        computed.clear()
        model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
        assert [computed.count(one) for one in model.model.layers] == [1 if count == 0 else 2, 1]
        gradients.append([p.grad for p in model.parameters()])
        if count:  # with a cache, transformers' own forward knows what to do
            computed.clear()
            model(input_ids=ids, use_cache=True)
            assert computed == [model.model.layers[1]]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
