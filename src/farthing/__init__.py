"""Farthing: build a DeepSeek-style language model from open parts, and account for every farthing.

The public API is `load`, `run`, `plan` and the types they return. They are imported on first use, so the command line
starts without loading torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Completion", "Model", "UserError", "load", "plan", "run"]

from farthing.base import processor
from farthing.base.errors import UserError

processor.limit_libraries()  # before any import loads torch

if TYPE_CHECKING:
    from farthing.engine import Completion, Model, load
    from farthing.plans import plan
    from farthing.runs import run


def __getattr__(name: str) -> Any:
    if name in ("Completion", "Model", "load"):
        import farthing.engine

        return getattr(farthing.engine, name)
    if name == "run":
        import farthing.runs

        return farthing.runs.run
    if name == "plan":
        import farthing.plans

        return farthing.plans.plan
    raise AttributeError(f"module 'farthing' has no attribute {name!r}")
