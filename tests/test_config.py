"""What the user wrote becomes a frozen dataclass, or an error naming each problem by path, file, line and column."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phinetune.cli.options import arguments
from phinetune.config import STRICT, apply_settings, parse, put, read_config, read_yaml
from phinetune.errors import ConfigError, PhinetuneError, did_you_mean
from phinetune.workflow.finetune import finetune


@dataclass(frozen=True)
class Inner:
    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    rank: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError("rank must be at least 1")


@dataclass(frozen=True)
class Outer:
    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None
    modules: list[str] | str = "all"


def problems(error: PhinetuneError) -> list[str]:
    assert all(text and "\n" not in text for text in error.problems)
    return error.problems


def parse_problems(values: Any, path: str = "") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, values, path)
    return problems(caught.value)


# --- errors ---


def test_an_error_shows_one_problem_as_it_is_and_several_as_a_list() -> None:
    assert str(PhinetuneError("one")) == "one"
    assert str(PhinetuneError("one", "do this")) == "one\nhint: do this"
    assert str(PhinetuneError(["one", "two"], "do this")) == "- one\n- two\nhint: do this"
    assert PhinetuneError("one").exit_code == 2


@pytest.mark.parametrize(
    ("word", "expected"), [("promt", ', did you mean "prompt"?'), ("prompt", ', did you mean "prompt"?'), ("zzz", "")]
)
def test_the_nearest_known_word_is_suggested_if_one_is_near(word: str, expected: str) -> None:
    assert did_you_mean(word, ["prompt", "completion"]) == expected
    assert did_you_mean(word, []) == ""


# --- parse ---


def test_values_become_the_dataclass_with_its_defaults() -> None:
    assert parse(Outer, {"name": "x"}) == Outer("x")
    assert parse(Outer, {"name": "x", "inner": {"rank": 4}, "other": {}, "modules": ["q", "v"]}) == Outer(
        "x", Inner(4), Inner(), ["q", "v"]
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [({"rank": "4"}, Inner(4)), ({"rank": 4.0}, Inner(4)), ({"dropout": "5e-2"}, Inner(dropout=0.05))],
)
def test_text_that_is_a_number_is_read_as_one(values: dict[str, Any], expected: Inner) -> None:
    assert parse(Inner, values) == expected


@pytest.mark.parametrize(
    ("values", "path", "expected"),
    [
        ({"nme": "x"}, "", ["name: this key is needed", 'nme: unknown key, did you mean "name"?']),
        ({"name": "x", "zzz": 1}, "", ["zzz: unknown key"]),
        ({"name": "x", "inner": {"rnak": 1}}, "", ['inner.rnak: unknown key, did you mean "rank"?']),
        ({"name": "x", "inner": {"rnak": 1}}, "peft", ['peft.inner.rnak: unknown key, did you mean "rank"?']),
        ({"name": "x", "other": {"rnak": 1}}, "", ['other.rnak: unknown key, did you mean "rank"?']),
        ({"name": "x", "inner": {"rank": 1.5}}, "", ["inner.rank: input should be a valid integer"]),
        ({"name": "x", "inner": {"rank": 0}}, "", ["inner: rank must be at least 1"]),
        ({}, "outer", ["outer.name: this key is needed"]),
        ([], "outer", ["outer: input should be a dictionary"]),
        ({"name": "x", 3: 4}, "", ["3: keys should be strings"]),
    ],
)
def test_every_problem_is_named_by_its_path(values: Any, path: str, expected: list[str]) -> None:
    found = sorted(parse_problems(values, path))
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_all_problems_are_named_at_once() -> None:
    found = parse_problems({"nam": 1, "inner": {"rank": "x", "dropout": None, "rnk": 2}, "other": 7})
    assert {text.split(": ")[0] for text in found} == {
        *("name", "nam", "other"),
        *("inner.rank", "inner.dropout", "inner.rnk"),
    }


def test_a_wrong_value_is_quoted() -> None:
    (text,) = parse_problems({"name": "x", "inner": {"rank": "four"}})
    assert text.endswith("(found: 'four')")


# --- files ---

VALUES = {"model": "x", "data": {"path": "f.jsonl", "seed": 3}, "list": [1, "a", None], "flag": True, "rate": 0.0005}


@pytest.mark.parametrize(
    ("name", "dump"),
    [
        ("c.yaml", yaml.safe_dump),
        ("c.yml", yaml.safe_dump),
        ("config", yaml.safe_dump),
        ("c.json", json.dumps),
        ("c.yaml", json.dumps),
    ],
)
def test_yaml_and_json_are_read(name: str, dump: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(dump(VALUES))
    assert read_config(tmp_path / name) == VALUES


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_a_byte_order_mark_is_no_part_of_a_config(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + json.dumps(VALUES).encode())
    assert read_config(tmp_path / name) == VALUES


def refusal(file: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    (text,) = problems(caught.value)
    return text


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("c.yaml", "a: 1\nb: [1, 2\nc: 3", "3:2"),
        ("c.yaml", "a:\n\tb: 1", "2:1"),
        ("c.yaml", "a: b: c", "1:5"),
        ("c.yaml", "a: !!python/object:os.system x", "1:4"),
        ("c.yaml", "a: 1\n---\nb: 2", "2:1"),
        ("c.json", '{"a": 1,\n "b" 2}', "2:6"),
        ("c.json", "", "1:1"),
    ],
)
def test_a_broken_file_is_named_with_line_and_column(name: str, text: str, where: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    kind = "JSON" if name.endswith("json") else "YAML"
    assert refusal(tmp_path / name).startswith(f"{tmp_path / name}:{where}: not valid {kind}: ")


@pytest.mark.parametrize("text", ["a: \x07", "a: 2024-13-45"], ids=["control character", "impossible date"])
def test_what_yaml_cannot_read_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert refusal(tmp_path / "c.yaml").startswith(f"{tmp_path / 'c.yaml'}")


@pytest.mark.parametrize(
    ("text", "found"), [("- a", "list"), ("word", "str"), ("", "NoneType"), ("# nothing", "NoneType")]
)
def test_a_file_that_is_no_mapping_is_refused(text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert refusal(tmp_path / "c.yaml") == f"{tmp_path / 'c.yaml'}: must hold key: value pairs, found {found}"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("a: déjà".encode("latin-1"))
    assert refusal(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such file"
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot be read: ")
    assert refusal(tmp_path / "latin.yaml").startswith(f"{tmp_path / 'latin.yaml'}: cannot be read: ")


# --- values ---

MEANT = [
    ("5e-4", 0.0005),
    ("5E-4", 0.0005),
    ("-1e3", -1000.0),
    ("+2.e1", 20.0),
    (".5e+1", 5.0),
    ("0.1", 0.1),
    ("8", 8),
    ('"5e-4"', "5e-4"),
    ("e4", "e4"),
    ("5e", "5e"),
    ("5e-4x", "5e-4x"),
    ("true", True),
    ("off", False),
    ("null", None),
    ("", None),
    ("[q, v]", ["q", "v"]),
    ("[5e-4, 1]", [0.0005, 1]),
    ("{a: 1e-3}", {"a": 0.001}),
    ("What is it? {phrase}", "What is it? {phrase}"),
    ('"{tone}"', "{tone}"),
]


@pytest.mark.parametrize(("text", "value"), MEANT)
def test_values_mean_what_they_say(text: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"a: {text}")
    for found in (read_config(tmp_path / "c.yaml")["a"], apply_settings({}, [f"a={text}"])["a"]):
        assert found == value
        assert type(found) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["e", "E", "f", "r"]))
def test_any_number_in_any_notation_is_that_number(number: float, notation: str) -> None:
    text = repr(number) if notation == "r" else format(number, f".17{notation}")
    assert read_yaml(text, "test") == float(text)


def test_plain_yaml_elsewhere_in_the_process_is_not_changed() -> None:
    read_yaml("5e-4", "test")
    assert yaml.safe_load("5e-4") == "5e-4"


# --- --set ---


def test_settings_are_put_over_the_values_and_make_the_groups_on_the_way() -> None:
    values = {"a": 1, "b": {"c": 2, "d": 3}}
    assert apply_settings(values, ["b.c=4", "x.y.z=[1]", "a=b=c", " a =5", "b.d=null"]) == {
        "a": 5,
        "b": {"c": 4, "d": None},
        "x": {"y": {"z": [1]}},
    }


def test_settings_leave_their_input_as_it_is() -> None:
    values: dict[str, Any] = {"b": {"c": [1]}, "data": "f.jsonl", "n": None}
    apply_settings(values, ["b.c=2", "b.new=1", "data.seed=1", "n.x=1"])
    assert values == {"b": {"c": [1]}, "data": "f.jsonl", "n": None}


def test_a_path_on_the_way_becomes_the_path_of_the_group() -> None:
    assert apply_settings({"data": "f.jsonl"}, ["data.seed=1"]) == {"data": {"path": "f.jsonl", "seed": 1}}


@pytest.mark.parametrize(("inner", "shown"), [([1], "[1]"), (3, "3"), (True, "True")])
def test_a_value_on_the_way_that_is_no_group_is_refused(inner: object, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        put({"x": {"a": inner}}, "x.a.b", 1)
    assert problems(caught.value) == [f"x.a.b: a is {shown}, not a group of keys"]


@pytest.mark.parametrize("setting", ["word", "=3", " =3", ""])
def test_a_setting_without_key_or_value_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_settings({}, [setting])
    assert problems(caught.value) == [f'--set {setting}: must be key=value, such as "peft_config.r=8"']


@pytest.mark.parametrize("value", ["[1", "b: c: d", "@x", "{a"])
def test_a_setting_with_a_broken_value_is_refused_by_its_key(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_settings({}, [f"data.path={value}"])
    assert problems(caught.value)[0].startswith("--set data.path:1:")


@pytest.mark.parametrize("value", ["{tone}", "[1", "Tone: {tone}"])
def test_a_template_is_taken_as_it_stands(value: str) -> None:
    assert apply_settings({}, [f"data.completion={value}"]) == {"data": {"completion": value}}


# --- from the command line to a stage function ---

NEEDED = {"model": "m", "data.path": "f.jsonl"}


def argument_error(config: Path | None, settings: list[str], options: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        arguments(finetune, str(config) if config else None, settings, options)
    problems(caught.value)
    return caught.value


def test_file_then_options_then_settings(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: file\ndata: {path: file, seed: 1, test_fraction: 0.1}\ntraining_config: {max_steps: 1}\n")
    options = {"model": "option", "data.path": None, "data.seed": 2, "data.test_fraction": 0.2, "output_dir": None}
    settings = ["data.test_fraction=0.3", "training_config.learning_rate=5e-4"]
    assert arguments(finetune, str(file), settings, options) == {
        "model": "option",
        "data": {"path": "file", "seed": 2, "test_fraction": 0.3},
        "training_config": {"max_steps": 1, "learning_rate": 0.0005},
    }


def test_the_last_setting_of_a_key_wins() -> None:
    assert arguments(finetune, None, ["model=a", "model=b"], NEEDED)["model"] == "b"


def test_an_option_joins_a_data_file_named_by_its_path_alone(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: m\ndata: f.jsonl\n")
    values = arguments(finetune, str(tmp_path / "c.yaml"), ["data.system=x"], {"data.seed": 0})
    assert values["data"] == {"path": "f.jsonl", "seed": 0, "system": "x"}


def test_false_and_zero_are_given_values() -> None:
    values = arguments(finetune, None, [], {**NEEDED, "overwrite": False, "data.test_fraction": 0.0})
    assert (values["overwrite"], values["data"]["test_fraction"]) == (False, 0.0)


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    error = argument_error(None, ["modle=x", "zzz.a=1"], NEEDED)
    assert error.problems == ['modle: unknown key, did you mean "model"?', "zzz: unknown key"]
    assert "training_config, peft_config, model_kwargs" in error.hint


def test_what_the_program_passes_itself_is_no_key_of_the_user() -> None:
    error = argument_error(None, ["on_event=x"], NEEDED)
    assert error.problems == ["on_event: unknown key"]
    assert "on_event" not in error.hint


@pytest.mark.parametrize("settings", [[], ["model=null", "data=null"]])
def test_a_needed_key_that_nobody_gave_is_asked_for_by_its_flag(settings: list[str]) -> None:
    error = argument_error(None, settings, {"model": None, "data.path": None})
    assert error.problems == ["model: this key is needed", "data: this key is needed"]
    assert error.hint == "give --model, --data, or the key in --config"


def test_the_flag_of_a_needed_output_folder_is_output() -> None:
    def stage(output_dir: str, base_model: str, on_event: object = None) -> None: ...

    with pytest.raises(ConfigError) as caught:
        arguments(stage, None, [], {})
    assert caught.value.hint == "give --output, --base-model, or the key in --config"


def test_unknown_and_needed_keys_are_named_at_once() -> None:
    error = argument_error(None, ["modle=x"], {"data.path": "f"})
    assert error.problems == ['modle: unknown key, did you mean "model"?', "model: this key is needed"]


@pytest.mark.parametrize(("key", "found"), [("on", "bool"), ("3", "int"), ("null", "NoneType")])
def test_a_key_that_yaml_does_not_read_as_text_is_refused(key: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"{key}: 1\n")
    (text,) = argument_error(tmp_path / "c.yaml", [], NEEDED).problems
    assert text.startswith(f"{tmp_path / 'c.yaml'}:1: ")
    assert f"read as {found}" in text


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {seed: 1, seed: 2}\n")
    assert refusal(tmp_path / "c.yaml") == f"{tmp_path / 'c.yaml'}:1: seed: this key is given twice"
