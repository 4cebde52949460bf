"""What README.md and docs/ show is true: commands, recipes and Python in fences are run or checked.

A quick command runs as it stands, and the output shown must be its output. A long one is checked where it can
go wrong: `make` by `make -n`, `farthing run` with --dry-run, `farthing chat` and `eval` by their own parsers
here and on the real model in a slow test. A command that nothing here can check fails, so none is untested.
"""

import ast
import importlib
import inspect
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

import farthing
from farthing import cli, recipe
from farthing.base.figures import parse_amount
from farthing.base.schema import checked, parse_text
from farthing.cost import devices
from farthing.cost.spend import Entry
from farthing.tasks.gym import SCORERS
from farthing.tasks.sets import SETS
from farthing.weights.export import FORMATS, TYPES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
SHELL = {"console", "bash", "sh", "shell"}
LANGUAGES = SHELL | {"python", "yaml", "json", "text", "mermaid"}
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
USAGE_ERROR = typer.BadParameter.__mro__[1]  # click's, wherever typer keeps it
SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
FOREIGN_SETTINGS = {"CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"}


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page: where it starts, its language, its text."""

    where: str
    language: str
    text: str


@dataclass(frozen=True)
class Shown:
    """A command as a page shows it, and the lines of output shown under it."""

    where: str
    command: str
    output: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where} {self.command}"


# ---- reading the pages ----


def fences(page: Path) -> list[Fence]:
    found: list[Fence] = []
    start, language, indent, inside = 0, "", "", False
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        mark = re.match(r"( *)(`{3,}|~{3,})\s*(\w*)", line)
        if mark and not inside:
            start, language, indent, inside, lines = number, mark[3], mark[1], True, []
        elif mark and mark[1] == indent and not mark[3]:
            found.append(Fence(f"{page.name}:{start}", language, textwrap.dedent("\n".join(lines) + "\n")))
            inside = False
        elif inside:
            lines.append(line)
    assert not inside, f"{page.name}:{start}: the fence is not closed"
    return found


def commands(fence: Fence) -> list[Shown]:
    """The commands of a fence: lines that start with "$ ", or every line of a fence without prompts."""
    text = re.sub(r"\\\n(> )?\s*", " ", fence.text)
    lines = [line for line in text.splitlines() if line.strip()]
    if any(line.startswith("$ ") for line in lines):
        shown: list[Shown] = []
        for line in lines:
            if line.startswith("$ "):
                shown.append(Shown(fence.where, line[2:]))
            elif shown:
                shown[-1] = Shown(fence.where, shown[-1].command, (*shown[-1].output, line.strip()))
        return shown
    if fence.language in SHELL:
        return [Shown(fence.where, line) for line in lines if not line.lstrip().startswith("#")]
    return []


FENCES = [fence for page in PAGES for fence in fences(page)]
SHOWN = [shown for fence in FENCES for shown in commands(fence)]
YAML = [fence for fence in FENCES if fence.language == "yaml"]
RECIPES = [fence for fence in YAML if "stages" in (yaml.safe_load(fence.text) or {})]


def simple_commands(line: str) -> list[list[str]]:
    """The words of each simple command in a line of shell, without redirections and comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in (words := iter(lexer)):
        if word in ("&&", "||", "|", ";"):
            parts.append([])
        elif word in (">", ">>"):
            next(words)
        else:
            parts[-1].append(word)
    return parts


# ---- checking a command ----


def run_line(line: str, folder: Path) -> list[str | None]:
    return [check(words, folder) for words in simple_commands(line)]


def check(words: list[str], folder: Path) -> str | None:
    """Fail unless this simple command works; what it prints on stdout when it was run as it stands."""
    for setting in itertools.takewhile(lambda word: re.match(r"[A-Z_]+=", word), words):
        name = setting.partition("=")[0]
        assert name in FOREIGN_SETTINGS or f'"{name}"' in SOURCE, f"nothing reads {name}"
        words = words[1:]
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program in ("python", "python3") and arguments[:1] == ["-m"]:
        program, *arguments = arguments[1:]
    if program == "farthing.evaluate.lm_eval":
        assert (ROOT / "src" / "farthing" / "evaluate" / "lm_eval.py").is_file()
        options = dict(itertools.pairwise(arguments))
        assert options["--model"] == "farthing"
        assert is_source(options["--model_args"].removeprefix("path=")), "no such model"
        return None
    if program == "farthing":
        return check_farthing(arguments, folder)
    if program == "make":
        run(["make", "-n", *arguments], ROOT)
    elif program in ("pip", "uv", "pipx"):
        check_pip(arguments[1:] if program == "uv" else arguments)
    elif program == "docker":
        check_docker(arguments, folder)
    elif program in ("python", "python3"):
        check_script(arguments)
    elif program in ("cat", "head", "less", "ls", "open", "tail", "xdg-open"):
        for path in (word for word in arguments if not word.startswith("-")):
            known = (ROOT / path).exists() or (path.startswith("runs/") and f'"{Path(path).name}' in SOURCE)
            assert known, f"{path} is neither in the tree nor written by a run"
    elif program == "git":
        assert arguments[0] == "clone", "only git clone is known here"
        assert re.search(r"/farthing(\.git)?$", arguments[1])
    elif program == "cd":
        assert arguments == ["farthing"] or (ROOT / arguments[0]).is_dir()
    elif program == "venv":
        assert arguments == [".venv"]
    elif program in ("source", "."):
        assert arguments == [".venv/bin/activate"]
    elif program not in ("echo", "printf"):
        pytest.fail(f"nothing here knows how to check `{shlex.join(words)}`; teach `check` to")
    return None


def check_farthing(arguments: list[str], folder: Path) -> str | None:
    name, *rest = arguments
    if name in ("chat", "eval") and "--help" not in rest:
        context = COMMANDS[name].make_context(name, list(rest))  # raises on what the command does not know
        asked = context.params
        for suite in asked.get("suite") or ():
            assert suite in SCORERS | SETS.keys(), "no such suite"
        if asked.get("tasks"):
            assert recipe.parse_tasks(asked["tasks"]).keys() <= SCORERS.keys() | SETS.keys(), "no such task"
        if asked.get("recipe"):
            recipe.load(asked["recipe"])
        sources = asked["sources"] if name == "eval" else [asked["source"] or "runs/quickstart"]
        assert all(map(is_source, sources)), "no such model"
        if name == "eval":
            given = [asked[key] for key in ("tasks", "recipe", "suite") if asked[key]]
            assert len(given) == 1, "tasks or recipe"
        return None
    if name in ("plan", "calibrate") and not {"--help", "--validate", "--budget"} & set(rest):
        asked = (
            COMMANDS[name].make_context(name, list(rest)).params
        )  # a plan may measure this machine, so is not run
        if asked.get("gpu"):
            devices.find(asked["gpu"])
        if asked.get("tokens"):
            parse_amount(asked["tokens"], "--tokens")
        assert (
            name == "calibrate" or is_config(asked["what"]) or recipe.load(asked["what"], asked["set_"] or ())
        )
        return None
    if name == "serve" and "--help" not in rest:  # tests/serve starts real ones
        asked = COMMANDS[name].make_context(name, list(rest)).params
        named = [re.sub(r"^[\w-]+=", "", each) for each in asked["sources"] or ["runs/quickstart"]]
        assert all(map(is_source, named)), "no such model"
        assert asked["host"] == "127.0.0.1" or asked["api_key"] or asked["keys"], "no key"
        return None
    if name == "watch" and "--help" not in rest:
        assert is_source(COMMANDS[name].make_context(name, list(rest)).params["run"]), "no such run"
        return None
    if name in ("ledger", "compare") and "--help" not in rest:
        asked = COMMANDS[name].make_context(name, list(rest)).params
        assert all(is_source(each) for each in asked["runs"]), "no such run"
        for entry in [asked["add"]] if asked.get("add") else []:
            checked(Entry, {"date": "2026", **parse_text(entry, "shown")}, "shown")
        return None
    if name in ("export", "inspect") and "--help" not in rest:
        asked = COMMANDS[name].make_context(name, list(rest)).params
        assert is_source(asked["source"]), "no such model"
        assert asked.get("to", "gguf") in FORMATS, "no such format"
        assert asked.get("kind", "f16") in TYPES, "no such type"
        return None
    if name == "data" and "--help" not in rest:
        asked = COMMANDS[name].make_context(name, list(rest)).params
        assert asked["model"] is None or is_source(asked["model"]), "no such model"
        chats = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]
        (folder / asked["source"]).write_text(json.dumps({"messages": chats}))
        return run([sys.executable, "-m", "farthing", "data", asked["source"]], folder)
    if name == "run" and not {"--dry-run", "--help"} & set(rest):
        run([sys.executable, "-m", "farthing", "run", *rest, "--dry-run"], folder)
        return None
    assert (
        name
        in (
            "run",
            "recipes",
            "init",
            "schema",
            "claim",
            "plan",
            "doctor",
            "help",
            "--version",
            "--help",
            "-h",
        )
        or "--help" in rest
    ), f"farthing {name}"
    return run([sys.executable, "-m", "farthing", *arguments], folder)


def is_config(what: str) -> bool:
    """True for a reader's own config.json or a model that a plan is asked about."""
    return what.endswith(".json") or what.startswith(("hf:", "pypi:"))


def is_source(source: str) -> bool:
    """True for what a reader of these pages can have: a pinned package, a hub name, a run that is shown."""
    if source.startswith("pypi:"):
        return source.removeprefix("pypi:") in pinned()
    if source.startswith("hf:"):
        return source.count("/") == 1
    if re.fullmatch(r"runs/dense-or-moe/(dense|moe|mla|mtp)-(adamw|muon)-[1-9]", source):  # the study's
        return True
    if source.startswith("adapters/"):  # peft's, which readers bring
        return True
    names = {name for name, _ in recipe.builtin()} | {yaml.safe_load(shown.text)["name"] for shown in RECIPES}
    folders = {f"runs/{name}" for name in names}
    folders |= set(re.findall(r"--run-dir[ =](\S+)", "\n".join(shown.command for shown in SHOWN)))
    return source in names | folders | {f"{folder}/model" for folder in folders}


def check_pip(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert arguments[0] == "install"
    words = iter(arguments[1:])
    for word in words:
        if word in ("-c", "-r"):
            assert (ROOT / next(words)).is_file()
        elif word == "--torch-backend":
            assert next(words) == "cpu"
        elif extras := re.fullmatch(r"\.(?:\[([\w,-]+)\])?", word):
            assert set((extras[1] or "").split(",")) - {""} <= project["optional-dependencies"].keys()
        elif word not in ("-e", "--no-deps"):
            assert word in pinned(), f"{word} is not in constraints.txt"


def check_docker(arguments: list[str], folder: Path) -> None:
    """`docker build` by the arguments the Dockerfile has, `docker run` by the command it passes on."""
    text = (ROOT / "Dockerfile").read_text()
    kind, *words = arguments
    if kind == "build":
        assert words[-1] == "."
        for setting in (words[at + 1] for at, word in enumerate(words) if word == "--build-arg"):
            assert f"\nARG {setting.partition('=')[0]}=" in text
        return
    image = next(
        at for at, word in enumerate(words) if word.partition(":")[0] == "farthing" and "/" not in word
    )
    assert kind == "run"
    for volume in (words[at + 1] for at, word in enumerate(words[:image]) if word == "-v"):
        assert f"\nVOLUME {volume.partition(':')[2]}\n" in text
    check_farthing(words[image + 1 :], folder)


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {line.partition("==")[0] for line in lines if not line.startswith("#")}


def check_script(arguments: list[str]) -> None:
    script, *options = arguments
    assert script.startswith(("benchmarks/", "studies/"))
    known = {"--help"}
    if script.startswith("studies/"):
        known |= set(re.findall(r"--[\w-]+", run([sys.executable, str(ROOT / script), "--help"], ROOT)))
    else:
        for file in (ROOT / script, ROOT / "benchmarks" / "side_by_side.py"):
            known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', file.read_text()))
    assert {option.partition("=")[0] for option in options if option.startswith("--")} <= known


def run(command: list[str], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, f"{shlex.join(command)} ends with {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


# ---- the tests ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands run: an empty folder with the recipes the pages show, saved as NAME.yaml."""
    folder = tmp_path_factory.mktemp("reader")
    for shown in RECIPES:
        (folder / f"{yaml.safe_load(shown.text)['name']}.yaml").write_text(shown.text)
    return folder


@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_command(shown: Shown, folder: Path) -> None:
    outputs = run_line(shown.command, folder)
    if len(outputs) == 1 and outputs[0] is not None:
        printed = {line.strip() for line in outputs[0].splitlines()}
        assert [line for line in shown.output if line not in printed | {"…", "..."}] == []


@pytest.mark.parametrize("shown", RECIPES, ids=lambda fence: fence.where)
def test_recipe(shown: Fence, tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    path.write_text(shown.text)
    recipe.load(path)


@pytest.mark.parametrize(
    "fence", [fence for fence in FENCES if fence.language == "python"], ids=lambda fence: fence.where
)
def test_python(fence: Fence) -> None:
    check_python(fence.text)


def check_python(code: str) -> None:
    """Fail unless the code compiles, its imports exist, and `farthing.NAME(keyword=...)` fits NAME."""
    tree = ast.parse(code)
    named: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            named |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "farthing":
            named[f"farthing.{node.attr}"] = getattr(farthing, node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (function := named.get(ast.unparse(node.func))):
            assert callable(function), f"{ast.unparse(node.func)} is not a function"
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(function).bind_partial(*node.args, **keywords)


@pytest.mark.parametrize("fence", FENCES, ids=lambda fence: fence.where)
def test_fence(fence: Fence) -> None:
    """Its language is one that is tested here or holds nothing to test, and data in it can be read."""
    assert fence.language in LANGUAGES or (fence.language == "" and "farthing " not in fence.text)
    if fence.language == "yaml":
        yaml.safe_load(fence.text)
    elif fence.language == "json":
        json.loads(fence.text)


WRONG = {
    "farthing chat --temperatur 1": "No such option",
    "echo hello | farthing chat --loud": "No such option",
    "farthing chat runs/nobody": "no such model",
    "farthing eval quickstart": "tasks or recipe",
    "farthing export runs/quickstart --to onnx": "no such format",
    "farthing inspect runs/nobody": "no such model",
    "farthing serve small=runs/nobody": "no such model",
    "farthing serve quickstart --host 0.0.0.0": "no key",
    "farthing eval quickstart --tasks no_such_task": "no such task",
    "farthing run no-such-recipe": "no-such-recipe",
    "farthing ledger runs/nobody": "no such run",
    "farthing claim no-such-claim": "no such claim",
    "farthing run quickstart --set stages.1.learning_rat=1": "no such key",
    "farthing tune": "farthing tune",
    "make no-such-target": "No rule to make target",
    "pip install farthing": "not in constraints.txt",
    "pip install -e '.[nothing]'": "nothing",
    "python benchmarks/side_by_side.py --fast": "--fast",
    "python setup.py install": "benchmarks/",
    "cat runs/quickstart/nothing.json": "neither in the tree nor",
    "NOBODY_READS_THIS=1 farthing recipes": "nothing reads",
    "rm -rf /": "nothing here knows how",
}


@pytest.mark.parametrize(("line", "complaint"), WRONG.items(), ids=list(WRONG))
def test_a_wrong_command_would_be_caught(line: str, complaint: str, folder: Path) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception, USAGE_ERROR), match=re.escape(complaint)):
        run_line(line, folder)


@pytest.mark.parametrize(
    "code",
    [
        "import farthing\nfarthing.lode('x')",
        "from farthing import nothing",
        "import farthing\nfarthing.load(x, speed=1)",
    ],
)
def test_wrong_python_would_be_caught(code: str) -> None:
    with pytest.raises((AttributeError, TypeError)):
        check_python(code)


def test_commands_are_read_as_a_shell_reads_them() -> None:
    fence = Fence("here", "console", "$ one \\\n>   --two\nout\n$ three # why\n\nmore\n")
    first, second = commands(fence)
    assert (first.output, second.output) == (("out",), ("more",))
    assert simple_commands(first.command) == [["one", "--two"]]
    assert simple_commands(second.command) == [["three"]]
    assert simple_commands("A=1 b 'c d' | e > f && g -c '.[x]'") == [
        ["A=1", "b", "c d"], ["e"], ["g", "-c", ".[x]"]
    ]  # fmt: skip


def talking() -> list[list[str]]:
    every = (words for shown in SHOWN for words in simple_commands(shown.command))
    said = [words for words in every if words[0] == "farthing" and words[1] in ("chat", "eval")]
    return [words for words in said if not SETS.keys() & set(words)]  # those are the hub's


@pytest.mark.slow
@pytest.mark.parametrize("words", talking(), ids=shlex.join)
def test_chat_and_eval_as_shown_but_shorter(words: list[str], smollm2: Path, tmp_path: Path) -> None:
    _, name, *rest = words
    asked = COMMANDS[name].make_context(name, list(rest)).params
    sources = asked["sources"] if name == "eval" else [asked["source"]]
    given = [str(smollm2) if word in sources else word for word in rest]
    given = [str(smollm2), *given] if sources == [None] else given
    short = ["--max-new-tokens", "4"] if name == "chat" else ["--n", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "farthing", name, *given, *short],
        cwd=tmp_path, input="What is 3 + 4?\n", capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
