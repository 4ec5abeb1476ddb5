"""Imports go one way: between files, between rooms, and between the three packages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ABOVE = {"recipes": {"nemo_ampo", "converters"}, "converters": {"nemo_ampo"}, "nemo_ampo": set()}
"""Top-level package to those it may import besides itself."""
COMMANDS = "nemo_ampo.commands.cli"
"""The front door: it starts recipes too."""


ROOMS = (
    *("text", "speech", "errors", "types", "ranges", "overrides", "files", "ranks"),
    *("output", "reply", "prompts", "model_folder", "data", "compat"),
    *("chat", "serve", "world", "algo", "run", "megatron", "rollout", "judge", "step", "checkpoint", "training"),
    *("dialogue", "sotopia", "evaluate", "config", "rehearse", "job", "report", "generate", "commands"),
)
"""The folders of ``nemo_ampo`` and the files beside them; each may import those before it."""


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for package in ABOVE for file in (ROOT / package).rglob("*.py")}


def imports(file: Path) -> Iterator[str]:
    """Our modules that a file imports, in functions and for the type checker as well."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in FILES or node.module in FILES:
                    yield inner if inner in FILES else node.module


GRAPH = {module: set(imports(file)) - {module} for module, file in FILES.items()}


def test_no_circle_of_files() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(f"circle: {' -> '.join(error.args[1])}") from None


def test_packages_import_downwards() -> None:
    for module, needed in GRAPH.items():
        package = "recipes" if module == COMMANDS else module.partition(".")[0]
        wrong = {name for name in needed if name.partition(".")[0] not in ABOVE[package] | {package}}
        assert not wrong, f"{module} imports {wrong}"


def test_rooms_import_those_before_them() -> None:
    room = {module: module.split(".")[1] for module in GRAPH if module.startswith("nemo_ampo.")}
    assert set(room.values()) == set(ROOMS)
    wrong = [
        f"{module} imports {needed}"
        for module, all_needed in GRAPH.items()
        for needed in all_needed
        if module in room and needed in room and ROOMS.index(room[needed]) > ROOMS.index(room[module])
    ]
    assert not wrong, "\n".join(wrong)
