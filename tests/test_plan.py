"""From a workflow to steps: what decides a step's key and what does not, the order of passes, every choice checked, all problems at once."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phinetune.errors import ConfigError
from phinetune.events import Note
from phinetune.workflow import plan as module
from phinetune.workflow.config import parse_workflow
from phinetune.workflow.plan import Step, Workflow, prepare
from phinetune.workflow.stages import PASSES
from tiny import PROMPT, tone_rows, write_rows
from workflows import SCRIPT, write_script

RECORDED = (
    SCRIPT
    + """

@dataclass(frozen=True)
class Learn:
    data: str | None = None
    dev: str | None = None
    x: int = 0
    more: dict | None = None
    files: list | None = None


def odd(job):
    from phinetune.errors import ConfigError
    if job.config.x in (5, 6):
        raise ConfigError(f"x: {job.config.x} will not do")


PASSES["Learn"] = Pass(pad, Learn, ("hf",), "adapter", data=("data", "dev"), files=("files",), check=odd)
PASSES["Apply"] = Pass(pad, Pad, ("adapter",), "hf", files=("file",))
"""
)


def script(folder: Path, text: str = RECORDED) -> str:
    file = write_script(folder)
    file.write_text(text, encoding="utf-8")
    return str(file)


@pytest.fixture
def content(llama_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """learn -> apply -> pad, with two data configs; no torch."""
    own = script(tmp_path)
    write_rows(tmp_path / "train.jsonl", tone_rows(8))
    write_rows(tmp_path / "dev.jsonl", tone_rows(4))
    (tmp_path / "extra.txt").write_text("extra")
    return {
        "model": str(llama_folder),
        "data": {
            "train": {"path": str(tmp_path / "train.jsonl"), **PROMPT},
            "dev": {"path": str(tmp_path / "dev.jsonl"), **PROMPT},
        },
        "passes": {
            "learn": {"type": "Learn", "user_script": own, "data": "train", "x": 1, "more": {"a": 1, "b": [1, 2]}},
            "apply": {"type": "Apply", "user_script": own, "file": str(tmp_path / "extra.txt")},
            "pad": {"type": "Pad", "user_script": own, "y": 0.5},
        },
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
    }


def planned(content: dict[str, Any], **options: Any) -> Workflow:
    return prepare(*parse_workflow(copy.deepcopy(content)), **options)


def steps(content: dict[str, Any], **chosen: Any) -> list[Step]:
    workflow = planned(content)
    return workflow.steps({f"passes.{name.replace('__', '.')}": value for name, value in chosen.items()})


def keys(content: dict[str, Any]) -> list[str]:
    return [step.key for step in steps(content)]


def problems(content: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        planned(content)
    found = caught.value.problems
    assert len(set(found)) == len(found) and all("\n" not in p for p in found)
    return found


# --- keys ---


def test_each_step_begins_with_what_the_one_before_leaves(content: dict[str, Any]) -> None:
    workflow = planned(content)
    first, second, third = workflow.steps({})
    assert [s.parent for s in (first, second, third)] == [workflow.source.key, first.key, second.key]
    assert [s.job.input for s in (first, second, third)] == [
        workflow.source.name,
        str(first.job.output),
        str(second.job.output),
    ]
    assert all(s.job.output == workflow.store.artifact(s.key) for s in (first, second, third))
    assert keys(content) == [first.key, second.key, third.key]


def change_first_of(name: str, change: Any, content: dict[str, Any], tmp_path: Path) -> int | None:
    """Index of the first step whose key `change` changes; those after it change with it."""
    before = keys(content)
    change(content, tmp_path)
    after = keys(content)
    differing = [a != b for a, b in zip(before, after, strict=True)]
    index = differing.index(True) if True in differing else None
    assert index is None or all(differing[index:]), name
    return index


def rewrite(name: str, old: str, new: str) -> Any:
    def change(content: dict[str, Any], folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def put(path: str, value: Any) -> Any:
    def change(content: dict[str, Any], folder: Path) -> None:
        *groups, last = path.split(".")
        for group in groups:
            content = content[group]
        content[last] = value

    return change


def other_model(content: dict[str, Any], folder: Path) -> None:
    model = shutil.copytree(content["model"], folder / "model")
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text().rstrip() + " ")
    content["model"] = str(model)


CHANGES: dict[str, tuple[int, Any]] = {
    "a character of the data": (0, rewrite("train.jsonl", "number 3", "number 4")),
    "a row more": (0, lambda c, f: (f / "train.jsonl").open("a").write('{"phrase": "x", "tone": "joy"}\n')),
    "how the data is read": (0, put("data.train.prompt", "{phrase}?")),
    "how the data is split": (0, put("data.train.seed", 1)),
    "which data": (0, put("passes.learn.data", "dev")),
    "data to evaluate on": (0, put("passes.learn.dev", "dev")),
    "a setting": (0, put("passes.learn.x", 2)),
    "a setting in a group": (0, put("passes.learn.more", {"a": 1, "b": [2, 1]})),
    "a file": (1, rewrite("extra.txt", "extra", "extrb")),
    "no file": (1, put("passes.apply.file", None)),
    "a setting of the last pass": (2, put("passes.pad.y", 0.25)),
    "the script": (0, lambda c, f: script(f, RECORDED + "\n")),
    "the seed": (0, put("seed", 1)),
    "how the model is loaded": (0, put("model", None)),
    "ids of special tokens": (0, put("model", None)),
    "the model's content": (0, other_model),
    "the type": (0, lambda c, f: c["passes"]["learn"].update(type="Learn2")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_the_result_decides_the_key_from_its_step_on(
    name: str, content: dict[str, Any], tmp_path: Path
) -> None:
    index, change = CHANGES[name]
    if name in ("how the model is loaded", "ids of special tokens"):
        kwargs = {"torch_dtype": "bfloat16"} if "loaded" in name else {"pad_token_id": 3}
        change = put("model", {"path": content["model"], "model_kwargs": kwargs})
    if name == "the type":
        script(tmp_path, RECORDED + 'PASSES["Learn2"] = PASSES["Learn"]\n')
    assert change_first_of(name, change, content, tmp_path) == index


def move(content: dict[str, Any], folder: Path) -> None:
    (folder / "deep").mkdir()
    content["data"]["train"]["path"] = str((folder / "train.jsonl").rename(folder / "deep" / "other.jsonl"))
    content["passes"]["apply"]["file"] = str((folder / "extra.txt").rename(folder / "deep" / "other.bin"))


def rename(content: dict[str, Any], folder: Path) -> None:
    content["data"]["lessons"] = content["data"].pop("train")
    content["passes"]["learn"]["data"] = "lessons"
    content["passes"] = {f"my {name}": value for name, value in content["passes"].items()}


def reorder(content: dict[str, Any], folder: Path) -> None:
    content["passes"] = {n: dict(reversed(p.items())) for n, p in content["passes"].items()}
    content["passes"]["learn"]["more"] = {"b": [1, 2], "a": 1}
    content["data"] = {n: dict(reversed(d.items())) for n, d in content["data"].items()}


def copy_model(content: dict[str, Any], folder: Path) -> None:
    content["model"] = str(shutil.copytree(content["model"], folder / "copy"))


SAME: dict[str, Any] = {
    "nothing": lambda c, f: None,
    "where files are and what they are called": move,
    "names of data and passes": rename,
    "the order of keys": reorder,
    "a default written out": put("passes.pad.kind", "plain"),
    "where the model is": copy_model,
    "where the result goes": put("output_dir", "elsewhere"),
    "where the cache is": put("cache_dir", None),
    "data of nobody": rewrite("dev.jsonl", "number 3", "number 4"),
    "goals": put("objectives", ["min size"]),
    "what is measured": put("evaluate", {"metrics": ["size"]}),
    "where it runs": put("host", "local"),
    "the case of a type": put("passes.learn.type", "LEARN"),
    "a secret": put("model", None),
}


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_decide_the_result_leaves_every_key(
    name: str, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path / "own"))
    change = SAME[name]
    if name == "a secret":
        change = put("model", {"path": content["model"], "model_kwargs": {"token": "hf_secret"}})
    assert change_first_of(name, change, content, tmp_path) is None


def test_a_setting_of_the_last_pass_leaves_the_keys_before_it(content: dict[str, Any]) -> None:
    before = keys(content)
    content["passes"]["pad"]["x"] = 9
    after = keys(content)
    assert after[:2] == before[:2] and after[2] != before[2]


def test_a_new_version_of_a_pass_is_made_again(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    content["passes"] = {"merge": {"type": "MergeAdapterWeights"}, "int4": {"type": "Rtn"}}
    config, entries = parse_workflow(content)
    monkeypatch.setattr(module, "find_source", lambda *a: module.Source("x", "adapter", "k"))
    for pass_ in ("MergeAdapterWeights", "Rtn"):  # the builder need not be installed
        monkeypatch.setitem(PASSES, pass_, replace(PASSES[pass_], check=None))
    before = [s.key for s in prepare(config, entries).steps({})]
    monkeypatch.setitem(PASSES, "Rtn", replace(PASSES["Rtn"], version=2))
    after = [s.key for s in prepare(config, entries).steps({})]
    assert before[0] == after[0] and before[1] != after[1]


def test_the_ending_of_a_data_file_says_how_it_is_read(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("phrase,tone\nx,joy\n")
    (tmp_path / "a.tsv").write_text("phrase,tone\nx,joy\n")
    found = []
    for name in ("a.csv", "a.tsv"):
        content["data"]["train"]["path"] = str(tmp_path / name)
        found.append(keys(content)[0])
    assert found[0] != found[1]


VALUES = st.one_of(
    st.integers(-3, 3), st.text("ab", max_size=2), st.booleans(), st.none(), st.lists(st.integers(0, 2), max_size=2)
)
GROUPS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


@pytest.fixture
def searched(content: dict[str, Any]) -> Workflow:
    """The workflow with a space in place of a group."""
    content["passes"]["learn"]["more"] = {"choices": [{"z": 1}, {"z": 2}]}
    return planned(content | {"search": {"trials": 1}, "objectives": ["min size"]})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(GROUPS, GROUPS, st.randoms())
def test_two_groups_of_settings_have_one_key_exactly_if_they_are_equal(
    searched: Workflow, a: Any, b: Any, random: Any
) -> None:
    shuffled = dict(random.sample(list(a.items()), len(a)))
    key = {n: searched.steps({"passes.learn.more": v})[0].key for n, v in (("a", a), ("b", b), ("s", shuffled))}
    assert key["a"] == key["s"]
    assert (key["a"] == key["b"]) == (json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True))


# --- what is checked before work begins ---


def test_the_order_of_kinds_is_checked_in_all_of_it(content: dict[str, Any]) -> None:
    passes = content["passes"]
    content["passes"] = {name: passes[name] for name in ("apply", "pad", "learn")} | {"again": passes["learn"]}
    assert problems(content) == [
        "passes.apply: Apply takes an adapter, but what comes before it is a model",
        "passes.again: Learn takes a model, but what comes before it is an adapter",
    ]


def test_the_order_is_checked_for_every_way_to_choose_alternatives(content: dict[str, Any]) -> None:
    learn, apply, pad = content["passes"].values()
    content["passes"] = {"first": [learn, pad], "second": [apply, pad]}
    content |= {"search": {"trials": 2}, "objectives": ["min size"]}
    assert problems(content) == [
        "passes.second[1]: Pad takes a model, but what comes before it is an adapter",
        "passes.second[0]: Apply takes an adapter, but what comes before it is a model",
    ]


def test_every_choice_of_every_space_is_checked(content: dict[str, Any]) -> None:
    learn = content["passes"]["learn"]
    content |= {"search": {"trials": 2}, "objectives": ["min size"]}
    content["passes"]["learn"] = [
        {**learn, "x": {"choices": [1, 5]}},
        {**learn, "x": {"choices": [1, "two", 6]}, "more": {"choices": [{}, 3]}},
    ]
    content["passes"]["pad"]["y"] = {"choices": [0.5, "high"]}
    assert {p.split(" (found")[0].split(",")[0] for p in problems(content)} == {
        "passes.learn[0].x: 5 will not do",
        "passes.learn[1].x: 6 will not do",
        "passes.learn[1].x: input should be a valid integer",
        "passes.learn[1].more: input should be a valid dictionary",
        "passes.pad.y: input should be a valid number",
    }


@pytest.mark.parametrize("given", ["trian", 3, ["train"], {"choices": ["train", "dev"]}, {"a": 1}])
def test_data_must_be_the_name_of_a_data_config(given: Any, content: dict[str, Any]) -> None:
    for key in ("data", "dev"):
        wrong = copy.deepcopy(content)
        wrong["passes"]["learn"][key] = given
        wrong |= {"search": {"trials": 2}, "objectives": ["min size"]}
        assert any(p.startswith(f"passes.learn.{key}: ") for p in problems(wrong)), problems(wrong)


def test_data_that_nobody_names_is_the_only_one_or_the_one_called_train(content: dict[str, Any]) -> None:
    named = keys(content)
    del content["passes"]["learn"]["data"]
    assert keys(content) == named
    content["data"] = {"one": content["data"]["train"]}
    assert keys(content) == named
    content["data"] = {"one": content["data"]["one"], "two": content["data"]["one"]}
    assert problems(content) == ["passes.learn.data: which one? (there are: one, two)"]


def test_what_cannot_be_searched_is_named(content: dict[str, Any]) -> None:
    content["passes"]["pad"] |= {"x": {"choices": []}, "y": {"low": 0, "high": 1.0}, "kind": {"choices": ["a", "b"]}}
    assert problems(content) == [
        "passes.pad.x: choices must be a list of values (found: [])",
        "passes.pad.y: a space of values needs a search (search: {trials: 12})",
        "passes.pad.kind: a space of values needs a search (search: {trials: 12})",
    ]
    content["passes"]["pad"]["x"] = {"low": 1, "high": 10**9}
    content |= {"search": {"sampler": "exhaustive", "truncate_rank": True}}
    found = problems(content)
    assert found[0].startswith("search: needs objectives or constraints")
    assert found[1] == "passes.pad.y: a range without a step cannot be searched exhaustively"
    assert found[2].startswith("search.truncate_rank: ") and len(found) == 3
    content["passes"]["pad"]["y"] = 0.5
    assert f"search: {2 * 10**9} combinations cannot be searched exhaustively; use sampler: tpe" in problems(content)


def test_a_search_without_spaces_is_said_to_be_one_trial(content: dict[str, Any]) -> None:
    notes: list[Any] = []
    planned(content | {"search": {"trials": 3}, "objectives": ["min size"]}, on_event=notes.append)
    assert [n.text for n in notes if isinstance(n, Note) and n.warning] == [
        "search: no pass has a space of values, so there is one trial"
    ]


@pytest.mark.parametrize(
    ("more", "needed"),
    [
        ({"constraints": ["size <= 9 MB"]}, False),
        ({"evaluate": {"metrics": ["size"]}}, False),
        ({"constraints": ["exact_match >= 0.9"]}, True),
        ({"evaluate": {"metrics": ["size"]}, "objectives": ["min latency_p50"]}, True),
        ({"evaluate": {"metrics": ["perplexity"]}}, True),
    ],
)
def test_data_is_needed_where_something_is_measured_on_it(
    more: dict[str, Any], needed: bool, content: dict[str, Any]
) -> None:
    content["passes"] = {"pad": content["passes"]["pad"]}
    del content["data"]
    if needed:
        (problem,) = problems(content | more)
        assert problem.startswith("data: this key is needed")
    else:
        assert planned(content | more).steps({})


def test_missing_files_and_models_are_named_by_their_keys(content: dict[str, Any], tmp_path: Path) -> None:
    content["passes"]["apply"]["file"] = "none.txt"
    content["passes"]["learn"]["files"] = [str(tmp_path / "extra.txt"), "gone.txt"]
    content["data"]["train"]["path"] = "none.jsonl"
    content["model"] = {"path": str(tmp_path / "none")}
    content["cache_dir"] = str(tmp_path / "extra.txt")
    found = problems(content)
    assert found[0] == "data.train: none.jsonl: no such file" and found[1].startswith(
        f"model: {tmp_path / 'none'}: no such model folder"
    )
    assert found[2] == f"cache_dir: {tmp_path / 'extra.txt'}: is a file, not a folder"
    del content["cache_dir"]
    assert {"passes.apply.file: none.txt: no such file", "passes.learn.files: gone.txt: no such file"} <= set(
        problems(content)
    )


def test_an_adapter_must_be_one(content: dict[str, Any]) -> None:
    content["model"] = {"path": content["model"], "adapter": content["model"]}
    assert any(p.startswith("model: ") and "is no adapter" in p for p in problems(content))


def test_a_plan_that_fetches_nothing_takes_models_and_data_that_are_elsewhere(content: dict[str, Any]) -> None:
    content["model"] = "owner/name-that-is-nowhere"
    content["data"]["train"]["path"] = "owner/rows-that-are-nowhere"
    notes: list[Any] = []
    workflow = planned(content, fetch=False, on_event=notes.append)
    assert workflow.source.key == "" and workflow.source.name == "owner/name-that-is-nowhere"
    assert [n.text for n in notes] == ["data: owner/rows-that-are-nowhere is to be fetched from the hub"]
    content["model"] = "./none"
    with pytest.raises(ConfigError, match="no such model folder"):
        planned(content, fetch=False)


def test_all_problems_are_raised_in_one_error(content: dict[str, Any], tmp_path: Path) -> None:
    content["model"] = str(tmp_path / "none")
    content["data"]["dev"]["path"] = "none.jsonl"
    content["passes"]["learn"] |= {"xx": 1, "x": 5, "data": "trian"}
    content["passes"]["pad"] |= {"y": {"choices": [1, "b"]}, "type": "Pad"}
    content["passes"]["other"] = {"type": "Pda"}
    content["constraints"] = ["exact_mtch >= 0.9"]
    content["evaluate"] = {"metrics": ["siez"]}
    starts = (
        *("constraints[0]: no metric", "evaluate.metrics: ", "passes.other.type: no pass", "data.dev: none.jsonl", "passes.learn.data: no data"),
        *("model: ", "passes.pad.y: a space of values needs", "passes.learn.xx: unknown key", "passes.learn.x: 5 will not do", "passes.pad.y: input should"),
    )  # fmt: skip
    found = problems(content)
    for start in starts:
        assert sum(p.startswith(start) for p in found) == 1, (start, found)
    assert len(found) == len(starts)


# --- trainings in a search ---


def lora(content: dict[str, Any], **search: Any) -> dict[str, Any]:
    values = {**content, "search": {"trials": 3, **search}, "objectives": ["max exact_match"]}
    values["passes"] = {
        "lora": {"type": "LoRA", "data": "train", "r": {"choices": [2, 8, 4]}},
        "merge": {"type": "MergeAdapterWeights"},
    }
    return values


def test_ranks_are_truncated_from_one_adapter_of_the_highest(content: dict[str, Any]) -> None:
    workflow = planned(lora(content, truncate_rank=True))
    ways = {r: workflow.steps({"passes.lora.r": r}, truncated=True) for r in (2, 4, 8)}
    assert {r: [s.entry.type for s in way] for r, way in ways.items()} == {
        2: ["LoRA", "TruncateAdapter", "MergeAdapterWeights"],
        4: ["LoRA", "TruncateAdapter", "MergeAdapterWeights"],
        8: ["LoRA", "MergeAdapterWeights"],
    }
    assert len({way[0].key for way in ways.values()}) == 1 and ways[2][0].job.config.peft_config["r"] == 8
    assert len({way[-1].key for way in ways.values()}) == 3 and ways[2][1].job.config.r == 2
    assert ways[2][1].entry.name == "lora-truncated"
    assert [s.entry.type for s in workflow.steps({"passes.lora.r": 2})] == ["LoRA", "MergeAdapterWeights"]
    assert workflow.steps({"passes.lora.r": 8})[0].key == ways[8][0].key


def test_a_pruner_gets_a_held_out_loss_unless_the_user_said_otherwise(content: dict[str, Any]) -> None:
    def training(values: dict[str, Any], **more: Any) -> dict[str, Any]:
        values["passes"]["lora"] |= more
        return planned(values).steps({"passes.lora.r": 2})[0].job.config.training_config

    assert training(lora(content)) == {"eval_strategy": "epoch"}
    assert training(lora(content, pruner="none")) == {}
    for own in ({"eval_strategy": "no"}, {"evaluation_strategy": "no"}):
        assert training(lora(content), training_config=own) == own


def test_a_pass_that_is_not_configured_by_training_arguments_gets_none(content: dict[str, Any]) -> None:
    content |= {"search": {"trials": 2}, "objectives": ["min size"]}
    content["passes"]["learn"]["x"] = {"choices": [1, 2]}
    assert planned(content).steps({"passes.learn.x": 1})[0].job.config.x == 1
