from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from sample_run import evaluation

from nemo_ampo.report.training.inputs import parse_evaluation, read_run
from nemo_ampo.report.training.metrics_log import MetricsLog
from nemo_ampo.report.training.page import write_report
from nemo_ampo.report.training.tables import (
    ABSENT,
    EVALUATION_COLUMNS,
    evaluation_rows,
    evaluation_table,
    training_rows,
    training_table,
)


def printed(table: object, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def test_rows_go_label_by_label_through_the_checkpoints(run_folder: Path) -> None:
    rows = evaluation_rows(read_run(run_folder).evaluations)
    assert [row[:3] for row in rows] == [
        ["base *", "all", "64"],
        ["bc *", "all", "64"],
        ["ampo *", "all", "64"],
        ["base *", "easy", "32"],
        ["bc *", "easy", "32"],
        ["ampo *", "easy", "32"],
    ]
    assert rows[2][3:] == ["0.710", "0.710", "96%", "101.2", "25%", "25%", "25%", "20%", "3"]
    assert all(len(row) == len(EVALUATION_COLUMNS) for row in rows)


def test_an_evaluation_that_is_not_complete_is_marked_in_the_table_and_in_the_page(run_folder: Path) -> None:
    said = "* base is PARTIAL: 61 of 64 answers judged"
    assert said in printed(evaluation_table(read_run(run_folder).evaluations))
    assert said in write_report(run_folder).read_text(encoding="utf-8")
    whole = evaluation("base", 0.5)
    for summary in whole["summary"].values():
        summary["judge_failed"] = 0
    assert evaluation_rows([parse_evaluation(whole, "x")])[0][0] == "base"
    assert evaluation_rows([parse_evaluation(whole | {"planned": 65}, "x")])[0][0] == "base *", "not all were drawn"


def test_a_missing_number_is_marked_and_not_zero() -> None:
    row = evaluation_rows([parse_evaluation(evaluation("base", None), "x")])[0]
    assert row[EVALUATION_COLUMNS.index("goal")] == ABSENT


def test_the_evaluation_table_fits_a_terminal_of_80_columns(run_folder: Path) -> None:
    text = printed(evaluation_table(read_run(run_folder).evaluations))
    assert "…" not in text
    assert "ampo" in text and "0.710" in text


def test_a_name_is_printed_as_it_is() -> None:
    data = evaluation("[red]x[/red]", 0.5)
    assert "[red]x[/red]" in printed(evaluation_table([parse_evaluation(data, "x")]), width=200)


def test_training_rows_show_both_ends_with_the_meaning() -> None:
    log = MetricsLog({"train": ((0, {"reward/mean": 0.25}), (1, {"reward/mean": 0.5}))})
    (row,) = training_rows(log)
    assert (row.name, row.first, row.last) == ("reward/mean", "0.25", "0.5")
    assert row.description.startswith("mean reward")


def test_the_training_table_knows_every_metric_of_a_real_log(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert run.ampo is not None
    text = printed(training_table(run.ampo.log))
    for name in ("mode/4/share", "judge/latency_p95_s", "engine/logprob_gap", "time/step_s"):
        assert name in text, "the metric is missing from the log that step_metrics wrote"
