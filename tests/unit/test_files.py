from __future__ import annotations

import errno
import json
import os
import random
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_ampo.errors import DataError, DiskError, UserError
from nemo_ampo.files import (
    append_whole,
    check_writable,
    disk_errors,
    file_name_problem,
    full_or_read_only,
    is_torn,
    no_model_folder,
    object_in,
    read_jsonl,
    read_record,
    sealed,
    strict_json,
    write_once,
)


def test_a_torn_line_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert [r["step"] for r in read_jsonl(path)] == [0, 1]


@pytest.mark.parametrize("line", ["{", "[1]", "\x00", "null", "", "[" * 100_000])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        read_jsonl(path)


def test_a_file_keeps_its_bytes_and_its_secrets(tmp_path: Path) -> None:
    write_once(tmp_path / "deep" / "a.txt", "one\r\ntwo")
    write_once(tmp_path / "token", b"secret", private=True)
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"one\r\ntwo"
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.txt", "deep", "token"]


FULL = """
import resource, sys
from pathlib import Path
from nemo_ampo.files import write_once
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
write_once(Path(sys.argv[1]), "x" * 100)
"""


def test_a_link_stands_for_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    write_once(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "file").read_text() == "x"


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "circle"])
def test_no_file_takes_the_place_of_what_is_none(tmp_path: Path, kind: str) -> None:
    """``--out /dev/null`` of a root user would leave the machine without that device."""
    from nemo_ampo.data.rows import write_rows
    from nemo_ampo.output.staging import publish, staged

    place, built = tmp_path / "place.json", tmp_path / "built"
    os.mkfifo(tmp_path / "pipe")
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path / "pipe" if kind == "link to a pipe" else place)
    before = place.lstat()

    def enter() -> None:
        with staged(place, "--output"):
            pass

    built.write_text("x")
    for write in (lambda: write_once(place, "x"), lambda: write_rows([], place), enter, lambda: publish(built, place)):
        with pytest.raises(DiskError, match=r"cannot write .*(neither a file nor a folder|symbolic links)"):
            write()
    assert os.path.samestat(before, place.lstat())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_once(path, "before")
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(f"cannot write {path}: File too large")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_disk_is_the_users_and_the_systems(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskError, match=r"^cannot write it: No such file") as caught,
        disk_errors("cannot write it"),
    ):
        (tmp_path / "absent" / "file").open("w")
    assert isinstance(caught.value, UserError) and isinstance(caught.value, OSError)


@pytest.mark.parametrize(
    "name", ["base", "step 100", "1e3", "ünïcode", "日本", "a" * 120, "x.y-z_1", "v1.0", "(a)=#,~$'\"", "-x", "é"]
)
def test_a_name_that_files_may_have_is_taken(name: str, tmp_path: Path) -> None:
    assert file_name_problem(name) is None
    write_once(tmp_path / f"{name}.json", "x")
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.json"]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            ".",
            "..",
            "../x",
            "a/b",
            "/",
            "a\\b",
            ".hidden",
            " a",
            "a ",
            "a\n",
            "a\tb",
            "a\x00",
            "a\x1b[2J",
            "\u202ea",
        ),
        *("a\x7f", "\ud800", "a" * 121, "ü" * 61, 1000.0, 7, True, None, ["a"], "a\u2028b", "\u00a0"),
    ],
)
def test_a_name_that_is_none_is_refused_in_one_line(name: object) -> None:
    problem = file_name_problem(name)
    assert problem and problem.isprintable()


def test_whatever_passes_as_a_name_is_one_file_in_its_folder(tmp_path: Path) -> None:
    rng = random.Random(1)
    alphabet = "ab./\\ ~\x00\n\t\x1b\x85\u2028\u202e\ud800é\U0001f600%$'\""
    taken = {
        name
        for name in ("".join(rng.choices(alphabet, k=rng.randrange(6))) for _ in range(3000))
        if not file_name_problem(name)
    }
    for name in taken:
        write_once(tmp_path / f"{name}.json", name)
    assert len(taken) > 100 and {path.name for path in tmp_path.rglob("*")} == {f"{name}.json" for name in taken}


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "ro"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_cannot_be_written_is_known_before_work_begins(read_only: Path, tmp_path: Path) -> None:
    for folder in (read_only, read_only / "not" / "there"):
        with pytest.raises(DiskError, match=rf"^run\.dir: cannot write {folder}: Read-only file system$"):
            check_writable(folder, "run.dir")
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"run\.dir: .*/file/x: .*is a file"):
        check_writable(tmp_path / "file" / "x", "run.dir")
    check_writable(tmp_path / "a" / "b", "run.dir")
    assert not (tmp_path / "a").exists()


def test_commands_on_a_read_only_disk_end_with_one_line(read_only: Path) -> None:
    world = ("nemo_ampo.world", "--out", f"{read_only}/w", "--num-bc", "4", "--num-rl", "4", "--num-heldout", "4")
    rows = (
        "nemo_ampo.commands.cli",
        "generate",
        "bc",
        "--world",
        "1",
        "--out",
        f"{read_only}/r.jsonl",
        "--teacher",
        "http://127.0.0.1:9/v1",
    )
    stages = [
        (f"recipes.{stage}", f"run.dir={read_only}/x", *more)
        for stage, more in (
            ("bc", ()),
            ("ampo", ()),
            ("evaluate", ("run.name=a",)),
            ("sotopia", ("--config-name", "self_play")),
        )
    ]
    for command in (world, (*rows, "--teacher", "http://127.0.0.1:9/v1", "--teacher-model", "m"), *stages):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert done.returncode == 2, (command, done.stderr)
        assert done.stderr.count("\n") == 1 and "Read-only file system" in done.stderr, (command, done.stderr)


def test_an_error_of_a_disk_that_no_other_rule_names_is_one_line() -> None:
    with pytest.raises(DiskError, match=r"^cannot write /x: No space left on device$"), full_or_read_only():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x")
    with pytest.raises(ConnectionRefusedError), full_or_read_only():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "no")


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', "NaN", "[1e999]", "-Infinity", "[" * 100_000, "1" * 5000, "", "{", '{"a": {"b": 1, "b": 1}}'],
)
def test_what_is_no_json_is_said_in_a_few_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"occurs twice|not a finite number|not valid JSON"):
        strict_json(text)


def test_a_key_given_twice_is_found_among_many_and_cannot_stretch_the_message() -> None:
    """Looking for each key among all others would take hours."""
    text = ", ".join(f'"{n}": 0' for n in range(200_000))
    with pytest.raises(ValueError, match="key 'kkk"):
        strict_json("{" + text + f', "{"k" * 9999}": 0, "{"k" * 9999}": 0' + "}")
    with pytest.raises(ValueError) as caught:
        object_in(f'so: {{"{"k" * 9999}": 0, "{"k" * 9999}": 0}}')
    assert len(str(caught.value)) < 100


def test_an_appended_line_follows_a_whole_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"1\n2")
    append_whole(log, b"3\n")
    assert log.read_bytes() == b"1\n3\n"
    assert not is_torn(log) and not is_torn(tmp_path / "absent")
    log.write_bytes(b"torn")
    assert is_torn(log)


RECORD = {"text": "\u00e4\ud800 \u4e16", "score": -0.0, "big": 1e300, "list": [1, {"a": None}], "7": True}


def test_a_sealed_record_is_read_as_it_was_and_an_edited_one_is_named(tmp_path: Path) -> None:
    path, lines = tmp_path / "r.json", tmp_path / "r.jsonl"
    path.write_text(json.dumps(sealed(RECORD), indent=1))
    assert read_record(path) == RECORD
    path.write_text(json.dumps(RECORD))
    assert read_record(path) == RECORD, "older versions sealed nothing"
    for change in ({"score": 0.5}, {"list": [1]}, {"more": 1}, {"seal": None}, {"seal": [RECORD]}):
        edited = json.dumps(sealed(RECORD) | change)
        path.write_text(edited)
        lines.write_text(f"{json.dumps(sealed(RECORD))}\n{edited}\n")
        with pytest.raises(DataError, match=r"r\.json: not what was written there; the file was damaged or edited"):
            read_record(path)
        with pytest.raises(DataError, match=r"r\.jsonl, line 2: not what was written there"):
            read_jsonl(lines)


def test_a_nemo_file_in_place_of_a_model_folder_is_told_how_to_be_exported(tmp_path: Path) -> None:
    (tmp_path / "policy.nemo").touch()
    assert no_model_folder(tmp_path / "policy.nemo").endswith("; export it first: python -m converters.nemo_to_hf")
    assert no_model_folder(tmp_path / "none.nemo") == f"no Hugging Face folder at {tmp_path / 'none.nemo'}"
