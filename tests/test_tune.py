"""Tuning: the fastest candidate that keeps the answers is taken, what was measured is remembered, threads are written for any runtime."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import phinetune
from phinetune.errors import ConfigError, ExportError
from phinetune.events import Note
from phinetune.exporting.codes import GraphCodes
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.graph import read_graph
from phinetune.exporting.options import check_options, installed_builder
from phinetune.generation.threads import threads_for
from phinetune.model.grid import Grid
from phinetune.workflow import tune
from tiny import tiny_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path / "cache"))


def timed(monkeypatch: pytest.MonkeyPatch, seconds: list[float | None]) -> list[int]:
    """Measurements that give `seconds` one after another; the list of what they were asked for."""
    left, asked = iter(seconds), list[int]()

    def answer(model: Any, threads: int) -> float | None:
        asked.append(threads)
        return next(left)

    monkeypatch.setattr(tune, "answer_seconds", answer)
    return asked


def test_the_fastest_comes_first_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_folder(tmp_path / "model")  # 64 and 96 inputs: blocks of 32 only
    asked = timed(monkeypatch, [0.5, 0.2])
    for _ in range(2):
        found = tune.in_order_of_speed(source, ExportConfig(tune=True), None, False, lambda event: None)
        assert [(c.block_size, c.accuracy_level) for c in found] == [(32, 1), (32, 4)] and len(asked) == 2


def test_a_grid_that_was_trained_for_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_folder(tmp_path / "model")
    timed(monkeypatch, [0.1, 0.2])
    config = ExportConfig(tune=True, block_size=16)
    found = tune.in_order_of_speed(source, config, Grid(block_size=16), False, lambda event: None)
    assert [(c.block_size, c.accuracy_level) for c in found] == [(16, 4), (16, 1)]


def test_a_disturbed_measurement_leaves_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, notes = tiny_folder(tmp_path / "model"), list[Any]()
    timed(monkeypatch, [0.1, None])
    config = ExportConfig(tune=True)
    assert tune.in_order_of_speed(source, config, None, False, notes.append) == [config]
    assert any(isinstance(n, Note) and n.warning and "nothing could be measured" in n.text for n in notes)
    asked = timed(monkeypatch, [0.3, 0.1])
    assert tune.in_order_of_speed(source, config, None, False, notes.append)[0].accuracy_level == 1 and len(asked) == 2


def test_the_folder_is_the_fastest_that_keeps_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phinetune.workflow import export as module

    source = tiny_folder(tmp_path / "model")
    timed(monkeypatch, [0.5, 0.2])
    settle = module._Codes.settle

    def refuse(self: Any, compare_answers: bool = True) -> dict[str, Any]:
        if self.config.accuracy_level == 1:
            raise ExportError("int4: 5.0 points of exact answers are lost")
        return settle(self, compare_answers)

    monkeypatch.setattr(module._Codes, "settle", refuse)
    notes: list[str] = []
    result = phinetune.export(
        str(source), tmp_path / "onnx", {"tune": True},
        on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None,
    )  # fmt: skip
    assert any("accuracy_level 1 is not taken: int4: 5.0 points" in note for note in notes)
    assert read_graph(result.folder / "model.onnx").count("accuracy_level").keys() == {4}
    assert result.manifest["export"]["accuracy_level"] == 4 and GraphCodes(result.folder).stored
    assert not (result.folder / "merged").exists()


def test_threads_are_written_for_whatever_loads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_folder(tmp_path / "model")
    timed(monkeypatch, [0.1, 0.2])
    folder = phinetune.export(str(source), tmp_path / "onnx", {"tune": True}).folder
    settings = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert settings["intra_op_num_threads"] >= 1 and threads_for(folder) is None


def test_all_refused_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phinetune.workflow import export as module

    source = tiny_folder(tmp_path / "model")
    timed(monkeypatch, [0.1, 0.2])

    def refuse(self: Any, compare_answers: bool = True) -> dict[str, Any]:
        raise ExportError("int4: all is lost")

    monkeypatch.setattr(module._Codes, "settle", refuse)
    with pytest.raises(ExportError, match="all is lost"):
        phinetune.export(str(source), tmp_path / "onnx", {"tune": True})
    assert not (tmp_path / "onnx").exists() and not (tmp_path / "onnx.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "tune: is for int4 and int8"),
        ({"execution_provider": "cuda"}, "tune: measures this machine's CPU"),
        ({"block_size": 64}, "block_size: is what tune chooses"),
        ({"exclude_lm_head": True}, "tune: times answers"),
    ],
)
def test_what_cannot_be_tuned_is_said_before(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(replace(ExportConfig(tune=True), **options), {"hidden_size": 64}, installed_builder())
