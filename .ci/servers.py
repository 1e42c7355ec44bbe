"""Real servers for tests and measurements, each an instance of its own on loopback.

Each is a context manager: `with Postfix() as postfix:` starts one in a temporary folder and at free
ports, and stops it whatever happens. They want root, as mail and web servers do.

A part that is missing raises unittest.SkipTest, which names the Debian package. With CI set in the
environment it is an error. Blocks of configuration that README shows are read from README. What
needs no server, as the MTA's side of the milter protocol, is test_quota.py's.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import re
import shutil
import signal
import smtplib
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Optional, TypeVar, Union

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
# `as` lets others import them from here.
import test_quota
from test_quota import HERE as HERE
from test_quota import MAILDIR_CGI as MAILDIR_CGI
from test_quota import MBOX_CGI as MBOX_CGI
from test_quota import MILTER as MILTER
from test_quota import answers_at as answers_at
from test_quota import free_port as free_port
from test_quota import wait_for as wait_for

README = HERE / "README.md"
PYTHON = "/usr/bin/python3"  # the one that Debian's python3-milter is for
SEARCH_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
PATIENCE = 60  # seconds until something must have come true, on a busy machine
FRONTEND, STRANGER = "127.0.0.1", "127.0.0.2"  # who may ask a backend here, and who may not
Path = Union[str, pathlib.Path]
Answer = Union[bytes, Callable[[socket.socket], None]]

# ---- Small things ----


def need(program: str, package: str) -> str:
    """Return the path of a program, or of a file; see the module's text where it is missing."""
    found = shutil.which(program, path=SEARCH_PATH) or os.path.exists(program) and program
    if not found:
        missing(f"{program} is missing: apt-get install {package}")
    return str(found)


def missing(why: str) -> None:
    """Skip a test for want of a part; in CI nothing may be missing."""
    raise AssertionError(why) if os.environ.get("CI") else unittest.SkipTest(why)


def as_user(user: Union[str, int], group: Union[None, str, int] = None) -> list[str]:
    """Return the command that runs another one as this user, in one group alone."""
    regid = user if group is None else group
    return [need("setpriv", "util-linux"), f"--reuid={user}", f"--regid={regid}", "--clear-groups"]


def own(top: pathlib.Path, uid: int, gid: int, mode: int = 0o600) -> None:
    """Give away all below a folder, files with this mode and folders with the search it implies."""
    for path in top, *top.rglob("*"):
        os.chown(path, uid, gid, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


@contextlib.contextmanager
def open_folder(parent: Optional[str] = None) -> Iterator[pathlib.Path]:
    """Give a temporary folder in which every user may search, which pytest's own may not be."""
    name = tempfile.mkdtemp(prefix="quota-", dir=parent)
    os.chmod(name, 0o755)
    try:
        yield pathlib.Path(name)
    finally:
        for _ in range(50):  # a process that ends may still write
            shutil.rmtree(name, ignore_errors=True)
            if not os.path.exists(name):
                break
            time.sleep(0.1)


def readme_block(name: str, replacements: Optional[Mapping[str, Path]] = None) -> str:
    """Return the block of README whose first line is a comment that ends with `name`.

    Ports and folders are put in; each text to be replaced must stand in the block.
    """
    blocks = re.findall(r"^```\w+\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    found = [block for block in blocks if block.partition("\n")[0].endswith("# " + name)]
    assert len(found) == 1, f"{len(found)} blocks of README.md begin with {name}"
    return replace(found[0], replacements or {})


def replace(text: str, replacements: Mapping[str, Path]) -> str:
    """Return a text with other ports and folders put in, each of which must stand in it."""
    for old, new in replacements.items():
        assert old in text, f"{old} is not in {text}"
        text = text.replace(old, str(new))
    return text


def run_commands(commands: str, **options: Any) -> str:
    """Run commands as a shell does and return what they print; nothing is installed or booted."""
    with tempfile.TemporaryDirectory() as stubs:
        for name in "apt-get", "systemctl":
            os.symlink("/bin/true", f"{stubs}/{name}")
        environment = {**os.environ, **options.pop("env", {}), "PATH": f"{stubs}:{SEARCH_PATH}"}
        arguments: dict[str, Any] = {"capture_output": True, "text": True, "timeout": PATIENCE}
        arguments.update(options, env=environment)
        done = subprocess.run(["sh", "-euc", commands], **arguments)
    assert done.returncode == 0, (commands, done)
    return str(done.stdout)


class Process(test_quota.Process):
    """A program and its children, which end with the `with`."""

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def wait_ready(self, condition: Callable[[], Any]) -> None:
        """Wait for a sign of life, longer than others need: databases and Sendmail start slowly."""
        wait_for(lambda: self.popen.poll() is not None or condition(), "a start", PATIENCE)
        assert self.popen.poll() is None, self.output()

    def stop(self, number: int = signal.SIGTERM) -> int:
        status = super().stop(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        return status


Started = TypeVar("Started", bound="Server")


class Server(contextlib.ExitStack):
    """A server with a folder of its own; all that it started ends with it, in reverse order."""

    folder: pathlib.Path
    parent: Optional[str] = None  # of the folder

    def __enter__(self: Started) -> Started:
        super().__enter__()
        try:
            self.folder = self.enter_context(open_folder(self.parent))
            self.launch()
        except BaseException:
            self.close()
            raise
        return self

    def launch(self) -> None:
        """Start what is to be started; a subclass says what that is."""

    def write(self, name: str, text: str, mode: int = 0o644) -> pathlib.Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def start(self, *arguments: object, port: int = 0, **options: Any) -> Process:
        """Start a program; with a port, wait until it listens there."""
        if os.geteuid():
            missing("wants root")
        number = len(list(self.folder.glob("output-*.log")))
        options = {"cwd": self.folder, "start_new_session": True, **options}
        process = Process(arguments, self.folder / f"output-{number}.log", **options)
        self.enter_context(process)
        if port:
            process.wait_ready(lambda: answers_at(port))
        return process


# ---- The milter, and an MTA's side of its protocol ----


class Session(test_quota.MilterSession):
    """A session that gives recipients as they are written, with their brackets."""

    def ask(self, recipient: Union[str, bytes], *parameters: str) -> None:
        super().ask(recipient.encode() if isinstance(recipient, str) else recipient, *parameters)


class Milter(Server):
    """quota_milter.py with some options, at a port of loopback or where `listen` says."""

    script = MILTER

    def __init__(
        self, *options: Path, port: int = 0, listen: str = "", wrapper: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.options, self.wrapper, self.port = options, wrapper, port or free_port()
        self.listen = listen or f"inet:{self.port}@127.0.0.1"

    def launch(self) -> None:
        copy = shutil.copy(self.script, self.folder / "quota_milter.py")
        command = [*self.wrapper, PYTHON, copy, "--listen", self.listen, *self.options]
        self.process = self.start(*command)
        path = self.listen.partition("unix:")[2]

        def listens() -> bool:
            with socket.socket(socket.AF_UNIX if path else socket.AF_INET) as probe:
                return probe.connect_ex(path or ("127.0.0.1", self.port)) == 0

        self.process.wait_ready(listens)

    def rcpt(self, recipient: Union[str, bytes], *mail_parameters: str) -> str:
        """Give one recipient of one message in a session of its own; return the reply."""
        with Session(self.port) as session:
            session.mail(*mail_parameters)
            return session.rcpt(recipient)

    def log(self, text: str) -> str:
        """Wait for a line of the log that has this text and return the last such."""

        def found() -> list[str]:
            return [line for line in self.process.output().splitlines() if text in line]

        return str(wait_for(found, f"{text!r} in the log")[-1])


def quota_exceeded(address: str) -> str:
    """Return the milter's reply for a full mailbox."""
    return f"452 4.2.2 Quota exceeded for {address}, try again later"


# ---- A backend that misbehaves ----


class Backend(Server):
    """Answers as it is told: `answers` maps a user to a line, a response or what to do."""

    def __init__(self, default: Answer = b"OK %s 10 100\n") -> None:
        super().__init__()
        self.default = default
        self.answers: dict[bytes, Answer] = {}
        self.asked: list[bytes] = []  # request lines
        self.ended = threading.Event()  # for an answer that waits until the end
        self.port = 0

    def launch(self) -> None:
        backend = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    line = self.rfile.readline().rstrip()
                    while self.rfile.readline().strip():
                        pass
                    backend.answer(line, self.connection)

        class Listener(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True
            request_queue_size = 600

        server = Listener(("127.0.0.1", self.port), Handler)
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.callback(server.server_close)
        self.callback(server.shutdown)
        self.callback(self.ended.set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/quota.cgi"

    def answer(self, line: bytes, connection: socket.socket) -> None:
        self.asked.append(line)
        user = self.user_of(line)
        answer = self.answers.get(user, self.default)
        if callable(answer):
            answer(connection)
        elif answer.startswith(b"HTTP/"):
            connection.sendall(answer)
        else:
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + answer.replace(b"%s", user))

    @staticmethod
    def user_of(line: bytes) -> bytes:
        """Return the user that a request line asks about."""
        found = re.search(rb"[?&]u=([^& ]*)", line)
        return urllib.parse.unquote_to_bytes(found[1]) if found else b""

    def mailboxes(self) -> list[str]:
        """Return which mailboxes were asked about, in order."""
        found = []
        for line in self.asked:
            fields = urllib.parse.parse_qs(line.split(b" ")[1].partition(b"?")[2].decode())
            found.append("@".join(fields.get(name, [""])[0] for name in "ud"))
        return found


# ---- Postfix ----

MAIN_CF = """
compatibility_level = 3.6
queue_directory = {folder}/spool
data_directory = {folder}/data
maillog_file = {folder}/mail.log
maillog_file_prefixes = {folder}
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = mx.example.com
mydestination =
alias_maps =
relay_domains = example.com, example.org
relay_transport = discard:
default_transport = discard:
smtpd_peername_lookup = no
message_size_limit = 0
"""
MASTER_CF = """
cleanup   unix  n       -       n       -       0       cleanup
qmgr      unix  n       -       n       300     1       qmgr
rewrite   unix  -       -       n       -       -       trivial-rewrite
bounce    unix  -       -       n       -       0       bounce
defer     unix  -       -       n       -       0       bounce
trace     unix  -       -       n       -       0       bounce
proxymap  unix  -       -       n       -       -       proxymap
error     unix  -       -       n       -       -       error
retry     unix  -       -       n       -       -       error
discard   unix  -       -       n       -       -       discard
anvil     unix  -       -       n       -       1       anvil
relay     unix  -       -       n       -       -       smtp
lmtp      unix  -       -       n       -       -       lmtp
postlog   unix-dgram n  -       n       -       1       postlogd
"""
# For many messages at once: no pauses, no limits. OVER is what quota-status says here.
BUSY_CF = """
in_flow_delay = 0
queue_run_delay = 1s
minimal_backoff_time = 1s
maximal_backoff_time = 2s
smtpd_error_sleep_time = 0
smtpd_soft_error_limit = 1000000
smtpd_hard_error_limit = 1000000
smtpd_junk_command_limit = 1000000
smtpd_client_connection_count_limit = 0
smtpd_restriction_classes = OVER
OVER = defer
"""


class Postfix(Server):
    """Postfix, chrooted as Debian's is, that takes mail for example.com and discards it.

    It has one more smtpd for each of `services`, which maps a name to its options.
    """

    def __init__(self, main_cf: str = "", services: Optional[Mapping[str, str]] = None) -> None:
        super().__init__()
        self.main_cf, self.services = main_cf, services or {}
        self.port = free_port()
        self.ports = {name: free_port() for name in self.services}

    def launch(self) -> None:
        for name in "spool", "data":
            (self.folder / name).mkdir()
        shutil.chown(self.folder / "data", "postfix")
        self.write("conf/main.cf", MAIN_CF.format(folder=self.folder) + self.main_cf)
        smtpd = "127.0.0.1:{} inet n - y - - smtpd {}\n"
        lines = [smtpd.format(self.ports[name], self.services[name]) for name in self.services]
        self.write("conf/master.cf", smtpd.format(self.port, "") + "".join(lines) + MASTER_CF)
        self.callback(self.command, "stop")
        done = self.command("start")
        assert done.returncode == 0, (done, self.log())
        wait_for(lambda: answers_at(self.port), "Postfix")

    def command(self, what: str) -> subprocess.CompletedProcess[str]:
        command = [need("postfix", "postfix"), "-c", str(self.folder / "conf"), what]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)

    def log(self) -> str:
        path = self.folder / "mail.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def is_empty(self) -> bool:
        """Say whether all mail that was accepted has left the queue."""
        queues = (self.folder / "spool" / name for name in ("incoming", "active", "deferred"))
        return not any(path.is_file() for queue in queues for path in queue.rglob("*"))


def send(
    port: int,
    *recipients: str,
    parameters: Sequence[str] = (),
    body: bytes = b"Subject: x\r\n\r\nx\r\n",
    source: str = "",
    login: bool = False,
) -> list[str]:
    """Send a message; return the reply to each recipient, "" for one that is accepted.

    `parameters` are those of MAIL. Where the data are refused, their reply comes last.
    """
    replies = []
    address = (source, 0) if source else None
    with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE, source_address=address) as client:
        client.ehlo("client.example.net")
        if login:
            client.login("john", "secret")
        code, text = client.mail("sender@example.net", parameters)
        assert code == 250, text
        for recipient in recipients:
            code, text = client.docmd(f"RCPT TO:<{recipient}>")
            replies.append("" if code == 250 else f"{code} {text.decode()}")
        if "" in replies:
            code, text = client.data(body)
            replies += [] if code == 250 else [f"{code} {text.decode()}"]
    return replies


def by_milter(port: int) -> str:
    """Return the option of smtpd that asks a milter at a port."""
    return f"-o smtpd_milters=inet:127.0.0.1:{port}"


def by_policy(port: int) -> str:
    """Return the option of smtpd that asks Dovecot's quota-status at RCPT."""
    policy = f"check_policy_service,inet:127.0.0.1:{port}"
    return f"-o smtpd_recipient_restrictions=reject_unauth_destination,{policy}"


# ---- Sendmail and Exim: their packages conflict with Postfix', so they are only unpacked ----


def unpack(folder: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """Unpack Debian packages into a folder, and keep what was fetched for the next time."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = pathlib.Path(home) / "quota_milter"
    cache.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not list(cache.glob(f"{name}_*.deb")):
            fetch = ["apt-get", "download", name]
            done = subprocess.run(fetch, cwd=cache, capture_output=True, text=True)
            if done.returncode:
                missing(f"{name} cannot be had: apt-get update; {done.stderr.strip()[:200]}")
        newest = max(cache.glob(f"{name}_*.deb"), key=lambda file: file.stat().st_mtime)
        subprocess.run(["dpkg", "-x", newest, folder], check=True)
    return folder


SENDMAIL_MC = """divert(0)dnl
OSTYPE(`linux')dnl
define(`confDOMAIN_NAME', `mx.example.com')dnl
define(`QUEUE_DIR', `{folder}/queue')dnl
define(`ALIAS_FILE', `{folder}/aliases')dnl
define(`STATUS_FILE', `{folder}/statistics')dnl
define(`confPID_FILE', `{folder}/sendmail.pid')dnl
define(`confDELIVERY_MODE', `queueonly')dnl
define(`confREFUSE_LA', `1000')dnl
define(`confQUEUE_LA', `1000')dnl
define(`confDELAY_LA', `0')dnl
FEATURE(`no_default_msa')dnl
FEATURE(`accept_unresolvable_domains')dnl
FEATURE(`nocanonify')dnl
FEATURE(`virtusertable', `hash {folder}/virtusertable')dnl
VIRTUSER_DOMAIN(`virt.example')dnl
DAEMON_OPTIONS(`Name=MTA, Addr=127.0.0.1, Port={port}')dnl
RELAY_DOMAIN(`example.com')dnl
{lines}
MAILER(`local')dnl
MAILER(`smtp')dnl
"""


class Sendmail(Server):
    """Sendmail, with more lines in its mc file, that takes mail for example.com and keeps it.

    `virtual` maps users of virt.example to others, "" all the rest.
    """

    # Sendmail wants no folder above its tables and sockets that all may write to, as /tmp is.
    parent = "/run"

    def __init__(self, lines: str = "", virtual: Optional[Mapping[str, str]] = None) -> None:
        super().__init__()
        self.lines, self.virtual, self.port = lines, virtual or {}, free_port()

    def launch(self) -> None:
        files = unpack(self.folder / "files", ["sendmail-bin", "sendmail-base", "sendmail-cf"])
        (self.folder / "queue").mkdir(mode=0o700)
        self.write("aliases", "")
        mc = SENDMAIL_MC.format(folder=self.folder, port=self.port, lines=self.lines)
        rules = files / "usr/share/sendmail/cf"
        m4: list[Path] = [need("m4", "m4"), f"-D_CF_DIR_={rules}/", rules / "m4/cf.m4"]
        m4.append(self.write("sendmail.mc", mc))
        made = subprocess.run(m4, capture_output=True, check=True, text=True)
        cf = self.write("sendmail.cf", made.stdout)
        program = next(file for file in files.glob("usr/lib*/**/sendmail") if file.is_file())
        rows = "".join(f"{user}@virt.example\t{target}\n" for user, target in self.virtual.items())
        makemap: list[Path] = [next(files.glob("usr/lib*/**/makemap")), "-C", cf, "hash"]
        makemap.append(self.folder / "virtusertable")
        subprocess.run(makemap, input=rows.encode(), check=True, capture_output=True)
        # Where the host's name has no dot Sendmail waits a minute before it reads its settings.
        named = ["unshare", "--uts", "sh", "-c", 'hostname mx.example.com; exec "$@"', "sh"]
        if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
            named = []
        self.process = self.start(*named, program, "-C", cf, "-bD")
        self.process.wait_ready(lambda: answers_at(self.port))


# Debian's answers to its own questions: a frontend that relays for its domains.
EXIM_SETTINGS = """
dc_eximconfig_configtype='internet'
dc_local_interfaces='127.0.0.1.{port}'
dc_relay_domains='example.com;example.org'
dc_minimaldns='false'
dc_use_split_config='false'
dc_mailname_in_oh='true'
dc_localdelivery='mail_spool'
CFILEMODE='644'
"""
EXIM_ACL = "/etc/exim4/quota_acl"


class Exim(Server):
    """Debian's Exim with README's lines, which ask a backend at a port."""

    def __init__(self, backend: int, path: str = "/quota.cgi", seconds: int = 5) -> None:
        super().__init__()
        self.port = free_port()
        self.replacements: dict[str, Path] = {
            "192.0.2.10:8025": f"127.0.0.1:{backend}",
            "/quota.cgi": path,
            "{5s:": f"{{{seconds}s:",
        }

    def launch(self) -> None:
        names = ["exim4-daemon-light", "exim4-base", "exim4-config"]
        files = unpack(self.folder / "files", names)
        program = files / "usr/sbin/exim4"
        user = "Debian-exim"  # whom the package would add
        if subprocess.run(["getent", "passwd", user], capture_output=True).returncode:
            useradd = [need("useradd", "passwd"), "--system", "--user-group", "--no-create-home"]
            subprocess.run([*useradd, user], check=True)
        for name in "spool", "log":
            (self.folder / name).mkdir()
            shutil.chown(self.folder / name, user, user)
        etc = self.folder / "exim4"
        shutil.copytree(files / "etc/exim4", etc)
        (etc / "update-exim4.conf.conf").write_text(EXIM_SETTINGS.format(port=self.port))
        (etc / "hubbed_hosts").write_text("example.com: 192.0.2.1\nexample.org: 192.0.2.1\n")
        log = f"log_file_path = {self.folder}/log/%slog\n"
        (etc / "exim4.conf.localmacros").write_text(log)
        (etc / "quota_acl").write_text(readme_block(EXIM_ACL, self.replacements))
        update = pathlib.Path(shutil.copy(files / "usr/sbin/update-exim4.conf", self.folder))
        for script in etc / "exim4.conf.template", update:
            text = script.read_text().replace("/var/spool/exim4", f"{self.folder}/spool")
            text = text.replace("/etc/mailname", "/etc/hostname")
            script.write_text(text.replace("/etc/exim4", str(etc)))
        made = f" {update} -d {etc} -o {self.folder}/exim.conf"
        command = command_of(readme_block(EXIM_ACL)).replace("/etc/exim4", str(etc))
        command = replace(command, {" update-exim4.conf": made})
        run_commands(f"PATH={program.parent}:$PATH; {command}")
        daemon = [program, "-C", self.folder / "exim.conf", "-bdf", "-odq"]
        self.start(*daemon, port=self.port)

    def send(self, *recipients: str) -> list[str]:
        """Send a message as a stranger, as Debian's Exim takes anything from 127.0.0.1."""
        return send(self.port, *recipients, source=STRANGER)


def command_of(block: str) -> str:
    """Return the command that a block of README gives in its second line."""
    return block.splitlines()[1].lstrip("# ")


# ---- Dovecot ----

MAIL_UID = 65534  # nobody: Dovecot refuses to serve root's mail
# What both releases call the same; README's lines for doveadm follow.
DOVECOT = """
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/log
protocols = imap lmtp
ssl = no
first_valid_uid = 1
postmaster_address = postmaster@example.com
hostname = mx.example.com
auth_username_chars =
service quota-status {{
  executable = quota-status -p postfix
  client_limit = 1
  inet_listener policy {{
    {listen} = 127.0.0.1
    port = {policy_port}
  }}
}}
service lmtp {{
  inet_listener lmtp {{
    {listen} = 127.0.0.1
    port = {lmtp_port}
  }}
}}
service imap-login {{
  inet_listener imap {{
    {listen} = 127.0.0.1
    port = {imap_port}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
"""
DOVECOT_23 = """
mail_location = {format}:{path}{layout}{control}
mail_plugins = quota
disable_plaintext_auth = no
passdb {{
  driver = static
  args = nopassword=y
}}
userdb {{
  {userdb}
}}
plugin {{
  quota = {driver}:User quota
  quota_vsizes = {vsizes}
  {limit}
  {grace}
  {trash}
  quota_status_success = DUNNO
  quota_status_overquota = OVER
  quota_status_toolarge = OVER
}}
"""
DOVECOT_24 = """
mail_driver = {format}
mail_path = {path}
{layout}
{control}
mail_plugins {{
  quota = yes
}}
auth_allow_cleartext = yes
passdb static {{
  fields {{
    nopassword = yes
  }}
}}
userdb {userdb}
quota "User quota" {{
  driver = {driver}
  {limit}
  {grace}
}}
{trash}
quota_status_success = DUNNO
quota_status_overquota = OVER
quota_status_toolarge = OVER
"""
# Setting: its words in 2.3 and in 2.4.
WORDS = {
    "limit": ("quota_rule = *:bytes={}", "quota_storage_size = {}B"),
    "grace": ("quota_grace = {}", "quota_storage_grace = {}"),
    "layout": (":LAYOUT={}", "mailbox_list_layout = {}"),
    "control": (":CONTROL={}/%u", "mail_control_path = {}/%{user}"),
    "trash": (
        "quota_rule{} = Trash:ignore",
        "namespace inbox {\n inbox = yes\n mailbox Trash {\n  quota_ignore = yes\n }\n}",
    ),
    "users": (
        "driver = passwd-file\nargs = username_format=%u {}",
        "passwd-file {\n passwd_file_path = {}\n}",
    ),
    "everybody": (
        "driver = static\nargs = uid={0} gid={0} home={1}/%u",
        "static {\n fields {\n  uid = {0}\n  gid = {0}\n  home = {1}/%{user}\n }\n}",
    ),
    "storage": ("userdb_quota_rule=*:storage={}", "userdb_quota_storage_size={}"),
    "messages": ("userdb_quota_rule2=*:messages={}", "userdb_quota_message_count={}"),
    "listen": ("address", "listen"),
}


def dovecot_is_old() -> bool:
    """Say whether it is Dovecot 2.3, whose settings have other names."""
    program = need("dovecot", "dovecot-core")
    return subprocess.run([program, "--version"], capture_output=True).stdout.startswith(b"2.3")


class Dovecot(Server):
    """Dovecot with quotas, whose users' homes are HOMES/USER, and questions to it.

    It serves LMTP, IMAP, Postfix' policy protocol (quota-status) and doveadm over HTTP. A `limit`
    (bytes) is everybody's; `users` are the only ones where given, each with limits of its own:
    `{"john": {"storage": "100K", "messages": "3"}}`.
    """

    def __init__(
        self,
        limit: int = 0,
        driver: str = "",
        *,
        format: str = "maildir",
        layout: str = "",
        grace: str = "0",
        control: bool = False,
        trash: bool = True,
        users: Optional[Mapping[str, Mapping[str, str]]] = None,
        lines: str = "",
    ) -> None:
        super().__init__()
        self.old = dovecot_is_old()
        self.limit, self.format, self.layout, self.grace = limit, format, layout, grace
        self.driver = driver or ("maildir" if self.old and format == "maildir" else "count")
        self.with_control, self.trash, self.users, self.lines = control, trash, users, lines
        self.policy_port, self.lmtp_port, self.imap_port = free_port(), free_port(), free_port()
        self.http_port = free_port()

    @property
    def asked(self) -> dict[str, str]:
        """The settings of maildir_quota.cgi that let it ask this Dovecot."""
        url = f"http://127.0.0.1:{self.http_port}/doveadm/v1"
        return {"QUOTA_DOVEADM": url, "QUOTA_DOVEADM_KEY": str(self.key)}

    def word(self, name: str, *values: object) -> str:
        """Return a setting as this release calls it."""
        text = WORDS[name][0 if self.old else 1]
        for number, value in enumerate(values):
            text = text.replace(f"{{{number}}}", str(value)).replace("{}", str(value))
        return text

    def launch(self) -> None:
        need("/usr/lib/dovecot/lmtp", "dovecot-lmtpd")
        need("/usr/lib/dovecot/imap", "dovecot-imapd")
        self.homes, self.control = self.folder / "homes", self.folder / "control"
        for folder in self.homes, self.control:
            folder.mkdir()
            os.chown(folder, MAIL_UID, MAIL_UID)
        self.config = self.write("dovecot.conf", self.text())
        self.key = self.folder / "quota-backend.key"
        own: dict[str, Path] = {"/etc/quota-backend.key": self.key}
        own["/etc/dovecot/"] = f"{self.folder}/"
        run_commands(
            readme_block("Backend: a key for Dovecot", {**own, "quota-backend:": "www-data:"})
        )
        self.set_users(self.users or {})
        program = need("dovecot", "dovecot-core")
        self.process = self.start(program, "-F", "-c", self.config, port=self.policy_port)
        address = "127.0.0.1", self.policy_port
        connection = self.enter_context(socket.create_connection(address, PATIENCE))
        self.policy = self.enter_context(connection.makefile("rwb"))

    def text(self) -> str:
        users = self.folder / "users"
        everybody = self.word("everybody", MAIL_UID, self.homes)
        settings = {
            "folder": self.folder,
            "listen": self.word("listen"),
            "policy_port": self.policy_port,
            "lmtp_port": self.lmtp_port,
            "imap_port": self.imap_port,
            "format": self.format,
            "path": "~/Maildir" if self.format == "maildir" else f"~/{self.format}",
            "driver": self.driver,
            "vsizes": "yes" if self.driver == "count" else "no",
            "userdb": everybody if self.users is None else self.word("users", users),
            "limit": self.word("limit", self.limit) if self.limit else "",
            "grace": self.word("grace", self.grace) if self.grace else "",
            "layout": self.word("layout", self.layout) if self.layout else "",
            "control": self.word("control", self.control) if self.with_control else "",
            "trash": "" if self.trash else self.word("trash", "2" if self.limit else ""),
        }
        first = "dovecot_config_version = 2.4.0\ndovecot_storage_version = 2.4.0\n"
        text = DOVECOT + DOVECOT_23 if self.old else first + DOVECOT + DOVECOT_24
        name = "/etc/dovecot/conf.d/99-quota-backend.conf, for Dovecot "
        ours = {"port = 8080": f"port = {self.http_port}", "/etc/dovecot/": f"{self.folder}/"}
        block = readme_block(name + ("2.3" if self.old else "2.4"), ours)
        return text.format(**settings) + block + self.lines

    def set_users(self, users: Mapping[str, Mapping[str, str]]) -> None:
        """Write the file of users anew; Dovecot reads it again when it changes."""
        text = ""
        for name, limits in users.items():
            fields = " ".join(self.word(what, value) for what, value in limits.items())
            text += f"{name}::{MAIL_UID}:{MAIL_UID}::{self.homes}/{name}::{fields}\n"
        path = self.folder / "users.new"
        path.write_text(text)
        path.replace(self.folder / "users")

    def path_of(self, user: str) -> pathlib.Path:
        return self.homes / user / "Maildir"

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""

    def refuses(self, user: str, size: int = 1) -> bool:
        """Ask, as Postfix would, whether so many more bytes are too much for this user."""
        self.policy.write(f"recipient={user}\nsize={size}\n\n".encode())
        self.policy.flush()
        action = self.policy.readline().strip()
        assert self.policy.readline() == b"\n"
        assert action in (b"action=DUNNO", b"action=OVER"), (user, action, self.log())
        return action == b"action=OVER"

    def room(self, user: str, most: int) -> int:
        """Return the size of the largest message that would be accepted, by bisection."""
        fits, refused = 0, most + 1
        while refused - fits > 1:
            middle = (fits + refused) // 2
            fits, refused = (fits, middle) if self.refuses(user, middle) else (middle, refused)
        return fits

    def deliver(self, user: str, message: bytes) -> int:
        """Hand a message over by LMTP; return the code of the reply to it, or to its recipient."""
        with smtplib.LMTP("127.0.0.1", self.lmtp_port, timeout=PATIENCE) as client:
            client.mail("sender@example.net")
            code = client.docmd(f"RCPT TO:<{user}>")[0]
            return code if code != 250 else client.data(message)[0]

    def doveadm(self, *arguments: str, **options: Any) -> str:
        """Run doveadm with this configuration; return what it prints."""
        command = [need("doveadm", "dovecot-core"), "-c", str(self.config), *arguments]
        options = {"capture_output": True, "check": True, "timeout": PATIENCE, **options}
        return str(subprocess.run(command, **options).stdout.decode())


# ---- Databases, with the table `aliases` of Postfix ----


class Database(Server):
    """A database with a table of aliases, and Postfix' file that says how to ask it."""

    kind = ""  # as Postfix calls it
    query = "query = SELECT target FROM aliases WHERE name = '%s'\n"

    def __init__(self, rows: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        insert = "INSERT INTO aliases VALUES ('{}', '{}');\n"
        lines = (insert.format(*(word.replace("'", "''") for word in row)) for row in rows)
        self.sql = "CREATE TABLE aliases (name varchar(200), target text);\n" + "".join(lines)

    def table(self, login: str) -> None:
        """Write Postfix' file, which is older than a second: postmap waits for a newer one."""
        need(f"/usr/share/doc/postfix-{self.kind}", f"postfix-{self.kind}")
        os.utime(self.write("my aliases.cf", login + self.query), (0, 0))

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.folder}/my aliases.cf"


class SQLite(Database):
    kind = "sqlite"

    def launch(self) -> None:
        command = [need("sqlite3", "sqlite3"), f"{self.folder}/aliases.db"]
        subprocess.run(command, input=self.sql.encode(), check=True)
        self.table(f"dbpath = {self.folder}/aliases.db\n")


class MariaDB(Database):
    kind = "mysql"

    def launch(self) -> None:
        folder, server = self.folder, need("mariadbd", "mariadb-server")
        shutil.chown(folder, "mysql", "mysql")
        install = ["--no-defaults", "--user=mysql", "--skip-test-db", f"--datadir={folder}/data"]
        install += ["--auth-root-authentication-method=normal"]
        subprocess.run(["mariadb-install-db", *install], capture_output=True, check=True)
        options = [f"--datadir={folder}/data", f"--socket={folder}/socket", "--skip-networking"]
        options += [f"--pid-file={folder}/pid", "--innodb-buffer-pool-size=8M", "--no-defaults"]
        process = self.start(*as_user("mysql"), server, *options[::-1])
        process.wait_ready((folder / "socket").exists)
        client = ["mariadb", "--no-defaults", f"--socket={folder}/socket", "--user=root"]
        grant = "CREATE DATABASE mail; USE mail; GRANT SELECT ON mail.* TO 'mta'@'localhost'"
        sql = f"{grant} IDENTIFIED BY 'secret';\n" + self.sql.replace("text)", "longtext)")
        subprocess.run(client, input=sql.encode(), check=True)
        login = f"hosts = unix:{folder}/socket\nuser = mta\npassword = secret\ndbname = mail\n"
        self.table(login)


class PostgreSQL(Database):
    kind = "pgsql"

    def launch(self) -> None:
        found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))
        programs = found[-1] if found else pathlib.Path("/usr/lib/postgresql/bin")
        server = need(str(programs / "postgres"), "postgresql")
        shutil.chown(self.folder, "postgres", "postgres")
        here: dict[str, Any] = {"cwd": self.folder, "check": True, "capture_output": True}
        init = ["initdb", "-D", f"{self.folder}/data", "-A", "trust", "-E", "UTF8"]
        init = [str(programs / init[0]), *init[1:], "--no-sync", "--no-locale"]
        subprocess.run([*as_user("postgres"), *init], **here)
        options = ["-D", f"{self.folder}/data", "-c", "listen_addresses=", "-c", "fsync=off"]
        options += ["-c", f"unix_socket_directories={self.folder}"]
        process = self.start(*as_user("postgres"), server, *options, cwd=self.folder)
        process.wait_ready(lambda: "is ready to accept" in process.output())
        client = [str(programs / "psql"), "-q", "-h", str(self.folder), "-U", "postgres"]
        subprocess.run(client, input=self.sql.encode(), **here)
        self.table(f"hosts = unix:{self.folder}\nuser = postgres\ndbname = postgres\n")


# ---- Web servers with quota.cgi: README's blocks in Debian's own configuration ----

ROOM = 200 << 20  # bytes: the limit in README's blocks
LIBRARY = "/usr/local/lib/quota"  # README's folder of the scripts


class Site(Server):
    """A backend of README: mbox files, the scripts in a folder of their own, a port.

    john is over quota, mary has room for 1,000 bytes.
    """

    edits: Sequence[tuple[str, str]] = ()  # patterns in the block, and what replaces them

    def __init__(self) -> None:
        super().__init__()
        self.port, self.other_port = free_port(), free_port()  # the second: for Debian's own site
        self.url = f"http://127.0.0.1:{self.port}/cgi-bin/quota.cgi"

    def launch(self) -> None:
        self.spool, self.library = self.folder / "mail", self.folder / "lib"
        self.spool.mkdir(mode=0o711)  # for others: to search, not to list
        self.library.mkdir()
        self.script = self.library / "quota.cgi"
        for script in MBOX_CGI, MAILDIR_CGI:
            copy = pathlib.Path(shutil.copy(script, self.library))
            text = copy.read_text().replace("/var/mail/%n", f"{self.spool}/%n")
            copy.write_text(text.replace("%h/Maildir", f"{self.folder}/home/%n/Maildir"))
        self.fill("john", ROOM + 1)
        self.fill("mary", ROOM - 1000)
        self.serve()

    def serve(self) -> None:
        """Start the web server."""

    def fill(self, user: str, size: int) -> None:
        """Let a mailbox have this size; the file is a sparse one."""
        (self.spool / user).touch(mode=0o600)
        os.truncate(self.spool / user, size)

    def adapt(self, text: str, replacements: Optional[Mapping[str, Path]] = None) -> str:
        """Return a configuration with this site's scripts and frontend in place of README's."""
        table: dict[str, Path] = {LIBRARY: self.library, "192.0.2.25": FRONTEND}
        text = replace(text, {**table, **(replacements or {})})
        for pattern, instead in self.edits:
            text = re.sub(pattern, instead.format(self.port, self.library), text)
        return text

    def ask(self, query: str, *options: str) -> str:
        """Ask with curl; return the status and the line."""
        return self.fetch(f"{self.url}?{query}", *options)

    def fetch(self, url: str, *options: str) -> str:
        """Fetch a URL with curl; return the status and the body."""
        curl = [need("curl", "curl"), "-s", "-m", "30", "-w", r"\n%{http_code}", *options]
        done = subprocess.run([*curl, "--path-as-is", url], capture_output=True)
        body, _, status = done.stdout.decode("utf-8", "surrogateescape").rpartition("\n")
        return f"{status} {body.rstrip()}"

    def stock(self, name: str, package: str, edits: Mapping[str, Path]) -> pathlib.Path:
        """Copy Debian's own configuration of a server, with other ports and folders put in."""
        need(f"/etc/{name}", package)
        copy = self.folder / name
        shutil.copytree(f"/etc/{name}", copy, symlinks=True)
        found = set()
        for path in copy.rglob("*"):
            if path.is_symlink():
                target = os.readlink(path).replace(f"/etc/{name}", str(copy))
                path.unlink()
                path.symlink_to(target)
            elif path.is_file():
                text = path.read_text(errors="surrogateescape")
                for old, new in {f"/etc/{name}/": f"{copy}/", **edits}.items():
                    found |= {old} if old in text else set()
                    text = text.replace(old, str(new))
                path.write_text(text, errors="surrogateescape")
        assert found >= set(edits), f"not in /etc/{name}: {set(edits) - found}"
        return copy


class Apache(Site):
    replacements: Mapping[str, Path] = {}

    def serve(self) -> None:
        environment = self.prepare(self.port, self.other_port)
        text = self.adapt(readme_block("/etc/apache2/conf-available/quota.conf"), self.replacements)
        (self.folder / "apache2/conf-available/quota.conf").write_text(text)
        run_commands(command_of(text), env=environment)
        self.run()

    def prepare(self, http: int, https: int) -> dict[str, str]:
        """Copy Debian's Apache; return the environment of its commands."""
        ports = {"Listen 80\n": f"Listen 127.0.0.1:{http}\n", "*:80>": f"*:{http}>"}
        ports["Listen 443\n"] = f"Listen 127.0.0.1:{https}\n"
        copy = self.stock("apache2", "apache2", ports)
        (self.folder / "socks").mkdir()  # as apache2ctl does
        shutil.chown(self.folder / "socks", "www-data")
        with open(copy / "envvars", "a") as file:
            file.write(f"export APACHE_PID_FILE={self.folder}/apache.pid\n")
            names = "RUN", "LOCK", "LOG"
            file.writelines(f"export APACHE_{name}_DIR={self.folder}\n" for name in names)
        return {"APACHE_CONFDIR": str(copy), "APACHE_STATE_DIRECTORY": f"{self.folder}/state"}

    def run(self) -> None:
        """Start Apache with the copy of Debian's configuration."""
        command = '. "$0/envvars"; exec apache2 -d "$0" -f apache2.conf -DFOREGROUND'
        environment = {**os.environ, "PATH": SEARCH_PATH}
        self.start("sh", "-c", command, self.folder / "apache2", port=self.port, env=environment)


class ApacheWSGI(Apache):
    """Apache with mod_wsgi, which loads the script once."""

    replacements = {
        "a2enmod cgid && ": "",
        "\nScriptAlias ": "\nWSGIDaemonProcess quota user=www-data group=www-data threads=16"
        "\nWSGIScriptAlias ",
        "/quota.cgi\n": "/quota.cgi process-group=quota application-group=%{GLOBAL}\n",
    }

    def serve(self) -> None:
        need("/usr/lib/apache2/modules/mod_wsgi.so", "libapache2-mod-wsgi-py3")
        super().serve()


# What README says in a line of each of these.
LIGHTTPD = r"""# conf-available/50-quota.conf
# lighty-enable-mod quota && systemctl restart lighttpd
server.modules += ( "mod_access", "mod_alias", "mod_cgi", "mod_setenv" )
# This URL and whatever begins with it; no other reaches the folder.
$HTTP["url"] =~ "^/cgi-bin/quota\.cgi" {
    alias.url = ( "/cgi-bin/quota.cgi" => "/usr/local/lib/quota/quota.cgi" )
    cgi.assign = ( "quota.cgi" => "" )
    setenv.add-environment = ( "QUOTA_LIMIT" => "200M", "QUOTA_ALLOW" => "192.0.2.25" )
    $HTTP["remoteip"] != "192.0.2.25" {
        url.access-deny = ( "" )
    }
}
"""
NGINX = """# sites-available/quota
# ln -s ../sites-available/quota /etc/nginx/sites-enabled/
server {
    listen 8025;
    location = /cgi-bin/quota.cgi {
        allow 192.0.2.25;
        deny all;
        include /etc/nginx/fastcgi_params;
        fastcgi_param SCRIPT_FILENAME /usr/local/lib/quota/quota.cgi;
        fastcgi_param QUOTA_LIMIT 200M;
        fastcgi_param QUOTA_ALLOW 192.0.2.25;
        fastcgi_pass unix:/run/fcgiwrap.socket;
    }
}
"""
UWSGI = """[uwsgi]
plugin = python3
http-socket = 192.0.2.10:8025
wsgi-file = /usr/local/lib/quota/quota.cgi
env = QUOTA_LIMIT=200M
env = QUOTA_ALLOW=192.0.2.25
# uWSGI reads a % itself: each is written twice.
env = QUOTA_MAILBOX=/var/mail/%%n
uid = www-data
gid = www-data
master = true
# TERM ends it; uWSGI would read its files again and go on.
die-on-term = true
threads = 16
"""
GUNICORN = r"""
install -m 755 quota.cgi /usr/local/lib/quota/quota.py
QUOTA_LIMIT=200M QUOTA_ALLOW=192.0.2.25 setpriv --reuid www-data --regid www-data --init-groups \
    gunicorn --chdir /usr/local/lib/quota --bind 192.0.2.10:8025 --threads 16 quota:application
"""


class Lighttpd(Site):
    """lighttpd with mod_cgi, beside Debian's 10-cgi.conf."""

    def serve(self) -> None:
        edits: dict[str, Path] = {
            'include_shell "/usr/share/lighttpd/use-ipv6.pl " + server.port': "",
            "= 80\n": f'= {self.port}\nserver.bind = "127.0.0.1"\n',
            "/var/log/lighttpd": self.folder / "log",
            "/run/lighttpd.pid": self.folder / "lighttpd.pid",
        }
        copy = self.stock("lighttpd", "lighttpd", edits)
        (self.folder / "log").mkdir()
        shutil.chown(self.folder / "log", "www-data")
        enable = pathlib.Path("/usr/sbin/lighty-enable-mod")  # which knows /etc/lighttpd alone
        text = enable.read_text().replace("/etc/lighttpd/", f"{copy}/")
        script = self.write("lighty-enable-mod", text, 0o755)
        block = self.adapt(LIGHTTPD)
        (copy / "conf-available/50-quota.conf").write_text(block)
        for command in "lighty-enable-mod cgi", command_of(block):
            run_commands(command.replace("lighty-enable-mod", str(script)))
        self.start("/usr/sbin/lighttpd", "-D", "-f", copy / "lighttpd.conf", port=self.port)


class Nginx(Site):
    def serve(self) -> None:
        wrapper, run = need("fcgiwrap", "fcgiwrap"), self.folder / "run"
        run.mkdir()
        shutil.chown(run, "www-data", "www-data")
        fcgiwrap = self.start(*as_user("www-data"), wrapper, "-fc8", "-s", f"unix:{run}/socket")
        fcgiwrap.wait_ready((run / "socket").exists)
        edits: dict[str, Path] = {
            "listen 80 ": f"listen 127.0.0.1:{self.other_port} ",
            "listen [::]:80 default_server;": "",
            "/run/nginx.pid": self.folder / "nginx.pid",
            "/var/log/nginx": self.folder,
        }
        copy = self.stock("nginx", "nginx-light", edits)
        own = {
            "listen 8025": f"listen 127.0.0.1:{self.port}",
            "/run/fcgiwrap.socket": f"{run}/socket",
            "/etc/nginx/": f"{copy}/",
        }
        block = self.adapt(NGINX, own)
        (copy / "sites-available/quota").write_text(block)
        run_commands(command_of(block))
        arguments = ["-c", copy / "nginx.conf", "-e", "stderr", "-g", "daemon off;"]
        self.start(need("nginx", "nginx-light"), *arguments, port=self.port)


class Uwsgi(Site):
    def serve(self) -> None:
        need("/usr/lib/uwsgi/plugins/python3_plugin.so", "uwsgi-plugin-python3")
        own = {"192.0.2.10:8025": f"127.0.0.1:{self.port}", "/var/mail/": f"{self.spool}/"}
        path = self.write("quota.ini", self.adapt(UWSGI, own))
        self.start(need("uwsgi", "uwsgi-core"), "--ini", path, port=self.port)


class Gunicorn(Site):
    """gunicorn, on a copy of the script that is called quota.py."""

    def serve(self) -> None:
        need("gunicorn", "gunicorn")
        address = f"127.0.0.1:{self.port}"
        own: dict[str, Path] = {" quota.cgi": f" {self.script}", "192.0.2.10:8025": address}
        self.start("sh", "-euc", self.adapt(GUNICORN, own), port=self.port)


class Serve(Site):
    """No web server: the script with --serve, as README's unit starts it, without systemd.

    `way` is a row of README's table of mailboxes; `settings` are more of them, or others; `user` is
    whose rights the unit's user has here.
    """

    def __init__(
        self,
        way: str = "mbox files",
        settings: Optional[Mapping[str, Path]] = None,
        user: str = "www-data",
    ) -> None:
        super().__init__()
        self.way, self.settings, self.user = way, settings or {}, user

    @staticmethod
    def ways() -> dict[str, tuple[str, str]]:
        """Return README's table of mailboxes: by name the line of settings and that of the unit."""
        row = r"^\| (.*) \| `(QUOTA_.*)` \| `(.*)` \|$"
        rows = re.findall(row, README.read_text(), re.MULTILINE)
        return {name: (setting, line) for name, setting, line in rows}

    def serve(self) -> None:
        setting, line = self.ways()[self.way]
        name = line.partition("=")[0]
        unit = readme_block("/etc/systemd/system/quota-backend.service")
        unit, count = re.subn(rf"(?m)^{name}=.*", line, unit)
        assert count == 1, f"{name} is {count} times in README's unit"
        unit = replace(unit, {LIBRARY: self.library, "192.0.2.10:8025": f"127.0.0.1:{self.port}"})
        conf = readme_block("/etc/quota-backend.conf", {"192.0.2.25": FRONTEND})
        setting = setting.replace("/var/mail/", f"{self.spool}/")
        conf = re.sub("(?m)^QUOTA_DOVEADM=.*", setting, conf)
        lines = [line for line in conf.splitlines() if not line.startswith("#")]
        settings = {**os.environ, **dict(line.split("=", 1) for line in lines)}
        settings.update((name, str(value)) for name, value in self.settings.items())
        told = dict(line.split("=", 1) for line in unit.splitlines() if re.match("[A-Z].*=", line))
        ambient = told["AmbientCapabilities"].lower().replace("cap_", ",+")
        rights = [*as_user(self.user), "--no-new-privs"]
        rights += [f"--inh-caps=-all{ambient}", f"--ambient-caps=-all{ambient}"]
        command = told["ExecStart"].split()
        self.process = self.start(*rights, *command, port=self.port, env=settings)


class ApacheTLS(Apache):
    """README's Apache in front of --serve: https, the frontend's address and a password.

    The other port serves http.
    """

    password = "s:cret#%"  # of the user `frontend`

    def serve(self) -> None:
        need("htpasswd", "apache2-utils")
        self.backend = self.enter_context(Serve())
        self.url = f"https://127.0.0.1:{self.port}/quota"
        self.certificate = self.folder / "ssl/mail1.pem"
        environment = self.prepare(self.other_port, self.port)
        copy = self.folder / "apache2"
        own: dict[str, Path] = {"/etc/ssl/quota": self.folder / "ssl", "/etc/apache2": copy}
        site = {"*:443": f"*:{self.port}", ":8025": f":{self.backend.port}"}
        block = readme_block("/etc/apache2/sites-available/quota.conf", {**own, **site})
        text = replace(block, {"192.0.2.25": FRONTEND})
        (copy / "sites-available/quota.conf").write_text(text)
        own.update({"DNS:mail1.example.com": "IP:127.0.0.1", " -c ": " -i -c "})
        commands = readme_block("Backend: a certificate, a password, and start", own)
        run_commands(commands, input=f"{self.password}\n", env=environment)
        self.run()


# ---- Syslog ----

RSYSLOG = """global(workDirectory="{0}")
module(load="imuxsock" SysSock.Use="off")
input(type="imuxsock" Socket="{0}/log" CreatePath="off")
template(name="all" type="string" string="%syslogfacility-text%.%syslogseverity-text% \
%syslogtag%%msg%\\n")
*.* action(type="omfile" file="{0}/all.log" template="all")
"""


class Rsyslog(Server):
    def launch(self) -> None:
        config = self.write("rsyslog.conf", RSYSLOG.format(self.folder))
        self.socket = self.folder / "log"
        command = [need("rsyslogd", "rsyslog"), "-n", "-f", config, "-i", self.folder / "pid"]
        self.start(*command).wait_ready(self.socket.exists)

    def log(self) -> str:
        path = self.folder / "all.log"
        return path.read_text() if path.exists() else ""


# ---- Two rows of servers: a burst ----
#
# The frontend's Postfix hands mail on to the backend's, which gives it to Dovecot's LMTP server.
# That one keeps the quota, but what it refuses the backend has already accepted and must return to
# the sender: a bounce. A burst brings each mailbox many times what it can hold, over ten
# connections.

BURST_MESSAGE = b"Subject: burst\r\n\r\n" + 199 * (98 * b"x" + b"\r\n")  # 20 kB
BURST_FITS = 4  # such messages in a mailbox, each with the headers that the way adds
BURST_QUOTA = 90_000  # bytes
BURST_BACKEND_CF = """
relay_domains =
virtual_mailbox_domains = example.com
virtual_mailbox_maps = static:ok
virtual_transport = lmtp:inet:127.0.0.1:{port}
lmtp_destination_recipient_limit = 1
lmtp_destination_concurrency_limit = 2
"""


class Burst(NamedTuple):
    """What became of the recipients of a burst: those that were accepted came or bounced."""

    accepted: int
    refused: int
    delivered: int
    bounced: int
    reasons: list[str]  # the log's, of some that bounced


class TwoRows(Server):
    """A backend (Postfix, Dovecot, our CGI), and frontends that hand their mail on to it.

    `format` is Dovecot's; with `doveadm` our CGI asks Dovecot itself.
    """

    def __init__(self, format: str = "maildir", doveadm: bool = False) -> None:
        super().__init__()
        self.format, self.doveadm = format, doveadm
        self.bursts = 0

    def launch(self) -> None:
        self.dovecot = self.enter_context(Dovecot(BURST_QUOTA, format=self.format))
        main_cf = BUSY_CF + BURST_BACKEND_CF.format(port=self.dovecot.lmtp_port)
        self.backend = self.enter_context(Postfix(main_cf))
        maildirs = {"QUOTA_LIMIT": str(BURST_QUOTA)}
        maildirs["QUOTA_MAILDIR"] = f"{self.dovecot.homes}/%u/Maildir"
        settings = self.dovecot.asked if self.doveadm else maildirs
        environment = {**os.environ, "QUOTA_GRACE": "0", **settings}  # no grace, as Dovecot has it
        port = free_port()
        self.start(PYTHON, MAILDIR_CGI, "--serve", port, port=port, env=environment)
        self.url = f"http://127.0.0.1:{port}/"

    def frontend(self, checks: Mapping[str, str]) -> dict[str, int]:
        """Start a frontend and return the port that has each check, which is options of smtpd."""
        main_cf = f"{BUSY_CF}relay_transport = relay:[127.0.0.1]:{self.backend.port}\n"
        return self.enter_context(Postfix(main_cf, checks)).ports

    def burst(self, ports: Sequence[int], mailboxes: int, messages: int, sized: bool) -> Burst:
        """Fill new mailboxes over ten connections; wait until all that was accepted is settled."""
        self.bursts += 1
        users = [f"user{self.bursts}-{number}@example.com" for number in range(mailboxes)]
        chance = random.Random(messages)
        mail = [chance.choice(users) for _ in range(messages)]
        before = len(self.backend.log())

        def send_tenth(number: int) -> int:
            return send_all(ports[number % len(ports)], mail[number::10], sized)

        with ThreadPoolExecutor(10) as connections:
            accepted = sum(connections.map(send_tenth, range(10)))

        def settled() -> Any:
            time.sleep(0.2)
            log = self.backend.log()[before:]
            delivered = len(re.findall(r"postfix/lmtp\[.* status=sent ", log))
            bounces = re.findall(r".* status=bounced .*", log)
            if delivered + len(bounces) < accepted:
                return None
            refused = messages - accepted
            return Burst(accepted, refused, delivered, len(bounces), bounces[:3])

        burst = wait_for(settled, "the end of the burst", 300)
        assert isinstance(burst, Burst)
        return burst


def send_all(port: int, mail: Sequence[str], sized: bool) -> int:
    """Send a message to each recipient; return how many were accepted."""
    accepted, size = 0, [f"SIZE={len(BURST_MESSAGE)}"] if sized else []
    with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE) as client:
        client.ehlo("client.example.net")
        for recipient in mail:
            client.mail("sender@example.net", size)
            if client.rcpt(recipient)[0] == 250:
                accepted += client.data(BURST_MESSAGE)[0] == 250
            client.rset()
    return accepted
