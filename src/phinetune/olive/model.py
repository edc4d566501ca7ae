"""`input_model` as `model`: a Hugging Face model by path, with its adapter and the arguments of from_pretrained, of every era."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phinetune.errors import did_you_mean
from phinetune.olive.context import Context
from phinetune.olive.data import data_config
from phinetune.olive.reader import Reader
from phinetune.olive.resources import resource

_OTHER_TYPES = (
    "ONNXModel", "CompositeModel", "CompositePyTorchModel", "DistributedHfModel", "DistributedOnnxModel", "DistributedPyTorchModel",
    "OpenVINOModel", "OptimumModel", "QNNModel", "SNPEModel", "TensorFlowModel", "DiffusersModel", "QairtModel", "QairtPreparedModel",
)  # fmt: skip
_TEXT_TASKS = ("text-generation", "text-generation-with-past")
_FORMATS = ("PyTorch.MLflow", "PyTorch.EntireModel")
_FOUND = "it is found from the model's own config"
_TRACED = "the exporter knows the model's inputs by itself"
_DROPPED = {
    "io_config": _TRACED,
    "dummy_inputs_func": _TRACED,
    "dummy_inputs": _TRACED,
    "model_attributes": _FOUND,
    "generative": "every model here is generative",
    "mlflow_transformer_model_cache_dir": "an MLflow folder is read where it is",
    "script_dir": "no Python code of the file is run",
    "test_model_config": "it belongs to Olive's own test mode",
    "test_model_path": "it belongs to Olive's own test mode",
}
_CODE = "a model that Python code builds cannot be read; save it with save_pretrained and give the folder as hf_config.model_name or model_path"
_DATASET = "input_model_dataset"


def model(top: Reader, context: Context) -> dict[str, Any] | None:
    """The native `model` of `input_model`; None if it is not given."""
    outer = top.group("input_model")
    if outer is None:
        return None
    kind = str(outer.take("type", str, ""))
    if kind.lower() not in ("hfmodel", "pytorchmodel"):
        known = ("HfModel", "PyTorchModel", *_OTHER_TYPES)
        reason = "only HfModel, and PyTorchModel with hf_config, can be fine-tuned and exported"
        meant = "" if kind in _OTHER_TYPES else did_you_mean(kind, known)
        context.report.problem(
            outer.path("type"), f"{reason}{meant} (found: {kind!r})" if kind else "this key is needed"
        )
        outer.pass_over()
        return None
    keys = outer.flat("config")
    hf = keys.group("hf_config")
    values: dict[str, Any] = {}
    if path := _path(keys, hf, context):
        values["path"] = path
        context.model_type = _model_type(path, context.folder)
    if keys.has("adapter_path"):
        values["adapter"] = resource(
            keys.take("adapter_path"), keys.path("adapter_path"), ("model", "adapter"), context
        )
    _rest(keys, hf, context)
    holder = keys if keys.has("load_kwargs") else hf
    if holder is not None and (kwargs := model_kwargs(holder, context)):
        values["model_kwargs"] = kwargs
    return values


def _path(keys: Reader, hf: Reader | None, context: Context) -> str | None:
    at = ("model", "path")
    name = hf.take("model_name", str) if hf else None
    if keys.has("model_path"):
        value, place = keys.take("model_path"), keys.path("model_path")
        if hf and name is not None:
            context.report.note(
                "dropped",
                hf.path("model_name"),
                "tokenizer and configuration come with the model that model_path names",
            )
        return resource(value, place, at, context)
    if hf and name is not None:
        context.report.renamed(hf.path("model_name"), at)
        return str(name)
    if not keys.has("model_loader"):
        context.report.problem(keys.path("model_path"), "this key is needed")
    return None


def _rest(keys: Reader, hf: Reader | None, context: Context) -> None:
    """Everything else that a model says."""
    for holder in [keys] + ([hf] if hf else []):
        if holder.has("task"):
            place, task = holder.path("task"), holder.take("task", str, "")
            if task in _TEXT_TASKS:
                context.report.note("dropped", place, "text generation is the only task there is")
            else:
                context.report.problem(
                    place,
                    f"only text-generation models can be fine-tuned and exported{did_you_mean(str(task), _TEXT_TASKS)} (found: {task!r})",
                )
    for key in ("model_loader", "model_script"):
        keys.refuse(key, _CODE)
    if keys.has("model_file_format"):
        place, form = keys.path("model_file_format"), keys.take("model_file_format", str, "")
        if form in _FORMATS:
            context.report.note("dropped", place, "the folder itself shows its format")
        else:
            context.report.problem(
                place,
                f"only Hugging Face and MLflow model folders can be read (found: {form!r}){did_you_mean(str(form), _FORMATS)}",
            )
    keys.drop_all(_DROPPED)
    if hf is None:
        return
    hf.drop_all({"feature": _FOUND, "model_class": _FOUND, "components": "only whole models are exported"})
    if hf.has("dataset"):
        place = hf.path("dataset")
        context.metric_data = context.free_name(_DATASET, context.data)
        context.report.note(
            "renamed", place, f"is data.{context.metric_data} now, what metrics without a data_config are measured on"
        )
        container = context.report.open({"type": "HuggingfaceContainer"}, place)
        data_config(context.metric_data, container, context, context.report.open(hf.take("dataset"), place))


def model_kwargs(holder: Reader, context: Context) -> dict[str, Any]:
    """Arguments of from_pretrained from load_kwargs, from_pretrained_args or model_loading_args, whichever is there."""
    name = holder.first("load_kwargs", "from_pretrained_args", "model_loading_args")
    if name is None:
        return {}
    place = holder.path(name)
    given = holder.take(name, dict, {})
    values = {
        **(given.get("extra_args") or {}),
        **{k: v for k, v in given.items() if k != "extra_args" and v is not None},
    }
    at = ("model", "model_kwargs")
    context.report.renamed(place, at)
    method = values.pop("quantization_method", None)
    if method is not None and str(method).lower() == "bitsandbytes":
        context.report.note("dropped", f"{place}.quantization_method", "quantization_config is bitsandbytes' own", at)
        if not isinstance(values.get("quantization_config"), dict):
            context.report.problem(f"{place}.quantization_config", "this key is needed beside quantization_method")
    elif method is not None:
        context.report.problem(
            f"{place}.quantization_method",
            f"only bitsandbytes is supported (found: {method!r}); give the model that was not quantized",
        )
    return values


def _model_type(path: str, folder: Path | None) -> str | None:
    """`model_type` in the config.json of a model folder on this disk."""
    if path.startswith("azureml:"):
        return None
    for place in [Path(path).expanduser()] + ([folder / path] if folder else []):
        try:
            return str(json.loads((place / "config.json").read_text(encoding="utf-8"))["model_type"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
