"""Rows become conversations by column templates or by the shapes people have; what does not fit is said, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.data.messages import (
    Conversation,
    DataConfig,
    fill_template,
    parse_data_config,
    read_conversations,
    template_fields,
)
from phinetune.data.records import Record, read_records
from phinetune.errors import ConfigError, DataError
from tiny import PROMPT, write_rows


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def convert(rows: list[dict[str, Any]], **config: Any) -> list[Conversation]:
    records = (Record(row, f"f.jsonl:{i}") for i, row in enumerate(rows, 1))
    return list(read_conversations(records, DataConfig("f.jsonl", **config)))


def messages(row: dict[str, Any], **config: Any) -> list[dict[str, str]]:
    (conversation,) = convert([row], **config)
    return conversation.messages


def refusal(rows: list[dict[str, Any]], **config: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        convert(rows, **config)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value


def problem(row: dict[str, Any], **config: Any) -> str:
    (text,) = refusal([row], **config).problems
    return text.removeprefix("f.jsonl:1: ")


# --- column templates ---


def test_templates_take_the_row_s_fields() -> None:
    row = {"phrase": "Ah!", "tone": "joy", "other": 1}
    assert messages(row, **PROMPT) == [user("What is the tone of this phrase? Ah!"), assistant("joy")]


def test_a_field_may_stand_several_times_and_doubled_braces_are_braces() -> None:
    found = messages({"a": "x", "b": "y"}, prompt="{a} and {a} in {{braces}}", completion='{{"b": "{b}"}}')
    assert found == [user("x and x in {braces}"), assistant('{"b": "y"}')]


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (0, "0"), (2.5, "2.5"), ("", "")])
def test_numbers_and_empty_text_are_texts(value: object, text: str) -> None:
    assert messages({"a": value, "b": "y"}, prompt="<{a}>", completion="{b}")[0] == user(f"<{text}>")


def test_field_names_may_be_any_words() -> None:
    row = {"the phrase": "x", "tür-1": "y"}
    assert messages(row, prompt="{the phrase}", completion="{tür-1}") == [user("x"), assistant("y")]


@given(before=st.text(), value=st.text(), after=st.text())
def test_a_value_is_never_read_as_a_template(before: str, value: str, after: str) -> None:
    def literal(text: str) -> str:
        return text.replace("{", "{{").replace("}", "}}")

    template = literal(before) + "{a}" + literal(after)
    assert template_fields(template, "data.prompt") == ["a"]
    assert fill_template(template, {"a": value}) == before + value + after


@pytest.mark.parametrize(
    "template",
    [
        "{phrase.__class__}",
        "{0[x]}",
        "{phrase[0]}",
        "{a!r}",
        "{}",
        "{a:>10}",
        "{a:{b}}",
        "{f()}",
        "{",
        "}",
        "{a",
        "{{}",
    ],
)
@pytest.mark.parametrize("key", ["prompt", "completion"])
def test_templates_name_fields_and_nothing_else(template: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert([{"phrase": "x", "a": "y", "b": "z"}], **{"prompt": "{a}", "completion": "{a}", key: template})
    (text,) = caught.value.problems
    assert text.startswith(f"data.{key}: ")
    assert repr(template) in text
    assert "{name}" in caught.value.hint


# --- the shapes people have ---

ASKED = [user("q"), assistant("a")]
TOOL = {"role": "tool", "content": "42"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": ASKED}, ASKED),
        ({"messages": [system("s"), *ASKED, *ASKED]}, [system("s"), *ASKED, *ASKED]),
        ({"messages": [{**m, "name": "x", "weight": 1} for m in ASKED]}, ASKED),
        ({"messages": [user("q"), TOOL, assistant("a")]}, [user("q"), TOOL, assistant("a")]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ASKED),
        ({"conversation": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]}, ASKED),
        (
            {"conversations": [{"from": "system", "value": "s"}, user("q"), {"from": "bot", "value": "a"}]},
            [system("s"), *ASKED],
        ),
        ({"prompt": "q", "completion": "a"}, ASKED),
        ({"prompt": "q", "response": "a"}, ASKED),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ASKED),
        ({"prompt": [system("s"), user("q")], "completion": [assistant("a")]}, [system("s"), *ASKED]),
        ({"prompt": [user("q")], "completion": "a"}, ASKED),
        ({"instruction": "q", "input": "", "output": "a"}, ASKED),
        ({"instruction": "q", "input": None, "output": "a"}, ASKED),
        ({"instruction": "q", "response": "a"}, ASKED),
        ({"instruction": "q", "input": "with this", "output": "a"}, [user("q\nwith this"), assistant("a")]),
        ({"question": "q", "answer": "a"}, ASKED),
        ({"input": "q", "output": "a"}, ASKED),
        ({"id": 7, "input": 1, "output": 2}, [user("1"), assistant("2")]),
    ],
)
def test_known_shapes_are_recognised(row: dict[str, Any], expected: list[dict[str, str]]) -> None:
    assert messages(row) == expected


def test_templates_win_over_the_shape_of_the_row() -> None:
    assert messages({"messages": ASKED, "a": "x"}, prompt="{a}", completion="{a}") == [user("x"), assistant("x")]


def test_an_unknown_shape_is_refused_with_the_fields_there_are_and_what_to_do() -> None:
    error = refusal([{"text": "x", "label": 1}])
    assert error.problems == ["f.jsonl:1: no known shape of data in the fields 'text', 'label'"]
    assert "--prompt" in error.hint
    assert "--completion" in error.hint


def test_every_row_must_have_the_first_row_s_shape() -> None:
    error = refusal([{"messages": ASKED}, {"prompt": "q", "completion": "a"}])
    assert error.problems == ['f.jsonl:2: missing field "messages" (found: prompt, completion)']


def test_conversations_keep_order_and_place() -> None:
    found = convert([{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3)])
    assert [(c.messages[0]["content"], c.place) for c in found] == [(f"q{i}", f"f.jsonl:{i + 1}") for i in range(3)]


# --- the system message ---


def test_the_system_message_is_put_first_where_there_is_none() -> None:
    assert messages({"messages": ASKED}, system="be brief") == [system("be brief"), *ASKED]
    assert messages({"messages": [system("s"), *ASKED]}, system="be brief") == [system("s"), *ASKED]


# --- faults ---


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"phrse": "x", "tone": "joy"}, 'missing field "phrase" (found: phrse, tone), did you mean "phrse"?'),
        ({"Phrase": "x", "tone": "joy"}, 'missing field "phrase" (found: Phrase, tone), did you mean "Phrase"?'),
        ({"x": "x", "tone": "joy"}, 'missing field "phrase" (found: x, tone)'),
        ({}, 'missing field "phrase" (found: nothing)'),
        ({"phrase": ["x"], "tone": "joy"}, 'field "phrase" must be text, found list'),
        ({"phrase": {"x": 1}, "tone": "joy"}, 'field "phrase" must be text, found dict'),
        ({"phrase": True, "tone": "joy"}, 'field "phrase" must be text, found bool'),
        ({"phrase": "x", "tone": ""}, "the answer is empty"),
        ({"phrase": "x", "tone": " \n\t"}, "the answer is empty"),
    ],
)
def test_a_row_that_does_not_fill_the_templates_says_why(row: dict[str, Any], expected: str) -> None:
    assert problem(row, **PROMPT) == expected


def test_a_null_field_is_not_said_to_be_another_field() -> None:
    text = problem({"phrase": "x", "tone": None}, **PROMPT)
    assert '"tone"' in text
    assert "did you mean" not in text


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([user("q")], "the last message must be the assistant's, found user"),
        ([assistant("a")], "there is no message of the user"),
        ([user("q"), system("s"), assistant("a")], "a system message may only come first"),
        ([user("q"), assistant("  ")], "the answer is empty"),
        ([user("q"), assistant(""), user("q"), assistant("a")], "the answer is empty"),
        ([user("q"), "a"], "messages[1] must be an object with role and content, found str"),
        ([user("q"), {"role": "assistant"}], "messages[1].content must be text, found NoneType"),
        ([user("q"), {"role": "assistant", "content": ["a"]}], "messages[1].content must be text, found list"),
    ],
)
def test_a_conversation_that_cannot_be_learned_says_why(turns: list[Any], expected: str) -> None:
    assert problem({"messages": turns}) == expected


@pytest.mark.parametrize(("role", "near"), [("User", "user"), ("asistant", "assistant"), ("developer", ""), (None, "")])
def test_an_unknown_role_is_refused_with_the_known_ones(role: str | None, near: str) -> None:
    text = problem({"messages": [{"role": role, "content": "q"}, assistant("a")]})
    assert text.startswith(f"messages[0].role must be one of system, user, assistant, tool, found {role!r}")
    assert text.endswith(f'did you mean "{near}"?' if near else repr(role))


@pytest.mark.parametrize("role", [["user"], {"name": "user"}])
def test_a_role_that_is_no_text_is_refused(role: object) -> None:
    text = problem({"messages": [{"role": role, "content": "q"}, assistant("a")]})
    assert text.startswith("messages[0].role must be one of ")


def test_an_empty_list_of_messages_is_said_to_be_empty() -> None:
    assert "empty" in problem({"messages": []})


@pytest.mark.parametrize("turns", ["text", {"role": "user"}, 3])
def test_later_messages_that_are_no_list_are_refused(turns: object) -> None:
    error = refusal([{"messages": ASKED}, {"messages": turns}])
    found = type(turns).__name__
    assert error.problems == [f'f.jsonl:2: field "messages" must be a list of messages, found {found}']


def test_the_first_five_faulty_rows_are_named_and_the_rest_counted() -> None:
    rows = [{"phrase": "x", "tone": "joy"} if i % 2 else {"phrase": "x"} for i in range(20)]
    error = refusal(rows, **PROMPT)
    assert [text.split(": ")[0] for text in error.problems] == [
        *(f"f.jsonl:{i}" for i in (1, 3, 5, 7, 9)),
        "... and 5 more rows",
    ]
    assert error.hint == "10 of 20 rows cannot be used; mend or remove them"


def test_five_faulty_rows_are_named_without_a_rest() -> None:
    error = refusal([{"phrase": "x"}] * 5, **PROMPT)
    assert len(error.problems) == 5
    assert error.hint.startswith("5 of 5 rows")


def test_nothing_is_given_out_after_a_faulty_row() -> None:
    rows = [{"phrase": str(i), "tone": "joy" if i != 1 else ""} for i in range(4)]
    given_out = []
    with pytest.raises(DataError):
        for conversation in read_conversations((Record(r, "f") for r in rows), DataConfig("f", **PROMPT)):
            given_out.append(conversation.messages[0]["content"])
    assert given_out == ["What is the tone of this phrase? 0"]


def test_faults_of_a_file_are_placed_in_it(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"phrase": "x", "tone": "joy"}, {"phrase": "y"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: missing field \"tone\""):
        list(read_conversations(read_records(file), DataConfig(str(file), **PROMPT)))


# --- DataConfig ---


def config_problems(values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_data_config(values)
    return caught.value.problems


def test_a_path_alone_is_a_config() -> None:
    assert parse_data_config("rows.jsonl") == DataConfig("rows.jsonl")
    assert parse_data_config(Path("rows.jsonl")) == DataConfig("rows.jsonl")
    config = DataConfig("rows.jsonl", seed=3)
    assert parse_data_config(config) is config


@pytest.mark.parametrize("data", ["tone", {"path": "tone"}])
def test_a_bundled_set_brings_its_templates(data: Any) -> None:
    config = parse_data_config(data)
    assert (config.prompt, config.completion) == (PROMPT["prompt"], PROMPT["completion"])


def test_given_templates_win_over_a_bundled_set_s() -> None:
    config = parse_data_config({"path": "tone", "prompt": "{tone}?", "completion": "{phrase}"})
    assert (config.prompt, config.completion) == ("{tone}?", "{phrase}")


def test_the_given_dictionary_stays_as_it_is() -> None:
    values = {"path": "tone", "seed": 1}
    parse_data_config(values)
    assert values == {"path": "tone", "seed": 1}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"path": "f", "promt": "x"}, 'data.promt: unknown key, did you mean "prompt"?'),
        ({"path": "f", "test_size": 0.1}, "data.test_size: unknown key"),
        ({}, "data.path: this key is needed"),
        ({"path": 3}, "data.path: input should be a valid string (found: 3)"),
        ({"path": "f", "max_length": 1.5}, "data.max_length: input should be a valid integer"),
        ({"path": "f", "seed": "x"}, "data.seed: input should be a valid integer"),
        ({"path": "f", "test_fraction": None}, "data.test_fraction: input should be a valid number (found: None)"),
        (["f"], "data: input should be a dictionary"),
        (None, "data: input should be a dictionary"),
    ],
)
def test_a_faulty_config_names_key_and_value(values: Any, expected: str) -> None:
    (text,) = config_problems(values)
    assert text.startswith(expected)


@pytest.mark.parametrize("fraction", [1.0, -0.1, 20, float("nan"), float("inf")])
def test_a_test_fraction_out_of_range_is_refused(fraction: float) -> None:
    (text,) = config_problems({"path": "f", "test_fraction": fraction})
    assert "test_fraction must be at least 0 and below 1" in text


@pytest.mark.parametrize("length", [1, 0, -5])
def test_a_max_length_without_room_is_refused(length: int) -> None:
    assert "max_length must be at least 2 tokens" in config_problems({"path": "f", "max_length": length})[0]


@pytest.mark.parametrize("given_key", ["prompt", "completion"])
@pytest.mark.parametrize("path", ["f", "tone"])
def test_one_template_without_the_other_is_refused(path: str, given_key: str) -> None:
    assert "prompt and completion templates come together" in config_problems({"path": path, given_key: "{a}"})[0]


def test_a_value_out_of_range_is_quoted_without_the_other_keys() -> None:
    (text,) = config_problems({"path": "rows.jsonl", "test_fraction": 2})
    assert "rows.jsonl" not in text


def test_every_faulty_key_is_named_at_once() -> None:
    found = config_problems({"seed": "x", "test_fraction": [], "promt": 1})
    assert {text.split(": ")[0] for text in found} == {
        "data.path",
        "data.seed",
        "data.test_fraction",
        "data.promt",
    }
