"""One process that takes itself for a rank of a job of any size, on devices that have no memory. [torch]

A GPU is played by torch's spare device type, under which nothing can be computed, so that a tensor left on the host meets
the same refusal as on a GPU machine. Tensors are fake (:class:`torch._subclasses.fake_tensor.FakeTensorMode`), the process
group is torch's own ``fake`` one: a collective returns at once and changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from nemo_ampo.errors import UserError

GPU = "gpu"
"""Name of the device type that stands for a GPU."""
_ALONE = "alone"
"""Name of the process groups' backend."""


def make_gpu() -> torch.device:
    """The device; once per process.

    Raises:
        UserError: this torch cannot have one.
    """
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    except ImportError:
        raise UserError(
            f"rehearse needs a newer torch than {torch.__version__}: run it where `make setup` was run"
        ) from None
    _setup_privateuseone_for_python_backend(GPU)
    return torch.device(GPU, 0)


def set_rank(rank: int, size: int, per_node: int) -> None:
    """The environment that torchrun would give this rank, and its process group."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank % per_node),
        LOCAL_WORLD_SIZE=str(per_node),
        GROUP_RANK=str(rank // per_node),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
        TORCHELASTIC_RUN_ID="rehearse",
    )
    dist.init_process_group(_ALONE, store=FakeStore(), rank=rank, world_size=size)


def be_alone(device: str) -> None:
    """Groups of any backend are fake, and what others would send as objects is what this rank has itself."""
    import torch.distributed as dist
    from torch.testing._internal.distributed import fake_pg

    # Upstream's "fake" does not know our device.
    dist.Backend.register_backend(_ALONE, fake_pg._create_fake_pg, extended_api=True, devices=sorted({"cpu", device}))
    upstream = dist.new_group

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, **unused: Any) -> Any:
        return upstream(ranks, backend=_ALONE)

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: list[Any] | None = None, dst: Any = None, group: Any = None) -> None:
        if object_gather_list is not None:
            all_gather_object(object_gather_list, obj)

    def broadcast_object_list(object_list: list[Any], src: Any = None, group: Any = None, device: Any = None) -> None:
        """Equal on all ranks."""

    @contextlib.contextmanager
    def one_by_one(*unused: Any, **also: Any) -> Iterator[Any]:
        """The ``fake`` group has no collective of several tensors at once."""
        yield types.SimpleNamespace(wait=lambda: None)

    make = torch.tensor

    def tensor(data: Any, **kwargs: Any) -> torch.Tensor:
        """Upstream reads the memory of tensors among the data."""
        return make(tree_map(lambda value: value.item() if isinstance(value, torch.Tensor) else value, data), **kwargs)

    torch.tensor = tensor
    dist._coalescing_manager = one_by_one  # type: ignore[attr-defined]
    torch.nn.Module._apply = _apply  # type: ignore[method-assign, assignment]
    dist.new_group = new_group
    for replacement in (all_gather_object, gather_object, broadcast_object_list):
        setattr(dist, replacement.__name__, replacement)


def _apply(module: torch.nn.Module, change: Any, recurse: bool = True) -> torch.nn.Module:
    """``torch.nn.Module._apply``, which trades places with fake parameters and cannot once somebody refers to them."""
    if recurse:
        for child in module.children():
            _apply(child, change)
    for parameter in [p for p in module._parameters.values() if p is not None]:
        with torch.no_grad():
            changed = change(parameter)
        if (changed.dtype, changed.device) != (parameter.dtype, parameter.device):
            parameter.data = changed
    module._buffers.update({name: change(buffer) for name, buffer in module._buffers.items() if buffer is not None})
    return module


class Answers(TorchDispatchMode):
    """What a program learns from values that are not there: flags are set, numbers are 1, masks let all through."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and shielding every operation from the compiler takes a third of the time

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        kwargs = kwargs or {}
        if function.overloadpacket in _products():
            _check_types(function, args)
        if function is aten._to_copy.default and torch.device(kwargs.get("device") or args[0].device).type == GPU:
            copy = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=GPU)
            copy.known = _known(args[0])  # type: ignore[attr-defined]
            return copy
        if function is aten._local_scalar_dense.default:
            if (known := _known(args[0])) is not None:
                return known
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if function is aten.equal.default:
            return True
        if function is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        if function is aten.masked_select.default:
            return args[0].new_empty(args[0].numel())
        if function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], _without_masks(args[1]), *args[2:])
        return function(*args, **kwargs)


@functools.cache
def _products() -> frozenset[Any]:
    """Operations that take factors of one type only."""
    aten = torch.ops.aten
    names = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution")
    attention = [n for n in dir(aten) if n.startswith("_scaled_dot_product") and not n.endswith("_backward")]
    return frozenset(getattr(aten, name) for name in (*names, *attention))


def _check_types(function: Any, args: Any) -> None:
    """What a device refuses, and fake tensors let pass.

    Raises:
        TypeError: factors of several types.
    """
    types = {str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()}
    if len(types) > 1:
        raise TypeError(f"{function.overloadpacket}: {' and '.join(sorted(types, reverse=True))} in one product")


def _known(tensor: torch.Tensor) -> Any:
    """The number in it, where the program wrote it there itself; None otherwise."""
    constant = getattr(tensor, "constant", None)
    return getattr(tensor, "known", None) if constant is None else constant.item()


def _without_masks(indices: Any) -> list[Any]:
    found: list[Any] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found += [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]
        else:
            found.append(index)
    return found


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Tensors made meanwhile have shape, type and device, but no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=GPU) asks the device itself otherwise
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Answers():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
