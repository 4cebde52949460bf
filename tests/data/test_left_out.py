import json
from pathlib import Path

import pytest

from farthing.data.left_out import LeftOut, reason


def heard(path: Path, sentences: list[str], **options: bool) -> list[str]:
    said: list[str] = []
    with LeftOut(path, said.append, **options) as left_out:
        for sentence in sentences:
            left_out(sentence)
    return said


def test_up_to_three_are_said_as_they_are(tmp_path: Path) -> None:
    rows = [f"a.jsonl:{n}: the document is empty; left out" for n in range(3)]
    assert heard(tmp_path / "data" / "left-out.txt", rows) == rows
    assert heard(tmp_path / "data" / "left-out.txt", []) == []
    assert json.loads((tmp_path / "data" / "left-out.json").read_text()) == {"the document is empty": 3}
    assert [left.name for left in (tmp_path / "data").iterdir()] == ["left-out.json"]


def test_many_are_counted_with_three_of_them_and_the_rest_in_a_file(tmp_path: Path) -> None:
    rows = [f"a.jsonl:{n}: {n:,} tokens are more than a row's 128; left out" for n in range(129, 7129)]
    rows += [f"b.jsonl:{n}: the line is not JSON (character {n}); left out" for n in range(473)]
    path = tmp_path / "data" / "left-out.txt"
    said = heard(path, rows)
    assert said == [
        "7,473 rows left out (7,000: N tokens are more than a row's N; 473: the line is not JSON); "
        f"all are listed in {path}",
        "  a.jsonl:129: 129 tokens are more than a row's 128; left out",
        "  a.jsonl:130: 130 tokens are more than a row's 128; left out",
        "  a.jsonl:131: 131 tokens are more than a row's 128; left out",
    ]
    assert path.read_text().splitlines() == rows
    assert sorted(left.name for left in path.parent.iterdir()) == ["left-out.json", "left-out.txt"]
    counted = {"N tokens are more than a row's N": 7000, "the line is not JSON": 473}
    assert json.loads(path.with_suffix(".json").read_text()) == counted


def test_a_flood_of_notes_is_a_count_too(tmp_path: Path) -> None:
    notes = [f"{n}.txt:1: has line ends other than \\n; in this file they are read as \\n" for n in range(50)]
    said = heard(tmp_path / "left-out.txt", notes)
    assert said[0] == f"50 notes on the data; all are listed in {tmp_path / 'left-out.txt'}"
    assert len(said) == 4


def test_reasons_beyond_four_are_a_number(tmp_path: Path) -> None:
    rows = [f"a.jsonl:{n}: {'x' * (n % 9)}; left out" for n in range(90)]
    assert "; 50 for other reasons)" in heard(tmp_path / "left-out.txt", rows)[0]


def test_an_error_is_told_what_led_to_it_and_a_pass_before_another_says_nothing(tmp_path: Path) -> None:
    row = "a.jsonl:1: the document is empty; left out"
    path = tmp_path / "left-out.txt"
    assert heard(path, [row] * 9, only_after_errors=True) == []
    said: list[str] = []
    left_out = LeftOut(path, said.append, only_after_errors=True)
    left_out(row)
    with pytest.raises(ZeroDivisionError), left_out:
        raise ZeroDivisionError
    assert said == [row]


def test_a_row_used_several_times_is_one(tmp_path: Path) -> None:
    row = "a.jsonl:1: the document is empty; left out"
    assert heard(tmp_path / "left-out.txt", [row] * 9) == [row]


@pytest.mark.parametrize(
    ("sentence", "common"),
    [
        ("a.jsonl:3: the row has no 'messages' (it has 'a', 'b'); left out", "the row has no 'messages'"),
        ("a.jsonl:3: message 2 is by 'tool'; left out", "message N is by 'tool'"),
        ("of no place; left out", "of no place"),
    ],
)  # fmt: skip
def test_what_sentences_have_in_common(sentence: str, common: str) -> None:
    assert reason(sentence) == common
