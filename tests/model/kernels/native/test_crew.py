"""The threads of a step: each helps where it can, and nobody waits for one that does not come."""

import os
import threading
import time

import pytest

from farthing.model.kernels.native.crew import Crew, crew, threads


def test_every_helper_is_called_and_keeps_nothing_alive():
    ours, seen, done = Crew(), [], threading.Semaphore(0)

    def run(words, thread):
        seen.append((words, thread))
        done.release()
        return 0

    class Owner:
        pass

    owner = Owner()
    ours.run(run, 7, 3, owner)
    assert (7, 0) in seen
    for _ in range(len(seen), 3):  # a helper that comes after the step has ended may find nothing to do
        done.acquire(timeout=0.2)
    assert {words for words, _ in seen} == {7}
    assert ours._step is None


def test_the_caller_does_not_wait_for_helpers():
    ours, held = Crew(), threading.Event()

    def run(words, thread):
        if thread:
            held.wait(60)
        return 0

    started = time.monotonic()
    ours.run(run, 0, 4, None)
    assert time.monotonic() - started < 30
    held.set()


def test_threads_are_no_more_than_the_container_grants(monkeypatch):
    monkeypatch.setattr("farthing.model.kernels.native.crew.cpu_cores", lambda: 1)
    assert threads() == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_a_crew_of_its_own():
    """Even if the lock was held when it was forked."""
    crew.run(lambda words, thread: 0, 0, 2, None)
    with crew._lock:
        child = os.fork()
        if not child:
            code = 1
            try:
                ran = []
                crew.run(lambda words, thread: ran.append(thread) or 0, 0, 1, None)
                code = 0 if ran == [0] else 2
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
