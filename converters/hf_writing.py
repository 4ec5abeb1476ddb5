"""Safetensors files and their index as ``save_pretrained`` names them, written tensor by tensor.

The safetensors package writes a file from tensors that are all in memory; here the header, which the shapes alone decide,
comes first and each tensor goes to its place when it is there.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from converters.mapping import Dims
from nemo_ampo.errors import UserError
from nemo_ampo.files import disk_errors
from nemo_ampo.model_folder.weights import INDEX_NAME

MAX_SHARD_SIZE = "5GB"
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def save_shards(tensors: Iterable[tuple[str, Tensor]], dims: Mapping[str, Dims], dtype: torch.dtype, folder: Path) -> None:
    """Write a model's weights into ``folder``, one tensor in memory at a time.

    Args:
        tensors: name and tensor of each, of any floating-point type.
        dims: shape of each by its name.
        dtype: they are stored in.
        folder: exists.

    Raises:
        UserError: a tensor is missing, comes twice, or has another shape.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        {name: _bytes(shape, dtype) for name, shape in dims.items()},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_SIZE,
    )
    left = set(dims)
    with disk_errors(f"cannot write {folder}"), contextlib.ExitStack() as stack:
        places: dict[str, tuple[IO[bytes], int]] = {}
        for file_name, names in split.filename_to_tensors.items():
            opened = stack.enter_context((folder / file_name).open("wb"))
            places |= {name: (opened, offset) for name, offset in _begin(opened, sorted(names), dims, dtype).items()}
        for name, tensor in tensors:
            if name not in left or tuple(tensor.shape) != dims[name]:
                raise UserError(f"{name}: shape {list(tensor.shape)}, expected once and as {list(dims.get(name, ()))}")
            left.remove(name)
            file, offset = places[name]
            file.seek(offset)
            file.write(tensor.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if left:
        raise UserError(f"{sorted(left)[0]}: not among the tensors to be written")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _bytes(shape: Dims, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _begin(file: IO[bytes], names: Sequence[str], dims: Mapping[str, Dims], dtype: torch.dtype) -> dict[str, int]:
    """Write the header; the offset in the file at which each tensor begins."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name in names:
        begins[name], end = end, end + _bytes(dims[name], dtype)
        header[name] = {"dtype": _TYPES[dtype], "shape": list(dims[name]), "data_offsets": [begins[name], end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    file.write(len(content).to_bytes(8, "little") + content)
    return {name: 8 + len(content) + begin for name, begin in begins.items()}
