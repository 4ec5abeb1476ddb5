"""What users see of two checkouts, side by side: before and after code was moved.

python before_after.py OLD NEW [OLD_RUN NEW_RUN]      two checkouts; finished quickstart folders of them, seed 1

Prints one line for each thing compared, with what differs below it. Exit status 1 when something differs: what was meant to
is then told by the reader.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

PROGRAMS = (
    *(f"recipes.{name}" for name in ("bc", "ampo", "evaluate", "sotopia", "pipeline", "quickstart", "smollm2")),
    "recipes.rollout_doctor",
    *(f"converters.{name}" for name in ("hf_to_nemo", "nemo_to_hf", "verify", "gguf_to_hf")),
    *("nemo_ampo.world", "nemo_ampo.world.judge_server"),
)
CALLS = {
    "misspelt key": "recipes.ampo algorithm.clip_rato=0.2",
    "value out of range": "recipes.ampo algorithm.clip_ratio=-1",
    "number for a word": "recipes.bc data.train=1e-4",
    "file not there": "recipes.bc data.train=/not/there.jsonl run.init_from=/not/there.nemo run.dir=/tmp/before_after/bc",
    "no such config": "recipes.ampo --config-name missing",
    "no such option": "recipes.ampo --bogus",
    "folder not there": "converters.hf_to_nemo --input /not/there --output /tmp/before_after/x.nemo",
    "needed option": "converters.nemo_to_hf --input /not/there.nemo",
    "recipe not there": "recipes.pipeline /not/there.yaml",
    "run without files": "nemo-ampo report /not/there",
    "checked config": "nemo-ampo check-config ampo --no-files",
    "no such stage": "nemo-ampo check-config nothing",
    "reply that breaks the grammar": "nemo-ampo score /dev/null",
    "no command": "nemo-ampo nothing",
}


def python(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """This interpreter with a checkout's code."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(checkout), os.environ.get("PYTHONPATH", "")))}
    return subprocess.run([sys.executable, *words], cwd=checkout, env=env, capture_output=True, text=True, timeout=300)


def entry(checkout: Path) -> str:
    """The module behind ``nemo-ampo``."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    return str(project["scripts"]["nemo-ampo"]).partition(":")[0]


def statuses(checkout: Path, calls: Iterable[str]) -> list[int]:
    """Exit status of each command line, ``MODULE WORDS...``."""

    def status(words: str) -> int:
        return python(checkout, "-m", *words.replace("nemo-ampo", entry(checkout)).split()).returncode

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(status, calls))


def commands(checkout: Path) -> dict[str, Any]:
    """Exit status of ``--help`` of every program, and the names of ``nemo-ampo``'s commands."""
    listed = python(checkout, "-c", f"from {entry(checkout)} import COMMANDS; print(*COMMANDS)").stdout.split()
    helps = statuses(checkout, [f"{name} --help" for name in PROGRAMS])
    return dict(zip(PROGRAMS, helps, strict=True)) | dict.fromkeys(listed, "a command")


def refusals(checkout: Path) -> dict[str, Any]:
    """Exit status of each call."""
    return dict(zip(CALLS, statuses(checkout, CALLS.values()), strict=True))


def golden(checkout: Path) -> dict[str, Any]:
    """Hashes of the recorded values that tests hold the code to."""
    return {path.name: sha256(path.read_bytes()).hexdigest()[:12] for path in sorted((checkout / "tests/golden").iterdir())}


def _keys(value: Any, at: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            # A key that names a file, a mode or a prompt is a value itself.
            yield from _keys(inner, f"{at}.{key}" if key.isidentifier() else f"{at}.*")
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner, f"{at}[]")
    else:
        yield at


def formats(folder: Path) -> dict[str, Any]:
    """Files of a run folder, with the keys in those that are JSON, and the tensors of weights."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or "/nemo/" in name or "events.out" in name:
            continue
        if path.suffix == ".json":
            found[name] = sorted(set(_keys(json.loads(path.read_text()))))
        elif path.suffix == ".jsonl":
            found[name] = sorted({key for line in path.read_text().splitlines() for key in _keys(json.loads(line))})
        elif path.suffix == ".safetensors":
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            found[name] = {key: [value["dtype"], value["shape"]] for key, value in header.items() if key != "__metadata__"}
        else:
            found[name] = "there"
    return found


def table(folder: Path) -> dict[str, Any]:
    """The held-out figures of every policy."""
    read = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "evaluate").glob("*.json"))}
    return {f"{name}{at}": value for name, whole in read.items() for at, value in _numbers(whole["summary"])}


def _numbers(value: Any, at: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{at}.{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield at, value


def compare(what: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Print what two mappings share and where they differ."""
    changed = [key for key in old if key in new and old[key] != new[key]]
    gone, added = [key for key in old if key not in new], [key for key in new if key not in old]
    same = len(old) - len(changed) - len(gone)
    print(f"{what}: {same} equal, {len(changed)} changed, {len(gone)} gone, {len(added)} added")
    for key in changed:
        print(f"  {key}: {_difference(old[key], new[key])}")
    for sign, keys in (("-", gone), ("+", added)):
        print("".join(f"  {sign} {key}\n" for key in keys), end="")
    return not (changed or gone)


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list):
        return " ".join([*(f"-{key}" for key in old if key not in new), *(f"+{key}" for key in new if key not in old)])
    return f"{old} -> {new}"


def main(old: Path, new: Path, runs: list[Path]) -> int:
    """Compare, print; 0 when nothing was changed or lost."""
    kinds: list[tuple[str, Callable[[Path], dict[str, Any]], list[Path]]] = [
        ("commands", commands, [old, new]),
        ("exit statuses", refusals, [old, new]),
        ("golden values", golden, [old, new]),
    ]
    if runs:
        kinds += [("formats of a run folder", formats, runs), ("the quickstart's table", table, runs)]
    results = [compare(what, read(before), read(after)) for what, read, (before, after) in kinds]
    return 0 if all(results) else 1


if __name__ == "__main__":
    given = [Path(word).absolute() for word in sys.argv[1:]]
    sys.exit(main(given[0], given[1], given[2:4]))
