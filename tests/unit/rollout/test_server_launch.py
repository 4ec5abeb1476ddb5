"""The launcher's own logic and the Slurm script's command line; the engine behind them needs a GPU."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_ampo.rollout.trtllm_serve import parser, sampled_logprobs

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "slurm" / "rollout_server.sh"


def known(**values: float) -> dict[int, SimpleNamespace]:
    return {int(k[1:]): SimpleNamespace(logprob=v) for k, v in values.items()}


def test_the_sampled_tokens_own_log_prob_is_taken() -> None:
    assert sampled_logprobs([5, 6], [known(_9=-0.1, _5=-2.0), known(_6=-0.5)]) == [-2.0, -0.5]


def test_another_tokens_log_prob_is_no_substitute() -> None:
    with pytest.raises(ValueError, match="position 1: a log-probability of another token"):
        sampled_logprobs([5, 6], [known(_5=-2.0), known(_9=-0.1)])
    with pytest.raises(ValueError, match="2 tokens, 0 log-probabilities"):
        sampled_logprobs([5, 6], None)


def script(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    values = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "AMPO_ROOT": str(ROOT)} | environment
    given = [str(SCRIPT), *arguments, str(tmp_path / "run"), str(model), "--max-batch", "64"]
    return subprocess.run(given, env=values, capture_output=True, text=True, timeout=60)


def test_the_script_starts_the_launcher_in_its_group_and_container(tmp_path: Path) -> None:
    stub = tmp_path / "bin" / "srun"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n')
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    done = script(tmp_path, ROLLOUT_HET_GROUP="1", ROLLOUT_IMAGE="trt:1.2", ROLLOUT_GPUS="4", ROLLOUT_PORT="8300")
    assert done.returncode == 0, done.stderr
    given = (tmp_path / "arguments").read_text().splitlines()
    assert "--het-group=1" in given and "--container-image=trt:1.2" in given and "--gpus-per-node=4" in given
    launched = given[given.index("nemo_ampo.rollout.trtllm_serve") + 1 :]
    args = parser().parse_args(launched)
    assert (args.model, args.tensor_parallel, args.port, args.max_batch) == (tmp_path / "model", 4, 8300, 64)
    assert args.url_file == tmp_path / "run" / "rollout.url"
    assert not args.url_file.exists(), "a server that ended is not announced"


def test_a_dry_run_only_shows_the_line(tmp_path: Path) -> None:
    done = script(tmp_path, "--dry-run")
    assert done.returncode == 0 and done.stdout.startswith("srun ") and "--het-group" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, str(tmp_path), str(tmp_path)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: MODEL_DIR: no config.json")
