"""Files and folders written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder. Raises UserError if it does not hold one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; download the file again")
    return value


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the name `path` when the block ends well and vanishes when it does not.

    It is written beside its final place, flushed to disk and renamed, so that `path` is at every moment absent, the old
    file or the new one. What a killed process leaves is overwritten by the next.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as the ecosystem does: indented, UTF-8, a newline at the end; whole or not at all."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(folder: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` when the block ends well and vanishes when it does not.

    It is filled beside its final place, flushed to disk file by file and renamed, so that `folder` is at every moment
    absent, the old model or the new one.

    Raises:
        UserError: when less than `needed_bytes` are free, the disk runs full, or `folder` exists and is not a model
            folder, which alone may be replaced.
    """
    folder = Path(folder).resolve()
    _check_replaceable(folder)
    _sweep(folder)
    temporary = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        if is_disk_full(error):
            raise UserError(_disk_full(folder, needed_bytes, 0)) from None
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another place") from None
    free = shutil.disk_usage(folder.parent).free
    if free < needed_bytes:
        temporary.rmdir()
        raise UserError(_disk_full(folder, needed_bytes, free))
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tells other processes' sweeps that this folder's writer is alive
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # what the umask grants; safetensors makes its files private
        for path in temporary.iterdir():
            path.chmod(mode)
            sync(path)
        os.fsync(lock)
        _replace(temporary, folder)
        sync(folder.parent)
    except BaseException as error:
        if is_disk_full(error):
            free = shutil.disk_usage(folder.parent).free
            raise UserError(_disk_full(folder, needed_bytes, free)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if it was renamed
        os.close(lock)


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace, which deletes, anything but an empty folder or a flat folder with a config.json."""
    if not folder.exists():
        return
    entries = list(folder.iterdir()) if folder.is_dir() else None
    is_model = (
        entries is not None and (folder / "config.json").is_file() and all(e.is_file() for e in entries)
    )
    if entries is None or (entries and not is_model):
        raise UserError(f"{folder} exists and is not a model folder; choose another place for the model")


def _replace(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old-{secrets.token_hex(4)}")
    folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove partial folders that killed processes left: those that nobody has locked."""
    for partial in folder.parent.glob(f".{folder.name}.partial-*"):
        try:
            lock = os.open(partial, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(lock)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, or the quota on it, ran full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors writes from Rust and raises an error of its own, with the system's in its text
    return type(error).__name__ == "SafetensorError" and f"os error {errno.ENOSPC}" in str(error).lower()


def _disk_full(folder: Path, needed: int, free: int) -> str:
    return (
        f"no room on the disk for {folder}: it needs {needed:,} bytes and {free:,} are free; "
        "free some space or choose another place"
    )


def link(path: Path, target: Path) -> None:
    """Make a symbolic link, relative within the run directory so that the directory can be moved."""
    inside = target.absolute().is_relative_to(path.parent.absolute())
    to = target.absolute().relative_to(path.parent.absolute()) if inside else target.absolute()
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(to)
    temporary.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a .jsonl file, one a line; empty if the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sha256(path: Path) -> str:
    """Digest of a file, in hexadecimal. Raises UserError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a readable file") from error
