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
    405  neither GET nor HEAD
    500  a bad setting, or a mailbox that cannot be read
    Each with one line, `ERROR why`; the detail goes to standard error. An error
    is never a verdict. In a shell it goes to standard error, with status 1.

SECURITY
    Whoever may ask learns who has a mailbox and how large it is: let only the
    frontends ask. Names are checked before they become part of a path. Under a
    web server the command line is ignored: a query without `=` is passed there.
    The script needs search permission on the mail folder and none on the files.
    It never writes.
"""

# A CGI's cost is its start, and `os`, `re`, `urllib` or `typing` would make that longer: `posix` is
# what `os` wraps. Names are not always UTF-8, so all text is bytes. `--serve` and the shell import
# what they like.
import errno
import posix
import sys

TYPE_CHECKING = False  # as in `typing`, without its import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Optional

    Env = dict[bytes, bytes]

QUOTA_LIMIT = "200M"  # bytes, or with K, M, G, T (powers of 1024); 0: no limit
QUOTA_MAILBOX = "/var/mail/%n"  # %n user, %d domain, %u user@domain, %h the user's home, %% percent
QUOTA_USERS = ""  # a file of lines `user limit` or `user@domain limit`, which beat QUOTA_LIMIT
QUOTA_GRACE = "auto"  # what the message that fills the mailbox may take beyond its quota: 1M, 10%
QUOTA_UNKNOWN = "off"  # 1: a mailbox that does not exist is UNKNOWN rather than OK with 0 bytes

PATH_SETTING = "QUOTA_MAILBOX"


def measure(
    path: bytes, limit: int, given: "Optional[int]", env: "Env"
) -> "tuple[bool, int, int, int, float]":
    """Measure the mbox at `path`: over its quota?, bytes used, quota, grace, its last change.

    Quota (0: none) and grace in bytes, the last change in seconds since the epoch (0: not known).

    `limit` is QUOTA_LIMIT, `given` what QUOTA_USERS has for this user. Raises OSError, Problem.
    """
    quota = limit if given is None else given
    status = posix.stat(path)
    if status.st_mode & S_IFMT != S_IFREG:
        raise Problem(500, "the mailbox is not a file", path)
    grace = parse_grace(setting("QUOTA_GRACE", env), quota)
    return 0 < quota < status.st_size, status.st_size, quota, grace, status.st_mtime


# ---- From here to the end the text is the same in quota.cgi and maildir_quota.cgi. ----

NAME_LENGTH = 255  # bytes in a user or a domain, as in a file's name
S_IFMT, S_IFREG = 0o170000, 0o100000  # from stat.h: a regular file
WEEKDAYS, MONTHS = "MonTueWedThuFriSatSun", "JanFebMarAprMayJunJulAugSepOctNovDec"
END_OF_9999 = 253402300800  # seconds since the epoch; an HTTP date has four digits for the year
HEX = b"0123456789abcdefABCDEF"
REASONS = {
    200: "OK",
    400: "Bad Request",
    405: "Method Not Allowed",
    500: "Internal Server Error",
}


class Problem(Exception):
    """Ends a request: HTTP status, a line for the client that names no path, detail for the log."""

    def __init__(self, status: int, why: str, detail: object = None) -> None:
        super().__init__(status, why, detail)
        self.status, self.why, self.detail = status, why, detail


def setting(name: str, env: "Env") -> bytes:
    """Return a setting: from the environment, else the constant at the top of the file."""
    given = env.get(name.encode())
    return str(globals()[name]).encode() if given is None else given


def parse_limit(name: str, text: bytes) -> int:
    """Read the limit in a setting in bytes. Raises Problem where it is none."""
    text = text.strip().upper()
    power = b"KMGT".find(text[-1:]) + 1
    digits = text[:-1] if power else text
    if not digits.isdigit() or len(digits) > 20:
        raise Problem(500, f"{name} has a limit that is not like 200M", text)
    return int(digits) << 10 * power


def parse_grace(text: bytes, quota: int) -> int:
    """Read a grace in bytes: written like a limit, or `10%` of the quota. Raises Problem."""
    if text.strip() == b"auto":
        return 0
    percent = text.strip()[:-1]
    if text.strip()[-1:] == b"%" and percent.isdigit() and len(percent) < 6:
        return quota * int(percent) // 100
    return parse_limit("QUOTA_GRACE", text)


def user_limit(user: bytes, domain: "Optional[bytes]", env: "Env") -> "Optional[int]":
    """Look up in QUOTA_USERS the limit in bytes of user@domain, else user. Raises Problem."""
    path = setting("QUOTA_USERS", env)
    if not path:
        return None
    found: dict[bytes, bytes] = {}
    try:
        if posix.stat(path).st_mode & S_IFMT != S_IFREG:
            raise OSError("not a file")
        with open(path, "rb") as file:
            for line in file:
                text = line.replace(b"\t", b" ").partition(b" #")[0].strip()
                name, space, limit = text.rpartition(b" ")
                if text[:1] != b"#":
                    found.setdefault(name.rstrip() if space else text, limit if space else b"")
    except OSError as error:
        raise Problem(500, "the file QUOTA_USERS cannot be read", error) from None
    for name in user + b"@" + (domain or b""), user:
        if name in found:
            return parse_limit("QUOTA_USERS", found[name])
    return None


def unquote(text: bytes) -> bytes:
    """Decode a form-encoded name or value, as urllib.parse.unquote_plus does."""
    first, *rest = text.replace(b"+", b" ").split(b"%")
    parts = [first]
    for part in rest:
        if len(part) > 1 and part[0] in HEX and part[1] in HEX:
            parts.append(bytes((int(part[:2], 16),)) + part[2:])
        else:
            parts.append(b"%" + part)
    return b"".join(parts)


def parse_query(query: bytes) -> "dict[bytes, bytes]":
    """Read a query string; where a name stands twice the first counts."""
    fields: dict[bytes, bytes] = {}
    for field in query.split(b"&"):
        name, equals, value = field.partition(b"=")
        if equals:
            fields.setdefault(unquote(name), unquote(value))
    return fields


def check_name(what: str, name: bytes) -> None:
    """Raise Problem where a user or domain cannot be a file's name or would break the answer."""
    if not 0 < len(name) <= NAME_LENGTH or name[:1] == b"." or b"/" in name:
        raise Problem(400, "no mailbox has such a " + what)
    if any(c < " " or "\x7f" <= c <= "\x9f" for c in name.decode("utf-8", "surrogateescape")):
        raise Problem(400, "control character in the " + what)


def expand(template: bytes, user: bytes, domain: "Optional[bytes]") -> "Optional[bytes]":
    """Put the names into a path. None where it asks for the home of a user that the system lacks.

    Raises Problem where the path needs a domain and there is none, or is a bad setting.
    """
    first, *rest = template.replace(b"%%", b"\0").split(b"%")
    parts = [first]
    for part in rest:
        placeholder = part[:1]
        if placeholder == b"n":
            parts.append(user)
        elif placeholder == b"h":
            home = home_of(user)
            if home is None:
                return None
            parts.append(home)
        elif placeholder not in (b"d", b"u"):
            raise Problem(500, f"{PATH_SETTING} has an unknown placeholder", template)
        elif domain is None:
            raise Problem(400, "no domain (d=) given")
        else:
            parts.append(domain if placeholder == b"d" else user + b"@" + domain)
        parts.append(part[1:])
    path = b"".join(parts).replace(b"\0", b"%")
    if path[:1] != b"/":
        raise Problem(500, f"{PATH_SETTING} does not begin with /", template)
    return path


def home_of(user: bytes) -> "Optional[bytes]":
    """Return the home directory of a system user, None where there is no such user."""
    import pwd

    encoding = sys.getfilesystemencoding()
    try:
        home = pwd.getpwnam(user.decode(encoding, "surrogateescape")).pw_dir
    except KeyError:
        try:
            pwd.getpwuid(0)  # is there no such user, or nothing that could say so?
        except KeyError:
            raise Problem(500, "the users of the system cannot be looked up") from None
        return None
    return home.encode(encoding, "surrogateescape")


def verdict(
    user: "Optional[bytes]", domain: "Optional[bytes]", env: "Env"
) -> "tuple[bytes, list[tuple[str, str]]]":
    """Answer for a mailbox: `STATUS user used quota`, and header fields. Raises Problem."""
    if user is None:
        raise Problem(400, "no user (u=) given")
    check_name("user", user)
    if domain is not None:
        check_name("domain", domain)
    unknown = setting("QUOTA_UNKNOWN", env)
    if unknown not in (b"", b"0", b"off", b"1"):
        raise Problem(500, "QUOTA_UNKNOWN is neither 1 nor off", unknown)
    env = {**env, b"u": user, b"d": domain or b""}  # for another path that measure() may need
    limit = parse_limit("QUOTA_LIMIT", setting("QUOTA_LIMIT", env))
    given = user_limit(user, domain, env)
    path = expand(setting(PATH_SETTING, env), user, domain)
    status = b"UNKNOWN" if unknown == b"1" or path is None else b"OK"
    used, quota, changed = 0, limit if given is None else given, 0.0
    grace = parse_grace(setting("QUOTA_GRACE", env), quota)
    try:
        if path is not None:
            over, used, quota, grace, changed = measure(path, limit, given, env)
            status = b"OVERQUOTA" if over else b"OK"
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
            raise Problem(500, f"cannot read the mailbox: {error.strerror}", error) from None
    headers = [("Quota-Grace", str(grace))] * (grace > 0)
    if 0 < changed < END_OF_9999:
        headers.append(("Last-Modified", http_date(changed)))
    return b"%s %s %d %d\n" % (status, user, used, quota), headers


def http_date(seconds: float) -> str:
    """Write a time as HTTP does (RFC 9110, 5.6.7), in whatever language the server runs."""
    import time

    year, month, day, hour, minute, second, weekday, *_ = time.gmtime(seconds)
    date = f"{day:02} {MONTHS[month * 3 - 3 : month * 3]} {year:04}"
    weekday_name = WEEKDAYS[weekday * 3 : weekday * 3 + 3]
    return f"{weekday_name}, {date} {hour:02}:{minute:02}:{second:02} GMT"


def answer(
    user: "Optional[bytes]", domain: "Optional[bytes]", env: "Env"
) -> "tuple[int, bytes, list[tuple[str, str]]]":
    """Answer with an HTTP status, a line and header fields; details go to standard error."""
    try:
        return 200, *verdict(user, domain, env)
    except Problem as problem:
        if problem.detail is not None and sys.stderr:  # None where a server has closed it
            try:
                print(f"quota: {problem.why}: {str(problem.detail)!a}", file=sys.stderr)
            except OSError:
                pass  # the disk that has the log is full; the client gets its answer
        return problem.status, b"ERROR %s\n" % problem.why.encode(), []


def respond(method: bytes, query: bytes, env: "Env") -> "tuple[int, list[tuple[str, str]], bytes]":
    """Answer a request with an HTTP status, header fields and a body. No proxy may keep it."""
    status, line = 405, b"ERROR only GET and HEAD are answered\n"
    more: list[tuple[str, str]] = []
    if method in (b"GET", b"HEAD"):
        fields = parse_query(query)
        status, line, more = answer(fields.get(b"u"), fields.get(b"d"), env)
    headers = [("Content-Type", "text/plain"), ("Content-Length", str(len(line)))]
    headers += [("Cache-Control", "no-store")] + [("Allow", "GET, HEAD")] * (status == 405) + more
    return status, headers, b"" if method == b"HEAD" else line


def run_cgi(env: "Env") -> None:
    """Answer the one request of a web server that started the script (RFC 3875)."""
    method = env.get(b"REQUEST_METHOD", b"GET")
    status, headers, body = respond(method, env.get(b"QUERY_STRING", b""), env)
    headers.insert(0, ("Status", f"{status} {REASONS[status]}"))
    text = "".join(f"{name}: {value}\n" for name, value in headers)
    sys.stdout.buffer.write(text.encode() + b"\n" + body)
    sys.stdout.flush()
    posix._exit(0)  # taking the interpreter down in order would cost as much as the answer


def application(environ: "dict[str, Any]", start_response: "Callable[..., Any]") -> "list[bytes]":
    """Answer one request of a WSGI server (PEP 3333: its strings are bytes in latin-1)."""
    env = dict(posix.environ)
    for name, value in environ.items():
        if name.startswith("QUOTA_"):
            env[name.encode("latin-1")] = value.encode("latin-1")
    query = environ.get("QUERY_STRING", "").encode("latin-1")
    status, headers, body = respond(environ["REQUEST_METHOD"].encode("latin-1"), query, env)
    start_response(f"{status} {REASONS[status]}", headers)
    return [body]


def http_handler() -> "type":
    """Make the class that answers one HTTP connection."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which keeps connections: a new one costs four times as much
        timeout = 10  # seconds that a silent client may hold a thread
        wbufsize = -1  # header and body in one packet
        error_message_format, error_content_type = "ERROR %(message)s\n", "text/plain"

        def __getattr__(self, name: str) -> "Any":
            """Answer any method ourselves: http.server would say 501 where 405 is due."""
            if name.startswith("do_"):
                return self.answer
            raise AttributeError(name)

        def answer(self) -> None:
            """Answer one request. A body is not read: what follows it could not be told from it."""
            query = self.path.partition("?")[2].encode("latin-1")
            status, headers, body = respond(self.command.encode("latin-1"), query, posix.environ)
            if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
                self.close_connection = True
            headers.append(("Keep-Alive", f"timeout={self.timeout}"))  # an offer, to any client
            if self.close_connection:
                headers.append(("Connection", "close"))
            self.send_response_only(status, REASONS[status])
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Log no request: what is worth a line has gone to standard error."""

    return Handler


def serve(where: str) -> None:
    """Answer over HTTP at [HOST:]PORT until interrupted. Raises OSError, ValueError."""
    import socket
    import socketserver

    class Server(socketserver.ThreadingTCPServer):
        address_family = socket.AF_INET6 if "[" in where else socket.AF_INET
        allow_reuse_address = daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            """Log a client that went away in one line."""
            print(f"quota: request failed: {sys.exc_info()[1]!r}", file=sys.stderr)

    host, _, port = where.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    with Server((host, int(port)), http_handler()) as server:
        print(f"serving on {host} port {port}", file=sys.stderr, flush=True)
        server.serve_forever()


def main() -> int:
    """Do what the environment or the command line asks for and return the exit status."""
    if b"GATEWAY_INTERFACE" in posix.environ or b"REQUEST_METHOD" in posix.environ:
        run_cgi(posix.environ)
    import argparse
    import os

    parser = argparse.ArgumentParser(
        usage="%(prog)s (USER[@DOMAIN] | --serve [[HOST:]PORT])",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument("mailbox", nargs="?", metavar="USER[@DOMAIN]", help="ask about one mailbox")
    todo.add_argument("--serve", nargs="?", const="127.0.0.1:8025", metavar="[HOST:]PORT")
    options = parser.parse_args()
    if options.serve is not None:
        try:
            serve(options.serve)
        except (OverflowError, ValueError):
            parser.error(f"--serve {options.serve}: not [HOST:]PORT")
        except OSError as error:
            parser.error(f"--serve {options.serve}: {error}")
        except KeyboardInterrupt:
            return 0
    local, at, domain = os.fsencode(options.mailbox).rpartition(b"@")
    status, line, _ = answer(local if at else domain, domain if at else None, dict(posix.environ))
    stream = sys.stdout if status == 200 else sys.stderr
    stream.buffer.write(line)
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main())
