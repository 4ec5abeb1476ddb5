"""A ``.nemo`` file written front to back, one tensor in memory at a time. No model is built and NeMo is not needed.

What comes out is what NeMo writes itself: ``model_config.yaml`` and a distributed checkpoint of Megatron's ``torch_dist``
format, whose one shard file holds each layer of a stacked tensor as a chunk of its own, in an uncompressed tar.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from converters.mapping import Binding, stacked_dims
from converters.nemo_weights import EXTRA_STATE, PREFIX
from nemo_ampo.checkpoint.nemo_file import MODEL_CONFIG_NAME, WEIGHTS_FOLDER
from nemo_ampo.model_folder.facts import ModelFacts

SHARD_NAME = "__0_0.distcp"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_tar(
    path: Path, config: Mapping[str, Any], tensors: Iterable[tuple[Binding, Tensor]], facts: ModelFacts
) -> dict[str, str]:
    """Write the members that NeMo reads.

    Args:
        path: new file.
        config: for ``model_config.yaml``.
        tensors: each with its place, as they are to be stored; taken one by one.
        facts: of the model.

    Returns:
        SHA-256 of each member by its name.
    """
    import yaml

    with path.open("wb") as file:
        tar = _Tar(file)
        with tar.member(MODEL_CONFIG_NAME) as content:
            content.write(yaml.safe_dump(dict(config), sort_keys=False).encode())
        with tar.member(f"{WEIGHTS_FOLDER}/{SHARD_NAME}") as content:
            metadata = _write_shards(content, tensors, facts)
        for name, data in (
            (".metadata", pickle.dumps(metadata)),
            ("common.pt", _saved({})),
            ("metadata.json", json.dumps(FORMAT).encode()),
        ):
            with tar.member(f"{WEIGHTS_FOLDER}/{name}") as content:
                content.write(data)
        tar.end()
    return tar.hashes


def _write_shards(content: _Content, tensors: Iterable[tuple[Binding, Tensor]], facts: ModelFacts) -> Metadata:
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}

    def write(index: MetadataIndex, value: Any) -> None:
        begin = content.length
        torch.save(value, content)
        places[index] = _StorageInfo(SHARD_NAME, begin, content.length - begin)

    for binding, tensor in tensors:
        whole = torch.Size(stacked_dims(binding.row, facts))
        stacked = tensor.contiguous() if binding.layer is None else tensor[None].contiguous()
        chunk = ChunkStorageMetadata(torch.Size([binding.layer or 0, *[0] * (stacked.dim() - 1)]), stacked.shape)
        key = PREFIX + binding.key
        if key not in described:
            described[key] = TensorStorageMetadata(TensorProperties.create_from_tensor(stacked), whole, [])
        described[key].chunks.append(chunk)
        # A view of a file or of a larger tensor would be saved with all that is behind it.
        write(MetadataIndex(key, chunk.offsets), stacked.clone() if _shares(stacked) else stacked)
        if binding.layer is not None and binding.key.endswith(".weight"):
            # Transformer Engine's layers ask for their FP8 state, which is none.
            state = f"{key.removesuffix('weight')}{EXTRA_STATE}/shard_{binding.layer}_{facts.num_layers}"
            described[state] = BytesStorageMetadata()
            write(MetadataIndex(state), [None])
    return Metadata(described, storage_data=places)


def _shares(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


class _Content:
    """A member as it is written: counted and hashed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.length = 0

    def write(self, data: bytes) -> int:
        """As a file has it."""
        self._file.write(data)
        self._digest.update(data)
        self.length += len(data)
        return len(data)

    def flush(self) -> None:
        """As a file has it."""

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._digest.hexdigest()


class _Tar:
    """A tar whose members' lengths are known once they are written: each header is written last."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hashes: dict[str, str] = {}

    @contextlib.contextmanager
    def member(self, name: str) -> Iterator[_Content]:
        start = self._file.tell()
        self._file.write(bytes(tarfile.BLOCKSIZE))
        content = _Content(self._file)
        yield content
        self._file.write(bytes(-content.length % tarfile.BLOCKSIZE))
        end = self._file.tell()
        header = tarfile.TarInfo(f"./{name}")
        header.size = content.length
        self._file.seek(start)
        self._file.write(header.tobuf(tarfile.GNU_FORMAT))
        self._file.seek(end)
        self.hashes[name] = content.sha256

    def end(self) -> None:
        """Two empty blocks, filled up to a record."""
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
