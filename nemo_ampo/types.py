"""Records that one stage hands to the next, and what a step asks of a policy and a tokenizer.

All records are frozen; absent is ``None``, never a value in the score range. Legend: B samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

from nemo_ampo.speech import spoken

Seat = Literal["agent1", "agent2"]
ALL_TAGS = "all"
"""Stands for all rows where numbers are split by their labels, so that no row may be labelled so."""


@dataclass(frozen=True)
class Reply:
    """A reply that obeys the grammar.

    Attributes:
        mode: 1..4.
        answer: the spoken words, quotation marks included.
        thinking: section name to text; empty for mode 1.
    """

    mode: int
    answer: str
    thinking: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DialogueTurn:
    """One prompt of the RL data: a dialogue whose last line waits for the next utterance.

    Attributes:
        row_id: unique within its file, used to derive sampling seeds and to name the row in errors.
        dialog: lines ``Turn k: NAME said: "..."``; the last one is open (``Turn k: NAME said:``).
        turn: k of the open line; agent1 speaks on even turns.
        instruction: the full user message shown to the policy.
        agent1_name, agent2_name, agent1_goal, agent2_goal: shown to the judge.
        agent1_state, agent2_state: judged goal achievement before this utterance, 0..10.
        env_id, rollout: where the dialogue came from.
        system: system prompt, or None when the stage's own applies.
        tag: free label used to split reports (the embedded world writes ``easy`` and ``hard``).
    """

    row_id: str
    dialog: tuple[str, ...]
    turn: int
    instruction: str
    agent1_name: str
    agent2_name: str
    agent1_goal: str
    agent2_goal: str
    agent1_state: float
    agent2_state: float
    env_id: int = 0
    rollout: int = 0
    system: str | None = None
    tag: str | None = None

    @property
    def seat(self) -> Seat:
        """Whose turn it is to speak."""
        return "agent1" if self.turn % 2 == 0 else "agent2"

    @property
    def state(self) -> float:
        """The speaker's goal achievement before the utterance, 0..10."""
        return self.agent1_state if self.seat == "agent1" else self.agent2_state

    def dialogue_with(self, answer: str) -> str:
        """The dialogue as the judge reads it: the open line completed with ``answer``, blank line between turns."""
        return "\n".join((*self.dialog[:-1], f"{self.dialog[-1]} {spoken(answer)}\n")).strip()


@dataclass(frozen=True)
class JudgeRequest:
    """What the judge is asked about: one dialogue and the private goals of both speakers."""

    dialogue: str
    agent1_name: str
    agent2_name: str
    agent1_goal: str
    agent2_goal: str

    @classmethod
    def about(cls, turn: DialogueTurn, answer: str) -> JudgeRequest:
        """The question about one answer to a turn."""
        return cls(
            dialogue=turn.dialogue_with(answer),
            agent1_name=turn.agent1_name,
            agent2_name=turn.agent2_name,
            agent1_goal=turn.agent1_goal,
            agent2_goal=turn.agent2_goal,
        )


@dataclass(frozen=True)
class Verdict:
    """Goal achievement of both agents, 0 (nothing) .. 10 (complete).

    Attributes:
        agent1, agent2: scores.
        agent1_reasoning, agent2_reasoning: the judge's words, for the run log.
    """

    agent1: float
    agent2: float
    agent1_reasoning: str = ""
    agent2_reasoning: str = ""

    def of(self, seat: Seat) -> float:
        """The score of one seat."""
        return self.agent1 if seat == "agent1" else self.agent2


@dataclass(frozen=True)
class RewardParts:
    """A reward and what it was made of.

    Attributes:
        reward: in [0, 1], or the penalty of a format failure; None when the judge failed.
        goal: goal component in [0, 1], 0.5 means no change; None without a verdict.
        length: answer-length component in [0, 1]; None when there is no answer.
        mode: 1..4, 0 when the reply breaks the grammar.
        valid: False when the judge failed, so that the sample takes part in no statistic.
        format_rule: the rule a bad reply breaks first, None for a good one.
    """

    reward: float | None
    goal: float | None
    length: float | None
    mode: int
    valid: bool
    format_rule: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A dialogue turn and the exact tokens the policy is shown for it."""

    turn: DialogueTurn
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ScoredReply:
    """One reply to a dialogue turn, judged and rewarded.

    Attributes:
        row_id: of the dialogue turn.
        dialogue: what was said before, and the open line.
        tag: the turn's label, for reports.
        text: decoded without special tokens.
        num_tokens: of the reply, the stop token included.
        answer_tokens: of the spoken answer with its quotes, 0 without one.
        parts: reward and what it was made of.
        verdict: None when the judge was not asked or failed.
        judge_error: kind of the judge's failure.
    """

    row_id: str
    dialogue: str
    tag: str | None
    text: str
    num_tokens: int
    answer_tokens: int
    parts: RewardParts
    verdict: Verdict | None = None
    judge_error: str | None = None

    def row(self) -> dict[str, Any]:
        """As written to ``rollouts.jsonl`` and to the result of an evaluation: flat, without the judge's words."""
        row = asdict(self)
        parts, verdict = row.pop("parts"), row.pop("verdict") or {}
        return row | parts | {f"{seat}_score": verdict.get(seat) for seat in ("agent1", "agent2")}


@dataclass(frozen=True, kw_only=True)
class Sample(ScoredReply):
    """One response of one prompt of a step. Small enough to be gathered from every replica.

    Attributes:
        group: index of the prompt within the step.
        turn: index of the turn in its dialogue, 0 is the opening.
        finish: why the engine stopped.
        mode_tokens: first and last-plus-one of the response tokens that name the mode; equal when none does.
        judge_latency_s: from submission to verdict, seconds.
    """

    group: int
    turn: int
    finish: str
    mode_tokens: tuple[int, int] = (0, 0)
    judge_latency_s: float | None = None


@dataclass(frozen=True)
class TrainBatch:
    """What the policy is updated on: this replica's own samples and nobody else's.

    Attributes:
        tokens_BT: prompt, response, padding.
        mask_BT: True on the response tokens that count in the loss, lined up with log-probabilities [B, T-1]; False
            throughout a sample that is left out, so that it enters no mean.
        advantages_BT: of each token, importance weight included, [B, T-1].
        old_logprobs_BT: of the policy before the update, [B, T-1]; None where the update's own first pass has them.
        ref_logprobs_BT: of the reference policy, [B, T-1].
        sampling_logprobs_BT: of the engine, [B, T-1].
    """

    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor
    advantages_BT: torch.Tensor
    old_logprobs_BT: torch.Tensor | None
    ref_logprobs_BT: torch.Tensor
    sampling_logprobs_BT: torch.Tensor


@dataclass(frozen=True)
class Updated:
    """What an update did.

    Attributes:
        metrics: ``policy/...``.
        logprobs_BT: of the tokens in the mask under the weights before it, [B, T-1]; None when there was no update and
            nobody asked for them.
    """

    metrics: dict[str, float]
    logprobs_BT: torch.Tensor | None


class Policy(Protocol):
    """The model being trained, as one step sees it."""

    @property
    def updates_once(self) -> bool:
        """Whether :meth:`update` takes all rows in one optimizer step: its forward pass is then that of the old weights."""
        ...

    def logprobs(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Log-probability of each next token under the current weights, [B, T-1].

        Args:
            tokens_BT: right-padded ids.
            mask_BT: True at the tokens of ``tokens_BT[:, 1:]`` that are asked for; what is answered elsewhere means nothing.
        """
        ...

    def reference_logprobs(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """The same under the frozen reference weights."""
        ...

    def update(self, batch: TrainBatch) -> Updated:
        """Optimise on the batch."""
        ...


class Tokenizer(Protocol):
    """The two calls a step makes on a transformers tokenizer."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str:
        """Text of the tokens."""
        ...

    def tokenize(self, text: str) -> list[str]:
        """Tokens of the text, no special ones added."""
        ...
