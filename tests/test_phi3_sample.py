"""The dictionaries of Microsoft's Phi-3 sample run unchanged without a GPU; what the machine lacks is replaced and said once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import phinetune
from phinetune.errors import ConfigError
from phinetune.events import Note
from phinetune.model import compute
from phinetune.model.load import measuring_dtype, plan_load
from phinetune.training.config import fit_to_machine, read_training_config
from tiny import write_rows

# The keys of sample_finetune.py in microsoft/Phi-3-mini-4k-instruct; the output folder is the test's.
TRAINING: dict[str, Any] = {
    "bf16": True, "do_eval": False, "learning_rate": 5.0e-06, "log_level": "warning", "logging_steps": 20, "logging_strategy": "steps",
    "lr_scheduler_type": "cosine", "num_train_epochs": 1, "max_steps": -1, "output_dir": "./checkpoint_dir", "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4, "per_device_train_batch_size": 4, "remove_unused_columns": True, "save_steps": 100, "save_total_limit": 1,
    "seed": 0, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
}  # fmt: skip
PEFT: dict[str, Any] = {
    "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM", "target_modules": "all-linear", "modules_to_save": None,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "use_cache": False, "trust_remote_code": True, "attn_implementation": "flash_attention_2", "torch_dtype": torch.bfloat16, "device_map": None,
}  # fmt: skip


def chats(count: int) -> list[dict[str, Any]]:
    turns = [
        ("user", "Hello {}"),
        ("assistant", "Hi there {}"),
        ("user", "How are you?"),
        ("assistant", "Fine, thank you {}."),
    ]
    return [
        {"prompt_id": str(i), "messages": [{"role": r, "content": c.format(i)} for r, c in turns]} for i in range(count)
    ]


def test_runs_unchanged(phi3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_rows(tmp_path / "chat.jsonl", chats(20))
    notes: list[str] = []
    result = phinetune.finetune(
        str(phi3_folder),
        str(data),
        TRAINING,
        PEFT,
        MODEL,
        on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None,
    )
    assert result.folder == Path("checkpoint_dir") and result.manifest["figures"]["steps"] == 4
    assert sum("flash_attention_2 is not to be had" in n for n in notes) == (0 if torch.cuda.is_available() else 1)
    assert sum(n.startswith("training_config.warmup_ratio: is called warmup_steps now") for n in notes) == 1
    assert result.manifest["training_config"]["checkpoint_layers"] == "all" and not any(
        "checkpointing" in n for n in notes
    )
    assert result.manifest["peft_config"]["lora_alpha"] == 32
    assert phinetune.finetune(
        str(phi3_folder), str(data), TRAINING, PEFT, MODEL
    ).folder.is_dir()  # overwrite_output_dir


CPU = torch.device("cpu")


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.mark.parametrize(
    ("speedup", "asked", "dtype"),
    [
        (4.0, None, torch.bfloat16), (0.3, None, torch.float32), (0.3, torch.bfloat16, torch.float32), (4.0, "bfloat16", torch.bfloat16),
        (4.0, "float16", torch.bfloat16), (0.3, torch.float16, torch.float32), (4.0, "float32", torch.float32), (4.0, "auto", torch.float32),
    ],
)  # fmt: skip
def test_dtype_by_measured_speed(
    speedup: float,
    asked: Any,
    dtype: torch.dtype,
    llama_folder: Path,
    notes: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("phinetune.model.compute", "phinetune.model.load"):
        monkeypatch.setattr(f"{module}.bfloat16_speedup", lambda device: speedup)
    plan = plan_load(
        llama_folder,
        {"torch_dtype": asked, "device_map": "cpu"},
        on_event=lambda e: notes.append(getattr(e, "text", "")),
    )
    assert plan.dtype == dtype
    replaced = asked not in (None, "auto") and str(dtype)[6:] not in str(asked)
    assert any("torch_dtype" in n and "using" in n for n in notes) == replaced


@pytest.mark.parametrize(
    ("stored", "fastest", "free", "dtype"),
    [
        (torch.bfloat16, torch.bfloat16, 10**12, torch.bfloat16),
        (torch.bfloat16, torch.float32, 10**12, torch.float32),
        (torch.bfloat16, torch.float32, None, torch.float32),
        (torch.bfloat16, torch.float32, 4000, torch.bfloat16),
        (torch.float16, torch.bfloat16, 10**12, torch.float32),
        (torch.float32, torch.bfloat16, 4000, torch.float32),
    ],
)
def test_what_is_measured_loses_no_digit_and_no_time(
    stored: torch.dtype, fastest: torch.dtype, free: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phinetune.model.load.default_dtype", lambda device: fastest)
    monkeypatch.setattr("phinetune.model.load.available_memory", lambda: free)
    assert measuring_dtype(stored, 1000) == dtype


def test_one_name_of_two_generations_is_two_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def key(flags: str) -> str:
        (tmp_path / "cpuinfo").write_text(f"model\t\t: 1\nmodel name\t: AMD EPYC\nflags\t\t: {flags}\n")
        return compute.machine_key()

    monkeypatch.setattr(compute, "_CPUINFO", tmp_path / "cpuinfo")
    assert key("avx2 fma") == key("avx2 fma") != key("avx2 fma avx512_bf16")
    assert compute.processor_name() == "AMD EPYC"


@pytest.mark.parametrize(
    ("speedup", "said"),
    [(4.46, "bfloat16 products run 4.5 x"), (0.02, "float32 products run 50.0 x"), (0.0, "no bfloat16")],
)
def test_what_was_measured_is_said_of_the_faster_one(
    speedup: float, said: str, llama_folder: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("phinetune.model.compute", "phinetune.model.load"):
        monkeypatch.setattr(f"{module}.bfloat16_speedup", lambda device: speedup)
    plan_load(llama_folder, {"device_map": "cpu"}, on_event=lambda e: notes.append(getattr(e, "text", "")))
    assert any(said in n for n in notes)


def test_the_speedup_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path))
    first = compute.bfloat16_speedup(CPU)
    assert first > 0
    monkeypatch.setattr(compute, "_measure", lambda device: pytest.fail("measured twice"))
    assert compute.bfloat16_speedup(CPU) == first


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_bnb_8bit"])
def test_optimizers_that_are_not_here_are_replaced(
    optim: str, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    values = fit_to_machine({"optim": optim}, CPU, lambda e: notes.append(getattr(e, "text", "")))
    assert values["optim"] == "adamw_torch_fused" and len(notes) == 1 and optim in notes[0]


def test_reentrant_checkpointing_tf32_and_half_precision_evaluation_are_replaced(notes: list[str]) -> None:
    plan = read_training_config(
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
            "tf32": True,
            "bf16_full_eval": True,
        },
        lambda e: notes.append(getattr(e, "text", "")),
    )
    values = fit_to_machine(plan.values, CPU, lambda e: notes.append(getattr(e, "text", "")))
    assert plan.checkpoint_layers == "all" and plan.checkpoint_options == {} and "use_reentrant" in notes[0]
    assert "tf32" not in values and "bf16_full_eval" not in values
    assert len(notes) == 3


def test_fp16_becomes_what_the_machine_has_and_says_so(notes: list[str]) -> None:
    plan = read_training_config({"fp16": True}, lambda e: notes.append(getattr(e, "text", "")))
    assert "fp16" not in plan.values and plan.wanted_dtype is None and len(notes) == 1
    assert read_training_config({"bf16": True}).wanted_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"torch_dtyp": "bfloat16"}, r'model_kwargs\.torch_dtyp: unknown key, did you mean "torch_dtype"\?'),
        ({"torch_dtype": "int8"}, "not a floating point type"),
        ({"attn_implementation": "flash"}, r"model_kwargs\.attn_implementation: unknown 'flash'"),
        ({"load_in_8bit": True}, "not supported yet"),
        ({"device_map": "gpu"}, "not a device"),
        ({"trust_remote_code": "yes"}, "must be true or false"),
    ],
)
def test_impossible_model_kwargs(kwargs: dict[str, Any], message: str, llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_load(llama_folder, kwargs)


def test_a_device_that_is_not_here_is_replaced(llama_folder: Path, notes: list[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    plan = plan_load(
        llama_folder,
        {"device_map": "cuda:0", "torch_dtype": "float32"},
        on_event=lambda e: notes.append(getattr(e, "text", "")),
    )
    assert plan.device.type != "cuda" and any("cuda:0 is not on this machine" in n for n in notes)
