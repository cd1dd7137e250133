"""A client for an HTTP provider that runs programs somewhere else and takes the SandboxFusion request format.

The provider isolates; this module only sees to it that nothing it answers can hang, flood or mislead the host. What a
provider gives less of than the local backends do:

- Time is the provider's wall clock. The program also limits its own CPU time (`remote_program.py`), so a slow provider
  rarely turns into a time-out, but a program can undo that, and an overloaded provider can still end one too early.
- Memory: the program limits its own address space. What is killed for memory by the provider is a `crash` here.
- Limits on files, threads, open files and scratch space, and an empty scratch folder, are the provider's affair.
- CPU seconds and the resident set are not measured.
- Output that is not UTF-8, or beyond what the provider keeps (the reference implementation: 1 MiB), arrives as the
  provider shows it.
- An exit code of 129 to 192 cannot be told from a signal, as a provider may run programs through a shell.
"""

import base64
import builtins
import contextlib
import functools
import http.client
import io
import json
import math
import pathlib
import re
import select
import signal
import socket
import ssl
import time
import urllib.parse

from elpo_jax.tools.base import InfrastructureError, Status, ToolResult
from elpo_jax.tools.sandbox.limits import Limits
from elpo_jax.tools.sandbox.worker import signal_name

BACKEND = "remote"
CONNECT_S = 5.0
QUEUE_S = (
    30.0  # on top of what the program may take: a provider's queue, the start of its Python, the way there and back
)
START_S = 2.0  # of the time that the provider gives, for Python and this project's lines around the program

# The reference provider keeps 1 MiB of each of two streams, and one byte can take six in JSON.
MIN_REPLY_BYTES = 16 << 20
JSON_BYTES_PER_OUTPUT_BYTE = 2 * 6

_OUT_OF_CPU = (signal.SIGPROF, signal.SIGXCPU)
_TRACEBACK = re.compile(r"(?:  \+ Exception Group )?Traceback \(most recent call last\):|  File \"<code>\", line \d+")
_EXCEPTION = re.compile(r"(?:  \| )?(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*)(?::.*)?", re.ASCII)


class RemoteWorker:
    """One connection to a provider, kept open between calls. One thread runs programs; any may call `kill`.

    Proxies of the environment are ignored and redirects are failures, so programs go where the user said and nowhere
    else. Certificates are checked.

    Args:
      url: http or https; "/run_code" is added where the path does not end so.

    Raises:
      ValueError: If the address is not one.
    """

    def __init__(self, url: str):
        self._host, self._port, self._path, self._tls = _parse(url)
        self._socket: _Socket | None = None
        self._killed = False

    def run(self, code: str, stdin: bytes, mode: str, limits: Limits) -> ToolResult:
        """Runs one program.

        Args:
          code: The program.
          stdin: Its standard input.
          mode: "script" or "notebook".
          limits: `cpu_s`, `wall`, `memory_mb` and `output_kb` of it.

        Raises:
          InfrastructureError: If the provider cannot be reached, is too slow, breaks or answers something else; the
            next call uses a fresh connection.
        """
        time_limit = limits.wall + START_S
        body = _request(code, stdin, mode, limits, time_limit)
        most = max(MIN_REPLY_BYTES, JSON_BYTES_PER_OUTPUT_BYTE * limits.output_kb * 1024)
        try:
            reply = self._exchange(body, time.monotonic() + time_limit + QUEUE_S, most)
            return _result(reply, limits)
        except (OSError, http.client.HTTPException, ValueError, RecursionError, InfrastructureError) as error:
            self._disconnect()
            cause = str(error) if isinstance(error, InfrastructureError) else f"{type(error).__name__}: {error}"
            raise InfrastructureError(f"remote sandbox {self._host}:{self._port}: {_shown(cause)}") from None
        except BaseException:  # an interrupt, say: the answer to this call must not be taken for the next one's
            self._disconnect()
            raise

    def hang_up(self) -> None:
        """As `kill`, which does not wait."""
        self.kill()

    def kill(self) -> None:
        """Ends the call under way, which fails, and all later ones. Any number of times, from any thread."""
        self._killed = True
        sock = self._socket
        if sock is not None:
            sock.shutdown()

    def _exchange(self, body: bytes, deadline: float, most: int) -> object:
        """Sends a request and returns the decoded answer."""
        reused = self._socket is not None and not self._socket.has_news
        if not reused:
            self._connect(deadline)
        try:
            return self._talk(body, deadline, most)
        except (ConnectionError, http.client.RemoteDisconnected):
            # Servers close idle connections, and it may cross with our request; a request that was begun is a failure.
            if not reused or self._socket.received:
                raise
        self._connect(deadline)
        return self._talk(body, deadline, most)

    def _talk(self, body: bytes, deadline: float, most: int) -> object:
        sock = self._socket
        sock.begin(deadline, most)
        host = self._host if ":" not in self._host else f"[{self._host}]"
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {host}:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nAccept: application/json\r\nAccept-Encoding: identity\r\n\r\n"
        )
        sock.sendall(head.encode("ascii") + body)
        response = http.client.HTTPResponse(sock, method="POST")
        try:
            response.begin()
            if response.status != 200:
                raise InfrastructureError(f"HTTP status {response.status} {response.reason}")
            data = response.read()
            keep = not response.will_close
        finally:
            response.close()
        if not keep:
            self._disconnect()
        return json.loads(data)

    def _connect(self, deadline: float) -> None:
        self._disconnect()
        sock = socket.create_connection((self._host, self._port), min(CONNECT_S, _left(deadline)))
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                sock = _tls_context().wrap_socket(sock, server_hostname=self._host)
        except BaseException:
            sock.close()
            raise
        self._socket = _Socket(sock)
        if self._killed:
            raise InfrastructureError("killed")

    def _disconnect(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()


def reason(url: str) -> str:
    """Why the provider at `url` cannot be used, or ""; it runs a program to see.

    Raises:
      ValueError: If that is no address.
    """
    worker = RemoteWorker(url)
    try:
        result = worker.run("import sys\nsys.stdin.read()[::-1]", "é\0".encode(), "notebook", Limits())
    except InfrastructureError as error:
        return str(error)
    finally:
        worker.kill()
    if (result.status, result.stdout) != (Status.OK, repr("\0é") + "\n"):
        return f"{url}: a small program ended as {result.status}: {_shown(result.stdout + result.stderr)}"
    return ""


class _Socket:
    """A connected socket, whose every operation ends at the deadline and which brings so many bytes and no more.

    `http.client.HTTPResponse` reads from it through `makefile`.
    """

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._deadline = 0.0
        self._most = 0
        self.received = 0

    def begin(self, deadline: float, most: int) -> None:
        """Sets the bounds of one exchange."""
        self._deadline, self._most, self.received = deadline, most, 0

    @property
    def has_news(self) -> bool:
        """True where something arrived that nobody asked for: the end, as a rule."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return bool(poller.poll(0))

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_left(self._deadline))  # of the whole, not of each piece
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Incoming(self), 1 << 16)

    def receive(self, buffer: memoryview) -> int:
        self._sock.settimeout(_left(self._deadline))
        count = self._sock.recv_into(buffer)
        self.received += count
        if self.received > self._most:
            raise InfrastructureError(f"the answer is longer than {self._most} bytes")
        return count

    def shutdown(self) -> None:
        """Wakes the thread that waits for this socket."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # TLS's own version is not for two threads

    def close(self) -> None:
        self._sock.close()


class _Incoming(io.RawIOBase):
    """The readable side of a `_Socket`; closing it leaves the socket open for the next exchange."""

    def __init__(self, sock: _Socket):
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return self._sock.receive(buffer)


def _parse(url: str) -> tuple[str, int, str, bool]:
    """Host, port, path and whether TLS is used."""
    if not re.fullmatch(r"[!-~]*", url):
        raise ValueError(f"{_shown(url)} is no address of a sandbox: it has characters that no address has")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{_shown(url)} is no address of a sandbox: it must be http:// or https://, a host and a path")
    if parts.username is not None or parts.query or parts.fragment:  # not shown: it may be a password
        raise ValueError(f"the address of the sandbox at {parts.hostname} has more than a host, a port and a path")
    path = parts.path.rstrip("/")
    path = path if path.endswith("/run_code") else f"{path}/run_code"
    tls = parts.scheme == "https"
    return parts.hostname, parts.port or (443 if tls else 80), path, tls


@functools.cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


@functools.cache
def _wrapper() -> str:
    """The lines around the program: those for a process elsewhere, and those that run it, which are the same here."""
    folder = pathlib.Path(__file__).parent
    return "\n\n".join((folder / name).read_text("utf-8") for name in ("remote_program.py", "inside/program.py"))


def _request(code: str, stdin: bytes, mode: str, limits: Limits, time_limit: float) -> bytes:
    """The body of a request. What a model wrote enters it as base64 only, so it is never part of our own lines."""
    program = base64.b64encode(code.encode("utf-8", "surrogatepass")).decode("ascii")
    nowhere = "os.open(os.devnull, os.O_WRONLY)"  # for the exception's name, which the traceback tells as well
    lines = (
        _wrapper(),
        f"prepare({float(limits.cpu_s)!r}, {int(limits.memory_mb)!r})",
        f"main(base64.b64decode({program!r}), {mode!r}, {nowhere})",
    )
    request = {
        "code": "\n\n".join(lines),
        "language": "python",
        "stdin": base64.b64encode(stdin).decode("ascii"),
        "compile_timeout": time_limit,
        "run_timeout": time_limit,
        "files": {},
        "fetch_files": [],
    }
    return json.dumps(request).encode("ascii")


def _result(reply: object, limits: Limits) -> ToolResult:
    """What an answer says of the program.

    Raises:
      InfrastructureError: If it says nothing of it, or the provider says that it failed itself.
    """
    if not isinstance(reply, dict):
        raise InfrastructureError("the answer is no JSON object")
    if reply.get("status") not in ("Success", "Failed"):
        raise InfrastructureError(f"status {reply.get('status')}: {reply.get('message')}")
    ran = reply.get("run_result")
    if not isinstance(ran, dict):
        raise InfrastructureError("the answer has no run_result")
    code, seconds = ran.get("return_code"), ran.get("execution_time")
    timed_out = ran.get("status") == "TimeLimitExceeded"
    # "Error" is the provider's own failure to run a program in the reference implementation, and has no return code.
    finished = ran.get("status") == "Finished" or (ran.get("status") == "Error" and code != 0)
    if not timed_out and not (finished and type(code) is int and -64 <= code <= 255):
        raise InfrastructureError(f"run_result has status {ran.get('status')} and return code {code}")
    most = limits.output_kb * 1024
    (stdout, out_bytes), (stderr, err_bytes) = (_stream(ran, name, most) for name in ("stdout", "stderr"))
    number = None if timed_out else _signal(code)
    exc_type = _exception(stderr) if code == 1 else ""
    truncated = max(out_bytes, err_bytes) > most
    if truncated:
        status, detail, code, number, exc_type = Status.OUTPUT_LIMIT, "output", None, None, ""
    elif timed_out:
        status, detail, code = Status.TIMEOUT, "wall", None
    elif number in _OUT_OF_CPU:
        status, detail, code, number = Status.TIMEOUT, "cpu", None, None
    elif number is not None:
        status, detail, code = Status.CRASH, signal_name(number), None
    elif exc_type.endswith("MemoryError"):  # numpy has its own
        status, detail = Status.MEMORY, exc_type
    elif code:
        status, detail = Status.ERROR, exc_type or "exit"
    else:
        status, detail = Status.OK, ""
    return ToolResult(
        status,
        detail=detail,
        null_output=status is Status.OK and not stdout.strip() and not stderr.strip(),
        truncated=truncated,
        exc_type=exc_type,
        stdout=stdout,
        stderr=stderr,
        exit_code=code,
        signal=number,
        wall_s=float(seconds) if _is_duration(seconds) else 0.0,
        out_bytes=out_bytes + err_bytes,
        backend=BACKEND,
    )


def _stream(ran: dict, name: str, most: int) -> tuple[str, int]:
    """A stream's text, cut to so many bytes, and how many arrived."""
    text = ran.get(name)
    if not isinstance(text, str | None):
        raise InfrastructureError(f"{name} is no text")
    data = (text or "").encode("utf-8", "surrogatepass")
    return data[:most].decode("utf-8", "replace"), len(data)


def _signal(code: int) -> int | None:
    """The signal behind a return code, of Python's or of a shell's."""
    if code < 0:
        return -code
    return code - 128 if 128 < code <= 192 else None


def _exception(stderr: str) -> str:
    """The type of the exception that the last traceback in `stderr` ends with, or ""."""
    lines = stderr.splitlines()
    begin = next((i for i in reversed(range(len(lines))) if _TRACEBACK.match(lines[i])), None)
    if begin is None:  # no line of the program was to blame, or no memory was left for a traceback
        name = _EXCEPTION.fullmatch(lines[-1]) if lines else None
        known = getattr(builtins, name[1], None) if name else None
        return name[1] if isinstance(known, type) and issubclass(known, BaseException) else ""
    names = (_EXCEPTION.fullmatch(line) for line in lines[begin + 1 :])
    return next((name[1][:64] for name in names if name), "")


def _is_duration(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left


def _shown(text: str) -> str:
    """A text from elsewhere, cut and without control characters: it ends in logs."""
    return ascii(text if len(text) <= 200 else text[:200] + "...")[1:-1]
