"""What is published: the wheel holds all that a run reads and nothing more, and the citation is valid."""

import re
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import farthing

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "farthing"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    [path] = builder.build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {str(path.relative_to(PACKAGE.parent)) for path in PACKAGE.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == files
    assert {Path(name).suffix for name in held} == {
        ".py",
        ".typed",
        ".yaml",
        ".csv",
        ".css",
        ".jinja",
        ".jsonl",
        ".js",
        ".png",
    }
    for name in ("recipes/quickstart.yaml", "claims/deepseek-v3.yaml", "cost/published_runs.csv"):
        assert f"farthing/{name}" in held


def test_the_wheel_has_its_command_and_its_licence(wheel: zipfile.ZipFile) -> None:
    about = f"farthing-{farthing.__version__}.dist-info"
    points = ConfigParser()
    points.read_string(wheel.read(f"{about}/entry_points.txt").decode())
    assert dict(points["console_scripts"]) == {"farthing": "farthing.__main__:main"}
    assert f"{about}/licenses/LICENSE" in wheel.namelist()


def test_what_is_installed_by_default_is_short_and_needs_no_compiler(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"farthing-{farthing.__version__}.dist-info/METADATA").decode()
    asked = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", text, flags=re.M)
    assert not {"reasoning-gym", "pycosat", "datasets", "pyarrow", "pandas"} & set(asked)


def test_the_citation_is_in_order() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    required = {"cff-version", "message", "title", "authors"}  # by the schema of 1.2.0
    known = {
        "abstract",
        "date-released",
        "doi",
        "keywords",
        "license",
        "repository-code",
        "type",
        "url",
        "version",
    }
    assert required <= cited.keys() <= required | known
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] == "software"
    assert cited["license"] == PROJECT["license"]
    assert str(cited["version"]) == PROJECT["version"]
    assert cited["abstract"] == PROJECT["description"]
    assert cited["authors"]
    for author in cited["authors"]:
        assert author.keys() == {"name"} or {"family-names", "given-names"} <= author.keys()


def test_the_image_is_built_from_files_that_are_there() -> None:
    text = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (.+) \S+$", text, flags=re.M):
        for name in line.split():
            assert (ROOT / name).exists()
            assert f"!{name}" in ignored
    assert re.search(r"^USER (?!root)", text, flags=re.M)
    assert re.search(r"^VOLUME /data$", text, flags=re.M)
    assert 'ENTRYPOINT ["farthing"]' in text
    assert re.search(r"^ARG BUILD=cpu$", text, flags=re.M)
