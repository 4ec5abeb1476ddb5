from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from nemo_ampo.output.terminal import printable_output, show, undisguised
from nemo_ampo.reply.grammar import render_reply

ROOT = Path(__file__).resolve().parents[3]
CLI = (sys.executable, "-m", "nemo_ampo.commands.cli")
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


@pytest.mark.parametrize("full", ["stdout", "stderr", "both"])
def test_a_log_on_a_full_disk_ends_no_work_and_decides_no_exit_status(full: str) -> None:
    work = (
        "import sys\nfrom rich.table import Table\n"
        "from nemo_ampo.output.terminal import printable_output, show, undisguised\n"
        "table = Table('word')\ntable.add_row('x' * 100)\n"
        "with printable_output():\n"
        "    for _ in range(400):\n"
        "        print('step', flush=True)\n        print('note', file=sys.stderr)\n        show(table)\n"
        "        print('bar', file=undisguised(sys.stderr), flush=True)\n"
        "sys.exit(75)\n"
    )
    with Path("/dev/full").open("w") as disk:
        out = subprocess.PIPE if full == "stderr" else disk
        err = subprocess.PIPE if full == "stdout" else disk
        done = subprocess.run([sys.executable, "-c", work], stdout=out, stderr=err, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 75
    heard = (done.stdout or "") + (done.stderr or "")
    assert heard.count(f"{full}: No space left on device; what is said there is lost, the work goes on\n") == (
        full != "both"
    )


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
    reply.write_text(render_reply(1, f'"{HOSTILE[:-1]}"'), encoding="utf-8", newline="")
    master, slave = pty.openpty()
    process = subprocess.Popen([*CLI, "score", str(reply)], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(master, 65536):
            shown += part
    assert process.wait(60) == 0
    text = shown.decode().replace("\r\n", "\n")
    assert 'answer    "a\\x1b[2J' in text and not CONTROL.search(text), text


def hostile_run(root: Path) -> None:
    """A batch run whose names, logs and results were chosen by an enemy."""
    name = "e\x1b[31m\u202ev\x9bil\x07"
    (root / "evaluate").mkdir(parents=True)
    means = {"samples": 1, "reward": 1.0, "goal": 1.0, "valid_format": 1.0, "tokens": 1.0, "judge_failed": 0}
    sample = {"row_id": name, "tag": name, "mode": 1, "text": HOSTILE[:-1], "reward": 1.0, "goal": 1.0, "num_tokens": 1}
    record = {"name": name, "checkpoint": name, "summary": {"all": means, name: means}, "samples": [sample]}
    (root / "evaluate" / "a.json").write_text(json.dumps(record))
    (root / "slurm").mkdir()
    (root / "slurm" / "plan.json").write_text(json.dumps([{"name": name, "output": str(root / "no"), "trains": False}]))
    ends = {"event": "end", "time": 1.0, "stages": 0, "step": 0, "status": 1, "reason": name}
    (root / "slurm" / "attempts.jsonl").write_text(json.dumps(ends) + "\n")
    (root / "logs" / "1").mkdir(parents=True)
    (root / "logs" / "1" / f"{name}.log").write_text(f"error: {HOSTILE[:-1]}\n", newline="")


@pytest.mark.parametrize("command", ["report", "status"])
def test_commands_show_a_hostile_run_without_obeying_it(tmp_path: Path, command: str) -> None:
    root = tmp_path / "run\x1b[5m\u2066"
    hostile_run(root)
    done = subprocess.run([*CLI, command, str(root)], capture_output=True, cwd=ROOT)
    shown = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, shown
    assert "\\x1b[31m\\u202ev\\x9bil" in shown and not CONTROL.search(shown), shown


def test_an_error_line_about_a_hostile_file_name(tmp_path: Path) -> None:
    for command in (
        [*CLI, "report", str(tmp_path / "no\x1b[2J\u202e")],
        [*CLI, "check-config", "ampo", f"data.train={tmp_path}/no\u202e"],
        [sys.executable, "-m", "recipes.bc", f"run.dir={tmp_path}/\u202ex", f"run.init_from={tmp_path}/no\u202e"],
    ):
        done = subprocess.run(command, capture_output=True, cwd=ROOT)
        shown = (done.stdout + done.stderr).decode()
        assert done.returncode == 2 and "\\u202e" in shown and not CONTROL.search(shown), shown
