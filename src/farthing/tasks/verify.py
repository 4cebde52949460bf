"""Verify a completion against an item.

Pure: no state, no clock, and no model output is ever run, but for the rewards that a recipe asks for by name: `code`,
which runs it in a sandbox, and functions of the user's own.
"""

from __future__ import annotations

from farthing.tasks.expression import solves, tidy
from farthing.tasks.extract import extract, plain_form
from farthing.tasks.item import Convention, Item, Verdict
from farthing.tasks.numbers import one_number
from farthing.tasks.plain import plain_text
from farthing.tasks.rewards.part import said
from farthing.tasks.rewards.total import judged, prepare

__all__ = ["prepare", "verify"]  # what a verifier process calls


def verify(item: Item, text: str, convention: Convention) -> Verdict:
    """The verdict on one completion of `item.question`.

    What is read comes after any thinking, and without copies of the question: neither is an answer. An item whose own
    answer is not right when given in the convention's plain form gets "bad_gold", whatever the completion.

    Raises UserError for a convention that does not exist.
    """
    if item.metadata["scorer"] == "rewards":
        return judged(item, item.said(text), item.convention(convention))
    if _judge(item, plain_form(item.answer, convention), convention).outcome != "right":
        return Verdict("bad_gold")
    return _judge(item, said(item, text), convention)


def _judge(item: Item, text: str, convention: Convention) -> Verdict:
    scorer = item.metadata["scorer"]
    assert scorer in ("integer", "text", "expression"), scorer
    answer = extract(text, convention, scorer)
    if answer is None:
        return Verdict("unparsed")
    if scorer == "integer":
        return _compare(one_number(answer), one_number(item.answer))
    if scorer == "text":
        return _compare(plain_text(answer) or None, plain_text(item.answer))
    expression = tidy(answer)
    if expression is None:
        return Verdict("unparsed")
    facts = item.metadata
    solved = solves(expression, facts["numbers"], facts["target"], facts["operators"])
    if solved is None:
        return Verdict("unparsed")
    return Verdict("right" if solved else "wrong", expression)


def _compare(given: str | None, gold: str | None) -> Verdict:
    if given is None:
        return Verdict("unparsed")
    return Verdict("right" if given == gold else "wrong", given)
