"""What a rank asks of the others, written down call by call, and the question whether all ranks ask the same. [torch]

Every rank of a group must enter the same collectives in the same order with the same shapes; a rank that does not hangs the
job, or corrupts it. Recorded are the calls of :mod:`torch.distributed` by their public names, so that the same record comes
from a real run.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TENSOR_CALLS = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "_all_gather_base",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "all_to_all",
    "all_to_all_single",
    "barrier",
)
OBJECT_CALLS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")
"""Pickled values: how many bytes they are is no matter of the program."""
SENDS = ("send", "isend")
RECEIPTS = ("recv", "irecv")
_PEERS = ("src", "dst", "group_src", "group_dst")


@dataclass(frozen=True)
class Call:
    """One call of one rank.

    Attributes:
        name: of the function.
        ranks: of the group, ascending.
        tensors: shape, type and device of what goes in and out; empty for objects.
        detail: how it is reduced, from whom or to whom (a rank of the job).
    """

    name: str
    ranks: tuple[int, ...]
    tensors: tuple[str, ...] = ()
    detail: str = ""

    def __str__(self) -> str:
        group = f"ranks {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {', '.join(map(str, self.ranks))}"
        return " ".join((self.name, *self.tensors, *([self.detail] if self.detail else []), "of", group))


class Recorder:
    """The calls of this process, in order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.device: str | None = None
        """Type of the device that tensors of a collective must lie on; None takes any."""

    def take(self) -> list[Call]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def install(self) -> None:
        """Wrap ``torch.distributed``; before Megatron is imported, which keeps some of its functions."""
        import torch.distributed as dist
        from torch.distributed import distributed_c10d

        for name in (*TENSOR_CALLS, *OBJECT_CALLS):
            if hasattr(dist, name):
                setattr(dist, name, self._recording(name, getattr(dist, name)))
        for name in (*SENDS, *RECEIPTS):
            wrapped = self._recording(name, getattr(dist, name))
            setattr(dist, name, wrapped)
            setattr(distributed_c10d, name, wrapped)  # P2POp compares with the function of this module

    def _recording(self, name: str, function: Any) -> Any:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            self.calls.append(self._call(name, given))
            return function(*args, **kwargs)

        return wrapped

    def _call(self, name: str, given: Mapping[str, Any]) -> Call:
        import torch
        import torch.distributed as dist

        group = given.get("group")
        ranks = tuple(sorted(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)))
        detail = []
        for key in _PEERS:
            if (peer := given.get(key)) is not None:
                within = key.startswith("group_") and group is not None
                rank = dist.get_global_rank(group, peer) if within else peer
                detail.append(f"{key.removeprefix('group_')}={rank}")
        if name in OBJECT_CALLS:
            return Call(name, ranks, (), " ".join(detail))
        tensors = [t for value in given.values() for t in _tensors(value)]
        for tensor in tensors:
            if self.device is not None and tensor.device.type != self.device:
                raise ValueError(
                    f"{name} of ranks {ranks}: a tensor {_shown(tensor)} lies on {tensor.device.type}, the group's backend "
                    f"moves tensors of {self.device}"
                )
        if "op" in given and not isinstance(given["op"], torch.Tensor):
            detail.append(_reduction(given["op"]))
        return Call(name, ranks, tuple(map(_shown, tensors)), " ".join(detail))


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _tensors(element)


def _shown(tensor: Any) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _reduction(op: Any) -> str:
    return str(op).rsplit(".", 1)[-1].lower().rstrip("> ")


def first_disagreement(logs: Mapping[int, Sequence[Call]]) -> str | None:
    """The first call that a rank of its group does not match, in words; None when all agree.

    Args:
        logs: of the ranks that were rehearsed. Of a group only those that are among them are compared.
    """
    of_group: dict[tuple[int, ...], dict[int, list[Call]]] = defaultdict(dict)
    between: dict[tuple[int, int], dict[str, list[Call]]] = defaultdict(lambda: {"sent": [], "received": []})
    for rank, calls in logs.items():
        for call in calls:
            if call.name in SENDS + RECEIPTS:
                peer = int(call.detail.split("=")[1])
                pair = (rank, peer) if call.name in SENDS else (peer, rank)
                between[pair]["sent" if call.name in SENDS else "received"].append(call)
            else:
                of_group[call.ranks].setdefault(rank, []).append(call)
    for group, lists in of_group.items():
        members = [rank for rank in group if rank in logs]
        for rank in members[1:]:
            wrong = _difference(members[0], lists.get(members[0], []), rank, lists.get(rank, []))
            if wrong:
                return wrong
    for (sender, receiver), calls_of in between.items():
        if sender in logs and receiver in logs:
            sent, received = (
                [Call("message", call.ranks, call.tensors) for call in calls_of[way]] for way in ("sent", "received")
            )
            wrong = _difference(sender, sent, receiver, received)
            if wrong:
                return f"from rank {sender} to rank {receiver}: {wrong}"
    return None


def _difference(one: int, ours: Sequence[Call], other: int, theirs: Sequence[Call]) -> str | None:
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False), start=1):
        if a != b:
            return f"call {number} of their group: rank {one} enters {a}, rank {other} enters {b}"
    if len(ours) == len(theirs):
        return None
    rank, absent, extra = (one, other, ours[len(theirs)]) if len(ours) > len(theirs) else (other, one, theirs[len(ours)])
    return f"rank {rank} enters {extra}, rank {absent} does not"
