"""Score the model that goes in and what a trial left, once: values are kept under the key of the artifact and of how it was scored."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from phinetune.artifact import content_key
from phinetune.data.messages import DataConfig
from phinetune.evaluation.measurements import measurements
from phinetune.events import Note, OnEvent, log_event
from phinetune.model.compute import processor_name
from phinetune.workflow.assess import assess
from phinetune.workflow.config import EvaluateConfig
from phinetune.workflow.goals import Values
from phinetune.workflow.held_out import Split
from phinetune.workflow.outcome import StepResult
from phinetune.workflow.plan import Workflow, default_evaluation
from phinetune.workflow.stages import choose_data


def wanted_metrics(workflow: Workflow) -> list[str]:
    """The metrics that the workflow asks for, and those its goals name."""
    return list(dict.fromkeys([*default_evaluation(workflow.config).metrics, *workflow.goals.metrics]))


def assess_source(workflow: Workflow, on_event: OnEvent = log_event) -> Values:
    """The values of the model that goes in, if they are wanted."""
    evaluation = workflow.config.evaluate
    if not workflow.goals.relative and (evaluation is None or not evaluation.input_model):
        return {}
    return _assess(workflow, workflow.source.name, workflow.source.key, workflow.source.kind, on_event)


def assess_artifact(workflow: Workflow, step: StepResult, on_event: OnEvent = log_event) -> Values:
    """The values of what a step left."""
    return _assess(workflow, str(step.folder), step.key, step.name, on_event)


def kept_values(workflow: Workflow, step: StepResult) -> Values:
    """The values of what a step left, if they were measured before."""
    metrics = wanted_metrics(workflow)
    kept = workflow.store.assessment(_key(workflow, step.key, metrics)).get("values") if metrics else None
    return {n: float(kept[n]) for n in metrics if n in kept} if isinstance(kept, dict) else {}


def _key(workflow: Workflow, artifact: str, metrics: list[str]) -> str:
    """What decides the values: the artifact, the data, how it is scored, and for clocks the machine."""
    how, (_, name, split) = _how(default_evaluation(workflow.config)), _data(workflow)
    table = measurements()
    machine = processor_name() if any(table[n].needs in ("clock", "process") for n in metrics) else ""
    return content_key("assess", 1, artifact, sorted(metrics), workflow.digests.get(name, ""), split, how, machine)


def _how(evaluation: EvaluateConfig) -> dict[str, Any]:
    """The arguments of `assess` that the file gives."""
    left = ("metrics", "data", "split", "input_model", "every_pass")
    return {k: v for k, v in asdict(evaluation).items() if k not in left}


def _assess(workflow: Workflow, model: str, key: str, what: str, on_event: OnEvent) -> Values:
    metrics = wanted_metrics(workflow)
    if not metrics:
        return {}
    data, _, split = _data(workflow)
    key = _key(workflow, key, metrics)
    kept = workflow.store.assessment(key).get("values")
    if not isinstance(kept, dict):
        kwargs, how = workflow.config.model.model_kwargs or None, _how(default_evaluation(workflow.config))
        result = assess(model, data, metrics, split, model_kwargs=kwargs, on_event=on_event, **how)
        kept = dict(result.values)
        workflow.store.keep_assessment(key, asdict(result))
    on_event(Note(f"{what}: " + ", ".join(f"{n} {kept[n]:.6g}" for n in metrics)))
    return {n: float(kept[n]) for n in metrics}


def _data(workflow: Workflow) -> tuple[DataConfig | None, str, Split | None]:
    """(data config that is scored, its name, split)."""
    config, evaluation = workflow.config, default_evaluation(workflow.config)
    trained, held_out = None, None
    for alternatives in workflow.alternatives.values():
        entry, pass_ = alternatives[0]
        if pass_.data:
            trained = choose_data(entry.values.get(pass_.data[0]), config.data)
            held_out = next((entry.values[k] for k in pass_.data[1:] if entry.values.get(k)), None)
    name = evaluation.data or held_out or trained or (choose_data(None, config.data) if config.data else None)
    if name is None:
        return None, "", evaluation.split
    split: Split = evaluation.split or ("test" if name == trained and config.data[name].test_fraction > 0 else "all")
    return config.data[name], name, split
