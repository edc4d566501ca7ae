"""A workflow's target: its memory is a constraint, and what it lacks here is said before work begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phinetune.errors import ConfigError, InfeasibleError
from phinetune.workflow.config import parse_workflow
from phinetune.workflow.plan import prepare
from phinetune.workflow.run import run_workflow
from workflows import runs, values


def aimed(model: Path, folder: Path, accelerator: dict[str, Any], **more: Any) -> dict[str, Any]:
    content = values(model, folder, pad={"x": 3})
    return content | {"systems": {"board": {"accelerator": accelerator}}, "target": "board"} | more


def test_a_model_must_fit_into_the_targets_memory(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match=r"the target's memory\): missed by"):
        run_workflow(prepare(*parse_workflow(aimed(llama_folder, tmp_path, {"memory": "100KB"}))))
    assert not (tmp_path / "out" / "model").exists()
    result = run_workflow(prepare(*parse_workflow(aimed(llama_folder, tmp_path, {"memory": "100MB"}))))
    assert result.best is not None and len(runs(tmp_path)) == 1


def test_what_this_machine_has_not_can_be_built_for_but_not_measured(llama_folder: Path, tmp_path: Path) -> None:
    board = {"device": "gpu", "execution_provider": "CUDAExecutionProvider"}
    onnx = {"passes": {"int4": {"type": "ModelBuilder"}}}
    steps = prepare(*parse_workflow(aimed(llama_folder, tmp_path, board, **onnx))).steps({})
    assert steps[0].job.config.execution_provider == "cuda"
    with pytest.raises(
        ConfigError, match=r"systems.board.accelerator.execution_provider: CUDAExecutionProvider is not"
    ):
        prepare(
            *parse_workflow(
                aimed(llama_folder, tmp_path, board, **onnx, objectives=["min latency_p50"], data={"path": "tone"})
            )
        )


def test_a_pass_that_cannot_serve_the_target_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    board = {"device": "npu", "execution_provider": "QNNExecutionProvider"}
    onnx = {"passes": {"int4": {"type": "ModelBuilder"}}}
    with pytest.raises(ConfigError, match="QNNExecutionProvider: the ONNX builder has no models for it"):
        prepare(*parse_workflow(aimed(llama_folder, tmp_path, board, **onnx)))
