"""Line and area charts as inline SVG whose colours are CSS variables.

matplotlib draws with stand-in colours that are then replaced by ``var(--name)``, so a chart follows the page
from light to dark. Charts hold numbers only: titles, units and legends are HTML around them, where text wraps
on a phone and is escaped with the rest of the page.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_ampo.report.training.metrics_log import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN, HEIGHT_IN = 4.7, 2.5
SMOOTH_FROM = 24
"""Shorter series are drawn as they are; longer lines faintly below their rolling mean, longer areas as such
means."""

INK, GRID, SURFACE = "muted", "grid", "surface"
_VARIABLES = (
    *(INK, GRID, SURFACE, "text", "bad"),
    *("mode-1", "mode-2", "mode-3", "mode-4"),
    *("series-1", "series-2", "series-3", "series-4", "series-5", "series-6", "series-7"),
)
_STAND_INS = {name: f"#0101{i:02x}" for i, name in enumerate(_VARIABLES)}
SERIES_COLOURS = tuple(name for name in _VARIABLES if name.startswith("series-"))


@dataclass(frozen=True)
class Line:
    """A series to draw.

    Attributes:
        label: for the legend.
        colour: CSS variable without its dashes.
        series: the points.
        markers: show each point (a few validations) instead of smoothing.
    """

    label: str
    colour: str
    series: Series
    markers: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer of a stacked chart; ``values`` line up with the chart's steps."""

    label: str
    colour: str
    values: tuple[float, ...]


def line_chart(lines: Sequence[Line], percent: bool = False, bottom: float | None = None, log: bool = False) -> str:
    """Lines over steps.

    Args:
        lines: at least one point in all.
        percent: values are shares; label the axis in percent.
        bottom: lower end of the axis.
        log: logarithmic axis, only used when every value is above 0.

    Returns:
        An ``<svg>`` element.
    """
    figure, axes = _axes()
    for line in lines:
        steps, values = line.series.steps, line.series.values
        if not steps:
            continue
        colour = _STAND_INS[line.colour]
        if line.markers or len(steps) == 1:
            axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3.5)
        elif len(steps) < SMOOTH_FROM:
            axes.plot(steps, values, color=colour, linewidth=1.6)
        else:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(steps, rolling_mean(values, len(steps) // 12), color=colour, linewidth=1.8)
    if log and all(value > 0 for line in lines for value in line.series.values):
        _log_scale(axes)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    return _svg(figure, axes, percent)


def area_chart(steps: Sequence[int], layers: Sequence[Layer], percent: bool = False) -> str:
    """Layers stacked on each other over steps; shares fill 0..100 % when ``percent``."""
    figure, axes = _axes()
    width = len(steps) // 24 if len(steps) >= SMOOTH_FROM else 0
    xs, stack = [float(step) for step in steps], [rolling_mean(layer.values, width) for layer in layers]
    if len(xs) == 1:  # an area needs two ends
        xs, stack = [xs[0] - 0.5, xs[0] + 0.5], [values * 2 for values in stack]
    axes.stackplot(
        xs,
        stack,
        colors=[_STAND_INS[layer.colour] for layer in layers],
        edgecolor=_STAND_INS[SURFACE],
        linewidth=0.6,
    )
    axes.set_xlim(xs[0], xs[-1])
    axes.set_ylim(0, 1 if percent else None)
    return _svg(figure, axes, percent)


def bar_chart(labels: Sequence[str], layers: Sequence[Layer]) -> str:
    """Stacked bars of shares, one per label; ``values`` of a layer line up with the labels."""
    figure, axes = _axes()
    places = list(range(len(labels)))
    below = [0.0] * len(labels)
    for layer in layers:
        axes.bar(
            places,
            layer.values,
            bottom=below,
            width=0.72,
            color=_STAND_INS[layer.colour],
            edgecolor=_STAND_INS[SURFACE],
            linewidth=0.6,
        )
        below = [under + value for under, value in zip(below, layer.values, strict=True)]
    axes.set_xticks(places, labels)
    axes.set_xlim(-0.6, max(len(labels), 4) - 0.4)  # a few bars do not become walls
    axes.set_ylim(0, 1)
    return _svg(figure, axes, percent=True)


def rolling_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over ``width`` values on either side, fewer at the ends."""
    return [
        math.fsum(window) / len(window) for i in range(len(values)) if (window := values[max(0, i - width) : i + width + 1])
    ]


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(axis="y", color=_STAND_INS[GRID], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_STAND_INS[GRID])
    axes.tick_params(color=_STAND_INS[GRID], labelcolor=_STAND_INS[INK], labelsize=9, length=0)
    return figure, axes


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _svg(figure: Figure, axes: Axes, percent: bool) -> str:
    from matplotlib import rc_context
    from matplotlib.ticker import PercentFormatter

    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemo-ampo", "text.parse_math": False}):
        figure.savefig(
            text,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _inline(text.getvalue())


def _inline(svg: str) -> str:
    """The bare element: no prologue, no metadata, no ids that would clash in a page, colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    # Only clip paths (p...) and markers (m...) are referred to; other charts of the page use the same names.
    svg = re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"', "", svg)
    prefix = f"c{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    svg = re.sub(r'( id="|#)([pm][0-9a-f]{10}\b)', rf"\1{prefix}\2", svg)
    for name, colour in _STAND_INS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg).strip()
