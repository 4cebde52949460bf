"""A recipe run in a directory, and continued there."""

from farthing.runs.run import Run, run

__all__ = ["Run", "run"]
