"""What is asked of an endpoint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""``{"role": ..., "content": ...}``"""


CHARS_PER_TOKEN = 4
"""To guess a prompt's tokens before the endpoint has counted them."""


@dataclass(frozen=True)
class Question:
    """Everything a reply depends on; ``attempt`` tells repetitions of the same words apart."""

    model: str
    messages: tuple[Message, ...]
    temperature: float
    max_tokens: int
    seed: int | None = None
    schema: Mapping[str, Any] | None = None
    stop: tuple[str, ...] | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 0

    def payload(self, model: str, structured: bool) -> dict[str, Any]:
        """The request's body. A field of ``extra_body`` wins; one that is null is left out."""
        body: dict[str, Any] = {
            "model": model,
            "messages": list(self.messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "stop": list(self.stop) if self.stop else None,
            "response_format": None,
        }
        if structured and self.schema is not None:
            schema = {"name": "reply", "schema": dict(self.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {key: value for key, value in (body | dict(self.extra_body)).items() if value is not None}

    @property
    def key(self) -> str:
        """Hash of everything above: equal questions have equal keys."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode("ascii")).hexdigest()

    @property
    def prompt_tokens(self) -> int:
        """A guess."""
        return math.ceil(sum(len(message["content"]) for message in self.messages) / CHARS_PER_TOKEN)
