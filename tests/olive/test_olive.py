"""Olive's files of every era: the native values and every note of a corpus, equal meaning of old and new spellings, migrated text."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from phinetune.config import read_config, read_yaml
from phinetune.olive import Note, Translation, detect_era, is_olive, migrate, translate
from phinetune.olive.lora import TARGETS
from phinetune.olive.registry import ADVICE, TRANSLATED

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(f.name for f in CONFIGS.iterdir() if ".expected." not in f.name)
QUIET = {
    "learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_ratio": 0.0, "optim": "adamw_torch", "gradient_checkpointing": False,
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 5, "weight_decay": 0.0,
    "logging_steps": 1, "group_by_length": False, "seed": 0, "data_seed": 0,
}  # fmt: skip


def config(name: str) -> dict[str, Any]:
    return read_config(CONFIGS / name)


def expected(name: str) -> dict[str, Any]:
    return read_config(CONFIGS / f"{name.rpartition('.')[0]}.expected.yaml")


def test_the_corpus_is_large_enough_and_every_file_has_its_answer() -> None:
    assert len(NAMES) >= 30
    assert {f"{n.rpartition('.')[0]}.expected.yaml" for n in NAMES} == {f.name for f in CONFIGS.glob("*.expected.yaml")}


@pytest.mark.parametrize("name", NAMES)
def test_values_and_notes_are_exactly_those(name: str) -> None:
    given = config(name)
    before = copy.deepcopy(given)
    translation = translate(given)
    answer = expected(name)
    assert given == before
    assert f"{translation.era.letter} ({translation.era.versions})" == answer["era"]
    assert [f"{note.kind} {note}" for note in translation.notes] == answer["notes"]
    assert translation.values == answer["values"]


@pytest.mark.parametrize("name", NAMES)
def test_a_migrated_file_reads_as_the_translation_and_holds_every_note_once(name: str) -> None:
    given = config(name)
    text = migrate(given, f"olive\n{name}")
    translation = translate(given)
    values = read_yaml(text, name)
    assert values == translation.values and list(values) == list(translation.values)
    comments = sorted(
        line.strip() for line in text.splitlines() if line.lstrip().startswith("# ") and "Written by" not in line
    )
    assert comments == sorted(f"# {note.kind}: {note}" for note in translation.notes)
    assert not is_olive(values) and is_olive(given)


def test_a_comment_stands_at_the_key_it_concerns() -> None:
    lines = migrate(config("tutorial_cloud.json"), "olive-config.json").splitlines()
    at = next(i for i, line in enumerate(lines) if "lora_r" in line)
    assert (
        lines[at].strip() == "# renamed: passes.lora.config.lora_r: is passes.lora.r now"
        and lines[at + 1] == "    r: 64"
    )
    dropped = next(i for i, line in enumerate(lines) if "double_quant" in line)
    assert dropped < lines.index("model:")


def test_any_text_survives_migration() -> None:
    given = config("k_chat_string.yaml")
    texts = [
        "1e-4",
        "yes",
        "null",
        "~",
        "- a",
        "a: b # c",
        "\u2028\u0085\x7f😀é",
        'he said "x"\\',
        " ",
        "{a}",
        "[b]",
        "5",
        "a\nb\n",
        "*x",
        "&y",
        "!z",
        "%",
        "@",
    ]
    for text in texts:
        given["data_configs"][0]["pre_process_data_config"]["chat_template"] = text
        given["data_configs"][0]["name"] = given["passes"]["lora"]["train_data_config"] = text
        values = read_yaml(migrate(given, "f"), "f")
        assert values == translate(given).values and values["data"][text]["chat_template"] == text


def test_what_is_olive_and_what_is_not() -> None:
    assert is_olive({"systems": {"a": {"type": "LocalSystem", "accelerators": []}}})
    assert is_olive({"passes": {"a": {"type": "LoRA", "config": {}}}})
    assert is_olive({"passes": {"a": [{"type": "LoRA", "config": {}}]}})
    assert not is_olive({"model": "smollm2-135m", "passes": {"a": {"type": "LoRA"}}, "engine": {}})
    assert not is_olive({"model": "m", "data": "d.jsonl", "training_config": {}, "peft_config": {}})
    assert not is_olive({})


# --- eras ---


@pytest.mark.parametrize(
    ("values", "letter", "release"),
    [
        ({}, "A to J", "0.13.0"),
        ({"engine": {"execution_providers": []}}, "A", "0.5.0"),
        ({"systems": {"s": {"type": "LocalSystem", "config": {"accelerators": [{"device": "gpu"}]}}}, "data_configs": {}}, "B", "0.5.2"),
        ({"data_configs": [{"params_config": {}}]}, "C", "0.6.1"),
        ({"data_configs": [{"load_dataset_config": {"params": {}}}], "data_root": "x"}, "D", "0.6.2"),
        ({"input_model": {"type": "HfModel"}, "passes": {"l": {"type": "LoRA", "config": {"eval_dataset_size": 0.1}}}}, "E", "main of summer 2024"),
        ({"pass_flows": [], "output_dir": "x"}, "E to F", "0.7.1"),
        ({"passes": {"l": {"type": "LoRA", "r": 8}}, "auto_optimizer_config": {}}, "G", "0.9.2"),
        ({"passes": {"b": {"type": "ModelBuilder", "extra_options": {}}}}, "H to J", "0.13.0"),
        ({"evaluators": {"e": {"metrics": [{"type": "size_on_disk"}]}}}, "I to J", "0.13.0"),
        ({"builds": {}}, "J", "0.13.0"),
    ],
)  # fmt: skip
def test_the_era_is_told_from_the_keys(values: dict[str, Any], letter: str, release: str) -> None:
    era = detect_era(values)
    assert (era.letter, era.release, era.mixed) == (letter, release, False)
    assert bool(era.keys) == bool(values)


def test_a_file_of_several_eras_is_mixed_and_takes_the_defaults_of_the_latest_that_a_key_proves() -> None:
    era = detect_era(config("tutorial_local.json"))
    assert era.mixed and era.letter == "A to D" and era.release == "0.6.2" and era.versions == "0.4.0 to 0.6.2, mixed"
    assert (
        "input_model.config.hf_config.model_loading_args" in era.keys
        and "data_configs[0].load_dataset_config" in era.keys
    )


def test_broken_values_do_not_break_the_detection() -> None:
    for value in (None, 3, "x", [], [None, 3], {"a": None}, {"a": [3, {"b": 4}]}):
        for key in ("input_model", "data_configs", "engine", "passes", "systems", "evaluators", "search_strategy"):
            assert detect_era({key: value}).release


# --- the tutorial ---


@pytest.mark.parametrize("name", ["tutorial_cloud.json", "tutorial_local.json"])
def test_every_fragment_of_the_tutorial_is_read_on_its_own(name: str) -> None:
    whole = config(name)
    for key in ("data_configs", "systems", "input_model"):
        translation = translate({key: whole[key]}, partial=True)
        assert translation.values and translation.notes
    for passes in ({"lora": whole["passes"]["lora"]}, {k: v for k, v in whole["passes"].items() if k != "lora"}):
        translation = translate({"passes": passes, "data_configs": whole["data_configs"]}, partial=True)
        assert list(translation.values["passes"]) == list(passes)
    engine = {key: value for key, value in whole["engine"].items() if key not in ("host", "target")}
    assert translate({"engine": engine}, partial=True).values["output_dir"] == engine["output_dir"]


def test_the_tutorial_means_what_it_says() -> None:
    values = translate(config("tutorial_local.json")).values
    assert values["model"] == {"path": "model-cache/microsoft/phi-3-mini", "model_kwargs": {"trust_remote_code": True}}
    data = values["data"]["dataset_default_train"]
    assert (
        data["path"] == "dataset/dataset-classification.json"
        and data["max_length"] == 2048
        and data["test_fraction"] == 0.3
    )
    lora = values["passes"]["lora"]
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"], lora["target_modules"]) == (
        64,
        64,
        0.1,
        ["o_proj", "qkv_proj"],
    )
    assert [p["type"] for p in values["passes"].values()] == ["LoRA", "MergeAdapterWeights", "ModelBuilder"]
    assert values["systems"]["local_system"]["accelerator"] == {"device": "gpu", "execution_provider": "cuda"}


# --- one meaning in every spelling ---


def new() -> dict[str, Any]:
    """A file of today with every key whose default ever changed."""
    texts = {"text_template": "{text}", "max_seq_len": 64, "strategy": "join", "joiner": "\n"}
    pass_keys = {"r": 8, "alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj"], "torch_dtype": "float32"}
    return {
        "input_model": {"type": "HfModel", "model_path": "acme/small", "task": "text-generation", "load_kwargs": {"trust_remote_code": True}},
        "systems": {"s": {"type": "LocalSystem", "accelerators": [{"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}]}},
        "data_configs": [
            {
                "name": "rows",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "acme/rows", "split": "train"},
                "pre_process_data_config": texts,
            }
        ],
        "evaluators": {"e": {"metrics": [{"name": "m", "type": "latency", "sub_types": [{"name": "avg", "priority": 1}]}]}},
        "passes": {
            "lora": {"type": "LoRA", **pass_keys, "train_data_config": "rows", "training_args": dict(QUIET)},
            "merge": {"type": "MergeAdapterWeights"},
            "builder": {"type": "ModelBuilder", "precision": "int4", "int4_block_size": 32, "int4_is_symmetric": True, "int4_algo_config": "rtn"},
        },
        "search_strategy": {"execution_order": "joint", "sampler": "random", "max_samples": 4, "seed": 3},
        "evaluator": "e",
        "host": "s",
        "target": "s",
        "output_dir": "out",
    }  # fmt: skip


def nested(values: dict[str, Any]) -> dict[str, Any]:
    values["input_model"] = {
        "type": "HfModel",
        "config": {k: v for k, v in values["input_model"].items() if k != "type"},
    }
    for group in ("systems", "passes"):
        for name, one in values[group].items():
            values[group][name] = {"type": one["type"], "config": {k: v for k, v in one.items() if k != "type"}}
    for data in values["data_configs"]:
        for key in ("load_dataset_config", "pre_process_data_config"):
            data[key] = {"params": data[key]}
    values["engine"] = {k: values.pop(k) for k in ("search_strategy", "evaluator", "host", "target", "output_dir")}
    search = values["engine"]["search_strategy"]
    search["sampler_config"] = {k: search.pop(k) for k in ("max_samples", "seed")}
    return values


def old_model(values: dict[str, Any], name: str = "from_pretrained_args") -> dict[str, Any]:
    values["input_model"] = {
        "type": "PyTorchModel",
        "config": {
            "hf_config": {"model_name": "acme/small", "task": "text-generation", name: {"trust_remote_code": True}}
        },
    }
    return values


def oldest_model(values: dict[str, Any]) -> dict[str, Any]:
    return old_model(values, "model_loading_args")


def old_texts(values: dict[str, Any]) -> dict[str, Any]:
    texts = values["data_configs"][0]["pre_process_data_config"]
    texts["source_max_len"], texts["corpus_strategy"], texts["dataset_type"] = (
        texts.pop("max_seq_len"),
        texts.pop("strategy"),
        "corpus",
    )
    return values


def old_lora(values: dict[str, Any]) -> dict[str, Any]:
    lora = values["passes"]["lora"]
    lora["lora_r"], lora["lora_alpha"] = lora.pop("r"), lora.pop("alpha")
    return values


def old_search(values: dict[str, Any]) -> dict[str, Any]:
    values["search_strategy"] = {
        "execution_order": "joint",
        "search_algorithm": "random",
        "search_algorithm_config": {"num_samples": 4, "seed": 3},
    }
    return values


def old_data(values: dict[str, Any], where: str) -> dict[str, Any]:
    data = values["data_configs"][0]
    load, texts = data["load_dataset_config"], data["pre_process_data_config"]
    shapes = {
        "params": {"params_config": {**load, **texts}},
        "kwargs": {"params_config": {"component_kwargs": {"load_dataset": load, "pre_process_data": texts}}},
        "components": {"components": {"load_dataset": {"params": load}, "pre_process_data": {"params": texts}}},
        "mixture": {
            "params_config": {**load, "max_seq_len": 1, "component_kwargs": {"pre_process_data": texts}},
            "components": {
                "load_dataset": {"params": {"split": "test"}},
                "pre_process_data": {"params": {"joiner": "?"}},
            },
        },
    }
    values["data_configs"] = {"rows": {"name": "other", "type": "HuggingfaceContainer", **shapes[where]}}
    return values


def old_accelerators(values: dict[str, Any]) -> dict[str, Any]:
    values["systems"]["s"] = {"type": "LocalSystem", "config": {"accelerators": ["gpu"]}}
    values["engine"] = {"execution_providers": ["CUDAExecutionProvider"]}
    return values


def oldest(values: dict[str, Any]) -> dict[str, Any]:
    return old_data(old_accelerators(oldest_model(old_search(old_lora(old_texts(values))))), "kwargs")


@pytest.mark.parametrize(
    "spelling",
    [nested, old_model, oldest_model, old_texts, old_lora, old_search, old_accelerators, oldest, "params", "kwargs", "components", "mixture"],
    ids=lambda spelling: getattr(spelling, "__name__", spelling),
)  # fmt: skip
def test_old_and_new_spellings_mean_the_same(spelling: Any) -> None:
    changed = old_data(new(), spelling) if isinstance(spelling, str) else spelling(new())
    assert changed != new()
    assert translate(changed).values == translate(new()).values


@pytest.mark.parametrize("off", [False, None, {}])
def test_every_way_to_ask_for_no_search_means_none(off: Any) -> None:
    for holder in ({"search_strategy": off}, {"engine": {"search_strategy": off}}):
        values = {k: v for k, v in new().items() if k != "search_strategy"}
        assert "search" not in translate({**values, **holder}).values
        assert translate({**values, **holder}).values == translate(values).values


# --- the model's type ---


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "gemma", "phi", "phi3", "gpt2", "opt", "falcon", "bloom", "gpt_neox"]
)
def test_target_modules_come_from_the_model_folder(kind: str, tmp_path: Path) -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as of_peft

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": kind}))
    given = new()
    given["input_model"]["model_path"] = "m"
    del given["passes"]["lora"]["target_modules"]
    translation = translate(given, tmp_path)
    modules = translation.values["passes"]["lora"]["target_modules"]
    assert modules == (["o_proj", "qkv_proj"] if kind == "phi3" else of_peft[kind])
    assert any(note.kind == "default" and "target_modules" in note.text for note in translation.notes)
    assert "target_modules" not in translate(given).values["passes"]["lora"]


def test_the_table_of_target_modules_is_pefts() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as of_peft

    assert all(of_peft.get(kind, modules) == modules for kind, modules in TARGETS.items())


def test_every_name_of_the_trainer_is_known() -> None:
    import dataclasses

    from transformers import TrainingArguments

    from phinetune.olive.training import _DROPPED, NAMES
    from phinetune.training.config import _DROPPED as DROPPED_THERE
    from phinetune.training.config import _RENAMED

    assert {f.name for f in dataclasses.fields(TrainingArguments)} | set(_RENAMED) | set(DROPPED_THERE) <= NAMES | set(
        _DROPPED
    )


def test_a_note_is_one_line_and_says_where() -> None:
    for name in NAMES:
        for note in translate(config(name)).notes:
            assert (
                isinstance(note, Note)
                and note.path
                and note.text
                and "\n" not in str(note)
                and str(note).startswith(note.path)
            )


def test_translations_are_values() -> None:
    first, second = translate(new()), translate(new())
    assert isinstance(first, Translation) and first == second
    assert not set(TRANSLATED) & set(ADVICE)
    json.dumps(first.values)
