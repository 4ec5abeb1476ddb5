"""Encrypted addresses, proxies, odd addresses, and the end of a process that has talked."""

from __future__ import annotations

import asyncio
import datetime
import http.server
import ipaddress
import ssl
import subprocess
import sys
import threading
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


def get(url: str) -> str:
    async def run() -> str:
        transport = Transport(timeout_s=10, secrets=())
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
    assert error.value.kind == "connection" and "p%40ss" not in str(error.value)


def test_an_address_that_is_none_is_no_connection() -> None:
    with pytest.raises(CallError, match="invalid international domain name") as error:
        get("http://a b/v1")
    assert error.value.kind == "connection"
