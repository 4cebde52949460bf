"""What an editor needs to complete and check recipes: their JSON schema."""

from __future__ import annotations

from typing import Any

from farthing.recipe.recipe import Recipe

SCHEMA_FILE = "farthing.schema.json"
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"
"""The first line of a recipe beside that file, from which editors find it."""

# Tables that may be written as one value.
_SHORT_FORMS: dict[str, dict[str, Any]] = {
    "Gold": {"type": "string", "minLength": 1},
    "RewardPart": {"type": "string", "minLength": 1},
    "Source": {"type": "string", "minLength": 1},
    "TaskSetting": {"type": "number", "exclusiveMinimum": 0},
}


def json_schema() -> dict[str, Any]:
    """The schema of recipes as JSON Schema, draft 2020-12.

    It accepts every recipe that `load` does; what only `load` can tell, such as whether two keys go together, is left
    to it.
    """
    schema = Recipe.model_json_schema()
    for name, short in _SHORT_FORMS.items():
        schema["$defs"][name] = {"anyOf": [short, schema["$defs"][name]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
