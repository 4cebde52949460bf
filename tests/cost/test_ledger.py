import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.base.schema import checked
from farthing.cost import ledger, spend
from farthing.cost.ledger import ACTIVITIES, LOST, STATUSES, Line, read, summarise


def line(activity="train", seconds=1.0, **more) -> Line:
    usual = {
        "stage": "01-grpo",
        "activity": activity,
        "started": 1.7e9,
        "seconds": seconds,
        "device": "cpu: test",
        "devices": 1,
        "tokens_in": 0,
        "tokens_out": 0,
        "flops": 0,
        "joules": 0.0,
        "joules_are": "measured",
        "usd": seconds / 1000,
        "usd_rate": 3.6,
        "rate_source": "test",
        "status": "ok",
        "attempt": 1,
        "step": None,
    }
    return usual | more  # type: ignore[return-value]


def rows(lines) -> dict[str, float]:
    return {row.activity: row.seconds for row in summarise(lines).rows}


def test_reading_skips_and_counts_what_is_no_line(tmp_path):
    good = json.dumps(line()).encode()
    no_step = {key: value for key, value in line().items() if key != "step"}
    bad = [
        b"",
        b"   ",
        b"{",
        good[:50],
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps(no_step).encode(),
        *(
            json.dumps(line() | {key: value}).encode()
            for key, value in [
                ("seconds", -1.0),
                ("seconds", float("nan")),
                ("seconds", float("inf")),
                ("seconds", 10**400),
                ("tokens_in", 10**400),
                ("flops", 10**400),
                ("attempt", 10**400),
                ("step", 10**400),
                ("devices", 10**50),
                ("started", 1e18),
                ("started", 10**400),
                ("stage", "\ud800"),
                ("device", None),
                ("activity", ["train"]),
                ("joules_are", {}),
                ("seconds", "1"),
                ("seconds", True),
                ("activity", "nap"),
                ("status", "fine"),
                ("joules_are", "guessed"),
                ("tokens_in", 1.5),
                ("step", -1),
                ("attempt", None),
                ("stage", 7),
            ]
        ),
    ]
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"\n".join([good, *bad, good]) + b"\n")
    lines, skipped = read(path)
    assert lines == [line(), line()]
    assert skipped == len(bad)


def test_a_missing_ledger_and_one_without_a_last_line_end(tmp_path):
    path = tmp_path / "ledger.jsonl"
    assert read(path) == ([], 0)
    path.write_text(json.dumps(line()))
    assert read(path) == ([line()], 0)
    path.write_text("")
    assert read(path) == ([], 0)


def test_unknown_keys_of_a_later_version_are_no_mistake(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps(line() | {"grams_co2": 1}) + "\n")
    assert len(read(path)[0]) == 1


def test_rows_come_by_stage_then_activity_with_lost_work_last():
    lines = [
        line("idle", stage="b"),
        line("train", stage="b", status="failed"),
        line("train", stage="b"),
        line("load", stage="b"),
        line("train", stage="a"),
    ]
    summary = summarise(lines)
    assert [(row.stage, row.activity) for row in summary.rows] == [
        ("b", "load"),
        ("b", "train"),
        ("b", "idle"),
        ("b", LOST),
        ("a", "train"),
    ]
    assert [(row.activity, row.seconds) for row in summary.by_activity()] == [
        ("load", 1.0),
        ("train", 2.0),
        ("idle", 1.0),
        (LOST, 1.0),
    ]
    assert summary.failed
    assert summary.interruptions == 1


def test_steps_done_again_are_lost():
    lines = [line("load")]
    lines += [line("train", seconds=1, step=step) for step in range(1, 8)]  # a checkpoint after step 4
    lines += [line("generate", seconds=0.5, step=8, status="interrupted")]
    lines += [line("load", attempt=2)]
    lines += [line("train", seconds=1, step=step, attempt=2) for step in range(5, 11)]
    assert rows(lines) == {"load": 2.0, "train": 10.0, LOST: 3.5}
    assert summarise(lines).interruptions == 1


def test_a_third_attempt_that_resumes_earlier_loses_the_work_of_both():
    lines = [line(step=step, attempt=1) for step in range(1, 7)]
    lines += [line(step=step, attempt=2) for step in range(5, 9)]
    lines += [line(step=step, attempt=3) for step in range(3, 11)]
    assert rows(lines) == {"train": 10.0, LOST: 8.0}
    assert summarise(lines).interruptions == 2


def test_steps_of_another_stage_are_not_done_again():
    lines = [line(step=step, stage="01-sft") for step in range(1, 11)]
    lines += [line(step=step, stage="02-grpo", attempt=2) for step in range(1, 4)]
    assert summarise(lines).total.seconds == 13.0
    assert not [row for row in summarise(lines).rows if row.activity == LOST]
    assert summarise(lines).interruptions == 0


def test_wall_clock_leaves_out_the_night_between_attempts():
    lines = [
        line(started=1000.0, seconds=10),
        line(started=1010.0, seconds=10),
        line(started=90_000.0, seconds=5, attempt=2),
    ]
    summary = summarise(lines)
    assert summary.wall_seconds == 25
    assert summary.covered == 1.0


def test_a_hole_in_the_ledger_shows():
    lines = [line(started=1000.0, seconds=10), line(started=1015.0, seconds=5)]
    assert summarise(lines).covered == pytest.approx(0.75)
    assert summarise(lines, wall_seconds=30).covered == pytest.approx(0.5)


def test_energy_is_estimated_as_soon_as_a_part_is():
    both = summarise([line("load", joules_are="estimated"), line("train")])
    assert {row.activity: row.joules_are for row in both.rows} == {"load": "estimated", "train": "measured"}
    assert both.total.joules_are == "estimated"
    assert summarise([line("train")]).total.joules_are == "measured"


def test_device_hours_and_rates():
    summary = summarise([line(seconds=1800, devices=4), line(devices=4), line(usd_rate=1.0)])
    assert summary.total.device_hours == pytest.approx((1800 * 4 + 4 + 1) / 3600)
    assert [(rate.devices, rate.usd) for rate in summary.rates] == [(4, 3.6), (1, 1.0)]


def test_an_empty_ledger():
    summary = summarise([])
    assert summary.rows == []
    assert summary.covered == 0.0
    assert summary.total.usd == 0


amounts = st.floats(0, 1e9, allow_nan=False)
lines_of_any_kind = st.builds(
    line,
    activity=st.sampled_from(ACTIVITIES),
    seconds=amounts,
    stage=st.sampled_from(["01-sft", "02-grpo"]),
    started=amounts,
    devices=st.integers(0, 8),
    tokens_in=st.integers(0, 10**9),
    tokens_out=st.integers(0, 10**9),
    flops=st.integers(0, 10**24),
    joules=amounts,
    joules_are=st.sampled_from(["measured", "estimated"]),
    usd=amounts,
    status=st.sampled_from(STATUSES),
    attempt=st.integers(1, 4),
    step=st.none() | st.integers(0, 20),
)


@given(st.lists(lines_of_any_kind, max_size=30))
def test_the_rows_add_up_to_the_total_and_to_the_lines(lines):
    assert all(ledger.is_line(one) for one in lines)
    summary = summarise(lines)
    for by in (summary.rows, summary.by_activity()):
        for name in ("tokens_in", "tokens_out", "flops"):
            assert sum(getattr(row, name) for row in by) == getattr(summary.total, name)
            assert getattr(summary.total, name) == sum(one[name] for one in lines)
        for name in ("seconds", "joules", "usd"):
            assert sum(getattr(row, name) for row in by) == pytest.approx(getattr(summary.total, name))
            assert getattr(summary.total, name) == pytest.approx(sum(one[name] for one in lines))
        assert sum(row.device_hours for row in by) == pytest.approx(summary.total.device_hours)
    keys = [(row.stage, row.activity) for row in summary.rows]
    assert len(keys) == len(set(keys))
    assert summary.covered <= 1 + 1e-9


@given(st.lists(lines_of_any_kind, max_size=30))
def test_nothing_of_the_last_attempt_that_went_well_is_lost(lines):
    last = ledger.last_attempt(lines)
    kept = [one for one in lines if one["attempt"] == last and one["status"] == "ok"]
    lost = sum(row.flops for row in summarise(lines).rows if row.activity == LOST)
    assert lost <= sum(one["flops"] for one in lines) - sum(one["flops"] for one in kept)


def test_the_last_line_that_is_taken_can_be_shown_with_its_day():
    last = line(started=2.5e11, tokens_in=10**40, usd=1e40)
    assert ledger.is_line(last)
    run = spend.Booked("run", [last] * 3)
    assert list(spend.group([run], "day")) == [("9892-03-08",)]
    assert "9892" in spend.as_csv([run])
    json.dumps(spend.as_json([run]), allow_nan=False)


@pytest.mark.parametrize(
    "text", ["2024-02-30", "2026-13", "0000", "2026-00-01", "２０２６", "2026-1", "1e18"]
)
def test_a_day_that_no_calendar_has_is_no_date(text):
    with pytest.raises(UserError, match="must be a date"):
        checked(spend.Entry, {"kind": "data", "what": "x", "source": "x", "usd": 1.0, "date": text})


@pytest.mark.parametrize("text", ["2024-02-29", "2026-11", "2026", "0001"])
def test_a_day_a_month_and_a_year_are_dates(text):
    checked(spend.Entry, {"kind": "data", "what": "x", "source": "x", "usd": 1.0, "date": text})
