"""Which proxy a request goes through: one rule for chat APIs and health checks.

By the environment, as curl and Python read it (``http_proxy``, ``https_proxy``, ``all_proxy``, ``no_proxy``), with two
additions: this machine itself is never asked through a proxy, and ``no_proxy`` may hold networks (``10.0.0.0/8``).
"""

from __future__ import annotations

import ipaddress
import re
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

from nemo_ampo.text import one_line

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_PORTS = {"http": 80, "https": 443}
_NUMBERS = re.compile(r"(0x[0-9a-f]+|[0-9]+)(\.(0x[0-9a-f]+|[0-9]+)){0,3}", re.IGNORECASE)
_OWN_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")


def proxy_for(url: str) -> str | None:
    """Address of the proxy that stands between this process and ``url``; None for none."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return None  # whoever asks it says that this is no address
    found = urllib.request.getproxies()
    proxy = found.get(parts.scheme) or found.get("all")
    if not proxy or is_loopback(host) or any(_covers(entry, host, port) for entry in _entries(found.get("no", ""))):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def shown(proxy: str) -> str:
    """A proxy's address without its user and password."""
    scheme, _, rest = proxy.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def passwords(address: str) -> Iterator[str]:
    """What must not be shown of the address of a proxy or service: its password, and user and password together."""
    credentials = address.partition("://")[2].rpartition("@")[0]
    user, _, password = credentials.partition(":")
    if password:
        yield from (password, unquote(password), f"{unquote(user)}:{unquote(password)}")


def through(url: str) -> str:
    """For messages: which proxy an address was asked through; empty for none."""
    proxy = proxy_for(url)
    return f" through the proxy {one_line(shown(proxy))}" if proxy is not None else ""


def opener_for(url: str) -> urllib.request.OpenerDirector:
    """For health checks: opens ``url`` through the proxy it needs."""
    proxy = proxy_for(url)
    return urllib.request.build_opener(urllib.request.ProxyHandler({urlsplit(url).scheme: proxy} if proxy else {}))


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, as far as can be told without asking anybody."""
    address = _address(host)
    if address is None:
        own = socket.gethostname().lower()
        return host.lower() in (*_OWN_NAMES, own, own.partition(".")[0]) or host.lower().endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or address.is_unspecified


def _entries(no_proxy: str) -> list[str]:
    return [entry.lower() for entry in no_proxy.replace(",", " ").split()]


def _covers(entry: str, host: str, port: int | None) -> bool:
    """Whether an entry of ``no_proxy`` names the host: ``*``, a network, an address, a name or its ending, with or without
    a port."""
    if entry == "*":
        return True
    address = _address(host)
    if "/" in entry:
        try:
            network = ipaddress.ip_network(entry.replace("[", "").replace("]", ""), strict=False)
            return address is not None and address in network
        except ValueError:
            return False
    name, wanted_port = entry, ""
    if entry.startswith("[") or entry.count(":") == 1:
        name, _, wanted_port = entry.rpartition(":") if not entry.endswith("]") else (entry, "", "")
    if wanted_port and wanted_port != str(port):
        return False
    name = name.strip("[]")
    if address is not None:
        return _address(name) == address
    name = name.lstrip("*").strip(".")
    return bool(name) and (host.lower() == name or host.lower().endswith(f".{name}"))


def _address(host: str) -> _Address | None:
    try:
        if _NUMBERS.fullmatch(host):  # also 127.1, which the system takes for an address
            return ipaddress.IPv4Address(socket.inet_aton(host))
        return ipaddress.ip_address(host.strip("[]"))
    except (ValueError, OSError):
        return None
