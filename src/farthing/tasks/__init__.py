"""Verifiable problems and their verifiers. Model output is never executed.

The verifier processes start from here, so nothing heavy is imported.
"""

from farthing.tasks.item import Item, Verdict

__all__ = ["Item", "Verdict"]
