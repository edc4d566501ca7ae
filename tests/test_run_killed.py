"""A three-pass run killed at random moments: every resume ends with the bytes of an undisturbed run."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tiny import PROMPT
from workflows import write_workflow

KILLS = 20
TIMES = ("manifest.json", "results.json", "footprint.json", "run.log")  # they hold seconds that work took


def content(model: Path, data: Path, folder: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": {"path": str(data), **PROMPT},
        "passes": {
            "lora": {"type": "LoRA", "r": 4, "lora_dropout": 0.1, "training_config": {"max_steps": 30, "save_steps": 1, "learning_rate": 1e-2}},
            "merge": {"type": "MergeAdapterWeights"},
            "int4": {"type": "ModelBuilder", "block_size": 16},
        },
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
    }  # fmt: skip


def run(file: Path, seconds: float | None = None) -> tuple[int, float]:
    """(exit status, seconds) of the run in `file`, killed with all it started after so many seconds."""
    command = [sys.executable, "-m", "phinetune", "run", str(file), "--quiet"]
    started = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, time.monotonic() - started


def digest(folder: Path) -> dict[str, str]:
    """File -> sha256 of the delivered model."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in TIMES]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.slow
def test_killed_at_random_moments(llama_folder: Path, tone_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    status, whole = run(write_workflow(tmp_path / "a", content(llama_folder, tone_file, tmp_path / "a")))
    assert status == 0
    expected = digest(tmp_path / "a" / "out" / "model")
    moments, kills, round_ = random.Random(0), 0, 0
    while kills < KILLS:
        round_ += 1
        folder = tmp_path / f"b{round_}"
        folder.mkdir()
        file = write_workflow(folder, content(llama_folder, tone_file, folder))
        while (status := run(file, moments.uniform(0.3, whole))[0]) != 0:  # each attempt goes on from the one before
            assert status == -signal.SIGKILL
            kills += 1
            if kills % 5 == 0:  # and now and then it may finish
                assert run(file)[0] == 0
                break
        assert digest(folder / "out" / "model") == expected
        assert not list((folder / "out").glob("*.partial"))
