"""Tests of quota_milter.py, quota.cgi and maildir_quota.cgi.

    python3 -m pytest test_quota.py

Real: Postfix, Sendmail, Apache, lighttpd, nginx, uWSGI, gunicorn, Dovecot, deliverquota,
miltertest, each an instance of its own on loopback in a temporary folder. Faked is only what cannot
be had for real: a backend that misbehaves. A test whose part is missing skips and names the Debian
package; with CI set in the environment it fails. Postfix and the others want root.
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional, Union

import pytest

HERE = pathlib.Path(__file__).resolve().parent
MILTER = HERE / "quota_milter.py"
MBOX_CGI = HERE / "quota.cgi"
MAILDIR_CGI = HERE / "maildir_quota.cgi"
PYTHON = "/usr/bin/python3"  # the one that Debian's python3-milter is for
Path = Union[str, pathlib.Path]

# ---- helpers ----


def need(program: str, package: str) -> str:
    """Return the path of a program; skip the test (in CI: fail) where its package is missing."""
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/libexec")
    if found is None and os.path.exists(program):
        found = program
    if found is None:
        missing(f"{program} is missing: apt-get install {package}")
    return str(found)


def missing(why: str) -> None:
    """Skip a test for want of a part; in CI nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def need_root() -> None:
    """Skip where the test cannot start servers or change users."""
    if os.geteuid() != 0:
        missing("wants root")


def free_port() -> int:
    """Return a TCP port of loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    """Return the first true value that `condition` gives; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s for {what}")


def answers_at(port: int) -> bool:
    """Say whether somebody listens on this port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Process:
    """A program started for one test, its output (both streams) in a file."""

    def __init__(self, arguments: list[Path], log: pathlib.Path, **options: Any) -> None:
        self.log = log
        with open(log, "ab") as output:
            self.popen = subprocess.Popen(
                [str(argument) for argument in arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **options,
            )

    def output(self) -> str:
        """Return what the program has printed until now."""
        return self.log.read_text(errors="replace")

    def wait_ready(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for a sign of life; fail with the output where the program ends before it."""

        def alive() -> Any:
            assert self.popen.poll() is None, f"{what} ended: {self.output()}"
            return condition()

        wait_for(alive, what)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the program and its children; return the program's exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
            try:
                self.popen.wait(10)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self.popen.wait()


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Callable[..., Process]]:
    """Give a function that starts a program; all are stopped at the end, in reverse order."""
    started: list[Process] = []

    def start_program(*arguments: Path, port: Optional[int] = None, **options: Any) -> Process:
        log = tmp_path / f"output-{len(started)}.log"
        process = Process(list(arguments), log, **options)
        started.append(process)
        if port is not None:
            process.wait_ready(lambda: answers_at(port), f"{arguments[0]} on port {port}")
        return process

    yield start_program
    for process in reversed(started):
        process.stop()


class Response(NamedTuple):
    """What a CGI answered: HTTP status, the line without its end, the header, standard error."""

    status: int
    line: bytes
    header: str
    errors: str


def ask_cgi(
    script: pathlib.Path,
    query: Union[str, bytes],
    method: str = "GET",
    arguments: tuple[str, ...] = (),
    **settings: Path,
) -> Response:
    """Run a CGI as a web server does and read its answer."""
    environment: dict[bytes, bytes] = {
        b"GATEWAY_INTERFACE": b"CGI/1.1",
        b"REQUEST_METHOD": method.encode(),
        b"QUERY_STRING": query if isinstance(query, bytes) else query.encode(),
        b"PATH": b"/usr/bin:/bin",
    }
    environment.update((name.encode(), str(value).encode()) for name, value in settings.items())
    done = subprocess.run(
        [str(script), *arguments], env=environment, capture_output=True, timeout=60
    )
    header, _, body = done.stdout.partition(b"\n\n")
    status = header.partition(b"Status: ")[2][:3]
    errors = done.stderr.decode(errors="replace")
    return Response(int(status or 0), body.rstrip(b"\n"), header.decode(), errors)


class MilterSession:
    """An MTA's side of the milter protocol (version 6), for one connection."""

    def __init__(self, address: Union[int, Path]) -> None:
        if isinstance(address, int):
            self.socket = socket.create_connection(("127.0.0.1", address), timeout=60)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(60)
            self.socket.connect(str(address))
        version, actions, protocol = 6, 0x1FF, 0x1FFFFF
        self.send(b"O", struct.pack(">III", version, actions, protocol))
        command, data = self.receive()
        assert command == b"O", command
        self.protocol = struct.unpack(">III", data[:12])[2]

    def __enter__(self) -> "MilterSession":
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, command: bytes, data: bytes = b"") -> None:
        """Send one packet."""
        self.socket.sendall(struct.pack(">I", len(data) + 1) + command + data)

    def receive(self) -> tuple[bytes, bytes]:
        """Read one packet: command and data."""
        length = struct.unpack(">I", self.exactly(4))[0]
        packet = self.exactly(length)
        return packet[:1], packet[1:]

    def exactly(self, length: int) -> bytes:
        """Read so many bytes."""
        data = b""
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            assert more, "the milter closed the connection"
            data += more
        return data

    def mail(self, sender: str = "<sender@example.net>", *parameters: str) -> None:
        """Begin a message."""
        self.send(b"M", b"".join(p.encode() + b"\0" for p in (sender, *parameters)))
        if not self.protocol & 0x4000:  # SMFIP_NR_MAIL: no reply to this one
            assert self.receive() == (b"c", b"")

    def rcpt(self, recipient: Union[str, bytes], *parameters: str) -> str:
        """Give a recipient; return the SMTP reply, "" for one that is let through."""
        raw = recipient if isinstance(recipient, bytes) else recipient.encode()
        self.send(b"R", b"".join(p + b"\0" for p in (raw, *(p.encode() for p in parameters))))
        command, data = self.receive()
        assert command in (b"c", b"y"), (command, data)
        return data.rstrip(b"\0").decode("ascii")

    def abort(self) -> None:
        """End the message, as RSET does."""
        self.send(b"A")


class Backend:
    """A backend that misbehaves: `answers` maps a user to a line, a response or what to do."""

    def __init__(self, port: int = 0, context: Optional[ssl.SSLContext] = None) -> None:
        self.default: Any = b"OK %s 10 100\n"
        self.answers: dict[bytes, Any] = {}
        self.asked: list[bytes] = []  # request lines
        self.headers: list[bytes] = []
        self.busy = self.most = 0
        self.lock = threading.Lock()
        self.context = context
        self.listener = socket.create_server(("127.0.0.1", port), backlog=600)
        self.port = int(self.listener.getsockname()[1])
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.port}/cgi-bin/quota.cgi"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        """Serve each connection in a thread."""
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        """Read one request and answer it as told."""
        try:
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
            with connection:
                request = b""
                while b"\r\n\r\n" not in request:
                    more = connection.recv(65536)
                    if not more:
                        return
                    request += more
                line, _, header = request.partition(b"\r\n")
                found = re.search(rb"[?&]u=([^& ]*)", line)
                user = urllib.parse.unquote_to_bytes(found[1]) if found else b""
                with self.lock:
                    self.asked.append(line)
                    self.headers.append(header)
                    self.busy += 1
                    self.most = max(self.most, self.busy)
                try:
                    self.answer(connection, user, self.answers.get(user, self.default))
                finally:
                    with self.lock:
                        self.busy -= 1
        except OSError:
            pass

    def answer(self, connection: socket.socket, user: bytes, answer: Any) -> None:
        """Send a line in a proper response, raw bytes that begin with HTTP/, or call a function."""
        if callable(answer):
            answer = answer(connection)
        if answer is None:
            return
        if not answer.startswith(b"HTTP/"):
            body = answer.replace(b"%s", user)
            head = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
            answer = head % len(body) + body
        connection.sendall(answer)

    def users(self) -> list[str]:
        """Return which users were asked about, in order."""
        found = [re.search(rb"[?&]u=([^& ]*)", line) for line in self.asked]
        return [urllib.parse.unquote(match[1].decode()) for match in found if match]

    def close(self) -> None:
        """Listen no more."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def backend() -> Iterator[Backend]:
    """Give a backend that says what a test tells it to."""
    server = Backend()
    yield server
    with contextlib.suppress(OSError):
        server.close()


class RunningMilter(NamedTuple):
    """A milter that runs: its port and its process."""

    port: int
    process: Process

    def session(self) -> MilterSession:
        """Connect as an MTA does."""
        return MilterSession(self.port)

    def rcpt(self, recipient: Union[str, bytes], *mail_parameters: str) -> str:
        """Give one recipient of one message in a session of its own."""
        with self.session() as session:
            session.mail("<sender@example.net>", *mail_parameters)
            return session.rcpt(recipient)

    def log(self, text: str) -> str:
        """Wait for a line of the log that has this text and return it."""

        def found() -> list[str]:
            return [line for line in self.process.output().splitlines() if text in line]

        return str(wait_for(found, f"{text!r} in the log")[-1])


@pytest.fixture
def milter(start: Callable[..., Process]) -> Callable[..., RunningMilter]:
    """Give a function that starts the milter with options; the backend's URL comes first."""

    def start_milter(backend: Optional[Backend], *options: Path, **popen: Any) -> RunningMilter:
        port = free_port()
        urls = ["--backend", backend.url] if backend else []
        listen = ["--listen", f"inet:{port}@127.0.0.1"]
        process = start(PYTHON, MILTER, *listen, *urls, *options, port=port, **popen)
        return RunningMilter(port, process)

    return start_milter


FULL = b"OVERQUOTA %s 101 100\n"


def test_a_full_mailbox_is_deferred_and_others_pass(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers[b"john"] = FULL
    running = milter(backend)
    with running.session() as session:
        session.mail()
        assert session.rcpt("<mary@example.com>") == ""
        reply = "452 4.2.2 Quota exceeded for john@example.com, try again later"
        assert session.rcpt("<john@example.com>", "NOTIFY=NEVER") == reply
        assert session.rcpt("<paul@example.com>") == ""
    assert backend.asked[1] == b"GET /cgi-bin/quota.cgi?u=john&d=example.com HTTP/1.1"
    assert (
        "recipient=john@example.com user=john verdict=overquota used=101 quota=100"
        in running.log("overquota")
    )
    assert running.process.stop() == 0
