from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nemo_ampo.errors import UserError
from nemo_ampo.job.run_lock import hold

HOLDER = "import sys, time; from pathlib import Path; from nemo_ampo.job.run_lock import hold; f = hold(Path(sys.argv[1]))\n"


def test_a_child_that_outlives_the_job_does_not_hold_the_folder(tmp_path: Path) -> None:
    program = HOLDER + "import os; child = os.fork()\nif not child: time.sleep(60)\nprint(child, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        hold(tmp_path, patience_s=5).close()
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
            hold(tmp_path / "run", patience_s=0)
    finally:
        process.kill()
        process.communicate()


def test_a_killed_job_lets_go(tmp_path: Path) -> None:
    process = other_job(tmp_path)
    threading.Timer(0.3, process.send_signal, [signal.SIGKILL]).start()
    file = hold(tmp_path, patience_s=30)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    file.close()
    hold(tmp_path, patience_s=0).close()
