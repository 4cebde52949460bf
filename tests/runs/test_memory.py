"""Memory that runs out in the middle of a run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.base.device import Place
from farthing.base.errors import UserError
from farthing.plans.sampling import MEASURED, fitting_gb, training_memory
from farthing.recipe import load, validate
from farthing.runs import memory, run
from farthing.runs.memory import within_memory
from farthing.stages import kind

OLD = Path(__file__).parent / "data" / "run-0.1.0"
CPU = Place("cpu", "float32", "a test")


def stage(memory_gb: float = 8.0, **changes: Any) -> Any:
    settings = {"kind": "pretrain", "data": ["x"], "size": "2M", "length": 128, "batch_tokens": 10**7}
    return validate({"name": "t", "stages": [{**settings, "memory_gb": memory_gb, **changes}]}).stages[0]


def said(act: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, room: float) -> str:
    monkeypatch.setattr(memory, "could_be_had", lambda _: room)
    with pytest.raises(UserError) as caught, within_memory(CPU, 3, stage(**changes)):
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def no_memory() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def test_what_would_fit_is_named_and_does_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    message = said(no_memory, {}, monkeypatch, 2e9)
    assert message.startswith("stage 3 (pretrain) ran out of memory on cpu, where 2 GB could be had; ")
    assert "memory_gb is 8, " in message
    named = float(message.rpartition("--set stages.3.memory_gb=")[2])
    assert 0.1 < named < 2
    assert training_memory(stage(named).work(None, MEASURED), "cpu", "float32").total <= 2e9
    assert training_memory(stage().work(None, MEASURED), "cpu", "float32").total > 2e9


def test_the_more_room_the_more_fits() -> None:
    work = stage().work(None, MEASURED)
    fits = [fitting_gb(work, "cpu", "float32", room) for room in (1e8, 1e9, 4e9, 1e10)]
    assert fits == sorted(fits)
    assert fits[0] == 0 < fits[1]


def test_if_the_formula_finds_room_enough_half_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "memory_gb is 8, 4 would fit" in said(no_memory, {}, monkeypatch, 1e12)


def test_if_nothing_fits_another_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no memory_gb would fit; take a smaller model" in said(no_memory, {}, monkeypatch, 1e8)


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="shapes"), within_memory(CPU, 1, stage()):
        raise RuntimeError("shapes differ")
    with pytest.raises(UserError, match="the evaluation ran out of memory on cpu"), within_memory(CPU):
        raise MemoryError


def test_a_run_that_ran_out_of_memory_goes_on_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(OLD, tmp_path / "old", symlinks=True))
    recipe = load(folder / "recipe.yaml", ["dtype=bfloat16"])

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(kind("grpo"), "run", fail)
        with pytest.raises(UserError, match=r"stage 2 \(grpo\) ran out of memory on cpu") as caught:
            run(recipe, folder, quiet=True)
    change = str(caught.value).rpartition("--set ")[2]
    assert change.startswith("stages.2.memory_gb=")
    again = load(folder / "recipe.yaml", ["dtype=bfloat16", change])
    assert [done["steps"] for done in run(again, folder, quiet=True).results["stages"]] == [8, 4]
