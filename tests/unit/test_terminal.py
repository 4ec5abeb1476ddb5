from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from nemo_ampo.terminal import printable_output, show, undisguised

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\x9b1mc\u202ed\u2066e\rf\x08g\ud800"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def test_whatever_is_printed_in_the_block_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    with printable_output(), printable_output():
        print(HOSTILE)
        sys.stderr.writelines([HOSTILE, "\n"])
    print("after\x1b")
    out, err = capsys.readouterr()
    shown = "a\\x1b[2J\\x1b]0;title\\x07b\\x9b1mc\\u202ed\\u2066e\nf\\x08g?\n"
    assert (out, err) == (shown + "after\x1b\n", shown)


def test_an_encoding_that_lacks_a_letter_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with printable_output():
        print("Zoë \u4f60")
    assert raw.getvalue() == b"Zo\\xeb \\u4f60\n"


def test_the_text_of_a_table_is_printable_and_its_style_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", screen)
    table = Table("name")
    table.add_row("x\x1b[2Jy\u202ez")
    with printable_output():
        show(table)
        undisguised(sys.stdout).write("\x1b[1A")
    shown = screen.getvalue()
    assert "x\\x1b[2Jy\\u202ez" in shown
    styles = re.compile("\x1b\\[[0-9;]*[mA]")
    assert styles.search(shown) and not CONTROL.search(styles.sub("", shown))


def test_a_hostile_reply_on_a_real_terminal(tmp_path: Path) -> None:
    reply = tmp_path / "reply.txt"
    reply.write_text(f'<|begin_of_mode_1|>x\n"{HOSTILE[:-1]}"', encoding="utf-8")
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "nemo_ampo.cli", "score", str(reply)]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path)
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 65536):
            shown += part
    except OSError:
        pass
    assert process.wait(60) in (0, 1)
    text = shown.decode()
    assert "format" in text and not CONTROL.search(text.replace("\r\n", "\n")), text
