"""Carry a stage out without its machine: ``nemo-ampo rehearse ampo --config-name qwen2.5_7b --nodes 1 --gpus 8``.

The frameworks are imported once; each rank is then a fork of this process, one after the other, so that one core and the
memory of one rank are enough.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig

from converters.model_config import nemo_config
from nemo_ampo.errors import ConfigError, UserError
from nemo_ampo.job.plan import compose_for_plan, model_of
from nemo_ampo.model_folder.facts import ModelFacts
from nemo_ampo.rehearse.report import RankReport, RehearsedJob, disagreement, fits, lines
from nemo_ampo.rehearse.sizes import Hardware, check_layout, hardware_of, layout_of, longest_row, memory_of
from nemo_ampo.text import one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A stage, its model and the machines it would run on."""

    stage: str
    cfg: DictConfig
    facts: ModelFacts
    nodes: int
    gpus: int
    hardware: Hardware

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.nodes * self.gpus


def read_job(
    stage: str, config_name: str, overrides: Sequence[str], model: Path | None, nodes: int, gpus: int, gpu: str
) -> Job:
    """The job, once it is known that the stage itself would begin it.

    Raises:
        UserError: naming the key or option.
    """
    hardware = hardware_of(gpu)
    cfg = compose_for_plan(stage, config_name, list(overrides), nodes * gpus)
    job = Job(stage, cfg, model_of(model, config_name), nodes, gpus, hardware)
    check_layout(
        job.facts, int(cfg.model.tensor_model_parallel_size), int(cfg.model.pipeline_model_parallel_size), job.ranks
    )
    return job


def ranks_that_differ(tensor: int, pipeline: int, data: int) -> list[int]:
    """One rank for each program that runs somewhere in the job, and one more in each kind of group to compare it with.

    First and last rank of tensor parallelism (the last may hold padding of the vocabulary), of the replicas, and every
    pipeline stage. Ranks count through tensor, then data, then pipeline parallelism.
    """
    corners = {(t, d) for t in (0, tensor - 1) for d in (0, data - 1) if t == 0 or d == 0}
    return sorted(t + tensor * (d + data * p) for p in range(pipeline) for t, d in corners)


def rehearse(job: Job, ranks: Sequence[int]) -> Iterator[RankReport]:
    """Carry the stage out as each of these ranks, one after the other.

    Raises:
        UserError: what stopped a rank, and where.
    """
    from nemo_ampo.rehearse.rank import Rehearsal, prepare, rehearse_rank

    pipeline = int(job.cfg.model.pipeline_model_parallel_size)
    plan = Rehearsal(
        stage=job.stage,
        cfg=job.cfg,
        model=nemo_config(job.facts, Path(os.devnull)),
        nodes=job.nodes,
        gpus=job.gpus,
        tokens=longest_row(job.stage, job.cfg),
        rows=layout_of(job.stage, job.cfg, job.ranks).rows,
        # As many as a pipeline holds at once; the second of two meets what the first left behind.
        micro_batches=max(2, pipeline),
    )
    prepare(plan.on_gpu)
    for rank in ranks:
        yield in_a_fork(f"rank {rank}", lambda rank=rank: rehearse_rank(plan, rank))  # type: ignore[misc]


def in_a_fork(name: str, work: Callable[[], T], verbose: bool = False) -> T:
    """The result of ``work``, done in a copy of this process.

    Raises:
        UserError: it failed or died.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        if not verbose:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
        try:
            sender.send((True, work()))
        except Exception as error:
            sender.send((False, _told(error)))
        finally:
            sender.close()
            os._exit(0)  # threads of torch's must not keep it

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        succeeded, result = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(f"{name}: died with status {process.exitcode}") from None
    process.join()
    if not succeeded:
        raise UserError(f"{name}: {result}")
    value: T = result
    return value


def _told(error: Exception) -> str:
    """What it says, and which line of the program led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if "/torch/" not in f.filename and "/nemo_ampo/rehearse/" not in f.filename]
    place = (inside or list(frames))[-1]
    text = str(error).strip() or type(error).__name__
    return (
        f"{one_line(text.splitlines()[0])} ({Path(place.filename).name}, line {place.lineno}: {one_line(place.line or '')})"
    )


def run(job: Job, rank: str | None, show: Callable[[str], Any]) -> bool:
    """Rehearse, print, and say whether it fits and all ranks agree.

    Args:
        job: what to carry out.
        rank: ``all``, a rank's number, or None for the ranks that differ.
        show: prints a line.
    """
    layout = layout_of(job.stage, job.cfg, job.ranks)
    if rank is None:
        chosen = ranks_that_differ(layout.tensor, layout.pipeline, layout.data)
    elif rank == "all":
        chosen = list(range(job.ranks))
    elif rank.isdecimal() and int(rank) < job.ranks:
        chosen = [int(rank)]
    else:
        raise ConfigError(f"--rank: expected all or a number below {job.ranks}, got {rank!r}")
    counted = memory_of(job.stage, job.cfg, job.facts, layout)
    question = RehearsedJob(
        longest=longest_row(job.stage, job.cfg),
        tokens=layout.tokens,
        hardware=job.hardware,
        stays=counted.engine if counted.engine_stays else 0.0,
        counted=counted,
    )
    show(f"rehearsing {', '.join(f'rank {rank}' for rank in chosen)} of {job.ranks}, one after the other")
    reports = []
    for report in rehearse(job, chosen):
        show(report.line())
        reports.append(report)
    wrong = disagreement(reports)
    for line in lines(reports, question, wrong):
        show(line)
    return fits(reports, question) and wrong is None
