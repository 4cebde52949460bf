"""`NearCopies`: documents that equal one of an index, or nearly."""

from __future__ import annotations

from random import Random

import pytest

from farthing.data.copies import NearCopies

RANDOM = Random(0)
WORDS = ["".join(RANDOM.choices("abcdefghij", k=6)) for _ in range(3000)]


def document(words: int, seed: int) -> str:
    return " ".join(Random(seed).choices(WORDS, k=words))


@pytest.fixture(params=[200, 4000], ids=["short", "long"])
def text(request: pytest.FixtureRequest) -> str:
    return document(request.param, 1)


def test_nothing_is_a_copy_of_nothing(text: str) -> None:
    assert not NearCopies()
    assert not NearCopies().holds(text)


def test_copies_in_another_spelling_parts_and_wholes(text: str) -> None:
    copies = NearCopies([document(900, 2), text])
    words = text.split()
    assert copies.holds(text)
    assert copies.holds(text.upper().replace(" ", "\n"))
    assert copies.holds(" ".join(words[: len(words) * 2 // 3]))
    assert copies.holds(f"{document(50, 3)} {text} {document(50, 4)}")
    changed = [word if place % 40 else "other" for place, word in enumerate(words)]
    assert copies.holds(" ".join(changed))


def test_other_documents_and_short_quotations_are_no_copies(text: str) -> None:
    copies = NearCopies([document(900, 2), text])
    assert not copies.holds(document(200, 5))
    assert not copies.holds(" ".join(sorted(text.split())))
    assert not copies.holds(f"{document(150, 6)} {' '.join(text.split()[:40])} {document(150, 7)}")
    assert not copies.holds("")


def test_what_documents_have_in_common_does_not_count() -> None:
    licence = document(300, 8)
    copies = NearCopies([f"{licence} {document(60, 9)}", f"{licence} {document(60, 10)}"])
    assert copies.holds(f"{licence} {document(60, 9)}")
    assert not copies.holds(f"{licence} {document(60, 11)}")


def test_a_document_of_a_few_words_is_compared_as_a_whole() -> None:
    copies = NearCopies(["Hello, world!"])
    assert copies.holds("hello world")
    assert not copies.holds("hello world again")
