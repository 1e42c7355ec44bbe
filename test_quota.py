"""What quota_milter.py, quota.cgi and maildir_quota.cgi promise, in tables, and their tests.

    python3 -m pytest test_quota.py

Needs pymilter and pytest, no root and no network but loopback. The milter is a process that is
spoken to in the milter protocol; what no socket can change is asked in this process. The CGIs
answer in this process, and as processes once for each way to run them. Faked is what misbehaves:
backends, Dovecot's HTTP service, postmap, disks, clocks. The tests with real servers are in
.ci/test_servers.py.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import email.utils
import errno
import functools
import heapq
import importlib.machinery
import importlib.util
import itertools
import json
import os
import pathlib
import pwd
import random
import re
import resource
import runpy
import select
import shlex
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

HERE = pathlib.Path(__file__).resolve().parent
MILTER, MBOX_CGI, MAILDIR_CGI = (
    HERE / name for name in ("quota_milter.py", "quota.cgi", "maildir_quota.cgi")
)
SLACK = 10  # seconds that a busy machine may add to what is bounded

# ---- helpers: processes, and scripts as modules ----


# Each port is given once before any is given again: a server may take seconds to listen there.
# pytest's parallel workers (gw0, gw1 ...) have 1,000 ports each. No client gets one by chance.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")[2:]
LOWEST = 10_000 + 1000 * int(WORKER or 0)
HIGHEST = LOWEST + 1000 if WORKER else 32_000
PORTS = itertools.cycle(random.sample(range(LOWEST, HIGHEST), HIGHEST - LOWEST))


def free_port() -> int:
    """Return a TCP port of loopback that nobody uses."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            break
    return port


def answers_at(port: int, host: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port)):
        return True
    return False


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Return the first true value that `condition` gives; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds} s for {what}")


class Process:
    """A program started for one test; what it prints, both streams, goes to a file."""

    def __init__(self, arguments: tuple[object, ...], log: pathlib.Path, **options: Any) -> None:
        self.log = log
        words = [str(argument) for argument in arguments]
        with open(log, "ab") as output:
            options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, **options}
            self.popen = subprocess.Popen(words, **options)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self, condition: Callable[[], Any]) -> None:
        """Wait for a sign of life; fail with the output where the program ends before it."""
        wait_for(lambda: self.popen.poll() is not None or condition(), f"life in {self.log.name}")
        assert self.popen.poll() is None, self.output()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the program by a signal (0: it has one) and return its status; or else kill it."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        try:
            return self.popen.wait(2 + SLACK)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return self.popen.wait()

    @contextlib.contextmanager
    def few_descriptors(self, more: int) -> Iterator[None]:
        """Let the process open so many files more than it has at rest."""
        counts: list[int] = []
        while len(set(counts[-5:])) != 1 or len(counts) < 5:  # connections may still be closing
            counts.append(len(os.listdir(f"/proc/{self.popen.pid}/fd")))
            time.sleep(0.05)
        usual = resource.prlimit(self.popen.pid, resource.RLIMIT_NOFILE)
        limit = counts[-1] + more, usual[1]
        resource.prlimit(self.popen.pid, resource.RLIMIT_NOFILE, limit)
        yield
        resource.prlimit(self.popen.pid, resource.RLIMIT_NOFILE, usual)

    def figure(self, what: str) -> int:
        """Return a figure that Linux has of the process, in kB where it is memory."""
        text = pathlib.Path(f"/proc/{self.popen.pid}/status").read_text()
        return int(re.findall(rf"^{what}:\s+(\d+)", text, re.MULTILINE)[0])


def load(script: pathlib.Path) -> Any:
    """Import one of the scripts, whatever its file name ends in."""
    name = script.name.replace(".", "_")
    loader = importlib.machinery.SourceFileLoader(name, str(script))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def run(*arguments: object, **options: Any) -> tuple[int, str, str]:
    """Run a program to its end: exit status, output, errors."""
    command = [str(argument) for argument in arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
    return done.returncode, done.stdout, done.stderr


def run_milter(*arguments: object, **options: Any) -> tuple[int, str, str]:
    return run(sys.executable, MILTER, *arguments, **options)


def run_with_clock(file: str, script: str) -> None:
    """Run a script by a clock that is ahead by as many seconds as a file has bytes.

    That is what `test_quota.py FILE SCRIPT ARGUMENT...` does, see the end.
    """
    monotonic, wall = time.monotonic, time.time
    time.monotonic = lambda: monotonic() + os.stat(file).st_size
    time.time = lambda: wall() + os.stat(file).st_size
    runpy.run_path(script, run_name="__main__")


# ---- helpers: an MTA ----


class MilterSession:
    """The MTA's side of the milter protocol, as Postfix and Sendmail speak it: one client."""

    SKIP, ALL = 0x400, 0x1FFFFF  # bits of the negotiation: a body may be skipped; all there are
    CHUNK = 65535  # bytes of a body that an MTA sends at a time
    NOT_SENT = 0x63  # the connection, HELO, headers and their end: the milter wants none of them

    def __init__(self, where: int | str, offered: int = ALL, host: str = "127.0.0.1") -> None:
        """Connect to a port of a host, or to the path of a unix socket."""
        self.offered = offered
        if isinstance(where, int):
            self.socket = socket.create_connection((host, where))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(where)
        self.socket.settimeout(30)  # what takes longer hangs
        self.stream = self.socket.makefile("rb")
        self.send(b"O", struct.pack(">III", 6, 0x1FF, offered))
        command, data = self.receive()
        assert command == b"O", command
        protocol = struct.unpack(">III", data[:12])[2]
        assert protocol & self.NOT_SENT == self.NOT_SENT, "the milter wants more than it needs"
        self.macros(b"C", {"j": "mx.example.com", "_": "client.example.net [192.0.2.7]"})

    def __enter__(self) -> MilterSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()
        self.socket.close()

    def send(self, command: bytes, data: bytes = b"") -> None:
        self.socket.sendall(struct.pack(">I", len(data) + 1) + command + data)

    def receive(self) -> tuple[bytes, bytes]:
        """Read one packet: command and data."""
        length = self.stream.read(4)
        assert length, "the milter closed the connection"
        packet = self.stream.read(struct.unpack(">I", length)[0])
        return packet[:1], packet[1:]

    def macros(self, step: bytes, values: dict[str, str]) -> None:
        """Tell macros that belong to the step that follows."""
        raw = [os.fsencode(text) + b"\0" for pair in values.items() for text in pair]
        self.send(b"D", step + b"".join(raw))

    def step(self, command: bytes, data: bytes = b"") -> bytes:
        """Take a step and return the milter's reply."""
        self.send(command, data)
        return self.receive()[0]

    def mail(self, *parameters: str, **macros: str) -> None:
        """Begin a message, with parameters of MAIL FROM and macros (`auth_authen`, `i`)."""
        values = {name if name == "i" else f"{{{name}}}": macros[name] for name in macros}
        self.macros(b"M", {"{mail_addr}": "sender@example.net", **values})
        words = "<sender@example.net>", *parameters
        assert self.step(b"M", b"".join(word.encode() + b"\0" for word in words)) == b"c"

    def ask(self, recipient: str | bytes, *parameters: str) -> None:
        """Give a recipient: bytes as they are, `john` for <john@example.com>."""
        if isinstance(recipient, str):
            domain = "" if "@" in recipient else "@example.com"
            recipient = f"<{recipient}{domain}>".encode()
        self.send(b"R", b"\0".join([recipient, *map(str.encode, parameters), b""]))

    def reply(self) -> str:
        """Return the SMTP reply to a recipient or a message, "" where the milter accepts it."""
        command, data = self.receive()
        assert command in (b"c", b"y"), (command, data)
        return data.rstrip(b"\0").decode("ascii")

    def rcpt(self, recipient: str | bytes, *parameters: str) -> str:
        self.ask(recipient, *parameters)
        return self.reply()

    def body(self, size: int) -> int:
        """Send DATA and a body, which the milter may skip; return how many bytes were sent."""
        assert self.step(b"T") == b"c"
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
        """End the data and return the reply to the whole message."""
        self.send(b"E")
        return self.reply()

    def message(self, recipients: str, size: int, *parameters: str) -> str:
        """Give a message to recipients, spaces between; return the reply that settles it."""
        self.mail(*parameters)
        replies = [self.rcpt(name) for name in recipients.split()]
        if all(replies):
            self.abort()
            return replies[-1]
        self.body(size)
        return self.end()

    def abort(self) -> None:
        self.send(b"A")


# ---- helpers: a backend, or Dovecot's HTTP service, that does what it is told ----

FULL, FREE, GONE = b"OVERQUOTA x 101 100\n", b"OK x 10 100\n", b"UNKNOWN x\n"
OOPS = b"HTTP/1.0 500 Oops\r\n\r\nOVERQUOTA x 101 100\n"
HANG = [(b"", 600.0)]


def says(line: str, **header: str) -> bytes:
    """Make a response of a line and header fields (`Quota_Grace` for Quota-Grace)."""
    fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in header.items())
    head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(line) + 1}\r\n{fields}\r\n"
    return f"{head}{line}\n".encode("latin-1")


class Backend:
    """A server whose answers a test sets, for each user or for all others.

    An answer is a line, a whole response that begins with HTTP/, a list of (bytes, seconds of
    silence after them), or a function that returns one of these. After a list the connection is
    closed, or reset where its last bytes are None.
    """

    def __init__(self, port: int = 0, tls: pathlib.Path | None = None, host: str = "127.0.0.1"):
        self.default: Any = FREE
        self.answers: dict[str, Any] = {}
        self.requests: list[bytes] = []  # header and body of each, in order
        self.left: list[str] = []  # the users whose client went away before the answer's end
        self.busy = self.most = 0  # questions at a time
        self.lock = threading.Lock()
        self.context = None
        if tls:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(tls)
        self.listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=600
        )
        self.port = int(self.listener.getsockname()[1])
        self.url = f"http{'s' * bool(tls)}://127.0.0.1:{self.port}/cgi-bin/quota.cgi"
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self.listener.accept()[0]
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as stream:
                head = b"".join(iter(stream.readline, b"\r\n"))
                length = re.search(rb"(?i)^content-length: (\d+)", head, re.MULTILINE)
                request = head + (stream.read(int(length[1])) if length else b"")
                user = user_of(request)
                with self.lock:
                    self.requests.append(request)
                    self.busy += 1
                    self.most = max(self.most, self.busy)
                try:
                    answer = self.answers.get(user, self.default)
                    answer = answer() if callable(answer) else answer
                finally:
                    with self.lock:  # before the client knows the answer and asks the next
                        self.busy -= 1
                if isinstance(answer, list):
                    self.play(answer, connection, user)
                else:
                    connection.sendall(response(answer))

    def play(self, script: list[Any], connection: socket.socket, user: str) -> None:
        """Send the pieces of an answer, with pauses, until the client goes away."""
        try:
            for data, pause in script:
                if data is None:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    return
                connection.sendall(data)
                if pause and select.select([connection], [], [], pause)[0]:
                    raise OSError("the client has gone")
        except OSError:
            self.left.append(user)

    def queries(self) -> list[str]:
        """Return the query of each question, as it was sent."""
        targets = [request.split(b" ")[1].decode("latin-1") for request in self.requests]
        return [target.partition("?")[2] for target in targets]

    def users(self) -> list[str]:
        return [user_of(request) for request in self.requests]

    def wait_for(self, user: str) -> None:
        wait_for(lambda: user in self.users(), f"the question about {user}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def user_of(request: bytes) -> str:
    """Find the user in a question to a backend; "" in one to doveadm."""
    query = re.search(rb"^GET [^ ]*[?&]u=([^& ]*)", request)
    return os.fsdecode(urllib.parse.unquote_to_bytes(query[1])) if query else ""


def response(answer: bytes) -> bytes:
    """Make a proper response of a line; leave a response as it is."""
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
    return answer if answer.startswith(b"HTTP/") else head % len(answer) + answer


def after(
    seconds: float, answer: bytes, event: threading.Event | None = None
) -> Callable[[], bytes]:
    """Make an answer that takes so many seconds, or less where a test sets the event."""

    def wait() -> bytes:
        (event or threading.Event()).wait(seconds)
        return answer

    return wait


# ---- helpers: the milter as a process, and one fixture that holds all ----


class Milter:
    """A milter that runs, on a port of its own."""

    def __init__(self, process: Process, port: int, clock_file: pathlib.Path) -> None:
        self.process, self.port, self.clock_file = process, port, clock_file

    def session(self, offered: int = MilterSession.ALL) -> MilterSession:
        return MilterSession(self.port, offered)

    def ask(self, recipient: str) -> MilterSession:
        """Give one recipient in a session of its own, whose reply is read later."""
        session = self.session()
        session.mail()
        session.ask(recipient)
        return session

    def rcpt(self, recipient: str | bytes, *parameters: str) -> str:
        """Give one recipient of one message, with parameters of MAIL, in a session of its own."""
        with self.session() as session:
            session.mail(*parameters)
            return session.rcpt(recipient)

    def at_once(self, recipients: list[str]) -> list[str]:
        """Give recipients in a session each, all at once; return the replies in order."""
        with concurrent.futures.ThreadPoolExecutor(len(recipients)) as pool:
            return list(pool.map(self.rcpt, recipients))

    def lines(self, *words: str) -> list[str]:
        whole = self.process.output().split("\n")[:-1]
        return [line for line in whole if all(word in line for word in words)]

    def log(self, *words: str) -> str:
        """Wait for a line of the log that has these words; return the last one."""
        return str(wait_for(lambda: self.lines(*words), f"{words} in the log")[-1])

    def all_recipients(self, number: int) -> list[str]:
        wait_for(lambda: len(self.lines("recipient=")) >= number, "the log")
        return self.lines("recipient=")

    def never_down(self) -> bool:
        """End the milter and say that it never called a backend down."""
        return self.process.stop() == 0 and not self.lines("state=down")

    def hup(self) -> str:
        """Send a HUP; return the line of the log that says what became of it."""
        before = self.lines(": state=")
        self.process.popen.send_signal(signal.SIGHUP)
        return str(wait_for(lambda: self.lines(": state=")[len(before) :], "HUP")[0])

    def forward(self, seconds: int) -> None:
        """Move the clock of a milter that was started with one of ours."""
        os.truncate(self.clock_file, self.clock_file.stat().st_size + seconds)


class Site:
    """What a test works with: a folder, a backend, and all that it starts."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.processes: list[Process] = []
        self.backends: list[Backend] = []
        self.backend = self.another()

    def another(self, *arguments: Any, **options: Any) -> Backend:
        self.backends.append(Backend(*arguments, **options))
        return self.backends[-1]

    def write(self, name: str, text: str | bytes) -> pathlib.Path:
        file = self.folder / name
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    def start(self, *arguments: object, port: int = 0, says: str = "", **options: Any) -> Process:
        """Start a program, which ends with the test; wait until it says so and listens on a port.

        A port alone may be another program's, of a test that runs beside this one.
        """
        log = self.folder / f"output-{len(self.processes)}.log"
        process = Process(arguments, log, **options)
        self.processes.append(process)
        if port:
            process.wait_ready(lambda: says in process.output() and answers_at(port))
        return process

    def milter(
        self, *options: object, clock: bool = False, backend: bool = True, **popen: Any
    ) -> Milter:
        """Start a milter with options, by a clock of ours, and with the site's backend or none."""
        port = free_port()
        clock_file = self.write(f"clock-{port}", "")
        command: list[object] = [sys.executable]
        command += [__file__, clock_file] * clock
        command += [MILTER, "--listen", f"inet:{port}@127.0.0.1"]
        command += ["--backend", self.backend.url] * backend
        says = "" if "stderr" in popen else "state=started"
        process = self.start(*command, *options, port=port, says=says, **popen)
        return Milter(process, port, clock_file)

    def serve(self, script: pathlib.Path, where: str = "", **settings: object) -> int:
        """Run a CGI by --serve with settings; return its port."""
        port = free_port()
        environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        where += str(port)
        self.start(script, "--serve", where, port=port, says="serving on", env=environment)
        return port

    def close(self) -> None:
        """End all; whatever still runs must end in order, and nothing may have failed."""
        for backend in self.backends:
            backend.close()
        running = [process for process in self.processes if process.popen.poll() is None]
        for process in running:
            process.popen.terminate()
        assert {process.stop(0) for process in running} <= {0}
        assert "Traceback" not in "".join(process.output() for process in self.processes)


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.close()


# ---- helpers: the milter in this process ----


@functools.lru_cache(None)
def milter_module() -> Any:
    return load(MILTER)


class Ours:
    """The real milter in this process, without a socket, with a clock and backends of ours.

    An answer of a backend is a tuple: status, used, quota and perhaps grace and the date of the
    last change. None is a fault; HANGS takes all the time that there is.
    """

    def __init__(self, *options: str, backends: int = 1) -> None:
        self.module, self.now = load(MILTER), 0.0
        self.module.time = types.SimpleNamespace(monotonic=self.clock, time=self.clock)
        self.module.Backend.ask = lambda *question: self.ask(*question)
        self.answers: dict[Any, Any] = {}  # by the user, or the number of the backend (from 1)
        self.asked: list[tuple[str, int, float]] = []  # user, backend, the seconds it may take
        self.base = [f"--backend=http://127.0.0.1:{n}/" for n in range(1, backends + 1)]
        self.options = options
        words = [*self.base, *options]
        self.service = self.module.Service(words, self.module.read_options(words))

    def clock(self) -> float:
        return self.now

    def reload(self, *options: str) -> None:
        """Do what HUP does, with other options."""
        self.service.arguments = [*self.base, *options]
        self.service.reload()

    def look_up(self, user: str, backend: int) -> Any:
        return self.answers.get(backend, self.answers.get(user))

    def ask(self, backend: Any, mailbox: Any, deadline: float) -> Any:
        asked, number = self.now, int(backend.name[-2])
        self.asked.append((mailbox.user, number, deadline - asked))
        answer = self.look_up(mailbox.user, number)
        if answer is None or answer is HANGS:
            self.now = deadline if answer is HANGS else self.now
            raise self.module.Fault("as told")
        return self.module.Answer(*answer, source=backend.name, at=asked)

    def rcpt(self, recipient: str, size: int = 0) -> tuple[Any, Any]:
        """Give a recipient of a message of a declared size; return the message and the decision."""
        message = self.module.Message(size)
        domain = "" if "@" in recipient else "@example.com"
        decision = self.service.policy.decide(f"<{recipient}{domain}>", message)
        if decision.reply is None:
            message.let_through(decision)
        return message, decision

    def end(self, message: Any, size: int) -> str:
        """End a message after a body of so many bytes; return the verdict."""
        message.count_body(size)
        refusal = self.service.policy.end_of_data(message)
        return refusal.verdict if refusal else "ok"

    def message(self, users: str, size: int, declared: int = 0) -> str:
        """Give a message to users, spaces between: `ok`, or the verdict and what it was about."""
        message, policy = self.module.Message(declared), self.service.policy
        for user in users.split():
            decision = policy.decide(f"<{user}@example.com>", message)
            if decision.reply is None:
                message.let_through(decision)
        if not message.passed and not message.others_passed:
            return f"{decision.verdict} at RCPT for {user}"
        message.count_body(size)
        refusal = policy.end_of_data(message)
        return f"{refusal.verdict} at end for {refusal.address.user}" if refusal else "ok"


HANGS = ("HANGS",)
FULL_BOX, FREE_BOX, NO_BOX = ("OVERQUOTA", 101, 100), ("OK", 10, 100), ("UNKNOWN",)


# ---- one dialogue ----


def test_a_full_mailbox_is_deferred_and_others_pass(site):
    site.backend.answers["john"] = FULL
    milter = site.milter()
    with milter.session() as session:
        session.mail("SIZE=7", i="4XyZ12345")
        assert session.rcpt("mary") == ""
        reply = "452 4.2.2 Quota exceeded for john+x@example.com, try again later"
        assert session.rcpt("john+x", "NOTIFY=NEVER") == reply
        assert session.rcpt("paul") == ""
    question = site.backend.requests[1].split(b"\r\n")
    assert question[0] == b"GET /cgi-bin/quota.cgi?u=john&d=example.com HTTP/1.1"
    assert b"Host: 127.0.0.1:%d" % site.backend.port in question
    assert re.sub(r" ms=\d+ ", " ms=0 ", milter.log("verdict=overquota")).endswith(
        " recipient=john+x@example.com user=john verdict=overquota used=101 quota=100 cached=no"
        " ms=0 step=rcpt size=7 inflight=0 sender=sender@example.net"
        ' client="client.example.net [192.0.2.7]" queue=4XyZ12345'
    )
    assert milter.process.stop() == 0


# ---- what is asked about and answered: a row is one recipient ----

EXCEEDED = "452 4.2.2 Quota exceeded for "
FAULT = "451 4.3.0 "
TEMPFAIL = "--on-error", "tempfail"
UNCACHED = "--cache-ttl", "0"


class Case(NamedTuple):
    """One recipient: what the backend does, what the MTA gives, and what comes of it."""

    answer: Any = FULL
    options: str = ""  # of the milter; URL stands for the backend's
    recipient: str | bytes | None = None  # None: a user of this case alone
    parameters: str = ""  # of MAIL FROM
    reply: str = EXCEEDED  # its beginning; "": let through
    log: str = ""  # fields of the line in the log
    asked: str | None = None  # the query of the only question, "": none, None: no matter
    macros: tuple[str, ...] = ()  # `auth_authen=john`, of MAIL or (rcpt_...) of RCPT


def give(case: Case, number: int, session: MilterSession, backend: Backend) -> str:
    """Give the recipient of a case; return what differs from it, "" for nothing."""
    before = len(backend.requests)
    backend.default = case.answer
    macros = dict(macro.split("=", 1) for macro in case.macros)
    session.mail(*case.parameters.split(), **{k: v for k, v in macros.items() if k[:5] != "rcpt_"})
    session.macros(b"R", {f"{{{k}}}": v for k, v in macros.items() if k[:5] == "rcpt_"})
    reply = session.rcpt(f"u{number}" if case.recipient is None else case.recipient)
    session.abort()
    queries = backend.queries()[before:]
    is_right = reply.startswith(case.reply) and bool(reply) == bool(case.reply)
    is_right &= len(reply) <= 510 and case.asked in (None, "".join(queries)) and len(queries) < 2
    return "" if is_right else f"{reply!r} {queries}"


def run_cases(cases: list[Case], site: Site) -> Milter:
    """Give all cases, to one milter for those of the same options; return the last milter."""
    wrong = []
    for options, group in itertools.groupby(cases, lambda case: case.options):
        words = shlex.split(options.replace("URL", site.backend.url))
        milter = site.milter("--verbose", *UNCACHED, *words, backend="--backend" not in options)
        rows = list(group)
        with milter.session() as session:
            found = [give(row, number, session, site.backend) for number, row in enumerate(rows)]
        for row, difference, line in zip(rows, found, milter.all_recipients(len(rows))):
            fields = f"{line} "
            if not all(f" {field} " in fields for field in row.log.split()):
                difference += " in the log"
            if ("verdict=fault" in line) != (" reason=" in line):
                difference += " a fault has a reason, and nothing else has"
            if difference:
                wrong.append(f"{str(row)[:300]}\n  {difference}\n  {line[:300]}")
        assert all(" " <= c <= "~" or c == "\n" for c in milter.process.output())
        assert not milter.lines("state=down"), "none of these is a fault of the backend"
    assert not wrong, "\n".join(wrong)
    return milter


X, EXAMPLE = "&d=x.org", "&d=xn--exmple-cua.com"
ADDRESSES = [
    # (what is asked, "": nothing; recipients as the MTA gives them; the reply shows an address as
    # it was given, with ? for % and all that is not printable ASCII)
    ("", [b"<>", b"", b"<@x.org>", b'<""@x.org>']),
    ("u=john", [b"<john>", b"<john@>", b"<@a.example:john>"]),
    ("u=john" + X, [b"john@x.org", b"<John@X.ORG>", b"<john@x.org.>", b"<john+a+b@x.org>"]),
    ("u=john" + X, [b"<@a.example,@b.example:john@x.org>", b'<"john+a b"@x.org>']),
    ("u=john&d=%5B192.0.2.1%5D", [b"<john@[192.0.2.1]>"]),
    ("u=%2Bjohn" + X, [b"<+john@x.org>"]),
    ("u=%2B" + X, [b"<+@x.org>"]),
    ("u=a%20b" + X, [b'<"a b"@x.org>']),
    ("u=a%40b" + X, [b'<"a@b"@x.org>', b"<a@b@x.org>"]),
    ("u=a%40b", [b'<"a@b">']),
    ("u=a%22b%5Cc%3A" + X, [rb'<"a\"b\\c:"@x.org>']),
    ("u=%E2%84%AAim%C3%96" + X, ["<\u212aimÖ@x.org>".encode()]),  # only ASCII is folded
    ("u=j%F6rg" + X, [b"<j\xf6rg@x.org>"]),
    # A domain beyond ASCII is its A-labels (RFC 5890), where the codec takes it.
    ("u=john" + EXAMPLE, ["<john@exämple.com>".encode(), "<john@EXÄMPLE.com.>".encode()]),
    ("u=john" + EXAMPLE, [b"<john@xn--exmple-cua.com>", b"<john@XN--Exmple-cua.com>"]),
    ("u=john&d=ex%E4mple.com", [b"<john@ex\xe4mple.com>"]),
    ("u=john&d=a%E2%80%A8b.com", ["<john@a\u2028b.com>".encode()]),
    # What is hostile stays a name.
    ("u=a%25%25s%25n" + X, [b"<a%%s%n@x.org>"]),
    ("u=a%26u%3Db%23c%2Fd" + X, [b"<a&u=b#c/d@x.org>"]),
    ("u=a%0D%0Ab%7F%1B" + X, [b"<a\r\nb\x7f\x1b@x.org>"]),
    ("u=john&d=x.org%26d%3Dy.org", [b"<john@x.org&d=y.org>"]),
    ("u=%7Baddress%7D" + X, [b"<{address}@x.org>"]),
]


def address_case(query: str, given: bytes) -> Case:
    """Make a case of ADDRESSES, whose reply is compared to the end."""
    text = given.decode(errors="surrogateescape").removeprefix("<").removesuffix(">")
    reply = f"{EXCEEDED}{re.sub('[^ -~]|%', '?', text)}, try again later" if query else ""
    return Case(recipient=given, asked=query, reply=reply)


EXEMPT = "--exempt boss --exempt Abuse@Example.com --exempt a+b@example.com --exempt dash-x"
SERVED = f"--backend example.com,Example.ORG=URL {EXEMPT}"
DASH = "--recipient-delimiter - --exempt dash-x"
BEYOND = "--backend exämple.com,xn--bcher-kva.example=URL --exempt boss@EXÄMPLE.com"
LONG = "x" * 300


def unasked(options: str, verdict: str, *recipients: str, **more: Any) -> list[Case]:
    """Make cases of recipients who are let through without a question."""
    more = {"options": options, "reply": "", "asked": "", "log": f"verdict={verdict}", **more}
    return [Case(recipient=to, **more) for to in recipients]


def asked(options: str, *rows: tuple[str, str]) -> list[Case]:
    """Make cases of recipients and the query about each."""
    return [Case(options=options, recipient=to, asked=query) for to, query in rows]


NAMES = [
    *unasked(SERVED, "exempt", "Postmaster@example.com", "POSTMASTER+x@example.org"),
    *unasked(SERVED, "exempt", "boss+x@example.org", "abuse@example.com", "a+b@example.com"),
    *unasked(SERVED, "nobackend", "john@elsewhere.net", "john@", "john@sub.example.com"),
    *asked(SERVED, ("abuse@example.org", "u=abuse&d=example.org")),
    *asked(SERVED, ("postmasters@EXAMPLE.org", "u=postmasters&d=example.org")),
    *unasked(BEYOND, "exempt", "boss@exämple.com", "boss@xn--exmple-cua.com"),
    *unasked(BEYOND, "nobackend", "john@example.com"),
    *asked(BEYOND, ("john@xn--exmple-cua.com", "u=john" + EXAMPLE)),
    *asked(BEYOND, ("j@BÜCHER.example", "u=j&d=xn--bcher-kva.example")),
    *unasked(DASH, "exempt", "PostMaster@x.org", "dash-x@x.org"),
    *asked(DASH, ("john-a+b@x.org", "u=john" + X), ("dash-y@x.org", "u=dash" + X)),
    *asked(DASH, ("-john@x.org", "u=-john" + X), ("owner-john@x.org", "u=owner-john" + X)),
    *asked(DASH, ("john-request@x.org", "u=john-request" + X)),
    *asked('--recipient-delimiter ""', ("a-b+c@x.org", "u=a-b%2Bc" + X)),
    *asked("--recipient-delimiter +-", ("john-a+b@x.org", "u=john" + X)),
    *asked("--case-sensitive", ("John@X.org", "u=John" + X)),
    # No mailbox has a name of more than 320 characters (RFC 3696): 64, the @ and 255.
    *asked("", (f"{LONG}@x.org", f"u={LONG}{X}"), (f"{LONG}+{LONG}@x.org", f"u={LONG}{X}")),
    *unasked("", "empty", f"{LONG}{LONG}@org", f"j@{'x.' * 160}org"),
]

JOHN_AT_X = "u=john" + X
LOCAL, RESOLVED = ("rcpt_mailer=local", "rcpt_addr=john"), ("rcpt_addr=john@x.org",)
SPELLINGS = "john%x.org@y.org", "x.org!john@y.org", "john (c)@x.org", "john@"
GROUPS = "postmaster+:john@x.org;", "postmaster+<john@x.org>", "postmaster@x:john%x.org;"
WHO_IT_IS = [
    # What the MTA tells beside MAIL and RCPT. The reply names the address that was given.
    Case(recipient="john@x.org", asked=JOHN_AT_X, macros=("rcpt_addr=",)),
    *(Case(recipient=to, asked=JOHN_AT_X, macros=RESOLVED) for to in SPELLINGS),
    # Sendmail's virtusertable leads an address to a user of this machine.
    Case(recipient="info@x.org", asked=JOHN_AT_X, macros=LOCAL),
    Case(recipient="info@x.org", asked="u=info" + X, macros=("rcpt_mailer=smtp", LOCAL[1])),
    Case(recipient="info@x.org", asked="u=info" + X, macros=LOCAL[1:]),
    Case(recipient="j@x.org", asked="u=j" + X, macros=("rcpt_mailer=local", "rcpt_addr=\udcff")),
    *unasked("--exempt info@x.org", "exempt", "postmaster@x.org", "info@x.org", macros=LOCAL),
    # Of these Postfix makes john@x.org: they are exempt no more than he is.
    *(Case(recipient=to, asked=JOHN_AT_X, macros=RESOLVED) for to in GROUPS),
    Case(recipient=b"<john>", asked="u=john", macros=LOCAL),
    # Postfix folds what it tells.
    Case(FULL, "--case-sensitive", "John@X.org", asked="u=John" + X, macros=RESOLVED),
    # Mail of a client that has authenticated is not checked.
    Case(asked="", reply="", macros=("auth_authen=mary",), log="verdict=exempt"),
    Case(macros=("auth_authen=",)),
    Case(options="--check-authenticated", macros=("auth_authen=mary",)),
]

MOST = 2**63 - 1
ANSWERS = [
    # (verdict, fields of the log, lines)
    ("ok", "used=5 quota=100", b"OK john 5 100\n", b"OK john 5 100\r\n", b"OK john 5 100"),
    ("ok", "used=5 quota=100", b"OK a b c 5 100\n", b"OK j\xf6rg 5 100\n", b"OK OVERQUOTA 5 100\n"),
    ("ok", "used=5 quota=100", b"OK john 5 100\nOVERQUOTA john 5 1\n"),
    ("ok", "used=5 quota=100", b"OK " + b"x" * 3000 + b" 5 100\n"),
    ("overquota", "used=101 quota=100", b"OVERQUOTA OK 101 100\n"),  # the name does not matter
    ("unknown", "used=0 quota=100", b"UNKNOWN john 0 100\n"),
    # What is no figure is not known: a number alone may be the one or the other.
    ("unknown", "used=- quota=-", b"UNKNOWN john\n", b"UNKNOWN\n"),
    ("overquota", "used=- quota=-", b"OVERQUOTA\n", b"OVERQUOTA john 5\n"),
    ("ok", "used=- quota=-", b"OK john 5\n", b"OK 123\n"),
    ("ok", "used=- quota=209715200", b"OK john  209715200\n"),
    ("ok", "used=5 quota=-", b"OK john 5 \n"),
    ("ok", "used=- quota=100", b"OK john -5 100\n", b"OK john \xd9\xa1 100\n"),
    ("ok", "used=- quota=-", b"OK john +5 1e3\n", b"OK john 5.0 1_00\n"),
    ("ok", f"used=5 quota={MOST}", b"OK john 5 %d\n" % MOST),
    ("ok", "used=- quota=100", b"OK john %d 100\n" % (MOST + 1)),
    ("fault", "used=- quota=-", b"", b"\n", b"\nOK john 5 100\n", b" OK john 5 100\n"),
    ("fault", "used=- quota=-", b"ok john 5 100\n", b"OKAY john 5 100\n", b"OK\tjohn 5 100\n"),
    ("fault", "used=- quota=-", b"Mailbox full, sorry OVERQUOTA\n", b"<html>OVERQUOTA</html>\n"),
    ("fault", "used=- quota=-", b"\x00\xff\xfe\x80binary", b"OK " + b"x" * 1_000_000),
]


def raw(status: bytes, body: bytes, *header: bytes) -> bytes:
    """Make a response with a header of one's own."""
    return b"\r\n".join([b"HTTP/1.1 " + status, *header, b"", body])


LINE = b"OVERQUOTA x 9 8\n"
CHUNKED = b"Transfer-Encoding: chunked"
IN_CHUNKS = b"7\r\nOVERQUO\r\n8\r\nTA x 9 8\r\n0\r\n\r\n"
HINTS = (401, "password"), (403, "address"), (404, "path"), (503, ""), (206, "")
RESPONSES: list[tuple[Any, ...]] = [
    # (verdict, fields of the log, responses)
    ("overquota", "used=9 quota=8", raw(b"200 OK", LINE)),
    ("overquota", "used=9 quota=8", raw(b"200 OK", LINE, b"Content-Length: 16")),
    ("overquota", "used=9 quota=8", raw(b"200 OK", LINE + b"x" * 10**6)),
    ("overquota", "used=9 quota=8", raw(b"200 OK", IN_CHUNKS, CHUNKED)),
    ("overquota", "used=9 quota=8", [(raw(b"200 OK", LINE), 600)]),  # it would be kept open
    ("overquota", "used=- quota=-", raw(b"200 OK", LINE[:-1], b"Content-Type: text/html")),
    ("ok", "used=1 quota=8", raw(b"200 OK", b"OK x 1 8\n") + raw(b"200 OK", LINE)),
    *(("fault", f"{code} {hint}", raw(b"%d Why " % code, LINE)) for code, hint in HINTS),
    ("fault", "500 disk", raw(b"500 Oops", b"ERROR the disk hangs\n")),
    ("fault", "302", raw(b"302 Found", LINE, b"Location: /")),
    ("fault", "", raw(b"301 Moved", LINE, b"Location: file:///etc/passwd")),
    (
        "fault",
        "",
        raw(b"OVERQUOTA", LINE),
        raw(b"204 No Content", b""),
        b"HTTP/yes OVERQUOTA\r\n\r\n",
    ),
    ("fault", "", raw(b"103 Early Hints", LINE, b"Link: </x>")),
    ("fault", "", raw(b"200 OK", LINE, *[b"X: y"] * 1000)),
    ("fault", "", raw(b"200 OK", LINE, b"X: " + b"y" * 200_000)),
]
HALF = b"OK x 100 20"
CUT = [
    # (body, header) of responses that end too early: nobody is refused by half a number.
    *[(HALF,), *((HALF, b"Content-Length: " + length) for length in (b"-1", b"17", b"x"))],
    *((chunks, CHUNKED) for chunks in (b"b\r\n" + HALF + b"\r\n", b"b\r\n" + HALF)),
    *((chunks, CHUNKED) for chunks in (b"11\r\n" + HALF, b"b\r\n" + HALF + b"\r\n7\r\n97")),
]
UNKNOWN_REPLY = "550 5.1.1 No {address} here"
REPLY_OF = {"ok": "", "overquota": EXCEEDED, "unknown": "550 5.1.1 No u", "fault": FAULT}


def answer_cases(rows: list[tuple[Any, ...]]) -> list[Case]:
    options = f"--on-error tempfail --unknown-reply '{UNKNOWN_REPLY}'"
    return [
        Case(answer, options, reply=REPLY_OF[verdict], log=f"verdict={verdict} {log}")
        for verdict, log, *answers in rows
        for answer in answers
    ]


NONSENSE = "SIZE=0 SIZE=-5 SIZE=+50 SIZE=1e9 SIZE=5_0 SIZE=\u0665\u0660\u0660 SIZE".split()
SIZES = [
    # (answer, parameters of MAIL, beginning of the reply)
    (b"OK x 90 100\n", "SIZE=10", ""),
    (b"OK x 90 100\n", "BODY=8BITMIME size=11", "452 4.2.2"),
    (b"OK x 90 100\n", "SIZE=100", "452 4.2.2"),
    (b"OK x 90 100\n", "SIZE=101", "552 5.2.3"),
    (b"OK x 90 100\n", "", ""),  # what the message before has declared does not matter
    (b"OVERQUOTA x 110 100\n", "SIZE=101", "552 5.2.3"),
    (b"OVERQUOTA x 110 100\n", "SIZE=1", "452 4.2.2"),
    (b"OK x 90 0\n", "SIZE=99999999999999999999", ""),
    (b"OK x 100 100\n", "SIZE=0", ""),
    (b"OK x  100\n", "SIZE=101", "552 5.2.3"),
    (b"OK x 90 \n", "SIZE=500", ""),
    (b"UNKNOWN x 90 100\n", "SIZE=500", ""),
    *((b"OK x 90 100\n", size, "") for size in (*NONSENSE, "SIZE=" + "9" * 500)),
]

OVER, GOOD = "OVERQUOTA x 101 100", "OK x 90 100"


def days_ago(days: float) -> str:
    return email.utils.formatdate(time.time() - days * 86400, usegmt=True)


DEAD = says(OVER, Last_Modified=days_ago(40))
NO_DATES = [
    *("", "0", "1500000000", "\xff\xfe", "x" * 5000, "Thu, 99 Jan 2015 00:00:00 GMT"),
    *("Thu, 01 Jan 99999999999 00:00:00 GMT", "Fri, 01 Jan 2150 00:00:00 GMT"),
]
INACTIVE = [
    # (line, Last-Modified, parameters, beginning of the reply with --inactive-after 30)
    (OVER, days_ago(30.1), "", "550 5.2.2"),
    (OVER, days_ago(5000), "SIZE=10", "550 5.2.2"),
    (OVER, days_ago(29.9), "", "452 4.2.2"),
    (GOOD, days_ago(5000), "SIZE=10", ""),
    (GOOD, days_ago(5000), "SIZE=50", "452 4.2.2"),  # it is the message that is too large for it
    ("OK x 100 100", days_ago(5000), "SIZE=10", "550 5.2.2"),
    (OVER, days_ago(5000), "SIZE=101", "552 5.2.3"),
    ("OK x 100 100", days_ago(5000), "", ""),
    ("OVERQUOTA x 5 0", days_ago(5000), "", "550 5.2.2"),
    ("OVERQUOTA x", days_ago(5000), "", "550 5.2.2"),
    ("UNKNOWN x 101 100", days_ago(5000), "", ""),
    *((OVER, nonsense, "", "452 4.2.2") for nonsense in NO_DATES),
]


def inactive_cases() -> list[Case]:
    """Make the cases of INACTIVE, and some with other options."""
    words = "--inactive-after 1 --inactive-reply '550 5.2.1 {address} is not used'"
    return [
        *(
            Case(says(line, Last_Modified=changed), "--inactive-after 30", None, parameters, reply)
            for line, changed, parameters, reply in INACTIVE
        ),
        Case(DEAD, words, reply="550 5.2.1 u0@example.com is not used"),
        Case(FULL, words),
        Case(DEAD),  # it is off by default
    ]


REPLIES = (
    "--overquota-reply '552 5.2.2 {address} is full ({address})'"
    " --unknown-reply '450 4.1.1 No user here' --toolarge-reply '452 4.2.2 big'"
)
LONG_REPLY = "--overquota-reply '452 4.2.2 " + "{address} " * 20 + "'"
TABLES: dict[str, list[Case]] = {
    "addresses": [address_case(query, given) for query, row in ADDRESSES for given in row],
    "names that are exempt, have no backend or a delimiter": NAMES,
    "what the MTA tells": WHO_IT_IS,
    "answers": answer_cases(ANSWERS),
    "responses": answer_cases(RESPONSES),
    "answers that are cut": [
        Case(raw(b"200 OK", *cut), parameters="SIZE=500", reply="", log="used=- quota=-")
        for cut in CUT
    ],
    "sizes": [Case(answer, "", None, size, reply) for answer, size, reply in SIZES],
    "mailboxes that nobody uses": inactive_cases(),
    "graces that are none": [
        Case(says("OK x 90 100", Quota_Grace=grace), "", None, "SIZE=11", "452 4.2.2")
        for grace in ("-5", "1e9", "10%", "0x99", "10,5", "", str(2**63))
    ],
    "replies": [
        Case(FULL, REPLIES, "full@x.org", reply="552 5.2.2 full@x.org is full (full@x.org)"),
        Case(GONE, REPLIES, reply="450 4.1.1 No user here"),
        Case(FREE, REPLIES, parameters="SIZE=101", reply="452 4.2.2 big"),
        Case(FULL, LONG_REPLY, f"{LONG}@x.org", reply="452 4.2.2 xxx"),
        Case(FULL, "--dry-run", reply="", log="verdict=overquota used=101 dry_run=yes"),
    ],
}


@pytest.mark.parametrize("table", TABLES)
def test_every_recipient_is_asked_about_answered_and_logged_as_the_table_says(table, site):
    run_cases(TABLES[table], site)


# ---- where a question goes ----


def test_the_environment_and_the_backend_cannot_lead_a_question_elsewhere(site):
    trap = site.another()
    proxies = {f"{scheme}_proxy": trap.url for scheme in ("http", "https", "all")}
    site.backend.answers["moved"] = f"HTTP/1.0 302 Found\r\nLocation: {trap.url}\r\n\r\n".encode()
    milter = site.milter(env={**os.environ, **proxies, "no_proxy": ""})
    assert milter.rcpt("john") == "" == milter.rcpt("moved")
    assert (site.backend.users(), trap.requests) == (["john", "moved"], [])
    assert "302" in milter.log("user=moved", "verdict=fault")


def test_a_password_and_a_query_in_a_url_are_sent_and_never_shown(site):
    url = site.backend.url.replace("//", "//us%3Aer:pa%40ss@") + "?key=hidden"
    site.backend.default = OOPS
    milter = site.milter("--backend", url, "--verbose", backend=False)
    assert milter.rcpt("john") == ""
    assert site.backend.queries() == ["key=hidden&u=john&d=example.com"]
    token = base64.b64encode(b"us:er:pa@ss")
    assert b"Authorization: Basic " + token in site.backend.requests[0]
    site.backend.close()
    assert milter.rcpt("mary") == "" and milter.log("state=down")
    assert milter.process.stop() == 0
    assert not re.search("pa%40ss|pa@ss|hidden", milter.process.output())


def test_the_milter_listens_on_ipv6_and_asks_there(site):
    try:
        backend = site.another(host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    port = free_port()
    url = f"http://[::1]:{backend.port}/"
    process = site.start(sys.executable, MILTER, f"--listen=inet6:{port}@::1", f"--backend={url}")
    process.wait_ready(lambda: answers_at(port, "::1"))
    with MilterSession(port, host="::1") as session:
        session.mail()
        assert session.rcpt("john") == "" and backend.users() == ["john"]


# ---- options ----

NO_REPLIES = [
    *("", "full", "250 2.0.0 fine", "452 5.2.2 classes differ", "452 4.2.2 100% full", "552"),
    *("452 4.2.2 {adress}", "452 4.2.2 two\nlines", "452 4.2.2 v\u00f6ll", "550 5.1.1"),
    *("421 4.2.2 ends the session", "452 4.\u0662.2 x"),
]
REPLY_KINDS = "overquota", "toolarge", "unknown", "inactive"
SECRET = "http://user:se/cret@127.0.0.1/"
BAD_VALUES = {
    "listen": ["8894", "inet:0@127.0.0.1", "inet:65536@127.0.0.1", "unix:relative"],
    "timeout": ["0", "-1", "nan", "inf", "soon", "\u0665", "1_0", SECRET],
    **dict.fromkeys(["retry-after", "cache-ttl", "in-flight", "inactive-after"], ["-1", "x"]),
    **dict.fromkeys(["max-queries", "frontends"], ["0", "1.5", "\u0661\u0666"]),
    "on-error": ["reject", SECRET],
    **dict.fromkeys([f"{kind}-reply" for kind in REPLY_KINDS], NO_REPLIES),
    "backend": [
        *["ftp://127.0.0.1/", "http:///path", "http://127.0.0.1:99999/", "http://a b/", SECRET],
        *["a,,b=http://127.0.0.1/", "http://127.0.0.1:8\u0660/", "x.org,X.org.=http://127.0.0.1/"],
    ],
    "recipient-delimiter": ["x", "@", "\u00f6"],
    "exempt": ["", "@example.com"],
    "cafile": ["/nonexistent", "/etc/passwd"],
    "aliases": ["/nonexistent", "/etc", sys.executable, "/dev/null"],
    "time": ["5"],
    "nonsense": ["5", SECRET],
}


def option_error(*arguments: str) -> str:
    """Read options that are bad; return what is said of them, in one line."""
    with pytest.raises(milter_module().BadOptions) as caught:
        milter_module().read_options(arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("option", BAD_VALUES)
def test_a_bad_value_is_refused_in_one_line_that_names_the_option(option):
    for value in BAD_VALUES[option]:
        error = option_error(f"--{option}={value}")
        assert f"--{option}" in error and "cret" not in error, value


BAD_STARTS = [
    # (arguments, a word of the one line, the status: 2 for options, 1 for a socket)
    (f"--backand {SECRET}", "--backand", 2),
    (f"--verbose={SECRET}", "--verbose", 2),
    ("@/nonexistent", "/nonexistent", 2),
    ("stray", "stray", 2),
    ("--listen inet:8894@192.0.2.1", "inet:8894@192.0.2.1", 1),
    ("--listen unix:/nonexistent/folder/socket", "/nonexistent/folder/socket", 1),
]


@pytest.mark.parametrize(("arguments", "named", "status"), BAD_STARTS)
def test_a_start_that_fails_says_why_in_one_line(arguments, named, status):
    got, output, errors = run_milter(*arguments.split())
    assert (got, output, len(errors.splitlines())) == (status, "", 1)
    assert named in errors and "Traceback" not in errors and "cret" not in errors


def test_options_come_from_a_file(site):
    site.backend.answers["john"] = FULL
    file = site.write(
        "options",
        f"# a comment\n  # another\n\n--backend example.com={site.backend.url}\n"
        "--cache-ttl=5 # seconds\n"
        "--overquota-reply 452 4.2.2 Mailbox of {address} is full #1\n"
        '--recipient-delimiter ""\n--dry-run\n'
        "--check john@example.com j+k@example.com\n",
    )
    status, output, errors = run_milter(f"@{file}")
    assert (status, errors) == (1, "")
    assert "reply=452 4.2.2 Mailbox of john@example.com is full\n" in output
    assert site.backend.users() == ["john", "j+k"]


BAD_FILES = [
    # (what comes behind two good lines, the number of the bad line, what the error names)
    ("--timeout soon\n", 3, "--timeout"),
    ("\n# x\n--timeout 0\n", 5, "--timeout"),
    ("--timeout\n", 3, "--timeout"),
    ("stray\n", 3, "stray"),
    ("@another\n", 3, "another"),  # no @FILE in a file
    ("--aliases {folder}/pipe\n", 3, "pipe"),  # nobody waits for who may write there
]


@pytest.mark.parametrize(("text", "line", "named"), BAD_FILES)
def test_an_error_in_an_option_file_names_file_and_line(text, line, named, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    file = tmp_path / "options"
    file.write_text("# x\n--verbose\n" + text.format(folder=tmp_path))
    error = option_error("--verbose", f"@{file}", "--timeout", "3")
    assert named in error and re.search(rf"{file}\D{{1,10}}{line}\b", error), error


@pytest.mark.parametrize("name", ["pipe", "nowhere", "binary"])
def test_an_option_file_that_cannot_be_read_is_an_error(name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"--verbose\n\xff\n")
    assert name in option_error(f"@{tmp_path}/{name}")


CHECKS = [
    # (options, addresses, status, what the last line has)
    ("", "john@x.org mary@x.org", 0, "verdict=ok used=10 quota=100 cached=no ms=0"),
    ("", "john@x.org full@x.org", 1, f"reply={EXCEEDED}full@x.org, try again later"),
    ("", "full@x.org broken@x.org", 2, "verdict=fault"),
    ("", "gone@x.org full@x.org", 2, "verdict=overquota"),
    (f"--unknown-reply '{UNKNOWN_REPLY}'", "gone@x.org", 1, "reply=550 5.1.1 No gone@x.org here"),
    ("", "full@x.org john@elsewhere.net", 2, "verdict=nobackend"),
    ("--dry-run", "full@x.org", 1, "verdict=overquota"),
    ("", "", 0, ""),
]


@pytest.mark.parametrize(("options", "addresses", "status", "last"), CHECKS)
def test_check_prints_verdicts_and_replies_and_its_status_sums_them_up(
    options, addresses, status, last, site
):
    site.backend.answers = {"full": FULL, "broken": b"nonsense\n", "gone": GONE}
    backend = f"--backend=x.org={site.backend.url}"
    given = addresses.split()
    got, output, errors = run_milter(backend, *shlex.split(options), "--check", *given)
    lines = re.sub(r"\bms=\d+", "ms=0", output).splitlines()
    assert (got, errors, len(lines)) == (status, "", max(1, len(given)))
    assert last in lines[-1]
    for line in lines:
        unsure = re.search("verdict=(fault|nobackend)|verdict=unknown.*reply=none", line)
        assert bool(unsure) == (" reason=" in line), line


def test_check_leaves_the_log_of_the_milter_alone():
    backend = f"--backend=http://127.0.0.1:{free_port()}/"
    status, output, errors = run_milter(backend, "--syslog", "--check", "john@x.org")
    assert (status, errors.count("state=down")) == (2, 1) and "verdict=fault" in output


def test_help_and_version_need_no_pymilter_and_a_start_without_it_says_what_to_install():
    without = sys.executable, "-IS", MILTER
    status, output, errors = run(*without, "--help")
    assert (status, errors) == (0, "") and output.startswith("usage: quota_milter.py")
    assert run(*without, "--version")[:2] == (0, f"quota_milter {milter_module().VERSION}\n")
    status, output, errors = run(*without)
    assert (status, output, len(errors.splitlines())) == (1, "", 1) and "python3-milter" in errors


# ---- aliases: one name to one mailbox ----

ALIASES: list[tuple[str, ...]] = [
    # (lines of the file, mailbox that is asked about, "": none; recipients; what has no domain is
    # @example.com)
    ("# aliases(5)\npostmaster: john", "", "postmaster"),
    ("Sales: john", "john", "sales", "SALES+x"),
    ("support:   sales", "john", "support"),
    ("list: john, mary", "", "list"),
    ('prog: "|/usr/bin/vacation john"\nprog2: |/bin/true', "", "prog", "prog2"),
    ("file: /var/spool/john\ninclude: :include:/etc/list", "", "file", "include"),
    ("loop1: loop2\nloop2: loop1", "", "loop1"),
    ("self: self", "self", "self"),
    ("back: \\back", "back", "back"),
    ("many: a,\n   b\n# a comment in between\n   , c", "", "many"),
    ("one:\n   john", "john", "one"),
    ('"quoted name": john', "john", '"quoted name"'),
    ("ext+a: mary\next: john", "mary", "ext+a"),
    ("", "john", "ext+b"),
    ('away: \\away, "|/usr/bin/vacation away"', "away", "away", "away+x"),
    ('team: "|/bin/log for, team", john, mary', "", "team"),
    ("angle: <jim>\nnohost: jim@", "jim", "angle", "nohost"),
    ("out: john@elsewhere.net", "", "out"),
    ("error: error:nouser\n: no name", "", "error"),
    ("first: john\nfirst: mary", "john", "first"),
    ("# virtual(5)\ninfo@example.com   mary@example.org", "mary@example.org", "info"),
    ("", "info@example.org", "info@example.org"),
    ("both@example.com   john, mary\ntwo@example.com  john mary", "", "both", "two"),
    ("copy@example.com   copy@elsewhere.net, copy@example.com", "copy", "copy", "Copy+x"),
    ("kin@example.com   kin@example.com, john@example.org, x@elsewhere.net", "", "kin"),
    ("busy@example.com   busy@example.com,busy#example.com@auto.example.net", "busy", "busy"),
    ("bare@example.com   sales\nlocal: john@example.com", "john", "bare", "local"),
    ("@all.org   mary@example.com\njohn@all.org   john@all.org", "mary", "anybody@all.org"),
    ("", "john@all.org", "john@all.org"),
    ("@moved.org   @example.com", "john", "sales@moved.org"),
    ("", 'a"b\\@c', r'"a\"b\\@c"@moved.org'),
    ("@loop.org   @pool.org\n@pool.org   @loop.org", "", "x@loop.org"),
    ("@grow.org   @@grow.org", "", "x@grow.org"),
    ("far@elsewhere.net   john@example.com", "john", "far@elsewhere.net"),
    ("info@exämple.com   john@xn--exmple-cua.com", "john@xn--exmple-cua.com", "info@EXÄMPLE.com"),
    # A name without a domain is an alias only where mail is local: in a domain that is served.
    ("", "", "support@elsewhere.net", "local+x@elsewhere.net"),
    ("", "nobody", "nobody"),
]
SERVED_ALIASES = "example.com,example.org,all.org,moved.org,loop.org,pool.org,grow.org,exämple.com"


def test_an_alias_is_asked_about_as_the_mailbox_it_leads_to(site):
    lines = "\n".join(row[0] for row in ALIASES)
    options = f"--backend {SERVED_ALIASES}=URL --aliases {site.write('aliases', lines)}"
    cases = []
    for _, mailbox, *recipients in ALIASES:
        name = mailbox if mailbox.endswith((".com", ".org")) else f"{mailbox}@example.com"
        user, _, domain = name.rpartition("@")
        asked = f"u={urllib.parse.quote(user)}&d={domain}" if mailbox else ""
        for given in recipients:
            to = given if "@" in given else f"{given}@example.com"
            reply = f"{EXCEEDED}{re.sub('[^ -~]', '?', to)}, try again later" if mailbox else ""
            cases.append(Case(FULL, options, to, reply=reply, asked=asked))
    number = lines.split("\n").index(": no name") + 1
    assert run_cases(cases, site).log("state=read", f" skipped=1 line={number}")


def test_a_list_takes_no_time_whatever_stands_in_it(site):
    hostile = {name: text * 100_000 for name, text in (("a", '"\\'), ("b", '\\"'), ("c", "d,"))}
    file = site.write("aliases", "".join(f"{name}: {text}\n" for name, text in hostile.items()))
    options = f"--backend {SERVED_ALIASES}=URL --aliases {file}"
    recipients = [f"{name}@example.com" for name in hostile]
    run_cases([Case(FULL, options, one, reply="", asked="") for one in recipients], site)


def test_an_alias_file_is_read_again_when_it_changes(site):
    file = site.write("aliases", "sales: john\n")
    milter = site.milter("--aliases", file, *UNCACHED)

    def leads_to(user: str) -> bool:
        milter.rcpt("sales")
        return bool(site.backend.users()[-1] == user)

    assert leads_to("john")
    file.write_text("sales: mary\n")
    wait_for(lambda: leads_to("mary"), "the changed alias")


def test_an_alias_file_is_read_when_it_has_held_still_or_at_hup_and_a_good_one_is_kept(tmp_path):
    file = tmp_path / "aliases"
    file.write_text("last: john\n")
    ours = Ours(f"--aliases={file}")
    for text, looks, expected in [
        *[(f"first: mary\n{'#' * number}", 1, "john") for number in range(5)],  # being written
        ("first: mary\nlast: paul\n", 4, "paul"),
        *[(None, 4, "paul"), ("binary: \0\n", 4, "paul"), ("last: fred\n", 4, "fred")],
    ]:
        file.unlink() if text is None else file.write_text(text)
        for _ in range(looks):
            ours.service.policy.aliases.sources[0].refresh()
        assert ours.rcpt("last")[1].target.user == expected, text
    file.write_text("last: jim\n")
    ours.reload(*ours.options)
    assert ours.rcpt("last")[1].target.user == "jim"


# ---- tables: postmap is faked, the real one is in .ci/test_servers.py ----

TABLE = {
    "sales@example.com": "john@example.com",
    "sales+x@example.com": "mary@example.com",
    "support@example.com": "sales@example.com",
    "bare": "john",
    "list@example.com": "john@example.com, mary@example.com",
    "out@example.com": "john@elsewhere.net",
    "loop1@example.com": "loop2@example.com",
    "loop2@example.com": "loop1@example.com",
    '"a b"@example.com': "john@example.com",
    "@all.org": "mary@example.com",
    "two@example.com": "mary@example.com\njohn@example.com",
    "long@example.com": "john@example.com," * 60_000,
}


class Tables(Ours):
    """Our milter with aliases in a table, which a stand-in for subprocess.run() looks up."""

    def __init__(self, kind: str) -> None:
        backend = "--backend=example.com,example.org,all.org=http://127.0.0.1:1/"
        super().__init__(backend, f"--aliases={kind}:/table", backends=0)
        self.answers = {1: FREE_BOX}
        self.rows, self.keys = TABLE, list[str]()
        self.seconds = 0  # that each look-up takes

    def run(self, command: list[str], input: bytes, timeout: float, **_: object) -> Any:
        kind = command[-1].partition(":")[0]
        assert command == [command[0], "-q", "-", f"{kind}:/table"] and 0 < timeout <= 2.5
        if kind == "hang":
            raise subprocess.TimeoutExpired(command, timeout)
        if kind == "missing":
            raise FileNotFoundError
        if kind == "fail":
            return subprocess.CompletedProcess(command, 1, b"", b"postmap: fatal: cannot open")
        self.now += self.seconds
        keys = input.decode().splitlines()
        self.keys += keys
        found = "".join(f"{key}\t{self.rows[key]}\n" for key in keys if key in self.rows).encode()
        errors = b"postmap: warning: old" if kind == "warn" else b""
        return subprocess.CompletedProcess(command, int(not found), found, errors)


@pytest.fixture
def table_of(monkeypatch):
    """Give a function that makes a milter with a table of some kind."""

    def make(kind: str) -> Tables:
        made = Tables(kind)
        monkeypatch.setattr(subprocess, "run", made.run)
        return made

    return make


OTHER = "other+y@example.com"
TABLED: list[tuple[Any, ...]] = [
    # (kind of table, recipient, keys in their order, mailbox that is asked about, "": none)
    ("hash", "Other+y@Example.COM", f"{OTHER} other@example.com other @example.com", "other"),
    ("hash", '"o x"@all.org', '"o x"@all.org|o x@all.org|"o x"|o x|@all.org', "mary"),
    ("hash", "a..b@all.org", '"a..b"@all.org|a..b@all.org|"a..b"|a..b|@all.org', "mary"),
    ("hash", "other@elsewhere.net", "other@elsewhere.net @elsewhere.net", ""),
    *((kind, OTHER, OTHER, "other") for kind in ("regexp", "pcre", "tcp", "socketmap")),
    *[("hash", "postmaster@example.com", "", ""), ("hash", "", "", "")],
    ("hash", "-@example.com", "-@example.com - @example.com", "-"),
    ("hash", "sales+x@example.com", None, "mary"),
    ("hash", "sales+y@example.com", None, "john"),
    *[("hash", "bare@example.org", None, "john"), ("hash", "bare@elsewhere.net", None, "")],
    *(("hash", f"{to}@example.com", None, "") for to in ("list", "out", "loop1", "two", "long")),
    ("hash", '"a b"@example.com', None, "john"),
    ("warn", "support@example.com", None, "john"),
    ("hash", "x\nsales@example.com", None, "x\nsales"),
    ("hash", "sales@example.com\tx@example.com", None, "sales@example.com\tx"),
    ("hash", "\udcff\udcfe@all.org", None, "mary"),
    *((fault, "john@example.com", None, "") for fault in ("fail", "hang", "missing")),
]


@pytest.mark.parametrize(("kind", "recipient", "keys", "user"), TABLED)
def test_a_table_is_asked_as_postfix_asks_it_and_leads_to_the_mailbox(
    kind, recipient, keys, user, table_of
):
    ours = table_of(kind)
    decision = ours.rcpt(recipient)[1]
    assert [name for name, _, _ in ours.asked] == [user] * bool(user)
    if keys is not None:
        expected = keys.split("|") if "|" in keys else keys.split()
        assert ours.keys[: len(expected)] == expected
        assert user == "mary" or len(ours.keys) == len(expected)
    assert bool(decision.finding.fault) == (kind in ("fail", "hang", "missing"))


def test_what_a_table_said_is_remembered_for_the_cache_ttl_or_until_hup(table_of):
    ours = table_of("hash")
    for seconds, mailbox, expected in [
        *[(0, "john", "john"), (50, "mary", "john"), (11, "mary", "mary"), (0, "", "mary")],
        *[(61, "", "sales"), (0, "paul", "sales")],  # also that it has no such name
    ]:
        ours.now += seconds
        ours.rows = {"sales@example.com": mailbox} if mailbox else {}
        assert ours.rcpt("sales")[1].target.user == expected
    ours.reload(*ours.options)
    assert ours.rcpt("sales")[1].target.user == "paul"


def test_table_and_backend_share_one_budget(table_of):
    ours = table_of("hash")
    ours.seconds = 0.5
    ours.rcpt("sales")
    assert ours.asked == [("john", 1, 4)], "the table was asked twice, and left 4 of 5 seconds"


def test_of_all_tables_eight_are_asked_at_a_time(table_of):
    ours = table_of("hash")
    for _ in range(8):
        assert ours.module.Table.turns.acquire(timeout=0)
    assert "too many" in ours.rcpt("john")[1].finding.fault


# ---- mail in flight: stories ----

LIMIT = 100_000  # bytes: the quota of the tables below, in which 1,024 count for headers


class Story(Ours):
    """Plays the steps of a story.

    john has 40_000 [of 0] [OVERQUOTA] [grace 10]  what the backend says of john (of LIMIT)
    john is unknown, fails                         UNKNOWN, a fault
    mail 60_000 [SIZE=5] [to john mary] -> OUTCOME a message (to john), to its end
    sized 60_000 [to john mary] -> OUTCOME         the same, and its true size declared
    forward 61                                     seconds of the clock

    OUTCOME: ok, or the beginning of `overquota at RCPT for john` or `toolarge at end for john`;
    `x3`: three times.
    """

    def play(self, steps: str) -> None:
        """Play all steps; an assertion names the one that went wrong."""
        for step in re.split(r";\s+", steps):
            told, _, expected = step.partition(" -> ")
            expected, _, times = expected.partition(" x")
            for _ in range(int(times or 1)):
                self.now += 0.01
                outcome = self.take(*told.split())
                assert outcome.startswith(expected) and bool(outcome) == bool(expected), step

    def take(self, verb: str, *words: str) -> str:
        """Take a step; return what became of a message."""
        if verb in ("mail", "sized"):
            users = words[words.index("to") + 1 :] if "to" in words else ["john"]
            sizes = [word[5:] for word in words if word.startswith("SIZE=")]
            sizes += [words[0] if verb == "sized" else "0"]
            return self.message(" ".join(users), int(words[0]), int(sizes[0]))
        if verb == "forward":
            self.now += int(words[0])
        elif words[-1] in ("unknown", "fails"):
            self.answers[verb] = NO_BOX if words[-1] == "unknown" else None
        else:
            status = "OVERQUOTA" if "OVERQUOTA" in words else "OK"
            quota = int(words[3]) if "of" in words else LIMIT
            grace = int(words[-1]) if "grace" in words else 0
            self.answers[verb] = status, int(words[1]), quota, grace
        return ""


# By the options of a milter: what happens to it. Answers are remembered unless the options say
# otherwise.
STORIES = {
    "": """
what fits exactly is accepted, one byte more is not; a declared size is known at RCPT:
    john has 40_000; mail 60_001 -> overquota at end for john;
    sized 60_001 -> overquota at RCPT for john; sized 60_000 -> ok
a mailbox that is filled by what is in flight gets nothing more, however small:
    john has 0; sized 99_500 -> ok; mail 0 -> overquota at RCPT; sized 1 -> overquota at RCPT
at the quota without mail in flight its backend alone decides:
    john has 100_000; mail 0 -> ok; mail 0 -> overquota at RCPT
what is too large for the whole quota is so whatever is in flight:
    john has 0; mail 100_001 -> toolarge at end for john; mail 90_000 -> ok;
    sized 100_001 -> toolarge at RCPT for john
the larger of two sizes counts:
    john has 0; mail 10 SIZE=40000 -> ok; mail 60_000 SIZE=10 -> overquota at end;
    mail 10 SIZE=60000 -> overquota at RCPT; mail 30_000 SIZE=10 -> ok;
    mail 29_000 -> overquota at end
a message that fits into one of its mailboxes is accepted, and counts for both:
    john has 50_000; mary has 0; mail 60_000 to john mary -> ok;
    mail 39_001 to mary -> overquota at end for mary;
    mail 0 to john -> overquota at RCPT for john; mail 38_000 to mary -> ok
a message that fits into none gets the reply of the first, whatever its kind:
    john has 0 of 50_000; mary has 60_000; mail 60_000 to john mary -> toolarge at end for john;
    mail 60_000 to mary john -> overquota at end for mary; mail 50_000 to mary john -> ok
who was refused at RCPT does not count:
    john has 90_000; mary has 0; paul has 110_000 OVERQUOTA; sized 20_000 to john mary paul -> ok;
    mail 10_001 to john -> overquota at end for john;
    mail 100_000 to paul mary -> overquota at end for mary; mail 10_000 to john -> ok
one who is exempt, unknown, or cannot be asked about takes it for all:
    john has 40_000; mary is unknown; paul fails; mail 60_001 -> overquota at end;
    mail 60_001 to john postmaster -> ok; mail 0 to john -> overquota at RCPT;
    mail 900_000 to mary -> ok; mail 900_000 to paul -> ok
a mailbox without a limit takes all:
    john has 50_000; mary has 500_000 of 0; mail 900_000 to mary -> ok x2;
    mail 60_000 to john mary -> ok; mail 0 to john -> overquota at RCPT
each address of a mailbox brings it a copy:
    john has 0; mail 30_000 to john john -> ok; mail 20_000 to john john+a -> ok;
    mail 27_000 -> overquota at end; mail 25_000 -> ok
a copy that does not fit is refused for itself where its size is known:
    john has 0; sized 60_000 to john john+a -> ok; mail 39_001 -> overquota at end;
    mail 38_000 -> ok
grace is for the message that fills the mailbox:
    john has 90_000 grace 10000; mail 20_001 -> overquota at end;
    sized 20_001 -> overquota at RCPT; sized 8_000 -> ok; sized 2_000 -> ok;
    sized 1 -> overquota at RCPT; mail 0 -> overquota at RCPT
what is too large is what quota and grace cannot hold; a full mailbox has none:
    john has 0 grace 10000; sized 110_001 -> toolarge at RCPT; mail 110_001 -> toolarge at end;
    mail 110_000 -> ok; mary has 100_000 OVERQUOTA grace 10000;
    mail 1 to mary -> overquota at RCPT
""",
    "--cache-ttl 0": """
growth counts once:
    john has 0; mail 30_000 -> ok x2; john has 30_000; mail 39_000 -> overquota at end x2;
    john has 60_000; mail 39_000 -> overquota at end; mail 36_900 -> ok
a figure that drops and comes back makes no room: where four fit, four are accepted:
    john has 0; mail 24_000 -> ok x2; john has 48_000; mail 60_000 -> overquota at end;
    john has 0; mail 60_000 -> overquota at end; john has 48_000; mail 60_000 -> overquota at end;
    mail 24_000 -> ok x2; mail 0 -> overquota at RCPT
growth that others made leaves no more room than there is:
    john has 0; mail 10_000 -> ok; john has 90_000; mail 10_001 -> overquota at end;
    mail 10_000 -> ok
a user who deletes does not make what is in flight smaller:
    john has 80_000; mail 18_000 -> ok; john has 0; mail 81_001 -> overquota at end;
    john has 18_000; mail 81_001 -> overquota at end; mail 80_400 -> ok
faults: the last known answer, and what has been accepted since:
    john has 0; mail 30_000 -> ok; john fails; mail 70_000 -> overquota at end;
    mail 100_001 -> overquota at end; sized 100_001 -> overquota at RCPT; mail 67_000 -> ok;
    mail 5_000 -> overquota at
an unknown mailbox has not become smaller:
    john has 50_000; mail 20_000 -> ok; john is unknown; mail 0 -> ok; john has 50_000;
    mail 29_001 -> overquota at end; mail 27_000 -> ok
""",
    "--in-flight 10": """
what is in flight ends by itself, each message by its own time:
    john has 0; mail 40_000 -> ok; forward 7; mail 40_000 -> ok; mail 40_000 -> overquota at end;
    forward 5; mail 40_000 -> ok; mail 40_000 -> overquota at end
""",
    "--in-flight 10 --cache-ttl 0": """
while a backend fails, its last answer has counted all that was accepted since:
    john has 0; mail 60_000 -> ok; john fails; forward 12; mail 60_000 -> overquota at end;
    mail 38_000 -> ok; forward 12; mail 0 -> overquota at RCPT; john has 20_000;
    mail 80_000 -> ok
""",
    "--in-flight 10 --cache-ttl 600": """
an answer does not outlive what was accepted since:
    john has 0; mail 60_000 -> ok; john has 61_000; forward 12; mail 39_001 -> overquota at end;
    mail 38_000 -> ok
without mail it does:
    john has 10_000; mail 90_001 -> overquota at end; john has 100_000 OVERQUOTA;
    forward 500; mail 80_000 -> ok
""",
    "--in-flight 0": """
nothing is in flight, and the real size counts:
    john has 60_000; mail 40_000 -> ok x3; sized 40_000 -> ok; mail 100_001 -> toolarge at end;
    mail 40_001 -> overquota at end
""",
    "--frontends 2": """
what was accepted counts for each frontend:
    john has 0; mail 30_000 -> ok; mail 38_001 -> overquota at end; mail 36_000 -> ok;
    mail 0 -> overquota at RCPT
""",
    "--ignore-size --cache-ttl 0": """
the status alone decides:
    john has 0; mail 200_000 -> ok; sized 200_000 -> ok; mail 200_000 SIZE=5 -> ok;
    john has 100_000 OVERQUOTA; mail 0 -> overquota at RCPT
""",
    "--on-error tempfail": """
a fault at RCPT is none at the end:
    john has 50_000; mary fails; mail 60_000 to john mary -> overquota at end for john;
    mail 1 to mary -> fault at RCPT for mary
""",
}


@pytest.mark.parametrize("options", STORIES)
def test_mail_in_flight_counts(options):
    for steps in re.split(r"^\S.*:\n", STORIES[options], flags=re.MULTILINE)[1:]:
        Story(*options.split()).play(steps.strip())


def test_an_older_mta_that_skips_no_body_gets_the_same_answers(site):
    site.backend.default = says(f"OK x 40000 {LIMIT}")
    with site.milter().session(MilterSession.ALL & ~MilterSession.SKIP) as session:
        assert session.message("john", 3_000_000)[:9] == "552 5.2.3"
        assert session.message("john postmaster", 30_000) == ""
        assert session.message("john", 30_001)[:9] == "452 4.2.2"
        session.mail()
        assert session.rcpt("mary") == ""
        session.body(50_000)
        session.abort()
        assert session.message("mary", 60_000) == "", "what has ended otherwise adds nothing"


def test_a_dry_run_accepts_everything(site):
    site.backend.default = says(f"OK x 40000 {LIMIT}")
    site.backend.answers["full"] = FULL
    milter = site.milter("--dry-run")
    with milter.session() as session:
        for recipient, size in ("full", 1), ("john", 60_001), ("mary", 100_001):
            assert session.message(recipient, size) == ""
    assert milter.log("verdict=toolarge", "dry_run=yes")


BODIES = [
    # (recipients, parameters, bytes after which there is no more to know, beginning of the reply)
    ("john", "", LIMIT, "552 5.2.3"),
    ("john grace", "", 3 * LIMIT, "552 5.2.3"),
    ("unlimited", "SIZE=1000", LIMIT, ""),
    *((user, "", LIMIT, "") for user in ("unlimited", "postmaster", "unknown", "ill")),
]


def test_a_body_without_end_is_read_no_longer_than_it_can_change_the_answer(site):
    site.backend.default = says(f"OK x 0 {LIMIT}")
    grace = says(f"OK x 0 {LIMIT}", Quota_Grace=str(2 * LIMIT))
    site.backend.answers = {"grace": grace, "unlimited": b"OK x 0 0\n"}
    site.backend.answers.update({"unknown": GONE, "ill": OOPS})
    with site.milter().session() as session:
        for recipients, parameters, enough, reply in BODIES:
            session.mail(*parameters.split())
            for recipient in recipients.split():
                assert session.rcpt(recipient) == ""
            assert session.body(20_000_000) <= enough + 2 * session.CHUNK, recipients
            got = session.end()
            assert got.startswith(reply) and bool(got) == bool(reply), (recipients, got)


@pytest.mark.parametrize("declared", [0, 60_000])
def test_a_recipient_reserves_nothing_and_the_end_decides_by_what_is_known_then(declared):
    ours = Ours()
    ours.answers["john"] = "OK", 0, LIMIT
    idle, _ = ours.rcpt("john", declared)
    assert ours.message("john", 60_000) == "ok"
    assert ours.end(idle, 60_000) == "overquota"


@pytest.mark.parametrize("newer", [("OVERQUOTA", LIMIT, LIMIT), ("OK", 50_001, LIMIT)])
def test_a_newer_answer_counts_at_the_end_of_the_data(newer):
    ours = Ours(*UNCACHED)
    ours.answers["john"] = "OK", 0, LIMIT
    message, _ = ours.rcpt("john")
    ours.answers["john"], ours.now = newer, 1
    ours.rcpt("john")
    assert ours.end(message, 50_000) == "overquota"


# ---- several backends of one domain ----


def test_users_spread_over_backends_are_looked_for_once_and_remembered(monkeypatch):
    def look_up(user: str, backend: int) -> tuple[Any, ...]:
        return FULL_BOX if user == f"full{backend}" else NO_BOX

    ours = Ours(backends=3)
    monkeypatch.setattr(ours, "look_up", look_up)
    for recipient, seconds, asked in [
        *[("full3", 0, [1, 2, 3]), ("full3", 0, []), ("full3", 61, [3]), ("full1", 0, [1])],
        *[("nobody", 0, [1, 2, 3]), ("nobody", 0, [])],
    ]:
        ours.now += seconds
        ours.asked.clear()
        verdict = ours.rcpt(recipient)[1].verdict
        assert verdict == ("unknown" if recipient == "nobody" else "overquota")
        assert [backend for _, backend, _ in ours.asked] == asked, recipient


SHARED_OUT = [
    # (the domains that each of three backends serves, none: all others; which are asked about
    # john@one.org, mary@TWO.org, paul@other.org and fred)
    (["one.org=", "two.org,2.org=", ""], [[1], [2], [3], [3]]),
    (["one.org=", "one.org,Two.org=", "two.org="], [[1, 2], [2, 3], [], []]),
    (["", "", "one.org="], [[3], [1, 2], [1, 2], [1, 2]]),
]


@pytest.mark.parametrize(("domains", "numbers"), SHARED_OUT)
def test_a_question_goes_to_the_backends_of_its_domain(domains, numbers):
    urls = [f"--backend={names}http://127.0.0.1:{n}/" for n, names in enumerate(domains, 1)]
    ours = Ours(*urls, backends=0)
    for recipient, expected in zip(
        "john@one.org mary@TWO.org paul@other.org fred@".split(), numbers
    ):
        ours.asked.clear()
        ours.rcpt(recipient)
        assert [backend for _, backend, _ in ours.asked] == expected


ALL_BACKENDS: list[tuple[list[Any], str, list[float]]] = [
    # (what each of three says of john; verdict; what each that is asked may take of nine seconds)
    ([NO_BOX, NO_BOX, NO_BOX], "unknown", [3, 4.5, 9]),
    ([HANGS, HANGS, HANGS], "fault", [3, 3, 3]),
    ([NO_BOX, None, NO_BOX], "fault", [3, 4.5, 9]),
    ([None, NO_BOX, NO_BOX], "fault", [3, 4.5, 9]),
    ([FREE_BOX, FULL_BOX, FULL_BOX], "ok", [3]),
    ([NO_BOX, FREE_BOX, FULL_BOX], "ok", [3, 4.5]),
    ([FULL_BOX, FREE_BOX, FULL_BOX], "overquota", [3]),
    ([None, FULL_BOX, FREE_BOX], "overquota", [3, 4.5]),
    ([HANGS, None, FULL_BOX], "overquota", [3, 3, 6]),
]


@pytest.mark.parametrize(("answers", "verdict", "seconds"), ALL_BACKENDS)
def test_all_backends_of_a_domain_give_one_answer_in_one_time(answers, verdict, seconds):
    ours = Ours("--timeout=9", backends=3)
    ours.answers = dict(enumerate(answers, 1))
    assert ours.rcpt("john")[1].verdict == verdict
    assert [share for _, _, share in ours.asked] == seconds


def test_a_mailbox_may_move_to_another_backend_or_be_known_to_none_for_certain():
    ours = Ours(*UNCACHED, backends=3)
    nowhere = dict.fromkeys((1, 2, 3), NO_BOX)
    for place, answer, verdict in [
        *[(3, FULL_BOX, "overquota"), (1, FULL_BOX, "overquota"), (2, FULL_BOX, "overquota")],
        *[(2, None, "overquota"), (2, NO_BOX, "unknown")],  # first the last known answer
    ]:
        ours.now += 1
        ours.answers = {**nowhere, place: answer}
        assert ours.rcpt("john")[1].verdict == verdict


def test_a_stand_by_takes_over_and_each_backend_is_down_for_itself(site):
    first, second = site.another(), site.another()
    first.answers = second.answers = {"full": FULL}
    options = [f"--backend=example.com={backend.url}" for backend in (first, second)]
    milter = site.milter(*options, *UNCACHED, *TEMPFAIL, clock=True, backend=False)
    assert milter.rcpt("full")[:3] == "452" and second.requests == []
    first.close()
    for _ in range(4):
        assert milter.rcpt("full")[:3] == "452" and milter.rcpt("john") == ""
    assert milter.log(f"backend={first.url}", "state=down") and len(second.requests) == 8
    again = site.another(first.port)
    again.default = FULL
    assert milter.rcpt("new") == "", "the first is left alone for --retry-after"
    milter.forward(11)
    assert milter.rcpt("newer")[:3] == "452"
    assert milter.log(f"backend={first.url}", "state=up")
    second.close()
    assert milter.rcpt("john")[:3] == "452", "the first alone"
    assert len(milter.lines("state=down")) == 2


def test_an_old_figure_of_a_stand_by_frees_no_room():
    # Its figure cannot be compared with the other's: all that was accepted lately stays in flight.
    ours = Ours(*UNCACHED, backends=2)
    ours.answers = {1: ("OK", 50_000, LIMIT)}
    assert ours.message("john", 20_000) == "ok"
    for old in 10_000, 60_000:
        for ours.answers in {2: ("OK", old, LIMIT)}, {1: ("OK", 50_000, LIMIT)}:
            ours.now += 1
            assert ours.message("john", 29_001) == "overquota at end for john"


def test_without_in_flight_the_usage_on_a_stand_by_counts_as_it_is():
    ours = Ours("--in-flight=0", *UNCACHED, backends=2)
    ours.answers = {1: ("OK", 90_000, LIMIT)}
    assert ours.message("john", 20_000) == "overquota at end for john"
    ours.answers, ours.now = {2: ("OK", 10_000, LIMIT)}, 10
    assert ours.message("john", 20_000) == "ok"


# ---- faults of a backend ----

DRIP = [(b"y", 0.1)] * 600
FAULTS: dict[str, list[Any]] = {
    # What a backend does with its question: pieces of an answer and the seconds after each. It
    # closes the connection at the end of a row; `None` for bytes breaks it off.
    "silent": HANG,
    "a dripping status": [(b"HTTP/1.0 200 OK", 0), *DRIP],
    "a header without end": [(b"HTTP/1.0 200 OK\r\n", 0), *[(b"X: y\r\n", 0.1)] * 600],
    "a header and no more": [(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n", 600)],
    "a dripping body": [(b"HTTP/1.0 200 OK\r\n\r\nOVERQUOTA ", 0), *DRIP],
    "less than its length": [(b"HTTP/1.0 200 OK\r\nContent-Length: 50\r\n\r\nOVERQUOTA", 600)],
    "half a chunk": [(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nOVER", 600)],
    "an early hint and no answer": [(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", 600)],
    "a line without end": [(b"HTTP/1.0 200 OK\r\n\r\nOK ", 0), *[(b"x" * 65536, 0)] * 1000],
    "closed": [],
    "reset": [(None, 0)],
    "reset in the line": [(b"HTTP/1.0 200 OK\r\n\r\nOVERQ", 0.1), (None, 0)],
}


@pytest.mark.parametrize("tls", [False, True])
def test_a_fault_about_a_mailbox_ends_in_time_with_its_connection_and_concerns_it_alone(
    tls, site, certificate
):
    """Each row is a backend of its own; all are asked at once."""
    backends = [site.another(tls=certificate if tls else None) for _ in FAULTS]
    served = [f"--backend=x{n}.org={backend.url}" for n, backend in enumerate(backends)]
    options = *served, "--cafile", certificate, "--timeout", "2", *UNCACHED, *TEMPFAIL
    milter = site.milter(*options, backend=False)
    for backend, script in zip(backends, FAULTS.values()):
        backend.default = script
    replies = milter.at_once([f"john@x{n}.org" for n in range(len(backends))])
    for number, name in enumerate(FAULTS):
        assert replies[number].startswith(FAULT), name
        assert milter.log(f"recipient=john@x{number}.org", "verdict=fault used=- quota=- cached=no")
        backends[number].default = FULL
    endless = [row for row in zip(backends, FAULTS.values()) if sum(s for _, s in row[1]) > 10]
    wait_for(
        lambda: all(backend.left == ["john"] for backend, _ in endless), "the connections' end"
    )
    healthy = milter.at_once([f"mary@x{n}.org" for n in range(len(backends))])
    assert {got[:3] for got in healthy} == {"452"} and not milter.lines("state=down")


CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgrL2mjjZRPcdWCtuR
D+aRMgleK/VpTtrbF5cNKdlPDkShRANCAASuygW4Ox2b+R+Z3bH+heJXQPEW6YW/
38xC2x7PervNNgTGgesRQprLHbmT56XDL++v5IFYagGpbP8Zgi++QvSl
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBdzCCARygAwIBAgIBAjAKBggqhkjOPQQDAjAhMR8wHQYDVQQDDBZBIGJhY2tl
bmQgb2YgdGhlIHRlc3RzMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAw
WjAhMR8wHQYDVQQDDBZBIGJhY2tlbmQgb2YgdGhlIHRlc3RzMFkwEwYHKoZIzj0C
AQYIKoZIzj0DAQcDQgAErsoFuDsdm/kfmd2x/oXiV0DxFumFv9/MQtsez3q7zTYE
xoHrEUKayx25k+elwy/vr+SBWGoBqWz/GYIvvkL0paNDMEEwDwYDVR0RBAgwBocE
fwAAATAPBgNVHRMBAf8EBTADAQH/MB0GA1UdDgQWBBRIBE1O+WBzYHLStoChdZqs
XmCk8zAKBggqhkjOPQQDAgNJADBGAiEAz1KDGsjN++LDEV+Oeuf1lStOQSovBqLl
/GRnMjMlBacCIQC9Y/29czkJp1jYoJyKMfep/O80lyB5IVMQ1EYIpc86oQ==
-----END CERTIFICATE-----
"""


@pytest.fixture
def certificate(site):
    """Give a key and a certificate for 127.0.0.1 that nobody has signed, for tests alone."""
    return site.write("tls.pem", CERTIFICATE)


def test_a_backend_that_cannot_be_reached_is_logged_once_and_left_alone(site, certificate):
    unsigned, silent, dripping = site.another(tls=certificate), site.another(), site.another()
    # These two speak first, and no TLS.
    silent.serve = lambda connection: silent.play(HANG, connection, "")
    dripping.serve = lambda connection: dripping.play([(b"\x16\3\3\x40", 0), *DRIP], connection, "")
    ports = [backend.port for backend in (site.backend, silent, dripping)]
    urls = [f"http://127.0.0.1:{free_port()}/", unsigned.url]
    urls += [f"https://127.0.0.1:{port}/" for port in ports]
    options = [f"--backend=x{n}.org={url}" for n, url in enumerate(urls)]
    milter = site.milter(*options, *TEMPFAIL, "--timeout", "2", backend=False)
    for user in "john", "mary":
        replies = milter.at_once([f"{user}@x{n}.org" for n in range(len(urls))])
        assert {reply[:10] for reply in replies} == {FAULT}
    reasons = [milter.log(f"backend={url} ", "state=down", "reason=").lower() for url in urls]
    assert "refused" in reasons[0] and "verify failed" in reasons[1] and unsigned.requests == []
    assert milter.all_recipients(10) and len(milter.lines("state=down")) == len(urls)


def test_a_certificate_is_trusted_by_cafile_and_for_its_name_alone(site, certificate):
    backend = site.another(tls=certificate)
    urls = f"a.org={backend.url}", f"b.org={backend.url.replace('127.0.0.1', 'localhost')}"
    options = [f"--backend={url}" for url in urls]
    milter = site.milter(*options, "--cafile", certificate, *TEMPFAIL, backend=False)
    assert milter.rcpt("john@a.org") == "" and milter.rcpt("john@b.org").startswith(FAULT)
    assert backend.users() == ["john"]


def test_a_ca_without_the_extensions_that_python_3_13_wants_is_trusted(monkeypatch):
    strict = ssl.create_default_context()
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    monkeypatch.setattr(ssl, "create_default_context", lambda **_: strict)
    assert not milter_module().read_cafile("ca.pem").verify_flags & ssl.VERIFY_X509_STRICT


def test_while_a_backend_is_tried_again_only_one_question_is_asked(site):
    site.backend.close()
    milter = site.milter("--timeout", "1", clock=True)
    assert milter.rcpt("john") == ""
    again = site.another(site.backend.port)
    again.default = HANG
    milter.forward(11)
    assert milter.at_once([f"user{number}" for number in range(30)]) == [""] * 30
    assert len(again.requests) == 1
    milter.forward(11)
    again.default = FULL
    assert milter.rcpt("paul")[:3] == "452" and milter.log("state=up")


def verdict_on(recipient: str, *options: str) -> str:
    """Ask about a recipient in this process."""
    service = milter_module().Service(options, milter_module().read_options(options))
    return str(service.policy.decide(f"<{recipient}>", milter_module().Message()).verdict)


def test_of_two_addresses_of_a_backend_one_that_swallows_packets_costs_no_verdict(
    site, monkeypatch
):
    look_up, port = socket.getaddrinfo, site.backend.port
    two = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", port)) for n in (2, 1)]
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *a, **k: two if host == "two.test" else look_up(host, *a, **k),
    )
    site.backend.default = FULL
    url = site.backend.url.replace("127.0.0.1", "two.test")
    # A queue of connections that is full swallows all others, as a packet filter does.
    with socket.socket() as swallowing, contextlib.ExitStack() as stack:
        swallowing.bind(("127.0.0.2", port))
        swallowing.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.2", port))
        assert verdict_on("john@x.org", f"--backend={url}", "--timeout=4") == "overquota"


def test_a_name_whose_look_up_hangs_is_a_fault_in_time(monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: hangs.wait(60) and [])
    options = "--backend=http://hangs.test/", "--timeout=0.5"
    assert verdict_on("john@x.org", *options) == "fault" and not hangs.is_set()
    hangs.set()


# ---- questions: their time, their turn, and what speaks against a backend ----


def test_a_mailbox_that_hangs_is_left_alone_for_a_while_and_never_makes_the_backend_down(site):
    site.backend.answers["john"] = HANG
    milter = site.milter("--timeout", "0.6", *TEMPFAIL, *UNCACHED, clock=True)
    for number in range(1, 4):
        for _ in range(3):
            assert milter.rcpt("john").startswith(FAULT)
        assert site.backend.users() == ["john"] * number
        milter.forward(11)
    site.backend.answers["john"] = FULL
    assert milter.rcpt("john")[:3] == "452" and milter.never_down()


def test_three_mailboxes_in_a_row_that_run_out_of_time_are_a_backend_that_is_down(site):
    site.backend.answers = dict.fromkeys("adef", [(b"HTTP/1.0 200 OK\r\n\r\n", 600)])
    milter = site.milter("--timeout", "1", *TEMPFAIL, clock=True)
    for user in "acde":
        assert milter.rcpt(user).startswith(FAULT) == (user != "c"), user
    assert milter.log("recipient=e@") and not milter.lines("state=down"), "c was answered between"
    assert milter.rcpt("f").startswith(FAULT) and milter.log("state=down")
    asked = len(site.backend.requests)
    assert milter.rcpt("g").startswith(FAULT) and len(site.backend.requests) == asked
    milter.forward(11)
    assert milter.rcpt("g") == "" and milter.log("state=up")


def test_a_backend_that_answers_slowly_is_not_called_down(site):
    # Each answer takes 0.6 of the timeout, and there are four times as many sessions as places.
    site.backend.default = after(1.2, FULL)
    milter = site.milter("--max-queries", "4", "--timeout", "2")
    replies = milter.at_once([f"user{number}" for number in range(16)])
    assert {reply[:3] for reply in replies} <= {"452", ""} and len(site.backend.requests) >= 4
    site.backend.default = FULL
    assert milter.rcpt("afterwards")[:3] == "452" and milter.never_down()


def test_a_question_gets_its_turn_in_the_first_half_of_its_time_or_not_at_all(site):
    opened = threading.Event()
    site.backend.answers["first"], site.backend.default = after(60, FULL, opened), FULL
    milter = site.milter("--max-queries", "1", "--timeout", "4", *TEMPFAIL)
    first = milter.ask("first")
    site.backend.wait_for("first")
    second = milter.ask("second")
    time.sleep(2.5)
    opened.set()
    assert first.reply()[:3] == "452" and second.reply().startswith(FAULT)
    assert site.backend.users() == ["first"]
    assert second.rcpt("second")[:3] == "452", "what was never asked counts against nobody"


@pytest.mark.parametrize("pause", [1, 2.5])
def test_a_question_that_was_overtaken_makes_room_for_others_after_half_its_time(pause, site):
    opened = threading.Event()
    cut = [(b"HTTP/1.0 200 OK\r\n\r\nOK hangs", 600)]  # no answer, though its connection ends
    site.backend.answers = {"hangs": cut, "held": after(60, FREE, opened)}
    site.backend.default = FULL
    milter = site.milter("--max-queries", "2", "--timeout", "4", *TEMPFAIL)
    hangs = milter.ask("hangs")
    site.backend.wait_for("hangs")
    assert milter.rcpt("quick")[:3] == "452"  # it began later, and was answered
    time.sleep(pause)  # until before and after half of the time
    held = milter.ask("held")
    site.backend.wait_for("held")
    assert milter.rcpt("waits")[:3] == "452"
    wait_for(lambda: site.backend.left == ["hangs"], "the end of the overtaken question")
    opened.set()
    assert held.reply() == "" and hangs.reply().startswith(FAULT)


def test_sessions_share_a_question_about_a_mailbox_and_no_more_are_asked_than_have_a_place(site):
    site.backend.default = after(0.2, FULL)
    milter = site.milter("--max-queries", "3", "--timeout", "30")
    replies = milter.at_once(["john"] * 20 + [f"user{number}" for number in range(12)])
    assert {reply[:3] for reply in replies} == {"452"}
    assert site.backend.most == 3 and len(site.backend.requests) == 13


# ---- what is remembered ----


def test_answers_are_used_again_for_their_time_and_stand_in_for_an_hour():
    ours = Ours()
    for user, seconds, answer, verdict, asked in [
        ("john", 0, FULL_BOX, "overquota", 1),
        ("john", 55, None, "overquota", 1),
        ("mary", 0, FULL_BOX, "overquota", 2),
        ("john", 30, FULL_BOX, "overquota", 3),  # no longer remembered
        ("mary", 0, FULL_BOX, "overquota", 3),
        ("mary", 3000, None, "overquota", 4),  # the last known answer
        ("mary", 569, None, "overquota", 5),
        ("mary", 2, None, "fault", 6),  # which is more than an hour old
        ("john", 0, None, "overquota", 7),
        ("john", 30, None, "fault", 8),
        ("john", 0, FULL_BOX, "overquota", 9),
    ]:
        ours.now += seconds
        ours.answers[user] = answer
        assert ours.rcpt(user)[1].verdict == verdict, (user, asked)
        assert len(ours.asked) == asked, (user, asked)


def test_the_newest_answer_is_the_last_known_one_and_refuses_nobody_for_good():
    ours = Ours(
        *(*UNCACHED, *TEMPFAIL, "--inactive-after=30", f"--unknown-reply={UNKNOWN_REPLY}"),
        "--overquota-reply=552 5.2.2 {address} is full",
    )
    ours.now = 10_000_000.0  # since 1970, where `dead` was changed
    dead = *FULL_BOX, 0, email.utils.formatdate(5, usegmt=True)
    for user, answer, size, reply, while_it_fails in [
        ("john", FULL_BOX, 0, "552 5.2.2", "452 4.2.2"),
        ("john", FREE_BOX, 0, "", ""),
        ("mary", FREE_BOX, 101, "552 5.2.3", "452 4.2.2"),
        ("mary", FREE_BOX, 50, "", ""),
        ("gone", NO_BOX, 0, "550 5.1.1", "451 4.3.0"),
        ("dead", dead, 0, "550 5.2.2", "452 4.2.2"),
    ]:
        for ours.answers[user], expected in (answer, reply), (None, while_it_fails):
            ours.now += 1
            decision = ours.rcpt(user, size)[1]
            assert " ".join(decision.reply or [])[:9] == expected, (user, size)


# ---- mail in flight: hours of mailboxes, and many at once ----


class Simulation(Ours):
    """Some time of mailboxes in which questions take time, fail, and are asked at once.

    Messages come in bursts, are slow, and arrive late and out of order, but in --in-flight;
    users make room; a stand-by gives figures of before; HUPs come.
    """

    def __init__(self, ttl: float, lag: float, faults: float) -> None:
        super().__init__(f"--cache-ttl={ttl}", backends=2)
        self.noise, self.lag, self.faults = random.Random(1), lag, faults
        # What each has used lately, and since when; the latest is the last.
        self.figures = {f"user{number}": [(-9.0, 0)] for number in range(12)}
        self.latest = float("inf")  # when the questions under way have ended
        self.accepted = self.overfilled = 0
        self.events: list[tuple[float, float, Callable[[], object]]] = []
        self.repeat(0.5, self.recipient)
        self.repeat(20, self.delete)
        self.repeat(600, lambda: self.reload(*self.options))

    def after(self, seconds: float, what: Callable[[], object]) -> None:
        heapq.heappush(self.events, (self.now + seconds, self.noise.random(), what))

    def repeat(self, mean: float, what: Callable[[], object]) -> None:
        """Let something happen now and again, at times more often than at others."""

        def happen() -> None:
            self.repeat(mean, what)
            what()

        pace = self.noise.choice([mean / 10, mean, mean * 3])
        self.after(self.noise.expovariate(1 / pace), happen)

    def run(self, until: float) -> None:
        """Let time pass. What happens while a question is asked happens within it."""
        while self.events[0][0] <= until:
            at, _, what = heapq.heappop(self.events)
            self.now = max(self.now, at)
            what()
        self.now = max(self.now, until)

    def look_up(self, user: str, backend: int) -> tuple[str, int, int] | None:
        """Answer a question: what is true now, or was a while ago on the stand-by, comes later."""
        asked = self.now - (9 if backend == 2 else 0)
        known = [used for at, used in self.figures[user] if at <= asked]
        before, self.latest = (
            self.latest,
            min(self.latest, self.now + self.noise.random() * self.lag),
        )
        self.run(self.latest)
        self.latest = before
        return None if self.noise.random() < self.faults else ("OK", known[-1], LIMIT)

    def recipient(self) -> None:
        """Give a recipient, and the data a while later."""
        user, size = self.noise.choice(list(self.figures)), self.noise.randrange(1000, 30_000)
        message, decision = self.rcpt(user, size * self.noise.randrange(2))
        if decision.verdict == "ok":
            self.after(self.noise.random() * 5, lambda: self.end_of_data(user, message, size))

    def end_of_data(self, user: str, message: Any, size: int) -> None:
        if self.end(message, size) == "ok":
            self.accepted += 1
            self.after(self.noise.random() * 40, lambda: self.change(user, size + 700))

    def delete(self) -> None:
        user = self.noise.choice(list(self.figures))
        self.change(user, -int(self.figures[user][-1][1] * self.noise.random()))

    def change(self, user: str, size: int) -> None:
        used = self.figures[user][-1][1] + size
        self.figures[user] = [*self.figures[user][-50:], (self.now, used)]
        self.overfilled += used > LIMIT + 700  # the last message's header


@pytest.mark.parametrize("ttl", [0, 5, 60, 600])
@pytest.mark.parametrize(("lag", "faults"), [(0, 0), (4, 0), (4, 0.5)])
def test_in_simulated_hours_no_mailbox_is_overfilled_and_none_left_empty(ttl, lag, faults):
    hours = Simulation(ttl, lag, faults)
    hours.run(2400)
    assert hours.overfilled == 0 and hours.accepted > 200


def test_of_many_sessions_at_once_no_two_use_the_same_room():
    ours = Ours()
    ours.answers["john"] = "OK", 0, 1_000_000
    messages = [ours.rcpt("john", 100_000)[0] for _ in range(30)]
    accept = ours.service.ledger.accept

    def accept_late(*message: Any) -> None:  # the other threads go on meanwhile, if they can
        time.sleep(0.005)
        accept(*message)

    ours.service.ledger.accept = accept_late
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        decisions = list(pool.map(ours.service.policy.end_of_data, messages))
    assert decisions.count(None) == 9, "a tenth has no room for its headers"


def test_what_many_others_have_pushed_out_since_rcpt_is_put_back_at_the_end_of_the_data():
    ours = Ours()
    ours.module.MOST_ACCOUNTS = 1
    ours.answers = {"john": ("OK", 0, LIMIT), "mary": ("OK", 0, LIMIT)}
    message, _ = ours.rcpt("john")
    ours.rcpt("mary")
    ours.answers.clear()
    assert ours.end(message, 60_000) == "ok"
    assert ours.message("john", 60_000) == "overquota at end for john", "by the last known answer"


def test_an_answer_that_comes_late_does_not_replace_a_newer_one(monkeypatch):
    ours = Ours()

    def answer(user: str, backend: int) -> tuple[str, int, int]:
        if ours.now:
            return FULL_BOX
        ours.now = 1.0
        assert ours.message("john", 1) == "overquota at RCPT for john", "the newer question"
        return FREE_BOX

    monkeypatch.setattr(ours, "look_up", answer)
    assert ours.message("john", 1) == ours.message("john", 1) == "overquota at RCPT for john"


def test_an_hour_of_last_known_answers_takes_no_memory():
    """While its backend fails a busy mailbox gets two messages a second by its last answer."""
    ours = Ours()
    ours.answers["john"] = "OK", 0, 2**60
    for number in range(2_000):
        ours.now = number / 2
        assert ours.message("john", 100) == "ok"
        ours.answers.clear()
    (account,) = ours.service.ledger.accounts.values()
    assert len(account.recent) < 200 and account.in_flight == 2_000 * 1124


# ---- HUP: options and aliases again ----


def test_hup_reads_the_option_file_again_but_for_socket_and_log_and_bad_ones_change_nothing(site):
    second, port = site.another(), free_port()
    second.default = FULL
    file = site.write("options", f"--backend {site.backend.url}\n")
    lines = f"--backend {second.url}\n--overquota-reply 552 5.2.2 Full\n--verbose\n"
    lines += f"--listen inet:{port}@127.0.0.1\n--syslog\n--metrics {site.folder}/quota.prom\n"
    milter = site.milter(f"@{file}", clock=True, backend=False)
    with milter.session() as session:
        session.mail()
        for bad in "--timeout soon\n", "--aliases /nonexistent\n", "\xff\n", None:
            file.unlink() if bad is None else file.write_text(lines + bad, encoding="latin-1")
            logged = milter.hup()
            assert "state=kept" in logged and str(file) in logged, bad
            assert session.rcpt("john") == "", bad
        file.write_text(lines)
        assert "state=reloaded" in milter.hup()
        # The answer of a backend that serves the domain no more is not used.
        assert session.rcpt("john") == "552 5.2.2 Full" and second.users() == ["john"]
        assert session.rcpt("postmaster") == ""
    assert milter.log("recipient=postmaster"), "verbose, and not to syslog"
    assert not answers_at(port) and milter.rcpt("mary")[:3] == "552"
    milter.forward(15)
    wait_for((site.folder / "quota.prom").exists, "the metrics")


def test_answers_and_what_is_in_flight_stay_over_a_reload_and_count_by_the_new_options():
    ours = Ours()
    ours.answers = {"john": ("OK", 0, LIMIT), "mary": ("OK", 0, LIMIT)}
    assert ours.message("john", 60_000) == "ok"
    ours.reload("--frontends=3", "--in-flight=50")
    assert ours.message("john", 39_001) == "overquota at end for john"
    assert len(ours.asked) == 1, "the answer stays, too"
    assert ours.message("mary", 40_000) == "ok"
    assert ours.message("mary", 0) == "overquota at RCPT for mary", "three frontends"


# ---- the process: signals, sockets, log, metrics ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_term_and_int_end_it_in_time_with_sessions_open_and_questions_under_way(number, site):
    site.backend.default = HANG
    milter = site.milter("--timeout", "60")
    with milter.session() as idle, milter.ask("john"):
        idle.mail()
        site.backend.wait_for("john")
        assert milter.process.stop(number) == 0
    assert milter.log("counters recipients=") and milter.log("state=stopped")
    assert not answers_at(milter.port)


def test_usr1_logs_the_counters_and_so_does_the_end(site):
    site.backend.answers = {"john": FULL, "ill": OOPS, "gone": GONE}
    milter = site.milter()
    for user in "john", "john", "mary", "gone", "ill", "postmaster", b"<>":
        milter.rcpt(user)
    milter.process.popen.send_signal(signal.SIGUSR1)
    expected = "recipients=7 refused=2 cached=1 lastknown=0 ok=1 overquota=2 toolarge=0 inactive=0"
    expected += " unknown=1 fault=1 empty=1 exempt=1 alias=0 nobackend=0"
    assert milter.log("counters ").endswith(f"counters {expected}")
    assert milter.rcpt("john")[:3] == "452" and milter.process.stop() == 0
    assert len(milter.lines("counters recipients=8 ")) == 1


def test_a_stale_unix_socket_is_replaced_and_removed_and_a_live_one_is_neither(site):
    path = site.folder / "m.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))

    def is_live() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(path)) == 0

    options = f"--listen=unix:{path}", f"--backend={site.backend.url}"
    for _ in range(2):  # the second time nothing is there
        process = site.start(sys.executable, MILTER, *options)
        process.wait_ready(is_live)
        status, output, errors = run_milter(*options)
        assert (status, output, len(errors.splitlines())) == (1, "", 1) and str(path) in errors
        with MilterSession(str(path)) as session:
            session.mail()
            assert session.rcpt("john") == ""
        assert process.stop() == 0 and not path.exists()
    path.write_text("precious")
    assert run_milter(*options)[0] == 1 and path.read_text() == "precious"


def test_a_second_instance_on_a_busy_port_ends_with_status_1_and_one_line(site):
    milter = site.milter()
    where = f"inet:{milter.port}@127.0.0.1"
    status, output, errors = run_milter(f"--listen={where}")
    assert (status, output, len(errors.splitlines())) == (1, "", 1)
    assert where in errors and "in use" in errors
    assert milter.rcpt("john") == ""


def test_a_full_disk_under_the_log_changes_no_answer(site):
    site.backend.default = FULL
    with open("/dev/full", "w") as full:
        milter = site.milter("--verbose", stdout=full, stderr=full)
        assert milter.rcpt("john")[:3] == "452" and milter.rcpt("postmaster") == ""
        assert milter.process.stop() == 0


def metrics_of(file: pathlib.Path) -> dict[str, float]:
    """Read a file of metrics: samples by name and labels. Every line has Prometheus' form."""
    text = file.read_text(encoding="ascii")
    assert text.endswith("\n") and file.stat().st_mode & 0o777 == 0o644
    kinds = dict(re.findall(r"^# TYPE (\w+) (counter|gauge|histogram)$", text, re.MULTILINE))
    assert set(re.findall(r"^# HELP (\w+) \S", text, re.MULTILINE)) == set(kinds)
    sample = r'quota_milter_(\w+(?:\{\w+="[^"\n]*"(?:,\w+="[^"\n]*")*\})?) ([0-9.e+-]+)\n'
    assert re.fullmatch(rf"(# .*\n|{sample})+", text)
    return {name: float(value) for name, value in re.findall(sample, text)}


def test_metrics_are_replaced_and_tell_what_the_milter_did(site):
    file = site.folder / "quota.prom"
    url, dead = site.backend.url, f"http://127.0.0.1:{free_port()}/"
    site.backend.default = says(f"OK x 40000 {LIMIT}")
    site.backend.answers = {"full": FULL, "gone": GONE}
    secret = url.replace("//", "//user:secret@")
    backends = f"example.com={secret}", f"dead.org={dead}", f"b.org={url}?secret=b"
    options = "--metrics", file, *(f"--backend={text}" for text in backends)
    milter = site.milter(*options, backend=False, clock=True, umask=0o077)
    first = wait_for(lambda: file.exists() and file.stat().st_ino, "the first file")
    with milter.session() as session:
        assert session.message("john", 70_001, "SIZE=70001")[:3] == "452"
        assert session.message("john", 80_005)[:3] == "452"
        assert session.message("john paul", 20_000) == ""
        assert session.message("full full", 1)[:3] == "452"
        assert session.message("gone john@dead.org", 5) == ""
    milter.forward(15)
    wait_for(lambda: file.stat().st_ino != first, "the next file")
    metrics = metrics_of(file)
    assert not re.search("secret|john", file.read_text())
    assert {name: n for name, n in metrics.items() if "seconds" not in name and n} == {
        'recipients_total{verdict="ok"}': 3,
        'recipients_total{verdict="overquota"}': 3,
        'recipients_total{verdict="unknown"}': 1,
        'recipients_total{verdict="fault"}': 1,
        "cached_total": 3,
        'refused_total{step="rcpt",verdict="overquota"}': 3,
        'refused_total{step="data",verdict="overquota"}': 1,
        'refused_bytes_total{step="rcpt"}': 70_001,
        'refused_bytes_total{step="data"}': 80_005,
        "in_flight_messages": 4,
        "in_flight_bytes": 2 * (20_000 + 1024) + 2 * (5 + 1024),
        "remembered_answers": 4,
        f'backend_up{{backend="{url}"}}': 1,
        f'backend_up{{backend="{url}#3"}}': 1,
        f'backend_questions_total{{backend="{url}"}}': 4,
        f'backend_questions_total{{backend="{dead}"}}': 1,
        f'backend_faults_total{{backend="{dead}"}}': 1,
    }
    times = [n for name, n in metrics.items() if "seconds" in name and f'"{url}"' in name]
    assert times[:8] == sorted(times[:8]) and times[7:9] == [4, 4], "buckets, and their count"


def test_metrics_are_not_written_through_a_link_that_somebody_left(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "prom.new").symlink_to("victim")
    milter_module().write_whole(str(tmp_path / "prom"), "metrics")
    assert (tmp_path / "victim").read_text() == "kept" and not (tmp_path / "prom").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["prom", "victim"]


def test_metrics_that_cannot_be_written_harm_nothing_and_are_logged(site):
    os.mkfifo(site.folder / "pipe")
    milter = site.milter("--metrics", site.folder / "pipe")
    assert milter.log(f"metrics={site.folder}/pipe", "state=failed")
    assert milter.rcpt("john") == ""
    assert milter.process.stop() == 0 and (site.folder / "pipe").is_fifo()


# ---- load, and what is left of the system ----


def test_the_soft_limit_of_descriptors_is_raised_to_the_hard_one(site):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    lower = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (256, hard))
    pid = site.milter(preexec_fn=lower).process.popen.pid
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_without_descriptors_left_a_question_is_a_fault_and_no_verdict(site):
    site.backend.default = FULL
    milter = site.milter(*TEMPFAIL, *UNCACHED, clock=True)
    with milter.session() as session:
        session.mail()
        assert session.rcpt("john")[:3] == "452"
        with milter.process.few_descriptors(0):
            assert session.rcpt("mary").startswith(FAULT)
            assert session.rcpt("postmaster") == ""
        milter.forward(11)
        assert session.rcpt("paul")[:3] == "452"


def test_without_threads_a_question_is_a_fault_and_afterwards_all_places_are_there_again(
    site, monkeypatch
):
    module = milter_module()
    options = module.read_options(["--max-queries=3"])
    backend = module.Backend(module.Client(site.backend.url, None), options, module.Counters())

    def ask(user: str) -> str:
        return str(backend.ask(module.Mailbox(user, ""), time.monotonic() + 60).status)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for number in range(20):
            with pytest.raises(module.Fault, match="no thread"):
                ask(f"user{number}")
    assert ask("john") == "OK"
    opened = threading.Event()
    site.backend.default = after(60, FULL, opened)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = pool.map(ask, ["one", "two", "three"])
        wait_for(lambda: site.backend.busy == 3, "three questions at a time")
        opened.set()
        assert list(answers) == ["OVERQUOTA"] * 3


# ---- the CGIs: a question as the function `respond` answers it ----

CGIS = {script: load(script) for script in (MBOX_CGI, MAILDIR_CGI)}


class Response(NamedTuple):
    """What a CGI answered: HTTP status, the line without its end, header fields."""

    status: int
    line: str
    header: dict[str, str]


def ask(script: pathlib.Path, query: str | bytes = "u=john", **env: object) -> Response:
    """Ask a CGI with settings, in this process, as a web server would."""
    raw = {b"REQUEST_METHOD": b"GET", b"QUERY_STRING": os.fsencode(query)}
    raw.update((name.encode(), os.fsencode(str(value))) for name, value in env.items())
    status, header, body = CGIS[script].respond(raw)
    assert body[-1:] in (b"\n", b"") and body.count(b"\n") <= 1
    return Response(int(status[:3]), os.fsdecode(body[:-1]), dict(header))


@pytest.fixture(scope="module")
def spool(tmp_path_factory):
    """Give a mail folder with some mailboxes, some of them full at 100 bytes."""
    folder = tmp_path_factory.mktemp("mail")
    for name, size in ("john", 100), ("mary", 101), ("OVERQUOTA", 5), ("a b", 101), ("jörg", 7):
        (folder / name).write_bytes(b"x" * size)
    (folder / os.fsdecode(b"\xf6\xe4")).write_bytes(b"x" * 101)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    return folder


NO_USER, NO_DOMAIN = "ERROR no mailbox has such a user", "ERROR no mailbox has such a domain"
QUERIES = [
    # (status, line, queries)
    (200, "OK john 100 100", "u=john", "u=john&d=example.com", "d=example.com&u=john"),
    (200, "OK john 100 100", "x=1&u=john&y", "u=j%6fh%6E"),
    (200, "OVERQUOTA mary 101 100", "u=mary"),
    (200, "OVERQUOTA a b 101 100", "u=a+b", "u=a%20b"),
    (200, "OK jörg 7 100", "u=j%C3%B6rg"),
    (200, "OVERQUOTA \udcf6\udce4 101 100", b"u=\xf6\xe4", "u=%F6%E4"),
    (200, "OK OVERQUOTA 5 100", "u=OVERQUOTA"),
    (200, "OK 100% 0 100", "u=100%25", "u=100%"),
    (200, "OK %zz% 1 0 100", "u=%zz%+1"),
    (200, f"OK {'x' * 255} 0 100", f"u={'x' * 255}"),
    (400, "ERROR no user (u=) given", "", "john", "--serve", "d=x.org"),
    (400, NO_USER, *(f"u={name}" for name in ("", "x" * 256, "..", ".john", "/etc/passwd"))),
    (400, NO_USER, "u", "u=..%2Fsecret", "u=john%00", "u=OK%0Ajohn", "u=john%7F", "u=john%C2%85"),
    (400, NO_DOMAIN, *(f"u=john&d={name}" for name in ("", "..", "a/b", "a%0D", "x" * 256))),
    (500, "ERROR the mailbox is not a file", "u=folder", "u=pipe"),
    (500, "ERROR cannot read the mailbox: Too many levels of symbolic links", "u=loop"),
]


@pytest.mark.parametrize("row", QUERIES)
def test_a_query_gets_its_answer(row, spool, capfd):
    status, line, *queries = row
    for query in queries:
        got = ask(MBOX_CGI, query, QUOTA_LIMIT="100", QUOTA_MAILBOX=spool / "%n")
        assert got[:2] == (status, line), query
        assert got.header["Content-Type"] == "text/plain"
        assert got.header["Content-Length"] == str(len(os.fsencode(line)) + 1)
        assert got.header["Cache-Control"] == "no-store"
        logged = capfd.readouterr().err
        assert logged.count("\n") == (status == 500), "the details of a 500, in one line"


def test_only_get_and_head_are_answered(spool):
    mailbox = {"QUOTA_MAILBOX": spool / "%n"}
    for method in "POST", "PUT", "DELETE", "OPTIONS", "get", "":
        got = ask(MBOX_CGI, REQUEST_METHOD=method, **mailbox)
        assert got[:2] == (405, "ERROR only GET and HEAD are answered")
        assert got.header["Allow"] == "GET, HEAD"
    head = ask(MBOX_CGI, REQUEST_METHOD="HEAD", **mailbox)
    assert head == (200, "", ask(MBOX_CGI, **mailbox).header)


BAD_PATH = "ERROR QUOTA_MAILBOX is not like /var/mail/%n: "
NO_FOLDER = "ERROR QUOTA_MAILBOX begins with a folder that does not exist: in systemd"
TEMPLATES: list[tuple[str, str, str]] = [
    # (QUOTA_MAILBOX below the folder; query; the file, or the error)
    *(
        (template, "u=john&d=x.org", file)
        for template, file in [
            *[("%d/%n", "x.org/john"), ("%u", "john@x.org"), ("100%%/%n", "100%/john")],
            *[("%%n/%n", "%n/john"), ("x-%1n-%n.mbox", "x-j-john.mbox"), ("%1n/%n", "j/john")],
            *[("%20n/%n", "john/john"), ("%1.2n/%n", "oh/john"), ("%3.5n/%n", "n/john")],
            *[("%1.0n/%n", "ohn/john"), ("%9.2n/%n", "john"), ("%2d/%1.1d/%n", "x././john")],
        ]
    ),
    *((text, "u=john", BAD_PATH) for text in ("%x/%n", "%n%", "%N", "%{user}/%n", "%1.2.3n/%n")),
    *((text, "u=john", BAD_PATH) for text in ("%1n", "%1.1n/%d", "%d", "%%n", "quota.service")),
    *((text, "u=john", NO_FOLDER) for text in ("none/%n", "none/%d/%n", "100%%-none/%n")),
    *((text, "u=john", "ERROR no domain (d=) given") for text in ("%d/%n", "%u", "%1d/%n")),
    ("%u", f"u={'x' * 255}&d={'y' * 255}", "ERROR cannot read the mailbox: File name too long"),
    # Parts of names lead nowhere else.
    *((path, "u=a..b", NO_USER) for path in ("mail/%1.2n/%n", "mail/%1.1n%2.1n/%n")),
]


@pytest.mark.parametrize(("template", "query", "expected"), TEMPLATES)
def test_placeholders_make_the_path(template, query, expected, tmp_path):
    (tmp_path / "100%").mkdir()
    (tmp_path / "mail").mkdir()
    (tmp_path / "a..b").touch()
    is_error = expected.startswith("ERROR")
    if not is_error:
        (tmp_path / expected).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / expected).write_bytes(b"x" * 200)
    got = ask(MBOX_CGI, query, QUOTA_LIMIT="9", QUOTA_MAILBOX=tmp_path / template)
    assert got.line.startswith(expected if is_error else "OVERQUOTA john 200 9")
    assert str(tmp_path) not in got.line


def test_the_home_of_a_system_user_is_known(tmp_path, monkeypatch):
    (tmp_path / "box").write_bytes(b"x" * 10)
    settings = {"QUOTA_LIMIT": "9", "QUOTA_MAILBOX": "%h/box"}
    assert ask(MBOX_CGI, "u=nosuchuser", **settings).line == "UNKNOWN nosuchuser 0 9"
    monkeypatch.setattr(pwd, "getpwnam", lambda _: types.SimpleNamespace(pw_dir=str(tmp_path)))
    assert ask(MBOX_CGI, **settings).line == "OVERQUOTA john 10 9"
    (tmp_path / "box").unlink()
    assert ask(MBOX_CGI, **settings).line == "OK john 0 9", "a home without a mailbox"
    assert ask(MAILDIR_CGI, QUOTA_LIMIT=9).line == "OK john 0 9"
    for look_up in "getpwnam", "getpwuid":  # not even root is found: the look-up fails
        monkeypatch.setattr(pwd, look_up, {}.__getitem__)
    assert ask(MBOX_CGI, **settings).status == 500, "no UNKNOWN"


USERS = b"""# user limit

john 50
mary\t1K # a boss
#paul 1
mary@x.org 10
@x.org 20
a b 0
mary 1
hash#tag 8
a:b 9
Fred 5
UPPER@Y.org 6
"""
BAD_LINES = b"bad lots", b"bad 5 M", b"bad: 5M", b"bad : 5M", b"bad\r", b"bad # 5", b"bad 5\0"
OF_USERS = [
    # (query, line, or the last line of the file, which is an error)
    *[("u=john", "OVERQUOTA john 100 50"), ("u=john&d=x.org", "OVERQUOTA john 100 50")],
    *[("u=mary", "OK mary 101 1024"), ("u=mary&d=x.org", "OVERQUOTA mary 101 10")],
    *[("u=paul", "OK paul 0 100"), ("u=paul&d=x.org", "OK paul 0 20")],
    *[("u=mary&d=y.org", "OK mary 101 1024"), ("u=x.org", "OK x.org 0 100")],
    *[("u=a+b", "OVERQUOTA a b 101 100"), ("u=john+50", "OK john 50 0 100")],  # no spaces in names
    *[("u=hash%23tag", "OK hash#tag 0 8"), ("u=%23paul", "OK #paul 0 100")],
    *[("u=a:b", "OK a:b 0 9"), ("u=joh", "OK joh 0 100"), ("u=J%D6HN", "OK J\udcd6HN 0 100")],
    *[("u=JOHN", "OK JOHN 0 50"), ("u=fred", "OK fred 0 5"), ("u=upper&d=y.org", "OK upper 0 6")],
    *(("u=bad", line) for line in BAD_LINES),
    ("u=bad&d=z.org", b"bad@z.org x"),
]


@pytest.mark.parametrize(("query", "expected"), OF_USERS)
def test_limits_of_users_beat_all_others_and_only_the_line_that_counts_is_looked_at(
    query, expected, spool, tmp_path
):
    bad = expected if isinstance(expected, bytes) else BAD_LINES[0]
    (tmp_path / "users").write_bytes(USERS + bad + b"\n")
    settings = {"QUOTA_LIMIT": "100", "QUOTA_MAILBOX": spool / "%n"}
    got = ask(MBOX_CGI, query, **settings, QUOTA_USERS=tmp_path / "users")
    if bad == expected:
        assert got.status == 500 and "QUOTA_USERS: the limit in line 14 " in got.line
    else:
        assert got.line == expected


BAD_USERS = [
    # (what the file is, the line)
    *((half, "QUOTA_USERS does not end in a newline") for half in (b"a 5\njohn 5", b"", "pipe")),
    *((path, "the file QUOTA_USERS cannot be read") for path in (".", "none")),
]


@pytest.mark.parametrize(("what", "line"), BAD_USERS)
def test_users_that_cannot_be_read_whole_are_an_error(what, line, tmp_path, capfd):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / (what if isinstance(what, str) else "users")
    if isinstance(what, bytes):
        path.write_bytes(what)
    got = ask(MBOX_CGI, QUOTA_USERS=path, QUOTA_MAILBOX=tmp_path / "%n")
    assert got.status == 500 and got.line.startswith(f"ERROR {line}")
    assert str(tmp_path) not in got.line and "QUOTA_USERS" in capfd.readouterr().err


@pytest.mark.parametrize("changed", [1, 784111777, 4733510400, 0, -5])
def test_the_last_change_is_a_header_field(changed, tmp_path):
    (tmp_path / "john").touch()
    os.utime(tmp_path / "john", (5, changed))
    got = ask(MBOX_CGI, QUOTA_MAILBOX=tmp_path / "%n")
    field = email.utils.formatdate(changed, usegmt=True) if changed > 0 else None
    assert got.header.get("Last-Modified") == field
    assert "Last-Modified" not in ask(MBOX_CGI, "u=no", QUOTA_MAILBOX=tmp_path / "%n").header


BAD_ALLOWS = [
    *["localhost", "192.0.2.7 192.0.2.0/33", "192.0.2.0/", "192.0.2.0/-1", "10/8", "j\u00f6rg"],
    *["192.0.2.0/255.255.255.0", "2001:db8::/129", "::ffff:192.0.2.0/24", "::ffff:192.0.2.0/95"],
]
ALLOW = [
    # (QUOTA_ALLOW, who gets an answer, who gets a 403; for a bad setting all get a 500)
    *[("", "192.0.2.1", ""), (" , ", "", "192.0.2.1")],
    ("192.0.2.1", "192.0.2.1 ::ffff:192.0.2.1", "192.0.2.10 unix: localhost 2001:db8::1"),
    ("192.0.2.0/24", "192.0.2.255 ::ffff:192.0.2.23 ::FFFF:c000:217", "192.0.3.0"),
    ("192.0.2.7/24", "192.0.2.1", "192.0.3.7"),
    ("192.0.2.128/25", "192.0.2.128", "192.0.2.127"),
    *[("0.0.0.0/0", "203.0.113.9", "2001:db8::1"), ("::/0", "2001:db8::1", "192.0.2.1")],
    ("2001:DB8:0::/32", "2001:db8:1::1 [2001:db8::1]", "2001:db9::1"),
    ("198.51.100.1 , 2001:db8::1,192.0.2.1", "192.0.2.1 2001:db8::1", "198.51.100.2"),
    ("::ffff:192.0.2.0/120", "192.0.2.9 [::ffff:192.0.2.1]", "192.0.3.9"),
    ("fe80::/10", "fe80::1%eth0", "fec0::1%eth0"),
    *((bad, None, "192.0.2.1") for bad in BAD_ALLOWS),
]


@pytest.mark.parametrize(("allow", "friends", "strangers"), ALLOW)
def test_only_who_is_allowed_gets_an_answer(allow, friends, strangers, spool):
    refusal = 500 if friends is None else 403
    peers = [(peer, 200) for peer in (friends or "").split()]
    peers += [(peer, refusal) for peer in strangers.split()] + [("", refusal)] * bool(strangers)
    settings = {"QUOTA_MAILBOX": f"{spool}/%n", "QUOTA_ALLOW": allow}
    for peer, status in peers:
        got = ask(MBOX_CGI, "u=nobody", REMOTE_ADDR=peer, **settings)
        assert got.status == status and ("nobody" in got.line) == (status == 200)
        got = ask(MBOX_CGI, "", REQUEST_METHOD="POST", REMOTE_ADDR=peer, **settings)
        assert got.status in (status, 405), "a stranger learns nothing else"
        assert ask_wsgi(REMOTE_ADDR=peer, **settings)[:3] == str(status)
        assert peer or ask_wsgi(**settings)[:3] == str(status), "an address may be missing"


def ask_wsgi(**environ: str) -> str:
    """Ask about nobody's mbox as a WSGI server does; return the status and the body."""
    statuses: list[str] = []
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": "u=nobody", **environ}
    raw = {name: value.encode().decode("latin-1") for name, value in environ.items()}
    body = CGIS[MBOX_CGI].application(raw, lambda status, header: statuses.append(status))
    return f"{statuses[0]} {b''.join(body).decode()}"


BAD_LIMITS = [*"M 1.5G -1 +1 200MB 1P ten 1_000 \u0665".split(), "1 M", "9" * 5000, ""]
BAD_GRACES = ["", "%", "-5%", "1.5%", "10 %%", "ten", "-1"]
LIMITS = [
    *[("0", 0), ("100", 100), ("1K", 1024), ("3k", 3072), ("200M", 200 << 20), ("2G", 2 << 30)],
    *[("1T", 1 << 40), (" 5K ", 5120)],
]
GRACES = [
    *[("auto", 1000, "0"), ("0", 1000, "0"), ("0%", 1000, "0"), ("10%", 0, "0")],
    *[("10%", 1000, "100"), ("1000%", 1000, "10000"), ("5", 1000, "5"), ("2k", 0, "2048")],
]
SETTINGS = [
    # (settings, user, beginning of the line, Quota-Grace)
    *((f"QUOTA_LIMIT={text}", "john", f"OK john 100 {n}\n", "0") for text, n in LIMITS),
    ("QUOTA_LIMIT=99", "john", "OVERQUOTA john 100 99\n", "0"),
    *((f"QUOTA_LIMIT={bad}", "john", "ERROR QUOTA_LIMIT ", "") for bad in BAD_LIMITS),
    *(
        (f"QUOTA_LIMIT={limit} QUOTA_GRACE={grace}", "john", "OK ", field)
        for grace, limit, field in GRACES
    ),
    *((f"QUOTA_GRACE={bad}", "john", "ERROR QUOTA_GRACE", "") for bad in BAD_GRACES),
    ("QUOTA_UNKNOWN=1", "nobody", "UNKNOWN nobody 0 ", "0"),
    *((f"QUOTA_UNKNOWN={off}", "nobody", "OK nobody 0 ", "0") for off in ("0", "off")),
    ("QUOTA_UNKNOWN=1", "john", "OK john 100 ", "0"),
    ("QUOTA_UNKNOWN=yes", "john", "ERROR QUOTA_UNKNOWN is not one of ", ""),
    *((f"QUOTA_MAILBOX={path}", "john", BAD_PATH, "") for path in ("mail/%n", "%n", "")),
]


@pytest.mark.parametrize(("settings", "user", "line", "grace"), SETTINGS)
def test_a_setting_does_what_it_says_or_is_an_error(settings, user, line, grace, spool):
    named = dict(re.findall(r"(QUOTA_\w+)=(.*?)(?= QUOTA_|$)", settings, re.DOTALL))
    got = ask(MBOX_CGI, f"u={user}", **{"QUOTA_MAILBOX": spool / "%n", **named})
    assert f"{got.line}\n".startswith(line) and (got.status == 500) == line.startswith("ERROR")
    assert got.header.get("Quota-Grace", "") == grace


def refuse_to(monkeypatch, name: str, path: object, error: int) -> None:
    """Let a function of `os` fail for a path, as for a user without the right to it."""
    function = getattr(os, name)

    def fail(given: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(given, (str, bytes)) and os.fsdecode(given) == str(path):
            raise OSError(error, os.strerror(error), given)
        return function(given, *rest, **options)

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
def test_a_mailbox_that_cannot_be_read_is_an_error_and_no_verdict(error, spool, monkeypatch, capfd):
    refuse_to(monkeypatch, "stat", spool / "mary", error)
    got = ask(MBOX_CGI, "u=mary", QUOTA_LIMIT="100", QUOTA_MAILBOX=spool / "%n")
    assert got[:2] == (500, f"ERROR cannot read the mailbox: {os.strerror(error)}")
    assert f"{spool}/mary" in capfd.readouterr().err


# ---- the CGIs: each way to run them ----


def run_script(script: pathlib.Path, *arguments: str, **env: object) -> tuple[int, str, str]:
    """Run a script with these arguments and this environment alone."""
    return run(script, *arguments, env={name: str(value) for name, value in env.items()})


@pytest.fixture
def boxes(tmp_path):
    """Give settings for both scripts, by which mary is over and john is not."""
    for name, size in ("john", 100), ("mary", 101):
        (tmp_path / name).write_bytes(b"x" * size)
        make_maildir(tmp_path / "maildirs" / name, {"new/1": size})
    paths = {"QUOTA_MAILBOX": tmp_path / "%n", "QUOTA_MAILDIR": tmp_path / "maildirs/%n"}
    return {"QUOTA_LIMIT": "101", "PATH": os.defpath, **paths}


JOHN = "OK john 100 101\n"
MARY = {MBOX_CGI: "OK mary 101 101\n", MAILDIR_CGI: "OVERQUOTA mary 101 101\n"}


@pytest.mark.parametrize("script", CGIS)
def test_as_a_cgi_a_script_answers_the_query_and_ignores_its_command_line(script, boxes):
    cgi = {**boxes, "GATEWAY_INTERFACE": "CGI/1.1", "QUERY_STRING": "u=mary"}
    for arguments in (), ("--serve",), ("john",), ("--help",), ("--serve", "0.0.0.0:1"):
        status, output, errors = run_script(script, *arguments, **cgi, REQUEST_METHOD="GET")
        header, _, body = output.partition("\n\n")
        assert (status, body, errors) == (0, MARY[script], "")
        assert header.startswith("Status: 200 OK\n") and "Content-Type: text/plain" in header
    status, output, errors = run_script(script, **{**cgi, "QUERY_STRING": "u=.."})
    assert output.startswith("Status: 400 ") and output.endswith(f"\n\n{NO_USER}\n")


@pytest.mark.parametrize("script", CGIS)
def test_in_a_shell_a_script_prints_the_same_line(script, boxes):
    for mailbox, line in ("mary", MARY[script]), ("john@example.com", JOHN):
        assert run_script(script, mailbox, **boxes) == (0, line, "")
    assert run_script(script, "a@b@example.com", **boxes) == (0, "OK a@b 0 101\n", "")
    assert run_script(script, "../secret", **boxes) == (1, "", f"{NO_USER}\n")
    assert run_script(script)[0] == run_script(script, "--nonsense")[0] == 2
    status, text, errors = run_script(script, "--help")
    assert (status, errors) == (0, "") and text.startswith(f"{script.name} - ")


BAD_SERVES = [
    # (what follows --serve, QUOTA_ALLOW, status, whether the line names QUOTA_ALLOW)
    ("nonsense", "", 2, False),
    ("127.0.0.1:99999", "", 2, False),
    ("127.0.0.1:-1", "", 2, False),
    ("0.0.0.0:80", "", 2, True),  # it would answer everybody
    ("192.0.2.1:80", "192.0.2.7", 1, False),  # this machine has no such address, yet
    ("127.0.0.1:8080", "nonsense", 2, True),
    ("127.0.0.1:8080", "127.0.0.1 192.0.2.0/33", 2, True),
    ("127.0.0.1:8080", "192.0.2.0/2_4", 2, True),
]


@pytest.mark.parametrize(("where", "allow", "status", "is_named"), BAD_SERVES)
def test_serve_ends_with_one_line_where_it_cannot_serve(where, allow, status, is_named):
    got, output, errors = run_script(MBOX_CGI, "--serve", where, QUOTA_ALLOW=allow)
    assert (got, output, errors.count("\n")) == (status, "", 1)
    assert "Traceback" not in errors and ("QUOTA_ALLOW" in errors) == is_named


def talk(port: int, request: bytes, source: str = "127.0.0.1") -> tuple[int, str]:
    """Send raw bytes and read to the end: the status and the body."""
    with socket.create_connection(("127.0.0.1", port), 60, (source, 0)) as connection:
        if request:
            connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1."):
        return 0, os.fsdecode(answer)
    return int(head.split()[1]), os.fsdecode(body)


def get(port: int, query: str) -> tuple[int, str]:
    return talk(port, f"GET /?{query} HTTP/1.0\r\n\r\n".encode())


NOT_ALLOWED = "ERROR only GET and HEAD are answered\n"
REQUESTS = [
    # (what is sent over one connection, status, body, None: no matter)
    (b"GET /?u=john HTTP/1.0\r\n\r\n", 200, JOHN),
    (b"GET /cgi-bin/any/thing?u=john&d=x.org HTTP/1.1\r\nHost: x\r\n\r\n", 200, JOHN),
    (b"GET /?u=john HTTP/1.1\r\nConnection: keep-alive\r\n\r\n", 200, JOHN),
    (b"GET /?u=john HTTP/1.0\n\n", 200, JOHN),
    (b"GET http://x.org/y?u=john HTTP/1.0\n\n", 200, JOHN),
    (b"GET /?u=john HTTP/1.1\n\nGET /?u=mary HTTP/1.1\n\n", 200, JOHN),
    (b"GET /?u=john HTTP/1.1\nContent-Length: 24\n\nGET /?u=mary HTTP/1.1\n\n", 200, JOHN),
    (b"HEAD /?u=john HTTP/1.0\r\n\r\n", 200, ""),
    (b"POST /?u=john HTTP/1.1\nContent-Length: 2\n\nu=", 405, NOT_ALLOWED),
    (b"BREW /?u=john HTTP/1.0\n\n", 501, None),
    (b"get /?u=john HTTP/1.0\n\n", 501, None),
    (b"GET /?u=..%2Fsecret HTTP/1.0\n\n", 400, f"{NO_USER}\n"),
    (b"GET / HTTP/1.0\n\n", 400, "ERROR no user (u=) given\n"),
    # Raw UTF-8, in which some bytes are spaces to Latin-1.
    (b"GET /?u=j\xc3\xa0\xa0 HTTP/1.0\n\n", 200, "OK j\u00e0\udca0 0 101\n"),
    (b"GET /?u=john\xc2\x85mary HTTP/1.0\n\n", 400, f"{NO_USER}\n"),
    (b"GET /?u=j\x1d HTTP/1.0\n\n", 400, f"{NO_USER}\n"),
    (b"GET /?u=a b&d=x.org HTTP/1.0\n\n", 200, "OK a b 0 101\n"),
    (b"GET /?u=john\n\n", 400, "ERROR no user (u=) given\n"),
    (b"GET /?u=" + b"x" * 70_000 + b" HTTP/1.0\r\n\r\n", 400, None),
    (b"\x16\x03\x01\x00\xff garbage\r\n\r\n", 501, None),
    (b"GET /?u=john HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n", 200, JOHN),
]


@pytest.mark.parametrize("script", CGIS)
def test_serve_answers_one_request_of_a_connection_whatever_the_client_speaks(script, site, boxes):
    port = site.serve(script, **boxes)
    assert get(port, "u=mary") == (200, MARY[script])
    for request, status, body in REQUESTS:
        got = talk(port, request)
        assert got[0] == status and body in (None, got[1]), request
        assert status == 200 or got[1].startswith("ERROR "), request
    with socket.create_connection(("127.0.0.1", port), 60):  # it asks nothing
        assert site.processes[0].stop() == 0


def test_serve_turns_a_stranger_away_before_it_has_asked(site, boxes):
    port = site.serve(MBOX_CGI, "0.0.0.0:", **boxes, QUOTA_ALLOW="127.0.0.2")
    assert talk(port, b"")[0] == 403
    assert talk(port, b"GET /?u=john HTTP/1.0\r\n\r\n")[0] == 403
    assert talk(port, b"GET /?u=john HTTP/1.0\r\n\r\n", "127.0.0.2") == (200, JOHN)
    threads = site.processes[0].figure("Threads")
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
        assert talk(port, b"GET /?u=john HTTP/1.0\r\n\r\n", "127.0.0.2") == (200, JOHN)
        assert site.processes[0].figure("Threads") <= threads + 1


class Listener(socket.socket):
    """A socket whose shutdown ends the threads that wait for its connections."""

    def accept(self) -> tuple[socket.socket, Any]:
        try:
            return super().accept()
        except OSError:
            raise SystemExit from None


class Serving:
    """A CGI whose server runs in this process, so that its disk and its clock can be changed."""

    def __init__(self, monkeypatch, folder: pathlib.Path) -> None:
        self.module = load(MBOX_CGI)
        self.released = threading.Event()
        self.measured: list[str] = []
        self.ahead = 0.0  # seconds of the clock
        self.slow: dict[str, float] = {}  # how long the disk takes for a user, or for ever
        self.module.QUOTA_MAILBOX, self.module.QUOTA_LIMIT = f"{folder}/%n", "101"
        look = os.stat

        def look_slowly(path: Any, *rest: Any, **options: Any) -> Any:
            name = os.fsdecode(path).rpartition("/")[2] if isinstance(path, (str, bytes)) else ""
            if name in ("john", "mary"):
                self.measured.append(name)
                self.released.wait(self.slow.get(name, 0))
            return look(path, *rest, **options)

        monkeypatch.setattr(os, "stat", look_slowly)
        clock = types.SimpleNamespace(**vars(time))
        clock.monotonic = lambda: time.monotonic() + self.ahead
        self.module.time = clock
        self.listener = Listener()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(1024)
        self.port = self.listener.getsockname()[1]
        self.server = server = self.module.Server({})
        self.threads = [
            threading.Thread(target=self.answer_until_closed, args=[server])
            for _ in range(self.module.THREADS)
        ]
        for thread in self.threads:
            thread.start()

    def answer_until_closed(self, server: Any) -> None:
        with contextlib.suppress(SystemExit):
            server.run(self.listener)

    def close(self) -> None:
        self.released.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        self.listener.close()


@pytest.fixture
def serving(monkeypatch, tmp_path, boxes):
    made = Serving(monkeypatch, tmp_path)
    yield made
    made.close()


def test_a_mailbox_whose_disk_hangs_holds_one_thread_of_serve(serving):
    serving.slow["john"] = 60
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(get, serving.port, "u=john")
        wait_for(lambda: serving.measured, "the first question")
        serving.ahead += 60  # whoever comes now waits no more
        for _ in range(3):
            status, line = get(serving.port, "u=john")
            assert status == 500 and line.startswith("ERROR the mailbox hangs")
        assert get(serving.port, "u=mary")[0] == 200
        assert serving.measured == ["john", "mary"]
        serving.released.set()
        assert first.result(60) == (200, JOHN) == get(serving.port, "u=john")


def test_a_client_that_leaves_keeps_no_thread_of_serve_from_the_next_one(serving, monkeypatch):
    """Strangers reset thousands of connections in a second."""
    rests: list[float] = []
    serving.module.time.sleep = rests.append

    def leave(connection: socket.socket) -> bytes:
        raise ConnectionResetError

    monkeypatch.setattr(serving.module, "receive", leave)
    with socket.create_connection(("127.0.0.1", serving.port), 60) as client:
        assert client.recv(1) == b"" and rests == []


def test_a_stranger_sees_the_403_though_his_request_comes_late(serving):
    serving.server.allow, serving.module.STRANGER_SECONDS = b"127.0.0.2", 60
    with socket.create_connection(("127.0.0.1", serving.port), 60) as client:
        assert not select.select([client], [], [], 0.1)[0]
        client.sendall(b"GET /?u=john HTTP/1.0\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.0 403 ")


def test_an_answer_that_took_long_is_kept_for_a_minute(serving):
    serving.slow["john"] = 1.1
    for seconds, measured in (0, 1), (0, 1), (50, 1), (11, 2), (0, 2):
        serving.ahead += seconds
        assert get(serving.port, "u=john") == (200, JOHN)
        assert len(serving.measured) == measured, seconds
    for _ in range(2):
        assert get(serving.port, "u=mary")[0] == 200
    assert serving.measured.count("mary") == 2, "a quick one is not kept"


def test_dripping_requests_end_after_ten_seconds_and_hold_up_nobody(serving, monkeypatch):
    assert serving.module.REQUEST_SECONDS == 10
    monkeypatch.setattr(serving.module, "REQUEST_SECONDS", 1)
    with contextlib.ExitStack() as stack:
        begin = time.monotonic()
        where = "127.0.0.1", serving.port
        connections = [stack.enter_context(socket.create_connection(where)) for _ in range(100)]
        left = set(connections)
        while left:
            assert time.monotonic() - begin < 1 + SLACK, "the seconds are for the whole request"
            assert get(serving.port, "u=john") == (200, JOHN)
            for connection in select.select(left, [], [], 0.2)[0]:
                assert time.monotonic() - begin > 0.9, "hung up on too early"
                left.remove(connection)
            for connection in left.intersection(connections[::2]):
                with contextlib.suppress(OSError):  # hung up on meanwhile
                    connection.send(b"G")


def test_serve_without_descriptors_left_gives_errors_and_no_verdict(site, boxes):
    (site.folder / "users").write_text("john 50\n")
    port = site.serve(MBOX_CGI, **boxes, QUOTA_USERS=site.folder / "users")
    with site.processes[0].few_descriptors(1):  # for the connection, not for a file
        assert get(port, "u=john")[0] == 500
    assert get(port, "u=john") == (200, "OVERQUOTA john 100 50\n")


def test_serve_leaves_no_file_open_where_a_folder_stands_in_place_of_a_file(site, boxes):
    port = site.serve(MBOX_CGI, **boxes, QUOTA_USERS=site.folder)
    descriptors = pathlib.Path(f"/proc/{site.processes[0].popen.pid}/fd")
    assert get(port, "u=john")[0] == 500
    before = len(list(descriptors.iterdir()))
    assert {get(port, "u=john")[0] for _ in range(20)} == {500}
    assert len(list(descriptors.iterdir())) < before + 10


def test_the_log_cannot_fail_an_answer(boxes):
    environment = {**boxes, "GATEWAY_INTERFACE": "1", "QUERY_STRING": "u=folder"}
    pathlib.Path(boxes["QUOTA_MAILBOX"]).with_name("folder").mkdir()
    command = f"exec {shlex.quote(str(MBOX_CGI))}"
    for errors in "2>&-", "2>/dev/full":
        env = {name: str(value) for name, value in environment.items()}
        status, output, _ = run("sh", "-c", f"{command} {errors}", env=env)
        assert (status, output.partition("\n\n")[2]) == (0, "ERROR the mailbox is not a file\n")


# ---- Maildirs: a row for each sentence of the rule ----

UIDLIST = b"3 V1700000000 N1 G0123456789abcdef0123456789abcdef\n"  # what Dovecot leaves in an INBOX


def make_maildir(
    path: pathlib.Path, files: dict[str, Any], maildirsize: bytes | None = None, age: float = 0
) -> pathlib.Path:
    """Make a Maildir: files by their path and size, `maildirsize` and its age in seconds.

    A size that is a string is where a symbolic link leads to; bytes are what the file holds. A
    path that ends in `/` is a folder.
    """
    for part in "cur", "new", "tmp":
        (path / part).mkdir(parents=True)
    for name, size in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(size, str):
            target.symlink_to(size)
        elif name.endswith("/"):
            target.mkdir()
        else:
            target.write_bytes(size if isinstance(size, bytes) else b"")
            os.truncate(target, len(size) if isinstance(size, bytes) else size)
    if maildirsize is not None:
        (path / "maildirsize").write_bytes(maildirsize)
        os.utime(path / "maildirsize", (time.time() - age,) * 2)
    return path


def state_of(path: pathlib.Path) -> dict[pathlib.Path, tuple[int, int, int]]:
    """Return what may not change in a tree: names, modes, sizes and times."""
    found = {file: file.lstat() for file in (path, *path.rglob("*"))}
    return {file: (at.st_mode, at.st_size, at.st_mtime_ns) for file, at in found.items()}


def ask_maildir(path: pathlib.Path, **settings: object) -> Response:
    """Ask about john, whose Maildir this is, and see that nothing in it was changed."""
    link = path.with_name("john")  # a path must name the user
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    before = state_of(path)
    response = ask(MAILDIR_CGI, "u=john", QUOTA_MAILDIR=path.with_name("%n"), **settings)
    assert state_of(path) == before
    return response


FULL_CUR = {"cur/1": 2000}
DOVECOT = {"dovecot-uidlist": UIDLIST}
VIRTUAL = {"cur/1,S=2000,W=2100:2,S": 2000, **DOVECOT}
DOUBT = b"1000S\n1001 1\n1 1\n"  # over and of two lines: every server counts
LONGEST = b"1000S\n" + b"0 0\n" * 1278  # 5118 bytes
TRASH = {"cur/1:2,T": 9, ".Trash/cur/1": 9, "cur/.x": 9}
LINKED = {"a/cur/1": 9, ".a": "a"}
BY_COUNT = {"QUOTA_KEEPER": "dovecot-count", "QUOTA_LIMIT": "1000"}
QUOTA_5 = {"QUOTA_LIMIT": "5"}
UNREADABLE = "ERROR cannot read the mailbox: "
BROKEN: list[tuple[str, bytes | None, dict[str, Any], str]] = [
    ("a folder", None, {"maildirsize/": 0}, "OVERQUOTA 2000 1500"),
    ("a link", None, {"maildirsize": "x", "x": b"9S\n1 1\n"}, "OK 1 9"),
    ("a link to nowhere", None, {"maildirsize": "nowhere"}, "OVERQUOTA 2000 1500"),
    ("a link to itself", None, {"maildirsize": "maildirsize"}, UNREADABLE),
    ("a device", None, {"maildirsize": "/dev/zero"}, "OVERQUOTA 2000 1500"),
    ("binary", bytes(range(1, 256)) * 10, {}, "OK 2000 0"),
    ("a limit of 10^30", b"%dS\n1 1\n" % 10**30, {}, "OK 1 0"),
    ("a size of 10^4500", b"9S\n" + b"9" * 4500 + b" 1\n", {}, "OVERQUOTA 2000 9"),
    ("cur is a file", None, {".a/cur": 0}, UNREADABLE),
    ("a message is a loop", None, {"cur/loop": "loop"}, UNREADABLE),
    ("folders in a circle", None, {**DOVECOT, ".b": ".c", ".c": ".b"}, UNREADABLE),
    ("folders that loop", None, {".b": ".", ".c": "..", ".f": ".f"}, "OVERQUOTA 2000 1500"),
]
MAILDIR_RULE: list[Any] = [
    # (sentence, maildirsize, files, status, used and quota of the answer[, settings, `age`])
    ("under the limit of bytes", b"1000S\n999 1\n", {}, "OK 999 1000"),
    ("the limit of bytes reached", b"1000S\n1000 1\n", {}, "OVERQUOTA 1000 1000"),
    ("messages only, true bytes", b"9S,2C\n8 2\n", {}, "OVERQUOTA 8 9"),
    ("items in any order", b"3C,9S\n9 2\n", {}, "OVERQUOTA 9 9"),
    ("0 is no limit", b"0S,0C\n9 9\n", {}, "OK 9 0"),
    ("no digits, no limit", b"NOQUOTA\n9 9\n", {}, "OK 9 0"),
    ("an empty file is none", b"", FULL_CUR, "OVERQUOTA 2000 9", {"QUOTA_LIMIT": "9"}),
    ("an unfinished line that is none", b"8S\n3 1\nx", FULL_CUR, "OK 3 8"),
    ("lines add up", b"999S\n1 1\n  -2   -1\n\t9 1\n-7 -1\n", FULL_CUR, "OK 1 999"),
    ("more on a line is left out", b"9S\n9 2 7 x\n", {}, "OVERQUOTA 9 9"),
    ("under is trusted when old", b"1000S\n9 1\n", FULL_CUR, "OK 9 1000", {"age": 10**7}),
    ("no lines are a sum of 0", b"1000S\n", FULL_CUR, "OK 0 1000"),
    ("a line that is none: counted", b"9S\nx\n", FULL_CUR, "OVERQUOTA 2000 9"),
    ("not decimal: counted", b"9S\n1_0 1\n", FULL_CUR, "OVERQUOTA 2000 9"),
    ("a sum of bytes below 0: counted", b"9S\n-1 1\n", FULL_CUR, "OVERQUOTA 2000 9"),
    ("a sum of messages below 0: counted", b"9S\n1 -1\n", FULL_CUR, "OVERQUOTA 2000 9"),
    ("5119 bytes are trusted", LONGEST[:-1] + b" \n", FULL_CUR, "OK 0 1000"),
    ("5120 bytes are not", LONGEST[:-1] + b"  \n", FULL_CUR, "OVERQUOTA 2000 1000"),
    ("over in two lines: counted", DOUBT, {}, "OK 0 1000"),
    ("over and old: counted", b"1000S\n1001 1\n", {}, "OK 0 1000", {"age": 910}),
    ("over and new: trusted", b"9S\n10 1\n", {}, "OVERQUOTA 10 9", {"age": 850}),
    ("just full and old: Courier counts", b"9S\n9 1\n", {}, "OK 0 9", {"age": 910}),
    ("Dovecot does not", b"9S\n9 1\n", DOVECOT, "OVERQUOTA 9 9", {"age": 910}),
    ("cur and new count, tmp not", DOUBT, {"cur/1": 9, "new/2": 8, "tmp/1": 9}, "OK 17 1000"),
    ("folders count", DOUBT, {".a/cur/1": 9, ".a.b.c/new/1": 8}, "OK 17 1000"),
    ("deep ones, or without a dot, not", DOUBT, {".a/.b/cur/1": 9, "a/cur/1": 9}, "OK 0 1000"),
    ("linked ones not in Courier", DOUBT, LINKED, "OK 0 1000"),
    ("linked ones in Dovecot", DOUBT, {**LINKED, **DOVECOT}, "OK 9 1000"),
    ("not folders", DOUBT, {".file": 9000, "cur/.a/1": 9}, "OK 0 1000"),
    ("S= and a comma", DOUBT, {"cur/1,S=7,W=9:2,S": 9000}, "OK 7 1000"),
    ("S= and a colon", DOUBT, {"cur/1,W=9,S=7:2,S": 9000}, "OK 7 1000"),
    ("S= and the end", DOUBT, {"new/1,S=0007": 9000}, "OK 7 1000"),
    ("S= without digits is 0", DOUBT, {"cur/1,S=:2,": 9000}, "OK 0 1000"),
    ("S= and others: the file", DOUBT, {"cur/1,S=7x": 9, "new/1,S=x": 8}, "OK 17 1000"),
    ("no S=: the file", DOUBT, {"cur/1,s=7,W=5:2,": 9}, "OK 9 1000"),
    ("hidden names", DOUBT, {"cur/.nfs": 9000, "new/..x": 8}, "OK 0 1000"),
    ("hidden names in Dovecot", DOUBT, {"cur/.n": 9, "cur/..x": 9, **DOVECOT}, "OK 9 1000"),
    ("what vanishes", DOUBT, {"cur/1": "nowhere", "cur/2": 9}, "OK 9 1000"),
    ("Trash", DOUBT, {".Trash/cur/1": 9, ".Trash.a/cur/1": 8}, "OK 8 1000"),
    ("flag T", DOUBT, {"cur/1:2,ST": 9, "new/1,S=8:2,T": 8}, "OK 0 1000"),
    ("other flags", DOUBT, {"cur/T:2,DFPRSt": 9, "cur/T": 8}, "OK 17 1000"),
    ("Dovecot's Trash and flag T", DOUBT, {**TRASH, **DOVECOT}, "OK 27 1000"),
    ("its Trash skipped", DOUBT, {**TRASH, **DOVECOT}, "OK 18 1000", {"QUOTA_TRASH": "skip"}),
    ("Courier's trash counted", DOUBT, TRASH, "OK 18 1000", {"QUOTA_TRASH": "count"}),
    ("a server that is named", DOUBT, TRASH, "OK 27 1000", {"QUOTA_KEEPER": "dovecot"}),
    ("maildirsize beats QUOTA_LIMIT", b"9S\n8 1\n", {}, "OK 8 9", {"QUOTA_LIMIT": "5"}),
    ("so does its none", b"0S\n8 1\n", {}, "OK 8 0", {"QUOTA_LIMIT": "5"}),
    ("a user's own beats it", b"9S\n8 1\n", {}, "OVERQUOTA 8 7", {"QUOTA_USERS": "7"}),
    ("and its messages", b"7S,1C\n6 1\n", {}, "OK 6 7", {"QUOTA_USERS": "7"}),
    ("a user without limit", b"9S\n9 1\n", {}, "OK 9 0", {"QUOTA_USERS": "0"}),
    ("the last 0 counts", b"9S,0S\n9 1\n", {}, "OK 9 0"),
    ("not for Dovecot", b"9S,0S\n9 1\n", DOVECOT, "OVERQUOTA 9 9"),
    ("a last line without an end", b"9S\n9 1", {}, "OVERQUOTA 9 9"),
    ("is not there yet for Dovecot", b"9S\n9 1", DOVECOT, "OK 0 9"),
    ("half a first line is none to Dovecot", b"1000S", {**FULL_CUR, **DOVECOT}, "OK 2000 0"),
    # A NUL byte, as a crash leaves.
    ("NUL in the first line: no file", b"\0" * 50, FULL_CUR, "OVERQUOTA 2000 5", QUOTA_5),
    ("NUL in a later line: counted", b"9S\n1 1\n\0\n1 1\n", FULL_CUR, "OVERQUOTA 2000 9"),
    # No limit is invented.
    ("no limit anywhere", None, FULL_CUR, "OK 2000 0"),
    ("nor by the maildir driver", None, FULL_CUR, "OK 2000 0", {"QUOTA_KEEPER": "dovecot"}),
    ("0 is none by count", None, FULL_CUR, "OK 2000 0", {**BY_COUNT, "QUOTA_LIMIT": "0"}),
    ("its trash may be skipped", None, TRASH, "OK 9 1000", {**BY_COUNT, "QUOTA_TRASH": "skip"}),
    # Dovecot's count driver: virtual sizes. No message is opened.
    *(
        (f"virtual: {sentence}", None, files, f"OK {size} 1000", BY_COUNT)
        for sentence, files, size in [
            ("W= beats S= and the file", {"cur/1,S=312,W=414:2,S": 1, "new/2,W=7": 312}, 421),
            ("no W=: the file", {"new/1,S=7": 312, "cur/2:2,": 9}, 321),
            ("W= without digits is 0", {"cur/1,W=:2,": 312, "new/1,W=,S=312": 312}, 0),
            ("but not at the end", {"new/1,W=": 312}, 312),
            ("of two W= the first", {"cur/1,W=5,W=900:2,": 312}, 5),
            ("hidden names", {"cur/.1,W=9": 9, "new/..1,W=9": 9}, 0),
            ("linked folders and trash", {**LINKED, **TRASH}, 27),
            ("a maildirsize is not read", {"maildirsize": b"9S\n9 1\n", "cur/1,W=5": 9}, 5),
        ]
    ),
    *(
        (f"a bad {name}", None, {}, f"ERROR {name} is not one of auto, ", {name: word})
        for name, word in (("QUOTA_KEEPER", "exim"), ("QUOTA_TRASH", "yes"), ("QUOTA_KEEPER", ""))
    ),
    # What is broken: counted, or an error.
    *(
        (what, text, {**FULL_CUR, ".a/new/": 0, **files}, line, {"QUOTA_LIMIT": "1500"})
        for what, text, files, line in BROKEN
    ),
]


@pytest.mark.parametrize("row", MAILDIR_RULE, ids=lambda row: row[0])
def test_a_maildir_is_over_as_the_rule_says(row, tmp_path):
    _, maildirsize, files, line, *more = row
    settings = dict(*more)
    path = make_maildir(tmp_path / "Maildir", files, maildirsize, settings.pop("age", 0))
    if "QUOTA_USERS" in settings:
        (tmp_path / "users").write_text(f"john {settings['QUOTA_USERS']}\n")
        settings["QUOTA_USERS"] = tmp_path / "users"
    got = ask_maildir(path, **settings)
    if line.startswith("ERROR"):
        assert got.status == 500 and got.line.startswith(line) and str(tmp_path) not in got.line
    else:
        assert got[:2] == (200, line.replace(" ", " john ", 1))


KEEPERS = [
    # (uidlist and maildirsize: seconds since they were written, None: missing; those since the
    # time in a message's name; keeper)
    (None, None, 0, "new"),
    (None, 9000, 0, "courier"),
    (9000, None, 9000, "dovecot-count"),
    (0, 0, 0, "dovecot"),
    (0, 9000, 9000, "dovecot"),  # somebody has read
    (9000, 9000, 0, "dovecot"),  # another program has delivered
    (50, 100, 50, "dovecot"),
    (0, 9000, -(10**10), "dovecot"),  # in the year 2342
    (0, 9000, None, "dovecot"),
    (0, 9000, 0, "old"),
    (0, 100, 0, "old"),
]
KEPT = {
    # keeper: the answers without and with QUOTA_LIMIT=90, and the default grace of the latter
    "new": ("OK 10 0", "OK 10 90", "0"),  # as Courier's
    "courier": ("OK 1 900", "OK 1 900", "0"),
    "dovecot": ("OK 1 900", "OK 1 900", "90"),
    "dovecot-count": ("ERROR", "OK 20 90", "9"),
    "old": ("OK 20 900", "OK 20 90", "9"),  # counted, and the first line is the last resort
}


@pytest.mark.parametrize(("uidlist", "maildirsize", "message", "keeper"), KEEPERS)
def test_who_keeps_a_maildir_is_seen_by_its_files(uidlist, maildirsize, message, keeper, tmp_path):
    now = time.time()
    stamp = "x" if message is None else int(now - message)
    files = {f".a/new/{stamp}.M1P1.x,S=10,W=20": 1, **({} if uidlist is None else DOVECOT)}
    text = None if maildirsize is None else b"900S\n1 1\n"
    path = make_maildir(tmp_path / "Maildir", files, text, maildirsize or 0)
    if uidlist is not None:
        os.utime(path / "dovecot-uidlist", (now - uidlist, now - uidlist))
    alone, with_limit, grace = KEPT[keeper]
    got = ask_maildir(path)
    assert got.line.startswith(alone.replace("OK", "OK john"))
    assert got.status == 200 or "QUOTA_DOVEADM" in got.line and "QUOTA_LIMIT" in got.line
    got = ask_maildir(path, QUOTA_LIMIT="90")
    assert got.line == with_limit.replace("OK", "OK john") and got.header["Quota-Grace"] == grace


def test_a_control_folder_is_a_path_with_placeholders(tmp_path):
    path = make_maildir(tmp_path / "Maildir", {"cur/1": 20}, b"9S\n9 1\n")
    make_maildir(tmp_path / "control" / "john", DOVECOT, b"70S\n7 1\n")
    assert ask_maildir(path, QUOTA_CONTROL=tmp_path / "control/%n").line == "OK john 7 70"
    none = tmp_path / "control/%n.none"  # by the setting it is Dovecot all the same
    assert ask_maildir(path, QUOTA_CONTROL=none, QUOTA_LIMIT="50").line == "OK john 20 50"
    bad = (none, 500), (tmp_path / "%q", 500), ("control/%n", 500), (tmp_path / "%d/%n", 400)
    for setting, status in bad:
        assert ask_maildir(path, QUOTA_CONTROL=setting).status == status


def test_a_path_that_ends_in_a_slash_is_the_same(tmp_path):
    make_maildir(tmp_path / "john", TRASH, DOUBT)
    for slash in "", "/":
        assert ask(MAILDIR_CGI, QUOTA_MAILDIR=f"{tmp_path}/%n{slash}").line == "OK john 0 1000"


LIVES = [
    # (what happens, the file before it and after it, whether the mailbox has changed)
    ("a message is delivered", None, "new/9.x", True),
    ("a message is read", "new/1.x", "cur/1.x:2,S", True),
    ("a message is deleted", "cur/1.x:2,S", "tmp/1.x", True),
    ("a delivery is refused", None, "maildirsize", False),
]


@pytest.mark.parametrize(("event", "before", "later", "is_change"), LIVES)
def test_last_modified_is_when_a_message_came_or_was_read_or_deleted(
    event, before, later, is_change, tmp_path
):
    path = make_maildir(tmp_path / "Maildir", {before: 9} if before else {})
    for folder in path, *path.rglob("*"):
        os.utime(folder, (5, 5))
    if before:
        (path / before).rename(path / later)
    else:
        (path / later).write_bytes(b"9S\n")
    changed = ask_maildir(path).header["Last-Modified"]
    assert (changed == email.utils.formatdate(5, usegmt=True)) == (not is_change)


# ---- what can be wrong with a Maildir ----

HUGE = b"1000S\n10 1\n"


NO_MAILDIRS = [
    # (the only file where the Maildir should be, beginning of the line)
    *((f"{folder}x", "ERROR QUOTA_MAILDIR is no Maildir") for folder in ("", "john@x.org/cur/")),
    ("mailboxes/INBOX/dbox-Mails/u.1", "ERROR QUOTA_MAILDIR is no Maildir"),  # an mdbox
    *[("cur/x", "OK john 10 0"), ("new/x", "OK john 10 0")],
    ("maildirsize", "OK john 0 1000"),  # Dovecot made it when it was asked
]


@pytest.mark.parametrize(("part", "line"), NO_MAILDIRS)
def test_a_folder_that_is_no_maildir_is_an_error(part, line, tmp_path):
    file = tmp_path / "Maildir" / part
    file.parent.mkdir(parents=True)
    file.write_text("1000S\n0 0\n")
    assert ask_maildir(tmp_path / "Maildir").line.startswith(line)


def test_a_maildir_that_does_not_exist_has_no_bytes_or_may_be_unknown(tmp_path):
    settings = {"QUOTA_MAILDIR": tmp_path / "%n"}
    assert ask(MAILDIR_CGI, "u=x", QUOTA_LIMIT="9", **settings).line == "OK x 0 9"
    assert ask(MAILDIR_CGI, "u=x", QUOTA_UNKNOWN="1", **settings).line == "UNKNOWN x 0 0"
    (tmp_path / "x").write_bytes(HUGE)
    assert ask(MAILDIR_CGI, "u=x", **settings).status == 500, "a file"


UNREADABLE_PARTS = [
    *(("stat", "maildirsize"), ("open", "maildirsize")),
    *(("scandir", folder) for folder in (".", "new", ".a/cur")),
]


@pytest.mark.parametrize(("function", "name"), UNREADABLE_PARTS)
def test_what_cannot_be_read_is_an_error_and_not_a_smaller_sum(
    function, name, tmp_path, monkeypatch, capfd
):
    make_maildir(tmp_path / "john", {"cur/1": 9, ".a/new/1": 9}, DOUBT)
    settings = {"QUOTA_MAILDIR": tmp_path / "%n"}
    assert ask(MAILDIR_CGI, **settings).line == "OK john 18 1000"
    refuse_to(monkeypatch, function, os.path.normpath(tmp_path / "john" / name), errno.EACCES)
    got = ask(MAILDIR_CGI, **settings)
    assert got[:2] == (500, "ERROR cannot read the mailbox: Permission denied")
    assert str(tmp_path) in capfd.readouterr().err


@pytest.mark.parametrize("keeper", ["courier", "dovecot", "dovecot-count"])
def test_a_message_that_is_moved_while_it_is_counted_counts_once(keeper, tmp_path, monkeypatch):
    new, cur = tmp_path / "john/new/1.x,S=100,W=100", tmp_path / "john/cur/1.x,S=100,W=100:2,S"
    make_maildir(tmp_path / "john", {f"new/{new.name}": 1})
    looks, scan = itertools.count(), os.scandir

    def scan_and_move(folder: bytes) -> Any:
        if folder.endswith((b"/new", b"/cur")):  # at the first look it is in new, then in cur
            is_first = next(looks) % 2 == 0
            if (cur if is_first else new).exists():
                cur.rename(new) if is_first else new.rename(cur)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scan_and_move)
    settings = {"QUOTA_LIMIT": "150", "QUOTA_MAILDIR": tmp_path / "%n", "QUOTA_KEEPER": keeper}
    assert ask(MAILDIR_CGI, **settings).line == "OK john 100 150"


def test_a_maildirsize_without_end_takes_no_memory(boxes):
    file = pathlib.Path(boxes["QUOTA_MAILDIR"]).with_name("mary") / "maildirsize"
    file.write_bytes(HUGE)
    os.truncate(file, 2**30)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (2**28, 2**28))
    env = {name: str(value) for name, value in boxes.items()}
    assert run(MAILDIR_CGI, "mary", env=env, preexec_fn=limit) == (0, "OK mary 101 1000\n", "")


# ---- Dovecot asked itself: a fake of its HTTP service, the real one is in .ci/test_servers.py ----

KEY = "a key of the tests"


def doveadm(*roots: tuple[object, object, object, object]) -> bytes:
    """Make an answer to quotaGet: bytes in kilobytes and messages, each with its limit."""
    rows: list[object] = []
    for kilobytes, limit, messages, most in roots:
        rows.append({"root": "", "type": "STORAGE", "value": kilobytes, "limit": limit})
        rows.append({"root": "", "type": "MESSAGE", "value": messages, "limit": most})
    return as_json([["doveadmResponse", rows, "q"]])


def as_json(value: object, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{json.dumps(value)}".encode()


def doveadm_error(number: int) -> bytes:
    return as_json([["error", {"type": "exitCode", "exitCode": number}, "q"]])


NO_FIGURES: list[tuple[object, object]] = [
    *[("91", "error"), ("error", "100"), ("91", ""), ("-5", "100"), ("1e3", "100"), ([], {})],
    *[("91", None), (float("inf"), "100")],
]
NO_ROWS: list[object] = [[], None, {}, [5], [{}], [[]]]
NO_QUOTAS: list[object] = [
    *([], {}, None, 5, "doveadmResponse", [[]], [["doveadmResponse"]], [[1, 2, 3]]),
    *([["doveadmResponse", rows, "q"]] for rows in NO_ROWS),
    [["doveadmResponse", [{"type": "MESSAGE", "value": "3", "limit": "50"}], "q"]],
]
FINE = doveadm(("91", "100", "3", "50"))
ROWS = FINE.partition(b"\r\n\r\n")[2]
DOVEADM: list[tuple[Any, str, str | None]] = [
    # (what the service does, beginning of the line, Quota-Grace)
    (FINE, "OK john 93184 102400", "10240"),
    (doveadm(("100", "100", "3", "50")), "OVERQUOTA john 102400 102400", "10240"),
    (doveadm(("99", "100", "49", "50")), "OK john 101376 102400", "10240"),
    (doveadm(("91", "-", "3", "-")), "OK john 93184 0", "0"),
    (doveadm(("91", "-", "50", "50")), "OVERQUOTA john 93184 0", "0"),
    (doveadm(("10", "100", "3", "-"), ("50", "60", "3", "-")), "OK john 51200 61440", "6144"),
    (doveadm(("10", "-", "3", "-"), ("50", "90", "3", "-")), "OK john 51200 92160", "9216"),
    (doveadm(("99", "100", "3", "-"), ("5", "6", "7", "7")), "OVERQUOTA john 5120 6144", "614"),
    (doveadm_error(67), "UNKNOWN john", None),
]
NO_DOVEADM: list[Any] = [
    *(doveadm_error(number) for number in (75, 64, 0)),
    *(as_json([["error", {"type": kind}, "q"]]) for kind in ("unknownMethod", "67")),
    *(doveadm((value, limit, "3", "-")) for value, limit in NO_FIGURES),
    doveadm(("91", "100", "3", "error")),
    doveadm(("10", "100", "3", "-"), ("5", "error", "3", "-")),
    *map(as_json, NO_QUOTAS),
    *(raw(status, ROWS) for status in (b"401 No", b"500 Oops", b"302 Found", b"", b"200x")),
    *(raw(b"200 OK", text) for text in (b"OK john 5 100\n", b"\xff\xfe\x00", b"[" * 60_000)),
    raw(b"200 OK", b" " * 1_000_000 + ROWS),
    *([(FINE[:length], 0)] for length in (0, 5, 60, len(FINE) - 2)),
    [(FINE[:60], 0), (None, 0)],
]


@pytest.fixture
def dovecot(site):
    """Give a fake doveadm service and a function that asks the CGI which asks it."""
    site.write("key", f"{KEY}\nanother line\n").chmod(0o600)
    url = f"http://127.0.0.1:{site.backend.port}/doveadm/v1"
    settings = {"QUOTA_DOVEADM": url, "QUOTA_DOVEADM_KEY": site.folder / "key"}
    return site.backend, lambda query="u=john", **more: ask(
        MAILDIR_CGI, query, **{**settings, **more}
    )


def test_what_dovecot_says_becomes_an_answer_or_an_error(dovecot, capfd):
    service, ask_it = dovecot
    for answer, line, grace in [*DOVEADM, *((answer, "ERROR ", None) for answer in NO_DOVEADM)]:
        service.default = answer
        got = ask_it()
        assert got.line.startswith(line) and (got.status == 500) == (line == "ERROR "), answer
        assert got.header.get("Quota-Grace") == grace, answer
    shown = capfd.readouterr().err
    assert KEY not in shown and base64.b64encode(KEY.encode()).decode() not in shown


@pytest.mark.parametrize("trickle", [HANG, [(FINE[:60], 600)]])
def test_a_dovecot_that_takes_too_long_is_an_error_in_time(trickle, dovecot, monkeypatch):
    service, ask_it = dovecot
    monkeypatch.setattr(CGIS[MAILDIR_CGI], "DOVEADM_SECONDS", 0.5)
    service.default = trickle
    assert ask_it().status == 500
    wait_for(lambda: service.left, "the end of the connection")


NAMES_IN_DOVECOT = [
    # (query, the user that Dovecot is asked about, None: none)
    *[("u=john", "john"), ("u=john&d=example.com", "john@example.com")],
    *[("u=j%C3%B6rg", "j\u00f6rg"), ("u=a%20b&d=x.org", "a b@x.org"), ("u=%22j%22%5C", '"j"\\')],
    *((query, None) for query in ("u=..", "u=john%00", "d=x.org")),
    # What doveadm takes for a pattern, and what is not UTF-8, is no user.
    *((query, None) for query in ("u=*", "u=%2A&d=x.org", "u=j%3Fhn", "u=john&d=*", "u=j%F6rg")),
]


@pytest.mark.parametrize(("query", "user"), NAMES_IN_DOVECOT)
def test_dovecot_is_asked_about_the_user_by_its_api_with_the_key(query, user, dovecot):
    service, ask_it = dovecot
    service.default = FINE
    got = ask_it(query, QUOTA_MAILDIR="nonsense", QUOTA_KEEPER="nonsense", QUOTA_LIMIT="nonsense")
    if user is None:
        assert got.line.startswith(("UNKNOWN ", "ERROR no ")) and not service.requests
        return
    head, _, body = service.requests[0].rpartition(b"\r\n")
    assert got.status == 200 and head.startswith(b"POST /doveadm/v1 HTTP/1.")
    key = b"X-Dovecot-API " + base64.b64encode(KEY.encode())
    fields = {b"Authorization: " + key, b"Content-Type: application/json"}
    assert fields < set(head.split(b"\r\n"))
    assert json.loads(body)[0][:2] == ["quotaGet", {"user": user}]


BAD_URLS = [
    *("nonsense", "http://127.0.0.1:99999/doveadm/v1", "http:///doveadm/v1"),
    *(f"http://127.0.0.1:8080/{path}" for path in ("", "doveadm/v2", "doveadm/v1?x")),
]
BAD_DOVEADMS = [
    # (setting, value, what the line names)
    ("QUOTA_DOVEADM", "https://127.0.0.1:8080/doveadm/v1", "https"),
    ("QUOTA_DOVEADM", "http://127.0.0.1:1/doveadm/v1", "Dovecot cannot be asked"),
    *(("QUOTA_DOVEADM", url, "QUOTA_DOVEADM") for url in BAD_URLS),
    *(("QUOTA_DOVEADM_KEY", file, "QUOTA_DOVEADM_KEY") for file in ("/nonexistent", "/etc", "")),
    ("QUOTA_GRACE", "ten", "QUOTA_GRACE"),
]


@pytest.mark.parametrize(("name", "value", "named"), BAD_DOVEADMS)
def test_a_bad_setting_of_dovecots_service_says_so(name, value, named, dovecot):
    service, ask_it = dovecot
    service.default = FINE
    got = ask_it(**{name: value})
    assert got.status == 500 and named in got.line and "/nonexistent" not in got.line


def test_a_key_that_others_may_read_is_accepted_and_logged_once(dovecot, site, monkeypatch, capfd):
    service, ask_it = dovecot
    service.default = FINE
    monkeypatch.setitem(CGIS, MAILDIR_CGI, load(MAILDIR_CGI))
    assert ask_it().status == 200 and capfd.readouterr().err == ""
    (site.folder / "key").chmod(0o644)
    for times in 1, 0:
        assert ask_it().status == 200
        assert capfd.readouterr().err.count("QUOTA_DOVEADM_KEY") == times


# ---- the house: what stands twice is equal ----

README = (HERE / "README.md").read_text()
BLOCK = "# ---- From here to the end the text is the same in quota.cgi and maildir_quota.cgi. ----"


def test_both_cgis_share_one_block_to_the_letter():
    blocks = [script.read_text().partition(BLOCK)[2] for script in CGIS]
    assert blocks[0] == blocks[1] != ""


NO_DEFAULT = "", "off", "off: standard error", "none: let through", "the system's"


def test_readme_and_help_give_every_option_with_its_default_in_the_same_order():
    row = r"^\| `--([a-z-]+)[^|`]*(?:\|[^|`]*)?`[^|]*\| *(.*?) *\|"
    shown = {name: default.strip("`") for name, default in re.findall(row, README, re.MULTILINE)}
    module = milter_module()
    names = [*(option[0] for option in module.OPTIONS), "version"]
    # The title of the options is another one before Python 3.10.
    text = re.split("\n(?:options|optional arguments):", run_milter("--help")[1])[1]
    helps = dict(re.findall(r"^  --([a-z-]+)(.*?)(?=^  -|\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(shown) == list(helps) == names
    for name, _, _, default, _ in module.OPTIONS:
        if name == "backend":
            default = module.DEFAULT_BACKEND
        if not default and default != 0 or default is False:
            assert shown[name] in NO_DEFAULT
        else:
            assert re.match(rf"{re.escape(str(default))}(: off)?$", shown[name]), name
            assert f"({default})" in " ".join(helps[name].split()), name


@pytest.mark.parametrize("script", CGIS)
def test_readme_gives_every_setting_its_default(script):
    row = re.compile(r"^\| `(QUOTA_\w+)`(?: \((.*?)\))? \| (.*?) \|", re.MULTILINE)
    rows = [(name, default) for name, of, default in row.findall(README) if of in ("", script.name)]
    settings = {name: value for name, value in vars(CGIS[script]).items() if name[:6] == "QUOTA_"}
    assert {name: default.strip("`") for name, default in rows} == {
        name: value or "none" for name, value in settings.items()
    }


def test_the_top_level_holds_the_six_files_and_nothing_else():
    names = {MILTER.name, MBOX_CGI.name, MAILDIR_CGI.name, "test_quota.py", "README.md", "LICENSE"}
    assert {path.name for path in HERE.iterdir() if path.name[0] not in "._"} == names


def test_the_docstrings_name_no_option_or_setting_that_there_is_not():
    options = {f"--{row[0]}" for row in milter_module().OPTIONS} | {"--version", "--help"}
    assert set(re.findall(r"--[a-z][a-z-]+", milter_module().__doc__)) <= options
    for module in CGIS.values():
        assert set(re.findall(r"QUOTA_\w+", module.__doc__)) <= set(vars(module))
        assert set(re.findall(r"--[a-z][a-z-]+", module.__doc__)) == {"--serve"}


if __name__ == "__main__":
    clock_file, sys.argv = sys.argv[1], sys.argv[2:]
    run_with_clock(clock_file, sys.argv[0])
