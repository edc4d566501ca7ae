"""How much main memory a model takes: a fresh process loads it, answers a few prompts, and reports the most it ever had.

Run as `python -m phinetune.evaluation.memory REQUEST REPORT`, two JSON files, by `peak_memory`, so that nothing of the caller's own
memory is counted. The figure holds Python and the libraries too, as in use. What lies on an accelerator is not in it, which is said.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import phinetune
from phinetune import errors
from phinetune.artifact import write_json
from phinetune.errors import ConfigError, ModelError, PhinetuneError
from phinetune.events import Event, Note, OnEvent, log_event


def resident_peak() -> int | None:
    """The most main memory this process ever had, in bytes: VmHWM on Linux, ru_maxrss on other Unixes; None where neither is known."""
    if sys.platform == "linux":  # ru_maxrss would count the process that started this one
        try:
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]  # "VmHWM:   2224 kB"
        return found[0] * 1024 if found else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024  # bytes on macOS, kB elsewhere


class WatchedMemory:
    """The most main memory since `watched_memory` began, `peak_bytes`: this process's or its largest child's; None where it is not known."""

    peak_bytes: int | None = None


@contextlib.contextmanager
def watched_memory() -> Iterator[WatchedMemory]:
    """Watch what happens inside; the figure is there afterwards. Linux only: elsewhere a process's peak cannot be set back."""
    found, children = WatchedMemory(), _children_peak()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM back to what is resident now
    except OSError:
        yield found
        return
    yield found
    own, grown = resident_peak(), _children_peak()
    found.peak_bytes = max(own or 0, grown if grown > children else 0) or None


def _children_peak() -> int:
    """Bytes of the largest child so far; 0 where that is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit


def check_memory_can_be_measured() -> None:
    """Raises ConfigError on systems that do not tell a process its peak."""
    if resident_peak() is None:
        raise ConfigError(
            "metrics: memory cannot be measured on this system", "leave it out, or measure on Linux or macOS"
        )


def peak_memory(
    model: str,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    model_kwargs: dict[str, Any] | None = None,
    base_model: str | None = None,
    on_event: OnEvent = log_event,
) -> int:
    """Peak resident bytes of a process that loads `model` (see `load_generator`) and answers `prompts` (ids) greedily, one by one.

    Raises what the loading raises, and ModelError if that process dies.
    """
    check_memory_can_be_measured()
    request = {
        "model": model,
        "model_kwargs": model_kwargs,
        "base_model": base_model,
        "prompts": [list(prompt) for prompt in prompts],
        "max_new_tokens": max_new_tokens,
    }
    with tempfile.TemporaryDirectory(prefix="phinetune-memory-") as folder:
        asked, told = Path(folder) / "request.json", Path(folder) / "report.json"
        asked.write_text(json.dumps(request, default=_plain), encoding="utf-8")
        done = _fresh_process(asked, told)
        if not told.is_file():
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ModelError(
                f"{model}: the process that loads it to measure memory ended with code {done.returncode}: {last}",
                "the machine may have too little memory for it" if done.returncode < 0 else "",
            )
        report = json.loads(told.read_text(encoding="utf-8"))
    for note in report["notes"]:
        on_event(Note(**note))
    if "problems" in report:
        kind: type[PhinetuneError] = getattr(errors, report["error"], PhinetuneError)
        raise kind(report["problems"], report["hint"])
    if report["device"] not in (None, "cpu"):
        on_event(Note(f"memory: main memory only; the model lies on {report['device']}", warning=True))
    return int(report["bytes"])


def _fresh_process(asked: Path, told: Path) -> subprocess.CompletedProcess[str]:
    """This file as a program, with this interpreter and this phinetune."""
    path = os.pathsep.join(filter(None, [str(Path(phinetune.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "phinetune.evaluation.memory", str(asked), str(told)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def _plain(value: Any) -> Any:
    """`value` of model_kwargs for JSON: settings objects as their fields, dtypes and devices by name."""
    fields = getattr(value, "to_dict", None)
    return fields() if callable(fields) else str(value)


def main(request: Path, report: Path) -> None:
    """The fresh process: load, answer, and write what was found."""
    from phinetune.generation.load import load_generator

    asked = json.loads(request.read_text(encoding="utf-8"))
    notes: list[Event] = []
    found: dict[str, Any] = {}
    try:
        generator = load_generator(
            asked["model"], asked["model_kwargs"], None, asked["base_model"], on_event=notes.append
        )
        for prompt in asked["prompts"]:
            list(generator.complete([prompt], asked["max_new_tokens"]))
        device = getattr(getattr(generator, "model", None), "device", None)
        found |= {"bytes": resident_peak(), "device": getattr(device, "type", None)}
    except PhinetuneError as error:
        found |= {"error": type(error).__name__, "problems": error.problems, "hint": error.hint}
    write_json(report, {**found, "notes": [vars(n) for n in notes if isinstance(n, Note)]})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
