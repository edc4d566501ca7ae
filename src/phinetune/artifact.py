"""Output folders that are whole or not there: built beside their place, renamed on success, with a birth certificate inside.

An artifact is a folder of one `kind` (`adapter`, `hf`, `onnx`) whose `manifest.json` says how it came to be: phinetune's and the
libraries' versions, the configuration, the keys of its inputs, figures, seconds. `key` is a hash of everything that decides the
content: the same key means the same work, so it need not be done again.

While it is built the folder is called `NAME.partial` and holds `building.json` with the key. A run that is killed leaves it; the
same command finds it and goes on (training) or starts over (everything else). A folder that phinetune did not make is never touched.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from phinetune.errors import OutputError

MANIFEST = "manifest.json"
BUILDING = "building.json"
_OURS = (BUILDING, MANIFEST)  # either says whose a folder is
_LIBRARIES = ("phinetune", "torch", "transformers", "safetensors", "onnxruntime", "onnxruntime-genai")


@dataclass(frozen=True)
class StageFolder:
    """What a stage left, and its manifest; `unchanged` if it was there already."""

    folder: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    unchanged: bool = False


def cache_folder() -> Path:
    """Where phinetune keeps what can be made again: $PHINETUNE_CACHE, or `phinetune` in the user's cache folder."""
    chosen = os.environ.get("PHINETUNE_CACHE")
    folder = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phinetune"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def content_key(*parts: Any) -> str:
    """sha256 over the canonical JSON of `parts`: what must be equal for two artifacts to be the same."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(*files: Path) -> str:
    """sha256 over the content of `files`, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Size on disk: the sum of the files' sizes, checkpoints left out."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files if not f.relative_to(folder).parts[0].startswith("checkpoint-"))


def versions() -> dict[str, str]:
    """Python's and the libraries' versions, for manifests and results."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def write_json(file: Path, value: Any) -> None:
    """Write `value` whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with disk_errors(file.parent):
        try:
            temporary.write_text(json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, or an empty dictionary where there is none."""
    try:
        value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def is_finished(folder: Path, kind: str, key: str) -> bool:
    """True if `folder` already holds this very artifact."""
    manifest = read_manifest(folder)
    return manifest.get("kind") == kind and manifest.get("key") == key


def check_output(folder: Path, kind: str, key: str, overwrite: bool, needed_bytes: int = 0) -> None:
    """Refuse, before any work, an output folder that the work would end up not being allowed or able to write.

    Raises OutputError if `folder` holds anything but an artifact of this kind; holds another run's result or an unfinished run with
    another key and `overwrite` is false; if it cannot be written; or if the disk has less than `needed_bytes` free.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file, not a folder", "choose another output folder")
    if folder.is_dir() and any(folder.iterdir()):
        found = read_manifest(folder).get("kind")
        if found != kind:
            what = f"{_article(found)} {found!r} artifact" if found else "files that phinetune did not write"
            raise OutputError(
                f"{folder}: holds {what}; it is left as it is", "choose another output folder, or empty this one"
            )
        if not overwrite and not is_finished(folder, kind, key):
            raise OutputError(
                f"{folder}: holds the result of a run with other settings or data",
                "choose another output folder, or pass --overwrite",
            )
    if os.path.ismount(folder):
        raise OutputError(
            f"{folder}: is a mount point, which cannot be put in place whole", "choose a folder inside it"
        )
    partial = partial_folder(folder)
    if partial.exists() and not partial.is_dir():
        raise OutputError(
            f"{partial}: is in the way: {folder.name} is built there", "move it, or choose another folder"
        )
    if partial.exists() and _partial_key(partial) is None and set(partial.iterdir()) - _half_written(partial):
        raise OutputError(
            f"{partial}: holds files that phinetune did not write; it is left as it is", "choose another output folder"
        )
    if partial.exists() and not overwrite and _partial_key(partial) not in (key, None):
        raise OutputError(
            f"{partial}: holds an unfinished run with other settings or data",
            "choose another output folder, or pass --overwrite to discard that run",
        )
    existing = _nearest(folder.absolute().parent)
    if not existing.is_dir():
        raise OutputError(f"{existing}: is a file, not a folder", "choose another output folder")
    if not os.access(existing, os.W_OK):
        raise OutputError(f"{existing}: cannot be written", "choose another output folder, or change its permissions")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OutputError(
            f"{existing}: {free / 1e6:.0f} MB free on this disk, about {needed_bytes / 1e6:.0f} MB are needed",
            "free some space or choose another disk",
        )


def _article(word: str | None) -> str:
    return "an" if word and word[0] in "aeioh" else "a"


def partial_folder(folder: Path) -> Path:
    """Where `folder` is built."""
    place = folder.resolve()
    return place.with_name(place.name + ".partial")


def _nearest(path: Path) -> Path:
    """`path`, or the nearest parent of it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _partial_key(partial: Path) -> str | None:
    """The key of what is built in `partial`; what is just about to be put in place has its manifest only. None for a stranger's folder."""
    for name in _OURS:
        try:
            found = json.loads((partial / name).read_text(encoding="utf-8"))
            return str(found["key"]) if found["kind"] else None  # other programs' manifests may have a key as well
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


@contextlib.contextmanager
def building(folder: Path, kind: str, key: str, record: dict[str, Any], resume: bool = False) -> Iterator[Path]:
    """The folder to build in. On success it gets its manifest and takes `folder`'s place; `record` may be added to until then.

    With `resume`, what an earlier attempt with the same key left is kept; a failed attempt leaves its checkpoints, an interrupted merge
    its whole files. Without, a failed attempt leaves nothing. Call `check_output` first. Raises OutputError for a full disk, and where another process is at the same work.
    """
    folder, partial = folder.resolve(), partial_folder(folder)
    started = time.time()
    with _only_one(folder):
        if not (resume and _partial_key(partial) == key):
            _discard(partial)
        try:
            with disk_errors(folder):
                partial.mkdir(exist_ok=True)
                for file in _half_written(partial):
                    file.unlink()
                write_json(partial / BUILDING, {"kind": kind, "key": key})
                (partial / MANIFEST).unlink(missing_ok=True)  # of an attempt that was killed at the very end
                yield partial
                certificate = {
                    "kind": kind,
                    "key": key,
                    "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "seconds": round(time.time() - started, 2),
                    "files": [*sorted(p.name for p in partial.iterdir() if p.name != BUILDING), MANIFEST],
                }
                write_json(partial / MANIFEST, {**certificate, "versions": versions(), **record})
                _readable(partial)
                (partial / BUILDING).unlink()
                _replace(partial, folder)
        except BaseException as error:  # after the disk has been asked whether it is full
            if not resume or (partial.is_dir() and not _worth_keeping(partial, error)):
                _discard(partial)
            raise


def _half_written(partial: Path) -> set[Path]:
    """What `write_json` was writing when its process was killed."""
    return set(partial.glob(".*.json.*"))


def _discard(partial: Path) -> None:
    """Remove a folder that is being built, what says that it is ours last: a kill in between must not make it a stranger's."""
    for entry in [p for p in partial.iterdir() if p.name not in _OURS] if partial.is_dir() else []:
        shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
    shutil.rmtree(partial, ignore_errors=True)


def _worth_keeping(partial: Path, error: BaseException) -> bool:
    """True for checkpoints, and for the whole files of a merge that was interrupted rather than refused."""
    interrupted = isinstance(error, KeyboardInterrupt | OutputError)
    return any(partial.glob("checkpoint-*")) or (interrupted and (partial / "merge.json").is_file())


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Raises OutputError if another process holds `folder`; the lock of a process that died is free."""
    import filelock

    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(str(folder.with_name(f".{folder.name}.lock")))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise OutputError(
            f"{folder}: another process is writing it", "wait for it, or choose another output folder"
        ) from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _readable(folder: Path) -> None:
    """Give every file the permissions that the user's umask allows: safetensors makes its files for the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def _replace(partial: Path, folder: Path) -> None:
    """Put `partial` in `folder`'s place. The old one is set aside first and removed last, so that one of the two is always whole.

    Files that somebody else put into the old one move into the new one.
    """
    if not folder.exists():
        os.rename(partial, folder)
        return
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    ours = {*read_manifest(folder).get("files", []), MANIFEST, BUILDING}
    os.rename(folder, old)
    try:
        os.rename(partial, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    for entry in old.iterdir():
        if entry.name not in ours and not (folder / entry.name).exists():
            os.rename(entry, folder / entry.name)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Full disks and forbidden folders as an OutputError; libraries wrap the former in exceptions of their own."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if _disk_is_full(error, place):
            raise OutputError(
                f"{place}: the disk is full", "free some space and start the same command again"
            ) from error
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise OutputError(
                f"{getattr(error, 'filename', None) or place}: cannot be written", "choose another output folder"
            ) from error
        raise


def _disk_is_full(error: BaseException, place: Path) -> bool:
    """True for ENOSPC in any of its disguises; torch's writer reports no errno at all, so there the disk itself is asked."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
        return True
    if any(words in str(error) for words in ("PytorchStreamWriter", "inline_container", "iostream error")):
        return shutil.disk_usage(_nearest(place)).free < 1 << 20
    cause = error.__cause__ or error.__context__
    return cause is not None and _disk_is_full(cause, place)
