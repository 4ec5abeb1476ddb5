"""What ``pip install`` of the wheel brings: our packages, configurations and batch scripts, and nothing else."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OURS = ("nemo_ampo", "converters", "recipes")
ABSENT = (
    "import sys\nfor name in ('nemo', 'megatron', 'nemo_aligner', 'lightning', 'tensorrt_llm'): sys.modules[name] = None\n"
)


def sources() -> list[Path]:
    return [file for folder in OURS for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves its own folders behind."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *OURS, "configs", "slurm", "pyproject.toml", "README.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy)]
    subprocess.run(build, check=True, capture_output=True)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    (target / "sitecustomize.py").write_text(ABSENT)
    return target


def command(installed: Path, arguments: Sequence[str], folder: Path, stdin: str = "") -> str:
    """Standard output of ``nemo-ampo`` from the wheel, in a Python in which NeMo and Megatron cannot be imported."""
    code = "import sys; from nemo_ampo.commands.cli import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environment, input=stdin, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_every_module_configuration_and_script_and_no_other_name(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(OURS)
    expected = {str(file.relative_to(ROOT)) for file in sources()}
    for folder in ("configs", "slurm"):
        expected |= {f"nemo_ampo/{file.relative_to(ROOT)}" for file in (ROOT / folder).rglob("*") if file.is_file()}
    # A container is built from a checkout, which has the locks.
    expected -= {name for name in expected if name.startswith("nemo_ampo/slurm/container/")} | {"nemo_ampo/slurm/site.env"}
    assert expected - names == set()
    assert "nemo_ampo/py.typed" in names and "nemo_ampo/prompts/judge.txt" in names


def test_the_commands_that_need_no_framework_run_from_it(installed: Path, tmp_path: Path) -> None:
    shown = command(installed, ["check-config", "ampo", "--no-files", "run.dir=a", "run.init_from=b", "data.train=c",
                                "judge.base_url=http://h/v1"], tmp_path)  # fmt: skip
    assert "preset: ampo" in shown
    reply = 'Thinking Level: 1\n<|begin_of_answer|>\n"Yes."\n<|end_of_answer|>'
    assert "mode      1" in command(installed, ["score"], tmp_path, reply)
    where = command(installed, ["--help"], tmp_path)
    assert "check-config" in where


def test_the_list_of_packages_is_the_tree() -> None:
    found = {str(file.relative_to(ROOT).parent).replace("/", ".") for file in sources()}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted({*found, "nemo_ampo.configs", "nemo_ampo.slurm"})


def imported() -> set[str]:
    """Top-level names of others that our code imports, in functions as well."""
    names: set[str] = set()
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - set(OURS)


USED_BY_OTHERS = {"setuptools", "httptools"}  # TensorBoard and uvicorn look for them by name.
NOT_ON_PYPI = {"tensorrt", "tensorrt_llm"}  # of the container, where an engine needs them


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = PROJECT["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][name] for name in ("convert", "trackers"))]
    declared = {re.split(r"[<>=~!;\[ ]", entry)[0].lower().replace("_", "-") for group in groups for entry in group}
    homes = packages_distributions()
    needed = {homes[name][0].lower().replace("_", "-") for name in imported() - NOT_ON_PYPI}
    assert needed - declared == set()
    assert declared - needed == USED_BY_OTHERS
