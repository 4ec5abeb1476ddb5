"""How fast is the judge client? A local server answers after a fixed time; every line is a ratio measured in one run.

1. Limiter: 1,000 calls of 2 s at 64 slots, against the ideal ceil(1000 / 64) x 2 s, and of 0.2 s, which no judge takes;
   beside it the same calls through a pool of 30 processes, as the reference implementation makes them.
2. Overlap: 256 calls beside a generation loop that uses the processor; what the judge adds to the loop's time, as a share
   of what it takes when it starts after the loop. ``--full`` uses calls of 5 s instead of 0.5 s.
3. Broker: leave to call, granted within the process and by the main rank over TCP.

The exit status is 1 where calls of 2 s take more than MOST_TO_IDEAL of the ideal, or those of 5 s add more than MOST_ADDED.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor

from _server import chat_server

from nemo_ampo.chat.broker import Broker, BrokerClient
from nemo_ampo.chat.limiter import Limiter, LocalLimiter
from nemo_ampo.chat.limits import Limits
from nemo_ampo.judge.background import JudgeThread
from nemo_ampo.judge.client import Judge
from nemo_ampo.judge.config import JudgeConfig
from nemo_ampo.types import JudgeRequest

SLOTS = 64
MOST_TO_IDEAL, MOST_ADDED = 1.05, 0.35
REFERENCE_PROCESSES = 30
CALIBRATION_S, ROUNDS = 2.0, 3
LONGER = 1.2
"""Generation by judging: a shorter one would leave verdicts to wait for, however well the two overlap."""
# One thread generates, as on a rank of the recipes on a CPU. The server, in a real run elsewhere, has the other core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def request(number: int) -> JudgeRequest:
    dialogue = "\n\n".join(f'Turn {k}: Ada said: "Could I have the car for day {number}, please?"' for k in range(12))
    return JudgeRequest(dialogue, "Ada", "Ben", "Borrow the car for the weekend.", "Keep the car without a quarrel.")


def config(port: int, latency_s: float) -> JudgeConfig:
    # The latency stands in the path, so that one server serves all parts.
    return JudgeConfig(f"http://127.0.0.1:{port}/{latency_s}", "bench", max_concurrency=SLOTS)


async def ours(settings: JudgeConfig, calls: int, limiter: Limiter | None = None) -> float:
    async with Judge(settings, limiter=limiter) as judge:
        await judge.score(request(0))  # imports and the first connection
        begin = time.monotonic()
        await asyncio.gather(*[judge.score(request(n)) for n in range(calls)])
        return time.monotonic() - begin


async def bare(port: int, calls: int, latency_s: float) -> float:
    """The floor: prepared bytes over 64 open connections, answers not looked at."""
    body = json.dumps({"messages": [{"role": "user", "content": request(0).dialogue * 3}]}).encode()
    head = f"POST /{latency_s}/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n"
    left = iter(range(calls))

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in left:
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
        writer.close()

    begin = time.monotonic()
    await asyncio.gather(*[connection() for _ in range(SLOTS)])
    return time.monotonic() - begin


def reference_call(arguments: tuple[str, int]) -> None:
    """One blocking call over a connection of its own, as a worker of the reference's pool makes it."""
    url, number = arguments
    body = json.dumps({"model": "bench", "messages": [{"role": "user", "content": request(number).dialogue}]}).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", body, headers)) as response:
        json.load(response)


def reference_pool(settings: JudgeConfig, calls: int) -> float:
    with ProcessPoolExecutor(REFERENCE_PROCESSES, multiprocessing.get_context("forkserver")) as pool:
        work = [(settings.base_url, number) for number in range(calls)]
        list(pool.map(reference_call, work[:REFERENCE_PROCESSES]))  # start the processes
        begin = time.monotonic()
        list(pool.map(reference_call, work))
        return time.monotonic() - begin


def limiter_part(port: int, calls: int, latency_s: float) -> float:
    """Prints ratios to the ideal; returns the larger one of this client's two."""
    settings, ideal_s = config(port, latency_s), math.ceil(calls / SLOTS) * latency_s
    print(f"limiter   {calls} calls of {latency_s * 1000:.0f} ms, {SLOTS} slots, ideal {ideal_s:.2f} s")
    ratios = {
        "bare sockets, same server": asyncio.run(bare(port, calls, latency_s)) / ideal_s,
        "this client": asyncio.run(ours(settings, calls)) / ideal_s,
        "this client, limits of a job": asyncio.run(through_broker(settings, calls)) / ideal_s,
        f"{REFERENCE_PROCESSES} blocking processes": reference_pool(settings, calls) / ideal_s,
    }
    for name, ratio in ratios.items():
        print(f"  {name:30} {ratio * ideal_s:6.2f} s   {ratio:5.2f} x ideal", flush=True)
    return max(ratio for name, ratio in ratios.items() if name.startswith("this client"))


async def through_broker(settings: JudgeConfig, calls: int) -> float:
    broker = await asyncio.to_thread(Broker, LocalLimiter(Limits.of(settings)), None, "bench")
    try:
        return await ours(settings, calls, BrokerClient("127.0.0.1", broker.port, "bench"))
    finally:
        await asyncio.to_thread(broker.close)


class Generation:
    """Stands for decoding: matrix products as torch does them, and some Python between them."""

    def __init__(self) -> None:
        import numpy

        self._state = numpy.full((256, 256), 0.01, dtype=numpy.float32)

    def run(self, slices: int) -> None:
        for _ in range(slices):
            self._state = (self._state @ self._state).clip(-1, 1)
            sum(range(2000))

    def slices_for(self, seconds: float) -> int:
        self._slices_per_s()  # a processor that was idle begins slowly
        return max(1, round(seconds * self._slices_per_s()))

    def _slices_per_s(self) -> float:
        begin, slices = time.monotonic(), 0
        while time.monotonic() - begin < CALIBRATION_S:
            self.run(50)
            slices += 50
        return slices / (time.monotonic() - begin)


def overlap_part(port: int, latency_s: float) -> float:
    """256 replies that end evenly over a generation a little longer than the judging.

    The speed of a shared machine changes from minute to minute: a generation beside the judge is compared with the mean of
    those alone before and after it. Returns the share that the judge added.
    """
    calls, settings, generation = 256, config(port, latency_s), Generation()
    slices = generation.slices_for(LONGER * math.ceil(calls / SLOTS) * latency_s / calls)

    def generate(judge: JudgeThread | None = None) -> tuple[float, float]:
        """Seconds of the generation, and of the wait for the last verdict after it."""
        futures, begin = [], time.monotonic()
        for number in range(calls):
            generation.run(slices)
            if judge is not None:
                futures.append(judge.submit(request(number)))
        generated = time.monotonic()
        for future in futures:
            future.result()
        return generated - begin, time.monotonic() - generated

    with JudgeThread(Judge(settings)) as judge:
        judge.submit(request(0)).result()
        begin = time.monotonic()
        judge.score_all(request(n) for n in range(calls))
        judge_s = time.monotonic() - begin
        alone, beside = [generate()[0]], []
        for _ in range(ROUNDS):
            beside.append(generate(judge))
            alone.append(generate()[0])
    added = [
        generated + waited - statistics.mean(pair)
        for (generated, waited), pair in zip(beside, itertools.pairwise(alone), strict=True)
    ]
    shares = [seconds / judge_s for seconds in added]
    waited_s = statistics.median(waited for _, waited in beside)
    length = f"{min(alone):.1f} to {max(alone):.1f} s"
    print(f"overlap   {calls} calls of {latency_s:g} s, {SLOTS} slots, beside {length} of generation")
    print(f"  the judge, after it            {judge_s:6.2f} s")
    print(
        f"  the judge, beside it           {statistics.median(added):6.2f} s more; {statistics.median(shares):.0%} of the "
        f"serial time ({min(shares):.0%} to {max(shares):.0%})"
    )
    print(f"  of it, after the last reply    {waited_s:6.2f} s; {waited_s / judge_s:.0%}; one call takes {latency_s:g} s")
    return statistics.median(shares)


def broker_part(times: int) -> None:
    async def per_lease(limiter: Limiter) -> float:
        limiter.settle(await limiter.acquire(1, 0.0), 1, 0.0)
        begin = time.monotonic()
        for _ in range(times):
            limiter.settle(await limiter.acquire(1, 0.0), 1, 0.0)
        return (time.monotonic() - begin) / times

    async def remote() -> float:
        broker = await asyncio.to_thread(Broker, LocalLimiter(Limits(SLOTS)), None, "bench")
        client = BrokerClient("127.0.0.1", broker.port, "bench")
        try:
            return await per_lease(client)
        finally:
            await client.aclose()
            await asyncio.to_thread(broker.close)

    local_s, remote_s = asyncio.run(per_lease(LocalLimiter(Limits(SLOTS)))), asyncio.run(remote())
    print(
        f"broker    leave to call: {local_s * 1e6:.0f} us in the process, {remote_s * 1e6:.0f} us from the main rank, ",
        end="",
    )
    print(f"{remote_s / 0.2:.2%} of a call of 200 ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="calls of 5 s in the overlap part (three minutes)")
    parser.add_argument("--calls", type=int, default=1000, help="of the limiter part")
    arguments = parser.parse_args()
    with chat_server("verdicts") as port:
        kept = limiter_part(port, arguments.calls, 2.0) <= MOST_TO_IDEAL
        limiter_part(port, arguments.calls, 0.2)
        added = overlap_part(port, 5.0 if arguments.full else 0.5)
        broker_part(2000)
    if not kept or (arguments.full and added > MOST_ADDED):
        sys.exit(f"judge: more than {MOST_TO_IDEAL} x ideal, or more than {MOST_ADDED:.0%} beside a generation")


if __name__ == "__main__":
    main()
