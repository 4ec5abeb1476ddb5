"""One AMPO step over a scripted engine, a scripted judge and a policy that records what it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from opening_turn import turn

from nemo_ampo.algo.algorithm import PRESETS, AlgorithmConfig, ModeCredit
from nemo_ampo.algo.rewards import RewardConfig
from nemo_ampo.errors import JudgeError
from nemo_ampo.ranks import OneProcess
from nemo_ampo.rollout.config import RolloutConfig
from nemo_ampo.rollout.engine import Caps, OnFinish, Request, Response, SamplingSpec, SyncReport
from nemo_ampo.rollout.probe import Probe, ProbeError
from nemo_ampo.step import Parts, StepResult, ampo_step, expand
from nemo_ampo.types import JudgeRequest, Prompt, TrainBatch, Updated, Verdict

GOOD = 'Thinking Level: 1\n<|begin_of_answer|>\n"Deal at {}."\n<|end_of_answer|>'
BAD = "I will not think."
EOS = 0
ALONE = OneProcess()


class Characters:
    """A tokenizer with one token per character; id 0 ends a reply."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) for i in token_ids if i != EOS)

    def tokenize(self, text: str) -> list[str]:
        return list(text)


@dataclass
class Script:
    """An engine that answers request i with text i, last one first."""

    texts: list[str]
    requests: list[Request] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    sampling: SamplingSpec | None = None
    caps: Caps = field(default_factory=lambda: Caps("raw", 8, 99, 99, 300, False))

    def sync(self, weight_version: int) -> SyncReport:
        self.calls.append(f"sync {weight_version}")
        return SyncReport(weight_version, 0, 0, 0.0)

    def release(self) -> None:
        self.calls.append("release")

    def close(self) -> None: ...

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSpec, on_finish: OnFinish | None = None
    ) -> list[Response]:
        self.requests = list(requests)
        self.sampling = sampling
        self.calls.append("generate")
        responses = []
        for request in requests:
            ids = (*map(ord, self.texts[request.request_id]), EOS)
            responses.append(Response(request.request_id, ids, torch.full((len(ids),), -0.5), "eos"))
        for response in reversed(responses):
            if on_finish is not None:
                on_finish(response)
        return responses


@dataclass
class Scores:
    """A judge that reads the price out of the dialogue; a negative price makes it fail."""

    asked: list[JudgeRequest] = field(default_factory=list)

    def submit(self, request: JudgeRequest) -> Future[Verdict]:
        self.asked.append(request)
        price = float(request.dialogue.rsplit("Deal at ", 1)[1].split('"')[0].rstrip("."))
        future: Future[Verdict] = Future()
        if price < 0:
            future.set_exception(JudgeError("timeout", "no answer"))
        else:
            future.set_result(Verdict(price, 3.0))
        return future


@dataclass
class Recorder:
    """A policy that keeps its batch."""

    batch: TrainBatch | None = None
    updates_once: bool = True
    passes: int = 0

    def logprobs(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return torch.full((tokens_BT.size(0), tokens_BT.size(1) - 1), -0.75)

    def reference_logprobs(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        return torch.full((tokens_BT.size(0), tokens_BT.size(1) - 1), -1.0)

    def update(self, batch: TrainBatch) -> Updated:
        self.batch = batch
        own_BT = torch.full(batch.mask_BT.shape, -0.75)
        return Updated({"policy/loss": 1.0}, own_BT if batch.old_logprobs_BT is None else batch.old_logprobs_BT)


def run(
    texts: list[str],
    ranks: OneProcess = ALONE,
    algorithm: AlgorithmConfig = PRESETS["ampo"],
    judge: Scores | None = None,
    updates_once: bool = True,
    **rollout: Any,
) -> tuple[StepResult, Recorder, Script, Scores]:
    engine, judge, policy = Script(texts), judge or Scores(), Recorder(updates_once=updates_once)
    parts = Parts(
        engine=engine,
        judge=judge,
        tokenizer=Characters(),
        ranks=ranks,
        rollout=RolloutConfig(prompts_per_step=2, group_size=len(texts) // 2, **rollout),
        reward=RewardConfig(),
        algorithm=algorithm,
        stop_token_ids=(EOS,),
        pad_id=7,
        seed=1,
    )
    prompts = [Prompt(turn("Ann"), (50, 51)), Prompt(turn("Cy"), (60,))]
    return ampo_step(3, prompts, policy, parts), policy, engine, judge


def test_rewards_and_advantages_by_hand() -> None:
    """State 4. Judged 10: gain 6 of 6, reward 1. Judged 4: no change, reward 0.5. A broken reply gets -2."""
    result, policy, _, _ = run([GOOD.format(10), GOOD.format(4), GOOD.format(10), BAD])
    assert [s.parts.reward for s in result.samples] == [1.0, 0.5, 1.0, -2.0]
    # Group of two: (r - mean) / std = +-0.7071 whatever the rewards are.
    assert result.advantages == pytest.approx([0.70710, -0.70710, 0.70710, -0.70710], abs=1e-4)
    assert policy.batch is not None
    for row_T, advantage in zip(policy.batch.advantages_BT, result.advantages, strict=True):
        assert row_T.tolist() == pytest.approx([advantage] * len(row_T))


def test_batch_lines_up_tokens_mask_and_log_probs() -> None:
    _, policy, _, _ = run([GOOD.format(10), GOOD.format(4), GOOD.format(10), BAD])
    batch = policy.batch
    assert batch is not None
    row = batch.tokens_BT[3]
    assert row[:1].tolist() == [60]
    reply = [*map(ord, BAD), EOS]
    assert row[1 : 1 + len(reply)].tolist() == reply
    assert set(row[1 + len(reply) :].tolist()) == {7}
    assert batch.tokens_BT[:, 1:][3][batch.mask_BT[3]].tolist() == reply
    assert set(batch.sampling_logprobs_BT[3][batch.mask_BT[3]].tolist()) == {-0.5}
    assert set(batch.sampling_logprobs_BT[3][~batch.mask_BT[3]].tolist()) == {0.0}
    assert batch.tokens_BT.size(1) % 8 == 0


def test_engine_gap_is_the_mean_difference() -> None:
    result, _, _, _ = run([GOOD.format(10)] * 4)
    assert result.metrics["engine/logprob_gap"] == pytest.approx(0.25)


def test_broken_replies_are_not_judged_and_the_judge_reads_the_whole_dialogue() -> None:
    _, _, _, judge = run([GOOD.format(10), BAD, BAD, BAD])
    assert [r.dialogue for r in judge.asked] == ['Turn 0: Ann said: "Deal at 10."']


def test_a_failed_judge_is_a_missing_value() -> None:
    """It leaves its group: the two others are compared with each other alone, and it gets advantage 0."""
    result, _, _, _ = run([GOOD.format(10), GOOD.format(-1), GOOD.format(4), BAD, BAD, GOOD.format(4)])
    first = result.advantages[:3]
    assert first == pytest.approx([0.70710, 0.0, -0.70710], abs=1e-4)
    assert result.samples[1].parts.valid is False
    assert result.metrics["judge/failed_timeout"] == 1
    assert result.metrics["judge/failed_fraction"] == pytest.approx(1 / 4)
    assert result.metrics["reward/mean"] == pytest.approx((1 + 0.5 - 2 - 2 + 0.5) / 5)


FAILED_JUDGE = [GOOD.format(10), GOOD.format(-1), GOOD.format(4), BAD, BAD, GOOD.format(4)]


def test_a_failed_judge_is_left_out_of_the_loss() -> None:
    _, policy, _, _ = run(FAILED_JUDGE)
    assert policy.batch is not None
    assert policy.batch.mask_BT.any(1).tolist() == [True, False, True, True, True, True]


def test_the_papers_failed_judge_is_a_reply_worth_nothing() -> None:
    """Rewards 1, 0, 0.5: mean 0.5, standard deviation 0.5."""
    result, policy, _, _ = run(FAILED_JUDGE, algorithm=PRESETS["ampo-paper"])
    assert result.advantages[:3] == pytest.approx([1.0, -1.0, 0.0], abs=1e-5)
    assert policy.batch is not None
    assert policy.batch.mask_BT.any(1).all()


def test_a_decided_group_is_left_out_of_the_loss() -> None:
    """Both replies to the first prompt reach 10; the second prompt's differ."""
    texts = [GOOD.format(10), GOOD.format(10), GOOD.format(10), GOOD.format(4)]
    result, policy, _, _ = run(texts, algorithm=PRESETS["dapo"])
    assert policy.batch is not None
    assert policy.batch.mask_BT.any(1).tolist() == [False, False, True, True]
    assert result.metrics["train/decided_fraction"] == result.metrics["train/sample_fraction"] == 0.5


def test_the_mode_level_can_be_put_on_the_tokens_that_name_the_mode() -> None:
    """Modes 1 and 2 of equal worth: only length tells them apart, and only where the mode is named."""
    longer = "Thinking Level: 2\n<|begin_of_thinking|>\nIntent:\na\n\nStyle:\nb\n\nResponse:\nc\n<|end_of_thinking|>\n"
    texts = [GOOD.format(10), longer + GOOD.format(10).split("\n", 1)[1]] * 2
    rules = replace(PRESETS["ampo-robust"], mode_credit=ModeCredit.mode_tokens)
    _, policy, _, _ = run(texts, algorithm=rules)
    assert policy.batch is not None
    for row, sign in enumerate([1, -1, 1, -1]):
        mask_T, advantage_T = policy.batch.mask_BT[row], policy.batch.advantages_BT[row]
        assert (advantage_T[mask_T][:17] * sign > 0.5).all()  # "Thinking Level: K", one token a character
        assert advantage_T[mask_T][17:].eq(0).all()


def test_the_reference_is_paid_for_in_the_reward() -> None:
    """Old -0.75, reference -1: k1 is 0.25 a token. The longer of two equal replies pays more, so it is the worse one."""
    rules = AlgorithmConfig(advantage="grpo", kl="in_reward", kl_kind="k1")  # type: ignore[arg-type]
    result, _, _, _ = run([GOOD.format(10), GOOD.format("10.00")] * 2, algorithm=rules)
    assert result.advantages[0] > 0 > result.advantages[1]


def test_importance_weights_reach_the_loss() -> None:
    """Trainer -0.75, engine -0.5: every token weighs exp(-0.25)."""
    texts = [GOOD.format(10), GOOD.format(4), GOOD.format(10), BAD]
    plain, _, _, _ = run(texts)
    _, policy, _, _ = run(texts, algorithm=AlgorithmConfig(mismatch="truncate"))  # type: ignore[arg-type]
    assert policy.batch is not None
    for row, advantage in enumerate(plain.advantages):
        weighed_T = policy.batch.advantages_BT[row][policy.batch.mask_BT[row]]
        assert weighed_T.tolist() == pytest.approx([advantage * math.exp(-0.25)] * len(weighed_T))
    assert plain.metrics["mismatch/error"] == pytest.approx(math.exp(0.25))
    assert plain.metrics["mismatch/kl"] == pytest.approx(math.exp(-0.25) - 1 + 0.25)


@pytest.mark.parametrize(
    ("rules", "updates_once", "passes"),
    [
        ({}, True, 0),
        ({}, False, 1),
        ({"mismatch": "truncate"}, True, 1),
        ({"advantage": "grpo", "kl": "in_reward", "kl_kind": "k1"}, True, 1),
    ],
)
def test_a_pass_for_the_old_log_probabilities_is_taken_where_the_update_cannot_give_them(
    rules: dict[str, Any], updates_once: bool, passes: int
) -> None:
    texts = [GOOD.format(10), GOOD.format(4), GOOD.format(10), BAD]
    result, policy, _, _ = run(texts, algorithm=AlgorithmConfig(**rules), updates_once=updates_once)
    assert policy.passes == passes and policy.batch is not None
    assert (policy.batch.old_logprobs_BT is None) == (passes == 0)
    assert result.metrics["engine/logprob_gap"] == pytest.approx(0.25)
    assert result.metrics["mode/entropy"] > 0


def test_a_step_without_a_sample_to_learn_from_takes_no_pass() -> None:
    result, policy, _, _ = run([GOOD.format(10)] * 4, algorithm=PRESETS["dapo"])
    assert policy.passes == 0 and policy.batch is None
    assert result.metrics["train/sample_fraction"] == 0 and "engine/logprob_gap" not in result.metrics


def test_filters_reach_the_engine() -> None:
    _, _, engine, _ = run([BAD] * 4, top_p=0.9, top_k=50)
    assert engine.sampling is not None
    assert (engine.sampling.top_p, engine.sampling.top_k) == (0.9, 50)


def test_mode_and_tag_metrics() -> None:
    result, _, _, _ = run([GOOD.format(10), BAD, GOOD.format(10), BAD])
    assert result.metrics["mode/1/share"] == 0.5
    assert result.metrics["tag/hard/mode/1/share"] == 0.5
    assert result.metrics["format/failed_level"] == 2
    assert result.metrics["mode_term/active_fraction"] == 0


def test_seeds_follow_the_sample_not_the_rank() -> None:
    _, _, engine, _ = run([BAD] * 4)
    whole = engine.requests
    assert len({r.seed for r in whole}) == 4
    shares: list[Request] = []
    for rank in range(2):
        parts = Parts(
            engine=engine,
            judge=Scores(),
            tokenizer=Characters(),
            ranks=OneProcess(data_rank=rank, data_size=2),
            rollout=RolloutConfig(group_size=2),
            reward=RewardConfig(),
            algorithm=AlgorithmConfig(),
            stop_token_ids=(EOS,),
            pad_id=7,
            seed=1,
        )
        mine, _ = expand(3, [Prompt(turn("Ann"), (50, 51)), Prompt(turn("Cy"), (60,))], parts)
        assert len(mine) == 2
        shares += mine
    assert shares == whole


@dataclass
class Slow(Scores):
    """A judge that answers when it is told to."""

    answers: list[tuple[Future[Verdict], Future[Verdict]]] = field(default_factory=list)

    def submit(self, request: JudgeRequest) -> Future[Verdict]:
        self.answers.append((Future(), super().submit(request)))
        return self.answers[-1][0]

    def answer(self) -> None:
        for promised, known in self.answers:
            promised.set_result(known.result())


@pytest.mark.timeout(60)
def test_the_judge_reads_while_the_passes_that_need_no_verdict_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, pass_alone = Slow(), Recorder.reference_logprobs

    def reference_logprobs(self: Recorder, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        judge.answer()
        judge.answers = []
        return pass_alone(self, tokens_BT, mask_BT)

    monkeypatch.setattr(Recorder, "reference_logprobs", reference_logprobs)
    texts = [GOOD.format(10), GOOD.format(4), GOOD.format(10), BAD]
    late = run(texts, judge=judge)[0]
    assert late.advantages == run(texts, judge=Scores())[0].advantages


def test_only_the_leader_asks_the_judge() -> None:
    with pytest.raises(TypeError):  # nobody shared verdicts with this rank: OneProcess.share gives back its own None
        run([GOOD.format(10)] * 4, OneProcess(is_leader=False))


def test_the_engine_gets_the_weights_first_and_gives_its_memory_back() -> None:
    _, _, engine, _ = run([GOOD.format(i) for i in range(4)])
    assert engine.calls == ["sync 3", "generate", "release"]


def test_a_wrong_engine_stops_the_step_before_a_rollout_is_drawn() -> None:
    engine = Script([BAD], caps=Caps("raw", 8, 99, 99, 300, own_weights=True))
    judge, policy = Scores(), Recorder()
    parts = Parts(
        engine=engine,
        judge=judge,
        tokenizer=Characters(),
        ranks=ALONE,
        rollout=RolloutConfig(prompts_per_step=1, group_size=2),
        reward=RewardConfig(),
        algorithm=AlgorithmConfig(),
        stop_token_ids=(EOS,),
        pad_id=7,
        seed=1,
        probe=Probe(((50, 51),), new_tokens=4, max_gap=0.1, stop_token_ids=(EOS,), pad_id=7),
    )
    with pytest.raises(ProbeError, match=r"differ from the trainer's by 0\.2500"):
        ampo_step(3, [Prompt(turn("Ann"), (50, 51))], policy, parts)
    assert engine.calls == ["sync 3", "generate", "release"], "the one call is the probe's"
    assert engine.requests == [Request(0, (50, 51), 0)]
    assert judge.asked == [] and policy.batch is None
