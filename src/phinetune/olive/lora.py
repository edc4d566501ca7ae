"""Olive's LoRA, QLoRA, LoftQ and DoRA passes: adapter, data and training, with the defaults of the file's era written out."""

from __future__ import annotations

from typing import Any

from phinetune.olive.context import Context
from phinetune.olive.data import data_reference
from phinetune.olive.eras import SUMMER
from phinetune.olive.reader import Reader, dotted
from phinetune.olive.spaces import Setting, read_settings
from phinetune.olive.training import training_config

_SETTINGS = (
    Setting("r", ("r", "lora_r"), (16, 32, 64), SUMMER),
    Setting("lora_alpha", ("alpha", "lora_alpha")),
    Setting("lora_dropout"),
    Setting("bias"),
    Setting("target_modules", plural=True),
    Setting("modules_to_save", plural=True),
)
_FOUR_BIT = (Setting("quant_type"), Setting("double_quant"), Setting("compute_dtype"))
TARGETS = {
    **{kind: ["q_proj", "v_proj"] for kind in ("llama", "llama4", "mistral", "mixtral", "stablelm", "opt", "gptj", "gpt_neo")},
    **{kind: ["q_proj", "v_proj"] for kind in ("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3")},
    **{kind: ["query_key_value"] for kind in ("falcon", "bloom", "gpt_neox", "chatglm", "RefinedWeb", "RefinedWebModel")},
    **{kind: ["c_attn"] for kind in ("gpt2", "gpt_bigcode")},
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "phi3": ["o_proj", "qkv_proj"],
    "mpt": ["Wqkv"],
    "codegen": ["qkv_proj"],
    "btlm": ["c_proj", "c_attn"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
}  # fmt: skip
"""`model_type` of a model's config -> the modules that PEFT adapts where none are named, and Olive's own row for phi3."""
_ONE_TRAINER = "there is one trainer"
_DROPPED = {
    "use_ort_trainer": _ONE_TRAINER,
    "ortmodule_onnx_opset_version": _ONE_TRAINER,
    "ephemeral_gpu_offload": "it is an option of PEFT's own layers",
    "save_quant_config": "the adapter says which base it was trained on, and a merge takes the one that is asked for",
    "loftq_iter": "one round of LoftQ is made",
    "user_script": "no Python code of the file is run",
    "script_dir": "no Python code of the file is run",
}
_TENTH = 0.1


def lora(kind: str, keys: Reader, at: tuple[str, ...], context: Context, disabled: bool = False) -> dict[str, Any]:
    """The native keys of a pass of `kind` (LoRA, QLoRA, LoftQ, DoRA), type excepted."""
    report = context.report
    values = _data(keys, at, context)
    values |= read_settings(_SETTINGS, keys, at, context, disabled)
    bits = kind in ("QLoRA", "LoftQ")
    if bits and values.get("target_modules"):
        report.note(
            "changed",
            keys.path("target_modules"),
            f"counts here; Olive's {kind} adapted every linear layer all the same",
            (*at, "target_modules"),
        )
    own = _FOUR_BIT if kind == "QLoRA" else _FOUR_BIT[2:] if kind == "LoftQ" else ()
    values |= read_settings(own, keys, at, context, disabled)
    for setting in _FOUR_BIT[: len(_FOUR_BIT) - len(own)]:
        keys.drop(
            setting.native,
            f"{kind} has no such setting, and never had: {'its quantization is fixed' if bits else 'its base stays in full precision'}",
        )
    values |= _defaults(kind, values, keys, at, context)
    if "target_modules" not in values:
        where = (
            "the input model's type is not known before it is loaded"
            if context.model_type is None
            else f"PEFT names none for {context.model_type}"
        )
        report.note(
            "default",
            keys.path("target_modules"),
            f"not given, and {where}: every linear layer is adapted (Olive: PEFT's choice for the model's type)",
            at,
        )
    keys.drop_all(_DROPPED)
    kwargs = _loading(kind, keys, at, context)
    training = training_config(kind, keys, at, context, _held_out(values, context))
    if keys.has("allow_tf32"):
        report.renamed(keys.path("allow_tf32"), (*at, "training_config", "tf32"))
        training.setdefault("tf32", keys.take("allow_tf32", bool))
    _seed(values, training, context)
    return values | ({"model_kwargs": kwargs} if kwargs else {}) | {"training_config": training}


def _data(keys: Reader, at: tuple[str, ...], context: Context) -> dict[str, Any]:
    """data and eval_data, and the share that is held out."""
    report = context.report
    values: dict[str, Any] = {}
    for key, native in (("train_data_config", "data"), ("eval_data_config", "eval_data")):
        if keys.has(key):
            place = keys.path(key)
            report.renamed(place, (*at, native))
            if (name := data_reference(keys, key, f"{at[1]}_{native}", context)) is not None:
                values[native] = name
                if context.data[name] is None:
                    report.problem(place, f"nothing can be learned from the random rows of {name!r}")
        elif native == "data":
            report.problem(keys.path(key), "this key is needed")
    share = 0.0
    if keys.has("eval_dataset_size"):
        place, size = keys.path("eval_dataset_size"), keys.take("eval_dataset_size", (int, float), 0)
        target = ("data", str(values.get("data")), "test_fraction")
        if "eval_data" in values:
            report.note("dropped", place, "eval_data_config comes first")
        elif size >= 1:
            share = _TENTH
            report.note(
                "changed",
                place,
                f"{size} sequences cannot be held out by their number; a tenth of the rows is: set {dotted(target)}",
                target,
            )
        elif size > 0:
            share = float(size)
            report.note(
                "changed",
                place,
                f"is {dotted(target)} now: a share of the rows, drawn with data_seed before they are joined",
                target,
            )
        else:
            report.problem(place, f"must be above 0 (found: {size})")
    if "data" in values:
        before = context.trained_on.get(values["data"], share)
        if before != share:
            report.problem(
                keys.path("eval_dataset_size"),
                f"another pass holds out {before:g} of the same data config; use one share, or two data configs",
            )
        context.trained_on[values["data"]] = share
    return values


def _held_out(values: dict[str, Any], context: Context) -> bool:
    return "eval_data" in values or context.trained_on.get(values.get("data", ""), 0.0) > 0


def _defaults(kind: str, values: dict[str, Any], keys: Reader, at: tuple[str, ...], context: Context) -> dict[str, Any]:
    """What Olive took for the keys that are not given, said in one note."""
    era = context.era
    usual: dict[str, Any] = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.05 if era.since(SUMMER) else 0.0}
    if kind == "QLoRA":
        usual |= {"quant_type": "nf4", "double_quant": not era.since("0.4.0")}
    if kind in ("QLoRA", "LoftQ"):
        usual |= {"double_quant": False} if kind == "LoftQ" else {}
        usual |= {"target_modules": "all-linear"}
        usual |= {"compute_dtype": keys.take("torch_dtype", str) if keys.has("torch_dtype") else "bfloat16"}
    elif context.model_type in TARGETS:
        usual |= {"target_modules": TARGETS[context.model_type]}
    missing = {key: value for key, value in usual.items() if key not in values}
    if missing:
        place = keys.groups[0].path
        context.report.note("default", place, f"not given: {shown(missing)}, as in Olive {era.release}", at)
    return missing


def shown(values: dict[str, Any]) -> str:
    """Names and values in one line."""
    return ", ".join(f"{key} {str(v).lower() if isinstance(v, bool) else v}" for key, v in values.items())


def _loading(kind: str, keys: Reader, at: tuple[str, ...], context: Context) -> dict[str, Any]:
    """model_kwargs of the pass: dtype and device map."""
    report = context.report
    kwargs: dict[str, Any] = {}
    target = (*at, "model_kwargs", "torch_dtype")
    place, dtype = keys.path("torch_dtype"), keys.take("torch_dtype", str)
    if dtype == "float16":
        report.note(
            "changed",
            place,
            "weights are float32, as Olive's were for float16; there is no mixed float16 training",
            target,
        )
        kwargs["torch_dtype"] = "float32"
    elif dtype is not None:
        report.renamed(place, target)
        kwargs["torch_dtype"] = dtype
    else:
        report.note("default", place, "not given: bfloat16, as in Olive", target)
        kwargs["torch_dtype"] = "bfloat16"
    if keys.has("device_map"):
        place, device = keys.path("device_map"), keys.take("device_map")
        if device == "current_device":
            report.note("dropped", place, "one process uses one device")
        else:
            report.renamed(place, (*at, "model_kwargs", "device_map"))
            kwargs["device_map"] = device
    return kwargs


def _seed(values: dict[str, Any], training: dict[str, Any], context: Context) -> None:
    """The seed that drew the held-out sequences draws the held-out rows."""
    name = values.get("data")
    config = context.data.get(name) if name else None
    if config is not None and context.trained_on.get(str(name)):
        config["seed"] = training.get("data_seed", 42)
