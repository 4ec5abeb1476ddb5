"""Where a run lives and how it behaves."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_ampo.ranges import LARGEST_SEED, number, seconds


@dataclass
class RunConfig:
    """Where a run lives and how it behaves.

    Attributes:
        dir: run folder; everything the run writes goes below it.
        seed: decides prompts, sampling and shuffling.
        device: auto, cpu or gpu.
        verbose: show the frameworks' own log lines.
        init_from: the ``.nemo`` the stage starts from: the file, or the folder it was unpacked into (``tar -xf``).
        log_rollouts: samples written to ``rollouts.jsonl`` per step; -1 writes all of them.
        allow_changed: keys or sections in which a resumed run may differ from its checkpoint, such as
            ``[algorithm.kl_coef]``; see docs/checkpoints.md.
        wandb: copy the metrics to Weights & Biases; see :mod:`nemo_ampo.run.trackers`.
        mlflow: copy the metrics to MLflow.
        rank_timeout_s: seconds after which a rank that gives no sign of life, because its process is stopped or gone, is
            named and ends the job; computing and writing however long is no silence. 0 leaves it to torch's limits; see
            :mod:`nemo_ampo.run.watchdog`.
    """

    dir: str = MISSING
    seed: int = number(1, least=1, most=LARGEST_SEED)
    device: str = "auto"
    verbose: bool = False
    init_from: str = MISSING
    log_rollouts: int = number(-1, least=-1)
    allow_changed: list[str] = field(default_factory=list)
    wandb: bool = False
    mlflow: bool = False
    rank_timeout_s: float = seconds(300, above=False)
