"""Resource paths: text as it stands, and the dictionaries with a type that say where a model or a file is.

What lies on Azure becomes the azureml: address that says the same in one line.
"""

from __future__ import annotations

from typing import Any

from phinetune.errors import did_you_mean
from phinetune.olive.context import Context
from phinetune.olive.reader import Reader

TYPES = (
    "file",
    "folder",
    "string_name",
    "azureml_model",
    "azureml_registry_model",
    "azureml_datastore",
    "azureml_job_output",
)
_SIGNS = ("config", "path", "datastore_name", "datastore_url", "relative_path", "azureml_client", "job_name")
_AZURE = "kept as an Azure address; Azure is not supported yet, so nothing runs until it is a path on this machine"
_CLIENT = ("subscription_id", "resource_group", "workspace_name")
_OF_THE_SDK = dict.fromkeys(
    (
        "aml_config_path",
        "read_timeout",
        "max_operation_retries",
        "operation_retry_interval",
        "default_auth_params",
        "keyvault_name",
    ),
    "how the Azure client connects is not the workflow's business",
)


def is_resource(value: Any) -> bool:
    """True for a dictionary that says its type, as data_files may be; one of split names and files is none."""
    return isinstance(value, dict) and (str(value.get("type")).lower() in TYPES or any(key in value for key in _SIGNS))


def resource(value: Any, path: str, at: tuple[str, ...], context: Context) -> str | None:
    """The path, hub id or Azure address that `value` at `path` means; None, and a problem, if it means none."""
    report = context.report
    if isinstance(value, str):
        report.renamed(path, at)
        return value
    if not isinstance(value, dict):
        report.problem(path, f"must be a path or a resource (found: {value!r})")
        return None
    outer = report.open(value, path)
    kind = str(outer.take("type", str, "")).lower()
    keys = outer.flat("config")
    if kind not in TYPES:
        text = (
            f"no resource is of this type{did_you_mean(kind, TYPES)} (found: {kind!r})"
            if kind
            else "this key is needed"
        )
        report.problem(outer.path("type"), text)
        keys.pass_over()
        return None
    if kind in ("file", "folder", "string_name"):
        report.renamed(path, at)
        return _needed(keys, "name" if kind == "string_name" else "path")
    address = _ADDRESSES[kind](keys, context)
    report.note("changed", path, _AZURE, at)
    keys.drop_all(_OF_THE_SDK)
    return address


def _needed(keys: Reader, key: str) -> str:
    if not keys.has(key):
        keys.report.problem(keys.path(key), "this key is needed")
    return str(keys.take(key, (str, int), ""))


def _registry_model(keys: Reader, context: Context) -> str:
    keys.drop("azureml_client", "a registry is found by its name")
    return f"azureml://registries/{_needed(keys, 'registry_name')}/models/{_needed(keys, 'name')}/versions/{_needed(keys, 'version')}"


def _model(keys: Reader, context: Context) -> str:
    return f"azureml:/{_workspace(keys, context)}/models/{_needed(keys, 'name')}/versions/{_needed(keys, 'version')}"


def _datastore(keys: Reader, context: Context) -> str:
    if keys.has("datastore_url"):
        _workspace(keys, context)
        keys.drop_all(dict.fromkeys(("datastore_name", "relative_path"), "datastore_url says it"))
        return str(keys.take("datastore_url", str, ""))
    workspace = _workspace(keys, context).replace("resourceGroups", "resourcegroups")
    return f"azureml:/{workspace}/datastores/{_needed(keys, 'datastore_name')}/paths/{_needed(keys, 'relative_path')}"


def _job_output(keys: Reader, context: Context) -> str:
    workspace = _workspace(keys, context)
    return f"azureml:/{workspace}/jobs/{_needed(keys, 'job_name')}/outputs/{_needed(keys, 'output_name')}/paths/{_needed(keys, 'relative_path')}"


def _workspace(keys: Reader, context: Context) -> str:
    """/subscriptions/S/resourceGroups/G/workspaces/W of the resource's own azureml_client, or of the file's; "" if neither says it."""
    client = keys.group("azureml_client")
    if client is None:
        context.azure_used = bool(context.azure)
        given = context.azure
    else:
        given = {key: client.take(key, str) for key in _CLIENT}
        client.drop_all(_OF_THE_SDK)
    if not all(given.get(key) for key in _CLIENT):
        return ""
    return f"/subscriptions/{given[_CLIENT[0]]}/resourceGroups/{given[_CLIENT[1]]}/workspaces/{given[_CLIENT[2]]}"


_ADDRESSES = {
    "azureml_registry_model": _registry_model,
    "azureml_model": _model,
    "azureml_datastore": _datastore,
    "azureml_job_output": _job_output,
}
