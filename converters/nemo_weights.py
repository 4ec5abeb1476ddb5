"""Weights of a NeMo checkpoint, read with torch alone.

Megatron's ``torch_dist`` format is a torch distributed checkpoint whose keys are the model's parameter names
with all layers stacked along a leading axis: ``model.decoder.layers.mlp.linear_fc1.weight`` is ``[num_layers,
2 * ffn, hidden]``. The tensors on disk are global, whatever tensor- and pipeline-parallel sizes wrote them.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from converters.mapping import Binding, check_dims, check_names, stacked_dims
from nemo_ampo.checkpoint.nemo_file import WEIGHTS_FOLDER, CheckpointFiles, open_checkpoint
from nemo_ampo.checkpoint.pickles import METADATA_NAME, check_files
from nemo_ampo.errors import UserError
from nemo_ampo.files import disk_errors
from nemo_ampo.model_folder.facts import ModelFacts

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

PREFIX = "model."
EXTRA_STATE = "_extra_state"
"""Transformer Engine's FP8 state, one object per layer: no weight, empty without FP8."""


@contextlib.contextmanager
def open_weights(checkpoint: Path) -> Iterator[NemoWeights]:
    """Weights of a ``.nemo`` file, read where they are, or of the folder that one was unpacked into.

    Raises:
        UserError: there are none, they are damaged or not in ``torch_dist`` format, or a pickle is more than data.
    """
    with open_checkpoint(checkpoint) as files:
        with disk_errors(f"cannot read {checkpoint}"):
            weights = NemoWeights(files)
        yield weights


class NemoWeights:
    """Tensors of a checkpoint, one layer's at a time."""

    def __init__(self, files: CheckpointFiles) -> None:
        """Read the metadata, after a look at every hash and every pickle."""
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        files.check_weights()
        self._where = f"{files.path}: {WEIGHTS_FOLDER}"
        self._open = {
            path.relative_to(WEIGHTS_FOLDER).as_posix(): files.openers[path] for path in files.below(WEIGHTS_FOLDER)
        }
        check_files(self._open, self._where)
        with self._open[METADATA_NAME]() as file:
            metadata = pickle.load(file)
        stored, self._places = metadata.state_dict_metadata, metadata.storage_data
        self._tensors = {
            key.removeprefix(PREFIX): meta for key, meta in stored.items() if isinstance(meta, TensorStorageMetadata)
        }
        self._objects = {key for key in stored if key.removeprefix(PREFIX) not in self._tensors}

    def check(self, bindings: Iterable[Binding], shape: ModelFacts) -> None:
        """Every stored weight is mapped, every mapped weight is stored, and in the right shape.

        Raises:
            UserError: naming the tensors.
        """
        expected = {binding.key: stacked_dims(binding.row, shape) for binding in bindings}
        left_over_objects = {key for key in self._objects if EXTRA_STATE not in key}
        check_names(set(self._tensors) | left_over_objects, expected, self._where)
        for key, dims in expected.items():
            check_dims(key, tuple(self._tensors[key].size), dims)

    def dtype(self) -> torch.dtype:
        """The narrowest type that holds every tensor exactly."""
        kinds = {meta.properties.dtype for meta in self._tensors.values()}
        widest = kinds.pop()
        for kind in kinds:
            widest = torch.promote_types(widest, kind)
        return widest

    def load(self, key: str, layer: int | None = None) -> Tensor:
        """One tensor, put together from the chunks that the ranks wrote; of a stacked one a layer."""
        meta = self._tensors[key]
        low = [0] * len(meta.size) if layer is None else [layer, *[0] * (len(meta.size) - 1)]
        size = list(meta.size) if layer is None else [1, *meta.size[1:]]
        tensor = torch.empty(size, dtype=meta.properties.dtype)
        filled = 0
        for chunk in meta.chunks:
            inside, taken = [], []
            for begin, length, at, extent in zip(low, size, chunk.offsets, chunk.sizes, strict=True):
                first, last = max(begin, at), min(begin + length, at + extent)
                inside.append(slice(first - begin, last - begin))
                taken.append(slice(first - at, last - at))
            if all(part.start < part.stop for part in inside):
                tensor[tuple(inside)] = self._chunk(PREFIX + key, chunk)[tuple(taken)]
                filled += math.prod(part.stop - part.start for part in inside)
        if filled != tensor.numel():
            raise UserError(f"{self._where}: {key}: its chunks hold {filled} of {tensor.numel()} numbers")
        return tensor if layer is None else tensor[0]

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        place = self._places[MetadataIndex(key, chunk.offsets)]
        with disk_errors(f"cannot read {self._where}"), self._open[place.relative_path]() as file:
            # A file's whole content is given, of which this is a part: torch looks for an archive's end at the end.
            file.seek(place.offset)
            tensor: Tensor = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        if tensor.shape != chunk.sizes:
            raise UserError(f"{self._where}: {key}: a chunk of {list(tensor.shape)} numbers, not {list(chunk.sizes)}")
        return tensor

    def hf_tensors(self, bindings: Iterable[Binding], shape: ModelFacts) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of every Hugging Face weight; holds one layer's in memory at a time."""
        for binding in bindings:
            yield from binding.to_hf(self.load(binding.key, binding.layer), shape).items()
