"""Tokens per second of the Megatron engine against transformers' generate: same weights, prompts and lengths, one run.

128 prompts of 96 tokens, 64 new tokens each, no early stop, temperature 1. Prints the ratio; asserts nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROWS, PROMPT, NEW, REPEATS = 128, 96, 64, 3


def seconds(run: Callable[[], Any]) -> float:
    """Best of a few runs after a warm-up."""
    run()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def main(folder: Path) -> None:
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
    from nemo_ampo.actor import AmpoActor
    from nemo_ampo.checkpoint import unpack_assets
    from nemo_ampo.rollout.engine import Request, SamplingSpec
    from nemo_ampo.rollout.megatron import MegatronEngine
    from nemo_ampo.session import open_session, prepare_config

    cfg = compose("ampo", "tiny", [])
    prepare_config(cfg, folder / "run", nemo, unpack_assets(nemo, folder / "assets"), "cpu")
    engine = MegatronEngine(open_session(cfg, "reinforce", AmpoActor, nemo, ROWS, False).model, ROWS)
    model = AutoModelForCausalLM.from_pretrained(hf).eval()
    vocab = model.config.vocab_size
    prompts = torch.randint(3, vocab - 1, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    requests = [Request(i, tuple(row), i) for i, row in enumerate(prompts.tolist())]
    spec = SamplingSpec(NEW, (vocab - 1,))
    never_stop = {"eos_token_id": None, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}
    tokens = sum(len(r.token_ids) for r in engine.generate(requests, spec))
    ours = tokens / seconds(lambda: engine.generate(requests, spec))
    with torch.no_grad():
        theirs = ROWS * NEW / seconds(lambda: model.generate(prompts, do_sample=True, top_k=0, **never_stop))
    print(
        f"megatron engine {ours:8.0f} tokens/s\ntransformers    {theirs:8.0f} tokens/s\nratio           {ours / theirs:8.2f}"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
