"""What earlier attempts at a run have recorded, read by a later one: whole, or refused with what to do.

A person may have edited these files, and a disk damaged them. What can be made again says so; what nothing else tells
must be put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.files import read_json, read_lines
from farthing.base.schema import given
from farthing.base.seal import changed, intact
from farthing.runs.folder import put_back
from farthing.tasks.item import OUTCOMES

Record = dict[str, Any]


def earlier(path: Path, folder: Path) -> Record:
    """run.json of an earlier attempt.

    Raises:
        UserError: if it is damaged in what a later attempt goes on from.
    """
    found = read_json(path, put_back(folder))
    if found.get("dtype", "bfloat16") not in ("bfloat16", "float32"):
        raise UserError(
            f"{path}: its dtype is {given(found['dtype'])}, no dtype of a run; {put_back(folder)}"
        )
    if not _is_count(found.get("attempts", 0)):
        raise UserError(f"{path}: its attempts are {given(found['attempts'])}; {put_back(folder)}")
    return found


def changed_since_done(stage: Path, origin: str) -> Path | None:
    """A file of a finished stage that has changed since it was written, done.json or one of its model; None if none.

    Args:
        origin: of the run, which a stage of another run does not have.
    """
    path = stage / "done.json"
    try:
        done = read_json(path)
    except UserError:
        return path
    hashes = done.get("sha256", {})  # 0.1.0 wrote none
    if not intact(done) or not isinstance(hashes, dict) or done.get("origin", origin) != origin:
        return path
    return changed(stage / "model", hashes)


def recorded(path: Path, folder: Path) -> Record:
    """lineage.json of an earlier attempt.

    Raises:
        UserError: if it is damaged in what a later attempt is compared with.
    """
    found = read_json(path, put_back(folder))
    base, data = found.get("base", ...), found.get("data")
    whole = base is None or (isinstance(base, dict) and isinstance(base.get("sha256"), dict))
    judges = _all_have(found.get("judges", []), source=str, sha256=dict)
    if not whole or not _all_have(data, source=str) or not judges:
        raise UserError(
            f"{path} is damaged: its base, data or judges is not what a run records; {put_back(folder)}"
        )
    return found


def audited(path: Path) -> Record:
    """audit.json.

    Raises:
        UserError: if a case of it is damaged.
    """
    remedy = "delete it to have the audit done again"
    found = read_json(path, remedy)
    if not _all_have(found.get("cases"), case=str, passed=bool):
        raise UserError(f"{path} is damaged: its cases are not what an audit records; {remedy}")
    return found


def records(path: Path) -> list[Record]:
    """The answers of an evaluation, one a line; none if there was none.

    Raises:
        UserError: that names the first damaged line.
    """
    remedy = "put the file back as it was, or delete it to go on without it"
    found = read_lines(path, remedy)
    for number, answer in enumerate(found, 1):
        whole = _all_have([answer], task=str, question=str, outcome=str) and _is_count(answer.get("tokens"))
        if not whole or answer["outcome"] not in OUTCOMES:
            raise UserError(f"{path} line {number} is not an answer of an evaluation; {remedy}")
    return found


def paired(folder: Path, rounds: Mapping[str, Sequence[Record]]) -> tuple[Sequence[Record], Sequence[Record]]:
    """The answers before and after.

    Raises:
        UserError: if they are not to the same questions.
    """
    before, after = rounds["before"], rounds["after"]
    if [answer["question"] for answer in before] != [answer["question"] for answer in after]:
        raise UserError(
            f"{folder / 'evaluations'}: before.jsonl and after.jsonl do not answer the same questions; put them back "
            "as they were, or delete before.jsonl to go on without it"
        )
    return before, after


def _all_have(value: Any, **types: type) -> bool:
    """Whether it is a list of objects that each have these keys with values of these types."""
    return isinstance(value, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in types.items())
        for entry in value
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9
