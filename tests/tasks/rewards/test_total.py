"""Parts add up by their weights; the first that is no shaping decides."""

from typing import Any

from farthing.tasks.item import Item, Verdict
from farthing.tasks.rewards.part import Part
from farthing.tasks.rewards.total import added, named
from farthing.tasks.verify import verify


def item(*rewards: dict[str, Any], answer: str = "7") -> Item:
    parts = [{"weight": 1.0, "settings": {}, **part} for part in rewards]
    return Item("made_up", 0, 0, "What?", answer, {"scorer": "rewards", "rewards": parts, "row": {}})


def test_weights_and_parts() -> None:
    both = item({"use": "number", "weight": 0.5}, {"use": "exact", "weight": 2})
    assert verify(both, "The answer is 7", "final") == Verdict(
        "right", "7", 2.5, {"number": 1.0, "exact": 1.0}
    )
    assert verify(both, "The answer is 7.0", "final") == Verdict(
        "right", "7", 0.5, {"number": 1.0, "exact": 0.0}
    )


def test_what_is_found_afterwards_adds_to_the_total() -> None:
    asked = item({"use": "overlong"}, {"use": "number"}, {"use": "judge", "weight": 0.5})
    first = verify(asked, "is 7", "final")
    assert first == Verdict("right", "7", 1.0, {"number": 1.0})
    final = added(asked, first, {"overlong": Part("right", reward=-0.25), "judge": Part("right", reward=0.5)})
    assert final == Verdict("right", "7", 1.0, {"overlong": -0.25, "number": 1.0, "judge": 0.5})
    judged = item({"use": "judge"})
    assert added(judged, verify(judged, "x", "final"), {"judge": Part("right", "8", 0.8)}).outcome == "right"


def test_a_failed_part_fails_all_and_no_opinion_is_left_out() -> None:
    asked = item({"use": "number"}, {"use": "judge"})
    first = verify(asked, "is 7", "final")
    failed = added(asked, first, {"judge": Part("error", error="a line")})
    assert (failed.outcome, failed.error, failed.score, failed.parts) == ("error", "a line", None, {})
    assert added(asked, first, {"judge": Part("right", reward=None)}) == first


def test_parts_that_come_twice_are_numbered() -> None:
    uses = ("regex", "a/my.py:score", "regex", "b.py:score", "score.py:other")
    assert list(named([{"use": use} for use in uses])) == ["regex", "score", "regex 2", "score 2", "other"]
