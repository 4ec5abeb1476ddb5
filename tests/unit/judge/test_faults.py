"""The fault matrix: a server that fails some, all or none of the calls, in every way we know.

A dialogue's number decides its fate, so what must come out is known: a dialogue that was answered well has exactly the
scores it was given, any other has a JudgeError, and the counts are those that were injected.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_chat import Act, ScriptedChat, Seen, says, serve, verdict_json

from nemo_ampo.config.reading import read_section
from nemo_ampo.errors import JudgeError
from nemo_ampo.judge.client import Judge
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.judge.stats import JudgeStats
from nemo_ampo.types import JudgeRequest, Verdict

DIALOGUES = 20
TRUTH = {number: (float(number % 11), float((3 * number) % 11)) for number in range(DIALOGUES)}

GOOD = {number: verdict_json(*scores) for number, scores in TRUTH.items()}

FAULTS: dict[str, tuple[Any, str]] = {
    "hang": (lambda n: Act(hang=True), "timeout"),
    "closed mid-body": (lambda n: Act(says(GOOD[n]), hang_up_after=40), "connection"),
    "429": (lambda n: Act("{}", status=429, headers={"retry-after": "0"}), "status"),
    "500": (lambda n: Act(json.dumps({"error": {"message": GOOD[n]}}), status=500), "status"),
    "500 with a good body": (lambda n: Act(says(GOOD[n]), status=500), "status"),
    "400": (lambda n: Act("{}", status=400), "status"),
    "garbage": (lambda n: Act("\x00\xff<html>{" + GOOD[n]), "parse"),
    "empty body": (lambda n: Act(""), "parse"),
    "empty reply": (lambda n: Act(says("")), "empty"),
    "prose": (lambda n: Act(says(f"I would say {n % 11} and 3.")), "parse"),
    "huge body": (lambda n: Act(says("x" * 2**20), repeat=12), "parse"),
    "wrong schema": (lambda n: Act(says(json.dumps({"scores": list(TRUTH[n])}))), "parse"),
    "one agent only": (lambda n: Act(says(json.dumps({"agent1": json.loads(GOOD[n])["agent1"]}))), "parse"),
    "names for agents": (lambda n: Act(says(GOOD[n].replace("agent1", "Ada").replace("agent2", "Ben"))), "parse"),
    "score above": (lambda n: Act(says(verdict_json(11, TRUTH[n][1]))), "parse"),
    "score below": (lambda n: Act(says(verdict_json(TRUTH[n][0], -1))), "parse"),
    "score not a number": (lambda n: Act(says(verdict_json("high", None))), "parse"),
    "NaN": (lambda n: Act(says(verdict_json(float("nan"), 5))), "parse"),
    "two verdicts": (lambda n: Act(says(GOOD[n] + GOOD[n])), "parse"),
    "cut in half": (lambda n: Act(says(GOOD[n][:40])), "parse"),
    "unfinished thoughts": (lambda n: Act(says("<think>the answer is " + GOOD[n])), "empty"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedChat]:
    with serve(Act()) as running:
        yield running


def config(url: str, **changes: Any) -> JudgeConfig:
    quick: dict[str, Any] = {"backoff_initial_s": 0.001, "backoff_max_s": 0.002, "connection_retries": 1}
    return JudgeConfig(url, "referee", **{"timeout_s": 20.0, "temperatures": [0.0, 1.0], **quick, **changes})


def number_of(call: Seen) -> int:
    found = re.search(r"dialogue number (\d+)", call.prompt)
    assert found is not None
    return int(found.group(1))


def judge_all(settings: JudgeConfig, numbers: range = range(DIALOGUES)) -> tuple[list[Any], JudgeStats]:
    async def run() -> tuple[list[Any], JudgeStats]:
        async with Judge(settings) as judge:
            requests = [JudgeRequest(f"dialogue number {n}", "Ada", "Ben", "borrow it", "keep it") for n in numbers]
            outcomes = await asyncio.gather(*map(judge.score, requests), return_exceptions=True)
            return outcomes, judge.stats

    return asyncio.run(run())


def is_true(number: int, outcome: Any) -> bool:
    return isinstance(outcome, Verdict) and (outcome.agent1, outcome.agent2) == TRUTH[number]


@pytest.mark.parametrize("percent", [0, 5, 50, 100])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_call_is_missing_and_any_other_verdict_is_true(server: ScriptedChat, fault: str, percent: int) -> None:
    make, kind = FAULTS[fault]
    doomed = set(range(DIALOGUES * percent // 100))
    patience_s = 1.0 if fault == "hang" else 20.0

    def script(number: int, call: Seen) -> Act:
        n = number_of(call)
        return make(n) if n in doomed else Act(says(GOOD[n]))

    server.play(script)
    outcomes, stats = judge_all(config(server.url, timeout_s=patience_s))
    for number, outcome in enumerate(outcomes):
        if number in doomed:
            assert isinstance(outcome, JudgeError) and outcome.kind == kind, (number, outcome)
        else:
            assert is_true(number, outcome), (number, outcome)
    assert stats.verdicts == DIALOGUES - len(doomed)
    assert dict(stats.failures) == ({kind: len(doomed)} if doomed else {})
    assert stats.requests == stats.verdicts + sum(stats.failures.values())
    assert stats.calls == len(server.calls)


def test_a_judge_that_recovers_costs_exactly_the_injected_retries(server: ScriptedChat) -> None:
    fates = [FAULTS["500"][0], FAULTS["prose"][0], FAULTS["closed mid-body"][0]]
    seen: dict[int, int] = {}

    def script(number: int, call: Seen) -> Act:
        n = number_of(call)
        seen[n] = seen.get(n, 0) + 1
        return fates[n % 3](n) if seen[n] == 1 else Act(says(GOOD[n]))

    server.play(script)
    outcomes, stats = judge_all(config(server.url))
    assert all(is_true(number, outcome) for number, outcome in enumerate(outcomes))
    by_cause = [len([n for n in range(DIALOGUES) if n % 3 == k]) for k in range(3)]
    assert dict(stats.retries) == {"server_error": by_cause[0], "parse": by_cause[1], "connection": by_cause[2]}
    assert (stats.parse_failures, stats.failures) == (by_cause[1], {})


def test_agents_in_the_other_order_keep_their_own_scores(server: ScriptedChat) -> None:
    def script(number: int, call: Seen) -> Act:
        record = json.loads(GOOD[number_of(call)])
        return Act(says(json.dumps({"agent2": record["agent2"], "agent1": record["agent1"]})))

    server.play(script)
    outcomes, _ = judge_all(config(server.url))
    assert all(is_true(number, outcome) for number, outcome in enumerate(outcomes))


def test_a_huge_body_is_not_read_to_its_end(server: ScriptedChat) -> None:
    sent = 0

    def script(number: int, call: Seen) -> Act:
        nonlocal sent
        sent += 1
        return Act(says("x" * 2**20), repeat=10_000)

    server.play(script)
    (outcome,), _ = judge_all(config(server.url, connection_retries=0), range(1))
    assert isinstance(outcome, JudgeError) and "longer than" in str(outcome) and sent == 1


def test_unreadable_replies_are_paid_for(server: ScriptedChat) -> None:
    server.play(Act(says("no idea", usage=(1000, 100))))
    priced = {"price": {"referee": {"input_per_million": 2.0, "output_per_million": 10.0}}}
    settings = read_section("judge", JudgeConfig, {"base_url": server.url, "model": "referee", **priced})
    _, stats = judge_all(settings, range(2))
    assert stats.verdicts == 0 and stats.calls == 10
    assert stats.cost_usd == pytest.approx(10 * (1000 * 2 + 100 * 10) / 1e6)
    assert stats.metrics()["judge/cost_usd"] == stats.cost_usd
