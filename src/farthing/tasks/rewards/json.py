"""`json`: the answer is JSON that satisfies a schema, equals the gold answer, or both.

It is the whole completion or its only fenced block; with the convention `tag`, what the tag holds. Nothing is fetched
for a schema: references lead within it.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from farthing.recipe.rewards import Json
from farthing.tasks.extract import extract
from farthing.tasks.item import Convention, Item
from farthing.tasks.rewards.part import Part

_FENCED = re.compile(r"^```[a-zA-Z]*[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_DEEPEST = 200  # brackets within each other


def verify(item: Item, text: str, convention: Convention, settings: Json) -> Part:
    gold = _parsed(item.answer) if settings.equal else None
    if settings.equal and gold is None:
        return Part("bad_gold")
    found = _written(text, convention)
    value = _parsed(found) if found is not None else None
    if value is None:
        return Part("unparsed")
    right = gold is None or canonical(value[0]) == canonical(gold[0])
    if right and settings.schema_ is not None:
        try:
            right = _validator(json.dumps(settings.schema_)).is_valid(value[0])
        except RecursionError:
            return Part("unparsed")
        except Exception as error:  # a reference that leads nowhere, a pattern that Python cannot read
            return Part(
                "error", error=f"json: the schema cannot be used: {' '.join(str(error).split())[:200]}"
            )
    shown = found.strip()[:1000] if found else None
    return Part("right", shown, 1.0) if right else Part("wrong", shown)


def _written(text: str, convention: Convention) -> str | None:
    if convention == "tag":
        return extract(text, "tag", "text")
    text = text.rpartition("</think>")[2]
    blocks = _FENCED.findall(text)
    if len(blocks) > 1:
        return None
    return blocks[0] if blocks else text


def _parsed(text: str) -> list[Any] | None:
    """The value in a list, so that null is told from nothing; None for what is no JSON."""
    if max(_depths(text), default=0) > _DEEPEST:
        return None
    try:
        return [json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)]
    except ValueError:
        return None


def _depths(text: str) -> Any:
    depth = 0
    for bracket in re.finditer(r"[\[{]|[\]}]", text):
        depth += 1 if bracket[0] in "[{" else -1
        yield depth


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice: two answers in one")
    return dict(pairs)


def canonical(value: Any) -> str:
    """One spelling of a value: order of keys and 1 or 1.0 make no difference, true and 1 do."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@functools.cache
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator
    from referencing import Registry

    return Draft202012Validator(json.loads(schema), registry=Registry())
