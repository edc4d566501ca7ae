"""Cross-entropy in chunks: the value and the gradients of the reference, and never the logits of all tokens."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import phinetune.training.cross_entropy as cross_entropy
from phinetune.data.batches import padded_batch, tree_batch
from phinetune.lora.config import LoraConfig
from phinetune.lora.injection import inject
from phinetune.lora.layer import lora_layers
from phinetune.training import loss as loss_module
from phinetune.training.cross_entropy import (
    checkpointed_cross_entropy,
    chunk_rows,
    chunked_cross_entropy,
    summed_cross_entropy,
)
from phinetune.training.loss import can_make_loss, learned_positions, supervised_loss
from zoo import zoo_model

N, V, H = 23, 57, 12


def head_of(dtype: torch.dtype = torch.float32, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """hidden (N, H), weight (V, H), bias (V), all with gradients, and targets (N)."""
    g = torch.Generator().manual_seed(5)
    hidden, weight, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in [(N, H), (V, H), (V,)])
    targets = torch.randint(0, V, (N,), generator=g)
    targets[3] = int((weight @ hidden[3]).argmin())  # one that is as unlikely as it gets
    found = [t.to(dtype).requires_grad_() for t in (hidden, weight, b)]
    return found[0], found[1], found[2] if bias else None, targets


def gradients_of(loss: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [t for t in inputs if t is not None]))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_the_derivative_of_the_value(smoothing: float, bias: bool) -> None:
    hidden, weight, b, targets = head_of(torch.float64, bias)
    assert torch.autograd.gradcheck(
        lambda *head: chunked_cross_entropy(*head, targets, smoothing, chunk=5), (hidden, weight, b), fast_mode=True
    )


@pytest.mark.parametrize("chunk", [1, 5, N - 1, N, 10 * N, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_the_reference(
    chunk: int | None, smoothing: float, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    hidden, weight, b, targets = head_of(dtype, bias)
    theirs = summed_cross_entropy(nn.functional.linear(hidden, weight, b), targets, smoothing)
    ours = chunked_cross_entropy(hidden, weight, b, targets, smoothing, chunk)
    assert ours.dtype == dtype and ours.shape == ()
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    for mine, other in zip(
        gradients_of(ours * 0.3, hidden, weight, b), gradients_of(theirs * 0.3, hidden, weight, b), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bfloat16_is_as_near_to_float64_as_the_reference(chunk: int | None, smoothing: float) -> None:
    exact = head_of(torch.float64, bias=True)
    rough = [t.detach().bfloat16().requires_grad_() for t in exact[:3] if t is not None]
    exact = (*(t.detach().double().requires_grad_() for t in rough), exact[3])  # type: ignore[assignment]
    wanted = gradients_of(summed_cross_entropy(nn.functional.linear(*exact[:3]), exact[3], smoothing), *exact[:3])
    theirs = summed_cross_entropy(nn.functional.linear(*rough), exact[3], smoothing)
    ours = chunked_cross_entropy(*rough, exact[3], smoothing, chunk)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # the same bfloat16 logits
    for mine, other, best in zip(gradients_of(ours, *rough), gradients_of(theirs, *rough), wanted, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - best).norm() <= 1.2 * (other - best).norm() + 1e-3 * best.norm()


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, bias, targets = head_of(bias=True)
    frozen = chunked_cross_entropy(hidden, weight.detach(), None, targets, 0.0, 5)
    assert sum(t is not None for t in frozen.grad_fn.saved_tensors) == 1  # type: ignore[union-attr]
    head_only = chunked_cross_entropy(hidden.detach(), weight, bias, targets, 0.0, 5)
    head_only.backward()
    assert hidden.grad is None and weight.grad is not None and bias is not None and bias.grad is not None
    with torch.no_grad():
        value = chunked_cross_entropy(hidden, weight, bias, targets, 0.0, 5)
    assert not value.requires_grad
    torch.testing.assert_close(value, head_only.detach(), rtol=1e-6, atol=0)


def test_the_passes_over_few_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = head_of(torch.float64)
    whole = chunked_cross_entropy(hidden, weight, bias, targets, 0.1)
    monkeypatch.setattr(cross_entropy, "_CACHED_BYTES", 3 * V * 8)
    pieces = chunked_cross_entropy(hidden, weight, bias, targets, 0.1)
    torch.testing.assert_close(pieces, whole, rtol=1e-14, atol=0)
    for a, b in zip(gradients_of(pieces, hidden, weight), gradients_of(whole, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 5, N])
def test_any_head_in_checkpointed_chunks_equals_the_reference(chunk: int, smoothing: float) -> None:
    hidden, weight, bias, targets = head_of(torch.float64, bias=True)
    ours = checkpointed_cross_entropy(
        lambda x: torch.tanh(nn.functional.linear(x, weight, bias)), hidden, targets, smoothing, chunk
    )
    theirs = summed_cross_entropy(torch.tanh(nn.functional.linear(hidden, weight, bias)), targets, smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(gradients_of(ours, hidden, weight, bias), gradients_of(theirs, hidden, weight, bias), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_under_autocast_the_product_has_its_dtype() -> None:
    hidden, weight, bias, targets = head_of(bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = summed_cross_entropy(nn.functional.linear(hidden, weight, bias), targets)
        ours = chunked_cross_entropy(hidden, weight, bias, targets, chunk=5)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for a, b in zip(gradients_of(ours, hidden, weight, bias), gradients_of(theirs, hidden, weight, bias), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 1e-2 * b.norm()


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    hidden, weight, bias, targets = head_of()
    for wrong in (-5, V):
        targets[2] = wrong
        with pytest.raises((IndexError, RuntimeError)):
            chunked_cross_entropy(hidden, weight, bias, targets)


@pytest.mark.skipif(cross_entropy.library() is None, reason="the compiled function was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "words"), [(1, 1), (7, 511), (5, 512), (40, 1500)])
def test_the_compiled_rows_are_the_reference(rows: int, words: int, smoothing: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(words)
    logits = (6 * torch.randn(rows, words, generator=g)).to(dtype)
    targets = torch.randint(0, words, (rows,), generator=g)
    targets[rows // 2] = -100 if rows > 1 else 0
    if rows > 6:
        logits[3, 2], logits[5, 1] = float("nan"), -float("inf")
    for gradient in (True, False):
        ours, theirs = logits.clone(), logits.clone()
        losses = cross_entropy.cross_entropy_rows(ours, targets, smoothing, gradient)
        expected = cross_entropy.losses_reference(theirs, targets, smoothing, gradient)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        if gradient:
            torch.testing.assert_close(
                ours, theirs, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6, equal_nan=True
            )
        else:
            assert torch.equal(ours.nan_to_num(9), logits.nan_to_num(9))


@pytest.mark.skipif(cross_entropy.library() is None, reason="the compiled function was not built")
def test_compiled_rows_with_a_wrong_target_are_left_as_they_were() -> None:
    logits = torch.randn(4, 9)
    kept = logits.clone()
    with pytest.raises(IndexError, match="9 classes"):
        cross_entropy.cross_entropy_rows(logits, torch.tensor([1, 2, 9, 3]), 0.0, True)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_a_masked_row_is_not_counted_and_gets_no_gradient(chunk: int, smoothing: float) -> None:
    hidden, weight, bias, targets = head_of(bias=True)
    keep = torch.arange(len(targets)) % 4 != 1
    expected = summed_cross_entropy(nn.functional.linear(hidden[keep], weight, bias), targets[keep], smoothing)
    ours = chunked_cross_entropy(hidden, weight, bias, targets.where(keep, -100), smoothing, chunk)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    for a, b in zip(
        gradients_of(ours, hidden, weight, bias), gradients_of(expected, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_rows_of_a_chunk() -> None:
    assert chunk_rows(49152, torch.bfloat16) == 682 and chunk_rows(32064, torch.float32) == 523
    assert chunk_rows(10**9, torch.float32) == 1


# ---- in a model


def rows(seed: int = 0) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for length, answer in [(9, 4), (12, 7), (7, 3)]:
        ids = torch.randint(2, 120, (length,), generator=g).tolist()
        out.append({"input_ids": ids, "labels": [-100] * (length - answer) + ids[length - answer :]})
    return out


def adapted(name: str, config: dict[str, Any] | None = None, **changes: Any) -> Any:
    model = zoo_model(name, **changes)
    inject(model, LoraConfig(r=4, **(config or {})))
    torch.manual_seed(3)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model.train()


def loss_and_gradients(
    model: Any, chunked: bool, smoothing: float = 0.0, batches: Any = None, outer: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by name of one step, from a fixed state of the random generator."""
    batches = batches or [padded_batch(rows(), 0)]
    count = sum(len(learned_positions(b["labels"])[1]) for b in batches)
    model.zero_grad()
    torch.manual_seed(11)
    total = torch.zeros(())
    for batch in batches:
        loss = supervised_loss(
            outer or model, model.get_output_embeddings(), batch, torch.float32, count, smoothing, chunked
        )
        loss.backward()
        total += loss.detach()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-9)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of five rows of 128 float32 logits."""
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *_: 5)
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: 5)


FAMILIES: list[tuple[str, dict[str, Any], bool]] = [
    ("phi3", {}, True),
    ("phi", {}, True),  # its head has a bias
    ("llama", {"tie_word_embeddings": True}, True),
    ("qwen3", {}, True),
    ("gpt2", {}, True),
    ("opt", {}, True),
    ("bloom", {}, True),
    ("gemma2", {"final_logit_softcapping": 30.0}, False),
    ("gemma2", {"final_logit_softcapping": None}, True),
    ("granite", {"logits_scaling": 4.0}, False),
    ("cohere", {"logit_scale": 0.5}, False),
]


def family(name: str, config: dict[str, Any] | None = None, **changes: Any) -> Any:
    """As `adapted`, also for families whose logits are scaled: a llama in their clothes."""
    if name not in ("granite", "cohere"):
        return adapted(name, config, **changes)
    import transformers

    common = {
        k: v for k, v in zoo_model("llama").config.to_dict().items() if k.startswith(("hidden_size", "inter", "num_"))
    }
    made: Any = getattr(transformers, f"{name.title()}Config")(vocab_size=128, **common, **changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name.title()}ForCausalLM")(made)
    inject(model, LoraConfig(r=4, **(config or {})))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model.train()


@pytest.mark.parametrize(("name", "changes", "hands_on"), FAMILIES, ids=lambda v: str(v)[:24])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.usefixtures("few_rows")
def test_models_have_the_loss_and_gradients_of_the_reference(
    name: str, changes: dict[str, Any], hands_on: bool, smoothing: float
) -> None:
    model = family(name, **changes)
    theirs = loss_and_gradients(model, False, smoothing)
    assert can_make_loss(model, model.get_output_embeddings())
    assert_same(loss_and_gradients(model, True, smoothing), theirs)  # from the first batch on
    assert can_make_loss(model, model.get_output_embeddings()) is hands_on
    assert_same(loss_and_gradients(model, True, smoothing), theirs)
    assert "forward" not in vars(model.get_output_embeddings()) and not model._forward_hooks


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_dropout_draws_what_it_draws_in_the_reference(name: str) -> None:
    """Also in the first batch of a model that must be run again: a resumed run repeats the undisturbed one."""
    changes = {"final_logit_softcapping": 30.0} if name == "gemma2" else {}
    model = adapted(name, {"lora_dropout": 0.3}, **changes)
    theirs = loss_and_gradients(model, False)
    state = torch.get_rng_state()
    assert_same(loss_and_gradients(model, True), theirs)
    assert torch.equal(torch.get_rng_state(), state)


HEADS = {
    "LoRA": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.usefixtures("few_rows")
def test_a_head_that_is_trained(head: str) -> None:
    model = adapted("llama", HEADS[head])
    theirs = loss_and_gradients(model, False, 0.1)
    assert any("lm_head" in name for name in theirs[1])
    assert_same(loss_and_gradients(model, True, 0.1), theirs)
    assert can_make_loss(model, model.get_output_embeddings())


@pytest.mark.usefixtures("few_rows")
def test_a_trained_head_that_is_the_embedding_too() -> None:
    model = zoo_model("llama", tie_word_embeddings=True).train()
    theirs = loss_and_gradients(model, False)
    assert_same(loss_and_gradients(model, True), theirs)


@pytest.mark.usefixtures("few_rows")
def test_activation_checkpointing() -> None:
    model = adapted("phi3")
    theirs = loss_and_gradients(model, False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(loss_and_gradients(model, True), theirs)


@pytest.mark.parametrize("layout", [lambda r: padded_batch(r, 0), tree_batch])
@pytest.mark.usefixtures("few_rows")
def test_any_split_has_the_same_gradient(layout: Any) -> None:
    model = adapted("llama")
    theirs = loss_and_gradients(model, False)
    for sizes in [(1, 2), (1, 1, 1)]:
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        batches = [layout(rows()[a:b]) for a, b in itertools.pairwise(bounds)]
        assert_same(loss_and_gradients(model, True, batches=batches), theirs)


def test_logits_written_to_in_place_are_noticed() -> None:
    model = adapted("llama")
    forward = model.forward

    def scaling(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits.mul_(0.5)
        return out

    model.forward = scaling
    theirs = loss_and_gradients(model, False)
    assert_same(loss_and_gradients(model, True), theirs)
    assert not can_make_loss(model, model.lm_head)


def test_hooks_that_scale_the_logits_are_noticed() -> None:
    def scale(module: Any, args: Any, out: Any) -> Any:
        out.logits = out.logits * 0.5
        return out

    for of_model in (True, False):
        model = adapted("llama")
        (model if of_model else model.lm_head).register_forward_hook(scale if of_model else lambda m, x, out: out * 0.5)
        theirs = loss_and_gradients(model, False)
        assert_same(loss_and_gradients(model, True), theirs)
        assert not can_make_loss(model, model.lm_head)


def test_a_head_with_a_forward_of_its_own_keeps_it() -> None:
    model = adapted("llama")
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden) * 0.5  # as accelerate puts its hooks in
    before = vars(model.lm_head)["forward"]
    theirs = loss_and_gradients(model, False)
    assert_same(loss_and_gradients(model, True), theirs)
    assert vars(model.lm_head)["forward"] is before and can_make_loss(model, model.lm_head)


def test_an_error_in_the_model_leaves_the_head_as_it_was() -> None:
    model = adapted("llama")
    model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_and_gradients(model, True)
    head = model.lm_head
    assert "forward" not in vars(head) and not head._forward_pre_hooks and not model._forward_hooks


class Saved:
    """Something that the graph keeps for the backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_the_first_runs_activations_are_let_go_before_the_second() -> None:
    model = adapted("gemma2", final_logit_softcapping=30.0)
    alive, counts = weakref.WeakSet[Saved](), []
    model.model.register_forward_pre_hook(lambda *_: counts.append(len(alive)))

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor.detach())  # or a node that saves what it makes would hold itself
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        supervised_loss(model, model.lm_head, padded_batch(rows(), 0), torch.float32)
    assert len(counts) == 2 and counts == [0, 0]


def test_accelerates_wrapping_for_mixed_precision() -> None:
    from accelerate.utils import convert_outputs_to_fp32

    model = adapted("llama")
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    theirs, ours = loss_and_gradients(model, False), loss_and_gradients(model, True)
    assert can_make_loss(model, model.lm_head)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() < 2e-2 * gradient.norm()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_under_ddp(name: str, tmp_path: Any) -> None:
    import torch.distributed as dist

    model = adapted(name, **({"final_logit_softcapping": 30.0} if name == "gemma2" else {}))
    theirs = loss_and_gradients(model, False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for unused in (False, True):
            outer = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
            for _ in range(2):
                assert_same(loss_and_gradients(model, True, outer=outer), theirs)
            assert can_make_loss(outer, model.get_output_embeddings()) is (name == "llama")
            del outer
            gc.collect()
    finally:
        dist.destroy_process_group()


def test_a_compiled_model_keeps_its_own_head() -> None:
    model = adapted("llama")
    assert not can_make_loss(torch.compile(model, backend="eager"), model.lm_head)
    model.compile(backend="eager")
    assert not can_make_loss(model, model.lm_head)


def test_a_model_without_gradients() -> None:
    model = adapted("llama").eval()
    batch = padded_batch(rows(), 0)
    values = []
    for context in (torch.no_grad(), torch.inference_mode()):
        for chunked in (True, False):
            with context:
                values.append(supervised_loss(model, model.lm_head, batch, torch.float32, 1, chunked=chunked))
    assert not any(v.requires_grad for v in values)
    torch.testing.assert_close(torch.stack(values), values[0].expand(4).clone(), rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("head", [None, "LoRA", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logits_of_all_tokens_are_ever_made(
    head: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, tokens, chunk = 4096, 100, 10
    size = chunk * vocabulary * dtype.itemsize
    monkeypatch.setattr(cross_entropy.chunk_rows, "__defaults__", (size,))
    model = adapted("llama", HEADS[head] if head else None, vocab_size=vocabulary).to(dtype)
    ids = torch.arange(tokens + 1)[None] % 64
    batch = {"input_ids": ids, "labels": ids.clone()}
    most = {}
    for chunked in (True, False):
        with Largest() as seen:
            loss = supervised_loss(model, model.lm_head, batch, dtype, chunked=chunked)
            loss.backward()
        most[chunked] = seen.elements
    weight = vocabulary * 32  # (V, h): larger than a chunk here, and no business of the loss
    assert most[False] >= tokens * vocabulary
    assert most[True] <= max(weight, chunk * vocabulary) < tokens * vocabulary
