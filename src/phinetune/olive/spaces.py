"""Settings of a pass that may be searched: fixed values, Olive's search parameters in every spelling, and its own search values.

`SETTINGS` of a pass are native names with Olive's spellings of them and the values that Olive searches where the file says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phinetune.olive.context import Context
from phinetune.olive.reader import Reader

UNSET = object()
"""No value: the setting is not given, or is given as its default."""


@dataclass(frozen=True)
class Setting:
    """One native key of a pass, with what Olive called it."""

    native: str
    names: tuple[str, ...] = ()
    """Olive's spellings, the newest first; the native name if empty."""
    searched: tuple[Any, ...] = ()
    """The values Olive searches if a search is asked for and the file says nothing."""
    searched_since: str = "0.3"
    plural: bool = False
    """A list is one value of it."""


def read_settings(
    settings: tuple[Setting, ...], keys: Reader, at: tuple[str, ...], context: Context, disabled: bool = False
) -> dict[str, Any]:
    """Native name -> value or space of every setting that is given, or that Olive would search. `disabled`: not in this pass."""
    values: dict[str, Any] = {}
    for setting in settings:
        names = setting.names or (setting.native,)
        name = keys.first(*names)
        value = _value(setting, keys.take(name), keys.path(name), (*at, setting.native), context) if name else UNSET
        place = keys.path(name or names[0])
        if name and name != setting.native and value is not UNSET:
            context.report.renamed(place, (*at, setting.native))
        own = context.searching and context.own_spaces and not disabled and context.era.since(setting.searched_since)
        if value is UNSET and setting.searched and own:
            shown = ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in setting.searched)
            context.report.note(
                "default", place, f"not given: {shown} are searched, as in Olive", (*at, setting.native)
            )
            value = {"choices": list(setting.searched)}
        if value is not UNSET:
            values[setting.native] = value
    return values


def _value(setting: Setting, given: Any, place: str, at: tuple[str, ...], context: Context) -> Any:
    report = context.report
    if given == "DEFAULT_VALUE":
        report.note("changed", place, "read as not given")
        return UNSET
    choices: Any = None
    if given == "SEARCHABLE_VALUES":
        choices = list(setting.searched)
        if not choices:
            report.problem(place, "Olive has no search values of its own for this key; list them")
            return UNSET
    elif isinstance(given, dict):
        parameter = report.open(given, place)
        if parameter.take("olive_parameter_type", str) != "SearchParameter":
            report.problem(
                parameter.path("olive_parameter_type"),
                "must be SearchParameter, where a group of keys stands for a value",
            )
        kind = parameter.take("type", str, "Categorical")
        choices = parameter.take("support", (list, dict), [])
        for key in ("parents", "default"):
            parameter.take(key)
        if kind.lower() != "categorical" or not isinstance(choices, list) or not choices:
            reason = "a space that depends on another setting is not supported; give a Categorical, or alternatives of the whole pass"
            report.problem(place, f"{reason} (found: {kind})")
            return UNSET
    elif isinstance(given, list) and not setting.plural:
        choices = given
    if choices is None:
        return given
    if not context.searching:
        report.problem(place, "has several values, and no search is asked for; give one value or a search_strategy")
        return UNSET
    shown = ", ".join(str(choice) for choice in choices)
    report.note("renamed", place, f"is searched: choices {shown}", at)
    return {"choices": choices}
