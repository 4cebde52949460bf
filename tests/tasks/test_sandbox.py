"""Attacks on the sandbox, in every way that it works here."""

import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from farthing.tasks import sandbox
from farthing.tasks.sandbox import WAYS, Protection, Ran, works

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox filters Linux's system calls")
MEGABYTES = 2**20


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Protection:
    how: Protection = request.param
    if not works(how):
        pytest.skip(f"{how} does not work here")
    return how


def run(way: Protection, code: str, seconds: float = 5, clock: float = 60, given: bytes = b"") -> Ran:
    return sandbox.run(
        ["-c", textwrap.dedent(code)], given, seconds=seconds, clock=clock, memory=512 * MEGABYTES, how=way
    )


def test_a_program_reads_computes_and_writes(way: Protection) -> None:
    code = """
        import sys, threading
        from fractions import Fraction
        open("own", "w").write(sys.stdin.read())
        worker = threading.Thread(target=lambda: print(open("own").read(), Fraction(1, 3)))
        worker.start()
        worker.join()
        sys.exit(3)
    """
    assert run(way, code, given="größer".encode()) == Ran(3, "größer 1/3\n".encode())


@pytest.mark.parametrize(
    "attack",
    [
        "os.fork()",
        "subprocess.run(['/bin/true'])",
        "multiprocessing.Process(target=print).start()",
        "socket.socket()",
        "socket.create_connection(('127.0.0.1', 80))",
        "urllib.request.urlopen('http://127.0.0.1/')",
        "os.kill(os.getppid(), 9)",
        "os.kill(-1, 9)",
        "os.killpg(os.getpgid(0), 9)",
        "os.setsid()",
        "os.setpgid(0, 0)",
        "os.chmod(sys.prefix, 0o777)",
        "os.mkfifo('fifo')",
        "bytearray(2**31)",
        "open('big', 'wb').write(bytes(2**26))",
        "[open(os.devnull) for _ in range(1000)]",
    ],
)
def test_what_no_solution_needs_fails(way: Protection, attack: str) -> None:
    imports = "import os, sys, socket, subprocess, multiprocessing, urllib.request"
    ran = run(way, f"{imports}\nprint('tried', flush=True)\n{attack}\nprint('done')")
    assert ran.output == b"tried\n"
    assert ran.code != 0


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/1/environ", __file__, "secret"])
def test_nothing_outside_can_be_read_or_written(way: Protection, path: str, tmp_path: Path) -> None:
    if way == "limits":
        pytest.skip("limits alone hide no files, as is said")
    if path == "secret":
        path = str(tmp_path / path)
        Path(path).write_text("a key")
    code = f"""
        import os
        try:
            os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}).read()
            print("read")
        except OSError:
            print("no")
        try:
            open({str(tmp_path / "made")!r}, "w")
            print("written")
        except OSError:
            print("no")
    """
    assert run(way, code) == Ran(0, b"no\nno\n")
    assert not (tmp_path / "made").exists()


def test_the_environment_is_not_passed_on(way: Protection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    ran = run(way, "import os; print(dict(os.environ))")
    assert ran.code == 0
    assert b"secret" not in ran.output


def test_python_itself_cannot_be_changed(way: Protection) -> None:
    if way == "limits":
        pytest.skip("limits alone protect no files, as is said")
    ran = run(
        way, "import os, sys\nopen(os.path.join(os.path.dirname(os.__file__), 'made_by_a_test.py'), 'w')"
    )
    assert ran.code == 1


def test_a_loop_and_a_sleep_end(way: Protection) -> None:
    assert run(way, "while True: pass", seconds=1).code not in (
        0,
        None,
    )  # by processor time, long before the clock
    assert run(way, "import time; time.sleep(1000)", clock=1) == Ran(None, b"")


def test_output_is_cut(way: Protection) -> None:
    ran = run(way, "import os\nwhile True: os.write(1, b'x' * 65536)")
    assert ran.code is None
    assert len(ran.output) <= MEGABYTES


def test_a_program_that_closes_its_output_is_still_ended(way: Protection) -> None:
    assert run(way, "import os, time\nos.close(1); os.close(2); time.sleep(1000)", clock=1).code is None


def test_a_program_that_reads_nothing_does_not_hang(way: Protection) -> None:
    assert run(way, "print(7)", given=b"x" * 10 * MEGABYTES) == Ran(0, b"7\n")


def test_nothing_is_left(way: Protection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sleeps = (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nopen('f', 'w')"
    )
    before = set(psutil.Process().children(recursive=True))  # a session's servers
    run(way, f"{sleeps}\ntime.sleep(1000)", clock=1)
    deadline = time.monotonic() + 60
    while (left := set(psutil.Process().children(recursive=True)) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert not list(tmp_path.iterdir())


def test_the_best_way_is_found_once() -> None:
    found = sandbox.protection()
    assert found in WAYS
    assert all(not works(better) for better in WAYS[: WAYS.index(found)])
