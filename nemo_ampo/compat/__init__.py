"""Where this project meets the frameworks' rough edges: version check, CPU platform, quiet logs.

Every program calls :func:`setup` once, before it imports NeMo. It checks versions, quietens logs and mends what is wrong
everywhere (:mod:`nemo_ampo.compat.common`); on a CPU it also installs the substitutes of :mod:`nemo_ampo.compat.cpu`, so
that the same recipes run over gloo.
"""

from __future__ import annotations

import os
import sys
from typing import Literal

from nemo_ampo.errors import ConfigError

Device = Literal["cpu", "gpu"]

_installed_for: Device | None = None


def resolve_device(device: str) -> Device:
    """``auto`` becomes ``gpu`` when torch sees one, else ``cpu``.

    Raises:
        ConfigError: for any other word, or ``gpu`` where there is none.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "auto":
        return "gpu" if has_gpu else "cpu"
    if device == "gpu" and not has_gpu:
        raise ConfigError("device: gpu was asked for, but torch sees no GPU; set device=cpu or device=auto")
    if device not in ("cpu", "gpu"):
        raise ConfigError(f"device: expected auto, cpu or gpu, got {device!r}")
    return "gpu" if device == "gpu" else "cpu"


def setup(device: str = "auto", verbose: bool = False) -> Device:
    """Make NeMo, Megatron-core and NeMo-Aligner importable and quiet on this machine.

    Call it once per process, before the first import of ``nemo``, ``megatron`` or ``nemo_aligner``. A second call with
    the same device does nothing.

    Args:
        device: ``auto``, ``cpu`` or ``gpu``.
        verbose: show the frameworks' own log lines and warnings.

    Returns:
        The device the recipes run on.

    Raises:
        ConfigError: wrong device word, NeMo already imported, or a framework version this project was not built for.
    """
    global _installed_for
    from nemo_ampo.compat import common, quiet, versions

    if device != "cpu":
        # Megatron counts on it with sequence and tensor parallelism: one queue, so that communication starts before the
        # products that hide it. Read when CUDA wakes up, which the next line may bring about.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    chosen = resolve_device(device)
    if _installed_for is not None:
        if _installed_for != chosen:
            raise ConfigError(f"device: this process is already set up for {_installed_for}, not {chosen}")
        return chosen
    if "nemo" in sys.modules or "nemo_aligner" in sys.modules:
        raise ConfigError("compat.setup() must run before nemo or nemo_aligner is imported")
    versions.check(chosen)
    if not verbose:
        quiet.before_imports()
    common.before_imports()
    if chosen == "cpu":
        # Spinning OpenMP threads collapse throughput when ranks share cores; must be set before the first parallel region.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from nemo_ampo.compat import cpu

        cpu.install()
    from nemo_ampo.compat import tokenizer

    tokenizer.install()
    common.after_imports()
    if not verbose:
        quiet.after_imports()
    _installed_for = chosen
    return chosen
