"""The judge's counts under the names the run log, the report and the loggers know them by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from nemo_ampo.chat.stats import ChatStats, total

PREFIX = "judge/"


class JudgeStats(ChatStats):
    """Counts of one judge, or, through :meth:`of`, of the judges of all ranks."""

    @classmethod
    def of(cls, parts: Iterable[ChatStats]) -> JudgeStats:
        """The sum of ``parts``."""
        together = total(parts)
        return cls(**{f.name: getattr(together, f.name) for f in fields(together)})

    @property
    def verdicts(self) -> int:
        """Dialogues that got a verdict so far."""
        return self.answers

    def metrics(self) -> dict[str, float]:
        """Cumulative metrics; a cause or kind that never occurred and a latency not yet known are left out."""
        counts = ("requests", "verdicts", "calls", "parse_failures", "cache_hits", "prompt_tokens", "completion_tokens")
        found: dict[str, float | None] = {name: float(getattr(self, name)) for name in counts}
        found |= {name: float(getattr(self, name)) or None for name in ("cache_failures", "spent_failures")}
        found |= {f"retries/{cause}": float(count) for cause, count in sorted(self.retries.items())}
        found |= {f"failures/{kind}": float(count) for kind, count in sorted(self.failures.items())}
        found |= {"cost_usd": self.cost_usd, "latency_p50_s": self.latency_p50_s, "latency_p95_s": self.latency_p95_s}
        return {f"{PREFIX}{name}": value for name, value in found.items() if value is not None}
