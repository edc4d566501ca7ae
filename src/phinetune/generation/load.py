"""A generator from whatever a stage left: a base model, an adapter, a merged model, an ONNX folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phinetune.artifact import read_manifest
from phinetune.errors import AdapterError
from phinetune.events import Note, OnEvent, log_event
from phinetune.generation.onnx_backend import ADAPTER_SUFFIX, load_onnx
from phinetune.generation.protocol import Generator
from phinetune.generation.torch_backend import TorchGenerator
from phinetune.model.contract import CONTRACT_FILE, PromptContract, load_contract
from phinetune.model.embedded import EMBEDDED
from phinetune.model.folder import Kind, base_key, kind_of, resolve_model, stored_dtype
from phinetune.model.grid import Grid, read_grid
from phinetune.model.load import load_base_contract, load_model, plan_load
from phinetune.model.quantized import as_model_kwargs


def find(name: str, model_kwargs: dict[str, Any] | None = None, on_event: OnEvent = log_event) -> tuple[Path, Kind]:
    """(folder, kind) of a model given as the output folder of a stage, a base model's folder, a hub id, or an embedded model.

    An adapter of an ONNX folder is given as its file, `FOLDER/NAME.onnx_adapter`; the folder is then found.
    """
    folder = Path(name).expanduser()
    if folder.suffix == ADAPTER_SUFFIX and folder.is_file() and kind_of(folder.parent) == "onnx":
        return folder.parent, "onnx"
    if name not in EMBEDDED and folder.is_dir() and kind_of(folder) != "hf":
        return folder, kind_of(folder)
    return resolve_model(name, model_kwargs, on_event), "hf"


def find_manifest(name: str, folder: Path) -> dict[str, Any]:
    """The manifest of the model `name` in `folder`; for an adapter of an ONNX folder, what is known of that adapter's training."""
    manifest, adapter = read_manifest(folder), _onnx_adapter(name)
    known = manifest.get("adapters") if adapter else None
    return {**manifest, **known.get(adapter, {})} if isinstance(known, dict) else manifest


def _onnx_adapter(name: str) -> str | None:
    """NAME of `FOLDER/NAME.onnx_adapter`."""
    return Path(name).stem if name.endswith(ADAPTER_SUFFIX) else None


def load_generator(
    name: str,
    model_kwargs: dict[str, Any] | None = None,
    longest: int | None = None,
    base_model: str | None = None,
    on_event: OnEvent = log_event,
) -> Generator:
    """The generator for `name` (see `find`). `base_model` replaces the one that an adapter names; it must have the same content."""
    folder, kind = find(name, model_kwargs, on_event)
    if kind == "onnx":
        return load_onnx(folder, _onnx_adapter(name))
    if kind == "adapter":
        model, contract = load_adapted(folder, model_kwargs, longest, base_model, on_event)
        return TorchGenerator(model.eval(), contract)
    trust = bool((model_kwargs or {}).get("trust_remote_code", False))
    model = load_model(folder, plan_load(folder, model_kwargs, longest, on_event))
    return TorchGenerator(model, load_base_contract(folder, trust))


def find_contract(
    name: str, model_kwargs: dict[str, Any] | None = None, base_model: str | None = None, on_event: OnEvent = log_event
) -> PromptContract:
    """The prompt contract that the generator for `name` will have, without loading its weights."""
    folder, kind = find(name, model_kwargs, on_event)
    if kind == "onnx":
        return load_contract(folder)
    if kind == "adapter":
        trust = {**trained_overrides(folder), **(model_kwargs or {})}.get("trust_remote_code", False)
        return adapter_contract(folder, adapter_base(folder, base_model, on_event), bool(trust))
    return load_base_contract(folder, bool((model_kwargs or {}).get("trust_remote_code", False)))


def load_adapted(
    folder: Path,
    model_kwargs: dict[str, Any] | None = None,
    longest: int | None = None,
    base_model: str | None = None,
    on_event: OnEvent = log_event,
) -> tuple[Any, PromptContract]:
    """(model with LoRA layers, contract) of an adapter folder. Raises AdapterError if the base model is not the one it was trained on."""
    from phinetune.lora.adapter import load_adapter

    base = adapter_base(folder, base_model, on_event)
    asked = model_kwargs or {}
    trained = {} if {"load_in_4bit", "load_on_grid", "quantization_config"} & set(asked) else _trained_format(folder)
    if {"dtype", "torch_dtype"} & set(asked):
        trained.pop("torch_dtype", None)
    kwargs = {**trained_overrides(folder), **trained, **asked}
    contract = adapter_contract(folder, base, bool(kwargs.get("trust_remote_code", False)))
    model = load_model(base, plan_load(base, kwargs, longest, on_event))
    load_adapter(model, folder)
    round_as_trained(model, folder, base)
    return model, contract


def round_as_trained(model: Any, folder: Path, base: Path) -> None:
    """If the adapter in `folder` was trained for a grid (`int4_aware`), let `model`, which it is in, compute on that grid, as in training."""
    grid = trained_grid(folder)
    if grid is not None:
        from phinetune.lora.rounding import round_model

        round_model(model, grid, stored_dtype(base))


def trained_grid(folder: Path) -> Grid | None:
    """The grid that the model in `folder` (an adapter, or merged from one) was trained for; None if it was not."""
    return read_grid(read_manifest(folder).get("grid"), f"{folder}/manifest.json: grid")


def trained_overrides(folder: Path) -> dict[str, Any]:
    """Fields of the model's config that the training changed by model_kwargs: the adapter is right with them only."""
    overrides = read_manifest(folder).get("config_overrides")
    return dict(overrides) if isinstance(overrides, dict) else {}


def _trained_format(folder: Path) -> dict[str, Any]:
    """`model_kwargs` for the format that an adapter's base was held in: it is right over that one."""
    return as_model_kwargs(read_manifest(folder).get("quantization"), f"{folder}/manifest.json")


def adapter_contract(folder: Path, base: Path, trust_remote_code: bool = False) -> PromptContract:
    """The contract saved with an adapter; for one that phinetune did not write, its base model's."""
    if (folder / CONTRACT_FILE).is_file():
        return load_contract(folder, trust_remote_code)
    return load_base_contract(base, trust_remote_code)


def adapter_base(folder: Path, base_model: str | None = None, on_event: OnEvent = log_event) -> Path:
    """The folder of the base model that the adapter in `folder` belongs to, checked by content."""
    from phinetune.lora.adapter import read_adapter

    manifest, saved = read_manifest(folder), read_adapter(folder)
    name = base_model or manifest.get("base_model") or saved.base_model
    if not name:
        raise AdapterError(f"{folder}: does not say which base model it belongs to", "name it with --base-model")
    base = resolve_model(name, on_event=on_event)
    expected = manifest.get("base_key") or saved.base_key
    if expected is None:
        on_event(
            Note(
                f"{folder}: was not trained by phinetune; that {name} is its base model cannot be checked", warning=True
            )
        )
    elif base_key(base) != expected:
        raise AdapterError(
            f"{folder}: was trained on another base model than {name} (their contents differ)",
            "give the base model it was trained on with --base-model",
        )
    return base
