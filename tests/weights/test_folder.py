"""Model folders: read only when whole and safe, written whole or not at all."""

import errno
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from farthing.base.errors import UserError
from farthing.base.files import is_disk_full
from farthing.weights import folder as folders

CONFIG = {"model_type": "llama", "hidden_size": 4}


def tensors() -> dict[str, torch.Tensor]:
    return {
        "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
        "a.weight": torch.arange(8).to(torch.bfloat16).reshape(2, 4),
        "c.bias": torch.ones(5),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folders.write_folder(tmp_path / "model", tensors(), CONFIG)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return folders.write_folder(tmp_path / "sharded", tensors(), CONFIG, max_shard_bytes=50)


def said(action: Any) -> str:
    """What the user reads: exactly one line."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_what_is_written_is_read(model: Path) -> None:
    read = dict(folders.read_tensors(model))
    assert read.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert folders.read_config(model) == CONFIG
    assert sorted(folders.tensor_files(model)) == sorted(tensors())
    assert sorted(p.name for p in model.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in model.parent.iterdir()] == ["model"], "nothing is left beside the folder"


def test_shards_hold_the_same_and_an_index_transformers_understands(sharded: Path) -> None:
    assert not (sharded / "model.safetensors").exists()
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 12 * 4 + 8 * 2 + 5 * 4
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    read = dict(folders.read_tensors(sharded))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())
    assert len(read) == 3


def test_files_can_be_read_by_others_as_the_umask_allows(model: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert (model / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_reading_is_lazy(sharded: Path) -> None:
    stream = folders.read_tensors(sharded)
    next(stream)
    for shard in sharded.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(FileNotFoundError):
        list(stream)


def test_no_config(tmp_path: Path) -> None:
    assert "config.json" in said(lambda: folders.read_config(tmp_path))
    assert "not a folder" in said(lambda: folders.read_config(tmp_path / "absent"))


@pytest.mark.parametrize("text", ["{", "[1]", "\udce9", "[" * 100_000], ids=["cut", "list", "utf8", "deep"])
def test_broken_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert str(tmp_path / "config.json") in said(lambda: folders.read_config(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    message = said(lambda: folders.read_tensors(tmp_path))
    assert name in message
    assert "safetensors" in message
    assert not Path("owned").exists()


def test_no_weights_at_all(tmp_path: Path) -> None:
    assert "model.safetensors" in said(lambda: folders.tensor_files(tmp_path))


def test_a_shard_that_is_missing(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in said(lambda: folders.read_tensors(sharded))


def test_a_tensor_the_index_promises_in_vain(sharded: Path) -> None:
    index = json.loads((sharded / folders.INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (sharded / folders.INDEX).write_text(json.dumps(index))
    assert "lacks ghost" in said(lambda: folders.read_tensors(sharded))


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "model.bin", 7, None]
)
def test_an_index_that_points_elsewhere(sharded: Path, shard: Any) -> None:
    save_file({"x": torch.ones(1)}, sharded.parent / "secret.safetensors")
    (sharded / folders.INDEX).write_text(json.dumps({"weight_map": {"x": shard}}))
    assert repr(shard) in said(lambda: folders.read_tensors(sharded))


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map(sharded: Path, index: str) -> None:
    (sharded / folders.INDEX).write_text(index)
    assert folders.INDEX in said(lambda: folders.read_tensors(sharded))


def test_every_truncation_is_noticed(model: Path) -> None:
    path = model / "model.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        message = said(lambda: folders.read_tensors(model))
        assert "model.safetensors" in message
        assert "download it again" in message


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 9) + b"not json!",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b'{"a": 1}',
        struct.pack("<Q", 27) + b'{"a": {"data_offsets": []}}',
        struct.pack("<Q", 2) + b"{}" + b"trailing",
    ],
    ids=["huge header", "no json", "list", "number", "no offsets", "trailing data"],
)
def test_damaged_headers(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    assert "download it again" in said(lambda: folders.tensor_files(model))


def test_the_tokenizer_travels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (source / name).write_text(f"{name} é" if name.endswith("jinja") else '{"é": 1}')
    (source / "model.safetensors").write_text("not this one")
    written = folders.write_folder(tmp_path / "new", tensors(), CONFIG, tokenizer_from=source)
    assert (written / "chat_template.jinja").read_text() == "chat_template.jinja é"
    assert (written / "generation_config.json").is_file()
    assert len(folders.tensor_files(written)) == 3


def test_no_tokenizer_where_one_is_needed(tmp_path: Path) -> None:
    write = lambda: folders.write_folder(tmp_path / "new", tensors(), CONFIG, tokenizer_from=tmp_path)  # noqa: E731
    assert "tokenizer.json" in said(write)
    assert list(tmp_path.iterdir()) == []


def test_an_older_model_is_replaced_whole(model: Path) -> None:
    (model / "stale.json").write_text("{}")
    folders.write_folder(model, {"only": torch.zeros(1)}, {"model_type": "new"})
    assert list(folders.tensor_files(model)) == ["only"]
    assert not (model / "stale.json").exists()
    assert [p.name for p in model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["file", "plain folder", "folder with folders"])
def test_nothing_but_a_model_is_ever_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("mine")
    else:
        (target / "work").mkdir(parents=True)
        (target / "thesis.tex").write_text("mine")
        if kind == "folder with folders":
            (target / "config.json").write_text("{}")
    assert "precious exists" in said(lambda: folders.write_folder(target, tensors(), CONFIG))
    assert target.is_file() or (target / "thesis.tex").read_text() == "mine"


def test_a_link_is_followed_not_replaced(model: Path) -> None:
    link = model.parent / "link"
    link.symlink_to(model)
    folders.write_folder(link, {"only": torch.zeros(1)}, CONFIG)
    assert link.is_symlink()
    assert list(folders.tensor_files(model)) == ["only"]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_an_interruption_leaves_what_was_there(model: Path, error: BaseException) -> None:
    def interrupted() -> None:
        with folders.new_folder(model) as temporary:
            (temporary / "config.json").write_text("half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert folders.read_config(model) == CONFIG
    assert [p.name for p in model.parent.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_swept_away_and_a_living_one_is_not(tmp_path: Path) -> None:
    left = tmp_path / ".model.partial-dead"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    with folders.new_folder(tmp_path / "model") as living:
        assert not left.exists()
        (living / "config.json").write_text("{}")
        folders.write_folder(tmp_path / "model", tensors(), CONFIG)  # another process, at the same time
        assert living.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_too_little_room_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = said(lambda: folders.write_folder(tmp_path / "new", tensors(), CONFIG))
    assert "84 bytes" in message
    assert "10 are free" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_runs_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folders, "write_json", full)
    message = said(lambda: folders.write_folder(tmp_path / "new", tensors(), CONFIG))
    assert "no room on the disk" in message
    assert "bytes" not in message  # those that are free do not tell why
    assert list(tmp_path.iterdir()) == []


def test_safetensors_own_error_for_a_full_disk_is_known() -> None:
    from safetensors import SafetensorError

    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert is_disk_full(full)
    assert not is_disk_full(SafetensorError("Error while serializing: invalid dtype"))


def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config)
    state = {k: v.detach() for k, v in theirs.state_dict().items()}
    written = folders.write_folder(tmp_path / "m", state, config.to_dict(), max_shard_bytes=4000)
    assert len(list(written.glob("*.safetensors"))) > 1
    again, info = LlamaForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(8)[None]
    assert torch.equal(theirs(ids).logits, again(ids).logits)


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), folders.new_folder(tmp_path / "file" / "model"):
        pass


def test_the_same_weights_are_told_in_any_shards_and_one_other_number_is_found(
    model: Path, sharded: Path, tmp_path: Path
) -> None:
    assert folders.same_weights(model, sharded)
    assert folders.same_weights(sharded, model)
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in tensors().items()}
    assert folders.same_weights(model, folders.write_folder(tmp_path / "narrow", narrow, CONFIG))
    for name in tensors():
        changed = tensors()
        changed[name].view(-1)[-1] += 1
        assert not folders.same_weights(model, folders.write_folder(tmp_path / name, changed, CONFIG))
    others = folders.write_folder(tmp_path / "others", {"d": torch.ones(2)}, CONFIG)
    assert not folders.same_weights(model, others)
