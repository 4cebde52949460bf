"""What a stage prepares is verified before it is used again, and made anew if a bit of it changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from farthing.base.seal import hashes
from farthing.data.overlap import HeldOut
from farthing.recipe import Pretrain, validate
from farthing.stages.pieces import Pieces
from farthing.stages.pretrain import prepare_pretrain

SUMS = {"chain_sum": {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Pretrain:
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"{n} and {n + 1} follow each other"}) + "\n" for n in range(90))
    )
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {
        "kind": "pretrain", "data": [str(text), {"tasks": SUMS, "items": 20}], "validation": 0.1, "vocab_size": 280,
        "family": "llama", "depth": 1, "model": small, "tokens": 256, "batch_tokens": 128, "length": 32,
    }  # fmt: skip
    made = validate({"name": "t", "stages": [settings]}).stages[0]
    assert isinstance(made, Pretrain)
    return made


def prepare(stage: Pretrain, folder: Path, seed: int = 3) -> list[str]:
    said: list[str] = []
    prepare_pretrain(stage, folder, seed=seed, held_out=HeldOut(), say=said.append)
    return said


FILES = [
    "start/model.safetensors", "start/config.json", "start/tokenizer.json", "data/train/documents.bin",
    "data/train/tokens.bin", "data/train/index.json", "data/validation/documents.bin", "data/tokenizer/tokenizer.json",
    "data/lessons-2.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["bit", "gone"])
def test_a_damaged_piece_is_said_and_made_again(
    name: str, damage: str, stage: Pretrain, tmp_path: Path
) -> None:
    assert prepare(stage, tmp_path) == []
    before = hashes(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content) if damage == "bit" else path.unlink()
    said = prepare(stage, tmp_path)
    if name != "data/lessons-2.jsonl" or damage == "bit":  # a piece that is one file and gone was never made
        [sentence] = said
        piece = "/".join(name.split("/")[: 1 if name.startswith("start") else 2])
        assert sentence == f"{path} has changed since it was made; {piece} is made again"
    assert hashes(tmp_path) == before
    assert prepare(stage, tmp_path) == []


def test_what_a_damaged_record_vouched_for_is_made_again(stage: Pretrain, tmp_path: Path) -> None:
    prepare(stage, tmp_path)
    before = hashes(tmp_path)
    record = tmp_path / "prepared.json"
    whole = record.read_text()
    for damaged in (whole.replace("a", "b", 1), whole[:-9], "[]"):
        record.write_text(damaged)
        (tmp_path / "data/train/tokens.bin").write_bytes(b"01")
        assert prepare(stage, tmp_path) == [f"{record} is damaged, so what was prepared is made again"]
        assert hashes(tmp_path) == before


def test_a_piece_made_before_records_were_kept_is_taken_and_recorded(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("1")
    assert Pieces(tmp_path, said.append, 3).has(tmp_path / "old")
    (tmp_path / "old" / "file").write_text("2")
    assert not Pieces(tmp_path, said.append, 3).has(tmp_path / "old")
    assert not (tmp_path / "old").exists()
    assert len(said) == 1


def test_pieces_of_another_seed_are_made_again(stage: Pretrain, tmp_path: Path) -> None:
    prepare(stage, tmp_path / "ours")
    prepare(stage, tmp_path / "theirs", seed=4)
    assert hashes(tmp_path / "ours/start") != hashes(tmp_path / "theirs/start")
    record = tmp_path / "theirs/prepared.json"
    said = prepare(stage, tmp_path / "theirs")
    assert said == [f"{record} is of another seed, so what was prepared is made again"]
    assert hashes(tmp_path / "theirs") == hashes(tmp_path / "ours")
