"""Numbers in text: one or none."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.tasks.extract import canonical, one_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", "7"),
        ("**7**", "7"),
        ("$7$", "7"),
        ("\\boxed{7}", "7"),
        ("\\boxed{-7}", "-7"),
        ("-\\boxed{7}", "-7"),
        ("-$7", "-7"),
        ("$-7$", "-7"),
        ("-(7)", "-7"),
        ("(7)", "7"),
        ("7 apples", "7"),
        ("7kg", "7"),
        ("90°", "90"),
        ("7.", "7"),
        ("7.0", "7"),
        ("7.50", "7.5"),
        (".5", "0.5"),
        ("007", "7"),
        ("+7", "7"),
        ("-0", "0"),
        ("−3", "-3"),
        ("–3", "-3"),
        ("1,234", "1234"),
        ("1,234,567.5", "1234567.5"),
        ("1{,}234", "1234"),
        ("1\\,234", "1234"),
        ("", None),
        ("seven", None),
        ("7 8", None),
        ("7 or 8", None),
        ("1,23", None),
        ("0,123", None),
        ("1,2345", None),
        ("1.2.3", None),
        ("3/4", None),
        ("5-2", None),
        ("x-7", None),
        ("- 7", None),
        ("5 - -2", None),
        ("--7", None),
        ("±7", None),
        ("√49", None),
        ("7²", None),
        ("7½", None),
        ("７", None),
        ("٧", None),
        ("③", None),
        ("x7", None),
        ("7e3", None),
        ("0x1F", None),
        ("1_000", None),
        ("9" * 401, None),
    ],
)
def test_reading(text: str, number: str | None) -> None:
    assert one_number(text) == number


@given(
    st.integers(-(10**30), 10**30),
    st.sampled_from(["{}", "{:,}", "{}.0", "**{}**", "${}$", "{} apples.", "{:,}."]),
)
def test_an_integer_comes_back_from_every_way_to_write_it(value: int, form: str) -> None:
    assert one_number(form.format(value)) == str(value)


@given(st.decimals(-(10**9), 10**9, places=4))
def test_equal_values_are_equal_text(value: object) -> None:
    number = one_number(str(value))
    assert number is not None
    assert Fraction(number) == Fraction(str(value))
    assert one_number(number) == number
    assert one_number(f"{number}000" if "." in number else f"{number}.000") == number


@given(st.text(alphabet="0123456789,.-−+ x$*{}\\/²٣", max_size=30))
def test_never_raises_and_is_stable(text: str) -> None:
    number = one_number(text)
    assert number is None or one_number(number) == number


def test_zero_has_no_sign() -> None:
    assert canonical("-", "0.00") == "0"
