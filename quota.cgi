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
import posix
import sys
import time

TYPE_CHECKING = False  # as in `typing`, without its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Optional

    Env = dict[bytes, bytes]
    Header = list[tuple[str, str]]
    Measure = tuple[bool, int, int, int, float]

QUOTA_LIMIT = "200M"  # bytes, or with K, M, G, T (powers of 1024); 0: no limit
QUOTA_MAILBOX = "/var/mail/%n"  # %n user, %d domain, %u user@domain, %h the user's home, %% percent
QUOTA_USERS = ""  # a file of lines `user limit` or `user@domain limit`, which beat QUOTA_LIMIT
QUOTA_ALLOW = ""  # addresses and networks that may ask: 192.0.2.25 2001:db8::/32; none: all
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
QUERY_LENGTH = 8192  # bytes, more than two such names can take
BLOCK = 1 << 16  # bytes of QUOTA_USERS that are in memory at a time
S_IFMT, S_IFREG = 0o170000, 0o100000  # from stat.h: a regular file
AF_INET, AF_INET6, ENAMETOOLONG = 2, 10, 36  # as on Linux
MAPPED = "0" * 80 + "1" * 16  # what an IPv6 address that stands for an IPv4 address begins with
HEX = b"0123456789abcdefABCDEF"
SHAPE = bytes.maketrans(b"123456789kmgtMGT", b"000000000KKKKKKK")  # makes 200M 000K
PLACEHOLDERS = "%n user, %d domain, %u user@domain, %h home, %1n or %1.2n a part, %% percent"
TWICE = "in systemd and uWSGI each % is written twice"
END_OF_9999 = 253402300800  # seconds since the epoch; an HTTP date has four digits for the year
REASONS = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    405: "Method Not Allowed",
    414: "URI Too Long",
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


def network_bits(text: str) -> str:
    """Return the leading bits of an address or network. Raises ValueError, OSError.

    Before them stands 4 or 6; an IPv4 address inside IPv6 is an IPv4 address.
    """
    from _socket import inet_pton  # `socket` or `ipaddress` would take as long as all the rest

    address, _, length = text.partition("/")
    family, size = (AF_INET6, 128) if ":" in address else (AF_INET, 32)
    bits = f"{int.from_bytes(inet_pton(family, address), 'big'):0{size}b}"
    bits = bits[: range(size + 1).index(int(length or size))]
    if bits.startswith(MAPPED):
        return "4" + bits[len(MAPPED) :]
    return ("4" if size == 32 else "6") + bits


def check_peer(peer: str, env: "Env") -> None:
    """Raise Problem where QUOTA_ALLOW is set and this address is not in it."""
    allow, networks = setting("QUOTA_ALLOW", env), []
    for text in allow.replace(b",", b" ").split():
        try:
            networks.append(network_bits(text.decode()))
        except (OSError, ValueError):
            why = "QUOTA_ALLOW is not like `192.0.2.25 198.51.100.0/24 2001:db8::/32`"
            raise Problem(500, why, text) from None
    try:
        if not allow or network_bits(peer.partition("%")[0]).startswith(tuple(networks)):
            return
    except (OSError, ValueError):
        peer = "an address that is not known"
    raise Problem(403, peer + " is not in QUOTA_ALLOW")


def parse_limit(name: str, text: bytes) -> int:
    """Read a limit like 200M in bytes. Raises Problem where it is none."""
    text = text.strip().upper()
    power = b"KMGT".find(text[-1:]) + 1
    digits = text[:-1] if power else text
    if not digits.isdigit() or len(digits) > 20:
        raise Problem(500, name + " has a limit that is not like 200M", text)
    return int(digits) << 10 * power


def parse_grace(text: bytes, quota: int) -> int:
    """Read a grace in bytes: written like a limit, or `10%` of the quota. Raises Problem."""
    if text == b"auto":
        return 0
    if text[-1:] == b"%":
        return quota * parse_limit("QUOTA_GRACE", text[:-1]) // 100
    return parse_limit("QUOTA_GRACE, which is neither auto nor like 10%,", text)


def user_limit(user: bytes, domain: "Optional[bytes]", env: "Env") -> "Optional[int]":
    """Look up in QUOTA_USERS the limit in bytes of user@domain, user or @domain. Raises Problem."""
    path = setting("QUOTA_USERS", env)
    if not path:
        return None
    wanted = [user] if domain is None else [user + b"@" + domain, user, b"@" + domain]
    try:
        found = look_up(path, wanted)
    except OSError as error:
        raise Problem(500, "the file QUOTA_USERS cannot be read", error) from None
    for name in wanted:
        if name in found:
            return parse_limit("QUOTA_USERS", found[name])
    return None


def look_up(path: bytes, wanted: "list[bytes]") -> "dict[bytes, bytes]":
    """Read the limits of these names in QUOTA_USERS. Raises OSError, Problem."""
    found: dict[bytes, bytes] = {}
    for names, limits in read_users(path):
        for name in set(wanted).intersection(names):
            found.setdefault(name, limits[names.index(name)])
    return found


def read_users(path: bytes) -> "Iterator[tuple[list[bytes], list[bytes]]]":
    """Read QUOTA_USERS and yield names with their limits. Raises OSError, Problem."""
    file = posix.open(path, posix.O_RDONLY | posix.O_NONBLOCK)  # a pipe is not waited for
    try:
        before = posix.fstat(file)
        if before.st_mode & S_IFMT != S_IFREG:
            raise OSError("not a file")
        number, rest = 1, b""
        while block := posix.read(file, BLOCK):
            lines, newline, rest = (rest + block).rpartition(b"\n")
            yield from parse_users(lines + newline, number)
            number += lines.count(b"\n") + len(newline)
        after = posix.fstat(file)
    finally:
        posix.close(file)
    if rest:
        raise Problem(500, f"QUOTA_USERS: line {number}, the last, does not end in a newline")
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise Problem(500, "QUOTA_USERS changed while it was read: replace it with mv")


def are_limits(texts: "list[bytes]") -> bool:
    """Say whether each is a limit like 200M, for many at once."""
    shapes = (b" ".join(texts) + b" ").translate(SHAPE)
    return shapes.replace(b"0K ", b"0 ").replace(b" ", b"").isdigit()


def parse_users(text: bytes, number: int) -> "Iterator[tuple[list[bytes], list[bytes]]]":
    """Yield the names and limits in whole lines, the first of which has this number.

    One by one, a million lines would take a second. So all are tried at once: where each has two
    fields and none anything special, they are done; else each half is tried. Raises Problem.
    """
    text = text.replace(b"\t", b" ")
    fields = text.replace(b"\n", b" \0 ").split()
    if (
        len(fields) == 3 * text.count(b"\n")
        and set(fields[2::3]) == {b"\0"}
        and are_limits(fields[1::3])
        and not any(special in text for special in (b"#", b"\0", b": ", b"@ "))
    ):
        yield fields[::3], fields[1::3]
    elif middle := text.rfind(b"\n", 0, len(text) // 2) + 1:
        yield from parse_users(text[:middle], number)
        yield from parse_users(text[middle:], number + text.count(b"\n", 0, middle))
    else:
        for this, line in enumerate(text.split(b"\n"), number):
            line = line.partition(b" #")[0].strip()
            if line and line[:1] != b"#":
                name, *limit = line.rsplit(None, 1)
                if name[-1:] in (b":", b"@") or not are_limits(limit):
                    why = "`user limit`, `user@domain limit` or `@domain limit`, without a colon"
                    raise Problem(500, f"QUOTA_USERS: line {this} is not {why}", line)
                yield [name], limit


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
    if template[:1] != b"/" and template[:2] != b"%h":
        raise Problem(500, PATH_SETTING + " does not begin with /", template)
    first, *rest = template.replace(b"%%", b"\0").split(b"%")
    values = {b"n": user, b"d": domain or b"", b"u": user + b"@" + (domain or b"")}
    parts, names = [first], b""
    for part in rest:
        text = part.lstrip(b"0123456789.")
        name, (skip, _, width) = text[:1], part[: len(part) - len(text)].rpartition(b".")
        value = home_of(user) if name == b"h" else values.get(name, b"")
        if name not in (b"n", b"d", b"u", b"h") or b"." in skip or not skip and width[:1] == b"0":
            why = f"{PATH_SETTING} has a placeholder that does not exist; known are {PLACEHOLDERS}"
            raise Problem(500, why, template)
        if value is None:
            return None
        begin, length = int(skip or b"0"), int(width or b"0")
        parts += value[begin : begin + length if length else None], text[1:]
        names += part[:1] + name
    if not any(name in names for name in (b"nn", b"uu", b"hh")):
        raise Problem(500, f"{PATH_SETTING} names no user (%n, %u or %h): {TWICE}", template)
    if domain is None and (b"d" in names or b"u" in names):
        raise Problem(400, "no domain (d=) given")
    path = b"".join(parts).replace(b"\0", b"%")
    if path.split(b"/").count(b"..") > template.split(b"/").count(b".."):  # %1.2n of a..b
        raise Problem(400, "no mailbox has such a user")
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


def explain(error: OSError, template: bytes) -> None:
    """Raise what it means that a mailbox cannot be measured; nothing where there is none yet."""
    why, detail = f"cannot read the mailbox: {error.strerror}", str(error)
    if isinstance(error, PermissionError):
        who = f"user {posix.geteuid()}, group {posix.getegid()}"
        detail += f"; let {who} search (x) the folders above it, and read a Maildir's (rx)"
    if isinstance(error, FileNotFoundError) or error.errno == ENAMETOOLONG:
        fixed = template.replace(b"%%", b"\0").partition(b"%")[0].replace(b"\0", b"%")
        try:
            posix.stat(fixed.rpartition(b"/")[0] or b"/")
            return
        except FileNotFoundError:
            why = f"{PATH_SETTING} begins with a folder that does not exist: {TWICE}"
            detail = str(template)
    raise Problem(500, why, detail)


def verdict(
    user: "Optional[bytes]", domain: "Optional[bytes]", env: "Env"
) -> "tuple[bytes, Header]":
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
        explain(error, setting(PATH_SETTING, env))
    header = [("Quota-Grace", str(grace))] * (grace > 0)
    if 0 < changed < END_OF_9999:
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(changed))
        header.append(("Last-Modified", date))
    return b"%s %s %d %d\n" % (status, user, used, quota), header


def log(text: str) -> None:
    """Write a line to standard error, if that is possible."""
    try:
        posix.write(2, f"quota: {text}\n".encode())
    except OSError:
        pass  # it is closed, or a disk is full


def answer(
    user: "Optional[bytes]",
    domain: "Optional[bytes]",
    env: "Env",
    method: bytes = b"GET",
    peer: "Optional[str]" = None,
) -> "tuple[int, bytes, Header]":
    """Answer with an HTTP status, a line and header fields; details go to standard error."""
    try:
        if peer is not None:
            check_peer(peer, env)
        if method not in (b"GET", b"HEAD"):
            raise Problem(405, "only GET and HEAD are answered")
        return 200, *verdict(user, domain, env)
    except Problem as problem:
        if problem.detail is not None:
            log(f"{problem.why}: {str(problem.detail)!a}")
        return problem.status, b"ERROR %s\n" % problem.why.encode(), []


def respond(method: bytes, query: bytes, env: "Env", peer: str) -> "tuple[int, Header, bytes]":
    """Answer a request with an HTTP status, header fields and a body. No proxy may keep it."""
    fields = parse_query(query)
    status, line, more = answer(fields.get(b"u"), fields.get(b"d"), env, method, peer)
    if len(query) > QUERY_LENGTH:
        status, line = 414, b"ERROR the query is Too Long\n"
    header = [("Content-Type", "text/plain"), ("Content-Length", str(len(line)))]
    header += [("Cache-Control", "no-store")] + [("Allow", "GET, HEAD")] * (status == 405)
    return status, header + more, b"" if method == b"HEAD" else line


def run_cgi(env: "Env") -> int:
    """Answer the one request of a web server that started the script (RFC 3875)."""
    method, query = env.get(b"REQUEST_METHOD", b"GET"), env.get(b"QUERY_STRING", b"")
    peer = env.get(b"REMOTE_ADDR", b"").decode("latin-1")
    status, header, body = respond(method, query, env, peer)
    header.insert(0, ("Status", f"{status} {REASONS[status]}"))
    text = "".join(f"{name}: {value}\n" for name, value in header)
    posix.write(1, text.encode() + b"\n" + body)
    return 0


def application(environ: "dict[str, Any]", start_response: "Callable[..., Any]") -> "list[bytes]":
    """Answer one request of a WSGI server (PEP 3333: its strings are bytes in latin-1)."""
    env = dict(posix.environ)
    for name, value in environ.items():
        if name.startswith("QUOTA_"):
            env[name.encode("latin-1")] = value.encode("latin-1")
    method = environ["REQUEST_METHOD"].encode("latin-1")
    query = environ.get("QUERY_STRING", "").encode("latin-1")
    status, header, body = respond(method, query, env, environ.get("REMOTE_ADDR") or "")
    start_response(f"{status} {REASONS[status]}", header)
    return [body]


# ---- What a CGI never runs is text until it is wanted: compiled, it would cost a fifth of a start.

REST = r'''
if TYPE_CHECKING:
    import socket
    from typing import Union

# ---- --serve: HTTP without a web server ----

REQUEST_SECONDS = 10  # from a connection, or its last answer, to the end of the next request
REQUEST_LENGTH = 16384  # bytes of a request's first line and header
WAITING = 1500  # connections without a whole request; the longest makes way for the next
THREADS = 2500  # of which few do not wait, but for what a disk holds up
PATIENCE = 1  # seconds to wait for a mailbox that is being measured

# Connections whose request is not whole, and since when; who waits longest is the first. Who waits
# too long, or longest when another comes and all places are taken, is hung up on: no client holds
# a thread, only a disk can. Who takes a connection out, with one atomic pop(), decides about it.
waiting: "dict[socket.socket, float]" = {}


def one_at_a_time(measure: "Callable[..., Measure]") -> "Callable[..., Measure]":
    """Wrap measure() so that a mailbox whose disk hangs holds one thread, however often asked."""
    import threading

    locks: dict[bytes, threading.Lock] = {}  # of the mailboxes that are being measured

    def measure_alone(path: bytes, *arguments: "Any") -> "Measure":
        lock = locks.setdefault(path, threading.Lock())
        if not lock.acquire(timeout=PATIENCE):
            raise Problem(500, "the mailbox hangs, its disk does not answer", path)
        try:
            return measure(path, *arguments)
        finally:
            locks.pop(path, None)
            lock.release()

    return measure_alone


def read_once() -> "Callable[[bytes, list[bytes]], dict[bytes, bytes]]":
    """Make a look_up() that reads QUOTA_USERS once for each change and keeps all of it."""
    import threading

    lock = threading.Lock()
    stamp: tuple[object, ...] = ()
    found: Union[dict[bytes, bytes], Problem] = {}

    def look_up_kept(path: bytes, wanted: "list[bytes]") -> "dict[bytes, bytes]":
        nonlocal stamp, found
        with lock:
            status = posix.stat(path)
            now = path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
            if stamp != now:
                stamp, found = (), {}
                try:
                    found = read_all(path)
                except Problem as problem:
                    found = problem
                stamp = now
            if isinstance(found, Problem):
                raise found.with_traceback(None)
            return found

    return look_up_kept


def read_all(path: bytes) -> "dict[bytes, bytes]":
    """Read all limits in QUOTA_USERS. Raises OSError, Problem."""
    found: dict[bytes, bytes] = {}
    same: dict[bytes, bytes] = {}  # many users have the same limit
    for names, limits in read_users(path):
        for name, limit in zip(names, limits):
            found.setdefault(name, same.setdefault(limit, limit))
    return found


def http_answer(head: bytes, peer: str) -> "tuple[bytes, bool]":
    """Answer a request's first line and header; the answer, and whether another may follow."""
    line, *fields = head.split(b"\n")
    method, target, version, *_ = line.split() + [b"", b"", b""]
    status, header, body = respond(method, target.partition(b"?")[2], posix.environ, peer)
    keep = version == b"HTTP/1.1" and status != 403
    for field in fields:
        name, _, value = field.lower().partition(b":")
        if name in (b"content-length", b"transfer-encoding"):
            keep = False  # the body is not read, and what follows it could not be told from it
        elif name == b"connection" and b"close" in value:
            keep = False
    header.append(("Keep-Alive", f"timeout={REQUEST_SECONDS}"))  # an offer, to any client
    header += [("Connection", "close")] * (not keep)
    text = "".join(f"{name}: {value}\r\n" for name, value in header)
    return f"HTTP/1.1 {status} {REASONS[status]}\r\n{text}\r\n".encode() + body, keep


def hang_up(before: float) -> None:
    """End who has waited since before then, and who waits longest where all places are taken."""
    for connection, since in list(waiting.items()):
        if since >= before and len(waiting) < WAITING:
            break
        if waiting.pop(connection, None) is not None:
            try:
                connection.shutdown(2)  # its thread notices, and closes it
            except OSError:
                pass  # the client has gone


def talk(connection: "socket.socket", peer: str) -> None:
    """Answer the requests of a connection. One that is cut off or too long is the last."""
    data, keep = b"", True
    try:
        while keep:
            head, end, rest = data.replace(b"\r\n", b"\n").partition(b"\n\n")
            more = b"" if end or len(data) >= REQUEST_LENGTH else connection.recv(REQUEST_LENGTH)
            if more:
                data += more
                continue
            if not data or waiting.pop(connection, None) is None:
                return
            message, keep = http_answer(head, peer)
            waiting[connection] = time.monotonic()  # before the next request can be there
            connection.sendall(message)
            data = rest
        connection.shutdown(1)  # so that the answer is read, by one who may still be sending
        while connection.recv(REQUEST_LENGTH):
            pass
    except OSError:
        pass  # the client has gone
    except Exception as error:
        log(f"a request failed: {error!r}")
    finally:
        waiting.pop(connection, None)
        connection.close()


def accept(listener: "socket.socket") -> None:
    """Give a new connection to a thread; who may not ask is refused before a byte is read."""
    import threading

    connection, (peer, *_) = listener.accept()
    try:
        check_peer(peer, posix.environ)
    except Problem:
        connection.setblocking(False)
        connection.send(http_answer(b"", peer)[0])
        connection.recv(REQUEST_LENGTH)  # what is left unread would make the end a reset
        return
    connection.settimeout(REQUEST_SECONDS)
    if threading.active_count() < THREADS:
        waiting[connection] = time.monotonic()
        threading.Thread(target=talk, args=(connection, peer), daemon=True).start()


def serve(where: str) -> None:
    """Answer over HTTP at [HOST:]PORT until TERM or INT. Raises OSError, ValueError."""
    import resource
    import signal
    import socket

    host, _, port = where.rpartition(":")
    host, number = host.strip("[]") or "127.0.0.1", range(1 << 16)[int(port)]
    family, *_, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
    loopback = network_bits("127.0.0.0/8"), network_bits("::1")
    here = network_bits(str(address[0]).partition("%")[0]).startswith(loopback)
    if not here and not setting("QUOTA_ALLOW", posix.environ):
        raise ValueError("elsewhere than on loopback it wants QUOTA_ALLOW: who may ask?")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    dual = family == socket.AF_INET6
    listener = socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=dual)
    listener.settimeout(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    globals().update(measure=one_at_a_time(measure), look_up=read_once())
    log("serving on {} port {}".format(*listener.getsockname()))
    while True:
        hang_up(time.monotonic() - REQUEST_SECONDS)
        try:
            accept(listener)
        except socket.timeout:
            pass  # nobody has come for a second
        except (OSError, RuntimeError) as error:  # no descriptor or no thread is left
            log(f"a connection failed: {error}")
            time.sleep(0.1)


# ---- the process ----


def main() -> int:
    """Do what the command line asks for and return the exit status."""
    first, *more = sys.argv[1:] or [""]
    usage = f"usage: {sys.argv[0]} (USER[@DOMAIN] | --serve [[HOST:]PORT])\n"
    try:
        if first == "--serve" and len(more) < 2:
            serve(*more or ["127.0.0.1:8025"])
        elif first in ("-h", "--help"):
            posix.write(1, f"{usage}\n{__doc__}".encode())
            return 0
        elif first[:1] in ("", "-") or more:
            posix.write(2, usage.encode())
        else:
            name = first.encode(sys.getfilesystemencoding(), "surrogateescape")
            local, at, domain = name.rpartition(b"@")
            user = local if at else domain
            status, line, _ = answer(user, domain if at else None, posix.environ)
            posix.write(1 if status == 200 else 2, line)
            return int(status != 200)
    except KeyboardInterrupt:
        return 0
    except (OSError, ValueError, IndexError) as error:
        log(f"{' '.join(sys.argv[1:])}: {error}")
        return 1 if isinstance(error, OSError) else 2  # an address may come later
    return 2
'''  # end of REST

if __name__ == "__main__":
    # An orderly end would take as long as the answer, would wait for threads that a disk holds, and
    # would turn the status into 120 where standard error is full.
    if b"GATEWAY_INTERFACE" in posix.environ or b"REQUEST_METHOD" in posix.environ:
        posix._exit(run_cgi(posix.environ))
    exec(REST)
    posix._exit(globals()["main"]())
