"""What columns, modes, pairings and intervals are called on every SOTOPIA page."""

from __future__ import annotations

from nemo_ampo.report.training.charts import BROKEN
from nemo_ampo.sotopia.dimensions import DIMENSIONS, OVERALL
from nemo_ampo.sotopia.statistics import Estimate

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
