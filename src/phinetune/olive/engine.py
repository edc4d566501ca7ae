"""What is left of `engine` and of the top level: output and cache folders, packaging, logs, and what only Olive's own running needed."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from phinetune.errors import did_you_mean
from phinetune.olive.context import Context
from phinetune.olive.reader import Reader

_LOG = "how much is printed is said on the command line, and the whole log is in output_dir"
_CONTENT = "finished passes are found by their content, so nothing in the cache is ever stale"
_SHARED = "one cache folder is used; cache_dir says which"
_ENGINE = {
    "clean_cache": _CONTENT,
    "clean_evaluation_cache": _CONTENT,
    "log_severity_level": _LOG,
    "ort_log_severity_level": _LOG,
    "ort_py_log_severity_level": _LOG,
    "log_to_file": "the log is always in output_dir",
    "output_name": "the chosen model is output_dir itself",
    "no_artifacts": "results.json and footprint.json are always written beside the model",
    "plot_pareto_frontier": "every trial is in results.json",
    **dict.fromkeys(("cache_config", "enable_shared_cache", "enable_cloud_cache", "cloud_cache_config"), _SHARED),
}
_TOP = {
    "$schema": "it is for editors",
    "workflow_id": "finished passes are found by their content, whatever the workflow is called",
    "workflow_host": "the workflow runs where it is started; host says where its passes run",
    "max_concurrent_builds": "the file is one build",
}
_PACKAGES = ("Zipfile", "Dockerfile", "AzureMLModels", "AzureMLData", "AzureMLDeployment")
_CLIENT = {"subscription_id", "resource_group", "workspace_name", "aml_config_path", "read_timeout", "max_operation_retries",
           "operation_retry_interval", "default_auth_params", "keyvault_name"}  # fmt: skip


def read_azure(top: Reader, engine: Reader, context: Context) -> str | None:
    """Remember the workspace that the file names once; its place, None if it names none."""
    for reader, key in ((top, "azureml_client"), (engine, "azureml_client_config")):
        if reader.has(key):
            place = reader.path(key)
            client = reader.group(key)
            if client is not None and not context.azure:
                context.azure = {name: client.take(name) for name in sorted(_CLIENT) if client.has(name)}
                return place
    return None


def give_azure(place: str | None, context: Context) -> None:
    """Put that workspace into the options of the systems that are on Azure, and say where it went."""
    if place is None:
        return
    names = [name for name, system in context.systems.items() if system["type"] == "azureml"]
    for name in names:
        context.systems[name].setdefault("options", {})["azureml_client"] = dict(context.azure)
    if names:
        at = ("systems", names[0], "options", "azureml_client")
        context.report.note(
            "renamed", place, "is options.azureml_client now, of " + ", ".join(f"systems.{n}" for n in names), at
        )
    elif context.azure_used:
        context.report.note("changed", place, "is part of the Azure addresses now")
    else:
        context.report.note("dropped", place, "nothing is on Azure")


def read_rest(top: Reader, engine: Reader, context: Context) -> dict[str, Any]:
    """output_dir, cache_dir and package; the rest is dropped and said."""
    report = context.report
    values: dict[str, Any] = {}
    if engine.has("output_dir"):
        place, folder = engine.path("output_dir"), engine.take("output_dir", str, "")
        if folder.endswith(".onnx"):
            folder = str(PurePath(folder).parent)
            report.note("changed", place, "the folder of that file; the model in it is model.onnx", ("output_dir",))
        values["output_dir"] = folder
    else:
        report.note(
            "default", engine.path("output_dir"), "not given: phinetune-run (Olive wrote into the current folder)"
        )
    if engine.has("cache_dir"):
        values["cache_dir"] = engine.take("cache_dir", str)
    engine.drop_all(_ENGINE)
    top.drop_all(_TOP)
    top.refuse("builds", "each build is a workflow; write it to a file of its own")
    if top.has("auto_optimizer_config"):
        top.drop("auto_optimizer_config", "the passes are named")
    if context.data_root is not None and not context.data_root_used:
        report.note("dropped", "data_root", "no data file is relative")
    if package := _package(engine, context):
        values["package"] = package
    return values


def _package(engine: Reader, context: Context) -> dict[str, Any] | None:
    report = context.report
    place = engine.path("packaging_config")
    given = engine.take("packaging_config", (dict, list))
    result: dict[str, Any] | None = None
    for index, one in enumerate(given if isinstance(given, list) else [given] if given else []):
        here = f"{place}[{index}]" if isinstance(given, list) else place
        outer = report.open(one, here)
        kind = outer.take("type", str, "Zipfile")
        keys = outer.flat("config")
        if kind.lower() != "zipfile":
            if kind not in _PACKAGES:
                report.problem(
                    outer.path("type"), f"no package is of this type{did_you_mean(kind, _PACKAGES)} (found: {kind!r})"
                )
            else:
                report.note("dropped", here, "only zip files are made")
            for group in keys.groups:
                group.read |= set(group.values)
            continue
        if result is not None:
            report.problem(here, "one zip file is made; leave the others out")
        result = {"name": keys.take("name", str, "OutputModels")}
        report.note("renamed", here, "is package now", ("package",))
        if keys.has("include_sample_code"):
            report.renamed(keys.path("include_sample_code"), ("package", "sample_code"))
            result["sample_code"] = keys.take("include_sample_code", bool)
        runtime = {"include_runtime_packages": "the packages that the model needs are named in it, not put into it"}
        keys.drop_all({**runtime, "export_in_mlflow_format": "the model is an ONNX Runtime GenAI folder"})
    return result
