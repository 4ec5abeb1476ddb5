"""The report of a SOTOPIA run: a table for the terminal, ``result.json``, ``table.csv`` and one HTML page.

Scores of a judge that is not called ``default`` go to ``result-NAME.json``, ``table-NAME.csv`` and ``report-NAME.html``.

The page loads nothing and runs nothing: dialogues come from models and are untrusted, so the template escapes
everything but the charts, which hold numbers only, and a content security policy forbids scripts and network.
A run with anything missing is written all the same, under a banner that says PARTIAL.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ampo.dialogue.records import Turn
from nemo_ampo.dialogue.scenarios import SEATS
from nemo_ampo.errors import FormatError, UserError
from nemo_ampo.files import write_once
from nemo_ampo.output.lock import hold_output
from nemo_ampo.reply.grammar import parse_reply
from nemo_ampo.reply.modes import MODES
from nemo_ampo.report.render import render_template
from nemo_ampo.report.sotopia.figures import (
    RANGES,
    Bar,
    _bar,
    _shown_counts,
    figures,
    forest,
    mode_bars,
    mode_colour,
    switch_rows,
)
from nemo_ampo.report.sotopia.titles import (
    ABSENT,
    COLUMN_TITLES,
    PAIRING_TITLES,
    VIEW_NOTES,
    dimension_table,
    mode_title,
    with_interval,
)
from nemo_ampo.sotopia.dimensions import DIMENSIONS, OVERALL
from nemo_ampo.sotopia.statistics import COLUMNS, Estimate
from nemo_ampo.sotopia.summary import ROLES, SUBSETS, RunSummary, Shown
from nemo_ampo.sotopia.tally import MODE_IDS, RELATIONSHIPS, seats_of_policy, shares

if TYPE_CHECKING:
    from rich.table import Table

PATIENCE_S = 30.0
RESULT_FILE, TABLE_FILE, PAGE_FILE = "result.json", "table.csv", "report.html"
CSV_COLUMNS = (
    *("view", "judge", "subset", "role", "dimension", "mean", "low", "high", "std"),
    *("episodes", "scenarios", "partial"),
)


@dataclass(frozen=True)
class Written:
    """The files of a report."""

    page: Path
    result: Path
    table: Path


def write_files(files: Written, record: Any, table: str, page: str) -> Written:
    """Write a report; one that another process writes under the same names comes before it or after it, never between."""
    if files.page in (files.result, files.table):
        raise UserError(f"--out: {files.page} would be the page and its numbers in one file; name the page, FILE.html")
    with hold_output(files.page, "--out", PATIENCE_S):
        write_once(files.result, json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
        write_once(files.table, table)
        write_once(files.page, page)
    return files


def write_report(summary: RunSummary, page: Path | None = None) -> Written:
    """Write the page and, beside it, ``result.json`` and ``table.csv``.

    Args:
        summary: of the run.
        page: HTML file; by default ``report.html`` (``report-JUDGE.html``) in the run's own folder, for an imported file
            in a folder of its name beside it.
    """
    folder = summary.path if summary.path.is_dir() else summary.path.with_suffix("")
    page = page or folder / with_suffix(PAGE_FILE, summary.suffix)
    result, table = (page.with_name(with_suffix(name, summary.suffix)) for name in (RESULT_FILE, TABLE_FILE))
    return write_files(Written(page, result, table), summary.as_json(), table_csv(summary), render(summary))


def with_suffix(name: str, suffix: str) -> str:
    """``report.html`` and ``-second`` give ``report-second.html``."""
    path = Path(name)
    return f"{path.stem}{suffix}{path.suffix}"


# --- tables ---------------------------------------------------------------------------------------


def table_csv(summary: RunSummary) -> str:
    """One line per subset, role and dimension, under :data:`CSV_COLUMNS`; empty where there is no number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for name in SUBSETS:
        subset = summary.subsets[name]
        for role in ROLES:
            for column, e in getattr(subset, role).items():
                numbers = ["" if value != value else repr(value) for value in (e.mean, e.low, e.high, e.std)]
                partial = str(summary.partial).lower()
                about = [summary.view, summary.judge or "", name, role, column]
                writer.writerow([*about, *numbers, subset.episodes, subset.scenarios, partial])
    return text.getvalue()


def score_table(summary: RunSummary) -> Table:
    """Mean and interval of every dimension, all and hard, for a terminal of 80 columns."""
    from rich.markup import escape

    pairing = PAIRING_TITLES.get(summary.pairing, summary.pairing)
    roles = (summary.role,) if summary.role == "average" else ("actor", "partner")
    table = dimension_table(
        f"SOTOPIA {escape(summary.name)} ({pairing}, view: {summary.view}, judge: {summary.judge or ABSENT})",
        "95 % intervals by scenario",
        roles,
    )
    for name in SUBSETS:
        subset = summary.subsets[name]
        table.add_row(f"[bold]{name}: {subset.episodes} episodes[/]")
        for column in COLUMNS:
            cells = [with_interval(getattr(subset, role)[column]) for role in roles]
            table.add_row(COLUMN_TITLES[column], *map(escape, cells), end_section=column == COLUMNS[-1])
    return table


def status_lines(summary: RunSummary) -> list[str]:
    """What the terminal says below the table: completeness, endings, tokens, modes."""
    counts = summary.tally
    lines = [f"PARTIAL: {'; '.join(summary.problems())}. These numbers must not be published."] if summary.partial else []
    expected = summary.expected if summary.expected is not None else counts.begun
    lines += [f"note      {note}" for note in summary.notes()]
    lines.append(f"episodes  {counts.scored} of {expected} scored")
    lines.append("ended by  " + ", ".join(f"{name} {number}" for name, number in sorted(counts.terminated_by.items())))
    if counts.tokens_per_turn is not None:
        lines.append(f"tokens    {counts.tokens_per_turn:.1f} per turn")
    if counts.uses_modes:
        mix = shares(counts.mode_by_subset["all"])
        lines.append("modes     " + ", ".join(f"{mode_title(k)} {mix[k]:.0%}" for k in MODE_IDS))
    if counts.failed_turns:
        lines.append("broken    " + ", ".join(f"{rule} {number}" for rule, number in sorted(counts.failed_turns.items())))
    return lines


# --- page -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TurnView:
    """One utterance of a dialogue, taken apart for reading.

    Attributes:
        turn: the record.
        policy: spoken by the evaluated policy.
        mode: badge; None for a speaker without modes.
        thinking: section name and text.
        hidden: what the model wrote beside its words, when it cannot be taken apart; None when nothing.
    """

    turn: Turn
    policy: bool
    mode: int | None
    thinking: tuple[tuple[str, str], ...]
    hidden: str | None


@dataclass(frozen=True)
class SideView:
    """One character's column of a dialogue: what only this character, and the reader, may know."""

    seat: str
    name: str
    goal: str
    role: str
    scores: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True)
class DialogueView:
    """A dialogue as the page shows it."""

    title: str
    reason: str
    ended: str
    goal: str
    sides: tuple[SideView, ...]
    turns: tuple[TurnView, ...]
    problem: str | None


def render(summary: RunSummary) -> str:
    """The page as text."""
    return render_template("sotopia.html.j2", page_context(summary))


def page_context(summary: RunSummary) -> dict[str, Any]:
    """Everything the template shows."""
    counts = summary.tally
    return {
        "title": summary.name,
        "pairing": PAIRING_TITLES.get(summary.pairing, summary.pairing),
        "view": summary.view,
        "view_note": VIEW_NOTES.get(summary.view, ""),
        "judge": judge_title(summary),
        "notes": summary.notes(),
        "partial": summary.partial,
        "problems": summary.problems(),
        "headlines": headlines(summary),
        "roles": (summary.role, *(role for role in ROLES if role != summary.role)),
        "columns": [(column, COLUMN_TITLES[column], RANGES[column]) for column in COLUMNS],
        "subsets": summary.subsets,
        "subset_names": SUBSETS,
        "mean": lambda e: ABSENT if e.mean != e.mean else f"{e.mean:.2f}",
        "interval": lambda e: "" if e.low != e.low else f"{e.low:.2f} to {e.high:.2f}",
        "forests": [(name, forest(summary, name)) for name in SUBSETS if summary.subsets[name].episodes],
        "seeds": seed_rows(summary),
        "uses_modes": counts.uses_modes,
        "mode_bars": mode_bars(counts),
        "mode_title": mode_title,
        "mode_colour": mode_colour,
        "mode_names": {k: mode.name for k, mode in MODES.items()},
        "mode_ids": MODE_IDS,
        "figures": figures(counts),
        "switches": switch_rows(counts),
        "counts": counts,
        "tokens_by_mode": [
            (k, counts.tokens_by_mode[k][0] / counts.tokens_by_mode[k][1])
            for k in MODE_IDS
            if k in counts.tokens_by_mode and counts.tokens_by_mode[k][0]
        ],
        "endings": _shown_counts(counts.terminated_by, counts.begun),
        "failures": [
            ("turns with a broken reply", sorted(counts.failed_turns.items())),
            (
                "episodes that could not be played",
                [(f"{kind} ({counts.error_examples[kind]})", n) for kind, n in sorted(counts.episode_errors.items())],
            ),
            ("episodes without scores", sorted(counts.unscored.items())),
            ("evaluator", [("answers asked for again", counts.judge_repeats)] if counts.judge_repeats else []),
        ],
        "dialogues": [dialogue_view(shown) for shown in summary.shown],
        "made_with": json.dumps(made_with(summary), indent=2, ensure_ascii=False) if summary.made_with else None,
    }


def made_with(summary: RunSummary) -> dict[str, Any]:
    """The protocol of the dialogues and of the scoring."""
    judge = {"judge": {"name": summary.judge, **summary.judged_with}} if summary.judge is not None else {}
    return {**summary.made_with, **judge}


def judge_title(summary: RunSummary) -> str:
    """Whose scores: the scoring's name and the judge's model, as far as they are known."""
    model = summary.judged_with.get("model")
    return (summary.judge or ABSENT) + (f" ({model})" if model else "")


@dataclass(frozen=True)
class ScoreCard:
    """One card at the top: a mean, its interval, and where it stands in its range, in percent."""

    title: str
    note: str
    value: str
    interval: str
    bar: Bar | None


def headlines(summary: RunSummary) -> list[ScoreCard]:
    """Goal and overall, all and hard."""
    cards = []
    for column in ("goal", OVERALL):
        for name in SUBSETS:
            subset = summary.subsets[name]
            e: Estimate = getattr(subset, summary.role)[column]
            absent = e.mean != e.mean
            low, high = RANGES[column]
            cards.append(
                ScoreCard(
                    title=f"{column}, {name}",
                    note=f"{subset.episodes} episodes of {subset.scenarios} scenarios; {low:.3g} to {high:.3g}",
                    value=ABSENT if absent else f"{e.mean:.2f}",
                    interval="" if e.low != e.low else f"95 % interval {e.low:.2f} to {e.high:.2f}",
                    bar=None if absent else _bar(column, e, "series-1"),
                )
            )
    return cards


def seed_rows(summary: RunSummary) -> list[tuple[int, str, str, str, str]]:
    """Seed, then goal and overall of all and hard in the headline's role; empty with a single seed."""
    by_seed = {name: summary.subsets[name].by_seed for name in SUBSETS}
    seeds = sorted({seed for means in by_seed.values() for seed in means})
    if len(seeds) < 2:
        return []
    rows = []
    for seed in seeds:
        means = {name: by_seed[name].get(seed, {}).get(summary.role, {}) for name in SUBSETS}
        cells = [means[name].get(column) for column in ("goal", OVERALL) for name in SUBSETS]
        rows.append((seed, *(ABSENT if value is None else f"{value:.2f}" for value in cells)))
    return rows  # type: ignore[return-value]


def dialogue_view(shown: Shown) -> DialogueView:
    """A dialogue taken apart. Each side holds its own goal only; nothing of one side stands in the other's."""
    episode, scores = shown.result.episode, shown.result.scores
    seats = seats_of_policy(episode)
    sides = tuple(
        SideView(
            seat=seat,
            name=episode.name(seat),
            goal=episode.goal(seat),
            role="policy" if seat in seats else "partner",
            scores=()
            if scores is None
            else tuple((COLUMN_TITLES[name], scores.of(seat)[name], _reasoning(scores, seat, name)) for name in DIMENSIONS),
        )
        for seat in SEATS
    )
    problem = episode.error
    if scores is None and shown.result.score_error is not None:
        problem = f"not scored: {shown.result.score_error.message}"
    about = [episode.codename.replace("_", " ")] if episode.codename else []
    about += [RELATIONSHIPS.get(episode.relationship, "")] if episode.relationship >= 0 else []
    about += ["hard"] if episode.hard else []
    where = f"pairing {episode.key.env_id}, seed {episode.key.seed}"
    where += "" if len(seats) > 1 else f", policy in seat {episode.key.seat[-1]}"
    return DialogueView(
        title=f"{where}{': ' if about else ''}{', '.join(about)}",
        reason=shown.reason,
        ended="not over" if episode.terminated_by is None else episode.terminated_by.value.replace("_", " "),
        goal=ABSENT if scores is None else " / ".join(f"{scores.of(seat)['goal']:g}" for seat in SEATS),
        sides=sides,
        turns=tuple(turn_view(turn, turn.seat in seats) for turn in episode.turns),
        problem=problem,
    )


def _reasoning(scores: Any, seat: str, name: str) -> str:
    reasons = scores.agent1_reasoning if seat == "agent1" else scores.agent2_reasoning
    return str(reasons.get(name, ""))


def turn_view(turn: Turn, policy: bool) -> TurnView:
    """An utterance with its thinking by section, or whole where it breaks the grammar."""
    thinking: Iterable[tuple[str, str]] = ()
    hidden = turn.reasoning
    if turn.mode is not None:
        try:
            thinking = parse_reply(turn.raw).thinking.items()
        except FormatError:
            hidden = turn.raw
    elif hidden is None and turn.raw.strip().strip('"').strip() != turn.text.strip():
        hidden = turn.raw or None
    return TurnView(turn, policy, turn.mode, tuple(thinking), hidden)
