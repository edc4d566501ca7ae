"""Evaluate any stage's model on the held-out part of a data file, with the prompts it was trained with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from phinetune.artifact import file_hash, folder_bytes, read_manifest
from phinetune.data.examples import Examples, load_examples
from phinetune.data.messages import DataConfig, parse_data_config
from phinetune.data.records import data_file
from phinetune.errors import ConfigError, DataError, OutputError
from phinetune.evaluation.results import StageResult, results, stage_result, write_results
from phinetune.evaluation.score import score
from phinetune.events import Note, OnEvent, log_event
from phinetune.generation.load import find, load_generator

Split = Literal["test", "train", "all"]
_INHERITED = ("prompt", "completion", "system", "test_fraction", "seed", "max_length")


def evaluate(
    model: str,
    data: str | dict[str, Any] | DataConfig | None = None,
    split: Split | None = None,
    output: str | Path | None = None,
    max_new_tokens: int | None = None,
    base_model: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    on_event: OnEvent = log_event,
) -> StageResult:
    """Score `model` (a folder that finetune, merge or export wrote, a base model's folder, a hub id, an embedded name) on `data`.

    split: the held-out examples (those the training of the same file and seed did not see), the trained ones, or all; by default the
    held-out ones of the file that the model was trained on, and all of any other file given for a trained model.
    output: where to write the result as JSON. max_new_tokens defaults to half as much again as the longest reference.
    base_model: for an adapter, another place of its base model. Raises a PhinetuneError for what the user can mend.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: must be at least 1 (found: {max_new_tokens})")
    target = _check_file(output)
    folder, kind = find(model, model_kwargs, on_event)
    manifest = read_manifest(folder)
    config = inherit_data_config(data, manifest, on_event)
    chosen = _choose_split(split, config, manifest, on_event)
    if chosen == "all":
        config = replace(config, test_fraction=0.0)
    generator = load_generator(model, model_kwargs, None, base_model, on_event)
    train, test, _ = load_examples(config, generator.contract, on_event)
    examples: Examples = test if chosen == "test" else train
    if not len(examples):
        raise DataError(f"{config.path}: the {chosen} part is empty", "raise data.test_fraction, or use --split all")
    result = stage_result(score(generator, examples, kind, max_new_tokens, on_event), folder, folder_bytes(folder))
    if target:
        write_results(target, results([result], model=model, data=config.path, split=chosen, seed=config.seed))
        on_event(Note(f"results: {target}"))
    return result


def inherit_data_config(
    data: str | dict[str, Any] | DataConfig | None, manifest: dict[str, Any], on_event: OnEvent = log_event
) -> DataConfig:
    """The data config of an evaluation: what is given, and for the rest what the model was trained with (said once)."""
    trained: dict[str, Any] = manifest.get("data") or {}
    if isinstance(data, DataConfig):
        return data
    values = {} if data is None else {"path": str(data)} if isinstance(data, str | Path) else dict(data)
    if "path" not in values:
        if not trained.get("path"):
            raise ConfigError(
                "data: this key is needed: the model does not say what it was trained on", "give --data FILE"
            )
        values["path"] = trained["path"]
    inherited = {k: trained[k] for k in _INHERITED if trained.get(k) is not None and k not in values}
    defaults = DataConfig("-")
    shown = {k: v for k, v in inherited.items() if v != getattr(defaults, k)}
    if shown:
        on_event(Note("data: as in training: " + ", ".join(f"{k} {v!r}" for k, v in shown.items())))
    return parse_data_config({**values, **inherited})


def _choose_split(split: Split | None, config: DataConfig, manifest: dict[str, Any], on_event: OnEvent) -> Split:
    """The split to score; warns where "held out" cannot be trusted because the file is not the one that was trained on."""
    if split is not None and split not in ("test", "train", "all"):
        raise ConfigError(f"split: must be test, train or all (found: {split!r})")
    trained_on, trained = manifest.get("data_sha256"), manifest.get("data") or {}
    if trained_on is None or file_hash(data_file(config.path)) == trained_on:
        if (
            trained
            and split in (None, "test")
            and (config.seed, config.test_fraction) != (trained["seed"], trained["test_fraction"])
        ):
            on_event(
                Note("data: another split than the training's: some of these examples were trained on", warning=True)
            )
        return split or "test"
    same_name = Path(config.path).name == Path(str(trained.get("path"))).name
    if same_name and split in (None, "test"):
        on_event(
            Note(
                f"data: {config.path} has changed since the training: held-out rows may have been trained on",
                warning=True,
            )
        )
        return "test"
    if split is None:
        on_event(
            Note(
                f"data: {config.path} is not the file of the training: all of it is scored (--split test scores a part)"
            )
        )
    return split or "all"


def _check_file(output: str | Path | None) -> Path | None:
    """The file to write, checked before the long work begins."""
    if output is None:
        return None
    file = Path(output).expanduser()
    parent = next(p for p in file.absolute().parents if p.exists())
    if file.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{file}: cannot be written as a file", "choose another file")
    return file
