import hashlib
import json
import subprocess
import sys

import pytest

from nemo_ampo.data.episodes import read_turns
from nemo_ampo.data.rows import write_rows
from nemo_ampo.dialogue.opening import START_SCORE, meta_path, opening_rows, write_opening_rows
from nemo_ampo.dialogue.prompts import agent_instruction
from nemo_ampo.dialogue.scenarios import FILES, load_scenarios
from nemo_ampo.errors import ConfigError


def test_rows_are_turns_of_the_published_layout(folder, tmp_path):
    rows = opening_rows(folder)
    assert [row["env_id"] for row in rows] == list(range(6))
    assert rows[3] == {
        "dialog": ["Turn 0: Ada Quill said:"],
        "env_id": 3,
        "turn": 0,
        "rollout": 0,
        "instruction": agent_instruction(
            load_scenarios(folder).scenarios[3], "agent1", 0, ["Turn 0: Ada Quill said:"], "sotopia"
        ),
        "agent1_name": "Ada Quill",
        "agent2_name": "Bo Reed",
        "agent1_goal": "Get a seat\nExtra: you pay $9 Hint: smile {x}",
        "agent2_goal": "Keep both seats (you have two bags)",
        "state": {"agent1": {"score": 5.0}, "agent2": {"score": 5.0}, "step": 0},
        **dict.fromkeys(("agent1_goal_score", "agent2_goal_score", "agent1_avg_score", "agent2_avg_score")),
        "tag": "sotopia",
    }
    assert [row["tag"] for row in rows] == [
        "sotopia",
        "sotopia-hard",
        "sotopia",
        "sotopia",
        "sotopia-hard",
        "sotopia",
    ]
    write_rows(rows, tmp_path / "rows.jsonl")
    turns = read_turns(tmp_path / "rows.jsonl")
    assert [t.seat for t in turns] == ["agent1"] * 6 and turns[3].instruction == rows[3]["instruction"]


def test_the_second_seat_opens_after_a_swap(folder):
    first, second = (opening_rows(folder, seats=(seat,))[3] for seat in ("agent1", "agent2"))
    assert second["dialog"] == ["Turn 0: Bo Reed said:"] and second["turn"] == 0
    assert (second["agent1_name"], second["agent2_name"]) == ("Bo Reed", "Ada Quill")
    assert (second["agent1_goal"], second["agent2_goal"]) == (first["agent2_goal"], first["agent1_goal"])
    assert "Bo once sank a boat" in second["instruction"] and "Ada once sank a boat" not in second["instruction"]
    both = opening_rows(folder, seats=("agent1", "agent2"))
    assert [(r["env_id"], r["rollout"]) for r in both[6:8]] == [(3, 0), (3, 1)] and len(both) == 12


def test_the_view_reaches_the_instruction(folder):
    mine, theirs = opening_rows(folder)[0], opening_rows(folder, view="reference")[0]
    assert "Cy once sank a boat" not in mine["instruction"]
    assert "Cy once sank a boat" in theirs["instruction"] and "The ferry is cancelled" in theirs["instruction"]


def test_a_limit_draws_with_the_seed_and_keeps_the_order(folder):
    draws = [[r["env_id"] for r in opening_rows(folder, limit=3, seed=seed)] for seed in range(20)]
    assert all(ids == sorted(set(ids)) and len(ids) == 3 for ids in draws)
    assert len({tuple(ids) for ids in draws}) > 5
    assert draws[7] == [r["env_id"] for r in opening_rows(folder, limit=3, seed=7)]
    assert len(opening_rows(folder, limit=99)) == 6


def test_hard_scenarios_can_be_left_out(folder):
    assert [r["env_id"] for r in opening_rows(folder, exclude_hard=True)] == [0, 2, 3, 5]


def test_the_start_lets_an_opening_win_and_lose():
    # a = (j - s) / (10 - s) upwards, (j - s) / s downwards: from the middle both ends are reached
    gains = [(j - START_SCORE) / ((10 - START_SCORE) if j > START_SCORE else START_SCORE) for j in (0, 5, 10)]
    assert gains == [-1, 0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"view": "all"}, "view: expected one of"),
        ({"seats": ()}, "seats: expected"),
        ({"seats": ("agent3",)}, "seats: expected"),
        ({"seats": ("agent1", "agent1")}, "seats: expected"),
        ({"limit": 0}, "limit: expected at least 1"),
        ({"start_score": 11}, "start_score: expected 0 to 10"),
    ],
)
def test_wrong_arguments_are_named(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        opening_rows(folder, **changes)


def test_nothing_left_is_an_error(content, write_folder):
    content["sotopia_hard.json"] = list(range(6))
    with pytest.raises(ConfigError, match="no rows left"):
        opening_rows(write_folder(content), exclude_hard=True)


def test_the_description_says_what_the_rows_are(folder, tmp_path):
    meta = write_opening_rows(folder, tmp_path / "out" / "rows.json", limit=2, seed=3, exclude_hard=True)
    assert json.loads((tmp_path / "out" / "rows.meta.json").read_text()) == meta
    assert meta["evaluation_scenarios"] is False and "Do not evaluate a model trained on them" in meta["note"]
    assert (meta["rows"], meta["view"], meta["seed"], meta["rows_by_tag"]) == (
        2,
        "sotopia",
        3,
        {"sotopia": 2},
    )
    assert meta["env_ids"] == [t.env_id for t in read_turns(tmp_path / "out" / "rows.json")]
    assert meta["sha256"] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    assert meta_path("a/rows.jsonl").name == "rows.meta.json"


def test_test_scenarios_cannot_be_missed(real_folder, tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        "-m",
        "nemo_ampo.dialogue.opening",
        "--sotopia-dir",
        str(real_folder),
        "--output",
        str(out),
    ]
    done = subprocess.run([*command, "--exclude-hard"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "380 rows" in done.stdout
    meta = json.loads((tmp_path / "rows.meta.json").read_text())
    assert next(iter(meta)) == "note" and meta["evaluation_scenarios"] is True
    assert meta["note"].startswith("WARNING: TEST SCENARIOS.") and meta["note"] in done.stderr
    turns = read_turns(out)
    assert len(turns) == 380 and {t.tag for t in turns} == {"sotopia"} and {t.agent1_state for t in turns} == {5.0}
    assert len({t.row_id for t in turns}) == 380


def test_all_published_scenarios_open(real_folder, tmp_path):
    write_rows(opening_rows(real_folder, seats=("agent1", "agent2")), tmp_path / "rows.jsonl")
    assert len(read_turns(tmp_path / "rows.jsonl")) == 900


def test_the_command_reports_errors_in_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "nemo_ampo.dialogue.opening",
        "--sotopia-dir",
        str(tmp_path),
        "--output",
        "rows.jsonl",
    ]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1 and "agents.json" in failed.stderr
