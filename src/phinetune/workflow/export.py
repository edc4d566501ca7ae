"""Export a model to ONNX: build, put the prompt contract in, verify, and only then give the folder its name."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from phinetune.artifact import StageFolder, building, check_output, content_key, file_hash, is_finished, read_manifest
from phinetune.config import parse
from phinetune.data.examples import training_prompts
from phinetune.data.messages import parse_data_config
from phinetune.data.sources import data_source
from phinetune.errors import DataError, ExportError
from phinetune.events import Note, OnEvent, log_event, nobody
from phinetune.exporting.build import build_onnx, check_builder, keep_window
from phinetune.exporting.config import ExportConfig
from phinetune.exporting.options import architecture_problem, check_options, installed_builder
from phinetune.generation.load import adapter_base, find
from phinetune.generation.onnx_backend import open_folder
from phinetune.generation.threads import measure_threads, threads_for
from phinetune.model.contract import Probe, PromptContract
from phinetune.model.folder import base_key, weight_files
from phinetune.model.grid import read_grid
from phinetune.quiet import measuring
from phinetune.workflow.export_beside import export_beside, goes_beside
from phinetune.workflow.merge import INHERITED, adapter_key, merge
from phinetune.workflow.parity import compare_with_torch
from phinetune.workflow.quantize import choose_ways, put_codes
from phinetune.workflow.survival import Reference, check_answers, check_weights, reference_answers, worst_layers
from phinetune.workflow.tune import first_that_keeps, in_order_of_speed, write_threads

_TRAINING_PROMPTS = 200  # prompts of the training whose token ids are compared with ONNX Runtime's
_VERSION = 4  # of what is built for a config; one more when a default changes


def parse_export_config(config: dict[str, Any] | ExportConfig | None) -> ExportConfig:
    """An ExportConfig from its fields, or itself."""
    return config if isinstance(config, ExportConfig) else parse(ExportConfig, config or {}, "export")


def export(
    model: str,
    output_dir: str | Path,
    export_config: dict[str, Any] | ExportConfig | None = None,
    base_model: str | None = None,
    adapters: list[str] | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    compare_answers: bool = True,
    on_event: OnEvent = log_event,
) -> StageFolder:
    """Write `model` (a merged or base model; an adapter is merged first) as an ONNX Runtime GenAI folder, verified.

    adapters: folders of adapters of the base model `model`, to be switched while it runs instead (see `export_adapters`).
    compare_answers: of int4 and int8, ask the training's held-out examples before and after (see `ExportConfig.max_drop`); false where
    every stage is evaluated anyway.

    Verified means: the graph shows every option that was asked for, the folder loads and answers, its tokenizer gives the ids that
    training used and its chat template the prompts, it stops where the model was trained to stop; its logits are torch's (see
    `workflow.parity`). What could not be verified is said. Raises ConfigError for options that cannot be, before anything is built;
    ExportError for a model that is not built, and for a folder that is not what was asked for, and leaves nothing.
    """
    if adapters:
        from phinetune.workflow.export_adapters import export_adapters

        return export_adapters(
            adapters, output_dir, export_config, base_model or model, (), trust_remote_code, overwrite, on_event
        )
    config = parse_export_config(export_config)
    check_builder()
    source, kind = find(model, on_event=on_event)
    folder = Path(output_dir).expanduser()
    if kind == "onnx":
        raise ExportError(f"{model}: is an ONNX folder already", "give a merged model, a base model or an adapter")
    base = adapter_base(source, base_model, on_event) if kind == "adapter" else source
    check_export(config, base, trust_remote_code)
    weights = weight_files(base)[0]
    content = adapter_key(source) if kind == "adapter" else base_key(source)
    beside = kind == "adapter" and goes_beside(source, config, on_event)
    key = content_key("export", _VERSION, content, changed_fields(config), *(["beside"] if beside else []))
    needed = sum(f.stat().st_size for f in weights) * (1 if config.precision == "int4" else 4)
    check_output(folder, "onnx", key, overwrite, needed)
    if is_finished(folder, "onnx", key) and not overwrite:
        on_event(Note(f"unchanged: {folder} holds the result of exactly this export"))
        return StageFolder(folder, read_manifest(folder), unchanged=True)
    made_from = read_manifest(source)
    record: dict[str, Any] = {"stage": "export", "model": str(source.absolute()), "export": asdict(config)}
    record |= {k: made_from[k] for k in INHERITED if k in made_from}
    with building(folder, "onnx", key, record) as partial:
        if beside:
            record["verified"], record["survival"] = export_beside(
                source, base, partial, config, base_model, trust_remote_code, compare_answers, on_event
            )
        else:
            if kind == "adapter":
                source = merge(
                    str(source), partial / "merged", base_model, trust_remote_code=trust_remote_code, on_event=on_event
                ).folder

            def make(candidate: ExportConfig) -> dict[str, Any]:
                made = {"verified": build_verified(source, partial, candidate, made_from, trust_remote_code, on_event)}
                if candidate.quantized and candidate.answers_prompts:
                    job = _Codes(source, partial, candidate, made_from, base_model, trust_remote_code, on_event)
                    made["survival"] = job.settle(compare_answers)
                return made

            candidates = [config]
            if config.tune:
                grid = read_grid(made_from.get("grid"), "manifest.json: grid")
                candidates = in_order_of_speed(source, config, grid, trust_remote_code, on_event)
            config, made = first_that_keeps(candidates, make, partial, on_event)
            record |= {**made, "export": asdict(config)}
        if config.execution_provider == "cpu" and config.answers_prompts:
            record["threads"] = choose_threads(partial, on_event)
            if config.tune:
                write_threads(partial)
        shutil.rmtree(partial / "merged", ignore_errors=True)
    sure = "" if "not_verified" in record["verified"] else "; options, token ids, stop ids and loading verified"
    on_event(Note(f"ONNX {config.precision}: written to {folder}{sure}"))
    return StageFolder(folder, read_manifest(folder))


def choose_threads(folder: Path, on_event: OnEvent) -> dict[str, Any]:
    """How many threads the folder is run with on this machine, and the seconds that this was chosen by, if it was measured."""
    with measuring(on_event):
        seconds = measure_threads(folder, lambda threads: open_folder(folder, threads))
    threads = threads_for(folder)
    if len(seconds) > 1:
        times = ", ".join(f"{s * 1e3:.0f} ms with {n}" for n, s in seconds.items())
        on_event(Note(f"export: {threads} threads are best on this machine ({times}, a short prompt with its answer)"))
    return {"chosen": threads, "seconds": seconds}


class _Codes:
    """The integers of a folder that was built and verified: which way they are computed, and what they left of the fine-tuning."""

    def __init__(
        self,
        source: Path,
        folder: Path,
        config: ExportConfig,
        made_from: dict[str, Any],
        base_model: str | None,
        trust_remote_code: bool,
        on_event: OnEvent,
    ) -> None:
        from phinetune.model.load import load_base_contract

        self.source, self.folder, self.config, self.made_from = source, folder, config, made_from
        self.base_model, self.trust, self.on_event = base_model, trust_remote_code, on_event
        self.contract = load_base_contract(source, trust_remote_code)

    def settle(self, compare_answers: bool = True) -> dict[str, Any]:
        """Try one way after another until the fine-tuning survives; figures for the manifest. Raises ExportError if it does with none."""
        from phinetune.exporting.verify import verify

        grid = read_grid(self.made_from.get("grid"), "manifest.json: grid")
        choice = choose_ways(self.config, self.source, grid, self.made_from, self.contract, self.on_event)
        reference: Reference | str = "not asked for"
        if compare_answers:
            reference = reference_answers(self.source, self.made_from, self.contract, self.trust, self.on_event)
        if compare_answers and isinstance(reference, str):
            self.on_event(Note(f"export: answers before and after are not compared: {reference}"))
        tried: list[dict[str, Any]] = []
        raised: dict[str, float] = {}
        for i, way in enumerate(choice.ways):
            if way != "default" or i:  # the builder's own codes are in the graph already
                raised = put_codes(
                    self.source, self.folder, self.config, way, choice.examples, self.trust, self.on_event
                )
                verify(self.folder, self.config, self.contract, (), nobody)  # the graph is another one now
                compare_with_torch(self.source, self.folder, self.config, self.contract, self.trust, nobody)
            why = choice.reason if not i else f"{choice.ways[i - 1]} lost too much"
            self.on_event(Note(f"export: codes by {way}{f' ({why})' if why else ''}"))
            figures, problems = self.gauge(reference)
            figures |= {"raised": raised} if raised else {}
            tried.append({"way": way, "why": why, **figures, **({"problems": problems} if problems else {})})
            if not problems:
                return {**tried[-1], **({"tried": [t["way"] for t in tried]} if i else {})}
        texts = [f"{t['way']}: {problem}" for t in tried for problem in t["problems"]]
        worst = next((w for t in tried if (w := worst_layers(t.get("weights", {})))), "")
        raise ExportError(
            [f"{self.config.precision}: {text}" for text in texts],
            f"{f'least survives in {worst}; ' if worst else ''}train with training_config.int4_aware=true, take precision int8, "
            "or allow more with export.max_drop",
        )

    def gauge(self, reference: Reference | str) -> tuple[dict[str, Any], list[str]]:
        """(figures, problems) of the folder as it is now."""
        from phinetune.generation.onnx_backend import load_onnx

        weights, problems = check_weights(self.source, self.folder, self.base_model, self.trust, self.on_event)
        figures: dict[str, Any] = {"weights": weights} if weights else {}
        if not isinstance(reference, str) and self.config.execution_provider == "cpu":
            figures["answers"], lost = check_answers(reference, load_onnx(self.folder), self.config, self.on_event)
            problems += [lost] if lost else []
        return figures, problems


def check_export(config: ExportConfig, base: Path, trust_remote_code: bool = False) -> None:
    """Raise ConfigError for options that cannot be, for the model in the folder `base` and the installed builder; ExportError for a model
    that it does not build."""
    from phinetune.model.load import read_model_config

    values, builder = read_model_config(base, trust_remote_code).to_dict(), installed_builder()
    values = {**values.get("text_config", {}), **values}
    if problem := architecture_problem(values, builder):
        known = ", ".join(sorted(n.removesuffix("ForCausalLM") for n in builder.architectures if "CausalLM" in n))
        raise ExportError(problem, f"it builds {known}" if known and "does not build" in problem else "")
    check_options(config, values, builder)


def changed_fields(config: ExportConfig) -> dict[str, Any]:
    """The fields that are not at their default: what decides an export, whatever fields later versions add."""
    values = asdict(config)
    return {f.name: values[f.name] for f in fields(config) if values[f.name] != f.default}


def build_verified(
    source: Path,
    folder: Path,
    config: ExportConfig,
    made_from: dict[str, Any],
    trust_remote_code: bool,
    on_event: OnEvent,
    contract: PromptContract | None = None,
) -> dict[str, Any]:
    """Build the plain model `source` into `folder`, put its contract (its own, if none is given) in, verify; returns what was verified."""
    from phinetune.exporting.verify import verify, write_contract
    from phinetune.model.load import load_base_contract, read_model_config

    contract = contract or load_base_contract(source, trust_remote_code)
    build_onnx(source, folder, config, trust_remote_code, on_event)
    keep_window(folder, read_model_config(source, trust_remote_code))
    write_contract(folder, contract, config.search)
    verified = verify(folder, config, contract, training_probes(made_from, contract), on_event)
    if verified["prompts_compared"]:  # else it does not load on this machine
        verified |= compare_with_torch(source, folder, config, contract, trust_remote_code, on_event)
    return verified


def training_probes(made_from: dict[str, Any], contract: PromptContract) -> list[Probe]:
    """The first prompts of the training's data file, if it is still there unchanged, with the ids that training saw."""
    data, sha256 = made_from.get("data"), made_from.get("data_sha256")
    if not isinstance(data, dict) or not sha256:
        return []
    config = parse_data_config(data)
    try:
        file = data_source(config, fetch=False)
    except DataError:
        return []
    if file_hash(file) != sha256:
        return []
    texts = itertools.islice(training_prompts(config, contract, file), _TRAINING_PROMPTS)
    return [Probe(text, tuple(contract.tokenize(text))) for text in texts]
