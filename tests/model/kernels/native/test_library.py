"""Compiled code on disk: made once, and never read when it is damaged, another's or of another version."""

import errno
import os
import subprocess
import sys

import pytest

from farthing.base import processor
from farthing.model.kernels.native import library

CODE = b"entry\nmachine code"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a compiler that is quick and counts."""
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path))
    made = []
    monkeypatch.setattr(library, "lacks", lambda: "")
    monkeypatch.setattr(library, "_compile", lambda *settings: made.append(settings) or CODE)
    monkeypatch.setattr(library, "_loaded", lambda code: code)
    return made


def step(kinds=("bfloat16",)):
    library.step.cache_clear()
    found = library.step(kinds)
    library.step.cache_clear()
    return found


def kept(tmp_path):
    return [path for path in (tmp_path / "kernels").iterdir() if path.suffix == ".o"]


def test_a_step_is_compiled_once(cache, tmp_path):
    assert step() == step() == CODE
    assert len(cache) == len(kept(tmp_path)) == 1
    step(("int8", "bfloat16"))
    assert len(cache) == len(kept(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "a folder"])
def test_a_damaged_file_is_compiled_again(cache, tmp_path, damage):
    step()
    (path,) = kept(tmp_path)
    whole = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
        assert step() == CODE
        assert len(cache) == 2
        return
    path.write_bytes({"empty": b"", "cut": whole[:-3], "changed": whole[:-1] + b"?"}[damage])
    assert step() == CODE
    assert len(cache) == 2
    assert path.read_bytes() == whole
    step()
    assert len(cache) == 2


def test_a_file_that_others_can_write_is_not_read(cache, tmp_path):
    step()
    (path,) = kept(tmp_path)
    path.chmod(0o666)
    assert step() == CODE
    assert len(cache) == 2
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root, to give a file away")
def test_another_users_file_is_not_read(cache, tmp_path):
    step()
    (path,) = kept(tmp_path)
    os.chown(path, 12345, 12345)
    step()
    assert len(cache) == 2
    assert path.stat().st_uid == 0


def test_another_version_has_a_file_of_its_own(cache, tmp_path, monkeypatch):
    step()
    monkeypatch.setattr(library, "version", lambda name: "0.0.1")
    step()
    other = "avx512" if processor.isa() == "avx2" else "avx2"
    monkeypatch.setattr(processor, "isa", lambda: other)
    step()
    assert len(cache) == len(kept(tmp_path)) == 3


def test_a_cache_that_cannot_be_written_keeps_nothing(cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path / "file"))
    assert step() == step() == CODE
    assert len(cache) == 2


def test_a_full_disk_costs_no_second_compilation(cache, monkeypatch):
    def full(path, code):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(library, "_keep", full)
    assert step() == CODE
    assert len(cache) == 1


def test_nowhere_to_compile_is_said(monkeypatch):
    monkeypatch.setattr(library.tempfile, "tempdir", "/no/such/folder")
    with pytest.raises(library.NoKernels, match=r"^compiling failed: .*/no/such/folder"):
        library._compile(("bfloat16",), "avx2", "x86-64-v3", "")


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(processor, "isa", lambda: "sse4")
    assert library.lacks() == "sse4 has no fused multiply-add"
    monkeypatch.setattr(processor, "isa", lambda: "avx2")
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    assert library.lacks() == "numba is not installed; pip install numba"


def test_a_compiler_that_fails_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(library, "_BUILD", "farthing.no_such_module")
    with pytest.raises(library.NoKernels, match=r"^compiling failed: .*no_such_module"):
        library._compile(("bfloat16",), "avx2", "x86-64-v3", "")


@pytest.mark.skipif(bool(library.lacks()), reason="no kernels here")
def test_processes_that_start_together_compile_once(tmp_path):
    """Each of three needs the same code, which takes seconds to compile."""
    code = "from farthing.model.kernels.native import library; library.step(('float32',)); print('ready')"
    environment = os.environ | {"FARTHING_CACHE": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=600) for process in started]
    assert [out.strip() for out, _ in said] == ["ready"] * 3
    assert sum("compiling float32 kernels" in err for _, err in said) == 1
    assert len(kept(tmp_path)) == 1
