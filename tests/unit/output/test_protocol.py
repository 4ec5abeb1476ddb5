from __future__ import annotations

from pathlib import Path

import pytest

from nemo_ampo.errors import ConfigError, DataError
from nemo_ampo.output.protocol import keep_protocol, read_protocol


def test_a_difference_is_named_with_both_values(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    keep_protocol(path, {"seed": 1, "judge": {"model": "a", "seed": None}}, "run.name")
    for other, said in (
        ({"seed": 2}, "seed was 1, is now 2"),
        ({"judge": {"model": "b"}}, r"judge\.model was 'a', is now 'b'"),
    ):
        with pytest.raises(ConfigError, match=rf"^run\.name: .*p\.json records another protocol: {said}; move it$"):
            new = {"seed": 1, "judge": {"model": "a", "seed": None}} | other
            keep_protocol(path, new | {"judge": {"seed": None} | new["judge"]}, "run.name", parts=("judge",), cure="move it")


def test_a_key_that_the_file_lacks_is_an_older_versions_and_is_written_down(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    keep_protocol(path, {"a": 1, "part": {"x": 1}}, "k")
    keep_protocol(path, {"a": 1, "part": {"x": 1, "y": 2}, "b": 2}, "k", parts=("part",))
    assert read_protocol(path) == {"a": 1, "part": {"x": 1, "y": 2}, "b": 2}
    for lost in ({"a": 1, "part": {"x": 1, "y": 2}}, {"a": 1, "part": {"x": 1}, "b": 2}):
        with pytest.raises(ConfigError, match="is now None"):
            keep_protocol(path, lost, "k", parts=("part",))


def test_a_value_without_parts_is_compared_as_a_whole(tmp_path: Path) -> None:
    keep_protocol(tmp_path / "p.json", {"extra_body": {}}, "k")
    with pytest.raises(ConfigError, match=r"extra_body was \{\}, is now \{'top_p': 1\}"):
        keep_protocol(tmp_path / "p.json", {"extra_body": {"top_p": 1}}, "k")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000, "\udc80"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"p\.json: "):
        keep_protocol(path, {"a": 1}, "k")


@pytest.mark.parametrize("content", [None, "{}"])
def test_results_that_nothing_speaks_for_are_refused(tmp_path: Path, content: str | None) -> None:
    path, results = tmp_path / "protocol.json", tmp_path / "answers.jsonl"
    keep_protocol(path, {"seed": 1}, "run.name", results=results)
    results.write_text("one\n")
    keep_protocol(path, {"seed": 1}, "run.name", results=results)
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"run\.name: .*answers\.jsonl is there, but nothing in .*protocol"):
        keep_protocol(path, {"seed": 2}, "run.name", results=results)
