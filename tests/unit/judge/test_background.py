"""The judge beside a busy main thread, over real HTTP; its end, also by Ctrl-C, in real processes."""

from __future__ import annotations

import concurrent.futures
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_ampo.chat.limiter import SAVE_INTERVAL_S
from nemo_ampo.errors import JudgeError, UserError
from nemo_ampo.judge.background import JudgeThread
from nemo_ampo.judge.client import Judge
from nemo_ampo.judge.job import open_judge
from nemo_ampo.types import Verdict

WAIT_S = 30
"""Only spent when a test fails."""


def judge_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "judge"]


def test_verdicts_arrive_while_the_main_thread_is_busy(tools: Any) -> None:
    four = threading.Barrier(4)

    def script(number: int, call: Any) -> Any:
        four.wait(timeout=WAIT_S)  # and they are on their way together
        return tools.verdict(len(call.prompt) % 10, 0)

    server = tools.serve(script)
    with JudgeThread(Judge(tools.config(server.base_url))) as judge:
        futures = []
        for length in range(4):
            futures.append(judge.submit(tools.request("x" * length)))
            sum(range(200_000))  # the next rollout
        deadline = time.monotonic() + WAIT_S
        while not all(future.done() for future in futures) and time.monotonic() < deadline:
            sum(range(20_000))  # never waits, never sleeps
        assert all(future.done() for future in futures)
        scores = [future.result().agent1 for future in futures]
        assert judge.stats.verdicts == 4
    assert server.max_in_flight == 4
    assert [(score - scores[0]) % 10 for score in scores] == [0, 1, 2, 3], "each future has its own verdict"


def test_score_all_keeps_the_order_and_reports_failures_in_place(tools: Any) -> None:
    def script(number: int, call: Any) -> Any:
        return tools.Answer(status=400) if "poison" in call.prompt else tools.verdict(5, 5)

    server = tools.serve(script)
    with JudgeThread(Judge(tools.config(server.base_url))) as judge:
        outcomes = judge.score_all(tools.request(text) for text in ("a", "poison", "b"))
        assert [isinstance(outcome, Verdict) for outcome in outcomes] == [True, False, True]
        assert isinstance(outcomes[1], JudgeError) and outcomes[1].kind == "status"
        assert judge.score_all([]) == []


def test_requests_from_several_threads(tools: Any) -> None:
    server = tools.serve(tools.verdict(5, 5))
    with (
        JudgeThread(Judge(tools.config(server.base_url))) as judge,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        futures = list(pool.map(lambda _: judge.submit(tools.request()), range(64)))
        assert all(isinstance(future.result(timeout=WAIT_S), Verdict) for future in futures)


def test_check_is_the_judges(tools: Any) -> None:
    with JudgeThread(Judge(tools.config(tools.serve(tools.verdict()).base_url))) as judge:
        judge.check()
    refuse = tools.Answer("{}", status=401)
    server = tools.serve(refuse, models=refuse)
    with JudgeThread(Judge(tools.config(server.base_url))) as judge, pytest.raises(UserError, match="401"):
        judge.check()


RANK = """
import sys, time
from nemo_ampo.errors import UserError
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.types import JudgeRequest
from nemo_ampo.judge.job import open_judge

config = JudgeConfig(sys.argv[1], "referee", temperatures=[0.0, 0.5, 1.0], connection_retries=1, backoff_initial_s=0.001,
                     backoff_max_s=0.002)
with open_judge(config, sys.argv[2]) as judge:
    try:
        judge.check()
    except UserError as error:
        print(error, flush=True)
    else:
        score = judge.submit(JudgeRequest("d", "A", "B", "g", "h")).result().agent1
        print("checked, and then", judge.stats.calls, "calls for", score, flush=True)
    sys.stdin.readline()  # the main rank leaves last
"""


def lines_of_three_ranks(tools: Any, base_url: str, folder: Path) -> list[str]:
    """What each rank of a job says after its check."""
    job = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4712"}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RANK, base_url, str(folder)]
    ranks = [
        subprocess.Popen(command, env={**tools.child_environment(), **job, "RANK": str(rank)}, **pipes) for rank in range(3)
    ]
    try:
        lines = [rank.stdout.readline().strip() for rank in ranks]
        for rank in reversed(ranks):
            rank.communicate("\n", timeout=WAIT_S)
    finally:
        for rank in ranks:
            rank.kill()
    return lines


def test_the_first_calls_are_sent_by_the_main_rank_and_all_ranks_hear_what_it_found(tools: Any, tmp_path: Path) -> None:
    """The server breaks at a schema, which one rank finds out for all."""
    server = tools.serve(
        lambda number, call: tools.Answer(status=500) if "response_format" in call.payload else tools.verdict()
    )
    lines = lines_of_three_ranks(tools, server.base_url, tmp_path)
    first_calls = len(server.calls) - 3
    assert lines == [f"checked, and then {first_calls + 1} calls for 7.0"] + ["checked, and then 1 calls for 7.0"] * 2
    assert first_calls == 3 + 2, "one for each temperature, and two with the schema"


def test_what_the_main_rank_is_refused_is_told_by_every_rank(tools: Any, tmp_path: Path) -> None:
    server = tools.serve(lambda number, call: tools.Answer("no", status=422) if call.temperature > 0.9 else tools.verdict())
    lines = lines_of_three_ranks(tools, server.base_url, tmp_path)
    assert "status 422: no" in lines[0] and "temperature=1.0" in lines[0] and lines == [lines[0]] * 3


def test_a_record_of_spending_that_cannot_be_written_is_a_metric(tools: Any, tmp_path: Path) -> None:
    with open_judge(tools.config(tools.serve(tools.verdict()).base_url), tmp_path) as judge:
        judge.submit(tools.request()).result(timeout=WAIT_S)
        assert "judge/spent_failures" not in judge.stats.metrics()
        (tmp_path / "judge_spent.json").unlink()
        (tmp_path / "judge_spent.json").mkdir()
        time.sleep(SAVE_INTERVAL_S)
        judge.submit(tools.request()).result(timeout=WAIT_S)
        assert judge.stats.metrics()["judge/spent_failures"] == 1


def test_closing_cancels_what_is_unanswered_and_ends_the_thread(tools: Any) -> None:
    server = tools.serve(tools.Answer(hold=threading.Event()))
    with JudgeThread(Judge(tools.config(server.base_url, max_concurrency=2))) as judge:
        futures = [judge.submit(tools.request()) for _ in range(5)]
        while len(server.calls) < 2:
            time.sleep(0.01)
    for future in futures:
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(timeout=WAIT_S)
    assert judge_threads() == []
    judge.close()
    with pytest.raises(RuntimeError, match="closed"):
        judge.submit(tools.request())
    assert judge.stats.calls == 2


def test_submitting_while_another_thread_closes_never_leaves_a_future_open(tools: Any) -> None:
    server = tools.serve(tools.verdict())
    for _ in range(10):
        judge = JudgeThread(Judge(tools.config(server.base_url)))
        closer = threading.Thread(target=judge.close)
        futures = []
        closer.start()
        try:
            while True:
                futures.append(judge.submit(tools.request()))
        except RuntimeError:
            pass
        closer.join(timeout=WAIT_S)
        assert not concurrent.futures.wait(futures, timeout=WAIT_S).not_done
        assert not closer.is_alive()


def test_an_error_in_the_block_ends_the_thread_and_is_not_replaced(tools: Any) -> None:
    server = tools.serve(tools.Answer(hold=threading.Event()))
    with pytest.raises(ZeroDivisionError), JudgeThread(Judge(tools.config(server.base_url))) as judge:
        judge.submit(tools.request())
        _ = 1 / 0
    assert judge_threads() == []


SCRIPT = """
import sys
from nemo_ampo.judge.client import Judge
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.types import JudgeRequest
from nemo_ampo.judge.background import JudgeThread

request = JudgeRequest("d", "A", "B", "g", "h")
thread = JudgeThread(Judge(JudgeConfig(base_url=sys.argv[1], model="referee")))
future = thread.submit(request)
print("asked", flush=True)
if sys.argv[2] == "wait":
    with thread:
        future.result()
"""


def start(base_url: str, how: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, base_url, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_ctrl_c_ends_the_process(tools: Any) -> None:
    server = tools.serve(tools.Answer(hold=threading.Event()))
    with start(server.base_url, "wait", tools.child_environment()) as process:
        try:
            while not server.calls and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT, errors
    assert errors.rstrip().endswith("KeyboardInterrupt") and "Task was destroyed" not in errors


def test_a_thread_nobody_closed_does_not_keep_the_process_alive(tools: Any) -> None:
    server = tools.serve(tools.Answer(hold=threading.Event()))
    with start(server.base_url, "leave", tools.child_environment()) as process:
        try:
            output, errors = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert (process.returncode, output) == (0, "asked\n"), errors


ONE_AFTER_THE_OTHER = """
import sys
from nemo_ampo.judge.client import Judge
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.types import JudgeRequest
from nemo_ampo.judge.background import JudgeThread
for _ in range(8):
    with JudgeThread(Judge(JudgeConfig(sys.argv[1], "referee"))) as judge:
        judge.submit(JudgeRequest("d", "A", "B", "g", "h")).result()
"""


def test_a_process_may_open_one_judge_after_the_other(tools: Any) -> None:
    server = tools.serve(tools.verdict())
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, server.base_url],
        capture_output=True,
        text=True,
        env=tools.child_environment(),
    )
    assert (done.returncode, len(server.calls)) == (0, 8), done.stderr
