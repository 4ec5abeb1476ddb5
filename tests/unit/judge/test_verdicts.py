"""Verdicts that no further question can bring: a run ends with what the judge said instead of waiting for it."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from nemo_ampo.algo.guard import GuardConfig
from nemo_ampo.errors import ConfigError, JudgeError, JudgeOutageError, UserError
from nemo_ampo.judge.stats import JudgeStats
from nemo_ampo.judge.verdicts import PendingVerdict, all_verdicts
from nemo_ampo.ranks import OneProcess
from nemo_ampo.types import JudgeRequest, Verdict

GUARD = GuardConfig(max_failed_fraction=0.25, step_retries=2, retry_pause_s=0.0)
REFUSED = JudgeError("status", "status 400: no such field", permanent=True)
LATE = JudgeError("timeout", "no answer")


class Scripted:
    """Answers a dialogue with the next of its outcomes, the last one for ever."""

    stats = JudgeStats()

    def __init__(self, *outcomes: list[JudgeError | None]) -> None:
        self.outcomes = list(outcomes)
        self.asked = [0] * len(outcomes)

    def submit(self, request: JudgeRequest) -> Future[Verdict]:
        number = int(request.dialogue)
        mine = self.outcomes[number]
        outcome = mine[min(self.asked[number], len(mine) - 1)]
        self.asked[number] += 1
        future: Future[Verdict] = Future()
        if outcome is None:
            future.set_result(Verdict(5.0, 5.0))
        else:
            future.set_exception(outcome)
        return future

    def pending(self) -> list[PendingVerdict]:
        return [PendingVerdict(self, JudgeRequest(str(i), "A", "B", "g", "h")) for i in range(len(self.outcomes))]


def test_what_asking_again_cannot_mend_ends_the_run_with_what_the_judge_said() -> None:
    judge = Scripted([REFUSED], [REFUSED], [None], [None])
    with pytest.raises(UserError, match=r"2 of 4 verdicts .* would end the same: status 400: no such field"):
        all_verdicts(judge.pending(), OneProcess(), GUARD, lambda: False)
    assert judge.asked == [1, 1, 1, 1]


def test_a_few_of_them_are_left_out_and_only_the_others_asked_for_again() -> None:
    judge = Scripted([REFUSED], [LATE, None], [None], [None])
    judged, rounds = all_verdicts(judge.pending(), OneProcess(), GUARD, lambda: False)
    assert [j.verdict is not None for j in judged] == [False, True, True, True] and rounds == 1
    assert judge.asked == [1, 2, 1, 1]


def test_what_may_pass_is_an_outage() -> None:
    judge = Scripted([LATE], [LATE], [None], [None])
    with pytest.raises(JudgeOutageError, match=r"asked for 3 times \(mostly: timeout\)"):
        all_verdicts(judge.pending(), OneProcess(), GUARD, lambda: False)


class Silent(Scripted):
    """Never answers; keeps what it was asked."""

    def __init__(self, size: int) -> None:
        super().__init__(*([None] for _ in range(size)))
        self.futures: list[Future[Verdict]] = []

    def submit(self, request: JudgeRequest) -> Future[Verdict]:
        self.futures.append(Future())
        return self.futures[-1]


def test_what_has_not_come_after_the_longest_wait_is_asked_for_again_and_then_stops_the_run() -> None:
    judge = Silent(3)
    guard = GuardConfig(step_retries=1, retry_pause_s=0.0, max_wait_s=0.05)
    with pytest.raises(JudgeOutageError, match=r"3 of 3 verdicts .* asked for 2 times \(mostly: too_late\)"):
        all_verdicts(judge.pending(), OneProcess(), guard, lambda: False)
    assert [future.cancelled() for future in judge.futures] == [True] * 3 + [False] * 3, "none is paid for twice"


def test_a_few_late_ones_are_left_out() -> None:
    judge, late = Scripted([None], [None], [None]), Silent(1)
    pending = [*judge.pending(), *late.pending()]
    judged, rounds = all_verdicts(pending, OneProcess(), GuardConfig(max_wait_s=0.05), lambda: False)
    assert [j.error for j in judged] == [None, None, None, "too_late"] and rounds == 0


@pytest.mark.parametrize("seconds", [0.0, 1800.0, float("inf"), float("nan")])
def test_the_wait_ends_before_the_other_ranks_give_up(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"guard\.max_wait_s: must be a number above 0 and below 1800"):
        GuardConfig(max_wait_s=seconds)
