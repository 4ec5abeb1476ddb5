"""Where a chat endpoint is, how patiently it is asked and what it may cost."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit, urlunsplit

from nemo_ampo.errors import ConfigError
from nemo_ampo.files import disk_errors, is_file, is_folder, missing
from nemo_ampo.ranges import Switch, check_numbers, number, seconds


class Structured(Switch):
    """Whether a reply is held to a JSON schema."""

    auto = "auto"
    on = "on"
    off = "off"


_OWN_FIELDS = ("messages", "model", "n", "stream", "stream_options")
"""Of a request: what makes it the question that is asked."""
_KEYED_FIELDS = ("temperature", "max_tokens", "seed")
"""Of a request: what keys of ours decide."""


# Not frozen, unlike the section itself: OmegaConf makes entries of a list or dict read-only while it still fills them.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NAMED_VARIABLE = re.compile(rf"\$({_VARIABLE.pattern})")
"""In a header's text: stands for what an environment variable holds."""

_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HTTP_HEADERS = re.compile(
    r"(?i)(accept|content|proxy|transfer)-.*|accept|connection|expect|host|te|trailer|upgrade|keep-alive"
)
"""What only the client knows."""

_SECRET_HEADERS = re.compile(r"(?i)auth|cookie|credential|key|pass|secret|session|sign|token")
_QUERY = re.compile(r"(api-version=[A-Za-z0-9.-]+)?")
"""Azure's is the only one known that holds no secret."""


@dataclass
class PoolMember:
    """One more address that serves the same model.

    Attributes:
        base_url: as in :class:`EndpointConfig`.
        model: the model's name there; null takes the section's ``model``.
        api_key_env: environment variable that holds this endpoint's key; null takes the section's.
        headers: as in :class:`EndpointConfig`; null takes the section's.
    """

    base_url: str
    model: str | None = None
    api_key_env: str | None = None
    headers: dict[str, str] | None = None


@dataclass
class Price:
    """What a model's tokens cost.

    Attributes:
        input_per_million, output_per_million: US dollars per million prompt and completion tokens.
    """

    input_per_million: float = number(least=0, whole=False)
    output_per_million: float = number(least=0, whole=False)

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars for one call."""
        return (prompt_tokens * self.input_per_million + completion_tokens * self.output_per_million) / 1e6


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible chat API. Holds the name of a key's environment variable, never a key.

    Attributes:
        base_url: address of the API, usually ending in ``/v1``; it may end in Azure's ``?api-version=...``.
        model: model name as the endpoint knows it.
        api_key_env: environment variable that holds the API key; empty if the endpoint needs none.
        headers: further headers of each request. ``$NAME`` in a header's text stands for what the environment variable
            holds; a header that may be a key must be given so.
        ca_file: PEM file of authorities, or of certificates that servers signed themselves, to believe beside the
            system's; null for none.
        endpoints: further addresses that serve the same model; calls are spread over all of them.
        max_tokens: longest reply asked for, tokens.
        timeout_s: seconds one HTTP call may take from first to last byte.
        max_concurrency: HTTP calls in flight at a time, whole job.
        requests_per_minute, tokens_per_minute: most in any 60 seconds, whole job; 0 sets no limit. Prompt tokens are
            estimated at 4 characters each and the reply at ``max_tokens`` until the endpoint has said what it was.
        connection_retries: how often one call is repeated after a timeout, a broken connection, status 408, 409, 429
            or 5xx.
        backoff_initial_s: upper bound of the random wait before the first such repetition, seconds; it
            doubles each time.
        backoff_max_s: upper bound of that bound, seconds.
        retry_after_max_s: a wait the endpoint asks for (``Retry-After``) is obeyed up to this many seconds, also
            above ``backoff_max_s``.
        structured: ``auto`` sends a JSON schema and does without once the endpoint refuses it, ``on`` stops at the
            start if the endpoint lacks it, ``off`` never sends one.
        extra_body: fields added to each request's body; one that is null is left out of it. None that another key decides.
        price: model name to what its tokens cost.
        max_usd: dollars the job may spend, resumed runs included; null sets no limit.
        max_calls: HTTP calls the job may send, resumed runs included; null sets no limit.
        cache: file that keeps every reply; a question asked before is answered from it, free of charge.
        replay: such a file, read instead of asking: no call is sent, and a question it does not hold ends the run.
    """

    section: ClassVar[str] = "endpoint"
    """Name of the config section, for error messages."""

    base_url: str
    model: str
    api_key_env: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    ca_file: str | None = None
    endpoints: list[PoolMember] = field(default_factory=list)
    max_tokens: int = number(2048, least=1)
    timeout_s: float = seconds(60)
    max_concurrency: int = number(64, least=1, most=65536)
    requests_per_minute: int = number(0, least=0)
    tokens_per_minute: int = number(0, least=0)
    connection_retries: int = number(4, least=0)
    backoff_initial_s: float = seconds(1)
    backoff_max_s: float = seconds(30)
    retry_after_max_s: float = seconds(300)
    structured: Structured = Structured.auto
    extra_body: dict[str, Any] = field(default_factory=dict)
    price: dict[str, Price] = field(default_factory=dict)
    max_usd: float | None = number(None, least=0, above=True, whole=False)
    max_calls: int | None = number(None, least=1, whole=True)
    cache: str | None = None
    replay: str | None = None

    def __post_init__(self) -> None:
        self._check("model", bool(self.model.strip()), "must not be empty")
        for at, member in zip(self._places(), self.members, strict=True):
            self._check_url(f"{at}base_url", member.base_url)
        for at, member in zip(self._places(), self.members, strict=True):
            # No message repeats the value: what is no name may be a key.
            is_name = not member.api_key_env or _VARIABLE.fullmatch(member.api_key_env) is not None
            rule = "must be the name of an environment variable; the key belongs into that variable"
            self._check(f"{at}api_key_env", is_name, rule)
            self._check_headers(at, member)
        check_numbers(self.section, self)
        self._check(
            "backoff_max_s",
            self.backoff_max_s >= self.backoff_initial_s,
            f"must not be less than {self.section}.backoff_initial_s ({self.backoff_initial_s})",
        )
        for name, value in self.extra_body.items():
            rule = "is sent from another key" + ("" if name in _OWN_FIELDS else "; set that, or null to leave the field out")
            self._check(f"extra_body.{name}", name not in _OWN_FIELDS and (value is None or name not in _KEYED_FIELDS), rule)
        self._check_budget()
        self._check(
            "replay", not (self.cache and self.replay), f"give {self.section}.cache or {self.section}.replay, not both"
        )

    @property
    def members(self) -> list[PoolMember]:
        """All addresses, the first one included, with nothing left to inherit."""
        first = PoolMember(self.base_url)
        return [
            PoolMember(
                m.base_url,
                m.model if m.model is not None else self.model,
                m.api_key_env if m.api_key_env is not None else self.api_key_env,
                m.headers if m.headers is not None else self.headers,
            )
            for m in (first, *self.endpoints)
        ]

    @property
    def models(self) -> list[str]:
        """The models that may answer, by name; several when the pool's differ."""
        return sorted({str(member.model) for member in self.members})

    def _places(self) -> list[str]:
        """Where the keys of each member stand, for messages."""
        return ["", *[f"endpoints[{i}]." for i in range(len(self.endpoints))]]

    def _check_budget(self) -> None:
        priced = ", ".join(self.price) or "none"
        for model in dict.fromkeys(str(member.model) for member in self.members):
            named = not self.price or model in self.price
            self._check("price", named, f"the table has no entry for model {model}; it has {priced}")
        if self.max_usd is not None:
            self._check("max_usd", bool(self.price), f"needs {self.section}.price, or nothing says what a call costs")

    def _check_url(self, key: str, base_url: str) -> None:
        # No message repeats the value: what should not stand in it may be a key.
        self._check(key, is_http(base_url), "must be a URL like http://host:8000/v1")
        url = urlsplit(base_url)
        no_secret = url.username is None and url.password is None and not url.fragment and _QUERY.fullmatch(url.query)
        rule = "must not hold a user, password or query, but for ?api-version=...; "
        self._check(key, bool(no_secret), f"{rule}name the key's variable in {self.section}.api_key_env")

    def _check_headers(self, at: str, member: PoolMember) -> None:
        names = [name.lower() for name in member.headers or {}]
        self._check(f"{at}headers", len(names) == len(set(names)), "holds a header twice")
        twice = "authorization" in names and bool(member.api_key_env)
        self._check(f"{at}headers", not twice, f"give Authorization or {self.section}.{at}api_key_env, not both")
        for name, text in (member.headers or {}).items():
            key, no_name = f"{at}headers.{name}", _HEADER.fullmatch(name) is None or _HTTP_HEADERS.fullmatch(name)
            self._check(key, not no_name, "is no header that may be set")
            self._check(key, text.isascii() and text.isprintable() and bool(text.strip()), "must be printable ASCII")
            told = not _SECRET_HEADERS.search(name) or NAMED_VARIABLE.search(text)
            self._check(key, bool(told), "may be a secret; write $NAME, with an environment variable that holds it")

    def _check(self, key: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{self.section}.{key}: {rule}")


def api_url(base_url: str, path: str) -> str:
    """Address of an API function; a query of the base stays at the end."""
    url = urlsplit(base_url)
    return urlunsplit(url._replace(path=f"{url.path.rstrip('/')}/{path}"))


def is_http(address: str) -> bool:
    """Is this the URL of a web server?"""
    try:
        url = urlsplit(address)
        host = url.hostname or ""
        if re.fullmatch("[0-9.]+", host):
            IPv4Address(host)
        elif ":" not in host:
            host.encode("idna")  # of labels that are neither empty nor too long
        return url.scheme in ("http", "https") and bool(host) and url.port != 0 and not re.search(r"\s", address)
    except ValueError:
        return False


def check_endpoint_files(config: EndpointConfig) -> None:
    """The files that are to be read are there, and the one that is to keep replies can be one.

    Raises:
        ConfigError: naming the key.
    """
    for key, path in (("replay", config.replay), ("ca_file", config.ca_file)):
        if path is not None and not is_file(path):
            raise ConfigError(f"{config.section}.{key}: {missing(path)}")
    if config.cache is not None and is_folder(config.cache):
        raise ConfigError(f"{config.section}.cache: {config.cache} is a folder; give the name of a file")
    for key, path in (("cache", config.cache), ("replay", config.replay)):
        if path is not None and not may_be_cache(path):
            raise ConfigError(f"{config.section}.{key}: {path} is not a cache of replies; give another name")


def may_be_cache(path: str) -> bool:
    """Whether a file is a database of SQLite, or can become one because it is empty or not there."""
    if not is_file(path):
        try:
            return not Path(path).exists()
        except (OSError, ValueError):  # a name that no file can have
            return False
    with disk_errors(f"cannot read {path}"), Path(path).open("rb") as file:
        return file.read(16) in (b"", b"SQLite format 3\0")
