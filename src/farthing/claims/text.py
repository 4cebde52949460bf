"""The findings on a claim: the short answer, all of them, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from farthing.base.figures import exact, hourly, money, percent
from farthing.claims.answer import answer
from farthing.claims.check import Finding, dollar_range
from farthing.cost.devices import peak
from farthing.cost.flops import CONVENTION

WIDTH = 100  # at most; the terminal's where that is narrower
_QUESTIONS = {
    "arithmetic": "do the figures agree?",
    "compute": "can the hardware do it?",
    "whole cost": "is it the whole cost?",
}


def short(finding: Finding, width: int = WIDTH) -> str:
    """The answer that a newspaper could print, in at most 12 lines of 80 characters."""
    found = answer(finding)
    lines = [found.title]
    for question, said in found.lines:
        lines += _wrapped(f"{question} {said}", "  ", width)
    return "\n".join([*lines, *_wrapped(found.judgement, "", width)])


def text(finding: Finding, width: int = WIDTH) -> str:
    """The short answer, the three questions with their arithmetic, and the evidence."""
    lines = [short(finding, width), "", *_wrapped(finding.claim.about, "", width), ""]
    for line in questions(finding):
        lines += _wrapped(line, "  ", width)
    lines += ["", f"verdict on the run as claimed: {finding.verdict}"]
    for title, items in sections(finding):
        lines += ["", title, *(line for item in items for line in _wrapped(item, "- ", width))]
    return "\n".join([*lines, "", *_wrapped(COUNTED, "", width)])


def questions(finding: Finding) -> Iterator[str]:
    """The three questions with verdict and arithmetic. That a price leaves things out makes no run implausible."""
    for line in finding.lines:
        no = line.about == "whole cost" and line.verdict == "implausible"
        yield f"{_QUESTIONS[line.about]} {'no' if no else line.verdict}: {line.text}"


COUNTED = f"Counted as {CONVENTION}; full counts masked attention too; MFU is of the dense 16-bit peak."


def sections(finding: Finding) -> Iterator[tuple[str, list[str]]]:
    """The evidence, by titles; those without any are left out."""
    claim = finding.claim
    for title, section in (
        ("the work", _work(finding)),
        ("measured by others on this hardware's peak", _peers(finding)),
        ("checks", (f"{check.about}: {check.verdict}. {check.text}" for check in finding.checks)),
        ("left out", _gaps(finding)),
        ("the same work today, if another device reaches the same share of its peak", _today(finding)),
        ("to know", (f"{note.text} ({note.source}, {note.date})" for note in claim.notes)),
        ("sources", _sources(finding)),
    ):
        if items := list(section):
            yield title, items


def _work(finding: Finding) -> Iterator[str]:
    for compute in finding.compute:
        at_most = "at most " if compute.at_most else ""
        if compute.per_token:
            causal, full = (f"{flops / 1e9:,.4g}" for flops in compute.per_token)
            yield (
                f"{compute.name}: {causal} GFLOP a token causal, {full} full ({compute.basis}), "
                f"x {at_most}{exact(compute.tokens or 0)} tokens"
            )
        else:
            yield f"{compute.name}: FLOPs {compute.basis}"
        yield f"{at_most}{compute.flops[0]:.3g} FLOP causal, {compute.flops[1]:.3g} full"
        mfu = f"{percent(compute.mfu[0])} causal, {percent(compute.mfu[1])} full"
        share = f"; {percent(compute.fp8_share)} of its FP8 peak, causal" if compute.fp8_share else ""
        yield (
            f"in {exact(compute.device_hours)} hours of {compute.device.name} "
            f"({peak(compute.device) / 1e12:,.0f} TFLOP/s): MFU {at_most}{mfu}{share}"
        )
        if compute.tokens_per_second:
            yield f"{at_most}{compute.tokens_per_second:,.0f} tokens a second on each device"
    if finding.device_hours and finding.price_per_device_hour:
        ours = ", a price of ours" if finding.price_is_ours else ""
        yield f"{exact(finding.device_hours)} device-hours in all, {hourly(finding.price_per_device_hour)} each{ours}"


def _peers(finding: Finding) -> Iterator[str]:
    for run in finding.peers if finding.compute else []:
        yield f"{percent(run.mfu)} causal: {run.model} on {run.device.name} ({run.source})"


def _gaps(finding: Finding) -> Iterator[str]:
    for gap in finding.gaps:
        if gap.dollars:
            how = f", {gap.how}" if gap.how else ""
            yield f"{gap.what}: {dollar_range(gap.dollars)}{how}. Source: {gap.source}"
        else:
            yield f"{gap.what}: no published figure"


def _today(finding: Finding) -> Iterator[str]:
    for price in finding.today:
        span = "" if price.low == price.high else f" ({dollar_range((price.low, price.high))})"
        yield f"{price.device}: {money(price.usual)}{span}, {exact(round(price.device_hours))} h at {price.source}"


def _sources(finding: Finding) -> Iterator[str]:
    for source in finding.claim.sources:
        yield f"{', '.join(source.of)}: {source.text} ({source.date}, {source.evidence})"
    for other in finding.claim.elsewhere:
        yield f"{other.figure} elsewhere: {other.source} ({other.date}, {other.evidence})"


def _wrapped(item: str, mark: str, width: int) -> list[str]:
    return textwrap.wrap(
        " ".join(item.split()), width, initial_indent=mark, subsequent_indent=" " * len(mark)
    )


def data(finding: Finding) -> dict[str, Any]:
    """The findings as plain data; dollars, hours, FLOPs, shares of 1."""
    claim = finding.claim
    return {
        "name": claim.name,
        "title": claim.title,
        "about": claim.about,
        "verdict": finding.verdict,
        "answer": asdict(answer(finding)),
        "lines": [asdict(line) for line in finding.lines],
        "device_hours": finding.device_hours,
        "usd": finding.dollars,
        "usd_are": finding.dollars_are,
        "usd_per_device_hour": finding.price_per_device_hour,
        "price_is_ours": finding.price_is_ours,
        "parts": [
            {
                "name": compute.name,
                "device": compute.device.name,
                "device_hours": compute.device_hours,
                "tokens": compute.tokens,
                "at_most": compute.at_most,
                "flops": {"causal": compute.flops[0], "full": compute.flops[1], "from": compute.basis},
                "flops_per_token": compute.per_token
                and {"causal": compute.per_token[0], "full": compute.per_token[1]},
                "mfu": {"causal": compute.mfu[0], "full": compute.mfu[1], "peak_flops": peak(compute.device)},
                "share_of_fp8_peak": compute.fp8_share,
                "tokens_per_second_per_device": compute.tokens_per_second,
            }
            for compute in finding.compute
        ],
        "measured_by_others": [
            {"run": run.name, "device": run.device.name, "mfu_causal": run.mfu, "source": run.source}
            for run in finding.peers
        ],
        "checks": [asdict(check) for check in finding.checks],
        "left_out": [asdict(gap) for gap in finding.gaps],
        "whole_cost_usd": finding.whole_cost,
        "today": [asdict(price) for price in finding.today],
        "notes": [note.model_dump() for note in claim.notes],
        "sources": [source.model_dump() for source in claim.sources],
        "convention": CONVENTION,
    }
