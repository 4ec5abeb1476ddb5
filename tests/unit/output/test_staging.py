from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import nemo_ampo.output.staging
from nemo_ampo.errors import DiskError, UserError
from nemo_ampo.output.lock import Lock, hold_output
from nemo_ampo.output.staging import place_with_room, publish, scratch_folder, staged

BUILDER = """
import sys, time
from pathlib import Path
from nemo_ampo.output.staging import staged
with staged(Path(sys.argv[1]), "--output") as built:
    built.mkdir()
    (built / "half").write_text("half")
    print("in", flush=True)
    time.sleep(60)
"""


def another_builder(output: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", BUILDER, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("as_folder", [True, False])
@pytest.mark.parametrize("name", ["model", "mödel ${x} #1=2 [*] 'q'", "a" * 230])
def test_an_output_appears_whole_and_nothing_else_stays(tmp_path: Path, name: str, as_folder: bool) -> None:
    output = tmp_path / "new" / name
    for content in ("first", "second"):
        with staged(output, "--output") as built:
            if as_folder:
                built.mkdir()
                (built / content).write_text(content)
            else:
                built.write_text(content)
            publish(built, output)
        assert names(tmp_path / "new") == [name]
        assert names(output) == [content] if as_folder else output.read_text() == content


def test_a_second_writer_is_refused_and_a_killed_one_leaves_nothing_for_long(tmp_path: Path) -> None:
    output = tmp_path / "model"
    process = another_builder(output)
    try:
        told = f"--output: .*model is in use by another job .process {process.pid} "
        with pytest.raises(UserError, match=told), staged(output, "--output"):
            raise AssertionError("two at a time")
        # A reader works in the same place meanwhile and leaves what is alive alone.
        with scratch_folder(tmp_path, "model"):
            assert len([name for name in names(tmp_path) if name.startswith(".model.tmp-")]) == 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not output.exists() and len(names(tmp_path)) == 2
    with staged(output, "--output") as built:
        assert len([name for name in names(tmp_path) if name.startswith(".model.tmp-")]) == 1
        built.write_text("whole")
        publish(built, output)
    assert names(tmp_path) == ["model"]


def test_a_folder_in_the_way_stays_when_the_new_one_cannot_take_its_place(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(nemo_ampo.output.staging, "_exchanged", lambda *_: False)
    output = tmp_path / "model"
    output.mkdir()
    (output / "old").touch()
    with staged(output, "--output") as built:
        built.mkdir()
        (built / "new").touch()
        real = Path.replace

        def fails(self: Path, target: Path) -> Path:
            if self == built:
                raise OSError(errno.EIO, "Input/output error")
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", fails)
            with pytest.raises(DiskError, match=r"cannot write .*model: Input/output error"):
                publish(built, output)
        assert names(output) == ["old"]
        publish(built, output)
    assert names(output) == ["new"] and names(tmp_path) == ["model"]


def test_a_link_stands_for_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "model")
    (tmp_path / "elsewhere").mkdir()
    with hold_output(tmp_path / "elsewhere" / "model", "--out"), pytest.raises(UserError, match="in use"):
        hold_output(tmp_path / "link", "--out")
    with staged(tmp_path / "link", "--out") as built:
        built.write_text("x")
        publish(built, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "model").read_text() == "x"


@pytest.mark.parametrize("kind", ["file in the way", "name too long", "folder for a file"])
def test_places_that_will_not_do_are_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    places = {"file in the way": "file/model", "name too long": "x" * 300, "folder for a file": "folder"}
    output = tmp_path / places[kind]
    with pytest.raises(DiskError) as caught, staged(output, "--output") as built:
        built.touch()
        publish(built, output)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert names(tmp_path) == ["file", "folder"]


def failures() -> list[Exception]:
    hidden = RuntimeError("Worker failure: OSError")
    hidden.__cause__ = OSError(errno.ENOSPC, "No space left on device", "x")
    return [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        hidden,
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ]


@pytest.mark.parametrize("error", failures(), ids=["quota", "hidden", "in words"])
def test_whatever_a_library_makes_of_a_full_disk_is_one_line(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DiskError, match=r"No space left|quota"), staged(tmp_path / "model", "--output"):
        raise error
    assert names(tmp_path) == []


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), scratch_folder(tmp_path, "x"):
        raise KeyError("x")


def test_room_is_looked_for_before_the_work(tmp_path: Path) -> None:
    assert place_with_room([tmp_path / "new" / "deep", tmp_path], 1, "it") == tmp_path / "new" / "deep"
    (tmp_path / "file").touch()
    assert place_with_room([tmp_path / "file", tmp_path], 1, "it") == tmp_path
    with pytest.raises(DiskError, match=r"it needs 1e\+09 GB of disk, but .*file cannot be written to and .* has .* free"):
        place_with_room([tmp_path / "file", tmp_path], 10**18, "it")


def test_many_at_a_moment_get_folders_of_their_own(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom nemo_ampo.output.staging import scratch_folder\n"
        "for _ in range(20):\n with scratch_folder(Path(sys.argv[1]), 'm') as f:\n"
        "  (f / 'x').touch(exist_ok=False); assert (f / 'x').exists()\n"
    )
    pids = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(4)]
    assert [process.wait() for process in pids] == [0] * 4
    assert names(tmp_path) == []


def test_what_is_removed_is_held_meanwhile(tmp_path: Path, monkeypatch) -> None:
    """Whoever made a folder and was about to lock it would work on in one that is being removed."""
    left = tmp_path / ".m.tmp-left"
    left.mkdir()
    (left / ".running").touch()
    remove, held = nemo_ampo.output.staging._remove, []

    def removed(folder: Path) -> None:
        with pytest.raises(UserError, match="in use by another job"):
            Lock(folder / ".running", str(folder))
        held.append(folder)
        remove(folder)

    monkeypatch.setattr(nemo_ampo.output.staging, "_remove", removed)
    with scratch_folder(tmp_path, "m") as own:
        assert held == [left] and not left.exists() and own.is_dir()


def test_without_locks_nothing_of_others_is_removed(tmp_path: Path, monkeypatch, capsys) -> None:
    process = another_builder(tmp_path / "model")
    process.kill()
    process.wait()

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    with scratch_folder(tmp_path, "model"):
        assert len([name for name in names(tmp_path) if name.startswith(".model.tmp-")]) == 2
    assert "no locks" in capsys.readouterr().err


def test_names_of_all_kinds_hold_no_other_output(tmp_path: Path) -> None:
    kinds = ["a", "a.tmp-", ".a", "a b", "ä", "字", "a#", "${a}", "a'", 'a"', "~", "a=b", "[a]", "*"]
    with contextlib.ExitStack() as stack:
        for name in kinds:
            built = stack.enter_context(staged(tmp_path / name, "--output"))
            built.write_text(name)
            publish(built, tmp_path / name)
    assert names(tmp_path) == sorted(kinds)
    assert all((tmp_path / name).read_text() == name for name in kinds)
