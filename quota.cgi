#!/usr/bin/python3 -IS
"""quota.cgi - say whether a user's mbox file is over its quota.

    GET /cgi-bin/quota.cgi?u=john&d=example.com   as a CGI script
    quota.cgi --serve [[HOST:]PORT]   without a web server (127.0.0.1:8025)
    quota.cgi USER[@DOMAIN]           in a shell
    application                       for a WSGI server

The answer is one line, `OK john 1048576 209715200`: OK, OVERQUOTA (the file is larger
than the limit) or UNKNOWN (no such user), the user, bytes used and quota in bytes (0: no
limit). An error is the line `ERROR why` with HTTP status 4xx or 5xx, or in a shell on
standard error with exit status 1. The detail of a 500 goes to standard error. Header
fields tell by how many bytes one more message may exceed the quota (Quota-Grace), and
when the file was last changed (Last-Modified).

SETTINGS are the constants below; an environment variable of the same name
overrides them.

SECURITY: whoever may ask learns who has a mailbox and how large it is, so let
only the frontends ask (QUOTA_ALLOW). Names are checked before they become part
of a path. Under a web server the command line is ignored: web servers pass a query
without `=` as arguments. The script opens no mailbox and never writes: it needs search
permission on the mail folder and none on the files.
"""

# ruff: noqa: E402 - the imports behind the CGI part are for the other ways to run the script
from __future__ import annotations

import os
import stat
import time

TYPE_CHECKING = False  # the import of `typing` would make the start longer
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Callable, Optional

    Env = Mapping[bytes, bytes]  # users and paths are not always UTF-8: they are bytes
    Response = tuple[str, list[tuple[str, str]], bytes]  # status line, header fields, body

QUOTA_LIMIT = "200M"  # bytes, or with K, M, G, T (powers of 1024); 0: no limit
QUOTA_MAILBOX = "/var/mail/%n"  # %n user, %d domain, %u user@domain, %h home, %% percent
QUOTA_USERS = ""  # a file of lines `user limit`, `user@domain limit`, `@domain limit`
QUOTA_ALLOW = ""  # addresses and networks that may ask: 192.0.2.25 2001:db8::/32; empty: all
QUOTA_GRACE = "auto"  # what Quota-Grace says: 1M, 10%; auto: 0
QUOTA_UNKNOWN = "off"  # 1: a mailbox that does not exist is UNKNOWN rather than OK with 0 bytes


def measure(question: Question) -> None:
    """Measure the mbox file of a user. Raises NoSuchUser, Problem, OSError."""
    listed, default = question.listed_limit(), question.setting("QUOTA_LIMIT")
    question.quota = parse_limit("QUOTA_LIMIT", default) if listed is None else listed
    path = question.path("QUOTA_MAILBOX")
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return  # no mail has come yet
    if not stat.S_ISREG(found.st_mode):
        raise Problem("the mailbox is not a file", path)
    question.used, question.changed = found.st_size, found.st_mtime
    question.status = b"OVERQUOTA" if 0 < question.quota < question.used else b"OK"


# ---- From here to the end the text is the same in quota.cgi and maildir_quota.cgi. ----

IPV4_IN_IPV6 = 10 * b"\0" + b"\xff\xff"  # what ::ffff:192.0.2.25 begins with
BAD_PATH = (
    " is not like /var/mail/%n: it must begin with / or %h, name the user by %n, %u or %h,"
    " and have no placeholders but these, %d, %% and parts like %1n and %1.2n"
)
HINT = ": in systemd and uWSGI each % is written twice"
BAD_REQUEST = "400 Bad Request"
FAILED = "500 Internal Server Error"


class Problem(Exception):
    """Ends a question: the client is told why, without paths; the detail of a 500 is logged."""

    def __init__(self, why: str, detail: object = "", status: str = FAILED) -> None:
        super().__init__(why)
        self.detail, self.http_status = detail, status


class NoSuchUser(Exception):
    """Ends a question: there is no such user in the system, or in Dovecot."""


def log(text: str) -> None:
    """Write text to standard error, if that is possible."""
    try:
        os.write(2, b"quota: " + text.encode("utf-8", "backslashreplace") + b"\n")
    except OSError:
        pass  # it is closed, or a disk is full


class Question:
    """A question with its settings, and the answer as far as it is known."""

    user = domain = b""  # a domain may be missing
    status = b"OK"
    used = quota = 0  # bytes; a quota of 0 is none
    auto_grace = b"0"  # what QUOTA_GRACE=auto is for this mailbox
    # Seconds since the epoch: when mail was last delivered, read or removed; 0: not known.
    changed = 0.0

    def __init__(self, env: Env) -> None:
        self.env = env  # variables of a CGI (RFC 3875), and settings

    def setting(self, name: str, *choices: bytes) -> bytes:
        """Return a setting, which has to be one of the choices if there are any. Raises Problem."""
        value = self.env.get(name.encode(), str(globals()[name]).encode())
        if choices and value not in choices:
            raise Problem(name + " is not one of " + b", ".join(choices).decode(), value)
        return value

    def read_query(self) -> None:
        """Read user and domain from the query. Raises Problem."""
        fields: dict[bytes, bytes] = {}
        for field in self.env.get(b"QUERY_STRING", b"").split(b"&"):
            name, _, value = field.partition(b"=")
            fields[name] = unquote(value)
        if b"u" not in fields:
            raise Problem("no user (u=) given", status=BAD_REQUEST)
        self.user = checked("user", fields[b"u"])
        if b"d" in fields:
            self.domain = checked("domain", fields[b"d"])

    def grace(self) -> int:
        """Return QUOTA_GRACE in bytes; `10%` is a share of the quota. Raises Problem."""
        text = self.setting("QUOTA_GRACE").strip()
        text = self.auto_grace if text == b"auto" else text
        if text[-1:] == b"%":
            return self.quota * parse_limit("QUOTA_GRACE", text[:-1]) // 100
        return parse_limit("QUOTA_GRACE", text)

    def contents(self, name: str) -> bytes:
        """Return what is in the file whose path is a setting. Raises Problem."""
        try:
            return read_file(self.setting(name))
        except OSError as error:
            raise Problem(f"the file {name} cannot be read", error) from None

    def listed_limit(self) -> Optional[int]:
        """Return the limit of user@domain, user or @domain in QUOTA_USERS in bytes, if it has one.

        Raises Problem.
        """
        if not self.setting("QUOTA_USERS"):
            return None
        text = fold(self.contents("QUOTA_USERS"))
        if text[-1:] != b"\n":  # somebody is still writing it, or the disk is full
            raise Problem("QUOTA_USERS does not end in a newline: is it half a file?")
        text = b"\n" + text
        for name in (self.user + b"@" + self.domain, self.user, b"@" + self.domain):
            # `john 5` would match the line `john 5 # note`, and `#x` a comment.
            if b" " in name or name[:1] == b"#":
                continue
            before, found, after = text.partition(b"\n" + fold(name) + b" ")
            if found:
                number = before.count(b"\n") + 1
                limit = after.partition(b"\n")[0].partition(b"#")[0]
                return parse_limit(f"QUOTA_USERS: the limit in line {number}", limit)
        return None

    def path(self, name: str) -> bytes:
        """Put the user into a path that is a setting. Raises NoSuchUser, Problem, OSError."""
        template = self.setting(name)
        bad = Problem(name + BAD_PATH + HINT, template)
        path, *parts = template.replace(b"%%", b"\0").split(b"%")
        letters = {part[:1] for part in parts}
        # %1n alone is not enough: many users have the same. It begins with a digit, not with n.
        if letters.isdisjoint((b"n", b"u", b"h")) or not template.startswith((b"/", b"%h")):
            raise bad
        folder = os.path.dirname(path).replace(b"\0", b"%") or b"/"
        try:
            os.stat(folder)  # below a path that is mistyped all mailboxes would look empty
        except FileNotFoundError:
            why = name + " begins with a folder that does not exist" + HINT
            raise Problem(why, folder) from None
        address = self.user + b"@" + self.domain if self.domain else b""
        values = {b"n": self.user, b"d": self.domain, b"u": address}
        if b"h" in letters:
            values[b"h"] = home_of(self.user)
        try:
            for part in parts:
                # Of %1.2n/ this is 1.2n/: skip 1 character, take 2. Of %1n it is 1n: take 1.
                rest = part.lstrip(b"0123456789.")
                skip, _, width = part[: len(part) - len(rest)].rpartition(b".")
                value = values[rest[:1]]
                if not value:
                    raise Problem("no domain (d=) given", status=BAD_REQUEST)
                path += value[int(skip or 0) :][: int(width or 0) or None] + rest[1:]
        except (KeyError, ValueError):
            raise bad from None
        # For the user a..b %1.2n is `..`, which would lead out of the folder.
        if path.split(b"/").count(b"..") > template.split(b"/").count(b".."):
            raise Problem("no mailbox has such a user", status=BAD_REQUEST)
        return path.replace(b"\0", b"%")


def checked(what: str, name: bytes) -> bytes:
    """Return a user or domain. Raises Problem if it cannot be a file's name of plain characters."""
    text = name.decode("utf-8", "surrogateescape")
    has_control = any(c < " " or "\x7f" <= c <= "\x9f" for c in text)
    if not 0 < len(name) <= 255 or name[:1] == b"." or b"/" in name or has_control:
        raise Problem("no mailbox has such a " + what, status=BAD_REQUEST)
    return name


def unquote(text: bytes) -> bytes:
    """Decode a form-encoded value, as urllib.parse.unquote_plus does."""
    decoded, *parts = text.replace(b"+", b" ").split(b"%")
    for part in parts:
        is_code = len(part) > 1 and not part[:2].strip(b"0123456789abcdefABCDEF")
        decoded += bytes((int(part[:2], 16),)) + part[2:] if is_code else b"%" + part
    return decoded


def parse_limit(where: str, text: bytes) -> int:
    """Read a size like 200M in bytes. Raises Problem, which says where."""
    text = text.strip().upper()
    power = b"KMGT".find(text[-1:]) + 1
    digits = text[:-1] if power else text
    if not digits.isdigit() or len(digits) > 20:
        raise Problem(where + " is not a size like 200M", text)
    return int(digits) << 10 * power


def parse_network(text: str) -> tuple[int, int]:
    """Return the address of a network as a number, and the number of its host bits.

    A 1 before the address keeps 0.0.0.1 and ::1 apart. Raises OSError, ValueError.
    """
    from _socket import AF_INET, AF_INET6, inet_pton  # `socket` or `ipaddress` would take longer

    address, slash, length = text.replace("_", "x").partition("/")  # int() would accept 2_4
    family, bits = (AF_INET6, 128) if ":" in address else (AF_INET, 32)
    packed = inet_pton(family, address).removeprefix(IPV4_IN_IPV6)
    host_bits = bits - int(length) if slash else 0
    if not 0 <= host_bits <= 8 * len(packed):  # ::ffff:192.0.2.0/24 would be all of IPv4
        raise ValueError(text)
    return int.from_bytes(b"\1" + packed, "big"), host_bits


def is_allowed(peer: str, allow: bytes) -> bool:
    """Say whether QUOTA_ALLOW is empty or has the peer's address. Raises Problem."""
    if not allow:
        return True
    try:
        networks = [parse_network(text) for text in allow.decode().replace(",", " ").split()]
    except (OSError, ValueError):
        why = "QUOTA_ALLOW is not like `192.0.2.25 198.51.100.0/24 2001:db8::/32`"
        raise Problem(why, allow) from None
    try:
        # A link-local address comes with its zone, fe80::1%eth0; some servers add brackets.
        number, _ = parse_network(peer.strip("[]").partition("%")[0])
    except (OSError, ValueError):
        return False  # it is the peer of a unix socket, or nothing
    return any(number >> bits == network >> bits for network, bits in networks)


def read_file(path: bytes, most: int = -1) -> bytes:
    """Read at most so many bytes of a file (-1: all), and never wait for a FIFO. Raises OSError."""
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
        return file.read(most) or b""


def fold(text: bytes) -> bytes:
    """Fold the text of QUOTA_USERS, or a name to be found there.

    It gets lower case, and spaces in place of tabs and CR. A colon and the end of a line get a
    space before them: so the mistakes `john: 5M` and `john` are found, and parse_limit() reports
    them.
    """
    text = text.lower().replace(b"\t", b" ").replace(b"\r", b" ")
    return text.replace(b":", b" :").replace(b"\n", b" \n")


def home_of(user: bytes) -> bytes:
    """Return the home directory of a system user. Raises NoSuchUser, Problem."""
    import pwd

    try:
        return os.fsencode(pwd.getpwnam(os.fsdecode(user)).pw_dir)
    except KeyError:
        try:
            pwd.getpwuid(0)  # root exists, if users can be looked up at all
        except KeyError:
            raise Problem("the users of the system cannot be looked up") from None
        raise NoSuchUser from None


def respond(env: Env) -> Response:
    """Answer a question, given a CGI's environment, with an HTTP response."""
    question, status, line = Question(env), "200 OK", b""
    method = env.get(b"REQUEST_METHOD", b"GET")
    fields = [("Content-Type", "text/plain"), ("Allow", "GET, HEAD"), ("Cache-Control", "no-store")]
    try:
        peer = env.get(b"REMOTE_ADDR", b"").decode("latin-1")
        if not is_allowed(peer, question.setting("QUOTA_ALLOW")):
            raise Problem("this address is not in QUOTA_ALLOW", status="403 Forbidden")
        if method not in (b"GET", b"HEAD"):
            raise Problem("only GET and HEAD are answered", status="405 Method Not Allowed")
        question.read_query()
        if question.setting("QUOTA_UNKNOWN", b"off", b"1", b"0", b"") == b"1":
            question.status = b"UNKNOWN"  # measure() changes it if it finds the mailbox
        measure(question)
        fields.append(("Quota-Grace", str(question.grace())))
    except NoSuchUser:
        question.status = b"UNKNOWN"
    except Problem as problem:
        status, line = problem.http_status, f"ERROR {problem}\n".encode()
        if status == FAILED:
            log(f"{problem}: user {question.user!a}, {problem.detail!a}")
    except OSError as error:
        status, line = FAILED, f"ERROR cannot read the mailbox: {error.strerror}\n".encode()
        log(f"{error}, as user {os.geteuid()}, group {os.getegid()}")
    if not line:
        line = b"%s %s %d %d\n" % (question.status, question.user, question.used, question.quota)
        if 0 < question.changed < 253402300800:  # before the year 10000
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(question.changed))
            fields.append(("Last-Modified", date))
    fields.append(("Content-Length", str(len(line))))
    return status, fields, b"" if method == b"HEAD" else line


IS_CGI = b"GATEWAY_INTERFACE" in os.environb or b"REQUEST_METHOD" in os.environb
if __name__ == "__main__" and IS_CGI:
    status, fields, body = respond(os.environb)
    head = "".join(f"{name}: {value}\n" for name, value in [("Status", status), *fields])
    os.write(1, head.encode() + b"\n" + body)
    os._exit(0)  # a normal exit would add half of this time again

# A CGI has ended here: what follows is for the other ways to run the script.
import contextlib
import signal
import socket
import sys
import threading
import traceback
from urllib.parse import quote


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Answer one request of a WSGI server (PEP 3333: its strings are bytes in latin-1)."""
    env = {**os.environb, b"REMOTE_ADDR": b""}  # no address is inherited from the server's start
    for name, value in environ.items():
        if isinstance(value, str):
            env[name.encode("latin-1")] = value.encode("latin-1", "replace")
    status, fields, body = respond(env)
    start_response(status, fields)
    return [body]


# ---- --serve: HTTP without a web server ----
# http.server is not used: it takes 1.5 times as long. And it splits a request at the bytes 0x85 and
# 0xA0, which are in names in UTF-8: another mailbox would be asked about.

REQUEST_SECONDS = 10  # for a whole request
REQUEST_LENGTH = 65536  # bytes of a request
STRANGER_SECONDS = 0.05  # for a stranger's request
THREADS = 200  # connections at a time
PATIENCE = 5  # seconds; a question that has taken longer gets HANGS if it is asked again
SLOW = 1  # seconds; an answer that took longer is kept
KEPT_SECONDS = 60  # for which a slow answer is used again
MOST_KEPT = 1000  # slow answers
TEXT = [("Content-Type", "text/plain")]
STRANGER = "403 Forbidden", TEXT, b"ERROR this address is not in QUOTA_ALLOW\n"
NOT_IMPLEMENTED = "501 Not Implemented", TEXT, b"ERROR there is no such method\n"
HANGS = FAILED, TEXT, b"ERROR the mailbox hangs\n"


class Server:
    """Answers one request of each connection, in threads that all wait for connections."""

    def __init__(self, settings: Env) -> None:
        self.allow = Question(settings).setting("QUOTA_ALLOW")
        self.settings = {**settings, b"QUOTA_ALLOW": b""}  # run() checks the address
        # Both by the first line of the request: when it came; until when a slow answer is kept.
        self.under_way: dict[bytes, float] = {}
        self.kept: dict[bytes, tuple[float, Response]] = {}

    def run(self, listener: socket.socket) -> None:
        """Answer one connection after the other."""
        while True:
            try:
                connection, peer = listener.accept()
                with connection:
                    if is_allowed(peer[0], self.allow):
                        send(connection, self.answer(receive(connection)))
                    else:
                        # A request that came after the close would reset the connection: no 403.
                        connection.settimeout(STRANGER_SECONDS)
                        with contextlib.suppress(socket.timeout):
                            connection.recv(REQUEST_LENGTH)
                        send(connection, STRANGER)
            except ConnectionError:
                pass  # the client has left
            except OSError:  # a slow client; or no descriptor is free, and accept() must not spin
                time.sleep(0.1)
            except Exception:  # a bug, or a limit of the system: the client gets no answer
                log(traceback.format_exc())

    def answer(self, line: bytes) -> Response:
        """Answer a request, given its first line.

        If a mailbox hangs, questions about it hold threads only if they came within PATIENCE of the
        first one. A slow answer is kept: a milter that could not wait for it may ask again.
        """
        method, _, rest = line.partition(b" ")
        if method not in (b"GET", b"HEAD", b"POST"):
            return NOT_IMPLEMENTED
        query = rest.rpartition(b" ")[0].partition(b"?")[2]
        began = time.monotonic()
        kept = self.kept.get(line)
        if kept and began < kept[0]:
            return kept[1]
        since = self.under_way.setdefault(line, began)
        if since + PATIENCE < began:
            log(f"the mailbox hangs: {line!a}")
            return HANGS
        try:
            env = {**self.settings, b"REQUEST_METHOD": method, b"QUERY_STRING": query}
            response = respond(env)
        finally:
            self.under_way.pop(line, None)
        ended = time.monotonic()
        if ended > began + SLOW and response[0] == "200 OK":
            if len(self.kept) >= MOST_KEPT:
                self.kept.clear()
            self.kept[line] = ended + KEPT_SECONDS, response
        return response


def receive(connection: socket.socket) -> bytes:
    """Receive a request and return its first line. Raises OSError.

    The header is received to its end: a request that was cut off could name another mailbox.
    """
    request, deadline = b"", time.monotonic() + REQUEST_SECONDS
    while len(request) < REQUEST_LENGTH and b"\n\n" not in request.replace(b"\r", b""):
        connection.settimeout(max(0, deadline - time.monotonic()))
        piece = connection.recv(REQUEST_LENGTH)
        if not piece:
            raise ConnectionError("half a request")
        request += piece
    return request.partition(b"\n")[0]


def send(connection: socket.socket, response: Response) -> None:
    """Send an answer without waiting: it fits into the socket's buffer. Raises OSError."""
    status, fields, body = response
    head = "".join(f"{name}: {value}\r\n" for name, value in fields)
    connection.setblocking(False)
    connection.sendall(f"HTTP/1.0 {status}\r\n{head}\r\n".encode() + body)
    # To close with something unread, as the body of a POST, would reset the connection.
    with contextlib.suppress(BlockingIOError):
        connection.recv(REQUEST_LENGTH)


def serve(where: str) -> int:
    """Answer over HTTP at [HOST:]PORT until TERM or INT, and return the exit status."""
    ends = signal.SIGTERM, signal.SIGINT
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # they wait for sigwait() below
    host, _, port = where.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    is_ipv6 = ":" in host
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    try:
        server = Server(dict(os.environb))
        is_allowed("", server.allow)  # reports a bad QUOTA_ALLOW now, not at each question
        if not (server.allow or host.startswith("127.") or host in ("::1", "localhost")):
            raise ValueError("an address other than loopback needs QUOTA_ALLOW: who may ask?")
        listener = socket.create_server(
            (host, int(port)), family=family, backlog=1024, dualstack_ipv6=is_ipv6
        )  # [::] is for IPv4, too
        for _ in range(THREADS):
            threading.Thread(target=server.run, args=(listener,), daemon=True).start()
    except Exception as error:
        log(f"--serve {where}: {error}")
        # 1: a later try may succeed, as the address may come. 2: it will not.
        return 1 if isinstance(error, (OSError, RuntimeError)) else 2
    log("serving on " + host + " port " + port)
    signal.sigwait(ends)
    return 0


# ---- the command line ----


def main(arguments: list[str]) -> int:
    """Do what the command line asks for and return the exit status."""
    if arguments[:1] == ["--serve"]:
        where = " ".join(arguments[1:])  # a word too many makes it a bad port
        return serve(where or "127.0.0.1:8025")
    if len(arguments) != 1 or arguments[0].startswith("-"):
        is_help = arguments == ["--help"]
        os.write(1 if is_help else 2, str(__doc__).encode())
        return 0 if is_help else 2
    # USER@DOMAIN becomes u=USER&d=DOMAIN.
    query = "u=" + "&d=".join(map(quote, os.fsencode(arguments[0]).rsplit(b"@", 1)))
    status, _, line = respond({**os.environb, b"QUERY_STRING": query.encode(), b"QUOTA_ALLOW": b""})
    is_error = status != "200 OK"
    os.write(2 if is_error else 1, line)
    return int(is_error)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # a normal end is not safe while threads are at work
