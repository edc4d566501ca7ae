"""`translate`: a whole Olive file, of whatever era, as the values of a native workflow file, with a note for all that is not the same.

The order below is that of what needs what: the search decides how passes are read, systems are there before passes name their hosts,
data configs before passes train on them, passes before it is known on which rows metrics are measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.errors import ConfigError
from phinetune.olive.context import Context
from phinetune.olive.data import data_configs
from phinetune.olive.engine import give_azure, read_azure, read_rest
from phinetune.olive.eras import ENGINE_KEYS, Era, detect_era
from phinetune.olive.evaluators import read_evaluation
from phinetune.olive.model import model
from phinetune.olive.passes import read_passes
from phinetune.olive.reader import Note, Reader, Report
from phinetune.olive.search import read_search
from phinetune.olive.systems import default_target, read_systems, system_reference

_OWN = (
    "input_model", "data_configs", "engine", "evaluators", "azureml_client", "auto_optimizer_config", "pass_flows", "data_root", "workflow_id",
    "workflow_host", "builds", *(key for key in ENGINE_KEYS if key not in ("host", "target", "output_dir", "cache_dir")),
)  # fmt: skip
_ORDER = (
    "model", "data", "passes", "evaluate", "constraints", "objectives", "search", "systems", "host", "target", "output_dir", "cache_dir", "package",
)  # fmt: skip


@dataclass(frozen=True)
class Translation:
    """What came of an Olive file."""

    values: dict[str, Any]
    """Values of the native workflow file."""
    notes: tuple[Note, ...]
    """What is not the same, key by key."""
    era: Era
    """The releases that the file was written for; they decide what its missing keys mean."""


def is_olive(values: dict[str, Any]) -> bool:
    """True for values of an Olive file, or of a part of one. A native file has `model`, and is none."""
    if "input_model" in values:
        return True
    if "model" in values:
        return False
    if any(key in values for key in _OWN):
        return True
    passes = values.get("passes")
    entries = [
        e
        for one in (passes.values() if isinstance(passes, dict) else [])
        for e in (one if isinstance(one, list) else [one])
    ]
    systems = values.get("systems")
    entries += list(systems.values()) if isinstance(systems, dict) else []
    return any(isinstance(e, dict) and ("accelerators" in e or isinstance(e.get("config"), dict)) for e in entries)


def translate(values: dict[str, Any], folder: Path | None = None, partial: bool = False) -> Translation:
    """The native values of an Olive file's `values`; `folder` is where the file is. With `partial` input_model and passes may be missing.

    Raises one ConfigError with every problem: keys that no Olive knew, values that cannot be, and what has no counterpart and no
    harmless way to go without. Whatever else is not carried over as it stands has a note.
    """
    report = Report()
    context = Context(report, detect_era(values), folder)
    native = _translate(values, context, partial)
    if problems := [*report.problems, *report.unread()]:
        raise ConfigError(problems)
    ordered = {key: native[key] for key in _ORDER if key in native and native[key] not in (None, {}, [])}
    return Translation(ordered, tuple(report.notes), context.era)


def _translate(values: dict[str, Any], context: Context, partial: bool) -> dict[str, Any]:
    report = context.report
    top = report.open(values, "")
    nested = top.group("engine")
    engine = Reader(report, [*(nested.groups if nested else []), *top.groups])
    native: dict[str, Any] = {}
    place = read_azure(top, engine, context)
    if top.has("data_root"):
        context.data_root = top.take("data_root", str)
    native["search"] = read_search(engine, context)
    providers = engine.path("execution_providers"), engine.take("execution_providers")
    read_systems(top, providers if providers[1] is not None else None, context)
    data_configs(top, context)
    native["model"] = model(top, context)
    if native["model"] is None and not partial and not report.problems:
        report.problem("input_model", "this key is needed")
    evaluators: list[tuple[str, Any]] = []
    if top.has("passes") or not partial:
        native["passes"], evaluators = read_passes(top, context)
    native["evaluate"], native["constraints"], native["objectives"] = read_evaluation(top, engine, evaluators, context)
    for key in ("host", "target"):
        native[key] = system_reference(engine, key, f"{key}_system", context)
    if native["target"] is None and providers[1] is not None:
        native["target"] = default_target((providers[0], providers[1]), context)
    give_azure(place, context)
    native |= read_rest(top, engine, context)
    native["systems"] = context.systems
    native["data"] = {
        name: {**config, "test_fraction": context.trained_on.get(name, 0.0)}
        for name, config in context.data.items()
        if config is not None
    }
    return native
