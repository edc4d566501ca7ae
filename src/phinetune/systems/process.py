"""Starting a module in another process of this machine, and stopping it with everything that it started.

The process is the head of a session of its own, so an interrupt reaches this process alone, which then ends the other one and its
children. Not here: what the two say to each other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from phinetune.errors import SystemRunError

PARENT_IS_HERE = b"phinetune\n"
"""Sent to the child's standard input, which is then held open: its end means that this process is gone."""
_GRACE = 10.0  # seconds between the request to end and the kill


@dataclass(frozen=True)
class Started:
    """Something that runs: its two streams in chunks as they come, its exit code, how to stop it and to remove what is left of it."""

    place: str
    stdout: Iterable[bytes]
    stderr: Iterable[bytes]
    wait: Callable[[], int]
    stop: Callable[[], None]
    close: Callable[[], None]


def start_process(python: Path, module: str, job_file: Path, environment: dict[str, str]) -> Started:
    """`python -m module job_file` with exactly the variables of `environment`. Raises SystemRunError if it cannot be started."""
    command: Sequence[str] = [str(python), "-m", module, str(job_file)]
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise SystemRunError(f"{python}: cannot be started: {error.strerror or error}") from None
    assert process.stdin and process.stdout and process.stderr  # noqa: S101  all three are pipes
    with contextlib.suppress(OSError):  # it has ended already; its exit code will say so
        process.stdin.write(PARENT_IS_HERE)
        process.stdin.flush()

    def close() -> None:
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]

    return Started(
        str(python), _chunks(process.stdout), _chunks(process.stderr), process.wait, lambda: _stop(process), close
    )


def exit_text(code: int) -> str:
    """`exit status 3`, or the signal: negative from a process of our own, above 128 through a shell or a container."""
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit status {code}"
    memory = " (often: the memory was full)" if name == "SIGKILL" else ""
    return f"signal {name}{memory}" if code < 0 else f"exit status {code}, {name}{memory}"


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """What `stream` has, as soon as it has something; closes it at its end."""
    with stream:
        while chunk := os.read(stream.fileno(), 1 << 16):
            yield chunk


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the process and its children to end, give them time to clear up, then kill what is left."""
    try:
        _signal_all(process, signal.SIGTERM)
        until = time.monotonic() + _GRACE
        while (process.poll() is None or _signal_all(process, 0)) and time.monotonic() < until:
            time.sleep(0.05)
    finally:  # also if the user does not want to wait
        _signal_all(process, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
        process.wait()


def _signal_all(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send signal `number` to the process and its children (0: to nobody); False if none of them is there any more."""
    if sys.platform == "win32":
        process.terminate()
        return False
    try:
        os.killpg(process.pid, number)  # the child is the head of its group
    except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of dead processes
        return False
    return True
