"""One stack in a process of its own, told over a pipe when to train: `python benchmarks/worker.py`, started by train.py.

The first line on stdin is the job. Then, each line one JSON object:

    <- {"ready": true}                                  training can begin
    -> {"warm": 1, "steps": 2, "count": false}          one round: steps that are not timed, then timed ones
    <- {"seconds": ..., "rss": ..., "peak": ..., "losses": [...], "count": ...}
    ...                                                 until all steps are done
    <- {"tokens": [...], "losses": [...]}

Between rounds the process blocks in a read, so that only one stack computes at a time. It then holds as little memory as it can: what
the allocator kept goes back to the system, and each round's first steps, which take it again, are not timed. `peak` is the kernel's
own high-water mark of this program (VmHWM), in bytes. What libraries print goes to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO


def memory() -> dict[str, int]:
    """Resident bytes of this process: `rss` now, `peak` at most so far."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"rss": peak, "peak": peak}
    values = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {"rss": int(values["VmRSS"].split()[0]) * 1024, "peak": int(values["VmHWM"].split()[0]) * 1024}


class PipePace:
    """Lets a stack train one round at a time; see the module's head."""

    def __init__(self, steps: int, commands: TextIO, replies: TextIO) -> None:
        self.left, self.commands, self.replies = steps, commands, replies
        self.losses: list[float] = []
        self.count: Any = None

    def reply(self, **values: Any) -> None:
        self.replies.write(json.dumps(values) + "\n")
        self.replies.flush()

    def ready(self) -> None:
        """Training can begin: waits for the first round."""
        self.reply(ready=True)
        self._wait()

    def step(self) -> None:
        """An optimizer step is done; at the end of a round, reports and waits for the next."""
        self.done, self.left = self.done + 1, self.left - 1
        if self.done == self.round["warm"]:
            self._start()
        elif self.done == self.round["warm"] + self.round["steps"]:
            self._finish()
            if self.left:
                self._wait()

    def _wait(self) -> None:
        line = self.commands.readline()
        if not line:  # the benchmark was stopped
            os._exit(1)
        self.round, self.done = json.loads(line), 0
        if not self.round["warm"]:
            self._start()

    def _start(self) -> None:
        if self.round["count"]:
            from flops import Count

            self.count = Count()
            self.count.__enter__()
        self.started = time.perf_counter()

    def _finish(self) -> None:
        seconds, held = time.perf_counter() - self.started, memory()
        counted = None
        if self.count is not None:
            self.count.__exit__(None, None, None)
            counted, self.count = self.count.figures(), None
        with contextlib.suppress(OSError, AttributeError):  # glibc only
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.reply(seconds=seconds, **held, losses=self.losses, count=counted)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but replies may reach the pipe
    job = json.loads(sys.stdin.readline())
    from stacks import STACKS, Job

    pace = PipePace(job["steps"], sys.stdin, replies)
    stack = STACKS[job["stack"]]
    tokens = stack.run(Job(Path(job["model"]), Path(job["rows"]), job["batch"], job["steps"]), pace, **stack.options)
    pace.reply(tokens=tokens, losses=pace.losses)


if __name__ == "__main__":
    main()
