"""Copies of the run log for people who watch runs elsewhere: TensorBoard, Weights & Biases, MLflow.

``metrics.jsonl`` is the truth; a tracker only gets what is written there, under the same names. TensorBoard is always
written (``<run.dir>/tensorboard``), the other two behind ``run.wandb`` and ``run.mlflow``. Where they send it follows their
own environment variables: ``WANDB_API_KEY``, ``WANDB_MODE=offline``, ``WANDB_PROJECT``; ``MLFLOW_TRACKING_URI`` (default:
``<run.dir>/mlruns``), ``MLFLOW_EXPERIMENT_NAME``. A resumed run continues the same W&B and MLflow run: the ids are kept in
``trackers.json`` of the run folder.

A copy never costs the run: W&B and MLflow are spoken to by a process each, what cannot be copied is said once, and at the
end all of them together are waited for :data:`END_S` at most.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol

from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.files import write_once
from nemo_ampo.run.config import RunConfig
from nemo_ampo.run.tracker_process import MOST_WAITING, Setup, without_secrets
from nemo_ampo.text import one_line

IDS_FILE = "trackers.json"
END_S = 10.0
"""A run that is done waits so long for its copies, seconds, for all of them together."""
_LEAVING_S = 2.0
"""Of these, what a copy's process may need to end itself and all it started."""


class Tracker(Protocol):
    """Somewhere metrics are copied to. Nothing here raises: what goes wrong is said once."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The finite metrics of one step."""
        ...

    def close(self, failed: bool) -> None:
        """Nothing more comes; ``failed`` when an error ended the run. Does not wait."""
        ...

    def wait(self, deadline: float) -> None:
        """Until everything is copied, or until ``deadline`` on the monotonic clock."""
        ...


def check_trackers(run: RunConfig) -> None:
    """Can the trackers that are switched on be used? To be asked before a model loads; nobody is called.

    Raises:
        ConfigError: a package is not installed, W&B has no key and is not offline, or MLflow's address is none.
    """
    for key, package, distribution in (("wandb", "wandb", "wandb"), ("mlflow", "mlflow", "mlflow-skinny")):
        if getattr(run, key) and importlib.util.find_spec(package) is None:
            raise ConfigError(f"run.{key}: the package is not installed; pip install {distribution}, or set run.{key}=false")
    if run.wandb and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.api.api_key:
            raise ConfigError("run.wandb: no API key; set WANDB_API_KEY, or WANDB_MODE=offline to keep the metrics here")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if run.mlflow and uri:
        from mlflow.tracking import MlflowClient

        try:
            MlflowClient(uri)
        except Exception as error:  # whatever it finds in the address, a missing driver of a database included
            raise ConfigError(without_secrets(f"run.mlflow: {one_line(uri)}: {one_line(str(error))}")) from None


def open_trackers(run: RunConfig, stage: str, first_step: int, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run, new or continued. Only the job's main process may call this.

    Args:
        run: folder and flags.
        stage: ``bc`` or ``ampo``; the tracked run is called after it and the run folder.
        first_step: the first step that will be logged; what a tracker holds from there on is obsolete.
        config: resolved configuration, kept with a new run.
    """
    folder = Path(run.dir)
    ids = _Ids(folder / IDS_FILE, continued=first_step > 0)
    name = f"{folder.resolve().name}-{stage}"
    trackers: list[Tracker] = [TensorBoard(folder / "tensorboard", first_step)]
    for kind, wanted, new_id in (("wandb", run.wandb, secrets.token_hex(4)), ("mlflow", run.mlflow, None)):
        if wanted:
            setup = Setup(kind, str(folder), name, ids.get(kind) or new_id, dict(config), END_S - _LEAVING_S)
            try:
                trackers.append(Copy(setup, ids, run.verbose))
            except OSError as error:
                _warn(f"run.{kind}: the run goes on without this copy", str(error))
    return trackers


def close_all(trackers: Sequence[Tracker], failed: bool) -> None:
    """End the copies of a run, within :data:`END_S`."""
    deadline = time.monotonic() + END_S
    for tracker in trackers:
        tracker.close(failed)
    for tracker in trackers:
        tracker.wait(deadline)


class TensorBoard:
    """Event files; of a resumed run, points from ``first_step`` on are purged by the viewer.

    Written here and now: the library's own writer does it in a thread, which dies of a full disk with a traceback.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._said = False
        self._file: IO[bytes] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time():.6f}.{os.uname().nodename}.{os.getpid()}"
            self._file = (folder / name).open("wb", buffering=0)
        except OSError as error:
            self._say(error)
        self._write(
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))

    def close(self, failed: bool) -> None:
        """See :class:`Tracker`."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()

    def wait(self, deadline: float) -> None:
        """See :class:`Tracker`."""

    def _write(self, *events: Any) -> None:
        from io import BytesIO

        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            return
        records = BytesIO()
        for event in events:
            RecordWriter(records).write(event.SerializeToString())
        before = self._file.tell()
        try:
            if self._file.write(records.getvalue()) != records.tell():
                raise OSError("only a part could be written; is the disk full?")
        except OSError as error:
            self._say(error)
            # Half a record would hide all later ones from the viewer.
            with contextlib.suppress(OSError):
                self._file.truncate(before)
                self._file.seek(before)

    def _say(self, error: OSError) -> None:
        if not self._said:
            _warn("TensorBoard's copy of the log is not complete", str(error))
        self._said = True


class Copy:
    """A process that copies to one service, see :mod:`nemo_ampo.run.tracker_process`.

    Args:
        setup: of the process.
        ids: where the id of the tracked run is kept.
        verbose: let the service's own library speak.

    Raises:
        OSError: there cannot be one more process.
    """

    def __init__(self, setup: Setup, ids: _Ids, verbose: bool) -> None:
        self._kind, self._ids, self._said = setup.kind, ids, False
        self._lines: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nemo_ampo.run.tracker_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if verbose else subprocess.DEVNULL,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            # Not of the terminal's group: Ctrl-C is for the run, which then says how it ended.
            start_new_session=True,
        )
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._put(asdict(setup))
        self._writer.start()
        self._reader.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._put({"step": step, "values": dict(values)})

    def close(self, failed: bool) -> None:
        """See :class:`Tracker`."""
        self._put({"failed": failed})
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)

    def wait(self, deadline: float) -> None:
        """See :class:`Tracker`."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._say(f"it did not take everything within {END_S:g} s of the run's end")
            self._process.kill()
            self._process.wait()
        self._reader.join(1.0)

    def _put(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(json.dumps(message, default=str) + "\n")

    def _write(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            while (line := self._lines.get()) is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            if "run_id" in answer:
                try:
                    self._ids.keep(self._kind, answer["run_id"])
                except UserError as error:
                    self._say(str(error))
            else:
                self._say(answer["problem"])

    def _say(self, problem: str) -> None:
        if not self._said:
            _warn(f"run.{self._kind}: the run goes on, but this copy lacks some or all of it", problem)
        self._said = True


class _Ids:
    """``trackers.json``: the tracked runs that a resumed run continues. A new run, even in a used folder, gets new ones."""

    def __init__(self, path: Path, continued: bool) -> None:
        self._path, self._lock = path, threading.Lock()
        self._ids: dict[str, str] = {}
        if continued and path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                self._ids = {str(kind): str(run_id) for kind, run_id in found.items()}
            except (OSError, ValueError, AttributeError):
                _warn(f"{path} cannot be read", "the copies begin new tracked runs")

    def get(self, kind: str) -> str | None:
        return self._ids.get(kind)

    def keep(self, kind: str, run_id: str) -> None:
        with self._lock:
            self._ids[kind] = run_id
            write_once(self._path, json.dumps(self._ids))


def _warn(what: str, why: str) -> None:
    print(f"warning: {what} ({without_secrets(one_line(why))})", file=sys.stderr, flush=True)
