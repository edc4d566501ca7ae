"""Constraints, objectives, ranks and fronts: every text means one number, and the best model obeys the laws of being best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.errors import ConfigError
from phinetune.workflow.goals import Constraint, Goals, Objective, parse_goals
from phinetune.workflow.outcome import RunResult, StepResult, TrialResult

KNOWN = [
    "exact_match",
    "size",
    "memory",
    "latency_p50",
    "time_to_first_token_avg",
    "throughput_avg",
    "perplexity",
    "loss",
]
NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 6))


def one(text: str) -> Constraint:
    return parse_goals([text], [], KNOWN).constraints[0]


def problems(constraints: list[str], objectives: list[str] = []) -> list[str]:  # noqa: B006
    with pytest.raises(ConfigError) as caught:
        parse_goals(constraints, objectives, KNOWN)
    return caught.value.problems


# --- what texts say ---


@pytest.mark.parametrize(
    ("text", "base", "limit"),
    [
        ("exact_match >= 0.92", 0, 0.92),
        ("exact_match>=.92", 0, 0.92),
        ("exact_match >= 92 %", 0, 0.92),
        ("exact_match >= base", 0.5, 0.5),
        ("exact_match >= base - 0.01", 0.5, 0.49),
        ("exact_match >= base+-0.01", 0.5, 0.49),
        ("exact_match >= base - 5 %", 0.8, 0.76),
        ("exact_match >= base + 0.05", 0.5, 0.55),
        ("exact_match >= base * 1.1", 0.5, 0.55),
        ("latency_p50 <= base * 80 %", 50, 40),
        ("latency_p50 <= base*0.8", 50, 40),
        ("latency_p50 <= 40 ms", 0, 40),
        ("latency_p50 <= 0.04 s", 0, 40),
        ("time_to_first_token_avg <= 1e-1s", 0, 100),
        ("latency_p50 <= base + 0.01 s", 50, 60),
        ("size <= 90 MB", 0, 90e6),
        ("size <= 90 mb", 0, 90e6),
        ("size <= 1.5 GiB", 0, 1.5 * 2**30),
        ("memory <= 90", 0, 90),
        ("size <= base - 5 KB", 9000, 4000),
        ("perplexity <= base + 5 %", 20, 21),
        ("loss <= base + 10 %", -2, -1.8),
        ("throughput_avg >= -1", 0, -1),
    ],
)
def test_a_constraint_is_a_number_in_the_metrics_own_unit(text: str, base: float, limit: float) -> None:
    constraint = one(text)
    assert constraint.limit({constraint.metric: base}) == pytest.approx(limit, rel=1e-12)
    assert constraint.at_least == (">" in text)
    assert Goals((constraint,)).relative == ("base" in text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "exact_match",
            "exact_match 0.9",
            "exact_match >= ",
            "exact_match == 0.9",
            "exact_match >= a",
            "0.9 <= exact_match",
        ),
        *(
            "exact_match >= base 0.1",
            "exact_match >= base -",
            "exact_match >= base / 2",
            "exact_match >= %",
            "exact_match => 0.9",
        ),
        *(
            "exact_match >= 0.9 0.8",
            "exact_match >= base - base",
            "exact_match >= nan",
            "exact_match >= inf",
            "exact_match >= 1,5",
        ),
    ],
)
def test_what_is_no_constraint_is_named(text: str) -> None:
    (problem,) = problems([text])
    assert problem.startswith(f"constraints[0]: not a constraint: {text!r}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("exact_mtch >= 0.9", "no metric is called 'exact_mtch', did you mean \"exact_match\"?"),
        ("exact_match >= 9 MB", "exact_match is not counted in MB"),
        ("size <= 9 ms", "size is not counted in ms"),
        ("latency_p50 <= 9 MB", "latency_p50 is not counted in MB"),
        ("throughput_avg >= 9 s", "throughput_avg is not counted in s"),
        ("size <= 9 furlongs", "size is not counted in furlongs"),
        ("size <= base * 2 MB", "size is not counted in MB"),
        ("size <= 80 %", "size is no share"),
        ("perplexity <= 5 %", "perplexity is no share"),
        ("latency_p50 <= 80%", "latency_p50 is no share"),
        ("exact_match >= 1e999", "1e999 is too large"),
    ],
)
def test_a_constraint_that_can_mean_nothing_is_refused_with_the_reason(text: str, reason: str) -> None:
    (problem,) = problems([text])
    assert problem.startswith(f"constraints[0]: {reason}")


@pytest.mark.parametrize("text", ["min", "exact_match", "min exact_match size", "Min size", "best size", "max  "])
def test_an_objective_needs_a_direction_and_a_metric(text: str) -> None:
    (problem,) = problems([], [text])
    assert problem == f"objectives[0]: not an objective: {text!r}"


def test_all_goals_that_are_wrong_are_named_at_once() -> None:
    found = problems(["exact_match", "siz <= 1"], ["min zzz", "up size", "min loss", "max loss"])
    assert [p.split(":")[0] for p in found] == [
        *("constraints[0]", "constraints[1]", "objectives[0]", "objectives[1]", "objectives"),
    ]
    assert found[-1] == "objectives: loss is given twice"


def test_objectives_keep_their_order_and_direction() -> None:
    goals = parse_goals(["size <= 1"], ["min loss", "maximize exact_match", "minimize size"], KNOWN)
    assert [(o.metric, o.minimize) for o in goals.objectives] == [
        ("loss", True),
        ("exact_match", False),
        ("size", True),
    ]
    assert goals.metrics == ["size", "loss", "exact_match"]
    assert not goals.relative


@given(
    st.sampled_from(["exact_match", "perplexity"]),
    st.sampled_from([">=", "<=", ">", "<"]),
    st.sampled_from(["", "base + ", "base - ", "base * "]),
    NUMBERS.map(abs),
    st.sampled_from(["", " "]),
    NUMBERS,
)
def test_a_printed_constraint_is_read_as_what_was_meant(
    metric: str, relation: str, base: str, number: float, space: str, start: float
) -> None:
    text = f"{space}{metric}{space}{relation}{space}{base}{space}{number!r}{space}"
    constraint = one(text)
    meant = {"": number, "base + ": start + number, "base - ": start - number, "base * ": start * number}[base]
    assert constraint.limit({metric: start}) == meant
    assert (constraint.at_least, constraint.strict) == (relation[0] == ">", len(relation) == 1)
    assert one(constraint.text) == constraint


@given(st.text(max_size=30))
def test_no_text_is_more_than_refused(text: str) -> None:
    for goals in (([text], []), ([], [text]), ([f"exact_match >= {text}"], [])):
        try:
            parse_goals(*goals, KNOWN)
        except ConfigError as error:
            assert all(problem and "\n" not in problem.replace(text, "") for problem in error.problems)


# --- what holds ---


@given(NUMBERS, NUMBERS, st.sampled_from([">=", "<=", ">", "<"]))
def test_a_constraint_is_missed_by_the_distance_to_its_limit(value: float, limit: float, relation: str) -> None:
    constraint = one(f"loss {relation} {limit!r}")
    short = constraint.shortfall({"loss": value}, {})
    if abs(value - limit) > 1e-9 * abs(limit):
        holds = value > limit if relation[0] == ">" else value < limit
        assert (short <= 0) == holds
        assert abs(short) == pytest.approx(abs(value - limit))
    else:
        assert (short > 0) == (len(relation) == 1)
    missed = Goals((constraint,)).missed({"loss": value}, {})
    assert missed == ({constraint.text: short} if short > 0 else {})


def test_the_limit_itself_does_for_at_least_and_not_for_more_than() -> None:
    for text, holds in (("exact_match >= base", True), ("exact_match > base", False), ("exact_match < 0.9", False)):
        assert (not Goals((one(text),)).missed({"exact_match": 0.9}, {"exact_match": 0.9})) == holds
    assert Goals((one("loss < 0"),)).missed({"loss": 0.0}, {})


def test_binary_fractions_do_not_miss_a_limit_that_decimal_ones_meet() -> None:
    assert 0.8 - 0.1 > 0.7
    assert not Goals((one("exact_match >= base - 0.1"),)).missed({"exact_match": 0.7}, {"exact_match": 0.8})


@pytest.mark.parametrize("text", ["loss <= 5", "loss >= -5", "loss <= base", "loss < base * 2"])
def test_what_is_not_a_number_holds_nowhere(text: str) -> None:
    constraint = one(text)
    assert constraint.shortfall({"loss": math.nan}, {"loss": 1.0}) == math.inf
    if constraint.base:
        assert constraint.shortfall({"loss": 1.0}, {"loss": math.nan}) == math.inf


def test_a_relative_constraint_needs_the_models_that_went_in() -> None:
    with pytest.raises(KeyError):
        one("loss <= base").limit({})


# --- which is best ---

VALUES = st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan])
MODELS = st.dictionaries(
    st.sampled_from("abcdefgh"), st.fixed_dictionaries({"loss": VALUES, "size": VALUES, "exact_match": VALUES})
)
OBJECTIVES = st.permutations(["min loss", "min size", "max exact_match"]).flatmap(
    lambda several: st.integers(0, 3).map(lambda count: list(several[:count]))
)


def better_somewhere(a: dict[str, float], b: dict[str, float], objectives: tuple[Objective, ...]) -> tuple[bool, bool]:
    """(a is better than b in some objective, a is worse in some), what is not a number being worst."""
    better = worse = False
    for o in objectives:
        x, y = (math.inf if math.isnan(v[o.metric]) else v[o.metric] * (1 if o.minimize else -1) for v in (a, b))
        better, worse = better or x < y, worse or x > y
    return better, worse


@given(MODELS, OBJECTIVES)
def test_the_front_is_what_brute_force_finds(models: dict[str, dict[str, float]], objectives: list[str]) -> None:
    goals = parse_goals([], objectives, KNOWN)
    expected = [
        name
        for name, values in models.items()
        if not any(better_somewhere(other, values, goals.objectives) == (True, False) for other in models.values())
    ]
    assert goals.front(models) == expected
    if models:
        best = min(models, key=lambda name: goals.rank(models[name]))
        assert best in expected  # the best by order of importance is on the front


def step(tmp: str = "x") -> StepResult:
    return StepResult("p", "P", "k", "", "hf", Path(tmp), 1.0, False)


TRIALS = st.lists(
    st.tuples(st.fixed_dictionaries({"loss": VALUES, "size": VALUES, "exact_match": VALUES}), st.booleans()), max_size=8
)
GOALS = OBJECTIVES.map(lambda texts: parse_goals(["size <= 1.5"], texts, KNOWN))


def result(goals: Goals, rows: list[tuple[dict[str, float], bool]]) -> RunResult:
    trials = [
        TrialResult(
            i,
            {},
            (step(),),
            {} if failed else values,
            {} if failed else goals.missed(values, {}),
            "x" if failed else "",
            1.0,
        )
        for i, (values, failed) in enumerate(rows)
    ]
    return RunResult(goals, {}, tuple(trials))


@settings(max_examples=200)
@given(
    GOALS,
    TRIALS,
    st.tuples(st.fixed_dictionaries({"loss": VALUES, "size": st.just(2.0), "exact_match": VALUES}), st.booleans()),
)
def test_the_best_trial_is_feasible_if_any_is_and_an_infeasible_one_never_changes_it(
    goals: Goals, rows: list[tuple[dict[str, float], bool]], bad: tuple[dict[str, float], bool]
) -> None:
    found = result(goals, rows)
    feasible = [t for t in found.trials if t.feasible]
    assert (found.best is not None) == bool(feasible)
    assert all(not t.error and t.values["size"] <= 1.5 for t in feasible)
    if found.best:
        assert found.best in feasible and found.best in found.front
        ranks = [goals.rank(t.values) for t in feasible]
        assert goals.rank(found.best.values) == min(ranks)
        assert found.best.number == min(t.number for t in feasible if goals.rank(t.values) == min(ranks))
    more = result(goals, [*rows, bad])
    assert more.best == found.best
    assert more.front == found.front


@given(GOALS, TRIALS.filter(bool))
def test_when_nothing_is_feasible_there_is_something_to_say(goals: Goals, rows: list[Any]) -> None:
    found = result(goals, rows)
    if found.best is None:
        lines = found.nearest_misses()
        assert lines and all(line and "\n" not in line for line in lines)


def test_the_nearest_miss_is_named_with_its_distance() -> None:
    goals = parse_goals(["size <= 1.5", "exact_match >= 0.9"], [], KNOWN)
    rows = [({"size": 3.0, "exact_match": 0.95}, False), ({"size": 1.0, "exact_match": 0.5}, False), ({}, True)]
    assert result(goals, rows).nearest_misses() == [
        "size <= 1.5: met; nearest size 1 in trial 1",
        "exact_match >= 0.9: met; nearest exact_match 0.95 in trial 0",
        "each constraint is met by some trial, but none meets all; trial 0 misses size <= 1.5",
    ]
    far = result(goals, rows[:1])
    assert far.nearest_misses()[0] == "size <= 1.5: missed by 1.5; nearest size 3 in trial 0"
    assert result(goals, [({}, True)]).nearest_misses() == ["no trial came to an end: x"]
    assert RunResult(goals, {}, ()).nearest_misses() == ["nothing was tried"]
