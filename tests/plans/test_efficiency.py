import dataclasses
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.cost.devices import Device, find
from farthing.plans import efficiency as module
from farthing.plans.efficiency import (
    LENGTHS,
    PRIORS,
    Conditions,
    balance,
    coefficients,
    default_devices,
    efficiency,
    spread,
    summary,
    validation,
    validation_json,
    validation_text,
)
from farthing.plans.published import validation_runs

USUAL = Conditions(work=50e9, seq_len=4096, balance=295, devices=1024)


def test_the_baseline_is_the_one_to_beat():
    rows = validation()
    assert len(rows) == len(validation_runs()) == 50
    baseline = summary(row.baseline / row.run.device_hours for row in rows)
    assert baseline["median_error"] == pytest.approx(0.266, abs=0.002)  # cost.md: 25% over its 51 rows


def test_left_out_runs_are_predicted_better_than_the_goal():
    rows = validation()
    for ratios in ([row.ratio for row in rows], [row.unseen / row.run.device_hours for row in rows]):
        found = summary(ratios)
        assert found["within_2"] >= 0.95
        assert found["within_1_6"] >= 0.9
    assert summary(row.ratio for row in rows)["median_error"] <= 0.12
    assert summary(row.unseen / row.run.device_hours for row in rows)["median_error"] <= 0.15


def test_the_range_is_as_wide_as_it_has_to_be():
    rows = validation()
    assert 0.85 <= statistics.mean(row.in_range for row in rows) <= 0.95
    below, above = spread()
    assert below < 0 < above


def test_an_error_lies_outside_a_conformal_range_as_rarely_as_that_says():
    """Of equally likely orders, the last of n + 1 is below the k-th of the others in k of n + 1."""
    errors = [float(n) for n in range(99)]
    below, above = module._quantiles(errors)
    assert (below, above) == (4.0, 94.0)  # the fifth from either end: 5 of 100
    assert module._quantiles([1.0, 2.0, 3.0]) == (1.0, 3.0)  # too few to say


def test_a_laboratory_is_left_out_whole():
    rows = validation()
    assert len({row.run.laboratory for row in rows}) > 15
    only = {"Bloomberg", "Google"}  # with one row, leaving out the row is leaving out the laboratory
    for row in rows:
        if row.run.laboratory in only:
            assert row.unseen == pytest.approx(row.predicted)
    assert any(abs(math.log(row.unseen / row.predicted)) > 0.05 for row in rows)


def test_a_run_does_not_know_itself(monkeypatch):
    """Hours ten times as long change what a run is compared with, not what is predicted for it."""
    before = {row.run.name: row.predicted for row in validation()}
    rows = module._all_rows()
    changed = tuple(
        dataclasses.replace(run, device_hours=10 * run.device_hours) if run.name == "mpt-7b" else run
        for run in rows
    )
    monkeypatch.setattr(module, "_all_rows", lambda: changed)
    module._errors.cache_clear()
    try:
        after = {row.run.name: row for row in module.validation.__wrapped__()}
    finally:
        monkeypatch.undo()
        module._errors.cache_clear()
    assert after["mpt-7b"].predicted == pytest.approx(before["mpt-7b"])
    assert after["mpt-7b"].run.device_hours == pytest.approx(1_003_200)
    assert after["mpt-1b"].predicted != pytest.approx(before["mpt-1b"], rel=1e-6)  # it does learn from others


def test_coefficients_have_the_signs_that_physics_gives_them():
    found = coefficients()
    assert found.keys() == PRIORS.keys()
    for name in ("work", "fp8", "steady"):
        assert found[name] > 0, name
    for name in ("balance", "length", "moe", "old", "distilled"):
        assert found[name] < 0, name


@given(
    work=st.floats(1e6, 1e13),
    seq_len=st.integers(1, 2**20),
    machine=st.floats(5, 600),
    devices=st.integers(1, 100_000),
    fp8=st.booleans(),
    moe=st.booleans(),
)
def test_any_run_has_an_efficiency(work, seq_len, machine, devices, fp8, moe):
    found = efficiency(Conditions(work, seq_len, machine, devices, fp8, moe))
    assert 0 < found.low < found.likely < found.high <= 1
    assert found.likely <= module.HIGHEST


def test_what_costs_time_costs_time():
    likely = efficiency(USUAL).likely
    for change in (
        {"work": 5e9},
        {"seq_len": 8192},
        {"moe": True},
        {"year": 2021},
        {"scope": "distilled"},
        {"balance": 600.0},
    ):
        assert efficiency(dataclasses.replace(USUAL, **change)).likely < likely, change
    assert efficiency(dataclasses.replace(USUAL, devices=8)).likely > likely
    assert efficiency(dataclasses.replace(USUAL, fp8=True)).likely > likely


def test_a_few_nodes_take_little():
    """torchtitan's Llama 3.1 8B loses 2% from 8 to 128 H100 (benchmarks/llama3_h100_202412_torchtitan.md)."""
    eight, many = (
        efficiency(dataclasses.replace(USUAL, seq_len=8192, devices=count)).likely for count in (8, 128)
    )
    assert 1.0 <= eight / many < 1.1


def test_lengths_beyond_those_of_the_table_do_not_count():
    shortest, longest = LENGTHS
    for length, end in ((16, shortest), (131072, longest)):
        found = efficiency(dataclasses.replace(USUAL, seq_len=length))
        assert found == efficiency(dataclasses.replace(USUAL, seq_len=end))


def test_steady_runs_that_the_fit_never_saw_are_near():
    """nanochat's d24 on 8 H100: 4.33e19 FLOPs in 10,949 s, evaluations apart, is 50% with full attention, 46 to
    47% causal."""
    found = efficiency(Conditions(4.5e9, 2048, balance=989e12 / 3.35e12, devices=8, scope="steady"))
    assert found.low < 0.465 < found.high


def test_balance_needs_figures():
    assert balance(find("a100-80gb")) == pytest.approx(153, abs=1)
    with pytest.raises(UserError, match="somebody's GPU"):
        balance(Device(name="somebody's GPU", kind="gpu"))


def test_default_devices_end_a_run_in_sixty_days():
    device = find("h100")
    for flops in (1e18, 1e22, 1e25):
        count = default_devices(flops, device)
        assert math.log2(count).is_integer()
        days = flops / (0.4 * 989e12 * count) / 86400
        assert days <= 60
        assert count == 1 or days > 30


def test_the_table_shows_every_run_and_its_summary():
    text, data = validation_text(), validation_json()
    for run in validation_runs():
        assert f"{run.name} " in text
    assert f"median error {100 * data['summary']['model']['median_error']:.1f}%" in text
    assert {row["run"] for row in data["left_out"]} >= {
        "llmc-gpt3-125m", "llama3.3-70b", "gpt3-175b", "mtnlg-530b", "nemotron4-340b",
    }  # fmt: skip
    assert len(data["rows"]) == 50
