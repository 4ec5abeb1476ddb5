"""One short quickstart, run once for all tests of this folder."""

from __future__ import annotations

import pytest
from stage_runs import Quickstart, quickstart_command, run


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    finished = run(quickstart_command(folder))
    assert finished.status == 0, finished.out[-3000:] + finished.err[-6000:]
    return Quickstart(folder, finished)
