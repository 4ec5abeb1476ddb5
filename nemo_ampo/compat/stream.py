"""What stands for CUDA's streams and events on a CPU."""

from __future__ import annotations

from typing import Any


class InertStream:
    """Stands for a CUDA stream or event where there is nothing to order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> InertStream:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def synchronize(self) -> None:
        """Nothing is under way."""

    def wait_stream(self, other: object) -> None:
        """Nothing is under way."""

    def wait_event(self, event: object) -> None:
        """Nothing is under way."""

    def record(self, *args: object) -> None:
        """There is no order to take down."""

    def query(self) -> bool:
        """All is done."""
        return True

    def elapsed_time(self, other: object) -> float:
        """Milliseconds; no time passes on a GPU that is not there."""
        return 0.0
