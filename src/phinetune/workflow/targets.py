"""What a workflow's target asks for: its memory as a constraint, and whether its result can be measured on this machine at all."""

from __future__ import annotations

from dataclasses import replace

from phinetune.evaluation.measurements import measurements
from phinetune.systems.config import AcceleratorConfig, target_problems
from phinetune.workflow.config import WorkflowConfig
from phinetune.workflow.goals import Constraint, Goals


def target_of(config: WorkflowConfig) -> AcceleratorConfig | None:
    """The accelerator that the result is for; None where the file does not say."""
    return config.systems[config.target].accelerator if config.target in config.systems else None


def with_memory(goals: Goals, config: WorkflowConfig) -> Goals:
    """`goals`, and that the model fits into the target's memory."""
    target = target_of(config)
    if target is None or target.memory_bytes is None:
        return goals
    fits = Constraint(f"size <= {target.memory} bytes (the target's memory)", "size", False, float(target.memory_bytes))
    return replace(goals, constraints=(*goals.constraints, fits))


def absent_target(config: WorkflowConfig, goals: Goals) -> list[str]:
    """Why the result cannot be measured here: the target's provider or device is not on this machine. Its size always can."""
    target = target_of(config)
    wanted = [*(config.evaluate.metrics if config.evaluate else []), *goals.metrics]
    known = measurements()
    if target is None or all(known[name].needs == "files" for name in wanted if name in known):
        return []
    from phinetune.systems.machine import this_machine

    hint = "only size can be measured for it here; leave the other metrics out, or run where it is"
    return [
        f"systems.{config.target}.accelerator.{problem}; {hint}" for problem in target_problems(target, this_machine())
    ]
