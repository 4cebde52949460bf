import dataclasses
import json

import pytest

from farthing.base.errors import UserError
from farthing.plans import measured
from farthing.plans.measured import Calibration, Pace, grow, load, save

PACE = Pace(fixed=1e-3, flop=1e-12, head_fixed=2e-3, head_flop=2e-12)
FOUND = Calibration(
    date="2026-11-23", device="cpu: some", dtype="float32", instructions="avx2", threads=2, torch="2.13.0",
    took=8.0, timed=576, gemm_float32=1e11,
    gemm_bfloat16=3e11, bandwidth=1e10, disk=4e8, small_op=1e-6, decode=PACE, prefill=PACE, train=PACE,
    optimizer=1e-9,
)  # fmt: skip


def test_what_was_measured_is_kept(tmp_path):
    assert load("float32", tmp_path) is None
    path = save(FOUND, tmp_path)
    assert path.parent == tmp_path
    assert load("float32", tmp_path) == FOUND
    json.loads(path.read_text())


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"form": 3', '"form": 2'),
        lambda text: text.replace('"threads"', '"thread"'),
    ],
    ids=["torn", "no table", "older", "other fields"],
)
def test_what_cannot_be_read_is_measured_again(tmp_path, damage):
    path = save(FOUND, tmp_path)
    path.write_text(damage(path.read_text()))
    assert load("float32", tmp_path) is None


def test_the_cache_folder_is_where_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path / "mine"))
    save(dataclasses.replace(FOUND, threads=7))
    found = load("float32")
    assert found is not None
    assert found.threads == 7


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="FARTHING_CACHE"):
        save(FOUND, tmp_path / "file")


def test_a_pace_adds_layers_and_head():
    assert PACE.seconds(30, 1e9, 5e8) == pytest.approx(30e-3 + 1e-3 + 2e-3 + 1e-3)


def test_each_dtype_has_its_own(tmp_path):
    other = dataclasses.replace(FOUND, dtype="bfloat16", threads=7)
    save(FOUND, tmp_path)
    save(other, tmp_path)
    assert load("float32", tmp_path) == FOUND
    assert load("bfloat16", tmp_path) == other


# ---- sizes that fit in the time ----


@pytest.mark.parametrize("rate", [1e3, 1e5, 1e8, 1e12])
def test_sizes_grow_while_they_fit(rate):
    now = [0.0]

    def work(size):
        now[0] += size**3 / rate
        return size**3 / rate

    found = grow(work, (4, 64), lambda size: size**3, 0.5, clock=lambda: now[0])
    assert now[0] <= max(0.5, 2 * 4**3 / rate)  # the smallest is done twice, however slow
    assert found == {size: size**3 / rate for size in found}
    assert max(found) == {1e3: 4, 1e5: 16, 1e8: 64, 1e12: 64}[rate]


def test_the_shortest_time_of_a_size_counts():
    takes = iter([3.0, 1.0, 2.0, 9.0])  # three times, though there were time for more
    now = [0.0]

    def work(size):
        took = next(takes)
        now[0] += took
        return took

    assert grow(work, (4, 4), float, 60.0, clock=lambda: now[0]) == {4: 1.0}
    assert now[0] == 6.0


def test_the_machine_is_measured_in_some_way(tmp_path):
    assert measured.products("float32", 0.01) > 0
    assert measured.products("bfloat16", 0.01) > 0
    assert measured.bandwidth(0.01) > 0
    assert measured.small_op() > 0
    assert measured.disk(0.01, tmp_path) > 0


def test_a_disk_where_nothing_may_be_written_is_measured_elsewhere(tmp_path):
    (tmp_path / "file").write_text("")
    assert measured.disk(0.01, tmp_path / "file" / "below") > 0


def test_a_wait_before_all_work_does_not_stop_the_growth():
    now = [0.0]

    def work(size):
        took = 0.05 + size**3 / 1e9  # waking a thread takes longer than the product
        now[0] += took
        return took

    assert max(grow(work, (4, 64), lambda size: size**3, 1.5, clock=lambda: now[0])) == 64
    assert now[0] <= 1.5
