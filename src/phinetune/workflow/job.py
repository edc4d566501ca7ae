"""One pass as a job for another interpreter: `python -m phinetune.workflow.job JOB.json`, started by `phinetune.systems`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phinetune.artifact import building, read_manifest
from phinetune.config import parse
from phinetune.data.messages import DataConfig
from phinetune.events import OnEvent
from phinetune.systems.running import serve_job
from phinetune.workflow.config import PassEntry
from phinetune.workflow.passes import PassJob, find_pass, pass_table
from phinetune.workflow.plan import Step


def describe_job(step: Step) -> dict[str, Any]:
    """`step` as plain values."""
    job = step.job
    return {
        "entry": asdict(step.entry),
        "config": asdict(job.config),
        "input": job.input,
        "output": str(job.output),
        "key": step.key,
        "model_kwargs": job.model_kwargs,
        "data": {name: asdict(data) for name, data in job.data.items()},
        "seed": job.seed,
    }


def run_job(values: dict[str, Any], on_event: OnEvent) -> dict[str, Any]:
    """Run the pass that `describe_job` described; returns its artifact's manifest."""
    entry = PassEntry(**values["entry"])
    pass_ = find_pass(entry, pass_table())
    config: Any = parse(pass_.config, values["config"], entry.path)
    data = {name: parse(DataConfig, fields, f"data.{name}") for name, fields in values["data"].items()}
    output = Path(values["output"])
    job = PassJob(config, values["input"], output, values["model_kwargs"], data, values["seed"], on_event)
    if pass_.whole:
        pass_.run(job, output)
    else:
        record: dict[str, Any] = {"stage": entry.type}
        with building(output, pass_.gives, values["key"], record) as partial:
            record["figures"] = pass_.run(job, partial) or {}
    return read_manifest(output)


if __name__ == "__main__":
    raise SystemExit(serve_job(run_job, sys.argv[1:]))
