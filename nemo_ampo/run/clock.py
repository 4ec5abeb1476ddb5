"""What each phase of a step takes: seconds, and on a GPU its memory and how well the card is used.

Legend: N parameters of the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from nemo_ampo.ranks import Ranks

GB = 1e9
FLOPS_PER_PARAMETER = 6
"""Of one trained token, forward and backward; attention scores and recomputation are not counted."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a job.

    Attributes:
        count: one per rank.
        parameters: N.
        flops: dense bf16 FLOP/s of one, by its data sheet; None for a card that is not known.
    """

    count: int
    parameters: int
    flops: float | None


class Clock:
    """``with clock("rollout"): ...`` measures a phase.

    Args:
        gpus: of the job; None on a CPU, where only time is measured.
    """

    def __init__(self, gpus: Gpus | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._gpus = gpus
        self._begin = time.monotonic()
        self._peak_bytes: dict[str, int] = {}
        if gpus is not None:
            import torch

            self._cuda = torch.cuda

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measure the body of the ``with`` block under this name."""
        if self._gpus is not None:
            self._cuda.reset_peak_memory_stats()
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = time.monotonic() - start
            if self._gpus is not None:
                self._peak_bytes[phase] = self._cuda.max_memory_allocated()

    def time_metrics(self, generated_tokens: int) -> dict[str, float]:
        """``time/<phase>_s``, ``time/step_s`` and generated tokens per second of the whole job."""
        return {f"time/{name}_s": value for name, value in self.seconds.items()} | {
            "time/step_s": time.monotonic() - self._begin,
            "throughput/rollout_tokens_per_s": generated_tokens / max(self.seconds["rollout"], 1e-9),
        }

    def gpu_metrics(self, trained_lengths: Sequence[int], ranks: Ranks) -> dict[str, float]:
        """``memory/<phase>_gb`` of the fullest GPU, tokens per second and GPU, MFU of the update; nothing on a CPU.

        Args:
            trained_lengths: tokens of each row of this replica that was trained on, without padding.
            ranks: of the job; all call this together.
        """
        if self._gpus is None:
            return {}
        highest = ranks.highest(list(self._peak_bytes.values()))
        out = {f"memory/{name}_gb": value / GB for name, value in zip(self._peak_bytes, highest, strict=True)}
        tokens = sum(ranks.gather(list(trained_lengths)))
        if "update" in self.seconds and tokens:
            seconds = time.monotonic() - self._begin
            out["throughput/tokens_per_s_per_gpu"] = tokens / seconds / self._gpus.count
            if self._gpus.flops is not None:
                per_gpu = FLOPS_PER_PARAMETER * self._gpus.parameters * tokens / self.seconds["update"] / self._gpus.count
                out["throughput/update_mfu"] = per_gpu / self._gpus.flops
        return out
