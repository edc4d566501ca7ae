"""A training run's laws: the same bytes again, the same bytes after a kill, nothing silent, nothing half written."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phinetune.artifact import partial_folder
from phinetune.errors import ConfigError, DataError, ModelError, OutputError, TrainingError
from phinetune.events import Event, Note, Progress
from phinetune.lora.adapter import WEIGHTS_FILE
from phinetune.workflow.finetune import finetune
from tiny import PROMPT, tone_rows, write_rows

FAST: dict[str, Any] = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2}
FP32 = {"torch_dtype": "float32"}


def adapter_bytes(folder: Path) -> bytes:
    return (folder / WEIGHTS_FILE).read_bytes()


def test_the_same_run_twice_gives_identical_bytes(
    model_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    results = [
        finetune(str(model_folder), tone_data, FAST, {"lora_dropout": 0.1}, output_dir=tmp_path / n) for n in "ab"
    ]
    assert adapter_bytes(results[0].folder) == adapter_bytes(results[1].folder)
    other = finetune(
        str(model_folder), tone_data, {**FAST, "seed": 1}, {"lora_dropout": 0.1}, output_dir=tmp_path / "c"
    )
    assert adapter_bytes(other.folder) != adapter_bytes(results[0].folder)


def test_training_learns_and_says_what_it_did(llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path) -> None:
    events: list[Event] = []
    config = {**FAST, "num_train_epochs": 12, "logging_steps": 1}
    result = finetune(str(llama_folder), tone_data, config, {"r": 8}, FP32, tmp_path / "out", on_event=events.append)
    losses = result.manifest["figures"]["train_loss"]
    assert losses[-1] < 0.5 * losses[0]
    steps = [e for e in events if isinstance(e, Progress) and e.stage == "training"]
    assert steps[-1].done == steps[-1].total == 60
    assert any(isinstance(e, Note) and "19 to train on, 5 held out" in e.text for e in events)
    manifest = result.manifest
    assert manifest["kind"] == "adapter" and manifest["seed"] == 0 and manifest["size"]["layers"] == 14
    assert manifest["data"]["prompt"] == PROMPT["prompt"] and len(manifest["base_key"]) == 64
    assert {"torch", "transformers", "phinetune"} <= set(manifest["versions"])


def test_the_output_folder_holds_just_what_it_should(
    llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    finetune(str(llama_folder), tone_data, FAST, output_dir=tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "checkpoint-10",
        "manifest.json",
        "prompt_contract.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    checkpoint = {p.name for p in (tmp_path / "out" / "checkpoint-10").iterdir()}
    assert "trainer_state.json" in checkpoint and "optimizer.pt" in checkpoint and "training_args.bin" not in checkpoint
    assert not partial_folder(tmp_path / "out").exists()


def test_the_same_call_again_does_nothing(llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path) -> None:
    first = finetune(str(llama_folder), tone_data, FAST, output_dir=tmp_path / "out")
    stamp = (tmp_path / "out" / WEIGHTS_FILE).stat().st_mtime_ns
    again = finetune(str(llama_folder), tone_data, FAST, output_dir=tmp_path / "out")
    assert not first.unchanged and again.unchanged
    assert (tmp_path / "out" / WEIGHTS_FILE).stat().st_mtime_ns == stamp


def test_one_changed_character_of_the_data_is_another_run(
    llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    finetune(str(llama_folder), tone_data, FAST, output_dir=tmp_path / "out")
    file = Path(tone_data["path"])
    file.write_text(file.read_text().replace("number 3", "number 4", 1))
    with pytest.raises(OutputError, match="other settings or data"):
        finetune(str(llama_folder), tone_data, FAST, output_dir=tmp_path / "out")
    assert not finetune(str(llama_folder), tone_data, FAST, output_dir=tmp_path / "out", overwrite=True).unchanged


class Kill(Exception):
    pass


def killed_at(step: int) -> Any:
    def on_event(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "training" and event.done >= step:
            raise Kill

    return on_event


@pytest.mark.parametrize("kill_at", [3, 6, 9])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_died_goes_on_and_ends_bit_for_bit_the_same(
    kill_at: int, accumulation: int, llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    config = {
        **FAST,
        "save_steps": 2,
        "num_train_epochs": 4,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "cosine",
    }
    peft = {"r": 4, "lora_dropout": 0.2}
    whole = finetune(str(llama_folder), tone_data, config, peft, output_dir=tmp_path / "whole")
    assert whole.manifest["figures"]["steps"] > kill_at
    with pytest.raises(Kill):
        finetune(str(llama_folder), tone_data, config, peft, output_dir=tmp_path / "out", on_event=killed_at(kill_at))
    assert not (tmp_path / "out").exists()
    resumed = finetune(str(llama_folder), tone_data, config, peft, output_dir=tmp_path / "out")
    assert resumed.manifest["figures"]["resumed_at_step"] > 0
    assert adapter_bytes(resumed.folder) == adapter_bytes(whole.folder)


def test_a_half_written_checkpoint_is_not_resumed_from(
    llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    config = {**FAST, "save_steps": 2, "save_total_limit": 3}
    whole = finetune(str(llama_folder), tone_data, config, output_dir=tmp_path / "whole")
    with pytest.raises(Kill):
        finetune(str(llama_folder), tone_data, config, output_dir=tmp_path / "out", on_event=killed_at(7))
    partial = partial_folder(tmp_path / "out")
    (partial / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')
    (partial / "checkpoint-8").mkdir()
    resumed = finetune(str(llama_folder), tone_data, config, output_dir=tmp_path / "out")
    assert resumed.manifest["figures"]["resumed_at_step"] == 4
    assert adapter_bytes(resumed.folder) == adapter_bytes(whole.folder)


def test_kill_9_and_the_same_command_again(llama_folder: Path, tmp_path: Path) -> None:
    """A real process, a real SIGKILL, at three moments of the run."""
    data = write_rows(tmp_path / "tone.jsonl", tone_rows(64))
    config = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "save_steps": 5, "learning_rate": 1e-3}
    settings = [f"--set=training_config.{k}={v}" for k, v in config.items()]
    base = [sys.executable, "-m", "phinetune", "finetune", "-m", str(llama_folder), "-d", str(data)]
    texts = ["--prompt", PROMPT["prompt"], "--completion", PROMPT["completion"]]
    command = [*base, *texts, *settings, "--set=peft_config.lora_dropout=0.1", "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def finish(name: str) -> str:
        done = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "going on from checkpoint-" not in finish("whole")
    for moment in range(3):
        killed = tmp_path / f"killed-{moment}"
        process = subprocess.Popen(
            [*command, str(killed)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            found = [int(p.name.rpartition("-")[2]) for p in partial_folder(killed).glob("checkpoint-*")]
            if max(found, default=0) >= 10 + 20 * moment:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL
        assert partial_folder(killed).is_dir() and not killed.exists()
        assert "going on from checkpoint-" in finish(killed.name)
        assert adapter_bytes(killed) == adapter_bytes(tmp_path / "whole")


def test_a_disk_that_fills_up_in_training_costs_nothing_but_time(
    small_disk: Callable[[str], Path], llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    disk = small_disk("80m")
    config = {**FAST, "save_steps": 2}
    whole = finetune(str(llama_folder), tone_data, config, output_dir=tmp_path / "whole")
    filler = disk / "filler"

    def fill(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "training" and event.done == 5:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
                while True:
                    stream.write(b"x" * 4096)

    with pytest.raises(OutputError, match="the disk is full"):
        finetune(str(llama_folder), tone_data, config, output_dir=disk / "out", on_event=fill)
    assert not (disk / "out").exists()
    assert [p.name for p in (disk / "out.partial").glob("checkpoint-*")] == ["checkpoint-4"]
    filler.unlink()
    resumed = finetune(str(llama_folder), tone_data, config, output_dir=disk / "out")
    assert resumed.manifest["figures"]["resumed_at_step"] == 4
    assert adapter_bytes(resumed.folder) == adapter_bytes(whole.folder)


def test_resume_from_a_named_checkpoint(llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path) -> None:
    first = finetune(
        str(llama_folder), tone_data, {**FAST, "save_steps": 4, "save_total_limit": 3}, output_dir=tmp_path / "a"
    )
    config = {**FAST, "save_steps": 4, "resume_from_checkpoint": str(tmp_path / "a" / "checkpoint-4")}
    second = finetune(str(llama_folder), tone_data, config, output_dir=tmp_path / "b")
    assert second.manifest["figures"]["resumed_at_step"] == 4
    assert adapter_bytes(first.folder) == adapter_bytes(second.folder)
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        finetune(str(llama_folder), tone_data, {**FAST, "resume_from_checkpoint": "nowhere"}, output_dir=tmp_path / "c")


@pytest.mark.parametrize("layout", ["padded", "tree"])
def test_checkpointed_activations_and_layouts_give_the_same_adapter(
    layout: str, llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    plain = finetune(str(llama_folder), tone_data, {**FAST, "layout": "padded"}, None, FP32, tmp_path / "a")
    config = {
        **FAST,
        "layout": layout,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    other = finetune(str(llama_folder), tone_data, config, None, FP32, tmp_path / "b")
    a, b = (load_file(str(r.folder / WEIGHTS_FILE)) for r in (plain, other))
    assert (
        max(float((a[k] - b[k]).abs().max()) for k in a) < 2e-3
    )  # Adam turns rounding of 1e-7 into steps that differ by little


def test_evaluation_during_training_counts_tokens_and_keeps_the_best(
    llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    config = {
        **FAST,
        "evaluation_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "per_device_eval_batch_size": 2,
    }
    result = finetune(str(llama_folder), tone_data, config, None, FP32, tmp_path / "out")
    state = json.loads((tmp_path / "out" / "checkpoint-10" / "trainer_state.json").read_text())
    losses = {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    assert sorted(losses) == [2, 4, 6, 8, 10]
    assert result.manifest["figures"]["eval_loss"] == pytest.approx(min(losses.values()), abs=1e-5)


# Bad input: an error before the first step, nothing left behind.


def test_all_config_problems_at_once(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        finetune(
            str(llama_folder),
            {"path": "tone", "promt": "x"},
            {"learning_rat": 1},
            {"rr": 8},
            output_dir=tmp_path / "out",
        )
    text = "\n".join(caught.value.problems)
    assert 'data.promt: unknown key, did you mean "prompt"?' in text
    assert 'training_config.learning_rat: unknown key, did you mean "learning_rate"?' in text
    assert "peft_config.rr: unknown key" in text


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"learning_rate": "fast"}, "training_config"),
        ({"max_seq_length": 128}, r"use data\.max_length"),
        ({"push_to_hub": True}, "nothing is sent anywhere"),
        ({"layout": "diagonal"}, "must be auto, padded or tree"),
        ({"eval_strategy": "sometimes"}, "training_config"),
        ({"num_train_epochs": "three"}, "training_config"),
    ],
)
def test_impossible_training_configs(
    training: dict[str, Any], message: str, llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(str(llama_folder), tone_data, training, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [Path(tone_data["path"])]


def test_a_diverging_run_stops_and_says_so(llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path) -> None:
    config = {
        **FAST,
        "learning_rate": 1e30,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "num_train_epochs": 5,
        "optim": "sgd",
        "warmup_steps": 0,
    }
    with pytest.raises(TrainingError, match="not finite"):
        finetune(str(llama_folder), tone_data, config, None, FP32, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_foreign_output_folder_is_left_as_it_is(
    llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="holds files that phinetune did not write"):
        finetune(str(llama_folder), tone_data, FAST, output_dir=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_missing_field_and_missing_model(llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'tone\.jsonl:1: missing field "tome" .* did you mean "tone"\?'):
        finetune(str(llama_folder), {**tone_data, "completion": "{tome}"}, FAST, output_dir=tmp_path / "out")
    with pytest.raises(ModelError, match="no such model folder"):
        finetune(str(tmp_path / "nowhere"), tone_data, FAST, output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="output_dir: this key is needed"):
        finetune(str(llama_folder), tone_data, FAST)
    assert list(tmp_path.iterdir()) == [Path(tone_data["path"])]


def test_operations_are_counted_as_the_trainer_counts_them() -> None:
    from types import SimpleNamespace

    import torch
    from transformers import Trainer

    from phinetune.training.trainer import AdapterTrainer
    from zoo import zoo_model

    run: Any = SimpleNamespace(model=zoo_model("llama"), _parameters=None)
    for shape in ((2, 7), (1, 40)):
        inputs: dict[str, Any] = {"input_ids": torch.zeros(shape, dtype=torch.long)}
        assert AdapterTrainer.floating_point_ops(run, inputs) == Trainer.floating_point_ops(run, inputs) > 0
    assert AdapterTrainer.floating_point_ops(run, {}) == Trainer.floating_point_ops(run, {}) == 0
