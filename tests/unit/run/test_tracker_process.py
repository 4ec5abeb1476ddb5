"""Runs whose W&B or MLflow cannot be reached, in every way a server can fail: the real libraries, real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nemo_ampo.files import read_jsonl

pytestmark = pytest.mark.slow
STEPS = 4
RUN = """
import sys, time
from pathlib import Path
from nemo_ampo.run.config import RunConfig
from nemo_ampo.run.runlog import RunLog
from nemo_ampo.run.trackers import check_trackers, open_trackers
folder, kind = Path(sys.argv[1]), sys.argv[2]
run = RunConfig(dir=str(folder), init_from="x", **{kind: True})
check_trackers(run)
with RunLog(folder, trackers=open_trackers(run, "ampo", 0, {"a": {"b": 1}})) as log:
    for step in range(4):
        log.metrics(step, {"reward/mean": float(step)})
        time.sleep(0.5)
(folder / "policy.nemo").touch()
print("done", flush=True)
"""
KINDS, FAILURES = ("wandb", "mlflow"), ("dead", "silent", "500", "403", "garbage", "dies")


class Silent:
    """Accepts and never answers."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        self._socket.close()


class Http:
    """Answers everything in one way; ``dies`` is an MLflow server that ends with the second step."""

    def __init__(self, failure: str) -> None:
        outer = self
        self.steps: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer("")

            def do_POST(self) -> None:
                self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode("utf-8", "replace"))

            def _answer(self, asked: str) -> None:
                status, body = (
                    (200, "<html>") if failure == "garbage" else (int(failure), "{}") if failure != "dies" else (200, "")
                )
                if failure == "dies":
                    if "log-batch" in self.path and "metrics" in asked:
                        outer.steps.append(asked)
                        if len(outer.steps) > 1:
                            threading.Thread(target=outer.close).start()
                            return
                    record = {"experiment": {"experiment_id": "1", "name": "n"}, "run": {"info": {"run_id": "r1"}}}
                    body = json.dumps(record)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Dead:
    url = "http://127.0.0.1:9"

    def close(self) -> None:
        pass


@dataclass
class Done:
    status: int
    out: str
    said: str
    folder: Path
    left: list[str]


def still_there(mark: str) -> list[str]:
    """Commands of all processes that carry the mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes() and int(process.name) != os.getpid():
                found.append((process / "cmdline").read_text().replace("\0", " ") or process.name)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Done]]:
    """Every kind with every failure, all at a time: they do nothing but wait."""
    servers, started = [], {}
    for kind in KINDS:
        for failure in FAILURES:
            server = Dead() if failure == "dead" else Silent() if failure == "silent" else Http(failure)
            servers.append(server)
            folder = tmp_path_factory.mktemp(f"{kind}-{failure}")
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}
            environment |= {
                "WANDB_API_KEY": "0123456789" * 4,
                "WANDB_BASE_URL": server.url,
                "MLFLOW_TRACKING_URI": server.url,
            }
            environment |= {"NEMO_TEST_MARK": str(folder)}
            process = subprocess.Popen(
                [sys.executable, "-c", RUN, str(folder), kind],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            started[kind, failure] = process, folder
    found = {}
    for key, (process, folder) in started.items():
        try:
            out, said = process.communicate(timeout=120)
        finally:
            process.kill()
        found[key] = Done(process.returncode, out, said, folder, still_there(f"NEMO_TEST_MARK={folder}"))
    for server in servers:
        with contextlib.suppress(OSError):
            server.close()
    yield found


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_outage_is_said_once_and_the_run_ends_well(runs: dict[tuple[str, str], Done], kind: str, failure: str) -> None:
    run = runs[kind, failure]
    assert run.status == 0 and run.out == "done\n", run.said
    assert [row["step"] for row in read_jsonl(run.folder / "metrics.jsonl")] == list(range(STEPS))
    assert (run.folder / "policy.nemo").exists()
    assert run.said.startswith(f"warning: run.{kind}: the run goes on, but this copy lacks some or all of it ("), run.said
    assert run.said.count("\n") == 1, run.said
    assert run.left == []
