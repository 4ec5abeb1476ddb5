"""What the doctor says about engines that are wrong in one way; engines that are right are in tests/contract."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nemo_ampo.rollout.doctor import Finding, Patient, examine, findings_table, verdict
from nemo_ampo.rollout.engine import (
    Caps,
    OnFinish,
    Request,
    Response,
    SamplingSpec,
    SyncReport,
    WeightMismatchError,
    finish_response,
)
from nemo_ampo.rollout.probe import Probe
from nemo_ampo.rollout.sampling import draw, uniform_draws

VOCAB = 50
CAPS = Caps("raw", 8, 99, 99, VOCAB, True)


@dataclass
class Table:
    """A model of one weight: the logits of the next token follow from the last token."""

    weight: torch.Tensor

    def logits(self, token: int) -> torch.Tensor:
        return torch.sin(torch.arange(VOCAB) * (token + 1.7)) * self.weight

    def logprobs(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        rows = [[torch.log_softmax(self.logits(a), 0)[b] for a, b in pairwise(r)] for r in tokens_BT.tolist()]
        return torch.tensor(rows)


@dataclass
class Engine:
    """Draws from a copy of the table; each field switches one fault on."""

    trainer: Table
    caps: Caps = CAPS
    copies: bool = True
    seeded: bool = True
    stops: bool = True
    offset: float = 0.0
    refuses: bool = False
    weight: torch.Tensor | None = None

    def sync(self, weight_version: int) -> SyncReport:
        if self.refuses:
            raise WeightMismatchError("refit: the engine has 2 weights,\nthe trainer gave 1")
        if self.copies or self.weight is None:
            self.weight = self.trainer.weight.clone()
        return SyncReport(weight_version, 1, 4, 0.0)

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSpec, on_finish: OnFinish | None = None
    ) -> list[Response]:
        assert self.weight is not None
        model, spec = Table(self.weight), sampling if self.stops else replace(sampling, stop_token_ids=(VOCAB - 1,))
        return [self.answer(model, r, spec) for r in requests]

    def answer(self, model: Table, request: Request, spec: SamplingSpec) -> Response:
        draws = uniform_draws([request.seed if self.seeded else 3], spec.max_new_tokens)
        last, ids, logprobs = request.prompt_ids[-1], [], []
        for step in range(spec.max_new_tokens):
            token, logprob = draw(model.logits(last).unsqueeze(0), draws[:, step], spec)
            last = int(token)
            ids.append(last)
            logprobs.append(float(logprob) - self.offset)
            if last in spec.stop_token_ids:
                break
        return finish_response(request, ids, torch.tensor(logprobs), spec, self.caps, text, 0)

    def release(self) -> None: ...

    def close(self) -> None: ...


def text(ids: Sequence[int]) -> str:
    return "".join(chr(200 + i) for i in ids)


def findings(change: Callable[[Engine], None] = lambda engine: None) -> dict[str, Finding]:
    trainer = Table(torch.tensor([1.0]))
    engine = Engine(trainer)
    change(engine)
    probe = Probe(((3, 4), (5,), (6, 7, 8)), 8, 0.01, (VOCAB - 1,), 0)

    def parameters() -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", trainer.weight

    return {f.name: f for f in examine(Patient(engine, trainer.logprobs, parameters, probe, text, 8))}


def failed(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.ok is False}


def test_a_right_engine_passes_every_check() -> None:
    found = findings()
    assert failed(found) == set() and len(found) == 12
    assert verdict("trtllm", list(found.values())) == "rollout.engine=trtllm answers as the trainer does"


@pytest.mark.parametrize(
    ("fault", "value", "names"),
    [
        ("copies", False, {"moved weights"}),
        ("seeded", False, {"different seeds"}),
        ("stops", False, {"stop token", "stop at once"}),
        ("offset", 0.5, {"greedy log-probs", "sampled log-probs", "moved weights", "memory released"}),
    ],
)
def test_each_fault_is_found_where_it_is(fault: str, value: object, names: set[str]) -> None:
    assert failed(findings(lambda engine: setattr(engine, fault, value))) == names


def test_an_engine_that_takes_no_weights_ends_the_examination() -> None:
    found = findings(lambda engine: setattr(engine, "refuses", True))
    assert list(found) == ["first sync"]
    assert found["first sync"].detail == "WeightMismatchError: refit: the engine has 2 weights, the trainer gave 1"
    assert verdict("trtllm", list(found.values())) == "rollout.engine=trtllm must not be used here: first sync"
    assert findings_table(list(found.values())).row_count == 1


def test_the_command_says_what_it_needs_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nemo_ampo.commands.cli", "rollout-doctor"]
    root = Path(__file__).resolve().parents[3]
    for given, words in (
        ([], "error: run.init_from: a value is required"),
        (["run.init_from=/nowhere.nemo"], "error: run.init_from: no such file: /nowhere.nemo"),
        (
            ["run.init_from=x", "rollout.engine=vllm"],
            "error: rollout.engine: expected one of megatron, trtllm, trtllm_server",
        ),
        (["run.init_from=x", "rollout.engine=trtllm"], "error: rollout.engine: trtllm needs TensorRT-LLM 0.17.x"),
    ):
        done = subprocess.run([*command, *given], capture_output=True, text=True, cwd=root, env=os.environ)
        assert done.returncode == 2 and done.stderr.startswith(words), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
