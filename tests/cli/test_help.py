"""Help, completion, and asking before anything is overwritten."""

import gc
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from farthing.base.errors import UserError
from farthing.base.waiting import Waiting
from farthing.cli import app
from farthing.cli.shared import may_overwrite, only_results_on_stdout, starting

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def said(*words: str, **settings: str) -> str:
    done = CliRunner().invoke(app, list(words), env=settings, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("columns", ["40", "60", "80", "200"])
def test_help_cuts_no_description(columns: str) -> None:
    text = "".join(said("--help", COLUMNS=columns).split())  # a line may end at a hyphen
    assert "..." not in text.replace("[ARGS]...", "")
    assert "…" not in text
    for name, command in COMMANDS.items():
        sentence = "".join(command.help.partition("\n\n")[0].partition(". ")[0].split())
        assert sentence in text, name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_farthing_help_is_the_commands_help(name: str) -> None:
    assert said("help", name).split() == said(name, "--help").split()


def test_help_alone_lists_the_commands() -> None:
    assert said("help") == said("--help")
    wrong = CliRunner().invoke(app, ["help", "rnu"])
    assert isinstance(wrong.exception, UserError)
    assert str(wrong.exception) == "rnu: no such command; did you mean run?"
    assert "lists them" in str(CliRunner().invoke(app, ["help", "zzzz"]).exception)


def test_the_version_in_short() -> None:
    assert said("-V") == said("--version")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ex", ["export"]),
        ("run qui", ["quickstart"]),
        ("run --dr", ["--dry-run"]),
        ("eval ol", ["older"]),
        ("claim deepseek-v3", ["deepseek-v3"]),
        ("export older --to hf", ["hf-bf16", "hf-fp8"]),
    ],
)
def test_a_shell_completes(line: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "older").mkdir(parents=True)
    words = f"farthing {line}"
    asked = {"_FARTHING_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-m", "farthing"],
        env=os.environ | asked,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(expected) <= set(done.stdout.split())
    assert all(word.startswith(line.split()[-1]) for word in done.stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown(shell: str) -> None:
    asked = {"_FARTHING_COMPLETE": f"source_{shell}"}
    done = subprocess.run(
        [sys.executable, "-m", "farthing"], env=os.environ | asked, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "_FARTHING_COMPLETE=complete_" in done.stdout


# ---- overwriting ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], io.StringIO]:
    """Somebody who types this at a terminal; gives what they are asked."""

    def typed(text: str) -> io.StringIO:
        shown = Terminal()
        monkeypatch.setattr(sys, "stdin", Terminal(text))
        monkeypatch.setattr(sys, "stderr", shown)
        return shown

    return typed


def test_what_is_not_there_is_not_asked_about(tmp_path: Path) -> None:
    may_overwrite(tmp_path / "new")
    may_overwrite(tmp_path)  # an empty folder


@pytest.mark.parametrize("text", ["y\n", "YES\n", " yes \n"])
def test_yes_overwrites(text: str, answer: Callable[[str], io.StringIO], tmp_path: Path) -> None:
    (tmp_path / "m\x1b[2J.gguf").touch()
    shown = answer(text)
    may_overwrite(tmp_path / "m\x1b[2J.gguf")
    assert shown.getvalue() == f"{tmp_path}/m[2J.gguf exists; overwrite it? [y/N] "


@pytest.mark.parametrize("text", ["\n", "n\n", "yesterday\n", ""])
def test_anything_else_does_not(text: str, answer: Callable[[str], io.StringIO], tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    answer(text)
    with pytest.raises(UserError, match="is left as it was; give another --out"):
        may_overwrite(tmp_path / "m.gguf")


def test_without_a_terminal_nothing_is_overwritten_unless_forced(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("mine")
    words = ["export", str(tiny_model), "--to", "gguf", "--out", str(out)]
    refused = CliRunner().invoke(app, words)
    assert str(refused.exception) == f"{out} exists; give another --out, or --force to overwrite it"
    assert out.read_text() == "mine"
    assert CliRunner().invoke(app, [*words, "--force"]).exit_code == 0
    assert out.read_bytes()[:4] == b"GGUF"


# ---- waiting ----


def test_a_log_is_not_told_that_libraries_are_loaded_and_a_terminal_is(
    answer: Callable[[str], io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_told(quiet: bool = False) -> bool:
        with starting(quiet):
            return any(thread.name == "waiting" for thread in threading.enumerate())

    assert not is_told()
    answer("")
    assert is_told()
    assert not is_told(quiet=True)


def test_no_garbage_is_looked_for_while_libraries_are_loaded() -> None:
    with starting():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="x"), starting():
        raise ValueError("x")
    assert gc.isenabled()


def test_work_that_takes_long_is_said_in_a_log_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paused: list[float] = []

    def watched(self: Waiting) -> None:
        paused.append(self._pauses[0])
        self._say(self.line(2.0))

    monkeypatch.setattr(Waiting, "_watch", watched)
    with only_results_on_stdout("reading x\x1b[2J"):
        pass
    with only_results_on_stdout("planning x", libraries=True):
        pass
    with only_results_on_stdout():
        pass
    assert paused == [2.0, 10.0]
    assert capsys.readouterr().err == "reading x[2J …\nplanning x …\n"
