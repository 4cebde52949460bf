"""The revisions at which a run reads datasets of the hub: a run that goes on reads what it began with."""

from __future__ import annotations

from pathlib import Path

from farthing.base.errors import UserError
from farthing.base.files import read_json, write_json
from farthing.data.text import hub_name, said_by_hub
from farthing.runs.folder import put_back


class Revisions:
    """hub.json of a run directory: a dataset's revision by its source, as of when the run first read it.

    Raises:
        UserError: if the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "hub.json"
        self._found = read_json(self._path, put_back(folder)) if self._path.exists() else {}
        if not all(isinstance(revision, str) for revision in self._found.values()):
            raise UserError(f"{self._path} is damaged: a revision is no text; {put_back(folder)}")
        self._unknown: set[str] = set()

    def of(self, source: str) -> str | None:
        """The revision of a source; None where the hub does not say, as when there is no network."""
        if source not in self._found and source not in self._unknown:
            revision, _ = said_by_hub(source)
            if revision in (None, hub_name(source).revision):  # it does not say, or is as named already
                self._unknown.add(source)
            else:
                self._found[source] = revision
                write_json(self._path, self._found)
        found = self._found.get(source)
        return found if isinstance(found, str) else None
