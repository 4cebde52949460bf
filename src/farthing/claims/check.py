"""Check whether a claim can be true: its arithmetic, the speed it requires, and what it leaves out.

Three questions, each answered with a verdict and its arithmetic:

    arithmetic  do the reported figures agree with each other (hours x price = dollars, ...)?
    compute     could that hardware do that work in those hours? The MFU it needs is at most 100% by physics,
                at most what a large matrix product reaches in practice, and it should not be far from what
                others measured on hardware of that peak.
    whole cost  does the price cover making the model, or only its last run?
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from farthing.base.figures import exact, hourly, money, percent
from farthing.claims.agree import (
    AGREE,
    Check,
    Compute,
    Verdict,
    computes,
    consistency,
    device_hours,
    flops_of_token,
)
from farthing.claims.claim import Claim, Excluded
from farthing.cost import devices
from farthing.cost.devices import Device, peak
from farthing.plans.published import PublishedRun, published_runs


@dataclass(frozen=True)
class Gap:
    """Something left out; dollars low to high where a source gives a range."""

    what: str
    dollars: tuple[float, float] | None
    how: str
    source: str | None


@dataclass(frozen=True)
class Price:
    """The run's work on another device of the catalogue."""

    device: str
    device_hours: float
    low: float
    usual: float
    high: float
    source: str


@dataclass(frozen=True)
class Finding:
    """All findings on a claim."""

    claim: Claim
    device_hours: float | None
    dollars: float | None
    dollars_are: str
    price_per_device_hour: float | None
    checks: list[Check]
    compute: list[Compute]
    peers: list[PublishedRun]
    gaps: list[Gap]
    whole_cost: tuple[float, float] | None
    """Dollars: the claimed ones plus those that sources give a range for."""
    today: list[Price]
    lines: list[Check]
    """arithmetic, compute, whole cost."""

    @property
    def price_is_ours(self) -> bool:
        """Whether dollars, or hours made of dollars, rest on a rent that the claim does not name."""
        own = self.claim.reported
        return bool(own.our_price_per_device_hour) or (
            self.dollars is not None and not own.dollars and not own.price_per_device_hour
        )

    @property
    def verdict(self) -> Verdict:
        """Verdict on the run as claimed: implausible as soon as one of the first two lines is."""
        arithmetic, compute, _ = (line.verdict for line in self.lines)
        if "implausible" in (arithmetic, compute):
            return "implausible"
        return compute if arithmetic == "plausible" else "cannot be checked"


def check(claim: Claim) -> Finding:
    """Judge a claim. Raises UserError for an architecture that cannot be counted."""
    hours = device_hours(claim)
    dollars, dollars_are = _dollars(claim, hours)
    counted = list(computes(claim))
    peers = _peers(claim, counted[0].device) if counted else []
    checks = consistency(claim, counted)
    gaps = [_gap(excluded, dollars) for excluded in claim.excluded]
    ranges = [gap.dollars for gap in gaps if gap.dollars]
    whole = (
        (dollars + sum(low for low, _ in ranges), dollars + sum(high for _, high in ranges))
        if dollars and ranges
        else None
    )
    return Finding(
        claim=claim,
        device_hours=hours,
        dollars=dollars,
        dollars_are=dollars_are,
        price_per_device_hour=claim.reported.price_per_device_hour
        or (dollars / hours if dollars and hours else None),
        checks=checks,
        compute=counted,
        peers=peers,
        gaps=gaps,
        whole_cost=whole,
        today=_today(claim, hours),
        lines=[
            _arithmetic_line(checks),
            _compute_line(claim, counted, peers),
            _whole_line(
                gaps,
                dollars if claim.reported.dollars or claim.reported.price_per_device_hour else None,
                whole,
            ),
        ],
    )


def _dollars(claim: Claim, hours: float | None) -> tuple[float | None, str]:
    reported = claim.reported
    if reported.dollars:
        return reported.dollars, "claimed"
    if hours and reported.device:
        device = devices.find(reported.device)
        price = reported.price_per_device_hour or (device.prices[0].usd if device.prices else None)
        if price:
            said = "the claim's price" if reported.price_per_device_hour else str(device.prices[0])
            return hours * price, f"not claimed; {exact(hours)} h at {hourly(price)} ({said})"
    return None, "not claimed"


def _peers(claim: Claim, device: Device) -> list[PublishedRun]:
    """Complete single runs by others on hardware with the same peak."""
    return sorted(
        (
            run for run in published_runs()
            if run.scope == "run" and run.use in ("test", "approximate")
            and peak(run.device) == peak(device) and run.name not in claim.same_runs
        ),
        key=lambda run: run.mfu,
    )  # fmt: skip


def _today(claim: Claim, hours: float | None) -> list[Price]:
    """The claim's hours on other devices at the same share of their 16-bit peak, at the catalogue's prices.

    Only devices with as much memory, which the run's layout may need, and a price.
    """
    if not hours or not claim.reported.device:
        return []
    own = devices.find(claim.reported.device)
    prices = []
    for device in devices.catalogue():
        quoted = [price for price in device.prices if "assum" not in price.kind]
        if (
            not quoted
            or not peak(device)
            or device.kind != own.kind
            or device.memory_bytes < own.memory_bytes
        ):
            continue
        needed = hours * peak(own) / peak(device)
        dollars = [needed * price.usd for price in quoted]
        source = f"${quoted[0].usd:g}/h: {quoted[0]}"
        prices.append(Price(device.name, needed, min(dollars), dollars[0], max(dollars), source))
    return sorted(prices, key=lambda price: price.usual)


def _gap(excluded: Excluded, dollars: float | None) -> Gap:
    source = f"{excluded.source} ({excluded.date}, {excluded.evidence})" if excluded.source else None
    if excluded.amount:
        return Gap(excluded.what, (excluded.amount[0], excluded.amount[1]), "", source)
    if excluded.multiple and dollars:
        low, high = excluded.multiple
        return Gap(
            excluded.what,
            (low * dollars, high * dollars),
            f"{low:g} to {high:g} times {money(dollars)}",
            source,
        )
    return Gap(excluded.what, None, "", source)


def _arithmetic_line(checks: list[Check]) -> Check:
    if not checks:
        return Check(
            "arithmetic", "cannot be checked", "the figures reported cannot be compared with each other"
        )
    for verdict in ("implausible", "cannot be checked"):
        if wrong := [each.text for each in checks if each.verdict == verdict]:
            return Check("arithmetic", verdict, "; ".join(wrong))
    first = [each.text for each in checks if each.about in ("price", "hours", "rent")] or [checks[0].text]
    return Check("arithmetic", "plausible", "; ".join(first[:2]))


def _compute_line(claim: Claim, counted: list[Compute], peers: list[PublishedRun]) -> Check:
    if not counted:
        text = "tokens, architecture, hardware or hours are not published, so the work cannot be counted"
        if bound := _most_tokens(claim):
            text = f"the tokens are not published; {bound}"
        return Check("compute", "cannot be checked", text)
    lines = [_judge(compute, peers) for compute in counted]
    own = claim.reported
    if own.our_price_per_device_hour and not own.device_hours:
        said = f"at {hourly(own.our_price_per_device_hour)}, which is our assumption: {lines[0].text}"
        return Check("compute", "cannot be checked", said)
    for verdict in ("implausible", "cannot be checked"):
        for line in lines:
            if line.verdict == verdict:
                return line
    return lines[0]


def _most_tokens(claim: Claim) -> str:
    """What hours and a model allow at most, "" where either is unknown."""
    hours, own = device_hours(claim), claim.reported
    per_token = flops_of_token(claim, own)
    if not hours or not own.device or per_token is None:
        return ""
    most = hours * 3600 * peak(devices.find(own.device)) / per_token
    return (
        f"{exact(hours)} h of this hardware are enough for {most / 1e12:,.3g}T at most, at 100% of its peak"
    )


def _judge(compute: Compute, peers: list[PublishedRun]) -> Check:
    causal, full = compute.mfu
    at_most = "at most " if compute.at_most else ""
    top = peak(compute.device)
    work = f"{compute.flops[0]:.3g} FLOP ({compute.basis})"
    if compute.tokens and compute.per_token:
        work = (
            f"{at_most}{exact(compute.tokens)} tokens x {compute.per_token[0] / 1e9:,.4g} GFLOP "
            f"= {compute.flops[0]:.3g} FLOP"
        )
    text = (
        f"{work} in {exact(compute.device_hours)} h x 3600 s x {top / 1e12:,.0f} TFLOP/s: "
        f"MFU {at_most}{percent(causal)} causal, {percent(full)} full"
    )
    if causal > 1 and not compute.at_most:
        return Check("compute", "implausible", f"{text}; no device does more than 100% of its peak")
    product = max(compute.device.measured_flops.values(), default=0.0) / top if not compute.fp8 else 1.0
    if product and causal > product and not compute.at_most:
        return Check(
            "compute", "implausible", f"{text}; the best measured product reaches {percent(product, 0)}"
        )
    if not peers:
        return Check("compute", "cannot be checked", f"{text}; no published run on hardware of this peak")
    lowest, highest = peers[0].mfu, peers[-1].mfu
    median = statistics.median(run.mfu for run in peers)
    measured = (
        f"{len(peers)} runs by others on this peak: {percent(lowest)} to {percent(highest)} causal, "
        f"median {percent(median)}"
    )
    if causal > highest * (1 + AGREE):
        verdict: Verdict = "cannot be checked"
        return Check("compute", verdict, f"{text}; above all {measured}")
    if causal < lowest and not compute.at_most:
        text += "; slower than all others, so the hours may cover more than one clean run"
    return Check("compute", "plausible", f"{text}; {measured}")


def _whole_line(gaps: list[Gap], dollars: float | None, whole: tuple[float, float] | None) -> Check:
    """Judge whether the price covers the whole undertaking."""
    unknown = sum(gap.dollars is None for gap in gaps)
    rest = f"; {unknown} more without a published figure" if unknown else ""
    if whole and dollars and whole[1] > dollars:
        text = f"{money(dollars)} and what sources put a figure on is {dollar_range(whole)}{rest}"
        return Check("whole cost", "implausible", text)
    if gaps:
        text = f"{len(gaps)} items are left out, none with a published figure"
        return Check("whole cost", "cannot be checked", text)
    return Check("whole cost", "cannot be checked", "what the price leaves out is not known")


def dollar_range(amounts: tuple[float, float]) -> str:
    """$8,400,000 to $31,000,000, or one figure where the two are the same."""
    low, high = (f"{money(amount)}" for amount in amounts)
    return low if low == high else f"{low} to {high}"
