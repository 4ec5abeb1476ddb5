"""One progress bar on a terminal, one line now and then in a log file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

from nemo_ampo.output.terminal import undisguised
from nemo_ampo.text import printable


class Progress:
    """Shows ``step / total`` with a few numbers.

    Args:
        name: of the stage.
        first, total: steps.
        active: False on ranks that stay silent.
    """

    def __init__(self, name: str, first: int, total: int, active: bool = True) -> None:
        self._name, self._total, self._active = name, total, active
        self._lines = not sys.stderr.isatty()
        self._every = max(total // 20, 1)
        self._bar = tqdm(
            initial=first,
            total=total,
            desc=name,
            disable=not active or self._lines,
            dynamic_ncols=True,
            file=undisguised(sys.stderr),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def step(self, done: int, values: Mapping[str, float]) -> None:
        """``done`` steps are finished."""
        text = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        self._bar.n = done
        self._bar.set_postfix_str(text)
        if self._active and self._lines and (done % self._every == 0 or done == self._total):
            print(f"{self._name} {done}/{self._total}  {text}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line of its own, without disturbing the bar."""
        if self._active:
            self._bar.write(printable(line), file=undisguised(sys.stderr))
