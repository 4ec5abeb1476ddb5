from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sample_run import evaluation, write_ampo, write_bc

from nemo_ampo.errors import DataError
from nemo_ampo.report.training.inputs import in_checkpoint_order, parse_evaluation, read_run
from nemo_ampo.report.training.metrics_log import MetricsLog, Series, read_metrics
from nemo_ampo.report.training.samples import read_rollouts


def write_lines(path: Path, *rows: dict[str, Any], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def rollout(step: int, mode: int, tag: str | None = None, row_id: str = "r") -> dict[str, Any]:
    return {"step": step, "row_id": row_id, "tag": tag, "mode": mode, "text": f"step {step} mode {mode}"}


# --- metrics


def test_a_series_holds_only_the_steps_at_which_the_metric_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "kind": "train", "a": 1.0}\n'
        '{"step": 1, "kind": "train"}\n'
        '{"step": 1, "kind": "val", "a": 9.0}\n'
        '{"step": 2, "kind": "train"}\n'
        '{"step": 3, "kind": "train", "a": 2}\n'
    )
    log = read_metrics(path)
    assert log.series("a") == Series((0, 3), (1.0, 2))
    assert log.series("a", "val") == Series((1,), (9.0,))
    assert not log.series("never logged")
    assert log.counts("never logged") == Series((0, 1, 2, 3), (0.0, 0.0, 0.0, 0.0))
    assert log.num_steps == 4


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", {"step": 0, "kind": "train", "a": 1.0}, tail='{"step": 1, "ki')
    assert read_metrics(path).series("a").steps == (0,)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"kind": "train"}, "line 2: needs an integer 'step'"),
        ({"step": 1}, "line 2: needs an integer 'step' and a 'kind'"),
        ({"step": 1, "kind": "train", "a": "high"}, "line 2, metric 'a': not a number: 'high'"),
    ],
)
def test_a_bad_metrics_line_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", {"step": 0, "kind": "train"}, row)
    with pytest.raises(DataError, match=r"metrics\.jsonl") as error:
        read_metrics(path)
    assert said in str(error.value)


def test_ends_are_means_over_a_tenth() -> None:
    values = (1.0, 3.0, *[0.0] * 16, 5.0, 9.0)
    assert Series(tuple(range(20)), values).ends() == (2.0, 7.0)
    assert Series((7,), (4.0,)).ends() == (4.0, 4.0)


def test_names_come_from_every_kind_in_order() -> None:
    log = MetricsLog({"train": ((0, {"b/x": 1.0, "a": 2.0}),), "val": ((0, {"b/y": 1.0}),)})
    assert log.names("b/") == ["b/x", "b/y"]


# --- rollouts


def test_early_is_the_first_of_the_first_quarter_and_late_the_last_of_the_last(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rollouts.jsonl",
        rollout(0, 1, row_id="first"),
        rollout(0, 1, row_id="second"),
        rollout(4, 2),
        rollout(8, 1, row_id="last but one"),
        rollout(8, 1, row_id="last"),
        rollout(8, 0),
    )
    (pairs,) = read_rollouts(path).by_tag.values()
    assert [pair.mode for pair in pairs] == [1, 2, 0]
    one, two, broken = pairs
    assert one.early is not None and one.early.row_id == "first"
    assert one.late is not None and one.late.row_id == "last"
    assert (two.early, two.late) == (None, None)
    assert broken.early is None and broken.late is not None


def test_a_single_sample_is_not_shown_twice(tmp_path: Path) -> None:
    (pairs,) = read_rollouts(write_lines(tmp_path / "r.jsonl", rollout(0, 3))).by_tag.values()
    assert pairs[0].early is not None and pairs[0].late is None


def test_the_most_frequent_labels_are_kept_and_the_others_counted(tmp_path: Path) -> None:
    rows = [rollout(0, 1, tag) for tag in ("rare", "often", "often", "never shown", "often", "rare")]
    samples = read_rollouts(write_lines(tmp_path / "r.jsonl", *rows), max_tags=2)
    assert list(samples.by_tag) == ["often", "rare"]
    assert samples.left_out_tags == 1


def test_only_a_torn_last_rollout_is_forgiven(tmp_path: Path) -> None:
    whole = read_rollouts(write_lines(tmp_path / "a.jsonl", rollout(0, 1), tail='{"step": 1, "row'))
    assert list(whole.by_tag) == [""]
    bad = write_lines(tmp_path / "b.jsonl", rollout(0, 1), tail="not json\n")
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: not a JSON object"):
        read_rollouts(bad)


def test_a_rollout_without_text_is_named(tmp_path: Path) -> None:
    row = rollout(0, 1)
    del row["text"]
    with pytest.raises(DataError, match=r"line 1, field 'text': expected str, got None"):
        read_rollouts(write_lines(tmp_path / "r.jsonl", row))


# --- evaluations


def test_an_evaluation_keeps_absent_numbers_absent() -> None:
    data = evaluation("base", None)
    data["summary"]["all"]["reward"] = float("nan")
    summary = parse_evaluation(data, "base.json").summary["all"]
    assert summary.goal is None and summary.reward is None
    assert summary.valid_format == 0.0
    assert summary.mode_share == {1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0}


@pytest.mark.parametrize("missing", ["name", "summary", "samples"])
def test_an_incomplete_evaluation_is_refused(missing: str) -> None:
    data = evaluation("bc", 0.5)
    del data[missing]
    with pytest.raises(DataError, match=f"e.json, field '{missing}'"):
        parse_evaluation(data, "e.json")


def test_an_evaluation_needs_a_summary_of_all_prompts() -> None:
    data = evaluation("bc", 0.5)
    del data["summary"]["all"]
    with pytest.raises(DataError, match="has no 'all'"):
        parse_evaluation(data, "e.json")


def test_stages_come_in_their_order_and_other_checkpoints_by_name() -> None:
    names = ("other", "ampo", "base", "another", "bc")
    ordered = in_checkpoint_order([parse_evaluation(evaluation(name, 0.5), name) for name in names])
    assert [e.name for e in ordered] == ["base", "bc", "ampo", "another", "other"]


# --- folders


def test_a_root_holds_all_parts(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert run.bc is not None and run.bc.log.num_steps == 100
    assert run.ampo is not None and run.ampo.log.num_steps == 60
    assert run.ampo.samples is not None and list(run.ampo.samples.by_tag) == ["easy", "hard"]
    assert [e.name for e in run.evaluations] == ["base", "bc", "ampo"]


def test_a_stage_folder_is_recognised_by_its_metrics(tmp_path: Path) -> None:
    write_bc(tmp_path / "one", 10)
    write_ampo(tmp_path / "two", 2)
    one, two = read_run(tmp_path / "one"), read_run(tmp_path / "two")
    assert one.bc is not None and one.ampo is None
    assert two.ampo is not None and two.bc is None


def test_provenance_beside_evaluations_is_no_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "evaluate"
    folder.mkdir()
    (folder / "bc.json").write_text(json.dumps(evaluation("bc", 0.5)))
    (folder / "provenance.json").write_text("{}")
    assert [e.name for e in read_run(tmp_path).evaluations] == ["bc"]


def test_an_evaluations_own_folder_shows_its_results_also_partial_ones_and_nothing_else(tmp_path: Path) -> None:
    for name, folder in (("bc", tmp_path), ("ampo", tmp_path / "partial")):
        (tmp_path / "judge" / name).mkdir(parents=True)
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(evaluation(name, 0.5)))
    (tmp_path / "settings.json").write_text("[]")
    assert [e.name for e in read_run(tmp_path).evaluations] == ["bc", "ampo"]


def test_an_empty_folder_is_an_error_that_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing to report; expected metrics.jsonl"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_run(tmp_path / "typo")
