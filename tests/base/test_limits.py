"""What the machine refuses, in words, whichever library met it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from farthing.base.errors import UserError
from farthing.base.files import new_file, new_folder
from farthing.base.limits import (
    Unwritable,
    is_disk_full,
    is_out_of_memory,
    named,
    refusal,
    unwritable,
)

FULL = "No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "x"), "no disk space left"),
        (OSError(errno.EDQUOT, "x"), "no disk space left within the quota"),
        (OSError(errno.EFBIG, "x"), "a file may not be that large here, see `ulimit -f`"),
        (OSError(errno.EROFS, "x"), "Read-only file system"),
        (PermissionError(errno.EACCES, "x"), "Permission denied"),
        (OSError(errno.ENAMETOOLONG, "x"), "File name too long"),
        (OSError("12 requested and 3 written"), "no disk space left"),
        (SafetensorError(f"Error while serializing: I/O error: {FULL}"), "no disk space left"),
        (SafetensorError("Error: File too large (os error 27)"), "a file may not be that large here, see `ulimit -f`"),
        (Exception(FULL), "no disk space left"),
        (Unwritable("x", "no disk space left", True), "no disk space left"),
        (OSError(errno.ENOENT, "x"), None),
        (SafetensorError("Error while serializing: invalid dtype"), None),
        (ValueError(FULL), None),
        (KeyError("x"), None),
    ],
)  # fmt: skip
def test_why_a_file_cannot_be_written(error: Exception, reason: str | None) -> None:
    assert unwritable(error) == reason
    assert is_disk_full(error) == (reason is not None and "space" in reason)
    assert (refusal(error) is not None) == (reason is not None)


def test_memory_that_cannot_be_had() -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(MemoryError) as numpys:
        np.ones(1 << 60, dtype=np.uint8)
    for error in (
        torchs.value,
        numpys.value,
        MemoryError(),
        torch.OutOfMemoryError("x"),
        OSError(errno.ENOMEM, "x"),
    ):
        assert is_out_of_memory(error), error
        assert "not enough memory" in (refusal(error) or "")
    for other in (RuntimeError("shapes differ"), ValueError("not enough memory"), OSError(errno.ENOSPC, "x")):
        assert not is_out_of_memory(other)


@pytest.mark.parametrize(
    "text", ["x" * 256, "é" * 128, "a/" + "x" * 256 + "/b", "a/" * 2100, "a\0b", "\ud800"]
)
def test_a_name_that_no_file_can_have(text: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a file") as caught:
        named(text)
    assert len(str(caught.value)) < 250
    str(caught.value).encode()


@pytest.mark.parametrize(
    "text", ["x" * 255, "é" * 127, "~", "~nobody-of-this-name/x", "\udc80", "", "a/../b"]
)
def test_a_name_that_a_file_can_have(text: str) -> None:
    assert named(text) in (Path(text), Path(text).expanduser() if text == "~" else Path(text))


LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
from farthing.base.errors import UserError
from farthing.base.files import new_file, new_folder
def text(path): path.write_text("x" * 100_000)
def array(path): np.ones(100_000).tofile(path)
def tensors(path):
    import torch; from safetensors.torch import save_file
    save_file({"w": torch.ones(100_000)}, path)
def tokenizer(path):
    from tokenizers import Tokenizer, models
    Tokenizer(models.WordLevel({f"word{i}": i for i in range(10_000)}, "word0")).save(str(path))
write, place = globals()[sys.argv[1]], Path(sys.argv[2])
for make in (lambda: new_file(place / "x"), lambda: new_folder(place / "m")):
    try:
        with make() as partial:
            write(partial / "y" if partial.is_dir() else partial)
        print("written")
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("writer", ["text", "array", "tensors", "tokenizer"])
def test_a_limit_on_the_size_of_files_is_said_by_whichever_library_meets_it(
    writer: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, writer, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2, lines
    for line, name in zip(lines, "xm", strict=True):
        assert str(tmp_path / name) in line
        assert "choose another place" in line
    assert os.listdir(tmp_path) == [], "nothing half written is left"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_a_refused_file_leaves_the_old_one(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(Unwritable) as caught, new_file(tmp_path / "x") as partial:
        partial.write_text("new")
    assert f"{tmp_path / 'x'}" in str(caught.value)
    assert (tmp_path / "x").read_text() == "old"
    with pytest.raises(Unwritable) as caught, new_folder(tmp_path / "m") as partial:
        (partial / "config.json").write_text("new")
    assert ".partial" not in str(caught.value)
    assert os.listdir(tmp_path) == ["x"]


def test_what_cannot_be_read_is_not_said_to_be_unwritable(tmp_path: Path) -> None:
    missing = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/tokenizer.json")
    with pytest.raises(PermissionError), new_folder(tmp_path / "m"):
        raise missing
    with pytest.raises(PermissionError), new_file(tmp_path / "x"):
        raise missing
