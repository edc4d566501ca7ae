"""Merge an adapter into a model's files, shard by shard: any size of model on any size of machine.

The base model is never loaded. Each safetensors file is written anew: tensors that the adapter leaves alone are copied byte for byte,
those that it changes are read one at a time, changed (`changes.py`) and written in the dtype they had. A file appears under its name
only when it is whole, so a merge that was killed goes on with the files it was at. Beside one tensor and the adapter nothing is held in
memory.

Where input and output embedding share one tensor and the adapter changes one of the two, both are written and `config.json` says that
they are apart. Not here: which base model belongs to the adapter, tokenizers, putting the folder in place.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from phinetune.artifact import disk_errors, write_json
from phinetune.errors import ModelError, OutputError
from phinetune.events import OnEvent, Progress, log_event
from phinetune.lora.changes import Change
from phinetune.lora.fold import Folder, check_finite, not_finite
from phinetune.lora.plan import MergePlan, plan_merge, read_json
from phinetune.lora.shards import DTYPES, WHOLE_NUMBERS, Layout, bytes_of, copy_bytes, ended_early, read_all, write_all
from phinetune.model.folder import weight_files

INDEX = "model.safetensors.index.json"
_WORKERS = max(2, min(8, os.cpu_count() or 2))  # each holds one block of rows, and computes on one core
JOURNAL = "merge.json"
"""In the output folder while a merge is under way: its inputs, and the files that are whole."""

Restore = Callable[[str, Tensor], Tensor]
"""(tensor's name, W as stored) -> W as the adapter's training saw it; W itself where that is the same."""


@dataclass
class MergeReport:
    """What a streaming merge did: counts, and how much of the change survived the rounding to the base's dtype."""

    layers: int = 0
    tensors_copied: int = 0
    untied: bool = False
    with_lengths: int = 0
    """Layers with DoRA's lengths."""
    surviving: dict[str, float] = field(default_factory=dict)
    """Module -> share of its change that is left after rounding: 1 where nothing was lost. Without those whose change is zero or, as
    DoRA's, no sum."""


def merge_files(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    restore: Restore | None = None,
    restore_key: str = "",
    tied: dict[str, str] | None = None,
    base_key: str | None = None,
    on_event: OnEvent = log_event,
) -> MergeReport:
    """Write the weights of the model folder `base` with `adapter` merged, its `config.json` and index, into the folder `output`.

    restore: see `Restore`, for adapters that were trained on a quantized base; restore_key says what it does, for going on after a
    kill. tied: output embedding's tensor name -> the input embedding's, for models that store one tensor for both; found from config
    and files where it is left out. base_key: the content hash that the adapter must carry. Files that an earlier call with the same
    inputs finished are kept. Raises AdapterError if the adapter changes a tensor that the base has not, does not fit its shape, misses
    one that it targets, or the result is not finite; ModelError if the base's files cannot be read; OutputError for an `output` that
    holds other files of the same names, is the base's or the adapter's own folder, or cannot be written.
    """
    base, adapter, output = Path(base), Path(adapter), Path(output)
    files, missing = weight_files(base)
    if missing or not files:
        raise ModelError([f"{f}: no such file" for f in missing] or f"{base}: no weights (*.safetensors)")
    if nested := [f for f in files if f.parent.resolve() != base.resolve()]:
        raise ModelError(f"{nested[0]}: lies in a folder of its own", "put the model's files into one folder")
    layout = Layout(files)
    plan = plan_merge(layout, base, adapter, tied, base_key)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file, not a folder", "choose another output folder")
    if output.resolve() in (base.resolve(), adapter.resolve()):
        raise OutputError(f"{output}: is an input of the merge", "choose another output folder")
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        journal = _Journal(output, files, adapter, {"restore": restore_key if restore else None, "tied": tied})
        wanted = [file for file in files if not journal.has(file.name)]
        progress = _Count(on_event, sum(f.stat().st_size for f in files), sum(f.stat().st_size for f in wanted))
        threads = torch.get_num_threads()
        try:
            _write_shards([_Shard(f, output / f.name, layout, plan, restore) for f in wanted], journal, progress)
            progress.add(progress.total - progress.done)  # headers, padding
        finally:
            torch.set_num_threads(threads)
        _write_json_files(base, output, layout, plan)
        changed = [*plan.changes.values(), *(c for _, c in plan.added.values() if c is not None)]
        report = journal.close(sum(c.replacement is None for c in changed), bool(plan.added))
        return replace(report, with_lengths=sum(c.magnitude is not None for c in changed))


class _Count:
    """Tells how many bytes of the files are done; `waiting` of them are still to be written."""

    def __init__(self, on_event: OnEvent, total: int, waiting: int) -> None:
        self.on_event, self.total, self.done = on_event, total, total - waiting

    def add(self, size: int) -> None:
        """`size` more bytes are done."""
        self.done += size
        self.on_event(Progress("merging", min(self.done, self.total), self.total))


class _Journal:
    """Which files of a merge are whole, for going on after a kill. What an earlier merge of other inputs left is removed.

    Raises OutputError for files of these names that no merge wrote.
    """

    def __init__(self, output: Path, files: list[Path], adapter: Path, options: dict[str, Any]) -> None:
        config = files[0].parent / "config.json"
        own = [f for f in adapter.iterdir() if f.is_file() and f.suffix in (".json", ".safetensors")]
        inputs = [*files, *sorted(own), *([config] if config.is_file() else [])]
        identity = {"version": 1, **options, **{str(f.resolve()): _mark(f) for f in inputs}}
        self.file, self.output = output / JOURNAL, output
        self.value: dict[str, Any] = {"inputs": identity, "whole": {}}
        found = read_json(self.file)
        whole = found.get("whole") if isinstance(found, dict) else None
        whole = {n: r for n, r in whole.items() if isinstance(r, dict)} if isinstance(whole, dict) else {}
        unknown = [f.name for f in files if (output / f.name).exists() and f.name not in whole]
        if unknown and not isinstance(found, dict):
            raise OutputError(
                f"{output / unknown[0]}: is there already, and no merge wrote it", "choose another output folder"
            )
        if isinstance(found, dict) and found.get("inputs") == identity:
            kept = {n: r for n, r in whole.items() if (output / n).is_file() and r.get("mark") == _mark(output / n)}
            self.value["whole"] = {n: r for n, r in kept.items() if isinstance(r.get("surviving"), dict)}
        for file in files:
            (output / f".{file.name}.part").unlink(missing_ok=True)
            if file.name not in self.value["whole"]:
                (output / file.name).unlink(missing_ok=True)
        write_json(self.file, self.value)

    def has(self, name: str) -> bool:
        """True if the file `name` is whole."""
        return name in self.value["whole"]

    def add(self, name: str, part: MergeReport) -> None:
        """The file `name` is whole."""
        self.value["whole"][name] = {**asdict(part), "mark": _mark(self.output / name)}
        write_json(self.file, self.value)

    def close(self, layers: int, untied: bool) -> MergeReport:
        """The report over all files; the journal is removed."""
        parts = list(self.value["whole"].values())
        surviving = {module: share for part in parts for module, share in part["surviving"].items()}
        self.file.unlink()
        copied = sum(part["tensors_copied"] for part in parts)
        return MergeReport(layers=layers, tensors_copied=copied, untied=untied, surviving=surviving)


def _mark(file: Path) -> list[int]:
    """Size and time of a file: what tells that it is still the same."""
    state = file.stat()
    return [state.st_size, state.st_mtime_ns]


def _write_shards(shards: list[_Shard], journal: _Journal, progress: _Count) -> None:
    """Write the files, their tensors by several threads; this one tells of what is done."""
    work, written = _Work(shards), SimpleQueue[tuple[_Shard, str] | None]()
    left = {id(shard): len(shard.entries) for shard in shards}
    with ThreadPoolExecutor(_WORKERS) as pool:
        try:
            workers = [pool.submit(work.run, written.put) for _ in range(_WORKERS)]
            for shard in (s for s in shards if not s.entries):
                shard.open()
                journal.add(shard.target.name, shard.close())
            for _ in workers:  # each says at its end that it is there
                while (job := written.get()) is not None:
                    shard, name = job
                    left[id(shard)] -= 1
                    if not left[id(shard)]:
                        journal.add(shard.target.name, shard.close())
                    progress.add(shard.size_of(name))
            for worker in workers:
                worker.result()
        finally:
            work.stopped = True
            pool.shutdown()
            for shard in shards:
                shard.abandon()


class _Work:
    """Hands out the tensors of some files to threads. Each is at a file of its own as long as there are enough: a file takes one write at a time."""

    def __init__(self, shards: list[_Shard]) -> None:
        self.waiting = sorted(
            (s for s in shards if s.entries), key=lambda s: s.size
        )  # the largest last, and begun first
        self.left: dict[_Shard, list[str]] = {}
        self.threads: dict[_Shard, int] = {}
        self.stopped, self.lock = False, threading.Lock()

    def run(self, written: Callable[[tuple[_Shard, str] | None], None]) -> None:
        """Write tensors until none is left; `written` is told each, and None at the end."""
        try:
            while (job := self._take()) is not None:
                shard, name = job
                shard.write_tensor(name)
                with self.lock:
                    self.threads[shard] -= 1
                written(job)
        except BaseException:
            self.stopped = True
            raise
        finally:
            written(None)

    def _take(self) -> tuple[_Shard, str] | None:
        with self.lock:
            begun = [shard for shard, names in self.left.items() if names]
            if self.waiting and all(self.threads[shard] for shard in begun):
                begun = [self.waiting.pop()]
                begun[0].open()
                self.left[begun[0]], self.threads[begun[0]] = list(reversed(begun[0].entries)), 0
            if not begun or self.stopped:
                return None
            shard = min(begun, key=lambda shard: self.threads[shard])
            self.threads[shard] += 1
            return shard, self.left[shard].pop()


class _Shard:
    """One file of the model on its way: the header of the new file, and its tensors, each written on its own."""

    def __init__(self, source: Path, target: Path, layout: Layout, plan: MergePlan, restore: Restore | None) -> None:
        self.source, self.target, self.layout, self.plan, self.restore = source, target, layout, plan, restore
        self.part = target.with_name(f".{target.name}.part")
        header = layout.headers[source]
        self.origins = {**{name: name for name in header}, **{n: o for n, (o, _) in plan.added.items() if o in header}}
        self.entries: dict[str, Any] = {}
        end = 0
        for name, origin in self.origins.items():
            size = header[origin]["data_offsets"][1] - header[origin]["data_offsets"][0]
            self.entries[name] = {**header[origin], "data_offsets": [end, end + size]}
            end += size
        metadata = layout.metadata[source]
        text = {**({"__metadata__": metadata} if metadata else {}), **self.entries}
        raw = json.dumps(text, separators=(",", ":")).encode()
        self.raw = raw + b" " * (-len(raw) % 8)
        self.start = 8 + len(self.raw)
        self.size = self.start + end
        self.report, self.lock = MergeReport(), threading.Lock()
        self.files: tuple[Any, ...] = ()

    def open(self) -> None:
        """Open both files and write the header."""
        self.files = (self.source.open("rb"), self.part.open("wb"))
        self.read, self.write = (file.fileno() for file in self.files)
        self.files[1].truncate(self.size)
        write_all(self.write, memoryview(len(self.raw).to_bytes(8, "little") + self.raw), 0)

    def close(self) -> MergeReport:
        """Every tensor is written: give the file its name."""
        self.abandon()
        os.replace(self.part, self.target)
        return self.report

    def abandon(self) -> None:
        """Close both files, if they are open."""
        for file in self.files:
            file.close()

    def size_of(self, name: str) -> int:
        """Bytes of a tensor."""
        start, stop = self.entries[name]["data_offsets"]
        return int(stop - start)

    def write_tensor(self, name: str) -> None:
        """Copy one tensor, or change it on the way."""
        torch.set_num_threads(1)  # the other threads are at other tensors
        origin = self.origins[name]
        change = self.plan.changes.get(name) if name == origin else self.plan.added[name][1]
        entry = self.layout.headers[self.source][origin]
        start, stop = (self.layout.starts[self.source] + offset for offset in entry["data_offsets"])
        to = self.start + self.entries[name]["data_offsets"][0]
        dtype = DTYPES.get(entry["dtype"]) or (WHOLE_NUMBERS.get(entry["dtype"]) if change is not None else None)
        if dtype is None or (change is None and self.restore is None):
            copy_bytes(self.read, self.write, start, stop, to)
            with self.lock:
                self.report.tensors_copied += 1
        elif change is not None and change.replacement is not None:
            whole = change.replacement.to(dtype).contiguous()
            check_finite(name, whole)
            write_all(self.write, bytes_of(whole), to)
        elif self.restore is not None:
            self._restored(name, change, start, entry, to)
        elif change is not None:
            self._folded(name, change, start, entry, to)

    def _folded(self, name: str, change: Change, start: int, entry: Any, to: int) -> None:
        """Read a block of rows, fold, write: the block never leaves the cache."""
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        folder = change.folder(shape, dtype)
        try:
            finite = folder.fold_file(self.read, start, self.write, to)
        except EOFError:
            raise ended_early() from None
        if finite is None:
            finite = self._folded_by_blocks(folder, start, to)
        if not finite:
            raise not_finite(name, dtype)
        with self.lock:
            self._tell(change, folder)

    def _folded_by_blocks(self, folder: Folder, start: int, to: int) -> bool:
        """What `Folder.fold_file` does, on any system and for any dtype: its reference."""
        row, blocks = folder.shape[1] * folder.dtype.itemsize, list(folder.blocks())
        buffer = torch.empty(blocks[0][1] if blocks else 0, folder.shape[1], dtype=folder.dtype)
        for first, last in blocks:
            block = buffer[: last - first]
            read_all(self.read, bytes_of(block), start + first * row)
            if not folder.fold(block, first, last):
                return False
            write_all(self.write, bytes_of(block), to + first * row)
        return True

    def _restored(self, name: str, change: Change | None, start: int, entry: Any, to: int) -> None:
        """A tensor as the training saw it, with its change if it has one: needed whole."""
        weight = torch.empty(tuple(entry["shape"]), dtype=DTYPES[entry["dtype"]])
        read_all(self.read, bytes_of(weight), start)
        restored = weight if self.restore is None else self.restore(name, weight)
        if (restored.dtype, restored.shape) != (weight.dtype, weight.shape):
            raise ModelError(f"{name}: restore made it {tuple(restored.shape)} of {restored.dtype}")
        kept = restored is weight and change is None
        if change is not None:
            folder, flat = change.folder(tuple(weight.shape), weight.dtype), restored.clone().flatten(1)
            if not all(folder.fold(flat[first:last], first, last) for first, last in list(folder.blocks())):
                raise not_finite(name, weight.dtype)
            restored = flat
        write_all(self.write, bytes_of(restored.contiguous()), to)
        with self.lock:
            self.report.tensors_copied += kept
            if change is not None:
                self._tell(change, folder)

    def _tell(self, change: Change, folder: Folder) -> None:
        if folder.surviving is not None:
            self.report.surviving[change.module] = folder.surviving


def _write_json_files(base: Path, output: Path, layout: Layout, plan: MergePlan) -> None:
    """config.json, corrected where the embeddings came apart, and the index with the tensors that were added."""
    config = read_json(base / "config.json")
    if isinstance(config, dict):
        if plan.added:
            config["tie_word_embeddings"] = False
            if isinstance(config.get("text_config"), dict) and "tie_word_embeddings" in config["text_config"]:
                config["text_config"]["tie_word_embeddings"] = False
            write_json(output / "config.json", config)
        else:
            shutil.copyfile(base / "config.json", output / "config.json")
    index = read_json(base / INDEX)
    if isinstance(index, dict):
        for name, (origin, _) in plan.added.items():
            index["weight_map"][name] = index["weight_map"][origin]
            if "total_size" in index.get("metadata", {}):
                start, stop = layout.entry(origin)["data_offsets"]
                index["metadata"]["total_size"] += stop - start
        write_json(output / INDEX, index)
