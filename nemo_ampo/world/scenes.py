"""The scenes of the embedded world: who speaks to whom, what each side knows, and what should be said.

Two kinds. In an *easy* scene (a thank-you, an invitation) the right reply repeats words that stand in the prompt. In a
*hard* scene both sides hold two small numbers, the speaker's in its own goal and the partner's in what the partner has just
said; each pair makes a limit, and the right reply names the one number that follows from both limits. Every single step is
trivial, but no number in the prompt is the answer and the answer depends on all four. Texts live here once:
:mod:`nemo_ampo.world.rules` reads them back with the same templates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tag = Literal["easy", "hard"]

NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ines", "Jon", "Kim", "Leo",
    "Mia", "Nick", "Olga", "Paul", "Rosa", "Sam", "Tina", "Uma", "Vera", "Will", "Yara", "Zoe",
)  # fmt: skip
TOPICS = (
    "cake", "card", "concert", "dinner", "exam", "film", "game", "garden", "letter", "music",
    "party", "picnic", "race", "song", "story", "trip",
)  # fmt: skip


@dataclass(frozen=True)
class EasyFamily:
    """A social act whose right words stand in the prompt.

    Attributes:
        name: label of the family.
        setting: the scene in one sentence; ``{me}`` speaks, ``{you}`` listens.
        goal, partner_goal: private goals of the speaker and of the listener.
        heard: what the listener has just said, or None when the speaker opens the dialogue.
        reply: the right reply.
        act: the word without which a reply is not this act.
        intent, style: what the deeper modes write under these headings.
    """

    name: str
    setting: str
    goal: str
    partner_goal: str
    heard: str | None
    reply: str
    act: str
    intent: str
    style: str

    @property
    def tag(self) -> Tag:
        """Which half of the reports this family counts for."""
        return "easy"


@dataclass(frozen=True)
class Side:
    """What one side of a hard scene knows: two numbers that make a limit.

    Attributes:
        words: the numbers in words, said of ``You`` in a goal and of ``I`` aloud.
        sign: the limit is ``a + b`` (+1) or ``a - b`` (-1).
        a_range, b_range: inclusive ranges of the two numbers.
    """

    words: str
    sign: Literal[1, -1]
    a_range: tuple[int, int]
    b_range: tuple[int, int]

    def limit(self, a: int, b: int) -> int:
        """The number this side's two numbers make."""
        return a + self.sign * b

    def pairs(self) -> list[tuple[int, int]]:
        """All number pairs of this side."""
        (a0, a1), (b0, b1) = self.a_range, self.b_range
        return [(a, b) for a in range(a0, a1 + 1) for b in range(b0, b1 + 1)]
