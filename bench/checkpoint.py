"""Seconds per checkpoint, ours against Megatron's own ``dist_checkpointing.save`` of the same state, taking turns.

A model of SmolLM2's width with 8 of its 30 layers (28 M parameters, 0.45 GB of fp32 state) on one process. Ours also hashes
every file, flushes it to the disk, writes the manifest and applies the retention rules. Prints figures; asserts nothing.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _tiny_session import open_tiny

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TURNS = 5


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def open_model(folder: Path) -> Any:
    """A session that saves, with optimizer states in place."""
    session, _ = open_tiny(folder, saves=True, hidden=576, layers=8, heads=9, kv_heads=3, ffn=1536)
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
