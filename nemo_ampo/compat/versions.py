"""The framework versions this project is written against, in one place."""

from __future__ import annotations

from importlib import metadata

from nemo_ampo.errors import ConfigError

EXPECTED: dict[str, str] = {
    "nemo-toolkit": "2.2.1",
    "megatron-core": "0.11.0",
    "nemo-aligner": "0.7.0",
    "transformers": "4.48.3",
}
"""NeMo 2.2.1 with Megatron-core 0.11.0 is the oldest pair under which Aligner 0.7.0 both generates with the distributed
optimizer and restores checkpoints on current torch; from NeMo 2.4 on the model cannot be built before its process groups."""


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def mismatches() -> dict[str, tuple[str, str | None]]:
    """Package to (expected, found) for every framework that is absent or of another version."""
    return {name: (want, installed(name)) for name, want in EXPECTED.items() if installed(name) != want}


def check(device: str) -> None:
    """Refuse to run on framework versions whose internals we did not read.

    Raises:
        ConfigError: naming each package with both versions.
    """
    wrong = mismatches()
    if wrong:
        rows = "; ".join(f"{n}: expected {want}, found {got or 'none'}" for n, (want, got) in wrong.items())
        raise ConfigError(f"frameworks on this {device} machine do not match ({rows}); run `make setup`")
