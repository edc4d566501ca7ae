"""Logits of an exported folder beside torch's: over prompts, with and without what the runtime rounds, and where long contexts begin.

Not here: which model is compared, and what difference is allowed (`workflow.parity`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phinetune.errors import ExportError, first_line
from phinetune.exporting.graph import set_accuracy_level
from phinetune.exporting.verify import run_graph
from phinetune.generation.onnx_backend import OnnxGenerator, onnx_runtime
from phinetune.model.contract import PromptContract

_FP32 = 1  # accuracy_level


def switch_point(model_config: dict[str, Any]) -> int | None:
    """Tokens above which a model scales its rotary embedding by the long of two lists of factors; None for a model with one."""
    rope = model_config.get("rope_parameters") or model_config.get("rope_scaling") or {}
    original = model_config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    context = model_config.get("max_position_embeddings")
    if "long_factor" not in rope or not original or not context or original >= context:
        return None
    return int(original)


def window_of(model_config: Any) -> int | None:
    """Tokens that an attention of a model (its transformers config) sees at most, if that is less than its whole context."""
    text = model_config.get_text_config()
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    bounded = kinds is None or "sliding_attention" in kinds
    return int(window) if window and bounded and window < text.max_position_embeddings else None


def prompt_of(contract: PromptContract, length: int) -> list[int]:
    """A prompt of `length` tokens, out of the contract's probes."""
    ids = [i for probe in contract.probes for i in probe.ids]
    return (ids * (length // len(ids) + 1))[:length]


def torch_logits(model: Any, rows: Sequence[Sequence[int]]) -> Any:
    """(rows, vocabulary) float32, after the last token of each row."""
    import torch

    with torch.inference_mode():
        ids = [torch.tensor([list(row)], device=model.device) for row in rows]
        return torch.stack([model(input_ids=i, logits_to_keep=1).logits[0, -1].float().cpu() for i in ids])


def onnx_logits(generator: OnnxGenerator, rows: Sequence[Sequence[int]]) -> Any:
    """`torch_logits` of an exported model, by ONNX Runtime GenAI. Raises ExportError for a prompt that it refuses."""
    import torch

    found = []
    for row in rows:
        try:
            found.append(torch.from_numpy(generator.logits(row)))
        except RuntimeError as error:
            raise ExportError(f"ONNX Runtime refuses a prompt of {len(row)} tokens: {first_line(error)}") from error
    return torch.stack(found)


def outputs_distance(folder: Path, contract: PromptContract, model: Any) -> float:
    """Largest difference from torch's for graphs that take embeddings or give hidden states: over their outputs and all tokens."""
    import torch

    largest = 0.0
    for probe in contract.probes:
        ids = torch.tensor([list(probe.ids)])
        with torch.inference_mode():
            out = model(input_ids=ids, output_hidden_states=True)
            embeddings = model.get_input_embeddings()(ids).float().numpy()
        expected = {"logits": out.logits, "hidden_states": out.hidden_states[-1]}
        for name, values in run_graph(folder, probe.ids, embeddings).items():
            distance = (torch.from_numpy(values).float() - expected[name].float()).abs().max()
            largest = max(largest, float(distance))
    return largest


def exact_logits(folder: Path, contract: PromptContract, rows: Sequence[Sequence[int]]) -> Any:
    """`onnx_logits` of the graph of integers in `folder`, computed on the CPU with activations in float32, whatever it was built for.

    Raises ExportError if the runtime cannot load or run it.
    """
    import onnx

    og, file = onnx_runtime(), folder / "model.exact.onnx"
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    set_accuracy_level(model, _FP32)
    try:
        onnx.save(model, str(file))
        settings = og.Config(str(folder))
        settings.overlay(json.dumps({"model": {"decoder": {"filename": file.name}}}))
        return onnx_logits(OnnxGenerator(og.Model(settings), contract), rows)
    except RuntimeError as error:
        raise ExportError(f"{folder}: ONNX Runtime cannot run it: {first_line(error)}") from error
    finally:
        file.unlink(missing_ok=True)


def logits_over_switch(generator: OnnxGenerator, switch: int) -> tuple[Any, Any]:
    """(logits after an answer that grew past `switch` tokens, the same for a prompt of these tokens), of every token but the stop tokens,
    which are forbidden meanwhile. ONNX Runtime GenAI begins anew at 4096 tokens and keeps what it has cached elsewhere."""
    import numpy as np

    og = onnx_runtime()
    ids = prompt_of(generator.contract, switch - 1)
    params = og.GeneratorParams(generator.model)
    params.set_search_options(max_length=switch + 4, min_length=switch + 4, do_sample=False, num_beams=1)
    running = og.Generator(generator.model, params)
    running.append_tokens(np.array(ids, dtype=np.int32))
    for _ in range(4):
        running.generate_next_token()
        ids.append(int(running.get_next_tokens()[0]))
    logits = np.array(running.get_output("logits"), dtype=np.float32)[0, -1].copy()
    allowed = logits > np.finfo(np.float32).min / 2
    return logits[allowed], generator.logits(ids[:-1])[allowed]
