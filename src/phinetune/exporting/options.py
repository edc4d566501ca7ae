"""What the installed model builder can do, and which options cannot be: found before the long work begins, said in one error.

The builder passes over names that it does not know and builds some combinations into models that do not load, so its own source is
asked what it knows, and its known traps are listed here. Not here: whether an option took effect (`verify.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from phinetune.errors import ConfigError, did_you_mean
from phinetune.exporting.config import OURS, ExportConfig

BUILDER_NAMES = {"symmetric": "is_symmetric", "algorithm": "algo_config"}
"""Our fields that have another name in the builder."""
_QUANTIZATION = ("block_size", "symmetric", "accuracy_level", "algorithm", "op_types_to_quantize", "nodes_to_exclude")
_FLAGS_OF_INTEGERS = ("use_qdq", "use_8bits_moe", "use_cuda_bf16")
_REFUSED = {
    "adapter_path": "adapters are exported by export_adapters",
    "hf_remote": "foreign code runs with trust_remote_code only",
    "hf_token": "nothing is fetched while building",
    "num_hidden_layers": "a model cut off in the middle is not the model",
    "config_only": "settings are written together with their model",
    "filename": "the graph is called model.onnx",
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_SEARCH: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("do_sample", "early_stopping", "past_present_share_buffer"), bool),
    **dict.fromkeys(("max_length", "min_length", "no_repeat_ngram_size", "num_beams", "num_return_sequences"), int),
    **dict.fromkeys(("batch_size", "chunk_size", "random_seed", "top_k"), int),
    **dict.fromkeys(
        ("diversity_penalty", "length_penalty", "repetition_penalty", "temperature", "top_p"), (int, float)
    ),
}


@dataclass(frozen=True)
class Builder:
    """What the source of a model builder says that it knows."""

    prefix: str
    """Before the names of the quantization options: `int4_` in onnxruntime-genai 0.11, the last one for Python 3.10."""
    precisions: tuple[str, ...]
    algorithms: frozenset[str]
    options: frozenset[str]
    architectures: frozenset[str] = frozenset()
    """Empty where its source does not say."""
    reads_local_theta: bool = False
    """Takes Gemma 3's second rotary base from `rope_local_base_freq`, which transformers 5 has not."""

    @property
    def shares_integers(self) -> bool:
        """Input and output embedding of a model that ties them become one integer tensor, whatever the algorithm."""
        return not self.prefix


@functools.cache
def installed_builder() -> Builder:
    """The builder of the installed onnxruntime-genai."""
    package = importlib.util.find_spec("onnxruntime_genai")
    return read_builder(Path(package.origin or "").parent / "models" if package else Path("missing"))


def read_builder(folder: Path) -> Builder:
    """What the builder whose source is in `folder` knows."""
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.py"))]
    whole = "\n".join(texts)
    choices = re.search(r'"--precision".*?choices=\[(.*?)\]', whole, re.DOTALL)
    names = {
        *re.findall(r'(?:extra_options|kv_pairs)(?:\.get\(|\.pop\(|\[)\s*"(\w+)"', whole),
        *re.findall(r'"(\w+)" (?:not )?in (?:self\.)?(?:extra_options|kv_pairs)', whole),
        *(name for part in re.findall(r"bools = \[(.*?)\]", whole, re.DOTALL) for name in re.findall(r'"(\w+)"', part)),
    }
    known = ("rtn", "rtn_last", "k_quant", "k_quant_last", "k_quant_mixed", "k_quant_linear")
    return Builder(
        "int4_" if '"int4_is_symmetric"' in whole else "",
        tuple(re.findall(r'"(\w+)"', choices[1])) if choices else ("int4", "fp16", "fp32"),
        frozenset({"default"} | {a for a in known if f'"{a}"' in whole}),
        frozenset(name for name in names if not name.startswith("_") and name != "hf_details"),
        frozenset(re.findall(r'architectures\[0\] == "(\w+)"', whole)),
        "config.rope_local_base_freq" in whole,
    )


def architecture_problem(model_config: dict[str, Any], builder: Builder) -> str:
    """One line if `builder` cannot build models of this config.json; empty if nothing speaks against it."""
    name = next(iter(model_config.get("architectures") or ()), None)
    rope = model_config.get("rope_parameters") or model_config.get("rope_scaling") or {}
    if name is None or (builder.architectures and name not in builder.architectures):
        return f"{name or 'a model without architectures in its config.json'}: the installed onnxruntime-genai does not build it"
    if name.startswith("Gemma3") and builder.reads_local_theta and any(isinstance(v, dict) for v in rope.values()):
        return f"{name}: the installed onnxruntime-genai cannot read the two rotary bases of it from transformers 5"
    context, original = (model_config.get(f"{n}max_position_embeddings") for n in ("", "original_"))
    if name == "Phi3ForCausalLM" and context != original and "long_factor" not in rope:
        return (
            f"{name}: max_position_embeddings is {context} and original_max_position_embeddings {original}, but rope_parameters "
            "has no long_factor: onnxruntime-genai builds no such model"
        )
    return ""


def check_options(config: ExportConfig, model_config: dict[str, Any], builder: Builder) -> None:
    """Raise one ConfigError with every option of `config` that cannot be, for the model whose config.json is `model_config`."""
    own = list(_own_ways(config, model_config))
    config = config.as_built
    problems = [
        *own,
        *_unknown_to(builder, config),
        *_not_for_this_precision(config),
        *_not_for_this_provider(config),
        *_contradictions(config, model_config),
        *_traps(config, model_config, builder),
        *_search_problems(config.search or {}, model_config),
        *_extra_problems(config.extra_options or {}, builder),
    ]
    if problems:
        raise ConfigError([f"export.{problem}" for problem in problems])


def _own_ways(config: ExportConfig, model_config: dict[str, Any]) -> Iterator[str]:
    """What speaks against codes of our own."""
    if config.calibration_examples < 1:
        yield f"calibration_examples: must be at least 1 (found: {config.calibration_examples})"
    if isinstance(config.max_drop, int | float) and not config.max_drop >= 0:
        yield f"max_drop: must be 0 or above (found: {config.max_drop})"
    if config.tune:
        yield from _tuned(config)
    if not config.size_budget >= 1:
        yield f"size_budget: must be at least 1 (found: {config.size_budget})"
    if config.algorithm == "mixed" and config.precision == "int8":
        yield "algorithm: mixed raises layers of an int4 model to 8 bits, the precision is int8"
    if config.algorithm not in OURS[1:]:
        if config.calibration_data is not None and config.algorithm != "auto":
            yield f"calibration_data: is for gptq, searched and mixed, the algorithm is {config.algorithm}"
        return
    if config.grid is None:
        yield f"algorithm: {config.algorithm} is for int4 and int8, the precision is {config.precision}"
        return
    if config.use_qdq:
        yield f"use_qdq: not with {config.algorithm}, whose codes are put into MatMulNBits"
    if "MatMul" not in (config.op_types_to_quantize or ("MatMul",)):
        yield f"op_types_to_quantize: {config.algorithm} is for MatMul"
    for width in sorted(_widths(model_config)):
        for problem in config.grid.problems("", width):
            yield f"block_size{problem}"


def _tuned(config: ExportConfig) -> Iterator[str]:
    """What speaks against choosing by measurement."""
    if not config.quantized or config.use_qdq:
        yield "tune: is for int4 and int8 products (MatMulNBits)"
    if config.execution_provider != "cpu":
        yield f"tune: measures this machine's CPU, the execution provider is {config.execution_provider}"
    if not config.answers_prompts:
        yield "tune: times answers, which a model without embedding or output layer does not give"
    for name in _changed(config, ("block_size", "accuracy_level")):
        yield f"{name}: is what tune chooses; leave one of them out"


def _changed(config: ExportConfig, names: tuple[str, ...]) -> list[str]:
    """Those of `names` that are not at their default."""
    usual = ExportConfig().as_built
    return [name for name in names if getattr(config, name) != getattr(usual, name)]


def _unknown_to(builder: Builder, config: ExportConfig) -> Iterator[str]:
    if config.precision not in builder.precisions:
        yield f"precision: the installed onnxruntime-genai builds {', '.join(builder.precisions)} (found: {config.precision!r})"
    if config.quantized and config.algorithm not in builder.algorithms:
        known = ", ".join(sorted(builder.algorithms))
        yield f"algorithm: the installed onnxruntime-genai knows {known} (found: {config.algorithm!r})"


def _not_for_this_precision(config: ExportConfig) -> Iterator[str]:
    if not config.quantized:
        for name in _changed(config, (*_QUANTIZATION, *_FLAGS_OF_INTEGERS)):
            yield f"{name}: is for int4 and int8, the precision is {config.precision}"
    if config.precision == "int8":
        if config.algorithm not in ("default", "rtn", "k_quant"):
            yield f"algorithm: {config.algorithm} raises layers of an int4 model to 8 bits, the precision is int8"
        for name in _changed(config, _FLAGS_OF_INTEGERS):
            yield f"{name}: is for int4, the precision is int8"
        if "Gather" in (config.op_types_to_quantize or ()):
            yield "op_types_to_quantize: Gather is for int4, the precision is int8"


def _not_for_this_provider(config: ExportConfig) -> Iterator[str]:
    provider = config.execution_provider
    if config.precision == "bf16" and provider != "cuda":
        yield f"precision: bf16 runs on cuda only, the execution provider is {provider}"
    if config.precision == "int8" and provider == "dml":
        yield "precision: int8 does not run on dml"
    for name in _changed(config, ("use_webgpu_fp32", "use_cuda_bf16", "enable_cuda_graph")):
        needed = "webgpu" if name == "use_webgpu_fp32" else "cuda"
        if provider != needed:
            yield f"{name}: is for {needed}, the execution provider is {provider}"


def _contradictions(config: ExportConfig, model_config: dict[str, Any]) -> Iterator[str]:
    if config.exclude_lm_head and config.include_hidden_states:
        yield "include_hidden_states: exclude_lm_head gives the hidden states already, and no logits beside them"
    if config.exclude_lm_head and config.algorithm.endswith(("_last", "_linear")):
        yield f"algorithm: {config.algorithm} raises the output layer to 8 bits, exclude_lm_head leaves it out"
    if config.exclude_embeds and "Gather" in (config.op_types_to_quantize or ()):
        yield "op_types_to_quantize: Gather is the input embedding, exclude_embeds leaves it out"
    if config.op_types_to_quantize == ():
        yield "op_types_to_quantize: nothing is left to quantize; use precision fp32 or fp16"
    if config.use_8bits_moe and not any(model_config.get(name) for name in _EXPERTS):
        yield "use_8bits_moe: this model has no experts"
    if config.use_qdq and config.algorithm != "default":
        yield f"use_qdq: the builder ignores it for the algorithm {config.algorithm}"
    if config.use_qdq and "Gather" in (config.op_types_to_quantize or ()):
        yield "use_qdq: there is no such form of an embedding (Gather)"
    if config.use_qdq and _changed(config, ("accuracy_level",)):
        yield "accuracy_level: has no place in a graph with use_qdq"


def _traps(config: ExportConfig, model_config: dict[str, Any], builder: Builder) -> Iterator[str]:
    """Combinations that the builder accepts and then fails at, or builds into a model that does not load."""
    if config.precision != "int4":
        return
    shared = (config.extra_options or {}).get("shared_embeddings", model_config.get("tie_word_embeddings"))
    head_is_integer = "/lm_head/MatMul" not in config.nodes_to_exclude
    remedy = "add extra_options: {shared_embeddings: false}"
    if shared and builder.shares_integers and config.answers_prompts:
        if not config.symmetric and config.algorithm == "default" and head_is_integer:
            yield f"symmetric: false does not load where input and output embedding share one weight; use algorithm rtn, or {remedy}"
        if config.use_qdq:
            yield f"use_qdq: cannot be built where input and output embedding share one weight; {remedy}"
        if config.op_types_to_quantize is not None and set(config.op_types_to_quantize) != {"MatMul", "Gather"}:
            yield f"op_types_to_quantize: the builder takes both where input and output embedding share one weight; {remedy}"
    elif "Gather" in (config.op_types_to_quantize or ()) and config.algorithm != "default":
        yield f"op_types_to_quantize: the builder passes over embeddings (Gather) for the algorithm {config.algorithm}"
    if config.use_cuda_bf16 and config.algorithm != "default":
        yield f"use_cuda_bf16: the builder fails at weights in bf16 for the algorithm {config.algorithm}"
    with_zero_points = config.algorithm.startswith("k_quant") or (
        config.algorithm.startswith("rtn") and not config.symmetric
    )
    if with_zero_points:
        for inputs in sorted(_widths(model_config)):
            blocks = -(-inputs // config.block_size)
            if blocks % 2:
                yield f"block_size: {inputs} inputs are {blocks} blocks of {config.block_size}; zero points are stored by twos, so {config.algorithm} needs an even number"


def _widths(model_config: dict[str, Any]) -> set[int]:
    """Numbers of inputs of the linear layers."""
    heads, width = model_config.get("num_attention_heads"), model_config.get("head_dim")
    found = {model_config.get("hidden_size"), model_config.get("intermediate_size")}
    found.add(heads * width if isinstance(heads, int) and isinstance(width, int) else None)
    return {w for w in found if isinstance(w, int)}


def _search_problems(search: dict[str, Any], model_config: dict[str, Any]) -> Iterator[str]:
    for name, value in search.items():
        kind = _SEARCH.get(name)
        if kind is None:
            yield f"search.{name}: unknown key{did_you_mean(name, _SEARCH)}"
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = "true or false" if kind is bool else "a whole number" if kind is int else "a number"
            yield f"search.{name}: must be {wanted} (found: {value!r})"
    longest, shortest = search.get("max_length"), search.get("min_length")
    context = model_config.get("max_position_embeddings")
    if isinstance(longest, int) and isinstance(context, int) and not 0 < longest <= context:
        yield f"search.max_length: must be 1 to {context}, the model's context (found: {longest})"
    if isinstance(longest, int) and isinstance(shortest, int) and shortest > longest:
        yield f"search.min_length: is larger than max_length ({shortest} > {longest})"


def _extra_problems(options: dict[str, Any], builder: Builder) -> Iterator[str]:
    own = {BUILDER_NAMES.get(f.name, f.name): f.name for f in fields(ExportConfig)}
    for name, value in options.items():
        plain = name.removeprefix("int4_")
        if name in _REFUSED:
            yield f"extra_options.{name}: {_REFUSED[name]}"
        elif plain in own or plain in own.values():
            yield f"extra_options.{name}: is a key of its own, export.{own.get(plain, plain)}"
        elif name not in builder.options:
            text = did_you_mean(name, builder.options)
            yield f"extra_options.{name}: unknown to the installed onnxruntime-genai{text}"
        elif not isinstance(value, str | int | float | bool | list | tuple) or value == "":
            yield f"extra_options.{name}: must be text, a number, true or false, or a list (found: {value!r})"
