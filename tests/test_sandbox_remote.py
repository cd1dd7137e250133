"""The remote backend against a real HTTP server that speaks the format and runs programs in a real Python."""

import contextlib
import dataclasses
import http.server
import json
import os
import pathlib
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from elpo_jax.tools.base import InfrastructureError, Status
from elpo_jax.tools.sandbox import Program, Sandbox, SandboxUnavailable, probes, remote
from elpo_jax.tools.sandbox.limits import Limits
from elpo_jax.tools.sandbox.remote import RemoteWorker

LIMITS = Limits(cpu_s=5.0, output_kb=8)
# A provider's settings that would show in what programs do.
ELSEWHERE = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
ELSEWHERE |= {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "OPENBLAS_NUM_THREADS": "64"}
HELLO = {
    "status": "Success",
    "message": "",
    "compile_result": None,
    "run_result": {"status": "Finished", "execution_time": 0.1, "return_code": 0, "stdout": "hello\n", "stderr": ""},
    "executor_pod_name": None,
    "files": {},
}


class Provider(http.server.ThreadingHTTPServer):
    """A server on a free port of this machine; `answer` writes the response to a handler for the decoded request."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.requests = []
        self.connections = 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients hang up in the middle here, which is the point


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.server.connections += 1

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Content-Type"] == "application/json"
        self.server.requests.append((self.path, json.loads(body)))
        self.server.answer(self, json.loads(body))

    def send(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def execute(request, folder, shell=False):
    """Runs a request's program as the reference provider does."""
    assert request["language"] == "python"
    file = pathlib.Path(folder, "tmp1.py")
    file.write_text(request["code"])
    command = [sys.executable, str(file)]
    if shell:
        command = ["bash", "-c", f"cd {folder} && {sys.executable} {file}"]
    began = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENBLAS"))}
    environment |= ELSEWHERE
    run = {"status": "Finished", "return_code": None}
    try:
        done = subprocess.run(
            command,
            input=request["stdin"].encode(),
            capture_output=True,
            timeout=request["run_timeout"],
            cwd=folder,
            env=environment,
        )
        run["return_code"], outputs = done.returncode, (done.stdout, done.stderr)
    except subprocess.TimeoutExpired as timeout:
        run["status"], outputs = "TimeLimitExceeded", (timeout.stdout or b"", timeout.stderr or b"")
    run["execution_time"] = time.monotonic() - began
    run["stdout"], run["stderr"] = (output[: 1 << 20].decode("utf-8", "replace") for output in outputs)
    status = "Success" if run["return_code"] == 0 else "Failed"
    return HELLO | {"status": status, "run_result": run}


@contextlib.contextmanager
def serve(answer):
    provider = Provider(answer)
    thread = threading.Thread(target=provider.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield provider
    finally:
        provider.shutdown()
        provider.server_close()
        thread.join()


@pytest.fixture(scope="module")
def provider(tmp_path_factory):
    def answer(handler, request):
        handler.send(execute(request, tmp_path_factory.mktemp("call")))

    with serve(answer) as provider:
        yield provider


@pytest.fixture
def run(provider):
    worker = RemoteWorker(provider.url)

    def run(code, stdin=b"", mode="script", limits=LIMITS):
        return worker.run(code, stdin, mode, limits)

    yield run
    worker.kill()


# --- programs -----------------------------------------------------------------------------------------------------


def test_a_program_that_ends_well(run):
    result = run("print(sum(range(10)))")
    assert (result.status, result.stdout, result.stderr, result.exit_code) == (Status.OK, "45\n", "", 0)
    assert (result.backend, result.out_bytes, result.null_output, result.signal) == ("remote", 3, False, None)
    assert 0.0 < result.wall_s < 20.0
    assert run("x = 1").null_output and run("print('  ')").null_output
    said = run("import sys\nprint('x', file=sys.stderr)")
    assert (said.stderr, said.null_output) == ("x\n", False)


@pytest.mark.parametrize(
    ("code", "exc_type"),
    [
        ("1/0", "ZeroDivisionError"),
        ("x = (", "SyntaxError"),
        ("raise ValueError('two\\nlines: of\\nTypeError: text')", "ValueError"),
        ("class Odd(Exception): pass\ntry:\n    {}['a']\nexcept KeyError:\n    raise Odd('x')", "Odd"),
        ("raise ExceptionGroup('both', [ValueError(1), TypeError(2)])", "ExceptionGroup"),
        ("import numpy as np; np.linalg.inv(np.zeros((2, 2)))", "LinAlgError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(): f()\nf()", "RecursionError"),
        ("print('\\ud800')", "UnicodeEncodeError"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        (f"class {'A' * 99}(Exception): pass\nraise {'A' * 99}()", "A" * 64),
    ],
)
def test_the_exception_that_ended_a_program(run, code, exc_type):
    result = run(code)
    assert (result.status, result.exc_type, result.detail, result.exit_code) == (Status.ERROR, exc_type, exc_type, 1)
    assert '  File "<code>", line ' in result.stderr
    assert set(re.findall(r'File "([^"]*)"', result.stderr)) <= {"<code>"} | set(
        re.findall(r'File "([^"]*(?:numpy)[^"]*)"', result.stderr)
    ), "no line of ours"
    assert "prepare" not in result.stderr and "main(" not in result.stderr


@pytest.mark.parametrize(
    ("code", "exit_code", "stderr"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no\\n')", 1, "no\n\n"),
        ("import os; os._exit(4)", 4, ""),
        ("import sys; print('Sorry: x', file=sys.stderr); sys.exit(1)", 1, "Sorry: x\n"),
    ],
)
def test_a_program_that_chooses_its_exit_code(run, code, exit_code, stderr):
    result = run(code)
    assert (result.status, result.exit_code, result.stderr) == (Status.ERROR, exit_code, stderr)
    assert (result.exc_type, result.detail) == ("", "exit")


def test_a_program_of_any_text_is_that_text(run):
    text = "'''\"\"\"\\ \n#{}\r\t\x01\u2028é\U0001f600"
    assert run(f"import sys\nsys.stdout.write(ascii({text!r}))").stdout == ascii(text)
    assert run("# -*- coding: latin-1 -*-\nprint('é')").stdout == "é\n"
    assert run("print(1)\0").exc_type in ("SyntaxError", "ValueError")
    assert run("x = '\ud800'").exc_type == "UnicodeEncodeError"
    assert run("").status is Status.OK


def test_standard_input_arrives_to_the_byte(run):
    stdin = bytes(range(256)) + b"\r\n\r\x00\xff" * 50_000
    code = "import hashlib, sys\nprint(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
    assert (
        run(code, stdin).stdout
        == subprocess.run([sys.executable, "-c", code], input=stdin, capture_output=True, text=False).stdout.decode()
    )
    assert run("print(input()); print(input())", "é\nb".encode()).stdout == "é\nb\n"
    assert run("input()").exc_type == "EOFError"
    assert run("print(1)", b"x" * (4 << 20)).stdout == "1\n", "input that nobody reads"


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        ("x = 2\nx + 1", "3\n"),
        ("'a'", "'a'\n"),
        ("None", ""),
        ("print(1)", "1\n"),
        ("x = 1", ""),
        ("if True:\n    5", ""),
        ("[\n  1,\n  2]  # a comment", "[1, 2]\n"),
    ],
)
def test_a_notebook_shows_its_last_value_and_a_script_does_not(run, code, stdout):
    assert run(code, mode="notebook").stdout == stdout
    assert run(code).stdout == ("1\n" if code == "print(1)" else "")


def test_calls_repeat(run):
    code = "import random, numpy\nprint(random.random(), numpy.random.rand(), list({'a', 'b', 'c', 'd', 'e'}))"
    first = run(code).stdout
    assert run(code).stdout == first
    np_state = np.random.RandomState(0)
    assert first.split()[1] == str(np_state.rand()), "numpy's global generator has the same seed as at home"
    assert run("import time; print(time.tzname[0], time.localtime(0).tm_hour)").stdout == "UTC 0\n"
    assert run("import os; print(os.environ['OPENBLAS_NUM_THREADS'])").stdout == "1\n", "rounding depends on it"


def test_text_is_utf8_whatever_the_provider_is_set_to(run):
    for stream in ("stdout", "stderr"):
        assert getattr(run(f"import sys\nprint('é', file=sys.{stream})"), stream) == "é\n"
    assert run("import sys\nprint('\\ud800', file=sys.stderr)").stderr == "\\ud800\n"
    assert run("open('a', 'w').write('é')\nprint(open('a', 'rb').read())").stdout == "b'\\xc3\\xa9'\n"


def test_limits_that_a_program_reaches(run):
    started = time.monotonic()
    cpu = run("while True: pass", limits=Limits(cpu_s=0.3, wall_s=20.0))
    assert (cpu.status, cpu.detail, cpu.exit_code, cpu.signal) == (Status.TIMEOUT, "cpu", None, None)
    stubborn = "import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)\nwhile True: pass"
    cpu = run(stubborn, limits=Limits(cpu_s=0.3, wall_s=20.0))
    assert (cpu.status, cpu.detail) == (Status.TIMEOUT, "cpu")
    wall = run("print('x', flush=True)\nimport time\ntime.sleep(60)", limits=Limits(cpu_s=1.0, wall_s=0.2))
    assert (wall.status, wall.detail, wall.stdout) == (Status.TIMEOUT, "wall", "x\n")
    assert time.monotonic() - started < 15.0
    for code in ("x = bytearray(3 << 30)", "import numpy\nnumpy.ones(3 << 27)"):
        memory = run(code, limits=Limits(memory_mb=256))
        assert (memory.status, memory.exit_code) == (Status.MEMORY, 1), memory.stderr
    assert run("import numpy; print(numpy.ones(1 << 20).sum())", limits=Limits(memory_mb=16)).status is Status.OK
    for stream in ("stdout", "stderr"):
        flood = run(f"import sys\nsys.{stream}.write('é' * 10_000)")
        assert (flood.status, flood.truncated, flood.exit_code) == (Status.OUTPUT_LIMIT, True, None)
        assert getattr(flood, stream) == "é" * 4096 and flood.out_bytes == 20_000
    assert run("print('x' * (8 * 1024 - 1))").status is Status.OK, "all of the limit may be used"
    assert run("import resource\nprint(resource.getrlimit(resource.RLIMIT_CORE))").stdout == "(0, 0)\n"


def test_signals_are_crashes_through_a_shell_too(run, tmp_path):
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
    with serve(lambda handler, request: handler.send(execute(request, tmp_path, shell=True))) as provider:
        for result in (run(code), RemoteWorker(provider.url).run(code, b"", "script", LIMITS)):
            assert (result.status, result.signal, result.exit_code) == (Status.CRASH, 11, None)
            assert result.detail == "SIGSEGV"


# --- what else a provider may answer --------------------------------------------------------------------------------


def answered(**changes):
    """How an answer is understood whose `run_result` differs from that of a program that printed hello."""
    ran = HELLO["run_result"] | changes
    reply = HELLO | {"run_result": {name: value for name, value in ran.items() if value != "absent"}}
    with serve(lambda handler, request: handler.send(reply)) as provider:
        return RemoteWorker(provider.url).run("", b"", "script", LIMITS)


def test_answers_with_less_in_them():
    assert answered(stdout=None, stderr="absent", execution_time=None).null_output
    assert answered(execution_time=float("inf")).wall_s == 0.0
    assert answered(status="TimeLimitExceeded", return_code=None, stdout="a").stdout == "a"
    assert answered(return_code=1, stderr="Killed").exc_type == ""
    assert answered(return_code=1, stderr="MemoryError\n").status is Status.MEMORY
    for code in (-24, 152, -27, 155):
        assert (answered(return_code=code).status, answered(return_code=code).detail) == (Status.TIMEOUT, "cpu")
    assert answered(return_code=-9).detail == "SIGKILL" and answered(return_code=-40).detail == "SIG40"
    traceback = 'Traceback (most recent call last):\n  File "/tmp/x.py", line 1, in <module>\n' + "a.b.Odd: " + "x" * 99
    assert answered(status="Error", return_code=1, stderr=traceback).exc_type == "Odd"
    assert answered(return_code=3, stderr=traceback).exc_type == "", "it printed a traceback and then chose to exit"
    assert answered(stdout="a\ud800b").stdout == "a" + "\ufffd" * 3 + "b"


@pytest.mark.parametrize(
    "changes",
    [
        {"return_code": "absent"},
        {"return_code": True},
        {"return_code": "0"},
        {"return_code": 10**30},
        {"status": "Error", "return_code": None},
        {"status": "Error", "return_code": 0},
        {"status": "Running"},
        {"status": "absent"},
        {"status": ["Finished"]},
        {"stdout": 5},
        {"stderr": ["x"]},
    ],
)
def test_answers_that_say_nothing_of_the_program(changes):
    with pytest.raises(InfrastructureError):
        answered(**changes)


# --- a provider that breaks -----------------------------------------------------------------------------------------


def drip(handler, request):
    """A byte now and then, so that no single read ever waits long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" ")
        time.sleep(0.02)


def drip_headers(handler, request):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    for _ in range(1000):
        handler.wfile.write(b"x")
        time.sleep(0.02)


def reset(handler, request):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


def huge(handler, request):
    handler.send_response(200)
    handler.send_header("Content-Length", str(100 << 20))
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b"x" * (1 << 20))
        handler.server.sent = getattr(handler.server, "sent", 0) + 1


def endless_chunks(handler, request):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while True:
        handler.wfile.write(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n")


def truncated(handler, request):
    body = json.dumps(HELLO).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[:-3])
    handler.close_connection = True


FAULTS = {
    "500": (lambda handler, request: handler.send(b"oops\x1b[31m\n", 500), "HTTP status 500"),
    "429": (lambda handler, request: handler.send(b"{}", 429), "HTTP status 429"),
    "204": (lambda handler, request: handler.send(b"", 204), "HTTP status 204"),
    "no HTTP": (lambda handler, request: handler.wfile.write(b"SSH-2.0-x\r\n\r\n"), "BadStatusLine"),
    "garbage": (lambda handler, request: handler.send(b"\x00\xff<html>"), "Error: "),
    "empty": (lambda handler, request: handler.send(b""), "JSONDecodeError"),
    "list": (lambda handler, request: handler.send([HELLO]), "no JSON object"),
    "deep": (lambda handler, request: handler.send(b"[" * 100_000), "RecursionError"),
    "long number": (lambda handler, request: handler.send(b"1" * 100_000), "ValueError"),
    "SandboxError": (
        lambda handler, request: handler.send(HELLO | {"status": "SandboxError", "message": "no\x1b pod"}),
        r"status SandboxError: no\\x1b pod",
    ),
    "no run_result": (lambda handler, request: handler.send(HELLO | {"run_result": None}), "no run_result"),
    "truncated": (truncated, "IncompleteRead"),
    "reset": (reset, "ConnectionResetError"),
    "100 MB": (huge, "longer than 16777216 bytes"),
    "endless": (endless_chunks, "longer than 16777216 bytes"),
    "drip": (drip, "TimeoutError"),
    "drip in the headers": (drip_headers, "TimeoutError"),
    "silence": (lambda handler, request: time.sleep(5), "(?i)timed? ?out"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_provider_is_none_of_the_program(monkeypatch, fault):
    """It raises within the deadline, says why in one clean line, and the next call is answered."""
    monkeypatch.setattr(remote, "QUEUE_S", 0.5)
    monkeypatch.setattr(remote, "START_S", 0.1)
    answer, message = FAULTS[fault]
    limits = Limits(cpu_s=0.4, wall_s=0.4)
    with serve(answer) as provider:
        worker = RemoteWorker(provider.url)
        began = time.monotonic()
        with pytest.raises(InfrastructureError, match=message) as raised:
            worker.run("", b"", "script", limits)
        assert time.monotonic() - began < (10.0 if fault in ("100 MB", "endless") else 3.0)
        assert re.fullmatch(r"remote sandbox 127\.0\.0\.1:\d+: [ -~]{1,300}", str(raised.value))
        assert len(provider.requests) == 1, "a request that may have run is not sent again behind the pool's back"
        assert getattr(provider, "sent", 0) < 40, "what is too long is not read to its end"
        provider.answer = lambda handler, request: handler.send(HELLO)
        assert worker.run("", b"", "script", limits).stdout == "hello\n"


def test_a_provider_that_is_not_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InfrastructureError, match="ConnectionRefusedError"):
            RemoteWorker(url).run("", b"", "script", LIMITS)
    with pytest.raises(InfrastructureError, match="gaierror"):
        RemoteWorker("http://nowhere.invalid").run("", b"", "script", LIMITS)


def test_plain_http_is_no_https(provider):
    with pytest.raises(InfrastructureError, match="SSL"):
        RemoteWorker(provider.url.replace("http:", "https:")).run("", b"", "script", LIMITS)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="a certificate is made with openssl")
def test_https_checks_the_certificate(tmp_path, monkeypatch):
    settings = tmp_path / "settings"
    settings.write_text("[req]\ndistinguished_name=name\n[name]\n")  # whatever this machine's are

    def certify(name):
        """A server whose certificate is for `name`, and that certificate."""
        key, certificate = tmp_path / f"{name}.key", tmp_path / f"{name}.pem"
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-config", str(settings)]
        make += ["-addext", f"subjectAltName={name}", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(make, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return context, certificate

    def call(provider):
        remote._tls_context.cache_clear()
        worker = RemoteWorker(f"https://127.0.0.1:{provider.server_port}")
        try:
            return [worker.run("", b"", "script", LIMITS).stdout for _ in range(3)]
        finally:
            worker.kill()
            remote._tls_context.cache_clear()

    for name, trusted in (("IP:127.0.0.1", False), ("DNS:elsewhere", True), ("IP:127.0.0.1", True)):
        context, certificate = certify(name)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate) if trusted else os.devnull)
        with serve(lambda handler, request: handler.send(HELLO)) as provider:
            provider.socket = context.wrap_socket(provider.socket, server_side=True)
            if name.startswith("IP") and trusted:
                assert call(provider) == ["hello\n"] * 3
                assert provider.connections == 1
            else:
                with pytest.raises(InfrastructureError, match="CERTIFICATE_VERIFY_FAILED"):
                    call(provider)
                assert provider.requests == []


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_redirect_leads_nowhere(scheme, tmp_path):
    """A program must not be sent on to whom the provider names, nor a local file be taken for an answer."""
    (tmp_path / "answer").write_text(json.dumps(HELLO))
    with serve(lambda handler, request: handler.send(HELLO)) as other:
        target = f"{other.url}/run_code" if scheme == "http" else f"file://{tmp_path}/answer"
        for status in (301, 302, 307, 308):
            redirect = serve(lambda handler, request, s=status: handler.send(b"", s, Location=target))
            with redirect as provider, pytest.raises(InfrastructureError, match=f"HTTP status {status}"):
                RemoteWorker(provider.url).run("", b"", "script", LIMITS)
        assert other.requests == []


def test_proxies_of_the_environment_are_not_asked(monkeypatch):
    with serve(lambda handler, request: handler.send(b"", 502)) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("no_proxy", "")
        with serve(lambda handler, request: handler.send(HELLO)) as provider:
            assert RemoteWorker(provider.url).run("", b"", "script", LIMITS).stdout == "hello\n"
        assert proxy.connections == 0


# --- the connection -------------------------------------------------------------------------------------------------


def test_one_connection_serves_many_calls():
    with serve(lambda handler, request: handler.send(HELLO)) as provider:
        worker = RemoteWorker(provider.url)
        for _ in range(5):
            assert worker.run("", b"", "script", LIMITS).status is Status.OK
        assert (provider.connections, len(provider.requests)) == (1, 5)
        # Each of these ends the connection, and none of it may reach the next call's answer.
        provider.answer = lambda handler, request: handler.send(HELLO, Connection="close")
        assert worker.run("", b"", "script", LIMITS).status is Status.OK
        provider.answer = lambda handler, request: (
            handler.send(json.dumps(HELLO).encode() + b" ", 200)
            or (handler.wfile.write(b"HTTP/1.1 500 Injected\r\n\r\n"))
        )
        for _ in range(3):
            assert worker.run("", b"", "script", LIMITS).status is Status.OK
            time.sleep(0.05)


def test_an_idle_connection_that_the_server_closed_is_no_failure():
    def answer(handler, request):
        handler.send(HELLO)
        handler.connection.settimeout(0.05)  # of the wait for the next request

    with serve(answer) as provider:
        worker = RemoteWorker(provider.url)
        for _ in range(3):
            assert worker.run("", b"", "script", LIMITS).status is Status.OK
            time.sleep(0.2)
        assert provider.connections == 3


def test_a_connection_that_is_closed_while_a_request_is_on_its_way_is_tried_once_more():
    def answer(handler, request):
        if len(handler.server.requests) == 2:  # the second request of the first connection: no answer, not a byte
            handler.close_connection = True
            return
        handler.send(HELLO)

    with serve(answer) as provider:
        worker = RemoteWorker(provider.url)
        assert [worker.run("", b"", "script", LIMITS).status for _ in range(2)] == [Status.OK] * 2
        assert (provider.connections, len(provider.requests)) == (2, 3)


def test_a_request_that_was_answered_in_part_is_not_tried_again_here():
    def answer(handler, request):
        if len(handler.server.requests) == 1:
            return handler.send(HELLO)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")
        time.sleep(0.1)
        return reset(handler, request)

    with serve(answer) as provider:
        worker = RemoteWorker(provider.url)
        assert worker.run("", b"", "script", LIMITS).status is Status.OK
        with pytest.raises(InfrastructureError, match="ConnectionResetError"):
            worker.run("", b"", "script", LIMITS)
        assert (provider.connections, len(provider.requests)) == (1, 2)


def test_a_connection_that_the_server_will_close_is_not_used_again():
    def answer(handler, request):
        handler.send(HELLO, Connection="close")
        time.sleep(3)

    with serve(answer) as provider:
        worker = RemoteWorker(provider.url)
        began = time.monotonic()
        assert [worker.run("", b"", "script", LIMITS).status for _ in range(2)] == [Status.OK] * 2
        assert time.monotonic() - began < 2.0


def test_kill_ends_the_call_under_way_and_all_later_ones():
    waiting = threading.Event()

    def answer(handler, request):
        if len(handler.server.requests) == 1:
            return handler.send(HELLO)
        waiting.set()
        return time.sleep(5)

    with serve(answer) as provider:
        worker, raised = RemoteWorker(provider.url), []
        assert worker.run("", b"", "script", LIMITS).status is Status.OK

        def call():
            try:
                worker.run("", b"", "script", LIMITS)
            except InfrastructureError as error:
                raised.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        assert waiting.wait(5)
        began = time.monotonic()
        worker.kill()
        thread.join(5)
        assert raised and time.monotonic() - began < 1.0
        with pytest.raises(InfrastructureError, match="killed"):
            worker.run("", b"", "script", LIMITS)
        assert len(provider.requests) == 2


def test_failures_leave_no_descriptors_behind():
    def count():
        return len(os.listdir("/proc/self/fd"))

    with serve(lambda handler, request: handler.send(b"", 500)) as provider:
        worker = RemoteWorker(provider.url)
        before = None
        for _ in range(50):
            with pytest.raises(InfrastructureError):
                worker.run("", b"", "script", LIMITS)
            before = before or count()
        time.sleep(0.2)
        assert count() <= before + 2


# --- addresses ------------------------------------------------------------------------------------------------------


def test_where_a_request_goes():
    with serve(lambda handler, request: handler.send(HELLO)) as provider:
        for path in ("", "/", "/a/b", "/a/run_code", "/a/run_code/"):
            RemoteWorker(provider.url + path).run("", b"", "script", LIMITS)
        assert [path for path, _ in provider.requests] == [
            "/run_code",
            "/run_code",
            "/a/b/run_code",
            "/a/run_code",
            "/a/run_code",
        ]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8080",
        "ftp://host",
        "file:///etc/passwd",
        "http://",
        "http://user:secret@host",
        "http://host/a?b=c",
        "http://host/#a",
        "http://host:99999",
        "http://host/\r\nX-Injected: 1",
        "http://host/a b",
        "http://hóst",
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError) as raised:
        RemoteWorker(url)
    assert "secret" not in str(raised.value)


def test_a_request_holds_the_program_as_base64_only():
    with serve(lambda handler, request: handler.send(HELLO)) as provider:
        RemoteWorker(provider.url).run("my_secret = 'é'", b"my_input", "notebook", Limits(cpu_s=2.0, wall_s=3.0))
        ((_, request),) = provider.requests
    assert set(request) == {
        "code",
        "language",
        "stdin",
        "compile_timeout",
        "run_timeout",
        "files",
        "fetch_files",
    }
    assert (request["language"], request["files"], request["fetch_files"]) == ("python", {}, [])
    assert request["run_timeout"] == 3.0 + remote.START_S
    assert "my_secret" not in request["code"] and "my_input" not in json.dumps(request)
    compile(request["code"], "request", "exec")


# --- as a backend ---------------------------------------------------------------------------------------------------


def test_a_provider_is_tried_before_it_is_used(provider):
    assert remote.reason(provider.url) == ""
    with serve(lambda handler, request: handler.send(HELLO)) as impostor:
        assert "ended as ok: hello" in remote.reason(impostor.url)
    with serve(lambda handler, request: handler.send(b"", 503)) as broken:
        assert "HTTP status 503" in remote.reason(broken.url)


def test_the_sandbox_uses_a_provider(provider, monkeypatch):
    with Sandbox(workers=2, backend="remote", url=provider.url) as sandbox:
        assert sandbox.backend == "remote"
        results = sandbox.run_many([f"print({n} * {n})" for n in range(8)])
        assert [result.stdout for result in results] == [f"{n * n}\n" for n in range(8)]
        assert {(result.status, result.backend, result.attempt) for result in results} == {(Status.OK, "remote", 1)}
        assert sandbox.run("2 + 2", mode="notebook").stdout == "4\n"
        assert sandbox.run("print(input())", "a").stdout == "a\n"
        assert sandbox.counters()["retries"] == 0
    monkeypatch.setenv("ELPO_SANDBOX_URL", provider.url)
    with Sandbox(workers=1, backend="remote") as sandbox:
        assert sandbox.run("print('from the environment')").stdout == "from the environment\n"
    monkeypatch.delenv("ELPO_SANDBOX_URL")
    with pytest.raises(SandboxUnavailable, match="ELPO_SANDBOX_URL"):
        Sandbox(backend="remote")


def test_a_providers_fault_is_tried_again_and_then_no_fault_of_the_program(monkeypatch):
    monkeypatch.setattr(remote, "reason", lambda url: "")  # it broke after the start

    def answer(handler, request):
        handler.send(HELLO) if len(handler.server.requests) % 3 == 0 else handler.send(b"", 500)

    with serve(answer) as provider, Sandbox(workers=1, backend="remote", url=provider.url) as sandbox:
        result = sandbox.run("print('hello')")
        assert (result.status, result.attempt, result.stdout) == (Status.OK, 3, "hello\n")
        provider.answer = lambda handler, request: handler.send(b"", 500)
        lost = sandbox.run("print('hello')")
        assert (lost.status, lost.status.is_fault, lost.stdout) == (Status.SANDBOX_ERROR, False, "")
        assert "HTTP status 500" in lost.detail
        counters = sandbox.counters()
        assert (counters["calls"], counters["sandbox_errors"], counters["retries"]) == (2, 1, 4)


def test_a_program_ends_there_as_it_does_here(provider):
    """What a learner sees of a program must not depend on where it ran."""
    if all(probes.available().values()):
        pytest.skip("no local backend works here")
    programs = [
        Program("print(1 + 1)"),
        Program("x = [1, 2]\nx", mode="notebook"),
        Program("def f(n):\n    return 1 / n\n\nprint('before')\nf(0)"),
        Program("x = (1,\n"),
        Program("print(1)\0"),
        Program("try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise KeyError('a') from error"),
        Program("import sys\nsys.exit('sorry')"),
        Program("import sys\nsys.exit(7)"),
        Program("import os\nos.abort()"),
        Program("import sys\nprint(sys.argv, __name__, sorted(globals()))"),
        Program("import atexit\natexit.register(print, 'bye')\nprint('x', end='')"),
        Program("import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()"),
        Program("import sys\nprint(sys.stdin.readlines())", stdin="é\r\nb"),
        Program("import sys\nprint(sys.stdin.read())", stdin=b"\xff"),
        Program("import random, numpy\nprint(random.random(), numpy.random.rand(), hash('a'))"),
        Program("import numpy as np\nnp.linalg.inv(np.zeros((2, 2)))"),
        Program("import sympy\nx = sympy.Symbol('x')\nsympy.solve(x**2 - 4, x)", mode="notebook"),
        Program("x = bytearray(8 << 30)"),
        Program("print('x' * 10_000_000)"),
        Program("import sys\nprint('a', file=sys.stderr)"),
        Program("raise SystemError('\ud800')"),
        Program("class Loud(Exception):\n    def __str__(self):\n        raise ValueError\nraise Loud"),
        Program("if 1 is 1: print('with a warning')"),
        Program("while True: pass", limits=Limits(cpu_s=0.3)),
    ]
    with Sandbox(workers=1) as here, Sandbox(workers=1, backend="remote", url=provider.url) as there:
        for program, ours, theirs in zip(programs, here.run_many(programs), there.run_many(programs), strict=True):
            # The name of a frame of a package's, and the bytes that arrived beyond the limit, differ.
            ours, theirs = (
                dataclasses.replace(
                    result, backend="", out_bytes=0, stderr=re.sub(r'"[^"]*/(numpy/)', r'"\1', result.stderr)
                )
                for result in (ours, theirs)
            )
            assert theirs == ours, program
