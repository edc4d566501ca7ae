"""Are the exported model's logits torch's? Asserted at every export, on the contract's probes, on both sides of the switch between
two lists of rotary factors, and beyond a sliding window.

Floating point: the folder as it is, beside the model in float32. Integers: the graph beside the model with exactly the graph's weights,
so that rounding is no excuse and only the arithmetic differs; for that the graph is run with activations in float32, and what rounding
them costs as well (`accuracy_level`) is a figure. A model that its builder gets wrong is found here, whatever its precision.

Not here: whether the fine-tuning survives the rounding (`survival.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phinetune.errors import ExportError
from phinetune.events import Note, OnEvent
from phinetune.exporting.config import ExportConfig
from phinetune.generation.onnx_backend import OnnxGenerator, onnx_runtime
from phinetune.model.contract import PromptContract

FP_TOLERANCE = {
    "fp32": 1e-3,
    "fp16": 0.25,
    "bf16": 2.0,
}  # largest difference of logits from torch's that a floating point build may show
_SAME = 1e-3  # of the logits' spread, at least of 1: for the same integers in float32
_LONGEST = 8192  # tokens of a prompt that an export takes the time for
_GRADUAL = 0.05  # of the logits' spread: less is the runtime's rounding


def compare_with_torch(
    source: Path,
    folder: Path,
    config: ExportConfig,
    contract: PromptContract,
    trust_remote_code: bool,
    on_event: OnEvent,
) -> dict[str, Any]:
    """Figures for the manifest. Raises ExportError where the exported `folder` does not compute what the plain model in `source` does.

    What cannot be compared is said, and is in the figures under `logits_not_compared`.
    """
    import torch

    from phinetune.exporting.logits import window_of
    from phinetune.exporting.verify import open_model
    from phinetune.model.load import LoadPlan, load_model

    if config.quantized and (reason := _cannot(source, folder, config)):
        on_event(Note(f"export: the ONNX logits are not compared with torch's: {reason}"))
        return {"logits_not_compared": reason}
    model = load_model(source, LoadPlan(torch.float32, torch.device("cpu"), None, trust_remote_code))
    switch = _switch(source)
    rows = [list(probe.ids) for probe in contract.probes]
    rows += _long_rows(contract, switch, window_of(model.config), on_event)
    if not config.answers_prompts:
        return {"logits_distance": _outputs(folder, config, contract, model, on_event)}
    generator = OnnxGenerator(open_model(folder, config)[0], contract)
    if config.quantized:
        figures = _same_integers(source, folder, config, generator, model, rows, on_event)
    else:
        figures = _same_weights(folder, config, generator, model, rows, on_event)
    if switch is not None:
        figures |= _long_context(generator, switch, on_event)
    return figures


def _cannot(source: Path, folder: Path, config: ExportConfig) -> str:
    """Why a graph of integers is not compared; empty if it is."""
    from phinetune.exporting.codes import GraphCodes
    from phinetune.workflow.quantize import out_of_memory, parts_in

    if not config.answers_prompts or config.execution_provider != "cpu":
        return "only integers of complete models for the CPU are"
    if not hasattr(onnx_runtime().Config, "overlay"):
        return "the installed onnxruntime-genai is too old for it"
    graph = GraphCodes(folder)
    if config.use_qdq or any(node.op_type == "QMoE" for node in graph.model.graph.node):
        return "integers of DequantizeLinear and QMoE are not read"
    if left := sorted(set(graph.stored) - set(parts_in(graph, source))):
        return f"{left[0]}: its blocks do not divide its inputs, or it is no layer of the model"
    return out_of_memory(source, bytes_each=4)


def _switch(source: Path) -> int | None:
    from phinetune.exporting.logits import switch_point

    return switch_point(json.loads((source / "config.json").read_text(encoding="utf-8")))


def _long_rows(contract: PromptContract, switch: int | None, window: int | None, on_event: OnEvent) -> list[list[int]]:
    """Prompts of the last length for the short factors and the first for the long ones, and one beyond the sliding window."""
    from phinetune.exporting.logits import prompt_of

    lengths = [] if switch is None else [switch, switch + 1]
    lengths += [] if window is None else [window + min(window // 2 + 1, 8)]
    if long := [n for n in lengths if n > _LONGEST + 8]:
        on_event(Note(f"export: logits of prompts above {min(long) - 1} tokens were not verified", warning=True))
    return [prompt_of(contract, n) for n in lengths if n not in long and n <= contract.max_length]


def _same_weights(
    folder: Path,
    config: ExportConfig,
    generator: OnnxGenerator,
    model: Any,
    rows: Sequence[Sequence[int]],
    on_event: OnEvent,
) -> dict[str, Any]:
    """Floating point: the folder's logits beside those of the model."""
    from phinetune.exporting.logits import onnx_logits, outputs_distance, torch_logits

    distance = float((onnx_logits(generator, rows) - torch_logits(model, rows)).abs().max())
    if config.include_hidden_states:
        distance = max(distance, outputs_distance(folder, generator.contract, model))
    _tell_and_assert(distance, "logits", config, on_event)
    return {"logits_distance": distance}


def _outputs(folder: Path, config: ExportConfig, contract: PromptContract, model: Any, on_event: OnEvent) -> float:
    """Floating point without an end: the folder's outputs beside those of the model."""
    from phinetune.exporting.logits import outputs_distance

    distance = outputs_distance(folder, contract, model)
    what = "hidden states" if config.exclude_lm_head else "logits"
    _tell_and_assert(distance, what, config, on_event)
    return distance


def _tell_and_assert(distance: float, what: str, config: ExportConfig, on_event: OnEvent) -> None:
    """Say how far floating point outputs are from torch's. Raises ExportError beyond the tolerance."""
    on_event(Note(f"export: on the probes the ONNX {what} differ from torch's by {distance:.2g} at most"))
    _assert_small(distance, FP_TOLERANCE[config.precision], f"the {config.precision} ONNX model's {what}")


def _same_integers(
    source: Path,
    folder: Path,
    config: ExportConfig,
    generator: OnnxGenerator,
    model: Any,
    rows: Sequence[Sequence[int]],
    on_event: OnEvent,
) -> dict[str, Any]:
    """Integers: the graph's logits, its activations in float32, beside those of the model with the graph's weights."""
    from phinetune.exporting.logits import exact_logits, onnx_logits, torch_logits

    _put_weights(source, folder, config, model)
    expected = torch_logits(model, rows)
    spread = float(expected.std(-1).mean())
    distance = float((exact_logits(folder, generator.contract, rows) - expected).abs().max())
    _assert_small(
        distance, _SAME * max(1.0, spread), f"the {config.precision} ONNX model's logits, for the same integers,"
    )
    rounding = _share(onnx_logits(generator, rows), expected)
    on_event(
        Note(
            f"export: for the same integers the ONNX logits differ from torch's by {distance:.2g} at most; accuracy_level "
            f"{config.accuracy_level} moves them by {rounding:.2%} of their spread"
        )
    )
    return {"logits_distance": distance, "logits_moved_by_accuracy_level": round(rounding, 6)}


def _put_weights(source: Path, folder: Path, config: ExportConfig, model: Any) -> None:
    """Give `model` the weights that the graph's integers stand for."""
    import torch

    from phinetune.exporting.codes import GraphCodes
    from phinetune.exporting.graph import read_graph
    from phinetune.model.grid import quantize
    from phinetune.workflow.quantize import parts_in

    graph, modules = GraphCodes(folder), dict(model.named_modules())
    parts = parts_in(graph, source)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rounded = bool(read_graph(folder / "model.onnx").embeddings)
    one = rounded and any(modules[module] is head for spans in parts.values() for module, _, _ in spans)
    if embedding.weight is head.weight and not one:  # the graph has the embedding twice, once in floating point
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        if rounded and embedding.weight is not head.weight and config.grid is not None:
            embedding.weight.copy_(quantize(embedding.weight, config.grid).dense())
        for product, spans in parts.items():
            weight, at = graph.read(product).dense(), 0
            for module, start, stop in spans:
                modules[module].weight[start:stop] = weight[at : at + stop - start]
                at += stop - start


def _long_context(generator: OnnxGenerator, switch: int, on_event: OnEvent) -> dict[str, Any]:
    """What an answer that grows over the switch of factors costs; said where the runtime does not begin anew there."""
    import torch

    from phinetune.exporting.logits import logits_over_switch

    if switch > _LONGEST or switch + 4 > generator.contract.max_length:
        return {}
    grown, whole = (torch.from_numpy(logits) for logits in logits_over_switch(generator, switch))
    share = _share(grown, whole)
    if share > _GRADUAL:
        on_event(
            Note(
                f"export: prompts above {switch} tokens are as in torch, but an answer that grows over {switch} keeps what ONNX Runtime "
                f"has cached with the short factors: logits off by {share:.0%} of their spread",
                warning=True,
            )
        )
    return {"logits_moved_by_growing_over": {str(switch): round(share, 6)}}


def _share(found: Any, expected: Any) -> float:
    """Root mean square of the difference, as a share of that of the expected logits about their mean."""
    centred = expected - expected.mean(-1, keepdim=True)
    return float(((found - expected).square().sum() / centred.square().sum()).sqrt())


def _assert_small(distance: float, allowed: float, what: str) -> None:
    if not distance <= allowed:  # nan is not
        raise ExportError(
            f"{what} differ from torch's by {distance:.3g} ({allowed:.3g} is allowed)",
            "this architecture is not exported rightly by the installed onnxruntime-genai",
        )
