"""What a built graph says about itself, and where that differs from what was asked. Weights are not loaded.

The algorithm shows in the names that the quantizers give their tensors and in the zero points; two algorithms that leave the same marks
(asymmetric rtn and k_quant) are not told apart. Not here: whether the model runs (`verify.py`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.errors import ExportError, did_you_mean
from phinetune.exporting.config import ExportConfig

_HEAD = "/lm_head/MatMul"
_TYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
_FACTOR = re.compile(r"/lora_[AB]/MatMul$")
"""A product with an adapter's factor (`lora_inputs.py`)."""
_FORMS = ("MatMulNBits", "DequantizeLinear")


@dataclass(frozen=True)
class Product:
    """A matrix product with a weight of integers."""

    name: str
    """As the product was called before it was quantized."""
    bits: int
    block_size: int
    accuracy_level: int | None
    """None where the form has no place for it (DequantizeLinear)."""
    zero_points: bool
    grouped: bool
    """The rtn and k_quant quantizers name their tensors so."""


@dataclass(frozen=True)
class GraphFacts:
    """What a built graph says about its quantization, its inputs and its outputs."""

    products: tuple[Product, ...]
    plain: tuple[str, ...]
    """Names of the products whose weights are floating point."""
    embeddings: int
    """Embeddings of integers."""
    expert_bits: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    activations: str
    """Type of the key/value cache, which is that of all activations."""
    weight_types: dict[str, int]
    nodes: frozenset[str]

    @property
    def quantized(self) -> int:
        """Number of products with weights of integers."""
        return len(self.products)

    def count(self, field: str) -> dict[Any, int]:
        """How many quantized products have each value of `field`."""
        return dict(Counter(getattr(p, field) for p in self.products))

    def as_dict(self) -> dict[str, Any]:
        """The figures for the manifest."""
        counts = {f"{n}s" if n != "bits" else n: self.count(n) for n in ("bits", "block_size", "accuracy_level")}
        return {
            "products": len(self.plain),
            "quantized": self.quantized,
            **{name: {str(k): v for k, v in found.items()} for name, found in counts.items()},
            "zero_points": sum(p.zero_points for p in self.products),
            "embeddings": self.embeddings,
            "activations": self.activations,
            "weight_types": self.weight_types,
        }


def read_graph(file: Path) -> GraphFacts:
    """Facts of the graph in `file`. Raises ExportError if it is not there or not ONNX."""
    import onnx

    try:
        graph = onnx.load(str(file), load_external_data=False).graph
    except (OSError, ValueError) as error:
        raise ExportError(f"{file}: not an ONNX model: {error}") from None
    inputs = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    stored = {t.name: t for t in graph.initializer if t.name not in inputs}  # an adapter's factors are inputs too
    makers = {output: node for node in graph.node for output in node.output}
    found = [_product(n, makers, stored) for n in graph.node if n.op_type in ("MatMul", "MatMulNBits")]
    products = [n for n in graph.node if n.op_type == "MatMul" and not _FACTOR.search(n.name)]
    plain = [n.name for n in products if any(i in stored for i in n.input)]
    weights = [t for t in stored.values() if len(t.dims) > 1 and math.prod(t.dims) > 1]
    floats = [v for k, v in inputs.items() if k.startswith("past") and v != onnx.TensorProto.INT8]
    name = onnx.TensorProto.DataType.Name
    return GraphFacts(
        products=tuple(p for p in found if p is not None),
        plain=tuple(plain),
        embeddings=sum(n.op_type == "GatherBlockQuantized" for n in graph.node),
        expert_bits=tuple(
            a.i for n in graph.node if n.op_type == "QMoE" for a in n.attribute if a.name == "expert_weight_bits"
        ),
        inputs=tuple(inputs),
        outputs=tuple(o.name for o in graph.output),
        activations=name(floats[0]) if floats else "",
        weight_types=dict(Counter(name(t.data_type) for t in weights)),
        nodes=frozenset(node.name for node in graph.node),
    )


def _product(node: Any, makers: dict[str, Any], stored: dict[str, Any]) -> Product | None:
    """The quantized product that `node` is, in either form; None for any other."""
    form = node
    if node.op_type == "MatMul":
        form = next((makers[i] for i in node.input if i in makers and makers[i].op_type == _FORMS[1]), None)
        if form is None or form.input[0] not in stored:
            return None
    values = {a.name: a.i for a in form.attribute}
    weight, zero = (form.input[1], 3) if form.op_type == _FORMS[0] else (form.input[0], 2)
    return Product(
        name=re.sub(r"(_matmul)?_Q\d+$", "", node.name),
        bits=values.get("bits", 4),
        block_size=values["block_size"],
        accuracy_level=values.get("accuracy_level", 0) if form.op_type == _FORMS[0] else None,
        zero_points=len(form.input) > zero and bool(form.input[zero]),
        grouped=re.search(r"_Q\d+G\d+$", weight) is not None,
    )


def set_accuracy_level(model: Any, level: int) -> None:
    """Have the products of integers of an `onnx.ModelProto` compute with activations of `level` (see `ExportConfig.accuracy_level`)."""
    from onnx import helper

    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            others = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*others, helper.make_attribute("accuracy_level", level)])


def graph_problems(found: GraphFacts, config: ExportConfig) -> list[str]:
    """One line for each requested option that the graph does not show."""
    mixed, config = (
        config.algorithm in ("mixed", "auto"),
        config.as_built,
    )  # but for the bits, the graph stays the builder's
    problems = _quantization_problems(found, config, mixed) if config.quantized else _float_problems(found, config)
    return problems + _shape_problems(found, config)


def _float_problems(found: GraphFacts, config: ExportConfig) -> list[str]:
    wanted = _TYPES[config.precision]
    problems = []
    if found.quantized:
        problems.append(f"{found.quantized} products are quantized, {config.precision} was asked for")
    others = set(_TYPES.values()) & set(found.weight_types) - {wanted}
    if others and found.weight_types.get(wanted, 0) < sum(found.weight_types[o] for o in others):
        problems.append(f"weights are {', '.join(sorted(others))}, {wanted} was asked for")
    return problems


def _quantization_problems(found: GraphFacts, config: ExportConfig, mixed: bool) -> list[str]:
    """Differences in what is quantized and how; `mixed`: some layers may have got 8 bits afterwards."""
    problems = _coverage_problems(found, config)
    if not found.quantized:
        return problems
    blocks, levels = found.count("block_size"), found.count("accuracy_level")
    if set(blocks) != {config.block_size}:
        problems.append(f"block sizes are {sorted(blocks)}, {config.block_size} was asked for")
    if set(levels) != {None if config.use_qdq else config.accuracy_level}:
        level = "no accuracy level (use_qdq)" if config.use_qdq else config.accuracy_level
        problems.append(f"accuracy levels are {sorted(levels, key=str)}, {level} was asked for")
    with_zero = sum(p.zero_points for p in found.products)
    algorithm, without = config.algorithm, found.quantized - with_zero
    if algorithm.startswith("k_quant"):
        if without:
            problems.append(f"{without} products have no zero points, which {algorithm} gives them")
    elif config.symmetric and with_zero:
        problems.append(f"{with_zero} products have zero points, symmetric blocks were asked for")
    elif not config.symmetric and without:
        problems.append(f"{without} products have no zero points, asymmetric blocks were asked for")
    other = [p.name for p in found.products if p.grouped == (algorithm == "default")]
    if other:
        problems.append(f"{len(other)} products were quantized by another algorithm than {algorithm}")
    return problems + _bit_problems(found, config, mixed)


def _coverage_problems(found: GraphFacts, config: ExportConfig) -> list[str]:
    """Differences in which products and embeddings are quantized."""
    kinds = config.op_types_to_quantize or ("MatMul",)
    kept = set(found.plain) - set(config.nodes_to_exclude)
    asked, problems = config.precision, []
    if "MatMul" in kinds and (kept or not found.quantized):
        problems.append(
            f"{len(kept)} of {len(kept) + found.quantized} products are not quantized, {asked} was asked for"
        )
    if "MatMul" not in kinds and found.quantized:
        problems.append(f"{found.quantized} products are quantized, only Gather was asked for")
    excluded = [n for n in config.nodes_to_exclude if n not in found.nodes]
    names = {*found.plain, *(p.name for p in found.products)}
    for name in excluded:
        problems.append(
            f"nodes_to_exclude: {name} was quantized all the same"
            if name in names
            else f"nodes_to_exclude: the graph has no node {name}{did_you_mean(name, names)}"
        )
    if config.op_types_to_quantize is not None and ("Gather" in kinds) != bool(found.embeddings):
        state = "not quantized, Gather was asked for" if "Gather" in kinds else "quantized, Gather was not asked for"
        problems.append(f"the embedding is {state}")
    if config.use_qdq and any(p.accuracy_level is not None for p in found.products):
        problems.append("products are MatMulNBits, use_qdq was asked for")
    if config.use_8bits_moe and set(found.expert_bits) != {8}:
        problems.append(f"experts have {sorted(set(found.expert_bits)) or 'no'} bits, use_8bits_moe was asked for")
    return problems


def _bit_problems(found: GraphFacts, config: ExportConfig, mixed: bool) -> list[str]:
    """Differences in the numbers of bits, layer by layer."""
    bits, algorithm = found.count("bits"), config.algorithm
    if "matmul_mixed_precision" in (config.extra_options or {}):
        return []
    if config.precision == "int8":
        return [] if set(bits) == {8} else [f"weights have {sorted(bits)} bits, [8] were asked for"]
    raises_layers = algorithm in ("rtn_last", "k_quant_last", "k_quant_mixed", "k_quant_linear")
    allowed = {4, 8} if raises_layers or mixed else {4}
    problems = []
    if not set(bits) <= allowed or 4 not in bits:
        problems.append(f"weights have {sorted(bits)} bits, {sorted(allowed)} were asked for")
    raised = {p.name for p in found.products if p.bits == 8}
    if raises_layers and not raised:
        problems.append(f"no layer has 8 bits, though {algorithm} was asked for")
    elif raises_layers and not {_HEAD} & {*raised, *config.nodes_to_exclude} and not config.exclude_lm_head:
        problems.append(f"the output layer has not 8 bits, though {algorithm} was asked for")
    if algorithm.endswith("_last") and raised - {_HEAD}:
        problems.append(
            f"{len(raised - {_HEAD})} layers beside the output layer have 8 bits, {algorithm} was asked for"
        )
    return problems


def _shape_problems(found: GraphFacts, config: ExportConfig) -> list[str]:
    """Differences in inputs, outputs and the type of the activations."""
    problems = []
    for flag, name, there in (
        ("exclude_embeds", "inputs_embeds", found.inputs),
        ("include_hidden_states", "hidden_states", found.outputs),
        ("exclude_lm_head", "hidden_states", found.outputs),
    ):
        if getattr(config, flag) and name not in there:
            problems.append(f"the graph has no {name}, {flag} was asked for")
    for flag, name, there in (
        ("exclude_embeds", "input_ids", found.inputs),
        ("exclude_lm_head", "logits", found.outputs),
    ):
        if getattr(config, flag) == (name in there):
            problems.append(
                f"the graph has {'' if getattr(config, flag) else 'no '}{name}, {flag} is {getattr(config, flag)}"
            )
    wanted = _activations(config)
    if found.activations and found.activations != wanted:
        problems.append(f"activations are {found.activations}, {wanted} was asked for")
    return problems


def _activations(config: ExportConfig) -> str:
    """The type of the activations that these options mean."""
    if config.execution_provider == "webgpu" and config.use_webgpu_fp32:
        return "FLOAT"
    if not config.quantized:
        return _TYPES[config.precision]
    if config.execution_provider == "cpu":
        return "FLOAT"
    return "BFLOAT16" if config.use_cuda_bf16 else "FLOAT16"
