from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_ampo.data.rows import Record, published, read_records, write_rows
from nemo_ampo.errors import DataError


def test_the_three_kinds_of_file_give_the_same_records(tmp_path):
    rows = [{"a": 1, "b": "x\u2028y"}, {"a": 2, "b": "zwei \u00fc"}]
    write_rows(rows, tmp_path / "r.json")
    write_rows(rows, tmp_path / "r.jsonl")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    for suffix, word in (("json", "row"), ("jsonl", "line"), ("parquet", "row")):
        records = read_records(tmp_path / f"r.{suffix}")
        assert [r.values for r in records] == rows
        assert [r.where for r in records] == [f"{tmp_path}/r.{suffix}, {word} {i}" for i in (1, 2)]
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "r.jsonl", "r.parquet"}


def test_a_file_that_could_not_be_finished_does_not_appear(tmp_path):
    write_rows([{"a": 1}], tmp_path / "r.jsonl")
    with pytest.raises(RuntimeError), published(tmp_path / "r.jsonl") as part:
        part.write_text("half a li")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]
    assert (tmp_path / "r.jsonl").read_text() == '{"a": 1}\n'


def test_writers_at_the_same_time_do_not_disturb_each_other(tmp_path):
    with published(tmp_path / "r.txt") as first, published(tmp_path / "r.txt") as second:
        first.write_text("one")
        second.write_text("two")
    assert (tmp_path / "r.txt").read_text() == "one"  # the outer block ends last


def test_jsonl_lines_are_counted_with_the_blank_ones(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n\n{"a": 2}\n')
    assert [r.where for r in read_records(path)] == [f"{path}, line 1", f"{path}, line 4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", b"a", "ending in .json, .jsonl, .parquet"),
        ("r.json", b'{"a": 1}', "expected a list of rows"),
        ("r.json", b"[]", "holds no rows"),
        ("r.jsonl", b"\n\n", "holds no rows"),
        ("r.json", b"[1]", r"row 1: expected an object, got 1"),
        ("r.json", b"[{]", "not valid JSON"),
        ("r.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        ("r.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}\n', "line 2: key 'a' occurs twice"),
        ("r.json", b"\xff\xfe", "not UTF-8"),
        ("r.parquet", b"PAR0", "not a Parquet file"),
    ],
)
def test_an_unreadable_file_is_named_with_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_records(path)
    assert str(path) in str(error.value)


def test_a_table_whose_texts_are_no_text_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    bytes_as_text = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"system": bytes_as_text}), tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"r\.parquet: a text in it is not UTF-8"):
        read_records(tmp_path / "r.parquet")


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.parquet"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / name)


def test_writing_refuses_other_suffixes(tmp_path):
    with pytest.raises(DataError, match="ending in"):
        write_rows([{"a": 1}], tmp_path / "r.txt")


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (lambda r: r.text("k"), None, "is missing"),
        (lambda r: r.text("k"), " \n", "is blank"),
        (lambda r: r.text("k"), 3, "expected a string, got 3"),
        (lambda r: r.text("k"), "\ud800", "lone surrogate"),
        (lambda r: r.texts("k"), ["a", "\udfff"], "lone surrogate"),
        (lambda r: r.integer("k"), True, "whole number"),
        (lambda r: r.integer("k"), 1.0, "whole number"),
        (lambda r: r.integer("k", low=0), -1, "at least 0, got -1"),
        (lambda r: r.integer("k", 0, 5), 6, "a value from 0 to 5, got 6"),
        (lambda r: r.number("k"), float("nan"), "expected a number"),
        (lambda r: r.number("k"), "7", "expected a number"),
        (lambda r: r.number("k", high=10), 10.5, "at most 10"),
        (lambda r: r.texts("k"), "ab", "list of strings"),
        (lambda r: r.texts("k"), ["a", ""], r"k\[1\]"),
        (lambda r: r.texts("k", count=2), ["a"], "expected 2 strings, got 1"),
        (lambda r: r.child("k"), [1], "expected an object"),
        (lambda r: r.child("k").text("inner"), {"inner": 1}, r"field 'k\.inner'"),
        (lambda r: r.children("k"), {"a": 1}, "list of objects"),
        (lambda r: r.children("k")[1].text("b"), [{"b": "x"}, {}], r"field 'k\[1\]\.b': is missing"),
        (lambda r: r.only(["other"]), 1, "unknown field; expected some of other"),
    ],
)
def test_a_bad_field_is_named_with_its_row(read, value, message):
    with pytest.raises(DataError, match=message) as error:
        read(Record("f.json, row 7", {"k": value}))
    assert str(error.value).startswith("f.json, row 7, field 'k")


def test_good_fields_come_back_typed():
    r = Record("f", {"s": "x", "e": "", "n": None, "i": 3, "f": 2, "l": ["a", "b"]})
    assert (r.text("s"), r.text("e", blank=True), r.integer("i", 3, 3), r.texts("l", count=2)) == (
        "x",
        "",
        3,
        ("a", "b"),
    )
    assert isinstance(r.number("f", 0, 2), float)
    assert r.optional_text("e") is None and r.optional_text("n") is None and r.optional_text("s") == "x"
    assert not r.has("n") and not r.has("absent") and r.has("e")


@pytest.mark.parametrize("value", ["9" * 400, "9" * 5000, "[" * 100_000, "1e400"])
def test_a_number_that_cannot_be_read_is_an_error_of_its_row(tmp_path: Path, value: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"state": ' + value + "}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        [row.number("state") for row in read_records(path)]
