"""Every format gives the same rows with their places; what cannot be read is a DataError that says where and why."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from phinetune.data.records import BUNDLED, READERS, Record, data_file, read_records
from phinetune.errors import DataError

ROWS = [
    {"phrase": "Plain words", "tone": "joy"},
    {"phrase": 'Commas, "quotes" and\ta tab', "tone": "sadness"},
    {"phrase": "İstanbul'da kar — 雪 🙂", "tone": "fear"},
    {"phrase": "two\nlines, one cell", "tone": "surprise"},
    {"phrase": "  spaces stay  ", "tone": "joy"},
]


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_table,
    ".tsv": write_table,
    ".parquet": write_parquet,
}


def read(file: Path) -> list[Record]:
    return list(read_records(data_file(str(file))))


def refusal(file: Path) -> DataError:
    """The error that `file` is refused with: every problem is one line."""
    with pytest.raises(DataError) as caught:
        read(file)
    assert caught.value.problems
    assert all(problem and "\n" not in problem for problem in caught.value.problems)
    return caught.value


def problem(file: Path) -> str:
    (text,) = refusal(file).problems
    return text


def test_every_format_that_can_be_read_is_tested() -> None:
    assert set(WRITERS) == set(READERS)


@pytest.mark.parametrize("ending", WRITERS)
def test_all_formats_give_the_same_rows(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    WRITERS[ending](file, ROWS)
    assert [record.fields for record in read(file)] == ROWS


def test_the_ending_may_be_in_capitals(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.JSONL", ROWS)
    assert len(read(tmp_path / "rows.JSONL")) == len(ROWS)


@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_rows_without_lines_are_placed_by_index(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    WRITERS[ending](file, ROWS)
    assert [record.place for record in read(file)] == [f"{file}[{i}]" for i in range(len(ROWS))]


@pytest.mark.parametrize(("ending", "first"), [(".jsonl", 1), (".csv", 2), (".tsv", 2)])
def test_rows_on_lines_are_placed_by_line(ending: str, first: int, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    rows = [{"a": str(i), "b": "x"} for i in range(4)]
    WRITERS[ending](file, rows)
    assert [record.place for record in read(file)] == [f"{file}:{first + i}" for i in range(len(rows))]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    WRITERS[ending](file, ROWS)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [record.fields for record in read(file)] == ROWS


def test_windows_line_ends_are_no_part_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": "1"}\r\n{"a": "2"}\r\n')
    (tmp_path / "rows.csv").write_bytes(b"a\r\n1\r\n2\r\n")
    for name in ("rows.jsonl", "rows.csv"):
        assert [record.fields for record in read(tmp_path / name)] == [{"a": "1"}, {"a": "2"}]


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("rows.jsonl", '\n{"a": "1"}\n\n   \n{"a": "2"}\n\n', [2, 5]),
        ("rows.csv", "a,b\n\n1,\n\n\n2,\n\n", [3, 6]),
        ("first.csv", "\na,b\n1,\n2,\n", [3, 4]),
    ],
    ids=["jsonl", "csv", "csv that begins with one"],
)
def test_blank_lines_are_passed_over_and_still_counted(name: str, text: str, lines: list[int], tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text)
    records = read(file)
    assert [record.fields["a"] for record in records] == ["1", "2"]
    assert [record.place for record in records] == [f"{file}:{line}" for line in lines]


def test_a_json_file_with_an_object_a_line_is_read_as_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    write_jsonl(file, ROWS)
    assert [record.fields for record in read(file)] == ROWS
    assert read(file)[1].place == f"{file}:2"


def test_a_short_csv_row_lacks_the_fields_it_does_not_give(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1\n")
    assert read(tmp_path / "rows.csv")[0].fields == {"a": "1"}


def test_parquet_nulls_are_absent_fields_and_lists_and_numbers_keep_their_type(tmp_path: Path) -> None:
    rows = [{"n": 1, "turns": [{"role": "user", "content": "x"}]}, {"n": None, "turns": []}]
    write_parquet(tmp_path / "rows.parquet", rows)
    assert [record.fields for record in read(tmp_path / "rows.parquet")] == [rows[0], {"turns": []}]


def test_parquet_indices_go_on_over_row_groups(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"i": list(range(3000))}), file, row_group_size=700)
    records = read(file)
    assert [record.fields["i"] for record in records] == list(range(3000))
    assert [record.place for record in records] == [f"{file}[{i}]" for i in range(3000)]


def test_parquet_gives_the_first_row_groups_before_it_reads_the_last(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"i": list(range(6000))}), file, row_group_size=2000)
    column = pyarrow.parquet.read_metadata(file).row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + 64] = b"\xff" * 64
    file.write_bytes(content)
    seen = 0
    with pytest.raises(DataError) as caught:
        for _ in read_records(file):
            seen += 1
    assert seen >= 2000
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_rows_before_a_broken_one_come_first(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    WRITERS[ending](file, [{"a": "1"}])
    with file.open("a") as stream:
        stream.write('{"a\n' if ending == ".jsonl" else "2,3\n")
    records = read_records(file)
    assert next(records).fields == {"a": "1"}
    with pytest.raises(DataError):
        next(records)


@pytest.mark.parametrize("line", ['{"a": 1', "{'a': 1}", '{"a": 1} {"a": 2}', "a,b", '{"a": "1\n2"}'])
def test_a_broken_line_is_named_by_file_and_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n\n' + line + '\n{"a": 2}\n')
    error = refusal(file)
    assert error.problems[0].startswith(f"{file}:3: not valid JSON: ")
    assert "one JSON object" in error.hint


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000], ids=["huge integer", "deep nesting"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_that_python_cannot_hold_is_a_data_error(name: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text('{"a": 1}\n{"a": ' + value + "}\n" if name.endswith("l") else '[{"a": ' + value + "}]")
    assert problem(file).startswith(f"{file}:2" if name.endswith("l") else f"{file}")


@pytest.mark.parametrize(("text", "line"), [('[\n{"a": 1},\n{"a" 2}]', 3), ('[{"a": 1}', 1), ('{"a": 1}\n{"a":\n', 2)])
def test_a_broken_json_file_is_named_with_its_line(text: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    assert problem(tmp_path / "rows.json").startswith(f"{tmp_path / 'rows.json'}:{line}: not valid JSON: ")


@pytest.mark.parametrize(
    ("name", "text", "place", "found"),
    [
        ("rows.jsonl", '{"a": 1}\n[1, 2]\n', ":2", "list"),
        ("rows.jsonl", '"text"\n', ":1", "str"),
        ("rows.jsonl", "null\n", ":1", "NoneType"),
        ("rows.json", '[{"a": 1}, 5]', "[1]", "int"),
        ("rows.json", '{"data": [{"a": 1}]}', "", "dict"),
    ],
)
def test_a_row_that_is_no_object_is_refused_with_its_place(
    name: str, text: str, place: str, found: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_text(text)
    error = refusal(file)
    assert error.problems[0].startswith(f"{file}{place}: ")
    assert error.problems[0].endswith(f"found {found}")
    assert error.hint


@pytest.mark.parametrize(("ending", "mark"), [(".csv", ","), (".tsv", "\t")])
def test_a_row_with_too_many_values_is_refused_with_its_line(ending: str, mark: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    file.write_text(f"a{mark}b\n1{mark}2\n1{mark}2{mark}3\n")
    error = refusal(file)
    assert error.problems == [f"{file}:3: more values than the 2 columns of the first line"]
    assert "quotes" in error.hint


def test_csv_that_breaks_its_quotes_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('a,b\n1,2\n"x"y,3\n4,5\n')
    assert problem(tmp_path / "rows.csv").startswith(f"{tmp_path / 'rows.csv'}:3: not valid CSV: ")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,tone,text\nfirst,joy,second\n")
    assert '"text"' in problem(tmp_path / "rows.csv")


def test_a_missing_file_is_named_with_what_may_be_given(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nothing.jsonl")
    assert error.problems == [f"{tmp_path / 'nothing.jsonl'}: no such file"]
    assert "tone" in error.hint


@pytest.mark.parametrize("name", ["tne", "tones", "Tone"])
def test_a_misspelt_bundled_set_is_recognised(name: str) -> None:
    with pytest.raises(DataError) as caught:
        data_file(name)
    assert caught.value.problems == [f'{name}: no such file, did you mean "tone"?']


def test_a_bundled_set_is_found_by_name_wherever_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_file("tone") == BUNDLED["tone"]
    assert BUNDLED["tone"].is_file()


def test_the_bundled_set_is_balanced_distinct_and_licensed() -> None:
    rows = [record.fields for record in read_records(BUNDLED["tone"])]
    counts = Counter(row["tone"] for row in rows)
    assert len({row["phrase"].strip().lower() for row in rows}) == len(rows) >= 600
    assert set(counts) == {"joy", "sadness", "fear", "surprise"}
    assert len(set(counts.values())) == 1
    licence = (BUNDLED["tone"].parent / "LICENSE.md").read_text(encoding="utf-8")
    assert "CC0 1.0" in licence
    table = {name: int(number) for name, number in re.findall(r"^\| *(\w+) *\| *(\d+) *\|$", licence, re.MULTILINE)}
    assert table == {**counts, "total": len(rows)}


def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert data_file("~/rows.jsonl") == tmp_path / "rows.jsonl"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert error.problems == [f"{tmp_path}: is a folder, not a file"]
    assert ".jsonl" in error.hint


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.jsonl.gz"])
def test_an_unknown_ending_is_refused_with_the_known_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"a": 1}\n')
    error = refusal(tmp_path / name)
    assert "unknown type of file" in error.problems[0]
    assert all(ending in error.hint for ending in READERS)


@pytest.mark.parametrize("ending", WRITERS)
def test_an_empty_file_is_refused(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"rows{ending}").touch()
    assert problem(tmp_path / f"rows{ending}") == f"{tmp_path / f'rows{ending}'}: the file is empty"


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_file_of_blank_lines_is_refused(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"rows{ending}").write_text("\n\n\n")
    assert problem(tmp_path / f"rows{ending}").startswith(str(tmp_path / f"rows{ending}"))


@pytest.mark.parametrize(
    ("ending", "text"), [(".jsonl", "\n  \n"), (".json", "[]"), (".csv", "a,b\n"), (".parquet", "")]
)
def test_a_file_without_rows_is_refused(ending: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), file)
    else:
        file.write_text(text)
    error = refusal(file)
    assert error.problems == [f"{file}: holds no rows"]
    assert error.hint


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_that_is_not_utf8_is_refused_with_the_remedy(ending: str, encoding: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    WRITERS[ending](file, [{"a": "déjà vu"}])
    file.write_bytes(file.read_text(encoding="utf-8").replace("\\u00e9", "é").encode(encoding))
    error = refusal(file)
    assert "not UTF-8" in error.problems[0]
    assert "UTF-8" in error.hint


def test_a_line_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": "xxxxxxxxxxx"}\n' * 2000 + b'{"a": "\xff"}\n')
    assert problem(file).startswith(f"{file}:2001: not UTF-8 text")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_a_truncated_parquet_file_is_refused(kept: float, tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.parquet", tmp_path / "rows.parquet"
    write_parquet(whole, [{"a": str(i)} for i in range(500)])
    file.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * kept)])
    assert problem(file).startswith(f"{file}: not a valid Parquet file: ")


def test_text_under_the_name_of_parquet_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.parquet", ROWS)
    assert "not a valid Parquet file" in problem(tmp_path / "rows.parquet")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="everything is readable to root")
@pytest.mark.parametrize("ending", WRITERS)
def test_a_file_that_may_not_be_read_is_refused_with_the_remedy(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{ending}"
    WRITERS[ending](file, ROWS)
    file.chmod(0)
    error = refusal(file)
    assert error.problems == [f"{file}: cannot be read"]
    assert "permissions" in error.hint
