"""A quiet machine for measurements: passes work side by side, a measurement waits until none works, and passes wait until it is done.

Two locked files in the cache folder serve all processes and threads of one user: the *room*, which passes share and a measurement has
alone, and the *gate* before it, which a waiting measurement keeps shut, so that new passes cannot starve it. The system frees the
locks of a process that dies. A process that only waits for another one must not hold the room itself. Where files cannot be locked
(Windows, some network disks) nothing waits. Not here: what is measured.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

from phinetune.artifact import cache_folder
from phinetune.errors import OutputError
from phinetune.events import Note, OnEvent, log_event

_PATIENCE = 2.0  # seconds of waiting before it is said
_held = threading.local()  # what this thread is inside of: .measuring, and .working, the room that it shares


@contextlib.contextmanager
def working(on_event: OnEvent = log_event) -> Iterator[None]:
    """Inside, this thread works: others may work too, nobody measures. Waits for a measurement to end. Nothing new where it is inside already."""
    if getattr(_held, "measuring", False) or getattr(_held, "working", None) is not None:
        yield
        return
    _held.working = _enter(on_event)
    try:
        yield
    finally:
        _leave(_held.working)
        _held.working = None


@contextlib.contextmanager
def measuring(on_event: OnEvent = log_event) -> Iterator[None]:
    """Inside, no other thread or process is inside `working` or `measuring`. Inside `working`, this thread steps out of it meanwhile."""
    if getattr(_held, "measuring", False):
        yield
        return
    inside = getattr(_held, "working", None) is not None
    if inside:
        _leave(_held.working)
    try:
        with _Lock("gate") as gate, _Lock("room") as room:
            waiting = "waiting for passes of phinetune on this machine to end: a measurement needs it quiet"
            gate.take(True, waiting, on_event)
            room.take(True, waiting, on_event)
            _held.measuring = True
            try:
                yield
            finally:
                _held.measuring = False
    finally:
        if inside:
            _held.working = _enter(on_event)


def _enter(on_event: OnEvent) -> _Lock:
    """The room, shared, through the gate, which is let go at once."""
    room = _Lock("room")
    try:
        with _Lock("gate") as gate:
            waiting = "waiting for a measurement of phinetune on this machine to end"
            gate.take(False, waiting, on_event)
            room.take(False, waiting, on_event)
    except BaseException:
        _leave(room)
        raise
    return room


def _leave(room: _Lock) -> None:
    room.__exit__()


class _Lock:
    """A file in the cache folder to lock, shared or alone. Without a lock to be had, `take` says so once and does nothing."""

    _said = False

    def __init__(self, name: str) -> None:
        self.name = f"quiet.{name}"
        self.descriptor: int | None = None

    def take(self, alone: bool, waiting: str, on_event: OnEvent) -> None:
        """Wait for the lock; says `waiting` where that takes more than a moment."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        try:
            self.descriptor = os.open(
                cache_folder() / self.name, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666
            )
            deadline = time.monotonic() + _PATIENCE
            while time.monotonic() < deadline:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(self.descriptor, kind | fcntl.LOCK_NB)
                    return
                time.sleep(0.02)
            on_event(Note(waiting))
            fcntl.flock(self.descriptor, kind)
        except (OSError, OutputError) as error:  # a disk without locks, or one that cannot be written
            if not _Lock._said:
                _Lock._said = True
                reason = str(error).splitlines()[0]
                on_event(
                    Note(f"no lock in phinetune's cache: {reason}: measurements may meet other work", warning=True)
                )

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.descriptor is not None:
            import fcntl

            with contextlib.suppress(OSError):
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # a forked child may still have the file open
            os.close(self.descriptor)
            self.descriptor = None
