"""Time from the command `phinetune finetune` to the end of its first optimizer step, on a model that is on disk.

Each run is a process of its own, from the start of Python on. It runs the command line's own entry, with one change: the listener that
draws progress notes the clock when training is ready and when the first step is reported, and then ends the process. transformers imports
PEFT and bitsandbytes wherever they are installed, so `beside` says which of them are.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workloads import conversations

ROWS = 64
_COMMAND = """
import json, os, sys, time
from phinetune.cli.app import main
import phinetune.cli.console as console

shown = console.Terminal.__call__
ready = 0.0

def noting(self, event):
    global ready
    now = time.time()
    shown(self, event)
    if getattr(event, "stage", "") == "training":
        if event.done >= 1:
            print(json.dumps({"ready": ready, "step": now}), flush=True)
            os._exit(0)
        ready = now

console.Terminal.__call__ = noting
sys.exit(main(sys.argv[1:]) or 1)
"""


def measure_first_step(model: str, data: str, runs: int, settings: tuple[str, ...] = ()) -> dict[str, Any]:
    """Seconds of each run and their medians; `ready` is when the first step begins. One run before is not counted."""
    times: dict[str, list[float]] = {"ready": [], "step": []}
    with tempfile.TemporaryDirectory(prefix="phinetune-bench-") as name:
        folder = Path(name)
        rows = conversations(data, 1, 0)
        (folder / "rows.jsonl").write_text(
            "".join(json.dumps(next(rows)) + "\n" for _ in range(ROWS)), encoding="utf-8"
        )
        for run in range(runs + 1):
            command = ["finetune", "--model", model, "--data", str(folder / "rows.jsonl")]
            command += ["--output", str(folder / f"adapter-{run}"), *(f"--set={setting}" for setting in settings)]
            start = time.time()
            done = subprocess.run([sys.executable, "-c", _COMMAND, *command], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"phinetune finetune ended with exit code {done.returncode}\n{done.stderr[-2000:]}")
            noted = json.loads(done.stdout.splitlines()[-1])
            for key, values in times.items():
                values += [round(noted[key] - start, 2)] if run else []
    medians = {f"median_{key}": round(statistics.median(values), 2) for key, values in times.items()}
    beside = [name for name in ("peft", "bitsandbytes") if importlib.util.find_spec(name) is not None]
    return {"seconds_to": times, **medians, "rows": ROWS, "beside": beside}
