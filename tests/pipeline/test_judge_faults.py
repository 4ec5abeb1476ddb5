"""A real AMPO stage beside a judge that fails for half of the questions, then for all, then is back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fault_judge import MODEL, fault_judge, fault_of, scores_of
from stage_runs import AMPO, AMPO_STEPS, ROOT, SMALL_STEPS, Quickstart

from nemo_ampo.data.episodes import read_turns
from nemo_ampo.files import read_jsonl
from nemo_ampo.overrides import override
from nemo_ampo.prompts import load_prompt, render_judge_prompt
from nemo_ampo.reply.grammar import answer_of
from nemo_ampo.types import JudgeRequest

pytestmark = pytest.mark.slow
HALF, ALL, NONE = 50, 100, 0


def test_faults_are_masked_an_outage_stops_and_the_same_command_goes_on(quickstart: Quickstart, tmp_path: Path) -> None:
    folder = tmp_path / "ampo"
    data = quickstart.folder / "world" / "rl_train.jsonl"
    log = folder / "metrics.jsonl"
    with fault_judge(HALF) as judge:
        command = [
            *(
                sys.executable,
                "-m",
                "recipes.ampo",
                "--config-name",
                "tiny",
                f"run.dir={folder}",
                override("data.train", data),
            ),
            override("run.init_from", quickstart.folder / "bc" / "policy.nemo"),
            *(f"judge.base_url={judge.url}", f"judge.model={MODEL}", "judge.temperatures=[0.0]"),
            *("judge.connection_retries=1", "judge.backoff_initial_s=0.01", "judge.backoff_max_s=0.02"),
            *("guard.max_failed_fraction=0.95", "guard.step_retries=1", "guard.retry_pause_s=0"),
            *AMPO,
            *SMALL_STEPS,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 240
        while not read_jsonl(log):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.01)
        judge.percent = ALL
        _, errors = process.communicate(timeout=240)
        done = len(read_jsonl(log))
        assert process.returncode == 75, errors
        assert "verdicts could not be had, although asked for 2 times" in errors
        assert "the same command continues" in errors
        assert 1 <= done < AMPO_STEPS
        assert not (folder / "policy.nemo").exists()
        judge.percent = NONE
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    steps = read_jsonl(log)
    assert [row["step"] for row in steps] == list(range(AMPO_STEPS))
    requests = [row["judge/requests"] for row in steps]
    assert requests == sorted(requests) and requests[0] > 0

    turns = {turn.row_id: turn for turn in read_turns(data)}
    rows = read_jsonl(folder / "rollouts.jsonl")
    questions = [
        render_judge_prompt(load_prompt("judge"), JudgeRequest.about(turns[row["row_id"]], answer))
        if (answer := answer_of(row["text"], strict=False)) is not None
        else None
        for row in rows
    ]
    injected = 0
    for row, question in zip(rows, questions, strict=True):
        if question is None or (row["step"] == 0 and fault_of(question, HALF)):
            assert row["agent1_score"] is None and row["agent2_score"] is None and row["goal"] is None
        elif row["step"] == 0 or row["step"] >= done:
            assert (row["agent1_score"], row["agent2_score"]) == scores_of(question)
        if row["step"] == 0 and question is not None and fault_of(question, HALF):
            injected += 1
            assert row["judge_error"] is not None and row["reward"] is None and row["advantage"] == 0
    assert injected and steps[0]["guard/masked_samples"] == injected
    assert [row["guard/masked_samples"] for row in steps[done:]] == [0] * (AMPO_STEPS - done)


def test_a_signal_ends_the_wait_for_a_judge_that_is_out(quickstart: Quickstart, tmp_path: Path) -> None:
    """The pause before asking again is an hour; nobody waits for it."""
    folder = tmp_path / "ampo"
    with fault_judge(ALL) as judge:
        command = [
            *(sys.executable, "-m", "recipes.ampo", "--config-name", "tiny", f"run.dir={folder}"),
            override("data.train", quickstart.folder / "world" / "rl_train.jsonl"),
            override("run.init_from", quickstart.folder / "bc" / "policy.nemo"),
            *(f"judge.base_url={judge.url}", f"judge.model={MODEL}", "judge.temperatures=[0.0]"),
            *("judge.connection_retries=1", "judge.backoff_initial_s=0.01", "judge.backoff_max_s=0.02"),
            *("guard.step_retries=100", "guard.retry_pause_s=3600", *AMPO, *SMALL_STEPS),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 240
        while len(judge.asked) < 2:  # beyond what is asked at the start
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        try:
            _, errors = process.communicate(timeout=240)
        finally:
            process.kill()
    assert process.returncode == 75, errors
    assert "verdicts could not be had, and the run was asked to stop" in errors
    assert not read_jsonl(folder / "metrics.jsonl")


def test_a_run_that_goes_wrong_step_after_step_ends_with_one_line(quickstart: Quickstart, tmp_path: Path) -> None:
    """No mode can have all samples, so with a limit of 1 every mode is under alarm after two steps."""
    with fault_judge(NONE) as judge:
        rules = ["guard.min_mode_share=1", "guard.collapse_steps=2", "guard.stop_on_collapse=true"]
        finished = quickstart.ampo(tmp_path / "ampo", judge.url, f"judge.model={MODEL}", *SMALL_STEPS, *rules)
    assert finished.status == 2, finished.err
    (line,) = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    assert "step 2: guard.stop_on_collapse: mode 1 and mode 2 and mode 3 and mode 4" in line
    assert "there is no checkpoint" in line
    assert finished.err.count("warning: guard.min_mode_share") == 1
    steps = read_jsonl(tmp_path / "ampo" / "metrics.jsonl")
    assert [row["guard/collapsed_modes"] for row in steps] == [0, 4]
    assert not (tmp_path / "ampo" / "policy.nemo").exists()


def test_a_main_rank_that_stops_while_it_first_asks_the_judge_is_named(quickstart: Quickstart, tmp_path: Path) -> None:
    """The other rank waits to hear what it found out; no collective, whose own limit would end that, has begun yet."""
    with fault_judge(NONE) as judge:
        judge.silent.set()
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "recipes.ampo"),
            *("--config-name", "tiny", f"run.dir={tmp_path / 'ampo'}", "run.rank_timeout_s=5"),
            override("data.train", quickstart.folder / "world" / "rl_train.jsonl"),
            override("run.init_from", quickstart.folder / "bc" / "policy.nemo"),
            *(f"judge.base_url={judge.url}", f"judge.model={MODEL}", "judge.timeout_s=3600"),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 240
        while not judge.asked:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.01)
        (main,) = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "0"]
        main.suspend()
        try:
            _, errors = process.communicate(timeout=240)
        finally:
            judge.silent.clear()
            process.kill()
    assert f"pid {main.pid}) gave no sign of life for 5 s" in errors and "error: rank 0 (" in errors
