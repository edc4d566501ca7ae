"""The output head's loss without logits, in matrix tiles or vectors: as near to the exact one as with them, whatever the scores; taken where it serves only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from phinetune.data.batches import padded_batch
from phinetune.model.fast import FastPaths
from phinetune.training import head_tiles
from phinetune.training.cross_entropy import chunked_cross_entropy
from phinetune.training.estimate_model import without_numbers
from phinetune.training.estimate_run import trace_step
from phinetune.training.loss import supervised_loss
from zoo import zoo_model

pytestmark = pytest.mark.usefixtures("each_way_of_multiplying")
TILES = pytest.mark.skipif(head_tiles.library() is None, reason="nothing that multiplies bfloat16, or no compiler")
EPS = torch.finfo(torch.bfloat16).eps


def operands(rows: int, words: int, width: int, size: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (rows, width), a weight (words, width) with which scores have the standard deviation `size`, targets (rows) with one that is not counted."""
    make = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, width, generator=make) for n in (rows, words))
    targets = torch.randint(0, words, (rows,), generator=make)
    targets[0], targets[-1] = words - 1, 0
    targets[rows // 2] = -100 if rows > 2 else targets[rows // 2]
    return hidden.bfloat16(), (size * weight / width**0.5).bfloat16(), targets


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The losses (rows) and their gradients of hidden, float64."""
    x = hidden.double().requires_grad_()
    losses = nn.functional.cross_entropy(x @ weight.double().T, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]


def check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    losses, gradient, _ = head_tiles.head_loss(hidden, weight, targets, True)
    expected, of_hidden = exact(hidden, weight, targets)
    largest = float((hidden.float() @ weight.float().T).abs().max())  # float32's last digits of such a score
    torch.testing.assert_close(losses, expected.float(), rtol=1e-5, atol=1e-5 + 2e-7 * largest)
    p_of_target = (-expected).exp()[:, None]  # the gradient is a difference of what W has at the target and its mean
    least = EPS * (1 - p_of_target) * weight.double().norm(dim=1).max()
    assert bool(
        ((gradient.double() - of_hidden).norm(dim=1) <= (EPS * of_hidden.norm(dim=1) + least[:, 0] + 1e-12)).all()
    )
    assert not bool(gradient[targets == -100].any()) and not bool(losses[targets == -100].any())
    torch.testing.assert_close(head_tiles.head_loss(hidden, weight, targets, False)[0], losses, rtol=0, atol=0)


@TILES
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 300])
@pytest.mark.parametrize(("words", "width"), [(32, 32), (544, 64), (4096 + 96, 96), (1024, 1088)])
def test_losses_and_gradients_are_the_exact_ones(rows: int, words: int, width: int) -> None:
    check(*operands(rows, words, width))


@TILES
@pytest.mark.parametrize("size", [0.01, 30.0, 300.0])
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_whatever_order_scores_come_in(size: float, order: str) -> None:
    hidden, weight, targets = operands(40, 6400, 64, size)
    with torch.no_grad():
        rank = (weight.float() @ hidden[0].float()).argsort(descending=order == "falling")
    weight = weight[rank].contiguous()  # of the first row each score is higher, or lower, than the one before
    check(hidden, weight, targets)


@TILES
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 130), st.integers(1, 40), st.integers(1, 12), st.floats(0.1, 50.0), st.integers(0, 10**6))
def test_drawn_sizes(rows: int, words: int, width: int, size: float, seed: int) -> None:
    check(*operands(rows, 32 * words, 32 * width, size, seed))


@TILES
@pytest.mark.parametrize("sure", [5.0, 15.0, 30.0])
def test_a_gradient_is_exact_to_its_own_size_where_the_target_is_nearly_certain(sure: float) -> None:
    hidden, weight, targets = operands(40, 640, 64, 1.0)
    targets[20] = 7
    weight = torch.nn.functional.normalize(weight.float(), dim=1)
    hidden = (sure * weight[targets]).bfloat16()  # a row's highest score is its target's
    losses, gradient, _ = head_tiles.head_loss(hidden, weight.bfloat16(), targets, True)
    expected, of_hidden = exact(hidden, weight.bfloat16(), targets)
    assert sure < 30 or float(expected.max()) < 1e-5
    torch.testing.assert_close(losses, expected.float(), rtol=1e-4, atol=1e-14)  # float64's digits
    assert bool(((gradient.double() - of_hidden).norm(dim=1) <= 1.5 * EPS * of_hidden.norm(dim=1) + 1e-13).all())


@TILES
def test_it_is_as_exact_as_with_logits() -> None:
    hidden, weight, targets = operands(48, 4096, 576)
    _, expected = exact(hidden, weight, targets)
    x = hidden.clone().requires_grad_()
    errors = []
    for tiles in (True, False):
        found = torch.autograd.grad(chunked_cross_entropy(x, weight, None, targets, tiles=tiles), x)[0]
        errors.append(float((found.double() - expected).norm()))
    assert errors[0] <= 1.05 * errors[1]


@TILES
def test_the_number_of_threads_changes_no_bit() -> None:
    given_, found, threads = operands(100, 3200, 128), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(head_tiles.head_loss(*given_, True)[:2])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@TILES
def test_what_is_no_number_stays_none_in_its_row() -> None:
    hidden, weight, targets = operands(40, 640, 64)
    expected = head_tiles.head_loss(hidden, weight, targets, True)
    hidden[3, 5], hidden[7, 1] = float("nan"), float("inf")
    losses, gradient, _ = head_tiles.head_loss(hidden, weight, targets, True)
    for row in range(40):
        if row in (3, 7):
            assert bool(losses[row].isnan()) and bool(gradient[row].isnan().all())
        else:
            assert torch.equal(losses[row], expected[0][row]) and torch.equal(gradient[row], expected[1][row])


@TILES
@pytest.mark.parametrize("wrong", [-1, -99, 640])
def test_a_target_that_is_no_word_is_an_error(wrong: int) -> None:
    hidden, weight, targets = operands(40, 640, 64)
    targets[11] = wrong
    with pytest.raises(IndexError, match="640 words"):
        head_tiles.head_loss(hidden, weight, targets, True)


@TILES
def test_it_serves_what_it_can_compute() -> None:
    hidden, weight, targets = operands(65, 64, 64)
    assert head_tiles.serves(hidden, weight, targets)
    assert not head_tiles.serves(hidden.float(), weight.float(), targets)
    assert not head_tiles.serves(hidden, weight[:33], targets) and not head_tiles.serves(
        hidden[:0], weight, targets[:0]
    )
    assert not head_tiles.serves(hidden[:, ::2], weight[:, ::2], targets)
    assert not head_tiles.serves(hidden, weight, targets.int())
    wide = operands(65, 64, head_tiles.WIDEST + 32)
    assert not head_tiles.serves(*wide) and head_tiles.serves(
        wide[0][: head_tiles.FEW], wide[1], wide[2][: head_tiles.FEW]
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert not head_tiles.serves(hidden, weight, targets)


@TILES
@pytest.mark.parametrize("tiles", [True, False])
def test_a_model_takes_it_with_its_switch_only(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = head_tiles.head_loss

    def counting(*args: Any) -> Any:
        calls.append(len(args[0]))
        return own(*args)

    monkeypatch.setattr(head_tiles, "head_loss", counting)
    model = zoo_model("llama").bfloat16().requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    rows = [{"input_ids": list(range(3, 60)), "labels": [-100] * 20 + list(range(23, 60))} for _ in range(2)]
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # not those that are trained
    batch, fits = (
        padded_batch(rows, 0),
        head_tiles.serves(torch.empty(1, head.in_features).bfloat16(), head.weight, torch.zeros(1).long()),
    )
    loss = supervised_loss(model, head, batch, torch.bfloat16, tiles=tiles)
    (gradient,) = torch.autograd.grad(loss, embeddings.weight)
    assert calls == ([74] if tiles and fits else []) and (fits or not tiles)
    theirs = supervised_loss(model, head, batch, torch.bfloat16, chunked=False)
    (expected,) = torch.autograd.grad(theirs, embeddings.weight)
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=2e-3)
    assert float((gradient - expected).float().norm()) < 0.05 * float(expected.float().norm())


@TILES
def test_smoothing_a_bias_and_a_trained_head_take_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_tiles, "head_loss", None)
    hidden, weight, targets = operands(40, 640, 64)
    hidden.requires_grad_()
    chunked_cross_entropy(hidden, weight, None, targets, 0.1).backward()
    chunked_cross_entropy(hidden, weight, torch.zeros(640).bfloat16(), targets).backward()
    chunked_cross_entropy(hidden, weight.clone().requires_grad_(), None, targets).backward()


@TILES
def test_the_forecast_sees_its_operations_and_memory() -> None:
    hidden, weight, targets = operands(40, 640, 64)
    with FlopCounterMode(display=False) as counter:
        head_tiles.head_loss(hidden, weight, targets, True)
    assert counter.get_total_flops() == 4 * 40 * 64 * 640
    rows = [{"input_ids": list(range(3, 60)), "labels": [-100] * 20 + list(range(23, 60))}]
    for tiles in (True, False):
        model = zoo_model("llama").bfloat16()
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        trace = trace_step(without_numbers(model), padded_batch(rows, 0), fast_paths=FastPaths(tiles=tiles))
        assert any("head_loss" in str(call.operator) for call in trace.calls) is tiles
        logits = [peak.parts.get("logits", 0) for peak in trace.peaks.values()]
        assert (max(logits) == 0) is tiles
