"""No key of an Olive file is lost: a misspelt one is an error that names it, a missing one changes a value or a note; and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.config import read_config
from phinetune.errors import ConfigError
from phinetune.olive import translate
from phinetune.olive.registry import ADVICE, TRANSLATED
from phinetune.workflow.config import parse_workflow
from phinetune.workflow.goals import parse_goals
from phinetune.workflow.passes import find_pass, parse_pass, pass_table
from phinetune.workflow.spaces import fill, find_spaces

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(f.name for f in CONFIGS.iterdir() if ".expected." not in f.name)
CORPUS = {name: read_config(CONFIGS / name) for name in NAMES}

Place = tuple[str | int, ...]
NAMED = ("passes", "systems", "evaluators", "data_files")
"""Groups whose keys are the user's own names."""
FREE = ("load_kwargs", "from_pretrained_args", "model_loading_args", "search", "extra_options", "environment_variables", "build_args", "run_params",
        "cache_config", "cloud_cache_config", "inference_settings")  # fmt: skip
"""Groups that are handed on, or dropped, as they stand, whatever their keys."""
UNREAD: tuple[tuple[str, Place], ...] = (
    ("i_thresholds_011.yaml", ("data_configs", 0)),
    ("f_search_071.yaml", ("evaluators", "unused")),
    ("i_thresholds_011.yaml", ("evaluators", "spare")),
    ("c_components_060.json", ("input_model", "config", "hf_config", "components")),
    ("f_azure_071.yaml", ("packaging_config", 1)),
)
"""Parts that a note says to be dropped as a whole, and whose keys nobody looks at."""
UNUSED: tuple[tuple[str, Place], ...] = (
    *UNREAD,
    ("f_chat_070.yaml", ("passes", "other")),
    ("g_alternatives_080.yaml", ("passes", "adapt", 1)),
    ("k_inline.json", ("engine", "azureml_client_config")),
)
"""The same, and those whose keys are looked at all the same."""


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every key of every group, as the way that leads to it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    for key, inner in pairs:
        if isinstance(value, dict):
            yield (*at, key)
        if key not in FREE:
            yield from places(inner, (*at, key))


def parent(values: dict[str, Any], at: Place) -> Any:
    for key in at[:-1]:
        values = values[key]  # type: ignore[index]
    return values


def is_own_name(at: Place, values: dict[str, Any]) -> bool:
    """True for names that the user made up."""
    holder = at[-2] if len(at) > 1 else None
    is_resource = holder == "data_files" and "type" in parent(values, at)
    return (holder in NAMED and not is_resource) or at[:-1] == ("data_configs",)


def inside(parts: tuple[tuple[str, Place], ...], name: str, at: Place) -> bool:
    return any(name == file and at[: len(part)] == part and len(at) > len(part) for file, part in parts)


def outcome(values: dict[str, Any]) -> Any:
    try:
        translation = translate(values)
    except ConfigError as error:
        return error.problems
    return translation.values, translation.notes


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_key_is_an_error_that_names_it(name: str) -> None:
    checked = 0
    for at in places(CORPUS[name]):
        if is_own_name(at, CORPUS[name]) or inside(UNREAD, name, at):
            continue
        values = copy.deepcopy(CORPUS[name])
        holder, key = parent(values, at), str(at[-1])
        typo = key[:-1] + "qz"
        renamed = {typo if k == key else k: v for k, v in holder.items()}
        holder.clear()
        holder.update(renamed)
        with pytest.raises(ConfigError) as caught:
            translate(values)
        named = [p for p in caught.value.problems if f"{typo}: unknown key" in p]
        assert len(named) == 1, (at, caught.value.problems)
        checked += 1
    assert checked > 4


@pytest.mark.parametrize("name", NAMES)
def test_a_key_that_is_taken_out_changes_a_value_or_a_note_or_is_missed(name: str) -> None:
    before = outcome(CORPUS[name])
    for at in places(CORPUS[name]):
        if inside(UNUSED, name, at):
            continue
        values = copy.deepcopy(CORPUS[name])
        holder = parent(values, at)
        was = holder.pop(at[-1])
        after = outcome(values)
        off = at[-1] == "search_strategy" and not was
        # what says only what holds without it too: no search, a name that is the key, a type that is the default
        same_name = at[0] == "data_configs" and at[-1] == "name" and len(at) == 3 and was == at[1]
        says_the_default = at[-1] == "type" and (
            str(was).startswith(("text_generation", "huggingface_")) or was in ("Zipfile", "Categorical")
        )
        only_that = isinstance(was, dict) and (
            not was or (list(was) == ["type"] and at[-1] != "passes" and len(at) > 2)
        )
        assert after != before or off or same_name or says_the_default or only_that, at


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_value_in_place_of_another_is_read_or_refused_but_never_breaks(data: st.DataObject) -> None:
    """Whatever stands where: a translation, or a ConfigError of one-line problems."""
    name = data.draw(st.sampled_from(NAMES))
    values = copy.deepcopy(CORPUS[name])
    at = data.draw(st.sampled_from(sorted(places(values), key=str)))
    junk = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=5)
    parent(values, at)[at[-1]] = data.draw(
        junk | st.lists(junk, max_size=2) | st.dictionaries(st.text(max_size=4), junk, max_size=2)
    )
    try:
        translate(values)
    except ConfigError as error:
        assert error.problems and all(text and "\n" not in text for text in error.problems)


def test_a_key_with_a_line_break_is_named_in_one_line() -> None:
    values = copy.deepcopy(CORPUS["a_hf_dataset.json"])
    values["engine"]["evaluator"] = {"\n": None}
    with pytest.raises(ConfigError) as caught:
        translate(values)
    assert r"engine.evaluator.\n: unknown key" in caught.value.problems


# --- what is refused ---


def builder(**keys: Any) -> dict[str, Any]:
    return {
        "input_model": {"type": "HfModel", "model_path": "acme/small"},
        "passes": {"b": {"type": "ModelBuilder", "precision": "int4"}},
        **keys,
    }


def training(**keys: Any) -> dict[str, Any]:
    return builder(
        passes={"l": {"type": "LoRA", "target_modules": ["q_proj"], "train_data_config": "rows", **keys}},
        data_configs=[rows()],
    )


def rows(load: dict[str, Any] | None = None, **texts: Any) -> dict[str, Any]:
    return {
        "name": "rows",
        "type": "HuggingfaceContainer",
        "load_dataset_config": {"data_name": "json", "data_files": "r.jsonl", "split": "train"}
        if load is None
        else load,
        "pre_process_data_config": texts,
    }


def metric(kind: str = "latency", **sub: Any) -> dict[str, Any]:
    metrics = [{"name": "m", "type": kind, "sub_types": [{"name": "avg", "priority": 1, **sub}]}]
    return builder(evaluators={"e": {"metrics": metrics}}, evaluator="e")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"passes": {"b": {"type": "ModelBuilder", "precision": "int4"}}}, "input_model: this key is needed"),
    "no passes": (builder(passes={}, auto_optimizer_config={"precisions": ["int4"]}), "passes: this key is needed; where Olive chose passes"),
    "onnx model": (builder(input_model={"type": "ONNXModel", "model_path": "m.onnx"}), "input_model.type: only HfModel"),
    "model type": (builder(input_model={"type": "HfModell", "model_path": "m"}), 'did you mean "HfModel"?'),
    "loader": (builder(input_model={"type": "PyTorchModel", "config": {"model_loader": "load"}}), "input_model.config.model_loader: a model that Python code builds"),
    "task": (builder(input_model={"type": "HfModel", "model_path": "m", "task": "text-classification"}), "input_model.task: only text-generation models"),
    "format": (builder(input_model={"type": "PyTorchModel", "config": {"hf_config": {"model_name": "m"}, "model_file_format": "PyTorch.TorchScript"}}), "only Hugging Face and MLflow"),
    "gptq": (builder(input_model={"type": "HfModel", "model_path": "m", "load_kwargs": {"quantization_method": "gptq"}}), "only bitsandbytes is supported"),
    "resource": (builder(input_model={"type": "HfModel", "model_path": {"type": "azureml_modle", "name": "m"}}), 'did you mean "azureml_model"?'),
    "registry": (builder(input_model={"type": "HfModel", "model_path": {"type": "azureml_registry_model", "name": "m"}}), "input_model.model_path.registry_name: this key is needed"),
    "data reference": (training(train_data_config="row"), "passes.l.train_data_config: no data config is called 'row', did you mean \"rows\"?"),
    "no data": (builder(passes={"l": {"type": "LoRA"}}), "passes.l.train_data_config: this key is needed"),
    "random rows": ({**training(), "data_configs": [{"name": "rows", "type": "DummyDataContainer"}]}, "nothing can be learned from the random rows"),
    "container": ({**training(), "data_configs": [{**rows(), "type": "HuggingFaceContainr"}]}, 'did you mean "HuggingfaceContainer"?'),
    "two names": ({**training(), "data_configs": [rows(), rows()]}, "two data configs are called 'rows'"),
    "no name": ({**training(), "data_configs": [{"type": "HuggingfaceContainer"}]}, "data_configs[0].name: this key is needed"),
    "user script": ({**training(), "data_configs": [{**rows(), "user_script": "s.py"}]}, "Python code that makes rows is not run"),
    "component": ({**training(), "data_configs": [{**rows(), "pre_process_data_config": {"type": "my_function"}}]}, "pre_process_data_config.type: Python code"),
    "text file": ({**training(), "data_configs": [rows({"data_name": "text", "data_files": "r.txt"})]}, "text files hold no rows"),
    "several files": ({**training(), "data_configs": [rows({"data_name": "json", "data_files": ["a", "b"]})]}, "put the 2 files into one"),
    "no such split": ({**training(), "data_configs": [rows({"data_name": "json", "data_files": {"train": "a"}, "split": "trian"})]}, 'did you mean "train"?'),
    "two splits": ({**training(), "data_configs": [rows({"data_name": "acme/r", "split": "train+test"})]}, "must be one split"),
    "filters": ({**training(), "data_configs": [rows({"data_name": "acme/r", "col_filters": {"a": 1}})]}, "rows cannot be filtered here"),
    "no files": ({**training(), "data_configs": [rows({"data_name": "json"})]}, "load_dataset_config.data_files: this key is needed beside"),
    "strategy": ({**training(), "data_configs": [rows(strategy="joined")]}, 'did you mean "join"?'),
    "stride": ({**training(), "data_configs": [rows(strategy="join-sliding-window")]}, "pre_process_data_config.stride: this key is needed"),
    "drawing": ({**training(), "data_configs": [rows(strategy="join-random")]}, "pre_process_data_config.random_seed: this key is needed"),
    "formatting": ({**training(), "data_configs": [rows(text_formatting_func="f")]}, "text_formatting_func: Python code"),
    "chip2": ({**training(), "data_configs": [rows(dataset_type="pair", pair_format="chip2", source_max_len=1, target_max_len=1)]}, "chip2 rows hold both turns"),
    "pair lengths": ({**training(), "data_configs": [rows(dataset_type="pair", source_max_len=1)]}, "target_max_len: this key is needed"),
    "no type": (builder(passes={"b": {"precision": "int4"}}), "passes.b.type: this key is needed"),
    "no precision": (builder(passes={"b": {"type": "ModelBuilder"}}), "passes.b.precision: this key is needed"),
    "precision": (builder(passes={"b": {"type": "ModelBuilder", "precision": "int2"}}), 'did you mean "int'),
    "metadata only": (builder(passes={"b": {"type": "ModelBuilder", "precision": "int4", "metadata_only": True}}), "passes.b.metadata_only: an ONNX model"),
    "training name": (training(training_args={"lerning_rate": 1}), 'passes.l.training_args.lerning_rate: unknown key, did you mean "learning_rate"?'),
    "eval size": (training(eval_dataset_size=0), "eval_dataset_size: must be above 0"),
    "searchable": (training(r="SEARCHABLE_VALUES"), "has several values, and no search is asked for"),
    "list": (training(r=[8, 16]), "has several values, and no search is asked for"),
    "conditional": (training(r={"olive_parameter_type": "SearchParameter", "type": "Conditional", "parents": ["x"], "support": {"a": 1}}), "depends on another setting"),
    "flows": (builder(pass_flows=[["b"], ["b"]]), "pass_flows: 2 flows are as many workflows"),
    "flow": (builder(pass_flows=[["c"]]), "pass_flows[0]: no pass is called 'c'"),
    "builds": (builder(builds={"a": {}}), "builds: each build is a workflow"),
    "search without evaluator": (builder(search_strategy={"execution_order": "joint", "sampler": "tpe", "max_samples": 3}), "evaluator: this key is needed beside search_strategy"),
    "sampler": ({**metric(), "search_strategy": {"sampler": "tpee"}}, 'did you mean "tpe"?'),
    "order": ({**metric(), "search_strategy": {"sampler": "tpe", "execution_order": "joined"}}, "must be joint or pass-by-pass"),
    "all samples": ({**metric(), "search_strategy": {"sampler": "tpe", "max_samples": 0}}, "0 means every combination"),
    "evaluator": (builder(evaluator="e"), "evaluator: no evaluator is called 'e'"),
    "harness": (builder(evaluators={"e": {"type": "LMEvaluator", "tasks": ["t"]}}, evaluator="e"), "tasks of the evaluation harness are not run"),
    "custom metric": (metric("custom"), "a metric in Python is an entry point"),
    "metric type": (metric("latencyy"), 'did you mean "latency"?'),
    "sub type": (metric(name="average"), "must be one of avg"),
    "not here": (metric("accuracy", name="auroc"), "is not computed here"),
    "direction": (metric(higher_is_better=True), "latency_avg is better when it is lower"),
    "goal type": (metric(goal={"type": "treshold", "value": 1}), 'did you mean "threshold"?'),
    "goal range": (metric(goal={"type": "percent-min-improvement", "value": 120}), "must be above 0 and below 100"),
    "negative goal": (metric(goal={"type": "max-degradation", "value": -1}), "must be at least 0"),
    "system": (builder(host="gpu"), "host: no system is called 'gpu'"),
    "system type": (builder(systems={"s": {"type": "LocalSystm"}}), 'did you mean "LocalSystem"?'),
    "provider": (builder(systems={"s": {"type": "LocalSystem", "accelerators": [{"device": "gpu", "execution_providers": ["CUDA"]}]}}), "must end in ExecutionProvider"),
    "device": (builder(systems={"s": {"type": "LocalSystem", "accelerators": [{"device": "gpuu"}]}}), 'did you mean "gpu"?'),
    "engine group": (builder(engine=3), "engine: must be a group of keys (found: 3)"),
    "top level": (builder(evaluatr="e"), 'evaluatr: unknown key, did you mean "evaluator"?'),
    "package": (builder(packaging_config={"type": "Zipfle"}), 'did you mean "Zipfile"?'),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_its_path(case: str) -> None:
    values, text = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        translate(values)
    assert any(text in problem for problem in caught.value.problems), caught.value.problems


def test_every_problem_is_raised_at_once() -> None:
    values = training(lora_rr=8, r=[1, 2], training_args={"lerning_rate": 1})
    values["engine"] = {"outputdir": "x"}
    with pytest.raises(ConfigError) as caught:
        translate(values)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(("name", "advice"), sorted(ADVICE.items()))
def test_a_pass_of_olive_that_is_not_supported_says_what_to_use(name: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translate(builder(passes={"p": {"type": name.lower(), "config": {"anything": 1}}}))
    assert caught.value.problems == [f"passes.p.type: {name} is not supported; {advice}"]


def test_the_advice_of_the_usual_passes() -> None:
    for name, word in {"AutoAWQQuantizer": "int4", "GptqQuantizer": "int4", "OnnxQuantization": "int8", "OptimumConversion": "OnnxConversion",
                       "OrtTransformersOptimization": "leave it out", "OrtPerfTuning": "leave it out", "LoHa": "LoRA", "QuantizationAwareTraining": "int8"}.items():  # fmt: skip
        assert word in ADVICE[name]


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_misspelt_pass_type_is_told_what_it_may_mean(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translate(builder(passes={"p": {"type": f"{name}x"}}))
    assert caught.value.problems == [
        f"passes.p.type: no pass is of this type, did you mean \"{name}\"? (found: '{name}x')"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_translation_is_a_native_workflow_whose_passes_take_their_keys(name: str) -> None:
    """Read as a native file is: data, goals, systems, and each pass's own keys with the first value of each space."""
    values = translate(CORPUS[name]).values
    config, entries = parse_workflow(values)
    table = pass_table()
    for entry in entries:
        spaces = find_spaces(entry.values, entry.path, [])
        keys = fill(entry.values, entry.path, {space.path: next(iter(space.choices)) for space in spaces})
        parse_pass(entry, find_pass(entry, table), keys)
    known = [*values.get("evaluate", {}).get("metrics", [])]
    goals = parse_goals(config.constraints, config.objectives, known)
    assert len(goals.constraints) == len(config.constraints) and config.model.path
