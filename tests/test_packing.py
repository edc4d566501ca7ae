"""Blocks and windows lose nothing and repeat nothing; a packed block is exactly the micro-batch of its rows."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phinetune.artifact import read_manifest
from phinetune.data.batches import Collator, Layout
from phinetune.data.blocks import make_blocks
from phinetune.data.encoding import MASKED, Example
from phinetune.data.examples import load_examples
from phinetune.data.ledger import Ledger
from phinetune.data.messages import DataConfig, parse_data_config
from phinetune.errors import ConfigError
from phinetune.events import Event, Note
from phinetune.generation.load import load_generator
from phinetune.generation.protocol import Sampling
from phinetune.model.contract import load_contract
from phinetune.serving.chat import ChatSession, prompt_template, single_field_template
from phinetune.training.loss import learned_positions, supervised_loss
from phinetune.workflow.evaluate import evaluate
from phinetune.workflow.export import training_probes
from phinetune.workflow.finetune import finetune
from phinetune.workflow.merge import merge
from test_texts import OTHER_TEMPLATE, TEXT, contract, load
from test_training import FAST, FP32
from tiny import PROMPT, tiny_model, tone_rows, write_rows

Row = dict[str, Any]


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    """Rows of texts and of prompts with answers; every token is another number."""
    made, number = [], 0
    for _ in range(draw(st.integers(1, 8))):
        length = draw(st.integers(2, 20))
        masked = draw(st.integers(1, length - 1))
        ids = list(range(number, number + length))
        number += length
        made.append({"input_ids": ids, "labels": [MASKED] * masked + ids[masked:], "place": f"f:{len(made)}"})
    return made


def blocks(source: list[Row], length: int, ledger: Ledger | None = None, **config: Any) -> list[Example]:
    strategy = config.pop("strategy", "join")
    joiner = config.pop("joiner", [])
    made = DataConfig("f", strategy=strategy, max_length=max(length, 2), **config)
    return list(make_blocks(source, made, length, joiner, ledger or Ledger()))


def learned(labels: list[int]) -> list[int]:
    return [label for label in labels if label != MASKED]


@given(rows(), st.integers(2, 24))
def test_join_learns_every_token_once_in_order_and_within_its_row(source: list[Row], length: int) -> None:
    made = blocks(source, length)
    assert [t for b in made for t in learned(b.labels)] == [t for row in source for t in learned(row["labels"])]
    row_of = {token: row["place"] for row in source for token in row["input_ids"]}
    for block in made:
        assert len(block.input_ids) == len(block.labels) == sum(block.segments) <= length
        start = 0
        for part in block.segments:
            ids = block.input_ids[start : start + part]
            assert len({row_of[i] for i in ids}) == 1 and ids == list(range(ids[0], ids[0] + part))
            assert block.labels[start] == MASKED
            start += part
    for before, after in pairwise(made):
        assert len(before.input_ids) + after.segments[0] > length  # no room was wasted


@given(rows(), st.integers(2, 24), st.data())
def test_windows_learn_every_token_of_the_stream_once(source: list[Row], length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    made = blocks(source, length, strategy="sliding-window", stride=stride)
    stream = [token for row in source for token in row["input_ids"]]
    wanted = [t for row in source for t in learned(row["labels"])]
    if stride == length:  # no token before them is in their window
        wanted = [t for t in wanted if t % length]
    assert [t for w in made for t in learned(w.labels)] == wanted
    for window in made:
        start = window.input_ids[0]
        assert start % stride == 0 and window.input_ids == stream[start : start + length]
        assert start == 0 or window.labels[: length - stride] == [MASKED] * min(length - stride, len(window.labels))
        assert any(row["place"] == window.place and start in row["input_ids"] for row in source)


@given(rows(), st.integers(2, 24))
def test_attending_across_is_one_stream_cut_at_exactly_max_length(source: list[Row], length: int) -> None:
    ledger = Ledger()
    made = blocks(source, length, ledger, attend_across=True)
    stream = [token for row in source for token in row["input_ids"]]
    assert all(not b.segments for b in made)
    if not ledger.without_learned and len(stream) % length != 1:
        assert [t for b in made for t in b.input_ids] == stream
    assert all(len(b.input_ids) == length for b in made if b.input_ids[-1] != stream[-1])


def test_the_joiner_follows_each_row_and_is_learned() -> None:
    source = [
        {"input_ids": [1, 2], "labels": [MASKED, 2], "place": "a"},
        {"input_ids": [3, 4], "labels": [MASKED, 4], "place": "b"},
    ]
    (block,) = blocks(source, 8, joiner=[9])
    assert (block.input_ids, block.labels, block.segments) == ([1, 2, 9, 3, 4, 9], [MASKED, 2, 9, MASKED, 4, 9], [3, 3])


def test_a_large_row_is_walked_in_pieces() -> None:
    n = 200_000
    source = [{"input_ids": list(range(n)), "labels": [MASKED, *range(1, n)], "place": "a"}]
    made = blocks(source, 512, strategy="sliding-window", stride=256)
    assert sum(len(learned(w.labels)) for w in made) == n - 1


# --- from file to blocks ---


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", tone_rows(40))


def test_rows_are_held_out_before_they_are_packed(file: Path) -> None:
    joined = {"text": TEXT, "strategy": "join", "max_length": 200, "joiner": "\n\n"}
    train, test, ledger = load(file, **joined)
    plain_train, plain_test, plain = load(file, text=TEXT)
    train_rows, test_rows, _ = load(file, True, **joined)
    for side, rows_of, plain_rows in ((train, train_rows, plain_train), (test, test_rows, plain_test)):
        assert [r["input_ids"] for r in rows_of] == [r["input_ids"] for r in plain_rows]
        assert sum(len(r["segments"]) for r in side) == len(plain_rows)
    joiner = len(contract().tokenize("\n\n"))
    assert ledger.tokens == plain.tokens + 40 * joiner
    assert ledger.supervised_tokens == plain.supervised_tokens + 40 * joiner
    assert (ledger.blocks, ledger.held_out_blocks, ledger.last_block) == (len(train), len(test), train.lengths[-1])
    assert train.longest == max(max(r["segments"]) for r in train) < max(train.lengths)
    assert any("each row sees itself only" in line and "is kept" in line for line in ledger.lines())


@pytest.mark.parametrize("more", [{}, {"attend_across": True}, {"strategy": "sliding-window", "stride": 100}])
def test_a_set_of_fewer_tokens_than_max_length_is_one_block(more: dict[str, Any], tmp_path: Path) -> None:
    small = write_rows(tmp_path / "small.jsonl", tone_rows(3))
    config = {"text": TEXT, "strategy": "join", "max_length": 250, "test_fraction": 0, **more}
    train, _, ledger = load(small, **config)
    assert len(train) == 1 and train.lengths[0] == ledger.tokens < 250
    assert ledger.supervised_tokens == ledger.tokens - (3 if not more else 1)


def test_join_splits_texts_and_never_an_answer_from_its_question(file: Path, tmp_path: Path) -> None:
    long = write_rows(tmp_path / "long.jsonl", [*tone_rows(6), {"phrase": "x " * 300, "tone": "joy"}])
    train, _, ledger = load(long, text=TEXT, strategy="join", max_length=60, test_fraction=0)
    assert (ledger.split, ledger.too_long) == (7, 0) or ledger.split >= 1
    assert ledger.pieces > ledger.split and max(train.lengths) <= 60
    assert any("nothing of them is lost" in line for line in ledger.lines())
    options = {"prompt": "{phrase}", "completion": "{tone}", "chat": False, "strategy": "join", "max_length": 60}
    _, _, ledger = load(long, test_fraction=0, **options)
    assert ledger.split == 0 and ledger.too_long == 1


def test_more_than_the_context_is_said(file: Path) -> None:
    events: list[Event] = []
    config = parse_data_config({"path": str(file), "text": TEXT, "max_length": 9999})
    load_examples(config, contract(), events.append)
    assert any("max_length is 256, the model's context" in e.text for e in events if isinstance(e, Note))


# --- a block is the micro-batch of its rows ---


def gradient(batch: dict[str, torch.Tensor], count: int) -> tuple[float, torch.Tensor]:
    model = tiny_model()
    loss = supervised_loss(model, model.get_output_embeddings(), batch, torch.float32, count)
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("layout", ["padded", "tree", "auto"])
@pytest.mark.parametrize("chat", [False, True])
def test_packed_and_unpacked_have_one_gradient(layout: Layout, chat: bool, file: Path) -> None:
    shape = PROMPT if chat else {"text": TEXT}
    common = {**shape, "max_rows": 6, "test_fraction": 0}
    packed, _, _ = load(file, strategy="join", max_length=250, **common)
    plain, _, _ = load(file, **common)
    assert 1 <= len(packed) < len(plain)
    batch, apart = Collator(0, 64, layout)(list(packed)), Collator(0, 64, "padded")(list(plain))
    count = len(learned_positions(apart["labels"])[1])
    assert len(learned_positions(batch["labels"])[1]) == count == int((batch["labels"] != MASKED).sum())
    (loss, grad), (expected, expected_grad) = gradient(batch, count), gradient(apart, count)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert float((grad - expected_grad).abs().max()) <= 1e-6 * max(1.0, float(expected_grad.abs().max()))


def test_attending_across_is_something_else(file: Path) -> None:
    common = {"text": TEXT, "max_rows": 4, "test_fraction": 0, "strategy": "join", "max_length": 250}
    sides = [load(file, attend_across=across, **common)[0] for across in (False, True)]
    losses = [gradient(b := Collator(0, 64)(list(side)), len(learned_positions(b["labels"])[1]))[0] for side in sides]
    assert abs(losses[0] - losses[1]) > 1e-3


# --- through the stages ---

JOINED = {"text": TEXT, "strategy": "join", "max_length": 200}


@pytest.mark.parametrize(
    "more",
    [{}, {"attend_across": True}, {"strategy": "sliding-window", "stride": 120, "joiner": "\n"}],
    ids=["join", "across", "windows"],
)
def test_texts_go_through_the_stages(more: dict[str, Any], llama_folder: Path, file: Path, tmp_path: Path) -> None:
    data = {"path": str(file), **JOINED, **more}
    adapter = finetune(str(llama_folder), data, FAST, {"r": 4}, FP32, tmp_path / "adapter")
    figures = adapter.manifest["figures"]
    assert figures["eval_loss"] > 0 and figures["train_loss"][-1] < figures["train_loss"][0]
    assert (
        evaluate(str(adapter.folder), model_kwargs=FP32, max_new_tokens=2).count == adapter.manifest["ledger"]["test"]
    )
    if more:
        return
    merged = merge(str(adapter.folder), tmp_path / "merged")
    assert merged.manifest["data"]["text"] == TEXT
    probes = training_probes(merged.manifest, load_contract(merged.folder))
    assert probes[0].text == f"### Text: {tone_rows(1)[0]['phrase']}\n### The tone is:\n"
    template = single_field_template(prompt_template(merged.manifest["data"]))
    generator = load_generator(str(merged.folder), FP32)
    session = ChatSession(generator, Sampling(2), template=template, chat=False)
    list(session.reply("so glad"))
    assert session._prompt() != generator.contract.prompt_ids(session.messages)
    session.messages.pop()
    assert session._prompt() == generator.contract.raw_ids("### Text: so glad\n### The tone is:\n")


def test_texts_without_a_prompt_have_a_loss_but_no_answers(llama_folder: Path, file: Path, tmp_path: Path) -> None:
    data = {"path": str(file), "text": "{phrase}"}
    adapter = finetune(str(llama_folder), data, {**FAST, "max_steps": 1}, {"r": 4}, FP32, tmp_path / "adapter")
    assert adapter.manifest["figures"]["eval_perplexity"] > 1
    with pytest.raises(ConfigError, match="there is nothing to answer") as caught:
        evaluate(str(adapter.folder))
    assert len(caught.value.problems) == 1
    assert prompt_template(adapter.manifest["data"]) == ""


def test_another_chat_template_goes_with_the_model(llama_folder: Path, file: Path, tmp_path: Path) -> None:
    data = {"path": str(file), **PROMPT, "chat_template": OTHER_TEMPLATE}
    adapter = finetune(str(llama_folder), data, {**FAST, "max_steps": 1}, {"r": 4}, FP32, tmp_path / "adapter")
    merged = merge(str(adapter.folder), tmp_path / "merged")
    for folder in (adapter.folder, merged.folder):
        assert load_contract(folder).chat_template == OTHER_TEMPLATE
    events: list[Event] = []
    evaluate(str(merged.folder), model_kwargs=FP32, max_new_tokens=1, on_event=events.append)
    assert not any("not the model's own" in e.text for e in events if isinstance(e, Note))
    evaluate(str(llama_folder), data, model_kwargs=FP32, max_new_tokens=1, on_event=events.append)
    assert any("not the model's own" in e.text for e in events if isinstance(e, Note))


def test_eval_data_is_held_out_whole(llama_folder: Path, file: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", tone_rows(7))
    config, data = {**FAST, "max_steps": 1}, {"path": str(file), **JOINED}
    result = finetune(str(llama_folder), data, config, {"r": 4}, FP32, tmp_path / "a", eval_data=str(other))
    manifest = read_manifest(result.folder)
    assert manifest["eval_data"]["text"] == TEXT and manifest["eval_data"]["strategy"] == "join"
    assert (manifest["ledger"]["train"], manifest["ledger"]["test"], manifest["eval_ledger"]["train"]) == (40, 0, 7)
    assert evaluate(str(result.folder), model_kwargs=FP32, max_new_tokens=1).count == 7
    assert evaluate(str(result.folder), split="train", model_kwargs=FP32, max_new_tokens=1).count == 40
    merged = merge(str(result.folder), tmp_path / "m")
    assert merged.manifest["eval_data_sha256"] == manifest["eval_data_sha256"]
    again = finetune(str(llama_folder), data, config, {"r": 4}, FP32, tmp_path / "a", eval_data=str(other))
    assert again.unchanged
    part = {"rows": "[:5]"}
    same = finetune(str(llama_folder), data, config, {"r": 4}, FP32, tmp_path / "b", eval_data=part)
    assert same.manifest["eval_data"]["path"] == str(file) and same.manifest["eval_ledger"]["rows"] == 5
    assert same.manifest["key"] != manifest["key"]


def test_problems_of_eval_data_name_it(llama_folder: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval_data\.pth: unknown key"):
        finetune(str(llama_folder), str(file), output_dir=tmp_path / "a", eval_data={"pth": "x"})
    with pytest.raises(ConfigError, match=r"eval_data\.chat_template: must be that of data"):
        finetune(str(llama_folder), {"path": str(file), **PROMPT}, output_dir=tmp_path / "a",
                 eval_data={"path": str(file), "chat_template": OTHER_TEMPLATE})  # fmt: skip


def test_settings_take_templates_and_slices_as_they_stand() -> None:
    from phinetune.config import apply_settings

    settings = ["data.text=### {a}: {b}", "eval_data.rows=[:70%]", "data.max_rows=3"]
    values = apply_settings({"data": "f.jsonl", "eval_data": "g.jsonl"}, settings)
    assert values == {
        "data": {"path": "f.jsonl", "text": "### {a}: {b}", "max_rows": 3},
        "eval_data": {"path": "g.jsonl", "rows": "[:70%]"},
    }
    assert json.dumps(values)
