"""The kinds of stage: `stages/KIND.py` has `run`, which takes a model folder and leaves another."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

from farthing.stages.at import At


class Kind(Protocol):
    """A module of this package that runs one kind of stage."""

    def run(self, spec: Any, start: Path | None, at: At) -> Path:
        """Run the stage, or continue it from its last checkpoint.

        Args:
            spec: the kind's keys, such as `recipe.Grpo`.
            start: the model folder that it starts from; None for a kind that starts from nothing.

        Returns:
            the model folder it leaves, in `at.folder`.

        Raises:
            UserError: for data it cannot use, and if training diverges. Finished work stays.
        """


def kind(name: str) -> Kind:
    """The module of a kind in `recipe.KINDS`, with its dependencies, which are loaded only now."""
    return cast(Kind, importlib.import_module(f"farthing.stages.{name}"))
