"""The grid's laws: codes, scales and zero points are ONNX Runtime's own, packed is unpacked, the fast rounding is the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.errors import ConfigError
from phinetune.model.grid import Codes, Grid, encode, join, quantize, read_grid, round_to_grid, unpack

GRIDS = st.builds(Grid, st.sampled_from([4, 8]), st.sampled_from(Grid.sizes), st.booleans())
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def weights(rows: int, blocks: int, grid: Grid, seed: int, kind: str = "normal") -> torch.Tensor:
    torch.manual_seed(seed)
    w = torch.randn(rows, blocks * grid.block_size)
    if kind == "one-sided":
        w = w.abs()
    elif kind == "zeros":
        w[:, : grid.block_size] = 0
    elif kind == "ties":  # many exact halves between codes
        w = torch.randint(-32, 33, w.shape).float() / 4
    return w


def runtimes_own(w: torch.Tensor, grid: Grid) -> tuple[Any, Any, Any]:
    """(B, scales, zero points) by ONNX Runtime's kernels."""
    state = pytest.importorskip("onnxruntime.capi._pybind_state")
    out, inputs = w.shape
    blocks = inputs // grid.block_size
    packed = np.zeros((out, blocks, grid.block_size * grid.bits // 8), np.uint8)
    scales = np.zeros((out, blocks), np.float32)
    zeros = np.zeros((out, (blocks * grid.bits + 7) // 8), np.uint8)
    kernel = state.quantize_matmul_4bits if grid.bits == 4 else state.quantize_matmul_8bits
    kernel(packed, np.ascontiguousarray(w.t().numpy()), scales, zeros, grid.block_size, out, inputs, grid.symmetric)
    return packed, scales, zeros


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 5), GRIDS, st.integers(0, 9),
    st.sampled_from(["normal", "one-sided", "zeros", "ties"]), DTYPES,
)  # fmt: skip
def test_codes_scales_and_zero_points_are_the_runtimes(
    rows: int, blocks: int, grid: Grid, seed: int, kind: str, dtype: torch.dtype
) -> None:
    w = weights(rows, blocks, grid, seed, kind).to(dtype).float()
    packed, scales, zeros = runtimes_own(w, grid)
    codes = quantize(w, grid)
    ours, our_zeros = codes.packed()
    np.testing.assert_array_equal(codes.scales.numpy(), scales)
    np.testing.assert_array_equal(ours.numpy(), packed)
    if grid.symmetric:
        assert our_zeros is None
    else:
        assert our_zeros is not None
        np.testing.assert_array_equal(our_zeros.numpy(), zeros)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), GRIDS, st.integers(0, 9))
def test_unpacking_undoes_packing(rows: int, blocks: int, grid: Grid, seed: int) -> None:
    codes = quantize(weights(rows, blocks, grid, seed), grid)
    stored, zeros = codes.packed()
    again = unpack(grid, stored, codes.scales, zeros)
    assert torch.equal(again.codes, codes.codes) and torch.equal(again.dense(), codes.dense())
    assert (again.zeros is None) == grid.symmetric


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 9),
    GRIDS,
    st.integers(0, 9),
    DTYPES,
    st.sampled_from(["normal", "zeros", "ties"]),
)
def test_rounding_equals_the_reference_bit_for_bit(
    rows: int, blocks: int, grid: Grid, seed: int, dtype: torch.dtype, kind: str
) -> None:
    w = weights(rows, blocks, grid, seed, kind).to(dtype)
    expected = quantize(w, grid).dense(dtype)
    assert torch.equal(round_to_grid(w, grid), expected)
    assert torch.equal(round_to_grid(w, grid, w), expected) and torch.equal(w, expected)  # in place


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_on_the_grid_stays_where_it_is(bits: Any, symmetric: bool) -> None:
    grid = Grid(bits, 32, symmetric)
    codes = quantize(weights(40, 6, grid, 1), grid)
    again = encode(codes.dense(), grid, codes.scales, codes.zeros)
    assert torch.equal(again.codes, codes.codes)
    assert float((codes.dense() - weights(40, 6, grid, 1)).abs().max()) <= float(codes.scales.abs().max()) * 1.01


def test_rows_are_independent() -> None:
    grid = Grid(4, 16, False)
    w = weights(12, 3, grid, 0)
    parts = [quantize(w[:5], grid), quantize(w[5:], grid)]
    whole = join(parts)
    assert torch.equal(whole.dense(), quantize(w, grid).dense())
    assert torch.equal(whole[5:].dense(), parts[1].dense()) and isinstance(whole[5:], Codes)


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="blocks of 32 do not divide its 40 inputs"):
        quantize(torch.randn(4, 40), Grid())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (False, None),
        (True, Grid()),
        ({"block_size": 64}, Grid(4, 64)),
        ({"symmetric": False}, Grid(symmetric=False)),
    ],
)
def test_reading(value: Any, expected: Grid | None) -> None:
    assert read_grid(value, "here") == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"blok_size": 32}, 'here.blok_size: unknown key, did you mean "block_size"'),
        ({"block_size": 48}, "here.block_size: must be one of 16, 32"),
        ({"bits": True}, "here.bits: must be one of 4, 8"),
        ({"symmetric": 1}, "here.symmetric: must be one of true, false"),
        ("yes", "here: must be true, false"),
    ],
)
def test_reading_what_is_no_grid(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_grid(value, "here")
