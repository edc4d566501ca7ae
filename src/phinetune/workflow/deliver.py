"""What a run leaves in its output folder: the chosen model, and what is known about everything that was tried.

    model/           the best trial's last artifact, ready to load
    results.json     the chosen trial, constraints, objectives, every trial
    footprint.json   every artifact: what made it of what, with which settings, its figures
    pareto.json/svg  the trials that no other one beats (with a search)
    workflow.json    the configuration as it ran
    NAME.zip         all of it to hand on (with `package`)

The same run again writes the same bytes: no times of day, nothing about the cache; seconds are those that the artifacts record.
Whatever else lies in the folder is left alone. Not here: the plot (`chart.py`), the zip file (`package.py`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phinetune.artifact import MANIFEST, building, disk_errors, folder_bytes, read_manifest, versions, write_json
from phinetune.errors import OutputError, PhinetuneError
from phinetune.events import Note, OnEvent
from phinetune.generation.load import find
from phinetune.workflow.assessing import kept_values
from phinetune.workflow.chart import CHART, FRONT, axis, draw_front, front
from phinetune.workflow.config import WorkflowConfig, as_values
from phinetune.workflow.goals import Goals, Values
from phinetune.workflow.outcome import RunResult, StepResult, TrialResult
from phinetune.workflow.package import pack
from phinetune.workflow.plan import Workflow
from phinetune.workflow.redact import without_secrets

MODEL, RESULTS, FOOTPRINT, CONFIG = "model", "results.json", "footprint.json", "workflow.json"
AS_RUN = "urn:phinetune:workflow-as-run"
"""`$schema` of a configuration that a run wrote, by which it is known as ours."""


def check_place(output: Path) -> None:
    """Refuse, before any work, an output folder in which the result would take the place of something that phinetune did not write.

    Raises OutputError if `output` is a file, if its `model` is one or holds foreign files, or if a file called like one of ours is not.
    """
    hint = "choose another output_dir, or move it"
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file, not a folder", hint)
    model, problems = output / MODEL, []
    if model.exists() and not model.is_dir():
        problems.append(f"{model}: is a file; the chosen model is put there")
    elif model.is_dir() and any(model.iterdir()) and "kind" not in read_manifest(model):
        problems.append(f"{model}: holds files that phinetune did not write; it is left as it is")
    for name in (RESULTS, FOOTPRINT, FRONT, CHART, CONFIG):
        if not _is_ours(output / name):
            problems.append(f"{output / name}: was not written by phinetune; it is left as it is")
    if problems:
        raise OutputError(problems, hint)


def deliver(workflow: Workflow, result: RunResult, output: Path, on_event: OnEvent) -> None:
    """Write what the run leaves into `output`; see the module's head. Raises OutputError for a full disk or a folder that is forbidden."""
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    left_out: list[str] = []
    config = as_run(workflow.config, left_out)
    if left_out:
        on_event(Note(f"{CONFIG}: secrets are left out: {', '.join(left_out)}"))
    chosen = result.best
    if chosen is not None:
        deliver_model(chosen.steps[-1], output / MODEL, on_event)
    else:
        stays = "; what an earlier run left there stays" if (output / MODEL).exists() else ""
        on_event(Note(f"{MODEL}: not written, there is no trial that meets every constraint{stays}", warning=True))
    write_json(output / CONFIG, config)
    write_json(output / RESULTS, results(workflow, result))
    write_json(output / FOOTPRINT, footprint(workflow, result))
    if workflow.config.search is not None:
        write_json(output / FRONT, {"made_by": "phinetune", **plain(front(result))})
        draw_front(result, output / CHART, on_event)
    else:
        for name in (FRONT, CHART):
            if (output / name).exists() and _is_ours(output / name):
                (output / name).unlink()
                on_event(Note(f"{name}: removed, it was an earlier search's"))
    if workflow.config.package is not None and chosen is not None:
        pack(workflow.config.package, output, (RESULTS, CONFIG), on_event)


def deliver_model(step: StepResult, folder: Path, on_event: OnEvent) -> None:
    """Copy what `step` left to `folder`, whole or not at all, without checkpoints; nothing is done if it is there already."""
    manifest = read_manifest(step.folder)
    files = [n for n in manifest.get("files", []) if not n.startswith("checkpoint-")]
    there = read_manifest(folder)
    same = all(there.get(name) == manifest.get(name) for name in ("kind", "key"))
    if same and all((folder / name).exists() for name in files):
        on_event(Note(f"unchanged: {folder} holds the chosen model"))
        return
    record = {**manifest, "files": files}
    with building(folder, step.kind, step.key, record) as partial:
        room, needed = shutil.disk_usage(partial).free, folder_bytes(step.folder)
        if room < needed:
            raise OutputError(
                f"{folder}: {room / 1e6:.0f} MB free on this disk, {needed / 1e6:.0f} MB are needed",
                "free some space and start the same command again: what is finished is cached",
            )
        for entry in sorted(step.folder.iterdir()):
            if entry.name == MANIFEST or entry.name.startswith("checkpoint-"):
                continue
            copy = shutil.copytree if entry.is_dir() else shutil.copy2
            copy(entry, partial / entry.name)
    on_event(Note(f"{MODEL}: {step.type} of the chosen trial, in {folder}"))
    base = Path(str(manifest.get("base_model", "")))
    if step.kind == "adapter" and base.is_absolute() and step.folder.parent in base.parents:
        on_event(Note(f"{MODEL}: this adapter needs its base model in the cache, {base}; keep it there", warning=True))


def as_run(config: WorkflowConfig, left_out: list[str] | None = None) -> dict[str, Any]:
    """The configuration as `phinetune run` reads it, from any folder of this machine: paths absolute, secrets out."""
    values: dict[str, Any] = json.loads(json.dumps(as_values(config), default=str))
    values["output_dir"] = _absolute(values["output_dir"], always=True)
    if "cache_dir" in values:
        values["cache_dir"] = _absolute(values["cache_dir"], always=True)
    for key in ("path", "adapter"):
        values["model"][key] = _absolute(values["model"][key])
    for data in values["data"].values():
        data["path"] = _absolute(data["path"])
    for given in values["passes"].values():
        for entry in given if isinstance(given, list) else [given]:
            if isinstance(entry, dict) and "user_script" in entry:
                entry["user_script"] = _absolute(entry["user_script"])
    return {"$schema": AS_RUN, **without_secrets(values, left_out=left_out)}


def results(workflow: Workflow, result: RunResult) -> dict[str, Any]:
    """What `results.json` holds."""
    best, on_front = result.best, {t.number for t in result.front}
    found: dict[str, Any] = {
        "made_by": "phinetune",
        "model": workflow.config.model.path,
        "best": _best(best) if best else None,
        "base": plain(result.base),
        "constraints": _constraints(result.goals, best.values if best else {}, result.base),
        "objectives": [
            {"text": o.text, "metric": o.metric, "value": plain(best.values.get(o.metric)) if best else None}
            for o in result.goals.objectives
        ],
        "trials": [_trial(t, t.number in on_front) for t in result.trials],
        "versions": versions(),
    }
    if best is None:
        found["nearest"] = result.nearest_misses()
    return found


def results_table(result: RunResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(names of the columns, a row of texts for each trial): number, chosen values, metrics, and what is to be said of it.

    Where a pass has alternatives, the chosen one is said by its type. Shares are in percent, sizes in MB.
    """
    best, on_front = result.best, {t.number for t in result.front}
    paths = list(dict.fromkeys(path for t in result.trials for path in t.chosen))
    metrics = list(dict.fromkeys(name for t in result.trials for name in t.values))
    header = ("trial", *(p.removeprefix("passes.") for p in paths), *(axis(m)[0] for m in metrics), "")
    rows = []
    for t in result.trials:
        types = {f"passes.{s.name}": s.type for s in t.steps}
        chosen = [str(types.get(path, t.chosen[path])) if path in t.chosen else "-" for path in paths]
        values = [f"{t.values[m] * axis(m)[1]:.4g}" if m in t.values else "-" for m in metrics]
        missed = "misses " + ", ".join(t.missed) if t.missed else ""
        said = "chosen" if t is best else "on the front" if t.number in on_front and result.goals.objectives else ""
        rows.append((str(t.number), *chosen, *values, t.error or missed or said))
    return header, rows


def footprint(workflow: Workflow, result: RunResult) -> dict[str, Any]:
    """What `footprint.json` holds: the artifacts as a tree, from the base model down."""
    source = workflow.source
    size = None
    try:
        size = folder_bytes(find(source.name, workflow.config.model.model_kwargs, lambda event: None)[0])
    except PhinetuneError:  # a model that was removed since
        size = None
    root = {
        "pass": None, "type": "base model", "kind": source.kind, "parent": None, "name": workflow.config.model.path,
        "metrics": plain(result.base), "size_bytes": size,
    }  # fmt: skip
    artifacts: dict[str, Any] = {}
    for trial in result.trials:
        for step in trial.steps:
            if step.key not in artifacts:
                artifacts[step.key] = {
                    "pass": step.name, "type": step.type, "kind": step.kind, "parent": step.parent,
                    "config": plain(_settings(workflow, trial, step)), "metrics": plain(kept_values(workflow, step)), "seconds": step.seconds,
                    "size_bytes": folder_bytes(step.folder), "folder": str(step.folder), "trials": [],
                }  # fmt: skip
            artifacts[step.key]["trials"].append(trial.number)
    return {"made_by": "phinetune", "base": source.key, "artifacts": {source.key: root, **artifacts}}


def _settings(workflow: Workflow, trial: TrialResult, step: StepResult) -> Any:
    """The settings that a step's pass had, secrets out: as the cache notes them, or from the trial's values."""
    noted = workflow.store.facts(step.key).get("config")
    if not isinstance(noted, dict):
        try:
            found = [s for s in workflow.steps(trial.chosen) if s.key == step.key]
        except PhinetuneError:
            found = []
        noted = asdict(found[0].job.config) if found else {}
    return without_secrets(noted)


def _best(trial: TrialResult) -> dict[str, Any]:
    last = trial.steps[-1]
    return {
        "number": trial.number, "chosen": plain(trial.chosen), "values": plain(trial.values),
        "folder": MODEL, "kind": last.kind, "key": last.key,
    }  # fmt: skip


def _constraints(goals: Goals, values: Values, base: Values) -> list[dict[str, Any]]:
    """Each constraint with its limit, the chosen model's value, and whether it is met; null where something was not measured."""
    rows = []
    for c in goals.constraints:
        limit = c.limit(base) if not c.base or c.metric in base else None
        value = values.get(c.metric)
        met = c.shortfall(values, base) <= 0 if limit is not None and value is not None else None
        relation = ">=" if c.at_least else "<="
        rows.append(
            {
                "text": c.text,
                "metric": c.metric,
                "relation": relation,
                "limit": plain(limit),
                "value": plain(value),
                "met": met,
            }
        )
    return rows


def _trial(trial: TrialResult, on_front: bool) -> dict[str, Any]:
    return {
        "number": trial.number, "chosen": plain(trial.chosen), "values": plain(trial.values), "feasible": trial.feasible,
        "front": on_front, "missed": plain(trial.missed), "error": trial.error, "truncated": trial.truncated,
        "seconds": round(sum(s.seconds for s in trial.steps), 2),
        "steps": [{"pass": s.name, "type": s.type, "kind": s.kind, "key": s.key, "seconds": s.seconds} for s in trial.steps],
    }  # fmt: skip


def plain(value: Any) -> Any:
    """`value` for JSON, which knows neither infinity nor NaN: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def _absolute(path: Any, always: bool = False) -> Any:
    """`path` from the root if it is there (bundled sets, embedded models and hub ids are not)."""
    place = Path(str(path)).expanduser()
    return str(place.absolute()) if path and (always or place.exists()) else path


def _is_ours(file: Path) -> bool:
    """True if there is no such file, or phinetune wrote it."""
    if not file.exists():
        return True
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".svg":
            return "<dc:title>phinetune</dc:title>" in text
        value = json.loads(text)
    except (OSError, ValueError):
        return False
    if not isinstance(value, dict):
        return False
    return (
        value.get("made_by") == "phinetune"
        or value.get("$schema") == AS_RUN
        or "phinetune" in value.get("versions", {})
    )
