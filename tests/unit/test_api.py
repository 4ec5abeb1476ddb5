"""The stable names, the page that lists them and the example that uses them."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nemo_ampo

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_name_is_there_and_knows_its_home() -> None:
    assert sorted(nemo_ampo.__all__) == sorted(nemo_ampo._HOMES)
    for name in nemo_ampo.__all__:
        assert getattr(nemo_ampo, name) is not None
        assert name in dir(nemo_ampo)
    with pytest.raises(AttributeError, match="no attribute 'advantages'"):
        nemo_ampo.advantages  # noqa: B018


def test_the_import_loads_nothing_and_text_needs_no_torch() -> None:
    code = (
        "import json, sys; old = set(sys.modules); import nemo_ampo; {}; print(json.dumps(sorted(set(sys.modules) - old)))"
    )
    assert [m for m in json.loads(python(code.format("0")).stdout) if m.split(".")[0] == "nemo_ampo"] == ["nemo_ampo"]
    loaded = json.loads(python(code.format("nemo_ampo.parse_reply, nemo_ampo.goal_gain, nemo_ampo.parse_verdict")).stdout)
    assert not {"torch", "numpy", "nemo", "megatron", "openai"} & {m.split(".")[0] for m in loaded}


def test_the_page_lists_the_names_with_their_parameters() -> None:
    listed = re.findall(r"^\| `(\w+)(?:\(([^`]*)\))?` \|", PAGE, re.MULTILINE)
    for name, parameters in listed:
        if parameters and "..." not in parameters:
            known = list(inspect.signature(getattr(nemo_ampo, name)).parameters)
            given = [p.split("=")[0].strip() for p in parameters.split(",")]
            assert given == known[: len(given)], name
    shown = {name for name, _ in listed}
    assert set(nemo_ampo.__all__) - shown == {"AlgorithmConfig", "FormatError", "JudgeError", "Levels", "Reply", "Verdict"}
    assert all(f"`{name}`" in PAGE for name in set(nemo_ampo.__all__) - shown)


def test_the_example_of_the_page_runs() -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_one_step_prints_the_advantages_of_a_group() -> None:
    found = {**os.environ, "PYTHONPATH": str(ROOT)}  # a container runs the checkout, which is not installed there
    command = [sys.executable, "examples/one_step.py"]
    done = subprocess.run(command, cwd=ROOT, env=found, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [(int(line.split()[1]), float(line.split()[-1])) for line in done.stdout.splitlines()]
    assert [mode for mode, _ in rows] == [1, 1, 2, 2, 3, 3, 4, 4]
    # Modes earn 0.625, 0.6875, 0.875, 0.9375: the two levels are (r - 0.78125) / 0.1350 and / 0.1492, by hand.
    assert [value for _, value in rows] == pytest.approx(
        [-2.185, -2.185, -1.311, -1.311, 1.311, 1.311, 2.185, 2.185], abs=0.01
    )
    assert len((ROOT / "examples" / "one_step.py").read_text().splitlines()) <= 80
