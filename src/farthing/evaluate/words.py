"""Evaluations in words, a line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farthing.base.figures import interval, percent, points
from farthing.evaluate.intervals import finding


def score_line(evaluation: Mapping[str, Any]) -> str:
    """The name of an evaluation, the share that is right, and how the answers ended."""
    several = f" x {evaluation['samples']} answers" if "samples" in evaluation else ""
    right = f"{percent(evaluation['accuracy'])} right (95% interval {interval(evaluation['ci95'])})"
    return (
        f"{evaluation['name']:>6}: {right}, "
        f"{evaluation['right']} right, {evaluation['wrong']} wrong, {evaluation['unparsed']} no answer found, "
        f"{evaluation['cut_off']} cut off, of {evaluation['n']}{several}"
    )


def gain_line(gain: Mapping[str, Any]) -> str:
    """The gain with its interval, and what of it may be format alone."""

    def change(part: Mapping[str, Any]) -> str:
        low, high = part["ci95"]
        told = finding(low, high)
        unclear = f", {told}" if told in ("no clear change", "too few to tell") else ""
        return f"{points(part['difference'])} points (95% interval {points(low)} to {points(high)}{unclear})"

    line = f"  gain: {change(gain)}, paired"
    readable = gain["on_parseable"]
    if readable["n"]:
        line += f"; {change(readable)} on the {readable['n']} questions answered readably before"
    return f"{line}; format alone {points(gain['format']['share_of_all'])}"
