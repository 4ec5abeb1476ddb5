"""The embedded server over HTTP, in a process of its own, asked by the project's own client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tiny_hf import write_model
from transformers import AutoTokenizer

from nemo_ampo.chat.client import ChatClient
from nemo_ampo.chat.config import EndpointConfig
from nemo_ampo.commands.serve import main
from nemo_ampo.errors import ChatError, ConfigError, UserError
from nemo_ampo.serve import app as app_module
from nemo_ampo.serve import tied
from nemo_ampo.serve.app import create_app
from nemo_ampo.serve.capabilities import announces_mode_bias
from nemo_ampo.serve.config import PROGRAMS, ServeConfig, ServeEngine, check_serve, choose_engine
from nemo_ampo.serve.engine import Generated
from nemo_ampo.serve.launch import MODEL_NAME, Served, foreign_command, served
from nemo_ampo.serve.local import child_environment, free_port, server_process

EMBEDDED = ServeConfig(engine=ServeEngine.embedded, device="cpu", start_timeout_s=120)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path):
    with served(tiny_checkpoint, EMBEDDED) as running:
        yield running


def ask(server, *questions, **config):
    """Replies to many questions at once; a failed one is its ChatError."""

    async def everything():
        async with ChatClient(EndpointConfig(server.base_url, server.model, **config)) as client:
            await client.check()
            return await asyncio.gather(
                *(client.complete(client.question(HELLO, **{"temperature": 0, "max_tokens": 8, **q})) for q in questions),
                return_exceptions=True,
            )

    return asyncio.run(everything())


def post(server, **fields) -> tuple[int, dict]:
    body = {"model": server.model, "messages": HELLO, "max_tokens": 4, "temperature": 0} | fields
    return post_raw(server, json.dumps(body).encode())


def post_raw(server, body: bytes) -> tuple[int, dict]:
    request = urllib.request.Request(f"{server.base_url}/chat/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_replies_with_usage_and_reason(server, tiny_checkpoint: Path) -> None:
    assert (server.model, server.engine) == (MODEL_NAME, ServeEngine.embedded)
    one, same, sampled, again, other = ask(
        server, {}, {}, *({"temperature": 1.0, "max_tokens": 30, "seed": seed} for seed in (1, 1, 2))
    )
    assert one == same and one.finish_reason in ("length", "stop") and 0 < one.completion_tokens <= 8
    prompt = AutoTokenizer.from_pretrained(tiny_checkpoint).apply_chat_template(HELLO, add_generation_prompt=True)
    assert one.prompt_tokens == len(prompt)
    assert sampled == again != other


def test_what_is_not_served_is_refused_by_name(server) -> None:
    for fields, named in (
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"n": 2}, "n"),
        ({"stream": True}, "stream"),
        ({"messages": []}, "messages"),
        ({"temperature": 9}, "temperature"),
        ({"mode_bias": {"7": 1.0}}, "mode_bias"),
        ({"model": "other"}, "other"),
    ):
        status, body = post(server, **fields)
        assert status in (400, 404) and named in body["error"]["message"], (fields, body)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [1e-300, 1e-40, 9e-6, -1e-9, 2.001, NAN, INF, -INF, 1e308, "1", True, [1], {}]),
        ("top_p", [0, 1e-300, 1e-9, 1.0001, -1, NAN, INF, "0.5", [0.5]]),
        ("mode_bias", [{"1": 1e308}, {"1": 1e39, "2": -1e39}, {"4": -100.5}, {"1": NAN}, {"2": INF}, {"0": 1}, [1]]),
        ("max_tokens", [0, -1, 1.5, "5", NAN, [], True]),
        ("max_completion_tokens", [0, -(10**30), "x"]),
        ("seed", [2**63, -(2**63) - 1, 10**30, 0.5, "1", NAN]),
        ("stop", ["", [""], ["a", ""], "x" * 1001, ["a"] * 5, [f"zz{i}" for i in range(10_000)], 3, {"a": 1}, [["a"]]]),
        ("n", [0, 2, -1, 1000, "1"]),
        ("stream", [True, "yes", 1]),
        ("model", [3, None, [], "other", "x" * 100_000, "\x1b[2J"]),
        ("messages", [None, [], "hi", {}, [1], [{"role": "user"}], [{"role": "tool", "content": "x"}],
                      [{"role": "user", "content": None}], [{"role": "user", "content": "x", "name": "y"}],
                      [{"role": "user", "content": ["x"]}], [{"role": "user", "content": []}],
                      [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
                      [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "x" * 10**6}],
                      [{"role": "user", "content": "x"}] * 30_000]),
        ("logit_bias", [{"1": 100}]),
        ("response_format", [{"type": "json_object"}]),
        ("\ud800", [1]),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_served_is_a_400_that_names_its_field(server, field: str, values: list) -> None:
    for value in values:
        status, body = post(server, **{field: value})
        said = body["error"]["message"]
        assert status in (400, 404) and len(said) < 600 and said.isprintable(), (field, value, body)
        named = {"\ud800": "body", "messages": ""}.get(field, field)
        assert named in said or body["error"]["param"] == field, (field, value, body)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stop": [""]}, "stop.0: String should have at least 1 character"),
        ({"stop": ["a"] * 5}, "stop: List should have at most 4 items"),
        ({"stop": [["a"]]}, "stop.0: Input should be a valid string"),
        ({"stop": 3}, "stop: Input should be a valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type: Input should be"),
    ],
)
def test_of_a_value_of_several_kinds_what_is_wrong_with_the_kind_that_was_sent(server, fields: dict, said: str) -> None:
    assert post(server, **fields)[1]["error"]["message"].startswith(said)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'{"model":"\xff"}', b'{"model":' * 50_000, b"\x00" * 100])
def test_a_body_that_is_no_request_is_a_400(server, raw: bytes) -> None:
    assert post_raw(server, raw)[0] == 400


@pytest.mark.parametrize(
    "values",
    [
        b'"messages":[' + b"1," * 2_000_000 + b"1]",
        b'"messages":[' + b"{}," * 2_000_000 + b"{}]",
        b'"messages":[{' + b",".join(b'"%d":1' % i for i in range(500_000)) + b"}]",
        b'"mode_bias":{' + b",".join(b'"%d":1' % i for i in range(500_000)) + b"}",
        b",".join(b'"%d":1' % i for i in range(500_000)),
        b'"stop":' + b"[" * 2_000_000,
        b'"stop":[' + b'"a",' * 1_000_000 + b'"a"]',
        b'"stop":["' + b'\\",' * 1_000_000,
        b'"a":{},' * 500_000 + b'"' + b'\\"' * 1_000_000 + b"\\",
    ],
    ids=range(9),
)
def test_many_values_are_not_looked_at_one_by_one(server, values: bytes) -> None:
    """Of 4 million numbers that are no messages each became an error of its own: 7 GB, and a minute without an answer."""
    status, body = post_raw(server, b'{"model":"%s",' % server.model.encode() + values + b"}")
    few = values.startswith(b'"stop":["\\')
    assert status == 400 and few != ("more than 20000 values" in body["error"]["message"]), body


def test_a_text_may_hold_any_number_of_commas(server) -> None:
    status, body = post(server, messages=[{"role": "user", "content": ',{["\\' * 30_000}])
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"
    status, body = post(server, messages=[{"role": "user", "content": "x"}] * 6_000)
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"


def test_defaults_may_be_spelt_null(server) -> None:
    nothing = dict.fromkeys(
        ("temperature", "top_p", "seed", "stop", "n", "stream", "user", "mode_bias", "max_completion_tokens")
    )
    assert post(server, **nothing)[0] == 200
    assert post(server, max_tokens=10**30, stop=["\n", "z"], seed=-(2**63), temperature=1e-5, top_p=1e-5)[0] == 200


def test_a_body_too_large_is_a_413_and_holds_up_nobody(server) -> None:
    outcomes: list[int] = []
    large = json.dumps({"model": server.model, "messages": [{"role": "user", "content": "a" * 20_000_000}]}).encode()
    callers = [threading.Thread(target=lambda: outcomes.append(post_raw(server, large)[0])) for _ in range(3)]
    for caller in callers:
        caller.start()
    assert post(server)[0] == 200
    for caller in callers:
        caller.join(timeout=60)
    assert outcomes == [413] * 3


def test_poison_in_a_crowd_leaves_every_other_reply_as_it_is_alone(server) -> None:
    fields = [{"temperature": 1.0, "max_tokens": 40, "seed": i, "top_p": 0.9} for i in range(24)]
    alone = [post(server, **one)[1]["choices"] for one in fields]
    poison = [{"temperature": 1e-40}, {"top_p": 1e-300}, {"mode_bias": {"1": 1e308}}] * 8
    with ThreadPoolExecutor(48) as callers:
        together = [callers.submit(post, server, **one) for pair in zip(fields, poison, strict=True) for one in pair]
        assert {call.result()[0] for call in together[1::2]} == {400}
        assert [call.result()[1]["choices"] for call in together[::2]] == alone


def test_more_requests_than_can_be_held_are_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hold the only places; what they wait for never ends before they leave."""
    monkeypatch.setattr(app_module, "_MAX_OPEN", 2)
    engine = StuckEngine()

    async def ask() -> tuple[list[int], str]:
        transport = httpx.ASGITransport(create_app(engine, "stuck"))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            body = {"model": "stuck", "messages": HELLO}
            waiting = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(2)]
            while len(engine.futures) < 2:
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/chat/completions", json=body)
            healthy = await client.get("/health")
            for future in engine.futures:
                future.set_result(Generated((1,), "done", "stop"))
            done = [(await call).status_code for call in waiting]
            after = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            while len(engine.futures) < 3:
                await asyncio.sleep(0.01)
            engine.futures[2].set_result(Generated((1,), "done", "stop"))
            return [refused.status_code, healthy.status_code, *done, (await after).status_code], refused.headers[
                "retry-after"
            ]

    assert asyncio.run(ask()) == ([503, 200, 200, 200, 200], "1")


def test_a_body_that_never_comes_to_its_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "_BODY_TIMEOUT_S", 0.05)
    assert status_of_slow_body(b"{", None) == 408


def test_bodies_that_take_too_much_together_are_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "_MAX_OPEN_BYTES", 100)
    assert status_of_slow_body(b"x" * 60, b"x" * 60) == 503
    assert status_of_slow_body(b"x" * 40, b"x" * 40) == 400


def status_of_slow_body(first: bytes, last: bytes | None) -> int:
    """Status of the answer to a body in two pieces, the second of which may never come."""
    pieces = [{"type": "http.request", "body": first, "more_body": True}]
    if last is not None:
        pieces.append({"type": "http.request", "body": last, "more_body": False})
    statuses: list[int] = []

    async def receive() -> dict:
        return pieces.pop(0) if pieces else await asyncio.Event().wait()

    async def send(message: dict) -> None:
        statuses.extend([message["status"]] if message["type"] == "http.response.start" else [])

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
    asyncio.run(create_app(StuckEngine(), "stuck")(scope, receive, send))
    (status,) = statuses
    return status


class StuckEngine:
    """Replies when the test says so."""

    context = 10

    def __init__(self) -> None:
        self.futures: list[Future[Generated]] = []

    def encode(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return (1, 2)

    def submit(self, request: object) -> Future[Generated]:
        self.futures.append(Future())
        return self.futures[-1]


def test_a_prompt_beyond_the_context_says_so_in_the_words_of_the_api(server) -> None:
    status, body = post(server, messages=[{"role": "user", "content": "x" * 9000}])
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"
    (failure,) = ask(server, {"max_tokens": 4, "stop": None, "temperature": 0, "extra_body": {"best_of": 3}})
    assert isinstance(failure, ChatError) and failure.kind == "status" and "best_of" in str(failure)


def test_the_server_announces_the_dial_and_takes_it(server) -> None:
    assert asyncio.run(announces_mode_bias(server.base_url))
    assert not asyncio.run(announces_mode_bias("http://127.0.0.1:9/v1"))
    assert post(server, mode_bias={"1": -3.0, "4": 2.0})[0] == 200


def test_a_caller_that_leaves_frees_its_row(server) -> None:
    async def impatient():
        config = EndpointConfig(server.base_url, server.model, timeout_s=0.3, connection_retries=0)
        async with ChatClient(config) as client:
            questions = [
                client.complete(client.question(HELLO, temperature=1.9, max_tokens=2000, seed=s)) for s in range(64)
            ]
            return await asyncio.gather(*questions, return_exceptions=True)

    left = asyncio.run(impatient())
    assert sum(isinstance(reply, ChatError) for reply in left) > 8
    started = time.monotonic()
    assert post(server)[0] == 200
    # 64 replies of 2,000 tokens each would take far longer than this.
    assert time.monotonic() - started < 30


def test_a_folder_that_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Hugging Face folder"), served(tmp_path, EMBEDDED):
        pass
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="the embedded server exited with status 2: ") as raised, served(tmp_path, EMBEDDED):
        pass
    assert "\n" not in str(raised.value)


@pytest.fixture
def no_servers_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(folder: Path, program: str, script: str = "#!/bin/sh\n") -> None:
    path = folder / program
    path.write_text(script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_auto_takes_what_is_installed(no_servers_installed: Path) -> None:
    assert choose_engine(ServeConfig()) is ServeEngine.embedded
    for engine, program in PROGRAMS.items():
        with pytest.raises(ConfigError, match=rf"serve\.engine: {engine.value} needs the command {program}"):
            choose_engine(ServeConfig(engine=engine))
    install(no_servers_installed, "trtllm-serve")
    assert choose_engine(ServeConfig()) is ServeEngine.trtllm
    install(no_servers_installed, "vllm")
    assert choose_engine(ServeConfig()) is ServeEngine.vllm
    assert choose_engine(ServeConfig(), mode_dial=True) is ServeEngine.embedded
    with pytest.raises(ConfigError, match=r"policy\.mode_bias: serve\.engine=vllm cannot bias the mode"):
        choose_engine(ServeConfig(engine=ServeEngine.vllm), mode_dial=True)


def test_vllm_is_given_no_tokenizer_that_it_misreads(no_servers_installed: Path, tiny_checkpoint: Path) -> None:
    """A qwen2 model whose tokenizer.json does not split text as Qwen does."""
    for program in PROGRAMS.values():
        install(no_servers_installed, program)
    assert choose_engine(ServeConfig(), checkpoints=[tiny_checkpoint]) is ServeEngine.embedded
    with pytest.raises(ConfigError, match=r"serve\.engine: .*take embedded; .*otherwise than Qwen's"):
        choose_engine(ServeConfig(engine=ServeEngine.vllm), checkpoints=[tiny_checkpoint])
    assert choose_engine(ServeConfig(engine=ServeEngine.trtllm), checkpoints=[tiny_checkpoint]) is ServeEngine.trtllm


def test_another_server_is_started_asked_and_stopped(no_servers_installed: Path, tmp_path: Path) -> None:
    """Stands in for vllm: the same command line, our embedded server behind it."""
    root = Path(__file__).parents[3]
    install(
        no_servers_installed,
        "vllm",
        f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(root)!r})
command, folder, *rest = sys.argv[1:]
assert command == "serve", command
neutral = rest.index("--generation-config")
assert rest[neutral : neutral + 2] == ["--generation-config", "vllm"], rest
del rest[neutral : neutral + 2]
names = {{"--served-model-name": "--model-name", "--max-num-seqs": "--max-batch"}}
from nemo_ampo.serve.__main__ import main
sys.exit(main([folder, *(names.get(word, word) for word in rest)]))
""",
    )
    config = ServeConfig(extra_args=["--max-num-seqs", "4"], start_timeout_s=120)
    with served(write_model(tmp_path / "hf", "llama", tied=True), config) as running:
        assert running.engine is ServeEngine.vllm and post(running)[0] == 200
    with pytest.raises(OSError):
        post(running)


STARTING = """
import sys
from nemo_ampo.serve.config import ServeConfig, ServeEngine
from nemo_ampo.serve.launch import served
with served(sys.argv[1], ServeConfig(engine=ServeEngine.vllm, start_timeout_s=300)):
    pass
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_server_that_is_loading_ends_with_its_parent(sent: signal.Signals, tmp_path: Path) -> None:
    """The stand-in never gets ready, and looks after nobody."""
    (tmp_path / "config.json").write_text("{}")
    programs, temporary, pid_file = tmp_path / "bin", tmp_path / "tmp", tmp_path / "pid"
    programs.mkdir()
    temporary.mkdir()
    install(programs, "vllm", f"#!/bin/sh\necho $$ > {pid_file}.new && mv {pid_file}.new {pid_file}\nexec sleep 600\n")
    environment = child_environment() | {"PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(temporary)}
    parent = subprocess.Popen([sys.executable, "-c", STARTING, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    wait_until(pid_file.exists)
    server_pid = int(pid_file.read_text())
    assert running(server_pid)
    parent.send_signal(sent)
    parent.wait(timeout=60)
    wait_until(lambda: not running(server_pid))
    assert sent == signal.SIGKILL or list(temporary.iterdir()) == []


def running(pid: int) -> bool:
    """The process is there, and not only waiting for its exit status to be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.02)


def test_a_handler_of_sigterm_stays_and_is_put_back(no_servers_installed: Path, tmp_path: Path) -> None:
    """A training run asks for a checkpoint with it."""

    def handler(number: int, frame: object) -> None:
        pass

    def starts() -> None:
        (tmp_path / "config.json").write_text("{}")
        with (
            pytest.raises(UserError, match="vllm exited with status 3: no GPU"),
            served(tmp_path, ServeConfig(engine=ServeEngine.vllm)),
        ):
            pass

    install(no_servers_installed, "vllm", "#!/bin/sh\necho no GPU\nexit 3\n")
    before = signal.signal(signal.SIGTERM, handler)
    try:
        starts()
        assert signal.getsignal(signal.SIGTERM) is handler
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        starts()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_server_starts_for_a_parent_that_is_gone() -> None:
    command = [sys.executable, tied.__file__, "1", "echo", "started"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "the parent is gone\n")


def test_the_command_line_of_vllm_leaves_sampling_to_the_request() -> None:
    command, model = foreign_command(ServeEngine.vllm, "/models/policy-7b", ServeConfig(extra_args=["--seed", "2"]), 81)
    assert command[:6] == ["vllm", "serve", "/models/policy-7b", "--host", "127.0.0.1", "--port"]
    assert command[-4:] == ["--generation-config", "vllm", "--seed", "2"] and model == MODEL_NAME


def test_the_command_line_of_trtllm() -> None:
    command, model = foreign_command(ServeEngine.trtllm, "/models/policy-7b", ServeConfig(extra_args=["--tp_size", "2"]), 81)
    assert command == ["trtllm-serve", "/models/policy-7b", "--host", "127.0.0.1", "--port", "81", "--tp_size", "2"]
    assert model == "policy-7b"


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (ServeConfig(device="tpu"), "serve.device"),
        (ServeConfig(dtype="int3"), "serve.dtype"),
        (ServeConfig(max_batch=0), "serve.max_batch"),
        (ServeConfig(host=""), "serve.host"),
        (ServeConfig(engine=ServeEngine.embedded, extra_args=["--x"]), "serve.extra_args"),
        (ServeConfig(extra_args=["--x"]), "serve.extra_args"),
        (ServeConfig(engine=ServeEngine.vllm, dtype="float32"), "serve.dtype"),
        (ServeConfig(engine=ServeEngine.trtllm, max_batch=8), "serve.max_batch"),
    ],
)
def test_bad_values_name_their_key(config: ServeConfig, key: str, no_servers_installed: Path) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        check_serve(config)
        choose_engine(config)


def test_the_command_serves_in_the_foreground(tiny_checkpoint: Path, tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "nemo_ampo.commands.cli", "serve", str(tiny_checkpoint), "--engine", "embedded"]
    command += ["--port", str(port), "--max-batch", "4"]
    url = f"http://127.0.0.1:{port}/v1"
    with server_process(command, what="serve", start_timeout_s=120, base_url=url):
        served_here = Served(url, tiny_checkpoint.name, ServeEngine.embedded)
        assert post(served_here)[1]["usage"]["completion_tokens"] > 0
    assert main([str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("rows", [0, -3, 10**10])
def test_a_batch_of_no_rows_is_refused_by_the_command(rows: int, tiny_checkpoint: Path, caplog) -> None:
    assert main([str(tiny_checkpoint), "--engine", "embedded", "--port", "0", "--max-batch", str(rows)]) == 2
    assert "serve.max_batch: must be a whole number of at least 1" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "gpu"), "device: gpu was asked for, but torch sees no GPU"),
        (("--host", ""), "serve.host: must not be empty"),
        (("--ready-file", "/proc"), "--ready-file: cannot write /proc: Is a directory"),
    ],
)
def test_where_it_cannot_be_served_is_one_line(
    options: tuple[str, str], said: str, tiny_checkpoint: Path, caplog, capsys
) -> None:
    assert main([str(tiny_checkpoint), "--engine", "embedded", "--port", "0", *options]) == 2
    assert said in caplog.text + capsys.readouterr().err


def test_text_in_parts_is_the_text_they_make(server) -> None:
    whole = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello there"}]
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]
    said = [
        post(server, messages=messages, temperature=0)[1] for messages in (whole, [whole[0], {**whole[1], "content": parts}])
    ]
    assert said[0]["choices"] == said[1]["choices"] and said[0]["usage"] == said[1]["usage"]
