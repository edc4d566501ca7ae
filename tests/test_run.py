"""Running a workflow: what is cached, what reruns, what a failure leaves, `--only` and `--until`, other systems, two runs at once."""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phinetune.artifact import read_manifest
from phinetune.cli.app import main
from phinetune.errors import ConfigError, InfeasibleError, ModelError, PassError
from phinetune.workflow.config import parse_workflow
from phinetune.workflow.outcome import RunResult
from phinetune.workflow.plan import prepare
from phinetune.workflow.run import run_workflow
from tiny import PROMPT
from workflows import runs, values, write_script, write_workflow


def run(content: dict[str, Any], **options: Any) -> RunResult:
    return run_workflow(prepare(*parse_workflow(content)), **options)


def digest(folder: Path, *without: str) -> dict[str, str]:
    """File -> sha256 of everything under `folder` but `without`."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in without]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def lora_workflow(model: Path, data: Path, folder: Path, **training: Any) -> dict[str, Any]:
    training = {"max_steps": 4, "learning_rate": 1e-2, "save_steps": 1, **training}
    return {
        "model": str(model),
        "data": {"path": str(data), **PROMPT},
        "passes": {
            "pad": {"type": "Pad", "user_script": str(write_script(folder)), "x": 3, "y": 2},
            "lora": {"type": "LoRA", "r": 2, "training_config": training},
            "merge": {"type": "MergeAdapterWeights"},
        },
        "evaluate": {"metrics": ["exact_match", "size"], "input_model": False},
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
    }


def test_the_result_is_delivered_ready_to_load(llama_folder: Path, tone_file: Path, tmp_path: Path) -> None:
    from phinetune.generation.load import load_generator

    result = run(lora_workflow(llama_folder, tone_file, tmp_path))
    assert [s.cached for s in result.trials[0].steps] == [False, False, False]
    assert set(result.best.values) == {"exact_match", "size"}  # type: ignore[union-attr]
    assert read_manifest(tmp_path / "out" / "model")["kind"] == "hf"
    generator = load_generator(str(tmp_path / "out" / "model"))
    assert next(iter(generator.complete([generator.contract.prompt_ids([{"role": "user", "content": "hi"}])], 3))).ids
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    footprint = json.loads((tmp_path / "out" / "footprint.json").read_text())
    assert results and {s.key for s in result.trials[0].steps} <= set(footprint["artifacts"])


def test_a_second_run_does_nothing_and_leaves_the_same_bytes(
    llama_folder: Path, tone_file: Path, tmp_path: Path
) -> None:
    content = lora_workflow(llama_folder, tone_file, tmp_path)
    run(content)
    before = digest(tmp_path / "out", "run.log")
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "model").rglob("*")}
    again = run(content)
    assert all(s.cached for s in again.trials[0].steps)
    assert runs(tmp_path) == ["3 2.0 plain"]
    assert digest(tmp_path / "out", "run.log") == before
    assert times == {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "model").rglob("*")}


def test_one_character_of_the_data_reruns_the_training_and_what_follows_only(
    llama_folder: Path, tone_file: Path, tmp_path: Path
) -> None:
    content = lora_workflow(llama_folder, tone_file, tmp_path)
    first = run(content).trials[0].steps
    tone_file.write_text(tone_file.read_text().replace("number 7", "number 9", 1))
    second = run(content).trials[0].steps
    assert [s.cached for s in second] == [True, False, False]
    assert runs(tmp_path) == ["3 2.0 plain"]
    assert first[0].key == second[0].key and first[1].key != second[1].key and first[2].key != second[2].key


def test_a_failing_pass_leaves_its_traceback_in_the_log_and_nothing_in_the_cache(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = values(llama_folder, tmp_path, good={"x": 1}, bad={"x": 2, "fail": "bug"})
    file = write_workflow(tmp_path, content)
    assert main(["run", str(file), "-q"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 2 and "RuntimeError: the pass broke" in shown and "run.log" in shown
    log = (tmp_path / "out" / "run.log").read_text()
    assert "Traceback (most recent call last)" in log and 'raise RuntimeError("the pass broke' in log
    assert len(list((tmp_path / "cache" / "artifacts").iterdir())) == 1  # the good one
    assert not (tmp_path / "out" / "model").exists()
    content["passes"]["bad"]["fail"] = ""
    assert main(["run", str(write_workflow(tmp_path, content)), "-q"]) == 0
    assert [line.split()[0] for line in runs(tmp_path)] == ["1", "2", "2"]


def test_what_the_user_can_mend_ends_with_two(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="will not do"):
        run(values(llama_folder, tmp_path, bad={"fail": "user"}))
    with pytest.raises(PassError) as caught:
        run(values(llama_folder, tmp_path, bad={"fail": "bug"}))
    assert caught.value.exit_code == 1 and len(caught.value.problems) == 1


def test_a_missed_constraint_ends_with_three_and_says_by_how_much(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = values(llama_folder, tmp_path, pad={"x": 3}) | {"constraints": ["size <= 1 KB", "size >= 1 KB"]}
    assert main(["run", str(write_workflow(tmp_path, content)), "-q"]) == 3
    shown = capsys.readouterr().err
    assert "size <= 1 KB: missed by" in shown and "size >= 1 KB: met" in shown
    assert not (tmp_path / "out" / "model").exists() and (tmp_path / "out" / "results.json").exists()
    with pytest.raises(InfeasibleError):
        run(content)


def test_only_and_until(llama_folder: Path, tmp_path: Path) -> None:
    content = values(llama_folder, tmp_path, one={"x": 1}, two={"x": 2}, three={"x": 3})
    with pytest.raises(ConfigError, match=r"--only two: passes.one, which it needs, is not made yet"):
        run(content, only="two")
    result = run(content, until="two")
    assert [s.name for s in result.trials[0].steps] == ["one", "two"]
    assert (tmp_path / "out" / "model" / "padding.bin").stat().st_size == 1200
    result = run(content, only="three")
    assert [line.split()[0] for line in runs(tmp_path)] == ["1", "2", "3"]
    with pytest.raises(ConfigError, match='--until tow: no pass is called that, did you mean "two"'):
        run(content, until="tow")


def test_a_dry_run_computes_nothing(llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_workflow(tmp_path, values(llama_folder, tmp_path, one={"x": 1}, two={"x": 2}))
    assert main(["run", str(file), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "one" in shown and "two" in shown and not runs(tmp_path) and not (tmp_path / "out").exists()
    assert main(["run", str(file), "-q", "--until", "one"]) == 0
    capsys.readouterr()
    assert main(["run", str(file), "--dry-run"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "yes" in rows["one"] and "no" in rows["two"]


def test_a_dry_run_shows_what_such_passes_took_before(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = values(llama_folder, tmp_path, one={"x": 1, "seconds": 1.2})
    assert main(["run", str(write_workflow(tmp_path, content)), "-q"]) == 0
    facts = next((tmp_path / "cache" / "entries").glob("*.json"))
    if sys.platform == "linux":
        assert json.loads(facts.read_text())["peak_bytes"] > 10e6
    content["passes"]["one"]["x"] = 2
    capsys.readouterr()
    assert main(["run", str(write_workflow(tmp_path, content)), "--dry-run"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("one")]
    assert (
        row.split()[4] == "no"
        and row.rstrip().endswith("1 s")
        and (sys.platform != "linux" or "MB" in row or "GB" in row)
    )


def test_secrets_stay_out_of_the_cache_and_the_output(llama_folder: Path, tone_file: Path, tmp_path: Path) -> None:
    content = lora_workflow(llama_folder, tone_file, tmp_path, max_steps=1)
    content["passes"]["lora"]["model_kwargs"] = {"token": "hf_verysecret"}
    run(content)
    for file in [*(tmp_path / "cache").rglob("*"), *(tmp_path / "out").rglob("*")]:
        assert not file.is_file() or b"hf_verysecret" not in file.read_bytes(), file


def test_every_problem_is_said_at_once_with_its_line(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(
        f"""model: {llama_folder}
data: {{path: nowhere.jsonl}}
passes:
  merge: {{type: MergeAdapterWeights}}
  lora:
    type: LoRA
    alhpa: 3
  quant: {{type: ModelBilder}}
host: far
constraints: [exact_mtch >= 0.9]
"""
    )
    assert main(["run", str(file)]) == 2
    shown = capsys.readouterr().err
    for expected in ("bad.yaml:9: host: no system is called 'far'",):
        assert expected in shown
    file.write_text(file.read_text().replace("host: far\n", ""))
    assert main(["run", str(file)]) == 2
    shown = capsys.readouterr().err
    for expected in (
        "data: nowhere.jsonl: no such file",
        "passes.quant.type: no pass is called 'ModelBilder', did you mean",
        "constraints[0]",
    ):
        assert expected in shown
    assert "bad.yaml:8" in shown


def test_a_pass_in_another_python_leaves_the_same_artifact(llama_folder: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    run(values(llama_folder, here, pad={"x": 1}))
    content = values(llama_folder, there, pad={"x": 1, "host": "other"})
    content["systems"] = {"other": {"type": "python", "python": sys.executable}}
    run(content)
    own = ("manifest.json",)
    assert digest(here / "out" / "model", *own) == digest(there / "out" / "model", *own)
    content["passes"]["pad"]["fail"] = "user"
    with pytest.raises(ModelError, match="will not do"):
        run(content)


def test_two_runs_at_once_make_everything_once(llama_folder: Path, tmp_path: Path) -> None:
    content = values(llama_folder, tmp_path, one={"x": 1, "seconds": 1.0}, two={"x": 2, "seconds": 0.5})
    files = [
        write_workflow(tmp_path, content | {"output_dir": str(tmp_path / f"out{i}")}, f"{i}.json") for i in range(2)
    ]
    started = [
        subprocess.Popen([sys.executable, "-m", "phinetune", "run", str(f), "-q"], stderr=subprocess.PIPE)
        for f in files
    ]
    assert [p.wait() for p in started] == [0, 0], [p.stderr.read() for p in started if p.stderr]
    assert sorted(line.split()[0] for line in runs(tmp_path)) == ["1", "2"]
    assert digest(tmp_path / "out0" / "model") == digest(tmp_path / "out1" / "model")


def test_few_frames_of_ours_lie_between_the_command_and_the_model(
    llama_folder: Path, tone_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import phinetune
    from phinetune.training import loss

    source, original, seen = str(Path(phinetune.__file__).parent), loss.head_only_at, list[list[str]]()

    def spy(head: object, positions: object) -> object:
        seen.append([f.function for f in inspect.stack()[1:] if f.filename.startswith(source)])
        return original(head, positions)  # type: ignore[arg-type]

    monkeypatch.setattr(loss, "head_only_at", spy)
    file = write_workflow(tmp_path, lora_workflow(llama_folder, tone_file, tmp_path, max_steps=1))
    assert main(["run", str(file), "-q"]) == 0
    trained = next(frames for frames in seen if "fit" in frames)  # the forecast runs the loss before, without numbers
    assert len(trained) <= 8, trained[::-1]
