"""Run with two ranks on a GPU node with TensorRT-LLM's stand-in: its weights, its memory, and MPI that knows nobody."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from node_jobs import open_model, outcome


def main(folder: Path) -> None:
    from nemo_ampo import compat

    compat.setup("gpu")
    session = open_model(folder)
    assert "tensorrt_llm" not in sys.modules, "only its engine may ask for it"
    result: dict[str, Any] = {}
    with mock.patch.dict(os.environ, {"STAND_IN_MPI_RANK": "0"}):
        result["no_mpi"] = outcome(lambda: engine(session, folder / "no_mpi").sync(1))
        result["no_mpi_undone"] = outcome(lambda: refused_alone(session, folder / "alone"))
    result["gaps"] = gaps(session, folder / "right")
    from nemo_ampo.rollout import trtllm_export

    with mock.patch.object(trtllm_export, "_make_room", lambda: None):
        result["gaps_undone"] = outcome(lambda: gaps(session, folder / "wrong"))
    result["order"] = order_of_a_refit(session, folder / "order")
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(result))


def engine(session: Any, folder: Path, max_num_tokens: int = 48) -> Any:
    from nemo_ampo.rollout.trtllm_refit import TrtLlmRefitEngine

    return TrtLlmRefitEngine(session.model, folder, 8, 40, 8, False, max_num_tokens)


def refused_alone(session: Any, folder: Path) -> None:
    """Each rank refuses for itself; one that goes on is stopped where it would wait for the others."""
    from nemo_ampo.errors import ConfigError
    from nemo_ampo.rollout import trtllm_export

    def refuse(problem: str | None) -> None:
        if problem is not None:
            raise ConfigError(problem)

    def wait(reshard: bool) -> None:
        raise RuntimeError("waits for the others")

    with (
        mock.patch.object(trtllm_export, "refuse_together", refuse),
        mock.patch.object(trtllm_export, "init_model_parallel_from_nemo", wait),
    ):
        engine(session, folder).sync(1)


def gaps(session: Any, folder: Path) -> list[float]:
    """Largest difference to the trainer's log-probabilities, after the build and after a refit."""
    from nemo_ampo.rollout.engine import Request, SamplingSpec
    from nemo_ampo.rollout.packing import pack

    g = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(3, 500, (n,), generator=g).tolist()) for n in (40, 12, 9, 20)]
    requests = [Request(i, prompt, i) for i, prompt in enumerate(prompts)]  # 81 tokens: more than one batch may have
    mine = engine(session, folder)
    found = []
    for version in (1, 2):
        mine.sync(version)
        packed = pack(requests, mine.generate(requests, SamplingSpec(6, (256,))), pad_id=0)
        trainer = session.model.get_inference_log_probs(packed.tokens_BT)
        found.append(float((packed.sampling_logprobs_BT - trainer.cpu())[packed.mask_BT].abs().max()))
    mine.close()
    assert all(gap == gap for gap in found), "not a number"
    return found


def order_of_a_refit(session: Any, folder: Path) -> list[str]:
    """When the trainer's cached memory is given back, and when the engine is loaded."""
    from nemo_ampo.rollout import trtllm_export

    mine = engine(session, folder)
    mine.sync(1)
    mine.release()
    order: list[str] = []
    exporter = trtllm_export.RepairedExporter
    load = exporter._load
    with (
        mock.patch.object(torch.cuda, "empty_cache", lambda: order.append("empty")),
        mock.patch.object(exporter, "_load", lambda self: (order.append("load"), load(self))),
    ):
        mine.sync(2)
    mine.close()
    return order


if __name__ == "__main__":
    main(Path(sys.argv[1]))
