"""Copies of the run log for people who watch runs elsewhere: TensorBoard, Weights & Biases, MLflow.

``metrics.jsonl`` is the truth; a tracker only gets what is written there, under the same names. TensorBoard is always
written (``<run.dir>/tensorboard``), the other two behind ``run.wandb`` and ``run.mlflow``. Where they send it follows their
own environment variables: ``WANDB_API_KEY``, ``WANDB_MODE=offline``, ``WANDB_PROJECT``; ``MLFLOW_TRACKING_URI`` (default:
``<run.dir>/mlruns``), ``MLFLOW_EXPERIMENT_NAME``. A resumed run continues the same W&B and MLflow run: the ids are kept in
``trackers.json`` of the run folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nemo_ampo.config import RunConfig
from nemo_ampo.errors import ConfigError
from nemo_ampo.files import write_once

IDS_FILE = "trackers.json"
PROJECT = "nemo-ampo"
PARAMS_PER_CALL = 100
"""MLflow takes no more parameters at once."""


class Tracker(Protocol):
    """Somewhere metrics are copied to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The finite metrics of one step."""
        ...

    def close(self, failed: bool) -> None:
        """Nothing more comes; ``failed`` when an error ended the run."""
        ...


def check_trackers(run: RunConfig) -> None:
    """Can the trackers that are switched on be used? To be asked before a model loads.

    Raises:
        ConfigError: a package is not installed, or W&B has no key and is not offline.
    """
    for key, package, distribution in (("wandb", "wandb", "wandb"), ("mlflow", "mlflow", "mlflow-skinny")):
        if getattr(run, key) and importlib.util.find_spec(package) is None:
            raise ConfigError(f"run.{key}: the package is not installed; pip install {distribution}, or set run.{key}=false")
    if run.wandb and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        if not wandb.api.api_key:
            raise ConfigError("run.wandb: no API key; set WANDB_API_KEY, or WANDB_MODE=offline to keep the metrics here")


def open_trackers(run: RunConfig, stage: str, first_step: int, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run, new or continued. Only the job's main process may call this.

    Args:
        run: folder and flags.
        stage: ``bc`` or ``ampo``; the tracked run is called after it and the run folder.
        first_step: the first step that will be logged; what a tracker holds from there on is obsolete.
        config: resolved configuration, kept with a new run.
    """
    folder = Path(run.dir)
    ids_path = folder / IDS_FILE
    # First step 0 is a new run, even in a folder that was used before.
    ids = json.loads(ids_path.read_text(encoding="utf-8")) if first_step and ids_path.exists() else {}
    name = f"{folder.resolve().name}-{stage}"
    trackers: list[Tracker] = [TensorBoard(folder / "tensorboard", first_step)]
    if run.wandb:
        ids["wandb"] = ids.get("wandb") or secrets.token_hex(4)
        trackers.append(WeightsAndBiases(folder, name, ids["wandb"], config, quiet=not run.verbose))
    if run.mlflow:
        mlflow = MLflow(folder, name, ids.get("mlflow"), config)
        ids["mlflow"] = mlflow.run_id
        trackers.append(mlflow)
    if ids:
        write_once(ids_path, json.dumps(ids))
    return trackers


class TensorBoard:
    """Event files; of a resumed run, points from ``first_step`` on are purged by the viewer."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)  # type: ignore[no-untyped-call]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def close(self, failed: bool) -> None:
        """See :class:`Tracker`."""
        self._writer.close()  # type: ignore[no-untyped-call]


class WeightsAndBiases:
    """A W&B run whose horizontal axis is our step, so that a step done again after a crash is not refused."""

    def __init__(self, folder: Path, name: str, run_id: str, config: Mapping[str, Any], quiet: bool) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=name,
                id=run_id,
                resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",
                dir=str(folder),
                config=dict(config),
                # Our own output stays ours: no copy of the console, the code or the git remote.
                settings=wandb.Settings(console="off", disable_code=True, disable_git=True, silent=quiet),
            )
        except wandb.errors.Error as error:
            raise ConfigError(f"run.wandb: {str(error).splitlines()[0]}") from None
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        """See :class:`Tracker`."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """An MLflow run."""

    def __init__(self, folder: Path, name: str, run_id: str | None, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").resolve().as_uri()
        try:
            self._client = MlflowClient(uri)
            if run_id is None:
                run_id = self._client.create_run(self._experiment(), run_name=name).info.run_id
                params = [Param(key, str(value)[:500]) for key, value in _flat(config)]
                for begin in range(0, len(params), PARAMS_PER_CALL):
                    self._client.log_batch(run_id, params=params[begin : begin + PARAMS_PER_CALL])
            else:
                self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise ConfigError(f"run.mlflow: {uri}: {str(error).splitlines()[0]}") from None
        self.run_id = run_id
        self._warned = False

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`. A server that does not answer costs points of a copy, not the run: it is said once."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now_ms = int(time.time() * 1000)
        metrics = [Metric(re.sub(r"[^\w\-./ ]", "_", name), value, now_ms, step) for name, value in values.items()]
        try:
            self._client.log_batch(self.run_id, metrics)
        except MlflowException as error:
            if not self._warned:
                print(f"warning: MLflow did not take step {step}: {str(error).splitlines()[0]}", file=sys.stderr)
            self._warned = True

    def close(self, failed: bool) -> None:
        """See :class:`Tracker`."""
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """``section.key`` and value of every leaf."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found
