"""What the rehearsed ranks showed, as numbers to decide by and as lines to read. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_ampo.rehearse.collectives import Call, first_disagreement
from nemo_ampo.rehearse.sizes import GB, Hardware, Memory

ENGINE_PASS = "decoding"
UPDATE = "update"


@dataclass(frozen=True)
class Passes:
    """What the passes of one rank on rows of one length left behind, by their names.

    Attributes:
        peaks: bytes by part of memory at the fullest moment.
        calls: collectives, in order.
    """

    peaks: dict[str, dict[str, int]]
    calls: dict[str, list[Call]]


@dataclass(frozen=True)
class RankReport:
    """What one rank showed.

    Attributes:
        rank: of the job.
        parameters: it holds.
        passes: by the share that the rows' length was of the longest.
        decoding: of the engine in the training processes; None for another.
        seconds: of a core that it took.
        own_bytes: of the host that the process took itself.
    """

    rank: int
    parameters: int
    passes: Mapping[float, Passes]
    decoding: Passes | None
    seconds: float
    own_bytes: int

    def calls(self) -> list[Call]:
        """All of them, in order."""
        everything = [*self.passes.values(), *([self.decoding] if self.decoding else [])]
        return [call for passes in everything for calls in passes.calls.values() for call in calls]

    def peak(self, name: str, share: float = 1.0) -> dict[str, float]:
        """Bytes by part at the fullest moment of a pass, for rows of that share of the longest.

        Two lengths were carried out. What a pass keeps grows with the length by a fixed amount, so others lie on a line.
        """
        (low, below), (high, above) = ((s, p.peaks[name]) for s, p in sorted(self.passes.items()))
        return {part: below[part] + (above[part] - below[part]) * (share - low) / (high - low) for part in below}

    def line(self) -> str:
        """What the rank is and took, as text."""
        found = f"rank {self.rank}: {self.parameters / 1e9:.3f} G parameters, {len(self.calls())} collectives"
        return f"{found}, {self.seconds:.0f} s, {self.own_bytes / GB:.1f} GB here"

    def names(self) -> list[str]:
        """Of the passes whose rows may be longer or shorter."""
        return list(next(iter(self.passes.values())).peaks)

    def largest(self, share: float = 1.0) -> tuple[str, float]:
        """The pass that needs most, and its bytes."""
        sums = {name: sum(self.peak(name, share).values()) for name in self.names()}
        if self.decoding is not None:
            sums[ENGINE_PASS] = sum(self.decoding.peaks[ENGINE_PASS].values())
        return max(sums.items(), key=lambda item: item[1])

    def share_that_fits(self, room: float) -> float:
        """The largest share of the longest row with which every pass stays within ``room`` bytes; 0 for none."""
        shares = []
        for name in self.names():
            at_none, at_whole = (sum(self.peak(name, share).values()) for share in (0.0, 1.0))
            if at_none >= room:
                return 0.0
            if at_whole > at_none:
                shares.append((room - at_none) / (at_whole - at_none))
        return min(shares)


def fullest(reports: Sequence[RankReport]) -> RankReport:
    """The rank that needs most memory."""
    return max(reports, key=lambda report: report.largest()[1])


@dataclass(frozen=True)
class RehearsedJob:
    """What the job is that was rehearsed.

    Attributes:
        longest: tokens of the longest row.
        tokens: of a micro-batch of such rows.
        hardware: it would run on.
        stays: bytes of an engine that the trainer cannot use meanwhile.
        counted: the same memory by arithmetic.
    """

    longest: int
    tokens: int
    hardware: Hardware
    stays: float
    counted: Memory


def fits(reports: Sequence[RankReport], question: RehearsedJob) -> bool:
    """Whether the fullest rank stays within its memory less the margin."""
    return fullest(reports).largest()[1] + question.stays <= question.hardware.room


def disagreement(reports: Sequence[RankReport]) -> str | None:
    """The first collective that not all of these ranks enter alike, in words; None when they agree."""
    return first_disagreement({report.rank: report.calls() for report in reports})


def lines(reports: Sequence[RankReport], question: RehearsedJob, wrong: str | None) -> list[str]:
    """What the ranks showed together, as text; ``wrong`` is their :func:`disagreement`."""
    worst = fullest(reports)
    room, limit = question.hardware.room - question.stays, question.hardware.memory
    out = [f"memory of rank {worst.rank}, GB, rows of {question.longest} tokens"]
    parts = [
        part
        for part in worst.peak(UPDATE)
        if any(worst.peak(name)[part] for name in worst.names())
        or (worst.decoding and worst.decoding.peaks[ENGINE_PASS][part])
    ]
    out.append("  " + "".join(f"{name:>18}" for name in ("", *parts, "together")))
    peaks = {name: worst.peak(name) for name in worst.names()}
    if worst.decoding is not None:
        peaks[ENGINE_PASS] = dict(worst.decoding.peaks[ENGINE_PASS])
    for name, peak in peaks.items():
        numbers = [*(peak[part] for part in parts), sum(peak.values())]
        out.append(f"  {name:>18}" + "".join(f"{number / GB:18.2f}" for number in numbers))
    out.append("at most, GB, by tokens of the longest row")
    for share in (0.125, 0.25, 0.5, 1.0, 2.0):
        name, most = worst.largest(share)
        out.append(f"  {int(share * question.longest):>8} {(most + question.stays) / GB:9.1f}  {name}")
    share = min(report.share_that_fits(room) for report in reports)
    whole = "fits" if fits(reports, question) else "DOES NOT FIT"
    if question.stays:
        out.append(f"an engine that stays while the trainer works: {question.stays / GB:.1f} GB")
    out += [
        f"{whole}: {(worst.largest()[1] + question.stays) / GB:.1f} GB of {limit / GB:.0f}, a tenth of which is left free",
        f"longest rows that fit: {int(share * question.longest):,} tokens, with as many rows in a micro-batch",
        f"largest micro-batch that fits: {int(share * question.tokens):,} tokens",
        f"by arithmetic (nemo-ampo plan): {question.counted.total / GB:.1f} GB",
    ]
    if wrong:
        out.append(f"COLLECTIVES DIFFER: {wrong}")
    elif len(reports) > 1:
        out.append(f"collectives: {len(reports)} ranks agree")
    return out
