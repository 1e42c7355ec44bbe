"""Tests of quota_milter.py, quota.cgi and maildir_quota.cgi.

    python3 -m pytest test_quota.py

Real: Postfix, Sendmail, Apache, lighttpd, nginx, uWSGI, gunicorn, Dovecot, deliverquota,
miltertest, each an instance of its own on loopback in a temporary folder. Faked is only what cannot
be had for real: a backend that misbehaves. A test whose part is missing skips and names the Debian
package; with CI set in the environment it fails. Postfix and the others want root.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional, Union

import pytest

HERE = pathlib.Path(__file__).resolve().parent
MILTER = HERE / "quota_milter.py"
MBOX_CGI = HERE / "quota.cgi"
MAILDIR_CGI = HERE / "maildir_quota.cgi"
PYTHON = "/usr/bin/python3"  # the one that Debian's python3-milter is for
Path = Union[str, pathlib.Path]

# ---- helpers ----


def need(program: str, package: str) -> str:
    """Return the path of a program; skip the test (in CI: fail) where its package is missing."""
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/libexec")
    if found is None and os.path.exists(program):
        found = program
    if found is None:
        missing(f"{program} is missing: apt-get install {package}")
    return str(found)


def missing(why: str) -> None:
    """Skip a test for want of a part; in CI nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def need_root() -> None:
    """Skip where the test cannot start servers or change users."""
    if os.geteuid() != 0:
        missing("wants root")


def free_port() -> int:
    """Return a TCP port of loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    """Return the first true value that `condition` gives; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s for {what}")


def answers_at(port: int) -> bool:
    """Say whether somebody listens on this port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Process:
    """A program started for one test, its output (both streams) in a file."""

    def __init__(self, arguments: list[Path], log: pathlib.Path, **options: Any) -> None:
        self.log = log
        with open(log, "ab") as output:
            self.popen = subprocess.Popen(
                [str(argument) for argument in arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **options,
            )

    def output(self) -> str:
        """Return what the program has printed until now."""
        return self.log.read_text(errors="replace")

    def wait_ready(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for a sign of life; fail with the output where the program ends before it."""

        def alive() -> Any:
            assert self.popen.poll() is None, f"{what} ended: {self.output()}"
            return condition()

        wait_for(alive, what)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the program and its children; return the program's exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
            try:
                self.popen.wait(10)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self.popen.wait()


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Callable[..., Process]]:
    """Give a function that starts a program; all are stopped at the end, in reverse order."""
    started: list[Process] = []

    def start_program(*arguments: Path, port: Optional[int] = None, **options: Any) -> Process:
        log = tmp_path / f"output-{len(started)}.log"
        process = Process(list(arguments), log, **options)
        started.append(process)
        if port is not None:
            process.wait_ready(lambda: answers_at(port), f"{arguments[0]} on port {port}")
        return process

    yield start_program
    for process in reversed(started):
        process.stop()


class Response(NamedTuple):
    """What a CGI answered: HTTP status, the line without its end, the header, standard error."""

    status: int
    line: bytes
    header: str
    errors: str


def ask_cgi(
    script: pathlib.Path,
    query: Union[str, bytes],
    method: str = "GET",
    arguments: tuple[str, ...] = (),
    **settings: Path,
) -> Response:
    """Run a CGI as a web server does and read its answer."""
    environment: dict[bytes, bytes] = {
        b"GATEWAY_INTERFACE": b"CGI/1.1",
        b"REQUEST_METHOD": method.encode(),
        b"QUERY_STRING": query if isinstance(query, bytes) else query.encode(),
        b"PATH": b"/usr/bin:/bin",
    }
    environment.update((name.encode(), str(value).encode()) for name, value in settings.items())
    done = subprocess.run(
        [str(script), *arguments], env=environment, capture_output=True, timeout=60
    )
    header, _, body = done.stdout.partition(b"\n\n")
    status = header.partition(b"Status: ")[2][:3]
    errors = done.stderr.decode(errors="replace")
    return Response(int(status or 0), body.rstrip(b"\n"), header.decode(), errors)
