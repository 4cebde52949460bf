"""Numbers as text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.report import humane


@pytest.mark.parametrize(
    ("function", "value", "said"),
    [
        (humane.percent, 0.312, "31.2%"),
        (humane.percent, -0.001, "−0.1%"),
        (humane.points, 0.174, "+17.4"),
        (humane.points, -0.02, "−2.0"),
        (humane.points, -0.0001, "0.0"),
        (humane.interval, (0.272, 0.355), "27.2% to 35.5%"),
        (humane.interval, None, "–"),
        (humane.money, 0.0, "$0"),
        (humane.money, 0.0131, "$0.013"),
        (humane.money, 0.00042, "$0.00042"),
        (humane.money, 9.44, "$9.44"),
        (humane.money, 12345.6, "$12,346"),
        (humane.money, 1e-9, "under $0.000001"),
        (humane.duration, 492.0, "8.2 min"),
        (humane.count, 12345, "12,345"),
        (humane.energy, 3.88 * 3600, "3.88 Wh"),
        (humane.energy, 1.3 * 3.6e6, "1.30 kWh"),
        (humane.scientific, 2.4e-6, "2.4×10⁻⁶"),
        (humane.scientific, 1e-3, "10⁻³"),
        (humane.short, 0.25, "0.25"),
        (humane.short, 1500.0, "1,500"),
        (humane.short, -41300.0, "−41.3 k"),
        (humane.short, 0.0, "0"),
    ],
)
def test_a_number_reads_as_a_person_would_write_it(function, value, said):
    assert function(value) == said


def test_one_is_singular():
    assert humane.plural(1, "question") == "1 question"
    assert humane.plural(2000, "question") == "2,000 questions"


@pytest.mark.parametrize(
    "function",
    [
        humane.percent,
        humane.points,
        humane.money,
        humane.duration,
        humane.count,
        humane.scientific,
        humane.short,
    ],
)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_hole_shows_as_a_hole(function, value):
    assert function(value) == "–"


@given(st.floats(min_value=1e-5, max_value=1e9))
def test_money_spent_never_reads_as_nothing_and_is_right_to_two_digits(usd):
    said = float(humane.money(usd).removeprefix("$").replace(",", ""))
    assert said > 0
    assert said == pytest.approx(usd, rel=0.06)


@given(st.floats(min_value=1e-90, max_value=1e90))
def test_a_column_writes_its_own_total_to_three_digits(total):
    column = humane.column(total, humane.COMPUTE)
    assert float(column(total)) == pytest.approx(total / column.size, rel=0.006)


def test_a_column_lines_up_and_hides_nothing():
    column = humane.column(0.012, humane.DOLLARS, least=2)
    assert [column(value) for value in (0.0055, 0.0046, 0.00001, 0.0)] == ["0.0055", "0.0046", "<0.0001", "–"]
    assert humane.column(1234.0, humane.DOLLARS, least=2)(1234.0) == "1234.00"
