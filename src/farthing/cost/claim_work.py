"""The work a claim implies: the FLOPs of its parts, and the share of the hardware's peak that its hours need.

FLOPs are those of `cost.flops` without multi-token prediction, causal attention once and full, or 6 x
parameters x tokens where the architecture is not published. The share is the model FLOPs utilisation (MFU)
of the dense 16-bit peak, also for FP8 training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from farthing.cost import hardware
from farthing.cost.claim import Claim, Figures
from farthing.cost.flops import flops_per_token
from farthing.cost.hardware import Device
from farthing.cost.runs_table import peak
from farthing.errors import UserError

Verdict = Literal["plausible", "implausible", "cannot be checked"]


@dataclass(frozen=True)
class Check:
    """One comparison: what it is about, how it came out, and the sum."""

    about: str
    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Compute:
    """The work of a part, and the speed at which its hours need it done."""

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
    """What the FLOPs were counted from."""
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
    """As reported, else devices times their hours or days, else the sum of the parts."""
    if isinstance(figures, Claim):
        own = device_hours(figures.reported)
        parts = [device_hours(part) for part in figures.parts]
        if own is None and parts and None not in parts:
            return sum(hours for hours in parts if hours is not None)
        return own
    return figures.device_hours or from_devices(figures)


def from_devices(figures: Figures) -> float | None:
    hours = figures.hours or (figures.days * 24 if figures.days else None)
    return figures.devices * hours if figures.devices and hours else None


def computes(claim: Claim) -> Iterator[Compute]:
    """The parts whose work can be counted. Raises UserError for an architecture that cannot be."""
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
            device=hardware.find(figures.device),
            device_hours=hours,
            tokens=figures.tokens,
            at_most=figures.tokens_are == "at most",
            per_token=per_token,
            flops=flops,
            basis=basis,
            fp8=figures.precision == "fp8" or claim.reported.precision == "fp8",
        )


def _per_token(claim: Claim, figures: Figures) -> tuple[tuple[float, float] | None, str]:
    if claim.architecture is not None and figures.tokens:
        if figures.seq_len is None:
            raise UserError(f"{claim.name}: tokens are given without seq_len, which attention's FLOPs need")
        try:
            counted = flops_per_token(claim.architecture, figures.seq_len, mtp=False)
        except OverflowError:
            raise UserError(
                f"{claim.name}: the architecture's sizes are beyond all reason; correct them"
            ) from None
        return (counted.model, counted.model_full), f"the architecture at {figures.seq_len:,} tokens"
    if claim.params is not None:
        return (
            6 * claim.params,
            6 * claim.params,
        ), f"6 x {big(claim.params)} parameters, attention not counted"
    return None, ""


def big(value: float) -> str:
    """2,788,000 or 14.8T: exact up to a hundred million, then with a letter."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= max(size, 1e8):
            return f"{value / size:,.4g}{letter}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.4g}"
