"""Memory of one device, storage by storage: what lives, for what, and what lived when it was fullest."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "engine", "other")
"""What memory is for. ``other``: communication buffers, rotary tables, masks."""


class MemoryLedger(TorchDispatchMode):
    """Counts storages of tensors that an operation returned, until they are freed.

    A storage belongs to the part that is current when it is made (:meth:`part`) or to the one it is given to later
    (:meth:`assign`). An allocator's rounding and fragmentation are not in it.

    Args:
        device: type of the device that is counted, ``cpu`` for all of it.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.current = "other"
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._total = 0
        self._peak_total = 0
        self._held: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and shielding every operation from the compiler takes a third of the time

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                self._see(tensor.untyped_storage(), self.current)
        return result

    def _see(self, storage: Any, part: str) -> None:
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes()

        def freed(_: object) -> None:
            _, had, of = self._held.pop(key)
            self.live[of] -= had
            self._total -= had

        self._held[key] = (weakref.ref(storage, freed), size, part)
        self.live[part] += size
        self._total += size
        if self._total > self._peak_total:
            self._peak_total = self._total
            self.peak = self.live.copy()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made meanwhile is for this."""
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def assign(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """What these hold is for this, whenever it was made."""
        for tensor in tensors:
            if tensor.device.type != self.device:
                continue
            storage = tensor.untyped_storage()
            self._see(storage, part)
            reference, size, was = self._held[storage._cdata]
            self._held[storage._cdata] = (reference, size, part)
            self.live[was] -= size
            self.live[part] += size

    def take_peak(self) -> dict[str, int]:
        """Bytes by part at the fullest moment since the last call."""
        peak = {name: self.peak[name] for name in PARTS}
        self.peak, self._peak_total = self.live.copy(), self._total
        return peak
