"""`evaluators` as `evaluate`, `constraints` and `objectives`: metrics, priorities and goals of the one evaluator that is used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from phinetune.errors import did_you_mean
from phinetune.olive.context import Context
from phinetune.olive.data import data_reference
from phinetune.olive.reader import Reader

_STATISTICS = ("avg", "max", "min", "p50", "p75", "p90", "p95", "p99", "p999")
_ACCURACY = {
    "accuracy_score": "accuracy",
    "f1_score": "f1",
    **{name: name for name in ("precision", "recall", "perplexity", "exact_match")},
}
_METRICS: dict[str, dict[str, str]] = {
    "accuracy": _ACCURACY,
    "latency": {s: f"latency_{s}" for s in _STATISTICS},
    "throughput": {s: f"throughput_{s}" for s in _STATISTICS},
    "size_on_disk": {"bytes": "size"},
}
_NOT_HERE = ("auroc", "wer", "rtfx", "relaxed_accuracy", "word_sort_ratio")
_UNITS = {"latency": " ms"}
_GOALS = ("threshold", "min-improvement", "max-degradation", "percent-min-improvement", "percent-max-degradation")
_HARMONIZED = "scores are computed on the generated answers"
_METRIC_CONFIG = {
    "sleep_num": "answers are timed one after the other",
    **dict.fromkeys(
        (
            "task",
            "num_classes",
            "num_labels",
            "average",
            "top_k",
            "threshold",
            "multidim_average",
            "ignore_index",
            "validate_args",
        ),
        _HARMONIZED,
    ),
    **dict.fromkeys(("load_params", "compute_params", "result_key", "kwargs"), _HARMONIZED),
}
_GENERATED = "answers are generated from the evaluation data's own prompts"
_USER = {
    **dict.fromkeys(
        ("batch_size", "data_dir", "func_kwargs", "dataloader_func_kwargs", "run_kwargs", "shared_kv_buffer"),
        _GENERATED,
    ),
    **dict.fromkeys(
        ("input_names", "input_shapes", "input_types", "io_bind", "inference_settings", "script_dir"), _GENERATED
    ),
    "user_script": "no Python code of the file is run",
}
_CODE = {"dataloader_func": _GENERATED, "post_processing_func": _HARMONIZED, "evaluate_func": _HARMONIZED, "metric_func": _HARMONIZED,
         "evaluate_func_kwargs": _HARMONIZED, "metric_func_kwargs": _HARMONIZED}  # fmt: skip


@dataclass
class Evaluation:
    """What one evaluator asks for."""

    metrics: list[str] = field(default_factory=list)
    objectives: list[tuple[int, str, str]] = field(default_factory=list)
    """(priority, text, place)."""
    constraints: list[str] = field(default_factory=list)
    goals: list[tuple[str, str, str]] = field(default_factory=list)
    """(type, place, constraint)."""
    data: str | None = None
    warmup: int | None = None
    repeats: int | None = None
    silent: list[str] = field(default_factory=list)
    """Places of sub-types without a priority."""


def read_evaluation(
    top: Reader, engine: Reader, of_passes: list[tuple[str, Any]], context: Context
) -> tuple[dict[str, Any] | None, list[str], list[str]]:
    """(native evaluate, constraints, objectives); None if the file names no evaluator."""
    report = context.report
    given: dict[str, Any] = top.take("evaluators", dict, {})
    wanted = [(engine.path("evaluator"), engine.take("evaluator"))] if engine.has("evaluator") else []
    chosen: Evaluation | None = None
    name: str | None = None
    for place, one in [*wanted, *of_passes]:
        if isinstance(one, dict):
            if chosen is not None:
                report.problem(place, "one evaluator can be used; give the same name everywhere")
            chosen, name = _evaluator(one, place, context), name or ""
        elif not isinstance(one, str) or one not in given:
            report.problem(place, f"no evaluator is called {one!r}{did_you_mean(str(one), given)}")
        elif name is not None and one != name:
            report.problem(
                place, f"one evaluator can be used, and {name or 'another'} is already; give the same name everywhere"
            )
        else:
            name = one
    for one, values in given.items():
        mark = report.mark()
        read = _evaluator(values, f"evaluators.{one}", context)
        if one == name:
            chosen = read
        else:
            report.forget(mark)
            report.note("dropped", f"evaluators.{one}", "nothing uses it")
    if engine.has("evaluate_input_model") and chosen is None:
        engine.drop("evaluate_input_model", "no evaluator is used")
    if chosen is None:
        if context.searching and not wanted and not of_passes:
            report.problem(
                engine.path("evaluator"),
                "this key is needed beside search_strategy: a search needs something to improve",
            )
        return None, [], []
    return _native(chosen, engine, context)


def _native(chosen: Evaluation, engine: Reader, context: Context) -> tuple[dict[str, Any], list[str], list[str]]:
    report = context.report
    _priorities(chosen, context)
    only_thresholds = bool(chosen.goals) and all(kind == "threshold" for kind, _, _ in chosen.goals)
    for index, (_, place, text) in enumerate(chosen.goals):
        said = f'is a constraint now: "{text}"'
        if only_thresholds:
            report.note(
                "changed",
                place,
                f"{said}, and holds; Olive let go of goals that are all thresholds",
                ("constraints", str(index)),
            )
        else:
            report.note("renamed", place, said, ("constraints", str(index)))
    chosen.objectives.sort(key=lambda one: one[0])
    for index, (_, text, place) in enumerate(chosen.objectives):
        report.note("renamed", place, f'is a place among the objectives now: "{text}"', ("objectives", str(index)))
    values: dict[str, Any] = {"metrics": chosen.metrics}
    data = chosen.data or context.metric_data or _bundled(chosen, context)
    if data is None and (trained := list(context.trained_on)) and not context.trained_on[trained[0]]:
        data = trained[0]
    if data is not None and context.data.get(data) is not None:
        values["data"] = data
        if context.trained_on.get(data) == 0.0:
            report.note(
                "default",
                "evaluators",
                f"measured on all rows of {data}, of which none is held out, as in Olive",
                ("evaluate", "split"),
            )
            values["split"] = "all"
    if any(metric.startswith(("latency", "throughput")) for metric in chosen.metrics):
        usual = {"warmup": 10, "repeats": 20}
        values |= {key: getattr(chosen, key) if getattr(chosen, key) is not None else usual[key] for key in usual}
        missing = [f"{key} {usual[key]}" for key in usual if getattr(chosen, key) is None]
        if missing:
            report.note("default", "evaluators", f"not given: {', '.join(missing)}, as in Olive", ("evaluate",))
    if engine.has("evaluate_input_model"):
        report.renamed(engine.path("evaluate_input_model"), ("evaluate", "input_model"))
        values["input_model"] = engine.take("evaluate_input_model", bool)
    return values, [text for _, _, text in chosen.goals], [text for _, text, _ in chosen.objectives]


def _bundled(chosen: Evaluation, context: Context) -> str | None:
    """The bundled rows, where something is timed and the file has no rows of its own (Olive timed random ones)."""
    timed = [metric for metric in chosen.metrics if metric != "size"]
    if not timed or not all(m.startswith(("latency", "throughput")) for m in timed) or any(context.data.values()):
        return None
    name = context.free_name("tone", context.data)
    context.data[name] = {"path": "tone"}
    context.report.note(
        "changed",
        "evaluators",
        "the file has no rows, and Olive timed random ones; the bundled phrases are answered",
        ("data", name),
    )
    return name


def _priorities(chosen: Evaluation, context: Context) -> None:
    """Olive's rules: one sub-type alone is what counts; of several, each says its place, and no place is taken twice."""
    ranked = [priority for priority, _, _ in chosen.objectives if priority > 0]
    for priority in {p for p in ranked if ranked.count(p) > 1}:
        places = [place for p, _, place in chosen.objectives if p == priority]
        context.report.problem(places[1], f"priority {priority} is taken by {places[0]}")
    if chosen.silent and not ranked:
        text = "this key is needed where there are several: 1 for the first, 2 for the next, -1 for those that are reported only"
        context.report.problem(chosen.silent[0], text)
    for place in chosen.silent:
        context.report.note("default", place, "not given: reported only, as in Olive", ("evaluate", "metrics"))


def _evaluator(values: Any, path: str, context: Context) -> Evaluation:
    report = context.report
    result = Evaluation()
    outer = report.open(values, path)
    if outer.has("type"):
        place, kind = outer.path("type"), outer.take("type", str, "")
        if kind.lower() in ("oliveevaluator", "onnxevaluator", "pytorchevaluator"):
            report.note("dropped", place, "the model's own generator is measured")
        else:
            known = ("OnnxEvaluator", "PyTorchEvaluator", "LMEvaluator")
            why = "tasks of the evaluation harness are not run; use metrics such as accuracy or perplexity on data of your own"
            report.problem(place, f"{why}{'' if kind in known else did_you_mean(kind, known)} (found: {kind!r})")
            for key in set().union(*(group.values for group in outer.groups)):
                outer.take(key)
            return result
    outer.drop_all(dict.fromkeys(("user_script", "script_dir", "name"), "no Python code of the file is run"))
    if not outer.has("metrics"):
        report.problem(outer.path("metrics"), "this key is needed")
    for index, metric in enumerate(outer.take("metrics", list, [])):
        _metric(metric, f"{path}.metrics[{index}]", result, context)
    if len(result.metrics) == 1 and result.silent:
        metric = result.metrics[0]
        report.note("default", result.silent[0], "not given: 1, as in Olive for the only one", ("objectives",))
        result.objectives = [(1, f"{_direction(metric)} {metric}", result.silent[0])]
        result.silent = []
    return result


def _direction(metric: str) -> str:
    return "min" if metric == "perplexity" or metric.startswith(("latency", "size")) else "max"


def _metric(values: Any, path: str, result: Evaluation, context: Context) -> None:
    report = context.report
    outer = report.open(values, path)
    kind = str(outer.take("type", str, "")).lower()
    outer.drop("name", "a result goes by its metric's own name")
    outer.drop("backend", _HARMONIZED)
    keys = outer.flat("user_config")
    keys.drop_all(_USER)
    for key, reason in _CODE.items():
        if kind in ("latency", "throughput", "size_on_disk"):
            keys.drop(key, reason)
        elif kind != "custom":
            keys.refuse(key, "Python code of the file is not run; give the rows by data_config")
        else:
            keys.take(key)
    given = outer.take("sub_types", list, [])
    if kind not in _METRICS:
        why = (
            "a metric in Python is an entry point of phinetune.metrics, not a function in a file"
            if kind == "custom"
            else "no metric is of this type"
        )
        report.problem(outer.path("type"), f"{why}{did_you_mean(kind, _METRICS)} (found: {kind!r})")
        outer.take("data_config")
        return
    name = data_reference(outer, "data_config", "evaluation", context)
    if name is not None:
        _measured_on(name, outer.path("data_config"), result, context)
    if not given:
        report.problem(outer.path("sub_types"), "this key is needed")
    for index, one in enumerate(given):
        _sub_type(kind, {"name": one} if isinstance(one, str) else one, f"{path}.sub_types[{index}]", result, context)


def _measured_on(name: str, place: str, result: Evaluation, context: Context) -> None:
    if context.data[name] is None:
        context.report.note("dropped", place, "it makes random rows; real ones are measured")
    elif result.data not in (None, name):
        context.report.problem(place, f"all metrics are measured on one data config, and {result.data} is another")
    else:
        result.data = name
        context.report.renamed(place, ("evaluate", "data"))


def _sub_type(kind: str, values: Any, path: str, result: Evaluation, context: Context) -> None:
    report = context.report
    keys = report.open(values, path)
    given = keys.take("name", str, "")
    metric = _METRICS[kind].get(given)
    if metric is None:
        why = "is not computed here; use one of" if given in _NOT_HERE else "must be one of"
        report.problem(
            keys.path("name"),
            f"{why} {', '.join(_METRICS[kind])}{did_you_mean(given, _METRICS[kind])} (found: {given!r})",
        )
        metric = f"{kind}?"
    elif metric != given:
        report.note("renamed", keys.path("name"), f"is {metric} in evaluate.metrics now", ("evaluate", "metrics"))
    if metric not in result.metrics:
        result.metrics.append(metric)
    direction = _direction(metric)
    if keys.has("higher_is_better"):
        place, higher = keys.path("higher_is_better"), keys.take("higher_is_better", bool)
        if higher != (direction == "max"):
            report.problem(
                place, f"{metric} is better when it is {'higher' if direction == 'max' else 'lower'} (found: {higher})"
            )
        else:
            report.note("dropped", place, "every metric knows it")
    if keys.has("metric_config"):
        config = keys.group("metric_config")
        assert config is not None  # noqa: S101 - has() just said so
        _clock(config, result, context)
        config.drop_all(_METRIC_CONFIG)
    if not keys.has("priority"):
        result.silent.append(keys.path("priority"))
    else:
        place, priority = keys.path("priority"), keys.take("priority", int, -1)
        if priority > 0:
            result.objectives.append((priority, f"{direction} {metric}", place))
        else:
            report.note("renamed", place, "reported only, no objective")
    if (goal := keys.group("goal")) is not None:
        _goal(goal, kind, metric, direction, keys.path("goal"), result, context)


def _clock(config: Reader, result: Evaluation, context: Context) -> None:
    """warmup and repeats, the largest that is asked for."""
    for name, native in (("warmup_num", "warmup"), ("repeat_test_num", "repeats")):
        if config.has(name):
            place, number = config.path(name), config.take(name, int, 0)
            before = getattr(result, native)
            context.report.renamed(place, ("evaluate", native))
            if before is not None and before != number:
                context.report.note(
                    "changed",
                    place,
                    f"all metrics share evaluate.{native}: {max(before, number)}, the larger",
                    ("evaluate", native),
                )
            setattr(result, native, number if before is None else max(before, number))


def _goal(
    goal: Reader, kind: str, metric: str, direction: str, place: str, result: Evaluation, context: Context
) -> None:
    """A constraint; `base` is the input model's own score, a percentage is one of it."""
    report = context.report
    name, value = goal.take("type", str, ""), goal.take("value", (int, float))
    if name not in _GOALS:
        report.problem(
            goal.path("type"), f"must be one of {', '.join(_GOALS)}{did_you_mean(name, _GOALS)} (found: {name!r})"
        )
        return
    if value is None:
        report.problem(goal.path("value"), "this key is needed")
        return
    relative, percent = name != "threshold", name.startswith("percent")
    shrinks = (name.endswith("min-improvement")) == (direction == "min")
    if relative and (value < 0 or (percent and (value <= 0 or (shrinks and value >= 100)))):
        wanted = "at least 0" if not percent else "above 0 and below 100" if shrinks else "above 0"
        report.problem(goal.path("value"), f"must be {wanted} (found: {value})")
        return
    unit = " %" if percent else _UNITS.get(kind, "")
    number = f"{value:.12g}{unit}"
    if relative:
        number = f"base {'-' if shrinks else '+'} {number}"
    result.goals.append((name, place, f"{metric} {'>=' if direction == 'max' else '<='} {number}"))
