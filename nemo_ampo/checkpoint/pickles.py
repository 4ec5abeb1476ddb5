"""Is a checkpoint of somebody else's only data? Asked before NeMo, Megatron or torch read it.

Megatron's distributed format holds pickles (``.metadata``, ``common.pt``, the objects among the shards), and a pickle runs
whatever it names. The frameworks load them without restriction, so every global that one names is looked up here in a list
of harmless ones. Nothing is executed on the way: allowed globals are stood in for by a class that does nothing.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar

from nemo_ampo.errors import UserError
from nemo_ampo.files import disk_errors
from nemo_ampo.text import one_line

_CHECKPOINT = "torch.distributed.checkpoint"
_DTYPES = (
    *("float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("bool", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)
_STORAGES = (
    "Byte",
    "Char",
    "Short",
    "Int",
    "Long",
    "Half",
    "Float",
    "Double",
    "BFloat16",
    "Bool",
    "ComplexFloat",
    "ComplexDouble",
)
ALLOWED = frozenset(
    {
        *(f"{_CHECKPOINT}.metadata {name}" for name in ("Metadata", "MetadataIndex", "TensorProperties", "StorageMeta")),
        *(f"{_CHECKPOINT}.metadata {kind}StorageMetadata" for kind in ("Bytes", "Chunk", "Tensor")),
        f"{_CHECKPOINT}.metadata _MEM_FORMAT_ENCODING",
        f"{_CHECKPOINT}.filesystem _StorageInfo",
        *(f"{_CHECKPOINT}.planner {name}" for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
        "megatron.core.dist_checkpointing.strategies.torch MCoreSavePlan",
        "megatron.core.dist_checkpointing.strategies.torch MCoreMetadata",
        *(f"torch {name}" for name in (*_DTYPES, "Size", "device", "Tensor")),
        *(f"torch {name}Storage" for name in _STORAGES),
        *(f"torch.storage {name}Storage" for name in ("Untyped", "Typed")),
        *(f"torch._utils {name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")),
        "torch.serialization _get_layout",
        "torch.nn.parameter Parameter",
        "collections OrderedDict",
        "collections defaultdict",
        "pathlib PosixPath",
        "pathlib PurePosixPath",
        "pathlib._local PosixPath",
        "_codecs encode",
        "_io BytesIO",
        "io BytesIO",
        *(f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "slice", "complex")),
        *(f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("list", "dict", "tuple")),
        *(f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("int", "float", "bool", "bytes")),
        "numpy ndarray",
        "numpy dtype",
        *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *(f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")),
    }
)
"""Module and name of what may stand in a checkpoint: harmless whatever its arguments are."""

_ARCHIVE = b"PK\x03\x04"
METADATA_NAME, _COMMON, _FORMAT = ".metadata", "common.pt", "metadata.json"
Openers = Mapping[str, Callable[[], IO[bytes]]]


class _ForbiddenError(Exception):
    """A pickle names a global that is not in the list; the message is that global."""


class _Inert:
    """Stands for every allowed class and function: takes anything, does nothing, keeps the bytes it was given."""

    made: ClassVar[list[_Inert] | None] = None

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        one = super().__new__(cls)
        one.__dict__["bytes"] = [value for value in args if isinstance(value, bytes | bytearray)]
        if cls.made is not None:
            cls.made.append(one)
        return one

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        self.__dict__["bytes"] += [value for value in parts if isinstance(value, bytes | bytearray)]

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As a list has it."""

    def extend(self, values: Any) -> None:
        """As a list has it."""

    def add(self, value: Any) -> None:
        """As a set has it."""


def _encode(text: str, encoding: str) -> bytes:
    """How old pickles write bytes; they are wanted, since somebody may unpickle them in turn."""
    if encoding != "latin1":
        raise _ForbiddenError(f"_codecs.encode into {encoding}")
    return text.encode("latin1")


def _empty(*args: Any) -> bytes:
    """How old pickles write no bytes."""
    if args:
        raise _ForbiddenError("builtins.bytes with arguments")
    return b""


_BYTES: dict[str, Callable[..., bytes]] = {"encode": _encode, "bytes": _empty}


class _Reader(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.streams: list[_Inert] = []

    def find_class(self, module: str, name: str) -> Any:
        if f"{module} {name}" not in ALLOWED:
            raise _ForbiddenError(f"{module}.{name}")
        if name in _BYTES:
            return _BYTES[name]
        return type(name, (_Inert,), {"made": self.streams if name == "BytesIO" else None})

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()


def check_pickles(folder: Path, nemo_file: Path | None = None) -> None:
    """Every file of a distributed checkpoint that a framework would unpickle.

    Args:
        folder: ``model_weights`` or ``optimizer`` of a checkpoint.
        nemo_file: which it was unpacked from, for the message.

    Raises:
        UserError: naming file and global, or a file that is not of Megatron's ``torch_dist`` format.
        DiskError: a file cannot be read.
    """
    shown = f"{nemo_file or folder.parent}: {folder.name}"
    with disk_errors(f"cannot read {folder}"):
        paths = sorted(folder.rglob("*"))
        for path in paths:
            if path.is_symlink() or not path.is_file():
                raise _unknown(shown, path.relative_to(folder).as_posix())
        check_files({path.relative_to(folder).as_posix(): partial(io.FileIO, path) for path in paths}, shown)


def check_files(openers: Openers, shown: str) -> None:
    """The same of files that may lie in a ``.nemo``.

    Args:
        openers: of every file by its name.
        shown: their folder, for the message.
    """
    for name in openers:
        if name not in (METADATA_NAME, _COMMON, _FORMAT) and ("/" in name or not name.endswith(".distcp")):
            raise _unknown(shown, name)
    if METADATA_NAME not in openers:
        raise UserError(f"{shown}: not a torch_dist checkpoint; save with dist_ckpt_format=torch_dist")
    if _FORMAT in openers:
        with openers[_FORMAT]() as file:
            _check_format(file.read(), f"{shown}/{_FORMAT}")
    with openers[METADATA_NAME]() as file:
        metadata = file.read()
    _check_stream(metadata, f"{shown}/{METADATA_NAME}")
    if _COMMON in openers:
        with openers[_COMMON]() as file:
            _check_archive(file, f"{shown}/{_COMMON}")
    _check_shards(metadata, openers, shown)


def _unknown(shown: str, name: str) -> UserError:
    return UserError(f"{shown}/{one_line(name)}: not a file of Megatron's torch_dist format, the only one that is read")


def check_precision(folder: Path, nemo_file: Path) -> None:
    """Weights are copied into the model's type whatever they are: quantised ones would lose their scales without a word.

    Args:
        folder: ``model_weights``, after :func:`check_pickles`.
        nemo_file: which it was unpacked from.

    Raises:
        UserError: naming the first tensor that is no plain floating-point one.
    """
    import torch
    from torch.distributed.checkpoint import FileSystemReader

    for name, entry in sorted(FileSystemReader(folder).read_metadata().state_dict_metadata.items()):
        kind = getattr(getattr(entry, "properties", None), "dtype", None)
        if kind not in (None, torch.float32, torch.bfloat16, torch.float16) and "_extra_state" not in name:
            raise UserError(
                f"{nemo_file}: {one_line(name)} holds {str(kind).removeprefix('torch.')}; training starts from float32, "
                "bfloat16 or float16 weights: convert the Hugging Face folder again, without quantisation"
            )


def check_torch_file(path: Path) -> None:
    """A file of ``torch.save``.

    Raises:
        UserError: naming file and global, or it is none.
        DiskError: it cannot be read.
    """
    with disk_errors(f"cannot read {path}"), path.open("rb") as file:
        _check_archive(file, str(path))


def _check_format(content: bytes, where: str) -> None:
    """The sharded formats other than ``torch_dist`` have codecs of their own, some of which unpickle."""
    try:
        stated = json.loads(content.decode("utf-8"))
        kinds = (stated.get("sharded_backend", "torch_dist"), stated.get("common_backend", "torch"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: not the description of a checkpoint ({one_line(str(error))})") from None
    if kinds != ("torch_dist", "torch"):
        raise UserError(f"{where}: a checkpoint of format {one_line(str(kinds))}; only torch_dist is read")


def _check_shards(metadata: bytes, openers: Openers, shown: str) -> None:
    from torch.distributed.checkpoint.utils import _create_file_view

    try:
        # Only harmless globals are in there, which still may be put together in ways that make no sense.
        places = _places(pickle.loads(metadata), shown)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{shown}/{METADATA_NAME}: not the metadata of a checkpoint ({one_line(repr(error))})") from None
    for name, found in places.items():
        if name not in openers:
            raise UserError(f"{shown}/{name}: missing")
        with openers[name]() as file:
            for info, is_object in found:
                view = _create_file_view(file, info.offset, info.length)
                _check_archive(view, f"{shown}/{name}, byte {info.offset}", deep=is_object)


def _places(metadata: Any, shown: str) -> dict[str, list[tuple[Any, bool]]]:
    """File to the parts in it, each with whether it is an object and no tensor."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    places: dict[str, list[tuple[Any, bool]]] = {}
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".distcp":
            raise UserError(
                f"{shown}/{METADATA_NAME}: {index.fqn} lies in {one_line(repr(name))}, outside of the checkpoint"
            )
        if getattr(info, "transform_descriptors", None):
            raise UserError(
                f"{shown}/{METADATA_NAME}: {index.fqn} is packed by {info.transform_descriptors}, which is not read"
            )
        is_object = not isinstance(metadata.state_dict_metadata[index.fqn], TensorStorageMetadata)
        is_object |= "_extra_state" in index.fqn
        places.setdefault(name, []).append((info, is_object))
    return places


def _check_archive(file: IO[bytes], where: str, deep: bool = False) -> None:
    """What ``torch.save`` writes, read through torch's own reader, so that both see the same entries.

    Args:
        file: at its start.
        where: it lies, for the message.
        deep: its tensors too: Transformer Engine unpickles those of bytes. What is no pickle ends at its first byte.
    """
    import torch

    try:
        # As torch tells archives from its older format, a row of pickles, which may stand in front of an archive.
        if file.read(len(_ARCHIVE)) != _ARCHIVE:
            raise UserError(f"{where}: not a file of torch.save (of torch 1.6 or later)")
        file.seek(0)
        archive = torch._C.PyTorchFileReader(file)
        names = archive.get_all_records()
        if "constants.pkl" in names:
            raise UserError(f"{where}: a TorchScript program, no data")
        _check_stream(archive.get_record("data.pkl"), where)
        for name in names if deep else ():
            if name.startswith("data/"):
                _check_stream(archive.get_record(name), where, is_pickle=False)
    except (UserError, OSError):
        raise
    except Exception as error:  # torch's reader has words of several kinds for a damaged file
        raise UserError(f"{where}: not a file of torch.save ({one_line(str(error))})") from None


def _check_stream(data: bytes, where: str, is_pickle: bool = True) -> None:
    """All pickles in a row: torch's older format has five."""
    stream = io.BytesIO(data)
    while _check_pickle(stream, where, is_pickle):
        is_pickle = False


def _check_pickle(stream: IO[bytes], where: str, is_pickle: bool) -> bool:
    """Whether it was one, which it must be if ``is_pickle``."""
    reader = _Reader(stream)
    try:
        reader.load()
    except _ForbiddenError as error:
        raise UserError(
            f"{where}: names {one_line(str(error))}, which is no data and would be run on loading; refused"
        ) from None
    except Exception as error:
        if is_pickle:
            raise UserError(f"{where}: damaged ({one_line(repr(error))})") from None
        return False
    for held in reader.streams:
        for content in held.__dict__["bytes"]:
            if content:
                _check_content(bytes(content), where)
    return True


def _check_content(data: bytes, where: str) -> None:
    """A stream of bytes inside of an object, which its owner may unpickle."""
    if data.startswith(b"PK"):
        _check_archive(io.BytesIO(data), where, deep=True)
    else:
        _check_stream(data, where, is_pickle=False)
