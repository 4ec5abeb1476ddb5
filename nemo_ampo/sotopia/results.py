"""Others' results: reads the JSON that the authors' evaluation writes, so that published runs can be aggregated again.

One record per episode, with ``env_id``, ``actor_role``, ``dialog``, ``rewards`` and the scores of both agents as
pairs of reasoning and number. A record without scores, or whose last reward is :data:`FAILED_REWARD`, is an
episode whose evaluation failed: the authors leave it out of every mean in silence (D12), here it is a missing
value that is counted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_ampo.data.rows import Record, read_records
from nemo_ampo.dialogue.records import Episode, EpisodeKey, Termination, Turn
from nemo_ampo.dialogue.scenarios import SEATS, ScenarioPack
from nemo_ampo.errors import DataError, FormatError
from nemo_ampo.reply.grammar import parse_reply
from nemo_ampo.reply.modes import NO_MODE
from nemo_ampo.sotopia.dimensions import DIMENSIONS, ScoreError, Scores, ScoresFormatError, whole_number
from nemo_ampo.sotopia.records import EpisodeResult
from nemo_ampo.types import Seat

FAILED_REWARD = -100
"""What the authors' evaluation writes as last reward of an episode it could not score."""
IMPORTED = "imported"
"""Stands for the model and the judge, which such a file does not name."""
UNKNOWN_RELATIONSHIP = -1
"""Relationship of an episode whose scenario files were not at hand."""

_LINE = re.compile(r"Turn (?P<turn>\d+): (?P<name>.*?) said:(?P<words>.*)", re.DOTALL)
_LEVEL_LINE = "Thinking Level:"


@dataclass(frozen=True)
class ImportedResults:
    """A result file of the authors' evaluation.

    Attributes:
        path: the file.
        pack: the scenario files the run was made with, if at hand; they say which situation and relationship
            an ``env_id`` stands for. Without them, episodes with the same two goals are taken to be of one
            situation, and relationships are unknown.
        hard_ids: ``env_id`` of hard episodes, beside those the records themselves flag.
    """

    path: Path
    pack: ScenarioPack | None = None
    hard_ids: frozenset[int] = frozenset()

    def results(self) -> Iterator[EpisodeResult]:
        """The episodes, in file order.

        Raises:
            DataError: naming file, row and field.
        """
        seen: dict[tuple[int, Seat], str] = {}
        records = read_records(self.path)
        # The file does not say which pairing it was; only self-play has its policy in one seat alone.
        pairing = "partner" if any(record.values.get("actor_role") == "agent2" for record in records) else "self_play"
        for record in records:
            result = self._result(record, pairing)
            key = (result.episode.key.env_id, result.episode.key.seat)
            if key in seen:
                raise record.error("env_id", f"{key[0]} with actor_role {key[1]!r} stands in {seen[key]} already")
            seen[key] = record.where
            yield result

    def _result(self, record: Record, pairing: str) -> EpisodeResult:
        env_id, actor = record.integer("env_id", low=0), record.text("actor_role")
        if actor not in SEATS:
            raise record.error("actor_role", f"expected one of {', '.join(SEATS)}, got {actor!r}")
        names = {seat: _text(record, f"{seat}_name") or seat for seat in SEATS}
        goals = {seat: _text(record, f"{seat}_goal") for seat in SEATS}
        turns, left_open = _turns(record, names)
        episode = Episode(
            key=EpisodeKey(env_id, "", "agent1" if actor == "agent1" else "agent2", 0, IMPORTED),
            pairing=pairing,
            view="reference",
            environment_id=hashlib.sha256("\0".join(goals.values()).encode("utf-8", "replace")).hexdigest()[:12],
            codename="",
            relationship=UNKNOWN_RELATIONSHIP,
            hard=env_id in self.hard_ids or record.values.get("hard") is True,
            agent1_id="",
            agent2_id="",
            agent1_name=names["agent1"],
            agent2_name=names["agent2"],
            agent1_goal=goals["agent1"],
            agent2_goal=goals["agent2"],
            turns=turns,
            terminated_by=_termination(turns, left_open),
        )
        if self.pack is not None:
            episode = _of_scenario(episode, self.pack, record)
        if not is_scored(record):
            return EpisodeResult(episode, score_error=ScoreError(IMPORTED, "missing", "the file holds no scores"))
        scores = {seat: _scores(record.child(f"{seat}_scores")) for seat in SEATS}
        return EpisodeResult(
            episode,
            scores=Scores(
                judge=IMPORTED,
                agent1={name: number for name, (number, _) in scores["agent1"].items()},
                agent2={name: number for name, (number, _) in scores["agent2"].items()},
                agent1_reasoning={name: why for name, (_, why) in scores["agent1"].items()},
                agent2_reasoning={name: why for name, (_, why) in scores["agent2"].items()},
            ),
        )


def is_scored(record: Record) -> bool:
    """False for an episode whose evaluation failed, by the authors' rule."""
    rewards = record.values.get("rewards")
    if not isinstance(rewards, list) or not rewards:
        raise record.error("rewards", "expected a list that is not empty")
    return bool(record.values.get("agent1_scores")) and rewards[-1] != FAILED_REWARD


def _text(record: Record, key: str) -> str:
    return record.text(key, blank=True) if record.has(key) else ""


def _scores(agent: Record) -> dict[str, tuple[float, str]]:
    scores: dict[str, tuple[float, str]] = {}
    for name, limits in DIMENSIONS.items():
        pair = agent.values.get(name)
        if not isinstance(pair, list) or len(pair) != 2:
            raise agent.error(name, "expected a pair of reasoning and number")
        try:
            scores[name] = float(whole_number(pair[1], "the number", limits)), str(pair[0])
        except ScoresFormatError as error:
            raise agent.error(name, str(error)) from None
    return scores


def _turns(record: Record, names: Mapping[Seat, str]) -> tuple[tuple[Turn, ...], bool]:
    """Spoken turns, and whether the last line of the dialogue was left open."""
    lines = record.texts("dialog") if record.has("dialog") else ()
    outputs = record.values.get("fullout")
    raw = [str(text) for text in outputs] if isinstance(outputs, list) else []
    seats = [SEATS[i % 2] for i in range(len(lines))]
    thinkers = {seat for seat, text in zip(seats, raw, strict=False) if _LEVEL_LINE in text}
    turns, left_open = [], False
    for index, (line, seat) in enumerate(zip(lines, seats, strict=True)):
        match = _LINE.fullmatch(line)
        words = match["words"].strip() if match else line.strip()
        if not words:
            left_open = True
            continue
        written = raw[index] if index < len(raw) else ""
        mode = _mode(written) if seat in thinkers else None
        turns.append(Turn(index, seat, names[seat], words.strip('"'), written, mode=mode))
    return tuple(turns), left_open


def _mode(raw: str) -> int:
    try:
        return parse_reply(raw).mode
    except FormatError:
        return NO_MODE


def _termination(turns: tuple[Turn, ...], left_open: bool) -> Termination:
    """Why it stopped; the authors' rules leave only these three reasons."""
    if left_open:
        return Termination.prompt_limit
    last = turns[-1].text.lower() if turns else ""
    if "left the conversation" in last or "leave the conversation" in last:
        return Termination.left
    return Termination.max_turns


def _of_scenario(episode: Episode, pack: ScenarioPack, record: Record) -> Episode:
    scenario = pack.scenarios.get(episode.key.env_id)
    if scenario is None:
        raise record.error("env_id", f"{episode.key.env_id} is not in the scenario files, which hold {len(pack.scenarios)}")
    for seat in SEATS:
        name = scenario.agent(seat).name
        if record.has(f"{seat}_name") and episode.name(seat) != name:
            raise DataError(
                f"{record.where}, field '{seat}_name': {episode.name(seat)!r}, but env_id {episode.key.env_id} of the "
                f"scenario files is about {name!r}; the run was made from other files"
            )
    return replace(
        episode,
        key=replace(episode.key, combo_id=scenario.combo_id),
        environment_id=scenario.environment.environment_id,
        codename=scenario.environment.codename,
        relationship=int(scenario.environment.relationship),
        hard=episode.hard or scenario.hard,
        agent1_id=scenario.agents[0].agent_id,
        agent2_id=scenario.agents[1].agent_id,
    )
