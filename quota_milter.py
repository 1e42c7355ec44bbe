#!/usr/bin/python3
"""quota_milter.py - refuse mail for full mailboxes at the frontend, before it is taken.

USE
    quota_milter.py [@FILE] [options]              answer Sendmail or Postfix
    quota_milter.py --check [ADDRESS...] [options] ask now, print the verdicts

    At each RCPT the backend that has the mailbox is asked over HTTP (quota.cgi
    or maildir_quota.cgi there: `GET URL?u=USER&d=DOMAIN`). A recipient who is
    over quota gets `452 4.2.2 Quota exceeded for ...`, a temporary failure.

    An answer is remembered for a while. What was taken since counts as in flight
    to its mailbox, and at the end of the data, when the size of the message is
    known, it is looked at once more: many messages at once overfill no mailbox,
    but where one has several recipients and fits into some of their mailboxes.

    A file given as @FILE holds one option and its value a line, `#` comments.
    TERM and INT end the program, HUP makes it forget its answers and read option
    files and aliases again, USR1 logs its counters. --check ends with status 0
    where all would be accepted, 1 where one would be refused, 2 where a backend
    could not be asked or there is none.

WHEN SOMETHING FAILS
    Where a backend cannot be asked within --timeout its last answer counts, for up
    to an hour, after that --on-error, which lets mail through. A backend that
    cannot be reached is not asked for --retry-after seconds. No recipient waits
    for longer than --timeout. What went wrong is in the log, a line each.

SECURITY
    Believes what its backends answer. Never trusts an address: it is escaped
    before it is asked about, answered or logged. Uses no proxies, follows no
    redirects, needs no privilege: run it as a user of its own. Passwords in
    --backend are seen in the list of processes: put them into a file.

HOW IT IS MADE
    A callback of QuotaMilter asks the Policy, which finds a recipient's mailbox
    through the Aliases and asks the Mailboxes of its domain: these look into the
    Ledger, else ask one Backend after the other through its Client, as long as its
    Breaker allows. libmilter calls from many threads: what they share is in the
    Ledger, the Backends, the Tables and the Counters, each with locks of its own.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # before the imports, which take a while
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it serves: no traceback
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it serves: no end
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # in all threads but one

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import email.utils
import errno
import http.client
import itertools
import logging
import logging.handlers
import os
import queue
import re
import resource
import select
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, ClassVar, NamedTuple, NoReturn, Optional, Union

try:
    import Milter
except ImportError:
    sys.exit("quota_milter.py: pymilter is missing: apt-get install python3-milter")

VERSION = "2.0"
DEFAULT_BACKEND = "http://127.0.0.1:8025/cgi-bin/quota.cgi"

ANSWER_LENGTH = 4096  # bytes read of an answer: a line with the longest of names is far below
DIGITS = 20  # the longest number that is read: more does not fit 64 bits
ANSWERS = 50_000  # mailboxes remembered, in some 25 MB with names of usual length
FORGOTTEN = 10_000  # answers of before a HUP that messages which have begun may still need
ROUTES = 10_000  # recipients of whom it is remembered which mailbox they are, in some 10 MB
LONG_NAME = 320  # characters above which nothing is remembered of a name (RFC 3696: 64 + 1 + 255)
LONG_MESSAGE = 600  # seconds from RCPT to the end of a message that a HUP comes between
LAST_KNOWN = 3600  # seconds for which an answer may stand in for a backend that gives faults
IDLE = 4  # seconds for which a connection rests at most: quota.cgi --serve closes it after 10
IDLE_CONNECTIONS = 16  # that rest at a time for each backend
OVERDUE = 60  # seconds for which a question may go on after its deadline
PATIENCE = 3  # questions in a row that run out of time before a backend is not asked any more
HEADERS = 1024  # bytes that mail servers add to a message on its way: Received and others
STEPS = 1000  # that aliases may take to a mailbox, as Postfix's virtual_alias_recursion_limit
TABLE_QUERIES = 8  # postmap processes at a time for each table: each costs a few milliseconds
TABLE_RESULTS = 10_000  # names of which a table's result is remembered
ADDRESS_LENGTH = 256  # characters of an address in a reply: the longest path of RFC 5321, 4.5.3.1.3
REPLY_LENGTH = 480  # characters of a reply's text: with its codes below 512 (RFC 5321, 4.5.3.1.5)
LOG_LENGTH = 10_000  # lines that may wait to be written
TICK = 1  # seconds between two looks at the alias files and at overdue questions
METRICS_EVERY = 15  # seconds
DAY = 86400  # seconds
LAST_QUESTIONS = 1  # seconds that questions under way get when the program is to end
STOPPING = 1.7  # seconds that all of the end may take
IDLE_THREADS = 32  # that take signals which the main thread cannot take in that moment
AGAIN = -1  # instead of an exit status: start anew

OVERQUOTA = "452 4.2.2 Quota exceeded for {address}, try again later"
TOOLARGE = "552 5.2.3 Message is larger than the quota of {address}"
INACTIVE = "552 5.2.2 Mailbox of {address} is full and not in use"
REFUSED = ("overquota", "toolarge", "inactive")  # there is no room for the message
VERDICTS = ("ok", *REFUSED, "unknown", "fault", "empty", "exempt", "alias", "nobackend")
DOWN = "the backend is down and is left alone for a while"
NO_TURN = "there was no turn for the question in time"
HINTS = {  # what an administrator has usually got wrong
    401: ": is the password in --backend right?",
    403: ": may this address ask (QUOTA_ALLOW, the web server's rule)?",
    404: ": is the path in --backend right?",
}

SOURCE_ROUTE = re.compile(r"^(?:@(?:\[[^\]]*\]|[^\[@,:])*,?)+:")
ALIAS = re.compile(
    r"""( "(?:\\.|[^"\\])*" (?:@[^\s:]+)? | [^\s:"][^\s:]* )  # a name, which may be quoted
        (?: \s*:\s* | \s+ )                                 # aliases(5) `:`, virtual(5) a space
        (\S.*)""",
    re.VERBOSE,
)
TARGET = re.compile(
    r"""(\\?)                                     # behind a backslash: whatever the aliases say
        (?! "?[|/:] | \w+: )                      # no program, file, include or `error:`
        ( (?: "(?:\\.|[^"\\])*" | [^\s,"] )+ )    # one mailbox, no list""",
    re.VERBOSE,
)

log = logging.getLogger("quota_milter")


# ---- Values: Mailbox, Address, Reply, Answer, Finding, Decision ----


def printable(text: object) -> str:
    """Escape all but printable ASCII; quote what would break a line of `key=value`."""
    raw = str(text).encode("utf-8", "surrogateescape")
    escaped = "".join(
        chr(c) if 0x20 <= c <= 0x7E and c not in b'"\\' else f"\\x{c:02x}" for c in raw
    )
    return escaped if escaped and not re.search("[ =]", escaped) else f'"{escaped}"'


def lower(text: str) -> str:
    """Fold ASCII letters only, as mail servers do: others depend on a language."""
    return text.encode("utf-8", "surrogateescape").lower().decode("utf-8", "surrogateescape")


class Mailbox(NamedTuple):
    """What a backend is asked about."""

    user: str
    domain: str  # lower case, "" where there is none

    @property
    def is_long(self) -> bool:
        return len(self.user) + len(self.domain) > LONG_NAME


class Address(NamedTuple):
    """A recipient, as it was given and as a backend is asked about it (README, Options)."""

    given: str  # without angle brackets
    local: str  # unquoted local part
    user: str  # the local part without the tail behind a delimiter
    domain: str  # lower case, "" where there is none

    @classmethod
    def parse(cls, text: str, delimiters: str, case_sensitive: bool) -> Address:
        """Read an envelope address (RFC 5321, 4.1.2). It never fails."""
        given = without_brackets(text)
        local, at, domain = SOURCE_ROUTE.sub("", given).rpartition("@")
        if not at or domain.endswith('"'):  # the @ stands in a quoted local part
            local, domain = local + at + domain, ""
        if '"' in local or "\\" in local:
            local = re.sub(r'\\(.)|"', r"\1", local, flags=re.DOTALL)
        if not case_sensitive:
            local = lower(local)
        domain = lower(domain[:-1] if domain[-1:] == "." else domain)
        return cls(given, local, without_detail(local, delimiters), domain)

    @property
    def mailbox(self) -> Mailbox:
        return Mailbox(self.user, self.domain)

    def names(self) -> list[str]:
        """Give the names by which tables list this address, the most specific first."""
        local, user = lower(self.local), lower(self.user)
        return [f"{local}@{self.domain}", f"{user}@{self.domain}", local, user]


def without_brackets(path: str) -> str:
    return path[1:-1] if path[:1] == "<" and path[-1:] == ">" else path


def without_detail(local: str, delimiters: str) -> str:
    """Drop what follows the first delimiter, except from the names that Postfix leaves whole."""
    # With the delimiter `-` owner-NAME and NAME-request stay whole, too: mailing lists have them.
    name = lower(local)
    is_role = "-" in delimiters and (name.startswith("owner-") or name.endswith("-request"))
    if is_role or not delimiters or name in ("postmaster", "mailer-daemon", "double-bounce"):
        return local
    return re.split(f"[{re.escape(delimiters)}]", local, maxsplit=1)[0] or local


class Reply(NamedTuple):
    """An SMTP reply whose text may name the recipient as `{address}`."""

    code: str
    enhanced: str  # RFC 3463
    text: str

    @classmethod
    def from_template(cls, template: str) -> Reply:
        """Read `452 4.2.2 text`. Raises ArgumentTypeError."""
        pattern = r"(([45])[0-9]{2}) (\2\.[0-9]{1,3}\.[0-9]{1,3}) (([^{}%]|{address}){1,200})"
        match = re.fullmatch(pattern, template)
        if not match or not template.isascii() or not template.isprintable():
            raise ArgumentTypeError("is not 452 4.2.2 TEXT, without %, { and } but {address}")
        if match[1] == "421":
            raise ArgumentTypeError("is a 421, which would end the whole session")
        return cls(match[1], match[3], match[4])

    @property
    def is_permanent(self) -> bool:
        return self.code[0] == "5"

    def to(self, address: str) -> Reply:
        """Put the address in: printable ASCII without %, which libmilter takes for a format."""
        if len(address) > ADDRESS_LENGTH:
            address = address[:ADDRESS_LENGTH] + "..."
        text = self.text.replace("{address}", re.sub("[^ -~]|%", "?", address))
        return self._replace(text=text[:REPLY_LENGTH])


DEFERRED = Reply.from_template(OVERQUOTA)
CANNOT_CHECK = Reply("451", "4.3.0", "The mailbox of {address} cannot be checked, try again later")


@dataclasses.dataclass(eq=False)  # two that say the same are two
class Answer:
    """What a backend said of a mailbox; figures in bytes, None where not known."""

    status: str
    used: Optional[int] = None
    quota: Optional[int] = None  # 0: no limit
    name: bytes = b""  # of the mailbox, as the answer has it
    grace: int = 0  # what the message that fills the mailbox may take beyond the quota
    changed: Optional[float] = None  # seconds since 1970: a delivery, or the user
    source: str = ""  # the name of the backend that gave it
    at: float = dataclasses.field(default_factory=time.monotonic)  # when it was asked for
    taken: int = 0  # bytes of the mail that it does not know of: the Ledger counts them

    @classmethod
    def from_line(cls, line: bytes, is_whole: bool = True) -> Answer:
        """Read `STATUS user used quota` (README, Protocol). Raises BadAnswer."""
        # Of a line that may be cut short the numbers are not known: of 209715200 there is perhaps
        # 20 left, which would be a permanent refusal.
        status, *fields = line.rstrip(b"\r\n").split(b" ")
        if status not in (b"OK", b"OVERQUOTA", b"UNKNOWN"):
            raise BadAnswer(f"no status in the answer {line[:80]!r}: is the URL right?")
        name, numbers = fields[:1], [b"", b""]
        if len(fields) > 2:  # a lone number may be either
            name, numbers = fields[:-2], fields[-2:]
        used, quota = (read_number(number) if is_whole else None for number in numbers)
        return cls(status.decode(), used, quota, b" ".join(name))

    @property
    def known_used(self) -> Optional[int]:
        """A mailbox that does not exist yet has a quota and no size in some answers: 0 bytes."""
        return 0 if self.used is None and self.quota is not None else self.used

    @property
    def most(self) -> int:
        """How many bytes the mailbox can ever hold, 0 where there is no limit."""
        return self.quota + self.grace if self.quota else 0


def read_number(text: bytes) -> Optional[int]:
    """Read a plain non-negative integer; None where it is something else."""
    return int(text) if text.isdigit() and len(text) <= DIGITS else None


def read_date(text: str) -> Optional[float]:
    """Read an HTTP date (RFC 9110, 5.6.7) as seconds since 1970; None for nonsense."""
    try:
        seconds = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError, OSError):
        return None
    return seconds if seconds > 0 else None


class Fault(Exception):
    """A backend or a table did not answer; the text says why, for the log."""


class BadAnswer(Fault):
    """It answered, but with no verdict: it is not down."""


class Unreachable(Fault):
    """There is no connection to it: that concerns all mailboxes."""


class Finding(NamedTuple):
    """What is known of a mailbox now: a fault may come with the last known answer."""

    answer: Optional[Answer] = None
    cached: bool = False
    fault: str = ""


class Decision(NamedTuple):
    """What is to be done with a recipient, and why."""

    address: Address
    target: Optional[Address]  # whose mailbox was asked about, None where nothing was
    verdict: str
    reply: Optional[Reply]  # None: let it through
    finding: Finding
    seconds: float

    def __str__(self) -> str:
        answer = self.finding.answer or Answer("")
        used, quota = ("-" if n is None else n for n in (answer.used, answer.quota))
        user = printable(self.target.user) if self.target else "-"
        cached = "yes" if self.finding.cached else "no"
        reason = f" reason={printable(self.finding.fault)}" if self.finding.fault else ""
        return (
            f"recipient={printable(self.address.given)} user={user} verdict={self.verdict}"
            f" used={used} quota={quota} cached={cached} ms={round(self.seconds * 1000)}{reason}"
        )


# ---- Client: one URL; a mailbox in, an Answer or a Fault out ----


class Question:
    """A question that is under way: what other threads may know of it and do with it."""

    def __init__(self, mailbox: Mailbox, generation: int, asked: float, seconds: float) -> None:
        self.mailbox, self.generation = mailbox, generation
        self.asked, self.seconds = asked, seconds
        self.deadline = asked + seconds  # of the session that asked; then it is overdue
        self.begun = 0.0  # when a thread took it; 0: it waits for its turn
        self.is_given_up = False  # nobody waits for it any more
        self.aborted = ""  # why
        self.socket: Optional[socket.socket] = None
        self.future: concurrent.futures.Future[Answer]  # for all sessions that want to know

    def hangs(self, now: float, last_answered: float) -> bool:
        """Say whether it is overdue, or has had half its time and a later one was answered."""
        if not self.begun:
            return False
        had_half = now - self.begun > self.seconds / 2
        return now >= self.deadline or had_half and self.begun < last_answered

    def attach(self, sock: socket.socket) -> None:
        """Note the connection. From here on `hang_up` bounds the time, not the socket."""
        sock.settimeout(OVERDUE)
        self.socket = sock
        if self.aborted:  # between the connection and this line
            self.hang_up(self.aborted)

    def hang_up(self, why: str) -> None:
        """Make it end now: whoever reads from its connection finds the end of file."""
        self.aborted = why
        if self.socket is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                # Not SSLSocket.shutdown, which would drop the TLS state under the reader.
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


class RequestHandler(urllib.request.BaseHandler):
    """Sends a urllib request over the connection that comes with it.

    With no other handler beside this one urllib follows no redirect, uses no proxy of the
    environment, opens nothing else and leaves every status to us.
    """

    def http_open(self, request: Any) -> http.client.HTTPResponse:
        connection: http.client.HTTPConnection = request.connection
        connection.request("GET", request.selector, headers=dict(request.header_items()))
        return connection.getresponse()

    https_open = http_open


class Client:
    """Asks one URL. Connections are kept where the server offers that by a header Keep-Alive.

    A minimal server may send no length and serve one client at a time: it is told to close.

    What a server sends too much or too late must not become the answer to the next question, which
    is another user's. So a connection is kept after a complete answer about the mailbox that was
    asked about, and for nothing else; it is used again for the same domain, as an answer names only
    the user; and there an answer that names another user is thrown away.
    """

    def __init__(self, url: str, context: ssl.SSLContext, timeout: float) -> None:
        parts = urllib.parse.urlsplit(url)
        self.host = parts.netloc.rpartition("@")[2]
        self.url = parts._replace(netloc=self.host, path=parts.path or "/", fragment="").geturl()
        self.context, self.timeout = context, timeout
        self.headers = {"User-Agent": "quota_milter/" + VERSION}
        if parts.username is not None:
            secret = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
            encoded = base64.b64encode(secret.encode()).decode()
            self.headers["Authorization"] = "Basic " + encoded
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(RequestHandler())
        self.offers_to_keep = False
        self.lock = threading.Lock()
        # Kept connections: since when they rest, and the domain of their last question.
        self.idle: dict[http.client.HTTPConnection, tuple[float, str]] = {}  # the latest at the end

    def fetch(self, question: Question) -> Answer:
        """Send the question and read the answer. All that can go wrong raises Fault."""
        # Trouble on a kept connection says nothing of the server, which may have closed it in that
        # very moment: then the same question goes out once more, on a new one.
        kept = self.take_idle(question.mailbox.domain)
        if kept:
            try:
                return self.exchange(question, kept, is_kept=True)
            except Fault as fault:
                is_late = time.monotonic() >= question.deadline
                if question.aborted or is_late or isinstance(fault, BadAnswer):
                    raise
            self.close_idle(0)  # all: they are as old as the one that made trouble
        return self.exchange(question, self.connect(), is_kept=False)

    def exchange(
        self, question: Question, connection: http.client.HTTPConnection, is_kept: bool
    ) -> Answer:
        user, domain = question.mailbox
        request: Any = self.request(user, domain)
        request.connection = connection
        question.attach(connection.sock)
        try:
            with self.opener.open(request) as response:
                answer, may_keep = read_answer(response)
            names_it = answer.name == user.encode("utf-8", "surrogateescape")
            if is_kept and not names_it:  # on a new one a server may spell it in its own way
                raise Fault("the answer is about another mailbox")
        except Exception as error:  # urllib's, http.client's and ssl's have no common base
            connection.close()
            if isinstance(error, Fault) and not question.aborted:
                raise
            raise Fault(question.aborted or repr(error)) from None  # what is cut is no answer
        self.offers_to_keep = "Keep-Alive" in response.headers
        if may_keep and names_it and not question.aborted:
            with self.lock:
                self.idle[connection] = time.monotonic(), domain
        else:
            connection.close()
        return answer

    def request(self, *mailbox: str) -> urllib.request.Request:
        """Make the request about a user and domain (README, Protocol)."""
        user, domain = (urllib.parse.quote(n, safe="", errors="surrogateescape") for n in mailbox)
        query = f"u={user}&d={domain}" if domain else f"u={user}"
        url = self.url + ("&" if "?" in self.url else "?") + query
        keep = "keep-alive" if self.offers_to_keep else "close"
        return urllib.request.Request(url, headers={**self.headers, "Connection": keep})

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection. Raises Unreachable."""
        # It gets the whole timeout: who got a turn late connects late, and that is no reason to
        # call the server unreachable.
        host, timeout = self.host, self.timeout
        connection = http.client.HTTPConnection(host, timeout=timeout)
        if self.url.startswith("https:"):
            connection = http.client.HTTPSConnection(host, timeout=timeout, context=self.context)
        try:
            connection.connect()
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be looked up
            connection.close()
            hint = ": see --cafile" if isinstance(error, ssl.SSLCertVerificationError) else ""
            raise Unreachable(f"no connection: {error}{hint}") from None
        return connection

    def take_idle(self, domain: str) -> Optional[http.client.HTTPConnection]:
        """Take the latest kept connection of a domain, unless there is something to read on it."""
        # That would be its end, or a stray answer.
        self.close_idle(IDLE)
        with self.lock:
            for connection in reversed([c for c in self.idle if self.idle[c][1] == domain]):
                poll = select.poll()
                poll.register(connection.sock, select.POLLIN)
                if not poll.poll(0):
                    del self.idle[connection]
                    return connection
        return None

    def close_idle(self, seconds: float) -> None:
        """Close those that have rested for `seconds` or more, and the oldest of too many."""
        latest = time.monotonic() - seconds
        with self.lock:
            surplus = list(self.idle)[:-IDLE_CONNECTIONS]
            for connection, (since, _) in list(self.idle.items()):
                if since <= latest or connection in surplus:
                    del self.idle[connection]
                    connection.close()


def read_answer(response: http.client.HTTPResponse) -> tuple[Answer, bool]:
    """Read an answer, and whether its connection may be kept. Raises Fault, HTTPException."""
    # Proof that the line is whole is its end, the length in the header, or the last chunk.
    if response.status < 200:  # an interim response, which is no answer
        raise http.client.HTTPException(f"status {response.status}")
    line = response.readline(ANSWER_LENGTH)
    ended = response.length == 0 or response.chunked and response.chunk_left is None
    is_whole = line.endswith(b"\n") or ended
    if response.status != 200:
        why = line[:200].decode("ascii", "replace").strip() if line[:6] == b"ERROR " else ""
        hint = HINTS.get(response.status, "")
        raise BadAnswer(f"status {response.status} {why or response.reason[:80]}{hint}")
    if not is_whole and (response.length or len(line) >= ANSWER_LENGTH):
        raise BadAnswer("the answer is cut short or too long")
    answer = Answer.from_line(line, is_whole)
    grace = response.headers.get("Quota-Grace", "").strip().encode("ascii", "replace")
    changed = response.headers.get("Last-Modified", "")
    answer.grace, answer.changed = read_number(grace) or 0, read_date(changed)
    may_keep = "Keep-Alive" in response.headers and not response.will_close
    return answer, may_keep and response.length == 0


# ---- Breaker: may this backend be asked now? ----


class Breaker:
    """Counts what speaks against a backend; the Backend holds its lock around every call.

    Closed: it is asked. Open: it is not, until `retry_at`. Then one question tries it, and its
    outcome closes the breaker or opens it for as long again. No question counts against a
    backend that has answered anybody since it was asked: it works, and what hangs is one mailbox.
    """

    def __init__(self, backend: Backend, retry_after: float) -> None:
        self.backend = backend  # whose name is for the log
        self.retry_after = retry_after  # seconds
        self.is_open = False
        self.retry_at = self.answered_at = 0.0  # on the monotonic clock
        self.timeouts = 0  # in a row

    def allows(self, now: float) -> bool:
        return not self.is_open or now >= self.retry_at

    def begin_trial(self, now: float) -> None:
        """Note that a question goes out: while it is open no other one follows for a while."""
        self.retry_at = now + self.retry_after

    def record_answer(self) -> None:
        if self.is_open:
            log.warning("backend=%s state=up", self.backend.name)
        self.is_open, self.timeouts, self.answered_at = False, 0, time.monotonic()

    def record_unreachable(self, asked: float, why: str) -> None:
        """Open it, unless somebody was answered since the question was asked."""
        if self.answered_at < asked:
            if not self.is_open:
                reason = printable(why)
                log.warning("backend=%s state=down reason=%s", self.backend.name, reason)
            self.is_open, self.retry_at = True, time.monotonic() + self.retry_after

    def record_timeout(self, asked: float) -> None:
        """Count a question that ran out of time, and open it after a few in a row."""
        self.timeouts += self.answered_at < asked
        if self.is_open or self.timeouts >= PATIENCE:
            self.record_unreachable(asked, f"{PATIENCE} questions in a row got no answer in time")


# ---- Backend: a Client, its Breaker and its bounded pool of questions ----


class Backend:
    """Asks a backend `max_queries` questions at a time, and waits for none beyond its deadline.

    All sessions that want to know of one mailbox wait for the same future, none for longer than
    its own deadline. A question goes on when they have given up, so that the answer about a
    mailbox that takes long to count is remembered. Then it is overdue: it must hold up nobody who
    could be answered, so when others wait for a turn, the one that is overdue for longest is
    aborted. So is one that has had half its time and was overtaken by a later one: the backend
    works, it is this mailbox that hangs. A mailbox that hung is not asked about while its question
    goes on, nor for --retry-after seconds when it was aborted.
    """

    def __init__(
        self, client: Client, options: Namespace, ledger: Ledger, counters: Counters
    ) -> None:
        self.client, self.ledger, self.counters = client, ledger, counters
        self.url = client.url.partition("?")[0]
        self.name = self.url  # for the log; of two that differ in their query alone, one gets #2
        self.max_queries: int = options.max_queries
        self.pool = concurrent.futures.ThreadPoolExecutor(self.max_queries)
        self.lock = threading.Lock()  # guards what follows
        self.breaker = Breaker(self, options.retry_after)
        self.questions: dict[tuple[Mailbox, int], Question] = {}  # by mailbox and generation
        self.hung: dict[Mailbox, float] = {}  # mailboxes whose question was aborted; until when
        self.last_answered = 0.0  # when the latest question that was answered had begun

    def ask(self, mailbox: Mailbox, seconds: float, generation: int) -> Answer:
        """Ask about a mailbox, or join the question that is under way. Raises Fault."""
        # The answer is remembered, also when it comes too late; but not UNKNOWN: the mailbox may be
        # elsewhere.
        now = time.monotonic()
        with self.lock:
            answer = self.ledger.fresh(mailbox)
            if answer:  # it came before the lock
                return answer
            question = self.questions.get((mailbox, generation))
            if question is None:
                question = Question(mailbox, generation, now, seconds)
                self.begin(question)
            elif question.deadline <= now:
                raise Fault("the last question about this mailbox still hangs")
        try:
            return question.future.result(max(0, now + seconds - time.monotonic()))
        except concurrent.futures.CancelledError:
            raise Fault(DOWN if self.breaker.is_open else NO_TURN) from None
        except concurrent.futures.TimeoutError:
            if now + seconds >= question.deadline:
                self.give_up(question)
            raise Fault(f"no answer within {round(seconds, 1):g} s") from None

    def begin(self, question: Question) -> None:
        """Give a question to the pool. The lock is held. Raises Fault."""
        if not self.breaker.allows(question.asked):
            raise Fault(DOWN)
        if self.hung.get(question.mailbox, 0) > question.asked:
            raise Fault("this mailbox hung when it was last asked about")
        try:
            question.future = self.pool.submit(self.carry_out, question)
        except RuntimeError as error:  # the system's limit of threads
            question.aborted = f"no thread for a question: {error}"  # the pool has it all the same
            raise Fault(question.aborted) from None
        self.questions[question.mailbox, question.generation] = question
        self.breaker.begin_trial(question.asked)
        self.make_room(question.asked)

    def carry_out(self, question: Question) -> Answer:
        """Ask one question, in a thread of the pool, and learn from what comes. Raises Fault."""
        question.begun = time.monotonic()
        fault: Optional[Exception] = None
        try:
            if question.aborted or question.begun > question.deadline - question.seconds / 10:
                raise Fault(question.aborted or NO_TURN)
            answer = self.client.fetch(question)
            answer.source, answer.at = self.name, question.begun
            if answer.status != "UNKNOWN":
                self.ledger.remember(question.mailbox, answer, question.generation)
            return answer
        except Exception as error:
            fault = error
            raise
        finally:
            with self.lock:
                self.forget(question)  # last, so that who finds no question finds its answer
                if isinstance(fault, Unreachable) and not question.aborted:
                    self.breaker.record_unreachable(question.asked, str(fault))
                    self.abandon_if_down()
                elif fault is None or isinstance(fault, BadAnswer):
                    self.last_answered = max(self.last_answered, question.begun)
                    self.breaker.record_answer()
            seconds = time.monotonic() - question.begun
            self.counters.record_question(self.name, seconds, fault is not None)

    def forget(self, question: Question) -> None:
        """Let the next session ask anew. The lock is held."""
        key = question.mailbox, question.generation
        if self.questions.get(key) is question:
            del self.questions[key]

    def give_up(self, question: Question) -> None:
        """Let a question go on for which nobody waits any more, or drop it if it has not begun."""
        with self.lock:
            if question.is_given_up:  # by another session that waited for it
                return
            question.is_given_up = True
            if question.future.cancel():
                self.forget(question)
            # Who got a turn only in the second half of the time does not speak against the backend.
            elif question.begun and question.begun <= question.deadline - question.seconds / 2:
                self.breaker.record_timeout(question.asked)
                self.abandon_if_down()
            self.make_room(time.monotonic())

    def make_room(self, now: float) -> None:
        """Abort as many hanging questions as others wait for a turn. The lock is held."""
        live = [question for question in self.questions.values() if not question.aborted]
        waiting = len(live) - self.max_queries
        if waiting > 0:
            hanging = [question for question in live if question.hangs(now, self.last_answered)]
            for question in sorted(hanging, key=lambda question: question.deadline)[:waiting]:
                question.hang_up("no answer, and others wait for a turn")
                self.hung[question.mailbox] = now + self.breaker.retry_after

    def abandon_if_down(self) -> None:
        """Give up all that is under way to a backend that is down. The lock is held."""
        if self.breaker.is_open:
            for question in self.questions.values():
                question.future.cancel()
                question.hang_up(DOWN)
            self.questions.clear()

    def end_overdue(self) -> None:
        """End the questions for which nobody has waited for too long, and make room."""
        now = time.monotonic()
        with self.lock:
            for question in self.questions.values():
                if now - question.deadline > OVERDUE:
                    question.hang_up("no answer")
            self.hung = {mailbox: until for mailbox, until in self.hung.items() if until > now}
            self.make_room(now)
        self.client.close_idle(IDLE)


# ---- Ledger: what is remembered and what is in flight, for each mailbox ----


class Flight:
    """What was taken for a mailbox and is not yet in the figures that its backend gives."""

    def __init__(self) -> None:
        self.used: Optional[int] = None  # the figure from which growth is counted
        self.source = ""  # the name of the backend that gave it
        self.parts: collections.deque[tuple[float, int]] = collections.deque()  # until when, bytes
        self.size = 0  # bytes of all parts

    def drop_old(self, now: float) -> None:
        """Drop the parts whose time is over: growth by so much is theirs, not that of others."""
        while self.parts and self.parts[0][0] <= now:
            size = self.parts.popleft()[1]
            self.size -= size
            self.used = None if self.used is None else self.used + size

    def deduct(self, answer: Answer) -> None:
        """Take away, the oldest first, what the growth of `used` shows to have arrived."""
        used = answer.known_used
        if used is None or answer.status == "UNKNOWN":  # perhaps its users cannot be looked up
            return
        grown = 0 if self.used is None else used - self.used
        if grown < 0 and answer.source != self.source:  # a stand-by, whose figure may be an old one
            return
        self.used, self.source = used, answer.source
        while grown > 0 and self.parts:
            until, size = self.parts.popleft()
            if size > grown:
                self.parts.appendleft((until, size - grown))
            self.size -= min(size, grown)
            grown -= size


class Ledger:
    """Remembers answers, and counts what is in flight: mail that was taken since.

    Nothing is reserved at RCPT: whoever opens sessions and sends nothing must not fill anybody's
    mailbox. At the end of the data the Policy decides and adds in one step, holding `lock`, so
    that of many sessions no two take the same room.

    What is in flight ends after --in-flight seconds, or when a newer answer shows it. But an answer
    that is used for longer, as the last known one is, has all counted that was taken since.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # guards every change of what follows
        self.cache_ttl = self.in_flight = 0.0  # seconds
        self.frontends = 1
        self.generation = 0  # of the answers: one that was asked for before a HUP is not kept
        self.answers: dict[Mailbox, Answer] = {}  # oldest first
        self.forgotten: dict[Mailbox, Answer] = {}  # those before a HUP
        self.flights: dict[Mailbox, Flight] = {}

    def configure(self, options: Namespace) -> None:
        """Take the options and forget the answers, but not what is in flight."""
        with self.lock:
            self.cache_ttl, self.in_flight = options.cache_ttl, options.in_flight
            self.frontends = options.frontends
            self.generation += 1
            earliest = time.monotonic() - LONG_MESSAGE
            known = [*self.forgotten.items(), *self.answers.items()][-FORGOTTEN:]
            self.forgotten = {box: answer for box, answer in known if answer.at > earliest}
            self.answers = {}

    def last(self, mailbox: Mailbox) -> Optional[Answer]:
        """Give the last answer about a mailbox that is under an hour old."""
        answer = self.answers.get(mailbox)
        if answer and time.monotonic() - answer.at < max(LAST_KNOWN, self.cache_ttl):
            return answer
        return None

    def newest(self, mailbox: Mailbox) -> Optional[Answer]:
        """Give the last answer, also of before a HUP, which a message may have begun with."""
        return self.last(mailbox) or self.forgotten.get(mailbox)

    def fresh(self, mailbox: Mailbox) -> Optional[Answer]:
        """Give the answer that may be used again without a question."""
        # It is asked again when mail that it does not know of is no longer in flight: whether that
        # has arrived only a new answer can tell.
        answer = self.answers.get(mailbox)
        if answer is None or time.monotonic() - answer.at >= self.cache_ttl:
            return None
        if answer.taken and answer.taken > self.flight_size(mailbox):
            return None
        return answer

    def remember(self, mailbox: Mailbox, answer: Answer, generation: int) -> None:
        """Keep an answer as the newest, and not too many."""
        if mailbox.is_long:
            return
        with self.lock:
            # Of mail that was taken after the question began it knows nothing; where that may be
            # in flight no longer, it would be counted nowhere.
            is_late = 0 < self.in_flight < time.monotonic() - answer.at
            held = self.answers.get(mailbox)
            if generation != self.generation or is_late or held and held.at > answer.at:
                return
            self.answers.pop(mailbox, None)
            self.answers[mailbox] = answer
            if len(self.answers) > ANSWERS:
                del self.answers[next(iter(self.answers))]
            flight = self.flights.get(mailbox)
            if flight:
                flight.drop_old(time.monotonic())
                flight.deduct(answer)
                answer.taken = flight.size

    def flight_size(self, mailbox: Mailbox) -> int:
        """Give the bytes that are on their way to a mailbox."""
        flight = self.flights.get(mailbox)
        if flight is None:
            return 0
        with self.lock:
            flight.drop_old(time.monotonic())
            return flight.size

    def in_flight_since(self, mailbox: Mailbox, answer: Optional[Answer]) -> int:
        """Give the bytes that an answer about a mailbox does not know of."""
        return max(self.flight_size(mailbox), answer.taken if answer else 0)

    def add(self, mailbox: Mailbox, size: int, at_rcpt: Optional[Answer]) -> None:
        """Count a message of `size` bytes that was taken by the answer at its RCPT."""
        if self.in_flight <= 0 or mailbox.is_long:
            return
        size *= self.frontends
        with self.lock:
            known = [answer for answer in (self.newest(mailbox), at_rcpt) if answer]
            flight = self.flights.setdefault(mailbox, Flight())
            if not flight.parts and known:
                # Growth is counted from the newest figure and what has arrived since.
                newest = max(known, key=lambda answer: answer.at)
                used = newest.known_used
                flight.used = None if used is None else used + newest.taken
                flight.source = newest.source
            for answer in set(known):
                answer.taken += size
            flight.parts.append((time.monotonic() + self.in_flight, size))
            flight.size += size

    def drop_and_count(self) -> dict[str, int]:
        """Drop what is no longer in flight; give the figures for the metrics."""
        with self.lock:
            for mailbox in list(self.flights):
                if not self.flight_size(mailbox):
                    del self.flights[mailbox]
            flights = self.flights.values()
            return {
                "in_flight_messages": sum(len(flight.parts) for flight in flights),
                "in_flight_bytes": sum(flight.size for flight in flights),
                "remembered_answers": len(self.answers),
            }


# ---- Mailboxes: the backends of a domain, asked in order ----


class Mailboxes(NamedTuple):
    """The mailboxes of a domain, which may be spread over several backends."""

    backends: Sequence[Backend]
    ledger: Ledger

    def ask_about(self, mailbox: Mailbox, deadline: float, generation: int) -> Finding:
        """Say what is known of a mailbox, from memory or by a question."""
        answer = self.ledger.fresh(mailbox)
        if answer:
            return Finding(answer, cached=True)
        try:
            return Finding(self.ask_in_order(mailbox, deadline, generation))
        except Fault as fault:
            last = self.ledger.last(mailbox)
            return Finding(last, cached=last is not None, fault=str(fault))

    def ask_in_order(self, mailbox: Mailbox, deadline: float, generation: int) -> Answer:
        """Ask the backends in order, whoever knew the mailbox the last time first. Raises Fault."""
        # Each may take what is left of the time, divided by those that are still to be asked. All
        # that matters is a definite answer: UNKNOWN counts only where every backend says it.
        last = self.ledger.last(mailbox)
        known_by = last.source if last else ""
        order = sorted(self.backends, key=lambda backend: backend.name != known_by)
        faults = []
        for number, backend in enumerate(order):
            seconds = max(0, (deadline - time.monotonic()) / (len(order) - number))
            try:
                answer = backend.ask(mailbox, seconds, generation)
            except Fault as fault:
                faults.append(str(fault) if len(order) == 1 else f"{backend.name}: {fault}")
                continue
            if answer.status != "UNKNOWN":
                return answer
        if faults:
            raise Fault("; ".join(faults))
        self.ledger.remember(mailbox, answer, generation)
        return answer


# ---- Aliases and Tables: one name to one mailbox ----


class AliasFile:
    """A file in the form of aliases(5) or virtual(5), read again when it has changed."""

    def __init__(self, path: str) -> None:
        """Read the file. Raises OSError, ValueError."""
        self.name = path
        self.stamp = self.look()
        self.ticks_still = 2  # since when nothing has changed the file; at the second it is read
        self.table, self.bad_lines = self.read()

    def look(self) -> object:
        """Tell one version of the file from the next, and from none."""
        try:
            status = os.stat(self.name)
        except OSError as error:
            return error.errno
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino

    def refresh(self) -> bool:
        """Read the file again if it has changed, and say so; unreadable, the old is kept."""
        # Called every second. Whoever rewrites the file in place may take a while, and half a file
        # would let mail for full mailboxes through: so it is read when it has held still.
        before, self.stamp = self.stamp, self.look()
        self.ticks_still = self.ticks_still + 1 if self.stamp == before else 0
        if self.ticks_still != 2:
            return False
        try:
            table, bad_lines = self.read()
        except (OSError, ValueError) as error:
            log.warning("aliases=%s state=kept reason=%s", self.name, printable(error))
            return False
        if self.look() != self.stamp:  # it changed while it was read
            return False
        self.table, self.bad_lines = table, bad_lines
        self.log_state()
        return True

    def read(self) -> tuple[dict[str, str], list[int]]:
        """Read names, what they stand for, and numbers of bad lines. Raises OSError, ValueError."""
        table: dict[str, str] = {}
        bad: list[int] = []
        with open_regular(self.name) as lines:
            for number, line in logical_lines(lines):
                match = ALIAS.fullmatch(line)
                if match:
                    name = Address.parse(match[1], "", False)
                    key = f"{name.local}@{name.domain}" if name.domain else name.local
                    table.setdefault(key, match[2])  # of two lines for a name the first counts
                else:
                    bad.append(number)
        return table, bad

    def log_state(self) -> None:
        if self.bad_lines:
            text = "aliases=%s state=incomplete skipped=%d line=%d"
            log.warning(text, self.name, len(self.bad_lines), self.bad_lines[0])
        log.info("aliases=%s state=read names=%d", self.name, len(self.table))

    def find(self, address: Address, deadline: float) -> dict[str, str]:
        names, table = [*address.names(), "@" + address.domain], self.table
        return {name: table[name] for name in names if name in table}


def open_regular(path: str) -> IO[str]:
    """Open a text, but nothing that could keep the reader waiting. Raises OSError, ValueError."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError("not a file")
    return open(file, encoding="utf-8", errors="surrogateescape")


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


class Table:
    """Any Postfix table, asked by `postmap -q` as Postfix asks it.

    A bounded pool of futures gives the cap, the deadline and the sharing of one question by all
    sessions that want the same name. A table stays over a reload, and so does its cap.
    """

    postmaps: ClassVar[set[subprocess.Popen[bytes]]] = set()  # that run, of all tables
    has_ended: ClassVar[bool] = False  # no other is started

    def __init__(self, name: str) -> None:
        self.name = name
        kind = re.sub("^proxy:", "", name).partition(":")[0]
        self.takes_whole_address = kind in ("regexp", "pcre", "tcp", "socketmap")
        self.pool = concurrent.futures.ThreadPoolExecutor(TABLE_QUERIES)
        self.lock = threading.Lock()  # guards the results
        self.forget_results((), 0)

    def forget_results(self, domains: Iterable[Optional[str]], cache_ttl: float) -> None:
        """Take the options and forget the results."""
        # A question that was asked before leaves its result in the dictionary that is dropped here.
        self.domains = frozenset(domains)  # ours; None: all
        self.cache_ttl = cache_ttl  # seconds
        # Results and until when they hold, those under way included, the longest unused first.
        self.results: dict[tuple[str, ...], concurrent.futures.Future[Any]] = {}

    def keys(self, address: Address) -> dict[str, str]:
        """Give what Postfix would look up, in its order, and the name that each key stands for."""
        # Postfix quotes a local part that needs it, and tries it without the quotes after that.
        local, user, domain = lower(address.local), lower(address.user), address.domain
        names = [(local, f"@{domain}" if domain else "")]
        if not self.takes_whole_address and domain:
            names.append((user, f"@{domain}"))
            names += [(user, "")] if {domain, None} & self.domains else []
            names.append(("", f"@{domain}"))
        keys: dict[str, str] = {}
        for name, rest in names:
            quoted = '"' + re.sub(r'(["\\])', r"\\\1", name) + '"'
            forms = [name] if re.fullmatch(r'[^\s"(),:;<>@[\\\]]*', name) else [quoted, name]
            for form in forms[:1] if self.takes_whole_address else forms:
                # postmap reads a name a line, as UTF-8: what is neither stands in no table.
                if form + rest and (form + rest).isprintable():
                    keys.setdefault(form + rest, name + rest)
        return keys

    def find(self, address: Address, deadline: float) -> dict[str, str]:
        """Give what the table has for the names of an address. Raises Fault."""
        names = self.keys(address)
        keys = tuple(names)
        found = self.look_up(keys, deadline) if keys else {}
        return {names[key]: found[key] for key in reversed(keys) if key in found}

    def look_up(self, keys: tuple[str, ...], deadline: float) -> dict[str, str]:
        """Give what the table has for some keys, from memory or by a question. Raises Fault."""
        results = self.results  # not what a HUP may put into its place
        with self.lock:
            future = results.pop(keys, None)
            if (
                future is None
                or future.done()
                and (future.exception() or time.monotonic() >= future.result()[0])
            ):
                try:
                    future = self.pool.submit(self.query, keys, deadline)
                except RuntimeError as error:
                    raise Fault(f"no thread for table {self.name}: {error}") from None
            if sum(map(len, keys)) <= 4 * LONG_NAME:
                results[keys] = future
            if len(results) > TABLE_RESULTS:
                del results[next(iter(results))]
        try:
            found: dict[str, str] = future.result(max(0, deadline - time.monotonic()))[1]
            return found
        except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            with self.lock:
                if future.cancel():
                    results.pop(keys, None)
            raise Fault(f"table {self.name} gave no answer in time") from None

    def query(self, keys: tuple[str, ...], deadline: float) -> tuple[float, dict[str, str]]:
        """Ask the table, in a thread of the pool; say until when that holds. Raises Fault."""
        try:
            found = self.run_postmap(keys, deadline - time.monotonic())
        except OSError as error:
            raise Fault(f"postmap cannot be run: {error}") from None
        return time.monotonic() + self.cache_ttl, found

    def run_postmap(self, keys: Sequence[str], seconds: float) -> dict[str, str]:
        """Ask postmap, which gets `seconds`. Raises OSError, Fault."""
        # The keys go in on standard input: as an argument the user `-` would mean just that. "Not
        # found" and a fault both end with status 1, but only a fault says why. Signals but KILL are
        # blocked in a child of a libmilter thread.
        if seconds <= 0:
            raise Fault(f"table {self.name} was not asked in time")
        path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
        command = [shutil.which("postmap", path=path) or "postmap", "-q", "-", self.name]
        asked = "".join(key + "\n" for key in keys).encode()
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            Table.postmaps.add(process)
            try:
                output, errors = process.communicate(asked, 0 if Table.has_ended else seconds)
            except subprocess.TimeoutExpired:
                raise Fault(f"table {self.name} gave no answer in time") from None
            finally:
                process.kill()
                Table.postmaps.discard(process)
        complaint = re.search(rb"postmap: fatal: (.*)", errors)
        if process.returncode and (complaint or process.returncode != 1):
            text = complaint[1] if complaint else b"postmap failed"
            raise Fault(f"table {self.name}: {text.decode('utf-8', 'replace')}")
        lines = output.decode("utf-8", "replace").split("\n")[:-1]
        found = [line.partition("\t")[::2] for line in lines]
        if [key for key in keys if key in dict(found)] != [key for key, _ in found]:
            return {keys[0]: ","}  # a value of several lines, which is no mailbox
        return dict(found)

    @classmethod
    def end_postmaps(cls) -> None:
        """End the postmaps of all tables: one that hangs would outlive the program."""
        cls.has_ended = True
        for process in list(cls.postmaps):
            process.kill()


AliasSource = Union[AliasFile, Table]


class Aliases:
    """Leads an address to its mailbox, as the mail server will when it has taken the mail."""

    def __init__(
        self,
        sources: list[AliasSource],
        parse_address: Callable[[str], Address],
        domains: frozenset[Optional[str]],
    ) -> None:
        self.sources, self.parse_address = sources, parse_address
        self.domains = domains  # ours; None: all

    def resolve(self, address: Address, deadline: float) -> Optional[Address]:
        """Follow an address to its mailbox; None where it leads to none or many. Raises Fault."""
        visited: set[tuple[str, ...]] = set()
        while address[1:] not in visited and len(visited) < STEPS:
            visited.add(address[1:])
            for value in self.rules(address, deadline):
                target = TARGET.fullmatch(value) if len(value) <= ANSWER_LENGTH else None
                if not target:
                    return None
                text = address.local + target[2] if target[2][0] == "@" else target[2]
                following = self.parse_address(text)
                if not following.domain:
                    following = following._replace(domain=address.domain)
                if target[1]:
                    return following
                # A name that stands for itself ends virtual(5), but aliases(5), which is read
                # after it, may lead on from there: so the next, less specific rule is tried.
                if following[1:] != address[1:]:
                    break
            else:
                return address
            address = following
        return None  # names that stand for each other

    def rules(self, address: Address, deadline: float) -> list[str]:
        """Give what an address stands for, the most specific rule first. Raises Fault."""
        found = [source.find(address, deadline) for source in self.sources]
        values = []
        is_ours = not address.domain or {address.domain, None} & self.domains
        for name in dict.fromkeys(address.names() if is_ours else address.names()[:2]):
            values += [table[name] for table in found if name in table][:1]
        catch_all = "@" + address.domain
        return values or [table[catch_all] for table in found if catch_all in table][:1]


# ---- Policy: the rule, from a recipient and a size to a Decision ----


class Message:
    """The message that a session is giving: its size as far as it is known, and its recipients."""

    def __init__(self, declared: int = 0) -> None:
        self.declared = declared  # bytes (RFC 1870), 0 where they are not
        self.counted = 0  # bytes of the body until now
        self.passed: dict[Mailbox, Decision] = {}  # of the first recipient who was let through
        # Of all of them, as hashes: an address may be long, and there may be many.
        self.targets: dict[Mailbox, set[int]] = collections.defaultdict(set)
        self.others_passed = False  # somebody who was not asked about, or could not be

    @property
    def size(self) -> int:
        """The size in bytes, as far as it is known; never less than the declared one."""
        return max(self.declared, self.counted)

    def copies(self, mailbox: Mailbox, target: Address) -> int:
        """Say how many copies a mailbox gets with this recipient: john, john+a and john+b three."""
        targets = self.targets.get(mailbox)
        return len(targets | {hash(target[1:])}) if targets else 1

    def let_through(self, decision: Decision) -> None:
        mailbox = decision.target and decision.target.mailbox
        is_long = bool(mailbox and mailbox.is_long)
        if not decision.finding.answer or is_long:
            self.others_passed = True
        if decision.target and mailbox and not is_long:
            self.passed.setdefault(mailbox, decision)
            self.targets[mailbox].add(hash(decision.target[1:]))

    def wants_body(self) -> bool:
        """Say whether more of the body can matter."""
        # It does not where the size was declared, unless the body shows that to be a lie, and not
        # where it is already more than the largest of the mailboxes could hold.
        if self.counted <= self.declared:
            return False
        answers = (decision.finding.answer for decision in self.passed.values())
        return any(answer and self.counted <= answer.most for answer in answers)


class Route(NamedTuple):
    """Where a recipient leads."""

    address: Address
    target: Optional[Address]
    mailboxes: Optional[Mailboxes]  # to be asked, None where nobody is
    verdict: str  # where nobody is asked


class Policy:
    """Decides about recipients and messages, by one set of options."""

    def __init__(
        self, options: Namespace, ledger: Ledger, counters: Counters, before: Optional[Policy]
    ) -> None:
        """Take the backends and tables that the policy in force before had, too."""
        self.options, self.ledger, self.counters = options, ledger, counters
        self.replies: dict[str, Optional[Reply]] = {
            verdict: getattr(options, f"{verdict}_reply", None) for verdict in VERDICTS
        }
        if options.on_error == "tempfail":
            self.replies["fault"] = CANNOT_CHECK
        # No method: the aliases, which may be large, would hold the policy and so themselves, and
        # stay in memory after a reload.
        self.parse_address: Callable[[str], Address] = lambda text: Address.parse(
            text, options.recipient_delimiter, options.case_sensitive
        )
        exempt = ["postmaster", *options.exempt]
        self.exempt = {self.parse_address(e).names()[0 if "@" in e else 2] for e in exempt}
        self.backends: dict[tuple[Any, ...], Backend] = {}  # by URL and what bounds the questions
        self.mailboxes = self.map_domains(before.backends if before else {})
        kept = {table.name: table for table in before.tables} if before else {}
        sources: list[AliasSource] = [kept.get(source.name, source) for source in options.aliases]
        domains = frozenset(self.mailboxes)
        self.aliases = Aliases(sources, self.parse_address, domains)
        self.tables: list[Table] = [source for source in sources if isinstance(source, Table)]
        self.alias_files = [source for source in sources if isinstance(source, AliasFile)]
        for table in self.tables:
            table.forget_results(domains, options.cache_ttl)
        for file in self.alias_files:
            file.log_state()
        self.routes: dict[str, Route] = {}  # of the recipients who came last

    def map_domains(self, before: dict[tuple[Any, ...], Backend]) -> dict[Optional[str], Mailboxes]:
        """Map domains to their backends; None is for all that no option names."""
        options, context = self.options, self.options.cafile or ssl.create_default_context()
        by_domain: dict[Optional[str], list[Backend]] = collections.defaultdict(list)
        for domains, url in options.backend or [parse_backend(DEFAULT_BACKEND)]:
            key = url, options.timeout, options.max_queries, options.retry_after
            if key not in self.backends:
                client = Client(url, context, options.timeout)
                backend = before.get(key) or Backend(client, options, self.ledger, self.counters)
                backend.client.context = context
                alike = [known for known in self.backends.values() if known.url == backend.url]
                backend.name = f"{backend.url}#{len(alike) + 1}" if alike else backend.url
                self.backends[key] = backend
            for domain in domains:
                by_domain[domain].append(self.backends[key])
        return {domain: Mailboxes(found, self.ledger) for domain, found in by_domain.items()}

    def route(self, recipient: str, deadline: float) -> Route:
        """Say where a recipient leads. Raises Fault."""
        # That is remembered, but not what tables say: they remember it, and know for how long.
        routes = self.routes  # a change of the aliases replaces it meanwhile, and then ours is lost
        route = routes.get(recipient)
        if route is None:
            route = self.find_route(recipient, deadline)
            if len(recipient) <= LONG_NAME and not self.tables:
                if len(routes) >= ROUTES:
                    routes.clear()
                routes[recipient] = route
        return route

    def find_route(self, recipient: str, deadline: float) -> Route:
        """Find the mailbox of a recipient and the backends that have it. Raises Fault."""
        address = self.parse_address(recipient)
        if not address.local:
            return Route(address, None, None, "empty")
        if not self.exempt.isdisjoint(address.names()):
            return Route(address, None, None, "exempt")
        target = self.aliases.resolve(address, deadline)
        if target is None:
            return Route(address, None, None, "alias")
        if not self.exempt.isdisjoint(target.names()):
            return Route(address, target, None, "exempt")
        mailboxes = self.mailboxes.get(target.domain, self.mailboxes.get(None))
        return Route(address, target, mailboxes, "" if mailboxes else "nobackend")

    def decide(self, recipient: str, message: Message, resolved: str = "") -> Decision:
        """Decide about a recipient of a message, within the timeout."""
        # The MTA may have found another address in it; the reply has the one that was given.
        start, generation = time.monotonic(), self.ledger.generation
        deadline = start + self.options.timeout
        finding = Finding()
        try:
            address, target, mailboxes, verdict = self.route(resolved or recipient, deadline)
        except Fault as fault:  # a table
            address, target, mailboxes = self.parse_address(recipient), None, None
            verdict, finding = "fault", Finding(fault=str(fault))
        if resolved not in ("", recipient):
            address = address._replace(given=without_brackets(recipient))
        if target and mailboxes:
            mailbox = target.mailbox
            finding = mailboxes.ask_about(mailbox, deadline, generation)
            copies = message.copies(mailbox, target)
            verdict = self.judge(mailbox, finding, message.size, copies)
        else:
            target = None
        reply = self.reply(verdict, finding, address)
        return Decision(address, target, verdict, reply, finding, time.monotonic() - start)

    def judge(self, mailbox: Mailbox, finding: Finding, size: int, copies: int) -> str:
        """Judge a message of `size` bytes, 0 where not known, by what is known of a mailbox."""
        answer = finding.answer
        if answer is None:
            return "fault"
        if answer.status == "UNKNOWN":
            return "unknown"
        is_full = answer.status == "OVERQUOTA"
        in_flight = 0
        if not self.options.ignore_size:
            in_flight = self.ledger.in_flight_since(mailbox, answer)
            expected = (answer.known_used or 0) + in_flight
            if answer.quota:
                if size > answer.most:
                    return "overquota" if finding.fault else "toolarge"
                is_full = is_full or expected + size * copies > answer.most
                # The grace is for one message; with mail in flight it counts as used up.
                is_full = is_full or in_flight > 0 and expected >= answer.quota
        if not is_full:
            return "ok"
        unchanged = time.time() - answer.changed if answer.changed else 0  # seconds
        days = self.options.inactive_after
        is_dead = days and unchanged > days * DAY and not in_flight and not finding.fault
        return "inactive" if is_dead else "overquota"

    def reply(self, verdict: str, finding: Finding, address: Address) -> Optional[Reply]:
        """Give the reply to a verdict, None to let it through."""
        # Only a fresh answer refuses for good: a last known one, while the backend gives faults,
        # defers, whatever the options say.
        template = self.replies.get(verdict)
        if template and template.is_permanent and finding.fault:
            template = CANNOT_CHECK if verdict == "unknown" else DEFERRED
        return template and template.to(address.given)

    def end_of_data(self, message: Message) -> Optional[Decision]:
        """Decide about a whole message; None: it is taken, and counts as in flight."""
        # There is one reply for all recipients: what one of them can take, or perhaps can, as he
        # was not asked about, is taken for all.
        if self.options.ignore_size:
            return None
        start = time.monotonic()
        refusals = []
        with self.ledger.lock:  # to decide and to count is one step
            for mailbox, decision in message.passed.items():
                finding, copies = decision.finding, len(message.targets[mailbox])
                latest = self.ledger.newest(mailbox)  # somebody else may have asked since RCPT
                if latest and (not finding.answer or latest.at > finding.answer.at):
                    finding = Finding(latest, cached=True)
                verdict = self.judge(mailbox, finding, message.size, copies)
                if verdict in REFUSED and not message.others_passed:
                    refusals.append((verdict, finding))
            is_refused = 0 < len(refusals) == len(message.passed)
            if not is_refused or self.options.dry_run:
                for mailbox, decision in message.passed.items():
                    size = (message.size + HEADERS) * len(message.targets[mailbox])
                    self.ledger.add(mailbox, size, decision.finding.answer)
        if not is_refused:
            return None
        verdict, finding = refusals[0]
        first = next(iter(message.passed.values()))
        reply = self.reply(verdict, finding, first.address)
        seconds = time.monotonic() - start
        return first._replace(verdict=verdict, reply=reply, finding=finding, seconds=seconds)

    def report(self, decision: Decision, step: str, message: Message) -> None:
        """Count a decision of a step, `rcpt` or `data`, and log a refusal or a fault."""
        dry_run, is_refusal = self.options.dry_run, decision.reply is not None
        self.counters.record_decision(decision, step, message.size, is_refusal and not dry_run)
        if decision.finding.fault or is_refusal or self.options.verbose:
            in_flight = 0
            if decision.target:
                mailbox, answer = decision.target.mailbox, decision.finding.answer
                in_flight = self.ledger.in_flight_since(mailbox, answer)
            suffix = " dry_run=yes" if dry_run and is_refusal else ""
            text = "%s step=%s size=%d inflight=%d%s"
            level = logging.WARNING if decision.finding.fault else logging.INFO
            log.log(level, text, decision, step, message.size, in_flight, suffix)


# ---- Counters and metrics: what has happened, apart from why ----

FAMILIES = {  # of metrics: type and help
    "recipients_total": ("counter", "Recipients by verdict."),
    "cached_total": ("counter", "Recipients decided by a remembered answer."),
    "lastknown_total": ("counter", "Recipients decided by a last known answer, for a fault."),
    "refused_total": ("counter", "Refusals by step (rcpt, or data: whole messages) and verdict."),
    "refused_bytes_total": ("counter", "Bytes of what was refused, as far as known, by step."),
    "in_flight_messages": ("gauge", "Deliveries under way to mailboxes."),
    "in_flight_bytes": ("gauge", "Bytes under way to mailboxes."),
    "remembered_answers": ("gauge", "Answers in the cache."),
    "backend_up": ("gauge", "Whether the backend is asked."),
    "backend_questions_total": ("counter", "Questions to the backend."),
    "backend_faults_total": ("counter", "Questions that ended with a fault."),
    "backend_seconds": ("histogram", "How long questions took."),
}
BUCKETS = ("0.005", "0.025", "0.1", "0.5", "1", "2.5", "5", "+Inf")  # seconds


class Counters:
    """Counts what happens, by the names of Prometheus' text format."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: dict[str, float] = collections.defaultdict(int)
        for verdict in VERDICTS:
            self.values[f'recipients_total{{verdict="{verdict}"}}'] = 0
        for step in "rcpt", "data":
            self.values[f'refused_bytes_total{{step="{step}"}}'] = 0
            for verdict in (*REFUSED, "unknown", "fault"):
                self.values[f'refused_total{{step="{step}",verdict="{verdict}"}}'] = 0
        self.values.update({"cached_total": 0, "lastknown_total": 0})

    def record_decision(self, decision: Decision, step: str, size: int, refused: bool) -> None:
        """Count a decision about a recipient, or about a message of `size` bytes."""
        verdict, finding = decision.verdict, decision.finding
        with self.lock:
            if step == "rcpt":
                self.values[f'recipients_total{{verdict="{verdict}"}}'] += 1
                if finding.cached:
                    self.values["lastknown_total" if finding.fault else "cached_total"] += 1
            if refused:
                self.values[f'refused_total{{step="{step}",verdict="{verdict}"}}'] += 1
                self.values[f'refused_bytes_total{{step="{step}"}}'] += size

    def record_question(self, backend: str, seconds: float, is_fault: bool) -> None:
        label = label_of(backend)
        with self.lock:
            self.values[f"backend_questions_total{{{label}}}"] += 1
            self.values[f"backend_faults_total{{{label}}}"] += is_fault
            for bound in BUCKETS:
                counted = seconds <= float(bound)
                self.values[f'backend_seconds_bucket{{{label},le="{bound}"}}'] += counted
            self.values[f"backend_seconds_count{{{label}}}"] += 1
            self.values[f"backend_seconds_sum{{{label}}}"] += seconds

    def log_line(self) -> None:
        with self.lock:
            values = dict(self.values)
        verdicts = {v: values[f'recipients_total{{verdict="{v}"}}'] for v in VERDICTS}
        refused = sum(value for name, value in values.items() if name[:14] == "refused_total{")
        sums = {"recipients": sum(verdicts.values()), "refused": refused}
        sums.update(cached=values["cached_total"], lastknown=values["lastknown_total"], **verdicts)
        log.info("counters %s", " ".join(f"{name}={value}" for name, value in sums.items()))

    def render(self, gauges: dict[str, int]) -> str:
        """Give all counters, and gauges, in Prometheus' text format."""
        with self.lock:
            values = {**self.values, **gauges}
        lines = []
        for family, (kind, text) in FAMILIES.items():
            lines.append(f"# HELP quota_milter_{family} {text}")
            lines.append(f"# TYPE quota_milter_{family} {kind}")
            names = [family + suffix for suffix in ("", "_bucket", "_count", "_sum")]
            for sample, value in values.items():
                if sample.partition("{")[0] in names:
                    lines.append(f"quota_milter_{sample} {+value}")
        return "\n".join(lines) + "\n"


def label_of(backend: str) -> str:
    return 'backend="' + backend.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_whole(path: str, text: str) -> None:
    """Replace a file, or a link, by one that nobody ever sees half. Raises OSError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is no file")
    folder, name = os.path.split(os.path.abspath(path))
    file, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    try:
        with open(file, "w") as stream:
            stream.write(text)
            os.fchmod(file, 0o644)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


# ---- QuotaMilter: the callbacks of libmilter ----


class QuotaMilter(Milter.Base):  # type: ignore[misc]
    """A connection of the MTA.

    pymilter negotiates away the steps that have no method here: HELO, headers and others cost
    nothing. DATA has one although it only goes on: an MTA sends the macros of DATA in any case,
    and over an inet socket two packets without a reply between them wait for 40 ms (Nagle's
    algorithm there, delayed acknowledgement here). For the same reason no step goes without reply.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.message = Message()

    def envfrom(self, sender: str, *parameters: str) -> int:
        """Begin a message, whose size the sender may declare (RFC 1870)."""
        declared = 0
        for parameter in parameters:
            match = re.fullmatch("(?ai)SIZE=([0-9]{1,20})", parameter)
            declared = int(match[1]) if match else declared
        self.message = Message(declared)
        return int(Milter.CONTINUE)

    def envrcpt(self, recipient: str, *parameters: str) -> int:
        policy = self.service.policy
        try:
            decision = policy.decide(recipient, self.message, self.resolved(recipient))
        except Exception:  # a fault of ours lets him through, and the whole message with him
            self.message.others_passed = True
            raise
        policy.report(decision, "rcpt", self.message)
        if decision.reply is None:
            self.message.let_through(decision)
        return self.answer(decision.reply, policy)

    def resolved(self, recipient: str) -> str:
        """Give a recipient as the MTA will deliver to it."""
        # Postfix takes john%example.com, example.com!john and "john @example.com" for
        # john@example.com, and a bare john for one at its own domain: {rcpt_addr} tells.
        try:
            resolved = self.getsymval("{rcpt_addr}") or ""
        except (UnicodeError, Milter.error):
            resolved = ""
        return f"<{resolved}>" if "@" in resolved else recipient

    def data(self) -> int:
        return int(Milter.CONTINUE)

    def body(self, chunk: bytes) -> int:
        """Count the bytes of a message, as long as that can matter."""
        self.message.counted += len(chunk)
        more = self.message.wants_body() and not self.service.policy.options.ignore_size
        return int(Milter.CONTINUE if more or not self._protocol & Milter.P_SKIP else Milter.SKIP)

    def eom(self) -> int:
        """Take a message or refuse it, now that its size is known."""
        message, self.message = self.message, Message()
        policy = self.service.policy
        decision = policy.end_of_data(message)
        if decision is None:
            return int(Milter.CONTINUE)
        policy.report(decision, "data", message)
        return self.answer(decision.reply, policy)

    def abort(self) -> int:
        """Forget the message: what RSET or a lost connection ends is not in flight."""
        self.message = Message()
        return int(Milter.CONTINUE)

    def answer(self, reply: Optional[Reply], policy: Policy) -> int:
        """Set the reply and give the return code that fits it, without which it is dropped."""
        if reply is None or policy.options.dry_run:
            return int(Milter.CONTINUE)
        self.setreply(*reply)
        return int(Milter.REJECT if reply.is_permanent else Milter.TEMPFAIL)


# ---- Options: one table of them, in README's order ----


def matching(pattern: str, what: str, kind: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """Make a reader of what a pattern fits. It raises ArgumentTypeError."""

    def read_value(text: str) -> Any:
        if re.fullmatch(pattern, text):
            return kind(text)
        raise ArgumentTypeError("is not " + what)

    return read_value


def listen_socket(text: str) -> str:
    """Check libmilter's syntax of a socket. Raises ArgumentTypeError."""
    match = re.fullmatch(r"inet6?:([0-9]{1,5})(?:@[^@\s]+)?|(?:unix|local):/.+", text)
    if not match or match[1] and not 0 < int(match[1]) < 65536:
        raise ArgumentTypeError("is not inet:PORT@HOST, inet6:PORT@HOST or unix:/PATH")
    return text


def parse_backend(text: str) -> tuple[list[Optional[str]], str]:
    """Read `[DOMAIN[,DOMAIN...]=]URL`. Raises ArgumentTypeError, which shows no password."""
    match = re.fullmatch(r"(?:([^/:?#=\s]+)=)?(https?://[!-~]+)", text, re.IGNORECASE)
    if not match:
        raise ArgumentTypeError("is not [DOMAIN[,DOMAIN...]=]http[s]://HOST[:PORT]/PATH")
    domains = [lower(name).rstrip(".") for name in match[1].split(",")] if match[1] else [None]
    try:
        parts = urllib.parse.urlsplit(match[2])
        is_good = parts.hostname and parts.port != 0 and not parts.fragment and "" not in domains
    except ValueError:
        is_good = False
    if not is_good:
        hint = "; in a password @ : / ? # % are written %40 %3A %2F %3F %23 %25"
        hint = hint if "@" in match[2] else ""
        reason = "has an empty domain, no host, a # or no port from 1 to 65535"
        raise ArgumentTypeError(reason + hint)
    return list(dict.fromkeys(domains)), match[2]


def alias_source(text: str) -> AliasSource:
    """Read an alias file, or take the name of a table. Raises ArgumentTypeError."""
    if re.match("[a-z][a-z0-9_-]*:.", text):
        return Table(text)
    try:
        return AliasFile(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArgumentTypeError(f"{text} cannot be read: {reason}") from None


def trust(file: str) -> ssl.SSLContext:
    """Read the certificates to trust. Raises ArgumentTypeError."""
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:
        raise ArgumentTypeError(f"cannot be used: {error}") from None


REPLY = Reply.from_template
DECIMAL = r"([0-9]{1,5}(\.[0-9]{1,9})?|\.[0-9]{1,9})"
SECONDS = matching(DECIMAL, "a number of seconds from 0 to 99999", float)
TIMEOUT = matching("(?=.*[1-9])" + DECIMAL, "a number of seconds above 0, to 99999", float)
DAYS = matching(DECIMAL, "a number of days from 0 to 99999", float)
COUNT = matching("[1-9][0-9]{0,3}", "a number from 1 to 9999", int)
DELIMITERS = matching(r"""[!#-/:-?\[\]-`{-~]*""", 'ASCII punctuation other than @ " \\')
ERROR_WORDS = matching("accept|tempfail", "accept or tempfail")
EXEMPT = matching("[^@].*", "user or user@domain")
OPTIONS: list[tuple[str, str, Callable[[str], Any], Any, str]] = [
    # name, what stands for its value (a flag has none), how that is read, default (a list: the
    # option may be repeated), help
    ("listen", "SOCKET", listen_socket, "inet:8894@127.0.0.1", "inet:PORT@HOST or unix:/PATH"),
    ("backend", "[DOMAIN[,DOMAIN...]=]URL", parse_backend, [], f"to ask ({DEFAULT_BACKEND})"),
    ("timeout", "SECONDS", TIMEOUT, 5, "whole budget of a recipient"),
    ("retry-after", "SECONDS", SECONDS, 10, "how long a backend that failed is not asked"),
    ("max-queries", "N", COUNT, 16, "questions to one backend at a time"),
    ("cache-ttl", "SECONDS", SECONDS, 60, "how long an answer is used again; 0: never"),
    ("on-error", "accept|tempfail", ERROR_WORDS, "accept", "where a backend gives a fault"),
    ("overquota-reply", "REPLY", REPLY, OVERQUOTA, "for a full mailbox"),
    ("toolarge-reply", "REPLY", REPLY, TOOLARGE, "for what the quota cannot hold"),
    ("unknown-reply", "REPLY", REPLY, None, "for UNKNOWN (let through)"),
    ("ignore-size", "", bool, False, "sizes do not matter, only the status does"),
    ("in-flight", "SECONDS", SECONDS, 60, "how long mail is under way; 0: not at all"),
    ("frontends", "N", COUNT, 1, "frontends that share the mail"),
    ("inactive-after", "DAYS", DAYS, 0, "a full mailbox is dead; 0: off"),
    ("inactive-reply", "REPLY", REPLY, INACTIVE, "for a dead mailbox"),
    ("recipient-delimiter", "CHARS", DELIMITERS, "+", "john+lists is john; empty: off"),
    ("case-sensitive", "", bool, False, "do not fold the user to lower case"),
    ("exempt", "ADDRESS", EXEMPT, [], "user or user@domain that is never asked about"),
    ("aliases", "FILE|TYPE:NAME", alias_source, [], "an alias file, or a Postfix table"),
    ("cafile", "FILE", trust, None, "certificates to trust for https (the system's)"),
    ("dry-run", "", bool, False, "log what would be answered, let everything through"),
    ("check", "[ADDRESS...]", str, None, "ask now, print the verdicts, exit"),
    ("metrics", "FILE", str, None, "counters for Prometheus, every 15 seconds"),
    ("syslog", "", bool, False, "log to syslog, facility mail, not to standard error"),
    ("verbose", "", bool, False, "log a line for every recipient"),
]


class BadOptions(Exception):
    """The options cannot be used; the text says which, and where it stands, in one line."""


class OptionParser(argparse.ArgumentParser):
    """Raises BadOptions rather than end the program: a reload must not."""

    def error(self, message: str) -> NoReturn:
        """Give the reason in one line, without the password of a URL."""
        raise BadOptions(re.sub(r"//\S*@", "//...@", " ".join(message.split())))


def option_parser() -> OptionParser:
    parser = OptionParser(
        prog="quota_milter.py",
        usage="%(prog)s [@FILE] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, metavar, read, default, text in OPTIONS:
        arguments: dict[str, Any] = {"action": "store_true"}
        if metavar:
            arguments = {"type": read, "metavar": metavar, "default": default}
            arguments["action"] = "append" if default == [] else "store"
            text += " (%(default)s)" if default or default == 0 else ""
        if name == "check":
            arguments.update(nargs="*", metavar="ADDRESS")
        parser.add_argument("--" + name, help=text, **arguments)
    parser.add_argument("--version", action="version", version="quota_milter " + VERSION)
    return parser


def read_options(arguments: Sequence[str]) -> Namespace:
    """Read the command line and the files that it names. Raises BadOptions."""
    # argparse reads a line at a time, so that an error can say in which file and line it stands.
    parser = option_parser()
    options = parser.parse_args([])
    for where, words in option_lines(arguments):
        try:
            parser.parse_args(words, options)
            asked = [(d, url) for domains, url in options.backend for d in domains]
            if len(set(asked)) < len(asked):
                parser.error("argument --backend: names one backend twice for a domain")
        except BadOptions as error:
            raise BadOptions(f"{where}{error}") from None
    return options


def option_lines(
    words: Sequence[str], where: str = "", depth: int = 0
) -> Iterator[tuple[str, list[str]]]:
    """Give arguments and where they stand, for @FILE those of its lines. Raises BadOptions."""
    for is_file, group in itertools.groupby(words, lambda word: word[:1] == "@"):
        if not is_file:
            yield where, list(group)
            continue
        for word in group:
            try:
                if depth > 9:
                    raise ValueError("the file reads itself")
                with open_regular(word[1:]) as file:
                    lines = file.read().splitlines()
            except (OSError, ValueError) as error:
                raise BadOptions(f"{where}argument {word}: cannot be read: {error}") from None
            for number, line in enumerate(lines, 1):
                place = f"{word[1:]} line {number}: "
                yield from option_lines(split_line(line), place, depth + 1)


def split_line(line: str) -> list[str]:
    """Split a line of an @FILE; a comment starts the line or follows white space."""
    line = re.sub(r"(^|\s)#.*", "", line).strip()
    match = re.fullmatch(r"(--[\w-]+)(?:\s*=\s*|\s+)(.*)", line)
    if not match or match[1] == "--check":
        return line.split()
    value = match[2]
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return [f"{match[1]}={value[1:-1] if quoted else value}"]


def check(policy: Policy, addresses: list[str]) -> int:
    """Print a verdict for each address and return the exit status of --check."""
    status = 0
    if not addresses:
        print(f"the options are good: {len(policy.backends)} backends")
    for address in addresses:
        decision = policy.decide(address, Message())
        reply = " ".join(decision.reply) if decision.reply else "none"
        with contextlib.suppress(BrokenPipeError):  # who reads no line may want the status
            hint = ' reason="no --backend serves this domain"'
            print(f"{decision}{hint * (decision.verdict == 'nobackend')} reply={reply}")
        cannot_ask = decision.finding.fault or decision.verdict == "nobackend"
        status = max(status, 2 if cannot_ask else 1 if decision.reply else 0)
    return status


# ---- Service: what lives from start to end, and what a reload replaces ----


class Service:
    """Holds the policy in force, and looks after all that is due every second."""

    def __init__(self, arguments: Sequence[str], options: Namespace) -> None:
        self.arguments = arguments
        self.counters, self.ledger = Counters(), Ledger()
        self.ledger.configure(options)
        self.policy = Policy(options, self.ledger, self.counters, None)
        self.retired: list[Backend] = []  # out of use, with questions under way
        self.wants_reload = threading.Event()
        self.metrics_due = 0.0  # on the monotonic clock
        self.metrics_fail = False

    def keep_house(self) -> None:
        """Do what is due every second, for ever, and what a HUP asks for."""
        while True:
            wants_reload = self.wants_reload.wait(TICK)
            try:
                if wants_reload:
                    self.wants_reload.clear()  # a HUP from here on means another reload
                    self.reload()
                self.tidy()
            except Exception as error:  # mail goes on, whatever it was
                log.error("state=failed reason=%s", printable(repr(error)))

    def reload(self) -> None:
        """Forget the answers and take the options and aliases anew; bad ones change nothing."""
        before = self.policy
        try:
            options = read_options(self.arguments)
            policy = Policy(options, self.ledger, self.counters, before)
        except (BadOptions, OSError, ValueError, SystemExit) as error:
            log.error("state=kept reason=%s", printable(error))
            self.ledger.configure(before.options)
            return
        self.ledger.configure(options)
        self.policy = policy
        in_use = policy.backends.values()
        # They have questions under way, which end as all do.
        self.retired += [backend for backend in before.backends.values() if backend not in in_use]
        log.info("state=reloaded")

    def tidy(self) -> None:
        """Look after questions and alias files, and write the metrics."""
        policy = self.policy
        for backend in [*policy.backends.values(), *self.retired]:
            backend.end_overdue()
        self.retired = [backend for backend in self.retired if backend.questions]
        if [file for file in policy.alias_files if file.refresh()]:
            policy.routes = {}
        if time.monotonic() >= self.metrics_due:
            self.metrics_due = time.monotonic() + METRICS_EVERY
            self.write_metrics()
        self.ledger.drop_and_count()

    def write_metrics(self) -> None:
        """Write the metrics; log once where that fails, and once where it works again."""
        file = self.policy.options.metrics
        if not file:
            return
        gauges = self.ledger.drop_and_count()
        for backend in self.policy.backends.values():
            gauges[f"backend_up{{{label_of(backend.name)}}}"] = not backend.breaker.is_open
        try:
            write_whole(file, self.counters.render(gauges))
            if self.metrics_fail:
                log.info("metrics=%s state=written", file)
            self.metrics_fail = False
        except OSError as error:
            if not self.metrics_fail:
                log.error("metrics=%s state=failed reason=%s", file, printable(error))
            self.metrics_fail = True

    def finish(self) -> None:
        """Let the questions under way have their answers, for a moment, and tell the figures."""
        latest = time.monotonic() + LAST_QUESTIONS
        backends = self.policy.backends.values()
        while time.monotonic() < latest and any(
            not question.is_given_up
            for backend in backends
            for question in list(backend.questions.values())
        ):
            time.sleep(0.02)
        Table.end_postmaps()
        self.write_metrics()
        self.counters.log_line()


# ---- Process: log, socket, signals, start and stop ----


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
    finally:
        with contextlib.suppress(queue.Full):  # nobody reads the log, not even its end
            listener.stop()


def claim(where: str) -> str:
    """See that a socket can be listened on, remove a stale one, give its path. Raises OSError."""
    kind, _, path = where.partition(":")
    port, _, host = path.partition("@")
    family = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get(kind, socket.AF_UNIX)
    path = path if family == socket.AF_UNIX else ""
    with socket.socket(family) as probe:
        if path and os.path.lexists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError("it is no socket")
            probe.settimeout(1)
            if probe.connect_ex(path) != errno.ECONNREFUSED:
                raise OSError("somebody answers there")
            os.unlink(path)
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(path or (host.strip("[]"), int(port)))
    if path:
        os.unlink(path)
    return path


def catch_signals(service: Service) -> tuple[int, set[int]]:
    """Catch HUP, TERM and INT in a set and make a pipe readable; let USR1 log the counters."""
    # libmilter ends at HUP, TERM and INT, for which a thread of its own waits. The kernel prefers
    # the main thread, but while a signal is on its way there it takes any other thread that lets it
    # in, the oldest first. So idle threads older than libmilter's let it in, and many of them: with
    # eight a storm of signals reached libmilter's now and then.
    caught: set[int] = set()
    reader, writer = os.pipe()
    for end in reader, writer:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
        signal.signal(number, lambda number, frame: caught.add(number))

    def log_counters() -> None:
        while signal.sigwait({signal.SIGUSR1}):
            service.counters.log_line()

    threading.Thread(target=log_counters, daemon=True).start()
    for _ in range(IDLE_THREADS):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return reader, caught


def serve(service: Service, where: str) -> int:
    """Serve the MTA at a socket until TERM or INT; return the exit status. Raises OSError."""
    # AGAIN means that a HUP has reached libmilter after all.
    path = claim(where)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # libmilter spins when it has none
    reader, caught = catch_signals(service)
    Milter.factory = lambda: QuotaMilter(service)
    Milter.set_exception_policy(Milter.CONTINUE)  # a fault of ours refuses nothing
    has_stopped = threading.Event()  # because a signal told it to, and not as it cannot listen

    def run_libmilter() -> None:
        Milter.runmilter("quota_milter", where, 0, False)
        has_stopped.set()

    libmilter = threading.Thread(target=run_libmilter, daemon=True)
    libmilter.start()
    threading.Thread(target=service.keep_house, daemon=True).start()
    log.info("listen=%s state=started version=%s", where, VERSION)
    while libmilter.is_alive() and not caught & {signal.SIGTERM, signal.SIGINT}:
        if select.select([reader], [], [], TICK)[0]:
            os.read(reader, 1 << 16)
        if signal.SIGHUP in caught:
            caught.discard(signal.SIGHUP)
            service.wants_reload.set()
    # Whatever hangs now, a log that nobody reads or a disk: the end comes in time.
    status = 0 if caught & {signal.SIGTERM, signal.SIGINT} else 1
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(status))
    signal.setitimer(signal.ITIMER_REAL, STOPPING)
    service.finish()
    with contextlib.suppress(OSError):  # "" is no path
        os.unlink(path)
    log.info("listen=%s state=stopped", where)
    return AGAIN if status and has_stopped.is_set() else status


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    option = ""
    try:
        options = read_options(arguments)
        option = "argument --syslog: "
        with log_to(options.syslog):
            option = ""
            service = Service(arguments, options)
            if options.check is not None:
                return check(service.policy, options.check)
            option = f"argument --listen: {options.listen}: "
            return serve(service, options.listen)
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    except (BadOptions, OSError) as error:
        hint = ": may this user write there?" if isinstance(error, PermissionError) else ""
        print(f"quota_milter.py: error: {option}{error}{hint}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    status = main()
    if status == AGAIN:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the new start inherits
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        os.execv(sys.executable, [sys.executable, *sys.argv])
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(status)  # a name look-up that hangs must not hold up the end
