"""Folding factors into a weight: compiled and by torch's operators, whole and by blocks, in memory and from file to file."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.lora import fold
from phinetune.lora.fold import Folder
from phinetune.lora.shards import bytes_of

BUILT = pytest.mark.skipif(fold.library() is None, reason="no compiler when phinetune was installed")
BY_FILE = pytest.mark.skipif(not hasattr(fold.library(), "fold_file"), reason="not built, or not for this system")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, float(expected.double().abs().max()))
    limit = 5e-6 if dtype == torch.float32 else 8e-3  # bfloat16 keeps 8 bits
    assert float((found.double() - expected.double()).abs().max()) <= limit * scale


@BUILT
@BOTH
@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 300), width=st.integers(1, 2300), r=st.integers(1, 70), seed=st.integers(0, 99))
def test_folding_factors_into_a_weight(dtype: torch.dtype, rows: int, width: int, r: int, seed: int) -> None:
    W, A, B = numbers(rows, width, dtype=dtype, seed=seed), numbers(r, width), numbers(rows, r, seed=seed + 1)
    ours, theirs = (Folder((rows, width), dtype, A, B, 0.01) for _ in range(2))
    assert ours.packed is not None
    found, expected = W.clone(), W.clone()
    assert ours.fold(found, 0, rows) and theirs.fold_reference(expected, 0, rows)
    close(found, expected, dtype)
    close(found, W.double() + 0.01 * B.double() @ A.double(), dtype)
    assert ours.surviving == pytest.approx(theirs.surviving, rel=1e-3)


@BUILT
@BOTH
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("all_ones", [0x7FFFFFFF, 0x7F800000, 0xFFC00000 - (1 << 32)], ids=["nan", "inf", "-nan"])
@pytest.mark.parametrize("where", ["A", "B", "W", "sum"])
def test_folding_tells_what_is_not_finite(dtype: torch.dtype, compiled: bool, all_ones: int, where: str) -> None:
    broken = torch.tensor([all_ones], dtype=torch.int32).view(torch.float32)[0]
    parts = {"A": torch.randn(5, 40), "B": torch.randn(30, 5), "W": torch.randn(30, 40).to(dtype)}
    if where == "sum":
        parts["W"][7, 3] = torch.finfo(dtype).max
        parts["A"][:, 3], parts["B"][7] = 1e19, 1e19
    else:
        parts[where][2, 3] = broken
    folder, W = Folder((30, 40), dtype, parts["A"], parts["B"], 1.0), parts["W"]
    assert (folder.fold if compiled else folder.fold_reference)(W, 0, 30) is False
    assert not W.isfinite().all()
    assert W.isfinite().sum() >= 29 * 39


def test_a_large_rank_is_folded_by_torch() -> None:
    for r, compiled in ((1024, fold.library() is not None), (1025, False)):
        A, B, W = torch.randn(r, 20) * 0.1, torch.randn(9, r) * 0.1, torch.randn(9, 20)
        folder, found = Folder((9, 20), torch.float32, A, B, 0.5), W.clone()
        assert (folder.packed is not None) is compiled and folder.fold(found, 0, 9)
        close(found, W.double() + 0.5 * B.double() @ A.double(), torch.float32)


@BUILT
@BOTH
@settings(deadline=None, max_examples=40)
@given(data=st.data(), rows=st.integers(1, 60), width=st.integers(1, 700), r=st.integers(1, 40))
def test_a_weight_folded_by_any_blocks_is_the_same(
    dtype: torch.dtype, data: Any, rows: int, width: int, r: int
) -> None:
    W, A, B = numbers(rows, width, dtype=dtype), numbers(r, width, seed=1), numbers(rows, r, seed=2)
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=5))})
    folder, whole, parts = Folder((rows, width), dtype, A, B, 0.3), W.clone(), W.clone()
    folder.fold(whole, 0, rows)
    for start, stop in itertools.pairwise(cuts):
        assert folder.fold(parts[start:stop], start, stop)
    assert torch.equal(parts, whole)


def test_blocks_cover_every_row_once() -> None:
    for rows, columns in [(1, 1), (7, 3), (100, 3072), (3072, 8192), (5, 1 << 20), (0, 4), (4, 0)]:
        blocks = list(Folder((rows, columns), torch.float32, torch.ones(1, columns), torch.ones(rows, 1), 1.0).blocks())
        assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))


def in_files(folder: Path, W: torch.Tensor, start: int, to: int) -> tuple[int, int, Path]:
    """(file with W from byte `start` on, open; one to write into, open; its path)."""
    (folder / "from").write_bytes(b"\1" * start + bytes(bytes_of(W)))
    (folder / "to").write_bytes(b"\2" * (to + W.nbytes + 5))
    return os.open(folder / "from", os.O_RDONLY), os.open(folder / "to", os.O_RDWR), folder / "to"


@BY_FILE
@BOTH
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (300, 576), (129, 3072), (2, 200_000)], ids=str)
def test_from_file_to_file_it_is_the_same_as_by_blocks(
    dtype: torch.dtype, shape: tuple[int, int], tmp_path: Path
) -> None:
    W, A, B = numbers(*shape, dtype=dtype), numbers(6, shape[1], seed=1), numbers(shape[0], 6, seed=2)
    source, target, file = in_files(tmp_path, W, 10, 22)
    whole, blocks = (Folder(shape, dtype, A, B, 0.3) for _ in range(2))
    assert whole.fold_file(source, 10, target, 22) is True
    expected = W.clone()
    assert all(blocks.fold(expected[a:b], a, b) for a, b in blocks.blocks())
    assert file.read_bytes() == b"\2" * 22 + bytes(bytes_of(expected)) + b"\2" * 5
    assert whole.surviving == blocks.surviving
    os.close(source), os.close(target)


@BY_FILE
def test_files_that_fail_are_told_apart(tmp_path: Path) -> None:
    W, A, B = numbers(400, 900), numbers(2, 900), numbers(400, 2)
    source, target, _ = in_files(tmp_path, W, 0, 0)
    folder = Folder((400, 900), torch.float32, A, B, 1.0)
    with pytest.raises(EOFError):
        folder.fold_file(source, 4, target, 0)
    for files in ((source, source), (target, 1 << 20), (1 << 20, target)):
        with pytest.raises(OSError) as caught:
            folder.fold_file(files[0], 0, files[1], 0)
        assert caught.value.errno == errno.EBADF and caught.value.strerror
    B[399, 1] = torch.inf
    assert Folder((400, 900), torch.float32, A, B, 1.0).fold_file(source, 0, target, 0) is False
    os.close(source), os.close(target)


@pytest.mark.parametrize("case", ["dora", "float64", "deep"])
def test_what_is_not_compiled_is_left_to_blocks(case: str) -> None:
    r = 1025 if case == "deep" else 2
    magnitude = torch.ones(4) if case == "dora" else None
    dtype = torch.float64 if case == "float64" else torch.float32
    assert Folder((4, 8), dtype, numbers(r, 8), numbers(4, r), 1.0, magnitude).fold_file(0, 0, 1, 0) is None
