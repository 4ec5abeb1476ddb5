"""Encrypted addresses, proxies, odd addresses, and the end of a process that has talked."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import http.server
import ipaddress
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from nemo_ampo.chat.completion import CallError
from nemo_ampo.chat.transport import Transport


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


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

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


def get(url: str, timeout_s: float = 10.0) -> str:
    async def run() -> str:
        transport = Transport(timeout_s=timeout_s, secrets=())
        try:
            return await transport.get(url, "")
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
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    assert get(url) == "hello"


def test_a_process_that_ends_right_after_a_call_ends_well() -> None:
    """Without compat/pyreqwest.py about one of five aborts."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_transport import get; get(sys.argv[2])"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        command = [sys.executable, "-c", code, str(Path(__file__).parent), url]
        ended = [subprocess.run(command, capture_output=True, text=True) for _ in range(12)]
        server.shutdown()
    assert [(process.returncode, process.stderr) for process in ended] == [(0, "")] * len(ended)


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

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Denies) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{proxy.server_address[1]}"
        monkeypatch.setenv("http_proxy", f"http://user:p%40ss@{address}")
        with pytest.raises(CallError) as error:
            get("http://judge.invalid/v1")
        proxy.shutdown()
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


def test_an_address_that_is_none_is_no_connection() -> None:
    with pytest.raises(CallError, match="invalid international domain name") as error:
        get("http://a b/v1")
    assert error.value.kind == "connection"
