"""``saving_jobs.py FOLDER SMALL_DISK``: saving and restoring a real NeMo model under every layout, full disk and kill -9.

One process forks the ranks of each job. Writes ``results.json``; the assertions are in
``test_saving.py``. SMALL_DISK is a folder on a file system with room for about one and a half checkpoints, or ``-``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forking import fork_ranks

FOLDER = Path(sys.argv[1])
LAYOUTS = {
    "data 2": (2, 1, 1, False),
    "tensor 2": (2, 2, 1, False),
    "pipeline 2": (2, 1, 2, False),
    "bf16, data 2": (2, 1, 1, True),
    "bf16, tensor 2": (2, 2, 1, True),
}
"""Ranks, tensor- and pipeline-parallel size, bf16 weights with fp32 copies in the optimizer (the setting for GPUs)."""
KILLS = 10


def launch(function: Callable[..., None], *arguments: Any, ranks: int = 1) -> list[int]:
    """Fork the ranks of one job."""
    return fork_ranks(lambda: function(*arguments), ranks)


def run(function: Callable[..., None], *arguments: Any, ranks: int = 1) -> None:
    statuses = [os.waitpid(pid, 0)[1] for pid in launch(function, *arguments, ranks=ranks)]
    assert not any(statuses), f"{function.__name__}{arguments}: {statuses}"


# --- jobs -----------------------------------------------------------------------------------------------------------


def convert() -> None:
    from tiny_hf import write_model

    from converters import hf_to_nemo

    hf = write_model(FOLDER / "hf", "qwen2", False)
    assert hf_to_nemo.main(["--input", str(hf), "--output", str(FOLDER / "model.nemo"), "--no-verify"]) == 0


def session(
    run_dir: Path,
    tensor: int = 1,
    pipeline: int = 1,
    half: bool = False,
    nemo: str = str(FOLDER / "model.nemo"),
    **checkpoint: Any,
) -> Any:
    from nemo_ampo.checkpoint.config import CheckpointConfig
    from nemo_ampo.checkpoint.nemo_file import unpack_assets
    from nemo_ampo.config.compose import compose
    from nemo_ampo.training.actor import AmpoActor
    from nemo_ampo.training.session import Keep, open_session, prepare_config

    parallel = [f"model.tensor_model_parallel_size={tensor}", f"model.pipeline_model_parallel_size={pipeline}"]
    parallel += ["trainer.precision=bf16", "model.megatron_amp_O2=true"] if half else []
    cfg = compose("ampo", "tiny", ["model.global_batch_size=8", "model.micro_batch_size=4", "run.dir=-", *parallel])
    prepare_config(cfg, run_dir, nemo, unpack_assets(nemo, FOLDER / "assets"), "cpu")
    keep = Keep(run_dir, CheckpointConfig(**checkpoint), {"run.seed": 1})
    return open_session(cfg, "reinforce", AmpoActor, nemo, 8, False, keep)


def train_step(s: Any, seed: int) -> None:
    """An optimizer step on drawn gradients."""
    import torch

    s.optimizer.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    for module in s.model.get_model_module_list():
        for p in module.parameters():
            p.main_grad.copy_(torch.randn(p.shape, generator=generator))
    s.optimizer.step()


def save(s: Any, step: int, **metrics: float) -> None:
    import torch

    counters = {k: torch.tensor(v) for k, v in (("step", step), ("consumed_samples", 8 * step), ("epoch", 0))}
    s.ckpt_callback.custom_save(counters | metrics)


def write(run_dir: Path, half: bool) -> None:
    s = session(run_dir, half=half)
    for step in (1, 2):
        train_step(s, step)
    save(s, 2, **{"reward/mean": 0.25})


def copy_on(run_dir: Path, tensor: int, pipeline: int, half: bool, step: int) -> None:
    """Restore and write again, under this layout."""
    s = session(run_dir, tensor, pipeline, half)
    assert s.resumed is not None and s.resumed.counters["step"] == step - 1
    save(s, step)


def restore_damaged(run_dir: Path, out: Path) -> None:
    """The newest of two checkpoints has a changed byte, then the older one lacks one."""
    import contextlib
    import io

    from nemo_ampo.errors import UserError

    *_, older, newest = sorted((run_dir / "checkpoints").glob("step-*"))
    file = newest / "optimizer" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        s = session(run_dir)
        step = s.resumed.counters["step"]
        os.truncate(older / "model_weights" / ".metadata", 10)
        try:
            s.ckpt_callback.restore()
        except UserError as error:
            refused = str(error)
    out.write_text(json.dumps({"step": step, "said": said.getvalue().splitlines(), "refused": refused}))


def start_from_packed(checkpoint: Path, out: Path) -> None:
    """A checkpoint packed as a ``.nemo`` file, opened by NeMo, against the same one restored."""
    from nemo_ampo.checkpoint.nemo_writing import pack_nemo

    pack_nemo(checkpoint, FOLDER / "packed.nemo", FOLDER / "assets")
    packed = session(FOLDER / "elsewhere", nemo=str(FOLDER / "packed.nemo"))
    weights = [p.clone() for p in _weights(packed)]
    packed.ckpt_callback.store.folder = checkpoint.parent
    assert packed.ckpt_callback.restore().counters["step"] == 2
    out.write_text(json.dumps(all(a.equal(b) for a, b in zip(weights, _weights(packed), strict=True))))


def compare(one: Path, other: Path, out: Path) -> None:
    """Tensor by tensor, in the layout-free form of the files."""
    import torch
    from megatron.core.dist_checkpointing import load_plain_tensors

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    equal, names = True, 0
    for part in ("model_weights", "optimizer"):
        a, b = (load_plain_tensors(str(folder / part)) for folder in (one, other))
        equal &= a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))
        names += sum(isinstance(v, torch.Tensor) for v in a.values())
    out.write_text(json.dumps({"equal": equal, "tensors": names}))


def fill_the_disk(run_dir: Path, disk: Path, out: Path) -> None:
    """Save until the disk is full, with and without looking at the free space first."""
    import contextlib
    import io

    from nemo_ampo.errors import UserError

    said, stopped = io.StringIO(), ""
    s = session(run_dir, dir=str(disk), max_failed_saves=3)
    metrics = []
    with contextlib.redirect_stderr(said):
        train_step(s, 1)
        save(s, 1)
        metrics.append(s.ckpt_callback.take_metrics())
        save(s, 2)  # refused: not enough room
        metrics.append(s.ckpt_callback.take_metrics())
        s.ckpt_callback._last_bytes = 1
        save(s, 3)  # believes there is room and runs into the wall
        metrics.append(s.ckpt_callback.take_metrics())
        try:
            save(s, 4)
        except UserError as error:
            stopped = str(error)
    if os.environ["RANK"] == "0":
        files = sorted(p.name for p in disk.iterdir())
        out.write_text(json.dumps({"said": said.getvalue(), "stopped": stopped, "metrics": metrics, "files": files}))


def restore_from_the_full_disk(run_dir: Path, disk: Path, out: Path) -> None:
    s = session(run_dir, dir=str(disk))
    out.write_text(json.dumps(s.resumed.counters))


def mark(s: Any, step: int) -> None:
    """Every weight is the step's number and every moment twice that."""
    import torch

    with torch.no_grad():
        for p in _weights(s):
            p.fill_(step)
        for t in _moments(s):
            t.fill_(2 * step)


def _weights(s: Any) -> list[Any]:
    return [p for m in s.model.get_model_module_list() for p in m.parameters()]


def _moments(s: Any) -> list[Any]:
    states = s.optimizer.mcore_optimizer.optimizer.state
    return [state[name] for state in states.values() for name in ("exp_avg", "exp_avg_sq")]


def save_for_ever(run_dir: Path, log: Path) -> None:
    """Restore and check what is there, then save until killed."""
    s = session(run_dir, keep_last=1, keep_best=0)
    step = s.resumed.counters["step"] if s.resumed else 0
    whole = not step or (all((p == step).all() for p in _weights(s)) and all((t == 2 * step).all() for t in _moments(s)))
    with log.open("a") as file:
        print(json.dumps({"restored": step, "whole": bool(whole)}), file=file, flush=True)
        if not step:
            train_step(s, 1)  # the optimizer's states exist from its first step on
        while True:
            step += 1
            mark(s, step)
            save(s, step)
            print(json.dumps({"saved": step}), file=file, flush=True)


def kill_a_save_loop(run_dir: Path, log: Path) -> None:
    draw = random.Random(3)
    for _ in range(KILLS + 1):
        (pid,) = launch(save_for_ever, run_dir, log)
        begin = len(log.read_text().splitlines()) if log.exists() else 0
        while len(log.read_text().splitlines() if log.exists() else []) < begin + 2:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the save loop ended by itself"
            time.sleep(0.01)
        time.sleep(draw.random() * 0.5)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def main() -> None:
    small_disk = sys.argv[2]
    from nemo_ampo import compat

    compat.setup("cpu")
    import nemo_ampo.training.actor
    import nemo_ampo.training.session  # noqa: F401 - imported once, before the forks

    run(convert)
    first = FOLDER / "first"
    run(write, first, False)
    run(write, FOLDER / "first bf16", True)
    results: dict[str, Any] = {}
    for name, (ranks, tensor, pipeline, half) in LAYOUTS.items():
        begin, there = FOLDER / "first bf16" if half else first, FOLDER / name
        shutil.copytree(begin, there)
        run(copy_on, there, tensor, pipeline, half, 3, ranks=ranks)
        run(copy_on, there, 1, 1, half, 4)
        run(compare, begin / "checkpoints/step-000002", there / "checkpoints/step-000004", FOLDER / "compared.json")
        manifest = json.loads((there / "checkpoints/step-000003/manifest.json").read_text())
        results[name] = json.loads((FOLDER / "compared.json").read_text()) | {"memory": manifest["memory"]}
    run(restore_damaged, FOLDER / "data 2", FOLDER / "damaged.json")
    results["damaged"] = json.loads((FOLDER / "damaged.json").read_text())
    run(start_from_packed, first / "checkpoints/step-000002", FOLDER / "packed.json")
    results["packed equals restored"] = json.loads((FOLDER / "packed.json").read_text())
    if small_disk != "-":
        run(fill_the_disk, FOLDER / "full", Path(small_disk) / "checkpoints", FOLDER / "full.json", ranks=2)
        results["full disk"] = json.loads((FOLDER / "full.json").read_text())
        run(restore_from_the_full_disk, FOLDER / "full", Path(small_disk) / "checkpoints", FOLDER / "after.json")
        results["after full disk"] = json.loads((FOLDER / "after.json").read_text())
    kill_a_save_loop(FOLDER / "killed", FOLDER / "killed.jsonl")
    results["killed"] = [json.loads(line) for line in (FOLDER / "killed.jsonl").read_text().splitlines()]
    (FOLDER / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
