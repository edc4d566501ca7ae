"""Merge an adapter into a model's files, shard by shard: any size of model on any size of machine.

The base model is never loaded. Each safetensors file is written anew: tensors that the adapter leaves alone are copied byte for byte,
those that it changes are read one at a time, changed (`changes.py`) and written in the dtype they had. A file appears under its name
only when it is whole, so a merge that was killed goes on with the files it was at. Beside one tensor and the adapter nothing is held in
memory.

Where input and output embedding share one tensor and the adapter changes one of the two, both are written and `config.json` says that
they are apart. Not here: which base model belongs to the adapter, tokenizers, putting the folder in place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phinetune.artifact import write_json
from phinetune.errors import AdapterError, ModelError
from phinetune.events import OnEvent, Progress, log_event
from phinetune.lora.adapter import read_adapter
from phinetune.lora.changes import Change, join_slices, read_changes
from phinetune.lora.fold import check_finite, not_finite
from phinetune.lora.peft_format import PREFIX
from phinetune.lora.shards import DTYPES, Layout, bytes_of, copy_bytes, read_all, write_all
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
    surviving: dict[str, float] = field(default_factory=dict)
    """Module -> share of its change that is left after rounding: 1 where nothing was lost."""


def merge_files(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    restore: Restore | None = None,
    tied: dict[str, str] | None = None,
    on_event: OnEvent = log_event,
) -> MergeReport:
    """Write the weights of the model folder `base` with `adapter` merged, its `config.json` and index, into the folder `output`.

    tied: output embedding's tensor name -> the input embedding's, for models that store one tensor for both; found from the files
    where it is left out. restore: see `Restore`, for adapters that were trained on a quantized base. Files that an earlier call with
    the same inputs finished are kept. Raises AdapterError if the adapter changes a tensor that the base has not, or does not fit its
    shape, or the result is not finite; ModelError if the base's files cannot be read.
    """
    base, output = Path(base), Path(output)
    files, missing = weight_files(base)
    if missing or not files:
        raise ModelError([f"{f}: no such file" for f in missing] or f"{base}: no weights (*.safetensors)")
    layout, plan = Layout(files), _plan(Layout(files), base, Path(adapter), tied)
    _check_shapes(layout, plan)
    output.mkdir(parents=True, exist_ok=True)
    journal = _Journal(output, files, Path(adapter), bool(restore))
    wanted = [file for file in files if not journal.has(file.name)]
    progress = _Count(on_event, sum(f.stat().st_size for f in files), sum(f.stat().st_size for f in wanted))
    threads = torch.get_num_threads()
    try:
        for group in (wanted[i : i + _WORKERS] for i in range(0, len(wanted), _WORKERS)):
            _write_shards([_Shard(f, output / f.name, layout, plan, restore) for f in group], journal, progress)
        progress.add(progress.total - progress.done)  # headers, padding
    finally:
        torch.set_num_threads(threads)
    _write_json_files(base, output, layout, plan)
    changed = [*plan.changes.values(), *(c for _, c in plan.added.values() if c is not None)]
    return journal.close(sum(c.replacement is None for c in changed), bool(plan.added))


class _Count:
    """Tells how many bytes of the files are done; `waiting` of them are still to be written."""

    def __init__(self, on_event: OnEvent, total: int, waiting: int) -> None:
        self.on_event, self.total, self.done = on_event, total, total - waiting

    def add(self, size: int) -> None:
        """`size` more bytes are done."""
        self.done += size
        self.on_event(Progress("merging", min(self.done, self.total), self.total))


class _Journal:
    """Which files of a merge are whole, for going on after a kill. What an earlier merge of other inputs left is removed."""

    def __init__(self, output: Path, files: list[Path], adapter: Path, restored: bool) -> None:
        inputs = [
            *files,
            *sorted(f for f in adapter.iterdir() if f.is_file() and f.suffix in (".json", ".safetensors")),
        ]
        identity = {str(f.resolve()): [s.st_size, s.st_mtime_ns] for f in inputs if (s := f.stat())} | {
            "restored": restored
        }
        self.file = output / JOURNAL
        self.value: dict[str, Any] = {"inputs": identity, "whole": {}}
        found = _read(self.file)
        if isinstance(found, dict) and found.get("inputs") == identity:
            self.value["whole"] = {n: r for n, r in found["whole"].items() if (output / n).is_file()}
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
        self.value["whole"][name] = asdict(part)
        write_json(self.file, self.value)

    def close(self, layers: int, untied: bool) -> MergeReport:
        """The report over all files; the journal is removed."""
        parts = list(self.value["whole"].values())
        surviving = {module: share for part in parts for module, share in part["surviving"].items()}
        self.file.unlink()
        return MergeReport(layers, sum(p["tensors_copied"] for p in parts), untied, surviving)


@dataclass
class _Plan:
    """Tensor name -> its change; and tensors that the base did not have: name -> (tensor that it began as, its change or None)."""

    changes: dict[str, Change] = field(default_factory=dict)
    added: dict[str, tuple[str, Change | None]] = field(default_factory=dict)


def _plan(layout: Layout, base: Path, adapter: Path, tied: dict[str, str] | None) -> _Plan:
    """Find the stored tensor of every change. Raises AdapterError for those that have none."""
    saved = read_adapter(adapter)
    read = _read(base / "config.json")
    config: dict[str, Any] = read if isinstance(read, dict) else {}
    changes, others = read_changes(saved, str(config.get("model_type") or ""))
    changes = join_slices(changes, layout.shapes(), config, saved.config.fused_modules)
    wanted = {f"{module}.weight": change for module, change in changes.items()}
    wanted |= {name: Change(name, replacement=tensor) for name, tensor in others.items()}
    plan, homeless = _Plan(), dict[str, Change]()
    for name, change in wanted.items():
        stored = _stored_name(name, layout)
        if stored is None:
            homeless[name] = change
        else:
            plan.changes[stored] = change
    if tied is None:
        tied = _tied(layout, bool(config.get("tie_word_embeddings")), homeless, plan)
    for head, source in tied.items():
        origin = _stored_name(source, layout)
        if origin is None or head in layout.file_of:
            continue
        own = homeless.pop(head) if head in homeless else None
        if own is not None or origin in plan.changes:
            plan.added[head] = (origin, own)
    if homeless:
        raise AdapterError(
            [f"{PREFIX}{name}: the base model's files have no such tensor" for name in homeless],
            "the adapter belongs to another base model",
        )
    return plan


def _stored_name(name: str, layout: Layout) -> str | None:
    """What the files call the tensor `name`: itself, or with the model's outer name more or less (`transformer.`, `model.`)."""
    if name in layout.file_of:
        return name
    if name.count(".") < 2:  # `lm_head.weight` is no ending of anything
        return None
    found = [n for n in layout.file_of if n.endswith(f".{name}") or (n.count(".") > 1 and name.endswith(f".{n}"))]
    return found[0] if len(found) == 1 else None


def _tied(layout: Layout, says_tied: bool, homeless: dict[str, Change], plan: _Plan) -> dict[str, str]:
    """output -> input embedding, where the files hold one tensor for both and one of them is changed. Judged by config and shapes."""
    endings = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
    embeddings = [n for n, c in plan.changes.items() if c.is_embedding or n.endswith(endings)]
    if not embeddings and homeless:
        shapes = [c.shape() for c in homeless.values()]
        embeddings = [n for n in layout.file_of if n.endswith(endings) and tuple(layout.entry(n)["shape"]) in shapes]
    if len(embeddings) != 1 or len(homeless) > 1 or not (homeless or says_tied):
        return {}
    return {next(iter(homeless), "lm_head.weight"): embeddings[0]}


def _check_shapes(layout: Layout, plan: _Plan) -> None:
    """Raises AdapterError for every change that does not fit its tensor."""
    problems = []
    pairs = [*plan.changes.items(), *((source, c) for source, c in plan.added.values() if c is not None)]
    for name, change in pairs:
        entry, wanted = layout.entry(name), change.shape()
        shape = tuple(entry["shape"])
        flat = shape if change.replacement is not None else tuple(torch.empty(shape, device="meta").flatten(1).shape)
        if flat != wanted:
            problems.append(f"{PREFIX}{change.module}: is for a weight of {wanted}, the base model's {name} is {flat}")
        if entry["dtype"] not in DTYPES:
            problems.append(f"{name}: is stored as {entry['dtype']}; only floating point weights can be merged")
    if problems:
        raise AdapterError(problems, "the adapter belongs to another base model")


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_shards(shards: list[_Shard], journal: _Journal, progress: _Count) -> None:
    """Write a few files at once, their tensors in turn: a file takes one write at a time, so threads had better be at several."""
    with contextlib.ExitStack() as stack:
        for shard in shards:
            shard.open(stack)
        pool = stack.enter_context(ThreadPoolExecutor(_WORKERS))
        in_turn = [job for row in zip_longest(*([(s, n) for n in s.entries] for s in shards)) for job in row if job]
        jobs = {pool.submit(shard.write_tensor, name): (shard, name) for shard, name in in_turn}
        left = {id(shard): len(shard.entries) for shard in shards}
        try:
            for shard in (s for s in shards if not s.entries):
                journal.add(shard.target.name, shard.close())
            for job in as_completed(jobs):
                job.result()
                shard, name = jobs[job]
                left[id(shard)] -= 1
                if not left[id(shard)]:
                    journal.add(shard.target.name, shard.close())
                progress.add(shard.size_of(name))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Shard:
    """One file of the model on its way: the header of the new file, and its tensors, each written on its own."""

    def __init__(self, source: Path, target: Path, layout: Layout, plan: _Plan, restore: Restore | None) -> None:
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

    def open(self, stack: contextlib.ExitStack) -> None:
        """Open both files and write the header."""
        self.read: int = stack.enter_context(self.source.open("rb")).fileno()
        self.file = stack.enter_context(self.part.open("wb"))
        self.write: int = self.file.fileno()
        os.truncate(self.part, self.size)
        write_all(self.write, memoryview(len(self.raw).to_bytes(8, "little") + self.raw), 0)

    def close(self) -> MergeReport:
        """Every tensor is written: give the file its name."""
        self.file.close()
        os.replace(self.part, self.target)
        return self.report

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
        dtype = DTYPES.get(entry["dtype"])
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
        row = folder.shape[1] * dtype.itemsize
        buffer: Tensor | None = None
        for first, last in folder.blocks():
            if buffer is None:
                buffer = torch.empty(last - first, folder.shape[1], dtype=dtype)
            block = buffer[: last - first]
            read_all(self.read, bytes_of(block), start + first * row)
            if not folder.fold(block, first, last):
                raise not_finite(name, dtype)
            write_all(self.write, bytes_of(block), to + first * row)
        with self.lock:
            self.report.surviving[change.module] = folder.surviving

    def _restored(self, name: str, change: Change | None, start: int, entry: Any, to: int) -> None:
        """A tensor as the training saw it, with its change if it has one: needed whole."""
        weight = torch.empty(tuple(entry["shape"]), dtype=DTYPES[entry["dtype"]])
        read_all(self.read, bytes_of(weight), start)
        restored = weight if self.restore is None else self.restore(name, weight)
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
                self.report.surviving[change.module] = folder.surviving


def _write_json_files(base: Path, output: Path, layout: Layout, plan: _Plan) -> None:
    """config.json, corrected where the embeddings came apart, and the index with the tensors that were added."""
    config = _read(base / "config.json")
    if isinstance(config, dict):
        if plan.added:
            config["tie_word_embeddings"] = False
            write_json(output / "config.json", config)
        else:
            shutil.copyfile(base / "config.json", output / "config.json")
    index = _read(base / INDEX)
    if isinstance(index, dict):
        for name, (origin, _) in plan.added.items():
            index["weight_map"][name] = index["weight_map"][origin]
            if "total_size" in index.get("metadata", {}):
                start, stop = layout.entry(origin)["data_offsets"]
                index["metadata"]["total_size"] += stop - start
        write_json(output / INDEX, index)
