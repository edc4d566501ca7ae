"""Several models side by side: the same examples, the numbers of `assess`, one load each, and a report that says what results.json says."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import phinetune
from phinetune.cli.app import main
from phinetune.cli.console import comparison_lines, comparison_table
from phinetune.errors import ConfigError, DataError, ModelError, OutputError
from phinetune.evaluation import memory
from phinetune.evaluation.assessment import values_or_reasons
from phinetune.evaluation.columns import COLUMNS, cell_text, pairs_text
from phinetune.evaluation.loss import Loss
from phinetune.evaluation.measurements import Evidence
from phinetune.evaluation.metrics import METRICS, wilson_interval
from phinetune.evaluation.pairs import Pairs
from phinetune.evaluation.report import report_html
from phinetune.evaluation.score import Answer, Score
from phinetune.events import Note
from phinetune.workflow import assess as examining
from phinetune.workflow import compare as stage
from phinetune.workflow.assess import Subject
from phinetune.workflow.subjects import stage_names
from tiny import PHI_TEMPLATE, PROMPT, tiny_folder, tone_rows, write_rows

FP32 = {"torch_dtype": "float32"}
PEAK = 123_000_000


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> dict[str, Path]:
    """base, adapter, merged, and ONNX in fp32 and int4, all from one training on 40 rows, of which 8 are held out."""
    root = tmp_path_factory.mktemp("way")
    data = {"path": str(write_rows(root / "tone.jsonl", tone_rows(40))), **PROMPT}
    training = {"max_steps": 12, "learning_rate": 1e-2}
    phinetune.finetune(str(llama_folder), data, training, {"r": 4}, FP32, root / "adapter")
    phinetune.merge(str(root / "adapter"), root / "merged")
    for precision in ("fp32", "int4"):
        config = {"precision": precision, "algorithm": "default"}
        phinetune.export(str(root / "merged"), root / precision, config, compare_answers=False)
    return {
        "base": llama_folder,
        **{name: root / name for name in ("adapter", "merged", "fp32", "int4")},
        "data": root / "tone.jsonl",
    }


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not measured but given: a process of its own takes seconds."""
    monkeypatch.setattr(examining, "peak_memory", lambda *args: PEAK)


@pytest.fixture
def notes() -> list[str]:
    return []


def listen(notes: list[str]) -> Any:
    return lambda event: notes.append(event.text) if isinstance(event, Note) else None


def models(way: dict[str, Path], *names: str) -> list[str]:
    return [str(way[name]) for name in names]


def compared(way: dict[str, Path], *names: str, **more: Any) -> stage.Comparison:
    return phinetune.compare(models(way, *names), **{"repeats": 2, "warmup": 0, "model_kwargs": FP32, **more})


# The numbers.


def test_the_numbers_are_those_of_assess(way: dict[str, Path], no_process: None) -> None:
    found = compared(way, "base", "adapter", "merged", "fp32", "int4")
    assert [s.stage for s in found.stages] == ["base", "adapter", "merged", "ONNX fp32", "ONNX int4"]
    data = {"path": str(way["data"]), **PROMPT}
    for row, model in zip(found.stages, models(way, "base", "adapter", "merged", "fp32", "int4"), strict=True):
        one = phinetune.assess(model, data, "exact_match,stop_rate,perplexity,size", "test", model_kwargs=FP32)
        assert {name: row.metrics[name] for name in one.values} == one.values
        assert row.value == one.values["exact_match"] and row.count == one.count == 8 and row.wrong == one.wrong
        assert row.interval == tuple(round(x, 4) for x in wilson_interval(row.value, 8))
        assert row.size_bytes == row.metrics["size"] and row.metrics["memory"] == PEAK
        assert row.metrics["prefill_p50"] > 0 and row.metrics["throughput_p50"] > 0  # type: ignore[operator]
        assert row.missing == {} and row.seconds > row.seconds_evaluated
    assert [s.seconds_made > 0 for s in found.stages] == [False, True, True, True, True]
    assert found.stages[0].metrics["perplexity"] > 2 * found.stages[1].metrics["perplexity"]  # type: ignore[operator]


def test_each_model_is_loaded_once_and_asked_the_same_prompts(
    way: dict[str, Path], no_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any]] = []
    load = examining.load_generator

    def spied(*args: Any) -> Any:
        generator = load(*args)
        seen.append(("load", args[0]))

        class Spy:
            contract = generator.contract

            def complete(self, prompts: Any, limit: int) -> Any:
                seen.append(("complete", ([list(p) for p in prompts], limit)))
                return generator.complete(prompts, limit)

            def __getattr__(self, name: str) -> Any:
                return getattr(generator, name)

        return Spy()

    monkeypatch.setattr(examining, "load_generator", spied)
    compared(way, "int4", "merged", "base")
    assert [what for what, _ in seen] == ["load", "complete"] * 3
    asked = [value for what, value in seen if what == "complete"]
    assert asked[0] == asked[1] == asked[2] and len(asked[0][0]) == 8


def scripted(monkeypatch: pytest.MonkeyPatch, **scores: list[float]) -> None:
    """Stages whose answers score what is written here, whatever their models say."""

    def gathered(subject: Any, names: Any, effort: Any, on_event: Any, stage: str) -> tuple[Evidence, Score]:
        answers = tuple(
            Answer(f"tone.jsonl:{i}", "joy", f"answer {i}", True, {"exact_match": float(x >= 1), names[0]: x})
            for i, x in enumerate(scores[stage])
        )
        means = {name: sum(a.scores[name] for a in answers) / len(answers) for name in answers[0].scores}
        return Evidence(answers, Loss(2.0, 2)), Score(stage, len(answers), means, (0, 1), 1.0, 0.1, answers)

    monkeypatch.setattr(stage, "gather_from", gathered)


def test_won_and_lost_are_counted_against_the_reference(
    way: dict[str, Path], no_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = [1.0] * 6 + [0.0] * 2, [0.0] * 6 + [1.0] * 2, [1.0] * 5 + [0.0] * 3
    scripted(monkeypatch, a=one, b=two, c=three)
    named = dict(zip("abc", models(way, "base", "adapter", "merged"), strict=True))
    found = phinetune.compare(named)
    assert found.reference == "b"  # the adapter
    assert [s.against for s in found.stages] == [Pairs(6, 2, 2 * 37 / 256), None, Pairs(5, 2, 2 * 29 / 128)]
    assert [s.correct for s in found.stages] == [6, 2, 5]
    found = phinetune.compare(named, reference="a")
    assert [s.against for s in found.stages] == [None, Pairs(2, 6, 2 * 37 / 256), Pairs(0, 1, 1.0)]
    assert comparison_lines(found)[:2] == [
        "b against a: 2 won, 6 lost, p = 0.29",
        "c against a: 0 won, 1 lost, p = 1.00",
    ]
    found = phinetune.compare({"c": str(way["base"]), "a": str(way["merged"])}, {"path": str(way["data"]), **PROMPT})
    assert found.reference == "c"  # no adapter: the first


def test_any_metric_of_one_answer_will_do(
    way: dict[str, Path], no_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "closeness", lambda answer, reference: 0.5)
    scripted(monkeypatch, a=[1.0, 0.25, 0.5, 0.5], b=[1.0, 0.5, 0.25, 0.25])
    found = phinetune.compare({"a": str(way["adapter"]), "b": str(way["int4"])}, metric="closeness")
    a, b = found.stages
    assert a.metric == "closeness" and a.value == 0.5625 and a.correct == 1 and len(a.wrong) == 3
    assert b.against == Pairs(1, 2, 1.0) and found.record["metric"] == "closeness"
    assert "--metric closeness" in found.record["command"]


# What has no number says why.


def test_answers_of_one_token_have_no_decode_rate(way: dict[str, Path], no_process: None, tmp_path: Path) -> None:
    found = compared(way, "adapter", "int4", max_new_tokens=1, output_dir=tmp_path)
    reason = "every answer has one token, so there is no such time"
    for row in found.stages:
        assert row.metrics["throughput_p50"] is None and row.missing == {"throughput_p50": reason}
        assert row.metrics["prefill_p50"] > 0  # type: ignore[operator]
    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert read["stages"][0]["metrics"]["throughput_p50"] is None
    assert f"adapter, decode tokens/s: {reason}" in (tmp_path / "report.html").read_text()
    assert f"adapter: no decode tokens/s: {reason}" in comparison_lines(found)


def test_a_number_that_is_not_finite_is_none() -> None:
    values, reasons = values_or_reasons(Evidence(loss=Loss(math.inf, 3), size_bytes=7), ["perplexity", "size"])
    assert values == {"perplexity": None, "size": 7.0} and "not a finite number" in reasons["perplexity"]


def test_memory_that_cannot_be_measured_is_said_and_the_rest_stands(
    way: dict[str, Path], notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> int:
        raise ModelError("the process that loads it ended with code -9")

    monkeypatch.setattr(examining, "peak_memory", fails)
    (row,) = compared(way, "int4", on_event=listen(notes)).stages
    assert row.metrics["memory"] is None and row.missing["memory"] == "the process that loads it ended with code -9"
    assert any("ONNX int4: memory was not measured" in note for note in notes) and row.metrics["perplexity"]
    monkeypatch.setattr(memory, "resident_peak", lambda: None)
    monkeypatch.setattr(examining, "peak_memory", None)
    (row,) = compared(way, "int4").stages
    assert row.missing["memory"] == "memory cannot be measured on this system"


# The same examples, or none.


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    loads: list[Any] = []
    monkeypatch.setattr(examining, "load_generator", lambda *args: loads.append(args))
    yield
    assert loads == []


def test_a_model_that_would_be_asked_other_examples_is_refused(
    way: dict[str, Path], tmp_path: Path, never_loaded: None
) -> None:
    short = tiny_folder(tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 60}))  # long rows drop out
    with pytest.raises(DataError) as caught:
        phinetune.compare([*models(way, "adapter"), str(short)])
    (problem,) = caught.value.problems
    assert re.match(r"base: cannot be asked the same examples as adapter: [1-7] of 8 are not to be had for it", problem)
    assert "tone.jsonl:" in problem and "leave that model out" in caught.value.hint


def test_a_model_that_reads_other_tokens_is_asked_the_same_rows_and_that_is_said(
    way: dict[str, Path], tmp_path: Path, no_process: None, notes: list[str]
) -> None:
    other = tiny_folder(tmp_path / "other", chat_template=PHI_TEMPLATE.replace("<|assistant|>\n", "<|assistant|>"))
    data = {"path": str(way["data"]), **PROMPT}
    phinetune.finetune(str(other), data, {"max_steps": 1}, {"r": 2}, FP32, tmp_path / "tuned")
    named = {"a": str(way["adapter"]), "b": str(other), "c": str(tmp_path / "tuned")}
    found = phinetune.compare(named, repeats=1, warmup=0, model_kwargs=FP32, on_event=listen(notes))
    said = found.record["notes"]
    assert [text[:2] for text in said] == ["b:", "c:", "c:"] and "reads the examples as other tokens than a" in said[0]
    assert set(said) <= set(notes)
    # what is held out is drawn by token ids: of these rows, c has trained on most
    assert any(
        re.match("c: [1-8] of the 8 examples are not among those that its own training held out", n) for n in notes
    )
    places = [{w["place"] for w in s.wrong} for s in found.stages]
    assert [s.count for s in found.stages] == [8, 8, 8] and places[1] == places[2] >= places[0]


def test_every_problem_is_told_at_once_and_before_anything_is_loaded(
    way: dict[str, Path], tmp_path: Path, never_loaded: None
) -> None:
    (tmp_path / "report.html").write_text("somebody's")
    with pytest.raises(ConfigError) as caught:
        phinetune.compare(
            [str(tmp_path / "nowhere"), *models(way, "int4")], {"path": str(tmp_path / "gone.jsonl"), **PROMPT},
            tmp_path, "exact_mach", repeats=0, max_examples=0,
        )  # fmt: skip
    text = "\n".join(caught.value.problems)
    for part in (
        "nowhere: no such model folder", "metric: 'exact_mach' does not judge single answers, did you mean \"exact_match\"?",
        "repeats: must be at least 1", "max_examples: must be at least 1", "report.html: is there already",
        "gone.jsonl: no such file",
    ):  # fmt: skip
        assert part in text
    assert len(caught.value.problems) == 6 and "pass --overwrite" in caught.value.hint


def test_single_problems_keep_their_kind(way: dict[str, Path], tmp_path: Path, never_loaded: None) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        phinetune.compare([*models(way, "adapter"), str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="metric: 'f1' does not judge single answers"):
        compared(way, "adapter", metric="f1")
    with pytest.raises(ConfigError, match="no stage is called 'adpter', did you mean \"adapter\""):
        compared(way, "adapter", "int4", reference="adpter")
    with pytest.raises(ConfigError, match="data: this key is needed"):
        compared(way, "base")
    with pytest.raises(ConfigError, match="given twice"):
        compared(way, "adapter", "adapter")
    with pytest.raises(ConfigError, match="give a list of models"):
        phinetune.compare(str(way["adapter"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written as a folder"):
        compared(way, "adapter", output_dir=tmp_path / "file" / "out")


def test_data_and_part_are_those_of_the_first_trained_model(way: dict[str, Path], no_process: None) -> None:
    found = compared(way, "base", "int4", split="train", max_examples=3)
    assert found.record["split"] == "train" and [s.count for s in found.stages] == [3, 3]
    assert found.record["data"]["path"] == str(way["data"]) and found.reference == "base"


def test_stage_names_say_what_a_model_is_and_are_unique(way: dict[str, Path], tmp_path: Path) -> None:
    def subject(name: str, kind: Any) -> Subject:
        return Subject(str(way.get(name, tmp_path / name)), way.get(name, tmp_path / name), kind)

    found = {"a": subject("int4", "onnx"), "b": subject("base", "hf"), "c": subject("x", "hf"), "d": subject("x", "hf")}
    assert list(stage_names(list(found), found)) == ["ONNX int4", "base (llama)", "base (x)", "base (x)'"]
    assert stage_names({"a": "x"}, found) is found
    foreign = SimpleNamespace(model="y", folder=tmp_path / "y", kind="onnx")
    assert list(stage_names(["y"], {"y": foreign})) == ["ONNX"]  # type: ignore[dict-item]


# What is left.


def test_report_and_results_agree(way: dict[str, Path], no_process: None, tmp_path: Path) -> None:
    found = compared(
        way, "adapter", "merged", "int4", output_dir=tmp_path / "new" / "out", model_kwargs={**FP32, "token": "hf_x"}
    )
    assert found.folder == tmp_path / "new" / "out"
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    read = json.loads((found.folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert page == report_html(read)
    for row, kept in zip(found.stages, read["stages"], strict=True):
        assert kept["stage"] == row.stage and kept["metrics"] == row.metrics and kept["interval"] == list(row.interval)
        assert kept["against"] == (row.against and vars(row.against))
        texts = [f"{row.value:.1%}", f"{row.correct}/8", *(cell_text(name, row.metrics[name]) for name in COLUMNS)]
        assert all(text in page for text in texts) and pairs_text(row.against).split(", p")[0] in page
    assert page.count("<svg") == 3 and page.count("<details>") == 3 and 'role="img"' in page
    assert read["machine"]["processor"] in page and read["machine"]["threads"] >= 1
    assert (
        read["versions"]["torch"] in page and read["command"].startswith("phinetune compare /") and "hf_x" not in page
    )
    assert "hf_x" not in json.dumps(read)
    assert {"stages", "versions", "made", "data", "seed", "split", "reference", "metric", "seconds"} <= set(read)


def test_the_report_needs_nothing_from_outside_and_escapes_what_came_from_there(
    way: dict[str, Path], no_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evil = '<script>alert("1")</script>'
    scripted(monkeypatch, **{evil: [1.0, 0.0], "b": [0.0, 0.0]})
    found = phinetune.compare({evil: str(way["adapter"]), "b": str(way["int4"])}, output_dir=tmp_path)
    found.record["notes"].append(evil)
    for row in found.record["stages"]:
        row["missing"] = {evil: evil}
        row["path"] = evil
        for wrong in row["wrong"]:
            wrong |= dict.fromkeys(wrong, evil)
    found.record.update(made=evil, command=evil, versions={evil: evil}, metric=evil, data={"path": evil, "seed": evil})
    found.record["machine"] |= {"processor": evil, "system": evil}
    page = report_html(found.record)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(", page)
    assert re.search(r"prefers-color-scheme: dark", page) and 'name="viewport"' in page


def test_the_terminal_table_fits_in_110_columns(way: dict[str, Path], no_process: None) -> None:
    from rich.console import Console

    found = compared(way, "adapter", "int4")
    long = [
        stage.replace(s, stage="a stage with quite a long name of its own", correct=1234, count=1234)
        for s in found.stages
    ]
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(comparison_table(long))
    text = console.export_text()
    assert "…" not in text and all(len(line) <= 110 for line in text.splitlines())
    assert all(head.split()[-1] in text for head in COLUMNS.values()) and "1234/1234" in text


# The command.


def test_compare_as_a_command(way: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    args = ["compare", f"tuned={way['adapter']}", str(way["int4"]), "--max-examples", "4", "--repeats", "1", "--warmup", "0",
            "--max-new-tokens", "3", "-o", out, "-s", "model_kwargs.torch_dtype=float32", "-q"]  # fmt: skip
    assert main(args) == 0
    shown = capsys.readouterr().out
    read = json.loads((tmp_path / "out" / "results.json").read_text())
    tuned, int4 = read["stages"]
    assert tuned["stage"] == "tuned" and int4["stage"] == str(way["int4"]) and tuned["count"] == 4
    assert f"{tuned['correct']}/4" in shown and f"against tuned: {int4['against']['won']} won" in shown
    assert 20e6 < int4["metrics"]["memory"] < tuned["metrics"]["memory"] < 20e9  # each in a fresh process
    assert f"tuned={way['adapter']}" in read["command"] and "--max-examples 4" in read["command"]
    assert main(args) == 2 and "is there already" in capsys.readouterr().err
    assert main([*args, "--overwrite", "--metric", "f1"]) == 2 and "does not judge" in capsys.readouterr().err
    assert main(["compare"]) == 2 and "models: this key is needed" in capsys.readouterr().err


def test_quickstart_compares_its_stages(
    llama_folder: Path, no_process: None, tmp_path: Path, tone_data: Any, notes: list[str]
) -> None:
    done = phinetune.quickstart(tmp_path / "q", str(llama_folder), tone_data, {"max_steps": 1}, on_event=listen(notes))
    read = json.loads((tmp_path / "q" / "results.json").read_text())
    assert [s["stage"] for s in read["stages"]] == ["base", "adapter", "merged", "ONNX int4"]
    assert done.comparison.reference == "adapter" and read["training"]["steps"] == 1 and len(read["unseen"]) == 3
    assert read["model"] == str(llama_folder) and read["seed"] == 0 and read["data"]["path"] == tone_data["path"]
    assert all("perplexity" not in s["metrics"] and s["metrics"]["memory"] == PEAK for s in read["stages"])
    assert "perplexity" not in report_html(read) and "decode tokens/s" in report_html(read)
    assert (tmp_path / "q" / "report.html").read_text() == report_html(read)


def test_quickstart_again_compares_nothing_that_it_has_compared(
    llama_folder: Path, no_process: None, tmp_path: Path, tone_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[Any, list[str]]:
        said: list[str] = []
        model, place = str(llama_folder), tmp_path / "q"
        return phinetune.quickstart(place, model, tone_data, {"max_steps": 1}, on_event=listen(said)), said

    first, _ = run()
    made = (tmp_path / "q" / "results.json").read_bytes()
    again, said = run()
    assert again.comparison.stages == first.comparison.stages and again.answers == first.answers
    assert again.seconds == first.seconds and (tmp_path / "q" / "results.json").read_bytes() == made
    assert any("unchanged" in note and "results.json" in note for note in said)
    (tmp_path / "q" / "results.json").write_text(made.decode()[:-9])
    assert "results.json" in run()[1][-1] and json.loads((tmp_path / "q" / "results.json").read_text())["made_of"]
    monkeypatch.setattr("phinetune.workflow.quickstart.machine_key", lambda: "another")
    assert not any("unchanged" in note and "results.json" in note for note in run()[1])
