"""`farthing data`: sentences, marks where there are no colours, and JSON."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from farthing.base.errors import UserError
from farthing.cli import app

PAIR = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue.\x1b[31m"}]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": PAIR, "id": 7}) + "\n" + json.dumps({"prompt": "Sky?"}) + "\n")
    return str(path)


def test_the_shape_and_what_is_learnt_are_shown(source: str, tiny_model: Path) -> None:
    done = CliRunner().invoke(app, ["data", source, "--model", str(tiny_model), "--length", "4"])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == f"{source}: 2 rows; shape: messages (1), prompt-only (1)"
    assert "columns: messages, id" in lines[1]
    assert "longer than a row of 4 and left out: 1 (100.0%)" in done.stdout
    assert "  1: rows.jsonl:2: it is a prompt without an answer" in done.stdout
    assert lines[-1] == "<|user|>Sky?<|assistant|>>>>Blue.[31m<|end|><<<"
    assert "\x1b" not in done.stdout


def test_json_is_one_object(source: str) -> None:
    done = CliRunner().invoke(app, ["data", source, "--json"])
    found = json.loads(done.stdout)
    assert found["rows"] == 2
    assert found["unit"] == "characters"
    assert found["left_out"][0]["rows"] == 1


def test_a_template_needs_a_model(source: str) -> None:
    done = CliRunner().invoke(app, ["data", source, "--chat-template", "chatml"])
    assert isinstance(done.exception, UserError)
    assert "--model" in str(done.exception)
