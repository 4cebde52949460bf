"""Checkpoints: whole or absent, whatever happens on the way."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from farthing.base.errors import UserError
from farthing.train import checkpoint


def tensors(value: float) -> dict[str, Tensor]:
    return {"a": torch.full((3, 4), value), "b.0.step": torch.tensor(value), "c": torch.ones(2, 6).T * value}


def value_of(found: Any) -> float:
    assert found is not None
    step, loaded, meta = found
    assert {name: t.shape for name, t in loaded.items()} == {n: t.shape for n, t in tensors(0).items()}
    assert meta == {"cursor": step * 10}
    for tensor in loaded.values():
        assert torch.equal(tensor, torch.full_like(tensor, float(step)))
    return float(step)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 2 and 4."""
    for step in (2, 4):
        checkpoint.save(tmp_path / "state", step, tensors(step), {"cursor": step * 10})
    return tmp_path / "state"


def test_nothing_is_found_where_nothing_was_saved(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "state") is None
    assert checkpoint.newest_step(tmp_path / "state") == 0


def test_the_newest_comes_back_as_it_was_and_two_are_kept(folder: Path) -> None:
    assert value_of(checkpoint.latest(folder)) == 4
    checkpoint.save(folder, 6, tensors(6), {"cursor": 60})
    assert value_of(checkpoint.latest(folder)) == 6
    assert sorted(path.name for path in folder.iterdir()) == ["step-000004", "step-000006"]
    assert checkpoint.newest_step(folder) == 6


def test_the_newest_is_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        checkpoint.save(tmp_path, step, tensors(step), {"cursor": step * 10})
    assert value_of(checkpoint.latest(tmp_path)) == 1_000_000
    assert {path.name for path in tmp_path.iterdir()} == {"step-999999", "step-1000000"}


def test_a_partial_folder_is_no_checkpoint(folder: Path) -> None:
    partial = folder / ".step-000006.partial"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half")
    assert value_of(checkpoint.latest(folder)) == 4
    checkpoint.save(folder, 6, tensors(6), {"cursor": 60})
    assert value_of(checkpoint.latest(folder)) == 6
    assert not partial.exists()


def test_a_save_that_dies_on_the_way_leaves_no_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sync", killed)  # the tensors are written, the manifest is not
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, 6, tensors(6), {"cursor": 60})
    assert (folder / ".step-000006.partial" / "state.safetensors").exists()
    assert value_of(checkpoint.latest(folder)) == 4


@pytest.mark.parametrize("damage", [
    "cut", "bit", "gone", "manifest cut", "manifest gone", "manifest a list", "cursor", "step -1", "step 99", "key",
    "meta a list", "renamed",
])  # fmt: skip
def test_a_damaged_newest_falls_back_to_the_one_before(folder: Path, damage: str) -> None:
    state, manifest = folder / "step-000004" / "state.safetensors", folder / "step-000004" / "manifest.json"
    content = bytearray(state.read_bytes())
    if damage == "cut":
        state.write_bytes(content[:-7])
    elif damage == "bit":
        content[-5] ^= 1
        state.write_bytes(content)
    elif damage == "gone":
        state.unlink()
    elif damage == "manifest cut":
        manifest.write_bytes(manifest.read_bytes()[:-9])
    elif damage == "manifest gone":
        manifest.unlink()
    elif damage == "manifest a list":
        manifest.write_text(json.dumps([1]))
    elif damage == "renamed":
        (folder / "step-000004").rename(folder / "step-000099")
    else:
        written = json.loads(manifest.read_text())
        changed = {
            "cursor": {"meta": {"cursor": 41}}, "step -1": {"step": 3}, "step 99": {"step": 99},
            "key": {"meta": {"cursr": 40}}, "meta a list": {"meta": []},
        }[damage]  # fmt: skip
        manifest.write_text(json.dumps(written | changed))
    said: list[str] = []
    assert value_of(checkpoint.latest(folder, said.append)) == 2
    name = "step-000099" if damage == "renamed" else "step-000004"
    assert said == [
        f"the checkpoint {folder / name} is damaged: it is set aside as .damaged-{name}, and the one before it is used"
    ]
    assert checkpoint.newest_step(folder) == 2
    checkpoint.save(folder, 4, tensors(4), {"cursor": 40})  # the step comes again, and takes the place
    assert value_of(checkpoint.latest(folder)) == 4


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_the_users_to_mend_and_costs_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"as far as it went")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="no disk space left") as said:
        checkpoint.save(folder, 6, tensors(6), {"cursor": 60})
    assert str(folder) in str(said.value)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000004"]
    assert value_of(checkpoint.latest(folder)) == 4


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), SafetensorError("shared memory")]
)
def test_other_errors_are_not_taken_for_a_full_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(tensors: dict[str, Tensor], path: Path) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(type(error)) as raised:
        checkpoint.save(folder, 6, tensors(6), {"cursor": 60})
    assert raised.value is error
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000004"]
