"""`systems`, and the hosts and targets that name them: accelerators of every era, Python environments, Docker, Azure ML."""

from __future__ import annotations

from typing import Any

from phinetune.errors import did_you_mean
from phinetune.olive.context import Context
from phinetune.olive.reader import Reader, dotted

_TYPES = {
    "localsystem": "local", "local": "local", "pythonenvironment": "python", "isolatedort": "python", "docker": "docker", "azureml": "azureml",
    "azurend12ssystem": "azureml", "azurendv2system": "azureml", "azurend96a100system": "azureml", "azurend96asystem": "azureml",
    "azurenc6sv3system": "azureml", "surfaceprosystem1796": "local",
}  # fmt: skip
_NAMES = (
    "LocalSystem",
    "PythonEnvironment",
    "Docker",
    "AzureML",
    "IsolatedORT",
    "AzureND12SSystem",
    "AzureNDV2System",
    "AzureND96A100System",
    "SurfaceProSystem1796",
)
_DEVICES = {
    "cpu": "cpu",
    "gpu": "gpu",
    "npu": "npu",
    "any": "any",
    "cpu_spr": "cpu",
    "vpu": "npu",
    "intel_myriad": "npu",
}
_PROVIDERS = {
    "CPU": "cpu",
    "CUDA": "cuda",
    "Dml": "dml",
    "WebGpu": "webgpu",
    "Js": "webgpu",
    "NvTensorRTRTX": "NvTensorRtRtx",
}
_BY_DEVICE = {"cpu": "cpu", "gpu": "cuda"}
_AZURE = (
    "aml_compute", "aml_docker_config", "aml_environment_config", "tags", "resources", "instance_count", "is_dev", "olive_managed_env",
    "requirements_file", "datastores", "hf_token", "accelerator_type",
)  # fmt: skip
_AZURE_GROUPS = {
    "aml_docker_config": ("base_image", "dockerfile", "build_context_path", "conda_file_path", "name", "version"),
    "aml_environment_config": ("name", "version", "label"),
}
_MANAGED = "environments are made by whoever runs them, and named by their path or image"
_DROPPED = {
    "olive_managed_env": _MANAGED,
    "requirements_file": _MANAGED,
    "is_dev": "phinetune is in the environment or it is not",
}
_TOKEN = "the hub's own login is used: HF_TOKEN, or what hf auth login left"


def read_systems(top: Reader, providers: tuple[str, Any] | None, context: Context) -> None:
    """Put every system of the file into `context.systems`; `providers`: place and value of the engine's own execution providers (0.3 to 0.5)."""
    given = top.take("systems", dict, {})
    for name, values in given.items():
        _system(name, values, f"systems.{name}", providers, context)
    if providers is not None and given:
        name = next(iter(given))
        text = f"is systems.{name}.accelerator.execution_provider now" + (
            ", and that of every other system" if len(given) > 1 else ""
        )
        context.report.note("renamed", providers[0], text, ("systems", name, "accelerator", "execution_provider"))


def default_target(providers: tuple[str, Any], context: Context) -> str:
    """The name of the target of a file (0.3 to 0.5) that names execution providers and no target: this machine, with the first of them."""
    name = context.free_name("local_system", context.systems)
    context.systems[name] = {
        "type": "local",
        "accelerator": _accelerator_of(None, _provider(providers[1], providers[0], context)),
    }
    text = f"is systems.{name}.accelerator.execution_provider now, the target: no other is named"
    context.report.note("renamed", providers[0], text, ("systems", name, "accelerator", "execution_provider"))
    return name


def system_reference(keys: Reader, key: str, hint: str, context: Context) -> str | None:
    """The name of the system that `key` refers to; one that stands there itself is taken in under the name `hint`."""
    if not keys.has(key):
        return None
    value, place = keys.take(key), keys.path(key)
    if isinstance(value, dict):
        name = context.free_name(hint, context.systems)
        context.report.note("changed", place, f"is systems.{name} now", ("systems", name))
        _system(name, value, place, None, context)
        return name
    if not isinstance(value, str):
        context.report.problem(place, f"must be the name of a system (found: {value!r})")
        return None
    if value not in context.systems:
        context.report.problem(place, f"no system is called {value!r}{did_you_mean(value, context.systems)}")
    return value


def _system(name: str, values: Any, path: str, providers: tuple[str, Any] | None, context: Context) -> None:
    report = context.report
    outer = report.open(values, path)
    given = outer.take("type", str, "")
    kind = _TYPES.get(given.lower())
    at = ("systems", name)
    if kind is None:
        text = (
            f"no system is of this type{did_you_mean(given, _NAMES)} (found: {given!r})"
            if given
            else "this key is needed"
        )
        report.problem(outer.path("type"), text)
        outer.pass_over()
        context.systems[name] = {"type": "local"}
        return
    if given.lower() not in ("localsystem", "pythonenvironment", "docker", "azureml"):
        report.note("changed", outer.path("type"), f"is {dotted(at)}.type {kind} now", (*at, "type"))
    keys = outer.flat("config")
    native: dict[str, Any] = {"type": kind}
    if accelerator := _accelerator(keys, at, providers, context):
        native["accelerator"] = accelerator
    if kind == "python":
        _python(keys, native, at, context)
    elif kind == "docker":
        _docker(keys, native, at, context)
    elif kind == "azureml":
        native["options"] = {key: _option(key, keys) for key in _AZURE if keys.has(key)}
    if kind != "azureml":
        keys.drop("hf_token", _TOKEN)
        keys.drop_all(_DROPPED)
    context.systems[name] = native


def _option(key: str, keys: Reader) -> Any:
    """The value of an Azure ML system's key, as it stands; groups whose keys are known are checked for others."""
    inner = keys.group(key) if key in _AZURE_GROUPS else None
    if inner is None:
        return keys.take(key)
    return {name: inner.take(name) for name in _AZURE_GROUPS[key] if inner.has(name)}


def _python(keys: Reader, native: dict[str, Any], at: tuple[str, ...], context: Context) -> None:
    if keys.has("python_environment_path"):
        context.report.renamed(keys.path("python_environment_path"), (*at, "python"))
        native["python"] = keys.take("python_environment_path", str, "")
    else:
        context.report.problem(keys.path("python_environment_path"), "this key is needed")
    if keys.has("environment_variables"):
        context.report.renamed(keys.path("environment_variables"), (*at, "environment"))
        native["environment"] = keys.take("environment_variables", dict)
    if keys.has("prepend_to_path"):
        paths = keys.take("prepend_to_path", (list, str), [])
        native["prepend_to_path"] = [paths] if isinstance(paths, str) else paths


def _docker(keys: Reader, native: dict[str, Any], at: tuple[str, ...], context: Context) -> None:
    keys = keys.flat("local_docker_config")
    for name, own in (("image_name", "image"), ("build_context_path", "build_context")):
        if keys.has(name):
            context.report.renamed(keys.path(name), (*at, own))
            native[own] = keys.take(name, str)
    for name in ("dockerfile", "build_args", "run_params", "work_dir", "clean_image"):
        if keys.has(name):
            native[name] = keys.take(name)


def _accelerator(
    keys: Reader, at: tuple[str, ...], providers: tuple[str, Any] | None, context: Context
) -> dict[str, Any]:
    """The one accelerator of a system, with its execution provider; empty if neither is said."""
    report, target = context.report, (*at, "accelerator")
    place = keys.path("accelerators")
    given = keys.take("accelerators", list, [])
    inherited = _provider(providers[1], providers[0], context) if providers else None
    if not given:
        return _accelerator_of(None, inherited) if inherited else {}
    if len(given) > 1:
        report.note(
            "changed",
            place,
            f"only the first of {len(given)} counts, where Olive ran the workflow once for each",
            target,
        )
    first = given[0]
    if isinstance(first, str):
        report.renamed(place, target)
        device, result = first, {}
    else:
        report.renamed(place, target)
        one = report.open(first, f"{place}[0]")
        device = one.take("device", str)
        result = {"memory": one.take("memory", (int, str))} if one.has("memory") else {}
        if one.has("execution_providers"):
            inherited = _provider(one.take("execution_providers", list), one.path("execution_providers"), context)
            report.renamed(one.path("execution_providers"), (*target, "execution_provider"))
    if device is not None and device.lower() not in _DEVICES:
        text = f"must be one of {', '.join(_DEVICES)}{did_you_mean(device, _DEVICES)} (found: {device!r})"
        report.problem(place, text)
    elif device is not None:
        native = _DEVICES[device.lower()]
        if native != device.lower():
            report.note("changed", place, f"{device} is {native} here", (*target, "device"))
        device = native
    if inherited is None and device in _BY_DEVICE:
        inherited = _BY_DEVICE[device]
        report.note(
            "default", place, f"no execution provider given: {inherited}, as in Olive", (*target, "execution_provider")
        )
    found = _accelerator_of(device, inherited)
    if device is None and "device" in found:
        report.note(
            "default", place, f"no device given: {found['device']}, the execution provider's", (*target, "device")
        )
    return found | result


def _accelerator_of(device: str | None, provider: str | None) -> dict[str, Any]:
    """The native accelerator; a provider alone says its device."""
    if device is None and provider is not None:
        device = "cpu" if provider == "cpu" else "gpu"
    values = {"device": device, "execution_provider": provider}
    return {key: value for key, value in values.items() if value is not None}


def _provider(given: Any, place: str, context: Context) -> str | None:
    """The builder's name of the first execution provider of a list."""
    report = context.report
    if not isinstance(given, list) or not given:
        report.problem(place, f"must be a list of execution providers (found: {given!r})")
        return None
    if len(given) > 1:
        report.note(
            "changed", place, f"only the first of {len(given)} counts, where Olive ran the workflow once for each"
        )
    first = given[0]
    if isinstance(first, list) and len(first) == 2:
        report.note("dropped", f"{place}[0][1]", "the runtime's own library of the provider is used")
        first = first[0]
    if not isinstance(first, str) or not first.endswith("ExecutionProvider"):
        known = [f"{name}ExecutionProvider" for name in _PROVIDERS]
        report.problem(place, f"must end in ExecutionProvider{did_you_mean(str(first), known)} (found: {first!r})")
        return None
    name = first.removesuffix("ExecutionProvider")
    if name not in _PROVIDERS:
        report.note("changed", place, f"{first} is cpu, as Olive built it")
    return _PROVIDERS.get(name, "cpu")
