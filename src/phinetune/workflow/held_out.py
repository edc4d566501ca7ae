"""Which examples a model is evaluated on: the data of its training where nothing else is said, and the part it has not seen.

What is inherited, and where "held out" cannot be trusted, is said. Not here: models, metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from phinetune.artifact import file_hash
from phinetune.data.examples import ChatEncoder, Examples, load_examples
from phinetune.data.messages import DataConfig, parse_data_config
from phinetune.data.records import data_file
from phinetune.errors import ConfigError, DataError
from phinetune.events import Note, OnEvent, log_event

Split = Literal["test", "train", "all"]
_INHERITED = ("prompt", "completion", "system", "test_fraction", "seed", "max_length")


@dataclass(frozen=True)
class Part:
    """The examples of one part of a data file, never empty, and how they were chosen."""

    config: DataConfig
    split: Split
    examples: Examples


def choose_examples(
    data: str | dict[str, Any] | DataConfig | None,
    split: Split | None,
    manifest: dict[str, Any],
    encoder: ChatEncoder,
    max_examples: int | None = None,
    on_event: OnEvent = log_event,
) -> Part:
    """The part of `data` to evaluate a model with this `manifest` on, encoded; at most `max_examples` of it, evenly spread.

    Raises ConfigError where no data is known, DataError where the part is empty.
    """
    config = inherit_data_config(data, manifest, on_event)
    chosen = choose_split(split, config, manifest, on_event)
    if chosen == "all":
        config = replace(config, test_fraction=0.0)
    train, test, _ = load_examples(config, encoder, on_event)
    examples = test if chosen == "test" else train
    count = len(examples)
    if not count:
        raise DataError(f"{config.path}: the {chosen} part is empty", "raise data.test_fraction, or use --split all")
    if max_examples is not None and max_examples < count:
        examples = examples.subset([i * count // max_examples for i in range(max_examples)])
        on_event(Note(f"data: {max_examples} of {count} examples are used, evenly spread (max_examples)"))
    return Part(config, chosen, examples)


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


def choose_split(split: Split | None, config: DataConfig, manifest: dict[str, Any], on_event: OnEvent) -> Split:
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
