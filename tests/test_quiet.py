"""Work and measurements of several processes: side by side, alone, nobody starved, nobody locked out for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phinetune import quiet
from phinetune.events import Event, Note
from phinetune.quiet import measuring, working

Start = Callable[[str, str], "subprocess.Popen[bytes]"]

_CHILD = """
import sys, time
from pathlib import Path
from phinetune.quiet import measuring, working
what, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
def say(word):
    with (folder / "log").open("a") as log: log.write(f"{name} {word}\\n")
say("asks")
with {"working": working, "measuring": measuring}[what](lambda event: None):
    say("enters")
    while not (folder / f"{name}.go").exists(): time.sleep(0.01)
    say("leaves")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "log").touch()
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts a process that is inside `working` or `measuring` until NAME.go exists; all are ended afterwards."""
    children: list[subprocess.Popen[bytes]] = []

    def begin(what: str, name: str) -> subprocess.Popen[bytes]:
        children.append(subprocess.Popen([sys.executable, "-c", _CHILD, what, name, str(folder)]))
        return children[-1]

    yield begin
    for child in children:
        child.kill()
        child.wait()


def wait_for(folder: Path, line: str) -> None:
    deadline = time.monotonic() + 60
    while line not in (folder / "log").read_text().splitlines():
        assert time.monotonic() < deadline, f"{line!r} never happened: {(folder / 'log').read_text()}"
        time.sleep(0.01)


def said(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def test_passes_work_side_by_side(folder: Path, start: Start) -> None:
    start("working", "a")
    start("working", "b")
    wait_for(folder, "a enters")
    wait_for(folder, "b enters")
    with working():
        assert "a leaves" not in said(folder) and "b leaves" not in said(folder)


def test_a_measurement_waits_for_the_work_and_new_work_waits_for_the_measurement(folder: Path, start: Start) -> None:
    start("working", "first")
    wait_for(folder, "first enters")
    start("measuring", "clock")
    wait_for(folder, "clock asks")
    time.sleep(0.3)  # so that it stands at the gate
    start("working", "late")
    wait_for(folder, "late asks")
    time.sleep(0.3)
    assert "clock enters" not in said(folder) and "late enters" not in said(folder)  # the late one does not overtake
    (folder / "first.go").touch()
    wait_for(folder, "clock enters")
    time.sleep(0.2)
    assert "late enters" not in said(folder)
    (folder / "clock.go").touch()
    wait_for(folder, "late enters")
    (folder / "late.go").touch()
    wait_for(folder, "late leaves")
    happened = [line for line in said(folder) if "asks" not in line]
    assert happened == ["first enters", "first leaves", "clock enters", "clock leaves", "late enters", "late leaves"]


def test_measurements_take_turns(folder: Path, start: Start) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.go").touch()
    for child in [start("measuring", "a"), start("measuring", "b")]:
        assert child.wait(60) == 0
    happened = [line.split() for line in said(folder) if "asks" not in line]
    assert [word for _, word in happened] == ["enters", "leaves"] * 2
    assert happened[0][0] == happened[1][0] != happened[2][0] == happened[3][0]


@pytest.mark.parametrize("what", ["working", "measuring"])
def test_a_process_that_is_killed_locks_nobody_out(what: str, folder: Path, start: Start) -> None:
    child = start(what, "dies")
    wait_for(folder, "dies enters")
    child.kill()
    with measuring(), working():
        assert "dies leaves" not in said(folder)


def test_a_pass_that_measures_steps_out_of_the_room_meanwhile(folder: Path, start: Start) -> None:
    with working():
        with working(), measuring(), measuring(), working():  # inside what it is inside of already: nothing new
            start("working", "other")
            wait_for(folder, "other asks")
            time.sleep(0.3)
            assert "other enters" not in said(folder)
        wait_for(folder, "other enters")
        start("measuring", "clock")
        wait_for(folder, "clock asks")
        (folder / "other.go").touch()
        wait_for(folder, "other leaves")
        time.sleep(0.3)
        assert "clock enters" not in said(folder)  # this thread works again
    wait_for(folder, "clock enters")


def test_threads_of_one_process_are_kept_apart_too(folder: Path) -> None:
    inside, go, order = threading.Event(), threading.Event(), []

    def work() -> None:
        with working():
            inside.set()
            go.wait(60)
            order.append("worked")

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(60)
    threading.Timer(0.2, go.set).start()
    with measuring():
        order.append("measured")
    thread.join()
    assert order == ["worked", "measured"]


def test_an_error_inside_leaves_nothing_locked(folder: Path) -> None:
    for inside in (working, measuring):
        with pytest.raises(ValueError, match="mine"), inside():
            raise ValueError("mine")
    with measuring(), working():
        pass
    assert sorted(p.name for p in (folder / "cache").iterdir()) == ["quiet.gate", "quiet.room"]


@pytest.mark.parametrize(("holder", "asker", "text"), [("working", measuring, "passes"), ("measuring", working, "a measurement")])  # fmt: skip
def test_waiting_is_said(
    holder: str, asker: Callable[..., object], text: str, folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        (folder / "a.go").touch()

    start(holder, "a")
    wait_for(folder, "a enters")
    monkeypatch.setattr(quiet, "_PATIENCE", 0.05)
    with asker(listen):  # type: ignore[attr-defined]
        pass
    assert len(events) == 1 and isinstance(events[0], Note) and f"waiting for {text}" in events[0].text


def test_without_locks_nothing_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fcntl", None)
        with working(), measuring():
            assert not (folder / "cache").exists()
    events: list[Event] = []
    monkeypatch.setenv("PHINETUNE_CACHE", str(folder / "log" / "cache"))  # below a file
    monkeypatch.setattr(quiet._Lock, "_said", False)
    for _ in range(2):
        with working(events.append), measuring(events.append):
            pass
    assert len(events) == 1 and isinstance(events[0], Note) and "measurements may meet other work" in events[0].text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_keep_the_lock(folder: Path) -> None:
    with working():
        read, write = os.pipe()
        forked = os.fork()
        if not forked:  # holds the open file until the pipe closes
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        os.close(read)
    try:
        with measuring():
            pass
    finally:
        os.close(write)
        os.waitpid(forked, 0)
