"""Export a base model once and any number of its adapters beside it, to be switched while the model runs.

The base is built and verified as any export; then its graph gets inputs for factors (`exporting/lora_inputs.py`), and every adapter a
file. Base and adapters are made together and proven together: with each adapter active the folder gives the logits of torch with that
adapter, without one those of the base. Not here: adapters that are no sum of two factors (DoRA, trained modules): those are merged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.artifact import StageFolder, building, check_output, content_key, is_finished, read_manifest
from phinetune.errors import AdapterError, ConfigError, ExportError
from phinetune.events import Note, OnEvent, log_event
from phinetune.exporting.adapter_files import check_formats, write_factors
from phinetune.exporting.build import check_builder
from phinetune.exporting.config import ExportConfig
from phinetune.generation.load import adapter_base, adapter_contract, find, trained_overrides
from phinetune.model.contract import PromptContract
from phinetune.model.folder import base_key, weight_files
from phinetune.workflow.export import build_verified, changed_fields, check_export, parse_export_config
from phinetune.workflow.export_beside import check_codes, grid_of_base
from phinetune.workflow.merge import INHERITED, adapter_key
from phinetune.workflow.parity import FP_TOLERANCE

if TYPE_CHECKING:
    import torch

    from phinetune.lora.adapter import SavedAdapter
    from phinetune.model.grid import Grid

_VERSION = 2
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LIKENESS = (0.1, 0.5)
"""Cosine between what an adapter does to a quantized model's logits and to torch's: refused below the first, warned of below the second.
Rounding the base turns the effect of strong adapters in deep models, so only directions that have nothing in common are an error."""


@dataclass(frozen=True)
class _Named:
    """An adapter under the name that it is switched on by."""

    name: str
    folder: Path
    saved: SavedAdapter
    contract: PromptContract


def export_adapters(
    adapters: Sequence[str] | Mapping[str, str],
    output_dir: str | Path,
    export_config: dict[str, Any] | ExportConfig | None = None,
    base_model: str | None = None,
    formats: Sequence[str] = ("onnx_adapter",),
    trust_remote_code: bool = False,
    overwrite: bool = False,
    on_event: OnEvent = log_event,
) -> StageFolder:
    """Write the base model of `adapters` as an ONNX folder, and beside it one `NAME.onnx_adapter` for each.

    adapters: their folders, called by the folders' names, or name -> folder. All must be of one base model and one prompt contract.
    formats: what to write beside the .onnx_adapter files: "safetensors", "numpy" (.npz). In floating point the logits with every adapter
    are torch's within the tolerance of `export`; in int4 and int8, what the adapter changes must resemble what it changes in torch.
    Raises ConfigError for options that cannot be, AdapterError for adapters that cannot be switched or do not belong together, before
    anything is built; ExportError for a folder that is not what was asked for, and leaves nothing.
    """
    config = parse_export_config(export_config)
    if config.algorithm == "auto":  # factors go over the codes that each of them was measured with
        config = replace(config, algorithm="default")
    check_formats(formats)
    _check_config(config)
    check_builder()
    named = _read(_names(adapters), trust_remote_code, base_model, on_event)
    grid = _trained_over(named, config, on_event)
    base = adapter_base(named[0].folder, base_model)
    check_export(config, base, trust_remote_code)
    folder = Path(output_dir).expanduser()
    content = {a.name: adapter_key(a.folder) for a in named}
    key = content_key("export_adapters", _VERSION, base_key(base), content, changed_fields(config), sorted(formats))
    needed = sum(f.stat().st_size for f in weight_files(base)[0]) * (1 if config.precision == "int4" else 4)
    check_output(folder, "onnx", key, overwrite, needed)
    if is_finished(folder, "onnx", key) and not overwrite:
        on_event(Note(f"unchanged: {folder} holds the result of exactly this export"))
        return StageFolder(folder, read_manifest(folder), unchanged=True)
    trained = {a.name: _training(a) for a in named}
    record: dict[str, Any] = {"stage": "export", "model": str(base.absolute()), "export": asdict(config)}
    record |= {"base_key": base_key(base), "adapters": trained}
    with building(folder, "onnx", key, record) as partial:
        job = _Export(base, partial, config, named, grid, trust_remote_code, on_event)
        record["verified"] = job.run(formats)
        for name, figures in job.figures.items():
            trained[name] |= figures
    on_event(Note(f"ONNX {config.precision} with {len(named)} adapters ({', '.join(trained)}): written to {folder}"))
    return StageFolder(folder, read_manifest(folder))


def _trained_over(named: list[_Named], config: ExportConfig, on_event: OnEvent) -> Grid | None:
    """The grid of this export, if all adapters were trained over a base on exactly it; those over another base in few bits are told."""
    for adapter in named:
        if read_manifest(adapter.folder).get("quantization") and grid_of_base(adapter.folder) != config.grid:
            over = grid_of_base(adapter.folder) or "4 bits"
            text = f"{adapter.name}: was trained over a base in {over}; it is exported over another"
            on_event(Note(text, warning=True))
    return config.grid if all(grid_of_base(a.folder) == config.grid for a in named) else None


def _check_config(config: ExportConfig) -> None:
    """Raise ConfigError for options that do not go with adapters."""
    reasons = {
        "exclude_embeds": "the model must answer prompts",
        "exclude_lm_head": "the model must answer prompts",
        "enable_cuda_graph": "a captured graph cannot switch adapters",
        "use_cuda_bf16": "factors are given as float32 or float16",
    }
    problems = [f"export.{name}: not with adapters: {why}" for name, why in reasons.items() if getattr(config, name)]
    if config.precision == "bf16":
        problems.append("export.precision: not bf16 with adapters: factors are given as float32 or float16")
    if problems:
        raise ConfigError(problems)


def _names(adapters: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """name -> folder. Raises ConfigError for names that are no file names, or taken twice."""
    if isinstance(adapters, str):
        adapters = [adapters]
    pairs = list(adapters.items()) if isinstance(adapters, Mapping) else [(Path(a).name, a) for a in adapters]
    names = [name for name, _ in pairs]
    problems = [f"adapters: {n!r} cannot be the name of an adapter" for n in names if not _NAME.fullmatch(n)]
    problems += [f"adapters: two are called {n!r}" for n in dict.fromkeys(names) if names.count(n) > 1]
    if not pairs:
        problems = ["adapters: at least one is needed"]
    if problems:
        raise ConfigError(problems, "give them as name: folder")
    return dict(pairs)


def _read(folders: dict[str, str], trust: bool, base_model: str | None, on_event: OnEvent) -> list[_Named]:
    """The adapters, checked to be of one base model and one prompt contract, and to be sums of two factors."""
    from phinetune.lora.adapter import read_adapter

    named, bases, problems = [], {}, []
    for name, given in folders.items():
        folder, kind = find(given, on_event=on_event)
        if kind != "adapter":
            raise AdapterError(f"{given}: is not an adapter folder", "give the output folder of finetune")
        base = adapter_base(folder, base_model, on_event)
        named.append(_Named(name, folder, read_adapter(folder), adapter_contract(folder, base, trust)))
        bases[name] = base_key(base)
        problems += [f"{name}: {text}" for text in not_switchable(folder, named[-1].saved)]
    first = named[0]
    problems += [
        f"{n}: belongs to another base model than {first.name}" for n in bases if bases[n] != bases[first.name]
    ]
    for other in named[1:]:
        mine, own = first.contract.as_dict(), other.contract.as_dict()
        if different := [k for k in mine if mine[k] != own[k]]:
            problems.append(f"{other.name}: its prompt contract is not that of {first.name}: {', '.join(different)}")
    if problems:
        raise AdapterError(problems, "merge and export such an adapter by itself: export --model ADAPTER")
    return named


def not_switchable(folder: Path, saved: SavedAdapter) -> list[str]:
    """One line for everything that an adapter has beside the factors of linear layers."""
    from phinetune.lora.changes import read_changes

    changes = read_changes(saved)
    found = {
        "DoRA's lengths": [m for m, c in changes.weights.items() if c.magnitude is not None],
        "factors of an embedding": [m for m, c in changes.weights.items() if c.is_embedding],
        "trained modules or biases": list(changes.tensors),
    }
    problems = [f"{what} cannot stand beside the base ({', '.join(at[:3])})" for what, at in found.items() if at]
    overrides = {k: v for k, v in trained_overrides(folder).items() if k != "use_cache"}
    if overrides:
        problems.append(f"was trained with other fields of the model's config: {', '.join(overrides)}")
    return problems


def _training(adapter: _Named) -> dict[str, Any]:
    """What the manifest says of one adapter."""
    manifest = read_manifest(adapter.folder)
    return {"folder": str(adapter.folder.absolute()), **{k: manifest[k] for k in INHERITED if k in manifest}}


def factors_of(saved: SavedAdapter, base: Path, folder: Path) -> dict[str, Any]:
    """Input's name -> float32 values of an adapter, for the graph in `folder`. Raises AdapterError with all that fits nowhere."""
    import onnx

    from phinetune.exporting.lora_inputs import find_places, lora_inputs
    from phinetune.lora.changes import read_changes
    from phinetune.lora.shards import Layout

    places = find_places(onnx.load(str(folder / "model.onnx"), load_external_data=False))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    shapes = Layout(weight_files(base)[0]).shapes()
    layers = {n.removesuffix(".weight"): s[0] for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2}
    changes = read_changes(saved, str(config.get("model_type") or "")).weights
    return lora_inputs(changes, places, layers, config, saved.config.fused_modules or {})


class _Export:
    """One base model, its adapters, and the folder under construction."""

    def __init__(
        self,
        base: Path,
        folder: Path,
        config: ExportConfig,
        adapters: list[_Named],
        grid: Grid | None,
        trust_remote_code: bool,
        on_event: OnEvent,
    ) -> None:
        self.base, self.folder, self.config, self.adapters, self.grid = base, folder, config, adapters, grid
        self.trust, self.on_event = trust_remote_code, on_event
        self.contract = adapters[0].contract
        self.figures: dict[str, dict[str, Any]] = {}

    def run(self, formats: Sequence[str]) -> dict[str, Any]:
        """Build, put the inputs in, write the adapters, prove; returns what was verified."""
        from phinetune.exporting.graph import graph_problems, read_graph
        from phinetune.exporting.lora_inputs import add_inputs

        verified = build_verified(
            self.base,
            self.folder,
            self.config,
            read_manifest(self.adapters[0].folder),
            self.trust,
            self.on_event,
            self.contract,
        )
        if self.grid is not None:
            check_codes(self.base, self.folder, self.config)
        before = self.onnx_logits([None])[0] if verified["prompts_compared"] else None
        inputs = self.inputs()
        made = add_inputs(self.folder / "model.onnx", {name for own in inputs.values() for name in own})
        for name, own in inputs.items():
            typed = {key: values.astype(made[key][0]) for key, values in own.items()}
            self.check(name, typed)
            files = write_factors(self.folder, name, typed, formats)
            ranks = sorted({v.shape[1] for k, v in typed.items() if k.endswith(".lora_A")})
            self.figures[name] = {"files": files, "products": len(typed) // 2, "ranks": ranks}
        if problems := graph_problems(read_graph(self.folder / "model.onnx"), self.config):
            raise ExportError(problems, "the inputs for the adapters broke the graph")
        if before is None:
            return verified
        return self.prove(before, verified)

    def inputs(self) -> dict[str, dict[str, Any]]:
        """Adapter's name -> input's name -> float32 values. Raises AdapterError with all that fits nowhere."""
        made = {}
        for adapter in self.adapters:
            try:
                made[adapter.name] = factors_of(adapter.saved, self.base, self.folder)
            except AdapterError as error:
                raise AdapterError([f"{adapter.name}: {p}" for p in error.problems], error.hint) from None
        return made

    def check(self, name: str, inputs: dict[str, Any]) -> None:
        """Raises AdapterError for values that the graph's type cannot hold."""
        import numpy as np

        if broken := [key for key, values in inputs.items() if not np.isfinite(values).all()]:
            raise AdapterError(
                f"{name}: {', '.join(broken[:3])}: not finite in {inputs[broken[0]].dtype}", "export in fp32"
            )

    def onnx_logits(self, names: Sequence[str | None]) -> list[torch.Tensor]:
        """(probes, vocabulary) for each adapter of `names`, over one loaded model."""
        import numpy as np
        import torch

        from phinetune.exporting.verify import open_model
        from phinetune.generation.onnx_backend import OnnxAdapters, OnnxGenerator

        model, lacking = open_model(self.folder, self.config)
        if model is None:
            raise ExportError(f"{self.folder}: {lacking}", "the inputs for the adapters broke the graph")
        generator = OnnxGenerator(model, self.contract, OnnxAdapters(model, self.folder))
        found = []
        for name in names:
            active = generator.with_adapter(name)
            found.append(torch.from_numpy(np.stack([active.logits(p.ids) for p in self.contract.probes])))
        return found

    def fits(self) -> bool:
        """The base in float32 fits into the free memory."""
        from phinetune.model.compute import available_memory
        from phinetune.model.folder import stored_dtype

        size = sum(f.stat().st_size for f in weight_files(self.base)[0]) * 4 / stored_dtype(self.base).itemsize
        free = available_memory()
        return free is None or size * 1.3 < free

    def torch_logits(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(the base's, each adapter's) logits (probes, vocabulary) in float32 torch."""
        import torch

        from phinetune.lora.adapter import load_adapter
        from phinetune.model.load import LoadPlan, load_model
        from phinetune.model.probe import probe_logits

        cpu = torch.device("cpu")
        model = load_model(self.base, LoadPlan(torch.float32, cpu, None, self.trust, quantization=self.grid))
        plain, adapted = probe_logits(model, self.contract), {}
        for adapter in self.adapters:
            layers = load_adapter(model, adapter.folder)
            adapted[adapter.name] = probe_logits(model, self.contract)
            layers.take_out(model)
        return plain, adapted

    def prove(self, before: torch.Tensor, verified: dict[str, Any]) -> dict[str, Any]:
        """Compare with the graph before, and with torch. Raises ExportError for an adapter that does not do what it does in torch."""
        names = [a.name for a in self.adapters]
        none, *active, again = self.onnx_logits([None, *names, None])
        tolerance = FP_TOLERANCE.get(self.config.precision)
        changed = max(float((x - before).abs().max()) for x in (none, again))
        if changed > 1e-4 * max(1.0, float(before.abs().max())):
            raise ExportError(f"the inputs for the adapters change the base's logits by {changed:.3g}")
        if not self.fits():
            text = "the model does not fit into this machine's free memory: its adapters were not compared with torch"
            self.on_event(Note(f"export: {text}", warning=True))
            return {**verified, "not_verified": [*verified.get("not_verified", []), text]}
        plain, adapted = self.torch_logits()
        problems = []
        for name, logits in zip(names, active, strict=True):
            moved, wanted = logits - none, adapted[name] - plain
            figures: dict[str, Any] = {"logits_moved": float(moved.abs().max())}
            if tolerance is not None:
                figures["logits_distance"] = float((logits - adapted[name]).abs().max())
                if not figures["logits_distance"] <= tolerance:
                    problems.append(
                        f"{name}: its logits differ from torch's by {figures['logits_distance']:.3g} ({tolerance} is allowed)"
                    )
            elif float(wanted.abs().max()) > 0:
                lengths = float(moved.norm() * wanted.norm())
                figures["likeness"] = float((moved * wanted).sum()) / lengths if lengths else 0.0
                if figures["likeness"] < _LIKENESS[1]:
                    text = f"{name}: over the {self.config.precision} base it does something else than in torch"
                    self.on_event(Note(f"export: {text} (likeness {figures['likeness']:.2f}); evaluate it", True))
                if not figures["likeness"] >= _LIKENESS[0]:
                    problems.append(
                        f"{name}: what it does to the logits is not what it does in torch (likeness {figures['likeness']:.2f})"
                    )
            self.figures[name] |= {k: round(v, 6) for k, v in figures.items()}
            shown = ", ".join(f"{k.replace('_', ' ')} {v:.2g}" for k, v in figures.items())
            self.on_event(Note(f"export: {name}: {shown}"))
        if problems:
            raise ExportError(problems, "this architecture's adapters are not exported rightly; merge them instead")
        return verified | {"adapters_compared": len(names)}
