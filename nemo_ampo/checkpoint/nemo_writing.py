"""Writing ``.nemo`` files: of a live model, of a training checkpoint, and the Hugging Face files added to one. [nemo]"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_ampo.checkpoint.nemo_file import (
    ASSETS_FOLDER,
    HASHES_NAME,
    MODEL_CONFIG_NAME,
    WEIGHTS_FOLDER,
    open_checkpoint,
    open_tar,
    read_member,
    relative_name,
)
from nemo_ampo.errors import DiskError, UserError
from nemo_ampo.files import disk_errors
from nemo_ampo.output.staging import scratch_folder, staged


def add_assets(
    nemo_path: Path | str, folder: Path | str, atomic: bool = True, known: Mapping[str, str] | None = None
) -> None:
    """Put a folder of Hugging Face files into a ``.nemo`` file, replacing those it may already carry.

    Args:
        nemo_path: the checkpoint, changed in place.
        folder: every file in it that is not hidden is packed; it must hold no weights.
        atomic: work on a copy and rename it. Without it a crash can leave a torn file: only for files nobody
            else sees.
        known: SHA-256 of members that need not be read again for it.

    Raises:
        UserError: either path is absent, or the folder has no config.json.
    """
    path, source = Path(nemo_path), Path(folder)
    files = [p for p in sorted(source.rglob("*")) if p.is_file() and not _hidden(p.relative_to(source))]
    if source / "config.json" not in files:
        raise UserError(f"{source}: no config.json; expected the Hugging Face files of the model")
    with open_checkpoint(path) as there:
        replaces = bool(there.below(ASSETS_FOLDER) or there.hashes())
    if not (atomic or replaces):
        _append(path, source, files, known or {})
        return
    with scratch_folder(path.absolute().parent, path.name) as folder:
        temporary = folder / path.name
        if replaces:
            _copy_without_assets(path, temporary)
        else:
            shutil.copyfile(path, temporary)
        _append(temporary, source, files, {})
        _publish(temporary, path)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _append(path: Path, source: Path, files: list[Path], known: Mapping[str, str]) -> None:
    with tarfile.open(path, "a:", dereference=True) as tar:
        for file in files:
            tar.add(file, arcname=f"./{ASSETS_FOLDER}/{file.relative_to(source).as_posix()}", filter=_anonymous)
    hashes = dict(known)
    with open_checkpoint(path) as packed:
        for name, opener in packed.openers.items():
            if name.as_posix() in known:
                continue
            with opener() as content_of:
                hashes[name.as_posix()] = hashlib.file_digest(content_of, "sha256").hexdigest()  # type: ignore[arg-type]
    content = json.dumps(hashes, indent=1).encode()
    with tarfile.open(path, "a:") as tar:
        sealed = tarfile.TarInfo(f"./{HASHES_NAME}")
        sealed.size = len(content)
        tar.addfile(_anonymous(sealed), io.BytesIO(content))


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Owner, date and mode of the packing machine are no part of the checkpoint."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def _copy_without_assets(path: Path, target: Path) -> None:
    with open_tar(path) as old, tarfile.open(target, "w:") as new:
        for member in old.getmembers():
            if relative_name(member).parts[:1] not in ((ASSETS_FOLDER,), (HASHES_NAME,)):
                new.addfile(member, read_member(old, member) if member.isfile() else None)


def _publish(temporary: Path, target: Path) -> None:
    """Make ``temporary`` durable, then give it its name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save_nemo(model: Any, path: Path | str, assets_dir: Path | str) -> None:
    """Save a NeMo model as a ``.nemo`` file that carries its Hugging Face files.

    Every rank of the job must call it. NeMo writes beside the target, so all of it happens in a folder next
    to ``path``; rank 0 adds the assets and publishes the file by rename. A save that dies leaves ``path`` as
    it was.

    Args:
        model: a NeMo model with ``save_to`` (any MegatronGPTModel).
        path: the ``.nemo`` file, on a file system that all ranks see.
        assets_dir: Hugging Face files to pack, as :func:`unpack_assets` leaves them.

    Raises:
        UserError: ``assets_dir`` has no config.json.
        DiskError: it cannot be written.
    """
    target = Path(path).absolute()
    if not (Path(assets_dir) / "config.json").is_file():
        raise UserError(f"{assets_dir}: no config.json; expected the Hugging Face files of the model")
    staging = target.with_name(f".{target.name}.saving")
    staged = staging / target.name

    def begin() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        # Asked while all ranks can be told: one that dies in the middle of a save takes the others with it.
        free, needed = shutil.disk_usage(staging).free, _bytes_to_save(model)
        if free < needed:
            raise OSError(errno.ENOSPC, f"{free / 1e9:.3g} GB free, it needs {needed / 1e9:.3g} GB; make room")

    def finish() -> None:
        add_assets(staged, assets_dir, atomic=False)
        _publish(staged, target)

    try:
        on_rank_zero(begin, target)
        with disk_errors(f"cannot write {target}"), temporary_files_in(staging):
            model.save_to(str(staged))
        on_rank_zero(finish, target)
    finally:
        if _is_rank_zero():
            shutil.rmtree(staging, ignore_errors=True)


def pack_nemo(folder: Path | str, path: Path | str, assets_dir: Path | str) -> None:
    """Make a ``.nemo`` file of an unpacked one, such as a training checkpoint, without NeMo.

    Args:
        folder: holds ``model_config.yaml`` and ``model_weights/``.
        path: the ``.nemo`` file, complete or absent.
        assets_dir: Hugging Face files to pack with it.

    Raises:
        UserError: the folder is no unpacked ``.nemo``, or ``assets_dir`` has no config.json.
    """
    source, target = Path(folder), Path(path).absolute()
    for name in (MODEL_CONFIG_NAME, WEIGHTS_FOLDER):
        if not (source / name).exists():
            raise UserError(f"{source}: has no {name}; expected a training checkpoint (step-...)")
    with staged(target, "--output") as built:
        with tarfile.open(built, "w:", dereference=True) as tar:
            for file in (source / MODEL_CONFIG_NAME, *sorted((source / WEIGHTS_FOLDER).rglob("*"))):
                tar.add(file, arcname=f"./{file.relative_to(source).as_posix()}", recursive=False, filter=_anonymous)
        add_assets(built, assets_dir, atomic=False)
        _publish(built, target.resolve())


@contextlib.contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """NeMo works in the system's temporary folder, which may be too small for a model or not for writing."""
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _bytes_to_save(model: Any) -> int:
    """Of the weights of all model-parallel ranks, twice: NeMo writes them, then packs what it wrote."""
    ranks = int(model.cfg.get("tensor_model_parallel_size", 1)) * int(model.cfg.get("pipeline_model_parallel_size", 1))
    return 2 * ranks * sum(p.numel() * p.element_size() for p in model.parameters())


def on_rank_zero(work: Callable[[], None], target: Path) -> None:
    """Run ``work``, which writes to ``target``, on one rank; all wait for it.

    Raises:
        DiskError: on all ranks, when the disk refused it.
    """
    refused: list[str | None] = [None]
    if _is_rank_zero():
        try:
            work()
        except OSError as error:
            refused = [error.strerror or str(error)]
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(refused)
    if refused[0] is not None:
        raise DiskError(0, f"cannot write {target}: {refused[0]}")


def _is_rank_zero() -> bool:
    import torch

    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
