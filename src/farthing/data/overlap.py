"""Held-out questions found in text that is to be trained on, however they are wrapped.

A question counts as found when a text

    exact       is the question, but for what `words` drops and words of asking ("What is", "Calculate", "step by step")
    contained   holds all its words in a row; a sum that goes on ("12 + 30 + 5") is another question
    shared      has most of its runs of five words, and every number in it, within twice its length

Runs that several held-out questions have in common belong to their template and prove nothing. (GPT-3 looked for 13
words, arXiv:2005.14165, appendix C; a run of 8 is usual since. Both miss questions that are shorter or retold.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from farthing.base.terminal import one_line
from farthing.data.words import is_picture, question_key, spelling, split

How = Literal["exact", "contained", "shared"]
RUN = 5  # words
SHARED = 0.6  # of a question's words, in runs that only it has
SHARED_WORDS = 0.85  # the same for a question of fewer than two numbers, which could tell it from another
SHORTEST = 16  # words of a question that `shared` can find
NAMES = 0.6  # of them, words proper: grids and programs share runs by chance
_ALONE = 8  # words from which a question without names of things (a bare sum) is looked for inside a text
_LEFT = 3  # words that must be left of a question without its words of asking
_WINDOW = 2  # lengths of the question within which its runs lie
_AT_ONCE = 1 << 20  # characters of a text
_SHOWN = 60  # characters of a question
_CACHED = 1 << 17  # spellings remembered
_DROPPED, _OTHER, _OTHER_OPERAND, _OWN = -1, 0, 1, 2  # ids of words; from _OWN on those of the questions
_OPERATORS = "+-*/^%!<>"  # go on with a sum
_POSTFIX = "%!"
_MIX = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], dtype=np.uint64)
_ASKED = """
    a an the this that these of to is in on for by and with as it be following what whats how please kindly
    can could you your me my i we us let lets do does now then so give state tell show find out calculate
    compute evaluate work determine solve answer result value final problem question exercise task expression
    arithmetic q math mathematics think thinking step steps carefully reason reasoning through only just
    nothing else number put write return respond reply output provide inside within box boxed tag tags
"""
"""Words that ask for something without saying for what, where they begin or end a text."""
_ASKING = frozenset(_ASKED.split())


@dataclass(frozen=True)
class Found:
    """A held-out question in a text."""

    question: int
    """Its number, in the order in which questions were given."""
    text: str
    how: How
    share: float = 1.0
    """Of its words, found."""

    @property
    def sentence(self) -> str:
        """What there is to say of the text."""
        begins = one_line(self.text.translate(_PARENTHESES))
        begins = begins if len(begins) <= _SHOWN else f"{begins[:_SHOWN]}…"
        return f'{_SENTENCES[self.how]} ("{begins}")'


_SENTENCES = {
    "exact": "it is a held-out question",
    "contained": "it holds a held-out question",
    "shared": "it shares most of its words with a held-out question",
}
_PARENTHESES = str.maketrans("()", "[]")  # reasons are counted by what stands outside of parentheses


class HeldOut:
    """An index of questions; false if there are none."""

    def __init__(self, questions: Iterable[str] = ()) -> None:
        self.questions = list(questions)
        pictures = {number for number, question in enumerate(self.questions) if is_picture(question)}
        self._pictures = {question_key(self.questions[number]): number for number in pictures}
        keys = [
            [] if number in pictures else question_key(question).split()
            for number, question in enumerate(self.questions)
        ]
        spelt = sorted({*_ASKING, *_OPERATORS, "(", ")", "="}.union(*keys))
        self._ids = _Ids({word: number for number, word in enumerate(spelt, _OWN)})

        def flags(belongs: Callable[[str], bool]) -> np.ndarray:
            return np.array([False, False, *map(belongs, spelt)])

        self._asking = flags(_ASKING.__contains__)
        self._name = flags(lambda word: word.isalpha() and (len(word) > 1 or word in "ai"))
        self._number = flags(lambda word: word[0].isdecimal())
        self._signs = ~self._name
        self._signs[_OTHER] = False
        self._operand = flags(_is_operand)
        self._operand[_OTHER_OPERAND] = True
        self._operator = flags(_OPERATORS.__contains__)
        self._postfix = flags(_POSTFIX.__contains__)
        self._equals = self._ids["="]
        self._words = [np.array([self._ids.known[word] for word in key], dtype=np.int32) for key in keys]
        self._whole: dict[bytes, int] = {}
        for number, ids in enumerate(self._words):
            bare = self._without_asking(ids)
            for form in (ids, bare if len(bare) >= _LEFT else ids):
                self._whole.setdefault(form.tobytes(), number)
        self._index_runs()

    def __len__(self) -> int:
        return len(self.questions)

    def match(self, text: str) -> Found | None:
        """The question that a text holds most plainly, or None. Takes time linear in the text."""
        plain = ("shared", "contained", "exact")
        return max(self.matches(text), key=lambda one: (plain.index(one.how), one.share), default=None)

    def holds(self, text: str) -> bool:
        """Whether a text holds any of the questions."""
        return self.match(text) is not None

    def matches(self, text: str) -> list[Found]:
        """Every question found in a text, once."""
        found: dict[int, Found] = {}
        for piece in self._pieces(text) if self.questions else ():
            for one in self._in_piece(piece, whole=len(piece) == len(text)):
                if one.question not in found or found[one.question].share < one.share:
                    found[one.question] = one
        return list(found.values())

    def _pieces(self, text: str) -> Iterator[str]:
        """A text in pieces that overlap by more than a question, so that a book needs little memory."""
        if len(text) <= _AT_ONCE:
            yield text
            return
        overlap = 32 * _WINDOW * max(map(len, self._words))
        for start in range(0, len(text), _AT_ONCE):
            yield text[start : start + _AT_ONCE + overlap]

    def _in_piece(self, text: str, whole: bool) -> Iterator[Found]:
        ids = self._ids.of(text)
        if whole and (number := self._is_whole(text, ids)) is not None:
            yield self._found(number, "exact")
        shared: dict[int, list[tuple[int, int]]] = {}
        for at, row in self._hits(ids):
            for number, place in self._anchors.get(row, ()):
                if self._is_at(ids, at - place, number):
                    yield self._found(number, "contained")
            if (owner := int(self._owner[row])) >= 0:
                shared.setdefault(owner, []).append((at, int(self._place[row])))
        for number, places in shared.items():
            if (share := self._share(ids, number, places)) >= self._least[number]:
                yield self._found(number, "shared", share)

    def _found(self, number: int, how: How, share: float = 1.0) -> Found:
        return Found(number, self.questions[number], how, share)

    def _is_whole(self, text: str, ids: np.ndarray) -> int | None:
        """The question that a text is, words of asking aside."""
        if self._pictures and (number := self._pictures.get(question_key(text))) is not None:
            return number
        while len(ids) and ids[-1] == self._equals:
            ids = ids[:-1]
        number = self._whole.get(ids.tobytes()) if len(ids) else None
        if number is None and len(bare := self._without_asking(ids)) >= _LEFT:
            number = self._whole.get(bare.tobytes())
        return number

    def _without_asking(self, ids: np.ndarray) -> np.ndarray:
        """A question without the words of asking, and the signs of equality, that begin or end it."""
        kept = np.flatnonzero(~self._asking[ids] & (ids != self._equals))
        return ids[kept[0] : kept[-1] + 1] if len(kept) else ids[:0]

    def _is_at(self, ids: np.ndarray, start: int, number: int) -> bool:
        """Whether a question stands at `start`, and neither begins earlier nor goes on, as a sum may."""
        own = self._words[number]
        end = start + len(own)
        if start < 0 or not np.array_equal(ids[start:end], own):
            return False
        if self._operand[own[0]] and start and self._operator[ids[start - 1]]:
            return False
        if not self._operand[own[-1]] or end == len(ids):
            return True
        if self._operand[ids[end]] and self._operand[own[-2]]:
            return False  # a list or a table of numbers
        if not self._operator[ids[end]]:
            return True
        goes_on = self._postfix[ids[end]] or (end + 1 < len(ids) and self._operand[ids[end + 1]])
        return not goes_on

    # ------------------------------------------------------------ runs of words

    def _index_runs(self) -> None:
        """Make the table of runs: those that one question alone has, and one run of each to look for it by."""
        runs = [runs_of(ids, RUN) for ids in self._words]
        distinct, times = np.unique(
            np.concatenate([np.empty(0, np.uint64), *map(np.unique, runs)]), return_counts=True
        )
        self._anchors: dict[int, list[tuple[int, int]]] = {}
        self._owner = np.full(len(distinct), -1, dtype=np.int32)
        self._place = np.zeros(len(distinct), dtype=np.int32)
        self._distinctive: list[np.ndarray] = []  # of each question's words, those in runs that it alone has
        self._least = [SHARED if self._number[ids].sum() > 1 else SHARED_WORDS for ids in self._words]
        for number, (ids, own) in enumerate(zip(self._words, runs, strict=True)):
            rows = np.searchsorted(distinct, own)
            alone = times[rows] == 1
            self._distinctive.append(_marked(alone, len(ids)))
            if len(own) and (len(ids) >= _ALONE or self._name[ids].any()):
                place = int(times[rows].argmin())
                self._anchors.setdefault(int(rows[place]), []).append((number, place))
            if len(ids) >= SHORTEST and self._name[ids].mean() >= NAMES:
                self._owner[rows[alone]] = number
                self._place[rows[alone]] = np.flatnonzero(alone)
        self._distinct = distinct
        self._bits = max(16, int(8 * len(distinct)).bit_length())
        self._maybe = np.zeros(
            1 << self._bits, dtype=bool
        )  # most runs of a text are told apart by this alone
        self._maybe[distinct >> np.uint64(64 - self._bits)] = True

    def _hits(self, ids: np.ndarray) -> Iterator[tuple[int, int]]:
        """(place in the text, row of the table) of each run of a text that is in the table."""
        if len(ids) < RUN or not len(self._distinct):
            return
        runs = runs_of(ids, RUN)
        places = np.flatnonzero(self._maybe[runs >> np.uint64(64 - self._bits)])
        rows = np.searchsorted(self._distinct, runs[places])
        there = self._distinct[np.minimum(rows, len(self._distinct) - 1)] == runs[places]
        yield from zip(places[there].tolist(), rows[there].tolist(), strict=True)

    def _share(self, ids: np.ndarray, number: int, places: list[tuple[int, int]]) -> float:
        """The share of a question's distinctive words in the runs found, the most in any window of the text; 0 where
        one of its numbers, signs or single letters is in no run there."""
        own, total = self._words[number], int(self._distinctive[number].sum())
        if RUN * len({place for _, place in places}) < self._least[number] * total:
            return 0.0
        covered = [0] * len(own)
        inside = best = end = first = 0
        for at, place in places:
            for word in range(place, place + RUN):
                inside += not covered[word]
                covered[word] += 1
            while places[first][0] < at - _WINDOW * len(own):
                for word in range(places[first][1], places[first][1] + RUN):
                    covered[word] -= 1
                    inside -= not covered[word]
                first += 1
            if inside > best:
                best, end = inside, at + 2 * RUN
        window = ids[max(0, end - _WINDOW * len(own) - 3 * RUN) : end]
        return best / total if self._numbers_agree(own, window) else 0.0

    def _numbers_agree(self, own: np.ndarray, window: np.ndarray) -> bool:
        """Whether the numbers, signs and single letters of a question stand in the text as they do in it: each row of
        them whole, neither begun earlier nor going on, and beside the same words (two, on either side)."""
        signs = np.concatenate([[False], ~self._name[own], [False]])
        edges = np.flatnonzero(signs[1:] != signs[:-1]).reshape(-1, 2).tolist()
        question, text, in_text = own.tolist(), window.tolist(), self._signs[window].tolist()

        def agrees(begin: int, end: int, start: int) -> bool:
            stop = start + end - begin
            if text[start:stop] != question[begin:end]:
                return False
            if (start and in_text[start - 1]) or (stop < len(text) and in_text[stop]):
                return False
            before = [_at(text, start - side) == _at(question, begin - side) for side in (1, 2)]
            after = [_at(text, stop + side) == _at(question, end + side) for side in (0, 1)]
            return all(before) or all(after) or (before[0] and after[0])

        return all(
            any(agrees(begin, end, start) for start, word in enumerate(text) if word == question[begin])
            for begin, end in edges
        )


class _Ids(dict[str, int]):
    """Ids of words as they are written, each looked up by its one spelling the first time."""

    def __init__(self, known: dict[str, int]) -> None:
        super().__init__()
        self.known = known

    def __missing__(self, word: str) -> int:
        spelt = spelling(word)
        found = _DROPPED
        if spelt is not None:
            found = self.known.get(spelt, _OTHER_OPERAND if _is_operand(spelt) else _OTHER)
        if len(self) >= _CACHED:
            self.clear()
        self[word] = found
        return found

    def of(self, text: str) -> np.ndarray:
        """Ids of a text's words: int32 [N]."""
        written = split(text)
        ids = np.fromiter(map(self.__getitem__, written), dtype=np.int32, count=len(written))
        return ids[ids != _DROPPED]


def _is_operand(word: str) -> bool:
    return word[0].isdecimal() or word in "()-" or (len(word) == 1 and word.isalpha())


def _at(words: list[int], place: int) -> int | None:
    return words[place] if 0 <= place < len(words) else None


def runs_of(ids: np.ndarray, words: int) -> np.ndarray:
    """A hash for each run of so many words: int [N] -> uint64 [N - words + 1], empty for fewer."""
    size = max(0, len(ids) - words + 1)
    runs = np.zeros(size, dtype=np.uint64)
    for shift in range(words):
        runs = runs * _MIX[0] + ids[shift : shift + size].astype(np.uint64) + _MIX[1]
        runs ^= runs >> np.uint64(29)
    return runs * _MIX[1]


def _marked(runs: np.ndarray, size: int) -> np.ndarray:
    """Words in any of the marked runs: bool [N - RUN + 1] -> bool [N]."""
    marked = np.zeros(size, dtype=bool)
    for shift in range(RUN):
        marked[shift : shift + len(runs)] |= runs
    return marked
