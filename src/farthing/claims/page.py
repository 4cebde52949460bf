"""The findings on a claim as a page of HTML: whole in one file, without scripts and without a request to anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from farthing.claims.answer import answer
from farthing.claims.check import Finding
from farthing.claims.text import COUNTED, questions, sections

_STYLE = """
body { max-width: 44rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 Georgia, serif }
body { color: #222; background: #fff }
h1 { font-size: 1.6rem; margin-bottom: .3rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem }
dt { font-weight: bold; margin-top: .6rem } dd { margin: 0 0 0 1rem } ul { padding-left: 1.2rem }
.judgement { border-left: .25rem solid #96471a; padding-left: .8rem; font-size: 1.1rem }
footer { color: #666; font-size: .85rem; margin-top: 2rem }
@media print { body { margin: 0; max-width: none } }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181613 } footer { color: #999 } }
"""


def page(finding: Finding) -> str:
    """The short answer, the claim, the verdicts with their arithmetic, and the evidence."""
    found = answer(finding)
    evidence: list[tuple[str, Iterable[str]]] = [
        ("the three questions", questions(finding)),
        *sections(finding),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(found.title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(found.title)}</h1>",
            f"<p>{escape(finding.claim.about)}</p>",
            "<dl>",
            *(f"<dt>{escape(question)}</dt><dd>{escape(said)}</dd>" for question, said in found.lines),
            "</dl>",
            f'<p class="judgement">{escape(found.judgement)}</p>',
            *(f"<h2>{escape(title)}</h2>\n{_listed(items)}" for title, items in evidence),
            f"<footer>{escape(COUNTED)} Checked by Farthing.</footer>",
            "</body></html>",
        ]
    )


def _listed(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
