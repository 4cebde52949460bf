"""`farthing data`: what a source holds, and what would be learnt of it."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farthing.base.errors import UserError
from farthing.base.figures import percent, plural
from farthing.base.terminal import console
from farthing.cli.help import run_names
from farthing.cli.shared import (
    Json,
    model_source,
    only_results_on_stdout,
    print_result,
    print_text,
    starting,
)

if TYPE_CHECKING:
    from farthing.data.look import Looked
    from farthing.data.tokenizer import Tokenizer

_LONGEST = 1500  # characters of a text that are shown
_REASONS = 8  # why rows are left out, and what is not used
_MARKS = (">>>", "<<<")  # around what is learnt, where there are no colours


def data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file, a folder of files, or hf:owner/name[:split]; as in a recipe's data.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that would learn: a run, model folder, .gguf, hf:owner/name or pypi:name.",
            autocompletion=run_names,
        ),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Its template instead: chatml, plain, or the path of one.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="The shape of the rows; recognised by default.")] = None,
    field: Annotated[str | None, typer.Option(help="The column with the messages or the text.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row, as in the recipe.")] = 1024,
    rows: Annotated[int | None, typer.Option("--n", min=1, help="Rows to read; all by default.")] = None,
    as_json: Json = False,
) -> None:
    """Show what data hold: their shape, three rows as they would be learnt, lengths, and what is left out."""
    if chat_template is not None and model is None:
        raise UserError("--chat-template is for a model; name it with --model")
    with only_results_on_stdout(), starting():
        from farthing.data.look import look
    with only_results_on_stdout(f"reading {source}"):
        tokenizer = _tokenizer(model, chat_template) if model is not None else None
        looked = look(source, tokenizer, length=length, rows=rows, field=field, shape=shape)
    if as_json:
        print_result(looked.data(), "", as_json)
        return
    for line in _lines(looked):
        print_text(line)
    for row in looked.shown:
        print_text(f"\n{row.place}" + (f" ({len(row.texts)} texts)" if len(row.texts) > 1 else ""))
        for text in row.texts:
            _show(text)


def _tokenizer(model: str, chat_template: str | None) -> Tokenizer:
    from farthing.data.chat_templates import template_text
    from farthing.data.tokenizer import Tokenizer
    from farthing.weights.sources import model_folder

    chosen = model_source(model)
    is_tokenizer = (Path(chosen) / "tokenizer.json").is_file()
    tokenizer = Tokenizer(chosen if is_tokenizer else model_folder(chosen))
    return tokenizer.with_template(template_text(chat_template, tokenizer)) if chat_template else tokenizer


def _lines(looked: Looked) -> Iterator[str]:
    """What was found, in sentences."""
    shapes = ", ".join(f"{name} ({number:,})" for name, number in looked.found.shapes.most_common())
    yield f"{looked.source}: {plural(looked.rows, 'row')}" + (f"; shape: {shapes}" if shapes else "")
    columns = ", ".join(name for name, _ in looked.found.columns.most_common(12))
    if columns:
        yield f"columns: {columns}" + (", …" if len(looked.found.columns) > 12 else "")
    if looked.lengths:
        total, unit, middle = sum(looked.lengths), looked.unit, statistics.median(looked.lengths)
        lengths = f"median {middle:,.0f} {unit}, longest {max(looked.lengths):,}"
        learnt = f"{percent(looked.learnt / total)} of {total:,} {unit} are learnt"
        yield f"{plural(len(looked.lengths), 'example')}: {lengths}; {learnt}"
        if looked.unit == "tokens":
            share = percent(looked.over / len(looked.lengths))
            yield f"longer than a row of {looked.length:,} and left out: {looked.over:,} ({share})"
        else:
            yield "give --model to see tokens and the model's chat template"
    if looked.left_out:
        yield f"left out: {plural(looked.left_out.total(), 'row')}"
    for why, number in looked.left_out.most_common(_REASONS):
        yield f"  {number:,}: {looked.first[why] if number == 1 else f'{why} (first {looked.first[why]})'}"
    if len(looked.left_out) > _REASONS:
        yield f"  and for {len(looked.left_out) - _REASONS} other reasons"
    if looked.found.unused:
        yield looked.found.columns_not_used
    for note, number in looked.found.notes.most_common(_REASONS):
        yield f"not used: {note} ({plural(number, 'time')})"


def _show(text: list[tuple[str, bool]]) -> None:
    """One text: what is learnt is green, or between marks where there are no colours."""
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    kept, cut = _cut(_joined(text))
    if not colours:
        print_text("".join(f"{_MARKS[0]}{part}{_MARKS[1]}" if on else part for part, on in kept) + cut)
        return
    from rich.text import Text

    written = Text.assemble(*((part, "green" if on else "dim") for part, on in kept), cut)
    console(file=sys.stdout).print(written, soft_wrap=True)


def _joined(text: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The pieces as few as can be, without white space at the end."""
    runs = itertools.groupby(text, key=lambda piece: piece[1])
    parts = [("".join(part for part, _ in run), on) for on, run in runs]
    while parts and not parts[-1][1] and not parts[-1][0].strip():
        parts.pop()
    return parts


def _cut(text: list[tuple[str, bool]]) -> tuple[list[tuple[str, bool]], str]:
    """The beginning of a long text, and what is said in place of the rest."""
    kept, left = [], _LONGEST
    for part, on in text:
        if left > 0:
            kept.append((part[:left], on))
        left -= len(part)
    return kept, f" … and {plural(-left, 'character')} more" if left < 0 else ""


COMMANDS: tuple[Callable[..., Any], ...] = (data,)
