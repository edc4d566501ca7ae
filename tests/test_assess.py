"""Numbers asked for by name: each is what it says, torch and ONNX agree, and nothing is computed that was not asked for."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import phinetune
from phinetune.cli.app import main
from phinetune.data.examples import Example, load_examples, write_examples
from phinetune.data.messages import parse_data_config
from phinetune.errors import ConfigError, DataError, ModelError
from phinetune.evaluation import memory
from phinetune.evaluation.assessment import Effort, gather, values_and_intervals
from phinetune.evaluation.clock import STATISTICS, Timing, quantile, time_answers
from phinetune.evaluation.loss import Loss, held_out_loss
from phinetune.evaluation.measurements import CLOCKS, MEASUREMENTS, Evidence, Measurement, measurements, parse_metrics
from phinetune.evaluation.metrics import METRICS, label_scores, wilson_interval
from phinetune.evaluation.score import Answer
from phinetune.events import Note
from phinetune.generation.load import load_generator
from phinetune.generation.protocol import Prediction
from phinetune.generation.torch_backend import TorchGenerator
from phinetune.workflow import assess as stage
from tiny import PROMPT, tone_rows, write_rows

FP32 = {"torch_dtype": "float32"}
ALL = "exact_match,accuracy,f1,perplexity,latency_p50,throughput,time_to_first_token_p90,size"


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    return phinetune.export(str(llama_folder), tmp_path_factory.mktemp("onnx") / "fp32", {"precision": "fp32"}).folder


@pytest.fixture(scope="module")
def generator(llama_folder: Path) -> Any:
    return load_generator(str(llama_folder), FP32)


@pytest.fixture
def notes() -> list[str]:
    return []


def listen(notes: list[str]) -> Any:
    return lambda event: notes.append(event.text) if isinstance(event, Note) else None


# Names.


def test_every_name_has_a_unit_a_direction_and_a_meaning() -> None:
    known = measurements()
    assert set(METRICS) | set(MEASUREMENTS) == set(known) and len(known) == 10 + len(CLOCKS) * (1 + len(STATISTICS))
    assert all(m.meaning for m in known.values())
    worse_when_higher = {re.sub("_(avg|max|min|p.*)$", "", n) for n, m in known.items() if not m.higher_is_better}
    assert worse_when_higher == {"loss", "perplexity", "latency", "time_to_first_token", "size", "memory"}


def test_unknown_names_are_all_named_with_the_nearest_and_the_list(notes: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        phinetune.assess("nowhere", "tone", ["perplexty", "latency_p51", "size"])
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0] == "metrics: unknown name 'perplexty', did you mean \"perplexity\"?"
    assert "exact_match" in caught.value.hint and "throughput_X" in caught.value.hint and "p999" in caught.value.hint
    with pytest.raises(ConfigError, match="name at least one"):
        parse_metrics(" , ")
    assert parse_metrics("size, f1,size") == parse_metrics(["size", "f1"]) == ("size", "f1")


def test_numbers_that_cannot_be_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        phinetune.assess("nowhere", metrics="size", max_new_tokens=0, max_examples=0, warmup=-1, repeats=0)
    assert [p.partition(":")[0] for p in caught.value.problems] == [
        "max_new_tokens",
        "max_examples",
        "warmup",
        "repeats",
    ]


def test_the_docs_hold_the_table_of_the_code() -> None:
    known = measurements()
    rows = {
        f"`{n}`": (m.unit, m.higher_is_better, m.needs, m.meaning) for n, m in known.items() if m.needs != "clock"
    } | {f"`{n}_X`": (c.unit, c.higher_is_better, "clock", c.meaning) for n, c in CLOCKS.items()}
    text = (Path(__file__).parents[1] / "docs" / "concepts.md").read_text(encoding="utf-8")
    section = text.partition("## Metrics and measurements")[2].partition("\n## ")[0]
    found = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"
    ]
    assert {row[0]: row[1:] for row in found} == {
        name: [unit or "-", "more" if higher else "less", needs, meaning]
        for name, (unit, higher, needs, meaning) in rows.items()
    }
    assert all(f"`{x}`" in section for x in STATISTICS)


# From text.


def test_label_metrics_by_hand() -> None:
    pairs = [("joy", "joy"), (" JOY\n", "joy"), ("fear", "joy"), ("joy", "fear"), ("no idea", "fear"), ("joy", "sad")]
    # joy: 2 of 4 answers right, 2 of 3 found; fear: 0 of 1, 0 of 2; sad: never answered
    assert label_scores(pairs) == pytest.approx(((1 / 2 + 0 + 0) / 3, (2 / 3 + 0 + 0) / 3, (4 / 7 + 0 + 0) / 3))
    assert label_scores([("a", "A"), ("b", " b")]) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="no answers"):
        label_scores([])


def test_label_metrics_are_those_of_the_confusion_matrix() -> None:
    draw = random.Random(0)
    for _ in range(50):
        pairs = [(draw.choice("abcx"), draw.choice("abc")) for _ in range(draw.randint(1, 30))]
        labels = sorted({r for _, r in pairs})
        every = sorted({*labels, *(a for a, _ in pairs)})
        matrix = np.array([[pairs.count((a, r)) for a in every] for r in labels], dtype=float)  # (references, answers)
        right = np.array([matrix[i, every.index(r)] if r in every else 0.0 for i, r in enumerate(labels)])
        given = np.array([matrix[:, every.index(r)].sum() for r in labels])
        precision = np.divide(right, given, out=np.zeros_like(right), where=given > 0)
        recall = right / matrix.sum(1)
        both = precision + recall
        f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(right), where=both > 0)
        assert label_scores(pairs) == pytest.approx((precision.mean(), recall.mean(), f1.mean()))


def test_shares_carry_wilsons_interval_and_other_numbers_none() -> None:
    answers = [Answer("f:1", "joy", text, stopped, {"exact_match": x, "accuracy": y}) for text, stopped, x, y in
               [("joy", True, 1.0, 1.0), ("Joy", True, 0.0, 1.0), ("", False, 0.0, 0.0)]]  # fmt: skip
    values, intervals = values_and_intervals(Evidence(answers), ["accuracy", "exact_match", "stop_rate", "f1", "size"])
    assert values == pytest.approx(
        {"accuracy": 2 / 3, "exact_match": 1 / 3, "stop_rate": 2 / 3, "f1": 0.8, "size": 0.0}
    )
    assert intervals == {n: wilson_interval(values[n], 3) for n in ("accuracy", "exact_match", "stop_rate")}


def test_a_third_partys_metric_and_measurement(
    llama_folder: Path, tone_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def starts_alike(answer: str, reference: str) -> float:
        asked.append(answer)
        return float(answer[:1] == reference[:1])

    mean_length = Measurement(
        lambda e: sum(len(a.answer) for a in e.answers) / len(e.answers), "answers", "characters", False, "length"
    )
    monkeypatch.setitem(METRICS, "starts_alike", starts_alike)
    monkeypatch.setitem(MEASUREMENTS, "mean_length", mean_length)
    phinetune.assess(str(llama_folder), tone_data, "mean_length", model_kwargs=FP32)
    assert asked == []
    found = phinetune.assess(str(llama_folder), tone_data, "starts_alike,mean_length", model_kwargs=FP32)
    assert len(asked) == found.count == 5 and list(found.values) == ["starts_alike", "mean_length"]
    assert found.values["mean_length"] == sum(map(len, asked)) / 5 and set(found.intervals) == {"starts_alike"}


# From loss.


def rows_of(generator: Any, data: Any) -> list[tuple[list[int], list[int]]]:
    train, _, _ = load_examples(parse_data_config(data), generator.contract)
    return [(r["input_ids"], r["labels"]) for r in train.table]


def reference_losses(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
    """One row at a time, all logits, no padding."""
    found = []
    for ids, labels in rows:
        with torch.inference_mode():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append([-float(logs[i - 1, labels[i]]) for i in range(1, len(ids)) if labels[i] != -100])
    return found


def flat(losses: list[list[float]]) -> list[float]:
    return [loss for row in losses for loss in row]


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Conversations of one to three answers: several learned stretches in a row."""
    return write_rows(
        tmp_path / "chats.jsonl",
        [{"messages": [{"role": role, "content": f"{role} says {i} {'so ' * (i % 4)}{turn}"}
                       for turn in range(1 + i % 3) for role in ("user", "assistant")]} for i in range(9)],
    )  # fmt: skip


def test_losses_of_batches_are_those_of_single_rows(generator: Any, conversations: Path) -> None:
    rows = rows_of(generator, str(conversations))
    expected = reference_losses(generator.model, rows)
    assert len({len(ids) for ids, _ in rows}) > 3 and any(-100 in labels[labels.index(4) :] for _, labels in rows)
    for batch_size in (1, 3, 16):
        found = list(TorchGenerator(generator.model, generator.contract, batch_size).predictions(rows))
        assert [len(x) for x in found] == [len(x) for x in expected]
        assert flat([[p.loss for p in row] for row in found]) == pytest.approx(flat(expected), abs=1e-4)
    assert list(generator.predictions([([1, 2, 3], [-100] * 3)])) == [[]]


def test_onnx_losses_are_torchs_in_one_go_and_token_by_token(
    generator: Any, onnx_folder: Path, conversations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime_genai as og

    onnx, rows = load_generator(str(onnx_folder)), rows_of(generator, str(conversations))
    rows.append(([1, 2, 3], [-100] * 3))
    expected, original, calls = reference_losses(generator.model, rows), og.Generator, []

    class LastOnly:
        """A graph that gives logits of the last token only."""

        def __init__(self, *args: Any) -> None:
            self.real = original(*args)

        def append_tokens(self, ids: Any) -> None:
            calls.append(len(ids))
            self.real.append_tokens(ids)

        def get_output(self, name: str) -> Any:
            return np.array(self.real.get_output(name))[:, -1:]

    whole = list(onnx.predictions(rows))
    monkeypatch.setattr(og, "Generator", LastOnly)
    by_token = list(onnx.predictions(rows))
    assert [len(x) for x in whole] == [len(x) for x in by_token] == [len(x) for x in expected]
    torchs = list(generator.predictions(rows))
    for found in (whole, by_token):
        assert flat([[p.loss for p in row] for row in found]) == pytest.approx(flat(expected), abs=1e-4)
        assert [[p.choice for p in row] for row in found] == [[p.choice for p in row] for row in torchs]
    assert calls.count(1) > 50


def test_perplexity_of_fp32_onnx_is_torchs(llama_folder: Path, onnx_folder: Path, tone_data: Any) -> None:
    torchs = phinetune.assess(str(llama_folder), tone_data, "perplexity,loss", model_kwargs=FP32)
    onnxs = phinetune.assess(str(onnx_folder), tone_data, "perplexity,loss")
    assert onnxs.values["perplexity"] == pytest.approx(torchs.values["perplexity"], rel=1e-3)
    assert torchs.values["perplexity"] == pytest.approx(math.exp(torchs.values["loss"]))
    assert torchs.count == onnxs.count == 5 and torchs.intervals == {} and torchs.wrong == []


def test_the_loss_of_an_adapter_is_the_one_that_training_reported(
    llama_folder: Path, tone_data: Any, tmp_path: Path
) -> None:
    training = {"max_steps": 2, "learning_rate": 5e-3}
    done = phinetune.finetune(str(llama_folder), tone_data, training, {"r": 4}, FP32, tmp_path / "adapter")
    found = phinetune.assess(str(done.folder), metrics="loss", model_kwargs=FP32)  # the data is that of the training
    assert found.stage == "adapter"
    assert found.values["loss"] == pytest.approx(done.manifest["figures"]["eval_loss"], abs=1e-3)


def test_losses_that_are_no_numbers_are_infinite_and_said(generator: Any, tone_data: Any, notes: list[str]) -> None:
    examples = load_examples(parse_data_config(tone_data), generator.contract)[1]
    broken = SimpleNamespace(predictions=lambda rows: iter([[Prediction(math.nan, 1), Prediction(1.0, 1)]] * len(rows)))
    loss = held_out_loss(broken, examples, "hf", listen(notes))  # type: ignore[arg-type]
    assert loss.mean == loss.perplexity == math.inf and "not finite" in notes[0]
    assert Loss(5000.0, 2).perplexity == math.inf
    silent = SimpleNamespace(predictions=lambda rows: iter([[]] * len(rows)))
    with pytest.raises(DataError, match="no token of the examples is supervised"):
        held_out_loss(silent, examples, "hf")  # type: ignore[arg-type]


# From a clock: a clock of our own, so the numbers are known.


class Metronome:
    """A generator that takes 5 ticks to the first token and 1 for each later one, and answers prompt [n] with n tokens."""

    def __init__(self) -> None:
        self.now, self.prompts = 0.0, []  # type: ignore[var-annotated]

    def stream(self, prompt: Sequence[int], sampling: Any) -> Iterator[int]:
        self.prompts.append(prompt[0])
        for i in range(min(prompt[0], sampling.max_new_tokens)):
            self.now += 1.0 if i else 5.0
            yield i


def test_timings_are_what_the_clock_said() -> None:
    machine = Metronome()
    timings = time_answers(machine, [[1], [3], [9, 9]], 6, 2, 4, lambda event: None, lambda: machine.now)  # type: ignore[arg-type]
    assert machine.prompts == [1, 3, 1, 3, 9, 1]
    assert timings == [Timing(5, 5, 1, 1), Timing(5, 7, 3, 1), Timing(5, 10, 6, 2), Timing(5, 5, 1, 1)]
    names = [
        "latency",
        "latency_avg",
        "latency_max",
        "latency_p50",
        "time_to_first_token_min",
        "prefill",
        "prefill_max",
        "throughput",
    ]
    values, _ = values_and_intervals(Evidence(timings=timings), names)
    assert values == {
        "latency": 6750.0,
        "latency_avg": 6750.0,
        "latency_max": 10000.0,
        "latency_p50": 6000.0,
        "time_to_first_token_min": 5000.0,
        "prefill": 0.25,
        "prefill_max": 0.4,
        "throughput": 1.0,
    }
    with pytest.raises(ConfigError, match="throughput_p50: every answer has one token"):
        values_and_intervals(Evidence(timings=timings[:1]), ["throughput_p50"])


def test_percentiles_are_numpys() -> None:
    draw = random.Random(0)
    for count in (1, 2, 7, 20):
        values = [draw.random() for _ in range(count)]
        for share in (0.0, 0.5, 0.75, 0.999, 1.0):
            assert quantile(values, share) == pytest.approx(np.percentile(values, 100 * share))


def test_a_percentile_of_too_few_answers_is_said(llama_folder: Path, tone_data: Any, notes: list[str]) -> None:
    found = phinetune.assess(
        str(llama_folder), tone_data, "latency_p99,latency_p90", repeats=10, max_new_tokens=2, model_kwargs=FP32,
        on_event=listen(notes),
    )  # fmt: skip
    assert found.values["latency_p99"] >= found.values["latency_p90"] > 0
    assert any("latency_p99: of 10 timed answers" in note for note in notes)


# From files and a process.


def test_a_size_needs_neither_the_model_nor_data(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("was called")

    monkeypatch.setattr(stage, "load_generator", never)
    monkeypatch.setattr(stage, "choose_examples", never)
    found = phinetune.assess(str(llama_folder), metrics="size")
    assert found.values == {"size": sum(f.stat().st_size for f in llama_folder.iterdir())} and found.count == 0


def test_memory_is_told_by_a_process_of_its_own(
    onnx_folder: Path, tone_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "load_generator", None)  # not needed here
    ballast = bytearray(os.urandom(1 << 20)) * 256  # in this process: nobody's business
    found = phinetune.assess(str(onnx_folder), tone_data, "memory")
    here = memory.resident_peak()
    assert here is not None and len(ballast) < here and 20e6 < found.values["memory"] < here - 50e6
    assert found.count == 5


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that measures memory is this one, for what is said and raised in it."""

    def run(asked: Path, told: Path) -> subprocess.CompletedProcess[str]:
        memory.main(asked, told)
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(memory, "_fresh_process", run)


@pytest.mark.parametrize(("asked", "kwargs"), [("memory", {"torch_dtype": torch.float32, "use_safetensors": True}), ("loss,memory", None)])  # fmt: skip
def test_notes_of_the_loading_are_said_once(
    asked: str, kwargs: Any, in_process: None, llama_folder: Path, tone_data: Any, notes: list[str]
) -> None:
    phinetune.assess(str(llama_folder), tone_data, asked, model_kwargs=kwargs, on_event=listen(notes))
    assert len(notes) == len(set(notes)) == 1 and ("has no effect" if kwargs else "weights in") in notes[0]


def test_what_goes_wrong_in_that_process_is_raised(in_process: None, llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_kwargs\.bogus: unknown key"):
        memory.peak_memory(str(llama_folder), [[1]], 1, {"bogus": 1})


def test_a_process_that_dies_and_a_system_that_does_not_tell(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(memory, "_fresh_process", lambda asked, told: died)
    with pytest.raises(ModelError, match="ended with code -9") as caught:
        memory.peak_memory(str(llama_folder), [[1]], 1)
    assert "too little memory" in caught.value.hint
    monkeypatch.setattr(memory, "resident_peak", lambda: None)
    with pytest.raises(ConfigError, match="cannot be measured on this system"):
        phinetune.assess("nowhere", metrics="memory")


# What is asked for is what is computed.


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ("exact_match,f1", {"complete"}),
        ("perplexity,size", {"predictions"}),
        ("latency,throughput_p50", {"stream"}),
        ("stop_rate,loss,latency_max", {"complete", "predictions", "stream"}),
    ],
)
def test_only_what_is_asked_for_is_computed_and_the_model_is_loaded_once(
    asked: str, used: set[str], generator: Any, llama_folder: Path, tone_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Spy:
        contract = generator.contract

        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(generator, name)

    def load(*args: Any) -> Spy:
        calls.append("load")
        return Spy()

    monkeypatch.setattr(stage, "load_generator", load)
    monkeypatch.setattr(stage, "peak_memory", None)
    found = phinetune.assess(str(llama_folder), tone_data, asked, repeats=2, warmup=0, model_kwargs=FP32)
    assert list(found.values) == asked.split(",")
    assert calls.count("load") == 1 and set(calls) == {"load", *used}


def test_every_kind_of_number_at_once(llama_folder: Path, onnx_folder: Path, tone_data: Any) -> None:
    found = {
        kind: phinetune.assess(str(folder), tone_data, ALL, repeats=2, max_new_tokens=4, model_kwargs=kwargs)
        for kind, folder, kwargs in (("hf", llama_folder, FP32), ("onnx", onnx_folder, None))
    }
    for kind, one in found.items():
        assert one.stage == kind and list(one.values) == ALL.split(",") and one.count == 5 and one.seconds > 0
        assert all(math.isfinite(v) and v >= 0 for v in one.values.values())
        assert one.wrong and set(one.wrong[0]) == {"place", "reference", "answer"}
    assert found["hf"].values["exact_match"] == found["onnx"].values["exact_match"]


def test_some_examples_are_spread_over_the_part(
    generator: Any, llama_folder: Path, tmp_path: Path, notes: list[str]
) -> None:
    data = {"path": str(write_rows(tmp_path / "t.jsonl", tone_rows(20))), **PROMPT}
    found = phinetune.assess(
        str(llama_folder), data, "exact_match", "all", 2, max_examples=5, model_kwargs=FP32, on_event=listen(notes)
    )
    assert found.count == 5 and [w["place"] for w in found.wrong] == [f"t.jsonl:{n}" for n in (1, 5, 9, 13, 17)]
    assert any("5 of 20 examples are used" in note for note in notes)


def test_examples_without_a_prompt(generator: Any, notes: list[str]) -> None:
    text = Example([5, 6, 7], [-100, 6, 7], 0, "", "f:1")
    asked = Example([5, 6, 7], [-100, -100, 7], 2, "x", "f:2")
    effort = Effort(2, 0, 1)
    for names in (["exact_match"], ["latency_p50"]):
        with pytest.raises(DataError, match=f"f.jsonl: {names[0]} need examples with a prompt and an answer"):
            gather(generator, write_examples([text]), names, "hf", effort, "f.jsonl")
    evidence, _ = gather(generator, write_examples([text]), ["loss"], "hf", effort)
    assert evidence.loss is not None and evidence.loss.tokens == 2
    evidence, _ = gather(
        generator, write_examples([text, asked]), ["exact_match", "loss"], "hf", effort, "f", listen(notes)
    )
    assert len(evidence.answers) == 1 and evidence.loss is not None and evidence.loss.tokens == 3
    assert any("1 examples have no prompt" in note for note in notes)


def test_label_metrics_on_free_text_warn(generator: Any, notes: list[str]) -> None:
    examples = write_examples(Example([5, 6, 7], [-100, -100, 7], 2, f"text {i}", f"f:{i}") for i in range(4))
    gather(generator, examples, ["f1"], "hf", Effort(1), "f", listen(notes))
    assert notes == ["f1: 4 references hold 4 different answers; these are metrics for labels"]


def test_timing_waits_for_work_and_everything_else_is_work(
    generator: Any, llama_folder: Path, tone_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phinetune import quiet

    seen: dict[str, tuple[bool, bool]] = {}

    class Spy:
        contract = generator.contract

        def __getattr__(self, name: str) -> Any:
            held = quiet._held
            seen[name] = (getattr(held, "working", None) is not None, getattr(held, "measuring", False))
            return getattr(generator, name)

    monkeypatch.setattr(stage, "load_generator", lambda *args: Spy())
    with quiet.working():  # as inside a pass
        phinetune.assess(str(llama_folder), tone_data, "exact_match,loss,latency", repeats=1, warmup=0)
    assert {name: measuring for name, (_, measuring) in seen.items()} == {
        "complete": False,
        "predictions": False,
        "stream": True,
    }
    assert seen["complete"][0] and seen["predictions"][0]


# The command.


def test_evaluate_shows_and_saves_further_metrics(
    llama_folder: Path, tone_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["evaluate", "-m", str(llama_folder), "-d", str(tone_file), "--prompt", PROMPT["prompt"], "--completion",
            PROMPT["completion"], "--max-new-tokens", "3", "-s", "model_kwargs.torch_dtype=float32", "-q"]  # fmt: skip
    assert main([*args, "-o", str(tmp_path / "a.json")]) == 0
    plain = capsys.readouterr().out
    assert main([*args, "-o", str(tmp_path / "b.json"), "--metrics", "perplexity,f1,size"]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" not in plain and re.search(r"perplexity +\d", shown) and re.search(r"size +0\.4 MB", shown)
    before, after = (json.loads((tmp_path / f"{n}.json").read_text())["stages"][0] for n in "ab")
    assert before["metrics"] == {"exact_match": before["value"]}
    assert list(after["metrics"]) == ["perplexity", "f1", "size"] and after["metrics"]["size"] == after["size_bytes"]
    same = set(before) - {"metrics", "seconds_evaluated", "seconds"}
    assert {k: before[k] for k in same} == {k: after[k] for k in same}
    assert main([*args, "--metrics", "perplexty"]) == 2
    assert 'did you mean "perplexity"?' in capsys.readouterr().err
