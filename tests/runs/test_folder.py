"""A continued run computes as the attempts before it, or says why it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from farthing.base.device import Place
from farthing.base.errors import UserError
from farthing.recipe import Recipe, validate
from farthing.runs import folder
from farthing.runs.folder import claim, locked, origin, place_of


def recipe(**keys: str) -> Recipe:
    stage = {"kind": "grpo", "tasks": {"chain_sum": 1}, "steps": 1}
    return validate({"name": "r", "base": "x", "stages": [stage], **keys})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which float32 is the faster."""

    def choose(device: str, dtype: str) -> Place:
        return Place("cpu", "float32" if dtype == "auto" else dtype, "avx2 has no instructions for bfloat16")

    monkeypatch.setattr(folder, "choose", choose)
    monkeypatch.setattr(folder, "has_bfloat16", lambda _: False)


def test_a_new_run_takes_the_faster(here: None) -> None:
    assert place_of(recipe(), {}, Path("r")).dtype == "float32"
    assert place_of(recipe(dtype="bfloat16"), {}, Path("r")).dtype == "bfloat16"


def test_a_continued_run_keeps_its_dtype(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of(recipe(), {"dtype": "float32"}, Path("r")).dtype == "float32"
    monkeypatch.setattr(folder, "choose", lambda *_: Place("cpu", "bfloat16", "products: faster"))
    assert place_of(recipe(), {"dtype": "float32"}, Path("r")) == Place(
        "cpu", "float32", "as the run was started"
    )


def test_another_dtype_is_refused(here: None) -> None:
    with pytest.raises(
        UserError, match="r was started in float32 and dtype is bfloat16 now; leave dtype out"
    ):
        place_of(recipe(dtype="bfloat16"), {"dtype": "float32"}, Path("r"))


def test_a_probe_alone_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        folder, "choose", lambda *_: Place("cpu", "float32", "products: bfloat16 99 GFLOPS, float32 101")
    )
    monkeypatch.setattr(folder, "has_bfloat16", lambda _: True)
    assert place_of(recipe(), {"dtype": "bfloat16"}, Path("r")).dtype == "bfloat16"


@pytest.mark.parametrize("earlier", [{"dtype": "bfloat16"}, {"farthing": "0.1.0"}])  # 0.1.0 wrote no dtype
def test_bfloat16_without_instructions_has_to_be_asked_for(here: None, earlier: dict[str, str]) -> None:
    with pytest.raises(
        UserError, match=r"r was started in bfloat16, and here avx2 has no .* --dtype bfloat16"
    ):
        place_of(recipe(), earlier, Path("r"))
    assert place_of(recipe(dtype="bfloat16"), earlier, Path("r")).dtype == "bfloat16"


def test_device_and_dtype_make_no_other_recipe(tmp_path: Path) -> None:
    claim(tmp_path, recipe())
    (tmp_path / "lineage.json").write_text("{}")
    claim(tmp_path, recipe(device="cpu", dtype="float32"))
    assert "dtype: auto" in (tmp_path / "recipe.yaml").read_text()
    with pytest.raises(UserError, match="was started with another base"):
        claim(tmp_path, recipe(base="y"))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.symlink_to(path.name), "a link that leads in a circle"),
        (os.mkfifo, "a pipe"),
        (Path.mkdir, "a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
def test_a_recipe_that_is_no_file(make: Callable[[Path], None], what: str, tmp_path: Path) -> None:
    make(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=f"recipe.yaml is {what}, not a file; remove it"), locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_origin_is_of_the_settings_that_a_run_keeps(tmp_path: Path) -> None:
    def of(made: Recipe) -> str:
        claim(tmp_path, made)  # nothing is done yet, so it is written anew
        return origin(tmp_path)

    ours = of(recipe())
    assert of(recipe(device="cpu", dtype="float32")) == ours
    (stage,) = recipe().stages
    assert of(recipe().model_copy(update={"stages": [stage.model_copy(update={"memory_gb": 3.0})]})) == ours
    assert of(recipe(base="y")) != ours
    assert of(recipe().model_copy(update={"seed": 1})) != ours
    (tmp_path / "lineage.json").write_text("{}")  # kept from now on, as it was written
    path = tmp_path / "recipe.yaml"
    path.write_text("# a note\n" + path.read_text())
    assert origin(tmp_path) == of(recipe().model_copy(update={"seed": 1}))
