"""The record a batch job leaves in its run folder: what was planned, every attempt, and whether another one is worth it.

``slurm/plan.json`` holds the stages, ``slurm/attempts.jsonl`` one line per begin and end. A job is put back into the queue
only if the attempt got somewhere: a stage finished, or a checkpoint of a later step. Slurm also requeues on its own, after a
node failed; then nobody wrote an end, and the next begin decides by the same rule.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_ampo.checkpoint.store import Store
from nemo_ampo.errors import DataError, DiskError, UserError
from nemo_ampo.files import append_whole, disk_errors, stream_jsonl, strict_json, write_once
from nemo_ampo.output.outcome import EXIT_USER_ERROR

FOLDER = "slurm"
PLAN, ATTEMPTS = "plan.json", "attempts.jsonl"
FRUITLESS = 2
"""Attempts in a row that may bring nothing before no more are made."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage.

    Attributes:
        name: of the stage.
        output: exists when it is done.
        trains: has steps and checkpoints, in the run folder's subfolder of its name.
    """

    name: str
    output: str
    trains: bool


@dataclass(frozen=True, order=True)
class Standing:
    """How far a run got: finished stages, then the newest checkpoint's step of the stages that train."""

    stages: int
    step: int

    @classmethod
    def of(cls, run_dir: Path) -> Standing:
        """Read from the run folder."""
        plan = read_plan(run_dir)
        done = sum(Path(stage.output).exists() for stage in plan)
        steps = (checkpoint_step(run_dir / s.name) for s in plan if s.trains and not Path(s.output).exists())
        return cls(done, sum(step or 0 for step in steps))


def checkpoint_step(stage_dir: Path) -> int | None:
    """Step of the newest checkpoint that a training stage can continue from, None without one."""
    config = resolved_config(stage_dir).get("checkpoint") or {}
    store = Store(Path(config.get("dir") or stage_dir / "checkpoints"))
    return next((checkpoint.step for checkpoint in store.resumable()), None)


def resolved_config(stage_dir: Path) -> dict[str, Any]:
    """What the stage wrote when it started; empty before."""
    path = stage_dir / "config.yaml"
    if not path.is_file():
        return {}
    try:
        with disk_errors(f"cannot read {path}"):
            config = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, DiskError):
            raise
        raise DataError(f"{path}: not YAML ({str(error).splitlines()[0]}); the file was damaged or edited") from None
    if not isinstance(config, dict) or not all(isinstance(config.get(s) or {}, dict) for s in ("checkpoint", "trainer")):
        raise DataError(f"{path}: not the configuration of a stage; the file was damaged or edited")
    return config


def write_plan(run_dir: Path, stages: Sequence[PlannedStage]) -> None:
    """Note all stages of the run."""
    write_once(run_dir / FOLDER / PLAN, json.dumps([asdict(stage) for stage in stages], indent=1))


def read_plan(run_dir: Path) -> list[PlannedStage]:
    """The stages of the run.

    Raises:
        UserError: the folder holds no plan.
    """
    path = run_dir / FOLDER / PLAN
    if not path.is_file():
        raise UserError(f"{run_dir}: no {FOLDER}/{PLAN}; not the run folder of a slurm/*.sh job")
    try:
        with disk_errors(f"cannot read {path}"):
            stages = [PlannedStage(**row) for row in strict_json(path.read_bytes())]
        if not all(isinstance(s.name, str) and isinstance(s.output, str) and isinstance(s.trains, bool) for s in stages):
            raise ValueError("a field of another type")
    except DiskError:
        raise
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not the plan of a job ({error}); the file was damaged or edited") from None
    return stages


_PROGRESS = {"time": (int, float), "stages": (int,), "step": (int,)}
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "begin": _PROGRESS | {"job": (str,), "restart": (int,)},
    "end": _PROGRESS | {"status": (int,), "reason": (str,)},
}


class AttemptLog:
    """The attempts of one run folder.

    Args:
        run_dir: run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FOLDER / ATTEMPTS

    def rows(self) -> list[dict[str, Any]]:
        """All lines, oldest first.

        Raises:
            DataError: one that no attempt writes.
        """
        rows = []
        for where, row in stream_jsonl(self._path):
            kinds = _FIELDS.get(row["event"]) if isinstance(row.get("event"), str) else None
            wrong = ["event"] if kinds is None else [name for name, kind in kinds.items() if type(row.get(name)) not in kind]
            if wrong:
                name = wrong[0]
                raise DataError(
                    f"{where}, field {name!r}: {row.get(name)!r} is not what an attempt writes; the file was "
                    "damaged or edited"
                )
            rows.append(row)
        return rows

    def begin(self, job: str, restart: int, max_restarts: int, progress: Standing) -> None:
        """Note a begin.

        Raises:
            UserError: the job was restarted too often, or its last attempts all began where this one does.
        """
        if restart > max_restarts:
            raise UserError(f"job {job} was restarted {restart} times; AMPO_MAX_RESTARTS={max_restarts}")
        begins = [row for row in self.rows() if row["event"] == "begin" and row["job"] == job]
        fruitless = 0
        for row in reversed(begins):
            if (row["stages"], row["step"]) != (progress.stages, progress.step):
                break
            fruitless += 1
        if fruitless >= FRUITLESS:
            raise UserError(
                f"job {job}: the last {fruitless} attempts got no further than {progress.stages} finished stages and step "
                f"{progress.step}; see their logs, then submit again"
            )
        self._append({"event": "begin", "job": job, "restart": restart, **asdict(progress)})

    def end(self, status: int, reason: str, progress: Standing) -> None:
        """Note an end with the exit status of the attempt."""
        self._append({"event": "end", "status": status, "reason": reason, **asdict(progress)})

    def decide(self, max_restarts: int) -> str:
        """``requeue``, or ``stop: `` and why, for the attempt that just ended."""
        rows = self.rows()
        end = rows[-1]
        begin = next(row for row in reversed(rows) if row["event"] == "begin")
        if end["status"] == 0:
            return "stop: finished"
        if end["status"] == EXIT_USER_ERROR:
            return "stop: an error that a restart repeats"
        if begin["restart"] >= max_restarts:
            return f"stop: restarted {begin['restart']} times already (AMPO_MAX_RESTARTS)"
        if (end["stages"], end["step"]) <= (begin["stages"], begin["step"]):
            return "stop: this attempt finished no stage and saved no step"
        return "requeue"

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **row}) + "\n"
        with disk_errors(f"cannot write {self._path}"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_whole(self._path, line.encode())
