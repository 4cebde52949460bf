import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from farthing.recipe import Grpo, Pretrain
from farthing.report.live import LiveView, sparkline


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "reward": 0.25,
        "right": 0.5,
        "unparsed": 0.1,
        "cut_off": 0.0,
        "silent": 0.25,
        "entropy": 1.5,
        "kl": None,
        "length": 12.0,
        "lr": 1e-5,
        "grad_norm": 0.5,
        "clip_fraction": 0.0,
        "tokens_per_second": 812.0,
        "seconds": 4.0,
        "seconds_by_activity": {"generate": 3.0, "train": 1.0},
        "usd_so_far": 0.0012,
        **changes,
    }


def console(terminal: bool, width: int = 90) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=terminal, width=width, height=20, _environ={}), output


def test_without_a_terminal_each_step_is_one_plain_line() -> None:
    to, output = console(terminal=False, width=40)
    with LiveView(5, Grpo.curves, to) as view:
        for step in (1, 2, 3):
            view.update(metrics(step))
        view.note("synced [bold]again[/bold]")
    lines = output.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(
        "step 1/5  reward 0.25  right 50.0%  silent 25.0%  entropy 1.5  length 12  tokens/s 812"
    )
    assert lines[0].endswith("spent $0.0012  left –")
    assert lines[2].endswith("left 8.0 s")
    assert lines[3] == "synced [bold]again[/bold]"
    assert "\x1b" not in output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_writes_nothing(terminal: bool) -> None:
    to, output = console(terminal)
    with LiveView(5, Grpo.curves, to, quiet=True) as view:
        view.update(metrics(1))
        view.note("hello")
    assert output.getvalue() == ""


@pytest.mark.parametrize("width", [30, 60, 90, 200])
def test_a_terminal_shows_the_picture_within_its_width(width: int) -> None:
    to, output = console(terminal=True, width=width)
    with LiveView(40, Grpo.curves, to) as view:
        for step in range(1, 31):
            view.update(metrics(step, reward=step / 30, right=step / 60))
        view.note("sync proof passed")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert "sync proof passed" in shown
    assert all(len(line) <= width for line in re.split(r"[\r\n]+", shown))
    last = shown[shown.rindex("step 30/40") :]
    assert "left 40 s" in last or width < 40
    if width >= 60:
        for words in ("spent $0.0012", "reward", "█", "50.0%", "entropy 1.5", "generate 75% · train 25%"):
            assert words in last


def test_the_time_left_is_not_guessed_at_the_start() -> None:
    view = LiveView(100, Grpo.curves, console(terminal=False)[0])
    assert view.seconds_left() is None
    for step, seconds in ((1, 60.0), (2, 2.0)):  # the first step compiles
        view.update(metrics(step, seconds=seconds))
        assert view.seconds_left() is None
    view.update(metrics(3, seconds=2.0))
    assert view.seconds_left() == 2.0 * 97


def test_the_time_left_follows_a_change_of_pace_and_a_continued_run() -> None:
    view = LiveView(100, Grpo.curves, console(terminal=False)[0])
    for step in range(41, 81):
        view.update(metrics(step, seconds=1.0 if step <= 60 else 3.0))
    assert view.seconds_left() == 3.0 * 20
    view.update(metrics(100))
    assert view.seconds_left() == 0


def test_the_cursor_comes_back_when_training_fails() -> None:
    to, output = console(terminal=True)

    def fail() -> None:
        with LiveView(5, Grpo.curves, to) as view:
            view.update(metrics(1))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert output.getvalue().count("\x1b[?25l") == output.getvalue().count("\x1b[?25h") == 1


def test_missing_and_odd_numbers_are_dashes() -> None:
    to, output = console(terminal=False)
    with LiveView(5, Grpo.curves, to) as view:
        view.update({"step": 1, "reward": None, "right": float("nan"), "entropy": float("inf")})
    assert "reward –  right –  entropy –" in output.getvalue()


def test_an_ascii_log_does_not_end_the_run() -> None:
    raw = io.BytesIO()
    output = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    with LiveView(5, Grpo.curves, Console(file=output, width=80, _environ={})) as view:
        view.update(metrics(1))
        view.note("café")
    output.flush()
    assert b"left ?\ncaf?\n" in raw.getvalue()


def test_sparkline_bounds() -> None:
    assert sparkline([0, 0.5, 1]) == "▁▅█"
    assert sparkline([0.5, None, float("nan"), 2], (0, 1)) == "▅  █"
    assert sparkline([3, 3]) == "▅▅"
    assert sparkline([None]) == " "
    assert sparkline([]) == ""


@given(st.lists(st.none() | st.floats()))
def test_a_sparkline_has_one_character_a_value(values: list[float | None]) -> None:
    assert len(sparkline(values)) == len(values)


def test_a_stage_that_predicts_text_shows_its_loss_in_a_hundred_lines_at_most() -> None:
    plain, out = console(False)
    with LiveView(1000, Pretrain.curves, plain) as view:
        for step in range(1, 1001):
            line = {"step": step, "loss": 3.0, "tokens": step * 10, "tokens_per_second": 50.0, "seconds": 0.1}
            view.update(line | ({"val_bits_per_byte": 1.25} if step % 200 == 0 else {}))
    lines = out.getvalue().splitlines()
    assert len(lines) == 100
    assert lines[-1].startswith("step 1000/1000  loss 3  bits per byte 1.25  tokens 10K  tokens/s 50")
    assert "reward" not in out.getvalue()


def test_a_terminal_draws_the_loss() -> None:
    terminal, out = console(True)
    with LiveView(2, Pretrain.curves, terminal) as view:
        view.update({"step": 1, "loss": 3.0})
        view.update({"step": 2, "loss": 1.5})
    assert "loss" in out.getvalue()
    assert "reward" not in out.getvalue()


def test_the_parts_of_a_reward_are_shown_beside_it() -> None:
    for terminal in (False, True):
        to, output = console(terminal, width=200)
        with LiveView(5, Grpo.curves, to) as view:
            for step, reward in ((1, 0.0), (2, 0.25), (3, 0.5)):
                view.update(metrics(step, reward_parts={"format": reward, "[b]length[/b]": -0.25}))
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
        assert re.search("format +0.5  ▁▅█" if terminal else "format 0.5", shown)
        assert re.search(r"\[b\]length\[/b\] +−0.25", shown)


def test_the_only_part_of_a_reward_is_the_reward() -> None:
    for terminal in (False, True):
        to, output = console(terminal, width=200)
        with LiveView(5, Grpo.curves, to) as view:
            view.update(metrics(1, reward_parts={"number": 0.5}))
        assert "number" not in output.getvalue()
