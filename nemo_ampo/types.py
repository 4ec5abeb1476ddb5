"""Records handed from one stage to the next. All frozen; absent is ``None``, never a value in the score range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nemo_ampo.speech import spoken

Seat = Literal["agent1", "agent2"]


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
