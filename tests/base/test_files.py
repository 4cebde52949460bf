"""Files appear whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from farthing.base.files import new_file, new_folder, write, write_json


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "é"\n}\n'
    with new_file(path) as partial:
        partial.write_text("half")
        assert path.read_text(encoding="utf-8").startswith("{")
    assert path.read_text() == "half"
    assert os.listdir(tmp_path) == ["x.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, "old")

    def fail() -> None:
        with new_file(path) as partial:
            partial.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("sync"), real_sync(descriptor))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("rename"), real_replace(self, to))[1])
    write(tmp_path / "x", "text")
    assert done == ["sync", "rename", "sync"]  # the file, its name, the folder's entry


def test_a_folder_s_files_are_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("sync"), real_sync(descriptor))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append("rename"), real_rename(self, to))[1])
    with new_folder(tmp_path / "model") as partial:
        (partial / "config.json").write_text("{}")
        (partial / "weights").write_text("1")
        assert not (tmp_path / "model").exists()
    assert done == ["sync"] * 3 + ["rename", "sync"]  # two files, the entries; the name, the parent's entry
    assert os.listdir(tmp_path) == ["model"]


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from farthing.base.files import new_file\n"
        "with new_file(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    write(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]
