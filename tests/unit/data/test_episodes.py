import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_ampo.data.episodes import chat_messages, read_turns, rows_to_parquet, write_turns
from nemo_ampo.errors import DataError
from nemo_ampo.types import DialogueTurn

SCORES = dict.fromkeys(("agent1_goal_score", "agent2_goal_score", "agent1_avg_score", "agent2_avg_score"), 6.5)


def published_row(**changes):
    """A row as the authors' data has it: nothing of ours in it."""
    row = {
        "dialog": ['Turn 0: Ann Lee said: "Hello."\n', "Turn 1: Bo Ray said:"],
        "env_id": 17,
        "turn": 1,
        "instruction": "You are Bo Ray.\nTurn 1: Bo Ray said:",
        "agent1_name": "Ann Lee",
        "agent2_name": "Bo Ray",
        "agent1_goal": "Sell the lamp",
        "agent2_goal": "Buy the lamp for less than $20",
        "rollout": 2,
        "state": {"agent1": {"score": 4.0}, "agent2": {"score": 7.3}, "step": 1},
        **SCORES,
    }
    return row | changes


def write(path, rows):
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows))
    return path


def published_parquet(path, rows, system="Choose a level."):
    """The columns of the authors' preprocessing, scores rounded to float32 as theirs are."""

    def score(value):
        return {"score": np.float32(value)}

    table = [
        {
            "data_source": "sotopia",
            "prompt": [{"role": "system", "content": system}, {"role": "user", "content": r["instruction"]}],
            "ability": "reason",
            "reward_model": {
                "style": "model",
                **{k: r[k] for k in ("turn", "dialog", "agent1_name", "agent2_name", "agent1_goal", "agent2_goal")},
                "state_reward": {
                    "agent1": score(r["state"]["agent1"]["score"]),
                    "agent2": score(r["state"]["agent2"]["score"]),
                    "step": r["state"]["step"],
                },
            },
            "extra_info": {"split": "train", "index": i, **{k: r[k] for k in ("env_id", "turn", "rollout")}},
            **SCORES,
        }
        for i, r in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_published_row_becomes_a_turn(tmp_path, name):
    (turn,) = read_turns(write(tmp_path / name, [published_row()]))
    assert turn == DialogueTurn(
        row_id=turn.row_id,
        dialog=('Turn 0: Ann Lee said: "Hello."\n', "Turn 1: Bo Ray said:"),
        turn=1,
        instruction="You are Bo Ray.\nTurn 1: Bo Ray said:",
        agent1_name="Ann Lee",
        agent2_name="Bo Ray",
        agent1_goal="Sell the lamp",
        agent2_goal="Buy the lamp for less than $20",
        agent1_state=4.0,
        agent2_state=7.3,
        env_id=17,
        rollout=2,
    )
    assert turn.seat == "agent2" and turn.state == 7.3
    assert turn.dialogue_with('"Fine."') == 'Turn 0: Ann Lee said: "Hello."\n\nTurn 1: Bo Ray said: "Fine."'


def test_the_published_parquet_layout_is_read(tmp_path):
    (turn,) = read_turns(published_parquet(tmp_path / "train_rl.parquet", [published_row()]))
    assert turn.system == "Choose a level."
    assert turn.agent2_state == 7.300000190734863  # float32, as stored
    (raw,) = read_turns(write(tmp_path / "rows.json", [published_row()]))
    assert turn.row_id == raw.row_id  # an id does not depend on the layout
    assert (turn.dialog, turn.turn, turn.env_id, turn.rollout) == (
        raw.dialog,
        raw.turn,
        raw.env_id,
        raw.rollout,
    )


def test_raw_rows_survive_both_layouts(tmp_path):
    rows = [
        published_row(),
        published_row(rollout=3, system="Be brief.", tag="hard"),
        published_row(row_id="mine", state={"agent1": {"score": 0}, "agent2": {"score": 10}}),
    ]
    turns = read_turns(write(tmp_path / "rows.json", rows))
    assert [t.system for t in turns] == [None, "Be brief.", None]
    assert rows_to_parquet(tmp_path / "rows.json", tmp_path / "deep" / "rows.parquet") == 3
    assert read_turns(tmp_path / "deep" / "rows.parquet") == turns
    for name in ("again.json", "again.jsonl"):
        write_turns(turns, tmp_path / name)
        assert read_turns(tmp_path / name) == turns
    columns = pq.read_table(tmp_path / "deep" / "rows.parquet").to_pylist()
    assert columns[1]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": rows[1]["instruction"]},
    ]
    assert columns[0]["reward_model"]["state_reward"] == {
        "agent1": {"score": 4.0},
        "agent2": {"score": 7.3},
        "step": 1,
    }
    assert columns[2]["extra_info"] == {
        **{"split": "train", "index": 2, "env_id": 17, "turn": 1, "rollout": 2, "row_id": "mine", "tag": None}
    }


def test_derived_ids_are_unique_and_do_not_depend_on_the_place(tmp_path):
    one, other = published_row(), published_row(rollout=5)
    forward = read_turns(write(tmp_path / "a.json", [one, other, one]))
    backward = read_turns(write(tmp_path / "b.json", [other, one]))
    ids = [t.row_id for t in forward]
    assert ids[2] == f"{ids[0]}#2" and len(set(ids)) == 3
    assert [t.row_id for t in backward] == [ids[1], ids[0]]


def test_an_id_given_twice_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [published_row(row_id="a"), published_row(row_id="a")])
    with pytest.raises(DataError, match=r"line 2, field 'row_id': 'a' is already used by .*line 1"):
        read_turns(path)


STATE = {"agent1": {"score": 4.0}, "agent2": {"score": 7.3}, "step": 1}


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"dialog": []}, "dialog", "is empty"),
        ({"dialog": "Turn 1: Bo Ray said:"}, "dialog", "list of strings"),
        ({"dialog": ['Turn 1: Bo Ray said: "Done."\n']}, r"dialog\[0\]", "expected the open line"),
        (
            {"dialog": ["Turn 1: Ann Lee said:"]},
            r"dialog\[0\]",
            "'Turn 1: Bo Ray said:' .agent2 speaks in turn 1.",
        ),
        ({"dialog": ["Turn 2: Bo Ray said:"]}, r"dialog\[0\]", "expected the open line"),
        ({"dialog": ["Turn 1: Bo Ray said: "]}, r"dialog\[0\]", "expected the open line"),
        ({"turn": 2}, r"dialog\[1\]", "'Turn 2: Ann Lee said:' .agent1 speaks in turn 2."),
        ({"turn": -1}, "turn", "at least 0"),
        ({"turn": "1"}, "turn", "whole number"),
        ({"state": {**STATE, "agent1": {"score": 10.01}}}, r"state\.agent1\.score", "0.0 to 10.0, got 10.01"),
        ({"state": {**STATE, "agent2": {"score": -0.5}}}, r"state\.agent2\.score", "got -0.5"),
        (
            {"state": {**STATE, "agent2": {"score": float("nan")}}},
            r"state\.agent2\.score",
            "expected a number",
        ),
        ({"state": {**STATE, "agent2": {"score": True}}}, r"state\.agent2\.score", "expected a number"),
        ({"state": {**STATE, "agent2": {}}}, r"state\.agent2\.score", "is missing"),
        ({"state": {"agent1": {"score": 1}}}, r"state\.agent2", "is missing"),
        ({"state": {**STATE, "agent3": {}}}, r"state\.agent3", "unknown field"),
        ({"state": 5}, "state", "expected an object"),
        ({"instruction": "  "}, "instruction", "is blank"),
        ({"agent1_goal": None}, "agent1_goal", "is missing"),
        ({"agent2_name": 3}, "agent2_name", "expected a string"),
        ({"agent1_name": "Ann\nTurn 9: Bo Ray said:"}, "agent1_name", "holds a line break or control character"),
        ({"env_id": 1.5}, "env_id", "whole number"),
        ({"rollout": None}, "rollout", "is missing"),
        ({"agent1_avg_score": "high"}, "agent1_avg_score", "expected a number"),
        ({"tags": "hard"}, "tags", "unknown field"),
        ({"tag": "all"}, "tag", "stands for all rows"),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_bad_row_stops_with_file_row_and_field(tmp_path, name, changes, field, problem):
    path = write(tmp_path / name, [published_row(), published_row(**changes)])
    word = "line" if name.endswith("l") else "row"
    with pytest.raises(DataError, match=f"{name}, {word} 2, field '{field}': .*{problem}"):
        read_turns(path)


def test_a_bad_parquet_row_stops_with_row_and_field(tmp_path):
    bad = published_row(state={**STATE, "agent1": {"score": 11.0}})
    path = published_parquet(tmp_path / "rows.parquet", [published_row(), bad])
    with pytest.raises(DataError, match=r"row 2, field 'reward_model\.state_reward\.agent1\.score'.*got 11"):
        read_turns(path)


def test_a_parquet_row_that_contradicts_itself_is_refused(tmp_path):
    table = pq.read_table(published_parquet(tmp_path / "rows.parquet", [published_row()])).to_pylist()
    table[0]["extra_info"]["turn"] = 3
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"field 'extra_info\.turn': is 3, but reward_model\.turn is 1"):
        read_turns(tmp_path / "rows.parquet")
    table[0]["prompt"].append({"role": "assistant", "content": "x"})
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"field 'prompt': .*'assistant'"):
        read_turns(tmp_path / "rows.parquet")


def test_messages_prefer_the_rows_own_system_prompt(tmp_path):
    plain, own = read_turns(write(tmp_path / "r.json", [published_row(), published_row(system="Be brief.")]))
    user = {"role": "user", "content": plain.instruction}
    assert chat_messages(plain, None) == [user]
    assert chat_messages(plain, "Stage.") == [{"role": "system", "content": "Stage."}, user]
    assert chat_messages(own, "Stage.") == [{"role": "system", "content": "Be brief."}, user]


def test_the_command_converts_and_reports_bad_rows(tmp_path):
    def run(*args):
        command = [sys.executable, "-m", "nemo_ampo.data.episodes", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    source, out = write(tmp_path / "rows.json", [published_row()]), tmp_path / "rows.parquet"
    done = run("--input", source, "--output", out)
    assert (done.returncode, done.stdout) == (0, f"1 rows -> {out}\n")
    assert len(read_turns(out)) == 1

    out.unlink()
    write(source, [published_row(), published_row(turn=4)])
    failed = run("--input", source, "--output", out)
    assert failed.returncode == 2 and failed.stderr.startswith(f"error: {source}, row 2, field")
    assert list(tmp_path.iterdir()) == [source]  # no partial output

    wrong = run("--input", source, "--output", tmp_path / "rows.txt")
    assert wrong.returncode == 2 and "must end in .parquet" in wrong.stderr
