"""Two SOTOPIA runs side by side: paired differences with intervals and p-values, on the terminal and as files."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ampo.errors import DataError
from nemo_ampo.report.render import render_template
from nemo_ampo.report.sotopia.figures import RANGES, Bar, mode_colour
from nemo_ampo.report.sotopia.overview import check_same_view, unlike
from nemo_ampo.report.sotopia.page import Written, judge_title, write_files
from nemo_ampo.report.sotopia.titles import COLUMN_TITLES, dimension_table, mode_title
from nemo_ampo.sotopia.statistics import COLUMNS, RESAMPLES, Comparison, Difference, compare
from nemo_ampo.sotopia.summary import ROLES, SUBSETS, RunSummary, without_nan
from nemo_ampo.sotopia.tally import MODE_IDS, shares

if TYPE_CHECKING:
    from rich.table import Table

SIGNIFICANT = 0.05
CSV_COLUMNS = (
    *("view", "first_judge", "second_judge", "subset", "role", "dimension"),
    *("first", "second", "difference", "low", "high", "p", "pairs", "scenarios"),
)


@dataclass(frozen=True)
class RunComparison:
    """Second run against first.

    Attributes:
        first, second: the runs.
        subsets: ``all`` and ``hard``, each where both runs have such episodes.
    """

    first: RunSummary
    second: RunSummary
    subsets: dict[str, Comparison]

    @property
    def role(self) -> str:
        """Whose scores are compared: both agents' where both runs are self-play, otherwise the actor's."""
        return self.first.role if self.first.role == self.second.role else "actor"

    @property
    def partial(self) -> bool:
        """True when either run lacks scores."""
        return self.first.partial or self.second.partial

    def problems(self) -> list[str]:
        """What makes the comparison unsafe, one sentence each."""
        found = [f"{run.name}: {'; '.join(run.problems())}" for run in (self.first, self.second) if run.partial]
        found += unlike(self.first, self.second)
        for name, subset in list(self.subsets.items())[:1]:
            if subset.unpaired:
                found.append(f"{subset.unpaired} pairings and seats ({name}) have scores in one run only and are left out")
        return found

    def as_json(self) -> dict[str, Any]:
        """Content of the JSON file."""
        return {
            "first": self.first.name,
            "second": self.second.name,
            "partial": self.partial,
            "problems": self.problems(),
            "view": self.first.view,
            "judges": [{"name": run.judge, **run.judged_with} for run in (self.first, self.second)],
            "headline_role": self.role,
            "subsets": {name: without_nan(asdict(subset)) for name, subset in self.subsets.items()},
        }


def compare_runs(first: RunSummary, second: RunSummary, seed: int = 0, resamples: int = RESAMPLES) -> RunComparison:
    """Compare two runs over the pairings and seats both have.

    Raises:
        DataError: the runs were made in different views, or share no scored episode of one subset.
    """
    check_same_view((first, second))
    subsets = {}
    for name in SUBSETS:
        ours, theirs = (run.of_subset(name) for run in (first, second))
        if ours and theirs:
            subsets[name] = compare(ours, theirs, seed, resamples)
    if not subsets:
        raise DataError(
            f"{first.name} and {second.name} have no scored episodes of the same subset; nothing can be compared"
        )
    return RunComparison(first, second, subsets)


def comparison_table(comparison: RunComparison) -> Table:
    """Means, difference, interval and p of each dimension, for a terminal. A star marks p < 0.05."""
    from rich.markup import escape

    table = dimension_table(
        f"SOTOPIA {escape(comparison.second.name)} against {escape(comparison.first.name)} ({comparison.role})",
        "difference: second minus first, of pairs; * p < 0.05, not corrected",
        ("first", "second", "difference", "95 % interval", "p"),
    )
    for name, subset in comparison.subsets.items():
        differences: dict[str, Difference] = getattr(subset, comparison.role)
        table.add_row(f"[bold]{name}: {subset.pairs} pairs[/]")
        for column, d in differences.items():
            table.add_row(COLUMN_TITLES[column], *map(escape, _cells(d)), end_section=column == COLUMNS[-1])
    return table


def _cells(d: Difference) -> tuple[str, ...]:
    interval = "" if d.low != d.low else f"[{d.low:+.2f}, {d.high:+.2f}]"
    return f"{d.first:.2f}", f"{d.second:.2f}", f"{d.mean:+.2f}", interval, show_p(d.p)


def show_p(p: float) -> str:
    """A p-value with three decimals, a star below 0.05."""
    shown = "<0.001" if p < 0.001 else f"{p:.3f}"
    return f"{shown} *" if p < SIGNIFICANT else f"{shown}  "


def comparison_csv(comparison: RunComparison) -> str:
    """One line per subset, role and dimension, under :data:`CSV_COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for name, subset in comparison.subsets.items():
        for role in ROLES:
            for column, d in getattr(subset, role).items():
                numbers = ["" if v != v else repr(v) for v in (d.first, d.second, d.mean, d.low, d.high, d.p)]
                about = [comparison.first.view, comparison.first.judge or "", comparison.second.judge or ""]
                writer.writerow([*about, name, role, column, *numbers, subset.pairs, subset.scenarios])
    return text.getvalue()


def default_stem(comparison: RunComparison) -> Path:
    """Where the files of a comparison go unless told otherwise: beside the second run's report."""
    path = comparison.second.path
    folder = path if path.is_dir() else path.with_suffix("")
    return folder / f"compared-with-{comparison.first.name}{comparison.second.suffix}"


def write_comparison(comparison: RunComparison, page: Path | None = None) -> Written:
    """Write the page, and beside it the same numbers as JSON and CSV.

    Args:
        comparison: of two runs.
        page: HTML file; by default ``compared-with-FIRST.html`` (``compared-with-FIRST-JUDGE.html``) in the second run's
            folder.
    """
    page = page or default_stem(comparison).with_name(default_stem(comparison).name + ".html")
    written = Written(page, page.with_suffix(".json"), page.with_suffix(".csv"))
    rendered = render_template("compare.html.j2", page_context(comparison))
    return write_files(written, comparison.as_json(), comparison_csv(comparison), rendered)


def page_context(comparison: RunComparison) -> dict[str, Any]:
    """Everything the template shows."""
    runs = (comparison.first, comparison.second)
    return {
        "first": comparison.first.name,
        "second": comparison.second.name,
        "view": comparison.first.view,
        "judges": list(dict.fromkeys(judge_title(run) for run in runs)),
        "role": comparison.role,
        "partial": comparison.partial,
        "problems": comparison.problems(),
        "forests": [(name, subset, forest(getattr(subset, comparison.role))) for name, subset in comparison.subsets.items()],
        "rows": [
            (name, [(COLUMN_TITLES[c], d, _cells(d)) for c, d in getattr(subset, comparison.role).items()])
            for name, subset in comparison.subsets.items()
        ],
        "significant": SIGNIFICANT,
        "runs": [
            (run.name, run.tally, shares(run.tally.mode_by_subset["all"]), shares(run.tally.mode_by_subset["hard"]))
            for run in runs
        ],
        "mode_ids": MODE_IDS,
        "mode_title": mode_title,
        "mode_colour": mode_colour,
    }


def forest(differences: dict[str, Difference]) -> list[Bar]:
    """Differences as shares of each dimension's range, around 0 in the middle, all on one scale."""
    parts = {
        column: [
            value / (RANGES[column][1] - RANGES[column][0])
            for value in (d.mean, *((d.low, d.high) if d.low == d.low else ()))
        ]
        for column, d in differences.items()
    }
    scale = max((abs(v) for values in parts.values() for v in values), default=0.0) or 1.0
    bars = []
    for column, d in differences.items():
        places = [50 + 48 * value / scale for value in parts[column]]
        at, low, high = places if len(places) == 3 else places * 3
        colour = "muted" if d.p >= SIGNIFICANT else "series-1" if d.mean > 0 else "bad"
        bars.append(Bar(COLUMN_TITLES[column], f"{d.mean:+.2f}   p {show_p(d.p).strip()}", at, low, high, colour))
    return bars
