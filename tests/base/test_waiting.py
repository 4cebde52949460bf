import threading

import pytest

from farthing.base.waiting import FIRST, Waiting


def test_what_is_over_at_once_says_nothing() -> None:
    said: list[str] = []
    with Waiting("reading", said.append):
        pass
    assert said == []


def test_what_takes_long_says_so_again_and_again() -> None:
    said: list[str] = []
    thrice = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            thrice.set()

    with Waiting("reading", say, first=0.01, then=(0.01,)):
        assert thrice.wait(60)
    assert said[0].startswith("reading …")
    heard = len(said)
    assert all(text.startswith("reading …") for text in said)
    assert len(said) == heard  # nothing after the end


def test_it_ends_with_an_error_too() -> None:
    waiting = Waiting("reading", lambda _: None)
    with pytest.raises(ZeroDivisionError), waiting:
        raise ZeroDivisionError
    assert not waiting._thread.is_alive()


def test_the_first_line_comes_after_two_seconds() -> None:
    assert FIRST == 2.0


def test_the_time_left_is_said_as_soon_as_it_is_known() -> None:
    waiting = Waiting("asking", lambda _: None)
    assert waiting.line(2.0) == "asking …"
    assert waiting.line(30.0) == "asking … 30 s so far"
    waiting.at(1, 200)
    assert waiting.line(2.0) == "asking …"  # too early for an honest guess
    waiting.at(50, 200)
    assert waiting.line(30.0) == "asking: 50 of 200, 1.5 min left"
    waiting.at(200, 200)
    assert waiting.line(40.0) == "asking … 40 s so far"  # what is left is something else
