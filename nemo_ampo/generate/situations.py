"""Where dialogues start: a situation with two characters, from a SOTOPIA folder or from the embedded world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from nemo_ampo.dialogue.prompts import View, agent_instruction, load_texts, turn_line, visible_text
from nemo_ampo.dialogue.scenarios import SEATS, Scenario, load_scenarios
from nemo_ampo.errors import ConfigError
from nemo_ampo.generate.overlap import is_evaluation
from nemo_ampo.types import JudgeRequest, Seat
from nemo_ampo.world.pack import judge_request
from nemo_ampo.world.scenes import Scene, draw_scene


@dataclass(frozen=True)
class Situation:
    """One dialogue to be played.

    Attributes:
        row_id: unique within a job; rows are named after it.
        env_id, rollout: as in the published rows.
        tag: label of its rows.
        names, goals: of agent1 and agent2; goals as the judge reads them.
        opening: lines spoken before the teacher begins, with their line feeds.
        max_turns: utterances in all, those of the opening included.
        instruct: from the turn about to be spoken and the dialogue (its last line open) to the user message.
    """

    row_id: str
    env_id: int
    rollout: int
    tag: str
    names: tuple[str, str]
    goals: tuple[str, str]
    opening: tuple[str, ...]
    max_turns: int
    instruct: Callable[[int, Sequence[str]], str]

    def speaker(self, turn: int) -> str:
        """Name of who speaks in a turn."""
        return self.names[turn % 2]

    def dialog(self, spoken: Sequence[str]) -> list[str]:
        """Lines so far and the open line of who speaks next."""
        return [*spoken, turn_line(len(spoken), self.speaker(len(spoken)))]

    def request(self, spoken: Sequence[str]) -> JudgeRequest:
        """The question how far both have come."""
        return JudgeRequest("\n".join(spoken).strip(), *self.names, *self.goals)


@dataclass(frozen=True)
class Situations:
    """What a job plays.

    Attributes:
        chosen: in order.
        excluded: keys of evaluation situations that were left out.
    """

    chosen: tuple[Situation, ...]
    excluded: tuple[str, ...] = ()


def from_sotopia(
    folder: str | Path,
    rollouts: int = 1,
    max_turns: int = 20,
    view: View = "sotopia",
    limit: int | None = None,
    seed: int = 0,
) -> Situations:
    """Every pairing of a SOTOPIA folder whose situation is not in the evaluation set.

    Args:
        folder: with the four files.
        rollouts: dialogues per pairing.
        max_turns: of each dialogue.
        view: what the speaker sees of the partner.
        limit: at most this many pairings, drawn with ``seed``; file order is kept.

    Raises:
        DataError: a file is missing or wrong.
        ConfigError: nothing but evaluation situations.
    """
    pack = load_scenarios(folder)
    excluded = {e.environment_id for e in pack.environments.values() if is_evaluation(e)}
    usable = [s for s in pack.scenarios.values() if s.environment.environment_id not in excluded]
    if not usable:
        raise ConfigError(
            f"{folder}: all {len(pack.environments)} situations belong to SOTOPIA's evaluation set; rows made from them "
            "would show a model its test. Name a folder with other situations, or use the embedded world (--world)"
        )
    if limit is not None and limit < len(usable):
        usable = [usable[i] for i in sorted(Random(seed).sample(range(len(usable)), limit))]
    chosen = [_of_scenario(s, rollout, max_turns, view) for s in usable for rollout in range(rollouts)]
    return Situations(tuple(chosen), tuple(sorted(excluded)))


def _of_scenario(scenario: Scenario, rollout: int, max_turns: int, view: View) -> Situation:
    texts = load_texts()

    def instruct(turn: int, dialog: Sequence[str]) -> str:
        return agent_instruction(scenario, SEATS[turn % 2], turn, dialog, view, texts)

    first, second = scenario.agents
    return Situation(
        row_id=f"{scenario.environment.environment_id}-{scenario.combo_id}-{rollout}",
        env_id=scenario.env_id,
        rollout=rollout,
        tag="sotopia-hard" if scenario.hard else "sotopia",
        names=(first.name, second.name),
        goals=(_goal(scenario, "agent1"), _goal(scenario, "agent2")),
        opening=(),
        max_turns=max_turns,
        instruct=instruct,
    )


def _goal(scenario: Scenario, seat: Seat) -> str:
    return visible_text(scenario.goal(seat), "environment")


def from_world(count: int, seed: int = 0) -> Situations:
    """Scenes of the embedded world, none of the held-out ones; each waits for one utterance."""
    rng = Random(f"{seed}/generate")
    return Situations(tuple(_of_scene(draw_scene(rng, heldout=False), i) for i in range(count)))


def _of_scene(scene: Scene, index: int) -> Situation:
    request = judge_request(scene, None)
    return Situation(
        row_id=f"world-{index}",
        env_id=index,
        rollout=0,
        tag=scene.tag,
        names=(request.agent1_name, request.agent2_name),
        goals=(request.agent1_goal, request.agent2_goal),
        opening=tuple(scene.dialog[:-1]),
        max_turns=len(scene.spoken) + 1,
        instruct=lambda turn, dialog: scene.instruction,
    )
