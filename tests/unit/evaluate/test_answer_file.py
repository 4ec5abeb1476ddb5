"""What is read back is what was written, or is named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from nemo_ampo.errors import DataError, DiskError
from nemo_ampo.evaluate.answer_file import AnswerFile, StoredReply
from nemo_ampo.types import Verdict

ROWS = ["a", "b", "c", "a"]


def reply(index: int) -> StoredReply:
    return StoredReply(ROWS[index], f"\u00e4\u2028\x00 \u4e16 {index}", 5 + index)


def fill(path: Path) -> None:
    file = AnswerFile(path, ROWS)
    file.add_reply(0, reply(0))
    file.add_reply(1, reply(1))
    file.add_verdict(1, Verdict(3.5, 10))
    file.add_reply(2, reply(2))
    file.add_reply(3, reply(3))
    file.add_verdict(3, Verdict(0, 1))


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    fill(path)
    file = AnswerFile(path, ROWS)
    assert file.replies == {index: reply(index) for index in range(4)}
    assert file.verdicts == {1: Verdict(3.5, 10), 3: Verdict(0, 1)}


def test_every_place_it_may_have_died_at_loses_one_line_at_most(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    fill(path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        file = AnswerFile(path, ROWS)
        assert len(file.replies) + len(file.verdicts) == whole[:size].count(b"\n")
        if 0 not in file.replies:
            continue
        file.verdicts.pop(0, None)
        file.add_verdict(0, Verdict(1, 2))
        assert AnswerFile(path, ROWS).verdicts[0] == Verdict(1, 2), "the torn line is cut off"


def test_a_damaged_or_edited_line_is_named_and_no_number_comes_of_it(tmp_path: Path) -> None:
    """Lines of another plan, of other fields, out of range, twice, and 600 with random bytes in them."""
    path, rng = tmp_path / "answers.jsonl", random.Random(1)
    fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    last = json.loads(lines[-1])
    for change in (
        *({"agent1": value} for value in (11, -1, "5", None, True, float("nan"), float("inf"), [5])),
        *({"index": value} for value in (4, -1, 1.0, "1", 1)),
        {"agent1": 2},
        *({"record": "score"}, {"record": 3}, {"extra": 1}, {"agent2": None}),
    ):
        path.write_bytes(b"".join(lines[:-1]) + json.dumps(last | change).encode() + b"\n")
        with pytest.raises(DataError, match=r"answers\.jsonl, line 6"):
            AnswerFile(path, ROWS)
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"line 2, field 'row_id': expected 'x', got 'b'"):
        AnswerFile(path, ["a", "x", "c", "a"])
    path.write_bytes(b"".join(lines[1:]))
    AnswerFile(path, ROWS)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(DataError, match=r"line 2, field 'index': a verdict about reply 1"):
        AnswerFile(path, ROWS)
    for _ in range(600):
        content = bytearray(b"".join(lines))
        place = rng.randrange(len(content))
        content[place : place + rng.randrange(3)] = bytes(
            rng.choice(b'"{}[],:\\0-e\xff\x00') for _ in range(rng.randrange(1, 4))
        )
        path.write_bytes(content)
        try:
            found = AnswerFile(path, ROWS)
        except DataError as error:
            assert "answers.jsonl" in str(error) and "\n" not in str(error)
            continue
        assert found.verdicts.items() <= {1: Verdict(3.5, 10), 3: Verdict(0, 1)}.items()
        assert all(kept == reply(index) for index, kept in found.replies.items())


def test_a_verdict_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.symlink_to("/dev/full")
    file = AnswerFile(tmp_path / "other.jsonl", ROWS)
    file.add_reply(0, reply(0))
    file._path = path
    file.add_verdict(0, Verdict(1, 2))
    with pytest.raises(DiskError, match=r"cannot write .*a\.jsonl: "):
        file.require_written()
