"""Whatever is printed has lost what could control a terminal, whoever wrote it and whichever way it is printed."""

import ast
import io
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.live import Live
from rich.table import Table
from rich.text import Text

from farthing.base import terminal

EVIL = "\x1b]52;c;cm0gLXJm\x07 \x1b[2Jred\x9b31m\u202egnirts\u2066\tkept\r"
LEFT = "]52;c;cm0gLXJm [2Jred31mgnirts\tkept"
PACKAGE = Path(terminal.__file__).parents[1]


@given(text=st.text())
def test_harmless_text_has_no_controls_and_loses_nothing_else(text: str) -> None:
    left = terminal.harmless(text)
    assert all(unicodedata.category(letter) != "Cc" or letter in "\n\t" for letter in left)
    bidirectional = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    assert left == "".join(
        letter
        for letter in text
        if letter in "\n\t" or not (unicodedata.category(letter) == "Cc" or letter in bidirectional)
    )


def test_one_line_is_one_line() -> None:
    assert terminal.one_line(f"a\n{EVIL}\n\nb\u2028c") == "a ]52;c;cm0gLXJm [2Jred31mgnirts kept b c"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_any_text_can_be_said_in_any_encoding(encoding: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    terminal.say(f"{EVIL}\n½ → \ud800", out)
    out.seek(0)
    assert (
        out.read() == f"{LEFT}\n" + {"utf-8": "½ → ?", "ascii": "? ? ?", "latin-1": "½ ? ?"}[encoding] + "\n"
    )


def test_a_console_prints_no_escapes_but_its_own() -> None:
    out = io.StringIO()
    plain = terminal.console(file=out, width=200, color_system=None, force_terminal=False)
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(Text(EVIL))
    for shown in (EVIL, Text(EVIL), table):
        plain.print(shown)
    assert out.getvalue().count("red31mgnirts") == 5
    assert terminal.harmless(out.getvalue()) == out.getvalue()


def test_a_live_picture_still_moves_its_cursor() -> None:
    out = io.StringIO()
    shown = terminal.console(file=out, width=80, force_terminal=True, color_system="standard")
    with Live(Text(EVIL, style="bold"), console=shown, auto_refresh=False):
        pass
    assert "\x1b[1m" in out.getvalue()  # bold, by us
    assert "\x1b[2J" not in out.getvalue()
    assert "\x1b]52" not in out.getvalue()


def test_a_traceback_is_shown_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError(f"tensor {EVIL}") from ValueError(EVIL)
    except KeyError as error:
        terminal.show_traceback(type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert said.startswith("ValueError: ]52;c;")
    assert "Traceback (most recent call last)" in said
    assert terminal.harmless(said) == said


def test_what_libraries_warn_and_log_is_stripped_too() -> None:
    """In a process of its own: warnings, a logger with its own handler, tracebacks of threads, and what is printed."""
    code = """
import logging, sys, threading, warnings
from farthing.base.terminal import console, guard, say
guard()
guard()
evil = "\\x1b]52;c;x\\x07 \\x1b[2J\\x1b[31mred\\x9b31m\\u202egni\\rkept"
handler = logging.StreamHandler()
logging.getLogger("library").addHandler(handler)
logging.getLogger("library").warning(evil)
warnings.warn(evil)
def fail():
    raise KeyError(evil) from ValueError(evil)
thread = threading.Thread(target=fail)
thread.start()
thread.join()
sys.stderr.writelines([evil + "\\n"])
sys.stderr.write("\\r 50%")
sys.stderr.write("\\r100%\\n")
say(evil, sys.stderr)
console(force_terminal=True, color_system="standard").print("[bold]ours[/]")
raise RuntimeError(evil)
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, check=False)
    said = done.stderr.decode().replace("\x1b[1mours\x1b[0m", "ours")
    assert done.returncode == 1
    assert said.count("]52;c;x") == 7
    assert "\r 50%\r100%" in said, "a bar is drawn anew"
    assert terminal.harmless(said.replace("\r", "")) == said.replace("\r", "")
    assert "gnikept" in said
    assert said.count("ours") == 1


def test_nothing_prints_past_it() -> None:
    """Only this module, the chat (which passes every piece through `harmless`) and a verifier's worker write."""
    allowed = {"base/terminal.py", "serve/chat.py", "tasks/worker.py"}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("print", "typer.echo", "Console", "sys.stdout.write", "sys.stderr.write"), (
                f"{name}:{node.lineno}"  # type: ignore[attr-defined]
            )
