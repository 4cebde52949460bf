"""Recipes: the schema, reading from YAML, and writing back."""

from farthing.recipe.grpo import Grpo
from farthing.recipe.kinds import KINDS, Stage
from farthing.recipe.pretrain import Pretrain
from farthing.recipe.recipe import (
    Evaluate,
    Recipe,
    builtin,
    dump,
    load,
    own_files,
    parse_tasks,
    plain_asks,
    source_text,
    validate,
)
from farthing.recipe.sft import Sft
from farthing.recipe.source import Source
from farthing.recipe.stage import Asks, Curve, LanguageModelling, StageSpec
from farthing.recipe.tasks import Gold, RewardPart, TaskSetting

__all__ = [
    "KINDS",
    "Asks",
    "Curve",
    "Evaluate",
    "Gold",
    "Grpo",
    "LanguageModelling",
    "Pretrain",
    "Recipe",
    "RewardPart",
    "Sft",
    "Source",
    "Stage",
    "StageSpec",
    "TaskSetting",
    "builtin",
    "dump",
    "load",
    "own_files",
    "parse_tasks",
    "plain_asks",
    "source_text",
    "validate",
]
