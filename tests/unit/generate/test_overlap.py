"""Evaluation scenarios stay out of training rows, known by digests alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nemo_ampo.data.episodes import rows_to_parquet
from nemo_ampo.dialogue.opening import write_opening_rows
from nemo_ampo.errors import ConfigError, DataError
from nemo_ampo.generate.overlap import check_no_overlap, digest, evaluation_fingerprints, main, write_fingerprints
from nemo_ampo.generate.situations import from_sotopia
from nemo_ampo.world.pack import make_pack


@pytest.fixture(scope="session")
def real_folder() -> Path:
    path = Path(os.environ.get("NEMO_AMPO_SOTOPIA_DIR", Path(__file__).resolve().parents[4] / "shared" / "sotopia"))
    if not (path / "envs.json").is_file():
        reason = f"no SOTOPIA files in {path}; set NEMO_AMPO_SOTOPIA_DIR to their folder"
        print(reason)
        pytest.skip(reason)
    return path


def test_the_shipped_digests_are_those_of_the_real_set(real_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "digests.json"
    assert write_fingerprints(real_folder, path) == 90
    fresh = json.loads(path.read_text())["situations"]
    assert {s["key"] for s in fresh} == {f.key for f in evaluation_fingerprints()}
    assert {line for s in fresh for line in s["scenario"]} == {
        line for f in evaluation_fingerprints() for line in f.scenario
    }


def test_the_digests_hold_no_text() -> None:
    for known in evaluation_fingerprints():
        for value in (known.key, *known.scenario, *known.goals[0], *known.goals[1]):
            assert len(value) == 16
            assert int(value, 16) >= 0


def test_nothing_is_generated_from_the_real_set(real_folder: Path) -> None:
    with pytest.raises(ConfigError, match="all 90 situations belong to SOTOPIA's evaluation set"):
        from_sotopia(real_folder)


def test_renamed_keys_do_not_hide_a_situation(real_folder: Path, tmp_path: Path) -> None:
    """The same texts under other keys are still the test; a new situation beside them is not."""
    envs = json.loads((real_folder / "envs.json").read_text())
    combos = json.loads((real_folder / "env_agent_combos.json").read_text())
    renamed = {f"new-{key}": value | {"pk": f"new-{key}"} for key, value in envs.items()}
    own = next(iter(envs.values())) | {"pk": "own", "scenario": "Two divers share a boat.", "agent_goals": ["Dive", "Rest"]}
    renamed["own"] = own
    for combo in combos:
        combo["env_id"] = f"new-{combo['env_id']}"
    combos.append(combos[0] | {"pk": "own-combo", "env_id": "own"})
    files = {"envs.json": renamed, "env_agent_combos.json": combos, "sotopia_hard.json": []}
    files["agents.json"] = json.loads((real_folder / "agents.json").read_text())
    folder = tmp_path / "renamed"
    folder.mkdir()
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    found = from_sotopia(folder)
    assert [s.env_id for s in found.chosen] == [450]
    assert len(found.excluded) == 90


@pytest.mark.parametrize("view", ["sotopia", "reference"])
def test_every_row_made_from_the_real_set_is_found(real_folder: Path, tmp_path: Path, view: str) -> None:
    path = tmp_path / "rows.jsonl"
    write_opening_rows(real_folder, path, view=view, seats=("agent1", "agent2"))
    with pytest.raises(DataError, match="900 of 900 rows are of evaluation scenarios"):
        check_no_overlap(path)


def test_a_single_row_is_named_in_every_layout(real_folder: Path, tmp_path: Path) -> None:
    make_pack(tmp_path, 1, num_bc=20, num_rl=20, num_heldout=2)
    clean = [json.loads(line) for line in (tmp_path / "rl_train.jsonl").read_text().splitlines()]
    write_opening_rows(real_folder, tmp_path / "eval.jsonl", limit=1)
    test_row = json.loads((tmp_path / "eval.jsonl").read_text())
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in (*clean[:7], test_row, *clean[7:])))
    with pytest.raises(DataError, match=r"1 of 21 rows are of evaluation scenarios \(line 8\)"):
        check_no_overlap(mixed)
    rows_to_parquet(mixed, tmp_path / "mixed.parquet")
    with pytest.raises(DataError, match=r"\(row 8\)"):
        check_no_overlap(tmp_path / "mixed.parquet")
    cloning = [json.loads(line) for line in (tmp_path / "bc_train.jsonl").read_text().splitlines()]
    cloning[4]["instruction"] = test_row["instruction"]
    (tmp_path / "bc.json").write_text(json.dumps(cloning))
    with pytest.raises(DataError, match=r"\(row 5\)"):
        check_no_overlap(tmp_path / "bc.json")


def test_the_goals_alone_give_an_rl_row_away(real_folder: Path, tmp_path: Path) -> None:
    """Rewritten prompts do not help, nor do exchanged seats."""
    write_opening_rows(real_folder, tmp_path / "eval.jsonl", limit=1)
    row = json.loads((tmp_path / "eval.jsonl").read_text()) | {"instruction": "Speak."}
    path = tmp_path / "rows.jsonl"
    swapped = row | {"agent1_goal": row["agent2_goal"], "agent2_goal": row["agent1_goal"]}
    half = row | {"agent1_goal": "Win."}
    path.write_text("".join(json.dumps(r) + "\n" for r in (row, swapped, half)))
    with pytest.raises(DataError, match=r"2 of 3 rows .*\(line 1, line 2\)"):
        check_no_overlap(path)


def test_another_evaluation_folder_is_looked_for_too(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_opening_rows(folder, path)
    assert check_no_overlap(path) == 5
    with pytest.raises(DataError, match="5 of 5 rows"):
        check_no_overlap(path, folder)


def test_the_embedded_world_is_clean_and_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pack(tmp_path, 1, num_bc=10, num_rl=10, num_heldout=2)
    assert main(["--check", str(tmp_path / "bc_train.jsonl")]) == 0
    assert "10 rows, none of an evaluation scenario" in capsys.readouterr().out


def test_spacing_and_capitals_do_not_matter() -> None:
    assert digest("Two  Friends\tmeet. ") == digest("two friends meet.")
    assert digest("Two friends meet.") != digest("Two friends met.")
