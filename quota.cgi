#!/usr/bin/python3 -IS
"""quota.cgi - say whether a user's mbox file is over its quota.

USE
    As a CGI script: copy it into cgi-bin, make it executable and ask

        GET /cgi-bin/quota.cgi?u=john&d=example.com

    The answer is one line of text/plain: `OK john 1048576 209715200`,
    `OVERQUOTA john 209715201 209715200` or `UNKNOWN john 0 209715200`: status,
    user, bytes used, quota in bytes (0: no limit). A mailbox is over its quota
    when the file is larger than the limit.

    quota.cgi --serve [[HOST:]PORT]  the same over HTTP without a web server
                                     (127.0.0.1:8025 where nothing follows)
    quota.cgi USER[@DOMAIN]          the same line in a shell
    application                      the same for mod_wsgi, uWSGI and gunicorn

SETTINGS
    The constants below; an environment variable of the same name beats them.

DIAGNOSTICS
    400  no user, a name that no mailbox can have, or no domain where the path
         needs one
    403  the client's address is not in QUOTA_ALLOW
    405  neither GET nor HEAD
    500  a bad setting, or a mailbox that cannot be read
    Each with one line, `ERROR why`, which is never a verdict (in a shell on
    standard error, with status 1); the detail goes to standard error.

SECURITY
    Whoever may ask learns who has a mailbox and how large it is: let only the
    frontends ask. Names are checked before they become part of a path. Under a
    web server the command line is ignored: a query without `=` is passed there.
    The script needs search permission on the mail folder and none on the files.
    It never writes.
"""

# ruff: noqa: E402 - a CGI's cost is its start: it ends before the imports that it does not need.

from __future__ import annotations

import _thread
import errno
import os
import stat
import sys
import time

TYPE_CHECKING = False  # `typing` would make the start longer
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Callable, Optional

    Env = Mapping[bytes, bytes]  # names and files are not always UTF-8: all text is bytes
    Header = list[tuple[str, str]]
    Response = tuple[str, Header, bytes]

QUOTA_LIMIT = "200M"  # bytes, or with K, M, G, T (powers of 1024); 0: no limit
QUOTA_MAILBOX = "/var/mail/%n"  # %n user, %d domain, %u user@domain, %h the user's home, %% percent
QUOTA_USERS = ""  # a file of lines `user limit`, `user@domain limit`, `@domain limit`
QUOTA_ALLOW = ""  # addresses and networks that may ask: 192.0.2.25 2001:db8::/32; none: all
QUOTA_GRACE = "auto"  # what the message that fills the mailbox may take beyond its quota: 1M, 10%
QUOTA_UNKNOWN = "off"  # 1: a mailbox that does not exist is UNKNOWN rather than OK with 0 bytes


def measure(user: bytes, domain: Optional[bytes], missing: bytes, env: Env) -> Measured:
    """Measure the mbox file of a user. `missing` is the status where there is none.

    Raises Problem.
    """
    quota = user_limit(user, domain, env)
    if quota is None:
        quota = parse_limit("QUOTA_LIMIT", setting("QUOTA_LIMIT", env))
    grace = parse_grace(setting("QUOTA_GRACE", env), quota, b"0")
    path = expand("QUOTA_MAILBOX", user, domain, env)
    if path is None:
        return Measured(b"UNKNOWN", 0, quota, grace)
    try:
        found = os.stat(path)
    except OSError as error:
        check_missing(error, "QUOTA_MAILBOX", env)
        return Measured(missing, 0, quota, grace)
    if not stat.S_ISREG(found.st_mode):
        raise Problem(500, "the mailbox is not a file", path)
    status = b"OVERQUOTA" if 0 < quota < found.st_size else b"OK"
    return Measured(status, found.st_size, quota, grace, found.st_mtime)


# ---- From here to the end the text is the same in quota.cgi and maildir_quota.cgi. ----

NAME_LENGTH = 255  # bytes in a user or a domain, as in a file's name
HEX = b"0123456789abcdefABCDEF"
PLACEHOLDERS = "%n user, %d domain, %u user@domain, %h home, %1n or %1.2n a part, %% percent"
TWICE = "in systemd and uWSGI each % is written twice"
END_OF_9999 = 253402300800  # seconds since the epoch; an HTTP date has four digits for the year
REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 405: "Method Not Allowed"}
REASONS[500] = "Internal Server Error"


class Problem(Exception):
    """Ends a request: HTTP status, a line for the client that names no path, a detail to log."""

    def __init__(self, status: int, why: str, detail: object = "") -> None:
        super().__init__(why)
        self.status, self.why, self.detail = status, why, detail


class Measured:
    """What was found of a mailbox: a status, bytes and seconds (a NamedTuple would start slower).

    `quota` 0 is no limit, `grace` what may exceed it; `changed` is when somebody last delivered,
    read or deleted, in seconds since the epoch, 0 where that is not known.
    """

    __slots__ = ("status", "used", "quota", "grace", "changed")

    def __init__(
        self, status: bytes, used: int, quota: int, grace: int, changed: float = 0
    ) -> None:
        self.status, self.used, self.quota = status, used, quota
        self.grace, self.changed = grace, changed


def log(text: str) -> None:
    """Write a line to standard error, if that is possible."""
    try:
        os.write(2, f"quota: {text}\n".encode())
    except OSError:
        pass  # it is closed, or a disk is full


def read_file(path: bytes, most: int) -> tuple[bytes, os.stat_result]:
    """Read at most so many bytes of a file (-1: all), and its status. Raises OSError.

    What is no file, as a FIFO, whose opening would wait, counts as missing.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a file", path)
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        return file.read(most), os.fstat(file.fileno())


def receive(connection: Any, deadline: float, most: int, ends: tuple[bytes, ...] = ()) -> bytes:
    """Receive until one of `ends`, the connection's end, or `most` bytes. Raises OSError.

    The deadline, of time.monotonic(), is for all: a socket's own timeout is for each piece.
    """
    text = b""
    while len(text) < most and not any(end in text for end in ends):
        connection.settimeout(max(0, deadline - time.monotonic()))
        piece = connection.recv(most - len(text))
        if not piece:
            break
        text += piece
    return text


# ---- settings ----


def setting(name: str, env: Env, *choices: bytes) -> bytes:
    """Return a setting: from the environment, else the constant at the top of the file.

    Raises Problem where there are choices and it is none of them.
    """
    value = env.get(name.encode(), str(globals()[name]).encode())
    if choices and value not in choices:
        raise Problem(500, f"{name} is not one of {b', '.join(choices).decode()}", value)
    return value


def parse_limit(name: str, text: bytes) -> int:
    """Read a limit like 200M in bytes. Raises Problem where it is none."""
    text = text.strip().upper()
    power = b"KMGT".find(text[-1:]) + 1
    digits = text[:-1] if power else text
    if not digits.isdigit() or len(digits) > 20:
        raise Problem(500, name + " has a limit that is not like 200M", text)
    return int(digits) << 10 * power


def parse_grace(text: bytes, quota: int, default: bytes) -> int:
    """Read a grace in bytes: written like a limit, or `10%` of the quota. Raises Problem."""
    if text.strip() == b"auto":
        text = default
    if text[-1:] == b"%":
        return quota * parse_limit("QUOTA_GRACE", text[:-1]) // 100
    return parse_limit("QUOTA_GRACE, neither auto nor like 10%,", text)


def user_limit(user: bytes, domain: Optional[bytes], env: Env) -> Optional[int]:
    """Look up in QUOTA_USERS the limit in bytes of user@domain, user or @domain. Raises Problem."""
    path = setting("QUOTA_USERS", env)
    if not path:
        return None
    names = [user] if domain is None else [user + b"@" + domain, user, b"@" + domain]
    try:
        text = read_users(path)
    except OSError as error:
        raise Problem(500, "the file QUOTA_USERS cannot be read", error) from None
    for name in names:
        start = find_line(text, name.lower())
        if start >= 0:
            limit = text[start + 1 : text.index(b"\n", start + 1)][len(name) :].partition(b"#")[0]
            try:
                return parse_limit("QUOTA_USERS", limit)
            except Problem:
                number = text.count(b"\n", 0, start + 1)
                why = f"QUOTA_USERS: line {number} is not `user limit`, with a limit like 200M"
                raise Problem(500, why, name) from None
    return None


def find_line(text: bytes, name: bytes) -> int:
    """Return where the first line of a name begins, at the newline before it; -1: there is none.

    A name alone, or with a colon, is a mistake that is to be seen.
    """
    if b" " in name or name[:1] == b"#":  # would find another name, or a comment
        return -1
    places = [text.find(b"\n" + name + end) for end in (b" ", b":", b"\n")]
    return min((place for place in places if place >= 0), default=-1)


LOWER = bytes.maketrans(b"\t\r" + bytes(range(65, 91)), b"  " + bytes(range(97, 123)))
users_read: dict[object, bytes] = {}  # the text of QUOTA_USERS, by what changes with the file
users_lock = _thread.allocate_lock()  # as in `threading`, whose import takes longer


def read_users(path: bytes) -> bytes:
    """Read QUOTA_USERS, once for each change: in lower case, a newline before each line.

    Raises OSError, Problem.
    """
    with users_lock:
        status = os.stat(path)
        stamp = path, status.st_ino, status.st_size, status.st_mtime_ns
        if stamp not in users_read:
            text = read_file(path, -1)[0]
            if text and text[-1:] != b"\n":
                raise Problem(500, "QUOTA_USERS does not end in a newline: is it half a file?")
            users_read.clear()
            users_read[stamp] = b"\n" + text.translate(LOWER)
        return users_read[stamp]


# ---- who may ask ----


def parse_network(text: str) -> tuple[int, int]:
    """Return an address or network as a number, and how many of its last bits do not count.

    An IPv4 address has one bit more than all of IPv6. Raises OSError, ValueError.
    """
    from _socket import AF_INET, AF_INET6, inet_pton  # `socket`, `ipaddress` take far longer

    address, slash, length = text.partition("/")
    family, bits = (AF_INET6, 128) if ":" in address else (AF_INET, 32)
    number = int.from_bytes(inet_pton(family, address), "big")
    if slash and not (length.isascii() and length.isdigit() and int(length) <= bits):
        raise ValueError(text)
    free = bits - int(length) if slash else 0
    if number >> 32 == 0xFFFF and free <= 32:  # ::ffff:192.0.2.25 is an IPv4 address
        family, number = AF_INET, number & 0xFFFFFFFF
    return number | (family == AF_INET) << 128, free


def is_among(peer: str, networks: str) -> bool:
    """Say whether an address is in one of some networks. Raises OSError, ValueError."""
    wanted = [parse_network(text) for text in networks.replace(",", " ").split()]
    try:
        number, _ = parse_network(peer.partition("%")[0])
    except (OSError, ValueError):
        return False
    return any(number >> free == network >> free for network, free in wanted)


def check_peer(peer: str, env: Env) -> None:
    """Raise Problem where QUOTA_ALLOW is set and this address is not in it."""
    allow = setting("QUOTA_ALLOW", env)
    try:
        if not allow or is_among(peer, allow.decode("latin-1")):
            return
    except (OSError, ValueError):
        why = "QUOTA_ALLOW is not like `192.0.2.25 198.51.100.0/24 2001:db8::/32`"
        raise Problem(500, why, allow) from None
    raise Problem(403, "this address is not in QUOTA_ALLOW")


# ---- names and paths ----


def check_name(what: str, name: bytes) -> None:
    """Raise Problem where a user or domain cannot be a file's name or would break the answer."""
    if not 0 < len(name) <= NAME_LENGTH or name[:1] == b"." or b"/" in name:
        raise Problem(400, "no mailbox has such a " + what)
    if any(c < " " or "\x7f" <= c <= "\x9f" for c in name.decode("utf-8", "surrogateescape")):
        raise Problem(400, "control character in the " + what)


def expand(name: str, user: bytes, domain: Optional[bytes], env: Env) -> Optional[bytes]:
    """Put user and domain into the path that is a setting. None: the system has no such user (%h).

    Raises Problem where the path needs a domain and there is none, or is a bad setting.
    """
    template = setting(name, env)
    if not template.startswith((b"/", b"%h")):
        raise Problem(500, name + " does not begin with /", template)
    address = None if domain is None else user + b"@" + domain
    values = {b"n": user, b"d": domain, b"u": address}
    path, *parts = template.replace(b"%%", b"\0").split(b"%")
    for part in parts:
        text = part.lstrip(b"0123456789.")
        letter, (skip, _, width) = text[:1], part[: len(part) - len(text)].rpartition(b".")
        if letter == b"h":
            values[letter] = home_of(user)
            if values[letter] is None:
                return None
        if letter not in values or b"." in skip or not skip and width[:1] == b"0":
            why = f"{name} has a placeholder that does not exist; known are {PLACEHOLDERS}"
            raise Problem(500, why, template)
        value, begin, length = values[letter], int(skip or b"0"), int(width or b"0")
        if value is None:
            raise Problem(400, "no domain (d=) given")
        path += value[begin : begin + length if length else None] + text[1:]
    if not {b"n", b"u", b"h"}.intersection(part[:1] for part in parts):
        raise Problem(500, f"{name} names no user (%n, %u or %h): {TWICE}", template)
    if path.split(b"/").count(b"..") > template.split(b"/").count(b".."):  # %1.2n of a..b
        raise Problem(400, "no mailbox has such a user")
    return path.replace(b"\0", b"%")


def home_of(user: bytes) -> Optional[bytes]:
    """Return the home directory of a system user, None where there is no such user."""
    import pwd

    try:
        return os.fsencode(pwd.getpwnam(os.fsdecode(user)).pw_dir)
    except KeyError:
        try:
            pwd.getpwuid(0)  # is there no such user, or nothing that could say so?
        except KeyError:
            raise Problem(500, "the users of the system cannot be looked up") from None
        return None


def check_missing(error: OSError, name: str, env: Env) -> None:
    """Raise Problem unless the error means that there is no mailbox at the path of this setting."""
    why, detail = f"cannot read the mailbox: {error.strerror}", str(error)
    if isinstance(error, PermissionError):
        who = f"user {os.geteuid()}, group {os.getegid()}"
        detail += f"; let {who} search (x) the folders above it, and read a Maildir's (rx)"
    if isinstance(error, FileNotFoundError) or error.errno == errno.ENAMETOOLONG:
        template = setting(name, env)
        fixed = template.replace(b"%%", b"\0").partition(b"%")[0].replace(b"\0", b"%")
        if not fixed or os.path.isdir(fixed.rpartition(b"/")[0] or b"/"):
            return
        why, detail = f"{name} begins with a folder that does not exist: {TWICE}", str(template)
    raise Problem(500, why, detail)


# ---- a question and its answer ----


def respond(env: Env) -> Response:
    """Answer a request that is given as to a CGI (RFC 3875): HTTP status, header fields, body."""
    method = env.get(b"REQUEST_METHOD", b"GET")
    header: Header = []
    try:
        check_peer(env.get(b"REMOTE_ADDR", b"").decode("latin-1"), env)
        if method not in (b"GET", b"HEAD"):
            header = [("Allow", "GET, HEAD")]
            raise Problem(405, "only GET and HEAD are answered")
        line, header = answer(env.get(b"QUERY_STRING", b""), env)
        status = 200
    except Problem as problem:
        status, line = problem.status, b"ERROR %s\n" % problem.why.encode()
        if status == 500:
            log(f"{problem.why}: {str(problem.detail)!a}")
    header += [("Content-Type", "text/plain"), ("Content-Length", str(len(line)))]
    header += [("Cache-Control", "no-store")]  # no proxy may keep it
    return f"{status} {REASONS[status]}", header, b"" if method == b"HEAD" else line


def answer(query: bytes, env: Env) -> tuple[bytes, Header]:
    """Answer a query with `STATUS user used quota`, and header fields. Raises Problem."""
    fields = parse_query(query)
    user, domain = fields.get(b"u"), fields.get(b"d")
    if user is None:
        raise Problem(400, "no user (u=) given")
    check_name("user", user)
    if domain is not None:
        check_name("domain", domain)
    is_unknown = setting("QUOTA_UNKNOWN", env, b"off", b"1", b"0", b"") == b"1"
    found = measure(user, domain, b"UNKNOWN" if is_unknown else b"OK", env)
    header: Header = [("Quota-Grace", str(found.grace))] if found.grace else []
    if 0 < found.changed < END_OF_9999:
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(found.changed))
        header.append(("Last-Modified", date))
    return b"%s %s %d %d\n" % (found.status, user, found.used, found.quota), header


def parse_query(query: bytes) -> dict[bytes, bytes]:
    """Read a query string; where a name stands twice the first counts."""
    fields: dict[bytes, bytes] = {}
    for field in query.split(b"&"):
        name, equals, value = field.partition(b"=")
        if equals:
            fields.setdefault(unquote(name), unquote(value))
    return fields


def unquote(text: bytes) -> bytes:
    """Decode a form-encoded name or value, as urllib.parse.unquote_plus does."""
    first, *parts = text.replace(b"+", b" ").split(b"%")
    decoded = [first]
    for part in parts:
        coded = len(part) > 1 and part[0] in HEX and part[1] in HEX
        decoded.append(bytes((int(part[:2], 16),)) + part[2:] if coded else b"%" + part)
    return b"".join(decoded)


def run_cgi() -> int:
    """Answer the one request of a web server that started the script."""
    status, header, body = respond(os.environb)
    head = "".join(f"{name}: {value}\n" for name, value in [("Status", status), *header])
    os.write(1, head.encode() + b"\n" + body)
    return 0


IS_CGI = b"GATEWAY_INTERFACE" in os.environb or b"REQUEST_METHOD" in os.environb
if __name__ == "__main__" and IS_CGI:
    os._exit(run_cgi())  # an orderly end would take as long as the answer

# A CGI has ended here: what follows is for the other ways to run the script.

import argparse
import contextlib
import io
import resource
import signal
import socket
import socketserver
import string
import threading
from http.server import BaseHTTPRequestHandler
from urllib.parse import quote, urlencode


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answer one request of a WSGI server (PEP 3333: its strings are bytes in latin-1)."""
    env = {**os.environb, b"REMOTE_ADDR": b""}
    for name, value in environ.items():
        if isinstance(value, str):
            env[name.encode("latin-1")] = value.encode("latin-1")
    status, header, body = respond(env)
    start_response(status, header)
    return [body]


# ---- --serve: HTTP without a web server ----

REQUEST_SECONDS = 10  # for a whole request
REQUEST_LENGTH = 65537  # bytes of a request: one more than http.server accepts in a line
THREADS = 1000  # connections at a time
PATIENCE = 5  # seconds for a mailbox that is being measured, as long as the milter waits
SLOW, KEPT = 1, 60  # seconds: an answer that took longer than the first is used again so long


class Question(threading.Event):
    """A query: set once it is answered, and how long its answer is used."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.monotonic()
        self.used_until = float("inf")
        self.response: Optional[Response] = None


questions: dict[bytes, Question] = {}  # those under way, and those with a slow answer
questions_lock = threading.Lock()


def ask(query: bytes) -> Optional[Response]:
    """Answer a query; None where that takes too long.

    Whoever asks the same meanwhile gets the same answer, or none after PATIENCE seconds: a mailbox
    whose disk hangs holds one thread. A slow answer is kept: a mailbox that takes longer to measure
    than the milter waits is known at its second question.
    """
    with questions_lock:
        now = time.monotonic()
        for old in [query for query, one in questions.items() if one.used_until < now]:
            del questions[old]
        question = questions.setdefault(query, mine := Question())
    if question is not mine:
        question.wait(max(0, question.began + PATIENCE - now))
        return question.response
    try:
        env = {**os.environb, b"QUERY_STRING": query, b"QUOTA_ALLOW": b""}  # looked at before
        mine.response = respond(env)
        return mine.response
    finally:
        now = time.monotonic()
        is_kept = mine.response and mine.response[0] == "200 OK" and now - mine.began > SLOW
        mine.used_until = now + KEPT if is_kept else 0
        mine.set()


class Handler(BaseHTTPRequestHandler):
    """Answers the one request of a connection."""

    raw_requestline: bytes
    wbufsize = -1  # an answer leaves in one piece
    error_content_type, error_message_format = "text/plain", "ERROR %(message)s\n"

    def setup(self) -> None:
        """Receive the whole request, as the base class has no limit of time for all of it."""
        super().setup()
        deadline, ends = time.monotonic() + REQUEST_SECONDS, (b"\n\r\n", b"\n\n")
        request = receive(self.connection, deadline, REQUEST_LENGTH, ends)
        if len(request) < REQUEST_LENGTH and not any(end in request for end in ends):
            request = b""  # half a request may name another mailbox
        self.rfile = io.BytesIO(request)

    def parse_request(self) -> bool:
        """Parse a request's first line and header; say whether it is to be answered."""
        # The base class takes bytes for latin-1, in which some of UTF-8's are spaces.
        self.raw_requestline = quote(
            self.raw_requestline, safe=string.punctuation + " \r\n"
        ).encode()
        return super().parse_request()

    def do_GET(self) -> None:
        """Answer GET, and HEAD with the same without a body."""
        response = ask(self.path.partition("?")[2].encode())
        if response is None:
            log(f"the mailbox hangs: {self.path!a}")
            self.send_error(500, "the mailbox hangs, its disk does not answer")
        else:
            self.send_answer(*response)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Answer that this is not answered."""
        self.send_answer(*respond({b"REQUEST_METHOD": b"POST", b"QUOTA_ALLOW": b""}))

    def send_answer(self, status: str, header: Header, body: bytes) -> None:
        """Send an answer."""
        self.send_response_only(int(status[:3]))
        for name, value in header:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log no requests: the frontends do."""


class Server(socketserver.ThreadingTCPServer):
    """Gives each connection that is allowed a thread."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 1024
    threads = THREADS

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Turn strangers away, and everybody where all threads are busy."""
        try:
            check_peer(client_address[0], os.environb)
        except Problem as problem:
            with contextlib.suppress(OSError):  # the client has gone
                head = "HTTP/1.0 403 Forbidden\r\nContent-Type: text/plain\r\n\r\n"
                request.sendall(f"{head}ERROR {problem}\n".encode())
                request.recv(REQUEST_LENGTH, socket.MSG_DONTWAIT)  # unread, it would be a reset
            return False
        return threading.active_count() <= self.threads

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error, unless it is that the client has gone."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log(f"a request failed: {error!r}")


def serve(where: str) -> None:
    """Answer over HTTP at [HOST:]PORT until TERM or INT. Raises OSError, ValueError, Problem."""
    host, _, port = where.rpartition(":")
    host, number = host.strip("[]") or "127.0.0.1", range(1 << 16).index(int(port))
    found = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)
    Server.address_family, (address, *_) = found[0][0], found[0][4]
    check_peer(str(address), {**os.environb, b"QUOTA_ALLOW": b""})
    if not is_among(str(address), "127.0.0.0/8 ::1") and not setting("QUOTA_ALLOW", os.environb):
        raise ValueError("elsewhere than on loopback it wants QUOTA_ALLOW: who may ask?")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    Server.threads = min(THREADS, most // 3)  # a thread may open two files beside its connection
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Server((str(address), number), Handler) as server:
        log("serving on {} port {}".format(*server.server_address))
        server.serve_forever()


# ---- the command line ----


def main(argv: Optional[list[str]] = None) -> int:
    """Do what the command line asks for and return the exit status."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s (USER[@DOMAIN] | --serve [[HOST:]PORT])",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("mailbox", nargs="?", help="whom to tell about")
    wanted.add_argument("--serve", nargs="?", const="127.0.0.1:8025", help="serve over HTTP")
    options = parser.parse_args(argv)
    try:
        if options.serve is None:
            return show(os.fsencode(options.mailbox))
        serve(options.serve)
    except (OSError, ValueError, Problem) as error:
        log(f"--serve {options.serve}: {error}")
        return 1 if isinstance(error, OSError) else 2  # an address may come later
    except KeyboardInterrupt:
        pass
    return 0


def show(mailbox: bytes) -> int:
    """Print the answer for USER[@DOMAIN] and return the exit status."""
    user, at, domain = mailbox.rpartition(b"@")
    query = urlencode({"u": user, "d": domain} if at else {"u": domain}).encode()
    status, _, line = respond({**os.environb, b"QUERY_STRING": query, b"QUOTA_ALLOW": b""})
    is_error = status != "200 OK"
    os.write(2 if is_error else 1, line)
    return int(is_error)


if __name__ == "__main__":
    os._exit(main())  # an orderly end would wait for threads that a disk holds
