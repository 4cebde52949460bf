"""Numbers as text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base import figures


@pytest.mark.parametrize(
    ("function", "value", "said"),
    [
        (figures.percent, 0.312, "31.2%"),
        (figures.percent, -0.001, "−0.1%"),
        (figures.points, 0.174, "+17.4"),
        (figures.points, -0.02, "−2.0"),
        (figures.points, -0.0001, "0.0"),
        (figures.interval, (0.272, 0.355), "27.2% to 35.5%"),
        (figures.interval, None, "–"),
        (figures.money, 0.0, "$0"),
        (figures.money, 0.0131, "$0.013"),
        (figures.money, 0.00042, "$0.00042"),
        (figures.money, 9.44, "$9.44"),
        (figures.money, 12345.6, "$12,346"),
        (figures.money, 1e-9, "under $0.000001"),
        (figures.hourly, 0.08, "$0.08/h"),
        (figures.hourly, 0.9, "$0.90/h"),
        (figures.hourly, 0.00425, "$0.00425/h"),
        (figures.hourly, 1234.5, "$1,234.50/h"),
        (figures.bytes_, 950, "950 bytes"),
        (figures.bytes_, 12_340, "12.3 kB"),
        (figures.bytes_, 999_960, "1 MB"),
        (figures.bytes_, 6.534e9, "6.53 GB"),
        (figures.duration, 492.0, "8.2 min"),
        (figures.count, 12345, "12,345"),
        (figures.energy, 3.88 * 3600, "3.88 Wh"),
        (figures.energy, 0.012 * 3600, "12.0 mWh"),
        (figures.energy, 1.3 * 3.6e6, "1.30 kWh"),
        (figures.scientific, 2.4e-6, "2.4×10⁻⁶"),
        (figures.scientific, 1e-3, "10⁻³"),
        (figures.short, 0.25, "0.25"),
        (figures.short, 1500.0, "1,500"),
        (figures.short, -41300.0, "−41.3K"),
        (figures.short, 0.0, "0"),
    ],
)
def test_a_number_reads_as_a_person_would_write_it(function, value, said):
    assert function(value) == said


def test_one_is_singular():
    assert figures.plural(1, "question") == "1 question"
    assert figures.plural(2000, "question") == "2,000 questions"


@pytest.mark.parametrize(
    "function",
    [
        figures.percent,
        figures.points,
        figures.money,
        figures.hourly,
        figures.bytes_,
        figures.duration,
        figures.count,
        figures.scientific,
        figures.short,
    ],
)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_hole_shows_as_a_hole(function, value):
    assert function(value) == "–"


@given(st.floats(min_value=1e-5, max_value=1e9))
def test_money_spent_never_reads_as_nothing_and_is_right_to_two_digits(usd):
    said = float(figures.money(usd).removeprefix("$").replace(",", ""))
    assert said > 0
    assert said == pytest.approx(usd, rel=0.06)


@given(st.floats(min_value=1e-90, max_value=1e90))
def test_a_column_writes_its_own_total_to_three_digits(total):
    column = figures.column(total, figures.COMPUTE)
    assert float(column(total)) == pytest.approx(total / column.size, rel=0.006)


def test_a_column_lines_up_and_hides_nothing():
    column = figures.column(0.012, figures.DOLLARS, least=2)
    assert [column(value) for value in (0.0055, 0.0046, 0.00001, 0.0)] == ["0.0055", "0.0046", "<0.0001", "–"]
    assert figures.column(1234.0, figures.DOLLARS, least=2)(1234.0) == "1234.00"


def test_letters_to_fewer_digits() -> None:
    assert [figures.letters(value, 2) for value in (1.234e9, 999_999.0, 150e9, 1234.0)] == [
        "1.2B",
        "1M",
        "150B",
        "1.2K",
    ]
