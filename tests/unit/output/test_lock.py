from __future__ import annotations

import functools
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forking import fork_ranks

from nemo_ampo.errors import UserError
from nemo_ampo.output.lock import hold_output, hold_run, hold_run_with_all_ranks
from recipes.launch import main

HOLDER = "import sys, time; from pathlib import Path\n"
HOLDER += "from nemo_ampo.output.lock import hold_run\nf = hold_run(Path(sys.argv[1]))\n"


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


def test_two_jobs_do_not_share_checkpoints(tmp_path: Path) -> None:
    shared = str(tmp_path / "checkpoints")
    with hold_run_with_all_ranks(tmp_path / "a", shared):
        second = hold_run_with_all_ranks(tmp_path / "b", shared, patience_s=0)
        with pytest.raises(UserError, match=rf"^checkpoint\.dir: {shared} is in use by another job"), second:
            pass
        with hold_run_with_all_ranks(tmp_path / "b", None, patience_s=0):
            pass
    with hold_run_with_all_ranks(tmp_path / "b", shared, patience_s=0):
        pass


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
from nemo_ampo.output.lock import hold_output
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


def claim(folder: Path) -> None:
    """One rank; says what came of it."""
    try:
        with hold_run_with_all_ranks(folder, patience_s=0):
            assert (folder / ".running").exists(), "the main rank holds it before anybody goes on"
            time.sleep(0.3)
            said = "in"
    except UserError as error:
        said = str(error)
    (folder.parent / f"rank{os.environ['RANK']}").write_text(said)


@pytest.mark.parametrize("taken", [False, True])
def test_all_ranks_go_on_or_none(tmp_path: Path, taken: bool) -> None:
    folder = tmp_path / "run"
    process = other_job(folder) if taken else None
    try:
        children = fork_ranks(lambda: claim(folder), 3)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    finally:
        if process is not None:
            process.kill()
            process.communicate()
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(3)]
    holder = process.pid if process is not None else children[0]
    assert (folder / ".running").read_text().startswith(f"process {holder} on ")
    assert len(set(said)) == 1 and (f"in use by another job (process {holder} on " in said[0] if taken else said[0] == "in")


@pytest.mark.parametrize("stage", ["bc", "ampo"])
def test_a_training_stage_opens_nothing_in_a_folder_that_another_job_holds(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = importlib.import_module(f"recipes.{stage}")
    monkeypatch.setattr(recipe, "hold_run_with_all_ranks", functools.partial(hold_run_with_all_ranks, patience_s=0))
    file = tmp_path / "rows.json"
    file.touch()
    paths = [f"run.dir={tmp_path / 'run'}", f"run.init_from={file}", f"data.train={file}"]
    paths += [f"data.heldout={file}"] if stage == "bc" else ["judge.base_url=http://127.0.0.1:9/v1"]
    with hold_run(tmp_path / "run"):
        assert main(stage, recipe.run, ["--config-name", "tiny", *paths]) == 2
    assert "is in use by another job" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").rglob("*")] == [".running"]
