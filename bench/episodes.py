"""SOTOPIA episodes against a server with a fixed latency: how close is a run to the ideal schedule?

    python bench/episodes.py --sotopia-dir DIR [--latency-ms 50] [--concurrency 64]

450 episodes of 20 turns in self-play, each scored once; speakers and judge answer by rule after ``--latency-ms``, in a
process of their own. Speakers and judge have ``--concurrency`` calls in flight each, and work beside each other. With T
turns, J judge calls, concurrency C and L turns in the longest dialogue the ideal run takes

    max(ceil(T / C) + 1, L + ceil(J / C))

latencies: the last dialogues to end are scored one latency after their last turn, and no scoring begins before a first
dialogue of L turns is over. Everything real is included: prompts, records on disk, reading replies. What a process does
once, loading libraries and reading the configuration, is not. With several ``--seeds`` the peak memory shows that it does
not grow with the number of episodes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import resource
import sys
import tempfile
import time
import urllib.request
from typing import Any

from _server import chat_server

from nemo_ampo.config.compose import compose
from nemo_ampo.config.reading import read_config
from nemo_ampo.sotopia.config import SotopiaConfig, check_sotopia
from nemo_ampo.sotopia.plan import EvaluationPlan, make_plan
from nemo_ampo.sotopia.run import evaluate

LONGEST_DIALOGUE = 20
LIBRARIES = ("nemo_ampo.chat.wire", "uvloop")


def plan(folder: str, url: str, args: argparse.Namespace, seeds: list[int]) -> EvaluationPlan:
    overrides = [
        *("episode.pairing=self_play", "partner.base_url=", "partner.model=", "policy.modes=true"),
        *(f"run.dir={folder}", f"run.seeds={seeds}", f"data.sotopia_dir={args.sotopia_dir}"),
        *(f"policy.base_url={url}", "policy.model=rule-speaker", f"policy.max_concurrency={args.concurrency}"),
        *(f"judge.base_url={url}", "judge.model=rule-judge", f"judge.max_concurrency={args.concurrency}"),
    ]
    config = read_config(compose("sotopia", "api", overrides), SotopiaConfig)
    check_sotopia(config)
    return make_plan(config)


def counts(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/counts") as answer:
        return json.load(answer)


def ideal_s(turns: int, judged: int, concurrency: int, latency_s: float) -> float:
    """Shortest time of all calls, seconds; see the formula above."""
    spoken, scored = math.ceil(turns / concurrency), math.ceil(judged / concurrency)
    return max(spoken + 1, LONGEST_DIALOGUE + scored) * latency_s


def load_libraries() -> float:
    """What the first call of a process would load; seconds it took."""
    started = time.perf_counter()
    for name in LIBRARIES:
        importlib.import_module(name)
    return time.perf_counter() - started


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
    print(f"start-up: {load_libraries():.2f} s for {', '.join(LIBRARIES)}", flush=True)
    with chat_server("episodes", f"--latency-ms={args.latency_ms}") as port, tempfile.TemporaryDirectory() as folder:
        url = f"http://127.0.0.1:{port}/v1"
        for done, seed in enumerate(args.seeds, start=1):
            planned = plan(folder, url, args, args.seeds[:done])
            before, cpu, started = counts(url), time.process_time(), time.perf_counter()
            outcome = evaluate(planned)
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
            after = counts(url)
            if not outcome.complete:
                sys.exit(f"{outcome.line()}: {outcome.failures}")
            models = ("rule-speaker", "rule-judge")
            turns, judged = (after["models"][model] - before["models"].get(model, 0) for model in models)
            server_cpu = after["processor_s"] - before["processor_s"]
            ideal = ideal_s(turns, judged, args.concurrency, args.latency_ms / 1000)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"seed {seed}: {turns} turns + {judged} judge calls in {wall:.2f} s; ideal {ideal:.2f} s; "
                f"ratio {wall / ideal:.2f}; processor time {cpu:.2f} s, of the server {server_cpu:.2f} s; "
                f"peak memory {memory:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
