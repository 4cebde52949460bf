"""Files appear whole or not at all."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.base.files import (
    append_lines,
    locked,
    new_file,
    new_folder,
    open_ready,
    read_json,
    read_lines,
    sha256,
    strange,
    write,
    write_json,
)


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


def at_once(work: Callable[[int], None], times: int = 40) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(times)))


def test_several_that_write_one_file_take_turns(tmp_path: Path) -> None:
    at_once(lambda number: write(tmp_path / "x", f"{number:02d}" * 10_000))
    text = (tmp_path / "x").read_text()
    assert text == text[:2] * 10_000
    assert os.listdir(tmp_path) == ["x"]


def test_several_that_write_one_folder_leave_one_of_theirs(tmp_path: Path) -> None:
    def make(number: int) -> None:
        with new_folder(tmp_path / "m") as partial:
            (partial / "config.json").write_text(str(number))
            (partial / "weights").write_text(str(number))

    at_once(make)
    assert os.listdir(tmp_path) == ["m"]
    assert (tmp_path / "m/config.json").read_text() == (tmp_path / "m/weights").read_text()


def test_a_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []

    def enter(number: int) -> None:
        with locked(tmp_path / "lock"):
            assert not inside
            inside.append(number)
            time.sleep(0.001)
            inside.remove(number)

    at_once(enter)


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "[a]*?"])
def test_names_at_the_limit_and_with_signs_of_patterns(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"
    (tmp_path / name).unlink()
    (tmp_path / f".{name[:50]}.partial-0123").mkdir()  # what a killed process left
    for _ in range(2):
        with new_folder(tmp_path / name) as partial:
            (partial / "config.json").write_text("{}")
    assert (tmp_path / name / "config.json").is_file()
    assert name in os.listdir(tmp_path)
    assert len(name) > 50 or os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_a_name_beyond_the_limit_is_said(make: Any, tmp_path: Path) -> None:
    def use() -> None:
        with make(tmp_path / ("x" * 256)) as partial:
            (partial / "y" if partial.is_dir() else partial).write_text("x")

    with pytest.raises(UserError, match="File name too long"):
        use()
    assert os.listdir(tmp_path) == []


# ---- what is no file ----


def odd_ones(folder: Path) -> dict[str, Path]:
    """What may stand under a file's name, by what is said of it."""
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "s"))
    return {
        "a link that leads in a circle": folder / "loop", "a link to nowhere, which does not exist": folder / "gone",
        "a pipe": folder / "fifo", "a device": folder / "zero", "a socket": folder / "s",
    }  # fmt: skip


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path: Path) -> None:
    for what, path in odd_ones(tmp_path).items():
        assert strange(path) == what
        for read in (read_json, read_lines, sha256):
            with pytest.raises(UserError, match=f"is {what}, not a file; ") as caught:
                read(path)
            assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file", tmp_path / "missing"):
        assert strange(path) is None


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refuse)
    assert strange(tmp_path / "x") == "not readable (Permission denied)"


def test_a_pipe_is_empty_if_nobody_writes_to_it_and_read_to_its_end_if_somebody_does(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with open_ready(tmp_path / "fifo") as file:
        assert file.read() == b""
    reading, writing = os.pipe()
    writer = threading.Timer(0.05, lambda: (os.write(writing, b"name: x"), os.close(writing)))
    writer.start()
    with open_ready(Path(f"/dev/fd/{reading}")) as file:
        assert file.read(100) == b"name: x"
    writer.join()
    os.close(reading)


def test_lines_are_added_behind_one_that_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "lines.jsonl"
    append_lines(path, [{"a": "½"}, {"a": 2}])
    with path.open("a") as file:
        file.write('{"a": 3')
    append_lines(path, [{"a": 4}])
    assert path.read_text(encoding="utf-8").splitlines() == ['{"a": "½"}', '{"a": 2}', '{"a": 3', '{"a": 4}']
