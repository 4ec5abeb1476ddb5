"""The other side of :class:`nemo_ampo.run.trackers.Copy`: a process that talks to W&B or MLflow: no run waits for them.

Their libraries retry for minutes, wait without a limit at the end of a process, and start processes of their own. Here they
may: the main thread reads what the run says (JSON lines on stdin, the first one a :class:`Setup`), a second one talks to the
service, and when the run has ended the process does so too within :attr:`Setup.end_s`, whatever is under way, with all it
started.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nemo_ampo.chat.proxies import passwords
from nemo_ampo.chat.secrets import Secrets
from nemo_ampo.overrides import dotted

PROJECT = "nemo-ampo"
PARAMS_PER_CALL = 100
"""MLflow takes no more parameters at once."""
_KILL_S, _PR_SET_CHILD_SUBREAPER = 2.0, 36
MOST_WAITING = 10_000
"""Steps kept for a service that does not answer."""


@dataclass(frozen=True)
class Setup:
    """What is copied, and where to.

    Attributes:
        kind: a key of :data:`SERVICES`.
        folder: run folder.
        name: of the tracked run.
        run_id: of the tracked run that is continued; None lets the service choose one.
        config: resolved configuration, kept with a new run.
        end_s: what is left may be sent for so long after the run has ended, seconds.
    """

    kind: str
    folder: str
    name: str
    run_id: str | None
    config: dict[str, Any]
    end_s: float


class Service(Protocol):
    """A tracked run that is open."""

    run_id: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of one step."""
        ...

    def finish(self, failed: bool) -> None:
        """Nothing more comes."""
        ...


class WeightsAndBiases:
    """A W&B run whose horizontal axis is our step, so that a step done again after a crash is not refused."""

    def __init__(self, setup: Setup) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=setup.name,
            id=setup.run_id,
            resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",
            dir=setup.folder,
            config=setup.config,
            # Our own output stays ours: no copy of the console, the code or the git remote.
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True),
        )
        self.run_id = self._run.id
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Service`."""
        self._run.log({"step": step, **values})

    def finish(self, failed: bool) -> None:
        """See :class:`Service`."""
        import wandb

        self._run.finish(exit_code=int(failed))
        wandb.teardown()  # its service has written everything when it has ended


class MLflow:
    """An MLflow run."""

    def __init__(self, setup: Setup) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(
            os.environ.get("MLFLOW_TRACKING_URI") or (Path(setup.folder) / "mlruns").resolve().as_uri()
        )
        if setup.run_id is None:
            self.run_id = self._client.create_run(self._experiment(), run_name=setup.name).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in dotted(setup.config)]
            for begin in range(0, len(params), PARAMS_PER_CALL):
                self._client.log_batch(self.run_id, params=params[begin : begin + PARAMS_PER_CALL])
        else:
            self.run_id = setup.run_id
            self._client.update_run(self.run_id, status="RUNNING")

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Service`."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(re.sub(r"[^\w\-./ ]", "_", name), value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics)

    def finish(self, failed: bool) -> None:
        """See :class:`Service`."""
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


SERVICES: dict[str, type[WeightsAndBiases | MLflow]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


def main() -> None:
    """Copy until the run ends; the process ends here, at the latest :attr:`Setup.end_s` after it."""
    # Whatever a library prints must not reach the run through the pipe that answers it.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    setup = Setup(**json.loads(sys.stdin.readline()))
    _adopt_orphans()
    # One call of a service that does not answer: some seconds, not the libraries' minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    inbox: queue.Queue[dict[str, Any]] = queue.Queue(MOST_WAITING)
    ended, worker = {"failed": True}, _Worker(setup, inbox, answers)
    worker.start()
    for line in sys.stdin:
        message = json.loads(line)
        if "failed" in message:
            ended = message
            break
        with contextlib.suppress(queue.Full):
            inbox.put_nowait(message)
    with contextlib.suppress(queue.Full):
        inbox.put_nowait(ended)
    worker.join(setup.end_s)
    if worker.is_alive():
        worker.say(problem=f"it did not take everything within {setup.end_s:g} s of the run's end")
    _end()


class _Worker(threading.Thread):
    """Opens the tracked run, then hands on what comes; says the first thing that goes wrong."""

    def __init__(self, setup: Setup, inbox: queue.Queue[dict[str, Any]], answers: Any) -> None:
        super().__init__(daemon=True)
        self._setup, self._inbox, self._answers = setup, inbox, answers
        self._has_problem = False

    def run(self) -> None:
        try:
            service: Service = SERVICES[self._setup.kind](self._setup)
            self.say(run_id=service.run_id)
        except BaseException as error:
            self.say(problem=_first_line(error))
            _end()
        while True:
            message = self._inbox.get()
            try:
                if "failed" in message:
                    service.finish(message["failed"])
                    return
                service.log(message["step"], message["values"])
            except BaseException as error:
                self.say(problem=_first_line(error))
                if "failed" in message:
                    return

    def say(self, **answer: str) -> None:
        """One line for the run; of problems the first."""
        if "problem" in answer:
            if self._has_problem:
                return
            self._has_problem = True
        with contextlib.suppress(OSError):
            self._answers.write(json.dumps(answer) + "\n")
            self._answers.flush()


def without_secrets(text: str) -> str:
    """Without the services' keys and passwords, which servers and libraries repeat."""
    keys = [
        value
        for name, value in os.environ.items()
        if re.fullmatch(r"(WANDB|MLFLOW|AWS|AZURE)_\w*(KEY|TOKEN|PASSWORD)", name)
    ]
    addresses = [os.environ.get(name, "") for name in ("MLFLOW_TRACKING_URI", "WANDB_BASE_URL")]
    in_addresses = [secret for address in addresses for secret in passwords(address)]
    return re.sub("//[^/@]*@", "//", Secrets([*keys, *in_addresses]).redact(text))


def _first_line(error: BaseException) -> str:
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]


def _end() -> None:
    """Leave at once, with everything started here: W&B's own service would wait for its network, and we for it.

    What its parent leaves behind comes to this process (:func:`_adopt_orphans`), so that one more look finds it.
    """
    give_up = time.monotonic() + _KILL_S
    while (alive := _descendants(os.getpid())) and time.monotonic() < give_up:
        for process in alive:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)
    os._exit(0)


def _adopt_orphans() -> None:
    with contextlib.suppress(
        OSError, AttributeError
    ):  # Linux alone has it; without it an orphan may outlive us for a moment.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _descendants(process: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found


if __name__ == "__main__":
    main()
