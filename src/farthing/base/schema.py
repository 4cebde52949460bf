"""Reads YAML and turns pydantic's errors into one sentence each: where, what is expected, what was given."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from farthing.base.errors import UserError
from farthing.base.files import open_ready

# Names that other trainers use for our keys, where spelling alone would not find the right one.
_OTHER_NAMES = {
    "learning_rate": "lr", "num_generations": "group", "group_size": "group", "batch_size": "prompts",
    "beta": "kl", "kl_coef": "kl", "epsilon": "clip_low", "epsilon_high": "clip_high", "max_steps": "steps",
    "max_completion_length": "max_new_tokens", "max_tokens": "max_new_tokens", "scheduler": "schedule",
    "loss_type": "loss", "scale_rewards": "advantage", "mask_truncated_completions": "mask_truncated",
    "dynamic_sampling": "refill", "lora_rank": "lora", "lora_r": "lora", "model": "base", "eval": "evaluate",
    "system_prompt": "system", "type": "kind",
}  # fmt: skip

# pydantic error types for an unknown key; the second is for a key that is not text.
UNKNOWN_KEY = ("extra_forbidden", "invalid_key")

_EXPECTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "string_type": "text", "dict_type": "a table", "list_type": "a list",
    "model_type": "a table", "tuple_type": "a list of two numbers", "finite_number": "a finite number",
    "model_attributes_type": "a table", "null_type": "nothing",
}  # fmt: skip
_BOUNDS = {
    "greater_than": ("gt", "above"), "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"), "less_than_equal": ("le", "at most"),
}  # fmt: skip


MAX_BYTES = 1_000_000  # a file beyond this was not written by hand
_MAX_NODES = 20_000  # values in a document; they take a second or two to read


class Strict(BaseModel):
    """A table that a person wrote: no unknown keys, no values that only look like the right type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


M = TypeVar("M", bound=BaseModel)


def checked(model: type[M], data: Any, name: str = "") -> M:
    """`data` as `model`.

    Raises:
        UserError: that begins with `name`, if one is given, and names up to three wrong keys.
    """
    head = f"{name}: " if name else ""
    if not isinstance(data, dict):
        raise UserError(f"{head}must be a table of keys, got {given(data)}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # A misspelt key often makes another one missing, so misspelt keys come first.
        found = sorted(error.errors(), key=lambda problem: problem["type"] not in UNKNOWN_KEY)
        problems = [sentence(dict(problem), data, model).removeprefix(": ") for problem in found]
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(head + "; ".join(problems[:3]) + more) from None


def sentence(problem: dict[str, Any], data: Any, root: type[BaseModel]) -> str:
    """Return one pydantic error as "path: what is wrong and what is expected"."""
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    path = _path(problem["loc"], data, keep_last=kind == "missing" or kind in UNKNOWN_KEY)
    where = ".".join(path)
    if kind in UNKNOWN_KEY:
        return f"{where}: no such key; {_right_key(root, path, data)}"
    if kind == "union_tag_not_found":
        return f"{where}.kind: is missing (the kinds are {', '.join(_kinds(root, path))})"
    if kind == "union_tag_invalid":
        kinds, tag = _kinds(root, path), value.get("kind") if isinstance(value, dict) else value
        hint = nearest(str(tag), kinds)
        allowed = ", ".join(f"'{name}'" for name in kinds[:-1]) + f" or '{kinds[-1]}'"
        return f"{where}.kind: must be {allowed}, got {given(tag)}" + (f"; {hint}" if hint else "")
    if kind == "missing":
        models = [model for model in _models_at(root, path[:-1], data) if path[-1] in model.model_fields]
        meaning = models[0].model_fields[path[-1]].description if models else None
        return f"{where}: is missing" + (f" ({meaning})" if meaning else "")
    if kind == "literal_error":
        words = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        hint = nearest(str(value), words)
        return f"{where}: must be {context['expected']}, got {given(value)}" + (f"; {hint}" if hint else "")
    if kind == "value_error":
        return f"{where}: {context['error']}" if where else f"{context['error']}"
    if kind == "string_pattern_mismatch":
        return f"{where}: must be letters, digits, '.', '_' and '-' only, at most 64, got {given(value)}"
    if kind in _BOUNDS:
        key, word = _BOUNDS[kind]
        bound = context[key] if isinstance(context[key], int) else f"{context[key]:g}"
        return f"{where}: must be {word} {bound}, got {given(value)}"
    if kind in ("too_short", "string_too_short"):
        return f"{where}: must not be empty"
    expected = _EXPECTED.get(kind)
    message = f"must be {expected}" if expected else problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{where}: {message}, got {given(value)}"


def _path(loc: Sequence[int | str], data: Any, keep_last: bool) -> list[str]:
    """Return the error's path with list items counted from 1, without the union branches that pydantic adds."""
    path: list[str] = []
    for depth, part in enumerate(loc):
        is_list = isinstance(data, list)
        known: Container[Any] = range(len(data)) if is_list else data if isinstance(data, dict) else ()
        if part in known:
            data = data[part]
        elif not (keep_last and depth == len(loc) - 1):
            continue
        path.append(str(part + 1) if is_list and isinstance(part, int) else str(part))
    return path


def _models_at(root: type[BaseModel], path: Sequence[str], data: Any) -> list[type[BaseModel]]:
    """Return the models whose keys are valid at `path`; among models with a `kind`, the one that `data` names."""
    hints: list[Any] = [root]
    for part in path:
        hints = [inner for hint in hints for inner in _inside(hint, part)]
        data = _child(data, part)
    models = [
        model
        for hint in hints
        for model in _variants(hint)
        if isinstance(model, type) and issubclass(model, BaseModel)
    ]
    kind = data.get("kind") if isinstance(data, dict) else None
    return [model for model in models if kind in _literals(model)] or models


def _child(data: Any, part: str) -> Any:
    if isinstance(data, dict):
        return data.get(part)
    known = isinstance(data, list) and part.isdecimal() and 1 <= int(part) <= len(data)
    return data[int(part) - 1] if known else None


def _literals(model: type[BaseModel]) -> tuple[Any, ...]:
    """Return the allowed values of a model's `kind`; none if it has no such key."""
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


def _kinds(root: type[BaseModel], path: Sequence[str]) -> list[str]:
    return [word for model in _models_at(root, path, None) for word in _literals(model)]


def _variants(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        for variant in get_args(hint):
            yield from _variants(variant)
    elif get_origin(hint) is Annotated:
        yield from _variants(get_args(hint)[0])
    else:
        yield hint


def _inside(hint: Any, part: str) -> Iterator[Any]:
    for variant in _variants(hint):
        if get_origin(variant) in (list, dict):
            yield get_args(variant)[-1]
        elif isinstance(variant, type) and issubclass(variant, BaseModel) and part in variant.model_fields:
            yield variant.model_fields[part].annotation


def _right_key(root: type[BaseModel], path: Sequence[str], data: Any) -> str:
    key = path[-1]
    fields = [name for model in _models_at(root, path[:-1], data) for name in model.model_fields]
    if _OTHER_NAMES.get(key) in fields:
        return f"did you mean {_OTHER_NAMES[key]}?"
    if len(path) == 1:  # a key of a stage or of evaluate, written one level too high
        for parent in (["stages", "1"], ["evaluate"]):
            for name in (key, _OTHER_NAMES.get(key)):
                if any(name in model.model_fields for model in _models_at(root, parent, data)):
                    return f"did you mean {'.'.join(parent)}.{name}?"
    return nearest(key, fields) or f"the keys are {', '.join(dict.fromkeys(fields))}"


def nearest(word: str, words: Sequence[str]) -> str:
    """Return a "did you mean" hint with the closest word; "" if none is close."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def given(value: Any) -> str:
    """Return the user's value, shortened for an error message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (dict, BaseModel)):
        return "a table"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return repr(_shortened(value))
    if isinstance(value, int) and abs(value) >= 1 << 1000:
        return "a number of hundreds of digits"
    return _shortened(f"{value}")


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


_SCALARS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
)


_FORMS = {name: pattern for name, pattern, _ in _SCALARS}
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """Reads what is written, and no more: no alias, merge key or exotic tag makes one value out of another."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's name)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse("aliases (*name) are not allowed here", event)
        tag = getattr(event, "tag", None)
        if tag not in (None, "!") and tag not in _TAGS:
            self._refuse(f"the tag {given(tag)} is not allowed here; write the value as it is", event)
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            self._refuse(f"more than {_MAX_NODES:,} values, so not written by hand", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    self._refuse("a key is a list or a table where a word belongs", key)
                name = (key.tag, str(key.value))
                if name in seen:
                    self._refuse(f"duplicate key {_shortened(key.value)}", key)
                seen.add(name)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if re.search("[\ud800-\udfff]", value):
            self._refuse("a text holds half a character (a lone surrogate)", node)
        return value

    def construct_plain(self, node: Any) -> Any:
        """A scalar that is not text, whatever resolved it: by its form, or by an explicit tag."""
        name, text = node.tag.rpartition(":")[2], self.construct_scalar(node)
        if not _FORMS[name].fullmatch(text):
            self._refuse(f"{_EXPECTED[f'{name}_type']} is wanted after !!{name}, got {given(text)}", node)
        if name == "null":
            return None
        if name == "bool":
            return text.lower() == "true"
        if name == "int":
            return int(text)
        return float(re.sub(r"\.(?=[in])", "", text.lower()))

    def _refuse(self, problem: str, where: Any) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None
        if re.search(r"[\r\x85\u2028\u2029]", text):
            style = '"'  # the only style that preserves these line breaks
        elif "\n" in text and re.fullmatch(r"\S(?:.*\S)?(?:\n(?:\S(?:.*\S)?)?)*", text):
            style = "|"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


for _name in _FORMS:
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _Loader.construct_plain)


_Dumper.add_representer(str, _Dumper.represent_text)


def parse_text(text: str, name: str) -> Any:
    """Parse the one YAML document in `text`. Raises UserError with `name` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{name}{line}: {error.problem or 'not YAML'}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply") from None
    except ValueError:  # an int of more digits than Python converts
        raise UserError(f"{name}: holds a number of thousands of digits; write a smaller one") from None
    except (
        OverflowError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # what PyYAML meets in its own code
        raise UserError(f"{name}: not YAML ({error})") from None


def parse_value(text: str, name: str) -> Any:
    """Parse a command-line value: a list, table or quoted text as in YAML, else one plain scalar."""
    if text.lstrip()[:1] in ("[", "{", '"', "'"):
        return parse_text(text, name)
    text = text.strip()
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{name}: {error.problem}") from None
    except ValueError:
        raise UserError(f"{name}: a number of thousands of digits; write a smaller one") from None
    finally:
        loader.dispose()


def dump_text(data: Any) -> str:
    """Return YAML that `parse_text` reads back to equal data, with keys in order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_value(value: Any) -> str:
    """`dump_text` on one line, as a value stands behind its key."""
    text = yaml.dump(
        [value], Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=math.inf
    )
    return text.strip()[1:-1]


def read_yaml(path: Path) -> Any:
    """The YAML document in a file. Raises UserError that names the file, and the line where there is one."""
    try:
        with open_ready(path) as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read ({said}); give a YAML file") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: larger than 1 MB, so not written by hand; give a YAML file")
    try:
        return parse_text(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; give a YAML file") from None
