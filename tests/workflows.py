"""Workflows for tests: a user script whose passes take no time and leave files of a known size, and the values of a workflow around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCRIPT = '''
from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from phinetune.errors import ModelError
from phinetune.workflow.passes import Pass


@dataclass(frozen=True)
class Pad:
    x: int = 0
    y: float = 0.0
    kind: str = "plain"
    fail: str = ""
    seconds: float = 0.0
    file: str | None = None


def pad(job, folder):
    """A copy of the input with a file of 1000 (x - 3)^2 + 100 |y - 2| (+ 50 for kind: fancy) bytes."""
    with (Path(__file__).parent / "runs.txt").open("a") as log:
        log.write(f"{job.config.x} {job.config.y} {job.config.kind}\\n")
    time.sleep(job.config.seconds)
    if job.config.fail == "bug":
        raise RuntimeError("the pass broke\\nwith a second line")
    if job.config.fail == "user":
        raise ModelError("that model will not do", "take another")
    if job.config.x == 7:
        raise RuntimeError("seven does not work")
    shutil.copytree(job.input, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json", "building.json"))
    c = job.config
    size = int(1000 * (c.x - 3) ** 2 + 100 * abs(c.y - 2) + (50 if c.kind == "fancy" else 0))
    (folder / "padding.bin").write_bytes(b"." * size)
    return {"padding": size}


PASSES = {"Pad": Pass(pad, Pad, ("hf",), "hf", files=("file",))}
'''


def write_script(folder: Path) -> Path:
    """The script in `folder`."""
    file = folder / "passes.py"
    file.write_text(SCRIPT, encoding="utf-8")
    return file


def runs(folder: Path) -> list[str]:
    """A line for each time that the script's pass ran."""
    file = folder / "runs.txt"
    return file.read_text().splitlines() if file.exists() else []


def values(model: Path, folder: Path, **passes: Any) -> dict[str, Any]:
    """Values of a workflow of Pad passes with these keys, scored by size alone."""
    script = str(write_script(folder))
    return {
        "model": str(model),
        "passes": {
            n: {"type": "Pad", "user_script": script, **p} if isinstance(p, dict) else p for n, p in passes.items()
        },
        "evaluate": {"metrics": ["size"], "input_model": False},
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
    }


def write_workflow(folder: Path, content: dict[str, Any], name: str = "workflow.json") -> Path:
    """`content` as a JSON file."""
    file = folder / name
    file.write_text(json.dumps(content), encoding="utf-8")
    return file
