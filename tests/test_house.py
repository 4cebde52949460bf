"""The house is in order: versions agree, what is named exists, modules are short, no machine is named."""

import importlib
import importlib.metadata
import itertools
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import farthing

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src").rglob("*.py"))
BENCHMARKS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

# Folders and hosts as regular expressions, so that this file does not name what it forbids.
MACHINE = re.compile(r"(?<![\w.}~-])/(?:work|root|home|Users)/[\w.-]")
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|npmjs\.\w")


def tracked() -> list[Path]:
    """The text files of the tree, with those that are new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


# ---- versions ----


def test_one_version_everywhere() -> None:
    assert PROJECT["version"] == farthing.__version__
    assert f"\n## {farthing.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_requirement_is_pinned_to_a_version_it_accepts() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins.values())
    assert list(pins) == sorted(canonicalize_name(name) for name in pins)
    for text in PROJECT["dependencies"] + [text for extra in EXTRAS.values() for text in extra]:
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_the_licence_is_the_one_named() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


# ---- what is named exists ----


def test_the_site_has_every_page_and_no_other() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    docs = ROOT / "docs"
    assert sorted(named) == sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_a_page_names_only_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    source = "\n".join(path.read_text() for path in MODULES)
    links = re.findall(r"(?:\]\(|\b(?:src|href|srcset)=[\"'])(?!\w+:|#)([^)\"'#\s]+)", text)
    files = re.findall(r"`([\w./-]+(?:\.(?:py|md|toml|ya?ml|txt|html|css|jsonl?)|/))`", text)
    # what a run writes is named in the source that writes it
    written = [name for name in files if name.startswith("runs/") or f'"{name}"' in source]
    missing = [name for name in links + files if name not in written and not (ROOT / name).exists()]
    assert missing == []


def test_every_target_is_explained_and_every_extra_has_a_use() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.findall(r"^\.PHONY: (.+)$", makefile, flags=re.M)
    explained = re.findall(r"^([a-z-]+):.*## \S", makefile, flags=re.M)
    assert sorted(explained) == sorted(" ".join(phony).split())
    used = set(re.findall(r"\.venv/\.([a-z]+)\b", makefile)) - {"farthing", "model", "llama"}
    for extras in re.findall(r"'\.\[([a-z,-]+)\]'", makefile):
        used |= set(extras.split(","))
    named = {name for path in MODULES for name in re.findall(r"farthing\[([a-z-]+)\]", path.read_text())}
    assert used | named == EXTRAS.keys()


def test_what_reasoning_gym_imports_is_asked_for_but_for_pycosat() -> None:
    theirs = [text for text in importlib.metadata.requires("reasoning-gym") or [] if "extra ==" not in text]
    needed = {canonicalize_name(Requirement(text).name): Requirement(text).specifier for text in theirs}
    ours = {Requirement(text).name: Requirement(text).specifier for text in EXTRAS["gym-parts"]}
    base = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert ours.pop("python-dateutil") == "", "imported by reasoning-gym, and not in its list"
    assert ours == {name: value for name, value in needed.items() if name not in base | {"pycosat"}}


def test_the_checks_before_a_merge_are_there() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert {"run": "make test"} in job["steps"]
    assert "make test-paths" in [step.get("run") for step in job["steps"]]
    matrix = job["strategy"]["matrix"]
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    assert [name.split("-")[0] for name in matrix["os"]] == ["ubuntu", "ubuntu", "macos"]
    assert matrix["include"] == [{"os": matrix["os"][0], "python": "3.12", "isa": "avx2"}]
    assert job["env"]["FARTHING_ISA"] == "${{ matrix.isa }}"
    gate = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line.split()[1] for line in gate if line.startswith("make ")] == ["test", "test-paths"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff", "ruff-format", "mypy"]


# ---- the source ----


@pytest.mark.parametrize("pattern", [MACHINE, REGISTRY], ids=["machine", "registry"])
def test_nothing_is_tied_to_a_machine_or_a_registry(pattern: re.Pattern[str]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_a_module_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 500
    assert not text.strip() or text.startswith(('"""', 'r"""'))
    assert not re.search(r"\b(?:TODO|FIXME|XXX)\b", text)


def test_planning_and_reporting_load_without_torch() -> None:
    light = [
        "cli",
        "doctor",
        "serve.chat",
        "evaluate.score",
        "tasks.item",
        "weights.gguf_read",
        "weights.sources",
    ]
    for package in ("base", "recipe", "cost", "claims", "plans", "report"):
        found = pkgutil.iter_modules([str(ROOT / "src" / "farthing" / package)], f"{package}.")
        light += [module.name for module in found if module.name != "plans.inspect"]
    assert len(light) > 10
    imports = ", ".join(f"farthing.{name}" for name in light)
    code = f"import sys, {imports}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- benchmarks ----


@pytest.mark.slow
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_a_benchmark_explains_itself(path: Path) -> None:
    for text in EXTRAS["bench"]:
        pytest.importorskip(Requirement(text).name)
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "--runs" in done.stdout


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a part of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_growth_is_drawn_with_every_side(benchmark: Any) -> None:
    sides = ("Farthing exact", "Farthing int8", "transformers", "llama.cpp Q8_0")

    def points(*ats: int) -> list[dict[str, Any]]:
        return [
            {"at": at, "tokens_per_s": {side: 9.0 * at + n for n, side in enumerate(sides)}} for at in ats
        ]

    found = {"model": "M & N", "threads": 2, "batch": points(1, 4, 64), "context": points(128, 8192)}
    root = ElementTree.fromstring(benchmark("growth_plot").drawn(found))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert set(sides) | {"64", "8,192"} <= set(texts)
    assert "M & N" in (texts[0] or "")
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert [len(line.attrib["points"].split()) for line in lines[:8]] == [3] * 4 + [2] * 4
    heights = [float(element.attrib["y"]) for element in root.iter() if element.text in sides]
    assert all(one + 14 < other for one, other in itertools.pairwise(sorted(heights)))


def test_a_machine_without_llama_cpp_is_told_how_to_get_it(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    peer = benchmark("llama_cpp_peer")
    monkeypatch.setattr(peer, "BUILT", tmp_path / "none")
    for name in ("llama_cpp", "llama_cpp.llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None)
    assert peer.binding() is None
    assert "llama.cpp skipped: it is not installed; `make bench-llama` builds it" in capsys.readouterr().err
