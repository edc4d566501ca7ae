"""loralib's laws: numbers, gradients, names, files and programs of loralib 0.1.2 hold here, and merging gives back every bit.

loralib itself is the oracle wherever it runs; where it does not (kernels above 1 in one or three dimensions, unequal slices, a merged
layer without an enabled slice) the oracle is torch's own layer or a model put together from separate layers.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import phinetune.lora as lora
from phinetune.errors import AdapterError, ConfigError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PATTERNS = [list(p) for n in range(1, 5) for p in itertools.product([False, True], repeat=n)]
BIASES = ["none", "all", "lora_only"]
BAR = {torch.float64: 1e-10, torch.float32: 1e-6}
few, some = settings(max_examples=6, deadline=None), settings(max_examples=30, deadline=None)


def fill(module: nn.Module, seed: int, only: str = "", std: float = 0.3) -> Any:
    """Normal values in every parameter whose name holds `only`, lora_B among them (a fresh layer's change is zero)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if only in name:
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * std)
    return module


def close(ours: Tensor, theirs: Tensor, what: str = "", bar: float | None = None) -> None:
    """Equal within `bar` (BAR, by dtype) times the largest value, at least 1."""
    largest = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
    atol = (BAR[theirs.dtype] if bar is None else bar) * largest
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def outcome(layer: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """The output, and the gradients of x and of every parameter: None where there is none."""
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_(x.is_floating_point())
    y = layer(x)
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype))
    return {"output": y.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}


def agree(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    ours_found, theirs_found = outcome(ours, x), outcome(theirs, x)
    assert list(ours_found) == list(theirs_found)
    for name, value in theirs_found.items():
        mine = ours_found[name]
        assert (mine is None) == (value is None), f"{name}: a gradient in one library only"
        if value is not None and mine is not None:
            close(mine, value, name)


def libraries_agree(build: Callable[[Any], Any], x: Tensor, seed: int, weight_too: bool, and_back: bool = True) -> None:
    """The same state dict in both: the same output and gradients in train(), in eval() and in train() again, in float64 and in float32."""
    for dtype in (torch.float64, torch.float32):
        theirs, ours = fill(build(loralib).to(dtype), seed), build(lora).to(dtype)
        ours.load_state_dict(theirs.state_dict())
        if weight_too:
            for layer in (ours, theirs):
                layer.requires_grad_(True)
        inputs = x.to(dtype) if x.is_floating_point() else x
        agree(ours, theirs, inputs)
        theirs.eval(), ours.eval()
        agree(ours, theirs, inputs)
        if and_back:
            theirs.train(), ours.train()
            agree(ours, theirs, inputs)


# --- 1: the same numbers and the same gradients


@some
@given(st.data())
def test_linear_computes_what_loralib_computes(data: st.DataObject) -> None:
    features, out = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    r, alpha = data.draw(st.integers(0, min(features, out, 4))), data.draw(st.sampled_from([0.5, 1, 2, 3]))
    fan, bias, weight_too = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.booleans())
    lead, seed = data.draw(st.lists(st.integers(0, 3), max_size=3)), data.draw(st.integers(0, 1000))
    x = torch.randn(*lead, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    libraries_agree(
        lambda lib: lib.Linear(features, out, r=r, lora_alpha=alpha, fan_in_fan_out=fan, bias=bias), x, seed, weight_too
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: "".join("01"[on] for on in p))
@few
@given(st.data())
def test_merged_linear_computes_what_loralib_computes(pattern: list[bool], data: st.DataObject) -> None:
    features, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    r = data.draw(st.integers(0, min(features, width, 3)))
    bias, weight_too = data.draw(st.booleans()), data.draw(st.booleans())
    lead, seed = data.draw(st.lists(st.integers(0, 3), max_size=2)), data.draw(st.integers(0, 1000))
    x = torch.randn(*lead, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out = width * len(pattern)
    for fan in (False, True):
        options: dict[str, Any] = {"lora_alpha": 2, "enable_lora": pattern, "fan_in_fan_out": fan, "bias": bias}
        if r == 0 or any(pattern):
            libraries_agree(lambda lib, o=options: lib.MergedLinear(features, out, r=r, **o), x, seed, weight_too)  # type: ignore[misc]
        else:
            ours = fill(lora.MergedLinear(features, out, r=r, **options).double(), seed)
            plain = nn.Linear(features, out, bias=bias, dtype=torch.float64)
            plain.load_state_dict({n: v.t() if fan and n == "weight" else v for n, v in ours.state_dict().items()})
            found, expected = outcome(ours, x), outcome(plain, x)
            assert list(found) == list(expected) and ours.weight.requires_grad
            for name, value in expected.items():
                grad = value.t() if fan and name == "weight" else value  # type: ignore[union-attr]
                close(found[name], grad, name)  # type: ignore[arg-type]


@some
@given(st.data())
def test_embedding_computes_what_loralib_computes(data: st.DataObject) -> None:
    tokens, width = data.draw(st.integers(2, 12)), data.draw(st.integers(1, 9))
    r, seed = data.draw(st.integers(0, min(tokens, width, 4))), data.draw(st.integers(0, 1000))
    options: dict[str, Any] = {"scale_grad_by_freq": data.draw(st.booleans())}
    options["padding_idx"] = data.draw(st.none() | st.integers(-tokens, tokens - 1))
    if data.draw(st.booleans()):
        options |= {
            "max_norm": data.draw(st.sampled_from([0.5, 1.0])),
            "norm_type": data.draw(st.sampled_from([1.0, 2.0])),
        }
    ids = torch.tensor(data.draw(st.lists(st.integers(0, tokens - 1), max_size=6)), dtype=torch.long)
    ids = ids.reshape(2, -1) if ids.numel() % 2 == 0 and data.draw(st.booleans()) else ids
    weight_too, clipped = data.draw(st.booleans()), "max_norm" in options
    # max_norm writes to the merged weight in eval(): loralib takes that into the frozen weight on train(), here it is forgotten
    build = lambda lib: lib.Embedding(tokens, width, r=r, lora_alpha=2, **options)  # noqa: E731
    libraries_agree(build, ids, seed, weight_too and not clipped, and_back=not clipped)


def conv_case(
    data: st.DataObject, dims: int, kernels: st.SearchStrategy[int]
) -> tuple[Callable[[Any], Any], Tensor, int]:
    groups, k, seed = data.draw(st.sampled_from([1, 1, 2, 3])), data.draw(kernels), data.draw(st.integers(0, 1000))
    into, out = groups * data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 3))
    options: dict[str, Any] = {"groups": groups, "bias": data.draw(st.booleans())}
    options |= {"stride": data.draw(st.integers(1, 2)), "padding": data.draw(st.integers(0, 2))}
    options |= {"dilation": data.draw(st.integers(1, 2)), "r": data.draw(st.integers(0, min(into, out, 2)))}
    options["padding_mode"] = data.draw(st.sampled_from(["zeros", "circular"]))
    lead = data.draw(st.sampled_from([(), (1,), (2,)]))
    x = torch.randn(*lead, into, *[6, 7, 5][:dims], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda lib: getattr(lib, f"Conv{dims}d")(into, out, k, lora_alpha=2, **options), x, seed


@some
@given(st.data())
def test_conv2d_computes_what_loralib_computes(data: st.DataObject) -> None:
    build, x, seed = conv_case(data, 2, st.integers(1, 3))
    libraries_agree(build, x, seed, data.draw(st.booleans()))


@pytest.mark.parametrize("dims", [1, 3])
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_conv1d_and_conv3d_compute_what_loralib_computes_at_kernel_1(dims: int, data: st.DataObject) -> None:
    build, x, seed = conv_case(data, dims, st.just(1))
    libraries_agree(build, x, seed, data.draw(st.booleans()))


def test_inputs_that_are_not_contiguous_give_the_same_numbers_and_gradients() -> None:
    for view in (
        lambda x: x.permute(2, 1, 0),
        lambda x: x[:, 0, 0].expand(3, 2, -1),
        lambda x: x.t() if x.dim() == 2 else x.mT,
    ):
        theirs = fill(loralib.Linear(4, 3, r=2).double(), 0)
        ours = lora.Linear(4, 3, r=2).double()
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(4, 4, 4, dtype=torch.float64)
        found = []
        for layer in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = layer(view(leaf))
            y.square().sum().backward()
            found.append([y.detach(), leaf.grad, layer.lora_A.grad, layer.lora_B.grad])
        for mine, other in zip(*found, strict=True):
            close(mine, other)


@pytest.mark.parametrize("name", ["Linear", "MergedLinear"])
def test_dropout_draws_what_loralib_draws_from_the_same_seed(name: str) -> None:
    options = {"enable_lora": [True, False, True]} if name == "MergedLinear" else {}
    theirs = fill(getattr(loralib, name)(8, 9, r=2, lora_dropout=0.4, **options), 0)
    ours = getattr(lora, name)(8, 9, r=2, lora_dropout=0.4, **options)
    ours.load_state_dict(theirs.state_dict())
    x, found = torch.randn(5, 8), []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        found.append(outcome(layer, x))
    assert not torch.equal(ours(x), ours(x))
    for key, value in found[1].items():
        assert (found[0][key] is None) == (value is None)
        if value is not None:
            close(found[0][key], value, key)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_gives_the_dtype_and_the_numbers_that_it_gives_loralib(dtype: torch.dtype) -> None:
    theirs = fill(loralib.Linear(8, 6, r=2).to(dtype), 0)
    ours = lora.Linear(8, 6, r=2).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = ours(x), theirs(x)
    assert mine.dtype == other.dtype
    close(mine, other, bar=0.02)


# --- 2, 3: the same names, the same flags, the same files


def mixed(lib: Any) -> nn.ModuleDict:
    """Every kind of layer of a library, with ordinary layers between them."""
    return nn.ModuleDict(
        {
            "embedding": lib.Embedding(11, 6, r=2, lora_alpha=3, padding_idx=0),
            "plain_embedding": nn.Embedding(11, 6),
            "linear": lib.Linear(6, 5, r=2, lora_alpha=3),
            "linear_bare": lib.Linear(6, 5, r=1, bias=False),
            "linear_fan": lib.Linear(6, 5, r=2, fan_in_fan_out=True, lora_dropout=0.1),
            "linear_r0": lib.Linear(6, 5),
            "plain_linear": nn.Linear(6, 5),
            "norm": nn.LayerNorm(6),
            "merged": lib.MergedLinear(6, 9, r=2, enable_lora=[True, False, True]),
            "merged_fan": lib.MergedLinear(6, 8, r=1, enable_lora=[False, True], fan_in_fan_out=True, bias=False),
            "merged_off": lib.MergedLinear(6, 8, r=0, enable_lora=[True, True]),
            "conv1d": lib.Conv1d(4, 6, 1, r=2, groups=2),
            "conv2d": lib.Conv2d(4, 6, 3, r=2, padding=1),
            "conv2d_grouped": lib.Conv2d(4, 6, 2, r=1, groups=2, bias=False),
            "conv3d": lib.Conv3d(4, 6, 1, r=2),
            "plain_conv": nn.Conv2d(4, 6, 3),
            "block": nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.ModuleDict({"inner": lib.Linear(6, 6, r=3)})),
        }
    )


def outputs(model: nn.ModuleDict) -> dict[str, Tensor]:
    generator, found = torch.Generator().manual_seed(5), {}
    with torch.no_grad():
        for name, layer in model.items():
            if "embedding" in name:
                x = torch.randint(0, 11, (3, 4), generator=generator)
            elif "conv" in name:
                dims = int(name[4]) if name.startswith("conv") else 2
                x = torch.randn(2, 4, *[5, 4, 3][:dims], generator=generator)
            else:
                x = torch.randn(3, 6, generator=generator)
            found[name] = layer[2]["inner"](layer[:2](x)) if name == "block" else layer(x)
    return found


def both() -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """(ours, loralib's), from the same seed."""
    found = []
    for lib in (lora, loralib):
        torch.manual_seed(0)
        found.append(mixed(lib))
    return found[0], found[1]


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(v.shape) for name, v in state.items()}


def test_the_same_seed_gives_the_same_initial_values_and_leaves_the_same_random_state() -> None:
    states = []
    for lib in (lora, loralib):
        torch.manual_seed(7)
        states.append((mixed(lib).state_dict(), torch.get_rng_state()))
    (ours, ours_after), (theirs, theirs_after) = states
    assert all(same_bits(ours[name], value) for name, value in theirs.items())
    assert torch.equal(ours_after, theirs_after)


def test_state_dict_has_loralibs_names_and_shapes_in_train_and_in_eval() -> None:
    ours, theirs = both()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    assert shapes(ours.eval().state_dict()) == shapes(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("bias", BIASES)
def test_lora_state_dict_holds_the_same_tensors(bias: str) -> None:
    ours, theirs = both()
    mine, other = lora.lora_state_dict(ours, bias), loralib.lora_state_dict(theirs, bias)
    assert shapes(mine) == shapes(other)
    assert all(same_bits(mine[n], v) for n, v in other.items())


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("before", [True, False])
def test_the_same_parameters_are_trainable(bias: str, before: bool) -> None:
    ours, theirs = both()
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    for lib, model in ((lora, ours), (loralib, theirs)):
        if not before:
            model.requires_grad_(False)
        lib.mark_only_lora_as_trainable(model, bias)
    mine = {n: p.requires_grad for n, p in ours.named_parameters()}
    assert mine == {n: p.requires_grad for n, p in theirs.named_parameters()}
    assert any(mine.values()) == (before or bias != "none")


@pytest.mark.parametrize("bias", BIASES)
def test_the_same_parameters_are_trainable_where_names_of_layers_hold_lora_or_bias(bias: str) -> None:
    flags = []
    for lib in (lora, loralib):
        layers = {"lora_head": nn.Linear(2, 2), "debias": lib.Linear(2, 2, r=1), "linear": lib.Linear(2, 2, r=1)}
        model = nn.ModuleDict(layers).requires_grad_(False)
        lib.mark_only_lora_as_trainable(model, bias)
        flags.append({n: p.requires_grad for n, p in model.named_parameters()})
    assert flags[0] == flags[1]


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("to_here", [True, False], ids=["loralib-to-here", "here-to-loralib"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_checkpoints_move_both_ways(tmp_path: Path, bias: str, to_here: bool, mode: bool) -> None:
    ours, theirs = both()
    source, target = (theirs, ours) if to_here else (ours, theirs)
    fill(source, 1, "lora_")
    if bias == "all":
        fill(source, 2, "bias")
    elif bias == "lora_only":
        for name in ("linear", "linear_fan", "merged"):
            fill(source[name], 3, "bias")
    library = loralib if to_here else lora
    torch.save(library.lora_state_dict(source, bias), tmp_path / "lora.pt")
    result = target.load_state_dict(torch.load(tmp_path / "lora.pt"), strict=False)
    assert not result.unexpected_keys and not [n for n in result.missing_keys if "lora_" in n]
    fresh = outputs(both()[0].eval())
    for model in (source, target):
        for layer in model.values():
            layer.eval()
            layer.train(mode)
    torch.manual_seed(0)
    expected = outputs(source)
    torch.manual_seed(0)
    for name, found in outputs(target).items():
        close(found, expected[name], name)
        assert name.startswith(("plain", "norm", "linear_r0", "merged_off")) or not torch.equal(found, fresh[name])


# --- 4: programs written for loralib

PROGRAM = """
import torch
from torch import nn
import torch.nn.functional as F
{import_line}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = lora.Embedding(20, 8, r=4, lora_alpha=8, padding_idx=0)
        self.qkv = lora.MergedLinear(8, 24, r=2, lora_alpha=4, lora_dropout=0.1, enable_lora=[True, False, True])
        self.norm = nn.LayerNorm(8)
        self.conv = lora.Conv2d(4, 6, 3, r=2, lora_alpha=4, padding=1)
        self.up = lora.Linear(8, 16, 4, 8, 0.1)
        self.down = lora.Linear(16, 8, r=4, fan_in_fan_out=True, bias=False)
        self.head = nn.Linear(8 + 6, 3)

    def forward(self, ids, image):
        h = self.tokens(ids)
        q, k, v = self.qkv(self.norm(h)).chunk(3, dim=-1)
        h = h + F.scaled_dot_product_attention(q, k, v)
        h = h + self.down(torch.tanh(self.up(h)))
        return self.head(torch.cat([h.mean(1), F.relu(self.conv(image)).mean((2, 3))], dim=-1))

torch.manual_seed(0)
net = Net()
base = {{k: v.clone() for k, v in net.state_dict().items()}}
lora.mark_only_lora_as_trainable(net, bias=bias)
net.head.requires_grad_(True)
optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
data = [(torch.randint(0, 20, (6, 5)), torch.randn(6, 4, 5, 5), torch.randint(0, 3, (6,))) for _ in range(4)]
losses, evaluations = [], []
for epoch in range(3):
    net.train()
    for ids, image, label in data:
        loss = F.cross_entropy(net(ids, image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    net.eval()
    with torch.no_grad():
        evaluations.append(net(*data[0][:2]))
net.train()
torch.save(lora.lora_state_dict(net, bias=bias), path)
head = net.head.state_dict()
net.eval()

again = Net()
again.load_state_dict(base, strict=False)
again.load_state_dict(torch.load(path), strict=False)
again.head.load_state_dict(head)
again.eval()
with torch.no_grad():
    evaluations.append(again(*data[0][:2]))
weights = {{k: v.detach().clone() for k, v in net.named_parameters()}}
"""


@pytest.mark.parametrize("bias", BIASES)
def test_a_program_written_for_loralib_gives_the_same_losses_after_changing_the_import_line(
    tmp_path: Path, bias: str
) -> None:
    runs = []
    for line in ("import loralib as lora", "import phinetune.lora as lora"):
        names: dict[str, Any] = {"bias": bias, "path": str(tmp_path / "lora.pt"), "__name__": "program"}
        exec(PROGRAM.format(import_line=line), names)
        runs.append(names)
    theirs, ours = runs
    assert theirs["lora"] is loralib and ours["lora"] is lora
    torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(theirs["losses"]), rtol=1e-5, atol=1e-5)
    assert ours["losses"][-1] < ours["losses"][0]
    for mine, other in zip(ours["evaluations"], theirs["evaluations"], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["evaluations"][-1], ours["evaluations"][-2], rtol=1e-5, atol=1e-5)
    assert list(ours["weights"]) == list(theirs["weights"])
    for name, value in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][name], value, rtol=1e-5, atol=1e-5)


def test_every_class_and_function_of_loralib_is_here_with_its_arguments_in_its_order() -> None:
    for name in ("Embedding", "Linear", "MergedLinear", "ConvLoRA", "Conv1d", "Conv2d", "Conv3d", "LoRALayer"):
        mine, other = getattr(lora, name), getattr(loralib, name)
        assert issubclass(mine, lora.LoRALayer)
        assert [b for b in (nn.Linear, nn.Embedding) if issubclass(other, b)] == [
            b for b in (nn.Linear, nn.Embedding) if issubclass(mine, b)
        ]
        ours = list(inspect.signature(mine.__init__).parameters.values())
        theirs = list(inspect.signature(other.__init__).parameters.values())
        theirs = [p for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
        for p, q in zip(ours, theirs, strict=False):
            assert p.name == q.name and (list(p.default) if isinstance(p.default, tuple) else p.default) == q.default
        assert len(ours) >= len(theirs)
    for name in ("mark_only_lora_as_trainable", "lora_state_dict"):
        assert list(inspect.signature(getattr(lora, name)).parameters) == list(
            inspect.signature(getattr(loralib, name)).parameters
        )


def test_merge_AB_and_zero_pad_give_what_loralibs_give() -> None:
    for fan in (False, True):
        theirs = fill(loralib.MergedLinear(5, 12, r=2, enable_lora=[True, False, True], fan_in_fan_out=fan), 0)
        ours = lora.MergedLinear(5, 12, r=2, enable_lora=[True, False, True], fan_in_fan_out=fan)
        ours.load_state_dict(theirs.state_dict())
        close(ours.merge_AB(), theirs.merge_AB())
        x = torch.randn(8, 3)
        assert torch.equal(ours.zero_pad(x), theirs.zero_pad(x))


def changed_in_place(layer: Any, x: Tensor) -> list[Tensor]:
    y = layer(x)
    y += 0.5
    y.mul_(2)[..., 0] = 0
    y = nn.ReLU(inplace=True)(y)
    y.square().sum().backward()
    return [y.detach(), layer.lora_A.grad, layer.lora_B.grad]


def evaluated_in_inference_mode(layer: Any, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        layer.eval()
        layer(x)
    x = x.requires_grad_(x.is_floating_point())
    y = layer(x)
    layer.train()
    z = layer(x)
    (y.sum() + z.sum()).backward()
    return [y.detach(), z.detach(), layer.lora_A.grad, layer.lora_B.grad]


def transformed_grad(layer: Any, x: Tensor) -> list[Tensor]:
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    call = torch.func.functional_call
    grads = torch.func.grad(lambda p: call(layer, p, (x,)).square().sum())(parameters)
    return [grads["lora_A"], grads["lora_B"]]


def gradients_of_each_example(layer: Any, x: Tensor) -> list[Tensor]:
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    call = torch.func.functional_call
    one = torch.func.grad(lambda p, row: call(layer, p, (row.unsqueeze(0),)).square().sum())
    grads = torch.func.vmap(one, in_dims=(None, 0))(parameters, x)
    return [grads["lora_A"], grads["lora_B"]]


def forward_derivative(layer: Any, x: Tensor) -> list[Tensor]:
    return list(torch.func.jvp(layer, (x,), (torch.ones_like(x),)))


def traced(layer: Any, x: Tensor) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [torch.jit.trace(layer, x)(torch.cat([x, x])).detach()]


def vectorized_jacobian(layer: Any, x: Tensor) -> list[Tensor]:
    return [torch.autograd.functional.jacobian(layer, x, vectorize=True)]


@pytest.mark.parametrize("kind", ["linear", "merged", "conv2d", "embedding"])
@pytest.mark.parametrize(
    "use",
    [
        changed_in_place,
        evaluated_in_inference_mode,
        transformed_grad,
        gradients_of_each_example,
        forward_derivative,
        vectorized_jacobian,
        traced,
    ],
    ids=lambda f: f.__name__,
)
def test_what_programs_do_with_loralibs_layers_they_can_do_with_ours(kind: str, use: Any) -> None:
    if kind == "embedding" and use in (forward_derivative, vectorized_jacobian):
        return  # no derivative by token ids
    theirs, ours = fill(both()[1][kind], 0), both()[0][kind]
    ours.load_state_dict(theirs.state_dict())
    x = {"conv2d": torch.randn(3, 4, 5, 5), "embedding": torch.tensor([[1, 2], [0, 4], [2, 2]])}.get(kind)
    x = torch.randn(3, 6) if x is None else x
    expected = use(theirs, x.clone())
    for mine, other in zip(use(ours, x.clone()), expected, strict=True):
        close(mine, other)


# --- 5: train() and eval()

Build = Callable[..., Any]
KINDS: dict[str, tuple[Build, Callable[[], Tensor]]] = {
    "linear": (lambda lib, **k: lib.Linear(6, 5, r=2, lora_alpha=3, **k), lambda: torch.randn(4, 6)),
    "linear_fan": (lambda lib, **k: lib.Linear(6, 5, r=2, fan_in_fan_out=True, **k), lambda: torch.randn(4, 6)),
    "merged": (
        lambda lib, **k: lib.MergedLinear(6, 9, r=2, enable_lora=[True, False, True], **k),
        lambda: torch.randn(4, 6),
    ),
    "merged_fan": (
        lambda lib, **k: lib.MergedLinear(6, 8, r=2, enable_lora=[False, True], fan_in_fan_out=True, **k),
        lambda: torch.randn(4, 6),
    ),
    "embedding": (lambda lib, **k: lib.Embedding(11, 6, r=2, padding_idx=0, **k), lambda: torch.randint(0, 11, (3, 4))),
    "conv2d": (lambda lib, **k: lib.Conv2d(4, 6, 3, r=2, padding=1, **k), lambda: torch.randn(2, 4, 5, 5)),
    "conv2d_grouped": (lambda lib, **k: lib.Conv2d(4, 6, 3, r=2, groups=2, **k), lambda: torch.randn(2, 4, 5, 5)),
    "conv1d": (lambda lib, **k: lib.Conv1d(4, 6, 1, r=2, **k), lambda: torch.randn(2, 4, 5)),
    "conv3d": (lambda lib, **k: lib.Conv3d(4, 6, 1, r=2, **k), lambda: torch.randn(2, 4, 3, 3, 3)),
    "unequal": (
        lambda lib, **k: lib.MergedLinear(6, 9, r=2, enable_lora=[True, False, True], slices=[5, 2, 2], **k),
        lambda: torch.randn(4, 6),
    ),
    "conv1d_wide": (lambda lib, **k: lib.Conv1d(4, 6, 3, r=2, **k), lambda: torch.randn(2, 4, 5)),
    "conv3d_wide": (lambda lib, **k: lib.Conv3d(4, 6, 2, r=2, **k), lambda: torch.randn(2, 4, 3, 3, 3)),
}
ALL, LORALIBS = list(KINDS), list(KINDS)[:9]


def made(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, lib: Any = lora, **options: Any) -> Any:
    return fill(KINDS[kind][0](lib, **options), seed).to(dtype)


def sample(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(9)
    x = KINDS[kind][1]()
    return x.to(dtype) if x.is_floating_point() else x


def weight_of(layer: Any) -> Tensor:
    return getattr(layer, "conv", layer).weight


def within_rounding(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == theirs.dtype
    close(ours.double(), theirs.double(), bar=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ALL)
def test_fifty_rounds_of_eval_and_train_leave_every_bit_of_the_weight(kind: str, dtype: torch.dtype) -> None:
    layer, x = made(kind, dtype=dtype), sample(kind, dtype)
    before = {n: v.clone() for n, v in layer.state_dict().items()}
    expected = layer(x).detach()
    for i in range(50):
        layer.eval()
        assert layer.merged and not same_bits(weight_of(layer), before["conv.weight" if "conv" in kind else "weight"])
        if i % 10 == 0:
            layer.eval()  # twice is once
            within_rounding(layer(x).detach(), expected, dtype)
        layer.train()
        if i % 10 == 0:
            layer.train()
            assert same_bits(layer(x).detach(), expected)
    after = layer.state_dict()
    assert list(after) == list(before) and all(same_bits(after[n], v) for n, v in before.items())


def test_the_same_rounds_make_loralibs_linear_layer_drift_in_bfloat16() -> None:
    layer = made("linear", dtype=torch.bfloat16, lib=loralib)
    before = layer.weight.detach().clone()
    for _ in range(50):
        layer.eval(), layer.train()
    assert not same_bits(layer.weight, before)


@pytest.mark.parametrize("kind", LORALIBS)
def test_in_eval_the_weight_is_the_merged_one(kind: str) -> None:
    theirs, ours = made(kind, lib=loralib), made(kind)
    before = weight_of(ours).detach().clone()
    theirs.eval(), ours.eval()
    close(weight_of(ours), weight_of(theirs), bar=3e-7)
    assert (weight_of(ours) - before).abs().max() > 0.1 and weight_of(ours).shape == before.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ALL)
def test_a_merged_weight_is_rounded_only_once(kind: str, dtype: torch.dtype) -> None:
    merged = weight_of(made(kind, dtype=dtype).eval()).double()
    exact = weight_of(made(kind, dtype=dtype).double().eval())
    half = torch.finfo(dtype).eps / 2
    assert ((merged - exact).abs() <= 1.001 * half * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("kind", ALL)
def test_without_merge_weights_eval_changes_no_weight(kind: str) -> None:
    layer, x = made(kind, merge_weights=False), sample(kind)
    before, expected = weight_of(layer).detach().clone(), layer(x)
    layer.eval()
    assert not layer.merged and same_bits(weight_of(layer), before) and same_bits(layer(x), expected)


@pytest.mark.parametrize("kind", ALL)
def test_factors_changed_in_eval_do_not_reach_the_weight_that_train_brings_back(kind: str) -> None:
    layer = made(kind)
    before = weight_of(layer).detach().clone()
    layer.eval()
    fill(layer, 5, "lora_")
    assert same_bits(weight_of(layer.train()), before)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("part", ["whole", "lora"])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_in_eval_gives_the_outputs_of_a_freshly_loaded_model(kind: str, part: str, assign: bool) -> None:
    state = made(kind, 1).state_dict()
    state = {n: v.clone() for n, v in state.items() if part == "whole" or "lora_" in n}
    layer, fresh, x = made(kind).eval(), made(kind), sample(kind)
    old = layer(x)
    layer.load_state_dict({n: v.clone() for n, v in state.items()}, strict=part == "whole", assign=assign)
    fresh.load_state_dict(state, strict=part == "whole")
    assert same_bits(layer(x), fresh.eval()(x)) and not torch.equal(layer(x), old)
    assert same_bits(weight_of(layer.train()), weight_of(fresh.train())) and same_bits(layer(x), fresh(x))


@pytest.mark.parametrize("kind", ALL)
def test_a_failed_load_in_eval_keeps_the_layer_merged_and_its_weight(kind: str) -> None:
    layer, x = made(kind).eval(), sample(kind)
    merged = layer(x)
    with pytest.raises(RuntimeError):
        layer.load_state_dict({"lora_A": torch.zeros(1, 1)})
    assert layer.merged and same_bits(layer(x), merged)
    assert same_bits(weight_of(layer.train()), weight_of(made(kind)))


@pytest.mark.parametrize("kind", LORALIBS)
def test_a_state_dict_taken_in_eval_loads_in_eval_to_the_same_outputs_as_in_loralib(kind: str) -> None:
    x = sample(kind)
    for lib in (loralib, lora):
        layer, other = made(kind, lib=lib), made(kind, 1, lib=lib)
        layer.eval(), other.eval()
        expected = layer(x)
        state = copy.deepcopy(layer.state_dict())
        other.load_state_dict(state)
        close(other(x), expected, f"{lib.__name__}, another model")
        layer.load_state_dict(state)
        close(layer(x), expected, f"{lib.__name__}, the same model")


def test_a_weight_shared_by_an_embedding_and_a_head_survives_eval_and_train() -> None:
    embedding, head = lora.Embedding(9, 6, r=2), lora.Linear(6, 9, r=2)
    head.weight = embedding.weight
    model = nn.Sequential(fill(embedding, 0), fill(head, 1))
    before = embedding.weight.detach().clone()
    for _ in range(3):
        model.eval()
        model.train()
    assert same_bits(embedding.weight, before)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_merged_layer_works_and_is_independent(kind: str, how: str) -> None:
    layer, x = made(kind).eval(), sample(kind)
    expected, before = layer(x), weight_of(made(kind))
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert same_bits(twin(x), expected) and twin.merged
    twin.load_state_dict(made(kind, 1).state_dict())
    assert same_bits(twin(x), made(kind, 1).eval()(x))
    assert same_bits(layer(x), expected) and same_bits(weight_of(layer.train()), before)
    assert same_bits(weight_of(twin.train()), weight_of(made(kind, 1)))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_changing_the_dtype_of_a_merged_layer_works(kind: str, dtype: torch.dtype) -> None:
    layer, x = made(kind).eval().to(dtype), sample(kind, dtype)
    assert layer(x).dtype == dtype and layer.merged
    coarse = dtype if dtype is not torch.float64 else torch.float32
    within_rounding(layer(x), made(kind).to(dtype)(x), coarse)
    layer.train()
    assert same_bits(weight_of(layer), weight_of(made(kind)).to(dtype))
    assert same_bits(layer(x), made(kind).to(dtype)(x))


# --- 6: rank 0, and what is refused


@pytest.mark.parametrize("kind", ALL)
def test_rank_0_is_a_plain_trainable_layer(kind: str) -> None:
    full = made(kind)
    if kind.startswith("conv"):
        conv = full.conv
        options = {n: getattr(conv, n) for n in ("kernel_size", "stride", "padding", "groups")}
        layer: Any = lora.ConvLoRA(type(conv), conv.in_channels, conv.out_channels, **options)
        plain: Any = type(conv)(conv.in_channels, conv.out_channels, **options)
    elif kind == "embedding":
        layer, plain = lora.Embedding(11, 6, padding_idx=0), nn.Embedding(11, 6, padding_idx=0)
    else:
        fan, out = full.fan_in_fan_out, full.out_features
        patterns = {"enable_lora": full.enable_lora, "slices": full.slices} if hasattr(full, "slices") else {}
        layer = type(full)(6, out, r=0, fan_in_fan_out=fan, **patterns)
        plain = nn.Linear(6, out)
    inner = getattr(layer, "conv", layer)
    fan = getattr(layer, "fan_in_fan_out", False)
    assert not [n for n in layer.state_dict() if "lora_" in n] and all(p.requires_grad for p in layer.parameters())
    plain.load_state_dict({n: v.t() if fan and n == "weight" else v for n, v in inner.state_dict().items()})
    x, before = sample(kind), inner.weight.detach().clone()
    for mode in (True, False, True):
        layer.train(mode)
        found, expected = outcome(layer, x), outcome(plain, x)
        assert torch.equal(found["output"], expected["output"])  # type: ignore[arg-type]
        grad = inner.weight.grad.t() if fan else inner.weight.grad
        close(grad, plain.weight.grad)
        assert same_bits(inner.weight, before)


WRONG: dict[str, Callable[[], Any]] = {
    "negative rank, linear": lambda: lora.Linear(4, 4, r=-1),
    "negative rank, merged": lambda: lora.MergedLinear(4, 4, r=-1, enable_lora=[True]),
    "negative rank, embedding": lambda: lora.Embedding(4, 4, r=-2),
    "negative rank, conv1d": lambda: lora.Conv1d(4, 4, 1, r=-1),
    "negative rank, conv2d": lambda: lora.Conv2d(4, 4, 3, r=-1),
    "negative rank, conv3d": lambda: lora.Conv3d(4, 4, 1, r=-1),
    "rank 2.0": lambda: lora.Linear(4, 4, r=2.0),  # type: ignore[arg-type]
    "rank 1.5": lambda: lora.Conv2d(4, 4, 3, r=1.5),
    "rank True": lambda: lora.Embedding(4, 4, r=True),
    "rank '2'": lambda: lora.MergedLinear(4, 4, r="2", enable_lora=[True]),  # type: ignore[arg-type]
    "rank None": lambda: lora.Linear(4, 4, r=None),  # type: ignore[arg-type]
    "enable_lora does not divide": lambda: lora.MergedLinear(4, 10, r=2, enable_lora=[True, False, True]),
    "enable_lora does not divide, rank 0": lambda: lora.MergedLinear(4, 10, enable_lora=[True, False, True]),
    "enable_lora empty": lambda: lora.MergedLinear(4, 4, r=2, enable_lora=[]),
    "enable_lora of numbers": lambda: lora.MergedLinear(4, 4, r=2, enable_lora=[1, 0]),  # type: ignore[list-item]
    "slices too few rows": lambda: lora.MergedLinear(4, 10, r=2, enable_lora=[True, False], slices=[4, 4]),
    "slices too many rows": lambda: lora.MergedLinear(4, 10, r=2, enable_lora=[True, False], slices=[8, 4]),
    "slice of no rows": lambda: lora.MergedLinear(4, 10, r=2, enable_lora=[True, False], slices=[10, 0]),
    "slice of negative rows": lambda: lora.MergedLinear(4, 10, r=2, enable_lora=[True, False], slices=[12, -2]),
    "more slices": lambda: lora.MergedLinear(4, 9, r=2, enable_lora=[True, False], slices=[3, 3, 3]),
    "fewer slices": lambda: lora.MergedLinear(4, 9, r=2, enable_lora=[True, False, True], slices=[6, 3]),
    "no slices": lambda: lora.MergedLinear(4, 9, r=2, enable_lora=[True], slices=[]),
    "dropout 1.0, linear": lambda: lora.Linear(4, 4, r=2, lora_dropout=1.0),
    "dropout 1.0, merged": lambda: lora.MergedLinear(4, 4, r=2, lora_dropout=1.0, enable_lora=[True]),
    "dropout 1.0, conv2d": lambda: lora.Conv2d(4, 4, 3, r=2, lora_dropout=1.0),
    "dropout below 0": lambda: lora.Linear(4, 4, r=2, lora_dropout=-0.1),
    "dropout not a number": lambda: lora.Linear(4, 4, r=2, lora_dropout=float("nan")),
    "bias mode to mark": lambda: lora.mark_only_lora_as_trainable(nn.Linear(2, 2), "some"),
    "bias mode to save": lambda: lora.lora_state_dict(nn.Linear(2, 2), "lora"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_is_refused_with_an_error_that_says_what_was_found(wrong: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        wrong()
    assert caught.value.problems[0]


def test_an_unknown_bias_mode_changes_no_flag() -> None:
    model = nn.Sequential(nn.Linear(2, 2), lora.Linear(2, 2, r=1))
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ConfigError, match="lora_only"):
        lora.mark_only_lora_as_trainable(model, "sometimes")
    assert [p.requires_grad for p in model.parameters()] == before


# --- 7: unequal slices


def separate(layer: Any) -> list[Any]:
    """One layer a slice, with the slice's part of W, b, A and B."""
    found, a, b, row = [], 0, 0, 0
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    for width, on in zip(layer.slices, layer.enable_lora, strict=True):
        part: Any = lora.Linear(layer.in_features, width, r=layer.r if on else 0, lora_alpha=layer.lora_alpha).to(
            weight
        )
        part.weight.data.copy_(weight[row : row + width])
        part.weight.requires_grad = layer.weight.requires_grad
        part.bias.data.copy_(layer.bias[row : row + width])
        if on:
            part.lora_A.data.copy_(layer.lora_A[a : a + layer.r])
            part.lora_B.data.copy_(layer.lora_B[b : b + width])
            a, b = a + layer.r, b + width
        found.append(part)
        row += width
    return found


@some
@given(st.data())
def test_unequal_slices_are_separate_layers_side_by_side(data: st.DataObject) -> None:
    r, features = data.draw(st.integers(1, 2)), data.draw(st.integers(2, 7))
    widths = data.draw(st.lists(st.integers(2, 8), min_size=1, max_size=5))
    pattern = data.draw(st.lists(st.booleans(), min_size=len(widths), max_size=len(widths)).filter(any))
    fan, weight_too, seed = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(0, 1000))
    options: dict[str, Any] = {"r": r, "lora_alpha": 3, "enable_lora": pattern, "slices": widths, "fan_in_fan_out": fan}
    layer = fill(lora.MergedLinear(features, sum(widths), **options).double(), seed)
    layer.weight.requires_grad = weight_too
    parts = separate(layer)
    x = torch.randn(2, 3, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(x), torch.cat([part(other) for part in parts], dim=-1)
    close(y, expected)
    g = torch.randn_like(y)
    y.backward(g), expected.backward(g)
    close(x.grad, other.grad)  # type: ignore[arg-type]
    adapted = [part for part, on in zip(parts, pattern, strict=True) if on]
    close(layer.lora_A.grad, torch.cat([part.lora_A.grad for part in adapted]))
    close(layer.lora_B.grad, torch.cat([part.lora_B.grad for part in adapted]))
    close(layer.bias.grad, torch.cat([part.bias.grad for part in parts]))
    if weight_too:
        grad = torch.cat([part.weight.grad for part in parts])
        close(layer.weight.grad, grad.t() if fan else grad)
    else:
        assert layer.weight.grad is None
    close(layer.eval()(x), expected)


@pytest.mark.parametrize("fan", [False, True])
def test_only_enabled_slices_change_and_only_they_give_gradients(fan: bool) -> None:
    layer = lora.MergedLinear(6, 16, r=2, enable_lora=[True, False, True], slices=[8, 4, 4], fan_in_fan_out=fan)
    layer = fill(layer, 0)
    assert layer.lora_A.shape == (4, 6) and layer.lora_B.shape == (12, 2)
    x = torch.randn(5, 6)
    plain = F.linear(x, layer.weight.t() if fan else layer.weight, layer.bias)
    changed = (layer(x) - plain).abs().amax(0) > 0
    assert changed.tolist() == [True] * 8 + [False] * 4 + [True] * 4
    merged = layer.merge_AB().t() if fan else layer.merge_AB()
    assert (merged.abs().amax(1) > 0).tolist() == changed.tolist()
    for columns, a_rows, b_rows in (((0, 8), (0, 2), (0, 8)), ((8, 12), (0, 0), (0, 0)), ((12, 16), (2, 4), (8, 12))):
        layer.zero_grad(set_to_none=True)
        layer(x)[:, slice(*columns)].square().sum().backward()
        for grad, rows in ((layer.lora_A.grad, a_rows), (layer.lora_B.grad, b_rows)):
            reached = (grad.abs().amax(1) > 0).nonzero().flatten().tolist()
            assert reached == list(range(*rows))


# --- 8: loralib's files


class Code:
    """An object that opens a file for writing when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


def net(lib: Any = lora) -> nn.ModuleDict:
    return nn.ModuleDict({"up": lib.Linear(6, 5, r=2), "plain": nn.Linear(5, 5), "conv": lib.Conv2d(4, 6, 3, r=2)})


def saved(model: nn.Module, path: Path, lib: Any = lora, bias: str = "none", **options: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = lib.lora_state_dict(model, bias)
    torch.save(state, path, **options)
    return state


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_file_written_by_loralib_is_read_and_loaded(tmp_path: Path, bias: str, zipped: bool, mode: bool) -> None:
    path = tmp_path / "lora.pt"
    source = fill(net(loralib), 1)
    state = saved(source, path, loralib, bias, _use_new_zipfile_serialization=zipped)
    found = lora.read_lora_state_dict(path)
    assert list(found) == list(state) and all(same_bits(found[n], v) for n, v in state.items())
    assert list(lora.read_lora_state_dict(str(path))) == list(state)
    model = fill(net(), 2).train(mode)
    frozen = {n: v.clone() for n, v in model.train().state_dict().items() if n not in state}
    model.train(mode)
    lora.load_lora_state_dict(model, path)
    assert all(layer.merged != mode for layer in (model["up"], model["conv"]))
    fresh = fill(net(), 2)
    fresh.load_state_dict(state, strict=False)
    x = torch.randn(3, 6)
    assert same_bits(model["up"](x), fresh.train(mode)["up"](x))
    after = model.train().state_dict()
    assert all(same_bits(after[n], v) for n, v in (frozen | state).items()) and set(after) == set(frozen | state)


def test_a_bfloat16_file_loads_into_a_float32_model(tmp_path: Path) -> None:
    source = fill(net(), 1).bfloat16()
    saved(source, tmp_path / "lora.pt")
    model = net()
    lora.load_lora_state_dict(model, tmp_path / "lora.pt")
    assert same_bits(model["up"].lora_A, source["up"].lora_A.float())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["torch", "torch, old format", "pickle"])
@pytest.mark.parametrize("where", ["alone", "beside tensors", "as a name"])
def test_a_file_with_code_in_it_is_refused_by_name_and_the_code_does_not_run(
    tmp_path: Path, form: str, where: str
) -> None:
    path, marker = tmp_path / "lora.pt", tmp_path / "ran"
    code, tensors = Code(marker), {"up.lora_A": torch.zeros(2, 6)}
    content: Any = {"alone": code, "beside tensors": {**tensors, "x": code}, "as a name": {**tensors, code: 1}}[where]
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    for read in (lora.read_lora_state_dict, lambda p: lora.load_lora_state_dict(net(), p)):
        with pytest.raises(AdapterError) as caught:
            read(path)
        assert str(path) in str(caught.value) and not marker.exists()
    if form == "torch" and where != "as a name":
        torch.load(path, weights_only=False)
        assert marker.exists()  # so the file was dangerous


def damaged(content: bytes) -> Iterator[bytes]:
    """`content` cut off at many places."""
    for stop in sorted({*range(24), *range(24, len(content), max(1, len(content) // 60)), len(content) - 1}):
        yield content[:stop]


def spoiled(content: bytes) -> Iterator[bytes]:
    """`content` with one byte changed."""
    rng = random.Random(0)
    for _ in range(300):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] = rng.randrange(256)
        yield bytes(changed)


def noise(content: bytes) -> Iterator[bytes]:
    rng = random.Random(0)
    for _ in range(300):
        yield rng.randbytes(rng.randrange(0, 50))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("zipped", "harm"),
    [(True, damaged), (True, spoiled), (False, damaged), (False, spoiled), (False, noise)],
    ids=["zip cut off", "zip with one byte changed", "old format cut off", "old format with one byte changed", "noise"],
)
def test_a_damaged_file_is_refused_with_an_error_that_names_it_and_nothing_else_escapes(
    tmp_path: Path, zipped: bool, harm: Callable[[bytes], Iterator[bytes]]
) -> None:
    path, good = tmp_path / "lora.pt", tmp_path / "good.pt"
    state = saved(fill(net(), 1), good, _use_new_zipfile_serialization=zipped)
    escaped: dict[str, int] = {}
    for content in harm(good.read_bytes()):
        path.write_bytes(content)
        try:
            found = lora.read_lora_state_dict(path)
        except AdapterError as error:
            assert str(path) in str(error) and all(error.problems)
        except Exception as error:
            key = f"{type(error).__name__}: {error}"[:60]
            escaped[key] = escaped.get(key, 0) + 1
        else:
            assert harm is spoiled, f"{len(content)} bytes read as {list(found)} of {list(state)}"
    assert not escaped


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "none.pt" if what == "missing" else tmp_path
    for read in (lora.read_lora_state_dict, lambda p: lora.load_lora_state_dict(net(), p)):
        with pytest.raises(AdapterError, match="no such file") as caught:
            read(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [[], None, "x", torch.zeros(2), {"a": 1}, {1: torch.zeros(2)}, {"state": {"a": torch.zeros(2)}}]
)
def test_a_file_of_something_else_than_tensors_by_name_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "lora.pt")
    with pytest.raises(AdapterError, match=r"lora\.pt"):
        lora.read_lora_state_dict(tmp_path / "lora.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 6).to(torch.float8_e4m3fn),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
    ],
    ids=["float8", "sparse", "meta"],
)
def test_a_file_of_unusual_tensors_is_read_or_refused_with_an_error_that_names_it(
    tmp_path: Path, tensor: Tensor
) -> None:
    torch.save({"up.lora_A": tensor}, tmp_path / "lora.pt")
    try:
        lora.read_lora_state_dict(tmp_path / "lora.pt")
    except AdapterError as error:
        assert "lora.pt" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_the_names_of_their_tensors(tmp_path: Path, value: float) -> None:
    model = fill(net(), 1)
    model["up"].lora_B.data[1, 1] = value
    model["conv"].lora_A.data[0, 0] = value
    saved(model, tmp_path / "lora.pt")
    target = net()
    before = {n: v.clone() for n, v in target.state_dict().items()}
    with pytest.raises(AdapterError) as caught:
        lora.load_lora_state_dict(target, tmp_path / "lora.pt")
    named = [problem.split(":")[0] for problem in caught.value.problems]
    assert named == ["up.lora_B", "conv.lora_A"] and "lora.pt" in str(caught.value)
    assert all(same_bits(target.state_dict()[n], v) for n, v in before.items())


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_missing_unexpected_and_misshaped_tensors_are_named_in_one_error_and_nothing_is_loaded(
    tmp_path: Path, mode: bool
) -> None:
    state = lora.lora_state_dict(fill(net(), 1))
    del state["up.lora_A"]
    state |= {"up.lora_B": torch.zeros(5, 3), "down.lora_A": torch.zeros(2, 2), "down.lora_B": torch.zeros(2, 2)}
    del state["conv.lora_B"]
    torch.save(state, tmp_path / "lora.pt")
    model = net().train(mode)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(AdapterError) as caught:
        lora.load_lora_state_dict(model, tmp_path / "lora.pt")
    named = sorted(problem.split(":")[0] for problem in caught.value.problems)
    assert named == ["conv.lora_B", "down.lora_A", "down.lora_B", "up.lora_A", "up.lora_B"]
    assert "(5, 3)" in str(caught.value) and "(5, 2)" in str(caught.value) and "lora.pt" in str(caught.value)
    assert all(same_bits(model.state_dict()[n], v) for n, v in before.items())
    assert model["up"].merged != mode


# --- 9: kernels that loralib cannot run, and derivatives

WIDE: list[tuple[int, Any, dict[str, Any]]] = [
    (1, 2, {}),
    (1, 3, {"padding": 1, "stride": 2}),
    (1, 5, {"padding": 2, "groups": 2, "bias": False}),
    (1, 3, {"dilation": 2, "padding": "same"}),
    (2, (2, 3), {}),
    (2, (3, 1), {"groups": 2, "padding": (1, 0)}),
    (3, 2, {"stride": 2}),
    (3, 3, {"padding": 1, "groups": 2}),
    (3, (1, 2, 3), {"bias": False}),
]


@pytest.mark.parametrize(("dims", "kernel", "options"), WIDE)
@pytest.mark.parametrize("unbatched", [False, True])
def test_kernels_that_loralib_cannot_run_work_and_merge(
    dims: int, kernel: Any, options: dict[str, Any], unbatched: bool
) -> None:
    layer: Any = fill(getattr(lora, f"Conv{dims}d")(4, 6, kernel, r=2, lora_alpha=4, **options), 0)
    plain = getattr(nn, f"Conv{dims}d")(4, 6, kernel, **options)
    plain.load_state_dict(layer.conv.state_dict())
    sizes = plain.kernel_size
    assert layer.lora_A.shape == (2 * sizes[-1], 4 * sizes[-1])
    x = torch.randn(*([] if unbatched else [2]), 4, *[6, 5, 7][:dims])
    y, base = layer(x), plain(x)
    assert y.shape == base.shape and (y - base).abs().max() > 0.1
    y.sum().backward()
    assert layer.lora_A.grad.abs().min() > 0 and layer.lora_B.grad is not None and layer.conv.weight.grad is None
    before = layer.conv.weight.detach().clone()
    close(layer.eval()(x), y, bar=1e-5)
    close(layer.conv.weight - before, layer.delta(), bar=1e-5)
    assert same_bits(layer.train().conv.weight, before)


def called(layer: Any, names: list[str]) -> Callable[..., Tensor]:
    """layer(x) as a function of x and the parameters called `names`."""
    return lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))


def leaves(layer: Any) -> tuple[list[str], list[Tensor]]:
    names = [n for n, _ in layer.named_parameters()]
    return names, [p.detach().clone().requires_grad_() for _, p in layer.named_parameters()]


SMALL: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "conv1d": (lambda: lora.Conv1d(2, 2, 2, r=1, lora_alpha=2), (1, 2, 3)),
    "conv1d, kernel 1": (lambda: lora.Conv1d(2, 2, 1, r=2, bias=False), (2, 2, 2)),
    "conv2d": (lambda: lora.Conv2d(2, 2, 2, r=1, lora_alpha=2, padding=1, stride=2), (1, 2, 2, 2)),
    "conv2d, groups": (lambda: lora.Conv2d(2, 4, (2, 1), r=1, groups=2), (1, 2, 3, 1)),
    "conv3d": (lambda: lora.Conv3d(1, 2, 2, r=1, lora_alpha=2), (1, 1, 2, 2, 3)),
}


@pytest.mark.parametrize(("build", "size"), SMALL.values(), ids=SMALL.keys())
def test_gradients_of_convolutions_are_right(build: Callable[[], Any], size: tuple[int, ...]) -> None:
    layer = fill(build().double(), 0)
    names, values = leaves(layer)
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(called(layer, names), (x, *values))


LINEARS: dict[str, Callable[[], Any]] = {
    "linear": lambda: lora.Linear(3, 4, r=2, lora_alpha=3),
    "linear, no bias": lambda: lora.Linear(3, 2, r=1, bias=False),
    "linear, fan": lambda: lora.Linear(3, 2, r=2, fan_in_fan_out=True),
    "merged": lambda: lora.MergedLinear(3, 6, r=1, lora_alpha=3, enable_lora=[True, False, True]),
    "merged, unequal": lambda: lora.MergedLinear(2, 6, r=1, enable_lora=[False, True, True], slices=[1, 2, 3]),
    "merged, fan": lambda: lora.MergedLinear(2, 4, r=2, enable_lora=[True, True], fan_in_fan_out=True),
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("build", LINEARS.values(), ids=LINEARS.keys())
def test_first_and_second_derivatives_of_linear_layers_are_right(build: Callable[[], Any], frozen: bool) -> None:
    layer = fill(build().double(), 0, std=0.7)
    names, values = leaves(layer)
    if frozen:
        kept = [i for i, name in enumerate(names) if "lora_" in name]
        names, values = [names[i] for i in kept], [values[i] for i in kept]
    x = torch.randn(2, 1, layer.in_features, dtype=torch.float64, requires_grad=True)
    function = called(layer, names)
    assert torch.autograd.gradcheck(function, (x, *values))
    assert torch.autograd.gradgradcheck(function, (x, *values))


def test_gradients_of_an_embedding_are_right() -> None:
    layer = fill(lora.Embedding(4, 3, r=2, lora_alpha=3, padding_idx=1).double(), 0)
    ids = torch.tensor([[0, 2, 2], [3, 0, 0]])
    values = [p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B)]

    def function(A: Tensor, B: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (ids,))
        return result

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


def test_a_file_in_memory_of_the_whole_state_dict_moves_to_loralib_too() -> None:
    ours, theirs = both()
    buffer = io.BytesIO()
    torch.save(fill(ours, 4).state_dict(), buffer)
    buffer.seek(0)
    theirs.load_state_dict(torch.load(buffer))
    for model in (ours, theirs):
        for layer in model.values():
            layer.eval()
    expected = outputs(theirs)
    for name, found in outputs(ours).items():
        close(found, expected[name], name)


@pytest.mark.parametrize(
    "build",
    [lambda m: m.Linear(16, 2, r=4), lambda m: m.Conv2d(1, 8, 3, r=4), lambda m: m.Embedding(3, 8, r=4)],
    ids=["small head", "grey image", "few words"],
)
def test_a_rank_above_the_layers_own_is_built_as_loralib_builds_it(build: Callable[[Any], Any]) -> None:
    theirs, ours = build(loralib), build(lora)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
