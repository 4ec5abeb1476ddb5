"""Tiny folders, made once; ``as_written_by_5`` turns one into what transformers 5 writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_hf import as_written_by_5, write_model


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool, bool], Path]:
    made: dict[tuple[str, bool, bool], Path] = {}

    def get(family: str, tied: bool, newer: bool) -> Path:
        key = (family, tied, newer)
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp("made") / "m", family, tied)
            if newer:
                as_written_by_5(made[key])
        return made[key]

    return get


@pytest.fixture
def folder_of(tmp_path: Path, _made: Callable[[str, bool, bool], Path]) -> Callable[..., Path]:
    """``folder_of(family, tied=False, newer=False)``: a copy of a tiny model folder, free to be damaged."""

    def copy(family: str, tied: bool = False, newer: bool = False) -> Path:
        return Path(shutil.copytree(_made(family, tied, newer), tmp_path / f"{family}-{tied}-{newer}"))

    return copy
