"""Changes to modules, made the moment each has been imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

PLATFORM = {
    "megatron.core.tensor_parallel.random": "megatron.core.tensor_parallel.random._{get,set}_cuda_rng_state",
    "megatron.core.optimizer": "megatron.core.optimizer parameter sorting",
    "megatron.core.dist_checkpointing.strategies.filesystem_async": (
        "dist_checkpointing.strategies.filesystem_async._write_item"
    ),
}
"""Module to the one substitute of :mod:`nemo_ampo.compat.cpu` that it needs here too: for tensors that are really on a
CPU, or for this environment's newer torch. None of them stands for a class that a GPU would run."""


def after_import() -> None:
    """Watch all imports of this process."""
    sys.meta_path.insert(0, _Watcher())


def _changes(name: str) -> Callable[[types.ModuleType], None] | None:
    if name == "torch":
        return _visible_gpu
    if name == "megatron.core.dist_checkpointing.strategies.filesystem_async":
        return _pinned_copies
    return _platform if name in PLATFORM else None


def _visible_gpu(torch: types.ModuleType) -> None:
    from gpu_stand_in import machine

    machine.install()


def _platform(module: types.ModuleType) -> None:
    from nemo_ampo.compat import cpu

    (row,) = [row for row in cpu.FRAMEWORKS.rows if row.upstream == PLATFORM[module.__name__]]
    row.apply()


def _pinned_copies(module: types.ModuleType) -> None:
    from gpu_stand_in import machine

    _platform(module)
    machine.pin_checkpoints(module)


class _Watcher(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = _changes(name)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            _run_after(spec.loader, change)
        return spec


def _run_after(loader: Any, change: Callable[[types.ModuleType], None]) -> None:
    execute = loader.exec_module

    def exec_module(module: types.ModuleType) -> None:
        execute(module)
        change(module)

    loader.exec_module = exec_module
