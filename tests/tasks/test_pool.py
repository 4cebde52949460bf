"""Killable verification: limits, deaths, order, orphans."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from farthing.tasks.item import Item, Verdict
from farthing.tasks.pool import VerifierPool

FUNCTIONS = """
    import os, time
    from farthing.tasks.item import Verdict
    from farthing.tasks.verify import verify

    def naughty(item, text, convention):
        print("noise on stdout", flush=True)
        if text == "hang":
            while True:
                pass
        if text == "sleep":
            time.sleep(1000)
        if text == "die":
            os._exit(3)
        if text == "die once" and not os.path.exists(item.question):
            open(item.question, "w").close()
            os._exit(3)
        if text == "hoard":
            return Verdict("right", str(len(bytearray(8 * 2**30))))
        if text == "raise":
            raise KeyError("a bug of ours")
        if text == "stop once" and not os.path.exists(item.question):
            open(item.question, "w").close()
            os.kill(os.getpid(), 19)  # SIGSTOP: as a frozen machine, or one that swaps
            return verify(item, "it is 7", convention)
        if text == "stop once":
            return verify(item, "it is 7", convention)
        if text == "slow":
            time.sleep(0.5)
        if text == "modules":
            import sys
            return Verdict("wrong", " ".join(sys.modules))
        return verify(item, text, convention)
"""


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "naughty_functions.py").write_text(textwrap.dedent(FUNCTIONS))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "naughty_functions.naughty"


@pytest.fixture
def naughty(function: str) -> Iterator[VerifierPool]:
    with VerifierPool(timeout=2, function=function) as pool:
        yield pool


def item(answer: str = "7", question: str = "") -> Item:
    return Item("made_up", 0, 0, question, answer, {"scorer": "integer"})


def outcomes(pool: VerifierPool, texts: list[str], question: str = "") -> list[str]:
    return [
        verdict.outcome for verdict in pool.verify([(item("7", question), text) for text in texts], "final")
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_order_is_kept_and_the_pool_is_used_again(workers: int) -> None:
    with VerifierPool(workers) as pool:
        for count in (0, 1, 3, 500):
            pairs = [(item(str(n)), f"it is {n if n % 3 else n + 1}") for n in range(count)]
            expected = [
                Verdict("right" if n % 3 else "wrong", str(n if n % 3 else n + 1)) for n in range(count)
            ]
            assert pool.verify(pairs, "final") == expected


@pytest.mark.parametrize("trouble", ["hang", "sleep", "die"])
def test_trouble_costs_one_verdict_and_the_neighbours_keep_theirs(
    naughty: VerifierPool, trouble: str
) -> None:
    texts = ["it is 7", "it is 8", trouble, "it is 7", trouble, "no"]
    assert outcomes(naughty, texts) == ["right", "wrong", "timeout", "right", "timeout", "unparsed"]
    assert outcomes(naughty, ["it is 7"]) == ["right"]


def test_hanging_workers_are_killed(function: str) -> None:
    with VerifierPool(timeout=2, function=function) as pool:
        before = children(os.getpid())
        assert outcomes(pool, ["hang", "it is 7"]) == ["timeout", "right"]
        assert not before & children(os.getpid())


def test_an_innocent_item_survives_a_death(naughty: VerifierPool, tmp_path: Path) -> None:
    assert outcomes(naughty, ["it is 7", "die once", "it is 7"], str(tmp_path / "died")) == [
        "right", "unparsed", "right",
    ]  # fmt: skip


def test_a_frozen_verifier_unpays_nothing(naughty: VerifierPool, tmp_path: Path) -> None:
    texts = ["it is 7", "stop once", "it is 7"]
    assert outcomes(naughty, texts, str(tmp_path / "stopped")) == ["right"] * 3
    assert (tmp_path / "stopped").exists()


def test_a_slow_machine_gets_twice_the_time(function: str) -> None:
    with VerifierPool(timeout=0.3, function=function) as pool:
        assert outcomes(pool, ["slow", "it is 7"]) == ["unparsed", "right"]  # half a second


def test_a_worker_killed_between_calls_is_replaced(naughty: VerifierPool) -> None:
    assert outcomes(naughty, ["it is 7"]) == ["right"]
    for pid in children(os.getpid()):
        os.kill(pid, signal.SIGKILL)
    assert outcomes(naughty, ["it is 7"]) == ["right"]


def test_waiting_in_the_queue_is_no_timeout(naughty: VerifierPool) -> None:
    assert outcomes(naughty, ["slow"] * 6) == ["unparsed"] * 6  # 3 s in all, 2 s allowed for each


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce RLIMIT_AS")
def test_memory_is_limited(naughty: VerifierPool) -> None:
    assert outcomes(naughty, ["hoard", "it is 7"]) == ["timeout", "right"]


def test_a_bug_of_ours_is_not_swallowed(naughty: VerifierPool) -> None:
    with pytest.raises(RuntimeError, match="a bug of ours"):
        outcomes(naughty, ["it is 7", "raise", "it is 7"])
    assert outcomes(naughty, ["it is 7"]) == ["right"]


def test_a_function_that_does_not_exist_is_reported() -> None:
    with (
        VerifierPool(function="farthing.tasks.verify.nothing") as pool,
        pytest.raises(RuntimeError, match="does not start"),
    ):
        outcomes(pool, ["7"])


def test_workers_import_nothing_heavy(naughty: VerifierPool) -> None:
    [verdict] = naughty.verify([(item(), "modules")], "final")
    assert verdict.answer
    assert not {"torch", "transformers", "reasoning_gym", "numpy"} & set(verdict.answer.split())


def test_large_and_odd_texts_pass_through() -> None:
    texts = ["9" * 1_000_000, "\ud800 \x00 ½", "it is 7\n" * 200_000, "is 7"]
    with VerifierPool() as pool:
        assert outcomes(pool, texts) == ["unparsed", "unparsed", "right", "right"]
        assert len(outcomes(pool, ["\ud800" * 20_000] * 80)) == 80


def test_nothing_is_left_after_close(function: str) -> None:
    with VerifierPool(2, function=function) as pool:
        outcomes(pool, ["it is 7"])
        assert len(children(os.getpid())) == 2
    assert not children(os.getpid())
    pool.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("busy", ["sleep", "hang"])
def test_no_orphan_and_no_traceback_when_the_parent_goes(
    function: str, tmp_path: Path, how: int, busy: str
) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from farthing.tasks.item import Item
        from farthing.tasks.pool import VerifierPool
        item = Item("made_up", 0, 0, "", "7", {{"scorer": "integer"}})
        try:
            with VerifierPool(2, timeout=60, function={function!r}) as pool:
                pool.verify([(item, "is 7")], "final")
                print("ready", flush=True)
                pool.verify([(item, {busy!r})] * 2, "final")
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout
    assert parent.stderr
    line = parent.stdout.readline()
    while line == "noise on stdout\n":
        line = parent.stdout.readline()
    assert line == "ready\n"
    time.sleep(0.3)
    workers = children(parent.pid)
    assert len(workers) == 2
    os.killpg(parent.pid, how)  # as the terminal does: to the whole foreground group
    out, errors = parent.communicate(timeout=1200)
    if how == signal.SIGINT:
        assert out == "interrupted\n"
    assert "Traceback" not in errors
    deadline = time.monotonic() + 1200
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in workers)


def children(pid: int) -> set[int]:
    """Processes that a process has started, but for those that it had before the test."""
    import psutil

    return {child.pid for child in psutil.Process(pid).children(recursive=True)} - OTHERS


OTHERS: set[int] = set()  # a session's servers


@pytest.fixture(autouse=True)
def others() -> None:
    OTHERS.clear()
    OTHERS.update(children(os.getpid()))


def alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
