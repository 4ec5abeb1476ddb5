"""The judge's figures and the alarms of a run, in words: what a reader should see before any curve."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_ampo.reply.modes import MODES
from nemo_ampo.report.training.metrics_log import MetricsLog, Series


@dataclass(frozen=True)
class Tile:
    """One tile of the judge panel.

    Attributes:
        title: what is counted.
        value: since the run began.
        note: what the number is made of.
        bad: it deserves a look.
    """

    title: str
    value: str
    note: str
    bad: bool = False


def judge_figures(log: MetricsLog) -> list[Tile]:
    """Verdicts, calls, retries by cause, parse failures, cache hits, latency, tokens and cost, as of the last step.

    Empty for a log without the judge's counts.
    """
    if not log.series("judge/requests"):
        return []
    requests, calls = _last(log, "judge/requests"), _last(log, "judge/calls")
    failures, retries = _by_cause(log, "judge/failures/"), _by_cause(log, "judge/retries/")
    hits, unreadable = _last(log, "judge/cache_hits"), _last(log, "judge/parse_failures")
    prompt, completion = _last(log, "judge/prompt_tokens"), _last(log, "judge/completion_tokens")
    cost = _last(log, "judge/cost_usd")
    p50, p95 = log.series("judge/latency_p50_s"), log.series("judge/latency_p95_s")
    failed = sum(failures.values())
    return [
        Tile("Verdicts", count(_last(log, "judge/verdicts")), f"of {count(requests)} asked for"),
        Tile("Failed for good", count(failed), _words(failures) or "none", bad=failed > 0),
        Tile("Calls", count(calls), f"{count(sum(retries.values()))} of them repeated"),
        Tile("Retries by cause", count(sum(retries.values())), _words(retries) or "none"),
        Tile("Parse failures", count(unreadable), f"{_share(unreadable, calls)} of the calls", bad=unreadable > 0),
        Tile("Cache hits", count(hits), f"{_share(hits, hits + calls)} of the replies"),
        Tile("Latency of a call", seconds(p50), f"median; 95th percentile {seconds(p95)}"),
        Tile("Tokens", count(prompt + completion), f"{count(prompt)} in, {count(completion)} out"),
        Tile("Cost", f"${cost:,.2f}", "" if cost else "no price known for the model"),
    ]


def alarms(log: MetricsLog) -> list[str]:
    """What went wrong in a run, one sentence each."""
    found = []
    collapsed = log.series("guard/collapsed_modes")
    if any(collapsed.values):
        found.append(_collapse(log, collapsed))
    skipped = log.series("policy/skipped_updates")
    if any(skipped.values):
        found.append(f"{count(sum(skipped.values))} updates were skipped because a gradient was not finite.")
    mismatch = log.series("guard/mismatch_steps")
    if any(mismatch.values):
        worst = max(log.series("mismatch/kl").values, default=math.nan)
        found.append(
            f"Engine and trainer disagreed beyond guard.max_mismatch_kl at {count(sum(v > 0 for v in mismatch.values))} "
            f"steps; the largest mismatch/kl was {worst:.3g}."
        )
    masked, groups = sum(log.counts("guard/masked_samples").values), sum(log.counts("guard/skipped_groups").values)
    if masked:
        also = f", and {count(groups)} groups were left out because too little of them remained" if groups else ""
        found.append(f"{count(masked)} samples have no verdict and were left out of the training{also}.")
    unkept = _last(log, "judge/cache_failures")
    if unkept:
        found.append(f"{count(unkept)} replies of the judge could not be kept in judge.cache; a repetition asks again.")
    if _last(log, "judge/spent_failures"):
        found.append("What was spent could not be written at times; a run started again counts from older figures.")
    rounds = sum(log.counts("guard/judge_rounds").values)
    if rounds:
        found.append(f"The judge was out so often that {count(rounds)} further rounds of asking were needed.")
    return found


def _collapse(log: MetricsLog, collapsed: Series) -> str:
    """Which modes were under alarm: at the last alarmed step, those with the longest streaks."""
    step, number = [(s, n) for s, n in zip(collapsed.steps, collapsed.values, strict=True) if n][-1]
    streak = {k: dict(_points(log.series(f"guard/mode_{k}_low_steps"))).get(step, 0.0) for k in MODES}
    modes = sorted(sorted(MODES, key=lambda k: -streak[k])[: int(number)])
    begun = min(s for s, n in zip(collapsed.steps, collapsed.values, strict=True) if n)
    names = " and ".join(f"mode {k}" for k in modes)
    over = "" if collapsed.values[-1] else f", until step {step}"
    return f"{names[0].upper()}{names[1:]} had almost died out by step {begun}{over} (guard.min_mode_share)."


def _points(series: Series) -> list[tuple[int, float]]:
    return list(zip(series.steps, series.values, strict=True))


def _last(log: MetricsLog, name: str) -> float:
    values = log.series(name).values
    return values[-1] if values else 0.0


def _by_cause(log: MetricsLog, prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix).replace("_", " "): _last(log, name) for name in log.names(prefix)}


def _words(counts: dict[str, float]) -> str:
    return ", ".join(f"{cause} {count(n)}" for cause, n in sorted(counts.items(), key=lambda item: -item[1]))


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "0%"


def count(number: float) -> str:
    """A count for reading: 950, 12,345, 1.23 M."""
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:.3g} M"


def seconds(series: Series) -> str:
    """The last value of a series of seconds."""
    return f"{series.values[-1]:.2g} s" if series else "unknown"
