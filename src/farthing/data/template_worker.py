"""The process that renders one chat template, which is untrusted: in a sandbox, and within limits.

The first request is the template's text and is answered when it is compiled; each further one is an object of the
template's variables. A reply is [kind, text, marked], with kind one of `text`, `refused`, `broken` and `limit`, and the
ranges of the text that the template marks as generated; null for a template without such marks. A template that
computes longer than `SECONDS` ends the process by SIGPROF.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from contextlib import suppress
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Output, TemplateData
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from farthing.data.template_pipe import CHARACTERS, MEMORY, SECONDS, read, write

_BEGIN, _END = "\udffe", "\udfff"  # halves of characters, which no text that can be tokenised holds
_MARKS = re.compile(f"[{_BEGIN}{_END}]")
_SAID = 300  # characters of what a template says when it refuses


def main() -> None:
    """Serve one template on the standard streams until they close."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for what, limit in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_AS, MEMORY)):
        _limit(what, limit)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    template: jinja2.Template | None = None
    while (request := read(requests, None)) is not None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        if template is None:
            template, reply = _compile(json.loads(request))
        else:
            reply = _render(template, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write(replies, json.dumps(reply).encode())


def _limit(what: int, soft: int) -> None:
    hard = resource.getrlimit(what)[1]
    with suppress(OSError, ValueError):  # not every system has every limit; time and output have one always
        resource.setrlimit(what, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _compile(text: str) -> tuple[jinja2.Template | None, list[Any]]:
    try:
        return _environment().from_string(text), ["text", "", None]
    except Exception as error:  # jinja2's own, or Python's on what jinja2 made of it: too deep, too large
        return None, _failure(error, "broken")


def _render(template: jinja2.Template, request: bytes) -> list[Any]:
    """Through JSON, so that the template only ever holds plain values."""
    try:
        pieces, length, variables = [], 0, json.loads(request)
        marks = template.environment.extensions[_Generation.identifier].used  # type: ignore[attr-defined]
        if marks and b"\\udff" in request and _MARKS.search(json.dumps(variables, ensure_ascii=False)):
            return ["refused", "a text holds half a character (a lone surrogate)", None]
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > CHARACTERS:
                return ["limit", f"it writes more than {CHARACTERS:,} characters", None]
        return ["text", *(_without_marks("".join(pieces)) if marks else ("".join(pieces), None))]
    except Exception as error:  # a template can fail in any way that Python can
        return _failure(error, "refused")


def _without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the ranges in it that stood between marks."""
    begun, ranges, pieces, length, at = 0, [], [], 0, 0
    for mark in _MARKS.finditer(text):
        pieces.append(text[at : mark.start()])
        length, at = length + mark.start() - at, mark.end()
        if mark[0] == _BEGIN:
            begun = length
        else:
            ranges.append((begun, length))
    return "".join([*pieces, text[at:]]), ranges


def _failure(error: Exception, kind: str) -> list[Any]:
    if isinstance(error, MemoryError):
        return ["limit", f"it needs more than {MEMORY >> 20:,} MiB of memory", None]
    if isinstance(error, RecursionError):
        return ["limit", "it is nested without end", None]
    said = " ".join(str(error)[: 4 * _SAID].split())
    said = "".join(character for character in said if character.isprintable())[:_SAID]
    return [kind, said or type(error).__name__, None]


# ---------------------------------------------------------------- the sandbox


def _environment() -> ImmutableSandboxedEnvironment:
    """A sandbox with just the filters and functions that chat templates rely on."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.clear()
    environment.globals |= {
        "range": safe_range,
        "namespace": _Namespace,
        "dict": _make_dict,
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training tools: its contents are written between marks."""

    tags = {"generation"}  # noqa: RUF012
    used = False

    def parse(self, parser: Parser) -> Node | list[Node]:
        line = next(parser.stream).lineno
        self.used = True

        def written(mark: str) -> Node:
            return Output([TemplateData(mark)], lineno=line)

        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [written(_BEGIN), *inside, written(_END)]


class _Namespace(Namespace):
    """`namespace()`, which a template writes to, without access to the names Python keeps for itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name!r} is not allowed in a namespace")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as models were trained on it: Jinja's own filter escapes < and > for web pages."""
    allowed = {key: options[key] for key in ("separators", "sort_keys") if key in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **allowed)
