"""Fine-tune a base model with LoRA on a data file: check everything, train, leave an adapter folder that PEFT can load.

    read configs -> check output -> find base -> contract -> examples -> load -> inject -> train -> save

Nothing long begins before everything that can be checked is checked. The same call again, after a kill, goes on from the last
checkpoint and ends with the same adapter; after success it returns what is there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phinetune.artifact import (
    StageFolder,
    building,
    check_output,
    content_key,
    file_hash,
    is_finished,
    partial_folder,
    read_manifest,
)
from phinetune.data.batches import Collator
from phinetune.data.examples import Examples, load_examples
from phinetune.data.inheritance import inherit
from phinetune.data.messages import DataConfig, parse_data_config
from phinetune.data.order import WAYS, EpochOrder, OrderPlan
from phinetune.data.sources import data_source
from phinetune.errors import ConfigError, TrainingError
from phinetune.events import Note, OnEvent, log_event
from phinetune.libraries import import_libraries
from phinetune.lora.config import LoraConfig, parse_lora_config
from phinetune.model.contract import PromptContract
from phinetune.model.fast import FastPaths, compile_layers, speed_up, uses_blocks
from phinetune.model.folder import base_key, resolve_model
from phinetune.model.load import LoadPlan, load_base_contract, load_model, plan_load, read_model_config
from phinetune.model.memory import keep_freed_memory
from phinetune.training.checkpointing import check_layer_count
from phinetune.training.config import TrainingPlan, fit_to_machine, read_training_config, training_arguments

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


def finetune(
    model: str,
    data: str | dict[str, Any] | DataConfig,
    training_config: dict[str, Any] | None = None,
    peft_config: dict[str, Any] | LoraConfig | None = None,
    model_kwargs: dict[str, Any] | None = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    eval_data: str | dict[str, Any] | DataConfig | None = None,
    on_event: OnEvent = log_event,
) -> StageFolder:
    """Train a LoRA adapter for `model` on `data`, in `output_dir`.

    model: a folder, a hub id, or an embedded model's name. data: a file, a bundled set's name, or the fields of `DataConfig`.
    training_config, peft_config, model_kwargs: the names of `transformers.TrainingArguments`, PEFT's `LoraConfig` and
    `from_pretrained`. output_dir defaults to training_config["output_dir"]. eval_data: a file whose rows are held out, all of them,
    instead of a part of `data`; what it does not say is as in `data`.

    Raises a PhinetuneError for whatever the user can mend, before training begins where it can be known before.
    """
    asked = read_request(data, eval_data, training_config, peft_config, model_kwargs, output_dir, overwrite, on_event)
    folder, data_path = asked.folder, data_source(asked.data, on_event)
    base = resolve_model(model, asked.model_kwargs, on_event)
    name = str(base.resolve()) if Path(model).expanduser().is_dir() else model
    contents = {"base_key": base_key(base), "data_sha256": file_hash(data_path)}
    if asked.eval_data is not None:
        contents["eval_data_sha256"] = file_hash(data_source(asked.eval_data, on_event))
    key = _key(asked, contents)
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first one writes
        check_output(folder, "adapter", key, asked.overwrite, needed_bytes=64 << 20)
    if is_finished(folder, "adapter", key) and not asked.overwrite:
        on_event(Note(f"unchanged: {folder} holds the result of exactly this run"))
        return StageFolder(folder, read_manifest(folder), unchanged=True)

    import_libraries("datasets", "transformers.trainer")
    first_plan = plan_load(base, asked.model_kwargs, on_event=lambda event: None)
    check_start(asked.lora, first_plan)  # its problems, too, come before the data's long reading
    config = read_model_config(base, first_plan.trust_remote_code)
    check_layer_count(asked.training.checkpoint_layers, getattr(config.get_text_config(), "num_hidden_layers", None))
    contract = load_base_contract(base, bool(asked.model_kwargs.get("trust_remote_code", False)))
    contract = contract.with_chat_template(asked.data.chat_template)
    train, test, ledgers = read_examples(asked, contract, on_event)
    load_plan = plan_load(base, asked.model_kwargs, train.longest, on_event)
    width = config.get_text_config().hidden_size
    values = fit_to_machine(asked.training.values, load_plan.device, on_event)
    arguments = training_arguments(
        values,
        len(train),
        len(test) if values.get("do_eval") is not False else 0,
        width,
        load_plan.device,
        partial_folder(folder),
        on_event,
    )
    _forecast(base, config, asked, load_plan, arguments, train, contract, on_event)
    record = {"stage": "finetune", "base_model": name, **contents, **ledgers, **_settings(asked)}
    record["config_overrides"] = {k: v for k, v in load_plan.config_overrides.items() if k != "use_cache"}
    with _one_writer(arguments, folder, key, record) as partial:
        from phinetune.training.checkpointing import checkpoint_layers
        from phinetune.training.fit import fit
        from phinetune.training.layout import choose_layout

        fast = asked.training.fast_paths
        session = _Session(base, name, contents["base_key"], load_plan, asked.lora, fast, arguments.seed, on_event)
        checkpoint_layers(
            session.model, asked.training.checkpoint_layers or 0, asked.training.checkpoint_options, on_event
        )
        layout = choose_layout(session.model, asked.training.layout, train.longest, on_event)
        dense = not uses_blocks(session.model)
        collator, resume = Collator(contract.pad_token_id, width, layout, dense), asked.training.resume_from_checkpoint
        wanted = test if asked.training.values.get("do_eval") is not False else test.subset([])
        if load_plan.device.type == "cpu" and asked.training.keep_freed_memory:
            keep_freed_memory()
        groups = session.parameter_groups if asked.lora.loraplus_lr_ratio else None
        order = _order(asked.training.order, train, collator, arguments, on_event)
        figures = fit(
            session.model,
            train,
            wanted,
            collator,
            arguments,
            session.save,
            session.load,
            resume,
            groups,
            fast,
            order,
            on_event,
        )
        if arguments.process_index == 0:
            session.save(partial)
            contract.save(partial)
        record |= {"figures": figures, **session.facts(contract), "seed": arguments.seed}
    on_event(Note(f"adapter: written to {folder}"))
    return StageFolder(folder, read_manifest(folder))


def _forecast(
    base: Path,
    config: Any,
    asked: TrainingRequest,
    load_plan: LoadPlan,
    arguments: Any,
    train: Examples,
    contract: PromptContract,
    on_event: OnEvent,
) -> None:
    """Say what the run will take, and refuse one that cannot fit; only for CPUs, whose memory and operators are known here."""
    if load_plan.device.type != "cpu" or arguments.process_index != 0:
        return
    from phinetune.workflow.forecast_training import TrainingForecast, check_memory

    forecast = TrainingForecast(base, config, asked, load_plan, arguments, train, contract.pad_token_id, on_event)
    check_memory(forecast, asked.training.skip_memory_check, on_event)


def read_examples(
    asked: TrainingRequest, contract: PromptContract, on_event: OnEvent
) -> tuple[Examples, Examples, dict[str, Any]]:
    """(train, held out, ledgers for the manifest); what became of the rows is said."""
    train, test, ledger = load_examples(asked.data, contract, on_event)
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


def _order(
    how: str, train: Examples, collator: Collator, arguments: Any, on_event: OnEvent
) -> Callable[[int], EpochOrder] | None:
    """Makes the order of examples for a batch size; None if it is one of the Trainer's own."""
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    plan = OrderPlan(train.table, how, seed, collator)
    return (lambda batch_size: plan.order(batch_size, on_event)) if how in WAYS else None


@contextlib.contextmanager
def _one_writer(arguments: Any, folder: Path, key: str, record: dict[str, Any]) -> Iterator[Path]:
    """`building` in the first process of the run; the others get the same folder, enter after it and leave when it is done."""
    from accelerate import PartialState

    arguments.device  # noqa: B018  sets up the process group
    if arguments.process_index == 0:
        with building(folder, "adapter", key, record, resume=True) as partial:
            PartialState().wait_for_everyone()
            yield partial
            PartialState().wait_for_everyone()
    else:
        PartialState().wait_for_everyone()
        yield partial_folder(folder)
        PartialState().wait_for_everyone()
    PartialState().wait_for_everyone()


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


def _key(asked: TrainingRequest, contents: dict[str, str]) -> str:
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
    )


def _settings(asked: TrainingRequest) -> dict[str, Any]:
    """The settings for the manifest; secrets stay out."""
    kwargs = {k: str(v) for k, v in asked.model_kwargs.items() if k not in _SECRET}
    layers = asked.training.checkpoint_layers
    training = {k: v for k, v in asked.training.values.items() if k not in _SECRET}
    training["train_sampling_strategy"] = asked.training.order
    return {
        "data": asdict(asked.data),
        **({"eval_data": asdict(asked.eval_data)} if asked.eval_data is not None else {}),
        "training_config": training | ({} if layers is None else {"checkpoint_layers": layers}),
        "peft_config": asdict(asked.lora),
        "model_kwargs": kwargs,
    }


def check_start(lora: LoraConfig, plan: LoadPlan) -> None:
    """Raises ConfigError for factors that start at what 4 bits took, where there are no 4 bits."""
    if lora.init_lora_weights == "loftq" and plan.quantization is None:
        raise ConfigError(
            'peft_config.init_lora_weights: "loftq" is for a base model in 4 bits', "set model_kwargs.load_in_4bit=true"
        )


class _Session:
    """The base model with fresh, seeded LoRA layers in train mode, and how its trained state is written and read back."""

    def __init__(
        self,
        base: Path,
        name: str,
        key: str,
        plan: LoadPlan,
        lora: LoraConfig,
        fast: FastPaths,
        seed: int,
        on_event: OnEvent,
    ) -> None:
        from transformers import set_seed

        from phinetune.lora.group import choose_arithmetic
        from phinetune.lora.injection import inject
        from phinetune.lora.layer import lora_size
        from phinetune.workflow.original import OriginalWeights

        self.model, self.name, self.base_key = speed_up(load_model(base, plan), fast, on_event), name, key
        self.quantization = plan.quantization
        set_seed(seed)
        original = OriginalWeights(base) if lora.init_lora_weights == "loftq" else None
        self.adapter = inject(self.model, lora, original, on_event)
        choose_arithmetic(self.model, fast)
        if fast.compiled:
            compile_layers(self.model, on_event)
        self.model.train()
        self.size = lora_size(self.model)
        share = self.size.trainable / self.size.total
        on_event(
            Note(
                f"adapter: {self.size.layers} layers, {self.size.trainable:,} of {self.size.total:,} parameters are trained ({share:.1%})"
            )
        )

    def parameter_groups(self, model: Any, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer's groups with LoRA+."""
        from phinetune.lora.loraplus import loraplus_groups

        return loraplus_groups(model, learning_rate, self.adapter.config.loraplus_lr_ratio or 1.0, weight_decay)

    def save(self, folder: Path) -> None:
        """Write the adapter into `folder`. Raises TrainingError, and writes nothing, if a factor is not finite."""
        import torch

        from phinetune.lora.adapter import save_adapter
        from phinetune.lora.peft_format import adapter_state

        broken = [name for name, factor in adapter_state(self.adapter).items() if not torch.isfinite(factor).all()]
        if broken:
            raise TrainingError(
                f"{broken[0]}: not finite, as {len(broken) - 1} more: training diverged",
                "lower training_config.learning_rate",
            )
        save_adapter(self.adapter, folder, self.name, self.base_key)

    def load(self, folder: Path) -> None:
        """Read a checkpoint's adapter back."""
        from phinetune.lora.adapter import load_adapter_state, read_adapter

        load_adapter_state(self.adapter, read_adapter(folder).state, folder)

    def facts(self, contract: PromptContract) -> dict[str, Any]:
        """Size, dtype, what the model now says after the contract's probes, and the base's quantization: for the manifest."""
        from phinetune.model.probe import probe_logits, record_logits
        from phinetune.model.quantized import record

        facts = {"size": asdict(self.size), "dtype": str(self.model.dtype)[6:]}
        logits = record_logits(probe_logits(self.model, contract))
        quantization = {"quantization": record(self.quantization, self.model)} if self.quantization else {}
        return {**facts, "probe_logits": logits, **quantization}
