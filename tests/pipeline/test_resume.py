"""Runs that must be equal: one that was stopped, killed and continued, and one that was split over two ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from plan_check import plan_error
from stage_runs import ENDS, ROOT, Quickstart, ends_named, naming_one_end

from nemo_ampo.checkpoint.store import Store
from nemo_ampo.files import read_jsonl
from nemo_ampo.overrides import override
from nemo_ampo.world.judge_server import demo_judge_process

pytestmark = pytest.mark.slow
STEPS, SAVE_EVERY, KILLED_AFTER = 10, 5, 7
COMPARED_STEPS = 4
LAYOUTS = {
    "one process": (1, []),
    "data parallel": (2, []),
    "tensor parallel": (2, ["model.tensor_model_parallel_size=2"]),
    "pipeline parallel": (2, ["model.pipeline_model_parallel_size=2"]),
}
RESUMED = ("one process", "data parallel", "tensor parallel")
SMALL = [
    *("rollout.prompts_per_step=2", "rollout.group_size=8", "rollout.max_new_tokens=96", "model.global_batch_size=16"),
    *("model.micro_batch_size=4", "model.reinforce.forward_micro_batch_size=8"),
    *(f"trainer.reinforce.max_steps={STEPS}", f"trainer.reinforce.save_interval={SAVE_EVERY}"),
]


class Job:
    """One stage on the tiny model, in processes of its own."""

    def __init__(self, quickstart: Quickstart, folder: Path, stage: str, overrides: list[str], ranks: int = 1) -> None:
        self.folder = folder
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
        start = {"bc": quickstart.folder / "nemo" / "base.nemo", "ampo": quickstart.folder / "bc" / "policy.nemo"}[stage]
        rows = {"bc": "bc_train.jsonl", "ampo": "rl_train.jsonl"}[stage]
        self._command = [
            *(sys.executable, "-m", *torchrun, f"recipes.{stage}", "--config-name", "tiny", f"run.dir={folder}"),
            *(override("run.init_from", start), override("data.train", quickstart.folder / "world" / rows), *overrides),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *overrides: str) -> Job:
        self._errors = self.folder.with_name(f"{self.folder.name}.err")
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                [*self._command, *overrides],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
        return self

    @property
    def said(self) -> str:
        return self._errors.read_text()

    @property
    def steps(self) -> list[int]:
        return [r["step"] for r in read_jsonl(self.folder / "metrics.jsonl") if r["kind"] == "train"]

    def wait_for_steps(self, count: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + 300
        while len(self.steps) < count:
            assert self._process.poll() is None, self.said[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """To every process of the job; torchrun puts its workers into sessions of their own."""
        assert self._process is not None
        for pid in family(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait(timeout=300)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.wait()


def family(pid: int) -> list[int]:
    """A process and all its descendants, parents first."""
    pids = [pid]
    for parent in pids:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            pids += map(int, children.read_text().split())
    return pids


@pytest.fixture(scope="module")
def judge_url() -> Iterator[str]:
    with demo_judge_process() as url:
        yield url


@pytest.fixture(scope="module")
def straight_run(
    quickstart: Quickstart, judge_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Job]]:
    """Starts the run of a layout that nothing interrupts, once; its verdicts are kept in ``verdicts.sqlite`` beside it."""
    root, jobs = tmp_path_factory.mktemp("straight"), dict[str, Job]()

    def started(name: str) -> Job:
        if name not in jobs:
            ranks, overrides = LAYOUTS[name]
            folder = root / name.replace(" ", "-") / "run"
            folder.parent.mkdir()
            words = [f"judge.base_url={judge_url}", f"judge.cache={folder.parent / 'verdicts.sqlite'}", *SMALL, *overrides]
            jobs[name] = Job(quickstart, folder, "ampo", words, ranks).start()
        return jobs[name]

    yield started
    for job in jobs.values():
        job.stop()


@pytest.mark.parametrize("name", RESUMED)
def test_ten_steps_equal_five_a_kill_and_five(
    quickstart: Quickstart,
    judge_url: str,
    straight_run: Callable[[str], Job],
    tmp_path: Path,
    measured: Callable[[str], None],
    name: str,
) -> None:
    ranks, overrides = LAYOUTS[name]
    straight = straight_run(name)
    arguments = ("ampo", [f"judge.base_url={judge_url}", *SMALL, *overrides], ranks)
    broken = Job(quickstart, tmp_path / "broken", *arguments).start()
    try:
        if name == "one process":
            interrupt_and_continue(broken)
        broken.wait_for_steps(KILLED_AFTER)
        broken.signal(signal.SIGKILL)
        broken.wait()
        assert KILLED_AFTER <= len(broken.steps) < STEPS
        assert not (broken.folder / "policy.nemo").exists()
        if name == "one process":
            refuse_other_settings(broken)
        assert straight.wait() == 0, straight.said[-4000:]
        # Nobody is asked any more: a prompt or reply that differed from the straight run's would end this one.
        replay = f"judge.replay={straight.folder.parent / 'verdicts.sqlite'}"
        assert broken.start(replay).wait() == 0, broken.said[-4000:]
    finally:
        broken.stop()
    assert f"continuing from {broken.folder}/checkpoints/step-00000{SAVE_EVERY}" in broken.said
    gap = largest_gap(broken.folder, straight.folder)
    measured(f"resume, {name}: largest differences {gap}")
    assert max(gap.values()) <= 1e-5
    error = plan_error(
        straight.folder, "ampo", "tiny", [*SMALL, *overrides], ranks, quickstart.folder / "bc" / "policy.nemo"
    )
    measured(f"tiny, {name}: plan against measured sizes {error}")
    assert max(map(abs, error.values())) < 0.1


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one process"])
def test_two_ranks_equal_one(straight_run: Callable[[str], Job], name: str) -> None:
    alone, split = straight_run("one process"), straight_run(name)
    assert alone.wait() == 0, alone.said[-4000:]
    assert split.wait() == 0, split.said[-4000:]
    ours, theirs = (rows_of_the_first_steps(job, "rollouts") for job in (split, alone))
    assert len(ours) == COMPARED_STEPS * 16
    for field in ("text", "reward"):
        assert [row[field] for row in ours] == [row[field] for row in theirs], field
    assert [row["advantage"] for row in ours] == pytest.approx([row["advantage"] for row in theirs], abs=1e-6)
    for mine, other in zip(*(rows_of_the_first_steps(job, "metrics") for job in (split, alone)), strict=True):
        assert mine["engine/logprob_gap"] < 1e-5
        for metric in ("policy/loss", "policy/kl", "policy/entropy", "policy/grad_norm"):
            assert mine[metric] == pytest.approx(other[metric], abs=1e-5), metric


def rows_of_the_first_steps(job: Job, log: str) -> list[dict[str, Any]]:
    """Later steps inherit the rounding of the sums of earlier ones, and may draw another token."""
    return [row for row in read_jsonl(job.folder / f"{log}.jsonl") if row["step"] < COMPARED_STEPS]


def interrupt_and_continue(job: Job) -> None:
    """Ctrl-C ends the job at the next step boundary with a checkpoint of just that step."""
    job.wait_for_steps(2)
    job.signal(signal.SIGINT)
    assert job.wait() == 75, job.said[-4000:]
    assert "the same command continues" in job.said
    done = len(job.steps)
    assert 2 <= done < SAVE_EVERY
    assert [c.step for c in Store(job.folder / "checkpoints").resumable()] == [done]
    job.start()


def refuse_other_settings(job: Job) -> None:
    """Nothing of the run is touched."""
    before = (job.folder / "metrics.jsonl").read_bytes()
    assert job.start("algorithm.kl_coef=0.5", "run.seed=9").wait() == 2
    assert "algorithm.kl_coef: 0.001 -> 0.5; run.seed: 1 -> 9:" in job.said
    assert (job.folder / "metrics.jsonl").read_bytes() == before


def largest_gap(ours: Path, theirs: Path) -> dict[str, float]:
    """Largest differences of a metric over all steps; prompts, replies and verdicts must be the very same."""
    logs = [read_jsonl(f / "rollouts.jsonl") for f in (ours, theirs)]
    for field in ("step", "row_id", "text", "agent1_score", "agent2_score", "reward"):
        assert [r[field] for r in logs[0]] == [r[field] for r in logs[1]], field
    metrics = [read_jsonl(f / "metrics.jsonl") for f in (ours, theirs)]
    assert [[r["step"] for r in rows] for rows in metrics] == [list(range(STEPS))] * 2
    names = [k for k in metrics[0][0] if k.startswith(("policy/", "reward/", "mode/", "engine/"))]
    assert "policy/loss" in names and "policy/lr" in names
    gaps = {k: max(abs(a.get(k, 0) - b.get(k, 0)) for a, b in zip(*metrics, strict=True)) for k in names}
    gaps["advantage"] = max(abs(a["advantage"] - b["advantage"]) for a, b in zip(*logs, strict=True))
    return gaps


def test_cloning_resumes_with_its_schedule_and_its_validations(quickstart: Quickstart, tmp_path: Path) -> None:
    steps, every = 40, 10
    overrides = [
        *(override("data.heldout", quickstart.folder / "world" / "bc_heldout.jsonl"), "data.heldout_replies=0"),
        *(f"trainer.sft.max_steps={steps}", f"trainer.sft.val_check_interval={every}", f"trainer.sft.save_interval={every}"),
        f"run.init_from={naming_one_end(quickstart.folder / 'nemo' / 'base.nemo', tmp_path)}",
    ]
    straight = Job(quickstart, tmp_path / "straight", "bc", overrides).start()
    broken = Job(quickstart, tmp_path / "broken", "bc", overrides).start()
    try:
        broken.wait_for_steps(every + 5)
        broken.signal(signal.SIGKILL)
        broken.wait()
        assert every + 5 <= len(broken.steps) < steps
        assert broken.start().wait() == 0, broken.said[-4000:]
        assert straight.wait() == 0, straight.said[-4000:]
    finally:
        straight.stop()
        broken.stop()
    assert "resume: continuing from" in broken.said
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith(("time/", "checkpoint/"))} for row in read_jsonl(f)]
        for f in (broken.folder / "metrics.jsonl", straight.folder / "metrics.jsonl")
    ]
    assert timeless[0] == timeless[1]
    assert [r["step"] for r in timeless[0] if r["kind"] == "val"] == list(range(every, steps + 1, every))
    best = [c for c in Store(straight.folder / "checkpoints").scan()[0] if c.manifest.score is not None]
    losses = {r["step"]: r["bc/val_loss"] for r in timeless[0] if r["kind"] == "val"}
    assert all(c.manifest.score == losses[c.step] for c in best) and best
    assert ends_named(straight.folder / "policy.nemo", tmp_path) == ENDS, (
        "whoever draws from it stops where it was taught to"
    )
