"""TensorBoard, W&B (offline) and MLflow (file store) really written and read back; nothing here talks to the network."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.files import read_jsonl
from nemo_ampo.run import trackers
from nemo_ampo.run.config import RunConfig
from nemo_ampo.run.runlog import RunLog, log_positions
from nemo_ampo.run.trackers import check_trackers, open_trackers

CONFIG = {"run": {"seed": 1}, "algorithm": {"clip_low": 0.2}}


def config(folder: Path, **flags: bool) -> RunConfig:
    return RunConfig(dir=str(folder), init_from="x", **flags)


def write(run: RunConfig, first: int, last: int, positions: dict[str, int] | None = None) -> None:
    with RunLog(Path(run.dir), positions=positions, trackers=open_trackers(run, "ampo", first, CONFIG)) as log:
        for step in range(first, last):
            log.metrics(step, {"reward/mean": float(step), "tag/a:b?/reward": 1.0, "nothing": math.nan})


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs are over before a busy machine has imported MLflow."""
    monkeypatch.setattr(trackers, "END_S", 120.0)


def test_tensorboard_continues_one_curve(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = config(tmp_path)
    write(run, 0, 3)
    write(run, 2, 4, positions=log_positions(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert "nothing" not in events.Tags()["scalars"]
    assert not (tmp_path / "trackers.json").exists()


def test_mlflow_continues_the_same_run(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    run = config(tmp_path, mlflow=True)
    write(run, 0, 2)
    run_id = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    write(run, 2, 4, positions=log_positions(tmp_path))
    assert json.loads((tmp_path / "trackers.json").read_text())["mlflow"] == run_id
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "reward/mean")] == [(i, float(i)) for i in range(4)]
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"run.seed": "1", "algorithm.clip_low": "0.2"}
    assert found.data.metrics["tag/a_b_/reward"] == 1.0


def test_a_crash_is_marked_as_one(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    run = config(tmp_path, mlflow=True)
    with pytest.raises(UserError), RunLog(tmp_path, trackers=open_trackers(run, "ampo", 0, CONFIG)):
        raise UserError("stop")
    run_id = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert MlflowClient((tmp_path / "mlruns").as_uri()).get_run(run_id).info.status == "FAILED"


def test_wandb_offline_writes_runs_of_one_id(tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    # A process each, as stop and resume have: within one, wandb's own service confuses two runs of the same id.
    for first, last in ((0, 2), (2, 3)):
        script = f"""
from pathlib import Path
from nemo_ampo.run.config import RunConfig
from nemo_ampo.run.runlog import RunLog, log_positions
from nemo_ampo.run import trackers
trackers.END_S = 120.0
run = RunConfig(dir={str(tmp_path)!r}, init_from="x", wandb=True)
folder = Path(run.dir)
with RunLog(folder, positions=log_positions(folder), trackers=trackers.open_trackers(run, "ampo", {first}, {{}})) as log:
    for step in range({first}, {last}):
        log.metrics(step, {{"reward/mean": float(step)}})
"""
        subprocess.run([sys.executable, "-c", script], check=True)
    run_id = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    points = []
    for file in files:
        store = DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                points.append((row["step"], row["reward/mean"]))
    assert sorted(points) == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_new_run_in_a_used_folder_gets_new_ids(tmp_path: Path) -> None:
    run = config(tmp_path, mlflow=True)
    write(run, 0, 1)
    first = (tmp_path / "trackers.json").read_text()
    write(run, 0, 1)
    assert (tmp_path / "trackers.json").read_text() != first


def test_wandb_without_a_key_is_refused_before_anything_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(ConfigError, match=r"run\.wandb: no API key"):
        check_trackers(config(tmp_path, wandb=True))


@pytest.mark.parametrize("key, wheel", [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, wheel: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == key else find(name))
    with pytest.raises(ConfigError, match=rf"run.{key}: the package is not installed; pip install {wheel}"):
        check_trackers(config(tmp_path, **{key: True}))
    check_trackers(config(tmp_path))


def test_an_unusable_mlflow_address_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://here")
    with pytest.raises(ConfigError, match=r"run\.mlflow: nonsense://here"):
        check_trackers(config(tmp_path, mlflow=True))


class Echo(BaseHTTPRequestHandler):
    """Refuses everything and repeats the credentials it was sent."""

    def do_GET(self) -> None:
        body = f"bad auth {self.headers['Authorization']}".encode()
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize("way", ["token", "address", "dead address"])
def test_a_service_that_repeats_its_credentials_gives_nothing_away(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = 9 if way == "dead address" else server.server_port
        user = "" if way == "token" else "me:s3cr3t%2Fpassword@"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{user}127.0.0.1:{port}")
        if way == "token":
            monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cr3t/password")
        write(config(tmp_path, mlflow=True), 0, 1)
        server.shutdown()
    said = capfd.readouterr().err
    assert said.count("warning: run.mlflow") == 1
    for secret in ("s3cr3t", base64.b64encode(b"me:s3cr3t/password").decode()):
        assert secret not in said


def test_a_tracker_file_that_is_damaged_costs_its_ids_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path, mlflow=True)
    write(run, 0, 1)
    (tmp_path / "trackers.json").write_text("[1")
    write(run, 1, 2, positions=log_positions(tmp_path))
    assert capfd.readouterr().err.count("warning:") == 1
    assert json.loads((tmp_path / "trackers.json").read_text())["mlflow"]


def test_a_tensorboard_folder_that_cannot_be_made_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    write(config(tmp_path), 0, 3)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3
    assert capfd.readouterr().err.count("warning: TensorBoard's copy") == 1


def test_a_limit_on_file_sizes_costs_points_of_tensorboard_only(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script = f"""
import resource, signal
from pathlib import Path
from nemo_ampo.run.trackers import TensorBoard
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
board = TensorBoard(Path({str(tmp_path)!r}), 0)
for step in range(20):
    if step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
    if step == 15:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    board.log(step, {{"reward/mean": float(step)}})
board.close(False)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.count("warning: TensorBoard's copy of the log is not complete (") == 1, done.stderr
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    steps = [e.step for e in events.Scalars("reward/mean")]
    assert steps[:5] == [0, 1, 2, 3, 4] and steps[-5:] == [15, 16, 17, 18, 19] and len(steps) < 20
