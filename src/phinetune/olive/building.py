"""Olive's passes behind training: ModelBuilder, OnnxConversion, ExtractAdapters and Rtn with the names that the native passes have."""

from __future__ import annotations

from typing import Any

from phinetune.errors import did_you_mean
from phinetune.olive.context import Context
from phinetune.olive.reader import Reader, dotted
from phinetune.olive.spaces import Setting, read_settings

_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
_SINCE = "0.12.0"
_INT4 = (
    Setting("block_size", ("int4_block_size",), (32, 64, 128), _SINCE),
    Setting("symmetric", ("int4_is_symmetric",), (True, False), _SINCE),
    Setting("algorithm", ("int4_algo_config",), ("default", "rtn", "k_quant_mixed", "k_quant_last"), _SINCE),
)
_BUILDER = (
    Setting("accuracy_level", ("int4_accuracy_level",)),
    Setting("op_types_to_quantize", ("int4_op_types_to_quantize",), plural=True),
    Setting("nodes_to_exclude", ("int4_nodes_to_exclude",), plural=True),
    *(
        Setting(name)
        for name in (
            "exclude_embeds", "exclude_lm_head", "include_hidden_states", "enable_cuda_graph", "use_qdq", "use_8bits_moe",
            "use_webgpu_fp32", "use_cuda_bf16",
        )
    ),
)  # fmt: skip
_FILES = "model.onnx has its weights beside it in model.onnx.data"
_EXTERNAL = dict.fromkeys(
    ("save_as_external_data", "all_tensors_to_one_file", "external_data_name", "size_threshold", "convert_attribute"),
    _FILES,
)
_GRAPH = "the exporter decides it"
_CONVERSION = dict.fromkeys(("target_opset", "use_dynamo_exporter", "device", "use_device", "parallel_jobs", "merge_components", "save_metadata_for_token_generation", "past_key_value_name", "optimize", "dynamic", "script_dir", "user_script"), _GRAPH)  # fmt: skip
_ALWAYS = "adapters are always written on their own"
_EXTRACTION = dict.fromkeys(("make_inputs", "pack_inputs", "dynamic_lora_r", "optional_inputs"), _ALWAYS)
_FORMATS = ("onnx_adapter", "safetensors", "numpy")


def model_builder(keys: Reader, at: tuple[str, ...], context: Context, disabled: bool) -> dict[str, Any]:
    """The native keys of a ModelBuilder (or GenAIModelExporter) pass."""
    place = keys.path("precision")
    if not keys.has("precision"):
        context.report.problem(place, "this key is needed")
    values = read_settings((Setting("precision"),), keys, at, context, disabled)
    precision = values.get("precision")
    if isinstance(precision, str) and precision not in _PRECISIONS:
        text = f"must be one of {', '.join(_PRECISIONS)}{did_you_mean(precision, _PRECISIONS)} (found: {precision!r})"
        context.report.problem(place, text)
    values |= read_settings(_INT4, keys, at, context, disabled or precision != "int4")
    values |= read_settings(_BUILDER, keys, at, context, disabled)
    if keys.has("metadata_only"):
        place = keys.path("metadata_only")
        if keys.take("metadata_only", bool, False):
            context.report.problem(
                place,
                "an ONNX model made elsewhere cannot be given its configuration here; build it from the Hugging Face model",
            )
        else:
            context.report.note("dropped", place, "model and configuration are always built together")
    for name in ("search", "extra_options"):
        if keys.has(name):
            values[name] = keys.take(name, dict)
    keys.drop_all({**_EXTERNAL, "enable_GQA_on_CPU": "attention is grouped where the runtime can"})
    return values


def onnx_conversion(keys: Reader, at: tuple[str, ...], context: Context, disabled: bool) -> dict[str, Any]:
    """The native keys of an OnnxConversion pass; merge_adapter_weights is read by whoever orders the passes."""
    values: dict[str, Any] = {}
    if keys.has("torch_dtype"):
        place, dtype = keys.path("torch_dtype"), keys.take("torch_dtype", str, "")
        precisions = {"float32": "fp32", "float16": "fp16"}
        if dtype in precisions:
            context.report.note(
                "renamed", place, f"is {dotted(at)}.precision {precisions[dtype]} now", (*at, "precision")
            )
            values["precision"] = precisions[dtype]
        else:
            context.report.problem(
                place, f"must be float32 or float16{did_you_mean(dtype, precisions)} (found: {dtype!r})"
            )
    keys.drop_all({**_CONVERSION, **_EXTERNAL})
    return values


def extract_adapters(keys: Reader, at: tuple[str, ...], context: Context, disabled: bool) -> dict[str, Any]:
    """The native keys of an ExtractAdapters pass."""
    report = context.report
    keys.drop_all({**_EXTRACTION, **_EXTERNAL})
    if keys.has("adapter_type"):
        place, kind = keys.path("adapter_type"), keys.take("adapter_type", str, "")
        if kind in ("lora", "dora"):
            report.note("dropped", place, "the adapter itself says it")
        else:
            report.problem(place, f"only lora and dora adapters can be extracted (found: {kind!r})")
    place, target = keys.path("save_format"), (*at, "format")
    form = keys.take("save_format", str)
    if form is None:
        form = "onnx_adapter" if context.era.since("0.8.0") else "numpy"
        report.note("default", place, f"not given: {form}, as in Olive {context.era.release}", target)
    elif form in _FORMATS:
        report.renamed(place, target)
    else:
        hint = (
            "; safetensors holds the same without Python code in it" if form == "pt" else did_you_mean(form, _FORMATS)
        )
        report.problem(place, f"must be one of {', '.join(_FORMATS)}{hint} (found: {form!r})")
    return {"format": form}


def rtn(keys: Reader, at: tuple[str, ...], context: Context, disabled: bool) -> dict[str, Any]:
    """The native keys of an Rtn pass (4 bits, block by block)."""
    report = context.report
    if keys.has("bits"):
        place, bits = keys.path("bits"), keys.take("bits", int, 4)
        if bits == 4:
            report.note("dropped", place, "it is 4 always")
        else:
            report.problem(place, f"only 4 bits are supported; for 8, ModelBuilder with precision int8 (found: {bits})")
    for key in ("only_lm_head", "overrides", "modules_to_not_convert", "embeds", "moe", "quantize_vision", "lm_head"):
        if keys.has(key) and keys.take(key):
            report.problem(keys.path(key), "the builder quantizes all that it quantizes alike; leave it out")
        elif keys.has(key):
            report.note("dropped", keys.path(key), "it is what happens anyway")
    values = read_settings(
        (Setting("block_size", ("group_size",)), Setting("symmetric", ("sym",))), keys, at, context, disabled
    )
    missing = {k: v for k, v in {"block_size": 128, "symmetric": False}.items() if k not in values}
    if missing:
        text = ", ".join(f"{k} {str(v).lower()}" for k, v in missing.items())
        report.note("default", keys.groups[0].path, f"not given: {text}, as in Olive", at)
    return values | missing
