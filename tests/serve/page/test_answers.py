"""Messages of the page to a request, and an answer's chunks to messages."""

from itertools import count
from typing import Any

import pytest

from farthing.serve.page import answers
from farthing.serve.page.answers import Answer, question


def chunk(finish_reason: str | None = None, **delta: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], "usage": None}


USAGE = {
    "prompt_tokens": 1200,
    "completion_tokens": 5,
    "completion_tokens_details": {"reasoning_tokens": 2},
    "prompt_tokens_details": {"cached_tokens": 1100},
    "cost": {"usd": 0.0000123, "joules": 4.25, "seconds": 0.75},
}


def answered(*chunks: dict[str, Any], error: str = "") -> Answer:
    """An answer whose clock counts seconds: one passes at each look."""
    answer = Answer("model", clock=count().__next__)
    for each in chunks:
        answer.take(each)
    answer.end(error)
    return answer


def parts(answer: Answer) -> dict[str, str]:
    """What is shown, by kind: the content of an answer, and the title of all else."""
    return {
        answers.kind(message): message.get("metadata", {}).get("title") or answers.text(message)
        for message in answer.messages()
    }


def test_an_answer_is_thinking_then_text_then_figures() -> None:
    answer = answered(
        chunk(reasoning_content="ten "), chunk(reasoning_content="two"), chunk(content="\n\n12"),
        chunk("stop"), {"choices": [], "usage": USAGE},
    )  # fmt: skip
    thinking, said, figures = answer.messages()
    assert thinking["content"] == "ten two"
    assert thinking["metadata"] == {"id": "thinking", "title": "Thought for 1.0 s", "status": "done"}
    assert said["content"] == "12"
    # begun at 0, first at 1, thought until 2, ended at 3: four tokens in two seconds
    assert figures["metadata"]["title"] == "5 tokens · 2.0 tokens/s · first after 1.00 s · $0.000012"
    assert figures["content"].split("  \n") == [
        "Model: `model`",
        "Prompt: 1,200 tokens, 1,100 of them read before and kept",
        "Thinking: 2 of the tokens",
        "Processor: 0.75 s",
        "Energy: 4.2 J",
    ]


def test_thinking_is_open_until_the_answer_begins() -> None:
    answer = Answer("model")
    answer.take(chunk(reasoning_content="hm"))
    assert [message["metadata"]["status"] for message in answer.messages()] == ["pending"]
    answer.take(chunk(content="so"))
    assert [message.get("metadata", {}).get("status") for message in answer.messages()] == ["done", None]


def test_figures_say_only_what_is_known() -> None:
    assert parts(answered(chunk(content="a"))) == {"answer": "a", "figures": "first after 1.00 s"}
    assert parts(answered())["figures"] == "nothing was said"
    assert parts(answered(chunk("length", content="a")))["figures"].endswith("cut at the longest length")
    one = {"choices": [], "usage": {"completion_tokens": 1}}
    assert parts(answered(chunk(content="a"), one))["figures"] == "1 token · first after 1.00 s"


def test_an_error_stands_below_what_was_said() -> None:
    assert parts(answered(chunk(content="half"), error="too long")) == {
        "answer": "half",
        "error": "⚠ Too long",
    }


def conversation() -> list[dict[str, Any]]:
    first = answered(chunk(reasoning_content="hm"), chunk(content="one"))
    failed = answered(error="too long")
    return [question("a"), *first.messages(), question("b"), *failed.messages(), question("c")]


def test_a_model_reads_questions_with_their_answers_and_the_last_question() -> None:
    said = [("user", "a"), ("assistant", "one"), ("user", "c")]
    assert [(m["role"], m["content"]) for m in answers.asked(conversation(), "")] == said
    assert answers.asked(conversation(), " Be brief. ")[0] == {"role": "system", "content": "Be brief."}


def test_a_conversation_is_cut_at_questions() -> None:
    shown = conversation()
    assert answers.turns(shown) == 3
    assert [answers.turns(answers.before(shown, turns)) for turns in range(4)] == [0, 1, 2, 3]
    assert answers.up_to_question(shown[:-1])[-1]["content"] == "b"
    assert answers.unanswered(shown)
    assert not answers.unanswered(shown[:-1])
    assert not answers.unanswered([])


def test_what_is_stopped_is_in_progress_no_more() -> None:
    answer = Answer("model")
    answer.take(chunk(reasoning_content="hm"))
    answer.stopped = True
    answer.end()
    thinking, figures = answer.messages()
    assert thinking["metadata"]["status"] == "done"
    assert figures["metadata"]["title"].endswith(" · stopped")


@pytest.mark.parametrize(
    ("said", "drawn"),
    [
        ("$5 and $10", "$5 and $10"),
        ("from $5-$10", "from $5-$10"),
        ("$x^2$ and $$y$$ and $z$.", r"\({}x^2\) and $$y$$ and \({}z\)."),
        ("$5 buys $n$, \\(m\\)", r"$5 buys \({}n\), \(m\)"),
        ("`$a$` is $a$, ```\n$b$\n``` $c$", "`$a$` is \\({}a\\), ```\n$b$\n``` \\({}c\\)"),
        ("$a$ and ```\n$HOME$ $PATH$", "\\({}a\\) and ```\n$HOME$ $PATH$"),
    ],
)
def test_formulas_are_told_from_prices_and_come_back_as_they_were(said: str, drawn: str) -> None:
    assert answers.drawn(said) == drawn
    assert answers.text({"content": drawn}) == said
    assert answers.text({"content": [{"type": "text", "text": drawn}]}) == said
