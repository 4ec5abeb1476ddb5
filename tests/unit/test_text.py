from __future__ import annotations

from nemo_ampo.text import one_line, printable, utf8_safe


def test_a_reply_moves_no_cursor() -> None:
    assert printable("a\x1b[2Jb\u202ec\x9b1m\r\td\n") == "a\\x1b[2Jb\\u202ec\\x9b1m\\r\td\n"


def test_one_line() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("x" * 300) == "x" * 197 + "..."


def test_lone_surrogates_become_question_marks() -> None:
    assert utf8_safe("a\ud800b") == "a?b"
