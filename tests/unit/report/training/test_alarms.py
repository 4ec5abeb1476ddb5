from __future__ import annotations

from pathlib import Path

from nemo_ampo.report.training.alarms import alarms, judge_figures
from nemo_ampo.report.training.inputs import read_run
from nemo_ampo.report.training.metrics_log import MetricsLog, read_metrics
from nemo_ampo.report.training.page import render


def log_of(*steps: dict[str, float]) -> MetricsLog:
    return MetricsLog({"train": tuple(enumerate(steps))})


def low(**modes: float) -> dict[str, float]:
    return {f"guard/{name}_low_steps": value for name, value in modes.items()}


def test_the_panel_by_hand() -> None:
    earlier = {"judge/requests": 50.0, "judge/calls": 50.0, "judge/verdicts": 50.0}
    last = {
        "judge/requests": 1000.0,
        "judge/verdicts": 990.0,
        "judge/calls": 1100.0,
        "judge/retries/rate_limit": 12.0,
        "judge/retries/timeout": 30.0,
        "judge/failures/timeout": 10.0,
        "judge/parse_failures": 11.0,
        "judge/cache_hits": 100.0,
        "judge/prompt_tokens": 2_345_678.0,
        "judge/completion_tokens": 98_765.0,
        "judge/cost_usd": 12.345,
        "judge/latency_p50_s": 0.25,
        "judge/latency_p95_s": 1.5,
    }
    tiles = {tile.title: (tile.value, tile.note, tile.bad) for tile in judge_figures(log_of(earlier, last))}
    assert tiles == {
        "Verdicts": ("990", "of 1,000 asked for", False),
        "Failed for good": ("10", "timeout 10", True),
        "Calls": ("1,100", "42 of them repeated", False),
        "Retries by cause": ("42", "timeout 30, rate limit 12", False),
        "Parse failures": ("11", "1.0% of the calls", True),
        "Cache hits": ("100", "8.3% of the replies", False),
        "Latency of a call": ("0.25 s", "median; 95th percentile 1.5 s", False),
        "Tokens": ("2.44 M", "2.35 M in, 98,765 out", False),
        "Cost": ("$12.35", "", False),
    }


def test_a_log_without_the_counts_has_no_panel() -> None:
    assert judge_figures(log_of({"reward/mean": 0.5})) == []


def test_a_healthy_run_has_no_alarm() -> None:
    healthy = {"guard/collapsed_modes": 0.0, "guard/masked_samples": 0.0, "policy/skipped_updates": 0.0}
    assert alarms(log_of(healthy, healthy)) == []


def test_the_collapse_names_its_modes_and_when_it_was_over() -> None:
    alarm = low(mode_1=2, mode_2=20, mode_3=0, mode_4=31) | {"guard/collapsed_modes": 2.0}
    (sentence,) = alarms(log_of({}, alarm))
    assert sentence.startswith("Mode 2 and mode 4 had almost died out by step 1 (")
    (over,) = alarms(log_of({}, alarm, low(mode_2=0, mode_4=0) | {"guard/collapsed_modes": 0.0}))
    assert "until step 1" in over


def test_failures_mismatch_and_skipped_updates_are_counted() -> None:
    step = {
        "guard/masked_samples": 3.0,
        "guard/skipped_groups": 1.0,
        "guard/judge_rounds": 2.0,
        "guard/mismatch_steps": 1.0,
        "mismatch/kl": 0.25,
        "policy/skipped_updates": 1.0,
    }
    found = " ".join(alarms(log_of(step, step)))
    assert "6 samples have no verdict" in found and "2 groups" in found and "4 further rounds" in found
    assert "at 2 steps; the largest mismatch/kl was 0.25" in found and "2 updates were skipped" in found


def test_the_page_shows_panel_and_alarms(run_folder: Path) -> None:
    log = read_metrics(run_folder / "ampo" / "metrics.jsonl")
    page = render(read_run(run_folder))
    for tile in judge_figures(log):
        assert tile.title in page and tile.value in page
    assert "What to look at" in page
    assert all(sentence in page for sentence in alarms(log))
