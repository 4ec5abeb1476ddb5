"""Session fixtures: tiny Hugging Face folders, and the outcome of all commands that need NeMo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from nemo_process import Finished, run_nemo


@dataclass(frozen=True)
class Jobs:
    """What ``converter_jobs.py`` left behind."""

    folder: Path
    outcomes: dict[str, Finished]


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    folder = tmp_path_factory.mktemp("converters")
    finished = run_nemo(["converter_jobs", folder])
    assert finished.status == 0, finished.err[-6000:]
    results = json.loads((folder / "results.json").read_text())
    return Jobs(folder, {name: Finished(**result) for name, result in results.items()})


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    from tiny_hf import write_model

    made: dict[tuple[str, bool], Path] = {}

    def get(family: str, tied: bool) -> Path:
        if (family, tied) not in made:
            made[family, tied] = write_model(tmp_path_factory.mktemp("pristine") / "m", family, tied)
        return made[family, tied]

    return get


@pytest.fixture
def hf_folder(tmp_path: Path, _pristine: Callable[[str, bool], Path]) -> Callable[..., Path]:
    """``hf_folder(family, tied)``: a fresh copy of a tiny model folder, free to be damaged."""

    def copy(family: str, tied: bool = False) -> Path:
        return Path(shutil.copytree(_pristine(family, tied), tmp_path / f"{family}-{tied}"))

    return copy
