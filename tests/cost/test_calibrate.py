import dataclasses
import json

import pytest

from farthing.cost import calibrate
from farthing.cost.calibrate import Calibration, Pace, load, save, shortest
from farthing.errors import UserError

PACE = Pace(fixed=1e-3, flop=1e-12, head_fixed=2e-3, head_flop=2e-12)
FOUND = Calibration(
    date="2026-11-23", device="cpu: some", threads=2, torch="2.13.0", took=8.0, gemm_float32=1e11,
    gemm_bfloat16=3e11, bandwidth=1e10, disk=4e8, small_op=1e-6, decode=PACE, prefill=PACE, train=PACE,
    optimizer=1e-9,
)  # fmt: skip


def test_what_was_measured_is_kept(tmp_path):
    assert load(tmp_path) is None
    path = save(FOUND, tmp_path)
    assert path.parent == tmp_path
    assert load(tmp_path) == FOUND
    json.loads(path.read_text())


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"form": 1', '"form": 0'),
        lambda text: text.replace('"threads"', '"thread"'),
    ],
    ids=["torn", "no table", "older", "other fields"],
)
def test_what_cannot_be_read_is_measured_again(tmp_path, damage):
    path = save(FOUND, tmp_path)
    path.write_text(damage(path.read_text()))
    assert load(tmp_path) is None


def test_the_cache_folder_is_where_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path / "mine"))
    save(dataclasses.replace(FOUND, threads=7))
    found = load()
    assert found is not None
    assert found.threads == 7


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="FARTHING_CACHE"):
        save(FOUND, tmp_path / "file")


def test_a_pace_adds_layers_and_head():
    assert PACE.seconds(30, 1e9, 5e8) == pytest.approx(30e-3 + 1e-3 + 2e-3 + 1e-3)


def test_a_slow_machine_is_measured_less_often(monkeypatch):
    clock = iter(range(0, 1000, 5))  # every look at the clock is 5 seconds after the one before
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: float(next(clock)))
    runs = []
    assert shortest(lambda: runs.append(1), times=9) == 5.0
    assert len(runs) == 2  # to warm up, and one that was measured
