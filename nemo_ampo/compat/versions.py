"""The framework versions this project is written against, and the two environments it is tested in, in one place."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nemo_ampo.errors import ConfigError

EXPECTED: dict[str, str] = {
    "nemo-toolkit": "==2.2.1",
    "megatron-core": "==0.11.0",
    "nemo-aligner": "==0.7.0",
    "transformers": ">=4.48,<4.49",
}
"""NeMo 2.2.1 with Megatron-core 0.11.0 is the oldest pair under which Aligner 0.7.0 both generates with the distributed
optimizer and restores checkpoints on current torch; from NeMo 2.4 on the model cannot be built before its process groups.
Of transformers, 4.48.3 is tested; 4.47.1, for which TensorRT-LLM 0.17 declares itself, was tried and fails."""

ROOT = Path(__file__).resolve().parents[2]
"""The project's folder, where the locks stand; in an installed wheel they do not."""


@dataclass(frozen=True)
class TestedEnvironment:
    """One of the environments this project is tested in.

    Attributes:
        lock: file of exact pins, below the project's folder.
        image: file of what a container image brings along, or None where the lock has everything.
    """

    lock: str
    image: str | None = None


ENVIRONMENTS = {
    (3, 11): TestedEnvironment("requirements.lock"),
    (3, 12): TestedEnvironment("requirements-container.lock", "slurm/container/image.txt"),
}
"""By version of Python: a machine of one's own (``make setup``), and NVIDIA's container (slurm/container)."""


@dataclass(frozen=True)
class WrongVersion:
    """A package that is not installed as a lock asks for; ``found`` is None when it is absent."""

    name: str
    pinned: str
    found: str | None


TALKING = ("openai", "httpx2", "aiohttp", "httpx")
"""What asks chat APIs (:mod:`nemo_ampo.chat.wire`) and rollout servers; their versions do not decide what is computed."""


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def fits(version: str | None, wanted: str) -> bool:
    """Whether an installed version is in a range such as ``>=4.48,<4.49``; 2.13.0+cpu is a build of 2.13.0."""
    from packaging.specifiers import SpecifierSet

    return version is not None and SpecifierSet(wanted).contains(version, prereleases=True)


def mismatches() -> dict[str, tuple[str, str | None]]:
    """Package to (expected, found) for every framework that is absent or of another version."""
    return {name: (want, installed(name)) for name, want in EXPECTED.items() if not fits(installed(name), want)}


def environment() -> TestedEnvironment | None:
    """The environment of this Python, if it is one of ours and its lock is here."""
    found = ENVIRONMENTS.get(sys.version_info[:2])
    return found if found and (ROOT / found.lock).is_file() else None


def pins(path: Path) -> dict[str, str]:
    """Package to version of a lock file."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {name: version for name, _, version in (line.partition("==") for line in lines if line)}


def differences(of: TestedEnvironment) -> list[WrongVersion]:
    """What is not as the lock says, and what the image should have brought along, in whatever version, and did not."""
    locked = [
        WrongVersion(name, version, found)
        for name, version in pins(ROOT / of.lock).items()
        if not fits(found := installed(name), EXPECTED.get(name, f"=={version}"))
    ]
    image = pins(ROOT / of.image) if of.image else {}
    return locked + [WrongVersion(name, version, None) for name, version in image.items() if installed(name) is None]


def mend(of: TestedEnvironment, wrong: Sequence[WrongVersion]) -> str:
    """The one command after which there are no such differences."""
    names = {difference.name for difference in wrong}
    if of.image is None and "torch" in names:
        return "make clean setup"
    image = pins(ROOT / of.image) if of.image else {}
    extra = [f"{name}=={version}" for name, version in image.items() if name in names]
    words = [sys.executable, "-m", "pip", "install", "--no-deps", "-r", str(ROOT / of.lock), *extra]
    # NVIDIA's images hold pip to their own versions by a file that this variable names.
    return ("PIP_CONSTRAINT= " if of.image else "") + shlex.join(words)


def cure() -> str:
    """What to do where versions do not match."""
    if sys.version_info[:2] not in ENVIRONMENTS:
        return f"use Python {' or '.join('.'.join(map(str, version)) for version in ENVIRONMENTS)}"
    of = environment()
    return f"run: {mend(of, differences(of))}" if of else "install what the project's requirements locks say"


def check(device: str) -> None:
    """Refuse to run on framework versions whose internals we did not read.

    Raises:
        ConfigError: naming each package with both versions.
    """
    wrong = mismatches()
    if wrong:
        rows = "; ".join(f"{n}: expected {want}, found {got or 'none'}" for n, (want, got) in wrong.items())
        raise ConfigError(f"frameworks on this {device} machine do not match ({rows}); {cure()}")
