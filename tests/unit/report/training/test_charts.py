from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from nemo_ampo.algo.advantage import ModeTerm
from nemo_ampo.report.plots import Layer, Line, area_chart, bar_chart, line_chart, rolling_mean
from nemo_ampo.report.training import charts
from nemo_ampo.report.training.metrics_log import MetricsLog, Series, read_metrics


@pytest.fixture(scope="module")
def ampo_log(run_folder: Path) -> MetricsLog:
    return read_metrics(run_folder / "ampo" / "metrics.jsonl")


def log_of(*steps: dict[str, float]) -> MetricsLog:
    return MetricsLog({"train": tuple(enumerate(steps))})


def parsed(svg: str) -> ET.Element:
    """Inline SVG needs no namespaces in HTML; an XML parser wants the one prefix declared."""
    return ET.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))


# --- drawing


@pytest.mark.parametrize("points", [1, 2, 23, 24, 200])
def test_any_number_of_points_gives_one_element_in_page_colours(points: int) -> None:
    series = Series(tuple(range(points)), tuple(float(i % 7) for i in range(points)))
    shares = (0.25,) * points
    for svg in (
        line_chart([Line("a", "text", series), Line("b", "series-1", series, markers=True)]),
        area_chart(series.steps, [Layer("a", "mode-1", shares), Layer("b", "mode-2", shares)], percent=True),
    ):
        assert parsed(svg).tag == "svg"
        assert svg.count("<svg") == 1
        assert "var(--" in svg
        colours = set(re.findall(r"#[0-9a-f]{6}\b", svg))
        assert not colours, f"not replaced by variables: {colours}"


def test_a_chart_names_no_address_and_no_id_that_another_chart_could_have() -> None:
    one = line_chart([Line("a", "text", Series((0, 1), (0.0, 1.0)))])
    two = line_chart([Line("a", "text", Series((0, 1), (0.0, 2.0)))])
    assert "http" not in one
    ids = [set(re.findall(r'id="([^"]*)"', svg)) for svg in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    used = set(re.findall(r"#([^)\"]+)", one))
    assert used <= ids[0]


def test_the_same_numbers_give_the_same_bytes() -> None:
    lines = [Line("a", "text", Series((0, 1, 2), (0.5, 0.25, 1.0)))]
    assert line_chart(lines) == line_chart(lines)


def test_rolling_mean_by_hand() -> None:
    assert rolling_mean([3.0, 0.0, 3.0, 9.0], 1) == [1.5, 2.0, 4.0, 6.0]
    assert rolling_mean([3.0, 1.0], 0) == [3.0, 1.0]


def test_a_logarithmic_axis_is_only_used_where_it_exists() -> None:
    below_zero = [Line("a", "text", Series((0, 1), (0.0, 1.0)))]
    assert line_chart(below_zero, log=True) == line_chart(below_zero)
    above = [Line("a", "text", Series((0, 1), (0.01, 10.0)))]
    assert "0.01" in line_chart(above, log=True)


# --- panels


def test_every_panel_finds_its_metrics_in_a_real_log(ampo_log: MetricsLog, run_folder: Path) -> None:
    panels = [*charts.MODE_PANELS, *(panel for section in charts.AMPO_PANELS.values() for panel in section)]
    assert len(charts.draw(panels, ampo_log)) == len(panels)
    bc_log = read_metrics(run_folder / "bc" / "metrics.jsonl")
    assert len(charts.draw(charts.BC_PANELS, bc_log)) == len(charts.BC_PANELS)


def test_mode_shares_are_drawn_for_all_prompts_and_each_label(ampo_log: MetricsLog) -> None:
    assert [chart.title for chart in charts.mode_shares(ampo_log)] == [
        "Modes, all prompts",
        "Modes, easy",
        "Modes, hard",
    ]


def test_a_step_without_a_label_is_not_a_step_of_broken_replies() -> None:
    shares = {f"tag/easy/mode/{k}/share": 0.25 for k in range(1, 5)} | {"tag/easy/reward": 0.5}
    (chart,) = charts.mode_shares(log_of(shares, {}, shares))
    broken = next(entry for entry in chart.legend if entry.label == charts.BROKEN)
    assert broken.change == "0% → 0%"


def test_what_no_mode_accounts_for_is_broken_format() -> None:
    (chart,) = charts.mode_shares(log_of({"mode/1/share": 0.5, "mode/2/share": 0.2, "mode/3/share": 0, "mode/4/share": 0}))
    assert [entry.change for entry in chart.legend] == ["50%", "20%", "0%", "0%", "30%"]


def test_the_mode_term_is_split_into_why_and_why_not() -> None:
    step = {
        "mode_term/active_fraction": 0.75,
        "mode_term/active": 6.0,
        "mode_term/branch_reward": 5.0,
        "mode_term/branch_length": 1.0,
        "mode_term/mode_absent": 2.0,
    }
    chart = charts.mode_term(log_of(step))
    assert chart is not None
    assert [(entry.label, entry.change) for entry in chart.legend] == [
        ("active, by reward", "62%"),
        ("active, by length", "12%"),
        ("off: a mode unused", "25%"),
    ]


def test_every_reason_of_the_mode_term_has_words() -> None:
    for reason in ModeTerm:
        name = reason.name.lower()
        if reason is not ModeTerm.ACTIVE:
            chart = charts.mode_term(log_of({"mode_term/active_fraction": 0.0, f"mode_term/{name}": 2.0}))
            assert chart is not None
            assert chart.legend[0].label.startswith("off: ")


def test_time_outside_the_phases_is_called_other() -> None:
    chart = charts.phases(log_of({"time/rollout_s": 3.0, "time/update_s": 1.0, "time/step_s": 5.0}))
    assert chart is not None
    assert [(entry.label, entry.change) for entry in chart.legend] == [
        ("rollout", "3"),
        ("update", "1"),
        ("other", "1"),
    ]


def test_a_metric_that_was_never_logged_leaves_its_panel_out() -> None:
    assert charts.draw([charts.kl, charts.reward], log_of({"reward/mean": 0.5}))[0].title == "Reward"
    assert charts.mode_term(log_of({"reward/mean": 0.5})) is None
    assert charts.phases(log_of({"reward/mean": 0.5})) is None


def test_bars_by_turn_are_means_over_samples_of_the_last_quarter() -> None:
    """Steps 0..7; the last two count. Turn 1: 3 samples with share 1 of mode 1, then 1 sample with share 0."""
    early = {"reward/mean": 0.5, "turn/1/samples": 100.0, "turn/1/mode/4/share": 1.0}
    one = {"reward/mean": 0.5, "turn/1/samples": 3.0, "turn/1/mode/1/share": 1.0}
    two = {
        "reward/mean": 0.5,
        "turn/1/samples": 1.0,
        "turn/1/mode/2/share": 1.0,
        "turn/10/samples": 2.0,
        "turn/10/mode/3/share": 1.0,
    }
    chart = charts.modes_by_turn(log_of(*[early] * 6, one, two))
    assert chart is not None
    assert [entry.label for entry in chart.legend] == ["mode 1", "mode 2", "mode 3"]
    same = bar_chart(
        ["1", "10"],
        [Layer("", f"mode-{k}", values) for k, values in enumerate([(0.75, 0.0), (0.25, 0.0), (0.0, 1.0), (0.0, 0.0)], 1)]
        + [Layer("", "bad", (0.0, 0.0))],
    )
    assert chart.svg == same


def test_retries_are_drawn_per_step_from_running_totals() -> None:
    steps = [
        {"judge/calls": 10.0},
        {"judge/calls": 20.0, "judge/retries/timeout": 4.0},
        {"judge/calls": 30.0, "judge/retries/timeout": 5.0, "judge/retries/rate_limit": 2.0},
    ]
    chart = charts.judge_retries(log_of(*steps))
    assert chart is not None
    assert [(entry.label, entry.change) for entry in chart.legend] == [("timeout", "0 → 1"), ("rate limit", "0 → 2")]
    assert charts.judge_retries(log_of({"reward/mean": 0.5})) is None


def test_an_older_log_shows_the_log_probability_gap() -> None:
    chart = charts.mismatch(log_of({"engine/logprob_gap": 0.5}))
    assert chart is not None and chart.legend[0].label == "mean |difference|"
