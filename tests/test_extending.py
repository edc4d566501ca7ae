"""The page on passes of one's own: its pass is found, checked, searched over and run as the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from phinetune.errors import ConfigError
from phinetune.workflow.config import read_workflow
from phinetune.workflow.passes import GROUP
from phinetune.workflow.plan import Workflow, prepare
from phinetune.workflow.run import run_workflow

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The only code block of the page in this language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


@pytest.fixture
def folder(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's pass and workflow, for a tiny model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "passes.py").write_text(block("python"))
    (tmp_path / "workflow.yaml").write_text(block("yaml").replace("smollm2-135m", str(llama_folder)))
    return tmp_path


def load(*settings: str) -> Workflow:
    config, entries = read_workflow("workflow.yaml", ["cache_dir=cache", *settings])
    return prepare(config, entries)


def test_the_pass_runs_and_is_searched_over(folder: Path) -> None:
    from safetensors.torch import load_file

    workflow = load(
        "passes.lora.training_config={max_steps: 1}",
        "evaluate={max_examples: 2, max_new_tokens: 2, input_model: false}",
    )
    result = run_workflow(workflow, on_event=lambda event: None)
    assert sorted(t.chosen["passes.prune.share"] for t in result.trials) == [0.1, 0.3]
    for trial in result.trials:
        assert not trial.error, trial.error
        pruned = next(s.folder for s in trial.steps if s.name == "prune")
        weights = load_file(pruned / "model.safetensors")
        share = (weights["model.layers.0.mlp.up_proj.weight"] == 0).float().mean().item()
        assert share == pytest.approx(trial.chosen["passes.prune.share"], abs=0.01)
        assert not (weights["model.embed_tokens.weight"] == 0).any()
    assert (folder / "pruned" / "model" / "config.json").is_file()
    assert json.loads((folder / "pruned" / "results.json").read_text())["best"] is not None


def test_its_keys_are_checked_before_any_work(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r'passes\.prune\.shre: unknown key, did you mean "share"'):
        load("passes.prune.shre=0.1")
    with pytest.raises(ConfigError, match="share must be 0 to 1"):
        load("passes.prune.share=1.5")


def test_another_script_makes_another_artifact(folder: Path) -> None:
    first = load("passes.prune.share=0.1").steps({})
    (folder / "passes.py").write_text(block("python").replace("<= limit", "< limit"))
    second = load("passes.prune.share=0.1").steps({})
    assert all(a.key != b.key for a, b in zip(first, second, strict=True))


def test_the_entry_point_group_of_the_page_is_the_one_that_is_read() -> None:
    assert f'[project.entry-points."{GROUP}"]' in block("toml")
