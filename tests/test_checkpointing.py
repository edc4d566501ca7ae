"""Activation checkpointing by layer: the same gradients, bit for bit, on the layers that were asked for and no others."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from phinetune.data.batches import padded_batch, tree_batch
from phinetune.errors import ConfigError
from phinetune.events import Event, Note
from phinetune.lora.adapter import WEIGHTS_FILE
from phinetune.lora.config import LoraConfig
from phinetune.lora.injection import inject
from phinetune.training.checkpointing import checkpoint_layers, read_checkpointing
from phinetune.training.config import read_training_config
from phinetune.training.loss import supervised_loss
from phinetune.workflow.finetune import finetune
from tiny import tiny_model
from zoo import MODELS, zoo_model

PREFIX = [5, 6, 7, 8]
ROWS = [
    {"input_ids": [*PREFIX, 9, 10, 11], "labels": [-100] * 4 + [9, 10, 11]},
    {"input_ids": [*PREFIX, 12, 13], "labels": [-100] * 4 + [12, 13]},
    {"input_ids": [*PREFIX, 14, 15, 16, 17], "labels": [-100] * 5 + [15, 16, 17]},
]


def adapted(model: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    inject(model, LoraConfig(r=4, lora_alpha=4, lora_dropout=0.2, **changes))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the trained parameters; the same dropout each time."""
    torch.manual_seed(1)
    model.zero_grad()
    supervised_loss(model, model.get_output_embeddings(), batch, torch.float32).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def calls(model: Any, batch: dict[str, torch.Tensor]) -> list[int]:
    """How often each decoder layer's first norm, or what stands for it, runs in one step."""
    layers = decoder_layers(model)
    counts = [0] * len(layers)
    handles = []
    for i, layer in enumerate(layers):
        inner = next(m for m in layer.modules() if m is not layer)

        def count(*_: Any, i: int = i) -> None:
            counts[i] += 1

        handles.append(inner.register_forward_pre_hook(count))
    gradients(model, batch)
    for handle in handles:
        handle.remove()
    return counts


def decoder_layers(model: Any) -> list[Any]:
    return next(list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_bits(name: str) -> None:
    changes = {"resid_pdrop": 0.2, "attn_pdrop": 0.2} if name == "gpt2" else {}
    model = adapted(zoo_model(name, **changes))
    batch = padded_batch(ROWS, 0)
    plain = gradients(model, batch)
    assert len(plain) >= 8 and any(float(g.abs().max()) > 0 for g in plain.values())
    for count in (1, "all"):
        assert checkpoint_layers(model, count) == 1  # of two, the last is never taken
        found = gradients(model, batch)
        assert found.keys() == plain.keys() and all(torch.equal(found[k], plain[k]) for k in plain)
    checkpoint_layers(model, 0)
    assert calls(model, batch)[0] == calls(model, batch)[1]


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tree_batches_keep_their_masks_and_positions(kind: str, attention: str) -> None:
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    model, batch = adapted(model), tree_batch(ROWS)
    assert "tree" in batch
    plain = gradients(model, batch)
    checkpoint_layers(model, "all")
    found = gradients(model, batch)
    assert all(torch.equal(found[k], plain[k]) for k in plain)


def test_the_first_layers_are_computed_again_and_only_in_training() -> None:
    model, batch = adapted(zoo_model("llama", num_hidden_layers=4)), padded_batch(ROWS, 0)
    assert checkpoint_layers(model, 3) == 3 and calls(model, batch) == [2, 2, 2, 1]
    assert checkpoint_layers(model, 1) == 1 and calls(model, batch) == [2, 1, 1, 1]
    assert checkpoint_layers(model, 0) == 0 and calls(model, batch) == [1, 1, 1, 1]
    assert checkpoint_layers(model, "all") == checkpoint_layers(model, 4) == 3
    assert calls(model.eval(), batch) == [1, 1, 1, 1]


def test_layers_below_the_lowest_trained_one_are_passed_over() -> None:
    model = adapted(zoo_model("llama", num_hidden_layers=4), layers_to_transform=[2, 3])
    batch = padded_batch(ROWS, 0)
    assert checkpoint_layers(model, 1) == 1 and calls(model, batch) == [1, 1, 2, 1]
    assert checkpoint_layers(model, 4) == 1 and calls(model, batch) == [1, 1, 2, 1]
    assert not model.get_input_embeddings()(batch["input_ids"]).requires_grad  # no gradient is made to reach down there
    model.get_input_embeddings().weight.requires_grad_(True)
    assert checkpoint_layers(model, 1) == 1 and calls(model, batch) == [2, 1, 1, 1]


def kept(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that the graph holds between forward and backward pass, each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = supervised_loss(model, model.get_output_embeddings(), batch, torch.float32)
    loss.backward()
    return sum(seen.values())


def test_a_checkpointed_layer_keeps_no_activations() -> None:
    model, batch = adapted(zoo_model("llama", num_hidden_layers=4)), padded_batch(ROWS * 4, 0)
    sizes = []
    for count in range(4):
        checkpoint_layers(model, count)
        sizes.append(kept(model, batch))
    steps = [a - b for a, b in itertools.pairwise(sizes)]
    assert all(step > 0.15 * sizes[0] for step in steps), sizes  # four layers hold nearly all of it


def test_a_model_of_foreign_code_checkpoints_all_or_none() -> None:
    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.asked = zoo_model("llama").config, []

        def _set_gradient_checkpointing(self, enable: bool, gradient_checkpointing_func: Any) -> None:
            self.asked.append(enable)

    model, events = Foreign(), []
    assert checkpoint_layers(model, 0) == 0 and model.asked == []
    assert checkpoint_layers(model, "all", on_event=events.append) == 2 and model.asked == [True] and not events
    assert checkpoint_layers(model, 1, on_event=events.append) == 2 and "taking all" in events[0].text
    del Foreign._set_gradient_checkpointing
    with pytest.raises(ConfigError, match="Foreign cannot be checkpointed"):
        checkpoint_layers(model, "all")


@pytest.mark.parametrize(
    ("given", "count", "options"),
    [
        ({}, None, {}),
        ({"checkpoint_layers": None}, None, {}),
        ({"checkpoint_layers": 3}, 3, {}),
        ({"checkpoint_layers": "all"}, "all", {}),
        ({"gradient_checkpointing": True}, "all", {}),
        ({"activation_checkpointing": True}, "all", {}),
        ({"gradient_checkpointing": False}, 0, {}),
        ({"gradient_checkpointing": True, "checkpoint_layers": "all"}, "all", {}),
        (
            {"checkpoint_layers": 2, "gradient_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": False}},
            2,
            {"preserve_rng_state": False},
        ),
    ],
)  # fmt: skip
def test_keys_are_read(given: dict[str, Any], count: Any, options: dict[str, Any]) -> None:
    events: list[Event] = []
    assert read_checkpointing(given, events.append) == (count, options) and not events
    plan = read_training_config(given)
    assert plan.checkpoint_layers == count and plan.values == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpoint_layers": -1}, "checkpoint_layers: must be a whole number"),
        ({"checkpoint_layers": 1.5}, "checkpoint_layers: must be a whole number"),
        ({"checkpoint_layers": True}, "checkpoint_layers: must be a whole number"),
        ({"checkpoint_layers": "some"}, "checkpoint_layers: must be a whole number"),
        ({"checkpoint_layers": [1]}, "checkpoint_layers: must be a whole number"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing: must be true or false"),
        ({"gradient_checkpointing": True, "checkpoint_layers": 2}, "contradicts checkpoint_layers 2"),
        ({"gradient_checkpointing": False, "checkpoint_layers": 2}, "contradicts checkpoint_layers 2"),
        ({"gradient_checkpointing": False, "activation_checkpointing": True}, "contradicts activation_checkpointing"),
        ({"gradient_checkpointing_kwargs": 3}, "gradient_checkpointing_kwargs: must hold"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_its_key(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_training_config(given)


def test_options_that_do_nothing_here_are_said() -> None:
    events: list[Event] = []
    given = {"gradient_checkpointing_kwargs": {"use_reentrant": True, "every_n_layers": 2}}
    assert read_checkpointing(given, events.append) == (None, {})
    notes = [e.text for e in events if isinstance(e, Note)]
    assert len(notes) == 2 and "use_reentrant" in notes[0] and "every_n_layers" in notes[1]


def test_more_layers_than_there_are(llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3, but the model has 2 layers"):
        checkpoint_layers(zoo_model("llama"), 3)
    with pytest.raises(ConfigError, match="3, but the model has 2 layers"):
        finetune(str(llama_folder), tone_data, {"checkpoint_layers": 3}, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_whole_run_is_the_same_run(llama_folder: Path, tone_data: dict[str, Any], tmp_path: Path) -> None:
    config = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2}
    peft = {"r": 4, "lora_dropout": 0.1}
    results = []
    for layers in (0, 1, "all"):
        out = tmp_path / str(layers)
        results.append(finetune(str(llama_folder), tone_data, {**config, "checkpoint_layers": layers}, peft, None, out))
        assert results[-1].manifest["training_config"]["checkpoint_layers"] == layers
    assert len({(r.folder / WEIGHTS_FILE).read_bytes() for r in results}) == 1
    again = {**config, "gradient_checkpointing": True}
    assert finetune(str(llama_folder), tone_data, again, peft, None, tmp_path / "0").unchanged  # the same adapter
