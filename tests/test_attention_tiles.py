"""Attention in one call each way, in matrix tiles or vectors: nearer to the exact one than by operators, for every tree; taken where it serves only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from phinetune.data.batches import padded_batch, tree_batch
from phinetune.model import attention_tiles, rotary
from phinetune.model.attention import allowed_in_tree, attention_reference
from phinetune.model.fast import FastPaths, speed_up
from phinetune.training.estimate_model import without_numbers
from phinetune.training.estimate_run import trace_step
from phinetune.training.loss import supervised_loss
from zoo import zoo_model

pytestmark = pytest.mark.usefixtures("each_way_of_multiplying")
TILES = pytest.mark.skipif(attention_tiles.library() is None, reason="nothing that multiplies bfloat16, or no compiler")
HEADS = [(9, 3, 64, 64), (4, 4, 32, 16), (2, 2, 96, 96), (4, 2, 128, 64), (2, 1, 256, 256), (3, 3, 32, 2)]
SCALING = 0.3


def operands(T: int, heads: tuple[int, int, int, int], fused: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
    """(states, cos, sin) of T tokens, states side by side in one tensor if `fused`."""
    H, G, D, width = heads
    make = torch.Generator().manual_seed(T)
    states = [torch.randn(T, n * D, generator=make).bfloat16() for n in (H, G, G)]
    angle = torch.outer(torch.arange(T) % 97, torch.rand(width // 2, generator=make)).repeat(1, 2)
    states = [torch.cat(states, dim=1)] if fused else states
    return [x.requires_grad_() for x in states], angle.cos().bfloat16(), angle.sin().bfloat16()


def exact(states: Sequence[Tensor], cos: Tensor, sin: Tensor, heads: tuple[int, ...], allowed: Tensor) -> Tensor:
    T = len(states[0])
    q, k, v = (x.view(1, T, -1, heads[2]).transpose(1, 2) for x in attention_tiles.apart(states, *heads[:2]))
    q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    return attention_reference(q, k, v, SCALING, allowed).transpose(1, 2).reshape(T, -1)


def results(function: Any, states: list[Tensor]) -> list[Tensor]:
    """What `function` gives, and the gradients with respect to `states`."""
    out = function(states)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, states, g)]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of a result, as a share of its length; a gradient that should be nearly nothing is seen beside the others."""
    pairs = list(zip(found, expected, strict=True))
    assert all(a.shape == b.shape and a.isfinite().all() for a, b in pairs)
    least = 0.05 * max(float(b.norm()) for b in expected)
    return max(float((a.double() - b).norm()) / max(float(b.norm()), least) for a, b in pairs)


def check(plan: rotary.Plan, T: int, allowed: Tensor, heads: tuple[int, int, int, int], fused: bool) -> None:
    states, cos, sin = operands(T, heads, fused)

    def by(tiles: bool) -> list[Tensor]:
        return results(lambda x: rotary.rotary_attention(x, cos, sin, *heads[:2], SCALING, plan, tiles), states)

    wide = [x.detach().double().requires_grad_() for x in states]
    expected = results(lambda x: exact(x, cos.double(), sin.double(), heads, allowed), wide)
    assert error(by(True), expected) <= max(0.01, 1.2 * error(by(False), expected))


@TILES
@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 170), min_size=0, max_size=6),
    prefix=st.integers(0, 150),
    heads=st.sampled_from(HEADS),
    fused=st.booleans(),
)
def test_trees(lengths: list[int], prefix: int, heads: tuple[int, int, int, int], fused: bool) -> None:
    tree = [prefix, *lengths]
    if sum(tree):
        check(rotary.plan_tree_rows(tree), sum(tree), allowed_in_tree(tree), heads, fused)


@TILES
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 31), (2, 33), (1, 400), (5, 16)])
def test_rows(rows: int, length: int, heads: tuple[int, int, int, int]) -> None:
    allowed = torch.block_diag(*[torch.ones(length, length).tril()] * rows).bool()
    check(rotary.plan_rows(rows, length), rows * length, allowed, heads, fused=False)


@TILES
def test_scores_far_from_zero_lose_nothing() -> None:
    heads, tree = (3, 1, 64, 64), [40, 60, 90]
    states, cos, sin = operands(sum(tree), heads)
    states = [(3 * x).detach().requires_grad_() for x in states]
    plan = rotary.plan_tree_rows(tree)
    found = results(lambda x: rotary.rotary_attention(x, cos, sin, 3, 1, SCALING, plan, True), states)
    by_operators = results(lambda x: rotary.rotary_attention(x, cos, sin, 3, 1, SCALING, plan), states)
    wide = [x.detach().double().requires_grad_() for x in states]
    expected = results(lambda x: exact(x, cos.double(), sin.double(), heads, allowed_in_tree(tree)), wide)
    assert error(found[:1], expected[:1]) <= error(by_operators[:1], expected[:1])
    # rowsum(O * G) is of the rounded O, which shows where one key has nearly all the weight
    assert error(found, expected) <= 1.5 * error(by_operators, expected)


@TILES
def test_branches_do_not_see_each_other_nor_the_prefix_a_branch() -> None:
    heads, tree = (4, 2, 32, 32), [20, 40, 35, 50]
    states, cos, sin = operands(sum(tree), heads)
    plan = rotary.plan_tree_rows(tree)

    def out(x: list[Tensor]) -> Tensor:
        return rotary.rotary_attention(x, cos, sin, 4, 2, SCALING, plan, True)

    whole, broken = out(states).detach(), [x.detach().clone().requires_grad_() for x in states]
    for x in broken:
        x.data[62] = torch.nan  # the third token of the second branch
    result = out(broken)
    others = [i for i in range(sum(tree)) if not 60 <= i < 95]
    assert torch.equal(result[others], whole[others]) and result[62:95].isnan().all()
    result = out(states)
    g = torch.zeros_like(result)
    g[95:] = 1.0  # what the last branch learns comes from the prefix and itself
    for gradient in torch.autograd.grad(result, states, g):
        assert not gradient[20:95].any() and gradient[95:].any()


@TILES
def test_results_are_the_same_again_and_with_other_threads_but_for_the_last_digits() -> None:
    states, cos, sin = operands(300, (6, 3, 64, 64))
    plan, threads = rotary.plan_tree_rows([60, 100, 80, 60]), torch.get_num_threads()

    def found() -> list[Tensor]:
        return results(lambda x: rotary.rotary_attention(x, cos, sin, 6, 3, SCALING, plan, True), states)

    first = found()
    assert all(torch.equal(a, b) for a, b in zip(first, found(), strict=True))
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        other = found()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first[0], other[0])
    for a, b in zip(first, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(a.abs().max()))


@TILES
def test_gradients_without_gaps_are_not_asked_for_and_there_is_no_second_derivative() -> None:
    states, cos, sin = operands(50, (2, 1, 32, 32))
    out = rotary.rotary_attention(states, cos, sin, 2, 1, SCALING, rotary.plan_rows(1, 50), True)
    spread = torch.randn(64, 50).bfloat16().t()
    assert not spread.is_contiguous()
    spaced = torch.autograd.grad(out, states, spread, retain_graph=True)
    packed = torch.autograd.grad(out, states, spread.contiguous(), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(spaced, packed, strict=True))
    once = torch.autograd.grad(out, states, torch.ones_like(out).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once[0].float().sum().backward()


@TILES
@pytest.mark.parametrize(
    "how", ["float32", "narrow", "threads", "autocast", "prefix", "switch", "rows apart", "another plan"]
)
def test_what_tiles_do_not_serve_goes_the_other_way(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("by tiles")

    monkeypatch.setattr(attention_tiles, "attention_rows", refuse)
    heads = (2, 2, 24, 24) if how == "narrow" else (2, 2, 32, 32)
    states, cos, sin = operands(12, heads)
    if how == "float32":
        states, cos, sin = [x.detach().float() for x in states], cos.float(), sin.float()
    if how == "rows apart":
        states = [x.detach().t().contiguous().t() for x in states]
    if how == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    plan = rotary.plan_rows(1, 12)
    if how == "prefix":  # the prefix is not at the beginning
        plan = rotary.plan_attention([([], [range(2, 12)]), ([2, 3], [range(2)])], 12)
        assert plan.entries is None
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        if how == "rows apart":  # nor do the other functions read them: that they are not asked is enough
            assert not attention_tiles.usable(attention_tiles.apart(states, 2, 2), cos, sin, 2, 2, (0, 0, 0, 12))
            return
        if how == "another plan":
            assert attention_tiles.usable(states, cos, sin, 2, 2, (0, 0, 0, 12))
            assert not attention_tiles.usable(states, cos, sin, 2, 2, (0, 0, 0, 400))
            return
        out = rotary.rotary_attention(states, cos, sin, 2, 2, SCALING, plan, how != "switch")
    assert out.isfinite().all()


WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
ROWS = [
    {"input_ids": [1, 2, 3, 4, *range(5 + i, 40 + 2 * i)], "labels": [-100] * (33 + i) + [*range(10, 16)]}
    for i in range(4)
]


def model_by(paths: FastPaths, kind: str) -> Any:
    torch.manual_seed(0)
    return speed_up(zoo_model(kind, **WIDE).to(torch.bfloat16), paths, lambda event: None)


@TILES
@pytest.mark.parametrize("layout", [lambda rows: padded_batch(rows, 0), tree_batch], ids=["padded", "tree"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "mistral"])
def test_a_model_learns_by_it_what_it_learns_without(kind: str, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, calls, function = layout(ROWS), list[int](), attention_tiles.attention_rows_backward

    def counted(*args: Any) -> None:
        calls.append(1)
        function(*args)

    monkeypatch.setattr(attention_tiles, "attention_rows_backward", counted)

    def learned(model: Any) -> dict[str, Tensor]:
        supervised_loss(model, model.get_output_embeddings(), batch, model.dtype).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    found = learned(model_by(FastPaths(), kind))
    assert len(calls) == 2
    others = learned(model_by(FastPaths(tiles=False), kind)), learned(model_by(FastPaths.none(), kind).float())
    assert len(calls) == 2

    def apart(values: dict[str, Tensor]) -> float:
        return sum(
            float((values[k].double() - g.double()).norm() / g.double().norm().clamp_min(1e-12))
            for k, g in others[1].items()
        )

    assert apart(found) <= 1.2 * apart(others[0])


@TILES
def test_the_planner_sees_it_with_its_arithmetic() -> None:
    paths, counted = FastPaths(), dict[bool, int]()
    for tiles in (True, False):
        paths = FastPaths(tiles=tiles)
        trace = trace_step(without_numbers(model_by(paths, "llama")), padded_batch(ROWS, 0), fast_paths=paths)
        names = {str(call.operator) for call in trace.calls}
        assert any("attention_rows_backward" in name for name in names) is tiles
        counted[tiles] = sum(call.flops * n for call, n in trace.calls.items())
    assert 0.7 * counted[False] < counted[True] < counted[False]  # by operators, padding and unseen keys count


@TILES
def test_operations_are_those_between_queries_and_keys_that_they_see() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    states, cos, sin = operands(30, (4, 2, 32, 32))
    plan = rotary.plan_tree_rows([10, 5, 15])
    seen = 10 * 11 // 2 + 5 * 10 + 5 * 6 // 2 + 15 * 10 + 15 * 16 // 2
    with FlopCounterMode(display=False) as counter:
        rotary.rotary_attention(states, cos, sin, 4, 2, SCALING, plan, True).sum().backward()
    assert counter.get_total_flops() == 6 * 2 * seen * 4 * 32  # scores and output; two gradients of each
