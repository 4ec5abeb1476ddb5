"""Several addresses of one model: which to ask next, which to leave alone for a while.

An address that refuses connections, times out or answers 5xx several times in a row rests, longer each time; then one
call tries it again. An address that asked for a pause (``Retry-After``) gets it. A question that failed at one address
prefers the others.
"""

from __future__ import annotations

import math
import os
import ssl
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from nemo_ampo.chat.completion import CallError
from nemo_ampo.chat.config import NAMED_VARIABLE, EndpointConfig, PoolMember, api_url
from nemo_ampo.errors import ConfigError
from nemo_ampo.files import is_file, missing

FAILURES_TO_REST = 3
"""One failing question is not yet a failing address."""

REFUSED_REST_S = 300.0
"""Rest of an address that refuses our key or our model: somebody has to act first."""

REFUSALS = (401, 402, 403, 404)


@dataclass(eq=False)
class Endpoint:
    """One address and how it has been doing.

    Attributes:
        base_url, model: see :class:`~nemo_ampo.chat.config.PoolMember`.
        key: the API key; empty if none is needed.
        headers: further ones of each request.
        secrets: what environment variables held of key and headers, by the variable's name.
        structured: whether it takes a JSON schema; None until known.
        in_flight: calls being answered.
        failures: failed calls since the last good one.
        rests_until: not asked before this time (monotonic clock), seconds.
    """

    base_url: str
    model: str
    key: str
    headers: Mapping[str, str]
    secrets: Mapping[str, str]
    structured: bool | None = None
    in_flight: int = 0
    failures: int = 0
    rests_until: float = 0.0

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, model={self.model!r})"

    def url(self, path: str) -> str:
        """Address of an API function."""
        return api_url(self.base_url, path)


class Pool:
    """The addresses of a config.

    Raises:
        ConfigError: on construction, if an environment variable is missing or ``ca_file`` holds no certificate.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        # A replay asks nobody and needs no key.
        silent = config.replay is not None
        self.endpoints = [
            Endpoint(m.base_url, str(m.model), *(("", {}, {}) if silent else _credentials(m, config.section)))
            for m in config.members
        ]
        if config.ca_file is not None and not silent:
            _check_certificates(config.ca_file, f"{config.section}.ca_file")
        self._turn = 0

    def wait_s(self) -> float:
        """Seconds until some address may be asked."""
        now = time.monotonic()
        return max(0.0, min(self._ready_at(endpoint) for endpoint in self.endpoints) - now)

    def pick(self, avoid: Collection[Endpoint]) -> Endpoint | None:
        """The least busy address that may be asked now, one not in ``avoid`` if there is one; None if all rest."""
        now = time.monotonic()
        awake = [endpoint for endpoint in self.endpoints if self._ready_at(endpoint) <= now]
        self._turn += 1
        order = awake[self._turn % len(awake) :] + awake[: self._turn % len(awake)] if awake else []
        return min(order, key=lambda endpoint: (endpoint in avoid, endpoint.in_flight), default=None)

    def has_other(self, avoid: Collection[Endpoint]) -> bool:
        """Whether an address outside ``avoid`` may be asked now."""
        now = time.monotonic()
        return any(endpoint not in avoid and self._ready_at(endpoint) <= now for endpoint in self.endpoints)

    def succeeded(self, endpoint: Endpoint) -> None:
        """It answered."""
        endpoint.failures = 0

    def failed(self, endpoint: Endpoint, failure: CallError) -> None:
        """It did not."""
        endpoint.failures += 1
        rest_s = min(failure.retry_after_s, self._config.retry_after_max_s)
        alone = len(self.endpoints) == 1
        if failure.status in REFUSALS and not alone:
            rest_s = REFUSED_REST_S
        elif failure.transient and endpoint.failures >= FAILURES_TO_REST and not alone:
            doubled = self._config.backoff_initial_s * 2.0 ** min(endpoint.failures - FAILURES_TO_REST, 30)
            rest_s = max(rest_s, min(doubled, self._config.backoff_max_s))
        endpoint.rests_until = max(endpoint.rests_until, time.monotonic() + rest_s)

    def _ready_at(self, endpoint: Endpoint) -> float:
        """After a row of failures one call tries the address; the others wait for how it ends."""
        on_probation = len(self.endpoints) > 1 and endpoint.failures >= FAILURES_TO_REST and endpoint.in_flight > 0
        return math.inf if on_probation else endpoint.rests_until


def _credentials(member: PoolMember, section: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """``key, headers, secrets`` of a member, see :class:`Endpoint`."""
    texts = member.headers or {}
    needed = {variable: f"headers.{name}" for name, text in texts.items() for variable in NAMED_VARIABLE.findall(text)}
    if member.api_key_env:
        needed[member.api_key_env] = "api_key_env"
    secrets = {variable: _read_key(variable, f"{section}.{key}") for variable, key in needed.items()}
    headers = {name: NAMED_VARIABLE.sub(lambda found: secrets[found[1]], text) for name, text in texts.items()}
    return secrets.get(member.api_key_env or "", ""), headers, secrets


def _read_key(variable: str, key_of: str) -> str:
    where = f"{key_of}: environment variable {variable}"
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"{where} is not set; export it or clear the key")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"{where} does not hold an API key (odd characters)")
    return key


def _check_certificates(path: str, key: str) -> None:
    if not is_file(path):
        raise ConfigError(f"{key}: {missing(path)}")
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ConfigError(f"{key}: {path} holds no certificates in PEM form ({error})") from None
