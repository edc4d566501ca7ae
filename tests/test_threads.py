"""Threads of ONNX Runtime: what is asked for is obeyed, the best is measured once, and nothing is remembered of a disturbed measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phinetune.generation import threads
from phinetune.generation.threads import as_overlay, measure_threads, threads_for
from phinetune.model import compute


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_cpus", lambda: 8)
    made = tmp_path / "onnx"
    made.mkdir()
    (made / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"hidden_size": 64}}}))
    (made / "model.onnx").write_bytes(b"0" * 100)
    return made


def answers(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], share: float = 1.0) -> list[int]:
    """Answers that take `seconds` with so many threads, which compute for `share` of that."""
    asked: list[int] = []

    def answer(model: int) -> tuple[float, float]:
        asked.append(model)
        return seconds[model], share * model * seconds[model]

    monkeypatch.setattr(threads, "_answer", answer)
    return asked


def test_as_many_as_the_process_may_use(folder: Path) -> None:
    assert threads_for(folder) == 8


def test_what_is_asked_for_is_obeyed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_for(folder) == 3
    (folder / "genai_config.json").write_text(as_overlay(5))
    assert threads_for(folder) is None


@pytest.mark.parametrize(("seconds", "best"), [({4: 1.0, 8: 0.6}, 8), ({4: 1.0, 8: 0.99}, 4), ({4: 1.0, 8: 1.4}, 4)])
def test_the_best_is_measured_once(
    seconds: dict[int, float], best: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers(monkeypatch, seconds)
    assert measure_threads(folder, lambda n: n) == {str(n): s for n, s in seconds.items()}
    assert threads_for(folder) == best and asked
    asked.clear()
    assert measure_threads(folder, lambda n: n) == {str(n): s for n, s in seconds.items()} and not asked


def test_a_disturbed_measurement_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {4: 0.3, 8: 0.5}, share=0.6)
    assert measure_threads(folder, lambda n: n) == {} and threads_for(folder) == 8
    answers(monkeypatch, {4: 0.5, 8: 0.3})
    assert measure_threads(folder, lambda n: n) and threads_for(folder) == 8


def test_another_size_of_model_is_measured_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, {4: 1.0, 8: 1.4})
    measure_threads(folder, lambda n: n)
    (folder / "model.onnx.data").write_bytes(b"0" * 100_000)
    assert threads_for(folder) == 8


def test_one_processor_leaves_nothing_to_choose(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cpus", lambda: 1)
    assert measure_threads(folder, lambda n: pytest.fail("nothing to load")) == {} and threads_for(folder) == 1


def test_a_container_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    original: Any = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: "250000 100000" if self.name == "cpu.max" else original(self, *a, **k)
    )
    assert compute.usable_cpus() == 2
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: "max 100000" if self.name == "cpu.max" else original(self, *a, **k)
    )
    assert compute.usable_cpus() == 16
