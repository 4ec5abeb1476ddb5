"""The run folder's own record: JSONL files are the source of truth, TensorBoard and friends are copies.

A resumed run continues the same files: they are first cut back to where they were when the checkpoint was written, so
that there is one line per step whatever happened in between.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from nemo_ampo.errors import UserError
from nemo_ampo.files import read_jsonl, write_once

if TYPE_CHECKING:
    from nemo_ampo.trackers import Tracker

LOG_FILES = ("metrics.jsonl", "rollouts.jsonl")


class RunLog:
    """Appends to ``metrics.jsonl`` and ``rollouts.jsonl``.

    Args:
        folder: run folder, created if absent.
        active: False on ranks that must not write.
        positions: bytes of each file to keep, as :func:`log_positions` gave them; a file without one starts anew. A new
            run has none.
        trackers: get a copy of every line of numbers; closed with the log.
    """

    def __init__(
        self,
        folder: Path,
        active: bool = True,
        positions: Mapping[str, int] | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.folder = folder
        self._active = active
        self._trackers = trackers
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in LOG_FILES:
            _cut(folder / name, (positions or {}).get(name, 0))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for tracker in self._trackers:
            tracker.close(failed=error is not None)

    def metrics(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """One line of numbers. NaN (nothing to average) is left out."""
        present = {k: v for k, v in values.items() if not math.isnan(v)}
        self._append("metrics.jsonl", [{"step": step, "kind": kind, **present}])
        for tracker in self._trackers:
            tracker.log(step, present)

    def history(self) -> list[dict[str, Any]]:
        """Training lines so far, those of an earlier start of the run included."""
        return [row for row in read_jsonl(self.folder / "metrics.jsonl") if row["kind"] == "train"]

    def rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """One line per sample."""
        self._append("rollouts.jsonl", [{"step": step, **row} for row in rows])

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if not self._active or not rows:
            return
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def write_provenance(folder: Path, config: Any, data_hashes: Mapping[str, str]) -> None:
    """``config.yaml`` (resolved) and ``provenance.json`` (versions and data hashes)."""
    from nemo_ampo import __version__
    from nemo_ampo.compat.versions import EXPECTED, installed

    write_once(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    packages = (*EXPECTED, "torch", "numpy", "openai", "tensorrt-llm")
    record = {
        "nemo-ampo": __version__,
        "packages": {name: installed(name) for name in packages},
        "data": dict(data_hashes),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }
    write_once(folder / "provenance.json", json.dumps(record, indent=2))


def log_positions(folder: Path) -> dict[str, int]:
    """Bytes of each log file, flushed to the disk: a checkpoint must not outlive the lines that lead up to it."""
    positions = {}
    for path in (folder / name for name in LOG_FILES):
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            positions[path.name] = path.stat().st_size
    return positions


def _cut(path: Path, position: int) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size < position:
        raise UserError(f"{path}: has {size} bytes, the checkpoint was written after {position}; was the log replaced?")
    if size > position:
        os.truncate(path, position)
