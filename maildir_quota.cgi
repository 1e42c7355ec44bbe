#!/usr/bin/python3 -IS
"""maildir_quota.cgi - say whether a user's Maildir is over its quota, by its files or Dovecot.

    GET /cgi-bin/maildir_quota.cgi?u=john&d=example.com   as a CGI script
    maildir_quota.cgi --serve [[HOST:]PORT]   without a web server (127.0.0.1:8025)
    maildir_quota.cgi USER[@DOMAIN]           in a shell
    application                               for a WSGI server

The answer is one line, `OK john 1048576 209715200`: OK, OVERQUOTA or UNKNOWN (no such
user), the user, bytes used and quota in bytes (0: no limit). An error is the line
`ERROR why` with HTTP status 4xx or 5xx, or in a shell on standard error with exit status
1. The detail of a 500 goes to standard error. Header fields tell by how many bytes one
more message may exceed the quota (Quota-Grace), and when mail was last delivered, read or
removed (Last-Modified).

With QUOTA_DOVEADM Dovecot itself is asked, whatever the format of its mailboxes.
Without it the Maildir's files are read, by the rule of its keeper (QUOTA_KEEPER): the
server that delivers there and refuses mail when the quota is reached.
    courier        deliverquota: sizes in names (`,S=`), the file `maildirsize`
    dovecot        Dovecot's `maildir` driver: the same files, other details
    dovecot-count  Dovecot's `count` driver: virtual sizes in names (`,W=`)
`maildirsize` has the limits and a sum. The messages are counted instead if it is missing,
broken or too long, or if it says "over" and may be old. dovecot-count always counts, and
takes its limits from the settings. QUOTA_KEEPER=auto tells the keeper by the Maildir's
files. A mailbox is over its quota when it reaches its limit of bytes or of messages.

SETTINGS are the constants below; an environment variable of the same name
overrides them.

SECURITY: whoever may ask learns who has a mailbox and how large it is, so let
only the frontends ask (QUOTA_ALLOW). Names are checked before they become part
of a path. Under a web server the command line is ignored: web servers pass a query
without `=` as arguments. The script opens no message and never writes.
"""

# ruff: noqa: E402 - the imports behind the CGI part are for the other ways to run the script
from __future__ import annotations

import os
import stat
import time

TYPE_CHECKING = False  # the import of `typing` would make the start longer
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any, Callable, Optional

    Env = Mapping[bytes, bytes]  # users and paths are not always UTF-8: they are bytes
    Response = tuple[str, list[tuple[str, str]], bytes]  # status line, header fields, body
    Amount = tuple[int, int]  # bytes and messages: a sum, or limits (0: no limit)

QUOTA_LIMIT = ""  # where no other is known: bytes, or with K, M, G, T (powers of 1024); 0: none
QUOTA_MAILDIR = "%h/Maildir"  # %n user, %d domain, %u user@domain, %h home, %% percent
QUOTA_USERS = ""  # a file of lines `user limit`, `user@domain limit`, `@domain limit`
QUOTA_KEEPER = "auto"  # courier, dovecot (its maildir driver), dovecot-count, or auto: by the files
QUOTA_TRASH = "auto"  # count (as Dovecot), skip (as Courier), auto (as QUOTA_KEEPER)
QUOTA_CONTROL = ""  # where Dovecot has its CONTROL files, if not in the Maildir: %n, %d, %u, %h
QUOTA_DOVEADM = ""  # ask Dovecot instead: http://127.0.0.1:8080/doveadm/v1
QUOTA_DOVEADM_KEY = ""  # a file whose first line is Dovecot's doveadm_api_key
QUOTA_ALLOW = ""  # addresses and networks that may ask: 192.0.2.25 2001:db8::/32; empty: all
QUOTA_GRACE = "auto"  # what Quota-Grace says: 1M, 10%; auto: as the keeper
QUOTA_UNKNOWN = "off"  # 1: a mailbox that does not exist is UNKNOWN rather than OK with 0 bytes

DOVEADM_SECONDS = 30  # for each read; longer than a milter waits, as --serve keeps the answer
DOVEADM_LENGTH = 65536  # bytes of its answer
TOO_LONG = 5120  # bytes; the servers rebuild a maildirsize that has grown to this
TRUSTED_AGE = 15 * 60  # seconds for which a maildirsize of one entry is believed if it says "over"
SAME_TIME = 60  # seconds; the files that one delivery writes have times no further apart
NEVER = float("-inf")  # the time of a file that is missing
NO_LIMITS = 0, 0
DOVECOTS_FILES = b"dovecot", b"maildirsize", b"subscriptions"  # their names begin so
LONGEST_NUMBER = 20  # digits; a longer one does not fit the servers' 64 bits
DIGITS = b"0123456789"


def measure(question: Question) -> None:
    """Measure the mailbox of a user. Raises NoSuchUser, Problem, OSError."""
    if question.setting("QUOTA_DOVEADM"):
        ask_dovecot(question)
        return
    named = question.setting("QUOTA_KEEPER", b"auto", *KEEPERS)
    trash = question.setting("QUOTA_TRASH", b"auto", b"count", b"skip")
    listed, default = question.listed_limit(), question.setting("QUOTA_LIMIT")
    # Each is bytes and messages, or None where no limit is given. A given (0, 0) is true to `or`.
    from_users = None if listed is None else (listed, 0)
    from_setting = (parse_limit("QUOTA_LIMIT", default), 0) if default else None
    question.quota = (from_users or from_setting or NO_LIMITS)[0]
    path = control = question.path("QUOTA_MAILDIR")
    if question.setting("QUOTA_CONTROL"):
        control = question.path("QUOTA_CONTROL")
    if modified(path) == NEVER:  # no mail has come yet
        return

    text, written_at = (b"", NEVER) if named == b"dovecot-count" else read_maildirsize(control)
    keeper = KEEPERS.get(named) or find_keeper(path, control, written_at)
    header, _ = keeper.split_lines(text)
    from_file = (keeper.limit(header, b"S"), keeper.limit(header, b"C")) if text else None
    if keeper.has_sum:
        limits: Optional[Amount] = from_users or from_file or from_setting or NO_LIMITS
    else:  # an earlier driver has left the file behind: its limits are better than none
        limits = from_users or from_setting or from_file
    if limits is None:
        raise Problem("only Dovecot knows the limit: set QUOTA_DOVEADM or QUOTA_LIMIT")

    folders = find_folders(path, keeper.follows_links)
    question.changed = last_change(folders)
    total = believed_sum(text, written_at, keeper, limits)
    if total is None:
        total = count(folders, keeper, trash)
        if is_over(total, limits):  # only because messages were renamed meanwhile?
            total = count(folders, keeper, trash, once=True)
    question.status = b"OVERQUOTA" if is_over(total, limits) else b"OK"
    question.used, question.quota = total[0], limits[0]
    question.auto_grace = keeper.grace


def is_over(total: Amount, limits: Amount, slack: int = 0) -> bool:
    """Say whether bytes or messages have reached a limit + `slack`."""
    return any(0 < limit <= have - slack for have, limit in zip(total, limits))


# ---- who keeps a Maildir ----


class Courier:
    """The rule of Courier's deliverquota, which maildrop, Exim and Postfix' VDA share."""

    has_sum = True  # it keeps `maildirsize` up to date
    slack = 0  # a sum that may be old is not believed if it reaches a limit + this
    follows_links = False  # whether a symbolic link to a folder is a folder
    counts_trash = False  # trash: the folder .Trash and messages with the flag T
    hidden = b"."  # files whose names begin so are not messages
    size_field = b",S="  # where in its name a message's size is
    grace = b"0"  # what QUOTA_GRACE=auto is

    def split_lines(self, text: bytes) -> tuple[bytes, list[bytes]]:
        """Split `maildirsize` into its first line and the others."""
        header, *entries = text.split(b"\n")
        # A last line that is no entry is empty, or somebody is still writing it.
        if add_up(entries[-1:]) is None:
            entries.pop()
        return header, entries

    def limit(self, header: bytes, letter: bytes) -> int:
        """Read a limit in the first line of `maildirsize`: the digits before the last S or C."""
        before = header.rpartition(letter)[0]
        digits = before[len(before.rstrip(DIGITS)) :]  # those at its end
        return int(digits) if 0 < len(digits) <= LONGEST_NUMBER else 0


class Dovecot(Courier):
    """The rule of Dovecot's `maildir` quota driver."""

    slack = 1  # it believes a sum that is exactly at the limit
    follows_links = True
    counts_trash = True
    hidden = b".."  # this driver counts names with one dot, too
    grace = b"10%"

    def split_lines(self, text: bytes) -> tuple[bytes, list[bytes]]:
        """Split `maildirsize`, without an unfinished last line."""
        # Of an unfinished first line nothing is left: add_up() refuses the entry in its place.
        header, *entries = text.split(b"\n")[:-1] or (b"", b"unfinished")
        return header, entries

    def limit(self, header: bytes, letter: bytes) -> int:
        """Read a limit in the first line: the last item of digits and that letter that is not 0."""
        limit = 0
        for item in header.split(b","):
            digits = item[:-1]
            if item[-1:] == letter and digits.isdigit() and len(digits) <= LONGEST_NUMBER:
                limit = int(digits) or limit
        return limit


class Count(Dovecot):
    """The rule of Dovecot's `count` quota driver, whose limits only Dovecot knows."""

    has_sum = False
    hidden = b"."
    size_field = b",W="  # the virtual size, with line ends of CR LF


KEEPERS = {b"courier": Courier(), b"dovecot": Dovecot(), b"dovecot-count": Count()}


def find_keeper(path: bytes, control: bytes, written_at: float) -> Courier:
    """Tell by its files which server keeps a Maildir. Raises OSError.

    Only Dovecot writes `dovecot-uidlist`. Its maildir driver adds to `maildirsize` at each
    delivery, its count driver never does. So a `maildirsize` that is older than the mail was left
    behind by an earlier driver. It is older if `dovecot-uidlist` was written later, and some
    message was delivered later: its name begins with that time. One of the two is not enough, as
    reading changes `dovecot-uidlist`, too, and other programs deliver without Dovecot.
    """
    names = b"/dovecot-uidlist", b"/.INBOX/dovecot-uidlist"
    uidlist = max(modified(control + name) for name in names)
    if uidlist == NEVER and control == path:  # only Dovecot has a QUOTA_CONTROL
        return KEEPERS[b"courier"]
    if written_at == NEVER:
        return KEEPERS[b"dovecot-count"]
    # A name may begin with a number that is no time, such as one in the future.
    start, end = written_at + SAME_TIME, time.time() + SAME_TIME
    if uidlist > start:
        for entry in list_messages(find_folders(path, follows_links=True)):
            digits = entry.name.partition(b".")[0]
            if digits.isdigit() and start < int(digits) < end:
                return KEEPERS[b"dovecot-count"]
    return KEEPERS[b"dovecot"]


def modified(path: bytes) -> float:
    """Return when a file was last written, NEVER where there is none. Raises OSError."""
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return NEVER


# ---- maildirsize ----


def read_maildirsize(control: bytes) -> tuple[bytes, float]:
    """Read the beginning of `maildirsize`, and when it was written. Raises OSError.

    Where the file is missing the text is empty, and the time is NEVER. The same goes for a file
    whose first line has a NUL byte, as after a crash.
    """
    path = control + b"/maildirsize"
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):  # a device is better not opened
            text = read_file(path, TOO_LONG)
            if b"\0" not in text.partition(b"\n")[0]:
                return text, status.st_mtime
    except FileNotFoundError:
        pass
    return b"", NEVER


def believed_sum(
    text: bytes, written_at: float, keeper: Courier, limits: Amount
) -> Optional[Amount]:
    """Return the sum in `maildirsize`; None if the server would count the messages instead."""
    if not keeper.has_sum or not 0 < len(text) < TOO_LONG or b"\0" in text:
        return None
    _, entries = keeper.split_lines(text)
    total = add_up(entries)
    if total is None or min(total) < 0:
        return None
    # With a single entry the server has just counted. Later that is not certain: some programs
    # remove mail without a new entry.
    may_be_old = len(entries) > 1 or written_at + TRUSTED_AGE < time.time()
    return None if may_be_old and is_over(total, limits, keeper.slack) else total


def add_up(entries: list[bytes]) -> Optional[Amount]:
    """Add up lines of `bytes messages`, whatever follows; None where one is something else."""
    size = messages = 0
    try:
        for line in entries:
            first, second, *_ = line.replace(b"_", b"x").split()  # int() would accept 1_000
            size, messages = size + int(first), messages + int(second)
    except ValueError:
        return None
    return size, messages


# ---- messages ----


def find_folders(path: bytes, follows_links: bool) -> list[bytes]:
    """List the paths of a Maildir and of its folders. Raises OSError."""
    folders = [path]
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name[:1] == b"." and entry.is_dir(follow_symlinks=follows_links):
                folders.append(entry.path)
    return folders


def last_change(folders: list[bytes]) -> float:
    """Return when a message was last delivered, read or removed, in seconds since the epoch.

    Each of these changes the folder `new` or `cur`. The time of `maildirsize` is not used: a
    refused delivery may write that file again.

    Raises OSError, and Problem if the first folder is no Maildir: it has neither of the two. Before
    the first mail Dovecot may have made some files there, but no folders.
    """
    times = [modified(folder + part) for folder in folders for part in (b"/new", b"/cur")]
    if max(times[:2]) == NEVER:
        names = os.listdir(folders[0])
        if not names or not all(name.startswith(DOVECOTS_FILES) for name in names):
            raise Problem("QUOTA_MAILDIR is no Maildir: it has neither cur nor new", folders[0])
    return max(times)


def list_messages(folders: list[bytes]) -> Iterator[os.DirEntry[bytes]]:
    """List the files in `new` and `cur` of folders. Raises OSError.

    `new` is first: a message that is moved to `cur` meanwhile is seen twice rather than never.
    """
    for folder in folders:
        for part in b"/new", b"/cur":
            try:
                entries = os.scandir(folder + part)
            except FileNotFoundError:
                continue
            with entries:
                yield from entries


def count(folders: list[bytes], keeper: Courier, trash: bytes, once: bool = False) -> Amount:
    """Count the messages in folders, trash as QUOTA_TRASH says. Raises OSError.

    Trash is the folder .Trash and, in Courier, messages with the flag T. A message that vanishes
    meanwhile is left out; one that cannot be read is an error.

    A message that is renamed meanwhile (moved to `cur`, marked as read) may be seen under both its
    names, which differ in the flags. `once` counts it once, and takes more time and memory: of two
    such names the former must still be there, else they are one message.
    """
    skip_trash = trash == b"skip" or (trash == b"auto" and not keeper.counts_trash)
    skip_flagged = skip_trash and not keeper.counts_trash  # Dovecot knows only the folder
    size = messages = 0
    for folder in folders:
        if skip_trash and folder == os.path.join(folders[0], b".Trash"):
            continue
        seen: dict[bytes, bytes] = {}  # paths of messages, by their names without flags
        for entry in list_messages([folder]):
            name, _, flags = entry.name.partition(b":2,")
            is_trash = skip_flagged and b"T" in flags
            if name.startswith(keeper.hidden) or is_trash:
                continue
            if name in seen and not os.path.exists(seen[name]):
                continue
            try:
                size += size_of(entry, keeper.size_field)
            except FileNotFoundError:
                continue
            messages += 1
            if once:
                seen[name] = entry.path
    return size, messages


def size_of(entry: os.DirEntry[bytes], field: bytes) -> int:
    """Return a message's size in bytes: as its name says, else the file's. Raises OSError."""
    _, given, rest = entry.name.partition(field)
    digits = rest.partition(b":")[0].partition(b",")[0]
    # A field without digits is 0 to the servers; but Dovecot ignores `,W=` at the end of a name.
    if given and not digits.lstrip(DIGITS) and (rest or field == b",S="):
        return int(digits or b"0")
    return entry.stat().st_size


# ---- Dovecot asked itself ----

logged_once: set[str] = set()  # warnings


def ask_dovecot(question: Question) -> None:
    """Ask Dovecot for a user's quota. Raises NoSuchUser, Problem."""
    import json  # here and below: at the top, imports would make the start of all CGIs longer

    address = question.user + (b"@" + question.domain if question.domain else b"")
    name = address.decode(errors="replace")
    # Dovecot takes a name with * or ? for a pattern, and opens all mailboxes that match. It has no
    # users whose names are not UTF-8: decode() has put U+FFFD there.
    if any(letter in name for letter in "*?\ufffd"):
        raise NoSuchUser
    text = post_to_doveadm(json.dumps([["quotaGet", {"user": name}, "q"]]), question)
    try:
        [[kind, result, _]] = json.loads(text)
        if kind == "error" and result["exitCode"] == 67:  # EX_NOUSER
            raise NoSuchUser
        if kind != "doveadmResponse":
            raise Problem("Dovecot failed: has it the plugin quota? See its log, too", text[:200])
        question.status, figures = b"OK", []
        for row in result:
            value = int(row["value"])
            limit = 0 if row["limit"] == "-" else int(row["limit"])
            if value < 0 or limit < 0:
                raise ValueError
            if 0 < limit <= value:
                question.status = b"OVERQUOTA"
            if row["type"] == "STORAGE":  # in kilobytes
                room = limit - value if limit else float("inf")
                figures.append((room, value << 10, limit << 10))
        # Of several quota roots the one with the least room counts.
        _, question.used, question.quota = min(figures)
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
        raise Problem("Dovecot's answer has no quota of bytes", text[:200]) from None
    question.auto_grace = b"10%"


def post_to_doveadm(query: str, question: Question) -> bytes:
    """Return what Dovecot's doveadm service answers to a query. Raises Problem, OSError."""
    import base64
    import http.client

    url = question.setting("QUOTA_DOVEADM").decode("latin-1")
    host = url.removeprefix("http://").removesuffix("/doveadm/v1")
    if not host or url != f"http://{host}/doveadm/v1":
        why = "QUOTA_DOVEADM is not like http://127.0.0.1:8080/doveadm/v1: no https, no other path"
        raise Problem(why)
    key = question.contents("QUOTA_DOVEADM_KEY").partition(b"\n")[0].strip()
    warning = "every user of this system may read the file QUOTA_DOVEADM_KEY"
    mode = os.stat(question.setting("QUOTA_DOVEADM_KEY")).st_mode
    if mode & stat.S_IROTH and warning not in logged_once:
        logged_once.add(warning)
        log(warning)
    credentials = "X-Dovecot-API " + base64.b64encode(key).decode()
    fields = {"Authorization": credentials, "Content-Type": "application/json"}
    try:
        connection = http.client.HTTPConnection(host, timeout=DOVEADM_SECONDS)
        # With `Connection: close` Dovecot would answer nothing at all to a wrong key.
        connection.request("POST", "/doveadm/v1", query, fields)
        response = connection.getresponse()
        text = response.read(DOVEADM_LENGTH)
        connection.close()
    except Exception as error:  # those of http.client and of sockets have nothing in common
        raise Problem("Dovecot cannot be asked: see QUOTA_DOVEADM", repr(error)) from None
    if response.status != 200:
        hint = ": the key in QUOTA_DOVEADM_KEY is wrong" if response.status == 401 else ""
        raise Problem(f"Dovecot answers with status {response.status}{hint}", text[:200])
    return text


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
