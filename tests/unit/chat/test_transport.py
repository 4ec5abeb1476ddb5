"""What is sent, packed bodies, encrypted addresses, proxies, odd addresses, and the end of a process that has talked."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gzip
import http.server
import ipaddress
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from nemo_ampo.chat.client import ChatClient
from nemo_ampo.chat.completion import CallError
from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.chat.transport import Transport
from nemo_ampo.errors import ConfigError
from nemo_ampo.job.preflight import _answers


def certificate(name: str, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None) -> tuple:
    """A certificate of this machine, or without ``issuer`` an authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
    )
    return made.sign(issuer[1] if issuer else key, hashes.SHA256()), key


class Repeats(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        key = self.headers["Authorization"].removeprefix("Bearer ")
        body = f"no {key}".encode()
        self.send_response(500, f"Oops {key}")
        self.send_header("X-Request-Id", key)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Hello(http.server.BaseHTTPRequestHandler):
    body, packed = b"hello", "identity"

    def do_GET(self) -> None:
        vars(self.server).setdefault("seen", []).append(dict(self.headers.items()))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.send_header("Content-Encoding", self.packed)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def authority(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address of an encrypted server, and the file of the authority that it has its certificate from."""
    issuer = certificate("authority")
    shown, key = certificate("server", issuer)
    pem = serialization.Encoding.PEM
    (tmp_path / "ca.pem").write_bytes(issuer[0].public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "server.pem").write_bytes(shown.public_bytes(pem) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://localhost:{server.server_port}/v1", tmp_path / "ca.pem"
        server.shutdown()


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler] = Hello, host: str = "127.0.0.1") -> Iterator[Any]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kind = type("Server", (http.server.ThreadingHTTPServer,), {"address_family": family})
    with kind((host, 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(
    url: str, timeout_s: float = 10.0, key: str = "", headers: Mapping[str, str] | None = None, ca_file: str | None = None
) -> str:
    async def run() -> str:
        transport = Transport(timeout_s=timeout_s, secrets=(), ca_file=ca_file)
        try:
            return await transport.get(url, key, headers or {})
        finally:
            await transport.aclose()

    return asyncio.run(run())


def test_a_server_of_an_authority_in_ssl_cert_file_is_believed(
    authority: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, file = authority
    with pytest.raises(CallError, match="certificate") as error:
        get(url)
    assert error.value.kind == "connection"
    assert get(url, ca_file=str(file)) == "hello", "the configuration names it"
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    assert get(url) == "hello", "the environment names it"
    monkeypatch.setenv("SSL_CERT_FILE", f"{file}.gone")
    with pytest.raises(CallError, match="SSL_CERT_FILE"):
        get(url)


def test_an_encrypted_address_is_asked_through_a_tunnel_of_the_proxy(
    authority: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Tunnel(Hello):
        def do_CONNECT(self) -> None:
            asked.append((self.path, self.headers["Proxy-Authorization"]))
            with socket.create_connection(("127.0.0.1", int(authority[0].split(":")[2].split("/")[0]))) as inner:
                self.send_response(200)
                self.end_headers()
                back = threading.Thread(target=pump, args=(inner, self.connection))
                back.start()
                pump(self.connection, inner)
                back.join()

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)

    with serving(Tunnel) as proxy:
        monkeypatch.setenv("https_proxy", f"http://user:p%40ss@127.0.0.1:{proxy.server_port}")
        monkeypatch.setattr("nemo_ampo.chat.proxies.is_loopback", lambda host: False)
        assert get(authority[0], ca_file=str(authority[1])) == "hello"
    assert asked == [(authority[0].split("/")[2], "Basic dXNlcjpwQHNz")]


def test_a_health_check_leaves_the_certificate_to_the_client(authority: tuple[str, Path]) -> None:
    assert list(_answers("judge", authority[0], "models")) == []


def test_a_certificate_that_a_server_signed_itself_is_believed_where_ca_file_names_it(tmp_path: Path) -> None:
    shown, key = certificate("server")
    pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "own.pem").write_bytes(shown.public_bytes(pem))
    (tmp_path / "key.pem").write_bytes(key.private_bytes(pem, private, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem", tmp_path / "key.pem")
    with serving() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = f"https://localhost:{server.server_port}/v1"
        with pytest.raises(CallError, match="certificate"):
            get(url)
        assert get(url, ca_file=str(tmp_path / "own.pem")) == "hello"


def test_a_ca_file_without_certificates_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for file, problem in ((tmp_path / "ca.pem", "holds no certificates in PEM form"), (tmp_path / "none", "no such file")):
        with pytest.raises(ConfigError, match=rf"^endpoint\.ca_file: .*{problem}"):
            ChatClient(EndpointConfig("https://host/v1", "m", ca_file=str(file)))


def test_what_is_configured_is_sent_and_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Env: 1\nAuthorization: Bearer sk-of-the-environment\nUser-Agent: me")
    with serving(host="::1") as server:
        get(f"http://[::1]:{server.server_port}/v1", key="k", headers={"X-Team": "social"})
        get(f"http://[::1]:{server.server_port}/v1")
        keyed, keyless = [{name.lower(): text for name, text in headers.items()} for headers in vars(server)["seen"]]
    assert set(keyless) == {"host", "accept", "accept-encoding", "content-type", "user-agent"}
    assert keyed == keyless | {"authorization": "Bearer k", "x-team": "social"}
    assert keyless["accept-encoding"] == "identity" and keyless["user-agent"].startswith("AsyncOpenAI/")


@pytest.mark.parametrize(
    ("packed", "body", "said"),
    [
        ("gzip", gzip.compress(b"hello"), None),
        ("gzip, gzip", gzip.compress(gzip.compress(b"hello")), None),
        ("gzip", gzip.compress(b"x" * 2**28), "longer than 8 MiB"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"x" * 2**28)), "longer than 8 MiB"),
        ("gzip", b"hello", "damaged"),
        ("br", b"\x0b\x02\x80hello\x03", r"packed, which was not asked for \(br\)"),
    ],
    ids=["packed", "twice", "huge unpacked", "huge unpacked twice", "not packed", "unknown"],
)
def test_a_packed_body_is_unpacked_up_to_the_limit(packed: str, body: bytes, said: str | None) -> None:
    with serving(type("Packs", (Hello,), {"body": body, "packed": packed})) as server:
        if said is None:
            assert get(f"http://127.0.0.1:{server.server_port}/v1") == "hello"
            return
        with pytest.raises(CallError, match=f"^the answer is {said}") as error:
            get(f"http://127.0.0.1:{server.server_port}/v1")
    assert error.value.kind == "parse"


def test_a_process_that_ends_right_after_a_call_ends_well() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_transport import get; get(sys.argv[2])"
    with serving() as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        command = [sys.executable, "-c", code, str(Path(__file__).parent), url]
        ended = [subprocess.run(command, capture_output=True, text=True) for _ in range(4)]
    assert [(process.returncode, process.stderr) for process in ended] == [(0, "")] * len(ended)


@pytest.mark.parametrize("level", ["", "debug"])
def test_no_library_logs_what_was_not_searched_for_keys(level: str) -> None:
    """The words beside a status are no part of the body; a training stage shows what others log."""
    code = (
        "import asyncio, logging, sys\nfrom nemo_ampo.chat.transport import Transport\n"
        "logging.basicConfig(level=logging.DEBUG)\n"
        "async def go():\n    await Transport(60, ('sk-secret',)).get(sys.argv[1], 'sk-secret', {})\n"
        "asyncio.run(go())"
    )
    with serving(Repeats) as server:
        command = [sys.executable, "-c", code, f"http://127.0.0.1:{server.server_port}/v1"]
        environment = os.environ | {"OPENAI_LOG": level}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "CallError: status 500: no [API key]" in ended.stderr and "sk-secret" not in ended.stderr + ended.stdout


@pytest.mark.parametrize("proxy", ["127.0.0.1:9", "http://user:p%40ss@127.0.0.1:9", "http://127.0.0.1:9/"])
def test_a_proxy_that_is_down_is_no_connection(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(CallError, match="Connection refused") as error:
        get(f"http://judge.invalid/v{len(proxy)}")
    assert error.value.kind == "connection" and "through the proxy http://127.0.0.1:9" in str(error.value)
    assert "p%40ss" not in str(error.value) and "p@ss" not in str(error.value)


def test_what_a_proxy_refuses_is_told_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Denies(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.end_headers()
            self.wfile.write(b"denied by policy; you came as user:p@ss, dXNlcjpwQHNz")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Denies) as proxy:
        address = f"127.0.0.1:{proxy.server_address[1]}"
        monkeypatch.setenv("http_proxy", f"http://user:p%40ss@{address}")
        with pytest.raises(CallError) as error:
            get("http://judge.invalid/v1")
    assert str(error.value).startswith(f"status 403 through the proxy http://{address}: denied by policy")
    assert "p@ss" not in str(error.value) and "dXNlcjpwQHNz" not in str(error.value)


def test_a_head_without_end_is_a_failed_call_of_bounded_size_and_time() -> None:
    def drip(connection: socket.socket, piece: bytes, pause_s: float) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while True:
                connection.sendall(piece)
                time.sleep(pause_s)

    for piece, pause_s in ((b"X-A: b\r\n", 0.05), (b"X-A: " + b"b" * 60_000 + b"\r\n", 0.0), (b"b" * 60_000, 0.0)):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve(listener: socket.socket = listener, how: tuple[bytes, float] = (piece, pause_s)) -> None:
                with contextlib.suppress(OSError):
                    drip(listener.accept()[0], *how)

            threading.Thread(target=serve, daemon=True).start()
            with pytest.raises(CallError) as error:
                get(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout_s=1.0)
        assert error.value.kind in ("timeout", "connection")


@pytest.mark.parametrize("url", ["http://a b/v1", "http://\u00fc..x/v1", "http://127.0.0.1:99999/v1", "http://256.1.1.1/v1"])
def test_an_address_that_is_none_is_no_connection(url: str) -> None:
    with pytest.raises(CallError, match=r"^no connection: .") as error:
        get(url)
    assert error.value.kind == "connection"


@pytest.mark.parametrize(
    "proxy",
    [
        *(
            "http://[::1",
            "http://a:b:c",
            "http:127.0.0.1:9",
            "http://x:99999",
            "http://x:-1",
            "http://",
            "http://@",
            "http://:@:",
        ),
        *(
            "http://x\n:1",
            "http://a b:1",
            "http://\udcff:1",
            "http://é.invalid:1",
            "x" * 5000,
            f"http://{'a' * 300}:1",
            "\x1b[2J",
        ),
    ],
)
def test_a_proxy_that_is_none_is_no_connection(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(CallError) as error:
        get("http://judge.invalid/v1")
    said = str(error.value)
    assert error.value.kind == "connection" and " through the proxy " in said and said.isprintable() and len(said) < 1000


@pytest.mark.parametrize("proxy", ["socks5://user:p%40ss@127.0.0.1:9", "ftp://127.0.0.1:9"])
def test_a_proxy_of_another_kind_is_no_connection(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(CallError, match="only proxies of the kinds http://") as error:
        get("http://judge.invalid/v1")
    assert error.value.kind == "connection" and "p%40ss" not in str(error.value)
