"""A finished run, as `run` returns it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farthing.base.files import read_json
from farthing.cost import ledger
from farthing.runs.folder import put_back


@dataclass(frozen=True)
class Run:
    """A finished run: its directory and its results.json."""

    run_dir: Path
    results: dict[str, Any]

    @property
    def model_folder(self) -> Path:
        """The last stage's model folder."""
        return (self.run_dir / "model").resolve()

    @property
    def ledger(self) -> list[ledger.Line]:
        """Every complete line of the ledger."""
        return ledger.read(self.run_dir / "ledger.jsonl")[0]

    @property
    def lineage(self) -> dict[str, Any]:
        """The model's inputs: base, data, teachers."""
        return read_json(self.run_dir / "lineage.json", put_back(self.run_dir))
