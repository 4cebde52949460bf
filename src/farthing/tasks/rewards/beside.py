"""The part that this process finds, beside the verifier processes: `judge`."""

from __future__ import annotations

from collections.abc import Sequence

from farthing.tasks.item import Item, Verdict
from farthing.tasks.rewards.judge import Judges
from farthing.tasks.rewards.total import added, named, settings


def completed(pairs: Sequence[tuple[Item, str]], verdicts: list[Verdict], judges: Judges) -> list[Verdict]:
    """The verdicts with the parts that judges find. Raises UserError when a judge's budget is spent."""
    waiting: dict[tuple[str, str], list[int]] = {}  # by a part's name and settings
    for place, ((item, _), verdict) in enumerate(zip(pairs, verdicts, strict=True)):
        if verdict.outcome in ("error", "bad_gold", "timeout"):
            continue
        for name, part in named(item.metadata.get("rewards", ())).items():
            if part["use"] == "judge":
                waiting.setdefault((name, repr(part)), []).append(place)
    for (name, _), places in waiting.items():
        part = named(pairs[places[0]][0].metadata["rewards"])[name]
        found = judges.parts(settings(part), [pairs[place] for place in places])
        for place, one in zip(places, found, strict=True):
            verdicts[place] = added(pairs[place][0], verdicts[place], {name: one})
    return verdicts
