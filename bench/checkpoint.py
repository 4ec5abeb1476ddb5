"""Seconds per checkpoint, ours against Megatron's own ``dist_checkpointing.save`` of the same state, taking turns.

A model of SmolLM2's width with 8 of its 30 layers (28 M parameters, 0.45 GB of fp32 state) on one process. Ours also hashes
every file, flushes it to the disk, writes the manifest and applies the retention rules. Prints figures; asserts nothing.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TURNS = 5


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def open_model(folder: Path) -> Any:
    """A session that saves, with optimizer states in place."""
    from nemo_ampo import compat
    from nemo_ampo.checkpoint.config import CheckpointConfig
    from nemo_ampo.compose import compose
    from nemo_ampo.world.pack import make_pack
    from nemo_ampo.world.tiny_model import TinyModel, make_tiny_checkpoint

    make_pack(folder / "pack", seed=1, num_bc=200, num_rl=50, num_heldout=50)
    sizes = TinyModel(hidden=576, layers=8, heads=9, kv_heads=3, ffn=1536)
    hf = make_tiny_checkpoint(folder / "hf", folder / "pack", 1, sizes)
    nemo = str(folder / "model.nemo")
    convert = [sys.executable, "-m", "converters.hf_to_nemo", "--input", str(hf), "--output", nemo, "--no-verify"]
    subprocess.run(convert, check=True)
    compat.setup("cpu")
    from nemo_ampo.checkpoint.nemo_file import unpack_assets
    from nemo_ampo.training.actor import AmpoActor
    from nemo_ampo.training.session import Keep, open_session, prepare_config

    cfg = compose("ampo", "tiny", [])
    prepare_config(cfg, folder / "run", nemo, unpack_assets(nemo, folder / "assets"), "cpu")
    keep = Keep(folder / "run", CheckpointConfig(keep_best=0), {})
    session = open_session(cfg, "reinforce", AmpoActor, nemo, 128, False, keep)
    for module in session.model.get_model_module_list():
        for p in module.parameters():
            p.main_grad.normal_()
    session.optimizer.step()
    return session


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        session = open_model(folder)
        import torch
        from megatron.core import dist_checkpointing

        saver, step = session.ckpt_callback, 0

        def ours() -> None:
            nonlocal step
            step += 1
            saver.custom_save({"step": torch.tensor(step)})

        def theirs() -> None:
            target = folder / "theirs"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            weights = session.model.sharded_state_dict()
            optimizer = session.optimizer.sharded_state_dict(
                {k: v for k, v in weights.items() if not k.endswith("_extra_state")}, dist_ckpt_parallel_save=True
            )
            dist_checkpointing.save({"weights": weights, "optimizer": optimizer}, str(target))

        times = [(seconds(ours), seconds(theirs)) for _ in range(TURNS)]
        mine, peer = (statistics.median(t) for t in zip(*times, strict=True))
        size = saver.store.scan()[0][-1].manifest.bytes / 1e9
        restore = statistics.median(seconds(saver.restore) for _ in range(3))
        print(f"checkpoint of {size:.3g} GB: ours {mine:.2f} s, Megatron's save {peer:.2f} s, ratio {mine / peer:.2f}")
        print(f"restore, every file's hash checked: {restore:.2f} s")


if __name__ == "__main__":
    main()
