"""The planner: the step without numbers against the real one, the law of depth, refusals, suggestions, and what it says of bad input."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import phinetune
from phinetune.cli.app import main
from phinetune.data.batches import padded_batch, tree_batch
from phinetune.errors import AdapterError, ConfigError, InfeasibleError, ModelError
from phinetune.events import Event, Note
from phinetune.lora.arithmetic import choose_arithmetic
from phinetune.lora.config import LoraConfig
from phinetune.lora.injection import inject
from phinetune.model import compute, kernels
from phinetune.model.fast import FastPaths, speed_up
from phinetune.model.grid import Grid
from phinetune.model.load import LoadPlan, load_model, read_model_config
from phinetune.model.quantized import Quantization
from phinetune.training import estimate, estimate_run, estimate_time
from phinetune.training.checkpointing import LayerCount, checkpoint_layers
from phinetune.training.estimate import StepEstimator, StepSettings, optimizer_bytes, trace_step
from phinetune.workflow import forecast_training
from tiny import PROMPT, tone_rows, write_rows
from zoo import zoo_model

CPU = torch.device("cpu")
NEEDS_4_BITS = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def rows(count: int, length: int, shared: int = 6) -> list[dict[str, Any]]:
    """Examples with a common beginning; the last five tokens are learned."""
    own = [[(7 * i + j) % 200 + 20 for j in range(length - shared)] for i in range(count)]
    return [{"input_ids": [5] * shared + ids, "labels": [-100] * (length - 5) + [9] * 5} for ids in own]


def real_model(folder: Path, plan: LoadPlan, lora: LoraConfig) -> Any:
    model = speed_up(load_model(folder, plan), FastPaths())
    inject(model, lora)
    choose_arithmetic(model, FastPaths())
    return model.train()


@pytest.mark.parametrize(("dtype", "attention"), [(torch.bfloat16, "eager"), (torch.float32, "sdpa")], ids=str)
@pytest.mark.parametrize("count", [0, "all"], ids=["kept", "recomputed"])
def test_the_step_without_numbers_is_the_real_step(
    model_folder: Path, dtype: torch.dtype, count: LayerCount, attention: str
) -> None:
    plan, lora = LoadPlan(dtype, CPU, attention), LoraConfig(r=4)
    settings = StepSettings(read_model_config(model_folder), plan, lora, count)
    estimator, model = StepEstimator(settings), real_model(model_folder, plan, lora)
    for batch in (padded_batch(rows(3, 40), 0), tree_batch(rows(3, 30))):
        checkpoint_layers(model, count)
        expected = trace_step(model, batch)
        found = estimator(batch)
        peak = max(p.total for p in expected.peaks.values())
        assert found.peak.total - estimator.optimizer == pytest.approx(peak, rel=0.002)
        assert found.flops == sum(c.flops * n for c, n in expected.calls.items()) > 0
        assert sum(found.calls.values()) == sum(expected.calls.values())
    parts = found.peak.parts
    assert parts["weights"] >= sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    assert parts["adapters"] == sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert not any(p.grad is not None for p in model.parameters())


@NEEDS_4_BITS
@pytest.mark.parametrize("double", [True, False])
def test_4_bits_are_counted_as_they_are_held(llama_folder: Path, double: bool) -> None:
    plan = LoadPlan(torch.bfloat16, CPU, "eager", quantization=Quantization("nf4", double))
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])  # the other layers are bitsandbytes' own
    estimator = StepEstimator(StepSettings(read_model_config(llama_folder), plan, lora))
    model, batch = real_model(llama_folder, plan, lora), padded_batch(rows(2, 24), 0)
    expected, found = trace_step(model, batch), estimator(batch)
    assert found.peak.total - estimator.optimizer == pytest.approx(
        max(p.total for p in expected.peaks.values()), rel=0.01
    )
    assert found.flops == sum(c.flops * n for c, n in expected.calls.items())


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("r", [4, 32], ids=["small-factors", "large-factors"])
@pytest.mark.parametrize("count", [0, "all"], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["llama_folder", "phi3_folder"])
def test_figures_of_three_layers_tell_those_of_more(
    kind: str,
    count: LayerCount,
    r: int,
    accumulates: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = read_model_config(request.getfixturevalue(kind))
    config.num_hidden_layers, config.layer_types = 6, ["full_attention"] * 6
    load, lora = LoadPlan(torch.bfloat16, CPU, "eager"), LoraConfig(r=r)
    settings = StepSettings(config, load, lora, count, accumulates=accumulates)
    extended = StepEstimator(settings)
    monkeypatch.setattr(estimate, "_layers_are_alike", lambda *_: False)
    whole = StepEstimator(settings)
    assert (extended.weights, extended.adapters, extended.optimizer) == (whole.weights, whole.adapters, whole.optimizer)
    for batch in (padded_batch(rows(4, 60), 0), padded_batch(rows(1, 12), 0)):
        one, other = extended(batch), whole(batch)
        assert one.peak.total == pytest.approx(other.peak.total, rel=0.005)
        assert {k: v for k, v in one.peak.parts.items() if v} == pytest.approx(
            {k: v for k, v in other.peak.parts.items() if v}, rel=0.02, abs=0.005 * other.peak.total
        )
        assert one.flops == other.flops
        assert one.calls == other.calls


def test_layers_that_differ_are_all_run(llama_folder: Path) -> None:
    config = read_model_config(llama_folder)
    config.num_hidden_layers, config.layer_types = 5, ["full_attention"] * 5
    plan, batch = LoadPlan(torch.float32, CPU, "eager"), padded_batch(rows(2, 20), 0)
    every = StepEstimator(StepSettings(config, plan, LoraConfig(r=4)))
    upper = StepEstimator(StepSettings(config, plan, LoraConfig(r=4, layers_to_transform=[4])))
    assert upper.adapters * 5 == every.adapters
    assert upper(batch).flops < every(batch).flops
    assert upper(batch).peak.total < every(batch).peak.total


def test_the_optimizers_state_is_as_large_as_said(llama_folder: Path) -> None:
    model = real_model(llama_folder, LoadPlan(torch.float32, CPU), LoraConfig(r=4))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    kinds: dict[str, Callable[[Any], Any]] = {
        "adamw_torch_fused": lambda p: torch.optim.AdamW(p, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "adagrad": lambda p: torch.optim.Adagrad(p),
        "rmsprop": lambda p: torch.optim.RMSprop(p),
    }
    for name, make in kinds.items():
        optimizer = make(trained)
        optimizer.step()
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.dim()]
        assert optimizer_bytes(name, trained) == sum(t.numel() * t.element_size() for t in state), name
    numbers = sum(p.numel() for p in trained)
    assert optimizer_bytes("paged_adamw_8bit", trained) == 2 * numbers < optimizer_bytes("adamw_torch", trained)


def test_operators_are_timed_once_and_rates_do_the_rest(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path))
    plan = LoadPlan(torch.float32, CPU, "eager")
    calls = StepEstimator(StepSettings(read_model_config(llama_folder), plan, LoraConfig(r=4)))(
        padded_batch(rows(2, 20), 0)
    ).calls
    clock = estimate_time.OperatorClock()
    assert clock.seconds(calls) > 0
    clock.save()
    timed = [c for c in calls if not c.is_view and estimate_time.digest(c) in clock.known]
    assert len(timed) > 0.9 * sum(not c.is_view for c in calls)
    monkeypatch.setattr(estimate_time, "_measure", lambda call: pytest.fail("timed again"))
    monkeypatch.setattr(estimate_time, "_standard_seconds", lambda: clock.known["pace"])
    assert estimate_time.OperatorClock(0.0).seconds(calls) == pytest.approx(clock.seconds(calls), rel=0.2)
    monkeypatch.undo()
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path / "other"))
    without = estimate_time.OperatorClock(0.0)
    assert without.seconds(calls) > 0
    assert not any(estimate_time.digest(c) in without.known for c in timed)


@pytest.mark.parametrize(
    ("first", "then", "scaled", "again"),
    [
        pytest.param(1.0, 1.2, 1.0, False, id="chance"),
        pytest.param(1.0, 2.0, 0.5, False, id="busy-now"),
        pytest.param(2.0, 1.0, 1.0, True, id="busy-then"),
        pytest.param(1.2, 1.0, 1.0, False, id="a-little-faster"),
    ],
)
def test_what_is_timed_on_a_busy_machine_is_scaled_and_forgotten_later(
    first: float, then: float, scaled: float, again: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path))
    timed: list[Any] = []
    pace = [first]
    monkeypatch.setattr(estimate_time, "_measure", lambda call: timed.append(call) or 8.0)
    monkeypatch.setattr(estimate_time, "_standard_seconds", lambda: pace[0])
    one, other = estimate_time._standard(8, 8)
    clock = estimate_time.OperatorClock()
    clock.seconds(Counter([one]))
    clock.save()
    assert clock.slower() == 1.0 and clock.known[estimate_time.digest(one)] == 8.0
    timed.clear()
    pace[0] = then
    clock = estimate_time.OperatorClock()
    clock.seconds(Counter([one, other]))
    clock.save()
    assert (one in timed) is again and other in timed
    for found in (clock, estimate_time.OperatorClock()):
        assert found.known[estimate_time.digest(other)] == 8.0 * scaled
        assert found.known[estimate_time.digest(one)] == 8.0
        assert found.known["pace"] == min(first, then)


def deep(layers: int, **options: Any) -> StepEstimator:
    config = zoo_model("llama", num_hidden_layers=layers).config
    return StepEstimator(StepSettings(config, LoadPlan(torch.float32, CPU, "eager"), LoraConfig(r=4), **options))


@pytest.mark.parametrize("layers", [2, 3, 7])
@pytest.mark.parametrize("count", [0, 2, "all"], ids=["kept", "some", "recomputed"])
def test_a_real_step_of_three_layers_is_timed(layers: int, count: LayerCount) -> None:
    batch = tree_batch(rows(3, 30))
    estimator = deep(layers, checkpoint_layers=count)
    found = estimator.measured(batch, 5.0, lambda calls: 0.0)
    assert found is not None
    seconds, calls = found
    assert 0 < seconds < 5.0
    few = round(2 * min(layers, 3) / layers) if count == 2 else count
    assert calls == deep(min(layers, 3), checkpoint_layers=few)(batch).calls
    assert estimator(batch).calls.total() >= calls.total()


def test_no_real_step_where_memory_or_time_is_short_or_layers_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = padded_batch(rows(3, 30), 0)
    assert deep(7).measured(batch, 0.0, lambda calls: 0.0) is None
    assert deep(7).measured(batch, 5.0, lambda calls: 2.6) is None
    plan = LoadPlan(torch.float32, CPU, "eager")
    config = zoo_model("llama", num_hidden_layers=7).config
    lora = LoraConfig(r=4, rank_pattern={r"model\.layers\.1\..*": 8})
    assert StepEstimator(StepSettings(config, plan, lora)).measured(batch, 5.0, lambda calls: 0.0) is None
    monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
    assert deep(7).measured(batch, 5.0, lambda calls: 0.0) is None


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("quantization", [Quantization("nf4", True), Grid()], ids=["nf4", "grid"])
def test_a_quantized_base_is_timed_with_made_up_numbers_too(quantization: Any) -> None:
    config = zoo_model("llama", hidden_size=64, intermediate_size=64).config
    plan = LoadPlan(torch.float32, CPU, "eager", quantization=quantization)
    assert StepEstimator(StepSettings(config, plan, LoraConfig(r=4))).measured(
        padded_batch(rows(2, 20), 0), 5.0, lambda calls: 0.0
    )


@pytest.mark.parametrize("built", [True, False])
def test_training_for_a_grid_is_followed_with_and_without_compiled_functions(
    built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not built:
        monkeypatch.setattr(kernels, "library", lambda: None)
    config = zoo_model("llama", hidden_size=64, intermediate_size=64).config
    plan, batch = LoadPlan(torch.float32, CPU, "eager"), padded_batch(rows(2, 20), 0)
    estimator = StepEstimator(StepSettings(config, plan, LoraConfig(r=4), grid=Grid()))
    assert estimator(batch).peak.total > 0
    assert estimator.measured(batch, 5.0, lambda calls: 0.0)


def test_what_a_step_takes_more_than_its_operators_is_measured_and_remembered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path))
    batch, estimator = padded_batch(rows(3, 30), 0), deep(7)
    step = estimator(batch)
    clock = estimate_time.OperatorClock()
    clock.remember("overhead", 0.0)
    alone = estimate_run.run_time(estimator, [(step, batch)], 1, clock).step_seconds - clock.update_seconds(
        estimator.adapters
    )
    three = clock.seconds(deep(3)(batch).calls)
    monkeypatch.setattr(StepEstimator, "measured", lambda self, *_: (3 * three, deep(3)(batch).calls))
    monkeypatch.setattr(estimate_time.OperatorClock, "slower", lambda self: 2.0)

    def passes(measuring: float) -> float:
        again = estimate_time.OperatorClock()
        found = estimate_run.run_time(estimator, [(step, batch)], 1, again, measuring)
        return found.step_seconds - again.update_seconds(estimator.adapters)

    assert passes(1.0) == pytest.approx(3 * alone, rel=1e-6)
    assert passes(0.0) == pytest.approx(1.5 * alone, rel=1e-6)  # the machine was twice as slow as at its best

    def fails(*_: Any) -> None:
        raise RuntimeError("a foreign model")

    monkeypatch.setattr(StepEstimator, "measured", fails)
    assert passes(1.0) == pytest.approx(1.5 * alone, rel=1e-6)
    notes: list[Any] = []
    estimate_run.run_time(estimator, [(step, batch)], 1, clock, 1.0, notes.append)
    assert [note.text for note in notes if "a foreign model" in note.text]


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert compute.memory_limit(tmp_path) == (None, 0)
    for name, text in (("max", "1000"), ("current", "800"), ("stat", "anon 1\ninactive_file 300\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert compute.memory_limit(tmp_path) == (1000, 500)
    (tmp_path / "memory.max").write_text("max\n")
    assert compute.memory_limit(tmp_path) == (None, 0)


@pytest.fixture
def long_data(tmp_path: Path) -> dict[str, Any]:
    """Rows long enough that activations are most of a tiny run's memory."""
    long = [{**row, "phrase": f"{row['phrase']} {i} " + "and so on " * 20} for i, row in enumerate(tone_rows(64))]
    return {"path": str(write_rows(tmp_path / "long.jsonl", long)), **PROMPT}


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A process of constant size, and a machine with as much memory beyond it as is said."""
    monkeypatch.setattr(forecast_training, "resident_memory", lambda: 500_000_000)

    def memory(free: int) -> None:
        monkeypatch.setattr(forecast_training, "available_memory", lambda: free)

    memory(10_000_000_000)
    return memory


PADDED = {"layout": "padded", "per_device_train_batch_size": 16}


def test_a_plan_says_what_a_run_takes(
    llama_folder: Path, long_data: dict[str, Any], steady: Callable[[int], None]
) -> None:
    found = phinetune.plan(str(llama_folder), long_data, PADDED)
    assert found.fits and not found.suggestions
    assert found.peak == sum(found.memory.values()) and found.resident_peak >= found.loading_peak
    assert {"process", "weights", "adapters", "optimizer", "activations", "allocator"} <= set(found.memory)
    assert found.batch["rows"] == 16 and found.batch["tokens"] == 16 * (found.batch["tokens"] // 16)
    assert found.step_seconds > 0 and found.total_seconds == pytest.approx(found.steps * found.step_seconds)
    half = phinetune.plan(
        str(llama_folder), long_data, {**PADDED, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    )
    assert half.memory["activations"] < 0.6 * found.memory["activations"]
    assert half.steps == found.steps
    assert half.flops_per_step == pytest.approx(found.flops_per_step, rel=0.2)


def test_a_plan_needs_no_weights(
    llama_folder: Path, tone_data: dict[str, Any], steady: Callable[[int], None], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(llama_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    whole, without = (phinetune.plan(str(folder), tone_data) for folder in (llama_folder, bare))
    assert without.memory == whole.memory
    assert without.export_peak == pytest.approx(whole.export_peak, rel=0.01)
    with pytest.raises(ModelError, match="no weights"):
        phinetune.finetune(str(bare), tone_data, output_dir=tmp_path / "out")
    (bare / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        phinetune.plan(str(bare), tone_data)


def test_bad_input_is_refused_as_finetune_does(llama_folder: Path, tone_data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="learning_rat"):
        phinetune.plan(str(llama_folder), tone_data, {"learning_rat": 1})
    with pytest.raises(ConfigError, match="skip_memory_check"):
        phinetune.plan(str(llama_folder), tone_data, {"skip_memory_check": "maybe"})
    with pytest.raises(AdapterError, match="no_such_layer"):
        phinetune.plan(str(llama_folder), tone_data, None, {"target_modules": ["no_such_layer"]})


def test_what_is_suggested_fits(llama_folder: Path, long_data: dict[str, Any], steady: Callable[[int], None]) -> None:
    roomy = phinetune.plan(str(llama_folder), long_data, PADDED)
    steady(roomy.needed - 500_000_000 - roomy.memory["activations"] // 2)
    found = phinetune.plan(str(llama_folder), long_data, PADDED)
    assert not found.fits and found.suggestions
    assert found.suggestions[0].settings.keys() >= {"training_config.per_device_train_batch_size"}
    for suggestion in (found.suggestions[0], found.suggestions[-1]):
        arguments: dict[str, Any] = {"data": dict(long_data), "training_config": dict(PADDED), "model_kwargs": {}}
        for key, value in suggestion.settings.items():
            group, _, name = key.partition(".")
            arguments[group][name] = value
        again = phinetune.plan(str(llama_folder), **arguments)
        assert again.fits, suggestion
        assert again.needed == pytest.approx(suggestion.needed, rel=0.02)
    first = found.suggestions[0].settings
    assert (
        first["training_config.per_device_train_batch_size"] * first["training_config.gradient_accumulation_steps"]
        == 16
    )


def test_a_run_that_cannot_fit_is_refused_and_can_be_forced(
    llama_folder: Path,
    tone_file: Path,
    steady: Callable[[int], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steady(0)
    data = {"path": str(tone_file), **PROMPT}
    with pytest.raises(InfeasibleError, match=r"needs about 0\.\d GB, 0\.\d GB can be had") as caught:
        phinetune.finetune(str(llama_folder), data, {"max_steps": 1}, output_dir=tmp_path / "out")
    assert "skip_memory_check=true" in caught.value.hint and not (tmp_path / "out").exists()
    notes: list[Event] = []
    phinetune.finetune(
        str(llama_folder), data, {"max_steps": 1, "skip_memory_check": True}, output_dir=tmp_path / "out",
        on_event=notes.append,
    )  # fmt: skip
    assert any(isinstance(n, Note) and n.warning and "going on" in n.text for n in notes)
    args = ["-m", str(llama_folder), "-d", str(tone_file), "--prompt", "{phrase}", "--completion", "{tone}"]
    assert main(["plan", *args]) == 3
    assert "does not fit" in capsys.readouterr().out
    run = ["finetune", *args, "-s", "training_config.max_steps=1", "-o", str(tmp_path / "cli")]
    assert main(run) == 3
    assert main([*run, "--no-memory-check"]) == 0


def test_a_run_says_first_what_it_takes(
    llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes: list[Event] = []
    phinetune.finetune(
        str(llama_folder), tone_data, {"max_steps": 1}, output_dir=tmp_path / "out", on_event=notes.append
    )
    said = [n.text for n in notes if isinstance(n, Note)]
    assert any(text.startswith("plan: about") and "1 steps" in text for text in said)
    config = tmp_path / "plan.json"
    config.write_text(json.dumps({"model": str(llama_folder), "data": tone_data, "training_config": {"max_steps": 1}}))
    assert main(["plan", "-c", str(config)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("peak", "activations", "GFLOP", "memory of merge"))


def test_an_estimate_that_fails_stops_no_run(
    llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(estimate, "trace_step", broken)
    notes: list[Event] = []
    phinetune.finetune(
        str(llama_folder), tone_data, {"max_steps": 1}, output_dir=tmp_path / "out", on_event=notes.append
    )
    assert [n.text for n in notes if isinstance(n, Note) and n.warning] == [
        "plan: memory and time cannot be estimated: no such operator"
    ]
