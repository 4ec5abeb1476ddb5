"""The run folder's own record: JSONL files are the source of truth, TensorBoard and friends are copies.

A resumed run continues the same files: they are first cut back to where they were when the checkpoint was written, so
that there is one line per step whatever happened in between.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from nemo_ampo.errors import UserError
from nemo_ampo.files import append_whole, disk_errors, read_jsonl, write_once
from nemo_ampo.ranks import COLLECTIVE_TIMEOUT_S

if TYPE_CHECKING:
    from nemo_ampo.run.trackers import Tracker

LOG_FILES = ("metrics.jsonl", "rollouts.jsonl")
_OF_NCCL = re.compile("NCCL_|TORCH_NCCL_|CUDA_DEVICE_MAX_CONNECTIONS$")
MOST_WAITING = 20_000
"""Lines kept for a disk that takes no more."""


class RunLog:
    """Appends to ``metrics.jsonl`` and ``rollouts.jsonl``.

    A disk that takes no more is an alarm and not a crash: it is said once, the lines wait in memory (at most
    :data:`MOST_WAITING`) and are written, in their order, as soon as there is room again.

    Args:
        folder: run folder, created if absent.
        active: False on ranks that must not write.
        positions: bytes of each file to keep, as :func:`log_positions` gave them; a file without one starts anew. A new
            run has none.
        hashes: sha256 of those bytes, as :func:`log_hashes` gave them; the next checkpoint vouches for the whole file.
        trackers: get a copy of every line of numbers; closed with the log.

    Raises:
        DiskError: the folder cannot be written to.
        UserError: a file does not begin with those bytes.
    """

    def __init__(
        self,
        folder: Path,
        active: bool = True,
        positions: Mapping[str, int] | None = None,
        hashes: Mapping[str, str] | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.folder = folder
        self._active = active
        self._trackers = trackers
        self._waiting: dict[str, list[str]] = {name: [] for name in LOG_FILES}
        self._dropped, self._said = 0, False
        if not active:
            return
        with disk_errors(f"cannot write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            for name in LOG_FILES:
                _cut(folder / name, (positions or {}).get(name, 0), (hashes or {}).get(name))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.flush()
        missing = self._dropped + sum(map(len, self._waiting.values()))
        if missing:
            _alarm(f"{missing} lines of the run log in {self.folder} were never written")
        if self._trackers:
            from nemo_ampo.run.trackers import close_all

            close_all(self._trackers, failed=error is not None)

    def metrics(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """One line of numbers. What is not finite (nothing to average, a gradient that blew up) is left out."""
        present = {k: v for k, v in values.items() if math.isfinite(v)}
        self._append("metrics.jsonl", [{"step": step, "kind": kind, **present}])
        for tracker in self._trackers:
            tracker.log(step, present)

    def history(self) -> list[dict[str, Any]]:
        """Training lines so far, those of an earlier start of the run included."""
        rows = [row for row in read_jsonl(self.folder / "metrics.jsonl") if row.get("kind") == "train"]
        return rows + [row for row in map(json.loads, self._waiting["metrics.jsonl"]) if row["kind"] == "train"]

    def rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """One line per sample."""
        self._append("rollouts.jsonl", [{"step": step, **row} for row in rows])

    def flush(self) -> None:
        """Write what a full disk did not take so far."""
        for name in LOG_FILES:
            self._append(name, [])

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if not self._active:
            return
        lines = self._waiting[name]
        lines += [json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows]
        if not lines:
            return
        try:
            append_whole(self.folder / name, "".join(lines).encode())
            lines.clear()
        except OSError as error:
            if not self._said:
                _alarm(f"cannot write {self.folder / name} ({error.strerror or error}); the run goes on, its lines wait")
            self._said = True
            self._dropped += max(0, len(lines) - MOST_WAITING)
            del lines[MOST_WAITING:]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _alarm(text: str) -> None:
    print(f"ALARM: {text}", file=sys.stderr, flush=True)


def write_provenance(folder: Path, config: Any, data_hashes: Mapping[str, str]) -> None:
    """``config.yaml`` (resolved) and ``provenance.json`` (versions and data hashes)."""
    from nemo_ampo import __version__
    from nemo_ampo.compat.versions import EXPECTED, TALKING, installed

    write_once(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    packages = (*EXPECTED, *TALKING, "torch", "numpy", "tensorrt-llm")
    record = {
        "nemo-ampo": __version__,
        "packages": {name: installed(name) for name in packages},
        "data": dict(data_hashes),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "collective_timeout_s": COLLECTIVE_TIMEOUT_S,
        "nccl": nccl_settings(),
    }
    write_once(folder / "provenance.json", json.dumps(record, indent=2))


def nccl_settings() -> dict[str, str]:
    """Version of NCCL, where torch has it, and the variables that decide how ranks talk to each other on GPUs."""
    import torch

    version = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    given = {name: value for name, value in sorted(os.environ.items()) if _OF_NCCL.match(name)}
    return ({"version": version} if version else {}) | given


def log_positions(folder: Path) -> dict[str, int]:
    """Bytes of each log file, flushed to the disk: a checkpoint must not outlive the lines that lead up to it."""
    positions = {}
    for path in (folder / name for name in LOG_FILES):
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            positions[path.name] = path.stat().st_size
    return positions


def log_hashes(folder: Path, positions: Mapping[str, int]) -> dict[str, str]:
    """sha256 of each log file up to its position, in hex; empty where it is shorter. Raises ``OSError``."""
    hashes = {}
    for name, position in positions.items():
        with (folder / name).open("rb") as file:
            digest, left = hashlib.sha256(), position
            while left and (part := file.read(min(left, 1 << 20))):
                digest.update(part)
                left -= len(part)
            hashes[name] = "" if left else digest.hexdigest()
    return hashes


def _cut(path: Path, position: int, expected: str | None) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size < position:
        raise UserError(f"{path}: has {size} bytes, the checkpoint was written after {position}; was the log replaced?")
    if expected is not None and log_hashes(path.parent, {path.name: position})[path.name] != expected:
        raise UserError(
            f"{path}: its first {position} bytes are not those the checkpoint was written after; the file was damaged or "
            "edited. Put them back, or continue in a new run.dir"
        )
    if size > position:
        os.truncate(path, position)
