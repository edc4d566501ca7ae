"""AdamW in one call beside torch's own: the same steps, clipping and state, resumed in either, and who steps when it cannot serve."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from phinetune.lora.adapter import WEIGHTS_FILE
from phinetune.training import adamw
from phinetune.workflow.finetune import finetune

SHAPES = ((16, 576), (1536, 16), (3,), (), (8200,), (5, 8193), (1,))
CONFIG: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
needs_built = pytest.mark.skipif(adamw.library() is None, reason="the compiled functions were not built")


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * (1.0 if step % 3 else 1e-4) for shape in SHAPES]


def groups(of: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": of[:3], "weight_decay": 0.1}, {"params": of[3:], "lr": 3e-3, "weight_decay": 0.0}]


def pair() -> tuple[list[nn.Parameter], Any, list[nn.Parameter], Any]:
    ours, torchs = parameters(), parameters()
    return (
        ours,
        adamw.AdamW(groups(ours), lr=1e-3, fused=True),
        torchs,
        torch.optim.AdamW(groups(torchs), lr=1e-3, fused=True),
    )


def step_both(ours: list[nn.Parameter], a: Any, torchs: list[nn.Parameter], b: Any, step: int) -> None:
    """One clipped step of each; of every second tensor the gradient is missing in each fifth step."""
    for i, (p, q, g) in enumerate(zip(ours, torchs, gradients(step), strict=True)):
        missing = step % 5 == 4 and i % 2
        p.grad, q.grad = (None, None) if missing else (g.clone(), g.clone())
    expected, norm = torch.nn.utils.clip_grad_norm_(torchs, 1.0), a.gradient_norm()
    assert (norm is None) == (step > 4 and step % 5 != 4)
    if norm is None:
        torch.nn.utils.clip_grad_norm_(ours, 1.0)
    else:
        assert norm == pytest.approx(float(expected), rel=1e-5)
        a.clip = adamw.clipping(norm, 1.0)
    a.step()
    b.step()


def assert_alike(ours: list[nn.Parameter], a: Any, torchs: list[nn.Parameter], b: Any) -> None:
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert float(a.state[p]["step"]) == float(b.state[q]["step"])
        for name, least in (("exp_avg", 1e-9), ("exp_avg_sq", 1e-13)):  # of numbers about 1e-3 and 1e-6
            torch.testing.assert_close(a.state[p][name], b.state[q][name], rtol=1e-5, atol=least)


@needs_built
def test_steps_are_those_of_torch() -> None:
    """Tensors that missed steps have other counts, for which torch's own step is taken: from then on, too, all is the same."""
    both = pair()
    for step in range(4):
        step_both(*both, step)
    assert_alike(*both)
    moved = [float((p - q).detach().abs().max()) for p, q in zip(both[0], parameters(), strict=True)]
    assert min(moved) > 1e-3
    for step in range(4, 12):
        step_both(*both, step)
    assert_alike(*both)


@needs_built
def test_the_compiled_step_is_taken_and_clips_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(self: Any, closure: Any = None) -> None:
        raise AssertionError("torch's own step")

    monkeypatch.setattr(torch.optim.AdamW, "step", own)
    p = nn.Parameter(torch.zeros(4))
    optimizer = adamw.AdamW([p], lr=1e-3, betas=(0.5, 0.5))
    p.grad = torch.full((4,), 8.0)
    optimizer.clip = 0.25
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.full((4,), 1.0))
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.full((4,), 4.5))  # not clipped any more
    assert torch.equal(p.grad, torch.full((4,), 8.0))


@needs_built
def test_state_goes_from_one_to_the_other_and_back() -> None:
    both = pair()
    for step in range(3):
        step_both(*both, step)
    ours, a, torchs, b = both
    saved_a, saved_b = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
    a.load_state_dict(saved_b)
    b.load_state_dict(saved_a)
    for step in range(3):
        step_both(ours, a, torchs, b, step)
    assert_alike(ours, a, torchs, b)


@pytest.mark.parametrize(
    "options, dtype",
    [({"amsgrad": True}, torch.float32), ({"maximize": True}, torch.float32), ({}, torch.bfloat16)],
    ids=["amsgrad", "maximize", "bfloat16"],
)
def test_what_it_cannot_compute_is_torchs_and_clipped_all_the_same(options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, torchs = parameters(dtype=dtype), parameters(dtype=dtype)
    a, b = adamw.AdamW(ours, lr=1e-3, **options), torch.optim.AdamW(torchs, lr=1e-3, **options)
    for p, q, g in zip(ours, torchs, gradients(1), strict=True):
        p.grad, q.grad = g.to(dtype), (g.to(dtype) * 0.5)
    a.clip = 0.5
    a.step()
    b.step()
    for p, q in zip(ours, torchs, strict=True):
        assert torch.equal(p, q)


def test_without_compiled_functions_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "library", lambda: None)
    ours, a, torchs, b = pair()
    assert a.gradient_norm() is None
    for p, q, g in zip(ours, torchs, gradients(1), strict=True):
        p.grad, q.grad = g, g.clone()
    a.step()
    b.step()
    for p, q in zip(ours, torchs, strict=True):
        assert torch.equal(p, q)


@needs_built
def test_norms_of_what_is_no_number_and_of_nothing() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = adamw.AdamW([p])
    assert optimizer.gradient_norm() == 0.0
    p.grad = torch.tensor([1.0, math.nan, 2.0])
    norm = optimizer.gradient_norm()
    assert norm is not None and math.isnan(norm) and math.isnan(adamw.clipping(norm, 1.0))
    p.grad = torch.tensor([math.inf, 0.0, 0.0])
    assert optimizer.gradient_norm() == math.inf and adamw.clipping(math.inf, 1.0) == 0.0
    assert adamw.clipping(0.0, 1.0) == 1.0


@needs_built
def test_the_same_bits_for_any_number_of_threads() -> None:
    found: list[tuple[float | None, list[Tensor]]] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ours = parameters(3)
            for p, g in zip(ours, gradients(1), strict=True):
                p.grad = g
            optimizer = adamw.AdamW(ours, lr=1e-3)
            found.append((optimizer.gradient_norm(), [p.detach() for p in ours]))
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    exact = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients(1)))
    assert found[0][0] == pytest.approx(exact, rel=1e-6)
    for norm, tensors in found[1:]:
        assert norm == found[0][0] and all(map(torch.equal, tensors, found[0][1]))


@needs_built
def test_a_run_learns_what_it_learns_with_torchs_step(
    llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    step = adamw._step

    def counting(*args: Any) -> None:
        calls.append(1)
        step(*args)

    monkeypatch.setattr(adamw, "_step", counting)
    weights, losses = [], []
    for own in (True, False):
        settings = {**CONFIG, "fast_paths": {"optimizer": own}, "max_grad_norm": 0.05}
        settings["adam_epsilon"] = 1e-6  # a gradient that is rounding's noise would be divided by itself
        result = finetune(
            str(llama_folder), tone_data, settings, {"r": 4}, {"torch_dtype": "float32"}, output_dir=tmp_path / str(own)
        )
        losses.append(result.manifest["figures"]["train_loss"])
        weights.append(load_file(tmp_path / str(own) / WEIGHTS_FILE))
        assert len(calls) == 4  # of the first run
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][-1] < losses[0][0] - 1e-3
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-5)
