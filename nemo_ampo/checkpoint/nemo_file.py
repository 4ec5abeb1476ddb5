"""``.nemo`` files that carry their Hugging Face folder along.

A ``.nemo`` file is an uncompressed tar of ``model_config.yaml`` and ``model_weights/``. NeMo does not pack a
Hugging Face tokenizer, it stores the path of the folder. So every ``.nemo`` of this project has one more
member, ``hf_assets/``, with each file of the Hugging Face folder that is not a weight, byte for byte: config,
tokenizer, chat template, generation config, licence. Loading unpacks it and points NeMo there; export copies
it back. The last member, ``hashes.json``, holds the SHA-256 of all others; whatever is read is checked by it. Nothing
here imports NeMo. The folder that such a file was unpacked into (``tar -xf``) is read like the file.

A ``.nemo`` may come from a stranger: members other than files and folders, names that leave the folder or occur twice, and
settings that NeMo would execute are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from nemo_ampo.errors import UserError
from nemo_ampo.files import disk_errors, look_alike, sha256_of
from nemo_ampo.text import one_line

ASSETS_FOLDER = "hf_assets"
WEIGHTS_FOLDER = "model_weights"
MODEL_CONFIG_NAME = "model_config.yaml"
HASHES_NAME = "hashes.json"
MODEL_CLASSES = (
    "nemo.collections.nlp.models.language_modeling.",
    "nemo_aligner.models.nlp.gpt.",
    "nemo_ampo.training.actor.",
    "nemo_ampo.training.bc_model.",
)
"""Where a ``target`` of model_config.yaml may lie: NeMo imports and calls what it names."""
_EXECUTED = re.compile(r"_target_|cls|_partial_|_args_")
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\b")
_COPY_BYTES = 16 * 1024 * 1024


@contextlib.contextmanager
def open_tar(nemo_path: Path) -> Iterator[tarfile.TarFile]:
    """A ``.nemo`` file whose members are files and folders within it, each there once.

    Raises:
        UserError: it is none.
    """
    if not nemo_path.is_file():
        raise UserError(f"{nemo_path}: no such .nemo file{look_alike(nemo_path)}")
    try:
        with tarfile.open(nemo_path, "r:") as tar:
            seen: set[PurePosixPath] = set()
            for member in tar.getmembers():
                path = relative_name(member)
                if not (member.isfile() or member.isdir()):
                    raise UserError(f"{nemo_path}: {member.name!r} is a link or a device; only files are read")
                if member.isfile() and path in seen:
                    raise UserError(f"{nemo_path}: {member.name!r} is in it twice")
                seen.add(path)
            yield tar
    except tarfile.TarError as error:
        raise UserError(f"{nemo_path}: not a complete .nemo file ({error})") from error


def relative_name(member: tarfile.TarInfo) -> PurePosixPath:
    """Member name without the leading ``./`` that NeMo writes; refuses names that would leave the folder."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"unsafe member name in the .nemo file: {member.name!r}")
    return path


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> io.BufferedReader:
    """Content of a file in it."""
    stream = tar.extractfile(member)
    assert stream is not None  # only directories and links have no stream, and files are asked for
    return stream  # type: ignore[return-value]


@dataclass(frozen=True)
class CheckpointFiles:
    """What a ``.nemo`` holds, packed or unpacked.

    Attributes:
        path: file or folder, for messages.
        openers: by each file's path inside.
    """

    path: Path
    openers: Mapping[PurePosixPath, Callable[[], IO[bytes]]]

    def below(self, folder: str) -> list[PurePosixPath]:
        """Files of a folder, by their path inside of all."""
        return [path for path in self.openers if folder in path.parts[:1]]

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file by its path; empty where others wrote them."""
        opener = self.openers.get(PurePosixPath(HASHES_NAME))
        if opener is None:
            return {}
        with opener() as source:
            try:
                return dict(json.loads(source.read()))
            except (ValueError, TypeError) as error:
                raise UserError(f"{self.path}: {HASHES_NAME} is damaged ({error})") from None

    def read(self, path: PurePosixPath) -> bytes:
        """A small file, checked."""
        out = io.BytesIO()
        self._copy(path, out, self.hashes())
        return out.getvalue()

    def check(self, paths: Iterable[PurePosixPath]) -> None:
        """Read files that are used where they are."""
        hashes = self.hashes()
        for path in paths if hashes else ():
            self._copy(path, io.BytesIO(), hashes, keep=False)

    def check_weights(self) -> None:
        """Read the distributed checkpoint for its hashes.

        Raises:
            UserError: there is none, or a file of it is damaged.
        """
        self.check(_loaded(self))

    def copy(self, paths: Iterable[PurePosixPath], dest: Path, inside: str = "") -> None:
        """Write files into ``dest``, each complete or not at all, so that several ranks may do so at once.

        Args:
            paths: of the files.
            dest: folder.
            inside: folder of theirs that is left off their names.
        """
        hashes = self.hashes()
        for path in paths:
            target = dest / path.relative_to(inside)
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".unpack-")
            try:
                with os.fdopen(handle, "wb") as out:
                    self._copy(path, out, hashes)
                Path(temporary).chmod(0o644)
                Path(temporary).replace(target)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

    def _copy(self, path: PurePosixPath, out: IO[bytes], hashes: Mapping[str, str], keep: bool = True) -> None:
        digest = hashlib.sha256()
        with self.openers[path]() as source:
            while part := source.read(_COPY_BYTES):
                digest.update(part)
                if keep:
                    out.write(part)
        if hashes and hashes.get(path.as_posix()) != digest.hexdigest():
            raise UserError(f"{self.path}: {path} is damaged: its content does not have the hash it was written with")


@contextlib.contextmanager
def open_checkpoint(path: Path) -> Iterator[CheckpointFiles]:
    """A ``.nemo`` file, or the folder that one was unpacked into."""
    if path.is_dir():
        found = (file for file in sorted(path.rglob("*")) if file.is_file())
        yield CheckpointFiles(path, {PurePosixPath(file.relative_to(path)): partial(io.FileIO, file) for file in found})
        return
    with open_tar(path) as tar:
        members = (member for member in tar.getmembers() if member.isfile())
        yield CheckpointFiles(path, {relative_name(member): partial(read_member, tar, member) for member in members})


def read_model_config(nemo_path: Path | str) -> dict[str, Any]:
    """``model_config.yaml`` of a ``.nemo`` file, or of the folder it was unpacked into.

    Raises:
        UserError: no such file, not a ``.nemo`` file, no config in it, or one that would be executed.
    """
    path, name = Path(nemo_path), PurePosixPath(MODEL_CONFIG_NAME)
    with disk_errors(f"cannot read {path}"), open_checkpoint(path) as files:
        if name not in files.openers:
            is_hf = PurePosixPath("config.json") in files.openers
            cure = "; a Hugging Face folder is converted first: python -m converters.hf_to_nemo" if is_hf else ""
            raise UserError(f"{path}: not a .nemo file (no {MODEL_CONFIG_NAME} in it){cure}")
        return _parse_config(files.read(name), f"{path}: {MODEL_CONFIG_NAME}")


def check_model_config(path: Path) -> None:
    """``model_config.yaml`` outside of a ``.nemo`` file, such as that of a training checkpoint.

    Raises:
        UserError: it is absent, no YAML, or holds what would be executed.
    """
    with disk_errors(f"cannot read {path}"):
        _parse_config(path.read_bytes(), str(path))


def _parse_config(content: bytes, where: str) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not YAML of plain values ({one_line(str(error))})") from None
    if not isinstance(config, dict):
        raise UserError(f"{where}: expected keys and values")
    target = config.get("target")
    if target is not None and not str(target).startswith(MODEL_CLASSES):
        raise UserError(f"{where}: target {one_line(str(target))}: expected a GPT model of NeMo or NeMo-Aligner")
    if "params" in config:
        raise UserError(f"{where}: params: would be executed on loading; refused")
    _check_plain(config, where, "")
    return config


def _check_plain(value: Any, where: str, key: str) -> None:
    """Nothing that Hydra, behind NeMo, would call, and no look at this machine's environment."""
    if isinstance(value, str) and _ENVIRONMENT.search(value):
        raise UserError(f"{where}: {key}: reads the environment ({one_line(value)}); refused")
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        below = one_line(f"{key}.{name}" if key else str(name))
        if isinstance(name, str) and _EXECUTED.fullmatch(name):
            raise UserError(f"{where}: {below}: would be executed on loading; refused")
        _check_plain(inner, where, below)


def unpack_assets(nemo_path: Path | str, dest: Path | str) -> Path:
    """Write the Hugging Face files of a ``.nemo`` file, or of an unpacked one, into ``dest``, byte for byte.

    Safe to call from several processes at once and again later: each file appears complete or not at all.

    Returns:
        ``dest``, the folder that ``AutoTokenizer`` and ``AutoConfig`` load.

    Raises:
        UserError: the file is absent, torn, or carries no assets.
    """
    path, folder = Path(nemo_path), Path(dest)
    with disk_errors(f"{path}: cannot unpack in {folder}"), open_checkpoint(path) as files:
        found = files.below(ASSETS_FOLDER)
        if not found:
            raise UserError(
                f"{path}: has no {ASSETS_FOLDER}/ (tokenizer, chat template, config); make it with "
                "`python -m converters.hf_to_nemo`, or add them with nemo_ampo.checkpoint.nemo_file.add_assets"
            )
        files.copy(found, folder, ASSETS_FOLDER)
    return folder


def unpack_weights(nemo_path: Path | str, dest: Path | str) -> Path:
    """Write ``model_weights/`` and ``model_config.yaml`` into ``dest``.

    Returns:
        ``dest``, which NeMo accepts as an extracted ``.nemo``.

    Raises:
        UserError: the file is absent or torn, or holds no distributed checkpoint.
    """
    path, folder = Path(nemo_path), Path(dest)
    with disk_errors(f"{path}: cannot unpack in {folder}"), open_checkpoint(path) as files:
        files.copy(_loaded(files), folder)
    return folder


def check_unpacked(folder: Path) -> None:
    """Compare what NeMo would load from an unpacked ``.nemo`` with its hashes.

    Raises:
        UserError: a file is damaged, or there is no distributed checkpoint.
    """
    with disk_errors(f"cannot read {folder}"), open_checkpoint(folder) as files:
        files.check_weights()


def _loaded(files: CheckpointFiles) -> list[PurePosixPath]:
    """What NeMo reads of a ``.nemo``."""
    weights = files.below(WEIGHTS_FOLDER)
    if not weights:
        raise UserError(f"{files.path}: has no {WEIGHTS_FOLDER}/ folder; only distributed checkpoints are supported")
    return [*weights, *(path for path in files.openers if path == PurePosixPath(MODEL_CONFIG_NAME))]


def content_hash(nemo_path: Path | str) -> str:
    """SHA-256 of a ``.nemo`` file; of an unpacked one that of its list of hashes, or of all its files where it has none.

    Raises:
        UserError: there is nothing to read.
    """
    path = Path(nemo_path)
    if not path.is_dir():
        return sha256_of(path)
    if (path / HASHES_NAME).is_file():
        return sha256_of(path / HASHES_NAME)
    with disk_errors(f"cannot read {path}"), open_checkpoint(path) as files:
        names = [f"{name} {sha256_of(path / name)}" for name in files.openers]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


# --- config -------------------------------------------------------------------------------------------------


def tokenizer_config(folder: Path | str) -> dict[str, Any]:
    """NeMo's ``model.tokenizer`` for a Hugging Face tokenizer folder."""
    return {
        "library": "huggingface",
        "type": plain_name(Path(folder).resolve()),
        "model": None,
        "vocab_file": None,
        "merge_file": None,
        "use_fast": True,
    }


def plain_name(folder: Path) -> str:
    """A name that OmegaConf, which NeMo resolves a config with more than once, does not take for an interpolation."""
    if "${" not in str(folder):
        return str(folder)
    # Of this process and for as long as it lives: whoever loads the checkpoint later sets a name anew.
    return f"/proc/{os.getpid()}/fd/{os.open(folder, os.O_RDONLY | os.O_DIRECTORY)}"


def load_overrides(nemo_path: Path | str, assets_dir: Path | str, device: str = "cpu") -> dict[str, Any]:
    """What to merge over a ``.nemo`` file's config before NeMo restores it on this machine.

    Args:
        nemo_path: the checkpoint.
        assets_dir: where :func:`unpack_assets` put its Hugging Face files.
        device: ``gpu`` for Transformer Engine layers, ``cpu`` for Megatron's local ones.

    Raises:
        UserError: ``assets_dir`` is not a tokenizer folder, or the checkpoint is not one of a GPT model.
    """
    folder = Path(assets_dir)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; unpack the checkpoint's assets there first")
    if not read_model_config(nemo_path).get("mcore_gpt"):
        raise UserError(f"{nemo_path}: not a Megatron-core GPT model (mcore_gpt is not true in {MODEL_CONFIG_NAME})")
    return {"tokenizer": tokenizer_config(folder), "transformer_engine": device == "gpu"}
