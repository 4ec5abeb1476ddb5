"""Weights of a NeMo checkpoint, read with torch alone.

Megatron's ``torch_dist`` format is a torch distributed checkpoint whose keys are the model's parameter names
with all layers stacked along a leading axis: ``model.decoder.layers.mlp.linear_fc1.weight`` is ``[num_layers,
2 * ffn, hidden]``. The tensors on disk are global, whatever tensor- and pipeline-parallel sizes wrote them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from converters.mapping import Binding, check_dims, check_names, stacked_dims
from nemo_ampo.checkpoint.nemo_file import WEIGHTS_FOLDER
from nemo_ampo.checkpoint.pickles import check_pickles
from nemo_ampo.model_folder.facts import ModelFacts

PREFIX = "model."
EXTRA_STATE = "_extra_state"
"""Transformer Engine's FP8 state, one object per layer: no weight, empty without FP8."""


class NemoWeights:
    """Tensors of an unpacked ``.nemo`` file, one stacked tensor at a time."""

    def __init__(self, unpacked: Path, nemo_file: Path | None = None) -> None:
        """Read the metadata, after a look at every pickle of the folder.

        Args:
            unpacked: holds ``model_weights/``.
            nemo_file: which it was unpacked from, for the message.

        Raises:
            UserError: the weights are not in ``torch_dist`` format, or one of the pickles is more than data.
        """
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self._folder = unpacked / WEIGHTS_FOLDER
        check_pickles(self._folder, nemo_file)
        stored = FileSystemReader(self._folder).read_metadata().state_dict_metadata
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
        check_names(set(self._tensors) | left_over_objects, expected, str(self._folder))
        for key, dims in expected.items():
            check_dims(key, tuple(self._tensors[key].size), dims)

    def dtype(self) -> torch.dtype:
        """The narrowest type that holds every tensor exactly."""
        kinds = {meta.properties.dtype for meta in self._tensors.values()}
        widest = kinds.pop()
        for kind in kinds:
            widest = torch.promote_types(widest, kind)
        return widest

    def load(self, key: str) -> Tensor:
        """One tensor as stored: ``[num_layers, ...]`` for those of the layers."""
        from torch.distributed.checkpoint import FileSystemReader, load_state_dict

        meta = self._tensors[key]
        tensor = torch.empty(meta.size, dtype=meta.properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to load in a single process"
            warnings.simplefilter("ignore", FutureWarning)  # its successor cannot read alone with the container's torch 2.6
            # Alone: this rank of a job may be the only one that reads.
            load_state_dict({PREFIX + key: tensor}, storage_reader=FileSystemReader(self._folder), no_dist=True)
        return tensor

    def hf_tensors(self, bindings: Iterable[Binding], shape: ModelFacts) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of every Hugging Face weight; holds one stacked tensor in memory at a time."""
        by_key: dict[str, list[Binding]] = {}
        for binding in bindings:
            by_key.setdefault(binding.key, []).append(binding)
        for key, layers in by_key.items():
            stacked = self.load(key)
            for binding in layers:
                tensor = stacked if binding.layer is None else stacked[binding.layer]
                yield from binding.to_hf(tensor, shape).items()
