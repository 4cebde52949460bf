"""Run a recipe in a directory, and continue it there."""

from farthing.runs.run import Run, run

__all__ = ["Run", "run"]
