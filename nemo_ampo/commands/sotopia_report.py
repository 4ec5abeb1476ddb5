"""What ``nemo-ampo report`` does for SOTOPIA: one run becomes a report, two a comparison, more an overview."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_ampo.errors import UserError
from nemo_ampo.report.sotopia.compare import compare_runs, comparison_table, write_comparison
from nemo_ampo.report.sotopia.overview import check_same_view, overview_table, problems, write_overview
from nemo_ampo.report.sotopia.page import Written, score_table, status_lines, write_report
from nemo_ampo.sotopia.summary import RunSummary, is_result_file, is_sotopia_run, read_summary

if TYPE_CHECKING:
    from rich.table import Table


def is_sotopia(paths: Sequence[Path]) -> bool:
    """Whether the paths are for this module: an evaluation's folder, or others' result file, each.

    Raises:
        UserError: one is and another is not.
    """
    found = [is_sotopia_run(path) or is_result_file(path) for path in paths]
    if len(paths) == 1:
        return found[0]
    if not all(found):
        odd = paths[found.index(False)]
        what = "a folder with protocol.json and episodes/, or others' result file (.json)"
        raise UserError(f"{odd}: not a SOTOPIA result ({what}); only these can be compared")
    return True


def report(
    paths: Sequence[Path], out: Path | None = None, judge: str | None = None, sotopia_dir: Path | None = None, seed: int = 0
) -> tuple[Table, list[str], bool]:
    """Write the files of one run, of a comparison or of an overview.

    Args:
        paths: of results.
        out: page to write, the other files go beside it.
        judge: whose scores.
        sotopia_dir: scenario files, to know the situations of imported results.
        seed: of the intervals.

    Returns:
        A table and lines for the terminal, and whether anything is missing.
    """
    runs = [read_summary(path, judge, sotopia_dir, seed) for path in paths]
    if len(runs) == 2:
        comparison = compare_runs(runs[0], runs[1], seed)
        written = write_comparison(comparison, out)
        lines = _warnings(comparison.problems(), comparison.partial, runs)
        return comparison_table(comparison), [*lines, _where(written)], comparison.partial
    if len(runs) > 2:
        check_same_view(runs)
        partial = any(run.partial for run in runs)
        lines = _warnings(problems(runs), partial, runs)
        return overview_table(runs), [*lines, _where(write_overview(runs, out))], partial
    (run,) = runs
    written = write_report(run, out)
    return score_table(run), [*status_lines(run), _where(written)], run.partial


def _warnings(problems: Sequence[str], partial: bool, runs: Sequence[RunSummary]) -> list[str]:
    marked = [f"{'PARTIAL' if partial else 'NOT ALIKE'}: {'; '.join(problems)}"] if problems else []
    return [*marked, *(f"note: {run.name}: {note}" for run in runs for note in run.notes())]


def _where(written: Written) -> str:
    return f"wrote {written.page}, {written.result.name}, {written.table.name}"
