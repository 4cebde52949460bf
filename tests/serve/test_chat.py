import io
import json
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.base.waiting import Waiting
from farthing.serve.chat import Answer, Message, chat_loop, pasted


class Terminated(KeyboardInterrupt):
    pass


def talk(
    lines: list[str | type[BaseException]],
    reply: Callable[[list[Message]], Iterator[str] | Answer],
    **options: object,
) -> tuple[list[Message], str]:
    """Hold a conversation in which the person says `lines`; an exception stands for a key such as Ctrl-C."""
    said, output = iter(lines), io.StringIO()

    def read(prompt: str) -> str:
        output.write(prompt)
        line = next(said, EOFError)
        if isinstance(line, str):
            return line
        raise line

    def answer(messages: list[Message]) -> Answer:
        replied = reply(messages)
        return replied if isinstance(replied, Answer) else Answer(replied)

    messages = chat_loop(answer, read, output, **options)  # type: ignore[arg-type]
    return messages, output.getvalue()


def answers(*pieces: str) -> Callable[[list[Message]], Iterator[str]]:
    return lambda messages: iter(pieces)


def contents(messages: list[Message]) -> list[str]:
    return [message["content"] for message in messages]


# ---- the conversation ----


def test_the_conversation_grows_and_is_given_to_the_model() -> None:
    seen: list[list[Message]] = []

    def reply(messages: list[Message]) -> Iterator[str]:
        seen.append(messages)
        yield "answer "
        yield str(len(seen))

    messages, _ = talk(["one", "", "two"], reply, system="be brief")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert contents(messages) == ["be brief", "one", "answer 1", "two", "answer 2"]
    assert seen[1] == messages[:4]


def test_reset_forgets_all_but_the_system_message() -> None:
    messages, _ = talk(["one", "/reset", "two"], answers("x"), system="s")
    assert contents(messages) == ["s", "two", "x"]


def test_quit_leaves_at_once() -> None:
    messages, _ = talk(["/quit", "more"], answers("x"))
    assert messages == []


def test_help_and_unknown_commands_do_not_reach_the_model() -> None:
    messages, shown = talk(["/help", "/rest", "/etc/hosts is what?"], answers("x"))
    assert "/reset" in shown
    assert "/rest is not a command" in shown
    assert contents(messages) == ["/etc/hosts is what?", "x"]


def test_a_mistake_of_the_user_withdraws_the_question() -> None:
    def reply(messages: list[Message]) -> Iterator[str]:
        if messages[-1]["content"] == "long":
            raise UserError("the conversation is too long; say /reset")
        yield "fine"

    messages, shown = talk(["long", "short"], reply)
    assert "farthing: the conversation is too long" in shown
    assert contents(messages) == ["short", "fine"]
    with pytest.raises(UserError, match="too long"):
        talk(["long"], reply, terminal=False)


# ---- several lines ----


def test_a_backslash_at_the_end_goes_on_in_the_next_line() -> None:
    messages, shown = talk(["one\\", "two\\", "three", "four"], answers("x"))
    assert contents(messages) == ["one\ntwo\nthree", "x", "four", "x"]
    assert "> … … x" in shown
    assert contents(talk(["one\\"], answers("x"), terminal=False)[0]) == ["one", "x"]  # the input ends there


def test_lines_that_arrive_together_are_one_message() -> None:
    lines = iter([["def f():", "    return 1", "", "f()"], ["/quit"]])
    waiting: list[str] = []

    def read(prompt: str) -> str:
        if not waiting:
            waiting.extend(next(lines))
        return waiting.pop(0)

    messages = chat_loop(
        lambda messages: Answer(iter("x")), pasted(read, lambda: bool(waiting)), io.StringIO()
    )
    assert contents(messages) == ["def f():\n    return 1\n\nf()", "x"]


def test_a_paste_that_ends_the_input_is_answered() -> None:
    lines = iter(["one", "two"])

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    messages = chat_loop(lambda messages: Answer(iter("x")), pasted(read, lambda: True), io.StringIO())
    assert contents(messages) == ["one\ntwo", "x"]


# ---- commands with a text ----


def test_the_system_message_can_be_set_and_taken_away() -> None:
    seen: list[list[str]] = []

    def reply(messages: list[Message]) -> Iterator[str]:
        seen.append([message["role"] for message in messages])
        yield "x"

    messages, _ = talk(["one", "/system be\nbrief", "two", "/reset", "/system", "three"], reply)
    assert seen == [["user"], ["system", "user", "assistant", "user"], ["user"]]
    messages, _ = talk(["/system be\nbrief"], reply, system="before")
    assert messages == [{"role": "system", "content": "be\nbrief"}]


def test_save_writes_the_conversation_and_never_over_a_file(tmp_path: Path) -> None:
    reply = answers("<think>so\nso</think>yes")
    saved, page = tmp_path / "a talk.json", tmp_path / "talk.md"
    messages, shown = talk(
        ["q", f"/save {saved}", f"/save {saved}", f"/save {page}"], reply, system="s", source="runs/x"
    )
    assert json.loads(saved.read_text()) == {"source": "runs/x", "messages": messages}
    assert page.read_text() == (
        "# runs/x\n\n## system\n\ns\n\n## user\n\nq\n\n## assistant\n\n> so\n> so\n\nyes\n"
    )
    assert f"{saved} exists; give another name" in shown


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("/save", "/save needs a file"),
        ("/save talk.txt", "is saved as .json or .md"),
        ("/save nowhere/talk.md", "nowhere is no folder"),
        ("/save " + 300 * "x" + ".md", "name"),
        ("/save ~nobody-here/talk.md", "is no folder"),
        ("/model", "/model needs a source"),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why(command: str, said: str) -> None:
    messages, shown = talk([command, "q"], answers("x"))
    assert said in shown
    assert contents(messages) == ["q", "x"]


def test_another_model_goes_on_with_the_conversation(tmp_path: Path) -> None:
    def load(source: str) -> Callable[[list[Message]], Answer]:
        if source == "no":
            raise UserError("no such model")
        if source == "slow":
            raise KeyboardInterrupt
        return lambda messages: Answer(iter([f"{source} read {len(messages)}"]))

    lines = ["q", "/model no", "/model slow", "r", "/model other", "s", f"/save {tmp_path / 'a.json'}"]
    messages, shown = talk(lines, answers("first"), source="first", load=load)
    assert contents(messages) == ["q", "first", "r", "first", "s", "other read 5"]
    assert "farthing: no such model" in shown
    assert "now with other" in shown
    assert json.loads((tmp_path / "a.json").read_text())["source"] == "other"


def test_what_is_piped_in_writes_no_file_and_loads_no_model(tmp_path: Path) -> None:
    def load(source: str) -> Callable[[list[Message]], Answer]:
        raise AssertionError

    lines = [f"/save {tmp_path / 'a.json'}", "/model x", "/system y"]
    messages, _ = talk(lines, answers("x"), terminal=False, load=load)
    assert contents(messages)[::2] == lines
    assert list(tmp_path.iterdir()) == []


def test_an_answer_ends_with_its_report_and_begins_with_what_was_left_out() -> None:
    left_out = iter([0, 2, 2, 4])

    def reply(messages: list[Message]) -> Answer:
        return Answer(iter("x"), left_out=next(left_out), report=lambda: "9 tokens, $0.01")

    _, shown = talk(list("abcd"), reply)
    assert shown.count("9 tokens, $0.01") == 4
    assert shown.count("(without 2 old messages: the model's context is full)") == 1
    assert shown.count("(without 4 old messages") == 1
    left_out = iter([1])
    assert talk(["a"], reply, terminal=False)[1] == "x\n"


# ---- Ctrl-C ----


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said() -> None:
    closed: list[bool] = []

    def reply(messages: list[Message]) -> Iterator[str]:
        try:
            yield "half an"
            if len(messages) == 1:
                raise KeyboardInterrupt
            yield " answer"
        finally:
            closed.append(True)

    messages, shown = talk(["one", "two"], reply)
    assert contents(messages) == ["one", "half an", "two", "half an answer"]
    assert "(stopped)" in shown
    assert closed == [True, True]


def test_ctrl_c_before_an_answer_withdraws_the_question() -> None:
    def reply(messages: list[Message]) -> Answer:
        if messages[-1]["content"] == "one":
            raise KeyboardInterrupt
        return Answer(iter("x"))

    messages, shown = talk(["one", "two"], reply)
    assert contents(messages) == ["two", "x"]
    assert "stopped" in shown


def test_ctrl_c_while_thinking_closes_the_thought() -> None:
    def reply(messages: list[Message]) -> Iterator[str]:
        yield "<think>hm"
        raise KeyboardInterrupt

    messages, _ = talk(["one"], reply)
    assert messages[-1]["content"] == "<think>hm\n</think>\n"


def test_ctrl_c_twice_at_the_prompt_leaves_and_once_does_not() -> None:
    messages, shown = talk(
        [KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt, "two"], answers("x")
    )
    assert contents(messages) == ["one", "x"]
    assert "Ctrl-C again" in shown


def test_being_told_to_end_ends_everything() -> None:
    def reply(messages: list[Message]) -> Iterator[str]:
        yield "half"
        raise Terminated

    with pytest.raises(Terminated):
        talk(["one"], reply)
    with pytest.raises(Terminated):
        talk([Terminated], answers("x"))


def test_without_a_terminal_ctrl_c_ends_everything() -> None:
    with pytest.raises(KeyboardInterrupt):
        talk([KeyboardInterrupt], answers("x"), terminal=False)


# ---- thinking ----


def test_thinking_is_folded_into_a_count_of_words() -> None:
    _, shown = talk(["q"], answers("<th", "ink>\none tw", "o three ", "four</thi", "nk>\n\nThe", " answer"))
    assert "thinking… 2 words" in shown
    assert "thought for 4 words" in shown
    assert shown.endswith("thought for 4 words\x1b[22m\nThe answer\n> \n")
    assert "three" not in shown


def test_think_shows_the_thoughts_and_again_hides_them() -> None:
    reply = answers("<think>secret</think>open")
    _, shown = talk(["/think", "q"], reply)
    assert "\x1b[2msecret\x1b[22m\n\nopen\n" in shown
    _, shown = talk(["/think", "/think", "q"], reply)
    assert "secret" not in shown


def test_a_thought_that_the_template_opened_is_one(tmp_path: Path) -> None:
    messages, shown = talk(["q"], lambda messages: Answer(iter(["so it is</th", "ink>\n\n7"]), opened=True))
    assert "thought for 3 words" in shown
    assert "so it is" not in shown
    assert messages[-1]["content"] == "<think>\nso it is</think>\n\n7"

    def stopped() -> Iterator[str]:
        yield "so"
        raise KeyboardInterrupt

    messages, _ = talk(["q"], lambda messages: Answer(stopped(), opened=True))
    assert messages[-1]["content"] == "<think>\nso\n</think>\n"


def test_thinking_without_an_end_is_said_so() -> None:
    _, shown = talk(["q"], answers("<think>and on and on and"))
    assert "no answer" in shown
    assert "thought for 5 words" in shown


def test_without_a_terminal_only_answers_are_written() -> None:
    messages, shown = talk(
        ["q", "/reset", "/help", "r"], answers("<think>a b</think>\n\nyes"), terminal=False
    )
    assert shown == "yes\nyes\n"
    assert contents(messages) == ["r", "<think>a b</think>\n\nyes"]


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(text=st.text("ab \n", max_size=30), places=st.lists(st.integers(0, 30), max_size=5))
def test_words_are_counted_the_same_however_the_thought_is_cut(text: str, places: list[int]) -> None:
    _, shown = talk(["q"], answers("<think>x", *cut(text, places), "</think>"))
    count = len(("x" + text).split())
    assert f"thought for {count} word" in shown


# ---- what a model may not do to the terminal ----


def test_escapes_do_not_reach_the_terminal_but_stay_in_the_conversation() -> None:
    evil = "\x1b]52;c;cm0gLXJm\x07\x1b[2Jred\x9b31m\rover\u202egnirts\x00\tkept\n"
    messages, shown = talk(["q"], answers(*evil), terminal=False)
    assert shown == "]52;c;cm0gLXJm[2Jred31movergnirts\tkept\n\n"
    assert messages[-1]["content"] == evil


def test_what_an_error_quotes_does_not_reach_the_terminal_either() -> None:
    def reply(messages: list[Message]) -> Iterator[str]:
        raise UserError("the template says \x1b]0;owned\x07 and\nmore")
        yield ""

    _, shown = talk(["q"], reply)
    assert "farthing: the template says ]0;owned and more" in shown
    assert "\x1b]" not in shown


def test_a_first_word_that_takes_long_is_waited_for_in_a_line_that_vanishes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard = threading.Event()

    def hinted(self: Waiting) -> None:
        self._say(self.line(2.0))
        heard.set()

    monkeypatch.setattr(Waiting, "_watch", hinted)  # as if two seconds had passed

    def reply(messages: list[Message]) -> Iterator[str]:
        assert heard.wait(60)
        yield "yes"

    _, shown = talk(["q"], reply)
    assert "\r\x1b[K\x1b[2mreading the conversation …\x1b[22m\r\x1b[Kyes\n" in shown
    _, piped = talk(["q"], reply, terminal=False)
    assert piped == "yes\n"
