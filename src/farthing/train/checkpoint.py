"""Checkpoints that are whole or absent: written aside, flushed to disk, renamed, with a checksum for each
file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from farthing.base.errors import UserError
from farthing.base.files import sync, write
from farthing.base.limits import is_disk_full, unwritable

KEEP = 2


def save(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write `step-NNNNNN` into the folder and remove all but the newest two.

    Raises:
        UserError: when the disk is full or refuses it; older checkpoints stay as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"step-{step:06d}", folder / f".step-{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial / "state.safetensors")
        sync(partial / "state.safetensors")
        digest = _hash(partial / "state.safetensors")
        manifest = {"step": step, "meta": meta, "sha256": {"state.safetensors": digest}}
        write(partial / "manifest.json", json.dumps(manifest))
        if final.exists():  # the same step again after a restart from an older checkpoint
            shutil.rmtree(final)
        partial.rename(final)
        sync(folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = unwritable(error)
        if reason is None:
            raise
        remedy = "free some" if is_disk_full(error) else "change that"
        raise UserError(f"no checkpoint in {folder}: {reason}; {remedy} and run again") from error
    for old in _steps(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """(step, tensors, meta) of the newest intact checkpoint; None if there is none."""
    for path in reversed(_steps(folder)):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            if all(_hash(path / name) == digest for name, digest in manifest["sha256"].items()):
                return manifest["step"], load_file(path / "state.safetensors"), manifest["meta"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max(map(_step, _steps(folder)), default=0)


def _steps(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
