"""A new kind of stage is two files and one line: tried on a copy of the package, from the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import farthing

SPEC = '''
"""Keys of `kind: soup`."""

from typing import ClassVar, Literal

from farthing.recipe.stage import Curve, StageSpec
from farthing.recipe.types import Positive
from farthing.recipe.work import StageWork


class Soup(StageSpec):
    """Every weight times a factor."""

    curves: ClassVar = (Curve("norm", "Norm", "L2 norm", "Of the embedding.", live="norm", drawn=True),)

    kind: Literal["soup"]
    factor: Positive = 1.0

    def work(self, config, guess):
        return StageWork(config, steps=1, tokens=1, pairs=1, scored=0, length=1, save_every=1, memory_gb=1.0)
'''

STAGE = '''
"""A soup as a stage."""

import json

from farthing.base.files import write


def run(spec, start, at):
    model = at.load(start)
    with at.meter.span("train"), at.view(1) as view:
        model.decoder.embed.weight.data.mul_(spec.factor)
        line = {"step": 1, "norm": float(model.decoder.embed.weight.float().norm())}
        at.folder.mkdir(parents=True, exist_ok=True)
        write(at.folder / "metrics.jsonl", json.dumps(line) + "\\n")
        view.update(line)
    return at.finish(model, 1, factor=spec.factor)
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with one kind more; the folder to import it from."""
    source = tmp_path / "src" / "farthing"
    shutil.copytree(Path(farthing.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "recipe" / "soup.py").write_text(SPEC)
    (source / "stages" / "soup.py").write_text(STAGE)
    kinds = source / "recipe" / "kinds.py"
    text = kinds.read_text()
    [line] = [line for line in text.splitlines() if line.startswith("KINDS = ")]
    kinds.write_text(text.replace(line, line.replace(")", ', "soup")')))
    return tmp_path / "src"


def test_a_new_kind_is_two_files_and_a_line(package: Path, tiny_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "soup.yaml"
    tasks = {"chain_sum": {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}}
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "soup",
                "base": str(tiny_model),
                "stages": [{"kind": "soup", "factor": 0.5}],
                "evaluate": {"tasks": tasks, "held_out": 4, "max_new_tokens": 4},
            }
        )
    )

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "farthing", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(package)},
            timeout=600,
        )

    planned = command("plan", str(recipe), "--gpu", "h100", "--json")
    assert planned.returncode == 0, planned.stderr
    assert [stage["name"] for stage in json.loads(planned.stdout)["stages"]] == [
        "00-base",
        "01-soup",
        "99-final",
    ]

    wrong = command("run", str(recipe), "--set", "stages.soup.factr=2")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "farthing: stages.1.factr: no such key; did you mean factor?\n",
    )

    ran = command("run", str(recipe), "--json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    folder = tmp_path / result["run_dir"]
    [stage] = result["stages"]
    assert {key: stage[key] for key in ("name", "kind", "steps", "factor")} == {
        "name": "01-soup", "kind": "soup", "steps": 1, "factor": 0.5,
    }  # fmt: skip
    assert [found["name"] for found in result["evaluations"]] == ["before", "after"]
    assert (folder / "model" / "model.safetensors").is_file()
    assert "Of the embedding." in (folder / "report.html").read_text()
    assert "norm" in ran.stderr
    assert command("run", str(recipe), "--json").returncode == 0
