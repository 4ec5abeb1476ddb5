"""Devices without memory refuse what GPUs refuse. In forks: a process takes itself for a rank once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.utils.backend_registration

from nemo_ampo.errors import UserError
from recipes.rehearse import in_a_fork

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} has no spare device in Python; `rehearse` refuses it too",
)


def as_rank(program: Callable[[], object]) -> object:
    """Its result, as rank 1 of 4 on a GPU."""
    from nemo_ampo.rehearse.collectives import Recorder
    from nemo_ampo.rehearse.world import GPU, be_alone, make_gpu, set_rank, without_values

    def run() -> object:
        make_gpu()
        be_alone(GPU)
        recorder = Recorder()
        recorder.install()
        recorder.device = GPU
        with without_values():
            set_rank(1, 4, 4)
            return program()

    return in_a_fork("rank 1", run)


def test_what_a_gpu_computes_has_the_shape_and_type_it_would_have() -> None:
    def program() -> object:
        import torch
        import torch.distributed as dist

        a = torch.ones(3, 4, device="gpu", dtype=torch.bfloat16)
        product = a @ torch.ones(4, 5).to("gpu", torch.bfloat16)
        everyone = torch.empty(4 * 3, 5, device="gpu", dtype=torch.bfloat16)
        dist.all_gather_into_tensor(everyone, product)
        return tuple(everyone.shape), str(product.dtype), product.device.type, dist.get_rank(), dist.get_world_size()

    assert as_rank(program) == ((12, 5), "torch.bfloat16", "gpu", 1, 4)


def mixed_devices() -> None:
    import torch

    torch.ones(2, device="gpu") + torch.ones(2)


def wrong_shapes() -> None:
    import torch

    torch.ones(2, 3, device="gpu") @ torch.ones(2, 3, device="gpu")


def wrong_types() -> None:
    import torch

    torch.nn.functional.linear(torch.ones(2, 2, device="gpu"), torch.ones(2, 2, device="gpu", dtype=torch.bfloat16))


def host_tensor() -> None:
    import torch
    import torch.distributed

    torch.distributed.all_reduce(torch.ones(2))


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (mixed_devices, "device"),
        (wrong_shapes, "must have same reduction dim"),
        (wrong_types, "float32 and bfloat16 in one product"),
        (host_tensor, r"a tensor \[2\] float32 lies on cpu, the group's backend moves tensors of gpu"),
    ],
)
def test_what_a_gpu_refuses_is_refused_with_the_line(program: Callable[[], None], told: str) -> None:
    with pytest.raises(UserError, match=rf"rank 1: .*({told}).*\(test_world\.py, line \d+: "):
        as_rank(program)
