"""Real weights and, where they can be had, real SOTOPIA scenes through every stage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from plan_check import plan_error
from stage_runs import ROOT, run

from nemo_ampo.files import read_jsonl

pytestmark = pytest.mark.slow
SOTOPIA = Path(os.environ.get("NEMO_AMPO_SOTOPIA_DIR", ROOT.parent / "shared" / "sotopia"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smollm2") / "run"
    scenes = ["--sotopia-dir", str(SOTOPIA)] if SOTOPIA.is_dir() else []
    finished = run(["recipes.smollm2", "--dir", str(root), *scenes], threads=2)
    assert finished.status == 0, finished.out[-3000:] + finished.err[-6000:]
    assert finished.out.count("bitwise equal") == 4, "two conversions, weights and files each"
    return root


def test_two_steps_on_real_weights(folder: Path) -> None:
    rows = read_jsonl(folder / "ampo" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1]
    for row in rows:
        assert row["engine/logprob_gap"] < 1e-4
        assert row["policy/ratio_max"] == pytest.approx(1, abs=1e-3)
    cloned = [r["bc/loss"] for r in read_jsonl(folder / "bc" / "metrics.jsonl") if r["kind"] == "train"]
    assert cloned[-1] < cloned[0]


@pytest.mark.parametrize("stage", ["bc", "ampo"])
def test_the_plan_knew_the_sizes(folder: Path, stage: str, measured: Callable[[str], None]) -> None:
    error = plan_error(folder / stage, stage, "smollm2_135m", [], 1, folder / "nemo" / "base.nemo")
    measured(f"SmolLM2, {stage}: plan against measured sizes {error}")
    assert max(map(abs, error.values())) < 0.1


@pytest.mark.skipif(not SOTOPIA.is_dir(), reason=f"no SOTOPIA folder at {SOTOPIA} (set NEMO_AMPO_SOTOPIA_DIR)")
def test_the_scenes_were_those_of_the_folder(folder: Path) -> None:
    meta = json.loads((folder / "ampo" / "opening_rows.meta.json").read_text())
    assert meta["rows"] == 450 and meta["evaluation_scenarios"] is True and meta["view"] == "sotopia"
    assert json.loads((folder / "ampo" / "provenance.json").read_text())["data"] == meta["sha256"]


def test_the_export_answers_in_transformers(folder: Path) -> None:
    samples = json.loads((folder / "evaluate" / "ampo.json").read_text())["samples"]
    assert len(samples) == 4
    assert all(len(s["text"]) > 10 and s["text"].isprintable() is not None for s in samples)
    words = " ".join(s["text"] for s in samples).lower().split()
    assert len(set(words)) > 10, "a broken export repeats itself or writes noise"
