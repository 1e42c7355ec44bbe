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
    Each with one line, `ERROR why`, which is never a verdict (in a shell on
    standard error, with status 1); the detail goes to standard error.

SECURITY
    Whoever may ask learns who has a mailbox and how large it is: let only the
    frontends ask. Names are checked before they become part of a path. Under a
    web server the command line is ignored: a query without `=` is passed there.
    The script reads `maildirsize` and lists folders; it opens a message only for
    `dovecot-count`, and only where its name lacks `,W=`. It never writes.
"""

# A CGI's cost is its start, and `os`, `re`, `urllib` or `typing` would make that longer: `posix` is
# what `os` wraps. Names are not always UTF-8, so all text is bytes.
import errno
import posix
import sys
import time

TYPE_CHECKING = False  # as in `typing`, without its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import FileIO
    from typing import Optional

    Env = dict[bytes, bytes]
    Header = list[tuple[str, str]]
    ReadLimits = Callable[[bytes, list[bytes]], dict[bytes, bytes]]

QUOTA_LIMIT = "200M"  # bytes, or with K, M, G, T (powers of 1024); 0: no limit
QUOTA_MAILDIR = "%h/Maildir"  # %n user, %d domain, %u user@domain, %h the user's home, %% percent
QUOTA_USERS = ""  # a file of lines `user limit` or `user@domain limit`, which beat every other
QUOTA_KEEPER = "auto"  # the server: courier, dovecot (its maildir driver) or dovecot-count
QUOTA_TRASH = "auto"  # count it as Dovecot, skip it as Courier, or as whichever keeps the Maildir
QUOTA_CONTROL = ""  # where Dovecot has its CONTROL files, if not in the Maildir: %n, %d, %u, %h
QUOTA_ALLOW = ""  # addresses and networks that may ask: 192.0.2.25 2001:db8::/32; none: all
QUOTA_GRACE = "auto"  # what the message that fills the mailbox may take beyond its quota: 1M, 10%
QUOTA_UNKNOWN = "off"  # 1: a mailbox that does not exist is UNKNOWN rather than OK with 0 bytes

PATHS = ("QUOTA_MAILDIR", "QUOTA_CONTROL")  # the settings that are paths with placeholders

COURIER, DOVECOT, COUNT = KEEPERS = b"courier", b"dovecot", b"dovecot-count"
DOVECOT_CONF = b"/etc/dovecot/dovecot.conf"  # Debian's, readable by all

TRUSTED_LENGTH = 5120  # bytes from which on the servers rebuild a maildirsize rather than read it
TRUSTED_AGE = 15 * 60  # seconds for which a maildirsize that says "over" is believed
SAME_TIME = 60  # seconds; what one delivery writes is never further apart
MOST_READ = 16 << 20  # bytes of messages read for one answer, some hundredths of a second
LONGEST_NUMBER = 20  # digits; a longer one does not fit the servers' 64 bits
DIGITS = b"0123456789"


def measure(
    path: bytes, others: "list[Optional[bytes]]", quota: int, is_own: bool, env: "Env"
) -> "tuple[bool, int, int, int, float]":
    """Measure the Maildir at `path`: over its quota?, bytes used, quota, grace, its last change.

    Quota (0: none) and grace in bytes, the last change in seconds since the epoch (0: not known).
    The given quota, unless it is the user's own, counts where `maildirsize` has none.
    Raises OSError, Problem.
    """
    keeper = setting("QUOTA_KEEPER", env, b"auto", *KEEPERS)
    trash = setting("QUOTA_TRASH", env, b"auto", b"count", b"skip")
    control = next(iter(others), None) or path
    posix.stat(path)  # no Maildir is FileNotFoundError; from here on that is one of its files
    if keeper == b"auto":
        keeper = keeper_of(path, control)
    dovecot = keeper != COURIER
    skip = trash == b"skip" or trash == b"auto" and not dovecot
    folders = folders_of(path, dovecot)
    limits, total, doubtful = (quota, 0), None, False
    maildirsize = None if keeper == COUNT else read_maildirsize(control, dovecot)
    if maildirsize is not None:
        header, entries, age = maildirsize
        limits = limits if is_own else parse_limits(header, dovecot)
        total = add_up(entries)
        doubtful = len(entries) > 1 or age > TRUSTED_AGE
    # A sum that is exactly the limit is over for Courier, but not yet for Dovecot's doubts.
    if total is None or doubtful and is_over(total, limits, 0 if dovecot else 1):
        total = count(folders, keeper, skip)
        if is_over(total, limits, 1):
            total = count(folders, keeper, skip, once=True)
    grace = find_grace(keeper, limits[0], env)
    return is_over(total, limits, 1), total[0], limits[0], grace, last_change(folders)


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
    try:
        with open_file(path) as file:
            text, changed = file.read(TRUSTED_LENGTH), posix.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    if not text:  # what a full disk leaves
        return None
    *lines, unfinished = text.split(b"\n")
    # Somebody may still be writing it: Dovecot leaves it out, Courier where it is no entry.
    if not dovecot and (not lines or parse_entry(unfinished)):
        lines.append(unfinished)
    header, *entries = lines or [b""]
    return header, entries if len(text) < TRUSTED_LENGTH else [b""], time.time() - changed


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
            try:  # Dovecot follows links, but not in a circle
                if entry.name[:1] == b"." and entry.is_dir(follow_symlinks=dovecot):
                    folders.append(path + b"/" + entry.name)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
    return folders


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
            in_trash = flagged and info[:2] == b"2," and b"T" in info
            if name.startswith(hidden) or in_trash or name in seen:
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
        with open_file(path) as file:
            while sample[0] + done < MOST_READ and (block := file.read(1 << 16)):
                found += block.count(b"\n") - (before + block).count(b"\r\n")
                done, before = done + len(block), block[-1:]
    except PermissionError:
        pass
    sample[0], sample[1] = sample[0] + done, sample[1] + found
    return found + max(0, size - done) * sample[1] // max(1, sample[0])


# ---- From here to the end the text is the same in quota.cgi and maildir_quota.cgi. ----

NAME_LENGTH = 255  # bytes in a user or a domain, as in a file's name
BLOCK = 1 << 16  # bytes of QUOTA_USERS that are in memory at a time, and the most in a line of it
S_IFMT, S_IFREG, ENAMETOOLONG = 0o170000, 0o100000, 36  # from stat.h and errno.h of Linux
MAPPED = "0" * 80 + "1" * 16  # what an IPv6 address that stands for an IPv4 address begins with
HEX = b"0123456789abcdefABCDEF"
SHAPE = bytes.maketrans(b"123456789kmgtMGT", b"000000000KKKKKKK")  # makes 200M 000K
PLACEHOLDERS = "%n user, %d domain, %u user@domain, %h home, %1n or %1.2n a part, %% percent"
TWICE = "in systemd and uWSGI each % is written twice"
END_OF_9999 = 253402300800  # seconds since the epoch; an HTTP date has four digits for the year
REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 405: "Method Not Allowed"}
REASONS[500] = "Internal Server Error"


class Problem(Exception):
    """Ends a request: HTTP status, a line for the client that names no path, details to log."""


def log(text: str) -> None:
    """Write a line to standard error, if that is possible."""
    try:
        posix.write(2, f"quota: {text}\n".encode())
    except OSError:
        pass  # it is closed, or a disk is full


# ---- settings ----


def setting(name: str, env: "Env", *choices: bytes) -> bytes:
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


def parse_grace(text: bytes, quota: int) -> int:
    """Read a grace in bytes: written like a limit, or `10%` of the quota. Raises Problem."""
    if text[-1:] == b"%":
        return quota * parse_limit("QUOTA_GRACE", text[:-1]) // 100
    return 0 if text == b"auto" else parse_limit("QUOTA_GRACE, neither auto nor like 10%,", text)


def network_bits(text: str) -> str:
    """Return the leading bits of an address or network. Raises ValueError, OSError.

    Before them stands 4 or 6; an IPv4 address inside IPv6 is an IPv4 address.
    """
    from _socket import AF_INET, AF_INET6, inet_pton  # `ipaddress` takes as long as all the rest

    address, _, length = text.partition("/")
    family, size = (AF_INET6, 128) if ":" in address else (AF_INET, 32)
    bits = f"{int.from_bytes(inet_pton(family, address), 'big'):0{size}b}"
    bits = bits[: range(size + 1).index(int(length or size))]
    is_mapped = bits.startswith(MAPPED)
    return "4" + bits[len(MAPPED) * is_mapped :] if is_mapped or size == 32 else "6" + bits


def check_peer(peer: str, env: "Env") -> None:
    """Raise Problem where QUOTA_ALLOW is set and this address is not in it."""
    allow = setting("QUOTA_ALLOW", env).replace(b",", b" ")
    try:
        networks = [network_bits(text.decode()) for text in allow.split()]
    except (OSError, ValueError):
        why = "QUOTA_ALLOW is not like `192.0.2.25 198.51.100.0/24 2001:db8::/32`"
        raise Problem(500, why, allow) from None
    try:
        if not allow or network_bits(peer.partition("%")[0]).startswith(tuple(networks)):
            return
    except (OSError, ValueError):
        peer = "an address that is not known"
    raise Problem(403, peer + " is not in QUOTA_ALLOW")


# ---- QUOTA_USERS ----


def user_limit(
    user: bytes, domain: "Optional[bytes]", env: "Env", read_limits: "ReadLimits"
) -> "Optional[int]":
    """Look up in QUOTA_USERS the limit in bytes of user@domain, user or @domain. Raises Problem."""
    path = setting("QUOTA_USERS", env)
    if not path:
        return None
    names = [user] if domain is None else [user + b"@" + domain, user, b"@" + domain]
    try:
        limits = read_limits(path, names)
    except OSError as error:
        raise Problem(500, "the file QUOTA_USERS cannot be read", error) from None
    found = [limits[name] for name in names if name in limits]
    return parse_limit("QUOTA_USERS", found[0]) if found else None


def read_limits(path: bytes, wanted: "Optional[list[bytes]]" = None) -> "dict[bytes, bytes]":
    """Read the limits in QUOTA_USERS, of all users or at least of those that are wanted.

    Of a name that stands there twice the first counts. Raises OSError, Problem.
    """
    found: dict[bytes, bytes] = {}
    for names, limits in read_users(path):
        if wanted is None or not set(wanted).isdisjoint(names):
            for name, limit in zip(names, limits):
                found.setdefault(name, limit)
    return found


def read_users(path: bytes) -> "Iterator[tuple[list[bytes], list[bytes]]]":
    """Read QUOTA_USERS and yield names with their limits. Raises OSError, Problem."""
    number, rest = 1, b""
    with open_file(path) as file:
        before = posix.fstat(file.fileno())
        while len(rest) <= BLOCK and (block := file.read(BLOCK)):
            lines, newline, rest = (rest + block).rpartition(b"\n")
            yield from parse_users(lines + newline, number)
            number += lines.count(b"\n") + len(newline)
        after = posix.fstat(file.fileno())
    if rest:
        why = " is too long" if len(rest) > BLOCK else ", the last, does not end in a newline"
        raise Problem(500, f"QUOTA_USERS: line {number}{why}")
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise Problem(500, "QUOTA_USERS changed while it was read: replace it with mv")


def open_file(path: bytes) -> "FileIO":
    """Open a file. What is none is not opened, but counts as missing. Raises OSError."""
    if posix.stat(path).st_mode & S_IFMT != S_IFREG:
        raise FileNotFoundError(f"not a file: {path!r}")
    return open(posix.open(path, posix.O_RDONLY | posix.O_NONBLOCK), "rb", 0)


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


def are_limits(texts: "list[bytes]") -> bool:
    """Say whether each is a limit like 200M, for many at once."""
    shapes = (b" ".join(texts) + b" ").translate(SHAPE)
    return shapes.replace(b"0K ", b"0 ").replace(b" ", b"").isdigit()


# ---- names and paths ----


def check_name(what: str, name: bytes) -> None:
    """Raise Problem where a user or domain cannot be a file's name or would break the answer."""
    if not 0 < len(name) <= NAME_LENGTH or name[:1] == b"." or b"/" in name:
        raise Problem(400, "no mailbox has such a " + what)
    if any(c < " " or "\x7f" <= c <= "\x9f" for c in name.decode("utf-8", "surrogateescape")):
        raise Problem(400, "control character in the " + what)


def expand(name: str, user: bytes, domain: "Optional[bytes]", env: "Env") -> "Optional[bytes]":
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
            why = f"{PATHS[0]} begins with a folder that does not exist: {TWICE}"
            detail = str(template)
    raise Problem(500, why, detail)


# ---- a question and its answer ----


def verdict(query: bytes, env: "Env", read_limits: "ReadLimits") -> "tuple[bytes, Header]":
    """Answer a query with `STATUS user used quota`, and header fields. Raises Problem."""
    fields = parse_query(query)
    user, domain = fields.get(b"u"), fields.get(b"d")
    if user is None:
        raise Problem(400, "no user (u=) given")
    check_name("user", user)
    if domain is not None:
        check_name("domain", domain)
    unknown = setting("QUOTA_UNKNOWN", env, b"off", b"1", b"0", b"") == b"1"
    quota = parse_limit("QUOTA_LIMIT", setting("QUOTA_LIMIT", env))
    own = user_limit(user, domain, env, read_limits)
    quota = quota if own is None else own
    used, changed, grace = 0, 0.0, parse_grace(setting("QUOTA_GRACE", env), quota)
    wanted = [name for name in PATHS if name == PATHS[0] or setting(name, env)]
    path, *others = [expand(name, user, domain, env) for name in wanted]
    status = b"UNKNOWN" if unknown or path is None else b"OK"
    try:
        if path is not None:
            over, used, quota, grace, changed = measure(path, others, quota, own is not None, env)
            status = b"OVERQUOTA" if over else b"OK"
    except OSError as error:
        explain(error, setting(PATHS[0], env))
    header = [("Quota-Grace", str(grace))] * (grace > 0)
    if 0 < changed < END_OF_9999:
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(changed))
        header.append(("Last-Modified", date))
    return b"%s %s %d %d\n" % (status, user, used, quota), header


def parse_query(query: bytes) -> "dict[bytes, bytes]":
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


def respond(env: "Env", read_limits: "ReadLimits" = read_limits) -> "tuple[str, Header, bytes]":
    """Answer a request that is given as to a CGI (RFC 3875): HTTP status, header fields, body."""
    method = env.get(b"REQUEST_METHOD", b"GET")
    header = []
    try:
        check_peer(env.get(b"REMOTE_ADDR", b"").decode("latin-1"), env)
        if method not in (b"GET", b"HEAD"):
            header = [("Allow", "GET, HEAD")]
            raise Problem(405, "only GET and HEAD are answered")
        line, header = verdict(env.get(b"QUERY_STRING", b""), env, read_limits)
        status = 200
    except Problem as problem:
        status, why, *details = problem.args
        line = b"ERROR %s\n" % why.encode()
        for detail in details:
            log(f"{why}: {str(detail)!a}")
    header += [("Content-Type", "text/plain"), ("Content-Length", str(len(line)))]
    header += [("Cache-Control", "no-store")]  # no proxy may keep it
    return f"{status} {REASONS[status]}", header, b"" if method == b"HEAD" else line


def run_cgi() -> int:
    """Answer the one request of a web server that started the script."""
    status, header, body = respond(posix.environ)
    head = "".join(f"{name}: {value}\n" for name, value in [("Status", status), *header])
    posix.write(1, head.encode() + b"\n" + body)
    return 0


ASKED_BY_WEB_SERVER = b"GATEWAY_INTERFACE" in posix.environ or b"REQUEST_METHOD" in posix.environ
if __name__ == "__main__" and ASKED_BY_WEB_SERVER:
    posix._exit(run_cgi())  # an orderly end would take as long as the answer

# ---- A CGI has ended here: what follows is for the other ways to run the script. ----

# It is text until now, as to compile it would take a tenth of a CGI's time: all that the script
# costs is its start. It imports what it likes, which at the top a CGI would wait for.
exec(r'''
import argparse
import contextlib
import io
import ipaddress
import os
import resource
import signal
import socket
import socketserver
import string
import threading
import weakref
from http.server import BaseHTTPRequestHandler
from urllib.parse import quote, urlencode

if TYPE_CHECKING:
    from typing import Any


def application(environ: "dict[str, Any]", start_response: "Callable[..., Any]") -> "list[bytes]":
    """Answer one request of a WSGI server (PEP 3333: its strings are bytes in latin-1)."""
    env = {**posix.environ, b"REMOTE_ADDR": b""}
    for name, value in environ.items():
        if isinstance(value, str):
            env[name.encode("latin-1")] = value.encode("latin-1")
    status, header, body = respond(env)
    start_response(status, header)
    return [body]


# ---- --serve: HTTP without a web server ----

REQUEST_SECONDS = 10  # from a connection, or its last answer, to the end of the next request
REQUEST_LENGTH = 16384  # bytes of a request's first line and header
THREADS = 2500  # of which few do not wait, but for what a disk holds up
PATIENCE = 5  # seconds to wait for a mailbox that is being measured, as long as the milter

# Connections whose request is not whole, and since when; who waits longest is the first. Who waits
# too long, or longest when another comes and all places are taken, is hung up on: no client holds
# a thread, only a disk can. Who takes a connection out, with one atomic pop(), decides about it.
waiting: "dict[socket.socket, float]" = {}
# Of each query under way: a mailbox whose disk hangs holds one thread, however often it is asked.
locks: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()
users_lock = threading.Lock()
users_read: "dict[object, dict[bytes, bytes] | Problem]" = {}  # by what changes with the file


def read_once(path: bytes, wanted: "list[bytes]") -> "dict[bytes, bytes]":
    """Do as read_limits(), but read all and once for each change. Raises OSError, Problem."""
    with users_lock:
        status = posix.stat(path)
        stamp = path, status.st_ino, status.st_size, status.st_mtime_ns
        if stamp not in users_read:
            users_read.clear()
            try:
                users_read[stamp] = read_limits(path)
            except Problem as problem:
                users_read[stamp] = problem
        found = users_read[stamp]
    if isinstance(found, Problem):
        raise found.with_traceback(None)
    return found


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of a connection."""

    protocol_version = "HTTP/1.1"
    timeout = REQUEST_SECONDS
    raw_requestline: bytes
    wbufsize = -1  # an answer leaves in one piece
    error_content_type, error_message_format = "text/plain", "ERROR %(message)s\n"

    def setup(self) -> None:
        """Look who asks, before a byte is read: others get what an empty request would."""
        super().setup()
        try:
            check_peer(self.client_address[0], posix.environ)
        except Problem:
            self.rfile = io.BytesIO(b"GET / HTTP/1.0\r\n\r\n")

    def handle_one_request(self) -> None:
        """Read a whole request before it is parsed: the base class would take megabytes of it."""
        stream, head = self.rfile, b""
        while len(head) < REQUEST_LENGTH and (line := stream.readline(REQUEST_LENGTH)):
            head += line
            if not line.strip():
                break
        if len(head) < REQUEST_LENGTH:
            self.rfile = io.BytesIO(head)
            super().handle_one_request()
            self.rfile = stream
        else:
            self.requestline = self.request_version = self.command = ""
            self.send_error(414)

    def parse_request(self) -> bool:
        """Parse a request's first line and header; say whether it is to be answered."""
        # The base class takes bytes for latin-1, in which some of UTF-8's are spaces.
        self.raw_requestline = quote(self.raw_requestline, safe=string.printable).encode()
        return super().parse_request()

    def answer(self) -> None:
        """Answer a request, unless its time was over before it was whole."""
        if waiting.pop(self.connection, None) is None:
            self.close_connection = True
            return
        query = self.path.partition("?")[2]
        env = {b"REQUEST_METHOD": self.command.encode(), b"QUERY_STRING": query.encode()}
        env[b"REMOTE_ADDR"] = self.client_address[0].encode()
        lock = locks.setdefault(query, threading.Lock())
        if not lock.acquire(timeout=PATIENCE):
            log(f"the mailbox hangs: {query}")
            self.send_error(500, "the mailbox hangs, its disk does not answer")
            return
        try:
            status, header, body = respond({**posix.environ, **env}, read_once)
        finally:
            lock.release()
        header.append(("Keep-Alive", f"timeout={REQUEST_SECONDS}"))  # an offer, to any client
        # A body is not read, and what follows it could not be told from it.
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        if self.close_connection or has_body or self.request_version != "HTTP/1.1":
            header.append(("Connection", "close"))
        self.send_response_only(int(status[:3]))
        for name, value in header:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        waiting[self.connection] = time.monotonic()  # before the next request can be there

    def __getattr__(self, name: str) -> "Any":
        """Answer each method, if only by a 405: the base class looks for `do_GET` and so on."""
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def log_message(self, format: str, *arguments: "Any") -> None:
        """Log no requests: the frontends do."""


class Server(socketserver.ThreadingTCPServer):
    """Gives each connection a thread, and hangs up on those that wait too long."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 1024
    places = 1500  # for connections without a whole request

    def process_request(self, request: "Any", client_address: "Any") -> None:
        """Start a thread for a connection, which waits from now on."""
        if threading.active_count() > THREADS:
            self.shutdown_request(request)
            return
        waiting[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Hang up, after each new connection and each second."""
        for connection, since in list(waiting.items()):
            if since > time.monotonic() - REQUEST_SECONDS and len(waiting) < self.places:
                break
            if waiting.pop(connection, None) is not None:
                with contextlib.suppress(OSError):  # the client has gone
                    connection.shutdown(socket.SHUT_RDWR)  # its thread notices, and closes it

    def shutdown_request(self, request: "Any") -> None:
        """Close a connection."""
        waiting.pop(request, None)
        with contextlib.suppress(OSError):  # what is left unread would make the end a reset
            request.setblocking(False)
            request.recv(BLOCK)
        super().shutdown_request(request)

    def handle_error(self, request: "Any", client_address: "Any") -> None:
        """Log an error, unless it is that the client has gone."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log(f"a request failed: {error!r}")


def serve(where: str) -> None:
    """Answer over HTTP at [HOST:]PORT until TERM or INT. Raises OSError, ValueError."""
    host, _, port = where.rpartition(":")
    host, number = host.strip("[]") or "127.0.0.1", range(1 << 16).index(int(port))
    found = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)
    Server.address_family, (address, *_) = found[0][0], found[0][4]
    is_loopback = ipaddress.ip_address(str(address).partition("%")[0]).is_loopback
    if not is_loopback and not setting("QUOTA_ALLOW", posix.environ):
        raise ValueError("elsewhere than on loopback it wants QUOTA_ALLOW: who may ask?")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    Server.places = min(Server.places, most // 2)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Server((str(address), number), Handler) as server:
        log("serving on {} port {}".format(*server.server_address))
        server.serve_forever(poll_interval=1)


# ---- the command line ----


def main() -> int:
    """Do what the command line asks for and return the exit status."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s (USER[@DOMAIN] | --serve [[HOST:]PORT])",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("mailbox", nargs="?", help="whom to tell about")
    wanted.add_argument("--serve", nargs="?", const="127.0.0.1:8025", help="serve over HTTP")
    options = parser.parse_args()
    try:
        if options.serve is None:
            user, at, domain = os.fsencode(options.mailbox).rpartition(b"@")
            query = urlencode({"u": user, "d": domain} if at else {"u": domain}).encode()
            env = {**posix.environ, b"QUERY_STRING": query, b"QUOTA_ALLOW": b""}
            status, _, line = respond(env)
            failed = status != "200 OK"
            posix.write(2 if failed else 1, line)
            return int(failed)
        serve(options.serve)
    except (OSError, ValueError) as error:
        log(f"{' '.join(sys.argv[1:])}: {error}")
        return 1 if isinstance(error, OSError) else 2  # an address may come later
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    posix._exit(main())  # an orderly end would wait for threads that a disk holds
''')
