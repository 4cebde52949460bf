"""IFEval's verifiable instructions (arXiv:2311.07911, table 1), each a check of an answer's text.

Covered are 24 of the 25: all but the language of the answer, which takes a model to tell. Written from the paper's
descriptions and the data's own arguments. What counts as a sentence is decided by its closing mark here, and by nltk's
trained splitter in the paper's code, so a count at its very limit may be judged otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]

_END = re.compile(r"(?<![.!?])[.!?]++[\"'”’)\]]*+(?=\s|$)")  # of a sentence
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|[A-Z])\.|(?<=\d)\.(?=\d)")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def follows(answer: str, instruction: str, arguments: Arguments) -> bool:
    """Whether an answer follows an instruction. An empty one follows none."""
    return bool(answer.strip()) and CHECKS[instruction](answer, arguments)


def _amount(count: int, relation: Any, wanted: Any) -> bool:
    return count < int(wanted) if relation == "less than" else count >= int(wanted)


def _has(answer: str, word: str) -> bool:
    return re.search(re.escape(word), answer, flags=re.IGNORECASE) is not None


def _keyword_frequency(answer: str, given: Arguments) -> bool:
    count = len(re.findall(re.escape(str(given["keyword"])), answer, flags=re.IGNORECASE))
    return _amount(count, given["relation"], given["frequency"])


def _forbidden(answer: str, given: Arguments) -> bool:
    return not any(
        re.search(rf"\b{re.escape(word)}\b", answer, flags=re.IGNORECASE) for word in given["forbidden_words"]
    )


def _letter_frequency(answer: str, given: Arguments) -> bool:
    count = answer.lower().count(str(given["letter"]).lower())
    return _amount(count, given["let_relation"], given["let_frequency"])


def sentences(text: str) -> int:
    """How many sentences a text has."""
    plain = _ABBREVIATION.sub(lambda found: found[0].replace(".", ""), text)
    return sum(any(map(str.isalnum, part)) for part in _END.split(plain))


def _paragraphs(answer: str, given: Arguments) -> bool:
    """Paragraphs stand between dividers of three stars; an empty one may only be the first or the last."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == int(given["num_paragraphs"])


def _first_word(answer: str, given: Arguments) -> bool:
    """Paragraphs are separated by an empty line; the word at the head of one is given."""
    parts = [part.strip() for part in re.split(r"\n\n", answer) if part.strip()]
    place = int(given["nth_paragraph"])
    if len(parts) != int(given["num_paragraphs"]) or not 1 <= place <= len(parts):
        return False
    word = re.split(r"[.,?!'\"]", parts[place - 1].split()[0].lstrip("'\""))[0]
    return word.lower() == str(given["first_word"]).lower()


def _postscript(answer: str, given: Arguments) -> bool:
    letters = [letter for letter in str(given["postscript_marker"]) if letter.isalnum()]
    return (
        re.search(r"\s*".join(rf"{re.escape(one)}\.?" for one in letters), answer, flags=re.IGNORECASE)
        is not None
    )


def _bullets(answer: str, given: Arguments) -> bool:
    count = len(re.findall(r"^\s*(?:\*[^*\n]|-)[^\n]*$", answer, flags=re.M))
    return count == int(given["num_bullets"])


def _highlights(answer: str, given: Arguments) -> bool:
    double = re.findall(r"\*\*([^\n*]+)\*\*", answer)
    single = re.findall(r"(?<!\*)\*([^\n*]+)\*(?!\*)", answer)
    return sum(bool(part.strip()) for part in double + single) >= int(given["num_highlights"])


def _sections(answer: str, given: Arguments) -> bool:
    marker = re.escape(str(given["section_spliter"]))
    return len(re.findall(rf"\s?{marker}\s?\d+\s?", answer)) >= int(given["num_sections"])


def _json(answer: str, given: Arguments) -> bool:
    fenced = re.fullmatch(r"\s*```(?:json|JSON|Json)?\s*(.*?)```\s*", answer, flags=re.S)
    try:
        json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(answer: str, given: Arguments) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    inner = [part for place, part in enumerate(parts) if part or 0 < place < len(parts) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def _repeats(answer: str, given: Arguments) -> bool:
    return answer.strip().lower().startswith(str(given["prompt_to_repeat"]).strip().lower())


def _ends(answer: str, given: Arguments) -> bool:
    said = answer.strip().strip('"').lower()
    return said.endswith(str(given["end_phrase"]).strip().lower())


def _quoted(answer: str, given: Arguments) -> bool:
    said = answer.strip()
    return len(said) > 1 and said[0] == said[-1] == '"'


def _capital_words(answer: str, given: Arguments) -> bool:
    count = sum(word.isupper() for word in re.findall(r"\w[\w'-]*", answer))
    wanted = int(given["capital_frequency"])
    return count < wanted if given["capital_relation"] == "less than" else count >= wanted


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda answer, given: all(_has(answer, word) for word in given["keywords"]),
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:number_sentences": lambda answer, given: _amount(
        sentences(answer), given["relation"], given["num_sentences"]
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda answer, given: _amount(
        len(re.findall(r"\w+", answer)), given["relation"], given["num_words"]
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda answer, given: (
        len(re.findall(r"\[[^\[\]]*\]", answer)) >= int(given["num_placeholders"])
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda answer, given: any(said in answer for said in _ANSWERS),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": lambda answer, given: any(
        title.strip() for title in re.findall(r"<<([^\n<>]+)>>", answer)
    ),
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda answer, given: answer.isupper(),
    "change_case:english_lowercase": lambda answer, given: answer.islower(),
    "punctuation:no_comma": lambda answer, given: "," not in answer,
}


def unchecked(row: Mapping[str, Any]) -> str | None:
    """Why a row's instructions cannot be checked; None if they can be."""
    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if (
        not isinstance(names, list)
        or not isinstance(arguments, list)
        or len(names) != len(arguments)
        or not names
    ):
        return "its instruction_id_list and kwargs are no lists of the same length"
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        return f"nobody here checks {unknown[0]}"
    try:
        for name, given in zip(names, arguments, strict=True):
            CHECKS[name]("a", given)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"the arguments of its instructions are not what they take ({type(error).__name__}: {error})"
    return None
