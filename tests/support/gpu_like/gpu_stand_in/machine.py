"""torch as on a GPU node, with every tensor on the CPU.

What a CPU hides and this shows:

- ``torch.cuda.is_available()`` is true, whether or not anybody asked for a GPU;
- memory that was only allocated holds NaN;
- a copy from device to host with ``non_blocking=True`` delivers at the next ``torch.cuda.synchronize()``, not before;
- a "device" tensor exists once somebody has asked for one: Transformer Engine's stand-in refuses to compute before that.
"""

from __future__ import annotations

import os
import types
import weakref
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")
_pending: list[tuple[torch.Tensor, torch.Tensor]] = []
_pinned: dict[int, Any] = {}
_used = False


def is_used() -> bool:
    """Whether anything in this process was put on a GPU."""
    return _used


def install() -> None:
    """Make this process see GPUs."""
    from nemo_ampo.compat import cpu

    for row in cpu.TORCH.rows:
        if row.upstream not in ("torch.cuda.current_device", "torch.Tensor.cuda"):
            row.apply()
    _cuda_functions()
    _nccl_over_gloo()
    _Device().__enter__()


def synchronize(device: object = None) -> None:
    """Deliver the copies under way."""
    global _pending
    arrived, _pending = _pending, []
    with torch.no_grad():
        for target, value in arrived:
            target.data.copy_(value)


def deliver_later(value: torch.Tensor) -> torch.Tensor:
    """A host tensor that holds ``value`` from the next :func:`synchronize` on."""
    target = torch.zeros_like(value, requires_grad=False)
    target.fill_(torch.nan if value.is_floating_point() else -1)
    _pending.append((target, value.detach().clone()))
    return target


def pin_checkpoints(module: types.ModuleType) -> None:
    """Megatron's checkpoint writer copies what lies on a device to pinned memory, and only that: here, all of it."""
    writer: Any = module.FileSystemWriterAsync  # type: ignore[attr-defined]
    upstream = writer.prepare_write_data

    def prepare_write_data(self: Any, plan: Any, planner: Any) -> None:
        upstream(self, plan, planner)
        if _used:
            self.write_buckets = [(*rest, _on_the_way(data)) for *rest, data in self.write_buckets]

    def _on_the_way(data: Any) -> Any:
        values, tensors = data
        return values, [(item, deliver_later(tensor)) for item, tensor in tensors]

    writer.prepare_write_data = prepare_write_data


class _Memory:
    """Bytes of the tensors that were asked for on a device by name and are still held, and the most since a reset."""

    held = peak = 0

    def reset(self) -> None:
        self.peak = self.held

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        self._count(size)
        weakref.finalize(tensor, self._count, -size).atexit = False
        return tensor

    def _count(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)


_memory = _Memory()


# --- torch.cuda -------------------------------------------------------------------------------------------------------


def _cuda_functions() -> None:
    gpus = int(os.environ.get("GPU_LIKE_GPUS", "8"))
    properties = types.SimpleNamespace(
        name="a CPU that plays a GPU", total_memory=80 * 1024**3, major=9, minor=0, multi_processor_count=132
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": gpus,
        "is_initialized": True,
        "is_bf16_supported": True,
        "get_device_capability": (9, 0),
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "mem_get_info": (70 * 1024**3, 80 * 1024**3),
        "is_current_stream_capturing": False,
        **dict.fromkeys(("init", "_lazy_init", "set_device", "empty_cache", "ipc_collect"), None),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    torch.cuda.current_device = lambda: int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.synchronize = synchronize
    torch.cuda.memory_allocated = torch.cuda.memory_reserved = lambda device=None: _memory.held
    torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda device=None: _memory.peak
    torch.cuda.reset_peak_memory_stats = lambda device=None: _memory.reset()


def _nccl_over_gloo() -> None:
    dist = torch.distributed
    for name in ("init_process_group", "new_group"):
        upstream = getattr(dist, name)

        def over_gloo(*args: Any, _upstream: Any = upstream, **kwargs: Any) -> Any:
            args = tuple("gloo" if arg == "nccl" else arg for arg in args)
            if kwargs.get("backend") == "nccl":
                kwargs["backend"] = "gloo"
            kwargs.pop("device_id", None)
            kwargs.pop("pg_options", None)
            return _upstream(*args, **kwargs)

        setattr(dist, name, over_gloo)


# --- tensors ----------------------------------------------------------------------------------------------------------


def _is_gpu(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _is_cpu(device: object) -> bool:
    return (device.type if isinstance(device, torch.device) else device) == "cpu"


class _Device(TorchFunctionMode):
    """Every call of torch, with ``cuda`` read as the CPU."""

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        global _used
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name == "cuda" and args and isinstance(args[0], torch.Tensor):
            _used = True
            # What lies on the device already is given back as it is, a host tensor is copied.
            return args[0] if isinstance(args[0], torch.nn.Parameter) else _memory.take(args[0].clone())
        targets = [a for a in args[1:] if isinstance(a, str | torch.device)] + [kwargs.get("device")]
        to_host = name == "to" and any(map(_is_cpu, targets))
        if name == "to" and any(map(_is_gpu, args[1:2])):
            _used = True
            args = (args[0], torch.device("cpu"), *args[2:])
        on_device = _is_gpu(kwargs.get("device"))
        if on_device:
            _used = True
            kwargs["device"] = torch.device("cpu")
        pinned = kwargs.pop("pin_memory", False)
        if to_host and kwargs.get("non_blocking") and _used:
            return deliver_later(args[0])
        if name == "copy_" and kwargs.get("non_blocking") and args[0].untyped_storage().data_ptr() in _pinned:
            args[0].fill_(torch.nan if args[0].is_floating_point() else -1)
            _pending.append((args[0], args[1].detach().clone()))
            return args[0]
        result = function(*args, **kwargs)
        if on_device and isinstance(result, torch.Tensor):
            _memory.take(result)
        if pinned:
            _pinned[result.untyped_storage().data_ptr()] = True
        if name in _EMPTY and isinstance(result, torch.Tensor) and result.is_floating_point() and not result.is_meta:
            with torch.no_grad():
                result.fill_(torch.nan)
        return result
