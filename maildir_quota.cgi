#!/usr/bin/python3 -IS
"""maildir_quota.cgi - say whether a user's Maildir is over its quota.

USE
    As a CGI script: copy it into cgi-bin, make it executable and ask

        GET /cgi-bin/maildir_quota.cgi?u=john&d=example.com

    The answer is one line of text/plain: `OK john 1048576 209715200`,
    `OVERQUOTA john 209715200 209715200` or `UNKNOWN john 0 209715200`: status,
    user, bytes used, quota in bytes (0: no limit).

    maildir_quota.cgi --serve [[HOST:]PORT]  the same without a web server
                                             (127.0.0.1:8025 by default)
    maildir_quota.cgi USER[@DOMAIN]          the same line in a shell
    application                              the same for a WSGI server

VERDICT
    As the server that keeps the Maildir will treat the next message:
    courier        deliverquota: sizes in names (`,S=`), the file `maildirsize`
    dovecot        Dovecot's `maildir` driver: the same, trash counts
    dovecot-count  Dovecot's `count` driver: virtual sizes in names (`,W=`)
    The first two are over their quota at the limit of bytes or of messages in
    `maildirsize`; messages are counted where that is missing, broken, or says
    "over" and may be out of date. `count` has no `maildirsize` and no limit but
    the settings below. QUOTA_KEEPER=auto tells them apart by `dovecot-uidlist`
    and by `maildirsize`: see keeper_of().

SETTINGS
    The constants below; an environment variable of the same name beats them.

DIAGNOSTICS
    400  no user, a name that no mailbox can have, or no domain where the path
         needs one
    405  neither GET nor HEAD
    500  a bad setting, or a Maildir that cannot be read
    Each with one line, `ERROR why`; the detail goes to standard error. An error
    is never a verdict. In a shell it goes to standard error, with status 1.

SECURITY
    Whoever may ask learns who has a mailbox and how large it is: let only the
    frontends ask. Names are checked before they become part of a path. Under a
    web server the command line is ignored: a query without `=` is passed there.
    The script reads `maildirsize` and lists folders; it opens a message only for
    `dovecot-count`, and only where its name lacks `,W=`. It never writes.
"""

# A CGI's cost is its start, and `os`, `re`, `urllib` or `typing` would make that longer: `posix` is
# what `os` wraps. Names are not always UTF-8, so all text is bytes. `--serve` and the shell import
# what they like.
import errno
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
QUOTA_MAILDIR = "%h/Maildir"  # %n user, %d domain, %u user@domain, %h the user's home, %% percent
QUOTA_USERS = ""  # a file of lines `user limit` or `user@domain limit`, which beat every other
QUOTA_KEEPER = "auto"  # the server: courier, dovecot (its maildir driver) or dovecot-count
QUOTA_TRASH = "auto"  # count it as Dovecot, skip it as Courier, or as whichever keeps the Maildir
QUOTA_CONTROL = ""  # where Dovecot has its CONTROL files, if not in the Maildir: %n, %d, %u, %h
QUOTA_ALLOW = ""  # addresses and networks that may ask: 192.0.2.25 2001:db8::/32; none: all
QUOTA_GRACE = "auto"  # what the message that fills the mailbox may take beyond its quota: 1M, 10%
QUOTA_UNKNOWN = "off"  # 1: a mailbox that does not exist is UNKNOWN rather than OK with 0 bytes

PATH_SETTING = "QUOTA_MAILDIR"

COURIER, DOVECOT, COUNT = KEEPERS = b"courier", b"dovecot", b"dovecot-count"
DOVECOT_CONF = b"/etc/dovecot/dovecot.conf"  # Debian's, readable by all

TRUSTED_LENGTH = 5120  # bytes from which on the servers rebuild a maildirsize rather than read it
TRUSTED_AGE = 15 * 60  # seconds for which a maildirsize that says "over" is believed
SAME_TIME = 60  # seconds; what one delivery writes is never further apart
MOST_READ = 16 << 20  # bytes of messages read for one answer, some hundredths of a second
LONGEST_NUMBER = 20  # digits; a longer one does not fit the servers' 64 bits
DIGITS = b"0123456789"


def measure(
    path: bytes, limit: int, given: "Optional[int]", env: "Env"
) -> "tuple[bool, int, int, int, float]":
    """Measure the Maildir at `path`: over its quota?, bytes used, quota, grace, its last change.

    Quota (0: none) and grace in bytes, the last change in seconds since the epoch (0: not known).
    `limit` is QUOTA_LIMIT, `given` what QUOTA_USERS has for this user. Raises OSError, Problem.
    """
    keeper = choose("QUOTA_KEEPER", env, b"auto", *KEEPERS)
    trash = choose("QUOTA_TRASH", env, b"auto", b"count", b"skip")
    control = control_of(path, env)
    posix.stat(path)  # no Maildir is FileNotFoundError; from here on that is one of its files
    if keeper == b"auto":
        keeper = keeper_of(path, control)
    dovecot = keeper != COURIER
    folders = folders_of(path, dovecot)
    limits, total, doubtful = (limit, 0), None, False
    maildirsize = None if keeper == COUNT else read_maildirsize(control, dovecot)
    if maildirsize is not None:
        header, entries, age = maildirsize
        limits = parse_limits(header, dovecot)
        total = add_up(entries)
        doubtful = len(entries) > 1 or age > TRUSTED_AGE
    if given is not None:
        limits = given, 0
    # A sum that is exactly the limit is over for Courier, but not yet for Dovecot's doubts.
    if total is None or doubtful and is_over(total, limits, 0 if dovecot else 1):
        skip = trash == b"skip" or trash == b"auto" and not dovecot
        total = count(folders, keeper, skip)
        if is_over(total, limits, 1):
            total = count(folders, keeper, skip, once=True)
    grace = find_grace(keeper, limits[0], env)
    return is_over(total, limits, 1), total[0], limits[0], grace, last_change(folders)


def choose(name: str, env: "Env", *choices: bytes) -> bytes:
    """Return a setting that is one of some words. Raises Problem."""
    value = setting(name, env)
    if value not in choices:
        raise Problem(500, f"{name} is not one of {b', '.join(choices).decode()}", value)
    return value


def control_of(path: bytes, env: "Env") -> bytes:
    """Return the folder that has `maildirsize` and `dovecot-uidlist`. Raises Problem."""
    template = setting("QUOTA_CONTROL", env)
    if not template:
        return path
    try:
        return expand(template, env[b"u"], env[b"d"] or None) or path
    except Problem as problem:
        why = problem.why.replace(PATH_SETTING, "QUOTA_CONTROL")
        raise Problem(problem.status, why, problem.detail) from None


def keeper_of(path: bytes, control: bytes) -> bytes:
    """Tell by its files which server keeps a Maildir. Raises OSError.

    Dovecot's maildir driver appends to `maildirsize` at each delivery, its count driver never does:
    there a `maildirsize` older than the mail was left behind. Reading alone changes the times of
    files, and other programs deliver without Dovecot's list, so list and mail must both be newer.
    """
    elsewhere = control != path
    uidlist = modified(control + b"/dovecot-uidlist")
    if uidlist is None and elsewhere:
        uidlist = modified(control + b"/.INBOX/dovecot-uidlist")
    maildirsize = modified(control + b"/maildirsize")
    if uidlist is None and not elsewhere:
        return COURIER
    if maildirsize is None:
        return COUNT
    newer = maildirsize + SAME_TIME
    if uidlist is not None and uidlist > newer:
        latest = time.time() + SAME_TIME  # what lies in the future is no time
        for entry in messages_in(folders_of(path, True)):
            digits = entry.name[: len(entry.name) - len(entry.name.lstrip(DIGITS))]
            if newer < int(digits or b"0") < latest:
                return COUNT
    return DOVECOT


def modified(path: bytes) -> "Optional[float]":
    """Return when a file was last written, None where there is none. Raises OSError."""
    try:
        return posix.stat(path).st_mtime
    except FileNotFoundError:
        return None


def find_grace(keeper: bytes, quota: int, env: "Env") -> int:
    """Return the grace in bytes: the setting, else what the server has by default."""
    text = setting("QUOTA_GRACE", env)
    if text.strip() == b"auto" and keeper != COURIER:
        text = b"10M" if keeper == COUNT and is_dovecot_24() else b"10%"
    return parse_grace(text, quota)


def is_dovecot_24() -> bool:
    """Say whether this system's Dovecot is 2.4 or later, whose configuration must begin so."""
    try:
        with open(DOVECOT_CONF, "rb") as file:
            return b"\ndovecot_config_version" in b"\n" + file.read(1 << 16)
    except OSError:
        return False


def last_change(folders: "list[bytes]") -> float:
    """Return when a message last came, was read or went, in seconds since the epoch.

    Each of these renames a file in `new` or `cur`. Other files change without it: a refused
    delivery, too, may have `maildirsize` written again.
    """
    times = [modified(folder + part) for folder in folders for part in (b"/new", b"/cur")]
    return max((time for time in times if time is not None), default=0.0)


def is_over(total: "tuple[int, int]", limits: "tuple[int, int]", more: int) -> bool:
    """Say whether `more` bytes or messages would exceed a limit of bytes or messages (0: none)."""
    return 0 < limits[0] < total[0] + more or 0 < limits[1] < total[1] + more


def read_maildirsize(control: bytes, dovecot: bool) -> "Optional[tuple[bytes, list[bytes], float]]":
    """Read `maildirsize`: its first line, the others, its age in seconds; None: no such file.

    Of a file too long to be trusted, the others are one that is no entry. Raises OSError.
    """
    path = control + b"/maildirsize"
    try:  # opening a pipe or a device could do something, to whatever the user's link leads
        if posix.stat(path).st_mode & S_IFMT != S_IFREG:
            return None
        file = posix.open(path, posix.O_RDONLY | posix.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        status = posix.fstat(file)
        if status.st_mode & S_IFMT != S_IFREG:
            return None
        text = posix.read(file, TRUSTED_LENGTH)
    finally:
        posix.close(file)
    if not text:  # what a full disk leaves
        return None
    *lines, unfinished = text.split(b"\n")
    # Somebody may still be writing it: Dovecot leaves it out, Courier where it is no entry.
    if not dovecot and (not lines or parse_entry(unfinished)):
        lines.append(unfinished)
    header, *entries = lines or [b""]
    return header, entries if len(text) < TRUSTED_LENGTH else [b""], time.time() - status.st_mtime


def parse_limits(header: bytes, dovecot: bool) -> "tuple[int, int]":
    """Read the first line of `maildirsize`: the limits of bytes and of messages (0: no limit).

    Of anything but digits, letters and commas Dovecot leaves out the item, Courier only that.
    """
    found = {b"S": 0, b"C": 0}
    if not dovecot:
        header = header.replace(b"S", b"S,").replace(b"C", b"C,")
    for item in header.split(b","):
        before, letter = item[:-1], item[-1:]
        digits = before[len(before.rstrip(DIGITS)) :]
        if not 0 < len(digits) <= LONGEST_NUMBER:
            continue
        if not dovecot or before == digits and int(digits) > 0:
            found[letter] = int(digits)
    return found[b"S"], found[b"C"]


def add_up(entries: "list[bytes]") -> "Optional[tuple[int, int]]":
    """Add up lines of `bytes messages`; None where one is something else or a sum is negative."""
    size = messages = 0
    for entry in map(parse_entry, entries):
        if entry is None:
            return None
        size, messages = size + entry[0], messages + entry[1]
    return (size, messages) if min(size, messages) >= 0 else None


def parse_entry(line: bytes) -> "Optional[tuple[int, int]]":
    """Read `bytes messages` as C's scanf does, whatever follows; None where it is no entry."""
    numbers = []
    for _ in range(2):
        line = line.lstrip()
        sign = line[: line[:1] in (b"-", b"+")]
        rest = line[len(sign) :].lstrip(DIGITS)
        digits = line[len(sign) : len(line) - len(rest)]
        if not digits or digits[:-LONGEST_NUMBER].strip(b"0"):
            return None
        numbers.append(int(sign + digits[-LONGEST_NUMBER:]))
        line = rest
    return numbers[0], numbers[1]


def folders_of(path: bytes, dovecot: bool) -> "list[bytes]":
    """List a Maildir and its folders: paths. Raises OSError."""
    folders = [path]
    with posix.scandir(path) as entries:
        for entry in entries:
            if entry.name[:1] == b"." and is_folder(entry, dovecot):
                folders.append(path + b"/" + entry.name)
    return folders


def is_folder(entry: "posix.DirEntry[bytes]", dovecot: bool) -> bool:
    """Say whether it is a folder: Dovecot follows links, but not in a circle. Raises OSError."""
    try:
        return entry.is_dir(follow_symlinks=dovecot)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def messages_in(folders: "list[bytes]") -> "Iterator[posix.DirEntry[bytes]]":
    """List the files in `new` and `cur` of folders. Raises OSError.

    A reader moves messages from `new` to `cur`: in this order one is seen twice rather than never.
    """
    for folder in folders:
        for part in b"/new", b"/cur":
            try:
                entries = posix.scandir(folder + part)
            except FileNotFoundError:
                continue
            with entries:
                yield from entries


def count(
    folders: "list[bytes]", keeper: bytes, skip_trash: bool, once: bool = False
) -> "tuple[int, int]":
    """Count the bytes and the messages in folders. Raises OSError.

    What vanishes meanwhile is left out; what cannot be read is an error, not a smaller sum. With
    `once`, as a message that is renamed meanwhile (moved to `cur`, or marked as read) may be seen
    under both names, those of one unique name in a folder count once: this takes more memory.
    """
    hidden = b".." if keeper == DOVECOT else b"."
    flagged = skip_trash and keeper == COURIER
    size = messages = 0
    sample = [0, 0]
    for folder in folders:
        if skip_trash and folder == folders[0] + b"/.Trash":
            continue
        seen: set[bytes] = set()
        for entry in messages_in([folder]):
            name, _, info = entry.name.partition(b":")
            if name.startswith(hidden) or flagged and info[:2] == b"2," and b"T" in info:
                continue
            if once and name in seen:
                continue
            try:
                size += size_of(entry, keeper, sample)
            except FileNotFoundError:
                continue
            messages += 1
            if once:
                seen.add(name)
    return size, messages


def size_of(entry: "posix.DirEntry[bytes]", keeper: bytes, sample: "list[int]") -> int:
    """Return a message's size in bytes: from its name, else from the file. Raises OSError."""
    _, given, rest = entry.name.partition(b",W=" if keeper == COUNT else b",S=")
    digits = rest.partition(b":")[0].partition(b",")[0]
    if given and digits.lstrip(DIGITS) == b"" and (rest or keeper != COUNT):
        return int(digits or b"0")
    status = entry.stat()
    if keeper != COUNT or status.st_mode & S_IFMT != S_IFREG:
        return status.st_size
    return status.st_size + bare_newlines(entry.path, status.st_size, sample)


def bare_newlines(path: bytes, size: int, sample: "list[int]") -> int:
    """Count the line ends of a message that are LF alone: in its virtual size they are CR LF.

    `sample` has the bytes that were read for this answer, and such line ends in them. When these
    are enough, and where a message cannot be read, the rest is taken to have as many.
    """
    found = done = 0
    before = b""
    try:
        with open(posix.open(path, posix.O_RDONLY | posix.O_NONBLOCK), "rb", 0) as file:
            while sample[0] + done < MOST_READ and (block := file.read(1 << 16)):
                found += block.count(b"\n") - (before + block).count(b"\r\n")
                done, before = done + len(block), block[-1:]
    except PermissionError:
        pass
    sample[0], sample[1] = sample[0] + done, sample[1] + found
    return found + max(0, size - done) * sample[1] // max(1, sample[0])


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
