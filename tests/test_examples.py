"""Only what the assistant says is learned, after exactly the prompt ids of run time; every row is accounted for."""

from __future__ import annotations

import functools
import gc
import pickle
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets.table import MemoryMappedTable
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from phinetune.data.examples import (
    MASKED,
    Example,
    Examples,
    Ledger,
    encode_conversation,
    load_examples,
    split_indices,
    write_examples,
)
from phinetune.data.messages import Conversation, Message, parse_data_config
from phinetune.errors import DataError
from phinetune.events import Event, Progress
from phinetune.model.contract import PromptContract, make_contract
from tiny import PHI_TEMPLATE, PROMPT, tiny_tokenizer, tone_rows, write_rows

PLAIN = None  # a tokenizer without a chat template
JOINED = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # no border between prompt and answer at all
THINKS = PHI_TEMPLATE.replace("<|assistant|>\n{% else", "<|assistant|>\n<think></think>{% else")  # in prompts only
TRIMS = PHI_TEMPLATE.replace("message['content']", "message['content'] | trim")
DROPS = (  # earlier answers are not shown
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHOUTS = (  # the last message is changed
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | upper if loop.last else m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OPEN = (  # nothing closes an answer but the end of the conversation
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% else %}{{ eos_token }}{% endif %}"
)
SILENT = "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}\n{% endfor %}"  # shows no answer
TEMPLATES = [PHI_TEMPLATE, PLAIN, JOINED, THINKS, TRIMS, DROPS, SHOUTS, OPEN]
NAMES = ["phi", "plain", "joined", "thinks", "trims", "drops", "shouts", "open"]

SINGLE = [("user", "What? "), ("assistant", "joy")]
MULTI = [("user", "Hello there"), ("assistant", "joy"), ("user", "and more?"), ("assistant", "sadness at last")]
CONVERSATIONS = {
    "single": SINGLE,
    "multi": MULTI,
    "system": [("system", "Be brief."), *SINGLE],
    "system multi": [("system", "Be brief."), *MULTI],
    "stop token said by the user": [("user", "say <|end|> and <|endoftext|>"), ("assistant", "fear")],
    "scripts": [("user", "ما هي نبرة\n\n你好 🙂 "), ("assistant", " sürpriz\n")],
}


@functools.cache
def contract(template: str | None = PHI_TEMPLATE) -> PromptContract:
    config = LlamaConfig(vocab_size=320, max_position_embeddings=256, eos_token_id=0)
    return make_contract(tiny_tokenizer(template), config)


def conversation(turns: list[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


def encode(messages: list[Message], template: str | None = PHI_TEMPLATE) -> tuple[Example, bool, bool]:
    return encode_conversation(Conversation(messages, "f.jsonl:1"), contract(template))


def learned(example: Example, template: str | None = PHI_TEMPLATE) -> list[str]:
    """The text of each run of learned tokens, special tokens shown."""
    runs: list[list[int]] = []
    for before, label in zip([MASKED, *example.labels], example.labels, strict=False):
        if label != MASKED:
            if before == MASKED:
                runs.append([])
            runs[-1].append(label)
    return [contract(template).tokenizer.decode(run) for run in runs]


def assert_lawful(example: Example, messages: list[Message], template: str | None) -> None:
    encoder = contract(template)
    start = example.prompt_length
    assert example.input_ids[:start] == encoder.prompt_ids(messages[:-1])
    assert len(example.labels) == len(example.input_ids)
    assert all(label in (MASKED, token) for label, token in zip(example.labels, example.input_ids, strict=True))
    answer = example.input_ids[start:]
    assert example.labels[start:] == answer
    assert [token in encoder.stop_ids for token in answer] == [False] * (len(answer) - 1) + [True]


# --- what is learned ---


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES, ids=NAMES)
def test_an_answer_is_learned_after_exactly_the_prompt_ids_of_run_time(
    template: str | None, turns: list[tuple[str, str]]
) -> None:
    messages = conversation(turns)
    example, _, _ = encode(messages, template)
    assert_lawful(example, messages, template)
    assert (example.completion, example.place) == (messages[-1]["content"], "f.jsonl:1")


_CONTENT = st.lists(
    st.sampled_from([" ", "\n", "What?", "joy", "  ", "é", "🙂", "x", "'s", "<|user|>"]) | st.text()
).map("".join)


@settings(max_examples=80, deadline=None)
@given(
    template=st.sampled_from(TEMPLATES),
    asked=st.lists(_CONTENT, min_size=1, max_size=3),
    answers=st.lists(_CONTENT.filter(str.strip), min_size=3, max_size=3),
)
def test_the_law_holds_for_any_text(template: str | None, asked: list[str], answers: list[str]) -> None:
    messages = [
        message
        for question, answer in zip(asked, answers, strict=False)
        for message in conversation([("user", question), ("assistant", answer)])
    ]
    assert_lawful(encode(messages, template)[0], messages, template)


@pytest.mark.parametrize(
    ("turns", "template", "expected"),
    [
        (SINGLE, PHI_TEMPLATE, ["joy<|end|>"]),
        (SINGLE, PLAIN, ["joy<|endoftext|>"]),
        (SINGLE, JOINED, ["joy<|endoftext|>"]),
        (SINGLE, THINKS, ["joy<|end|>"]),
        (MULTI, PHI_TEMPLATE, ["joy<|end|>", "sadness at last<|end|>"]),
        (MULTI, PLAIN, ["joy<|endoftext|>", "sadness at last<|endoftext|>"]),
        ([("system", "Be brief."), *MULTI], PHI_TEMPLATE, ["joy<|end|>", "sadness at last<|end|>"]),
    ],
)
def test_each_answer_is_learned_with_its_stop_token_and_nothing_else(
    turns: list[tuple[str, str]], template: str | None, expected: list[str]
) -> None:
    messages = conversation(turns)
    example, _, _ = encode(messages, template)
    assert learned(example, template) == expected
    first = next(i for i, label in enumerate(example.labels) if label != MASKED)
    asked = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    assert example.input_ids[:first] == contract(template).prompt_ids(messages[:asked])


def test_what_the_user_says_is_never_learned_where_answers_are_not_closed() -> None:
    example, _, _ = encode(conversation(MULTI), OPEN)
    assert "and more?" not in "".join(learned(example, OPEN))
    assert "sadness at last" in learned(example, OPEN)[-1]


def test_an_answer_that_the_template_does_not_show_is_still_learned() -> None:
    example, _, _ = encode(conversation(SINGLE), SILENT)
    assert learned(example, SILENT) == ["joy<|endoftext|>"]


@pytest.mark.parametrize(
    ("turns", "template", "expected"),
    [
        (SINGLE, PHI_TEMPLATE, (False, False)),
        (MULTI, PHI_TEMPLATE, (False, False)),
        (MULTI, PLAIN, (False, False)),
        (SINGLE, JOINED, (True, False)),
        (MULTI, JOINED, (True, True)),
        (SINGLE, DROPS, (False, False)),
        (MULTI, DROPS, (True, True)),
        (SINGLE, SHOUTS, (True, False)),
        (MULTI, SHOUTS, (True, True)),
    ],
)
def test_only_the_last_answer_is_learned_where_the_border_cannot_be_kept(
    turns: list[tuple[str, str]], template: str | None, expected: tuple[bool, bool]
) -> None:
    example, split, last_only = encode(conversation(turns), template)
    assert (split, last_only) == expected
    if last_only:
        (answer,) = learned(example, template)
        assert answer.startswith("sadness at last<|end")


def test_a_tokenizer_that_joins_over_the_border_is_met_in_these_tests() -> None:
    tokenize = contract(JOINED).tokenize
    assert tokenize("What? joy")[: len(tokenize("What? "))] != tokenize("What? ")


def test_text_that_no_tokenizer_can_take_is_a_data_error_with_its_place(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [*tone_rows(4), {"phrase": "half an emoji \ud83d", "tone": "joy"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:5"):
        load(file)


# --- the ledger ---


def load(file: Path | str, **config: Any) -> tuple[Examples, Examples, Ledger]:
    templates = {} if str(file) == "tone" else PROMPT
    return load_examples(parse_data_config({"path": str(file), **templates, **config}), contract())


def places(examples: Examples) -> list[str]:
    return [row["place"] for row in examples]


def test_every_row_is_accounted_for(tone_file: Path) -> None:
    train, test, ledger = load(tone_file, test_fraction=0.25)
    rows = [*train, *test]
    assert (ledger.rows, ledger.used, ledger.train, ledger.test) == (24, 24, 18, 6)
    assert (len(train), len(test)) == (18, 6)
    assert ledger.tokens == sum(len(row["input_ids"]) for row in rows) == sum(train.lengths) + sum(test.lengths)
    assert ledger.supervised_tokens == sum(label != MASKED for row in rows for label in row["labels"])
    assert ledger.lines() == [
        f"data: 24 rows, 18 to train on, 6 held out; {ledger.supervised_tokens} of {ledger.tokens} tokens are learned"
    ]


@pytest.mark.parametrize("by_config", [True, False], ids=["data.max_length", "the model's context"])
def test_rows_that_are_too_long_are_left_out_and_counted_and_none_is_cut(by_config: bool, tmp_path: Path) -> None:
    rows = [{"phrase": "x" * (400 if i % 2 else 5), "tone": "joy"} for i in range(14)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    train, test, ledger = load(file, **({"max_length": 100} if by_config else {}))
    assert (ledger.rows, ledger.used, ledger.too_long) == (14, 7, 7)
    assert ledger.too_long_places == [f"{file}:{i}" for i in (2, 4, 6, 8, 10)]
    line = next(line for line in ledger.lines() if "longer than max_length" in line)
    assert "7 rows" in line
    assert line.endswith(f"{file}:10 ...")
    stops = contract().stop_ids
    assert all(row["input_ids"][-1] in stops and len(row["input_ids"]) <= 100 for row in [*train, *test])


@pytest.mark.parametrize(("room", "kept"), [(0, 1), (-1, 0)])
def test_a_row_of_exactly_max_length_is_kept(room: int, kept: int, tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "rows.jsonl", [{"phrase": "short", "tone": "joy"}, {"phrase": "longer " * 9, "tone": "joy"}]
    )
    longest = max(load(file, test_fraction=0)[0].lengths)
    _, _, ledger = load(file, test_fraction=0, max_length=longest + room)
    assert ledger.used == 1 + kept


def test_a_file_of_rows_that_are_all_too_long_is_refused(tone_file: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tone_file, max_length=4)
    assert caught.value.problems == [f"{tone_file}: all 24 rows are longer than max_length (4 tokens)"]
    assert "data.max_length" in caught.value.hint


def test_repeated_rows_and_contradictions_are_counted_and_kept_on_one_side(tmp_path: Path) -> None:
    said = [("a", "joy")] * 3 + [("a", "fear"), ("b", "joy"), ("c", "joy"), ("c", "fear"), ("d", "joy")]
    file = write_rows(tmp_path / "rows.jsonl", [{"phrase": p, "tone": t} for p, t in said])
    for seed in range(5):
        train, test, ledger = load(file, test_fraction=0.3, seed=seed)
        assert (ledger.used, ledger.duplicates, ledger.contradictions) == (8, 2, 2)
        sides = [{tuple(row["input_ids"][: row["prompt_length"]]) for row in side} for side in (train, test)]
        assert not sides[0] & sides[1]
    text = "\n".join(ledger.lines())
    assert "2 rows repeat an earlier row" in text
    assert "2 prompts come with different answers" in text


@pytest.mark.parametrize(("template", "count"), [(PHI_TEMPLATE, 0), (DROPS, 2)])
def test_conversations_of_which_only_the_last_answer_is_learned_are_said(
    template: str, count: int, tmp_path: Path
) -> None:
    rows = [{"messages": conversation(turns)} for turns in (MULTI, [("user", "again"), *SINGLE[1:], *MULTI], SINGLE)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    _, _, ledger = load_examples(parse_data_config(file), contract(template))
    assert ledger.last_turn_only == count
    said = [line for line in ledger.lines() if "only the last answer is learned" in line]
    assert len(said) == (count > 0)
    assert not count or f"in {count} conversations" in said[0]


def test_reading_a_large_file_is_reported_as_it_goes(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"phrase": "x", "tone": "joy"}] * 1001)
    events: list[Event] = []
    load_examples(parse_data_config({"path": str(file), **PROMPT}), contract(), events.append)
    assert [e for e in events if isinstance(e, Progress)] == [Progress("reading data", n) for n in (500, 1000)]


# --- the split ---


def test_the_split_is_the_same_for_the_same_seed_and_another_for_another(tone_file: Path) -> None:
    held_out = [places(load(tone_file, seed=seed)[1]) for seed in (0, 0, 1, 2)]
    assert held_out[0] == held_out[1]
    assert len({tuple(p) for p in held_out}) == 3


def test_train_and_test_are_the_whole_file_in_its_order(tone_file: Path) -> None:
    train, test, _ = load(tone_file)
    number = {f"{tone_file}:{i}": i for i in range(1, 25)}
    train_lines, test_lines = ([number[p] for p in places(side)] for side in (train, test))
    assert sorted(train_lines + test_lines) == list(range(1, 25))
    assert train_lines == sorted(train_lines)
    assert test_lines == sorted(test_lines)


def test_nothing_is_held_out_at_fraction_zero(tone_file: Path) -> None:
    train, test, _ = load(tone_file, test_fraction=0)
    assert (len(train), len(test), list(test), test.lengths) == (24, 0, [], [])


_GROUPS = st.lists(st.integers(0, 30).map(lambda i: str(i).encode()), min_size=1, max_size=60)
_FRACTION = st.floats(0, 1, exclude_max=True)


@given(groups=_GROUPS, fraction=_FRACTION, seed=st.integers(0, 99))
def test_the_split_covers_all_once_and_parts_no_group(groups: list[bytes], fraction: float, seed: int) -> None:
    train, test = split_indices(groups, fraction, seed)
    assert sorted(train + test) == list(range(len(groups)))
    assert not {groups[i] for i in train} & {groups[i] for i in test}
    assert train, "something is always left to train on"
    assert (train, test) == split_indices(groups, fraction, seed)
    wanted = min(max(round(len(groups) * fraction), 1), len(groups) - 1) if fraction > 0 else 0
    assert len(test) <= wanted
    assert bool(test) == (min(Counter(groups).values()) <= wanted)


@given(count=st.integers(2, 80), fraction=_FRACTION, seed=st.integers(0, 99))
def test_distinct_prompts_are_held_out_to_the_number(count: int, fraction: float, seed: int) -> None:
    _, test = split_indices([str(i).encode() for i in range(count)], fraction, seed)
    assert len(test) == (min(max(round(count * fraction), 1), count - 1) if fraction > 0 else 0)


# --- the bundled set ---


def test_the_bundled_set_loads_whole() -> None:
    train, test, ledger = load("tone")
    assert ledger.rows == ledger.used == len(train) + len(test)
    assert (ledger.too_long, ledger.duplicates, ledger.contradictions) == (0, 0, 0)
    assert {row["completion"] for row in test} == {"joy", "sadness", "fear", "surprise"}


# --- the memory-mapped file ---


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def example(place: str = "f.jsonl:1") -> Example:
    return Example([5, 6, 7], [MASKED, 6, 7], 1, "joy", place)


def test_examples_come_back_as_they_were_from_a_mapped_file(temporary: Path) -> None:
    examples = write_examples(example(f"f.jsonl:{i}") for i in range(2500))
    assert isinstance(examples.table.data, MemoryMappedTable)
    assert places(examples) == [f"f.jsonl:{i}" for i in range(2500)]
    assert examples[7] == {**vars(example("f.jsonl:7")), "length": 3}
    assert places(examples.subset([5, 3])) == ["f.jsonl:5", "f.jsonl:3"]
    assert examples.subset([5, 3]).lengths == [3, 3]


def test_the_file_stays_as_long_as_a_view_of_it_and_no_longer(temporary: Path, tone_file: Path) -> None:
    train, test, _ = load(tone_file)
    gc.collect()
    assert len(list(temporary.iterdir())) == 1
    assert pickle.loads(pickle.dumps(train.table))[0] == train[0]  # what a worker process of a data loader does
    del train
    gc.collect()
    assert len(list(temporary.iterdir())) == 1
    del test
    gc.collect()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("broken", "config"), [("{broken\n", {}), ("", {"max_length": 4})])
def test_a_file_that_is_refused_leaves_nothing_behind(
    broken: str, config: dict[str, Any], temporary: Path, tone_file: Path
) -> None:
    with tone_file.open("a") as stream:
        stream.write(broken)
    with pytest.raises(DataError):
        load(tone_file, **config)
    gc.collect()
    assert list(temporary.iterdir()) == []
