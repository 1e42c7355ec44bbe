"""Tests of quota_milter.py, quota.cgi and maildir_quota.cgi.

    python3 -m pytest test_quota.py

Real: Postfix, Sendmail, Apache, lighttpd, nginx, uWSGI, gunicorn, Dovecot, deliverquota,
miltertest, each an instance of its own on loopback in a temporary folder. Faked is only what cannot
be had for real: a backend that misbehaves. A test whose part is missing skips and names the Debian
package; with CI set in the environment it fails. Postfix and the others want root.
"""

import base64
import concurrent.futures
import contextlib
import email.utils
import errno
import functools
import heapq
import http.client as http_client
import imaplib
import importlib.machinery
import importlib.util
import itertools
import os
import pathlib
import pwd
import random
import re
import resource
import select
import shlex
import shutil
import signal
import smtplib
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Optional, Union, cast

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
    """An MTA's side of the milter protocol, as Postfix and Sendmail speak it: one connection."""

    SKIP = 0x400  # the milter may end a body with "s"
    CHUNK = 65535  # bytes of a body that an MTA sends at a time
    STEPS = {
        # command: the bits with which a milter does without it, and without replying to it
        b"C": (0x1, 0x1000),
        b"H": (0x2, 0x2000),
        b"M": (0x4, 0x4000),
        b"T": (0x200, 0x10000),
        b"L": (0x20, 0x80),
        b"N": (0x40, 0x40000),
        b"B": (0x10, 0x80000),
    }

    def __init__(
        self,
        address: Union[int, Path, socket.socket],
        version: int = 6,
        offered: int = 0x1FFFFF,  # the bits that this MTA understands
    ) -> None:
        self.version, self.offered = version, offered
        if isinstance(address, socket.socket):
            self.socket = address
        elif isinstance(address, int):
            self.socket = socket.create_connection(("127.0.0.1", address), timeout=60)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(60)
            self.socket.connect(str(address))
        self.send(b"O", struct.pack(">III", version, 0x1FF, offered))
        command, data = self.receive()
        assert command == b"O", command
        self.protocol = struct.unpack(">III", data[:12])[2]
        assert not self.protocol & ~offered, "the milter wants what was not offered"
        self.step(b"C", b"client.example.net\x004\x00\x19127.0.0.1\0")
        self.step(b"H", b"client.example.net\0")

    def __enter__(self) -> "MilterSession":
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, command: bytes, data: bytes = b"") -> None:
        """Send one packet."""
        self.last = command
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

    def step(self, command: bytes, data: bytes = b"") -> bytes:
        """Take a step, unless the milter does without it; return its reply, "c" for none."""
        without, without_reply = self.STEPS[command]
        if self.protocol & without:
            return b"c"
        self.send(command, data)
        return b"c" if self.protocol & without_reply else self.receive()[0]

    def mail(self, sender: str = "<sender@example.net>", *parameters: str) -> None:
        """Begin a message."""
        assert self.step(b"M", b"".join(p.encode() + b"\0" for p in (sender, *parameters))) == b"c"

    def rcpt(self, recipient: Union[str, bytes], *parameters: str) -> str:
        """Give a recipient; return the SMTP reply, "" for one that is let through."""
        raw = recipient if isinstance(recipient, bytes) else recipient.encode()
        self.send(b"R", b"".join(p + b"\0" for p in (raw, *(p.encode() for p in parameters))))
        command, data = self.receive()
        assert command in (b"c", b"y"), (command, data)
        return data.rstrip(b"\0").decode("ascii")

    def data(self, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        """Begin the data: DATA (which protocol versions below 4 have not), headers, their end."""
        if self.version >= 4:
            assert self.step(b"T") == b"c"
        for name, value in headers.items():
            assert self.step(b"L", f"{name}\0{value}\0".encode()) == b"c"
        assert self.step(b"N") == b"c"

    def body(self, size: int) -> int:
        """Send a body of so many bytes, or less if the milter skips it; return the bytes sent."""
        sent = 0
        while sent < size:
            chunk = b"x" * min(size - sent, self.CHUNK)
            sent += len(chunk)
            reply = self.step(b"B", chunk)
            assert reply == b"c" or reply == b"s" and self.offered & self.SKIP, reply
            if reply == b"s":
                break
        return sent

    def end(self) -> str:
        """End the data; return the SMTP reply to the whole message, "" for one that is taken."""
        self.send(b"E")
        command, data = self.receive()
        assert command in (b"c", b"y"), (command, data)
        return data.rstrip(b"\0").decode("ascii")

    def message(self, recipients: str, size: int, *parameters: str) -> str:
        """Give a whole message to recipients (user or user@domain, spaces between them).

        Returns the reply to the data, "" where it was taken; where every recipient was refused
        there are no data, and the last one's reply stands for them.
        """
        self.mail("<sender@example.net>", *parameters)
        names = [name if "@" in name else f"{name}@example.com" for name in recipients.split()]
        replies = [self.rcpt(f"<{name}>") for name in names]
        if all(replies):
            self.abort()
            return replies[-1]
        self.data()
        self.body(size)
        return self.end()

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
        self.connections: list[int] = []  # questions that each has brought
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
        """Answer the questions of a connection, as long as the answers offer to keep it."""
        with contextlib.suppress(OSError):
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                number = None
                while True:
                    request = b""
                    while b"\r\n\r\n" not in request:
                        more = connection.recv(65536)
                        if not more:
                            return
                        request += more
                    with self.lock:
                        if number is None:
                            number = len(self.connections)
                            self.connections.append(0)
                        self.connections[number] += 1
                    if not self.answer(connection, request):
                        return

    def answer(self, connection: socket.socket, request: bytes) -> bool:
        """Answer one request as told; say whether the connection is kept."""
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
        return answer is not None and b"\r\nKeep-Alive:" in answer

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

    def has_been_asked(self, times: int) -> bool:
        """Say whether there have been so many questions."""
        return len(self.asked) >= times

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

    def session(self, version: int = 6, offered: int = 0x1FFFFF) -> MilterSession:
        """Connect as an MTA does that knows this version and these bits of the protocol."""
        return MilterSession(self.port, version, offered)

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

UNCACHED = "--cache-ttl", "0"
SLACK = 5  # seconds that a loaded machine may add to what is bounded
EXCEEDED = "452 4.2.2 Quota exceeded for "


class Case(NamedTuple):
    """One recipient: what the backend does, what the MTA gives, and what comes of it."""

    answer: Any = FULL
    options: str = ""  # of the milter; URL stands for the backend's
    recipient: Union[None, str, bytes] = None  # None: a user of this case alone
    parameters: str = ""  # of MAIL FROM
    reply: str = EXCEEDED  # its beginning; "": let through
    log: str = ""  # fields of the line in the log
    asked: Optional[str] = None  # the query of the only question, "": none, None: no matter


def run_case(case: Case, number: int, running: RunningMilter, backend: Backend) -> str:
    """Give one recipient; return what differs from the case, "" for nothing."""

    def lines() -> list[str]:
        return [line for line in running.process.output().splitlines() if "recipient=" in line]

    asked, logged = len(backend.asked), len(lines())
    backend.default = case.answer
    begin = time.monotonic()
    recipient = f"<u{number}@example.com>" if case.recipient is None else case.recipient
    reply = running.rcpt(recipient, *case.parameters.split())
    took = time.monotonic() - begin
    line = wait_for(lambda: lines()[logged:], f"the line of {case}")[0] + " "
    queries = [question.split(b"?")[-1].split()[0].decode() for question in backend.asked[asked:]]
    right = reply.startswith(case.reply) and bool(reply) == bool(case.reply) and len(reply) <= 510
    right &= all(f" {field} " in line for field in case.log.split())
    right &= case.asked is None or queries == [case.asked] * bool(case.asked)
    right &= ("verdict=fault" in line) == (" reason=" in line) and took < 1 + SLACK
    return "" if right else f"{str(case)[:300]}\n  {reply!r} {took:.1f} s {queries}\n  {line[:300]}"


def run_cases(cases: list[Case], backend: Backend, milter: Callable[..., RunningMilter]) -> None:
    """Run cases in turn, with one milter for all of the same options."""
    milters: dict[str, RunningMilter] = {}
    differing = []
    for number, case in enumerate(cases):
        if case.options not in milters:
            options = shlex.split(case.options.replace("URL", backend.url))
            default = None if "--backend" in options else backend
            milters[case.options] = milter(default, "--verbose", *UNCACHED, *options)
        differing.append(run_case(case, number, milters[case.options], backend))
    assert not any(differing), "\n".join(filter(None, differing))
    for running in milters.values():
        assert running.process.stop() == 0
        output = running.process.output()
        assert "Traceback" not in output and "state=down" not in output
        assert all(" " <= c <= "~" or c == "\n" for c in output), "the log is printable ASCII"


X = "&d=x.org"
ADDRESSES = [
    # (as the MTA gives it, what is asked, "": nothing; the address in the reply, "": as given)
    (b"<john@example.com>", "u=john&d=example.com", ""),
    (b"john@example.com", "u=john&d=example.com", ""),
    (b"<John@Example.COM>", "u=john&d=example.com", ""),
    (b"<john@example.com.>", "u=john&d=example.com", ""),
    (b"<john>", "u=john", ""),
    (b"<>", "", ""),
    (b"", "", ""),
    (b"<@example.com>", "", ""),
    (b'<""@x.org>', "", ""),
    (b"<john@>", "u=john", ""),
    (b"<@a.example,@b.example:john@x.org>", "u=john" + X, ""),
    (b"<@[IPv6:::1],@b.example:john@x.org>", "u=john" + X, ""),
    (b"<@a.example:john>", "u=john", ""),
    (b"<john@[192.0.2.1]>", "u=john&d=%5B192.0.2.1%5D", ""),
    (b'<"a b"@x.org>', "u=a%20b" + X, ""),
    (b'<"a@b"@x.org>', "u=a%40b" + X, ""),
    (b'<"a@b">', "u=a%40b", ""),
    (rb'<"a\"b\\c"@x.org>', "u=a%22b%5Cc" + X, ""),
    (b'<"a:b"@x.org>', "u=a%3Ab" + X, ""),
    (b"<a@b@x.org>", "u=a%40b" + X, ""),
    (b"<john+lists@x.org>", "u=john" + X, ""),
    (b"<john+a+b@x.org>", "u=john" + X, ""),
    (b"<john+@x.org>", "u=john" + X, ""),
    (b"<+john@x.org>", "u=%2Bjohn" + X, ""),
    (b"<+@x.org>", "u=%2B" + X, ""),
    (b'<"john+a b"@x.org>', "u=john" + X, ""),
    ("<jörg@x.org>".encode(), "u=j%C3%B6rg" + X, "j?rg@x.org"),
    ("<JÖRG@EXÄMPLE.com>".encode(), "u=j%C3%96rg&d=ex%C3%84mple.com", "J?RG@EX?MPLE.com"),
    ("<\u212aim\u0130@x.org>".encode(), "u=%E2%84%AAim%C4%B0" + X, "?im?@x.org"),
    (b"<j\xf6rg@x.org>", "u=j%F6rg" + X, "j?rg@x.org"),
    (b"<a%b@x.org>", "u=a%25b" + X, "a?b@x.org"),
    (b"<a%%s%n@x.org>", "u=a%25%25s%25n" + X, "a??s?n@x.org"),
    (b"<a&u=b#c/d@x.org>", "u=a%26u%3Db%23c%2Fd" + X, ""),
    (b"<../../etc/passwd@x.org>", "u=..%2F..%2Fetc%2Fpasswd" + X, ""),
    (b"<a\r\nb\x7f@x.org>", "u=a%0D%0Ab%7F" + X, "a??b?@x.org"),
    (b"<a\x1b[1mb@x.org>", "u=a%1B%5B1mb" + X, "a?[1mb@x.org"),
    (b"<john@x.org&d=y.org>", "u=john&d=x.org%26d%3Dy.org", ""),
    (b"<{address}@x.org>", "u=%7Baddress%7D" + X, ""),
]


def addresses() -> list[Case]:
    """Make the cases of ADDRESSES, whose replies are compared to the end."""
    cases = []
    for given, query, address in ADDRESSES:
        address = address or given.decode().removeprefix("<").removesuffix(">")
        reply = f"{EXCEEDED}{address}, try again later" if query else ""
        cases.append(Case(recipient=given, asked=query, reply=reply))
    long = "x" * 1000  # more than a reply holds
    query = f"u={long}{X}"
    return [*cases, Case(recipient=f"<{long}@x.org>", asked=query, reply=EXCEEDED + "x" * 100)]


EXEMPT = "--exempt boss --exempt Abuse@Example.com --exempt a+b@example.com --exempt dash-x"
SERVED = f"--backend example.com,Example.ORG=URL {EXEMPT}"
DASH = "--recipient-delimiter - --exempt dash-x"


def unasked(options: str, *recipients: str) -> list[Case]:
    """Make cases of recipients who are let through without a question."""
    return [Case(options=options, recipient=f"<{to}>", reply="", asked="") for to in recipients]


NAMES = [
    *unasked(SERVED, "postmaster", "Postmaster@example.com", "POSTMASTER+x@example.org"),
    *unasked(SERVED, "boss@example.com", "boss+x@example.org", "abuse@example.com"),
    *unasked(SERVED, "john@elsewhere.net", "john", "a+b@example.com", "john@sub.example.com"),
    Case(options=SERVED, recipient="<abuse@example.org>"),
    Case(options=SERVED, recipient="<a@example.com>"),
    Case(options=SERVED, recipient="<postmasters@EXAMPLE.org>"),
    Case(options=SERVED, recipient="<x@example.com.>"),
    *unasked(DASH, "postmaster@x.org", "PostMaster@x.org", "dash-x@x.org"),
    Case(options=DASH, recipient="<john-a+b@x.org>", asked="u=john" + X),
    Case(options=DASH, recipient="<dash-y@x.org>", asked="u=dash" + X),
    Case(options=DASH, recipient="<-john@x.org>", asked="u=-john" + X),
    Case(
        options='--recipient-delimiter ""', recipient="<john-a+b@x.org>", asked="u=john-a%2Bb" + X
    ),
    Case(options="--recipient-delimiter +-", recipient="<john-a+b@x.org>", asked="u=john" + X),
    Case(options="--recipient-delimiter ]^", recipient="<john]a@x.org>", asked="u=john" + X),
    Case(options="--case-sensitive", recipient="<John@X.org>", asked="u=John" + X),
]

ANSWERS = [
    # (line, verdict, fields of the log)
    (b"OK john 5 100\n", "ok", "used=5 quota=100"),
    (b"OK john 5 100\r\n", "ok", "used=5 quota=100"),
    (b"OK john 5 100", "ok", "used=5 quota=100"),
    (b"OVERQUOTA john 101 100\n", "overquota", "used=101 quota=100"),
    (b"UNKNOWN john 0 100\n", "unknown", "used=0 quota=100"),
    (b"UNKNOWN john\n", "unknown", "used=- quota=-"),
    (b"UNKNOWN\n", "unknown", "used=- quota=-"),
    (b"OVERQUOTA\n", "overquota", "used=- quota=-"),
    (b"OK john  209715200\n", "ok", "used=- quota=209715200"),
    (b"OK john 5 \n", "ok", "used=5 quota=-"),
    (b"OK john 5\n", "ok", "used=- quota=-"),  # used or quota? it does not say
    (b"OVERQUOTA john 5\n", "overquota", "used=- quota=-"),
    (b"OK john\n", "ok", "used=- quota=-"),
    (b"OK 123\n", "ok", "used=- quota=-"),
    (b"OK OVERQUOTA 5 100\n", "ok", "used=5 quota=100"),
    (b"OVERQUOTA OK 101 100\n", "overquota", "used=101 quota=100"),
    (b"OK a b c 5 100\n", "ok", "used=5 quota=100"),
    (b"OK j\xf6rg 5 100\n", "ok", "used=5 quota=100"),
    (b"OK john -5 100\n", "ok", "used=- quota=100"),
    (b"OK john +5 1e3\n", "ok", "used=- quota=-"),
    (b"OK john 5.0 1_00\n", "ok", "used=- quota=-"),
    (b"OK john \xd9\xa1 100\n", "ok", "used=- quota=100"),  # a digit, but not an ASCII one
    (b"OK john 5 100\nOVERQUOTA john 5 1\n", "ok", "used=5 quota=100"),
    (b"OK " + b"x" * 3000 + b" 5 100\n", "ok", "used=5 quota=100"),
    (b"", "fault", ""),
    (b"\n", "fault", ""),
    (b"\nOK john 5 100\n", "fault", ""),
    (b" OK john 5 100\n", "fault", ""),
    (b"ok john 5 100\n", "fault", ""),
    (b"OKAY john 5 100\n", "fault", ""),
    (b"OK\tjohn 5 100\n", "fault", ""),
    (b"ERROR no such thing\n", "fault", ""),
    (b"<html><body>OVERQUOTA</body></html>\n", "fault", ""),
    (b"\x00\xff\xfe\x80binary", "fault", ""),
    (b"OK " + b"x" * 3_000_000, "fault", ""),
]


def raw(status: bytes, body: bytes, *header: bytes) -> bytes:
    """Make a raw response."""
    return b"\r\n".join([b"HTTP/1.1 " + status, *header, b"", body])


LINE = b"OVERQUOTA x 9 8\n"
CHUNKED = b"Transfer-Encoding: chunked"
KEEP = b"Keep-Alive: timeout=10"
RESPONSES = [
    # (response, verdict, fields of the log); some numbers are cut, or might be
    (raw(b"200 OK", LINE), "overquota", "used=9 quota=8"),
    (raw(b"200 OK", LINE[:-1], b"Content-Type: text/html"), "overquota", "used=- quota=-"),
    (raw(b"200 OK", LINE, b"Content-Length: 16"), "overquota", "used=9 quota=8"),
    (
        raw(b"200 OK", b"7\r\nOVERQUO\r\n8\r\nTA x 9 8\r\n0\r\n\r\n", CHUNKED),
        "overquota",
        "used=9 quota=8",
    ),
    *(
        (raw(status, LINE, *header), "fault", "used=- quota=-")
        for status, *header in (
            (b"500 Oops",),
            (b"404 Not Found",),
            (b"401 Unauthorized",),
            (b"206 Partial",),
            (b"302 Found", b"Location: /"),
            (b"301 Moved", b"Location: file:///etc/passwd"),
            (b"OVERQUOTA",),
            (b"200 OK", *[b"X: y"] * 1000),
            (b"200 OK", b"X: " + b"y" * 200_000),
        )
    ),
    (raw(b"204 No Content", b""), "fault", ""),
]
CUT = [
    # responses that end too early: their quota is not what the sender of a large message is told
    raw(b"200 OK", b"OK x 100 20"),
    raw(b"200 OK", b"OK x 100 20", b"Content-Length: -1"),
    raw(b"200 OK", b"OK x 100 20", b"Content-Length: 17"),
    raw(b"200 OK", b"OK x 100 20", b"Content-Length: 17", KEEP),
    raw(b"200 OK", b"b\r\nOK x 100 20\r\n", CHUNKED),
    raw(b"200 OK", b"b\r\nOK x 100 20", CHUNKED),
    raw(b"200 OK", b"11\r\nOK x 100 20", CHUNKED),
    raw(b"200 OK", b"b\r\nOK x 100 20\r\n7\r\n97", CHUNKED),
    raw(b"200 OK", b"OK x 100 20", b"Content-Length: x"),
]
UNKNOWN_REPLY = "550 5.1.1 No {address} here"
REPLY_OF = {"ok": "", "overquota": EXCEEDED, "unknown": "550 5.1.1 No u", "fault": "451 4.3.0 "}


def answers(rows: list[tuple[bytes, str, str]]) -> list[Case]:
    """Make the cases of a table of answers."""
    options = f"--on-error tempfail --unknown-reply '{UNKNOWN_REPLY}'"
    return [
        Case(answer, options, reply=REPLY_OF[verdict], log=f"verdict={verdict} {log}")
        for answer, verdict, log in rows
    ]


SIZES = [
    # (answer, parameters of MAIL, beginning of the reply)
    (b"OK %s 90 100\n", "SIZE=10", ""),
    (b"OK %s 90 100\n", "SIZE=11", "452 4.2.2"),
    (b"OK %s 90 100\n", "BODY=8BITMIME size=11", "452 4.2.2"),
    (b"OK %s 90 100\n", "SIZE=100", "452 4.2.2"),
    (b"OK %s 90 100\n", "SIZE=101", "552 5.2.3"),
    (b"OVERQUOTA %s 110 100\n", "SIZE=101", "552 5.2.3"),
    (b"OVERQUOTA %s 110 100\n", "SIZE=1", "452 4.2.2"),
    (b"OK %s 90 0\n", "SIZE=99999999999999999999", ""),
    (b"OK %s 90 100\n", "SIZE=0", ""),
    (b"OK %s 100 100\n", "SIZE=0", ""),
    (b"OK %s  100\n", "SIZE=50", ""),
    (b"OK %s  100\n", "SIZE=101", "552 5.2.3"),
    (b"OK %s 90 \n", "SIZE=500", ""),
    (b"OK %s 90 100\n", "SIZE=-5", ""),
    (b"OK %s 90 100\n", "SIZE=+50", ""),
    (b"OK %s 90 100\n", "SIZE=1e9", ""),
    (b"OK %s 90 100\n", "SIZE=5_0", ""),
    (b"OK %s 90 100\n", "SIZE=\u0665\u0660\u0660", ""),
    (b"OK %s 90 100\n", "SIZE=" + "9" * 500, ""),
    (b"OK %s 90 100\n", "SIZE", ""),
    (b"UNKNOWN %s 90 100\n", "SIZE=500", ""),
]


def sizes() -> list[Case]:
    """Make the cases of SIZES, and each again where sizes do not matter."""
    cases = [Case(answer, "", None, size, reply) for answer, size, reply in SIZES]
    return cases + [
        Case(answer, "--ignore-size", None, size, EXCEEDED if answer[:2] == b"OV" else "")
        for answer, size, _ in SIZES
    ]


REPLIES = (
    "--overquota-reply '552 5.2.2 {address} is full ({address})'"
    " --unknown-reply '450 4.1.1 No user here' --toolarge-reply '452 4.2.2 big'"
)
LONG_REPLY = "--overquota-reply '452 4.2.2 " + "{address} " * 20 + "'"
TABLES: dict[str, list[Case]] = {
    "addresses": addresses(),
    "names that are exempt, have no backend or a delimiter": NAMES,
    "answers": answers(ANSWERS),
    "responses": answers(RESPONSES),
    "answers that are cut": [
        Case(answer, parameters="SIZE=500", reply="", log="used=- quota=-") for answer in CUT
    ],
    "sizes": sizes(),
    "replies": [
        Case(FULL, REPLIES, "<full@x.org>", reply="552 5.2.2 full@x.org is full (full@x.org)"),
        Case(b"UNKNOWN %s\n", REPLIES, reply="450 4.1.1 No user here"),
        Case(b"OK %s 10 100\n", REPLIES, parameters="SIZE=101", reply="452 4.2.2 big"),
        Case(FULL, LONG_REPLY, f"<{'x' * 400}@x.org>", reply="452 4.2.2 xxx"),
        Case(FULL, "--dry-run", reply="", log="verdict=overquota used=101 dry_run=yes"),
    ],
}


@pytest.mark.parametrize("table", TABLES)
def test_every_case_is_asked_about_answered_and_logged_as_it_says(
    table: str, backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    run_cases(TABLES[table], backend, milter)


def test_a_size_concerns_one_message(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = b"OK %s 90 100\n"
    with milter(backend).session() as session:
        session.mail("<a@example.net>", "SIZE=11")
        assert session.rcpt("<john@example.com>").startswith("452")
        session.abort()
        session.mail("<a@example.net>")
        assert session.rcpt("<john@example.com>") == ""


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


def test_a_ten_line_server_that_would_keep_the_connection_open_is_told_to_close(
    start: Callable[..., Process], milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    script = tmp_path / "backend.py"
    script.write_text(TEN_LINES)
    port = free_port()
    start(PYTHON, script, str(port), port=port)
    url = f"http://127.0.0.1:{port}/"
    running = milter(None, "--backend", url, "--on-error", "tempfail", *UNCACHED)
    for _ in range(3):
        assert running.rcpt("<john@example.com>").startswith("452")


def test_the_milter_listens_on_ipv6(backend: Backend, start: Callable[..., Process]) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        if probe.connect_ex(("::1", 1)) == errno.EADDRNOTAVAIL:
            missing("this machine has no IPv6")
    port = free_port()
    process = start(PYTHON, MILTER, "--listen", f"inet6:{port}@::1", "--backend", backend.url)

    def connected() -> Optional[socket.socket]:
        with contextlib.suppress(OSError):
            return socket.create_connection(("::1", port), timeout=60)
        return None

    with MilterSession(wait_for(connected, "the milter on ::1")) as session:
        session.mail()
        assert session.rcpt("<john@example.com>") == ""
    assert backend.users() == ["john"] and process.stop() == 0


# ---- options ----


def run_milter(*arguments: Path) -> tuple[int, str, str]:
    """Run the milter to its end: exit status, output, errors."""
    command = [PYTHON, str(MILTER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


NO_REPLIES = [
    *("", "full", "250 2.0.0 fine", "452 5.2.2 classes differ", "452 4.2.2 100% full", "552"),
    *("452 4.2.2 {adress}", "452 4.2.2 two\nlines", "452 4.2.2 v\u00f6ll", "550 5.1.1"),
    *("421 4.2.2 ends the session", "421 4.3.2 {address}"),  # Postfix hangs up on its client
    *("4\u0665\u0662 4.2.2 x", "452 4.\u0662.2 x", "452 4.2.\uff12 x"),  # digits, but not ASCII
]
BAD_OPTIONS = {
    "listen": ["8894", "inet:0@127.0.0.1", "inet:65536@127.0.0.1", "unix:relative"]
    + ["inet:\u0668\u0668\u0669\u0664@127.0.0.1"],
    "timeout": ["0", "-1", "nan", "inf", "soon", "\u0665", "1_0"],
    "retry-after": ["-1", "\u0665"],
    "max-queries": ["0", "1.5", "1_6", "\u0661\u0666"],
    "cache-ttl": ["x", "6_0"],
    "on-error": ["reject"],
    "overquota-reply": NO_REPLIES,
    "toolarge-reply": NO_REPLIES[-6:],
    "unknown-reply": NO_REPLIES[-6:],
    "inactive-reply": NO_REPLIES[-6:],
    "backend": ["ftp://127.0.0.1/", "http:///path", "http://127.0.0.1:99999/", "http://a b/"]
    + ["a,,b=http://127.0.0.1/", "http://127.0.0.1:8\u0660/"],
    "exempt": ["", "@example.com"],
    "cafile": ["/nonexistent", "/etc/passwd"],
    "aliases": ["/nonexistent", "/etc", "/bin/sh", "/dev/null"],
    "time": ["5"],
    "nonsense": ["5"],
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_a_bad_value_ends_the_start_with_one_line_that_names_the_option(option: str) -> None:
    for value in BAD_OPTIONS[option]:
        status, output, errors = run_milter(f"--{option}={value}")
        assert (status, output, len(errors.splitlines())) == (2, "", 1), value
        assert f"--{option}" in errors and "Traceback" not in errors, value


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--listen inet:8894@192.0.2.1", "--listen"),
        ("--listen unix:/nonexistent/folder/socket", "--listen"),
        ("--listen unix:/etc/passwd", "--listen"),
        ("backend http://user:se/cret@127.0.0.1/", "backend"),
        ("--backand http://user:se/cret@127.0.0.1/", "--backand"),
        ("--on-error http://user:se/cret@127.0.0.1/", "--on-error"),
        ("--timeout http://user:se/cret@127.0.0.1/", "--timeout"),
        ("@/nonexistent", "/nonexistent"),
        ("stray", "stray"),
    ],
)
def test_a_start_that_fails_says_why_in_one_line_without_a_password(
    arguments: str, named: str
) -> None:
    status, output, errors = run_milter(*arguments.split())
    assert (status, output, len(errors.splitlines())) == (2, "", 1)
    assert named in errors and "Traceback" not in errors and "cret" not in errors


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


@pytest.mark.parametrize("text", ["@FILE\n", "\xff\n"])
def test_a_bad_option_file_ends_the_start_with_one_line(tmp_path: pathlib.Path, text: str) -> None:
    file = tmp_path / "options"
    file.write_bytes(text.replace("FILE", str(file)).encode("latin-1"))
    status, output, errors = run_milter(f"@{file}")
    assert (status, output, len(errors.splitlines())) == (2, "", 1)
    assert "Traceback" not in errors and "recursion" not in errors


@pytest.mark.parametrize(
    ("users", "status", "last"),
    [
        ("john mary", 0, "verdict=ok used=10 quota=100 cached=no ms=0 reply=none"),
        ("john full", 1, f"reply={EXCEEDED}full@x.org, try again later"),
        ("full broken", 2, "verdict=fault"),
    ],
)
def test_check_prints_verdicts_and_replies_and_its_status_sums_them_up(
    users: str, status: int, last: str, backend: Backend
) -> None:
    backend.answers.update({b"full": FULL, b"broken": b"nonsense\n"})
    given = [f"{user}@x.org" for user in users.split()]
    found, output, errors = run_milter("--backend", backend.url, "--check", *given)
    lines = re.sub(r"\bms=\d+", "ms=0", output).splitlines()
    assert (found, errors) == (status, "")
    assert last in lines[-1] and len(lines) == len(given)
    assert backend.users() == users.split()


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
    toolarge-reply unknown-reply ignore-size in-flight frontends inactive-after inactive-reply
    recipient-delimiter case-sensitive exempt aliases cafile dry-run check metrics syslog verbose
    version""".split()


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
    file = tmp_path / "aliases"
    file.write_text(ALIAS_FILE)
    domains = "example.com,example.org,all.org,moved.org,loop.org,pool.org"
    options = f"--backend {domains}=URL --aliases {file}"
    cases = []
    for recipient, mailbox in ALIASED:
        reply = f"{EXCEEDED}{recipient}, try again later" if mailbox else ""
        query = "u={}&d={}".format(*mailbox.split("@")) if mailbox else ""
        cases.append(Case(FULL, options, f"<{recipient}>", reply=reply, asked=query))
    run_cases(cases, backend, milter)
    started = milter(backend, "--aliases", file)
    assert re.search(
        r"state=incomplete skipped=1 line=\d+", started.log(f"aliases={file} state=inc")
    )


def test_a_name_without_a_domain_is_no_alias_in_a_domain_that_no_backend_serves(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    backend.default = FULL
    (tmp_path / "aliases").write_text("support: john\nsales@virtual.net john@example.com\n")
    options = "--backend", f"example.com={backend.url}", "--aliases", tmp_path / "aliases"
    running = milter(None, *options)
    assert running.rcpt("<support@gmail.com>") == ""
    assert running.rcpt("<support+x@gmail.com>") == "" and backend.asked == []
    for recipient in "support@example.com", "sales@virtual.net":
        assert running.rcpt(f"<{recipient}>").startswith(EXCEEDED + recipient)


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
    reload(running)
    assert asked() == "fred", "the alias after HUP"


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


def test_an_alias_file_that_is_being_written_is_not_read_half(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "aliases"
    file.write_text("first: john\nlast: john\n")
    running = milter(backend, "--aliases", file, *UNCACHED)

    def asked() -> str:
        running.rcpt("<last@example.com>")
        return backend.users()[-1]

    with open(file, "w") as slow:
        for line in ["first: mary\n", *["# more\n"] * 15, "last: mary\n"]:
            slow.write(line)
            slow.flush()
            time.sleep(0.3)
            assert asked() == "john"
    wait_for(lambda: asked() == "mary", "the whole file")


# ---- tables as aliases ----

TABLE_DOMAINS = "example.com,example.org,all.org,moved.org,loop.org,pool.org"
TABLE_ROWS = {
    # Postfix's virtual(5): name, what it stands for
    "sales@example.com": "john@example.com",
    "sales+x@example.com": "mary@example.com",
    "support@example.com": "sales@example.org",
    "sales@example.org": "sales@example.com",
    "bare@example.com": "john",
    "local": "john@example.com",
    "-": "john@example.com",
    "a#x@example.com": "john@example.com",
    "list@example.com": "john@example.com, mary@example.com",
    "two@example.com": "john@example.com mary@example.com",
    "far@example.com": "list@example.com",
    "prog@example.com": "|/bin/true",
    "file@example.com": "/var/mail/john",
    "include@example.com": ":include:/etc/list",
    "error@example.com": "error:nouser",
    "out@example.com": "john@elsewhere.net",
    "self@example.com": "self@example.com",
    "loop1@example.com": "loop2@example.com",
    "loop2@example.com": "loop1@example.com",
    '"a b"@example.com': "john@example.com",
    "info@virtual.net": "john@example.com",
    "john@all.org": "john@all.org",
    "@all.org": "mary@example.com",
    "@moved.org": "@example.com",
    "@loop.org": "@pool.org",
    "@pool.org": "@loop.org",
}
TABLED = [
    # (recipient, mailbox that is asked about, None: none)
    ("sales@example.com", "john@example.com"),
    ("SALES@Example.COM", "john@example.com"),
    ("sales+x@example.com", "mary@example.com"),
    ("sales+y@example.com", "john@example.com"),
    ("support@example.com", "john@example.com"),
    ("bare@example.com", "john@example.com"),
    ("local@example.com", "john@example.com"),
    ("local@example.org", "john@example.com"),
    ("local+x@example.org", "john@example.com"),
    ("local@virtual.net", None),
    ("-@example.com", "john@example.com"),
    ("a#x@example.com", "john@example.com"),
    ("list@example.com", None),
    ("two@example.com", None),
    ("far@example.com", None),
    ("prog@example.com", None),
    ("file@example.com", None),
    ("include@example.com", None),
    ("error@example.com", None),
    ("out@example.com", None),
    ("self@example.com", "self@example.com"),
    ("loop1@example.com", None),
    ("loop2@example.com", None),
    ('"a b"@example.com', "john@example.com"),
    ("info@virtual.net", "john@example.com"),
    ("john@all.org", "john@all.org"),
    ("anybody@all.org", "mary@example.com"),
    ("paul@moved.org", "paul@example.com"),
    ("sales@moved.org", "john@example.com"),
    ("x@loop.org", None),
    ("nobody@example.com", "nobody@example.com"),
    ("o'neill@example.com", "o'neill@example.com"),
    ("postmaster@all.org", None),
]
SQL_ROWS = [
    *TABLE_ROWS.items(),
    ("rows@example.com", "john@example.com"),
    ("rows@example.com", "mary@example.com"),
    ("empty@example.com", ""),
    ("forger@example.com", "mary@example.com\nvictim@example.com\tjohn@example.com"),
    ("megabyte@example.com", "john@example.com," * 60_000),
]
SQL = "".join(
    ["CREATE TABLE aliases (name varchar(200), target text);\n"]
    + [f"INSERT INTO aliases VALUES ('{name}', '{target}');\n" for name, target in SQL_ROWS]
)
QUERY = "query = SELECT target FROM aliases WHERE name = '%s'\n"


def indexed_table(kind: str, file: pathlib.Path, rows: Mapping[str, str]) -> str:
    """Make a table as an administrator does, with postmap; return its TYPE:NAME."""
    lines = (f"{name} {value}\n" for name, value in rows.items())
    file.write_text("".join(lines))
    os.utime(file, (0, 0))  # postmap waits where a file has changed in the last second
    if kind != "texthash":
        subprocess.run([need("postmap", "postfix"), f"{kind}:{file}"], check=True)
    return f"{kind}:{file}"


def sqlite_table(folder: pathlib.Path) -> str:
    """Make a database in a file."""
    need("/usr/share/doc/postfix-sqlite", "postfix-sqlite")
    database = folder / "aliases.db"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.executescript(SQL)
    file = folder / "my sqlite.cf"
    file.write_text(f"dbpath = {database}\n{QUERY}")
    os.utime(file, (0, 0))
    return f"sqlite:{file}"


@pytest.fixture(scope="module")
def mariadb() -> Iterator[pathlib.Path]:
    """Give the folder of a MariaDB of its own, with a socket and Postfix's file for it."""
    need_root()
    need("/usr/share/doc/postfix-mysql", "postfix-mysql")
    server = need("mariadbd", "mariadb-server")
    with open_folder() as folder:
        shutil.chown(folder, "mysql", "mysql")
        install = ["--no-defaults", "--user=mysql", "--skip-test-db", f"--datadir={folder}/data"]
        install += ["--auth-root-authentication-method=normal"]
        prepared = subprocess.run(["mariadb-install-db", *install], capture_output=True)
        assert prepared.returncode == 0, prepared
        options = [f"--datadir={folder}/data", f"--socket={folder}/socket", "--skip-networking"]
        options += [f"--pid-file={folder}/pid", "--innodb-buffer-pool-size=8M"]
        program = [*as_user("mysql"), server, "--no-defaults", *options]
        process = Process([*program], folder / "log")
        try:
            process.wait_ready((folder / "socket").exists, "MariaDB")
            client = ["mariadb", "--no-defaults", f"--socket={folder}/socket", "--user=root"]
            grant = "CREATE DATABASE mail; USE mail; GRANT SELECT ON mail.* TO 'mta'@'localhost'"
            sql = f"{grant} IDENTIFIED BY 'secret';\n" + SQL.replace("text)", "longtext)")
            subprocess.run(client, input=sql.encode(), check=True)
            login = f"hosts = unix:{folder}/socket\nuser = mta\npassword = secret\ndbname = mail\n"
            (folder / "aliases.cf").write_text(login + QUERY)
            yield folder
        finally:
            process.stop()


@pytest.fixture(scope="module")
def postgresql() -> Iterator[pathlib.Path]:
    """Give the folder of a PostgreSQL of its own, with a socket and Postfix's file for it."""
    need_root()
    need("/usr/share/doc/postfix-pgsql", "postfix-pgsql")
    found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))
    programs = found[-1] if found else pathlib.Path("/usr/lib/postgresql/bin")
    server = need(str(programs / "postgres"), "postgresql")
    with open_folder() as folder:
        shutil.chown(folder, "postgres", "postgres")
        init: list[Path] = [programs / "initdb", "-D", folder / "data", "-A", "trust", "-E", "UTF8"]
        init += ["--no-sync", "--no-locale"]
        user: dict[str, Any] = {"cwd": folder, "check": True}
        subprocess.run([*as_user("postgres"), *init], capture_output=True, **user)
        options: list[Path] = ["-D", folder / "data", "-c", "listen_addresses=", "-c", "fsync=off"]
        options += ["-c", f"unix_socket_directories={folder}"]
        program = [*as_user("postgres"), server, *options]
        process = Process([*program], folder / "log", cwd=folder)
        try:
            process.wait_ready(lambda: "is ready to accept" in process.output(), "PostgreSQL")
            client: list[Path] = [programs / "psql", "-q", "-h", folder, "-U", "postgres"]
            subprocess.run(client, input=SQL.encode(), **user)
            login = f"hosts = unix:{folder}\nuser = postgres\ndbname = postgres\n"
            (folder / "aliases.cf").write_text(login + QUERY)
            yield folder
        finally:
            process.stop(signal.SIGINT)


@pytest.fixture
def table(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
    """Give a table of the type that is the parameter, with the rows above, as TYPE:NAME."""
    kind = request.param
    if kind in ("mysql", "pgsql"):
        folder = request.getfixturevalue({"mysql": "mariadb", "pgsql": "postgresql"}[kind])
        return f"{kind}:{folder}/aliases.cf"
    if kind == "lmdb":
        need("/usr/share/doc/postfix-lmdb", "postfix-lmdb")
    return (
        sqlite_table(tmp_path)
        if kind == "sqlite"
        else indexed_table(kind, tmp_path / "my table", TABLE_ROWS)
    )


class TableServer:
    """A table that Postfix asks over TCP, as tcp_table(5) or socketmap_table(5)."""

    def __init__(self) -> None:
        self.answers: dict[bytes, Any] = {}  # a value, or what to do; others are not found
        self.asked: list[str] = []
        self.open = self.most = 0  # connections
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=600)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        """Serve each connection in a thread."""
        with contextlib.suppress(OSError):
            while True:
                connection = self.listener.accept()[0]
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        """Answer the questions of a connection until its end."""
        with self.lock:
            self.open += 1
            self.most = max(self.most, self.open)
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as questions:
            while True:
                start = questions.read(1)
                if start == b"g":  # get KEY
                    line = questions.readline().split(b" ", 1)[1]
                    key = urllib.parse.unquote_to_bytes(line.rstrip(b"\n"))
                    answer = self.answer(key)
                    connection.sendall(b"500 no\n" if answer is None else b"200 %s\n" % answer)
                elif start:  # LENGTH:NAME KEY,
                    length = b""
                    while start != b":":
                        length, start = length + start, questions.read(1)
                    key = questions.read(int(length) + 1)[:-1].split(b" ", 1)[1]
                    answer = self.answer(key)
                    text = b"NOTFOUND " if answer is None else b"OK " + answer
                    connection.sendall(b"%d:%s," % (len(text), text))
                else:
                    break
        with self.lock:
            self.open -= 1

    def answer(self, key: bytes) -> Optional[bytes]:
        """Note a key and give its value."""
        self.asked.append(key.decode())
        value: Any = self.answers.get(key, self.answers.get(b"*"))
        found: Optional[bytes] = value() if callable(value) else value
        return found

    def hang(self) -> bytes:
        """Say nothing until the end of the test."""
        self.ended.wait(600)
        raise OSError("too late")


@pytest.fixture
def table_server() -> Iterator[TableServer]:
    """Give a table that says what a test tells it to."""
    need("postmap", "postfix")
    server = TableServer()
    yield server
    server.ended.set()
    server.listener.close()


class AliasedMilter:
    """A milter that is given tables, and a backend that calls every mailbox full."""

    def __init__(self, backend: Backend, milter: Callable[..., RunningMilter]) -> None:
        backend.default = FULL
        self.backend, self.milter = backend, milter
        self.running: RunningMilter

    def start(self, *tables: Path, options: tuple[Path, ...] = (), **popen: Any) -> RunningMilter:
        """Start the milter."""
        arguments = ["--backend", f"{TABLE_DOMAINS}={self.backend.url}", *options]
        for table in tables:
            arguments += ["--aliases", table]
        self.running = self.milter(None, *arguments, **popen)
        return self.running

    def mailbox(self, recipient: Union[str, bytes]) -> Optional[str]:
        """Give a recipient; return the mailbox that was asked about, None where none was."""
        before = len(self.backend.asked)
        raw = recipient if isinstance(recipient, bytes) else recipient.encode()
        reply = self.running.rcpt(b"<%s>" % raw)
        asked = self.backend.asked[before:]
        if not asked:
            assert reply == "", (recipient, reply)
            return None
        assert len(asked) == 1, asked
        if isinstance(recipient, str):
            assert reply == quota_exceeded(recipient)
        fields = urllib.parse.parse_qs(asked[0].split(b" ")[1].split(b"?")[1].decode())
        return fields["u"][0] + "@" + fields["d"][0]

    def children(self) -> list[int]:
        """Return the processes that the milter has started and that are not gone."""
        tasks = pathlib.Path(f"/proc/{self.running.process.popen.pid}/task")
        found: list[int] = []
        for task in tasks.iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (task / "children").read_text().split())
        return found


@pytest.fixture
def aliased(backend: Backend, milter: Callable[..., RunningMilter]) -> AliasedMilter:
    """Give a milter that a test starts with its tables."""
    return AliasedMilter(backend, milter)


NO_CACHE: tuple[Path, ...] = ("--cache-ttl", "0", "--in-flight", "0", "--timeout", "20")
CANNOT_CHECK = "451 4.3.0 "


@pytest.mark.parametrize(
    "table", ["hash", "btree", "lmdb", "texthash", "sqlite", "mysql", "pgsql"], indirect=True
)
def test_every_kind_of_table_leads_to_the_mailbox(table: str, aliased: AliasedMilter) -> None:
    aliased.start(table, options=NO_CACHE)
    found = [(recipient, aliased.mailbox(recipient)) for recipient, _ in TABLED]
    assert found == TABLED


@pytest.mark.parametrize("table", ["sqlite", "mysql", "pgsql"], indirect=True)
def test_what_only_a_database_answers_leads_to_no_wrong_mailbox(
    table: str, aliased: AliasedMilter
) -> None:
    running = aliased.start(table, options=(*NO_CACHE, "--on-error", "tempfail"))
    assert aliased.mailbox("rows@example.com") is None
    assert aliased.mailbox("empty@example.com") == "empty@example.com"
    assert aliased.mailbox("victim@example.com") == "victim@example.com"
    for recipient in "forger@example.com", "megabyte@example.com":
        assert running.rcpt(f"<{recipient}>")[:10] in ("", "451 4.3.0 "), recipient
    assert not set(aliased.backend.users()) & {"forger", "megabyte", "john"}
    assert aliased.mailbox("sales@example.com") == "john@example.com"
    big = pathlib.Path(f"/proc/{running.process.popen.pid}/status").read_text()
    assert int(re.findall(r"VmHWM:\s+(\d+)", big)[0]) < 100_000


PATTERNS = r"""
/^(.*)@moved\.org$/  $1@example.com
/^sales@example\.com$/  john@example.com
/^sales$/  mary@example.com
/^@all\.org$/  mary@example.com
/^two@/  john@example.com, mary@example.com
/^loop@/  loop@example.com
/^plus\+x@example\.com$/  mary@example.com
"""


@pytest.mark.parametrize("kind", ["pcre", "regexp"])
def test_a_table_of_patterns_is_asked_about_the_whole_address_alone(
    aliased: AliasedMilter, tmp_path: pathlib.Path, kind: str
) -> None:
    need("/usr/share/doc/postfix-pcre", "postfix-pcre")
    file = tmp_path / "my patterns"
    file.write_text(PATTERNS)
    aliased.start(f"{kind}:{file}", options=NO_CACHE)
    for recipient, mailbox in (
        ("paul@moved.org", "paul@example.com"),
        ("sales@example.com", "john@example.com"),
        ("Sales@example.com", "john@example.com"),
        ("sales+x@example.com", "sales@example.com"),
        ("sales@example.org", "sales@example.org"),
        ("anybody@all.org", "anybody@all.org"),
        ("two@example.org", None),
        ("loop@example.com", "loop@example.com"),
        ("plus+x@example.com", "mary@example.com"),
        ("plus+y@example.com", "plus@example.com"),
    ):
        assert aliased.mailbox(recipient) == mailbox, recipient


@pytest.mark.parametrize("kind", ["tcp:127.0.0.1:{}", "socketmap:inet:127.0.0.1:{}:aliases"])
def test_a_table_on_the_network_is_asked_about_the_whole_address_alone(
    aliased: AliasedMilter, table_server: TableServer, kind: str
) -> None:
    table_server.answers[b"sales+x@example.com"] = b"john@example.com"
    table_server.answers[b"twice@example.com"] = b"sales+x@example.com"
    aliased.start(kind.format(table_server.port), options=NO_CACHE)
    assert aliased.mailbox("Sales+x@Example.com") == "john@example.com"
    assert table_server.asked[0].lower() == "sales+x@example.com"
    assert {key.lower() for key in table_server.asked} == {
        "sales+x@example.com",
        "john@example.com",
    }
    assert aliased.mailbox("twice@example.com") == "john@example.com"
    before = len(table_server.asked)
    assert aliased.mailbox("other+y@example.com") == "other@example.com"
    assert table_server.asked[before:] == ["other+y@example.com"]
    before = len(table_server.asked)
    assert aliased.mailbox("postmaster@example.com") is None
    assert aliased.mailbox("") is None
    assert table_server.asked[before:] == []


def test_files_and_tables_stand_beside_each_other_in_their_order(
    aliased: AliasedMilter, tmp_path: pathlib.Path
) -> None:
    file, options = tmp_path / "aliases", tmp_path / "options"
    file.write_text("support@example.com mary\nfirst: sales\nlast: john\n")
    table = indexed_table("hash", tmp_path / "my table", {**TABLE_ROWS, "last@example.com": "paul"})
    options.write_text(f"--aliases {file}\n--aliases {table}  # the name has a space\n")
    aliased.start(options=(f"@{options}", *NO_CACHE))
    assert aliased.mailbox("support@example.com") == "mary@example.com"
    assert aliased.mailbox("first@example.com") == "john@example.com"
    assert aliased.mailbox("last@example.com") == "paul@example.com", "it is more specific"


@pytest.mark.parametrize("table", ["hash", "sqlite"], indirect=True)
def test_hostile_recipients_reach_no_other_name_in_a_table(
    table: str, aliased: AliasedMilter
) -> None:
    running = aliased.start(table, options=(*NO_CACHE, "--on-error", "tempfail"))
    for raw, user in (
        (b"x\nsales@example.com", b"x%0Asales"),
        (b"sales@example.com\nx@example.com", b"sales%40example.com%0Ax"),
        (b"sales@example.com\tx@example.com", b"sales%40example.com%09x"),
        (b" sales@example.com", b"(?:%20|%2B)sales"),
        (b"sales\r@example.com", b"sales%0D"),
        (b"\xff\xfe@example.com", b"%FF%FE"),
        (b"a" * 1800 + b"@example.com", b"a{1800}"),
        (b"%s@example.com", b"%25s"),
        (b"x' OR '1'='1@example.com", b"x.*"),
        (b"\xff@all.org", b"mary"),
    ):
        before = len(aliased.backend.asked)
        assert running.rcpt(b"<%s>" % raw)[:10] == "452 4.2.2 ", raw
        (line,) = aliased.backend.asked[before:]
        assert re.search(rb"[?&]u=%s[& ]" % user, line), (raw, line)


FAULTY_TABLES = {
    "missing": "hash:{folder}/nonexistent",
    "of no type": "nosuchtype:{folder}/nonexistent",
    "failing": "fail:whatever",
    "sqlite away": "sqlite:{folder}/sqlite.cf",
    "mysql away": "mysql:{folder}/mysql.cf",
    "pgsql away": "pgsql:{folder}/pgsql.cf",
    "refusing": "tcp:127.0.0.1:{free_port}",
    "hanging": "tcp:127.0.0.1:{port}",
    "another one that hangs": "socketmap:inet:127.0.0.1:{port}:aliases",
}


@pytest.mark.parametrize("kind", FAULTY_TABLES)
def test_a_table_that_cannot_be_asked_is_a_fault_of_the_recipient(
    aliased: AliasedMilter, table_server: TableServer, tmp_path: pathlib.Path, kind: str
) -> None:
    (tmp_path / "sqlite.cf").write_text(f"dbpath = {tmp_path}/nonexistent\n{QUERY}")
    for name in "mysql", "pgsql":
        (tmp_path / f"{name}.cf").write_text(f"hosts = unix:{tmp_path}/nonexistent\n{QUERY}")
    table_server.answers[b"*"] = table_server.hang
    table = FAULTY_TABLES[kind].format(
        folder=tmp_path, port=table_server.port, free_port=free_port()
    )
    running = aliased.start(table, options=("--timeout", "2", "--on-error", "tempfail"))
    assert running.rcpt("<john@example.com>")[:10] == CANNOT_CHECK
    line = running.log("recipient=john@example.com")
    assert "verdict=fault" in line and re.search(r' reason="[^"]+"', line)
    assert running.rcpt("<postmaster@example.com>") == ""
    assert aliased.backend.asked == []
    wait_for(lambda: not aliased.children(), "the end of postmap")
    assert running.process.stop() == 0
    url = ["--backend", aliased.backend.url, "--timeout", "2", "--aliases", table]
    assert run_milter(*url, "--check")[0] == 0
    status, output, _ = run_milter(*url, "--check", "john@example.com")
    assert (status, "verdict=fault" in output) == (2, True)


@pytest.mark.parametrize("table", ["mysql", "pgsql"], indirect=True)
def test_a_database_that_hangs_costs_the_timeout_once(
    table: str, aliased: AliasedMilter, folder: pathlib.Path
) -> None:
    sleep = "pg_sleep" if table.startswith("pgsql") else "SLEEP"
    text = pathlib.Path(table.partition(":")[2]).read_text().replace("target", f"{sleep}(600)")
    file = folder / "hanging.cf"
    file.write_text(text.replace(" WHERE name = '%s'", ""))
    table = f"{table.partition(':')[0]}:{file}"
    running = aliased.start(table, options=("--timeout", "2"))
    start = time.monotonic()
    assert running.rcpt("<sales@example.com>") == ""
    assert 1 < time.monotonic() - start < 10
    assert "verdict=fault" in running.log("recipient=sales@")
    wait_for(lambda: not aliased.children(), "the end of postmap")


def test_without_postmap_the_milter_starts_and_says_what_is_missing(
    backend: Backend, start: Callable[..., Process], tmp_path: pathlib.Path
) -> None:
    need_root()
    port = free_port()
    hidden = 'mount -t tmpfs none /usr/sbin && exec "$@"'
    unshare = [need("unshare", "util-linux"), "--mount", "sh", "-c", hidden, "sh"]
    table = indexed_table("hash", tmp_path / "table", {"sales@example.com": "john"})
    options = ["--listen", f"inet:{port}@127.0.0.1", "--backend", backend.url, "--aliases", table]
    running = RunningMilter(port, start(*unshare, PYTHON, MILTER, *options, port=port))
    assert running.rcpt("<sales@example.com>") == ""
    assert re.search('verdict=fault.* reason=".*postmap', running.log("recipient=sales@"))
    assert backend.asked == []


def test_a_table_of_another_user_is_a_fault_and_its_group_may_read_it(
    backend: Backend, start: Callable[..., Process], folder: pathlib.Path
) -> None:
    need_root()
    backend.default = FULL
    copy = shutil.copy(MILTER, folder / "quota_milter.py")
    table = indexed_table("hash", folder / "table", {"sales@example.com": "john@example.com"})
    os.chmod(folder / "table.db", 0o640)
    for group, reply in ("nogroup", CANNOT_CHECK), ("daemon", "452 4.2.2 "):
        shutil.chown(folder / "table.db", "root", "daemon")
        port = free_port()
        options: list[Path] = ["--listen", f"inet:{port}@127.0.0.1", "--on-error", "tempfail"]
        options += ["--backend", backend.url, "--aliases", table]
        program: list[Path] = [*as_user("nobody", group), PYTHON, copy, *options]
        running = RunningMilter(port, start(*program, port=port))
        assert running.rcpt("<sales@example.com>")[:10] == reply
    assert backend.users() == ["john"]


def test_a_table_that_comes_back_is_used_at_once(
    aliased: AliasedMilter, tmp_path: pathlib.Path
) -> None:
    running = aliased.start(f"hash:{tmp_path}/table", options=("--on-error", "tempfail"))
    assert running.rcpt("<sales@example.com>")[:10] == CANNOT_CHECK
    indexed_table("hash", tmp_path / "table", TABLE_ROWS)
    assert aliased.mailbox("sales@example.com") == "john@example.com"


def test_what_postmap_only_warns_about_is_no_fault(
    aliased: AliasedMilter, tmp_path: pathlib.Path
) -> None:
    table = indexed_table("hash", tmp_path / "table", TABLE_ROWS)
    os.utime(tmp_path / "table")  # somebody has changed the source since
    os.utime(tmp_path / "table.db", (0, 0))
    patterns = tmp_path / "patterns"
    patterns.write_text("/(/ broken\n" + PATTERNS)
    os.utime(patterns, (0, 0))
    aliased.start(table, f"regexp:{patterns}", options=(*NO_CACHE, "--on-error", "tempfail"))
    assert aliased.mailbox("nobody@example.com") == "nobody@example.com"
    assert aliased.mailbox("sales@example.com") == "john@example.com"
    assert aliased.mailbox("plus+x@example.com") == "mary@example.com"


def test_what_a_table_said_is_remembered_until_the_cache_ttl_or_hup(
    aliased: AliasedMilter, table_server: TableServer
) -> None:
    table = f"tcp:127.0.0.1:{table_server.port}"
    table_server.answers[b"sales@example.com"] = b"john@example.com"
    running = aliased.start(table, options=("--in-flight", "0"))
    recipients = "<sales@example.com>", "<nobody@example.com>"
    for recipient in recipients * 3:
        assert running.rcpt(recipient) != ""
    assert sorted(table_server.asked) == [
        f"{user}@example.com" for user in ("john", "nobody", "sales")
    ]
    table_server.answers[b"sales@example.com"] = b"mary@example.com"
    table_server.answers[b"nobody@example.com"] = b"paul@example.com"
    running.process.popen.send_signal(signal.SIGHUP)
    running.log("state=reloaded")
    for recipient, user in zip(recipients, ("mary", "paul")):
        running.rcpt(recipient)
        assert aliased.backend.users()[-1] == user


def test_what_a_table_said_is_asked_again_after_the_cache_ttl(
    aliased: AliasedMilter, table_server: TableServer
) -> None:
    table_server.answers[b"sales@example.com"] = b"john@example.com"
    table = f"tcp:127.0.0.1:{table_server.port}"
    running = aliased.start(table, options=("--cache-ttl", "1"))
    running.rcpt("<sales@example.com>")
    table_server.answers[b"sales@example.com"] = b"mary@example.com"

    def asked() -> str:
        running.rcpt("<sales@example.com>")
        return aliased.backend.users()[-1]

    wait_for(lambda: asked() == "mary", "the new answer of the table")


def test_what_a_table_said_to_a_question_from_before_hup_is_not_remembered(
    aliased: AliasedMilter, table_server: TableServer
) -> None:
    released = threading.Event()

    def late() -> bytes:
        released.wait(60)
        return b"john@example.com"

    table_server.answers[b"sales@example.com"] = late
    table = f"tcp:127.0.0.1:{table_server.port}"
    running = aliased.start(table, options=("--timeout", "30"))
    with running.session() as session:
        session.mail()
        session.send(b"R", b"<sales@example.com>\0")
        wait_for(lambda: table_server.asked, "the question")
        running.process.popen.send_signal(signal.SIGHUP)
        running.log("state=reloaded")
        table_server.answers[b"sales@example.com"] = b"mary@example.com"
        released.set()
        assert session.receive()[0] in (b"c", b"y")
    running.rcpt("<sales@example.com>")
    assert aliased.backend.users()[-1] == "mary"


def test_a_reload_changes_the_tables_and_ends_what_the_old_one_holds(
    aliased: AliasedMilter, table_server: TableServer, tmp_path: pathlib.Path
) -> None:
    table_server.answers[b"*"] = table_server.hang
    options = tmp_path / "options"
    options.write_text(f"--aliases tcp:127.0.0.1:{table_server.port}\n")
    running = aliased.start(options=(f"@{options}", "--timeout", "3", "--on-error", "tempfail"))
    assert running.rcpt("<sales@example.com>")[:10] == CANNOT_CHECK
    table = indexed_table("hash", tmp_path / "table", TABLE_ROWS)
    options.write_text(f"--aliases {table}\n")
    with running.session() as session:
        session.mail()
        session.send(b"R", b"<support@example.com>\0")
        wait_for(aliased.children, "the question")
        running.process.popen.send_signal(signal.SIGHUP)
        running.log("state=reloaded")
        assert aliased.mailbox("sales@example.com") == "john@example.com"
        assert session.receive()[0] in (b"c", b"y")
    wait_for(lambda: not aliased.children(), "the end of postmap")


def test_a_hanging_table_holds_nobody_longer_than_the_timeout(
    aliased: AliasedMilter, table_server: TableServer
) -> None:
    table_server.answers[b"*"] = table_server.hang
    table = f"tcp:127.0.0.1:{table_server.port}"
    options = ("--timeout", "2", "--on-error", "tempfail")
    running = aliased.start(table, options=options)
    descriptors = pathlib.Path(f"/proc/{running.process.popen.pid}/fd")
    assert running.rcpt("<first@example.com>")[:10] == CANNOT_CHECK
    at_rest = len(list(descriptors.iterdir()))
    sessions = [running.session() for _ in range(40)]
    for session in sessions:
        session.mail()
    start = time.monotonic()
    for number, session in enumerate(sessions):
        session.send(b"R", b"<user%d@example.com>\0" % number)
    for session in sessions:
        assert session.receive()[1].startswith(CANNOT_CHECK.encode())
    assert time.monotonic() - start < 10 + SLACK, "with what libmilter may let a session wait"
    assert 1 < table_server.most < 40, "so many postmaps at a time, and no more"
    for session in sessions:
        session.socket.close()
    wait_for(lambda: not aliased.children(), "the end of all postmaps")
    wait_for(lambda: len(list(descriptors.iterdir())) < at_rest + 10, "their descriptors' end")
    del table_server.answers[b"*"]
    table_server.answers[b"sales@example.com"] = b"john@example.com"
    assert aliased.mailbox("sales@example.com") == "john@example.com"


def test_table_and_backend_share_one_budget(
    aliased: AliasedMilter, table_server: TableServer, backend: Backend
) -> None:
    def slow(connection: socket.socket) -> bytes:
        time.sleep(3)
        return FULL

    def slow_alias() -> bytes:
        time.sleep(1.5)
        return b"john@example.com"

    backend.answers[b"john"] = slow
    table_server.answers[b"sales@example.com"] = slow_alias
    table = f"tcp:127.0.0.1:{table_server.port}"
    running = aliased.start(table, options=("--timeout", "4", "--on-error", "tempfail"))
    assert running.rcpt("<sales@example.com>")[:10] == CANNOT_CHECK
    assert len(backend.asked) == 1


def test_the_end_of_the_milter_is_the_end_of_its_postmaps(
    aliased: AliasedMilter, table_server: TableServer
) -> None:
    table_server.answers[b"*"] = table_server.hang
    table = f"tcp:127.0.0.1:{table_server.port}"
    running = aliased.start(table, options=("--timeout", "60"))
    sessions = [running.session() for _ in range(3)]
    for number, session in enumerate(sessions):
        session.mail()
        session.send(b"R", b"<user%d@example.com>\0" % number)
    wait_for(lambda: table_server.open == len(sessions), "the questions")
    children = aliased.children()
    assert len(children) == len(sessions)

    def sockets(pid: int) -> set[str]:
        links = (os.readlink(file) for file in pathlib.Path(f"/proc/{pid}/fd").iterdir())
        return {link for link in links if link.startswith("socket:")}

    for child in children:
        assert not sockets(child) & sockets(running.process.popen.pid)
    running.process.popen.send_signal(signal.SIGTERM)
    assert running.process.popen.wait(20) == 0
    for child in children:  # whoever takes in orphans may take a moment
        wait_for(lambda c=child: not pathlib.Path(f"/proc/{c}").exists(), "its end")  # type: ignore[misc]
    for session in sessions:
        session.socket.close()


def test_no_postmap_is_left_where_names_wait_for_a_turn_or_a_hup_has_come(
    aliased: AliasedMilter, table_server: TableServer
) -> None:
    table_server.answers[b"*"] = table_server.hang
    table = f"tcp:127.0.0.1:{table_server.port}"
    running = aliased.start(table, options=("--timeout", "60"))
    sessions = [running.session() for _ in range(24)]
    for number, session in enumerate(sessions):
        session.mail()
        session.send(b"R", b"<user%d@example.com>\0" % number)
        if number == 12:
            reload(running)
    wait_for(lambda: table_server.most > 1 and len(aliased.children()) > 1, "the questions")
    time.sleep(0.5)
    children = aliased.children()
    assert 1 < len(children) < 12, "a reload does not multiply the cap"
    assert running.process.stop() == 0

    def left() -> list[str]:
        done = subprocess.run(["ps", "-eo", "args"], stdout=subprocess.PIPE, text=True, check=True)
        return [line for line in done.stdout.splitlines() if line.endswith(f"-q - {table}")]

    wait_for(lambda: not left(), "the end of all, also of those that were started last")
    for session in sessions:
        session.socket.close()


ADDRESS_SPELLINGS = """john@example.com john john%example.com example.com!john (c)john@example.com
john(c)@example.com john%example.com@example.com example.com!john@example.com john@EXAMPLE.com.
@example.net:john@example.com "john"@example.com john+x%example.com""".split()


def test_a_spelling_that_postfix_takes_for_the_mailbox_is_asked_about_as_that(
    backend: Backend, milter: Callable[..., RunningMilter], folder: pathlib.Path
) -> None:
    need_root()
    backend.answers[b"john"] = FULL
    running = milter(None, "--backend", f"example.com={backend.url}")
    main_cf = f"""
myorigin = example.com
mydestination = example.com
relay_domains =
local_recipient_maps =
local_transport = discard:
recipient_delimiter = +
smtpd_milters = {{ inet:127.0.0.1:{running.port}, default_action=tempfail }}
"""
    with Postfix(folder, main_cf) as postfix:
        for spelling in [*ADDRESS_SPELLINGS, "john @example.com"]:
            with smtplib.SMTP("127.0.0.1", postfix.port, timeout=30) as client:
                client.ehlo("client.example.net")
                client.docmd("MAIL FROM:<sender@example.net>")
                status, reply = client.docmd(f"RCPT TO:<{spelling}>")
                shown = spelling.replace("%", "?")
                expected = f"4.2.2 Quota exceeded for {shown}, try again later"
                assert (status, reply.decode()) == (452, expected), spelling
        assert send(postfix.port, "mary%example.com") == [""]


def test_postfix_itself_leads_a_recipient_to_the_same_mailbox(folder: pathlib.Path) -> None:
    need_root()
    table = indexed_table("hash", folder / "table", TABLE_ROWS)
    main_cf = f"""
myorigin = example.com
mydestination = {TABLE_DOMAINS}
local_recipient_maps =
local_transport = discard:
recipient_delimiter = +
relay_domains =
virtual_alias_domains = virtual.net
virtual_alias_maps = {table}
smtpd_reject_unlisted_recipient = no
allow_min_user = yes
"""
    with Postfix(folder, main_cf) as postfix:
        for recipient, mailbox in TABLED:
            if mailbox is None:
                continue
            before = len(postfix.log())
            assert send(postfix.port, recipient) == [""]

            def delivered(before: int = before) -> list[str]:
                return re.findall(r"discard.* to=<(.*?)>,.*status=sent", postfix.log()[before:])

            found = wait_for(delivered, f"the delivery of mail for {recipient}")
            stem = re.sub(r"\+[^@]*", "", found[0])
            assert (len(found), stem) == (1, mailbox), recipient


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
NO_FOLDER = "begins with a folder that does not exist: in systemd and uWSGI each % is written twice"
NO_ROOT = "does not begin with /"

TEMPLATES = [
    # (QUOTA_MAILBOX below the folder, or from the root; the file for john@x.org, or the error)
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
        (users, many + b"x" * 200_000 + b"\n", "ERROR QUOTA_USERS: line 20001 is too long"),
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
    assert "replace it with mv" in caught.value.args[1]


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
    for where in "nonsense", "127.0.0.1:99999", "127.0.0.1:-1", "192.0.2.1:80":
        status, _, errors = shell("--serve", where)
        assert status == 2 and "--serve" in errors and "Traceback" not in errors
        with open("/dev/full", "w") as full:
            command = [str(MBOX_CGI), "--serve", where]
            assert subprocess.run(command, env=environment, stderr=full).returncode == 2


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
    for method in "POST", "FOO", "get":
        assert http(port, method, f"/?u={user}")[0] == 405
    assert http(port, "GET", "/?u=..%2Fsecret") == (400, b"ERROR no mailbox has such a user\n")
    assert http(port, "GET", "/")[0] == 400
    status, body = http(port, "GET", "/?u=" + "x" * 70_000)
    assert status == 414 and body.startswith(b"ERROR ") and body.endswith(b"Too Long\n")
    with socket.create_connection(("127.0.0.1", port)) as rude:
        rude.sendall(b"\x16\x03\x01\x00\xff garbage\r\n\r\n")
    with socket.create_connection(("127.0.0.1", port), 20) as endless:
        endless.sendall(b"GET / HTTP/1.1\r\n" + (b"X: " + b"y" * 997 + b"\r\n") * 20)
        assert endless.recv(100).startswith(b"HTTP/1.1 414 ")
    assert http(port, "GET", f"/?u={user}") == (200, line)
    assert "Traceback" not in process.output()


JOHN, MARY = b"OK john 100 100\n", b"OVERQUOTA mary 101 100\n"
NOT_ALLOWED = b"ERROR only GET and HEAD are answered\n"
RAW_REQUESTS = [
    # (what is sent over one connection, the bodies that come back before it is closed)
    (b"GET /?u=mary HTTP/1.0\r\n\r\n", [MARY]),
    (b"GET /?u=mary HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", [MARY]),
    (b"GET /?u=mary HTTP/1.0\n\n", [MARY]),
    (b"GET /?u=mary HTTP/1.1\r\nConnection: close\r\n\r\n", [MARY]),
    (b"HEAD /?u=mary HTTP/1.0\r\n\r\n", [b""]),
    (b"GET /?u=mary HTTP/1.1\n\n" * 3 + b"GET /?u=john HTTP/1.0\n\n", [MARY] * 3 + [JOHN]),
    (b"GET /?u=john HTTP/1.1\nContent-Length: 24\n\nGET /?u=mary HTTP/1.1\n\n", [JOHN]),
    (b"GET /?u=john HTTP/1.1\nTransfer-Encoding: chunked\n\nGET / HTTP/1.1\n\n", [JOHN]),
    (b"POST /?u=john HTTP/1.1\nContent-Length: 2\n\nu=", [NOT_ALLOWED]),
    (b"PATCH /?u=john HTTP/1.0\n\n", [NOT_ALLOWED]),
    (b"GET http://x.org/y?u=mary HTTP/1.0\n\n", [MARY]),
    (b"GET /?u=j\xc3\xa0\xa0 HTTP/1.0\n\n", [b"OK j\xc3\xa0\xa0 0 100\n"]),
    (b"GET /?u=j\x1d HTTP/1.0\n\n", [b"ERROR control character in the user\n"]),
]


def test_serve_speaks_http_with_any_client(
    spool: pathlib.Path, start: Callable[..., Process]
) -> None:
    port = free_port()
    environment = {**os.environ, "QUOTA_MAILBOX": f"{spool}/%n", "QUOTA_LIMIT": "100"}
    process = start(MBOX_CGI, "--serve", str(port), port=port, env=environment)
    for request, bodies in RAW_REQUESTS:
        begin = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(request)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert time.monotonic() - begin < 2, request
        heads = re.findall(rb"HTTP/1\.1 \d{3} .*?\r\n\r\n", answer, re.DOTALL)
        assert re.split(rb"HTTP/1\.1 \d{3} .*?\r\n\r\n", answer, flags=re.S)[1:] == bodies, request
        assert all(b"\r\nKeep-Alive: " in head for head in heads), "an offer, in each answer"
        closed = [b"\r\nConnection: close\r\n" in head for head in heads]
        assert closed == [False] * (len(heads) - 1) + [True], request
    assert process.stop() == 0 and "Traceback" not in process.output()


def test_serve_answers_a_stranger_with_403_before_it_has_asked(
    spool: pathlib.Path, start: Callable[..., Process]
) -> None:
    port = free_port()
    environment = {**os.environ, "QUOTA_MAILBOX": f"{spool}/%n", "QUOTA_ALLOW": "127.0.0.2"}
    start(MBOX_CGI, "--serve", str(port), port=port, env=environment)
    for source, expected in ("127.0.0.1", b"HTTP/1.1 403 "), ("127.0.0.2", b"HTTP/1.1 200 "):
        with socket.create_connection(("127.0.0.1", port), 20, (source, 0)) as connection:
            if source == "127.0.0.2":
                connection.sendall(b"GET /?u=john HTTP/1.0\n\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(expected)


def test_silent_and_dripping_connections_stop_neither_serve_nor_its_end(
    spool: pathlib.Path, start: Callable[..., Process]
) -> None:
    port = free_port()
    environment = {**os.environ, "QUOTA_MAILBOX": f"{spool}/%n", "QUOTA_LIMIT": "100"}
    process = start(MBOX_CGI, "--serve", str(port), port=port, env=environment)
    with contextlib.ExitStack() as stack:
        begin = time.monotonic()
        besiegers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
            for _ in range(450)
        ]
        open_ones = set(besiegers)
        while time.monotonic() - begin < 14:
            asked = time.monotonic()
            assert http(port, "GET", "/?u=mary") == (200, MARY)
            assert time.monotonic() - asked < 1
            for connection in select.select(open_ones, [], [], 0)[0]:
                assert time.monotonic() - begin > 8, "hung up on too early"
                open_ones.remove(connection)
            for connection in open_ones.intersection(besiegers[::2]):
                with contextlib.suppress(OSError):  # hung up on meanwhile
                    connection.send(b"G")
            time.sleep(0.5)
        assert not open_ones, "ten seconds are for the whole request"
        stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
        assert process.stop() == 0
    assert process.output().count("\n") == 1, process.output()


@pytest.fixture
def serving() -> Iterator[tuple[Any, int]]:
    """Give quota.cgi as a module whose server runs in this process, and its port."""
    module = load(MBOX_CGI)
    with module.Server(("127.0.0.1", 0), module.Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield module, server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_mailbox_that_hangs_holds_one_thread_of_serve(
    serving: tuple[Any, int], spool: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, port = serving
    monkeypatch.setenv("QUOTA_MAILBOX", f"{spool}/%n")
    module.QUOTA_MAILBOX, module.QUOTA_LIMIT = f"{spool}/%n", "100"
    measure, released, measured = module.measure, threading.Event(), []

    def hang_for_john(path: bytes, *arguments: Any) -> Any:
        measured.append(path)
        assert not path.endswith(b"/john") or released.wait(60)
        return measure(path, *arguments)

    module.measure = hang_for_john
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(http, port, "GET", "/?u=john")
        wait_for(lambda: measured, "the first question")
        others = [pool.submit(http, port, "GET", "/?u=john") for _ in range(3)]
        assert http(port, "GET", "/?u=mary") == (200, MARY)
        for other in others:
            assert other.result(20) == (500, b"ERROR the mailbox hangs, its disk does not answer\n")
        assert len(measured) == 2
        released.set()
        assert first.result(20) == (200, JOHN) == http(port, "GET", "/?u=john")


def test_serve_reads_users_once_for_each_change(
    serving: tuple[Any, int], tmp_path: pathlib.Path
) -> None:
    module, port = serving
    users, new = tmp_path / "users", tmp_path / "new"
    module.QUOTA_MAILBOX, module.QUOTA_USERS = f"{tmp_path}/%n", str(users)
    read_limits, read = module.read_limits, []

    def read_and_tell(path: bytes) -> Any:
        read.append(path)
        return read_limits(path)

    module.read_limits = read_and_tell
    for round_, (text, answer) in enumerate(
        [
            (b"john 5\n", b"OK john 0 5\n"),
            (b"john 6\n", b"OK john 0 6\n"),
            (b"x", b"ERROR QUOTA_US"),
        ]
    ):
        new.write_bytes(text)
        new.rename(users)
        for _ in range(3):
            assert http(port, "GET", "/?u=john")[1].startswith(answer)
        assert len(read) == round_ + 1


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
    env[b"QUERY_STRING"] = b"u=john"
    status, _, line = cgi.respond(env)
    assert state_of(path) == before, f"{path} was changed"
    answer = bytes(line).rstrip(b"\n")
    return answer if status == "200 OK" else status[:4].encode() + answer


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
      client_limit = 1
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
      client_limit = 1
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
        if "lmtp" in protocols:
            need("/usr/lib/dovecot/lmtp", "dovecot-lmtpd")
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
    env[b"QUERY_STRING"] = b"u=john"
    status, headers, line = load(MAILDIR_CGI).respond(env)
    assert state_of(path) == before, f"{path} was changed"
    assert status == "200 OK", line
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
    env[b"QUERY_STRING"] = b"u=john"
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
                        line = cgi.respond({**env, b"QUOTA_LIMIT": limit})[2]
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
            env = {b"QUOTA_MAILDIR": bytes(johns(path)), b"QUERY_STRING": b"u=john"}
            assert cgi.respond(env)[2] == b"OK john 9 1000\n"
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

Answering = Callable[[socket.socket], Optional[bytes]]
TEMPFAIL = "--on-error", "tempfail"
FAULT = "451 4.3.0"
OOPS = b"HTTP/1.0 500 Oops\r\n\r\nOVERQUOTA x 101 100\n"


def hang(connection: socket.socket) -> None:
    """Say nothing until the client goes away."""
    connection.settimeout(60)
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


def close_at_once(connection: socket.socket) -> None:
    """Close the connection without an answer."""


def taking(seconds: float, line: bytes = FULL) -> Answering:
    """Return an answer that is this line after a while."""

    def answer(connection: socket.socket) -> bytes:
        time.sleep(seconds)
        return line

    return answer


class Gate:
    """Answers a line as soon as it is opened; notes whether the client has gone away before."""

    def __init__(self, line: bytes = FULL) -> None:
        self.line = line
        self.opened = threading.Event()
        self.given_up = threading.Event()

    def __call__(self, connection: socket.socket) -> Optional[bytes]:
        while not self.opened.wait(0.02):
            if select.select([connection], [], [], 0)[0]:
                self.given_up.set()
                return None
        return self.line


def faults() -> list[Case]:
    """Make the cases of faults that concern one mailbox, and of another mailbox after each."""
    misbehaving = [hang, drip, drip_body, reset, reset_at_once, close_at_once, OOPS]
    misbehaving += [b"Mailbox full, sorry OVERQUOTA\n", b"HTTP/yes OVERQUOTA\r\n\r\n"]
    cases: list[Case] = []
    for answer in misbehaving:
        for on_error, reply in ("accept", ""), ("tempfail", FAULT):
            options = f"--timeout 1 --on-error {on_error}"
            log = "verdict=fault used=- quota=- cached=no"
            query = f"u=u{len(cases)}&d=example.com"
            cases += [Case(answer, options, reply=reply, log=log, asked=query), Case(FULL, options)]
    return cases


def test_a_fault_about_one_mailbox_is_decided_in_time_and_concerns_it_alone(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    run_cases(faults(), backend, milter)


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
    assert "Connection refused" in running.log("state=down")
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
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:  # connects, says nothing
        hanging = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        for url in f"http://127.0.0.1:{free_port()}/", "http://nowhere.invalid/", hanging:
            running = milter(None, "--backend", url, *TEMPFAIL, "--timeout", "1")
            begin = time.monotonic()
            assert running.rcpt("<john@example.com>").startswith(FAULT)
            assert time.monotonic() - begin < 1 + SLACK
            assert f"backend={url} " in running.log("state=down")
            assert running.rcpt("<mary@example.com>").startswith(FAULT)
            assert "verdict=fault" in running.log("recipient=mary")


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
    wary = milter(encrypted, *TEMPFAIL)
    assert wary.rcpt("<john@example.com>").startswith("451")
    assert "certificate verify failed" in wary.log("state=down")
    plain = backend.url.replace("http:", "https:")
    mistaken = milter(None, "--backend", plain, *TEMPFAIL, "--timeout", "1")
    assert mistaken.rcpt("<john@example.com>").startswith("451")
    assert mistaken.log("state=down")
    assert encrypted.users() == ["john", "mary"] and backend.asked == []
    encrypted.close()


# ---- faults: what is remembered ----

CLOCK = """\
import os, runpy, sys, time
real, clock = time.monotonic, sys.argv[1]
time.monotonic = lambda: real() + os.stat(clock).st_size
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_answers_are_kept_for_their_time_and_stand_in_for_an_hour(
    backend: Backend, start: Callable[..., Process], tmp_path: pathlib.Path
) -> None:
    """The size of a file moves the clock of this milter on."""
    clock, port, now = tmp_path / "clock", free_port(), 0
    clock.touch()
    options = ["--listen", f"inet:{port}@127.0.0.1", "--backend", backend.url, *TEMPFAIL]
    process = start(PYTHON, "-c", CLOCK, clock, MILTER, *options, port=port)
    running = RunningMilter(port, process)
    for user, seconds, answer, reply, asked in [
        ("john", 0, FULL, "452", 1),
        ("john", 55, OOPS, "452", 1),
        ("mary", 0, FULL, "452", 2),
        ("john", 30, FULL, "452", 3),  # no longer remembered
        ("mary", 0, FULL, "452", 3),
        ("mary", 3000, OOPS, "452", 4),  # the last known answer
        ("mary", 585, OOPS, FAULT, 5),  # which is more than an hour old
        ("john", 0, OOPS, "452", 6),
        ("john", 30, OOPS, FAULT, 7),
        ("john", 0, FULL, "452", 8),
    ]:
        now += seconds
        os.truncate(clock, now)
        backend.default = answer
        assert running.rcpt(f"<{user}@example.com>").startswith(reply), (user, now)
        assert len(backend.asked) == asked, (user, now)
    assert process.stop() == 0


def test_the_last_known_answer_counts_while_there_are_faults_and_no_other(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers[b"john"] = FULL
    running = milter(backend, *UNCACHED, "--timeout", "1")
    assert running.rcpt("<john@example.com>").startswith("452")
    for answer in OOPS, reset, close_at_once:
        backend.answers[b"john"] = answer
        assert running.rcpt("<john@example.com>").startswith("452")
        assert "verdict=overquota used=101 quota=100 cached=yes" in running.log("reason=")
    assert running.rcpt("<mary@example.com>") == ""
    backend.answers[b"john"] = b"OK %s 10 100\n"
    assert running.rcpt("<john@example.com>") == ""
    backend.answers[b"john"] = OOPS
    assert running.rcpt("<john@example.com>") == "", "the newest answer is the last known one"
    backend.answers[b"john"] = FULL
    assert running.rcpt("<john@example.com>").startswith("452")
    backend.answers[b"john"] = hang
    assert running.rcpt("<john@example.com>").startswith("452")
    assert "cached=yes" in running.log("no answer")


def test_no_last_known_answer_rejects_for_good(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    running = milter(backend, *UNCACHED, "--unknown-reply", "550 5.1.1 No {address} here")
    permanent = milter(backend, *UNCACHED, "--overquota-reply", "552 5.2.2 {address} is full")
    backend.answers.update({b"gone": b"UNKNOWN %s\n", b"full": FULL})
    assert running.rcpt("<john@example.com>", "SIZE=101").startswith("552 5.2.3")
    assert running.rcpt("<gone@example.com>").startswith("550 5.1.1")
    assert permanent.rcpt("<full@example.com>").startswith("552 5.2.2")
    backend.answers = {b"john": OOPS, b"gone": OOPS, b"full": OOPS}
    assert running.rcpt("<john@example.com>", "SIZE=101")[:1] == "4"
    assert permanent.rcpt("<full@example.com>")[:1] == "4"
    assert running.rcpt("<john@example.com>", "SIZE=50") == "", "what it has room for passes"


def test_an_answer_from_before_a_hup_is_not_remembered_after_it(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    gate = Gate(b"OK %s 10 100\n")
    backend.answers[b"john"] = gate
    running = milter(backend, "--timeout", "30")
    with running.session() as session:
        session.mail()
        session.send(b"R", b"<john@example.com>\0")
        wait_for(lambda: backend.asked, "the question")
        running.process.popen.send_signal(signal.SIGHUP)
        running.log("state=reloaded")
        gate.opened.set()
        assert session.receive() == (b"c", b"")
    backend.answers[b"john"] = FULL
    assert running.rcpt("<john@example.com>").startswith("452")
    assert backend.users() == ["john"] * 2


# ---- faults: kept connections ----


def kept(line: bytes, *header: bytes) -> bytes:
    """Make a response after which the connection stays open."""
    length = b"Content-Length: %d" % len(line)
    return raw(b"200 OK", line, length, *(header or [KEEP]))


def twice(answer: bytes) -> Answering:
    """Return an answer that comes a second time when the next question has been sent."""

    def send(connection: socket.socket) -> bytes:
        connection.sendall(answer)
        time.sleep(0.1)
        return answer

    return send


def hinted(answer: bytes) -> Answering:
    """Return an answer that comes some time after an interim response."""

    def send(connection: socket.socket) -> bytes:
        connection.sendall(raw(b"103 Early Hints", b"", KEEP))
        time.sleep(0.1)
        return answer

    return send


KEPT_FULL = b"OVERQUOTA full 101 100\n"
NEVER_KEPT = [1] * 10
CONNECTIONS: dict[str, tuple[Callable[[bytes], Any], Optional[list[int]]]] = {
    # what is done with a line: how it is sent, the questions of each connection (None: no matter)
    "kept where that is offered": (kept, [10]),
    "closed where it is not": (lambda line: kept(line, b"X: y"), NEVER_KEPT),
    "surplus": (lambda line: kept(line) + kept(line), None),
    "surplus that comes late": (lambda line: twice(kept(line)), None),
    "an interim response": (lambda line: hinted(kept(line)), None),
    "no length": (lambda line: raw(b"200 OK", line, KEEP), NEVER_KEPT),
    "less than its length": (
        lambda line: kept(line).replace(b"Length: ", b"Length: 1"),
        NEVER_KEPT,
    ),
    "another mailbox": (lambda line: kept(line.replace(b"full", b"mary")), None),
}


@pytest.mark.parametrize("way", CONNECTIONS)
def test_no_answer_on_a_kept_connection_counts_for_another_mailbox(
    way: str, backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    sent, connections = CONNECTIONS[way]
    backend.answers = {b"full": sent(KEPT_FULL), b"a b": sent(b"OK a b 1 100\n")}
    running = milter(backend, *UNCACHED, "--max-queries", "1", *TEMPFAIL, "--timeout", "2")
    fault = {FAULT} if way in ("an interim response", "less than its length") else set()
    for _ in range(5):
        assert running.rcpt("<full@example.com>")[:9] in {"452 4.2.2", *fault}
        assert running.rcpt('<"a b"@example.com>')[:9] in {"", *fault}
    assert connections in (None, backend.connections)


def test_an_answer_about_a_user_never_counts_for_one_of_that_name_in_another_domain(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    """A backend answers twice, the second time when the next question may have come."""

    def send(connection: socket.socket) -> bytes:
        full = b"d=full.org" in backend.asked[-1]
        line = kept(b"OVERQUOTA john 101 100\n" if full else b"OK john 1 100\n")
        connection.sendall(line)
        time.sleep(0.03)
        return line

    backend.answers[b"john"] = send
    running = milter(backend, *UNCACHED, "--max-queries", "1", *TEMPFAIL)
    with running.session() as session:
        session.mail()
        for _ in range(30):
            assert session.rcpt("<john@full.org>").startswith("452")
            assert session.rcpt("<john@free.org>") == ""
            assert session.rcpt("<john@free.org>") == ""
    assert max(backend.connections) > 1, "within a domain they are kept"


def test_a_connection_is_kept_after_a_complete_200_alone(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers[b"full"] = kept(KEPT_FULL)
    backend.answers[b"ill"] = kept(KEPT_FULL).replace(b"200 OK", b"500 Oops")
    running = milter(backend, *UNCACHED, "--max-queries", "1", *TEMPFAIL)
    for _ in range(3):
        assert running.rcpt("<full@example.com>").startswith("452")
        assert running.rcpt("<ill@example.com>").startswith(FAULT)
    assert max(backend.connections) == 2, "a fault was the last on its connection"


def test_a_kept_connection_that_the_server_closed_is_no_fault(
    start: Callable[..., Process], milter: Callable[..., RunningMilter], spool: pathlib.Path
) -> None:
    port = free_port()
    environment = {**os.environ, "QUOTA_MAILBOX": str(spool / "%n"), "QUOTA_LIMIT": "100"}
    url = "--backend", f"http://127.0.0.1:{port}/"
    running = milter(None, *url, *UNCACHED, *TEMPFAIL)
    for _ in range(3):
        server = start(MBOX_CGI, "--serve", str(port), port=port, env=environment)
        for _ in range(3):
            assert running.rcpt("<mary@example.com>").startswith("452")
            assert running.rcpt("<nobody@example.com>") == ""
        server.stop(signal.SIGKILL)
    assert "verdict=fault" not in running.process.output()


# ---- mail in flight ----

LIMIT = 100_000  # bytes: the quota of the tables below, in which 1,000 to 1,536 count for headers
ALL_BITS = 0x1FFFFF
OUTCOMES = {"over quota": "452 4.2.2", "too large": "552 5.2.3", "fault": "451 4.3.0"}


def answer_with(line: str, **header: str) -> bytes:
    """Make a backend's answer of a line and header fields (Quota_Grace for Quota-Grace)."""
    fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in header.items())
    head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(line) + 1}\r\n{fields}\r\n"
    return f"{head}{line}\n".encode("latin-1")


class Story:
    """Plays the steps of a row of the tables below, in one session, with mailboxes of its own.

    john has 40_000 [of 0] [OVERQUOTA] [grace 10]   what the backend says of john (of LIMIT)
    john is unknown, john fails                     UNKNOWN, a status 500
    mail 60_000 [SIZE=5] [to john mary] -> OUTCOME  a message (to john), to its end
    sized 60_000 [to john mary] -> OUTCOME          the same, and its true size declared
    rset 60_000, lost 60_000                        its body is sent, then RSET or no more at all
    wait 1.5, hup                                   seconds; the signal

    OUTCOME: taken, or over quota, too large or fault, each with `at RCPT` or `at the end`, and
    `for john` where it matters whom the reply names.
    """

    def __init__(self, running: RunningMilter, backend: Backend, number: int) -> None:
        self.running, self.backend, self.number = running, backend, number
        self.session = running.session()

    def play(self, name: str, steps: list[str]) -> None:
        """Play all steps; an assertion names row and step."""
        for step in steps:
            told, _, outcome = step.partition(" -> ")
            verb, *words = told.split()
            if verb in ("mail", "sized", "rset", "lost"):
                happened = self.send(verb, words)
                assert happened.startswith(outcome) and bool(outcome), (name, step, happened)
            elif verb == "wait":
                time.sleep(float(words[0]))
            elif verb == "hup":
                reload(self.running)
            else:
                self.tell(verb, words)
        self.session.socket.close()

    def tell(self, user: str, words: list[str]) -> None:
        """Set what the backend says of a mailbox."""
        status = "OVERQUOTA" if "OVERQUOTA" in words else "OK"
        header = {"Quota_Grace": words[-1]} if "grace" in words else {}
        answer = b"UNKNOWN %s\n" if words[-1] == "unknown" else b"HTTP/1.0 500 Oops\r\n\r\n"
        if words[0] == "has":
            quota = int(words[3]) if "of" in words else LIMIT
            used = words[1].replace("_", "").replace("-", "")
            answer = answer_with(f"{status} {user} {used} {quota}", **header)
        self.backend.answers[f"{user}{self.number}".encode()] = answer

    def send(self, verb: str, words: list[str]) -> str:
        """Give a message; return what became of it, in the words of the tables."""
        size = int(words[0])
        users = words[words.index("to") + 1 :] if "to" in words else ["john"]
        names = [re.sub("^(?!postmaster)[a-z]+", rf"\g<0>{self.number}", user) for user in users]
        declared = [word for word in words if word.startswith("SIZE=")]
        declared += [f"SIZE={size}"] if verb == "sized" else []
        if verb in ("mail", "sized"):
            return self.outcome(self.session.message(" ".join(names), size, *declared))
        self.session.mail("<sender@example.net>", *declared)
        for name in names:
            assert self.session.rcpt(f"<{name}@example.com>") == ""
        self.session.data()
        self.session.body(size)
        if verb == "rset":
            self.session.abort()
        else:
            self.session.socket.close()
            self.session = self.running.session()
        return verb

    def outcome(self, reply: str) -> str:
        """Put a reply into the words of the tables."""
        if not reply:
            return "taken"
        verdict = next((name for name, code in OUTCOMES.items() if reply.startswith(code)), reply)
        named = re.search(r"\b([a-z]+)\d*@example\.com", reply)
        step = "the end" if self.session.last == b"E" else "RCPT"
        return f"{verdict} at {step} for {named[1] if named else 'nobody'}"


def reload(running: RunningMilter) -> str:
    """Send a HUP and return the line of the log that says what became of it."""

    def lines() -> list[str]:
        log = running.process.output().splitlines()
        return [line for line in log if "state=reloaded" in line or "state=kept" in line]

    before = len(lines())
    running.process.popen.send_signal(signal.SIGHUP)
    return str(wait_for(lambda: lines()[before:], "the reload")[-1])


# By the options of one milter: the rows that are played with it. Answers are remembered unless
# the options say otherwise.
STORIES: dict[str, dict[str, list[str]]] = {
    "--verbose": {
        "what fits exactly is taken, one byte more is not": [
            "john has 40_000",
            "mail 60_001 -> over quota at the end for john",
            "mail 60_000 -> taken",
        ],
        "a declared size is known at RCPT": [
            "john has 40_000",
            "sized 60_001 -> over quota at RCPT for john",
            "sized 60_000 -> taken",
        ],
        "three messages, and the room that each leaves to the next": [
            "john has 0",
            "mail 50_000 -> taken",
            "mail 49_001 -> over quota at the end",
            "mail 48_000 -> taken",
            "mail 1_000 -> over quota at",
        ],
        "the same with sizes": [
            "john has 0",
            "sized 50_000 -> taken",
            "sized 49_001 -> over quota at RCPT",
            "sized 48_000 -> taken",
            "sized 1_000 -> over quota at RCPT",
        ],
        "a mailbox that is filled by what is in flight gets nothing more, however small": [
            "john has 0",
            "sized 99_500 -> taken",
            "mail 0 -> over quota at RCPT",
            "sized 1 -> over quota at RCPT",
        ],
        "at the quota without mail in flight its backend alone decides": [
            "john has 100_000",
            "mail 0 -> taken",
            "mail 0 -> over quota at RCPT",
        ],
        "messages of zero bytes have headers, too": [
            "john has 0",
            *["mail 0 -> taken"] * 10,
            "mail 90_001 -> over quota at the end",
            "mail 84_000 -> taken",
        ],
        "what has ended otherwise adds nothing": [
            "john has 0",
            "rset 90_000 -> rset",
            "lost 90_000 -> lost",
            "lost 90_000 SIZE=90_000 -> lost",
            "mail 100_001 -> too large at the end for john",
            "sized 100_001 -> too large at RCPT for john",
            "rset 90_000 SIZE=90_000 -> rset",
            "mail 100_000 -> taken",
        ],
        "hup forgets the answer and not what is in flight": [
            "john has 0",
            "mail 50_000 -> taken",
            "hup",
            "mail 49_001 -> over quota at the end",
            "john has 50_000",
            "hup",
            "mail 49_001 -> over quota at the end",
            "mail 48_400 -> taken",
        ],
        "the larger of two sizes counts: one that lies above": [
            "john has 0",
            "mail 10 SIZE=50000 -> taken",
            "mail 49_001 -> over quota at the end",
            "mail 10 SIZE=49001 -> over quota at RCPT",
            "mail 48_000 -> taken",
        ],
        "the larger of two sizes counts: one that lies below": [
            "john has 40_000",
            "mail 60_001 SIZE=10 -> over quota at the end",
            "mail 30_000 SIZE=10 -> taken",
            "mail 29_001 -> over quota at the end",
        ],
        "sizes that say nothing": [
            "john has 40_000",
            "mail 60_001 SIZE=0 -> over quota at the end",
            "mail 60_001 SIZE=-5 -> over quota at the end",
            "mail 60_001 SIZE=1e2 -> over quota at the end",
            "mail 60_000 SIZE=0 -> taken",
        ],
        "a message that fits into one of its mailboxes is taken, and counts for both": [
            "john has 50_000",
            "mary has 0",
            "mail 60_000 to john mary -> taken",
            "mail 39_001 to mary -> over quota at the end for mary",
            "mail 0 to john -> over quota at RCPT for john",
            "mail 38_000 to mary -> taken",
        ],
        "a message that fits into none gets the reply of the first": [
            "john has 50_000",
            "mary has 60_000",
            "mail 60_000 to john mary -> over quota at the end for john",
            "mail 60_000 to mary john -> over quota at the end for mary",
            "mail 50_000 to mary john -> taken",
        ],
        "the reply of the first, whatever its kind": [
            "john has 0 of 50_000",
            "mary has 60_000",
            "mail 60_000 to john mary -> too large at the end for john",
            "mail 60_000 to mary john -> over quota at the end for mary",
        ],
        "who was refused at RCPT does not count": [
            "john has 90_000",
            "mary has 0",
            "paul has 110_000 OVERQUOTA",
            "sized 20_000 to john mary paul -> taken",
            "mail 10_001 to john -> over quota at the end for john",
            "mail 100_000 to paul mary -> over quota at the end for mary",
            "mail 10_000 to john -> taken",
        ],
        "an exempt recipient takes it for all": [
            "john has 50_000",
            "mail 60_000 to john postmaster -> taken",
            "mail 0 to john -> over quota at RCPT",
            "mail 900_000 to postmaster -> taken",
        ],
        "an unknown recipient takes it for all": [
            "john has 50_000",
            "mary is unknown",
            "mail 60_000 to mary john -> taken",
            "mail 0 to john -> over quota at RCPT",
            "mail 900_000 to mary -> taken",
        ],
        "a recipient who cannot be asked about takes it for all": [
            "john has 50_000",
            "mary fails",
            "mail 60_000 to john mary -> taken",
            "mail 0 to john -> over quota at RCPT",
            "mail 900_000 to mary -> taken",
        ],
        "a mailbox without a limit, or with an unknown one, takes all": [
            "john has 50_000",
            "mary has 500_000 of 0",
            "mail 900_000 to mary -> taken",
            "mail 900_000 to mary -> taken",
            "mail 60_000 to john mary -> taken",
            "mail 0 to john -> over quota at RCPT",
        ],
        "a mailbox that does not exist yet": [
            "john has - of 100_000",
            "mail 100_001 -> too large at the end for john",
            "mail 60_000 -> taken",
        ],
        "two names of one mailbox": [
            "john has 0",
            "mail 60_000 to john john -> taken",
            "mail 39_001 -> over quota at",
            "mail 38_000 -> taken",
        ],
        "each address of a mailbox brings it a copy": [
            "john has 0",
            "mail 40_000 to john john+a -> taken",
            "mail 19_001 -> over quota at the end",
            "mail 17_000 -> taken",
        ],
        "a copy that does not fit is refused for itself where its size is known": [
            "john has 0",
            "sized 60_000 to john john+a -> taken",
            "mail 39_001 -> over quota at the end",
            "mail 38_000 -> taken",
        ],
        "grace is for the message that fills the mailbox": [
            "john has 90_000 grace 10000",
            "mail 20_001 -> over quota at the end",
            "mail 20_000 -> taken",
            "mail 0 -> over quota at RCPT",
        ],
        "grace at RCPT": [
            "john has 90_000 grace 10000",
            "sized 20_001 -> over quota at RCPT",
            "sized 8_000 -> taken",
            "sized 2_000 -> taken",
            "sized 1 -> over quota at RCPT",
        ],
        "what is too large is what quota and grace cannot hold": [
            "john has 0 grace 10000",
            "sized 110_001 -> too large at RCPT",
            "mail 110_001 -> too large at the end",
            "mail 110_000 -> taken",
        ],
        "grace saves no mailbox that is over quota": [
            "john has 100_000 OVERQUOTA grace 10000",
            "mail 1 -> over quota at RCPT",
        ],
    },
    "--cache-ttl 0": {
        "what used has grown by is no longer in flight": [
            "john has 0",
            "mail 50_000 -> taken",
            "john has 50_000",
            "mail 49_001 -> over quota at the end",
            "mail 48_400 -> taken",
        ],
        "growth counts once": [
            "john has 0",
            "mail 30_000 -> taken",
            "mail 30_000 -> taken",
            "john has 30_000",
            "mail 39_000 -> over quota at the end",
            "mail 39_000 -> over quota at the end",
            "john has 60_000",
            "mail 39_000 -> over quota at the end",
            "mail 36_900 -> taken",
        ],
        "growth that others made leaves no more room than there is": [
            "john has 0",
            "mail 10_000 -> taken",
            "john has 90_000",
            "mail 10_001 -> over quota at the end",
            "mail 10_000 -> taken",
        ],
        "a user who deletes does not make what is in flight smaller": [
            "john has 80_000",
            "mail 18_000 -> taken",
            "john has 0",
            "mail 81_001 -> over quota at the end",
            "john has 18_000",
            "mail 81_001 -> over quota at the end",
            "mail 80_400 -> taken",
        ],
        "faults: the last known answer, and what has been taken since": [
            "john has 0",
            "mail 30_000 -> taken",
            "john fails",
            "mail 70_000 -> over quota at the end",
            "mail 100_001 -> over quota at the end",
            "sized 100_001 -> over quota at RCPT",
            "mail 67_000 -> taken",
            "mail 5_000 -> over quota at",
        ],
        "faults: what was taken since counts for as long as the answer does": [
            "john has 0",
            "mail 30_000 -> taken",
            "john fails",
            "mail 40_000 -> taken",
            "hup",
            "john has 0",
            "mail 29_001 -> over quota at the end",
        ],
        "a newer answer does not know of what is still in flight": [
            "john has 0",
            "mail 60_000 -> taken",
            "mail 60_000 -> over quota at the end",
            "john fails",
            "mail 60_000 -> over quota at the end",
        ],
        "an answer without a size is one of zero bytes": [
            "john has - of 100_000",
            "mail 50_000 -> taken",
            "john has 51_000",
            "mail 48_000 -> taken",
        ],
        "an unknown mailbox has not become smaller": [
            "john has 50_000",
            "mail 20_000 -> taken",
            "john is unknown",
            "mail 0 to john -> taken",
            "john has 50_000",
            "mail 29_001 -> over quota at the end",
        ],
        "grace that is none": [
            *[
                step
                for grace in ("-5", "1e9", "lots", "10%", "0x99999", "10000,5", "")
                for step in (f"john has 90_000 grace {grace}", "sized 10_001 -> over quota at RCPT")
            ],
            "mail 10_001 -> over quota at the end",
            "mail 10_000 -> taken",
        ],
    },
    "--in-flight 1": {
        "what is in flight ends by itself": [
            "john has 0",
            "mail 60_000 -> taken",
            "mail 60_000 -> over quota at the end",
            "wait 1.2",
            "mail 60_000 -> taken",
        ],
        "also where the user has emptied the mailbox": [
            "john has 90_000",
            "mail 8_000 -> taken",
            "mail 8_000 -> over quota at the end",
            "john has 0",
            "hup",
            "wait 1.2",
            "mail 100_000 -> taken",
        ],
    },
    "--in-flight 1 --cache-ttl 0": {
        "while a backend fails, its last answer has counted all that was taken since": [
            "john has 0",
            "mail 60_000 -> taken",
            "john fails",
            "wait 1.2",
            "mail 60_000 -> over quota at the end",
            "mail 38_000 -> taken",
            "wait 1.2",
            "mail 0 -> over quota at RCPT",
            "john has 20_000",
            "mail 80_000 -> taken",
        ],
        "also what was in flight when that answer came": [
            "john has 0",
            "mail 60_000 -> taken",
            "mail 60_000 -> over quota at the end",
            "john fails",
            "wait 1.2",
            "mail 60_000 -> over quota at the end",
        ],
        "growth after a fault is that of the mail which came first": [
            "john has 0",
            "mail 40_000 -> taken",
            "wait 1.2",
            "john fails",
            "mail 40_000 -> taken",
            "john has 41_000",
            "mail 30_000 -> over quota at the end",
        ],
    },
    "--in-flight 1 --cache-ttl 600": {
        "a remembered answer does not outlive what was taken since": [
            "john has 0",
            "mail 60_000 -> taken",
            "john has 61_000",
            "wait 1.2",
            "mail 39_001 -> over quota at the end",
            "mail 38_000 -> taken",
        ],
    },
    "--in-flight 3": {
        "each message by its own time": [
            "john has 0",
            "mail 40_000 -> taken",
            "wait 2",
            "mail 40_000 -> taken",
            "mail 40_000 -> over quota at the end",
            "wait 1.3",
            "mail 40_000 -> taken",
            "mail 40_000 -> over quota at the end",
        ],
        "growth is the work of what has ended by itself before it is that of later mail": [
            "john has 0",
            "mail 40_000 -> taken",
            "wait 2",
            "mail 40_000 -> taken",
            "wait 1.3",
            "john has 40_000",
            "hup",
            "mail 19_001 -> over quota at the end",
            "mail 18_000 -> taken",
        ],
    },
    "--in-flight 0": {
        "nothing is in flight, and the real size counts": [
            "john has 0",
            *["mail 60_000 -> taken"] * 3,
            "sized 60_000 -> taken",
            "mail 100_001 -> too large at the end",
            "mary has 60_000",
            "mail 40_001 to mary -> over quota at the end",
        ]
    },
    "--frontends 2": {
        "what was taken counts for each frontend": [
            "john has 0",
            "mail 30_000 -> taken",
            "mail 38_001 -> over quota at the end",
            "mail 36_000 -> taken",
            "mail 0 -> over quota at RCPT",
        ]
    },
    "--frontends 3 --cache-ttl 0": {
        "and growth is what all frontends' mail has made": [
            "john has 0",
            "mail 20_000 -> taken",
            "john has 20_000",
            "mail 38_001 -> over quota at the end",
            "john has 60_000",
            "mail 38_001 -> over quota at the end",
            "mail 35_000 -> taken",
        ]
    },
    "--ignore-size --cache-ttl 0": {
        "the status alone decides": [
            "john has 0",
            "mail 200_000 -> taken",
            "sized 200_000 -> taken",
            "mail 200_000 SIZE=5 -> taken",
            "john has 100_000 OVERQUOTA",
            "mail 0 -> over quota at RCPT",
        ]
    },
    "--on-error tempfail": {
        "a fault at RCPT is none at the end": [
            "john has 50_000",
            "mary fails",
            "mail 60_000 to john mary -> over quota at the end for john",
            "mail 1 to mary -> fault at RCPT for mary",
        ]
    },
    "--dry-run": {
        "everything is taken": [
            "john has 50_000",
            "mary has 100_000 OVERQUOTA",
            "mail 60_000 -> taken",
            "sized 60_000 -> taken",
            "mail 60_000 -> taken",
            "mail 100_001 -> taken",
            "mail 60_000 to mary -> taken",
        ]
    },
}


@pytest.mark.parametrize("options", STORIES)
def test_mail_in_flight_counts(
    options: str, backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    running = milter(backend, *options.split())
    for number, (name, steps) in enumerate(STORIES[options].items()):
        Story(running, backend, number).play(name, steps)
    assert running.process.stop() == 0
    assert "Traceback" not in running.process.output()


@pytest.mark.parametrize(
    ("version", "offered"),
    [
        (6, ALL_BITS & ~MilterSession.SKIP),
        (6, ALL_BITS & ~0x200),  # DATA cannot be done without
        (6, 0x3F),
        (4, 0x7F),
        (2, 0x7F),  # Sendmail 8.12: there is no DATA
    ],
)
def test_an_older_mta_gets_the_same_answers(
    version: int, offered: int, backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = answer_with(f"OK x 40000 {LIMIT}")
    running = milter(backend)
    with running.session(version, offered) as session:
        for _ in range(2):
            assert session.message("john", 60_001).startswith("452 4.2.2")
            assert session.message("john", 60_001, "SIZE=60001").startswith("452 4.2.2")
            assert session.message("john", 3_000_000).startswith("552 5.2.3")
            assert session.message("john", 3_000_000, "SIZE=3000000").startswith("552 5.2.3")
        assert session.message("john postmaster", 30_000) == ""
        assert session.message("john", 30_001).startswith("452 4.2.2")
        assert session.message("mary", 60_000, "SIZE=60000") == ""
        assert session.message("mary", 1).startswith("452 4.2.2")
        assert session.message("postmaster", 3_000_000) == ""
    assert running.process.stop() == 0 and "Traceback" not in running.process.output()


BODIES = [
    # (recipients, parameters, bytes after which there is no more to know, beginning of the reply)
    ("john", "", LIMIT, "552 5.2.3"),
    ("john", "SIZE=1000", LIMIT, ""),  # who has declared may be believed
    ("grace", "", 3 * LIMIT, "552 5.2.3"),
    ("john grace", "", 3 * LIMIT, "552 5.2.3"),
    ("unlimited", "", LIMIT, ""),
    ("unlimited", "SIZE=1000", LIMIT, ""),
    ("postmaster", "", LIMIT, ""),
    ("unknown", "", LIMIT, ""),
    ("ill", "", LIMIT, ""),
]


def test_a_body_without_end_is_read_no_longer_than_it_can_change_the_answer(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = answer_with(f"OK x 0 {LIMIT}")
    backend.answers[b"grace"] = answer_with(f"OK x 0 {LIMIT}", Quota_Grace=str(2 * LIMIT))
    backend.answers[b"unlimited"] = b"OK %s 0 0\n"
    backend.answers[b"unknown"] = b"UNKNOWN %s\n"
    backend.answers[b"ill"] = b"HTTP/1.0 500 Oops\r\n\r\n"
    running = milter(backend)
    with running.session() as session:
        for recipients, parameters, enough, reply in BODIES:
            session.mail("<sender@example.net>", *parameters.split())
            for recipient in recipients.split():
                assert session.rcpt(f"<{recipient}@example.com>") == ""
            session.data()
            sent = session.body(50_000_000)
            assert sent <= enough + 2 * session.CHUNK, (recipients, parameters)
            if parameters and recipients == "john":
                session.end()
                continue
            got = session.end()
            assert got.startswith(reply) and bool(got) == bool(reply), (recipients, got)


def test_ten_thousand_recipients_of_a_message(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = answer_with(f"OK x 40000 {LIMIT}")
    running = milter(backend, "--timeout", "30")
    with running.session() as session:
        for size, reply in (60_001, "452 4.2.2"), (50_000, ""):
            session.mail()
            for number in range(10_000):
                assert session.rcpt(f"<user{number % 500}@example.com>") == ""
            session.data()
            session.body(size)
            begin = time.monotonic()
            got = session.end()
            assert got.startswith(reply) and bool(got) == bool(reply)
            assert "user0@example.com" in got or not got, "the first"
            assert time.monotonic() - begin < 1 + SLACK
        for user in "user0", "user499+x":
            assert session.message(user, 9_001).startswith("452"), user
        assert session.message("user500", 60_000) == ""
    assert len(backend.asked) == 501


def test_a_recipient_reserves_nothing_and_the_end_decides_by_what_is_known_then(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = answer_with(f"OK x 0 {LIMIT}")
    running = milter(backend)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(running.session()) for _ in range(10)]
        for number, session in enumerate(idle):
            session.mail("<sender@example.net>", *["SIZE=60000"] * (number % 2))
            assert session.rcpt("<john@example.com>") == ""
            session.data()
            session.body(60_000)
        with running.session() as other:
            assert other.message("john", 60_000) == ""
        for session in idle:
            assert session.end().startswith("452 4.2.2 Quota exceeded for john@example.com")
        for session in idle[:2]:
            assert session.message("mary", 45_000) == "", "the session goes on"
        assert idle[2].message("mary", 45_000).startswith("452")


def test_a_newer_answer_counts_at_the_end_of_the_data(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    running = milter(backend, *UNCACHED)
    for now in f"OVERQUOTA x {LIMIT} {LIMIT}", f"OK x 50001 {LIMIT}":
        backend.default = answer_with(f"OK x 0 {LIMIT}")
        with running.session() as first, running.session() as second:
            first.mail()
            assert first.rcpt("<john@example.com>") == ""
            backend.default = answer_with(now)
            second.mail()
            second.rcpt("<john@example.com>")
            first.data()
            first.body(50_000)
            assert first.end().startswith("452"), now


def test_what_was_taken_counts_at_the_end_of_a_message_that_a_hup_interrupts(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = answer_with(f"OK x 0 {LIMIT}")
    running = milter(backend, "--in-flight", "1")
    with running.session() as slow, running.session() as quick:
        slow.mail()
        assert slow.rcpt("<john@example.com>") == ""
        assert quick.message("john", 40_000) == ""
        reload(running)
        assert quick.message("mary", 40_000) == ""
        time.sleep(1.2)  # what was taken has arrived, and nobody has asked since
        slow.data()
        slow.body(60_000)
        assert slow.end().startswith("452 4.2.2 Quota exceeded for john@example.com")


def test_no_older_answer_beats_a_newer_one() -> None:
    """A slow backend's answer comes after one to a later question, and is not the newest."""
    module = load(MILTER)
    ledger = module.Ledger()
    ledger.configure(types.SimpleNamespace(cache_ttl=60, in_flight=60, frontends=1))
    mailbox, now = module.Mailbox("john", "example.com"), time.monotonic()
    newer = module.Answer("OK", 10, LIMIT, at=now)
    older = module.Answer("OVERQUOTA", LIMIT, LIMIT, at=now - 5)
    for answer in newer, older:
        ledger.remember(mailbox, answer, ledger.generation)
    assert ledger.newest(mailbox) is newer


@pytest.mark.parametrize("ttl", ["60", "0"])
@pytest.mark.parametrize("declared", [True, False])
def test_of_sixty_sessions_at_once_no_two_take_the_same_room(
    declared: bool, ttl: str, backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = answer_with("OK x 0 1000000")
    running = milter(backend, "--cache-ttl", ttl, "--timeout", "30")
    barrier = threading.Barrier(60, timeout=60)
    replies: list[list[str]] = []

    def give() -> None:
        with running.session() as session:
            session.mail("<sender@example.net>", *["SIZE=100000"] * declared)
            assert session.rcpt("<john@example.com>") == ""
            barrier.wait()
            session.data()
            session.body(100_000)
            barrier.wait()
            first = session.end()
            barrier.wait()
            replies.append([first, session.message("john", 100_000)])

    threads = [threading.Thread(target=give) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(replies) == 60
    assert sum(first == "" for first, _ in replies) == 9, "a tenth has no room for its headers"
    assert {first[:9] for first, _ in replies} == {"", "452 4.2.2"}
    assert {second[:9] for _, second in replies} == {"452 4.2.2"}


class Mailboxes:
    """A mail system behind the backend: what was taken arrives there after a while."""

    def __init__(self, backend: Backend, users: list[str], quota: int) -> None:
        self.quota = quota
        self.used = dict.fromkeys(users, 0)
        self.lock = threading.Lock()
        self.timers: list[threading.Timer] = []
        for user in users:
            backend.answers[user.encode()] = lambda connection, user=user: self.answer(user)

    def answer(self, user: str) -> bytes:
        """Tell how full a mailbox is by now."""
        used = self.used[user]
        return answer_with(f"{'OVERQUOTA' if used > self.quota else 'OK'} x {used} {self.quota}")

    def deliver(self, user: str, size: int, seconds: float) -> None:
        """Let a message arrive in so many seconds."""
        self.timers.append(threading.Timer(seconds, self.arrive, (user, size)))
        self.timers[-1].start()

    def arrive(self, user: str, size: int) -> None:
        """Put a message, with the header that its way has added, into a mailbox."""
        with self.lock:
            self.used[user] += size + 700


@pytest.mark.parametrize("ttl", ["60", "0.5", "0"])
def test_no_mailbox_is_overfilled_and_none_left_empty_whatever_pours_in(
    ttl: str, backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    """The short form of `.ci/bench burst`, with mail that arrives late and out of order."""
    users = [f"user{number}" for number in range(5)]
    mailboxes = Mailboxes(backend, users, 1_000_000)
    running = milter(backend, "--cache-ttl", ttl)

    def pour(noise: random.Random) -> None:
        with running.session() as session:
            for _ in range(60):
                user, size = noise.choice(users), noise.randrange(1000, 90_000)
                declared = [f"SIZE={size}"] * noise.randrange(2)
                if session.message(user, size, *declared) == "":
                    mailboxes.deliver(user, size, noise.random())

    threads = [threading.Thread(target=pour, args=(random.Random(seed),)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for timer in mailboxes.timers:
        timer.join(10)
    for user, used in mailboxes.used.items():
        assert 850_000 < used <= 1_000_000, (user, used)


class Simulation:
    """An hour of one mailbox, with the real ledger and a clock that does not wait.

    Messages come in bursts, are slow, and are delivered late and out of order, but within the time
    that they count as in flight; the user makes room; answers lag, questions fail, HUPs come.
    """

    def __init__(self, module: Any, seed: int, ttl: float, lag: float, faults: float) -> None:
        self.noise, self.lag, self.faults = random.Random(seed), lag, faults
        self.now, self.numbers = 1000.0, itertools.count()
        module.time = self  # whose monotonic() is the clock
        self.module, self.mailbox = module, module.Mailbox("john", "example.com")
        options = types.SimpleNamespace(cache_ttl=ttl, in_flight=60, frontends=1)
        self.ledger = module.Ledger()
        self.used = self.taken = self.overfilled = 0
        self.waiting: list[int] = []  # the sizes that share the question under way
        self.events: list[tuple[float, int, Callable[[], object]]] = []
        self.repeat(5, self.recipient)
        self.repeat(100, lambda: setattr(self, "used", int(self.used * self.noise.random())))
        self.repeat(50, lambda: self.ledger.configure(options))
        self.ledger.configure(options)

    def monotonic(self) -> float:
        """Stand in for the time module."""
        return self.now

    def after(self, seconds: float, what: Callable[[], object]) -> None:
        """Let something happen in so many seconds."""
        heapq.heappush(self.events, (self.now + seconds, next(self.numbers), what))

    def repeat(self, mean: float, what: Callable[[], object]) -> None:
        """Let something happen now and again."""

        def happen() -> None:
            what()
            self.repeat(mean, what)

        mean_now = self.noise.choice([mean / 10, mean, mean * 3])
        self.after(self.noise.expovariate(1 / mean_now), happen)

    def run(self) -> None:
        """Let an hour pass."""
        while self.now < 4600:
            self.now, _, what = heapq.heappop(self.events)
            what()
            self.ledger.drop_and_count()

    def recipient(self) -> None:
        """Look into the ledger, else ask, or join the question under way."""
        size = self.noise.randrange(1000, 30_000)
        known = self.ledger.fresh(self.mailbox)
        if known is None and self.noise.random() < self.faults:
            known = self.ledger.last(self.mailbox)
            if known is None:
                return
        if known:
            self.passed(known, size)
            return
        self.waiting.append(size)
        if len(self.waiting) == 1:
            answer = self.module.Answer("OK", self.used, LIMIT, at=self.now)
            generation = self.ledger.generation
            self.after(self.noise.random() * self.lag, lambda: self.learn(answer, generation))

    def learn(self, answer: Any, generation: int) -> None:
        """Remember an answer and give it to all who wait."""
        self.ledger.remember(self.mailbox, answer, generation)
        sizes, self.waiting = self.waiting, []
        for size in sizes:
            self.passed(answer, size)

    def passed(self, answer: Any, size: int) -> None:
        """Send the body of a message, which may take a while."""
        self.after(self.noise.random() * 5, lambda: self.end_of_data(answer, size))

    def end_of_data(self, at_rcpt: Any, size: int) -> None:
        """Take a message that fits with its headers, and deliver it later."""
        answer = self.ledger.newest(self.mailbox) or at_rcpt
        in_flight = self.ledger.in_flight_since(self.mailbox, answer)
        if answer.used + in_flight + size + 1024 <= LIMIT:
            self.taken += 1
            self.ledger.add(self.mailbox, size + 1024, at_rcpt)
            self.after(self.noise.random() * 50, lambda: self.deliver(size + 700))

    def deliver(self, size: int) -> None:
        """Put a message into the mailbox."""
        self.used += size
        self.overfilled += self.used > LIMIT


@pytest.mark.parametrize("ttl", [0, 5, 60, 600])
@pytest.mark.parametrize(("lag", "faults"), [(0, 0), (4, 0), (4, 0.5)])
def test_in_many_simulated_hours_a_mailbox_is_never_overfilled(
    ttl: float, lag: float, faults: float
) -> None:
    module = load(MILTER)
    taken = 0
    for seed in range(10):
        hour = Simulation(module, seed, ttl, lag, faults)
        hour.run()
        assert hour.overfilled == 0, seed
        taken += hour.taken
    assert taken > 100


def test_the_log_tells_the_step_and_the_size(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = answer_with(f"OK x 40000 {LIMIT}")
    for dry in (), ("--dry-run",):
        running = milter(backend, *dry)
        with running.session() as session:
            for user, size in ("john", 70_001), ("mary", 80_002), ("paul", 100_003):
                declared = [f"SIZE={size}"] * (user == "john")
                assert bool(session.message(user, size, *declared)) != bool(dry)
        at_rcpt, at_end = running.log("size=70001"), running.log("size=80002")
        too_large = running.log("size=1000")
        assert "verdict=overquota" in at_rcpt and "step=rcpt" in at_rcpt
        assert "verdict=overquota" in at_end and "step=data" in at_end
        assert "verdict=toolarge" in too_large and "step=data" in too_large
        for user, line in ("john", at_rcpt), ("mary", at_end), ("paul", too_large):
            assert f"recipient={user}@example.com user={user} " in line
            assert "used=40000 quota=100000" in line
            assert line.endswith("dry_run=yes") == bool(dry)


# ---- several backends of one domain ----


@pytest.fixture
def three() -> Iterator[list[Backend]]:
    """Give three backends that know nobody until they are told."""
    servers = [Backend() for _ in range(3)]
    for server in servers:
        server.default = b"UNKNOWN %s\n"
    yield servers
    for server in servers:
        with contextlib.suppress(OSError):
            server.close()


def of_domain(backends: list[Backend]) -> list[str]:
    """Return the options that give one domain several backends."""
    return [part for server in backends for part in ("--backend", f"example.com={server.url}")]


def test_users_spread_over_three_backends_are_looked_for_once(
    three: list[Backend], milter: Callable[..., RunningMilter]
) -> None:
    for number, server in enumerate(three):
        server.answers[f"full{number}".encode()] = FULL
        server.answers[f"user{number}".encode()] = b"OK %s 1 100\n"
    nobody = "550 5.1.1 No such user"
    running = milter(None, *of_domain(three), *UNCACHED, "--unknown-reply", nobody)
    for attempt in range(3):
        for number in range(3):
            before = [len(server.asked) for server in three]
            assert running.rcpt(f"<full{number}@example.com>").startswith("452")
            assert running.rcpt(f"<user{number}@example.com>") == ""
            asked = [len(server.asked) - old for server, old in zip(three, before)]
            looked_at = range(number + 1) if attempt == 0 else [number]
            assert asked == [2 * (n in looked_at) for n in range(3)], (attempt, number)
        assert running.rcpt("<nobody@example.com>") == nobody
    assert [server.users().count("nobody") for server in three] == [3, 3, 3]


def test_an_answer_of_several_backends_is_remembered_as_one(
    three: list[Backend], milter: Callable[..., RunningMilter]
) -> None:
    three[2].answers[b"john"] = FULL
    running = milter(None, *of_domain(three))
    for _ in range(3):
        assert running.rcpt("<john@example.com>").startswith("452")
    assert [len(server.asked) for server in three] == [1, 1, 1]


def test_without_a_domain_several_backends_serve_all_others(
    three: list[Backend], milter: Callable[..., RunningMilter]
) -> None:
    three[1].answers[b"john"] = FULL
    three[2].default = FULL
    options = [f"--backend={three[0].url}", f"--backend={three[1].url}"]
    running = milter(None, *options, f"--backend=one.org={three[2].url}")
    assert running.rcpt("<john@example.com>").startswith("452")
    assert running.rcpt("<mary@one.org>").startswith("452")
    assert running.rcpt("<john@one.org>").startswith("452")
    assert [len(server.asked) for server in three] == [1, 1, 2]


def test_a_backend_may_serve_several_domains_beside_different_others(
    three: list[Backend], milter: Callable[..., RunningMilter]
) -> None:
    three[1].answers[b"john"] = FULL
    names = "a.org", "a.org,b.org", "b.org"
    options = [f"--backend={name}={server.url}" for name, server in zip(names, three)]
    running = milter(None, *options)
    assert running.rcpt("<john@a.org>").startswith("452")
    assert running.rcpt("<john@b.org>").startswith("452")
    assert [len(server.asked) for server in three] == [1, 2, 0]


def test_a_backend_named_twice_for_a_domain_is_asked_once_or_an_error(backend: Backend) -> None:
    backend.default = b"UNKNOWN %s\n"
    for one, two in ("x.org", "x.org"), ("x.org", "y.org,X.org."), ("", ""):
        options = [f"--backend={name}{'=' * bool(name)}{backend.url}" for name in (one, two)]
        before = len(backend.asked)
        status, output, errors = run_milter(*options, "--check", "john@x.org")
        if status == 2:
            assert (output, len(errors.splitlines())) == ("", 1) and "--backend" in errors
        else:
            assert "verdict=unknown" in output and len(backend.asked) == before + 1


def test_a_mailbox_that_moves_while_mail_goes_on_is_always_known(
    three: list[Backend], milter: Callable[..., RunningMilter]
) -> None:
    three[0].answers[b"john"] = b"OK %s 1 100\n"
    options = "--unknown-reply", "550 5.1.1 No such user", "--on-error", "tempfail"
    running = milter(None, *of_domain(three), *UNCACHED, *options)
    replies: list[tuple[bool, str]] = []
    moved, done = threading.Event(), threading.Event()

    def give() -> None:
        with running.session() as session:
            while not done.is_set():
                before = moved.is_set()
                session.mail()
                replies.append((before, session.rcpt("<john@example.com>")[:3]))
                session.abort()

    threads = [threading.Thread(target=give) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(replies) > 100, "some mail")
    for source, goal in (0, 2), (2, 1), (1, 0), (0, 2):  # it is there before it leaves
        three[goal].answers[b"john"] = FULL if (source, goal) == (0, 2) else b"OK %s 1 100\n"
        del three[source].answers[b"john"]
        asked = len(three[goal].asked)
        wait_for(functools.partial(three[goal].has_been_asked, asked + 50), "its mail")
    time.sleep(0.3)
    moved.set()
    wait_for(lambda: sum(after for after, _ in replies) > 100, "more mail")
    done.set()
    for thread in threads:
        thread.join(20)
    assert {reply for _, reply in replies} <= {"", "452"}
    assert {reply for after, reply in replies if after} == {"452"}


FIRST_BACKENDS: dict[str, Any] = {
    "is dead": None,
    "hangs": hang,
    "drips": drip,
    "fails": b"HTTP/1.0 500 Oops\r\n\r\n",
    "talks nonsense": b"Mailbox full, sorry\n",
    "closes": lambda connection: None,
    "knows nobody": b"UNKNOWN %s\n",
}


@pytest.mark.parametrize("kind", FIRST_BACKENDS)
def test_the_next_backend_is_asked_where_the_first(
    kind: str, three: list[Backend], milter: Callable[..., RunningMilter]
) -> None:
    three[0].default = FIRST_BACKENDS[kind]
    if kind == "is dead":
        three[0].close()
    three[1].answers.update({b"full": FULL, b"john": b"OK %s 1 100\n"})
    three[2].default = FULL
    options = "--timeout", "3", "--on-error", "tempfail", "--retry-after", "60"
    running = milter(None, *of_domain(three), *options, *UNCACHED)
    begin = time.monotonic()
    for _ in range(2):
        assert running.rcpt("<full@example.com>").startswith("452")
        assert running.rcpt("<john@example.com>") == ""
    assert time.monotonic() - begin < 2 * 3 + SLACK, "who knew is asked first"
    assert three[1].users() == ["full", "john"] * 2 and three[2].asked == []
    log = running.process.output()
    assert log.count("state=down") == (kind == "is dead")
    assert running.rcpt("<paul@example.com>").startswith("452"), "whom only the third knows"


ALL_BACKENDS: list[tuple[list[Any], str, list[int]]] = [
    # (what each of three says of john, None: it is dead; the reply with --on-error tempfail and
    # an --unknown-reply; how often each is asked)
    ([b"UNKNOWN %s\n"] * 3, "550", [1, 1, 1]),
    ([None, None, None], "451", [0, 0, 0]),
    ([hang, hang, hang], "451", [1, 1, 1]),
    ([b"nonsense\n", None, b"HTTP/1.0 500 Oops\r\n\r\n"], "451", [1, 0, 1]),
    ([b"UNKNOWN %s\n", None, b"UNKNOWN %s\n"], "451", [1, 0, 1]),
    ([b"HTTP/1.0 500 Oops\r\n\r\n", b"UNKNOWN %s\n", b"UNKNOWN %s\n"], "451", [1, 1, 1]),
    ([b"OK %s 1 100\n", FULL, FULL], "", [1, 0, 0]),
    ([FULL, b"OK %s 1 100\n", FULL], "452", [1, 0, 0]),
    ([hang, hang, FULL], "452", [1, 1, 1]),
    ([None, b"UNKNOWN %s\n", FULL], "452", [0, 1, 1]),
]


def test_all_backends_of_a_domain_give_one_answer_in_one_time(
    milter: Callable[..., RunningMilter],
) -> None:
    options = "--timeout", "3", "--on-error", "tempfail", "--unknown-reply", "550 5.1.1 None"
    for answers, reply, asked in ALL_BACKENDS:
        servers = [Backend() for _ in answers]
        for server, answer in zip(servers, answers):
            server.default = answer
            if answer is None:
                server.close()
        running = milter(None, *of_domain(servers), *options)
        begin = time.monotonic()
        got = running.rcpt("<john@example.com>")
        assert time.monotonic() - begin < 3 + SLACK
        assert got[:3] == reply and [len(server.asked) for server in servers] == asked, answers
        for server, answer in zip(servers, answers):
            if answer is not None:
                server.close()


def test_what_one_backend_leaves_of_the_time_the_others_may_take(
    three: list[Backend], milter: Callable[..., RunningMilter]
) -> None:
    def slow(connection: socket.socket) -> bytes:
        time.sleep(2.8)
        return FULL

    three[0].default, three[1].default, three[2].default = hang, b"nonsense\n", slow
    running = milter(None, *of_domain(three), "--timeout", "6")
    begin = time.monotonic()
    assert running.rcpt("<john@example.com>").startswith("452")
    assert 4 < time.monotonic() - begin < 6 + SLACK, "two seconds for the first"


def test_the_last_known_answer_stands_in_where_none_knows_a_mailbox_for_certain(
    three: list[Backend], milter: Callable[..., RunningMilter]
) -> None:
    three[1].answers[b"john"] = FULL
    options = "--on-error", "tempfail", "--unknown-reply", "550 5.1.1 No such user"
    running = milter(None, *of_domain(three), *UNCACHED, *options)
    assert running.rcpt("<john@example.com>").startswith("452")
    three[1].answers[b"john"] = b"HTTP/1.0 500 Oops\r\n\r\n"
    assert running.rcpt("<john@example.com>").startswith("452"), "the last known answer"
    assert "cached=yes" in running.log("reason=")
    del three[1].answers[b"john"]
    assert running.rcpt("<john@example.com>").startswith("550")


def test_a_stand_by_takes_over_and_each_backend_is_down_for_itself(
    three: list[Backend], milter: Callable[..., RunningMilter]
) -> None:
    for server in three[:2]:
        server.default = b"OK %s 1 100\n"
        server.answers[b"full"] = FULL
    first, second = three[:2]
    options = "--retry-after", "1", "--timeout", "2", "--on-error", "tempfail"
    running = milter(None, *of_domain([first, second]), *UNCACHED, *options)
    assert running.rcpt("<full@example.com>").startswith("452") and second.asked == []
    first.close()
    for _ in range(20):
        assert running.rcpt("<full@example.com>").startswith("452")
        assert running.rcpt("<john@example.com>") == ""
    assert f"backend={first.url}" in running.log("state=down") and len(second.asked) == 40
    again = Backend(first.port)
    again.default = FULL
    wait_for(lambda: running.rcpt(f"<new{time.time()}@example.com>"), "the first to be asked")
    second.close()
    wait_for(lambda: running.rcpt("<john@example.com>").startswith("452"), "the first alone")
    again.close()
    log = running.process.output()
    assert [log.count(f"backend={server.url} state=down") for server in (first, second)] == [1, 1]


def test_what_is_in_flight_belongs_to_the_mailbox_and_not_to_a_backend(
    three: list[Backend], milter: Callable[..., RunningMilter]
) -> None:
    three[0].answers[b"john"] = answer_with(f"OK x 0 {LIMIT}")
    running = milter(None, *of_domain(three), *UNCACHED)
    with running.session() as session:
        assert session.message("john", 60_000) == ""
        three[1].answers[b"john"] = answer_with(f"OK x 0 {LIMIT}")
        del three[0].answers[b"john"]
        assert session.message("john", 39_001).startswith("452")
        three[1].close()
        three[2].answers[b"john"] = answer_with(f"OK x 60000 {LIMIT}")
        assert session.message("john", 39_001).startswith("452")
        assert session.message("john", 38_000) == ""
    assert three[2].users() == ["john"] * 2


def test_an_older_figure_of_a_stand_by_does_not_make_the_next_one_grow(
    three: list[Backend], milter: Callable[..., RunningMilter]
) -> None:
    running = milter(None, *of_domain(three[:2]), *UNCACHED)
    three[1].answers[b"john"] = answer_with(f"OK x 10000 {LIMIT}")
    with running.session() as session:
        three[0].answers[b"john"] = answer_with(f"OK x 50000 {LIMIT}")
        assert session.message("john", 20_000) == ""
        three[0].answers[b"john"] = OOPS
        session.mail()
        assert session.rcpt("<john@example.com>") == "", "by the stand-by"
        three[0].answers[b"john"] = answer_with(f"OK x 50000 {LIMIT}")
        three[1].answers[b"john"] = OOPS
        assert session.message("john", 29_001).startswith("452")


# ---- dead mailboxes ----


def days_ago(days: float) -> str:
    """Return an HTTP date."""
    return email.utils.formatdate(time.time() - days * 86400, usegmt=True)


OVER, GOOD = "OVERQUOTA x 101 100", "OK x 90 100"
DEAD_MAILBOXES = [
    # (line, Last-Modified, parameters, beginning of the reply with --inactive-after 30)
    (OVER, days_ago(30.1), "", "552 5.2.2"),
    (OVER, days_ago(5000), "SIZE=10", "552 5.2.2"),
    (OVER, days_ago(29.9), "", "452 4.2.2"),
    (OVER, days_ago(0), "", "452 4.2.2"),
    (OVER, None, "", "452 4.2.2"),
    (GOOD, days_ago(5000), "", ""),
    (GOOD, days_ago(5000), "SIZE=10", ""),
    (OVER, days_ago(5000), "SIZE=101", "552 5.2.3"),
    ("OK x 100 100", days_ago(5000), "", ""),
    ("OVERQUOTA x 5 0", days_ago(5000), "", "552 5.2.2"),
    ("OVERQUOTA x", days_ago(5000), "", "552 5.2.2"),
    ("UNKNOWN x 101 100", days_ago(5000), "", ""),
    *(
        (OVER, nonsense, "", "452 4.2.2")
        for nonsense in (
            *("", "0", "-1", "1500000000", "yesterday", "31 days ago", "GMT", ",", "\xff\xfe"),
            *("Thu, 99 Jan 2015 00:00:00 GMT", "Thu, 01 Foo 2015 00:00:00 GMT"),
            *("Thu, 01 Jan 2015 25:61:00 GMT", "Thu, 01 Jan 99999999999 00:00:00 GMT"),
            *("Fri, 01 Jan 2150 00:00:00 GMT", "x" * 5000, "Thu, 01 Jan 2015 \0 GMT"),
        )
    ),
]


def test_a_full_mailbox_that_nothing_changes_is_refused_for_good(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    running = milter(backend, "--inactive-after", "30")
    patient = milter(backend)
    worded = ["--inactive-after", "1", "--inactive-reply", "550 5.2.1 {address} is no longer used"]
    other = milter(backend, *worded)
    for number, (line, changed, parameters, reply) in enumerate(DEAD_MAILBOXES):
        header = {} if changed is None else {"Last_Modified": changed}
        backend.answers[f"u{number}".encode()] = answer_with(line, **header)
        got = running.rcpt(f"<u{number}@example.com>", *parameters.split())
        assert got.startswith(reply) and bool(got) == bool(reply), (line, changed, got)
        got = patient.rcpt(f"<u{number}@example.com>")
        assert got[:9] == ("452 4.2.2" if line.startswith("OVER") else ""), (line, changed)
    assert other.rcpt("<u0@example.com>") == "550 5.2.1 u0@example.com is no longer used"
    assert other.rcpt("<u3@example.com>").startswith("452")
    assert "u0@example.com" in running.rcpt("<u0@example.com>")


def test_a_last_known_answer_refuses_nobody_for_good(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers[b"john"] = answer_with(OVER, Last_Modified=days_ago(40))
    running = milter(backend, *UNCACHED, "--inactive-after", "30")
    assert running.rcpt("<john@example.com>").startswith("552 5.2.2")
    backend.answers[b"john"] = b"HTTP/1.0 500 Oops\r\n\r\n"
    assert running.rcpt("<john@example.com>").startswith("452 4.2.2")
    assert running.rcpt("<john@example.com>", "SIZE=101").startswith("452 4.2.2")


def make_old(folder: pathlib.Path) -> None:
    """Let all that stands in a folder be unchanged for 40 days."""
    then = time.time() - 40 * 86400
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then))


LIFE = [
    # what happens to a mailbox of each kind: the path of an mbox file and of a Maildir
    ("a message is delivered", "echo more >> {mbox}; echo m > {maildir}/new/9.x"),
    (
        "a message is read",
        "sed -i 's/^Status: O/Status: RO/' {mbox}; mv {maildir}/new/1.x {maildir}/cur/1.x:2,S",
    ),
    ("a message is deleted", "sed -i '$d' {mbox}; rm {maildir}/cur/1.x:2,S"),
]


@pytest.mark.parametrize("kind", ["mbox", "maildir"])
def test_a_real_mailbox_that_is_used_lives(
    kind: str,
    start: Callable[..., Process],
    milter: Callable[..., RunningMilter],
    tmp_path: pathlib.Path,
) -> None:
    mail = tmp_path / "mail"
    mbox, maildir = mail / "john", mail / "john.d"
    for part in "cur", "new", "tmp":
        (maildir / part).mkdir(parents=True)
    (maildir / "new/1.x").write_text("x" * 3000)
    (maildir / "cur/2.x:2,S").write_text("x" * 3000)
    mbox.write_text("From x\nStatus: O\n\n" + "x\n" * 3000)
    port = free_port()
    settings = {"QUOTA_MAILBOX": f"{mail}/%n", "QUOTA_MAILDIR": f"{mail}/%n.d"}
    environment = {**os.environ, **settings, "QUOTA_LIMIT": "1K"}
    script = MBOX_CGI if kind == "mbox" else MAILDIR_CGI
    start(script, "--serve", str(port), port=port, env=environment)
    url = "--backend", f"http://127.0.0.1:{port}/"
    running = milter(None, *url, *UNCACHED, "--inactive-after", "30")
    assert running.rcpt("<john@example.com>").startswith("452 4.2.2")
    for event, command in LIFE:
        make_old(mail)
        assert running.rcpt("<john@example.com>").startswith("552 5.2.2"), event
        subprocess.run(command.format(mbox=mbox, maildir=maildir), shell=True, check=True)
        assert running.rcpt("<john@example.com>").startswith("452 4.2.2"), event


# ---- metrics ----


def read_metrics(file: pathlib.Path) -> dict[str, Any]:
    """Read a file with Prometheus' own parser: families by their names."""
    try:
        from prometheus_client import parser
    except ImportError:
        missing("prometheus_client is missing: apt-get install python3-prometheus-client")
    text = file.read_text(encoding="ascii")
    assert text.endswith("\n"), "it is whole"
    return {family.name: family for family in parser.text_string_to_metric_families(text)}


def values(families: dict[str, Any], kind: str, *words: str) -> list[float]:
    """Return the values of samples of a kind that have these words in names or labels."""
    return [
        sample.value
        for family in families.values()
        for sample in family.samples
        if family.type == kind
        and all(word in f"{sample.name} {list(sample.labels.values())}" for word in words)
    ]


def holds(file: pathlib.Path, text: str) -> bool:
    """Say whether there is such a file and it has this text."""
    return file.exists() and text in file.read_text()


METRICS_TIME = 15 + 2 * SLACK  # seconds in which the file is replaced


def exercise(running: RunningMilter) -> None:
    """Give messages whose numbers can be found in the metrics."""
    with running.session() as session:
        for size in 70_001, 70_002:
            assert session.message("john", size, f"SIZE={size}").startswith("452")
        assert session.message("john", 80_005).startswith("452")
        assert session.message("john paul", 20_000) == ""
        assert session.message("mary", 30_000, "SIZE=30000") == ""
        assert session.message("full full full full full", 1).startswith("452")
        assert session.message("gone john@dead.org", 5) == ""
        session.mail()
        for number in range(30):
            assert session.rcpt(f"<user{number}@example.com>") == ""


def test_metrics_tell_prometheus_what_the_milter_does(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    file = folder / "quota.prom"
    backend.default = answer_with(f"OK x 40000 {LIMIT}")
    backend.answers.update({b"full": FULL, b"gone": b"UNKNOWN %s\n"})
    secret = backend.url.replace("//", "//user:secret@")
    dead = f"http://127.0.0.1:{free_port()}/"
    backends = [f"--backend=example.com={secret}", f"--backend=dead.org={dead}"]
    options = *backends, "--metrics", file, "--in-flight", "600"
    running = milter(None, *options, preexec_fn=lambda: os.umask(0o077))
    seen: set[int] = set()

    def complete() -> dict[str, Any]:
        """Read the file: whenever that is, it is whole."""
        if not file.exists():
            return {}
        seen.add(file.stat().st_ino)
        assert file.stat().st_mode & 0o777 == 0o644
        families = read_metrics(file)
        return families if 80_005 in values(families, "counter") else {}

    wait_for(lambda: complete() or seen, "the first file", METRICS_TIME)
    exercise(running)
    families = wait_for(complete, "the numbers", METRICS_TIME)
    assert len(seen) > 1, "a file is replaced, not written over"
    assert "secret" not in file.read_text()
    assert {family.type for family in families.values()} == {"counter", "gauge", "histogram"}
    assert all(family.documentation for family in families.values())
    assert 140_003 in values(families, "counter"), "bytes refused at RCPT"
    assert values(families, "counter", "full") == [] == values(families, "gauge", "john")
    assert {"overquota", "unknown", "fault", "ok"} <= {
        label
        for family in families.values()
        for sample in family.samples
        for label in sample.labels.values()
    }
    flight = values(families, "gauge", "flight")
    assert 5 in flight, "messages under way to a mailbox: john, paul, mary, gone, john@dead.org"
    assert any(75_010 <= value <= 77_690 for value in flight), "bytes"
    assert values(families, "gauge", f":{backend.port}/").count(1) == 1, "up"
    assert values(families, "gauge", dead) == [0], "down"
    mailboxes = 35  # john, paul, mary, full, gone and thirty users
    assert mailboxes in values(families, "gauge"), "remembered answers"
    assert mailboxes in values(families, "counter", f":{backend.port}/"), "questions"
    count = values(families, "histogram", "_count", f":{backend.port}/")
    buckets = values(families, "histogram", "_bucket", f":{backend.port}/")
    assert count == [mailboxes] == buckets[-1:] and buckets == sorted(buckets)
    assert 0 < values(families, "histogram", "_sum", f":{backend.port}/")[0] < 60
    assert os.listdir(folder) == ["quota.prom"]
    assert running.process.stop() == 0
    assert os.listdir(folder) in ([], ["quota.prom"])


def test_backends_that_differ_in_their_query_alone_are_told_apart(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "quota.prom"
    urls = [f"--backend={d}.org={backend.url}?secret={d}" for d in ("a", "b")]
    running = milter(None, *urls, "--metrics", file)
    wait_for(file.exists, "the metrics", METRICS_TIME)
    names = re.findall(r'^quota_milter_backend_up{backend="(.*)"} 1$', file.read_text(), re.M)
    assert names == [backend.url, backend.url + "#2"]
    assert running.process.stop() == 0


def test_metrics_do_not_replace_a_device(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    running = milter(backend, "--metrics", pipe)
    assert "state=failed" in running.log(f"metrics={pipe}")
    assert pipe.is_fifo() and running.process.stop() == 0


def test_metrics_that_cannot_be_written_harm_nothing(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    need_root()
    backend.answers[b"full"] = FULL
    gone, disk, target = tmp_path / "gone", tmp_path / "disk", tmp_path / "target"
    for folder in gone, disk, tmp_path / "linked":
        folder.mkdir()
    target.write_text("precious\n")
    link = tmp_path / "linked/quota.prom"
    link.symlink_to(target)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk])
    if mounted.returncode:
        missing("this machine mounts no tmpfs")
    try:
        files = gone / "quota.prom", disk / "quota.prom", link
        milters = [milter(backend, "--metrics", file) for file in files]
        for file in files:
            wait_for(functools.partial(holds, file, "#"), "the file", METRICS_TIME)
            assert read_metrics(file)
        shutil.rmtree(gone)
        with contextlib.suppress(OSError), open(disk / "filler", "wb", 0) as filler:
            while True:
                filler.write(b"x" * 512)
        for running, file in list(zip(milters, files))[:2]:
            logged = functools.partial(holds, running.process.log, str(file))
            wait_for(logged, "the log", METRICS_TIME)
            assert running.rcpt("<full@example.com>").startswith("452")
            assert running.rcpt("<john@example.com>") == ""
        assert read_metrics(files[1]), "what was whole stays whole"
        assert set(os.listdir(disk)) == {"filler", "quota.prom"}
        (disk / "filler").unlink()
        gone.mkdir()
        old = files[1].stat().st_ino
        wait_for(files[0].exists, "the file, again", METRICS_TIME)
        wait_for(lambda: files[1].stat().st_ino != old, "the new file", METRICS_TIME)
        assert read_metrics(files[0]) and read_metrics(files[1])
        for running in milters:
            assert running.process.stop() == 0
            assert "Traceback" not in running.process.output()
            assert running.process.output().count("quota.prom") <= 3, "logged, not poured"
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- reload ----

RELOADED = [
    # (a line of the option file, recipient, parameters; the reply without the line and with it)
    ("--overquota-reply 552 5.2.2 Full", "full", "", "452 4.2.2 Quota", "552 5.2.2 Full"),
    ("--toolarge-reply 452 4.2.2 Large", "john", "SIZE=101", "552 5.2.3", "452 4.2.2 Large"),
    ("--unknown-reply 550 5.1.1 None", "gone", "", "", "550 5.1.1 None"),
    ("--on-error tempfail", "ill", "", "", "451 4.3.0"),
    ("--exempt full", "full", "", "452", ""),
    ("--ignore-size", "john", "SIZE=50", "452", ""),
    ("--recipient-delimiter -", "full-x", "", "", "452"),
    ('--recipient-delimiter ""', "full+x", "", "452", ""),
    ("--case-sensitive", "FULL", "", "452", ""),
    ("--dry-run", "full", "", "452", ""),
    ("--inactive-after 30", "dead", "", "452", "552 5.2.2"),
    ("--inactive-after 30\n--inactive-reply 550 5.2.1 Dead", "dead", "", "452", "550 5.2.1 Dead"),
    ("--aliases {folder}/aliases", "info", "", "", "452"),
    ("--backend other.org={other}", "full@other.org", "", "452", ""),
    ("@{folder}/inner", "full", "", "452", ""),
]


@pytest.fixture
def reloading(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> tuple[RunningMilter, pathlib.Path, str]:
    """Give a milter with an option file, that file, and what stands in it at first."""
    backend.default = b"OK %s 90 100\n"
    backend.answers.update({b"full": FULL, b"gone": b"UNKNOWN %s\n", b"ill": b"nonsense\n"})
    backend.answers[b"full-x"] = backend.answers[b"full+x"] = b"OK %s 1 100\n"
    backend.answers[b"FULL"] = b"OK %s 1 100\n"
    backend.answers[b"dead"] = answer_with(OVER, Last_Modified=days_ago(40))
    (tmp_path / "aliases").write_text("info: full\n")
    (tmp_path / "inner").write_text("--exempt full\n")
    file = tmp_path / "options"
    base = f"# the options\n--backend {backend.url}\n"
    file.write_text(base)
    return milter(None, f"@{file}"), file, base


def test_hup_reads_the_option_file_again(
    reloading: tuple[RunningMilter, pathlib.Path, str], tmp_path: pathlib.Path
) -> None:
    running, file, base = reloading
    other = Backend()
    with running.session() as session:

        def reply(recipient: str, parameters: str) -> str:
            session.mail("<sender@example.net>", *parameters.split())
            got = session.rcpt(f"<{recipient}{'' if '@' in recipient else '@example.com'}>")
            session.abort()
            return got

        for line, recipient, parameters, without, with_it in RELOADED:
            for text, expected in ((line, with_it), ("", without)):
                file.write_text(base + text.format(folder=tmp_path, other=other.url) + "\n")
                reload(running)
                got = reply(recipient, parameters)
                assert got.startswith(expected) and bool(got) == bool(expected), (line, text)
    assert running.process.stop() == 0
    other.close()


def test_hup_changes_backends_timeouts_and_files_but_neither_socket_nor_sessions(
    reloading: tuple[RunningMilter, pathlib.Path, str], backend: Backend, tmp_path: pathlib.Path
) -> None:
    running, file, base = reloading
    second, port = Backend(), free_port()
    second.default = hang
    lines = [f"--backend {second.url}", "--timeout 1", "--on-error tempfail", "--verbose"]
    lines += [f"--listen inet:{port}@127.0.0.1", "--syslog", f"--metrics {tmp_path}/quota.prom"]
    with running.session() as session:
        assert session.message("john", 1) == ""
        file.write_text("\n".join(lines) + "\n")
        reload(running)
        session.mail()
        begin = time.monotonic()
        assert session.rcpt("<john@example.com>").startswith("451")
        assert time.monotonic() - begin < 1 + SLACK
        assert second.users() == ["john"] and backend.users() == ["john"]
        second.default = b"OK %s 1 100\n"
        assert session.rcpt("<postmaster@example.com>") == ""
        assert running.log("recipient=postmaster"), "verbose, and not to syslog"
        assert not answers_at(port) and running.rcpt("<mary@example.com>") == ""
    wait_for((tmp_path / "quota.prom").exists, "the metrics", METRICS_TIME)
    assert running.process.stop() == 0
    second.close()


def test_what_is_in_flight_stays_over_a_reload(
    reloading: tuple[RunningMilter, pathlib.Path, str],
) -> None:
    running, file, base = reloading
    other = Backend()
    other.default = answer_with(f"OK x 0 {LIMIT}")
    file.write_text(f"--backend {other.url}\n")
    reload(running)
    with running.session() as session:
        assert session.message("john", 60_000) == ""
        file.write_text(f"--backend example.com={other.url}\n--frontends 3\n")
        reload(running)
        assert session.message("john", 39_001).startswith("452")
        assert session.message("mary", 40_000) == ""
        assert session.message("mary", 0).startswith("452"), "three frontends"
    other.close()


BAD_FILES = [
    # (what comes behind two good lines, the line that the log names, a word of the reason)
    ("--timeout soon\n", 3, "--timeout"),
    ("\n# x\n--timeout 0\n", 5, "--timeout"),
    ("--nonsense 5\n", 3, "--nonsense"),
    ("--timeout\n", 3, "--timeout"),
    ("stray\n", 3, "stray"),
    ("--overquota-reply 250 2.0.0 Fine\n", 3, "--overquota-reply"),
    ("--backend nonsense\n", 3, "--backend"),
    ("--aliases {folder}/nowhere\n", 3, "--aliases"),
    ("--cafile {folder}/nowhere\n", 3, "--cafile"),
    ("@{folder}/nowhere\n", 3, "nowhere"),
]


def test_an_error_in_an_option_file_names_file_and_line(
    backend: Backend, tmp_path: pathlib.Path
) -> None:
    file, outer = tmp_path / "options", tmp_path / "outer"
    outer.write_text(f"--verbose\n@{file}\n--timeout 3\n")
    for text, line, word in BAD_FILES:
        file.write_text(f"# x\n--backend {backend.url}\n" + text.format(folder=tmp_path))
        for first in file, outer:
            for check in (), ("--check",), ("--check", "john@example.com"):
                status, output, errors = run_milter(f"@{first}", *check)
                assert (status, output, len(errors.splitlines())) == (2, "", 1), text
                assert re.search(rf"{file}\D{{1,10}}{line}\b", errors) and word in errors, errors
    assert backend.asked == []


def test_a_bad_option_file_changes_nothing_and_is_logged(
    reloading: tuple[RunningMilter, pathlib.Path, str], tmp_path: pathlib.Path
) -> None:
    running, file, base = reloading
    for text, line, word in [*BAD_FILES, (f"@{file}\n", 3, ""), ("\xff\n", 0, "")]:
        changed = base.partition("\n")[2] + "--overquota-reply 552 5.2.2 Changed\n"
        file.write_text(changed + text.format(folder=tmp_path), encoding="latin-1")
        logged = reload(running)
        assert word in logged and str(file) in logged, (text, logged)
        assert not word or re.search(rf"{file}\D{{1,10}}{line}\b", logged), logged
        assert running.rcpt("<full@example.com>").startswith("452 4.2.2 Quota"), text
    file.unlink()
    assert str(file) in reload(running)
    assert running.rcpt("<full@example.com>").startswith("452 4.2.2 Quota")
    file.write_text(base + "--overquota-reply 552 5.2.2 Changed\n")
    reload(running)
    assert running.rcpt("<full@example.com>") == "552 5.2.2 Changed"
    assert running.process.stop() == 0 and "Traceback" not in running.process.output()


def test_a_file_that_would_keep_the_reader_waiting_does_not_hold_up_a_reload(
    reloading: tuple[RunningMilter, pathlib.Path, str], tmp_path: pathlib.Path
) -> None:
    running, file, base = reloading
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for text in f"@{pipe}", f"--aliases {pipe}":
        file.write_text(f"{base}{text}\n")
        assert str(pipe) in reload(running)
    file.unlink()
    os.mkfifo(file)
    assert str(file) in reload(running)
    assert run_milter(f"@{pipe}", "--check")[0] == 2
    assert running.rcpt("<full@example.com>").startswith("452")


def test_hups_while_a_mailbox_hangs_multiply_neither_questions_nor_aliases(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    aliases = tmp_path / "aliases"
    aliases.write_text("".join(f"user{n}@example.com box{n}@example.com\n" for n in range(200_000)))
    backend.default = hang
    running = milter(backend, "--aliases", aliases, "--max-queries", "2", "--timeout", "0.5")
    running.rcpt("<user1@example.com>")
    memory: list[int] = []
    for number in range(8):
        reload(running)
        for more in range(3):
            running.rcpt(f"<hangs{number}-{more}@example.com>")
        memory.append(figure_of(running, "VmRSS"))
    assert backend.most <= 2
    assert memory[-1] < 1.3 * memory[1], "two sets of aliases at the most"
    assert figure_of(running, "Threads") < 60


def test_check_without_an_address_says_whether_the_options_are_good(
    backend: Backend, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "options"
    file.write_text(f"--backend {backend.url}\n--aliases {tmp_path}/aliases\n")
    status, _, errors = run_milter(f"@{file}", "--check")
    assert status == 2 and len(errors.splitlines()) == 1 and f"{tmp_path}/aliases" in errors
    (tmp_path / "aliases").write_text("info: john\n")
    for arguments in [f"@{file}", "--check"], ["--check", f"@{file}"]:
        status, _, errors = run_milter(*arguments)
        assert status == 0 and "error" not in errors
    assert backend.asked == []


NOBODY_SERVES = [
    # (addresses, exit status of --check where only example.com has a backend)
    (["john@elsewhere.net"], 2),
    (["john@example.com", "john@elsewhere.net"], 2),
    (["full@example.com", "john@elsewhere.net"], 2),
    (["john@elsewhere.net", "full@example.com"], 2),
    (["postmaster@example.com", "john@example.com"], 0),
    (["full@example.com"], 1),
]


def test_check_of_an_address_that_no_backend_serves_is_status_2(backend: Backend) -> None:
    backend.answers[b"full"] = FULL
    for addresses, expected in NOBODY_SERVES:
        options = f"--backend=example.com={backend.url}", "--check"
        status, output, errors = run_milter(*options, *addresses)
        assert (status, errors) == (expected, ""), addresses
        assert len(output.splitlines()) == len(addresses)
        assert ("nobackend" in output) == ("elsewhere" in str(addresses))


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
    backend.answers[b"john"] = taking(1.5)
    running = milter(backend, "--timeout", "20")
    results = at_once(running, ["<john@example.com>"] * 60)
    assert all(reply.startswith("452") for reply, _ in results)
    assert backend.users() == ["john"]


def test_who_joins_a_question_late_has_a_whole_timeout_for_it(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers[b"john"] = taking(1.5)
    running = milter(backend, "--timeout", "1")
    results = at_once(running, ["<john@example.com>"] * 2, pause=0.7)
    assert [reply[:3] for reply, _ in results] == ["", "452"]


def test_a_backend_gets_no_more_questions_at_a_time_than_it_has_places(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = taking(0.05)
    running = milter(backend, "--max-queries", "3", "--timeout", "20")
    results = at_once(running, [f"<user{number}@example.com>" for number in range(40)])
    assert all(reply.startswith("452") for reply, _ in results)
    assert backend.most == 3 and len(backend.asked) == 40


def test_the_timeout_covers_the_wait_for_a_place(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = hang
    running = milter(backend, "--max-queries", "2", "--timeout", "1", *TEMPFAIL)
    begin = time.monotonic()
    results = at_once(running, [f"<user{number}@example.com>" for number in range(30)])
    assert time.monotonic() - begin < 1 + SLACK
    assert all(reply.startswith("451") and took < 1 + SLACK for reply, took in results)
    assert backend.most <= 2


@pytest.mark.parametrize("seconds", [0.2, 0.4])  # at its deadline a question waits, or is asked
def test_a_backend_that_answers_slowly_is_not_called_down(
    seconds: float, backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = taking(seconds)
    running = milter(backend, "--max-queries", "4", "--timeout", "1")
    replies = at_once(running, [f"<user{number}@example.com>" for number in range(40)])
    assert {reply[:3] for reply, _ in replies} == {"452", ""}
    assert running.rcpt("<afterwards@example.com>").startswith("452")
    assert "state=down" not in running.process.output()


def test_a_backend_that_is_silent_three_times_in_a_row_is_left_alone(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers.update(dict.fromkeys([b"a", b"b", b"d", b"e", b"f"], hang))
    running = milter(backend, "--timeout", "0.5", "--retry-after", "2", *TEMPFAIL)
    for user in "a", "b", "c", "d", "e":
        reply = running.rcpt(f"<{user}@example.com>")
        assert reply.startswith("451") == (user != "c"), user
    assert "state=down" not in running.process.output(), "there was an answer between"
    assert running.rcpt("<f@example.com>").startswith("451")
    assert running.log("state=down")
    asked, begin = len(backend.asked), time.monotonic()
    assert running.rcpt("<g@example.com>").startswith("451")
    assert "verdict=fault" in running.log("recipient=g@") and len(backend.asked) == asked
    wait_for(lambda: running.rcpt("<g@example.com>") == "", "an answer")
    assert time.monotonic() - begin > 1 and running.log("state=up")


def head_alone(connection: socket.socket) -> None:
    """Send the header of an answer and no more, until the client goes away."""
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n")
    hang(connection)


def test_a_backend_that_begins_its_answers_and_hangs_stays_down(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.default = head_alone
    running = milter(backend, "--timeout", "0.5", "--retry-after", "30", *TEMPFAIL)
    for user in "a", "b", "c":
        assert running.rcpt(f"<{user}@example.com>").startswith("451")
    assert running.log("state=down")
    begin = time.monotonic()
    for number in range(20):
        assert running.rcpt(f"<user{number}@example.com>").startswith("451")
    assert time.monotonic() - begin < SLACK and len(backend.asked) == 3
    assert "state=up" not in running.process.output()


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
    gate = Gate()
    backend.answers[b"slow"] = gate
    running = milter(backend, "--timeout", "0.5", *TEMPFAIL)
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


def test_the_question_that_is_longest_overdue_makes_room_for_who_needs_it(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    first, second = Gate(), Gate()
    backend.answers.update({b"first": first, b"second": second, b"full": FULL})
    running = milter(backend, "--max-queries", "2", "--timeout", "1", *TEMPFAIL)
    assert running.rcpt("<first@example.com>").startswith(FAULT)
    assert running.rcpt("<second@example.com>").startswith(FAULT)
    begin = time.monotonic()
    assert running.rcpt("<full@example.com>").startswith("452")
    assert time.monotonic() - begin < 1, "nobody waits for what is overdue"
    assert first.given_up.wait(SLACK) and not second.given_up.is_set()
    assert running.rcpt("<second@example.com>").startswith(FAULT)
    second.opened.set()
    wait_for(lambda: running.rcpt("<second@example.com>").startswith("452"), "the late answer")
    assert backend.users().count("second") == 1


def test_who_waits_for_room_gets_it_as_soon_as_a_question_is_overdue(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers = {b"a": hang, b"b": hang, b"full": FULL}
    running = milter(backend, "--max-queries", "2", "--timeout", "3", *TEMPFAIL)
    users = [f"<{user}@example.com>" for user in ("a", "b", "full")]
    results = at_once(running, users, pause=1)
    assert [reply[:3] for reply, _ in results] == ["451", "451", "452"]


def test_hanging_mailboxes_do_not_keep_the_others_from_being_checked(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    for number in range(30):
        backend.answers[b"hangs%d" % number] = hang
    backend.default = FULL
    running = milter(backend, "--max-queries", "4", "--timeout", "1")
    for number in range(10):
        hanging = [f"<hangs{3 * number + more}@example.com>" for more in range(3)]
        healthy = [f"<user{number}-{more}@example.com>" for more in range(9)]
        results = at_once(running, hanging + healthy, pause=0.03)
        replies = [reply[:3] for reply, _ in results]
        assert replies == [""] * 3 + ["452"] * 9, f"round {number}"
    assert "state=down" not in running.process.output()


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
    assert silent.most == 2 and len(backend.asked) == 10
    silent.close()


def processes(running: RunningMilter) -> list[int]:
    """Return the milter's processes, the one that serves last."""
    found = [running.process.popen.pid]
    for pid in found:
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
        found += [int(child) for child in children.split()]
    return found


def figure_of(running: RunningMilter, what: str) -> int:
    """Return a figure of all its processes, in kB where it is memory."""
    status = [pathlib.Path(f"/proc/{pid}/status").read_text() for pid in processes(running)]
    return sum(int(re.findall(rf"{what}:\s+(\d+)", text)[0]) for text in status)


def low_limit() -> None:
    """Lower the soft limit of descriptors, in a process that is about to start."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))


def test_five_hundred_sessions_stay_open_from_a_soft_limit_of_256(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers[b"john"] = FULL
    running = milter(backend, preexec_fn=low_limit)
    limits = pathlib.Path(f"/proc/{processes(running)[-1]}/limits").read_text()
    soft, hard = re.findall(r"Max open files +(\d+) +(\d+)", limits)[0]
    assert soft == hard
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(running.session()) for _ in range(500)]
        for _ in range(2):
            for number, session in enumerate(sessions):
                session.mail()
                assert session.rcpt(f"<user{number % 50}@example.com>") == ""
            assert sessions[-1].rcpt("<john@example.com>").startswith("452")
        assert figure_of(running, "VmRSS") < 80 * 1024
    assert running.process.stop() == 0


@pytest.mark.parametrize("form", ["john+{}@example.com", "{}@example.com", "john@{}.example"])
def test_long_recipients_take_no_memory(
    form: str, backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    running = milter(None, "--backend", f"example.com={backend.url}")
    with running.session() as session:
        session.mail()
        for number in range(100):
            session.rcpt("<" + form.format(f"{number:05}") + ">")
        before = figure_of(running, "VmRSS")
        for number in range(11_000):
            session.rcpt("<" + form.format(f"{number:05}" + "x" * 1845) + ">")
    assert figure_of(running, "VmRSS") - before < 20 * 1024


def test_where_no_thread_can_be_started_nobody_passes_unchecked(
    backend: Backend, start: Callable[..., Process], folder: pathlib.Path
) -> None:
    need_root()
    backend.default = FULL
    script, port = folder / "quota_milter.py", free_port()
    shutil.copy(MILTER, script)
    options = ["--listen", f"inet:{port}@127.0.0.1", "--backend", backend.url, *TEMPFAIL]
    process = start(PYTHON, script, *options, port=port, user=60001, group=60001)
    running = RunningMilter(port, process)

    def limit(threads: int) -> None:
        command = [need("prlimit", "util-linux"), f"--nproc={threads}:10000"]
        subprocess.run(
            [*command, f"--pid={process.popen.pid}"], check=True, user=60001, group=60001
        )

    with running.session() as session:
        session.mail()
        limit(figure_of(running, "Threads"))
        for user in "john", "mary", "paul":
            assert session.rcpt(f"<{user}@example.com>")[:3] in ("451", "452")
        limit(10_000)
        for user in "john", "mary":
            assert session.rcpt(f"<{user}@example.com>").startswith("452")
        limit(figure_of(running, "Threads"))
    begin = time.monotonic()
    assert process.stop() == 0 and time.monotonic() - begin < 2 + SLACK / 2


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
    misbehaving: list[Any] = [OOPS, b"nonsense\n", reset, close_at_once, twice(kept(line))]

    def answer(connection: socket.socket) -> Optional[bytes]:
        what = noise.choice(misbehaving) if noise.random() < 0.1 else kept(line)
        found: Optional[bytes] = what(connection) if callable(what) else what
        return found

    return answer


def test_every_verdict_is_right_while_a_backend_fails_at_random(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    """The short form of `.ci/bench soak`."""
    for number in range(300):
        status, kind = ("OVERQUOTA", "full") if number % 3 == 0 else ("OK", "user")
        line = f"{status} {kind}{number} 1 100\n".encode()
        backend.answers[f"{kind}{number}".encode()] = unsteady(line, random.Random(number))
    running = milter(backend, "--cache-ttl", "0.3", *TEMPFAIL)
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
        reload(running)
        assert session.rcpt("<john@example.com>").startswith("452")
        assert backend.users() == ["john"] * 2
        backend.answers[b"john"] = OOPS
        reload(running)
        assert session.rcpt("<john@example.com>") == "", "the last known is forgotten, too"
    assert running.process.popen.poll() is None and running.process.stop() == 0


def test_usr1_logs_the_counters_and_so_does_the_end(
    backend: Backend, milter: Callable[..., RunningMilter]
) -> None:
    backend.answers.update({b"john": FULL, b"ill": OOPS, b"gone": b"UNKNOWN %s\n"})
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


STORM = "import os, sys\nfor _ in range(200_000): os.kill(int(sys.argv[1]), 1)"


@pytest.mark.parametrize("when", ["while it starts", "while it serves"])
def test_a_storm_of_signals_does_not_end_it(
    when: str, backend: Backend, start: Callable[..., Process]
) -> None:
    port = free_port()
    options = "--listen", f"inet:{port}@127.0.0.1", "--backend", backend.url
    running = RunningMilter(port, start(PYTHON, MILTER, *options))
    if when == "while it serves":
        running.log("state=started")
    else:
        status = pathlib.Path(f"/proc/{running.process.popen.pid}/status")
        ignored_or_caught = r"Sig(Ign|Cgt):\s+\w+[13579bdf]\n"
        wait_for(lambda: re.search(ignored_or_caught, status.read_text()), "its first lines")
    pid = str(running.process.popen.pid)
    storms = [subprocess.Popen([PYTHON, "-c", STORM, pid]) for _ in range(2)]
    for _ in range(20):
        running.process.popen.send_signal(signal.SIGUSR1)
        time.sleep(0.01)
    for storm in storms:
        assert storm.wait(60) == 0

    def passes() -> bool:
        with contextlib.suppress(OSError, AssertionError):
            return running.rcpt("<john@example.com>") == ""
        return False

    for _ in range(3):  # also a little later
        wait_for(passes, "an answer")
        time.sleep(1)
    assert running.log("counters") and running.process.popen.poll() is None
    assert running.process.stop() == 0


def test_term_does_not_wait_behind_hups_and_a_million_aliases(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "aliases"
    file.write_text("".join(f"user{n}@example.com box{n}@example.com\n" for n in range(1_000_000)))
    running = milter(backend, "--aliases", file)
    for _ in range(20):
        running.process.popen.send_signal(signal.SIGHUP)
        time.sleep(0.02)
    begin = time.monotonic()
    running.process.popen.terminate()
    assert running.process.popen.wait(120) == 0
    assert time.monotonic() - begin < 2 + SLACK / 2
    assert "state=stopped" in running.process.output()


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


# In a mount namespace of its own, so that the machine's /dev is as it was.
SILENT_SYSLOG = """
import os, socket, subprocess, sys
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "none", "/dev/shm"], check=True)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listener.bind("/dev/shm/log")
os.set_inheritable(listener.fileno(), True)
for name in "null", "random", "urandom":
    open(f"/dev/shm/{name}", "w").close()
    subprocess.run(["mount", "--bind", f"/dev/{name}", f"/dev/shm/{name}"], check=True)
subprocess.run(["mount", "--rbind", "/dev/shm", "/dev"], check=True)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_syslog_that_reads_nothing_holds_up_neither_mail_nor_the_end(
    backend: Backend, start: Callable[..., Process]
) -> None:
    need_root()
    port = free_port()
    options = ["--listen", f"inet:{port}@127.0.0.1", "--backend", backend.url]
    unshare = [need("unshare", "util-linux"), "--mount", PYTHON, "-c", SILENT_SYSLOG]
    process = start(*unshare, PYTHON, MILTER, *options, "--syslog", "--verbose", port=port)
    with MilterSession(port) as session:
        session.mail()
        for number in range(12_000):  # more than are kept
            assert session.rcpt(f"<user{number % 10}@example.com>") == ""
    process.popen.terminate()
    assert process.popen.wait(20) == 0
    assert process.output() == ""


# ---- real mail and web servers ----

README = HERE / "README.md"
ROOM = 200 << 20  # bytes: the limit in README's blocks
FRONTEND, STRANGER = "127.0.0.1", "127.0.0.2"  # who may ask here, and who may not
LIBRARY = "/usr/local/lib/quota"  # README's folder of the scripts
LISTEN = "unix:/var/spool/postfix/quota/milter.sock"  # README's socket
PLAIN_URL = "http://192.0.2.10:8025/quota.cgi"  # README's backend
PARTS = {  # which Debian package has a server's folder below /etc, or a program of its
    "apache2": "apache2",
    "lighttpd": "lighttpd",
    "nginx": "nginx-light",
}


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


def run_commands(commands: str, **options: Any) -> str:
    """Run commands as a shell does and return what they print; nothing is installed or booted."""
    with tempfile.TemporaryDirectory() as stubs:
        for name in "apt-get", "systemctl":
            os.symlink("/bin/true", f"{stubs}/{name}")
        environment = {**os.environ, **options.pop("env", {})}
        environment["PATH"] = f"{stubs}:{environment['PATH']}:/usr/sbin"
        arguments: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60}
        arguments.update(options, env=environment)
        done = subprocess.run(["sh", "-euc", commands], **arguments)
    assert done.returncode == 0, (commands, done)
    return str(done.stdout)


def run_block(name: str, replacements: Mapping[str, Path], **options: Any) -> str:
    """Run the commands of a block and return what they print."""
    return run_commands(readme_block(name, replacements), **options)


@contextlib.contextmanager
def open_folder(parent: Optional[str] = None) -> Iterator[pathlib.Path]:
    """Give a folder in which every user may search, which pytest's own may not be."""
    name = tempfile.mkdtemp(prefix="quota-", dir=parent)
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
    """A backend of README: mbox files, the scripts in a folder of their own, a port."""

    def __init__(self, folder: pathlib.Path, start: Callable[..., Process]) -> None:
        self.folder, self.start = folder, start
        self.port, self.other_port = free_port(), free_port()  # the second: for Debian's own site
        self.url = f"http://127.0.0.1:{self.port}/cgi-bin/quota.cgi"
        self.edits: list[tuple[str, str]] = []  # what a test leaves out of the blocks
        self.syslog: Process
        self.spool = folder / "mail"
        self.spool.mkdir(mode=0o711)  # for others: to search, not to list
        self.library = folder / "lib"
        self.script = self.library / "quota.cgi"
        own = {LIBRARY: self.library, "/etc/systemd/system": folder / "units"}
        run_block("Backend: copy", own, cwd=HERE)
        text = self.script.read_text().replace("/var/mail/%n", f"{self.spool}/%n")
        self.script.write_text(text)
        self.fill("john", ROOM + 1)
        self.fill("mary", ROOM - 1000)

    def fill(self, user: str, size: int) -> None:
        """Let a mailbox have this size; the file is a sparse one."""
        (self.spool / user).touch(mode=0o600)
        os.truncate(self.spool / user, size)

    def block(self, name: str, replacements: Optional[Mapping[str, Path]] = None) -> str:
        """Return a block of README with this site's scripts and frontend."""
        return self.adapt(readme_block(name), replacements)

    def adapt(self, text: str, replacements: Optional[Mapping[str, Path]] = None) -> str:
        """Return a configuration with this site's scripts and frontend in place of README's."""
        table: dict[str, Path] = {LIBRARY: self.library, "192.0.2.25": FRONTEND}
        for old, new in {**table, **(replacements or {})}.items():
            assert old in text, f"{old} is not in {text}"
            text = text.replace(old, str(new))
        for pattern, instead in self.edits:
            text = re.sub(pattern, instead, text)
        return text

    def ask(self, query: str, *options: str) -> str:
        """Ask with curl; return the status and the line."""
        return self.fetch(f"{self.url}?{query}", *options)

    def fetch(self, url: str, *options: str) -> str:
        """Fetch a URL with curl; return the status and the body."""
        curl = [need("curl", "curl"), "-s", "-m", "10", "-w", r"\n%{http_code}", *options]
        done = subprocess.run([*curl, "--path-as-is", url], capture_output=True)
        body, _, status = done.stdout.decode("utf-8", "surrogateescape").rpartition("\n")
        return f"{status} {body.rstrip()}"


def stock(site: Site, name: str, edits: Mapping[str, Path]) -> pathlib.Path:
    """Copy Debian's own configuration of a server, with other ports and folders put in."""
    need(f"/etc/{name}", PARTS[name])
    copy = site.folder / name
    shutil.copytree(f"/etc/{name}", copy, symlinks=True)
    found = set()
    for path in copy.rglob("*"):
        if path.is_symlink():
            target = os.readlink(path).replace(f"/etc/{name}", str(copy))
            path.unlink()
            path.symlink_to(target)
        elif path.is_file():
            text = path.read_text(errors="surrogateescape")
            for old, new in {f"/etc/{name}/": f"{copy}/", **edits}.items():
                found |= {old} if old in text else set()
                text = text.replace(old, str(new))
            path.write_text(text, errors="surrogateescape")
    assert found >= set(edits), f"not in /etc/{name}: {set(edits) - found}"
    return copy


def command_of(block: str) -> str:
    """Return the command that a block of README gives in its second line."""
    return block.splitlines()[1].lstrip("# ")


def stock_apache(site: Site, http: int, https: int) -> dict[str, str]:
    """Copy Debian's Apache; return the environment of its commands."""
    ports: dict[str, Path] = {"Listen 80\n": f"Listen 127.0.0.1:{http}\n", "*:80>": f"*:{http}>"}
    ports["Listen 443\n"] = f"Listen 127.0.0.1:{https}\n"
    copy = stock(site, "apache2", ports)
    (site.folder / "socks").mkdir()  # as apache2ctl does
    shutil.chown(site.folder / "socks", "www-data")
    with open(copy / "envvars", "a") as file:
        file.write(f"export APACHE_PID_FILE={site.folder}/apache.pid\n")
        file.writelines(f"export APACHE_{x}_DIR={site.folder}\n" for x in ("RUN", "LOCK", "LOG"))
    return {"APACHE_CONFDIR": str(copy), "APACHE_STATE_DIRECTORY": str(site.folder / "state")}


def run_apache(site: Site) -> None:
    """Start Apache with the copy of Debian's configuration."""
    copy = site.folder / "apache2"
    command = '. "$0/envvars"; exec apache2 -d "$0" -f apache2.conf -DFOREGROUND'
    environment = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin"}
    site.start("sh", "-c", command, copy, port=site.port, env=environment)


def start_apache(site: Site, replacements: Optional[Mapping[str, Path]] = None) -> None:
    """Put README's block into Debian's Apache, run its command and start it."""
    environment = stock_apache(site, site.port, site.other_port)
    block = site.block("/etc/apache2/conf-available/quota.conf", replacements)
    (site.folder / "apache2/conf-available/quota.conf").write_text(block)
    run_commands(command_of(block), env=environment)
    run_apache(site)


def apache(site: Site) -> None:
    """Start Apache with mod_cgid."""
    start_apache(site)


WSGI = {  # the block's other way
    "a2enmod cgid && ": "",
    "\nScriptAlias": "\n#ScriptAlias",
    "\n#WSGI": "\nWSGI",
}


def apache_wsgi(site: Site) -> None:
    """Start Apache with mod_wsgi."""
    need("/usr/lib/apache2/modules/mod_wsgi.so", "libapache2-mod-wsgi-py3")
    start_apache(site, WSGI)


# What README says in a line of each of these.
LIGHTTPD = r"""# conf-available/50-quota.conf
# lighty-enable-mod quota && systemctl restart lighttpd
server.modules += ( "mod_access", "mod_alias", "mod_cgi", "mod_setenv" )
# This URL and whatever begins with it; no other reaches the folder.
$HTTP["url"] =~ "^/cgi-bin/quota\.cgi" {
    alias.url = ( "/cgi-bin/quota.cgi" => "/usr/local/lib/quota/quota.cgi" )
    cgi.assign = ( "quota.cgi" => "" )
    setenv.add-environment = ( "QUOTA_LIMIT" => "200M", "QUOTA_ALLOW" => "192.0.2.25" )
    $HTTP["remoteip"] != "192.0.2.25" {
        url.access-deny = ( "" )
    }
}
"""
UWSGI = """[uwsgi]
plugin = python3
http-socket = 192.0.2.10:8025
wsgi-file = /usr/local/lib/quota/quota.cgi
env = QUOTA_LIMIT=200M
env = QUOTA_ALLOW=192.0.2.25
# uWSGI reads a % itself: each is written twice.
env = QUOTA_MAILBOX=/var/mail/%%n
uid = www-data
gid = www-data
master = true
# TERM ends it; uWSGI would read its files again and go on.
die-on-term = true
threads = 16
"""
GUNICORN = r"""
install -m 755 quota.cgi /usr/local/lib/quota/quota.py
QUOTA_LIMIT=200M QUOTA_ALLOW=192.0.2.25 setpriv --reuid www-data --regid www-data --init-groups \
    gunicorn --chdir /usr/local/lib/quota --bind 192.0.2.10:8025 --threads 16 quota:application
"""


def lighttpd(site: Site) -> None:
    """Start lighttpd with mod_cgi, beside Debian's 10-cgi.conf."""
    program = need("lighttpd", "lighttpd")
    edits: dict[str, Path] = {
        'include_shell "/usr/share/lighttpd/use-ipv6.pl " + server.port': "",
        "= 80\n": f'= {site.port}\nserver.bind = "127.0.0.1"\n',
        "/var/log/lighttpd": site.folder / "log",
        "/run/lighttpd.pid": site.folder / "lighttpd.pid",
    }
    copy = stock(site, "lighttpd", edits)
    (site.folder / "log").mkdir()
    shutil.chown(site.folder / "log", "www-data")
    enable = site.folder / "lighty-enable-mod"  # which knows no other folder than /etc/lighttpd
    enable.write_text(
        pathlib.Path("/usr/sbin/lighty-enable-mod")
        .read_text()
        .replace("/etc/lighttpd/", f"{copy}/")
    )
    enable.chmod(0o755)
    block = site.adapt(LIGHTTPD)
    (copy / "conf-available/50-quota.conf").write_text(block)
    for command in "lighty-enable-mod cgi", command_of(block):
        run_commands(command.replace("lighty-enable-mod", str(enable)))
    site.start(program, "-D", "-f", copy / "lighttpd.conf", port=site.port)


def nginx(site: Site) -> None:
    """Start nginx, and fcgiwrap behind it."""
    program, wrapper = need("nginx", "nginx-light"), need("fcgiwrap", "fcgiwrap")
    run = site.folder / "run"
    run.mkdir(exist_ok=True)
    shutil.chown(run, "www-data", "www-data")
    wrapped = site.start(*as_user("www-data"), wrapper, "-fc8", "-s", f"unix:{run}/fcgiwrap.socket")
    wrapped.wait_ready((run / "fcgiwrap.socket").exists, "fcgiwrap")
    edits: dict[str, Path] = {
        "listen 80 ": f"listen 127.0.0.1:{site.other_port} ",
        "listen [::]:80 default_server;": "",
        "/run/nginx.pid": site.folder / "nginx.pid",
        "/var/log/nginx": site.folder,
    }
    copy = stock(site, "nginx", edits)
    own = {
        "listen 8025": f"listen 127.0.0.1:{site.port}",
        "/run/fcgiwrap": f"{run}/fcgiwrap",
        "/etc/nginx/": f"{copy}/",
    }
    block = site.block("/etc/nginx/sites-available/quota", own)
    (copy / "sites-available/quota").write_text(block)
    run_commands(command_of(block))
    arguments = ["-c", copy / "nginx.conf", "-e", "stderr", "-g", "daemon off;"]
    site.start(program, *arguments, port=site.port)


def uwsgi(site: Site) -> None:
    """Start uWSGI."""
    program = need("uwsgi", "uwsgi-core")
    need("/usr/lib/uwsgi/plugins/python3_plugin.so", "uwsgi-plugin-python3")
    own = {"192.0.2.10:8025": f"127.0.0.1:{site.port}", "/var/mail/": f"{site.spool}/"}
    path = site.folder / "quota.ini"
    path.write_text(site.adapt(UWSGI, own))
    site.start(program, "--ini", path, port=site.port)


def gunicorn(site: Site) -> None:
    """Start gunicorn on a copy of the script that is called quota.py."""
    need("gunicorn", "gunicorn")
    own: dict[str, Path] = {
        " quota.cgi": f" {site.script}",
        "192.0.2.10:8025": f"127.0.0.1:{site.port}",
    }
    block = site.adapt(GUNICORN, own)
    site.start("sh", "-euc", block, port=site.port)


BACKEND_UNIT = "/etc/systemd/system/quota-backend.service"


def unit_settings(name: str, replacements: Mapping[str, Path]) -> tuple[str, dict[str, str]]:
    """Read command and environment of the backend's unit with a drop-in, as systemd does."""
    text = readme_block(BACKEND_UNIT) + readme_block(name)
    for old, new in replacements.items():
        assert old in text, f"{old} is neither in the unit nor in the block {name} of README.md"
        text = text.replace(old, str(new))
    lines = text.replace("%%", "%").splitlines()
    command = next(line for line in lines if line.startswith("ExecStart="))
    settings = [line.partition("=")[2] for line in lines if line.startswith("Environment=")]
    return command.partition("=")[2], dict(setting.split("=", 1) for setting in settings)


MBOX_UNIT = "/etc/systemd/system/quota-backend.service.d/mailboxes.conf, for mbox files"
VMAIL_UNIT = "/etc/systemd/system/quota-backend.service.d/mailboxes.conf, for Maildirs of vmail"
HOMES_UNIT = "/etc/systemd/system/quota-backend.service.d/mailboxes.conf, for Maildirs in homes"


def start_unit(site: Site, name: str, replacements: Mapping[str, Path], *wrapper: str) -> None:
    """Start what a unit of README starts, as another user, without systemd."""
    own: dict[str, Path] = {LIBRARY: site.library, "192.0.2.10:8025": f"127.0.0.1:{site.port}"}
    own["QUOTA_ALLOW=192.0.2.25"] = f"QUOTA_ALLOW={FRONTEND}"
    command, settings = unit_settings(name, {**own, **replacements})
    site.start(*wrapper, *command.split(), port=site.port, env={**os.environ, **settings})


def no_web_server(site: Site) -> None:
    """Start the script with --serve, as the unit for mbox files does."""
    start_unit(site, MBOX_UNIT, {"/var/mail": site.spool}, *as_user("www-data"))


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


# ---- what must get no answer ----

SIBLINGS = [
    "/cgi-bin/maildir_quota.cgi",
    "/cgi-bin/quota.cgi/../maildir_quota.cgi",
    "/cgi-bin/quota.cgi/%2e%2e/maildir_quota.cgi",
    "/cgi-bin/quota.cgi%2F..%2Fmaildir_quota.cgi",
    "/lib/quota.cgi",
]
SPELLINGS = [
    "/cgi-bin/quota.cgi",
    "//cgi-bin/quota.cgi",
    "/cgi-bin//quota.cgi",
    "/cgi-bin/./quota.cgi",
    "/cgi-bin/%2e/quota.cgi",
    "/cgi-bin/x/../quota.cgi",
    "/cgi-bin/x/%2E%2e/quota.cgi",
    "/cgi-bin%2Fquota.cgi",
    "/cgi-bin/quota.cgi/",
    "/cgi-bin/quota.cgi/x",
    "/cgi-bin/quota.cgi//x",
    "/cgi-bin/quota.cgi%2Fx",
    "/cgi-bin/quota.cgi;x",
    "/cgi-bin/quota.cgix",
    "/cgi-bin/quota%2Ecgi",
    "/cgi-bin/%71uota.cgi",
    "/CGI-BIN/QUOTA.CGI",
    "/cgi-bin/quota.cgi%00",
    "/cgi-bin/",
    "/",
    *SIBLINGS,
]
FORGERIES = [  # header fields by which an address may be claimed
    f"X-Forwarded-For: {FRONTEND}",
    f"X-Real-IP: {FRONTEND}",
    f"Forwarded: for={FRONTEND}",
    f"Remote-Addr: {FRONTEND}",
    "QUOTA-ALLOW: 0.0.0.0/0",
    "Host: localhost",
]
# What a block is without one of its two rules: the other one must do.
RULES = {
    "both": [],
    "web server": [
        (r"\n *(SetEnv|fastcgi_param) QUOTA_ALLOW.*", ""),
        (r', "QUOTA_ALLOW" => "[^"]*"', ""),
    ],
    "QUOTA_ALLOW": [
        (r"Require ip .*", "Require all granted"),
        (r"\n *url\.access-deny.*", ""),
        (r"\n *deny all;", ""),
    ],
}
GUARDED = [(server, rule) for server in RULED for rule in RULES]
GUARDED += [(server, "both") for server in SERVERS if server not in RULED]


def gets_nothing(answer: str) -> bool:
    """Say whether an answer tells nothing of a mailbox."""
    return answer[:1] in "45" and str(ROOM) not in answer and "john" not in answer


@pytest.mark.parametrize(("server", "rule"), GUARDED)
def test_a_stranger_gets_no_answer_at_any_url(
    site: Site, server: Callable[[Site], None], rule: str
) -> None:
    site.edits = RULES[rule]
    server(site)
    if site.edits:  # the other rule is there no more
        copies = [p for p in site.folder.glob("*/*-available/*quota*") if p.is_file()]
        assert all(("QUOTA_ALLOW" in p.read_text()) == (rule == "QUOTA_ALLOW") for p in copies)
    assert site.ask("u=john").startswith("200 OVERQUOTA")  # it is there to be had
    stranger = ["--interface", STRANGER]
    top = f"http://127.0.0.1:{site.port}"
    for path in SPELLINGS:
        for query in "u=john", "u=root", "":
            got = site.fetch(f"{top}{path}?{query}", *stranger)
            assert gets_nothing(got) or not query or path == "/", (path, query, got)
            assert str(ROOM) not in got, (path, query, got)
    for header in FORGERIES:
        assert gets_nothing(site.ask("u=john", *stranger, "-H", header)), header
    for method in "HEAD", "POST", "OPTIONS":
        got = site.ask("u=john", *stranger, "-X", method, "-m", "2")
        assert str(ROOM) not in got, method


@pytest.mark.parametrize("server", RULED)
def test_the_script_beside_it_answers_nobody(site: Site, server: Callable[[Site], None]) -> None:
    server(site)
    for path in SIBLINGS:
        got = site.fetch(f"http://127.0.0.1:{site.port}{path}?u=root")
        assert str(ROOM) not in got, (path, got)
    for path in SPELLINGS:  # Debian's own site, on another port, has none of them
        got = site.fetch(f"http://127.0.0.1:{site.other_port}{path}?u=john", "-m", "2")
        assert str(ROOM) not in got, (path, got)


def test_who_is_not_the_frontend_gets_no_answer_and_the_mail_is_accepted(
    site: Site, milter: Callable[..., RunningMilter]
) -> None:
    no_web_server(site)
    proxy = site.start(PYTHON, "-c", RELAY, str(site.port), port=None)
    port = int(wait_for(lambda: proxy.output().strip(), "the relay's port"))
    running = milter(None, "--backend", site.url.replace(str(site.port), str(port)))
    assert running.rcpt("<john@example.com>") == ""
    assert "status 403" in running.log("verdict=fault")


# Hands each connection on, from another address of loopback.
RELAY = f"""
import socket, sys, threading
def copy(a, b):
    while data := a.recv(65536):
        b.sendall(data)
    b.shutdown(socket.SHUT_WR)
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    client = listener.accept()[0]
    server = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10, ("{STRANGER}", 0))
    for pair in (client, server), (server, client):
        threading.Thread(target=copy, args=pair, daemon=True).start()
"""


@pytest.mark.parametrize("server", [apache, apache_wsgi])
def test_the_rule_of_apache_holds_on_every_site_that_reaches_the_folder(
    site: Site, server: Callable[[Site], None]
) -> None:
    other = "\n<VirtualHost *:{0}>\nScriptAlias /s/ {1}/\nAlias /files/ {1}/\n</VirtualHost>\n"
    site.edits = [(r"\Z", other.format(site.port, site.library).replace("\\", r"\\"))]
    server(site)
    for path in "/s/quota.cgi", "/s/maildir_quota.cgi", "/files/quota.cgi", "/files/", "/s/":
        for url in f"http://127.0.0.1:{site.port}{path}", f"http://x.org:{site.port}{path}":
            got = site.fetch(
                url + "?u=john",
                "--interface",
                STRANGER,
                "--resolve",
                f"x.org:{site.port}:127.0.0.1",
            )
            assert got[:3] in ("403", "404"), (url, got)


def groups_of(pid: int) -> set[str]:
    """Return the ids of all groups of a process."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return {x for line in re.findall(r"^(?:Gid|Groups):(.*)$", status, re.M) for x in line.split()}


@pytest.mark.parametrize("server", [uwsgi, gunicorn, apache_wsgi])
def test_the_workers_have_nothing_of_roots_groups(
    site: Site, server: Callable[[Site], None]
) -> None:
    server(site)
    assert site.ask("u=mary").startswith("200 ")
    names = [f"/proc/{pid}" for pid in os.listdir("/proc") if pid.isdigit()]
    workers = []
    for name in names:
        with contextlib.suppress(OSError):
            if str(site.folder).encode() in pathlib.Path(name, "cmdline").read_bytes():
                workers.append(int(name[6:]))
    mine = [pid for pid in workers if pathlib.Path(f"/proc/{pid}").stat().st_uid != 0]
    assert mine
    for pid in mine:
        assert "0" not in groups_of(pid), pid


# ---- usual mistakes ----


class Mistake(NamedTuple):
    """A line of README's unit or its file for mbox files, what it becomes, what is told."""

    line: str
    instead: str
    told: str


ALLOWED = f"QUOTA_ALLOW={FRONTEND}"
PATH = "QUOTA_MAILBOX={spool}/%%n"
MISTAKES = {
    "a path that is not there": Mistake(PATH, "QUOTA_MAILBOX=/var/mial/%n", "500 ERROR .*exist"),
    "one % in a unit, which systemd takes": Mistake(
        PATH, "QUOTA_MAILBOX={spool}/quota-backend.service", "500 ERROR .*QUOTA_MAILBOX.*user"
    ),
    "one % for the domain, too": Mistake(
        PATH,
        "QUOTA_MAILBOX=/run/credentials/quota-backend.service/quota-backend.service",
        "500 ERROR .*QUOTA_MAILBOX",
    ),
    "a placeholder that there is not": Mistake(
        PATH, "QUOTA_MAILBOX={spool}/%n.%l", "500 ERROR .*QUOTA_MAILBOX.*%n.*%d.*%u.*%h"
    ),
    "a path that is not absolute": Mistake(PATH, "QUOTA_MAILBOX=mail/%n", "500 ERROR .*begin with"),
    "a limit with a unit of its own": Mistake(
        "QUOTA_LIMIT=200M", "QUOTA_LIMIT=200MB", "500 ERROR .*QUOTA_LIMIT.*200M"
    ),
    "a file of limits with colons": Mistake(
        ALLOWED, ALLOWED + "\nEnvironment=QUOTA_USERS={folder}/users", "500 ERROR .*line 2"
    ),
    "a file of limits that is not there": Mistake(
        ALLOWED, ALLOWED + "\nEnvironment=QUOTA_USERS={folder}/nothing", "500 ERROR .*QUOTA_USERS"
    ),
    "another frontend": Mistake(ALLOWED, "QUOTA_ALLOW=192.0.2.25", "403 ERROR "),
}


def told_by_check(site: Site) -> str:
    """Return what --check prints about a mailbox of this site: its status must be 2."""
    check = ["--backend", f"example.com={site.url}", "--check", "mary@example.com"]
    status, output, errors = run_milter(*check)
    assert status == 2, (output, errors)
    return output + errors


@pytest.mark.parametrize("name", MISTAKES)
def test_a_usual_mistake_of_a_backend_is_told_by_check(site: Site, name: str) -> None:
    mistake = MISTAKES[name]
    (site.folder / "users").write_text("paul 100M\njohn:100M\n")
    line, instead = (x.format(spool=site.spool, folder=site.folder) for x in mistake[:2])
    start_unit(site, MBOX_UNIT, {"/var/mail": site.spool, line: instead}, *as_user("www-data"))
    told = told_by_check(site)
    assert re.search(f'reason="?status {mistake.told}', told), told
    assert str(site.spool) not in told


def test_a_usual_mistake_with_a_web_server_is_told_by_check(site: Site) -> None:
    apache(site)
    right, site.url = site.url, site.url.replace("quota.cgi", "qouta.cgi")
    assert "status 404" in told_by_check(site)
    site.url = right
    site.spool.chmod(0o700)
    assert "status 500 ERROR cannot read the mailbox: Permission denied" in told_by_check(site)
    site.script.chmod(0o644)
    assert "status 500" in told_by_check(site)
    site.url = right.replace("http:", "https:")
    assert "no connection: [SSL" in told_by_check(site)
    site.url = right.replace(str(site.port), str(free_port()))
    assert "Connection refused" in told_by_check(site)


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
SUBMISSION = """
submission inet n       -       y       -       -       smtpd
    -o smtpd_milters=
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
relay     unix  -       -       n       -       -       smtp
lmtp      unix  -       -       n       -       -       lmtp
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


def milter_elsewhere(port: int) -> str:
    """Return README's lines of main.cf, with the one for a milter at a port in use."""
    own = {
        "\nsmtpd_milters": "\n#smtpd_milters",
        "\n#smtpd_milters = { inet": "\nsmtpd_milters = { inet",
        "192.0.2.26:8894": f"127.0.0.1:{port}",
    }
    return readme_block("/etc/postfix/main.cf", own)


@pytest.fixture(scope="module")
def frontend() -> Iterator[Frontend]:
    """Give a Postfix with README's lines in main.cf; it serves all tests that change nothing."""
    need_root()
    with open_folder() as path:
        port = free_port()
        with Postfix(path, milter_elsewhere(port)) as postfix:
            yield Frontend(postfix, port)


def start_milter_for(port: int, site: Site, *options: Path) -> RunningMilter:
    """Start the milter where the MTA looks for it, with README's file of options."""
    own: dict[str, Path] = {
        LISTEN: f"inet:{port}@127.0.0.1",
        PLAIN_URL: site.url,
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
    start_milter_for(frontend.milter_port, site, "--cache-ttl", "0", "--in-flight", "0")
    port = frontend.postfix.port
    assert send(port, "john@example.com") == [quota_exceeded("john@example.com")]
    site.fill("john", 0)
    assert send(port, "john@example.com") == [""]
    site.fill("john", ROOM - 1000)
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
    start_milter_for(frontend.milter_port, site, "--in-flight", "0")
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
        for recipient in '"a b"@example.com', "J\u00fcRGEN@example.com":
            code, text = client.docmd(f"RCPT TO:<{recipient}>")
            reply = quota_exceeded(recipient.replace("\u00fc", "?"))
            assert f"{code} {text.decode()}" == reply
    assert "user=j\\xc3\\xbcrgen" in running.log("RGEN")


def test_submission_goes_without_the_milter_where_master_cf_says_so(site: Site) -> None:
    lighttpd(site)
    port = free_port()
    assert f"`{SUBMISSION.split()[-2]} {SUBMISSION.split()[-1]}`" in README.read_text()
    with Postfix(site.folder, milter_elsewhere(port), MASTER_CF + SUBMISSION) as postfix:
        start_milter_for(port, site)
        assert send(postfix.port, "john@example.com") == [quota_exceeded("john@example.com")]
        assert send(postfix.submission_port, "john@example.com") == [""]


def test_postfix_accepts_mail_when_the_milter_hangs_or_is_stopped(site: Site) -> None:
    lighttpd(site)
    port = free_port()
    action = "default_action=accept"
    quicker = milter_elsewhere(port).replace(action, f"{action}, command_timeout=1s")
    with Postfix(site.folder, quicker) as postfix:
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
    with Postfix(site.folder, readme_block("/etc/postfix/main.cf")) as postfix:
        run_block("Frontend: start", {**spool, "quota-milter": "daemon"})
        file = site.folder / "quota_milter.conf"
        url = {PLAIN_URL: site.url, "--syslog\n": ""}
        file.write_text(readme_block("/etc/quota_milter.conf", {**spool, **url}))
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


SENDMAIL_SOCKET = "/run/quota-milter/milter.sock"  # README's, in the unit's RuntimeDirectory


@pytest.fixture
def run_folder() -> Iterator[pathlib.Path]:
    """Give a folder below /run: Sendmail wants none above the socket that all may write to."""
    with open_folder("/run") as path:
        yield path


def unpack(files: pathlib.Path, names: list[str]) -> pathlib.Path:
    """Unpack Debian packages into a folder: to install them would remove Postfix."""
    need_root()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = pathlib.Path(home) / "quota_milter"
    cache.mkdir(parents=True, exist_ok=True)
    if not all(list(cache.glob(f"{name}_*.deb")) for name in names):
        download = [need("apt-get", "apt"), "download", *names]
        done = subprocess.run(download, cwd=cache, capture_output=True, text=True)
        if done.returncode:
            missing(f"{names[0]} cannot be had: apt-get update; {done.stderr.strip()[:200]}")
    for name in names:
        newest = max(cache.glob(f"{name}_*.deb"), key=lambda file: file.stat().st_mtime)
        subprocess.run([need("dpkg", "dpkg"), "-x", newest, files], check=True)
    return files


def unpack_sendmail(files: pathlib.Path) -> pathlib.Path:
    """Unpack Sendmail into a folder."""
    return unpack(files, ["sendmail-bin", "sendmail-base", "sendmail-cf"])


@pytest.fixture(scope="session")
def sendmail_files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Give Sendmail's packages, unpacked."""
    return unpack_sendmail(tmp_path_factory.mktemp("sendmail"))


def start_sendmail(
    folder: pathlib.Path, start: Callable[..., Process], files: pathlib.Path, block: str
) -> int:
    """Start Sendmail with these lines in its mc file; return its port."""
    port = free_port()
    (folder / "queue").mkdir(mode=0o700)
    (folder / "aliases").touch()
    mc = folder / "sendmail.mc"
    mc.write_text(SENDMAIL_MC.format(folder=folder, port=port, block=block))
    rules = files / "usr/share/sendmail/cf"
    m4: list[Path] = [need("m4", "m4"), f"-D_CF_DIR_={rules}/", rules / "m4/cf.m4", mc]
    cf = folder / "sendmail.cf"
    cf.write_bytes(subprocess.run(m4, capture_output=True, check=True).stdout)
    program = next(file for file in files.glob("usr/lib*/**/sendmail") if file.is_file())
    named = 'hostname mx.example.com; exec "$@"'  # it waits a minute where the name has no dot
    unshare = [need("unshare", "util-linux"), "--uts", "sh", "-c", named, "sh"]
    start(*unshare, program, "-C", cf, "-bD", port=port)
    return port


def test_sendmail_defers_mail_for_a_full_mailbox_and_accepts_it_without_the_milter(
    site: Site, sendmail_files: pathlib.Path, run_folder: pathlib.Path
) -> None:
    lighttpd(site)
    path = run_folder / "milter.sock"
    block = readme_block("/etc/mail/sendmail.mc", {SENDMAIL_SOCKET: path})
    port = start_sendmail(site.folder, site.start, sendmail_files, block)
    assert send(port, "john@example.com") == [""]  # there is no milter yet
    shutil.chown(run_folder, "daemon", "daemon")
    copy = shutil.copy(MILTER, site.folder / "quota_milter.py")
    options = ["--backend", site.url, "--listen", f"unix:{path}"]
    umask = ["sh", "-c", 'umask 007; exec "$@"', "sh"]
    process = site.start(*umask, *as_user("daemon"), PYTHON, copy, *options)
    process.wait_ready(path.exists, "the milter")
    recipients = [f"{user}@example.com" for user in ("john", "mary", "nobody")]
    assert send(port, *recipients) == [quota_exceeded("john@example.com"), "", ""]
    full = [quota_exceeded(address) for address in recipients[:2]]
    assert send(port, *recipients, size=1001) == [*full, ""]
    replies = [f"552 5.2.3 Message is larger than the quota of {r}" for r in recipients]
    assert send(port, *recipients, size=ROOM + 1) == replies
    assert send(port, "john+lists@example.com", size=1) == [
        quota_exceeded("john+lists@example.com")
    ]
    assert process.stop() == 0
    assert send(port, *recipients) == ["", "", ""]


# ---- Exim ----

# Debian's answers to its own questions: a frontend that relays for its domains.
EXIM_SETTINGS = """
dc_eximconfig_configtype='internet'
dc_local_interfaces='127.0.0.1.{port}'
dc_relay_domains='example.com;example.org'
dc_other_hostnames=''
dc_relay_nets=''
dc_readhost=''
dc_smarthost=''
dc_minimaldns='false'
dc_use_split_config='false'
dc_hide_mailname=''
dc_mailname_in_oh='true'
dc_localdelivery='mail_spool'
CFILEMODE='644'
"""
# Exim's user exists only here, in a view of its own of /etc; then README's commands, then Exim.
EXIM_START = """
mount --bind {folder}/passwd /etc/passwd
mount --bind {folder}/group /etc/group
chown Debian-exim:Debian-exim {folder}/spool {folder}/log
{commands}
exec {program} -C {folder}/exim.conf -bdf -odq
"""
EXIM_UID = 29_999


@pytest.fixture(scope="session")
def exim_files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Give Exim's packages, unpacked, and see that the libraries are there."""
    names = ["exim4-daemon-light", "exim4-base", "exim4-config"]
    files = unpack(tmp_path_factory.mktemp("exim"), names)
    linked = subprocess.run(["ldd", files / "usr/sbin/exim4"], capture_output=True, text=True)
    for library, package in ("libidn.so", "libidn12"), ("libgnutls-dane.so", "libgnutls-dane0"):
        if re.search(rf"{library}.* not found", linked.stdout):
            missing(f"{library} is missing: apt-get install {package}")
    return files


class Exim:
    """Debian's Exim with README's lines, in a folder and at a port of its own."""

    def __init__(
        self,
        folder: pathlib.Path,
        start: Callable[..., Process],
        files: pathlib.Path,
        replacements: Mapping[str, Path],
    ) -> None:
        self.folder, self.port = folder / "exim", free_port()
        self.etc = self.folder / "exim4"
        for name in "spool", "log":
            (self.folder / name).mkdir(parents=True)
        shutil.copytree(files / "etc/exim4", self.etc)
        for name in "passwd", "group":
            line = f"Debian-exim:x:{EXIM_UID}:" + f"{EXIM_UID}::/:/bin/sh" * (name == "passwd")
            (self.folder / name).write_text(f"{pathlib.Path('/etc', name).read_text()}{line}\n")
        (self.etc / "update-exim4.conf.conf").write_text(EXIM_SETTINGS.format(port=self.port))
        (self.etc / "hubbed_hosts").write_text("example.com: 192.0.2.1\nexample.org: 192.0.2.1\n")
        (self.etc / "exim4.conf.localmacros").write_text(
            f"log_file_path = {self.folder}/log/%slog\n"
        )
        (self.etc / "quota_acl").write_text(readme_block("/etc/exim4/quota_acl", replacements))
        self.put_folders_into(self.etc / "exim4.conf.template")
        script = self.start_script(files)
        unshare = [need("unshare", "util-linux"), "--mount", "sh", "-euc", script]
        process = start(*unshare)
        process.wait_ready(lambda: answers_at(self.port), "Exim")

    def put_folders_into(self, path: pathlib.Path) -> None:
        """Let a file of Debian's name this folder instead of the system's."""
        text = path.read_text().replace("/var/spool/exim4", f"{self.folder}/spool")
        text = text.replace("/etc/mailname", "/etc/hostname")
        path.write_text(text.replace("/etc/exim4", str(self.etc)))

    def start_script(self, files: pathlib.Path) -> str:
        """Return the commands that configure and start Exim."""
        program = files / "usr/sbin/exim4"
        update = self.folder / "update-exim4.conf"
        shutil.copy(files / "usr/sbin/update-exim4.conf", update)
        self.put_folders_into(update)
        path = f"PATH={program.parent}:$PATH"
        own: dict[str, Path] = {
            "/etc/exim4": self.etc,
            " update-exim4.conf": f" {path} {update} -d {self.etc} -o {self.folder}/exim.conf",
            " && systemctl reload exim4": "",
        }
        commands = command_of(readme_block("/etc/exim4/quota_acl", own))
        return EXIM_START.format(folder=self.folder, commands=commands, program=program)

    def replies(self, *recipients: str) -> list[str]:
        """Send a message as a stranger; return the reply to each recipient, "" where accepted."""
        found = []
        stranger = (STRANGER, 0)  # Debian's Exim takes anything from 127.0.0.1
        with smtplib.SMTP("127.0.0.1", self.port, timeout=60, source_address=stranger) as client:
            client.ehlo("client.example.net")
            assert client.mail("sender@example.net")[0] == 250
            for recipient in recipients:
                code, text = client.docmd(f"RCPT TO:<{recipient}>")
                found.append("" if code == 250 else f"{code} {text.decode()}")
            if "" in found:
                assert client.data(b"Subject: test\r\n\r\ntest\r\n")[0] == 250
        return found


@pytest.mark.parametrize("server", SERVERS)
def test_exim_defers_mail_for_a_full_mailbox_until_it_is_emptied(
    site: Site, server: Callable[[Site], None], exim_files: pathlib.Path
) -> None:
    server(site)
    own: dict[str, Path] = {
        "192.0.2.10:8025": f"127.0.0.1:{site.port}",
        "/quota.cgi": urllib.parse.urlsplit(site.url).path,
    }
    exim = Exim(site.folder, site.start, exim_files, own)
    recipients = ["john@example.com", "mary@example.com", "John+lists@example.org"]
    full = [quota_exceeded("john@example.com"), "", quota_exceeded("john+lists@example.org")]
    assert exim.replies(*recipients, "nobody@example.com") == [*full, ""]
    assert exim.replies("postmaster@example.com") == [""]
    site.fill("john", 7)
    assert exim.replies(*recipients) == ["", "", ""]


def test_exim_accepts_what_it_cannot_ask_about(
    folder: pathlib.Path,
    start: Callable[..., Process],
    exim_files: pathlib.Path,
    backend: Backend,
) -> None:
    need_root()
    released = threading.Event()

    def drip(connection: socket.socket) -> None:
        while not released.wait(0.2):
            connection.sendall(b"H")

    backend.default = FULL
    page = b"HTTP/1.1 %s\r\nServer: x\r\n\r\n%sOVERQUOTA john 101 100\n"
    backend.answers = {
        b"room": b"OK OVERQUOTA 1 100\n",
        b"unknown": b"UNKNOWN unknown\n",
        b"error": page % (b"500 Internal Server Error", b""),
        b"moved": page % (b"302 Found", b""),
        b"page": page % (b"200 OK", b"<p>no such page</p>\n"),
        b"nothing": b"HTTP/1.1 200 OK\r\n\r\n",
        b"hanging": lambda connection: released.wait(60) and None,
        b"dripping": drip,
    }
    own = {"192.0.2.10:8025": f"127.0.0.1:{backend.port}", "{5s:": "{2s:"}
    exim = Exim(folder, start, exim_files, own)
    for user in backend.answers:
        begin = time.monotonic()
        assert exim.replies(f"{user.decode()}@example.com") == [""], user
        assert time.monotonic() - begin < 15
    released.set()
    assert [user.encode() for user in backend.users()] == list(backend.answers)
    before = len(backend.asked)
    strange = [
        "Postmaster",
        "+x",
        "a=b",
        "j$h",
        "{john}",
        "x" * 65,
        '"a b"',
        "a~b",
        '"a\\"b"',
        "-x",
    ]
    assert exim.replies(*(f"{user}@example.com" for user in strange)) == [""] * len(strange)
    refused = exim.replies("john@example.net", "a%b@example.com", "../john@example.com")
    assert {reply[:4] for reply in refused} == {"550 "}, "by Exim itself"
    assert backend.asked[before:] == []
    assert exim.replies("john@example.com") == [quota_exceeded("john@example.com")]
    backend.close()
    assert exim.replies("john@example.com") == [""]


# ---- two rows of servers: a burst ----
#
# The frontend's Postfix hands mail on to the backend's, which gives it to Dovecot's LMTP server.
# That one keeps the quota, but what it refuses the backend has already taken and must return to the
# sender: a bounce. A burst brings each mailbox many times what it can hold, over ten connections.

BURST_MESSAGE = b"Subject: burst\r\n\r\n" + 199 * (98 * b"x" + b"\r\n")  # 20 kB
BURST_FITS = 4  # such messages in a mailbox, each with the headers that the way adds
BURST_QUOTA = 90_000  # bytes
BURST_CF = """
in_flow_delay = 0
queue_run_delay = 1s
minimal_backoff_time = 1s
maximal_backoff_time = 2s
smtpd_error_sleep_time = 0
smtpd_soft_error_limit = 1000000
smtpd_hard_error_limit = 1000000
smtpd_junk_command_limit = 1000000
smtpd_client_connection_count_limit = 0
smtpd_restriction_classes = OVER
OVER = defer
"""
BURST_FRONTEND_CF = "relay_transport = relay:[127.0.0.1]:{port}\n"
BURST_BACKEND_CF = """
relay_domains =
virtual_mailbox_domains = example.com
virtual_mailbox_maps = static:ok
virtual_transport = lmtp:inet:127.0.0.1:{port}
lmtp_destination_recipient_limit = 1
lmtp_destination_concurrency_limit = 2
"""


def smtpd_services(checks: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """Return a master.cf with an smtpd for each check, its options, and their ports."""
    ports = {name: free_port() for name in checks}
    lines = [f"127.0.0.1:{ports[name]} inet n - n - - smtpd {checks[name]}" for name in checks]
    return "\n".join([MASTER_CF, *lines]), ports


class Burst(NamedTuple):
    """What became of the recipients of a burst: those that were accepted came or bounced."""

    accepted: int
    refused: int
    delivered: int
    bounced: int


class TwoRows:
    """A backend (Postfix, Dovecot, our CGI), and frontends that hand their mail on to it."""

    def __init__(
        self,
        folder: pathlib.Path,
        start: Callable[..., Process],
        stack: contextlib.ExitStack,
        script: pathlib.Path = MAILDIR_CGI,
    ) -> None:
        self.folder, self.stack = folder, stack
        self.homes, port = folder / "homes", free_port()
        self.homes.mkdir()
        os.chown(self.homes, MAIL_UID, MAIL_UID)
        driver = "maildir" if dovecot_is_old() else "count"  # as most have it in either release
        self.dovecot = Dovecot(start, self.homes, BURST_QUOTA, driver, protocols="lmtp")
        self.backend = self.postfix("backend", BURST_BACKEND_CF, self.dovecot.lmtp_port)
        settings = {"QUOTA_LIMIT": str(BURST_QUOTA), "QUOTA_GRACE": "0"}  # as Dovecot has them
        settings["QUOTA_MAILDIR"] = f"{self.homes}/%u/Maildir"
        start(script, "--serve", str(port), port=port, env={**os.environ, **settings})
        self.url = f"http://127.0.0.1:{port}/"

    def postfix(self, name: str, main_cf: str, port: int, master_cf: str = MASTER_CF) -> Postfix:
        """Start a Postfix that hands its mail on to this port."""
        (self.folder / name).mkdir()
        main_cf = BURST_CF + main_cf.format(port=port)
        return self.stack.enter_context(Postfix(self.folder / name, main_cf, master_cf))

    def frontend(self, name: str, checks: Mapping[str, str]) -> dict[str, int]:
        """Start a frontend and return the port that has each check, which is options of smtpd."""
        master_cf, ports = smtpd_services(checks)
        self.postfix(name, BURST_FRONTEND_CF, self.backend.port, master_cf)
        return ports

    def burst(
        self, ports: Sequence[int], mailboxes: int, messages: int, sized: bool, recipients: int = 1
    ) -> Burst:
        """Fill empty mailboxes over ten connections; wait until all that was taken is settled."""
        for path in self.homes.glob("user*"):
            shutil.rmtree(path)
        users, chance = [f"user{n}@example.com" for n in range(mailboxes)], random.Random(messages)
        mail = [chance.sample(users, recipients) for _ in range(messages)]
        logged = len(self.backend.log())
        with concurrent.futures.ThreadPoolExecutor(10) as connections:
            taken = connections.map(
                lambda number: send_all(ports[number % len(ports)], mail[number::10], sized),
                range(10),
            )
            accepted = sum(taken)

        def settled() -> Any:
            time.sleep(0.2)
            bounced = self.backend.log()[logged:].count("status=bounced")
            delivered = len(list(self.homes.glob("user*/Maildir/new/*")))
            done = delivered + bounced == accepted
            refused = messages * recipients - accepted
            return done and Burst(accepted, refused, delivered, bounced)

        return cast(Burst, wait_for(settled, "the end of the burst", 120))


def send_all(port: int, mail: list[list[str]], sized: bool) -> int:
    """Send a message to each list of recipients; return how many recipients it was taken for."""
    taken, size = 0, [f"SIZE={len(BURST_MESSAGE)}"] if sized else []
    with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
        client.ehlo("client.example.net")
        for recipients in mail:
            client.mail("sender@example.net", size)
            accepted = sum(client.rcpt(recipient)[0] == 250 for recipient in recipients)
            if accepted and client.data(BURST_MESSAGE)[0] == 250:
                taken += accepted
            client.rset()
    return taken


@pytest.mark.parametrize("sized", [True, False])
def test_a_burst_makes_no_bounce_and_fills_the_mailboxes(
    folder: pathlib.Path, start: Callable[..., Process], sized: bool
) -> None:
    """The short form of `.ci/bench burst`: where nothing is checked, most of it bounces."""
    mailboxes, messages = 8, 100
    fit = mailboxes * BURST_FITS
    port = free_port()
    with contextlib.ExitStack() as stack:
        rows = TwoRows(folder, start, stack)
        milter = f"-o smtpd_milters=inet:127.0.0.1:{port}"
        unchecked, checked = rows.frontend("frontend", {"none": "", "milter": milter}).values()
        listen = "--listen", f"inet:{port}@127.0.0.1"
        start(PYTHON, MILTER, *listen, "--backend", rows.url, port=port)
        burst = rows.burst([checked], mailboxes, messages, sized)
        assert (burst.bounced, burst.delivered, burst.refused) == (0, fit, messages - fit)
        burst = rows.burst([unchecked], mailboxes, messages, sized)
        assert burst.refused == 0 and burst.bounced > messages // 2, burst


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
for _, step in pairs({SMFIP_NOCONNECT, SMFIP_NOHELO, SMFIP_NOHDRS, SMFIP_NOEOH,
                      SMFIP_NOUNKNOWN}) do
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


@pytest.fixture
def tls_site(site: Site) -> Site:
    """Give Debian's Apache with README's site: https, the frontend's address and a password."""
    need("openssl", "openssl")
    need("htpasswd", "apache2-utils")
    ssl_folder = site.folder / "ssl"
    own: dict[str, Path] = {"/etc/ssl/quota": ssl_folder, "DNS:mail1.example.com": "IP:127.0.0.1"}
    environment = stock_apache(site, site.other_port, site.port)
    copy = site.folder / "apache2"
    listen: dict[str, Path] = {
        "*:443": f"*:{site.port}",
        "/etc/ssl/quota": ssl_folder,
        "/etc/apache2": copy,
    }
    block = site.block("/etc/apache2/sites-available/quota.conf", listen)
    (copy / "sites-available/quota.conf").write_text(block)
    own.update({" -c ": " -i -c ", "/etc/apache2": copy})
    name = "Backend: a certificate, a password, and start"
    run_block(name, own, input="s:cret#%\n", env=environment)
    strict = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", "mail1.pem"]
    strict += ["-verify_ip", "127.0.0.1", "mail1.pem"]
    assert subprocess.run(strict, cwd=ssl_folder).returncode == 0  # as Python 3.13 does
    assert all(key.stat().st_mode & 0o077 == 0 for key in ssl_folder.glob("*.key"))
    run_apache(site)
    site.url = site.url.replace("http:", "https:")
    return site


PASSWORD = ["-u", "frontend:s:cret#%"]
ENCODED = "s%3Acret%23%25"


def options_for(site: Site, password: str, cafile: Path) -> pathlib.Path:
    """Write README's file of options for a site with TLS."""
    url = site.url.replace("//", f"//frontend:{password}@")
    own: dict[str, Path] = {
        "https://frontend:secret@mail1.example.com/cgi-bin/quota.cgi": url,
        "/etc/ssl/quota/mail1.pem": cafile,
    }
    file = site.folder / "quota_milter.conf"
    name = "/etc/quota_milter.conf, with a password and a certificate"
    file.write_text(readme_block(name, own))
    return file


def test_a_password_over_https_with_a_certificate_of_its_own(
    tls_site: Site, milter: Callable[..., RunningMilter]
) -> None:
    certificate = tls_site.folder / "ssl/mail1.pem"
    running = milter(None, f"@{options_for(tls_site, ENCODED, certificate)}", "--verbose")
    assert running.rcpt("<john@example.com>") == quota_exceeded("john@example.com")
    assert running.rcpt("<mary@example.com>") == ""
    assert "used=209714200" in running.log("mary")
    assert "cret" not in running.process.output()


def test_a_wrong_password_refuses_nothing_and_is_not_logged(
    tls_site: Site, milter: Callable[..., RunningMilter]
) -> None:
    certificate = tls_site.folder / "ssl/mail1.pem"
    running = milter(None, f"@{options_for(tls_site, 'wrong', certificate)}")
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
    file = options_for(tls_site, ENCODED, tls_site.folder / "ssl/mail1.pem")
    running = milter(None, f"@{file}")
    assert running.rcpt("<john@example.com>") == ""
    assert "certificate verify failed" in running.log("state=down")


# Each lacks one thing of https, address and password, or comes by another way.
WITHOUT = {
    "the password": ("https", []),
    "the right password": ("https", ["-u", "frontend:secret"]),
    "the right user": ("https", ["-u", "root:s:cret#%"]),
    "the right address": ("https", [*PASSWORD, "--interface", STRANGER]),
    "https": ("http", PASSWORD),
    "https, and another name": ("http", [*PASSWORD, "-H", "Host: mail1.example.com"]),
}


def test_who_lacks_https_or_the_address_or_the_password_gets_no_answer_at_any_url(
    tls_site: Site,
) -> None:
    site, trust = tls_site, ["--cacert", str(tls_site.folder / "ssl/mail1.pem")]
    assert site.ask("u=john", *trust, *PASSWORD) == f"200 OVERQUOTA john {ROOM + 1} {ROOM}"
    ports = {"https": site.port, "http": site.other_port}
    for lack, (scheme, options) in WITHOUT.items():
        for path in SPELLINGS:
            url = f"{scheme}://127.0.0.1:{ports[scheme]}{path}?u=john"
            got = site.fetch(url, *trust, *options)
            assert gets_nothing(got) or path == "/" and str(ROOM) not in got, (lack, path, got)
    for path in SIBLINGS:  # whoever may ask the one script
        got = site.fetch(f"https://127.0.0.1:{site.port}{path}?u=root", *trust, *PASSWORD)
        assert str(ROOM) not in got, (path, got)
    plain = site.fetch(f"http://127.0.0.1:{site.port}/cgi-bin/quota.cgi?u=john", *PASSWORD)
    assert plain.startswith("400 "), plain


def test_the_rule_of_the_https_site_holds_on_every_other_site(
    site: Site, request: pytest.FixtureRequest
) -> None:
    other = "\n<VirtualHost *:{0}>\nScriptAlias /s/ {1}/\nAlias /files/ {1}/\n</VirtualHost>\n"
    site.edits = [(r"\Z", other.format(site.other_port, site.library))]
    request.getfixturevalue("tls_site")
    for path in "/s/quota.cgi", "/s/maildir_quota.cgi", "/files/quota.cgi", "/s/quota.cgi/x":
        for name in "127.0.0.1", "other.example.com":
            url = f"http://127.0.0.1:{site.other_port}{path}?u=john"
            got = site.fetch(url, *PASSWORD, "-H", f"Host: {name}")
            assert got[:3] in ("403", "404"), (path, name, got)


# ---- README ----


def test_the_commands_of_the_readme_do_what_they_say(site: Site) -> None:
    no_web_server(site)
    line = run_block("Backend: ask", {"192.0.2.10:8025": f"127.0.0.1:{site.port}"})
    assert line == f"OVERQUOTA john {ROOM + 1} {ROOM}\n"
    root = site.folder / "root"
    (root / "etc").mkdir(parents=True)
    replacements: dict[str, Path] = {
        "/usr/local/sbin": site.folder,
        "useradd": f"{need('useradd', 'passwd')} --prefix {root}",
    }
    run_block("Frontend: copy", replacements, cwd=HERE)
    assert os.access(site.folder / "quota_milter.py", os.X_OK)
    assert "quota-milter" in (root / "etc/passwd").read_text()


BOOTED = {  # systemd runs these: .ci/fresh --boot tries them
    "Backend: start": "systemctl enable --now quota-backend",
    "Frontend: start": "systemctl enable --now quota-milter",
}


def test_every_block_of_the_readme_that_has_a_name_is_used_by_a_test() -> None:
    names = re.findall(r"^```\w+\n(?:dnl )?# (.*)$", README.read_text(), re.MULTILINE)
    text = pathlib.Path(__file__).read_text()
    assert len(names) > 20
    for name in names:
        assert f'"{name}"' in text or name.endswith(".service"), name


def test_every_backend_in_the_readme_names_its_domains_and_every_script_who_may_ask() -> None:
    text = README.read_text()
    blocks = re.findall(r"^```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    backends = [x for block in blocks for x in re.findall(r"^--backend (.*)$", block, re.M)]
    assert len(backends) >= 2
    assert all(re.match(r"[a-z.,]+=https?://", backend) for backend in backends)
    assert all(
        re.match(r"[a-z.,]+=http", x)
        for x in re.findall(r"`--backend (.*?)`", text)
        if "[" not in x
    )
    served = [block for block in blocks if "QUOTA_LIMIT" in block and "192.0.2." in block]
    assert len(served) >= 4
    assert all("QUOTA_ALLOW" in block for block in served)


def test_the_figures_and_queries_of_the_readme_are_there(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "quota.prom"
    link: dict[str, Path] = {"/run/quota-milter/quota.prom": file}
    link["/var/lib/prometheus/node-exporter/quota.prom"] = tmp_path / "seen.prom"
    alarms = readme_block("alarms", link)
    run_commands(command_of(alarms).partition(": ")[2])
    running = milter(backend, "--metrics", file)
    assert running.rcpt("<john@example.com>") == ""
    running.process.stop()
    text = (tmp_path / "seen.prom").read_text()
    for query in alarms.splitlines()[2:]:
        for name in re.findall(r"quota_milter_\w+", query):
            assert re.search(rf"(?m)^{name}\b", text), name
        for label in re.findall(r'verdict="\w+"', query):
            assert label in text, label


def test_shell_lines_of_the_readme_read_the_log(
    backend: Backend, milter: Callable[..., RunningMilter], tmp_path: pathlib.Path
) -> None:
    users = {"john": (101, 100), "mary": (95, 100), "paul": (90, 100), "free": (5, 0)}
    for user, (used, quota) in users.items():
        status = "OVERQUOTA" if used > quota > 0 else "OK"
        backend.answers[user.encode()] = f"{status} {user} {used} {quota}\n".encode()
    running = milter(backend, "--verbose", "--cache-ttl", "0")
    hostile = '<"x verdict=overquota recipient=mary@example.com"@example.com>'
    for recipient in (*(f"<{user}@example.com>" for user in ("john", "john", *users)), hostile):
        running.rcpt(recipient)
    running.process.stop()
    lines = re.sub(r"(?m)^.*? quota_milter: ", "", running.process.output())
    journal = tmp_path / "journalctl"
    (tmp_path / "log").write_text(lines)
    journal.write_text(
        f'#!/bin/sh\ncase "$*" in "-t quota_milter --since -7d -o cat") cat {tmp_path}/log; esac\n'
    )
    journal.chmod(0o755)

    printed = run_block("the log of a week", {"journalctl": journal}).splitlines()
    assert printed[0].split() == ["3", "john@example.com"]
    assert printed[1:] == ["101 % john@example.com", "95 % mary@example.com"]


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
    for script in site.script, site.library / "maildir_quota.cgi":
        script.write_text(text)
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


CAPABLE = [  # what the unit for homes gives its process
    *("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--no-new-privs"),
    *(f"--{which}=-all,+dac_read_search" for which in ("inh-caps", "ambient-caps", "bounding-set")),
]


def test_a_capability_lets_an_ordinary_user_read_the_maildirs_of_all(maildirs: Site) -> None:
    home = {"%%h/Maildir": f"{maildirs.folder}/home/%%n/Maildir"}
    start_unit(maildirs, HOMES_UNIT, home, *CAPABLE)
    assert maildirs.ask("u=john") == f"200 OVERQUOTA john {ROOM} {ROOM}"
    assert maildirs.ask("u=mary") == f"200 OK mary {ROOM - 1} {ROOM}"
    status = pathlib.Path(f"/proc/{listener(maildirs.port)}/status").read_text()
    assert re.search(r"^CapEff:\s0*4$", status, re.MULTILINE), status  # CAP_DAC_READ_SEARCH alone
    assert "\nUid:\t0" not in status


def test_the_owner_of_all_maildirs_reads_them_by_domain_and_user(maildirs: Site) -> None:
    daemon = pwd.getpwnam("daemon")
    top = maildirs.folder / "vmail"
    top.mkdir()
    for domain, size in ("example.com", ROOM), ("example.org", ROOM - 1):
        shutil.copytree(maildirs.folder / "home/john/Maildir", top / domain / "john")
        cur = top / domain / "john/cur"
        next(cur.iterdir()).rename(cur / f"1.M1P1.mx,S={size}:2,S")
    own(top, daemon.pw_uid, daemon.pw_gid, 0o600)
    start_unit(maildirs, VMAIL_UNIT, {"/var/vmail": top}, *as_user("daemon"))
    assert maildirs.ask("u=john&d=example.com") == f"200 OVERQUOTA john {ROOM} {ROOM}"
    assert maildirs.ask("u=john&d=example.org") == f"200 OK john {ROOM - 1} {ROOM}"
    assert maildirs.ask("u=john") == "400 ERROR no domain (d=) given"


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
    need("/usr/lib/apache2/modules/mod_wsgi.so", "libapache2-mod-wsgi-py3")
    users = {"user=www-data group=www-data": "user=daemon group=daemon"}
    start_apache(maildirs, {**WSGI, **users})
    assert maildirs.ask("u=john") == f"200 OVERQUOTA john {ROOM} {ROOM}"
    assert maildirs.ask("u=mary") == f"200 OK mary {ROOM - 1} {ROOM}"


# ---- how it is started ----

DROP_INS = {"quota-milter": [""], "quota-backend": [MBOX_UNIT, VMAIL_UNIT, HOMES_UNIT]}


def test_the_systemd_units_are_valid(folder: pathlib.Path) -> None:
    analyze = need("systemd-analyze", "systemd")
    for unit, drop_ins in DROP_INS.items():
        path = folder / f"{unit}.service"
        text = readme_block(f"/etc/systemd/system/{unit}.service").replace(
            "/usr/local/sbin", str(folder)
        )
        path.write_text(text)
        for name in drop_ins:
            if name:
                extra = folder / f"{unit}.service.d/mailboxes.conf"
                extra.parent.mkdir(exist_ok=True)
                block = readme_block(name, {LIBRARY: folder}).replace("vmail\n", "daemon\n")
                extra.write_text(block)
            for script in MILTER, MBOX_CGI, MAILDIR_CGI:
                shutil.copy(script, folder)
            command = [analyze, "verify", "--man=no", str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), (unit, name)


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
    figures = rf"verdict=overquota used={ROOM + 1} quota={ROOM} cached=no ms=\d+ "
    figures += "step=rcpt size=0 inflight=0"
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
    file.write_text(readme_block("/etc/quota_milter.conf", {PLAIN_URL: site.url, "--syslog\n": ""}))

    def probe(*addresses: str) -> tuple[int, list[str]]:
        own_names: dict[str, Path] = {
            "quota_milter.py @": f"{MILTER} @",
            "chown root:quota-milter": "chown root:root",
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


# ---- an upgrade ----

RELEASE_1_0 = "f093676"  # the commit
SCRIPTS = [MILTER.name, MBOX_CGI.name, MAILDIR_CGI.name]


@pytest.fixture(scope="session")
def release_1_0(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Give a folder with README and the scripts of 1.0, from git or from where .ci/fresh puts them.

    A checkout without history has none: `git fetch --unshallow` gets it.
    """
    folder = pathlib.Path(tmp_path_factory.mktemp("1.0"))
    for name in *SCRIPTS, "README.md":
        exported = HERE / ".ci/1.0" / name
        if exported.exists():
            shutil.copy(exported, folder)
            continue
        show = [need("git", "git"), "-c", f"safe.directory={HERE}", "-C", str(HERE), "show"]
        done = subprocess.run([*show, f"{RELEASE_1_0}:{name}"], capture_output=True)
        if done.returncode:
            missing(f"the history is missing: git fetch --unshallow; {done.stderr.decode()[:200]}")
        (folder / name).write_bytes(done.stdout)
        (folder / name).chmod(0o755)
    return folder


class Upgrade(NamedTuple):
    """A frontend and a backend of different releases: their folders of scripts."""

    frontend: pathlib.Path
    backend: pathlib.Path
    start: Callable[..., Process]

    def serve(self, script: str, port: int, settings: Mapping[str, Path]) -> Process:
        """Start the backend's script."""
        environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        return self.start(self.backend / script, "--serve", str(port), port=port, env=environment)

    def milter(self, url: str, *options: Path) -> RunningMilter:
        """Start the frontend's milter."""
        port = free_port()
        arguments: list[Path] = ["--listen", f"inet:{port}@127.0.0.1", "--backend", url, *options]
        program = self.frontend / MILTER.name
        return RunningMilter(port, self.start(PYTHON, program, *arguments, port=port))


@pytest.fixture(params=["the backend first", "the frontend first"])
def upgrade(
    request: pytest.FixtureRequest, release_1_0: pathlib.Path, start: Callable[..., Process]
) -> Upgrade:
    """Give what runs while one of two servers has 2.0 and the other still 1.0."""
    frontend, backend = release_1_0, HERE
    if request.param == "the frontend first":
        frontend, backend = backend, frontend
    return Upgrade(frontend, backend, start)


def fill_mailboxes(folder: pathlib.Path, script: str) -> dict[str, Path]:
    """Make mailboxes with 0, 90 and 200 of 100 bytes; return the settings that name them."""
    users = folder / "users"
    users.write_text("jane doe 1K\n")
    common: dict[str, Path] = {"QUOTA_LIMIT": "100", "QUOTA_USERS": users, "QUOTA_UNKNOWN": "1"}
    sizes = {"empty": 0, "mary": 90, "john": 200, "jane doe": 200}
    for user, size in sizes.items():
        if script == MBOX_CGI.name:
            (folder / user).write_bytes(b"x" * size)
        else:
            for name in "cur", "new", "tmp":
                (folder / user / name).mkdir(parents=True)
            (folder / user / "cur" / f"1.1.host,S={size}:2,S").write_bytes(b"x" * size)
    if script == MBOX_CGI.name:
        (folder / "broken").mkdir()
        return {**common, "QUOTA_MAILBOX": f"{folder}/%n"}
    (folder / "broken").touch()
    return {**common, "QUOTA_MAILDIR": f"{folder}/%n"}


UPGRADE_REPLIES = [
    # (user, declared size, how the reply begins)
    ("mary", 0, ""),
    ("mary", 10, ""),
    ("mary", 11, "452 4.2.2 "),
    ("mary", 101, "552 5.2.3 "),
    ("john", 0, "452 4.2.2 "),
    ("john+lists", 0, "452 4.2.2 "),
    ("empty", 100, ""),
    ("empty", 101, "552 5.2.3 "),
    ('"jane doe"', 800, ""),
    ('"jane doe"', 900, "452 4.2.2 "),
    ("nobody", 0, "550 5.1.1 "),
    ("broken", 0, "451 4.3.0 "),
    ("postmaster", 0, ""),
]


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_a_milter_of_one_release_works_with_the_scripts_of_the_other(
    upgrade: Upgrade, tmp_path: pathlib.Path, script: str
) -> None:
    settings = fill_mailboxes(tmp_path, script)
    port = free_port()
    upgrade.serve(script, port, settings)
    options = ["--unknown-reply", "550 5.1.1 No such user here", "--on-error", "tempfail"]
    url = f"http://127.0.0.1:{port}/quota.cgi"
    for ttl in "0", "60":  # on kept connections, and from the memory
        running = upgrade.milter(url, *options, "--cache-ttl", ttl)
        for _ in range(2):
            replies = [
                (user, size, running.rcpt(f"<{user}@example.com>", f"SIZE={size}")[:10])
                for user, size, _ in UPGRADE_REPLIES
            ]
            assert replies == UPGRADE_REPLIES
        assert "Traceback" not in running.process.output()
        assert running.process.stop() == 0


def test_a_running_milter_does_not_mind_that_its_backend_is_upgraded(
    upgrade: Upgrade, tmp_path: pathlib.Path
) -> None:
    settings = fill_mailboxes(tmp_path, MBOX_CGI.name)
    port = free_port()
    options = "--cache-ttl", "0", "--retry-after", "0", "--on-error", "tempfail"
    running = upgrade.milter(f"http://127.0.0.1:{port}/quota.cgi", *options)
    for backend in upgrade.frontend, upgrade.backend, upgrade.frontend:
        server = upgrade._replace(backend=backend).serve(MBOX_CGI.name, port, settings)
        assert running.rcpt("<john@example.com>")[:10] == "452 4.2.2 "
        assert running.rcpt("<mary@example.com>", "SIZE=10") == ""
        server.stop()
        assert running.rcpt("<empty@example.com>")[:10] == "451 4.3.0 "


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_the_settings_of_1_0_give_the_answers_of_1_0(
    release_1_0: pathlib.Path, tmp_path: pathlib.Path, script: str
) -> None:
    settings = fill_mailboxes(tmp_path, script)
    queries = ["", "u=", "u=john%2Fx", "u=a%0Ab", "u=.john", "u=john&d=", "d=example.com"]
    queries += [f"u={user}&d=example.com" for user in ("john", "mary", "empty", "jane+doe")]
    queries += ["u=nobody", "u=broken", "john", "--serve", "u=john&u=mary", "u=%FF"]
    for query in queries:
        old, new = (
            ask_cgi(folder / script, query, **settings)[:2] for folder in (release_1_0, HERE)
        )
        assert (new[0], new[1].split()[:1]) == (old[0], old[1].split()[:1]), query
        if old[0] == 200:
            assert new == old, query


def test_the_option_files_of_1_0_are_understood(
    release_1_0: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    aliases, options = tmp_path / "aliases", tmp_path / "options"
    aliases.write_text("sales: john\n")
    text = (release_1_0 / "README.md").read_text()
    block = re.findall(r"^# /etc/quota_milter.conf\n(.*?)^```", text, re.M | re.S)[0]
    values = {"aliases": aliases, "cafile": "/etc/ssl/certs/ca-certificates.crt"}
    given = {"max-queries": "8", "cache-ttl": "30", "timeout": "2.5", "retry-after": "9"}
    words = {"exempt": "abuse@example.com", "recipient-delimiter": "+-", "on-error": "tempfail"}
    replies = {"overquota": "452 4.2.2", "toolarge": "552 5.2.3", "unknown": "550 5.1.1"}
    lines = [f"--{name} {value}" for name, value in {**values, **given, **words}.items()]
    lines += [f"--{name}-reply {code} no {{address}}" for name, code in replies.items()]
    lines += ["--ignore-size", "--case-sensitive", "--dry-run", "--verbose"]
    options.write_text(block + "\n".join(lines) + "\n")
    help_of_1_0 = subprocess.run(
        [PYTHON, release_1_0 / MILTER.name, "--help"], capture_output=True, text=True
    ).stdout
    named = set(re.findall(r"^  (--[a-z-]+)", help_of_1_0, re.MULTILINE))
    assert named - set(re.findall(r"^--[a-z-]+", options.read_text(), re.M)) == {
        "--check",
        "--version",
    }
    status, _, errors = run_milter(f"@{options}", "--check")
    assert (status, errors) == (0, "")


# ---- the repository ----


def test_both_cgis_share_one_block_to_the_letter() -> None:
    mark = (
        "# ---- From here to the end the text is the same in quota.cgi and maildir_quota.cgi. ----"
    )
    blocks = [script.read_text().partition(mark)[2] for script in (MBOX_CGI, MAILDIR_CGI)]
    assert blocks[0] == blocks[1] != ""


def test_readmes_first_commands_show_a_full_mailbox(
    tmp_path: pathlib.Path, start: Callable[..., Process]
) -> None:
    if answers_at(8025) or answers_at(8894):
        missing("something listens on a default port already")
    install = "apt-get update && apt-get install -y python3-milter\n"
    commands = readme_block("try it", {install: ""})
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-c", commands], cwd=HERE, env=environment, capture_output=True, text=True
    )
    shown = README.read_text().partition("# try it")[2].partition("```\n")[2].partition("\n## ")[0]
    by_hand, printed = (re.sub(r"ms=\d+", "ms=0", x).split() for x in (shown, done.stdout))
    assert by_hand == printed
    wait_for(lambda: not answers_at(8025), "the end of the backend")
    # The defaults of both fit together, by which the milter listens as well.
    (tmp_path / "john").write_bytes(bytes(2000))
    environment.update(QUOTA_LIMIT="1K", QUOTA_MAILBOX=f"{tmp_path}/%n")
    start(PYTHON, MBOX_CGI, "--serve", port=8025, env=environment)
    start(PYTHON, MILTER, port=8894)
    with MilterSession(8894) as session:
        session.mail()
        assert session.rcpt("<john@example.com>") == quota_exceeded("john@example.com")
        assert session.rcpt("<mary@example.com>") == ""


def test_readmes_second_command_installs_what_the_tests_need() -> None:
    command = readme_block("run every test")
    assert command.splitlines()[-1] == "/usr/bin/python3 -m pytest test_quota.py"
    text = pathlib.Path(__file__).read_text()
    packages = set(re.findall(r'need\("[^"]+", "([a-z0-9-]+)"\)', text))
    packages -= {"apt", "dpkg", "util-linux"}  # every Debian has these
    packages -= {"git"}  # a checkout comes from it, or has what is wanted of it
    assert len(packages) > 8
    assert packages <= set(command.split())


OPTION_DEFAULTS = {  # the other options have none
    "listen": "inet:8894@127.0.0.1",
    "backend": "http://127.0.0.1:8025/cgi-bin/quota.cgi",
    "timeout": "5",
    "retry-after": "10",
    "max-queries": "16",
    "cache-ttl": "60",
    "on-error": "accept",
    "overquota-reply": "452 4.2.2 Quota exceeded for {address}, try again later",
    "toolarge-reply": "552 5.2.3 Message is larger than the quota of {address}",
    "in-flight": "60",
    "frontends": "1",
    "inactive-after": "0",
    "inactive-reply": "552 5.2.2 Mailbox of {address} is full and not in use",
    "recipient-delimiter": "+",
}
NO_DEFAULTS = {"", "off", "off: standard error", "none: let through", "the system's"}


def test_readme_and_the_help_give_every_option_its_default() -> None:
    rows = re.findall(r"^\| `--([a-z-]+).*?` \| ?(.*?) ?\|", README.read_text(), re.M)
    printed = run_milter("--help")[1].partition("\noptions:")[2]
    helps = dict(re.findall(r"^  --([a-z-]+)(.*?)(?=^  -|\Z)", printed, re.MULTILINE | re.DOTALL))
    assert [name for name, _ in rows] == list(helps)  # in the same order
    for name, given in rows:
        default = OPTION_DEFAULTS.get(name)
        assert given.strip("`") == default or default is None and given in NO_DEFAULTS, name
        if default is not None:
            assert f"({default})" in re.sub(r"\s+", " ", helps[name]), name


@pytest.mark.parametrize("script", [MBOX_CGI, MAILDIR_CGI])
def test_readme_gives_every_setting_its_default(script: pathlib.Path) -> None:
    row = re.compile(r"^\| `(QUOTA_\w+)`(?: \((.*?)\))? \| (.*?) \|", re.MULTILINE)
    rows = [
        (a, c.strip("`")) for a, b, c in row.findall(README.read_text()) if b in ("", script.name)
    ]
    module = load(script)
    settings = {
        name: value or "none" for name, value in vars(module).items() if name[:6] == "QUOTA_"
    }
    assert dict(rows) == settings


def test_the_top_level_holds_the_six_files_and_nothing_else() -> None:
    shown = {entry.name for entry in HERE.iterdir() if not entry.name.startswith((".", "__"))}
    names = {"quota_milter.py", "quota.cgi", "maildir_quota.cgi", "test_quota.py"}
    assert shown == names | {"README.md", "LICENSE"}
