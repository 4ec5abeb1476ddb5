"""Bars and curves of a SOTOPIA page, as inline SVG and rows of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_ampo.reply.modes import NO_MODE
from nemo_ampo.report.plots import Layer, Line, area_chart, line_chart
from nemo_ampo.report.sotopia.titles import COLUMN_TITLES, mode_title, with_interval
from nemo_ampo.report.training.metrics_log import Series
from nemo_ampo.sotopia.dimensions import DIMENSIONS, OVERALL
from nemo_ampo.sotopia.statistics import COLUMNS, Estimate
from nemo_ampo.sotopia.summary import RunSummary
from nemo_ampo.sotopia.tally import MODE_IDS, RELATIONSHIPS, Tally, shares, switches_from

RANGES = {OVERALL: (-25 / 7, 40 / 7), **DIMENSIONS}
"""Smallest and largest value of each column; overall is the mean of the seven."""


@dataclass(frozen=True)
class Bar:
    """One row of a forest plot, in percent of the plot's width.

    Attributes:
        label, text: left and right of the bar.
        at, low, high: position of the mean and of the interval's ends.
        colour: CSS variable without its dashes.
    """

    label: str
    text: str
    at: float
    low: float
    high: float
    colour: str


@dataclass(frozen=True)
class Figure:
    """A drawn chart.

    Attributes:
        title, unit: above it.
        svg: trusted markup, made of numbers only.
        legend: label and CSS variable.
    """

    title: str
    unit: str
    svg: str
    legend: tuple[tuple[str, str], ...]


def forest(summary: RunSummary, subset: str) -> list[Bar]:
    """Every column's mean and interval inside its range."""
    estimates: dict[str, Estimate] = getattr(summary.subsets[subset], summary.role)
    return [_bar(column, estimates[column], "text" if column == OVERALL else "series-1") for column in COLUMNS]


def _bar(column: str, e: Estimate, colour: str) -> Bar:
    low, high = RANGES[column]

    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    known = e.low == e.low
    ends = (place(e.low), place(e.high)) if known else (place(e.mean), place(e.mean))
    return Bar(COLUMN_TITLES[column], with_interval(e), place(e.mean), *ends, colour)


def mode_colour(mode: int) -> str:
    """CSS variable of a mode."""
    return f"mode-{mode}" if mode != NO_MODE else "bad"


def mode_bars(counts: Tally) -> list[tuple[str, int, dict[int, float]]]:
    """Label, number of turns and mode shares: all, hard, then each relationship."""
    groups = [("all that were played", counts.mode_by_subset["all"]), ("hard episodes", counts.mode_by_subset["hard"])]
    groups += [(RELATIONSHIPS[r], counts.mode_by_relationship[r]) for r in sorted(counts.mode_by_relationship)]
    return [(label, sum(count.values()), shares(count)) for label, count in groups if count]


def figures(counts: Tally) -> list[Figure]:
    """Charts over turns that have something to show."""
    found = []
    turns = sorted(counts.mode_by_turn)
    if turns:
        by_turn = [shares(counts.mode_by_turn[turn]) for turn in turns]
        layers = [
            Layer(mode_title(k), mode_colour(k), tuple(mix[k] for mix in by_turn))
            for k in MODE_IDS
            if any(mix[k] for mix in by_turn)
        ]
        legend = tuple((layer.label, layer.colour) for layer in layers)
        found.append(Figure("Modes by turn", "share of the policy's turns", area_chart(turns, layers, percent=True), legend))
    if counts.tokens:
        steps = tuple(sorted(counts.tokens_by_turn))
        means = tuple(counts.tokens_by_turn[turn][0] / counts.tokens_by_turn[turn][1] for turn in steps)
        line = Line("policy", "series-1", Series(steps, means), markers=True)
        found.append(
            Figure("Tokens by turn", "mean per reply of the policy", line_chart([line], bottom=0), (("policy", "series-1"),))
        )
    depths = depth_changes(counts)
    if depths:
        found.append(_depth_figure(depths))
    if counts.tokens_by_turn:
        steps = tuple(sorted(counts.tokens_by_turn))
        alive = tuple(float(counts.tokens_by_turn[turn][1]) for turn in steps)
        line = Line("turns", "series-2", Series(steps, alive), markers=True)
        found.append(
            Figure(
                "How long they talk",
                "policy's utterances at each turn",
                line_chart([line], bottom=0),
                (("utterances", "series-2"),),
            )
        )
    return found


DEPTH_CHANGES = {1: ("deeper", "series-1"), 0: ("as deep", "series-2"), -1: ("less deep", "series-3")}


def depth_changes(counts: Tally) -> dict[int, dict[int, float]]:
    """Turn index to the shares of deeper (1), equal (0) and shallower (-1) modes at the same speaker's next turn.

    Broken replies have no depth and are left out.
    """
    found = {}
    for turn, switches in sorted(counts.switches_by_turn.items()):
        changes: Counter[int] = Counter()
        for (mode, following), number in switches.items():
            if NO_MODE not in (mode, following):
                changes[(following > mode) - (following < mode)] += number
        if changes:
            found[turn] = {change: changes[change] / changes.total() for change in DEPTH_CHANGES}
    return found


def _depth_figure(depths: Mapping[int, Mapping[int, float]]) -> Figure:
    turns = tuple(depths)
    lines = [
        Line(name, colour, Series(turns, tuple(depths[turn][change] for turn in turns)), markers=True)
        for change, (name, colour) in DEPTH_CHANGES.items()
    ]
    chart = line_chart(lines, percent=True, bottom=0)
    return Figure("How the mode moves on", "from each turn to the same speaker's next", chart, tuple(DEPTH_CHANGES.values()))


def switch_rows(counts: Tally) -> list[tuple[int, int, dict[int, float]]]:
    """Mode, number of turns that were followed by another, shares of the next mode."""
    rows = [(k, switches_from(counts.switches, k)) for k in MODE_IDS]
    return [(k, sum(following.values()), shares(following)) for k, following in rows if following]


def _shown_counts(counts: Mapping[str, int], total: int) -> list[tuple[str, int, float]]:
    return [(name.replace("_", " "), number, number / total) for name, number in sorted(counts.items(), key=lambda e: -e[1])]
