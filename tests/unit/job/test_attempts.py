"""Another attempt only where the last one got somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_ampo.checkpoint.store import MANIFEST, OPTIMIZER, JobLayout, Manifest, measure
from nemo_ampo.commands.status import read_status
from nemo_ampo.errors import UserError
from nemo_ampo.job.attempts import AttemptLog, PlannedStage, Standing, checkpoint_step, write_plan


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    stages = [
        PlannedStage("convert", str(tmp_path / "base.nemo"), False),
        PlannedStage("ampo", str(tmp_path / "ampo" / "policy.nemo"), True),
    ]
    write_plan(tmp_path, stages)
    return tmp_path


def checkpoint(run_dir: Path, step: int) -> None:
    manifest(run_dir / "ampo" / "checkpoints" / f"step-{step:06d}", step)


def manifest(folder: Path, step: int) -> None:
    """A complete checkpoint with one file of optimizer state."""
    (folder / OPTIMIZER).mkdir(parents=True)
    (folder / OPTIMIZER / "state").write_text("state")
    files = measure(folder, [f"{OPTIMIZER}/state"])
    layout = JobLayout(world=1, tensor=1, pipeline=1, data=1)
    (folder / MANIFEST).write_text(Manifest("ampo", step, {}, layout, {}, None, {}, files).dump())


def end(run_dir: Path, status: int) -> str:
    log = AttemptLog(run_dir)
    log.end(status, "because", Standing.of(run_dir))
    return log.decide(max_restarts=3)


def begin(run_dir: Path, restart: int = 0) -> None:
    AttemptLog(run_dir).begin("7", restart, 3, Standing.of(run_dir))


def test_progress_is_finished_stages_then_checkpointed_steps(run_dir: Path) -> None:
    assert Standing.of(run_dir) == Standing(0, 0)
    (run_dir / "base.nemo").touch()
    assert Standing.of(run_dir) == Standing(1, 0)
    checkpoint(run_dir, 9)
    checkpoint(run_dir, 10)
    (run_dir / "ampo" / "checkpoints" / ".saving-step-000011").mkdir()
    assert Standing.of(run_dir) == Standing(1, 10)
    (run_dir / "ampo" / "policy.nemo").touch()
    assert Standing.of(run_dir) == Standing(2, 0) > Standing(1, 10)


def test_a_later_checkpoint_or_a_finished_stage_earns_a_requeue(run_dir: Path) -> None:
    begin(run_dir)
    checkpoint(run_dir, 1)
    assert end(run_dir, 75) == "requeue"
    begin(run_dir, 1)
    (run_dir / "base.nemo").touch()
    assert end(run_dir, 137) == "requeue"


def test_no_progress_no_requeue(run_dir: Path) -> None:
    checkpoint(run_dir, 5)
    begin(run_dir)
    assert end(run_dir, 75).startswith("stop: this attempt finished no stage and saved no step")


def test_what_a_restart_repeats_is_not_restarted(run_dir: Path) -> None:
    begin(run_dir)
    checkpoint(run_dir, 1)
    assert end(run_dir, 2) == "stop: an error that a restart repeats"


def test_restarts_are_counted(run_dir: Path) -> None:
    begin(run_dir, 3)
    checkpoint(run_dir, 1)
    assert end(run_dir, 75) == "stop: restarted 3 times already (AMPO_MAX_RESTARTS)"
    with pytest.raises(UserError, match="restarted 4 times"):
        begin(run_dir, 4)


def test_slurm_s_own_requeues_end_when_they_bring_nothing(run_dir: Path) -> None:
    begin(run_dir, 0)  # its node failed: nobody wrote an end
    begin(run_dir, 1)
    with pytest.raises(UserError, match="the last 2 attempts got no further than 0 finished stages and step 0"):
        begin(run_dir, 2)
    checkpoint(run_dir, 1)
    begin(run_dir, 2)


def test_a_new_job_begins_anew(run_dir: Path) -> None:
    begin(run_dir, 0)
    begin(run_dir, 1)
    AttemptLog(run_dir).begin("8", 0, 3, Standing.of(run_dir))


def test_a_torn_checkpoint_does_not_count(run_dir: Path) -> None:
    assert checkpoint_step(run_dir / "ampo") is None
    checkpoint(run_dir, 12)
    checkpoint(run_dir, 13)
    (run_dir / "ampo" / "checkpoints" / "step-000013" / OPTIMIZER / "state").write_text("st")
    assert checkpoint_step(run_dir / "ampo") == 12


def test_checkpoints_may_lie_elsewhere(run_dir: Path, tmp_path: Path) -> None:
    manifest(tmp_path / "fast" / "step-000004", 4)
    (run_dir / "ampo").mkdir()
    (run_dir / "ampo" / "config.yaml").write_text(f"checkpoint: {{dir: {tmp_path / 'fast'}}}\n")
    assert checkpoint_step(run_dir / "ampo") == 4


def test_status_says_what_is_done_running_left_and_wrong(run_dir: Path) -> None:
    assert [stage.state for stage in read_status(run_dir).stages] == ["to do", "to do"]
    begin(run_dir)
    assert [stage.state for stage in read_status(run_dir).stages] == ["running", "to do"]
    (run_dir / "base.nemo").touch()
    checkpoint(run_dir, 2)
    (run_dir / "ampo" / "metrics.jsonl").write_text('{"step": 0, "kind": "train"}\n{"step": 1, "kind": "train"}\n')
    (run_dir / "ampo" / "config.yaml").write_text("trainer: {reinforce: {max_steps: 8}}\n")
    assert read_status(run_dir).stages[1].state == "running"
    assert read_status(run_dir).stages[1].steps == "2 of 8, checkpoint at 2"
    logs = run_dir / "logs" / "7-0"
    logs.mkdir(parents=True)
    (logs / "ampo-rank0.log").write_text("Traceback (most recent call last):\n  ...\nRuntimeError: connection closed\nbye\n")
    end(run_dir, 1)
    status = read_status(run_dir)
    assert [stage.state for stage in status.stages] == ["done", "stopped"]
    assert (status.attempts, status.running) == (1, False)
    assert status.last_error == "logs/7-0/ampo-rank0.log: RuntimeError: connection closed"
    assert status.last_end.endswith("because (status 1)")
    (run_dir / "ampo" / "policy.nemo").touch()
    assert read_status(run_dir).last_error == ""


def test_status_of_any_other_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the run folder"):
        read_status(tmp_path)
