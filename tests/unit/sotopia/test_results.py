"""The authors' result files give the authors' numbers, through the same path as our own runs."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_ampo.dialogue.records import Termination
from nemo_ampo.errors import DataError
from nemo_ampo.sotopia.results import ImportedResults
from nemo_ampo.sotopia.statistics import SubsetSummary, summarise
from nemo_ampo.sotopia.summary import read_summary, scored_episode

CASES = json.loads((Path(__file__).parents[2] / "golden" / "eval_result.json").read_text())["cases"]


def write(tmp_path: Path, episodes: list[dict[str, Any]]) -> Path:
    path = tmp_path / "batch=450_temp=0.7_run.json"
    path.write_text(json.dumps(episodes))
    return path


def assert_estimates(found: SubsetSummary, expected: dict[str, Any], prefix: str) -> None:
    assert found.episodes == expected[f"{prefix}episodes"]
    for role, key in (("actor", "actor"), ("partner", "partner"), ("average", "avg")):
        for name, want in expected[f"{prefix}{key}"].items():
            estimate = getattr(found, role)[name]
            for value, number in ((estimate.mean, want["mean"]), (estimate.std, want["std"])):
                assert math.isnan(value) if number is None else value == pytest.approx(number, abs=1e-9), (role, name)


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_reference_numbers(case: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, case["episodes"])
    results = list(ImportedResults(path, hard_ids=frozenset(case["hard_ids"])).results())
    scored = [scored_episode(r, r.scores) for r in results if r.scores is not None]
    assert_estimates(summarise(scored, resamples=50), case["expected"], "")
    assert_estimates(summarise([e for e in scored if e.hard], resamples=50), case["expected"], "hard_")


def test_a_failed_evaluation_makes_the_run_partial(tmp_path: Path) -> None:
    """The authors leave it out in silence (D12)."""
    case = next(c for c in CASES if c["name"] == "one_failed_evaluation")
    summary = read_summary(write(tmp_path, case["episodes"]), resamples=50)
    assert (summary.tally.begun, summary.tally.scored, summary.missing) == (3, 2, 448)
    assert summary.partial
    assert summary.problems() == ["447 episodes not in the file", "1 episode played and not scored (missing)"]


@pytest.mark.parametrize("changes", [{"rewards": [0, 0, -100]}, {"agent1_scores": {}, "agent2_scores": {}}])
def test_either_sign_of_failure_is_enough(tmp_path: Path, changes: dict[str, Any]) -> None:
    (result,) = ImportedResults(write(tmp_path, [record(**changes)])).results()
    assert result.scores is None
    assert result.score_error is not None


def record(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(CASES[0]["episodes"][0]) | changes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"agent2_scores": {**CASES[0]["episodes"][0]["agent2_scores"], "goal": ["why", 11]}},
            r"agent2_scores\.goal.*outside",
        ),
        ({"agent1_scores": {"goal": ["why", 3]}}, r"row 1, field 'agent1_scores\.believability'"),
        ({"actor_role": "agent3"}, r"row 1, field 'actor_role'"),
        ({"rewards": []}, r"row 1, field 'rewards'"),
        ({"env_id": None}, r"row 1, field 'env_id'"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        list(ImportedResults(write(tmp_path, [record(**changes)])).results())


def test_turns_modes_and_endings_are_read_back(tmp_path: Path) -> None:
    level_1 = 'Thinking Level: 1\n<|begin_of_answer|>\n"Hello."\n<|end_of_answer|>'
    dialog = ['Turn 0: Ann Lee said: "Hello."\n', 'Turn 1: Bo Ray said: "Well, I left the conversation"\n']
    cases = [
        record(dialog=dialog, fullout=[level_1, '"Well, I left the conversation"']),
        record(env_id=1, dialog=[dialog[0], "Turn 1: Bo Ray said:"], fullout=["Thinking Level: 1 cut", ""]),
        record(env_id=2, dialog=[dialog[0]], fullout=["plain words"]),
    ]
    first, second, third = (r.episode for r in ImportedResults(write(tmp_path, cases)).results())
    assert [(t.speaker, t.text, t.mode) for t in first.turns] == [
        ("Ann Lee", "Hello.", 1),
        ("Bo Ray", "Well, I left the conversation", None),
    ]
    assert [e.terminated_by for e in (first, second, third)] == [
        Termination.left,
        Termination.prompt_limit,
        Termination.max_turns,
    ]
    assert second.turns[0].mode == 0  # told to think, and broke the grammar
    assert third.turns[0].mode is None  # a plain speaker


def test_scenario_files_tell_situation_and_relationship(tmp_path: Path, folder: Path) -> None:
    names = {"agent1_name": "Ada Quill", "agent2_name": "Bo Reed"}
    path = write(tmp_path, [record(env_id=1, hard=False, **names)])
    summary = read_summary(path, sotopia_dir=folder, resamples=50)
    assert summary.scored[0].scenario == "E1"
    assert summary.scored[0].hard
    with pytest.raises(DataError, match="env_id 0 of the scenario files is about 'Cy Stone'"):
        read_summary(write(tmp_path, [record(env_id=0, **names)]), sotopia_dir=folder)
    with pytest.raises(DataError, match="77 is not in the scenario files"):
        read_summary(write(tmp_path, [record(env_id=77, **names)]), sotopia_dir=folder)


@pytest.mark.parametrize(("name", "missing"), [("four_self_chat", 450 - 4), ("both_roles", 900 - 6)])
def test_a_file_of_fewer_episodes_than_published_is_partial(name: str, missing: int, tmp_path: Path) -> None:
    case = next(c for c in CASES if c["name"] == name)
    summary = read_summary(write(tmp_path, case["episodes"]), resamples=50)
    assert summary.partial
    assert f"{missing} episodes not in the file" in summary.problems()


def test_all_episodes_make_a_complete_run(tmp_path: Path) -> None:
    summary = read_summary(write(tmp_path, [record(env_id=env_id) for env_id in range(450)]), resamples=50)
    assert not summary.partial


def test_a_row_given_twice_is_named(tmp_path: Path) -> None:
    rows = [record(), record(env_id=1), record()]
    with pytest.raises(DataError, match=r"row 3, field 'env_id': 0 with actor_role 'agent1' stands in .*row 1 already"):
        list(ImportedResults(write(tmp_path, rows)).results())
