"""The pack: equal bytes for equal seeds, rows the readers accept, and held-out contents that training never shows."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ampo.data.bc import read_bc_rows, system_prompt_of
from nemo_ampo.data.episodes import read_turns
from nemo_ampo.world.pack import MODE_WEIGHTS, SYSTEM, PackSummary, make_pack
from nemo_ampo.world.rules import judge_dialogue
from nemo_ampo.world.scenes import TOPICS

FILES = ("bc_train.jsonl", "bc_heldout.jsonl", "rl_train.jsonl", "rl_heldout.jsonl")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PackSummary]:
    out = tmp_path_factory.mktemp("pack")
    return out, make_pack(out, seed=3, num_bc=3000, num_rl=1500, num_heldout=400)


def contents(path: Path) -> set[tuple[str, ...]]:
    """What decides the right words: a hard scene's numbers, an easy one's partner and topic, or its two people."""
    found = set()
    for line in path.read_text().splitlines():
        text = json.loads(line)["instruction"]
        me, you = re.findall(r"You are (\w+)\.", text)[0], re.findall(r"Goal of (\w+):", text)[0]
        goal = re.findall(r"^Goal: (.*)$", text, re.MULTILINE)[0]
        heard = re.findall(r': "(.*)"', text)
        numbers = re.findall("[0-9]+", goal)
        topic = set(re.findall(r"\w+", text)) & set(TOPICS)
        if numbers:
            found.add((goal, heard[-1]))
        else:
            found.add((goal.split()[0], you, *(topic or {me})))
    return found


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_pack(tmp_path / name, 7, 40, 20, 10)
    make_pack(tmp_path / "c", 8, 40, 20, 10)
    for name in (*FILES, "pack.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_the_summary_tells_counts_and_hashes(pack: tuple[Path, PackSummary]) -> None:
    out, summary = pack
    assert json.loads((out / "pack.json").read_text())["rows"] == dict(summary.rows)
    assert summary.rows == dict(zip(FILES, (3000, 400, 1500, 400), strict=True))
    for name in FILES:
        assert summary.sha256[name] == hashlib.sha256((out / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("heldout", ["bc_heldout.jsonl", "rl_heldout.jsonl"])
def test_held_out_contents_never_occur_in_training(pack: tuple[Path, PackSummary], heldout: str) -> None:
    out, _ = pack
    trained = contents(out / "bc_train.jsonl") | contents(out / "rl_train.jsonl")
    assert contents(out / heldout) and not contents(out / heldout) & trained


def test_cloning_rows_are_read_and_show_every_mode_on_every_kind_of_scene(pack: tuple[Path, PackSummary]) -> None:
    rows = read_bc_rows(pack[0] / "bc_train.jsonl")
    assert system_prompt_of(rows) == SYSTEM
    for tag, weights in MODE_WEIGHTS.items():
        modes = [row.mode for row in rows if bool(re.search("Goal: .*[0-9]", row.instruction)) == (tag == "hard")]
        for mode, weight in enumerate(weights, start=1):
            assert modes.count(mode) / len(modes) == pytest.approx(weight / sum(weights), abs=0.05)


def test_rl_rows_are_read_with_both_seats_and_tags_and_the_judges_state(pack: tuple[Path, PackSummary]) -> None:
    turns = read_turns(pack[0] / "rl_train.jsonl")
    assert {(turn.seat, turn.tag) for turn in turns} == {
        (seat, tag) for seat in ("agent1", "agent2") for tag in ("easy", "hard")
    }
    for turn in turns:
        state = judge_dialogue(
            "\n".join(turn.dialog), turn.agent1_name, turn.agent1_goal, turn.agent2_name, turn.agent2_goal
        )
        assert (turn.agent1_state, turn.agent2_state) == state
        assert turn.system == SYSTEM


def test_copying_and_guessing_fail_on_hard_scenes(pack: tuple[Path, PackSummary]) -> None:
    baselines = pack[1].baselines
    assert baselines["copy the best number of the prompt"] == 0
    assert baselines["say every number"] == 0
    assert 0 < baselines["say the commonest answer"] < 0.3


def test_the_command_prints_counts_and_baselines(tmp_path: Path) -> None:
    sizes = ["--num-bc", "20", "--num-rl", "30", "--num-heldout", "20"]
    done = subprocess.run(
        [sys.executable, "-m", "nemo_ampo.world", "--out", str(tmp_path), "--seed", "2", *sizes],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "30 rows" in done.stdout and "commonest answer" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "pack.json"}
