"""The answer to a claim that a newspaper could print: four lines and a sentence, taken from the findings."""

from __future__ import annotations

from dataclasses import dataclass

from farthing.base.figures import exact, hourly, percent
from farthing.claims.agree import Verdict, device_hours
from farthing.claims.check import Finding
from farthing.cost import devices

_SAID: dict[Verdict, str] = {
    "plausible": "yes",
    "implausible": "no",
    "cannot be checked": "cannot be known",
}


@dataclass(frozen=True)
class Answer:
    """`lines` are questions with their answers, which begin with yes, no or cannot be known, but for the first."""

    title: str
    lines: list[tuple[str, str]]
    judgement: str


def answer(finding: Finding) -> Answer:
    """The short answer to a claim."""
    arithmetic, compute, _ = finding.lines
    return Answer(
        finding.claim.title,
        [
            ("claimed", _claimed(finding)),
            ("do its figures agree with each other?", _agree(arithmetic.verdict, arithmetic.text)),
            ("could the hardware do it?", _hardware(finding, compute.verdict, compute.text)),
            ("is it the whole cost?", _whole(finding)),
        ],
        _judgement(finding),
    )


def millions(usd: float, digits: int = 4) -> str:
    """$5.576M, $294,000, $1.6B: so many digits of what is large."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if usd >= size:
            return f"${usd / size:.{digits}g}{unit}"
    return f"${usd:,.0f}" if usd >= 10 else f"${usd:,.2f}"


def _claimed(finding: Finding) -> str:
    own = finding.claim.reported
    said = [millions(own.dollars)] if own.dollars else []
    hours = None if own.our_price_per_device_hour else device_hours(finding.claim)
    device = devices.find(own.device).name if own.device else ""
    if hours:
        said.append(f"{exact(hours)} hours of {device}" if device else f"{exact(hours)} device-hours")
    elif device:
        said.append(f"on {device}")
    if own.tokens:
        said.append(f"{'at most ' if own.tokens_are == 'at most' else ''}{exact(own.tokens)} tokens")
    if own.price_per_device_hour:
        said.append(f"{hourly(own.price_per_device_hour)} rent")
    return ", ".join(said) or "no figure that can be counted with"


def _agree(verdict: Verdict, text: str) -> str:
    return f"{_SAID[verdict]}: {text.split('; ')[0]}"


def _hardware(finding: Finding, verdict: Verdict, text: str) -> str:
    if not finding.compute:
        return f"{_SAID[verdict]}: {text}"
    work = max(finding.compute, key=lambda one: one.mfu[0])
    ours = finding.claim.reported.our_price_per_device_hour
    rent = f"at a rent of {hourly(ours)} (our assumption) " if ours else ""
    most = "at most " if work.at_most else ""
    said = (
        f"{_SAID[verdict]}: {rent}it needs {most}{percent(work.mfu[0])} of the chips' peak "
        "(MFU: the share that the model's own arithmetic takes)"
    )
    if finding.peers:
        low, high = finding.peers[0].mfu, finding.peers[-1].mfu
        said += f"; {len(finding.peers)} runs by others took {percent(low, 0)} to {percent(high, 0)}"
    return said


def _whole(finding: Finding) -> str:
    unknown = [gap.what for gap in finding.gaps if gap.dollars is None]
    rest = f"; no figure for {len(unknown)} more" if unknown else ""
    if finding.price_is_ours and not finding.claim.reported.dollars:
        ours = (
            f"{millions(finding.dollars or 0, 3)} at {hourly(finding.price_per_device_hour)}, which is ours"
        )
        return f"cannot be known: the claim names no price; {ours}"
    if finding.whole_cost and finding.lines[2].verdict == "implausible":
        low, high = finding.whole_cost
        upper = f", at most {millions(high, 3)}" if high > low else ""
        return f"no: at least {millions(low, 3)} with what sources put a figure on{upper}{rest}"
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        return f"cannot be known: nobody has put a figure on what it leaves out ({unknown[0]}{more})"
    return "cannot be known: what it leaves out is not said"


def _judgement(finding: Finding) -> str:
    whole = finding.lines[2].verdict == "implausible"
    if finding.verdict == "implausible":
        return "As told it cannot be true: its figures contradict each other or the hardware."
    if finding.verdict == "plausible":
        said = "The run can have taken place as told"
        return f"{said}; its price is not what the model cost." if whole else f"{said}."
    said = "Too little is published to say whether the run took place as told"
    return f"{said}; its price is not what the model cost." if whole else f"{said}."
