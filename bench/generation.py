"""Tokens per second of the Megatron engine against transformers' generate: same weights, prompts and lengths, one run.

128 prompts of 96 tokens, 64 new tokens each, no early stop, temperature 1, both with a KV cache, one thread. The two take
turns and medians of CPU time are compared, so that a busy machine hits both. Then the price of a
token while rows finish one after another.
Prints figures; asserts nothing.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Spinning OpenMP threads of one side would slow the other; must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

ROWS, PROMPT, NEW, TURNS = 128, 96, 64, 3


def seconds(run: Callable[[], Any]) -> float:
    """CPU seconds: with one thread they are the wall clock of a machine that does nothing else."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def open_both(folder: Path) -> tuple[Any, Any]:
    """Our engine and the transformers model it was converted from."""
    from transformers import AutoModelForCausalLM

    from nemo_ampo import compat
    from nemo_ampo.compose import compose
    from nemo_ampo.world.pack import make_pack
    from nemo_ampo.world.tiny_model import TinyModel, make_tiny_checkpoint

    make_pack(folder / "pack", seed=1, num_bc=200, num_rl=50, num_heldout=50)
    sizes = TinyModel(hidden=128, layers=4, heads=4, kv_heads=2, ffn=512)
    hf = make_tiny_checkpoint(folder / "hf", folder / "pack", 1, sizes)
    nemo = str(folder / "model.nemo")
    convert = [sys.executable, "-m", "converters.hf_to_nemo", "--input", str(hf), "--output", nemo, "--no-verify"]
    subprocess.run(convert, check=True)
    compat.setup("cpu")
    from nemo_ampo.checkpoint.nemo_file import unpack_assets
    from nemo_ampo.rollout.megatron import MegatronEngine
    from nemo_ampo.training.actor import AmpoActor
    from nemo_ampo.training.session import open_session, prepare_config

    cfg = compose("ampo", "tiny", [])
    prepare_config(cfg, folder / "run", nemo, unpack_assets(nemo, folder / "assets"), "cpu")
    model = open_session(cfg, "reinforce", AmpoActor, nemo, ROWS, False).model
    return MegatronEngine(model, ROWS), AutoModelForCausalLM.from_pretrained(hf).eval()


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
    speed = {name: drawn[name] / statistics.median(values) for name, values in times.items()}
    for name, value in speed.items():
        print(f"{name:32}{value:8.0f} tokens/s{value / speed['transformers']:8.2f} x transformers")


def while_rows_finish(engine: Any) -> None:
    """Microseconds per drawn token while all 128 rows live, and while seven of eight stop somewhere on the way."""
    from nemo_ampo.rollout.engine import Request, SamplingSpec

    vocab = engine.caps.vocab_size
    prompts = torch.randint(3, vocab - 1, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    requests = [Request(i, tuple(row), i) for i, row in enumerate(prompts)]
    for label, stops in (("few rows finish early", (vocab - 1,)), ("most rows finish early", tuple(range(0, vocab, 24)))):
        times, tokens = [], 0
        for _ in range(TURNS):
            begin = time.process_time()
            responses = engine.generate(requests, SamplingSpec(NEW, stops))
            times.append(time.process_time() - begin)
            tokens = sum(len(r.token_ids) for r in responses)
        prefill = statistics.median(
            seconds(lambda: engine.generate(requests, SamplingSpec(1, (vocab - 1,)))) for _ in range(TURNS)
        )
        price = (statistics.median(times) - prefill) / max(tokens - ROWS, 1) * 1e6
        print(f"{label:32}{tokens:8d} tokens{price:10.0f} us per token after the first")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        ours_, theirs_ = open_both(Path(temporary))
        against_transformers(ours_, theirs_)
        while_rows_finish(ours_)
