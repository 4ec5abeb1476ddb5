"""What becomes a row: cloning rows of replies in the four modes, RL rows of dialogue prefixes with their standing.

Both come out of dialogues the teacher plays with itself, one situation at a time; a situation whose teacher or
judge fails gives the rows up to there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from nemo_ampo.data.episodes import UNUSED_SCORES
from nemo_ampo.dialogue.config import LeaveRule
from nemo_ampo.dialogue.episode import leaves
from nemo_ampo.dialogue.opening import START_SCORE
from nemo_ampo.dialogue.prompts import turn_line
from nemo_ampo.errors import BudgetError, ChatError
from nemo_ampo.generate.situations import Situation
from nemo_ampo.generate.teacher import Teacher
from nemo_ampo.reply.grammar import parse_reply
from nemo_ampo.reply.modes import MODES
from nemo_ampo.types import JudgeRequest, Verdict


class Scorer(Protocol):
    """The part of :class:`nemo_ampo.judge.client.Judge` that is used."""

    async def score(self, request: JudgeRequest) -> Verdict:
        """Goal achievement of both agents."""
        ...


@dataclass
class Played:
    """Rows of one situation.

    Attributes:
        rows: in order of turns.
        modes: mode of each cloning row.
        failure: kind of the failure that ended the dialogue early, None without.
        stopped: the job had no call or no money left.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    modes: list[int] = field(default_factory=list)
    failure: str | None = None
    stopped: bool = False


async def play_bc(situation: Situation, teacher: Teacher, system: str | None, modes_per_turn: int, seed: int) -> Played:
    """Cloning rows: in each turn, the teacher's reply in ``modes_per_turn`` modes.

    The modes take turns in an order drawn for the situation, so that all four come equally often and at every
    depth of a dialogue. What the first of them said goes on in the dialogue.

    Args:
        situation: where the dialogue starts.
        teacher: writes the replies.
        system: the policy's system prompt, the ``system`` column.
        modes_per_turn: 1..4 rows per turn.
        seed: of the order of modes.
    """
    played, spoken = Played(), list(situation.opening)
    order = Random(f"{seed}/{situation.row_id}/modes").sample(tuple(MODES), len(MODES))
    try:
        while len(spoken) < situation.max_turns:
            turn = len(spoken)
            instruction = situation.instruct(turn, situation.dialog(spoken))
            # A shift of one after every round, so that one speaker does not get only every second mode.
            first = turn * modes_per_turn + turn // len(MODES)
            modes = [order[(first + i) % len(MODES)] for i in range(modes_per_turn)]
            said = ""
            for mode in modes:
                reply = await teacher.reply(instruction, mode, f"{situation.row_id}/{turn}")
                played.rows.append({"system": system, "instruction": instruction, "input": "", "output": reply})
                played.modes.append(mode)
                said = said or parse_reply(reply).answer
            if not _say(spoken, situation, said):
                break
    except ChatError as error:
        played.failure = error.kind
    except BudgetError:
        played.stopped = True
    return played


async def play_rl(situation: Situation, teacher: Teacher, judge: Scorer, system: str | None) -> Played:
    """RL rows: the dialogue before each turn, with the judge's scores of both agents as state.

    Before the first word nothing can be judged; both agents start at
    :data:`~nemo_ampo.dialogue.opening.START_SCORE`. A judge that fails ends the dialogue: no state is made up.
    """
    played, spoken = Played(), list(situation.opening)
    try:
        while len(spoken) < situation.max_turns:
            turn = len(spoken)
            dialog = situation.dialog(spoken)
            verdict = await judge.score(situation.request(spoken)) if spoken else Verdict(START_SCORE, START_SCORE)
            instruction = situation.instruct(turn, dialog)
            played.rows.append(rl_row(situation, dialog, instruction, verdict, system))
            if turn + 1 == situation.max_turns:
                break  # nobody would read what is said now
            said = await teacher.utterance(instruction, f"{situation.row_id}/{turn}")
            if not _say(spoken, situation, said):
                break
    except ChatError as error:
        played.failure = error.kind
    except BudgetError:
        played.stopped = True
    return played


def rl_row(
    situation: Situation, dialog: Sequence[str], instruction: str, verdict: Verdict, system: str | None
) -> dict[str, Any]:
    """One row of the published JSON."""
    turn = len(dialog) - 1
    row: dict[str, Any] = {
        "row_id": f"{situation.row_id}-{turn}",
        "dialog": list(dialog),
        "env_id": situation.env_id,
        "turn": turn,
        "rollout": situation.rollout,
        "instruction": instruction,
        "agent1_name": situation.names[0],
        "agent2_name": situation.names[1],
        "agent1_goal": situation.goals[0],
        "agent2_goal": situation.goals[1],
        "state": {"agent1": {"score": verdict.agent1}, "agent2": {"score": verdict.agent2}, "step": turn},
        **dict.fromkeys(UNUSED_SCORES),
        "tag": situation.tag,
    }
    return row if system is None else row | {"system": system}


def _say(spoken: list[str], situation: Situation, said: str) -> bool:
    """Append an utterance; False when it ends the dialogue."""
    spoken.append(turn_line(len(spoken), situation.speaker(len(spoken)), said))
    return not leaves(said.strip('"'), LeaveRule.strict)
