"""`LoraConfig`: the names of PEFT's `LoraConfig`, as far as they are supported; the rest is refused by name, never ignored.

Checked here, without any library, so that `phinetune.lora` needs torch and safetensors only.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from phinetune.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get low-rank factors, and of what size. Raises ConfigError with every wrong value."""

    r: int = 16
    """Rank of the factors: lora_A is (r, in), lora_B is (out, r)."""
    lora_alpha: float = 32
    """The low-rank product is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the input of the low-rank path, 0 to below 1."""
    target_modules: str | list[str] = "all-linear"
    """Names or name endings of the layers, a regular expression for the whole name, or "all-linear": every linear layer but the output head. The slices of a fused layer (q_proj of a qkv_proj) may be named as if they were layers, and a fused layer (qkv_proj) where the model has its parts only."""
    exclude_modules: str | list[str] | None = None
    """Names, name endings or a regular expression of layers to leave out."""
    layers_to_transform: int | list[int] | None = None
    """Numbers of the decoder layers (or blocks) to adapt; all of them if left out."""
    layers_pattern: str | list[str] | None = None
    """Name of the list that layers_to_transform counts in (layers, h, blocks); any numbered list if left out."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Name, name ending or regular expression of layers -> another rank for them."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Name, name ending or regular expression of layers -> another lora_alpha for them."""
    modules_to_save: list[str] | None = None
    """Names or name endings of modules that are trained whole and saved with the adapter."""
    fused_modules: dict[str, dict[str, int]] = field(default_factory=dict)
    """Name ending of a fused layer -> names and widths of its slices, in the order of its rows; not needed for Phi-3, GLM and GPT-2."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained: none, all of the model, or those of the targeted layers."""
    fan_in_fan_out: bool = False
    """Weights are stored (in, out), as in GPT-2's Conv1D; found out by itself."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Also train the length of each output's weights (DoRA, Liu et al. 2024)."""
    init_lora_weights: bool | str = True
    """How the factors start: true (no change at first), false (random), "gaussian", "pissa", "pissa_niter_N" (Meng et al. 2024), "olora" (Büyükakyüz 2024), "loftq" (Li et al. 2023: along what 4 bits took from the weight; needs a 4-bit base)."""
    loftq_config: dict[str, int] = field(default_factory=dict)
    """For "loftq": loftq_bits (4) and loftq_iter (1); may be left out."""
    loraplus_lr_ratio: float | None = None
    """Learning rate of lora_B over that of lora_A (LoRA+, Hayou et al. 2024); the same for both if left out."""
    task_type: Literal["CAUSAL_LM"] | None = "CAUSAL_LM"
    """Kind of model; null for anything but a language model."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, set | tuple | range):
                object.__setattr__(self, name, sorted(value))
        loftq: Any = self.loftq_config
        if dataclasses.is_dataclass(loftq) and not isinstance(loftq, type):  # PEFT's LoftQConfig
            object.__setattr__(self, "loftq_config", dataclasses.asdict(loftq))
        for name in ("rank_pattern", "alpha_pattern", "fused_modules", "loftq_config"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, {})
        given: Any = self.r
        if isinstance(given, float) and given.is_integer():
            object.__setattr__(self, "r", int(given))
        if problems := [f"{key}: {text}" for key, text in _problems(self)]:
            raise ConfigError(problems)

    def rank_of(self, name: str) -> int:
        """The rank of the layer called `name`."""
        return int(_by_pattern(self.rank_pattern, name, self.r))

    def alpha_of(self, name: str) -> float:
        """The alpha of the layer called `name`."""
        return float(_by_pattern(self.alpha_pattern, name, self.lora_alpha))

    def scaling_of(self, name: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA."""
        r = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(r) if self.use_rslora else r)


def as_pattern(name: str) -> str:
    """A layer's name as a key of `rank_pattern`: letters, dots and dashes as they are, anything else escaped."""
    return name if re.fullmatch(r"[\w.\-]*", name) else re.escape(name)


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that `name` ends in. PEFT's rule."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), default)


def _problems(c: LoraConfig) -> list[tuple[str, str]]:
    """(key, what is wrong with its value) of everything that can be seen without a model."""
    texts = (str, list)
    checks = [
        ("r", _whole(c.r) and c.r >= 1, "r must be at least 1, a whole number"),
        ("lora_alpha", _number(c.lora_alpha) and c.lora_alpha > 0, "lora_alpha must be a number above 0"),
        ("lora_dropout", _number(c.lora_dropout) and 0 <= c.lora_dropout < 1, "lora_dropout must be at least 0 and below 1"),
        ("target_modules", _names(c.target_modules) and bool(c.target_modules), "target_modules must name at least one layer"),
        ("exclude_modules", c.exclude_modules is None or _names(c.exclude_modules), "must be a text or a list of texts"),
        ("layers_to_transform", c.layers_to_transform is None or _layer_numbers(c.layers_to_transform), "must be a layer's number or a list of them, from 0"),
        ("layers_pattern", not c.layers_pattern or _names(c.layers_pattern), "must be a text or a list of texts"),
        ("layers_pattern", not c.layers_pattern or c.layers_to_transform is not None, "needs layers_to_transform"),
        ("layers_to_transform", c.layers_to_transform is None or not isinstance(c.target_modules, str) or c.target_modules == "all-linear", "cannot go with a regular expression; put the numbers into the expression"),
        ("modules_to_save", c.modules_to_save is None or (isinstance(c.modules_to_save, list) and _names(c.modules_to_save)), "must be a list of names"),
        ("bias", c.bias in ("none", "all", "lora_only"), 'must be "none", "all" or "lora_only"'),
        ("task_type", c.task_type in ("CAUSAL_LM", None), 'must be "CAUSAL_LM", or null for a model that is no language model'),
        ("init_lora_weights", isinstance(c.init_lora_weights, bool) or _start_is_known(c.init_lora_weights), 'must be true, false, "gaussian", "pissa", "pissa_niter_N", "olora" or "loftq"'),
        ("loraplus_lr_ratio", c.loraplus_lr_ratio is None or (_number(c.loraplus_lr_ratio) and c.loraplus_lr_ratio > 0), "must be a number above 0"),
        *((k, isinstance(getattr(c, k), bool), "must be true or false") for k in ("fan_in_fan_out", "use_rslora", "use_dora")),
    ]  # fmt: skip
    found = [(key, f"{text} (found: {getattr(c, key)!r})") for key, good, text in checks if not good]
    for key, is_good, text in (
        ("rank_pattern", lambda v: _whole(v) and v >= 1, "must be a whole number, at least 1"),
        ("alpha_pattern", lambda v: _number(v) and v > 0, "must be a number above 0"),
        ("fused_modules", _is_slices, "must be the names and widths of at least two slices"),
    ):
        values = getattr(c, key)
        if not isinstance(values, dict):
            found.append((key, f"must be names and values (found: {values!r})"))
            continue
        found += [(f"{key}.{k}", f"{text} (found: {v!r})") for k, v in values.items() if not is_good(v)]
        found += [(f"{key}.{k}", "is not a regular expression") for k in values if not _is_pattern(str(k))]
    for key in ("target_modules", "exclude_modules"):
        value = getattr(c, key)
        if isinstance(value, str) and not _is_pattern(value):
            found.append((key, f'"{value}" is not a regular expression; give a list of names instead'))
        if isinstance(value, texts) and isinstance(value, list) and "" in value:
            found.append((key, "an empty name matches nothing"))
    return found + _loftq_problems(c)


def _loftq_problems(c: LoraConfig) -> list[tuple[str, str]]:
    """As `_problems`, of `loftq_config`."""
    given: Any = c.loftq_config
    if not isinstance(given, dict):
        return [("loftq_config", f"must be names and values (found: {given!r})")]
    if given and c.init_lora_weights != "loftq":
        return [("loftq_config", f'needs init_lora_weights: "loftq" (found: {c.init_lora_weights!r})')]
    known = {
        "loftq_bits": (4, "only 4 bits are supported"),
        "loftq_iter": (1, "only 1 iteration is supported: each further one changes the base's own weights"),
    }
    found = [(f"loftq_config.{k}", f"unknown key{did_you_mean(str(k), known)}") for k in given if k not in known]
    found += [(f"loftq_config.{k}", f"{text} (found: {given[k]!r})") for k, (only, text) in known.items() if k in given and not (_whole(given[k]) and given[k] == only)]  # fmt: skip
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _layer_numbers(value: Any) -> bool:
    return all(_whole(v) and v >= 0 for v in (value if isinstance(value, list) else [value])) and value != []


def _start_is_known(value: Any) -> bool:
    return (
        isinstance(value, str) and re.fullmatch(r"gaussian|pissa|pissa_niter_[1-9]\d*|olora|loftq", value) is not None
    )


def _is_slices(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 1 and all(_whole(w) and w >= 1 for w in value.values())


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


# PEFT's other keys (0.21): accepted where they are off (null, false, empty), refused with any other value.
_NOT_USED = {
    "alora_invocation_tokens",
    "arrow_config",
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
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

    With `saved`, the values describe an adapter that exists: what wrapped the model no longer matters, nor how the factors began unless
    the base model was changed by it.
    """
    if isinstance(values, LoraConfig):
        return values
    if values is not None and not isinstance(values, dict):
        values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    given = {k: getattr(v, "value", v) for k, v in (values or {}).items()}
    known = [f.name for f in dataclasses.fields(LoraConfig)]
    problems = []
    if str(given.get("peft_type") or "LORA").upper() != "LORA":
        problems.append(f"{path}.peft_type: only LORA is supported (found: {given['peft_type']!r})")
    if saved:
        if given.get("init_lora_weights") == "loftq":
            problems.append(f"{path}.init_lora_weights: the adapter was saved beside a base model changed by LoftQ")
        given = _as_saved(given)
    for key, value in given.items():
        if key in _NOT_USED:
            if not (value is None or value is False or value in ([], {})):
                problems.append(f"{path}.{key}: not supported yet (found: {value!r})")
        elif (
            key not in known and key not in _DESCRIPTIVE and not (saved and (value in (None, [], {}) or value is False))
        ):
            problems.append(f"{path}.{key}: unknown key{did_you_mean(key, known)}")
    patterns = given.get("alpha_pattern")
    if not saved and isinstance(patterns, dict):
        fractions = {k: v for k, v in patterns.items() if not _whole(v)}
        problems += [f"{path}.alpha_pattern.{k}: must be a whole number (found: {v!r})" for k, v in fractions.items()]
    config = None
    try:
        values_known: dict[str, Any] = {k: v for k, v in given.items() if k in known}
        config = LoraConfig(**values_known)
    except ConfigError as error:
        problems += [f"{path}.{p}" for p in error.problems]
    if problems or config is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def _as_saved(given: dict[str, Any]) -> dict[str, Any]:
    """A saved adapter's values without those that only mattered while it was made."""
    passed = {"auto_mapping"}
    start = given.get("init_lora_weights")
    if not (isinstance(start, str) and start.startswith(("pissa", "olora"))) and start in (
        *(True, False, None, "gaussian", "eva", "orthogonal"),
    ):
        passed.add("init_lora_weights")
    return {"r": 8, "lora_alpha": 8, **{k: v for k, v in given.items() if k not in passed}}  # PEFT's own defaults
