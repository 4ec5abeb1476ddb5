from __future__ import annotations

from pathlib import Path

import pytest
from sample_run import write_ampo, write_bc, write_evaluations


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart-like root of 60 AMPO steps with every part; not to be written to."""
    root = tmp_path_factory.mktemp("quickstart")
    write_bc(root / "bc", 100)
    write_ampo(root / "ampo", 60)
    write_evaluations(root / "evaluate")
    return root
