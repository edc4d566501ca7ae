"""The cache of finished passes: locks that hold between processes and end with them, and removal that harms no run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phinetune.artifact import building
from phinetune.errors import ConfigError, OutputError
from phinetune.events import Event, Note
from phinetune.workflow.store import Store

KEYS = [f"{i:x}" * 64 for i in range(10, 14)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def put(store: Store, key: str, size: int = 10, used: float | None = None, **facts: Any) -> Path:
    """A finished artifact of `size` bytes, manifest aside."""
    with building(store.artifact(key), "hf", key, {"stage": "Pad"}) as folder:
        (folder / "weights").write_bytes(b"." * size)
    store.record(key, {"pass": "Pad", **facts})
    if used is not None:
        file = store.folder / "entries" / f"{key[:32]}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "used": used}))
    return store.artifact(key)


@contextlib.contextmanager
def process(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs `code` with a Store called `store`; returns when it has printed "ready"."""
    head = "import sys, time\nfrom phinetune.workflow.store import Store\nstore = Store(sys.argv[1])\n"
    running = subprocess.Popen(
        [sys.executable, "-c", head + code, *arguments], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    try:
        assert running.stdout is not None and running.stdout.readline() == "ready\n"
        yield running
    finally:
        running.kill()
        running.wait()


HOLD = "with store.%s:\n    print('ready', flush=True)\n    sys.stdin.readline()\n"


# --- artifacts ---


def test_an_artifact_is_there_when_it_is_whole(store: Store) -> None:
    assert not store.has(KEYS[0])
    with building(store.artifact(KEYS[0]), "hf", KEYS[0], {}) as folder:
        (folder / "weights").write_text("x")
        assert not store.has(KEYS[0])
    assert store.has(KEYS[0]) and not store.has(KEYS[1])


def test_facts_and_assessments_are_kept_and_touching_keeps_them(store: Store) -> None:
    put(store, KEYS[0], used=5.0, seconds=3)
    store.touch(KEYS[0])
    facts = store.facts(KEYS[0])
    assert facts["used"] > time.time() - 60 and (facts["seconds"], facts["key"]) == (3, KEYS[0])
    store.touch(KEYS[1])
    assert store.facts(KEYS[1]) == {} and store.assessment(KEYS[0]) == {}
    store.keep_assessment(KEYS[0], {"values": {"size": 1.0}})
    assert Store(store.folder).assessment(KEYS[0]) == {"values": {"size": 1.0}}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff", '{"used": "yesterday"}', '{"used": null, "pass": 3}'])
def test_broken_notes_are_as_none_and_hide_no_artifact(text: str, store: Store) -> None:
    put(store, KEYS[0])
    for folder in ("entries", "assessments"):
        (store.folder / folder / f"{KEYS[0][:32]}.json").write_bytes(text.encode("latin-1"))
    assert store.has(KEYS[0]) and isinstance(store.facts(KEYS[0]), dict) and isinstance(store.assessment(KEYS[0]), dict)
    (found,) = store.entries()
    assert found.key == KEYS[0][:32] and found.finished and found.used > 0
    assert store.collect(0) == [found]


def test_a_broken_manifest_is_no_artifact(store: Store) -> None:
    put(store, KEYS[0])
    (store.artifact(KEYS[0]) / "manifest.json").write_text("{")
    assert not store.has(KEYS[0])
    assert [(e.finished, e.kind) for e in store.entries()] == [(False, "?")]


def test_a_place_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="is a file, not a folder"):
            Store(place)


def test_notes_of_several_processes_at_once_stay_whole(store: Store) -> None:
    code = "print('ready', flush=True)\nsys.stdin.readline()\nfor i in range(150): store.record('k' * 64, {'by': sys.argv[2] * 2000, 'i': i})\n"
    with contextlib.ExitStack() as held:
        writers = [held.enter_context(process(code, str(store.folder), name)) for name in "ab"]
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        seen = set()
        while any(w.poll() is None for w in writers):
            if facts := store.facts("k" * 64):
                assert len(set(facts["by"])) == 1 and len(facts["by"]) == 2000
                seen.add(facts["by"][0])
        assert [w.returncode for w in writers] == [0, 0]
    assert store.facts("k" * 64)["i"] == 149 and seen
    assert len(list((store.folder / "entries").iterdir())) == 1


# --- locks ---


def test_one_process_makes_what_another_waits_for(store: Store) -> None:
    events: list[Event] = []
    done = threading.Event()

    def wait() -> None:
        with store.making(KEYS[0], "passes.lora", events.append):
            done.set()

    with process(HOLD % f"making({KEYS[0]!r}, 'x')", str(store.folder)) as other:
        waiting = threading.Thread(target=wait)
        waiting.start()
        with store.making(KEYS[1], "passes.other", events.append):  # another key waits for nobody
            pass
        assert not done.wait(0.5)
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
        assert done.wait(20)
        waiting.join()
    assert [e.text for e in events if isinstance(e, Note)] == [
        "passes.lora: another run is at it; waiting for its result"
    ]


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_the_locks_of_a_process_that_died_are_free(store: Store) -> None:
    put(store, KEYS[0])
    for what in (f"making({KEYS[0]!r}, 'x')", "in_use()"):
        with process(HOLD % what, str(store.folder)) as other:
            other.send_signal(signal.SIGKILL)
            other.wait()
            events: list[Event] = []
            with store.making(KEYS[0], "x", events.append):
                assert not events
    assert [e.key for e in store.remove([KEYS[0]])] == [KEYS[0][:32]]


def test_nothing_is_removed_while_a_run_uses_the_cache(store: Store) -> None:
    put(store, KEYS[0])
    with process(HOLD % "in_use()", str(store.folder)), store.in_use():  # two runs at once are no trouble
        for remove in (lambda: store.remove([KEYS[0]]), lambda: store.collect(0)):
            with pytest.raises(OutputError, match="a run is using this cache"):
                remove()
        assert store.has(KEYS[0])
    assert store.remove([KEYS[0]]) and not store.has(KEYS[0])


def test_no_run_begins_while_something_is_removed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, KEYS[0])
    begun: list[bool] = []

    def run() -> None:
        with store.in_use():
            begun.append(store.has(KEYS[0]))

    runner = threading.Thread(target=run)
    rmtree = __import__("shutil").rmtree

    def slow(folder: Path, **options: Any) -> None:
        runner.start()
        time.sleep(0.4)
        assert not begun
        rmtree(folder, **options)

    monkeypatch.setattr("phinetune.workflow.store.shutil.rmtree", slow)
    store.remove([KEYS[0]])
    runner.join()
    assert begun == [False]


# --- listing and removing ---


def test_the_list_shows_whole_and_unfinished_ones_the_last_used_first(store: Store) -> None:
    put(store, KEYS[0], 10, used=100.0)
    put(store, KEYS[1], 2000, used=200.0)
    partial = store.artifact(KEYS[2]).with_name(KEYS[2][:32] + ".partial")
    (partial / "checkpoint-3").mkdir(parents=True)
    (partial / "building.json").write_text(json.dumps({"kind": "adapter", "key": KEYS[2]}))
    (partial / "checkpoint-3" / "state").write_bytes(b"." * 500)
    found = store.entries()
    assert [(e.key, e.kind, e.made_by, e.finished) for e in found] == [
        (KEYS[2][:32] + ".partial", "adapter", "?", False),
        (KEYS[1][:32], "hf", "Pad", True),
        (KEYS[0][:32], "hf", "Pad", True),
    ]
    assert found[0].size_bytes > 500 and 2000 < found[1].size_bytes < 4000
    assert store.size_bytes >= sum(e.size_bytes for e in found)


def test_a_name_must_mean_one_artifact(store: Store) -> None:
    put(store, "ab" * 32), put(store, "ac" * 32)
    for name, reason in (
        ("a", "2 artifacts begin with it"),
        ("", "no artifact"),
        ("zz", "no artifact"),
        ("ab" * 15 + "zz", "no artifact"),
    ):
        with pytest.raises(ConfigError, match=reason):
            store.remove([name])
    with pytest.raises(ConfigError) as caught:
        store.remove(["ab", "a", "zz"])
    assert len(caught.value.problems) == 2 and store.has("ab" * 32)  # all or none
    assert [e.key for e in store.remove(["ab", "ab" * 32, "ab" * 16])] == ["ab" * 16]  # once, by any length of its key
    assert not store.has("ab" * 32) and not store.facts("ab" * 32) and store.has("ac" * 32)


def test_a_key_takes_its_unfinished_work_along_and_that_alone_can_go(store: Store) -> None:
    put(store, KEYS[0])
    partial = store.artifact(KEYS[0]).with_name(KEYS[0][:32] + ".partial")
    partial.mkdir()
    assert [e.key for e in store.remove([KEYS[0][:32] + ".partial"])] == [partial.name]
    assert store.has(KEYS[0]) and store.facts(KEYS[0]) and not partial.exists()
    partial.mkdir()
    assert {e.key for e in store.remove([KEYS[0][:8]])} == {KEYS[0][:32], partial.name}
    assert not store.entries()


def test_collecting_removes_what_was_used_longest_ago_until_the_rest_fits(store: Store) -> None:
    for i, key in enumerate(KEYS):
        put(store, key, 10_000, used=100.0 + i)
    store.touch(KEYS[0])
    one = store.entries()[0].size_bytes
    assert store.collect(4 * one + 99) == []
    assert [e.key for e in store.collect(2 * one + 99)] == [KEYS[1][:32], KEYS[2][:32]]
    assert [store.has(k) for k in KEYS] == [True, False, False, True]
    (store.folder / "artifacts" / ".x.old-123").mkdir()  # set aside by a process that died
    assert len(store.collect(0)) == 2 and not list((store.folder / "artifacts").iterdir())


def test_what_vanishes_while_it_is_listed_does_no_harm(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, KEYS[0])
    put(store, KEYS[1])
    walk = os.walk

    def vanishing(folder: Path) -> Any:
        for place, folders, names in walk(folder):
            yield place, folders, [*names, "gone"]

    monkeypatch.setattr("phinetune.workflow.store.os.walk", vanishing)
    assert len(store.entries()) == 2 and store.size_bytes > 0
