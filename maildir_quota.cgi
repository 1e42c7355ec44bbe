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

TYPE_CHECKING = False  # as in `typing`, without its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Optional

    Env = dict[bytes, bytes]

QUOTA_LIMIT = "200M"  # bytes, or with K, M, G, T (powers of 1024); 0: no limit
QUOTA_MAILDIR = "%h/Maildir"  # %n user, %d domain, %u user@domain, %h the user's home, %% percent
QUOTA_USERS = ""  # a file of lines `user limit` or `user@domain limit`, which beat every other
QUOTA_KEEPER = "auto"  # the server: courier, dovecot (its maildir driver) or dovecot-count
QUOTA_TRASH = "auto"  # count it as Dovecot, skip it as Courier, or as whichever keeps the Maildir
QUOTA_CONTROL = ""  # where Dovecot has its CONTROL files, if not in the Maildir: %n, %d, %u, %h
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
    import time

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
    import time

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
