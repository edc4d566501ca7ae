"""Workflow files: what is read as what, every reference and key checked, all problems in one error with their lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phinetune.config import apply_settings, locate, put, read_json, read_yaml
from phinetune.errors import ConfigError
from phinetune.workflow.config import ONLY, as_values, parse_workflow, read_workflow
from tiny import PROMPT
from workflows import write_script

SMALL: dict[str, Any] = {"model": "m", "passes": {"merge": {"type": "MergeAdapterWeights"}}}


def problems(values: dict[str, Any], folder: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_workflow(values, folder)
    assert all("\n" not in p for p in caught.value.problems)
    assert len(set(caught.value.problems)) == len(caught.value.problems)
    return caught.value.problems


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "w.yaml"


def file_problems(file: Path, text: str, *settings: str) -> list[str]:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_workflow(file, settings)
    return [p.replace(str(file), "F") for p in caught.value.problems]


# --- what is read as what ---


def test_the_smallest_workflow_has_defaults_for_the_rest() -> None:
    config, entries = parse_workflow(SMALL)
    assert config.model.path == "m" and config.data == {} and config.search is None and config.evaluate is None
    (entry,) = entries
    assert (entry.name, entry.type, entry.values, entry.path) == ("merge", "MergeAdapterWeights", {}, "passes.merge")


def test_a_pass_is_of_the_type_that_its_name_says_if_it_says_none() -> None:
    _, entries = parse_workflow({**SMALL, "passes": {"LoRA": None, "rtn": {"block_size": 32}}})
    assert [(e.name, e.type, e.values) for e in entries] == [("LoRA", "LoRA", {}), ("rtn", "rtn", {"block_size": 32})]


def test_alternatives_share_a_name_and_have_places() -> None:
    quant = [{"type": "Rtn"}, {"type": "ModelBuilder", "host": "box", "evaluate": False, "precision": "int4"}]
    _, entries = parse_workflow({**SMALL, "passes": {"q": quant}, "systems": {"box": {"type": "local"}}})
    assert [(e.name, e.path, e.host, e.evaluate) for e in entries] == [
        ("q", "passes.q[0]", None, None),
        ("q", "passes.q[1]", "box", False),
    ]
    assert entries[1].values == {"precision": "int4"}  # what is the workflow's is not the pass's


@pytest.mark.parametrize(
    ("given", "names", "path"),
    [
        ("tone", [ONLY], "tone"),
        ({"path": "f.jsonl", "seed": 3}, [ONLY], "f.jsonl"),
        ({"train": "a.jsonl", "dev": {"path": "b.jsonl"}}, ["train", "dev"], "a.jsonl"),
    ],
)
def test_data_is_a_file_a_config_or_several_by_name(given: Any, names: list[str], path: str) -> None:
    config, _ = parse_workflow({**SMALL, "data": given})
    assert list(config.data) == names and config.data[names[0]].path == path


def test_a_bundled_set_brings_its_templates_even_where_a_folder_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "tone").mkdir()
    config, _ = parse_workflow({**SMALL, "data": "tone"}, tmp_path)
    assert config.data[ONLY].path == "tone" and config.data[ONLY].completion == "{tone}"


def test_files_that_are_not_here_are_looked_for_beside_the_workflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "f.jsonl").write_text("{}\n")
    write_script(tmp_path)
    monkeypatch.chdir(elsewhere)
    passes = {"pad": {"type": "Pad", "user_script": "passes.py"}, "alt": [{"type": "Pad", "user_script": "passes.py"}]}
    config, entries = parse_workflow({"model": "m", "data": "f.jsonl", "passes": passes}, tmp_path)
    assert config.data[ONLY].path == str(tmp_path / "f.jsonl")
    assert [e.user_script for e in entries] == [str(tmp_path / "passes.py")] * 2
    assert config.passes["pad"]["user_script"] == str(tmp_path / "passes.py")  # a worker reads this one
    assert config.passes["alt"][0]["user_script"] == str(tmp_path / "passes.py")
    (elsewhere / "f.jsonl").write_text("{}\n")
    assert parse_workflow({**SMALL, "data": "f.jsonl"}, tmp_path)[0].data[ONLY].path == "f.jsonl"  # here comes first


FULL: dict[str, Any] = {
    "model": {"path": "m", "adapter": "a", "model_kwargs": {"torch_dtype": "bfloat16"}},
    "data": {"train": {"path": "a.jsonl", **PROMPT}, "dev": "b.jsonl"},
    "passes": {
        "lora": {"type": "LoRA", "r": {"choices": [4, 8]}, "data": "train", "training_config": {"learning_rate": 5e-4}},
        "q": [{"type": "Rtn"}, {"type": "ModelBuilder", "host": "box"}],
    },
    "evaluate": {"metrics": ["exact_match", "size"], "data": "dev", "max_examples": 3},
    "constraints": ["size <= 90 MB"],
    "objectives": ["max exact_match"],
    "search": {"trials": 3, "sampler": "random"},
    "systems": {"box": {"type": "local", "accelerator": {"device": "cpu", "memory": "4GB"}}},
    "host": "local",
    "target": "box",
    "seed": 3,
    "output_dir": "out",
    "cache_dir": "cache",
    "package": {"name": "zip"},
}


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text(json.dumps({"$schema": "x", **FULL}))
    (tmp_path / "w.yaml").write_text(yaml.safe_dump(FULL, sort_keys=False))
    assert read_workflow(tmp_path / "w.json") == read_workflow(tmp_path / "w.yaml") == parse_workflow(FULL)


@pytest.mark.parametrize("values", [SMALL, FULL])
def test_a_workflow_as_values_is_the_same_workflow(values: dict[str, Any]) -> None:
    config, entries = parse_workflow(values)
    again = json.loads(json.dumps(as_values(config)))  # as workers get it
    assert parse_workflow(again) == (config, entries)


def test_reading_leaves_the_values_as_they_are() -> None:
    before = json.dumps(FULL)
    parse_workflow(FULL)
    assert json.dumps(FULL) == before


# --- what is wrong ---


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"modle": "x"}, 'modle: unknown key, did you mean "model"?'),
        ({"model": None}, "model: input should be"),
        ({"model": {}}, "model.path: this key is needed"),
        ({"model": {"path": "m", "adaptor": "a"}}, 'model.adaptor: unknown key, did you mean "adapter"?'),
        ({"passes": {}}, "passes: this key is needed"),
        ({"passes": None}, "passes: this key is needed"),
        ({"passes": [1]}, "passes: must be names and passes (found: [1])"),
        ({"passes": {"a": 3}}, "passes.a: must be a pass's type and keys (found: 3)"),
        ({"passes": {"a": []}}, "passes.a: an empty list of alternatives"),
        ({"passes": {"a": ["x"]}}, "passes.a[0]: must be a pass's type and keys (found: 'x')"),
        ({"passes": {"a": {"type": 3}}}, "passes.a.type: must be a name (found: 3)"),
        ({"passes": {"a": {"type": "Rtn", "host": ["x"]}}}, "passes.a.host: must be a name (found: ['x'])"),
        ({"passes": {"a": {"type": "Rtn", "evaluate": "no"}}}, "passes.a.evaluate: must be true or false (found: 'no')"),
        ({"passes": {"a": {"type": "Rtn", "user_script": {"choices": [1]}}}}, "passes.a.user_script: must be a name"),
        ({"passes": {"../a": {"type": "Rtn"}}}, "passes: '../a' cannot be the name of a pass"),
        ({"passes": {"a.b": {"type": "Rtn"}}}, "passes: 'a.b' cannot be the name of a pass"),
        ({"host": "far"}, "host: no system is called 'far'"),
        ({"target": "boxx", "systems": {"box": {}}}, "target: no system is called 'boxx', did you mean \"box\"?"),
        ({"passes": {"a": [{"type": "Rtn", "host": "far"}]}}, "passes.a[0].host: no system is called 'far'"),
        ({"systems": {"box": {"type": "lokal"}}}, "systems.box.type: input should be"),
        ({"systems": {"box": {"pyhton": "x"}}}, 'systems.box.pyhton: unknown key, did you mean "python"?'),
        ({"evaluate": {"data": "dev"}}, "evaluate.data: no data config is called 'dev'"),
        ({"evaluate": {"metric": ["size"]}}, 'evaluate.metric: unknown key, did you mean "metrics"?'),
        ({"evaluate": {"repeats": 0}}, "evaluate: repeats must be at least 1"),
        ({"data": 3}, "data: must be a file, a data config, or names and data configs (found: 3)"),
        ({"data": {"prompt": "{a}", "completion": "{b}"}}, "data.path: this key is needed"),
        ({"data": {"pth": "f.jsonl", "seed": 3}}, "data.path: this key is needed"),
        ({"data": {"pth": "f.jsonl", "seed": 3}}, 'data.pth: unknown key, did you mean "path"?'),
        ({"data": {"a": {"path": "f", "promt": "x"}}}, 'data.a.promt: unknown key, did you mean "prompt"?'),
        ({"data": {"a": {"path": "f"}, "b": 4}}, "data.b: input should be"),
        ({"data": {"path": "f", "test_fraction": 2}}, "data: test_fraction must be at least 0 and below 1"),
        ({"constraints": "size <= 3"}, "constraints: input should be a valid list"),
        ({"search": {"trials": 0}}, "search: trials must be above 0"),
        ({"search": {"minutes": float("nan")}}, "search: minutes must be above 0"),
        ({"search": {"sampler": "grid"}}, "search.sampler: input should be"),
        ({"seed": "x"}, "seed: input should be a valid integer"),
        ({"package": {"nam": "x"}}, 'package.nam: unknown key, did you mean "name"?'),
        ({"constraints": ["size <= base"], "passes": {"a": {"type": "Rtnn"}}, "seed": "x"}, "passes.a.type: no pass is called 'Rtnn'"),
    ],
)  # fmt: skip
def test_every_wrong_key_value_and_reference_is_named(change: dict[str, Any], expected: str) -> None:
    found = problems({**SMALL, **change})
    assert any(p.startswith(expected) for p in found), found


def test_what_is_right_is_not_blamed_for_what_is_wrong() -> None:
    """A part that cannot be read makes no problems in the parts that refer to it."""
    passes = {"lora": {"type": "LoRA", "data": "train", "r": {"choices": [2, 4]}}}
    values = {
        "model": {"pth": "m"},
        "data": {"train": {"path": "f", "promt": "x"}},
        "passes": passes,
        "systems": {"box": {"typ": "local"}},
        "host": "box",
        "constraints": 3,
        "search": {"trails": 3},
    }
    assert {p.split(": ")[0] for p in problems(values)} == {
        *("model.pth", "model.path", "data.train.promt", "systems.box.typ", "constraints", "search.trails"),
    }


def test_problems_of_every_part_come_in_one_error(tmp_path: Path) -> None:
    values = {
        "modle": "x",
        "model": str(tmp_path / "none"),
        "data": "nowhere.jsonl",
        "passes": {
            "merge": {"type": "MergeAdapterWeights", "bse": "auto"},
            "lora": {"type": "LoRA", "rr": 3, "training_config": {"learning_rat": 1}},
            "own": {"type": "X", "user_script": "none.py"},
            "int4": {"type": "ModelBuilder", "block_size": {"choices": []}},
        },
        "constraints": ["exact_mtch >= 0.9", "size"],
        "evaluate": {"metrics": ["sise"], "data": "dev"},
        "host": "far",
    }
    found = problems(values)
    for start in (
        *("modle: unknown key", "host: no system", "evaluate.data: no data config", "constraints[0]: no metric", "constraints[1]: not"),
        *("evaluate.metrics: ", "passes.lora.rr: unknown key", "passes.lora.training_config.learning_rat: unknown key"),
        *("passes.merge.bse: unknown key", "passes.own.user_script: none.py: no such file", "passes.int4.block_size: choices must be"),
        *("data: nowhere.jsonl: no such file", "model: "),
    ):  # fmt: skip
        assert sum(p.startswith(start) for p in found) == 1, (start, found)


# --- lines ---

TEXT = """\
model: m
data:
  train: {path: f.jsonl, promt: x}
passes:
  lora:
    type: LoRA
    host: far
  q:
    - type: Rtn
      host: near
    - {type: Rtn,
       evaluate: maybe}
evaluate:
  data: dev
sed: 3
"""


def test_each_problem_has_the_line_of_its_key(file: Path) -> None:
    found = file_problems(file, TEXT)
    starts = {p.split(": ")[0] + ": " + p.split(": ")[1] for p in found}
    assert {
        *("F:3: data.train.promt", "F:7: passes.lora.host", "F:10: passes.q[0].host", "F:12: passes.q[1].evaluate"),
        *("F:14: evaluate.data", "F:15: sed"),
    } <= starts  # fmt: skip


def test_lines_are_those_of_json_too(tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    text = json.dumps({**SMALL, "host": "far", "sed": 1}, indent="\t")
    lines = text.splitlines()
    found = file_problems(file, text)
    for key in ("host", "sed"):
        line = next(i for i, one in enumerate(lines, 1) if f'"{key}"' in one)
        assert any(p.startswith(f"F:{line}: {key}: ") for p in found)


def test_a_key_that_is_missing_has_the_line_of_its_group(file: Path) -> None:
    assert "F:2: model.path: this key is needed" in file_problems(
        file, "passes: {m: {type: Rtn}}\nmodel: {adapter: x}\n"
    )
    assert "F: model: this key is needed" in file_problems(file, "passes: {m: {type: Rtn}}\n")


def test_a_problem_is_located_once_and_one_of_the_command_line_never(file: Path) -> None:
    error = ConfigError(["b.c: wrong", "no path here", "--set b.c:1:1: not valid YAML", "zzz: unknown"], "hint")
    once = locate(error, "a: 1\nb:\n  c: 2\n", file)
    assert once.problems == [
        *(f"{file}:3: b.c: wrong", f"{file}: no path here", "--set b.c:1:1: not valid YAML", f"{file}: zzz: unknown"),
    ]
    assert once.hint == "hint"
    assert locate(once, "a: 1\nb:\n  c: 2\n", file).problems == once.problems


@given(st.text(max_size=40), st.text(max_size=20))
def test_locating_fails_for_no_text_and_no_problem(text: str, problem: str) -> None:
    (found,) = locate(ConfigError([problem]), text, Path("w.yaml")).problems
    assert found.endswith(problem)


# --- files that are hostile or odd ---


@pytest.mark.parametrize("reader", [read_json, read_yaml])
def test_what_is_nested_without_end_is_refused(reader: Any) -> None:
    for depth in (101, 400, 5000, 100_000):
        with pytest.raises(ConfigError, match="src: nested too deeply"):
            reader("[" * depth + "]" * depth, "src")
    assert reader("[" * 90 + "]" * 90, "src")


def test_a_setting_and_a_file_that_are_nested_without_end_are_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="--set a: nested too deeply"):
        apply_settings({}, ["a=" + "[" * 5000 + "]" * 5000])
    assert file_problems(file, "a: " + "[" * 3000 + "]" * 3000) == ["F: nested too deeply"]


def laughs(levels: int) -> str:
    return "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, levels))


def test_anchors_that_explode_are_refused_and_others_are_not() -> None:
    with pytest.raises(ConfigError, match="its anchors stand for more than 100,000 values"):
        read_yaml(laughs(9), "src")
    with pytest.raises(ConfigError, match="its anchors stand for"):
        read_yaml("a: &a [*a]", "src")
    with pytest.raises(ConfigError, match="its anchors stand for"):
        read_yaml("a: &a {<<: *a}", "src")
    with pytest.raises(ConfigError, match="its anchors stand for"):
        read_yaml("a0: &a0 {x: [1, 2, 3, 4, 5, 6, 7, 8, 9]}\n" + "".join(
            f"a{i}: &a{i} {{b: *a{i - 1}, c: *a{i - 1}, d: *a{i - 1}, e: *a{i - 1}, f: *a{i - 1}}}\n" for i in range(1, 9)
        ) + "z: {<<: *a8}", "src")  # fmt: skip
    assert read_yaml(laughs(3), "src")["a1"] == [["x", "x"]] * 9


def test_merged_keys_are_read_and_own_ones_win() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*b, *a], z: 4}\nd: {y: 5, <<: *b}"
    assert read_yaml(text, "src") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 3, "z": 4},
        "d": {"x": 1, "y": 5},
    }
    with pytest.raises(ConfigError, match="src:2: x: this key is given twice"):
        read_yaml("a: &a {x: 1}\nb: {<<: *a, x: 1, x: 2}", "src")


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object:os.system x",
        "!mine x",
        "!!binary aGk=",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!python/name:os.system",
    ],
)
def test_tags_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="src:1:4: not valid YAML"):
        read_yaml(f"a: {value}", "src")


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', '{"a": [Infinity]}', '{"a": ' + "1" * 5000 + "}", '{"a": 1, "b": {"": 1, "": 2}}', "{", "\x00"],
)
def test_json_that_is_none_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_json(text, "src")
    (problem,) = caught.value.problems
    assert problem.startswith("src:") and "\n" not in problem and len(problem) < 200


# --- --set ---


def test_settings_reach_into_spaces_and_alternatives() -> None:
    settings = [
        "passes.lora.r={choices: [2, 4]}",
        "passes.q[1].precision=int8",
        "passes.q[0]={type: ModelBuilder}",
        "evaluate.metrics[1]=memory",
    ]
    config, entries = parse_workflow(
        apply_settings(FULL, [*settings, "passes.lora.r.choices[0]=16", "data.train.seed=7"])
    )
    assert entries[0].values["r"] == {"choices": [16, 4]}
    assert [e.type for e in entries[1:]] == ["ModelBuilder", "ModelBuilder"] and entries[2].values[
        "precision"
    ] == "int8"
    assert config.evaluate is not None and config.evaluate.metrics == ["exact_match", "memory"]
    assert config.data["train"].seed == 7
    assert FULL["passes"]["q"][0] == {"type": "Rtn"}


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("passes.q[2].x", "passes.q[2].x: q is a list of 2; say which one, such as q[0]"),
        ("passes.q[2]", "passes.q[2]: q is a list of 2"),
        ("passes.q.x", "passes.q.x: q is ["),
        ("passes.lora[0].x", "passes.lora[0].x: lora is not a list"),
        ("seed.x", "seed.x: seed is 3, not a group of keys"),
        ("..", "'..': not a key"),
    ],
)
def test_a_setting_that_reaches_nothing_is_refused(key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        put(json.loads(json.dumps(FULL)), key, 1)
    assert caught.value.problems[0].startswith(reason)


def test_a_setting_changes_one_place_of_an_anchor_that_stands_in_two() -> None:
    values = read_yaml("a: &a {x: {y: 1}, l: [{z: 1}]}\nb: *a", "src")
    changed = apply_settings(values, ["a.x.y=2", "a.l[0].z=3"])
    assert changed == {"a": {"x": {"y": 2}, "l": [{"z": 3}]}, "b": {"x": {"y": 1}, "l": [{"z": 1}]}}


def test_a_setting_that_is_wrong_is_named_with_the_file(file: Path) -> None:
    text = "model: m\npasses: {m: {type: Rtn}}\n"
    assert "F:2: passes.m.host: no system is called 'far'" in file_problems(file, text, "passes.m.host=far")
    assert file_problems(file, text, "passes.m.host=[")[0].startswith("--set passes.m.host:1:")
