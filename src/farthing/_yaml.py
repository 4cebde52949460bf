"""YAML as people expect it: PyYAML's safe loader with YAML 1.2's scalars, and nothing that can surprise.

PyYAML follows YAML 1.1, in which `1e-5` is text, `no` is false, `1:30` is ninety and `010` is eight. Here the
core schema of YAML 1.2 (section 10.3.2) holds: null, true, false, integers and floats; all else is text.
Aliases (which can unfold to gigabytes) and repeated keys are errors.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from farthing.errors import UserError

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


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's name)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed here", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                name = (key.tag, str(key.value))
                if name in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value} stands here twice", problem_mark=key.start_mark
                    )
                seen.add(name)
        return super().construct_mapping(node, deep=deep)

    def construct_decimal(self, node: Any) -> int:
        return int(self.construct_scalar(node))


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would take for something else than text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None
        if re.search(r"[\r\x85\u2028\u2029]", text):
            style = '"'  # only here do these line breaks come back as they went
        elif "\n" in text and re.fullmatch(r"\S(?:.*\S)?(?:\n(?:\S(?:.*\S)?)?)*", text):
            style = "|"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)
_Dumper.add_representer(str, _Dumper.represent_text)


def parse_text(text: str, name: str) -> Any:
    """The one YAML document in `text`. Raises UserError with `name` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{name}{line}: {error.problem or 'not YAML'}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits, a wrong !!timestamp
        raise UserError(f"{name}: {error}") from None


def parse_value(text: str, name: str) -> Any:
    """A value from the command line: a list, table or quoted text as in YAML, else one plain scalar."""
    if text.lstrip()[:1] in ("[", "{", '"', "'"):
        return parse_text(text, name)
    text = text.strip()
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    finally:
        loader.dispose()


def dump_text(data: Any) -> str:
    """YAML that `parse_text` reads back to equal data, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
