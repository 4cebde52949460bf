"""The same bill at other prices and on other hardware, with what has to be assumed for it.

Work that has FLOPs (generating, training, evaluating) scales with the device; loading, verifying, checkpoints
and idling take as long as they took, and are paid for at the new device's price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farthing.cost import hardware
from farthing.cost.hardware import Device, Price
from farthing.cost.ledger import Line
from farthing.cost.runs_table import peak

SAME_SHARE = "An estimate, if each device reached the same share of its 16-bit peak"
AT_LEAST = "A lower bound, at the speed of the largest matrix products, which a small model does not reach"


@dataclass(frozen=True)
class Offer:
    """What the run would have cost."""

    device: str
    seconds: float
    low: float
    usual: float
    high: float
    source: str
    """Of the usual price."""
    assumption: str
    """Empty where nothing is assumed: the same device at another price."""


def other_prices(lines: Sequence[Line]) -> list[Offer]:
    """The lines on the devices they ran on, at every other price the catalogue has for those."""
    offers = []
    for name in dict.fromkeys(line["device"] for line in lines):
        own = [line for line in lines if line["device"] == name]
        device_hours = sum(line["seconds"] * line["devices"] for line in own) / 3600
        booked = {line["usd_rate"] for line in own}
        for price in hardware.named(name).prices:
            if price.usd not in booked:
                usd, seconds = device_hours * price.usd, sum(line["seconds"] for line in own)
                offers.append(Offer(name, seconds, usd, usd, usd, _said(price), ""))
    return offers


def other_hardware(lines: Sequence[Line]) -> list[Offer]:
    """The whole ledger on each other device of the catalogue that somebody rents out, cheapest first.

    Device for device: a run on 8 is put on 8. Empty for a ledger that did no work that was counted.
    """
    if not any(line["flops"] for line in lines):
        return []
    ran_on = {line["device"] for line in lines}
    own = {name: peak(hardware.named(name)) for name in ran_on}
    known = all(own.values())
    offers = []
    for device in hardware.catalogue():
        prices = [price for price in device.prices if "assum" not in price.kind]
        if device.kind != "gpu" or not prices or device.name in ran_on or not _speed(device):
            continue
        seconds, device_hours = 0.0, 0.0
        for line in lines:
            took = line["seconds"]
            if line["flops"] and known:
                took *= own[line["device"]] / peak(device)
            elif line["flops"]:
                took = line["flops"] / line["devices"] / _speed(device)
            seconds += took
            device_hours += took * line["devices"] / 3600
        usd = [device_hours * price.usd for price in prices]
        assumption = SAME_SHARE if known else AT_LEAST
        offers.append(Offer(device.name, seconds, min(usd), usd[0], max(usd), _said(prices[0]), assumption))
    return sorted(offers, key=lambda offer: offer.usual)


def _speed(device: Device) -> float:
    """FLOP/s of the best 16-bit product that was measured on it, else its peak."""
    return device.measured_flops.get("bfloat16") or peak(device)


def _said(price: Price) -> str:
    return f"${price.usd:g}/h, {price}"
