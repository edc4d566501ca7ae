"""The cache of finished passes: a folder an artifact, named by what decides its content, and a line about each.

    CACHE/artifacts/KEY/          the artifact, with its manifest
    CACHE/artifacts/KEY.partial/  one that is being made, or was broken off: the next run goes on from it
    CACHE/entries/KEY.json        which pass made it of what, seconds, when it was used last
    CACHE/assessments/KEY.json    what was measured of an artifact

A failure is never stored. Runs share a cache safely: one makes an artifact while the others wait for it. Nothing is removed but by
`remove` and `collect`, and not while a run uses the cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.artifact import cache_folder, disk_errors, read_manifest, write_json
from phinetune.errors import ConfigError, OutputError
from phinetune.events import Note, OnEvent, log_event

_SHOWN_KEY = 32  # hex digits of the key in folder names: 128 bits
_POLL = 0.2  # seconds between looks at a lock that somebody else holds


@dataclass(frozen=True)
class StoredArtifact:
    """One line of `phinetune cache ls`."""

    key: str
    kind: str
    made_by: str
    size_bytes: int
    made: str
    used: float
    finished: bool


class Store:
    """The cache in `folder` (default: `workflow` in phinetune's cache folder)."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder).expanduser().resolve() if folder else cache_folder() / "workflow"
        existing = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        if not existing.is_dir():
            raise OutputError(f"{existing}: is a file, not a folder", "choose another cache folder")
        with disk_errors(self.folder):
            for name in ("artifacts", "entries", "assessments", "locks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)

    def artifact(self, key: str) -> Path:
        """Where the artifact with this key is, or will be."""
        return self.folder / "artifacts" / key[:_SHOWN_KEY]

    def has(self, key: str) -> bool:
        """True if it is there, whole."""
        return bool(read_manifest(self.artifact(key)))

    def record(self, key: str, facts: dict[str, Any]) -> None:
        """Note how an artifact was made, and that it was used now."""
        write_json(self.folder / "entries" / f"{key[:_SHOWN_KEY]}.json", {"key": key, **facts, "used": time.time()})

    def facts(self, key: str) -> dict[str, Any]:
        """What `record` noted, or nothing."""
        return _read(self.folder / "entries" / f"{key[:_SHOWN_KEY]}.json")

    def touch(self, key: str) -> None:
        """Note that it was used now."""
        if facts := self.facts(key):
            self.record(key, {k: v for k, v in facts.items() if k not in ("key", "used")})

    def assessment(self, key: str) -> dict[str, Any]:
        """What was measured under this key, or nothing."""
        return _read(self.folder / "assessments" / f"{key[:_SHOWN_KEY]}.json")

    def keep_assessment(self, key: str, values: dict[str, Any]) -> None:
        """Keep what was measured."""
        write_json(self.folder / "assessments" / f"{key[:_SHOWN_KEY]}.json", values)

    @contextlib.contextmanager
    def making(self, key: str, what: str, on_event: OnEvent = log_event) -> Iterator[None]:
        """Only one process at a time makes what `key` stands for; the others wait and then find it made."""
        import filelock

        lock = filelock.FileLock(str(self.folder / "locks" / f"{key[:_SHOWN_KEY]}.lock"))
        said = False
        while True:
            try:
                with disk_errors(self.folder):
                    lock.acquire(timeout=0)
                break
            except filelock.Timeout:
                if not said:
                    on_event(Note(f"{what}: another run is at it; waiting for its result"))
                said = True
                time.sleep(_POLL)
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Held by a run for its whole length: nothing is removed meanwhile. Locks of dead processes are free."""
        import filelock

        number, lock = 0, None
        with disk_errors(self.folder), self._gate():
            while lock is None:
                candidate = filelock.FileLock(str(self.folder / "locks" / f"run-{number}.lock"))
                try:
                    candidate.acquire(timeout=0)
                    lock = candidate
                except filelock.Timeout:
                    number += 1
        try:
            yield
        finally:
            lock.release()

    def _gate(self) -> Any:
        """Runs begin, and artifacts are removed, one at a time: no run begins to use what is just being removed."""
        import filelock

        return filelock.FileLock(str(self.folder / "locks" / "gate.lock"))

    def entries(self) -> list[StoredArtifact]:
        """Every artifact, the one used last first; unfinished ones, too."""
        found = []
        for folder in (self.folder / "artifacts").iterdir():
            if not folder.is_dir() or folder.name.startswith("."):
                continue
            manifest = read_manifest(folder)
            facts = _read(self.folder / "entries" / f"{folder.name.removesuffix('.partial')}.json")
            used = facts.get("used")
            if not isinstance(used, int | float):
                used = _look(folder)[1]
            made_by = str(facts.get("pass") or manifest.get("stage") or "?")
            kind = str(manifest.get("kind") or _read(folder / "building.json").get("kind") or "?")
            made = str(manifest.get("made") or "")
            found.append(StoredArtifact(folder.name, kind, made_by, _size(folder), made, float(used), bool(manifest)))
        return sorted(found, key=lambda a: -a.used)

    def remove(self, names: list[str]) -> list[StoredArtifact]:
        """Remove the artifacts whose keys begin with `names`, one each. Raises ConfigError for a name that fits none or several."""
        entries = self.entries()
        chosen, problems = [], []
        for name in dict.fromkeys(names):
            key = name if name.endswith(".partial") else name[:_SHOWN_KEY]
            fitting = [e for e in entries if key and e.key.startswith(key)]
            if len({e.key.removesuffix(".partial") for e in fitting}) == 1:
                chosen += [e for e in fitting if e not in chosen]
            else:
                problems.append(
                    f"{name}: {'no artifact has this key' if not fitting else f'{len(fitting)} artifacts begin with it'}"
                )
        if problems:
            raise ConfigError(problems, "phinetune cache ls shows the keys")
        self._delete(chosen)
        return chosen

    def collect(self, max_bytes: int) -> list[StoredArtifact]:
        """Remove what was used longest ago until at most `max_bytes` are left."""
        entries = self.entries()
        left, chosen = sum(e.size_bytes for e in entries), []
        for entry in reversed(entries):
            if left <= max_bytes:
                break
            chosen.append(entry)
            left -= entry.size_bytes
        self._delete(chosen)
        return chosen

    def _delete(self, chosen: list[StoredArtifact]) -> None:
        """Remove artifacts, unless a run is using the cache; then OutputError."""
        import filelock

        with contextlib.ExitStack() as held, disk_errors(self.folder):
            held.enter_context(self._gate())
            for file in sorted((self.folder / "locks").glob("run-*.lock")):
                lock = filelock.FileLock(str(file))
                try:
                    held.enter_context(lock.acquire(timeout=0))
                except filelock.Timeout:
                    raise OutputError(
                        f"{self.folder}: a run is using this cache", "wait until it has finished"
                    ) from None
            for entry in chosen:
                folder = self.folder / "artifacts" / entry.key
                (folder / "manifest.json").unlink(missing_ok=True)  # first, so that a half removed one counts as absent
                shutil.rmtree(folder, ignore_errors=True)
                if not entry.key.endswith(".partial"):
                    (self.folder / "entries" / f"{entry.key}.json").unlink(missing_ok=True)
            for set_aside in (self.folder / "artifacts").glob(".*.old-*"):  # by a process that died
                shutil.rmtree(set_aside, ignore_errors=True)

    @property
    def size_bytes(self) -> int:
        """Bytes of all that is stored."""
        return _size(self.folder)


def _look(path: Path) -> tuple[int, float]:
    """(bytes, time of the last change); zeros if a run has taken it away meanwhile."""
    try:
        found = path.lstat()
    except OSError:
        return 0, 0.0
    return found.st_size, found.st_mtime


def _size(folder: Path) -> int:
    """Bytes of the files in `folder`, checkpoints too; files come and go while a run is at it."""
    return sum(_look(Path(place, name))[0] for place, _, names in os.walk(folder) for name in names)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
