"""What a run's model is made from: base, data and the models that rewards ask, each with its hash. Its lineage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.recipe import Recipe
from farthing.runs.folder import data_files, data_tasks, judging_models
from farthing.tasks import gym
from farthing.tasks.data import is_data
from farthing.weights.sources import Source


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run as they are now."""

    recipe: Recipe
    base: dict[str, Any] | None
    """The identity of the base's weights."""
    files: dict[str, Any]
    """The hashes of each source of data."""
    judges: list[dict[str, Any]]
    """The identities of the models that rewards ask."""

    @classmethod
    def of(cls, recipe: Recipe, source: Source | None) -> Inputs:
        """Hash them. Raises UserError for an input that is not there."""
        return cls(recipe, source.identity if source else None, data_files(recipe), judging_models(recipe))

    def check(self, recorded: Mapping[str, Any], folder: Path) -> None:
        """Compare them with the lineage of an earlier attempt in a run's folder.

        Raises:
            UserError: that names the one that is not what the run was started with.
        """
        base = recorded["base"]["sha256"] if recorded["base"] else None
        if self.base is not None and base != self.base["sha256"]:
            raise _changed(f"the weights of {self.recipe.base}", folder)
        asked = {entry["source"]: entry["sha256"] for entry in recorded.get("judges", ())}
        for judge in self.judges:
            if asked.get(judge["source"]) != judge["sha256"]:
                raise _changed(f"the weights of the {judge['use']} {judge['source']}", folder)
        data = {entry["source"]: entry.get("sha256") for entry in recorded["data"]}
        for name, digests in self.files.items():
            if data.get(name) != digests:
                raise _changed(f"the data in {name}", folder)

    def lineage(self) -> dict[str, Any]:
        """What lineage.json holds."""
        mixtures = [mixture for stage in self.recipe.stages for mixture in stage.mixtures]
        generators = [
            {**gym.origin(name), "config": setting.config}
            for name, setting in {name: one for mixture in mixtures for name, one in mixture.items()}.items()
            if not is_data(name, setting)
        ]
        asked = [task.origins() for task in data_tasks(self.recipe).values()]
        known = {entry["source"]: {**entry, "questions": True} for entries in asked for entry in entries}
        files = [
            known.get(name, {"source": name, "sha256": digests, "license": None})
            for name, digests in self.files.items()
        ]
        lineage: dict[str, Any] = {"base": self.base, "data": [*generators, *files], "teachers": []}
        if self.judges:
            lineage["judges"] = self.judges
        if tokenizer := getattr(self.recipe.stages[0], "tokenizer", None):
            lineage["tokenizer"] = tokenizer
        return lineage


def _changed(what: str, folder: Path) -> UserError:
    return UserError(
        f"{what} have changed since {folder} was started; put them back, or give another --run-dir"
    )
