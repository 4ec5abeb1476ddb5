"""Three or more SOTOPIA runs in one table, and score against tokens: what more thinking buys.

Made for one checkpoint at several settings of the mode dial, and as good for any set of runs of one view.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ampo.errors import DataError
from nemo_ampo.report.plots import SERIES_COLOURS, Line, line_chart
from nemo_ampo.report.render import render_template
from nemo_ampo.report.sotopia.figures import Figure, mode_colour
from nemo_ampo.report.sotopia.page import Written, judge_title, with_suffix, write_files
from nemo_ampo.report.sotopia.titles import ABSENT, mode_title, with_interval
from nemo_ampo.report.training.metrics_log import Series
from nemo_ampo.sotopia.dimensions import OVERALL
from nemo_ampo.sotopia.statistics import Estimate
from nemo_ampo.sotopia.summary import SUBSETS, RunSummary, without_nan
from nemo_ampo.sotopia.tally import MODE_IDS, shares

if TYPE_CHECKING:
    from rich.table import Table

PAGE_FILE = "overview.html"
CSV_COLUMNS = (
    *("run", "view", "judge", "partial", "role", "subset", "column", "mean", "low", "high", "episodes", "tokens_per_turn"),
    *(f"mode_{k}" for k in MODE_IDS),
)
SHOWN = ("goal", OVERALL)
COST_COLUMNS = ("tokens", "% 1-4, broken")


def check_same_view(runs: Sequence[RunSummary]) -> None:
    """Refuse runs whose scores cannot stand in one table.

    Raises:
        DataError: their characters knew different things of each other.
    """
    views = {run.view: run.name for run in runs}
    if len(views) > 1:
        shown = ", ".join(f"{name} with view {view}" for view, name in views.items())
        raise DataError(f"{shown}: what the characters knew differs, so the scores cannot be compared")


NOT_PROTOCOL = ("policy", "subsets", "episodes")
"""Keys in which two runs may differ: what is evaluated, and how much of it."""

LATER_KEYS = ("models", "structured", "tokenizer")
"""Keys that the first folders do not have, so that nothing can be said of a difference."""


def unlike(first: RunSummary, second: RunSummary) -> list[str]:
    """What but the policy differs in how two runs were made and scored, one sentence each; such scores do not tell the
    policies apart."""
    found = [f"{run.name} does not say with what protocol and judge it was made" for run in (first, second) if run.imported]
    if found:
        return found
    keys = sorted({*first.made_with, *second.made_with} - set(NOT_PROTOCOL))
    found += [_differing(key, first, second, first.made_with, second.made_with) for key in keys]
    if first.judged_with and second.judged_with:
        keys = sorted({*first.judged_with, *second.judged_with})
        found += [_differing(key, first, second, first.judged_with, second.judged_with, "judge's ") for key in keys]
    elif first.judge != second.judge:
        found.append(f"judge is {first.judge} in {first.name} and {second.judge} in {second.name}")
    return [sentence for sentence in found if sentence]


def _differing(
    key: str, first: RunSummary, second: RunSummary, ours: Mapping[str, Any], theirs: Mapping[str, Any], whose: str = ""
) -> str:
    one, other = ours.get(key), theirs.get(key)
    if one == other or (key in LATER_KEYS and not (key in ours and key in theirs)):
        return ""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        parts = sorted(part for part in {*one, *other} if one.get(part) != other.get(part))
        parts = [part for part in parts if part not in LATER_KEYS or (part in one and part in other)]
        if not parts:
            return ""
        return f"{whose}{key} differs between {first.name} and {second.name} ({', '.join(parts)})"
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        return f"{whose}{key} differs between {first.name} and {second.name}"
    return f"{whose}{key} is {one} in {first.name} and {other} in {second.name}"


def problems(runs: Sequence[RunSummary]) -> list[str]:
    """What makes a table of these runs unsafe: what each lacks, and what differs from the first one."""
    lacking = [f"{run.name}: {'; '.join(run.problems())}" for run in runs if run.partial]
    return [*lacking, *dict.fromkeys(sentence for run in runs[1:] for sentence in unlike(runs[0], run))]


def score(run: RunSummary, subset: str, column: str) -> Estimate:
    """A run's own score: of both agents in self-play, otherwise of the actor."""
    estimates: dict[str, Estimate] = getattr(run.subsets[subset], run.role)
    return estimates[column]


def overview_table(runs: Sequence[RunSummary]) -> Table:
    """Goal and overall with intervals, tokens and modes of each run, all above hard, for a terminal of 80 columns."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title="SOTOPIA, several runs", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("run", overflow="fold")
    table.add_column("", no_wrap=True)
    for heading in (*SHOWN, *COST_COLUMNS):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        name, *_, tokens, modes = cells(run)
        for i, subset in enumerate(SUBSETS):
            scores = [with_interval(score(run, subset, column)) for column in SHOWN]
            about = (name, tokens, modes) if i == 0 else ("", "", "")
            row = (about[0], subset, *scores, *about[1:])
            table.add_row(*map(escape, row), end_section=subset == SUBSETS[-1])
    return table


def columns() -> list[str]:
    """Headings of the table; the last one stands for the shares of modes 1 to 4 and of broken replies."""
    scores = [f"{column}, {subset}" for column in SHOWN for subset in SUBSETS]
    return ["run", *scores, *COST_COLUMNS]


def cells(run: RunSummary) -> list[str]:
    """One row under :func:`columns`."""
    tokens, mix = run.tally.tokens_per_turn, shares(run.tally.mode_by_subset["all"])
    return [
        f"{run.name} (PARTIAL)" if run.partial else run.name,
        *(with_interval(score(run, subset, column)) for column in SHOWN for subset in SUBSETS),
        ABSENT if tokens is None else f"{tokens:.1f}",
        " ".join(f"{100 * mix[k]:.0f}" for k in MODE_IDS) if mix else ABSENT,
    ]


def frontier(runs: Sequence[RunSummary], subset: str, column: str = "goal") -> Figure | None:
    """Score against tokens per reply, one point per run; None with fewer than two points."""
    points = [
        (round(run.tally.tokens_per_turn), score(run, subset, column).mean, run.name)
        for run in runs
        if run.tally.tokens_per_turn is not None and run.subsets[subset].episodes
    ]
    if len(points) < 2:
        return None
    ordered = sorted(points)
    path = Line("", "grid", Series(tuple(p[0] for p in ordered), tuple(p[1] for p in ordered)), markers=True)
    dots = [
        Line(name, SERIES_COLOURS[i % len(SERIES_COLOURS)], Series((tokens,), (value,)))
        for i, (tokens, value, name) in enumerate(points)
    ]
    legend = tuple((line.label, line.colour) for line in dots)
    return Figure(f"{column} against tokens, {subset} episodes", "mean tokens per reply", line_chart([path, *dots]), legend)


def overview_csv(runs: Sequence[RunSummary]) -> str:
    """One line per run, subset and score, under :data:`CSV_COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for run in runs:
        mix = shares(run.tally.mode_by_subset["all"])
        for subset in SUBSETS:
            for column in SHOWN:
                e = score(run, subset, column)
                numbers = ["" if value != value else repr(value) for value in (e.mean, e.low, e.high)]
                about = [
                    run.name,
                    run.view,
                    run.judge or "",
                    str(run.partial).lower(),
                    run.role,
                    subset,
                    column,
                    *numbers,
                    run.subsets[subset].episodes,
                ]
                writer.writerow([*about, run.tally.tokens_per_turn, *(mix.get(k, "") for k in MODE_IDS)])
    return text.getvalue()


def write_overview(runs: Sequence[RunSummary], page: Path | None = None) -> Written:
    """Write the page, and beside it the same numbers as JSON and CSV.

    Args:
        runs: at least two.
        page: HTML file; ``overview.html`` in the last run's folder by default.
    """
    last = runs[-1].path
    folder = last if last.is_dir() else last.with_suffix("")
    page = page or folder / with_suffix(PAGE_FILE, runs[-1].suffix)
    written = Written(page, page.with_suffix(".json"), page.with_suffix(".csv"))
    rendered = render_template("overview.html.j2", page_context(runs))
    return write_files(written, [_record(run) for run in runs], overview_csv(runs), rendered)


def _record(run: RunSummary) -> dict[str, Any]:
    scores = {subset: {column: without_nan(asdict(score(run, subset, column))) for column in SHOWN} for subset in SUBSETS}
    return {
        "name": run.name,
        "partial": run.partial,
        "problems": run.problems(),
        "notes": run.notes(),
        "view": run.view,
        "judge": {"name": run.judge, **run.judged_with},
        "pairing": run.pairing,
        "role": run.role,
        "scores": scores,
        "tokens_per_turn": run.tally.tokens_per_turn,
        "modes": {str(k): share for k, share in shares(run.tally.mode_by_subset["all"]).items()},
    }


def page_context(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """Everything the template shows."""
    drawn = [frontier(runs, subset, column) for column in SHOWN for subset in SUBSETS]
    return {
        "view": runs[0].view,
        "judges": list(dict.fromkeys(judge_title(run) for run in runs)),
        "partial": any(run.partial for run in runs),
        "problems": problems(runs),
        "notes": [f"{run.name}: {note}" for run in runs for note in run.notes()],
        "headings": columns(),
        "rows": [cells(run) for run in runs],
        "figures": [figure for figure in drawn if figure is not None],
        "mixes": [(run.name, shares(run.tally.mode_by_subset["all"])) for run in runs],
        "mode_ids": MODE_IDS,
        "mode_title": mode_title,
        "mode_colour": mode_colour,
    }
