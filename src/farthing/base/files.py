"""Files and folders written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from farthing.base.errors import UserError
from farthing.base.limits import Unwritable, is_disk_full, unwritable

_STRANGE = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def cache_folder() -> Path:
    """The folder for everything Farthing keeps: $FARTHING_CACHE, or ~/.cache/farthing."""
    given = os.environ.get("FARTHING_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "farthing"


def strange(path: Path) -> str | None:
    """What stands under a file's or folder's name and is neither, as it follows "is"; None also where nothing does."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads in a circle"
        if error.errno in (errno.EACCES, errno.EPERM):
            return f"not readable ({error.strerror})"
        return f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else None
    return next((what for applies, what in _STRANGE if applies(mode)), None)


def require_file(path: Path, remedy: str) -> None:
    """Refuse what would be waited for, or never end, if it were read. Raises UserError; a missing file passes."""
    if what := strange(path):
        raise UserError(f"{path} is {what}, not a file; {remedy}")


def open_ready(path: Path) -> BinaryIO:
    """A file to read. A pipe is empty if nobody writes to it, where `open` would wait for somebody."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


def read_json(path: Path, remedy: str = "download the file again") -> dict[str, Any]:
    """Read a JSON object from a file, of a model folder unless `remedy` says what to do about another.

    Raises:
        UserError: if it cannot be read or does not hold one.
    """
    require_file(path, remedy)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; {remedy}")
    return value


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a folder, or on a file that is made for it and stays; waits for whoever holds it.

    It keeps out other processes and other threads. A file system without locks locks nothing.

    Raises:
        Unwritable: if the file cannot be made.
    """
    how = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    with _writing(path):
        descriptor = os.open(path, how | os.O_CLOEXEC, 0o666)
    try:
        _wait_for(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the name `path` when the block ends well and vanishes when it does not.

    It is written beside its final place, flushed to disk and renamed, so that `path` is at every moment absent, the old
    file or the new one. What a killed process leaves is overwritten by the next; two at a time take turns.

    Raises:
        Unwritable: when the disk runs full, or refuses the file.
    """
    temporary = path.with_name(f".{_shortened(path.name)}.partial")
    with _writing(path, temporary):
        own = _own_file(temporary)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            # once it is renamed, a file of that name is another writer's
            if temporary.exists() and os.path.samestat(os.fstat(own), temporary.stat()):
                temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(own)


def _own_file(temporary: Path) -> int:
    """Descriptor of a file of this name that is locked: another writer's is waited for, a dead writer's is taken."""
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _wait_for(descriptor)
        try:
            if os.path.samestat(os.fstat(descriptor), temporary.stat()):
                os.ftruncate(descriptor, 0)
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the other writer has renamed it


def _wait_for(descriptor: int) -> None:
    """Lock an open file or folder; does nothing where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise


@contextmanager
def _writing(path: Path, within: Path | None = None, needed: int = 0) -> Iterator[None]:
    """Turn what refuses to be written into one sentence about `path`.

    A refused right counts only if it is about `path` itself or what is `within`: the block may also read.
    """
    try:
        yield
    except Exception as error:
        reason = unwritable(error)
        about = Path(getattr(error, "filename", None) or path)
        if reason is None or (about not in (path, within, path.parent) and within not in about.parents):
            raise
        full = is_disk_full(error)
        raise Unwritable(_no_room(path, needed) if full else _refused(path, reason), reason, full) from error


def _refused(path: Path, reason: str) -> str:
    return f"{path}: cannot be written ({reason}); choose another place"


def _no_room(path: Path, needed: int) -> str:
    said = f"no room on the disk for {path}"
    if path.parent.is_dir() and needed > (free := shutil.disk_usage(path.parent).free):
        said += f": it needs {needed:,} bytes and {free:,} are free"
    return f"{said}; free some space or choose another place"


def _shortened(name: str) -> str:
    """A name with room for more within a file system's 255 bytes."""
    return os.fsencode(name)[:200].decode("utf-8", "ignore")


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
        UserError: when less than `needed_bytes` are free, the disk runs full or refuses the folder, or `folder` exists
            and is not a model folder, which alone may be replaced.
    """
    folder = Path(folder).resolve()
    hidden = f".{_shortened(folder.name)}"
    temporary = folder.with_name(f"{hidden}.partial-{secrets.token_hex(4)}")
    with _writing(folder, temporary, needed_bytes):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent):  # no other's sweep between the folder's making and its lock
            _check_replaceable(folder)
            _sweep(folder.parent, hidden)
            temporary.mkdir()
            lock = os.open(temporary, os.O_RDONLY)
            _wait_for(lock)  # tells other processes' sweeps that this folder's writer is alive
        try:
            if shutil.disk_usage(folder.parent).free < needed_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield temporary
            mode = (
                temporary.stat().st_mode & 0o666
            )  # what the umask grants; safetensors makes its files private
            for path in temporary.iterdir():
                path.chmod(mode)
                sync(path)
            os.fsync(lock)
            with locked(folder.parent):
                _replace(temporary, folder, hidden)
            sync(folder.parent)
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


def _replace(temporary: Path, folder: Path, hidden: str) -> None:
    """Give a folder its name; what has that name is set aside, and put back if the disk refuses the new one."""
    if not folder.exists():
        temporary.rename(folder)
        return
    old = folder.with_name(f"{hidden}.old-{secrets.token_hex(4)}")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(parent: Path, hidden: str) -> None:
    """Remove partial folders that killed processes left: those that nobody has locked."""
    for partial in parent.glob(f"{glob.escape(hidden)}.partial-*"):
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


def link(path: Path, target: Path) -> None:
    """Make a symbolic link, relative within the run directory so that the directory can be moved."""
    inside = target.absolute().is_relative_to(path.parent.absolute())
    to = target.absolute().relative_to(path.parent.absolute()) if inside else target.absolute()
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(to)
    temporary.replace(path)


def appending(path: Path) -> BinaryIO:
    """A .jsonl file to add lines to, made if it is missing, on a line of its own: one torn by a crash must not swallow
    the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    if path.stat().st_size and not _ends_a_line(path):
        file.write(b"\n")
        file.flush()
    return file


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Add objects to a .jsonl file, a line each, and flush them to the disk."""
    with appending(path) as file:
        file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, remedy: str = "put the file back as it was") -> list[dict[str, Any]]:
    """Read the JSON objects of a .jsonl file, one a line; empty if the file does not exist.

    Raises:
        UserError: that names the first line that is none.
    """
    require_file(path, remedy)
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    except ValueError:
        raise UserError(f"{path} is not UTF-8 text; {remedy}") from None
    found = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            raise UserError(f"{path} line {number} is not a JSON object; {remedy}")
        found.append(line)
    return found


def sha256(path: Path) -> str:
    """Digest of a file, in hexadecimal. Raises UserError if it cannot be read."""
    require_file(path, "give a readable file")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a readable file") from error
