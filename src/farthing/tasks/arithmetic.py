"""Generators of chain_sum and products, so that sums and products need no other package.

The questions are reasoning-gym's (0.1.25, Apache-2.0, arXiv:2505.24760): same sentences, settings and draws in the
same order, so a seed and an index name the same item in both. Tests compare the two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from random import Random

VERSION = "0.1.25"  # the reasoning-gym whose items these are


@dataclass(frozen=True)
class _Numbers(ABC):
    """Count and length of the numbers in a question; both ends of a range are included.

    Raises ValueError for a range that is empty or starts below 1, and for a value that is not a whole number.
    """

    min_terms: int = 2
    max_terms: int = 2
    min_digits: int = 1
    max_digits: int = 5
    allow_negation: bool = False

    def __post_init__(self) -> None:
        for what in ("terms", "digits"):
            least, most = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            for name, value in ((f"min_{what}", least), (f"max_{what}", most)):
                if not isinstance(value, int):
                    raise ValueError(f"{name} must be a whole number, not {value!r}")
            if least < 1:
                raise ValueError(f"min_{what} must be at least 1, not {least}")
            if most < least:
                raise ValueError(f"max_{what} must be at least min_{what}, {least}, not {most}")
        if not isinstance(self.allow_negation, int):
            raise ValueError(f"allow_negation must be true or false, not {self.allow_negation!r}")

    def item(self, seed: int, index: int) -> tuple[str, str]:
        """Question and answer of item `index` of `seed`."""
        draw = Random(seed + index)
        terms = draw.randint(self.min_terms, self.max_terms)
        digits = draw.randint(self.min_digits, self.max_digits)
        high = 10**digits - 1
        low = 0 if digits == 1 else 10 ** (digits - 1)
        if self.allow_negation:
            low = -high
        return self.asked([draw.randint(low, high) for _ in range(terms)], draw)

    @abstractmethod
    def asked(self, numbers: list[int], draw: Random) -> tuple[str, str]:
        """Question and answer of these numbers."""


@dataclass(frozen=True)
class ChainSum(_Numbers):
    """`7 - 4 + 2 =`: the signs are drawn after the numbers."""

    max_terms: int = 6
    max_digits: int = 4

    def asked(self, numbers: list[int], draw: Random) -> tuple[str, str]:
        total = numbers[0]
        chain = str(total)
        for sign, number in [(draw.choice("+-"), number) for number in numbers[1:]]:
            chain += f" {sign} {number}"
            total += number if sign == "+" else -number
        return f"State the final answer to the following arithmetic problem: {chain} =", str(total)


@dataclass(frozen=True)
class Products(_Numbers):
    """`60 * 93`."""

    def asked(self, numbers: list[int], draw: Random) -> tuple[str, str]:
        factors = " * ".join(map(str, numbers))
        asked = f"Solve the following multiplication: {factors}. Give only the result as your final answer."
        return asked, str(prod(numbers))


GENERATORS: dict[str, type[_Numbers]] = {"chain_sum": ChainSum, "products": Products}
