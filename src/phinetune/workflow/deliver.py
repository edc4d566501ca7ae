"""STUB until merged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from phinetune.events import OnEvent


def check_place(output: Path) -> None:
    """Stub."""


def deliver(workflow: Any, result: Any, output: Path, on_event: OnEvent) -> None:
    """Stub."""
    if result.best is not None:
        shutil.rmtree(output / "model", ignore_errors=True)
        shutil.copytree(result.best.steps[-1].folder, output / "model", ignore=shutil.ignore_patterns("checkpoint-*"))


def results_table(result: Any) -> Any:
    """Stub."""
    return ("trial", "chosen", "values", "state"), [
        (t.number, t.chosen, dict(t.values), t.error or t.missed or "ok") for t in result.trials
    ]
