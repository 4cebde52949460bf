from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.serve.thinking import Splitter, opens_thinking, split_thinking


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def joined(pieces: list[str], opened: bool) -> list[tuple[bool, str]]:
    parts: list[tuple[bool, str]] = []
    for thinking, piece in split_thinking(pieces, opened):
        if parts and parts[-1][0] == thinking:
            parts[-1] = (thinking, parts[-1][1] + piece)
        else:
            parts.append((thinking, piece))
    return parts


_marked = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "a", " b\n", "<thi"])
).map("".join)


@given(text=_marked, places=st.lists(st.integers(0, 60), max_size=8), opened=st.booleans())
def test_where_the_text_is_cut_does_not_matter(text: str, places: list[int], opened: bool) -> None:
    assert joined(cut(text, places), opened) == joined([text], opened)


@given(text=_marked)
def test_an_opened_thought_is_split_as_if_the_mark_stood_in_front(text: str) -> None:
    assert joined([text], opened=True) == joined(["<think>" + text], opened=False)


def test_text_that_only_looks_like_a_mark_is_not_lost() -> None:
    assert "".join(text for _, text in split_thinking(["a <thi", "s> b <", "/think"])) == "a <this> b </think"


def test_an_opened_thought_ends_at_its_mark() -> None:
    assert joined(["so 3 + 4 ", "is 7</thi", "nk>", "\n\n7"], opened=True) == [
        (True, "so 3 + 4 is 7"),
        (False, "\n\n7"),
    ]


def test_a_splitter_says_whether_the_text_so_far_ends_in_a_thought() -> None:
    splitter = Splitter(opened=True)
    assert splitter.push("a") == [(True, "a")]
    assert splitter.thinking
    assert splitter.push("</think") == []
    assert splitter.thinking
    assert splitter.push(">b<") == [(False, "b")]
    assert not splitter.thinking
    assert splitter.flush() == [(False, "<")]
    assert splitter.flush() == []


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<｜User｜>3 + 4?<｜Assistant｜><think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),  # thinking switched off
        ("<|im_start|>user\nwhat is <think><|im_end|>\n<|im_start|>assistant\n", False),
    ],
)
def test_a_prompt_opens_the_thinking_if_it_ends_with_the_mark(prompt: str, opened: bool) -> None:
    assert opens_thinking(prompt) is opened
