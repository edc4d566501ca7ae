"""Tree batches are used only where they compute what padded batches do; several processes train what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from phinetune.data.batches import padded_batch, tree_batch
from phinetune.errors import ConfigError
from phinetune.training.layout import choose_layout
from phinetune.training.loss import supervised_loss
from tiny import PROMPT, tone_rows, write_rows

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WHOLE = [
    "LlamaConfig",
    "Qwen2Config",
    "Qwen3Config",
    "GPT2Config",
    "OPTConfig",
    "PhiConfig",
    "GPTNeoXConfig",
    "StableLmConfig",
]
LOCAL = [
    ("MistralConfig", {"sliding_window": 8}, "sliding window of 8 tokens"),
    ("Phi3Config", {"sliding_window": 8, "pad_token_id": 0}, "sliding window of 8 tokens"),
    ("Gemma2Config", {"sliding_window": 8}, "layers of sliding_attention"),
    ("BloomConfig", {}, "takes no position_ids"),
    ("MambaConfig", {}, "takes no position_ids"),
    ("GPTNeoConfig", {"attention_types": [[["global", "local"], 1]], "num_layers": 2}, "attention is local"),
]


def tiny(name: str, **more: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    names = {
        "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "OPTConfig": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    }
    config = getattr(transformers, name)(**{**SMALL, **names.get(name, {}), **more})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rows() -> list[dict[str, Any]]:
    out = []
    for extra in (3, 9, 14):
        ids = [5, 6, 7, 8, 9, *[10 + (extra * i) % 50 for i in range(extra)]]
        out.append({"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]})
    return out


@pytest.mark.parametrize("name", WHOLE)
def test_where_the_tree_is_chosen_its_loss_is_the_padded_one(name: str) -> None:
    model = tiny(name)
    assert choose_layout(model, "auto", 19) == "auto"
    head = model.get_output_embeddings()
    losses = [
        float(supervised_loss(model, head, batch, torch.float32).detach())
        for batch in (padded_batch(rows(), 0), tree_batch(rows()))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(("name", "more", "reason"), LOCAL)
def test_models_that_look_at_the_row_get_padded_batches_and_say_why(
    name: str, more: dict[str, Any], reason: str
) -> None:
    notes: list[str] = []
    model = tiny(name, **more)
    assert choose_layout(model, "auto", 19, lambda e: notes.append(getattr(e, "text", ""))) == "padded"
    assert len(notes) == 1 and reason in notes[0]
    with pytest.raises(ConfigError, match="cannot be trained on tree batches"):
        choose_layout(model, "tree", 19)


def test_a_window_longer_than_every_example_changes_nothing() -> None:
    assert choose_layout(tiny("MistralConfig", sliding_window=64), "auto", 19) == "auto"


def test_a_model_that_mixes_the_row_is_caught_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("LlamaConfig")
    norm = model.model.layers[0].input_layernorm
    handle = norm.register_forward_hook(lambda m, args, out: out + out.mean(1, keepdim=True))
    try:
        assert choose_layout(model, "auto", 19, lambda e: None) == "padded"
    finally:
        handle.remove()
    assert choose_layout(model, "auto", 19) == "auto"


def test_two_processes_train_what_one_does(llama_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data = write_rows(tmp_path / "tone.jsonl", tone_rows(40))
    common = [
        "finetune",
        "-m",
        str(llama_folder),
        "-d",
        str(data),
        "--prompt",
        PROMPT["prompt"],
        "--completion",
        PROMPT["completion"],
    ]
    common += [
        "-s",
        "training_config.max_steps=6",
        "-s",
        "training_config.learning_rate=1e-3",
        "-s",
        "model_kwargs.torch_dtype=float32",
    ]
    common += [
        "-s",
        "training_config.save_steps=2",
        "-s",
        "training_config.use_cpu=true",
        "-s",
        "training_config.train_sampling_strategy=sequential",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launch, batch in (
        ("one", ["-m"], 8),
        ("two", ["-m", "torch.distributed.run", "--nproc_per_node=2", "-m"], 4),
    ):
        command = [
            sys.executable,
            *launch,
            "phinetune",
            *common,
            "-o",
            str(tmp_path / name),
            "-s",
            f"training_config.per_device_train_batch_size={batch}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(str(tmp_path / name / "adapter_model.safetensors")) for name in ("one", "two"))
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-4
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
