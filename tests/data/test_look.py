"""What a source holds is counted once, row by row, and shown as it would be learnt."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from farthing.base.errors import UserError
from farthing.data.look import look

PAIR = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]
ROWS = [
    {"messages": PAIR},
    {"instruction": "Sky?", "output": "Blue."},
    {"prompt": "Sky?"},
    {"prompt": "Sea?"},
    {"messages": [PAIR[0], PAIR[1] | {"content": "Blue.<|im_end|>"}]},
    {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."},
    {"messages": [PAIR[0], PAIR[1] | {"content": "Blue. " * 50}]},
]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "oops\n")
    return str(path)


def test_every_row_is_usable_or_left_out_for_a_reason(
    source: str, chat: SimpleNamespace, tmp_path: Path
) -> None:
    looked = look(source, chat.tokenizer(tmp_path / "model", "chatml"), length=100)
    assert looked.rows == len(ROWS) + 1
    assert looked.found.shapes == {"messages": 3, "alpaca": 1, "prompt-only": 2, "preference": 1}
    assert sorted(looked.left_out.values()) == [1, 1, 2]
    assert any(why.startswith("message N holds a control token") for why in looked.left_out)
    assert len(looked.lengths) == 4
    assert looked.over == 1
    [text] = looked.shown[0].texts
    assert text == [
        ("<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Blue.<|im_end|>", True),
    ]
    assert [row.place for row in looked.shown] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:6"]
    found = looked.data()
    assert json.loads(json.dumps(found)) == found
    assert found["not_used"] == {"the column 'rejected' is not learnt from; 'chosen' is": 1}


def test_without_a_model_turns_are_written_out(source: str) -> None:
    looked = look(source, None, rows=1)
    assert looked.rows == 1
    assert looked.unit == "characters"
    assert "".join(part for part, _ in looked.shown[0].texts[0]) == "user: Sky?\nassistant: Blue.\n"
    assert [part for part, on in looked.shown[0].texts[0] if on] == ["Blue."]


def test_text_and_questions_are_looked_at_too(chat: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = chat.tokenizer(tmp_path / "model", "ours")
    (tmp_path / "a.txt").write_text("The sky is blue.")
    looked = look(str(tmp_path / "a.txt"), tokenizer)
    assert looked.found.shapes == {"text": 1}
    end = tokenizer.token_text(tokenizer.eos_id)
    assert looked.shown[0].texts == [[("The sky is blue." + end, True)]]
    (tmp_path / "a.csv").write_text("question,answer\nSky?,Blue.\n")
    assert look(str(tmp_path / "a.csv"), tokenizer).found.shapes == {"question-answer": 1}


def test_a_shape_that_there_is_not(source: str) -> None:
    with pytest.raises(UserError, match="there is no shape 'sharegpt'; there are messages, alpaca"):
        look(source, None, shape="sharegpt")
