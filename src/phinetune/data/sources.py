"""Where the rows come from: a file, a bundled set, a folder of data files, a data set of the hub; and which of the rows are used.

A folder or a hub data set is read once by `datasets` and kept as one Parquet file in phinetune's cache, from where it is read ever
after, with or without a network. No code that comes with data is run. Not here: what a row means (`messages.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phinetune.artifact import cache_folder, content_key, disk_errors, file_hash, write_json
from phinetune.data.messages import DataConfig
from phinetune.data.records import BUNDLED, READERS, Record, data_file, read_records
from phinetune.errors import DataError, first_line
from phinetune.events import Note, OnEvent, log_event


def data_source(config: DataConfig, on_event: OnEvent = log_event, fetch: bool = True) -> Path:
    """The file that holds the rows of `config`; a folder or a hub data set becomes one first (see the module's head).

    Without `fetch`, only what is on this machine already. Raises DataError for what is not there, cannot be fetched, or has no such split.
    """
    path = Path(config.path).expanduser()
    if config.path not in BUNDLED and path.is_dir():
        return _folder(path, config, on_event)
    if config.path not in BUNDLED and not path.exists() and is_hub_id(config):
        return _hub(config, on_event, fetch)
    file = data_file(config.path)
    for key in ("split", "subset"):
        if getattr(config, key) is not None:
            raise DataError(
                f"data.{key}: {config.path} is one file and has none (found: {getattr(config, key)!r})",
                'leave it out; part of a file is data.rows, such as "[:70%]"',
            )
    return file


def is_hub_id(config: DataConfig) -> bool:
    """True if the path of `config` can only be the name of a data set of the hub."""
    name, path = config.path, Path(config.path)
    if path.suffix.lower() in READERS or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
        return False
    return not path.parent.is_dir() if "/" in name else (config.subset or config.split) is not None


def _folder(folder: Path, config: DataConfig, on_event: OnEvent) -> Path:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix.lower() in {*READERS, ".md", ".yaml"})
    if not any(f.suffix.lower() in READERS for f in files):
        raise DataError(
            f"{config.path}: a folder without data files", f"give a file or a folder of {', '.join(READERS)}"
        )
    names = [str(f.relative_to(folder)) for f in files]
    key = content_key(names, file_hash(*files), [f.stat().st_size for f in files], config.subset, config.split)
    target = cache_folder() / "data" / f"{_slug(folder.resolve().name, config)}-{key[:16]}.parquet"
    if not target.is_file():
        with tempfile.TemporaryDirectory(prefix="phinetune-") as temporary:
            _save(_load(str(folder.resolve()), config, cache_dir=temporary), target, config)
        on_event(Note(f"data: {config.path}{_part(config)} is kept as {target}"))
    return target


def _hub(config: DataConfig, on_event: OnEvent, fetch: bool) -> Path:
    place = cache_folder() / "data"
    index = place / f"{_slug(config.path, config)}-{content_key(config.path, config.subset, config.split)[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = place / str(json.loads(index.read_text(encoding="utf-8"))["file"])
        if known.is_file():
            return known
    if not fetch:
        raise DataError(f"{config.path}: is not in phinetune's cache")
    on_event(Note(f"data: fetching {config.path}{_part(config)} from the Hugging Face hub"))
    revision = None
    with contextlib.suppress(Exception):  # without a network, what the hub's own cache holds will do
        from huggingface_hub import HfApi

        revision = HfApi().dataset_info(config.path, timeout=20).sha
    rows = _load(config.path, config, **({"revision": revision} if revision else {}))
    target = index.with_name(f"{index.stem}-{revision or 'cached'}.parquet")
    _save(rows, target, config)
    about = {"id": config.path, "subset": config.subset, "split": config.split, "revision": revision}
    write_json(index, {**about, "rows": len(rows), "file": target.name})
    on_event(Note(f"data: {config.path}{_part(config)} at revision {revision} is kept as {target}"))
    return target


def _load(name: str, config: DataConfig, **options: Any) -> Any:
    """The `datasets.Dataset` of a folder or a hub id. Raises DataError with the first line of whatever went wrong."""
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if name in _PACKAGED_DATASETS_MODULES:  # a reader's name, as in load_dataset("json", data_files=...)
        raise DataError(f"data.path: {name} is a type of file", "give the data file itself")
    drawn = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, config.subset, split=config.split, **options)
    except Exception as error:  # whatever a foreign file or the network makes datasets raise
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        reason = first_line(cause)
        hub = "" if Path(name).is_dir() else "no such file here, and not to be had from the hub: "
        raise DataError(
            f"{config.path}{_part(config)}: {hub}{reason}", "check data.path, data.subset and data.split"
        ) from error
    finally:
        if drawn:
            datasets.enable_progress_bars()
    if isinstance(found, dict):
        if len(found) > 1:
            raise DataError(f"data.split: this key is needed: {config.path} has {', '.join(found)}")
        found = next(iter(found.values()))
    if not len(found):
        raise DataError(f"{config.path}{_part(config)}: holds no rows", "each row must be one example")
    return found


def _save(rows: Any, target: Path, config: DataConfig) -> None:
    """Write `rows` as Parquet, whole or not at all."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            rows.to_parquet(str(temporary))
            os.replace(temporary, target)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = first_line(error)
            raise DataError(f"{config.path}: cannot be kept as Parquet: {reason}") from error
        finally:
            temporary.unlink(missing_ok=True)


def _slug(name: str, config: DataConfig) -> str:
    return re.sub(r"[^\w.-]+", "-", "--".join(filter(None, (name, config.subset, config.split))))[:80]


def _part(config: DataConfig) -> str:
    """Subset and split in brackets, for messages."""
    named = ", ".join(filter(None, (config.subset, config.split)))
    return f" ({named})" if named else ""


def chosen_rows(config: DataConfig, file: Path) -> Iterator[Record]:
    """The rows of `file` that `config` uses: its `rows`, of them `max_rows`. Raises DataError if that is none at all.

    Places are named after `config.path` where the file is a copy in the cache.
    """
    wanted = (config.rows or "[:]").strip("[]").split(":")
    count = None
    if config.draw is not None or any(w.startswith("-") or w.endswith("%") for w in wanted):
        count = sum(1 for _ in read_records(file))
    start, stop = (_bound(w, count) for w in wanted)
    records = read_records(file)
    if config.draw is not None and config.max_rows is not None:
        possible = range(*slice(start, stop).indices(count or 0))
        drawn = set(random.Random(config.draw).sample(possible, min(config.max_rows, len(possible))))
        records = (record for index, record in enumerate(records) if index in drawn)
    elif config.rows is not None or config.max_rows is not None:
        records = itertools.islice(itertools.islice(records, start, stop), config.max_rows)
    first = next(records, None)
    if first is None:
        of = f" of its {count} rows" if count is not None else ""
        raise DataError(f"data.rows: {config.rows} selects none{of} ({config.path})", "choose another part")
    copied = config.path not in BUNDLED and file != Path(config.path).expanduser()
    for record in itertools.chain([first], records):
        yield Record(record.fields, config.path + record.place[len(str(file)) :]) if copied else record


def _bound(text: str, count: int | None) -> int | None:
    """A slice's border in rows; percentages and negative ones are of `count`, which is known then."""
    if not text:
        return None
    value = round(int(text[:-1]) * (count or 0) / 100) if text.endswith("%") else int(text)
    return max(value + (count or 0), 0) if text.startswith("-") else value
