"""`code`: the answer is a Python program, which must pass all of its row's tests in the sandbox.

Tests are of three kinds. HumanEval's (arXiv:2107.03374): `test` defines check(candidate), `prompt` begins the program
and `entry_point` names the function. MBPP's (arXiv:2108.07732): `test_list` has assertions, `test_setup_code` or
`test_imports` what they need. Inputs and outputs as in APPS (arXiv:2105.09938): `input_output` has inputs, given to the
program one by one, and the outputs that it must print.

Assertions run in the program's own process, so a program may cheat them, as with an object that equals everything;
inputs and outputs are compared outside. A program that ends before its tests do has not passed them.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from farthing.recipe.rewards import Code
from farthing.tasks import sandbox
from farthing.tasks.extract import extract
from farthing.tasks.item import Convention, Item
from farthing.tasks.rewards.part import Part

_CLOCK = 2.0  # seconds by the clock for one of processor time, as the pool allows
_FENCED = re.compile(
    r"^```(?:python|py|python3)?[ \t]*\n(.*?)(?:^```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE | re.I
)
# Reads {"program", "tests", "token"}, and prints the token when the tests are through.
_ASSERTS = (
    "import json, os, sys\n"
    "given = json.loads(sys.stdin.buffer.read())\n"
    "scope = {'__name__': 'answer', '__builtins__': __builtins__}\n"
    "exec(compile(given.pop('program'), 'answer.py', 'exec'), scope)\n"
    "exec(compile(given.pop('tests'), 'tests.py', 'exec'), scope)\n"
    "sys.stdout.flush()\n"
    "os.write(1, given['token'].encode())\n"
)
# Reads {"program", "input"}; the program then reads its input, be it by input() or as file 0.
_PROGRAM = (
    "import json, os, sys, tempfile\n"
    "given = json.loads(sys.stdin.buffer.read())\n"
    "file = tempfile.TemporaryFile(dir='.')\n"
    "file.write(given['input'].encode())\n"
    "file.seek(0)\n"
    "os.dup2(file.fileno(), 0)\n"
    "sys.stdin = open(0, encoding='utf-8', closefd=False)\n"
    "exec(compile(given['program'], 'answer.py', 'exec'), {'__name__': '__main__', '__builtins__': __builtins__})\n"
)


@dataclass(frozen=True)
class Tests:
    """What a program must pass: assertions after it, or outputs for inputs."""

    before: str = ""  # of the program
    asserts: str = ""
    pairs: list[tuple[str, str]] = field(default_factory=list)


def verify(item: Item, text: str, convention: Convention, settings: Code) -> Part:
    row: Mapping[str, Any] = item.metadata.get("row") or {}
    tests = tests_of(row, settings.tests)
    if tests is None:
        return Part("bad_gold")
    program = program_of(text, convention)
    if program is None or not program.strip():
        return Part("unparsed")
    passed = _passes(complete(program, row, tests), tests, settings)
    return Part("right", reward=1.0) if passed else Part("wrong")


def program_of(text: str, convention: Convention) -> str | None:
    """The program of a completion: its last fenced block, what its tag holds, or all of it."""
    text = text.rpartition("</think>")[2]
    if convention == "tag" and "<answer>" in text:
        found = extract(text, "tag", "text")
        text = found if found is not None else ""
    blocks = _FENCED.findall(text)
    return blocks[-1] if blocks else text


def complete(program: str, row: Mapping[str, Any], tests: Tests) -> str:
    """The program after what begins it: a whole function follows the prompt's imports, its body the prompt itself."""
    name = row.get("entry_point")
    if not tests.before or not isinstance(name, str):
        return tests.before + program
    if re.search(rf"^(?:async )?def {re.escape(name)}\b", program, re.MULTILINE):
        return f"{tests.before.rstrip()}\n    pass\n\n{program}"
    return tests.before + program


def tests_of(row: Mapping[str, Any], column: str | None) -> Tests | None:
    """The tests of a row, in any of the three kinds; None where there are none that can be run."""
    name = row.get("entry_point")
    if column is None and isinstance(row.get("test"), str) and isinstance(name, str):
        return Tests(str(row.get("prompt") or ""), f"{row['test']}\ncheck({name})\n")
    columns = [column] if column is not None else ["test_list", "input_output", "tests", "test_cases"]
    found = next((row[name] for name in columns if row.get(name)), None)
    if isinstance(found, str) and found.lstrip()[:1] in ("{", "["):
        try:
            found = json.loads(found)
        except ValueError:
            return None
    before = "".join(
        f"{_lines(row[name])}\n" for name in ("test_setup_code", "test_imports") if row.get(name)
    )
    if isinstance(found, str):
        return Tests(before, found)
    if isinstance(found, Sequence) and all(isinstance(test, str) for test in found) and found:
        return Tests(before, "\n".join(found))
    pairs = _pairs(found)
    return Tests(before, "", pairs) if pairs else None


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _pairs(found: Any) -> list[tuple[str, str]]:
    """Inputs with their outputs, from {"inputs": […], "outputs": […]} or [{"input": …, "output": …}, …]."""
    if (
        isinstance(found, Mapping)
        and isinstance(found.get("inputs"), list)
        and isinstance(found.get("outputs"), list)
    ):
        if len(found["inputs"]) != len(found["outputs"]) or found.get("fn_name"):
            return []
        return [
            (_text(given), _text(wanted))
            for given, wanted in zip(found["inputs"], found["outputs"], strict=True)
        ]
    if isinstance(found, list) and all(
        isinstance(test, Mapping) and {"input", "output"} <= test.keys() for test in found
    ):
        return [(_text(test["input"]), _text(test["output"])) for test in found]
    return []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _lines(value)


def _passes(program: str, tests: Tests, settings: Code) -> bool:
    memory, clock = settings.memory_mb * 2**20, settings.seconds * _CLOCK
    if not tests.pairs:
        token = secrets.token_hex(16)
        given = json.dumps({"program": program, "tests": tests.asserts, "token": token})
        ran = sandbox.run(
            ["-c", _ASSERTS], given.encode(), seconds=settings.seconds, clock=clock, memory=memory
        )
        return ran.code == 0 and ran.output.endswith(token.encode())
    until = time.monotonic() + clock
    for given, wanted in tests.pairs:
        left = until - time.monotonic()
        if left <= 0:
            return False
        told = json.dumps({"program": program, "input": given}).encode()
        ran = sandbox.run(["-c", _PROGRAM], told, seconds=settings.seconds, clock=left, memory=memory)
        if ran.code != 0 or _plain(ran.output.decode("utf-8", "replace")) != _plain(wanted):
            return False
    return True


def _plain(text: str) -> list[str]:
    """Lines without the white space at their ends, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
