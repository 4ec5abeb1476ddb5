"""What a character is told: the context as far as it may be seen, the instructions, and the dialogue so far.

SOTOPIA lets characters know each other as well as their relationship says, and keeps goals and secrets
private. The authors' code instead removes the viewer tags and shows everybody everything but the partner's
goal. :data:`View` chooses: ``"sotopia"`` hides what the relationship hides; ``"reference"`` repeats the
authors' view, with which the paper's numbers were made. A number means nothing without the view it was made
with. The names stand above the backgrounds and in front of the utterances in either view, also between
strangers.

The wording lives in ``nemo_ampo/prompts/sotopia/*.txt``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from nemo_ampo.dialogue.scenarios import SEATS, TAG, VIEWER, AgentProfile, Relationship, Scenario
from nemo_ampo.errors import ConfigError
from nemo_ampo.prompts import PromptTemplate, load_prompt
from nemo_ampo.speech import spoken
from nemo_ampo.types import Seat

View = Literal["sotopia", "reference"]
Viewer = Literal["agent1", "agent2", "environment"]
"""Who reads. ``environment`` is the judge: it sees everything in either view."""

UNKNOWN = "Unknown"
"""Stands for a goal or background the viewer may not see."""

_VIEWER_TAGS: dict[str, Viewer] = {"agent_0": "agent1", "agent_1": "agent2", "environment": "environment"}


@dataclass(frozen=True)
class PromptTexts:
    """The wording, one file per text; :data:`PLACEHOLDERS` says what each must hold.

    Attributes:
        role: who the character is and how to act.
        context: what the character knows, both backgrounds and goals included.
        notice: turn number, how to leave, how to answer.
        bio_name, bio_public, bio_private, bio_secret: parts of a background, from best to least known.
    """

    role: PromptTemplate
    context: PromptTemplate
    notice: PromptTemplate
    bio_name: PromptTemplate
    bio_public: PromptTemplate
    bio_private: PromptTemplate
    bio_secret: PromptTemplate


PLACEHOLDERS: dict[str, frozenset[str]] = {
    "role": frozenset({"name"}),
    "context": frozenset({"scenario", *(f"{s}_{part}" for s in SEATS for part in ("name", "background", "goal"))}),
    "notice": frozenset({"turn"}),
    "bio_name": frozenset({"name"}),
    "bio_public": frozenset({"name", "age", "gender", "occupation", "pronouns", "public_info"}),
    "bio_private": frozenset({"personality_and_values"}),
    "bio_secret": frozenset({"secret"}),
}

OWN_TEXTS = Path(__file__).parent.with_name("prompts") / "sotopia"


@cache
def load_texts(folder: Path = OWN_TEXTS) -> PromptTexts:
    """Read the wording from ``role.txt``, ``context.txt``, ... in ``folder``; the project's own by default.

    Raises:
        ConfigError: a file is missing, or its placeholders are not the ones it must hold.
    """
    templates = {field.name: load_prompt(folder / f"{field.name}.txt") for field in fields(PromptTexts)}
    for name, template in templates.items():
        template.require(PLACEHOLDERS[name])
    return PromptTexts(**templates)


def check_view(view: str) -> None:
    """Refuse a misspelt view.

    Raises:
        ConfigError: naming the known ones.
    """
    if view not in get_args(View):
        raise ConfigError(f"view: expected one of {', '.join(get_args(View))}, got {view!r}")


def visible_text(text: str, viewer: Viewer, view: View = "sotopia") -> str:
    """A scenario or goal text without its tags and without what is marked for other viewers.

    >>> visible_text('They meet. <p viewer="environment">Both know Kim.</p>', "agent1")
    'They meet.'
    """
    kept: list[str] = []
    shown = [True]  # one entry per open tag
    end = 0
    for tag in TAG.finditer(text):
        kept += [text[end : tag.start()]] if shown[-1] else []
        end = tag.end()
        if tag["close"]:
            shown.pop()
            continue
        marked = VIEWER.fullmatch(tag["attributes"])
        everything = view == "reference" or viewer == "environment"
        shown.append(shown[-1] and (everything or marked is None or _VIEWER_TAGS[marked[1]] == viewer))
    return _tidy("".join([*kept, text[end:]]))


def background(agent: AgentProfile, relationship: Relationship | None, texts: PromptTexts) -> str:
    """A character's background as known from that relationship; ``None``: all of it, secret included."""
    if relationship is None:
        parts = [texts.bio_public, texts.bio_private, texts.bio_secret]
    elif relationship >= Relationship.FRIEND:
        parts = [texts.bio_public, texts.bio_private]
    elif relationship == Relationship.ACQUAINTANCE:
        parts = [texts.bio_public]
    elif relationship == Relationship.KNOW_BY_NAME:
        parts = [texts.bio_name]
    else:
        return UNKNOWN
    values = {
        "name": agent.name,
        "age": str(agent.age),
        "gender": agent.gender_word,
        "occupation": agent.occupation.lower(),
        "pronouns": agent.pronouns,
        "public_info": _sentence(agent.public_info),
        "personality_and_values": _sentence(agent.personality_and_values),
        "secret": _sentence(agent.secret),
    }
    return " ".join(part.render(**{name: values[name] for name in part.placeholders}) for part in parts)


def context_block(scenario: Scenario, viewer: Viewer, view: View = "sotopia", texts: PromptTexts | None = None) -> str:
    """Header, scenario, participants, both backgrounds and both goals, one per line, as ``viewer`` may see
    them.

    Args:
        scenario: the situation and its two characters.
        viewer: a seat, or ``environment`` for everything.
        view: see the module text.
        texts: the wording; the project's own by default.
    """
    check_view(view)
    texts = texts or load_texts()
    values = {"scenario": visible_text(scenario.environment.scenario, viewer, view)}
    for seat in SEATS:
        agent, goal = scenario.agent(seat), scenario.goal(seat)
        sees_all = viewer in (seat, "environment")
        known = None if sees_all or view == "reference" else scenario.environment.relationship
        values[f"{seat}_name"] = agent.name
        values[f"{seat}_background"] = background(agent, known, texts)
        values[f"{seat}_goal"] = visible_text(goal, viewer, view) if sees_all else UNKNOWN
    return _tidy(texts.context.render(**values))


def turn_line(turn: int, name: str, said: str | None = None) -> str:
    r"""One dialogue line: open (``Turn 2: NAME said:``), or spoken (``Turn 2: NAME said: "..."\n``).

    Args:
        turn: counts the utterances of both speakers from 0.
        name: of the speaker.
        said: spoken words; quotation marks around them are replaced by exactly one pair, and what could pose as another
            line or as a control token is made words (:func:`nemo_ampo.speech.spoken`).
    """
    line = f"Turn {turn}: {name} said:"
    return line if said is None else f"{line} {quoted(spoken(said))}\n"


def quoted(said: str) -> str:
    """Words between exactly one pair of quotation marks."""
    return '"' + said.strip('"') + '"'


def agent_instruction(
    scenario: Scenario,
    seat: Seat,
    turn: int,
    dialog: Sequence[str],
    view: View = "sotopia",
    texts: PromptTexts | None = None,
) -> str:
    """The whole user message for the character about to speak: role, context, turn notice, dialogue.

    Args:
        scenario: the situation and its two characters.
        seat: who is about to speak.
        turn: index of the utterance to come.
        dialog: lines of :func:`turn_line`, the last one open.
        view: see the module text.
        texts: the wording; the project's own by default.
    """
    texts = texts or load_texts()
    return instruction_after(instruction_head(scenario, seat, view, texts), turn, dialog, texts)


def instruction_head(scenario: Scenario, seat: Seat, view: View = "sotopia", texts: PromptTexts | None = None) -> str:
    """The part of :func:`agent_instruction` that stays the same for a whole episode: role and context."""
    texts = texts or load_texts()
    role = texts.role.render(name=scenario.agent(seat).name)
    return f"{role}\n\n{context_block(scenario, seat, view, texts)}"


def instruction_after(head: str, turn: int, dialog: Sequence[str], texts: PromptTexts) -> str:
    """The whole user message, from its first part."""
    return f"{head}\n{texts.notice.render(turn=str(turn))}\n" + "\n".join(dialog)


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _tidy(text: str) -> str:
    """No blanks after a line feed, none at the ends."""
    return re.sub(r"\n[ \t]+", "\n", text).strip()
