"""What a training run is asked for: its configs read and checked together, its examples, the key of its result.

Shared by training and by the forecast of it. Not here: the run itself (`finetune.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.artifact import content_key
from phinetune.data.examples import Examples, load_examples
from phinetune.data.inheritance import inherit
from phinetune.data.ledger import Ledger
from phinetune.data.messages import DataConfig, parse_data_config
from phinetune.errors import ConfigError, DataError
from phinetune.events import Note, OnEvent
from phinetune.lora.config import LoraConfig, parse_lora_config
from phinetune.model.contract import PromptContract
from phinetune.model.grid import Grid, record_grid
from phinetune.model.load import LoadPlan
from phinetune.training.config import TrainingPlan, read_training_config

_SECRET = ("token", "use_auth_token", "hub_token")


@dataclass(frozen=True)
class TrainingRequest:
    """What was asked for, read and checked."""

    data: DataConfig
    eval_data: DataConfig | None
    lora: LoraConfig
    training: TrainingPlan
    model_kwargs: dict[str, Any]
    folder: Path
    overwrite: bool


def read_request(
    data: Any,
    eval_data: Any,
    training: Any,
    peft: Any,
    model_kwargs: Any,
    output_dir: Any,
    overwrite: bool,
    on_event: OnEvent,
) -> TrainingRequest:
    """Every config read and checked, all their problems in one ConfigError."""
    problems: list[str] = []

    def collect(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    data_config: DataConfig = collect(lambda: _data_config(data, eval_data))
    eval_config = (
        collect(lambda: _eval_config(eval_data, data_config)) if eval_data is not None and data_config else None
    )
    lora: LoraConfig = collect(lambda: parse_lora_config(peft))
    plan: TrainingPlan = collect(lambda: read_training_config(training, on_event))
    chosen = output_dir or (plan.output_dir if plan else None)
    if not chosen and plan:
        problems.append("output_dir: this key is needed")
    if model_kwargs is not None and not isinstance(model_kwargs, dict):
        problems.append(f"model_kwargs: must hold key: value pairs (found: {model_kwargs!r})")
    if problems:
        raise ConfigError(problems)
    kwargs = dict(model_kwargs or {})
    if plan.wanted_dtype and not {"dtype", "torch_dtype"} & set(kwargs):
        kwargs["dtype"] = plan.wanted_dtype
    if plan.values.get("use_cpu"):
        kwargs.setdefault("device_map", "cpu")
    return TrainingRequest(
        data_config, eval_config, lora, plan, kwargs, Path(str(chosen)).expanduser(), overwrite or plan.overwrite
    )


def _data_config(data: Any, eval_data: Any) -> DataConfig:
    """The config of what is trained on; with `eval_data`, nothing of it is held out unless test_fraction is given."""
    if eval_data is not None and isinstance(data, str | Path | dict):
        data = {"test_fraction": 0.0, **(data if isinstance(data, dict) else {"path": str(data)})}
    config = parse_data_config(data)
    by_default = isinstance(data, DataConfig) and data.test_fraction == DataConfig("-").test_fraction
    return replace(config, test_fraction=0.0) if eval_data is not None and by_default else config


def _eval_config(eval_data: Any, data: DataConfig) -> DataConfig:
    """The config of the held-out rows: all that `eval_data` names; what it does not say is as in `data`."""
    if isinstance(eval_data, str | Path):
        eval_data = {"path": str(eval_data)}
    if isinstance(eval_data, dict):
        values = {"path": data.path, **eval_data}
        eval_data = {**inherit(values, asdict(data), same_file=values["path"] == data.path), **values}
    config = parse_data_config(eval_data, "eval_data")
    if config.chat_template not in (None, data.chat_template):
        raise ConfigError("eval_data.chat_template: must be that of data: a model has one", "leave it out")
    return replace(config, test_fraction=0.0)


def request_key(asked: TrainingRequest, contents: dict[str, str]) -> str:
    """What decides the adapter's bytes: the base's and the data's content, and every setting but the data file's name."""
    plan = asked.training
    kwargs = {k: v for k, v in asked.model_kwargs.items() if k not in _SECRET}
    evaluated = [asdict(asked.eval_data) | {"path": ""}] if asked.eval_data is not None else []
    return content_key(
        contents,
        asdict(asked.data) | {"path": ""},
        asdict(asked.lora),
        plan.values,
        plan.layout,
        asdict(plan.fast_paths),
        plan.order,
        kwargs,
        *evaluated,
        *([] if plan.grid is None else [record_grid(plan.grid)]),
    )


def request_settings(asked: TrainingRequest) -> dict[str, Any]:
    """The settings for the manifest; secrets stay out."""
    kwargs = {k: str(v) for k, v in asked.model_kwargs.items() if k not in _SECRET}
    layers = asked.training.checkpoint_layers
    training = {k: v for k, v in asked.training.values.items() if k not in _SECRET}
    if asked.training.grid is not None:
        training["int4_aware"] = record_grid(asked.training.grid)
    if asked.training.order != "auto":
        training["train_sampling_strategy"] = asked.training.order
    return {
        "data": asdict(asked.data),
        **({"eval_data": asdict(asked.eval_data)} if asked.eval_data is not None else {}),
        "training_config": training | ({} if layers is None else {"checkpoint_layers": layers}),
        "peft_config": asdict(asked.lora),
        "model_kwargs": kwargs,
    }


def decide_rows(
    asked: TrainingRequest, config: Any, load: LoadPlan, train: Examples, on_event: OnEvent
) -> TrainingRequest:
    """`asked` with the kernel that is faster on this machine for the rows of `train`, unless it says which."""
    from phinetune.model.attention_choice import choose_rows

    paths = choose_rows(asked.training.fast_paths, config, load.dtype, load.device, train.lengths, on_event)
    return replace(asked, training=replace(asked.training, fast_paths=paths))


def check_start(lora: LoraConfig, plan: LoadPlan, grid: Grid | None = None) -> None:
    """Raises ConfigError for what peft_config asks of a base or a grid that cannot give it."""
    if grid is not None and (lora.use_dora or lora.lora_dropout):
        texts = {"use_dora": lora.use_dora, "lora_dropout": lora.lora_dropout}
        problems = [f"peft_config.{k}: not with training_config.int4_aware" for k, given in texts.items() if given]
        raise ConfigError(problems, "the factors are in the rounded weight, where neither has a place")
    if grid is not None and isinstance(plan.quantization, Grid):
        raise ConfigError(
            "training_config.int4_aware: not with model_kwargs.load_on_grid, which ships the base's integers as they are",
            "leave one of them out",
        )
    if lora.init_lora_weights == "loftq" and plan.quantization is None:
        raise ConfigError(
            'peft_config.init_lora_weights: "loftq" is for a base model in 4 bits', "set model_kwargs.load_in_4bit=true"
        )


def read_examples(
    asked: TrainingRequest, contract: PromptContract, on_event: OnEvent
) -> tuple[Examples, Examples, dict[str, Any]]:
    """(train, held out, ledgers for the manifest); what became of the rows is said."""
    train, test, ledger = load_examples(asked.data, contract, on_event)
    check_closed(ledger, contract, asked.data.path)
    for line in ledger.lines():
        on_event(Note(line))
    ledgers = {"ledger": asdict(ledger)}
    if asked.eval_data is not None:
        if ledger.test:
            on_event(Note(f"data: the {ledger.test} held-out rows are not trained on; the loss is that of eval_data"))
        test, _, ledger = load_examples(asked.eval_data, contract, on_event)
        for line in ledger.lines():
            on_event(
                Note(
                    line.replace("data:", "eval_data:", 1)
                    .replace("to train on", "held out")
                    .replace(", 0 held out", "")
                )
            )
        ledgers["eval_ledger"] = asdict(ledger)
    return train, test, ledgers


_CLOSED = 0.99  # of the examples at least teach the model to end its answers


def check_closed(ledger: Ledger, contract: PromptContract, path: str) -> None:
    """Raise DataError if too few examples teach the token that ends an answer: the model would go on and on."""
    whole = ledger.used - ledger.cut
    if ledger.unclosed <= (1 - _CLOSED) * whole:
        return
    names = " or ".join(str(name) for name in contract.tokenizer.convert_ids_to_tokens(list(contract.stop_ids)))
    raise DataError(
        f"{path}: only {1 - ledger.unclosed / whole:.1%} of {whole} examples teach the token that ends an answer ({names})",
        "the model would never stop; a token that pads as well as ends must be masked by its place, not by its id",
    )
