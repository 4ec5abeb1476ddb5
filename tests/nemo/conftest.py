"""Runs ``engine_jobs.py`` once; importing NeMo takes seconds, so all measurements share one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("nemo")
    process = subprocess.run(
        [sys.executable, str(HERE / "engine_jobs.py"), str(folder)],
        cwd=HERE.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-6000:]
    return json.loads((folder / "results.json").read_text())
