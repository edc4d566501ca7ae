"""int4-aware LoRA: training's forward is the merged, quantized model, its gradients are LoRA's own, and nothing stale is multiplied with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from phinetune.errors import ConfigError
from phinetune.lora.arithmetic import choose_arithmetic
from phinetune.lora.config import LoraConfig
from phinetune.lora.functional import lora_linear, lora_linear_reference
from phinetune.lora.injection import inject
from phinetune.lora.layer import lora_layers
from phinetune.lora.linear import MergedLinear
from phinetune.lora.merging import merge
from phinetune.lora.rounding import forget_rounded, round_model
from phinetune.model.fast import FastPaths
from phinetune.model.grid import Grid, quantize, round_to_grid
from tiny import tiny_model

IDS = torch.tensor([[1, 7, 42, 100, 5, 200], [3, 9, 27, 81, 11, 2]])
GRID = Grid(4, 16, True)


def aware(
    architecture: str, stored: torch.dtype = torch.float32, grid: Grid = GRID, tie: bool = False, **lora: Any
) -> Any:
    """A tiny model with factors that are not zero, trained for a grid."""
    torch.manual_seed(0)
    model = tiny_model(architecture, tie)
    model.to(stored).float()  # on disk in `stored`, computed in float32
    inject(model, LoraConfig(r=4, **{"target_modules": "all-linear", **lora}), on_event=lambda event: None)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    choose_arithmetic(model, FastPaths())
    model.unrounded = {n: m.weight.detach().clone() for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    round_model(model, grid, stored)
    return model.train()


def shipped(model: Any, stored: torch.dtype, grid: Grid) -> Any:
    """The same model merged, written in `stored`, and quantized, each layer by the reference."""
    plain = copy.deepcopy(model)
    for layer in lora_layers(plain).values():
        layer.__dict__["rounding"] = None
    merge(plain)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = model.unrounded.get(name, module.weight)  # layers without factors, as they are on disk
            module.weight.data = quantize(weight.to(stored), grid).dense()
    return plain


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [GRID, Grid(4, 32, False), Grid(8, 16, True)])
def test_training_computes_the_merged_quantized_model_bit_for_bit(
    architecture: str, stored: torch.dtype, grid: Grid
) -> None:
    model = aware(architecture, stored, grid)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, shipped(model, stored, grid)(IDS).logits)


def test_an_embedding_that_is_the_output_layer_is_rounded_with_it() -> None:
    model = aware("llama", tie=True)
    assert torch.equal(model.get_input_embeddings().weight, quantize(model.unrounded["lm_head"], GRID).dense())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, shipped(model, torch.float32, GRID)(IDS).logits)


def test_some_layers_without_factors_and_slices_of_fused_ones() -> None:
    model = aware("phi3", target_modules=["q_proj", "v_proj", "down_proj"])
    assert any(isinstance(m, MergedLinear) for m in lora_layers(model).values())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, shipped(model, torch.float32, GRID)(IDS).logits)


def test_gradients_are_those_of_the_straight_through_estimator() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    W, A, B = (torch.randn(*s, dtype=torch.float64) for s in ((6, 32), (3, 32), (6, 3)))
    A.requires_grad_(), B.requires_grad_()
    merged = W + 0.5 * B @ A
    rounded = merged + (round_to_grid(merged.detach().float(), GRID).double() - merged).detach()
    expected = F.linear(x, rounded)
    g = torch.randn_like(expected)
    for function in (lora_linear, lora_linear_reference):
        y = function(x, rounded.detach(), None, A, B, 0.5, folded=True)
        assert torch.equal(y, expected)
        for ours, theirs in zip(
            torch.autograd.grad(y, (x, A, B), g),
            torch.autograd.grad(expected, (x, A, B), g, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_every_switch_gives_the_same_gradients(architecture: str) -> None:
    model = aware(architecture)
    found = []
    for paths in (FastPaths(), FastPaths(grouped=False), FastPaths.none()):
        choose_arithmetic(model, paths)
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for other in found[1:]:
        for name, grad in found[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", ["step", "step on data", "load", "merge and back"])
def test_nothing_stale_is_multiplied_with(change: str) -> None:
    model = aware("llama")
    trained = [p for p in model.parameters() if p.requires_grad]
    before = model(IDS, labels=IDS)
    before.loss.backward()
    if change == "step":
        torch.optim.SGD(trained, lr=1.0).step()
    elif change == "step on data":  # what torch's counter of changes does not see

        class OnData(torch.optim.Optimizer):
            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                for p in trained:
                    p.data.add_(p.grad, alpha=-1.0)

        OnData(trained, {}).step()
    elif change == "load":
        model.load_state_dict({k: v * 2 if "lora_B" in k else v for k, v in model.state_dict().items()})
    else:
        with torch.no_grad():
            trained[0].mul_(3.0)
    with torch.no_grad():
        cached = model(IDS).logits
        forget_rounded(model)
        assert torch.equal(cached, model(IDS).logits)
        assert not torch.equal(cached, before.logits)


def test_the_rounded_weight_is_made_once_for_all_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from phinetune.lora.rounding import Rounding

    model, count = aware("llama"), 0
    made = Rounding._fold

    def counting(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        return made(self, *args)

    monkeypatch.setattr(Rounding, "_fold", counting)
    forget_rounded(model)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
    assert count == len(lora_layers(model))


def test_made_in_inference_mode_and_used_in_training() -> None:
    model = aware("llama")
    forget_rounded(model)
    with torch.inference_mode():
        model(IDS)
    model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout must be 0"),
        ({"use_dora": True}, "DoRA"),
    ],
)
def test_what_cannot_go_through_a_grid(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        aware("llama", **lora)


def test_blocks_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="do not divide"):
        aware("llama", grid=Grid(4, 256))
