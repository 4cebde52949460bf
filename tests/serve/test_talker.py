import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import farthing
from farthing.base.errors import UserError
from farthing.engine import Model
from farthing.serve import talker
from farthing.serve.chat import Message
from farthing.serve.talker import Talker

SUM = "State the final answer to the following arithmetic problem: 3 + 4 ="
SYSTEM: Message = {"role": "system", "content": "Answer."}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return farthing.load(tiny_model, device="cpu")


def turns(count: int) -> list[Message]:
    """As many finished turns, and one more question."""
    done = [
        message
        for number in range(count)
        for message in (
            {"role": "user", "content": f"{number} + 1 ="},
            {"role": "assistant", "content": "7"},
        )
    ]
    return [*done, {"role": "user", "content": SUM}]


def size(model: Model, messages: list[Message]) -> int:
    return len(model.tokenizer.chat_ids(messages))


def kept(
    model: Model, messages: list[Message], longest: int, monkeypatch: pytest.MonkeyPatch
) -> list[Message]:
    """What the model is asked to answer, and that it does."""
    asked: list[list[Message]] = []
    stream = model.stream

    def noted(messages: list[Message], **options: Any) -> Iterator[str]:
        asked.append(messages)
        return stream(messages, **options)

    monkeypatch.setattr(model, "stream", noted)
    answer = Talker(model, "cpu", max_new_tokens=longest, temperature=0)(messages)
    assert "".join(answer.pieces)
    assert len(messages) - len(asked[0]) == answer.left_out
    monkeypatch.undo()
    return asked[0]


def test_a_conversation_that_fits_is_kept_whole(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [SYSTEM, *turns(2)]
    assert kept(model, messages, 8, monkeypatch) == messages


def test_old_turns_make_room_by_the_quarter(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    quarter, starts = model.context // 4, []
    for count in range(3, 40):
        messages = [SYSTEM, *turns(count)]
        left = kept(model, messages, 10_000, monkeypatch)
        assert left[0] == SYSTEM
        assert left[1]["role"] == "user"
        assert left[-1] == messages[-1]
        assert size(model, left) <= 3 * quarter
        if len(left) < len(messages):
            assert size(model, [SYSTEM, *messages[-len(left) - 1 :]]) > 2 * quarter
        starts.append(left[1]["content"])
    assert 2 < len(set(starts)) < len(starts) / 2  # what follows the system message stays for some turns


def test_a_message_longer_than_the_context_is_refused_and_one_just_below_is_answered(model: Model) -> None:
    talk = Talker(model, "cpu", max_new_tokens=1000, temperature=0)
    long = [SYSTEM, *turns(3)[:-1], {"role": "user", "content": ""}]
    while size(model, [SYSTEM, long[-1]]) < model.context - 1:
        long[-1]["content"] += "3"
    answer = talk(long)
    assert answer.left_out == 6
    assert sum(map(len, answer.pieces)) > 0
    assert answer.report().startswith("1 token, ")
    assert answer.report().endswith("all there was room for")
    long[-1]["content"] += "3"
    with pytest.raises(UserError, match=r"too long: \d+ tokens .* room for"):
        talk(long)


def test_the_report_counts_tokens_money_and_joules(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_new_tokens": 20, "temperature": 0}
    answer = Talker(model, "cpu", **options)(turns(0))
    text = "".join(answer.pieces)
    expected = model.chat(turns(0), **options)
    assert text == expected.text
    said = answer.report()
    assert re.fullmatch(rf"{len(expected.ids)} tokens, [\d,.]+ tokens/s, (under )?\$[\d.]+, [\d.]+ J", said)

    def no_price(device: object) -> tuple[float, str]:
        raise UserError("no price is known")

    monkeypatch.setattr(talker, "rate", no_price)
    answer = Talker(model, "cpu", **options)(turns(0))
    assert list(answer.pieces)
    assert "$" not in answer.report()


def test_an_answer_as_long_as_it_may_be_says_so(model: Model) -> None:
    answer = Talker(model, "cpu", max_new_tokens=1, temperature=0)(turns(0))
    assert list(answer.pieces)
    assert answer.report().endswith("the longest answer")


def test_an_answer_that_is_stopped_is_counted_too(model: Model) -> None:
    answer = Talker(model, "cpu", max_new_tokens=20, temperature=2.0, seed=1)(turns(0))
    next(answer.pieces)
    answer.pieces.close()  # type: ignore[attr-defined]
    assert re.match(r"\d+ tokens?, ", answer.report())


def test_a_template_that_opens_the_thinking_is_noticed(tiny_model: Path) -> None:
    model = farthing.load(tiny_model, device="cpu")
    assert not Talker(model, max_new_tokens=4)(turns(0)).opened
    template = model.tokenizer.templates["default"]
    model.use_template(template.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}"))
    assert Talker(model, max_new_tokens=4)(turns(0)).opened


def test_memory_that_runs_out_is_a_mistake_that_can_be_mended(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(messages: list[Message], **options: object):  # type: ignore[no-untyped-def]
        raise MemoryError
        yield ""

    monkeypatch.setattr(model, "stream", stream)
    with pytest.raises(UserError, match="answering ran out of memory"):
        list(Talker(model, "cpu", max_new_tokens=4)(turns(0)).pieces)
