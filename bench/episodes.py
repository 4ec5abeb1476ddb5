"""SOTOPIA episodes against a server with a fixed latency: how close is a run to the ideal schedule?

    python -m bench.episodes --sotopia-dir DIR [--latency-ms 50] [--concurrency 64]

450 episodes of 20 turns in self-play, each scored once; speakers and judge answer by rule after ``--latency-ms``, in a
process of their own. The ideal run keeps ``--concurrency`` calls in flight from the first to the last; it ends after
ceil(calls / concurrency) latencies, but not before one episode is played and scored. Everything real is included:
prompts, records on disk, reading replies. With several ``--seeds`` the peak memory shows that it does not grow with the
number of episodes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from nemo_ampo.compose import compose
from nemo_ampo.config import read_config
from nemo_ampo.serve.local import server_process
from nemo_ampo.sotopia.config import SotopiaConfig, check_sotopia
from nemo_ampo.sotopia.plan import make_plan
from nemo_ampo.sotopia.run import evaluate

SERVER = Path(__file__).resolve().parent.parent / "tests" / "support" / "rule_server.py"


def run(folder: str, url: str, args: argparse.Namespace, seeds: list[int]) -> None:
    overrides = [
        *("episode.pairing=self_play", "partner.base_url=", "partner.model=", "policy.modes=true"),
        *(f"run.dir={folder}", f"run.seeds={seeds}", f"data.sotopia_dir={args.sotopia_dir}"),
        *(f"policy.base_url={url}", "policy.model=rule-speaker", f"policy.max_concurrency={args.concurrency}"),
        *(f"judge.base_url={url}", "judge.model=rule-judge", f"judge.max_concurrency={args.concurrency}"),
    ]
    config = read_config(compose("sotopia", "api", overrides), SotopiaConfig)
    check_sotopia(config)
    outcome = evaluate(make_plan(config))
    if not outcome.complete:
        sys.exit(f"{outcome.line()}: {outcome.failures}")


def counts(url: str) -> dict[str, int]:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/counts") as answer:
        return json.load(answer)["models"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sotopia-dir", default=os.environ.get("SOTOPIA_DIR"), help="default: $SOTOPIA_DIR")
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="all episodes once for each")
    args = parser.parse_args()
    if args.sotopia_dir is None:
        print("episodes: not run; it needs a SOTOPIA folder, --sotopia-dir or SOTOPIA_DIR")
        return
    command = [sys.executable, str(SERVER), "--latency-ms", str(args.latency_ms), "--patience", "100"]
    with (
        server_process(command, what="the rule server", start_timeout_s=60) as url,
        tempfile.TemporaryDirectory() as folder,
    ):
        for done, seed in enumerate(args.seeds, start=1):
            before, cpu, started = counts(url), time.process_time(), time.perf_counter()
            run(folder, url, args, args.seeds[:done])
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
            turns, judged = (counts(url)[model] - before.get(model, 0) for model in ("rule-speaker", "rule-judge"))
            rounds = max(math.ceil((turns + judged) / args.concurrency), 21)
            ideal = rounds * args.latency_ms / 1000
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"seed {seed}: {turns} turns + {judged} judge calls in {wall:.2f} s; ideal {ideal:.2f} s; "
                f"ratio {wall / ideal:.2f}; own processor time {cpu:.2f} s; peak memory {memory:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
