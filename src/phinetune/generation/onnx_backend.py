"""The ONNX Runtime GenAI backend: an exported folder answering prompts, one at a time, with one of its adapters or none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.data.examples import MASKED
from phinetune.errors import AdapterError, ExportError, MissingPackageError, did_you_mean, first_line
from phinetune.generation.protocol import Completion, LabelledIds, Prediction, Sampling, completion
from phinetune.generation.threads import as_overlay, threads_for
from phinetune.model.contract import PromptContract, load_contract

ADAPTER_SUFFIX = ".onnx_adapter"


class OnnxAdapters:
    """The adapters that lie beside an exported model, each loaded when it is first asked for."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.held = onnx_runtime().Adapters(model)
        self.files = {file.stem: file for file in sorted(folder.glob(f"*{ADAPTER_SUFFIX}"))}
        self.loaded: set[str] = set()

    def load(self, name: str) -> None:
        """Have the adapter `name` ready. Raises AdapterError if there is none of that name, or it is damaged."""
        if name in self.loaded:
            return
        if name not in self.files:
            known = ", ".join(self.files) or "none"
            raise AdapterError(
                f"no adapter {name!r} here{did_you_mean(name, self.files)}", f"the adapters are: {known}"
            )
        try:
            self.held.load(str(self.files[name]), name)
        except RuntimeError as error:
            reason = first_line(error)
            raise AdapterError(
                f"{self.files[name]}: ONNX Runtime cannot load it: {reason}", "export it again"
            ) from error
        self.loaded.add(name)


@dataclass(frozen=True)
class OnnxGenerator:
    """An `onnxruntime_genai.Model` and its contract. Build with `load_onnx`.

    `adapter` is the name of the one in use; `with_adapter` gives a generator over the same model with another, or with none.
    """

    model: Any
    contract: PromptContract
    adapters: OnnxAdapters | None = None
    adapter: str | None = None

    def with_adapter(self, name: str | None) -> OnnxGenerator:
        """The same model with the adapter `name`, or without. Raises AdapterError if there is none of that name."""
        if name is not None:
            if self.adapters is None:
                raise AdapterError(f"no adapter {name!r}: the model was not loaded from a folder with adapters")
            self.adapters.load(name)
        return replace(self, adapter=name)

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
        options: dict[str, Any] = {"max_length": limit, "do_sample": sampling.temperature > 0, "num_beams": 1}
        if sampling.temperature > 0:
            options |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
                "random_seed": sampling.seed,
            }
        params.set_search_options(**options)
        generator = self._generator(params)
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
        generator = self._generator(params)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        return np.array(generator.get_output("logits"), dtype=np.float32)[0, -1].copy()

    def predictions(self, rows: Sequence[LabelledIds]) -> Iterator[list[Prediction]]:
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
            losses = norms - rows_of[np.arange(len(predicted)), [labels[i] for i in predicted]]
            yield [Prediction(*pair) for pair in zip(losses.tolist(), rows_of.argmax(-1).tolist(), strict=True)]

    def _logits_from(self, ids: Sequence[int], start: int) -> Any:
        """float32 logits (len(ids) - start, vocabulary) after each of `ids` from `start` on, in one go where the graph gives them."""
        import numpy as np
        import onnxruntime_genai as og

        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=min(len(ids) + 1, self.contract.max_length))
        generator = self._generator(params)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        found = np.array(generator.get_output("logits"), dtype=np.float32)[
            0
        ]  # (T, vocabulary), or of the last tokens only
        if len(found) >= len(ids) - start:
            return found[len(found) - (len(ids) - start) :]
        generator = self._generator(params)
        rows = []
        for begin, end in [(0, start + 1), *((i, i + 1) for i in range(start + 1, len(ids)))]:
            generator.append_tokens(np.array(ids[begin:end], dtype=np.int32))
            rows.append(np.array(generator.get_output("logits"), dtype=np.float32)[0, -1].copy())
        return np.stack(rows)

    def _generator(self, params: Any) -> Any:
        import onnxruntime_genai as og

        generator = og.Generator(self.model, params)
        if self.adapter is not None and self.adapters is not None:
            generator.set_active_adapter(self.adapters.held, self.adapter)
        return generator


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


def load_onnx(folder: Path, adapter: str | None = None) -> OnnxGenerator:
    """The exported model in `folder`, with the adapter of that name beside it if one is given.

    Raises ExportError if ONNX Runtime cannot load it, or if it was exported without its embedding or output layer; AdapterError if
    there is no such adapter.
    """
    onnx_runtime()
    contract = load_contract(folder)
    check_complete(folder)
    try:
        model = open_folder(folder)
    except RuntimeError as error:
        raise ExportError(
            f"{folder}: ONNX Runtime cannot load this model: {first_line(error)}",
            "export it again",
        ) from error
    generator = OnnxGenerator(model, contract)
    if adapter is None and not any(folder.glob(f"*{ADAPTER_SUFFIX}")):
        return generator
    return replace(generator, adapters=OnnxAdapters(model, folder)).with_adapter(adapter)


def open_folder(folder: Path, threads: int | None = None, providers: bool = True) -> Any:
    """The `onnxruntime_genai.Model` of an exported folder, on `threads` threads or as many as are best here; else what the runtime raises.

    providers: run on what its settings name; false for the CPU.
    """
    og = onnx_runtime()
    settings = og.Config(str(folder))
    if not providers:
        settings.clear_providers()
    threads = threads or threads_for(folder)
    if threads is not None and hasattr(settings, "overlay"):  # onnxruntime-genai 0.11 has it not
        settings.overlay(as_overlay(threads))
    return og.Model(settings)


def check_complete(folder: Path) -> None:
    """Raise ExportError for a model without its embedding or its output layer: it cannot answer prompts by itself."""
    try:
        decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # the runtime says what is wrong
    for key, part, name in (("inputs", "input embedding", "input_ids"), ("outputs", "output layer", "logits")):
        if key in decoder and name not in decoder[key]:
            raise ExportError(
                f"{folder}: was exported without its {part}, it does not answer prompts by itself",
                "export it without exclude_embeds and exclude_lm_head",
            )
