from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nemo_ampo.errors import UserError
from nemo_ampo.lock import hold_output, hold_run

HOLDER = "import sys, time; from pathlib import Path; from nemo_ampo.lock import hold_run; f = hold_run(Path(sys.argv[1]))\n"


def test_a_child_that_outlives_the_job_does_not_hold_the_folder(tmp_path: Path) -> None:
    program = HOLDER + "import os; child = os.fork()\nif not child: time.sleep(60)\nprint(child, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        hold_run(tmp_path, patience_s=5).release()
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def other_job(folder: Path) -> subprocess.Popen[str]:
    program = HOLDER + "print('in', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    return process


def test_a_second_job_is_refused_by_name_of_the_first(tmp_path: Path) -> None:
    process = other_job(tmp_path / "run")
    try:
        with pytest.raises(UserError, match=rf"run\.dir: .*run is in use by another job \(process {process.pid} on "):
            hold_run(tmp_path / "run", patience_s=0)
    finally:
        process.kill()
        process.communicate()


def test_a_killed_job_lets_go(tmp_path: Path) -> None:
    process = other_job(tmp_path)
    threading.Timer(0.3, process.send_signal, [signal.SIGKILL]).start()
    lock = hold_run(tmp_path, patience_s=30)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    lock.release()
    hold_run(tmp_path, patience_s=0).release()


def test_one_process_does_not_hold_a_folder_twice(tmp_path: Path) -> None:
    with hold_run(tmp_path), pytest.raises(UserError, match=f"in use by another job .process {os.getpid()} on "):
        hold_run(tmp_path, patience_s=0)
    hold_run(tmp_path, patience_s=0).release()


def test_the_lock_of_an_output_leaves_nothing_behind(tmp_path: Path) -> None:
    output = tmp_path / "model.nemo"
    with hold_output(output, "--output"):
        assert [p.name for p in tmp_path.iterdir()] == [".model.nemo.lock"]
        with pytest.raises(UserError, match=r"^--output: .*model\.nemo is in use by another job"):
            hold_output(output, "--output")
    assert list(tmp_path.iterdir()) == []


RACE = """
import sys, time
from pathlib import Path
from nemo_ampo.lock import hold_output
count = Path(sys.argv[1])
for _ in range(40):
    with hold_output(count, "--output", patience_s=60):
        seen = int(count.read_text())
        time.sleep(0.001)
        count.write_text(str(seen + 1))
"""


def test_many_processes_take_a_temporary_lock_in_turn(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", RACE, str(count)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert count.read_text() == "120"
