"""Which examples a model is evaluated on: the data of its training where nothing else is said, and the part it has not seen.

What is inherited, and where "held out" cannot be trusted, is said. Not here: models, metrics.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from phinetune.artifact import file_hash
from phinetune.data.examples import Examples, load_examples
from phinetune.data.inheritance import inherit, inherited_note
from phinetune.data.messages import DataConfig, parse_data_config
from phinetune.data.sources import data_source
from phinetune.errors import ConfigError, DataError
from phinetune.events import Note, OnEvent, log_event
from phinetune.generation.protocol import Generator
from phinetune.model.contract import PromptContract

Split = Literal["test", "train", "all"]
_SPLIT = ("seed", "test_fraction", "rows", "max_rows", "draw")  # what decides which rows are held out


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
    encoder: PromptContract,
    max_examples: int | None = None,
    on_event: OnEvent = log_event,
) -> Part:
    """The part of `data` to evaluate a model with this `manifest` on, encoded; at most `max_examples` of it, evenly spread.

    Raises ConfigError where no data is known, DataError where the part is empty.
    """
    config, chosen = _config_and_split(data, split, manifest, on_event)
    if chosen == "all":
        config = replace(config, test_fraction=0.0)
    train, test, _ = load_examples(config, encoder.with_chat_template(config.chat_template), on_event, as_rows=True)
    examples = test if chosen == "test" else train
    count = len(examples)
    if not count:
        raise DataError(f"{config.path}: the {chosen} part is empty", "raise data.test_fraction, or use --split all")
    if max_examples is not None and max_examples < count:
        examples = examples.subset([i * count // max_examples for i in range(max_examples)])
        on_event(Note(f"data: {max_examples} of {count} examples are used, evenly spread (max_examples)"))
    return Part(config, chosen, examples)


def with_chat_template(generator: Generator, config: DataConfig, on_event: OnEvent = log_event) -> Generator:
    """`generator`, asked in the chat template that `config` gives; said where that is not the model's own."""
    contract = generator.contract.with_chat_template(config.chat_template)
    if contract is generator.contract:
        return generator
    on_event(Note("data: chat_template is not the model's own; prompts are written in it", warning=True))
    anew: Any = generator
    return cast(Generator, replace(anew, contract=contract))


def _config_and_split(
    data: str | dict[str, Any] | DataConfig | None, split: Split | None, manifest: dict[str, Any], on_event: OnEvent
) -> tuple[DataConfig, Split]:
    """What to score: the training's eval_data, all of it, where nothing else is named; else as `inherit_data_config` and the split say."""
    names_file = isinstance(data, str | Path | DataConfig) or (isinstance(data, dict) and "path" in data)
    if not manifest.get("eval_data") or names_file or split not in (None, "test"):
        config = inherit_data_config(data, manifest, on_event)
        return config, choose_split(split, config, manifest, on_event)
    config = inherit_data_config(data, {"data": manifest["eval_data"]}, on_event)
    on_event(Note(f"data: {config.path}, the training's eval_data, is scored"))
    if file_hash(data_source(config, on_event)) != manifest.get("eval_data_sha256"):
        on_event(Note(f"data: {config.path} has changed since the training", warning=True))
    return config, "all"


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
    taken = inherit(values, trained, same_file=_same_file(str(values["path"]), trained, manifest.get("data_sha256")))
    if taken:
        on_event(Note(f"data: as in training: {inherited_note(taken)}"))
    return parse_data_config({**values, **taken})


def _same_file(path: str, trained: dict[str, Any], sha256: str | None) -> bool:
    """True if `path` is what was trained on, by its name or by its content."""
    file = Path(path).expanduser()
    return path == trained.get("path") or (sha256 is not None and file.is_file() and file_hash(file) == sha256)


def choose_split(split: Split | None, config: DataConfig, manifest: dict[str, Any], on_event: OnEvent) -> Split:
    """The split to score; warns where "held out" cannot be trusted because the file is not the one that was trained on."""
    if split is not None and split not in ("test", "train", "all"):
        raise ConfigError(f"split: must be test, train or all (found: {split!r})")
    trained_on, trained = manifest.get("data_sha256"), manifest.get("data") or {}
    if trained_on is None or file_hash(data_source(config, on_event)) == trained_on:
        asked, then = asdict(config), asdict(DataConfig("-")) | trained
        if trained and split in (None, "test") and any(asked[key] != then[key] for key in _SPLIT):
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
