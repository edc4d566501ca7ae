"""Texts without a chat template, their prompts in evaluation and chat, other templates, and which rows of which data set are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from phinetune.data.examples import MASKED, Examples, Ledger, load_examples
from phinetune.data.inheritance import inherit
from phinetune.data.messages import DataConfig, fill_template, parse_data_config, split_at_last_field
from phinetune.data.records import read_records
from phinetune.data.sources import chosen_rows, data_source
from phinetune.errors import ConfigError, DataError
from phinetune.model.contract import PromptContract, make_contract
from tiny import PHI_TEMPLATE, tiny_tokenizer, tone_rows, write_rows

TEXT = "### Text: {phrase}\n### The tone is:\n{tone}"
OTHER_TEMPLATE = PHI_TEMPLATE.replace("<|user|>", "[ask]").replace(
    "<|{{ message['role'] }}|>", "[{{ message['role'] }}]"
)


def contract(adds_bos: bool = False) -> PromptContract:
    tokenizer = tiny_tokenizer()
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return make_contract(tokenizer, LlamaConfig(vocab_size=320, max_position_embeddings=256, eos_token_id=0))


def load(
    file: Path | str, as_rows: bool = False, adds_bos: bool = False, **config: Any
) -> tuple[Examples, Examples, Ledger]:
    return load_examples(parse_data_config({"path": str(file), **config}), contract(adds_bos), lambda e: None, as_rows)


# --- templates of texts ---


@pytest.mark.parametrize(
    ("template", "prompt", "rest"),
    [
        (TEXT, "### Text: {phrase}\n### The tone is:\n", "{tone}"),
        ("Q: {q} A: {Best Answer} done", "Q: {q} A:", " {Best Answer} done"),
        ("{text}", "", "{text}"),
        ("{{a}} {x}{{b}}", "{{a}}", " {x}{{b}}"),
    ],
)
def test_a_text_is_split_at_its_last_field(template: str, prompt: str, rest: str) -> None:
    assert split_at_last_field(template) == (prompt, rest)
    fields = {name: f"<{name}>" for name in ("phrase", "tone", "q", "Best Answer", "text", "x")}
    assert fill_template(prompt, fields) + fill_template(rest, fields) == fill_template(template, fields)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"text": "{phrase.__class__}"}, "is not the name of a field"),
        ({"text": "no field"}, "names no field"),
        ({"text": "{a}", "prompt": "{a}", "completion": "{b}"}, "text stands instead of"),
        ({"text": "{a}", "chat": True}, "data.chat: text implies false"),
        ({"text": "{a}", "learn_prompt": False}, "data.learn_prompt: text implies true"),
        ({"text": "{a}", "messages": "turns"}, "messages stands instead of"),
        ({"text": "{a}", "system": "Be kind."}, "system needs the chat template"),
        ({"text": "{a}", "chat_template": "x"}, "chat_template has no use"),
        ({"strategy": "join"}, "strategy join needs max_length"),
        ({"strategy": "sliding-window", "max_length": 8}, "needs stride"),
        ({"strategy": "sliding-window", "max_length": 8, "stride": 9}, "stride must be 1 to max_length"),
        ({"stride": 4}, "stride belongs to"),
        ({"joiner": "\n"}, "joiner belongs to"),
        ({"attend_across": True}, "attend_across belongs to"),
        ({"too_long": "cut"}, "a conversation is never cut"),
        ({"rows": "70%"}, "rows must look like"),
        ({"draw": 1}, "draw needs max_rows"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
        ({"strategy": "rowz"}, "data.strategy"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_data_config({"path": "f.jsonl", **values})
    assert problem in str(caught.value)
    assert len(caught.value.problems) == 1


def test_every_broken_rule_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"max_length; .*stride belongs"):
        parse_data_config({"path": "f", "strategy": "join", "stride": 3})


def test_a_config_survives_the_manifest() -> None:
    from dataclasses import asdict

    config = parse_data_config({"path": "f", "text": TEXT, "too_long": "cut"})
    assert (config.chat, config.learn_prompt) == (False, True)
    assert parse_data_config(json.loads(json.dumps(asdict(config)))) == config


# --- encoding ---


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_is_learned_whole_with_its_stop_token(adds_bos: bool, tone_file: Path) -> None:
    train, test, ledger = load(tone_file, text=TEXT, adds_bos=adds_bos)
    encoder = contract(adds_bos)
    for row, source in zip(
        sorted([*train, *test], key=lambda r: int(r["place"].split(":")[-1])), tone_rows(), strict=True
    ):
        text = fill_template(TEXT, source)
        assert row["input_ids"] == [*([0] if adds_bos else []), *encoder.tokenize(text), encoder.stop_ids[0]]
        assert row["labels"] == [MASKED, *row["input_ids"][1:]]
        prompt = text.removesuffix(source["tone"])
        assert row["input_ids"][: row["prompt_length"]] == encoder.raw_ids(prompt)
        assert row["completion"] == source["tone"]
    assert (ledger.rows, len(train), len(test)) == (24, 19, 5)
    assert ledger.supervised_tokens == ledger.tokens - 24


def test_spaces_before_the_answer_belong_to_it(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "r.jsonl", [{"a": "one", "b": "two"}])
    (row,) = load(file, text="{a}:  {b}", test_fraction=0)[0]
    assert contract().decode(row["input_ids"][: row["prompt_length"]]) == "one:"
    assert row["completion"] == "  two"


def test_a_stop_token_in_a_text_is_not_doubled_and_ends_the_reference(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "r.jsonl", [{"a": "one", "b": "two"}])
    (row,) = load(file, text="{a}: {b}<|end|>", test_fraction=0)[0]
    stop = contract().tokenize("<|end|>")[0]
    assert row["input_ids"].count(stop) == 1 and row["input_ids"][-1] == stop
    assert row["completion"].strip() == "two"


@pytest.mark.parametrize("learn_prompt", [False, True])
def test_prompt_and_completion_as_they_stand(learn_prompt: bool, tone_file: Path) -> None:
    templates = {"prompt": "{phrase}\n", "completion": "{tone}"}
    train, _, _ = load(tone_file, chat=False, learn_prompt=learn_prompt, **templates)
    encoder = contract()
    for row in train:
        start = row["prompt_length"]
        assert "<|user|>" not in encoder.tokenizer.decode(row["input_ids"])
        assert (
            row["labels"]
            == [MASKED] * (1 if learn_prompt else start) + row["input_ids"][1 if learn_prompt else start :]
        )
        assert row["input_ids"][-1] == encoder.stop_ids[0]


def test_learning_prompts_of_conversations_holds_out_the_same_rows(tone_file: Path) -> None:
    templates = {"prompt": "{phrase}", "completion": "{tone}"}
    sides = [load(tone_file, learn_prompt=learn, **templates)[:2] for learn in (False, True)]
    for plain, learned in zip(*sides, strict=True):
        assert [r["place"] for r in plain] == [r["place"] for r in learned]
        assert all(r["labels"] == [MASKED, *r["input_ids"][1:]] for r in learned)
        assert [r["input_ids"] for r in plain] == [r["input_ids"] for r in learned]


def test_texts_without_a_prompt_are_split_by_their_content(tmp_path: Path) -> None:
    rows = [{"t": f"text {i % 8}"} for i in range(24)]
    train, test, ledger = load(write_rows(tmp_path / "r.jsonl", rows), text="{t}")
    sides = [{tuple(r["input_ids"]) for r in side} for side in (train, test)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert (ledger.duplicates, ledger.contradictions) == (16, 0)
    assert all(r["prompt_length"] == 0 for r in train)


def test_blank_texts_are_counted_and_missing_fields_are_errors(tmp_path: Path) -> None:
    rows = [{"t": "one"}, {"t": "  "}, {"t": ""}, {"t": "two"}]
    train, _, ledger = load(write_rows(tmp_path / "r.jsonl", rows), text="say: {t}", test_fraction=0)
    assert (ledger.rows, ledger.empty, len(train)) == (4, 2, 2)
    assert any("2 rows are left out: all fields" in line for line in ledger.lines())
    with pytest.raises(DataError, match=r"all 1 rows the fields of data\.text are blank"):
        load(write_rows(tmp_path / "b.jsonl", [{"t": " "}]), text="say: {t}")
    with pytest.raises(DataError, match=r'm\.jsonl:2: missing field "t" \(found: u\)'):
        load(write_rows(tmp_path / "m.jsonl", [{"t": "one"}, {"u": "two"}]), text="{t}")


def test_a_long_text_is_left_out_or_cut_and_said(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "r.jsonl", [{"t": "x " * 100}, {"t": "short"}])
    _, _, ledger = load(file, text="{t}", max_length=50, test_fraction=0)
    assert (ledger.too_long, ledger.used, ledger.cut) == (1, 1, 0)
    train, _, ledger = load(file, text="{t}", max_length=50, test_fraction=0, too_long="cut")
    assert (ledger.too_long, ledger.used, ledger.cut) == (0, 2, 1)
    whole = contract().raw_ids("x " * 100)
    assert train[0]["input_ids"] == whole[:50] and ledger.cut_tokens == len(whole) + 1 - 50
    assert any(f"leaves out {ledger.cut_tokens} tokens" in line for line in ledger.lines())
    asked, _, _ = load(file, True, text="{t}", max_length=50, test_fraction=0, too_long="cut")
    assert asked.lengths[0] == len(whole) + 1  # scored rows are whole


def test_cutting_never_leaves_a_row_without_an_answer(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "r.jsonl", [{"a": "x " * 100, "b": "y"}, {"a": "x", "b": "y"}])
    options = {"prompt": "{a}", "completion": "{b}", "chat": False, "too_long": "cut", "max_length": 50}
    train, _, ledger = load(file, test_fraction=0, **options)
    assert (ledger.too_long, ledger.cut, len(train)) == (1, 0, 1)


def test_the_field_of_the_messages_can_be_named(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write_rows(tmp_path / "r.jsonl", [{"talk": turns, "messages": "of no use"}])
    assert load(file, messages="talk", test_fraction=0)[0][0]["completion"] == "b"
    with pytest.raises(DataError, match='missing field "chat"'):
        load(file, messages="chat")


def test_messages_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    turns = [{"role": r, "content": "a"} for r in ("system", "user", "assistant")]
    with pytest.raises(DataError, match="one prompt and one completion"):
        load(write_rows(tmp_path / "r.jsonl", [{"messages": turns}]), chat=False)


# --- another chat template ---


def test_another_chat_template_makes_another_contract() -> None:
    own = contract()
    other = own.with_chat_template(OTHER_TEMPLATE)
    assert own.with_chat_template(None) is own and own.with_chat_template(own.chat_template) is own
    assert other.render([{"role": "user", "content": "hi"}], True).startswith("[user]")
    assert other.probes != own.probes and other.stop_ids == own.stop_ids


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}", "fails on a plain conversation"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.__class__.__mro__ }}", "fails on a plain conversation"),
        ("hello", "leaves out what the messages say"),
    ],
)
def test_a_template_that_cannot_be_is_refused(template: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        contract().with_chat_template(template)
    assert problem in caught.value.problems[0] and "\n" not in caught.value.problems[0]


# --- which rows ---


@pytest.mark.parametrize(
    ("rows", "expected"),
    [("[:70%]", range(17)), ("[10:20]", range(10, 20)), ("[-5:]", range(19, 24)), ("[:]", range(24)), ("[20:99]", range(20, 24)),
     ("[:-22]", range(2)), ("[50%:-10%]", range(12, 22)), ("[-99:2]", range(2))],
)  # fmt: skip
def test_slices_are_those_of_the_hub(rows: str, expected: range, tone_file: Path) -> None:
    found = chosen_rows(DataConfig(str(tone_file), rows=rows), tone_file)
    assert [r.place for r in found] == [f"{tone_file}:{i + 1}" for i in expected]


def test_at_most_so_many_rows_from_the_front_or_drawn(tone_file: Path) -> None:
    def numbers(**config: Any) -> list[int]:
        return [int(r.place.split(":")[-1]) for r in chosen_rows(DataConfig(str(tone_file), **config), tone_file)]

    assert numbers(max_rows=3) == [1, 2, 3] and numbers(max_rows=99) == list(range(1, 25))
    drawn = numbers(max_rows=5, draw=1)
    assert drawn == numbers(max_rows=5, draw=1) == sorted(set(drawn)) and len(drawn) == 5
    assert drawn != numbers(max_rows=5, draw=2)
    assert set(numbers(rows="[:10]", max_rows=4, draw=0)) <= set(range(1, 11))
    assert numbers(max_rows=99, draw=3) == list(range(1, 25))


def test_a_slice_that_selects_nothing_is_refused_and_a_part_is_said(tone_file: Path) -> None:
    for rows in ("[30:]", "[5:5]", "[:0%]"):
        with pytest.raises(DataError, match="selects none"):
            load(tone_file, text=TEXT, rows=rows)
    _, _, ledger = load(tone_file, text=TEXT, rows="[:50%]", max_rows=6, draw=1)
    assert ledger.rows == 6
    assert any("rows [:50%], at most 6 rows, drawn with seed 1" in line for line in ledger.lines())


# --- folders and the hub ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHINETUNE_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "set"
    place.mkdir()
    write_rows(place / "train.jsonl", tone_rows(12))
    write_rows(place / "test.jsonl", tone_rows(4))
    return place


def test_a_split_of_a_folder_is_kept_once(folder: Path) -> None:
    config = DataConfig(str(folder), split="train")
    file = data_source(config)
    assert [r.fields for r in read_records(file)] == tone_rows(12)
    stamp = file.stat().st_mtime_ns
    assert data_source(config) == file and file.stat().st_mtime_ns == stamp
    assert next(chosen_rows(config, file)).place == f"{folder}[0]"
    assert data_source(DataConfig(str(folder), split="test")) != file
    write_rows(folder / "train.jsonl", tone_rows(13))
    assert data_source(config) != file  # another content


@pytest.mark.parametrize(
    ("split", "problem"), [(None, "has train, test"), ("validation", "validation"), ("train[:50%]", None)]
)
def test_a_split_must_be_there(folder: Path, split: str | None, problem: str | None) -> None:
    if problem is None:
        assert len(list(read_records(data_source(DataConfig(str(folder), split=split))))) == 6
        return
    with pytest.raises(DataError, match=problem) as caught:
        data_source(DataConfig(str(folder), split=split))
    assert "\n" not in caught.value.problems[0]


def test_a_file_has_no_splits_and_a_folder_needs_data(tone_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.split: .* is one file"):
        data_source(DataConfig(str(tone_file), split="train"))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.py").write_text("raise SystemExit")
    with pytest.raises(DataError, match="a folder without data files"):
        data_source(DataConfig(str(empty)))


def test_a_hub_set_that_cannot_be_fetched_is_a_data_error(folder: Path) -> None:
    with pytest.raises(DataError, match="not to be had from the hub") as caught:
        data_source(DataConfig("nobody/no-such-set", split="train"))
    assert "\n" not in caught.value.problems[0]
    with pytest.raises(DataError, match="is a type of file"):
        data_source(DataConfig("json", split="train"))
    with pytest.raises(DataError, match="no such file"):
        data_source(DataConfig("nowhere.jsonl"))


def test_a_hub_set_is_fetched_once_and_read_from_the_cache_ever_after(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    local = datasets.load_dataset
    calls = []

    def hub(name: str, subset: Any, split: Any, **options: Any) -> Any:
        calls.append((name, subset, split))
        return local(str(folder), split=split, cache_dir=str(folder.parent / "hf"))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    config = DataConfig("owner/tones", split="train")
    with pytest.raises(DataError, match="not in phinetune's cache"):
        data_source(config, fetch=False)
    file = data_source(config)
    assert data_source(config) == file == data_source(config, fetch=False)
    assert calls == [("owner/tones", None, "train")]
    assert next(chosen_rows(config, file)).place == "owner/tones[0]"


# --- what later stages take over ---


@pytest.mark.parametrize(
    ("values", "trained", "taken"),
    [
        ({}, {"text": TEXT, "rows": "[:5]"}, {"text", "rows", "chat", "learn_prompt"}),
        ({"prompt": "{a}", "completion": "{b}"}, {"text": TEXT, "seed": 3}, {"chat", "learn_prompt", "seed"}),
        ({"text": "{a}"}, {"prompt": "{a}", "completion": "{b}", "system": "x", "max_length": 9}, {"max_length"}),
        ({"messages": "m"}, {"text": TEXT}, set()),
        ({"chat": False}, {"prompt": "{a}", "completion": "{b}", "system": "x"}, {"prompt", "completion"}),
        ({"strategy": "rows"}, {"text": TEXT, "strategy": "join", "max_length": 9, "joiner": "x"},
         {"text", "chat", "learn_prompt", "max_length"}),
    ],
)  # fmt: skip
def test_only_what_does_not_contradict_is_taken_over(
    values: dict[str, Any], trained: dict[str, Any], taken: set[str]
) -> None:
    earlier = vars(parse_data_config({"path": "f", **trained}))
    assert set(inherit(values, earlier, same_file=True)) == taken
    assert set(inherit(values, earlier, same_file=False)) == taken - {"rows"}
    parse_data_config({"path": "f", **values, **inherit(values, earlier, same_file=True)})
