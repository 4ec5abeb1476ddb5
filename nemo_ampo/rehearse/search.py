"""Which layouts of a job fit, and what a step of them costs. By arithmetic, of which a rehearsal proves one layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nemo_ampo.errors import ConfigError
from nemo_ampo.model_folder.facts import ModelFacts
from nemo_ampo.rehearse.sizes import (
    GB,
    Hardware,
    Layout,
    Memory,
    check_layout,
    layout_of,
    longest_row,
    memory_of,
    parameters_of,
    scoring_passes,
)

if TYPE_CHECKING:
    from rich.table import Table

ROWS = (1, 2, 4, 8, 16, 32)
"""Rows of a micro-batch that are tried."""


@dataclass(frozen=True)
class Candidate:
    """A layout.

    Attributes:
        layout: sizes.
        memory: of the fullest rank.
        flops: of a step, on each GPU, recomputation included.
        waiting: share of an update in which a pipeline stage has nothing to do, (p - 1) / (micro-batches + p - 1).
    """

    layout: Layout
    memory: Memory
    flops: float
    waiting: float


def candidates(stage: str, cfg: Any, facts: ModelFacts, nodes: int, gpus: int, hardware: Hardware) -> list[Candidate]:
    """Layouts that fit, the quickest to be expected first: no recomputation, few GPUs to a replica, large micro-batches.

    Args:
        stage: ``bc`` or ``ampo``.
        cfg: composed config.
        facts: of the model.
        nodes, gpus: of the job, per node; tensor parallelism does not leave a node.
        hardware: of each.
    """
    found = []
    for layout in _layouts(stage, cfg, facts, nodes, gpus):
        best = _largest(stage, cfg, facts, layout, hardware)
        if best is not None:
            found.append(best)
    return sorted(
        found, key=lambda c: (c.layout.recompute, c.layout.tensor * c.layout.pipeline, c.layout.pipeline, -c.layout.rows)
    )


def _layouts(stage: str, cfg: Any, facts: ModelFacts, nodes: int, gpus: int) -> Iterator[Layout]:
    asked = layout_of(stage, cfg, nodes * gpus)
    for tensor in (t for t in range(1, gpus + 1) if gpus % t == 0):
        for pipeline in range(1, nodes * gpus // tensor + 1):
            try:
                check_layout(facts, tensor, pipeline, nodes * gpus)
            except ConfigError:
                continue
            for recompute in (False, True):
                data = nodes * gpus // (tensor * pipeline)
                if int(cfg.model.global_batch_size) % data == 0:
                    spread = replace(asked, tensor=tensor, pipeline=pipeline, data=data)
                    yield replace(spread, sequence_parallel=tensor > 1, recompute=recompute)


def _largest(stage: str, cfg: Any, facts: ModelFacts, layout: Layout, hardware: Hardware) -> Candidate | None:
    longest, batch = longest_row(stage, cfg), int(cfg.model.global_batch_size)
    best = None
    for rows in ROWS:
        tried = replace(layout, rows=rows, tokens=rows * longest, scored_tokens=rows * longest)
        memory = memory_of(stage, cfg, facts, tried)
        if batch // layout.data % rows or memory.total > hardware.room:
            continue
        micro_batches = batch // layout.data // rows
        waiting = (layout.pipeline - 1) / (micro_batches + layout.pipeline - 1)
        best = Candidate(tried, memory, step_flops(stage, cfg, facts, tried), waiting)
    return best


def step_flops(stage: str, cfg: Any, facts: ModelFacts, layout: Layout) -> float:
    """FLOPs of one optimizer step on each GPU, every row the longest.

    Per token 6N and 12Lca per position looked at, half of T on average, in an update; a third more with full recomputation;
    a third of that in each pass without gradients, of which AMPO has one, or two with a reference.
    """
    longest = longest_row(stage, cfg)
    tokens = int(cfg.model.global_batch_size) * longest
    per_token = 6 * parameters_of(facts) + 12 * facts.num_layers * facts.q_width * longest / 2
    shares = (4 / 3 if layout.recompute else 1) + scoring_passes(stage, cfg) / 3
    return per_token * tokens * shares / (layout.tensor * layout.pipeline * layout.data)


def table(found: Sequence[Candidate], hardware: Hardware) -> Table:
    """Layouts that fit, one a row."""
    from rich.table import Table

    shown = Table(box=None)
    names = ("TP", "PP", "DP", "SP", "recompute", "rows", "tokens", "GB", "free GB", "PFLOP/GPU", "pipeline waits")
    for name in names:
        shown.add_column(name, justify="right", no_wrap=True)
    for one in found:
        layout, memory = one.layout, one.memory.total
        cells = (
            *map(str, (layout.tensor, layout.pipeline, layout.data, "yes" if layout.sequence_parallel else "no")),
            *map(str, ("full" if layout.recompute else "selective", layout.rows, layout.tokens)),
            *(f"{number:.1f}" for number in (memory / GB, (hardware.memory - memory) / GB, one.flops / 1e15)),
            f"{one.waiting:.0%}",
        )
        shown.add_row(*cells)
    return shown
