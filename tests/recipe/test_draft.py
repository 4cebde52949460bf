import itertools
from pathlib import Path

import pytest

from farthing.base.schema import parse_text
from farthing.recipe import validate
from farthing.recipe.draft import FITTING, GOALS, Have, draft, name_for
from farthing.recipe.editor import SCHEMA_LINE

PATHS = ("chats.jsonl", "my data, {new}: #1.jsonl", "hf:owner/name:train", "it's", "no", "[x]")


@pytest.mark.parametrize(("goal", "gpu", "data"), [*itertools.product(GOALS, (False, True), (None, *PATHS))])
def test_every_draft_is_a_recipe_of_what_somebody_has(goal, gpu, data):
    if data is None and goal not in FITTING["nothing"]:
        return
    base = None if goal == "scratch" else "no: base"
    text = draft(Have("mine", goal, base, data, gpu))
    assert text.startswith(f"{SCHEMA_LINE}\n")
    recipe = validate(parse_text(text, "draft"))
    kinds = {"chat": ["sft"], "reason": ["grpo"], "both": ["sft", "grpo"], "scratch": ["pretrain"]}
    assert [stage.kind for stage in recipe.stages] == kinds[goal]
    assert recipe.base == base
    named = [path for stage in recipe.stages for path in stage.paths]
    named += [task.path for stage in recipe.stages for mixture in stage.mixtures for task in mixture.values()]
    assert {path and path.removeprefix(f"{Path.cwd()}/") for path in named} == {data}
    assert (recipe.evaluate is not None) == (goal in ("reason", "both"))


@pytest.mark.parametrize(
    ("stem", "name"),
    [("mine", "mine"), ("my recipe!", "my-recipe"), ("..", "my-recipe"), ("a" * 90, "a" * 64)],
)
def test_a_name_is_made_of_the_files(stem, name):
    assert name_for(stem) == name
