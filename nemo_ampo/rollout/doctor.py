"""Is this engine the trainer's model? The first minutes on a new machine, before a run is trusted to it.

The same comparison as after every sync (:mod:`nemo_ampo.rollout.probe`), with weights moved and put back, plus what an
engine does at each kind of stop, with equal and different seeds, and with its memory released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from nemo_ampo.errors import EngineError
from nemo_ampo.rollout.engine import Decode, Engine, Request, Response, SamplingSpec
from nemo_ampo.rollout.packing import pack
from nemo_ampo.rollout.probe import Logprobs, Probe, duplicate_fraction, probe_gap

if TYPE_CHECKING:
    from rich.table import Table

_GROUP = 8


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        ok: None for a figure without a verdict.
        detail: figures, or what went wrong.
    """

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class Patient:
    """What is examined.

    Attributes:
        engine: not yet synced.
        logprobs: of the trainer.
        parameters: the trainer's weights on this rank, by name.
        probe: prompts of unequal length and the limit.
        decode: tokens to text.
        max_new_tokens: of a response.
    """

    engine: Engine
    logprobs: Logprobs
    parameters: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    probe: Probe
    decode: Decode
    max_new_tokens: int


def examine(patient: Patient) -> Iterator[Finding]:
    """Findings in the order in which they are made; an engine that cannot be synced ends it."""
    engine = patient.engine
    try:
        report = engine.sync(0)
    except (EngineError, RuntimeError) as error:
        yield Finding("first sync", False, _one_line(error))
        return
    size = f"{report.num_tensors} tensors, {report.num_bytes / 2**20:.0f} MiB, {report.seconds:.1f} s"
    yield Finding("first sync", True, size if report.num_tensors else "shares the trainer's weights")
    for name, check in CHECKS.items():
        try:
            yield check(name, patient)
        except (EngineError, RuntimeError, AssertionError) as error:
            yield Finding(name, False, _one_line(error))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _spec(patient: Patient) -> SamplingSpec:
    return SamplingSpec(min(32, patient.max_new_tokens), patient.probe.stop_token_ids)


def _requests(patient: Patient) -> list[Request]:
    return [Request(i, prompt, 100 + i) for i, prompt in enumerate(patient.probe.prompts)]


def _gap(name: str, gap: float, limit: float, words: str) -> Finding:
    return Finding(name, gap <= limit, f"mean |d log-prob| {gap:.2e}, allowed {limit:g}; {words}")


def _greedy(name: str, patient: Patient) -> Finding:
    gap = probe_gap(patient.engine, patient.logprobs, patient.probe)
    return _gap(name, gap, patient.probe.max_gap, "greedy tokens, after the first sync")


def _sampled(name: str, patient: Patient) -> Finding:
    requests = _requests(patient)
    packed = pack(requests, patient.engine.generate(requests, _spec(patient)), patient.probe.pad_id)
    gap_BT = (packed.sampling_logprobs_BT - patient.logprobs(packed.tokens_BT, packed.mask_BT).float().cpu()).abs()
    worst = f"sampled tokens, largest {float(gap_BT[packed.mask_BT].max()):.2e}"
    return _gap(name, float(gap_BT[packed.mask_BT].mean()), patient.probe.max_gap, worst)


def _moved(name: str, patient: Patient) -> Finding:
    """Other norms and biases in every layer: an engine that does not follow is seen, and so is one that does not return."""
    engine, limit = patient.engine, patient.probe.max_gap
    with moved(patient.parameters):
        stale = probe_gap(engine, patient.logprobs, patient.probe)
        engine.sync(1)
        fresh = probe_gap(engine, patient.logprobs, patient.probe)
    engine.sync(2)
    back = probe_gap(engine, patient.logprobs, patient.probe)
    seen = stale > limit or not engine.caps.own_weights
    detail = f"gap {stale:.2e} before the sync, {fresh:.2e} after it, {back:.2e} with the old weights back"
    return Finding(name, seen and fresh <= limit and back <= limit, detail)


@contextmanager
def moved(parameters: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> Iterator[None]:
    """One-dimensional weights (norms, biases) one and a half times as large within the block."""
    saved = {name: p.detach().clone() for name, p in parameters() if p.dim() == 1}
    with torch.no_grad():
        for name, p in parameters():
            if name in saved:
                p.mul_(1.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters():
                if name in saved:
                    p.copy_(saved[name])


def _first_tokens(patient: Patient, spec: SamplingSpec) -> tuple[Request, Response]:
    request = _requests(patient)[0]
    return request, patient.engine.generate([request], spec)[0]


def _stop_tokens(name: str, patient: Patient) -> Finding:
    request, free = _first_tokens(patient, replace(_spec(patient), greedy=True))
    stop = free.token_ids[len(free.token_ids) // 2]
    spec = replace(_spec(patient), greedy=True, stop_token_ids=(stop, *patient.probe.stop_token_ids))
    got = patient.engine.generate([request], spec)[0]
    expected = free.token_ids[: free.token_ids.index(stop) + 1]
    return Finding(name, got.token_ids == expected and got.finish == "eos", f"{len(got.token_ids)} tokens, {got.finish}")


def _at_once(name: str, patient: Patient) -> Finding:
    request, free = _first_tokens(patient, replace(_spec(patient), greedy=True))
    got = patient.engine.generate([request], replace(_spec(patient), greedy=True, stop_token_ids=(free.token_ids[0],)))[0]
    return Finding(name, (len(got.token_ids), got.finish) == (1, "eos"), f"{len(got.token_ids)} tokens, {got.finish}")


def _limit(name: str, patient: Patient) -> Finding:
    responses = patient.engine.generate(_requests(patient), replace(_spec(patient), max_new_tokens=2))
    ok = all(len(r.token_ids) <= 2 and (r.finish == "eos" or len(r.token_ids) == 2) for r in responses)
    return Finding(name, ok, ", ".join(f"{len(r.token_ids)} {r.finish}" for r in responses))


def _stop_string(name: str, patient: Patient) -> Finding:
    request, free = _first_tokens(patient, replace(_spec(patient), greedy=True))
    text = patient.decode(free.token_ids[: max(2, len(free.token_ids) // 2)])
    if not text.strip():
        return Finding(name, None, "the model's answer has no text to stop at")
    stop = text[len(text) // 2 :]
    got = patient.engine.generate([request], replace(_spec(patient), greedy=True, stop_strings=(stop,)))[0]
    same = got.token_ids == free.token_ids[: len(got.token_ids)]
    whole, shorter = patient.decode(got.token_ids), patient.decode(got.token_ids[:-1])
    return Finding(
        name, same and stop in whole and stop not in shorter, f"{stop!r}: {len(got.token_ids)} tokens, {got.finish}"
    )


def _group(patient: Patient, seeds: Sequence[int]) -> tuple[list[Request], list[Response]]:
    prompt = patient.probe.prompts[0]
    requests = [Request(i, prompt, seed) for i, seed in enumerate(seeds)]
    return requests, patient.engine.generate(requests, _spec(patient))


def _equal_seeds(name: str, patient: Patient) -> Finding:
    share = duplicate_fraction(*_group(patient, [7] * _GROUP))
    return Finding(name, share == (_GROUP - 1) / _GROUP, f"{share:.0%} of {_GROUP} responses repeat another one")


def _other_seeds(name: str, patient: Patient) -> Finding:
    share = duplicate_fraction(*_group(patient, range(_GROUP)))
    return Finding(name, share <= 0.5, f"{share:.0%} of {_GROUP} responses repeat another one")


def _batches(name: str, patient: Patient) -> Finding:
    """Kernels may round differently in another batch: a figure, not a verdict."""
    requests, spec = _requests(patient), replace(_spec(patient), greedy=True)
    together = patient.engine.generate(requests, spec)
    alone = [patient.engine.generate([r], spec)[0] for r in requests]
    same = sum(a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True))
    return Finding(name, None, f"{same} of {len(requests)} greedy responses are the same alone and together")


def _released(name: str, patient: Patient) -> Finding:
    patient.engine.release()
    patient.engine.sync(3)
    gap = probe_gap(patient.engine, patient.logprobs, patient.probe)
    return _gap(name, gap, patient.probe.max_gap, "released and synced again")


CHECKS: dict[str, Callable[[str, Patient], Finding]] = {
    "greedy log-probs": _greedy,
    "sampled log-probs": _sampled,
    "moved weights": _moved,
    "stop token": _stop_tokens,
    "stop at once": _at_once,
    "length limit": _limit,
    "stop string": _stop_string,
    "equal seeds": _equal_seeds,
    "different seeds": _other_seeds,
    "batch of one": _batches,
    "memory released": _released,
}
"""Name to check, in the order in which they run; every one leaves the engine synced with the trainer's weights."""


def findings_table(findings: Sequence[Finding]) -> Table:
    """For a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    words: dict[bool | None, tuple[str, str]] = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("-", "dim")}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("check", "", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        word, style = words[finding.ok]
        table.add_row(Text(finding.name), Text(word, style=style), Text(finding.detail))
    return table


def verdict(engine: str, findings: Sequence[Finding]) -> str:
    """One sentence that says whether to train with this engine."""
    failed = [f.name for f in findings if f.ok is False]
    if failed:
        return f"rollout.engine={engine} must not be used here: {', '.join(failed)}"
    return f"rollout.engine={engine} answers as the trainer does"


def parameters_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of a NeMo model on this rank; NeMo keeps its modules where torch does not look."""
    for index, module in enumerate(model.get_model_module_list()):
        for name, parameter in module.named_parameters():
            yield f"{index}.{name}", parameter
