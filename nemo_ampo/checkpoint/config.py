"""How often state is kept, and what happens when it cannot be written."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nemo_ampo.ranges import number


class BestMode(StrEnum):
    """Which end of a metric is the good one."""

    max = "max"
    min = "min"


@dataclass
class CheckpointConfig:
    """Which training checkpoints stay on the disk. How often one is written is NeMo's ``trainer.<algorithm>.save_interval``.

    Attributes:
        dir: folder of the checkpoints; null is ``<run.dir>/checkpoints``.
        keep_last: the newest so many stay.
        keep_every: every checkpoint whose step is a multiple of this stays too; 0 keeps none for that reason.
        keep_best: so many best ones stay too, by ``best_metric``; 0 keeps none for that reason.
        best_metric: a metric of the step before the save, as named in ``metrics.jsonl``.
        best_mode: ``max`` or ``min``.
        verify: read a few of the weights back after each save and compare them with those in memory; a difference is a
            failed save.
        max_failed_saves: after so many failed saves in a row the run stops; the last good checkpoint is intact.
    """

    dir: str | None = None
    keep_last: int = number(2, least=1)
    keep_every: int = number(0, least=0)
    keep_best: int = number(1, least=0)
    best_metric: str = "reward/mean"
    best_mode: BestMode = BestMode.max
    verify: bool = True
    max_failed_saves: int = number(3, least=1)
