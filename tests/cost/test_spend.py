import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.cost import ledger, spend
from farthing.cost.ledger import ACTIVITIES, LOST, Line
from farthing.cost.spend import Owned, parse_prices, read_rates, reprice


def line(**more) -> Line:
    usual = {
        "stage": "01-grpo", "activity": "train", "started": 1.7e9, "seconds": 36.0, "device": "NVIDIA H100 SXM 80GB",
        "devices": 1, "tokens_in": 10, "tokens_out": 5, "flops": 100, "joules": 3.6e6, "joules_are": "measured",
        "usd": 0.0295, "usd_rate": 2.95, "rate_source": "test", "status": "ok", "attempt": 1, "step": None,
    }  # fmt: skip
    return usual | more  # type: ignore[return-value]


def write(folder: Path, *lines: object, entries: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ledger.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    if entries:
        (folder / "entries.jsonl").write_text(entries)
    return folder


def booked(folder: Path) -> spend.Booked:
    found = spend.read_run(folder)
    assert found is not None
    return found


# ---- adding up ----

lines = st.lists(
    st.builds(
        line,
        stage=st.sampled_from(["00-base", "01-grpo"]), activity=st.sampled_from(ACTIVITIES),
        started=st.floats(0, 4e9), seconds=st.floats(0, 1e6), usd=st.floats(0, 1e6), joules=st.floats(0, 1e9),
        devices=st.integers(1, 8), status=st.sampled_from(ledger.STATUSES), attempt=st.integers(1, 3),
        device=st.sampled_from(["cpu: test", "NVIDIA H100 SXM 80GB"]), step=st.none() | st.integers(0, 9),
    ),
    max_size=12,
)  # fmt: skip


@given(st.lists(lines, min_size=1, max_size=3))
def test_however_it_is_grouped_nothing_is_lost_and_nothing_counted_twice(ledgers):
    runs = [spend.Booked(f"run{number}", own) for number, own in enumerate(ledgers)]
    total = ledger.merge([run.summary for run in runs]).total
    flat = [each for own in ledgers for each in own]
    assert total.usd == pytest.approx(sum(each["usd"] for each in flat))
    for key in spend.KEYS:
        rows = spend.group(runs, key).values()
        assert sum(row.usd for row in rows) == pytest.approx(total.usd)
        assert sum(row.seconds for row in rows) == pytest.approx(total.seconds)
        assert sum(row.tokens_in for row in rows) == total.tokens_in
    data = spend.as_json(runs)
    assert data["usd"] == pytest.approx(total.usd)
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_work_that_was_thrown_away_is_lost_in_its_own_run_only():
    first = [line(step=1), line(step=2), line(step=2, attempt=2)]
    second = [line(step=1), line(step=2)]
    runs = [spend.Booked("a", first), spend.Booked("b", second)]
    assert spend.group(runs, "run", "activity")[("a", LOST)].seconds == 36
    assert ("b", LOST) not in spend.group(runs, "run", "activity")


def test_a_day_is_utc_and_days_are_in_order(tmp_path):
    runs = [spend.Booked("a", [line(started=86_400.0 * 2), line(started=86_399.0)])]
    assert [key for (key,) in spend.group(runs, "day")] == ["1970-01-01", "1970-01-03"]


def test_csv_adds_up_and_is_no_formula(tmp_path):
    entry = {"kind": "data", "what": "=cmd()", "usd": 2.5, "source": "-invoice", "date": "2026-11-01"}
    write(tmp_path, line(), line(activity="idle"), entries=json.dumps(entry))
    rows = list(csv.DictReader(io.StringIO(spend.as_csv([booked(tmp_path)]))))
    assert len(rows) == 3
    assert sum(float(row["usd"]) for row in rows) == pytest.approx(2 * 0.0295 + 2.5)
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())


# ---- what is wrong with a ledger is said ----


def test_torn_lines_and_entries_are_skipped_and_said(tmp_path):
    write(tmp_path, line(), entries='{"kind": "data"\n[]\n')
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"stage": "01-gr')
    found = booked(tmp_path)
    assert len(found.lines) == 1
    assert found.notes == [
        "1 line of ledger.jsonl skipped: empty, torn or not a ledger's",
        "2 lines of entries.jsonl skipped: torn, or not an entry",
    ]


def test_spans_left_open_are_told_and_not_touched(tmp_path):
    write(tmp_path, line())
    left = tmp_path / "ledger.open.json"
    left.write_text(json.dumps({"ledger_bytes": 0, "lines": [line(seconds=7.0), {"no": "line"}]}))
    assert "7 s are open" in booked(tmp_path).notes[0]
    assert left.exists()


def test_a_clock_that_was_set_back_is_flagged_and_costs_nothing(tmp_path):
    back = [line(started=5000.0), line(started=5036.0), line(started=1400.0), line(started=1436.0)]
    assert ledger.clock_jumps(back) == [2]
    found = booked(write(tmp_path, *back))
    assert "line 3" in found.notes[0]
    assert found.summary.total.seconds == 4 * 36
    assert ledger.clock_jumps([line(), line(clock_jump=-9.5)]) == [1]


def test_spans_around_others_and_gathered_idling_are_no_clock_that_was_set():
    around = [line(started=100.0), line(started=136.0), line(started=64.0, activity="evaluate")]
    assert ledger.clock_jumps(around) == []
    gathered = [line(started=100.1), line(started=136.2), line(started=100.0, seconds=0.3, activity="idle")]
    assert ledger.clock_jumps(gathered) == []


def test_no_ledger_is_none_and_an_empty_one_is_nothing(tmp_path):
    assert spend.read_run(tmp_path) is None
    (tmp_path / "ledger.jsonl").touch()
    assert booked(tmp_path).lines == []
    assert spend.as_json([booked(tmp_path)])["usd"] == 0


# ---- other rates ----


def test_the_same_bill_at_another_price():
    (again,) = reprice([line(devices=4)], {"h100": 10.0})
    assert again["usd"] == pytest.approx(4 * 36 / 3600 * 10)
    assert again["usd_rate"] == 10.0
    assert "given by you" in again["rate_source"]
    assert reprice([line()], {"cpu": 1.0}) == [line()]


def test_the_most_particular_rate_counts():
    (again,) = reprice([line()], {"h100": 1.0, "h100 sxm": 2.0})
    assert again["usd_rate"] == 2.0
    (cpu,) = reprice([line(device="cpu: Example @ 2 GHz")], {"cpu": 0.5})
    assert cpu["usd_rate"] == 0.5


def test_own_hardware_is_wear_and_electricity():
    own = Owned(price=35_040, years=4, hours_per_year=8760, electricity=0.25)
    assert own.wear == pytest.approx(1.0)
    (again,) = reprice([line(seconds=3600.0, joules=2 * 3.6e6)], {"h100": own})
    assert again["usd"] == pytest.approx(1.0 + 2 * 0.25)
    assert "own hardware" in again["rate_source"]
    assert "4 years" in again["rate_source"]


def test_a_rates_file(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text(
        "rates:\n  h100: 2\n  a100: {price: 9000, years: 3, hours_per_year: 8000, electricity: 0.2}\n"
    )
    rates = read_rates(path)
    assert rates["h100"] == 2
    assert isinstance(rates["a100"], Owned)
    path.write_text("name: r\nbase: b\nstages: []\nrates: {h100: 2.5}\n")
    assert read_rates(path) == {"h100": 2.5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rates: {h100: 0}", "above 0"),
        ("rates: {h100: -1}", "above 0"),
        ("rates: {h100: .inf}", "finite"),
        ("rates: {h100: free}", "rates.h100"),
        ("rates: {h1000: 2}", "did you mean"),
        ("rates: {a100: {price: 9000}}", "years: is missing"),
        ("rates: {a100: {price: 1, years: 3, hours_per_year: 9000, electricity: 0}}", "at most 8784"),
        ("price: 3", "no such key"),
        ("[]", "a table"),
        ("rates: {", "rates.yaml"),
    ],
)
def test_a_wrong_rates_file_is_one_sentence(tmp_path, text, said):
    path = tmp_path / "rates.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_rates(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["h100", "h100=", "h100=free", "=2", "h100=0", "h100=-1", "h100=nan", "h100=true", "x=1"]
)
def test_a_wrong_price_is_one_sentence(text):
    with pytest.raises(UserError):
        parse_prices([text])


def test_prices_are_read():
    assert parse_prices(["h100=2.5", "RTX 4090=1"]) == {"h100": 2.5, "RTX 4090": 1.0}


def test_a_rate_of_what_nobody_used_is_refused():
    with pytest.raises(UserError, match="no run here used a100"):
        spend.with_rates([spend.Booked("a", [line()])], {"a100": 2.0})


# ---- what no clock saw ----


def test_entries_are_added_priced_and_kept(tmp_path):
    write(tmp_path, line())
    spend.add_entry(tmp_path, {"kind": "data", "what": "a corpus", "usd": 120, "source": "invoice 7"})
    spend.add_entry(tmp_path, {
        "kind": "teacher", "what": "answers", "tokens_in": 2e6, "tokens_out": 5e6, "usd_per_million_in": 0.5,
        "usd_per_million_out": 2, "source": "the provider's price list", "date": "2026-10-01",
    })  # fmt: skip
    spend.add_entry(tmp_path, {
        "kind": "storage", "what": "checkpoints", "gigabytes": 500, "months": 2, "usd_per_gb_month": 0.02,
        "source": "price list",
    })  # fmt: skip
    found = booked(tmp_path)
    assert [entry.cost for entry in found.entries] == pytest.approx([120, 11, 20])
    assert found.entered == pytest.approx(151)
    assert found.notes == []
    data = spend.as_json([found])
    assert data["usd"] == pytest.approx(151 + 0.0295)
    assert data["usd_measured"] == pytest.approx(0.0295)
    assert data["runs"][0]["entries"][1]["usd"] == pytest.approx(11)


def test_an_entry_after_a_torn_one_is_on_a_line_of_its_own(tmp_path):
    write(tmp_path, line(), entries='{"kind": "da')
    spend.add_entry(tmp_path, {"kind": "other", "what": "x", "usd": 1, "source": "y"})
    assert len(booked(tmp_path).entries) == 1


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"kind": "data", "what": "x", "usd": 1}, "source: is missing"),
        ({"kind": "data", "what": "x", "usd": -1, "source": "y"}, "above 0"),
        ({"kind": "data", "what": "x", "source": "y"}, "give usd, or tokens"),
        (
            {"kind": "data", "what": "x", "usd": 1, "tokens_in": 5e6, "usd_per_million_in": 1, "source": "y"},
            "only one",
        ),
        ({"kind": "fun", "what": "x", "usd": 1, "source": "y"}, "kind"),
        ({"kind": "data", "what": "x", "usd": 1, "source": "y", "date": "yesterday"}, "date"),
        ({"kind": "data", "what": "x", "dollars": 1, "source": "y"}, "no such key"),
        ("data", "a table"),
    ],
)
def test_a_wrong_entry_is_refused_and_nothing_written(tmp_path, entry, said):
    write(tmp_path, line())
    with pytest.raises(UserError, match=r"^--add: ") as caught:
        spend.add_entry(tmp_path, entry)
    assert said in str(caught.value)
    assert not (tmp_path / "entries.jsonl").exists()


def test_an_entry_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="no ledger"):
        spend.add_entry(tmp_path, {"kind": "data", "what": "x", "usd": 1, "source": "y"})
