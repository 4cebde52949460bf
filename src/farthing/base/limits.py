"""What a machine may refuse, in words: a file that cannot be written, memory that cannot be had.

The libraries that write and allocate for us raise errors of their own; this is the one place that knows them.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from farthing.base.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REASONS = {
    errno.ENOSPC: "no disk space left",
    errno.EDQUOT: "no disk space left within the quota",
    errno.EFBIG: "a file may not be that large here, see `ulimit -f`",
    errno.EMFILE: "too many files are open, see `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine",
}
_REFUSED = (
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EEXIST,
)
LONGEST_NAME = 255  # bytes, of every file system in use
_LONGEST_PATH = 4095  # Linux's; what is longer cannot be opened by its name
_IN_TEXT = re.compile(r"\(os error (\d+)\)")  # Rust's way of showing the system's error
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy's tofile, which drops the system's error
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


class Unwritable(UserError):
    """A file or folder that cannot be written; `reason` says why, without its name."""

    def __init__(self, sentence: str, reason: str, full: bool) -> None:
        super().__init__(sentence)
        self.reason, self.full = reason, full


def unwritable(error: BaseException) -> str | None:
    """Why the disk, its rights or its limits refused to write; None for an error of another kind."""
    if isinstance(error, Unwritable):
        return error.reason
    number = _system_error(error)
    if number in _REASONS:
        return _REASONS[number]
    return os.strerror(number) if number in _REFUSED else None


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, or the quota on it, ran full."""
    return error.full if isinstance(error, Unwritable) else _system_error(error) in _FULL


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had, from Python, NumPy or torch, on a CPU or a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def refusal(error: BaseException) -> str | None:
    """One sentence about an error that the machine is the cause of; None for any other.

    For where nothing more is known: what a command was about to do says more about it.
    """
    if is_out_of_memory(error):
        return "there is not enough memory; close other programs, or ask for less (a smaller model or batch)"
    reason = unwritable(error)
    if reason is None:
        return None
    name = getattr(error, "filename", None)
    where = f"{shortened(os.fsdecode(name))}: " if isinstance(name, str | bytes) else ""
    if is_disk_full(error):
        return f"{where}{reason}; free some space or choose another place"
    return f"{where}{reason}; change that or choose another place"


def _system_error(error: BaseException) -> int | None:
    """The system's number of an error, wherever a library put it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if isinstance(error, OSError) and _SHORT_WRITE.search(text):
        return errno.ENOSPC
    # safetensors and tokenizers write from Rust, and raise SafetensorError and a bare Exception
    rust = type(error) is Exception or type(error).__name__ == "SafetensorError"
    found = _IN_TEXT.search(text) if rust else None
    return int(found[1]) if found else None


def named(text: str | Path) -> Path:
    """The path that a text names, `~` expanded.

    Raises:
        UserError: for a text that no file can have as its name.
    """
    path, said = Path(text), shortened(str(text))
    if "\0" in str(text):
        raise UserError(f"{said!r} cannot be the name of a file (it holds a zero byte); give another name")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise UserError(
            f"{said!r} cannot be the name of a file (it holds half a character); give another name"
        ) from None
    if len(encoded) > _LONGEST_PATH or any(len(part) > LONGEST_NAME for part in encoded.split(b"/")):
        raise UserError(f"{said!r} cannot be the name of a file (it is too long); give a shorter name")
    try:
        return path.expanduser()
    except RuntimeError:  # ~someone who has no home here
        return path


def shortened(text: str) -> str:
    """A name for a message, its middle left out if it is long."""
    return text if len(text) <= 80 else f"{text[:40]}…{text[-39:]}"
