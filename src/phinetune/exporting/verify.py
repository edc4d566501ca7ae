"""Is the ONNX folder what was asked for? Options in the graph, settings, prompts, stop ids, loading. Else an ExportError.

The builder reports success for options it ignored and for models that do not load, so its word is not taken. What cannot be verified on
this machine (a provider that it has not, a model without its output layer) is said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phinetune.artifact import write_json
from phinetune.errors import ExportError, first_line
from phinetune.events import Note, OnEvent, log_event
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.graph import graph_problems, read_graph
from phinetune.exporting.prompts import TEXTS, settle_tokenizer, template_problems, token_problems
from phinetune.generation.onnx_backend import OnnxGenerator, onnx_runtime, open_folder
from phinetune.model.contract import Probe, PromptContract

GENAI_CONFIG = "genai_config.json"
_NO_KERNEL = "Could not find an implementation"  # for a type of numbers that the CPU does not compute with


def write_contract(folder: Path, contract: PromptContract, search: dict[str, Any] | None = None) -> None:
    """Put the prompt contract into an exported folder: tokenizer, template, and the stop and pad ids of `genai_config.json`, whose
    "search" takes `search` and is rid of what no runtime reads.

    A template that can open a thinking block is told there not to, as in training: runtimes have no argument for it."""
    contract.save(folder)
    template = folder / "chat_template.jinja"
    if "enable_thinking" in contract.chat_template and template.is_file():
        template.write_text("{% set enable_thinking = false %}" + contract.chat_template, encoding="utf-8")
    file = folder / GENAI_CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = list(contract.stop_ids)
    config["model"]["pad_token_id"] = contract.pad_token_id
    config["search"] = {k: v for k, v in config["search"].items() if v is not None}  # older runtimes refuse null
    config["search"] |= search or {}
    write_json(file, config)
    tokenizer_file = folder / "tokenizer_config.json"
    tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    if (
        tokenizer.get("tokenizer_class") == "TokenizersBackend"
    ):  # transformers 5's name, which older runtimes do not know
        write_json(tokenizer_file, {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"})
    settle_tokenizer(folder, contract)


def verify(
    folder: Path,
    config: ExportConfig,
    contract: PromptContract,
    prompts: Sequence[Probe] = (),
    on_event: OnEvent = log_event,
) -> dict[str, Any]:
    """Check the exported `folder` against what was asked; returns what was found. Raises ExportError with every difference.

    `prompts` are compared with ONNX Runtime's token ids as the contract's own probes are. What could not be verified is said, and is
    in the result under `not_verified`.
    """
    found = read_graph(folder / "model.onnx")
    model, lacking = open_model(folder, config)
    problems, unsure = graph_problems(found, config) + _settings_problems(folder, config, contract), list[str]()
    if model is not None:
        tokenizer = onnx_runtime().Tokenizer(model)
        of_template, unsure = template_problems(tokenizer, contract)
        problems += token_problems(tokenizer, contract, prompts) + of_template
    elif _NO_KERNEL not in lacking:
        problems.append(lacking)
    if problems:
        raise ExportError(
            [f"{folder.name.removesuffix('.partial')}: {p}" for p in problems],
            "the installed onnxruntime-genai does not build what was asked; try another version or other options",
        )
    unsure += [lacking] if lacking else []
    if model is not None and config.answers_prompts:
        check_runs(OnnxGenerator(model, contract), folder)
    elif model is not None:
        check_outputs(folder, contract)
        unsure.append(
            "it does not answer prompts by itself; that its outputs are finite was verified, its answers were not"
        )
    if config.extra_options:
        unsure.append(f"extra_options: the effect of {', '.join(config.extra_options)} was not verified")
    for text in unsure:
        on_event(Note(f"export: {text}", warning=True))
    compared = len(contract.probes) + len(prompts) + len(TEXTS) + 1 if model is not None else 0
    facts: dict[str, Any] = {**found.as_dict(), "prompts_compared": compared}
    if contract.pad_token_id in contract.stop_ids:  # many models have no other; runtimes tell padding by its place
        name = contract.tokenizer.convert_ids_to_tokens(contract.pad_token_id)
        on_event(Note(f"export: the model has one token, {name}, to end answers and to fill up batches"))
        facts["pad_is_stop_token"] = True
    return facts | ({"not_verified": unsure} if unsure else {})


def open_model(folder: Path, config: ExportConfig) -> tuple[Any, str]:
    """(`onnxruntime_genai.Model`, what is to be said about it): on its own provider, or on the CPU where this machine has not that one.

    The model is None where it does not load.
    """
    og = onnx_runtime()
    provider = config.execution_provider
    has_it = provider == "cpu" or bool(getattr(og, f"is_{provider}_available", lambda: False)())
    lacking = ""
    if not has_it:
        lacking = f"this machine's onnxruntime-genai has no {provider}: verified on the CPU"
    try:
        return open_folder(folder, providers=has_it), lacking
    except RuntimeError as error:
        reason = first_line(error)
        if not has_it and _NO_KERNEL in reason:
            kernel = f"the CPU cannot run it either ({reason[:60]}...)"
            return None, f"this machine's onnxruntime-genai has no {provider}, and {kernel}: loading was not verified"
        return None, f"ONNX Runtime cannot load it: {reason}"


def _settings_problems(folder: Path, config: ExportConfig, contract: PromptContract) -> list[str]:
    """Differences between what was asked and `genai_config.json`."""
    settings = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))
    stops = settings["model"].get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    problems = []
    if not set(contract.stop_ids) <= set(stops):
        problems.append(f"stops at tokens {stops}, the model was trained to stop at {list(contract.stop_ids)}")
    options: dict[str, Any] = {}
    for entry in settings["model"]["decoder"].get("session_options", {}).get("provider_options", []):
        options |= entry
    if set(options) != {config.execution_provider} - {"cpu"}:
        problems.append(f"runs on {', '.join(options) or 'cpu'}, {config.execution_provider} was asked for")
    if config.enable_cuda_graph and options.get("cuda", {}).get("enable_cuda_graph") != "1":
        problems.append("genai_config.json does not enable CUDA graphs, enable_cuda_graph was asked for")
    for name, value in (config.search or {}).items():
        if settings["search"].get(name) != value:
            problems.append(f"search.{name} is {settings['search'].get(name)!r}, {value!r} was asked for")
    return problems


def check_runs(generator: OnnxGenerator, folder: Path) -> None:
    """Raises ExportError if the model does not run, or if its logits for a probe are not finite."""
    import numpy as np

    probe = next((p for p in generator.contract.probes if p.ids), None)
    try:
        logits = generator.logits(probe.ids) if probe is not None else np.zeros(1)
    except RuntimeError as error:  # the runtime's: a kernel that refuses these sizes
        raise ExportError(f"{folder}: ONNX Runtime cannot run it: {first_line(error)}") from error
    if not np.isfinite(logits).all():
        raise ExportError(
            f"{folder}: the model's logits are not finite", "the weights do not survive this precision; try another"
        )


def check_outputs(folder: Path, contract: PromptContract) -> None:
    """Raises ExportError if a graph without embedding or output layer does not run, or gives values that are not finite."""
    import numpy as np

    probe = next((p for p in contract.probes if p.ids), Probe("", (0,)))
    try:
        outputs = run_graph(folder, probe.ids)
    except Exception as error:
        if not isinstance(error, RuntimeError) and not type(error).__module__.startswith("onnxruntime"):
            raise  # a mistake of ours; onnxruntime's own errors have no base of theirs
        raise ExportError(f"{folder}: ONNX Runtime cannot run it: {first_line(error)}") from error
    if not all(np.isfinite(values).all() for values in outputs.values()):
        raise ExportError(
            f"{folder}: the model's outputs are not finite", "the weights do not survive this precision; try another"
        )


def run_graph(folder: Path, ids: Sequence[int], embeddings: Any = None) -> dict[str, Any]:
    """logits (1, tokens, vocabulary) and hidden_states (1, tokens, width) of one step without a cache, by plain ONNX Runtime on the CPU.

    `embeddings` (1, tokens, width) are what a model without its input embedding gets; small random ones if none are given.
    """
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    head = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]["decoder"]["head_size"]
    feed: dict[str, Any] = {}
    for entry in session.get_inputs():
        kind = kinds[entry.type]
        if entry.name.startswith("past"):
            feed[entry.name] = np.zeros((1, entry.shape[1], 0, head), kind)  # (batch, heads, tokens so far, width)
        elif entry.name == "inputs_embeds":
            random = np.random.default_rng(0).normal(size=(1, len(ids), entry.shape[-1])) * 0.1
            feed[entry.name] = np.asarray(random if embeddings is None else embeddings, kind)
        else:
            values = {"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": range(len(ids))}
            feed[entry.name] = np.array([list(values[entry.name])], kind)
    wanted = [o.name for o in session.get_outputs() if o.name in ("logits", "hidden_states")]
    return dict(zip(wanted, session.run(wanted, feed), strict=True))
