"""The scenes of the embedded world: who speaks to whom, what each side knows, and what the right words are.

Two kinds. In an *easy* scene (thanks, an invitation) the right reply repeats words that stand in the prompt. In a *hard*
scene (a price, an hour, a share, a budget) each side holds four small numbers that make its limit, the speaker's in its
own goal and the partner's in what the partner has just said, and the right reply names the number that follows from
both limits. Every single step is an addition or subtraction of 1 to 3, yet the answer never stands in the prompt and
depends on all eight numbers. All texts live here once; :mod:`nemo_ampo.world.rules` reads them back with the same
templates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

from nemo_ampo.types import Seat

Tag = Literal["easy", "hard"]
Numbers = tuple[int, int, int, int]
T = TypeVar("T")

NAMES = (
    *("Ada", "Ben", "Dan", "Eva", "Finn", "Gia", "Ines", "Jon", "Kim", "Leo"),
    *("Mia", "Nick", "Paul", "Rosa", "Sam", "Tina", "Uma", "Vera", "Will", "Zoe"),
)

_HELDOUT_OF_256 = 32
"""How many of 256 hash values belong to held-out scenes: one content in eight."""


@dataclass(frozen=True)
class EasyFamily:
    """A social act whose right words stand in the prompt.

    Texts may use ``{me}`` (who speaks next), ``{you}`` (the partner) and ``{topic}``.

    Attributes:
        name: label of the family.
        setting: the scene, one sentence.
        goal, partner_goal: private goals of the speaker and of the partner.
        heard: what the partner has said about the matter; empty if nothing.
        reply: the right words.
        act: words without which a reply is not this act.
        topics: what ``{topic}`` can be; empty for an act without one.
        intent, style: what the deeper modes write under these headings.
    """

    name: str
    setting: str
    goal: str
    partner_goal: str
    heard: str
    reply: str
    act: str
    topics: tuple[str, ...]
    intent: str
    style: str


@dataclass(frozen=True)
class Side:
    """What one side of a hard scene knows: four numbers that make a limit.

    Attributes:
        words: the numbers in words, said of "You" in a goal and of "I" aloud.
        sign: the limit is a + b + c + d (+1) or a - b - c - d (-1).
        first: inclusive range of a.
        accepts: which answers the side can live with: ``at least`` its limit, ``at most`` its limit, or ``near`` (one
            beside) the right one.
    """

    words: str
    sign: Literal[1, -1]
    first: tuple[int, int]
    accepts: Literal["at least", "at most", "near"]

    def limit(self, numbers: Numbers) -> int:
        """The number that this side's four numbers make."""
        return numbers[0] + self.sign * sum(numbers[1:])

    def fits(self, answer: int, numbers: Numbers, right: int) -> bool:
        """Whether the side can live with ``answer`` where ``right`` is the right one."""
        if self.accepts == "near":
            return abs(answer - right) <= 1
        return answer >= self.limit(numbers) if self.accepts == "at least" else answer <= self.limit(numbers)

    def say(self, numbers: Numbers) -> str:
        """The numbers in words."""
        return self.words.format(*numbers)


@dataclass(frozen=True)
class HardFamily:
    """A matter that both sides' numbers decide.

    Attributes:
        name: label of the family.
        setting: the scene, one sentence; ``{first}`` and ``{second}`` take the two sides.
        aim: what both want, the first sentence of both goals.
        sides: what the first and the second side know.
        rule: which number of two limits is the right one, in the words the deeper modes use.
        reply: the right words around the number.
        goal, intent, style: what the deeper modes write under these headings.
    """

    name: str
    setting: str
    aim: str
    sides: tuple[Side, Side]
    rule: Literal["middle", "later", "less"]
    reply: str
    goal: str
    intent: str
    style: str

    def right_answer(self, first: Numbers, second: Numbers) -> int:
        """The number that follows from both sides' numbers."""
        limits = self.sides[0].limit(first), self.sides[1].limit(second)
        decide: dict[str, Callable[[int, int], int]] = {
            "middle": lambda x, y: (x + y) // 2,
            "later": max,
            "less": min,
        }
        return decide[self.rule](*limits)

    def goal_of(self, side: int, numbers: Numbers) -> str:
        """The private goal of the first (0) or second (1) side."""
        return f"{self.aim} You {self.sides[side].say(numbers)}."

    def is_puzzle(self, first: Numbers, second: Numbers) -> bool:
        """Whether these numbers make a fair puzzle: one whole right answer that stands nowhere in the prompt."""
        x, y = self.sides[0].limit(first), self.sides[1].limit(second)
        if self.right_answer(first, second) in first + second:
            return False
        if self.rule != "middle":
            return abs(y - x) >= 3
        can_agree = y > x or self.sides[1].accepts != "at most"
        return can_agree and abs(y - x) in (2, 4, 6)


Family = EasyFamily | HardFamily

_PRESENTS = ("cake", "card", "dinner", "letter", "music", "song", "story", "trip")
_FEATS = ("concert", "exam", "film", "game", "music", "race", "song", "story")
_EVENTS = ("concert", "dinner", "film", "game", "party", "picnic", "race", "trip")

EASY = (
    EasyFamily(
        name="greet",
        setting="{me} meets {you}.",
        goal="Greet {you}.",
        partner_goal="Be greeted by {me}.",
        heard="",
        reply="Hello {you}, good to see you.",
        act="hello",
        topics=(),
        intent="greet",
        style="warm",
    ),
    EasyFamily(
        name="thank",
        setting="{you} helped {me}.",
        goal="Thank {you} for the {topic}.",
        partner_goal="Hear thanks from {me} for the {topic}.",
        heard="",
        reply="Thank you {you} for the {topic}.",
        act="thank you",
        topics=_PRESENTS,
        intent="give thanks",
        style="warm",
    ),
    EasyFamily(
        name="praise",
        setting="{you} has good news.",
        goal="Praise {you} for the good news.",
        partner_goal="Hear praise from {me} for the {topic}.",
        heard="I did well in the {topic}.",
        reply="Well done {you}, what a great {topic}.",
        act="well done",
        topics=_FEATS,
        intent="give praise",
        style="happy",
    ),
    EasyFamily(
        name="sorry",
        setting="{me} let {you} down.",
        goal="Tell {you} that you are sorry.",
        partner_goal="Hear that {me} is sorry for the {topic}.",
        heard="You missed the {topic}.",
        reply="I am sorry {you} that I missed the {topic}.",
        act="sorry",
        topics=_EVENTS,
        intent="say sorry",
        style="humble",
    ),
    EasyFamily(
        name="invite",
        setting="{me} plans a {topic}.",
        goal="Invite {you} to the {topic}.",
        partner_goal="Be asked by {me} to the {topic}.",
        heard="",
        reply="Dear {you}, please come to the {topic}.",
        act="come to",
        topics=_EVENTS,
        intent="invite",
        style="warm",
    ),
)

TOPICS = tuple(sorted({topic for family in EASY for topic in family.topics}))

_PAYS = Side("paid {}, {}, {} and {}", 1, (2, 9), "near")
_OWES = Side("have {} and owe {}, {} and {}", -1, (14, 24), "at most")
_COMES = Side("finish at {} and need {}, {} and {} hours", 1, (2, 9), "at least")

HARD = (
    HardFamily(
        name="price",
        setting="{first} sells {second} a lamp.",
        aim="Agree on the middle price.",
        sides=(
            Side("paid {}, {} and {} and want {} more", 1, (2, 9), "at least"),
            Side("have {} and keep {}, {} and {}", -1, (14, 24), "at most"),
        ),
        rule="middle",
        reply="Let us agree on {} coins.",
        goal="middle price",
        intent="make an offer",
        style="fair",
    ),
    HardFamily(
        name="meet",
        setting="{first} and {second} plan to meet.",
        aim="Meet as early as both can.",
        sides=(_COMES, _COMES),
        rule="later",
        reply="Let us meet at {}.",
        goal="early meeting",
        intent="name a time",
        style="clear",
    ),
    HardFamily(
        name="share",
        setting="{first} and {second} share the costs.",
        aim="Share the costs evenly.",
        sides=(_PAYS, _PAYS),
        rule="middle",
        reply="Then each of us pays {}.",
        goal="even shares",
        intent="settle the costs",
        style="fair",
    ),
    HardFamily(
        name="gift",
        setting="{first} and {second} choose a gift.",
        aim="Spend as much as both can.",
        sides=(_OWES, _OWES),
        rule="less",
        reply="We can both spend {}.",
        goal="good gift",
        intent="name a sum",
        style="warm",
    ),
)


@dataclass(frozen=True)
class Scene:
    """One situation that waits for one utterance.

    Attributes:
        family: what it is about.
        me, you: who speaks next, and the partner.
        seat: of ``me``.
        setting: the scene, one sentence.
        goal, partner_goal: private goals of ``me`` and of ``you``.
        spoken: (name, words) of the utterances so far.
        right_words: the right reply, without quotation marks.
        topic: of an easy scene, empty if it has none.
        side: of ``me`` in a hard scene, 0 or 1.
        mine, theirs: numbers of ``me`` and of ``you`` in a hard scene, else None.
    """

    family: Family
    me: str
    you: str
    seat: Seat
    setting: str
    goal: str
    partner_goal: str
    spoken: tuple[tuple[str, str], ...]
    right_words: str
    topic: str = ""
    side: int = 0
    mine: Numbers | None = None
    theirs: Numbers | None = None

    @property
    def tag(self) -> Tag:
        """Which part of the reports the scene counts for."""
        return "easy" if isinstance(self.family, EasyFamily) else "hard"

    @property
    def dialog(self) -> list[str]:
        """Lines so far, and the open line of who speaks next."""
        closed = [f'Turn {turn}: {name} said: "{words}"\n' for turn, (name, words) in enumerate(self.spoken)]
        return [*closed, f"Turn {len(self.spoken)}: {self.me} said:"]

    @property
    def instruction(self) -> str:
        """The user message of the policy: role, setting, goals as ``me`` knows them, dialogue."""
        return f"You are {self.me}. {self.setting}\nGoal: {self.goal}\nGoal of {self.you}: Unknown\n" + "\n".join(
            self.dialog
        )


def draw_scene(rng: Random, heldout: bool) -> Scene:
    """A random scene: easy or hard with equal chance, then a family, then its content.

    Args:
        rng: source of all randomness; equal states give equal scenes on every Python version.
        heldout: draw from the contents kept for held-out rows, or from all others. The content of a hard scene is its
            eight numbers, that of an easy one partner and topic (partner and speaker where there is no topic).
    """
    kinds: tuple[Sequence[Family], ...] = (EASY, HARD)
    family = _pick(rng, _pick(rng, kinds))
    while True:
        scene, content = _draw_easy(rng, family) if isinstance(family, EasyFamily) else _draw_hard(rng, family)
        if _is_heldout(f"{family.name} {content}") == heldout:
            return scene


def _pick(rng: Random, items: Sequence[T]) -> T:
    # Only random() promises the same sequence in every Python version.
    return items[int(rng.random() * len(items))]


def _is_heldout(content: str) -> bool:
    return hashlib.sha256(content.encode()).digest()[0] < _HELDOUT_OF_256


def _draw_people(rng: Random) -> tuple[str, str, Seat]:
    me = _pick(rng, NAMES)
    you = _pick(rng, [name for name in NAMES if name != me])
    seats: tuple[Seat, Seat] = ("agent1", "agent2")
    return me, you, _pick(rng, seats)


def _spoken(me: str, you: str, seat: Seat, heard: str) -> tuple[tuple[str, str], ...]:
    """What was said before: ``heard``, and a greeting where the turn order needs another utterance."""
    if heard:
        return ((you, heard),) if seat == "agent2" else ((me, f"Hello {you}."), (you, heard))
    return () if seat == "agent1" else ((you, f"Hello {me}."),)


def _draw_easy(rng: Random, family: EasyFamily) -> tuple[Scene, str]:
    me, you, seat = _draw_people(rng)
    topic = _pick(rng, family.topics) if family.topics else ""

    def fill(text: str) -> str:
        return text.format(me=me, you=you, topic=topic)

    scene = Scene(
        family=family,
        me=me,
        you=you,
        seat=seat,
        setting=fill(family.setting),
        goal=fill(family.goal),
        partner_goal=fill(family.partner_goal),
        spoken=_spoken(me, you, seat, fill(family.heard)),
        right_words=fill(family.reply),
        topic=topic,
    )
    return scene, f"{you} {topic or me}"


def _draw_numbers(rng: Random, side: Side) -> Numbers:
    low, high = side.first
    return _pick(rng, range(low, high + 1)), _pick(rng, (1, 2, 3)), _pick(rng, (1, 2, 3)), _pick(rng, (1, 2, 3))


def _draw_hard(rng: Random, family: HardFamily) -> tuple[Scene, str]:
    me, you, seat = _draw_people(rng)
    side = _pick(rng, (0, 1))
    numbers = _draw_numbers(rng, family.sides[0]), _draw_numbers(rng, family.sides[1])
    while not family.is_puzzle(*numbers):
        numbers = _draw_numbers(rng, family.sides[0]), _draw_numbers(rng, family.sides[1])
    mine, theirs = numbers[side], numbers[1 - side]
    first, second = (me, you) if side == 0 else (you, me)
    scene = Scene(
        family=family,
        me=me,
        you=you,
        seat=seat,
        setting=family.setting.format(first=first, second=second),
        goal=family.goal_of(side, mine),
        partner_goal=family.goal_of(1 - side, theirs),
        spoken=_spoken(me, you, seat, f"I {family.sides[1 - side].say(theirs)}."),
        right_words=family.reply.format(family.right_answer(*numbers)),
        side=side,
        mine=mine,
        theirs=theirs,
    )
    # Where both sides are alike, swapping them (and the speaker's side) gives the very same prompt.
    return scene, f"{sorted(numbers)}"
