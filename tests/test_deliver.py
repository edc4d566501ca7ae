"""What a run leaves: the model whole, the same bytes twice, secrets nowhere, foreign files untouched, and a package that answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phinetune.artifact import building, read_manifest, write_json
from phinetune.errors import OutputError
from phinetune.events import Event, Note
from phinetune.workflow.config import PackageConfig, WorkflowConfig, parse_workflow
from phinetune.workflow.deliver import as_run, check_place, deliver, results_table
from phinetune.workflow.outcome import RunResult, StepResult, TrialResult
from phinetune.workflow.package import sample_code
from phinetune.workflow.plan import Workflow, prepare
from phinetune.workflow.redact import is_secret, without_secrets
from tiny import PROMPT

SEARCH = {
    "constraints": ["size <= 2 MB", "exact_match >= base - 0.1"],
    "objectives": ["min size", "max exact_match"],
    "search": {"trials": 4},
}


class Said(list[str]):
    """Collects the notes of a run."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.append(event.text)


def make_workflow(root: Path, model: Path, data: Path, **more: Any) -> Workflow:
    """A workflow of one LoRA pass whose rank is searched over, where there is a search."""
    rank: Any = {"choices": [2, 4, 8, 16]} if "search" in more else 4
    values = {
        "model": {"path": str(model), "model_kwargs": {"torch_dtype": "float32", "token": "hf_secret"}},
        "data": {"path": str(data), **PROMPT},
        "passes": {"lora": {"type": "LoRA", "r": rank, "model_kwargs": {"token": "hf_secret"}}},
        "output_dir": str(root / "out"),
        "cache_dir": str(root / "cache"),
        **more,
    }
    config, entries = parse_workflow(values)
    return prepare(config, entries)


def make_trial(workflow: Workflow, number: int, rank: int, exact: float, size: float, **more: Any) -> TrialResult:
    """A trial as if it had run: its artifact is a small folder in the cache."""
    chosen = {"passes.lora.r": rank} if workflow.config.search else {}
    step = workflow.steps(chosen)[0]
    if not workflow.store.has(step.key):
        with building(step.job.output, "adapter", step.key, {"stage": "finetune", "base_model": "there"}) as partial:
            (partial / "adapter_config.json").write_text(json.dumps({"r": rank}))
            (partial / "checkpoint-3").mkdir()
            (partial / "checkpoint-3" / "optimizer.pt").write_text("large")
            (partial / "more").mkdir()
            (partial / "more" / "file.txt").write_text("x")
    seconds = float(read_manifest(step.job.output)["seconds"])
    result = StepResult("lora", "LoRA", step.key, step.parent, "adapter", step.job.output, seconds, False)
    values = {"exact_match": exact, "size": size}
    missed = workflow.goals.missed(values, BASE)
    return replace(TrialResult(number, chosen, (result,), values, missed, "", 1.5 + number), **more)


BASE = {"exact_match": 0.5, "size": 4e6}


def make_result(workflow: Workflow) -> RunResult:
    """Two trials on the front, one that others beat, one that misses the size, one that failed."""
    trials = (
        make_trial(workflow, 0, 2, 0.6, 1e6),
        make_trial(workflow, 1, 4, 0.9, 1.5e6),
        make_trial(workflow, 2, 8, 0.5, 1.6e6),
        make_trial(workflow, 3, 16, 0.95, 3e6),
        TrialResult(4, {"passes.lora.r": 4}, (), {}, {}, "the loss is not finite", 2.0),
    )
    return RunResult(workflow.goals, BASE, trials)


@pytest.fixture
def searched(tmp_path: Path, llama_folder: Path, tone_file: Path) -> Workflow:
    return make_workflow(tmp_path, llama_folder, tone_file, **SEARCH)


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_the_best_model_is_there_whole_without_checkpoints(searched: Workflow, tmp_path: Path) -> None:
    result, said, out = make_result(searched), Said(), tmp_path / "out"
    check_place(out)
    deliver(searched, result, out, said)
    assert result.best is not None and result.best.number == 0
    source = result.best.steps[0].folder
    assert sorted(p.name for p in (out / "model").iterdir()) == ["adapter_config.json", "manifest.json", "more"]
    mine, its = read_manifest(out / "model"), read_manifest(source)
    assert mine == {**its, "files": ["adapter_config.json", "more", "manifest.json"]} and mine["base_model"] == "there"
    (out / "model" / "adapter_config.json").write_text("scribble")
    assert json.loads((source / "adapter_config.json").read_text()) == {"r": 2}  # no hard link into the cache
    assert (source / "checkpoint-3" / "optimizer.pt").exists()
    check_place(out)


def test_the_same_run_again_writes_the_same_bytes(searched: Workflow, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result, out = make_result(searched), tmp_path / "out"
    searched = replace(searched, config=replace(searched.config, package=PackageConfig("tone")))
    deliver(searched, result, out, Said())
    first, time = all_bytes(out), (out / "model" / "manifest.json").stat().st_mtime_ns
    slower = tuple(
        replace(t, seconds=t.seconds * 3, steps=tuple(replace(s, cached=True) for s in t.steps)) for t in result.trials
    )
    said = Said()
    deliver(searched, replace(result, trials=slower), out, said)
    assert all_bytes(out) == first and {"pareto.svg", "tone.zip", "results.json"} <= set(first)
    assert (out / "model" / "manifest.json").stat().st_mtime_ns == time
    assert sum("unchanged" in line for line in said) == 2


def test_another_best_takes_the_place_of_the_old_one_and_a_file_that_is_gone_comes_back(
    searched: Workflow, tmp_path: Path
) -> None:
    result, out = make_result(searched), tmp_path / "out"
    deliver(searched, result, out, Said())
    (out / "model" / "adapter_config.json").unlink()
    (out / "model" / "mine.txt").write_text("mine")
    deliver(searched, result, out, Said())
    assert json.loads((out / "model" / "adapter_config.json").read_text()) == {"r": 2}
    deliver(searched, replace(result, trials=result.trials[1:]), out, Said())
    assert json.loads((out / "model" / "adapter_config.json").read_text()) == {"r": 4}
    assert (out / "model" / "mine.txt").read_text() == "mine"


def test_results_say_what_was_chosen_and_why(searched: Workflow, tmp_path: Path) -> None:
    deliver(searched, make_result(searched), tmp_path / "out", Said())
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["best"]["number"] == 0 and found["best"]["chosen"] == {"passes.lora.r": 2} and found["base"] == BASE
    assert [(c["limit"], c["value"], c["met"]) for c in found["constraints"]] == [(2e6, 1e6, True), (0.4, 0.6, True)]
    assert [o["value"] for o in found["objectives"]] == [1e6, 0.6]
    assert [t["front"] for t in found["trials"]] == [True, True, False, False, False]
    assert [t["feasible"] for t in found["trials"]] == [True, True, True, False, False]
    assert found["trials"][3]["missed"] == {"size <= 2 MB": 1e6} and "finite" in found["trials"][4]["error"]
    assert all(t["seconds"] < 1.5 for t in found["trials"])  # those of the artifacts, not of this run
    front = json.loads((tmp_path / "out" / "pareto.json").read_text())
    assert [t["number"] for t in front["front"]] == [0, 1] and front["front"][1]["values"]["exact_match"] == 0.9


def test_the_footprint_is_a_tree_from_the_base_model(searched: Workflow, tmp_path: Path) -> None:
    deliver(searched, make_result(searched), tmp_path / "out", Said())
    found = json.loads((tmp_path / "out" / "footprint.json").read_text())
    artifacts = found["artifacts"]
    assert len(artifacts) == 5 and artifacts[found["base"]]["metrics"] == BASE
    assert artifacts[found["base"]]["size_bytes"] > 100_000
    for key, artifact in artifacts.items():
        if key != found["base"]:
            assert artifact["parent"] == found["base"] and Path(artifact["folder"]).is_dir()
            assert artifact["config"]["peft_config"]["r"] in (2, 4, 8, 16) and artifact["size_bytes"] > 0


def test_no_file_holds_a_secret_and_it_is_said(searched: Workflow, tmp_path: Path) -> None:
    said = Said()
    searched = replace(searched, config=replace(searched.config, package=PackageConfig("tone")))
    deliver(searched, make_result(searched), tmp_path / "out", said)
    assert not [name for name, content in all_bytes(tmp_path / "out").items() if b"hf_secret" in content]
    with zipfile.ZipFile(tmp_path / "out" / "tone.zip") as archive:
        assert not [n for n in archive.namelist() if b"hf_secret" in archive.read(n)]
    assert any("model.model_kwargs.token" in line and "passes.lora.model_kwargs.token" in line for line in said)


def test_what_is_a_secret() -> None:
    secrets = (
        "token",
        "hub_token",
        "HF_TOKEN",
        "api_key",
        "db_password",
        "AWS_SECRET_ACCESS_KEY",
        "AZURE_OPENAI_API-KEY",
    )
    assert all(is_secret(key) for key in secrets)
    assert not any(
        is_secret(key) for key in ("max_new_tokens", "eos_token", "pad_token_id", "learning_rate", "tokenizer")
    )
    left: list[str] = []
    values = {
        "use_auth_token": True,
        "token": None,
        "storage": "postgresql://me:pw@host/db",
        "l": [{"token": "t", "r": 8}],
    }
    kept = without_secrets(values, left_out=left)
    assert kept == {"use_auth_token": True, "token": None, "storage": "postgresql://me@host/db", "l": [{"r": 8}]}
    assert left == ["storage", "l[0].token"]


def test_the_configuration_that_ran_is_read_again_from_any_folder(
    searched: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_folder: Path, tone_file: Path
) -> None:
    monkeypatch.chdir(tone_file.parent)
    config, _ = parse_workflow(
        {
            "model": str(llama_folder),
            "data": {"train": {"path": tone_file.name, **PROMPT}, "other": "tone"},
            "passes": {"lora": [{"type": "LoRA", "r": {"low": 2, "high": 8}}, {"type": "DoRA"}]},
            "objectives": ["max exact_match"],
            "search": {"trials": 2},
            "systems": {"there": {"type": "python", "python": "/usr/bin/python3"}},
            "output_dir": "out",
        }
    )
    (tmp_path / "elsewhere").mkdir()
    written = json.loads(json.dumps(as_run(config)))
    monkeypatch.chdir(tmp_path / "elsewhere")
    again, entries = parse_workflow(written)
    assert Path(again.data["train"].path) == tone_file and again.data["other"].path == "tone"
    assert again.passes == config.passes and again.search == config.search and again.systems == config.systems
    assert [e.type for e in entries] == ["LoRA", "DoRA"] and Path(again.output_dir) == tone_file.parent / "out"
    assert as_run(again) == written


def test_without_a_feasible_trial_the_old_model_stays_and_it_is_said(searched: Workflow, tmp_path: Path) -> None:
    result, out = make_result(searched), tmp_path / "out"
    deliver(searched, result, out, Said())
    model, said = all_bytes(out / "model"), Said()
    failed = replace(result, trials=result.trials[3:])
    deliver(searched, failed, out, said)
    found = json.loads((out / "results.json").read_text())
    assert all_bytes(out / "model") == model and any("stays" in line for line in said)
    assert found["best"] is None and any("missed by 1e+06" in line for line in found["nearest"])
    assert [c["met"] for c in found["constraints"]] == [None, None]
    nothing = replace(result, trials=result.trials[4:])
    deliver(searched, nothing, out, said)
    assert not (out / "pareto.svg").exists() and any("no trial was scored" in line for line in said)


def test_a_plain_run_has_no_front_and_removes_an_old_one(
    searched: Workflow, tmp_path: Path, llama_folder: Path, tone_file: Path
) -> None:
    out, said = tmp_path / "out", Said()
    deliver(searched, make_result(searched), out, Said())
    plain = make_workflow(tmp_path, llama_folder, tone_file)
    deliver(plain, RunResult(plain.goals, {}, (make_trial(plain, 0, 4, float("nan"), 1e6),)), out, said)
    assert not list(out.glob("pareto.*")) and any("pareto.json" in line for line in said)
    found = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert found["trials"][0]["values"]["exact_match"] == "nan" and found["best"]["number"] == 0


def test_a_table_row_for_each_trial(searched: Workflow) -> None:
    header, rows = results_table(make_result(searched))
    assert header == ("trial", "lora.r", "exact match (%)", "size (MB)", "")
    assert rows[0] == ("0", "2", "60", "1", "chosen") and rows[1] == ("1", "4", "90", "1.5", "on the front")
    assert rows[2][-1] == "" and rows[3][-1] == "misses size <= 2 MB"
    assert rows[4] == ("4", "4", "-", "-", "the loss is not finite")
    other = replace(make_trial(searched, 5, 2, 0.6, 1e6), chosen={"passes.lora": 1})
    assert results_table(RunResult(searched.goals, BASE, (other,)))[1][0][:2] == ("5", "LoRA")


@pytest.mark.parametrize("name", ["model", "results.json", "footprint.json", "workflow.json", "pareto.svg"])
def test_a_foreign_file_of_one_of_our_names_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError) as caught:
        check_place(tmp_path)
    assert len(caught.value.problems) == 1 and name in caught.value.problems[0] and "output_dir" in caught.value.hint


def test_a_foreign_model_folder_and_a_file_as_output_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "other.txt").write_text("mine")
    check_place(tmp_path / "out")
    check_place(tmp_path / "not there yet")
    (tmp_path / "out" / "model" / "weights.bin").write_text("mine")
    with pytest.raises(OutputError, match="did not write"):
        check_place(tmp_path / "out")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        check_place(tmp_path / "out" / "other.txt")


def test_the_chart_has_labelled_axes_and_every_scored_trial(searched: Workflow, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    deliver(searched, make_result(searched), tmp_path / "out", Said())
    text = (tmp_path / "out" / "pareto.svg").read_text()
    words = [e.text for e in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert "size (MB)" in words and "exact match (%)" in words and {"0", "1", "2", "3"} <= set(words)
    assert {"misses a constraint", "meets every constraint", "no other is better in all"} <= set(words)
    assert "dc:date" not in text


def test_one_objective_is_drawn_over_the_first_constraint(tmp_path: Path, llama_folder: Path, tone_file: Path) -> None:
    pytest.importorskip("matplotlib")
    workflow = make_workflow(
        tmp_path, llama_folder, tone_file, objectives=["max exact_match"], constraints=["size <= 2 MB"], search={}
    )
    deliver(workflow, make_result(workflow), tmp_path / "out", Said())
    assert "size (MB)" in (tmp_path / "out" / "pareto.svg").read_text()
    alone = make_workflow(tmp_path, llama_folder, tone_file, objectives=["max exact_match"], search={})
    deliver(alone, make_result(alone), tmp_path / "out", Said())
    assert ">trial<" in (tmp_path / "out" / "pareto.svg").read_text()


def test_without_matplotlib_there_is_a_note_and_no_error(
    searched: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = Said()
    deliver(searched, make_result(searched), tmp_path / "out", said)
    assert any("pip install 'phinetune[search]'" in line for line in said)
    assert (tmp_path / "out" / "pareto.json").exists() and not (tmp_path / "out" / "pareto.svg").exists()


def test_a_full_disk_is_said(searched: Workflow, small_disk: Any) -> None:
    result = make_result(searched)
    assert result.best is not None
    (result.best.steps[0].folder / "weights.bin").write_bytes(b"x" * (3 << 20))
    with pytest.raises(OutputError, match=r"MB free|disk is full"):
        deliver(searched, result, small_disk("1m") / "out", Said())


def real_trial(workflow: Workflow) -> RunResult:
    """Every pass of a plain workflow, run."""
    steps: list[StepResult] = []
    for step in workflow.steps({}):
        if not workflow.store.has(step.key):
            step.pass_.run(step.job, step.job.output)
        facts = (step.entry.name, step.entry.type, step.key, step.parent, step.pass_.gives, step.job.output)
        steps.append(StepResult(*facts, read_manifest(step.job.output)["seconds"], False))
    trial = TrialResult(0, {}, tuple(steps), {"exact_match": 0.0}, {}, "", 1.0)
    return RunResult(workflow.goals, {}, (trial,))


def unpack_and_ask(archive: Path, folder: Path, *args: str) -> subprocess.CompletedProcess[bytes]:
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "sample.py", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, env=environment)


def test_the_samples_in_the_packages_answer_as_the_models_do(
    tmp_path: Path, llama_folder: Path, tone_file: Path
) -> None:
    import onnxruntime_genai as og

    from phinetune.generation.load import load_generator

    passes = {
        "lora": {"type": "LoRA", "r": 2, "training_config": {"max_steps": 1}},
        "merge": {"type": "MergeAdapterWeights"},
        "int4": {"type": "ModelBuilder"},
    }
    workflow = make_workflow(tmp_path, llama_folder, tone_file, passes=passes, package={"name": "tone"})
    whole, asked = real_trial(workflow), PROMPT["prompt"].format(phrase="a {strange} phrase")
    for last, needs in ((3, "import onnxruntime_genai"), (2, "import phinetune")):
        trial = replace(whole.trials[0], steps=whole.trials[0].steps[:last])
        out, unpacked = tmp_path / f"out{last}", tmp_path / f"unpacked{last}"
        deliver(workflow, replace(whole, trials=(trial,)), out, Said())
        found = unpack_and_ask(out / "tone.zip", unpacked, "a {strange} phrase")
        assert found.returncode == 0, found.stderr
        code = (unpacked / "sample.py").read_text()
        assert needs in code and ("import phinetune" in code) == (last == 2)
        generator = load_generator(str(out / "model"))
        answer = next(
            iter(generator.complete([generator.contract.prompt_ids([{"role": "user", "content": asked}])], 256))
        )
        expected = answer.text
        if last == 3:  # a random model's bytes are no text; compare what the runtime makes of the same ids
            stream = og.Tokenizer(og.Model(str(out / "model"))).create_stream()
            expected = "".join(stream.decode(token) for token in answer.ids)
        assert len(answer.ids) > 3 and found.stdout.decode().strip() == expected.strip()
        assert "python sample.py PHRASE" in (unpacked / "README.txt").read_text()
    wrong = subprocess.run([sys.executable, "sample.py"], cwd=tmp_path / "unpacked3", capture_output=True, text=True)
    assert wrong.returncode == 1 and "phrase" in wrong.stderr and "Traceback" not in wrong.stderr


def test_the_sample_asks_as_the_training_did(tmp_path: Path) -> None:
    def code(**data: Any) -> str:
        write_json(tmp_path / "manifest.json", {"kind": "adapter", "data": {"path": "d.jsonl", **data}})
        return sample_code(tmp_path) or ""

    text = code(text="# {phrase}\n{{tone}}: {tone}")
    assert "PROMPT = '# {phrase}\\n{{tone}}:'" in text and "raw_ids(prompt)" in text
    pair = code(prompt="{a} and {b}", completion="{c}", system="Be brief, None.")
    assert "FIELDS = ['a', 'b']" in pair and "'content': 'Be brief, None.'" in pair and "'content': prompt" in pair
    assert "'{message}'" in code() and "python sample.py MESSAGE" in code()
    for program in (text, pair, code()):
        compile(program, "sample.py", "exec")


def test_a_foreign_zip_file_stays(searched: Workflow, tmp_path: Path) -> None:
    out, said = tmp_path / "out", Said()
    out.mkdir()
    with zipfile.ZipFile(out / "mine.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    before = (out / "mine.zip").read_bytes()
    config: WorkflowConfig = replace(searched.config, package=PackageConfig("mine", sample_code=False))
    deliver(replace(searched, config=config), make_result(searched), out, said)
    assert (out / "mine.zip").read_bytes() == before and any("stays as it is" in line for line in said)
    (out / "mine.zip").unlink()
    deliver(replace(searched, config=config), make_result(searched), out, said)
    with zipfile.ZipFile(out / "mine.zip") as archive:
        assert "sample.py" not in archive.namelist() and "model/adapter_config.json" in archive.namelist()
