"""Memory that runs out in the middle of a run, and the `memory_gb` that would fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from farthing.base.device import Place
from farthing.base.errors import UserError
from farthing.base.figures import bytes_
from farthing.base.limits import is_out_of_memory
from farthing.cost.room import could_be_had
from farthing.plans.sampling import MEASURED, fitting_gb
from farthing.recipe import StageSpec

_SHARE = 0.9  # of the room that the formula finds: allocators lose some


@contextmanager
def within_memory(
    place: Place,
    number: int = 0,
    stage: StageSpec | None = None,
    config: Mapping[str, Any] | None = None,
    judges: Sequence[Mapping[str, Any]] = (),
) -> Iterator[None]:
    """Turn memory that runs out into a UserError.

    Args:
        number: of the stage in the recipe, from 1.
        stage: what is done inside; None for an evaluation.
        config: config.json of the model that it starts from, if it starts from one.
        judges: those of the models that judge answers.
    """
    room = could_be_had(place.device)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if stage is None:
            remedy = "close other programs, and run the same command again"
        else:
            remedy = _remedy(place, number, stage, config, judges, room)
        what = f"stage {number} ({stage.kind})" if stage else "the evaluation"
        said = f"{what} ran out of memory on {place.device}, where {bytes_(room)} could be had"
        raise UserError(f"{said}; {remedy}") from None


def _remedy(
    place: Place,
    number: int,
    stage: StageSpec,
    config: Mapping[str, Any] | None,
    judges: Sequence[Mapping[str, Any]],
    room: float,
) -> str:
    """What to change about a stage so that it fits in so many bytes."""
    asked: float = getattr(stage, "memory_gb", 0.0)
    try:
        work = replace(stage.work(config, MEASURED), beside=tuple(judges) if stage.asks else ())
        fits = _SHARE * fitting_gb(work, "cpu" if place.device == "cpu" else "gpu", place.dtype, room)
    except UserError:  # the stage's work cannot be known here
        fits = asked / 2
    if not asked or fits <= 0:
        lighter = "" if stage.with_lora(16) is None else "set lora: 16, "
        return f"no memory_gb would fit; {lighter}take a smaller model, or close other programs"
    gb = _rounded_down(min(fits, asked / 2 if fits >= asked else fits))
    return (
        f"memory_gb is {asked:g}, {gb:g} would fit: run the same command again with "
        f"--set stages.{number}.memory_gb={gb:g}"
    )


def _rounded_down(gb: float) -> float:
    """Two significant digits, never more than given."""
    step = 10.0 ** (math.floor(math.log10(gb)) - 1)
    return round(math.floor(gb / step + 1e-9) * step, 12)
