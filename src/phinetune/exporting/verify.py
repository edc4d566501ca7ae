"""Is the ONNX folder what was asked for? Options in the graph, token ids, stop ids, loading, logits. Anything else is an ExportError.

The builder reports success for options it ignored and for models that do not load, so its word is not taken.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.artifact import write_json
from phinetune.errors import ExportError
from phinetune.exporting.config import ExportConfig
from phinetune.generation.onnx_backend import OnnxGenerator, load_onnx, onnx_runtime
from phinetune.model.contract import Probe, PromptContract

GENAI_CONFIG = "genai_config.json"


def write_contract(folder: Path, contract: PromptContract) -> None:
    """Put the prompt contract into an exported folder: tokenizer, template, and the stop and pad ids
    of `genai_config.json`, which is also rid of what no runtime reads."""
    contract.save(folder)
    file = folder / GENAI_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = list(contract.stop_ids)
    config["model"]["pad_token_id"] = contract.pad_token_id
    config["search"] = {k: v for k, v in config["search"].items() if v is not None}  # older runtimes refuse null
    write_json(file, config)
    tokenizer_file = folder / "tokenizer_config.json"
    tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    if (
        tokenizer.get("tokenizer_class") == "TokenizersBackend"
    ):  # transformers 5's name, which older runtimes do not know
        write_json(tokenizer_file, {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"})


def verify(
    folder: Path, config: ExportConfig, contract: PromptContract, prompts: Sequence[Probe] = ()
) -> dict[str, Any]:
    """Check the exported `folder` against what was asked; returns what was found. Raises ExportError with every difference.

    `prompts` are compared with ONNX Runtime's token ids as the contract's own probes are.
    """
    found = read_graph(folder / "model.onnx")
    problems = graph_problems(found, config) + _contract_problems(folder, contract, prompts)
    if problems:
        raise ExportError(
            [f"{folder.name.removesuffix('.partial')}: {p}" for p in problems],
            "the installed onnxruntime-genai does not build what was asked; try another version or other options",
        )
    generator = load_onnx(folder)
    _check_runs(generator, folder)
    return {**found.as_dict(), "prompts_compared": len(contract.probes) + len(prompts)}


@dataclass(frozen=True)
class GraphFacts:
    """What a built graph says about its quantization: how many products, and the values of their options with counts."""

    products: int
    quantized: int
    bits: dict[int, int]
    block_sizes: dict[int, int]
    accuracy_levels: dict[int, int]
    zero_points: int
    weight_types: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return {k: v if not isinstance(v, dict) else {str(a): b for a, b in v.items()} for k, v in vars(self).items()}


def read_graph(file: Path) -> GraphFacts:
    """Facts of the graph in `file`, without loading its weights. Raises ExportError if it is not there or not ONNX."""
    import onnx

    try:
        graph = onnx.load(str(file), load_external_data=False).graph
    except (OSError, ValueError) as error:
        raise ExportError(f"{file}: not an ONNX model: {error}") from None
    attributes = [{a.name: a.i for a in node.attribute} for node in graph.node if node.op_type == "MatMulNBits"]
    inputs = [list(node.input) for node in graph.node if node.op_type == "MatMulNBits"]
    initializers = {t.name for t in graph.initializer}
    weights = [t for t in graph.initializer if math.prod(t.dims) > 1 and len(t.dims) > 1]
    return GraphFacts(
        products=sum(node.op_type == "MatMul" and any(i in initializers for i in node.input) for node in graph.node),
        quantized=len(attributes),
        bits=dict(Counter(a.get("bits", 4) for a in attributes)),
        block_sizes=dict(Counter(a["block_size"] for a in attributes)),
        accuracy_levels=dict(Counter(a.get("accuracy_level", 0) for a in attributes)),
        zero_points=sum(len(i) > 3 and bool(i[3]) for i in inputs),
        weight_types=dict(Counter(onnx.TensorProto.DataType.Name(t.data_type) for t in weights)),
    )


def graph_problems(found: GraphFacts, config: ExportConfig) -> list[str]:
    """One line for each requested option that the graph does not show."""
    if config.precision != "int4":
        wanted = {"fp32": "FLOAT", "fp16": "FLOAT16"}[config.precision]
        problems = (
            [f"{found.quantized} products are quantized, {config.precision} was asked for"] if found.quantized else []
        )
        others = {"FLOAT", "FLOAT16", "BFLOAT16"} & set(found.weight_types) - {wanted}
        if others and found.weight_types.get(wanted, 0) < sum(found.weight_types[o] for o in others):
            problems.append(f"weights are {', '.join(sorted(others))}, {wanted} was asked for")
        return problems
    problems = []
    if not found.quantized or found.products:
        problems.append(
            f"{found.products} of {found.products + found.quantized} products are not quantized, int4 was asked for"
        )
    allowed_bits = {4, 8} if config.algorithm == "k_quant_mixed" else {4}
    if not set(found.bits) <= allowed_bits or 4 not in found.bits:
        problems.append(f"weights have {sorted(found.bits)} bits, {sorted(allowed_bits)} were asked for")
    if config.algorithm == "k_quant_mixed" and 8 not in found.bits:
        problems.append("no layer has 8 bits, though k_quant_mixed was asked for")
    if set(found.block_sizes) != {config.block_size}:
        problems.append(f"block sizes are {sorted(found.block_sizes)}, {config.block_size} was asked for")
    if config.accuracy_level not in found.accuracy_levels or len(found.accuracy_levels) > 1:
        problems.append(f"accuracy levels are {sorted(found.accuracy_levels)}, {config.accuracy_level} was asked for")
    if config.symmetric and config.algorithm in ("default", "rtn") and found.zero_points:
        problems.append(f"{found.zero_points} products have zero points, symmetric blocks were asked for")
    if not config.symmetric and found.zero_points < found.quantized:
        problems.append(
            f"{found.quantized - found.zero_points} products have no zero points, asymmetric blocks were asked for"
        )
    return problems


def _contract_problems(folder: Path, contract: PromptContract, prompts: Sequence[Probe]) -> list[str]:
    """Differences between the contract and what the exported folder's own settings and tokenizer do."""
    og = onnx_runtime()
    settings = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]
    stops = settings.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    problems = (
        []
        if set(contract.stop_ids) <= set(stops)
        else [f"stops at tokens {stops}, the model was trained to stop at {list(contract.stop_ids)}"]
    )
    try:
        tokenizer = og.Tokenizer(og.Model(str(folder)))
    except Exception as error:
        return [*problems, f"ONNX Runtime cannot load it: {(str(error).strip() or repr(error)).splitlines()[0]}"]
    for probe in (*contract.probes, *prompts):
        ids = tuple(int(i) for i in tokenizer.encode(probe.text))
        if ids != probe.ids:
            at = next(
                (i for i, (a, b) in enumerate(zip(ids, probe.ids, strict=False)) if a != b),
                min(len(ids), len(probe.ids)),
            )
            problems.append(
                f"ONNX Runtime's tokenizer differs from the one trained with at token {at} of {probe.text[:40]!r}: {list(ids[at : at + 3])} instead of {list(probe.ids[at : at + 3])}"
            )
    return problems


def _check_runs(generator: OnnxGenerator, folder: Path) -> None:
    import numpy as np

    probe = next((p for p in generator.contract.probes if p.ids), None)
    if probe is not None and not np.isfinite(generator.logits(probe.ids)).all():
        raise ExportError(
            f"{folder}: the model's logits are not finite", "the weights do not survive this precision; try another"
        )


def logits_distance(generator: OnnxGenerator, model: Any) -> float:
    """Largest absolute difference between the ONNX model's and the torch model's logits, over the contract's probes."""
    import torch

    largest = 0.0
    for probe in generator.contract.probes:
        with torch.inference_mode():
            expected = (
                model(input_ids=torch.tensor([list(probe.ids)], device=model.device), logits_to_keep=1)
                .logits[0, -1]
                .float()
                .cpu()
            )
        largest = max(largest, float((torch.from_numpy(generator.logits(probe.ids)) - expected).abs().max()))
    return largest
