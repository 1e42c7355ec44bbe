"""Tests of quota_milter.py, quota.cgi and maildir_quota.cgi.

    python3 -m pytest test_quota.py

Real: Postfix, Sendmail, Apache, lighttpd, nginx, uWSGI, gunicorn, Dovecot, deliverquota,
miltertest, each an instance of its own on loopback in a temporary folder. Faked is only what cannot
be had for real: a backend that misbehaves. A test whose part is missing skips and names the Debian
package; with CI set in the environment it fails. Postfix and the others want root.
"""

import base64
import contextlib
import http.client as http_client
import importlib.machinery
import importlib.util
import os
import pathlib
import pwd
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
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
    /,
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


# ---- tables: addresses, answers, replies ----


def load(script: pathlib.Path) -> Any:
    """Import one of the scripts, whatever its file name ends in."""
    if script == MILTER and importlib.util.find_spec("Milter") is None:
        missing(f"pymilter is missing for {sys.executable}: apt-get install python3-milter")
    name = script.name.replace(".", "_")
    loader = importlib.machinery.SourceFileLoader(name, str(script))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader) or None)  # type: ignore[arg-type]
    sys.modules[name] = module
    loader.exec_module(module)
    return module


ADDRESSES = [
    # (as the MTA gives it, user, domain that is asked about)
    ("<john@example.com>", "john", "example.com"),
    ("john@example.com", "john", "example.com"),
    ("<John@Example.COM>", "john", "example.com"),
    ("<john@example.com.>", "john", "example.com"),
    ("<john>", "john", ""),
    ("<>", "", ""),
    ("", "", ""),
    ("<@example.com>", "", "example.com"),
    ("<john@>", "john", ""),
    ("<@a.example,@b.example:john@example.com>", "john", "example.com"),
    ("<@[IPv6:::1],@b.example:john@example.com>", "john", "example.com"),
    ("<@a.example:john>", "john", ""),
    ("<john@[192.0.2.1]>", "john", "[192.0.2.1]"),
    ('<"a b"@example.com>', "a b", "example.com"),
    ('<"a@b"@example.com>', "a@b", "example.com"),
    ('<"a@b">', "a@b", ""),
    (r'<"a\"b\\c"@example.com>', 'a"b\\c', "example.com"),
    ('<"a:b"@example.com>', "a:b", "example.com"),
    ('<""@example.com>', "", "example.com"),
    ("<a@b@example.com>", "a@b", "example.com"),
    ("<john+lists@example.com>", "john", "example.com"),
    ("<john+a+b@example.com>", "john", "example.com"),
    ("<john+@example.com>", "john", "example.com"),
    ("<+john@example.com>", "+john", "example.com"),
    ("<+@example.com>", "+", "example.com"),
    ('<"john+a b"@example.com>', "john", "example.com"),
    ("<JÖRG@EXÄMPLE.com>", "jörg", "exämple.com"),
    ("<j\udcf6rg@example.com>", "j\udcf6rg", "example.com"),
    ("<a%b&c#d/e@example.com>", "a%b&c#d/e", "example.com"),
    ("<../x@example.com>", "../x", "example.com"),
    ("<a\x01b\x7f@example.com>", "a\x01b\x7f", "example.com"),
    ("<" + "x" * 1000 + "@example.com>", "x" * 1000, "example.com"),
]


@pytest.mark.parametrize(("given", "user", "domain"), ADDRESSES)
def test_an_address_is_read_as_the_mailbox_it_means(given: str, user: str, domain: str) -> None:
    address = load(MILTER).Address.parse(given, "+", False)
    assert (address.user, address.domain) == (user, domain)


@pytest.mark.parametrize(
    ("given", "delimiters", "case_sensitive", "user"),
    [
        ("<john-a+b@x>", "", False, "john-a+b"),
        ("<john-a+b@x>", "+-", False, "john"),
        ("<john-a+b@x>", "+", False, "john-a"),
        ("<john]a@x>", "]^", False, "john"),
        ("<John@x>", "+", True, "John"),
    ],
)
def test_delimiter_and_case_are_options(
    given: str, delimiters: str, case_sensitive: bool, user: str
) -> None:
    assert load(MILTER).Address.parse(given, delimiters, case_sensitive).user == user


ANSWERS = [
    # (line, status, used, quota); None: a fault
    (b"OK john 5 100\n", "OK", 5, 100),
    (b"OK john 5 100\r\n", "OK", 5, 100),
    (b"OK john 5 100", "OK", 5, 100),
    (b"OVERQUOTA john 101 100\n", "OVERQUOTA", 101, 100),
    (b"UNKNOWN john 0 100\n", "UNKNOWN", 0, 100),
    (b"UNKNOWN john\n", "UNKNOWN", None, None),
    (b"UNKNOWN\n", "UNKNOWN", None, None),
    (b"OVERQUOTA\n", "OVERQUOTA", None, None),
    (b"OK john  209715200\n", "OK", None, 209715200),
    (b"OK john 5 \n", "OK", 5, None),
    (b"OK OVERQUOTA 5 100\n", "OK", 5, 100),
    (b"OVERQUOTA OK 101 100\n", "OVERQUOTA", 101, 100),
    (b"OK a b c 5 100\n", "OK", 5, 100),
    (b"OK j\xf6rg 5 100\n", "OK", 5, 100),
    (b"OK john -5 100\n", "OK", None, 100),
    (b"OK john +5 1e3\n", "OK", None, None),
    (b"OK john 5.0 100\n", "OK", None, 100),
    (b"OK john \xd9\xa1 100\n", "OK", None, 100),  # a digit, but not an ASCII one
    (b"OK john 5 100\nOVERQUOTA john 5 1\n", "OK", 5, 100),
    (b"", None, None, None),
    (b"\n", None, None, None),
    (b"\nOK john 5 100\n", None, None, None),
    (b" OK john 5 100\n", None, None, None),
    (b"ok john 5 100\n", None, None, None),
    (b"OKAY john 5 100\n", None, None, None),
    (b"OK\tjohn 5 100\n", None, None, None),
    (b"ERROR no such thing\n", None, None, None),
    (b"<html><body>OVERQUOTA</body></html>\n", None, None, None),
    (b"\x00\xff\xfe\x80binary", None, None, None),
    (b"OK " + b"x" * 3_000_000, None, None, None),
    (b"OK " + b"x" * 3000 + b" 5 100\n", "OK", 5, 100),
]


def test_every_answer_is_read_as_the_interface_says(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    running = milter(backend, "--verbose", "--unknown-reply", "550 5.1.1 No {address} here")
    replies = {"OK": "", "OVERQUOTA": "452 4.2.2 Quota", "UNKNOWN": "550 5.1.1 No", None: ""}
    with running.session() as session:
        session.mail()
        for number, (line, status, used, quota) in enumerate(ANSWERS):
            user = f"u{number}"
            backend.answers[user.encode()] = line
            reply = session.rcpt(f"<{user}@example.com>")
            assert reply.startswith(replies[status]) and bool(reply) == bool(replies[status]), line
            logged = running.log(f"user={user} ")
            shown = ["-" if number is None else number for number in (used, quota)]
            assert "used={} quota={} ".format(*shown) in logged, line
            assert ("verdict=fault" in logged) == (status is None), line


RESPONSES = [
    # (response, whether it is a fault); the line in it says OVERQUOTA each time
    (b"HTTP/1.0 200 OK\r\n\r\nOVERQUOTA %s 101 100\n", False),
    (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\nOVERQUOTA %s 101 100", False),
    (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"7\r\nOVERQUO\r\n8\r\nTA x 9 8\r\n0\r\n\r\n",
        False,
    ),
    (b"HTTP/1.0 500 Oops\r\n\r\nOVERQUOTA %s 101 100\n", True),
    (b"HTTP/1.0 404 Not Found\r\n\r\nOVERQUOTA %s 101 100\n", True),
    (b"HTTP/1.0 401 Unauthorized\r\n\r\nOVERQUOTA %s 101 100\n", True),
    (b"HTTP/1.0 204 No Content\r\n\r\n", True),
    (b"HTTP/1.0 206 Partial\r\n\r\nOVERQUOTA %s 101 100\n", True),
    (b"HTTP/1.0 302 Found\r\nLocation: SELF\r\n\r\nOVERQUOTA %s 101 100\n", True),
    (b"HTTP/1.0 301 Moved\r\nLocation: file:///etc/passwd\r\n\r\n", True),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nOVERQUOTA %s 10", True),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\nOVERQUOTA %s 101", True),
    (b"HTTP/1.0 OVERQUOTA\r\n\r\n", True),
    (b"HTTP/9.9 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\nOVERQUOTA %s 101 100\n", True),
    (b"HTTP/1.0 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\nOVERQUOTA %s 101 100\n", True),
]


def test_only_a_whole_200_response_is_believed(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    running = milter(backend, "--on-error", "tempfail")
    fault = "451 4.3.0 The mailbox of {} cannot be checked, try again later"
    with running.session() as session:
        session.mail()
        for number, (response, is_fault) in enumerate(RESPONSES):
            user = f"u{number}"
            backend.answers[user.encode()] = response.replace(b"SELF", backend.url.encode())
            reply = session.rcpt(f"<{user}@example.com>")
            if is_fault:
                assert reply == fault.format(f"{user}@example.com"), response[:80]
            else:
                assert reply.startswith("452 4.2.2"), response[:80]
    assert backend.users() == [f"u{number}" for number in range(len(RESPONSES))]


SIZES = [
    # (answer, SIZE parameters, beginning of the reply)
    (b"OK %s 90 100\n", ["SIZE=10"], ""),
    (b"OK %s 90 100\n", ["SIZE=11"], "452 4.2.2"),
    (b"OK %s 90 100\n", ["BODY=8BITMIME", "size=11"], "452 4.2.2"),
    (b"OK %s 90 100\n", ["SIZE=100"], "452 4.2.2"),
    (b"OK %s 90 100\n", ["SIZE=101"], "552 5.2.3"),
    (b"OVERQUOTA %s 110 100\n", ["SIZE=101"], "552 5.2.3"),
    (b"OVERQUOTA %s 110 100\n", ["SIZE=1"], "452 4.2.2"),
    (b"OK %s 90 0\n", ["SIZE=99999999999999999999"], ""),
    (b"OK %s 90 100\n", ["SIZE=0"], ""),
    (b"OK %s 100 100\n", ["SIZE=0"], ""),
    (b"OK %s  100\n", ["SIZE=50"], ""),
    (b"OK %s  100\n", ["SIZE=101"], "552 5.2.3"),
    (b"OK %s 90 \n", ["SIZE=500"], ""),
    (b"OK %s 90 100\n", ["SIZE=-5"], ""),
    (b"OK %s 90 100\n", ["SIZE=1e9"], ""),
    (b"OK %s 90 100\n", ["SIZE=" + "9" * 500], ""),
    (b"OK %s 90 100\n", ["SIZE"], ""),
    (b"UNKNOWN %s 90 100\n", ["SIZE=500"], ""),
]


def test_a_declared_size_counts(backend: Backend, milter: Callable[..., RunningMilter]) -> None:
    running = milter(backend)
    ignoring = milter(backend, "--ignore-size")
    for number, (answer, parameters, reply) in enumerate(SIZES):
        user = f"u{number}"
        backend.answers[user.encode()] = answer
        got = running.rcpt(f"<{user}@example.com>", *parameters)
        assert got.startswith(reply) and bool(got) == bool(reply), (answer, parameters)
        got = ignoring.rcpt(f"<{user}@example.com>", *parameters)
        assert bool(got) == answer.startswith(b"OVERQUOTA"), (answer, parameters)
    with running.session() as session:
        session.mail("<a@example.net>", "SIZE=11")
        assert session.rcpt("<u0@example.com>").startswith("452")
        session.abort()
        session.mail("<a@example.net>")
        assert session.rcpt("<u0@example.com>") == "", "a size concerns one message"


HOSTILE = [
    # (recipient as bytes, what the backend is asked, None: nothing; the address in the reply)
    (b"<>", None, ""),
    (b"<@example.com>", None, ""),
    (b'<"a b"@x.org>', "u=a%20b&d=x.org", '"a b"@x.org'),
    (b"<@r.org:john@x.org>", "u=john&d=x.org", "@r.org:john@x.org"),
    ("<jörg@x.org>".encode(), "u=j%C3%B6rg&d=x.org", "j?rg@x.org"),
    (b"<j\xf6rg@x.org>", "u=j%F6rg&d=x.org", "j?rg@x.org"),
    (b"<a%b@x.org>", "u=a%25b&d=x.org", "a?b@x.org"),
    (b"<a%%s%n@x.org>", "u=a%25%25s%25n&d=x.org", "a??s?n@x.org"),
    (b"<a&u=b#c@x.org>", "u=a%26u%3Db%23c&d=x.org", "a&u=b#c@x.org"),
    (b"<../../etc/passwd@x.org>", "u=..%2F..%2Fetc%2Fpasswd&d=x.org", "../../etc/passwd@x.org"),
    (b"<a\r\nb\x00c@x.org>", "u=a%0D%0Ab&d=", None),  # the protocol ends a string at NUL
    (b"<a\r\nb@x.org>", "u=a%0D%0Ab&d=x.org", "a??b@x.org"),
    (b"<a\x1b[1mb@x.org>", "u=a%1B%5B1mb&d=x.org", "a?[1mb@x.org"),
    (b"<john@x.org&d=y.org>", "u=john&d=x.org%26d%3Dy.org", "john@x.org&d=y.org"),
    (b"<{address}@x.org>", "u=%7Baddress%7D&d=x.org", "{address}@x.org"),
    (b"<" + b"x" * 1000 + b"@x.org>", "u=" + "x" * 1000 + "&d=x.org", "x" * 256 + "..."),
]


def test_a_hostile_recipient_gets_a_proper_reply(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = FULL
    running = milter(backend, "--verbose")
    for recipient, query, address in HOSTILE:
        if address is None:
            continue
        before = len(backend.asked)
        reply = running.rcpt(recipient)
        asked = backend.asked[before:]
        if query is None:
            assert (reply, asked) == ("", []), recipient
            continue
        assert asked == [f"GET /cgi-bin/quota.cgi?{query} HTTP/1.1".encode()], recipient
        assert reply == f"452 4.2.2 Quota exceeded for {address}, try again later", recipient
    running.process.stop()
    output = running.process.output()
    assert "Traceback" not in output
    assert all(" " <= c <= "~" or c == "\n" for c in output), "the log is printable ASCII"


def test_exempt_recipients_and_domains_without_a_backend_are_not_asked_about(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = FULL
    exempt = ["--exempt", "boss", "--exempt", "Abuse@Example.com", "--exempt", "a+b@example.com"]
    running = milter(None, "--backend", f"example.com,Example.ORG={backend.url}", *exempt)
    passed = [
        "postmaster",
        "Postmaster@example.com",
        "POSTMASTER+x@example.org",
        "boss@example.com",
    ]
    passed += ["boss+x@example.org", "abuse@example.com", "john@elsewhere.net", "john"]
    passed += ["a+b@example.com", "john@sub.example.com"]
    for recipient in passed:
        assert running.rcpt(f"<{recipient}>") == "", recipient
    assert backend.asked == []
    for recipient in (
        "abuse@example.org",
        "a@example.com",
        "postmasters@EXAMPLE.org",
        "x@example.com.",
    ):
        assert running.rcpt(f"<{recipient}>").startswith("452"), recipient


def test_each_domain_has_its_backend_and_the_rest_the_default(
    milter: Callable[..., RunningMilter],
) -> None:
    one, two, rest = Backend(), Backend(), Backend()
    options = ["--backend", f"one.org={one.url}?k=v", "--backend", f"two.org,2.org={two.url}"]
    running = milter(rest, *options)
    for domain in "one.org", "TWO.org", "2.org", "other.org":
        assert running.rcpt(f"<john@{domain}>") == ""
    assert running.rcpt("<john>") == ""
    assert one.asked == [b"GET /cgi-bin/quota.cgi?k=v&u=john&d=one.org HTTP/1.1"]
    assert [a.split(b"d=")[1].split()[0] for a in two.asked] == [b"two.org", b"2.org"]
    assert [a.split(b"?")[1] for a in rest.asked] == [
        b"u=john&d=other.org HTTP/1.1",
        b"u=john HTTP/1.1",
    ]


def test_the_environment_and_the_backend_cannot_lead_a_question_elsewhere(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    trap = Backend()
    proxies = {f"{scheme}_proxy": trap.url for scheme in ("http", "https", "all")}
    backend.answers[b"moved"] = b"HTTP/1.0 302 Found\r\nLocation: %s\r\n\r\n" % trap.url.encode()
    running = milter(backend, env={**os.environ, **proxies, "no_proxy": ""})
    assert running.rcpt("<john@example.com>") == ""
    assert running.rcpt("<moved@example.com>") == ""
    assert (backend.users(), trap.asked) == (["john", "moved"], [])
    assert 'reason="status 302 ' in running.log("user=moved")


def test_a_password_is_sent_and_never_shown(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    url = backend.url.replace("//", "//us%3Aer:pa%40ss@")
    backend.default = b"HTTP/1.0 500 Oops\r\n\r\n"
    running = milter(None, "--backend", url, "--verbose")
    assert running.rcpt("<john@example.com>") == ""
    assert b"Authorization: Basic " + base64.b64encode(b"us:er:pa@ss") in backend.headers[0]
    backend.close()
    running.rcpt("<mary@example.com>")
    running.log("state=down")
    running.process.stop()
    assert "pa%40ss" not in running.process.output() and "pa@ss" not in running.process.output()


def test_replies_are_options(backend: Backend, milter: Callable[..., RunningMilter]) -> None:
    backend.answers.update({b"full": FULL, b"none": b"UNKNOWN %s\n"})
    replies = ["--overquota-reply", "552 5.2.2 {address} is full ({address})"]
    replies += ["--unknown-reply", "450 4.1.1 No user here", "--toolarge-reply", "452 4.2.2 big"]
    running = milter(backend, *replies)
    assert running.rcpt("<full@x.org>") == "552 5.2.2 full@x.org is full (full@x.org)"
    assert running.rcpt("<none@x.org>") == "450 4.1.1 No user here"
    assert running.rcpt("<john@x.org>", "SIZE=101") == "452 4.2.2 big"


def test_dry_run_lets_everything_through_and_says_what_it_would_do(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers[b"john"] = FULL
    running = milter(backend, "--dry-run")
    assert running.rcpt("<john@example.com>") == ""
    assert running.log("user=john").endswith("dry_run=yes")
    running.process.stop()
    assert "refused=0" in running.process.output()


# ---- options ----


def run_milter(*arguments: Path) -> tuple[int, str, str]:
    """Run the milter to its end: exit status, output, errors."""
    command = [PYTHON, str(MILTER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


BAD_OPTIONS = [
    (["--listen", "8894"], "--listen"),
    (["--listen", "inet:0@127.0.0.1"], "--listen"),
    (["--listen", "inet:65536@127.0.0.1"], "--listen"),
    (["--listen", "inet:8894@192.0.2.1"], "--listen"),
    (["--listen", "unix:relative"], "--listen"),
    (["--listen", "unix:/nonexistent/folder/socket"], "--listen"),
    (["--listen", "unix:/etc/passwd"], "--listen"),
    (["--timeout", "0"], "--timeout"),
    (["--timeout", "-1"], "--timeout"),
    (["--timeout", "nan"], "--timeout"),
    (["--timeout", "inf"], "--timeout"),
    (["--timeout", "soon"], "--timeout"),
    (["--retry-after", "-1"], "--retry-after"),
    (["--max-queries", "0"], "--max-queries"),
    (["--max-queries", "1.5"], "--max-queries"),
    (["--cache-ttl", "x"], "--cache-ttl"),
    (["--on-error", "reject"], "--on-error"),
    (["--overquota-reply", "full"], "--overquota-reply"),
    (["--overquota-reply", ""], "--overquota-reply"),
    (["--overquota-reply", "250 2.0.0 fine"], "--overquota-reply"),
    (["--overquota-reply", "452 5.2.2 classes differ"], "--overquota-reply"),
    (["--overquota-reply", "452 4.2.2 100% full"], "--overquota-reply"),
    (["--overquota-reply", "452 4.2.2 {adress}"], "--overquota-reply"),
    (["--overquota-reply", "452 4.2.2 two\nlines"], "--overquota-reply"),
    (["--overquota-reply", "452 4.2.2 völl"], "--overquota-reply"),
    (["--toolarge-reply", "552"], "--toolarge-reply"),
    (["--unknown-reply", "550 5.1.1"], "--unknown-reply"),
    (["--backend", "ftp://127.0.0.1/"], "--backend"),
    (["--backend", "http:///path"], "--backend"),
    (["--backend", "http://127.0.0.1:99999/"], "--backend"),
    (["--backend", "http://a b/"], "--backend"),
    (["--backend", "a,,b=http://127.0.0.1/"], "--backend"),
    (["--backend", "a=http://x/", "--backend", "b,A=http://y/"], "--backend"),
    (["--backend", "http://x/", "--backend", "http://y/"], "--backend"),
    (["--exempt", ""], "--exempt"),
    (["--cafile", "/nonexistent"], "--cafile"),
    (["--cafile", "/etc/passwd"], "--cafile"),
    (["--aliases", "/nonexistent"], "--aliases"),
    (["--aliases", "/etc"], "--aliases"),
    (["--aliases", "/bin/sh"], "--aliases"),
    (["--aliases", "/dev/null"], "--aliases"),
    (["--nonsense"], "--nonsense"),
    (["--time", "5"], "--time"),
    (["@/nonexistent"], "/nonexistent"),
    (["stray"], "stray"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD_OPTIONS)
def test_a_bad_value_ends_the_start_with_one_line(arguments: list[str], named: str) -> None:
    status, output, errors = run_milter(*arguments)
    assert (status, output) == (2, "")
    assert len(errors.splitlines()) == 1 and named in errors and "Traceback" not in errors


def test_a_bad_backend_does_not_show_its_password() -> None:
    assert "secret" not in run_milter("--backend", "http://user:secret@:0/")[2]


def test_options_come_from_files(tmp_path: pathlib.Path, backend: Backend) -> None:
    backend.answers[b"john"] = FULL
    inner = tmp_path / "inner"
    inner.write_text(f"--backend example.com={backend.url}\n\n--cache-ttl=5 # seconds\n")
    outer = tmp_path / "outer"
    outer.write_text(
        f"# a comment\n  # another\n@{inner}\n"
        "--overquota-reply 452 4.2.2 Mailbox of {address} is full #1\n"
        "--toolarge-reply=552 5.2.3 Too large\n"
        '--recipient-delimiter ""\n--dry-run\n'
        "--check john@example.com j+k@example.com\n"
    )
    status, output, errors = run_milter(f"@{outer}")
    assert (status, errors) == (1, "")
    assert "reply=452 4.2.2 Mailbox of john@example.com is full\n" in output
    assert backend.users() == ["john", "j+k"]


@pytest.mark.parametrize(
    "text", ["@FILE\n", "--nonsense 5\n", "--timeout\n", "--timeout five\n", "stray\n", "\xff\n"]
)
def test_a_bad_option_file_ends_the_start_with_one_line(tmp_path: pathlib.Path, text: str) -> None:
    file = tmp_path / "options"
    file.write_bytes(text.replace("FILE", str(file)).encode("latin-1"))
    status, output, errors = run_milter(f"@{file}")
    assert (status, output, len(errors.splitlines())) == (2, "", 1)
    assert "Traceback" not in errors


def test_check_prints_the_verdict_and_the_reply(backend: Backend) -> None:
    backend.answers.update({b"full": FULL, b"broken": b"nonsense\n"})
    status, output, _ = run_milter("--backend", backend.url, "--check", "john@x.org", "mary@x.org")
    assert status == 0
    pattern = (
        r"recipient=john@x.org user=john verdict=ok used=10 quota=100 cached=no ms=\d+ reply=none"
    )
    assert re.fullmatch(pattern, output.splitlines()[0])
    status, output, _ = run_milter("--backend", backend.url, "--check", "full@x.org", "john@x.org")
    assert status == 1
    assert output.splitlines()[0].endswith(
        "reply=452 4.2.2 Quota exceeded for full@x.org, try again later"
    )
    status, output, _ = run_milter(
        "--backend", backend.url, "--check", "full@x.org", "broken@x.org"
    )
    assert status == 2
    assert "verdict=fault" in output


def test_help_names_every_option_and_its_default() -> None:
    text = re.sub(r"\s+", " ", run_milter("--help")[1])
    for option in OPTIONS:
        assert f"--{option}" in text, option
    for default in "inet:8894@127.0.0.1", "http://127.0.0.1:8025/cgi-bin/quota.cgi", "(60)", "(16)":
        assert default in text
    assert run_milter("--version")[1].startswith("quota_milter ")


OPTIONS = """listen backend timeout retry-after max-queries cache-ttl on-error overquota-reply
    toolarge-reply unknown-reply ignore-size recipient-delimiter case-sensitive exempt aliases
    cafile dry-run check syslog verbose version""".split()


# ---- aliases ----

ALIAS_FILE = """\
# aliases(5)
postmaster: john
Sales: john
support:   sales
list: john, mary
prog: "|/usr/bin/vacation john"
prog2: |/bin/true
file: /var/spool/john
include: :include:/etc/list
loop1: loop2
loop2: loop1
self: self
back: \\back
mix: "|/bin/true", john
many: a,
   b
# a comment in between
   , c
one:
   john
"quoted name": john
ext+a: mary
ext: john
case: JOHN
brackets: <john@example.com>
out: john@elsewhere.net
error: error:nouser
: no name
first: john
first: mary

# virtual(5)
info@example.com   mary@example.org
both@example.com   john, mary
two@example.com    john mary
john@all.org       john@all.org
bare@example.com   sales
@all.org           mary@example.com
@moved.org         @example.com
@loop.org          @pool.org
@pool.org          @loop.org
plus+x@example.com mary
"""

ALIASED = [
    # (recipient, mailbox that is asked about, None: none)
    ("sales@example.com", "john@example.com"),
    ("SALES+x@example.com", "john@example.com"),
    ("support@example.com", "john@example.com"),
    ("list@example.com", None),
    ("prog@example.com", None),
    ("prog2@example.com", None),
    ("file@example.com", None),
    ("include@example.com", None),
    ("mix@example.com", None),
    ("many@example.com", None),
    ("one@example.com", "john@example.com"),
    ("loop1@example.com", None),
    ("loop2@example.com", None),
    ("self@example.com", "self@example.com"),
    ("back@example.com", "back@example.com"),
    ('"quoted name"@example.com', "john@example.com"),
    ("ext+a@example.com", "mary@example.com"),
    ("ext+b@example.com", "john@example.com"),
    ("case@example.com", "john@example.com"),
    ("brackets@example.org", "john@example.com"),
    ("out@example.com", None),
    ("error@example.com", None),
    ("first@example.com", "john@example.com"),
    ("info@example.com", "mary@example.org"),
    ("info@example.org", "info@example.org"),
    ("both@example.com", None),
    ("two@example.com", None),
    ("john@all.org", "john@all.org"),
    ("anybody@all.org", "mary@example.com"),
    ("bare@example.com", "john@example.com"),
    ("paul@moved.org", "paul@example.com"),
    ("sales@moved.org", "john@example.com"),
    ("x@loop.org", None),
    ("plus+x@example.com", "mary@example.com"),
    ("plus+y@example.com", "plus@example.com"),
    ("nobody@example.com", "nobody@example.com"),
    ("postmaster@example.com", None),
]


def test_an_alias_is_asked_about_as_the_mailbox_it_leads_to(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    backend.default = FULL
    file = tmp_path / "aliases"
    file.write_text(ALIAS_FILE)
    domains = "example.com,example.org,all.org,moved.org,loop.org,pool.org"
    options = ["--backend", f"{domains}={backend.url}", "--aliases", file, "--cache-ttl", "0"]
    running = milter(None, *options)
    for recipient, mailbox in ALIASED:
        before = len(backend.asked)
        reply = running.rcpt(f"<{recipient}>")
        asked = [line.split(b"?")[1].split()[0].decode() for line in backend.asked[before:]]
        if mailbox is None:
            assert (reply, asked) == ("", []), recipient
        else:
            user, _, domain = mailbox.partition("@")
            assert asked == [f"u={user}&d={domain}"], recipient
            assert reply == f"452 4.2.2 Quota exceeded for {recipient}, try again later"
    assert re.search(
        rf"aliases={file} state=incomplete skipped=1 line=\d+", running.process.output()
    )


def test_alias_files_are_read_again_when_they_change(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "aliases"
    file.write_text("sales: john\n")
    running = milter(backend, "--aliases", file, "--cache-ttl", "0")

    def asked() -> str:
        running.rcpt("<sales@example.com>")
        return backend.users()[-1]

    assert asked() == "john"
    file.write_text("sales: mary\n")
    wait_for(lambda: asked() == "mary", "the changed alias")
    file.unlink()
    running.log("state=kept")
    assert asked() == "mary", "the last good one is kept"
    file.mkdir()
    file.rmdir()
    file.write_bytes(b"sales: binary\0\n")
    wait_for(lambda: running.process.output().count("state=kept") > 1, "the second complaint")
    assert asked() == "mary"
    file.write_text("sales: paul\n")
    wait_for(lambda: asked() == "paul", "the file that came back")
    old = os.stat(file)
    file.write_text("sales: fred\n")
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))  # a change that no look can see
    running.process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: asked() == "fred", "the alias after HUP")


def test_mail_goes_on_while_a_large_alias_file_is_read(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "aliases"
    lines = "".join(f"user{n}@example.com mailbox{n}@example.com\n" for n in range(200_000))
    file.write_text(lines)
    running = milter(backend, "--aliases", file, "--cache-ttl", "0")
    file.write_text(lines.replace("mailbox", "box"))
    with running.session() as session:
        session.mail()
        deadline = time.monotonic() + 60
        while backend.users()[-1:] != ["box7"]:
            start = time.monotonic()
            assert session.rcpt("<user7@example.com>") == ""
            assert time.monotonic() - start < 2, "no recipient waits for the file"
            assert time.monotonic() < deadline, "the new file is never used"
    assert set(backend.users()) <= {"mailbox7", "box7"}


# ---- the CGIs, as a web server runs them ----


@pytest.fixture
def spool(tmp_path: pathlib.Path) -> pathlib.Path:
    """Give a mail folder with some mailboxes, two of them full at 100 bytes."""
    folder = tmp_path / "mail"
    folder.mkdir()
    for name, size in ("john", 100), ("mary", 101), ("OVERQUOTA", 5), ("a b", 101), ("jörg", 7):
        (folder / name).write_bytes(b"x" * size)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nowhere")
    (tmp_path / "secret").write_bytes(b"x" * 500)
    return folder


QUERIES = [
    # (query, status, line)
    ("u=john", 200, b"OK john 100 100"),
    ("u=john&d=example.com", 200, b"OK john 100 100"),
    ("d=example.com&u=john", 200, b"OK john 100 100"),
    ("x=1&u=john&y", 200, b"OK john 100 100"),
    ("%75=john", 200, b"OK john 100 100"),
    ("u=john&u=mary", 200, b"OK john 100 100"),
    ("u=mary", 200, b"OVERQUOTA mary 101 100"),
    ("u=a+b", 200, b"OVERQUOTA a b 101 100"),
    ("u=a%20b", 200, b"OVERQUOTA a b 101 100"),
    ("u=j%C3%B6rg", 200, "OK jörg 7 100".encode()),
    ("u=j%F6rg", 200, b"OK j\xf6rg 0 100"),
    ("u=OVERQUOTA", 200, b"OK OVERQUOTA 5 100"),
    ("u=nobody", 200, b"OK nobody 0 100"),
    ("u=gone", 200, b"OK gone 0 100"),
    ("u=100%25", 200, b"OK 100% 0 100"),
    ("u=100%", 200, b"OK 100% 0 100"),
    ("u=" + "x" * 255, 200, b"OK " + b"x" * 255 + b" 0 100"),
    ("", 400, b"ERROR no user (u=) given"),
    ("u", 400, b"ERROR no user (u=) given"),
    ("john", 400, b"ERROR no user (u=) given"),
    ("--serve", 400, b"ERROR no user (u=) given"),
    ("u=", 400, b"ERROR no mailbox has such a user"),
    ("u=john&d=", 400, b"ERROR no mailbox has such a domain"),
    ("u=" + "x" * 256, 400, b"ERROR no mailbox has such a user"),
    ("u=.", 400, b"ERROR no mailbox has such a user"),
    ("u=..", 400, b"ERROR no mailbox has such a user"),
    ("u=.john", 400, b"ERROR no mailbox has such a user"),
    ("u=../secret", 400, b"ERROR no mailbox has such a user"),
    ("u=..%2Fsecret", 400, b"ERROR no mailbox has such a user"),
    ("u=%2E%2E%2Fsecret", 400, b"ERROR no mailbox has such a user"),
    ("u=/etc/passwd", 400, b"ERROR no mailbox has such a user"),
    ("u=john&d=..", 400, b"ERROR no mailbox has such a domain"),
    ("u=john&d=a/b", 400, b"ERROR no mailbox has such a domain"),
    ("u=john&d=" + "x" * 256, 400, b"ERROR no mailbox has such a domain"),
    ("u=john%00", 400, b"ERROR control character in the user"),
    ("u=%00", 400, b"ERROR control character in the user"),
    ("u=john%0A", 400, b"ERROR control character in the user"),
    ("u=OK%0Ajohn", 400, b"ERROR control character in the user"),
    ("u=john%7F", 400, b"ERROR control character in the user"),
    ("u=john%C2%85", 400, b"ERROR control character in the user"),
    ("u=john&d=a%0D", 400, b"ERROR control character in the domain"),
    ("u=folder", 500, b"ERROR the mailbox is not a file"),
    ("u=pipe", 500, b"ERROR the mailbox is not a file"),
    ("u=loop", 500, b"ERROR cannot read the mailbox: Too many levels of symbolic links"),
]


@pytest.mark.parametrize(("query", "status", "line"), QUERIES)
def test_a_query_gets_its_answer(spool: pathlib.Path, query: str, status: int, line: bytes) -> None:
    got = ask_cgi(MBOX_CGI, query, QUOTA_LIMIT="100", QUOTA_MAILBOX=spool / "%n")
    assert (got.status, got.line) == (status, line)
    assert "Content-Type: text/plain" in got.header and "Cache-Control: no-store" in got.header
    assert "Traceback" not in got.errors and bool(got.errors) == (status == 500)


def test_raw_bytes_in_a_query_are_taken_as_they_are(spool: pathlib.Path) -> None:
    (spool / os.fsdecode(b"\xf6\xe4")).write_bytes(b"x" * 101)
    got = ask_cgi(MBOX_CGI, b"u=\xf6\xe4", QUOTA_LIMIT="100", QUOTA_MAILBOX=spool / "%n")
    assert got.line == b"OVERQUOTA \xf6\xe4 101 100"


@pytest.mark.parametrize("script", [MBOX_CGI, MAILDIR_CGI])
def test_only_get_and_head_are_answered(script: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path: dict[str, Path] = {"QUOTA_MAILBOX": tmp_path / "%n"}
    path["QUOTA_MAILDIR"] = tmp_path / "%n"
    for method in "POST", "PUT", "DELETE", "OPTIONS", "get", "":
        got = ask_cgi(script, "u=john", method, **path)
        assert (got.status, got.line) == (405, b"ERROR only GET and HEAD are answered")
        assert "Allow: GET, HEAD" in got.header
    got = ask_cgi(script, "u=john", "HEAD", **path)
    assert (got.status, got.line) == (200, b"") and "Content-Length: 20" in got.header


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("0", 0),
        ("100", 100),
        ("1K", 1024),
        ("3k", 3072),
        ("200M", 209715200),
        ("2G", 2 << 30),
        ("1T", 1 << 40),
        (" 5 ", 5),
        ("", None),
        ("M", None),
        ("1.5G", None),
        ("-1", None),
        ("+1", None),
        ("200MB", None),
        ("1 M", None),
        ("1P", None),
        ("ten", None),
        ("9" * 5000, None),
    ],
)
def test_a_limit_is_bytes_or_a_power_of_1024(
    spool: pathlib.Path, text: str, limit: Optional[int]
) -> None:
    got = ask_cgi(MBOX_CGI, "u=john", QUOTA_LIMIT=text, QUOTA_MAILBOX=spool / "%n")
    if limit is None:
        assert (got.status, got.line) == (
            500,
            b"ERROR a limit in the settings is no number of bytes",
        )
        assert "a limit in the settings" in got.errors
    else:
        status = b"OVERQUOTA" if 0 < limit < 100 else b"OK"
        assert got.line == b"%s john 100 %d" % (status, limit)


def test_placeholders_make_the_path(tmp_path: pathlib.Path) -> None:
    for folder in "x.org/john", "john@x.org", "100%/john", "%n/john":
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        (tmp_path / folder).write_bytes(b"x" * 200)
    for template in "%d/%n", "%u", "100%%/%n", "%%n/%n":
        got = ask_cgi(
            MBOX_CGI, "u=john&d=x.org", QUOTA_LIMIT="9", QUOTA_MAILBOX=tmp_path / template
        )
        assert got.line == b"OVERQUOTA john 200 9", template
    for template in "%d/%n", "%u":
        got = ask_cgi(MBOX_CGI, "u=john", QUOTA_MAILBOX=tmp_path / template)
        assert (got.status, got.line) == (400, b"ERROR no domain (d=) given"), template
    for template in "%x/%n", "%n%", "%N":
        got = ask_cgi(MBOX_CGI, "u=john&d=x.org", QUOTA_MAILBOX=tmp_path / template)
        assert got.status == 500 and b"placeholder" in got.line, template
    long = ask_cgi(MBOX_CGI, f"u={'x' * 255}&d={'y' * 255}", QUOTA_MAILBOX=tmp_path / "%u")
    assert (long.status, long.line[:5]) == (200, b"OK xx"), "a name too long for a file has no file"


def test_the_home_of_a_system_user_is_known(tmp_path: pathlib.Path) -> None:
    user = pwd.getpwuid(os.getuid())
    home = ask_cgi(MBOX_CGI, f"u={user.pw_name}", QUOTA_MAILBOX=f"%h/{tmp_path.name}-none")
    assert home.line == f"OK {user.pw_name} 0 209715200".encode()
    here = os.path.relpath(tmp_path, user.pw_dir)
    (tmp_path / "box").write_bytes(b"x" * 10)
    settings: dict[str, Path] = {"QUOTA_LIMIT": "9", "QUOTA_MAILBOX": f"%h/{here}/box"}
    assert ask_cgi(MBOX_CGI, f"u={user.pw_name}", **settings).line.endswith(b" 10 9")
    assert ask_cgi(MBOX_CGI, "u=nosuchuser", **settings).line == b"UNKNOWN nosuchuser 0 9"


def test_limits_of_users_beat_the_limit_of_all(spool: pathlib.Path, tmp_path: pathlib.Path) -> None:
    users = tmp_path / "users"
    users.write_text(
        "# user limit\n\njohn 50\nmary\t1K # a boss\n#paul 1\nmary@x.org 10\na b 0\n"
        "broken lots\nempty\nmary 1\n  indented   7\nhash#tag 8\n"
    )
    settings: dict[str, Path] = {
        "QUOTA_LIMIT": "100",
        "QUOTA_MAILBOX": spool / "%n",
        "QUOTA_USERS": users,
    }
    for query, line in [
        ("u=john", b"OVERQUOTA john 100 50"),
        ("u=mary", b"OK mary 101 1024"),
        ("u=mary&d=x.org", b"OVERQUOTA mary 101 10"),
        ("u=mary&d=y.org", b"OK mary 101 1024"),
        ("u=a+b", b"OK a b 101 0"),
        ("u=paul", b"OK paul 0 100"),
        ("u=indented", b"OK indented 0 7"),
        ("u=hash%23tag", b"OK hash#tag 0 8"),
        ("u=broken", b"ERROR a limit in the settings is no number of bytes"),
        ("u=empty", b"ERROR a limit in the settings is no number of bytes"),
    ]:
        assert ask_cgi(MBOX_CGI, query, **settings).line == line
    gone = ask_cgi(MBOX_CGI, "u=john", **{**settings, "QUOTA_USERS": tmp_path / "none"})
    assert (gone.status, gone.line) == (500, b"ERROR the file QUOTA_USERS cannot be read")
    assert str(tmp_path) not in gone.line.decode() and str(tmp_path) in gone.errors


def test_a_mailbox_that_does_not_exist_may_be_unknown(spool: pathlib.Path) -> None:
    settings: dict[str, Path] = {"QUOTA_LIMIT": "100", "QUOTA_MAILBOX": spool / "%n"}
    for value, line in ("1", b"UNKNOWN x 0 100"), ("0", b"OK x 0 100"), ("off", b"OK x 0 100"):
        assert ask_cgi(MBOX_CGI, "u=x", **settings, QUOTA_UNKNOWN=value).line == line
    assert ask_cgi(MBOX_CGI, "u=x", **settings, QUOTA_UNKNOWN="yes").status == 500
    settings["QUOTA_MAILDIR"] = spool / "%n"
    assert ask_cgi(MAILDIR_CGI, "u=x", **settings, QUOTA_UNKNOWN="1").line == b"UNKNOWN x 0 100"


def test_a_mailbox_that_cannot_be_read_is_an_error(spool: pathlib.Path) -> None:
    if os.geteuid() != 0:
        missing("wants root, to become somebody else")
    spool.chmod(0o700)
    settings: dict[str, Path] = {"QUOTA_LIMIT": "100", "QUOTA_MAILBOX": spool / "%n"}
    done = subprocess.run(
        [PYTHON, "-IS", MBOX_CGI],
        env={"GATEWAY_INTERFACE": "CGI/1.1", "QUERY_STRING": "u=mary"}
        | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
        user=65534,
    )
    assert "Status: 500 " in done.stdout
    assert done.stdout.endswith("\n\nERROR cannot read the mailbox: Permission denied\n")
    assert str(spool) in done.stderr


def test_the_command_line_is_ignored_under_a_web_server(spool: pathlib.Path) -> None:
    for arguments in ("--serve",), ("mary",), ("--help",), ("--serve", "0.0.0.0:1"):
        settings: dict[str, Path] = {"QUOTA_LIMIT": "100", "QUOTA_MAILBOX": spool / "%n"}
        got = ask_cgi(MBOX_CGI, "u=john", "GET", arguments, **settings)
        assert got.line == b"OK john 100 100"


def test_a_shell_gets_the_same_line(spool: pathlib.Path) -> None:
    environment = {**os.environ, "QUOTA_LIMIT": "100", "QUOTA_MAILBOX": str(spool / "%n")}

    def shell(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [str(MBOX_CGI), *arguments], env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    assert shell("mary") == (0, "OVERQUOTA mary 101 100\n", "")
    assert shell("mary@example.com") == (0, "OVERQUOTA mary 101 100\n", "")
    assert shell("a@b@example.com") == (0, "OK a@b 0 100\n", "")
    assert shell("../secret") == (1, "", "ERROR no mailbox has such a user\n")
    assert shell()[0] == 2 and shell("--nonsense")[0] == 2
    assert shell("--help")[1].startswith("usage: ")
    for where in "nonsense", "127.0.0.1:99999", "192.0.2.1:80":
        status, _, errors = shell("--serve", where)
        assert status == 2 and "--serve" in errors and "Traceback" not in errors


@pytest.mark.parametrize("script", [MBOX_CGI, MAILDIR_CGI])
def test_serve_gives_the_same_answers_on_any_path(
    script: pathlib.Path, spool: pathlib.Path, start: Callable[..., Process]
) -> None:
    (spool / "dir/new").mkdir(parents=True)
    (spool / "dir/new/1").write_bytes(b"x" * 100)
    port = free_port()
    paths = {"QUOTA_MAILBOX": str(spool / "%n"), "QUOTA_MAILDIR": str(spool / "%n")}
    environment = {**os.environ, **paths, "QUOTA_LIMIT": "100"}
    process = start(script, "--serve", str(port), port=port, env=environment)
    line = {MBOX_CGI: b"OVERQUOTA mary 101 100\n", MAILDIR_CGI: b"OVERQUOTA dir 100 100\n"}[script]
    user = line.split()[1].decode()
    for path in "/", "/cgi-bin/quota.cgi", "/any/thing":
        assert http(port, "GET", f"{path}?u={user}&d=x.org") == (200, line)
    assert http(port, "HEAD", f"/?u={user}") == (200, b"")
    assert http(port, "POST", f"/?u={user}")[0] == 405
    assert http(port, "GET", "/?u=..%2Fsecret") == (400, b"ERROR no mailbox has such a user\n")
    assert http(port, "GET", "/")[0] == 400
    assert http(port, "GET", "/?u=" + "x" * 70_000)[0] == 414
    with socket.create_connection(("127.0.0.1", port)) as rude:
        rude.sendall(b"\x16\x03\x01\x00\xff garbage\r\n\r\n")
    assert http(port, "GET", f"/?u={user}") == (200, line)
    assert "Traceback" not in process.output()


def http(port: int, method: str, target: str) -> tuple[int, bytes]:
    """Send one request to loopback; return status and body."""
    connection = http_client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, target)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_percent_decoding_agrees_with_urllib() -> None:
    module = load(MBOX_CGI)
    seed = random.randrange(1 << 32)
    generator = random.Random(seed)
    pieces = [b"%", b"%4", b"%41", b"%zz", b"%C3%B6", b"+", b"&", b"=", b"u", b"d", b" ", b"\xf6"]
    pieces += [b"%%", b"%+1", b"% 1", b"%0", b";", b"%26", b"%3d", b"#", b"?", b"a"]
    for _ in range(20_000):
        query = b"".join(generator.choices(pieces, k=generator.randrange(9)))
        expected: dict[bytes, bytes] = {}
        text = query.decode("latin-1")
        pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, encoding="latin-1")
        for name, value in pairs:
            expected.setdefault(name.encode("latin-1"), value.encode("latin-1"))
        got = module.parse_query(query)
        # parse_qsl gives a name without `=` an empty value; here it is no field.
        for field in query.split(b"&"):
            if b"=" not in field and field:
                expected.pop(module.unquote(field), None)
                got.pop(module.unquote(field), None)
        assert got == expected, f"seed {seed}: {query!r}"


def test_both_cgis_share_one_block_to_the_letter() -> None:
    mark = (
        "# ---- From here to the end the text is the same in quota.cgi and maildir_quota.cgi. ----"
    )
    blocks = [script.read_text().partition(mark)[2] for script in (MBOX_CGI, MAILDIR_CGI)]
    assert blocks[0] == blocks[1] != ""


def test_the_top_level_holds_the_six_files_and_nothing_else() -> None:
    shown = {entry.name for entry in HERE.iterdir() if not entry.name.startswith((".", "__"))}
    names = {"quota_milter.py", "quota.cgi", "maildir_quota.cgi", "test_quota.py"}
    assert shown == names | {"README.md", "LICENSE"}
