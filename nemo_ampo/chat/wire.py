"""HTTP by the ``openai`` package: what is sent is what is asked for, what is read is of bounded size.

Only this file knows the package and what it stands on. Loading them takes a second, so the first call imports it.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections.abc import Mapping
from typing import Any

import aiohttp
import httpx2
import openai

for _name in ("openai", "httpx2", "aiohttp"):
    # What they would log of an exchange, such as the words beside a status, has not been searched for keys.
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

MAX_BODY_BYTES = 8 * 2**20
"""A longer answer, unpacked, is not read to its end."""

_UNPACKED = ("", "identity", "gzip", "x-gzip", "deflate")
_KEEP_ALIVE_S = 4.0
"""Below the 5 s after which uvicorn, and so vLLM, closes a silent connection: never send into a closing one."""

_CONNECTIONS = 65536
"""How many there may be is the limiter's business."""


class NoConnectionError(Exception):
    """Nobody answered; the message says what the system said."""


class UnusableBodyError(Exception):
    """The body is not read to its end; the message says what it is."""


class _Http(openai.DefaultAioHttpClient):
    """Sends these headers and no others (but a server's own cookies), and reads an answer to its end, or its limit, before
    the package looks at it."""

    def __init__(self, headers: Mapping[str, str], **how: Any) -> None:
        super().__init__(**how)
        self._said = [(name.encode("ascii"), text.encode("ascii")) for name, text in headers.items()]

    async def send(self, request: httpx2.Request, **how: Any) -> httpx2.Response:
        # The package would add what the environment holds, and what it knows about the machine.
        own = [(name, text) for name, text in request.headers.raw if name in (b"Host", b"Content-Length")]
        request.headers = httpx2.Headers(own + self._said)
        response = await super().send(request, **how | {"stream": True})
        try:
            body = await _read(response)
        finally:
            await response.aclose()
        # Without what the server says about the body's type: it is UTF-8, as JSON is.
        kept = [(name, text) for name, text in response.headers.raw if name.lower().startswith(b"retry-after")]
        return httpx2.Response(response.status_code, headers=kept, content=body, request=request)


class Wire:
    """Connections of one kind: same headers, same proxy. Belongs to the event loop that first sends.

    Args:
        key: the API key; empty for none.
        headers: further ones of every request; no others but those of HTTP itself are sent.
        proxy: address of the proxy in between; None for none.
        ca_file: PEM file of authorities to believe beside the system's or those of ``SSL_CERT_FILE``; None for none.

    Raises:
        NoConnectionError: the certificates cannot be read, or there is no such proxy.
    """

    def __init__(self, key: str, headers: Mapping[str, str], proxy: str | None, ca_file: str | None) -> None:
        try:
            believed = httpx2.create_ssl_context()
            if ca_file is not None:
                believed.load_verify_locations(ca_file)
        except OSError as error:
            raise NoConnectionError(f"certificates of SSL_CERT_FILE, SSL_CERT_DIR or ca_file: {error}") from None
        if proxy is not None and not proxy.startswith(("http://", "https://")):
            raise NoConnectionError("only proxies of the kinds http:// and https:// can be used")
        try:
            between = None if proxy is None else httpx2.Proxy(proxy)
        except (httpx2.InvalidURL, ValueError):
            raise NoConnectionError("this is no address of a proxy") from None
        limits = httpx2.Limits(max_connections=_CONNECTIONS, keepalive_expiry=_KEEP_ALIVE_S)
        said = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        said["User-Agent"] = f"AsyncOpenAI/Python {openai.__version__}"
        said |= {"Authorization": f"Bearer {key}"} if key else {}
        http = _Http(
            {**said, **headers},
            verify=believed,
            proxy=between,
            trust_env=False,
            limits=limits,
            timeout=None,
            follow_redirects=False,
        )
        self._client = openai.AsyncOpenAI(api_key="-", base_url="http://of.each.request", max_retries=0, http_client=http)

    async def send(self, method: str, url: str, content: bytes | None) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and body of the answer.

        Raises:
            NoConnectionError, UnusableBodyError: there is none.
        """
        try:
            if method == "GET":
                answer = await self._client.get(url, cast_to=httpx2.Response)
            else:
                answer = await self._client.post(url, cast_to=httpx2.Response, content=content)
        except openai.APIStatusError as error:
            answer = error.response
        except (openai.APIConnectionError, httpx2.InvalidURL, aiohttp.ClientError, ValueError) as error:
            raise NoConnectionError(_why(error)) from None
        return answer.status_code, answer.headers, answer.text.removeprefix("\ufeff")

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()


async def _read(response: httpx2.Response) -> bytes:
    packed = response.headers.get("Content-Encoding", "").lower()
    if not all(coding.strip() in _UNPACKED for coding in packed.split(",")):
        raise UnusableBodyError(f"packed, which was not asked for ({packed})")
    body = bytearray()
    try:
        async for part in response.aiter_bytes():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise UnusableBodyError(f"longer than {MAX_BODY_BYTES // 2**20} MiB")
    except httpx2.DecodingError:
        raise UnusableBodyError(f"damaged: it says it is packed ({packed}), and is not") from None
    return bytes(body)


def _why(error: BaseException) -> str:
    """The innermost cause, which holds what the system said."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError | socket.gaierror):
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
