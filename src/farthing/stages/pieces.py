"""What a stage prepares before it trains: made once, and made again if it was damaged.

`prepared.json` in the stage's folder keeps the hash of every file of every piece. Each piece is a function of the
recipe, its data and its seed, so a damaged one can always be made anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.files import read_json, write_json
from farthing.base.seal import changed, hashes, intact, seal

Say = Callable[[str], None]
_RECORD = "prepared.json"


class Pieces:
    """The prepared files and folders of the stage in `folder`.

    Args:
        say: called with a sentence for a piece that was damaged.
        seed: of the run; pieces of another seed are made again.
    """

    def __init__(self, folder: Path, say: Say, seed: int) -> None:
        self.folder, self.say, self.seed = folder, say, seed
        self._path = folder / _RECORD
        self._damaged = False
        self._hashes: dict[str, Any] = self._recorded()

    def has(self, path: Path) -> bool:
        """Whether a piece is there and as it was made; a damaged one is removed, and it is said so."""
        if not path.exists():
            return False
        name = str(path.relative_to(self.folder))
        if name in self._hashes:
            damaged = changed(path, self._hashes[name])
            if damaged is None:
                return True
            self.say(f"{damaged} has changed since it was made; {name} is made again")
        elif not self._damaged:  # of 0.1.0, or killed between the piece and its record
            self.record(path)
            return True
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return False

    def record(self, path: Path) -> None:
        """Remember a piece that has just been made."""
        self._hashes[str(path.relative_to(self.folder))] = hashes(path)
        write_json(self._path, seal({"seed": self.seed, "files": self._hashes}))

    def _recorded(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        try:
            record = read_json(self._path)
        except UserError:
            record = {}
        files = record.get("files")
        foreign = record.get("seed", self.seed) != self.seed  # 0.1.0 wrote none
        if not isinstance(files, dict) or not intact(record) or foreign:
            self._damaged = True
            what = "of another seed" if foreign else "damaged"
            self.say(f"{self._path} is {what}, so what was prepared is made again")
            return {}
        return files
