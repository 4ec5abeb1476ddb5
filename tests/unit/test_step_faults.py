"""One AMPO step with the real judge client and a real HTTP server that fails as told, for the samples it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from fault_judge import MODEL, FaultJudge, fault_judge, fault_of, scores_of
from opening_turn import turn

from nemo_ampo.algo.algorithm import AlgorithmConfig
from nemo_ampo.algo.guard import GuardConfig
from nemo_ampo.algo.rewards import RewardConfig, combine, goal_gain
from nemo_ampo.errors import JudgeOutageError
from nemo_ampo.judge.background import JudgeThread
from nemo_ampo.judge.client import Judge
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.prompts import load_prompt, render_judge_prompt
from nemo_ampo.ranks import OneProcess
from nemo_ampo.rollout.config import RolloutConfig
from nemo_ampo.rollout.engine import Caps, OnFinish, Request, Response, SamplingSpec, SyncReport, UnavailableError
from nemo_ampo.step import Parts, StepResult, ampo_step
from nemo_ampo.types import JudgeRequest, Prompt, TrainBatch, Updated

PROMPTS, GROUP, EOS = 24, 8, 0


def answer(request_id: int) -> str:
    return f'"Offer number {request_id}."'


def reply(request_id: int) -> str:
    if request_id % 50 == 49:
        return "I would rather not think."
    return f"Thinking Level: 1\n<|begin_of_answer|>\n{answer(request_id)}\n<|end_of_answer|>"


class Characters:
    """A tokenizer with one token per character; id 0 ends a reply."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) for i in token_ids if i != EOS)

    def tokenize(self, text: str) -> list[str]:
        return list(text)


class Scripted:
    """An engine whose every reply is different, so that every question to the judge is."""

    caps = Caps("raw", 8, 99, 99, 300, False)

    def sync(self, weight_version: int) -> SyncReport:
        return SyncReport(weight_version, 0, 0, 0.0)

    def release(self) -> None: ...

    def close(self) -> None: ...

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSpec, on_finish: OnFinish | None = None
    ) -> list[Response]:
        responses = []
        for request in requests:
            ids = (*map(ord, reply(request.request_id)), EOS)
            responses.append(Response(request.request_id, ids, torch.full((len(ids),), -0.5), "eos"))
            assert on_finish is not None
            on_finish(responses[-1])
        return responses


@dataclass
class Recorder:
    """A policy that keeps its batches."""

    batches: list[TrainBatch] = field(default_factory=list)
    updates_once: bool = True

    def logprobs(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        return torch.full((tokens_BT.size(0), tokens_BT.size(1) - 1), -0.75)

    def reference_logprobs(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        return torch.full((tokens_BT.size(0), tokens_BT.size(1) - 1), -1.0)

    def update(self, batch: TrainBatch) -> Updated:
        self.batches.append(batch)
        return Updated({"policy/loss": 1.0}, torch.full(batch.mask_BT.shape, -0.75))


TURNS = [turn(f"Ann{i}") for i in range(PROMPTS)]
QUESTIONS = {
    i: render_judge_prompt(load_prompt("judge"), JudgeRequest.about(TURNS[i // GROUP], answer(i)))
    for i in range(PROMPTS * GROUP)
    if i % 50 != 49
}
"""What the judge must be asked, by sample; the others break the grammar."""


@contextmanager
def step_parts(server: FaultJudge, guard: GuardConfig, timeout_s: float = 60) -> Iterator[Parts]:
    config = JudgeConfig(
        base_url=server.url,
        model=MODEL,
        temperatures=[0.0, 1.0],
        connection_retries=1,
        timeout_s=timeout_s,
        max_concurrency=16,
        backoff_initial_s=0.001,
        backoff_max_s=0.002,
    )
    with JudgeThread(Judge(config)) as judge:
        yield Parts(
            engine=Scripted(),
            judge=judge,
            tokenizer=Characters(),
            ranks=OneProcess(),
            rollout=RolloutConfig(prompts_per_step=PROMPTS, group_size=GROUP),
            reward=RewardConfig(),
            algorithm=AlgorithmConfig(),
            stop_token_ids=(EOS,),
            pad_id=7,
            seed=1,
            guard=guard,
        )


def run(parts: Parts, policy: Recorder, stop: Callable[[], bool] = lambda: False) -> StepResult:
    return ampo_step(0, [Prompt(t, (50, 51)) for t in TURNS], policy, parts, stop)


@pytest.mark.parametrize("percent", [0, 5, 50])
def test_masked_samples_are_exactly_the_injected_faults(percent: float) -> None:
    expected = {i for i, question in QUESTIONS.items() if fault_of(question, percent) is not None}
    assert (percent == 0) == (not expected)
    policy = Recorder()
    with fault_judge(percent) as server, step_parts(server, GuardConfig(max_failed_fraction=1)) as parts:
        result = run(parts, policy)
        stats = parts.judge.stats.metrics()
    assert server.faulty() == {QUESTIONS[i] for i in expected}
    assert result.metrics["guard/masked_samples"] == len(expected)
    assert result.metrics["judge/failed_fraction"] == pytest.approx(len(expected) / len(QUESTIONS))
    assert sum(v for k, v in stats.items() if k.startswith("judge/failures/")) == len(expected)
    assert sum(v for k, v in result.metrics.items() if k.startswith("judge/failed_") and k[-9:] != "_fraction") == len(
        expected
    )

    (batch,) = policy.batches
    for i, sample in enumerate(result.samples):
        if i in expected:
            assert sample.verdict is None and sample.judge_error is not None
            assert sample.parts.reward is None and sample.parts.goal is None and not sample.parts.valid
            assert result.advantages[i] == 0
            assert not batch.mask_BT[i].any()
        elif i in QUESTIONS:
            one, two = scores_of(QUESTIONS[i])
            assert sample.verdict is not None
            assert (sample.verdict.agent1, sample.verdict.agent2) == (one, two)
            assert sample.parts.reward == combine(goal_gain(4.0, one), 1.0)
            assert int(batch.mask_BT[i].sum()) == len(reply(i)) + 1
        else:
            assert sample.parts.reward == -2.0 and sample.judge_error is None
            assert batch.mask_BT[i].any()


def test_a_group_is_compared_as_if_the_failed_samples_had_never_been_drawn() -> None:
    with fault_judge(50) as server, step_parts(server, GuardConfig(max_failed_fraction=1)) as parts:
        result = run(parts, Recorder())
    compared = 0
    for group in range(PROMPTS):
        members = range(group * GROUP, (group + 1) * GROUP)
        rewards = {i: s.parts.reward for i in members if (s := result.samples[i]).parts.valid}
        if len(set(rewards.values())) < 2:
            continue
        compared += 1
        values = torch.tensor(list(rewards.values()), dtype=torch.float64)
        for i, reward in rewards.items():
            by_hand = (reward - float(values.mean())) / (float(values.std()) + 1e-6)
            assert result.advantages[i] == pytest.approx(by_hand, abs=1e-5)
    assert compared > PROMPTS // 2
    judged = [s for s in result.samples if s.parts.valid]
    assert result.metrics["reward/mean"] == pytest.approx(sum(s.parts.reward for s in judged) / len(judged))


def test_a_group_below_min_valid_is_skipped_and_counted() -> None:
    guard = GuardConfig(max_failed_fraction=1, min_valid=5)
    answered = [i not in QUESTIONS or fault_of(QUESTIONS[i], 50) is None for i in range(PROMPTS * GROUP)]
    valid = {g: sum(answered[g * GROUP : (g + 1) * GROUP]) for g in range(PROMPTS)}
    small = {g for g, count in valid.items() if count < 5}
    assert small and len(small) < PROMPTS
    policy = Recorder()
    with fault_judge(50) as server, step_parts(server, guard) as parts:
        result = run(parts, policy)
    assert result.metrics["guard/skipped_groups"] == len(small)
    assert result.metrics["guard/skipped_samples"] == sum(valid[g] for g in small)
    assert result.metrics["guard/masked_samples"] == sum(8 - count for count in valid.values())
    for sample, value, mask in zip(result.samples, result.advantages, policy.batches[0].mask_BT, strict=True):
        assert bool(mask.any()) == (sample.group not in small and sample.judge_error is None)
        if sample.group in small:
            assert value == 0
    kept = [s.parts.reward for s in result.samples if s.group not in small and s.judge_error is None]
    assert result.metrics["reward/mean"] == pytest.approx(sum(kept) / len(kept))


def test_an_outage_ends_the_step_before_anything_is_trained_on() -> None:
    policy = Recorder()
    guard = GuardConfig(step_retries=2, retry_pause_s=0)
    with fault_judge(100) as server, step_parts(server, guard) as parts:
        with pytest.raises(JudgeOutageError, match=rf"{len(QUESTIONS)} of {len(QUESTIONS)} verdicts .* asked for 3 times"):
            run(parts, policy)
        assert parts.judge.stats.requests == 3 * len(QUESTIONS)
    assert not policy.batches
    assert not server.answered
    assert set(server.asked) == set(QUESTIONS.values())


def test_only_failed_verdicts_are_asked_for_again_and_a_judge_that_recovers_is_forgiven() -> None:
    """Each question of the first round is called twice (the client's own retry); from the third call on it is answered."""
    guard = GuardConfig(step_retries=2, retry_pause_s=0)
    failing = {q for q in QUESTIONS.values() if fault_of(q, 50) is not None}
    policy = Recorder()
    with fault_judge(50, heal_after=2) as server, step_parts(server, guard) as parts:
        result = run(parts, policy)
        assert parts.judge.stats.requests == len(QUESTIONS) + len(failing)
    assert {q: server.asked[q] for q in QUESTIONS.values()} == {q: 3 if q in failing else 1 for q in QUESTIONS.values()}
    assert result.metrics["guard/judge_rounds"] == 1
    assert result.metrics["guard/masked_samples"] == 0
    assert result.metrics["judge/failed_fraction"] == 0
    assert all(s.parts.valid for s in result.samples)
    assert len(policy.batches) == 1


def test_without_a_sample_to_learn_from_there_is_no_update() -> None:
    policy = Recorder()
    with fault_judge(100) as server, step_parts(server, GuardConfig(max_failed_fraction=1, min_valid=3)) as parts:
        result = run(parts, policy)
    assert not policy.batches
    assert result.metrics["guard/skipped_groups"] == PROMPTS
    assert "policy/loss" not in result.metrics


class Two:
    """Two replicas as threads that really exchange what they hold."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)
        self.parts: list[list[object]] = [[], []]

    def gather(self, rank: int, rows: list[object]) -> list[object]:
        self.parts[rank] = list(rows)
        self.barrier.wait(30)
        together = [row for part in self.parts for row in part]
        self.barrier.wait(30)
        return together


@dataclass(frozen=True)
class Replica:
    """One of the two, as a step sees it."""

    job: Two
    data_rank: int
    data_size: int = 2
    is_leader: bool = True
    is_main: bool = False

    def gather(self, rows: list[object]) -> list[object]:
        return self.job.gather(self.data_rank, rows)

    def share(self, value: object) -> object:
        return value

    def any(self, flag: bool) -> bool:
        return any(self.gather([flag]))


def run_replicas(
    percents: tuple[float, float], guard: GuardConfig, stop_of_second: Callable[[FaultJudge], bool] = lambda server: False
) -> list[StepResult | Exception]:
    """A step of two replicas, each with a judge of its own; only the second is ever asked to stop."""
    job = Two()

    def replica(rank: int) -> StepResult | Exception:
        with fault_judge(percents[rank]) as server, step_parts(server, guard) as parts:
            try:
                stop = (lambda: stop_of_second(server)) if rank else (lambda: False)
                return run(replace(parts, ranks=Replica(job, rank)), Recorder(), stop)
            except JudgeOutageError as error:
                return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(replica, range(2)))


def test_the_outage_of_one_replica_is_decided_by_all() -> None:
    """Half of the job's verdicts fail, all of one replica: under a limit of 0.6 both go on, under 0.4 both stop."""
    results = run_replicas((0, 100), GuardConfig(max_failed_fraction=0.6, min_valid=1))
    failed = sum(i in QUESTIONS for i in range(PROMPTS * GROUP // 2, PROMPTS * GROUP))
    for result in results:
        assert isinstance(result, StepResult)
        assert result.metrics["guard/masked_samples"] == failed
        assert len(result.samples) == PROMPTS * GROUP
    stopped = run_replicas((0, 100), GuardConfig(max_failed_fraction=0.4, step_retries=1, retry_pause_s=0))
    assert all(isinstance(result, JudgeOutageError) for result in stopped)
    assert str(stopped[0]) == str(stopped[1])
    assert f"{failed} of {len(QUESTIONS)} verdicts" in str(stopped[0])


class Absent(Scripted):
    """An engine whose server is gone."""

    def sync(self, weight_version: int) -> SyncReport:
        raise UnavailableError("rollout server: gone")


def test_a_replica_without_its_engine_ends_the_step_of_all() -> None:
    job = Two()

    def replica(rank: int) -> StepResult | Exception:
        engine = Absent() if rank else Scripted()
        with fault_judge(0) as server, step_parts(server, GuardConfig()) as parts:
            try:
                return run(replace(parts, engine=engine, ranks=Replica(job, rank)), Recorder())
            except UnavailableError as error:
                return error

    with ThreadPoolExecutor(2) as pool:
        assert [str(outcome) for outcome in pool.map(replica, range(2))] == ["rollout server: gone"] * 2


AN_HOUR = GuardConfig(max_failed_fraction=0.4, step_retries=100, retry_pause_s=3600)
"""A pause that no test outlasts."""


def test_a_stop_asked_of_one_replica_ends_the_outage_of_another_on_both() -> None:
    """All verdicts of the first replica fail, none of the second's; the signal reaches the second only."""
    stopped = run_replicas((100, 0), AN_HOUR, stop_of_second=lambda server: len(server.answered) > 10)
    assert all(isinstance(result, JudgeOutageError) for result in stopped)
    assert str(stopped[0]) == str(stopped[1])
    failed = sum(i in QUESTIONS for i in range(PROMPTS * GROUP // 2))
    assert str(stopped[0]).startswith(
        f"{failed} of {len(QUESTIONS)} verdicts could not be had, and the run was asked to stop"
    )


def test_a_judge_that_answers_is_heard_out_although_the_run_was_asked_to_stop() -> None:
    policy = Recorder()
    with fault_judge(5) as server, step_parts(server, AN_HOUR) as parts:
        run(parts, policy, stop=lambda: True)
    assert len(policy.batches) == 1


def test_a_judge_that_keeps_silent_is_not_waited_for_once_the_run_was_asked_to_stop() -> None:
    """The judge's own patience is an hour as well."""
    policy = Recorder()
    with fault_judge(0) as server:
        server.silent.set()
        with (
            step_parts(server, GuardConfig(retry_pause_s=0), timeout_s=3600) as parts,
            pytest.raises(JudgeOutageError, match=r"asked to stop \(mostly: given_up\)"),
        ):
            run(parts, policy, stop=lambda: len(server.asked) > 0)
        server.silent.clear()
    assert not policy.batches
