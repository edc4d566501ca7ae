"""An output folder is whole or not there: no failure, kill or full disk leaves half of one or harms an older one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from phinetune.artifact import (
    building,
    check_output,
    content_key,
    file_hash,
    folder_bytes,
    is_finished,
    read_manifest,
    versions,
    write_json,
)
from phinetune.data.examples import Example, write_examples
from phinetune.errors import OutputError


def make(folder: Path, key: str = "k", text: str = "content", kind: str = "adapter") -> Path:
    """A finished artifact with one file, `weights`."""
    with building(folder, kind, key, {}) as partial:
        (partial / "weights").write_text(text)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(folder: Path, kind: str = "adapter", key: str = "k", overwrite: bool = False, **more: Any) -> OutputError:
    with pytest.raises(OutputError) as caught:
        check_output(folder, kind, key, overwrite, **more)
    assert len(caught.value.problems) == 1
    assert caught.value.hint
    return caught.value


# --- building ---


def test_a_finished_folder_takes_its_place_with_a_manifest(tmp_path: Path) -> None:
    record: dict[str, Any] = {"stage": "finetune", "given": Path("a/b")}
    with building(tmp_path / "deep" / "out", "adapter", "k1", record) as partial:
        assert partial == tmp_path / "deep" / "out.partial"
        assert not (tmp_path / "deep" / "out").exists()
        (partial / "weights").write_text("content")
        record["figures"] = {"loss": 0.5}
    assert names(tmp_path / "deep") == ["out"]
    folder = tmp_path / "deep" / "out"
    assert names(folder) == ["manifest.json", "weights"]
    manifest = read_manifest(folder)
    assert manifest.pop("made").endswith("Z")
    assert manifest.pop("seconds") >= 0
    assert manifest.pop("versions") == versions()
    assert manifest.pop("files") == ["weights", "manifest.json"]
    assert manifest == {"kind": "adapter", "key": "k1", "stage": "finetune", "given": "a/b", "figures": {"loss": 0.5}}
    assert is_finished(folder, "adapter", "k1")
    assert not is_finished(folder, "adapter", "k2")
    assert not is_finished(folder, "hf", "k1")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OutputError])
@pytest.mark.parametrize("resume", [True, False])
def test_a_failure_leaves_only_what_was_there(error: type[BaseException], resume: bool, tmp_path: Path) -> None:
    make(tmp_path / "out", "old", "old content")
    for name in ("out", "new"):
        with pytest.raises(error), building(tmp_path / name, "adapter", "new", {}, resume) as partial:
            (partial / "weights").write_text("half")
            raise error("stop")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "weights").read_text() == "old content"
    assert is_finished(tmp_path / "out", "adapter", "old")


def test_success_replaces_the_earlier_result_and_keeps_what_others_put_beside_it(tmp_path: Path) -> None:
    with building(tmp_path / "out", "adapter", "old", {}) as partial:
        (partial / "only-in-old").touch()
    (tmp_path / "out" / "notes.txt").write_text("the user's own")
    make(tmp_path / "out", "new", "new content")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["manifest.json", "notes.txt", "weights"]
    assert (tmp_path / "out" / "weights").read_text() == "new content"


def test_the_earlier_result_is_put_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out", "old", "old content")
    rename = os.rename

    def refuse_partial(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise PermissionError(13, "in use by another process", str(source))
        rename(source, target)

    with pytest.raises(OutputError), building(tmp_path / "out", "adapter", "new", {}) as partial:
        (partial / "weights").write_text("new content")
        monkeypatch.setattr(os, "rename", refuse_partial)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "weights").read_text() == "old content"


def interrupted(folder: Path, key: str, checkpoint: str = "checkpoint-5") -> None:
    with pytest.raises(KeyboardInterrupt), building(folder, "adapter", key, {}, resume=True) as partial:
        (partial / checkpoint).mkdir()
        (partial / checkpoint / "state").write_text(key)
        raise KeyboardInterrupt


def test_an_interrupted_run_keeps_its_checkpoints_for_the_same_key(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "k")
    assert names(tmp_path) == ["out.partial"]
    check_output(tmp_path / "out", "adapter", "k", overwrite=False)
    with building(tmp_path / "out", "adapter", "k", {}, resume=True) as partial:
        assert (partial / "checkpoint-5" / "state").read_text() == "k"
        shutil.rmtree(partial / "checkpoint-5")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["manifest.json"]


@pytest.mark.parametrize(("key", "resume"), [("other", True), ("k", False)])
def test_checkpoints_are_discarded_for_another_key_or_without_resume(key: str, resume: bool, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "k")
    with building(tmp_path / "out", "adapter", key, {}, resume) as partial:
        assert names(partial) == ["building.json"]


def test_a_killed_process_leaves_a_partial_folder_that_the_same_work_takes_over(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib\nfrom phinetune.artifact import building\n"
        "with building(pathlib.Path(sys.argv[1]), 'hf', 'k', {}) as partial:\n"
        "    (partial / 'half').touch()\n"
        f"    os.kill(os.getpid(), {int(signal.SIGTERM)})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True)
    assert done.returncode != 0
    assert names(tmp_path / "out.partial") == ["building.json", "half"]
    assert not (tmp_path / "out").exists()
    assert "unfinished run" in refusal(tmp_path / "out", "hf", "other").problems[0]
    check_output(tmp_path / "out", "hf", "k", overwrite=False)
    make(tmp_path / "out", kind="hf")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["manifest.json", "weights"]


KILLED_IN_JSON = """
import os, pathlib, signal, sys
import phinetune.artifact as artifact
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
with artifact.building(pathlib.Path(sys.argv[1]), "hf", "k", {}, resume=True):
    pass
"""


@pytest.mark.parametrize("begun", [False, True])
def test_what_a_kill_left_of_a_json_file_neither_bars_the_folder_nor_ends_up_in_it(begun: bool, tmp_path: Path) -> None:
    if begun:
        interrupted(tmp_path / "out", "k")
    done = subprocess.run([sys.executable, "-c", KILLED_IN_JSON, str(tmp_path / "out")], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert any(name.startswith(".building.json.") for name in names(tmp_path / "out.partial"))
    check_output(tmp_path / "out", "hf", "k", overwrite=True)
    with building(tmp_path / "out", "hf", "k", {}, resume=True):
        pass
    assert names(tmp_path / "out") == (["checkpoint-5"] if begun else []) + ["manifest.json"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_kill_just_before_the_folder_is_put_in_place_is_taken_over(
    resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.artifact._replace", killed)
    monkeypatch.setattr("phinetune.artifact._discard", lambda partial: None)  # as if no line ran after the kill
    with pytest.raises(SystemExit), building(tmp_path / "out", "hf", "k", {}) as partial:
        (partial / "weights").touch()
    monkeypatch.undo()
    assert names(tmp_path / "out.partial") == ["manifest.json", "weights"]
    check_output(tmp_path / "out", "hf", "k", overwrite=False)
    assert "unfinished run" in refusal(tmp_path / "out", "hf", "other").problems[0]
    with building(tmp_path / "out", "hf", "k", {}, resume) as partial:
        (partial / "other").touch()
    assert names(tmp_path / "out") == ["manifest.json", "other", *(["weights"] if resume else [])]


def killed(*args: Any, **options: Any) -> None:
    raise SystemExit


def test_a_kill_while_a_partial_folder_is_removed_leaves_it_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "out", "k")
    (tmp_path / "out.partial" / "weights").touch()
    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(SystemExit), building(tmp_path / "out", "adapter", "other", {}):
        pass
    monkeypatch.undo()
    assert "building.json" in names(tmp_path / "out.partial")
    check_output(tmp_path / "out", "adapter", "other", overwrite=True)


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_get_the_permissions_of_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with building(tmp_path / "out", "adapter", "k", {}) as partial:
            save_file({"w": torch.zeros(2)}, str(partial / "w.safetensors"))
            (partial / "sub").mkdir()
            (partial / "sub" / "a").touch(0o600)
    finally:
        after = os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert len(files) == 3
    assert after == umask


# --- check_output ---


@pytest.mark.parametrize("place", ["new", "deep/er/new", "empty"])
def test_a_new_or_empty_folder_is_accepted_and_nothing_is_made(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / place, "adapter", "k", overwrite=False, needed_bytes=1)
    assert names(tmp_path) == ["empty"]
    assert names(tmp_path / "empty") == []


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_artifact_of_this_kind_is_never_replaced(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    make(tmp_path / "export", kind="onnx")
    for name, text in {
        "file": "is a file, not a folder",
        "folder": "holds files that phinetune did not write; it is left as it is",
        "export": "holds an 'onnx' artifact; it is left as it is",
    }.items():
        assert refusal(tmp_path / name, overwrite=overwrite).problems == [f"{tmp_path / name}: {text}"]


def test_a_folder_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refusal(tmp_path / "file" / "out").problems[0]


def test_the_result_of_another_run_is_replaced_only_if_told_so(tmp_path: Path) -> None:
    make(tmp_path / "out", "k")
    check_output(tmp_path / "out", "adapter", "k", overwrite=False)
    error = refusal(tmp_path / "out", key="other")
    assert "other settings or data" in error.problems[0]
    assert "--overwrite" in error.hint
    check_output(tmp_path / "out", "adapter", "other", overwrite=True)


def test_the_unfinished_run_of_other_settings_is_discarded_only_if_told_so(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "k")
    error = refusal(tmp_path / "out", key="other")
    assert error.problems[0].startswith(f"{tmp_path / 'out.partial'}: holds an unfinished run")
    assert "--overwrite" in error.hint
    check_output(tmp_path / "out", "adapter", "other", overwrite=True)
    assert (tmp_path / "out.partial" / "checkpoint-5").is_dir()


def test_a_manifest_of_another_program_does_not_make_a_folder_ours(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text('{"key": "k", "name": "an extension"}')
    assert "did not write" in refusal(tmp_path / "out", "adapter", "k", overwrite=True).problems[0]
    assert names(partial) == ["manifest.json"]


@pytest.mark.parametrize("building_json", [None, "{}", "{", pytest.param("[]", id="a list")])
def test_somebody_else_s_partial_folder_is_left_alone(building_json: str | None, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "film.mkv").touch()
    if building_json is not None:
        (partial / "building.json").write_text(building_json)
    assert "files that phinetune did not write" in refusal(tmp_path / "out", overwrite=True).problems[0]
    assert (partial / "film.mkv").exists()


def test_somebody_else_s_file_called_partial_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("half a film")
    assert str(tmp_path / "out.partial") in refusal(tmp_path / "out", overwrite=True).problems[0]


@pytest.mark.parametrize("place", [".", "/"])
def test_a_folder_without_a_name_is_checked_like_any_other(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.tex").touch()
    monkeypatch.chdir(tmp_path)
    assert "files that phinetune did not write" in refusal(Path(place)).problems[0]


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    check_output(tmp_path / "link", "adapter", "k", overwrite=False)
    make(tmp_path / "link")
    assert names(tmp_path) == ["elsewhere", "link"]
    assert names(tmp_path / "elsewhere") == ["manifest.json", "weights"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("exists", [True, False])
def test_a_place_that_may_not_be_written_is_refused(exists: bool, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir()
    if exists:
        (tmp_path / "locked" / "out").mkdir()
    (tmp_path / "locked").chmod(0o500)
    error = refusal(tmp_path / "locked" / "out")
    (tmp_path / "locked").chmod(0o700)
    assert error.problems == [f"{tmp_path / 'locked'}: cannot be written"]


def test_a_disk_with_too_little_room_is_refused_with_both_figures(tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    text = refusal(tmp_path / "deep" / "out", needed_bytes=2 * total).problems[0]
    assert "MB free on this disk" in text
    assert f"about {2 * total / 1e6:.0f} MB are needed" in text


# --- a full disk ---


@pytest.fixture
def disk(small_disk: Callable[[str], Path]) -> Path:
    """A real disk of 4 MB that goes with the test."""
    return small_disk("4m")


def many_files(folder: Path) -> None:
    for i in range(10_000):
        (folder / str(i)).write_bytes(b"x" * 1000)


def torch_stream(folder: Path) -> None:
    with (folder / "w.pt").open("wb") as stream:
        torch.save({"w": torch.zeros(1 << 21)}, stream)


FILLERS: dict[str, Callable[[Path], object]] = {
    "write": lambda folder: (folder / "w").write_bytes(bytes(8 << 20)),
    "many files": many_files,
    "safetensors": lambda folder: save_file({"w": torch.zeros(1 << 21)}, str(folder / "w.safetensors")),
    "torch.save": lambda folder: torch.save({"w": torch.zeros(1 << 21)}, folder / "w.pt"),
    "torch.save to a stream": torch_stream,
}


@pytest.mark.parametrize("fill", FILLERS.values(), ids=FILLERS)
def test_a_full_disk_is_said_and_leaves_what_was_there(fill: Callable[[Path], object], disk: Path) -> None:
    make(disk / "out", "old", "old content")
    check_output(disk / "out", "adapter", "new", overwrite=True)
    with pytest.raises(OutputError) as caught, building(disk / "out", "adapter", "new", {}) as partial:
        fill(partial)
    assert caught.value.problems[0].endswith(": the disk is full")
    assert str(disk) in caught.value.problems[0]
    assert names(disk) == ["out"]
    assert (disk / "out" / "weights").read_text() == "old content"
    assert is_finished(disk / "out", "adapter", "old")


def test_a_full_disk_keeps_the_checkpoints_it_has_room_for(disk: Path) -> None:
    interrupted(disk / "out", "k")
    with pytest.raises(OutputError), building(disk / "out", "adapter", "k", {}, resume=True) as partial:
        FILLERS["write"](partial)
    assert (disk / "out.partial" / "checkpoint-5" / "state").read_text() == "k"


def test_a_disk_that_is_full_before_the_work_begins_is_said(disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (disk / "film").write_bytes(bytes(8 << 20))
    with pytest.raises(OutputError, match="the disk is full"):
        make(disk / "out")
    assert names(disk) == ["film"]


def test_a_full_temporary_disk_is_said(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    with pytest.raises(OutputError, match="the disk is full"):
        write_examples(Example([1] * 1000, [1] * 1000, 5, "joy", "f") for _ in range(700))


def test_a_mount_point_is_refused_before_the_work(disk: Path) -> None:
    assert str(disk) in refusal(disk).problems[0]


# --- keys and small files ---


def test_a_key_is_the_hash_of_canonical_json() -> None:
    expected = hashlib.sha256(b'["a",{"b":1,"c":[2.5,null]}]').hexdigest()
    assert content_key("a", {"c": [2.5, None], "b": 1}) == content_key("a", {"b": 1, "c": [2.5, None]}) == expected


def test_whatever_differs_gives_another_key() -> None:
    parts = [(), ("a",), ("a", None), (None, "a"), ("a", {}), (["a"],), (1,), ("1",), ({"a": 1},), ({"b": 1},), (True,)]
    assert len({content_key(*p) for p in parts}) == len(parts)


def test_a_file_hash_is_that_of_the_content_in_order(tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(bytes(3 << 20))
    (tmp_path / "2").write_bytes(b"x")
    assert file_hash(tmp_path / "1", tmp_path / "2") == hashlib.sha256(bytes(3 << 20) + b"x").hexdigest()


@pytest.mark.parametrize("place", ["out", "checkpoint-9/out", "checkpoint-9"])
def test_a_folder_s_size_is_that_of_its_files_without_its_checkpoints(place: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    for name, size in (("a", 10), ("sub/b", 5), ("checkpoint-1/c", 1000)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))
    assert folder_bytes(folder) == 15


@pytest.mark.parametrize("broken", ["\ud800", [[]]])
def test_json_is_written_whole_or_not_at_all(broken: Any, tmp_path: Path) -> None:
    if isinstance(broken, list):
        broken[0].append(broken)  # a circle
    write_json(tmp_path / "a.json", {"é": Path("x"), "n": 1})
    before = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(before) == {"é": "x", "n": 1}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"text": broken})
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == before
