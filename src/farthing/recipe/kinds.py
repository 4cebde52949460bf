"""The kinds of stage a recipe may name.

A kind is two files and its name here: `recipe/KIND.py` has its keys and their work, in a class of its name;
`stages/KIND.py` has `run`.
"""

from __future__ import annotations

import importlib
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from farthing.recipe.stage import StageSpec

KINDS = ("pretrain", "sft", "grpo")

# Successors of kinds of earlier versions.
GONE = {
    "study": "a study is several runs now: `python studies/dense_or_moe.py` makes and compares them, "
    "and `farthing compare` compares any that share a validation set",
}


def spec_of(kind: str) -> type[StageSpec]:
    """The keys of a kind: `Grpo` of `recipe/grpo.py` for "grpo"."""
    spec: type[StageSpec] = getattr(importlib.import_module(f"farthing.recipe.{kind}"), kind.capitalize())
    return spec


if TYPE_CHECKING:
    Stage = StageSpec
else:
    Stage = Annotated[reduce(or_, map(spec_of, KINDS)), Field(discriminator="kind")]
