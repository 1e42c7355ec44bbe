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
    import socket
    import socketserver
    from collections.abc import Callable, Iterator
    from typing import Any, Optional

    Env = dict[bytes, bytes]
    Header = list[tuple[str, str]]
    Measure = Callable[..., tuple[bool, int, int, int, float]]

QUOTA_LIMIT = "200M"  # bytes, or with K, M, G, T (powers of 1024); 0: no limit
QUOTA_MAILDIR = "%h/Maildir"  # %n user, %d domain, %u user@domain, %h the user's home, %% percent
QUOTA_USERS = ""  # a file of lines `user limit` or `user@domain limit`, which beat every other
QUOTA_KEEPER = "auto"  # the server: courier, dovecot (its maildir driver) or dovecot-count
QUOTA_TRASH = "auto"  # count it as Dovecot, skip it as Courier, or as whichever keeps the Maildir
QUOTA_CONTROL = ""  # where Dovecot has its CONTROL files, if not in the Maildir: %n, %d, %u, %h
QUOTA_ALLOW = ""  # addresses and networks that may ask, as `192.0.2.25 2001:db8::/32`; none: all
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
        control = expand(template, env[b"u"], env[b"d"] or None)
        check_folder(check_template(template))
        return control or path
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
LONGEST_LIMIT = 20  # digits and a letter; more than any disk has
BLOCK = 1 << 16  # bytes of QUOTA_USERS that are in memory at a time
S_IFMT, S_IFREG = 0o170000, 0o100000  # from stat.h: a regular file
AF_INET, AF_INET6 = 2, 10  # as on Linux
MAPPED = "0" * 80 + "1" * 16  # what an IPv6 address that stands for an IPv4 address begins with
HEX = b"0123456789abcdefABCDEF"
SHAPE = bytes.maketrans(b"123456789kmgtMGT", b"000000000KKKKKKK")  # of a limit: 200M is 000K
PLACEHOLDERS = "%n user, %d domain, %u user@domain, %h home, %1n or %1.2n a part, %% percent"
WEEKDAYS, MONTHS = "MonTueWedThuFriSatSun", "JanFebMarAprMayJunJulAugSepOctNovDec"
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


# ---- who may ask ----


def network_bits(text: str) -> str:
    """Return the leading bits of an address or network, behind a letter for its family.

    An IPv4 address inside IPv6, as a socket for both has it, is an IPv4 address. Raises ValueError,
    OSError.
    """
    from _socket import inet_pton  # `socket` and `ipaddress` take as long as all the rest

    address, slash, length = text.partition("/")
    family, size = (AF_INET6, 128) if ":" in address else (AF_INET, 32)
    bits = f"{int.from_bytes(inet_pton(family, address), 'big'):0{size}b}"
    if slash:
        if not length.isdigit() or int(length) > size:
            raise ValueError(text)
        bits = bits[: int(length)]
    if size == 32:
        return "4" + bits
    return "4" + bits[96:] if bits.startswith(MAPPED) else "6" + bits


def allowed_networks(env: "Env") -> "Optional[list[str]]":
    """Return the bits of what QUOTA_ALLOW names; None where all may ask. Raises Problem."""
    allow = setting("QUOTA_ALLOW", env)
    if not allow:
        return None
    networks = []
    for text in allow.replace(b",", b" ").split():
        try:
            networks.append(network_bits(text.decode()))
        except (OSError, ValueError):
            raise Problem(
                500, "QUOTA_ALLOW is not like `192.0.2.25 198.51.100.0/24 2001:db8::/32`", text
            ) from None
    return networks


def check_peer(peer: str, networks: "Optional[list[str]]") -> None:
    """Raise Problem where there are networks that may ask and this address is in none."""
    if networks is None:
        return
    try:
        bits = network_bits(peer.partition("%")[0])  # what follows is the interface
    except (OSError, ValueError):
        raise Problem(403, "QUOTA_ALLOW is set and the address of who asks is not known") from None
    if not any(map(bits.startswith, networks)):
        raise Problem(403, f"{peer} may not ask: it is not in QUOTA_ALLOW")


# ---- limits ----


def to_bytes(text: bytes) -> "Optional[int]":
    """Read a limit like 200M in bytes; None where it is none."""
    text = text.strip().upper()
    power = b"KMGT".find(text[-1:]) + 1
    digits = text[:-1] if power else text
    if not digits.isdigit() or len(text) > LONGEST_LIMIT:
        return None
    return int(digits) << 10 * power


def parse_limit(name: str, text: bytes) -> int:
    """Read the limit in a setting in bytes. Raises Problem where it is none."""
    limit = to_bytes(text)
    if limit is None:
        raise Problem(500, f"{name} has a limit that is not like 200M", text)
    return limit


def parse_grace(text: bytes, quota: int) -> int:
    """Read a grace in bytes: written like a limit, or `10%` of the quota. Raises Problem."""
    text = text.strip()
    percent = to_bytes(text[:-1]) if text[-1:] == b"%" and text[-2:-1].isdigit() else None
    grace = 0 if text == b"auto" else to_bytes(text)
    if percent is not None:
        grace = quota * percent // 100
    if grace is None:
        raise Problem(500, "QUOTA_GRACE is not like 10%, 10M or auto", text)
    return grace


def user_limit(user: bytes, domain: "Optional[bytes]", env: "Env") -> "Optional[int]":
    """Look up in QUOTA_USERS the limit in bytes of user@domain, user or @domain. Raises Problem."""
    path = setting("QUOTA_USERS", env)
    if not path:
        return None
    wanted = [user] if domain is None else [user + b"@" + domain, user, b"@" + domain]
    try:
        found = look_up(path, set(wanted))
    except OSError as error:
        raise Problem(500, "the file QUOTA_USERS cannot be read", error) from None
    for name in wanted:
        if name in found:
            return to_bytes(found[name])
    return None


def look_up(path: bytes, wanted: "set[bytes]") -> "dict[bytes, bytes]":
    """Return the limits that QUOTA_USERS has for these names. Raises OSError, Problem."""
    found: dict[bytes, bytes] = {}
    for names, limits in read_users(path):
        for name in wanted.intersection(names):
            found.setdefault(name, limits[names.index(name)])
    return found


def read_users(path: bytes) -> "Iterator[tuple[list[bytes], list[bytes]]]":
    """Read QUOTA_USERS; yield some names and their limits at a time. Raises OSError, Problem."""
    file = posix.open(path, posix.O_RDONLY | posix.O_NONBLOCK)  # which does not wait for a pipe
    try:
        before = posix.fstat(file)
        if before.st_mode & S_IFMT != S_IFREG:
            raise OSError("not a file")
        number, rest = 1, b""
        while block := posix.read(file, BLOCK):
            whole, newline, rest = (rest + block).rpartition(b"\n")
            if len(rest) > BLOCK:
                break
            yield from parse_users(whole + newline, number)
            number += whole.count(b"\n") + len(newline)
        if rest:
            raise Problem(500, f"QUOTA_USERS: line {number}, the last, has no newline at its end")
        after = posix.fstat(file)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise Problem(500, "QUOTA_USERS changed while it was read: replace it with mv")
    finally:
        posix.close(file)


def parse_users(text: bytes, number: int) -> "Iterator[tuple[list[bytes], list[bytes]]]":
    """Read whole lines of QUOTA_USERS, of which the first has this number. Raises Problem.

    Line by line, a million would take a second. So many at once are tried first: where each is two
    fields and nothing is special in any, they are done; else each half is tried.
    """
    text = text.replace(b"\t", b" ")
    lines = text.count(b"\n")
    fields = text.replace(b"\n", b" \0 ").split()
    names, limits = fields[::3], fields[1::3]
    shape = b" %s " % b" ".join(limits).translate(SHAPE)
    if (
        len(fields) == 3 * lines > 0
        and set(fields[2::3]) == {b"\0"}
        and not any(special in text for special in (b"#", b"\0", b": ", b"@ "))
        and not any(wrong in shape for wrong in (b"K0", b"KK", b" K"))
        and not shape.strip(b" 0K")
        and len(max(limits, key=len)) <= LONGEST_LIMIT
    ):
        yield names, limits
    elif lines > 8:
        middle = text.rfind(b"\n", 0, len(text) // 2) + 1 or text.find(b"\n") + 1
        yield from parse_users(text[:middle], number)
        yield from parse_users(text[middle:], number + text.count(b"\n", 0, middle))
    else:
        for line in text.split(b"\n"):
            line = line.partition(b" #")[0].strip()
            if line and line[:1] != b"#":
                name, *limit = line.rsplit(None, 1)
                if not limit or name[-1:] in (b":", b"@") or to_bytes(limit[0]) is None:
                    why = "is not `user limit`, `user@domain limit` or `@domain limit`"
                    raise Problem(500, f"QUOTA_USERS: line {number} {why}", line)
                yield [name], limit
            number += 1


# ---- the question ----


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


# ---- the mailbox ----


def check_template(template: bytes) -> bytes:
    """Return the folder that a path of mailboxes begins with. Raises Problem where it is none."""
    first, *rest = template.replace(b"%%", b"\0").split(b"%")
    if not any(part[:1] in (b"n", b"u", b"h") for part in rest):
        why = "names no user (%n, %u or %h); systemd and uWSGI want each % doubled"
        raise Problem(500, f"{PATH_SETTING} {why}", template)
    return first[: first.rfind(b"/") + 1].replace(b"\0", b"%")


def expand(template: bytes, user: bytes, domain: "Optional[bytes]") -> "Optional[bytes]":
    """Put the names into a path. None where it asks for the home of a user that the system lacks.

    Raises Problem where the path needs a domain and there is none, or is a bad setting.
    """
    first, *rest = template.replace(b"%%", b"\0").split(b"%")
    parts = [first]
    for part in rest:
        text = part.lstrip(b"0123456789.")
        name, (skip, _, width) = text[:1], part[: len(part) - len(text)].rpartition(b".")
        if name not in (b"n", b"d", b"u", b"h") or b"." in skip or skip + width[:1] == b"0":
            why = f"has a placeholder that is none of: {PLACEHOLDERS}"
            raise Problem(500, f"{PATH_SETTING} {why}", template)
        value = home_of(user) if name == b"h" else user
        if name in (b"d", b"u"):
            if domain is None:
                raise Problem(400, "no domain (d=) given")
            value = domain if name == b"d" else user + b"@" + domain
        if value is None:
            return None
        start, length = int(skip or b"0"), int(width or b"0")
        parts += value[start : start + length if length else None], text[1:]
    path = b"".join(parts).replace(b"\0", b"%")
    if path[:1] != b"/":
        raise Problem(500, f"{PATH_SETTING} does not begin with /", template)
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
    if home[:1] != "/":
        raise Problem(500, "the user's home does not begin with /", home)
    return home.encode(encoding, "surrogateescape")


def check_folder(folder: bytes) -> None:
    """Raise Problem where the folder of all mailboxes is missing: then no answer is true."""
    try:
        if folder:
            posix.stat(folder)
    except FileNotFoundError as error:
        why = "begins with a folder that does not exist; systemd and uWSGI want each % doubled"
        raise Problem(500, f"{PATH_SETTING} {why}", error) from None


def unreadable(error: OSError) -> Problem:
    """Return what ends a request where a mailbox cannot be read; the log gets what to do."""
    detail = str(error)
    if error.errno == errno.EACCES:
        who = f"user {posix.geteuid()}, group {posix.getegid()}"
        detail += f"; let {who} search (x) all folders above it, and read a Maildir's (rx)"
    return Problem(500, f"cannot read the mailbox: {error.strerror}", detail)


# ---- the answer ----


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
    limit = parse_limit("QUOTA_LIMIT", setting("QUOTA_LIMIT", env))
    given = user_limit(user, domain, env)
    template = setting(PATH_SETTING, env)
    path = expand(template, user, domain)
    folder = check_template(template)
    status = b"UNKNOWN" if unknown == b"1" or path is None else b"OK"
    used, quota, changed = 0, limit if given is None else given, 0.0
    grace = parse_grace(setting("QUOTA_GRACE", env), quota)
    try:
        if path is not None:
            asked = {**env, b"u": user, b"d": domain or b""}
            over, used, quota, grace, changed = measure(path, limit, given, asked)
            status = b"OVERQUOTA" if over else b"OK"
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
            raise unreadable(error) from None
        check_folder(folder)
    header = [("Quota-Grace", str(grace))] * (grace > 0)
    if 0 < changed < END_OF_9999:
        header.append(("Last-Modified", http_date(changed)))
    return b"%s %s %d %d\n" % (status, user, used, quota), header


def http_date(seconds: float) -> str:
    """Write a time as HTTP does (RFC 9110, 5.6.7), in whatever language the server runs."""
    year, month, day, hour, minute, second, weekday, *_ = time.gmtime(seconds)
    date = f"{day:02} {MONTHS[month * 3 - 3 : month * 3]} {year}"
    clock = f"{hour:02}:{minute:02}:{second:02} GMT"
    return f"{WEEKDAYS[weekday * 3 : weekday * 3 + 3]}, {date} {clock}"


def log(text: str) -> None:
    """Write a line to standard error; where it is closed or full, the client gets its answer."""
    try:
        if sys.stderr:
            print(f"quota: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass


def report(problem: Problem) -> "tuple[int, bytes, Header]":
    """Return the answer that a problem makes; its detail goes to standard error."""
    if problem.detail is not None:
        log(f"{problem.why}: {str(problem.detail)!a}")
    return problem.status, b"ERROR %s\n" % problem.why.encode(), []


def answer(
    user: "Optional[bytes]", domain: "Optional[bytes]", env: "Env"
) -> "tuple[int, bytes, Header]":
    """Answer with an HTTP status, a line and header fields."""
    try:
        return 200, *verdict(user, domain, env)
    except Problem as problem:
        return report(problem)


def respond(
    method: bytes, query: bytes, env: "Env", peer: "Optional[str]"
) -> "tuple[int, Header, bytes]":
    """Answer a request with an HTTP status, header fields and a body. No proxy may keep it.

    Without a `peer`, who asks has been checked before.
    """
    try:
        if peer is not None:
            check_peer(peer, allowed_networks(env))
        if method not in (b"GET", b"HEAD"):
            raise Problem(405, "only GET and HEAD are answered")
        fields = parse_query(query)
        status, line, more = answer(fields.get(b"u"), fields.get(b"d"), env)
    except Problem as problem:
        status, line, more = report(problem)
    return status, fields_of(status, line) + more, b"" if method == b"HEAD" else line


def fields_of(status: int, line: bytes) -> "Header":
    """Return the header fields that each answer has. No proxy may keep it."""
    header = [("Content-Type", "text/plain"), ("Content-Length", str(len(line)))]
    return header + [("Cache-Control", "no-store")] + [("Allow", "GET, HEAD")] * (status == 405)


# ---- CGI and WSGI ----


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
    status, header, body = respond(method, query, env, environ.get("REMOTE_ADDR", ""))
    start_response(f"{status} {REASONS[status]}", header)
    return [body]


# ---- --serve ----

REQUEST_SECONDS = 10  # for a request, however it drips, and for the pause before the next
CONNECTIONS = 1500  # that wait for a whole request, a thread each; the oldest makes way
PATIENCE = 2  # seconds from which on a mailbox that is being measured counts as hanging


def one_at_a_time(measure: "Measure") -> "Measure":
    """Wrap measure() so that a mailbox whose disk hangs holds one thread, however often asked."""
    import threading

    busy: dict[bytes, float] = {}  # mailboxes, and since when each is being measured
    done = threading.Condition()

    def measure_alone(path: bytes, *arguments: "Any") -> "tuple[bool, int, int, int, float]":
        with done:
            rest = busy.get(path, time.monotonic()) + PATIENCE - time.monotonic()
            if not done.wait_for(lambda: path not in busy, max(rest, 0)):
                raise Problem(500, "the mailbox hangs: no answer from its disk", path)
            busy[path] = time.monotonic()
        try:
            return measure(path, *arguments)
        finally:
            with done:
                del busy[path]
                done.notify_all()

    return measure_alone


def read_once() -> "Callable[[bytes, set[bytes]], dict[bytes, bytes]]":
    """Make a look_up() that reads QUOTA_USERS once for each change and keeps all of it."""
    import threading

    lock = threading.Lock()
    kept: tuple[object, dict[bytes, bytes]] = None, {}

    def look_up(path: bytes, wanted: "set[bytes]") -> "dict[bytes, bytes]":
        nonlocal kept
        with lock:
            status = posix.stat(path)
            stamp = path, status.st_ino, status.st_size, status.st_mtime_ns
            if stamp != kept[0]:
                kept = None, {}  # not two of them in memory
                names: list[bytes] = []
                limits: list[bytes] = []
                same: dict[bytes, bytes] = {}  # limits are few: each is kept once
                for some_names, some_limits in read_users(path):
                    names += some_names
                    limits += map(same.setdefault, some_limits, some_limits)
                # Of two lines for a name the first counts.
                kept = stamp, dict(zip(reversed(names), reversed(limits)))
            return kept[1]

    return look_up


def http_handler() -> "type":
    """Make the class that answers one HTTP connection, in a thread of its own."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which keeps connections: a new one costs four times as much
        wbufsize = -1  # header and body in one packet
        error_message_format, error_content_type = "ERROR %(message)s\n", "text/plain"

        def __getattr__(self, name: str) -> "Any":
            """Answer any method ourselves: http.server would say 501 where 405 is due."""
            if name.startswith("do_"):
                return self.answer
            raise AttributeError(name)

        def handle_one_request(self) -> None:
            """Wait for a request, but not for ever, and answer it."""
            self.server.expect(self.connection)  # type: ignore[attr-defined]
            super().handle_one_request()

        def answer(self) -> None:
            """Answer one request. A body is not read: what follows it could not be told from it."""
            self.server.waiting.pop(self.connection, None)  # type: ignore[attr-defined]
            query = self.path.partition("?")[2].encode("latin-1")
            method = self.command.encode("latin-1")
            status, header, body = respond(method, query, posix.environ, None)
            if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
                self.close_connection = True
            header.append(("Keep-Alive", f"timeout={REQUEST_SECONDS}"))  # an offer, to any client
            if self.close_connection:
                header.append(("Connection", "close"))
            self.send_response_only(status, REASONS[status])
            for name, value in header:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Log no request: what is worth a line has gone to standard error."""

    return Handler


def http_server(where: str, networks: "Optional[list[str]]") -> "socketserver.TCPServer":
    """Make a server at [HOST:]PORT that no silent or slow client holds up.

    Raises OSError, ValueError, Problem.
    """
    import socket
    import socketserver

    host, _, port = where.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    family, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    loopback = network_bits("127.0.0.0/8"), network_bits("::1")
    if networks is None and not network_bits(str(address[0])).startswith(loopback):
        raise ValueError("beyond loopback it wants QUOTA_ALLOW, the addresses that may ask")

    class Server(socketserver.ThreadingTCPServer):
        address_family = family
        allow_reuse_address = daemon_threads = True
        request_queue_size = 1024
        waiting: "dict[socket.socket, float]" = {}  # for a request, until when; the oldest first

        def verify_request(self, request: "Any", client_address: "Any") -> bool:
            """Refuse who may not ask before a byte is read."""
            try:
                check_peer(client_address[0], networks)
            except Problem as problem:
                status, line, _ = report(problem)
                length = b"Content-Length: %d\r\nConnection: close" % len(line)
                head = b"HTTP/1.1 %d Forbidden\r\nContent-Type: text/plain\r\n" % status
                request.sendall(head + length + b"\r\n\r\n" + line)
                request.setblocking(False)
                try:
                    request.recv(1 << 16)  # unread, it would turn the answer into a reset
                except OSError:
                    pass
                return False
            return True

        def expect(self, connection: "socket.socket") -> None:
            """Let a connection wait for its next request; too many end the one that waits longest.

            Its thread finds the end of file.
            """
            self.waiting[connection] = time.monotonic() + REQUEST_SECONDS
            for oldest in list(self.waiting)[:-CONNECTIONS]:
                self.end(oldest)

        def service_actions(self) -> None:
            """End, some times a second, what has waited for too long."""
            for connection, until in list(self.waiting.items()):
                if until > time.monotonic():
                    break
                self.end(connection)

        def end(self, connection: "socket.socket") -> None:
            """End a connection, under whatever thread reads from it."""
            self.waiting.pop(connection, None)
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

        def shutdown_request(self, request: "Any") -> None:
            """Forget a connection that has ended."""
            self.waiting.pop(request, None)
            super().shutdown_request(request)

        def handle_error(self, request: object, client_address: object) -> None:
            """Log a fault of ours in one line; that a client went away is none."""
            if not isinstance(sys.exc_info()[1], OSError):
                log(f"request failed: {sys.exc_info()[1]!r}")

    return Server((str(address[0]), int(port)), http_handler())


def serve(where: str) -> int:
    """Answer over HTTP at [HOST:]PORT until TERM or INT. Raises OSError, ValueError, Problem."""
    import resource
    import signal
    import threading

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    threading.stack_size(1 << 18)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    globals().update(measure=one_at_a_time(measure), look_up=read_once())
    with http_server(where, allowed_networks(posix.environ)) as server:
        log("serving on {} port {}".format(*server.server_address))
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


# ---- the process ----

USAGE = "usage: {0} (USER[@DOMAIN] | --serve [[HOST:]PORT])\n"


def ask(mailbox: str) -> int:
    """Print the answer for USER[@DOMAIN] and return the exit status."""
    name = mailbox.encode(sys.getfilesystemencoding(), "surrogateescape")
    local, at, domain = name.rpartition(b"@")
    status, line, _ = answer(local if at else domain, domain if at else None, posix.environ)
    posix.write(1 if status == 200 else 2, line)
    return int(status != 200)


def main() -> int:
    """Do what the environment or the command line asks for and return the exit status."""
    if b"GATEWAY_INTERFACE" in posix.environ or b"REQUEST_METHOD" in posix.environ:
        return run_cgi(posix.environ)
    first, *more = sys.argv[1:] or [""]
    try:
        if first == "--serve" and len(more) < 2:
            return serve(*more or ["127.0.0.1:8025"])
        if first and first[0] != "-" and not more:
            return ask(first)
        text = USAGE.format(sys.argv[0])
        if first in ("-h", "--help"):
            posix.write(1, f"{text}\n{__doc__}".encode())
            return 0
        posix.write(2, text.encode())
    except Problem as problem:
        log(f"--serve: {problem.why}: {str(problem.detail)!a}")
    except OSError as error:  # of --serve: the address may come later
        log(f"{' '.join(sys.argv[1:])}: {error}")
        return 1
    except (OverflowError, ValueError) as error:
        log(f"{' '.join(sys.argv[1:])}: {error}")
    return 2


if __name__ == "__main__":
    # An orderly end would take as long as the answer, wait for threads that a disk holds, and turn
    # the status into 120 where standard error is full.
    posix._exit(main())
