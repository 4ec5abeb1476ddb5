"""A dialogue as it is kept: its utterances, why it stopped, and what tells it from all others."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nemo_ampo.dialogue.scenarios import SEATS
from nemo_ampo.speech import spoken
from nemo_ampo.types import Seat

LEAVING_WORDS = "left the conversation"


class Termination(StrEnum):
    """Why an episode stopped."""

    max_turns = "max_turns"
    """All utterances of the protocol were spoken."""
    left = "left"
    """The last speaker left."""
    silent = "silent"
    """The last reply held nothing that may be spoken (cut-off thinking, nothing at all): counts as leaving."""
    prompt_limit = "prompt_limit"
    """The next prompt would have been too long; nobody spoke."""
    failed = "failed"
    """A speaker's endpoint gave no reply. Not scored; the next run continues from here."""


@dataclass(frozen=True, order=True)
class EpisodeKey:
    """What tells two episodes apart.

    Attributes:
        env_id: index of the pairing in ``env_agent_combos.json``.
        combo_id: its key there.
        seat: where the evaluated policy sits; ``agent1`` in self-play.
        seed: of the run; sampling seeds derive from it.
        model: hash of the evaluated policy, see :func:`nemo_ampo.dialogue.agents.model_hash`.
    """

    env_id: int
    combo_id: str
    seat: Seat
    seed: int
    model: str


@dataclass(frozen=True)
class Turn:
    """One utterance.

    Attributes:
        index: 0..19; both speakers together.
        seat, speaker: who spoke.
        text: the words, without the quotation marks around them; never any grammar.
        raw: what the model wrote.
        reasoning: hidden reasoning that the endpoint sent beside it, None without.
        mode: 1..4; 0 for a speaker that was told to use the modes and broke the grammar; None for any other.
        prompt_tokens, completion_tokens: as the endpoint reports them, hidden reasoning included.
        failed: why ``text`` is not simply the answer of ``raw``: a rule of the grammar (``text`` is then what could
            be saved) or ``silent``; None when all is well.
        finish_reason: as the endpoint reports it; ``length`` means cut off.
        seed: sampling seed of the call.
    """

    index: int
    seat: Seat
    speaker: str
    text: str
    raw: str
    reasoning: str | None = None
    mode: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: str | None = None
    finish_reason: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Episode:
    """One played dialogue.

    Attributes:
        key: see :class:`EpisodeKey`.
        pairing: ``self_play``, ``partner``, ``vs_base`` or ``api``.
        view: ``sotopia`` or ``reference``: what the characters knew of each other.
        environment_id, codename: of the situation; several pairings share one (bootstrap over these).
        relationship: 0 stranger .. 5 family.
        hard: belongs to SOTOPIA-hard.
        agent1_id, agent2_id: keys in ``agents.json``.
        agent1_name, agent2_name: as they stand in the dialogue.
        agent1_goal, agent2_goal: as the speaker saw them.
        turns: in order.
        terminated_by: None while it is not over.
        error: what went wrong, when ``terminated_by`` is ``failed``.
    """

    key: EpisodeKey
    pairing: str
    view: str
    environment_id: str
    codename: str
    relationship: int
    hard: bool
    agent1_id: str
    agent2_id: str
    agent1_name: str
    agent2_name: str
    agent1_goal: str
    agent2_goal: str
    turns: tuple[Turn, ...] = ()
    terminated_by: Termination | None = None
    error: str | None = None

    @property
    def played(self) -> bool:
        """Over, and fit to be scored."""
        return self.terminated_by not in (None, Termination.failed)

    @property
    def partner_seat(self) -> Seat:
        """The seat the policy does not sit in."""
        return SEATS[1 - SEATS.index(self.key.seat)]

    def name(self, seat: Seat) -> str:
        """Of the character in a seat."""
        return self.agent1_name if seat == "agent1" else self.agent2_name

    def goal(self, seat: Seat) -> str:
        """Of the character in a seat."""
        return self.agent1_goal if seat == "agent1" else self.agent2_goal

    def turns_of(self, seat: Seat) -> tuple[Turn, ...]:
        """Utterances of one seat."""
        return tuple(turn for turn in self.turns if turn.seat == seat)

    def dialogue(self) -> str:
        """As the judge reads it: ``Turn k: NAME said: "..."``, a blank line between turns."""
        return "\n\n".join(f'Turn {turn.index}: {turn.speaker} said: "{spoken(turn.text)}"' for turn in self.turns)
