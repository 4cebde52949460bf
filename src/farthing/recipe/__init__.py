"""What a recipe may say: the schema, reading it from YAML, and writing it back."""

from farthing.recipe.recipe import Asks, Evaluate, Recipe, Stage, builtin, dump, load, parse_tasks, validate
from farthing.recipe.types import Grpo, Pretrain, Sft, Source, TaskSetting

__all__ = [
    "Asks",
    "Evaluate",
    "Grpo",
    "Pretrain",
    "Recipe",
    "Sft",
    "Source",
    "Stage",
    "TaskSetting",
    "builtin",
    "dump",
    "load",
    "parse_tasks",
    "validate",
]
