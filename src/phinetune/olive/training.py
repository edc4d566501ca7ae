"""`training_args` as `training_config`: the names of transformers.TrainingArguments, and what Olive took where they are not given.

Names of earlier years go through under their own name; the training layer knows them. Only a name that no transformers had is refused.
"""

from __future__ import annotations

from typing import Any

from phinetune.olive.context import Context
from phinetune.olive.eras import SUMMER
from phinetune.olive.reader import Reader

_NAMES = """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adafactor adam_beta1 adam_beta2 adam_epsilon
    auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16 bf16_full_eval data_seed dataloader_drop_last
    dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph
    ddp_timeout debug deepspeed disable_tqdm dispatch_batches do_eval do_predict do_train enable_jit_checkpoint eval_accumulation_steps
    eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy eval_use_gather_object evaluation_strategy fp16
    fp16_backend fp16_full_eval fp16_opt_level fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap
    full_determinism gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs greater_is_better group_by_length
    half_precision_backend hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip
    include_for_metrics include_inputs_for_metrics include_num_input_tokens_seen include_tokens_per_second jit_mode_eval
    label_names label_smoothing_factor learning_rate length_column_name liger_kernel_config load_best_model_at_end local_rank log_level
    log_level_replica log_on_each_node logging_dir logging_first_step logging_nan_inf_filter logging_steps logging_strategy
    lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps metric_for_best_model mp_parameters neftune_noise_alpha no_cuda
    num_train_epochs optim optim_args optim_target_modules parallelism_config past_index per_device_eval_batch_size
    per_device_train_batch_size per_gpu_eval_batch_size per_gpu_train_batch_size prediction_loss_only project push_to_hub
    push_to_hub_model_id push_to_hub_organization push_to_hub_token ray_scope remove_unused_columns report_to
    restore_callback_states_from_checkpoint run_name save_on_each_node save_only_model save_safetensors save_steps save_strategy
    save_total_limit seed sharded_ddp skip_memory_metrics split_batches tf32 torch_compile torch_compile_backend torch_compile_mode
    torch_empty_cache_steps torchdynamo tp_size tpu_metrics_debug tpu_num_cores trackio_bucket_id trackio_space_id
    trackio_static_space_id train_sampling_strategy use_cache use_cpu use_ipex use_legacy_prediction_loop use_liger_kernel use_mps_device
    warmup_ratio warmup_steps weight_decay xpu_backend
"""
NAMES = frozenset(_NAMES.split())
"""Every name that transformers.TrainingArguments has or had."""
_DROPPED = {
    "output_dir": "checkpoints are kept with the pass, in the cache",
    "overwrite_output_dir": "a pass is made anew when something about it changes",
    "resume_from_checkpoint": "a pass goes on from its last checkpoint by itself",
    "use_module_with_loss": "there is one trainer",
    "fp16": "as in Olive: torch_dtype says it",
}
_BEFORE = {
    "learning_rate": 2e-4, "lr_scheduler_type": "constant", "warmup_ratio": 0.03, "optim": "paged_adamw_32bit", "gradient_checkpointing": True,
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 16, "max_steps": 10000, "weight_decay": 0.0,
    "logging_steps": 10, "group_by_length": True, "seed": 42, "data_seed": 42,
}  # fmt: skip
_AFTER = {
    "learning_rate": 2e-4, "lr_scheduler_type": "constant", "warmup_ratio": 0.03, "optim": "paged_adamw_32bit", "gradient_checkpointing": True,
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "num_train_epochs": 3, "seed": 42,
}  # fmt: skip
_SAME = {"warmup_ratio": "warmup_steps", "optim": "adafactor", "group_by_length": "train_sampling_strategy", "gradient_checkpointing": "activation_checkpointing",
         "per_device_train_batch_size": "per_gpu_train_batch_size", "per_device_eval_batch_size": "per_gpu_eval_batch_size"}  # fmt: skip
_STRATEGY = ("eval_strategy", "evaluation_strategy")


def training_config(kind: str, keys: Reader, at: tuple[str, ...], context: Context, held_out: bool) -> dict[str, Any]:
    """The native training_config of a pass of `kind`; `held_out`: there is something to evaluate on."""
    report = context.report
    place = keys.path("training_args")
    target = (*at, "training_config")
    values: dict[str, Any] = {}
    if (outer := keys.group("training_args")) is not None:
        report.renamed(place, target)
        given = outer.flat("extra_args")
        given.drop_all(_DROPPED)
        if given.has("deepspeed") and given.take("deepspeed") is True:
            report.note("dropped", given.path("deepspeed"), "true meant a file of Olive's own; give the path of one")
        elif given.has("deepspeed"):
            values["deepspeed"] = given.take("deepspeed")
        held = dict.fromkeys(key for group in given.groups for key in group.values)
        values |= {name: given.take(name) for name in held if name in NAMES and name != "deepspeed" and given.has(name)}
        for group in given.groups:
            group.asked |= NAMES
    if not held_out:
        for name in (*_STRATEGY, "eval_steps"):
            if name in values and (name == "eval_steps" or values[name] != "no"):
                del values[name]
                report.note("dropped", f"{place}.{name}", "nothing is held out to evaluate on")
    elif context.era.since(SUMMER):
        _force_evaluation(values, place, target, context)
    usual = dict(_AFTER if context.era.since(SUMMER) else _BEFORE)
    if context.era.since("0.9.0") and kind not in ("QLoRA", "LoftQ"):
        del usual["optim"]
    steps = values.get("max_steps")
    if isinstance(steps, int | float) and steps > 0:
        usual.pop("num_train_epochs", None)
    missing = {k: v for k, v in usual.items() if k not in values and _SAME.get(k) not in values}
    if missing:
        text = ", ".join(f"{k} {str(v).lower() if isinstance(v, bool) else v}" for k, v in missing.items())
        report.note("default", place, f"not given: {text}, as in Olive {context.era.release}", target)
    return values | missing


def _force_evaluation(values: dict[str, Any], place: str, target: tuple[str, ...], context: Context) -> None:
    """Since the summer of 2024 an evaluation set is always used, at steps if not at epochs."""
    name = next((name for name in _STRATEGY if name in values), None)
    if name is None:
        context.report.note(
            "default",
            f"{place}.eval_strategy",
            "not given: steps, as in Olive where there is something to evaluate on",
            (*target, "eval_strategy"),
        )
        values["eval_strategy"] = "steps"
    elif values[name] not in ("epoch", "steps"):
        context.report.note(
            "changed", f"{place}.{name}", "steps, as in Olive where there is something to evaluate on", (*target, name)
        )
        values[name] = "steps"
