"""The ONNX Runtime GenAI backend: an exported folder answering prompts, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phinetune.data.examples import MASKED
from phinetune.errors import ExportError, MissingPackageError
from phinetune.generation.protocol import Completion, LabelledIds, Sampling, completion
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

    def label_losses(self, rows: Sequence[LabelledIds]) -> Iterator[list[float]]:
        """See `Generator`. One row at a time."""
        import numpy as np

        for ids, labels in rows:
            predicted = [i for i in range(1, len(labels)) if labels[i] != MASKED]  # position i is predicted at i - 1
            if not predicted:
                yield []
                continue
            logits = self._logits_from(list(ids[: predicted[-1]]), predicted[0] - 1)
            rows_of = logits[[i - predicted[0] for i in predicted]].astype(np.float64)  # (N, vocabulary)
            highest = rows_of.max(-1, keepdims=True)
            norms = np.log(np.exp(rows_of - highest).sum(-1)) + highest[:, 0]
            yield (norms - rows_of[np.arange(len(predicted)), [labels[i] for i in predicted]]).tolist()

    def _logits_from(self, ids: Sequence[int], start: int) -> Any:
        """float32 logits (len(ids) - start, vocabulary) after each of `ids` from `start` on, in one go where the graph gives them."""
        import numpy as np
        import onnxruntime_genai as og

        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=min(len(ids) + 1, self.contract.max_length))
        generator = og.Generator(self.model, params)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        found = np.array(generator.get_output("logits"), dtype=np.float32)[
            0
        ]  # (T, vocabulary), or of the last tokens only
        if len(found) >= len(ids) - start:
            return found[len(found) - (len(ids) - start) :]
        generator = og.Generator(self.model, params)
        rows = []
        for begin, end in [(0, start + 1), *((i, i + 1) for i in range(start + 1, len(ids)))]:
            generator.append_tokens(np.array(ids[begin:end], dtype=np.int32))
            rows.append(np.array(generator.get_output("logits"), dtype=np.float32)[0, -1].copy())
        return np.stack(rows)


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
