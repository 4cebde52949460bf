"""The held-out subset by which a stage is measured while it trains.

Its questions are neither trained on nor asked before and after: a stage may leave the weights that answer most of them,
and what is chosen by them cannot also be judged by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from farthing.cost.meter import Meter, book_sampling
from farthing.engine import Model
from farthing.evaluate.ask import evaluate
from farthing.evaluate.score import summarise
from farthing.recipe import Asks
from farthing.tasks import Item
from farthing.tasks.pool import VerifierPool

RIGHT = "subset_right"
"""In a line of metrics.jsonl: the share of right answers."""


@dataclass(frozen=True)
class Subset:
    """Questions to ask now and then, and how."""

    items: Sequence[Item]
    asks: Asks
    every: int
    """Steps between."""
    temperature: float
    samples: int
    keep_best: bool
    seed: int

    def measure(
        self, model: Model, step: int, steps: int, pool: VerifierPool, meter: Meter
    ) -> dict[str, Any]:
        """Entries of the line of a step; none where the subset is not due."""
        if step % self.every and step != steps:
            return {}
        with meter.span("evaluate", step=step - 1) as span:
            records, work = evaluate(
                model,
                self.items,
                self.asks,
                pool,
                temperature=self.temperature,
                seed=self.seed,
                samples=self.samples,
            )
            book_sampling(span, work, model.hf_config)
        found = summarise("subset", records)
        return {RIGHT: found["accuracy"], "subset_ci95": found["ci95"], "subset_n": found["n"]}
