"""The parts that this process finds, beside the verifier processes: those for which a model is asked.

What models take is booked apart, as `judge`: tokens, seconds, and the dollars that a server's judge costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from farthing.cost.meter import Meter, Span
from farthing.recipe.rewards import ASKED
from farthing.tasks.item import Item, Verdict
from farthing.tasks.rewards import reward_model
from farthing.tasks.rewards.judge import Judges
from farthing.tasks.rewards.models import Models
from farthing.tasks.rewards.part import Part
from farthing.tasks.rewards.total import added, named, settings


class Beside:
    """Asks models about answers.

    Args:
        models: those of this process; without it only servers can be asked.
        meter: what books the asking; without it nothing is booked.
    """

    def __init__(self, models: Models | None = None, meter: Meter | None = None) -> None:
        self._models, self._meter = models, meter
        self.judges = Judges(models)

    def completed(self, pairs: Sequence[tuple[Item, str]], verdicts: list[Verdict]) -> list[Verdict]:
        """The verdicts with the parts that models find. Raises UserError when a judge's budget is spent."""
        waiting: dict[tuple[str, str], list[int]] = {}  # by a part's name and settings
        for place, ((item, _), verdict) in enumerate(zip(pairs, verdicts, strict=True)):
            if verdict.outcome in ("error", "bad_gold", "timeout"):
                continue
            for name, part in named(item.metadata.get("rewards", ())).items():
                if part["use"] in ASKED:
                    waiting.setdefault((name, repr(part)), []).append(place)
        for (name, _), places in waiting.items():
            part = named(pairs[places[0]][0].metadata["rewards"])[name]
            with self._booked() as span:
                found = self._parts(part["use"], settings(part), [pairs[place] for place in places], span)
            for place, one in zip(places, found, strict=True):
                verdicts[place] = added(pairs[place][0], verdicts[place], {name: one})
        return verdicts

    def _parts(self, use: str, chosen: Any, pairs: Sequence[tuple[Item, str]], span: Span) -> list[Part]:
        if use == "judge":
            return self.judges.parts(chosen, pairs, span)
        assert self._models is not None, "a pool that pays by models is given them"
        return reward_model.parts(chosen, pairs, self._models, span)

    def _booked(self) -> AbstractContextManager[Span]:
        return self._meter.span("judge") if self._meter else nullcontext(Span("", "judge", None, 0.0))
