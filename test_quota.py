"""Tests of quota_milter.py, quota.cgi and maildir_quota.cgi.

    python3 -m pytest test_quota.py

Real: Postfix, Sendmail, Apache, lighttpd, nginx, uWSGI, gunicorn, Dovecot, deliverquota,
miltertest, each an instance of its own on loopback in a temporary folder. Faked is only what cannot
be had for real: a backend that misbehaves. A test whose part is missing skips and names the Debian
package; with CI set in the environment it fails. Postfix and the others want root.
"""

import base64
import contextlib
import email.utils
import errno
import http.client as http_client
import imaplib
import importlib.machinery
import importlib.util
import os
import pathlib
import pwd
import random
import re
import resource
import select
import shutil
import signal
import smtplib
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
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
    """Return a TCP port of loopback that nobody uses, and that no client gets by chance."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", random.randrange(10_000, 32_000)))
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

    def __init__(self, address: Union[int, Path, socket.socket]) -> None:
        if isinstance(address, socket.socket):
            self.socket = address
        elif isinstance(address, int):
            self.socket = socket.create_connection(("127.0.0.1", address), timeout=60)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
                answer = self.answers.get(user, self.default)
                try:
                    answer = answer(connection) if callable(answer) else answer
                finally:
                    with self.lock:  # before the client knows the answer and asks the next
                        self.busy -= 1
                if answer is not None:
                    self.send(connection, user, answer)
        except OSError:
            pass

    def send(self, connection: socket.socket, user: bytes, answer: bytes) -> None:
        """Send a line in a proper response, or raw bytes that begin with HTTP/."""
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
def test_delimiter_and_case_are_read(
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
    (b"OK john 5\n", "OK", None, None),  # used or quota? it does not say
    (b"OVERQUOTA john 5\n", "OVERQUOTA", None, None),
    (b"OK john\n", "OK", None, None),
    (b"OK 123\n", "OK", None, None),
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
    assert 'reason="status 302 Found"' in running.log("user=moved")


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


def test_a_reply_stays_below_the_limit_of_smtp(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = FULL
    running = milter(backend, "--overquota-reply", "452 4.2.2 " + "{address} " * 20)
    reply = running.rcpt("<" + "x" * 400 + "@example.com>")
    assert reply.startswith("452 4.2.2 xxx") and len(reply) <= 510


def test_a_ten_line_server_that_would_keep_the_connection_open_is_told_to_close(
    start: Callable[..., Process], milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    script = tmp_path / "backend.py"
    script.write_text(TEN_LINES)
    port = free_port()
    start(PYTHON, script, str(port), port=port)
    url = f"http://127.0.0.1:{port}/"
    running = milter(None, "--backend", url, "--on-error", "tempfail", "--cache-ttl", "0")
    for _ in range(3):
        assert running.rcpt("<john@example.com>").startswith("452")


TEN_LINES = """\
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"OVERQUOTA john 101 100\\n")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_replies_are_options(backend: Backend, milter: Callable[..., RunningMilter]) -> None:
    backend.answers.update({b"full": FULL, b"none": b"UNKNOWN %s\n"})
    replies = ["--overquota-reply", "552 5.2.2 {address} is full ({address})"]
    replies += ["--unknown-reply", "450 4.1.1 No user here", "--toolarge-reply", "452 4.2.2 big"]
    running = milter(backend, *replies)
    assert running.rcpt("<full@x.org>") == "552 5.2.2 full@x.org is full (full@x.org)"
    assert running.rcpt("<none@x.org>") == "450 4.1.1 No user here"
    assert running.rcpt("<john@x.org>", "SIZE=101") == "452 4.2.2 big"


def test_delimiter_case_and_an_ipv6_socket_are_options(
    backend: Backend, start: Callable[..., Process]
) -> None:
    port = free_port()
    listen = ["--listen", f"inet6:{port}@::1", "--backend", backend.url]
    process = start(PYTHON, MILTER, *listen, "--recipient-delimiter", "-", "--case-sensitive")

    def connected() -> Optional[socket.socket]:
        with contextlib.suppress(OSError):
            return socket.create_connection(("::1", port), timeout=60)
        return None

    with socket.socket(socket.AF_INET6) as probe:
        if probe.connect_ex(("::1", 1)) == errno.EADDRNOTAVAIL:
            missing("this machine has no IPv6")
    with MilterSession(wait_for(connected, "the milter on ::1")) as session:
        session.mail()
        assert session.rcpt("<John+a-b@Example.com>") == ""
    assert backend.asked == [b"GET /cgi-bin/quota.cgi?u=John%2Ba&d=example.com HTTP/1.1"]
    assert process.stop() == 0


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
    (["--exempt=@example.com"], "--exempt"),
    (["--cafile", "/nonexistent"], "--cafile"),
    (["--cafile", "/etc/passwd"], "--cafile"),
    (["--aliases", "/nonexistent"], "--aliases"),
    (["--aliases", "/etc"], "--aliases"),
    (["--aliases", "/bin/sh"], "--aliases"),
    (["--aliases", "/dev/null"], "--aliases"),
    (["--nonsense"], "--nonsense"),
    (["backend", "http://user:secret@127.0.0.1/"], "//...@127.0.0.1"),
    (["--time", "5"], "--time"),
    (["@/nonexistent"], "/nonexistent"),
    (["stray"], "stray"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD_OPTIONS)
def test_a_bad_value_ends_the_start_with_one_line(arguments: list[str], named: str) -> None:
    status, output, errors = run_milter(*arguments)
    assert (status, output) == (2, "")
    assert len(errors.splitlines()) == 1 and named in errors and "Traceback" not in errors


@pytest.mark.parametrize("option", ["--backand", "--on-error", "--timeout", "backend"])
def test_a_bad_option_does_not_show_a_password(option: str) -> None:
    errors = run_milter(option, "http://user:se/cret@127.0.0.1/")[2]
    assert "error:" in errors and "cret" not in errors


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
    assert "Traceback" not in errors and "recursion" not in errors


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


def test_check_ends_well_where_nobody_reads_its_verdicts(backend: Backend) -> None:
    command = f"{PYTHON} {MILTER} --backend {backend.url} --check john@x.org mary@x.org"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command.split(), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_names_every_option() -> None:
    text = run_milter("--help")[1]
    assert set(re.findall(r"^  --([a-z-]+)", text, re.MULTILINE)) == set(OPTIONS)
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
            b"ERROR QUOTA_LIMIT has a limit that is not like 200M",
        )
        assert "QUOTA_LIMIT" in got.errors
    else:
        status = b"OVERQUOTA" if 0 < limit < 100 else b"OK"
        assert got.line == b"%s john 100 %d" % (status, limit)


UNKNOWN_PLACEHOLDER = "has a placeholder that does not exist; known are %n user, %d domain"
NO_USER = "names no user (%n, %u or %h): in systemd and uWSGI each % is written twice"
NO_FOLDER = "begins with a folder that is not there: in systemd and uWSGI each % is written twice"
NO_ROOT = "does not begin with /"

TEMPLATES = [
    # (QUOTA_MAILBOX below the folder, or from the root; the file that it is for john@x.org, or the error)
    ("%d/%n", "x.org/john"),
    ("%u", "john@x.org"),
    ("100%%/%n", "100%/john"),
    ("%%n/%n", "%n/john"),
    ("%1n/%n", "j/john"),
    ("%2n/%n", "jo/john"),
    ("%1.2n/%n", "oh/john"),
    ("%1.0n/%n", "ohn/john"),
    ("%1.n/%n", "ohn/john"),
    ("%0.2n/%n", "jo/john"),
    ("%3.5n/%n", "n/john"),
    ("%9.2n/%n", "john"),
    ("%20n/%n", "john/john"),
    ("%2d/%1.1d/%n", "x././john"),
    ("%6u/%n", "john@x/john"),
    ("x-%1n-%n.mbox", "x-j-john.mbox"),
    ("%x/%n", UNKNOWN_PLACEHOLDER),
    ("%n%", UNKNOWN_PLACEHOLDER),
    ("%N", UNKNOWN_PLACEHOLDER),
    ("%{user}/%n", UNKNOWN_PLACEHOLDER),
    ("%02n/%n", UNKNOWN_PLACEHOLDER),
    ("%-1n/%n", UNKNOWN_PLACEHOLDER),
    ("%1.2.3n/%n", UNKNOWN_PLACEHOLDER),
    ("%1n", NO_USER),
    ("%1.1n/%d", NO_USER),
    ("%d", NO_USER),
    ("%%n", NO_USER),
    ("quota.service", NO_USER),
    ("none/%n", NO_FOLDER),
    ("none/%d/%n", NO_FOLDER),
    ("100%%-none/%n", NO_FOLDER),
    ("/none-%n/x", ""),
    ("mail/%n", NO_ROOT),
    ("%n", NO_ROOT),
    ("", NO_ROOT),
]


@pytest.mark.parametrize(("template", "expected"), TEMPLATES)
def test_placeholders_make_the_path(tmp_path: pathlib.Path, template: str, expected: str) -> None:
    bad = expected in (UNKNOWN_PLACEHOLDER, NO_USER, NO_FOLDER, NO_ROOT)
    whole = template if expected == NO_ROOT or template[:1] == "/" else f"{tmp_path}/{template}"
    (tmp_path / "100%").mkdir()
    if expected and not bad:
        (tmp_path / expected).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / expected).write_bytes(b"x" * 200)
    got = ask_cgi(MBOX_CGI, "u=john&d=x.org", QUOTA_LIMIT="9", QUOTA_MAILBOX=whole)
    if bad:
        assert got.status == 500 and got.line.startswith(f"ERROR QUOTA_MAILBOX {expected}".encode())
        assert str(tmp_path) not in got.line.decode() and repr(whole)[1:-1] in got.errors
    else:
        assert got.line == (b"OVERQUOTA john 200 9" if expected else b"OK john 0 9")


def test_a_path_with_the_domain_wants_one_and_parts_of_names_lead_nowhere_else(
    tmp_path: pathlib.Path,
) -> None:
    for template in "%d/%n", "%u", "%1d/%n":
        got = ask_cgi(MBOX_CGI, "u=john", QUOTA_MAILBOX=tmp_path / template)
        assert (got.status, got.line) == (400, b"ERROR no domain (d=) given"), template
    long = ask_cgi(MBOX_CGI, f"u={'x' * 255}&d={'y' * 255}", QUOTA_MAILBOX=tmp_path / "%u")
    assert (long.status, long.line[:5]) == (200, b"OK xx"), "a name too long for a file has no file"
    for template in "mail/%1.2n/%n", "mail/%1.1n%2.1n/%n":
        (tmp_path / "mail").mkdir(exist_ok=True)
        (tmp_path / "a..b").write_bytes(b"x" * 10)
        got = ask_cgi(MBOX_CGI, "u=a..b", QUOTA_MAILBOX=tmp_path / template)
        assert (got.status, got.line) == (400, b"ERROR no mailbox has such a user"), template


def test_the_home_of_a_system_user_is_known(tmp_path: pathlib.Path) -> None:
    user = pwd.getpwuid(os.getuid())
    home = ask_cgi(MBOX_CGI, f"u={user.pw_name}", QUOTA_MAILBOX=f"%h/{tmp_path.name}-none")
    assert home.line == f"OK {user.pw_name} 0 209715200".encode()
    here = os.path.relpath(tmp_path, user.pw_dir)
    (tmp_path / "box").write_bytes(b"x" * 10)
    settings: dict[str, Path] = {"QUOTA_LIMIT": "9", "QUOTA_MAILBOX": f"%h/{here}/box"}
    assert ask_cgi(MBOX_CGI, f"u={user.pw_name}", **settings).line.endswith(b" 10 9")
    assert ask_cgi(MBOX_CGI, "u=nosuchuser", **settings).line == b"UNKNOWN nosuchuser 0 9"


USERS = b"""# user limit

john 50
mary\t1K # a boss
#paul 1
  # 2
mary@x.org 10
@x.org 20
a b 0
mary 1
  indented   7
hash#tag 8
a:b 9
"""


def test_limits_of_users_beat_the_limit_of_all(spool: pathlib.Path, tmp_path: pathlib.Path) -> None:
    users = tmp_path / "users"
    users.write_bytes(USERS)
    settings: dict[str, Path] = {
        "QUOTA_LIMIT": "100",
        "QUOTA_MAILBOX": spool / "%n",
        "QUOTA_USERS": users,
    }
    rows = [
        ("u=john", b"OVERQUOTA john 100 50"),
        ("u=john&d=x.org", b"OVERQUOTA john 100 50"),
        ("u=mary", b"OK mary 101 1024"),
        ("u=mary&d=x.org", b"OVERQUOTA mary 101 10"),
        ("u=mary&d=y.org", b"OK mary 101 1024"),
        ("u=a+b", b"OK a b 101 0"),
        ("u=a+b&d=x.org", b"OK a b 101 0"),
        ("u=paul", b"OK paul 0 100"),
        ("u=paul&d=x.org", b"OK paul 0 20"),
        ("u=x.org", b"OK x.org 0 100"),
        ("u=indented", b"OK indented 0 7"),
        ("u=hash%23tag", b"OK hash#tag 0 8"),
        ("u=a:b", b"OK a:b 0 9"),
    ]
    for query, line in rows:
        assert ask_cgi(MBOX_CGI, query, **settings).line == line
    many = b"".join(b"user%d@y.org %dM\n" % (n, n % 90) for n in range(20_000))
    users.write_bytes(many + USERS + many)
    rows += [("u=user19999&d=y.org", b"OK user19999 0 %d" % (19999 % 90 << 20))]
    for query, line in rows:
        assert ask_cgi(MBOX_CGI, query, **settings).line == line, "among many others"


BAD_USERS = [
    # (what stands in the file between many good lines, the number of the bad line among them)
    (b"broken lots\n", 1),
    (b"john 1\nempty\n", 2),
    (b"john: 100M\n", 1),
    (b"john:\t100M\n", 1),
    (b"john:100M\n", 1),
    (b"john :100M\n", 1),
    (b"100M\n", 1),
    (b" 100M\n", 1),
    (b"@ 100M\n", 1),
    (b"john@ 100M\n", 1),
    (b"john 100MB\n", 1),
    (b"john 1.5G\n", 1),
    (b"john M\n", 1),
    (b"john M1\n", 1),
    (b"john -1\n", 1),
    (b"john \n", 1),
    (b"john # 5\n", 1),
    (b"a 5 # b 6\n\nc\n", 3),
    (b"john 5\x00\n", 1),
    (b"\n\n# x 5\nx\n", 4),
]


@pytest.mark.parametrize(("text", "number"), BAD_USERS)
def test_a_line_of_users_that_is_none_is_an_error_with_its_number(
    tmp_path: pathlib.Path, text: bytes, number: int
) -> None:
    users = tmp_path / "users"
    many = b"".join(b"user%d 5M\n" % n for n in range(9000))
    for before, after in (b"", b""), (b"# one\n", b"mary 1\n"), (many, many):
        users.write_bytes(before + text + after)
        for query in "u=john", "u=nobody&d=x.org":
            got = ask_cgi(MBOX_CGI, query, QUOTA_USERS=users, QUOTA_MAILBOX=tmp_path / "%n")
            line = f"QUOTA_USERS: line {before.count(10) + number} is not `user limit`"
            assert (got.status, line in got.line.decode()) == (500, True), got.line
            assert str(tmp_path) not in got.line.decode()


def test_users_that_cannot_be_read_whole_are_an_error(tmp_path: pathlib.Path) -> None:
    users = tmp_path / "users"
    os.mkfifo(tmp_path / "pipe")
    unreadable = "ERROR the file QUOTA_USERS cannot be read"
    many = b"user 5M\n" * 20_000
    for path, content, line in [
        (users, b"john 5", "ERROR QUOTA_USERS: line 1, the last, does not end in a newline"),
        (users, many + b"x", "ERROR QUOTA_USERS: line 20001, the last, does not end in a newline"),
        (pathlib.Path("/dev/zero"), None, unreadable),
        (tmp_path / "pipe", None, unreadable),
        (tmp_path, None, unreadable),
        (tmp_path / "none", None, unreadable),
    ]:
        if content is not None:
            path.write_bytes(content)
        got = ask_cgi(MBOX_CGI, "u=john", QUOTA_USERS=path, QUOTA_MAILBOX=tmp_path / "%n")
        assert (got.status, got.line.decode()) == (500, line)
    assert str(tmp_path) not in got.line.decode() and str(tmp_path) in got.errors


def test_users_rewritten_while_they_are_read_are_an_error(tmp_path: pathlib.Path) -> None:
    users = tmp_path / "users"
    users.write_bytes(b"user 5M\n" * 20_000)
    module = load(MBOX_CGI)
    pieces = module.read_users(bytes(users))
    next(pieces)
    with open(users, "r+b") as file:
        file.truncate(80_000)  # which ends a line, too
    with pytest.raises(module.Problem) as caught:
        list(pieces)
    assert "replace it with mv" in caught.value.why


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
        [PYTHON, "-IS", "-"],
        input=MBOX_CGI.read_text(),  # which nobody else may be able to open
        env={"GATEWAY_INTERFACE": "CGI/1.1", "QUERY_STRING": "u=mary"}
        | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
        user=65534,
    )
    assert "Status: 500 " in done.stdout
    assert done.stdout.endswith("\n\nERROR cannot read the mailbox: Permission denied\n")
    assert str(spool) in done.stderr


def test_no_path_is_shown_where_standard_error_is_closed(spool: pathlib.Path) -> None:
    query = "GATEWAY_INTERFACE=1 QUERY_STRING=u=folder"
    command = f"{query} QUOTA_MAILBOX={spool}/%n {MBOX_CGI} 2>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stdout.endswith("\n\nERROR the mailbox is not a file\n")
    assert str(spool) not in done.stdout


def test_a_home_that_cannot_be_looked_up_is_an_error() -> None:
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); "
    code += "import pwd; exec(compile(sys.argv[1], 'cgi', 'exec'))"
    environment = {"GATEWAY_INTERFACE": "1", "QUERY_STRING": "u=root", "QUOTA_MAILBOX": "%h/none"}
    command = [PYTHON, "-IS", "-c", code, MBOX_CGI.read_text()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("\nERROR the users of the system cannot be looked up\n")


@pytest.mark.parametrize(
    ("grace", "limit", "header"),
    [
        ("auto", "1000", None),
        ("0", "1000", None),
        ("10%", "1000", "100"),
        ("10%", "0", None),
        ("1000%", "1000", "10000"),
        ("0%", "1000", None),
        ("5", "1000", "5"),
        ("2k", "0", "2048"),
        ("10M", "1000", "10485760"),
        ("", "1000", ""),
        ("%", "1000", ""),
        ("-5%", "1000", ""),
        ("1.5%", "1000", ""),
        ("10 %%", "1000", ""),
        ("ten", "1000", ""),
        ("-1", "1000", ""),
        ("9" * 30, "1000", ""),
    ],
)
def test_the_grace_is_a_header_field(
    spool: pathlib.Path, grace: str, limit: str, header: Optional[str]
) -> None:
    settings: dict[str, Path] = {"QUOTA_LIMIT": limit, "QUOTA_MAILBOX": spool / "%n"}
    for user in "john", "nobody":
        got = ask_cgi(MBOX_CGI, f"u={user}", QUOTA_GRACE=grace, **settings)
        if header == "":
            assert got.status == 500 and b"QUOTA_GRACE" in got.line
        else:
            fields = dict(line.split(": ", 1) for line in got.header.splitlines())
            assert (got.status, fields.get("Quota-Grace")) == (200, header)


@pytest.mark.parametrize(
    ("changed", "header"),
    [
        (784111777, "Sun, 06 Nov 1994 08:49:37 GMT"),
        (1, "Thu, 01 Jan 1970 00:00:01 GMT"),
        (0, None),
        (-5, None),
        (4733510400, "Mon, 01 Jan 2120 00:00:00 GMT"),
    ],
)
def test_the_last_change_is_a_header_field(
    spool: pathlib.Path, changed: int, header: Optional[str]
) -> None:
    os.utime(spool / "john", (5, changed))
    got = ask_cgi(MBOX_CGI, "u=john", QUOTA_MAILBOX=spool / "%n", LC_ALL="de_DE.UTF-8")
    fields = dict(line.split(": ", 1) for line in got.header.splitlines())
    assert fields.get("Last-Modified") == header
    assert "Last-Modified" not in ask_cgi(MBOX_CGI, "u=no", QUOTA_MAILBOX=spool / "%n").header


ALLOW = [
    # (QUOTA_ALLOW, who asks, the status)
    ("", "192.0.2.1", 200),
    ("192.0.2.1", "192.0.2.1", 200),
    ("192.0.2.1", "192.0.2.10", 403),
    ("192.0.2.0/24", "192.0.2.255", 200),
    ("192.0.2.0/24", "192.0.3.0", 403),
    ("192.0.2.7/24", "192.0.2.1", 200),
    ("192.0.2.128/25", "192.0.2.127", 403),
    ("0.0.0.0/0", "203.0.113.9", 200),
    ("0.0.0.0/0", "2001:db8::1", 403),
    ("::/0", "2001:db8::1", 200),
    ("::/0", "192.0.2.1", 403),
    ("2001:db8::/32", "2001:db8:1::1", 200),
    ("2001:db8::/32", "2001:db9::1", 403),
    ("2001:DB8:0::1", "2001:db8::1", 200),
    ("198.51.100.1 , 2001:db8::/32,192.0.2.1", "192.0.2.1", 200),
    ("192.0.2.1", "::ffff:192.0.2.1", 200),
    ("192.0.2.0/24", "::ffff:c000:217", 200),
    ("::ffff:192.0.2.0/120", "192.0.2.9", 200),
    ("::ffff:192.0.2.0/120", "192.0.3.9", 403),
    ("fe80::/10", "fe80::1%eth0", 200),
    ("192.0.2.1", "", 403),
    ("192.0.2.1", "unix:", 403),
    ("192.0.2.1", "192.0.2.1 ", 403),
    ("192.0.2.1", "localhost", 403),
    ("localhost", "192.0.2.1", 500),
    ("192.0.2.1 192.0.2.0/33", "192.0.2.1", 500),
    ("192.0.2", "192.0.2.1", 500),
    ("192.0.2.0/-1", "192.0.2.1", 500),
    ("192.0.2.0/255.255.255.0", "192.0.2.1", 500),
    ("2001:db8::/129", "192.0.2.1", 500),
    ("j\u00f6rg", "192.0.2.1", 500),
    (" , ", "192.0.2.1", 403),
]


@pytest.mark.parametrize(("allow", "peer", "status"), ALLOW)
def test_only_who_is_allowed_gets_an_answer(
    spool: pathlib.Path, allow: str, peer: str, status: int
) -> None:
    settings: dict[str, Path] = {"QUOTA_MAILBOX": spool / "%n", "QUOTA_ALLOW": allow}
    for script in MBOX_CGI, MAILDIR_CGI:
        got = ask_cgi(script, "u=nobody", REMOTE_ADDR=peer, QUOTA_MAILDIR=spool / "%n", **settings)
        assert got.status == status, got.line
        assert got.line.startswith(b"OK " if status == 200 else b"ERROR ")
        assert b"nobody" not in got.line or status == 200
    for method, query in ("POST", "u=nobody"), ("GET", ""), ("HEAD", "u=nobody"):
        got = ask_cgi(MBOX_CGI, query, method, REMOTE_ADDR=peer, **settings)
        assert status == 200 or got.status == status
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": "u=nobody", "REMOTE_ADDR": peer}
    environ.update(
        (name, str(value).encode().decode("latin-1")) for name, value in settings.items()
    )
    assert ask_wsgi(MBOX_CGI, environ)[:3] == str(status)


def ask_wsgi(script: pathlib.Path, environ: dict[str, str]) -> str:
    """Ask a script as a WSGI server does; return the status and the body."""
    statuses: list[str] = []
    body = load(script).application(environ, lambda status, header: statuses.append(status))
    return statuses[0] + " " + b"".join(body).decode()


def test_who_asks_without_an_address_gets_nothing_where_some_are_allowed(
    spool: pathlib.Path,
) -> None:
    settings: dict[str, Path] = {"QUOTA_MAILBOX": spool / "%n", "QUOTA_ALLOW": "192.0.2.1"}
    assert ask_cgi(MBOX_CGI, "u=john", **settings).status == 403
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": "u=john"}
    environ.update((name, str(value)) for name, value in settings.items())
    for peer in {}, {"REMOTE_ADDR": ""}:
        assert ask_wsgi(MBOX_CGI, environ | peer)[:3] == "403"


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
    status, body = http(port, "GET", "/?u=" + "x" * 70_000)
    assert status == 414 and body.startswith(b"ERROR ") and body.endswith(b"Too Long\n")
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


# ---- Maildirs: the rule, and the servers that keep them as judges ----
#
# A judge is the real program: Dovecot's quota-status, asked whether one more byte would fit, and
# deliverquota, given a message of one byte. Both rewrite `maildirsize`, so the CGI is asked first,
# and what it leaves behind is compared with what there was. For most Maildirs the CGI answers
# inside this process (a process each would take longer than the judges do); every tenth, all bad
# ones and all tables are asked as a web server would.

MAIL_UID = 65534  # nobody: Dovecot refuses to serve root's mail
UIDLIST = b"3 V1700000000 N1 G0123456789abcdef0123456789abcdef\n"  # what Dovecot leaves in an INBOX


class Maildir(NamedTuple):
    """A Maildir to be made: `maildirsize` and its age in seconds, files by their path with size.

    A path that ends in `/` is a folder; a size that is a string is where a symbolic link leads to,
    one that is bytes is what the file holds.
    """

    maildirsize: Optional[bytes]
    age: int
    files: Mapping[str, Union[int, str, bytes]]


def make_maildir(path: pathlib.Path, maildir: Maildir) -> pathlib.Path:
    """Make a Maildir that belongs to MAIL_UID (where the tests run as root) and return its path."""
    for part in ("cur", "new", "tmp"):
        (path / part).mkdir(parents=True)
    for name, size in maildir.files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(size, str):
            target.symlink_to(size)
        elif name.endswith("/"):
            target.mkdir(exist_ok=True)
        elif name == "dovecot-uidlist":
            target.write_bytes(UIDLIST)
        elif isinstance(size, bytes):
            target.write_bytes(size)
        else:
            with open(target, "wb") as file:
                file.truncate(size)
    if maildir.maildirsize is not None:
        (path / "maildirsize").write_bytes(maildir.maildirsize)
        then = time.time() - maildir.age
        os.utime(path / "maildirsize", (then, then))
    give_to_nobody(path)
    return path


def give_to_nobody(path: pathlib.Path) -> None:
    """Give a tree to MAIL_UID, as far as one may."""
    if os.geteuid() == 0:
        for folder, _, names in os.walk(path):
            for name in [folder, *(os.path.join(folder, name) for name in names)]:
                os.lchown(name, MAIL_UID, MAIL_UID)


def state_of(path: pathlib.Path) -> list[tuple[Any, ...]]:
    """Return all that may not change in a tree: names, status, contents (of files not huge)."""
    state: list[tuple[Any, ...]] = []
    for folder, folders, names in os.walk(path):
        for name in [".", *folders, *names]:
            whole = os.path.join(folder, name)
            status = os.lstat(whole)
            kept = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            regular = os.path.isfile(whole) and status.st_size < 10000
            content = pathlib.Path(whole).read_bytes() if regular else b""
            state.append((whole, status.st_ino, status.st_uid, *kept, content))
    return sorted(state)


def johns(path: pathlib.Path) -> pathlib.Path:
    """Return a QUOTA_MAILDIR, which must name the user, that leads `john` to this Maildir."""
    link = path.with_name("john")
    link.unlink(missing_ok=True)
    link.symlink_to(path)
    return path.with_name("%n")


def ask_here(cgi: Any, path: pathlib.Path, **settings: Path) -> bytes:
    """Ask a loaded CGI about the user `john` with this Maildir; its line, and nothing touched."""
    env = {name.encode(): str(value).encode() for name, value in settings.items()}
    env[b"QUOTA_MAILDIR"] = os.fsencode(johns(path))
    before = state_of(path)
    status, line, *_ = cgi.answer(b"john", None, env)
    assert state_of(path) == before, f"{path} was changed"
    answer = bytes(line).rstrip(b"\n")
    return answer if status == 200 else b"%d " % status + answer


def ask_there(path: pathlib.Path, script: pathlib.Path = MAILDIR_CGI, /, **settings: Path) -> bytes:
    """Ask the same of a process."""
    before = state_of(path)
    response = ask_cgi(script, "u=john", QUOTA_MAILDIR=johns(path), **settings)
    assert state_of(path) == before, f"{path} was changed"
    return response.line if response.status == 200 else b"%d " % response.status + response.line


@pytest.fixture
def public_folder() -> Iterator[pathlib.Path]:
    """Give a temporary folder that other users may enter, which pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield pathlib.Path(folder)


# Dovecot 2.4 has other names for the same settings, and no limit without a rule. An empty `grace`
# leaves it at what it is by default.
DOVECOT_23 = """
    mail_location = maildir:~/Maildir{control}
    mail_plugins = quota
    passdb {{
      driver = static
      args = nopassword=y
    }}
    userdb {{
      driver = static
      args = uid={uid} gid={uid} home={base}/%u
    }}
    plugin {{
      quota = {driver}:User quota
      quota_vsizes = {vsizes}
      {rule}
      {grace}
      {trash}
      quota_status_success = DUNNO
      quota_status_overquota = OVER
      quota_status_toolarge = OVER
    }}
    service quota-status {{
      executable = quota-status -p postfix
      inet_listener {{
        address = 127.0.0.1
        port = {port}
      }}
    }}
    service lmtp {{
      inet_listener lmtp {{
        address = 127.0.0.1
        port = {lmtp_port}
      }}
    }}
    service imap-login {{
      inet_listener imap {{
        address = 127.0.0.1
        port = {imap_port}
      }}
      inet_listener imaps {{
        port = 0
      }}
    }}
"""
DOVECOT_24 = """
    mail_driver = maildir
    mail_path = ~/Maildir
    {control}
    mail_plugins {{
      quota = yes
    }}
    passdb static {{
      fields {{
        nopassword = yes
      }}
    }}
    userdb static {{
      fields {{
        uid = {uid}
        gid = {uid}
        home = {base}/%{{user}}
      }}
    }}
    quota "User quota" {{
      driver = {driver}
      {rule}
      {grace}
    }}
    {trash}
    quota_status_success = DUNNO
    quota_status_overquota = OVER
    quota_status_toolarge = OVER
    service quota-status {{
      executable = quota-status -p postfix
      inet_listener policy {{
        listen = 127.0.0.1
        port = {port}
      }}
    }}
    service lmtp {{
      inet_listener lmtp {{
        listen = 127.0.0.1
        port = {lmtp_port}
      }}
    }}
    service imap-login {{
      inet_listener imap {{
        listen = 127.0.0.1
        port = {imap_port}
      }}
      inet_listener imaps {{
        port = 0
      }}
    }}
"""
DOVECOT_EVERY = """
    base_dir = {base}/run
    state_dir = {base}/state
    log_path = {base}/log
    protocols = {protocols}
    ssl = no
    first_valid_uid = 1
    postmaster_address = postmaster@example.com
    hostname = mx.example.com
"""
TRASH_IGNORED_24 = """namespace inbox {
      inbox = yes
      mailbox Trash {
        quota_ignore = yes
      }
    }"""


def dovecot_is_old() -> bool:
    """Say whether it is Dovecot 2.3, whose settings have other names."""
    program = need("dovecot", "dovecot-core")
    return subprocess.run([program, "--version"], capture_output=True).stdout.startswith(b"2.3")


class Dovecot:
    """A Dovecot of its own, whose users' Maildirs are BASE/USER/Maildir, and a question to it."""

    def __init__(
        self,
        start: Callable[..., Process],
        base: pathlib.Path,
        limit: int = 0,
        driver: str = "maildir",
        grace: str = "0",
        control: bool = False,
        trash: bool = True,
        protocols: str = "",
    ) -> None:
        need_root()
        program = need("dovecot", "dovecot-core")
        self.base, self.config, self.port = base, base / "dovecot.conf", free_port()
        self.lmtp_port, self.imap_port = free_port(), free_port()
        old = dovecot_is_old()
        names = {
            "rule": ("quota_rule = *:bytes={}", "quota_storage_size = {}B"),
            "grace": ("quota_grace = {}", "quota_storage_grace = {}"),
            "control": (":CONTROL={}/control/%u", "mail_control_path = {}/control/%{user}"),
            "trash": (f"quota_rule{2 if limit else ''} = Trash:ignore", TRASH_IGNORED_24),
        }
        given = {"rule": limit or "", "grace": grace, "control": control and base, "trash": ""}
        wanted = {"trash": not trash, "control": control}
        settings = {
            name: (forms[0] if old else forms[1]).replace("{}", str(given[name]))
            if wanted.get(name, given[name] != "")
            else ""
            for name, forms in names.items()
        }
        if old:
            text = DOVECOT_EVERY + DOVECOT_23
        else:
            first = "dovecot_config_version = 2.4.0\ndovecot_storage_version = 2.4.0\n"
            text = first + DOVECOT_EVERY + DOVECOT_24
        places = {"base": base, "uid": MAIL_UID, "driver": driver, "protocols": protocols}
        ports = {"port": self.port, "lmtp_port": self.lmtp_port, "imap_port": self.imap_port}
        vsizes = "yes" if driver == "count" else "no"
        self.config.write_text(text.format(**places, **ports, **settings, vsizes=vsizes))
        self.process = start(program, "-F", "-c", self.config, port=self.port)
        self.connection = socket.create_connection(("127.0.0.1", self.port), 20)
        self.stream = self.connection.makefile("rwb")

    def path_of(self, user: str) -> pathlib.Path:
        """Return where this user's Maildir is."""
        return self.base / user / "Maildir"

    def refuses(self, user: str, size: int = 1) -> bool:
        """Ask, as Postfix would, whether so many more bytes are too much for this user."""
        self.stream.write(f"recipient={user}\nsize={size}\n\n".encode())
        self.stream.flush()
        action = self.stream.readline().strip()
        assert self.stream.readline() == b"\n"
        log = (self.base / "log").read_text(errors="replace")[-2000:]
        assert action in (b"action=DUNNO", b"action=OVER"), f"{user}: {action!r}\n{log}"
        return action == b"action=OVER"

    def room(self, user: str, most: int) -> int:
        """Return the size of the largest message that would be taken, by bisection."""
        fits, refused = 0, most + 1
        while refused - fits > 1:
            middle = (fits + refused) // 2
            if self.refuses(user, middle):
                refused = middle
            else:
                fits = middle
        return fits

    def deliver(self, user: str, message: bytes) -> int:
        """Hand a message over by LMTP; return the code of the reply to it, or to its recipient."""
        with smtplib.LMTP("127.0.0.1", self.lmtp_port, timeout=30) as client:
            client.mail("sender@example.net")
            code = client.rcpt(user)[0]
            return code if code != 250 else client.data(message)[0]


@pytest.fixture
def dovecot(
    public_folder: pathlib.Path, start: Callable[..., Process]
) -> Iterator[Callable[..., Any]]:
    """Give a function that starts a Dovecot, which closes its connections in the end."""
    started: list[Dovecot] = []

    def start_dovecot(*arguments: Any, **options: Any) -> Dovecot:
        base = public_folder / f"dovecot{len(started)}"
        base.mkdir()
        os.chown(base, MAIL_UID, MAIL_UID)
        started.append(Dovecot(start, base, *arguments, **options))
        return started[-1]

    yield start_dovecot
    for server in started:
        server.stream.close()
        server.connection.close()


def deliverquota_refuses(path: pathlib.Path, *quota: str, message: bytes = b"\n") -> bool:
    """Deliver a message, of one byte unless given, and say whether deliverquota refused it."""
    program = need("deliverquota", "maildrop")
    done = subprocess.run([program, path, *quota], input=message, capture_output=True, timeout=60)
    assert done.returncode in (0, 77), done.stderr
    return done.returncode == 77


# ---- random Maildirs ----

MESSAGE_FLAGS = (
    "",
    ":2,",
    ":2,D",
    ":2,F",
    ":2,P",
    ":2,R",
    ":2,S",
    ":2,T",
    ":2,DFPRST",
    ":2,RSTab",
    ":1,x",
)
MAILDIR_FOLDERS = (
    ".Sent",
    ".Trash",
    ".Trash.old",
    ".Trashed",
    ".a.b.c.d.e.f",
    ".INBOX.x",
    ".Entw&APw-rfe",
)
MAILDIRSIZE_HEADERS = (
    ("{S}S", 5),
    ("{S}S,{C}C", 6),
    ("{C}C,{S}S", 3),
    ("{C}C", 3),
    ("NOQUOTA", 1),
    ("", 1),
    ("0S", 1),
    ("{S}S,0C", 1),
    ("{S}S,{S}S", 1),
    ("1S,{S}S", 1),
    ("{S}S,0S", 1),
    ("0{S}S", 1),
    ("{S}s", 1),
    ("{S}", 1),
    ("{S} S", 1),
    (" {S}S", 1),
    ("{S}S, {C}C", 1),
    ("{S}S {C}C", 1),
    ("{S}S{C}C", 1),
    ("+{S}S", 1),
    ("-{S}S", 1),
    ("{S}S,", 1),
    (",,{S}S,,{C}C", 1),
    ("{S}SC", 1),
    ("{S}S\r", 1),
    ("{S}S,5B", 1),
    ("{S}K", 1),
    ("x{S}S", 1),
    ("{S}.5S", 1),
)
DOVECOTS_HEADERS = (("99999999999999999999999999S,{C}C", 1),)  # in Courier its 64 bits overflow
MAILDIRSIZE_ENTRIES = (
    "{b} {m}\n",
    "{b:12d} {m:12d}\n",
    "  {b}\t{m}  \n",
    "{b} {m} 7 x\n",
    "{b} {m}\r\n",
)
# What one judge reads as an entry and the other does not; a line that is none has us count, as
# Dovecot does, while Courier leaves it out of the sum.
DOVECOTS_ENTRIES = ("+{b} +{m}\n", "\n", "x\n", "{b}\n", "{b}, {m}\n", "1_0 1\n", "{b}x {m}\n")


def random_name(rng: random.Random, dovecot: bool) -> tuple[str, int, int]:
    """Return the name of a message, its size as a judge would count it and that of the file."""
    real = rng.choice((0, 1, 9, 100, 999, rng.randrange(5000)))
    said = real if rng.random() < 0.7 else rng.randrange(5000)
    unique = f"17000{rng.randrange(10**5)}.M{rng.randrange(10**6)}P1.mx"
    with_size = [f",S={said}", f",S={said},W={said + 9}", f",W={said + 9},S={said}", f",S=0{said}"]
    if rng.random() < 0.1:
        return unique + rng.choice((",S=", ",S=,W=5")) + rng.choice(MESSAGE_FLAGS), 0, real
    if rng.random() < 0.6:
        return unique + rng.choice(with_size) + rng.choice(MESSAGE_FLAGS), said, real
    without = ["", ",W=77", ",s=5", ",SX=5", ",Q=1"]
    if dovecot:  # Courier takes the 5; a hidden file is none of its messages
        without += [",S=5x", ",S=x5", ",S= 5", ",S=-5"]
        unique = rng.choice(("", "", "", ".")) + unique
    return unique + rng.choice(without) + rng.choice(MESSAGE_FLAGS), real, real


def random_files(rng: random.Random, dovecot: bool) -> tuple[dict[str, Union[int, str]], int, int]:
    """Return the files of a Maildir, and about how many bytes and messages a judge will count."""
    folders = ["", *rng.sample(MAILDIR_FOLDERS, rng.choice((0, 0, 1, 3)))]
    files: dict[str, Union[int, str]] = {folder + "/cur/": 0 for folder in folders if folder}
    used = messages = 0
    for _ in range(rng.choice((0, 1, 2, 5, 12))):
        name, size, real = random_name(rng, dovecot)
        files[os.path.join(rng.choice(folders), rng.choice(("cur", "new")), name)] = real
        used, messages = used + size, messages + 1
    leftovers: dict[str, Union[int, str]] = {
        "tmp/1700000001.M1P1.mx": 4000,
        "cur/.hidden": 0 if dovecot else 700,
        "cur/..hidden": 700,
        "cur/gone": "nowhere",
        "new/link,S=40": "/etc/hostname",
        "new/folder,S=30/": 0,
        ".plain": 600,
        ".empty/": 0,
        ".Sent/maildirfolder": 0,
        ".Sent/.nested/cur/1": 3000,
        "plain/cur/1": 3000,
        "courierimapsubscribed": 40,
        "dovecot.index.log": 40,
        "quotawarn": 1,
    }
    for name in rng.sample(sorted(leftovers), rng.choice((0, 0, 2, 5))):
        files[name] = leftovers[name]
    return files, used, messages


def random_maildirsize(rng: random.Random, dovecot: bool, used: int, messages: int) -> bytes:
    """Return a `maildirsize` whose limits and sum are about what is there."""
    near = (-1000, -1, 0, 0, 1, 1000)
    said = max(0, used + rng.choice(near)), max(0, messages + rng.choice((-1, 0, 0, 1)))
    from_which = rng.choice((said, (used, messages)))
    limits = {
        "S": max(0, from_which[0] + rng.choice(near)),
        "C": max(0, from_which[1] + rng.choice((-1, 0, 1, 1, 5))),
    }
    headers, weights = zip(*MAILDIRSIZE_HEADERS + (DOVECOTS_HEADERS if dovecot else ()))
    text: str = rng.choices(headers, weights)[0].format(**limits) + "\n"
    kinds = MAILDIRSIZE_ENTRIES + (DOVECOTS_ENTRIES if dovecot and rng.random() < 0.2 else ())
    parts = rng.choice((0, 1, 1, 1, 2, 4))
    if rng.random() < 0.1:  # long enough to be rebuilt, or only just not
        text += "0 0\n" * ((5120 - len(text)) // 4 - rng.choice((0, 1, 8)))
    for part in range(parts):
        more = said if part == parts - 1 else (rng.randrange(-300, 300), rng.choice((-1, 0, 1)))
        said = said[0] - more[0], said[1] - more[1]
        text += rng.choice(kinds).format(b=more[0], m=more[1])
    if rng.random() < 0.05:
        text += f"{rng.randrange(-9000, 9000)} 1"  # a write that is not finished
    return text.encode()


def random_maildir(seed: int, dovecot: bool, sized: bool = True) -> Maildir:
    """Return a Maildir, the same for the same seed, for one judge; with a `maildirsize` or not."""
    rng = random.Random(seed)
    files, used, messages = random_files(rng, dovecot)
    if rng.random() < 0.2:
        files["away/cur/1"], files[".link"] = 2000, rng.choice(("away", ".", "..", "nowhere"))
    age = rng.choice((0, 60, 840, 960, 10**6))
    maildirsize = random_maildirsize(rng, dovecot, used, messages) if sized else None
    return Maildir(maildirsize, age, files)


def verdicts_differ(
    seeds: range,
    make: Callable[[int], Maildir],
    path_of: Callable[[str], pathlib.Path],
    judge: Callable[[str], bool],
    **settings: Path,
) -> list[str]:
    """Ask the CGI, then the judge, about a Maildir for each seed; tell where they differ."""
    cgi = load(MAILDIR_CGI)
    different: list[str] = []
    verdicts: set[bool] = set()
    for seed in seeds:
        user = f"u{seed}"
        path = make_maildir(path_of(user), make(seed))
        in_a_process = seed % 10 == 0
        line = ask_there(path, **settings) if in_a_process else ask_here(cgi, path, **settings)
        refused = judge(user)
        verdicts.add(refused)
        if line.split(b" ")[0] != (b"OVERQUOTA" if refused else b"OK"):
            short = str(make(seed)).replace("0 0\\n", "")
            different.append(f"seed {seed}: {line!r}, the judge says over: {refused}, {short}")
    assert len(verdicts) == 2, "Maildirs of one kind only"
    return different


def test_random_maildirs_get_the_verdict_that_dovecot_gives(dovecot: Callable[..., Any]) -> None:
    if not dovecot_is_old():
        return  # it takes no limit from maildirsize; its count driver has tests of its own
    server = dovecot()

    def make(seed: int) -> Maildir:
        maildir = random_maildir(seed, dovecot=True)
        return maildir._replace(files={**maildir.files, "dovecot-uidlist": 0})

    path_of, judge = server.path_of, server.refuses
    different = verdicts_differ(range(300), make, path_of, judge, QUOTA_LIMIT="0")
    assert not different, "\n".join(different)


def test_random_maildirs_get_the_verdict_that_deliverquota_gives(tmp_path: pathlib.Path) -> None:
    def judge(user: str) -> bool:
        return deliverquota_refuses(tmp_path / user)

    def make(seed: int) -> Maildir:
        return random_maildir(seed, dovecot=False)

    different = verdicts_differ(range(300), make, lambda u: tmp_path / u, judge, QUOTA_LIMIT="0")
    assert not different, "\n".join(different)


RULE_LIMIT = 5000  # bytes, for the Maildirs whose limit does not come from maildirsize


def maildir_near_limit(seed: int, dovecot: bool, sized: bool) -> Maildir:
    """Return a random Maildir that holds about RULE_LIMIT bytes, its first line just that."""
    rng = random.Random(-seed)
    files, used, messages = random_files(rng, dovecot)
    files["new/rest"] = max(0, RULE_LIMIT - used + rng.choice((-500, -1, 0, 0, 1)))
    text = random_maildirsize(rng, dovecot, max(used, RULE_LIMIT), messages)
    text = b"%dS\n%s" % (RULE_LIMIT, text.partition(b"\n")[2])
    return Maildir(text if sized else None, rng.choice((0, 960)), files)


@pytest.mark.parametrize("sized", [False, True])
def test_random_maildirs_get_the_verdict_of_dovecots_own_quota_rule(
    dovecot: Callable[..., Any], tmp_path: pathlib.Path, sized: bool
) -> None:
    server = dovecot(RULE_LIMIT)
    users = tmp_path / "users"
    users.write_text(f"john {RULE_LIMIT}\n")
    limits: dict[str, Path] = {"QUOTA_LIMIT": str(RULE_LIMIT)}
    if sized:
        limits = {"QUOTA_USERS": users}
    different = verdicts_differ(
        range(1, 151),
        lambda seed: maildir_near_limit(seed, True, sized),
        server.path_of,
        server.refuses,
        QUOTA_KEEPER="dovecot",
        **limits,
    )
    assert not different, "\n".join(different)


@pytest.mark.parametrize("sized", [False, True])
def test_random_maildirs_get_the_verdict_of_the_quota_given_to_deliverquota(
    tmp_path: pathlib.Path, sized: bool
) -> None:
    users = tmp_path / "users"
    users.write_text(f"john {RULE_LIMIT}\n")
    different = verdicts_differ(
        range(1, 151),
        lambda seed: maildir_near_limit(seed, False, sized),
        lambda user: tmp_path / user,
        lambda user: deliverquota_refuses(tmp_path / user, f"{RULE_LIMIT}S"),
        QUOTA_USERS=users,
    )
    assert not different, "\n".join(different)


# ---- the rule, a row for each of its sentences ----


class Rule(NamedTuple):
    """A sentence, a Maildir, the answer, and which real servers hold it.

    D(ovecot), T (Dovecot that ignores Trash), C(ourier).
    """

    sentence: str
    maildirsize: Optional[bytes]
    files: dict[str, Union[int, str]]
    line: str
    judges: str = ""
    age: int = 0
    setting: str = ""


DISTRUSTED = b"1000S\n1001 1\n1 1\n"  # over and of two lines: every server counts
LONGEST = b"1000S\n" + b"0 0\n" * 1278  # 5118 bytes
STUFFED: dict[str, Union[int, str]] = {"cur/1": 2000}
NO_FILES: dict[str, Union[int, str]] = {}
BY_DOVECOT: dict[str, Union[int, str]] = {"dovecot-uidlist": 0}
MAILDIR_RULE = (
    Rule("under the limit of bytes", b"1000S\n999 1\n", NO_FILES, "OK 999 1000", "DC"),
    Rule("the limit of bytes reached", b"1000S\n1000 1\n", NO_FILES, "OVERQUOTA 1000 1000", "DC"),
    Rule("under the limit of messages", b"2C\n10 1\n", NO_FILES, "OK 10 0", "DC"),
    Rule("the limit of messages reached", b"2C\n10 2\n", NO_FILES, "OVERQUOTA 10 0", "DC"),
    Rule("messages only, true bytes", b"9S,2C\n8 2\n", NO_FILES, "OVERQUOTA 8 9", "DC"),
    Rule("items in any order", b"3C,9S\n9 2\n", NO_FILES, "OVERQUOTA 9 9", "DC"),
    Rule("0 is no limit", b"0S,0C\n9 9\n", NO_FILES, "OK 9 0", "DC"),
    Rule("no digits, no limit", b"NOQUOTA\n9 9\n", NO_FILES, "OK 9 0", "DC"),
    Rule("an empty file is none", b"", STUFFED, "OVERQUOTA 2000 9", setting="QUOTA_LIMIT=9"),
    Rule("zeros ahead", b"6S\n" + b"0" * 200 + b"5 1\n", STUFFED, "OK 5 6", "DC"),
    Rule("an unfinished line that is none", b"8S\n3 1\nx", STUFFED, "OK 3 8", "C"),
    Rule("other letters, no limit", b"5B,5s\n9 9\n", NO_FILES, "OK 9 0", "DC"),
    Rule("lines add up", b"999S\n1 1\n  -2   -1\n\t9 1\n-7 -1\n", STUFFED, "OK 1 999", "DC"),
    Rule("padded lines", b"9S\n" + b"%12d %12d\n" % (9, 2), NO_FILES, "OVERQUOTA 9 9", "DC"),
    Rule("more on a line is left out", b"9S\n9 2 7 x\n", NO_FILES, "OVERQUOTA 9 9", "DC"),
    Rule("under is trusted", b"1000S\n9 1\n", STUFFED, "OK 9 1000", "DC"),
    Rule("under is trusted in many lines", b"1000S\n9 1\n9 1\n", STUFFED, "OK 18 1000", "DC"),
    Rule("under is trusted when old", b"1000S\n9 1\n", STUFFED, "OK 9 1000", "DC", 10**7),
    Rule("no lines are a sum of 0", b"1000S\n", STUFFED, "OK 0 1000", "DC"),
    Rule("no file: counted", None, STUFFED, "OVERQUOTA 2000 900", setting="QUOTA_LIMIT=900"),
    Rule("a line that is none: counted", b"9S\nx\n", STUFFED, "OVERQUOTA 2000 9", "D"),
    Rule("a blank line: counted", b"9S\n1 1\n\n", STUFFED, "OVERQUOTA 2000 9", "D"),
    Rule("half a line: counted", b"9S\n1\n", STUFFED, "OVERQUOTA 2000 9", "D"),
    Rule("not decimal: counted", b"9S\n1_0 1\n", STUFFED, "OVERQUOTA 2000 9", "D"),
    Rule("a sum of bytes below 0: counted", b"9S\n-1 1\n", STUFFED, "OVERQUOTA 2000 9", "DC"),
    Rule("a sum of messages below 0: counted", b"9S\n1 -1\n", STUFFED, "OVERQUOTA 2000 9", "DC"),
    Rule("5119 bytes are trusted", LONGEST[:-1] + b" \n", STUFFED, "OK 0 1000", "DC"),
    Rule("5120 bytes are not", LONGEST[:-1] + b"  \n", STUFFED, "OVERQUOTA 2000 1000", "DC"),
    Rule("over in two lines: counted", DISTRUSTED, NO_FILES, "OK 0 1000", "DC"),
    Rule("over and old: counted", b"1000S\n1001 1\n", NO_FILES, "OK 0 1000", "DC", 905),
    Rule("over and new: trusted", b"9S\n10 1\n", NO_FILES, "OVERQUOTA 10 9", "DC", 880),
    Rule("messages over and old: counted", b"1C\n9 2\n", NO_FILES, "OK 0 0", "DC", 905),
    Rule("just full and old: Courier counts", b"9S\n9 1\n", NO_FILES, "OK 0 9", "C", 905),
    Rule("Dovecot does not", b"9S\n9 1\n", BY_DOVECOT, "OVERQUOTA 9 9", "D", 905),
    Rule("cur and new count", DISTRUSTED, {"cur/1": 9, "new/2": 8}, "OK 17 1000", "DC"),
    Rule("tmp does not", DISTRUSTED, {"tmp/1": 9000, "cur/1": 9}, "OK 9 1000", "DC"),
    Rule("folders count", DISTRUSTED, {".a/cur/1": 9, ".a.b.c/new/1": 8}, "OK 17 1000", "DC"),
    Rule("deep folders do not", DISTRUSTED, {".a/.b/cur/1": 9000}, "OK 0 1000", "DC"),
    Rule("folders without a dot do not", DISTRUSTED, {"a/cur/1": 9000}, "OK 0 1000", "DC"),
    Rule("linked ones not in Courier", DISTRUSTED, {"a/cur/1": 9, ".a": "a"}, "OK 0 1000", "C"),
    Rule(
        "linked ones in Dovecot",
        DISTRUSTED,
        {"a/cur/1": 9, ".a": "a", **BY_DOVECOT},
        "OK 9 1000",
        "D",
    ),
    Rule("not folders", DISTRUSTED, {".file": 9000, "cur/.a/1": 9}, "OK 0 1000", "C"),
    Rule("S= and a comma", DISTRUSTED, {"cur/1,S=7,W=9:2,S": 9000}, "OK 7 1000", "DC"),
    Rule("S= and a colon", DISTRUSTED, {"cur/1,W=9,S=7:2,S": 9000}, "OK 7 1000", "DC"),
    Rule("S= and the end", DISTRUSTED, {"new/1,S=0007": 9000}, "OK 7 1000", "DC"),
    Rule("S= without digits is 0", DISTRUSTED, {"cur/1,S=:2,": 9000}, "OK 0 1000", "DC"),
    Rule(
        "S= and others: the file", DISTRUSTED, {"cur/1,S=7x": 9, "new/1,S=x": 8}, "OK 17 1000", "D"
    ),
    Rule("no S=: the file", DISTRUSTED, {"cur/1,s=7,W=5:2,": 9}, "OK 9 1000", "DC"),
    Rule("a link: what it leads to", DISTRUSTED, {"cur/1": "../x", "x": 9}, "OK 9 1000", "DC"),
    Rule("hidden names", DISTRUSTED, {"cur/.nfs": 9000, "new/..x": 8}, "OK 0 1000", "C"),
    Rule(
        "hidden names in Dovecot",
        DISTRUSTED,
        {"cur/.nfs": 9, "cur/..x": 9, **BY_DOVECOT},
        "OK 9 1000",
        "D",
    ),
    Rule("what vanishes", DISTRUSTED, {"cur/1": "nowhere", "cur/2": 9}, "OK 9 1000", "DC"),
    Rule("Trash", DISTRUSTED, {".Trash/cur/1": 9, ".Trash.a/cur/1": 8}, "OK 8 1000", "C"),
    Rule("flag T", DISTRUSTED, {"cur/1:2,ST": 9, "new/1,S=8:2,T": 8}, "OK 0 1000", "C"),
    Rule("other flags", DISTRUSTED, {"cur/T:2,DFPRSt": 9, "cur/T": 8}, "OK 17 1000", "DC"),
    Rule("Dovecot's Trash", DISTRUSTED, {".Trash/cur/1": 9, **BY_DOVECOT}, "OK 9 1000", "D"),
    Rule("its flag T", DISTRUSTED, {"cur/1:2,T": 9, **BY_DOVECOT}, "OK 9 1000", "D"),
    Rule(
        "trash skipped for Dovecot, which knows no flag T",
        DISTRUSTED,
        {"cur/1:2,T": 9, ".Trash/cur/1": 9, ".Trash.a/cur/1": 5, **BY_DOVECOT},
        "OK 14 1000",
        "T",
        setting="QUOTA_TRASH=skip",
    ),
    Rule(
        "trash counted for Courier",
        DISTRUSTED,
        {"cur/1:2,T": 9, ".Trash/cur/1": 9, "cur/.x": 9},
        "OK 18 1000",
        setting="QUOTA_TRASH=count",
    ),
    Rule(
        "a server that is named",
        DISTRUSTED,
        {"cur/1:2,T": 9, ".Trash/cur/1": 9, "cur/.x": 9},
        "OK 27 1000",
        "D",
        setting="QUOTA_KEEPER=dovecot",
    ),
    Rule("maildirsize beats QUOTA_LIMIT", b"9S\n8 1\n", STUFFED, "OK 8 9", setting="QUOTA_LIMIT=5"),
    Rule("so does its none", b"0S\n8 1\n", STUFFED, "OK 8 0", setting="QUOTA_LIMIT=5"),
    Rule("a user's own beats it", b"9S\n8 1\n", STUFFED, "OVERQUOTA 8 7", setting="QUOTA_USERS=7"),
    Rule("and its messages", b"7S\n6 1\n", STUFFED, "OK 6 7", setting="QUOTA_USERS=7"),
    Rule("a user without limit", b"9S\n9 1\n", STUFFED, "OK 9 0", setting="QUOTA_USERS=0"),
    Rule("a first line from Windows", b"9S\r\n9 1\r\n", NO_FILES, "OVERQUOTA 9 9", "C"),
    Rule("is none to Dovecot", b"9S\r\n9 1\r\n", BY_DOVECOT, "OK 9 0", "D"),
    Rule("spaces", b" 9S, 2C\n9 1\n", NO_FILES, "OVERQUOTA 9 9", "C"),
    Rule("are none to Dovecot", b" 9S, 2C\n9 1\n", BY_DOVECOT, "OK 9 0", "D"),
    Rule("the last 0 counts", b"9S,0S\n9 1\n", NO_FILES, "OK 9 0", "C"),
    Rule("not for Dovecot", b"9S,0S\n9 1\n", BY_DOVECOT, "OVERQUOTA 9 9", "D"),
    Rule("a last line without an end", b"9S\n9 1", NO_FILES, "OVERQUOTA 9 9", "C"),
    Rule("is not there yet for Dovecot", b"9S\n9 1", BY_DOVECOT, "OK 0 9", "D"),
)


@pytest.mark.parametrize("row", MAILDIR_RULE, ids=lambda row: row.sentence)
def test_the_cgi_follows_each_sentence_of_the_rule(row: Rule, tmp_path: pathlib.Path) -> None:
    path = make_maildir(tmp_path / "Maildir", Maildir(row.maildirsize, row.age, row.files))
    name, _, value = row.setting.partition("=")
    settings: dict[str, Any] = {name: value} if name else {}
    if name == "QUOTA_USERS":
        settings[name] = tmp_path / "users"
        settings[name].write_text(f"john {value}\n")
    status, figures = row.line.split(" ", 1)
    assert ask_there(path, **settings) == f"{status} john {figures}".encode()


def check_figure(row: Rule, path: pathlib.Path) -> None:
    """Check what a judge wrote down where it has counted, the first line below the limits."""
    if row.maildirsize == DISTRUSTED:
        counted = (path / "maildirsize").read_text().splitlines()[1].split()[0]
        assert counted == row.line.split()[1], row


@pytest.mark.parametrize("letter", ["D", "T"])
def test_dovecot_follows_each_sentence_of_the_rule(
    dovecot: Callable[..., Any], letter: str
) -> None:
    if not dovecot_is_old():
        return  # it takes no limit from maildirsize
    server = dovecot(trash=letter == "D")
    for number, row in enumerate(MAILDIR_RULE):
        if letter in row.judges:
            user = f"u{number}"
            maildir = Maildir(row.maildirsize, row.age, row.files)
            path = make_maildir(server.path_of(user), maildir)
            assert server.refuses(user) == row.line.startswith("OVER"), row
            check_figure(row, path)


def test_deliverquota_follows_each_sentence_of_the_rule(tmp_path: pathlib.Path) -> None:
    for number, row in enumerate(MAILDIR_RULE):
        if "C" in row.judges:
            maildir = Maildir(row.maildirsize, row.age, row.files)
            path = make_maildir(tmp_path / str(number), maildir)
            assert deliverquota_refuses(path) == row.line.startswith("OVER"), row
            check_figure(row, path)


# ---- virtual sizes: what the count driver counts ----

LINES_OF_LF = b"Subject: x\n\n" + b"ab\n" * 100  # 312 bytes, of which 102 end a line
COUNT_RULE: tuple[tuple[str, Mapping[str, Union[int, str, bytes]], int], ...] = (
    # (sentence, files, bytes)
    ("W= beats S= and the file", {"cur/1,S=312,W=414:2,S": 1, "new/2,W=7": LINES_OF_LF}, 421),
    ("no W=: the file in CR LF", {"new/1,S=312": LINES_OF_LF, "cur/2:2,": LINES_OF_LF}, 828),
    ("what ends in CR LF already", {"new/1": b"x: y\r\n\r\n" + b"ab\r\n" * 99 + b"z\n"}, 407),
    ("at whatever place", {"new/1": b"x: y\n\n" + b"z" * 65529 + b"\r\n" + b"z" * 9}, 65548),
    ("zeros ahead", {"cur/1,W=007:2,": LINES_OF_LF}, 7),
    ("W= without digits is 0", {"cur/1,W=:2,": LINES_OF_LF, "new/1,W=,S=312": LINES_OF_LF}, 0),
    ("but not at the end", {"new/1,W=": LINES_OF_LF}, 414),
    ("of two W= the first", {"cur/1,W=5,W=900:2,": LINES_OF_LF}, 5),
    ("W= below S=", {"cur/1,S=900,W=400:2,": LINES_OF_LF}, 400),
    ("other things are no W=", {"cur/1,W=7x:2,": LINES_OF_LF, "new/2,W=-5": LINES_OF_LF}, 828),
    ("nor is another letter", {"cur/1,w=7:2,": LINES_OF_LF}, 414),
    ("even among the flags", {"new/1:2,W=9,S": LINES_OF_LF}, 9),
    ("hidden names", {"cur/.1,W=9": 9, "new/..1,W=9": 9}, 0),
    ("folders", {".a/new/1,W=9": 9, ".a.b/cur/2,W=8:2,": 9, ".a/.b/cur/3,W=7:2,": 9}, 17),
    ("linked ones", {"x/cur/1,W=9:2,": 9, ".a": "x"}, 9),
    ("trash and its flag", {".Trash/cur/1,W=9:2,": 9, "cur/2,W=8:2,T": 9}, 17),
    ("tmp does not count", {"tmp/1,W=9": 9}, 0),
)


def answer_here(path: pathlib.Path, **settings: Path) -> tuple[list[str], dict[str, str]]:
    """Ask about the user `john` with this Maildir: status, used and quota; header fields."""
    env = {name.encode(): str(value).encode() for name, value in settings.items()}
    env[b"QUOTA_MAILDIR"] = os.fsencode(johns(path))
    before = state_of(path)
    status, line, headers = load(MAILDIR_CGI).answer(b"john", None, env)
    assert state_of(path) == before, f"{path} was changed"
    assert status == 200, line
    word, _, used, quota = line.decode().split()
    return [word, used, quota], dict(headers)


def room_here(path: pathlib.Path, **settings: Path) -> int:
    """Return the size of the largest message that fits, by our answer."""
    (word, used, quota), headers = answer_here(path, **settings)
    if word == "OVERQUOTA":
        return 0
    return int(quota) + int(headers.get("Quota-Grace", 0)) - int(used)


@pytest.mark.parametrize("trash", [True, False])
def test_the_count_driver_follows_each_sentence_of_its_rule(
    dovecot: Callable[..., Any], trash: bool
) -> None:
    server = dovecot(10**6, "count", trash=trash)
    for number, (sentence, files, size) in enumerate(COUNT_RULE):
        path = make_maildir(server.path_of(f"u{number}"), Maildir(None, 0, files))
        size -= 0 if trash else sum(".Trash/" in name for name in files) * 9
        keeper = {"QUOTA_KEEPER": "dovecot-count", "QUOTA_TRASH": "count" if trash else "skip"}
        settings = {**keeper, "QUOTA_LIMIT": "1000000", "QUOTA_GRACE": "0"}
        assert answer_here(path, **settings)[0] == ["OK", str(size), "1000000"], sentence
        assert 10**6 - server.room(f"u{number}", 10**6) == size, sentence


def test_of_many_messages_without_a_virtual_size_some_are_read_and_the_rest_estimated(
    tmp_path: pathlib.Path,
) -> None:
    cgi = load(MAILDIR_CGI)
    for number, most, size in (0, 10**6, 3 * 414), (1, 1, 3 * 414), (2, 0, 3 * 312):
        files = {f"new/{n}": LINES_OF_LF for n in range(3)}
        path = make_maildir(tmp_path / str(number), Maildir(None, 0, files))
        cgi.MOST_READ = most
        line = ask_here(cgi, path, QUOTA_KEEPER="dovecot-count", QUOTA_LIMIT="10000")
        assert line == b"OK john %d 10000" % size


# ---- room: how much the next message may have ----


class Judge(NamedTuple):
    """How a Dovecot is set up, and the settings that the CGI wants for it."""

    driver: str
    grace: str
    settings: dict[str, str]
    control: bool = False


ROOM_LIMIT = 300_000  # bytes
JUDGES = (
    Judge("maildir", "", {}),
    Judge("maildir", "0", {"QUOTA_GRACE": "0"}),
    Judge("maildir", "20%%", {"QUOTA_GRACE": "20%"}, control=True),
    Judge("count", "", {}),
    Judge("count", "0", {"QUOTA_GRACE": "0"}),
    Judge("count", "50K", {"QUOTA_GRACE": "50K"}, control=True),
)


def lines_of(size: int, width: int, end: bytes) -> bytes:
    """Return a message of so many bytes, its lines of one width but the last."""
    text, line = b"Subject: x" + end * 2, b"x" * width + end
    text += line * ((size - len(text) - len(end)) // len(line))
    return text + b"x" * (size - len(text) - len(end)) + end


def sized(server: Dovecot, size: int) -> bytes:
    """Return a message that has this size once LMTP has put its header before it.

    It is the size with CR LF, which either driver takes it for: the maildir driver adds up others.
    """
    assert server.deliver("users", lines_of(500, 60, b"\r\n")) == 250
    path = server.path_of("users")
    newest = max(path.glob("new/*"), key=lambda file: file.stat().st_mtime_ns)
    header = int(newest.name.partition(",W=")[2]) - 500
    return lines_of(size - header, 60, b"\r\n")


@pytest.mark.parametrize("judge", JUDGES, ids=lambda j: f"{j.driver}-{j.grace or 'default'}")
def test_the_room_is_what_dovecot_says_and_what_its_lmtp_takes(
    dovecot: Callable[..., Any], judge: Judge
) -> None:
    if judge.driver == "maildir" and not dovecot_is_old():
        return  # that driver has no settings of its own any more
    grace = judge.grace if dovecot_is_old() or "%" not in judge.grace else ""
    server = dovecot(ROOM_LIMIT, judge.driver, grace, judge.control, protocols="lmtp")
    settings = {"QUOTA_LIMIT": str(ROOM_LIMIT), **judge.settings}
    if judge.control:
        (server.base / "control").mkdir()
        os.chown(server.base / "control", MAIL_UID, MAIL_UID)
    most = ROOM_LIMIT + 11 * 2**20
    rng = random.Random(1)
    points = 0
    for mailbox in range(5):
        user = f"user{mailbox}"
        path = server.path_of(user)
        if judge.control:
            settings["QUOTA_CONTROL"] = str(server.base / f"{user}.%n")
            (server.base / f"{user}.john").symlink_to(server.base / "control" / user)
        for _ in range(8):
            end = rng.choice((b"\r\n", b"\n"))
            message = lines_of(rng.randrange(200, 50_000), rng.randrange(1, 400), end)
            assert server.deliver(user, message) == 250
            points += 1
            assert room_here(path, **settings) == server.room(user, most)
        room = server.room(user, most)
        if room:
            assert server.deliver(user, sized(server, room + 1)) == 552
            assert server.deliver(user, sized(server, room)) == 250
        left = server.room(user, most)  # the maildir driver without a grace has not added up all
        assert room_here(path, **settings) == left
        assert left == 0 or (judge.driver, judge.grace) == ("maildir", "0")
    assert points == 40


# ---- who keeps it, and when it was changed ----

KEEPERS = (
    # (uidlist and maildirsize: seconds since they were written, those in a message's name, keeper)
    (None, None, 0, "courier"),
    (None, 9000, 0, "courier"),
    (9000, None, 9000, "dovecot-count"),
    (0, 0, 0, "dovecot"),
    (0, 9000, 9000, "dovecot"),  # somebody has read
    (9000, 9000, 0, "dovecot"),  # another program has delivered
    (0, 9000, 0, "dovecot-count"),
    (50, 100, 50, "dovecot"),
    (0, 100, 0, "dovecot-count"),
    (0, 9000, -(10**10), "dovecot"),  # in the year 2342
    (0, 9000, None, "dovecot"),
    (-(10**10), 9000, 0, "dovecot-count"),
    (0, -(10**10), 0, "dovecot"),
    (0, 3 * 10**9, 0, "dovecot-count"),  # 1931
    (3 * 10**9, None, 0, "dovecot-count"),
)


@pytest.mark.parametrize("control", [False, True])
def test_who_keeps_a_maildir_is_seen_by_its_files(tmp_path: pathlib.Path, control: bool) -> None:
    now = time.time()
    cgi = load(MAILDIR_CGI)
    for number, (uidlist, maildirsize, message, keeper) in enumerate(KEEPERS):
        stamp = "x" if message is None else str(int(now - message))
        path = make_maildir(tmp_path / str(number), Maildir(None, 0, {f".a/new/{stamp}.M1P1.x": 1}))
        place = tmp_path / f"{number}.john" if control else path
        place.mkdir(exist_ok=True)
        for name, age in ("dovecot-uidlist", uidlist), ("maildirsize", maildirsize):
            if age is not None:
                (place / name).write_bytes(b"9S\n")
                os.utime(place / name, (now - age, now - age))
        if control and uidlist is None:  # CONTROL is Dovecot's
            keeper = "dovecot" if maildirsize else "dovecot-count"
        assert cgi.keeper_of(bytes(path), bytes(place)) == keeper.encode(), KEEPERS[number]
        settings: dict[str, Path] = {"QUOTA_CONTROL": tmp_path / f"{number}.%n"} if control else {}
        grace = {} if keeper == "courier" else {"Quota-Grace": "1000"}
        headers = answer_here(path, QUOTA_USERS="", QUOTA_LIMIT="10000", **settings)[1]
        if keeper == "dovecot":  # which has another limit
            assert headers.get("Quota-Grace") is None
        elif dovecot_is_old():
            assert headers.get("Quota-Grace") == grace.get("Quota-Grace"), KEEPERS[number]


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("driver", ["maildir", "count"])
def test_auto_is_right_for_a_stock_dovecot_also_after_it_has_changed_its_driver(
    dovecot: Callable[..., Any], driver: str, control: bool
) -> None:
    if driver == "maildir" and not dovecot_is_old():
        return  # nobody has it there without having looked for it
    server = dovecot(10**6, driver, "", control, protocols="lmtp")
    path, settings = server.path_of("john"), {"QUOTA_LIMIT": "1000000"}
    if control:
        settings["QUOTA_CONTROL"] = str(server.base / "control" / "%n")
        (server.base / "control").mkdir()
        os.chown(server.base / "control", MAIL_UID, MAIL_UID)
    for _ in range(3):
        assert server.deliver("john", lines_of(10**5, 9, b"\r\n")) == 250
        assert room_here(path, **settings) == server.room("john", 2 * 10**7)
    if driver == "count":
        return
    place = server.base / "control" / "john" if control else path
    then = time.time() - 7200
    for file in path.glob("new/*"):
        file.rename(file.with_name(f"{then:.0f}{file.name[10:]}"))
    for file in place.glob("**/*"):
        os.utime(file, (then, then))
    moved = dovecot(10**6, "count", "", control, protocols="lmtp")
    (moved.base / "john").symlink_to(path.parent)
    if control:
        (moved.base / "control").symlink_to(server.base / "control")
    by_name = {**settings, "QUOTA_KEEPER": "dovecot-count"}
    assert room_here(path, **by_name) == moved.room("john", 2 * 10**7) < room_here(path, **settings)
    assert moved.deliver("john", lines_of(10**5, 9, b"\r\n")) == 250
    room = moved.room("john", 2 * 10**7)
    assert room_here(path, **by_name) == room_here(path, **settings) == room


def test_auto_is_right_for_a_maildir_of_couriers(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "Maildir"
    maker = need("maildirmake", "maildrop")
    subprocess.run([maker, path], check=True)
    subprocess.run([maker, "-q", "9000S", path], check=True)
    deliverquota_refuses(path, message=message_of_size(2000))
    assert room_here(path) == 7000
    assert deliverquota_refuses(path, message=message_of_size(7001))
    assert not deliverquota_refuses(path, message=message_of_size(7000))
    assert answer_here(path)[0] == ["OVERQUOTA", "9000", "9000"]


def test_grace_is_a_setting_or_what_the_keeper_has_by_default(tmp_path: pathlib.Path) -> None:
    cgi = load(MAILDIR_CGI)
    conf = tmp_path / "dovecot.conf"
    cgi.DOVECOT_CONF = bytes(conf)
    texts = (
        "",
        "#dovecot_config_version = 2.4.0\n",
        "!include x\n",
        "a\ndovecot_config_version = 2\n",
    )
    for text, count in [(None, 50), *((text, 50) for text in texts[:3]), (texts[3], 10 << 20)]:
        if text is not None:
            conf.write_text(text)
        for keeper, grace in (b"courier", 0), (b"dovecot", 50), (b"dovecot-count", count):
            assert cgi.find_grace(keeper, 500, {}) == grace
            assert cgi.find_grace(keeper, 500, {b"QUOTA_GRACE": b"1000%"}) == 5000
            assert cgi.find_grace(keeper, 500, {b"QUOTA_GRACE": b"2K"}) == 2048


@pytest.mark.parametrize("driver", ["maildir", "count"])
def test_last_modified_is_when_a_message_came_or_was_read_or_deleted(
    dovecot: Callable[..., Any], driver: str
) -> None:
    if driver == "maildir" and not dovecot_is_old():
        return
    server = dovecot(10**5, driver, "0", protocols="lmtp imap")
    path = server.path_of("john")
    for name in "one", "two", "three":
        assert server.deliver("john", f"Subject: {name}\r\n\r\n".encode()) == 250
    client = imaplib.IMAP4("127.0.0.1", server.imap_port)
    client.login("john", "x")
    client.create("Lists")
    client.select("INBOX")

    def expunge() -> Any:
        client.store("1", "+FLAGS", "\\Deleted")
        return client.expunge()

    steps: tuple[tuple[str, Callable[[], Any], bool], ...] = (
        ("read", lambda: client.fetch("1", "(BODY[])"), True),
        ("looked at again", lambda: client.fetch("1", "(BODY[])"), False),
        ("moved", lambda: client.xatom("MOVE", "1", "Lists"), True),
        ("deleted", expunge, True),
        ("in a folder", lambda: (client.select("Lists"), expunge()), True),
        ("delivered", lambda: server.deliver("john", b"Subject: four\r\n\r\n"), True),
        ("refused", lambda: server.deliver("john", b"x: y\r\n" * 10**5), False),
        ("asked about", lambda: server.refuses("john"), False),
    )
    for what, step, changes in steps:
        then = time.time() - 3 * 86400
        for name in [path, *path.glob("**/*")]:
            os.utime(name, (then, then))
        step()
        client.noop()
        headers = answer_here(path, QUOTA_LIMIT="100000")[1]
        seen = email.utils.parsedate_to_datetime(headers["Last-Modified"]).timestamp()
        assert (time.time() - seen < 60) == changes, what
    client.logout()


# ---- a busy reader ----

BUSY_READER = """
import os, sys
for line in sys.stdin:
    for name in sorted(os.listdir("new")):
        os.rename("new/" + name, "cur/" + name + ":2,")
    print("done", flush=True)
"""


@pytest.mark.parametrize("keeper", ["courier", "dovecot", "dovecot-count"])
def test_a_reader_who_moves_messages_meanwhile_does_not_change_what_is_counted(
    tmp_path: pathlib.Path, keeper: str
) -> None:
    files = {f"new/17{n:08}.M1P1.x,S=100,W=100": 1 for n in range(400)}
    path = make_maildir(tmp_path / "Maildir", Maildir(None, 0, files))
    env = {b"QUOTA_MAILDIR": bytes(johns(path)), b"QUOTA_KEEPER": keeper.encode()}
    cgi = load(MAILDIR_CGI)
    with subprocess.Popen(
        [PYTHON, "-c", BUSY_READER], cwd=path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdin and reader.stdout
        try:
            for _ in range(20):
                reader.stdin.write(b"move\n")
                reader.stdin.flush()
                while not select.select([reader.stdout], [], [], 0)[0]:
                    for limit, status in (b"42000", "OK"), (b"39000", "OVERQUOTA"):
                        line = cgi.answer(b"john", None, {**env, b"QUOTA_LIMIT": limit})[1]
                        assert line.decode().split()[0] == status, line
                assert reader.stdout.readline() == b"done\n"
                for name in os.listdir(path / "cur"):
                    os.rename(path / "cur" / name, path / "new" / name[:-3])
        finally:
            reader.kill()


# ---- what can be wrong with a Maildir ----


def sparse_maildirsize(path: pathlib.Path) -> None:
    with open(path / "maildirsize", "wb") as file:
        file.write(b"1000S\n10 1\n")
        file.truncate(2**30)


def maildirsize_of(content: bytes) -> Callable[[pathlib.Path], Any]:
    """Return a function that writes this `maildirsize`."""
    return lambda path: (path / "maildirsize").write_bytes(content)


def linked_maildirsize(path: pathlib.Path) -> None:
    (path / "elsewhere").write_bytes(b"1000S\n10 1\n")
    (path / "maildirsize").symlink_to("elsewhere")


def file_instead(path: pathlib.Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"1000S\n10 1\n")


def looping_folders(path: pathlib.Path) -> None:
    maildirsize_of(b"9S\n")(path)
    for name, target in (".b", "."), (".c", ".."), (".d", ".e"), (".e", ".d"), (".f", ".f"):
        (path / name).symlink_to(target)


def looping_message(path: pathlib.Path) -> None:
    (path / "cur" / "loop").symlink_to("loop")


def huge_names(path: pathlib.Path) -> None:
    for power in (30, 200):
        (path / "cur" / f"1,S={10**power}").touch()


def circle_of_folders(path: pathlib.Path) -> None:
    """Make links that lead to each other, in a Maildir of the server that follows links."""
    (path / "dovecot-uidlist").touch()
    (path / ".a1").symlink_to(".a2")
    (path / ".a2").symlink_to(".a1")


EVERY_BYTE = bytes(range(256)) * 10
# Each with QUOTA_LIMIT=1500 and a message of 2000 bytes, unless it stands otherwise.
BAD_MAILDIRS: tuple[tuple[str, Callable[[pathlib.Path], Any], str], ...] = (
    ("maildirsize is a folder", lambda p: (p / "maildirsize").mkdir(), "OVERQUOTA john 2000 1500"),
    ("is a FIFO", lambda p: os.mkfifo(p / "maildirsize"), "OVERQUOTA john 2000 1500"),
    ("is a link", linked_maildirsize, "OK john 10 1000"),
    ("leads nowhere", lambda p: (p / "maildirsize").symlink_to("x"), "OVERQUOTA john 2000 1500"),
    ("is a link to itself", lambda p: (p / "maildirsize").symlink_to("maildirsize"), "500"),
    ("is /dev/zero", lambda p: (p / "maildirsize").symlink_to("/dev/zero"), "OVERQUOTA john 2000"),
    ("has a gigabyte", sparse_maildirsize, "OVERQUOTA john 2000 1000"),
    ("is binary", maildirsize_of(EVERY_BYTE), "OK john"),
    ("has binary entries", maildirsize_of(b"1000S\n" + EVERY_BYTE[1:]), "OVERQUOTA john 2000 1000"),
    ("is one long line", maildirsize_of(b"9" * 5000 + b"S\n1 1\n"), "OK john 1 0"),
    ("has folders that are links in a circle", circle_of_folders, "OVERQUOTA john 2000 1500"),
    ("has a limit of 10^30", maildirsize_of(b"%dS\n1 1\n" % 10**30), "OK john 1 0"),
    ("has sizes of 10^30", maildirsize_of(b"1000S\n%d 1\n" % 10**30), "OVERQUOTA john 2000 1000"),
    (
        "has sizes of 10^4500",
        maildirsize_of(b"9S\n" + b"9" * 4500 + b" 1\n"),
        "OVERQUOTA john 2000",
    ),
    ("the Maildir is a file", file_instead, "500"),
    ("cur is a file", lambda p: (p / ".a" / "cur").touch(), "500"),
    ("folders loop", looping_folders, "OK john 0 9"),
    ("a message is a loop", looping_message, "500"),
    ("names with 10^30 and more", huge_names, f"OVERQUOTA john {10**200 + 10**30 + 2000} 1500"),
)


@pytest.mark.parametrize(
    "what, spoil, expected", BAD_MAILDIRS, ids=[row[0] for row in BAD_MAILDIRS]
)
def test_a_bad_maildir_gets_a_verdict_by_counting_or_500(
    what: str, spoil: Callable[[pathlib.Path], Any], expected: str, tmp_path: pathlib.Path
) -> None:
    path = make_maildir(tmp_path / "Maildir", Maildir(None, 0, {"cur/1": 2000, ".a/new/": 0}))
    spoil(path)
    began = time.monotonic()
    line = ask_there(path, frugal_cgi(tmp_path), QUOTA_LIMIT="1500")
    assert time.monotonic() - began < 5
    assert line.startswith(expected.encode())
    if expected == "500":
        assert b" ERROR cannot read the mailbox: " in line and bytes(path) not in line


@pytest.mark.parametrize("linked", [False, True])
def test_a_maildirsize_that_is_no_file_is_not_opened(tmp_path: pathlib.Path, linked: bool) -> None:
    path = make_maildir(tmp_path / "Maildir", Maildir(None, 0, {"cur/1": 20}))
    pipe = tmp_path / "pipe" if linked else path / "maildirsize"
    os.mkfifo(pipe)
    if linked:
        (path / "maildirsize").symlink_to(pipe)
    opening = f"print(flush=True); open({str(pipe)!r}, 'wb')"
    writer = Process([PYTHON, "-c", opening], tmp_path / "log")
    try:
        writer.wait_ready(writer.output, "a writer that waits for a reader")
        time.sleep(0.2)
        assert ask_there(path, QUOTA_LIMIT="100") == b"OK john 20 100"
        with pytest.raises(subprocess.TimeoutExpired):  # it still waits for a reader
            writer.popen.wait(1)
    finally:
        writer.stop(signal.SIGKILL)


@pytest.mark.parametrize("setting", ["QUOTA_KEEPER=exim", "QUOTA_TRASH=yes", "QUOTA_KEEPER="])
def test_a_word_that_is_none_of_a_settings_is_an_error(
    tmp_path: pathlib.Path, setting: str
) -> None:
    name, _, value = setting.partition("=")
    missing_one = tmp_path / "Maildir"  # whether there is a Maildir or not
    line = ask_there(missing_one, **{name: value})
    assert line.startswith(f"500 ERROR {name} is not one of auto, ".encode())


def test_a_control_folder_is_a_path_with_placeholders(tmp_path: pathlib.Path) -> None:
    path = make_maildir(tmp_path / "Maildir", Maildir(b"9S\n9 1\n", 0, {"cur/1": 20}))
    make_maildir(tmp_path / "control" / "john", Maildir(b"70S\n7 1\n", 0, BY_DOVECOT))
    assert ask_there(path) == b"OVERQUOTA john 9 9"
    assert ask_there(path, QUOTA_CONTROL=tmp_path / "control" / "%n") == b"OK john 7 70"
    assert ask_there(path, QUOTA_CONTROL=tmp_path / "control" / "%n.none", QUOTA_LIMIT="50") == (
        b"OK john 20 50"
    )
    assert ask_there(path, QUOTA_CONTROL=tmp_path / "%q").startswith(b"500 ERROR QUOTA_CONTROL")
    assert ask_there(path, QUOTA_CONTROL="control/%n").startswith(b"500 ERROR QUOTA_CONTROL")
    assert ask_there(path, QUOTA_CONTROL=tmp_path / "%d/%n").startswith(b"400 ERROR no domain")


def frugal_cgi(folder: pathlib.Path) -> pathlib.Path:
    """Return a script that runs the CGI in 60 MB of address space."""
    script = folder / "frugal"
    script.write_text(f"#!/bin/sh\nulimit -v 60000\nexec '{MAILDIR_CGI}' \"$@\"\n")
    script.chmod(0o755)
    return script


def test_looping_folders_are_followed_once_where_dovecot_follows_them(
    tmp_path: pathlib.Path,
) -> None:
    path = make_maildir(tmp_path / "Maildir", Maildir(DISTRUSTED, 0, {"cur/1": 9, ".a": "."}))
    assert ask_there(path, QUOTA_KEEPER="dovecot") == b"OK john 18 1000"


@pytest.mark.parametrize("secret", ["maildirsize", ".", "cur", ".a/new", ".a"])
def test_what_cannot_be_read_is_an_error_and_not_a_smaller_sum(
    secret: str, public_folder: pathlib.Path
) -> None:
    need_root()
    shutil.copy(MAILDIR_CGI, public_folder / "cgi")
    script = public_folder / "as_nobody"
    script.write_text(
        f"#!/bin/sh\nexec {need('setpriv', 'util-linux')} --reuid={MAIL_UID} --regid={MAIL_UID} "
        f"--clear-groups '{public_folder}/cgi'\n"
    )
    script.chmod(0o755)
    path = make_maildir(
        public_folder / "Maildir", Maildir(DISTRUSTED, 0, {"cur/1": 9, ".a/new/1": 9})
    )
    assert ask_there(path, script) == b"OK john 18 1000"
    os.chown(path / secret, 0, 0)
    (path / secret).chmod(0)
    assert ask_there(path, script).startswith(b"500 ERROR cannot read the mailbox: Permission")


def test_messages_that_come_and_go_while_it_counts_do_no_harm(tmp_path: pathlib.Path) -> None:
    path = make_maildir(tmp_path / "Maildir", Maildir(DISTRUSTED, 0, {"cur/1": 9}))
    churn = (
        "import os, sys\n"
        "while True:\n"
        "    os.makedirs('.a/cur', exist_ok=True)\n"
        "    for n in range(40): open(f'.a/cur/{n}', 'x').close()\n"
        "    for n in range(40): os.rename(f'.a/cur/{n}', f'new/{n}')\n"
        "    for n in range(40): os.unlink(f'new/{n}')\n"
        "    os.rmdir('.a/cur'); os.rmdir('.a')\n"
    )
    cgi = load(MAILDIR_CGI)
    process = Process([PYTHON, "-c", churn], tmp_path / "log", cwd=path)
    try:
        wait_for((path / "new" / "0").exists, "the first message")
        for _ in range(150):
            answer = cgi.answer(b"john", None, {b"QUOTA_MAILDIR": bytes(johns(path))})
            assert answer[:2] == (200, b"OK john 9 1000\n")
        assert process.popen.poll() is None, process.output()
    finally:
        process.stop()


def test_a_hundred_thousand_messages_are_counted_in_little_memory(tmp_path: pathlib.Path) -> None:
    path = make_maildir(tmp_path / "Maildir", Maildir(b"1C\n", 0, {}))
    for name in range(100_000):
        file = os.open(path / "cur" / f"{name},S=7:2,S", os.O_CREAT | os.O_WRONLY)
        os.close(file)
    (path / "maildirsize").unlink()
    line = ask_cgi(frugal_cgi(tmp_path), "u=john", QUOTA_MAILDIR=johns(path), QUOTA_LIMIT="1M").line
    assert line == b"OK john 700000 1048576"


# ---- Maildirs that the servers made ----


def sizes_in(path: pathlib.Path) -> int:
    """Return the bytes of all messages below a Maildir."""
    return sum(file.stat().st_size for file in path.glob("**/new/*"))


def message_of_size(size: int) -> bytes:
    """Return a message of so many bytes."""
    return (b"Subject: x\n\n" + b"x" * 60 + b"\n" * size)[:size]


def test_a_maildir_filled_by_deliverquota_is_over_when_it_refuses(tmp_path: pathlib.Path) -> None:
    path, cgi = tmp_path / "Maildir", load(MAILDIR_CGI)
    maker = need("maildirmake", "maildrop")
    subprocess.run([maker, path], check=True)
    subprocess.run([maker, "-q", "9000S,40C", path], check=True)
    subprocess.run([maker, "-f", "Lists", path], check=True)
    rng = random.Random(1)
    verdicts: list[bool] = []
    for size in [*(rng.randrange(1, 900) for _ in range(25)), *(2**n for n in range(11, -1, -1))]:
        folder = path / rng.choice((".", ".Lists"))
        deliverquota_refuses(folder, message=message_of_size(size))
        line = ask_here(cgi, path)
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        refused = deliverquota_refuses(shutil.copytree(path, tmp_path / "copy"))
        verdicts.append(refused)
        status = b"OVERQUOTA" if refused else b"OK"
        assert line == b"%s john %d 9000" % (status, sizes_in(path))
    assert verdicts[0] is False and verdicts[-1] is True


def test_a_maildir_filled_by_dovecot_lda_is_over_when_it_refuses(
    dovecot: Callable[..., Any],
) -> None:
    server, cgi = dovecot(RULE_LIMIT), load(MAILDIR_CGI)
    program = need("/usr/lib/dovecot/dovecot-lda", "dovecot-core")
    path, rng = server.path_of("john"), random.Random(2)
    verdicts: list[bool] = []
    limits = {"QUOTA_LIMIT": str(RULE_LIMIT)}
    first = [(rng.randrange(1, 900), folder) for folder in ("INBOX", "Lists", "Trash") * 3]
    for size, folder in [*first, *((2**n, "INBOX") for n in range(10, -1, -1))]:
        done = subprocess.run(
            [program, "-c", server.config, "-d", "john", "-e", "-m", folder]
            + ["-o", "lda_mailbox_autocreate=yes"],
            check=False,
            input=message_of_size(size),
            capture_output=True,
            timeout=60,
        )
        refused = server.refuses("john")
        assert done.returncode in (0, 77), done.stderr + (server.base / "log").read_bytes()
        assert done.returncode == 77 or not (verdicts and verdicts[-1]), "over, and delivered to"
        verdicts.append(refused)
        status = b"OVERQUOTA" if refused else b"OK"
        expected = b"%s john %d %d" % (status, sizes_in(path), RULE_LIMIT)
        assert ask_here(cgi, path, **limits) == expected
    assert verdicts[0] is False and verdicts[-1] is True


# ---- faults: a backend that misbehaves ----

SLACK = 5  # seconds that a loaded machine may add to what is bounded
UNCACHED = "--cache-ttl", "0"
Answering = Callable[[socket.socket], Optional[bytes]]


def hang(connection: socket.socket) -> None:
    """Say nothing until the client goes away."""
    connection.settimeout(30)
    connection.recv(1)


def drip(connection: socket.socket) -> None:
    """Send a header, a byte now and then, until the client goes away."""
    connection.sendall(b"HTTP/1.0 200 OK\r\nX: ")
    for _ in range(300):
        connection.sendall(b"y")
        time.sleep(0.1)


def drip_body(connection: socket.socket) -> None:
    """Send an endless line, a byte now and then."""
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nOVERQUOTA ")
    for _ in range(300):
        connection.sendall(b"y")
        time.sleep(0.1)


def reset(connection: socket.socket) -> None:
    """Break the connection off in the middle of an answer."""
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\nOVERQUOTA ")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def reset_at_once(connection: socket.socket) -> None:
    """Break the connection off before an answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Gate:
    """Answers a line as soon as it is opened."""

    def __init__(self, line: bytes) -> None:
        self.line = line
        self.opened = threading.Event()

    def __call__(self, connection: socket.socket) -> bytes:
        assert self.opened.wait(60)
        return self.line


FAULTS: dict[str, tuple[Any, str]] = {
    # what the backend does with this question: how, part of the reason in the log
    "hangs": (hang, "no answer within 1 s"),
    "drips its header": (drip, "no answer within 1 s"),
    "drips its line": (drip_body, "no answer within 1 s"),
    "resets in the middle": (reset, "ConnectionReset"),
    "resets at once": (reset_at_once, "ConnectionReset"),
    "closes": (lambda connection: None, "RemoteDisconnected"),
    "fails for one": (b"HTTP/1.0 500 Oops\r\n\r\nOVERQUOTA x 101 100\n", "status 500"),
    "redirects": (b"HTTP/1.0 302 Found\r\nLocation: /x\r\n\r\n", "status 302"),
    "talks nonsense": (b"Mailbox full, sorry OVERQUOTA\n", "no status in the answer"),
    "speaks no HTTP": (b"HTTP/yes OVERQUOTA\r\n\r\n", "reason="),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_about_one_mailbox_is_decided_in_time_and_concerns_it_alone(
    kind: str, backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    """The rows run in one milter each: their times add up, their states do not."""
    answer, reason = FAULTS[kind]
    backend.answers.update({b"john": answer, b"mary": FULL})
    accepting = milter(backend, "--timeout", "1")
    deferring = milter(backend, "--timeout", "1", "--on-error", "tempfail")
    for running, reply in (accepting, ""), (deferring, "451 4.3.0"):
        begin = time.monotonic()
        got = running.rcpt("<john@example.com>")
        assert time.monotonic() - begin < 1 + SLACK
        assert got.startswith(reply) and bool(got) == bool(reply), got
        assert running.rcpt("<mary@example.com>").startswith("452 4.2.2")
        line = running.log("recipient=john@example.com")
        assert "verdict=fault" in line and "cached=no" in line and reason in line
        assert "state=down" not in running.process.output()
    assert backend.users() == ["john", "mary"] * 2


def test_a_line_about_another_mailbox_counts_for_the_one_that_was_asked_about(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers.update({b"john": b"OVERQUOTA mary 101 100\n", b"mary": b"OK john 1 100\n"})
    running = milter(backend)
    for _ in range(2):
        assert running.rcpt("<john@example.com>").startswith("452 4.2.2 Quota exceeded for john@")
        assert running.rcpt("<mary@example.com>") == ""
    assert backend.users() == ["john", "mary"]


def test_a_backend_that_dies_is_left_alone_and_asked_again_when_it_is_back(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers[b"john"] = FULL
    running = milter(backend, *UNCACHED, "--retry-after", "1", "--timeout", "1")
    assert running.rcpt("<john@example.com>").startswith("452")
    backend.close()
    begin = time.monotonic()
    assert running.rcpt("<mary@example.com>") == ""
    assert 'reason="no connection: [Errno 111] Connection refused"' in running.log("state=down")
    with running.session() as session:
        session.mail()
        for number in range(200):  # nobody waits for a backend that is left alone
            assert session.rcpt(f"<user{number}@example.com>") == ""
    assert running.rcpt("<john@example.com>").startswith("452"), "the last known answer"
    assert time.monotonic() - begin < 1 + SLACK
    time.sleep(1.1)
    assert running.rcpt("<john@example.com>").startswith("452"), "the last known answer, again"
    again = Backend(backend.port)
    again.answers[b"john"] = FULL
    wait_for(lambda: running.rcpt("<paul@example.com>") == "" and again.asked, "a new question")
    assert running.rcpt("<john@example.com>").startswith("452")
    assert again.users()[-1] == "john" and "state=up" in running.log("state=up")
    again.close()
    log = running.process.output()
    assert log.count("state=down") == 1 and log.count("state=up") == 1


def test_a_backend_without_a_host_or_a_name_is_left_alone(
    milter: Callable[..., RunningMilter],
) -> None:
    for url in f"http://127.0.0.1:{free_port()}/", "http://nowhere.invalid/":
        running = milter(None, "--backend", url, "--on-error", "tempfail", "--timeout", "1")
        begin = time.monotonic()
        assert running.rcpt("<john@example.com>").startswith("451 4.3.0")
        assert time.monotonic() - begin < 1 + SLACK
        assert f"backend={url} " in running.log("state=down")
        assert running.rcpt("<mary@example.com>").startswith("451 4.3.0")
        assert "left alone" in running.log("recipient=mary")


@pytest.fixture
def certificate(tmp_path: pathlib.Path) -> pathlib.Path:
    """Give a file with a key and a certificate for 127.0.0.1 that nobody has signed."""
    openssl = need("openssl", "openssl")
    file = tmp_path / "tls.pem"
    names = "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1".split()
    options = f"req -x509 -newkey rsa:2048 -nodes -days 1 -keyout {file} -out {file}.crt".split()
    subprocess.run([openssl, *options, *names], check=True, capture_output=True)
    file.write_text(file.read_text() + pathlib.Path(f"{file}.crt").read_text())
    return file


def test_tls_is_checked_and_where_it_fails_nothing_is_asked(
    certificate: pathlib.Path, backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    encrypted = Backend(context=context)
    encrypted.answers[b"john"] = FULL
    trusting = milter(encrypted, "--cafile", certificate)
    assert trusting.rcpt("<john@example.com>").startswith("452")
    assert trusting.rcpt("<mary@example.com>") == ""
    wary = milter(encrypted, "--on-error", "tempfail")
    assert wary.rcpt("<john@example.com>").startswith("451")
    assert "certificate verify failed" in wary.log("state=down")
    plain = backend.url.replace("http:", "https:")
    mistaken = milter(None, "--backend", plain, "--on-error", "tempfail", "--timeout", "1")
    assert mistaken.rcpt("<john@example.com>").startswith("451")
    assert mistaken.log("state=down")
    assert encrypted.users() == ["john", "mary"] and backend.asked == []
    encrypted.close()


def test_a_tls_handshake_that_hangs_takes_no_longer_than_the_timeout(
    milter: Callable[..., RunningMilter],
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:  # connects, says nothing
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        running = milter(None, "--backend", url, "--timeout", "1", "--on-error", "tempfail")
        begin = time.monotonic()
        assert running.rcpt("<john@example.com>").startswith("451")
        assert time.monotonic() - begin < 1 + SLACK
        assert running.log("state=down")


def test_the_last_known_answer_counts_while_there_are_faults_and_no_other(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers[b"john"] = FULL
    running = milter(backend, *UNCACHED, "--timeout", "1")
    assert running.rcpt("<john@example.com>").startswith("452")
    for answer in b"HTTP/1.0 500 Oops\r\n\r\n", reset, lambda connection: None:
        backend.answers[b"john"] = answer
        assert running.rcpt("<john@example.com>").startswith("452")
        assert "verdict=overquota used=101 quota=100 cached=yes" in running.log("reason=")
    assert running.rcpt("<mary@example.com>") == ""
    backend.answers[b"john"] = b"OK %s 10 100\n"
    assert running.rcpt("<john@example.com>") == ""
    backend.answers[b"john"] = b"HTTP/1.0 500 Oops\r\n\r\n"
    assert running.rcpt("<john@example.com>") == "", "the newest answer is the last known one"
    backend.answers[b"john"] = FULL
    assert running.rcpt("<john@example.com>").startswith("452")
    backend.answers[b"john"] = hang
    assert running.rcpt("<john@example.com>").startswith("452")
    assert "cached=yes" in running.log("no answer within 1 s")


def test_answers_are_kept_for_their_time_and_not_beyond_their_number(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(MILTER)
    now = 1e6
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(module, "CACHE_SIZE", 3)
    arguments = ["--backend", backend.url, "--cache-ttl", "60"]
    options = module.option_parser().parse_args(arguments)
    asking = module.map_backends(options)[None]
    for user, seconds, cached in [
        *(("a", 0, False), ("a", 59, True), ("a", 2, False), ("a", 59, True)),
        *(("b", 0, False), ("c", 0, False), ("a", 0, True)),
        *(("d", 0, False), ("b", 0, True), ("a", 0, False)),  # a was the oldest of four
    ]:
        now += seconds
        heard = asking.ask(user, "x.org")
        assert (heard.answer.status, heard.cached) == ("OK", cached), (user, now)
        assert len(asking.answers) <= 3
    backend.default = b"HTTP/1.0 500 Oops\r\n\r\n"
    now += 3599
    assert asking.ask("a", "x.org").answer.status == "OK"
    now += 2
    heard = asking.ask("a", "x.org")
    assert heard.answer is None and "status 500" in heard.fault


def test_a_question_that_drips_on_gives_its_place_back_in_the_end(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(MILTER)
    monkeypatch.setattr(module, "LATE_ANSWER", 1)
    arguments = ["--backend", backend.url, "--timeout", "1", "--max-queries", "1"]
    asking = module.map_backends(module.option_parser().parse_args(arguments))[None]
    backend.answers[b"john"] = drip
    assert asking.ask("john", "x.org").fault == "no answer within 1 s"
    assert asking.ask("mary", "x.org").answer is None, "the only place is taken"
    wait_for(lambda: asking.tidy() or not asking.questions, "the end of the question")
    assert asking.ask("mary", "x.org").answer.status == "OK"
    assert not asking.down


# ---- load ----


def at_once(
    running: RunningMilter, recipients: list[str], pause: float = 0
) -> list[tuple[str, float]]:
    """Give recipients in a session each, all at once; return replies and seconds, in order."""
    results: list[tuple[str, float]] = [("never", 0)] * len(recipients)

    def give(number: int, recipient: str) -> None:
        with running.session() as session:
            session.mail()
            begin = time.monotonic()
            reply = session.rcpt(recipient)
            results[number] = reply, time.monotonic() - begin

    threads = [threading.Thread(target=give, args=pair) for pair in enumerate(recipients)]
    for thread in threads:
        thread.start()
        time.sleep(pause)
    for thread in threads:
        thread.join(60)
    return results


def test_one_question_serves_all_sessions_that_ask_about_a_mailbox(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    gate = Gate(FULL)
    backend.answers[b"john"] = gate
    running = milter(backend, "--timeout", "20")
    threading.Timer(1.5, gate.opened.set).start()
    results = at_once(running, ["<john@example.com>"] * 60)
    assert all(reply.startswith("452") for reply, _ in results)
    assert backend.users() == ["john"]


def test_a_backend_gets_no_more_questions_at_a_time_than_it_has_places(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    def slow(connection: socket.socket) -> bytes:
        time.sleep(0.05)
        return FULL

    backend.default = slow
    running = milter(backend, "--max-queries", "3", "--timeout", "20")
    results = at_once(running, [f"<user{number}@example.com>" for number in range(40)])
    assert all(reply.startswith("452") for reply, _ in results)
    assert backend.most == 3 and len(backend.asked) == 40


def test_the_timeout_covers_the_wait_for_a_place(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = hang
    running = milter(backend, "--max-queries", "2", "--timeout", "1", "--on-error", "tempfail")
    begin = time.monotonic()
    results = at_once(running, [f"<user{number}@example.com>" for number in range(30)])
    assert time.monotonic() - begin < 1 + SLACK
    assert all(reply.startswith("451") and took < 1 + SLACK for reply, took in results)
    assert len(backend.asked) == 2 == backend.most


def test_a_backend_that_answers_is_not_left_alone_for_want_of_places(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    def slow(connection: socket.socket) -> bytes:
        time.sleep(0.2)
        return FULL

    backend.default = slow
    running = milter(backend, "--max-queries", "2", "--timeout", "1")
    replies = at_once(running, [f"<user{number}@example.com>" for number in range(40)])
    assert {reply[:3] for reply, _ in replies} == {"452", ""}
    assert running.rcpt("<afterwards@example.com>").startswith("452")
    assert "state=down" not in running.process.output()


def test_a_backend_that_is_silent_three_times_in_a_row_is_left_alone(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers.update(dict.fromkeys([b"a", b"b", b"d", b"e", b"f"], hang))
    running = milter(backend, "--timeout", "0.5", "--retry-after", "2", "--on-error", "tempfail")
    for user in "a", "b", "c", "d", "e":
        reply = running.rcpt(f"<{user}@example.com>")
        assert reply.startswith("451") == (user != "c"), user
    assert "state=down" not in running.process.output(), "there was an answer between"
    assert running.rcpt("<f@example.com>").startswith("451")
    assert running.log("state=down")
    asked, begin = len(backend.asked), time.monotonic()
    assert running.rcpt("<g@example.com>").startswith("451")
    assert "left alone" in running.log("recipient=g@") and len(backend.asked) == asked
    wait_for(lambda: running.rcpt("<g@example.com>") == "", "an answer")
    assert time.monotonic() - begin > 1 and running.log("state=up")


def test_while_a_backend_is_tried_again_only_one_question_is_asked(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.close()
    running = milter(backend, "--timeout", "1", "--retry-after", "1.5")
    assert running.rcpt("<john@example.com>") == ""
    assert running.log("state=down")
    again = Backend(backend.port)
    again.default = hang
    time.sleep(1.6)
    results = at_once(running, [f"<user{number}@example.com>" for number in range(30)])
    assert [reply for reply, _ in results] == [""] * 30
    assert len(again.asked) == 1
    assert sum(took > 0.9 for _, took in results) == 1, "the others need not wait"
    assert running.process.output().count("state=down") == 1
    again.close()


def test_a_mailbox_that_takes_long_is_asked_about_once_and_its_late_answer_is_used(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    gate = Gate(FULL)
    backend.answers[b"slow"] = gate
    running = milter(backend, "--timeout", "0.5", "--on-error", "tempfail")
    for number in range(10):
        assert running.rcpt("<slow@example.com>").startswith("451")
        assert running.rcpt(f"<user{number}@example.com>") == ""
    for _ in range(5):  # in a row, and no answer between
        assert running.rcpt("<slow@example.com>").startswith("451")
    assert backend.users().count("slow") == 1
    assert "state=down" not in running.process.output()
    gate.opened.set()
    wait_for(lambda: running.rcpt("<slow@example.com>").startswith("452"), "the late answer")
    assert backend.users().count("slow") == 1


def test_backends_do_not_hinder_each_other(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    silent, refusing = Backend(), f"refused.org=http://127.0.0.1:{free_port()}/"
    silent.default = hang
    backend.default = FULL
    others = "--backend", f"silent.org={silent.url}", "--backend", refusing
    running = milter(backend, *others, "--max-queries", "2", "--timeout", "2", *UNCACHED)
    domains = ["silent.org"] * 20 + ["refused.org"] * 5 + ["example.com"] * 10
    recipients = [f"<user{number}@{domain}>" for number, domain in enumerate(domains)]
    begin = time.monotonic()
    results = at_once(running, recipients, pause=0.005)
    assert time.monotonic() - begin < 2 + 0.2 + SLACK
    assert [reply[:3] for reply, _ in results] == [""] * 25 + ["452"] * 10
    assert max(took for _, took in results[20:]) < min(took for _, took in results[:2])
    assert len(silent.asked) == 2 and len(backend.asked) == 10
    silent.close()


def low_limit() -> None:
    """Lower the soft limit of descriptors, in a process that is about to start."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))


def test_five_hundred_sessions_stay_open_from_a_soft_limit_of_256(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers[b"john"] = FULL
    running = milter(backend, preexec_fn=low_limit)
    limits = pathlib.Path(f"/proc/{running.process.popen.pid}/limits").read_text()
    soft, hard = re.findall(r"Max open files +(\d+) +(\d+)", limits)[0]
    assert soft == hard
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(running.session()) for _ in range(500)]
        for _ in range(2):
            for number, session in enumerate(sessions):
                session.mail()
                assert session.rcpt(f"<user{number % 50}@example.com>") == ""
            assert sessions[-1].rcpt("<john@example.com>").startswith("452")
        status = pathlib.Path(f"/proc/{running.process.popen.pid}/status").read_text()
        assert int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) < 80 * 1024
    assert running.process.stop() == 0


def test_garbage_on_the_milter_port_ends_that_session_alone(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers[b"john"] = FULL
    running = milter(backend)
    noise = random.Random(8)
    garbage = [
        b"GET / HTTP/1.0\r\n\r\n",
        b"EHLO x\r\nMAIL FROM:<>\r\n",
        b"\xff" * 100,
        b"\0" * 100,
        struct.pack(">I", 1) + b"R",
        struct.pack(">I", 5) + b"Rjohn",
        struct.pack(">I", 2**31) + b"R",
        *(noise.randbytes(200) for _ in range(50)),
    ]
    with running.session() as steady:
        steady.mail()
        for data in garbage:
            with socket.create_connection(("127.0.0.1", running.port)) as rude:
                rude.sendall(data)
            assert steady.rcpt("<john@example.com>").startswith("452")
        for data in garbage[4:6]:
            with running.session() as odd:  # garbage after a proper beginning
                odd.socket.sendall(data * 3)
        assert steady.rcpt("<mary@example.com>") == ""
    assert running.rcpt("<john@example.com>").startswith("452")
    assert "Traceback" not in running.process.output() and running.process.stop() == 0


def unsteady(line: bytes, noise: random.Random) -> Answering:
    """Return an answer that is this line, and each tenth time a fault."""
    faults = [b"HTTP/1.0 500 Oops\r\n\r\n", b"nonsense\n", reset, lambda connection: None]

    def answer(connection: socket.socket) -> Optional[bytes]:
        what: Any = noise.choice(faults) if noise.random() < 0.1 else line
        found: Optional[bytes] = what(connection) if callable(what) else what
        return found

    return answer


def test_every_verdict_is_right_while_a_backend_fails_at_random(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    """The short form of `.ci/bench soak`."""
    for number in range(300):
        kind, line = ("full", FULL) if number % 3 == 0 else ("user", b"OK %s 1 100\n")
        backend.answers[f"{kind}{number}".encode()] = unsteady(line, random.Random(number))
    running = milter(backend, "--cache-ttl", "0.3", "--on-error", "tempfail")
    users = [user.decode() for user in backend.answers]
    wrong: list[str] = []

    def give(session: MilterSession, order: random.Random) -> None:
        with session:
            session.mail()
            for _ in range(150):
                user = order.choice(users)
                reply = session.rcpt(f"<{user}@example.com>")
                if reply[:3] not in ("451", "452" if user.startswith("full") else ""):
                    wrong.append(f"{user}: {reply}")

    threads = [
        threading.Thread(target=give, args=(running.session(), random.Random(seed)))
        for seed in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [] and running.process.stop() == 0
    assert "counters recipients=3000 " in running.process.output()


# ---- the process ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_term_and_int_end_it_in_order_with_sessions_open_and_questions_under_way(
    number: int, backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = hang
    running = milter(backend, "--timeout", "30")
    with running.session() as waiting, running.session() as idle:
        idle.mail()
        waiting.mail()
        waiting.send(b"R", b"<john@example.com>\0")
        wait_for(lambda: backend.asked, "the question")
        begin = time.monotonic()
        assert running.process.stop(number) == 0
        assert time.monotonic() - begin < 6 + SLACK  # what libmilter may take, and more
    log = running.process.output()
    assert "counters recipients=" in log and "state=stopped" in log and "Traceback" not in log
    assert not answers_at(running.port)


def test_hup_forgets_the_cache_and_keeps_the_sessions(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    running = milter(backend)
    with running.session() as session:
        session.mail()
        assert session.rcpt("<john@example.com>") == ""
        backend.answers[b"john"] = FULL
        assert session.rcpt("<john@example.com>") == "", "from the cache"
        running.process.popen.send_signal(signal.SIGHUP)
        wait_for(lambda: session.rcpt("<john@example.com>").startswith("452"), "the new answer")
        assert backend.users() == ["john"] * 2
        backend.answers[b"john"] = b"HTTP/1.0 500 Oops\r\n\r\n"
        running.process.popen.send_signal(signal.SIGHUP)
        wait_for(lambda: session.rcpt("<john@example.com>") == "", "the last known to be forgotten")
    assert running.process.popen.poll() is None and running.process.stop() == 0


def test_usr1_logs_the_counters_and_so_does_the_end(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers.update({b"john": FULL, b"ill": b"HTTP/1.0 500 Oops\r\n\r\n"})
    backend.answers[b"gone"] = b"UNKNOWN %s\n"
    running = milter(backend)
    users = ["john", "john", "mary", "gone", "ill", "postmaster", ""]
    for user in users:
        running.rcpt(f"<{user}@example.com>" if user else "<>")
    running.process.popen.send_signal(signal.SIGUSR1)
    line = running.log("counters")
    found = dict(re.findall(r"(\w+)=(\d+)", line))
    expected = "recipients=7 refused=2 cached=1 lastknown=0 overquota=2 ok=1 unknown=1 fault=1"
    for name, count in re.findall(r"(\w+)=(\d+)", expected + " exempt=1 empty=1 toolarge=0"):
        assert found.get(name) == count, (name, line)
    assert running.rcpt("<john@example.com>").startswith("452")
    assert running.process.stop() == 0
    assert running.process.output().count("counters recipients=8 ") == 1


def test_signals_in_quick_succession_do_not_end_it(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    running = milter(backend)
    for _ in range(20):
        running.process.popen.send_signal(signal.SIGUSR1)
        time.sleep(0.01)
        running.process.popen.send_signal(signal.SIGHUP)
        time.sleep(0.01)
    assert running.rcpt("<john@example.com>") == ""
    assert running.log("counters") and running.process.popen.poll() is None
    assert running.process.stop() == 0


def listening(path: pathlib.Path) -> bool:
    """Say whether somebody listens at a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def test_a_stale_unix_socket_is_replaced_and_removed_at_the_end(
    backend: Backend, start: Callable[..., Process], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "milter.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    backend.answers[b"john"] = FULL
    for _ in range(2):  # the second time nothing is there
        process = start(PYTHON, MILTER, "--listen", f"unix:{path}", "--backend", backend.url)
        process.wait_ready(lambda: listening(path), "the milter")
        with MilterSession(path) as session:
            session.mail()
            assert session.rcpt("<john@example.com>").startswith("452")
        assert process.stop() == 0
        assert not path.exists()


def test_a_socket_that_is_in_use_or_none_is_left_as_it_is(
    backend: Backend, start: Callable[..., Process], tmp_path: pathlib.Path
) -> None:
    path, file, folder = tmp_path / "live.sock", tmp_path / "file", tmp_path / "folder"
    first = start(PYTHON, MILTER, "--listen", f"unix:{path}", "--backend", backend.url)
    first.wait_ready(lambda: listening(path), "the milter")
    file.write_text("precious")
    folder.mkdir()
    for name in path, file, folder, tmp_path / "nowhere/x.sock":
        status, output, errors = run_milter("--listen", f"unix:{name}")
        assert status != 0 and output == "", name
        assert len(errors.splitlines()) == 1 and "--listen" in errors and str(name) in errors
    assert file.read_text() == "precious" and folder.is_dir()
    with MilterSession(path) as session:
        session.mail()
        assert session.rcpt("<john@example.com>") == ""
    assert first.stop() == 0


def test_a_second_instance_on_a_busy_port_ends_with_one_line(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    running = milter(backend)
    status, _, errors = run_milter("--listen", f"inet:{running.port}@127.0.0.1")
    assert status != 0 and len(errors.splitlines()) == 1
    assert f"inet:{running.port}@127.0.0.1" in errors and "in use" in errors
    assert running.rcpt("<john@example.com>") == "" and running.process.stop() == 0


def test_a_full_disk_under_the_log_changes_no_answer(backend: Backend, spool: pathlib.Path) -> None:
    backend.answers[b"john"] = FULL
    port = free_port()
    listen = ["--listen", f"inet:{port}@127.0.0.1", "--backend", backend.url, "--verbose"]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([PYTHON, str(MILTER), *listen], stdout=full, stderr=full)
        try:
            wait_for(lambda: answers_at(port), "the milter")
            with MilterSession(port) as session:
                session.mail()
                assert session.rcpt("<john@example.com>").startswith("452")
                assert session.rcpt("<mary@example.com>") == ""
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()
        environment = {"GATEWAY_INTERFACE": "1", "QUERY_STRING": "u=folder"}
        environment["QUOTA_MAILBOX"] = f"{spool}/%n"
        done = subprocess.run([MBOX_CGI], env=environment, stdout=subprocess.PIPE, stderr=full)
    assert done.stdout.endswith(b"\n\nERROR the mailbox is not a file\n")


def test_a_log_that_nobody_reads_holds_up_neither_mail_nor_the_end(
    backend: Backend, start: Callable[..., Process]
) -> None:
    reader, writer = os.pipe()
    port = free_port()
    listen = "--listen", f"inet:{port}@127.0.0.1"
    command = [PYTHON, str(MILTER), *listen, "--backend", backend.url, "--verbose"]
    milter = subprocess.Popen(command, stderr=writer)
    try:
        wait_for(lambda: answers_at(port), "the milter")
        with MilterSession(port) as session:
            session.mail()
            for number in range(2000):  # far more than a pipe holds
                assert session.rcpt(f"<user{number % 10}@example.com>") == ""
        milter.terminate()
        assert milter.wait(20) == 0
    finally:
        milter.kill()
        milter.wait()
        os.close(reader)
        os.close(writer)


def test_a_kept_connection_that_the_server_closed_is_no_fault(
    start: Callable[..., Process], milter: Callable[..., RunningMilter], spool: pathlib.Path
) -> None:
    port = free_port()
    environment = {**os.environ, "QUOTA_MAILBOX": str(spool / "%n"), "QUOTA_LIMIT": "100"}
    url = "--backend", f"http://127.0.0.1:{port}/"
    running = milter(None, *url, *UNCACHED, "--on-error", "tempfail")
    for _ in range(3):
        server = start(MBOX_CGI, "--serve", str(port), port=port, env=environment)
        for _ in range(3):
            assert running.rcpt("<mary@example.com>").startswith("452")
            assert running.rcpt("<nobody@example.com>") == ""
        server.stop(signal.SIGKILL)
    assert "verdict=fault" not in running.process.output()


def serve_kept(
    listener: socket.socket, header: bytes, surplus: bytes, questions: list[int]
) -> None:
    """Answer on connections that stay open, in turn; note how many questions each brought."""
    for _ in range(10):
        with contextlib.suppress(ConnectionError), listener.accept()[0] as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            questions.append(0)
            while True:
                request = connection.recv(65536)
                if not request:
                    break
                questions[-1] += 1
                user = request.partition(b"u=")[2].partition(b"&")[0]
                line = (b"OVERQUOTA %s 2 1\n" if user == b"full" else b"OK %s 1 2\n") % user
                length = b"Content-Length: %d\r\n" % len(line)
                head = b"HTTP/1.1 200 OK\r\n" + length + header + b"\r\n"
                connection.sendall(head + line + surplus)


@pytest.mark.parametrize(
    ("header", "surplus", "questions_each"),
    [
        (b"Keep-Alive: timeout=10\r\n", b"", [10]),
        (b"", b"", [1] * 10),  # such a server may have no ear for others meanwhile
        (
            b"Keep-Alive: timeout=10\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\nOVERQUOTA x 2 1\n",
            None,
        ),
    ],
)
def test_a_connection_is_kept_where_the_server_says_so_and_nothing_is_left_in_it(
    header: bytes,
    surplus: bytes,
    questions_each: Optional[list[int]],
    milter: Callable[..., RunningMilter],
) -> None:
    questions: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        arguments = listener, header, surplus, questions
        threading.Thread(target=serve_kept, args=arguments, daemon=True).start()
        url = "--backend", f"http://127.0.0.1:{listener.getsockname()[1]}/"
        running = milter(None, *url, *UNCACHED, "--max-queries", "1", "--on-error", "tempfail")
        for _ in range(5):
            assert running.rcpt("<full@example.com>").startswith("452")
            assert running.rcpt("<user@example.com>") == ""
        assert questions_each in (None, questions)
        running.process.stop()


# ---- real mail and web servers ----

README = HERE / "README.md"
ROOM = 200 << 20  # bytes: the limit in README's blocks
FRONTEND = "192.0.2.25"  # in README's blocks the only one that may ask


def readme_block(name: str, replacements: Optional[Mapping[str, Path]] = None) -> str:
    """Return the block of README whose first line ends with `name`, with ports and folders put in.

    Each text to be replaced must stand in it.
    """
    blocks = re.findall(r"^```\w+\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    found = [block for block in blocks if block.partition("\n")[0].endswith(" " + name)]
    assert len(found) == 1, f"{len(found)} blocks of README.md begin with {name}"
    block = str(found[0])
    for old, new in (replacements or {}).items():
        assert old in block, f"{old} is not in the block {name} of README.md"
        block = block.replace(old, str(new))
    return block


def run_block(name: str, replacements: Mapping[str, Path], **options: Any) -> str:
    """Run the commands of a block as a shell does and return what they print."""
    block = readme_block(name, replacements)
    done = subprocess.run(
        ["sh", "-euc", block], capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == 0, (block, done)
    return str(done.stdout)


@contextlib.contextmanager
def open_folder() -> Iterator[pathlib.Path]:
    """Give a folder in which every user may search, which pytest's own may not be."""
    name = tempfile.mkdtemp(prefix="quota-")
    os.chmod(name, 0o755)
    try:
        yield pathlib.Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    """Give such a folder to a test."""
    with open_folder() as path:
        yield path


class Site:
    """A backend of README: a folder of mbox files, the script beside it, one port."""

    def __init__(self, folder: pathlib.Path, start: Callable[..., Process]) -> None:
        self.folder, self.start = folder, start
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/cgi-bin/quota.cgi"
        self.frontend = "127.0.0.1"  # who may ask
        self.syslog: Process
        self.spool = folder / "mail"
        self.spool.mkdir(mode=0o711)  # for others: to search, not to list
        (folder / "cgi-bin").mkdir()
        self.script = folder / "cgi-bin" / "quota.cgi"
        run_block(
            "Backend: copy",
            {" quota.cgi": f" {MBOX_CGI}", "/usr/lib/cgi-bin/quota.cgi": self.script},
        )
        text = self.script.read_text().replace("/var/mail/%n", f"{self.spool}/%n")
        self.script.write_text(text)
        self.fill("john", ROOM + 1)
        self.fill("mary", ROOM - 1000)

    def fill(self, user: str, size: int) -> None:
        """Let a mailbox have this size; the file is a sparse one."""
        (self.spool / user).touch(mode=0o600)
        os.truncate(self.spool / user, size)

    def block(self, name: str, **replacements: Path) -> str:
        """Return a block of README with this site's script and frontend."""
        table: dict[str, Path] = {"/usr/lib/cgi-bin/quota.cgi": self.script}
        if FRONTEND in readme_block(name):
            table[FRONTEND] = self.frontend
        return readme_block(name, {**table, **replacements})

    def ask(self, query: str, *options: str) -> str:
        """Ask with curl; return the status and the line."""
        curl = [need("curl", "curl"), "-s", "-m", "10", "-w", r"\n%{http_code}", *options]
        done = subprocess.run([*curl, f"{self.url}?{query}"], capture_output=True)
        body, _, status = done.stdout.decode("utf-8", "surrogateescape").rpartition("\n")
        return f"{status} {body.rstrip()}"


APACHE = """
ServerRoot "{folder}"
ServerName mail1.example.com
Listen 127.0.0.1:{port}
PidFile {folder}/apache.pid
ErrorLog {folder}/error.log
DefaultRuntimeDir {folder}
User www-data
Group www-data
"""
APACHE_MODULES = "mpm_event authn_core authz_core authz_host authz_user alias env"


def start_apache(site: Site, block: str, modules: str, *lines: str) -> None:
    """Start Apache with a block of README."""
    program = need("apache2", "apache2")
    conf = [APACHE.format(folder=site.folder, port=site.port), *lines]
    for module in (modules + " " + APACHE_MODULES).split():
        file = f"/usr/lib/apache2/modules/mod_{module}.so"
        need(file, "libapache2-mod-wsgi-py3" if module == "wsgi" else "apache2")
        conf.insert(1, f"LoadModule {module}_module {file}")
    path = site.folder / "apache2.conf"
    path.write_text("\n".join([*conf, block]))
    site.start(program, "-DFOREGROUND", "-f", path, port=site.port)


# What Debian's own configuration says, as serve-cgi-bin.conf and 10-cgi.conf.
APACHE_CGI_BIN = """
ScriptAlias /cgi-bin/ {folder}/cgi-bin/
<Directory "{folder}/cgi-bin">
    AllowOverride None
    Options +ExecCGI -MultiViews +SymLinksIfOwnerMatch
    Require all granted
</Directory>
"""
LIGHTTPD_CGI_BIN = """
server.modules += ( "mod_cgi" )
$HTTP["url"] =~ "^/cgi-bin/" {{
    cgi.assign = ( "" => "" )
    alias.url += ( "/cgi-bin/" => "{folder}/cgi-bin/" )
}}
"""


def apache(site: Site) -> None:
    """Start Apache with mod_cgid, which runs all of cgi-bin, as with Debian's configuration."""
    block = site.block("/etc/apache2/conf-available/quota.conf")
    block += APACHE_CGI_BIN.format(folder=site.folder)
    start_apache(site, block, "cgid", f"ScriptSock {site.folder}/cgid.sock")


def apache_wsgi(site: Site) -> None:
    """Start Apache with mod_wsgi."""
    block = site.block("/etc/apache2/conf-available/quota-wsgi.conf")
    start_apache(site, block, "wsgi", f"WSGISocketPrefix {site.folder}/wsgi")


def lighttpd(site: Site) -> None:
    """Start lighttpd with mod_cgi, which runs all of cgi-bin, as with Debian's configuration."""
    program = need("lighttpd", "lighttpd")
    path = site.folder / "lighttpd.conf"
    path.write_text(
        'server.modules = ( "mod_indexfile", "mod_access", "mod_alias", "mod_redirect" )\n'
        f'server.document-root = "{site.folder}"\n'
        'server.username = "www-data"\nserver.groupname = "www-data"\n'
        f'server.bind = "127.0.0.1"\nserver.port = {site.port}\n'
        + LIGHTTPD_CGI_BIN.format(folder=site.folder)
        + site.block("/etc/lighttpd/conf-available/50-quota.conf")
    )
    site.start(program, "-D", "-f", path, port=site.port)


NGINX = """
daemon off;
user www-data;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    fastcgi_temp_path {folder}/fastcgi;
    proxy_temp_path {folder}/proxy;
    scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    {block}
}}
"""


def nginx(site: Site) -> None:
    """Start nginx, and fcgiwrap behind it."""
    program, wrapper = need("nginx", "nginx-light"), need("fcgiwrap", "fcgiwrap")
    run = site.folder / "run"
    run.mkdir()
    shutil.chown(run, "www-data", "www-data")
    wrapped = site.start(*as_user("www-data"), wrapper, "-fc8", "-s", f"unix:{run}/fcgiwrap.socket")
    wrapped.wait_ready((run / "fcgiwrap.socket").exists, "fcgiwrap")
    replacements = {"8025": f"127.0.0.1:{site.port}", "/run/fcgiwrap": f"{run}/fcgiwrap"}
    block = site.block("/etc/nginx/sites-available/quota", **replacements)
    path = site.folder / "nginx.conf"
    path.write_text(NGINX.format(folder=site.folder, block=block))
    site.start(program, "-c", path, "-p", site.folder, "-e", "stderr", port=site.port)


def uwsgi(site: Site) -> None:
    """Start uWSGI."""
    program = need("uwsgi", "uwsgi-core")
    need("/usr/lib/uwsgi/plugins/python3_plugin.so", "uwsgi-plugin-python3")
    own = {"192.0.2.10:8025": f"127.0.0.1:{site.port}"}
    path = site.folder / "quota.ini"
    path.write_text(site.block("/etc/uwsgi/apps-available/quota.ini", **own))
    site.start(program, "--ini", path, port=site.port)


def gunicorn(site: Site) -> None:
    """Start gunicorn on a copy of the script that is called quota.py."""
    need("gunicorn", "gunicorn")
    own: dict[str, Path] = {
        " quota.cgi": f" {site.script}",
        "/usr/local/lib": site.folder,
        "192.0.2.10:8025": f"127.0.0.1:{site.port}",
    }
    block = readme_block("gunicorn loads only what is called .py", own)
    site.start("sh", "-euc", block, port=site.port)


def no_web_server(site: Site) -> None:
    """Start the script with --serve, as an ordinary user."""
    need("setpriv", "util-linux")
    own = {"192.0.2.10:8025": f"127.0.0.1:{site.port}"}
    block = site.block("Backend: without a web server", **own)
    site.start("sh", "-euc", block, port=site.port)


def as_user(user: Union[str, int], group: Union[None, str, int] = None) -> list[str]:
    """Return the command that runs another one as this user."""
    regid = user if group is None else group
    return [need("setpriv", "util-linux"), f"--reuid={user}", f"--regid={regid}", "--clear-groups"]


RULED = [apache, apache_wsgi, lighttpd, nginx]  # these look who asks
SERVERS = [*RULED, uwsgi, gunicorn, no_web_server]


@pytest.fixture
def site(folder: pathlib.Path, start: Callable[..., Process]) -> Site:
    """Give a backend whose web server a test chooses."""
    need_root()
    return Site(folder, start)


@pytest.mark.parametrize("server", SERVERS)
def test_the_script_answers_alike_under_every_web_server(
    site: Site, server: Callable[[Site], None]
) -> None:
    site.fill("a b%c", 7)
    server(site)
    for query, answer in (
        ("u=john&d=example.com", f"200 OVERQUOTA john {ROOM + 1} {ROOM}"),
        ("u=mary", f"200 OK mary {ROOM - 1000} {ROOM}"),
        ("d=example.com&u=a+b%25c", f"200 OK a b%c 7 {ROOM}"),
        ("u=..%2Fjohn", "400 ERROR no mailbox has such a user"),
        ("", "400 ERROR no user (u=) given"),
        ("--serve", "400 ERROR no user (u=) given"),
        ("mary", "400 ERROR no user (u=) given"),
        ("--serve+9", "400 ERROR no user (u=) given"),
    ):
        assert site.ask(query) == answer, query
    (site.spool / os.fsdecode(b"\xff")).write_bytes(b"x")
    assert site.ask("u=a%0Ab").startswith("400 ")
    by_itself = server is lighttpd  # it refuses such a name before the script sees it: see README
    found = "400 <" if by_itself else f"200 OK \udcff 1 {ROOM}"
    assert site.ask("u=%FF").startswith(found)
    assert site.ask("u=john", "--data", "") == "405 ERROR only GET and HEAD are answered"
    assert "200" in site.ask("u=john", "--head").split()
    os.unlink(site.spool / "mary")
    (site.spool / "mary").mkdir()
    assert site.ask("u=mary") == "500 ERROR the mailbox is not a file"


@pytest.mark.parametrize("server", SERVERS)
def test_the_milter_gets_its_answers_from_every_web_server(
    site: Site, server: Callable[[Site], None], milter: Callable[..., RunningMilter]
) -> None:
    server(site)
    running = milter(None, "--backend", site.url)
    assert running.rcpt("<john@example.com>") == quota_exceeded("john@example.com")
    assert running.rcpt("<mary@example.com>", "SIZE=1000") == ""
    assert running.rcpt("<mary@example.com>", "SIZE=1001") == quota_exceeded("mary@example.com")


@pytest.mark.parametrize("server", RULED)
def test_who_is_not_the_frontend_gets_no_answer_and_the_mail_is_accepted(
    site: Site, server: Callable[[Site], None], milter: Callable[..., RunningMilter]
) -> None:
    site.frontend = FRONTEND
    server(site)
    running = milter(None, "--backend", site.url)
    assert running.rcpt("<john@example.com>") == ""
    assert "status 403" in running.log("verdict=fault")


@pytest.mark.parametrize("server", RULED)
def test_no_way_to_write_the_url_gets_around_the_rule(
    site: Site, server: Callable[[Site], None]
) -> None:
    site.frontend = FRONTEND
    server(site)
    top = site.url.partition("/cgi-bin")[0]
    for path in (
        "//cgi-bin/quota.cgi",
        "/cgi-bin//quota.cgi",
        "/cgi-bin/./quota.cgi",
        "/cgi-bin/x/../quota.cgi",
        "/cgi-bin/quota.cgi/",
        "/cgi-bin/quota.cgi/x",
        "/cgi-bin/quota.cgi%2Fx",
        "/cgi-bin/quota%2Ecgi",
        "/cgi-bin/%71uota.cgi",
        "/cgi-bin/quota.cgi%00",
    ):
        site.url = top + path
        assert site.ask("u=john", "--path-as-is")[:3] in ("400", "403", "404"), path


def quota_exceeded(address: str) -> str:
    """Return the reply for a full mailbox."""
    return f"452 4.2.2 Quota exceeded for {address}, try again later"


# ---- an outsider's backend and client ----

OUTSIDERS = {
    "shell": """#!/bin/sh
user=${QUERY_STRING#*u=}
user=${user%%&*}
size=$(stat -c %s "SPOOL/$user" 2> /dev/null)
status=OK
[ "${size:-0}" -gt 209715200 ] && status=OVERQUOTA
echo "Content-Type: text/plain"
echo
echo "$status $user $size 209715200"
""",
    "perl": """#!/usr/bin/perl
use strict;
my ($user) = $ENV{QUERY_STRING} =~ /u=([^&]*)/;
$user =~ s/%(..)/chr hex $1/ge;
my $size = -s "SPOOL/$user";
my $status = ($size || 0) > 209715200 ? "OVERQUOTA" : "OK";
print "Content-Type: text/html\\n\\n$status $user " . ($size // "") . " 209715200";
""",
}


@pytest.mark.parametrize("language", OUTSIDERS)
@pytest.mark.parametrize("server", [apache, lighttpd])
def test_an_outsiders_script_that_knows_only_the_user_serves_the_milter(
    site: Site,
    server: Callable[[Site], None],
    language: str,
    milter: Callable[..., RunningMilter],
) -> None:
    site.script.write_text(OUTSIDERS[language].replace("SPOOL", str(site.spool)))
    server(site)
    assert site.ask("u=nobody&d=example.com").endswith("OK nobody  209715200")
    running = milter(None, "--backend", site.url, "--verbose")
    assert running.rcpt("<john@example.com>") == quota_exceeded("john@example.com")
    assert running.rcpt("<mary@example.com>", "SIZE=1001") == quota_exceeded("mary@example.com")
    assert running.rcpt("<nobody@example.com>", "SIZE=1001") == ""
    assert "verdict=ok used=- quota=209715200" in running.log("recipient=nobody@")
    too_large = "552 5.2.3 Message is larger than the quota of nobody@example.com"
    assert running.rcpt("<nobody@example.com>", f"SIZE={ROOM + 1}") == too_large


@pytest.mark.parametrize("server", [apache, lighttpd])
def test_an_outsiders_client_of_one_line_reads_our_answer(
    site: Site, server: Callable[[Site], None]
) -> None:
    server(site)
    client = 'curl -s "$1?u=$2" | grep -q ^OVERQUOTA && echo full || echo room'
    for user, expected in ("john", "full\n"), ("mary", "room\n"), ("OVERQUOTA", "room\n"):
        arguments = ["sh", "-c", client, "client", site.url, user]
        assert subprocess.run(arguments, capture_output=True, text=True).stdout == expected


# ---- Postfix ----

MAIN_CF = """
compatibility_level = 3.6
queue_directory = {folder}/spool
data_directory = {folder}/data
maillog_file = {folder}/mail.log
maillog_file_prefixes = {folder}
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = mx.example.com
mydestination =
alias_maps =
relay_domains = example.com, example.org
relay_transport = discard:
default_transport = discard:
smtpd_peername_lookup = no
message_size_limit = 0
"""
MASTER_CF = """
smtp      inet  n       -       y       -       -       smtpd
"""
MASTER_CF_REST = """
cleanup   unix  n       -       n       -       0       cleanup
qmgr      unix  n       -       n       300     1       qmgr
rewrite   unix  -       -       n       -       -       trivial-rewrite
bounce    unix  -       -       n       -       0       bounce
defer     unix  -       -       n       -       0       bounce
trace     unix  -       -       n       -       0       bounce
proxymap  unix  -       -       n       -       -       proxymap
error     unix  -       -       n       -       -       error
retry     unix  -       -       n       -       -       error
discard   unix  -       -       n       -       -       discard
anvil     unix  -       -       n       -       1       anvil
postlog   unix-dgram n  -       n       -       1       postlogd
"""


class Postfix:
    """An instance of its own, in a folder and at a port of its own, chrooted as Debian's is."""

    def __init__(self, folder: pathlib.Path, main_cf: str, master_cf: str = MASTER_CF) -> None:
        self.folder, self.port, self.submission_port = folder, free_port(), free_port()
        conf = folder / "postfix"
        for path in conf, folder / "spool", folder / "data":
            path.mkdir(exist_ok=True)
        shutil.chown(folder / "data", "postfix")
        (conf / "main.cf").write_text(MAIN_CF.format(folder=folder) + main_cf)
        services = master_cf.replace("\nsmtp ", f"\n127.0.0.1:{self.port} ")
        services = services.replace("\nsubmission ", f"\n127.0.0.1:{self.submission_port} ")
        (conf / "master.cf").write_text(services + MASTER_CF_REST)
        self.command = [need("postfix", "postfix"), "-c", str(conf)]

    def __enter__(self) -> "Postfix":
        started = subprocess.run([*self.command, "start"], capture_output=True, text=True)
        try:
            assert started.returncode == 0, (started, self.log())
            wait_for(lambda: answers_at(self.port), "Postfix")
        except AssertionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run([*self.command, "stop"], capture_output=True)

    def log(self) -> str:
        """Return what Postfix has logged."""
        path = self.folder / "mail.log"
        return path.read_text() if path.exists() else ""


def send(port: int, *recipients: str, size: int = 0) -> list[str]:
    """Send a message by SMTP; return the reply to each recipient, "" for one that is accepted."""
    replies = []
    with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
        client.ehlo("client.example.net")
        code, text = client.mail("sender@example.net", [f"SIZE={size}"] if size else [])
        assert code == 250, text
        for recipient in recipients:
            code, text = client.rcpt(recipient)
            replies.append("" if code == 250 else f"{code} {text.decode()}")
        if "" in replies:
            assert client.data(b"Subject: test\r\n\r\ntest\r\n")[0] == 250
    return replies


class Frontend(NamedTuple):
    """An MTA, and where README's lines tell it to find the milter."""

    postfix: Postfix
    milter_port: int


@pytest.fixture(scope="module")
def frontend() -> Iterator[Frontend]:
    """Give a Postfix with README's lines in main.cf; it serves all tests that change nothing."""
    need_root()
    with open_folder() as path:
        port = free_port()
        block = readme_block("/etc/postfix/main.cf", {"8894": str(port)})
        with Postfix(path, block) as postfix:
            yield Frontend(postfix, port)


def start_milter_for(port: int, site: Site, *options: Path) -> RunningMilter:
    """Start the milter where the MTA looks for it, with README's file of options."""
    own: dict[str, Path] = {
        "8894": str(port),
        "http://mail1.example.com/cgi-bin/quota.cgi": site.url,
        "--syslog\n": "",
    }
    file = site.folder / "quota_milter.conf"
    file.write_text(readme_block("/etc/quota_milter.conf", own))
    arguments = [PYTHON, MILTER, f"@{file}", *options]
    return RunningMilter(port, site.start(*arguments, port=port))


@pytest.mark.parametrize("server", [apache, lighttpd])
def test_postfix_defers_mail_for_a_full_mailbox_until_it_is_emptied(
    site: Site, server: Callable[[Site], None], frontend: Frontend
) -> None:
    server(site)
    start_milter_for(frontend.milter_port, site, "--cache-ttl", "0")
    port = frontend.postfix.port
    assert send(port, "john@example.com") == [quota_exceeded("john@example.com")]
    site.fill("john", 0)
    assert send(port, "john@example.com") == [""]
    site.fill("john", ROOM)
    assert send(port, "john@example.com") == [""]
    site.fill("john", ROOM + 1)
    assert send(port, "John+lists@Example.ORG") == [quota_exceeded("John+lists@Example.ORG")]
    os.unlink(site.spool / "john")
    assert send(port, "john@example.com") == [""]


@pytest.mark.parametrize("server", [apache, lighttpd])
def test_of_several_recipients_postfix_defers_those_who_have_no_room(
    site: Site, server: Callable[[Site], None], frontend: Frontend
) -> None:
    site.fill("jane", ROOM * 2)
    server(site)
    start_milter_for(frontend.milter_port, site)
    recipients = [f"{user}@example.com" for user in ("john", "mary", "jane", "nobody")]
    replies = [quota_exceeded("john@example.com"), "", quota_exceeded("jane@example.com"), ""]
    assert send(frontend.postfix.port, *recipients) == replies
    assert send(frontend.postfix.port, "postmaster@example.com", "john@example.net")[0] == ""


def test_postfix_hands_the_declared_size_on(site: Site, frontend: Frontend) -> None:
    lighttpd(site)
    start_milter_for(frontend.milter_port, site)
    port, recipients = frontend.postfix.port, ("mary@example.com", "nobody@example.com")
    assert send(port, *recipients, size=1000) == ["", ""]
    assert send(port, *recipients, size=1001) == [quota_exceeded("mary@example.com"), ""]
    replies = [f"552 5.2.3 Message is larger than the quota of {r}" for r in recipients]
    assert send(port, *recipients, size=ROOM + 1) == replies
    assert send(port, *recipients) == ["", ""]


@pytest.mark.parametrize("server", [apache, lighttpd])
def test_mail_is_accepted_when_the_script_is_gone(
    site: Site, server: Callable[[Site], None], frontend: Frontend
) -> None:
    server(site)
    running = start_milter_for(frontend.milter_port, site, "--cache-ttl", "0")
    port = frontend.postfix.port
    assert send(port, "john@example.com") == [quota_exceeded("john@example.com")]
    os.unlink(site.script)
    assert send(port, "mary@example.com") == [""]
    assert re.search("status (404|500) ", running.log("recipient=mary@"))
    assert send(port, "john@example.com") == [quota_exceeded("john@example.com")]  # last known


def test_postfix_accepts_mail_while_the_milter_is_stopped(site: Site, frontend: Frontend) -> None:
    lighttpd(site)
    port = frontend.postfix.port
    running = start_milter_for(frontend.milter_port, site)
    assert send(port, "john@example.com") == [quota_exceeded("john@example.com")]
    assert running.process.stop() == 0
    assert send(port, "john@example.com") == [""]
    start_milter_for(frontend.milter_port, site)
    assert send(port, "john@example.com") == [quota_exceeded("john@example.com")]


def test_a_session_of_postfix_outlives_the_milter(site: Site, frontend: Frontend) -> None:
    lighttpd(site)
    running = start_milter_for(frontend.milter_port, site)
    with smtplib.SMTP("127.0.0.1", frontend.postfix.port, timeout=60) as client:
        client.ehlo("client.example.net")
        for expected in 452, 250:
            assert client.mail("sender@example.net")[0] == 250
            assert client.rcpt("john@example.com")[0] == expected
            assert client.rset()[0] == 250
            running.process.stop()


def test_names_that_are_quoted_or_not_ascii_reach_the_backend(
    site: Site, frontend: Frontend
) -> None:
    apache(site)
    running = start_milter_for(frontend.milter_port, site)
    for user in "a b", "j\u00fcrgen":
        site.fill(user, ROOM + 1)
    with smtplib.SMTP("127.0.0.1", frontend.postfix.port, timeout=60) as client:
        client.ehlo("client.example.net")
        assert client.mail("sender@example.net", ["SMTPUTF8"])[0] == 250
        for recipient in '"a b"@example.com', "J\u00dcRGEN@example.com":
            code, text = client.docmd(f"RCPT TO:<{recipient}>")
            reply = quota_exceeded(recipient.replace("\u00dc", "?"))
            assert f"{code} {text.decode()}" == reply
    assert "user=j\\xc3\\xbcrgen" in running.log("RGEN")


def test_only_the_port_that_is_named_in_master_cf_asks_the_milter(site: Site) -> None:
    lighttpd(site)
    milter_port = free_port()
    block = readme_block("/etc/postfix/master.cf", {"8894": str(milter_port)})
    with Postfix(site.folder, "", block) as postfix:
        start_milter_for(milter_port, site)
        assert send(postfix.port, "john@example.com") == [quota_exceeded("john@example.com")]
        assert send(postfix.submission_port, "john@example.com") == [""]


def test_postfix_accepts_mail_when_a_milter_of_master_cf_hangs_or_is_stopped(site: Site) -> None:
    lighttpd(site)
    port = free_port()
    quicker = {"8894": str(port), "command_timeout=10s": "command_timeout=1s"}
    with Postfix(site.folder, "", readme_block("/etc/postfix/master.cf", quicker)) as postfix:
        assert send(postfix.port, "john@example.com") == [""]
        running = start_milter_for(port, site)
        assert send(postfix.port, "john@example.com") == [quota_exceeded("john@example.com")]
        running.process.popen.send_signal(signal.SIGSTOP)
        assert send(postfix.port, "john@example.com") == [""]
        running.process.popen.send_signal(signal.SIGCONT)
        assert send(postfix.port, "john@example.com") == [quota_exceeded("john@example.com")]


def test_postfix_asks_through_a_unix_socket_inside_its_chroot(site: Site) -> None:
    lighttpd(site)
    spool = {"/var/spool/postfix": site.folder / "spool"}
    with Postfix(site.folder, readme_block("/etc/postfix/main.cf, with a unix socket")) as postfix:
        run_block("Frontend: a folder for the unix socket", {**spool, "quota-milter": "daemon"})
        file = site.folder / "quota_milter.conf"
        url = {"http://mail1.example.com/cgi-bin/quota.cgi": site.url}
        file.write_text(
            readme_block("/etc/quota_milter.conf, with a unix socket", {**spool, **url})
        )
        copy = shutil.copy(MILTER, site.folder / "quota_milter.py")
        umask = ["sh", "-c", 'umask 007; exec "$@"', "sh"]
        running = site.start(*umask, *as_user("daemon"), PYTHON, copy, f"@{file}")
        path = site.folder / "spool/quota/milter.sock"
        running.wait_ready(lambda: "state=started" in running.output(), "the milter")
        wait_for(path.exists, "the socket")
        assert send(postfix.port, "john@example.com") == [quota_exceeded("john@example.com")]
        assert oct(path.stat().st_mode & 0o777) == "0o770"
        assert path.group() == "postfix"
        attempt = [PYTHON, "-c", f"import socket; socket.socket(1).connect({str(path)!r})"]
        refused = subprocess.run([*as_user("nobody", "nogroup"), *attempt], capture_output=True)
        assert b"PermissionError" in refused.stderr
        assert running.stop() == 0
        assert not path.exists()


# ---- Sendmail ----

SENDMAIL_MC = """divert(0)dnl
OSTYPE(`linux')dnl
define(`confDOMAIN_NAME', `mx.example.com')dnl
define(`QUEUE_DIR', `{folder}/queue')dnl
define(`ALIAS_FILE', `{folder}/aliases')dnl
define(`STATUS_FILE', `{folder}/statistics')dnl
define(`confPID_FILE', `{folder}/sendmail.pid')dnl
define(`confDELIVERY_MODE', `queueonly')dnl
FEATURE(`no_default_msa')dnl
FEATURE(`accept_unresolvable_domains')dnl
FEATURE(`nocanonify')dnl
DAEMON_OPTIONS(`Name=MTA, Addr=127.0.0.1, Port={port}')dnl
RELAY_DOMAIN(`example.com')dnl
{block}
MAILER(`local')dnl
MAILER(`smtp')dnl
"""


@pytest.fixture(scope="session")
def sendmail_files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Give Sendmail's packages unpacked: to install them would remove Postfix."""
    need_root()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = pathlib.Path(home) / "quota_milter"
    cache.mkdir(parents=True, exist_ok=True)
    names = ["sendmail-bin", "sendmail-base", "sendmail-cf"]
    if not all(list(cache.glob(f"{name}_*.deb")) for name in names):
        download = [need("apt-get", "apt"), "download", *names]
        done = subprocess.run(download, cwd=cache, capture_output=True, text=True)
        if done.returncode:
            missing(f"Sendmail cannot be had: apt-get update; {done.stderr.strip()[:200]}")
    files = tmp_path_factory.mktemp("sendmail")
    for name in names:
        newest = max(cache.glob(f"{name}_*.deb"), key=lambda file: file.stat().st_mtime)
        subprocess.run([need("dpkg", "dpkg"), "-x", newest, files], check=True)
    return pathlib.Path(files)


def start_sendmail(site: Site, files: pathlib.Path, milter_port: int) -> int:
    """Start Sendmail with README's line in its mc file; return its port."""
    port = free_port()
    (site.folder / "queue").mkdir(mode=0o700)
    (site.folder / "aliases").touch()
    block = readme_block("/etc/mail/sendmail.mc", {"8894": str(milter_port)})
    mc = site.folder / "sendmail.mc"
    mc.write_text(SENDMAIL_MC.format(folder=site.folder, port=port, block=block))
    rules = files / "usr/share/sendmail/cf"
    m4: list[Path] = [need("m4", "m4"), f"-D_CF_DIR_={rules}/", rules / "m4/cf.m4", mc]
    cf = site.folder / "sendmail.cf"
    cf.write_bytes(subprocess.run(m4, capture_output=True, check=True).stdout)
    program = next(file for file in files.glob("usr/lib*/**/sendmail") if file.is_file())
    named = 'hostname mx.example.com; exec "$@"'  # it waits a minute where the name has no dot
    unshare = [need("unshare", "util-linux"), "--uts", "sh", "-c", named, "sh"]
    site.start(*unshare, program, "-C", cf, "-bD", port=port)
    return port


def test_sendmail_defers_mail_for_a_full_mailbox_and_accepts_it_without_the_milter(
    site: Site, sendmail_files: pathlib.Path
) -> None:
    lighttpd(site)
    milter_port = free_port()
    port = start_sendmail(site, sendmail_files, milter_port)
    assert send(port, "john@example.com") == [""]  # there is no milter yet
    running = RunningMilter(
        milter_port,
        site.start(
            *(PYTHON, MILTER, "--backend", site.url, "--listen", f"inet:{milter_port}@127.0.0.1"),
            port=milter_port,
        ),
    )
    recipients = [f"{user}@example.com" for user in ("john", "mary", "nobody")]
    assert send(port, *recipients) == [quota_exceeded("john@example.com"), "", ""]
    full = [quota_exceeded(address) for address in recipients[:2]]
    assert send(port, *recipients, size=1001) == [*full, ""]
    replies = [f"552 5.2.3 Message is larger than the quota of {r}" for r in recipients]
    assert send(port, *recipients, size=ROOM + 1) == replies
    assert send(port, "john+lists@example.com", size=1) == [
        quota_exceeded("john+lists@example.com")
    ]
    assert running.process.stop() == 0
    assert send(port, *recipients) == ["", "", ""]


# ---- miltertest: a client of the milter protocol that others wrote ----

LUA = """
function check(good, what)
    if not good then
        mt.echo(what)
        error(what)
    end
end

function give(recipient, reply)
    check(mt.rcptto(conn, "<" .. recipient .. ">") == nil, "no reply for " .. recipient)
    check(mt.getreply(conn) == reply, recipient .. " got " .. mt.getreply(conn))
end

conn = mt.connect("inet:" .. port .. "@127.0.0.1")
check(conn ~= nil, "no connection")
check(mt.negotiate(conn, nil, nil, nil) == nil, "negotiation")
for _, step in pairs({SMFIP_NOCONNECT, SMFIP_NOHELO, SMFIP_NODATA, SMFIP_NOHDRS, SMFIP_NOEOH,
                      SMFIP_NOBODY, SMFIP_NOUNKNOWN}) do
    check(mt.test_option(conn, step), "the milter wants to see more than it needs: " .. step)
end
check(mt.mailfrom(conn, "<sender@example.net>", "SIZE=1000") == nil, "mail")
give("john@example.com", SMFIR_REPLYCODE)
give("mary@example.com", SMFIR_CONTINUE)
check(mt.abort(conn) == nil, "abort")
check(mt.mailfrom(conn, "<>", "BODY=8BITMIME", "SIZE=1001") == nil, "second mail")
give("mary@example.com", SMFIR_REPLYCODE)
give("postmaster@example.com", SMFIR_CONTINUE)
give("nobody@example.com", SMFIR_CONTINUE)
check(mt.eom(conn) == nil, "eom")
check(mt.getreply(conn) == SMFIR_CONTINUE, "the message got " .. mt.getreply(conn))
mt.disconnect(conn)
mt.echo("all as expected")
"""


def test_miltertest_gets_the_replies_and_need_send_nothing_but_the_envelope(
    site: Site, milter: Callable[..., RunningMilter]
) -> None:
    lighttpd(site)
    running = milter(None, "--backend", site.url)
    script = site.folder / "test.lua"
    script.write_text(LUA)
    arguments = [need("miltertest", "miltertest"), "-D", f"port={running.port}", "-s", str(script)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "all as expected\n"), done


# ---- password and TLS ----

TLS_SITE = "/etc/apache2/sites-available/quota.conf"


@pytest.fixture
def tls_site(site: Site) -> Site:
    """Give an Apache that wants https, the frontend's address and a password."""
    need("openssl", "openssl")
    ssl_folder = site.folder / "ssl"
    own: dict[str, Path] = {"/etc/ssl/quota": ssl_folder, "DNS:mail1.example.com": "IP:127.0.0.1"}
    run_block("Backend: a private authority and a certificate", own)
    strict = ["openssl", "verify", "-x509_strict", "-CAfile", "authority.pem", "mail1.pem"]
    assert subprocess.run(strict, cwd=ssl_folder).returncode == 0  # as Python 3.13 does
    assert all(key.stat().st_mode & 0o077 == 0 for key in ssl_folder.glob("*.key"))
    passwords = site.folder / "quota.htpasswd"
    need("htpasswd", "apache2-utils")
    own = {" -c ": " -i -c ", "/etc/apache2/quota.htpasswd": passwords}
    run_block("Backend: a password", own, input="s:cret\n")
    own = {"*:443": f"127.0.0.1:{site.port}", "/etc/ssl/quota": ssl_folder}
    block = site.block(TLS_SITE, **own, **{"/etc/apache2/quota.htpasswd": passwords})
    modules = "cgid ssl socache_shmcb auth_basic authn_file"
    start_apache(site, block, modules, f"ScriptSock {site.folder}/cgid.sock")
    site.url = site.url.replace("http:", "https:")
    return site


def options_for(site: Site, password: str, cafile: Path) -> pathlib.Path:
    """Write README's file of options for a site with TLS."""
    url = site.url.replace("//", f"//frontend:{password}@")
    own: dict[str, Path] = {
        "https://frontend:secret@mail1.example.com/cgi-bin/quota.cgi": url,
        "/etc/ssl/quota/authority.pem": cafile,
    }
    file = site.folder / "quota_milter.conf"
    name = "/etc/quota_milter.conf, with a password and a private authority"
    file.write_text(readme_block(name, own))
    return file


def test_a_password_over_https_with_a_private_authority(
    tls_site: Site, milter: Callable[..., RunningMilter]
) -> None:
    authority = tls_site.folder / "ssl/authority.pem"
    running = milter(None, f"@{options_for(tls_site, 's%3Acret', authority)}", "--verbose")
    assert running.rcpt("<john@example.com>") == quota_exceeded("john@example.com")
    assert running.rcpt("<mary@example.com>") == ""
    assert "used=209714200" in running.log("mary")
    assert "cret" not in running.process.output()


def test_a_wrong_password_refuses_nothing_and_is_not_logged(
    tls_site: Site, milter: Callable[..., RunningMilter]
) -> None:
    authority = tls_site.folder / "ssl/authority.pem"
    running = milter(None, f"@{options_for(tls_site, 'wrong', authority)}")
    assert running.rcpt("<john@example.com>") == ""
    assert "status 401" in running.log("verdict=fault")
    assert "wrong" not in running.process.output()


def test_a_certificate_of_an_unknown_authority_or_name_refuses_nothing(
    tls_site: Site, milter: Callable[..., RunningMilter]
) -> None:
    running = milter(None, "--backend", tls_site.url)
    assert running.rcpt("<john@example.com>") == ""
    assert "certificate verify failed" in running.log("state=down")
    tls_site.url = tls_site.url.replace("127.0.0.1", "localhost")
    file = options_for(tls_site, "s%3Acret", tls_site.folder / "ssl/authority.pem")
    running = milter(None, f"@{file}")
    assert running.rcpt("<john@example.com>") == ""
    assert "certificate verify failed" in running.log("state=down")


def test_the_right_password_from_another_address_refuses_nothing(
    site: Site, request: pytest.FixtureRequest, milter: Callable[..., RunningMilter]
) -> None:
    site.frontend = FRONTEND
    request.getfixturevalue("tls_site")
    file = options_for(site, "s%3Acret", site.folder / "ssl/authority.pem")
    running = milter(None, f"@{file}")
    assert running.rcpt("<john@example.com>") == ""
    assert "status 403" in running.log("verdict=fault")


# ---- README ----


def test_the_commands_of_the_readme_do_what_they_say(site: Site) -> None:
    lighttpd(site)
    line = run_block("Backend: ask", {"mail1.example.com": f"127.0.0.1:{site.port}"})
    assert line == f"OVERQUOTA john {ROOM + 1} {ROOM}\n"
    root = site.folder / "root"
    (root / "etc").mkdir(parents=True)
    replacements: dict[str, Path] = {
        "apt-get install": ": apt-get install",  # has been done where this test runs
        " quota_milter.py": f" {MILTER}",
        "/usr/local/sbin": site.folder,
        "useradd": f"{need('useradd', 'passwd')} --prefix {root}",
    }
    run_block("Frontend: copy", replacements)
    assert os.access(site.folder / "quota_milter.py", os.X_OK)
    assert "quota-milter" in (root / "etc/passwd").read_text()


def test_every_block_of_the_readme_that_has_a_name_is_used_by_a_test() -> None:
    names = re.findall(r"^```\w+\n(?:dnl )?# (.*)$", README.read_text(), re.MULTILINE)
    text = pathlib.Path(__file__).read_text()
    assert len(names) > 20
    for name in names:
        assert f'"{name}"' in text or name.endswith(".service"), name


# ---- whose rights ----

OTHERS = (60001, 60002)  # users' ids that nobody has


def test_mbox_files_of_other_users_need_no_right_but_to_search_their_folder(
    site: Site, milter: Callable[..., RunningMilter]
) -> None:
    for user, uid in zip(("john", "mary"), OTHERS):
        os.chown(site.spool / user, uid, uid)
    lighttpd(site)
    running = milter(None, "--backend", site.url, "--cache-ttl", "0")
    assert running.rcpt("<john@example.com>") == quota_exceeded("john@example.com")
    assert running.rcpt("<mary@example.com>") == ""
    site.spool.chmod(0o700)
    assert site.ask("u=mary") == "500 ERROR cannot read the mailbox: Permission denied"
    assert running.rcpt("<mary@example.com>") == ""
    assert "ERROR cannot read the mailbox: Permission denied" in running.log("user=mary")


@pytest.fixture
def maildirs(site: Site) -> Site:
    """Give a backend with Maildirs of two users, which nobody else may read: one has no room."""
    text = MAILDIR_CGI.read_text().replace("%h/Maildir", f"{site.folder}/home/%n/Maildir")
    site.script.write_text(text)
    (site.folder / "home").mkdir()
    for user, uid, size in ("john", OTHERS[0], ROOM), ("mary", OTHERS[1], ROOM - 1):
        maildir = site.folder / "home" / user / "Maildir"
        for part in "new", "cur", "tmp":
            (maildir / part).mkdir(parents=True)
        (maildir / "cur" / f"1.M1P1.mx,S={size}:2,S").touch()
        own(site.folder / "home" / user, uid, uid, 0o600)
    return site


def own(top: pathlib.Path, uid: int, gid: int, mode: int) -> None:
    """Give away all below a folder, files with this mode and folders with the search it implies."""
    for path in top, *top.rglob("*"):
        os.chown(path, uid, gid)
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


CAPABLE = "Backend: all mailboxes readable, without systemd"


def serve_maildirs(site: Site, block: str) -> None:
    """Run a block of README that starts the script."""
    site.start("sh", "-euc", block, port=site.port)


def test_a_capability_lets_an_ordinary_user_read_the_maildirs_of_all(maildirs: Site) -> None:
    own_names: dict[str, Path] = {
        "/usr/lib/cgi-bin/maildir_quota.cgi": maildirs.script,
        "192.0.2.10:8025": f"127.0.0.1:{maildirs.port}",
    }
    serve_maildirs(maildirs, readme_block(CAPABLE, own_names))
    assert maildirs.ask("u=john") == f"200 OVERQUOTA john {ROOM} {ROOM}"
    assert maildirs.ask("u=mary") == f"200 OK mary {ROOM - 1} {ROOM}"
    status = pathlib.Path(f"/proc/{listener(maildirs.port)}/status").read_text()
    assert re.search(r"^CapEff:\s0*4$", status, re.MULTILINE), status  # CAP_DAC_READ_SEARCH alone
    assert "\nUid:\t0" not in status


def listener(port: int) -> int:
    """Return the process that listens at a port of loopback."""
    lines = pathlib.Path("/proc/net/tcp").read_text().splitlines()
    inode = next(x.split()[9] for x in lines if f":{port:04X} 00000000:0000 0A" in x)
    for file in pathlib.Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(file) == f"socket:[{inode}]":
                return int(file.parts[2])
    raise AssertionError(f"nobody listens at {port}")


def test_without_the_right_the_mail_is_accepted_and_the_log_says_why(
    maildirs: Site, milter: Callable[..., RunningMilter]
) -> None:
    no_web_server(maildirs)
    assert maildirs.ask("u=john") == "500 ERROR cannot read the mailbox: Permission denied"
    running = milter(None, "--backend", maildirs.url)
    assert running.rcpt("<john@example.com>") == ""
    assert "ERROR cannot read the mailbox: Permission denied" in running.log("verdict=fault")
    assert running.process.output().count("john") == 2  # recipient= and user= of one line


def test_a_group_that_may_read_is_enough(maildirs: Site) -> None:
    group = int(subprocess.check_output(["id", "-g", "www-data"]))
    for user, uid in zip(("john", "mary"), OTHERS):
        own(maildirs.folder / "home" / user, uid, group, 0o640)
    no_web_server(maildirs)
    assert maildirs.ask("u=john") == f"200 OVERQUOTA john {ROOM} {ROOM}"
    own(maildirs.folder / "home/mary/Maildir/cur", OTHERS[1], OTHERS[1], 0o600)
    assert maildirs.ask("u=mary") == "500 ERROR cannot read the mailbox: Permission denied"


def test_mod_wsgi_runs_as_the_user_who_has_the_mailboxes(maildirs: Site) -> None:
    daemon = int(subprocess.check_output(["id", "-u", "daemon"]))
    own(maildirs.folder / "home", daemon, daemon, 0o600)
    users = {"user=www-data group=www-data": "user=daemon group=daemon"}
    block = maildirs.block("/etc/apache2/conf-available/quota-wsgi.conf", **users)
    start_apache(maildirs, block, "wsgi", f"WSGISocketPrefix {maildirs.folder}/wsgi")
    assert maildirs.ask("u=john") == f"200 OVERQUOTA john {ROOM} {ROOM}"
    assert maildirs.ask("u=mary") == f"200 OK mary {ROOM - 1} {ROOM}"


# ---- how it is started ----


def test_the_systemd_units_are_valid(folder: pathlib.Path) -> None:
    analyze = need("systemd-analyze", "systemd")
    programs = {
        "quota-milter": ("/usr/local/sbin/quota_milter.py", MILTER),
        "quota-backend": ("/usr/lib/cgi-bin/maildir_quota.cgi", MAILDIR_CGI),
    }
    for unit, (program, script) in programs.items():
        path = folder / f"{unit}.service"
        copy = shutil.copy(script, folder)
        path.write_text(readme_block(f"/etc/systemd/system/{unit}.service", {program: copy}))
        done = subprocess.run([analyze, "verify", "--man=no", path], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), unit


def test_the_milter_runs_without_systemd_as_a_user_of_its_own(site: Site) -> None:
    lighttpd(site)
    need("start-stop-daemon", "dpkg")
    port = free_port()
    start_milter_for(port, site).process.stop()  # writes the file of options
    pid: dict[str, Path] = {"/run/quota-milter.pid": site.folder / "quota-milter.pid"}
    own_names: dict[str, Path] = {
        **pid,
        "quota-milter:quota-milter": "daemon:daemon",
        "/usr/local/sbin/quota_milter.py": shutil.copy(MILTER, site.folder),
        "/etc/quota_milter.conf": site.folder / "quota_milter.conf",
    }
    command = readme_block("Frontend: without systemd", own_names)
    try:
        assert subprocess.run(["sh", "-euc", command]).returncode == 0
        wait_for(lambda: answers_at(port), "the milter")
        assert subprocess.run(["sh", "-euc", command], stdout=subprocess.DEVNULL).returncode == 1
        with MilterSession(port) as session:
            session.mail()
            assert session.rcpt("<john@example.com>") == quota_exceeded("john@example.com")
        number = int((site.folder / "quota-milter.pid").read_text())
        assert pathlib.Path(f"/proc/{number}").owner() == "daemon"
    finally:
        run_block("Frontend: end it", pid)
    assert not answers_at(port)


# ---- what the administrator sees ----

# In a mount namespace of its own, where nothing is seen of it outside. In a chroot / is no mount.
PRIVATE_DEV = """
set -e
mount --make-rprivate /dev 2> /dev/null || mount --make-rprivate /
mount -t tmpfs none /dev/shm
for name in null zero random urandom; do
    touch "/dev/shm/$name"
    mount --bind "/dev/$name" "/dev/shm/$name"
done
ln -s "$0/run/log" /dev/shm/log
mount --rbind /dev/shm /dev
exec "$@"
"""


def start_syslog(site: Site) -> pathlib.Path:
    """Start rsyslogd with a socket of its own; return the file with what arrives for mail."""
    program = need("rsyslogd", "rsyslog")
    run = site.folder / "run"
    run.mkdir(exist_ok=True)
    (site.folder / "rsyslog.conf").write_text(
        f'global(workDirectory="{run}")\n'
        'module(load="imuxsock" SysSock.Use="off")\n'
        f'input(type="imuxsock" Socket="{run}/log" CreatePath="off")\n'
        'template(name="all" type="string" string="%syslogfacility-text%.%syslogseverity-text% '
        '%syslogtag%%msg%\\n")\n'
        f'*.* action(type="omfile" file="{run}/all.log" template="all")\n'
    )
    process = site.start(
        program, "-n", "-f", site.folder / "rsyslog.conf", "-i", run / "rsyslogd.pid"
    )
    process.wait_ready((run / "log").exists, "rsyslogd")
    site.syslog = process
    return run / "all.log"


def test_the_log_arrives_at_syslog(site: Site) -> None:
    lighttpd(site)
    file = start_syslog(site)
    port = free_port()
    options = ["--listen", f"inet:{port}@127.0.0.1", "--backend", site.url, "--syslog"]
    unshare = [need("unshare", "util-linux"), "--mount", "--propagation", "unchanged"]
    unshare += ["sh", "-c", PRIVATE_DEV, str(site.folder)]
    process = site.start(*unshare, PYTHON, MILTER, *options, port=port)
    running = RunningMilter(port, process)
    tag = f"quota_milter[{process.popen.pid}]:"

    def arrives(line: str) -> None:
        wait_for(lambda: file.exists() and re.search(line, file.read_text()), f"{line} in syslog")

    arrives(rf"(?m)^mail\.info {re.escape(tag)} listen=inet:{port}@127\.0\.0\.1 state=started")
    assert running.rcpt("<john@example.com>") == quota_exceeded("john@example.com")
    figures = rf"verdict=overquota used={ROOM + 1} quota={ROOM} cached=no ms=\d+"
    arrives(rf"(?m)^mail\.info {re.escape(tag)} recipient=john@example\.com user=john {figures}$")
    site.script.unlink()
    assert running.rcpt("<mary@example.com>") == ""
    arrives(r"(?m)^mail\.warning .* recipient=mary@example\.com user=mary verdict=fault")
    site.syslog.stop()
    start_syslog(site)
    process.popen.send_signal(signal.SIGUSR1)
    arrives(r"counters recipients=2 refused=1 cached=0 lastknown=0 ok=0 overquota=1 .*fault=1")
    assert process.stop() == 0
    arrives("state=stopped")
    assert process.output() == ""


def test_a_dry_run_refuses_nothing_and_logs_what_it_would(site: Site, frontend: Frontend) -> None:
    lighttpd(site)
    running = start_milter_for(frontend.milter_port, site, "--dry-run", "--verbose")
    assert send(frontend.postfix.port, "john@example.com", "mary@example.com") == ["", ""]
    assert "verdict=overquota" in running.log("dry_run=yes")
    assert "verdict=ok" in running.log("user=mary")
    running.process.popen.send_signal(signal.SIGUSR1)
    assert "recipients=2 refused=0" in running.log("counters")


def test_check_is_a_probe_for_the_monitoring(site: Site) -> None:
    lighttpd(site)
    file = site.folder / "quota_milter.conf"
    url = "http://mail1.example.com/cgi-bin/quota.cgi"
    file.write_text(readme_block("/etc/quota_milter.conf", {url: site.url, "--syslog\n": ""}))

    def probe(*addresses: str) -> tuple[int, list[str]]:
        own_names: dict[str, Path] = {
            "quota_milter.py": MILTER,
            "/etc/quota_milter.conf": file,
            "john@example.com": " ".join(addresses),
        }
        block = readme_block("Frontend: ask", own_names)
        done = subprocess.run(["sh", "-euc", block], capture_output=True, text=True)
        return done.returncode, [re.sub(r"ms=\d+", "ms=0", x) for x in done.stdout.splitlines()]

    figures = f"used={ROOM - 1000} quota={ROOM} cached=no ms=0 reply=none"
    mary = f"recipient=mary@example.com user=mary verdict=ok {figures}"
    assert probe("mary@example.com") == (0, [mary])
    figures = f"used={ROOM + 1} quota={ROOM} cached=no ms=0"
    reply = quota_exceeded("john@example.com")
    john = f"recipient=john@example.com user=john verdict=overquota {figures} reply={reply}"
    assert probe("mary@example.com", "john@example.com") == (1, [mary, john])
    site.script.unlink()
    status, lines = probe("john@example.com")
    assert status == 2
    assert "verdict=fault" in lines[0]


# ---- the repository ----


def test_both_cgis_share_one_block_to_the_letter() -> None:
    mark = (
        "# ---- From here to the end the text is the same in quota.cgi and maildir_quota.cgi. ----"
    )
    blocks = [script.read_text().partition(mark)[2] for script in (MBOX_CGI, MAILDIR_CGI)]
    assert blocks[0] == blocks[1] != ""


def test_readmes_first_command_runs_the_main_job(
    tmp_path: pathlib.Path, start: Callable[..., Process]
) -> None:
    if answers_at(8025) or answers_at(8894):
        missing("something listens on a default port already")
    commands = tmp_path / "run-it"
    install = "apt-get update && apt-get install -y python3-milter\n"
    commands.write_text(readme_block("run it", {install: ""}))
    process = start("bash", commands, cwd=HERE)
    for port in 8025, 8894:  # the defaults, which fit together
        process.wait_ready(lambda port=port: answers_at(port), f"port {port}")  # type: ignore[misc]
    status, output, _ = run_milter("--check", "nobody-of-that-name@example.com")
    assert (status, output.split()[2]) == (0, "verdict=ok")
    with MilterSession(8894) as session:
        session.mail()
        assert session.rcpt("<nobody-of-that-name@example.com>") == ""
    children = pathlib.Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children")
    for child in children.read_text().split():
        os.kill(int(child), signal.SIGINT)
    assert process.popen.wait(20) == 0
    wait_for(lambda: not answers_at(8025), "the end of the backend")


def test_readme_shows_a_mailbox_over_its_quota_in_a_shell() -> None:
    assert run_block("a mailbox over its quota", {}, cwd=HERE).startswith("OVERQUOTA john ")
    own: dict[str, Path] = {"/usr/lib/cgi-bin/quota.cgi": MBOX_CGI, "john": "no-such-user"}
    assert run_block("Backend: ask in a shell", own) == "UNKNOWN no-such-user 0 209715200\n"


def test_readmes_second_command_installs_what_the_tests_need() -> None:
    command = readme_block("run every test")
    assert command.splitlines()[-1] == "/usr/bin/python3 -m pytest test_quota.py"
    text = pathlib.Path(__file__).read_text()
    packages = set(re.findall(r'need\("[^"]+", "([a-z0-9-]+)"\)', text))
    packages -= {"apt", "dpkg", "util-linux"}  # every Debian has these
    packages -= {"apache2-utils"}  # and apache2 brings this
    assert len(packages) > 8
    assert packages <= set(command.split())


def test_readme_and_the_help_give_every_option_its_default() -> None:
    rows = dict(re.findall(r"^\| `--([a-z-]+).*?\| (.*?) \|", README.read_text(), re.MULTILINE))
    assert set(rows) == set(OPTIONS)
    text = re.sub(r"\s+", " ", run_milter("--help")[1])
    defaults = {name: default for name, default, *_ in load(MILTER).VALUES}
    assert defaults == {
        "listen": "inet:8894@127.0.0.1",
        "timeout": 5,
        "retry-after": 10,
        "max-queries": 16,
        "cache-ttl": 60,
        "overquota-reply": "452 4.2.2 Quota exceeded for {address}, try again later",
        "toolarge-reply": "552 5.2.3 Message is larger than the quota of {address}",
        "unknown-reply": None,
        "recipient-delimiter": "+",
        "cafile": None,
    }
    for name, default in defaults.items():
        if default is not None:
            assert rows[name].strip("`") == str(default) and f"({default})" in text, name
    assert "`http://127.0.0.1:8025/cgi-bin/quota.cgi`" in rows["backend"]
    assert "`accept`" in rows["on-error"] and "(accept)" in text


@pytest.mark.parametrize("script", [MBOX_CGI, MAILDIR_CGI])
def test_readme_gives_every_setting_its_default(script: pathlib.Path) -> None:
    module = load(script)
    settings = [name for name in vars(module) if name.startswith("QUOTA_")]
    assert len(settings) == {MBOX_CGI: 4, MAILDIR_CGI: 5}[script]
    for name in settings:
        row = re.search(rf"^\| `{name}`.*?\| (.*?) \|", README.read_text(), re.MULTILINE)
        assert row and row[1].strip("`") == (getattr(module, name) or "none"), name


def test_the_top_level_holds_the_six_files_and_nothing_else() -> None:
    shown = {entry.name for entry in HERE.iterdir() if not entry.name.startswith((".", "__"))}
    names = {"quota_milter.py", "quota.cgi", "maildir_quota.cgi", "test_quota.py"}
    assert shown == names | {"README.md", "LICENSE"}
