"""Declarative weight mapping: each row of a table knows how to go to NeMo and how to come back.

A family's table is a tuple of rows; ``{i}`` in a name stands for the layer. :func:`bind` spells the table out
for one model, and the checks make sure that every tensor on either side is named by exactly one row: a
left-over or a missing weight stops the conversion. NeMo names are those of a Transformer Engine checkpoint,
which Megatron's local layers write too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from converters import qkv
from nemo_ampo.errors import UserError
from nemo_ampo.model_folder.facts import ModelFacts

Dims = tuple[int, ...]


class Row(Protocol):
    """One line of a mapping table."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Hugging Face names, ``{i}`` for the layer."""

    @property
    def nemo(self) -> str:
        """NeMo name, ``{i}`` for the layer."""

    def applies(self, shape: ModelFacts) -> bool:
        """False for rows that a model of this shape does not have (an untied head)."""

    def hf_dims(self, shape: ModelFacts) -> tuple[Dims, ...]:
        """Expected shape of each Hugging Face tensor."""

    def nemo_dims(self, shape: ModelFacts) -> Dims:
        """Expected shape of the NeMo tensor."""

    def to_nemo(self, tensors: Sequence[Tensor], shape: ModelFacts) -> Tensor:
        """Hugging Face tensors, in the order of ``hf_names``, to the NeMo tensor."""

    def to_hf(self, tensor: Tensor, shape: ModelFacts) -> tuple[Tensor, ...]:
        """The NeMo tensor to Hugging Face tensors, in the order of ``hf_names``."""


@dataclass(frozen=True)
class Rename:
    """Same tensor, other name. ``dims`` are attribute names of :class:`~nemo_ampo.model_folder.facts.ModelFacts`."""

    hf: str
    nemo: str
    dims: tuple[str, ...]

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The one Hugging Face name."""
        return (self.hf,)

    def applies(self, shape: ModelFacts) -> bool:
        """Always."""
        return True

    def hf_dims(self, shape: ModelFacts) -> tuple[Dims, ...]:
        """``dims`` looked up in ``shape``."""
        return (self.nemo_dims(shape),)

    def nemo_dims(self, shape: ModelFacts) -> Dims:
        """``dims`` looked up in ``shape``."""
        return tuple(getattr(shape, name) for name in self.dims)

    def to_nemo(self, tensors: Sequence[Tensor], shape: ModelFacts) -> Tensor:
        """Unchanged."""
        return tensors[0]

    def to_hf(self, tensor: Tensor, shape: ModelFacts) -> tuple[Tensor, ...]:
        """Unchanged."""
        return (tensor,)


@dataclass(frozen=True)
class PadVocab:
    """``[vocab, hidden]`` to ``[padded_vocab, hidden]`` with zero rows, cut again on the way back."""

    hf: str
    nemo: str
    only_untied: bool = False

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The one Hugging Face name."""
        return (self.hf,)

    def applies(self, shape: ModelFacts) -> bool:
        """The output head exists only in untied models."""
        return not (self.only_untied and shape.tied)

    def hf_dims(self, shape: ModelFacts) -> tuple[Dims, ...]:
        """``[vocab, hidden]``."""
        return ((shape.vocab, shape.hidden),)

    def nemo_dims(self, shape: ModelFacts) -> Dims:
        """``[padded_vocab, hidden]``."""
        return (shape.padded_vocab, shape.hidden)

    def to_nemo(self, tensors: Sequence[Tensor], shape: ModelFacts) -> Tensor:
        """Append zero rows."""
        return qkv.pad_rows(tensors[0], shape.padded_vocab)

    def to_hf(self, tensor: Tensor, shape: ModelFacts) -> tuple[Tensor, ...]:
        """Cut the padding."""
        return (tensor[: shape.vocab],)


@dataclass(frozen=True)
class InterleaveQkv:
    """Query, key and value projections, weights or biases, joined by query group."""

    q: str
    k: str
    v: str
    nemo: str
    bias: bool = False

    @property
    def hf_names(self) -> tuple[str, ...]:
        """q, k, v."""
        return (self.q, self.k, self.v)

    def applies(self, shape: ModelFacts) -> bool:
        """Always."""
        return True

    def _rest(self, shape: ModelFacts) -> Dims:
        return () if self.bias else (shape.hidden,)

    def hf_dims(self, shape: ModelFacts) -> tuple[Dims, ...]:
        """``[q_width, *rest]``, then ``[kv_width, *rest]`` twice."""
        rest = self._rest(shape)
        return ((shape.q_width, *rest), (shape.kv_width, *rest), (shape.kv_width, *rest))

    def nemo_dims(self, shape: ModelFacts) -> Dims:
        """``[q_width + 2 * kv_width, *rest]``."""
        return (shape.q_width + 2 * shape.kv_width, *self._rest(shape))

    def to_nemo(self, tensors: Sequence[Tensor], shape: ModelFacts) -> Tensor:
        """See :func:`converters.qkv.interleave_qkv`."""
        q, k, v = tensors
        return qkv.interleave_qkv(q, k, v, shape.num_groups)

    def to_hf(self, tensor: Tensor, shape: ModelFacts) -> tuple[Tensor, ...]:
        """See :func:`converters.qkv.split_qkv`."""
        return qkv.split_qkv(tensor, shape.num_heads, shape.num_groups, shape.head_dim)


@dataclass(frozen=True)
class JoinGateUp:
    """Gate and up projections of the gated MLP in one matrix."""

    gate: str
    up: str
    nemo: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        """gate, up."""
        return (self.gate, self.up)

    def applies(self, shape: ModelFacts) -> bool:
        """Always."""
        return True

    def hf_dims(self, shape: ModelFacts) -> tuple[Dims, ...]:
        """``[ffn, hidden]`` twice."""
        return ((shape.ffn, shape.hidden), (shape.ffn, shape.hidden))

    def nemo_dims(self, shape: ModelFacts) -> Dims:
        """``[2 * ffn, hidden]``."""
        return (2 * shape.ffn, shape.hidden)

    def to_nemo(self, tensors: Sequence[Tensor], shape: ModelFacts) -> Tensor:
        """Gate rows first."""
        gate, up = tensors
        return qkv.join_gate_up(gate, up)

    def to_hf(self, tensor: Tensor, shape: ModelFacts) -> tuple[Tensor, ...]:
        """Split in the middle."""
        return qkv.split_gate_up(tensor)


@dataclass(frozen=True)
class Family:
    """What is particular to one ``model_type`` of config.json.

    Attributes:
        name: the ``model_type``.
        rows: its mapping table.
    """

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Binding:
    """One row of a table for one layer of one model."""

    row: Row
    layer: int | None

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Hugging Face names with the layer filled in."""
        return tuple(name.replace("{i}", str(self.layer)) for name in self.row.hf_names)

    @property
    def key(self) -> str:
        """Key in a NeMo checkpoint, where all layers are stacked along a leading axis."""
        return checkpoint_key(self.row.nemo)

    def to_nemo(self, load: Callable[[str], Tensor], shape: ModelFacts) -> Tensor:
        """Load and check the Hugging Face tensors and join them.

        Raises:
            UserError: naming the tensor whose shape is not the config's.
        """
        tensors = []
        for name, dims in zip(self.hf_names, self.row.hf_dims(shape), strict=True):
            tensor = load(name)
            check_dims(name, tuple(tensor.shape), dims)
            tensors.append(tensor)
        return self.row.to_nemo(tensors, shape)

    def to_hf(self, tensor: Tensor, shape: ModelFacts) -> dict[str, Tensor]:
        """Name to tensor, the reverse of :meth:`to_nemo`."""
        return dict(zip(self.hf_names, self.row.to_hf(tensor, shape), strict=True))


def hf_dims(bindings: Iterable[Binding], shape: ModelFacts) -> dict[str, Dims]:
    """Shape of every Hugging Face tensor by its name."""
    return {name: dims for b in bindings for name, dims in zip(b.hf_names, b.row.hf_dims(shape), strict=True)}


def checkpoint_key(nemo_name: str) -> str:
    """``decoder.layers.{i}.mlp...`` to ``decoder.layers.mlp...``."""
    return nemo_name.replace("{i}.", "")


def bind(rows: Iterable[Row], shape: ModelFacts) -> list[Binding]:
    """Spell a table out for a model: rows with ``{i}`` once per layer."""
    bindings = []
    for row in rows:
        if row.applies(shape):
            layers: Iterable[int | None] = range(shape.num_layers) if "{i}" in row.nemo else (None,)
            bindings += [Binding(row, layer) for layer in layers]
    return bindings


def stacked_dims(row: Row, shape: ModelFacts) -> Dims:
    """Shape of a row's tensor in a NeMo checkpoint: ``[num_layers, ...]`` for rows that exist per layer."""
    dims = row.nemo_dims(shape)
    return (shape.num_layers, *dims) if "{i}" in row.nemo else dims


def check_dims(name: str, found: Dims, expected: Dims) -> None:
    """Compare a tensor's shape with the config's.

    Raises:
        UserError: naming the tensor and both shapes.
    """
    if found != expected:
        raise UserError(f"{name}: shape {list(found)} but config.json asks for {list(expected)}")


def check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Every tensor is mapped and every mapped tensor is there.

    Raises:
        UserError: naming the missing and the left-over tensors.
    """
    found, expected = set(found), set(expected)
    problems = []
    for label, names in (("missing", expected - found), ("left over", found - expected)):
        if names:
            shown = sorted(names)
            more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
            problems.append(f"{label}: {', '.join(shown[:8])}{more}")
    if problems:
        raise UserError(f"{where}: weights do not match the mapping table; {'; '.join(problems)}")
