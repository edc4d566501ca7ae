"""The command line as its users meet it: real processes, exit codes, one-line errors, help in a blink."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phinetune.cli.app import main
from tiny import PROMPT

COMMANDS = ("finetune", "evaluate", "compare", "merge", "export", "chat", "quickstart", "info", "init", "schema")


def run(*args: str, stdin: str | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "130", **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", "phinetune", *args], capture_output=True, text=True, input=stdin, env=environment
    )


def data_args(file: Path) -> list[str]:
    return ["--data", str(file), "--prompt", PROMPT["prompt"], "--completion", PROMPT["completion"]]


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """finetune, merge and export run as commands, with a config file and --set."""
    from tiny import tone_rows, write_rows

    root = tmp_path_factory.mktemp("way")
    file = write_rows(root / "tone.jsonl", tone_rows(40))
    config = root / "run.yaml"
    config.write_text(
        f"model: {llama_folder}\ndata:\n  path: {file}\n  prompt: '{PROMPT['prompt']}'\n  completion: '{PROMPT['completion']}'\n"
        "training_config:\n  num_train_epochs: 3\n  learning_rate: 5e-3\npeft_config: {r: 4}\nmodel_kwargs: {torch_dtype: float32}\n"
    )
    done = run(
        "finetune",
        "--config",
        str(config),
        "--output",
        str(root / "adapter"),
        "--set",
        "peft_config.r=8",
        "--set",
        "training_config.num_train_epochs=2",
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s, held-out loss" in done.stdout and "8 held out" in done.stderr and "training: " in done.stderr
    for command in (
        ["merge", "--adapter", "adapter", "--output", "merged"],
        ["export", "--model", "merged", "--output", "int4", "--precision", "int4"],
    ):
        done = subprocess.run([sys.executable, "-m", "phinetune", *command], capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr
    return root


def test_options_win_over_the_file_and_set_over_both(way: Path) -> None:
    manifest = json.loads((way / "adapter" / "manifest.json").read_text())
    assert manifest["peft_config"]["r"] == 8 and manifest["training_config"] == {
        "num_train_epochs": 2,
        "learning_rate": 0.005,
    }


@pytest.mark.parametrize("stage", ["adapter", "merged", "int4"])
def test_evaluate_needs_nothing_but_the_model(stage: str, way: Path, tmp_path: Path) -> None:
    done = run("evaluate", "--model", str(way / stage), "--output", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stderr
    assert "exact match" in done.stdout and "/8" in done.stdout and "as in training" in done.stderr
    row = json.loads((tmp_path / "results.json").read_text())["stages"][0]
    assert row["count"] == 8 and row["metric"] == "exact_match" and row["size_bytes"] > 1000


@pytest.mark.parametrize("stage", ["adapter", "int4"])
def test_chat_answers_an_argument_or_a_pipe(stage: str, way: Path) -> None:
    one = run("chat", "--model", str(way / stage), "--max-new-tokens", "4", "phrase number 3")
    assert one.returncode == 0 and "fills the prompt of the training" in one.stderr and one.stdout.endswith("\n")
    piped = run(
        "chat",
        "--model",
        str(way / stage),
        "--max-new-tokens",
        "4",
        "--quiet",
        stdin="phrase number 3\n\nphrase number 3\n",
    )
    assert piped.stdout == one.stdout * 2 and piped.stderr == ""


def test_quiet_shows_results_only(way: Path) -> None:
    done = run("evaluate", "--model", str(way / "merged"), "--quiet")
    assert done.returncode == 0 and done.stderr == "" and "exact match" in done.stdout


# What help costs and says.


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = "import sys; from phinetune.cli.app import main; main(['--help']); heavy = {'torch', 'transformers', 'datasets', 'onnxruntime', 'pydantic'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Usage: phinetune ") and "--help" in text
    options = text.partition("Options:")[2]
    assert all(line.strip() for line in options.strip().splitlines())


def test_version() -> None:
    import phinetune

    assert run("--version").stdout == f"phinetune {phinetune.__version__}\n"


# Errors: one line with a hint, exit code 2, nothing written.


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with exit code 2, nothing on stdout and no traceback; returns stderr."""

    def run_refused(*args: str) -> str:
        capsys.readouterr()
        assert main(list(args)) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and "Traceback" not in captured.err
        return captured.err

    return run_refused


Refused = Callable[..., str]


def test_missing_and_unknown_options(refused: Refused) -> None:
    text = refused("finetune")
    assert "error: model: this key is needed" in text and "hint: give --model, --data, or the key in --config" in text
    assert "No such option" in refused("finetune", "--modle", "x") and "No such command" in refused("finetun")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: x\n", 'modle: unknown key, did you mean "model"?'),
        ("model: [\n", "run.yaml:2:1: not valid YAML"),
        ("- a\n", "must hold key: value pairs"),
    ],
)
def test_config_files(content: str, message: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert message in refused(
        "finetune", "--config", str(tmp_path / "run.yaml"), "--data", "tone", "--output", str(tmp_path / "out")
    )


def test_data_errors_name_file_and_line(llama_folder: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "broken.jsonl"
    common = ["finetune", "--model", str(llama_folder), "--output", str(tmp_path / "out")]
    assert f"error: {file}: no such file" in refused(*common, *data_args(file))
    file.write_text("")
    assert f"error: {file}: the file is empty" in refused(*common, *data_args(file))
    file.write_text('{"phrase": "a", "tone": "joy"}\n{"phrase": "b", "tone": }\n')
    assert f"error: {file}:2: not valid JSON" in refused(*common, *data_args(file))
    file.write_text('{"phrase": "a", "tone": "joy"}\n{"phrase": "b"}\n')
    assert f'error: {file}:2: missing field "tone"' in refused(*common, *data_args(file))
    assert [p.name for p in tmp_path.iterdir()] == ["broken.jsonl"]


def test_model_target_and_output_errors(llama_folder: Path, tone_file: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    common = ["finetune", *data_args(tone_file), "--output", str(out)]
    assert "no such model folder" in refused(*common, "--model", str(tmp_path / "nowhere"))
    text = refused(*common, "--model", str(llama_folder), "--set", "peft_config.target_modules=[q_prj]")
    assert '"q_prj" matches no layer that can have factors, did you mean "q_proj"?' in text and "down_proj" in text
    assert not out.exists() and not list(tmp_path.glob("*.partial"))
    out.write_text("a file")
    assert "is a file, not a folder" in refused(*common, "--model", str(llama_folder))
    assert out.read_text() == "a file"


def test_a_real_process_ends_with_2_and_no_traceback(tmp_path: Path) -> None:
    done = run("merge", "--adapter", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and "hint: " in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback_and_ends_with_1(tmp_path: Path) -> None:
    code = "import phinetune.workflow.merge as m, sys\ndef broken(adapter, output_dir, on_event): raise KeyError('a bug')\nm.merge = broken\nfrom phinetune.cli.app import run\nsys.argv = ['phinetune', 'merge', '-a', 'x', '-o', 'y']\nrun()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "KeyError: 'a bug'" in done.stderr and "Traceback" in done.stderr
