"""Tables of a report as rows of text, and the same rows for the terminal.

A number that does not exist is :data:`ABSENT`; the page and the terminal print the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_ampo.reply.modes import MODES
from nemo_ampo.report.training.inputs import Evaluation
from nemo_ampo.report.training.metrics_log import MetricsLog
from nemo_ampo.types import ALL_TAGS

if TYPE_CHECKING:
    from rich.table import Table

ABSENT = "\N{EN DASH}"

EVALUATION_COLUMNS = (
    *("checkpoint", "prompts", "n", "goal", "reward", "valid", "tokens"),
    *(f"mode {k}" for k in MODES),
    "judge failed",
)

_SHORT = {f"mode {k}": f"m{k}" for k in MODES} | {"checkpoint": "model", "prompts": "set", "judge failed": "unjudged"}
"""Headings on a terminal of 80 columns."""

TRAINING_METRICS = (
    *("reward/mean", "reward/goal", "reward/length", "format/failed_fraction", "format/cut_fraction"),
    *("tokens/response", "tokens/answer"),
    *(f"mode/{k}/share" for k in MODES),
    *("mode/entropy", "mode/adaptivity", "mode_term/active_fraction"),
    *("policy/kl", "policy/entropy", "policy/grad_norm", "mismatch/kl", "engine/logprob_gap"),
    *("judge/failed_fraction", "guard/masked_samples", "judge/latency_p95_s", "time/step_s"),
)
"""Rows of the training table, names as in :data:`nemo_ampo.run.metrics.DESCRIPTIONS`."""


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share in whole percent."""
    return ABSENT if value is None else f"{value:.0%}"


def evaluation_rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Rows under :data:`EVALUATION_COLUMNS`: all prompts of every checkpoint first, then label by label.

    The name of an evaluation that is not complete has an asterisk.
    """
    tags = list(dict.fromkeys(tag for evaluation in evaluations for tag in evaluation.summary))
    tags.sort(key=lambda tag: (tag != ALL_TAGS, tag))
    return [
        [
            evaluation.name if evaluation.partial is None else f"{evaluation.name} *",
            tag,
            str(summary.samples),
            number(summary.goal),
            number(summary.reward),
            percent(summary.valid_format),
            number(summary.tokens, 1),
            *(percent(summary.mode_share[k] if summary.samples else None) for k in MODES),
            str(summary.judge_failed),
        ]
        for tag in tags
        for evaluation in evaluations
        if (summary := evaluation.summary.get(tag)) is not None
    ]


def evaluation_table(evaluations: Sequence[Evaluation]) -> Table:
    """The evaluation table for a terminal.

    Args:
        evaluations: in the order of the rows.
    """
    partial = [f"* {e.name} is {e.partial}" for e in evaluations if e.partial is not None]
    table = _table("Evaluation on held-out prompts", caption=_plain("\n".join(partial)) or None)
    for name in EVALUATION_COLUMNS:
        left = name in ("checkpoint", "prompts")
        table.add_column(_SHORT.get(name, name), justify="left" if left else "right", no_wrap=not left)
    rows = evaluation_rows(evaluations)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*map(_plain, row), end_section=following is not None and following[1] != row[1])
    return table


@dataclass(frozen=True)
class TrainingRow:
    """One metric at both ends of a run."""

    name: str
    description: str
    first: str
    last: str


def training_rows(log: MetricsLog) -> list[TrainingRow]:
    """Means over the first and the last tenth of the steps, for the metrics that were logged."""
    from nemo_ampo.run.metrics import DESCRIPTIONS

    patterns = {f"mode/{k}/share": "mode/{k}/share" for k in MODES} | {"time/step_s": "time/{phase}_s"}
    rows = []
    for name in TRAINING_METRICS:
        series = log.series(name)
        if series:
            first, last = series.ends()
            rows.append(TrainingRow(name, DESCRIPTIONS[patterns.get(name, name)], f"{first:.4g}", f"{last:.4g}"))
    return rows


def training_table(log: MetricsLog) -> Table:
    """The training table for a terminal."""
    table = _table(f"Training, {log.num_steps} steps", caption="means over the first and last tenth of the steps")
    for name in ("metric", "first", "last"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in training_rows(log):
        table.add_row(_plain(row.name), row.first, row.last)
    return table


def _table(title: str, caption: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _plain(text: str) -> str:
    """Text in which rich finds no markup."""
    from rich.markup import escape

    return escape(text)
