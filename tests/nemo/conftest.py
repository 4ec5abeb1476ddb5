"""Runs ``engine_jobs.py`` once, for all tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nemo_process import convert, run_nemo
from tiny_hf import write_model


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("nemo")
    convert(write_model(folder / "hf", "qwen2", True), folder / "model.nemo")
    finished = run_nemo([Path(__file__).parent / "engine_jobs.py", folder])
    assert finished.status == 0, finished.err[-6000:]
    return json.loads((folder / "results.json").read_text())
