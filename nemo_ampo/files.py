"""Files as every part writes and reads them: whole or not at all, errors in one line, hashes, JSON lines."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_ampo.errors import ConfigError, DataError, DiskError
from nemo_ampo.text import one_line, printable

MAX_NAME_BYTES = 120
"""Of a name somebody chose: file systems take 255, and endings and temporary names come on top."""


def shipped(folder: str) -> Path:
    """``configs`` or ``slurm``: inside an installed package, else at the top of the repository."""
    package = Path(__file__).resolve().parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


LONGEST_NAME, LONGEST_PATH = 255, 3800
"""Bytes of one part of a path, and of a run folder's whole path, which leaves room for the files below it."""


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn what the system says about a file into one line.

    Args:
        doing: what the block does, such as ``cannot write DIR/config.yaml``.

    Raises:
        DiskError: the block raised an ``OSError``: full, read-only, not allowed, a folder where a file should be, ...
    """
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(error.errno or 0, f"{doing}: {error.strerror or error}") from error


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def full_or_read_only() -> Iterator[None]:
    """A command's last net: a disk that no other rule named, because a library wrote to it, is one line as well.

    Raises:
        DiskError: the block raised an ``OSError`` of a full or read-only disk, or of a missing right.
    """
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f"cannot write {error.filename}" if error.filename else "cannot write a file"
        raise DiskError(error.errno or 0, f"{where}: {error.strerror}") from error


def check_writable(folder: Path, option: str) -> None:
    """Can something be written in a folder that may not be there yet? Asked before work that would be lost; writes nothing.

    Args:
        folder: to be written in.
        option: which names it, for the message, such as ``run.dir``.

    Raises:
        DiskError: it is a file, read-only or not allowed, or its disk is full.
    """
    said = f"{option}: cannot write {folder}"
    with disk_errors(said):
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
        disk = os.statvfs(there)
        if disk.f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)} ({there})")
        # Some file systems count neither blocks nor files.
        if (disk.f_blocks and not disk.f_bavail) or (disk.f_files and not disk.f_favail):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def place_of(path: Path) -> Path:
    """Where what is written under a name comes to lie: a link stands for what it points to.

    Raises:
        OSError: a device, a pipe or a link in a circle bears the name; a finished file would take a device's place.
    """
    try:
        place = path.resolve()
    except RuntimeError:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
    try:
        kind = stat.S_IFMT(place.stat().st_mode)
    except OSError:  # nothing is there, or whoever writes will hear why not
        return place
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise OSError(errno.EINVAL, "there is something that is neither a file nor a folder")
    return place


def write_once(path: Path, content: str | bytes, *, private: bool = False) -> None:
    """Write through a temporary name of its own beside ``path``: a reader never sees half a file, two writers never mix.

    Args:
        path: its folder is created if absent; a link stands for what it points to.
        content: text as UTF-8, without translating its line ends, or bytes.
        private: only the owner may read it (a token stands in it).

    Raises:
        DiskError: it cannot be written; what was there before is still there.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with disk_errors(f"cannot write {path}"):
        place = place_of(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{place.name[:100]}.", suffix=".tmp", dir=place.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            if not private:
                let_others_read(Path(name))
            Path(name).replace(place)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def let_others_read(path: Path) -> None:
    """Give a file the mode that ``open`` would have given it; temporary files, and safetensors', are the owner's alone."""
    mask = os.umask(0o077)  # the system tells it only to those who set it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def append_whole(path: Path, data: bytes) -> None:
    """Append all or nothing: half a line would damage the next one. A line that an earlier process left torn is cut.

    Raises:
        OSError: as the system says it.
    """
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
            file.truncate(size)
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def strict_json(text: str | bytes, finite: bool = True) -> Any:
    """Decode JSON as it is defined: a key given twice, of which one value would be lost, and NaN are none.

    Args:
        text: to decode.
        finite: False leaves NaN and infinities to a reader that names their field.

    Raises:
        ValueError: not JSON, in a few words.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = Counter(keys).most_common(1)[0][0]
            raise _NotStrictError(f"key '{one_line(twice, 40)}' occurs twice in one object")
        return result

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise _NotStrictError(f"{one_line(digits, 40)} is not a finite number")
        return value

    def constant(name: str) -> Any:
        raise _NotStrictError(f"{name} is not a finite number")

    try:
        if not finite:
            return json.loads(text, object_pairs_hook=unique)
        return json.loads(text, object_pairs_hook=unique, parse_float=number, parse_constant=constant)
    except _NotStrictError:
        raise
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    except ValueError as error:  # also a number of thousands of digits
        raise ValueError(f"not valid JSON: {error}") from None


def object_in(text: str) -> dict[str, Any]:
    """The JSON object that a model wrote as its answer: from the first ``{`` to the last ``}``, by :func:`strict_json`.

    Raises:
        ValueError: there is none, or it is not one object. The message continues a sentence about the answer.
    """
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise ValueError("it has no JSON object")
    record = strict_json(text[start : end + 1])
    assert isinstance(record, dict), "JSON that starts with a brace is an object"
    return record


class _NotStrictError(ValueError):
    """JSON to the library, but not to us."""


_SEAL = "seal"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of JSON values with a digest of all of them, by which whoever reads it again notices an edited one."""
    return {**record, _SEAL: _digest(record)}


def unsealed(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record as it was before :func:`sealed`; one that has no seal, as older versions wrote it, is taken as it is.

    Raises:
        DataError: it is not what was sealed.
    """
    content = {name: value for name, value in record.items() if name != _SEAL}
    if _SEAL in record and record[_SEAL] != _digest(content):
        raise DataError(f"{where}: not what was written there; the file was damaged or edited")
    return content


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode("ascii")).hexdigest()[:16]


def is_torn(path: Path) -> bool:
    """Whether the last line of a log lacks its end: the process died while writing, or the file was cut."""
    if not path.exists():
        return False
    with disk_errors(f"cannot read {path}"), path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read_text(path: Path) -> str:
    """A UTF-8 file as it is: every line end stays what it was, since a model may be shown the text.

    Raises:
        DiskError: it cannot be read.
        DataError: it is not UTF-8.
    """
    with disk_errors(f"cannot read {path}"):
        data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Lines of a log; a torn last one (the process died while writing) is left out. No file, no lines.

    Raises:
        DataError: a line that was written whole is no JSON object, or not what was sealed.
    """
    return [row for _, row in stream_jsonl(path)]


def stream_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """As :func:`read_jsonl`, line by line, each with its place for messages."""
    if not path.exists():
        return
    with disk_errors(f"cannot read {path}"), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            where, row, why = f"{path}, line {number}", None, ""
            try:
                row = strict_json(line)
            except ValueError as error:
                why = f" ({error})"
            if not isinstance(row, dict):
                raise DataError(f"{where}: not a JSON object{why}; the file was damaged or edited")
            yield where, unsealed(row, where)


def read_record(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        DataError: it holds anything else, or not what was sealed.
        DiskError: it cannot be read.
    """
    with disk_errors(f"cannot read {path}"):
        content = path.read_bytes()
    try:
        record = strict_json(content)
    except ValueError as error:
        raise DataError(f"{path}: {error}; the file was damaged or edited") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}: expected a JSON object; the file was damaged or edited")
    return unsealed(record, str(path))


def file_name_problem(name: object) -> str | None:
    """Why ``name`` cannot be part of a file's name; None when it can.

    Args:
        name: as the configuration gives it. YAML makes numbers and truth values of some words, which would come back
            spelt differently.
    """
    if not isinstance(name, str):
        return f"expected a name, got {name!r}, which YAML does not read as text; put quotes around it"
    if not name.strip():
        return "must not be empty"
    if "/" in name or "\\" in name:
        return f"must be a file name without a path, got {one_line(name)!r}"
    if name.startswith("."):
        return f"must not begin with a dot, got {one_line(name)!r}"
    if name != name.strip() or not printable(name).isprintable() or printable(name) != name:
        return f"must not hold control characters or begin or end with a blank, got {printable(name)[:60]!r}"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"must not be longer than {MAX_NAME_BYTES} bytes, got {len(name.encode())}"
    return None


def sha256_of(path: str | Path) -> str:
    """Of a file's bytes, in hex.

    Raises:
        DiskError: it cannot be read.
    """
    with disk_errors(f"cannot read {path}"), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derived_seed(what: str, bits: int = 31) -> int:
    """A seed from what it is for, never from the order in which things happen: the leading bits of the text's SHA-256.

    Args:
        what: seed of the run and everything else that tells this draw from any other.
        bits: so many, at most 64.
    """
    return int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big") >> (64 - bits)


def is_file(path: str | Path) -> bool:
    """Whether a file is there; False too for a name that no file can have."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there; False too for a name that no folder can have."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def missing(path: str | Path) -> str:
    """In words, that there is no such file, and what looks like it to a person's eye."""
    return f"no such file: {path}{look_alike(path)}"


def look_alike(path: str | Path) -> str:
    """In words, a name that is there and looks the same as one that is not; empty when there is none.

    Letters with accents have two spellings in Unicode, and systems differ in which they write.
    """
    place = Path(path)
    try:
        while not place.parent.exists() and place.parent != place:
            place = place.parent
        twins = [entry.name for entry in place.parent.iterdir() if entry.name != place.name]
    except (OSError, ValueError):
        return ""
    twin = next((name for name in twins if same_to_the_eye(name, place.name)), None)
    return "" if twin is None else f"; {place.parent} has {twin!a}, which looks the same as {place.name!a}"


def no_model_folder(path: str | Path) -> str:
    """In words, that there is no Hugging Face folder, and what to do where a file of NeMo's stands there."""
    place = Path(path)
    exported = "; export it first: python -m converters.nemo_to_hf" if place.suffix == ".nemo" and is_file(place) else ""
    return f"no Hugging Face folder at {path}{look_alike(path)}{exported}"


def same_to_the_eye(one: str, other: str) -> bool:
    """Whether two texts differ in nothing but the Unicode form of their letters (NFC, NFD, compatibility, width)."""
    return unicodedata.normalize("NFKC", one) == unicodedata.normalize("NFKC", other)


def check_folder(key: str, path: str) -> None:
    """Could this be a folder of ours, whether or not it is there already?

    Raises:
        ConfigError: naming the key.
    """
    if not path.strip():
        raise ConfigError(f"{key}: must not be empty")
    whole = Path(path).absolute()
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in whole.parts) or len(os.fsencode(whole)) > LONGEST_PATH:
        raise ConfigError(f"{key}: {path[:40]}… is longer than a file system takes")
    if is_file(path):
        raise ConfigError(f"{key}: {path} is a file, not a folder")
