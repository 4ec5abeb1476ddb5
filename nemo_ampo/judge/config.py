"""Where the judge is and how patiently it is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from nemo_ampo.errors import ConfigError


@dataclass(frozen=True)
class JudgeConfig:
    """One OpenAI-compatible endpoint. Holds the name of a key's environment variable, never a key.

    Attributes:
        base_url: address of the API, usually ending in ``/v1``.
        model: model name as the endpoint knows it.
        api_key_env: environment variable that holds the API key; empty if the endpoint needs none.
        prompt: shipped prompt name or the path of a file with the same placeholders.
        temperatures: sampling temperature of each try for a readable verdict; its length is the number of
            tries.
        max_tokens: longest reply asked for, tokens.
        timeout_s: seconds one HTTP call may take from first to last byte.
        max_concurrency: HTTP calls in flight at a time, per process.
        connection_retries: how often one call is repeated after a timeout, a broken connection, status 429 or
            5xx.
        backoff_initial_s: upper bound of the random wait before the first such repetition, seconds; it
            doubles each time.
        backoff_max_s: no wait is longer than this, also when the endpoint asks for a longer one, seconds.
    """

    base_url: str
    model: str
    api_key_env: str = ""
    prompt: str = "judge"
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.0, 1.0, 1.0, 1.0])
    max_tokens: int = 2048
    timeout_s: float = 60.0
    max_concurrency: int = 64
    connection_retries: int = 4
    backoff_initial_s: float = 1.0
    backoff_max_s: float = 30.0

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        _check("model", bool(self.model.strip()), "must not be empty")
        _check("prompt", bool(self.prompt.strip()), "must not be empty")
        _check("temperatures", len(self.temperatures) > 0, "must name at least one try")
        for temperature in self.temperatures:
            _check("temperatures", 0 <= temperature <= 2, f"must lie in 0..2, not {temperature}")
        for key in ("max_tokens", "max_concurrency"):
            _check(key, getattr(self, key) >= 1, f"must be at least 1, not {getattr(self, key)}")
        _check(
            "connection_retries",
            self.connection_retries >= 0,
            f"must not be negative ({self.connection_retries})",
        )
        for key in ("timeout_s", "backoff_initial_s", "backoff_max_s"):
            seconds = getattr(self, key)
            _check(
                key,
                math.isfinite(seconds) and seconds > 0,
                f"must be a positive number of seconds, not {seconds}",
            )
        _check(
            "backoff_max_s",
            self.backoff_max_s >= self.backoff_initial_s,
            f"must not be less than judge.backoff_initial_s ({self.backoff_initial_s})",
        )


def _check_url(base_url: str) -> None:
    # No message repeats the value: what should not stand in it may be a key.
    try:
        url = urlsplit(base_url)
        is_http = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_http, url = False, urlsplit("")
    _check("base_url", is_http, "must be a URL like http://host:8000/v1")
    no_secret = url.username is None and url.password is None and not url.query
    _check(
        "base_url",
        no_secret,
        "must not hold a user, password or query; name the key's variable in judge.api_key_env",
    )


def _check(key: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"judge.{key}: {rule}")
