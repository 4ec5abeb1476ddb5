"""How the judge is asked: a chat endpoint, a prompt and a schedule of tries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from nemo_ampo.chat.config import EndpointConfig


@dataclass(frozen=True)
class JudgeConfig(EndpointConfig):
    """The judge's endpoint, see :class:`~nemo_ampo.chat.EndpointConfig`, and what it is asked there.

    Attributes:
        prompt: shipped prompt name or the path of a file with the same placeholders.
        temperatures: sampling temperature of each try for a readable verdict; its length is the number of
            tries.
        seed: sent with the first try, one more with each further one; null sends none.
        explain_parse_error: the second try shows the judge its unreadable reply and why it cannot be read.
    """

    section: ClassVar[str] = "judge"

    prompt: str = "judge"
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.0, 1.0, 1.0, 1.0])
    seed: int | None = None
    explain_parse_error: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("prompt", bool(self.prompt.strip()), "must not be empty")
        self._check("temperatures", len(self.temperatures) > 0, "must name at least one try")
        for temperature in self.temperatures:
            self._check("temperatures", 0 <= temperature <= 2, f"must lie in 0..2, not {temperature}")
