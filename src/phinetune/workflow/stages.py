"""phinetune's own passes: the stage functions under the names that workflow files use.

LoRA, QLoRA, DoRA, LoftQ          base model -> adapter     (finetune)
MergeAdapterWeights               adapter -> model          (merge)
TruncateAdapter                   adapter -> adapter        (truncate)
ModelBuilder, OnnxConversion, Rtn model, adapter -> ONNX    (export)
ExtractAdapters                   adapter -> ONNX + adapter (export_adapters)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from phinetune.config import STRICT
from phinetune.data.messages import DataConfig
from phinetune.errors import ConfigError
from phinetune.exporting.config import ExportConfig
from phinetune.lora.config import LoraConfig, parse_lora_config
from phinetune.systems.config import AcceleratorConfig, builder_provider
from phinetune.workflow.config import ONLY
from phinetune.workflow.passes import Pass, PassJob

_LORA_KEYS = tuple(f.name for f in dataclasses.fields(LoraConfig))


@dataclass(frozen=True)
class LoraPass:
    """LoRA and DoRA: the keys of LoraConfig, and these."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    data: str | None = None
    """Name of the data config to train on; default: the only one, or the one called train."""
    eval_data: str | None = None
    """Name of the data config to evaluate on; default: the held-out part of `data`."""
    training_config: dict[str, Any] = field(default_factory=dict)
    """Names of transformers.TrainingArguments."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Names of from_pretrained; they win over the workflow's model.model_kwargs."""
    peft_config: dict[str, Any] = field(default_factory=dict)
    """The names of PEFT's LoraConfig as a group; they may stand beside the other keys as well."""


@dataclass(frozen=True)
class QLoraPass:
    """QLoRA and LoftQ: LoRA over a base model held in 4 bits (Dettmers et al. 2023; Li et al. 2023)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    data: str | None = None
    """As for LoRA."""
    eval_data: str | None = None
    """As for LoRA."""
    training_config: dict[str, Any] = field(default_factory=dict)
    """As for LoRA."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """As for LoRA."""
    peft_config: dict[str, Any] = field(default_factory=dict)
    """As for LoRA."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit numbers: nf4 (normal float) or fp4."""
    double_quant: bool = True
    """Round the scales as well."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type of the products; default: the machine's best."""


@dataclass(frozen=True)
class MergePass:
    """MergeAdapterWeights: fold the adapter into its base."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    base: Literal["auto", "original", "dequantized"] = "auto"
    """For an adapter trained in 4 bits: the weights on disk, the rounded ones, or the ones that give the training's logits."""


@dataclass(frozen=True)
class TruncatePass:
    """TruncateAdapter: the best adapter of a lower rank (Eckart and Young 1936)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    r: int
    """The rank."""


@dataclass(frozen=True)
class ConversionPass:
    """OnnxConversion: the ONNX model in floating point."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the weights."""
    execution_provider: str = "cpu"
    """Where the model will run."""


@dataclass(frozen=True)
class RtnPass:
    """Rtn: int4 by rounding to the nearest."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights that share one scale."""
    symmetric: bool = True
    """No zero point per block."""
    execution_provider: str = "cpu"
    """Where the model will run."""


@dataclass(frozen=True)
class ExtractPass:
    """ExtractAdapters: an ONNX base and the adapter beside it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    format: Literal["onnx_adapter", "safetensors", "numpy"] = "onnx_adapter"
    """Format of the adapter's file."""
    precision: Literal["int4", "fp16", "fp32"] = "int4"
    """Precision of the base's weights."""


def choose_data(named: str | None, data: dict[str, DataConfig]) -> str:
    """The name of the data config to use. Raises ConfigError if it is not there, or not clear which is meant."""
    if named is not None:
        if named not in data:
            raise ConfigError(f"data: no data config is called {named!r} (there are: {', '.join(data) or 'none'})")
        return named
    if len(data) == 1:
        return next(iter(data))
    for usual in ("train", ONLY):
        if usual in data:
            return usual
    raise ConfigError(f"data: which one? (there are: {', '.join(data) or 'none'})", "name it in the pass: data: NAME")


def _flat_lora(values: dict[str, Any]) -> dict[str, Any]:
    """LoraConfig's keys, gathered in `peft_config`. Raises ConfigError for one that is given in both places."""
    flat = {key: value for key, value in values.items() if key in _LORA_KEYS}
    rest = {key: value for key, value in values.items() if key not in _LORA_KEYS}
    group = rest.get("peft_config") or {}
    if not flat or not isinstance(group, dict):  # what is no group is refused when the config is read
        return rest
    if twice := [key for key in flat if key in group]:
        raise ConfigError([f"{key} is given here and in peft_config" for key in twice])
    return {**rest, "peft_config": {**group, **flat}}


def _training(job: PassJob, preset: dict[str, Any]) -> dict[str, Any]:
    """The arguments of finetune for a LoRA pass."""
    config = job.config
    kwargs = {**job.model_kwargs, **config.model_kwargs}
    if isinstance(config, QLoraPass):
        options: dict[str, Any] = {
            "bnb_4bit_quant_type": config.quant_type,
            "bnb_4bit_use_double_quant": config.double_quant,
        }
        if config.compute_dtype:
            options["bnb_4bit_compute_dtype"] = config.compute_dtype
        kwargs["quantization_config"] = {"load_in_4bit": True, **options}
    training = dict(config.training_config)
    if job.seed is not None:
        training.setdefault("seed", job.seed)
    eval_data = {"eval_data": job.data[choose_data(config.eval_data, job.data)]} if config.eval_data else {}
    return {
        "model": job.input,
        "data": job.data[choose_data(config.data, job.data)],
        "training_config": training,
        "peft_config": {**preset, **config.peft_config},
        "model_kwargs": kwargs,
        **eval_data,
    }


def _lora(preset: dict[str, Any], config: type) -> Pass:
    """A pass of the LoRA family; `preset` are the values of LoraConfig that make it that member."""

    def run(job: PassJob, folder: Path) -> None:
        from phinetune.workflow.finetune import finetune

        finetune(**_training(job, preset), output_dir=folder, overwrite=True, on_event=job.on_event)

    def check(job: PassJob) -> None:
        from phinetune.training.config import read_training_config

        problems = []
        for read in (
            lambda: parse_lora_config({**preset, **job.config.peft_config}, ""),
            lambda: read_training_config(job.config.training_config, lambda event: None),
        ):
            try:
                read()
            except ConfigError as error:
                problems += [problem.removeprefix(".") for problem in error.problems]
        if problems:
            raise ConfigError(problems)

    return Pass(
        run, config, ("hf",), "adapter", whole=True, data=("data", "eval_data"), gather=_flat_lora, known=_LORA_KEYS, check=check
    )  # fmt: skip


def _merge(job: PassJob, folder: Path) -> None:
    from phinetune.workflow.merge import merge

    trust = bool(job.model_kwargs.get("trust_remote_code", False))
    merge(job.input, folder, base=job.config.base, trust_remote_code=trust, overwrite=True, on_event=job.on_event)


def _truncate(job: PassJob, folder: Path) -> None:
    from phinetune.workflow.truncate import truncate

    truncate(job.input, folder, job.config.r, overwrite=True, on_event=job.on_event)


def _export(config_of: Callable[[Any], ExportConfig]) -> Callable[[PassJob, Path], None]:
    def run(job: PassJob, folder: Path) -> None:
        from phinetune.workflow.export import export

        config, trust = config_of(job.config), bool(job.model_kwargs.get("trust_remote_code", False))
        if config.max_drop is None:  # what is lost is for the workflow's evaluators and goals to judge
            config = replace(config, max_drop="any")
        export(job.input, folder, config, trust_remote_code=trust, overwrite=True, on_event=job.on_event)

    return run


def _exporter(config: type, config_of: Callable[[Any], ExportConfig]) -> Pass:
    def check(job: PassJob) -> None:
        from phinetune.exporting.build import check_builder

        check_builder()
        config_of(job.config)

    def for_target(target: AcceleratorConfig) -> dict[str, Any]:
        return {"execution_provider": builder_provider(target.execution_provider)} if target.execution_provider else {}

    return Pass(_export(config_of), config, ("hf", "adapter"), "onnx", whole=True, check=check, for_target=for_target)


def _conversion(config: ConversionPass) -> ExportConfig:
    values: dict[str, Any] = asdict(config)
    return ExportConfig(**values)


def _rtn(config: RtnPass) -> ExportConfig:
    values: dict[str, Any] = asdict(config)
    return ExportConfig(precision="int4", algorithm="rtn", **values)


def _extract(job: PassJob, folder: Path) -> None:
    from phinetune.workflow.export_adapters import export_adapters

    wanted = [] if job.config.format == "onnx_adapter" else [job.config.format]
    export_adapters(
        [job.input],
        folder,
        {"precision": job.config.precision},
        formats=["onnx_adapter", *wanted],
        overwrite=True,
        on_event=job.on_event,
    )


PASSES: dict[str, Pass] = {
    "LoRA": _lora({}, LoraPass),
    "QLoRA": _lora({}, QLoraPass),
    "DoRA": _lora({"use_dora": True}, LoraPass),
    "LoftQ": _lora({"init_lora_weights": "loftq"}, QLoraPass),
    "TruncateAdapter": Pass(_truncate, TruncatePass, ("adapter",), "adapter", whole=True),
    "MergeAdapterWeights": Pass(_merge, MergePass, ("adapter",), "hf", whole=True),
    "ModelBuilder": _exporter(ExportConfig, lambda config: config),
    "OnnxConversion": _exporter(ConversionPass, _conversion),
    "Rtn": _exporter(RtnPass, _rtn),
    "ExtractAdapters": Pass(_extract, ExtractPass, ("adapter",), "onnx", whole=True),
}
"""phinetune's own passes by the names of workflow files."""

REFUSED: dict[str, str] = {
    "Gptq": "int4 is rounded to nearest so far; use ModelBuilder with precision: int4",
    "LoHa": "only low-rank sums are supported; use LoRA",
    "LoKr": "only low-rank sums are supported; use LoRA",
}
"""Passes that are known and not there, with what to do instead."""
