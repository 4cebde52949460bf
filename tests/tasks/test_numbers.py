"""Numbers in text: one or none."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.tasks.numbers import canonical, one_number


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
        # the word for a sign, and where it is a subtraction
        ("minus 7", "-7"), ("negative 7", "-7"), ("$negative 7", "-7"), ("plus 7", "7"), ("ten minus 7", None),
        # another number: multiplied, powered, rooted, halved
        ("7k", None), ("7K", None), ("7M", None), ("$7k", None), ("7 M", None), ("7B", None), ("7bn", None),
        ("7 million", None), ("£7 million", None), ("7-thousand", None), (r"7\text{ million}", None), ("7 dozen", None),
        ("7!", None), ("7 factorial", None), ("7 squared", None), ("7 and a half", None), ("7 hundredths", None),
        ("7π", None), (r"7\pi", None), (r"7 \pi", None), ("7 pi", None), (r"\sqrt{7}", None), (r"\sqrt7", None),
        ("sqrt(7)", None), (r"\sqrt[x]{7}", None), ("square root of 7", None), ("twice 7", None), ("half of 7", None),
        ("7 lakh", None), ("7 crore", None), ("7 grand", None), ("7 milliard", None), ("7 Mrd", None), ("7 mil", None),
        ("7 doubled", None), ("7 !", None), ("!7", None), ("sqrt 7", None), ("7\u0305", None), ("7\u0338", None),
        ("7‰", None), ("neg 7", None), ("7 negative", None), ("7 below zero", None), ("the opposite of 7", None),
        ("the reciprocal of 7", None), ("0.7 repeating", None), ("7 mile", "7"), ("7 million-dollar", None),
        (r"\log 7", None), ("log 7", None), ("f(7)", None), (r"\frac{7}{x}", None), (r"\frac{x}{7}", None),
        (r"7\times", None), (r"7\cdot x", None), ("7/x", None), ("7^x", None), ("x^{7}", None), ("7_b", None),
        # a variable, a relation, a denial
        ("7x", None), ("7 x", None), ("7i", None), ("7n", None), ("7*x", None), ("7 - x", None), (">7", None),
        ("< 7", None), (r"\geq 7", None), ("~7", None), ("≈7", None), ("not 7", None), ("isn't 7", None),
        ("more than 7", None), ("at least 7", None), ("over 7", None),
        # units, money, formats and sentences leave the number what it is
        ("7 m", "7"), ("7m", "7"), ("7 km", "7"), ("7km", "7"), ("7%", "7"), (r"7\%", "7"), ("7€", "7"), ("£7", "7"),
        ("7 hours", "7"), ("7 percent", "7"), ("7 times", "7"), ("7 a day", "7"), ("7 T-shirts", "7"), ("7GB", "7"),
        (r"7^\circ", "7"), (r"7^{\circ}", "7"), (r"7\text{ apples}", "7"), (r"7\,\text{cm}", "7"), (r"\text{7}", "7"),
        (r"\mathbf{7}", "7"), (r"\(7\)", "7"), (r"\[7\]", "7"), ("about 7", "7"), ("x = 7", "7"), ("7, indeed.", "7"),
    ],
)  # fmt: skip
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
