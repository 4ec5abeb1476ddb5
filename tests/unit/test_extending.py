"""docs/extending.md, carried out: each section's lines are added to a copy of the code, and its check runs there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = dict(
    part.split("\n", 1) for part in re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text("utf-8"), flags=re.M)[1:]
)
WHERE = r"\*\*`(?P<file>[^`]+)`\*\*, (?:(?P<how>after|instead of) `(?P<line>[^\n]+)`|new):\n\n"
BLOCK = re.compile(rf"(?:{WHERE})?```(?:python|text)\n(?P<code>.*?)```", re.S)


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_does_what_it_says(title: str, tmp_path: Path) -> None:
    for folder in ("nemo_ampo", "converters", "recipes", "configs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    changed, checks = set(), []
    for block in BLOCK.finditer(SECTIONS[title]):
        if block["file"] is None:
            checks.append(block["code"])
            continue
        file = tmp_path / block["file"]
        changed.add(block["file"])
        if block["how"] is None:
            file.parent.mkdir(exist_ok=True)
            file.write_text(block["code"], encoding="utf-8")
            continue
        text = file.read_text(encoding="utf-8")
        [found] = re.findall(rf"^ *{re.escape(block['line'])}\n", text, re.M)
        file.write_text(text.replace(found, (found if block["how"] == "after" else "") + block["code"]), encoding="utf-8")
    assert len(checks) == 1 and 1 <= len(changed) <= 4
    done = subprocess.run([sys.executable, "-c", checks[0]], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_kind_of_extension_has_its_section() -> None:
    assert list(SECTIONS) == ["A preset", "A reward", "A metric", "A mode", "A rollout engine", "A model family", "A stage"]
