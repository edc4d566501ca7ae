"""Cut an adapter down to a lower rank: from one training at a high rank, adapters of several ranks to evaluate, merge and choose among.

What is written is a whole adapter folder with the training's settings, data and prompt contract, so that every later stage takes it.
The logits that the training recorded are not carried over: this adapter gives others. Not here: the arithmetic
(`phinetune.lora.truncation`).
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phinetune.artifact import (
    MANIFEST,
    StageFolder,
    building,
    check_output,
    content_key,
    file_hash,
    is_finished,
    read_manifest,
)
from phinetune.errors import AdapterError, ConfigError, OutputError
from phinetune.events import Note, OnEvent, log_event
from phinetune.generation.load import find
from phinetune.model.contract import CONTRACT_FILE
from phinetune.workflow.merge import INHERITED, adapter_key

if TYPE_CHECKING:
    from phinetune.lora.truncation import Truncation

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CARRIED = (
    *INHERITED,
    *("ledger", "training_config", "peft_config", "model_kwargs", "config_overrides", "quantization", "dtype", "seed"),
)
"""What the truncated adapter's manifest takes over from the adapter's."""


def truncate(
    adapter: str,
    output_dir: str | Path,
    r: int,
    overwrite: bool = False,
    on_event: OnEvent = log_event,
) -> StageFolder:
    """Write `adapter` with no layer's rank above `r` into `output_dir`: each layer's change the nearest to what it was (Eckart, Young 1936).

    The manifest's figures say for each layer which share of its change is left. Raises ConfigError unless r is a whole number from 1 to below the adapter's rank, AdapterError if the adapter is damaged.
    """
    from phinetune.lora.truncation import truncate_adapter

    source, kind = find(adapter, on_event=on_event)
    if kind != "adapter":
        raise AdapterError(f"{adapter}: is not an adapter folder", "give the output folder of finetune")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ConfigError(f"r: must be a whole number, at least 1 (found: {r!r})")
    folder = Path(output_dir).expanduser()
    if folder.resolve() == source.resolve():
        raise OutputError(f"{folder}: is the adapter itself", "choose another output folder")
    trained = read_manifest(source)
    carried = {k: trained[k] for k in CARRIED if k in trained}
    contract = source / CONTRACT_FILE
    key = content_key(
        "truncate", 1, adapter_key(source), file_hash(contract) if contract.is_file() else None, carried, r
    )
    check_output(folder, "adapter", key, overwrite, (source / ADAPTER_FILES[1]).stat().st_size)
    if is_finished(folder, "adapter", key) and not overwrite:
        on_event(Note(f"unchanged: {folder} holds the result of exactly this truncation"))
        return StageFolder(folder, read_manifest(folder), unchanged=True)
    record: dict[str, Any] = {"stage": "truncate", "adapter": str(source.absolute()), "r": r, **carried}
    with building(folder, "adapter", key, record) as partial:
        done = truncate_adapter(source, partial, r)
        if contract.is_file():  # with the tokenizer's files; whoever loads them checks them against each other
            for name in trained.get("files") or [f.name for f in source.iterdir()]:
                if (source / name).is_file() and name not in (*ADAPTER_FILES, MANIFEST):
                    shutil.copyfile(source / name, partial / name)
        if isinstance(size := trained.get("size"), dict):
            fewer = {k: v - done.parameters for k, v in size.items() if k in ("trainable", "total")}
            record["size"] = {**size, **fewer}
        record["figures"] = _figures(done)
    _tell(done, on_event)
    on_event(Note(f"adapter: written to {folder}"))
    return StageFolder(folder, read_manifest(folder))


def _figures(done: Truncation) -> dict[str, Any]:
    """For the manifest: the ranks, and the share of the change kept, over all layers and for each."""
    shares = {name: round(share, 6) for name, share in done.kept.items()}
    return {
        "rank_before": done.rank,
        "rank": done.r,
        "share_of_change_kept": round(min(done.kept.values()), 6),
        "median_share_kept": round(statistics.median(done.kept.values()), 6),
        "layers": {n: {"rank": done.ranks[n], "kept": shares[n], "error": round(done.error[n], 9)} for n in shares},
    }


def _tell(done: Truncation, on_event: OnEvent) -> None:
    """What the truncation did, as notes."""
    least = min(done.kept, key=lambda name: done.kept[name])
    on_event(
        Note(
            f"truncate: rank {done.rank} to {done.r}; of a layer's change {statistics.median(done.kept.values()):.1%} is left in the "
            f"median, {done.kept[least]:.1%} in {least}, the least (squared Frobenius norm)"
        )
    )
    if done.with_lengths:
        on_event(Note("truncate: DoRA's lengths are kept as they were trained; the shares are those of the factors"))
