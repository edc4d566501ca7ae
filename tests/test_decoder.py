"""A decoder layer in one function: bit by bit what its parts give, in every batch; taken where it serves, and nowhere else."""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from phinetune.data.batches import padded_batch, tree_batch
from phinetune.events import OnEvent
from phinetune.lora import decoder, decoder_join, tiles
from phinetune.lora.arithmetic import choose_arithmetic
from phinetune.lora.config import LoraConfig
from phinetune.lora.decoder_join import is_packed
from phinetune.lora.decoder_memory import Places, Shape
from phinetune.lora.injection import inject, lora_layers
from phinetune.model.fast import FastPaths, speed_up
from phinetune.model.load import LoadPlan
from phinetune.training.checkpointing import checkpoint_layers
from phinetune.training.estimate import StepEstimator, StepSettings
from phinetune.training.estimate_model import build_on_meta
from phinetune.training.loss import supervised_loss
from zoo import zoo_model

pytestmark = pytest.mark.usefixtures("each_way_of_multiplying")
TILES = pytest.mark.skipif(tiles.library() is None, reason="nothing that multiplies bfloat16, or no compiler")
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
}
quiet: OnEvent = lambda event: None  # noqa: E731
LAYOUTS = pytest.mark.parametrize("layout", [lambda r: padded_batch(r, 0), tree_batch], ids=["padded", "tree"])


def rows(count: int = 4) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": list(range(5, 30 + i)), "labels": [-100] * 15 + list(range(20, 30 + i))} for i in range(count)
    ]


def trained(paths: FastPaths, kind: str = "llama", dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    torch.manual_seed(0)
    model = speed_up(zoo_model(kind, **WIDE).to(torch.bfloat16), paths, quiet)
    inject(model, LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **lora}), on_event=quiet)
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.05)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    choose_arithmetic(model, paths)
    return model.train()


def learned(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = supervised_loss(model, model.get_output_embeddings(), batch, torch.bfloat16)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each layer that goes forward, and each that goes back, in one function."""
    found: list[str] = []
    for name in ("decoder_layer", "decoder_layer_backward"):
        own = getattr(decoder, name)
        monkeypatch.setattr(decoder, name, lambda *args, own=own, name=name: (found.append(name), own(*args))[1])
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 1
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


@TILES
@LAYOUTS
@pytest.mark.parametrize("kind", ["llama", "phi3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_bit_by_bit_what_the_parts_give(kind: str, layout: Any, dtype: torch.dtype, calls: list[str]) -> None:
    batch = layout(rows())
    found = learned(trained(FastPaths(), kind, dtype), batch)
    assert calls == ["decoder_layer"] * 3 + ["decoder_layer_backward"] * 3
    calls.clear()
    expected = learned(trained(FastPaths(layers=False), kind, dtype), batch)
    assert not calls
    same(found, expected)


@TILES
def test_layers_below_the_first_that_learns_get_no_gradient_and_a_trained_input_does(calls: list[str]) -> None:
    results = []
    for on in (True, False):
        model = trained(FastPaths(layers=on))
        states = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        model(inputs_embeds=states, use_cache=False).logits.float().square().mean().backward()
        results.append(
            {"states": states.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
        )
    same(*results)
    assert len(calls) == 6


@TILES
@LAYOUTS
def test_ranks_and_scalings_may_differ_from_call_to_call(layout: Any, calls: list[str]) -> None:
    lora = {
        "rank_pattern": {"q_proj": 40, "k_proj": 3},
        "alpha_pattern": {"q_proj": 80, "k_proj": 6, "down_proj": 1, "o_proj": 5},
    }
    batch = layout(rows(7))
    found = learned(trained(FastPaths(), **lora), batch)
    assert len(calls) == 6
    same(found, learned(trained(FastPaths(layers=False), **lora), batch))


@TILES
def test_activation_checkpointing_computes_layers_again(calls: list[str]) -> None:
    results = []
    for count in ("all", 0):
        model = trained(FastPaths())
        assert checkpoint_layers(model, count) == {"all": 2, 0: 0}[count]  # never the last one
        results.append(learned(model, tree_batch(rows())))
    same(*results)
    assert calls.count("decoder_layer") == 3 + 2 + 3


@TILES
def test_a_factor_that_is_exchanged_or_written_to_is_used_as_it_is_now(calls: list[str]) -> None:
    results, batch = [], tree_batch(rows())
    for on in (True, False):
        model = trained(FastPaths(layers=on))
        learned(model, batch)
        model.zero_grad()
        layer = model.model.layers[1].mlp.up_proj
        layer.lora_A.data = layer.lora_A.data * 2
        model.model.layers[0].self_attn.o_proj.lora_B.data.mul_(3)
        results.append(learned(model, batch))
    same(*results)
    assert len(calls) == 12


@TILES
def test_weights_may_not_be_written_to_between_the_two_ways() -> None:
    model = trained(FastPaths())
    loss = model(input_ids=torch.arange(5, 45)[None], use_cache=False).logits.float().sum()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_A.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@TILES
def test_copies_have_their_own_weights(calls: list[str]) -> None:
    model = trained(FastPaths())
    other = copy.deepcopy(model)
    for layer in lora_layers(other).values():
        layer.lora_B.data.zero_()
    batch = tree_batch(rows())
    assert float(learned(model, batch)["loss"]) != float(learned(other, batch)["loss"])
    assert len(calls) == 12


def _hook(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)


def _merge(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.merge()


def _plain(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.down_proj = mlp.down_proj.plain


def _drop(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.lora_dropout = torch.nn.Dropout(0.5)


def _learn(model: Any) -> None:
    model.model.layers[1].input_layernorm.weight.requires_grad_()


def _widen(model: Any) -> None:
    layer = model.model.layers[1].self_attn.o_proj
    layer.lora_A.data = layer.lora_A.data.double()


def _rescale(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.rescale(0.5)


@TILES
@pytest.mark.parametrize("change", [_hook, _merge, _plain, _drop, _learn, _rescale], ids=lambda f: f.__name__)
def test_a_layer_that_is_no_more_what_it_was_goes_the_other_way(change: Any, calls: list[str]) -> None:
    results, batch = [], tree_batch(rows())
    for on in (True, False):
        model = trained(FastPaths(layers=on))
        if on:
            learned(model, batch)  # it was served before
            model.zero_grad()
            calls.clear()
        change(model)
        torch.manual_seed(3)
        results.append(learned(model, batch))
    same(*results)
    assert calls.count("decoder_layer") == 2


@TILES
@pytest.mark.parametrize(
    "paths",
    [FastPaths(layers=False), FastPaths(tiles=False), FastPaths(kernels=False), FastPaths(grouped=False), FastPaths(linear=False),
     FastPaths(norm=False), FastPaths(attention=False), FastPaths.none()],
    ids=["layers", "tiles", "kernels", "grouped", "linear", "norm", "attention", "none"],
)  # fmt: skip
def test_switches_leave_the_layer_alone(paths: FastPaths, calls: list[str]) -> None:
    model = trained(paths)
    learned(model, tree_batch(rows()))
    assert not calls


@TILES
def test_switching_off_puts_the_layers_own_way_back(calls: list[str]) -> None:
    model = trained(FastPaths())
    choose_arithmetic(model, FastPaths(layers=False))
    learned(model, tree_batch(rows()))
    assert not calls
    choose_arithmetic(model, FastPaths())
    learned(model, tree_batch(rows()))
    assert len(calls) == 6


@TILES
def test_rooms_are_handed_on_and_given_back_with_the_graph() -> None:
    def counts() -> list[int]:
        return sorted(len(pieces) for pieces in decoder.rooms_of_step().free.values())

    model = trained(FastPaths())
    assert decoder._rooms is None or decoder._rooms() is None
    loss = model(input_ids=torch.arange(5, 45).view(2, 20), use_cache=False).logits.float().sum()
    rooms = decoder.rooms_of_step()
    assert counts() == [1]  # three layers, one room; what they keep is kept
    loss.backward(retain_graph=True)
    assert counts() == [1]
    loss.backward()
    assert counts() == [1, 3, 3]
    alive = weakref.ref(rooms)
    del rooms, loss
    assert alive() is None
    checkpoint_layers(model, "all")
    loss = model(input_ids=torch.arange(5, 45).view(2, 20), use_cache=False).logits.float().sum()
    rooms = decoder.rooms_of_step()
    assert counts() == [0, 0, 1]  # each took those of the one before; the last is not computed again and keeps them
    loss.backward()
    assert counts() == [1, 1, 1]  # and gave them to those that are
    x = torch.zeros(4).bfloat16()
    rooms = decoder.Rooms()
    with rooms.one(x, 10) as one, rooms.one(x, 10) as another:  # two layers at once
        assert one.data_ptr() != another.data_ptr() and len(one) == len(another) == 10
    assert len(rooms.free[10]) == 2
    lent = rooms.lend(x, 10)
    again = lent[3:]
    del lent
    assert len(rooms.free[10]) == 1
    del again
    assert len(rooms.free[10]) == 2


@TILES
def test_few_tokens_autocast_caches_and_other_masks_go_the_other_way(calls: list[str]) -> None:
    model = trained(FastPaths())
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        model(input_ids=ids[:, :20], use_cache=False)
        model(input_ids=ids, use_cache=True)
        mask = torch.ones_like(ids)
        mask[:, :3] = 0
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, use_cache=False)
        model.float()(input_ids=ids, use_cache=False)
    assert not calls
    model.bfloat16()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert len(calls) == 3


@TILES
@LAYOUTS
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_packed_weights_give_the_same_bits(kind: str, layout: Any, calls: list[str]) -> None:
    results = []
    for packed in (True, False):
        model = trained(FastPaths(packed=packed), kind)
        assert is_packed(model) is packed and not any("packed" in name for name in model.state_dict())
        results.append(learned(model, layout(rows())))
    same(*results)
    assert len(calls) == 12


@TILES
def test_packed_weights_of_many_widths_and_depths_give_the_same_bits() -> None:
    for out, width in (([96], 32), ([32, 64, 160], 96), ([1120, 32], 64), ([64], 1184), ([1088, 1088], 1056)):
        torch.manual_seed(out[0])
        W, A, B = ([torch.randn(n, k) for n in out] for k in (width, 1, 1))
        W, A, B = [w.bfloat16() for w in W], [torch.randn(8, width) for _ in out], [torch.randn(n, 8) for n in out]
        x, g = torch.randn(45, width).bfloat16(), [torch.randn(45, n).bfloat16() for n in out]
        *expected, down, room = tiles.lora_products(x, W, A, B, 0.5)
        *expected_back, _ = tiles.lora_products_backward(x, down, g, W, A, B, 0.5, True)
        copies = [tiles.pack(w) for w in W]
        places = [(c[0].data_ptr(), c[1].data_ptr()) for c in copies]
        pointers = [[t.data_ptr() for t in tensors] for tensors in (W, A, B)]
        of = tiles.operands_at(width, out, [8] * len(out), *pointers, 0.5, True, places)
        found = [torch.empty_like(t) for t in (*expected, *expected_back)]
        at, n = [t.data_ptr() for t in found], len(out)
        sizes = [tiles.numbers_of_room(45, width, 32 * n, tuple(out), back) for back in (False, True)]
        room = torch.empty(max(sizes), dtype=torch.bfloat16)
        tiles.multiply(45, x.data_ptr(), of, at[:n], down.data_ptr(), room.data_ptr())
        gradients = [t.data_ptr() for t in g]
        tiles.multiply_back(
            45,
            x.data_ptr(),
            of,
            down.data_ptr(),
            gradients,
            at[n],
            at[n + 1 : 2 * n + 1],
            at[2 * n + 1 :],
            room.data_ptr(),
        )
        for one, other in zip(found, (*expected, *expected_back), strict=True):
            assert torch.equal(one, other)


@TILES
def test_copies_are_left_alone_once_the_weight_is_another(calls: list[str]) -> None:
    def learned_after(packed: bool, change: Any) -> dict[str, Tensor]:
        model = trained(FastPaths(packed=packed))
        with torch.no_grad():
            change(model.model.layers[1].mlp.up_proj)
        return learned(model, tree_batch(rows()))

    def other(layer: Any) -> None:
        layer.weight.data = layer.weight.data * 2

    def written(layer: Any) -> None:
        layer.weight.mul_(2)

    for change in (other, written):
        same(learned_after(True, change), learned_after(False, change))
    model = trained(FastPaths(packed=True))
    copied = copy.deepcopy(model)
    for layer in lora_layers(copied).values():
        layer.weight.data.mul_(2)
    expected = copy.deepcopy(copied)
    choose_arithmetic(expected, FastPaths(packed=False))
    assert not is_packed(expected)
    same(learned(copied, tree_batch(rows())), learned(expected, tree_batch(rows())))


@TILES
def test_what_tiles_cannot_take_is_not_packed(calls: list[str]) -> None:
    for shape in ((48, 64), (64, 48)):
        with pytest.raises(ValueError, match="tiles do not take"):
            tiles.pack(torch.zeros(shape, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="tiles do not take"):
        tiles.pack(torch.zeros(64, 64))
    for options, dtype in (({"intermediate_size": 48}, torch.bfloat16), ({}, torch.float32)):
        model = speed_up(zoo_model("llama", **{**WIDE, **options}).to(dtype), FastPaths(packed=True), quiet)
        inject(model, LoraConfig(r=8, target_modules="all-linear"), on_event=quiet)
        choose_arithmetic(model, FastPaths(packed=True))
        assert not is_packed(model)
        model(input_ids=torch.arange(5, 45)[None], use_cache=False)
    assert not calls


@TILES
def test_copies_made_before_a_model_had_numbers_are_left_alone() -> None:
    paths = FastPaths(packed=True)
    config, lora = zoo_model("llama", **WIDE).config, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    plain = trained(FastPaths(packed=False))
    model = build_on_meta(config, LoadPlan(torch.bfloat16, torch.device("cpu")), lora, paths)
    assert is_packed(model)
    model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.copy_(plain.model.rotary_emb.inv_freq)
        results = [one(input_ids=ids, use_cache=False).logits for one in (model, plain)]
    assert torch.equal(*results)


@TILES
def test_large_models_are_not_packed_by_themselves_and_none_for_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    in_tiles = tiles.packing_pays()
    copies = 3 * 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    for memory, packed in ((16 * copies, True), (16 * copies - 16, False), (None, False)):
        monkeypatch.setattr(decoder_join, "main_memory", lambda memory=memory: memory)
        assert is_packed(trained(FastPaths())) is (packed and in_tiles)
    assert is_packed(trained(FastPaths(packed=True)))


@TILES
@pytest.mark.parametrize("packed", [True, False])
def test_the_planner_counts_the_copies_and_all_arithmetic(packed: bool) -> None:
    paths = FastPaths(packed=packed)
    config, batch = zoo_model("llama", **WIDE).config, tree_batch(rows())
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    load = LoadPlan(torch.bfloat16, torch.device("cpu"))
    estimators = [
        StepEstimator(StepSettings(config, load, lora, fast_paths=p)) for p in (paths, FastPaths(layers=False))
    ]
    copies = 2 * 2 * 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert estimators[0].weights - estimators[1].weights == packed * copies
    joined, apart = (estimator(batch) for estimator in estimators)
    assert joined.flops == apart.flops and joined.hands_on and not apart.hands_on
    names = {str(call.operator) for call in joined.calls}
    assert {"phinetune.decoder_layer.default", "phinetune.decoder_layer_backward.default"} <= names
    kept = joined.peak.parts["activations"] / apart.peak.parts["activations"]
    assert 0.9 < kept < 1.3  # parts begin at cache lines, and what one call needs meanwhile is in it


@TILES
def test_parts_of_memory_do_not_overlap() -> None:
    for into, widen in ((3, 2), (1, 1)):
        shape = Shape(64, 4, 2, 32, 96, into, widen)
        ranks = (8,) * (into + widen + 2)
        at, M = Places(45, shape, ranks), 45
        states = 2 * M * shape.D * 4
        firsts = sorted([at.y, at.into[0], at.attended, at.sums, at.inverse, *at.slim[:2], 2 * at.of_attention])
        sizes = {at.y: 2 * M * 64, at.into[0]: states, at.attended: 2 * M * 128, at.sums: 4 * M * 4, at.inverse: 4 * M}
        for first, following in itertools.pairwise(firsts):
            assert first % 64 == 0 and first + sizes.get(first, 1) <= following
        assert at.d_both >= 2 * M * 128 and at.d_hidden >= at.d_both + 2 * 64 * 2 * 96  # rows filled up
        assert max(at.room_back, at.room) < 2 * at.meanwhile
