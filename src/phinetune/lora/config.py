"""`LoraConfig`: the names of PEFT's `LoraConfig`, as far as they are supported; the rest is refused by name, never ignored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from phinetune.config import STRICT, parse
from phinetune.errors import ConfigError


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get low-rank factors, and of what size."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    r: int = 16
    """Rank of the factors: lora_A is (r, in), lora_B is (out, r)."""
    lora_alpha: float = 32
    """The low-rank product is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the input of the low-rank path, 0 to below 1."""
    target_modules: str | list[str] = "all-linear"
    """Names or name endings of the layers, a regular expression for the whole name, or "all-linear": every linear layer but the output head."""
    exclude_modules: str | list[str] | None = None
    """Names, name endings or a regular expression of layers to leave out."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023)."""
    bias: Literal["none"] = "none"
    """Biases stay frozen."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """Kind of model."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError("r must be at least 1")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError("lora_dropout must be at least 0 and below 1")
        if self.lora_alpha <= 0:
            raise ValueError("lora_alpha must be above 0")
        if not self.target_modules:
            raise ValueError("target_modules must name at least one layer")


# PEFT's other keys (0.21) with the values that mean "not used": accepted as such, refused with any other value.
_NOT_USED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": (None, {}),
    "arrow_config": (None,),
    "auto_mapping": (None,),
    "corda_config": (None,),
    "ensure_weight_tying": (False,),
    "eva_config": (None,),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "layers_pattern": (None,),
    "layers_to_transform": (None,),
    "loftq_config": (None, {}),
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "rank_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# Keys that describe a saved adapter and change nothing about the layers.
_DESCRIPTIVE = (
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)


def parse_lora_config(
    values: dict[str, Any] | LoraConfig | None, path: str = "peft_config", saved: bool = False
) -> LoraConfig:
    """A LoraConfig from PEFT's names. Raises ConfigError for unknown keys, wrong values, and PEFT features that are not supported.

    With `saved`, the values describe an adapter that exists: how its factors began and what wrapped the model no longer matter.
    """
    if isinstance(values, LoraConfig):
        return values
    if values is not None and not isinstance(values, dict):
        values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    kept, problems = {}, []
    if saved and values:
        begun = values.get("init_lora_weights") in (True, False, None, "gaussian")
        passed = {
            "auto_mapping",
            *(["init_lora_weights"] if begun else []),
            *(["task_type"] if not values.get("task_type") else []),
        }
        values = {k: v for k, v in values.items() if k not in passed}
    for key, value in (values or {}).items():
        if isinstance(value, set | tuple):
            value = sorted(value)
        if key in _NOT_USED:
            if not any(value is off or value == off for off in _NOT_USED[key]):
                problems.append(f"{path}.{key}: not supported yet (found: {value!r})")
        elif key not in _DESCRIPTIVE:
            kept[key] = getattr(value, "value", value)
    if (
        str(getattr((values or {}).get("peft_type", "LORA"), "value", (values or {}).get("peft_type", "LORA"))).upper()
        != "LORA"
    ):
        problems.append(f"{path}.peft_type: only LORA is supported (found: {(values or {})['peft_type']!r})")
    try:
        config = parse(LoraConfig, kept, path)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return config
