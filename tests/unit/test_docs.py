"""README and docs say what is: numbers, names, keys, paths and commands in them are checked against the code."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from nemo_ampo.algo.advantage import ampo_advantage, ampo_with_report, grpo_advantage
from nemo_ampo.commands.cli import COMMANDS
from nemo_ampo.config.stages import STAGES
from nemo_ampo.errors import DataError
from recipes.batch_recipe import PipelineConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def table_after(page: str, marker: str) -> list[dict[str, float]]:
    """The first table behind a marker, all cells numbers."""
    lines = text_of(page).split(f"<!-- {marker} -->")[1].strip().splitlines()
    heading, _, *rows = [line for line in lines[: lines.index("")] if line.startswith("|")]
    names = [cell.strip() for cell in heading.strip("|").split("|")]
    return [dict(zip(names, map(float, row.strip("|").split("|")), strict=True)) for row in rows]


def column(rows: list[dict[str, float]], name: str) -> torch.Tensor:
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def test_the_group_worked_by_hand_is_what_the_code_computes() -> None:
    rows = table_after("docs/algorithm.md", "worked-group")
    assert len(rows) == 8
    rewards_B, modes_B, tokens_B = column(rows, "reward"), column(rows, "mode").long(), column(rows, "tokens")
    groups_B = torch.zeros(8, dtype=torch.long)
    sample_B = grpo_advantage(rewards_B, groups_B)
    whole_B = ampo_advantage(rewards_B, modes_B, tokens_B, groups_B)
    for name, values_B in (
        ("sample level", sample_B),
        ("mode level", whole_B - sample_B),
        ("advantage", whole_B),
    ):
        torch.testing.assert_close(column(rows, name), values_B, rtol=0, atol=6e-5)


def test_the_lengths_worked_by_hand_decide_among_equal_rewards() -> None:
    rows, group = table_after("docs/algorithm.md", "worked-lengths"), table_after("docs/algorithm.md", "worked-group")
    _, report = ampo_with_report(
        torch.full((8,), 0.8, dtype=torch.float64),
        column(group, "mode").long(),
        column(group, "tokens"),
        torch.zeros(8, dtype=torch.long),
    )
    assert report.branches == ["length"]
    torch.testing.assert_close(column(rows, "mode level"), report.mode_term_GM[0].double(), rtol=0, atol=6e-5)
    torch.testing.assert_close(-column(rows, "standard score").tanh(), column(rows, "mode level"), rtol=0, atol=1e-4)
    for row in rows:
        of_mode = [r["tokens"] for r in group if r["mode"] == row["mode"]]
        assert row["mean tokens"] == sum(of_mode) / len(of_mode)


# --- names


def defines(dotted: str) -> bool:
    """Is this a module, or a name or attribute that its module's source defines? Nothing heavy is imported."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:cut])
        source = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)
        if source is None:
            continue
        if cut == len(parts):
            return True
        names = {
            target
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
            for target in (
                [node.name]
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                else [node.id]
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                else [alias.asname or alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        return all(part in names for part in parts[cut:])
    return False


def test_the_name_check_can_fail() -> None:
    assert defines("nemo_ampo.step.ampo_step")
    assert not defines("nemo_ampo.step.ampo_leap")
    assert not defines("nemo_ampo.no_such_file")


@pytest.mark.parametrize("page", PAGES)
def test_every_dotted_name_exists(page: str) -> None:
    names = set(re.findall(r"`((?:nemo_ampo|recipes|converters)(?:\.\w+)+)[`(]", text_of(page)))
    assert [name for name in sorted(names) if not defines(name)] == []


def config_keys(schema: Any, prefix: str = "") -> set[str]:
    keys = set()
    for field, kind in ((f, get_type_hints(schema)[f.name]) for f in fields(schema)):
        name = f"{prefix}{field.name}"
        keys |= config_keys(kind, f"{name}.") if is_dataclass(kind) else {name}
    return keys


@pytest.mark.parametrize("page", PAGES)
def test_every_key_of_ours_exists(page: str) -> None:
    known = set().union(*(config_keys(schema) for schema in (*(keys.schema for keys in STAGES.values()), PipelineConfig)))
    sections = "|".join(sorted({key.split(".")[0] for key in known}))
    used = set(re.findall(rf"[`\s]((?:{sections})\.[a-z]\w*)(?:=[^`\s]*)?[`\s]", text_of(page)))
    files = {name for name in used if name.endswith((".jsonl", ".md", ".py", ".sh", ".nemo"))}
    assert sorted(used - known - files) == []


# --- paths and commands


def tree_of_readme() -> list[str]:
    """Paths of the annotated tree; a name behind two blanks per level, folders end in a slash."""
    block = text_of("README.md").split("<!-- tree -->")[1].split("```")[1]
    folders: list[str] = []
    paths = []
    for line in block.strip("\n").splitlines():
        name = line.strip().split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        paths.append("/".join([*(f.rstrip("/") for f in folders), name.rstrip("/")]))
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_the_tree_shows_what_exists() -> None:
    paths = tree_of_readme()
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_tree_leaves_nothing_of_the_library_out() -> None:
    shown = set(tree_of_readme())
    library = {
        path.relative_to(ROOT).as_posix()
        for folder in ("nemo_ampo", "recipes", "converters")
        for path in (ROOT / folder).iterdir()
        if path.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    assert sorted(library - shown) == []


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text_of(page))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists(page: str) -> None:
    text = text_of(page)
    modules = set(re.findall(r"python -m ([\w.]+)", text)) - {"venv", "pytest"}
    assert [module for module in sorted(modules) if not defines(module)] == []
    ours = set(re.findall(r"nemo-ampo ([a-z][a-z-]+)", text))
    assert sorted(ours - set(COMMANDS)) == []
    targets = set(re.findall(r"^([a-z][\w-]*):", text_of("Makefile"), flags=re.MULTILINE))
    assert sorted(set(re.findall(r"`make ([a-z][\w-]*)", text)) - targets) == []


def test_the_rows_shown_are_rows(tmp_path: Path) -> None:
    from nemo_ampo.data.bc import read_bc_rows
    from nemo_ampo.data.episodes import read_turns

    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    cloning, turn = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    for name, row in (("bc", cloning), ("rl", turn)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert [row.mode for row in read_bc_rows(tmp_path / "bc.jsonl")] == [1]
    assert [row.seat for row in read_turns(tmp_path / "rl.jsonl")] == ["agent2"]
    for field in turn:
        (tmp_path / "less.jsonl").write_text(json.dumps({key: value for key, value in turn.items() if key != field}) + "\n")
        with pytest.raises(DataError, match=f"'{field}'"):
            read_turns(tmp_path / "less.jsonl")
