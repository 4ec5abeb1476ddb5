"""Which metric goes on which chart: one function per panel, from a log to a drawn chart with its legend.

A panel whose metrics were never logged is None, and the page says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_ampo.reply.modes import MODES
from nemo_ampo.report.plots import SERIES_COLOURS, Layer, Line, area_chart, bar_chart, line_chart
from nemo_ampo.report.training.metrics_log import MetricsLog, Series

BROKEN = "broken format"
_MODE_TERM_LABELS = {
    "branch_reward": "active, by reward",
    "branch_length": "active, by length",
    "invalid_sample": "off: a broken reply",
    "mode_absent": "off: a mode unused",
    "mode_too_small": "off: a mode used once",
    "one_mode": "off: one mode only",
    "group_of_one": "off: group of one",
    "no_valid_sample": "off: no verdict",
    "off": "off: not AMPO",
}
"""Reasons of :class:`nemo_ampo.algo.advantage.ModeTerm` in a reader's words."""

MAX_TURNS = 24
"""Bars of the chart by turn."""

MAX_TAGS = 6
"""Labels drawn beside the overall line; there are as many colours."""


@dataclass(frozen=True)
class LegendEntry:
    """One colour of a chart.

    Attributes:
        label: what it stands for.
        colour: CSS variable without its dashes.
        change: ``first -> last``, means over the first and last tenth of the points.
    """

    label: str
    colour: str
    change: str


@dataclass(frozen=True)
class Chart:
    """A drawn panel.

    Attributes:
        title: what it shows.
        unit: of the vertical axis.
        svg: trusted markup, made of numbers only.
        legend: in drawing order.
    """

    title: str
    unit: str
    svg: str
    legend: tuple[LegendEntry, ...]


# --- AMPO -----------------------------------------------------------------------------------------


def reward(log: MetricsLog) -> Chart | None:
    """Mean reward: all prompts, and each label."""
    return _lines("Reward", "mean of a step", [Line("all", "text", log.series("reward/mean")), *_tags(log, "reward")])


def reward_parts(log: MetricsLog) -> Chart | None:
    """The two factors of a good reply's reward."""
    lines = [
        Line("goal", "series-1", log.series("reward/goal")),
        Line("answer length", "series-2", log.series("reward/length")),
    ]
    return _lines("Parts of the reward", "0..1; goal 0.5 means no change", lines)


def response_tokens(log: MetricsLog) -> Chart | None:
    """Length of replies and of spoken answers."""
    lines = [
        Line("response", "text", log.series("tokens/response")),
        Line("answer", "series-1", log.series("tokens/answer")),
    ]
    return _lines("Tokens", "mean per reply", lines, bottom=0)


def mode_tokens(log: MetricsLog) -> Chart | None:
    """Length of replies by mode."""
    return _lines("Tokens by mode", "mean per reply", _modes(log, "mode/{}/tokens"), bottom=0)


def mode_rewards(log: MetricsLog) -> Chart | None:
    """Reward by mode."""
    return _lines("Reward by mode", "mean of a step", _modes(log, "mode/{}/reward"))


def format_failures(log: MetricsLog) -> Chart | None:
    """Replies without a usable answer."""
    lines = [
        Line("break the grammar", "bad", log.series("format/failed_fraction")),
        Line("cut at the token limit", "series-2", log.series("format/cut_fraction")),
    ]
    return _lines("Broken replies", "share of samples", lines, percent=True, bottom=0)


def mode_shares(log: MetricsLog) -> list[Chart]:
    """Stacked share of the modes: all prompts, then each label."""
    panels = [("Modes, all prompts", "mode/{}/share")]
    panels += [(f"Modes, {tag}", f"tag/{tag}/mode/{{}}/share") for tag in tags_of(log)]
    charts = [_mode_share(log, title, pattern) for title, pattern in panels]
    return [chart for chart in charts if chart is not None]


def mode_term(log: MetricsLog) -> Chart | None:
    """In which groups the mode-level advantage was active, and why not in the others; shares of groups."""
    active = log.series("mode_term/active_fraction")
    reasons = [n.removeprefix("mode_term/") for n in log.names("mode_term/") if n != "mode_term/active_fraction"]
    why_not = [r for r in sorted(reasons) if r != "active" and not r.startswith("branch_")]
    counts = {r: log.counts(f"mode_term/{r}").values for r in ("active", "branch_reward", "branch_length", *why_not)}
    groups = [sum(column) for column in zip(counts["active"], *(counts[r] for r in why_not), strict=True)]
    if not active or not all(groups):
        return None
    colours = {"branch_reward": "series-1", "branch_length": "series-2"}
    neutral = iter(("series-4", "series-5", "series-6", "series-7", "series-3", "muted"))
    layers = [
        Layer(
            _MODE_TERM_LABELS.get(reason, reason.replace("_", " ")),
            colours.get(reason) or next(neutral),
            tuple(count / total for count, total in zip(counts[reason], groups, strict=True)),
        )
        for reason in ("branch_reward", "branch_length", *why_not)
        if any(counts[reason])
    ]
    return _areas("Mode-level advantage", "share of groups", log.counts("mode_term/active").steps, layers, percent=True)


def mode_advantages(log: MetricsLog) -> Chart | None:
    """What the update was told about each mode."""
    return _lines("Advantage by mode", "mean of a step", _modes(log, "mode/{}/advantage"))


def reward_spread(log: MetricsLog) -> Chart | None:
    """How different the replies to one prompt are; at 0 nothing can be learned."""
    line = Line("within a group", "series-1", log.series("reward/std_within_group"))
    return _lines("Reward spread", "standard deviation", [line], bottom=0)


def kl(log: MetricsLog) -> Chart | None:
    """Distance to the reference policy."""
    return _lines("KL to the reference", "nats per token", [Line("policy", "series-1", log.series("policy/kl"))])


def entropy(log: MetricsLog) -> Chart | None:
    """Spread of the next-token distribution."""
    return _lines("Entropy", "nats per token", [Line("policy", "series-1", log.series("policy/entropy"))], bottom=0)


def grad_norm(log: MetricsLog) -> Chart | None:
    """Gradient norm before clipping."""
    line = Line("before clipping", "series-1", log.series("policy/grad_norm"))
    return _lines("Gradient norm", "L2", [line], bottom=0)


def mode_entropy(log: MetricsLog) -> Chart | None:
    """How undecided the policy is about its mode, for one prompt and over all of them."""
    lines = [
        Line("over all prompts", "text", log.series("mode/entropy_overall")),
        Line("for one prompt", "series-1", log.series("mode/entropy")),
        Line("decided by the prompt", "series-2", log.series("mode/adaptivity")),
    ]
    return _lines("Entropy of the mode", "nats; 1.39 means all four alike", lines, bottom=0)


def modes_by_turn(log: MetricsLog) -> Chart | None:
    """Share of the modes at each turn of the dialogues, over the last quarter of the steps."""
    names = [n.split("/")[1] for n in log.names("turn/") if n.endswith("/samples")]
    turns = sorted(int(name) for name in names)[:MAX_TURNS]
    steps = log.counts("reward/mean").steps
    if not turns or not steps:
        return None
    late = steps[-max(1, len(steps) // 4) :][0]
    counts: list[float] = []
    shares: dict[int, list[float]] = {k: [] for k in MODES}
    for turn in turns:
        samples = log.counts(f"turn/{turn}/samples")
        weights = [n if step >= late else 0.0 for step, n in zip(samples.steps, samples.values, strict=True)]
        counts.append(sum(weights))
        for k in MODES:
            at_steps = log.counts(f"turn/{turn}/mode/{k}/share").values
            total = sum(w * share for w, share in zip(weights, at_steps, strict=True))
            shares[k].append(total / counts[-1] if counts[-1] else 0.0)
    layers = [Layer(f"mode {k}", f"mode-{k}", tuple(shares[k])) for k in MODES]
    broken = tuple(max(0.0, 1.0 - sum(shares[k][i] for k in MODES)) if counts[i] else 0.0 for i in range(len(turns)))
    layers.append(Layer(BROKEN, "bad", broken))
    legend = tuple(LegendEntry(layer.label, layer.colour, "") for layer in layers if any(layer.values))
    labels = [str(turn) for turn in turns]
    return Chart("Modes by turn", "turn of the dialogue; last quarter of the run", bar_chart(labels, layers), legend)


def judge_latency(log: MetricsLog) -> Chart | None:
    """Seconds of one HTTP call to the judge, and until a verdict is there."""
    lines = [
        Line("a call, median", "series-1", log.series("judge/latency_p50_s")),
        Line("a call, 95th percentile", "series-2", log.series("judge/latency_p95_s")),
        Line("reply to verdict, median", "series-3", log.series("judge/wait_p50_s")),
        Line("reply to verdict, 95th percentile", "text", log.series("judge/wait_p95_s")),
    ]
    return _lines("Latency", "seconds; reply to verdict includes retries and queueing", lines, bottom=0)


def judge_retries(log: MetricsLog) -> Chart | None:
    """Repeated calls of each step, by cause."""
    if not log.series("judge/calls"):
        return None
    colours = iter((*SERIES_COLOURS, "muted"))
    causes = {name: _increments(log.counts(name)) for name in log.names("judge/retries/")}
    layers = [
        Layer(name.removeprefix("judge/retries/").replace("_", " "), next(colours, "grid"), values)
        for name, values in causes.items()
    ]
    steps = log.counts("judge/calls").steps
    return _areas("Repeated calls", "per step, by cause", steps, layers or [Layer("none", "series-1", (0.0,) * len(steps))])


def left_out(log: MetricsLog) -> Chart | None:
    """Samples that a step does not learn from because of the judge."""
    lines = [
        Line("no verdict", "bad", log.series("guard/masked_samples")),
        Line("in a group too small", "series-2", log.series("guard/skipped_samples")),
    ]
    if not any(line.series for line in lines):
        return _lines(
            "Judge failures", "share of verdicts", [Line("failed", "bad", log.series("judge/failed_fraction"))], True, 0
        )
    return _lines("Samples left out", "per step", lines, bottom=0)


def judge_cost(log: MetricsLog) -> Chart | None:
    """What the judge has cost since the run began, where prices are known."""
    cost = log.series("judge/cost_usd")
    if not any(cost.values):
        return None
    return _lines("Cost of the judge", "dollars since the run began", [Line("total", "series-1", cost)], bottom=0)


def mismatch(log: MetricsLog) -> Chart | None:
    """Whether the rollout engine samples from the policy that is trained."""
    line = Line("KL(engine, trainer)", "series-1", log.series("mismatch/kl"))
    if not line.series:  # an older log
        line = Line("mean |difference|", "series-1", log.series("engine/logprob_gap"))
    return _lines("Engine against trainer", "nats per token", [line])


def phases(log: MetricsLog) -> Chart | None:
    """Where the seconds of a step go."""
    total = log.series("time/step_s")
    if not total:
        return None
    names = [name for name in log.names("time/") if name != "time/step_s"]
    parts = {name: _at(log.series(name), total.steps) for name in names}
    rest = tuple(max(0.0, seconds - sum(values)) for seconds, *values in zip(total.values, *parts.values(), strict=True))
    colours = iter(SERIES_COLOURS)
    layers = [
        Layer(name.removeprefix("time/").removesuffix("_s").replace("_", " "), next(colours, "grid"), values)
        for name, values in parts.items()
    ]
    layers.append(Layer("other", "muted", rest))
    return _areas("Time per phase", "seconds", total.steps, layers)


def throughput(log: MetricsLog) -> Chart | None:
    """Generated tokens per second."""
    line = Line("whole job", "series-1", log.series("throughput/rollout_tokens_per_s"))
    return _lines("Rollout throughput", "tokens per second", [line], bottom=0)


# --- behaviour cloning ----------------------------------------------------------------------------


def bc_loss(log: MetricsLog) -> Chart | None:
    """Training and held-out loss."""
    lines = [
        Line("training", "muted", log.series("bc/loss")),
        Line("held out", "text", log.series("bc/val_loss", "val"), markers=True),
        *_modes(log, "bc/val_loss_mode_{}", "val"),
    ]
    return _lines("Loss", "nats per token", lines, log_scale=True)


def bc_valid_replies(log: MetricsLog) -> Chart | None:
    """Held-out prompts answered in the grammar."""
    line = Line("all", "text", log.series("bc/valid_replies", "val"), markers=True)
    return _lines("Valid replies", "share of held-out prompts", [line], percent=True, bottom=0)


def bc_modes(log: MetricsLog) -> Chart | None:
    """Modes of the replies to held-out prompts."""
    return _mode_share(log, "Modes of these replies", "bc/mode_{}_share", "val")


def bc_optimizer(log: MetricsLog) -> Chart | None:
    """Gradient norm of the cloning stage."""
    return _lines("Gradient norm", "L2", [Line("training", "series-1", log.series("bc/grad_norm"))], bottom=0)


MODE_PANELS = (mode_entropy, modes_by_turn, mode_term)
"""Beside the shares of the modes."""

AMPO_PANELS: dict[str, tuple[Callable[[MetricsLog], Chart | None], ...]] = {
    "Each mode": (mode_rewards, mode_tokens, mode_advantages),
    "Reward": (reward, reward_parts, reward_spread),
    "Replies and policy": (response_tokens, format_failures, kl, entropy, grad_norm, mismatch),
    "Judge": (judge_latency, judge_retries, left_out, judge_cost),
    "Time": (phases, throughput),
}
"""Sections of the page below the mode shares, in order."""

BC_PANELS: tuple[Callable[[MetricsLog], Chart | None], ...] = (bc_loss, bc_valid_replies, bc_modes, bc_optimizer)


def draw(panels: Sequence[Callable[[MetricsLog], Chart | None]], log: MetricsLog) -> list[Chart]:
    """The panels that have something to show."""
    return [chart for panel in panels if (chart := panel(log)) is not None]


# --- building blocks ------------------------------------------------------------------------------


def tags_of(log: MetricsLog) -> list[str]:
    """Labels with metrics of their own, the first :data:`MAX_TAGS` by name."""
    names = [name for name in log.names("tag/") if name.endswith("/reward")]
    return sorted(name.removeprefix("tag/").removesuffix("/reward") for name in names)[:MAX_TAGS]


def _tags(log: MetricsLog, quantity: str) -> list[Line]:
    return [
        Line(tag, colour, log.series(f"tag/{tag}/{quantity}"))
        for tag, colour in zip(tags_of(log), SERIES_COLOURS, strict=False)
    ]


def _modes(log: MetricsLog, pattern: str, kind: str = "train") -> list[Line]:
    return [Line(f"mode {k}", f"mode-{k}", log.series(pattern.format(k), kind), markers=kind == "val") for k in MODES]


def _mode_share(log: MetricsLog, title: str, pattern: str, kind: str = "train") -> Chart | None:
    # A label has shares only at steps that had prompts with it, so absent is not zero here.
    shares = [log.series(pattern.format(k), kind) for k in MODES]
    steps = shares[0].steps
    if not steps:
        return None
    columns = [_at(series, steps) for series in shares]
    layers = [Layer(f"mode {k}", f"mode-{k}", columns[k - 1]) for k in MODES]
    layers.append(Layer(BROKEN, "bad", tuple(max(0.0, 1.0 - sum(at_step)) for at_step in zip(*columns, strict=True))))
    return _areas(title, "share of samples", steps, layers, percent=True)


def _increments(totals: Series) -> tuple[float, ...]:
    """What each step added to a count that only grows."""
    return tuple(max(0.0, now - before) for before, now in zip((0.0, *totals.values), totals.values, strict=False))


def _at(series: Series, steps: Sequence[int]) -> tuple[float, ...]:
    values = dict(zip(series.steps, series.values, strict=True))
    return tuple(values.get(step, 0.0) for step in steps)


def _lines(
    title: str,
    unit: str,
    lines: Sequence[Line],
    percent: bool = False,
    bottom: float | None = None,
    log_scale: bool = False,
) -> Chart | None:
    present = [line for line in lines if line.series]
    if not present:
        return None
    legend = tuple(LegendEntry(line.label, line.colour, _change(line.series, percent)) for line in present)
    return Chart(title, unit, line_chart(present, percent, bottom, log_scale), legend)


def _areas(title: str, unit: str, steps: tuple[int, ...], layers: Sequence[Layer], percent: bool = False) -> Chart:
    legend = tuple(LegendEntry(layer.label, layer.colour, _change(Series(steps, layer.values), percent)) for layer in layers)
    return Chart(title, unit, area_chart(steps, layers, percent), legend)


def _change(series: Series, percent: bool) -> str:
    first, last = (f"{value:.0%}" if percent else f"{value:.3g}" for value in series.ends())
    return first if len(series.steps) == 1 else f"{first} → {last}"
