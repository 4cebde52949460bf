"""Consistency of a claim's figures: hours, dollars, parts, energy, carbon, speeds, other sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from farthing.base.errors import UserError
from farthing.base.figures import exact, hourly, money, percent
from farthing.claims.claim import Claim, Figures
from farthing.cost import devices
from farthing.cost.devices import Device, peak
from farthing.cost.flops import flops_per_token

AGREE = 0.05  # reported figures are rounded; two that differ by less agree
APART = 1.5  # sources that differ by more are not about the same thing
RENT = 3.0  # times the catalogue's range: rents have changed by as much since some claims
# Watts a device over its board's limit. OLMo's boards swing between 15% and 85% of it (arXiv:2503.05804, 2025-03);
# Olmo 3's data centre took 1.74 times what its GPUs did (arXiv:2605.01158, 2026-05).
WATTS = (0.15, 1.74)
# Grams of CO2e a kWh: lifecycle medians of onshore wind and of coal, the least and the most of the sources of
# electricity in table A.III.2 of IPCC AR5 WG3 annex III (2014).
GRAMS = (11.0, 820.0)


def consistency(claim: Claim, computes: list[Compute]) -> list[Check]:
    """Make every comparison that the reported figures allow."""
    hours = device_hours(claim)
    return [
        *_sums(claim, hours),
        *_rent(claim, hours),
        *_rates(claim, computes),
        *_other_sources(claim, computes),
    ]


def _agree(about: str, left: str, computed: float, right: str, reported: float) -> Check:
    """Whether a sum and a reported figure agree within `AGREE`."""
    off = computed / reported - 1
    verdict: Verdict = "plausible" if abs(off) <= AGREE else "implausible"
    said = "agrees with" if verdict == "plausible" else f"is {computed / reported:.2f} times"
    return Check(about, verdict, f"{left}, which {said} the {right} reported")


def _sums(claim: Claim, hours: float | None) -> Iterator[Check]:
    """Compare the reported figures with each other."""
    own = claim.reported
    for name, figures in [("", own), *((f"{name}: ", part) for name, part in claim.runs() if claim.parts)]:
        counted = from_devices(figures)
        if counted and figures.device_hours:
            time = f"{figures.hours:g} h" if figures.hours else f"{figures.days:g} days x 24 h"
            left = f"{name}{figures.devices:,.0f} devices x {time} = {exact(counted)} device-hours"
            right = f"{exact(figures.device_hours)} device-hours"
            yield _agree("hours", left, counted, right, figures.device_hours)
        part_hours = device_hours(figures) if figures is not own else hours
        rests_on_rent = (
            figures.dollars and stated_hours(figures) is None and not (figures is own and claim.parts)
        )
        if part_hours and figures.price_per_device_hour and figures.dollars and not rests_on_rent:
            price = figures.price_per_device_hour
            computed = part_hours * price
            left = f"{name}{exact(part_hours)} device-hours x {hourly(price)} = {money(computed)}"
            yield _agree("price", left, computed, f"{money(figures.dollars)}", figures.dollars)
        yield from _energy(name, figures, part_hours)
    for key, unit in (("device_hours", "device-hours"), ("dollars", "dollars")):
        total = getattr(own, key)
        parts = [device_hours(part) if key == "device_hours" else part.dollars for part in claim.parts]
        if total and parts and None not in parts:
            amounts = [amount for amount in parts if amount is not None]
            left = f"parts: {' + '.join(map(exact, amounts))} = {exact(sum(amounts))} {unit}"
            yield _agree("parts", left, sum(amounts), f"{exact(total)} {unit}", total)


def _rent(claim: Claim, hours: float | None) -> Iterator[Check]:
    """Compare dollars an hour with the rents of devices of the same peak."""
    own = claim.reported
    if own.our_price_per_device_hour:
        return
    price = own.price_per_device_hour or (own.dollars / hours if own.dollars and hours else None)
    if price is None or own.device is None:
        return
    top = peak(devices.find(own.device))
    alike = [device for device in devices.catalogue() if device.kind == "gpu" and peak(device) == top]
    # An assumed price, perhaps this claim's own, is not a market price.
    quoted = [quote for device in alike for quote in device.prices if "assum" not in quote.kind]
    if not quoted:
        return
    low, high = min(quote.usd for quote in quoted), max(quote.usd for quote in quoted)
    dates = sorted({quote.date for quote in quoted})
    sums = (
        ""
        if own.price_per_device_hour
        else f"{money(own.dollars or 0)} / {exact(hours or 0)} device-hours = "
    )
    market = f"devices of this peak rent for {hourly(low)} to {hourly(high)} ({dates[0]} to {dates[-1]})"
    text = f"{sums}{hourly(price)}; {market}"
    inside = low / RENT <= price <= high * RENT
    yield Check("rent", "plausible" if inside else "implausible", text)


def _energy(name: str, figures: Figures, hours: float | None) -> Iterator[Check]:
    """Check watts per device, and grams of CO2 per kWh."""
    if not hours or not figures.device:
        return
    limit = devices.find(figures.device).watts
    mwh = figures.energy_mwh
    if mwh and limit:
        watts = mwh * 1e6 / hours
        share = watts / limit
        inside = WATTS[0] <= share <= WATTS[1]
        left = f"{name}{mwh:,.6g} MWh / {exact(hours)} device-hours"
        text = f"{left} = {watts:,.0f} W a device, {percent(share, 0)} of its limit"
        if abs(share - 1) < 0.01:
            text += ": the limit times the hours, so an estimate, not a measurement"
        if not inside:
            text += f"; measured runs lie between {percent(WATTS[0], 0)} and {percent(WATTS[1], 0)}"
        yield Check("energy", "plausible" if inside else "implausible", text)
    if figures.tonnes_co2e and (mwh or limit):
        used = mwh or hours * limit / 1e6
        grams = figures.tonnes_co2e * 1e6 / (used * 1e3)
        basis = f"{mwh:,.6g} MWh" if mwh else f"{exact(hours)} h x {limit:g} W = {exact(used)} MWh"
        inside = GRAMS[0] <= grams <= GRAMS[1]
        text = f"{name}{figures.tonnes_co2e:,.6g} t CO2e / {basis} = {grams:,.3g} g a kWh"
        text += "" if inside else f"; electricity is between {GRAMS[0]:g} (wind) and {GRAMS[1]:g} (coal)"
        yield Check("carbon", "plausible" if inside else "implausible", text)


def _rates(claim: Claim, computes: list[Compute]) -> Iterator[Check]:
    """Check reported speeds: a run's average cannot be faster than its steady state."""
    parts = dict(claim.runs())
    for compute in computes:
        figures = parts[compute.name]
        top = peak(compute.device)
        mean = compute.mfu[0] * top
        stated = figures.tflops_per_device or (figures.mfu_percent or 0) / 100 * top / 1e12
        if stated:
            ratio = stated * 1e12 / mean
            needed = f"the hours need {mean / 1e12:,.0f} on average ({ratio:.2f})"
            text = f"{stated:,.0f} TFLOP/s a device reported; {needed}"
            if abs(ratio - 4 / 3) < 0.06:
                text += ": about 4/3, as when recomputed activations are counted as work"
            fast = ratio < 1 - 2 * AGREE
            yield Check("speed", "implausible" if fast else "plausible", text)
        if figures.tokens_per_second_per_device and compute.tokens_per_second:
            ratio = figures.tokens_per_second_per_device / compute.tokens_per_second
            text = (
                f"{figures.tokens_per_second_per_device:,.0f} tokens/s a device reported; the hours need "
                f"{compute.tokens_per_second:,.0f} on average: {percent(1 / ratio, 0)} of the time was useful"
            )
            yield Check("speed", "implausible" if ratio < 1 - AGREE else "plausible", text)
        if figures.flops and compute.per_token:
            counted = f"{compute.flops[0]:.3g} causal and {compute.flops[1]:.3g} full counted"
            text = f"{figures.flops:.3g} FLOP reported, {counted}"
            near = min(abs(figures.flops / own - 1) for own in compute.flops) <= 3 * AGREE
            yield Check("flops", "plausible" if near else "implausible", text)


def _other_sources(claim: Claim, computes: list[Compute]) -> Iterator[Check]:
    """Compare the claim's figures with those of other sources."""
    for other in claim.elsewhere:
        own = device_hours(claim) if other.figure == "device_hours" else getattr(claim.reported, other.figure)
        if own is None:
            continue
        ratio = max(own, other.value) / min(own, other.value)
        values = f"{exact(own)} here, {exact(other.value)} in {other.source} ({other.date})"
        text = f"{other.figure}: {values}, {ratio:.1f} times"
        if other.figure == "device_hours" and computes:
            causal, full = computes[0].mfu
            scale = own / other.value
            text += f"; MFU {percent(causal)} causal, {percent(full)} full, "
            text += f"or {percent(causal * scale)} and {percent(full * scale)}"
        yield Check("sources", "plausible" if ratio <= APART else "cannot be checked", text)


Verdict = Literal["plausible", "implausible", "cannot be checked"]


@dataclass(frozen=True)
class Check:
    """One comparison: its subject, its verdict and its arithmetic."""

    about: str
    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Compute:
    """The work of a part, and the speed that its hours require."""

    name: str
    device: Device
    device_hours: float
    tokens: float | None
    at_most: bool
    """The tokens are an upper bound, and with them the FLOPs and the MFU."""
    per_token: tuple[float, float] | None
    """Training FLOPs a token, causal attention once and full; None where only their sum was reported."""
    flops: tuple[float, float]
    """Causal, full."""
    basis: str
    """Basis of the FLOP count."""
    fp8: bool

    @property
    def mfu(self) -> tuple[float, float]:
        """(causal, full), of the dense 16-bit peak."""
        capacity = self.device_hours * 3600 * peak(self.device)
        return self.flops[0] / capacity, self.flops[1] / capacity

    @property
    def fp8_share(self) -> float | None:
        """Of the dense FP8 peak, causal; None for a run in 16 bits."""
        top = self.device.peak_flops.get("float8")
        return self.mfu[0] * peak(self.device) / top if self.fp8 and top else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of one device."""
        return None if self.tokens is None else self.tokens / self.device_hours / 3600


def device_hours(figures: Claim | Figures) -> float | None:
    """As reported, else devices times their hours or days, else the sum of the parts, else dollars over the rent."""
    if isinstance(figures, Claim):
        own = stated_hours(figures.reported)
        parts = [device_hours(part) for part in figures.parts]
        if own is None and parts and None not in parts:
            return sum(hours for hours in parts if hours is not None)
        return own or from_rent(figures.reported)
    return stated_hours(figures) or from_rent(figures)


def stated_hours(figures: Figures) -> float | None:
    """Device-hours that do not rest on a price."""
    return figures.device_hours or from_devices(figures)


def from_rent(figures: Figures) -> float | None:
    """Dollars over dollars an hour: the claim's own rent, else ours."""
    price = figures.price_per_device_hour or figures.our_price_per_device_hour
    return figures.dollars / price if figures.dollars and price else None


def from_devices(figures: Figures) -> float | None:
    hours = figures.hours or (figures.days * 24 if figures.days else None)
    return figures.devices * hours if figures.devices and hours else None


def computes(claim: Claim) -> Iterator[Compute]:
    """The parts whose work can be counted. Raises UserError for an architecture that cannot be counted."""
    for name, figures in claim.runs():
        hours = device_hours(figures)
        if not (hours and figures.device and (figures.tokens or figures.flops)):
            continue
        per_token, basis = _per_token(claim, figures)
        if figures.tokens and per_token:
            flops = (figures.tokens * per_token[0], figures.tokens * per_token[1])
        elif figures.flops:
            per_token, basis = None, "as reported, its convention for attention unknown"
            flops = (figures.flops, figures.flops)
        else:
            continue
        yield Compute(
            name=name,
            device=devices.find(figures.device),
            device_hours=hours,
            tokens=figures.tokens,
            at_most=figures.tokens_are == "at most",
            per_token=per_token,
            flops=flops,
            basis=basis,
            fp8=figures.precision == "fp8" or claim.reported.precision == "fp8",
        )


def flops_of_token(claim: Claim, figures: Figures) -> float | None:
    """Training FLOPs a token, causal; None for an unknown model or sequence length."""
    if claim.architecture is not None and figures.seq_len is not None:
        return flops_per_token(claim.architecture, figures.seq_len, mtp=False).model
    return 6 * claim.params if claim.params is not None else None


def _per_token(claim: Claim, figures: Figures) -> tuple[tuple[float, float] | None, str]:
    if claim.architecture is not None and figures.tokens:
        if figures.seq_len is None:
            raise UserError(f"{claim.name}: tokens are given without seq_len, which attention's FLOPs need")
        try:
            counted = flops_per_token(claim.architecture, figures.seq_len, mtp=False)
        except OverflowError:
            raise UserError(f"{claim.name}: the architecture's sizes are implausible; correct them") from None
        return (counted.model, counted.model_full), f"the architecture at {figures.seq_len:,} tokens"
    if claim.params is not None:
        return (
            6 * claim.params,
            6 * claim.params,
        ), f"6 x {exact(claim.params)} parameters, attention not counted"
    return None, ""
