"""All products of LoRA layers in one call: the same as one by one, in every shape; taken where they serve, and nowhere else."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phinetune.data.batches import padded_batch, tree_batch
from phinetune.lora import tiles
from phinetune.lora.arithmetic import choose_arithmetic
from phinetune.lora.config import LoraConfig
from phinetune.lora.functional import lora_linear, lora_linear_reference
from phinetune.lora.group import SharedInputFunction, shared_linears_reference
from phinetune.lora.injection import inject, lora_layers
from phinetune.model import kernels
from phinetune.model.fast import FastPaths, speed_up
from phinetune.training.estimate_model import without_numbers
from phinetune.training.estimate_run import trace_step
from phinetune.training.loss import supervised_loss
from zoo import zoo_model

pytestmark = pytest.mark.usefixtures("each_way_of_multiplying")
TILES = pytest.mark.skipif(tiles.library() is None, reason="nothing that multiplies bfloat16, or no compiler")
OF_FACTORS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
Layer = tuple[Tensor, Tensor | None, Tensor, Tensor]


def operands(rows: int, width: int, layers: list[tuple[int, int]], dtype: torch.dtype) -> tuple[Tensor, list[Layer]]:
    """x (rows, width) and a layer for each (out, r); numbers of about 1 everywhere."""
    torch.manual_seed(rows + width)
    x = torch.randn(rows, width).bfloat16().requires_grad_()
    made: list[Layer] = []
    for out, r in layers:
        A = (torch.randn(r, width) * width**-0.5).to(dtype).requires_grad_()
        B = (torch.randn(out, r) * r**-0.5).to(dtype).requires_grad_()
        made.append(((torch.randn(out, width) * width**-0.5).bfloat16(), None, A, B))
    return x, made


def by_tiles(x: Tensor, layers: list[Layer], scaling: float) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = tiles.TilesFunction.apply(x, scaling, *(t for W, _, A, B in layers for t in (W, A, B)))  # type: ignore[no-untyped-call]
    return result


def gradients(x: Tensor, layers: list[Layer], results: Any, g: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(results, [x, *(t for layer in layers for t in layer[2:])], g))


def close(found: Tensor, exact: Tensor, limit: float) -> None:
    found, exact = found.detach(), exact.detach()
    scale = float(exact.abs().max())
    assert found.shape == exact.shape and float((found.double() - exact).abs().max()) <= limit * scale


def as_the_reference(x: Tensor, made: list[Layer], scaling: float) -> tuple[Any, list[Tensor]]:
    """Results and gradients by tiles, held against those in float64."""
    found = by_tiles(x, made, scaling)
    torch.manual_seed(1)
    g = [torch.randn(y.shape).bfloat16() for y in found]
    x64 = x.detach().double().requires_grad_()
    exact = [
        (W.double(), None, A.detach().double().requires_grad_(), B.detach().double().requires_grad_())
        for W, _, A, B in made
    ]
    expected = [lora_linear_reference(x64, W, None, A, B, scaling) for W, _, A, B in exact]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is torch.bfloat16
        close(one, other, 0.012)  # bfloat16 keeps 8 bits, and x A^T is rounded on the way
    of_found = gradients(x, made, found, g)
    of_exact = gradients(x64, exact, expected, [one.double() for one in g])
    for one, other, like in zip(of_found, of_exact, [x, *(t for layer in made for t in layer[2:])], strict=True):
        assert one.dtype is like.dtype
        close(one, other, 0.02)
    return found, of_found


@TILES
@OF_FACTORS
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(32, 200),
    width=st.integers(1, 6),
    layers=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 70)), min_size=1, max_size=4),
    scaling=st.sampled_from([1.0, 0.3, 2.0]),
)
def test_results_and_gradients_are_those_of_the_reference(
    dtype: torch.dtype, rows: int, width: int, layers: list[tuple[int, int]], scaling: float
) -> None:
    x, made = operands(rows, 32 * width, [(32 * out, r) for out, r in layers], dtype)
    assert tiles.usable(x, made)
    as_the_reference(x, made, scaling)


@TILES
@pytest.mark.parametrize(
    ("rows", "width", "layers"),
    [(1250, 1120, [(1504, 16), (96, 40)]), (2300, 64, [(2080, 8)]), (40, 2176, [(32, 4), (64, 4), (2240, 33)])],
    ids=["rows and depths are cut", "many rows", "depths are cut"],
)
def test_large_products_are_cut_and_the_same_for_any_number_of_threads(
    rows: int, width: int, layers: list[tuple[int, int]]
) -> None:
    x, made = operands(rows, width, layers, torch.float32)
    now, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(as_the_reference(x, made, 0.5))
    finally:
        torch.set_num_threads(now)
    for results, grads in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip((*results, *grads), (*runs[0][0], *runs[0][1]), strict=True))


@TILES
def test_what_is_put_aside_is_counted() -> None:
    x, made = operands(1250, 1120, [(1504, 16), (96, 40)], torch.float32)
    W, A, B = ([layer[i] for layer in made] for i in (0, 2, 3))
    for back, least in ((False, 1250 * 1120), (True, 1250 * 1600)):
        results = tiles._forward_results(x, W, A, B, 1.0)
        if back:
            results = tiles._backward_results(x, results[-2], [], W, A, B, 1.0, True)
        assert least < results[-1].numel() < 4 * least and results[-1].dtype is torch.bfloat16


@TILES
def test_sums_are_nearer_to_the_exact_ones_than_one_by_one() -> None:
    x, made = operands(96, 256, [(128, 16), (64, 16)], torch.float32)
    exact = [
        lora_linear_reference(x.double(), W.double(), None, A.double(), B.double(), 0.5).detach() for W, _, A, B in made
    ]
    ours = by_tiles(x, made, 0.5)
    theirs = SharedInputFunction.apply(x, 0.5, False, *(t for layer in made for t in layer))  # type: ignore[no-untyped-call]

    def error(results: Any) -> float:
        return sum(float((y.detach().double() - e).square().mean()) for y, e in zip(results, exact, strict=True))

    assert error(ours) <= error(theirs)


@TILES
def test_a_row_that_is_no_number_spoils_no_other() -> None:
    x, made = operands(70, 64, [(96, 8)], torch.float32)
    broken = x.detach().clone()
    broken[33, 5] = float("nan")
    (y,) = by_tiles(broken, made, 1.0)
    whole = torch.arange(70) != 33
    assert y[33].isnan().all() and torch.equal(y[whole], by_tiles(x, made, 1.0)[0][whole])


@TILES
def test_a_result_that_nobody_uses_counts_as_nothing() -> None:
    x, made = operands(40, 64, [(96, 8), (32, 4)], torch.float32)
    first, _ = by_tiles(x, made, 1.0)
    (alone,) = by_tiles(x, made[:1], 1.0)
    g = torch.randn(first.shape).bfloat16()
    found = gradients(x, made, [first], [g])
    expected = gradients(x, made[:1], [alone], [g])
    for one, other in zip(found[:3], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert not any(rest.any() for rest in found[3:])


@TILES
def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    x, made = operands(40, 64, [(96, 8)], torch.float32)
    (y,) = by_tiles(x, made, 1.0)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@TILES
@pytest.mark.parametrize(
    "change",
    [
        lambda x, W, b, A, B: (x.float(), W, b, A, B),
        lambda x, W, b, A, B: (x[:31], W, b, A, B),
        lambda x, W, b, A, B: (x, W, torch.zeros(96).bfloat16(), A, B),
        lambda x, W, b, A, B: (x, W.float(), b, A, B),
        lambda x, W, b, A, B: (x, W.t().contiguous().t(), b, A, B),
        lambda x, W, b, A, B: (x, W.clone().requires_grad_(), b, A, B),
        lambda x, W, b, A, B: (x, W[:80], b, A, B[:80]),
        lambda x, W, b, A, B: (x[:, :48], W[:, :48].contiguous(), b, A[:, :48].contiguous(), B),
        lambda x, W, b, A, B: (x, W, b, A.double(), B.double()),
        lambda x, W, b, A, B: (x, W, b, A, B.bfloat16()),
        lambda x, W, b, A, B: (x, W, b, A.t().contiguous().t(), B),
        lambda x, W, b, A, B: (x, W, b, A[:0], B[:, :0].contiguous()),
        lambda x, W, b, A, B: (x.to("meta"), W, b, A, B),
    ],
)
def test_what_tiles_do_not_serve_goes_the_other_way(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, ((W, _, A, B),) = operands(40, 64, [(96, 8)], torch.float32)
    assert tiles.usable(x, [(W, None, A, B)])
    x, W, b, A, B = change(x.detach(), W, None, A.detach(), B.detach())
    assert not tiles.usable(x, [(W, b, A, B)])
    monkeypatch.setattr(tiles, "lora_products", None)
    if x.device.type == "cpu" and W.dtype is x.dtype:
        found = tiles.lora_linear_tiles(x, W, b, A, B, 0.5)
        assert torch.equal(found, lora_linear(x, W, b, A, B, 0.5))


@TILES
def test_shapes_that_do_not_fit_are_torchs_error_as_ever() -> None:
    x, ((W, _, A, B),) = operands(40, 64, [(96, 8)], torch.float32)
    wider, other = torch.randn(40, 96).bfloat16(), torch.randn(8, 96)
    assert not tiles.usable(x, [(W, None, A, B[:64])])  # factors of a slice
    assert not tiles.usable(x[:, :0], [(W[:, :0], None, A[:, :0], B)])
    for operand, weight, low, high in ((wider, W, A, B), (x, W, other, B), (x, W, A[:4], B)):
        assert not tiles.usable(operand, [(weight, None, low, high)])
        with pytest.raises(RuntimeError):
            tiles.lora_linear_tiles(operand, weight, None, low, high, 1.0)


@TILES
@pytest.mark.parametrize("count", [1, 3])
def test_results_may_be_changed_in_place(count: int) -> None:
    x, made = operands(40, 64, [(96, 8)] * count, torch.float32)
    x3 = x.detach().view(2, 20, 64).requires_grad_()
    found = by_tiles(x3, made, 1.0)
    assert all(y.shape == (2, 20, 96) for y in found)
    kept = [y.detach().clone() for y in found]
    total = sum(y.clamp_(-0.5, 0.5).float().sum() for y in found)
    (dx,) = torch.autograd.grad(total, x3)
    inside = [(y.abs() <= 0.5).to(y.dtype) for y in kept]
    (expected,) = torch.autograd.grad(by_tiles(x3, made, 1.0), x3, inside)
    torch.testing.assert_close(dx, expected, rtol=0.02, atol=0.02)


@TILES
@pytest.mark.parametrize("how", ["mask", "folded", "spans", "autocast", "vmap", "too many"])
def test_calls_that_tiles_do_not_serve_go_the_other_way(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, ((W, _, A, B),) = operands(40, 64, [(96, 8)], torch.float32)
    monkeypatch.setattr(tiles, "lora_products", None)
    if how == "too many":
        assert not tiles.usable(x, [(W, None, A, B)] * 9)
        return
    last: tuple[Any, ...] = {
        "mask": (torch.ones_like(x),),
        "folded": (None, None, True),
        "spans": (None, ((0, 32), (64, 96))),
    }.get(how, ())
    B = B[:64] if how == "spans" else B
    A = torch.cat([A, A]) if how == "spans" else A
    if how == "vmap":
        found = torch.vmap(lambda one: tiles.lora_linear_tiles(one, W, None, A, B, 1.0))(x[None])[0]
        torch.testing.assert_close(found, lora_linear(x, W, None, A, B, 1.0), rtol=0.05, atol=0.05)
        return
    with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext():
        found = tiles.lora_linear_tiles(x, W, None, A, B, 1.0, *last)
        assert torch.equal(found, lora_linear(x, W, None, A, B, 1.0, *last))


def rows() -> list[dict[str, list[int]]]:
    return [{"input_ids": list(range(5, 30 + i)), "labels": [-100] * 15 + list(range(20, 30 + i))} for i in range(4)]


def trained(paths: FastPaths, kind: str = "llama", **options: Any) -> Any:
    model = speed_up(zoo_model(kind, **options).to(torch.bfloat16), paths, lambda event: None)
    inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), on_event=lambda event: None)
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.05)
    choose_arithmetic(model, paths)
    return model


def learned(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = supervised_loss(model, model.get_output_embeddings(), batch, torch.bfloat16)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}


@TILES
@pytest.mark.parametrize("layout", [lambda r: padded_batch(r, 0), tree_batch], ids=["padded", "tree"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "mistral"])
def test_a_model_learns_by_them_what_it_learns_without(kind: str, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, calls = layout(rows()), list[int]()
    products = tiles.lora_products

    def counted(*args: Any) -> Any:
        calls.append(len(args[1]))
        return products(*args)

    monkeypatch.setattr(tiles, "lora_products", counted)
    found = learned(trained(FastPaths(layers=False), kind, **WIDE), batch)
    assert max(calls) == {"llama": 3, "phi3": 1, "mistral": 3}[kind] and 1 in calls
    calls.clear()
    expected = learned(trained(FastPaths(tiles=False), kind, **WIDE), batch)
    exact = learned(trained(FastPaths(tiles=False), kind, **WIDE).float(), batch)
    assert not calls and found.keys() == expected.keys() == exact.keys()

    def error(values: dict[str, Tensor]) -> float:
        return sum(float((values[k].double() - exact[k].double()).norm() / exact[k].double().norm()) for k in exact)

    assert error(found) <= 1.2 * error(expected)  # rounding alone, and no more of it


@TILES
def test_layers_by_themselves_and_copies_compute_with_their_own_weights() -> None:
    model = trained(FastPaths(grouped=False), **WIDE)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.shared is None and layer.arithmetic is tiles.lora_linear_tiles
    x = torch.randn(40, 64).bfloat16()
    expected = shared_linears_reference(x, [layer])[0]
    torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.02)
    other = copy.deepcopy(layer)
    other.lora_B.data.zero_()
    assert torch.equal(other(x), tiles.lora_linear_tiles(x, layer.weight, None, layer.lora_A, other.lora_B, 1.0))


@TILES
def test_the_switches_and_other_processors_leave_everything_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for paths in (FastPaths(tiles=False), FastPaths.none(), FastPaths(linear=False), FastPaths(compiled=True)):
        layer: Any = trained(paths).model.layers[0].self_attn.o_proj
        assert layer.arithmetic in (lora_linear, lora_linear_reference)
    monkeypatch.setattr(tiles, "library", lambda: None)
    layer = trained(FastPaths()).model.layers[0].self_attn.o_proj
    assert layer.arithmetic is lora_linear


@TILES
def test_the_planner_sees_them_with_all_their_arithmetic() -> None:
    batch, counted = padded_batch(rows(), 0), []
    for paths in (FastPaths(kernels=False), FastPaths(kernels=False, tiles=False)):
        trace = trace_step(without_numbers(trained(paths, **WIDE)), batch, fast_paths=paths)
        names = {str(call.operator) for call in trace.calls}
        assert any("lora_products_backward" in name for name in names) is paths.tiles
        counted.append(sum(call.flops * n for call, n in trace.calls.items()))
    assert counted[0] == counted[1] > 0


def test_a_library_of_an_earlier_build_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = SimpleNamespace(tiles_usable=lambda: 1, lora_forward=lambda layers: 0)
    monkeypatch.setattr(kernels, "built", lambda path: earlier)
    assert kernels.built_for_tiles(Path("_tiles"), "lora_forward") is None
