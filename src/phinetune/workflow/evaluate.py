"""Evaluate any stage's model on the held-out part of a data file, with the prompts it was trained with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from phinetune.artifact import folder_bytes, read_manifest
from phinetune.data.examples import Examples, load_examples
from phinetune.data.messages import DataConfig, parse_data_config
from phinetune.errors import ConfigError, DataError
from phinetune.evaluation.results import StageResult, results, stage_result, write_results
from phinetune.evaluation.score import score
from phinetune.events import Note, OnEvent, log_event
from phinetune.generation.load import find, load_generator

_INHERITED = ("prompt", "completion", "system", "test_fraction", "seed", "max_length")


def inherit_data_config(
    data: str | dict[str, Any] | DataConfig | None, manifest: dict[str, Any], on_event: OnEvent = log_event
) -> DataConfig:
    """The data config of an evaluation: what is given, and for the rest what the model was trained with (said once)."""
    trained: dict[str, Any] = manifest.get("data") or {}
    if data is None:
        if not trained.get("path"):
            raise ConfigError("data: this key is needed: the model does not say what it was trained on")
        data = {"path": trained["path"]}
    if isinstance(data, DataConfig):
        return data
    values = {"path": str(data)} if isinstance(data, str | Path) else dict(data)
    inherited = {k: trained[k] for k in _INHERITED if trained.get(k) is not None and k not in values}
    defaults = DataConfig("-")
    shown = {k: v for k, v in inherited.items() if v != getattr(defaults, k)}
    if shown:
        on_event(Note("data: as in training: " + ", ".join(f"{k} {v!r}" for k, v in shown.items())))
    return parse_data_config({**values, **inherited})


def evaluate(
    model: str,
    data: str | dict[str, Any] | DataConfig | None = None,
    split: Literal["test", "train", "all"] = "test",
    output: str | Path | None = None,
    max_new_tokens: int | None = None,
    base_model: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    on_event: OnEvent = log_event,
) -> StageResult:
    """Score `model` (a folder that finetune, merge or export wrote, a base model's folder, a hub id, an embedded name) on `data`.

    split: the held-out examples (those the training of the same file and seed did not see), the trained ones, or all.
    output: where to write the result as JSON. max_new_tokens defaults to half as much again as the longest reference.
    base_model: for an adapter, another place of its base model. Raises a PhinetuneError for what the user can mend.
    """
    folder, kind = find(model, on_event)
    config = inherit_data_config(data, read_manifest(folder), on_event)
    if split == "all":
        config = replace(config, test_fraction=0.0)
    elif split not in ("test", "train"):
        raise ConfigError(f"split: must be test, train or all (found: {split!r})")
    generator = load_generator(model, model_kwargs, None, base_model, on_event)
    train, test, _ = load_examples(config, generator.contract, on_event)
    examples: Examples = test if split == "test" else train
    if not len(examples):
        raise DataError(f"{config.path}: the {split} part is empty", "raise data.test_fraction, or use --split all")
    scored = score(generator, examples, kind, max_new_tokens, on_event)
    result = stage_result(scored, folder, folder_bytes(folder))
    if output:
        write_results(
            Path(output), results([result], model=model, data=str(config.path), split=split, seed=config.seed)
        )
        on_event(Note(f"results: {output}"))
    return result
