"""The loss's laws: only learned tokens count, and any split or layout of a batch gives the same gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from phinetune.data.batches import padded_batch, tree_batch
from phinetune.errors import TrainingError
from phinetune.lora.config import LoraConfig
from phinetune.lora.injection import inject
from phinetune.lora.layer import lora_layers
from phinetune.training.loss import head_only_at, learned_positions, supervised_loss
from tiny import tiny_model


def rows(shared: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    """Five examples of uneven lengths whose first `shared` tokens are the same; one learns two spans."""
    g = torch.Generator().manual_seed(seed)
    start = [11, 12, 13, 14, 15, 16][:shared]
    out = []
    for extra, answer in [(3, 2), (6, 1), (2, 4), (4, 3), (9, 2)]:
        ids = start + torch.randint(20, 300, (extra + answer,), generator=g).tolist()
        labels = [-100] * (len(ids) - answer) + ids[len(ids) - answer :]
        out.append({"input_ids": ids, "labels": labels})
    out[4]["labels"][shared + 3] = out[4]["input_ids"][shared + 3]
    return out


def adapted(kind: str, attention: str = "eager") -> Any:
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    inject(model, LoraConfig(r=4))
    torch.manual_seed(3)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model.train()


def gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, torch.Tensor]:
    """Loss and flat gradient of the batches taken as micro-batches of one step."""
    model.zero_grad()
    count = sum(len(learned_positions(b["labels"])[1]) for b in batches)
    total = 0.0
    for batch in batches:
        loss = supervised_loss(model, model.get_output_embeddings(), batch, torch.float32, count)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_equals_the_models_own_loss(kind: str) -> None:
    model = adapted(kind)
    batch = padded_batch(rows(), 0)
    full = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
    theirs = F.cross_entropy(full.reshape(-1, 320), batch["labels"][:, 1:].reshape(-1), ignore_index=-100)
    ours = supervised_loss(model, model.get_output_embeddings(), batch, torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shared", [0, 5])
def test_tree_and_padded_batches_have_the_same_gradient(kind: str, attention: str, shared: int) -> None:
    model = adapted(kind, attention)
    loss, grad = gradients(model, [padded_batch(rows(shared), 0)])
    tree_loss, tree_grad = gradients(model, [tree_batch(rows(shared))])
    assert abs(loss - tree_loss) < 1e-5
    assert (grad - tree_grad).abs().max() < 1e-5 * max(1.0, float(grad.abs().max()))


@pytest.mark.parametrize("sizes", [[5], [1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("layout", [lambda r: padded_batch(r, 0), tree_batch])
def test_any_split_into_micro_batches_gives_the_same_gradient(sizes: list[int], layout: Any) -> None:
    model = adapted("llama")
    whole = gradients(model, [padded_batch(rows(), 0)])
    remaining, batches = rows(), []
    for size in sizes:
        batches.append(layout(remaining[:size]))
        remaining = remaining[size:]
    loss, grad = gradients(model, batches)
    assert abs(loss - whole[0]) < 1e-5
    torch.testing.assert_close(grad, whole[1], rtol=1e-4, atol=1e-5)


def test_the_head_sees_only_learned_positions() -> None:
    model = tiny_model()
    batch = padded_batch(rows(), 0)
    positions, targets = learned_positions(batch["labels"])
    seen = []
    handle = model.lm_head.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    supervised_loss(model, model.lm_head, batch, torch.float32)
    handle.remove()
    assert seen == [(len(targets), 64)] and len(targets) == sum(label != -100 for r in rows() for label in r["labels"])
    with head_only_at(model.lm_head, positions):
        pass
    assert model(batch["input_ids"]).logits.shape == (*batch["input_ids"].shape, 320)  # the hook is gone


def test_a_batch_without_a_learned_token_is_an_error_not_a_loss_of_zero() -> None:
    batch = padded_batch([{"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}], 0)
    with pytest.raises(TrainingError, match="no learned token"):
        supervised_loss(tiny_model(), tiny_model().lm_head, batch, torch.float32)


def test_padding_does_not_change_the_loss() -> None:
    model = tiny_model()
    short = supervised_loss(model, model.lm_head, padded_batch(rows()[:1], 0), torch.float32)
    both = padded_batch(rows(), 7)
    alone = {k: v[:1] for k, v in both.items()}
    torch.testing.assert_close(supervised_loss(model, model.lm_head, alone, torch.float32), short, rtol=1e-5, atol=1e-6)
