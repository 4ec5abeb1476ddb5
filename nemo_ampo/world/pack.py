"""Write the embedded world as files, in the published row formats.

``bc_train.jsonl`` and ``bc_heldout.jsonl`` hold cloning rows, ``rl_train.jsonl`` and ``rl_heldout.jsonl`` unfinished
dialogues, ``pack.json`` says what was made and how far one gets without understanding. Equal arguments give equal
bytes. No content of a held-out file occurs in a training file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from nemo_ampo.files import write_once
from nemo_ampo.output.lock import hold_output
from nemo_ampo.reply.modes import MODES
from nemo_ampo.types import JudgeRequest
from nemo_ampo.world.replies import gold_reply
from nemo_ampo.world.rules import RIGHT, judge_dialogue
from nemo_ampo.world.scenes import HardFamily, Scene, draw_scene

SYSTEM = "Pick a thinking level from 1 to 4, think, then speak."
"""System prompt of every row."""

NUM_BC = 12000
NUM_RL = 1024
NUM_HELDOUT = 256


@dataclass(frozen=True)
class PackSummary:
    """What :func:`make_pack` wrote; also the content of ``pack.json``.

    Attributes:
        seed: of the draw.
        rows: file name to number of rows.
        sha256: file name to hash of its bytes.
        baselines: strategy without understanding to the share of held-out hard RL rows where it says the right words.
    """

    seed: int
    rows: Mapping[str, int]
    sha256: Mapping[str, str]
    baselines: Mapping[str, float]


def make_pack(
    out_dir: str | Path,
    seed: int,
    num_bc: int = NUM_BC,
    num_rl: int = NUM_RL,
    num_heldout: int = NUM_HELDOUT,
) -> PackSummary:
    """Write the four data files and ``pack.json``.

    Args:
        out_dir: folder, made if missing; files of these names are replaced.
        seed: of all draws.
        num_bc, num_rl: rows of the training files.
        num_heldout: rows of each held-out file.

    Returns:
        What was written.

    Raises:
        UserError: another process writes there.
        DiskError: it cannot be written.
    """
    out = Path(out_dir)
    rl_heldout = _scenes(seed, "rl_heldout", num_heldout, heldout=True)
    rl_train = _scenes(seed, "rl_train", num_rl, heldout=False)
    files = {
        "bc_train.jsonl": _bc_rows(seed, "bc_train", num_bc, heldout=False),
        "bc_heldout.jsonl": _bc_rows(seed, "bc_heldout", num_heldout, heldout=True),
        "rl_train.jsonl": [rl_row(scene, i) for i, scene in enumerate(rl_train)],
        "rl_heldout.jsonl": [rl_row(scene, i) for i, scene in enumerate(rl_heldout)],
    }
    baselines = baseline_shares(rl_train, rl_heldout)
    with hold_output(out, "--out"):
        hashes = {name: _write(out / name, rows) for name, rows in files.items()}
        summary = PackSummary(seed, {name: len(rows) for name, rows in files.items()}, hashes, baselines)
        write_once(out / "pack.json", json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def bc_row(scene: Scene, mode: int) -> dict[str, Any]:
    """A scene and its right reply as a cloning row."""
    return {
        "system": SYSTEM,
        "instruction": scene.instruction,
        "input": "",
        "output": gold_reply(scene, mode),
    }


def rl_row(scene: Scene, env_id: int) -> dict[str, Any]:
    """A scene as a row of unfinished dialogue; the state scores are the judge's for what was said so far."""
    request = judge_request(scene, None)
    state = _judge(request)
    return {
        "dialog": scene.dialog,
        "env_id": env_id,
        "turn": len(scene.spoken),
        "instruction": scene.instruction,
        "agent1_name": request.agent1_name,
        "agent2_name": request.agent2_name,
        "agent1_goal": request.agent1_goal,
        "agent2_goal": request.agent2_goal,
        "rollout": 0,
        "state": {"agent1": {"score": state[0]}, "agent2": {"score": state[1]}, "step": len(scene.spoken)},
        "agent1_goal_score": state[0],
        "agent2_goal_score": state[1],
        "agent1_avg_score": state[0],
        "agent2_avg_score": state[1],
        "system": SYSTEM,
        "tag": scene.tag,
    }


def judge_request(scene: Scene, words: str | None) -> JudgeRequest:
    """What the judge sees once ``me`` has said ``words`` (without quotation marks), or before, when None."""
    lines = scene.dialog
    if words is not None:
        lines[-1] += f' "{words}"\n'
    me, you = (scene.me, scene.goal), (scene.you, scene.partner_goal)
    (name1, goal1), (name2, goal2) = (me, you) if scene.seat == "agent1" else (you, me)
    return JudgeRequest("\n".join(lines).strip(), name1, name2, goal1, goal2)


def baseline_shares(train: Sequence[Scene], heldout: Sequence[Scene]) -> dict[str, float]:
    """How often strategies without understanding are right in the hard scenes of ``heldout``.

    Args:
        train: scenes that the commonest answers are taken from.
        heldout: scenes to answer; easy ones are skipped.

    Returns:
        Strategy to share of right replies, 0..1: say the best number of the prompt, the commonest answer of the family
        in ``train``, or every number from 1 to 30.
    """
    answers = Counter((scene.family.name, scene.right_words) for scene in train)

    def commonest(scene: Scene) -> Iterable[str]:
        known = [(count, words) for (name, words), count in answers.items() if name == scene.family.name]
        return [max(known)[1]] if known else []

    def copies(scene: Scene) -> Iterable[str]:
        return [_say(scene, number) for number in (*(scene.mine or ()), *(scene.theirs or ()))]

    def enumeration(scene: Scene) -> Iterable[str]:
        return [_say(scene, " or ".join(map(str, range(1, 31))))]

    strategies: dict[str, Callable[[Scene], Iterable[str]]] = {
        "copy the best number of the prompt": copies,
        "say the commonest answer": commonest,
        "say every number": enumeration,
    }
    hard = [scene for scene in heldout if scene.tag == "hard"]
    return {
        name: round(sum(any(_is_right(s, words) for words in strategy(s)) for s in hard) / max(1, len(hard)), 4)
        for name, strategy in strategies.items()
    }


def _say(scene: Scene, number: object) -> str:
    assert isinstance(scene.family, HardFamily), "only hard scenes are about a number"
    return scene.family.reply.format(number)


def _is_right(scene: Scene, words: str) -> bool:
    scores = _judge(judge_request(scene, words))
    return scores[0 if scene.seat == "agent1" else 1] == RIGHT


def _judge(request: JudgeRequest) -> tuple[float, float]:
    return judge_dialogue(
        request.dialogue, request.agent1_name, request.agent1_goal, request.agent2_name, request.agent2_goal
    )


def _scenes(seed: int, purpose: str, count: int, heldout: bool) -> list[Scene]:
    rng = Random(f"{seed}/{purpose}")
    return [draw_scene(rng, heldout) for _ in range(count)]


MODE_WEIGHTS: dict[str, tuple[int, ...]] = {"easy": (6, 5, 5, 4), "hard": (4, 5, 5, 6)}
"""How often the cloning rows show modes 1..4. The teacher leans the right way, as a strong model would, but only a little:
every mode is shown on every kind of scene, and when to think is left for reinforcement learning to find out."""


def _bc_rows(seed: int, purpose: str, count: int, heldout: bool) -> list[dict[str, Any]]:
    """Cloning rows; each mode's reply is right, whatever the mode."""
    modes = Random(f"{seed}/{purpose}/modes")
    scenes = _scenes(seed, purpose, count, heldout)
    return [bc_row(s, modes.choices(tuple(MODES), MODE_WEIGHTS[s.tag])[0]) for s in scenes]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write_once(path, data)
    return hashlib.sha256(data).hexdigest()
