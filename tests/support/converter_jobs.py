"""``converter_jobs.py FOLDER``: every command that needs NeMo, in one process.

Writes the models, what each command printed and its exit status into the folder; the tests look at those.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_hf import LLAMA3_ROPE, as_written_by_5, edit_nemo_config, split_in_two, write_model

from converters import hf_to_nemo, nemo_to_hf, qkv, verify

CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "llama-untied": ("llama", False, {}),
    "llama-tied": ("llama", True, {}),
    "qwen2-untied": ("qwen2", False, {}),
    "qwen2-tied": ("qwen2", True, {}),
    # Heads wider than hidden / heads, as many key/value heads as query heads, no padding needed.
    "llama-wide": ("llama", False, {"head_dim": 24, "num_key_value_heads": 4, "vocab_size": 512}),
    "qwen2-bf16": ("qwen2", True, {"dtype": torch.bfloat16}),
}
Main = Callable[[Sequence[str]], int]


def record(name: str, results: dict[str, Any], main: Main, *argv: object) -> None:
    """Run one command as the shell would and keep what it said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: int | str = main([str(a) for a in argv])
        except Exception:
            status = traceback.format_exc()
    results[name] = {"status": status, "out": out.getvalue(), "err": err.getvalue()}


@contextlib.contextmanager
def keys_and_values_swapped() -> Any:
    """A mistake that is wrong in both directions, so that the round trip still closes."""
    join, split = qkv.interleave_qkv, qkv.split_qkv

    def wrong_join(q: Any, k: Any, v: Any, groups: int) -> Any:
        return join(q, v, k, groups)

    def wrong_split(*args: Any) -> Any:
        q, k, v = split(*args)
        return q, v, k

    qkv.interleave_qkv, qkv.split_qkv = wrong_join, wrong_split
    try:
        yield
    finally:
        qkv.interleave_qkv, qkv.split_qkv = join, split


def main(folder: Path) -> dict[str, Any]:
    """Run all jobs, inside of an allocation for many and without a temporary folder: neither is theirs."""
    os.environ |= {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "convert", "SLURM_PROCID": "3"}
    os.environ |= {"SLURM_LOCALID": "3", "SLURM_NODEID": "0", "SLURM_NNODES": "1", "OMPI_COMM_WORLD_RANK": "3"}
    os.environ |= {"WORLD_SIZE": "8", "MASTER_ADDR": "nowhere"}
    tempfile.tempdir = str(folder / "absent")
    results: dict[str, Any] = {}
    for case, (family, tied, changes) in CASES.items():
        hf, nemo = write_model(folder / case, family, tied, **changes), folder / f"{case}.nemo"
        record(f"convert {case}", results, hf_to_nemo.main, "--input", hf, "--output", nemo)
        record(f"export {case}", results, nemo_to_hf.main, "--input", nemo, "--output", folder / f"{case}-back")
    hf, nemo = folder / "llama-untied", folder / "llama-untied.nemo"
    with keys_and_values_swapped():
        record("swapped", results, hf_to_nemo.main, "--input", hf, "--output", folder / "swapped.nemo")
    base = edit_nemo_config(nemo, folder / "base.nemo", rotary_base=10000)
    record("rope base", results, verify.main, "--hf", hf, "--nemo", base)
    scale = edit_nemo_config(nemo, folder / "scale.nemo", scale_positional_embedding=False)
    record("rope scaling", results, verify.main, "--hf", hf, "--nemo", scale)
    narrow = folder / "narrow.nemo"
    record("narrow", results, hf_to_nemo.main, "--input", hf, "--output", narrow, "--dtype", "bf16")
    other = ("--output", folder / "narrow-back", "--dtype", "bf16")
    record("export narrow", results, nemo_to_hf.main, "--input", nemo, *other)
    scaling = LLAMA3_ROPE | {"factor": 32.0, "low_freq_factor": 2.0, "original_max_position_embeddings": 512}
    hf = write_model(folder / "llama-factors", "llama", True, rope_scaling=scaling)
    record("other factors", results, hf_to_nemo.main, "--input", hf, "--output", folder / "llama-factors.nemo")
    hf, nemo = as_written_by_5(write_model(folder / "newer", "llama", False)), folder / "newer.nemo"
    split_in_two(hf)
    (hf / "model.safetensors").write_bytes(b"of an upload that was broken off")
    record("convert newer", results, hf_to_nemo.main, "--input", hf, "--output", nemo)
    record("export newer", results, nemo_to_hf.main, "--input", nemo, "--output", folder / "newer-back")
    record("original newer", results, verify.main, "--hf", hf, "--nemo", nemo, "--no-logits")
    return results


if __name__ == "__main__":
    where = Path(sys.argv[1])
    (where / "results.json").write_text(json.dumps(main(where)))
