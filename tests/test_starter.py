"""`phinetune init`: what it writes is read back without a problem, fits the data, and runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from phinetune.cli.app import main
from phinetune.config import read_yaml
from phinetune.errors import ConfigError, DataError
from phinetune.workflow.config import PassEntry, WorkflowConfig, parse_workflow, read_workflow
from phinetune.workflow.goals import parse_goals
from phinetune.workflow.passes import find_pass, parse_pass, pass_table
from phinetune.workflow.plan import prepare
from phinetune.workflow.starter import starting_file
from tiny import PROMPT, tone_rows, write_rows

SHAPES: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]}],
    "alpaca": [{"instruction": "Add", "input": "1 2", "output": "3"}],
    "question": [{"question": "Why?", "answer": "Because."}],
}


def read(text: str) -> tuple[WorkflowConfig, list[PassEntry]]:
    config, entries = parse_workflow(read_yaml(text, "starter"))
    for entry in entries:
        parse_pass(entry, find_pass(entry, pass_table()), entry.values)
    return config, entries


@pytest.mark.parametrize("shape", SHAPES)
def test_known_shapes_need_no_templates(shape: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", SHAPES[shape] * 3)
    text = starting_file("smollm2-135m", str(file))
    config, entries = read(text)
    assert config.data["default"].prompt is None and "known shape" in text and "GUESSED" not in text
    assert [e.type for e in entries] == ["LoRA", "MergeAdapterWeights", "ModelBuilder"]


def test_given_templates_are_kept_and_the_text_is_short(tone_file: Path) -> None:
    text = starting_file("owner/model", str(tone_file), **PROMPT)
    config, _ = read(text)
    data = config.data["default"]
    assert (data.prompt, data.completion, config.model.path) == (PROMPT["prompt"], PROMPT["completion"], "owner/model")
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 24 and text.count("#") > 15
    assert config.evaluate is not None and config.evaluate.metrics == ["exact_match", "size"]


def test_what_the_comments_propose_is_right_too(tone_file: Path) -> None:
    text = starting_file("m", str(tone_file), **PROMPT)
    for key in ("constraints", "objectives", "search", "learning_rate"):
        text = text.replace(f"# {key}:", f"{key}:")
    config, _ = read(text)
    assert config.search is not None and config.search.trials == 12 and len(config.objectives) == 2
    goals = parse_goals(config.constraints, config.objectives, ["exact_match", "size"])
    assert len(goals.constraints) == 2 and goals.metrics == ["exact_match", "size"]


@pytest.mark.parametrize("goal, count", [("adapter", 1), ("model", 2), ("int4", 3)])
def test_the_goal_says_where_it_ends(goal: Any, count: int, tone_file: Path) -> None:
    assert len(read(starting_file("m", str(tone_file), **PROMPT, goal=goal))[1]) == count


def test_templates_are_guessed_from_the_fields_with_a_remark(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "r.jsonl", [{"label": "joy", "id": 7, "the phrase": "a long phrase", "n.b": "not a field"}]
    )
    text = starting_file("m", str(file))
    data = read(text)[0].data["default"]
    assert (data.prompt, data.completion) == ("{the phrase}", "{label}") and "GUESSED" in text
    with (tmp_path / "r.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["note", "verdict"], ["it was rather long", "ok"]])
    data = read(starting_file("m", str(tmp_path / "r.csv")))[0].data["default"]
    assert (data.prompt, data.completion) == ("{note}", "{verdict}")


def test_a_bundled_set_brings_its_templates() -> None:
    assert read(starting_file("m", "tone"))[0].data["default"].prompt == PROMPT["prompt"]


def test_long_answers_are_measured_by_perplexity(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "r.jsonl", [{"question": "Why?", "answer": "Because of this and that, and more."}] * 3)
    config, _ = read(starting_file("m", str(file)))
    assert config.evaluate is not None and config.evaluate.metrics == ["perplexity", "size"]


@pytest.mark.parametrize("name", ['odd "name" # 1.jsonl', "yes", "12e3", "späße.jsonl", "a: b.jsonl"])
def test_any_name_survives_yaml(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_rows(tmp_path / ("d.jsonl" if not name.endswith("jsonl") else name), tone_rows(4))
    data = file.name
    config, _ = read(starting_file(name, data, 'Say: "{phrase}" # {{not a field}}\n', "{tone}"))
    assert config.model.path == name and config.data["default"].path == data
    assert config.data["default"].prompt == 'Say: "{phrase}" # {{not a field}}\n'


def test_bad_data_and_templates_are_errors_of_one_line(tmp_path: Path, tone_file: Path) -> None:
    single = write_rows(tmp_path / "one.jsonl", [{"text": "alone"}])
    with pytest.raises(ConfigError, match="which of its fields is the question") as caught:
        starting_file("m", str(single))
    assert "--prompt" in caught.value.hint and "text" in str(caught.value)
    with pytest.raises(DataError, match='missing field "phrse"'):
        starting_file("m", str(tone_file), "{phrse}", "{tone}")
    with pytest.raises(ConfigError, match="come together"):
        starting_file("m", str(tone_file), "{phrase}")
    with pytest.raises(DataError, match="no such file"):
        starting_file("m", str(tmp_path / "none.jsonl"))


def test_init_writes_a_file_that_a_run_accepts_and_never_overwrites(
    tmp_path: Path,
    tone_file: Path,
    llama_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["init", "-m", str(llama_folder), "-d", tone_file.name]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "phinetune run phinetune.yaml" in said.out and "guessed" in said.err
    config, entries = read_workflow("phinetune.yaml", [f"cache_dir={tmp_path / 'cache'}"])
    workflow = prepare(config, entries)
    assert [s.entry.name for s in workflow.steps({})] == ["lora", "merge", "int4"]
    (tmp_path / "phinetune.yaml").write_text("mine")
    assert main(command) == 2 and (tmp_path / "phinetune.yaml").read_text() == "mine"
    assert "is there already" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--goal", "adapter"]) == 0
    assert "merge" not in (tmp_path / "phinetune.yaml").read_text().split("passes:")[1].split("evaluate:")[0]
    assert main([*command, "-o", str(tmp_path)]) == 2 and main([*command, "-o", "new/w.yaml"]) == 0


def test_the_starting_workflow_trains(tmp_path: Path, tone_file: Path, llama_folder: Path) -> None:
    text = starting_file(str(llama_folder), str(tone_file), **PROMPT, goal="adapter")
    values = read_yaml(text, "starter")
    values["passes"]["lora"]["training_config"] = {"max_steps": 1}
    config, entries = parse_workflow({**values, "cache_dir": str(tmp_path / "cache")})
    step = prepare(config, entries).steps({})[0]
    step.pass_.run(step.job, step.job.output)
    assert (step.job.output / "adapter_config.json").is_file()
