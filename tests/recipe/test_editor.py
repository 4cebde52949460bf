import re
from pathlib import Path

import jsonschema
import pytest

from farthing.base.schema import parse_text
from farthing.recipe import builtin, source_text, validate
from farthing.recipe.editor import json_schema

DOCS = Path(__file__).parents[2] / "docs"
SHOWN = [
    text
    for page in sorted(DOCS.glob("*.md"))
    for text in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.S)
    if "\nstages:" in text
]
GRPO = {"kind": "grpo", "tasks": {"chain_sum": 1}, "steps": 1}
PRETRAIN = {"kind": "pretrain", "data": ["a.txt"], "size": "1.5M"}
SHORT = [  # each with a value in its short form
    {"stages": [PRETRAIN | {"tokens": "2M", "vocab_size": "4K"}]},
    {"stages": [PRETRAIN | {"validation": "b.txt", "tokens": 5_000_000}]},
    {
        "base": "b",
        "stages": [GRPO | {"tasks": {"t": {"path": "q.jsonl", "answer": "gold", "reward": "number"}}}],
    },
    {
        "base": "b",
        "stages": [GRPO | {"tasks": {"t": {"path": "q.csv", "reward": ["number", {"use": "x.py:f"}]}}}],
    },
    {"base": "b", "stages": [GRPO], "evaluate": {"tasks": {"gcd": 2}}},
]
WRONG = [
    {"base": "b", "stages": [GRPO | {"learning_rate": 1}]},
    {"base": "b", "stages": [GRPO | {"steps": 0}]},
    {"base": "b", "stages": [{"kind": "gpro"}]},
    {"base": "b", "stages": []},
    {"base": "b", "stages": [GRPO | {"tasks": {"t": {"path": 7}}}]},
    {"stages": [PRETRAIN], "sed": 1},
]


@pytest.fixture(scope="module")
def editor() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("text", [*(source_text(name) for name, _ in builtin()), *SHOWN])
def test_an_editor_accepts_every_recipe_there_is(editor, text):
    editor.validate(parse_text(text, "recipe"))


@pytest.mark.parametrize("recipe", SHORT)
def test_an_editor_accepts_what_is_read(editor, recipe):
    validate({"name": "x", **recipe})
    editor.validate({"name": "x", **recipe})


@pytest.mark.parametrize("recipe", WRONG)
def test_an_editor_refuses_what_is_refused(editor, recipe):
    with pytest.raises(ValueError, match=r".+"):
        validate({"name": "x", **recipe})
    assert not editor.is_valid({"name": "x", **recipe})


def test_an_editor_shows_what_every_key_means(editor):
    for name in ("Grpo", "Sft", "Pretrain"):
        keys = editor.schema["$defs"][name]["properties"]
        assert [key for key, facts in keys.items() if "description" not in facts and key != "kind"] == []
