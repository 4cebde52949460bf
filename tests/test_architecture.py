"""docs/architecture.md shows the house as it is: its floors, its files and the functions it names."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "farthing"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MAP = PAGE.split("\n## The network\n")[0]


def picture(text: str) -> list[tuple[str, str]]:
    """Name and duty of each floor in the first picture of a page, from top to bottom."""
    [block] = re.findall(r"```text\n(┌.*?)```", text, flags=re.S)
    return re.findall(r"^│ (\w+) +│ (\S.*?) +│$", block, flags=re.M)


def named_paths(text: str) -> list[tuple[str, str]]:
    """Path and name of every `path` and `path:name` in backticks, the name empty if only the path is given."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    matches = [re.fullmatch(r"([\w/]+(?:\.py|(?<=\w)/\w+))(?::([\w.]+))?", span) for span in spans]
    return [(match[1], match[2] or "") for match in matches if match]


def defined(path: Path) -> set[str]:
    """Names a module defines: functions, classes, their methods as `Class.method`, and constants."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)
            }
    return names


def test_the_floors_drawn_are_those_of_the_import_contract() -> None:
    [contract] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = [floor for floor in contract["layers"] if floor != "__main__"]
    assert contract["exhaustive"]
    assert [name for name, _ in picture(MAP)] == floors


def test_every_floor_drawn_exists_and_has_a_duty() -> None:
    for name, duty in picture(MAP):
        assert (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file(), name
        assert len(duty.split()) > 2, name


@pytest.mark.parametrize(("path", "name"), sorted(set(named_paths(MAP))))
def test_what_the_map_names_exists(path: str, name: str) -> None:
    if "KIND" in path:  # stands for every kind of stage
        kinds = re.search(r"^KINDS = (\(.*\))$", (SOURCE / "recipe" / "kinds.py").read_text(), flags=re.M)
        assert kinds is not None
        paths = [SOURCE / path.replace("KIND", kind) for kind in ast.literal_eval(kinds[1])]
    else:
        paths = [SOURCE / path if (SOURCE / path).exists() else ROOT / path]
    for file in paths:
        assert file.exists(), path
        assert not name or name in defined(file), f"{path} does not define {name}"


def test_the_map_has_three_ways_of_half_a_page_each() -> None:
    ways = re.split(r"\n### (The way of .+)\n", MAP)[1:]
    assert ways[::2] == ["The way of a batch", "The way of a prompt", "The way of a recipe"]
    assert all(len(way.split()) < 350 for way in ways[1::2])
    assert all(len(named_paths(way)) >= 5 for way in ways[1::2])


def test_a_wrong_map_would_be_caught() -> None:
    drawn = "```text\n┌──┐\n│ cli  │ reads a command   │\n└──┘\n```"
    assert picture(drawn) == [("cli", "reads a command")]
    text = "`base/files.py:nothing` and `model/kernels`, `a.b`, `x`, `stages/KIND.py`"
    assert named_paths(text) == [("base/files.py", "nothing"), ("model/kernels", ""), ("stages/KIND.py", "")]
    assert "nothing" not in defined(SOURCE / "base" / "files.py")
    assert {"write", "new_folder"} <= defined(SOURCE / "base" / "files.py")
