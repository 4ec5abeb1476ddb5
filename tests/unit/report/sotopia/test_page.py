"""A run's report says everything, leaks nothing, and never passes for complete when it is not."""

from __future__ import annotations

import csv
import html
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from sotopia_episodes import GOALS, NAMES, write_run
from typer.testing import CliRunner

from nemo_ampo.commands.cli import make_app
from nemo_ampo.commands.sotopia_report import report as make_report
from nemo_ampo.dialogue.records import Episode
from nemo_ampo.errors import DataError, UserError
from nemo_ampo.output.lock import hold_output
from nemo_ampo.report.sotopia import page as report
from nemo_ampo.report.sotopia.compare import compare_runs, comparison_csv, comparison_table
from nemo_ampo.report.sotopia.figures import RANGES, depth_changes
from nemo_ampo.report.sotopia.overview import overview_csv, overview_table
from nemo_ampo.report.sotopia.page import render, score_table, seed_rows, table_csv, write_report
from nemo_ampo.report.sotopia.titles import with_interval
from nemo_ampo.sotopia.records import EpisodeResult, EpisodeStore
from nemo_ampo.sotopia.statistics import Estimate
from nemo_ampo.sotopia.summary import RunSummary, read_summary
from nemo_ampo.sotopia.tally import MAX_FAILURE_KINDS, OTHER_FAILURES, Tally, tally


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
    with pytest.raises(DataError, match="several judges; choose one with --judge: default, other"):
        read_summary(run)
    assert run_cli(run, "--judge", "default").exit_code == 0
    first = report_files(run)
    partial = run_cli(run, "--judge", "other")
    assert partial.exit_code == 1
    assert "PARTIAL: 7 episodes played and not scored (not asked)" in partial.output
    assert report_files(run) == first
    assert json.loads((run / "result-other.json").read_text())["judge"]["name"] == "other"
    assert {row["judge"] for row in csv.DictReader((run / "table-other.csv").open())} == {"other"}
    assert "judge: other" in (run / "report-other.html").read_text()


def report_files(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("result.json", "report.html", "table.csv")]


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
    assert sum(switches[3, 1] for switches in counted.switches_by_turn.values()) == pairs
    seats = {index % 2 for index in counted.switches_by_turn}
    assert len(counted.switches_by_turn) > 3 and seats == {0, 1}
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
    assert "1 pairings and seats (all) have scores in one run only" in result.output


def test_different_views_are_not_compared(tmp_path: Path) -> None:
    a, b = (read_summary(write_run(tmp_path / name), resamples=50) for name in "ab")
    with pytest.raises(DataError, match="a with view sotopia, b with view reference"):
        compare_runs(a, replace(b, view="reference"))


def test_others_results_are_reported_beside_their_file(tmp_path: Path) -> None:
    golden = json.loads((Path(__file__).parents[3] / "golden" / "eval_result.json").read_text())
    path = tmp_path / "published.json"
    path.write_text(json.dumps(golden["cases"][0]["episodes"]))
    result = run_cli(path)
    assert result.exit_code == 1  # four episodes of 450
    assert "PARTIAL: 446 episodes not in the file" in result.output
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


def test_two_reports_of_one_name_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PATIENCE_S", 0.0)
    runs = [write_run(tmp_path / f"bias{i}", shift=float(i), seed=i) for i in range(3)]
    page = tmp_path / "out.html"
    with hold_output(page, "--out"):
        for number in (1, 2, 3):
            with pytest.raises(UserError, match=r"--out: .*out\.html is in use by another job"):
                make_report(runs[:number], page)
        assert [path.name for path in tmp_path.glob("out*")] == [], "none of the three files"
    make_report(runs, page)
    assert len(list(tmp_path.glob("out*"))) == 3


@pytest.mark.parametrize("name", ["result.json", "table.csv"])
def test_a_page_is_not_written_over_its_numbers(tmp_path: Path, name: str) -> None:
    runs = [write_run(tmp_path / f"bias{i}", shift=float(i), seed=i) for i in range(3)]
    for number in (1, 2, 3):
        with pytest.raises(UserError, match=r"--out: .*name the page, FILE\.html"):
            make_report(runs[:number], tmp_path / name)
    assert not (tmp_path / name).exists()


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


# What a reader could take for something else ------------------------------------------------------


def scenarios_file(run: Path, meant: str, pairings: int) -> None:
    counts = {"agents": 40, "environments": 90, "scenarios": pairings, "hard": 70}
    (run / "scenarios.json").write_text(json.dumps({"set": meant, "counts": counts}))


def test_scenarios_that_are_not_the_published_ones_make_a_run_partial_unless_they_are_our_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", episodes=3)
    scenarios_file(run, "published", 3)
    result = run_cli(run)
    assert result.exit_code == 1
    assert "PARTIAL: not the published set: 3 of 450 pairings." in result.output
    assert "not the published set: 3 of 450 pairings" in (run / "report.html").read_text()
    scenarios_file(run, "own", 3)
    result = run_cli(run)
    assert result.exit_code == 0
    assert "own scenarios, not the published set" in result.output
    scenarios_file(run, "published", 450)
    assert run_cli(run).exit_code == 0
    (run / "scenarios.json").write_text("{}")
    with pytest.raises(DataError, match=r"scenarios\.json: expected 'set' and 'counts'"):
        read_summary(run, resamples=50)


def test_a_run_of_the_hard_pairings_says_nothing_about_all(tmp_path: Path) -> None:
    hard = write_run(tmp_path / "hard", subsets={"1": "hard"})
    whole = write_run(tmp_path / "whole", subsets={"1": "all"})
    result = run_cli(hard)
    assert result.exit_code == 0
    assert "only the hard pairings of seed 1 were asked for" in result.output
    numbers = json.loads((hard / "result.json").read_text())["scores"]
    assert (numbers["all"]["episodes"], numbers["all"]["average"]["goal"]["mean"]) == (0, None)
    assert numbers["hard"]["episodes"] == 6
    page = (hard / "report.html").read_text()
    assert "only the hard pairings of seed 1 were asked for" in page

    assert run_cli(hard, whole, hard).exit_code == 0
    rows = {(r["run"], r["subset"], r["column"]): r["mean"] for r in csv.DictReader((hard / "overview.csv").open())}
    assert rows["hard", "all", "goal"] == "" and rows["whole", "all", "goal"] != "" and rows["hard", "hard", "goal"] != ""
    assert run_cli(whole, hard).exit_code == 0
    assert set(json.loads((hard / "compared-with-whole.json").read_text())["subsets"]) == {"hard"}


def test_seeds_of_different_subsets_are_not_mixed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", seeds=(1, 2), subsets={"1": "all", "2": "hard"})
    summary = read_summary(run, resamples=50)
    alone = read_summary(write_run(tmp_path / "alone", seeds=(1,), subsets={"1": "all"}), resamples=50)
    assert summary.subsets["all"].average["goal"].mean == alone.subsets["all"].average["goal"].mean
    assert set(summary.subsets["all"].by_seed) == {1}
    assert set(summary.subsets["hard"].by_seed) == {1, 2}
    assert [row[1] == "\N{EN DASH}" for row in seed_rows(summary)] == [False, True]


def test_means_by_seed_are_of_the_role_in_the_headline(tmp_path: Path) -> None:
    summary = read_summary(write_run(tmp_path / "run", pairing="partner", seeds=(1, 2), shift=3.0), resamples=50)
    assert summary.role == "actor"
    goals = [e.actor[-1] for e in summary.scored if e.seed == 2]
    assert next(row for row in seed_rows(summary) if row[0] == 2)[1] == f"{sum(goals) / len(goals):.2f}"
    assert "means of the actor" in render(summary)


MADE = {"leave_rule": "strict", "max_turns": 20, "scenarios": {"envs.json": "aa"}, "policy": {"model": "one"}}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"leave_rule": "reference"}, "leave_rule is strict in a and reference in b"),
        ({"max_turns": 10}, "max_turns is 20 in a and 10 in b"),
        ({"scenarios": {"envs.json": "bb"}}, "scenarios differs between a and b (envs.json)"),
        ({"partner": {"model": "other"}}, "partner differs between a and b"),
        ({"policy": {"model": "two"}}, None),
    ],
)
def test_what_else_than_the_policy_differs_is_named(tmp_path: Path, changes: dict, named: str | None) -> None:
    runs = [write_run(tmp_path / "a", **MADE), write_run(tmp_path / "b", **(MADE | changes))]
    for several in (runs, [*runs, write_run(tmp_path / "c", **MADE)]):
        result = run_cli(*several)
        assert result.exit_code == 0, result.output
        assert ("NOT ALIKE" in result.output) == (named is not None)
        assert named is None or named in " ".join(result.output.split())
    page = (tmp_path / "b" / "compared-with-a.html").read_text()
    assert ("NOT ALIKE" in page) == (named is not None)


def test_scores_of_different_judges_are_named_in_a_comparison(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, **MADE) for name in ("a", "b")]
    for run, model in zip(runs, ("strict-judge", "kind-judge"), strict=True):
        (run / "judge-default.json").write_text(json.dumps({"model": model, "seed": None}))
    result = run_cli(*runs)
    assert "judge's model is strict-judge in a and kind-judge in b" in " ".join(result.output.split())
    run_cli(runs[0])
    assert json.loads((runs[0] / "result.json").read_text())["judge"] == {
        "name": "default",
        "model": "strict-judge",
        "seed": None,
    }


def test_every_table_names_view_and_judge(tmp_path: Path) -> None:
    a, b = (read_summary(write_run(tmp_path / name), resamples=50) for name in "ab")
    b = replace(b, judge="second")
    rows = list(csv.DictReader(table_csv(b).splitlines()))
    assert {(row["view"], row["judge"]) for row in rows} == {("sotopia", "second")}
    rows = list(csv.DictReader(comparison_csv(compare_runs(a, b, resamples=50)).splitlines()))
    assert {(row["view"], row["first_judge"], row["second_judge"]) for row in rows} == {("sotopia", "default", "second")}
    rows = list(csv.DictReader(overview_csv([a, b]).splitlines()))
    assert {(row["run"], row["view"], row["judge"]) for row in rows} == {
        ("a", "sotopia", "default"),
        ("b", "sotopia", "second"),
    }


def printed(table: object) -> str:
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


LONGEST = {column: Estimate(*[max(limits, key=lambda v: len(f"{v:.2f}"))] * 3, 0.0) for column, limits in RANGES.items()}


def widest(summary: RunSummary) -> RunSummary:
    """The same run with the longest numbers there can be."""

    def stretched(subset):
        return replace(subset, **dict.fromkeys(("actor", "partner", "average"), LONGEST))

    return replace(summary, subsets={name: stretched(subset) for name, subset in summary.subsets.items()})


def test_every_number_can_be_read_at_80_columns(tmp_path: Path) -> None:
    runs = [
        widest(read_summary(write_run(tmp_path / f"a-run-with-a-long-name-{pairing}", pairing=pairing), resamples=50))
        for pairing in ("self_play", "partner", "api")
    ]
    for run in runs:
        roles = 1 if run.role == "average" else 2
        shown = printed(score_table(run))
        assert shown.count(with_interval(LONGEST["secret"])) == 2 * 2 * roles  # and social rules
        assert shown.count(with_interval(LONGEST["overall"])) == 2 * roles
    shown = printed(overview_table(runs))
    assert shown.count(with_interval(LONGEST["goal"])) == shown.count(with_interval(LONGEST["overall"])) == 2 * 3
    for run in runs:
        assert f"{run.tally.tokens_per_turn:.1f}" in shown
    compared = compare_runs(runs[1], runs[2], resamples=50)
    text = printed(comparison_table(compared))
    for difference in compared.subsets["hard"].actor.values():
        assert f"[{difference.low:+.2f}, {difference.high:+.2f}]" in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text + shown


def test_failures_are_counted_by_kind_with_one_example(tmp_path: Path) -> None:
    results = all_results(write_run(tmp_path / "run"))
    messages = [f"turn {i % 7}, agent1 (Ada Quill): status 503: request {i} was dropped" for i in range(3)]
    failed = [replace(results[0], scores=None, episode=replace(results[0].episode, error=message)) for message in messages]
    counted = tally(failed)
    assert dict(counted.episode_errors) == {"status 503": 3}
    assert counted.as_json()["failures"]["episodes"] == {"status 503": {"episodes": 3, "example": messages[0]}}
    endless = [replace(failed[0], episode=replace(results[0].episode, error=f"oddity number {i}")) for i in range(1000)]
    counted = tally(endless)
    assert len(counted.episode_errors) == len(counted.error_examples) == MAX_FAILURE_KINDS + 1
    assert counted.episode_errors[OTHER_FAILURES] == 1000 - MAX_FAILURE_KINDS


def test_how_the_mode_moves_on_from_each_turn() -> None:
    turns = ({(1, 3): 3, (3, 1): 1}, {(4, 4): 2, (4, 0): 5}, {(0, 2): 1})
    counted = Tally(switches_by_turn={2 * i: Counter(switches) for i, switches in enumerate(turns)})
    assert depth_changes(counted) == {0: {1: 0.75, 0: 0.0, -1: 0.25}, 2: {1: 0.0, 0: 1.0, -1: 0.0}}
    assert counted.as_json()["modes"]["switches_by_turn"]["2"] == {"4": {"0": 5 / 7, "1": 0, "2": 0, "3": 0, "4": 2 / 7}}
