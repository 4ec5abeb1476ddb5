"""What columns, modes, pairings and intervals are called on every SOTOPIA page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_ampo.report.training.charts import BROKEN
from nemo_ampo.sotopia.dimensions import DIMENSIONS, OVERALL
from nemo_ampo.sotopia.statistics import Estimate

if TYPE_CHECKING:
    from rich.table import Table

COLUMN_TITLES = {
    OVERALL: "overall",
    **{name: name.replace("_", " ") for name in DIMENSIONS},
    "financial_and_material_benefits": "financial benefits",
}
PAIRING_TITLES = {
    "self_play": "self-play",
    "partner": "against a partner model, both seats",
    "vs_base": "against its own base model, both seats",
    "api": "one API model against another",
}
VIEW_NOTES = {
    "sotopia": "each character knew what its relationship to the other lets it know",
    "reference": "each character was shown the other's secrets and hints, as in the authors' code",
}
ABSENT = "\N{EN DASH}"


def with_interval(e: Estimate) -> str:
    """``3.52 [3.31, 3.70]``; a dash for the mean of nothing."""
    if e.mean != e.mean:
        return ABSENT
    return f"{e.mean:.2f}" if e.low != e.low else f"{e.mean:.2f} [{e.low:.2f}, {e.high:.2f}]"


def mode_title(mode: int) -> str:
    """For legends and badges."""
    return f"mode {mode}" if mode else BROKEN


def dimension_table(title: str, caption: str, headings: Sequence[str]) -> Table:
    """An empty table for a terminal: dimensions on the left, numbers under these headings."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for heading in ("dimension", *headings):
        table.add_column(heading, justify="left" if heading == "dimension" else "right", no_wrap=True)
    return table
