"""Search spaces: what is one, which values it has, and that filling and combining them loses and invents nothing."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.workflow.spaces import (
    MOST,
    Space,
    combinations,
    fill,
    find_spaces,
    is_space,
    read_space,
    why_not_exhaustive,
)

# --- what is a space ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"choices": [1]}, True),
        ({"choices": 3}, True),
        ({"low": 1, "high": 2}, True),
        ({"low": 1, "high": 2, "log": True, "step": 1}, True),
        ({"low": 1}, False),
        ({"high": 1}, False),
        ({"low": 1, "high": 2, "max": 3}, False),
        ({"choices": [1], "low": 1}, False),
        ({}, False),
        ([1, 2], False),
        ("choices", False),
        (None, False),
    ],
)
def test_a_space_is_a_dictionary_with_exactly_its_keys(value: Any, expected: bool) -> None:
    assert is_space(value) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"choices": []}, "choices must be a list of values (found: [])"),
        ({"choices": "abc"}, "choices must be a list of values (found: 'abc')"),
        ({"choices": [1, 2, 1]}, "choices: a value is given twice (found: [1, 2, 1])"),
        ({"choices": [[1], [1]]}, "choices: a value is given twice"),
        ({"choices": [{"choices": [1, 2]}, 3]}, "choices: a space within a space"),
        ({"choices": [[{"low": 1, "high": 2}], 3]}, "choices: a space within a space"),
        ({"low": "1", "high": 2}, "low, high and step must be numbers"),
        ({"low": True, "high": 2}, "low, high and step must be numbers"),
        ({"low": None, "high": 2}, "low, high and step must be numbers"),
        ({"low": 1, "high": float("inf")}, "low, high and step must be numbers"),
        ({"low": float("nan"), "high": 1}, "low, high and step must be numbers"),
        ({"low": 1, "high": 10**400}, "low, high and step must be numbers"),
        ({"low": 2, "high": 1}, "low must be below high (found: 2, 1)"),
        ({"low": 2, "high": 2}, "low must be below high"),
        ({"low": 1, "high": 2, "step": 0}, "step must be above 0"),
        ({"low": 1, "high": 2, "step": -1}, "step must be above 0"),
        ({"low": 1, "high": 2, "step": 3}, "step must be at most high - low"),
        ({"low": 1, "high": 2, "log": "yes"}, "log must be true or false (found: 'yes')"),
        ({"low": 0, "high": 2, "log": True}, "log needs low above 0 and no step"),
        ({"low": 1, "high": 4, "log": True, "step": 1}, "log needs low above 0 and no step"),
    ],
)
def test_a_space_that_cannot_be_is_refused_with_the_reason(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_space(value, "p")
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    ("value", "integer", "grid"),
    [
        ({"choices": ["a", None, False, 0.5]}, False, ["a", None, False, 0.5]),
        ({"low": 4, "high": 16, "step": 4}, True, [4, 8, 12, 16]),
        ({"low": 4, "high": 15, "step": 4}, True, [4, 8, 12]),
        ({"low": 4, "high": 12, "step": 4.0}, True, [4, 8, 12]),
        ({"low": 1, "high": 3}, True, [1, 2, 3]),
        ({"low": 1, "high": 3, "log": True}, True, [1, 2, 3]),
        ({"low": 1, "high": 2, "step": 0.5}, False, [1, 1.5, 2]),
        ({"low": 0.0, "high": 0.3, "step": 0.1}, False, [0, 0.1, 0.2, 0.3]),
        ({"low": 1e-5, "high": 1e-3, "log": True}, False, None),
        ({"low": 0, "high": 1.0}, False, None),
    ],
)
def test_a_space_has_the_values_that_it_says(value: dict[str, Any], integer: bool, grid: list[Any] | None) -> None:
    space = read_space(value, "p")
    assert space.is_integer == integer
    assert space.grid() == grid or space.grid() == pytest.approx(grid)
    assert space.count == (None if grid is None else len(grid))
    if integer:
        assert all(type(v) is int for v in space.grid() or ())
    ends = [value["low"], value["high"]] if grid is None else grid if space.choices else [grid[0], grid[-1]]
    assert space.examples() == ends or space.examples() == pytest.approx(ends)


@given(st.integers(-1000, 1000), st.integers(1, 1000), st.one_of(st.none(), st.integers(1, 50), st.floats(0.01, 1)))
def test_a_grid_lies_within_its_range_and_grows(low: int, width: int, step: float | None) -> None:
    if step is not None and step > width:
        return
    space = read_space({"low": low, "high": low + width, **({"step": step} if step is not None else {})}, "p")
    grid = space.grid()
    assert grid is not None and len(grid) == space.count
    assert grid[0] == low and all(low <= v <= low + width for v in grid)
    assert all(a < b for a, b in itertools.pairwise(grid))
    assert low + width - grid[-1] < (step or 1) * (1 + 1e-6)
    assert space.examples() == [grid[0], grid[-1]]


def test_a_range_of_a_billion_values_is_counted_without_making_them() -> None:
    spaces = [read_space({"low": 1, "high": 10**9}, "a"), read_space({"low": 1, "high": 10**12, "step": 7}, "b")]
    assert spaces[0].count == 10**9
    with pytest.raises(ValueError, match="combinations cannot be searched exhaustively; use sampler: tpe"):
        next(combinations(spaces))


# --- in a pass's keys ---

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(-1, 1), st.text(max_size=3))
CHOICES = st.lists(st.integers(0, 9) | st.text(max_size=2), min_size=1, max_size=3, unique=True)
SPACES = st.one_of(CHOICES.map(lambda c: {"choices": c}), st.integers(0, 5).map(lambda n: {"low": n, "high": n + 2}))
NAMES = st.sampled_from(["a", "b", "c", "data"])
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        LEAVES | SPACES,
        lambda inner: st.dictionaries(NAMES, inner, max_size=3) | st.lists(inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


def at(values: Any, path: str) -> Any:
    """What stands at `path`."""
    for part in path.replace("[", ".[").split(".")[1:]:
        values = values[int(part[1:-1])] if part.startswith("[") else values[part]
    return values


def without(values: Any) -> Any:
    """`values` with a mark in place of each space."""
    if is_space(values):
        return "SPACE"
    if isinstance(values, dict):
        return {k: without(v) for k, v in values.items()}
    return [without(v) for v in values] if isinstance(values, list) else values


@given(TREES)
def test_filling_puts_one_value_in_place_of_each_space_and_leaves_the_rest(tree: dict[str, Any]) -> None:
    before, problems = copy.deepcopy(tree), list[str]()
    spaces = find_spaces(tree, "p", problems)
    assert not problems
    assert len({s.path for s in spaces}) == len(spaces) == str(without(tree)).count("'SPACE'")
    for space in spaces:
        assert is_space(at(tree, space.path))
        assert read_space(at(tree, space.path), space.path) == space
    chosen = {space.path: space.examples()[-1] for space in spaces}
    filled = fill(tree, "p", chosen)
    assert tree == before
    assert not find_spaces(filled, "p", problems)
    for path, value in chosen.items():
        assert at(filled, path) == value
    assert fill(filled, "p", {}) == filled  # a second time changes nothing
    with_marks = fill(tree, "p", {s.path: "SPACE" for s in spaces})
    assert with_marks == without(tree)


@given(TREES)
def test_combinations_are_every_way_to_choose_once(tree: dict[str, Any]) -> None:
    spaces = find_spaces(tree, "p", [])[:4]
    found = list(combinations(spaces))
    count = 1
    for space in spaces:
        count *= space.count or 0
    assert len(found) == count == len({tuple(c.items()) for c in found})
    assert all(set(c) == {s.path for s in spaces} for c in found)
    assert all(c[s.path] in (s.grid() or ()) for c in found for s in spaces)


def test_filled_values_are_copies() -> None:
    inner = {"q": 1}
    chosen = {"p.a": inner}
    filled = fill({"a": {"choices": [inner]}}, "p", chosen)
    filled["a"]["q"] = 2
    assert inner == {"q": 1}


def test_a_space_that_nobody_chose_for_is_an_error_not_a_value() -> None:
    with pytest.raises(KeyError):
        fill({"a": {"choices": [1]}}, "p", {})


def test_every_wrong_space_is_named_by_its_path() -> None:
    problems: list[str] = []
    values = {
        "r": {"choices": []},
        "group": {"x": {"low": 2, "high": 1}},
        "list": [1, {"choices": 5}],
        "good": {"choices": [1]},
    }
    assert [s.path for s in find_spaces(values, "passes.lora", problems)] == ["passes.lora.good"]
    assert [p.split(": ")[0] for p in problems] == ["passes.lora.r", "passes.lora.group.x", "passes.lora.list[1]"]


def test_what_cannot_be_searched_exhaustively_says_why() -> None:
    choices = Space("p.c", tuple(range(100)))
    assert why_not_exhaustive([choices]) == ""
    assert why_not_exhaustive([]) == ""
    assert "p.x: a range without a step" in why_not_exhaustive([choices, Space("p.x", (), 0.0, 1.0)])
    assert f"{100**3} combinations" in why_not_exhaustive([choices] * 3)
    assert MOST < 100**3
    assert list(combinations([])) == [{}]
