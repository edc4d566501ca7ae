"""Fine-tune a base model with LoRA on a data file: check everything, train, leave an adapter folder that PEFT can load.

    read configs -> check output -> find base -> contract -> examples -> load -> inject -> train -> save

Nothing long begins before everything that can be checked is checked. The same call again, after a kill, goes on from the last
checkpoint and ends with the same adapter; after success it returns what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phinetune.artifact import building, check_output, content_key, file_hash, is_finished, read_manifest
from phinetune.data.batches import Collator
from phinetune.data.examples import Examples, load_examples
from phinetune.data.messages import DataConfig, parse_data_config
from phinetune.data.records import data_file
from phinetune.errors import ConfigError, TrainingError
from phinetune.events import Note, OnEvent, log_event
from phinetune.lora.adapter import WEIGHTS_FILE, load_adapter_state, read_adapter, save_adapter
from phinetune.lora.config import LoraConfig, parse_lora_config
from phinetune.lora.inject import inject
from phinetune.lora.layers import lora_layers, lora_size
from phinetune.model.folder import base_key, resolve_model
from phinetune.model.load import load_base_contract, load_model, plan_load
from phinetune.training.config import TrainingPlan, fit_to_machine, read_training_config, training_arguments
from phinetune.training.fit import fit


@dataclass(frozen=True)
class FinetuneResult:
    """Where the adapter is, and the figures of the run."""

    folder: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    unchanged: bool = False


def finetune(
    model: str,
    data: str | dict[str, Any] | DataConfig,
    training_config: dict[str, Any] | None = None,
    peft_config: dict[str, Any] | LoraConfig | None = None,
    model_kwargs: dict[str, Any] | None = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    on_event: OnEvent = log_event,
) -> FinetuneResult:
    """Train a LoRA adapter for `model` on `data`, in `output_dir`.

    model: a folder, a hub id, or an embedded model's name. data: a file, a bundled set's name, or the fields of `DataConfig`.
    training_config, peft_config, model_kwargs: the names of `transformers.TrainingArguments`, PEFT's `LoraConfig` and
    `from_pretrained`. output_dir defaults to training_config["output_dir"].

    Raises a PhinetuneError for whatever the user can mend, before training begins where it can be known before.
    """
    problems: list[str] = []

    def collect(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    data_config: DataConfig = collect(lambda: parse_data_config(data))
    lora: LoraConfig = collect(lambda: parse_lora_config(peft_config))
    plan: TrainingPlan = collect(lambda: read_training_config(training_config, on_event))
    chosen = output_dir or (plan.output_dir if plan else None)
    if not chosen:
        problems.append("output_dir: this key is needed")
    if problems:
        raise ConfigError(problems)
    folder, overwrite = Path(str(chosen)).expanduser(), overwrite or plan.overwrite

    data_path = data_file(data_config.path)
    base = resolve_model(model, on_event)
    base_content, data_content = base_key(base), file_hash(data_path)
    key = content_key(
        base_content,
        data_content,
        asdict(data_config) | {"path": ""},
        asdict(lora),
        plan.values,
        plan.layout,
        plan.wanted_dtype,
        model_kwargs or {},
    )
    check_output(folder, "adapter", key, overwrite, needed_bytes=64 << 20)
    if is_finished(folder, "adapter", key) and not overwrite:
        on_event(Note(f"unchanged: {folder} holds the result of exactly this run"))
        return FinetuneResult(folder, read_manifest(folder), unchanged=True)

    contract = load_base_contract(base, bool((model_kwargs or {}).get("trust_remote_code", False)))
    train, test, ledger = load_examples(data_config, contract, on_event)
    for line in ledger.lines():
        on_event(Note(line))
    record = {
        "stage": "finetune",
        "base_model": model,
        "base_key": base_content,
        "data": asdict(data_config),
        "data_sha256": data_content,
        "ledger": asdict(ledger),
        "training_config": plan.values,
        "peft_config": asdict(lora),
        "model_kwargs": {k: str(v) for k, v in (model_kwargs or {}).items()},
    }
    with building(folder, "adapter", key, record, resume=True) as partial:
        lora_model, save_state, load_state = _load_with_lora(
            base, model, lora, plan, model_kwargs or {}, train, on_event
        )
        config = lora_model.config.get_text_config()
        arguments = training_arguments(
            fit_to_machine(plan.values, lora_model.device, on_event),
            len(train),
            config.hidden_size,
            lora_model.device,
            partial,
            on_event,
        )
        size = lora_size(lora_model)
        on_event(
            Note(
                f"adapter: {size.layers} layers, {size.trainable:,} of {size.total:,} parameters are trained ({size.trainable / size.total:.1%})"
            )
        )
        collator = Collator(contract.pad_token_id, config.hidden_size, plan.layout)  # type: ignore[arg-type]
        figures = fit(
            lora_model,
            train,
            test,
            collator,
            arguments,
            save_state,
            load_state,
            WEIGHTS_FILE,
            plan.resume_from_checkpoint,
            on_event,
        )
        _check_finite(lora_model)
        save_state(partial)
        contract.save(partial)
        record |= {"figures": figures, "size": asdict(size), "dtype": str(lora_model.dtype)[6:], "seed": arguments.seed}
    on_event(Note(f"adapter: written to {folder}"))
    return FinetuneResult(folder, read_manifest(folder))


def _load_with_lora(
    base: Path,
    name: str,
    lora: LoraConfig,
    plan: TrainingPlan,
    model_kwargs: dict[str, Any],
    train: Examples,
    on_event: OnEvent,
) -> tuple[Any, Callable[[Path], None], Callable[[Path], None]]:
    """The base model with fresh, seeded LoRA layers in train mode, and the functions that write and read what is trained."""
    from transformers import set_seed

    kwargs = dict(model_kwargs)
    if plan.wanted_dtype and not {"dtype", "torch_dtype"} & set(kwargs):
        kwargs["dtype"] = plan.wanted_dtype
    model = load_model(base, plan_load(base, kwargs, max(train.lengths), on_event))
    set_seed(int(plan.values.get("seed", 0)))
    inject(model, lora)

    def save_state(folder: Path) -> None:
        save_adapter(model, lora, folder, name)

    def load_state(folder: Path) -> None:
        load_adapter_state(model, read_adapter(folder)[1], folder)

    return model.train(), save_state, load_state


def _check_finite(model: Any) -> None:
    import torch

    broken = [
        name
        for name, layer in lora_layers(model).items()
        if not (torch.isfinite(layer.lora_A).all() and torch.isfinite(layer.lora_B).all())
    ]
    if broken:
        raise TrainingError(
            f"{broken[0]}: the trained factors are not finite ({len(broken)} layers)",
            "lower training_config.learning_rate",
        )
