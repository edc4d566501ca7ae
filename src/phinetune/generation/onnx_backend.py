"""The ONNX Runtime GenAI backend: an exported folder answering prompts, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.errors import ExportError, MissingPackageError
from phinetune.generation.protocol import Completion, Sampling, completion
from phinetune.model.contract import PromptContract, load_contract


@dataclass(frozen=True)
class OnnxGenerator:
    """An `onnxruntime_genai.Model` and its contract. Build with `load_onnx`."""

    model: Any
    contract: PromptContract

    def complete(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[Completion]:
        """Greedy answers in order."""
        for prompt in prompts:
            yield completion(self.contract, list(self.stream(prompt, Sampling(max_new_tokens))))

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """One answer, token by token. The stop ids are the contract's, whatever the folder's own settings say."""
        import numpy as np
        import onnxruntime_genai as og

        limit = min(len(prompt) + sampling.max_new_tokens, self.contract.max_length)
        params = og.GeneratorParams(self.model)
        options: dict[str, Any] = {"max_length": limit, "do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
                "random_seed": sampling.seed,
            }
        params.set_search_options(**options)
        generator = og.Generator(self.model, params)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        for _ in range(limit - len(prompt)):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            yield token
            if token in self.contract.stop_ids or generator.is_done():
                return

    def logits(self, ids: Sequence[int]) -> Any:
        """float32 logits (vocabulary,) for the token after `ids`."""
        import numpy as np
        import onnxruntime_genai as og

        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=min(len(ids) + 1, self.contract.max_length))
        generator = og.Generator(self.model, params)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        return np.array(generator.get_output("logits"), dtype=np.float32)[0, -1].copy()


def onnx_runtime() -> Any:
    """The `onnxruntime_genai` module, its telemetry events off. Raises MissingPackageError where it is not installed."""
    try:
        import onnxruntime_genai as og
    except ImportError:
        raise MissingPackageError("ONNX Runtime GenAI is not installed", "pip install 'phinetune[onnx]'") from None
    disable = getattr(og, "disable_telemetry_events", None)
    if disable is not None:
        disable()
    return og


def load_onnx(folder: Path) -> OnnxGenerator:
    """The exported model in `folder`. Raises ExportError if ONNX Runtime cannot load it."""
    og = onnx_runtime()
    contract = load_contract(folder)
    try:
        return OnnxGenerator(og.Model(str(folder)), contract)
    except Exception as error:
        raise ExportError(
            f"{folder}: ONNX Runtime cannot load this model: {(str(error).strip() or repr(error)).splitlines()[0]}",
            "export it again",
        ) from error
