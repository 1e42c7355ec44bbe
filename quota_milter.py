#!/usr/bin/python3
"""quota_milter.py - refuse mail for full mailboxes at the frontend, before it is taken.

USE
    quota_milter.py [@FILE] [options]            answer Sendmail or Postfix
    quota_milter.py --check ADDRESS... [options] ask now, print the verdicts

    At each RCPT the backend that has the mailbox is asked over HTTP (quota.cgi
    or maildir_quota.cgi there: `GET URL?u=USER&d=DOMAIN`). A recipient who is
    over quota gets a temporary failure, `452 4.2.2 Quota exceeded for ...`, so
    that the user who makes room still gets the mail. All others pass.

    A file given as @FILE holds one option and its value a line, `#` comments.
    TERM and INT end the program, HUP makes it forget its answers and read the
    aliases again, USR1 makes it log its counters. --check ends with status 0
    where all would be accepted, 1 where one would be refused, 2 where a backend
    could not be asked.

WHEN SOMETHING FAILS
    A backend that cannot be asked within --timeout costs no mail: its last
    answer counts for up to an hour, after that --on-error. A backend that
    cannot be reached is left alone for --retry-after seconds. No question is
    waited for longer than --timeout. What went wrong is in the log, a line each.

SECURITY
    Trusts the backends, and believes what they answer. Never trusts an address:
    it is escaped before it is asked about, answered or logged. Proxies of the
    environment are not used, redirects not followed. Needs no privilege: run it
    as a user of its own. Passwords in --backend are seen in the list of
    processes: put them into a file.
"""

from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import functools
import http.client
import logging
import logging.handlers
import math
import os
import queue
import re
import resource
import select
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn, Optional, Union

try:
    import Milter
except ImportError:
    sys.exit("quota_milter.py: pymilter is missing: apt-get install python3-milter")

VERSION = "1.0"
DEFAULT_BACKEND = "http://127.0.0.1:8025/cgi-bin/quota.cgi"

ANSWER_LENGTH = 4096  # bytes read of an answer: a line with the longest of names is far below
CACHE_SIZE = 50_000  # mailboxes remembered of a backend, in some 20 MB with names of usual length
ROUTES = 10_000  # recipients of whom it is remembered which mailbox they are, in some 10 MB
LAST_KNOWN = 3600  # seconds for which an answer may stand in for a backend that gives faults
IDLE = 4  # seconds for which a connection rests at most: quota.cgi --serve closes it after 10
LATE_ANSWER = 60  # seconds for which a question may hold its place when nobody waits any more
PATIENCE = 3  # questions in a row that run out of time before a backend is left alone
ADDRESS_LENGTH = 256  # characters of an address in a reply: the longest path of RFC 5321, 4.5.3.1.3
REPLY_LENGTH = 480  # characters of a reply's text: with its codes below 512 (RFC 5321, 4.5.3.1.5)
LOG_LENGTH = 10_000  # lines that may wait to be written
TICK = 1  # seconds between two looks at the alias files and at late questions
DAY = 86400  # seconds: the most that an option takes
STOPPING = 6  # seconds that libmilter gets to stop

OVERQUOTA = "452 4.2.2 Quota exceeded for {address}, try again later"
TOOLARGE = "552 5.2.3 Message is larger than the quota of {address}"
LEFT_ALONE = "the backend is left alone for a while"
VERDICTS = ("ok", "overquota", "toolarge", "unknown", "fault")
UNASKED = ("empty", "exempt", "alias", "nobackend")
COUNTERS = ("recipients", "refused", "cached", "lastknown", *VERDICTS, *UNASKED)

SOURCE_ROUTE = re.compile(r"^(?:@(?:\[[^\]]*\]|[^\[@,:])*,?)+:")
# aliases(5) `name: value` or virtual(5) `name value`; a name may be quoted.
ALIAS = re.compile(r"""("(?:\\.|[^"\\])*"(?:@[^\s:]+)?|[^\s:"][^\s:]*)(?:\s*:\s*|\s+)(\S.*)""")
# One mailbox (behind a backslash: whatever the aliases say); no list, program, file, include.
TARGET = re.compile(r"""(\\?)(?!"?[|/:]|\w+:)((?:"(?:\\.|[^"\\])*"|[^\s,"])+)""")

log = logging.getLogger("quota_milter")


def printable(text: object) -> str:
    """Escape all but printable ASCII; quote what would break a line of `key=value`."""
    raw = str(text).encode("utf-8", "surrogateescape")
    escaped = "".join(
        chr(c) if 0x20 <= c <= 0x7E and c not in b'"\\' else f"\\x{c:02x}" for c in raw
    )
    return escaped if escaped and not re.search("[ =]", escaped) else f'"{escaped}"'


class Address(NamedTuple):
    """A recipient, as it was given and as a backend is asked about it (interface section 2)."""

    given: str  # without angle brackets
    local: str  # unquoted local part
    user: str  # the local part without the tail behind a delimiter
    domain: str  # lower case, "" where there is none

    @classmethod
    def parse(cls, text: str, delimiters: str, case_sensitive: bool) -> Address:
        """Read an envelope address (RFC 5321, 4.1.2). There is none that cannot be read."""
        given = text[1:-1] if text[:1] == "<" and text[-1:] == ">" else text
        local, at, domain = SOURCE_ROUTE.sub("", given).rpartition("@")
        if not at or domain.endswith('"'):  # the @ stands in a quoted local part
            local, domain = local + at + domain, ""
        if '"' in local or "\\" in local:
            local = re.sub(r'\\(.)|"', r"\1", local, flags=re.DOTALL)
        if not case_sensitive:
            local = local.lower()
        stem = re.split(f"[{re.escape(delimiters)}]", local, maxsplit=1)[0] if delimiters else ""
        domain = domain.lower()
        return cls(given, local, stem or local, domain[:-1] if domain[-1:] == "." else domain)

    def names(self) -> list[str]:
        """Give the names by which tables list this address, the most specific first."""
        local, user = self.local.lower(), self.user.lower()
        return [f"{local}@{self.domain}", f"{user}@{self.domain}", local, user]


class Reply(NamedTuple):
    """An SMTP reply whose text may name the recipient as `{address}`."""

    code: str
    enhanced: str  # RFC 3463
    text: str

    @classmethod
    def parse(cls, template: str) -> Reply:
        """Read `452 4.2.2 text`. Raises ArgumentTypeError."""
        match = re.fullmatch(r"([45]\d\d) (([45])\.\d{1,3}\.\d{1,3}) ([ -~]{1,200})", template)
        if not match or match[1][0] != match[3]:
            raise argparse.ArgumentTypeError("is not a code, enhanced code and text: 452 4.2.2 ...")
        if re.search(r"[{}%]", match[4].replace("{address}", "")):
            raise argparse.ArgumentTypeError("has a % or a {...} other than {address}")
        return cls(match[1], match[2], match[4])

    def to(self, address: str) -> Reply:
        """Put the address in: printable ASCII without %, which MTAs and libmilter would read."""
        if len(address) > ADDRESS_LENGTH:
            address = address[:ADDRESS_LENGTH] + "..."
        text = self.text.replace("{address}", re.sub("[^ -~]|%", "?", address))
        return self._replace(text=text[:REPLY_LENGTH])


ON_ERROR = Reply("451", "4.3.0", "The mailbox of {address} cannot be checked, try again later")


class Answer(NamedTuple):
    """What a backend said of a mailbox; used and quota in bytes, None where not known."""

    status: str
    used: Optional[int]
    quota: Optional[int]  # 0: no limit

    @classmethod
    def parse(cls, line: bytes) -> Answer:
        """Read `STATUS user used quota` (interface section 1). Raises BadAnswer."""
        status, *fields = line.rstrip(b"\r\n").split(b" ")
        if status not in (b"OK", b"OVERQUOTA", b"UNKNOWN"):
            raise BadAnswer(f"no status in the answer {line[:80]!r}: is the URL right?")
        numbers = fields[-2:] if len(fields) > 2 else [b"", b""]  # a lone number may be either
        used, quota = (int(number) if number.isdigit() else None for number in numbers)
        return cls(status.decode(), used, quota)

    def verdict(self, size: int) -> str:
        """Judge a message of `size` bytes (0: not declared): ok, overquota, toolarge or unknown."""
        if self.status == "UNKNOWN":
            return "unknown"
        if self.quota and size > self.quota:
            return "toolarge"
        full = self.quota and size and self.used is not None and self.used + size > self.quota
        return "overquota" if full or self.status == "OVERQUOTA" else "ok"


class Fault(Exception):
    """A backend did not answer a question; the text says why, for the log."""


class BadAnswer(Fault):
    """It answered, but with no verdict: that concerns one mailbox."""


class Unreachable(Fault):
    """There is no connection to it: that concerns all mailboxes."""


class Question:
    """A question to a backend that is under way, shared by all sessions that want its answer."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline  # of those who wait, on the monotonic clock
        self.late = False  # the deadline was missed, and that has been counted
        self.cut = False
        self.socket: Optional[socket.socket] = None
        self.future: concurrent.futures.Future[Answer]

    def connected(self, sock: socket.socket) -> None:
        """Note the connection, from now on bounded by `end` rather than by the deadline."""
        sock.settimeout(LATE_ANSWER)
        self.socket = sock
        if self.cut:
            self.end()

    def end(self) -> None:
        """Give the place back: what waits for this connection gets an end of file."""
        self.cut = True
        if self.socket is not None:
            try:
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)
            except OSError:
                self.socket = None  # it had ended by itself


class HTTPHandler(urllib.request.AbstractHTTPHandler):
    """Opens http and https, over one connection for each thread of the pool.

    It is kept for the next question where the server offers that by a header Keep-Alive; a server
    of ten lines, which may know no length and no second client meanwhile, is told to close. With no
    other handler beside this one urllib follows no redirect, uses no proxy of the environment,
    opens nothing else and leaves every status to us.
    """

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__()
        https = functools.partial(http.client.HTTPSConnection, context=context)
        self.kinds: dict[str, Any] = {"http": http.client.HTTPConnection, "https": https}
        self.of_thread = threading.local()  # a connection, and when its last answer was read
        self.offered = False

    def http_open(self, request: Any) -> Any:
        """Send a request. Raises Unreachable, OSError, http.client.HTTPException."""
        connection = self.kept()
        is_new = connection is None
        if is_new:
            connection = self.kinds[request.type](request.host, timeout=request.timeout)
            try:
                connection.connect()
            except (OSError, ValueError) as error:
                raise Unreachable(f"no connection: {error}") from None
            self.of_thread.connection = connection
        request.question.connected(connection.sock)
        headers = dict(request.header_items())
        if not self.offered:
            headers["Connection"] = "close"
        try:
            connection.request("GET", request.selector, headers=headers)
            response = connection.getresponse()
        except ConnectionError:
            if is_new or request.question.cut:
                raise
            connection.close()  # the server closed what it had kept in this very moment
            return self.http_open(request)
        self.offered = "Keep-Alive" in response.headers
        return response

    https_open = http_open

    def kept(self) -> Any:
        """Return this thread's connection if it rests, with no end or stray answer in it."""
        connection = getattr(self.of_thread, "connection", None)
        if connection is None or connection.sock is None:
            return None
        poll = select.poll()
        poll.register(connection.sock, select.POLLIN)
        if time.monotonic() - self.of_thread.used < IDLE and not poll.poll(0):
            return connection
        connection.close()
        return None

    def release(self, keep: bool) -> None:
        """Close this thread's connection, or note that it may be used again."""
        self.of_thread.used = time.monotonic()
        if not keep and hasattr(self.of_thread, "connection"):
            self.of_thread.connection.close()


class Heard(NamedTuple):
    """What can be said of a mailbox now: a fault may come with the last known answer."""

    answer: Optional[Answer]
    cached: bool = False
    fault: str = ""


class Backend:
    """One URL that is asked: its places, its answers, and whether it is left alone.

    A bounded pool of futures is the mechanism: it holds `max_queries` questions at a time, all
    sessions that want one mailbox wait for one future, and none waits beyond its deadline. The
    question itself may go on, so that a mailbox that takes long to count is asked about once.
    """

    def __init__(self, url: str, options: argparse.Namespace, context: ssl.SSLContext) -> None:
        parts = urllib.parse.urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        self.url = urllib.parse.urlunsplit((parts.scheme, host, parts.path or "/", parts.query, ""))
        self.name = self.url.partition("?")[0]  # for the log
        self.headers = {"User-Agent": "quota_milter/" + VERSION}
        if parts.username is not None:
            secret = urllib.parse.unquote(parts.username) + ":"
            secret += urllib.parse.unquote(parts.password or "")
            encoded = base64.b64encode(secret.encode()).decode()
            self.headers["Authorization"] = "Basic " + encoded
        self.timeout: float = options.timeout
        self.retry_after: float = options.retry_after
        self.cache_ttl: float = options.cache_ttl
        self.opener = urllib.request.OpenerDirector()
        self.handler = HTTPHandler(context)
        self.opener.add_handler(self.handler)
        self.pool = concurrent.futures.ThreadPoolExecutor(options.max_queries)
        self.lock = threading.Lock()  # guards what follows
        self.answers: dict[tuple[str, str], tuple[float, Answer]] = {}  # oldest first
        self.questions: dict[tuple[str, str], Question] = {}
        self.answered = -math.inf  # when it last did, on the monotonic clock
        self.out_of_time = 0  # questions in a row
        self.down = False
        self.silent_until = 0.0  # on the monotonic clock, while down

    def ask(self, user: str, domain: str) -> Heard:
        """Answer for a mailbox, from memory or by a question, within the timeout."""
        mailbox, now = (user, domain), time.monotonic()
        with self.lock:
            at, answer = self.answers.get(mailbox, (-math.inf, None))
            if now - at < self.cache_ttl:
                return Heard(answer, cached=True)
            question = self.questions.get(mailbox)
            if question is None and not self.is_silent(now):
                question = Question(now + self.timeout)
                question.future = self.pool.submit(self.run, mailbox, question)
                self.questions[mailbox] = question  # not before: submit may find no thread
        if question is None:
            fault = LEFT_ALONE
        else:
            try:
                return Heard(question.future.result(max(0, question.deadline - now)))
            except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
                fault = LEFT_ALONE if question.cut else f"no answer within {self.timeout:g} s"
                self.record_timeout(mailbox, question)
            except Fault as error:
                fault = str(error)
        last_known = answer if now - at < LAST_KNOWN else None
        return Heard(last_known, cached=last_known is not None, fault=fault)

    def is_silent(self, now: float) -> bool:
        """Say whether nothing may be asked. When it may again, one question tries the backend."""
        if not self.down:
            return False
        if now < self.silent_until:
            return True
        self.silent_until = now + self.retry_after
        return False

    def run(self, mailbox: tuple[str, str], question: Question) -> Answer:
        """Ask one question, in a thread of the pool, and learn from what comes. Raises Fault."""
        outcome: Union[Answer, Fault]
        try:
            outcome = self.fetch(mailbox, question)
        except Fault as fault:
            outcome = fault
        with self.lock:
            current = self.questions.get(mailbox) is question  # not given up meanwhile
            if current:
                del self.questions[mailbox]
            if current and isinstance(outcome, Unreachable):
                self.leave_alone(str(outcome))
            elif isinstance(outcome, (Answer, BadAnswer)):
                self.record_answer()
            if isinstance(outcome, Answer):
                self.remember(mailbox, outcome)
        if isinstance(outcome, Fault):
            raise outcome
        return outcome

    def remember(self, mailbox: tuple[str, str], answer: Answer) -> None:
        """Keep an answer as the newest, and not too many."""
        self.answers.pop(mailbox, None)
        self.answers[mailbox] = time.monotonic(), answer
        if len(self.answers) > CACHE_SIZE:
            del self.answers[next(iter(self.answers))]

    def fetch(self, mailbox: tuple[str, str], question: Question) -> Answer:
        """Send the question and read the answer. All that can go wrong raises Fault."""
        user, domain = (urllib.parse.quote(n, safe="", errors="surrogateescape") for n in mailbox)
        query = f"u={user}&d={domain}" if domain else f"u={user}"
        url = self.url + ("&" if "?" in self.url else "?") + query
        request = urllib.request.Request(url, headers=self.headers)
        request.question = question  # type: ignore[attr-defined]
        keep = False
        try:  # who got a place late may connect late: that is no reason to call it unreachable
            with self.opener.open(request, timeout=self.timeout) as response:
                line, end, _ = response.readline(ANSWER_LENGTH).partition(b"\n")
                keep = response.length == 0 and "Keep-Alive" in response.headers
                if response.status != 200:
                    why = line[:80].decode("ascii", "replace") if line[:6] == b"ERROR " else ""
                    raise BadAnswer(f"status {response.status} {why or response.reason[:80]}")
                if not end and (response.length or len(line) == ANSWER_LENGTH):
                    raise Fault("the answer is cut short or too long")
                return Answer.parse(line)
        except Fault:
            raise
        except Exception as error:  # what urllib, http.client and ssl raise has no common base
            raise Fault(LEFT_ALONE if question.cut else repr(error)) from None
        finally:
            self.handler.release(keep)

    def record_timeout(self, mailbox: tuple[str, str], question: Question) -> None:
        """Count a question that ran out of time, once, however many sessions waited for it."""
        with self.lock:
            if question.late:
                return
            question.late = True
            if question.future.cancel():
                self.questions.pop(mailbox, None)
                if self.answered > question.deadline - self.timeout:
                    return  # it never got a place, of a backend that does answer
            self.out_of_time += 1
            if self.down or self.out_of_time >= PATIENCE:
                self.leave_alone(f"{PATIENCE} questions in a row got no answer in time")

    def leave_alone(self, why: str) -> None:
        """Ask nothing for a while, and give up what is under way."""
        self.silent_until = time.monotonic() + self.retry_after
        if not self.down:
            log.warning("backend=%s state=down reason=%s", self.name, printable(why))
        self.down, self.out_of_time = True, 0
        for question in self.questions.values():
            question.late = True
            question.future.cancel()
            question.end()
        self.questions.clear()

    def record_answer(self) -> None:
        """Note that the backend answers."""
        if self.down:
            log.warning("backend=%s state=up", self.name)
        self.down, self.out_of_time, self.answered = False, 0, time.monotonic()

    def tidy(self) -> None:
        """Give up questions that have held their places for too long."""
        with self.lock:
            for question in self.questions.values():
                if time.monotonic() - question.deadline > LATE_ANSWER:
                    question.end()

    def forget(self) -> None:
        """Forget all answers."""
        with self.lock:
            self.answers.clear()


class Aliases:
    """The files of aliases(5) and virtual(5): to which mailbox does a name lead?"""

    def __init__(self, files: list[str], parse: Callable[[str], Address]) -> None:
        """Read the files. Raises OSError, ValueError."""
        self.parse = parse
        self.stamps = {file: self.stamp(file) for file in files}
        self.tables = {file: self.read(file) for file in files}

    @staticmethod
    def stamp(file: str) -> object:
        """Tell one version of a file from the next, and from none."""
        try:
            status = os.stat(file)
        except OSError as error:
            return error.errno
        return status.st_mtime_ns, status.st_size, status.st_ino

    def refresh(self, force: bool = False) -> bool:
        """Read again what has changed, and say if something had; what is unreadable stays."""
        changed = False
        for file, old in self.stamps.items():
            stamp = self.stamp(file)
            if stamp == old and not force:
                continue
            self.stamps[file] = stamp
            try:
                self.tables[file] = self.read(file)
                changed = True
            except (OSError, ValueError) as error:
                log.warning("aliases=%s state=kept reason=%s", file, printable(error))
        return changed

    def read(self, file: str) -> dict[str, str]:
        """Read names and what they stand for; of two lines for a name the first counts."""
        table: dict[str, str] = {}
        bad: list[int] = []
        with open(file, encoding="utf-8", errors="surrogateescape", opener=open_regular) as lines:
            for number, line in logical_lines(lines):
                match = ALIAS.fullmatch(line)
                if match:
                    name = self.parse(match[1])
                    key = f"{name.local}@{name.domain}" if name.domain else name.local
                    table.setdefault(key.lower(), match[2])
                else:
                    bad.append(number)
        if bad:
            log.warning("aliases=%s state=incomplete skipped=%d line=%d", file, len(bad), bad[0])
        log.info("aliases=%s state=read names=%d", file, len(table))
        return table

    def find(self, name: str) -> list[tuple[str, str]]:
        """Give the name and what it stands for, in the first file that has it."""
        return [(name, table[name]) for table in self.tables.values() if name in table][:1]

    def resolve(self, address: Address) -> Optional[Address]:
        """Follow an address to its mailbox; None where it does not lead to exactly one.

        A name that stands for itself is a mailbox, names that stand for each other are a loop.
        """
        seen: set[tuple[str, str, str]] = set()
        itself = False
        while True:
            rules = [rule for name in address.names() for rule in self.find(name)]
            rules = rules or self.find("@" + address.domain)
            fresh = [r for r in rules if (r[0], address.local, address.domain) not in seen]
            if not fresh:
                return None if rules and not itself else address
            name, value = fresh[0]
            seen.add((name, address.local, address.domain))
            target = TARGET.fullmatch(value)
            if not target:
                return None
            text = address.local + target[2] if target[2][0] == "@" else target[2]
            following = self.parse(text)
            if not following.domain:
                following = following._replace(domain=address.domain)
            if target[1]:
                return following
            itself = following[1:] == address[1:]
            address = following


def logical_lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Join continuation lines and drop comments. Raises ValueError where it is no text."""
    start = 0
    parts: list[str] = []
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise ValueError("not a text file")
        text = line.strip()
        if not text or text[0] == "#":
            continue
        if not line[0].isspace():
            yield from [(start, " ".join(parts))] if start else []
            start, parts = number, []
        parts.append(text)
    yield from [(start, " ".join(parts))] if start else []


def open_regular(path: str, flags: int) -> int:
    """Open a file, but nothing that could keep the reader waiting. Raises OSError, ValueError."""
    file = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError("not a file")
    return file


class Decision(NamedTuple):
    """What is to be done with a recipient, and why."""

    address: Address
    mailbox: Optional[Address]  # that was asked about, None where nothing was
    verdict: str
    reply: Optional[Reply]  # None: let it through
    heard: Heard
    seconds: float

    def __str__(self) -> str:
        """Give the line for the log (interface section 2, Log)."""
        answer = self.heard.answer or Answer("", None, None)
        fields = {
            "recipient": self.address.given,
            "user": self.mailbox.user if self.mailbox else "-",
            "verdict": self.verdict,
            "used": "-" if answer.used is None else answer.used,
            "quota": "-" if answer.quota is None else answer.quota,
            "cached": "yes" if self.heard.cached else "no",
            "ms": round(self.seconds * 1000),
        }
        if self.heard.fault:
            fields["reason"] = self.heard.fault
        return " ".join(f"{name}={printable(value)}" for name, value in fields.items())


class Policy:
    """The rule: from a recipient and a size to a decision."""

    def __init__(self, options: argparse.Namespace, backends: dict[Optional[str], Backend]) -> None:
        """Take the options; the backend None is for all other domains.

        Raises OSError, ValueError where an alias file cannot be read.
        """
        self.parse = functools.partial(
            Address.parse,
            delimiters=options.recipient_delimiter,
            case_sensitive=options.case_sensitive,
        )
        self.dry_run: bool = options.dry_run
        self.log_all: bool = options.verbose
        self.ignore_size: bool = options.ignore_size
        self.replies: dict[str, Optional[Reply]] = {
            "overquota": options.overquota_reply,
            "toolarge": options.toolarge_reply,
            "unknown": options.unknown_reply,
            "fault": ON_ERROR if options.on_error == "tempfail" else None,
        }
        exempt = ["postmaster", *options.exempt]
        self.exempt = {self.parse(e).names()[0 if "@" in e else 2] for e in exempt}
        self.backends = backends
        self.aliases = Aliases(options.aliases, self.parse)
        self.route = functools.lru_cache(ROUTES)(self.find_route)
        self.lock = threading.Lock()
        self.counters = collections.Counter(dict.fromkeys(COUNTERS, 0))

    def decide(self, recipient: str, size: int) -> Decision:
        """Judge a recipient of a message of `size` bytes (0: not declared)."""
        start = time.monotonic()
        address, mailbox, backend, verdict = self.route(recipient)
        heard = Heard(None)
        if mailbox and backend:
            heard = backend.ask(mailbox.user, mailbox.domain)
            verdict = heard.answer.verdict(size) if heard.answer else "fault"
        template = self.replies.get(verdict)
        reply = template and template.to(address.given)
        return Decision(address, mailbox, verdict, reply, heard, time.monotonic() - start)

    def find_route(
        self, recipient: str
    ) -> tuple[Address, Optional[Address], Optional[Backend], str]:
        """Give the address, its mailbox, the backend to ask, or a verdict where none is asked."""
        address = self.parse(recipient)
        mailbox = self.aliases.resolve(address)
        if not address.local:
            return address, mailbox, None, "empty"
        if self.is_exempt(address) or mailbox and self.is_exempt(mailbox):
            return address, mailbox, None, "exempt"
        if not mailbox:
            return address, None, None, "alias"
        backend = self.backends.get(mailbox.domain, self.backends.get(None))
        return address, mailbox, backend, "" if backend else "nobackend"

    def is_exempt(self, address: Address) -> bool:
        """Say whether an address is one that is never asked about."""
        return not self.exempt.isdisjoint(address.names())

    def report(self, decision: Decision) -> None:
        """Count a decision, and log it where it is a refusal or a fault."""
        fault, refused = bool(decision.heard.fault), decision.reply is not None
        with self.lock:
            self.counters["recipients"] += 1
            self.counters["refused"] += refused and not self.dry_run
            self.counters["cached"] += decision.heard.cached and not fault
            self.counters["lastknown"] += decision.heard.cached and fault
            self.counters[decision.verdict] += 1
        if fault or refused or self.log_all:
            level = logging.WARNING if fault else logging.INFO
            log.log(level, "%s%s", decision, " dry_run=yes" if self.dry_run and refused else "")

    def log_counters(self) -> None:
        """Log what has been counted since the start."""
        with self.lock:
            log.info("counters %s", " ".join(f"{k}={v}" for k, v in self.counters.items()))

    def tidy(self, forget: bool = False) -> None:
        """Do what is due every second: read changed aliases, end late questions."""
        if self.aliases.refresh(forget):  # a new memory: the old one may get a late entry yet
            self.route = functools.lru_cache(ROUTES)(self.find_route)
        for backend in set(self.backends.values()):
            backend.tidy()
            if forget:
                backend.forget()


class QuotaMilter(Milter.Base):  # type: ignore[misc]
    """A connection of the MTA."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.size = 0  # bytes that the sender of the current message declares (RFC 1870)

    def envfrom(self, sender: str, *parameters: str) -> int:
        """Note the size of a new message."""
        self.size = 0
        for parameter in parameters if not self.policy.ignore_size else ():
            name, _, value = parameter.partition("=")
            if name.upper() == "SIZE" and re.fullmatch("[0-9]{1,20}", value):
                self.size = int(value)
        return int(Milter.CONTINUE)

    def envrcpt(self, recipient: str, *parameters: str) -> int:
        """Let a recipient through, defer or reject it."""
        decision = self.policy.decide(recipient, self.size)
        self.policy.report(decision)
        reply = decision.reply
        if reply is None or self.policy.dry_run:
            return int(Milter.CONTINUE)
        self.setreply(*reply)
        return int(Milter.TEMPFAIL if reply.code[0] == "4" else Milter.REJECT)


def map_backends(options: argparse.Namespace) -> dict[Optional[str], Backend]:
    """Map domains to backends; None is for all others. Raises ValueError."""
    context = options.cafile or ssl.create_default_context()
    by_domain: dict[Optional[str], Backend] = {}
    by_url: dict[str, Backend] = {}
    for domains, url in options.backend or [parse_backend(DEFAULT_BACKEND)]:
        if url not in by_url:
            by_url[url] = Backend(url, options, context)
        for domain in domains:
            if domain in by_domain:
                raise ValueError(f"{domain or 'all domains'} stands in it twice")
            by_domain[domain] = by_url[url]
    return by_domain


def parse_backend(text: str) -> tuple[list[Optional[str]], str]:
    """Read `[DOMAIN[,DOMAIN...]=]URL`. Raises ArgumentTypeError, which shows no password."""
    match = re.fullmatch(r"(?:([^/:?#=\s]+)=)?(https?://[!-~]+)", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError("is not [DOMAIN[,DOMAIN...]=]http[s]://HOST[:PORT]/PATH")
    try:
        parts = urllib.parse.urlsplit(match[2])
        good = bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise argparse.ArgumentTypeError("has no host, or no port from 1 to 65535")
    if not match[1]:
        return [None], match[2]
    domains = [domain.strip().lower().rstrip(".") for domain in match[1].split(",")]
    if "" in domains:
        raise argparse.ArgumentTypeError("has an empty domain")
    return list(domains), match[2]


def number(kind: Callable[[str], Any], least: float, most: float) -> Callable[[str], Any]:
    """Make a reader of numbers in a range. It raises ArgumentTypeError."""

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        raise argparse.ArgumentTypeError(f"is not a number from {least:g} to {most:g}")

    return read


def listen_socket(text: str) -> str:
    """Check libmilter's syntax of a socket. Raises ArgumentTypeError."""
    match = re.fullmatch(r"inet6?:(\d{1,5})(?:@[^@\s]+)?|(?:unix|local):/.+", text)
    if not match or match[1] and not 0 < int(match[1]) < 65536:
        raise argparse.ArgumentTypeError("is not inet:PORT@HOST, inet6:PORT@HOST or unix:/PATH")
    return text


def trust(file: str) -> ssl.SSLContext:
    """Read the certificates to trust. Raises ArgumentTypeError."""
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be used: {error}") from None


def exempt(text: str) -> str:
    """Check `user` or `user@domain`. Raises ArgumentTypeError."""
    if not text.partition("@")[0]:
        raise argparse.ArgumentTypeError("is neither user nor user@domain")
    return text


class OptionParser(argparse.ArgumentParser):
    """Reads one option and its value from a line of a file, and reports an error in one line."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split a line of an @FILE; a comment starts the line or follows white space."""
        line = re.sub(r"(^|\s)#.*", "", arg_line).strip()
        match = re.fullmatch(r"(--[\w-]+)(?:\s*=\s*|\s+)(.*)", line)
        if not match or match[1] == "--check":
            return line.split()
        value = match[2]
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        return [f"{match[1]}={value[1:-1] if quoted else value}"]

    def error(self, message: str) -> NoReturn:
        """End the start with one line, that shows no password of a URL, and status 2."""
        line = re.sub(r"//\S*@", "//...@", " ".join(message.split()))
        self.exit(2, f"{self.prog}: error: {line}\n")


VALUES: list[tuple[str, Any, Callable[[str], Any], str, str]] = [
    # Options with one value: name, default, type, what stands for the value, help.
    (
        "listen",
        "inet:8894@127.0.0.1",
        listen_socket,
        "SOCKET",
        "inet:PORT@HOST, inet6:..., unix:/PATH",
    ),
    ("timeout", 5, number(float, 0.01, DAY), "SECONDS", "whole budget of a question"),
    (
        "retry-after",
        10,
        number(float, 0, DAY),
        "SECONDS",
        "how long a backend that failed is not asked",
    ),
    ("max-queries", 16, number(int, 1, 9999), "N", "questions to one backend at a time"),
    (
        "cache-ttl",
        60,
        number(float, 0, DAY),
        "SECONDS",
        "how long an answer is used again; 0: never",
    ),
    ("overquota-reply", OVERQUOTA, Reply.parse, "REPLY", "for a full mailbox"),
    ("toolarge-reply", TOOLARGE, Reply.parse, "REPLY", "for what a whole quota cannot hold"),
    ("unknown-reply", None, Reply.parse, "REPLY", "for UNKNOWN (let through)"),
    ("recipient-delimiter", "+", str, "CHARS", "john+lists is asked about as john; empty: off"),
    ("cafile", None, trust, "FILE", "certificates to trust for https (the system's)"),
]
LISTS: list[tuple[str, Callable[[str], Any], str, str]] = [
    # Options that may be repeated.
    ("backend", parse_backend, "[DOMAIN[,DOMAIN...]=]URL", f"URL to ask ({DEFAULT_BACKEND})"),
    ("exempt", exempt, "ADDRESS", "user or user@domain that is never asked about"),
    ("aliases", str, "FILE", "in the form of aliases(5) or virtual(5)"),
]
FLAGS = [
    ("ignore-size", "do not look at the size that the sender declares"),
    ("case-sensitive", "do not fold the user to lower case"),
    ("dry-run", "log what would be answered, let everything through"),
    ("syslog", "log to syslog, facility mail, rather than to standard error"),
    ("verbose", "log a line for every recipient"),
]


def option_parser() -> OptionParser:
    """Describe the command line (interface section 2)."""
    parser = OptionParser(
        usage="%(prog)s [@FILE] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
    )
    for name, default, kind, metavar, text in VALUES:
        text += "" if default is None else " (%(default)s)"
        parser.add_argument(f"--{name}", default=default, type=kind, metavar=metavar, help=text)
    for name, kind, metavar, text in LISTS:
        parser.add_argument(
            f"--{name}", default=[], type=kind, metavar=metavar, help=text, action="append"
        )
    for name, text in FLAGS:
        parser.add_argument(f"--{name}", help=text, action="store_true")
    parser.add_argument(
        "--on-error",
        choices=("accept", "tempfail"),
        default="accept",
        help="a recipient whose backend gives a fault (%(default)s)",
    )
    parser.add_argument("--check", nargs="+", metavar="ADDRESS", help="ask now, print the verdicts")
    parser.add_argument("--version", action="version", version="quota_milter " + VERSION)
    return parser


@contextlib.contextmanager
def log_to(syslog: bool) -> Iterator[None]:
    """Log in a thread of its own: no full pipe or slow syslogd holds mail up. Raises OSError."""
    handler: logging.Handler
    if syslog:
        facility = logging.handlers.SysLogHandler.LOG_MAIL
        handler = logging.handlers.SysLogHandler("/dev/log", facility)
        handler.ident = f"quota_milter[{os.getpid()}]: "
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s quota_milter: %(message)s"))
    lines: queue.Queue[logging.LogRecord] = queue.Queue(LOG_LENGTH)
    listener = logging.handlers.QueueListener(lines, handler)
    listener.start()
    log.addHandler(logging.handlers.QueueHandler(lines))
    log.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a line that cannot be written is lost, nothing else
    try:
        yield
    finally:  # a full pipe that nobody reads must not hold up the end
        stopper = threading.Thread(target=listener.stop, daemon=True)
        stopper.start()
        stopper.join(STOPPING)


def check(policy: Policy, addresses: list[str]) -> int:
    """Print a verdict for each address and return the exit status of --check."""
    status = 0
    for address in addresses:
        decision = policy.decide(address, 0)
        reply = " ".join(decision.reply) if decision.reply else "none"
        with contextlib.suppress(BrokenPipeError):  # who reads no line may want the status
            print(decision, f"reply={reply}")
        found = 2 if decision.heard.fault else 1 if decision.reply else 0
        status = max(status, found)
    return status


def socket_address(where: str) -> tuple[int, Any]:
    """Turn libmilter's syntax of a socket into the family and address of the socket module."""
    kind, _, rest = where.partition(":")
    if kind not in ("inet", "inet6"):
        return socket.AF_UNIX, rest
    port, _, host = rest.partition("@")
    family = socket.AF_INET6 if kind == "inet6" else socket.AF_INET
    return family, (host.strip("[]"), int(port))


def claim(where: str) -> None:
    """See that a socket can be listened on, and remove a stale one. Raises OSError."""
    family, address = socket_address(where)
    if family == socket.AF_UNIX:
        with socket.socket(family) as probe:
            probe.settimeout(1)
            try:
                probe.connect(address)
                raise OSError("somebody answers there")
            except FileNotFoundError:
                pass
            except ConnectionRefusedError:
                if not stat.S_ISSOCK(os.stat(address).st_mode):
                    raise OSError("it is a file, not a socket") from None
                os.unlink(address)
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
    if family == socket.AF_UNIX:
        os.unlink(address)


def stop(where: str) -> None:
    """Make libmilter stop, which it does only when somebody connects or five seconds have gone."""

    def knock() -> None:
        family, address = socket_address(where)
        with contextlib.suppress(OSError), socket.socket(family) as client:
            client.connect(address)

    threading.Timer(0.1, knock).start()
    Milter.stop()


def serve(policy: Policy, where: str) -> threading.Thread:
    """Start libmilter, in a thread: else it would end at HUP and let no handler run."""
    Milter.factory = lambda: QuotaMilter(policy)
    Milter.set_exception_policy(Milter.CONTINUE)  # a fault of ours refuses nothing
    arguments = ("quota_milter", where, 0, False)
    thread = threading.Thread(target=Milter.runmilter, args=arguments, daemon=True)
    thread.start()
    return thread


def run(policy: Policy, where: str) -> int:
    """Serve the MTA at a socket until TERM or INT; return the exit status. Raises OSError."""
    claim(where)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # libmilter spins when it has none
    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1:
        signal.signal(number, lambda number, frame: events.put(number))
    thread = serve(policy, where)
    log.info("listen=%s state=started version=%s", where, VERSION)
    event = 0
    while thread.is_alive() and event not in (signal.SIGTERM, signal.SIGINT):
        if event == signal.SIGUSR1:
            policy.log_counters()
        policy.tidy(forget=event == signal.SIGHUP)
        if event == signal.SIGHUP:
            log.info("listen=%s state=reloaded options=unchanged", where)
        try:
            event = events.get(timeout=TICK)
        except queue.Empty:
            event = 0
    ended_by_itself = not thread.is_alive()
    stop(where)
    thread.join(STOPPING)
    with contextlib.suppress(OSError):
        claim(where)  # which removes our unix socket, but not one that a successor has made
    policy.log_counters()
    log.info("listen=%s state=stopped", where)
    return int(ended_by_itself)


def main(argv: Optional[list[str]] = None) -> int:
    """Run the program and return its exit status. Raises SystemExit where an option is bad."""
    parser = option_parser()
    option = "@FILE"
    try:
        options = parser.parse_args(argv)
        option = "--syslog"
        with log_to(options.syslog):
            option = "--backend"
            backends = map_backends(options)
            option = "--aliases"
            policy = Policy(options, backends)
            option = "--check" if options.check else f"--listen: {options.listen}"
            return check(policy, options.check) if options.check else run(policy, options.listen)
    except RecursionError:
        parser.error("argument @FILE: the file reads itself")
    except (OSError, ValueError) as error:
        parser.error(f"argument {option}: {error}")


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(status)  # a name look-up that hangs must not hold up the end
