"""Tests with real servers: web and mail servers, databases, and those that keep Maildirs.

    /usr/bin/python3 -m pytest .ci/test_servers.py

As root, with the packages that .ci/run installs. Every server is an instance of its own
(servers.py). A test whose part is missing skips; with CI in the environment it fails. What needs no
server is in test_quota.py.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import imaplib
import os
import pathlib
import pwd
import random
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional, Union

import pytest
from servers import (
    BURST_FITS,
    FRONTEND,
    HERE,
    LIBRARY,
    MAIL_UID,
    MAILDIR_CGI,
    MBOX_CGI,
    MILTER,
    PYTHON,
    README,
    ROOM,
    STRANGER,
    Apache,
    ApacheTLS,
    ApacheWSGI,
    Backend,
    Database,
    Dovecot,
    Exim,
    Gunicorn,
    Lighttpd,
    MariaDB,
    Milter,
    Nginx,
    Postfix,
    PostgreSQL,
    Rsyslog,
    Sendmail,
    Serve,
    Server,
    SQLite,
    TwoRows,
    Uwsgi,
    answers_at,
    as_user,
    by_milter,
    command_of,
    dovecot_is_old,
    free_port,
    missing,
    need,
    open_folder,
    own,
    quota_exceeded,
    readme_block,
    run_commands,
    send,
    wait_for,
)

from test_quota import FULL, UIDLIST, Response, make_maildir, run_milter, state_of
from test_quota import ask as ask_script

NO_CACHE = "--cache-ttl", "0", "--in-flight", "0"


@pytest.fixture
def folder():
    """Give a temporary folder in which every user may search."""
    with open_folder() as path:
        yield path


def too_large(address: str) -> str:
    """Return the milter's reply for a message that the whole quota cannot hold."""
    return f"552 5.2.3 Message is larger than the quota of {address}"


# ---- Web servers ----

RULED: list[Any] = [Apache, ApacheWSGI, Lighttpd, Nginx]  # these look who asks
SERVERS: list[Any] = [*RULED, Uwsgi, Gunicorn, Serve]


@pytest.fixture(params=SERVERS, ids=lambda server: server.__name__)
def site(request):
    """Give a backend under each web server."""
    with request.param() as running:
        yield running


QUERIES = (
    ("u=john&d=example.com", f"200 OVERQUOTA john {ROOM + 1} {ROOM}"),
    ("u=mary", f"200 OK mary {ROOM - 1000} {ROOM}"),
    ("d=example.com&u=a+b%25c", f"200 OK a b%c 7 {ROOM}"),
    ("u=..%2Fjohn", "400 ERROR no mailbox has such a user"),
    ("", "400 ERROR no user (u=) given"),
    ("--serve", "400 ERROR no user (u=) given"),
    ("mary", "400 ERROR no user (u=) given"),
    ("--serve+9", "400 ERROR no user (u=) given"),
)


def test_the_script_and_the_milter_get_along_under_every_web_server(site):
    site.fill("a b%c", 7)
    for query, answer in QUERIES:
        assert site.ask(query) == answer, query
    (site.spool / os.fsdecode(b"\xff")).write_bytes(b"x")
    by_itself = isinstance(site, Lighttpd)  # it refuses such a name before the script sees it
    assert site.ask("u=a%0Ab").startswith("400 ")
    assert site.ask("u=%FF").startswith("400 <" if by_itself else f"200 OK \udcff 1 {ROOM}")
    assert site.ask("u=john", "--data", "") == "405 ERROR only GET and HEAD are answered"
    assert "200" in site.ask("u=john", "--head").split()
    with Milter("--backend", site.url) as milter:
        assert milter.rcpt("<john@example.com>") == quota_exceeded("john@example.com")
        assert milter.rcpt("<mary@example.com>", "SIZE=1000") == ""
        assert milter.rcpt("<mary@example.com>", "SIZE=1001") == quota_exceeded("mary@example.com")
        os.unlink(site.spool / "mary")
        (site.spool / "mary").mkdir()
        assert site.ask("u=mary") == "500 ERROR the mailbox is not a file"


SIBLINGS = """/cgi-bin/maildir_quota.cgi /cgi-bin/quota.cgi/../maildir_quota.cgi
/cgi-bin/quota.cgi/%2e%2e/maildir_quota.cgi /cgi-bin/quota.cgi%2F..%2Fmaildir_quota.cgi
/lib/quota.cgi""".split()
SPELLINGS = (
    """/cgi-bin/quota.cgi /quota //cgi-bin/quota.cgi /cgi-bin//quota.cgi /cgi-bin/./quota.cgi
/cgi-bin/%2e/quota.cgi /cgi-bin/x/../quota.cgi /cgi-bin/x/%2E%2e/quota.cgi /cgi-bin%2Fquota.cgi
/cgi-bin/quota.cgi/ /cgi-bin/quota.cgi/x /cgi-bin/quota.cgi//x /cgi-bin/quota.cgi%2Fx
/cgi-bin/quota.cgi;x /cgi-bin/quota.cgix /cgi-bin/quota%2Ecgi /cgi-bin/%71uota.cgi
/CGI-BIN/QUOTA.CGI /cgi-bin/quota.cgi%00 /cgi-bin/ /""".split()
    + SIBLINGS
)
FORGERIES = [  # header fields by which an address may be claimed
    *(f"{name}: {FRONTEND}" for name in ("X-Forwarded-For", "X-Real-IP", "Remote-Addr")),
    *(f"Forwarded: for={FRONTEND}", "QUOTA-ALLOW: 0.0.0.0/0", "Host: localhost"),
]
# What a block is without one of its two rules: the other one must do.
RULES = {
    "both": [],
    "web server": [(r'\n *(SetEnv|fastcgi_param) QUOTA_ALLOW.*|, "QUOTA_ALLOW" => "[^"]*"', "")],
    "QUOTA_ALLOW": [
        (r"Require ip .*", "Require all granted"),
        (r"\n *(url\.access-deny.*|deny all;)", ""),
    ],
}
GUARDED = [(server, rule) for server in RULED for rule in RULES]
GUARDED += [(server, "both") for server in SERVERS if server not in RULED]


def tells(answer: str) -> bool:
    """Say whether an answer tells anything of a mailbox."""
    return str(ROOM) in answer or " john " in answer


@pytest.mark.parametrize(("server", "rule"), GUARDED)
def test_a_stranger_gets_no_answer_at_any_url(server, rule):
    site = server()
    site.edits = RULES[rule]
    with site:
        assert site.ask("u=john").startswith("200 OVERQUOTA")  # it is there to be had
        copies = [p for p in site.folder.glob("*/*-available/*quota*") if p.is_file()]
        assert all(("QUOTA_ALLOW" in p.read_text()) == (rule != "web server") for p in copies)
        stranger = ["--interface", STRANGER]
        top = f"http://127.0.0.1:{site.port}"
        for path in SPELLINGS:
            for query in "?u=john", "?u=root", "":
                got = site.fetch(top + path + query, *stranger)
                assert not tells(got) and (got[0] in "45" or path == "/"), (path, query, got)
        for header in FORGERIES:
            got = site.ask("u=john", *stranger, "-H", header)
            assert got[0] == "4" and not tells(got), (header, got)
        for method in "HEAD", "POST", "OPTIONS":
            assert not tells(site.ask("u=john", *stranger, "-X", method, "-m", "2")), method
        if server in RULED:
            for path in SIBLINGS:  # the script beside it answers nobody
                assert str(ROOM) not in site.fetch(f"{top}{path}?u=root"), path
            for path in SPELLINGS:  # Debian's own site, on another port, has none of them
                other = f"http://127.0.0.1:{site.other_port}{path}?u=john"
                assert not tells(site.fetch(other, "-m", "2")), path


OTHER_SITE = "\n<VirtualHost *:{0}>\nScriptAlias /s/ {1}/\nAlias /files/ {1}/\n</VirtualHost>\n"


@pytest.mark.parametrize("server", [Apache, ApacheWSGI])
def test_the_rule_of_apache_holds_on_every_site_that_reaches_the_folder(server):
    site = server()
    site.edits = [(r"\Z", OTHER_SITE)]
    with site:
        named = ["--interface", STRANGER, "--resolve", f"x.org:{site.port}:127.0.0.1"]
        for path in "/s/quota.cgi", "/s/maildir_quota.cgi", "/files/quota.cgi", "/files/", "/s/":
            for host in "127.0.0.1", "x.org":
                got = site.fetch(f"http://{host}:{site.port}{path}?u=john", *named)
                assert got[:3] in ("403", "404"), (host, path, got)


# ---- What --check tells of usual mistakes ----


def told_by_check(url: str) -> str:
    """Return what --check prints about a mailbox of a backend: its status must be 2."""
    status, told, _ = run_milter("--backend", f"example.com={url}", "--check", "mary@example.com")
    assert status == 2, told
    return told


def test_a_usual_mistake_with_a_web_server_is_told_by_check():
    with Apache() as site:
        assert "status 404" in told_by_check(site.url.replace("quota.cgi", "qouta.cgi"))
        site.spool.chmod(0o700)
        denied = "status 500 ERROR cannot read the mailbox: Permission denied"
        assert denied in told_by_check(site.url)
        site.script.chmod(0o644)
        assert "status 500" in told_by_check(site.url)
        assert "no connection: [SSL" in told_by_check(site.url.replace("http:", "https:"))
        other = site.url.replace(str(site.port), str(free_port()))
        assert "Connection refused" in told_by_check(other)


# ---- Whose rights: README's table of mailboxes ----

OTHERS = (60001, 60002)  # users' ids that nobody has
MISSING_RIGHT = "500 ERROR cannot read the mailbox: Permission denied"


def fill_maildirs(top: pathlib.Path) -> None:
    """Make Maildirs of two users, which nobody else may read: john has no room, mary has."""
    for user, uid, size in ("john", OTHERS[0], ROOM), ("mary", OTHERS[1], ROOM - 1):
        make_maildir(top / user / "Maildir", {f"cur/1.M1P1.mx,S={size}:2,S": 0})
        own(top / user, uid, uid)


def test_mbox_files_of_other_users_need_no_right_but_to_search_their_folder():
    with Serve() as site:
        for user, uid in zip(("john", "mary"), OTHERS):
            os.chown(site.spool / user, uid, uid)
        assert site.ask("u=john").startswith("200 OVERQUOTA ")
        site.spool.chmod(0o700)
        assert site.ask("u=mary") == MISSING_RIGHT


def test_a_capability_lets_an_ordinary_user_read_the_maildirs_in_homes(folder):
    fill_maildirs(folder)
    settings = {"QUOTA_MAILDIR": f"{folder}/%n/Maildir", "QUOTA_LIMIT": "200M"}
    with Serve("Maildirs in homes", settings) as site:
        assert site.ask("u=john") == f"200 OVERQUOTA john {ROOM} {ROOM}"
        assert site.ask("u=mary") == f"200 OK mary {ROOM - 1} {ROOM}"
        status = pathlib.Path(f"/proc/{site.process.popen.pid}/status").read_text()
        assert re.search(r"^CapEff:\s0*4$", status, re.M), status  # CAP_DAC_READ_SEARCH alone
        assert "\nUid:\t0" not in status
    with Serve("Maildirs of one user", settings) as site:  # without it
        assert site.ask("u=john&d=example.com") == MISSING_RIGHT
        for user, uid in zip(("john", "mary"), OTHERS):  # a group that may read is enough
            own(folder / user, uid, pwd.getpwnam("www-data").pw_gid, 0o640)
        assert site.ask("u=john") == f"200 OVERQUOTA john {ROOM} {ROOM}"
        own(folder / "mary/Maildir/cur", OTHERS[1], OTHERS[1])
        assert site.ask("u=mary") == MISSING_RIGHT


def test_the_owner_of_all_maildirs_reads_them_by_domain_and_user(folder):
    daemon = pwd.getpwnam("daemon").pw_uid
    for domain, size in ("example.com", ROOM), ("example.org", ROOM - 1):
        make_maildir(folder / domain / "john", {f"cur/1.M1P1.mx,S={size}:2,S": 0})
        own(folder / domain, daemon, daemon)
    settings = {"QUOTA_MAILDIR": f"{folder}/%d/%n", "QUOTA_LIMIT": "200M"}
    with Serve("Maildirs of one user", settings, user="daemon") as site:
        assert site.ask("u=john&d=example.com") == f"200 OVERQUOTA john {ROOM} {ROOM}"
        assert site.ask("u=john&d=example.org") == f"200 OK john {ROOM - 1} {ROOM}"
        assert site.ask("u=john") == "400 ERROR no domain (d=) given"


# ---- Password and TLS ----

PASSWORD = ["-u", f"frontend:{ApacheTLS.password}"]
# Each lacks one thing of https, address and password, or comes by another way.
WITHOUT = {
    "the password": ("https", []),
    "the right password": ("https", ["-u", "frontend:secret"]),
    "the right user": ("https", ["-u", f"root:{ApacheTLS.password}"]),
    "the right address": ("https", [*PASSWORD, "--interface", STRANGER]),
    "https": ("http", PASSWORD),
    "https, and another name": ("http", [*PASSWORD, "-H", "Host: mail1.example.com"]),
}


def test_who_lacks_https_or_the_address_or_the_password_gets_no_answer_at_any_url():
    with ApacheTLS() as site:
        strict = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_ip"]
        strict += ["127.0.0.1", "-CAfile", str(site.certificate), str(site.certificate)]
        assert subprocess.run(strict).returncode == 0  # as Python 3.13 does
        keys = list(site.certificate.parent.glob("*.key"))
        assert keys and all(key.stat().st_mode & 0o077 == 0 for key in keys)
        trust = ["--cacert", str(site.certificate)]
        assert site.ask("u=john", *trust, *PASSWORD) == f"200 OVERQUOTA john {ROOM + 1} {ROOM}"
        ports = {"https": site.port, "http": site.other_port}
        for lack, (scheme, options) in WITHOUT.items():
            for path in SPELLINGS:
                url = f"{scheme}://127.0.0.1:{ports[scheme]}{path}?u=john"
                got = site.fetch(url, *trust, *options)
                assert not tells(got) and (got[0] in "45" or path == "/"), (lack, path, got)
        plain = site.fetch(f"http://127.0.0.1:{site.port}/quota?u=john", *PASSWORD)
        assert plain.startswith("400 "), plain


def test_the_milter_asks_over_https_with_a_password_and_a_certificate(folder):
    name = "/etc/quota_milter.conf, with a password and a certificate"
    url, cafile = "https://frontend:secret@mail1.example.com/quota", "/etc/ssl/quota/mail1.pem"
    with ApacheTLS() as site:
        for password, certificate, host, told in (
            ("s%3Acret%23%25", site.certificate, "127.0.0.1", ""),
            ("wrong", site.certificate, "127.0.0.1", "status 401"),
            ("s%3Acret%23%25", site.certificate, "localhost", "certificate verify failed"),
            ("s%3Acret%23%25", "/etc/ssl/certs/ca-certificates.crt", "127.0.0.1", "verify failed"),
        ):
            if not os.path.exists(certificate):
                continue
            asked = site.url.replace("//127.0.0.1", f"//frontend:{password}@{host}")
            file = folder / "quota_milter.conf"
            file.write_text(readme_block(name, {url: asked, cafile: certificate}))
            with Milter(f"@{file}", "--verbose") as milter:
                full = "" if told else quota_exceeded("john@example.com")
                assert milter.rcpt("<john@example.com>") == full, told
                assert told in milter.log("verdict=fault" if told else "used=209715201")
                assert milter.rcpt("<mary@example.com>") == ""
                assert not re.search("cret|wrong", milter.process.output())


# ---- Mail servers ----

LISTEN = "unix:/var/spool/postfix/quota/milter.sock"  # README's socket
LOCAL_URL = "http://192.0.2.10:8025/"  # README's backend
UMASK = ["sh", "-c", 'umask 007; exec "$@"', "sh"]  # as the unit does


class Front(NamedTuple):
    """A mail server with README's lines, and where the milter is to listen, as which user."""

    server: Union[Postfix, Sendmail]
    listen: str
    wrapper: Sequence[str] = ()

    def milter(
        self, folder: pathlib.Path, url: str, *options: str, domains: str = "example.com"
    ) -> Milter:
        """Return the milter of README's file of options, to be started."""
        unused = {"--dry-run\n": "", "--syslog\n": "", "--metrics /run": f"--metrics {folder}"}
        own_names = {LISTEN: self.listen, LOCAL_URL: url, "example.com,": f"{domains},", **unused}
        file = folder / "quota_milter.conf"
        file.write_text(readme_block("/etc/quota_milter.conf", own_names))
        (folder / "quota-milter").mkdir(exist_ok=True)
        found = re.search(r"inet:(\d+)@", self.listen)
        port = int(found[1]) if found else 0
        return Milter(f"@{file}", *options, port=port, listen=self.listen, wrapper=self.wrapper)


def milter_elsewhere(port: int) -> str:
    """Return README's lines of main.cf, with the one for a milter at a port in use."""
    own_names = {
        "\nsmtpd_milters": "\n#smtpd_milters",
        "\n#smtpd_milters = { inet": "\nsmtpd_milters = { inet",
        "192.0.2.25:8894": f"127.0.0.1:{port}",
    }
    return readme_block("/etc/postfix/main.cf", own_names)


@contextlib.contextmanager
def postfix_and_a_port(main_cf: str = "", services: Optional[Mapping[str, str]] = None):
    """Give Postfix, which finds the milter at a port."""
    port = free_port()
    with Postfix(milter_elsewhere(port) + main_cf, services) as postfix:
        yield Front(postfix, f"inet:{port}@127.0.0.1")


@contextlib.contextmanager
def postfix_and_a_socket():
    """Give Postfix, which finds the milter at a socket in its chroot, made as README says."""
    with Postfix(readme_block("/etc/postfix/main.cf")) as postfix:
        spool, file = postfix.folder / "spool", postfix.folder / "quota_milter.conf"
        file.touch()
        names = {"/etc/quota_milter.conf": str(file), "quota-milter": "daemon"}
        names["/var/spool/postfix"] = str(spool)
        run_commands(readme_block("Frontend: start", names))
        yield Front(postfix, f"unix:{spool}/quota/milter.sock", [*UMASK, *as_user("daemon")])


@contextlib.contextmanager
def sendmail_and_a_socket(virtual: Optional[Mapping[str, str]] = None, lines: str = ""):
    """Give Sendmail, with more lines, which finds the milter at a socket below /run."""
    with open_folder("/run") as run:
        shutil.chown(run, "daemon", "daemon")
        block = readme_block("/etc/mail/sendmail.mc", {"/run/quota-milter": run})
        with Sendmail(block + lines, virtual) as sendmail:
            yield Front(sendmail, f"unix:{run}/milter.sock", [*UMASK, *as_user("daemon")])


STORY = (
    # (what happens before, recipients, SIZE=, replies: . accepted, F full, L larger than the quota)
    ("", "john mary nobody", 0, "F.."),
    ("", "mary nobody", 1000, ".."),
    ("", "john mary nobody", 1001, "FF."),
    ("", "john mary nobody", ROOM + 1, "LLL"),
    ("", "postmaster John+lists mary", 0, ".F."),
    ("john empties his mailbox", "john mary", 0, ".."),
    ("john has room for 1000 bytes", "john", 1000, "."),
    ("", "john", 1001, "F"),
    ("john's mailbox is removed", "john", 0, "."),
    ("john's mailbox is full again", "john mary", 0, "F."),
    ("the milter is stopped", "john mary", ROOM + 1, ".."),
    ("the milter is started", "john mary", 0, "F."),
    ("the backend is gone", "john mary jane", 0, "F.."),  # the last known answers
)
MAIL_SERVERS = [postfix_and_a_port, postfix_and_a_socket, sendmail_and_a_socket]


@pytest.mark.parametrize("front", MAIL_SERVERS)
def test_a_mail_server_tells_the_sender_what_the_milter_says(front, folder):
    reply = {".": lambda address: "", "F": quota_exceeded, "L": too_large}
    with front() as mta, Serve() as site, contextlib.ExitStack() as stack:
        port = mta.server.port
        assert send(port, "john@example.com") == [""], "there is no milter yet"
        milter = stack.enter_context(mta.milter(folder, site.url, *NO_CACHE))
        for event, users, size, marks in STORY:
            if event == "the milter is stopped":
                assert milter.process.stop() == 0
                assert not os.path.exists(mta.listen.partition(":")[2])
            elif event == "the milter is started":
                milter = stack.enter_context(mta.milter(folder, site.url, *NO_CACHE))
            elif event == "the backend is gone":
                site.process.stop()
            elif event == "john's mailbox is removed":
                os.unlink(site.spool / "john")
            elif event:
                sizes = {"empties": 0, "room": ROOM - 1000, "full": ROOM + 1}
                site.fill("john", next(n for word, n in sizes.items() if word in event))
            recipients = [f"{user}@example.com" for user in users.split()]
            expected = [reply[mark](address) for mark, address in zip(marks, recipients)]
            parameters = [f"SIZE={size}"] if size else []
            replies = send(port, *recipients, parameters=parameters)
            assert replies == expected, (event, users, size)
        path = pathlib.Path(mta.listen.partition("unix:")[2])
        if path.name:
            assert oct(path.stat().st_mode & 0o777) == "0o770"
            assert path.group() == ("postfix" if front is postfix_and_a_socket else "daemon")
            attempt = [PYTHON, "-c", f"import socket; socket.socket(1).connect({str(path)!r})"]
            refused = subprocess.run([*as_user("nobody", "nogroup"), *attempt], capture_output=True)
            assert b"PermissionError" in refused.stderr


@pytest.mark.parametrize("front", MAIL_SERVERS)
def test_the_end_of_the_data_and_the_log_tell_what_rcpt_could_not(front, folder):
    with front() as mta, Serve() as site, mta.milter(folder, site.url) as milter:
        full, long = quota_exceeded("mary@example.com"), lines_of(2000)
        assert send(mta.server.port, "mary@example.com", body=long) == ["", full]
        line = milter.log("step=data")
        assert " verdict=overquota " in line and " sender=sender@example.net" in line
        assert re.search(r' client="?[^ ]*( |\\x20)?\[127\.0\.0\.1\]', line), line
        assert re.search(r" queue=\w{6,}", line), line
        # One that fits into any of its mailboxes is accepted.
        both = "mary@example.com", "nobody@example.com"
        assert send(mta.server.port, *both, body=long) == ["", ""]
        assert send(mta.server.port, "nobody@example.com", "john@example.com")[1] != ""
        line = milter.log("recipient=john@")
        assert " step=rcpt " in line and re.search(r" client=.* queue=\w{6,}", line), line


def test_exim_defers_mail_for_a_full_mailbox_until_it_is_emptied(site):
    with Exim(site.port, site.url.partition(str(site.port))[2]) as exim:
        recipients = ["john@example.com", "mary@example.com", "John+lists@example.org"]
        full = [quota_exceeded("john@example.com"), "", quota_exceeded("john+lists@example.org")]
        assert exim.send(*recipients, "nobody@example.com") == [*full, ""]
        assert exim.send("postmaster@example.com") == [""]
        site.fill("john", 7)
        assert exim.send(*recipients) == ["", "", ""]


def test_exim_accepts_what_it_cannot_ask_about():
    def hang(connection: socket.socket) -> None:
        backend.ended.wait(60)

    page = b"HTTP/1.1 %s\r\nServer: x\r\n\r\n%sOVERQUOTA john 101 100\n"
    with Backend(FULL) as backend, Exim(backend.port, seconds=2) as exim:
        backend.answers = {
            b"room": b"OK OVERQUOTA 1 100\n",
            b"unknown": b"UNKNOWN unknown\n",
            b"error": page % (b"500 Internal Server Error", b""),
            b"moved": page % (b"302 Found", b""),
            b"page": page % (b"200 OK", b"<p>no such page</p>\n"),
            b"nothing": b"HTTP/1.1 200 OK\r\n\r\n",
            b"hanging": hang,
        }
        for user in backend.answers:
            assert exim.send(f"{user.decode()}@example.com") == [""], user
        asked = [f"{user.decode()}@example.com" for user in backend.answers]
        assert backend.mailboxes() == asked
        strange = ["Postmaster", "+x", "a=b", "j$h", "{john}", "x" * 65, '"a b"', "a~b", "-x"]
        assert exim.send(*(f"{user}@example.com" for user in strange)) == [""] * len(strange)
        refused = exim.send("john@example.net", "a%b@example.com", "../john@example.com")
        assert {reply[:4] for reply in refused} == {"550 "}, "by Exim itself"
        assert backend.mailboxes() == asked
        assert exim.send("john@example.com") == [quota_exceeded("john@example.com")]
        backend.close()
        assert exim.send("john@example.com") == [""]


# ---- Postfix: names, sessions, who is asked about ----

SPELLINGS_OF_JOHN = """john@example.com john john%example.com example.com!john (c)john@example.com
john(c)@example.com john%example.com@example.com example.com!john@example.com john@EXAMPLE.com.
@example.net:john@example.com "john"@example.com john+x%example.com""".split()
LOCAL_CF = """
myorigin = example.com
mydestination = example.com
relay_domains =
local_recipient_maps =
local_transport = discard:
recipient_delimiter = +
"""


def test_a_spelling_that_postfix_takes_for_the_mailbox_is_asked_about_as_that(folder):
    with Backend() as backend, postfix_and_a_port(LOCAL_CF) as mta:
        backend.answers[b"john"] = FULL
        with mta.milter(folder, backend.url):
            for spelling in [*SPELLINGS_OF_JOHN, "john @example.com"]:
                shown = spelling.replace("%", "?")
                assert send(mta.server.port, spelling) == [quota_exceeded(shown)], spelling
            assert send(mta.server.port, "mary%example.com") == [""]


IDN = "xn--exmple-cua.com"


@pytest.mark.parametrize("configured", [IDN, "exämple.com"])
def test_names_that_are_quoted_or_not_ascii_reach_the_backend(configured, folder):
    domains = f"relay_domains = example.com, example.org, exämple.com, {IDN}\n"
    with Backend() as backend, postfix_and_a_port(domains) as mta:
        for user in "a b", "jürgen", "john":
            backend.answers[user.encode()] = FULL
        with mta.milter(folder, backend.url, domains=f"{configured},example.com") as milter:
            names = '"a b"@example.com', "JüRGEN@example.com", "john@exämple.com", f"john@{IDN}"
            replies = [quota_exceeded(re.sub("[^ -~]", "?", name)) for name in names]
            found = send(mta.server.port, *names, parameters=["SMTPUTF8"])
            assert [re.sub(r"\?+", "?", reply) for reply in found] == replies
            assert "user=j\\xc3\\xbcrgen" in milter.log("RGEN")
        assert set(backend.mailboxes()[2:]) == {f"john@{IDN}"}


AUTHENTICATED = """
service auth {{
  inet_listener sasl {{
    {} = 127.0.0.1
    port = {}
  }}
}}
"""


def test_what_an_authenticated_client_sends_is_checked_only_where_that_is_wanted(folder):
    sasl = free_port()
    lines = AUTHENTICATED.format("address" if dovecot_is_old() else "listen", sasl)
    options = "-o smtpd_sasl_auth_enable=yes -o smtpd_sasl_type=dovecot"
    options += f" -o smtpd_sasl_path=inet:127.0.0.1:{sasl}"
    postfix, full = postfix_and_a_port("", {"mine": options}), [quota_exceeded("john@example.com")]
    with Dovecot(lines=lines), postfix as mta, Backend(FULL) as backend:
        port = mta.server.ports["mine"]
        with mta.milter(folder, backend.url, "--verbose") as milter:
            assert send(port, "john@example.com", login=True) == [""]
            assert "verdict=exempt" in milter.log("recipient=john@")
            assert backend.asked == []
            assert send(port, "john@example.com") == full
        with mta.milter(folder, backend.url, "--check-authenticated"):
            assert send(port, "john@example.com", login=True) == full


def test_what_readme_says_leaves_mail_out_does_so(folder):
    ways = {"one": "-o receive_override_options=no_milters", "other": "-o smtpd_milters="}
    assert all(way in " ".join(README.read_text().split()) for way in ways.values())
    (folder / "milters.cidr").write_text(f"{STRANGER}/32 DISABLE\n")
    postfix = postfix_and_a_port(f"smtpd_milter_maps = cidr:{folder}/milters.cidr\n", ways)
    with Backend(FULL) as backend, postfix as mta, mta.milter(folder, backend.url):
        port = mta.server.port
        assert send(port, "john@example.com") == [quota_exceeded("john@example.com")]
        assert send(port, "john@example.com", source=STRANGER) == [""]
        for way in ways:
            assert send(mta.server.ports[way], "john@example.com") == [""], way


def test_with_readmes_limits_many_full_mailboxes_in_one_message_hinder_no_other(folder):
    limits = re.findall(r"smtpd_\w+_error_limit = \d+", " ".join(README.read_text().split()))
    assert len(limits) == 2
    usual = "-o smtpd_soft_error_limit=20 -o smtpd_hard_error_limit=20"  # without the seconds
    full = [f"full{number}@example.com" for number in range(25)]
    postfix = postfix_and_a_port("\n".join(limits) + "\n", {"usual": usual})
    with postfix as mta, Backend() as backend:
        backend.answers = {address.partition("@")[0].encode(): FULL for address in full}
        with mta.milter(folder, backend.url):
            expected = [*map(quota_exceeded, full), ""]
            assert send(mta.server.port, *full, "john@example.com") == expected
            with pytest.raises(smtplib.SMTPServerDisconnected):
                send(mta.server.ports["usual"], *full, "john@example.com")


def test_postfix_accepts_mail_while_the_milter_hangs_and_a_session_outlives_it(folder):
    port, action = free_port(), "default_action=accept"
    quicker = milter_elsewhere(port).replace(action, f"{action}, command_timeout=8s")
    with Backend(FULL) as backend, Postfix(quicker) as postfix:
        front = Front(postfix, f"inet:{port}@127.0.0.1")
        full = [quota_exceeded("john@example.com")]
        with front.milter(folder, backend.url) as milter:
            assert send(postfix.port, "john@example.com") == full
            milter.process.popen.send_signal(signal.SIGSTOP)
            assert send(postfix.port, "john@example.com") == [""]
            milter.process.popen.send_signal(signal.SIGCONT)
            assert send(postfix.port, "john@example.com") == full
            with smtplib.SMTP("127.0.0.1", postfix.port, timeout=60) as client:
                client.ehlo("client.example.net")
                for expected in 452, 250:
                    assert client.mail("sender@example.net")[0] == 250
                    assert client.rcpt("john@example.com")[0] == expected
                    assert client.rset()[0] == 250
                    milter.process.stop()


def test_a_local_user_behind_a_virtual_address_of_sendmail_is_asked_about(folder):
    virtual = {"info": "daemon", "postmaster": "daemon", "": "bin", "far": "x@y.example"}
    with sendmail_and_a_socket(virtual) as mta, Backend() as backend:
        backend.answers[b"daemon"] = FULL
        with mta.milter(folder, backend.url, domains="virt.example"):
            names = [f"{user}@virt.example" for user in ("info", "info+x", "any", "far")]
            full = [quota_exceeded(name) for name in names[:2]]
            assert send(mta.server.port, *names) == [*full, "", ""]
            assert send(mta.server.port, "postmaster@virt.example") == [""]
            assert backend.mailboxes() == ["daemon@virt.example", "bin@virt.example"]


def test_what_readme_says_leaves_mail_out_of_sendmails_milters_does_so(folder):
    own = free_port()
    said = "DAEMON_OPTIONS(`Name=MSA, Port=587, M=E, InputMailFilters=')"
    assert said in README.read_text()
    lines = said.replace("Port=587", f"Addr=127.0.0.1, Port={own}") + "dnl\n"
    left_out = "define(`confINPUT_MAIL_FILTERS', `another')dnl\n"
    left_out += "MAIL_FILTER(`another', `S=inet:1@127.0.0.1')dnl\n"
    for more, replies in (lines, [quota_exceeded("john@example.com")]), (left_out, [""]):
        front = sendmail_and_a_socket(lines=more)
        with front as mta, Backend(FULL) as backend, mta.milter(folder, backend.url):
            assert send(mta.server.port, "john@example.com") == replies
            if more == lines:
                assert send(own, "john@example.com") == [""]


# ---- A backend whose first address swallows packets ----


@pytest.fixture
def twofold(folder):
    """Give a name with two addresses, the first of them, and a command that runs another one.

    `localhost` is such a name on most systems. Elsewhere this wants a mount namespace, with a file
    of its own over /etc/hosts.
    """
    found = [row[4][0] for row in socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)]
    if found == ["::1", "127.0.0.1"]:
        return "localhost", "::1", []
    hosts = "127.0.0.9 twofold.example\n127.0.0.1 twofold.example localhost\n"
    (folder / "hosts").write_text(hosts)
    command = f'mount --bind {folder}/hosts /etc/hosts && exec "$@"'
    wrapper = [need("unshare", "util-linux"), "--mount", "sh", "-c", command, "sh"]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        missing("localhost has one address, and mount namespaces are not allowed here")
    return "twofold.example", "127.0.0.9", wrapper


def test_an_address_that_swallows_packets_does_not_cost_the_verdict(twofold):
    name, address, wrapper = twofold
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(Backend(FULL))
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = stack.enter_context(socket.socket(family))
        listener.bind((address, backend.port))
        listener.listen(0)
        for _ in range(9):  # nobody accepts them: the queue is full, and packets are dropped
            client = stack.enter_context(socket.socket(family))
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        url = backend.url.replace("127.0.0.1", name)
        with Milter("--backend", url, "--timeout", "4", wrapper=wrapper) as milter:
            assert milter.rcpt("<john@example.com>") == quota_exceeded("john@example.com")


# ---- miltertest: a client of the milter protocol that others wrote ----

LUA = """
function check(good, what)
    if not good then
        mt.echo(what)
        error(what)
    end
end

function give(recipient, reply)
    check(mt.rcptto(conn, "<" .. recipient .. ">") == nil, "no reply for " .. recipient)
    check(mt.getreply(conn) == reply, recipient .. " got " .. mt.getreply(conn))
end

conn = mt.connect("inet:" .. port .. "@127.0.0.1")
check(conn ~= nil, "no connection")
check(mt.negotiate(conn, nil, nil, nil) == nil, "negotiation")
for _, step in pairs({SMFIP_NOCONNECT, SMFIP_NOHELO, SMFIP_NOHDRS, SMFIP_NOEOH,
                      SMFIP_NOUNKNOWN}) do
    check(mt.test_option(conn, step), "the milter wants to see more than it needs: " .. step)
end
check(mt.mailfrom(conn, "<sender@example.net>", "SIZE=1000") == nil, "mail")
give("john@example.com", SMFIR_REPLYCODE)
give("mary@example.com", SMFIR_CONTINUE)
check(mt.abort(conn) == nil, "abort")
check(mt.mailfrom(conn, "<>", "BODY=8BITMIME", "SIZE=1001") == nil, "second mail")
give("mary@example.com", SMFIR_REPLYCODE)
give("postmaster@example.com", SMFIR_CONTINUE)
give("nobody@example.com", SMFIR_CONTINUE)
check(mt.eom(conn) == nil, "eom")
check(mt.getreply(conn) == SMFIR_CONTINUE, "the message got " .. mt.getreply(conn))
mt.disconnect(conn)
mt.echo("all as expected")
"""


def test_miltertest_gets_the_replies_and_need_send_nothing_but_the_envelope(folder):
    (folder / "test.lua").write_text(LUA)
    with Serve() as site, Milter("--backend", site.url) as milter:
        program = [need("miltertest", "miltertest"), "-D", f"port={milter.port}"]
        done = subprocess.run([*program, "-s", folder / "test.lua"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "all as expected\n"), done


# ---- Tables as aliases ----

TABLE_DOMAINS = "example.com,example.org,all.org,moved.org,loop.org,pool.org"
TABLE_ROWS = {
    # Postfix's virtual(5): name, what it stands for
    "sales@example.com": "john@example.com",
    "sales+x@example.com": "mary@example.com",
    "support@example.com": "sales@example.org",
    "sales@example.org": "sales@example.com",
    "local": "john@example.com",
    "-": "john@example.com",
    "a#x@example.com": "john@example.com",
    "list@example.com": "john@example.com, mary@example.com",
    "prog@example.com": "|/bin/true",
    "out@example.com": "john@elsewhere.net",
    "loop1@example.com": "loop2@example.com",
    "loop2@example.com": "loop1@example.com",
    '"a b"@example.com': "john@example.com",
    "info@virtual.net": "john@example.com",
    "john@all.org": "john@all.org",
    "@all.org": "mary@example.com",
    "@moved.org": "@example.com",
    "@loop.org": "@pool.org",
    "@pool.org": "@loop.org",
}
# By the mailbox that is asked about (None: none) the recipients that lead to it, commas between.
TABLED = {
    "john@example.com": "sales@example.com,SALES@Example.COM,sales+y@example.com,-@example.com,"
    "support@example.com,local@example.com,local@example.org,local+x@example.org,"
    'a#x@example.com,"a b"@example.com,info@virtual.net,sales@moved.org',
    "mary@example.com": "sales+x@example.com,anybody@all.org",
    "john@all.org": "john@all.org",
    "paul@example.com": "paul@moved.org",
    "o'neill@example.com": "o'neill@example.com",
    None: "local@virtual.net,list@example.com,prog@example.com,out@example.com,"
    "loop1@example.com,loop2@example.com,x@loop.org,postmaster@all.org",
}
SQL_ROWS = [
    *TABLE_ROWS.items(),
    ("rows@example.com", "john@example.com"),
    ("rows@example.com", "mary@example.com"),
    ("empty@example.com", ""),
    ("away@example.com", "away@example.com,away#example.com@autoreply.example.net"),
    ("forger@example.com", "mary@example.com\nvictim@example.com\tjohn@example.com"),
    ("megabyte@example.com", "john@example.com," * 60_000),
]
DATABASES = {"sqlite": SQLite, "mysql": MariaDB, "pgsql": PostgreSQL}
PATTERNS = r"""
/^(.*)@moved\.org$/  $1@example.com
/^sales@example\.com$/  john@example.com
/^sales$/  mary@example.com
/^@all\.org$/  mary@example.com
/^two@/  john@example.com, mary@example.com
/^loop@/  loop@example.com
/^plus\+x@example\.com$/  mary@example.com
"""
PATTERNED = {
    "paul@example.com": "paul@moved.org",
    "john@example.com": "sales@example.com,Sales@example.com",
    "sales@example.com": "sales+x@example.com",
    "sales@example.org": "sales@example.org",
    "anybody@all.org": "anybody@all.org",
    None: "two@example.org",
    "loop@example.com": "loop@example.com",
    "mary@example.com": "plus+x@example.com",
    "plus@example.com": "plus+y@example.com",
}


def indexed_table(kind: str, file: pathlib.Path, rows: Mapping[str, str]) -> str:
    """Make a table as an administrator does, with postmap; return its TYPE:NAME."""
    if kind in ("lmdb", "pcre"):
        need(f"/usr/share/doc/postfix-{kind}", f"postfix-{kind}")
    file.write_text("".join(f"{name} {value}\n" for name, value in rows.items()))
    os.utime(file, (0, 0))  # postmap waits where a file has changed in the last second
    if kind != "texthash":
        subprocess.run([need("postmap", "postfix"), f"{kind}:{file}"], check=True)
    return f"{kind}:{file}"


class Aliased(Server):
    """A milter with tables, and a backend that calls every mailbox full."""

    def __init__(self, *tables: str, options: Sequence[str] = NO_CACHE) -> None:
        super().__init__()
        self.options = ["--timeout", "20", *options]
        for table in tables:
            self.options += ["--aliases", table]

    def launch(self) -> None:
        self.backend = self.enter_context(Backend(FULL))
        url = f"{TABLE_DOMAINS}={self.backend.url}"
        self.milter = self.enter_context(Milter("--backend", url, *self.options))

    def mailbox(self, recipient: str) -> Optional[str]:
        """Give a recipient; return the mailbox that was asked about, None where none was."""
        before = len(self.backend.asked)
        reply = self.milter.rcpt(f"<{recipient}>")
        asked = self.backend.mailboxes()[before:]
        assert reply == (quota_exceeded(recipient) if asked else ""), recipient
        assert len(asked) < 2, asked
        return asked[0] if asked else None

    def check(self, rows: Mapping[Optional[str], str]) -> None:
        """Give the recipients of a table: each must lead to its mailbox."""
        for mailbox, recipients in rows.items():
            for recipient in recipients.split(","):
                assert self.mailbox(recipient) == mailbox, recipient

    def is_alone(self) -> bool:
        """Say whether all processes that the milter has started are gone."""
        tasks = pathlib.Path(f"/proc/{self.milter.process.popen.pid}/task").glob("*/children")
        return not any(task.read_text().split() for task in tasks)


@pytest.mark.parametrize("kind", ["hash", "btree", "lmdb", "texthash", *DATABASES])
def test_every_kind_of_table_leads_to_the_mailbox(kind, folder):
    with contextlib.ExitStack() as stack:
        if kind in DATABASES:
            name = stack.enter_context(DATABASES[kind](SQL_ROWS)).name
        else:
            name = indexed_table(kind, folder / "my table", TABLE_ROWS)
        aliased = stack.enter_context(Aliased(name, options=[*NO_CACHE, "--on-error", "tempfail"]))
        aliased.check(TABLED)
        for raw, user in (
            (b"x\nsales@example.com", b"x\nsales"),
            (b"sales@example.com\nx@example.com", b"sales@example.com\nx"),
            (b"sales@example.com\tx@example.com", b"sales@example.com\tx"),
            (b"sales\r@example.com", b"sales\r"),
            (b"\xff\xfe@example.com", b"\xff\xfe"),
            (b"%s@example.com", b"%s"),
            (b"x' OR '1'='1@example.com", b"x' or '1'='1"),
            (b"\xff@all.org", b"mary"),
        ):  # hostile recipients reach no other name
            assert aliased.milter.rcpt(b"<%s>" % raw)[:10] == "452 4.2.2 ", raw
            assert Backend.user_of(aliased.backend.asked[-1]) == user
        if kind in DATABASES:  # what only a database answers
            assert aliased.mailbox("rows@example.com") is None
            assert aliased.mailbox("empty@example.com") == "empty@example.com"
            assert aliased.mailbox("away@example.com") == "away@example.com"
            before = len(aliased.backend.asked)
            for recipient in "forger@example.com", "megabyte@example.com":
                aliased.milter.rcpt(f"<{recipient}>")
            assert not {"john@example.com"} & set(aliased.backend.mailboxes()[before:])
            assert aliased.mailbox("victim@example.com") == "victim@example.com"
            assert aliased.mailbox("sales@example.com") == "john@example.com"
            status = pathlib.Path(f"/proc/{aliased.milter.process.popen.pid}/status").read_text()
            assert int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) < 100_000


@pytest.mark.parametrize("kind", ["pcre", "regexp"])
def test_a_table_of_patterns_is_asked_about_the_whole_address_alone(kind, folder):
    need("/usr/share/doc/postfix-pcre", "postfix-pcre")
    (folder / "my patterns").write_text(PATTERNS)
    with Aliased(f"{kind}:{folder}/my patterns") as aliased:
        aliased.check(PATTERNED)


def test_postfix_itself_leads_a_recipient_to_the_same_mailbox(folder):
    table = indexed_table("hash", folder / "table", TABLE_ROWS)
    main_cf = f"""
myorigin = example.com
mydestination = {TABLE_DOMAINS}
local_recipient_maps =
local_transport = discard:
recipient_delimiter = +
relay_domains =
virtual_alias_domains = virtual.net
virtual_alias_maps = {table}
smtpd_reject_unlisted_recipient = no
allow_min_user = yes
"""
    with Postfix(main_cf) as postfix:
        rows = [(x, box) for box, names in TABLED.items() if box for x in names.split(",")]
        for recipient, mailbox in rows:
            before = len(postfix.log())
            assert send(postfix.port, recipient) == [""]

            def delivered(before=before):
                return re.findall(r"discard.* to=<(.*?)>,.*status=sent", postfix.log()[before:])

            found = wait_for(delivered, f"the delivery of mail for {recipient}")
            assert [re.sub(r"\+[^@]*", "", name) for name in found] == [mailbox], recipient


FAULTY_TABLES = {
    "missing": "hash:{folder}/nonexistent",
    "of no type": "nosuchtype:{folder}/nonexistent",
    "failing": "fail:whatever",
    "sqlite away": "sqlite:{folder}/sqlite.cf",
    "mysql away": "mysql:{folder}/mysql.cf",
    "pgsql away": "pgsql:{folder}/pgsql.cf",
    "refusing": "tcp:127.0.0.1:{port}",
    "mysql hangs": "{mysql}",
    "pgsql hangs": "{pgsql}",
}


@pytest.mark.parametrize("kind", FAULTY_TABLES)
def test_a_table_that_cannot_be_asked_is_a_fault_of_the_recipient(kind, folder):
    (folder / "sqlite.cf").write_text(f"dbpath = {folder}/nonexistent\n{Database.query}")
    for name in "mysql", "pgsql":
        (folder / f"{name}.cf").write_text(f"hosts = unix:{folder}/nonexistent\n{Database.query}")
    options = "--timeout", "2", "--on-error", "tempfail"
    with contextlib.ExitStack() as stack:
        names = {}
        if "hangs" in kind:
            database = DATABASES[kind.split()[0]]
            sleep = "SLEEP" if database is MariaDB else "pg_sleep"
            hanging = database(SQL_ROWS[:1])
            hanging.query = f"query = SELECT {sleep}(600) FROM aliases\n"
            names[database.kind] = stack.enter_context(hanging).name
        table = FAULTY_TABLES[kind].format(folder=folder, port=free_port(), **names)
        aliased = stack.enter_context(Aliased(table, options=options))
        assert aliased.milter.rcpt("<john@example.com>")[:10] == "451 4.3.0 "
        line = aliased.milter.log("recipient=john@example.com")
        assert "verdict=fault" in line and re.search(r' reason="[^"]+"', line)
        assert aliased.milter.rcpt("<postmaster@example.com>") == ""
        wait_for(aliased.is_alone, "the end of postmap")
        assert aliased.backend.asked == []


def test_a_table_of_another_user_is_a_fault_and_its_group_may_read_it(folder):
    table = indexed_table("hash", folder / "table", {"sales@example.com": "john@example.com"})
    os.chmod(folder / "table.db", 0o640)
    shutil.chown(folder / "table.db", "root", "daemon")
    for group, reply in ("nogroup", "451 4.3.0 "), ("daemon", "452 4.2.2 "):
        with Backend(FULL) as backend:
            options = "--backend", backend.url, "--on-error", "tempfail", "--aliases", table
            with Milter(*options, wrapper=as_user("nobody", group)) as milter:
                assert milter.rcpt("<sales@example.com>")[:10] == reply


def test_a_table_that_comes_back_is_used_at_once_and_a_warning_is_no_fault(folder):
    patterns = folder / "patterns"
    patterns.write_text("/(/ broken\n" + PATTERNS)
    options = "--on-error", "tempfail", "--cache-ttl", "0"
    with Aliased(f"hash:{folder}/table", f"regexp:{patterns}", options=options) as aliased:
        assert aliased.milter.rcpt("<sales@example.com>")[:10] == "451 4.3.0 "
        indexed_table("hash", folder / "table", TABLE_ROWS)
        os.utime(folder / "table")  # postmap warns that the source is newer
        os.utime(folder / "table.db", (0, 0))
        assert aliased.mailbox("sales@example.com") == "john@example.com"
        assert aliased.mailbox("paul@moved.org") == "paul@example.com"


# ---- Maildirs: the servers that keep them as judges ----
#
# A judge is the real program: Dovecot's quota-status, asked whether one more byte would fit, and
# deliverquota, given a message of one byte. Both rewrite `maildirsize`, so the CGI is asked first,
# and what it leaves behind is compared with what there was. SEED makes others.

SEED = int(os.environ.get("SEED", "0"))
Files = dict[str, Any]  # by path, as make_maildir wants them


class Maildir(NamedTuple):
    """A Maildir to be made: files, `maildirsize` and its age in seconds."""

    files: Files
    maildirsize: Optional[bytes]
    age: int


def ask(user: str, settings: Mapping[str, object]) -> Response:
    """Ask maildir_quota.cgi about a user, NAME or NAME@DOMAIN."""
    query = urllib.parse.urlencode(dict(zip("ud", user.split("@"))))
    return ask_script(MAILDIR_CGI, query, **settings)


def room_of(user: str, settings: Mapping[str, object]) -> int:
    """Return the size of the largest message that fits, by what the CGI says."""
    answer = ask(user, settings)
    word, _, used, quota = answer.line.rsplit(" ", 3)
    grace = int(answer.header.get("Quota-Grace", 0))
    return 0 if word == "OVERQUOTA" else int(quota) + grace - int(used)


def deliverquota_refuses(path: pathlib.Path, *quota: str, message: bytes = b"\n") -> bool:
    """Deliver a message, of one byte unless given, and say whether deliverquota refused it."""
    program = need("deliverquota", "maildrop")
    done = subprocess.run([program, path, *quota], input=message, capture_output=True, timeout=60)
    assert done.returncode in (0, 77), done.stderr
    return done.returncode == 77


FLAGS = ["", *(f":2,{flags}" for flags in ["", *"DFPRST", "DFPRST", "RSTab"]), ":1,x"]
FOLDERS = (".Sent", ".Trash", ".Trash.old", ".Trashed", ".a.b.c.d.e.f", ".INBOX.x", ".Entw&APw-rfe")
# First lines of maildirsize, the usual ones more often.
HEADERS = [
    *(*5 * ["{S}S"], *6 * ["{S}S,{C}C"], *3 * ["{C}C,{S}S", "{C}C"], "NOQUOTA", "", "0S"),
    *("{S}S,0C", "{S}S,{S}S", "1S,{S}S", "{S}S,0S", "0{S}S", "{S}s", "{S}", "{S} S", " {S}S"),
    *("{S}S, {C}C", "{S}S {C}C", "{S}S{C}C", "+{S}S", "-{S}S", "{S}S,", ",,{S}S,,{C}C", "{S}SC"),
    *("{S}S\r", "{S}S,5B", "{S}K", "x{S}S", "{S}.5S"),
]
DOVECOTS_HEADERS = ["99999999999999999999999999S,{C}C"]  # in Courier its 64 bits overflow
ENTRIES = ("{b} {m}\n", "{b:12d} {m:12d}\n", "  {b}\t{m}  \n", "{b} {m} 7 x\n", "{b} {m}\r\n")
# What one judge reads as an entry and the other does not; a line that is none has us count, as
# Dovecot does, while Courier leaves it out of the sum.
DOVECOTS_ENTRIES = ("+{b} +{m}\n", "\n", "x\n", "{b}\n", "{b}, {m}\n", "1_0 1\n", "{b}x {m}\n")
LEFTOVERS: Files = {
    "tmp/1700000001.M1P1.mx": 4000,
    "cur/.hidden": 0,
    "cur/..hidden": 700,
    "cur/gone": "nowhere",
    "new/link,S=40": "/etc/hostname",
    "new/folder,S=30/": 0,
    ".plain": 600,
    ".empty/": 0,
    ".Sent/maildirfolder": 0,
    ".Sent/.nested/cur/1": 3000,
    "plain/cur/1": 3000,
    "courierimapsubscribed": 40,
    "dovecot.index.log": 40,
    "quotawarn": 1,
}


def random_name(rng: random.Random, dovecot: bool) -> tuple[str, int, int]:
    """Return the name of a message, its size as a judge would count it and that of the file."""
    real = rng.choice((0, 1, 9, 100, 999, rng.randrange(5000)))
    said = real if rng.random() < 0.7 else rng.randrange(5000)
    unique = f"17000{rng.randrange(10**5)}.M{rng.randrange(10**6)}P1.mx"
    with_size = [f",S={said}", f",S={said},W={said + 9}", f",W={said + 9},S={said}", f",S=0{said}"]
    if rng.random() < 0.1:
        return unique + rng.choice((",S=", ",S=,W=5")) + rng.choice(FLAGS), 0, real
    if rng.random() < 0.6:
        return unique + rng.choice(with_size) + rng.choice(FLAGS), said, real
    without = ["", ",W=77", ",s=5", ",SX=5", ",Q=1"]
    if dovecot:  # Courier takes the 5; a hidden file is none of its messages
        without += [",S=5x", ",S=x5", ",S= 5", ",S=-5"]
        unique = rng.choice(("", "", "", ".")) + unique
    return unique + rng.choice(without) + rng.choice(FLAGS), real, real


def random_files(rng: random.Random, dovecot: bool) -> tuple[Files, int, int]:
    """Return the files of a Maildir, and about how many bytes and messages a judge will count."""
    folders = ["", *rng.sample(FOLDERS, rng.choice((0, 0, 1, 3)))]
    files: Files = {folder + "/cur/": 0 for folder in folders if folder}
    used = messages = 0
    for _ in range(rng.choice((0, 1, 2, 5, 12))):
        name, size, real = random_name(rng, dovecot)
        files[os.path.join(rng.choice(folders), rng.choice(("cur", "new")), name)] = real
        used, messages = used + size, messages + 1
    for name in rng.sample(sorted(LEFTOVERS), rng.choice((0, 0, 2, 5))):
        files[name] = LEFTOVERS[name]
    return files, used, messages


def random_maildirsize(rng: random.Random, dovecot: bool, used: int, messages: int) -> bytes:
    """Return a `maildirsize` whose limits and sum are about what is there."""
    near = (-1000, -1, 0, 0, 1, 1000)
    said = max(0, used + rng.choice(near)), max(0, messages + rng.choice((-1, 0, 0, 1)))
    from_which = rng.choice((said, (used, messages)))
    limits = {
        "S": max(0, from_which[0] + rng.choice(near)),
        "C": max(0, from_which[1] + rng.choice((-1, 0, 1, 1, 5))),
    }
    header = rng.choice(HEADERS + (DOVECOTS_HEADERS if dovecot else []))
    text = header.format(**limits) + "\n"
    kinds = ENTRIES + (DOVECOTS_ENTRIES if dovecot and rng.random() < 0.2 else ())
    parts = rng.choice((0, 1, 1, 1, 2, 4))
    if rng.random() < 0.1:  # long enough to be rebuilt, or only just not
        text += "0 0\n" * ((5120 - len(text)) // 4 - rng.choice((0, 1, 8)))
    for part in range(parts):
        more = said if part == parts - 1 else (rng.randrange(-300, 300), rng.choice((-1, 0, 1)))
        said = said[0] - more[0], said[1] - more[1]
        text += rng.choice(kinds).format(b=more[0], m=more[1])
    if rng.random() < 0.05:
        text += f"{rng.randrange(-9000, 9000)} 1"  # a write that is not finished
    return text.encode()


def random_maildir(seed: int, dovecot: bool) -> Maildir:
    """Return a Maildir, the same for the same seed, whose limit stands in its `maildirsize`."""
    rng = random.Random(f"{SEED} {seed}")
    files, used, messages = random_files(rng, dovecot)
    if dovecot:
        files["dovecot-uidlist"] = UIDLIST
    if rng.random() < 0.2:
        files["away/cur/1"], files[".link"] = 2000, rng.choice(("away", ".", "..", "nowhere"))
    age = rng.choice((0, 60, 840, 960, 10**6))
    return Maildir(files, random_maildirsize(rng, dovecot, used, messages), age)


LIMIT = 5000  # bytes, for the Maildirs whose limit does not come from maildirsize


def maildir_near_limit(seed: int, dovecot: bool, sized: bool) -> Maildir:
    """Return a random Maildir that holds about LIMIT bytes, its first line just that."""
    rng = random.Random(f"{SEED} near {seed}")
    files, used, messages = random_files(rng, dovecot)
    files["new/rest"] = max(0, LIMIT - used + rng.choice((-500, -1, 0, 0, 1)))
    text = random_maildirsize(rng, dovecot, max(used, LIMIT), messages)
    text = b"%dS\n%s" % (LIMIT, text.partition(b"\n")[2])
    return Maildir(files, text if sized else None, rng.choice((0, 960)))


def compare(
    homes: pathlib.Path,
    maildirs: Sequence[Maildir],
    judge: Callable[[str], bool],
    settings: Mapping[str, object],
) -> None:
    """Ask the CGI, then the judge, about each Maildir: their verdicts must be one."""
    different, verdicts = [], set()
    for number, maildir in enumerate(maildirs):
        user = f"u{number}"
        path = homes / user / "Maildir"
        make_maildir(path, *maildir)
        own(path.parent, MAIL_UID, MAIL_UID)
        before = state_of(path)
        asked = {"QUOTA_MAILDIR": f"{homes}/%n/Maildir", **settings}
        line = ask(user, asked).line
        assert state_of(path) == before, f"{path} was changed"
        refused = judge(user)
        verdicts.add(refused)
        if line.split(" ")[0] != ("OVERQUOTA" if refused else "OK"):
            short = str(maildir).replace("0 0\\n", "")
            different.append(f"{number}: {line}, the judge says over: {refused}, {short}")
    assert not different, f"SEED={SEED}\n" + "\n".join(different)
    assert len(verdicts) == 2, "Maildirs of one kind only"


@pytest.mark.parametrize("trash", ["count", "skip"])
def test_random_maildirs_get_the_verdict_of_dovecots_maildir_driver(trash):
    if not dovecot_is_old():
        return  # 2.4 takes no limit from maildirsize
    with Dovecot(trash=trash == "count") as dovecot:
        maildirs = [random_maildir(seed, True) for seed in range(300 if trash == "count" else 100)]
        compare(dovecot.homes, maildirs, dovecot.refuses, {"QUOTA_TRASH": trash, "QUOTA_LIMIT": 0})


@pytest.mark.parametrize("sized", [False, True])
def test_random_maildirs_get_the_verdict_of_dovecots_own_quota_rule(folder, sized):
    limits = {"QUOTA_USERS": folder / "users"} if sized else {"QUOTA_LIMIT": LIMIT}
    (folder / "users").write_text("".join(f"u{number} {LIMIT}\n" for number in range(150)))
    with Dovecot(LIMIT, "maildir") as dovecot:
        maildirs = [maildir_near_limit(seed, True, sized) for seed in range(150)]
        settings = {"QUOTA_KEEPER": "dovecot", **limits}
        compare(dovecot.homes, maildirs, dovecot.refuses, settings)


def test_random_maildirs_get_the_verdict_of_dovecots_count_driver():
    def virtual(seed: int) -> Maildir:
        """Return a Maildir whose names give virtual sizes, as Dovecot refuses a false `,S=`."""
        maildir = maildir_near_limit(seed, True, False)
        names = {re.sub(",W=[^,:]*", "", name): name for name in maildir.files}
        files = {new.replace(",S=", ",W="): maildir.files[name] for new, name in names.items()}
        return maildir._replace(files=files)

    with Dovecot(LIMIT, "count") as dovecot:
        maildirs = [virtual(seed) for seed in range(150)]
        settings = {"QUOTA_KEEPER": "dovecot-count", "QUOTA_LIMIT": LIMIT}
        compare(dovecot.homes, maildirs, dovecot.refuses, settings)


@pytest.mark.parametrize("limit", ["from maildirsize", "given", "given, no maildirsize"])
def test_random_maildirs_get_the_verdict_of_deliverquota(folder, limit):
    homes = folder / "homes"
    (folder / "users").write_text("".join(f"u{number} {LIMIT}\n" for number in range(150)))
    if limit == "from maildirsize":
        maildirs, quota = [random_maildir(seed, False) for seed in range(300)], []
        settings = {"QUOTA_LIMIT": 0}
    else:
        maildirs = [maildir_near_limit(seed, False, limit == "given") for seed in range(150)]
        quota, settings = [f"{LIMIT}S"], {"QUOTA_USERS": folder / "users"}

    def judge(user: str) -> bool:
        return deliverquota_refuses(homes / user / "Maildir", *quota)

    compare(homes, maildirs, judge, settings)


# ---- Room: how much the next message may have ----


ROOM_LIMIT = 300_000  # bytes
ROOMS = (
    # (driver, grace as Dovecot has it and as the CGI has it, whether there is a control folder)
    ("maildir", "", "auto", False),
    ("maildir", "0", "0", False),
    ("maildir", "20%%", "20%", True),
    ("count", "", "auto", False),
    ("count", "0", "0", False),
    ("count", "50K", "50K", True),
)


def lines_of(size: int, width: int = 60, end: bytes = b"\r\n") -> bytes:
    """Return a message of so many bytes, its lines of one width but the last."""
    text, line = b"Subject: x" + end * 2, b"x" * width + end
    text += line * ((size - len(text) - len(end)) // len(line))
    return text + b"x" * (size - len(text) - len(end)) + end


def message_in(dovecot: Dovecot, size: int) -> bytes:
    """Return a message that has this size once LMTP has put its header before it."""
    assert dovecot.deliver("other", lines_of(500)) == 250
    newest = max(dovecot.path_of("other").glob("[cn]*/*"), key=lambda file: file.stat().st_mtime_ns)
    header = int(newest.name.partition(",W=")[2]) - 500
    return lines_of(size - header)


@pytest.mark.parametrize(("driver", "by_dovecot", "by_cgi", "control"), ROOMS)
def test_the_room_is_what_dovecot_says_and_what_its_lmtp_accepts(
    driver, by_dovecot, by_cgi, control
):
    if driver == "maildir" and not dovecot_is_old():
        return  # that driver has no settings of its own any more
    with Dovecot(ROOM_LIMIT, driver, grace=by_dovecot, control=control) as dovecot:
        grace = by_cgi if dovecot.old or by_dovecot else "10M"
        settings = {"QUOTA_LIMIT": ROOM_LIMIT, "QUOTA_GRACE": grace}
        settings["QUOTA_MAILDIR"] = f"{dovecot.homes}/%n/Maildir"
        if control:
            settings["QUOTA_CONTROL"] = f"{dovecot.control}/%n"
        most, rng = ROOM_LIMIT + 11 * 2**20, random.Random(f"{SEED} room")
        for user in "user0", "user1", "user2", "user3", "user4":
            for _ in range(12):
                end = rng.choice((b"\r\n", b"\n"))
                message = lines_of(rng.randrange(200, 30_000), rng.randrange(1, 400), end)
                assert dovecot.deliver(user, message) == 250
                room = dovecot.room(user, most)
                assert room_of(user, settings) == room
            asked = room_of(user, {**dovecot.asked, "QUOTA_GRACE": grace})
            assert room - 1024 < asked <= room  # doveadm tells kilobytes, rounded up
            if room:
                assert dovecot.deliver(user, message_in(dovecot, room + 1)) == 552
                assert dovecot.deliver(user, message_in(dovecot, room)) == 250
            left = dovecot.room(user, most)
            assert room_of(user, settings) == left
            # The maildir driver without a grace has not added up all.
            assert left == 0 or (driver, by_dovecot) == ("maildir", "0")


@pytest.mark.parametrize("control", [False, True])
def test_auto_is_right_also_after_dovecot_has_changed_its_driver(control):
    if not dovecot_is_old():
        return  # nobody has the maildir driver there without having looked for it
    with Dovecot(10**6, grace="", control=control) as old, contextlib.ExitStack() as stack:
        settings = {"QUOTA_LIMIT": 10**6, "QUOTA_MAILDIR": f"{old.homes}/%n/Maildir"}
        place = old.path_of("john")
        if control:
            settings["QUOTA_CONTROL"], place = f"{old.control}/%n", old.control / "john"
        for _ in range(3):
            assert old.deliver("john", lines_of(10**5)) == 250
            assert room_of("john", settings) == old.room("john", 2 * 10**7)
        then = time.time() - 7200
        for file in old.path_of("john").glob("new/*"):
            file.rename(file.with_name(f"{then:.0f}{file.name[10:]}"))
        for file in place.glob("**/*"):
            os.utime(file, (then, then))
        new = stack.enter_context(Dovecot(10**6, "count", grace="", control=control))
        (new.homes / "john").symlink_to(old.homes / "john")
        if control:
            (new.control / "john").symlink_to(old.control / "john")
        by_name = {**settings, "QUOTA_KEEPER": "dovecot-count"}
        room = room_of("john", by_name)
        assert room == new.room("john", 2 * 10**7) < room_of("john", settings)
        assert new.deliver("john", lines_of(10**5)) == 250
        room = new.room("john", 2 * 10**7)
        assert room_of("john", by_name) == room_of("john", settings) == room


def test_auto_is_right_for_a_maildir_that_deliverquota_fills(folder):
    path, maker = folder / "john", need("maildirmake", "maildrop")
    for arguments in [path], ["-q", "9000S,40C", path], ["-f", "Lists", path]:
        subprocess.run([maker, *arguments], check=True)
    settings, rng = {"QUOTA_MAILDIR": f"{folder}/%n"}, random.Random(1)
    for size in [*(rng.randrange(1, 900) for _ in range(25)), *(2**n for n in range(11, -1, -1))]:
        message = lines_of(max(size, 12), 60, b"\n")[:size]
        deliverquota_refuses(path / rng.choice((".", ".Lists")), message=message)
        answer = ask("john", settings)
        shutil.rmtree(folder / "copy", ignore_errors=True)
        refused = deliverquota_refuses(shutil.copytree(path, folder / "copy"))
        used = sum(file.stat().st_size for file in path.glob("**/new/*"))
        assert answer.line == f"{'OVERQUOTA' if refused else 'OK'} john {used} 9000"
    assert refused


def test_last_modified_is_when_a_message_came_or_was_read_or_deleted():
    with Dovecot(10**5) as dovecot:
        path = dovecot.path_of("john")
        settings = {"QUOTA_MAILDIR": f"{dovecot.homes}/%n/Maildir", "QUOTA_LIMIT": 10**5}
        for name in "one", "two", "three":
            assert dovecot.deliver("john", f"Subject: {name}\r\n\r\n".encode()) == 250
        client = imaplib.IMAP4("127.0.0.1", dovecot.imap_port)
        client.login("john", "x")
        client.create("Lists")
        client.select("INBOX")

        def expunge(folder: str) -> None:
            client.select(folder)
            client.store("1", "+FLAGS", "\\Deleted")
            client.expunge()

        steps: tuple[tuple[str, Callable[[], Any], bool], ...] = (
            ("read", lambda: client.fetch("1", "(BODY[])"), True),
            ("looked at again", lambda: client.fetch("1", "(BODY[])"), False),
            ("moved", lambda: client.xatom("MOVE", "1", "Lists"), True),
            ("deleted", lambda: expunge("INBOX"), True),
            ("in a folder", lambda: expunge("Lists"), True),
            ("delivered", lambda: dovecot.deliver("john", b"Subject: four\r\n\r\n"), True),
            ("refused", lambda: dovecot.deliver("john", b"x: y\r\n" * 10**5), False),
            ("asked about", lambda: dovecot.refuses("john"), False),
        )
        for what, step, changes in steps:
            then = time.time() - 3 * 86400
            for entry in [path, *path.glob("**/*")]:
                os.utime(entry, (then, then))
            step()
            client.noop()
            date = ask("john", settings).header["Last-Modified"]
            age = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
            assert (age < 3600) == changes, what
        client.logout()


# ---- Dovecot asked itself ----


def figures(dovecot: Dovecot, user: str) -> tuple[str, int, int]:
    """Return what `doveadm quota get -u` says of the first root: status, bytes used, limit."""
    table = dovecot.doveadm("-f", "tab", "quota", "get", "-u", user).splitlines()
    cells = [line.split("\t")[2:4] for line in table[1:3]]  # of STORAGE and MESSAGE
    rows = [(int(used), 0 if limit == "-" else int(limit)) for used, limit in cells]
    over = any(limit and used >= limit for used, limit in rows)
    return "OVERQUOTA" if over else "OK", rows[0][0] * 1024, rows[0][1] * 1024


MAILBOX_FORMATS: dict[str, dict[str, Any]] = {
    "mdbox": {"format": "mdbox"},
    "sdbox": {"format": "sdbox"},
    "a Maildir": {},
    "a Maildir, count": {"driver": "count"},
    "LAYOUT=fs": {"driver": "count", "layout": "fs"},
}


@pytest.mark.parametrize("format", MAILBOX_FORMATS)
def test_dovecot_is_asked_whatever_its_mailboxes_are(format):
    with contextlib.ExitStack() as stack:
        dovecot = stack.enter_context(Dovecot(100 << 10, grace="", **MAILBOX_FORMATS[format]))
        site = stack.enter_context(Serve("Dovecot asked itself", dovecot.asked))
        user, seen = "john@example.com", set()
        for mailbox in "INBOX", "Lists", "Lists.Deep" if "Maildir" in format else "Lists/Deep", "":
            if mailbox:
                dovecot.doveadm("mailbox", "create", "-u", user, mailbox, check=False)
                dovecot.doveadm("save", "-u", user, "-m", mailbox, input=lines_of(32_000))
            else:  # the message that fills it
                assert dovecot.deliver(user, lines_of(8000)) == 250
            answer = "{} john {} {}".format(*figures(dovecot, user))
            assert ask(user, dovecot.asked).line == answer
            assert site.ask("u=john&d=example.com") == f"200 {answer}"
            assert answer.startswith("OVER") == dovecot.refuses(user)
            seen.add(answer)
        assert len(seen) == 4 and answer.startswith("OVERQUOTA")


USERS: dict[str, dict[str, str]] = {
    "john@example.com": {"storage": "33K"},
    "mary@example.com": {"storage": "100K", "messages": "2"},
    "free@example.com": {},
    "zero@example.com": {"storage": "0"},
    "a b@example.com": {"storage": "50K"},
    "jürgen@example.com": {"storage": "60K"},
    "a&b=c%41@example.com": {"storage": "34K"},
    "alone": {"messages": "3"},
}


def test_limits_of_the_user_database_are_dovecots_and_may_change_while_it_runs():
    with Dovecot(users=USERS, driver="count", grace="") as dovecot:
        words = {}
        for user in USERS:
            dovecot.doveadm("save", "-u", user, input=lines_of(1000))
            if re.fullmatch("[!-~]+", user):  # what an LMTP client can name
                assert dovecot.deliver(user, lines_of(35_000)) == 250
            status, used, limit = figures(dovecot, user)
            local = user.partition("@")[0]
            assert ask(user, dovecot.asked).line == f"{status} {local} {used} {limit}"
            words[local] = status
        assert [user for user in words if words[user] != "OK"] == ["john", "mary", "a&b=c%41"]
        for user in "jane@example.com", "john", "john@example.org", "*@example.com", "?ohn@*":
            assert ask(user, dovecot.asked).line == f"UNKNOWN {user.partition('@')[0]} 0 0"
        changed = {"john@example.com": {"storage": "300K"}, "mary@example.com": {"storage": "10K"}}
        dovecot.set_users({**USERS, **changed})
        raised = f"OK john {36 << 10} {300 << 10}"  # Dovecot looks at the file once a second
        wait_for(lambda: ask("john@example.com", dovecot.asked).line == raised, raised)
        assert ask("john@example.com", dovecot.asked).header["Quota-Grace"] == str(30 << 10)
        assert ask("mary@example.com", dovecot.asked).line.startswith("OVERQUOTA mary ")


SHARED = {
    True: "plugin {\n quota2 = count:Shared\n quota2_rule = *:storage=20K\n}\n",
    False: "quota Shared {\n driver = count\n storage_size = 20K\n}\n",
}


def test_of_several_roots_the_one_with_the_least_room_counts():
    with Dovecot(100 << 10, "count", lines=SHARED[dovecot_is_old()]) as dovecot:
        dovecot.doveadm("save", "-u", "john", input=lines_of(10_000))
        assert ask("john", dovecot.asked).line == f"OK john {10 << 10} {20 << 10}"
        dovecot.doveadm("save", "-u", "john", input=lines_of(10_400))
        assert ask("john", dovecot.asked).line == f"OVERQUOTA john {20 << 10} {20 << 10}"


def test_what_hinders_the_question_is_an_error_that_tells_nobody_the_key(folder):
    with Dovecot(users=USERS) as dovecot:
        key = dovecot.key.read_text().strip()
        (folder / "wrong").write_text("wrong" * 10 + "\n")
        (folder / "empty").write_text("")
        url = dovecot.asked["QUOTA_DOVEADM"]
        away = url.replace(str(dovecot.http_port), str(free_port()))
        for settings, why in (
            ({"QUOTA_DOVEADM_KEY": folder / "wrong"}, "key"),
            ({"QUOTA_DOVEADM_KEY": folder / "empty"}, "QUOTA_DOVEADM_KEY"),
            ({"QUOTA_DOVEADM_KEY": folder / "missing"}, "QUOTA_DOVEADM_KEY"),
            ({"QUOTA_DOVEADM_KEY": ""}, "QUOTA_DOVEADM_KEY"),
            ({"QUOTA_DOVEADM": away}, "Dovecot"),
            ({"QUOTA_DOVEADM": url.replace("http:", "https:")}, "QUOTA_DOVEADM"),
            ({"QUOTA_DOVEADM": url.replace("/v1", "/v9")}, "QUOTA_DOVEADM"),
            ({"QUOTA_DOVEADM": f"http://127.0.0.1:{dovecot.imap_port}/doveadm/v1"}, "Dovecot"),
        ):
            answer = ask("john@example.com", {**dovecot.asked, **settings})
            assert (answer.status, answer.line[:6]) == (500, "ERROR "), (settings, answer)
            assert why in answer.line and key not in answer.line, (settings, answer)
            assert str(folder) not in answer.line and str(dovecot.folder) not in answer.line
        with Serve("Dovecot asked itself", dovecot.asked) as site:
            assert site.ask("u=jane&d=example.com") == "200 UNKNOWN jane 0 0"
            with Milter("--backend", site.url) as milter:
                dovecot.process.stop()
                assert site.ask("u=jane&d=example.com").startswith("500 ERROR ")
                assert milter.rcpt("<john@example.com>") == ""
                assert "status 500 ERROR" in milter.log("verdict=fault")
            assert key not in site.process.output()


def test_the_key_of_readme_opens_nothing_but_quotas():
    with Dovecot(users=USERS) as dovecot:
        key = base64.b64encode(dovecot.key.read_bytes().strip()).decode()
        curl = [need("curl", "curl"), "-s", "-m", "30", dovecot.asked["QUOTA_DOVEADM"]]
        curl += ["-H", f"Authorization: X-Dovecot-API {key}"]
        curl += ["-H", "Content-Type: application/json", "-d"]
        user = '{"user":"john@example.com"}'
        told = subprocess.check_output([*curl, f'[["quotaGet",{user},"q"]]'], text=True)
        assert '"type":"STORAGE"' in told
        for command in "quotaRecalc", "mailboxList", "fetch", "expunge":
            told = subprocess.check_output([*curl, f'[["{command}",{user},"q"]]'], text=True)
            assert '"unAuthorized"' in told, (command, told)


# ---- Two rows of servers ----


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("format", ["maildir", "mdbox"])
def test_a_burst_makes_no_bounce_and_fills_the_mailboxes(format, sized):
    """The short form of `.ci/bench burst`: where nothing is checked, most of it bounces."""
    mailboxes, messages = 8, 100
    fit = mailboxes * BURST_FITS
    with (
        TwoRows(format, doveadm=format == "mdbox") as rows,
        Milter("--backend", rows.url) as milter,
    ):
        ports = rows.frontend({"none": "", "milter": by_milter(milter.port)})
        burst = rows.burst([ports["milter"]], mailboxes, messages, sized)
        assert (burst.bounced, burst.delivered, burst.refused) == (0, fit, messages - fit), burst
        burst = rows.burst([ports["none"]], mailboxes, messages, sized)
        assert burst.refused == 0 and burst.bounced > messages // 2, burst


# ---- README ----


def test_the_commands_of_readme_do_what_they_say(folder):
    root = folder / "root"
    (root / "etc").mkdir(parents=True)
    names = {"useradd": f"{need('useradd', 'passwd')} --prefix {root}"}
    run_commands(readme_block("Backend: copy", {LIBRARY: folder / "lib", **names}), cwd=HERE)
    names["/usr/local/sbin"] = folder
    run_commands(readme_block("Frontend: copy", names), cwd=HERE)
    users = (root / "etc/passwd").read_text()
    assert "quota-backend:" in users and "quota-milter:" in users
    for script in "lib/quota.cgi", "lib/maildir_quota.cgi", "quota_milter.py":
        assert os.access(folder / script, os.X_OK)
    with Serve() as site:
        ask_there = readme_block("Backend: ask", {"192.0.2.10:8025": f"127.0.0.1:{site.port}"})
        assert run_commands(ask_there) == f"OVERQUOTA john {ROOM + 1} {ROOM}\n"
        for address, expected in ("mary", 0), ("john", 1):
            conf = {LISTEN: "inet:1@127.0.0.1", LOCAL_URL: site.url, "--syslog\n": ""}
            (folder / "conf").write_text(readme_block("/etc/quota_milter.conf", conf))
            names = {"/etc/quota_milter.conf": folder / "conf", "john@": f"{address}@"}
            names["quota_milter.py @"] = f"{MILTER} @"
            command = readme_block("Frontend: ask", names)
            done = subprocess.run(["sh", "-euc", command], capture_output=True, text=True)
            assert done.returncode == expected, done
            reply = quota_exceeded("john@example.com") if expected else "none"
            assert done.stdout.rstrip().endswith(f"reply={reply}"), done


def test_readmes_first_commands_show_a_full_mailbox(folder):
    if answers_at(8025):
        missing("something listens on a default port already")
    environment = {**os.environ, "TMPDIR": str(folder)}
    command = ["bash", "-c", readme_block("try it")]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    shown = README.read_text().partition("# try it")[2].partition("```\n")[2].partition("\n## ")[0]
    by_hand, printed = (re.sub(r"ms=\d+", "ms=0", x).split() for x in (shown, done.stdout))
    assert by_hand == printed
    wait_for(lambda: not answers_at(8025), "the end of the backend")


def test_every_block_of_readme_that_has_a_name_is_used_by_a_test():
    names = re.findall(r"^```\w+\n(?:dnl )?# (.*)$", README.read_text(), re.MULTILINE)
    text = "".join(path.read_text() for path in (HERE / ".ci").iterdir() if path.is_file())
    assert len(names) > 20
    for name in names:
        name = name.partition(", for Dovecot")[0]
        assert f'"{name}' in text or name.endswith(".service"), name


def test_ci_installs_what_the_tests_need():
    command = (HERE / ".ci/run").read_text().split()
    text = "".join((HERE / ".ci" / name).read_text() for name in ("servers.py", "test_servers.py"))
    packages = set(re.findall(r'need\("[^"]+", "([a-z0-9-]+)"\)', text))
    packages -= {"passwd", "util-linux"}  # every Debian has these
    assert len(packages) > 15
    assert packages <= set(command), packages - set(command)


def test_every_backend_in_readme_names_its_domains_and_every_script_who_may_ask():
    text = README.read_text()
    blocks = re.findall(r"^```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    backends = [x for block in blocks for x in re.findall(r"^--backend (.*)$", block, re.M)]
    assert len(backends) >= 2
    assert all(re.match(r"[a-z.,]+=https?://", backend) for backend in backends)
    served = [b for b in blocks if "192.0.2.25" in b and re.search("QUOTA_(LIMIT|DOVEADM)", b)]
    assert len(served) >= 2
    assert all("QUOTA_ALLOW" in block for block in served)


def test_the_systemd_units_are_valid(folder):
    analyze = need("systemd-analyze", "systemd")
    for script in MILTER, MBOX_CGI, MAILDIR_CGI:
        shutil.copy(script, folder)
    for name, lines in (
        ("quota-milter", ["User=daemon"]),
        ("quota-backend", [line for _, line in Serve.ways().values()]),
    ):
        unit = readme_block(f"/etc/systemd/system/{name}.service")
        for line in lines:
            text = re.sub(rf"(?m)^{line.partition('=')[0]}=.*", line, unit)
            text = re.sub("(?m)^User=.*", "User=daemon", text)
            text = text.replace("/usr/local/sbin", str(folder)).replace(LIBRARY, str(folder))
            path = folder / f"{name}.service"
            path.write_text(text)
            command = [analyze, "verify", "--man=no", path]
            done = subprocess.run(command, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), (name, line)


def test_the_figures_that_readmes_alarms_look_at_are_there(folder):
    seen = folder / "seen"
    seen.mkdir()
    names: dict[str, Any] = {"/run/quota-milter": folder, "/var/lib/prometheus/node-exporter": seen}
    alarms = readme_block("alarms", names)
    run_commands(command_of(alarms).partition(": ")[2])
    file = f"{folder}/quota.prom"
    with Backend() as backend, Milter("--backend", backend.url, "--metrics", file) as milter:
        assert milter.rcpt("<john@example.com>") == ""
        milter.process.stop()
    text = (seen / "quota.prom").read_text()
    queries = "\n".join(line for line in alarms.splitlines() if not line.startswith("#"))
    metrics = set(re.findall(r"quota_milter_\w+", queries))
    assert len(metrics) >= 2
    for metric in metrics:
        assert re.search(rf"(?m)^{metric}\b", text), metric
    for words in re.findall(r'verdict=~?"([\w|]+)"', queries):
        assert all(f'verdict="{word}"' in text for word in words.split("|")), words


# ---- Syslog ----


@pytest.fixture
def dev_log():
    """Give an rsyslogd, and a command that runs another one with its socket as /dev/log.

    Where the system has no syslog of its own, it gets this one for the time; else this wants a
    mount namespace.
    """
    path = pathlib.Path("/dev/log")
    with Rsyslog() as syslog:
        if path.exists():
            script = 'mount --bind "$0" /dev/log; exec "$@"'
            yield syslog, ["unshare", "--mount", "sh", "-euc", script, str(syslog.socket)]
        else:
            path.unlink(missing_ok=True)
            path.symlink_to(syslog.socket)
            yield syslog, []
            path.unlink()


def test_the_log_arrives_at_syslog(dev_log):
    syslog, wrapper = dev_log
    with Serve() as site, Milter("--backend", site.url, "--syslog", wrapper=wrapper) as milter:
        assert milter.rcpt("<john@example.com>") == quota_exceeded("john@example.com")
        site.process.stop()
        assert milter.rcpt("<mary@example.com>") == ""
        assert milter.process.stop() == 0
        assert milter.process.output() == ""
        tag = rf"quota_milter\[{milter.process.popen.pid}\]:"
        wait_for(lambda: "state=stopped" in syslog.log(), "the end in syslog")
        for line in (
            rf"mail\.info {tag} .*state=started",
            rf"mail\.info {tag} recipient=john@example\.com user=john verdict=overquota used=",
            rf"mail\.warning {tag} recipient=mary@example\.com user=mary verdict=fault",
            rf"mail\.info {tag} counters .*recipients=2 ",
            rf"mail\.info {tag} .*state=stopped",
        ):
            assert re.search(f"(?m)^{line}", syslog.log()), (line, syslog.log())
