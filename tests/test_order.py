"""The order of an epoch: every example once, the same from the same seed, like ones together, and by choice only where that saves work."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phinetune.data.batches import Collator, batch_work, shared_prefix
from phinetune.data.encoding import MASKED, Example, first_learned
from phinetune.data.examples import Examples, write_examples
from phinetune.data.order import WAYS, EpochOrder, OrderPlan, Way, epoch_order
from phinetune.data.prefixes import prompt_heads
from phinetune.errors import ConfigError
from phinetune.events import Event, Note, Progress
from phinetune.lora.adapter import WEIGHTS_FILE
from phinetune.training.config import read_training_config
from phinetune.training.trainer import OrderCallback
from phinetune.workflow.finetune import finetune
from tiny import write_rows

MADE: list[Any] = [way for way in WAYS if way != "auto"]
Row = tuple[list[int], list[int]]


def table(rows: list[Row], segments: list[int] | None = None) -> Examples:
    """Examples with these prompts and answers."""
    return write_examples(
        Example([*prompt, *answer], [MASKED] * len(prompt) + answer, len(prompt), "", "f", segments or [])
        for prompt, answer in rows
    )


def templates(kinds: int, each: int, head: int, tail: int, seed: int = 0) -> list[Row]:
    """Rows of several templates in turn: one token all share, `head` tokens of the template, `tail` of their own, an answer."""
    draw = random.Random(seed)
    heads = [[draw.randrange(10, 1000) for _ in range(head)] for _ in range(kinds)]
    return [
        ([1, *heads[i % kinds], *(draw.randrange(10, 1000) for _ in range(tail))], [2, 3]) for i in range(kinds * each)
    ]


def cut(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def planned(examples: Examples, how: str, size: int, layout: Any = "auto") -> tuple[EpochOrder, list[Note]]:
    events: list[Event] = []
    order = OrderPlan(examples.table, how, 0, Collator(0, 576, layout)).order(size, events.append)
    return order, [event for event in events if isinstance(event, Note)]


# --- any order ---


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), max_size=150),
    kinds=st.integers(1, 9),
    size=st.integers(1, 17),
    seed=st.integers(-3, 2**40),
    epoch=st.integers(0, 50),
    how=st.sampled_from(MADE),
)
def test_every_example_comes_once_and_again_from_the_same_seed(
    sizes: list[int], kinds: int, size: int, seed: int, epoch: int, how: Way
) -> None:
    groups = [7 * length % kinds for length in sizes]
    order = epoch_order(sizes, groups, size, seed, epoch, how)
    assert sorted(order) == list(range(len(sizes)))
    assert order == epoch_order(np.array(sizes), np.array(groups), size, seed, epoch, how)
    assert all(type(index) is int for index in order)


@pytest.mark.parametrize("how", [way for way in MADE if way != "sequential"])
def test_epochs_and_seeds_differ(how: Way) -> None:
    sizes, groups = [10 + i % 7 for i in range(200)], [i % 3 for i in range(200)]
    made = [epoch_order(sizes, groups, 8, seed, epoch, how) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 2))]
    assert len({tuple(order) for order in made}) == 4
    batches = [{frozenset(batch) for batch in cut(order, 8)} for order in made]
    assert len(batches[0] & batches[1]) <= 2, "other examples meet in another epoch"


def test_sequential_is_the_order_of_the_file() -> None:
    assert epoch_order([3, 1, 2], None, 2, 0, 5, "sequential") == [0, 1, 2]


@pytest.mark.parametrize("how", MADE)
def test_two_processes_share_the_batches_of_one_order(how: Way) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    sizes, groups = [10 + i % 9 for i in range(64)], [i % 4 for i in range(64)]
    halves = []
    for process in range(2):
        order = EpochOrder(sizes, groups, 4, 3, how)
        order.set_epoch(2)
        sampler: Any = BatchSampler(order, 4, drop_last=False)  # type: ignore[arg-type]
        halves.append([i for batch in BatchSamplerShard(sampler, 2, process) for i in batch])
    assert not set(halves[0]) & set(halves[1])
    assert sorted(halves[0] + halves[1]) == list(range(64))
    whole = cut(epoch_order(sizes, groups, 4, 3, 2, how), 4)
    assert [cut(half, 4) for half in halves] == [whole[0::2], whole[1::2]]


# --- lengths ---


@pytest.mark.parametrize("count", [40, 1000, 1003])
def test_grouping_by_length_pads_less_and_begins_with_the_longest(count: int) -> None:
    draw = random.Random(1)
    sizes = [draw.randrange(5, 200) for _ in range(count)]

    def computed(how: Way) -> int:
        return sum(
            len(batch) * max(sizes[i] for i in batch) for batch in cut(epoch_order(sizes, None, 8, 0, 0, how), 8)
        )

    kept = sum(sizes)
    assert computed("group_by_length") - kept < 0.4 * (computed("random") - kept)
    order = epoch_order(sizes, None, 8, 0, 0, "group_by_length")
    assert max(sizes[i] for i in order[:8]) == max(sizes)


# --- prefixes ---


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(2, 5))
def test_what_a_batch_shares_is_what_the_collator_finds(data: st.DataObject, size: int) -> None:
    token = st.integers(1, 2)
    prompts = data.draw(st.lists(st.lists(token, max_size=6), min_size=size, max_size=12))
    rows = [(prompt, data.draw(st.lists(token, min_size=1, max_size=2))) for prompt in prompts]
    examples = table(rows)
    chosen = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(size, len(rows)))]
    for view, count in ((examples, len(rows)), (examples.subset(chosen), len(chosen))):
        heads = prompt_heads(view.table)
        batches = np.array([data.draw(st.permutations(range(count)))[:size] for _ in range(3)])
        shared = heads.shared(batches).tolist()
        assert shared == [shared_prefix([view[int(i)] for i in batch]) for batch in batches]
        assert heads.lengths.tolist() == view.lengths
        heads_in_order = [
            view[int(i)]["input_ids"][: max(first_learned(view[int(i)]["labels"]) - 1, 0)] for i in heads.order
        ]
        assert heads_in_order == sorted(heads_in_order)


@pytest.mark.parametrize(("kinds", "each", "size"), [(3, 40, 8), (10, 30, 8), (5, 33, 4), (2, 17, 8)])
def test_templates_meet(kinds: int, each: int, size: int) -> None:
    rows = templates(kinds, each, head=30, tail=10)
    groups = prompt_heads(table(rows).table).groups(size)
    assert len(set(groups.tolist())) == kinds
    assert all(len({int(groups[i]) for i in range(kind, len(rows), kinds)}) == 1 for kind in range(kinds))
    for epoch in range(3):
        batches = cut(epoch_order([len(p) for p, _ in rows], groups, size, 0, epoch, "group_by_prefix"), size)
        pure = sum(len({i % kinds for i in batch}) == 1 for batch in batches if len(batch) == size)
        assert pure >= kinds * (each // size)
        kinds_in_turn = [batch[0] % kinds for batch in batches]
        assert kinds_in_turn != sorted(kinds_in_turn), "batches come in random order"


def test_groups_are_no_finer_than_pays() -> None:
    """One template, then words of a small language: what follows is alike by chance, for a token or two."""
    draw = random.Random(0)
    rows = [([*range(20, 50), *(draw.randrange(8) for _ in range(40))], [2]) for _ in range(600)]
    assert not prompt_heads(table(rows).table).groups(8).any()


def test_a_template_within_a_template_is_found() -> None:
    """System prompts of two kinds; under the second, instructions of two kinds, and a few rows that are alone there."""
    draw = random.Random(0)

    def row(*parts: list[int]) -> Row:
        return ([t for part in parts for t in part] + [draw.randrange(1000, 9000) for _ in range(5)], [2])

    first, second, one, other = (list(range(start, start + 40)) for start in (100, 200, 300, 400))
    kinds = [[first], [second, one], [second, other], [second]]
    counts = [50, 50, 50, 20]
    rows = [(kind, row(*kinds[kind])) for kind in range(4) for _ in range(counts[kind])]
    draw.shuffle(rows)
    groups = prompt_heads(table([made for _, made in rows]).table).groups(4)
    found = Counter((kind, int(group)) for (kind, _), group in zip(rows, groups, strict=True))
    assert sorted(found.values()) == sorted(counts) and len({group for _, group in found}) == 4


@pytest.mark.parametrize(
    "rows", [[([], [1, 2])] * 9, [([1, 2, 3, 4], [5])] * 9, [([1, 2], [3])]], ids=["texts", "same", "one"]
)
def test_rows_that_are_all_alike_are_one_group(rows: list[Row]) -> None:
    heads = prompt_heads(table(rows).table)
    assert not heads.groups(2).any()
    assert heads.common == max(len(rows[0][0]) - 1, 0)


# --- auto ---


def test_auto_groups_templates_and_says_what_that_saves() -> None:
    order, notes = planned(table(templates(6, 40, head=60, tail=10)), "auto", 8)
    assert order.how == "group_by_prefix"
    (note,) = notes
    assert "grouped by prefix" in note.text and "% less to compute" in note.text


def test_auto_groups_lengths_where_rows_are_padded() -> None:
    draw = random.Random(0)
    rows: list[Row] = [([draw.randrange(10, 1000) for _ in range(draw.randrange(4, 200))], [2]) for _ in range(200)]
    order, notes = planned(table(rows), "auto", 8, "padded")
    assert order.how == "group_by_length" and "grouped by length" in notes[0].text
    order, notes = planned(table(rows), "auto", 8)  # joined in one row, nothing is padded
    assert order.how == "random" and "random order" in notes[0].text


@pytest.mark.parametrize("layout", ["auto", "padded", "tree"])
@pytest.mark.parametrize("kinds", [1, 300], ids=["one template", "no template"])
def test_auto_stays_random_where_nothing_is_saved(layout: Any, kinds: int) -> None:
    order, _ = planned(table(templates(kinds, 300 // kinds, head=30, tail=10)), "auto", 8, layout)
    assert order.how == "random"


@pytest.mark.parametrize(("size", "count"), [(1, 100), (8, 6)])
def test_nothing_is_estimated_where_there_is_no_choice(size: int, count: int) -> None:
    order, notes = planned(table(templates(2, count // 2, head=30, tail=3)), "auto", size)
    assert (order.how, notes) == ("random", [])


def test_packed_blocks_come_in_random_order() -> None:
    rows = templates(4, 20, head=40, tail=3)
    order, notes = planned(table(rows, segments=[20, len(rows[0][0]) + 2 - 20]), "auto", 8)
    assert (order.how, notes) == ("random", [])


def test_the_shares_that_are_said_are_those_of_the_collators_batches() -> None:
    rows = templates(4, 32, head=30, tail=20)
    examples = table(rows)
    order, notes = planned(examples, "auto", 8)

    def work(order: list[int]) -> float:
        batches = [[examples[i] for i in batch] for batch in cut(order, 8)]
        return sum(batch_work([len(row["input_ids"]) for row in rows], shared_prefix(rows), 576)[1] for rows in batches)

    saved = 1 - work(list(order)) / work(epoch_order(order.lengths, None, 8, 0, 0, "random"))
    assert f"{saved:.0%} less" in notes[0].text


def test_many_batches_are_sampled_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phinetune.data.order._SAMPLE", 10)
    order, notes = planned(table(templates(4, 60, head=60, tail=5)), "auto", 4)
    assert order.how == "group_by_prefix" and "estimated on 10 of 60 batches" in notes[0].text


def test_the_trie_is_walked_once_however_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that peel off one by one: a chain of as many nodes as rows, which a recursion or a scan of each range would not survive."""
    from phinetune.data import prefixes

    made = []
    node = prefixes._Node
    monkeypatch.setattr(prefixes, "_Node", lambda *args, **kwargs: made.append(1) or node(*args, **kwargs))
    root = prefixes._trie(range(20_000), 2)
    assert len(made) == 20_000
    assert len(prefixes._chosen(root, 0, [30_000 * i for i in range(20_002)], 0.9)) < 100


@pytest.mark.parametrize(
    ("layout", "rows", "reason"),
    [
        ("padded", templates(3, 40, 30, 5), "the layout is padded"),
        ("auto", templates(1, 60, 30, 5), "no prompts begin alike"),
    ],
)
def test_asking_for_prefixes_in_vain_is_said(layout: Any, rows: list[Row], reason: str) -> None:
    order, notes = planned(table(rows), "group_by_prefix", 4, layout)
    assert order.how == "group_by_prefix" and len(list(order)) == len(rows)
    assert [note.warning for note in notes] == [True] and reason in notes[0].text


# --- the key ---


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "auto"),
        ({"train_sampling_strategy": None}, "auto"),
        *(({"train_sampling_strategy": way}, way) for way in WAYS),
        ({"group_by_length": True}, "group_by_length"),
        ({"group_by_length": False}, "random"),
        ({"group_by_length": True, "train_sampling_strategy": "group_by_prefix"}, "group_by_prefix"),
        ({"train_sampling_strategy": "sequential", "group_by_length": True}, "sequential"),
    ],
)
def test_the_key_is_read(config: dict[str, Any], expected: str) -> None:
    plan = read_training_config(config)
    assert plan.order == expected
    assert "train_sampling_strategy" not in plan.values, "the Trainer would not know all of them"


def test_a_strategy_of_transformers_own_is_left_to_it() -> None:
    from transformers import TrainingArguments

    field = TrainingArguments.__dataclass_fields__.get("train_sampling_strategy")
    if field is None or "batch_rebalance" not in (field.metadata.get("choices") or ()):
        pytest.skip("this transformers has none")
    plan = read_training_config({"train_sampling_strategy": "batch_rebalance"})
    assert plan.order not in WAYS and plan.values == {"train_sampling_strategy": "batch_rebalance"}


@pytest.mark.parametrize("value", ["group_by_prefx", "shuffle", 3, ["random"]])
def test_a_bad_strategy_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read_training_config({"train_sampling_strategy": value, "layout": "heap"})
    assert len(caught.value.problems) == 2
    assert repr(value) in str(caught.value)
    assert ('did you mean "group_by_prefix"?' in str(caught.value)) == (value == "group_by_prefx")


# --- in training ---


@pytest.fixture
def mixed(tmp_path: Path) -> dict[str, Any]:
    """Rows of three instructions, of uneven lengths, mixed."""
    asks = ["Say how this phrase sounds to you: ", "Name one feeling in these words, no more: ", "Which tone is it? "]
    rows = [
        {"phrase": asks[i % 3] + f"{i} is " + "so " * (i % 5), "tone": "joy" if i % 2 else "fear"} for i in range(60)
    ]
    path = write_rows(tmp_path / "mixed.jsonl", rows)
    return {"path": str(path), "prompt": "{phrase}", "completion": "{tone}"}


class Kill(Exception):
    pass


@pytest.mark.parametrize("how", ["random", "group_by_length", "group_by_prefix"])
def test_a_run_resumed_within_an_epoch_ends_as_an_uninterrupted_one(
    how: str, llama_folder: Path, mixed: dict[str, Any], tmp_path: Path
) -> None:
    def killed(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "training" and event.done >= 17:
            raise Kill

    config = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "save_steps": 3}
    config |= {"train_sampling_strategy": how}
    peft = {"r": 4, "lora_dropout": 0.2}
    whole = finetune(str(llama_folder), mixed, config, peft, output_dir=tmp_path / "whole")
    assert whole.manifest["training_config"]["train_sampling_strategy"] == how
    with pytest.raises(Kill):
        finetune(str(llama_folder), mixed, config, peft, output_dir=tmp_path / "out", on_event=killed)
    resumed = finetune(str(llama_folder), mixed, config, peft, output_dir=tmp_path / "out")
    assert resumed.manifest["figures"]["resumed_at_step"] == 15, "12 steps an epoch"
    assert (resumed.folder / WEIGHTS_FILE).read_bytes() == (whole.folder / WEIGHTS_FILE).read_bytes()


def test_training_sees_the_batches_of_the_order_and_another_order_is_another_run(
    llama_folder: Path, mixed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[list[int]]] = []
    made: list[EpochOrder] = []
    collate, init = Collator.__call__, EpochOrder.__init__

    def watched(self: Collator, rows: Any) -> Any:
        seen.append([list(row["input_ids"]) for row in rows])
        return collate(self, rows)

    def kept(self: EpochOrder, *args: Any) -> None:
        made.append(self)
        init(self, *args)

    monkeypatch.setattr(Collator, "__call__", watched)
    monkeypatch.setattr(EpochOrder, "__init__", kept)
    config = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "seed": 7}
    config |= {"train_sampling_strategy": "group_by_prefix", "do_eval": False, "data_seed": 11}
    finetune(str(llama_folder), {**mixed, "test_fraction": 0.0}, config, {"r": 2}, output_dir=tmp_path / "out")
    (order,) = made
    assert (order.seed, order.batch_size) == (11, 4), "the micro-batch"
    seen = seen[-30:]  # the forecast before it looks at batches of its own
    lengths = [[len(row) for row in batch] for batch in seen]
    orders = [epoch_order(order.lengths, order.prefixes, 4, 11, epoch, "group_by_prefix") for epoch in (0, 1)]
    assert lengths == [[order.lengths[i] for i in batch] for one in orders for batch in cut(one, 4)]
    assert sum(len({tuple(row[:12]) for row in batch}) == 1 for batch in seen) >= 24, "of 30 batches"


def test_an_order_is_part_of_what_decides_the_adapter(
    llama_folder: Path, mixed: dict[str, Any], tmp_path: Path
) -> None:
    config: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4, "do_eval": False}
    made = [
        finetune(str(llama_folder), mixed, {**config, **more}, {"r": 2}, output_dir=tmp_path / "out", overwrite=True)
        for more in ({}, {"train_sampling_strategy": "sequential"})
    ]
    assert made[0].manifest["key"] != made[1].manifest["key"]


def test_several_processes_resume_in_the_right_epoch() -> None:
    """accelerate's wrappers of a resumed loader do not pass the epoch on; the callback does."""
    from accelerate.data_loader import prepare_data_loader, skip_first_batches
    from torch.utils.data import DataLoader

    order = EpochOrder([10] * 64, [i % 4 for i in range(64)], 4, 3, "group_by_prefix")
    data: Any = list(range(64))
    loader = prepare_data_loader(DataLoader(data, 4, sampler=order), num_processes=2, process_index=1)
    callback = OrderCallback()
    callback.order = order
    callback.on_epoch_begin(None, SimpleNamespace(epoch=2.375), None)
    rest = skip_first_batches(loader, 3)
    rest.set_epoch(2)
    expected = cut(epoch_order(order.lengths, order.prefixes, 4, 3, 2, "group_by_prefix"), 4)[1::2][3:]
    assert [batch.tolist() for batch in rest] == expected
