"""Runs ``contract_jobs.py`` once per family, and once on two ranks; importing NeMo takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

JOBS = Path(__file__).parent / "contract_jobs.py"


def measure(family: str, folder: Path, ranks: int = 1) -> dict[str, Any]:
    starter = [sys.executable]
    if ranks > 1:
        starter += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    process = subprocess.run(
        [*starter, str(JOBS), family, str(folder)],
        cwd=JOBS.parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-6000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {family: measure(family, tmp_path_factory.mktemp(family)) for family in ("qwen2", "llama")}


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure("qwen2", tmp_path_factory.mktemp("two"), ranks=2)
