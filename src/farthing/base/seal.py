"""Hashes of what a later attempt stands on, so that a changed bit is noticed and not trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farthing.base.files import sha256

Hashes = dict[str, str]
_KEY = "seal"


def hashes(path: Path) -> Hashes:
    """The hash of a file, or of every file in a folder, by the name relative to it ("" for the file itself)."""
    if path.is_file():
        return {"": sha256(path)}
    return {str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}


def changed(path: Path, recorded: Mapping[str, str]) -> Path | None:
    """A file that is gone or differs from what was recorded; None if all are as they were."""
    for name, digest in recorded.items():
        file = path / name if name else path
        if not file.is_file() or sha256(file) != digest:
            return file
    return None


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value with a hash of itself under "seal"."""
    return {**value, _KEY: _digest(value)}


def intact(value: Mapping[str, Any]) -> bool:
    """Whether a sealed value is as it was; a value without a seal, as Farthing 0.1.0 wrote, passes."""
    kept = {key: entry for key, entry in value.items() if key != _KEY}
    return _KEY not in value or value[_KEY] == _digest(kept)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
