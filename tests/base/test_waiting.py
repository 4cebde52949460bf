import threading

import pytest

from farthing.base.waiting import FIRST, Transfer, Waiting


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


def test_a_download_shows_a_bar_and_the_time_left() -> None:
    at = [0, 0]
    transfer = Transfer("downloading x", lambda: (at[0], at[1]))
    assert transfer.line(2.0) == "downloading x …"
    at[0] = 5_000_000
    assert transfer.line(2.0) == "downloading x: 5 MB so far"
    at[1] = 93_000_000
    assert transfer.line(10.0) == "downloading x █░░░░░░░░░░░░░░░░░░░ 5 MB of 93 MB, 2.9 min left"
    at[0] = 93_000_000
    assert transfer.line(10.0) == "downloading x: 93 MB so far"


def test_a_download_speaks_for_what_it_is_a_part_of() -> None:
    said: list[str] = []
    downloading = "downloading x: 1 bytes so far"
    often, later, over = threading.Event(), threading.Event(), threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if said.count(downloading) >= 20:
            often.set()
        if over.is_set() and text.startswith("loading"):
            later.set()

    with Waiting("loading", say, first=0.001, then=(0.001,)):
        inner = Transfer("downloading x", lambda: (1, 0))
        inner._pauses = [0.001]
        with inner:
            assert often.wait(60)
        over.set()
        assert later.wait(60), "it goes on by itself"
    spoken = said[said.index(downloading) : len(said) - said[::-1].index(downloading)]
    assert sum(text.startswith("loading") for text in spoken) <= 1, "but for one that had begun"


def test_a_download_of_its_own_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    transfer = Transfer("downloading\x1b[2J x", lambda: (1, 0))
    transfer._say(transfer.line(3.0))
    assert capsys.readouterr().err == "downloading[2J x: 1 bytes so far\n"
