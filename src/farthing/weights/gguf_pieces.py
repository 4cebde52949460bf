"""A SentencePiece vocabulary (Llama 2, Mistral, Gemma) as the keys of a .gguf.

llama.cpp joins the two neighbours whose union scores highest, tokenizer.json the pair that stands first in its list.
The list is written as scores, and read back; what would not be the same list is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.weights.gguf_tokenizer import BYTE, UNKNOWN, byte_tokens, may_meet, merges, put_spaces

EDGES = (
    "differs: llama.cpp puts the space of a first word also before a text that begins with one and behind every "
    "special token, as SentencePiece and Llama 2 do; this tokenizer does not"
)


def piece_keys(
    folder: Path, data: dict[str, Any], vocabulary: dict[str, int]
) -> tuple[dict[int, float], bool, list[str]]:
    """Score of the tokens that merges make, by their id, whether a text gets a space in front, and what differs.

    Args:
        data: tokenizer.json.
        vocabulary: token -> id, added tokens included.

    Raises:
        UserError: for merges that follow from no scores, or steps around them that llama.cpp does not take.
    """
    model, added = data["model"], data["added_tokens"]
    if model.get("ignore_merges"):
        raise _refused(folder, "words that are taken whole")
    if missing := next((token for token in byte_tokens() if token not in vocabulary), None):
        raise _refused(folder, f"no token {missing}")
    prefix, notes = _prefix(folder, data)
    bytes_ = set(byte_tokens())
    for token in added:
        content = token["content"]
        if content in bytes_:
            raise _refused(folder, f"the token of a byte, {content!r}, as one that may stand in a text")
        if token.get("normalized") and (prefix or " " in content or may_meet(content)):
            raise _refused(folder, f"the token {content!r}, which is looked for in normalised text")
    return _scores(folder, model, vocabulary, added), prefix, notes


def piece_types(vocabulary: dict[str, int], special: dict[str, bool], unknown: str | None) -> dict[int, int]:
    """Id -> type of the tokens that stand for bytes, and of the unknown one if it is an added token too."""
    types = {vocabulary[token]: BYTE for token in byte_tokens()}
    return types | ({vocabulary[unknown]: UNKNOWN} if unknown is not None and special.get(unknown) else {})


def _prefix(folder: Path, data: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a text gets a space in front, from the steps around the merges, and what differs in llama.cpp."""
    steps = {key: data.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    if _is_nothing(steps["pre_tokenizer"]):
        steps["pre_tokenizer"] = None
    for prefix in (True, False):
        expected = _around(prefix)
        if _bare(steps["decoder"]) != _bare(expected["decoder"]):
            continue
        if _bare(steps["normalizer"]) == _bare(expected["normalizer"]) and steps["pre_tokenizer"] is None:
            return prefix, []
        scheme = _metaspace(steps["pre_tokenizer"])
        if steps["normalizer"] is None and scheme in (("first", "always") if prefix else ("never",)):
            return prefix, [EDGES] if prefix else []
    raise _refused(
        folder,
        f"a normalizer ({_named(steps['normalizer'])}), pre-tokenizer ({_named(steps['pre_tokenizer'])}) and decoder "
        f"({_named(steps['decoder'])}) other than Llama 2's, Mistral's or Gemma's",
    )


def _around(prefix: bool) -> dict[str, Any]:
    """Normalizer and decoder as our importer writes them."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE())
    put_spaces(tokenizer, prefix)
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def _metaspace(step: Any) -> str | None:
    """Where a Metaspace that cuts nothing puts its space: first, always or never; None for another step."""
    step = _bare(step)
    if not isinstance(step, dict) or step.get("type") != "Metaspace" or step.get("replacement") != "▁":
        return None
    return step.get("prepend_scheme") if step.get("split") is False else None


def _is_nothing(step: Any) -> bool:
    """Whether a pre-tokenizer cuts at spaces, of which the normalizer has left none (Gemma)."""
    return isinstance(step, dict) and step.get("type") == "Split" and step.get("pattern") == {"String": " "}


def _bare(step: Any) -> Any:
    """A step without sequences of sequences, or of one."""
    if isinstance(step, dict) and step.get("type") == "Sequence":
        inside = step.get("normalizers") or step.get("decoders") or step.get("pretokenizers") or []
        flat = [one for part in inside for one in _flat(_bare(part))]
        return flat[0] if len(flat) == 1 else {"type": "Sequence", "steps": flat}
    return step


def _flat(step: Any) -> list[Any]:
    return step["steps"] if isinstance(step, dict) and "steps" in step else [step]


def _named(step: Any) -> str:
    names = [
        one.get("type") if isinstance(one, dict) else one for one in _flat(_bare(step)) if one is not None
    ]
    return ", ".join(map(str, names)) or "none"


def _scores(
    folder: Path, model: dict[str, Any], vocabulary: dict[str, int], added: list[dict[str, Any]]
) -> dict[int, float]:
    """Id -> score: tokens score lower the later the list makes them."""
    whole = {token["content"] for token in added}
    met = {token: number for token, number in vocabulary.items() if token not in whole or may_meet(token)}
    listed = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in model["merges"]]
    listed = [(left, right) for left, right in listed if {left, right, left + right} <= met.keys()]
    rank: dict[str, int] = {}
    order = [rank.setdefault(left + right, len(rank)) for left, right in listed]
    scores = {vocabulary[token]: -1.0 - number for token, number in rank.items()}
    implied = merges(met, [scores.get(number, 0.0) for number in range(max(vocabulary.values()) + 1)])
    if order != sorted(order) or sorted(implied) != sorted(listed):
        raise _refused(folder, "merges that do not follow from a score of each token")
    return scores


def _refused(folder: Path, what: str) -> UserError:
    return UserError(
        f"the tokenizer of {folder} is of SentencePiece's kind with {what}, which a .gguf cannot say; use another "
        "format, or a tokenizer without that"
    )
