"""`search_strategy` of both ages as `search`."""

from __future__ import annotations

from typing import Any

from phinetune.errors import did_you_mean
from phinetune.olive.context import Context
from phinetune.olive.reader import Reader

_AT = ("search",)
_SAMPLERS = {"exhaustive": "exhaustive", "sequential": "exhaustive", "random": "random", "tpe": "tpe"}
_ORDERS = ("joint", "pass-by-pass")
_DROPPED = {
    "with_replacement": "no trial is made twice",
    "multivariate": "the sampler's own",
    "group": "the sampler's own",
    "output_model_num": "the chosen model is written, every trial is in results.json",
}


def read_search(engine: Reader, context: Context) -> dict[str, Any] | None:
    """The native `search`; None if the file asks for none. Sets `context.searching`."""
    report = context.report
    place = engine.path("search_strategy")
    given = engine.take("search_strategy", (bool, dict))
    if not given:
        return None
    context.searching = True
    if given is True:
        report.note("changed", place, "true meant every combination of all passes together", _AT)
        return {"sampler": "exhaustive", "order": "joint", **_unpruned(place, context)}
    outer = report.open(given, place)
    keys = outer.flat("search_algorithm_config", "sampler_config")
    values = {"sampler": _sampler(keys, context)}
    context.own_spaces = bool(keys.take("include_pass_params", bool, True))
    if keys.has("include_pass_params"):
        report.note("dropped", keys.path("include_pass_params"), "only what stands as a space is searched")
    place = keys.path("execution_order")
    order = str(keys.take("execution_order", str, "joint")).lower()
    if order not in _ORDERS:
        report.problem(place, f"must be joint or pass-by-pass{did_you_mean(order, _ORDERS)} (found: {order!r})")
    if keys.has("execution_order"):
        report.renamed(place, (*_AT, "order"))
    values |= {"order": order, **_unpruned(engine.path("search_strategy"), context)}
    values |= _limits(keys, values["sampler"], context)
    if values["sampler"] != "exhaustive":
        if not keys.has("seed"):
            report.note("default", keys.path("seed"), "not given: 1, as in Olive", (*_AT, "seed"))
        values["seed"] = keys.take("seed", int, 1)
    else:
        keys.drop("seed", "every combination is tried, nothing is drawn")
    if keys.has("stop_when_goals_met"):
        report.renamed(keys.path("stop_when_goals_met"), (*_AT, "stop_when_met"))
        values["stop_when_met"] = keys.take("stop_when_goals_met", bool, False)
    keys.drop_all(_DROPPED)
    return values


def _unpruned(place: str, context: Context) -> dict[str, Any]:
    context.report.note("default", place, "pruner none: as in Olive, which stops no training early", (*_AT, "pruner"))
    return {"pruner": "none"}


def _sampler(keys: Reader, context: Context) -> str:
    report = context.report
    name = keys.first("sampler", "search_algorithm")
    place = keys.path(name or "sampler")
    if name is None:
        report.note("default", place, "not given: every combination, as in Olive", (*_AT, "sampler"))
        return "exhaustive"
    given = str(keys.take(name, str, "exhaustive")).lower()
    if given not in _SAMPLERS:
        report.problem(
            place, f"must be one of {', '.join(_SAMPLERS)}{did_you_mean(given, _SAMPLERS)} (found: {given!r})"
        )
    elif given == "sequential":
        report.note("renamed", place, "sequential is search.sampler exhaustive now", (*_AT, "sampler"))
    elif name != "sampler":
        report.renamed(place, (*_AT, "sampler"))
    return _SAMPLERS.get(given, "exhaustive")


def _limits(keys: Reader, sampler: str, context: Context) -> dict[str, Any]:
    """trials and minutes."""
    report, at = context.report, (*_AT, "trials")
    limits = []
    if name := keys.first("max_samples", "num_samples"):
        place, number = keys.path(name), keys.take(name, int, 0)
        if number > 0:
            report.renamed(place, at)
            limits.append(number)
        elif sampler == "exhaustive":
            report.note("dropped", place, "every combination is tried anyway")
        else:
            report.problem(
                place,
                f"0 means every combination: sampler exhaustive, or give a number (found: {number} with {sampler})",
            )
    elif sampler != "exhaustive" and not context.era.since("0.8.0"):
        report.note("default", keys.path("num_samples"), f"not given: 1, as in Olive {context.era.release}", at)
        limits.append(1)
    if keys.has("max_iter"):
        place, number = keys.path("max_iter"), keys.take("max_iter", int, 0)
        text = (
            "is search.trials now"
            if not limits or number <= limits[0]
            else f"search.trials is the lesser limit, {limits[0]}"
        )
        report.note("renamed", place, text, at)
        limits.append(number)
    values: dict[str, Any] = {"trials": min(limits)} if limits else {}
    if keys.has("max_time"):
        seconds = keys.take("max_time", (int, float), 0)
        report.note("changed", keys.path("max_time"), "seconds are search.minutes now", (*_AT, "minutes"))
        values["minutes"] = round(seconds / 60, 4)
    return values
