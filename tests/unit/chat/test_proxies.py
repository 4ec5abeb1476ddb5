"""Which proxy stands before an address, by the environment of this process."""

from __future__ import annotations

import socket

import pytest

from nemo_ampo.chat.proxies import is_loopback, opener_for, passwords, proxy_for, shown, through

PROXY = "http://proxy.example:3128"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", PROXY)


LOOPBACK = (
    "localhost", "LOCALHOST", "localhost.", "judge.localhost", "127.0.0.1", "127.8.9.1", "[::1]", "[::ffff:127.0.0.1]",
    "0.0.0.0", "127.1", "2130706433", "0x7f.0.0.1", "LocalHost.LocalDomain", "ip6-localhost", socket.gethostname(),
    socket.gethostname().partition(".")[0].upper(),
)  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK)
def test_this_machine_is_asked_directly(host: str) -> None:
    assert proxy_for(f"http://{host}:8000/v1") is None
    assert through(f"http://{host}:8000/v1") == ""


@pytest.mark.parametrize("host", ["judge.example", "10.1.2.3", "[2001:db8::1]", "localhost.example", "128.1", "127.example"])
def test_others_are_asked_through_the_proxy(host: str) -> None:
    assert proxy_for(f"http://{host}:8000/v1") == PROXY
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("*", "http://judge.example/v1", True),
        ("judge.example", "http://judge.example/v1", True),
        ("JUDGE.example", "http://Judge.EXAMPLE./v1", True),
        ("example", "http://judge.example/v1", True),
        (".example", "http://judge.example/v1", True),
        ("*.example", "http://judge.example/v1", True),
        ("udge.example", "http://judge.example/v1", False),
        ("other, judge.example ", "http://judge.example/v1", True),
        ("other judge.example", "http://judge.example/v1", True),
        ("judge.example:8000", "http://judge.example:8000/v1", True),
        ("judge.example:8000", "http://judge.example:9000/v1", False),
        ("judge.example:80", "http://judge.example/v1", True),
        ("10.0.0.0/8", "http://10.1.2.3:8000/v1", True),
        ("10.0.0.0/8", "http://11.1.2.3/v1", False),
        ("[2001:db8::]/32", "http://[2001:db8::1]/v1", True),
        ("10.1.2.3/8", "http://10.200.0.1/v1", True),
        ("10.0.0.0/8", "http://10.example/v1", False),
        ("10.1.2.3", "http://10.1.2.3/v1", True),
        ("10.1.2.3:8000", "http://10.1.2.3:8000/v1", True),
        ("10.1.2.3:8000", "http://10.1.2.3:9000/v1", False),
        ("1.2.3", "http://10.1.2.3/v1", False),
        ("2001:db8::/32", "http://[2001:db8::7]:8000/v1", True),
        ("2001:db8::7", "http://[2001:db8:0::7]/v1", True),
        ("[2001:db8::7]", "http://[2001:db8::7]:8000/v1", True),
        ("[2001:db8::7]:8000", "http://[2001:db8::7]:8000/v1", True),
        ("[2001:db8::7]:8000", "http://[2001:db8::7]:9000/v1", False),
        ("nonsense/33, /, :, [, ., *.", "http://judge.example/v1", False),
        ("", "http://judge.example/v1", False),
    ],
)
def test_no_proxy_is_read_as_curl_reads_it_and_knows_networks(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, url: str, direct: bool
) -> None:
    monkeypatch.setenv("no_proxy", no_proxy)
    assert (proxy_for(url) is None) is direct


def test_each_scheme_has_its_proxy_and_all_proxy_is_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_for("https://judge.example/v1") is None
    monkeypatch.setenv("all_proxy", "proxy.example:1080")
    assert proxy_for("https://judge.example/v1") == "http://proxy.example:1080"
    monkeypatch.setenv("HTTPS_PROXY", "socks5://proxy.example:9")
    assert proxy_for("https://judge.example/v1") == "socks5://proxy.example:9"
    assert proxy_for("http://judge.example/v1") == PROXY


@pytest.mark.parametrize("url", ["", "judge", "http://", "http://[", "http://x:99999999/", "http://x:port/"])
def test_what_is_no_address_raises_nothing(url: str) -> None:
    assert proxy_for(url) in (None, PROXY)


def test_a_proxy_is_shown_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = "http://user:p%40ss@proxy.example:3128"
    assert shown(proxy) == PROXY == shown(PROXY)
    assert list(passwords(proxy)) == ["p%40ss", "p@ss", "user:p@ss"] and not list(passwords(PROXY))
    monkeypatch.setenv("http_proxy", proxy)
    assert through("http://judge.example/v1") == f" through the proxy {PROXY}"


def test_a_health_check_goes_the_same_way() -> None:
    def proxies(url: str) -> list[str]:
        return [type(handler).__name__ for handler in opener_for(url).handlers if "Proxy" in type(handler).__name__]

    assert proxies("http://127.0.0.1/") == [] and proxies("http://judge.example/") == ["ProxyHandler"]
