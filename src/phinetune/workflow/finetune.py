"""Fine-tune a base model with LoRA on a data file: check everything, train, leave an adapter folder that PEFT can load.

    read configs -> check output -> find base -> contract -> examples -> load -> inject -> train -> save

Nothing long begins before everything that can be checked is checked. The same call again, after a kill, goes on from the last
checkpoint and ends with the same adapter; after success it returns what is there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phinetune.artifact import (
    StageFolder,
    building,
    check_output,
    file_hash,
    is_finished,
    partial_folder,
    read_manifest,
)
from phinetune.data.batches import Collator
from phinetune.data.examples import Examples
from phinetune.data.messages import DataConfig
from phinetune.data.order import WAYS, EpochOrder, OrderPlan
from phinetune.data.sources import data_source
from phinetune.errors import TrainingError
from phinetune.events import Note, OnEvent, log_event
from phinetune.libraries import import_libraries
from phinetune.lora.config import LoraConfig
from phinetune.model.contract import PromptContract
from phinetune.model.fast import FastPaths, compile_layers, speed_up, uses_blocks
from phinetune.model.folder import base_key, resolve_model, stored_dtype
from phinetune.model.grid import record_grid
from phinetune.model.load import LoadPlan, load_base_contract, load_model, plan_load, read_model_config
from phinetune.model.memory import keep_freed_memory
from phinetune.training.checkpointing import check_layer_count
from phinetune.training.config import fit_to_machine, training_arguments
from phinetune.workflow.training_request import (
    TrainingRequest,
    check_start,
    decide_rows,
    read_examples,
    read_request,
    request_key,
    request_settings,
)


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
    key = request_key(asked, contents)
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first one writes
        check_output(folder, "adapter", key, asked.overwrite, needed_bytes=64 << 20)
    if is_finished(folder, "adapter", key) and not asked.overwrite:
        on_event(Note(f"unchanged: {folder} holds the result of exactly this run"))
        return StageFolder(folder, read_manifest(folder), unchanged=True)

    import_libraries("datasets", "transformers.trainer")
    first_plan = plan_load(base, asked.model_kwargs, on_event=lambda event: None)
    check_start(asked.lora, first_plan, asked.training.grid)  # its problems, too, come before the data's long reading
    config = read_model_config(base, first_plan.trust_remote_code)
    check_layer_count(asked.training.checkpoint_layers, getattr(config.get_text_config(), "num_hidden_layers", None))
    contract = load_base_contract(base, bool(asked.model_kwargs.get("trust_remote_code", False)))
    contract = contract.with_chat_template(asked.data.chat_template)
    train, test, ledgers = read_examples(asked, contract, on_event)
    load_plan = plan_load(base, asked.model_kwargs, train.longest, on_event)
    asked = decide_rows(asked, config, load_plan, train, on_event)
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
    record = {"stage": "finetune", "base_model": name, **contents, **ledgers, **request_settings(asked)}
    record["config_overrides"] = {k: v for k, v in load_plan.config_overrides.items() if k != "use_cache"}
    with _one_writer(arguments, folder, key, record) as partial:
        from phinetune.training.checkpointing import checkpoint_layers
        from phinetune.training.fit import fit
        from phinetune.training.layout import choose_layout

        fast = asked.training.fast_paths
        session = _Session(base, name, contents["base_key"], load_plan, asked, arguments.seed, on_event)
        checkpoint_layers(
            session.model, asked.training.checkpoint_layers or 0, asked.training.checkpoint_options, on_event
        )
        layout = choose_layout(session.model, asked.training.layout, train.longest, on_event)
        dense = not uses_blocks(session.model)
        collator, resume = (
            Collator(contract.pad_token_id, width, layout, dense, fast.rounded),
            asked.training.resume_from_checkpoint,
        )
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
        facts = {**session.facts(contract), "seed": arguments.seed, "computed": _computed(layout, fast)}
        record |= {"figures": figures, **facts}
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


def _computed(layout: str, fast: FastPaths) -> dict[str, Any]:
    """What the run computed with, for the manifest."""
    from phinetune.lora import tiles
    from phinetune.model import attention_tiles, kernels

    by_tiles = tiles.library() is not None and attention_tiles.library() is not None
    built = {"kernels": kernels.library() is not None, "tiles": by_tiles}
    return {"layout": layout, "fast_paths": {k: on and built.get(k, True) for k, on in asdict(fast).items()}}


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


class _Session:
    """The base model with fresh, seeded LoRA layers in train mode, and how its trained state is written and read back."""

    def __init__(
        self,
        base: Path,
        name: str,
        key: str,
        plan: LoadPlan,
        asked: TrainingRequest,
        seed: int,
        on_event: OnEvent,
    ) -> None:
        from transformers import set_seed

        from phinetune.lora.arithmetic import choose_arithmetic
        from phinetune.lora.injection import inject
        from phinetune.lora.layer import lora_size
        from phinetune.lora.rounding import round_model
        from phinetune.workflow.original import OriginalWeights

        lora, fast, self.grid = asked.lora, asked.training.fast_paths, asked.training.grid

        self.model, self.name, self.base_key = speed_up(load_model(base, plan), fast, on_event), name, key
        self.quantization = plan.quantization
        set_seed(seed)
        original = OriginalWeights(base) if lora.init_lora_weights == "loftq" else None
        self.adapter = inject(self.model, lora, original, on_event)
        choose_arithmetic(self.model, fast)
        if self.grid is not None:
            round_model(self.model, self.grid, stored_dtype(base))
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
        grid = {"grid": record_grid(self.grid)} if self.grid is not None else {}
        return {**facts, "probe_logits": logits, **quantization, **grid}
