"""The whole way on the embedded model and real data, as a user runs it. Long: `make test-all`, and in CI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from phinetune.model.compute import default_dtype
from phinetune.workflow.quickstart import UNSEEN

pytestmark = pytest.mark.slow

PHRASES = Path(__file__).parents[2] / "shared" / "data" / "phrase-tone.jsonl"


def phinetune(*args: str, cwd: Path, threads: int | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [sys.executable, "-m", "phinetune", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def fewer_epochs() -> list[str]:
    """One epoch where the processor has no bfloat16: three take ten minutes of one core there. As much must be learned."""
    in_float32 = default_dtype(torch.device("cpu")) == torch.float32
    return ["--set", "training_config.num_train_epochs=1"] if in_float32 else []


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, fewer_epochs: list[str]) -> tuple[Path, dict[str, Any], str]:
    root = tmp_path_factory.mktemp("quickstart")
    done = phinetune("quickstart", *fewer_epochs, cwd=root)
    return root, json.loads((root / "phinetune-quickstart" / "results.json").read_text()), done.stdout


def test_the_stages_hold_what_they_promise(quickstart: tuple[Path, dict[str, Any], str]) -> None:
    _, results, _ = quickstart
    base, adapter, merged, onnx = results["stages"]
    assert [s["stage"] for s in results["stages"]] == ["base", "adapter", "merged", "ONNX int4"]
    assert base["value"] <= 0.05
    assert adapter["value"] >= 0.93
    assert abs(merged["correct"] - adapter["correct"]) <= 1
    assert onnx["value"] >= adapter["value"] - 0.1
    assert all(s["count"] == 160 and s["seconds_evaluated"] > 0 for s in results["stages"])
    assert onnx["size_bytes"] < 0.4 * merged["size_bytes"] and adapter["size_bytes"] < 0.1 * merged["size_bytes"]
    assert adapter["stop_rate"] >= 0.99 and onnx["stop_rate"] >= 0.99


def test_results_json_says_where_it_comes_from(quickstart: tuple[Path, dict[str, Any], str]) -> None:
    _, results, _ = quickstart
    assert results["seed"] == 0 and results["model"] == "smollm2-135m" and results["data"]["path"] == "tone"
    assert {"phinetune", "torch", "transformers", "onnxruntime-genai", "python"} <= set(results["versions"])
    assert all(s["metric"] == "exact_match" and len(s["interval"]) == 2 for s in results["stages"])


def test_the_terminal_shows_table_and_answers(quickstart: tuple[Path, dict[str, Any], str]) -> None:
    _, results, shown = quickstart
    assert results["reference"] == "adapter" and "merged against adapter: " in shown and "report.html" in shown
    for stage in results["stages"]:
        assert stage["missing"] == {} and stage["metrics"]["memory"] > 1e8 and stage["metrics"]["prefill_p50"] > 0
        assert f"{stage['correct']}/{stage['count']}" in shown and stage["stage"] in shown
    assert [a["phrase"] for a in results["unseen"]] == list(UNSEEN) and all(p in shown for p in UNSEEN)
    assert all(a["answer"] in ("joy", "sadness", "fear", "surprise") for a in results["unseen"])


def test_the_shipped_model_chats(quickstart: tuple[Path, dict[str, Any], str]) -> None:
    root, _, _ = quickstart
    done = phinetune(
        "chat",
        "--model",
        "phinetune-quickstart/onnx-int4",
        "Dancing barefoot in the kitchen with my kids makes every Sunday golden.",
        cwd=root,
    )
    assert done.stdout.strip() == "joy"


def test_quickstart_again_finds_everything_done(
    quickstart: tuple[Path, dict[str, Any], str], fewer_epochs: list[str]
) -> None:
    root, before, shown = quickstart
    again = phinetune("quickstart", *fewer_epochs, cwd=root).stdout
    after = json.loads((root / "phinetune-quickstart" / "results.json").read_text())
    assert again == shown
    assert after == before


@pytest.mark.skipif(not PHRASES.is_file(), reason="the phrase-tone data set is not beside the project")
def test_phrase_tone(tmp_path: Path, fewer_epochs: list[str]) -> None:
    phinetune(
        "finetune", "--model", "smollm2-135m", "--data", str(PHRASES), "--prompt", "What is the tone of this phrase? {phrase}",
        "--completion", "{tone}", *fewer_epochs, "--output", "adapter", cwd=tmp_path,
    )  # fmt: skip
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert manifest["ledger"]["rows"] == 795 and manifest["ledger"]["test"] == 159
    phinetune("evaluate", "--model", "adapter", "--output", "results.json", cwd=tmp_path)
    row = json.loads((tmp_path / "results.json").read_text())["stages"][0]
    assert row["count"] == 159 and row["value"] >= 0.93
