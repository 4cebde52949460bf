import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.figures import amount, duration, exact, letters
from farthing.cost.bill import bill_text
from farthing.cost.ledger import is_line, read, summarise


def make(tmp_path, *lines):
    usual = {
        "stage": "01-grpo",
        "started": 0.0,
        "device": "NVIDIA H100 SXM 80GB",
        "devices": 1,
        "tokens_in": 0,
        "tokens_out": 0,
        "flops": 0,
        "joules_are": "measured",
        "usd_rate": 2.95,
        "rate_source": "market median, AIMultiple, 2026-05",
        "status": "ok",
        "attempt": 1,
        "step": None,
    }
    path = tmp_path / "ledger.jsonl"
    whole = [usual | line for line in lines]
    for line in whole:
        line.setdefault("joules", line["seconds"] * 300)
        line.setdefault("usd", line["seconds"] * line["usd_rate"] / 3600)
        assert is_line(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in whole))
    return summarise(read(path)[0])


def test_a_bill_reads_like_a_shop_s(tmp_path):
    summary = make(
        tmp_path,
        {"activity": "load", "seconds": 240.0},
        {"activity": "generate", "seconds": 7080.0, "tokens_out": 6_100_000, "flops": int(41.2e15)},
        {"activity": "train", "seconds": 3120.0, "tokens_in": 5_400_000, "flops": int(77.9e15)},
        {"activity": "evaluate", "seconds": 720.0, "tokens_out": 600_000, "flops": int(3.9e15)},
        {"activity": "train", "seconds": 360.0, "flops": int(2e15), "status": "interrupted"},
    )
    text = bill_text(summary, "r1-zero   1x H100")
    lines = text.splitlines()
    assert lines[0] == "r1-zero   1x H100"
    assert lines[1].split() == ["time", "tokens", "PFLOP", "Wh", "$"]
    cells = {line.split("  ")[0]: line.split() for line in lines}
    assert cells["load"] == ["load", "4.0", "min", "–", "–", "20.0", "0.20"]
    assert cells["generate"] == ["generate", "118", "min", "6.1M", "41.2", "590.0", "5.80"]
    assert cells["train"][1:4] == ["52", "min", "5.4M"]
    assert cells["interrupted once"][-2:] == ["30.0", "0.29"]
    assert cells["total"] == ["total", "3", "h", "12", "min", "125.0", "960.0", "9.44"]
    assert "$2.95/h for NVIDIA H100 SXM 80GB" in text
    assert "2026-05" in text
    assert "energy measured" in text
    assert "causal" in text


def test_a_small_run_shows_its_money_and_that_energy_is_estimated(tmp_path):
    summary = make(
        tmp_path,
        {"activity": "train", "seconds": 12.0, "usd_rate": 0.08, "joules_are": "estimated", "flops": 10**9},
        {"activity": "verify", "seconds": 0.001, "usd_rate": 0.08, "joules_are": "estimated"},
    )
    text = bill_text(summary)
    assert "0.000267" in text
    assert "<0.000001" in text
    assert "0.00 " not in text
    assert "Wh (est.)" in text
    assert "energy estimated" in text


def test_failures_several_devices_and_brackets_are_shown(tmp_path):
    summary = make(
        tmp_path,
        {"activity": "train", "seconds": 10.0, "status": "failed", "devices": 8, "rate_source": "[red]x"},
        {"activity": "train", "seconds": 10.0, "status": "interrupted", "attempt": 2, "devices": 8},
        {"activity": "train", "seconds": 10.0, "attempt": 3},
    )
    text = bill_text(summary, "[bold]name", width=70)
    assert "[bold]name" in text
    assert "[red]x" in text
    assert "failed or interrupted twice" in text
    assert "each for 8x NVIDIA H100" in text
    assert max(len(line) for line in text.splitlines()) <= 70


@pytest.fixture
def broad(tmp_path):
    """A bill that needs 62 columns, with a long note."""
    return make(
        tmp_path,
        {
            "activity": "checkpoint",
            "seconds": 10.0,
            "joules_are": "estimated",
            "rate_source": "a source " * 9,
        },
        {
            "activity": "train",
            "seconds": 2000.0,
            "tokens_in": 1500,
            "flops": 162 * 10**12,
            "joules_are": "estimated",
        },
        {"activity": "load", "seconds": 0.1, "joules_are": "estimated"},
    )


@pytest.mark.parametrize("width", range(24, 170, 4))
def test_a_bill_fits_any_width_and_cuts_no_word_and_no_number(broad, width):
    lines = bill_text(broad, "name", width).splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    names = [line.split(maxsplit=1)[0] for line in lines if line and not line.startswith(("─", " "))]
    assert {"checkpoint", "train", "load", "total"} <= set(names)
    [total] = [line for line in lines if line.startswith("total")]
    assert total.split()[-1] == "1.65"  # the money is never left out


def test_a_bill_takes_the_width_there_is(broad):
    def widths(width):
        lines = bill_text(broad, "name", width).splitlines()
        return len(next(line for line in lines if line.startswith("─"))), len(lines)

    assert widths(80)[0] == 80
    assert widths(100)[0] == widths(160)[0] == 100  # wider rows are hard to read
    assert widths(160)[1] < widths(80)[1]  # the notes are not wrapped to the table


def test_what_has_no_room_is_said(broad):
    assert "no room" not in bill_text(broad, width=80)
    text = bill_text(broad, width=38)
    assert "left out, as there is no room here: TFLOP, Wh (est.)" in " ".join(text.split())
    assert "tokens" in text.splitlines()[0]


def test_an_empty_bill(tmp_path):
    assert "total" in bill_text(make(tmp_path))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "–"),
        (0.01, "<0.1 s"),
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (42, "42 s"),
        (59.6, "1.0 min"),
        (492, "8.2 min"),
        (7080, "118 min"),
        (7199, "2 h 0 min"),
        (11520, "3 h 12 min"),
        (190_800, "2 d 5 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (950, "950"),
        (999.96, "1K"),
        (12_340, "12.34K"),
        (99_960, "99.96K"),
        (600_000, "600K"),
        (999_960, "1M"),
        (6_100_000, "6.1M"),
        (1_500_000_000, "1.5B"),
        (14_800_000_000_000, "14.8T"),
        (-1500, "−1.5K"),
    ],
)
def test_letters(count, text):
    assert letters(count) == text


@given(st.floats(1e-12, 1e9), st.integers(0, 12))
def test_an_amount_is_never_shown_as_zero(value, decimals):
    shown = amount(value, decimals)
    assert shown.startswith("<") or float(shown) > 0


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0, 2, "–"),
        (0.5, 0, "<1"),  # half of the smallest figure rounds to the even digit, which is 0
        (0.51, 0, "1"),
        (0.125, 1, "0.1"),
        (0.03125, 4, "0.0312"),
        (0.004, 2, "<0.01"),
    ],
)
def test_amounts(value, decimals, text):
    assert amount(value, decimals) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (8_400_000, "8,400,000"),
        (442.4, "442"),
        (42.4, "42.4"),
        (3.75, "3.75"),
        (148e6, "148M"),
        (14.8e12, "14.8T"),
    ],
)
def test_exact_counts(value, text):
    assert exact(value) == text


@given(st.floats(1e-4, 1e12))
def test_no_count_above_zero_is_shown_as_zero(value):
    assert float(letters(value).rstrip("KMBT")) > 0
    assert not exact(value).startswith("0.0000000000000")
