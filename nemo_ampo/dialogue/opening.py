"""First RL rows without the authors' data: the opening turn of every scenario of a folder.

A row asks for utterance 0, before anything was said. Run as
``python -m nemo_ampo.dialogue.opening --sotopia-dir DIR --output rows.jsonl``; beside the rows it writes
``rows.meta.json`` with the view, the counts, the digests of the four files, and a warning: scenarios that
were trained on can no longer be used to evaluate.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from nemo_ampo.data.episodes import STATE_MAX, STATE_MIN, UNUSED_SCORES
from nemo_ampo.data.rows import write_json, write_rows
from nemo_ampo.dialogue.prompts import View, agent_instruction, check_view, turn_line, visible_text
from nemo_ampo.dialogue.scenarios import OFFICIAL_COUNTS, SEATS, Scenario, ScenarioPack, load_scenarios
from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.overrides import typed_path
from nemo_ampo.types import Seat

START_SCORE = 5.0
"""State score of both agents before the first word. The gain divides by the distance to 10 when the judge's
score rises and by the distance to 0 when it falls. Starting from 0, no opening could ever lose, so every
reward would lie in [0.5, 1] and the worst opening would count as no change; from the middle, gains and losses
weigh the same."""


def opening_rows(
    folder: str | Path,
    view: View = "sotopia",
    seats: Sequence[Seat] = ("agent1",),
    limit: int | None = None,
    seed: int = 0,
    exclude_hard: bool = False,
    start_score: float = START_SCORE,
) -> list[dict[str, Any]]:
    """Rows of the published JSON layout for turn 0.

    Args:
        folder: what :func:`~nemo_ampo.dialogue.scenarios.load_scenarios` reads.
        view: what the speaker is shown of the partner.
        seats: whose goals the rows are about. Seat agent1 always speaks in turn 0; for ``agent2`` the two
            characters change places, so that the one with the second goal opens (``rollout`` is 1 in these
            rows, 0 in the others).
        limit: at most this many rows, drawn without replacement with ``seed``; file order is kept.
        seed: of that draw.
        exclude_hard: leave out the hard scenarios.
        start_score: state score of both agents, 0..10.

    Returns:
        Rows with the published fields and a ``tag``: ``sotopia`` or ``sotopia-hard``.

    Raises:
        DataError: a file is missing or wrong.
        ConfigError: a wrong argument, or nothing left to write.
    """
    return _rows(load_scenarios(folder), view, seats, limit, seed, exclude_hard, start_score)


def _rows(
    pack: ScenarioPack,
    view: View,
    seats: Sequence[Seat],
    limit: int | None,
    seed: int,
    exclude_hard: bool,
    start_score: float,
) -> list[dict[str, Any]]:
    check_view(view)
    if not seats or len(set(seats)) != len(seats) or not set(seats) <= set(SEATS):
        raise ConfigError(f"seats: expected agent1, agent2 or both, got {list(seats)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: expected at least 1, got {limit}")
    if not STATE_MIN <= start_score <= STATE_MAX:
        raise ConfigError(f"start_score: expected {STATE_MIN:g} to {STATE_MAX:g}, got {start_score}")
    rows = [
        opening_row(scenario, seat, view, start_score)
        for scenario in pack.scenarios.values()
        for seat in seats
        if not (exclude_hard and scenario.hard)
    ]
    if not rows:
        raise ConfigError("no rows left: the folder holds no scenario, or only hard ones and exclude_hard is set")
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    return rows


def opening_row(scenario: Scenario, seat: Seat, view: View, start_score: float) -> dict[str, Any]:
    """The row in which the character of ``seat`` opens the dialogue."""
    scene = scenario if seat == "agent1" else scenario.swapped()
    first, second = scene.agents
    dialog = [turn_line(0, first.name)]
    return {
        "dialog": dialog,
        "env_id": scenario.env_id,
        "turn": 0,
        "rollout": SEATS.index(seat),
        "instruction": agent_instruction(scene, "agent1", 0, dialog, view),
        "agent1_name": first.name,
        "agent2_name": second.name,
        "agent1_goal": visible_text(scene.goal("agent1"), "environment"),
        "agent2_goal": visible_text(scene.goal("agent2"), "environment"),
        "state": {"agent1": {"score": start_score}, "agent2": {"score": start_score}, "step": 0},
        **dict.fromkeys(UNUSED_SCORES),
        "tag": "sotopia-hard" if scenario.hard else "sotopia",
    }


def meta_path(rows_path: str | Path) -> Path:
    """Where the description of a row file stands: ``rows.jsonl`` -> ``rows.meta.json``."""
    return Path(rows_path).with_suffix(".meta.json")


def write_opening_rows(
    folder: str | Path,
    output: str | Path,
    view: View = "sotopia",
    seats: Sequence[Seat] = ("agent1",),
    limit: int | None = None,
    seed: int = 0,
    exclude_hard: bool = False,
    start_score: float = START_SCORE,
) -> dict[str, Any]:
    """Write the rows of :func:`opening_rows` and, first, their description.

    Returns:
        The description, as written to :func:`meta_path`.
    """
    pack = load_scenarios(folder)
    rows = _rows(pack, view, seats, limit, seed, exclude_hard, start_score)
    official = pack.counts == OFFICIAL_COUNTS
    meta = {
        "note": _note(official, len({row["env_id"] for row in rows}), exclude_hard),
        "evaluation_scenarios": official,
        "rows": len(rows),
        "rows_by_tag": dict(Counter(row["tag"] for row in rows)),
        "env_ids": sorted({row["env_id"] for row in rows}),
        "view": view,
        "seats": list(seats),
        "limit": limit,
        "seed": seed,
        "exclude_hard": exclude_hard,
        "start_score": start_score,
        "folder_counts": asdict(pack.counts),
        "sha256": dict(pack.sha256),
    }
    write_json(meta, meta_path(output))
    write_rows(rows, output)
    return meta


def _note(official: bool, num_scenarios: int, exclude_hard: bool) -> str:
    if not official:
        return (
            f"These rows come from {num_scenarios} scenarios of the given folder. Do not evaluate a "
            "model trained on them on the same scenarios."
        )
    left_out = " The hard scenarios were left out, but they share characters with the rest." if exclude_hard else ""
    share = f"{num_scenarios} of {OFFICIAL_COUNTS.scenarios} scenarios of the published SOTOPIA test set"
    return (
        f"WARNING: TEST SCENARIOS. These rows are made from {share}. A model trained on them has seen the "
        f"test: its SOTOPIA scores on these env_ids are not comparable with published numbers.{left_out}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command: write opening RL rows from a SOTOPIA folder."""
    parser = argparse.ArgumentParser(prog="python -m nemo_ampo.dialogue.opening", description=main.__doc__)
    parser.add_argument("--sotopia-dir", required=True, help="folder with the four SOTOPIA files")
    parser.add_argument("--output", type=typed_path, required=True, help="row file to write, .jsonl or .json")
    parser.add_argument("--view", choices=get_args(View), default="sotopia", help="what a speaker sees of the partner")
    parser.add_argument("--seats", nargs="+", choices=SEATS, default=["agent1"], help="whose goals the rows are about")
    parser.add_argument("--limit", type=int, help="draw at most this many rows")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--exclude-hard", action="store_true", help="leave out the hard scenarios")
    parser.add_argument("--start-score", type=float, default=START_SCORE, help="state score before the first word, 0..10")
    args = parser.parse_args(argv)
    try:
        meta = write_opening_rows(
            args.sotopia_dir,
            args.output,
            view=args.view,
            seats=args.seats,
            limit=args.limit,
            seed=args.seed,
            exclude_hard=args.exclude_hard,
            start_score=args.start_score,
        )
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{meta['rows']} rows -> {args.output} (view: {meta['view']}; see {meta_path(args.output)})\n")
    sys.stderr.write(f"{meta['note']}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
