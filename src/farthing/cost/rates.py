"""Other rates for a bill: rented by the hour, or owned and paid for by wear and electricity.

A rates file is a small table, the same as a recipe's `rates`:

    rates:
      h100: 2.10                  # dollars an hour
      rtx4090: {price: 1800, years: 4, hours_per_year: 4000, electricity: 0.30}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from farthing._yaml import parse_value
from farthing.cost import hardware
from farthing.cost.ledger import Line
from farthing.cost.written import MOST, NotNegative, Positive, Written, read_yaml, validated
from farthing.errors import UserError

JOULES_PER_KWH = 3.6e6


class Owned(Written):
    """A device that is yours: straight-line depreciation over the hours it works, and its electricity."""

    price: Positive
    """Dollars paid for one device, with its share of the machine around it."""
    years: Positive
    """Until it is worth nothing."""
    hours_per_year: Annotated[float, Field(gt=0, le=8784)]
    """Hours it works; the fewer, the dearer each."""
    electricity: NotNegative
    """Dollars a kWh."""

    @property
    def wear(self) -> float:
        """Dollars of depreciation an hour: price / (years * hours_per_year)."""
        return self.price / (self.years * self.hours_per_year)

    def __str__(self) -> str:
        return (
            f"own hardware: ${self.price:g} over {self.years:g} years of {self.hours_per_year:g} h, "
            f"and electricity at ${self.electricity:g}/kWh"
        )


Rates = Mapping[str, float | Owned]


class _File(Written):
    rates: dict[str, Positive | Owned]


def read_rates(path: Path, more: Sequence[str] = ()) -> dict[str, float | Owned]:
    """The rates in a YAML file. Raises UserError for a file that cannot be read and for a wrong key in it."""
    data = read_yaml(path)
    if isinstance(data, dict) and "stages" in data and "rates" in data:
        data = {"rates": data["rates"]}  # a recipe
    rates = dict(validated(_File, data, str(path)).rates)
    for name in rates:
        hardware.find(name)
    return rates


def parse_prices(given: Iterable[str]) -> dict[str, float | Owned]:
    """`--price h100=2.5`: dollars an hour by device. Raises UserError for anything else."""
    prices: dict[str, float | Owned] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        usd = parse_value(value, "--price") if equals else None
        if not name or isinstance(usd, bool) or not isinstance(usd, int | float):
            raise UserError(f"--price {text}: write it as DEVICE=DOLLARS an hour, for example h100=2.50")
        if not 0 < usd <= MOST:
            raise UserError(f"--price {text}: an hour's price has to be a number above 0")
        hardware.find(name)
        prices[name.strip()] = float(usd)
    return prices


def reprice(lines: Sequence[Line], rates: Rates) -> list[Line]:
    """The same lines at other rates; a line on a device that `rates` does not name stays as it is.

    An owned device costs its wear by the hour, and its electricity by the joules in the line. Those of a GPU
    line hold the host's processor too; see `cost.energy` for what is covered.
    """
    found = {device: _rate(device, rates) for device in {line["device"] for line in lines}}
    return [line if (rate := found[line["device"]]) is None else _priced(line, *rate) for line in lines]


def applies(key: str, device: str) -> bool:
    """Whether a rate's key names the device of a ledger's line."""
    return hardware.means(key, hardware.named(device))


def _rate(name: str, rates: Rates) -> tuple[float | Owned, str] | None:
    """The most particular of the rates that name a device of the ledger."""
    fitting = [key for key in rates if applies(key, name)]
    if not fitting:
        return None
    rate = rates[max(fitting, key=len)]
    return rate, str(rate) if isinstance(rate, Owned) else "another rate, given by you"


def _priced(line: Line, rate: float | Owned, source: str) -> Line:
    hours = line["seconds"] * line["devices"] / 3600
    if isinstance(rate, Owned):
        electricity = line["joules"] / JOULES_PER_KWH * rate.electricity
        usd, hourly = hours * rate.wear + electricity, rate.wear
    else:
        usd, hourly = hours * rate, rate
    return {**line, "usd": usd, "usd_rate": hourly, "rate_source": source}
