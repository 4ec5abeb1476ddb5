"""A tiny random checkpoint, made once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nemo_ampo.world.pack import make_pack
    from nemo_ampo.world.tiny_model import make_tiny_checkpoint

    root = tmp_path_factory.mktemp("tiny")
    make_pack(root / "pack", seed=1, num_bc=40, num_rl=8, num_heldout=4)
    return make_tiny_checkpoint(root / "hf", root / "pack", seed=3)
