"""Programs that nobody has read, run in a new process each: no network, no files, no further processes, and limits.

What holds them is the first of these that works: bubblewrap, namespaces of the kernel, Landlock (Linux 5.13), or limits
alone. System calls are filtered in all four, on Linux for x86_64 and aarch64. `protection` says which it is.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_JAIL = Path(__file__).with_name("jail.py")
_OUTPUT = 2**20  # bytes of output that are read
_TRY = 20.0  # seconds to find out what works
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
_SCRATCH = "/tmp/scratch"
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_SCRATCH_BYTES = 64 * 2**20

Protection = Literal["bubblewrap", "namespaces", "landlock", "limits"]
WAYS: tuple[Protection, ...] = ("bubblewrap", "namespaces", "landlock", "limits")
WEAK = (
    "the sandbox of `code` has limits of time, memory and processes here, and nothing that hides files: a program can "
    "read and write those of this user; install bubblewrap, or allow user namespaces"
)
"""What is said where there are limits alone."""


@dataclass(frozen=True)
class Ran:
    """How a program ended: its exit code (None where a limit ended it), and the beginning of its output."""

    code: int | None
    output: bytes


def run(
    argv: list[str],
    given: bytes = b"",
    *,
    seconds: float,
    clock: float,
    memory: int,
    how: Protection | None = None,
) -> Ran:
    """Run Python with `argv` as its arguments.

    Args:
        given: what the program reads.
        seconds: of processor time.
        clock: seconds of waiting; more than `seconds`, where machines are shared.
        memory: bytes of address space.
        how: what holds the program; the best that works here if not given.
    """
    how = how or protection()
    with tempfile.TemporaryDirectory(prefix="farthing-") as folder:
        command = _command(argv, folder, max(1, round(seconds)), memory, how)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=folder,
            env={},
            close_fds=True,
        )
        try:
            return _talk(process, given, clock)
        finally:
            _end(process)


@functools.cache
def protection() -> Protection:
    """The best of the ways that works here; tried once a process."""
    return next((how for how in WAYS[:-1] if works(how)), "limits")


def works(how: Protection) -> bool:
    """Whether a program runs in this way."""
    if how == "bubblewrap" and shutil.which("bwrap") is None:
        return False
    try:
        return run(["-c", "print(7)"], seconds=5, clock=_TRY, memory=2**29, how=how) == Ran(0, b"7\n")
    except OSError:
        return False


def readable() -> list[str]:
    """What a program may read: the system's programs and libraries, and Python with its packages."""
    own = {
        os.path.realpath(path)
        for path in (sys.base_prefix, sys.prefix, os.path.dirname(os.path.realpath(_python())))
    }
    places = [*_SYSTEM, *sorted(own, key=len)]
    kept: list[str] = []
    for path in places:
        inside = any(os.path.commonpath([path, other]) == other for other in kept)
        if path != "/" and not inside and os.path.exists(path):
            kept.append(path)
    return kept


def _python() -> str:
    """This Python, by a path without links in its folder."""
    return os.path.join(os.path.realpath(os.path.dirname(sys.executable)), os.path.basename(sys.executable))


def _command(argv: list[str], folder: str, seconds: int, memory: int, how: Protection) -> list[str]:
    python = _python()
    scratch = _SCRATCH if how in ("bubblewrap", "namespaces") else folder
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": scratch,
        "TMPDIR": scratch,
        "LANG": "C.UTF-8",
        **_ONE_THREAD,
    }
    told = {
        "argv": [python, "-I", "-B", *argv],
        "env": environment,
        "namespaces": how == "namespaces",
        "landlock": how == "landlock",
        "seccomp": sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64"),
        "memory": memory,
        "cpu": seconds,
        "root": folder,
        "scratch": scratch,
        "readable": readable(),
    }
    inner = [python, "-I", "-S", "-B"]
    if how != "bubblewrap":
        return [*inner, str(_JAIL), json.dumps(told)]
    binds = [part for path in readable() for part in _shown(path)]
    return [
        str(shutil.which("bwrap")), "--unshare-all", "--die-with-parent", "--new-session", "--clearenv",
        "--uid", "1000", "--gid", "1000", "--dev", "/dev", "--tmpfs", "/tmp", *binds,
        "--size", str(_SCRATCH_BYTES), "--tmpfs", scratch,
        "--ro-bind", str(_JAIL), "/tmp/jail.py", "--chdir", scratch, "--remount-ro", "/",
        *inner, "/tmp/jail.py", json.dumps(told),
    ]  # fmt: skip


def _shown(path: str) -> list[str]:
    return ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]


def _talk(process: subprocess.Popen[bytes], given: bytes, clock: float) -> Ran:
    assert process.stdin
    assert process.stdout
    left, output, until = memoryview(given), bytearray(), time.monotonic() + clock
    for stream in (process.stdin, process.stdout):
        os.set_blocking(stream.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if left:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        else:
            process.stdin.close()
        while True:
            ready = selector.select(max(0.0, until - time.monotonic()))
            if time.monotonic() > until or len(output) > _OUTPUT:
                return Ran(None, bytes(output[:_OUTPUT]))
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    left = left[_written(process.stdin.fileno(), left) :]
                    if not left:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                arrived = os.read(process.stdout.fileno(), 1 << 16)
                output += arrived
                if not arrived:  # every end of the pipe is closed
                    return Ran(_ended(process, until), bytes(output))


def _written(pipe: int, left: memoryview) -> int:
    try:
        return os.write(pipe, left[: 1 << 16])
    except BrokenPipeError:
        return len(left)


def _ended(process: subprocess.Popen[bytes], until: float) -> int | None:
    try:
        return process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and all of its group, whatever state they are in."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()
