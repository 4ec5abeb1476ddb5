"""Tokens per second of the Megatron engine against transformers' generate: same weights, prompts and lengths, one run.

128 prompts of 96 tokens, 64 new tokens each, no early stop, temperature 1, both with a KV cache, one thread. The two take
turns and CPU time is compared turn by turn, so that a busy machine hits both. Then what a living row's token costs beside
rows that have finished, and what it costs without them: equal, because a finished row leaves the batch.
Prints figures; asserts nothing.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Spinning OpenMP threads of one side would slow the other; must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from _tiny_session import open_tiny

ROWS, PROMPT, NEW, TURNS = 128, 96, 64, 5


def seconds(run: Callable[[], Any]) -> float:
    """CPU seconds: with one thread they are the wall clock of a machine that does nothing else."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def open_both(folder: Path) -> tuple[Any, Any, Any]:
    """Our engine, its model's output layer, and the transformers model it was converted from."""
    from transformers import AutoModelForCausalLM

    session, hf = open_tiny(folder, hidden=128, layers=4, heads=4, kv_heads=2, ffn=512)
    from nemo_ampo.rollout.megatron import MegatronEngine

    model = session.model
    (module,) = model.get_model_module_list()
    return MegatronEngine(model, ROWS), module.output_layer, AutoModelForCausalLM.from_pretrained(hf).eval()


def against_transformers(engine: Any, model: Any) -> None:
    from nemo_ampo.rollout.engine import Request, SamplingSpec

    vocab = model.config.vocab_size
    prompts = torch.randint(3, vocab - 1, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    requests = [Request(i, tuple(row), i) for i, row in enumerate(prompts.tolist())]
    groups = [Request(i, tuple(prompts[i // 16].tolist()), i) for i in range(ROWS)]
    uneven = [Request(i, tuple(row[: 33 + i // 2]), i) for i, row in enumerate(prompts.tolist())]
    spec = SamplingSpec(NEW, (vocab - 1,))
    never_stop = {"eos_token_id": None, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}
    drawn: dict[str, int] = {}

    def ours(name: str, calls: list[Request]) -> None:
        drawn[name] = sum(len(r.token_ids) for r in engine.generate(calls, spec))

    @torch.no_grad()
    def theirs() -> None:
        model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, **never_stop)
        drawn["transformers"] = ROWS * NEW

    contestants: dict[str, Callable[[], None]] = {
        "transformers": theirs,
        "engine, 128 distinct prompts": lambda: ours("engine, 128 distinct prompts", requests),
        "engine, 8 prompts x 16": lambda: ours("engine, 8 prompts x 16", groups),
        "engine, lengths 33 to 96": lambda: ours("engine, lengths 33 to 96", uneven),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(TURNS + 1):
        for name, run in contestants.items():
            elapsed = seconds(run)
            if turn:  # the first turn warms up
                times[name].append(elapsed)
    speed = {name: [drawn[name] / value for value in values] for name, values in times.items()}
    print(f"\n{'median of ' + str(TURNS) + ' turns':32}{'tokens/s':>10}{'x transformers':>16}{'lowest to highest turn':>26}")
    for name, values in speed.items():
        ratios = [ours / theirs for ours, theirs in zip(values, speed["transformers"], strict=True)]
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:32}{statistics.median(values):10.0f}{statistics.median(ratios):16.2f}{span:>26}")


def decode_seconds(engine: Any, layer: Any, requests: list[Any], sampling: Any) -> list[float]:
    """CPU seconds from the first draw on, one for each further token: drawing, rows leaving, the forward pass.

    Args:
        engine: to ask.
        layer: the model's output layer; its calls are the ends of forward passes.
        requests, sampling: of the call.
    """
    marks: list[float] = []
    hook = layer.register_forward_hook(lambda *args: marks.append(time.process_time()))
    engine.generate(requests, sampling)
    hook.remove()
    ends = marks[-sampling.max_new_tokens :]  # the last pass over prompts, then one pass per token
    return [after - before for before, after in itertools.pairwise(ends)]


def while_rows_finish(engine: Any, layer: Any) -> None:
    """A living row's token beside rows that finished with their first one, and with the same rows alone."""
    from nemo_ampo.rollout.engine import Request, SamplingSpec

    vocab = engine.caps.vocab_size
    prompts = torch.randint(3, vocab - 1, (4 * ROWS, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    requests = [Request(i, tuple(row), i) for i, row in enumerate(prompts)]
    # Greedy replies of a random model soon repeat themselves, so that many tokens are left to stop the other rows with.
    spec = SamplingSpec(NEW, (vocab - 1,), greedy=True)
    most = ROWS // 2
    known = engine.generate(requests[:most], spec)
    firsts = {r.request_id: r.token_ids[0] for r in engine.generate(requests, replace(spec, max_new_tokens=1))}
    cases: dict[tuple[int, int], tuple[list[Request], SamplingSpec]] = {(ROWS, ROWS): (requests[:ROWS], spec)}
    for living in (ROWS // 2, ROWS // 4, ROWS // 10):
        kept = {i for r in known[:living] for i in r.token_ids}
        leaving = [r for r in requests[living:] if firsts[r.request_id] not in kept][: ROWS - living]
        stops = tuple({vocab - 1} | {firsts[r.request_id] for r in leaving})
        for beside in (leaving, []):
            cases[living, living + len(beside)] = ([*requests[:living], *beside], replace(spec, stop_token_ids=stops))
    times: dict[tuple[int, int], list[list[float]]] = {case: [] for case in cases}
    for _ in range(TURNS):
        for case, call in cases.items():
            times[case].append(decode_seconds(engine, layer, *call))
    # What disturbs a step only ever adds to it: the least of its turns is what it costs.
    price = {case: sum(map(min, zip(*turns, strict=True))) / (NEW - 1) * 1e6 for case, turns in times.items()}
    print(f"\n{'rows':>5}{'finished':>10}{'us per step':>13}{'us per living token':>21}{'same rows alone':>17}{'ratio':>7}")
    for (living, rows), value in price.items():
        if rows > living or living == ROWS:
            share, alone = f"{1 - living / rows:.0%}", price[living, living]
            print(f"{rows:5}{share:>10}{value:13.0f}{value / living:21.0f}{alone / living:17.0f}{value / alone:7.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        ours_, layer_, theirs_ = open_both(Path(temporary))
        against_transformers(ours_, theirs_)
        while_rows_finish(ours_, layer_)
