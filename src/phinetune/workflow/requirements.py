"""The packages that a workflow's passes need beyond phinetune's own dependencies, as pip names them."""

from __future__ import annotations

from phinetune.workflow.config import PassEntry, WorkflowConfig

_OF_TYPE = {
    "qlora": ("bitsandbytes",),
    "loftq": ("bitsandbytes",),
    **dict.fromkeys(
        ("modelbuilder", "onnxconversion", "rtn", "extractadapters"),
        ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai"),
    ),
}


def required_packages(config: WorkflowConfig, entries: list[PassEntry]) -> list[str]:
    """Names for a requirements file, sorted."""
    found = {package for entry in entries for package in _OF_TYPE.get(entry.type.lower(), ())}
    if config.search is not None:
        found |= {"optuna", "matplotlib"}
    if any(system.type == "docker" for system in config.systems.values()):
        found.add("docker")
    return ["phinetune", *sorted(found)]
