"""Merge an adapter into its base model: a plain model folder, in the base's own dtype, with the prompt contract of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phinetune.artifact import StageFolder, building, check_output, content_key, file_hash, is_finished, read_manifest
from phinetune.errors import AdapterError, ModelError
from phinetune.events import Note, OnEvent, log_event
from phinetune.generation.load import adapter_base, adapter_contract, find, trained_overrides
from phinetune.model.folder import base_key, stored_dtype, weight_files

INHERITED = ("base_model", "base_key", "data", "data_sha256")
"""What later stages take over from the adapter's manifest."""


def merge(
    adapter: str,
    output_dir: str | Path,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    on_event: OnEvent = log_event,
) -> StageFolder:
    """Write base + adapter as a plain model into `output_dir`: float32 arithmetic, each tensor in the dtype the base has on disk.

    base_model: another place of the adapter's base model (same content). Raises AdapterError if the adapter is damaged, belongs to
    another base, or gives values that are not finite.
    """
    source, kind = find(adapter, on_event=on_event)
    if kind != "adapter":
        raise AdapterError(f"{adapter}: is not an adapter folder", "give the output folder of finetune")
    base = adapter_base(source, base_model, on_event)
    folder = Path(output_dir).expanduser()
    key = content_key("merge", 1, base_key(base), adapter_key(source))
    check_output(folder, "hf", key, overwrite, needed_bytes=sum(f.stat().st_size for f in weight_files(base)[0]))
    if is_finished(folder, "hf", key) and not overwrite:
        on_event(Note(f"unchanged: {folder} holds the result of exactly this merge"))
        return StageFolder(folder, read_manifest(folder), unchanged=True)
    trained = read_manifest(source)
    record: dict[str, Any] = {
        "stage": "merge",
        "adapter": str(source.absolute()),
        **{k: trained[k] for k in INHERITED if k in trained},
    }
    with building(folder, "hf", key, record) as partial:
        record["figures"] = _merge_into(partial, source, base, trust_remote_code, on_event)
    on_event(Note(f"merged: written to {folder}"))
    return StageFolder(folder, read_manifest(folder))


def adapter_key(folder: Path) -> str:
    """sha256 of an adapter's content. Raises AdapterError if a file is missing."""
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    missing = [f"{f}: no such file" for f in files if not f.is_file()]
    if missing:
        raise AdapterError(missing, "give the output folder of finetune")
    return file_hash(*files)


def _merge_into(target: Path, source: Path, base: Path, trust_remote_code: bool, on_event: OnEvent) -> dict[str, Any]:
    """Load, merge, compare on a probe, save. Returns the comparison's figures."""
    import torch

    from phinetune.lora.adapter import load_adapter
    from phinetune.lora.inject import output_head
    from phinetune.lora.layers import lora_layers
    from phinetune.lora.merge import merge as merge_layers
    from phinetune.model.load import LoadPlan, load_model, save_model

    contract = adapter_contract(source, base, trust_remote_code)
    model = load_model(
        base, LoadPlan(stored_dtype(base), torch.device("cpu"), None, trust_remote_code, trained_overrides(source))
    )
    probe = torch.tensor([list(contract.probes[0].ids)])

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            last: torch.Tensor = model(input_ids=probe, logits_to_keep=1).logits[0, -1].float()
        return last

    plain = logits()
    load_adapter(model, source)
    model.eval()
    adapted = logits()
    layers = lora_layers(model)
    if all(not layer.lora_B.any() for layer in layers.values()):
        on_event(Note("merge: the adapter changes nothing (lora_B is zero everywhere)", warning=True))
    tied = model.get_input_embeddings().weight is getattr(output_head(model), "weight", None)
    merge_layers(model)
    if tied and model.get_input_embeddings().weight is not getattr(output_head(model), "weight", None):
        model.config.tie_word_embeddings = False
        on_event(
            Note(
                "merge: the adapter changes the output head, which shared its weight with the embedding; they are separate now"
            )
        )
    merged = logits()
    moved, lost = float((adapted - plain).abs().max()), float((merged - adapted).abs().max())
    if moved and lost > moved / 2:
        raise ModelError(
            f"the merged model's logits differ from the adapter's by {lost:.3g}, half of what the adapter changes ({moved:.3g})",
            f"the base's dtype {str(model.dtype)[6:]} is too coarse for this adapter",
        )
    on_event(
        Note(
            f"merge: {len(layers)} layers; on a probe the adapter moves the logits by {moved:.3g}, merging in {str(model.dtype)[6:]} by {lost:.2g} more"
        )
    )
    save_model(model, contract, target)
    return {"layers": len(layers), "logits_moved_by_adapter": moved, "logits_moved_by_merging": lost}
