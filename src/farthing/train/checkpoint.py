"""Checkpoints that are whole or absent: written aside, flushed to disk, renamed, and sealed by a hash of everything in
them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from farthing.base.errors import UserError
from farthing.base.files import sha256, sync, write
from farthing.base.limits import is_disk_full, unwritable
from farthing.base.seal import intact, seal

KEEP = 2
_STATE = "state.safetensors"


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
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial / _STATE)
        sync(partial / _STATE)
        manifest = {"step": step, "meta": meta, "sha256": {_STATE: sha256(partial / _STATE)}}
        write(partial / "manifest.json", json.dumps(seal(manifest)))
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


def latest(
    folder: Path, say: Callable[[str], None] = lambda _: None, until: int | None = None
) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """(step, tensors, meta) of the newest intact checkpoint; None if there is none. Damaged ones are set aside.

    Args:
        say: called with a sentence for each that was damaged.
        until: the last step to look at.
    """
    for path in reversed(_steps(folder)):
        if until is not None and _step(path) > until:
            continue
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            if (
                intact(manifest)
                and manifest["step"] == _step(path)
                and isinstance(manifest["meta"], dict)
                and sha256(path / _STATE) == manifest["sha256"][_STATE]
            ):
                return manifest["step"], load_file(path / _STATE), manifest["meta"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
            pass
        aside = path.with_name(f".damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        say(
            f"the checkpoint {path} is damaged: it is set aside as {aside.name}, and the one before it is used"
        )
    return None


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max(map(_step, _steps(folder)), default=0)


def _steps(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
