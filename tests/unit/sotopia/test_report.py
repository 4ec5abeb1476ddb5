"""A run's report says everything, leaks nothing, and never passes for complete when it is not."""

from __future__ import annotations

import csv
import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from sotopia_episodes import GOALS, NAMES, write_run
from typer.testing import CliRunner

from nemo_ampo.cli import make_app
from nemo_ampo.errors import DataError, UserError
from nemo_ampo.sotopia.compare import compare_runs
from nemo_ampo.sotopia.records import Episode, EpisodeResult, EpisodeStore
from nemo_ampo.sotopia.report import render, table_csv, write_report
from nemo_ampo.sotopia.summary import read_summary
from nemo_ampo.sotopia.tally import tally


def run_cli(*arguments: object):
    return CliRunner().invoke(make_app(), ["report", *map(str, arguments)])


def test_the_command_writes_page_json_and_csv_that_agree(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", seeds=(1, 2))
    result = run_cli(run)
    assert result.exit_code == 0, result.output
    assert "24 of 24 scored" in result.output
    numbers = json.loads((run / "result.json").read_text())
    assert not numbers["partial"]
    goal = numbers["scores"]["hard"]["average"]["goal"]
    assert goal["low"] < goal["mean"] < goal["high"]
    rows = list(csv.DictReader((run / "table.csv").open()))
    (row,) = [r for r in rows if (r["subset"], r["role"], r["dimension"]) == ("hard", "average", "goal")]
    assert float(row["mean"]) == goal["mean"]
    assert (row["episodes"], row["scenarios"], row["partial"]) == ("12", "2", "false")
    page = (run / "report.html").read_text()
    assert f"{goal['mean']:.2f}" in page
    assert "PARTIAL" not in page
    assert set(numbers["scores"]["all"]["by_seed"]) == {"1", "2"}


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        ({"unscored": (3,)}, "1 episode played and not scored (parse)"),
        ({"failed": (0, 5)}, "2 episodes could not be played"),
        ({"expected": 15}, "3 episodes never begun"),
    ],
)
def test_anything_missing_marks_the_run_partial(tmp_path: Path, made: dict, problem: str) -> None:
    run = write_run(tmp_path / "run", **made)
    result = run_cli(run)
    assert result.exit_code == 1
    assert f"PARTIAL: {problem}" in result.output
    assert json.loads((run / "result.json").read_text())["problems"] == [problem]
    page = (run / "report.html").read_text()
    assert "<strong>PARTIAL</strong>" in page
    assert html.escape(problem) in page


def test_a_killed_episode_is_unfinished_not_lost(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = next((run / "episodes").rglob("0004.jsonl"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:30])
    summary = read_summary(run, resamples=50)
    assert summary.problems() == ["1 episode begun and not over"]
    assert summary.tally.scored == 11


def test_scores_of_two_judges_are_never_mixed(tmp_path: Path) -> None:
    """A second scoring that got half way must be named or left alone."""
    run = write_run(tmp_path / "run")
    store = EpisodeStore(run)
    for result in list(store.results())[:5]:
        store.add_scores(result.episode.key, replace(result.scores, judge="other"))
    with pytest.raises(DataError, match="several judges; choose one with --judge: other, rules"):
        read_summary(run)
    assert run_cli(run, "--judge", "rules").exit_code == 0
    partial = run_cli(run, "--judge", "other")
    assert partial.exit_code == 1
    assert "PARTIAL: 7 episodes played and not scored (not asked)" in partial.output


def test_a_run_of_one_easy_scenario_has_means_and_no_intervals(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", episodes=3)
    assert run_cli(run).exit_code == 0
    numbers = json.loads((run / "result.json").read_text())
    goal = numbers["scores"]["all"]["average"]["goal"]
    assert goal["mean"] is not None
    assert goal["low"] is None
    assert numbers["scores"]["hard"]["average"]["goal"]["mean"] is None


def test_speakers_without_modes_have_no_mode_charts(tmp_path: Path) -> None:
    summary = read_summary(write_run(tmp_path / "run", pairing="partner"), resamples=50)
    plain = replace(
        summary, tally=tally([replace(r, episode=without_modes(r.episode)) for r in all_results(tmp_path / "run")])
    )
    assert "Which mode is chosen" in render(summary)
    assert "Which mode is chosen" not in render(plain)
    assert "Mode switches" not in render(plain)


def all_results(run: Path) -> list[EpisodeResult]:
    return list(EpisodeStore(run).results())


def without_modes(episode: Episode) -> Episode:
    return replace(episode, turns=tuple(replace(turn, mode=None) for turn in episode.turns))


def test_counts_are_those_of_the_episodes(tmp_path: Path) -> None:
    store = EpisodeStore(write_run(tmp_path / "run", pairing="partner"))
    results = list(store.results())
    counted = tally(results)
    policy = [t for r in results for t in r.episode.turns if t.seat == r.episode.key.seat]
    assert counted.turns == len(policy)
    assert counted.partner_turns == sum(len(r.episode.turns) for r in results) - len(policy)
    assert counted.tokens == sum(t.completion_tokens for t in policy)
    assert counted.mode_by_subset["all"][3] == sum(t.mode == 3 for t in policy)
    assert sum(n for by_turn in counted.mode_by_turn.values() for n in by_turn.values()) == len(policy)
    pairs = 0
    for r in results:
        own = [t.mode for t in r.episode.turns if t.seat == r.episode.key.seat]
        pairs += sum(a == 3 and b == 1 for a, b in pairwise(own))
    assert counted.switches[3, 1] == pairs
    asked_twice = [replace(r, scores=replace(r.scores, tries=3)) for r in results[:2]]
    assert tally([*asked_twice, *results[2:]]).judge_repeats == 4
    assert counted.failed_turns["tags"] == sum(t.mode == 0 for t in policy)


def test_both_seats_are_the_policy_in_self_play(tmp_path: Path) -> None:
    results = list(EpisodeStore(write_run(tmp_path / "run")).results())
    assert tally(results).turns == sum(len(r.episode.turns) for r in results)
    assert tally(results).partner_turns == 0


class Columns(HTMLParser):
    """Text of each ``data-seat`` column, and everything that a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.seat = 0, None
        self.text: dict[str, str] = {"agent1": "", "agent2": ""}
        self.active: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        if tag in ("script", "link", "img", "iframe", "object") or {"src", "onload", "onclick"} & set(names):
            self.active.append(tag)
        if tag == "div":
            if self.seat is not None:
                self.depth += 1
            elif names.get("data-seat"):
                self.seat, self.depth = names["data-seat"], 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self.seat is not None:
            self.depth -= 1
            if self.depth == 0:
                self.seat = None

    def handle_data(self, data: str) -> None:
        if self.seat is not None:
            self.text[self.seat] += data


def test_no_goal_stands_in_the_other_ones_column(tmp_path: Path) -> None:
    parser = Columns()
    parser.feed(render(read_summary(write_run(tmp_path / "run"), resamples=50)))
    for seat, other in (("agent1", "agent2"), ("agent2", "agent1")):
        assert GOALS[seat] in parser.text[seat]
        assert GOALS[other] not in parser.text[seat]
        assert NAMES[other] not in parser.text[seat]


def test_what_a_model_said_stays_text(tmp_path: Path) -> None:
    summary = read_summary(write_run(tmp_path / "run"), resamples=50)
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    shown = summary.shown[0]
    episode = shown.result.episode
    turn = replace(episode.turns[0], text=attack, raw=attack, mode=0, failed="level")
    result = replace(shown.result, episode=replace(episode, turns=(turn,), agent1_goal=attack))
    page = render(replace(summary, shown=(replace(shown, result=result),), name=attack))
    parser = Columns()
    parser.feed(page)
    assert parser.active == []
    assert html.escape(attack, quote=False) in page
    assert re.search(r"https?://(?!www\.w3\.org)", page) is None


def test_thinking_is_folded_and_modes_are_badges(tmp_path: Path) -> None:
    page = render(read_summary(write_run(tmp_path / "run"), resamples=50))
    thinking = re.search(r"<details><summary>thinking</summary>.*?</details>", page, re.DOTALL)
    assert thinking is not None
    assert "a thought about Strategy" in page
    assert "a thought about" not in re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    assert re.search(r'<span class="badge"[^>]*>mode 3</span>', page)


def test_every_dimension_is_in_the_csv(tmp_path: Path) -> None:
    rows = list(csv.DictReader(table_csv(read_summary(write_run(tmp_path / "run"), resamples=50)).splitlines()))
    assert len(rows) == 2 * 3 * 8


def test_two_runs_are_compared(tmp_path: Path) -> None:
    first = write_run(tmp_path / "before", episodes=30)
    second = write_run(tmp_path / "after", episodes=30, shift=4.0, seed=1)
    result = run_cli(first, second)
    assert result.exit_code == 0, result.output
    numbers = json.loads((second / "compared-with-before.json").read_text())
    goal = numbers["subsets"]["all"]["actor"]["goal"]
    assert goal["low"] > 1
    assert goal["p"] == 2 / 2**10  # ten scenarios, all in favour
    assert numbers["subsets"]["hard"]["pairs"] == 15
    assert (second / "compared-with-before.csv").read_text().count("\n") == 1 + 2 * 3 * 8
    page = (second / "compared-with-before.html").read_text()
    assert "after" in page
    assert "PARTIAL" not in page


def test_a_comparison_with_a_partial_run_is_partial(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", unscored=(2,))
    result = run_cli(first, second)
    assert result.exit_code == 1
    assert "PARTIAL: b: 1 episode played and not scored (parse)" in result.output
    assert "1 pairings and seats have scores in one run only" in result.output


def test_different_views_are_not_compared(tmp_path: Path) -> None:
    a, b = (read_summary(write_run(tmp_path / name), resamples=50) for name in "ab")
    with pytest.raises(DataError, match="a with view sotopia, b with view reference"):
        compare_runs(a, replace(b, view="reference"))


def test_others_results_are_reported_beside_their_file(tmp_path: Path) -> None:
    golden = json.loads((Path(__file__).parents[2] / "golden" / "eval_result.json").read_text())
    path = tmp_path / "published.json"
    path.write_text(json.dumps(golden["cases"][0]["episodes"]))
    result = run_cli(path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "published" / "report.html").is_file()
    assert json.loads((tmp_path / "published" / "result.json").read_text())["view"] == "reference"


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: not a SOTOPIA result"):
        CliRunner().invoke(make_app(), ["report", str(run), str(tmp_path / "empty")], catch_exceptions=False)
    with pytest.raises(DataError):
        read_summary(tmp_path / "empty")


def test_an_explicit_page_keeps_its_neighbours_with_it(tmp_path: Path) -> None:
    written = write_report(read_summary(write_run(tmp_path / "run"), resamples=50), tmp_path / "out" / "page.html")
    assert [p.parent.name for p in (written.page, written.result, written.table)] == ["out"] * 3


def test_many_runs_stand_in_one_table_with_score_against_tokens(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"bias{i}", shift=float(i), seed=i) for i in range(3)]
    result = run_cli(*runs)
    assert result.exit_code == 0, result.output
    records = json.loads((runs[-1] / "overview.json").read_text())
    assert [r["name"] for r in records] == ["bias0", "bias1", "bias2"]
    for run, record in zip(runs, records, strict=True):
        summary = read_summary(run)
        assert record["scores"]["hard"]["goal"]["mean"] == summary.subsets["hard"].average["goal"].mean
        assert record["tokens_per_turn"] == summary.tally.tokens_per_turn
    page = (runs[-1] / "overview.html").read_text()
    assert page.count("<svg") == 4
    assert len(list(csv.DictReader((runs[-1] / "overview.csv").open()))) == 3 * 2 * 2
    assert run_cli(*runs, write_run(tmp_path / "cut", unscored=(1,))).exit_code == 1
