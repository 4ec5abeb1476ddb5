"""Training checkpoints as folders: complete or invisible.

A checkpoint is written into ``.saving-step-000025-…``; its manifest (sizes, hashes, step, config, layout) comes last;
everything is flushed to the disk; then the folder is renamed to ``step-000025``. Whatever dies on the way leaves either
the old state or the new one. A folder whose files are not all there at their sizes is never picked up. Nothing here
imports torch or NeMo: the same functions serve a status command.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_ampo.checkpoint.config import BestMode, CheckpointConfig
from nemo_ampo.errors import UserError
from nemo_ampo.files import sha256_of

MANIFEST = "manifest.json"
WEIGHTS, OPTIMIZER = "model_weights", "optimizer"
OPTIMIZER_STATES_KEPT = 2
"""The newest so many checkpoints keep their optimizer state; older ones that stay are weights only."""
_SAVING, _REMOVING = ".saving-", ".removing-"


@dataclass(frozen=True)
class JobLayout:
    """How the job was spread: ranks in all, and the parallel sizes."""

    world: int
    tensor: int
    pipeline: int
    data: int

    def __str__(self) -> str:
        return f"{self.world} ranks (tensor {self.tensor}, pipeline {self.pipeline}, data {self.data})"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        stage: ``bc`` or ``ampo``.
        step: steps done.
        counters: of the trainer.
        layout: of the job that wrote it.
        config: settings that decide the run's numbers, flat, and the hashes of its data; see :func:`identity`.
        config_hash: sha256 of ``config``.
        score: value of ``checkpoint.best_metric``, None if the step had no such metric.
        logs: bytes of each log file when the checkpoint was written; a resume cuts them there.
        log_hashes: sha256 of those bytes; a report says where they differ now.
        files: relative path -> bytes and sha256.
        memory: bytes of ``weights``, ``gradients`` and ``optimizer`` on the fullest rank of that job.
        written: seconds since the epoch.
    """

    stage: str
    step: int
    counters: dict[str, int]
    layout: JobLayout
    config: dict[str, Any]
    score: float | None
    logs: dict[str, int]
    files: dict[str, dict[str, Any]]
    memory: dict[str, int] = field(default_factory=dict)
    log_hashes: dict[str, str] = field(default_factory=dict)
    written: float = field(default_factory=time.time)

    @property
    def config_hash(self) -> str:
        """Of the settings, in hex."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    @property
    def has_optimizer(self) -> bool:
        """False for a weights-only checkpoint, which training cannot continue from."""
        return any(name.startswith(f"{OPTIMIZER}/") for name in self.files)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(int(f["bytes"]) for f in self.files.values())

    def dump(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self) | {"config_hash": self.config_hash}, indent=1)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read one.

        Raises:
            UserError: not a manifest, or its config does not have the hash it states.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            stated = record.pop("config_hash")
            manifest = cls(**record | {"layout": JobLayout(**record["layout"])})
        except FileNotFoundError:
            raise UserError(f"{path.parent}: no checkpoint here, {path.name} is missing") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: not a checkpoint manifest ({error})") from None
        if manifest.config_hash != stated:
            raise UserError(f"{path}: the config was changed after it was written")
        return manifest


@dataclass(frozen=True)
class Checkpoint:
    """A complete one."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Steps done."""
        return self.manifest.step


@dataclass(frozen=True)
class Incomplete:
    """A folder that must not be used, and why."""

    path: Path
    reason: str


class Store:
    """The checkpoint folder of one run. Only one process may write at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_run(cls, run_dir: Path, config: CheckpointConfig) -> Store:
        """Where this run's checkpoints lie."""
        return cls(Path(config.dir) if config.dir else run_dir / "checkpoints")

    def scan(self) -> tuple[list[Checkpoint], list[Incomplete]]:
        """Complete checkpoints, oldest first, and folders that look like one but are not."""
        complete: list[Checkpoint] = []
        incomplete: list[Incomplete] = []
        for path in sorted(self.folder.glob("step-*")):
            try:
                manifest = Manifest.load(path / MANIFEST)
                check_sizes(path, manifest)
            except UserError as error:
                incomplete.append(Incomplete(path, str(error)))
            else:
                complete.append(Checkpoint(path, manifest))
        return sorted(complete, key=lambda c: c.step), incomplete

    def resumable(self) -> list[Checkpoint]:
        """Complete checkpoints with optimizer state, newest first."""
        return [c for c in reversed(self.scan()[0]) if c.manifest.has_optimizer]

    def sweep(self) -> None:
        """Remove what an earlier process left half written or half removed."""
        for path in (*self.folder.glob(f"{_SAVING}*"), *self.folder.glob(f"{_REMOVING}*")):
            shutil.rmtree(path, ignore_errors=True)

    def begin(self, step: int) -> Path:
        """An empty folder for the checkpoint of ``step``, under a name that no earlier process can still write to."""
        self.sweep()
        path = self.folder / f"{_SAVING}{_name(step)}-{uuid.uuid4().hex[:8]}"
        path.mkdir(parents=True)
        return path

    def publish(self, folder: Path, manifest: Manifest) -> Checkpoint:
        """Give a finished folder its name. Its files must have been flushed by their writers or :func:`measure`.

        A complete checkpoint of the same step (a run that went back further than that) is replaced.
        """
        _write_durably(folder / MANIFEST, manifest.dump())
        for directory in sorted({folder, *(p.parent for p in (folder / f for f in manifest.files))}, reverse=True):
            _flush_directory(directory)
        target = self.folder / _name(manifest.step)
        if target.exists():
            self._remove(target)
        folder.replace(target)
        _flush_directory(self.folder)
        return Checkpoint(target, manifest)

    def prune(self, config: CheckpointConfig) -> list[Path]:
        """Apply the retention rules.

        Returns:
            checkpoints removed.
        """
        checkpoints, _ = self.scan()
        kept = steps_to_keep({c.step: c.manifest.score for c in checkpoints}, config)
        for c in checkpoints:
            if c.step not in kept:
                self._remove(c.path)
        for c in [c for c in checkpoints if c.step in kept][:-OPTIMIZER_STATES_KEPT]:
            if c.manifest.has_optimizer:
                _drop_optimizer(c)
        return [c.path for c in checkpoints if c.step not in kept]

    def _remove(self, path: Path) -> None:
        doomed = path.with_name(f"{_REMOVING}{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def steps_to_keep(scores: Mapping[int, float | None], config: CheckpointConfig) -> set[int]:
    """Which of these steps stay.

    Args:
        scores: step -> value of the metric that says which is best, None if it has none.
        config: retention rules.
    """
    steps = sorted(scores)
    sign = 1.0 if config.best_mode == BestMode.max else -1.0
    # Of equals the newer one is the better.
    ranked = sorted(((sign * value, step) for step, value in scores.items() if value is not None), reverse=True)
    kept = set(steps[-config.keep_last :]) | {step for _, step in ranked[: config.keep_best]}
    return kept | {step for step in steps if config.keep_every and step % config.keep_every == 0}


# --- files ----------------------------------------------------------------------------------------------------------


def list_files(folder: Path) -> list[str]:
    """Relative paths of all files below, sorted."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def measure(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files, each flushed to the disk first."""
    for name in names:
        _flush(folder / name)
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Are all files there at their sizes?

    Raises:
        UserError: naming the first that is not.
    """
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing")
        if path.stat().st_size != record["bytes"]:
            raise UserError(f"{path}: {path.stat().st_size} bytes instead of {record['bytes']}")


def damaged(folder: Path, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """Those of the files whose content is not what the manifest says."""
    return [name for name in names if sha256_of(folder / name) != manifest.files[name]["sha256"]]


def check_content(folder: Path, manifest: Manifest, names: Sequence[str]) -> None:
    """Are all files of the checkpoint there, and these of them what they were when they were written?

    Raises:
        UserError: naming the first that is not.
    """
    check_sizes(folder, manifest)
    for name in damaged(folder, manifest, names):
        raise UserError(f"{folder / name}: damaged: its content does not have the hash in {MANIFEST}")


def free_bytes(folder: Path) -> int:
    """Of the file system that holds (or will hold) the folder."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _drop_optimizer(checkpoint: Checkpoint) -> None:
    """Manifest first: a crash in between leaves files nobody counts, not a checkpoint that misses some."""
    files = {k: v for k, v in checkpoint.manifest.files.items() if not k.startswith(f"{OPTIMIZER}/")}
    _write_durably(checkpoint.path / MANIFEST, replace(checkpoint.manifest, files=files).dump())
    shutil.rmtree(checkpoint.path / OPTIMIZER, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)
    _flush_directory(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_directory(path: Path) -> None:
    # Some network file systems refuse to flush a directory; the rename is then as durable as they make it.
    with contextlib.suppress(OSError):
        _flush(path)
