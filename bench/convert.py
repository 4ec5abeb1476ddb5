"""Converters against ``cp`` of the same bytes: wall seconds and resident memory, in turns, in one run.

A checkpoint of Qwen2.5-1.5B's shape in bf16 (3.1 GB, random weights) is made on the spot; ``--layers``, ``--hidden`` and
``--ffn`` make another. The page cache is warm for both sides, and what was written is flushed before the next begins.
Prints one JSON object; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from converters.families import FAMILIES
from converters.hf_writing import save_shards
from converters.mapping import bind, hf_dims
from nemo_ampo.model_folder.facts import read_facts
from nemo_ampo.world.pack import make_pack
from nemo_ampo.world.tiny_model import TinyModel, make_tiny_checkpoint


def make_checkpoint(folder: Path, sizes: argparse.Namespace) -> Path:
    """A Hugging Face folder of Qwen2.5's kind, one tensor in memory at a time."""
    make_pack(folder / "pack", seed=1, num_bc=200, num_rl=50, num_heldout=50)
    hf = make_tiny_checkpoint(folder / "hf", folder / "pack", 1, TinyModel())
    (hf / "model.safetensors").unlink()
    config = json.loads((hf / "config.json").read_text())
    shape = {"num_hidden_layers": sizes.layers, "hidden_size": sizes.hidden, "intermediate_size": sizes.ffn}
    heads = {"num_attention_heads": sizes.hidden // 128, "num_key_value_heads": sizes.kv_heads, "head_dim": 128}
    (hf / "config.json").write_text(
        json.dumps(config | shape | heads | {"vocab_size": sizes.vocab, "torch_dtype": "bfloat16"})
    )
    facts = read_facts(hf)
    dims = hf_dims(bind(FAMILIES[facts.family].rows, facts), facts)
    save_shards(((name, 0.02 * torch.randn(size)) for name, size in dims.items()), dims, torch.bfloat16, hf)
    return hf


def timed(*words: object) -> tuple[float, float]:
    """Wall seconds of a command, and its largest resident memory in GB."""
    os.sync()
    begin = time.perf_counter()
    with subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words}: exit status {process.returncode}")
    return seconds, used.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 28), ("hidden", 1536), ("ffn", 8960), ("kv-heads", 2), ("vocab", 151936), ("turns", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place)
        hf, nemo, back = make_checkpoint(folder, sizes), folder / "model.nemo", folder / "back"
        to_nemo = [sys.executable, "-m", "converters.hf_to_nemo", "--input", hf, "--output", nemo, "--overwrite", "--verify"]
        to_hf = [sys.executable, "-m", "converters.nemo_to_hf", "--input", nemo, "--output", back, "--overwrite", "--verify"]
        what = {
            "cp of the folder": ["cp", "-r", hf, folder / "copy"],
            "HF -> NeMo": [*to_nemo, "none"],
            "cp of the .nemo": ["cp", nemo, folder / "copy.nemo"],
            "NeMo -> HF": [*to_hf, "none"],
            "HF -> NeMo, full parity check": [*to_nemo, "full"],
            "NeMo -> HF, full parity check": [*to_hf, "full"],
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in what}
        for _ in range(sizes.turns):
            for name, words in what.items():
                subprocess.run(["rm", "-rf", folder / "copy", folder / "copy.nemo"], check=True)
                found[name].append(timed(*words))
        weights = sum(file.stat().st_size for file in hf.glob("*.safetensors")) / 1e9
    result: dict[str, object] = {"weights_GB": round(weights, 2), "turns": sizes.turns, "load": os.getloadavg()}
    for name, runs in found.items():
        peer = found["cp of the .nemo" if name.startswith("NeMo") else "cp of the folder"]
        ratios = [seconds / other for (seconds, _), (other, _) in zip(runs, peer, strict=True)]
        result[name] = {
            "s": round(statistics.median(seconds for seconds, _ in runs), 2),
            "spread_s": [round(f(seconds for seconds, _ in runs), 2) for f in (min, max)],
            "GB": round(max(memory for _, memory in runs), 2),
            "times cp": round(statistics.median(ratios), 2),
        }
    print(json.dumps(result | {"torch": torch.__version__, "python": platform.python_version()}, indent=1))


if __name__ == "__main__":
    main()
