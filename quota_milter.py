#!/usr/bin/python3
"""quota_milter.py - refuse mail for full mailboxes at the frontend, before it is accepted.

USE
    quota_milter.py [@FILE] [options]              serve Postfix or Sendmail
    quota_milter.py --check [ADDRESS...] [options] ask now, print the verdicts

    At each RCPT the milter sends an HTTP request to the backend that holds the mailbox:
    `GET URL?u=USER&d=DOMAIN`. A recipient who is over quota gets a temporary failure,
    `452 4.2.2 Quota exceeded for ...`: the sending server keeps the mail and tries again.
    At the end of the data the message is judged again by its size. That is the declared
    one (SIZE= of MAIL), unless the first chunk of the body (up to 64 KB) is larger: then
    the bytes of the body are counted. Accepted mail counts as in flight until an answer
    includes it. An answer that is asked for more than --in-flight seconds later ends that,
    too. So a burst of messages overfills no mailbox.

    A file given as @FILE holds an option with its value per line, and `#` comments. HUP reads
    the option files and the aliases again (all but --listen and --syslog), USR1 logs the
    counters, TERM and INT end the program. The exit status is 2 for a bad option, 1 if it
    cannot run. After --check: 0 if all would be accepted, 1 if one would be refused, 2
    if a backend could not be asked, none serves the domain, or an unknown mailbox is let
    through.

WHEN SOMETHING FAILS
    If no backend gives an answer within --timeout, the last answer about the mailbox is
    used, for an hour (or --cache-ttl, if that is longer). After that --on-error decides;
    by default mail is let through. A backend that cannot be reached, or lets questions
    about three mailboxes in a row run out of time, is left alone for --retry-after
    seconds. Each failure is logged.

SECURITY
    The milter believes its backends, and trusts no address: each is escaped before it
    is asked about, answered or logged. It uses no proxies, follows no redirects, and
    needs no privilege. Put a password for --backend in an option file: the command line
    shows in the list of processes.

HOW IT IS MADE
    QuotaMilter's callbacks ask the Policy about each recipient. It follows the Aliases
    to a mailbox, and asks the Mailboxes of its domain. These check the Ledger, then ask
    their Backends in order. A Backend asks in threads, through its Client. libmilter
    calls from many threads: a comment beside each lock names what it guards. Other
    things that threads share are read or replaced in one step.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # During the start HUP and USR1 do nothing, and INT ends the program.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import email.utils
import errno
import gc
import http.client
import itertools
import logging
import logging.handlers
import os
import pathlib
import queue
import re
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, Optional, Union

try:
    import Milter
except ImportError:  # --help and --check work without it
    Milter = None

VERSION = "3.0"
DEFAULT_BACKEND = "http://127.0.0.1:8025/cgi-bin/quota.cgi"

ANSWER_LENGTH = 4096  # bytes read of an answer: the longest line is far below
NUMBER_LIMIT = 1 << 63  # bytes; from here on it is a negative sum, printed as unsigned
MOST_ACCOUNTS = 50_000  # mailboxes whose answers are remembered, in some 25 MB
NAME_LENGTH = 320  # characters of an address that can be a mailbox (RFC 3696: 64 + 1 + 255)
LAST_KNOWN = 3600  # seconds for which an answer may stand in for a backend that fails
REVIEWS = 40  # how often a session that waits reviews its question, in half of the question's time
TIMEOUTS_UNTIL_DOWN = 3  # mailboxes that timed out since the last answer
HEADER_BYTES = 1024  # bytes that mail servers add to a message on its way: 500 to 1,500
MOST_TARGETS = 100  # targets of a list that are looked at
TABLE_RESULTS = 10_000  # addresses whose result a table remembers, in some 10 MB
REPLY_LENGTH = 480  # characters of a reply's text: with its codes below 512 (RFC 5321, 4.5.3.1.5)
BACKLOG = 1024  # connections that wait to be accepted; libmilter's 20 are few for a burst
LOG_LENGTH = 10_000  # lines that may wait to be written; what comes then is lost
TICK = 1  # seconds between two looks at alias files, and at whether libmilter runs
METRICS_EVERY = 15  # seconds, as Prometheus usually asks
DAY = 86400  # seconds
STOP_SECONDS = 1.7  # seconds from TERM to a hard exit

OVERQUOTA = "452 4.2.2 Quota exceeded for {address}, try again later"
TOOLARGE = "552 5.2.3 Message is larger than the quota of {address}"
# A 550: after RCPT some clients read a 552 as "too many recipients" and go on trying (RFC 5321,
# 4.5.3.1.10). To end the tries is what this reply is for.
INACTIVE = "550 5.2.2 Mailbox of {address} is full and not in use"

REFUSED = ("overquota", "toolarge", "inactive")  # verdicts: there is no room for the message
# For the last four no backend is asked. empty: no name, or too long a one. exempt: --exempt, or an
# authenticated client. alias: none or several mailboxes. nobackend: none serves the domain.
VERDICTS = ("ok", *REFUSED, "unknown", "fault", "empty", "exempt", "alias", "nobackend")

DOWN = "the backend is down and is left alone for a while"
NO_TURN = "too many other questions: this one could not be sent in time"
OVERTAKEN = "no answer in half of the time; others waited, and a later question was answered"
HUNG = "the last question about this mailbox had no answer: it is left alone for a while"
HINTS = {  # what an administrator has usually got wrong
    401: ": is the password in --backend right?",
    403: ": may this address ask (QUOTA_ALLOW, the web server's rule)?",
    404: ": is the path in --backend right?",
}

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
    if text.isascii():
        return text.lower()
    return text.encode("utf-8", "surrogateescape").lower().decode("utf-8", "surrogateescape")


def ascii_domain(text: str) -> str:
    """Return a domain in lower case, without a last dot, its labels as A-labels (RFC 5890)."""
    domain = lower(text[:-1] if text[-1:] == "." else text)
    if domain.isascii() or len(domain) > NAME_LENGTH:  # the codec is slow for very long names
        return domain
    try:
        return domain.encode("idna").decode("ascii").lower().rstrip(".")
    except UnicodeError:  # no such domain can exist
        return domain


class Mailbox(NamedTuple):
    """What a backend is asked about."""

    user: str
    domain: str  # lower case, "" if there is none


SOURCE_ROUTE = re.compile(r"^(?:@(?:\[[^\]]*\]|[^\[@,:])*,?)+:")  # @a.example,@b.example:


class Address(NamedTuple):
    """A recipient, as it was given and as a backend is asked about it (README, Options)."""

    given: str  # without angle brackets
    local: str  # unquoted local part
    user: str  # the local part without the tail behind a delimiter
    domain: str  # lower case, "" if there is none
    names: tuple[str, ...]  # what to look up in alias files and tables, the most specific first

    @classmethod
    def parse(cls, text: str, delimiters: str, case_sensitive: bool) -> Address:
        """Read an envelope address (RFC 5321, 4.1.2). It never fails."""
        given = without_brackets(text)
        path = SOURCE_ROUTE.sub("", given) if given[:1] == "@" else given
        local, at, domain = path.rpartition("@")
        if not at or domain.endswith('"'):  # the @ stands in a quoted local part
            local, domain = local + at + domain, ""
        if '"' in local or "\\" in local:
            local = re.sub(r'\\(.)|"', r"\1", local, flags=re.DOTALL)
        if not case_sensitive:
            local = lower(local)
        user, domain = without_detail(local, delimiters), ascii_domain(domain)
        bare = lower(local), lower(user)
        names = (f"{bare[0]}@{domain}", f"{bare[1]}@{domain}", *bare) if domain else bare
        return cls(given, local, user, domain, names)

    @property
    def mailbox(self) -> Mailbox:
        return Mailbox(self.user, self.domain)

    @property
    def name(self) -> str:
        """One text for all spellings of the address: lower case, unquoted."""
        return self.names[0]

    @property
    def can_exist(self) -> bool:
        """Say whether a mailbox can have this name."""
        return self.local != "" and len(self.user) + len(self.domain) <= NAME_LENGTH


def without_brackets(path: str) -> str:
    return path[1:-1] if path[:1] == "<" and path[-1:] == ">" else path


def without_detail(local: str, delimiters: str) -> str:
    """Drop what follows the first delimiter, except from names that Postfix leaves whole."""
    name = lower(local)
    # With the delimiter `-` Postfix keeps owner-NAME and NAME-request: mailing lists have them.
    is_role = "-" in delimiters and (name.startswith("owner-") or name.endswith("-request"))
    if is_role or name in ("postmaster", "mailer-daemon", "double-bounce"):
        return local
    user = local
    for delimiter in delimiters:
        user = user.partition(delimiter)[0]
    return user or local


class Reply(NamedTuple):
    """An SMTP reply whose text may name the recipient as `{address}`."""

    code: str
    enhanced: str  # RFC 3463
    text: str

    @classmethod
    def from_template(cls, template: str) -> Reply:
        """Read `452 4.2.2 text`. Raises ArgumentTypeError."""
        # A 421 would end the whole session.
        pattern = (
            r"(?!421)(([45])[0-9]{2}) (\2\.[0-9]{1,3}\.[0-9]{1,3}) (([^{}%]|{address}){1,200})"
        )
        match = re.fullmatch(pattern, template)
        if not match or not template.isascii() or not template.isprintable():
            raise ArgumentTypeError("is not 452 4.2.2 TEXT, without %, { and } but {address}")
        return cls(match[1], match[3], match[4])

    @property
    def is_permanent(self) -> bool:
        return self.code[0] == "5"

    def to(self, address: str) -> Reply:
        """Put the address in, its % (to libmilter a format) and all but printable ASCII as `?`."""
        text = self.text.replace("{address}", re.sub("[^ -~]|%", "?", address))
        return self._replace(text=text[:REPLY_LENGTH])


OVERQUOTA_FOR_NOW = Reply.from_template(OVERQUOTA)
CANNOT_CHECK = Reply("451", "4.3.0", "The mailbox of {address} cannot be checked, try again later")


class Answer(NamedTuple):
    """What a backend said of a mailbox; figures in bytes, None if not known."""

    status: str
    used: Optional[int] = None
    quota: Optional[int] = None  # 0: no limit
    grace: int = 0  # how far the message that fills the mailbox may exceed the quota
    changed: str = ""  # an HTTP date: the last change by a delivery or by the user
    source: str = ""  # the name of the backend that gave it
    at: float = 0.0  # when the question was sent, on the monotonic clock

    @classmethod
    def from_line(cls, line: bytes, is_whole: bool = True) -> Answer:
        """Read `STATUS user used quota` (README, Protocol). Raises BadAnswer.

        The numbers of a line that may be cut short are not known: what is left of 209715200 could
        be 20, and a message would be refused for good.
        """
        status, *fields = line.rstrip(b"\r\n").split(b" ")
        if status not in (b"OK", b"OVERQUOTA", b"UNKNOWN"):
            raise BadAnswer(f"no status in the answer {line[:80]!r}: is the URL right?")
        # A single number behind the user is not used: it may be the usage or the quota.
        numbers = fields[-2:] if is_whole and len(fields) > 2 else [b"", b""]
        return cls(status.decode(), read_number(numbers[0]), read_number(numbers[1]))

    @property
    def usage(self) -> Optional[int]:
        """The bytes used, if they are known."""
        if self.status == "UNKNOWN":
            return None
        # Of a mailbox that does not exist yet some servers give a quota and no size.
        return 0 if self.used is None and self.quota is not None else self.used

    @property
    def capacity(self) -> int:
        """How many bytes the mailbox can ever hold, 0 if there is no limit."""
        return self.quota + self.grace if self.quota else 0


def read_number(text: bytes) -> Optional[int]:
    """Read a plain non-negative integer below 2^63; None if it is something else."""
    if text.isdigit() and len(text) <= 20 and int(text) < NUMBER_LIMIT:
        return int(text)
    return None


def read_date(text: str) -> Optional[float]:
    """Read an HTTP date (RFC 9110, 5.6.7) as seconds since 1970; None for nonsense."""
    try:
        seconds = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError, OSError):
        return None
    return seconds if seconds > 0 else None


class Fault(Exception):
    """A backend or a table gave no answer; the text says why, for the log."""


class BadAnswer(Fault):
    """The backend answered, but with no verdict: it works, so it is asked again."""


class Unreachable(Fault):
    """There is no connection to the backend: it is down, and left alone for a while."""


class Finding(NamedTuple):
    """What is known of a mailbox now. With a fault, the answer is the last known one."""

    answer: Optional[Answer] = None
    in_flight: int = 0  # bytes of accepted mail that the answer does not include
    cached: bool = False
    fault: str = ""


class Decision(NamedTuple):
    """What is done with a recipient, and why."""

    address: Address
    target: Optional[Address]  # whose mailbox was asked about, None if none was
    verdict: str  # one of VERDICTS
    reply: Optional[Reply]  # None: let the recipient through
    finding: Finding
    seconds: float  # that the decision took

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
    """One question about one mailbox: its times, and the connection that may be shut down."""

    def __init__(self, mailbox: Mailbox, asked: float, deadline: float) -> None:
        self.mailbox = mailbox
        # On the monotonic clock: when the first session asked, and when the question must end.
        self.asked, self.deadline = asked, deadline
        self.half = (deadline - asked) / 2  # seconds: half of its time
        self.begun = 0.0  # when a thread began to ask; 0: the question waits for its turn
        self.future: concurrent.futures.Future[Answer] = concurrent.futures.Future()
        self.lock = threading.Lock()  # guards what follows
        self.end_reason = ""  # why it was ended before there was an answer
        self.socket: Optional[socket.socket] = None

    def seconds_left(self) -> float:
        return max(0.001, self.deadline - time.monotonic())  # 0 tells a socket not to wait

    def attach(self, sock: socket.socket) -> None:
        """Note the connection, so that shut_down() finds it. Raises OSError."""
        with self.lock:
            if self.end_reason:
                raise OSError(self.end_reason)
            self.socket = sock.dup()  # TLS detaches the socket object that it wraps

    def detach(self) -> None:
        """Forget the connection, which the Client closes."""
        with self.lock:
            if self.socket:
                self.socket.close()
            self.socket = None

    def shut_down(self, why: str) -> None:
        """Shut the connection down: the thread that reads from it finds the end of file."""
        with self.lock:
            self.end_reason = why
            if self.socket:
                with contextlib.suppress(OSError):  # the server has closed it already
                    self.socket.shutdown(socket.SHUT_RDWR)


class Client:
    """Asks one URL, over a new connection each time: late bytes cannot answer another question."""

    def __init__(self, url: str, context: ssl.SSLContext) -> None:
        parts = urllib.parse.urlsplit(url)
        netloc = parts.netloc.rpartition("@")[2]
        self.url = parts._replace(netloc=netloc, path=parts.path or "/", fragment="").geturl()
        self.context = context if parts.scheme == "https" else None
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if self.context else 80)
        self.last_address = ""  # the one that could be connected to last
        self.headers = {"Host": netloc, "User-Agent": "quota_milter/" + VERSION}
        if parts.username is not None:
            secret = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
            encoded = base64.b64encode(secret.encode()).decode()
            self.headers["Authorization"] = "Basic " + encoded

    def fetch(self, question: Question) -> Answer:
        """Send the question and read the answer. Whatever goes wrong raises Fault."""
        connection = http.client.HTTPConnection(self.host, self.port)

        def use_connection(host: str, **options: Any) -> http.client.HTTPConnection:
            return connection

        try:
            self.connect(connection, question)
            # urllib's own opener would follow redirects, and use proxies of the environment.
            handler = urllib.request.AbstractHTTPHandler()
            with handler.do_open(use_connection, self.request(question.mailbox)) as response:
                return read_answer(response)
        except Fault:
            raise
        except Exception as error:  # urllib's, http.client's and ssl's have no common base
            raise Fault(str(getattr(error, "reason", "")) or repr(error)) from None
        finally:
            connection.close()
            question.detach()

    def connect(self, connection: http.client.HTTPConnection, question: Question) -> None:
        """Connect before the request, to tell Unreachable from a bad answer. Raises Unreachable.

        The TLS handshake has the same timeout as the TCP connection.
        """
        try:
            connection.sock = self.open_socket(question)
            question.attach(connection.sock)
            if self.context:
                tls = self.context.wrap_socket(connection.sock, server_hostname=self.host)
                connection.sock = tls
        except (OSError, ValueError) as error:  # ValueError: a bad name
            hint = ": see --cafile" if isinstance(error, ssl.SSLCertVerificationError) else ""
            raise Unreachable(f"no connection: {error}{hint}") from None
        # At the deadline the session ends the question, with a better reason than this timeout.
        connection.sock.settimeout(question.seconds_left() + 1)

    def open_socket(self, question: Question) -> socket.socket:
        """Connect to one of the host's addresses. Raises OSError, ValueError.

        The time that is left is divided by the addresses to be tried. So an address that swallows
        packets, such as IPv6 behind a filter, leaves enough for the next one. The address that
        worked the last time comes first.
        """
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
        # getnameinfo() keeps the scope of an address like fe80::1%eth0.
        addresses = [socket.getnameinfo(entry[4], numeric)[0] for entry in found]
        addresses.sort(key=lambda address: address != self.last_address)
        while True:
            address = addresses.pop(0)
            # Nine tenths: a server out of reach is found out before the deadline.
            seconds = 0.9 * question.seconds_left() / (1 + len(addresses))
            try:
                sock = socket.create_connection((address, self.port), seconds)
                break
            except OSError:
                if not addresses:
                    raise
        self.last_address = address
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def request(self, mailbox: Mailbox) -> urllib.request.Request:
        """Make the request about a mailbox (README, Protocol)."""
        user, domain = (urllib.parse.quote(n, safe="", errors="surrogateescape") for n in mailbox)
        query = f"u={user}&d={domain}" if domain else f"u={user}"
        url = self.url + ("&" if "?" in self.url else "?") + query
        request = urllib.request.Request(url, headers=self.headers)
        request.timeout = None  # the connection has its own
        return request


def read_answer(response: http.client.HTTPResponse) -> Answer:
    """Read an answer of bounded length. Raises BadAnswer, OSError, HTTPException."""
    line = response.readline(ANSWER_LENGTH)
    if response.status != 200:
        why = line[:200].decode("ascii", "replace").strip() if line[:6] == b"ERROR " else ""
        hint = HINTS.get(response.status, "")
        raise BadAnswer(f"status {response.status} {why or response.reason[:80]}{hint}")
    # The line is whole if it has its newline, or if all bytes of the answer have come: as many as
    # Content-Length says, or the last chunk. Without newline and length nobody can tell: then the
    # status counts, the numbers do not.
    ended = response.length == 0 or (response.chunked and response.chunk_left is None)
    is_whole = line.endswith(b"\n") or ended
    if not is_whole and (response.length or len(line) >= ANSWER_LENGTH):
        raise BadAnswer("the answer is cut short or too long")
    grace = response.headers.get("Quota-Grace", "").strip().encode("ascii", "replace")
    changed = response.headers.get("Last-Modified", "")[:64]  # a date is shorter
    answer = Answer.from_line(line, is_whole)
    return answer._replace(grace=read_number(grace) or 0, changed=changed)


# ---- Backend: a Client, its circuit breaker, and at most so many questions at a time ----


class Backend:
    """Asks a backend at most `max_queries` questions at a time, each until its deadline.

    All sessions that ask about a mailbox share one question, whose deadline is that of the first.
    The oldest question is sent next. But if answers are so slow that the oldest may run out of
    time, the newest is sent instead: else, under overload, all would be sent too late.

    The sessions that wait for a question end it in three cases:
    - No thread has taken it up in the first half of its time. So a question that is sent has at
      least half of its time, and if it times out, the backend is to blame.
    - Its deadline has come.
    - It was sent half of its time ago, others wait for a thread, and a question that was sent later
      has its answer. So the backend works, and this mailbox hangs.
    If the question was sent, its connection is shut down, which frees the thread that reads from
    it, and its mailbox is left alone for `retry_after` seconds. (A thread that still looks up a
    name or connects is free when that ends.)

    The circuit breaker: a backend is down if it cannot be reached, or if questions about three
    mailboxes timed out since its last answer (only questions that were asked after that answer
    count). It is left alone for `retry_after` seconds. Then one question, about any mailbox, tries
    it.

    A question is in `questions` exactly until its future is done.
    """

    def __init__(self, client: Client, options: Namespace, counters: Counters) -> None:
        self.client, self.counters = client, counters
        self.name = client.url.partition("?")[0]  # in the log, in metrics, and Answer.source
        self.retry_after: float = options.retry_after  # seconds
        self.max_queries: int = options.max_queries
        self.lock = threading.Lock()  # guards what follows
        self.pool = concurrent.futures.ThreadPoolExecutor(self.max_queries)
        self.questions: dict[Mailbox, Question] = {}  # under way, the newest last
        self.left_alone: dict[Mailbox, float] = {}  # mailboxes that ran out of time, until when
        self.newest_answered_begun = 0.0  # when the newest of the answered questions began
        self.answered_at = 0.0  # when the last answer came
        self.last_answer_took = 0.0  # seconds that the last answer took
        self.failed: set[Mailbox] = set()  # mailboxes that ran out of time since the last answer
        self.is_down = False
        self.retry_at = 0.0  # when a backend that is down is asked again

    def ask(self, mailbox: Mailbox, deadline: float) -> Answer:
        """Ask about a mailbox, or join the question that is under way. Raises Fault."""
        question = self.join_or_start(mailbox, deadline)
        while True:
            # A session that joined may have less time than the question has left.
            left = max(0, deadline - time.monotonic())
            try:
                return question.future.result(min(left, question.half / REVIEWS))
            except concurrent.futures.TimeoutError:
                self.review(question)
                if not left and not question.future.done():
                    raise Fault("no answer in time") from None

    def join_or_start(self, mailbox: Mailbox, deadline: float) -> Question:
        """Return the question about a mailbox that is under way, or a new one. Raises Fault."""
        now = time.monotonic()
        with self.lock:
            question = self.questions.get(mailbox)
            if question:
                return question
            if now < self.left_alone.get(mailbox, 0):
                raise Fault(HUNG)
            if self.is_down:
                if now < self.retry_at:
                    raise Fault(DOWN)
                self.retry_at = now + self.retry_after  # only this question tries the backend
            question = Question(mailbox, now, deadline)
            try:
                # Each question adds a turn. Which question a turn is for is chosen when it comes.
                self.pool.submit(self.take_turn)
            except RuntimeError as error:  # the system's limit of threads
                # submit() has queued the turn all the same. The thread that takes it makes the pool
                # count one idle thread too many, for ever. So the pool is replaced.
                self.pool = concurrent.futures.ThreadPoolExecutor(self.max_queries)
                raise Fault(f"no thread for a question: {error}") from None
            self.questions[mailbox] = question
            return question

    def take_turn(self) -> None:
        """Send a question that waits and set its answer, in a thread of the pool."""
        with self.lock:
            waiting = [question for question in self.questions.values() if not question.begun]
            if not waiting:  # the question was ended meanwhile
                return
            # The next answer may take longer than the last one: twice as long is a safe guess.
            oldest_may_fail = waiting[0].seconds_left() < 2 * self.last_answer_took
            question = waiting[-1 if oldest_may_fail else 0]
            question.begun = time.monotonic()
        fault: Optional[Fault] = None
        try:
            answer = self.client.fetch(question)._replace(source=self.name, at=question.begun)
        except Fault as error:
            fault = error
        now = time.monotonic()
        self.counters.record_question(self.name, now - question.begun, fault is not None)
        with self.lock:
            if question.future.done():  # it was ended: what came may be cut short
                return
            del self.questions[question.mailbox]
            if isinstance(fault, Unreachable):
                self.record_failure(question, unreachable=str(fault))
            elif fault is None or isinstance(fault, BadAnswer):
                self.record_answer(question, now)
            # Any other fault, as a connection that is reset, tells nothing of the backend.
            if fault:
                question.future.set_exception(fault)
            else:
                question.future.set_result(answer)

    def end(self, question: Question, why: str) -> None:
        """End a question without an answer. The lock is held."""
        del self.questions[question.mailbox]
        if question.begun:  # its mailbox is left alone for a while
            now = time.monotonic()
            self.left_alone = {m: until for m, until in self.left_alone.items() if until > now}
            self.left_alone[question.mailbox] = now + self.retry_after
        question.shut_down(why)
        question.future.set_exception(Fault(why))

    def review(self, question: Question) -> None:
        """End a question if it is time, as the class says."""
        now = time.monotonic()
        with self.lock:
            if question.future.done():
                return
            if not question.begun:
                if now >= question.asked + question.half:
                    self.end(question, NO_TURN)
            elif now >= question.deadline:
                seconds = question.deadline - question.asked
                self.end(question, f"no answer within {round(seconds, 2):g} s")
                self.record_failure(question)
            else:
                others_wait = len(self.questions) > self.max_queries
                had_half = now >= question.begun + question.half
                if others_wait and had_half and question.begun < self.newest_answered_begun:
                    self.end(question, OVERTAKEN)

    def record_answer(self, question: Question, now: float) -> None:
        """Close the breaker: the backend works. The lock is held."""
        if self.is_down:
            log.warning("backend=%s state=up", self.name)
        self.is_down, self.answered_at = False, now
        self.last_answer_took = now - question.begun
        self.failed.clear()
        self.newest_answered_begun = max(self.newest_answered_begun, question.begun)

    def record_failure(self, question: Question, unreachable: str = "") -> None:
        """Open the breaker if there is reason for it. The lock is held."""
        if self.answered_at >= question.asked:  # the backend has worked since
            return
        self.failed.add(question.mailbox)
        if unreachable or self.is_down or len(self.failed) >= TIMEOUTS_UNTIL_DOWN:
            if not self.is_down:
                why = unreachable or f"{TIMEOUTS_UNTIL_DOWN} mailboxes in a row gave no answer"
                log.warning("backend=%s state=down reason=%s", self.name, printable(why))
            self.is_down, self.retry_at = True, time.monotonic() + self.retry_after


# ---- Ledger: what is remembered and what is in flight, for each mailbox ----


class Account:
    """What is known of one mailbox. The Ledger's lock guards it."""

    __slots__ = ("answer", "in_flight", "recent")

    def __init__(self, answer: Optional[Answer] = None, in_flight: int = 0) -> None:
        self.answer = answer
        self.in_flight = in_flight  # bytes of accepted mail that the answer does not include
        # When each of the last messages was accepted, and its bytes, the oldest first.
        self.recent: tuple[tuple[float, int], ...] = ()

    def sum_up(self, start: float, end: float = float("inf")) -> int:
        """Add up the bytes of the messages that were accepted after `start` and until `end`."""
        return sum(size for at, size in self.recent if start < at <= end)

    def learn(self, answer: Answer, window: float) -> None:
        """Replace the answer by a newer one; `window` is --in-flight in seconds.

        When the new question was sent, the mailbox was expected to hold the old usage and what was
        in flight. What the new usage lacks of this sum is still in flight. But it is no more than
        what was accepted in the `window` before the question: older mail has arrived or never will.
        (If another backend gave the old answer, this bound is left out: the usage on a stand-by may
        be old.) Mail that was accepted after the question was sent is in flight as a whole.

        Without two usages to compare, all mail of the `window` is in flight.

        Example, of one backend: the usage was 500 and a message of 100 was accepted. If the new
        usage is 500, 100 are still in flight; if it is 560, 40; if it is 600 or 900, none. If it is
        200 (the user made room), 100 are in flight.
        """
        since = self.sum_up(answer.at)
        before = self.sum_up(answer.at - window, answer.at)
        old = self.answer
        if old and old.usage is not None and answer.usage is not None and window:
            lacking = max(0, old.usage + self.in_flight - since - answer.usage)
            before = min(before, lacking) if old.source == answer.source else lacking
        self.answer, self.in_flight = answer, before + since


class Ledger:
    """Remembers answers, and counts the mail that was accepted since.

    RCPT reserves nothing: a client that sends no mail must not fill anybody's mailbox. At the end
    of the data the Policy decides and counts in one step, holding `lock`: no two sessions count on
    the same free space.
    """

    def __init__(self, options: Namespace) -> None:
        self.lock = threading.RLock()  # guards the accounts and what is in them
        self.accounts: dict[Mailbox, Account] = {}  # the one that changed last is the last
        self.options = options  # a reload replaces them

    def look(self, mailbox: Mailbox) -> Finding:
        """Return what is known of a mailbox now, which may be nothing."""
        with self.lock:
            account = self.accounts.get(mailbox)
            if account is None:
                return Finding()
            return Finding(account.answer, account.in_flight, cached=account.answer is not None)

    def is_fresh(self, finding: Finding, sources: Iterable[str]) -> bool:
        """Say whether an answer of one of these backends may be used again."""
        answer = finding.answer
        if answer is None or answer.source not in sources:  # a reload has removed the backend
            return False
        ttl: float = self.options.cache_ttl
        if finding.in_flight:  # only a new answer shows what has arrived: ask soon
            ttl = min(ttl, self.options.in_flight)
        return time.monotonic() - answer.at < ttl

    def last_known(self, mailbox: Mailbox) -> Finding:
        """Return the last answer about a mailbox if it may stand in for a new one."""
        finding = self.look(mailbox)
        earliest = time.monotonic() - max(LAST_KNOWN, self.options.cache_ttl)
        if finding.answer and finding.answer.at > earliest:
            return finding
        return Finding(in_flight=finding.in_flight)

    def remember(self, mailbox: Mailbox, answer: Answer) -> Finding:
        """Keep an answer, unless a newer one is there, and give what is known now."""
        with self.lock:
            account = self.touch(mailbox, Account())
            if account.answer is None or account.answer.at < answer.at:
                account.learn(answer, self.options.in_flight)
            return Finding(account.answer, account.in_flight)

    def accept(self, mailbox: Mailbox, size: int, at_rcpt: Finding) -> None:
        """Count a message of `size` bytes as in flight."""
        if self.options.in_flight <= 0:
            return
        size *= self.options.frontends
        with self.lock:
            now = time.monotonic()
            # If the account was forgotten since RCPT, as many other mailboxes came, it is put back.
            account = self.touch(mailbox, Account(at_rcpt.answer, at_rcpt.in_flight))
            account.in_flight += size
            # learn() looks back from the time of a question, which is --timeout ago at most.
            earliest = now - self.options.in_flight - self.options.timeout
            old = bisect.bisect(account.recent, (earliest, 0))
            account.recent = (*account.recent[old:], (now, size))

    def touch(self, mailbox: Mailbox, new: Account) -> Account:
        """Return the account of a mailbox, which is `new` if there is none. The lock is held."""
        account = self.accounts.pop(mailbox, new)
        self.accounts[mailbox] = account
        if len(self.accounts) > MOST_ACCOUNTS:  # forget the one that has not changed for longest
            del self.accounts[next(iter(self.accounts))]
        return account

    def gauges(self) -> dict[str, int]:
        """Return the figures for the metrics."""
        with self.lock:
            start = time.monotonic() - self.options.in_flight
            sizes = [n for a in self.accounts.values() for at, n in a.recent if at > start]
            answers = sum(account.answer is not None for account in self.accounts.values())
        return {
            "in_flight_messages": len(sizes),
            "in_flight_bytes": sum(sizes),
            "remembered_answers": answers,
        }


# ---- Mailboxes: the backends of a domain, asked in order ----


class Mailboxes(NamedTuple):
    """The backends of a domain: its mailboxes may be spread over them."""

    backends: Sequence[Backend]
    names: Sequence[str]  # of the backends
    ledger: Ledger

    def find(self, mailbox: Mailbox, deadline: float) -> Finding:
        """Say what is known of a mailbox, from memory or by a question."""
        known = self.ledger.look(mailbox)
        if self.ledger.is_fresh(known, self.names):
            return known
        try:
            return self.ledger.remember(mailbox, self.ask_in_order(mailbox, deadline))
        except Fault as fault:
            return self.ledger.last_known(mailbox)._replace(fault=str(fault))

    def ask_in_order(self, mailbox: Mailbox, deadline: float) -> Answer:
        """Ask the backends in order until one knows the mailbox. Raises Fault.

        The one that knew it the last time comes first. Each may take what is left of the time,
        divided by those still to be asked. UNKNOWN counts only if every backend says it.
        """
        last = self.ledger.last_known(mailbox).answer
        known_by = last.source if last and last.status != "UNKNOWN" else ""
        order = sorted(self.backends, key=lambda backend: backend.name != known_by)
        faults = []
        for number, backend in enumerate(order):
            now = time.monotonic()
            share = max(0, deadline - now) / (len(order) - number)
            try:
                answer = backend.ask(mailbox, now + share)
            except Fault as fault:
                faults.append(str(fault) if len(order) == 1 else f"{backend.name}: {fault}")
                continue
            if answer.status != "UNKNOWN":
                return answer
        if faults:
            raise Fault("; ".join(faults))
        return answer


# ---- Aliases and Tables: one name to one mailbox ----

ALIAS = re.compile(
    r"""( "(?:\\.|[^"\\])*" (?:@[^\s:]+)? | [^\s:"][^\s:]* )  # a name, which may be quoted
        (?: \s*:\s* | \s+ )                                 # aliases(5) `:`, virtual(5) a space
        (\S.*)""",
    re.VERBOSE,
)
TARGET = re.compile(
    r"""\\?                                       # sendmail's `\user`
        (?! "?[|/:] | \w+: )                      # no program, file, include or `error:`
        ( (?: "(?:\\.|[^"\\])*" | [^\s,"] )+ )    # one mailbox, no list""",
    re.VERBOSE,
)
NO_MAILBOX = ","  # a value that leads nowhere: TARGET does not match it


class AliasFile:
    """A file in the form of aliases(5) or virtual(5), read again when it has changed."""

    def __init__(self, path: str) -> None:
        """Read the file. Raises OSError, ValueError."""
        self.name = path
        self.seen_state = self.loaded_state = self.state()
        self.table, self.bad_lines = self.read()

    def state(self) -> object:
        """Return a value that changes with the file; None if there is no file."""
        with contextlib.suppress(OSError):
            status = os.stat(self.name)
            return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
        return None

    def refresh(self) -> None:
        """Read the file again if it has changed; if it cannot be read the old names stay.

        It is called every second. A changed file is read when two calls have seen it in the same
        state: before that it may be half written.
        """
        before, self.seen_state = self.seen_state, self.state()
        if self.seen_state == self.loaded_state or self.seen_state != before:
            return
        self.loaded_state = self.seen_state
        try:
            self.table, self.bad_lines = self.read()
        except (OSError, ValueError) as error:
            log.warning("aliases=%s state=kept reason=%s", self.name, printable(error))
        else:
            self.log_state()

    def read(self) -> tuple[dict[str, str], list[int]]:
        """Read what names stand for, and the numbers of bad lines. Raises OSError, ValueError."""
        table: dict[str, str] = {}
        bad: list[int] = []
        for number, line in logical_lines(read_lines(self.name)):
            match = ALIAS.fullmatch(line)
            if match:
                name = Address.parse(match[1], "", False).name
                table.setdefault(name, match[2])  # of two lines for a name the first counts
            else:
                bad.append(number)
        return table, bad

    def log_state(self) -> None:
        text = "aliases=%s state=read names=%d"
        if self.bad_lines:
            text += f" skipped={len(self.bad_lines)} line={self.bad_lines[0]}"
        log.info(text, self.name, len(self.table))

    def find(self, names: Sequence[str], deadline: float) -> dict[str, str]:
        """Return what the file has for some names."""
        table = self.table
        return {name: table[name] for name in names if name in table}


def read_lines(path: str) -> list[str]:
    """Read a text file, but no FIFO, which could hang. Raises OSError, ValueError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a file")
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()
    if "\0" in text:
        raise ValueError(f"{path} is not a text file")
    return text.split("\n")


def logical_lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Drop comments, join continuation lines, and number what is left."""
    start, joined = 0, ""
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text[0] == "#":
            continue
        if line[0].isspace():
            joined += " " + text
            continue
        if start:
            yield start, joined
        start, joined = number, text
    if start:
        yield start, joined


class Table:
    """A Postfix table, which is asked with `postmap -q` in the session's own thread."""

    turns = threading.Semaphore(8)  # of all tables; a postmap runs for some five milliseconds

    def __init__(self, name: str) -> None:
        self.name = name
        self.cache_ttl = 0.0  # seconds; the Policy sets it
        kind = name.removeprefix("proxy:").partition(":")[0]
        self.takes_whole_address = kind in ("regexp", "pcre", "tcp", "socketmap")
        self.results: dict[tuple[str, ...], tuple[float, dict[str, str]]] = {}  # until when, what

    def find(self, names: Sequence[str], deadline: float) -> dict[str, str]:
        """Return what the table has for some names, from memory or from postmap. Raises Fault."""
        # Of each name Postfix looks up the quoted form first, then the plain one (str() changes
        # nothing).
        forms: Sequence[Callable[[str], str]] = quoted, str
        if self.takes_whole_address:
            names, forms = names[:1], forms[:1]
        else:  # of names without a domain only the user: tables hardly have `john+lists` alone
            bare = [name for name in names if "@" not in name]
            names = [name for name in names if "@" in name or name == bare[-1]]
        # postmap reads one key a line, as UTF-8. A name that cannot be such a line is in no table.
        keys = {form(name): name for name in names if name.isprintable() for form in forms}
        asked = tuple(keys)
        until, found = self.results.get(asked, (0.0, {}))
        if asked and until <= time.monotonic():
            found = self.look_up(asked, deadline)
            if len(self.results) >= TABLE_RESULTS:
                self.results = {}
            self.results[asked] = time.monotonic() + self.cache_ttl, found
        # If both forms are found, the quoted one is written last.
        return {keys[key]: found[key] for key in reversed(asked) if key in found}

    def look_up(self, keys: Sequence[str], deadline: float) -> dict[str, str]:
        """Ask postmap for some keys until the deadline. Raises Fault."""
        # As with a backend, a turn comes in the first half of the time or not at all.
        if not Table.turns.acquire(timeout=max(0, deadline - time.monotonic()) / 2):
            raise Fault(f"table {self.name}: too many others are asked")
        path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin"
        command = [shutil.which("postmap", path=path) or "postmap", "-q", "-", self.name]
        try:
            # The keys go in on standard input: as an argument the key `-` would mean that.
            asked = "".join(key + "\n" for key in keys).encode()
            left = max(0, deadline - time.monotonic())
            done = subprocess.run(command, input=asked, capture_output=True, timeout=left)
        except subprocess.TimeoutExpired:
            hint = ": leave out proxy:" if self.name.startswith("proxy:") else ""
            raise Fault(f"table {self.name} gave no answer in time{hint}") from None
        except OSError as error:
            raise Fault(f"postmap cannot be run: {error}") from None
        finally:
            Table.turns.release()
        # "Not found" and a fault both end with status 1, but only a fault says why.
        complaint = re.search(rb"postmap: fatal: (.*)", done.stderr)
        if done.returncode and (complaint or done.returncode != 1):
            text = complaint[1] if complaint else b"postmap failed"
            raise Fault(f"table {self.name}: {text.decode('utf-8', 'replace')}")
        lines = done.stdout.decode("utf-8", "replace").splitlines()
        if any("\t" not in line for line in lines):  # a value has several lines: no single mailbox
            return {keys[0]: NO_MAILBOX}
        return dict(line.split("\t", 1) for line in lines)


def quoted(name: str) -> str:
    """Quote the local part of a name where that must be (RFC 5321), as Postfix does for tables."""
    local, at, domain = name.rpartition("@") if "@" in name else (name, "", "")
    if re.search(r'[\s"(),:;<>@[\\\]]|^\.|\.\.|\.$', local):
        local = '"' + re.sub(r'(["\\])', r"\\\1", local) + '"'
    return local + at + domain


class Aliases(NamedTuple):
    """Leads an address to its mailbox, as the mail server will when it has accepted the mail."""

    sources: Sequence[Union[AliasFile, Table]]
    parse_address: Callable[[str], Address]
    domains: frozenset[Optional[str]]  # those that have a backend; with None all have one

    def resolve(self, address: Address, deadline: float) -> Optional[Address]:
        """Follow an address to its mailbox; None if it leads to none or several. Raises Fault."""
        if not self.sources:
            return address
        visited: set[str] = set()
        while address.can_exist and address.name not in visited:
            visited.add(address.name)
            following = self.follow(address, deadline)
            if following is None or following is address:
                return following
            address = following
        return None  # names that stand for each other, or grow

    def follow(self, address: Address, deadline: float) -> Optional[Address]:
        """Return the address that this one stands for, which is itself if no rule leads on.

        None means that a rule leads to no mailbox or to several. Raises Fault.
        """
        for value in self.rules(address, deadline):
            target = TARGET.fullmatch(value)
            if not target:
                return address if self.is_own_list(value, address) else None
            following = self.complete(target[1], address)
            # A rule that maps a name to itself ends the look-up in virtual(5), but aliases(5) comes
            # after that. So the next, less specific rule is tried.
            if following.name != address.name:
                return following
        return address

    def is_own_list(self, value: str, address: Address) -> bool:
        """Say whether a list leads to one mailbox, that of the address itself.

        Its other targets are elsewhere, or programs: a copy for a second account, a vacation.
        """
        # What is quoted is left out: names and commas there may belong to a command.
        items = re.sub('"[^"]*"', '""', value).split(",", MOST_TARGETS)
        targets = [TARGET.fullmatch(item.strip()) for item in items]
        listed = [self.complete(target[1], address) for target in targets if target]
        here = self.domains | {address.domain}
        local = {one.name for one in listed if one.can_exist and one.domain in here}
        return local != set() and local.issubset(address.names)

    def complete(self, text: str, address: Address) -> Address:
        """Give a target what it lacks: `@domain` the address's local part, `user` its domain."""
        text = text.lstrip("\\")  # sendmail's `\user`
        if text[:1] == "@":
            text = quoted(address.local + text)
        target = self.parse_address(text)
        if address.domain and not target.domain:
            target = self.parse_address(f"{quoted(target.local)}@{address.domain}")
        return target

    def rules(self, address: Address, deadline: float) -> list[str]:
        """Return the right sides for an address, the most specific first. Raises Fault."""
        names = address.names
        is_served = address.domain in self.domains or None in self.domains
        if address.domain and not is_served:
            names = names[:2]  # names without a domain apply only to domains that have a backend
        catch_all = "@" + address.domain
        found = [source.find([*names, catch_all], deadline) for source in self.sources]
        values = {name: table[name] for table in reversed(found) for name in table}  # first wins
        rules = [values[name] for name in dict.fromkeys(names) if name in values]
        if not rules and catch_all in values:  # for names that nothing else is known of
            rules.append(values[catch_all])
        return rules


# ---- Policy: the rule, from a recipient and a size to a Decision ----


class Message:
    """The message that a session is giving: its size as far as it is known, and its recipients."""

    def __init__(self, declared: int = 0, sender: str = "", is_authenticated: bool = False) -> None:
        self.sender, self.is_authenticated = sender, is_authenticated
        # Bytes, as far as they are known: those that were declared (RFC 1870), or of the body.
        self.size = declared
        self.counted = 0  # bytes of the body until now
        self.passed: dict[Mailbox, Decision] = {}  # the first that let a recipient of it through
        self.copies: dict[Mailbox, set[str]] = {}  # the names of all recipients of it
        self.others_passed = False  # a recipient without an answer was let through

    def let_through(self, decision: Decision) -> None:
        if not decision.finding.answer:
            self.others_passed = True
        if decision.target:
            mailbox = decision.target.mailbox
            self.passed.setdefault(mailbox, decision)
            # john, john+a and an alias of john are three copies: the MTA sees three addresses.
            self.copies.setdefault(mailbox, set()).add(decision.address.name)

    def count_body(self, number: int) -> bool:
        """Count bytes of the body, and say whether more of it can matter.

        The body comes in chunks of up to 64 KB. The declared size is believed unless the first one
        exceeds it. Then all is counted, until it is too much even for the largest quota.
        """
        self.counted += number
        if self.counted <= self.size:
            return False
        self.size = self.counted
        answers = [decision.finding.answer for decision in self.passed.values()]
        return any(answer and self.size <= answer.capacity for answer in answers)


class Policy:
    """Decides about recipients and messages, by one set of options."""

    def __init__(self, options: Namespace, ledger: Ledger, counters: Counters) -> None:
        self.options, self.ledger, self.counters = options, ledger, counters
        # The reply to a verdict is the option of its name: --overquota-reply for overquota. A
        # verdict without such an option lets the recipient through.
        self.replies = {verdict: getattr(options, f"{verdict}_reply", None) for verdict in VERDICTS}
        if options.on_error == "tempfail":
            self.replies["fault"] = CANNOT_CHECK
        self.exempt = {self.parse_address(e).name for e in ["postmaster", *options.exempt]}
        self.backends: dict[str, Backend] = {}  # by URL
        self.by_domain = self.map_domains()
        for source in options.aliases:
            if isinstance(source, AliasFile):
                source.log_state()
            else:
                source.cache_ttl = options.cache_ttl
        self.aliases = Aliases(options.aliases, self.parse_address, frozenset(self.by_domain))

    def parse_address(self, text: str) -> Address:
        """Read an envelope address. It never fails."""
        options = self.options
        return Address.parse(text, options.recipient_delimiter, options.case_sensitive)

    def map_domains(self) -> dict[Optional[str], Mailboxes]:
        """Map domains to their backends; None is the key for all other domains."""
        context = self.options.cafile or ssl.create_default_context()
        by_domain: dict[Optional[str], list[Backend]] = collections.defaultdict(list)
        for domains, url in self.options.backend or [parse_backend(DEFAULT_BACKEND)]:
            if url not in self.backends:
                backend = Backend(Client(url, context), self.options, self.counters)
                # The name shows neither query nor password: one of two alike gets a number.
                if backend.name in [known.name for known in self.backends.values()]:
                    backend.name += f"#{len(self.backends) + 1}"
                self.backends[url] = backend
            for domain in domains:
                by_domain[domain].append(self.backends[url])
        return {
            domain: Mailboxes(found, [backend.name for backend in found], self.ledger)
            for domain, found in by_domain.items()
        }

    def decide(self, recipient: str, message: Message, resolved: str = "") -> Decision:
        """Decide about a recipient of a message, within --timeout.

        `resolved` is the address that the MTA has made of the recipient, if that is another one.
        """
        start = time.monotonic()
        deadline = start + self.options.timeout
        as_sent = address = self.parse_address(recipient)
        if resolved:  # the reply still gives the address as it was sent
            address = self.parse_address(resolved)._replace(given=as_sent.given)
        target, finding = None, Finding()
        try:
            is_trusted = message.is_authenticated and not self.options.check_authenticated
            if is_trusted or self.is_exempt(as_sent) or (resolved and self.is_exempt(address)):
                verdict = "exempt"
            else:
                # Aliases have the first half of the time: what is left is enough for a backend.
                target, verdict = self.find_target(address, (start + deadline) / 2)
            if target:
                mailbox = target.mailbox
                mailboxes = self.by_domain.get(mailbox.domain) or self.by_domain[None]
                finding = mailboxes.find(mailbox, deadline)
                copies = {address.name, *message.copies.get(mailbox, ())}
                verdict = self.judge(finding, message.size, len(copies))
        except Fault as fault:  # a table
            verdict, finding = "fault", Finding(fault=str(fault))
        reply = self.reply(verdict, finding, address)
        return Decision(address, target, verdict, reply, finding, time.monotonic() - start)

    def is_exempt(self, address: Address) -> bool:
        """Say whether an address is never asked about (--exempt).

        Only a plain spelling counts: an MTA delivers `postmaster+<john@example.com>` and
        `postmaster+:john@example.com;` to john.
        """
        if self.exempt.isdisjoint(address.names):
            return False
        return not re.search(r"[\s(),:;<>]", address.name)

    def find_target(self, address: Address, deadline: float) -> tuple[Optional[Address], str]:
        """Return the address whose mailbox is asked about, or None and a verdict. Raises Fault."""
        if not address.can_exist:
            return None, "empty"
        target = self.aliases.resolve(address, deadline)
        if target is not address:
            if target is None or not target.can_exist:
                return None, "alias"
            if self.is_exempt(target):
                return None, "exempt"
        is_served = target.domain in self.by_domain or None in self.by_domain
        return (target, "") if is_served else (None, "nobackend")

    def judge(self, finding: Finding, size: int, copies: int) -> str:
        """Judge copies of `size` bytes each (0: not known) by what is known of a mailbox."""
        answer = finding.answer
        if answer is None:
            return "fault"
        if answer.status == "UNKNOWN":
            return "unknown"
        is_full = answer.status == "OVERQUOTA"
        if answer.quota and not self.options.ignore_size:
            capacity = answer.capacity
            if size > capacity:
                # A last known answer refuses only for now: the quota may have been raised.
                return "overquota" if finding.fault else "toolarge"
            expected = (answer.usage or 0) + finding.in_flight
            is_full = is_full or expected + size * copies > capacity
            # The grace is for one message: with mail in flight it counts as used up.
            is_full = is_full or (finding.in_flight > 0 and expected >= answer.quota)
        if not is_full:
            return "ok"
        return "inactive" if self.is_inactive(finding, answer) else "overquota"

    def is_inactive(self, finding: Finding, answer: Answer) -> bool:
        """Say whether a mailbox is full, and nothing has changed it for --inactive-after days."""
        days: float = self.options.inactive_after
        # A mailbox with some room is not full: the message was too large for it.
        has_room = answer.status == "OK" and (answer.usage or 0) < (answer.quota or 0)
        if not days or has_room or finding.in_flight or finding.fault:
            return False
        changed = read_date(answer.changed)
        return changed is not None and time.time() - changed > days * DAY

    def reply(self, verdict: str, finding: Finding, address: Address) -> Optional[Reply]:
        """Return the reply to a verdict, None to let the recipient through."""
        template: Optional[Reply] = self.replies[verdict]
        # The last known answer, which stands in for a fault, is not enough for a permanent reply.
        if template and template.is_permanent and finding.fault:
            template = CANNOT_CHECK if verdict == "unknown" else OVERQUOTA_FOR_NOW
        return template and template.to(address.given)

    def end_of_data(self, message: Message) -> Optional[Decision]:
        """Decide about a whole message; None: it is accepted. Count it as in flight then.

        SMTP has one reply for all recipients. So a message is accepted if at least one mailbox has
        room for its copies, or a recipient was let through without an answer.
        """
        if self.options.ignore_size or not message.passed:
            return None
        refusals = []
        with self.ledger.lock:  # to decide and to count is one step
            for mailbox, decision in message.passed.items():
                finding = self.finding_now(mailbox, decision.finding)
                verdict = self.judge(finding, message.size, len(message.copies[mailbox]))
                if verdict in REFUSED:
                    refusals.append((decision, verdict, finding))
            is_accepted = message.others_passed or len(refusals) < len(message.passed)
            if is_accepted or self.options.dry_run:  # a dry run lets all pass
                for mailbox, decision in message.passed.items():
                    size = (message.size + HEADER_BYTES) * len(message.copies[mailbox])
                    self.ledger.accept(mailbox, size, decision.finding)
        if is_accepted:
            return None
        decision, verdict, finding = refusals[0]
        reply = self.reply(verdict, finding, decision.address)
        return decision._replace(verdict=verdict, reply=reply, finding=finding, seconds=0)

    def finding_now(self, mailbox: Mailbox, at_rcpt: Finding) -> Finding:
        """Return what is known of a mailbox now; another session may have asked since RCPT."""
        now = self.ledger.look(mailbox)
        if now.answer and now.answer is not at_rcpt.answer:
            return now
        # If the account was forgotten since RCPT, the figure of RCPT is the larger one.
        return at_rcpt._replace(in_flight=max(now.in_flight, at_rcpt.in_flight))


# ---- Counters: what has happened ----

FAMILIES = {  # of metrics: type and help
    "recipients_total": ("counter", "Recipients by verdict."),
    "cached_total": ("counter", "Recipients decided by a remembered answer."),
    "lastknown_total": ("counter", "Recipients decided by a last known answer, for a fault."),
    "refused_total": ("counter", "Refusals by step (rcpt, or data: whole messages) and verdict."),
    "refused_bytes_total": ("counter", "Bytes of what was refused, as far as known, by step."),
    "in_flight_messages": ("gauge", "Deliveries accepted in the last --in-flight seconds."),
    "in_flight_bytes": ("gauge", "Bytes accepted in the last --in-flight seconds, x --frontends."),
    "remembered_answers": ("gauge", "Answers in the cache."),
    "backend_up": ("gauge", "1 if the backend is asked, 0 while it is down."),
    "backend_questions_total": ("counter", "Questions to the backend."),
    "backend_faults_total": ("counter", "Questions that ended with a fault."),
    "backend_seconds": ("histogram", "How long questions took."),
}
BUCKETS = [(float(le), le) for le in "0.005 0.025 0.1 0.5 1 2.5 5 +Inf".split()]  # seconds

Labels = tuple[tuple[str, str], ...]


class Counters:
    """Counts what happens, by the names of Prometheus' metrics and their labels."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards the values
        self.values: dict[tuple[str, Labels], float] = collections.defaultdict(int)
        # Prometheus' increase() misses the first event unless the series starts at 0.
        for verdict in VERDICTS:
            self.add("recipients_total", 0, verdict=verdict)
        for step in "rcpt", "data":
            self.add("refused_bytes_total", 0, step=step)
            for verdict in (*REFUSED, "unknown", "fault"):
                self.add("refused_total", 0, step=step, verdict=verdict)
        self.add("cached_total", 0)
        self.add("lastknown_total", 0)

    def add(self, name: str, number: float = 1, **labels: str) -> None:
        with self.lock:
            self.values[name, tuple(labels.items())] += number

    def record_decision(self, decision: Decision, step: str, size: int, is_refused: bool) -> None:
        """Count a decision about a recipient, or about a message of `size` bytes."""
        verdict, finding = decision.verdict, decision.finding
        if step == "rcpt":
            self.add("recipients_total", verdict=verdict)
            if finding.cached:
                self.add("lastknown_total" if finding.fault else "cached_total")
        if is_refused:
            self.add("refused_total", step=step, verdict=verdict)
            self.add("refused_bytes_total", size, step=step)

    def record_question(self, backend: str, seconds: float, is_fault: bool) -> None:
        self.add("backend_questions_total", backend=backend)
        self.add("backend_faults_total", int(is_fault), backend=backend)
        for bound, text in BUCKETS:
            self.add("backend_seconds_bucket", int(seconds <= bound), backend=backend, le=text)
        self.add("backend_seconds_count", backend=backend)
        self.add("backend_seconds_sum", seconds, backend=backend)

    def log_line(self) -> None:
        with self.lock:
            values = dict(self.values)
        verdicts = {v: values["recipients_total", (("verdict", v),)] for v in VERDICTS}
        refused = sum(number for (name, _), number in values.items() if name == "refused_total")
        sums = {"recipients": sum(verdicts.values()), "refused": refused}
        sums.update(cached=values["cached_total", ()], lastknown=values["lastknown_total", ()])
        sums.update(verdicts)
        log.info("counters %s", " ".join(f"{name}={number}" for name, number in sums.items()))

    def render(self, gauges: dict[tuple[str, Labels], float]) -> str:
        """Return all counters, and gauges, in Prometheus' text format."""
        with self.lock:
            values = {**self.values, **gauges}
        lines = []
        for family, (kind, text) in FAMILIES.items():
            lines.append(f"# HELP quota_milter_{family} {text}")
            lines.append(f"# TYPE quota_milter_{family} {kind}")
            names = [family + suffix for suffix in ("", "_bucket", "_count", "_sum")]
            for (name, labels), number in values.items():
                if name in names:
                    lines.append(f"quota_milter_{name}{render_labels(labels)} {number}")
        return "\n".join(lines) + "\n"


def render_labels(labels: Labels) -> str:
    """Write labels as Prometheus reads them."""
    escaped = [(name, value.replace("\\", r"\\").replace('"', r"\"")) for name, value in labels]
    text = ",".join(f'{name}="{value}"' for name, value in escaped)
    return "{" + text + "}" if labels else ""


def write_whole(path: str, text: str) -> None:
    """Replace a file by one that nobody ever sees half. Raises OSError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is no file")
    new = path + ".new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)  # a link there would lead to another file
    with open(new, "x") as stream:
        stream.write(text)
        os.fchmod(stream.fileno(), 0o644)
    os.replace(new, path)


# ---- QuotaMilter: the callbacks of libmilter ----


class QuotaMilter(Milter.Base if Milter else object):  # type: ignore[misc]
    """One connection of the MTA, which may bring many messages.

    pymilter negotiates away the steps that have no method here: HELO, headers and others cost
    nothing. DATA has a method although that does nothing. Without it the MTA would still send the
    macros of DATA, and the next step right behind them: over an inet socket that costs 40 ms
    (Nagle's algorithm there, delayed acknowledgement here).
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.message = Message()

    def envfrom(self, sender: str, *parameters: str) -> int:
        """Begin a message, whose size the sender may declare (RFC 1870)."""
        declared = 0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.upper() == "SIZE":
                declared = read_number(value.encode("utf-8", "replace")) or 0
        authenticated = bool(self.macro("{auth_authen}"))
        self.message = Message(declared, without_brackets(sender), authenticated)
        return int(Milter.CONTINUE)

    def envrcpt(self, recipient: str, *parameters: str) -> int:
        """Ask about a recipient, and let him through or answer why not."""
        policy = self.service.policy
        try:
            decision = policy.decide(recipient, self.message, self.resolved(recipient))
            if decision.reply is None:
                self.message.let_through(decision)
            return self.finish(decision, "rcpt", policy)
        except Exception:  # a bug lets him through, so the end of the data must accept the message
            self.message.others_passed = True
            raise

    def resolved(self, recipient: str) -> str:
        """Return the address that the MTA will deliver to, "" if it is the given one or not known.

        Postfix makes john@example.com of john%example.com and example.com!john. Sendmail's
        virtusertable may make a local user of an address: a bare name, and the mailer `local`.
        """
        address = self.macro("{rcpt_addr}")
        if address and "@" not in address:
            if self.macro("{rcpt_mailer}") != "local":
                return ""
            _, at, domain = without_brackets(recipient).rpartition("@")
            address += at + domain if at else ""
        # Postfix gives it in lower case. If only case differs, --case-sensitive wants it as given.
        return "" if address.lower() == without_brackets(recipient).lower() else address

    def macro(self, name: str) -> str:
        """Return a macro of the MTA, "" if it has none or one that is not UTF-8."""
        try:
            return self.getsymval(name) or ""
        except (UnicodeError, Milter.error):
            return ""

    def data(self) -> int:
        return int(Milter.CONTINUE)

    def body(self, chunk: bytes) -> int:
        """Count the bytes of a message, as long as that can matter."""
        more_matters = self.message.count_body(len(chunk))
        if more_matters and not self.service.policy.options.ignore_size:
            return int(Milter.CONTINUE)
        knows_skip = bool(self._protocol & Milter.P_SKIP)  # old MTAs do not
        return int(Milter.SKIP if knows_skip else Milter.CONTINUE)

    def eom(self) -> int:
        """Accept a message or refuse it, now that its size is known."""
        policy = self.service.policy
        decision = policy.end_of_data(self.message)
        return self.finish(decision, "data", policy) if decision else int(Milter.CONTINUE)

    def finish(self, decision: Decision, step: str, policy: Policy) -> int:
        """Count and log a decision, set the reply, and give the return code that fits it."""
        reply = None if policy.options.dry_run else decision.reply
        size, is_refused = self.message.size, reply is not None
        self.service.counters.record_decision(decision, step, size, is_refused)
        if decision.finding.fault or decision.reply or policy.options.verbose:
            self.log_decision(decision, step, is_dry=reply is not decision.reply)
        if reply is None:
            return int(Milter.CONTINUE)
        self.setreply(*reply)
        return int(Milter.REJECT if reply.is_permanent else Milter.TEMPFAIL)

    def log_decision(self, decision: Decision, step: str, is_dry: bool) -> None:
        size, in_flight = self.message.size, decision.finding.in_flight
        line = f"{decision} step={step} size={size} inflight={in_flight}"
        line += f" sender={printable(self.message.sender)}"
        for name, macro in ("client", "_"), ("queue", "i"):
            value = self.macro(macro)
            line += f" {name}={printable(value)}" if value else ""
        line += " dry_run=yes" if is_dry else ""
        log.log(logging.WARNING if decision.finding.fault else logging.INFO, "%s", line)


# ---- Options: one table of them, in README's order ----


def matching(pattern: str, what: str, kind: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """Return a reader of text that fits a pattern, else it raises ArgumentTypeError."""

    def read_value(text: str) -> Any:
        if re.fullmatch(pattern, text):
            return kind(text)
        raise ArgumentTypeError("is not " + what)

    return read_value


def listen_socket(text: str) -> str:
    """Check libmilter's syntax of a socket. Raises ArgumentTypeError."""
    match = re.fullmatch(r"inet6?:([0-9]{1,5})(?:@[^@\s]+)?|(?:unix|local):/.+", text)
    if not match or (match[1] and not 0 < int(match[1]) < 65536):
        raise ArgumentTypeError("is not inet:PORT@HOST, inet6:PORT@HOST or unix:/PATH")
    return text


def parse_backend(text: str) -> tuple[list[Optional[str]], str]:
    """Read `[DOMAIN[,DOMAIN...]=]URL`. Raises ArgumentTypeError, which shows no password."""
    match = re.fullmatch(r"(?:([^/:?#=\s]+)=)?(https?://[!-~]+)", text, re.IGNORECASE)
    if not match:
        raise ArgumentTypeError("is not [DOMAIN[,DOMAIN...]=]http[s]://HOST[:PORT]/PATH")
    names: Sequence[Optional[str]] = match[1].split(",") if match[1] else [None]
    domains = [name and ascii_domain(name) for name in names]
    try:
        parts = urllib.parse.urlsplit(match[2])
        is_good = parts.hostname and parts.port != 0 and not parts.fragment and "" not in domains
    except ValueError:
        is_good = False
    if not is_good:
        reason = "has an empty domain, no host, a # or no port from 1 to 65535"
        hint = "; in a password @ : / ? # % are written %40 %3A %2F %3F %23 %25"
        raise ArgumentTypeError(reason + (hint if "@" in match[2] else ""))
    return domains, match[2]


def alias_source(text: str) -> Union[AliasFile, Table]:
    """Read an alias file, or make a table of TYPE:NAME. Raises ArgumentTypeError."""
    if re.match("[a-z][a-z0-9_-]*:.", text):
        return Table(text)
    try:
        return AliasFile(text)
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(f"cannot be read: {error}") from None


def read_cafile(file: str) -> ssl.SSLContext:
    """Read the certificates to trust. Raises ArgumentTypeError."""
    try:
        context = ssl.create_default_context(cafile=file)
    except OSError as error:
        raise ArgumentTypeError(f"cannot be used: {error}") from None
    # Python 3.13 sets this flag, and many a CA of one's own lacks the extensions that it wants.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


REPLY = Reply.from_template
DECIMAL = r"([0-9]{1,5}(\.[0-9]{1,9})?|\.[0-9]{1,9})"
NUMBER = matching(DECIMAL, "a number from 0 to 99999", float)
TIMEOUT = matching("(?=.*[1-9])" + DECIMAL, "a number above 0, to 99999", float)
COUNT = matching("[1-9][0-9]{0,3}", "a number from 1 to 9999", int)
DELIMITERS = matching(r"""[!#-/:-?\[\]-`{-~]*""", 'ASCII punctuation other than @ " \\')
ERROR_WORDS = matching("accept|tempfail", "accept or tempfail")
EXEMPT = matching("[^@].*", "user or user@domain")
OPTIONS: list[tuple[str, str, Callable[[str], Any], Any, str]] = [
    # name, what stands for its value (a flag has none), how that is read, default (a list: the
    # option may be repeated), help
    ("listen", "SOCKET", listen_socket, "inet:8894@127.0.0.1", "inet:PORT@HOST or unix:/PATH"),
    ("backend", "[DOMAIN[,DOMAIN...]=]URL", parse_backend, [], f"to ask ({DEFAULT_BACKEND})"),
    ("timeout", "SECONDS", TIMEOUT, 5, "for one recipient: aliases and all backends"),
    ("retry-after", "SECONDS", NUMBER, 10, "how long a backend or mailbox that failed rests"),
    ("max-queries", "N", COUNT, 16, "questions to one backend at a time"),
    ("cache-ttl", "SECONDS", NUMBER, 60, "how long an answer is used again; 0: never"),
    ("on-error", "accept|tempfail", ERROR_WORDS, "accept", "if no backend answers"),
    ("overquota-reply", "REPLY", REPLY, OVERQUOTA, "for a full mailbox"),
    ("toolarge-reply", "REPLY", REPLY, TOOLARGE, "for what the quota cannot hold"),
    ("unknown-reply", "REPLY", REPLY, None, "for UNKNOWN (let through)"),
    ("ignore-size", "", bool, False, "sizes do not matter, only the status does"),
    ("in-flight", "SECONDS", NUMBER, 60, "how long accepted mail counts; 0: not at all"),
    ("frontends", "N", COUNT, 1, "frontends that share the mail"),
    ("inactive-after", "DAYS", NUMBER, 0, "refuse for good if full and unchanged; 0: off"),
    ("inactive-reply", "REPLY", REPLY, INACTIVE, "for a full mailbox that is not in use"),
    ("recipient-delimiter", "CHARS", DELIMITERS, "+", "john+lists is john; empty: off"),
    ("case-sensitive", "", bool, False, "do not fold the user to lower case"),
    ("exempt", "ADDRESS", EXEMPT, [], "user or user@domain that is never asked about"),
    ("check-authenticated", "", bool, False, "check what authenticated clients send, too"),
    ("aliases", "FILE|TYPE:NAME", alias_source, [], "an alias file, or a Postfix table"),
    ("cafile", "FILE", read_cafile, None, "certificates to trust for https (the system's)"),
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
        """Raise BadOptions, with the reason in one line and no password of a URL."""
        message = re.sub(r"(unrecognized arguments: [^\s=:]*).*", r"\1", message, flags=re.DOTALL)
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
    parser = option_parser()
    options = parser.parse_args([])
    for where, words in option_lines(arguments):  # one by one: an error names file and line
        try:
            parser.parse_args(words, options)
            asked = [(d, url) for domains, url in options.backend for d in domains]
            if len(set(asked)) < len(asked):
                parser.error("argument --backend: names one backend twice for a domain")
        except BadOptions as error:
            raise BadOptions(f"{where}{error}") from None
    return options


def option_lines(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Return where arguments stand, and the arguments; @FILE line by line. Raises BadOptions."""
    for is_file, group in itertools.groupby(words, lambda word: word[:1] == "@"):
        if not is_file:
            yield "", list(group)
            continue
        for word in group:
            try:
                lines = read_lines(word[1:])
            except (OSError, ValueError) as error:
                raise BadOptions(f"cannot be read: {error}") from None
            for number, line in enumerate(lines, 1):
                yield f"{word[1:]} line {number}: ", split_line(line)


def split_line(line: str) -> list[str]:
    """Split a line of an @FILE; a comment starts the line or follows white space."""
    line = re.sub(r"(^|\s)#.*", "", line).strip()
    match = re.fullmatch(r"(--[\w-]+)(?:\s*=\s*|\s+)(.*)", line)
    if not match or match[1] == "--check":
        return line.split()
    value = match[2]
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return [f"{match[1]}={value[1:-1] if is_quoted else value}"]


def check(policy: Policy, addresses: list[str]) -> int:
    """Print a verdict for each address and return the exit status of --check."""
    hints = {
        "nobackend": ' reason="no --backend serves this domain"',
        "unknown": ' reason="the backend does not know this mailbox"',
    }
    status = 0
    if not addresses:
        print(f"the options are good; backends: {len(policy.backends)}")
    for address in addresses:
        decision = policy.decide(address, Message())
        verdict, finding = decision.verdict, decision.finding
        hint = "" if finding.fault or decision.reply else hints.get(verdict, "")
        reply = " ".join(decision.reply) if decision.reply else "none"
        with contextlib.suppress(BrokenPipeError):  # a script may want the status alone
            print(f"{decision}{hint} reply={reply}")
        if finding.fault or hint:
            status = 2
        elif decision.reply:
            status = max(status, 1)
    return status


# ---- Service: what lives from start to end, and what a reload replaces ----


class Service:
    """Holds the policy in force; a thread of its own does what is due every second.

    A file on a disk that hangs blocks that thread alone: mail and signals go on.
    """

    def __init__(self, arguments: Sequence[str], options: Namespace) -> None:
        self.arguments = arguments
        self.counters, self.ledger = Counters(), Ledger(options)
        self.policy = Policy(options, self.ledger, self.counters)
        self.reload_wanted = threading.Event()
        self.metrics_lock = threading.Lock()  # for one writer at a time: at the end there are two

    def do_housekeeping(self) -> None:
        """Do what is due every second, for ever, and what a HUP asks for."""
        metrics_due = 0.0  # on the monotonic clock
        while True:
            try:
                if self.reload_wanted.wait(TICK):
                    self.reload_wanted.clear()  # a HUP from here on means another reload
                    self.reload()
                for source in self.policy.aliases.sources:
                    if isinstance(source, AliasFile):
                        source.refresh()
                if time.monotonic() >= metrics_due:
                    metrics_due = time.monotonic() + METRICS_EVERY
                    self.write_metrics()
            except Exception as error:  # mail goes on, whatever it was
                log.error("state=failed reason=%s", printable(repr(error)))

    def reload(self) -> None:
        """Read options and aliases again into a new Policy; bad ones change nothing.

        Questions under way finish in the old backends; the breakers of the new ones begin anew.
        """
        try:
            options = read_options(self.arguments)
            policy = Policy(options, self.ledger, self.counters)
        except (BadOptions, OSError, ValueError, SystemExit) as error:
            log.error("state=kept reason=%s", printable(error))
            return
        self.ledger.options = options
        self.policy = policy
        gc.collect()  # frees the old policy: reference cycles would keep its threads and aliases
        log.info("state=reloaded")

    def write_metrics(self) -> None:
        """Write the metrics, if that is wanted; a failure is logged each time."""
        file = self.policy.options.metrics
        if not file:
            return
        gauges: dict[tuple[str, Labels], float] = {
            (name, ()): number for name, number in self.ledger.gauges().items()
        }
        for backend in self.policy.backends.values():
            gauges["backend_up", (("backend", backend.name),)] = int(not backend.is_down)
        try:
            with self.metrics_lock:
                write_whole(file, self.counters.render(gauges))
        except OSError as error:
            log.error("metrics=%s state=failed reason=%s", file, printable(error))


# ---- Process: log, socket, signals, start and stop ----


@contextlib.contextmanager
def log_to(syslog: bool) -> Iterator[None]:
    """Log in a thread of its own: no full pipe or slow syslogd holds mail up. Raises OSError."""
    handler: logging.Handler
    if syslog:
        # FreeBSD has its socket in /var/run.
        device = next(filter(os.path.exists, ("/dev/log", "/var/run/log")), "/dev/log")
        facility = logging.handlers.SysLogHandler.LOG_MAIL
        handler = logging.handlers.SysLogHandler(device, facility)
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
        with contextlib.suppress(queue.Full):  # nobody reads the log: the end mark does not fit
            listener.stop()


def prepare_socket(where: str) -> str:
    """Remove a stale unix socket; return the path of a new one, "" for a port. Raises OSError."""
    kind, _, path = where.partition(":")
    port, _, host = path.partition("@")
    family = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get(kind, socket.AF_UNIX)
    path = path if family == socket.AF_UNIX else ""
    if pathlib.Path(path).is_socket():
        with socket.socket(family) as probe:
            probe.settimeout(1)
            if probe.connect_ex(path) == errno.ECONNREFUSED:  # nobody listens there
                os.unlink(path)
    with socket.socket(family) as probe:  # libmilter would not say why it cannot listen
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(path or (host.strip("[]"), int(port)))
    if path:
        os.unlink(path)
    return path


def serve(service: Service, where: str) -> int:
    """Serve the MTA at a socket until TERM or INT; return the exit status. Raises OSError.

    The end cuts sessions off: the MTA does with them what it does without the milter.
    """
    path = prepare_socket(where)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # Without a free file descriptor libmilter loops.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # libmilter has a thread that waits for HUP, TERM and INT, and ends at each of them. The kernel
    # prefers the main thread, whose handlers stand here. If libmilter's thread gets one anyway,
    # wait_for_end() ends the program. A handler may interrupt another one: only SimpleQueue.put()
    # is safe there.
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1:
        signal.signal(number, lambda number, frame: signals.put(number))
    Milter.factory = lambda: QuotaMilter(service)
    Milter.setbacklog(BACKLOG)
    Milter.set_exception_policy(Milter.CONTINUE)  # a bug here refuses nothing
    libmilter = threading.Thread(
        target=Milter.runmilter, args=("quota_milter", where, 0, False), daemon=True
    )
    libmilter.start()
    threading.Thread(target=service.do_housekeeping, daemon=True).start()
    dry_run = " dry_run=yes" if service.policy.options.dry_run else ""
    log.info("listen=%s state=started version=%s%s", where, VERSION, dry_run)
    status = wait_for_end(service, signals, libmilter)
    # A log that nobody reads must not hold up the end.
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(status))
    signal.setitimer(signal.ITIMER_REAL, STOP_SECONDS)
    with contextlib.suppress(OSError):  # "" is no path
        os.unlink(path)
    service.write_metrics()
    service.counters.log_line()
    log.info("listen=%s state=stopped", where)
    return status


def wait_for_end(
    service: Service, signals: queue.SimpleQueue[int], libmilter: threading.Thread
) -> int:
    """Do what signals ask for until TERM or INT; return the exit status."""
    while libmilter.is_alive():
        try:
            caught = signals.get(timeout=TICK)
        except queue.Empty:
            continue
        if caught in (signal.SIGTERM, signal.SIGINT):
            return 0
        if caught == signal.SIGHUP:
            service.reload_wanted.set()
        else:
            service.counters.log_line()
    log.error('state=failed reason="libmilter ended by itself: did a signal reach its thread?"')
    return 1


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    error_prefix = ""
    try:
        options = read_options(arguments)
        error_prefix = "argument --syslog: "
        with log_to(options.syslog and options.check is None):
            error_prefix = ""
            service = Service(arguments, options)
            if options.check is not None:
                return check(service.policy, options.check)
            if Milter is None:
                raise OSError("pymilter is missing: apt-get install python3-milter")
            error_prefix = f"argument --listen: {options.listen}: "
            return serve(service, options.listen)
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    except (BadOptions, OSError) as error:
        hint = ": may this user write there?" if isinstance(error, PermissionError) else ""
        print(f"quota_milter.py: error: {error_prefix}{error}{hint}", file=sys.stderr)
        return 2 if isinstance(error, BadOptions) else 1


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(BrokenPipeError, AttributeError):  # nobody reads, or it is closed
        sys.stdout.flush()
    os._exit(status)  # a name look-up that hangs must not hold up the end
