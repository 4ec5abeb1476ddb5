"""Metrics of a run folder, read from ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ampo.errors import DataError
from nemo_ampo.files import is_torn, stream_jsonl
from nemo_ampo.report.training.numbers import is_number, is_whole

METRICS_FILE = "metrics.jsonl"
KINDS = ("train", "val")
DAMAGED = "; the file was damaged or edited"


@dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was logged.

    Attributes:
        steps: ascending.
        values: finite numbers, one per step.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __bool__(self) -> bool:
        """True when there is at least one point."""
        return bool(self.steps)

    def ends(self) -> tuple[float, float]:
        """Mean over the first and over the last tenth of the points, at least one point each."""
        count = max(1, len(self.values) // 10)
        return math.fsum(self.values[:count]) / count, math.fsum(self.values[-count:]) / count


@dataclass(frozen=True)
class MetricsLog:
    """Lines of a ``metrics.jsonl`` by kind (``train``, ``val``), ascending in step.

    Attributes:
        lines: step and numbers of each.
        problems: what of the file is not as it was written, in words.
    """

    lines: Mapping[str, tuple[tuple[int, Mapping[str, float]], ...]]
    problems: tuple[str, ...] = ()

    def series(self, name: str, kind: str = "train") -> Series:
        """The points of one metric; empty when it was never logged."""
        points = [
            (step, values[name]) for step, values in self.lines.get(kind, ()) if math.isfinite(values.get(name, math.nan))
        ]
        return Series(tuple(step for step, _ in points), tuple(value for _, value in points))

    def counts(self, name: str, kind: str = "train") -> Series:
        """A metric that is left out where it is zero, at every logged step."""
        lines = self.lines.get(kind, ())
        return Series(tuple(step for step, _ in lines), tuple(values.get(name, 0.0) for _, values in lines))

    def names(self, prefix: str = "") -> list[str]:
        """Names that begin with ``prefix``, in order of first appearance."""
        seen = (name for lines in self.lines.values() for _, values in lines for name in values)
        return [name for name in dict.fromkeys(seen) if name.startswith(prefix)]

    @property
    def num_steps(self) -> int:
        """Number of training lines."""
        return len(self.lines.get("train", ()))


def read_metrics(path: Path) -> MetricsLog:
    """A ``metrics.jsonl``.

    Raises:
        DataError: a line that no run writes: without a ``step`` or a known ``kind``, with a metric that is no number, or
            with a step that another line has or that comes too early.
    """
    lines: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
    for where, row in stream_jsonl(path):
        step, kind = row.get("step"), row.get("kind")
        if not is_whole(step) or kind not in KINDS:
            raise DataError(
                f"{where}: needs an integer 'step' and a 'kind' ({' or '.join(KINDS)}), got {step!r} and {kind!r}{DAMAGED}"
            )
        values = {name: value for name, value in row.items() if name not in ("step", "kind")}
        for name, value in values.items():
            if not is_number(value):
                raise DataError(f"{where}, metric {name!r}: not a number: {value!r}{DAMAGED}")
        before = lines.setdefault(kind, [])
        if before and step <= before[-1][0]:
            raise DataError(f"{where}: {kind} step {step} after step {before[-1][0]}{DAMAGED}")
        before.append((step, values))
    return MetricsLog(
        {kind: tuple(rows) for kind, rows in lines.items()}, (*torn(path), *_gaps(path, lines.get("train", [])))
    )


def torn(path: Path) -> list[str]:
    """What to tell a reader of a last line that was cut off; nothing otherwise."""
    return [f"{path.name}: the last line was not written whole and is left out."] if is_torn(path) else []


def _gaps(path: Path, lines: Sequence[tuple[int, Any]]) -> list[str]:
    """Steps that a run has trained, because later ones are there, and the log does not know."""
    expected, missing = 0, []
    for step, _ in lines:
        if step > expected:
            missing.append(f"{expected}" if step == expected + 1 else f"{expected} to {step - 1}")
        expected = step + 1
    return [f"{path.name}: the lines of steps {', '.join(missing[:5])} are missing."] if missing else []
