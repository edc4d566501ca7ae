"""A batch in either layout holds the same examples: in the tree every token sees exactly what it would see alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phinetune.data.batches import Collator, batch_work, padded_batch, shared_prefix, tree_batch
from phinetune.data.examples import MASKED, encode_conversation
from phinetune.data.messages import Conversation
from phinetune.model.attention import allowed_in_tree
from phinetune.model.contract import make_contract
from phinetune.training.loss import learned_positions
from tiny import tiny_tokenizer

PAD = 0
Row = dict[str, Any]


def row(prompt: list[int], answer: list[int]) -> Row:
    return {"input_ids": prompt + answer, "labels": [MASKED] * len(prompt) + answer}


SHARED = [row([1, 2, 3, 4], [7, 9]), row([1, 2, 3, 5, 6], [8, 9]), row([1, 2, 3, 4], [9])]

_TOKENS = st.lists(st.integers(1, 4), max_size=6)


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    """Rows with or without a common start; prompts may be empty, and several answers may be learned."""
    common = draw(_TOKENS)
    made = []
    for _ in range(draw(st.integers(1, 5))):
        one = row(common + draw(_TOKENS), draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
        if draw(st.booleans()):  # a second turn
            more = row(draw(_TOKENS), draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
            one = {key: one[key] + more[key] for key in one}
        if len(one["input_ids"]) == 1:  # nothing predicts a lone token
            one = row([1], one["input_ids"])
        made.append(one)
    return made


def members(batch: list[Row], index: int) -> list[int]:
    """Where the tokens of example `index` stand in the tree."""
    prefix = shared_prefix(batch)
    start = prefix + sum(len(one["input_ids"]) - prefix for one in batch[:index])
    return [*range(prefix), *range(start, start + len(batch[index]["input_ids"]) - prefix)]


def learned(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """(token before, learned token) of each prediction the loss is made of."""
    positions, targets = learned_positions(batch["labels"])
    return list(zip(batch["input_ids"].reshape(-1)[positions].tolist(), targets.tolist(), strict=True))


# --- the shared prefix ---


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (SHARED, 3),
        # one short of the prompt: its last token predicts the first learned one
        ([row([1, 2, 3, 4], [7]), row([1, 2, 3, 4], [8])], 3),
        ([row([1, 2, 3, 4], [7])], 3),
        ([row([1, 2, 3], [7]), row([2, 2, 3], [7])], 0),
        ([row([1, 2, 3], [7]), row([1], [2, 3])], 0),
        ([row([1, 2, 3], [7]), row([], [1, 2, 3])], 0),
        ([row([1, 2, 3, 4], [7]), row([1, 2], [3, 4])], 1),
        ([row([1, 2, 3], []), row([1, 2, 3, 4], [5])], 2),
    ],
)
def test_the_shared_prefix_ends_before_anything_is_learned(batch: list[Row], expected: int) -> None:
    assert shared_prefix(batch) == expected


@given(rows())
def test_the_shared_prefix_is_the_longest_that_may_be_shared(batch: list[Row]) -> None:
    length = shared_prefix(batch)
    assert len({tuple(one["input_ids"][:length]) for one in batch}) == 1
    assert all(label == MASKED for one in batch for label in one["labels"][: length + 1]) or length == 0
    one_more = {tuple(one["input_ids"][: length + 1]) for one in batch}
    predicts = any((one["labels"] + [0])[length + 1] != MASKED or one["labels"][0] != MASKED for one in batch)
    assert len(one_more) > 1 or predicts


# --- the layouts ---


def test_a_padded_batch_is_filled_up_on_the_right() -> None:
    batch = padded_batch(SHARED, PAD)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 7, 9, PAD],
        [1, 2, 3, 5, 6, 8, 9],
        [1, 2, 3, 4, 9, PAD, PAD],
    ]
    assert batch["labels"].tolist() == [
        [MASKED, MASKED, MASKED, MASKED, 7, 9, MASKED],
        [MASKED, MASKED, MASKED, MASKED, MASKED, 8, 9],
        [MASKED, MASKED, MASKED, MASKED, 9, MASKED, MASKED],
    ]
    assert {t.dtype for t in batch.values()} == {torch.long}
    assert set(batch) == {"input_ids", "labels"}


def test_a_tree_holds_the_prefix_once_and_then_each_branch() -> None:
    batch = tree_batch(SHARED)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 7, 9, 5, 6, 8, 9, 4, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 3, 4]]
    assert batch["labels"].tolist() == [[MASKED] * 4 + [7, 9] + [MASKED] * 2 + [8, 9] + [MASKED, 9]]
    assert batch["tree"].tolist() == [3, 3, 4, 2]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}
    allowed = allowed_in_tree(batch["tree"].tolist())
    assert allowed[7].tolist() == [True] * 3 + [False] * 3 + [True] * 2 + [False] * 4


@given(rows())
def test_padding_changes_no_example(batch: list[Row]) -> None:
    padded = padded_batch(batch, PAD)
    for i, one in enumerate(batch):
        length = len(one["input_ids"])
        assert padded["input_ids"][i].tolist() == one["input_ids"] + [PAD] * (padded["input_ids"].shape[1] - length)
        assert padded["labels"][i].tolist() == one["labels"] + [MASKED] * (padded["labels"].shape[1] - length)


@given(rows())
def test_in_a_tree_every_token_sees_exactly_what_it_would_see_alone(batch: list[Row]) -> None:
    tree = tree_batch(batch)
    allowed = allowed_in_tree(tree["tree"].tolist())
    for i, one in enumerate(batch):
        own = torch.tensor(members(batch, i))
        assert tree["input_ids"][0, own].tolist() == one["input_ids"]
        assert tree["position_ids"][0, own].tolist() == list(range(len(own)))
        assert torch.equal(allowed[own][:, own], torch.ones(len(own), len(own), dtype=torch.bool).tril())
        others = torch.ones(len(allowed), dtype=torch.bool)
        others[own] = False
        assert not allowed[own][:, others].any()
    assert {j for i in range(len(batch)) for j in members(batch, i)} == set(range(len(allowed)))


@given(rows())
def test_both_layouts_learn_the_same_tokens_from_the_same_ones(batch: list[Row]) -> None:
    tree, padded = learned(tree_batch(batch)), learned(padded_batch(batch, PAD))
    assert len(tree) == len(padded) > 0
    assert tree == padded


# --- the choice ---


def is_tree(batch: dict[str, torch.Tensor]) -> bool:
    return "tree" in batch


def test_shared_prompts_are_computed_once() -> None:
    prompt = list(range(1, 40))
    batch = Collator(PAD, hidden_size=64)([row([*prompt, 50 + i], [60]) for i in range(4)])
    assert is_tree(batch)
    assert batch["input_ids"].shape == (1, 39 + 4 * 2)


def test_uneven_rows_are_joined_rather_than_padded() -> None:
    assert is_tree(Collator(PAD, hidden_size=576)([row([1] * 5, [2]), row([3] * 100, [2]), row([4] * 7, [2])]))


@pytest.mark.parametrize(("hidden_size", "expected"), [(8, False), (4096, True)])
def test_what_is_saved_is_weighed_against_what_is_copied(hidden_size: int, expected: bool) -> None:
    batch = [row([1] * 500, [2]), row([3] * 480, [2])]  # 20 of 1002 tokens saved, 982 moved into branches and back
    assert is_tree(Collator(PAD, hidden_size)(batch)) == expected


def test_the_work_of_a_batch_by_hand() -> None:
    h = 10
    assert batch_work([4, 6], 2, h, "padded") == ("padded", 12 * (12 * h) + 2 * (2 * 6 * 6))
    tokens, attention, copied = 2 + 2 + 4, 2 * 2 + 2 * 4 * 6, 4 * 2 * 4 + 2 * 2 * 2
    assert batch_work([4, 6], 2, h, "tree") == ("tree", tokens * 12 * h + 2 * attention + 32 * copied)


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=16),
    share=st.floats(0, 1),
    hidden_size=st.sampled_from([8, 576, 3072]),
)
def test_auto_is_the_layout_with_less_work(lengths: list[int], share: float, hidden_size: int) -> None:
    prefix = int(share * (min(lengths) - 1))
    works = {layout: batch_work(lengths, prefix, hidden_size, layout)[1] for layout in ("padded", "tree")}
    layout, work = batch_work(lengths, prefix, hidden_size)
    assert work == works[layout] == min(works.values())
    more = batch_work([*lengths, lengths[0]], prefix, hidden_size)[1]
    assert more > work
    if prefix:
        assert works["tree"] < batch_work(lengths, prefix - 1, hidden_size, "tree")[1] or len(lengths) == 1


@pytest.mark.parametrize("rows", [4, 16])
def test_nothing_shared_and_unequal_lengths_are_joined_without_padding(rows: int) -> None:
    lengths = [20 * (i + 1) for i in range(rows)]
    assert batch_work(lengths, 0, 576)[0] == "tree"
    assert batch_work([600] * rows, 0, 576)[0] == "padded"
    assert batch_work([600] * (rows - 1) + [598], 3, 576)[0] == "padded", "next to nothing is saved"
    made = Collator(PAD, 576)([row([i] * (n - 1), [2]) for i, n in enumerate(lengths, 1)])
    assert made["input_ids"].shape == (1, sum(lengths)) and is_tree(made)


@pytest.mark.parametrize("length", [2, 300])
def test_rows_of_one_length_with_nothing_in_common_are_padded(length: int) -> None:
    assert not is_tree(Collator(PAD, hidden_size=8)([row([1] * length, [2]), row([3] * length, [2])]))


def test_a_single_row_stays_as_it_is() -> None:
    batch = Collator(PAD, hidden_size=64)(SHARED[:1])
    assert not is_tree(batch)
    assert batch["input_ids"].tolist() == [SHARED[0]["input_ids"]]


@pytest.mark.parametrize("batch", [SHARED, [row([1] * 9, [2]), row([3] * 9, [2])]], ids=["shared", "unshared"])
def test_a_layout_that_is_asked_for_is_used(batch: list[Row]) -> None:
    assert is_tree(Collator(PAD, 8, "tree")(batch))
    assert not is_tree(Collator(PAD, 8, "padded")(batch))


@given(batch=rows(), hidden_size=st.sampled_from([1, 64, 4096]))
def test_auto_is_one_of_the_two_and_a_tree_only_where_that_saves_tokens(batch: list[Row], hidden_size: int) -> None:
    made = Collator(PAD, hidden_size)(batch)
    tree, padded = tree_batch(batch), padded_batch(batch, PAD)
    expected = tree if is_tree(made) else padded
    assert set(made) == set(expected)
    assert all(torch.equal(made[key], expected[key]) for key in made)
    assert not is_tree(made) or tree["input_ids"].numel() < padded["input_ids"].numel()


def test_the_rows_of_real_examples_share_the_question() -> None:
    from transformers import LlamaConfig

    contract = make_contract(tiny_tokenizer(), LlamaConfig(vocab_size=320, max_position_embeddings=256, eos_token_id=0))
    batch = []
    for phrase, tone in (("so glad", "joy"), ("oh no", "fear"), ("who knew", "surprise")):
        question = {"role": "user", "content": f"What is the tone of this phrase? {phrase}"}
        answer = {"role": "assistant", "content": tone}
        batch.append(vars(encode_conversation(Conversation([question, answer], "f"), contract)[0]))
    asked = contract.decode(batch[0]["input_ids"][: shared_prefix(batch)])
    assert "What is the tone of this phrase?" in asked
    assert "so glad" not in asked
    assert is_tree(Collator(contract.pad_token_id, 64)(batch))


def test_where_a_mask_is_needed_every_token_counts_against_every_other() -> None:
    lengths, prefix, tokens = [100] * 20, 50, 50 + 20 * 50
    assert batch_work(lengths, prefix, 32, "tree", dense=True)[1] == 12 * 32 * tokens + 2 * tokens**2
    assert batch_work(lengths, prefix, 32)[0] == "tree"
    assert batch_work(lengths, prefix, 32, dense=True)[0] == "padded"
