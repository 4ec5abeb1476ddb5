"""One short quickstart, run once for all tests of this folder, whichever process they run in."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from filelock import FileLock
from nemo_process import Finished
from stage_runs import Quickstart, quickstart_command, run

ODD_NAME = "lr=1e-4, été (2) #1 新加卷's ${x} ~"
"""Every path works in every stage."""


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Quickstart:
    base = tmp_path_factory.getbasetemp()
    # Worker processes have folders of their own below the one they share.
    shared = (base if worker_id == "master" else base.parent) / "quickstart"
    shared.mkdir(exist_ok=True)
    folder, said = shared / ODD_NAME, shared / "finished.json"
    with FileLock(shared / "lock"):
        if not said.exists():
            said.write_text(json.dumps(asdict(run(quickstart_command(folder)))))
    finished = Finished(**json.loads(said.read_text()))
    assert finished.status == 0, finished.out[-3000:] + finished.err[-6000:]
    return Quickstart(folder, finished)
