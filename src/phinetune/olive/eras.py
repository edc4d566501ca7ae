"""Which Olive a file was written for, told from the keys whose time is known; it decides which defaults its missing keys had.

Each sign is a key (or a shape) with the first and the last release that took it. If the signs have releases in common, the file is of
those, and the latest of them gives the defaults: it is what the file's owner runs if they kept up. If they have none in common (a
file put together from pieces of several years), the file is mixed, and the defaults are those of the latest release that one of its
keys proves: its owner runs at least that one. Signs are looked for, never checked: wrong values are the translation's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_RELEASES = {
    "0.3": "A", "0.4.0": "A", "0.5.0": "A", "0.5.1": "B", "0.5.2": "B", "0.6.0": "C", "0.6.1": "C", "0.6.2": "D", "main of summer 2024": "E",
    "0.7.0": "F", "0.7.1": "F", "0.8.0": "G", "0.9.0": "G", "0.9.2": "G", "0.9.3": "H", "0.10.0": "I", "0.11.0": "I", "0.12.0": "J", "0.13.0": "J",
}  # fmt: skip
RELEASES = tuple(_RELEASES)
"""Releases between which something about the files changed, in their order."""
SUMMER = "main of summer 2024"
"""What people installed from the repository between 0.6.2 and 0.7.0, when most renames happened."""
ENGINE_KEYS = (
    "search_strategy", "host", "target", "evaluator", "evaluate_input_model", "execution_providers", "cache_dir", "clean_cache",
    "clean_evaluation_cache", "output_dir", "output_name", "plot_pareto_frontier", "packaging_config", "log_severity_level",
    "ort_log_severity_level", "ort_py_log_severity_level", "log_to_file", "cache_config", "enable_shared_cache", "no_artifacts",
)  # fmt: skip
"""Keys of `engine` that stand at the top level too, since the summer of 2024."""


@dataclass(frozen=True)
class Era:
    """The releases that a file was written for."""

    letter: str
    """A (0.3) to J (0.12 and later), or a range such as "A to D"."""
    versions: str
    """The same in releases, such as "0.3 to 0.5.0"."""
    keys: tuple[str, ...]
    """Paths of the keys that it was told from: those that set the first or the last release."""
    release: str
    """The release whose defaults are taken for what the file leaves out."""
    mixed: bool = False
    """True if no release took all of its keys."""

    def since(self, release: str) -> bool:
        """True if the file's defaults are those of `release` or later."""
        return RELEASES.index(self.release) >= RELEASES.index(release)


@dataclass(frozen=True)
class _Sign:
    path: str
    first: int
    last: int


def detect_era(values: dict[str, Any]) -> Era:
    """The era of an Olive file, from its keys alone; values of a wrong kind are passed over. Raises nothing."""
    signs = [
        _Sign(path, RELEASES.index(first or RELEASES[0]), RELEASES.index(last or RELEASES[-1]))
        for path, first, last in _signs(values)
    ]
    first = max((s.first for s in signs), default=0)
    last = min((s.last for s in signs), default=len(RELEASES) - 1)
    mixed = first > last
    keys = [s.path for s in signs if (s.first == first and first > 0) or (s.last == last and last < len(RELEASES) - 1)]
    low, high = RELEASES[min(first, last)], RELEASES[max(first, last)]
    letters = sorted({_RELEASES[low], _RELEASES[high]})
    versions = (low if low == high else f"{low} to {high}") + (", mixed" if mixed else "")
    return Era(" to ".join(letters), versions, tuple(dict.fromkeys(keys)), high, mixed)


_Found = Iterator[tuple[str, str | None, str | None]]
_TOP = {
    "data_root": (None, "0.6.2"), "azureml_client": (None, "0.9.2"), "pass_flows": (None, "0.7.1"), "workflow_id": ("0.6.2", None),
    "auto_optimizer_config": ("0.5.0", "0.9.2"), "workflow_host": (SUMMER, "0.9.2"), "builds": ("0.13.0", None),
    **dict.fromkeys(ENGINE_KEYS, (SUMMER, None)),
}  # fmt: skip
_ENGINE = {
    "execution_providers": (None, "0.5.0"), "azureml_client_config": (None, "0.5.1"), "output_name": (None, SUMMER),
    "enable_cloud_cache": (SUMMER, SUMMER), "cloud_cache_config": (SUMMER, SUMMER), "cache_config": (SUMMER, None),
    "enable_shared_cache": (SUMMER, None), "no_artifacts": ("0.8.0", None), "log_to_file": ("0.5.0", None),
}  # fmt: skip
_SEARCH = {
    "search_algorithm": (None, "0.7.1"), "search_algorithm_config": (None, "0.7.1"), "num_samples": (None, "0.7.1"),
    "sampler": ("0.8.0", None), "sampler_config": ("0.8.0", None), "max_samples": ("0.8.0", None), "include_pass_params": ("0.8.0", None),
}  # fmt: skip
_TEXTS = {
    "dataset_type": (None, SUMMER), "source_max_len": (None, SUMMER), "corpus_strategy": (None, SUMMER), "pair_format": (None, SUMMER),
    "label_cols": (None, SUMMER), "max_seq_len": (SUMMER, None), "strategy": (SUMMER, None), "chat_template": (SUMMER, None),
    "message_col": (SUMMER, None), "col_filters": (SUMMER, None), "padding_side": ("0.8.0", None),
}  # fmt: skip
_TYPES = {
    "LoRA": ("0.4.0", None), "LoftQ": ("0.5.0", None), "DoRA": ("0.8.0", None), "GenAIModelExporter": ("0.5.0", "0.5.2"),
    "ModelBuilder": ("0.6.0", None), "MergeAdapterWeights": ("0.6.1", None), "Rtn": ("0.9.2", None), "QLoRA": (None, None),
    "OnnxConversion": (None, None), "ExtractAdapters": ("0.5.2", None),
}  # fmt: skip
_OUTER = {"disable_search": (None, "0.7.0"), "clean_run_cache": (None, SUMMER), "output_name": (None, SUMMER)}
_PASS = {
    "lora_r": (None, "0.7.1"), "lora_alpha": (None, "0.7.1"), "r": ("0.8.0", None), "alpha": ("0.8.0", None), "bias": ("0.4.0", SUMMER),
    "eval_dataset_size": (None, SUMMER), "use_ort_trainer": ("0.4.0", SUMMER), "ortmodule_onnx_opset_version": ("0.5.0", SUMMER),
    "save_quant_config": (SUMMER, None), "device_map": ("0.8.0", None), "ephemeral_gpu_offload": ("0.8.0", None),
    "int4_op_types_to_quantize": ("0.8.0", None), "use_qdq": ("0.9.0", None), "int4_is_symmetric": ("0.9.2", None),
    "int4_algo_config": ("0.9.2", None), "int4_nodes_to_exclude": ("0.9.2", None), "extra_options": ("0.9.3", None),
    "pack_inputs": (None, "0.6.2"), "merge_adapter_weights": ("0.5.1", None), "use_device": (None, "0.5.0"),
}  # fmt: skip
_TRAINING = {
    "evaluation_strategy": (None, "0.8.0"), "eval_strategy": ("0.9.0", None), "use_module_with_loss": (None, SUMMER), "deepspeed": (SUMMER, None),
}  # fmt: skip


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _table(table: Mapping[str, tuple[str | None, str | None]], values: dict[str, Any], path: str) -> _Found:
    for key in values:
        if key in table:
            yield f"{path}{key}", *table[key]


def _signs(values: dict[str, Any]) -> _Found:
    yield from _table(_TOP, values, "")
    engine = _dict(values.get("engine"))
    yield from _table(_ENGINE, engine, "engine.")
    yield from _table(_ENGINE, {k: v for k, v in values.items() if k != "execution_providers"}, "")
    for path, holder in (("engine.", engine), ("", values)):
        search = holder.get("search_strategy")
        if search is True:
            yield f"{path}search_strategy", None, "0.5.1"
        yield from _table(_SEARCH, _dict(search), f"{path}search_strategy.")
        for inner in ("search_algorithm_config", "sampler_config"):
            yield from _table(_SEARCH, _dict(_dict(search).get(inner)), f"{path}search_strategy.{inner}.")
    yield from _of_model(_dict(values.get("input_model")))
    yield from _of_data(values.get("data_configs"))
    for name, system in _dict(values.get("systems")).items():
        yield from _of_system(_dict(system), f"systems.{name}.")
    for name, given in _dict(values.get("passes")).items():
        if isinstance(given, list):
            yield f"passes.{name}", "0.8.0", None
        for index, one in enumerate(given if isinstance(given, list) else [given]):
            yield from _of_pass(
                _dict(one), f"passes.{name}[{index}]." if isinstance(given, list) else f"passes.{name}."
            )
    for name, evaluator in _dict(values.get("evaluators")).items():
        yield from _of_evaluator(_dict(evaluator), f"evaluators.{name}.")


def _of_model(model: dict[str, Any]) -> _Found:
    kind = str(model.get("type", "")).lower()
    config = _dict(model.get("config"))
    if kind == "hfmodel":
        yield "input_model.type", SUMMER, None
    for path, holder in (("input_model.config.", config), ("input_model.", model)):
        hf = _dict(holder.get("hf_config"))
        if "hf_config" in holder:
            yield f"{path}hf_config", None, "0.6.2"
        table = {
            "model_loading_args": (None, "0.4.0"),
            "from_pretrained_args": ("0.5.0", "0.6.2"),
            "dataset": (None, "0.5.2"),
        }
        yield from _table(table, hf, f"{path}hf_config.")
        yield from _table({"model_file_format": (None, "0.6.2"), "load_kwargs": (SUMMER, None)}, holder, path)
        yield from _table({"generative": (SUMMER, "0.9.0")}, holder, path)
    if "config" not in model and len(model) > 1:
        yield "input_model", SUMMER, None


def _of_data(given: Any) -> _Found:
    if isinstance(given, dict):
        yield "data_configs", None, "0.5.2"
        named = [(f"data_configs.{name}.", _dict(value)) for name, value in given.items()]
    elif isinstance(given, list):
        yield "data_configs", "0.6.0", None
        named = [(f"data_configs[{index}].", _dict(value)) for index, value in enumerate(given)]
    else:
        return
    for path, config in named:
        yield from _table({"params_config": (None, "0.6.1"), "components": (None, "0.6.1")}, config, path)
        params = _dict(config.get("params_config"))
        places = [(f"{path}params_config.", params)]
        kwargs = _dict(params.get("component_kwargs"))
        places += [(f"{path}params_config.component_kwargs.{name}.", _dict(v)) for name, v in kwargs.items()]
        places += [
            (f"{path}components.{name}.params.", _dict(_dict(v).get("params")))
            for name, v in _dict(config.get("components")).items()
        ]
        for name in ("load_dataset_config", "pre_process_data_config", "post_process_data_config", "dataloader_config"):
            if name in config:
                component = _dict(config[name])
                yield f"{path}{name}", "0.6.2", None
                if set(component) - {"type", "params"}:
                    yield f"{path}{name}", SUMMER, None
                places += [(f"{path}{name}.params.", _dict(component.get("params"))), (f"{path}{name}.", component)]
        for place, holder in places:
            yield from _table(_TEXTS, holder, place)
            if _dict(holder.get("data_files")).get("type") == "azureml_datastore":
                yield f"{place}data_files", "0.5.0", "0.9.2"


def _of_system(system: dict[str, Any], path: str) -> _Found:
    config = _dict(system.get("config"))
    kind = str(system.get("type", "")).lower()
    if kind.startswith("azure"):
        yield f"{path}type", None, "0.9.2"
    if "config" not in system and len(system) > 1:
        yield path.rstrip("."), SUMMER, None
    for place, holder in ((f"{path}config.", config), (path, system)):
        found = holder.get("accelerators")
        if isinstance(found, list) and found:
            yield f"{place}accelerators", *((None, "0.5.0") if isinstance(found[0], str) else ("0.5.1", None))
        yield from _table({"local_docker_config": (None, "0.9.0"), "olive_managed_env": (None, "0.9.2")}, holder, place)


def _of_pass(one: dict[str, Any], path: str) -> _Found:
    kind = str(one.get("type", ""))
    yield from _table(_OUTER, one, path)
    yield from ((f"{path}type", *_TYPES[name]) for name in _TYPES if name.lower() == kind.lower())
    if kind and kind not in _TYPES and kind.lower() in {name.lower() for name in _TYPES}:
        yield f"{path}type", SUMMER, None
    config = _dict(one.get("config"))
    if set(one) - {"type", "config", "host", "evaluator", *_OUTER}:
        yield path.rstrip("."), SUMMER, None
    for place, holder in ((f"{path}config.", config), (path, one)):
        yield from _table(_PASS, holder, place)
        yield from _table(_TRAINING, _dict(holder.get("training_args")), f"{place}training_args.")


def _of_evaluator(evaluator: dict[str, Any], path: str) -> _Found:
    if "type" in evaluator:
        yield f"{path}type", SUMMER, None
    for index, metric in enumerate(evaluator["metrics"] if isinstance(evaluator.get("metrics"), list) else []):
        if _dict(metric).get("type") == "size_on_disk":
            yield f"{path}metrics[{index}].type", "0.11.0", None
