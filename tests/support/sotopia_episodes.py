"""Made-up episodes in a real store: what a report is written from, without any model."""

from __future__ import annotations

import random
from pathlib import Path

from nemo_ampo.dialogue.records import Episode, EpisodeKey, Termination, Turn
from nemo_ampo.dialogue.scenarios import SEATS
from nemo_ampo.reply.grammar import render_reply
from nemo_ampo.reply.modes import MODES
from nemo_ampo.sotopia.dimensions import DIMENSIONS, ScoreError, Scores
from nemo_ampo.sotopia.records import EpisodeStore

NAMES = {"agent1": "Ada Quill", "agent2": "Bo Reed"}
GOALS = {"agent1": "Buy the boat for at most 40 coins", "agent2": "Sell the boat for at least 60 coins"}


def made_up_scores(rng: random.Random, shift: float = 0.0) -> Scores:
    """Plausible whole numbers; ``shift`` is added to goal and knowledge of agent1."""

    def agent(gain: float) -> dict[str, float]:
        values = {name: rng.randint(low, high) for name, (low, high) in DIMENSIONS.items()}
        values |= {name: min(10, max(0, round(rng.gauss(5 + gain, 2)))) for name in ("goal", "knowledge")}
        return {name: float(value) for name, value in values.items()}

    reasons = {name: f"because of {name}" for name in DIMENSIONS}
    return Scores("default", agent(shift), agent(0.0), reasons, reasons, prompt_tokens=500, completion_tokens=100)


def made_up_turn(rng: random.Random, index: int, thinking: bool) -> Turn:
    """An utterance; one in ten of a thinker's breaks the grammar."""
    seat = SEATS[index % 2]
    words = f"I say thing number {index}."
    if not thinking:
        return Turn(index, seat, NAMES[seat], words, f'"{words}"', prompt_tokens=90, completion_tokens=12)
    mode = rng.choice((1, 2, 3, 3, 4))
    raw = render_reply(mode, f'"{words}"', {name: f"a thought about {name}" for name in MODES[mode].sections})
    if rng.random() < 0.1:
        return Turn(index, seat, NAMES[seat], words, raw[:-5], mode=0, prompt_tokens=90, completion_tokens=40, failed="tags")
    return Turn(index, seat, NAMES[seat], words, raw, mode=mode, prompt_tokens=90, completion_tokens=20 + 30 * mode)


def write_run(
    folder: Path,
    episodes: int = 12,
    seeds: tuple[int, ...] = (1,),
    pairing: str = "self_play",
    shift: float = 0.0,
    unscored: tuple[int, ...] = (),
    failed: tuple[int, ...] = (),
    expected: int | None = None,
    seed: int = 0,
    **protocol: object,
) -> Path:
    """A run folder with ``episodes`` pairings, three of each scenario, every second scenario hard.

    Args:
        unscored: env ids whose evaluation failed.
        failed: env ids that could not be played.
        expected: what the protocol asks for; the episodes written by default.
        protocol: further keys of the protocol.
    """
    store = EpisodeStore(folder)
    seats = ("agent1",) if pairing == "self_play" else SEATS
    folder.mkdir(parents=True, exist_ok=True)
    asked = expected or episodes * len(seats) * len(seeds)
    store.keep_protocol({"pairing": pairing, "view": "sotopia", "episodes": asked, **protocol})
    rng = random.Random(seed)
    for run_seed in seeds:
        for seat in seats:
            for env_id in range(episodes):
                scenario = env_id // 3
                key = EpisodeKey(env_id, f"C{env_id}", seat, run_seed, "model")
                store.begin(
                    Episode(
                        key=key,
                        pairing=pairing,
                        view="sotopia",
                        environment_id=f"E{scenario}",
                        codename="old_boat",
                        relationship=scenario % 4,
                        hard=scenario % 2 == 1,
                        agent1_id="A1",
                        agent2_id="A2",
                        agent1_name=NAMES["agent1"],
                        agent2_name=NAMES["agent2"],
                        agent1_goal=GOALS["agent1"],
                        agent2_goal=GOALS["agent2"],
                    )
                )
                for index in range(rng.randint(3, 8)):
                    thinking = pairing == "self_play" or SEATS[index % 2] == seat
                    store.add_turn(key, made_up_turn(rng, index, thinking))
                if env_id in failed:
                    store.end(key, Termination.failed, "the partner's endpoint is down")
                    continue
                store.end(key, rng.choice((Termination.left, Termination.max_turns)))
                scores = made_up_scores(rng, shift)
                store.add_scores(key, ScoreError("default", "parse", "prose") if env_id in unscored else scores)
    return folder
