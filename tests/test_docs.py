"""Docs that run: the generated pages are current, and what README and the docs tell people to type works, here on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from phinetune.cli.app import main
from tiny import tone_rows, write_rows

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(file: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)


def commands(file: Path) -> list[str]:
    """Every `phinetune ...` that the console blocks of a page tell people to type, in order."""
    text = "\n".join(blocks(file, "console")).replace("\\\n", " ")
    return [line[2:].strip() for line in text.splitlines() if line.startswith("$ phinetune ")]


def olive_workflow(model: Path) -> dict[str, Any]:
    """A small configuration file of Olive's."""
    training = {"max_steps": 1, "per_device_train_batch_size": 1}
    preprocess = {"text_template": "{phrase}: {tone}", "source_max_len": 128, "corpus_strategy": "join"}
    loading = {"data_name": "json", "data_files": "phrases.jsonl", "split": "train"}
    return {
        "input_model": {"type": "PyTorchModel", "config": {"hf_config": {"model_name": str(model), "task": "text-generation"}}},
        "data_configs": [
            {
                "name": "phrases", "type": "HuggingfaceContainer",
                "load_dataset_config": {"params": loading}, "pre_process_data_config": {"params": preprocess},
            }
        ],
        "passes": {
            "lora": {"type": "LoRA", "config": {"lora_r": 2, "train_data_config": "phrases", "training_args": training}},
            "merge": {"type": "MergeAdapterWeights"},
        },
        "engine": {"search_strategy": False, "output_dir": "olive"},
    }  # fmt: skip


def test_generated_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.run(check=True) == 0


def test_the_commands_of_the_readme_work(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [c for c in commands(ROOT / "README.md") if "quickstart" not in c]
    assert [c.split()[1] for c in found][:5] == ["finetune", "evaluate", "merge", "export", "chat"]
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "phrases.jsonl", tone_rows(40))
    (workflow,) = blocks(ROOT / "README.md", "yaml")
    for full, small in (
        ("smollm2-135m", str(llama_folder)), ("trials: 12", "trials: 1"), ("exact_match >= 0.92", "exact_match >= 0.0"),
        ("num_train_epochs: 3", "max_steps: 1"),
    ):  # fmt: skip
        assert full in workflow
        workflow = workflow.replace(full, small)
    (tmp_path / "workflow.yaml").write_text(workflow, encoding="utf-8")
    (tmp_path / "olive-config.json").write_text(json.dumps(olive_workflow(llama_folder)), encoding="utf-8")
    for command in found:
        args = [
            str(llama_folder) if word == "smollm2-135m" else word for word in shlex.split(command, comments=True)[1:]
        ]
        extra = ["--set", "training_config.num_train_epochs=1"] if args[0] == "finetune" else []
        extra += ["--max-new-tokens", "4"] if args[0] == "chat" else []
        extra += (
            ["--set", "export_config.max_drop=any"] if args[0] == "export" else []
        )  # a random model has nothing to keep
        assert main([*args, *extra]) == 0, (command, capsys.readouterr().err)


def test_the_python_of_the_readme_works(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "phrases.jsonl", tone_rows(40))
    code = "\n".join(blocks(ROOT / "README.md", "python")).replace('"smollm2-135m"', repr(str(llama_folder)))
    code = code.replace('{"precision": "int4"}', '{"precision": "int4", "max_drop": "any"}')
    assert "phinetune.finetune(" in code and '"any"' in code
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "onnx-int4" / "genai_config.json").is_file()


def test_the_workflow_of_the_docs_is_short_and_plans(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    (text,) = blocks(ROOT / "docs" / "workflows.md", "yaml")
    assert len(text.splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "phrases.jsonl", tone_rows(40))
    (tmp_path / "workflow.yaml").write_text(text.replace("smollm2-135m", str(llama_folder)), encoding="utf-8")
    assert main(["run", "workflow.yaml", "--dry-run"]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "space: passes.int4.block_size: 32, 128" in shown and "search: tpe, 12 trials" in shown


@pytest.mark.parametrize("file", PAGES, ids=lambda f: f.name)
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (file.parent / target).exists(), target


def test_the_two_commands_are_in_the_first_screen_of_the_readme() -> None:
    first = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30])
    assert "make quickstart" in first and "make test" in first


@pytest.mark.parametrize("name", ["workflow.yaml", "olive-config.json"])
def test_the_examples_plan(
    name: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    args = ["run", str(ROOT / "examples" / name), "--dry-run", "--set", f"model.path={llama_folder}"]
    assert main(args if name.endswith("json") else [*args[:-1], f"model={llama_folder}"]) == 0, capsys.readouterr().err
    assert "MergeAdapterWeights" in capsys.readouterr().out
