"""`phinetune cache`: what it lists is there, what it removes is gone, and nothing is removed by mistake."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from phinetune.artifact import building, write_json
from phinetune.cli.app import main
from phinetune.cli.workflow_files import parse_size
from phinetune.errors import ConfigError
from phinetune.workflow.store import Store

KEYS = ("aa11" * 16, "aa22" * 16, "bb33" * 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three artifacts of 1, 2 and 3 MB, the largest used last; and an unfinished one."""
    store = Store(tmp_path / "cache")
    for number, key in enumerate(KEYS, 1):
        with building(store.artifact(key), "adapter", key, {"stage": "finetune"}) as partial:
            (partial / "weights.bin").write_bytes(b"x" * (number * 10**6))
        store.record(key, {"pass": "LoRA"})
        entry = store.folder / "entries" / f"{key[:32]}.json"
        write_json(entry, {**json.loads(entry.read_text()), "used": 1.7e9 + number})
    unfinished = store.folder / "artifacts" / f"{'cc44' * 8}.partial"
    unfinished.mkdir()
    write_json(unfinished / "building.json", {"kind": "hf", "key": "cc44" * 16})
    os.utime(unfinished, (1.6e9, 1.6e9))
    return store.folder


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["cache", *args])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_ls_shows_every_artifact_and_the_sum(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "ls", "--cache-dir", str(folder))
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["key", "pass", "kind", "size", "last", "used", "state"]
    assert [line.split()[0] for line in lines[1:5]] == ["bb33bb33bb33", "aa22aa22aa22", "aa11aa11aa11", "cc44cc44cc44"]
    assert "3.0 MB" in lines[1] and "LoRA" in lines[1] and "finished" in lines[1] and "unfinished" in lines[4]
    assert lines[5].startswith("4 artifacts, 6.0 MB") and str(folder) in lines[5]


def test_ls_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "ls", "--cache-dir", str(folder), "--json")
    found = json.loads(out)
    assert code == 0 and len(found["artifacts"]) == 4 and found["folder"] == str(folder)
    assert found["size_bytes"] == sum(a["size_bytes"] for a in found["artifacts"]) > 6e6
    assert {a["finished"] for a in found["artifacts"]} == {True, False}


def test_rm_removes_what_is_named_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "rm", "aa11", "cc", "--cache-dir", str(folder))
    assert code == 0 and "2 artifacts, 1.0 MB, removed from" in out
    assert {p.name[:4] for p in (folder / "artifacts").iterdir() if not p.name.startswith(".")} == {"aa22", "bb33"}
    code, out, err = call(capsys, "rm", "aa22", "zz", "--cache-dir", str(folder))
    assert code == 2 and "zz" in err and "Traceback" not in err
    assert Store(folder).has(KEYS[1])  # of several names, one wrong: none is removed


def test_rm_of_a_beginning_that_fits_several_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "rm", "aa", "--cache-dir", str(folder))
    assert code == 2 and "2 artifacts begin with it" in err and Store(folder).has(KEYS[0])


def test_gc_keeps_what_was_used_last(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "gc", "--max-size", "5.5MB", "--cache-dir", str(folder), "--json")
    removed = {a["key"][:4] for a in json.loads(out)["artifacts"]}
    assert code == 0 and removed == {"aa11", "cc44"}
    code, out, _ = call(capsys, "gc", "--max-size", "1 GB", "--cache-dir", str(folder))
    assert code == 0 and "0 artifacts" in out and Store(folder).has(KEYS[1]) and Store(folder).has(KEYS[2])
    assert call(capsys, "gc", "--max-size", "0", "--cache-dir", str(folder))[0] == 0
    assert not Store(folder).entries()


def test_nothing_is_removed_while_a_run_uses_the_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store(folder).in_use():
        code, _, err = call(capsys, "gc", "--max-size", "0", "--cache-dir", str(folder))
    assert code == 2 and "a run is using this cache" in err and Store(folder).has(KEYS[0])


def test_a_folder_that_is_no_cache_is_refused_and_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "ls", "--cache-dir", str(tmp_path / "typo"))
    assert code == 2 and "holds no cache" in err and not (tmp_path / "typo").exists()


def test_without_a_folder_it_is_the_cache_of_the_workflows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path))
    code, out, _ = call(capsys, "ls")
    assert code == 0 and "0 artifacts, 0.0 MB, kept in" in out and str(tmp_path) in out.replace("\n", "")


def test_sizes_have_units() -> None:
    texts = {"10GB": 10**10, "500 MB": 5 * 10**8, "1.5GiB": 3 << 29, "1kib": 1024, "4096": 4096, " 7 b ": 7, "0": 0}
    assert {text: parse_size(text, "--max-size") for text in texts} == texts
    for wrong in ("", "GB", "-1GB", "10 XB", "1,5GB", "ten"):
        with pytest.raises(ConfigError, match="--max-size: not a size"):
            parse_size(wrong, "--max-size")
