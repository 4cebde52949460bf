import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

import farthing
from farthing import cli
from farthing.base.errors import UserError
from farthing.base.terminal import harmless
from farthing.recipe import load

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Run `farthing ARGUMENTS` in this process, in an empty folder: gives (exit code, stdout, stderr)."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)

    def farthing_command(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["farthing", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, output.out, output.err

    yield farthing_command
    signal.signal(signal.SIGTERM, handler)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """Put a stand-in where the command will import the real, slow thing."""
    stand_in = ModuleType(name)
    vars(stand_in).update(contents)
    monkeypatch.setitem(sys.modules, name, stand_in)


def python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], text=True, **options)


# ---- starting ----


def test_the_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys, farthing.cli, farthing.recipe, farthing.serve.chat; farthing.recipe.load('quickstart');"
        "print([m for m in ('torch', 'transformers', 'reasoning_gym', 'numpy', 'rich') if m in sys.modules])"
    )
    assert python(code, stdout=subprocess.PIPE).communicate(timeout=1200)[0] == "[]\n"


def test_python_m_farthing_is_farthing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "farthing", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("farthing 0")


def test_help_lists_the_commands(run: Run) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        assert [word for word in ("run", "chat", "eval", "recipes") if f"  {word} " not in out] == []
    assert "--set" in run("run", "--help")[1]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["walk"], "No such command 'walk' (see farthing --help)"),
        (["run"], "Missing argument"),
        (["run", "quickstart", "--sed", "1"], "(see farthing run --help)"),
        (["run", "quickstart", "--seed", "x"], "(see farthing run --help)"),
        (["chat", "x", "--temperature", "-1"], "(see farthing chat --help)"),
        (["run", "quickstrat"], "did you mean quickstart?"),
        (["run", "quickstart", "--set", "stages.1.learning_rate=1"], "did you mean lr?"),
        (["run", "quickstart", "--set", "stages.1.learning_rate=1", "--json"], "did you mean lr?"),
        (["eval", "x"], "needs either --tasks"),
        (["eval", "x", "--tasks", "a", "--recipe", "quickstart"], "needs either --tasks"),
        (["eval", "x", "--tasks", ","], "tasks: must not be empty"),
        (["eval", "", "--tasks", "chain_sum"], "the source is empty"),
        (["eval", "x", "--tasks", "a=-1"], "tasks.a: must be above 0"),
        (["chat"], "no finished run under runs/"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("farthing: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a bug, not a mistake")

    module(monkeypatch, "farthing.runs", run=broken)
    with pytest.raises(ValueError, match="a bug"):
        run("run", "quickstart")


# ---- run ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "\x1b]0;owned\x07"],
        ["run", "quickstart", "--set", "\x1b[2Jlr=1"],
        ["plan", "\x9b31mred", "--tokens", "1T"],
        ["plan", "quickstart", "--gpu", "\u202egnirts"],
        ["inspect", "no\x1b[1Afolder"],
        ["ledger", "run\x1b[8m\nof two lines"],
        ["claim", "\x1b[31mclaim"],
        ["\x1b[31mcommand"],
        ["run", "--\x1b[31moption"],
    ],
)
def test_no_escape_of_an_argument_reaches_the_terminal(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert harmless(err) == err


def test_a_bug_that_quotes_a_file_shows_no_escapes() -> None:
    code = """
import sys, farthing.recipe
from farthing import cli
farthing.recipe.builtin = lambda: (_ for _ in ()).throw(RuntimeError("\\x1b]0;owned\\x07"))
sys.argv = ["farthing", "recipes"]
cli.main()
"""
    process = python(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "RuntimeError: ]0;owned" in err
    assert harmless(err) == err


def test_a_hub_that_cannot_be_reached_is_one_line() -> None:
    code = """
import sys, time
from farthing import cli
time.sleep = lambda seconds: None  # between the library's retries
sys.argv = ["farthing", "plan", "hf:no/such", "--tokens", "1T"]
cli.main()
"""
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    process = python(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | nowhere)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2
    waits = [line for line in err.splitlines() if line.startswith("planning hf:no/such …")]
    assert len(err.splitlines()) == len(waits) + 1


def test_dry_run_prints_the_recipe_that_would_run(run: Run, tmp_path: Path) -> None:
    changes = ["--set", "stages.grpo.lr=2e-5", "--set", "stages.1.steps=3", "--seed", "9"]
    code, out, err = run("run", "quickstart", "--dry-run", *changes)
    assert (code, err) == (0, "")
    (tmp_path / "printed.yaml").write_text(out)
    recipe = load("quickstart", ["stages.1.lr=2e-5", "stages.1.steps=3"], seed=9)
    assert load(tmp_path / "printed.yaml") == recipe
    code, out, _ = run("run", "quickstart", "--dry-run", "--json", *changes)
    assert (
        json.loads(out) == recipe.model_dump(mode="json") == yaml.safe_load(yaml.safe_dump(json.loads(out)))
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "printed.yaml"]


def test_run_hands_over_and_prints_the_run_directory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stand_in(recipe: Any, run_dir: Path | None, quiet: bool) -> Any:
        seen.append((recipe, run_dir, quiet))
        print("a library's chatter")
        return SimpleNamespace(run_dir=Path("runs/quickstart"), results={"usd": 0.01})

    module(monkeypatch, "farthing.runs", run=stand_in)
    assert run("run", "quickstart") == (0, "runs/quickstart\n", "a library's chatter\n")
    code, out, _ = run("run", "quickstart", "--run-dir", "elsewhere", "--quiet", "--json", "--seed", "3")
    assert code == 0
    assert json.loads(out) == {"run_dir": "runs/quickstart", "usd": 0.01}
    assert out.count("\n") == 1
    assert seen == [
        (load("quickstart"), None, False),
        (load("quickstart", seed=3), Path("elsewhere"), True),
    ]


def test_an_interrupted_run_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    module(monkeypatch, "farthing.runs", run=interrupted)
    line = "farthing: interrupted; run the same command again to continue\n"
    assert run("run", "quickstart") == (130, "", line)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_pressed_again_and_again_it_is_one_sentence(kind: signal.Signals, tmp_path: Path) -> None:
    code = """
import atexit, os, signal, sys, time, types
kind = signal.Signals(int(sys.argv.pop(1)))
def press():
    os.kill(os.getpid(), kind)
    time.sleep(0.01)
def run(*_):
    try:
        press()
    finally:
        press()
sys.modules["farthing.runs"] = types.ModuleType("farthing.runs")
sys.modules["farthing.runs"].run = run
atexit.register(press)
import farthing.cli
log = farthing.cli.log
farthing.cli.log = lambda text: (press(), log(text), press())
farthing.cli.main()
"""
    process = python(code, str(int(kind)), "run", "quickstart", cwd=tmp_path, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=60)
    assert errors == "farthing: interrupted; run the same command again to continue\n"
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(28, "No space left on device", "x/y"),
            "x/y: no disk space left; free some space or choose another",
        ),
        (OSError(27, "File too large"), "a file may not be that large here, see `ulimit -f`"),
        (OSError(36, "File name too long", "x" * 300), "File name too long"),
        (
            PermissionError(13, "Permission denied", "x"),
            "x: Permission denied; change that or choose another place",
        ),
        (MemoryError(), "there is not enough memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "there is not enough memory",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_sentence_and_exit_2(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def refused(*_: Any) -> None:
        raise error

    module(monkeypatch, "farthing.runs", run=refused)
    code, out, errors = run("run", "quickstart")
    assert (code, out) == (2, "")
    assert errors.startswith("farthing: ")
    assert line in errors
    assert errors.count("\n") == 1
    assert len(errors) < 250


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_unwind_and_exit_130(kind: signal.Signals, tmp_path: Path) -> None:
    code = """
import pathlib, sys, time, types
def run(*_):
    try:
        print("started", file=sys.stderr, flush=True)
        time.sleep(60)
    finally:
        pathlib.Path("tidy").write_text("tidied")
sys.modules["farthing.runs"] = types.ModuleType("farthing.runs")
sys.modules["farthing.runs"].run = run
import farthing.cli
farthing.cli.main()
"""
    process = python(code, "run", "quickstart", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline() == "started\n"
    process.send_signal(kind)
    out, err = process.communicate(timeout=1200)
    assert (process.returncode, out) == (130, "")
    assert err == "farthing: interrupted; run the same command again to continue\n"
    assert (tmp_path / "tidy").read_text() == "tidied"


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    process = python(
        "import farthing.cli; farthing.cli.main()", "recipes", stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert process.communicate(timeout=1200)[1] == ""
    assert process.returncode == 1


def test_a_pipe_that_breaks_elsewhere_is_a_bug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise BrokenPipeError("a worker's pipe")

    module(monkeypatch, "farthing.runs", run=broken)
    with pytest.raises(BrokenPipeError, match="a worker"):
        run("run", "quickstart")


# ---- recipes ----


def test_recipes_lists_them(run: Run) -> None:
    code, out, err = run("recipes")
    assert (code, err) == (0, "")
    assert any(line.startswith("quickstart  ") for line in out.splitlines())
    listed = json.loads(run("recipes", "--json")[1])
    assert [row["name"] for row in listed["recipes"]] == sorted(row["name"] for row in listed["recipes"])


# ---- chat ----


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []

    class Model:
        tokenizer = SimpleNamespace(folder=None, render=str, raw_encode=list)
        context = 10_000

        def done(self) -> Any:
            return SimpleNamespace(new_tokens=3)

        def stream(self, messages: list[dict[str, str]], **sampling: Any) -> Iterator[str]:
            if messages[-1]["content"] == "mistake":
                raise UserError("too\nlong")
            yield f"you said {messages[-1]['content']}"

    def load_model(source: str, dtype: str, device: str, quantize: str) -> Model:
        assert (dtype, device) == ("auto", "auto")
        seen.append(source)
        return Model()

    monkeypatch.setattr(farthing, "load", load_model, raising=False)
    return seen


def test_chat_reads_lines_from_a_pipe(run: Run, sources: list[str]) -> None:
    assert run("chat", "some/folder", stdin="one\ntwo\n") == (0, "you said one\nyou said two\n", "")
    assert sources == ["some/folder"]


def test_chat_as_json_is_one_object(run: Run, sources: list[str]) -> None:
    code, out, err = run("chat", "some/folder", "--json", "--system", "s", stdin="one")
    assert (code, err) == (0, "you said one\n")
    conversation = json.loads(out)
    assert conversation["source"] == "some/folder"
    assert [message["content"] for message in conversation["messages"]] == ["s", "one", "you said one"]


def test_a_mistake_in_a_piped_chat_ends_it(run: Run, sources: list[str]) -> None:
    assert run("chat", "some/folder", stdin="mistake\ntwo\n") == (2, "", "farthing: too long\n")


def test_chat_takes_the_newest_run_or_one_by_name(run: Run, sources: list[str], tmp_path: Path) -> None:
    for age, name in ((50, "older"), (10, "newer"), (0, "unfinished")):
        (tmp_path / "runs" / name / "stages").mkdir(parents=True)
        if name != "unfinished":
            link = tmp_path / "runs" / name / "model"
            link.symlink_to("stages")
            os.utime(link, (time.time() - age,) * 2, follow_symlinks=False)
    run("chat")
    run("chat", "older")
    run("chat", "pypi:older")
    assert sources == ["runs/newer", "runs/older", "pypi:older"]


def test_chat_in_a_terminal() -> None:
    code = """
import time, types, farthing, farthing.cli
class Model:
    tokenizer = types.SimpleNamespace(folder=None, render=str, raw_encode=list)
    context = 10_000

    def done(self):
        return types.SimpleNamespace(new_tokens=3)

    def stream(self, messages, **sampling):
        yield "<think>hm hm</think>hello"
        if len(messages) == 1:
            time.sleep(60)
        yield " to " + repr(messages[-1]["content"])
farthing.load = lambda source, *settings: Model()
farthing.cli.main()
"""
    ours, theirs = pty.openpty()
    process = python(code, "chat", "x", stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        until = time.monotonic() + 1200
        while text not in shown:
            assert time.monotonic() < until, shown
            if select.select([ours], [], [], 1)[0]:
                shown += os.read(ours, 4096)
        shown = shown[shown.index(text) + len(text) :]

    try:
        wait_for(b"> ")
        os.write(ours, b"one\n")
        wait_for(b"thought for 2 words")
        wait_for(b"hello")
        process.send_signal(signal.SIGINT)
        wait_for(b"(stopped)")
        wait_for(b"3 tokens, ")
        wait_for(b"> ")
        os.write(ours, b"\x1b[200~two\r  lines\x1b[201~")  # as a terminal marks what is pasted
        wait_for(b"lines")
        os.write(ours, b"\n")
        wait_for(b"hello to 'two\\n  lines'")
        wait_for(b"> ")
        os.write(ours, b"three\nmore\n")  # and as one pastes that marks nothing
        wait_for(b"hello to 'three\\nmore'")
        wait_for(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=1200) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_while_the_command_line_is_loaded_shows_no_traceback() -> None:
    code = """
import os, signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(name, path, target=None):
        if name == "farthing.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
import farthing.__main__
farthing.__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode in (-signal.SIGINT, 130)
    assert done.stderr == ""
