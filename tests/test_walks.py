"""A model in training that is not walked over: the same answers as before, and afterwards it is as it was."""

from __future__ import annotations

import pytest
import torch

from phinetune.training.rows import last_mlp, recomputed
from phinetune.training.walks import few_walks
from zoo import zoo_model


def test_parameters_are_the_models_and_modes_are_set() -> None:
    model = zoo_model("llama").eval()
    own = list(model.parameters())
    with few_walks(model):
        assert not model.training
        assert model.train() is model and all(m.training for m in model.modules())
        assert model.train() is model and all(m.training for m in model.modules())
        for _ in range(2):
            assert [id(p) for p in model.parameters()] == [id(p) for p in own]
        assert list(model.parameters(recurse=False)) == []
        for parameter in own:
            parameter.grad = torch.zeros_like(parameter)
        model.zero_grad()
        assert all(p.grad is None for p in own)
        model.eval()
        assert not any(m.training for m in model.modules())
        model.train()
        assert all(m.training for m in model.modules())
    assert not {"parameters", "train"} & vars(model).keys() and len(list(model.parameters())) == len(own)


def test_what_stood_in_their_place_stands_there_again() -> None:
    model = zoo_model("llama")
    mine = model.train
    model.train = mine
    with pytest.raises(RuntimeError), few_walks(model):
        raise RuntimeError
    assert vars(model)["train"] is mine and "parameters" not in vars(model)


def test_a_part_that_is_computed_again_is_noticed_whenever_that_begins() -> None:
    model, other = zoo_model("llama").train(), zoo_model("llama").train()
    last = last_mlp(model)
    assert not recomputed(model, last) and not recomputed(model, None)
    model.model.layers[0].gradient_checkpointing = True
    assert not recomputed(model, last)
    model.model.layers[1].gradient_checkpointing = True
    assert recomputed(model, last) and not recomputed(other, last)
    assert not recomputed(model.eval(), last)
