"""The second judge: agreement worked by hand, schedule, sharing of the first one's limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripted_chat import Act, ScriptedChat, Seen, says, serve, verdict_json

from nemo_ampo.chat.config import Price
from nemo_ampo.errors import ConfigError
from nemo_ampo.judge.config import JudgeConfig, SecondJudgeConfig
from nemo_ampo.judge.job import open_judge
from nemo_ampo.judge.second import FirstOpinion, SecondJudge, agreement
from nemo_ampo.prompts import read_judge_prompt
from nemo_ampo.types import JudgeRequest, Verdict


@pytest.fixture(scope="module")
def server() -> Any:
    with serve(Act()) as running:
        yield running


def opinions(scores: list[float]) -> list[FirstOpinion]:
    return [FirstOpinion(JudgeRequest(str(n), "Ada", "Ben", "g", "h"), "agent2", score) for n, score in enumerate(scores)]


def test_agreement_by_hand() -> None:
    # Ranks 1 2 3 4 against 2 1 3 4: 1 - 6 x (1 + 1) / (4 x 15)
    found = agreement([(1.0, 4.0), (2.0, 3.0), (5.0, 6.0), (9.0, 7.0)])
    assert found["rank_correlation"] == pytest.approx(0.8)
    assert found["mean_gap"] == pytest.approx((3 + 1 + 1 - 2) / 4)
    assert found["mean_absolute_gap"] == pytest.approx((3 + 1 + 1 + 2) / 4)
    assert agreement([]) == {}
    assert agreement([(3.0, 1.0), (3.0, 2.0)]).keys() == {"mean_gap", "mean_absolute_gap"}, "no rank without a difference"


def test_it_scores_some_of_the_replies_and_fails_without_harm(server: ScriptedChat, tmp_path: Path) -> None:
    def script(number: int, call: Seen) -> Act:
        n = int(read_judge_prompt(call.prompt).dialogue)
        return Act(says("?")) if n == 0 else Act(says(verdict_json(0, 10 - n)))

    server.play(script)
    own = SecondJudgeConfig(server.url, "referee-2", every=5, samples=3)
    config = JudgeConfig("http://127.0.0.1:9/v1", "referee", temperatures=[0.0], second=own)
    with open_judge(config, tmp_path) as judge:
        second = SecondJudge(judge, own, seed=1)
        assert [step for step in range(12) if second.is_due(step)] == [0, 5, 10]
        metrics = second.compare(0, opinions([0.0, 1.0, 2.0]))
        assert metrics["judge/second_samples"] == 2 and metrics["judge/second_failed"] == 1
        assert metrics["judge/second_rank_correlation"] == pytest.approx(-1.0)
        assert metrics["judge/second_mean_gap"] == pytest.approx(((9 - 1) + (8 - 2)) / 2)
        server.calls.clear()
        assert second.compare(5, opinions([float(n % 9) for n in range(1, 41)]))["judge/second_samples"] <= 3
        assert len(server.calls) == 3
    assert {call.payload["model"] for call in server.calls} == {"referee-2"}


def test_it_spends_from_the_same_budget(server: ScriptedChat, tmp_path: Path) -> None:
    server.play(Act(says(verdict_json(5, 5))))
    own = SecondJudgeConfig(server.url, "referee-2", every=1, samples=9)
    with open_judge(JudgeConfig(server.url, "referee", max_calls=5, second=own), tmp_path) as judge:
        assert all(isinstance(outcome, Verdict) for outcome in judge.score_all(o.request for o in opinions([1.0] * 3)))
        metrics = SecondJudge(judge, own, seed=1).compare(0, opinions([float(n) for n in range(4)]))
    assert (metrics["judge/second_samples"], metrics["judge/second_failed"]) == (2, 2)
    assert len(server.calls) == 5


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"every": 0}, "judge.second.every"), ({"samples": 0}, "judge.second.samples"),
        ({"base_url": "nowhere"}, "judge.second.base_url"), ({"model": " "}, "judge.second.model"),
        ({"model": "unpriced"}, "judge.second.price"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(changes: dict[str, Any], key: str) -> None:
    own = SecondJudgeConfig(**{"base_url": "http://h/v1", "model": "m", **changes})
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        JudgeConfig("http://h/v1", "m", price={"m": Price(1.0, 1.0)}, second=own)
