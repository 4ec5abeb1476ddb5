"""Is every node of a job fit to train? Asked before any model loads, one process per rank.

    srun ... python -m nemo_ampo.job.preflight --shared RUN_DIR --token T ...

The first rank of each node looks at its machine: accelerators, free disk, the shared folder (the job's token must be there
to read, and a file of its own to write), versions, the rendezvous port on the first node, the judge and the rollout server.
Then all ranks meet in one sum over the job's own backend. A node that is not fit says so under its name and the job stops.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from typing import Any

from nemo_ampo.chat.config import api_url
from nemo_ampo.chat.proxies import opener_for, through
from nemo_ampo.output.terminal import printable_output
from nemo_ampo.overrides import typed_path
from nemo_ampo.text import one_line

NOT_FIT = 3
"""Exit status of a rank that found something wrong; torch and Slurm use others."""
TMP_GB = 1.0
"""For sockets, locks and compiled kernels: models, checkpoints and what is unpacked stand in the run folder."""


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when this rank, and as far as it knows the job, is fit."""
    parser = argparse.ArgumentParser(prog="python -m nemo_ampo.job.preflight", description=__doc__)
    parser.add_argument("--shared", type=typed_path, required=True, help="run folder on the shared file system")
    parser.add_argument("--token", required=True, help="text of <shared>/slurm/token, written by the batch script")
    parser.add_argument("--gpus", type=int, required=True, help="accelerators expected per node; 0 for CPU nodes")
    parser.add_argument("--run-gb", type=float, default=0.0, help="what the run folder must still hold")
    parser.add_argument("--judge-url", default="", help="base URL that every node must reach; empty asks nobody")
    parser.add_argument("--rollout-url", default="", help="URL of a rollout server, likewise")
    parser.add_argument("--needs", default="", help="module that a stage of the job imports")
    parser.add_argument("--timeout-s", type=float, default=90.0, help="of the collective")
    args = parser.parse_args(argv)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    begin = time.monotonic()
    wrong = list(problems(args, node)) if os.environ.get("LOCAL_RANK", "0") == "0" else []
    for problem in wrong:
        print(f"preflight: {node}: {problem}", file=sys.stderr, flush=True)
    if wrong:
        return NOT_FIT
    wrong = meet(node, args.timeout_s, args.gpus)
    for problem in wrong:
        print(f"preflight: {problem}", file=sys.stderr, flush=True)
    if not wrong and os.environ.get("RANK", "0") == "0":
        kind = f"{args.gpus} GPUs each" if args.gpus else "CPU"
        ranks = os.environ.get("WORLD_SIZE", "1")
        print(f"preflight: ok: {ranks} ranks, {kind}, {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
    return NOT_FIT if wrong else 0


def problems(args: argparse.Namespace, node: str) -> Iterator[str]:
    """What is wrong with this node, in words."""
    yield from _shared_folder(args.shared, args.token, node)
    yield from _disk(args.shared, args.run_gb, "are what the run may still write there (AMPO_MIN_FREE_GB)")
    yield from _disk(
        Path(os.environ.get("TMPDIR", "/tmp")), TMP_GB, "are needed; set TMPDIR to a folder with room", "TMPDIR: "
    )
    yield from _accelerators(args.gpus)
    if args.needs and importlib.util.find_spec(args.needs) is None:
        yield f"{args.needs}, the AMPO stage's engine, is not installed; take an image that has it, or another engine"
    if os.environ.get("RANK", "0") == "0":
        yield from _port(int(os.environ.get("MASTER_PORT", "0")))
    if args.judge_url:
        yield from _answers("judge", args.judge_url, "models")
    if args.rollout_url:
        yield from _answers("rollout server", args.rollout_url, "state", inside=True)


def _shared_folder(shared: Path, token: str, node: str) -> Iterator[str]:
    try:
        seen = (shared / "slurm" / "token").read_text(encoding="utf-8").strip()
    except OSError as error:
        yield f"cannot read {shared}, is it on a file system that all nodes share? ({error.strerror})"
        return
    if seen != token:
        yield f"{shared} is not the folder the job sees (its slurm/token differs); run_dir must be shared by all nodes"
        return
    probe = shared / "slurm" / f".probe-{node}"
    try:
        probe.write_text(token, encoding="utf-8")
        probe.unlink()
    except OSError as error:
        yield f"cannot write to {shared} ({error.strerror})"


def _disk(folder: Path, wanted_gb: float, why: str, of: str = "") -> Iterator[str]:
    try:
        free_gb = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        yield f"{of}cannot look at {folder} ({error.strerror})"
        return
    if free_gb < wanted_gb:
        yield f"{free_gb:.1f} GB free in {folder}, {wanted_gb:g} {why}"


def _accelerators(expected: int) -> Iterator[str]:
    import torch

    found = torch.cuda.device_count()
    if found < expected:
        yield f"{found} GPUs visible, {expected} expected (AMPO_GPUS_PER_NODE)"


def _port(port: int) -> Iterator[str]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            yield f"MASTER_PORT {port} cannot be used ({error.strerror}); set AMPO_PORT"


def _answers(name: str, base_url: str, path: str, *, inside: bool = False) -> Iterator[str]:
    """Whether a server is there; one of the job itself (``inside``) is never asked through a proxy."""
    url = api_url(base_url, path)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({})) if inside else opener_for(url)
    try:
        opener.open(url, timeout=20).close()
    except urllib.error.HTTPError:
        return  # It answers; whether it lets us in is checked with the key, by the stage itself.
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            return  # It answers; whether it is believed is checked with the stage's ca_file.
        yield f"{name} {base_url} cannot be reached{'' if inside else through(url)} ({one_line(str(error))})"


def fingerprint() -> dict[str, Any]:
    """Versions that must be equal on all nodes; of this project also the text of its sources."""
    import nemo_ampo
    from nemo_ampo.compat.versions import EXPECTED, installed

    digest = hashlib.sha256()
    root = Path(nemo_ampo.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    packages = {name: installed(name) for name in (*EXPECTED, "torch", "transformers")}
    return {"python": sys.version.split()[0], "nemo-ampo sources": digest.hexdigest()[:12], **packages}


def meet(node: str, timeout_s: float, gpus: int) -> list[str]:
    """One sum over all ranks and a comparison of versions; what is wrong, in words, the same on every rank."""
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    timeout = timedelta(seconds=timeout_s)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, rank == 0, timeout, wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        return [f"{node}: rank {rank} cannot reach {where}: {_first_line(error)}"]
    mine = json.dumps({"node": node, "versions": fingerprint()})
    store.set(f"rank{rank}", mine)
    present, absent = _everyone(store, size, timeout_s)
    if absent:
        return [f"no word from ranks {', '.join(map(str, absent))} within {timeout_s:g} s"] if rank == 0 else []
    odd = different(present)
    if odd:
        return odd if rank == 0 else []
    try:
        dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        value = torch.tensor([float(rank + 1)], device="cuda" if gpus else "cpu")
        dist.all_reduce(value)
        dist.barrier()
        total = value.item()
    except RuntimeError as error:
        return [f"{node}: rank {rank}: collective over {size} ranks failed: {_first_line(error)}"]
    finally:
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group()
    expected = size * (size + 1) / 2
    return [] if total == expected else [f"{node}: rank {rank}: the sum over all ranks is {total:g}, not {expected:g}"]


def different(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Nodes whose versions are not those of most nodes (among equals: of the first node)."""
    by_node = {report["node"]: report["versions"] for report in reports}
    texts = [json.dumps(versions, sort_keys=True) for versions in by_node.values()]
    usual = json.loads(max(texts, key=texts.count))
    return [
        f"{node}: {name} is {versions.get(name)}, elsewhere {usual[name]}"
        for node, versions in by_node.items()
        for name in usual
        if versions.get(name) != usual[name]
    ]


def _everyone(store: Any, size: int, timeout_s: float) -> tuple[list[dict[str, Any]], list[int]]:
    end = time.monotonic() + timeout_s
    waiting, found = set(range(size)), {}
    while waiting and time.monotonic() < end:
        for rank in sorted(waiting):
            if store.check([f"rank{rank}"]):
                found[rank] = json.loads(store.get(f"rank{rank}"))
                waiting.discard(rank)
        time.sleep(0.05)
    return [found[rank] for rank in sorted(found)], sorted(waiting)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
