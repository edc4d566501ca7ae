"""Merge an adapter into its base model: a plain model folder, in the base's own dtype, with the prompt contract of the training.

The weights go from file to file, shard by shard, and never into memory as a whole; a merge that was killed goes on where it was. An
adapter that was trained on a 4-bit base has two bases: the one on disk, and what 4 bits made of it. Which one it goes into is asked
for, or measured. Afterwards, where memory allows, the merged model is compared with base + adapter on the contract's probes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phinetune.artifact import (
    StageFolder,
    building,
    check_output,
    content_key,
    file_hash,
    is_finished,
    read_manifest,
    write_json,
)
from phinetune.errors import AdapterError, ConfigError, ModelError
from phinetune.events import Note, OnEvent, log_event
from phinetune.generation.load import adapter_base, adapter_contract, find, round_as_trained, trained_overrides
from phinetune.model.compute import available_memory
from phinetune.model.contract import PromptContract
from phinetune.model.folder import base_key, stored_dtype, weight_files
from phinetune.model.load import SPARE
from phinetune.model.quantized import quiet_bitsandbytes, read_record

if TYPE_CHECKING:
    import torch

    from phinetune.lora.injection import Adapter
    from phinetune.lora.stream import MergeReport
    from phinetune.model.load import LoadPlan

INHERITED = ("base_model", "base_key", "data", "data_sha256", "eval_data", "eval_data_sha256", "grid")
"""What later stages take over from the adapter's manifest."""
Base = Literal["auto", "original", "dequantized"]


def merge(
    adapter: str,
    output_dir: str | Path,
    base_model: str | None = None,
    base: Base = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    on_event: OnEvent = log_event,
) -> StageFolder:
    """Write base + adapter as a plain model into `output_dir`: float32 arithmetic, each tensor in the dtype the base has on disk.

    base_model: another place of the adapter's base model (same content). base, for an adapter trained on a 4-bit base: "original" (the
    weights on disk), "dequantized" (what 4 bits made of them), "auto" (the one that gives the logits which the training had). Raises
    AdapterError if the adapter is damaged, belongs to another base, or gives values that are not finite.
    """
    if base not in ("auto", "original", "dequantized"):
        raise ConfigError(f'base: must be "auto", "original" or "dequantized" (found: {base!r})')
    source, kind = find(adapter, on_event=on_event)
    if kind != "adapter":
        raise AdapterError(f"{adapter}: is not an adapter folder", "give the output folder of finetune")
    weights = adapter_base(source, base_model, on_event)
    folder = Path(output_dir).expanduser()
    key = content_key("merge", 2, base_key(weights), adapter_key(source), base)
    check_output(folder, "hf", key, overwrite, needed_bytes=sum(f.stat().st_size for f in weight_files(weights)[0]))
    if is_finished(folder, "hf", key) and not overwrite:
        on_event(Note(f"unchanged: {folder} holds the result of exactly this merge"))
        return StageFolder(folder, read_manifest(folder), unchanged=True)
    trained = read_manifest(source)
    record: dict[str, Any] = {
        "stage": "merge",
        "adapter": str(source.absolute()),
        **{k: trained[k] for k in INHERITED if k in trained},
    }
    job = _Merge(source, weights, trained, trust_remote_code, on_event)
    with building(folder, "hf", key, record, resume=True) as partial:
        record["figures"] = job.run(partial, base)
    on_event(Note(f"merged: written to {folder}"))
    return StageFolder(folder, read_manifest(folder))


def adapter_key(folder: Path) -> str:
    """sha256 of an adapter's content. Raises AdapterError if a file is missing."""
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    missing = [f"{f}: no such file" for f in files if not f.is_file()]
    if missing:
        raise AdapterError(missing, "give the output folder of finetune")
    return file_hash(*files)


def weight_reader(
    adapter: Path, base: Path, policy: str, trust_remote_code: bool = False
) -> Callable[[str], torch.Tensor]:
    """What reads a weight of `adapter`'s base model by its name, as merging by `policy` ("original", "dequantized") finds it."""
    from phinetune.lora.shards import Layout
    from phinetune.model.load import tied_embeddings

    layout, tied = Layout(weight_files(base)[0]), tied_embeddings(base, trust_remote_code)
    job = _Merge(adapter, base, read_manifest(adapter), trust_remote_code, lambda event: None)

    def read(name: str) -> torch.Tensor:
        stored = layout.read(name if name in layout.file_of else tied.get(name, name))
        with quiet_bitsandbytes():
            return job.restore(name, stored) if policy == "dequantized" else stored

    return read


class _Merge:
    """One adapter, its base model's folder, and what the adapter's manifest says about its training."""

    def __init__(
        self, adapter: Path, base: Path, trained: dict[str, Any], trust_remote_code: bool, on_event: OnEvent
    ) -> None:
        self.adapter, self.base, self.trust, self.on_event = adapter, base, trust_remote_code, on_event
        self.contract: PromptContract = adapter_contract(adapter, base, trust_remote_code)
        self.quantization: dict[str, Any] | None = trained.get("quantization")
        self.start = (trained.get("peft_config") or {}).get("init_lora_weights")
        self.trained_logits: list[dict[str, Any]] | None = trained.get("probe_logits")
        self.format = read_record(self.quantization, f"{adapter}/manifest.json")
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        self.model_type = str(config.get("model_type") or "")
        size, free = sum(f.stat().st_size for f in weight_files(base)[0]), available_memory()
        self.fits = free is None or size * SPARE < free

    def run(self, target: Path, asked: Base) -> dict[str, Any]:
        """Write the merged model into `target` and return the figures of the merge."""
        from phinetune.lora.stream import JOURNAL, merge_files
        from phinetune.model.load import save_generation_config, tied_embeddings

        if not (target / JOURNAL).is_file():  # whole weights that an attempt left which was killed after its merge
            for file in target.glob("*.safetensors"):
                file.unlink()
        with quiet_bitsandbytes():
            policy, figures = self.choose_base(asked)
            restore = self.restore if policy == "dequantized" else None
            tied = tied_embeddings(self.base, self.trust)
            how = json.dumps(self.quantization, sort_keys=True)
            report = merge_files(self.base, self.adapter, target, restore, how, tied, on_event=self.on_event)
        self.tell(report)
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        write_json(target / "config.json", config | trained_overrides(self.adapter))
        save_generation_config(self.base, self.contract, target, self.trust)
        self.contract.save(target)
        for code in self.base.glob("*.py"):
            shutil.copyfile(code, target / code.name)
        figures |= {"base": policy, "layers": report.layers, "tensors_copied": report.tensors_copied}
        if report.surviving:
            figures["share_of_change_kept"] = round(min(report.surviving.values()), 6)
        return figures | self.prove(target, policy)

    def choose_base(self, asked: Base) -> tuple[str, dict[str, Any]]:
        """("original" or "dequantized", the figures behind it)."""
        if self.quantization is None:
            if asked == "dequantized":
                raise ConfigError(
                    "base: dequantized is for adapters trained on a 4-bit base, which this one's manifest does not say",
                    "use base: original",
                )
            return "original", {}
        if asked == "original" and self.start == "loftq":
            self.on_event(
                Note(
                    "merge: base: original: the adapter began as what 4 bits took from the weights (loftq), which is in them already",
                    warning=True,
                )
            )
        if asked != "auto":
            return asked, {}
        if self.trained_logits is None or not self.fits:
            why = (
                "memory is too small to measure"
                if self.trained_logits
                else "the adapter carries no logits to measure by"
            )
            self.on_event(Note(f"merge: base: dequantized, what the adapter was trained on; {why}", warning=True))
            return "dequantized", {}
        from phinetune.model.probe import distance, probe_logits

        recorded, distances, noise = self.trained_logits, dict[str, float](), 0.0
        for candidate in ("original", "dequantized"):
            model, adapter = self.adapted(candidate)
            distances[candidate] = distance(probe_logits(model, self.contract), recorded)
            noise = self.noise_over_change(adapter) if candidate == "original" else noise
            del model, adapter
        policy = min(distances, key=lambda p: distances[p])
        self.on_event(
            Note(
                f"merge: base: {policy}; its logits are {distances[policy]:.3g} from those of the training, the other base's "
                f"{max(distances.values()):.3g} (the rounding to 4 bits is {noise:.1f} times as large as the adapter's change)"
            )
        )
        return policy, {"distance_to_trained": distances, "rounding_over_change": round(noise, 3)}

    def restore(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What 4 bits make of a stored weight, if the training held its layer in 4 bits."""
        import torch

        from phinetune.lora.changes import is_stored_transposed
        from phinetune.model.quantized import round_trip

        if self.quantization is None or self.format is None or not self.was_quantized(name):
            return weight
        dtype = getattr(torch, self.quantization["dtype"])
        if is_stored_transposed(name.removesuffix(".weight"), self.model_type):  # 4 bits go along (out, in)
            return round_trip(weight.t().contiguous(), self.format, dtype).t().contiguous()
        return round_trip(weight, self.format, dtype)

    def was_quantized(self, name: str) -> bool:
        """True if the tensor `name` of the files belongs to a layer that the training held in 4 bits."""
        layers = {f"{layer}.weight" for layer in (self.quantization or {}).get("layers", [])}
        return name in layers or any(n.endswith(f".{name}") or name.endswith(f".{n}") for n in layers)

    def adapted(self, policy: str) -> tuple[Any, Adapter]:
        """(model, adapter in it) in memory, the base in its own numbers, or in 4 bits as in the training."""
        import torch

        from phinetune.lora.adapter import load_adapter
        from phinetune.model.load import load_model

        plan = self.plan
        if policy == "dequantized" and self.quantization is not None:
            dtype = getattr(torch, self.quantization["dtype"])
            plan = dataclasses.replace(plan, dtype=dtype, quantization=self.format)
        model = load_model(self.base, plan)
        adapter = load_adapter(model, self.adapter)
        round_as_trained(model, self.adapter, self.base)
        return model.eval(), adapter

    @functools.cached_property
    def plan(self) -> LoadPlan:
        """How models are loaded here: decided once, as what is compared must be computed alike."""
        from phinetune.model.load import measuring_plan

        return measuring_plan(self.base, self.trust, config_overrides=trained_overrides(self.adapter))

    def noise_over_change(self, adapter: Adapter) -> float:
        """Median over the layers of |what 4 bits changed| / |what the adapter changes|."""
        ratios = []
        for name, layer in adapter.layers.items():
            change, weight = layer.delta(), layer.frozen().detach()
            if self.was_quantized(f"{name}.weight") and float(change.norm()) > 0:
                noise = self.restore(f"{name}.weight", weight).float() - weight.float()
                ratios.append(float(noise.norm() / change.norm()))
        return statistics.median(ratios) if ratios else 0.0

    def tell(self, report: MergeReport) -> None:
        """What the merge did, as notes. Raises ModelError if the base's dtype swallowed half of the adapter's change."""
        if report.layers and not report.surviving and not report.with_lengths:
            self.on_event(Note("merge: the factors change nothing (lora_B is zero everywhere)", warning=True))
        if report.untied:
            self.on_event(
                Note("merge: the adapter changes one of two embeddings that shared a weight; they are separate now")
            )
        kept = statistics.median(report.surviving.values()) if report.surviving else 1.0
        if abs(kept - 1.0) > 0.5:
            raise ModelError(
                f"merging keeps {kept:.0%} of the adapter's change: the base's dtype is too coarse for this adapter",
                "convert the base model to float32 first",
            )

    def prove(self, target: Path, policy: str) -> dict[str, Any]:
        """Compare the merged files with base + adapter on the probes. Raises ModelError if they are not the same model."""
        if not self.fits:
            self.on_event(
                Note("merge: not compared on the probes: the model does not fit into this machine's free memory")
            )
            return {}
        from phinetune.model.load import load_model
        from phinetune.model.probe import probe_logits

        model, adapter = self.adapted(policy)
        adapted = probe_logits(model, self.contract)
        adapter.take_out(model)
        plain = probe_logits(model, self.contract)
        del model, adapter
        whole = load_model(target, self.plan)
        round_as_trained(whole, self.adapter, target)
        merged = probe_logits(whole, self.contract)
        moved, lost = float((adapted - plain).abs().max()), float((merged - adapted).abs().max())
        if moved and lost > moved / 2:
            raise ModelError(
                f"the merged model's logits differ from the adapter's by {lost:.3g}, half of what the adapter changes ({moved:.3g})",
                f"the base's dtype {str(stored_dtype(self.base))[6:]} is too coarse for this adapter",
            )
        self.on_event(
            Note(
                f"merge: on the probes the adapter moves the logits by up to {moved:.3g}, merging by {lost:.2g} more",
                warning=moved > 0 and lost > moved / 10,
            )
        )
        return {"logits_moved_by_adapter": moved, "logits_moved_by_merging": lost}
