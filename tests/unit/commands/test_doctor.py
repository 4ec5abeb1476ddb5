from __future__ import annotations

import io
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rich.console import Console

from nemo_ampo.commands import doctor as machine
from nemo_ampo.commands.doctor import Package, Report, ReportLine, Status, compat_table, doctor, memory_bytes, num_cores
from nemo_ampo.compat import common, cpu, versions
from nemo_ampo.compat.versions import TestedEnvironment
from nemo_ampo.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def printed(table: object) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def found(report: Report, name: str) -> ReportLine:
    return next(check for check in report.checks if check.name == name)


def test_no_framework_is_imported_to_look_at_it() -> None:
    code = (
        "import sys; from nemo_ampo.commands.doctor import doctor, compat_table; doctor(); compat_table();"
        "print({'nemo', 'nemo_aligner', 'megatron', 'lightning', 'transformers', 'openai'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.strip() == "set()", done.stderr


def test_every_framework_is_named_with_its_version() -> None:
    report = doctor()
    for name, wanted in versions.EXPECTED.items():
        check = found(report, name)
        if versions.fits(versions.installed(name), wanted):
            assert (check.status, check.found) == (Status.OK, versions.installed(name))
        else:
            assert check.status is Status.MISSING and wanted in check.advice


def test_another_framework_version_stops_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.EXPECTED, "torch", "==0.0.1")
    report = doctor()
    assert not report.ok
    assert "needs ==0.0.1" in [c for c in report.checks if c.name == "torch"][-1].advice


def test_only_required_packages_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    optional = Package("no-such-package-a", "no_such_module_a", False, "from the container")
    monkeypatch.setattr(machine, "PACKAGES", (optional,))
    assert found(doctor(), "no-such-package-a").status is Status.NOTE
    required = Package("no-such-package-b", "no_such_module_b", True, "see below")
    monkeypatch.setattr(machine, "PACKAGES", (optional, required))
    report = doctor()
    assert found(report, "no-such-package-b").status is Status.MISSING
    assert not report.ok
    assert "see below" in printed(report.table()) and report.mend


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This Python as if it were the container's, with locks that the test writes."""
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setitem(versions.ENVIRONMENTS, sys.version_info[:2], TestedEnvironment("container.lock", "image.txt"))
    (tmp_path / "container.lock").write_text(f"# ours\norjson=={versions.installed('orjson')}\n")
    (tmp_path / "image.txt").write_text("torch==0.0.1\n")
    return tmp_path


def test_what_is_as_pinned_needs_no_mending(container: Path) -> None:
    report = doctor()
    assert found(report, "pins").found == "1 of container.lock, all as pinned"
    assert report.mend == ""


def test_every_pin_is_compared_and_one_command_mends_all(container: Path) -> None:
    with (container / "container.lock").open("a") as lock:
        lock.write("typer==0.0.1\nno-such-package-a==2.0  # absent\ntransformers==4.48.0\n")
    with (container / "image.txt").open("a") as image:
        image.write("no-such-package-b==3.0\n")
    report = doctor()
    check = found(report, "pins")
    typer = f"typer {versions.installed('typer')} (pinned: 0.0.1)"
    # Of transformers any tested version will do, and so will any torch that the image brings.
    absent = "no-such-package-a absent (pinned: 2.0), no-such-package-b absent (pinned: 3.0)"
    assert check.found == f"4 of container.lock, 3 differ: {typer}, {absent}"
    assert check.status is Status.WARN
    lock = container / "container.lock"
    assert report.mend == (
        f"run: PIP_CONSTRAINT= {sys.executable} -m pip install --no-deps -r {lock} no-such-package-b==3.0"
    )


def test_the_command_mends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an environment of its own, with a package made here: pip is asked for nothing that lies elsewhere."""
    package = tmp_path / "made_here"
    package.mkdir()
    (package / "pyproject.toml").write_text('[project]\nname = "made-here"\nversion = "1.0"\n')
    (package / "made_here.py").touch()
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(package),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (tmp_path / "a lock.txt").write_text("made-here==1.0\n")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    ours = TestedEnvironment("a lock.txt")
    target = tmp_path / "site"
    command = versions.mend(ours, versions.differences(ours))
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_TARGET": str(target)}
    subprocess.run(["bash", "-c", command], env=os.environ | offline, check=True, capture_output=True)
    assert [path.name for path in target.glob("*.dist-info")] == ["made_here-1.0.dist-info"]
    monkeypatch.syspath_prepend(str(target))
    assert versions.differences(ours) == []


def test_another_python_is_told_which_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "ENVIRONMENTS", {(3, 99): TestedEnvironment("container.lock")})
    report = doctor()
    assert found(report, "Python").status is Status.MISSING
    assert report.mend == "use Python 3.99"


def test_a_start_on_wrong_frameworks_names_the_command(container: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.EXPECTED, "nemo-toolkit", "==0.0.1")
    with pytest.raises(ConfigError, match=r"nemo-toolkit: expected ==0.0.1.*; run: PIP_CONSTRAINT= .* -r .*container.lock"):
        versions.check("gpu")


def test_the_locks_leave_the_images_packages_to_the_image() -> None:
    [container] = [e for e in versions.ENVIRONMENTS.values() if e.image]
    own, image, everything = (
        {canonicalize_name(name): version for name, version in versions.pins(ROOT / file).items()}
        for file in (container.lock, str(container.image), "requirements.lock")
    )
    assert {"torch", "numpy"} <= set(image) and not set(own) & set(image)
    assert own.items() <= everything.items()
    declared = [
        Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    assert {canonicalize_name(requirement.name) for requirement in declared} <= set(own) | set(image)
    ranges = {requirement.name: requirement.specifier for requirement in declared}
    for name, wanted in versions.EXPECTED.items():
        assert ranges[name] == SpecifierSet(wanted)
        assert versions.fits(own[name], wanted)


def test_a_report_is_ok_without_missing_parts() -> None:
    def check(status: Status) -> ReportLine:
        return ReportLine("x", status, "y")

    assert Report((check(Status.OK), check(Status.NOTE), check(Status.WARN))).ok
    assert not Report((check(Status.OK), check(Status.MISSING))).ok


def test_the_judge_key_is_looked_for_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_JUDGE_KEY", "sk-very-secret")
    report = doctor("SOME_JUDGE_KEY")
    assert found(report, "judge key").status is Status.OK
    assert "very-secret" not in printed(report.table())
    monkeypatch.delenv("SOME_JUDGE_KEY")
    assert found(doctor("SOME_JUDGE_KEY"), "judge key").status is Status.WARN
    assert "judge key" not in [check.name for check in doctor().checks]


def test_slurm_is_asked_for_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(doctor(), "Slurm").status is Status.NOTE
    command = tmp_path / "sbatch"
    command.write_text("#!/bin/sh\necho slurm 99.1\n")
    command.chmod(0o755)
    assert found(doctor(), "Slurm").found == "slurm 99.1"


def test_sizes_are_those_of_this_process(tmp_path: Path) -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory_bytes() <= total
    report = doctor(folder=tmp_path / "not" / "there" / "yet")
    assert found(report, "free disk").found.endswith("GiB")


def test_little_room_is_a_warning_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LOW_MEMORY_GIB", 10**9)
    check = found(doctor(), "memory")
    assert check.status is Status.WARN and "rollout.batch_size" in check.advice


def test_every_substitute_is_listed_with_its_reason() -> None:
    text = printed(compat_table())
    for row in (row for table in (*common.TABLES, *cpu.TABLES) for row in table.rows):
        assert row.upstream in text
        assert row.reason.split()[0] in text
