"""Run in one process: forks a two-rank job for every phase and every way in which one of its ranks can be lost.

The jobs go through the real entry, step, ranks and watchdog; engine, policy and judge are scripted, each with the collective
that the real one has in that phase.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import product
from pathlib import Path
from typing import Any

import torch
from forking import fork_ranks

PHASES = ("load", "sync", "rollout", "judge", "logprobs", "update", "save")
FAULTS = ("raise", "kill", "stop")
NOBODY_LOST = ("none", "raise")
LONGEST_S = 60
REASON = "the disk of this rank alone is full"


def main(folder: Path) -> None:
    begin = time.monotonic()
    jobs = {}
    for phase, fault in (*product(PHASES, FAULTS), NOBODY_LOST):
        log = folder / f"{phase}-{fault}"
        jobs[phase, fault] = fork_ranks(lambda p=phase, f=fault, to=log: rank(p, f, to), 2)  # type: ignore[misc]
    waiting = {pids[0]: case for case, pids in jobs.items()}
    statuses: dict[str, int] = {}
    while waiting and time.monotonic() - begin < LONGEST_S:
        for pid, case in list(waiting.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del waiting[pid]
                statuses["-".join(case)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    for pids in jobs.values():
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    said = {"-".join(case): (folder / "-".join(case)).read_text() for case in jobs}
    (folder / "ended.json").write_text(json.dumps({"statuses": statuses, "said": said}))


def rank(phase: str, fault: str, log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from recipes.launch import main as launch

    def run(cfg: Any) -> bool:
        job(Faulty(phase, fault))
        return True

    os._exit(
        launch("ampo", run, ["--config-name", "tiny", "run.dir=x", "run.init_from=x", "data.train=x", "judge.base_url=x"])
    )


class Faulty:
    """Loses rank 1 in one phase."""

    def __init__(self, phase: str, fault: str) -> None:
        self._phase, self._fault = phase, fault

    def __call__(self, phase: str) -> None:
        """The phase's collective, which rank 1 may not reach."""
        if phase == self._phase and torch.distributed.get_rank() == 1:
            if self._fault == "raise":
                from nemo_ampo.errors import UserError

                raise UserError(REASON)
            os.kill(os.getpid(), signal.SIGKILL if self._fault == "kill" else signal.SIGSTOP)
        torch.distributed.all_reduce(torch.ones(1))


def job(at: Callable[[str], None]) -> None:
    from megatron.core import parallel_state

    from nemo_ampo.ranks import MegatronRanks
    from nemo_ampo.run import watchdog

    watchdog.watch_ranks(silence_s=4.0)
    torch.distributed.init_process_group("gloo")
    while len(watchdog._watchdog._signs) < torch.distributed.get_world_size():  # type: ignore[union-attr]
        time.sleep(0.05)  # a rank is missed once it has been heard; these phases take no time, those of a run do
    parallel_state.initialize_model_parallel()
    at("load")
    ranks = MegatronRanks()
    step(ranks, at)
    at("save")
    torch.distributed.barrier()


def step(ranks: Any, at: Callable[[str], None]) -> None:
    from opening_turn import turn

    from nemo_ampo.algo.algorithm import AlgorithmConfig
    from nemo_ampo.algo.rewards import RewardConfig
    from nemo_ampo.rollout.config import RolloutConfig
    from nemo_ampo.rollout.engine import Caps, Response, SyncReport
    from nemo_ampo.step import Parts, ampo_step
    from nemo_ampo.types import Prompt, Updated, Verdict

    class Engine:
        caps = Caps("raw", 8, 99, 99, 300, False)

        def sync(self, weight_version: int) -> SyncReport:
            at("sync")
            return SyncReport(weight_version, 0, 0, 0.0)

        def release(self) -> None: ...

        def generate(self, requests: Any, sampling: Any, on_finish: Any = None) -> list[Response]:
            at("rollout")
            text = 'Thinking Level: 1\n<|begin_of_answer|>\n"Yes."\n<|end_of_answer|>'
            ids = [*map(ord, text), 0]
            responses = [Response(r.request_id, tuple(ids), torch.full((len(ids),), -1.0), "eos", 0) for r in requests]
            for response in responses:
                on_finish(response)
            return responses

    class Judge:
        def submit(self, request: Any) -> Future[Verdict]:
            at("judge")
            future: Future[Verdict] = Future()
            future.set_result(Verdict(5.0, 5.0))
            return future

    class Tokenizer:
        def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
            return "".join(chr(i) for i in token_ids if i)

        def tokenize(self, text: str) -> list[str]:
            return list(text)

    class Policy:
        updates_once = False

        def logprobs(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
            at("logprobs")
            return torch.full((len(tokens_BT), tokens_BT.size(1) - 1), -1.0)

        reference_logprobs = logprobs

        def update(self, batch: Any) -> Updated:
            at("update")
            return Updated({}, batch.old_logprobs_BT)

    rollout = RolloutConfig(prompts_per_step=2, group_size=2, max_prompt_tokens=9, max_new_tokens=90, batch_size=8)
    parts = Parts(
        Engine(),
        Judge(),
        Tokenizer(),
        ranks,
        rollout,
        RewardConfig(),
        AlgorithmConfig(),
        (0,),
        0,
        1,  # type: ignore[arg-type]
    )
    ampo_step(0, [Prompt(turn(str(i)), (65, 66)) for i in range(2)], Policy(), parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
