"""Counts over episodes: how they ended, what failed, and how the policy chose its modes.

A :class:`Tally` takes one episode at a time and keeps counts only, so its memory does not grow with the run.
Modes are those of turns whose speaker was told to use them; a turn that broke the grammar counts as mode 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from nemo_ampo.dialogue.records import Episode, Turn
from nemo_ampo.dialogue.scenarios import SEATS
from nemo_ampo.reply.modes import MODES, NO_MODE
from nemo_ampo.sotopia.records import EpisodeResult
from nemo_ampo.types import Seat

MODE_IDS = (*MODES, NO_MODE)
"""1..4, and 0 for a turn that breaks the grammar."""
SELF_PLAY = "self_play"
RELATIONSHIPS = {
    0: "strangers",
    1: "know by name",
    2: "acquaintances",
    3: "friends",
    4: "romantic",
    5: "family",
    -1: "unknown",
}


MAX_FAILURE_KINDS = 20
OTHER_FAILURES = "other failures"
"""What the rarer kinds are counted under once there are :data:`MAX_FAILURE_KINDS`."""
_PLACE = re.compile(r"turn \d+, agent[12] \(.*?\): ")
_KIND_CHARACTERS = 100


def failure_kind(message: str) -> str:
    """A failure without turn, speaker and the endpoint's own words, which differ from episode to episode.

    >>> failure_kind("turn 3, agent1 (Ada Quill): status 503: request 81c was dropped")
    'status 503'
    """
    kind, _, _ = _PLACE.sub("", message, count=1).partition(": ")
    return kind[:_KIND_CHARACTERS]


def seats_of_policy(episode: Episode) -> tuple[Seat, ...]:
    """Where the evaluated policy sits: both seats in self-play."""
    return SEATS if episode.pairing == SELF_PLAY else (episode.key.seat,)


def shares(counts: Counter[int]) -> dict[int, float]:
    """Each mode's share of the counted turns; empty when none was counted."""
    total = sum(counts.values())
    return {k: counts[k] / total for k in MODE_IDS} if total else {}


@dataclass
class Tally:
    """Counts of one run.

    Attributes:
        begun, scored: episodes that were begun, and that have scores.
        unfinished: begun and not over.
        terminated_by: reason to episodes that ended so.
        unscored: kind of failure to played episodes without scores; ``not asked`` where no judge was asked yet.
        episode_errors: kind of failure to how often an episode ended by it; see :func:`failure_kind`.
        error_examples: kind of failure to the message of the first such episode.
        turns, partner_turns: utterances of the policy, and of others.
        tokens, partner_tokens: completion tokens of these.
        prompt_tokens: of all speakers. judge_tokens: prompt and completion tokens of the scoring.
        judge_repeats: unreadable answers of the evaluator that were asked for again.
        failed_turns: what the policy's turns broke, to how often.
        mode_by_turn, mode_by_relationship: turn index, or relationship, to counts per mode.
        mode_by_subset: ``all`` and ``hard`` to counts per mode.
        switches_by_turn: turn index to (mode at that turn, mode of the same speaker's next turn) to count.
        tokens_by_turn: turn index to (sum, count) of the policy's completion tokens.
        tokens_by_mode: mode to (sum, count).
    """

    begun: int = 0
    scored: int = 0
    unfinished: int = 0
    terminated_by: Counter[str] = field(default_factory=Counter)
    unscored: Counter[str] = field(default_factory=Counter)
    episode_errors: Counter[str] = field(default_factory=Counter)
    error_examples: dict[str, str] = field(default_factory=dict)
    turns: int = 0
    partner_turns: int = 0
    tokens: int = 0
    partner_tokens: int = 0
    prompt_tokens: int = 0
    judge_tokens: int = 0
    judge_repeats: int = 0
    failed_turns: Counter[str] = field(default_factory=Counter)
    mode_by_turn: dict[int, Counter[int]] = field(default_factory=dict)
    mode_by_relationship: dict[int, Counter[int]] = field(default_factory=dict)
    mode_by_subset: dict[str, Counter[int]] = field(default_factory=lambda: {"all": Counter(), "hard": Counter()})
    switches_by_turn: dict[int, Counter[tuple[int, int]]] = field(default_factory=dict)
    tokens_by_turn: dict[int, tuple[int, int]] = field(default_factory=dict)
    tokens_by_mode: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, result: EpisodeResult) -> None:
        """Count one episode."""
        episode = result.episode
        self.begun += 1
        if episode.terminated_by is None:
            self.unfinished += 1
        else:
            self.terminated_by[episode.terminated_by.value] += 1
        if episode.error is not None:
            self._add_error(episode.error)
        if result.scores is not None:
            self.scored += 1
            self.judge_repeats += result.scores.tries - 1
            self.judge_tokens += result.scores.prompt_tokens + result.scores.completion_tokens
        elif episode.played:
            self.unscored[result.score_error.kind if result.score_error else "not asked"] += 1
        seats = seats_of_policy(episode)
        for turn in episode.turns:
            self.prompt_tokens += turn.prompt_tokens
            if turn.seat in seats:
                self._add_turn(turn, episode)
            else:
                self.partner_turns += 1
                self.partner_tokens += turn.completion_tokens
        for seat in seats:
            chosen = [(turn.index, turn.mode) for turn in episode.turns_of(seat) if turn.mode is not None]
            for (index, mode), (_, following) in pairwise(chosen):
                self.switches_by_turn.setdefault(index, Counter())[mode, following] += 1

    def _add_error(self, message: str) -> None:
        kind = failure_kind(message)
        if kind not in self.episode_errors and len(self.episode_errors) >= MAX_FAILURE_KINDS:
            kind = OTHER_FAILURES
        self.episode_errors[kind] += 1
        self.error_examples.setdefault(kind, message)

    def _add_turn(self, turn: Turn, episode: Episode) -> None:
        self.turns += 1
        self.tokens += turn.completion_tokens
        self.tokens_by_turn[turn.index] = _plus(self.tokens_by_turn.get(turn.index), turn.completion_tokens)
        if turn.failed is not None:
            self.failed_turns[turn.failed] += 1
        if turn.mode is None:
            return
        self.mode_by_turn.setdefault(turn.index, Counter())[turn.mode] += 1
        self.mode_by_relationship.setdefault(episode.relationship, Counter())[turn.mode] += 1
        for subset in ("all", "hard") if episode.hard else ("all",):
            self.mode_by_subset[subset][turn.mode] += 1
        self.tokens_by_mode[turn.mode] = _plus(self.tokens_by_mode.get(turn.mode), turn.completion_tokens)

    @property
    def failed_episodes(self) -> int:
        """Episodes that could not be played to their end."""
        return self.terminated_by["failed"]

    @property
    def tokens_per_turn(self) -> float | None:
        """Mean completion tokens of the policy's turns; None without turns or token counts."""
        return self.tokens / self.turns if self.turns and self.tokens else None

    @property
    def uses_modes(self) -> bool:
        """Whether any of the policy's turns was told to choose a mode."""
        return bool(self.mode_by_subset["all"])

    def as_json(self) -> dict[str, Any]:
        """Shares and means for ``result.json``."""
        return {
            "terminated_by": dict(sorted(self.terminated_by.items())),
            "turns": self.turns,
            "partner_turns": self.partner_turns,
            "tokens": {
                "per_turn": self.tokens_per_turn,
                "policy": self.tokens,
                "partner": self.partner_tokens,
                "prompts": self.prompt_tokens,
                "judge": self.judge_tokens,
                "per_turn_by_turn": _means(self.tokens_by_turn),
                "per_turn_by_mode": _means(self.tokens_by_mode),
            },
            "failures": {
                "turns": dict(sorted(self.failed_turns.items())),
                "episodes": {
                    kind: {"episodes": number, "example": self.error_examples[kind]}
                    for kind, number in sorted(self.episode_errors.items())
                },
                "unscored": dict(sorted(self.unscored.items())),
                "judge_repeats": self.judge_repeats,
            },
            "modes": {
                **{subset: _keyed(shares(counts)) for subset, counts in self.mode_by_subset.items()},
                "by_turn": {str(turn): _keyed(shares(self.mode_by_turn[turn])) for turn in sorted(self.mode_by_turn)},
                "by_relationship": {
                    RELATIONSHIPS[r]: _keyed(shares(self.mode_by_relationship[r])) for r in sorted(self.mode_by_relationship)
                },
                "switches": _matrix(self.switches),
                "switches_by_turn": {
                    str(turn): _matrix(self.switches_by_turn[turn]) for turn in sorted(self.switches_by_turn)
                },
            },
        }

    @property
    def switches(self) -> Counter[tuple[int, int]]:
        """(mode, next mode of the same speaker) to count, over all turns."""
        return sum(self.switches_by_turn.values(), Counter())


def switches_from(switches: Counter[tuple[int, int]], mode: int) -> Counter[int]:
    """Next mode to count, after a turn in ``mode``."""
    return Counter({k: switches[mode, k] for k in MODE_IDS if switches[mode, k]})


def _matrix(switches: Counter[tuple[int, int]]) -> dict[str, dict[str, float]]:
    return {str(k): _keyed(shares(switches_from(switches, k))) for k in MODE_IDS if switches_from(switches, k)}


def tally(results: Iterable[EpisodeResult]) -> Tally:
    """Counts over all results."""
    counted = Tally()
    for result in results:
        counted.add(result)
    return counted


def _plus(entry: tuple[int, int] | None, value: int) -> tuple[int, int]:
    total, count = entry or (0, 0)
    return total + value, count + 1


def _means(entries: dict[int, tuple[int, int]]) -> dict[str, float]:
    return {str(key): entries[key][0] / entries[key][1] for key in sorted(entries)}


def _keyed(values: dict[int, float]) -> dict[str, float]:
    return {str(key): value for key, value in values.items()}
