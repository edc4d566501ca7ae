"""Where a base model is, and whether it is all there: local folders, the embedded model, the Hugging Face hub.

Everything behind this file works on a local folder. Weights are read from safetensors only; a truncated or missing file is found by
reading headers, before any weight is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from pathlib import Path
from typing import Any, Literal

from phinetune.artifact import BUILDING, MANIFEST, cache_folder, content_key, file_hash, write_json
from phinetune.errors import ModelError, OutputError, did_you_mean, first_line
from phinetune.events import Note, OnEvent, log_event
from phinetune.model.embedded import EMBEDDED, embedded_folder

Kind = Literal["hf", "adapter", "onnx"]
HUB_KEYS = ("revision", "token", "cache_dir", "local_files_only")
"""Keys of `model_kwargs` that say where on the hub a model is fetched from."""
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py")


def resolve_model(name: str, model_kwargs: dict[str, Any] | None = None, on_event: OnEvent = log_event) -> Path:
    """The local, complete folder of a base model given as a folder, an embedded model's name, or a hub id (`owner/name`).

    `model_kwargs` may hold a `revision` and a `token` for the hub. Raises ModelError if it is not there, not complete, or cannot be fetched.
    """
    if name in EMBEDDED:
        return embedded_folder(name, on_event)
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_folder(folder)
        return folder
    if folder.exists():
        raise ModelError(f"{name}: is a file; a model is a folder with config.json and safetensors files")
    if not _is_hub_id(name):
        raise ModelError(
            f"{name}: no such model folder{did_you_mean(name, EMBEDDED)}",
            f"give a folder, a hub id (owner/name), or an embedded model: {', '.join(EMBEDDED)}",
        )
    options = {k: v for k, v in (model_kwargs or {}).items() if k in HUB_KEYS}
    folder = _from_hub(name, options, on_event)
    check_model_folder(folder)
    return folder


def resolve_description(name: str, model_kwargs: dict[str, Any] | None = None, on_event: OnEvent = log_event) -> Path:
    """As `resolve_model`, for what config.json and the tokenizer tell: the weights need not be there, and are not fetched."""
    folder = Path(name).expanduser()
    if name in EMBEDDED or folder.exists() or not _is_hub_id(name):
        if folder.is_dir():
            check_model_folder(folder, weights=False)
            return folder
        return resolve_model(name, model_kwargs, on_event)
    from huggingface_hub import snapshot_download

    options = {k: v for k, v in (model_kwargs or {}).items() if k in HUB_KEYS}
    wanted = [pattern for pattern in _HUB_FILES if pattern != "*.safetensors"]
    with contextlib.suppress(Exception):
        local = Path(snapshot_download(name, allow_patterns=wanted, **{**options, "local_files_only": True}))
        check_model_folder(local, weights=False)
        return local
    on_event(Note(f"model: fetching config and tokenizer of {name} from the Hugging Face hub"))
    try:
        local = Path(snapshot_download(name, allow_patterns=wanted, **options))
    except Exception as error:
        raise _hub_error(name, error) from error
    check_model_folder(local, weights=False)
    return local


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).expanduser().parent.is_dir()


def _hub_error(name: str, error: Exception) -> ModelError:
    reason = first_line(error)
    return ModelError(
        f"{name}: no such folder here, and not to be had from the hub: {reason}",
        "give the path of a local model folder",
    )


def _from_hub(name: str, options: dict[str, Any], on_event: OnEvent) -> Path:
    from huggingface_hub import snapshot_download

    wanted = list(_HUB_FILES)
    with contextlib.suppress(Exception):
        local = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True, **options))
        if weight_files(local)[0] and not weight_files(local)[1]:  # else the download broke off: fetch the rest
            return local
    on_event(Note(f"model: fetching {name} from the Hugging Face hub"))
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, **options))
    except Exception as error:
        raise _hub_error(name, error) from error


def kind_of(folder: Path) -> Kind:
    """What a folder holds: an ONNX model, an adapter, or a Hugging Face model. Raises ModelError for none of them."""
    if (folder / "genai_config.json").is_file():
        return "onnx"
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        return "hf"
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    raise ModelError(
        f"{folder}: holds neither a model, an adapter nor an ONNX model",
        "give the output folder of finetune, merge or export, or a base model",
    )


def check_model_folder(folder: Path, weights: bool = True) -> None:
    """Raises one ModelError with everything that is missing or broken in a base model's folder; without `weights`, but those."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: is an adapter, not a base model", "merge it first, or give its base model")
    problems = []
    config = folder / "config.json"
    if not config.is_file():
        problems.append(f"{config}: no such file")
    else:
        try:
            json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(f"{config}: not valid JSON: {error}")
    if not any(
        (folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        problems.append(f"{folder}: no tokenizer files (tokenizer.json)")
    files, missing = weight_files(folder) if weights else ([], [])
    problems += [f"{f}: no such file, though the index names it" for f in missing]
    if weights and not files and not missing:
        problems.append(f"{folder}: no weights (*.safetensors)")
    problems += [problem for file in files if (problem := _safetensors_problem(file))]
    if problems:
        raise ModelError(problems, "copy or download the model again; weights must be safetensors files")


def weight_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(files that exist, files that the shard index names but that do not), in name order."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise ModelError(f"{index}: not a shard index") from None
        files = [folder / name for name in names]
        return [f for f in files if f.is_file()], [f for f in files if not f.is_file()]
    return sorted(folder.glob("*.safetensors")), []


def safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """(header, size that the whole file must have). Raises ValueError if the header itself cannot be read."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= 100 << 20:
            raise ValueError("no safetensors header")
        raw = stream.read(length)
    if len(raw) < length:
        raise ValueError("the header is cut off")
    header: dict[str, Any] = json.loads(raw)
    if not isinstance(header, dict):
        raise ValueError("the header is no dictionary")
    end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    return header, 8 + length + end


def _safetensors_problem(file: Path) -> str | None:
    try:
        _, expected = safetensors_header(file)
    except (ValueError, KeyError, TypeError):
        return f"{file}: not a safetensors file, or cut off in its header"
    found = file.stat().st_size
    return None if found == expected else f"{file}: {found} bytes, must be {expected}: the file is cut off or damaged"


def base_key(folder: Path) -> str:
    """sha256 of a base model's content: weights, config, tokenizer, template, code. Adapters carry it, to be loaded on no other base."""
    endings = (".json", ".jinja", ".model", ".txt", ".py")
    small = [f for f in folder.iterdir() if f.suffix in endings and f.name not in (MANIFEST, BUILDING)]
    files = [*sorted(small), *weight_files(folder)[0]]
    return _hash_once(tuple((str(f.resolve()), _state(f)) for f in files))


_SETTLED = (
    2.0  # seconds; a file that changed later than this could change again within its clock's tick and not show it
)
_REMEMBERED = 64  # hashes kept on disk, the latest


def _state(file: Path) -> tuple[int, ...]:
    """What changes with the file's content, in whatever way it is changed: size, both times, and which file it is."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@functools.lru_cache(maxsize=8)
def _hash_once(files: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    """sha256 of files given by name and state: gigabytes are read once, and again when the state is another one.

    Kept in phinetune's cache, for files that have been at rest; where that cannot be written, once in a process.
    """
    key, known = content_key(files), dict[str, str]()
    with contextlib.suppress(OSError, ValueError, TypeError, OutputError):
        known = dict(json.loads((cache_folder() / "hashes.json").read_text(encoding="utf-8")))
    if key in known:
        return str(known[key])
    settled = all(max(state[1], state[2]) < time.time_ns() - _SETTLED * 1e9 for _, state in files)
    digest = file_hash(*(Path(name) for name, _ in files))
    if settled:
        with contextlib.suppress(OSError, OutputError):
            latest = list(known.items())[1 - _REMEMBERED :]
            write_json(cache_folder() / "hashes.json", {**dict(latest), key: digest})
    return digest


def stored_dtype(folder: Path) -> Any:
    """The dtype that most of a model folder's weights have on disk, as a torch dtype."""
    import torch

    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    sizes: dict[str, int] = {}
    for file in weight_files(folder)[0]:
        for name, tensor in safetensors_header(file)[0].items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - start
    dtype = max(sizes, key=lambda d: sizes[d], default="F32")
    if dtype not in names:
        raise ModelError(
            f"{folder}: its weights are {dtype}, not floating point numbers", "give the model before quantization"
        )
    return names[dtype]
